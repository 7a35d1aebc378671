"""The Triton row kernels compile for GPUs that are not here, and what comes out is gated.

No approximate exponential, no flushed subnormal and no atomic in any of them, no spill that its launch row does not
state, shared memory within the architecture. Every launch row on sm_90, one of each kernel elsewhere.
"""

import pytest
import torch
import triton_compile

from transfuse.kernels.triton import gelu, launch, layer_norm, masked_softmax, rms_norm, rotary
from transfuse.kernels.triton.rows import STREAMED, TILES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLS = tuple(tile.cols for tile in TILES) + (TILES[-1].cols + STREAMED.cols,)
USUAL_COLS = 1024
# Elsewhere than on sm_90, where launch rows were chosen, a spill is a slow row and no mistake.
FORBIDDEN_PTX = ("ex2.approx", ".approx", ".ftz", "atom.", "red.global")
FORBIDDEN_GCN = ("v_exp_f32", "global_atomic", "flat_atomic")


def _empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def _norms(cols, dtype, rows=64):
    x, weight = _empty(rows, cols, dtype=dtype), _empty(cols, dtype=dtype)
    layer_norm.add_layer_norm_forward(x, x, weight, weight, 1, 1e-5)
    layer_norm.layer_norm_backward(x, x, x, weight, weight, 1, 1e-5, True, True, True)
    rms_norm.rms_norm_forward(x, weight, 1, 1e-5)
    rms_norm.rms_norm_backward(x, None, x, weight, 1, 1e-5, True, True)


def _softmax(cols, dtype, rows=64):
    x = _empty(2, rows, cols, dtype=dtype)
    masked_softmax.masked_softmax_forward(x, _empty(rows, cols, dtype=dtype).expand(2, rows, cols), 0.1, True, False)
    masked_softmax.masked_softmax_forward(
        x, _empty(2, 1, cols, dtype=torch.bool).expand(2, rows, cols), 0.1, False, False
    )
    masked_softmax.masked_softmax_backward(x, x, 0.1)
    masked_softmax.masked_softmax_mask_backward(x, x, _empty(1, rows, 1, dtype=dtype))


def _gelu(cols, dtype, rows=64):
    x, bias = _empty(rows, cols, dtype=dtype), _empty(cols, dtype=dtype)
    for tanh in (False, True):
        gelu.gelu_forward(x, bias, tanh)
        gelu.gelu_backward(x, x, bias, tanh, True)


def _rotary(cols, dtype):
    x, table = _empty(2, 4, 50, cols, dtype=dtype), _empty(50, cols // 2 - 4, dtype=dtype)
    for interleaved in (False, True):
        rotary.rotary_forward(x, table, table, interleaved, False)
    rotary.rotary_backward(x, x, table, False, False)


def _calls(work, cols, dtype, architecture):
    """One recorded launch of each kernel that is compiled differently."""
    with launch.recording(architecture) as recorded:
        work(cols, dtype)
    found = {}
    for call in recorded.calls:
        shapes = {
            name: value if isinstance(value, (bool, int)) else value is None for name, value in call.arguments.items()
        }
        found[call.kernel.fn.__name__, tuple(shapes.items())] = call
    return list(found.values())


def _gate(call, architecture):
    found = triton_compile.compiled(call, architecture)
    code = found.ptx or found.amdgcn
    assert code and call.options["enable_fp_fusion"] is False
    for word in FORBIDDEN_PTX if found.ptx else FORBIDDEN_GCN:
        assert word not in code, f"{found.name}: {word} in its code for {architecture.name}"
    assert found.shared_bytes <= architecture.shared_bytes, f"{found.name}: {found.shared_bytes} bytes of shared memory"
    if architecture is launch.SM90:
        assert found.spills <= call.row.spill_bytes, f"{found.name}: {found.spills} bytes of spills"


WORK = {"norms": _norms, "softmax": _softmax, "gelu": _gelu}
ELSEWHERE = [architecture for architecture in launch.ARCHITECTURES if architecture is not launch.SM90]


@pytest.mark.parametrize("work", [*WORK.values(), _rotary], ids=[*WORK, "rotary"])
def test_float32_kernels_compile_for_sm_90(work):
    for call in _calls(work, 64 if work is _rotary else USUAL_COLS, torch.float32, launch.SM90):
        _gate(call, launch.SM90)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_every_launch_row_compiles_for_sm_90(work, cols, dtype):
    for call in _calls(work, cols, dtype, launch.SM90):
        _gate(call, launch.SM90)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", (16, 64, 128, 256, 512, 1024))
def test_every_launch_row_of_rotary_compiles_for_sm_90(cols, dtype):
    for call in _calls(_rotary, cols, dtype, launch.SM90):
        _gate(call, launch.SM90)


@pytest.mark.slow
@pytest.mark.parametrize("work", [*WORK.values(), _rotary], ids=[*WORK, "rotary"])
@pytest.mark.parametrize("architecture", ELSEWHERE, ids=lambda architecture: str(architecture.name))
def test_every_kernel_compiles_for(architecture, work):
    for dtype in (torch.float32, torch.bfloat16):
        for cols in (64,) if work is _rotary else (USUAL_COLS, COLS[-1]):
            for call in _calls(work, cols, dtype, architecture):
                _gate(call, architecture)


@pytest.mark.parametrize("rows,cols", [(1, 1), (1, 48), (5, 1), (1, COLS[-1])])
def test_sizes_of_one_compile(rows, cols):
    """The compiler takes an integer of 1 for a constant, which has no type; the interpreter does not."""
    with launch.recording(launch.SM90) as recorded:
        for work in WORK.values():
            work(cols, torch.bfloat16, rows)
        _rotary(2 * cols + 8, torch.bfloat16)
    for call in {call.kernel: call for call in recorded.calls}.values():
        assert triton_compile.compiled(call, launch.SM90).ptx


def _views(rows, cols, dtype):
    """The same rows where they may lie: dense, an element past a boundary, among longer rows on boundaries and off."""
    longer = 64 + cols // 64 * 64
    yield torch.zeros(rows, cols, dtype=dtype)
    yield torch.zeros(rows * cols + 1, dtype=dtype)[1:].view(rows, cols)
    for stride, first in ((longer, 0), (longer, 1), (longer + 3, 0), (longer + 3, 2)):
        yield torch.zeros(rows, stride, dtype=dtype)[:, first : first + cols]


def _layouts(call):
    """What lays a kernel's tiles out: what is known of its addresses and strides."""
    _, constants, alignments = triton_compile.specialization(call)
    names = [parameter.name for parameter in call.kernel.params]
    sizes = {path for path in alignments if names[path[0]] in ("rows", "chunks")}  # say nothing of addresses
    return call.kernel.fn.__name__, repr(constants), sorted(set(alignments) - sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cols", [1, 20, 32, 100, 768])
def test_layouts_follow_from_the_length_alone(cols, dtype):
    """On a GPU the layout of a tile is the order of its sums: a row's bits must not depend on where the row lies."""
    found = {}
    for x in _views(6, cols, dtype):
        for weight in (row[0] for row in _views(1, cols, dtype)):
            with launch.recording(launch.SM90) as recorded:
                layer_norm.add_layer_norm_forward(x, x, weight, weight, 1, 1e-5)
                rms_norm.rms_norm_backward(x, x, x, weight, 1, 1e-5, True, True)
                masked_softmax.masked_softmax_forward(x, None, 0.1, False, False)
                masked_softmax.masked_softmax_backward(x, x, 0.1)
            for call in recorded.calls:
                name, *layout = _layouts(call)
                assert found.setdefault(name, layout) == layout, name


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [20, 32, 100])
def test_layouts_of_masks_follow_from_the_length_alone(keys, dtype):
    """Every sequence its own mask, one for all, the mask of one sequence alone: the same sums."""
    found = {}
    for batch in (1, 6):
        x = torch.zeros(batch, 2, 5, keys, dtype=torch.bfloat16)
        for rows in (batch, 1):
            for mask in _views(rows, keys, dtype):
                with launch.recording(launch.SM90) as recorded:
                    masked_softmax.masked_softmax_forward(x, mask[:, None, None].expand(x.shape), 0.1, False, False)
                (call,) = recorded.calls
                name, constants, alignments = _layouts(call)
                arguments = call.arguments
                layout = (arguments["WHOLE_MASK"], alignments)
                assert found.setdefault(name, layout) == layout
                if arguments["WHOLE_MASK"]:  # what the kernel then tells the compiler is true
                    strides = [arguments[f"s{dim}"] for dim in range(arguments["DIMS"])]
                    assert arguments["mask"].data_ptr() % 16 == 0 and not any(stride % 16 for stride in strides)


def test_the_gate_sees_an_approximate_exponential():
    """tl.exp is what row kernels must not use."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, BLOCK: tl.constexpr):
        at = x + tl.arange(0, BLOCK)
        tl.store(at, tl.exp(tl.load(at)))

    with launch.recording(launch.SM90) as recorded:
        launch.launch(
            kernel, (1,), launch.Launch(4), torch.device("meta"), x=_empty(128, dtype=torch.float32), BLOCK=128
        )
    with pytest.raises(AssertionError, match="approx"):
        _gate(recorded.calls[0], launch.SM90)
