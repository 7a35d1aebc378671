"""gelu: the bounds of the contract over all magnitudes, gradients, strides, invariance, torch's transforms and wording."""

import mpmath
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import transfuse
from transfuse import nn, sweeps, testing
from transfuse.ops.gelu import gelu
from transfuse.reference.gelu import gelu_reference
from transfuse.testing import (
    GELU_ROOT,
    MAX_ULP,
    MAX_ULP_FLOAT64,
    assert_close,
    assert_matches_reference,
    draw,
    nan_filled_empty,
    ulp_distance,
)

FORMS = ["none", "tanh"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BIAS_DTYPES = [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
SWEEP_STRIDE = 2039  # prime: every exponent, and every residue of the mantissa's low bits


def _from_bits(first, last, step=1):
    return torch.arange(first, last, step).to(torch.int32).view(torch.float32)


def _around(value, count):
    """The floats within ``count`` steps of ``value``."""
    bits = int(torch.tensor(value).view(torch.int32))
    return _from_bits(bits - count, bits + count)


def _zones():
    """Every float32 of the zones where something changes."""
    zones = [_around(v, 4000) for v in (*GELU_ROOT.values(), 3.5, -3.5, -14.1, -14.3, -10.6, 5.6, -1.0, 16.0, -16.0)]
    return torch.cat([*zones, _from_bits(0, 3000), -_from_bits(0, 3000)])


def _exact_with_slope(x, approximate):
    wide = x.double().requires_grad_()
    exact = gelu_reference(wide, approximate)
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    return exact.detach(), slope


def _with_slope(x, approximate):
    leaf = x.clone().requires_grad_()
    output = gelu(leaf, approximate)
    (slope,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    return output.detach(), slope


def _mpmath(x, approximate):
    """gelu and its derivative at the float x, in mpmath's precision."""
    z = mpmath.mpf(x)
    if approximate == "none":
        phi = mpmath.erfc(-z / mpmath.sqrt(2)) / 2
        return z * phi, phi + z * mpmath.npdf(z)
    linear = 2 * mpmath.sqrt(2 / mpmath.pi)
    cubic = linear * mpmath.mpf("0.044715")
    decay = mpmath.exp(-z * (linear + cubic * z**2))
    phi = 1 / (1 + decay)
    return z * phi, phi + z * (linear + 3 * cubic * z**2) * decay * phi**2


@pytest.mark.parametrize("approximate", FORMS)
def test_oracle_against_mpmath(approximate):
    with mpmath.workdps(60):
        for text in ("-37", "-14.25", "-9.5", "-5.5", "-3", "-1", "-0.75179", "-1e-3", "-1e-30", "1e-20", "0.3", "2.5", "8", "30"):
            x = torch.tensor(float(text), dtype=torch.float64)
            # The tanh form's argument, up to 5000 here, is itself rounded. The derivative may cancel: then the bound is absolute.
            for ours, exact in zip(_exact_with_slope(x, approximate), _mpmath(x.item(), approximate), strict=True):
                error = abs(mpmath.mpf(float(ours)) - exact)
                assert error <= abs(exact) * 2.0**-37 or error < 1e-300 or (text == "-0.75179" and error < 2.0**-50), text


@pytest.mark.parametrize("approximate", FORMS)
def test_float32_ulp_where_the_method_changes(approximate):
    x = _zones()
    exact, exact_slope = _exact_with_slope(x, approximate)
    output, slope = _with_slope(x, approximate)
    assert float(ulp_distance(output, exact).max()) <= MAX_ULP["gelu_forward"]
    assert slope.isfinite().all()
    away = (x.double() - GELU_ROOT[approximate]).abs() > testing.GELU_ROOT_ZONE
    assert float(ulp_distance(slope, exact_slope)[away].max()) <= MAX_ULP["gelu_backward"]
    near = ~away
    assert near.sum() > 1000
    assert torch.equal(slope[near].sign().double(), exact_slope[near].sign())
    assert float((slope.double() - exact_slope)[near].abs().max()) <= testing.GELU_ROOT_ERROR


@pytest.mark.parametrize("approximate", FORMS)
def test_strided_sweep_of_all_float32(approximate):
    """The command for all of them: transfuse verify --op gelu --full."""
    for direction, worst in (("forward", 2.0), ("backward", 2.5)):  # what ops/gelu.py says
        found = sweeps.sweep_gelu(approximate, direction, stride=SWEEP_STRIDE)
        assert found.inputs > 2**21 and found.errors == 0, found
        assert 0.3 < found.worst_ulp <= worst, found


def test_sweeps_count_what_is_wrong(monkeypatch):
    """A sweep of torch's own gelu finds its tail: the check is a check."""
    monkeypatch.setattr(sweeps, "gelu", lambda x, approximate: torch.nn.functional.gelu(x, approximate=approximate))
    done = []
    found = sweeps.sweep_gelu(stride=65537, progress=lambda *counts: done.append(counts))
    assert found.errors > 100 and found.first_error is not None and found.worst_ulp > MAX_ULP["gelu_forward"]
    assert done[-1] == (found.inputs, found.inputs)
    with pytest.raises(ValueError, match="sweep_gelu: direction is 'sideways', expected 'forward' or 'backward'"):
        sweeps.sweep_gelu(direction="sideways")
    with pytest.raises(ValueError, match="sweep: stride is 0 and start 0, expected stride >= 1"):
        sweeps.sweep_masked_softmax(stride=0)


def _float64_inputs():
    """All magnitudes, and closely where the method changes, the derivative has its root and results become subnormal."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high, count=150):
        return torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low

    size = 10.0 ** uniform(-300, 3)
    near = torch.cat([v + 10.0 ** uniform(-17, -1) * uniform(-1, 1).sign() for v in (*GELU_ROOT.values(), -1.5, 1.5)])
    return torch.cat([uniform(-39, 39), uniform(-6, 6), size, -size, near, uniform(-38.6, -37.4), uniform(-21.5, -20.5)])


@pytest.mark.parametrize("approximate", FORMS)
def test_float64_ulp_over_all_magnitudes(approximate):
    x = _float64_inputs()
    with mpmath.workdps(60):
        for actual, exact, bound in zip(_with_slope(x, approximate), zip(*(_mpmath(v, approximate) for v in x.tolist()), strict=True),
                                        ("gelu_forward", "gelu_backward"), strict=True):
            for at, ours, e in zip(x.tolist(), actual.tolist(), exact, strict=True):
                unit = mpmath.ldexp(1, max(mpmath.frexp(e)[1] - 1, -1022) - 52)
                assert abs(mpmath.mpf(ours) - e) <= MAX_ULP_FLOAT64[bound] * unit, (bound, at)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype, approximate):
    inf, nan, largest = float("inf"), float("nan"), torch.finfo(dtype).max
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, largest, -largest], dtype=dtype)
    output, slope = _with_slope(x, approximate)
    assert output.isnan().tolist() == slope.isnan().tolist() == [False, False, True, False, False, False, False]
    assert output[0] == inf and output[5] == x[5]
    for i in (1, 4, 6):
        assert output[i] == 0 and output[i].signbit()
    assert output[3] == 0 and not output[3].signbit()
    assert slope[[0, 1, 3, 4, 5, 6]].tolist() == [1.0, 0.0, 0.5, 0.5, 1.0, 0.0]
    reference = gelu_reference(x, approximate)
    assert torch.equal(reference.isnan(), x.isnan()) and torch.equal(reference[~x.isnan()], output[~x.isnan()])


@pytest.mark.parametrize("approximate", FORMS)
def test_tails_reach_the_last_subnormal(approximate):
    for dtype, erf_end, tanh_end in ((torch.float32, -14.0, -10.45), (torch.float64, -38.3, -21.2)):
        x = torch.tensor([erf_end if approximate == "none" else tanh_end], dtype=dtype)
        assert 0 < -float(gelu(x, approximate)) < torch.finfo(dtype).tiny, dtype  # subnormal, not flushed


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_correctly_rounded_everywhere(dtype, approximate):
    x = torch.arange(2**16).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    output, slope = _with_slope(x, approximate)
    exact, exact_slope = _exact_with_slope(x, approximate)
    assert float(ulp_distance(output, exact).max()) <= 0.5
    assert float(ulp_distance(slope, exact_slope).max()) <= 0.5
    assert torch.equal(gelu_reference(x, approximate), output)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize(("dtype", "bias_dtype"), BIAS_DTYPES)
def test_bias_fused_equals_two_steps(dtype, bias_dtype, approximate):
    for columns in (1, 15, 16, 17, 33, 130):
        x, bias = draw(7, columns, dtype=dtype, seed=1, scale=3), draw(columns, dtype=bias_dtype, seed=2)
        wide = torch.promote_types(dtype, torch.float32)
        two_steps = gelu((x.to(wide) + bias.to(wide)).to(dtype), approximate)
        assert torch.equal(gelu(x, approximate, bias=bias), two_steps)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 1), (200, 33), (2, 3, 4, 48), (0, 8), (4, 0)])
def test_matches_reference(shape, dtype, approximate):
    x = draw(*shape, dtype=dtype, seed=3, scale=2, requires_grad=True)
    assert_matches_reference(gelu, x, approximate)
    if dtype in (torch.float32, torch.float64):  # the sum, rounded to 16 bits, would differ between the two runs
        assert_matches_reference(gelu, x, approximate, bias=draw(shape[-1], dtype=dtype, seed=4, requires_grad=True))


@pytest.mark.parametrize(("dtype", "bias_dtype"), BIAS_DTYPES)
def test_bias_gradient_against_float64(dtype, bias_dtype):
    x, bias = draw(300, 40, dtype=dtype, seed=5), draw(40, dtype=bias_dtype, seed=6, requires_grad=True)
    dy = draw(300, 40, dtype=dtype, seed=7)
    (grad,) = torch.autograd.grad(gelu(x, bias=bias), bias, dy)
    wide = torch.promote_types(dtype, torch.float32)
    total = (x.to(wide) + bias.detach().to(wide)).to(dtype)
    exact = (dy.double() * _exact_with_slope(total, "none")[1]).sum(0)
    assert grad.dtype == bias_dtype
    assert_close(grad, exact, 300)


def test_gradcheck():
    x, bias = draw(3, 4, dtype=torch.float64, requires_grad=True), draw(4, dtype=torch.float64, seed=1, requires_grad=True)
    for approximate in FORMS:
        assert torch.autograd.gradcheck(lambda x, a=approximate: gelu(x, a), (x,))
        assert torch.autograd.gradcheck(lambda x, b, a=approximate: gelu(x, a, bias=b), (x, bias))
        assert torch.autograd.gradcheck(lambda x, b, a=approximate: gelu_reference(x, a, b), (x, bias))
        assert torch.autograd.gradgradcheck(lambda x, b, a=approximate: gelu_reference(x, a, b), (x, bias))


def test_mutants_are_seen():
    """Each mutant must fail the comparison that the op passes."""
    x, bias = draw(64, 40, scale=2), draw(40, seed=1)

    def compare(function):
        for approximate in FORMS:
            exact = gelu_reference(x + bias, approximate)
            assert float(ulp_distance(function(x, approximate, bias), exact.double()).max()) <= MAX_ULP["gelu_forward"]

    compare(lambda x, approximate, bias: gelu(x, approximate, bias=bias))
    mutants = {
        "approximate ignored": lambda x, approximate, bias: gelu(x, bias=bias),
        "bias dropped": lambda x, approximate, bias: gelu(x, approximate),
        "scaled": lambda x, approximate, bias: gelu(x, approximate, bias=bias) * 1.0001,
        "tail column kept": lambda x, approximate, bias: torch.cat([gelu(x[:, :-1], approximate, bias=bias[:-1]), x[:, -1:]], 1),
        "torch's own": lambda x, approximate, bias: torch.nn.functional.gelu(x + bias, approximate=approximate),
    }
    for name, mutant in mutants.items():
        with pytest.raises(AssertionError):
            compare(mutant)
            pytest.fail(name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    base = draw(6, 10, 16, dtype=dtype, seed=8)
    bias = draw(32, dtype=dtype, seed=9)[::2]
    for view in (base.transpose(0, 2), base[:, ::2], base.permute(2, 0, 1)[1:], base[0].expand(5, 10, 16), base[:, :, 1:]):
        leaf, copy = view.detach().requires_grad_(), view.contiguous().requires_grad_()
        ours, expected = gelu(leaf), gelu(copy)
        assert torch.equal(ours, expected) and ours.is_contiguous()
        dy = draw(*view.shape[::-1], dtype=dtype, seed=10).permute(*reversed(range(view.dim())))
        assert torch.equal(*(torch.autograd.grad(o, i, dy)[0] for o, i in ((ours, leaf), (expected, copy))))
    assert torch.equal(gelu(base, bias=bias), gelu(base, bias=bias.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_batch_position_or_threads(dtype):
    x, bias = draw(500, 96, dtype=dtype, seed=11, scale=3), draw(96, dtype=dtype, seed=12).requires_grad_()

    def run(rows):
        leaf = x[rows].clone().requires_grad_()
        output = gelu(leaf, bias=bias)
        return (output.detach(), *torch.autograd.grad(output, (leaf, bias), x[rows]))

    torch.set_num_threads(1)
    whole = run(slice(None))
    torch.set_num_threads(2)
    for again in (run(slice(None)), run(slice(None))):
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for rows in (slice(0, 1), slice(17, 30), slice(499, 500)):
        assert all(torch.equal(a[rows], b) for a, b in zip(whole[:2], run(rows)[:2], strict=True))
    flat = x.reshape(-1)
    assert torch.equal(gelu(flat[5:1000]), gelu(flat)[5:1000])  # another lane, the same bits


def test_inputs_are_not_written_and_outputs_fully():
    x, bias, dy = draw(9, 37), draw(37, seed=1), draw(9, 37, seed=2)
    copies = [t.clone() for t in (x, bias, dy)]
    with nan_filled_empty():
        x.requires_grad_(), bias.requires_grad_()
        output = gelu(x, bias=bias)
        first = torch.autograd.grad(output, (x, bias), dy, retain_graph=True)
        second = torch.autograd.grad(output, (x, bias), dy)
    assert output.isfinite().all() and all(g.isfinite().all() for g in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((x, bias, dy), copies, strict=True))


def test_gradient_only_where_wanted():
    x, bias = draw(4, 8), draw(8, seed=1, requires_grad=True)
    assert torch.autograd.grad(gelu(x, bias=bias).sum(), bias)[0].shape == (8,)
    assert not gelu(x).requires_grad
    with torch.no_grad():
        assert not gelu(x, bias=bias).requires_grad


def test_opcheck():
    x, bias, dy = draw(4, 17), draw(17, seed=1), draw(4, 17, seed=2)
    for args in ((x, None, False), (x, bias, True), (x.bfloat16().t(), None, True)):
        torch.library.opcheck(torch.ops.transfuse.gelu_forward.default, args)
    for args in ((dy, x, None, False, False), (dy, x, bias, True, True), (dy, x, bias, True, False)):
        torch.library.opcheck(torch.ops.transfuse.gelu_backward.default, args)


def test_compile_export_checkpoint():
    module = torch.nn.Sequential(torch.nn.Linear(8, 24), nn.GELU("tanh"), nn.BiasGELU(24), nn.GELU())
    x = draw(5, 8)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    grads = [torch.autograd.grad(f(x).square().sum(), module.parameters()) for f in (module, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    again = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(grads[0], again, strict=True))
    with torch.no_grad():
        assert torch.equal(torch.export.export(module, (x,)).module()(x), expected)


def test_functional_transforms():
    x = draw(3, 5)
    slope = torch.func.grad(lambda v: gelu(v).sum())
    rows = torch.stack([slope(row) for row in x])
    assert torch.equal(torch.func.vmap(slope)(x), rows)
    by_bias = torch.func.grad(lambda v, b: gelu(v, bias=b).sum(), argnums=1)
    biases = draw(3, 5, seed=1)
    assert torch.equal(torch.func.vmap(by_bias)(x, biases), torch.stack([by_bias(*row) for row in zip(x, biases, strict=True)]))
    with pytest.raises(RuntimeError, match="gelu: the cpu backend has no forward-mode derivative; run under"):
        torch.func.jvp(gelu, (x,), (x,))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(gelu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gelu: the cpu backend has no second derivative; run under transfuse.use_backend\('reference'\)"):
        grad.sum().backward()
    with transfuse.use_backend("reference"):
        (grad,) = torch.autograd.grad(gelu(x).sum(), x, create_graph=True)
        assert torch.autograd.grad(grad.sum(), x)[0].isfinite().all()


def test_follows_input_dtype_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert gelu(draw(4)).dtype == torch.float32 and gelu(draw(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_the_kernels(dtype):
    assert transfuse.explain(gelu, draw(3, dtype=dtype)).chosen == "cpu"


def test_modules_are_drop_ins():
    x = draw(4, 6)
    ours, stock = nn.GELU("tanh"), torch.nn.GELU("tanh")
    assert isinstance(ours, torch.nn.GELU) and repr(ours) == repr(stock) and not ours.state_dict()
    assert_close(ours(x), stock(x.double()))
    module = nn.BiasGELU(6, "tanh")
    module.load_state_dict({"bias": draw(6, seed=1)})
    assert torch.equal(module(x), gelu(x, "tanh", bias=module.bias)) and repr(module) == "BiasGELU(6, approximate='tanh')"


@pytest.mark.parametrize(("call", "kind", "text"), [
    (lambda: gelu([1.0]), TypeError, "gelu: input is a list, expected a Tensor"),
    (lambda: gelu(torch.ones(2, dtype=torch.int64)), TypeError, "gelu: input has dtype int64, expected a floating dtype"),
    (lambda: gelu(draw(2), "erf"), ValueError, "gelu: approximate is 'erf', expected 'none' or 'tanh'"),
    (lambda: gelu(draw(2), bias=1.0), TypeError, "gelu: bias is a float, expected a Tensor or None"),
    (lambda: gelu(torch.tensor(1.0), bias=draw(1)), ValueError, "gelu: input has shape (), expected at least one dimension to add bias to"),
    (lambda: gelu(draw(2, 3), bias=draw(2)), ValueError, "gelu: bias has shape (2,), expected (3,) (input's last dimension)"),
    (lambda: gelu(draw(2, 3), bias=draw(1, 3)), ValueError, "gelu: bias has shape (1, 3), expected (3,) (input's last dimension)"),
    (lambda: gelu(draw(3), bias=draw(3, dtype=torch.bfloat16)), TypeError, "gelu: bias has dtype bfloat16, expected float32 (input's)"),
    (lambda: gelu(draw(3), bias=draw(3).to("meta")), RuntimeError, "gelu: bias is on meta, expected cpu (input's)"),
])
def test_refuses_in_words(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == text


@pytest.mark.parametrize(("name", "args", "text"), [
    ("forward", (torch.ones(3, dtype=torch.int64), None, False),
     "gelu: input has dtype int64, expected float32, bfloat16, float16 or float64"),
    ("forward", (draw(2, 3), draw(4), False), "gelu: bias has shape (4,), expected (3,) (input's last dimension)"),
    ("forward", (draw(3), draw(3, dtype=torch.float64), False), "gelu: bias has dtype float64, expected float32 (input's)"),
    ("forward", (draw(3, dtype=torch.float64), draw(3), False), "gelu: bias has dtype float32, expected float64 (input's)"),
    ("forward", (draw(3, dtype=torch.float16), draw(3, dtype=torch.bfloat16), False),
     "gelu: bias has dtype bfloat16, expected float16 (input's) or float32"),
    ("backward", (draw(4), draw(3), None, False, False), "gelu: grad_output has shape (4,), expected (3,) (input's)"),
    ("backward", (draw(3).bfloat16(), draw(3), None, False, False), "gelu: grad_output has dtype bfloat16, expected float32"),
    ("backward", (draw(3), draw(3), None, False, True), "gelu: need_bias_grad is True, expected a bias"),
])
def test_raw_ops_check_again(name, args, text):
    with pytest.raises(ValueError) as error:
        getattr(torch.ops.transfuse, f"gelu_{name}")(*args)
    assert str(error.value) == text
