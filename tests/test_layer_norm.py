"""layer_norm and add_layer_norm: what they promise, refuse and are killed for beyond test_norms.py."""

import pickle

import mpmath
import pytest
import torch
from norms import BF16, DTYPES, EPS, F32, FAMILIES, LAYER_NORM, LENGTHS, needs_kernels, needs_long_double, rows_of, ulps

from transfuse import add_layer_norm, dispatch, layer_norm
from transfuse.nn import AddLayerNorm
from transfuse.ops import layer_norm as page
from transfuse.reference.layer_norm import layer_norm_reference
from transfuse.testing import MAX_ULP, assert_close, assert_matches_reference, draw, ulp_distance

pytestmark = needs_kernels

# The largest |x| of bfloat16 overflows float in x - mean and has a subnormal rstd; wider types have wider arithmetic.
EXTREME = torch.tensor([[3e38, -3e38, 1e38, 2e38, -1e38, 3e38, 0.0, -2e38]])


def test_the_oracle_agrees_with_forty_digits():
    x = draw(3, 7, seed=5, shift=1e6)
    weight, bias = LAYER_NORM.parameters(7)
    expected = torch.empty(3, 7, dtype=torch.float64)
    with mpmath.workdps(40):
        for i, row in enumerate(x.tolist()):
            mean = mpmath.fsum(row) / 7
            root = mpmath.sqrt(mpmath.fsum((v - mean) ** 2 for v in map(mpmath.mpf, row)) / 7 + mpmath.mpf(EPS))
            for j, v in enumerate(row):
                expected[i, j] = float((v - mean) / root * weight[j].item() + bias[j].item())
    wide = (x.double(), (7,), weight.double(), bias.double(), EPS)
    assert_close(layer_norm_reference(*wide), expected, num_terms=7, slack=1e6)  # float64 itself loses mean/std
    distance = ulp_distance(layer_norm(x, (7,), weight, bias, EPS), expected, 1.0)
    assert float(distance.max()) <= MAX_ULP["layer_norm_forward"]
    assert_close(layer_norm(*wide), expected, num_terms=7)  # the float64 kernel does not lose it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -123456.0, 1e30, 3e38, 1e-40, -1.7e308, 1e-310])
def test_a_constant_row_gives_exactly_bias(dtype, value):
    for cols in (1, 3, 31, 768, 1000):
        weight, bias = LAYER_NORM.parameters(cols, dtype)
        x = torch.full((5, cols), value, dtype=torch.float64).to(dtype)
        if x.isfinite().all():
            assert torch.equal(layer_norm(x, (cols,), weight, bias), bias.expand(5, cols))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_largest_numbers(dtype):
    x = EXTREME.to(dtype)
    exact = layer_norm_reference(x.double(), (8,))
    assert_close(layer_norm(x, (8,)), exact, num_terms=8)


def test_the_largest_doubles():
    x = EXTREME.double() * 2.0**896
    assert_close(layer_norm(x, (8,)), layer_norm(EXTREME.double(), (8,)), num_terms=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_parameters_are_optional_each(dtype, has_weight, has_bias):
    weight, bias = LAYER_NORM.parameters(65, dtype, grad=True)
    x = draw(9, 65, dtype=dtype, requires_grad=True)
    arguments = (x, (65,), weight if has_weight else None, bias if has_bias else None, EPS)
    assert_matches_reference(layer_norm, *arguments)
    assert_matches_reference(add_layer_norm, x, draw(9, 65, dtype=dtype, seed=3), *arguments[1:])


def test_add_layer_norm_module():
    x, residual = draw(64, 96), draw(64, 96, seed=1)
    module = AddLayerNorm(96, p=0.25)
    torch.nn.init.normal_(module.weight)
    assert not torch.equal(module(x, residual), module(x, residual))
    assert torch.equal(module.eval()(x, residual), layer_norm(x + residual, (96,), module.weight, module.bias))
    for arguments in ({}, {"bias": False}, {"elementwise_affine": False}, {"eps": EPS, "dtype": BF16}):
        stock, fused = torch.nn.LayerNorm((3, 8), **arguments), AddLayerNorm((3, 8), **arguments)
        fused.load_state_dict(stock.state_dict())
        x = draw(5, 3, 8, dtype=arguments.get("dtype", F32))
        assert_close(fused(x, x), stock(x + x), num_terms=24)
        assert repr(fused).endswith(", p=0.0)")
        assert torch.equal(pickle.loads(pickle.dumps(fused))(x, x), fused(x, x))


# ---- errors ----

RAW_ERRORS = {
    "normalized_ndim is 0, expected 1 to 2 (input's number of dimensions)": lambda x, w: (x, w, None, 0, EPS),
    "normalized_ndim is 3, expected 1 to 2 (input's number of dimensions)": lambda x, w: (x, w, None, 3, EPS),
    "weight has shape (4,), expected the last dimensions of input's (2, 5)": lambda x, w: (x, w[:4], None, 1, EPS),
    "bias has shape (4,), expected the last dimensions of input's (2, 5)": lambda x, w: (x, w, w[:4], 1, EPS),
    "bias has dtype float64, expected float32": lambda x, w: (x, w, w.double(), 1, EPS),
    "input has dtype int64, expected float32, bfloat16, float16 or float64": lambda x, w: (x.long(), w, None, 1, EPS),
    "weight has dtype float32, expected float64": lambda x, w: (x.double(), w, None, 1, EPS),
    "weight has dtype float16, expected bfloat16": lambda x, w: (x.bfloat16(), w.half(), None, 1, EPS),
    "bias has dtype float32, expected bfloat16": lambda x, w: (x.bfloat16(), w.bfloat16(), w, 1, EPS),
}


@pytest.mark.parametrize("message", RAW_ERRORS)
def test_raw_op_refuses_what_would_touch_memory_wrongly(message):
    with pytest.raises(ValueError) as error:
        torch.ops.transfuse.layer_norm_forward.default(*RAW_ERRORS[message](torch.ones(2, 5), torch.ones(5)))
    assert str(error.value) == f"layer_norm: {message}"


X, W = torch.ones(2, 5), torch.ones(5)
X16, W16 = X.bfloat16(), W.bfloat16()
norm, add_norm = layer_norm, add_layer_norm
ERRORS = [
    (TypeError, "layer_norm: input is a list, expected a Tensor", lambda: norm([1.0], (1,))),
    (TypeError, "layer_norm: input has dtype int64, expected a floating dtype", lambda: norm(X.long(), (5,))),
    (TypeError, "layer_norm: normalized_shape is a int, expected a tuple of ints", lambda: norm(X, 5)),
    (ValueError, "layer_norm: normalized_shape is (), expected at least one dimension", lambda: norm(X, ())),
    (ValueError, "layer_norm: input has shape (2, 5), expected (*, 4) (normalized_shape's)", lambda: norm(X, (4,))),
    (ValueError, "layer_norm: input has shape (5,), expected (*, 2, 5) (normalized_shape's)", lambda: norm(W, (2, 5))),
    (TypeError, "layer_norm: eps is a str, expected a float", lambda: norm(X, (5,), eps="small")),
    (TypeError, "layer_norm: weight is a float, expected a Tensor or None", lambda: norm(X, (5,), 1.0)),
    (ValueError, "layer_norm: weight has shape (4,), expected (5,) (normalized_shape)", lambda: norm(X, (5,), W[:4])),
    (ValueError, "layer_norm: bias has shape (2, 5), expected (5,) (normalized_shape)", lambda: norm(X, (5,), W, X)),
    (TypeError, "layer_norm: weight has dtype bfloat16, expected float32 (input's)", lambda: norm(X, (5,), W16)),
    (TypeError, "layer_norm: bias has dtype float32, expected bfloat16 (weight's)", lambda: norm(X16, (5,), W16, W)),
    (RuntimeError, "layer_norm: weight is on meta, expected cpu (input's)", lambda: norm(X, (5,), W.to("meta"))),
    (TypeError, "add_layer_norm: residual is a NoneType, expected a Tensor", lambda: add_norm(X, None, (5,))),
    (TypeError, "add_layer_norm: residual has dtype int64, expected a floating dtype",
     lambda: add_norm(X, X.long(), (5,))),
    (ValueError, "add_layer_norm: residual has shape (5,), expected (2, 5) (input's)", lambda: add_norm(X, W, (5,))),
    (RuntimeError, "add_layer_norm: residual is on meta, expected cpu (input's)",
     lambda: add_norm(X, X.to("meta"), (5,))),
    (ValueError, "add_layer_norm: dropout_p is 1.5, expected 0 <= dropout_p <= 1",
     lambda: add_norm(X, X, (5,), dropout_p=1.5)),
    (ValueError, "AddLayerNorm: p is -0.1, expected a number between 0 and 1", lambda: AddLayerNorm(5, p=-0.1)),
]


@pytest.mark.parametrize("kind, message, call", ERRORS, ids=[message for _, message, _ in ERRORS])
def test_bad_input_is_refused_in_words(kind, message, call):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message



# ---- the suite is trusted because it kills these ----


def _centered_at_zero(input, weight, bias, ndim, eps):
    x = input.double()
    return ((x / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()) * weight + bias).to(input.dtype)


def _tail_dropped(input, weight, bias, ndim, eps):
    whole = input.shape[-1] // 16 * 16
    x = input.double()
    part = x[..., :whole]
    mean, var = part.mean(-1, keepdim=True), part.var(-1, unbiased=False, keepdim=True)
    return ((x - mean) / (var + eps).sqrt() * weight + bias).to(input.dtype)


MUTANTS = {
    "eps wrong": lambda x, w, b, n, eps: page._run_reference(x, w, b, n, 1e-5),
    "eps outside the root": lambda x, w, b, n, eps: page._run_reference(x, w, b, n, eps * eps),
    "weight * 1.01": lambda x, w, b, n, eps: page._run_reference(x, w * 1.01, b, n, eps),
    "bias dropped": lambda x, w, b, n, eps: page._run_reference(x, w, None, n, eps),
    "tail column dropped": _tail_dropped,
    "mean not subtracted": _centered_at_zero,
    "unbiased variance": lambda x, w, b, n, eps: page._run_reference(x, w * (1 - 1 / x.shape[-1]) ** 0.5, b, n, eps),
}


@needs_long_double
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name, monkeypatch):
    mutant = dispatch.Implementation("cpu", dispatch.supports_all, MUTANTS[name])
    monkeypatch.setattr(page, "IMPLEMENTATIONS", (mutant,))
    monkeypatch.setattr(dispatch, "_choices", {})
    family = FAMILIES[F32]["plain"]
    errors = [ulps(LAYER_NORM, rows_of(family, 20, cols, F32), *LAYER_NORM.parameters(cols)) for cols in LENGTHS]
    assert not all(error <= MAX_ULP["layer_norm_forward"] for error in errors)
