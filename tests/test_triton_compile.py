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


def _norms(cols, dtype):
    x, weight = _empty(64, cols, dtype=dtype), _empty(cols, dtype=dtype)
    layer_norm.add_layer_norm_forward(x, x, weight, weight, 1, 1e-5)
    layer_norm.layer_norm_backward(x, x, x, weight, weight, 1, 1e-5, True, True, True)
    rms_norm.rms_norm_forward(x, weight, 1, 1e-5)
    rms_norm.rms_norm_backward(x, None, x, weight, 1, 1e-5, True, True)


def _softmax(cols, dtype):
    x = _empty(2, 64, cols, dtype=dtype)
    masked_softmax.masked_softmax_forward(x, _empty(64, cols, dtype=dtype).expand(2, 64, cols), 0.1, True, False)
    masked_softmax.masked_softmax_forward(
        x, _empty(2, 1, cols, dtype=torch.bool).expand(2, 64, cols), 0.1, False, False
    )
    masked_softmax.masked_softmax_backward(x, x, 0.1)
    masked_softmax.masked_softmax_mask_backward(x, x, _empty(1, 64, 1, dtype=dtype))


def _gelu(cols, dtype):
    x, bias = _empty(64, cols, dtype=dtype), _empty(cols, dtype=dtype)
    for tanh in (False, True):
        gelu.gelu_forward(x, bias, tanh)
        gelu.gelu_backward(x, x, bias, tanh, True)


def _rotary(cols, dtype):
    x, table = _empty(2, 4, 50, cols, dtype=dtype), _empty(50, cols // 2 - 4, dtype=dtype)
    for interleaved in (False, True):
        rotary.rotary_forward(x, table, table, interleaved, False)
    rotary.rotary_backward(x, x, table, False, False)


def _calls(work, cols, dtype, architecture, monkeypatch):
    """One recorded launch of each kernel that is compiled differently; the tables of gelu are no part of it."""
    monkeypatch.setattr(gelu, "_table", lambda tanh, backward, device: _empty(192, dtype=torch.float32))
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
def test_float32_kernels_compile_for_sm_90(work, monkeypatch):
    for call in _calls(work, 64 if work is _rotary else USUAL_COLS, torch.float32, launch.SM90, monkeypatch):
        _gate(call, launch.SM90)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_every_launch_row_compiles_for_sm_90(work, cols, dtype, monkeypatch):
    for call in _calls(work, cols, dtype, launch.SM90, monkeypatch):
        _gate(call, launch.SM90)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", (16, 64, 128, 256, 512, 1024))
def test_every_launch_row_of_rotary_compiles_for_sm_90(cols, dtype, monkeypatch):
    for call in _calls(_rotary, cols, dtype, launch.SM90, monkeypatch):
        _gate(call, launch.SM90)


@pytest.mark.slow
@pytest.mark.parametrize("work", [*WORK.values(), _rotary], ids=[*WORK, "rotary"])
@pytest.mark.parametrize("architecture", ELSEWHERE, ids=lambda architecture: str(architecture.name))
def test_every_kernel_compiles_for(architecture, work, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        for cols in (64,) if work is _rotary else (USUAL_COLS, COLS[-1]):
            for call in _calls(work, cols, dtype, architecture, monkeypatch):
                _gate(call, architecture)


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
