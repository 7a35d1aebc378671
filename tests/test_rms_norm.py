"""rms_norm and add_rms_norm: what they promise, refuse and are killed for beyond test_norms.py."""

import mpmath
import pytest
import torch
from norms import (
    BF16,
    DTYPES,
    EPS,
    F16,
    F32,
    F64,
    FAMILIES,
    LENGTHS,
    RMS_NORM,
    needs_kernels,
    needs_long_double,
    rows_of,
    ulps,
)

from transfuse import add_rms_norm, dispatch, rms_norm
from transfuse.ops import rms_norm as page
from transfuse.reference.rms_norm import add_rms_norm_reference, rms_norm_reference
from transfuse.testing import MAX_ULP, assert_close, assert_matches_reference, draw, ulp_distance

pytestmark = needs_kernels


def test_the_oracle_agrees_with_forty_digits():
    x, (weight,) = draw(3, 7, seed=5, shift=1e6), RMS_NORM.parameters(7)
    expected = torch.empty(3, 7, dtype=F64)
    with mpmath.workdps(40):
        for i, row in enumerate(x.tolist()):
            root = mpmath.sqrt(mpmath.fsum(mpmath.mpf(v) ** 2 for v in row) / 7 + mpmath.mpf(EPS))
            for j, v in enumerate(row):
                expected[i, j] = float(v / root * weight[j].item())
    assert_close(rms_norm_reference(x.double(), (7,), weight.double(), EPS), expected, num_terms=7)
    assert float(ulp_distance(rms_norm(x, (7,), weight, EPS), expected, 1.0).max()) <= MAX_ULP["rms_norm_forward"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_eps_is_the_eps_of_torch(dtype):
    """Rows so small that eps decides: torch takes the eps of the type it computes in, not of the storage type."""
    size = 2.0**-26 if dtype == F64 else 2.0**-11
    x, (weight,) = draw(5, 33, dtype=dtype, scale=size), RMS_NORM.parameters(33, dtype)
    for ours, stock in (
        (rms_norm(x, (33,), weight), torch.nn.functional.rms_norm(x, (33,), weight)),
        (add_rms_norm(x, x, (33,), weight)[0], torch.nn.functional.rms_norm(x + x, (33,), weight)),
        (rms_norm_reference(x, (33,), weight), torch.nn.functional.rms_norm(x, (33,), weight)),
        (add_rms_norm_reference(x, x, (33,), weight)[0], torch.nn.functional.rms_norm(x + x, (33,), weight)),
    ):
        assert_close(ours, stock, num_terms=33)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_give_zeros(dtype):
    x = torch.zeros(3, 33, dtype=dtype)
    assert torch.equal(rms_norm(x, (33,), *RMS_NORM.parameters(33, dtype)), x)
    assert rms_norm(x, (33,), eps=0.0).isnan().all()
    assert torch.equal(rms_norm(-x, (33,)).signbit(), (-x).signbit())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinity_leaves_zeros_as_in_torch(dtype):
    x = draw(2, 33, dtype=dtype)
    x[1, 5] = float("inf")
    y = rms_norm(x, (33,), eps=EPS)
    assert y[1, 5].isnan() and not y[1, :5].any() and not y[1, 6:].any()
    assert torch.equal(y.isnan(), torch.nn.functional.rms_norm(x, (33,), eps=EPS).isnan())


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_largest_numbers(dtype):
    x = torch.tensor([[3e38, -3e38, 1e38, 2e38, -1e38, 3e38, 0.0, -2e38]], dtype=dtype)
    assert_close(rms_norm(x, (8,)), rms_norm_reference(x.double(), (8,), eps=0.0), num_terms=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_weight", [True, False])
def test_weight_is_optional(dtype, has_weight):
    (weight,) = RMS_NORM.parameters(65, dtype, grad=True) if has_weight else (None,)
    x = draw(9, 65, dtype=dtype, requires_grad=True)
    assert_matches_reference(rms_norm, x, (65,), weight, EPS)
    assert_matches_reference(add_rms_norm, x, draw(9, 65, dtype=dtype, seed=3), (65,), weight, EPS)


@pytest.mark.parametrize("dtype, narrow", [(F32, BF16), (F32, F16), (F64, F32), (F64, F16)])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_narrower_weight_is_taken_as_torch_takes_it(dtype, narrow):
    x, (weight,) = draw(5, 33, dtype=dtype), RMS_NORM.parameters(33, narrow, grad=True)
    ours, stock = rms_norm(x, (33,), weight, EPS), torch.nn.functional.rms_norm(x, (33,), weight, EPS)
    assert ours.dtype == stock.dtype == dtype
    assert_close(ours, stock, num_terms=33)
    (grad,) = torch.autograd.grad(ours.sum(), weight)
    assert grad.dtype == narrow


# ---- errors ----

RAW_ERRORS = {
    "normalized_ndim is 0, expected 1 to 2 (input's number of dimensions)": lambda x, w: (x, w, 0, EPS),
    "weight has shape (4,), expected the last dimensions of input's (2, 5)": lambda x, w: (x, w[:4], 1, EPS),
    "input has dtype int64, expected float32, bfloat16, float16 or float64": lambda x, w: (x.long(), w, 1, EPS),
    "weight has dtype float64, expected float32": lambda x, w: (x, w.double(), 1, EPS),
    "weight has dtype float32, expected float64": lambda x, w: (x.double(), w, 1, EPS),
}


@pytest.mark.parametrize("message", RAW_ERRORS)
def test_raw_op_refuses_what_would_touch_memory_wrongly(message):
    with pytest.raises(ValueError) as error:
        RMS_NORM.raw("forward")(*RAW_ERRORS[message](torch.ones(2, 5), torch.ones(5)))
    assert str(error.value) == f"rms_norm: {message}"


def test_raw_backward_refuses_another_shape():
    x = torch.ones(2, 5)
    for arguments, message in (
        ((x[:1], None), "grad_output has shape (1, 5), expected (2, 5) (input's)"),
        ((x, x[:1]), "grad_sum has shape (1, 5), expected (2, 5) (input's)"),
        ((x.double(), None), "grad_output has dtype float64, expected float32"),
    ):
        with pytest.raises(ValueError) as error:
            RMS_NORM.raw("backward")(*arguments, x, None, 1, EPS, True, True)
        assert str(error.value) == f"rms_norm_backward: {message}"


X, W = torch.ones(2, 5), torch.ones(5)
X16, W64 = X.bfloat16(), W.double()
norm, add_norm = rms_norm, add_rms_norm
ERRORS = [
    (TypeError, "rms_norm: input is a list, expected a Tensor", lambda: norm([1.0], (1,))),
    (TypeError, "rms_norm: input has dtype int64, expected a floating dtype", lambda: norm(X.long(), (5,))),
    (TypeError, "rms_norm: normalized_shape is a int, expected a tuple of ints", lambda: norm(X, 5)),
    (ValueError, "rms_norm: normalized_shape is (), expected at least one dimension", lambda: norm(X, ())),
    (ValueError, "rms_norm: input has shape (2, 5), expected (*, 4) (normalized_shape's)", lambda: norm(X, (4,))),
    (TypeError, "rms_norm: eps is a str, expected a float", lambda: norm(X, (5,), eps="small")),
    (ValueError, "rms_norm: eps is -1.0, expected a finite number of at least 0", lambda: norm(X, (5,), eps=-1.0)),
    (TypeError, "rms_norm: weight is a float, expected a Tensor or None", lambda: norm(X, (5,), 1.0)),
    (ValueError, "rms_norm: weight has shape (4,), expected (5,) (normalized_shape)", lambda: norm(X, (5,), W[:4])),
    (TypeError, "rms_norm: weight has dtype int64, expected float32 (input's)", lambda: norm(X, (5,), W.long())),
    (TypeError, "rms_norm: weight has dtype float64, expected float32 (input's)", lambda: norm(X, (5,), W64)),
    (TypeError, "rms_norm: weight has dtype float16, expected bfloat16 (input's)", lambda: norm(X16, (5,), W.half())),
    (RuntimeError, "rms_norm: weight is on meta, expected cpu (input's)", lambda: norm(X, (5,), W.to("meta"))),
    (TypeError, "add_rms_norm: residual is a NoneType, expected a Tensor", lambda: add_norm(X, None, (5,))),
    (ValueError, "add_rms_norm: residual has shape (5,), expected (2, 5) (input's)", lambda: add_norm(X, W, (5,))),
    (RuntimeError, "add_rms_norm: residual is on meta, expected cpu (input's)",
     lambda: add_norm(X, X.to("meta"), (5,))),
    (ValueError, "add_rms_norm: dropout_p is 1.5, expected 0 <= dropout_p <= 1",
     lambda: add_norm(X, X, (5,), dropout_p=1.5)),
]


@pytest.mark.parametrize("kind, message, call", ERRORS, ids=[message for _, message, _ in ERRORS])
def test_bad_input_is_refused_in_words(kind, message, call):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


# ---- the suite is trusted because it kills these ----


def _mean_subtracted(x, weight, ndim, eps):
    return rms_norm_reference(x - x.mean(-1, keepdim=True), x.shape[-1:], weight, eps)


def _last_column_kept_off(x, weight, ndim, eps):
    square = x[..., :-1].double().square().mean(-1, keepdim=True)
    return (x.double() / (square + eps).sqrt() * weight).to(x.dtype)


MUTANTS = {
    "eps wrong": lambda x, w, n, eps: page._run_reference(x, w, n, 1e-5),
    "eps outside the root": lambda x, w, n, eps: page._run_reference(x, w, n, eps * eps),
    "weight * 1.01": lambda x, w, n, eps: page._run_reference(x, w * 1.01, n, eps),
    "weight ignored": lambda x, w, n, eps: page._run_reference(x, None, n, eps),
    "mean subtracted": _mean_subtracted,
    "last column kept off": _last_column_kept_off,
}


@needs_long_double
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name, monkeypatch):
    mutant = dispatch.Implementation("cpu", dispatch.supports_all, MUTANTS[name])
    monkeypatch.setattr(page, "IMPLEMENTATIONS", (mutant,))
    monkeypatch.setattr(dispatch, "_choices", {})
    family = FAMILIES[F32]["plain"]
    errors = [ulps(RMS_NORM, rows_of(family, 20, cols, F32), *RMS_NORM.parameters(cols)) for cols in LENGTHS[1:]]
    assert not all(error <= MAX_ULP["rms_norm_forward"] for error in errors)
