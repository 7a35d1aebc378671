"""From the raw ops' arguments to what the attention kernels take: the problem, views, tiles and launch rows."""

import math
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_scores import Problem, Strided
from .exp import LOG2E
from .launch import NOT_MEASURED, Architecture, Launch, architecture_of, taken
from .versions import INTERPRETED

_FARTHEST = 2**30  # a window's side beyond every position: what lies further is unbounded
_PLAIN_SCALES = (2.0**-100, 2.0**100)  # sizes of a scale that may be left for the exponential
_FLOAT32_MAX = torch.finfo(torch.float32).max
_ZERO_FROM = -88.0  # e^-88 < 2^-126: weights below that are 0
_TMA_BYTES = 16  # what base and strides are multiples of
_TMA_FARTHEST = 2**40  # bytes
WIDEST = 256  # columns of a head that one program holds


def view(t: Tensor | None) -> Strided | None:
    """A [B, H, L, D] tensor, or [B, H, L]."""
    return None if t is None else Strided(t, *(t.stride() if t.dim() == 4 else (*t.stride(), 0)))


def takes_descriptor(t: Tensor) -> bool:
    """Whether TMA can read a [B, H, L, D] tensor: base and strides on 16-byte boundaries, no gap between columns."""
    bytes_apart = [stride * t.itemsize for stride, size in zip(t.stride()[:3], t.shape[:3]) if size > 1]
    return (
        t.numel() > 0 and t.stride(3) == 1 and t.data_ptr() % _TMA_BYTES == 0
        and all(0 < apart < _TMA_FARTHEST and apart % _TMA_BYTES == 0 for apart in bytes_apart)
    )  # fmt: skip


def packed_view(t: Tensor) -> Strided:
    """A [tokens, H, D] tensor, or [tokens, H]."""
    row, head, col = t.stride() if t.dim() == 3 else (*t.stride(), 0)
    return Strided(t, 0, head, row, col)


def allocate(op: str, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for results; where there is none left, the words name the op and the bytes."""
    try:
        return like.new_empty(shape, dtype=dtype)
    except RuntimeError as error:
        size = math.prod(shape) * (dtype or like.dtype).itemsize
        raise type(error)(f"{op}: could not allocate {size} bytes: {error}") from error


def heads_together(op: str, like: Tensor, heads: int, length: int, dim: int) -> Tensor:
    """A [B, H, L, D] view of [B, L, H, D] memory: heads of a token lie together, as the next projection wants them."""
    return allocate(op, like, like.shape[0], length, heads, dim).transpose(1, 2)


def dense_problem(query, key, value, bias, mask, seqlens_k, alibi_slopes, sinks, dropout_seed, scale, causal,
                  bottom_right, window_left, window_right, softcap, dropout_p) -> Problem:
    return _problem(
        view(query), view(key), view(value), view(bias), None if mask is None else view(mask.view(torch.uint8)),
        alibi_slopes, sinks, dropout_seed, scale, causal, bottom_right, window_left, window_right, softcap, dropout_p,
        seqlens_k=None if seqlens_k is None else seqlens_k.contiguous(), offsets_q=None, offsets_k=None,
        max_q=query.shape[2], max_k=key.shape[2], tokens_q=None, tokens_k=None, heads=query.shape[1],
        kv_heads=key.shape[1], head_dim=_ragged(query.shape[3]),
        value_head_dim=_ragged(value.shape[3]),
    )


def packed_problem(
    query, key, value, cu_q, cu_k, bias, alibi_slopes, sinks, dropout_seed, max_q, max_k, *numbers
) -> Problem:
    return _problem(
        packed_view(query), packed_view(key), packed_view(value), view(bias), None, alibi_slopes, sinks, dropout_seed,
        *numbers, seqlens_k=None, offsets_q=cu_q.contiguous(), offsets_k=cu_k.contiguous(),
        max_q=min(max_q, query.shape[0]), max_k=min(max_k, key.shape[0]), tokens_q=query.shape[0],
        tokens_k=key.shape[0], heads=query.shape[1], kv_heads=key.shape[1],
        head_dim=_ragged(query.shape[2]), value_head_dim=_ragged(value.shape[2]),
    )


def decode_problem(query, key, value, bias, alibi_slopes, sinks, capacity, scale, window_left, softcap) -> Problem:
    """key and value are caches with their heads in front of their rows; lengths are the kernels' to look up."""
    return _problem(
        view(query), view(key), view(value), view(bias), None, alibi_slopes, sinks, None, scale, True, True,
        window_left, -1, softcap, 0.0, seqlens_k=None, offsets_q=None, offsets_k=None, max_q=query.shape[2],
        max_k=capacity, tokens_q=None, tokens_k=None, heads=query.shape[1], kv_heads=key.shape[1],
        head_dim=query.shape[3], value_head_dim=value.shape[3],
    )


def _problem(query, key, value, bias, mask, alibi_slopes, sinks, dropout_seed, scale, causal, bottom_right, window_left,
             window_right, softcap, dropout_p, *, seqlens_k, offsets_q, offsets_k, max_q, max_k, tokens_q, tokens_k,
             heads, kv_heads, head_dim, value_head_dim) -> Problem:
    transforms = bias is not None or alibi_slopes is not None or softcap > 0
    transforms = transforms or not _PLAIN_SCALES[0] <= abs(scale) <= _PLAIN_SCALES[1]
    logit_scale = 1.0 if transforms else abs(scale)
    product_scale = max(-_FLOAT32_MAX, min(_FLOAT32_MAX, scale / softcap if softcap > 0 else scale))
    drops = dropout_p > 0
    return Problem(
        query=query, key=key, value=value, bias=bias, mask=mask, seqlens_k=seqlens_k, offsets_q=offsets_q,
        offsets_k=offsets_k,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        alibi_batch=heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        sinks=None if sinks is None else sinks.float().contiguous(),
        dropout_seed=dropout_seed.contiguous() if drops else None,
        dropout_threshold=_ceil(dropout_p * 2.0**32) if drops else None,
        dropout_scale=(1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0) if drops else None,
        max_q=max_q, max_k=max_k, tokens_q=tokens_q, tokens_k=tokens_k, num_heads=heads,
        group=heads // max(kv_heads, 1), head_dim=head_dim, value_head_dim=value_head_dim,
        window_left=_side(window_left), window_right=0 if causal else _side(window_right),
        bottom_right=1 if bottom_right else None, transforms=1 if transforms else None,
        negates=1 if scale < 0 and not transforms else None, softcap=softcap if softcap > 0 else None,
        scale=product_scale, logit_scale=logit_scale, exp2_scale=logit_scale * LOG2E.value,
        lowest=_ZERO_FROM / logit_scale,
    )


def _ceil(x: float) -> int:
    """The smallest integer that is not below x: for whole words the same bound. 1.0 keeps none, by its scale of 0."""
    return min(-int(-x // 1), 2**32 - 1)


def _side(keys: int) -> int | None:
    return None if keys < 0 or keys >= _FARTHEST else keys


def excludes_pairs(problem: Problem) -> bool:
    """Whether pairs of tokens that exist may be excluded: attention_scores.some_excluded, for the host."""
    parts = (problem.window_left, problem.window_right, problem.mask, problem.bias)
    return any(part is not None for part in parts)


# ---- tiles ----


@dataclass(frozen=True)
class Tile:
    """How one kind of attention kernel is launched for heads of up to `columns` columns.

    Args:
        kind: "forward", "query" (its gradient), "key" (gradients of key and value), "bias", "decode".
        wide: of float32 tensors; None: of any.
        block_m, block_n: queries and keys of a tile.
        row: warps and stages, what spills, with their provenance. It spills in the walk that only sums with infinities
            or NaN take, and a little at edges: 16-bit forwards that exclude nothing spill nothing. "key" at 128 columns
            spills at edges and beside a bias: its two sums alone take half of the registers.
        kept_spills: what "key" spills in its launch over kept pairs, which ends at once where no sum was poisoned.
        shared_bytes: of shared memory that the architecture has at least.
        descriptors: whether tiles come by TMA, from sm_90 on, where tensors lie so that they can (takes_descriptor).
    """

    kind: str
    wide: bool | None
    columns: int
    block_m: int
    block_n: int
    row: Launch
    shared_bytes: int = 0
    descriptors: bool = False
    kept_spills: int = 0

    @property
    def kept_row(self) -> Launch:
        return replace(self.row, spill_bytes=self.kept_spills)

    def descriptor_of(self, t: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
        """Tiles of a [B, H, L, D] tensor for TMA, [1, 1, rows, columns]; None where they come by addresses."""
        if not (self.descriptors and takes_descriptor(t)):
            return None
        outer = zip(t.stride()[:3], t.shape[:3])
        strides = [stride if size > 1 else _TMA_BYTES // t.itemsize for stride, size in outer]
        return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, rows, columns])


_LARGEST = 227 << 10  # sm_90, sm_100
_LARGE = 160 << 10  # sm_80 too


def _hopper(
    kind, columns, block_m, block_n, num_warps, num_stages, spill_bytes=0, descriptors=False, kept_spills=0
) -> Tile:
    row = Launch(num_warps, num_stages, spill_bytes, NOT_MEASURED)
    return Tile(kind, False, columns, block_m, block_n, row, _LARGEST, descriptors, kept_spills)


def _large(kind, wide, columns, block_m, block_n, num_warps, num_stages, spill_bytes=0, kept_spills=0) -> Tile:
    row = Launch(num_warps, num_stages, spill_bytes, NOT_MEASURED)
    return Tile(kind, wide, columns, block_m, block_n, row, _LARGE, kept_spills=kept_spills)


def _small(kind, wide, columns, block_m, block_n, num_warps=4, num_stages=1, descriptors=False) -> Tile:
    row = Launch(num_warps, num_stages, 0, NOT_MEASURED)
    return Tile(kind, wide, columns, block_m, block_n, row, descriptors=descriptors)


# By shared memory, kind and dtype, ascending columns; the first that fits. Chosen by head size, dtype and architecture,
# never by lengths or batch: no bit may depend on them. Of the tiles that compile, those whose walk spills least; on
# sm_90, of these the ones whose walk over whole blocks has the fewest instructions per score, loads by TMA where that
# makes them fewer. wgmma wants 64 rows of the product for each four warps: 128 queries, in the "key" kernel 128 keys.
TILES = (
    _hopper("forward", 64, 128, 128, 8, 3, 160, True),
    _hopper("forward", 128, 128, 128, 8, 2, 656, True),
    _hopper("forward", 256, 128, 64, 8, 2, 2224, True),
    _hopper("query", 128, 128, 64, 8, 2, 496, True),
    _hopper("query", 256, 128, 32, 8, 2, 2112, True),
    _hopper("key", 64, 64, 128, 8, 2, 232, kept_spills=344),
    _hopper("key", 128, 64, 128, 8, 2, 1384, True, 2256),  # by TMA 528 and 1896
    _large("forward", False, 64, 128, 64, 8, 3),
    _large("forward", False, 128, 128, 64, 8, 3, 400),
    _large("forward", False, 256, 64, 64, 8, 2, 400),
    _large("forward", True, 64, 64, 32, 8, 1, 24),
    _large("forward", True, 128, 32, 32, 8, 1, 200),
    _large("forward", True, 256, 16, 32, 8, 1, 176),
    _large("query", False, 64, 128, 64, 8, 2, 160),
    _large("query", False, 128, 64, 32, 8, 2, 48),
    _large("query", False, 256, 32, 32, 8, 1),
    _large("query", True, 64, 16, 32, 8, 1, 16),
    _large("query", True, 128, 16, 32, 8, 1, 448),
    _large("query", True, 256, 16, 16, 8, 1, 544),
    _large("key", False, 64, 32, 128, 8, 2, 48),
    _large("key", False, 128, 32, 64, 8, 2, 160),
    _large("key", False, 256, 32, 32, 8, 1, 0, 296),
    _large("key", True, 64, 16, 32, 8, 1),
    _large("key", True, 128, 16, 16, 8, 1, 8),
    _large("key", True, 256, 16, 16, 8, 1, 368, 848),
    _large("bias", False, 128, 64, 64, 8, 2),
    _large("bias", False, 256, 32, 32, 8, 1, 96),
    _large("bias", True, 64, 32, 32, 8, 1),
    _large("bias", True, 128, 16, 32, 8, 1, 336),
    _large("bias", True, 256, 16, 16, 8, 1, 528),
    _large("decode", False, 128, 16, 64, 4, 2, 32),
    _large("decode", False, 256, 16, 32, 4, 2, 32),
    _large("decode", True, 64, 16, 32, 4, 1, 64),
    _large("decode", True, 256, 16, 16, 8, 1, 512),
    _small("forward", False, 64, 64, 64),
    _small("forward", False, 128, 64, 32),
    _small("forward", False, 256, 32, 32),
    _small("forward", True, 128, 32, 32, 8),
    _small("forward", True, 256, 16, 16, 8),
    _small("query", False, 64, 64, 32),
    _small("query", False, 128, 32, 32),
    _small("query", False, 256, 16, 32),
    _small("query", True, 256, 16, 16, 8),
    _small("key", False, 64, 32, 64),
    _small("key", False, 128, 32, 32),
    _small("key", False, 256, 16, 32),
    _small("key", True, 256, 16, 16, 8),
    _small("bias", False, 128, 32, 32),
    _small("bias", False, 256, 16, 32),
    _small("bias", True, 256, 16, 16, 8),
    _small("decode", False, 128, 16, 64),
    _small("decode", False, 256, 16, 32),
    _small("decode", True, 256, 16, 16, 8),
)
# An interpreted program takes as long for a large tile as for a small one.
INTERPRETED_TILES = (
    _small("forward", None, WIDEST, 64, 64, 1, 1, True),
    _small("query", None, WIDEST, 64, 64, 1, 1, True),
    _small("key", None, WIDEST, 32, 64, 1, 1, True),
    _small("bias", None, WIDEST, 64, 32, 1, 1),
    _small("decode", None, WIDEST, 16, 64, 1, 1),
)


def chunk_width(columns: int) -> int:
    """A power of two that holds the head's columns, or half of WIDEST where several chunks are needed."""
    return max(16, triton.next_power_of_2(columns)) if columns <= WIDEST else WIDEST // 2


def _ragged(columns: int) -> int | None:
    """The columns of a head whose last tile has more of them; None where tiles are whole."""
    return None if columns % chunk_width(columns) == 0 else columns


# Triton 3.9 cannot compile these for sm_100 where their products lie in tensor memory (a pass of its own fails, which
# hoists allocations), as they do for tiles of so many rows.
_NOT_IN_TENSOR_MEMORY = ("query", "key")
_TENSOR_MEMORY_ROWS = 64


def choose_tile(kind: str, wide: bool, columns: int, architecture: Architecture) -> Tile:
    """The tile of heads with so many columns; above WIDEST they are split."""

    in_tensor_memory = architecture.backend == "cuda" and 100 <= architecture.name < 120

    def fits(tile: Tile) -> bool:
        rows = max(tile.block_m, tile.block_n)
        if in_tensor_memory and kind in _NOT_IN_TENSOR_MEMORY and rows >= _TENSOR_MEMORY_ROWS:
            return False
        return (
            tile.kind == kind and tile.wide in (wide, None) and tile.columns >= min(columns, WIDEST)
            and tile.shared_bytes <= architecture.shared_bytes
        )  # fmt: skip

    return taken(next(tile for tile in (INTERPRETED_TILES if INTERPRETED else TILES) if fits(tile)))


def tile_options(kind: str, query: Tensor, value: Tensor, problem: Problem) -> tuple[dict, Tile]:
    """The compile-time arguments of a kernel, and the tile that they come from."""
    head_dim, value_head_dim = query.shape[-1], value.shape[-1]
    wide = query.dtype == torch.float32
    tile = choose_tile(kind, wide, max(head_dim, value_head_dim), architecture_of(query.device))
    head, values = chunk_width(head_dim), chunk_width(value_head_dim)
    options = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "HEAD": head, "HEAD_CHUNKS": triton.cdiv(head_dim, head),
        "VALUE": values, "VALUE_CHUNKS": triton.cdiv(value_head_dim, values), "EXACT": wide,
        "PRECISION": _precision(wide),
    }
    bias = problem.bias
    if bias is not None and (problem.mask is not None or bias.data.itemsize > query.itemsize):
        tile = replace(tile, row=replace(tile.row, num_stages=1))  # no room for two; no bit depends on it
    return options, tile


def _precision(wide: bool) -> str:
    """IEEE products of float32, but where the user has opted for TF32 in torch's own words."""
    return "tf32" if wide and torch.get_float32_matmul_precision() != "highest" else "ieee"
