"""layer_norm and add_layer_norm: the contract of ops/layer_norm.py, held on every backend that can run here."""

import copy
import io
import pickle

import mpmath
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import transfuse
from transfuse import add_layer_norm, dispatch, extension, layer_norm
from transfuse.nn import AddLayerNorm, LayerNorm
from transfuse.ops import layer_norm as page
from transfuse.reference.layer_norm import add_layer_norm_reference, layer_norm_reference
from transfuse.testing import MAX_ULP, assert_close, assert_matches_reference, draw, nan_filled_empty, ulp_distance

pytestmark = pytest.mark.skipif(bool(extension.cpu_unavailable), reason=extension.cpu_unavailable)

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 384, 768, 1000)
EPS = 0.3  # large, so that a wrong eps shows
# name -> (standard deviation of a row, its mean, eps, size of the incoming gradient that keeps gradients in range)
FAMILIES = {
    "plain": (1.0, 0.0, EPS, 1.0),
    "mean/std 1e4": (1.0, 1e4, EPS, 1.0),
    "mean/std 1e6": (1.0, 1e6, EPS, 1.0),
    "tiny std": (1e-6, 1.0, 1e-5, 1.0),
    "|x| 1e30": (1e30, 0.0, EPS, 1e20),
    "|x| 1e37": (1e37, 0.0, EPS, 1e20),
    "mean/std 1e6 at 1e36": (1e30, 1e36, EPS, 1e20),
    "subnormals": (1e-40, 0.0, EPS, 1e20),
    "subnormals, eps 0": (1e-40, 0.0, 0.0, 1e-8),
}
# The largest |x| of bfloat16 overflows float in x - mean and has a subnormal rstd; float32 needs no such row: double.
EXTREME = torch.tensor([[3e38, -3e38, 1e38, 2e38, -1e38, 3e38, 0.0, -2e38]])


def _parameters(cols, dtype, grad=False):
    weight = draw(cols, dtype=dtype, seed=11, scale=0.5, shift=1.5, requires_grad=grad)
    return weight, draw(cols, dtype=dtype, seed=12, shift=-0.25, requires_grad=grad)


def _distance(x, weight, bias, eps):
    """Error of layer_norm in the contract's measure: units of the last place of max(|weight * xhat|, |bias|, 1)."""
    cols = x.shape[-1]
    actual = layer_norm(x, (cols,), weight, bias, eps).double()
    weight, bias = weight.double(), bias.double()
    exact = layer_norm_reference(x.double(), (cols,), weight, bias, eps)
    size = torch.maximum((exact - bias).abs(), bias.abs()).clamp(min=1.0)
    unit = torch.ldexp(torch.full_like(size, torch.finfo(x.dtype).eps), torch.frexp(size).exponent - 1)
    return float(((actual - exact).abs() / unit).max())


# ---- forward ----


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_within_the_bound_of_the_contract(family):
    scale, shift, eps, _ = FAMILIES[family]
    for cols in LENGTHS:
        if eps == 0.0 and cols == 1:
            continue  # 0/0
        x = draw(40, cols, seed=cols, scale=scale, shift=shift)
        distance = _distance(x, *_parameters(cols, torch.float32), eps)
        assert distance <= MAX_ULP["layer_norm_forward"], f"{cols} columns: {distance:.2f} ULP"


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_rounded_once(family, weight_dtype):
    scale, shift, eps, _ = FAMILIES[family]
    for cols in LENGTHS:
        if eps == 0.0 and cols == 1:
            continue
        x = draw(40, cols, dtype=torch.bfloat16, seed=cols, scale=scale, shift=shift)
        if eps == 0.0:
            x[..., 0] = 1e-38  # no constant row, which is 0/0
        weight, bias = _parameters(cols, weight_dtype)
        actual = layer_norm(x, (cols,), weight, bias, eps)
        exact = layer_norm_reference(x.double(), (cols,), weight.double(), bias.double(), eps)
        assert_close(actual, exact, what=f"{cols} columns")
        misrounded = (actual != exact.to(torch.bfloat16)).double().mean()
        assert float(misrounded) <= 0.002, f"{cols} columns: {float(misrounded):.1%} are not the nearest bfloat16"


def test_the_oracle_agrees_with_forty_digits():
    x = draw(3, 7, seed=5, shift=1e6)
    weight, bias = _parameters(7, torch.float32)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -123456.0, 1e30, 3e38, 1e-40])
def test_a_constant_row_gives_exactly_bias(dtype, value):
    for cols in (1, 3, 31, 768, 1000):
        weight, bias = _parameters(cols, dtype)
        x = torch.full((5, cols), value, dtype=dtype)
        assert torch.equal(layer_norm(x, (cols,), weight, bias), bias.expand(5, cols))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers(dtype):
    x = EXTREME.to(dtype)
    exact = layer_norm_reference(x.double(), (8,))
    assert_close(layer_norm(x, (8,)), exact, num_terms=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_the_row_with_nan_or_inf_is_nan(dtype, value):
    for cols in (2, 33, 768):
        for position in (0, cols - 1):
            x = draw(6, cols, dtype=dtype)
            x[2, position] = value
            y = layer_norm(x, (cols,), *_parameters(cols, dtype))
            assert y[2].isnan().all()
            assert y[[0, 1, 3, 4, 5]].isfinite().all()
            assert torch.nn.functional.layer_norm(x, (cols,))[2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_parameters_are_optional_each(dtype, has_weight, has_bias):
    weight, bias = _parameters(65, dtype, grad=True)
    x = draw(9, 65, dtype=dtype, requires_grad=True)
    arguments = (x, (65,), weight if has_weight else None, bias if has_bias else None, EPS)
    assert_matches_reference(layer_norm, *arguments)
    assert_matches_reference(add_layer_norm, x, draw(9, 65, dtype=dtype, seed=3), *arguments[1:])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_shapes_of_every_kind(dtype):
    """Leading dimensions, several normalised ones, none at all, empty ones: as torch, forward and backward."""
    leading = [((5,), 1), ((2, 3, 4, 5), 1), ((2, 3, 4, 5), 3), ((4, 5), 2)]
    empty = [((0, 7), 1), ((3, 0), 1), ((2, 0, 5), 1), ((0, 0), 2)]
    for shape, ndim in leading + empty:
        x = draw(*shape, dtype=dtype, requires_grad=True)
        weight = draw(*shape[-ndim:], dtype=dtype, seed=1, requires_grad=True)
        bias = draw(*shape[-ndim:], dtype=dtype, seed=2, requires_grad=True)
        with dispatch.use_backend("reference" if dtype == torch.float64 else "auto"):
            ours = layer_norm(x, shape[-ndim:], weight, bias, EPS)
            ours_grads = torch.autograd.grad(ours.sum() + (ours * ours).sum(), (x, weight, bias))
        stock = torch.nn.functional.layer_norm(x, shape[-ndim:], weight, bias, EPS)
        stock_grads = torch.autograd.grad(stock.sum() + (stock * stock).sum(), (x, weight, bias))
        assert ours.dtype == stock.dtype and ours.is_contiguous()
        for a, b in zip((ours, *ours_grads), (stock, *stock_grads), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert_close(a, b.double(), num_terms=200, slack=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    base = draw(4, 33, 10, dtype=dtype)
    views = {
        "transposed": base.transpose(1, 2),
        "sliced": base[:, ::2].transpose(1, 2)[:, 1:, 3:],
        "expanded": base[:1, :1].expand(6, 5, 10),
        "column": base[:, :, :1],
        "offset": base.flatten()[1:97].view(3, 32),
        "stale stride of size 1": base.as_strided((1, 33), (7777, 10)),
    }
    for name, view in views.items():
        cols = view.shape[-1]
        weight, bias = (t.repeat_interleave(2)[::2] for t in _parameters(cols, dtype))
        dense = [t.contiguous() for t in (view, weight, bias)]
        assert torch.equal(layer_norm(view, (cols,), weight, bias), layer_norm(dense[0], (cols,), *dense[1:])), name
        pairs = zip(add_layer_norm(view, view, (cols,)), add_layer_norm(dense[0], dense[0], (cols,)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_add_layer_norm_is_the_two_steps():
    for dtype in DTYPES:
        for cols in (1, 33, 768):
            x, residual = draw(19, cols, dtype=dtype), draw(19, cols, dtype=dtype, seed=1)
            weight, bias = _parameters(cols, dtype)
            output, total = add_layer_norm(x, residual, (cols,), weight, bias, EPS)
            assert torch.equal(total, x + residual)
            assert torch.equal(output, layer_norm(x + residual, (cols,), weight, bias, EPS))


def test_add_layer_norm_takes_the_wider_dtype_as_addition_does():
    x, residual = draw(3, 8, dtype=torch.bfloat16, requires_grad=True), draw(3, 8, seed=1, requires_grad=True)
    output, total = add_layer_norm(x, residual, (8,), *_parameters(8, torch.float32))
    assert output.dtype == total.dtype == torch.float32
    output.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and residual.grad.dtype == torch.float32


def test_dropout_in_front():
    x, residual = draw(64, 96, requires_grad=True), draw(64, 96, seed=1)
    torch.manual_seed(3)
    output, total = add_layer_norm(x, residual, (96,), dropout_p=0.25)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.25)
    assert torch.equal(total, dropped + residual) and torch.equal(output, layer_norm(total, (96,)))
    assert torch.equal(add_layer_norm(x, residual, (96,), dropout_p=1.0)[1], residual)
    module = AddLayerNorm(96, p=0.25)
    assert not torch.equal(module(x, residual), module(x, residual))
    assert torch.equal(module.eval()(x, residual), layer_norm(x + residual, (96,), module.weight, module.bias))


# ---- backward ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_against_the_float64_oracle(dtype, family):
    scale, shift, eps, grad_size = FAMILIES[family]
    if dtype == torch.bfloat16 and eps == 0.0:
        pytest.skip("bfloat16 subnormals are a handful of values: constant rows, 0/0")
    for cols in (31, 65, 129, 768, 1000):
        x = draw(37, cols, dtype=dtype, seed=cols, scale=scale, shift=shift)
        weight, bias = _parameters(cols, dtype)
        grad = draw(37, cols, dtype=dtype, seed=3, scale=grad_size, shift=grad_size / 2)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        actual = torch.autograd.grad(layer_norm(x, (cols,), weight, bias, eps), leaves, grad)
        exact = torch.autograd.grad(layer_norm_reference(wide[0], (cols,), *wide[1:], eps), wide, grad.double())
        for name, a, e in zip(("input", "weight", "bias"), actual, exact, strict=True):
            if family == "subnormals" and name == "weight":
                continue  # xhat is itself subnormal: its last bit is an absolute one
            assert_close(a, e, num_terms=cols, what=f"grad_{name}, {cols} columns")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_both_outputs_of_add_layer_norm(dtype):
    for rows, cols in [(1, 1), (5, 33), (70, 128)]:
        x, residual = (draw(rows, cols, dtype=dtype, seed=s, requires_grad=True) for s in (1, 2))
        assert_matches_reference(add_layer_norm, x, residual, (cols,), *_parameters(cols, dtype, grad=True), EPS)


def test_gradients_when_one_output_is_not_used():
    x, residual = draw(5, 8, requires_grad=True), draw(5, 8, seed=1, requires_grad=True)
    weight, bias = _parameters(8, torch.float32, grad=True)
    output, total = add_layer_norm(x, residual, (8,), weight, bias)
    through_sum = torch.autograd.grad(total.sum(), (x, residual, weight), retain_graph=True, allow_unused=True)
    assert [g is None for g in through_sum] == [False, False, True]
    assert torch.equal(torch.autograd.grad(total, x, torch.ones(5, 8), retain_graph=True)[0], torch.ones(5, 8))
    wide = [t.detach().double().requires_grad_() for t in (x, residual)]
    exact, _ = add_layer_norm_reference(*wide, (8,), weight.double(), bias.double())
    exact = torch.autograd.grad(exact.square().sum(), wide)
    for a, e in zip(torch.autograd.grad(output.square().sum(), (x, residual)), exact, strict=True):
        assert_close(a, e, num_terms=64)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_only_the_wanted_gradients(wanted):
    x, (weight, bias) = draw(40, 33), _parameters(33, torch.float32)
    for tensor, want in zip((x, weight, bias), wanted, strict=True):
        tensor.requires_grad_(bool(want))
    assert_matches_reference(layer_norm, x, (33,), weight, bias, EPS)
    layer_norm(x, (33,), weight, bias, EPS).sum().backward()
    assert [t.grad is not None for t in (x, weight, bias)] == [bool(w) for w in wanted]


def test_grad_output_of_any_strides():
    x, (weight, bias) = draw(6, 33, requires_grad=True), _parameters(33, torch.float32, grad=True)
    y = layer_norm(x, (33,), weight, bias, EPS)
    for grad in (torch.ones(1, 1).expand(6, 33), draw(33, 6).t(), draw(6, 66)[:, ::2]):
        strided = torch.autograd.grad(y, (x, weight, bias), grad, retain_graph=True)
        dense = torch.autograd.grad(y, (x, weight, bias), grad.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_gradcheck_of_the_float64_reference():
    shapes = [(2, 5), (2, 5), (5,), (5,)]
    tensors = [draw(*shape, dtype=torch.float64, seed=s, requires_grad=True) for s, shape in enumerate(shapes)]

    def norm(x, weight, bias):
        return layer_norm(x, (5,), weight, bias, EPS)

    def add_norm(x, residual, weight, bias):
        return add_layer_norm(x, residual, (5,), weight, bias, EPS)

    with dispatch.use_backend("reference"):
        assert torch.autograd.gradcheck(norm, tensors[1:])
        assert torch.autograd.gradcheck(add_norm, tensors)
        assert torch.autograd.gradgradcheck(norm, tensors[1:])


# ---- determinism and invariance, bitwise ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_repeats_change_no_bit(dtype):
    x, residual = draw(301, 1000, dtype=dtype, requires_grad=True), draw(301, 1000, dtype=dtype, seed=1)
    weight, bias = _parameters(1000, dtype, grad=True)
    grad = draw(301, 1000, dtype=dtype, seed=2)

    def run():
        output, total = add_layer_norm(x, residual, (1000,), weight, bias)
        return [output, total, *torch.autograd.grad((output, total), (x, weight, bias), (grad, grad))]

    results = []
    for threads in (1, 2, 3, 7, 1):
        torch.set_num_threads(threads)
        results.append(run())
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype):
    for cols in (33, 768):
        x, grad = draw(131, cols, dtype=dtype), draw(131, cols, dtype=dtype, seed=1)
        weight, bias = _parameters(cols, dtype)

        def run(rows):
            leaf = x[rows].clone().requires_grad_()
            y = layer_norm(leaf, (cols,), weight, bias)
            return y.detach(), *torch.autograd.grad(y, leaf, grad[rows])

        whole = run(slice(None))
        for rows in (slice(0, 1), slice(1, 2), slice(130, 131), slice(3, 8), slice(100, None), torch.randperm(131)):
            assert all(torch.equal(part, all_rows[rows]) for part, all_rows in zip(run(rows), whole, strict=True))


def test_inputs_are_not_written_and_every_result_is():
    with nan_filled_empty():
        for dtype in DTYPES:
            tensors = [draw(35, 47, dtype=dtype, seed=s) for s in (1, 2)] + list(_parameters(47, dtype))
            before = [t.clone() for t in tensors]
            leaves = [t.requires_grad_() for t in tensors]
            output, total = add_layer_norm(*leaves[:2], (47,), *leaves[2:])
            grads = torch.autograd.grad(output.sum() + total.sum(), leaves, retain_graph=True)
            again = torch.autograd.grad(output.sum() + total.sum(), leaves)
            assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
            assert all(torch.equal(a.detach(), b) for a, b in zip(tensors, before, strict=True))
            assert all(t.isfinite().all() for t in (output, total, *grads))


# ---- the raw ops ----


def test_opcheck_and_statistics():
    x, residual, (weight, bias) = draw(4, 3, 10), draw(4, 3, 10, seed=1), _parameters(10, torch.float32)
    ops = torch.ops.transfuse
    torch.library.opcheck(ops.layer_norm_forward.default, (x, weight, None, 1, EPS))
    torch.library.opcheck(ops.add_layer_norm_forward.default, (x.bfloat16(), residual.bfloat16(), weight, bias, 1, EPS))
    backward = ops.layer_norm_backward.default
    torch.library.opcheck(backward, (x, residual, x.clone(), None, bias, 1, EPS, True, False, True))
    torch.library.opcheck(backward, (x, None, x.clone(), weight, None, 1, EPS, True, True, False))
    stock = torch.native_layer_norm(x, (10,), weight, bias, EPS)
    for a, b in zip(ops.layer_norm_forward.default(x, weight, bias, 1, EPS), stock, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert_close(a, b, num_terms=10)


RAW_ERRORS = {
    "normalized_ndim is 0, expected 1 to 2 (input's number of dimensions)": lambda x, w: (x, w, None, 0, EPS),
    "normalized_ndim is 3, expected 1 to 2 (input's number of dimensions)": lambda x, w: (x, w, None, 3, EPS),
    "weight has shape (4,), expected the last dimensions of input's (2, 5)": lambda x, w: (x, w[:4], None, 1, EPS),
    "bias has shape (4,), expected the last dimensions of input's (2, 5)": lambda x, w: (x, w, w[:4], 1, EPS),
    "bias has dtype float64, expected float32": lambda x, w: (x, w, w.double(), 1, EPS),
    "input has dtype float64, expected float32 or bfloat16": lambda x, w: (x.double(), w, None, 1, EPS),
    "bias has dtype float32, expected bfloat16": lambda x, w: (x.bfloat16(), w.bfloat16(), w, 1, EPS),
}


@pytest.mark.parametrize("message", RAW_ERRORS)
def test_raw_op_refuses_what_would_touch_memory_wrongly(message):
    with pytest.raises(ValueError) as error:
        torch.ops.transfuse.layer_norm_forward.default(*RAW_ERRORS[message](torch.ones(2, 5), torch.ones(5)))
    assert str(error.value) == f"layer_norm: {message}"


# ---- errors ----

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


def test_what_has_no_derivative_says_so():
    x = draw(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="^layer_norm: the cpu backend has no second derivative; run under"):
        (grad,) = torch.autograd.grad(layer_norm(x, (5,)).square().sum(), x, create_graph=True)
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="^add_layer_norm: the cpu backend has no second derivative"):
        (grad,) = torch.autograd.grad(add_layer_norm(x, x, (5,))[0].square().sum(), x, create_graph=True)
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="^layer_norm: the cpu backend has no forward-mode derivative"):
        torch.func.jvp(lambda t: layer_norm(t, (5,)), (X,), (X,))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func():
    x, (weight, bias) = draw(3, 4, 5, requires_grad=True), _parameters(5, torch.float32, grad=True)

    def loss(x, weight, bias, op=layer_norm):
        return op(x, (5,), weight, bias, EPS).square().sum()

    def stock(x, weight, bias):
        return loss(x, weight, bias, torch.nn.functional.layer_norm)

    leaves, plain = (x, weight, bias), [t.detach() for t in (x, weight, bias)]
    mapped = torch.func.vmap(lambda t: layer_norm(t, (5,), weight, bias, EPS))(x)
    assert torch.equal(mapped, layer_norm(x, (5,), weight, bias, EPS))
    everything = (0, 1, 2)
    pairs = [
        (torch.autograd.grad(mapped.square().sum(), leaves), torch.autograd.grad(stock(*leaves), leaves)),
        (torch.autograd.grad(torch.func.vmap(lambda t: layer_norm(t, (5,)))(x).sin().sum(), x),
         torch.autograd.grad(torch.nn.functional.layer_norm(x, (5,)).sin().sum(), x)),
        (torch.func.grad(loss, everything)(*plain), torch.func.grad(stock, everything)(*plain)),
        *((torch.func.vmap(torch.func.grad(f, everything), (0, None, None))(*plain) for f in (loss, stock)),),
    ]
    for ours, expected in pairs:
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, b, num_terms=64, slack=4)


# ---- dispatch, compile, autocast, modules ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_fall_back_visibly(dtype):
    dispatch._warned.clear()
    x = draw(3, 5, dtype=dtype, requires_grad=True)
    with pytest.warns(transfuse.TransfuseWarning, match="the kernel takes float32, bfloat16"):
        y = layer_norm(x, (5,), eps=EPS)
    assert y.dtype == dtype
    y.sum().backward()
    assert transfuse.explain(layer_norm, x, (5,)).chosen == "reference"
    assert transfuse.explain(add_layer_norm, x.float(), x.float(), (5,)).chosen == "cpu"


def test_the_torch_backend_is_torch():
    x, (weight, bias) = draw(3, 5), _parameters(5, torch.float32)
    with dispatch.use_backend("torch"):
        assert torch.equal(layer_norm(x, (5,), weight, bias), torch.nn.functional.layer_norm(x, (5,), weight, bias))
        assert torch.equal(add_layer_norm(x, x, (5,))[0], torch.nn.functional.layer_norm(x + x, (5,)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_the_same_bits(dynamic):
    module, tail = LayerNorm(24), AddLayerNorm(24)

    def block(x):
        return tail(module(x), x)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        x = draw(rows, 24, requires_grad=True)
        leaves = (x, *module.parameters(), *tail.parameters())
        eager, traced = block(x), compiled(x)
        assert torch.equal(eager, traced)
        grads = [torch.autograd.grad(y.sum(), leaves) for y in (eager, traced)]
        for a, b in zip(*grads, strict=True):
            assert_close(b, a, num_terms=24)
        with torch.no_grad():
            assert torch.equal(compiled(x), eager)


def test_inductor_and_export():
    module = LayerNorm(24)
    x = draw(3, 24)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x))
    exported = torch.export.export(module, (x,))
    assert "transfuse.layer_norm_forward" in str(exported.graph)
    assert torch.equal(exported.module()(x), module(x))


def test_autocast_does_what_torch_does():
    for x_dtype in DTYPES:
        x, (weight, bias) = draw(3, 8, dtype=x_dtype), _parameters(8, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, stock = (f(x, (8,), weight, bias) for f in (layer_norm, torch.nn.functional.layer_norm))
        assert ours.dtype == stock.dtype
        assert_close(ours, stock, num_terms=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = add_layer_norm(draw(3, 8, dtype=torch.bfloat16), draw(3, 8), (8,), weight, bias)
        assert output.dtype == torch.float32


def test_checkpointing_replays_the_same_bits():
    x, (weight, bias) = draw(6, 33, requires_grad=True), _parameters(33, torch.float32, grad=True)

    def block(t):
        return add_layer_norm(t, t.cos(), (33,), weight, bias, dropout_p=0.5)[0].square().sum()

    torch.manual_seed(1)
    plain = torch.autograd.grad(block(x), (x, weight, bias))
    torch.manual_seed(1)
    replayed = torch.autograd.grad(checkpoint(block, x, use_reentrant=False), (x, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


@pytest.mark.parametrize(
    "arguments", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": EPS, "dtype": torch.bfloat16}], ids=str
)
def test_modules_are_drop_ins(arguments):
    stock, ours, fused = (cls((3, 8), **arguments) for cls in (torch.nn.LayerNorm, LayerNorm, AddLayerNorm))
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(stock.state_dict())
    fused.load_state_dict(stock.state_dict())
    x = draw(5, 3, 8, dtype=arguments.get("dtype", torch.float32))
    assert_close(ours(x), stock(x), num_terms=24)
    assert_close(fused(x, x), stock(x + x), num_terms=24)
    assert repr(ours) == repr(stock) and repr(fused).endswith(", p=0.0)")
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(module(x), ours(x))
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x, x), fused(x, x))


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


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name, monkeypatch):
    mutant = dispatch.Implementation("cpu", dispatch.supports_all, MUTANTS[name])
    monkeypatch.setattr(page, "IMPLEMENTATIONS", (mutant,))
    monkeypatch.setattr(dispatch, "_choices", {})
    with pytest.raises(AssertionError):
        test_float32_is_within_the_bound_of_the_contract("plain")
