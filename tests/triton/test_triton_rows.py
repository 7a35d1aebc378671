"""What the promises leave out of the Triton row kernels: tiles as on a GPU, long rows, mixed dtypes, compilers."""

import pytest
import torch

import transfuse
from transfuse import _C, promises
from transfuse.kernels.triton import launch, rows
from transfuse.reference.gelu import gelu_reference
from transfuse.testing import MAX_ULP, draw, error_budget, ulp_distance

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("layer_norm", "rms_norm")


@pytest.fixture(autouse=True)
def _on_triton():
    torch.set_num_threads(1)
    with transfuse.use_backend("triton"):
        yield


def _assert_close(function, tensors, terms):
    """Results and gradients of `function` agree with the reference's, which runs in float64."""
    coarsest = min((t.dtype for t in tensors), key=lambda dtype: -torch.finfo(dtype).eps)
    leaves = [t.detach().requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    found = function(*leaves)
    with transfuse.use_backend("reference"):
        exact = function(*wide)
    found, exact = (r if isinstance(r, tuple) else (r,) for r in (found, exact))
    incoming = [draw(*r.shape, dtype=torch.bfloat16, seed=7 + i) for i, r in enumerate(found)]
    ours = torch.autograd.grad(found, leaves, [g.to(r.dtype) for g, r in zip(incoming, found, strict=True)])
    theirs = torch.autograd.grad(exact, wide, [g.double() for g in incoming])
    for i, (a, b) in enumerate(zip((*found, *ours), (*exact, *theirs), strict=True)):
        allowed = 4 * error_budget(coarsest, terms) * max(1e-30, float(b.abs().max()))
        error = float((a.double() - b).abs().max())
        assert error <= allowed, f"result {i}: {error:.2e}, allowed {allowed:.2e}"


# ---- add_<norm>: two results, two ways for gradients ----


def check_add_norm(op, dtype):
    """What is normalised is the rounded sum, and the sum's own gradient joins the norm's."""
    x, y = draw(9, 70, dtype=dtype, seed=1, scale=3.0), draw(9, 70, dtype=dtype, seed=2, scale=1 / 3)
    weight = draw(70, dtype=dtype, seed=3, shift=1.0)
    output, total = getattr(transfuse, f"add_{op}")(x, y, (70,), weight, eps=0.3)
    assert torch.equal(total, x + y)
    assert torch.equal(output, getattr(transfuse, op)(total, (70,), weight, eps=0.3))
    _assert_close(lambda a, b, w: getattr(transfuse, f"add_{op}")(a, b, (70,), w, eps=0.3), (x, y, weight), 70)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NORMS)
def test_add_norm_is_the_two_steps(op, dtype):
    check_add_norm(op, dtype)


# ---- tiles ----


@pytest.mark.parametrize(
    "promise",
    [f"2.{op}.{dtype}.agrees-{direction}" for dtype, ops in (
        ("float32", ("layer_norm", "masked_softmax")),
        ("bfloat16", ("add_rms_norm", "gelu")),
        ("float16", ("rms_norm", "rotary")),
    ) for op in ops for direction in ("forward", "backward")],
)  # fmt: skip
def test_tiles_as_on_a_gpu(promise, monkeypatch):
    """The interpreter takes more rows at once; here it takes as many as a program does on an H100."""
    monkeypatch.setattr(launch, "INTERPRETER", launch.SM90)
    promises.forget()
    outcome = promises.check(promises.find(promise), "triton", "cpu")
    promises.forget()
    assert outcome.status == "ok", f"{outcome.reason} {outcome.figure}"


def test_the_tile_of_a_row_depends_on_its_length_alone():
    for cols in (1, 16, 17, 1000, 8192):
        found = {rows.row_tile(cols, count, launch.SM90, rows.TILES) for count in (1, 5, 10**6)}
        assert len(found) == 1 and found.pop().cols >= cols
    assert rows.row_tile(8193, 4, launch.SM90, rows.TILES) is None


LONG = rows.TILES[-1].cols + 9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", NORMS)
def test_rows_that_no_program_holds(op, dtype):
    x, y = draw(3, LONG, dtype=dtype, seed=1, shift=2.0), draw(3, LONG, dtype=dtype, seed=2)
    weight = draw(LONG, dtype=dtype, seed=3, shift=1.0)
    _assert_close(lambda a, b, w: getattr(transfuse, f"add_{op}")(a, b, (LONG,), w, eps=0.3), (x, y, weight), LONG)


def check_hard_rows(op, cols):
    """Rows whose statistics need more than float: mean/std 1e6, beyond float's squares, constant; within the bound."""
    x = torch.stack([draw(cols, shift=1e6), draw(cols, scale=1e30), torch.full((cols,), 3.0)])
    found = getattr(transfuse, op)(x, (cols,), eps=1e-5)
    with transfuse.use_backend("reference"):
        exact = getattr(transfuse, op)(x.double(), (cols,), eps=1e-5)
    assert float(ulp_distance(found, exact, exact.abs().clamp(min=1.0)).max()) <= MAX_ULP[f"{op}_forward"]


@pytest.mark.parametrize("cols", [700, LONG])
@pytest.mark.parametrize("op", NORMS)
def test_hard_rows(op, cols):
    check_hard_rows(op, cols)


def check_sharp_softmax():
    x = draw(20, 65, seed=1, scale=300.0)
    with transfuse.use_backend("reference"):
        exact = transfuse.masked_softmax(x.double(), scale=0.112)
    assert (
        float(ulp_distance(transfuse.masked_softmax(x, scale=0.112), exact).max()) <= MAX_ULP["masked_softmax_forward"]
    )


def check_gelu_slope():
    x = torch.linspace(-14, 6, 4001).requires_grad_()
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(gelu_reference(wide).sum(), wide)
    (slope,) = torch.autograd.grad(transfuse.gelu(x).sum(), x)
    assert float(ulp_distance(slope, exact).max()) <= MAX_ULP["gelu_backward"]


def test_sharp_softmax_and_the_slope_of_gelu():
    check_sharp_softmax()
    check_gelu_slope()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["boolean", "additive", "causal"])
def test_masked_softmax_of_long_rows(kind, dtype):
    x, bias = draw(2, 3, LONG, dtype=dtype, seed=1, scale=4.0), draw(1, LONG, dtype=dtype, seed=2)
    keep = torch.rand(2, 1, LONG, generator=torch.Generator().manual_seed(0)) < 0.7
    calls = {
        "boolean": (lambda a: transfuse.masked_softmax(a, keep, scale=0.7), (x,)),
        "additive": (lambda a, m: transfuse.masked_softmax(a, m, scale=0.7), (x, bias)),
        "causal": (lambda a: transfuse.masked_softmax(a, is_causal=True, causal_alignment="bottom_right"), (x,)),
    }
    _assert_close(*calls[kind], LONG)


def test_long_rows_by_their_largest_score():
    inf, nan = torch.inf, torch.nan
    x = draw(5, LONG)
    x[0, -1], x[1, 7], x[2, -1] = nan, inf, 2.0**21 + 0.25
    mask = torch.ones(5, LONG, dtype=torch.bool)
    mask[3], mask[4, :-1] = False, False
    y = transfuse.masked_softmax(x, mask)
    assert y[:2].isnan().all() and not y[3].any()
    assert y[2, -1] == y[4, -1] == 1 and not y[2, :-1].any()


def test_a_mask_in_more_dimensions_than_a_kernel_counts():
    shape = (2, 3, 2, 3, 2, 3, 2, 3, 2, 5)
    x, mask = draw(*shape, seed=1), draw(*(n if d % 2 else 1 for d, n in enumerate(shape)), seed=2)
    _assert_close(lambda a, m: transfuse.masked_softmax(a, m), (x, mask), 5 * 32)


# ---- dtypes, layouts, sizes ----


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_parameters_beside_16_bit_inputs(dtype):
    x = draw(6, 33, dtype=dtype, seed=1)
    weight, bias = draw(33, seed=2, shift=1.0), draw(33, seed=3)
    _assert_close(lambda a, w, b: transfuse.layer_norm(a, (33,), w, b, 0.3), (x, weight, bias), 33)
    _assert_close(lambda a, w: transfuse.rms_norm(a, (33,), w, 0.3), (x, weight), 33)
    _assert_close(lambda a, b: transfuse.gelu(a, bias=b), (x, bias.to(dtype)), 33)
    cos, sin = draw(6, 16, seed=4), draw(6, 16, seed=5)
    _assert_close(lambda a, c, s: transfuse.rotary(a, c, s), (x, cos, sin), 2)
    mask = draw(1, 33, seed=6)
    _assert_close(lambda a, m: transfuse.masked_softmax(a, m), (x, mask), 33)


def test_empty_tensors():
    for shape in ((0, 8), (3, 0)):
        x, parameter = torch.ones(shape, requires_grad=True), torch.ones(shape[1], requires_grad=True)
        results = (
            transfuse.layer_norm(x, shape[1:], parameter, parameter), transfuse.rms_norm(x, shape[1:], parameter),
            transfuse.gelu(x, bias=parameter), transfuse.masked_softmax(x, parameter),
        )  # fmt: skip
        for result in results:
            grads = torch.autograd.grad(result.sum(), (x, parameter))
            assert result.shape == grads[0].shape == shape and not grads[1].any()


@pytest.mark.skipif(_C.cpu_isa() == "baseline", reason="without FMA the CPU's GELU rounds elsewhere")
@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
def test_gelu_has_the_bits_of_the_cpu(tanh):
    everywhere = torch.arange(0, 1 << 32, 65521, dtype=torch.int64).to(torch.int32).view(torch.float32)
    x = torch.cat([everywhere, torch.linspace(-20, 20, 10001)])
    grad_output = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for name, arguments in (("gelu_forward", (x, None, tanh)), ("gelu_backward", (grad_output, x, None, tanh, False))):
        ours, theirs = (
            getattr(getattr(torch.ops, space), name)(*arguments) for space in ("transfuse_triton", "transfuse")
        )
        ours, theirs = (t[0] if isinstance(t, tuple) else t for t in (ours, theirs))
        differ = ours.view(torch.int32).ne(theirs.view(torch.int32)) & ~(ours.isnan() & theirs.isnan())
        assert not differ.any(), f"{name} at {x[differ][:4]}: {ours[differ][:4]}, on the CPU {theirs[differ][:4]}"


# ---- compilers and transforms ----

CALLS = {
    "layer_norm": lambda x: transfuse.layer_norm(x, (24,), x[0], x[1]),
    "add_rms_norm": lambda x: transfuse.add_rms_norm(x, x, (24,), x[0])[0],
    "gelu": lambda x: transfuse.gelu(x, bias=x[0]),
    "masked_softmax": lambda x: transfuse.masked_softmax(x, x[:1]),
    "rotary": lambda x: transfuse.rotary(x, x[:, :12], x[:, 12:]),
}


@pytest.mark.parametrize("op", CALLS)
def test_compiled_and_mapped_calls_give_the_same_bits(op):
    call = CALLS[op]
    x = draw(5, 24, seed=1).requires_grad_()
    expected = torch.autograd.grad(call(x).square().sum(), x)[0]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x).square().sum(), x)[0], expected)
    several = draw(2, 5, 24, seed=2)
    mapped = torch.func.vmap(torch.func.grad(lambda t: call(t).square().sum()))(several)
    for one, result in zip(several, mapped, strict=True):
        leaf = one.detach().requires_grad_()
        assert torch.equal(torch.autograd.grad(call(leaf).square().sum(), leaf)[0], result)


@pytest.mark.parametrize("op", CALLS)
def test_raw_ops_tell_compilers_the_truth(op):
    """Their fake kernels, schemas and autograd's registration, by torch's own checker."""
    recorded = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "transfuse_triton":
                recorded.append((function, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)))
            return function(*args, **(kwargs or {}))

    x = draw(5, 24, seed=1).requires_grad_()
    with Recorder():
        torch.autograd.grad(CALLS[op](x).square().sum(), x)
    assert len(recorded) >= 2
    for function, arguments in recorded:
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))
