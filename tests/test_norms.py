"""What layer_norm and rms_norm promise alike: accuracy, gradients, shapes, strides, determinism, torch's transforms.

Each norm's own promises, refusals and mutants stand in test_layer_norm.py and test_rms_norm.py.
"""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from norms import (
    BF16,
    DTYPES,
    EPS,
    F16,
    F32,
    F64,
    LENGTHS,
    NORMS,
    PAIRS,
    family_cases,
    needs_kernels,
    needs_long_double,
    rows_of,
    ulps,
)
from torch.utils.checkpoint import checkpoint

import transfuse
from transfuse import dispatch
from transfuse.testing import (
    MAX_ULP,
    MAX_ULP_FLOAT64,
    NORM_ROW_ERROR,
    UNIT_ROUNDOFF,
    assert_close,
    assert_matches_reference,
    draw,
    nan_filled_empty,
)

pytestmark = [needs_kernels, needs_long_double]

EXACT_DTYPES, SHORT_DTYPES = (F32, F64), (BF16, F16)
MISROUNDED = 0.002  # of 16-bit results may be the second nearest: what was rounded is itself a float's last place off


@pytest.fixture(params=NORMS, ids=str)
def norm(request):
    return request.param


def _rounded(exact, dtype):
    return torch.from_numpy(exact.astype(np.float64)).to(dtype)


def _equal(ours, others):
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


# ---- accuracy ----


@pytest.mark.parametrize("dtype, family", family_cases(EXACT_DTYPES))
def test_forward_is_within_the_bound_of_the_contract(norm, dtype, family):
    bound = MAX_ULP_FLOAT64["norm_forward"] if dtype == F64 else MAX_ULP[f"{norm.stem}_forward"]
    for cols in LENGTHS:
        x = rows_of(family, 20, cols, dtype, seed=cols)
        if x is not None:
            distance = ulps(norm, x, *norm.parameters(cols, dtype), eps=family.eps)
            assert distance <= bound, f"{cols} columns: {distance:.2f} ULP"


def test_the_scale_of_a_float64_row_is_better_than_float64(norm):
    """The mean over a row leaves what its elements have in common; an rstd of one double alone errs by half a unit."""
    for cols in (64, 1000):
        x = draw(50, cols, dtype=F64, seed=cols)
        exact, _ = norm.exact(x)
        large = abs(exact) > 0.1
        relative = np.where(large, norm(x).numpy() / np.where(large, exact, 1.0) - 1.0, 0.0).sum(-1) / large.sum(-1)
        assert float(abs(relative).mean()) <= NORM_ROW_ERROR * UNIT_ROUNDOFF[F64], f"{cols} columns"


@pytest.mark.parametrize("dtype, family", family_cases(SHORT_DTYPES))
def test_short_types_are_rounded_once(norm, dtype, family):
    for cols in LENGTHS:
        x = rows_of(family, 20, cols, dtype, seed=cols)
        if x is None:
            continue
        for parameter_dtype in (dtype, F32):
            parameters = norm.parameters(cols, parameter_dtype)
            actual = norm(x, *parameters, eps=family.eps)
            exact, _ = norm.exact(x, *parameters, eps=family.eps)
            if abs(exact).max() > torch.finfo(dtype).tiny:  # the last bit of a subnormal is an absolute one
                assert_close(actual, torch.from_numpy(exact.astype(np.float64)), what=f"{cols} columns")
            wrong = float((actual != _rounded(exact, dtype)).double().mean())
            assert wrong <= MISROUNDED, f"{cols} columns: {wrong:.1%} are not the nearest {dtype}"


@pytest.mark.parametrize("dtype, family", family_cases())
def test_gradients_are_those_of_exact_arithmetic(norm, dtype, family):
    if dtype in SHORT_DTYPES and family.eps == 0.0:
        pytest.skip("subnormals of a 16-bit type are a handful of values")
    for cols in (31, 129, 768):
        x = rows_of(family, 37, cols, dtype, seed=cols).requires_grad_()
        grad = draw(37, cols, dtype=dtype, seed=3, scale=family.grad, shift=family.grad / 2)
        for parameter_dtype in {dtype, F32 if dtype in SHORT_DTYPES else dtype}:
            parameters = norm.parameters(cols, parameter_dtype, grad=True)
            actual = torch.autograd.grad(norm(x, *parameters, eps=family.eps), (x, *parameters), grad)
            exact = norm.exact_gradients(grad, x, *parameters, eps=family.eps)
            for name, a, e in zip(("input", *norm.parameter_names), actual, exact, strict=True):
                if name == "weight" and abs(norm.exact(x, eps=family.eps)[0]).max() < torch.finfo(F32).tiny:
                    continue  # xhat is itself subnormal: its last bit is an absolute one
                e = torch.from_numpy(e.astype(np.float64))
                assert_close(a, e, num_terms=cols, what=f"grad_{name}, {cols} columns")


def test_the_package_oracle_is_right(norm):
    """reference/<norm>.py against long double: float64 arithmetic loses mean/std off its own last place, no more."""
    for shift in (0.0, 1e6):
        x, parameters = draw(9, 33, shift=shift), norm.parameters(33)
        with dispatch.use_backend("reference"):
            actual = norm(x.double(), *(p.double() for p in parameters))
        exact, _ = norm.exact(x, *parameters)
        assert_close(actual, torch.from_numpy(exact.astype(np.float64)), num_terms=33, slack=1.0 + shift)


# ---- gradients ----


@pytest.mark.parametrize("shape, ndim", [((3, 5), 1), ((2, 3, 4), 2), ((1, 33), 1)])
def test_gradcheck(norm, shape, ndim):
    """Input, residual and every parameter, through both results of the addition."""
    x, residual = (draw(*shape, dtype=F64, seed=s, requires_grad=True) for s in (1, 2))
    parameters = norm.parameters(shape[-ndim:], F64, grad=True)
    assert torch.autograd.gradcheck(lambda *t: norm(*t, ndim=ndim), (x, *parameters))
    assert torch.autograd.gradcheck(lambda *t: norm.add_norm(*t, ndim=ndim), (x, residual, *parameters))
    assert torch.autograd.gradcheck(lambda t: norm(t, ndim=ndim), x)
    with dispatch.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda *t: norm(*t, ndim=ndim), (x, *parameters))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_both_outputs_of_the_addition(norm, dtype):
    for rows, cols in [(1, 1), (5, 33), (70, 128)]:
        x, residual = (draw(rows, cols, dtype=dtype, seed=s, requires_grad=True) for s in (1, 2))
        parameters = norm.parameters(cols, dtype, grad=True)
        assert_matches_reference(norm.add, x, residual, (cols,), *parameters, eps=EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_when_one_output_is_not_used(norm, dtype):
    x, residual = (draw(5, 8, dtype=dtype, seed=s, requires_grad=True) for s in (1, 2))
    parameters = norm.parameters(8, dtype, grad=True)
    output, total = norm.add_norm(x, residual, *parameters)
    leaves = (x, residual, parameters[0])
    through_sum = torch.autograd.grad(total.sum(), leaves, retain_graph=True, allow_unused=True)
    assert [g is None for g in through_sum] == [False, False, True]
    ones = torch.ones_like(x)
    assert torch.equal(torch.autograd.grad(total, x, ones, retain_graph=True)[0], ones)
    exact = norm.exact_gradients(ones, total, *parameters)[0].astype(np.float64)
    for grad in torch.autograd.grad(output, (x, residual), ones):
        assert_close(grad, torch.from_numpy(exact), num_terms=8, slack=2)


def test_only_the_wanted_gradients(norm):
    for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)):
        tensors = draw(40, 33), *norm.parameters(33)
        pairs = list(zip(tensors, map(bool, wanted)))
        if not any(want for _, want in pairs):
            continue
        for tensor, want in pairs:
            tensor.requires_grad_(want)
        assert_matches_reference(norm.function, tensors[0], (33,), *tensors[1:], eps=EPS)
        norm(*tensors).sum().backward()
        assert [t.grad is not None for t in tensors] == [want for _, want in pairs]


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output_of_any_strides(norm, dtype):
    leaves = draw(6, 33, dtype=dtype, requires_grad=True), *norm.parameters(33, dtype, grad=True)
    y = norm(*leaves)
    strided = torch.ones(1, 1).expand(6, 33), draw(33, 6).t(), draw(6, 66)[:, ::2]
    for grad in (g.to(dtype) for g in strided):
        pair = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in (grad, grad.contiguous())]
        assert _equal(*pair)


def test_what_has_no_derivative_says_so(norm):
    x = draw(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"^{norm.stem}: the cpu backend has no second derivative; run under"):
        (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=f"^add_{norm.stem}: the cpu backend has no second derivative"):
        (grad,) = torch.autograd.grad(norm.add_norm(x, x)[0].square().sum(), x, create_graph=True)
        grad.sum().backward()
    one = torch.ones(2, 5)
    for name, call in ((norm.stem, norm), (f"add_{norm.stem}", lambda t: norm.add_norm(t, t)[0])):
        with pytest.raises(RuntimeError, match=f"^{name}: the cpu backend has no forward-mode derivative"):
            torch.func.jvp(call, (one,), (one,))


# ---- shapes and strides ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_of_every_kind(norm, dtype):
    """Leading dimensions, several normalised ones, none at all, empty ones: as torch, forward and backward."""
    leading = [((5,), 1), ((2, 3, 4, 5), 1), ((2, 3, 4, 5), 3), ((4, 5), 2)]
    empty = [((0, 7), 1), ((3, 0), 1), ((2, 0, 5), 1), ((0, 0), 2)]
    for shape, ndim in leading + empty:
        leaves = draw(*shape, dtype=dtype, requires_grad=True), *norm.parameters(shape[-ndim:], dtype, grad=True)
        results = []
        for function in (norm.function, norm.stock):
            y = function(leaves[0], shape[-ndim:], *leaves[1:], eps=EPS)
            results.append((y, *torch.autograd.grad(y.sum() + (y * y).sum(), leaves)))
        assert results[0][0].is_contiguous()
        for a, b in zip(*results, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert_close(a, b.double(), num_terms=200, slack=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(norm, dtype):
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
        parameters = [t.repeat_interleave(2)[::2] for t in norm.parameters(view.shape[-1], dtype)]
        dense, *dense_parameters = (t.contiguous() for t in (view, *parameters))
        assert torch.equal(norm(view, *parameters), norm(dense, *dense_parameters)), name
        assert _equal(norm.add_norm(view, view), norm.add_norm(dense, dense)), name


@pytest.mark.parametrize("dtype, parameter_dtype", PAIRS)
def test_the_addition_is_the_two_steps(norm, dtype, parameter_dtype):
    for cols in (1, 33, 768):
        x, residual = draw(19, cols, dtype=dtype), draw(19, cols, dtype=dtype, seed=1)
        parameters = norm.parameters(cols, parameter_dtype)
        output, total = norm.add_norm(x, residual, *parameters)
        assert torch.equal(total, x + residual)
        assert torch.equal(output, norm(x + residual, *parameters))


def test_the_addition_takes_the_wider_dtype_as_plus_does(norm):
    for narrow in SHORT_DTYPES:
        x, residual = draw(3, 8, dtype=narrow, requires_grad=True), draw(3, 8, seed=1, requires_grad=True)
        output, total = norm.add_norm(x, residual, *norm.parameters(8))
        assert output.dtype == total.dtype == F32
        output.sum().backward()
        assert x.grad.dtype == narrow and residual.grad.dtype == F32


def test_dropout_in_front(norm):
    x, residual = draw(64, 96, requires_grad=True), draw(64, 96, seed=1)
    torch.manual_seed(3)
    output, total = norm.add_norm(x, residual, dropout_p=0.25)
    torch.manual_seed(3)
    assert torch.equal(total, torch.nn.functional.dropout(x, 0.25) + residual) and torch.equal(output, norm(total))
    assert torch.equal(norm.add_norm(x, residual, dropout_p=1.0)[1], residual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_with_nan_touches_no_other(norm, dtype):
    for cols in (2, 33, 768):
        for position in (0, cols - 1):
            for value in (float("nan"), float("inf"), float("-inf")):
                x = draw(6, cols, dtype=dtype)
                x[2, position] = value
                y, stock = norm(x, *norm.parameters(cols, dtype)), norm.stock(x, (cols,), eps=EPS)
                assert torch.equal(y[2].isnan(), stock[2].isnan())
                assert y[[0, 1, 3, 4, 5]].isfinite().all()


# ---- determinism and invariance, bitwise ----


@pytest.mark.parametrize("dtype, parameter_dtype", PAIRS)
def test_threads_and_repeats_change_no_bit(norm, dtype, parameter_dtype):
    x, residual = draw(301, 1000, dtype=dtype, requires_grad=True), draw(301, 1000, dtype=dtype, seed=1)
    parameters = norm.parameters(1000, parameter_dtype, grad=True)
    grad = draw(301, 1000, dtype=dtype, seed=2)

    def run():
        results = norm.add_norm(x, residual, *parameters)
        return [*results, *torch.autograd.grad(results, (x, *parameters), (grad, grad))]

    results = []
    for threads in (1, 2, 3, 7, 1):
        torch.set_num_threads(threads)
        results.append(run())
    assert all(_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype, parameter_dtype", PAIRS)
def test_a_row_does_not_depend_on_its_batch(norm, dtype, parameter_dtype):
    for cols in (33, 768):
        x, grad = draw(131, cols, dtype=dtype), draw(131, cols, dtype=dtype, seed=1)
        parameters = norm.parameters(cols, parameter_dtype)

        def run(rows):
            leaf = x[rows].clone().requires_grad_()
            y = norm(leaf, *parameters)
            return y.detach(), *torch.autograd.grad(y, leaf, grad[rows])

        whole = run(slice(None))
        for rows in (slice(0, 1), slice(1, 2), slice(130, 131), slice(3, 8), slice(100, None), torch.randperm(131)):
            assert _equal(run(rows), [all_rows[rows] for all_rows in whole])


@pytest.mark.parametrize("dtype, parameter_dtype", PAIRS)
def test_inputs_are_not_written_and_every_result_is(norm, dtype, parameter_dtype):
    with nan_filled_empty():
        tensors = *(draw(35, 47, dtype=dtype, seed=s) for s in (1, 2)), *norm.parameters(47, parameter_dtype)
        before = [t.clone() for t in tensors]
        leaves = [t.requires_grad_() for t in tensors]
        output, total = norm.add_norm(*leaves)
        grads = torch.autograd.grad(output.sum() + total.sum(), leaves, retain_graph=True)
        assert _equal(grads, torch.autograd.grad(output.sum() + total.sum(), leaves))
        assert _equal([t.detach() for t in tensors], before)
        assert all(t.isfinite().all() for t in (output, total, *grads))


# ---- the raw ops, compile, torch.func, modules ----


@pytest.mark.parametrize("dtype, parameter_dtype", PAIRS)
def test_opcheck(norm, dtype, parameter_dtype):
    x, residual = draw(4, 3, 10, dtype=dtype), draw(4, 3, 10, dtype=dtype, seed=1)
    parameters, count = norm.parameters(10, parameter_dtype), len(norm.parameter_names)
    absent = (None,) * count
    torch.library.opcheck(norm.raw("forward"), (x, *parameters, 1, EPS))
    torch.library.opcheck(norm.raw("add_forward"), (x, residual, *absent, 2, EPS))
    all_needed, input_needed = (True,) * (1 + count), (True, *(False,) * count)
    for given, grad_sum, needs in ((parameters, residual, all_needed), (absent, None, input_needed)):
        torch.library.opcheck(norm.raw("backward"), (x, grad_sum, x.clone(), *given, 1, EPS, *needs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatch_takes_the_kernel(norm, dtype):
    x, parameters = draw(3, 5, dtype=dtype), norm.parameters(5, dtype)
    assert transfuse.explain(norm.function, x, (5,), *parameters).chosen == "cpu"
    assert transfuse.explain(norm.add, x, x, (5,), *parameters, dropout_p=0.5).chosen == "cpu"
    with dispatch.use_backend("torch"):
        assert torch.equal(norm(x, *parameters), norm.stock(x, (5,), *parameters, eps=EPS))
        assert torch.equal(norm.add_norm(x, x)[0], norm.stock(x + x, (5,), eps=EPS))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_compile_gives_the_same_bits(norm, dtype, dynamic):
    parameters = norm.parameters(24, dtype, grad=True)

    def block(x):
        return norm.add_norm(norm(x, *parameters), x, *parameters)[0]

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        x = draw(rows, 24, dtype=dtype, requires_grad=True)
        eager, traced = block(x), compiled(x)
        assert torch.equal(eager, traced)
        grads = [torch.autograd.grad(y.sum(), (x, *parameters)) for y in (eager, traced)]
        for a, b in zip(*grads, strict=True):
            assert_close(b, a, num_terms=24)
        with torch.no_grad():
            assert torch.equal(compiled(x), eager)


def test_inductor_and_export(norm):
    module, x = norm.module(24), draw(3, 24)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x))
    exported = torch.export.export(module, (x,))
    assert f"transfuse.{norm.stem}_forward" in str(exported.graph)
    assert torch.equal(exported.module()(x), module(x))


def test_checkpointing_replays_the_same_bits(norm):
    x, parameters = draw(6, 33, requires_grad=True), norm.parameters(33, grad=True)

    def block(t):
        return norm.add_norm(t, t.cos(), *parameters, dropout_p=0.5)[0].square().sum()

    torch.manual_seed(1)
    plain = torch.autograd.grad(block(x), (x, *parameters))
    torch.manual_seed(1)
    assert _equal(plain, torch.autograd.grad(checkpoint(block, x, use_reentrant=False), (x, *parameters)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func(norm):
    leaves = draw(3, 4, 5, requires_grad=True), *norm.parameters(5, grad=True)
    plain = [t.detach() for t in leaves]
    mapped = torch.func.vmap(lambda t: norm(t, *leaves[1:]))(leaves[0])
    assert torch.equal(mapped, norm(*leaves))
    assert _equal(torch.func.vmap(norm.add_norm)(plain[0], plain[0]), norm.add_norm(plain[0], plain[0]))

    def loss(*tensors):
        return norm(*tensors).square().sum()

    def stock(x, *parameters):
        return norm.stock(x, (5,), *parameters, eps=EPS).square().sum()

    everything = tuple(range(len(leaves)))
    per_sample = (0, *(None,) * (len(leaves) - 1))
    pairs = [
        (torch.autograd.grad(mapped.square().sum(), leaves), torch.autograd.grad(stock(*leaves), leaves)),
        [torch.func.grad(f, everything)(*plain) for f in (loss, stock)],
        [torch.func.vmap(torch.func.grad(f, everything), per_sample)(*plain) for f in (loss, stock)],
    ]
    for ours, expected in pairs:
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, b, num_terms=64, slack=4)


def test_autocast_does_what_torch_does(norm):
    parameters = norm.parameters(8)
    for dtype in (F32, BF16, F16):
        x = draw(3, 8, dtype=dtype)
        with torch.autocast("cpu", dtype=BF16):
            ours, stock = norm(x, *parameters), norm.stock(x, (8,), *parameters, eps=EPS)
        assert ours.dtype == stock.dtype
        assert_close(ours, stock, num_terms=8)
    with torch.autocast("cpu", dtype=BF16):
        assert norm.add_norm(draw(3, 8, dtype=BF16), draw(3, 8), *parameters)[0].dtype == F32


@pytest.mark.parametrize("arguments", [{}, {"elementwise_affine": False}, {"eps": EPS, "dtype": BF16}], ids=str)
def test_modules_are_drop_ins(norm, arguments):
    ours, stock = norm.module((3, 8), **arguments), getattr(torch.nn, norm.module.__name__)((3, 8), **arguments)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(stock.state_dict())
    x = draw(5, 3, 8, dtype=arguments.get("dtype", F32))
    assert_close(ours(x), stock(x), num_terms=24)
    assert repr(ours) == repr(stock)
    torch.save(ours.state_dict(), io.BytesIO())
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(module(x), ours(x))
