"""Triton's attention compiles for GPUs that are not here, and what comes out is gated.

No atomic in any kernel, wgmma in the 16-bit forward on sm_90, no spill there that its launch row does not state, shared
memory within the architecture. Every tile on sm_90, one of each kernel elsewhere.
"""

import pytest
import torch
import triton_compile

from transfuse.kernels.triton import attention, attention_backward, attention_decode, launch
from transfuse.kernels.triton.attention_problem import TILES

FORBIDDEN_PTX = ("atom.", "\tred.")
FORBIDDEN_GCN = ("global_atomic", "flat_atomic")
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
KINDS = ("forward", "query", "key", "bias", "decode")
ELSEWHERE = [architecture for architecture in launch.ARCHITECTURES if architecture is not launch.SM90]
NONE = (None,) * 4  # seqlens_k, alibi_slopes, sinks, dropout_seed


def _recorded(kind, head_dim, dtype, architecture, causal=True, bias_dtype=None, masked=False, gap=0):
    """The launches of one kind of kernel; heads lie `gap` columns apart."""
    batch, heads, length = 2, 8, 1024
    query = torch.empty(batch, length, heads, head_dim + gap, dtype=dtype, device="meta")[..., :head_dim]
    query = query.transpose(1, 2)
    lse = torch.empty(batch, heads, length, device="meta")
    numbers = (head_dim**-0.5, causal, False, -1, -1, 0.0, 0.0)
    bias = None
    if kind == "bias":
        bias = torch.empty(1, heads, length, length, dtype=dtype, device="meta").expand(batch, -1, -1, -1)
    mask = torch.empty(batch, heads, length, length, dtype=torch.bool, device="meta") if masked else None
    if bias_dtype is not None:
        bias = torch.empty(batch, heads, length, length, dtype=bias_dtype, device="meta")
    shape = [1 if kind == "bias" else batch, heads, length, length]
    wants = ([1] * 4 if bias is None else shape, bias is not None, False, False)
    with launch.recording(architecture) as recorded:
        if kind == "forward":
            attention.attention_forward(query, query, query, bias, mask, *NONE, *numbers)
        elif kind == "decode":
            lengths = torch.empty(batch, dtype=torch.int32, device="meta")
            attention_decode.decode_attention_forward(
                query[:, :, :1], query, query, lengths, None, None, None, None, 0, head_dim**-0.5, -1, 0.0
            )
        else:
            attention_backward.attention_backward(
                query, None, query, query, query, query, lse, bias, mask, *NONE, *numbers, *wants
            )
    wanted = {"forward": "forward", "decode": "decode"}.get(kind, f"backward_{kind}")
    calls = [call for call in recorded.calls if wanted in call.kernel.fn.__name__]
    assert calls
    return calls


def _gate(call, architecture):
    found = triton_compile.compiled(call, architecture)
    code = found.ptx or found.amdgcn
    assert code and call.options["enable_fp_fusion"] is False
    for word in FORBIDDEN_PTX if found.ptx else FORBIDDEN_GCN:
        assert word not in code, f"{found.name}: {word} in its code for {architecture.name}"
    assert found.shared_bytes <= architecture.shared_bytes, f"{found.name}: {found.shared_bytes} bytes of shared memory"
    if architecture is launch.SM90:
        assert found.spills <= call.row.spill_bytes, f"{found.name}: {found.spills} bytes of spills"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_64_compile_for_sm_90(kind):
    for call in _recorded(kind, 64, torch.bfloat16, launch.SM90):
        found = _gate(call, launch.SM90)
        if kind in ("forward", "query", "key"):
            assert "wgmma.mma_async" in found.ptx


def test_a_forward_that_excludes_nothing_spills_nothing():
    (call,) = _recorded("forward", 128, torch.bfloat16, launch.SM90, causal=False)
    found = _gate(call, launch.SM90)
    assert found.spills == 0 and "wgmma.mma_async" in found.ptx


@pytest.mark.parametrize("kind", ("forward", "query", "key"))
def test_tiles_come_by_tma_where_tensors_lie_so(kind):
    for gap, by_tma in ((0, True), (4, False)):
        for call in _recorded(kind, 128, torch.bfloat16, launch.SM90, causal=False, gap=gap):
            assert ("cp.async.bulk.tensor" in _gate(call, launch.SM90).ptx) is by_tma


def test_no_descriptor_before_sm_90():
    for kind in ("forward", "query", "key"):
        for call in _recorded(kind, 128, torch.bfloat16, launch.SM80):
            described = [name for name in call.arguments if name.endswith("_tiles")]
            assert len(described) == 2 and all(call.arguments[name] is None for name in described)


def _bias_has_room(architecture, kind, head_dim, bias_dtype, masked):
    for call in _recorded(kind, head_dim, torch.bfloat16, architecture, False, bias_dtype, masked):
        found = triton_compile.compiled(call, architecture)
        assert found.shared_bytes <= architecture.shared_bytes, f"{found.name}: {found.shared_bytes} bytes"


def test_a_float32_bias_has_room():
    _bias_has_room(launch.SM90, "forward", 128, torch.float32, False)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", (launch.SM80, launch.SM90), ids=lambda architecture: str(architecture.name))
@pytest.mark.parametrize(
    ("bias_dtype", "masked"), ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)), ids=str
)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("kind", ("forward", "query", "key"))
def test_a_bias_and_a_mask_have_room(architecture, kind, head_dim, bias_dtype, masked):
    """Beside the tiles of keys and values those of a mask and of a bias, which float32 makes twice as large."""
    _bias_has_room(architecture, kind, head_dim, bias_dtype, masked)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, *SIXTEEN_BIT), ids=str)
@pytest.mark.parametrize("head_dim", (64, 128, 256, 512))
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_compiles_for_sm_90(kind, head_dim, dtype):
    for call in _recorded(kind, head_dim, dtype, launch.SM90):
        found = _gate(call, launch.SM90) if head_dim <= 256 else triton_compile.compiled(call, launch.SM90)
        if kind == "forward" and dtype in SIXTEEN_BIT:
            assert "wgmma.mma_async" in found.ptx


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ELSEWHERE, ids=lambda architecture: str(architecture.name))
def test_every_kernel_compiles_for(architecture, kind, dtype):
    for head_dim in (128, 256):
        for call in _recorded(kind, head_dim, dtype, architecture):
            _gate(call, architecture)


def test_every_head_dim_has_a_tile_everywhere():
    """Ascending within a kind, so that the first that is wide enough is the narrowest."""
    for architecture in launch.ARCHITECTURES:
        for kind in KINDS:
            for wide in (False, True):
                tiles = [t for t in TILES if t.kind == kind and t.wide == wide]
                tiles = [t for t in tiles if t.shared_bytes <= architecture.shared_bytes]
                assert tiles[-1].columns == 256
                for room in {t.shared_bytes for t in tiles}:
                    columns = [t.columns for t in tiles if t.shared_bytes == room]
                    assert columns == sorted(columns)
                assert [t.shared_bytes for t in tiles] == sorted((t.shared_bytes for t in tiles), reverse=True)
