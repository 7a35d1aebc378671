"""The CUDA kernels keep the contract: the promises of all ops but attention, sizes that no CPU goes through, and orders."""

import itertools

import emulated_ops
import emulator
import pytest
import torch
from emulated_promises import ATTENTION_OPS, OPS, PROMISES, each, is_kept, measured_anew  # noqa: F401  a fixture

import transfuse
from transfuse import _C, promises
from transfuse.dispatch import dtype_name
from transfuse.promises.cases import PARITY_CASES, gradients_of, selected

pytestmark = pytest.mark.usefixtures("measured_anew")


@each([promise for promise in PROMISES if promise.op not in ATTENTION_OPS])
def test_promise_is_kept(promise, monkeypatch):
    is_kept(promise, monkeypatch)


def test_every_cuda_kernel_is_emulated():
    """A stem that has its .cu has its host code too, and then all of its promises run here."""
    assert [stem for stem in emulated_ops.STEMS if emulated_ops.sources_of(stem)[0]] == list(emulated_ops.EMULATED)


@pytest.mark.parametrize("op", OPS)
def test_every_direction_runs_on_the_emulated_kernels(op):
    directions = {direction for case in selected(PARITY_CASES, op) for direction in case.directions}
    for direction in sorted(directions):
        with emulated_ops.EmulatedKernels() as mode:
            promises.check(promises.find(f"2.{op}.float32.agrees-{direction}"), "cpu")
        assert mode.calls > 0


@pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
@pytest.mark.parametrize("op", OPS)
def test_no_bit_depends_on_the_order_of_blocks_and_threads(op, dtype):
    for case in selected(PARITY_CASES, op):
        inputs = case.inputs(dtype)
        grad_output = case.grad_output(inputs)
        found = []
        for seed in (0, 1, 2):
            with emulated_ops.EmulatedKernels(seed), torch.no_grad():
                forward = case.ours(*inputs)
            gradients = ()
            if "backward" in case.directions:
                with emulated_ops.EmulatedKernels(seed):
                    gradients = gradients_of(case.ours, inputs, grad_output)()
            found.append((forward, *gradients))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), case.name


@pytest.mark.parametrize("cols", [40, 2048])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_gradients_wanted_in_part(op, cols):
    """Each gradient alone and in pairs: the bits that it has beside all others."""
    dtype, rows = torch.bfloat16, 11
    x, grad_output = torch.randn(2, rows, cols).to(dtype)
    weights = [torch.randn(cols).to(dtype) for _ in range(2 if op == "layer_norm" else 1)]
    backward = getattr(torch.ops.transfuse, f"{op}_backward").default

    def gradients(wanted, seed):
        with emulated_ops.EmulatedKernels(seed):
            return backward(grad_output, None, x, *weights, 1, 1e-5, *wanted)

    every = gradients([True] * (1 + len(weights)), 0)
    for wanted in itertools.product((False, True), repeat=len(every)):
        for seed in (1, 2):
            for found, whole, is_wanted in zip(gradients(wanted, seed), every, wanted, strict=True):
                assert torch.equal(found, whole) if is_wanted else found.numel() == 0


def _gelu_inputs(dtype):
    """Every 16-bit number; floats of every exponent, more of them where the segments end and the tail lies."""
    if dtype != torch.float32:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    everywhere = torch.arange(0, 1 << 32, 65521, dtype=torch.int64).to(torch.int32).view(dtype)
    return torch.cat([everywhere, torch.linspace(-20, 20, 10001), torch.tensor([3.9375, -3.9375])])


@pytest.mark.skipif(_C.cpu_isa() == "baseline", reason="without FMA the CPU's GELU rounds elsewhere")
@pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
@pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])
def test_gelu_has_the_bits_of_the_cpu(tanh, dtype):
    x = _gelu_inputs(dtype)
    grad_output = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if dtype != torch.float32:  # the CPU multiplies with an entry of its table: one rounding for powers of two alone
        grad_output = grad_output.sign() * 2.0 ** (torch.arange(x.numel()) % 3).to(dtype)
    raw = (
        lambda: torch.ops.transfuse.gelu_forward(x, None, tanh),
        lambda: torch.ops.transfuse.gelu_backward(grad_output, x, None, tanh, False),
    )
    for call in raw:
        expected = call()
        with emulated_ops.EmulatedKernels() as mode:
            found = call()
        assert mode.calls == 1
        ours, theirs = (t[0] if isinstance(t, tuple) else t for t in (found, expected))
        differ = ours.view(torch.uint8).ne(theirs.view(torch.uint8)).view(x.numel(), -1).any(1)
        differ &= ~(ours.isnan() & theirs.isnan())
        assert not differ.any(), f"{x[differ][:4]}: {ours[differ][:4]}, on the CPU {theirs[differ][:4]}"


@pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
def test_a_row_of_one_element_has_the_gradient_zero(dtype):
    input, weight = (torch.randn(size, 1).to(dtype).requires_grad_() for size in (5, 1))
    with emulated_ops.EmulatedKernels():
        output = transfuse.layer_norm(input, (1,), weight[0])
        (grad_input,) = torch.autograd.grad(output, input, torch.randn(5, 1).to(dtype))
    assert not grad_input.any()


@pytest.mark.parametrize("dtype", emulated_ops.DTYPES, ids=dtype_name)
def test_rows_further_apart_than_an_int32_counts(dtype):
    """Memory that is reserved and not there: three rows of 100 in more than 2^32 elements."""
    rows, cols, stride = 3, 100, (1 << 31) + 8
    with emulator.Memory() as memory:
        far = memory.strided("far", (rows, cols), (stride, 1), dtype, "read-only")
        far.copy_(torch.randn(rows, cols))
        with emulated_ops.EmulatedKernels():
            for op in (transfuse.layer_norm, transfuse.rms_norm):
                assert torch.equal(op(far, (cols,)), op(far.contiguous(), (cols,))), op.__name__


@pytest.mark.parametrize("queries", [1, 2, 3, 641, 65_537, 6_700_417])
def test_the_query_of_a_row_is_found_among_2_to_the_31_rows(queries):
    """Of one key, seen by the last query alone. Row numbers are divided by multiplication, beyond that limit not."""
    for heads in ((1 << 31) // queries, (1 << 31) // queries + 2):
        rows = heads * queries
        with emulator.Memory() as memory:
            x = memory.strided("x", (heads, queries, 1), (queries, 1, 1), torch.bfloat16, "read-only")
            ends = torch.cat([torch.arange(17), torch.arange(rows - 17, rows)])  # of two blocks one may hold a row
            x.view(-1)[ends] = 1.0
            with emulated_ops.EmulatedKernels(blocks_at_ends=2):
                y = transfuse.masked_softmax(x, is_causal=True, causal_alignment="bottom_right")
            assert torch.equal(y.view(-1)[ends].bool(), ends % queries == queries - 1), rows


ROWS_AT_ENDS, BLOCKS_AT_ENDS = 16, 2


def _attends_to_itself(x):
    return transfuse.scaled_dot_product_attention(x, x, x)


def _huge_calls(cols):
    """Op by op: a call on rows of `cols`, which takes every row alone."""
    weight = torch.linspace(0.5, 1.5, cols).bfloat16()
    cos, sin = torch.randn(2, 1, cols // 2).bfloat16()
    return {
        "layer_norm": lambda x: transfuse.layer_norm(x, (cols,), weight, weight),
        "rms_norm": lambda x: transfuse.rms_norm(x, (cols,), weight),
        "gelu": lambda x: transfuse.gelu(x),
        "masked_softmax": lambda x: transfuse.masked_softmax(x),
        "attention": lambda x: _attends_to_itself(x.view(-1, 1, 32, cols // 32)).view(x.shape),
        "attention_decode": _decodes_with_itself,
        "rotary": lambda x: transfuse.rotary(x.unsqueeze(1), cos, sin).squeeze(1),
    }


def _decodes_with_itself(x):
    """Each row is an entry: 16 query heads, of which the first is also the one key, and its value."""
    entries = x.view(-1, 16, 1, x.shape[1] // 16)
    ones = torch.ones(1, dtype=torch.int32).expand(len(entries))
    return transfuse.decode_attention(entries, entries[:, :1], entries[:, :1], ones).view(x.shape)


@pytest.mark.parametrize("stem", emulated_ops.LIBRARIES)
def test_more_elements_than_an_int32_counts(stem):
    """The first and the last rows of a tensor that is not there in between, by the blocks at the grid's ends alone."""
    cols = 2048
    rows = (1 << 31) // cols + 100
    call = _huge_calls(cols)[stem]
    with emulator.Memory() as memory:
        huge = memory.strided("huge", (rows, cols), (cols, 1), torch.bfloat16, "read-only")
        for ends in (slice(0, ROWS_AT_ENDS), slice(rows - ROWS_AT_ENDS, rows)):
            huge[ends] = torch.randn(ROWS_AT_ENDS, cols)
        with emulated_ops.EmulatedKernels(blocks_at_ends=BLOCKS_AT_ENDS):
            output = call(huge)
        with emulated_ops.EmulatedKernels():
            for row in (0, rows - 1):
                assert torch.equal(output[row], call(huge[row : row + 1].clone())[0]), f"row {row}"
