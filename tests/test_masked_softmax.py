"""masked_softmax: masks, bounds per element, gradients, strides, invariance, torch's transforms and wording."""

import itertools

import mpmath
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import transfuse
from transfuse import nn, sweeps, testing
from transfuse.ops.masked_softmax import masked_softmax
from transfuse.reference.masked_softmax import masked_softmax_reference
from transfuse.testing import (
    MAX_ULP,
    MAX_ULP_FLOAT64,
    assert_close,
    assert_matches_reference,
    draw,
    nan_filled_empty,
    ulp_distance,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SWEEP_STRIDE = 509  # prime: every exponent, and every residue of the mantissa's low bits
INF, NAN = float("inf"), float("nan")
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300]


def _keep(*shape, seed=0, share=0.7):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def _assert_bounds(output, exact):
    """Error per element, exact zeros, sum of a row."""
    assert (output[exact == 0] == 0).all()
    finite = exact.isfinite()
    assert float(ulp_distance(output, exact)[finite].max()) <= MAX_ULP["masked_softmax_forward"]
    some = (exact != 0).any(-1) & finite.all(-1)
    assert float((output.double().sum(-1)[some] - 1).abs().max()) <= testing.SOFTMAX_ROW_SUM_ERROR


@pytest.mark.parametrize("std", [1.0, 30.0, 100.0, 1e3, 1e4, 1e7])
@pytest.mark.parametrize("scale", [1.0, 64**-0.5, 80**-0.5])
def test_float32_ulp(std, scale):
    x, bias, keep = draw(100, 257, seed=1, scale=std), draw(100, 257, seed=2), _keep(100, 257)
    for mask in (None, bias, keep):
        _assert_bounds(masked_softmax(x, mask, scale=scale), masked_softmax_reference(x.double(), mask, scale))


def test_strided_sweep_of_the_exponential():
    """The command for all of them: transfuse verify --op masked_softmax --full."""
    found = sweeps.sweep_masked_softmax(stride=SWEEP_STRIDE)
    assert found.inputs > 2**21 and found.errors == 0, found
    assert 0.5 < found.worst_ulp <= 3, found  # what ops/masked_softmax.py says


@pytest.mark.parametrize("scale", [1.0, 64**-0.5, 80**-0.5])
def test_a_bias_that_cancels_a_large_product(scale):
    """What is left is the product's rounding error and the small bias, and both count."""
    for size in (1e3, 1e6, 1e30):
        x = draw(20, 65, seed=1, scale=size)
        bias = -(x * scale) + draw(20, 65, seed=2)
        _assert_bounds(masked_softmax(x, bias, scale=scale), masked_softmax_reference(x.double(), bias, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 64**-0.5, 80**-0.5])
def test_a_float32_bias_that_cancels_large_products_of_short_types(scale, dtype):
    """What a rounded scale loses counts too."""
    for size in (1e3, 1e4) if dtype == torch.float16 else (1e3, 1e6, 1e30):
        x = draw(20, 65, dtype=dtype, seed=1, scale=size)
        bias = -(x.float() * scale) + draw(20, 65, seed=2)
        exact = masked_softmax_reference(x.double(), bias.double(), scale)
        assert float(ulp_distance(masked_softmax(x, bias, scale=scale), exact).max()) <= testing.ROUNDED_ONCE_ULP


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [5, 300])
def test_scales_far_from_one(length, dtype):
    """0, and those that bring the largest and the smallest numbers back to size 1."""
    cases = [(1.0, 0.0), (1.0, -0.0), (1e3, 1e-44)]
    if dtype != torch.float16:
        cases += [(2.0**126, 1.1 * 2.0**-125), (2.0**126, -1.1 * 2.0**-125), (2.0**-120, 1.1 * 2.0**121)]
    for size, scale in cases:
        x = (draw(7, length, dtype=torch.float64, seed=1).clamp(-3, 3) * size).to(dtype)
        for mask in (None, _keep(7, length, seed=2), draw(7, length, dtype=dtype, seed=3)):
            bias = mask.double() if mask is not None and mask.is_floating_point() else mask
            exact = masked_softmax_reference(x.double(), bias, scale)
            assert_close(masked_softmax(x, mask, scale=scale), exact, what=f"scale {scale:g}")


def _worst_float64_ulp(x, bias, keep, scale):
    """Largest error per element and of a row's sum, against 50 digits."""
    output = masked_softmax(x, bias if keep is None else keep, scale=scale)
    worst = sum_error = 0.0
    with mpmath.workdps(50):
        for r, ours in enumerate(output.tolist()):
            valid = [True] * x.shape[1] if keep is None else keep[r].tolist()
            scores = [mpmath.mpf(v) * scale for v in x[r].tolist()]
            if bias is not None:
                scores = [s + b for s, b in zip(scores, bias[r].tolist(), strict=True)]
            largest = max(s for s, v in zip(scores, valid, strict=True) if v)
            weights = [mpmath.exp(s - largest) if v else mpmath.mpf(0) for s, v in zip(scores, valid, strict=True)]
            total = mpmath.fsum(weights)
            for y, weight, v in zip(ours, weights, valid, strict=True):
                assert v or (y == 0 and str(y) == "0.0")
                exact = weight / total
                unit = mpmath.ldexp(1, max(mpmath.frexp(exact)[1] - 1, -1022) - 52)
                worst = max(worst, float(abs(y - exact) / unit))
            sum_error = max(sum_error, float(abs(mpmath.fsum(ours) - 1)))
    return worst, sum_error


@pytest.mark.parametrize("std", [1.0, 30.0, 100.0, 1e3, 1e7, 1e14, 1e290])
@pytest.mark.parametrize("scale", [1.0, 80**-0.5])
def test_float64_ulp(std, scale):
    x = draw(3, 133, dtype=torch.float64, seed=1, scale=std)
    bias, cancelling = draw(3, 133, dtype=torch.float64, seed=2), draw(3, 133, dtype=torch.float64, seed=3) - x * scale
    for args in ((None, None), (bias, None), (None, _keep(3, 133)), (cancelling, None)):
        worst, sum_error = _worst_float64_ulp(x, *args, scale)
        assert worst <= MAX_ULP_FLOAT64["masked_softmax_forward"]
        assert sum_error <= testing.SOFTMAX_ROW_SUM_ERROR_FLOAT64


def test_float64_of_a_long_row():
    """Equal weights round the same way at every addition: a plain sum would be off by a hundred ULP."""
    x = torch.full((1, 40_000), -0.1, dtype=torch.float64)
    x[0, 0] = 0
    worst, sum_error = _worst_float64_ulp(x, None, None, 1.0)
    assert worst <= MAX_ULP_FLOAT64["masked_softmax_forward"] and sum_error <= testing.SOFTMAX_ROW_SUM_ERROR_FLOAT64


def test_float64_scores_whose_rounding_error_is_theirs_alone():
    """Around 2^50 neighbouring scores lie 0.25 apart, these ones 0.3: what rounding took from the largest counts too."""
    x = 2.0**60 + 2.0**8 * torch.arange(40, dtype=torch.float64)[None]
    assert _worst_float64_ulp(x, None, None, 0.3 / 256)[0] <= MAX_ULP_FLOAT64["masked_softmax_forward"]
    assert _worst_float64_ulp(x, draw(1, 40, dtype=torch.float64), None, 0.3 / 256)[0] <= MAX_ULP_FLOAT64["masked_softmax_forward"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_reference_at_every_tail(length, dtype):
    x = draw(3, 4, length, dtype=dtype, seed=length, scale=2, requires_grad=True)
    bias = draw(4, length, dtype=dtype, seed=1, requires_grad=True)
    keep = _keep(3, 1, length, seed=2)
    for mask, causal, alignment in ((None, False, "top_left"), (bias, True, "bottom_right"), (keep, True, "top_left")):
        assert_matches_reference(masked_softmax, x, mask, scale=0.3, is_causal=causal, causal_alignment=alignment, num_terms=length)


def _golden_masks():
    """(name, scores, mask, is_causal, alignment, expected weights); rows of up to three keys with obvious weights."""
    third = 1 / 3
    zeros = torch.zeros(1, 3)
    lowest = torch.finfo(torch.float32).min
    yield "no mask", zeros, None, False, "top_left", [[third, third, third]]
    yield "bool", zeros, torch.tensor([[True, False, True]]), False, "top_left", [[0.5, 0, 0.5]]
    yield "no valid key", zeros, torch.zeros(1, 3, dtype=torch.bool), False, "top_left", [[0, 0, 0]]
    yield "additive -inf", zeros, torch.tensor([[0, -INF, 0]]), False, "top_left", [[0.5, 0, 0.5]]
    yield "all -inf", zeros, torch.full((1, 3), -INF), False, "top_left", [[0, 0, 0]]
    yield "finfo.min is a number", zeros, torch.full((1, 3), lowest), False, "top_left", [[third, third, third]]
    yield "-10000 is a number", zeros, torch.full((1, 3), -1e4), False, "top_left", [[third, third, third]]
    yield "-1e9 beside 0", zeros, torch.tensor([[0, -1e9, 0]]), False, "top_left", [[0.5, 0, 0.5]]
    yield "top_left", torch.zeros(2, 3), None, True, "top_left", [[1, 0, 0], [0.5, 0.5, 0]]
    yield "bottom_right", torch.zeros(2, 3), None, True, "bottom_right", [[0.5, 0.5, 0], [third, third, third]]
    yield "bottom_right, more queries", torch.zeros(3, 2), None, True, "bottom_right", [[0, 0], [1, 0], [0.5, 0.5]]
    yield "causal and bool", torch.zeros(2, 2), torch.tensor([[False, True]]), True, "top_left", [[0, 0], [0, 1]]
    yield "one key", torch.tensor([[-7.3]]), None, False, "top_left", [[1]]
    yield "one valid key", torch.tensor([[1e4, -1e4, 3]]), torch.tensor([[False, True, False]]), False, "top_left", [[0, 1, 0]]
    yield "NaN in a valid score", torch.tensor([[NAN, 0, 0]]), torch.tensor([[True, True, False]]), False, "top_left", [[NAN, NAN, 0]]
    yield "NaN in an excluded score", torch.tensor([[NAN, 0, 0]]), torch.tensor([[False, True, True]]), False, "top_left", [[0, 0.5, 0.5]]
    yield "NaN in an excluded score, causal", torch.tensor([[0, NAN]]), None, True, "top_left", [[1, 0]]
    yield "NaN in an additive mask", zeros, torch.tensor([[0, NAN, -INF]]), False, "top_left", [[NAN, NAN, 0]]
    yield "+inf score", torch.tensor([[INF, 0, 0]]), None, False, "top_left", [[NAN, NAN, NAN]]
    yield "-inf score beside others", torch.tensor([[-INF, 0, 0]]), None, False, "top_left", [[0, 0.5, 0.5]]
    yield "-inf score beside large ones", torch.tensor([[-INF, 3e4, 3e4]]), None, False, "top_left", [[0, 0.5, 0.5]]
    yield "-inf score and a mask", torch.tensor([[-INF, 0, 3]]), torch.tensor([[1.0, 3.0, 0.0]]), False, "top_left", [[0, 0.5, 0.5]]
    yield "only -inf scores, as torch", torch.full((1, 3), -INF), None, False, "top_left", [[NAN, NAN, NAN]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(_golden_masks()), ids=lambda case: case[0])
def test_golden_masks(case, dtype):
    _, scores, mask, causal, alignment, expected = case
    expected = torch.tensor(expected, dtype=torch.float64)
    masks = [mask]
    if mask is not None and mask.dtype != torch.bool:
        own = mask.to(dtype)
        masks = [mask.float()] + ([own] if torch.equal(own.nan_to_num(1.0).double(), mask.nan_to_num(1.0).double()) else [])
    for backend, mask in itertools.product(("cpu", "reference"), masks):
        with transfuse.use_backend(backend):
            output = masked_softmax(scores.to(dtype), mask, is_causal=causal, causal_alignment=alignment)
        assert_close(output, expected)
        zero = expected == 0
        assert torch.equal(output[zero], torch.zeros_like(output[zero])) and not output[zero].signbit().any()
        assert torch.equal(output[expected == 1], torch.ones_like(output[expected == 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lowest_number_of_a_dtype_is_a_number(dtype):
    lowest = torch.finfo(dtype).min
    x = torch.tensor([[2.0, 2.0, 2.0]], dtype=dtype)
    assert_close(masked_softmax(x, torch.full((1, 3), lowest, dtype=dtype)), torch.full((1, 3), 1 / 3, dtype=torch.float64))
    assert masked_softmax(x, torch.tensor([[0, lowest, 0]], dtype=dtype)).tolist() == [[0.5, 0, 0.5]]
    assert masked_softmax(torch.tensor([[-lowest, lowest, 0]], dtype=dtype)).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_key_are_exactly_one(dtype):
    for scale in (1.0, 0.3, 1e-3, 7.7):
        x = draw(50, 1, dtype=dtype, scale=1e3)
        assert torch.equal(masked_softmax(x, scale=scale), torch.ones_like(x))
        assert torch.equal(masked_softmax(x, draw(50, 1, dtype=dtype), scale=scale), torch.ones_like(x))
        assert float(masked_softmax(draw(9, 9, dtype=dtype, scale=30), scale=scale, is_causal=True)[0, 0]) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gradient_through_an_excluded_key_is_zero(dtype):
    x = draw(3, 4, 20, dtype=dtype, requires_grad=True)
    keep = _keep(3, 1, 20)
    keep[1] = False
    dy = draw(3, 4, 20, dtype=dtype, seed=1)
    dy[0].masked_fill_(~keep[0], NAN)
    dy[1] = INF
    (grad,) = torch.autograd.grad(masked_softmax(x, keep), x, dy)
    assert grad.isfinite().all() and torch.equal(grad[~keep.expand_as(grad)], torch.zeros_like(grad[~keep.expand_as(grad)]))
    poisoned = x.detach().clone()
    poisoned[~keep.expand_as(x)] = NAN
    assert torch.equal(masked_softmax(poisoned, keep), masked_softmax(x.detach(), keep))
    poisoned[0, 0, 3 if keep[0, 0, 3] else int(keep[0, 0].nonzero()[0])] = NAN
    poisoned.requires_grad_()
    (grad,) = torch.autograd.grad(masked_softmax(poisoned, keep), poisoned, torch.ones_like(poisoned))
    assert grad[0, 0][keep[0, 0]].isnan().all() and (grad[~keep.expand_as(grad)] == 0).all() and grad[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20,), (1, 20), (6, 20), (6, 1), (3, 1, 20), (3, 6, 20), (2, 1, 1, 1), (1, 3, 1, 20), (2, 3, 6, 20)])
def test_mask_gradient_has_the_masks_shape(shape, dtype):
    x, dy = draw(2, 3, 6, 20, dtype=dtype), draw(2, 3, 6, 20, dtype=dtype, seed=1)
    for alone in (True, False):
        bias = draw(*shape, dtype=dtype, seed=2, requires_grad=True)
        leaf = x.clone().requires_grad_(not alone)
        output = masked_softmax(leaf, bias, scale=0.5, is_causal=True)
        grads = torch.autograd.grad(output, [bias] if alone else [bias, leaf], dy)
        wide = bias.detach().double().requires_grad_()
        exact = torch.autograd.grad(masked_softmax_reference(x.double(), wide, 0.5, True), wide, dy.double())[0]
        assert grads[0].shape == bias.shape and grads[0].dtype == dtype
        # The saved weights are rounded to the dtype, and a gradient summed over a whole row cancels to nothing.
        slack = 2.0 * 20
        size = max(1.0, float(dy.double().abs().max()))
        error = (grads[0].double() - exact).abs().max()
        assert float(error) <= slack * testing.error_budget(dtype, 720) * size


def test_gradcheck():
    x = draw(3, 4, dtype=torch.float64, requires_grad=True)
    bias = draw(3, 1, dtype=torch.float64, seed=1, requires_grad=True)
    keep = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    for function, inputs in (
        (lambda x: masked_softmax(x, keep, scale=0.7), (x,)),
        (lambda x: masked_softmax(x, scale=0.7, is_causal=True, causal_alignment="bottom_right"), (x,)),
        (lambda x, b: masked_softmax(x, b, scale=0.7, is_causal=True), (x, bias)),
        (lambda x, b: masked_softmax(x, b.mT, dim=-2), (x, draw(4, 3, dtype=torch.float64, seed=2, requires_grad=True))),
    ):
        assert torch.autograd.gradcheck(function, inputs)
    for function, inputs in (
        (lambda x: masked_softmax_reference(x, keep, 0.7), (x,)),
        (lambda x: masked_softmax_reference(x, None, 0.7, True, True), (x,)),
        (lambda x, b: masked_softmax_reference(x, b, 0.7, True), (x, bias)),
    ):
        assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


def test_mutants_are_seen():
    """Each mutant must fail the comparison that the op passes."""
    x, keep, bias = draw(20, 33, scale=3), _keep(20, 33), draw(20, 33, seed=1)
    exacts = [masked_softmax_reference(x.double(), mask, 0.3, True) for mask in (keep, bias)]

    def compare(function):
        for mask, exact in zip((keep, bias), exacts, strict=True):
            _assert_bounds(function(x, mask), exact)

    def keep_tail(x, mask):
        output = masked_softmax(x, mask, scale=0.3, is_causal=True)
        output[:, -1] = masked_softmax(x, scale=0.3)[:, -1]
        return output

    compare(lambda x, mask: masked_softmax(x, mask, scale=0.3, is_causal=True))
    mutants = {
        "scale": lambda x, mask: masked_softmax(x, mask, scale=0.3 * 1.01, is_causal=True),
        "mask dropped": lambda x, mask: masked_softmax(x, scale=0.3, is_causal=True),
        "causal ignored": lambda x, mask: masked_softmax(x, mask, scale=0.3),
        "other alignment": lambda x, mask: masked_softmax(x, mask, scale=0.3, is_causal=True, causal_alignment="bottom_right"),
        "tail column kept": keep_tail,
    }
    for name, mutant in mutants.items():
        with pytest.raises(AssertionError):
            compare(mutant)
            pytest.fail(name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_dims(dtype):
    base = draw(4, 6, 20, dtype=dtype, seed=3)
    masks = [_keep(20, 6, seed=4).t(), _keep(6, 40, seed=5)[:, ::2], _keep(6, 1, seed=6), _keep(4, 1, 1, seed=7), _keep(20, seed=8)]
    masks += [draw(20, 6, dtype=dtype, seed=9).t(), draw(6, 40, dtype=dtype, seed=10)[:, ::2], draw(6, 1, dtype=dtype), draw(20)]
    for mask in masks:
        expected = masked_softmax(base, mask.expand(4, 6, 20).contiguous())
        assert torch.equal(masked_softmax(base, mask), expected)
        assert torch.equal(masked_softmax(base.transpose(0, 2).contiguous().transpose(0, 2), mask), expected)
    for dim in (0, 1, 2, -2, -3):
        keep = _keep(4, 6, 20, seed=11)
        expected = masked_softmax(base.transpose(dim, -1), keep.transpose(dim, -1)).transpose(dim, -1)
        assert torch.equal(masked_softmax(base, keep, dim=dim), expected)
    causal = masked_softmax(base, is_causal=True, dim=-2)
    assert torch.equal(causal, masked_softmax(base.mT, is_causal=True).mT)
    leaf, dy = base.transpose(0, 1).clone().requires_grad_(), draw(20, 4, 6, dtype=dtype).permute(2, 1, 0)
    grads = [torch.autograd.grad(masked_softmax(leaf, scale=0.5), leaf, g)[0] for g in (dy, dy.contiguous())]
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0,)])
def test_empty_dimensions(shape):
    for mask in (None, torch.ones(shape[-1], dtype=torch.bool), draw(shape[-1]).requires_grad_()):
        x = draw(*shape, requires_grad=True)
        output = masked_softmax(x, mask, is_causal=len(shape) > 1)
        output.sum().backward()
        assert output.shape == x.grad.shape == shape
        if mask is not None and mask.requires_grad:
            assert torch.equal(mask.grad, torch.zeros(shape[-1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_padding_or_threads(dtype):
    x, bias = draw(40, 5, 90, dtype=dtype, scale=5), draw(5, 90, dtype=dtype, seed=1).requires_grad_()

    def run(rows):
        leaf = x[rows].clone().requires_grad_()
        output = masked_softmax(leaf, bias, scale=0.7)
        return (output.detach(), *torch.autograd.grad(output, (leaf, bias), x[rows]))

    torch.set_num_threads(1)
    whole = run(slice(None))
    torch.set_num_threads(2)
    for again in (run(slice(None)), run(slice(None))):
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for rows in (slice(0, 1), slice(7, 20)):
        assert all(torch.equal(a[rows], b) for a, b in zip(whole[:2], run(rows)[:2], strict=True))
    # Padding: more keys at the end, all excluded, change no bit.
    for keys in (1, 5, 38, 100):
        padded = torch.cat([x, torch.full((40, 5, keys), NAN, dtype=dtype)], -1)
        keep = torch.arange(90 + keys) < 90
        assert torch.equal(masked_softmax(padded, keep)[..., :90], masked_softmax(x))


def test_inputs_are_not_written_and_outputs_fully():
    x, bias, dy = draw(3, 7, 37), draw(7, 37, seed=1), draw(3, 7, 37, seed=2)
    copies = [t.clone() for t in (x, bias, dy)]
    with nan_filled_empty():
        x.requires_grad_(), bias.requires_grad_()
        output = masked_softmax(x, bias, is_causal=True)
        first = torch.autograd.grad(output, (x, bias), dy, retain_graph=True)
        second = torch.autograd.grad(output, (x, bias), dy)
    assert output.isfinite().all() and all(g.isfinite().all() for g in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, bias, dy), copies, strict=True))


def test_opcheck():
    x, dy = draw(2, 3, 17), draw(2, 3, 17, seed=1)
    ops = torch.ops.transfuse
    for mask, causal in ((None, True), (_keep(3, 17).expand(2, 3, 17), False), (draw(17).expand(2, 3, 17), True)):
        torch.library.opcheck(ops.masked_softmax_forward.default, (x, mask, 0.5, causal, True))
    torch.library.opcheck(ops.masked_softmax_backward.default, (dy, x.softmax(-1), 0.5))
    torch.library.opcheck(ops.masked_softmax_mask_backward.default, (dy, x.softmax(-1), draw(1, 3, 1)))


def test_compile_export_checkpoint():
    class Weights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(draw(3, 8))
            self.softmax = nn.MaskedSoftmax(scale=0.5, is_causal=True)

        def forward(self, x, keep):
            return self.softmax(masked_softmax(x, keep, dim=1), self.bias)

    module, x, keep = Weights(), draw(2, 3, 8, requires_grad=True), _keep(3, 8)
    assert repr(module.softmax) == "MaskedSoftmax(dim=-1, scale=0.5, is_causal=True, causal_alignment='top_left')"
    expected = module(x, keep)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, keep), expected)
    leaves = (x, module.bias)
    grads = [torch.autograd.grad(f(x, keep).square().sum(), leaves) for f in (module, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    again = torch.autograd.grad(checkpoint(module, x, keep, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads[0], again, strict=True))
    with torch.no_grad():
        assert torch.equal(torch.export.export(module, (x.detach(), keep)).module()(x.detach(), keep), expected)


def test_functional_transforms():
    x = draw(3, 5)
    slope = torch.func.grad(lambda v: masked_softmax(v)[0])
    assert_close(slope(x[0]), torch.func.grad(lambda v: torch.softmax(v, -1)[0])(x[0].double()), 5)
    assert torch.equal(torch.func.vmap(slope)(x), torch.stack([slope(row) for row in x]))
    with pytest.raises(RuntimeError, match="masked_softmax: the cpu backend has no forward-mode derivative; run under"):
        torch.func.jvp(masked_softmax, (x,), (x,))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(masked_softmax(x)[:, 0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_softmax: the cpu backend has no second derivative; run under"):
        grad.square().sum().backward()
    with transfuse.use_backend("reference"):
        (grad,) = torch.autograd.grad(masked_softmax(x)[:, 0].sum(), x, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), x)[0].isfinite().all()


def test_autocast_policy_is_torchs():
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in DTYPES:
            assert masked_softmax(draw(4, dtype=dtype)).dtype == torch.softmax(draw(4, dtype=dtype), -1).dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_mask_is_the_kernels(dtype):
    x = draw(5, 9, dtype=dtype, scale=3)
    for mask in (None, _keep(5, 9), draw(9, dtype=dtype), draw(9)):
        assert transfuse.explain(masked_softmax, x, mask).chosen == "cpu"
        exact = masked_softmax_reference(x.double(), mask if mask is None or mask.dtype == torch.bool else mask.double(), 1.0, True)
        output = masked_softmax(x, mask, is_causal=True)
        assert output.dtype == dtype
        assert_close(output, exact, 9)


@pytest.mark.parametrize(("mask", "causal"), list(itertools.product(("none", "bool", "float"), (False, True))))
def test_torch_backend_agrees(mask, causal):
    x = draw(2, 6, 9)
    mask = {"none": None, "bool": _keep(6, 9), "float": draw(6, 9, seed=1)}[mask]
    expected = masked_softmax(x, mask, scale=0.5, is_causal=causal)
    with transfuse.use_backend("torch"):
        assert_close(masked_softmax(x, mask, scale=0.5, is_causal=causal), expected, 9, slack=4.0)


@pytest.mark.parametrize(("call", "kind", "text"), [
    (lambda: masked_softmax([1.0]), TypeError, "masked_softmax: input is a list, expected a Tensor"),
    (lambda: masked_softmax(torch.ones(2, dtype=torch.int64)), TypeError, "masked_softmax: input has dtype int64, expected a floating dtype"),
    (lambda: masked_softmax(torch.tensor(1.0)), ValueError, "masked_softmax: input has shape (), expected at least one dimension"),
    (lambda: masked_softmax(draw(2, 3), dim=2), ValueError, "masked_softmax: dim is 2, expected -2 to 1"),
    (lambda: masked_softmax(draw(2, 3), dim=1.0), TypeError, "masked_softmax: dim is a float, expected an int"),
    (lambda: masked_softmax(draw(2, 3), scale="1"), TypeError, "masked_softmax: scale is a str, expected float"),
    (lambda: masked_softmax(draw(2, 3), scale=INF), ValueError, "masked_softmax: scale is inf, expected a finite float32"),
    (lambda: masked_softmax(draw(2, 3), causal_alignment="left"), ValueError,
     "masked_softmax: causal_alignment is 'left', expected 'top_left' or 'bottom_right'"),
    (lambda: masked_softmax(draw(3), is_causal=True), ValueError,
     "masked_softmax: input has shape (3,), expected [..., queries, keys] with is_causal"),
    (lambda: masked_softmax(draw(2, 3, 4), is_causal=True, dim=0), ValueError,
     "masked_softmax: dim is 0, expected one of the last two dimensions with is_causal"),
    (lambda: masked_softmax(draw(2, 3), [True]), TypeError, "masked_softmax: mask is a list, expected a Tensor or None"),
    (lambda: masked_softmax(draw(2, 3), torch.ones(2, 3, dtype=torch.int64)), TypeError,
     "masked_softmax: mask has dtype int64, expected one of bool, float32"),
    (lambda: masked_softmax(draw(2, 3), _keep(2)), ValueError,
     "masked_softmax: mask has shape (2,), expected one that broadcasts to (2, 3) (input's)"),
    (lambda: masked_softmax(draw(2, 3), _keep(1, 2, 3)), ValueError,
     "masked_softmax: mask has shape (1, 2, 3), expected one that broadcasts to (2, 3) (input's)"),
    (lambda: masked_softmax(draw(3), _keep(3).to("meta")), RuntimeError, "masked_softmax: mask is on meta, expected cpu (input's)"),
])
def test_refuses_in_words(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == text


@pytest.mark.parametrize(("name", "args", "text"), [
    ("forward", (torch.ones(3, dtype=torch.int64), None, 1.0, False, False),
     "masked_softmax: input has dtype int64, expected float32, bfloat16, float16 or float64"),
    ("forward", (draw(3), None, 1.0, True, False), "masked_softmax: input has shape (3,), expected at least 2 dimensions"),
    ("forward", (draw(2, 3), _keep(3), 1.0, False, False), "masked_softmax: mask has shape (3,), expected (2, 3) (input's)"),
    ("forward", (draw(3), draw(3, dtype=torch.float64), 1.0, False, False),
     "masked_softmax: mask has dtype float64, expected bool, float32 (input's) or float32"),
    ("forward", (draw(3, dtype=torch.float16), draw(3, dtype=torch.bfloat16), 1.0, False, False),
     "masked_softmax: mask has dtype bfloat16, expected bool, float16 (input's) or float32"),
    ("forward", (draw(3), None, NAN, False, False), "masked_softmax: scale is nan, expected a finite float32"),
    ("backward", (draw(4), draw(3), 1.0), "masked_softmax: grad_output has shape (4,), expected (3,) (output's)"),
    ("backward", (draw(3).bfloat16(), draw(3), 1.0), "masked_softmax: grad_output has dtype bfloat16, expected float32"),
    ("mask_backward", (draw(3), draw(3), draw(1, 3)), "masked_softmax: mask has 2 dimensions, expected 1 (output's)"),
    ("mask_backward", (draw(3), draw(3), draw(2)), "masked_softmax: mask has shape (2,), expected one that broadcasts to (3,) (output's)"),
])
def test_raw_ops_check_again(name, args, text):
    with pytest.raises(ValueError) as error:
        getattr(torch.ops.transfuse, f"masked_softmax_{name}")(*args)
    assert str(error.value) == text
