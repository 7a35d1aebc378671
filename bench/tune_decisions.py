"""What there is to tune in kernels/triton: every row of its tables, what may stand there, and work to judge it by.

A candidate differs from its row by a factor of two in one of its numbers, or in two that keep the work of a warp: who
pastes a winner and runs again goes on from there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from transfuse.kernels.triton import (
    attention,
    attention_backward,
    attention_decode,
    attention_problem,
    gelu,
    layer_norm,
    masked_softmax,
    norm,
    rms_norm,
    rotary,
    rows,
)

NORMS = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm")
WITH_LINES = (*NORMS, "gelu", "masked_softmax")
ATTENTION = ("attention", "varlen_attention")
MOST_WARPS = 16
MOST_STAGES = 4
LEAST_BLOCK = 16  # of a matrix product
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """How large the work is.

    Args:
        elements: of one operand of a row kernel.
        heads, length: of attention, all sequences together.
        cache: keys of a sequence that is decoded.
    """

    elements: int = 1 << 25
    heads: int = 64
    length: int = 2048
    cache: int = 16384


@dataclass(frozen=True)
class Work:
    """One call of an op.

    Args:
        name: op, direction, dtype.
        dtype: of its tensors.
        prepare: (Source) -> a function without arguments that runs the op and returns its results.
        cost: bytes that must move, or operations, of the kernels that the row launches.
        terms: length of the longest sum behind one result; 0 where a result is no sum, and so has the same bits in
            every launch.
    """

    name: str
    dtype: torch.dtype
    prepare: Callable
    cost: int
    terms: int


@dataclass(frozen=True)
class Decision:
    """One row of a launch table.

    Args:
        place: "norm.py: FORWARD_TILES", under kernels/triton.
        present: the row.
        candidates: what may stand in its place.
        works: what it is judged by; they are timed together.
        ops: whose front prints it.
        unit: of the figure: "GB/s" or "TFLOP/s".
    """

    place: str
    present: object
    candidates: tuple
    works: tuple[Work, ...]
    ops: tuple[str, ...]
    unit: str = "GB/s"

    @property
    def name(self):
        return f"{self.place}, {_key(self.present)}"


def _key(row):
    if isinstance(row, attention_problem.Tile):
        return f"{row.kind} {'float32' if row.wide else '16 bits'} to {row.columns} columns"
    return f"{row.cols} columns"


class Source:
    """Draws operands on a device, the same ones every time; without data on "meta"."""

    def __init__(self, device):
        self.device, self.seed = torch.device(device), 0

    def __call__(self, *shape, dtype):
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        self.seed += 1
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype)

    def lengths(self, batch, length):
        return torch.full((batch,), length, dtype=torch.int32, device=self.device)


# ---- candidates ----


def _launches(launch, factor, stages):
    """Other numbers of warps, and of stages where the kernel has a loop of loads."""
    for num_warps in (launch.num_warps // factor, launch.num_warps * factor):
        if 1 <= num_warps <= MOST_WARPS:
            yield {"num_warps": num_warps}
    for num_stages in (launch.num_stages - 1, launch.num_stages + 1) if stages else ():
        if 1 <= num_stages <= MOST_STAGES:
            yield {"num_stages": num_stages}


def row_candidates(tile, *, rows=True, cols=False, stages=False):
    """Neighbours of a RowTile; `cols` where they are a choice and no key of the table."""
    changes = [({}, launch) for launch in _launches(tile.launch, 2, stages)]
    if rows:
        changes += [({"rows": n}, {}) for n in (tile.rows // 2, tile.rows * 2) if n >= 1]
        changes += [
            ({"rows": n}, {"num_warps": w})
            for n, w in ((tile.rows // 2, tile.launch.num_warps // 2), (tile.rows * 2, tile.launch.num_warps * 2))
            if n >= 1 and 1 <= w <= MOST_WARPS
        ]
    if cols:
        changes += [({"cols": n}, {}) for n in (tile.cols // 2, tile.cols * 2) if n >= LEAST_BLOCK]
    return tuple(replace(tile, launch=_unmeasured(tile.launch, launch), **own) for own, launch in changes)


def tile_candidates(tile):
    """Neighbours of a Tile of attention."""
    changes = [({}, launch) for launch in _launches(tile.row, 2, True)]
    for side in ("block_m", "block_n"):
        block = getattr(tile, side)
        changes += [({side: n}, {}) for n in (block // 2, block * 2) if n >= LEAST_BLOCK]
    warps = tile.row.num_warps
    changes += [
        ({"block_m": m}, {"num_warps": w})
        for m, w in ((tile.block_m // 2, warps // 2), (tile.block_m * 2, warps * 2))
        if m >= LEAST_BLOCK and 1 <= w <= MOST_WARPS
    ]
    return tuple(replace(tile, row=_unmeasured(tile.row, launch), **own) for own, launch in changes)


def _unmeasured(launch, changes):
    """A launch row of its own (rows are told by identity), of which nothing is known yet."""
    return replace(launch, **changes, spill_bytes=0, measured=rows.Launch.measured)


# ---- work of the row ops ----


def _tensors(count, size, dtype):
    return count * size * dtype.itemsize


def _norm_forward(op, dtype, cols, sizes):
    run = getattr(layer_norm if "layer" in op else rms_norm, f"{op}_forward")
    lines = max(1, sizes.elements // cols)
    added, biased = op.startswith("add_"), "layer" in op

    def prepare(source):
        x = [source(lines, cols, dtype=dtype) for _ in range(2 if added else 1)]
        parameters = [source(cols, dtype=dtype) for _ in range(2 if biased else 1)]
        return lambda: run(*x, *parameters, 1, EPS)

    return Work(f"{op} forward", dtype, prepare, _tensors(4 if added else 2, lines * cols, dtype), cols)


def _norm_backward(op, dtype, cols, sizes):
    lines = max(1, sizes.elements // cols)

    def prepare(source):
        x, grad, past = (source(lines, cols, dtype=dtype) for _ in range(3))
        past = past if op.startswith("add_") else None
        weight = source(cols, dtype=dtype)
        if "layer" in op:
            return lambda: layer_norm.layer_norm_backward(grad, past, x, weight, weight, 1, EPS, True, True, True)
        return lambda: rms_norm.rms_norm_backward(grad, past, x, weight, 1, EPS, True, True)

    count = 4 if op.startswith("add_") else 3
    return Work(f"{op} backward", dtype, prepare, _tensors(count, lines * cols, dtype), max(lines, cols))


# Each op once, each dtype on both kinds of norm.
_NORM_DTYPES = (
    ("layer_norm", torch.float32), ("add_layer_norm", torch.bfloat16), ("rms_norm", torch.bfloat16),
    ("add_rms_norm", torch.float32),
)  # fmt: skip
_BOTH = (torch.float32, torch.bfloat16)


def _softmax_shape(cols, sizes):
    return 2, max(1, sizes.elements // cols // 2), cols


def _softmax_forward(dtype, cols, sizes):
    """float32 with a boolean mask of each sequence, 16 bits with an additive one for all."""
    shape = _softmax_shape(cols, sizes)

    def prepare(source):
        x = source(*shape, dtype=dtype)
        if dtype == torch.float32:
            mask = (source(shape[0], 1, cols, dtype=dtype) < 1).expand(shape)
        else:
            mask = source(*shape[1:], dtype=dtype).expand(shape)
        return lambda: (masked_softmax.masked_softmax_forward(x, mask, 0.125, False, False),)

    size = shape[0] * shape[1] * cols
    moved = _tensors(2, size, dtype) + (0 if dtype == torch.float32 else _tensors(1, size // shape[0], dtype))
    return Work("masked_softmax forward", dtype, prepare, moved, cols)


def _softmax_backward(dtype, cols, sizes):
    shape = _softmax_shape(cols, sizes)

    def prepare(source):
        weights, grad = source(*shape, dtype=dtype).softmax(-1), source(*shape, dtype=dtype)
        return lambda: (masked_softmax.masked_softmax_backward(grad, weights, 0.125),)

    return Work("masked_softmax backward", dtype, prepare, _tensors(3, shape[0] * shape[1] * cols, dtype), cols)


def _softmax_mask(dtype, cols, sizes, whole):
    """The gradient of a mask that a batch shares; not `whole`: one for all keys of a row, too."""
    batch, heads = 16, 12
    queries = max(1, sizes.elements // cols // batch // heads)

    def prepare(source):
        weights = source(batch, heads, queries, cols, dtype=dtype).softmax(-1)
        grad = source(batch, heads, queries, cols, dtype=dtype)
        mask = source(1, 1, queries, cols if whole else 1, dtype=torch.float32)
        return lambda: (masked_softmax.masked_softmax_mask_backward(grad, weights, mask),)

    size = batch * heads * queries * cols
    moved = _tensors(2, size, dtype) if whole else _tensors(1, queries * cols, torch.float32)
    return Work("masked_softmax mask gradient", dtype, prepare, moved, max(cols, batch * heads))


def _gelu(dtype, direction, with_bias, sizes):
    columns = 3072
    lines = max(1, sizes.elements // columns)
    back = direction == "backward"

    def prepare(source):
        x, grad = (source(lines, columns, dtype=dtype) for _ in range(2))
        bias = source(columns, dtype=dtype) if with_bias else None
        if back:
            return lambda: gelu.gelu_backward(grad, x, bias, with_bias, with_bias)
        return lambda: (gelu.gelu_forward(x, bias, with_bias),)

    moved = _tensors(3 if back else 2, lines * columns, dtype)
    words = " with bias" if with_bias else ""
    return Work(f"gelu {direction}{words}", dtype, prepare, moved, lines if back and with_bias else 0)


def _rotary(dtype, direction, sizes):
    heads, head_dim, batch = 16, 128, 4
    length = max(1, sizes.elements // (batch * heads * head_dim))

    def prepare(source):
        x, grad = (source(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2) for _ in range(2))
        cos, sin = (source(length, head_dim // 2, dtype=dtype) for _ in range(2))
        if direction == "forward":
            return lambda: (rotary.rotary_forward(x, cos, sin, False, False),)
        return lambda: rotary.rotary_backward(grad, x, cos, False, False)

    moved = _tensors(2, batch * length * heads * head_dim, dtype)
    return Work(f"rotary {direction}", dtype, prepare, moved, 0 if direction == "forward" else batch * heads)


def _lines(cols, sizes):
    count = 512

    def prepare(source):
        lines, total = source(count, cols, dtype=torch.float32), source(cols, dtype=torch.float32)

        def run():
            rows.add_lines(lines, total)
            return (total.clone(),)

        return run

    return Work(f"{count} lines of {cols}", torch.float32, prepare, _tensors(1, count * cols, torch.float32), count)


def _row_decisions(sizes):
    for place, tiles, work, directions in (
        ("norm.py: FORWARD_TILES", norm.FORWARD_TILES, _norm_forward, False),
        ("norm.py: GRADIENT_TILES", norm.GRADIENT_TILES, _norm_backward, True),
        ("norm.py: FORWARD_STREAMED", (norm.FORWARD_STREAMED,), _norm_forward, False),
        ("norm.py: GRADIENT_STREAMED", (norm.GRADIENT_STREAMED,), _norm_backward, False),
        ("norm.py: STREAMED_LINES", (norm.STREAMED_LINES,), _norm_backward, True),
    ):
        streamed = "STREAMED" in place
        for tile in tiles:
            candidates = row_candidates(
                tile, rows=not streamed or directions, cols=streamed, stages=streamed or directions
            )
            cols = _LONG if streamed else tile.cols
            works = tuple(work(op, dtype, cols, sizes) for op, dtype in _NORM_DTYPES)
            yield Decision(place, tile, candidates, works, NORMS)
    for place, tiles, work in (
        ("masked_softmax.py: FORWARD_TILES", masked_softmax.FORWARD_TILES, _softmax_forward),
        ("masked_softmax.py: GRADIENT_TILES", masked_softmax.GRADIENT_TILES, _softmax_backward),
        ("masked_softmax.py: FORWARD_STREAMED", (masked_softmax.FORWARD_STREAMED,), _softmax_forward),
        ("masked_softmax.py: GRADIENT_STREAMED", (masked_softmax.GRADIENT_STREAMED,), _softmax_backward),
    ):
        streamed = "STREAMED" in place
        for tile in tiles:
            candidates = row_candidates(tile, rows=not streamed, cols=streamed, stages=streamed)
            works = tuple(work(dtype, _LONG if streamed else tile.cols, sizes) for dtype in _BOTH)
            yield Decision(place, tile, candidates, works, ("masked_softmax",))
    for name, whole in (("MASK_TILE", True), ("MASK_KEYS", False)):
        tile = getattr(masked_softmax, name)
        works = tuple(_softmax_mask(dtype, 1024, sizes, whole) for dtype in (_BOTH if whole else _BOTH[:1]))
        candidates = row_candidates(tile, rows=whole, cols=True, stages=True)
        yield Decision(f"masked_softmax.py: {name}", tile, candidates, works, ("masked_softmax",))
    for name, direction in (("FORWARD_TILE", "forward"), ("BACKWARD_TILE", "backward")):
        tile = getattr(gelu, name)
        works = (_gelu(torch.float32, direction, False, sizes), _gelu(torch.bfloat16, direction, True, sizes))
        candidates = row_candidates(tile, cols=True, stages=direction == "backward")
        yield Decision(f"gelu.py: {name}", tile, candidates, works, ("gelu",))
        tile = getattr(rotary, name)
        works = tuple(_rotary(dtype, direction, sizes) for dtype in _BOTH)
        candidates = row_candidates(tile, stages=direction == "backward")
        yield Decision(f"rotary.py: {name}", tile, candidates, works, ("rotary",))
    works = tuple(_lines(cols, sizes) for cols in (768, 4096))
    yield Decision("rows.py: LINES", rows.LINES, row_candidates(rows.LINES, cols=True, stages=True), works, WITH_LINES)


_LONG = 16384  # columns of a row that no tile holds


# ---- work of attention ----

_NONE = (None,) * 4  # seqlens_k, alibi_slopes, sinks, dropout_seed
_PRODUCTS = {"forward": 2, "query": 3, "key": 4, "bias": 2}  # of every pair of a query and a key


def _attention(kind, dtype, head_dim, causal, sizes):
    heads, length = min(8, sizes.heads), sizes.length
    batch = max(2, sizes.heads // heads)  # so that there is something to sum a bias' gradient over
    numbers = (head_dim**-0.5, causal, False, -1, -1, 0.0, 0.0)

    def prepare(source):
        query, key, value, grad = (
            source(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2) for _ in range(4)
        )
        bias = None
        if kind == "bias":  # the rest is whole_bias, which the kernel of key and value writes
            bias = source(1, heads, length, length, dtype=dtype).expand(batch, -1, -1, -1)

        def forward():
            return attention.attention_forward(query, key, value, bias, None, *_NONE, *numbers)

        if kind == "forward":
            return forward
        if source.device.type == "meta":
            output, lse = query, source(batch, heads, length, dtype=torch.float32)
        else:
            output, lse = forward()
        wants = ([1, heads, length, length] if bias is not None else [1] * 4, bias is not None, False, False)
        return lambda: attention_backward.attention_backward(
            grad, None, query, key, value, output, lse, bias, None, *_NONE, *numbers, *wants
        )

    pairs = batch * heads * length * length // (2 if causal else 1)
    flops = 2 * _PRODUCTS[kind] * pairs * head_dim
    return Work(f"attention {kind}{' causal' if causal else ''}", dtype, prepare, flops, max(length, head_dim))


def _decode(dtype, head_dim, group, sizes):
    batch, kv_heads, length = 8, 8, sizes.cache

    def prepare(source):
        query = source(batch, kv_heads * group, 1, head_dim, dtype=dtype)
        key, value = (source(batch, kv_heads, length, head_dim, dtype=dtype) for _ in range(2))
        lengths = source.lengths(batch, length)
        return lambda: attention_decode.decode_attention_forward(
            query, key, value, lengths, None, None, None, None, 0, head_dim**-0.5, -1, 0.0
        )

    moved = _tensors(2, batch * kv_heads * length * head_dim, dtype)
    return Work(f"decode of {group} heads to one", dtype, prepare, moved, length)


def _attention_decisions(architecture, sizes):
    """The tiles that this architecture takes."""
    for kind in ("forward", "query", "key", "bias", "decode"):
        for wide in (False, True):
            tiles = [attention_problem.choose_tile(kind, wide, columns, architecture) for columns in (64, 128, 256)]
            dtype = torch.float32 if wide else torch.bfloat16
            for tile in {id(tile): tile for tile in tiles}.values():
                if kind == "decode":
                    works = tuple(_decode(dtype, tile.columns, group, sizes) for group in (1, 8))
                else:
                    works = tuple(_attention(kind, dtype, tile.columns, causal, sizes) for causal in (False, True))
                yield Decision(
                    "attention_problem.py: TILES", tile, tile_candidates(tile), works,
                    ("decode_attention",) if kind == "decode" else ATTENTION, "GB/s" if kind == "decode" else "TFLOP/s",
                )  # fmt: skip


def decisions(ops, architecture, sizes=Sizes()):
    """Every decision that a launch of these ops reads on that architecture."""
    found = [*_row_decisions(sizes), *_attention_decisions(architecture, sizes)]
    return [decision for decision in found if set(decision.ops) & set(ops)]
