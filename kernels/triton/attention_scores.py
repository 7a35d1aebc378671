"""What the attention kernels share: the problem, which pairs take part, what a score is, what a weight is.

    score = softcap(scale * q . k) + bias - slope * abs(query + offset - key)      weight = exp(score - reference)

A problem is a list of sequences: a dense batch is one per batch entry; a packed one is one per offset, whose tensors
have batch stride 0 and a first row. Optional parts are None, so that a kernel is compiled for what it is given.

Products take what is excluded times 0, which is NaN where that is not finite. A program whose sums are all finite has
met nothing of the kind; any other walks its blocks once more, with products over kept pairs alone (multiply_kept).

Policy: exclusion is a predicate, applied by select before the maximum and after the exponential. A score that nothing
is added to is kept without its scale: the difference from the row's reference is taken first, exactly where it matters,
and multiplied then, so that equal scores of any size weigh exactly 1. Tiles are [queries, keys] or its transpose:
`rows` and `columns` come as tensors that broadcast to the tile.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .exp import INTEGER, LN2_HI, LN2_LO, LOG2E, Q1, Q2, Q3, Q4, Q5
from .versions import INTERPRETED, fma, narrowed, widened

BIASED_INTEGER = tl.constexpr(INTEGER.value + 127.0)  # the low bits of a sum with it are a biased exponent
TANH_SMALL = tl.constexpr(0.625)  # below it Cephes' tanhf (Moshier), beyond it the exponential
TANH_LARGEST = tl.constexpr(44.0)  # e^88 is finite


class Strided(NamedTuple):
    """A tensor in memory: strides in elements, 0 for a dimension that it does not have."""

    data: Any
    batch: Any
    head: Any
    row: Any
    col: Any


class Matrix(NamedTuple):
    """Rows of one head of one sequence."""

    t: Any  # the Strided that they lie in
    batch: Any
    head: Any
    first_row: Any
    num_rows: Any
    num_columns: Any  # None: as many as whole tiles have
    tiles: Any  # a TMA descriptor of the same tensor, or None


class Problem(NamedTuple):
    """What every attention kernel is given. None is a feature that is not in use."""

    query: Any  # Strided, as are key, value, bias and mask
    key: Any
    value: Any
    bias: Any  # [B, Hq, Lq, Lk]
    mask: Any  # [B, Hq, Lq, Lk], uint8
    seqlens_k: Any  # [B]
    offsets_q: Any  # [N + 1]
    offsets_k: Any
    alibi_slopes: Any  # float32 [Hq], or [B, Hq] with alibi_batch = Hq
    alibi_batch: Any
    sinks: Any  # float32 [Hq]
    dropout_seed: Any  # int64 (seed, offset)
    dropout_threshold: Any  # the smallest word that is kept
    dropout_scale: Any  # 1 / (1 - p), 0 for p = 1
    max_q: Any  # Lq, or the longest of all sequences
    max_k: Any
    tokens_q: Any  # of all sequences together
    tokens_k: Any
    num_heads: Any
    group: Any  # query heads per key head
    head_dim: Any  # None where tiles have as many columns
    value_head_dim: Any
    window_left: Any
    window_right: Any
    bottom_right: Any  # None or 1
    transforms: Any  # None or 1: a score is more than the product, and has its scale
    negates: Any  # None or 1: a negative scale without transforms
    softcap: Any
    scale: Any  # of the product, or scale / softcap
    logit_scale: Any  # what a score has still to be multiplied by
    exp2_scale: Any  # logit_scale * log2(e)
    lowest: Any  # differences below it weigh 0


class Sequence(NamedTuple):
    """One sequence, as the kernels look it up."""

    first_q: Any
    first_k: Any
    len_q: Any
    len_k: Any
    diagonal: Any  # the key opposite query 0


# ---- where things are ----


@triton.jit
def sequence_of(p, index):
    """Lengths and first rows of one sequence. Whatever the tables hold, rows stay within the tensors."""
    first_q = tl.full((), 0, tl.int64)
    first_k = tl.full((), 0, tl.int64)
    len_q = tl.cast(p.max_q, tl.int32)
    len_k = tl.cast(p.max_k, tl.int32)
    if p.offsets_q is not None:
        tokens_q = tl.cast(p.tokens_q, tl.int64)
        tokens_k = tl.cast(p.tokens_k, tl.int64)
        first_q = clamp(tl.load(p.offsets_q + index).to(tl.int64), 0, tokens_q)
        first_k = clamp(tl.load(p.offsets_k + index).to(tl.int64), 0, tokens_k)
        stop_q = clamp(tl.load(p.offsets_q + index + 1).to(tl.int64), first_q, tokens_q)
        stop_k = clamp(tl.load(p.offsets_k + index + 1).to(tl.int64), first_k, tokens_k)
        len_q = tl.minimum(stop_q - first_q, len_q.to(tl.int64)).to(tl.int32)
        len_k = tl.minimum(stop_k - first_k, len_k.to(tl.int64)).to(tl.int32)
    if p.seqlens_k is not None:
        len_k = clamp(tl.load(p.seqlens_k + index).to(tl.int64), 0, len_k.to(tl.int64)).to(tl.int32)
    diagonal = tl.full((), 0, tl.int32)
    if p.bottom_right is not None:
        diagonal = len_k - len_q
    return Sequence(first_q, first_k, len_q, len_k, diagonal)


@triton.jit
def clamp(x, lowest, highest):
    return tl.minimum(tl.maximum(x, lowest), highest)


@triton.jit
def base_of(t, batch, head, first_row):
    """Address of row `first_row` of one head. 64 bits: rows and heads may lie 2^31 elements apart."""
    batch, head = tl.cast(batch, tl.int64), tl.cast(head, tl.int64)
    return t.data + batch * t.batch + head * t.head + first_row * t.row


@triton.jit
def _tile_of(m, row, ROWS: tl.constexpr, column, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """(addresses, which of them exist) of a tile that begins at (row, column). WHOLE: all its rows exist.

    What the blocks of a walk differ in is added to one scalar, so that a step does not compute every address anew.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    base = base_of(m.t, m.batch, m.head, m.first_row + row) + tl.cast(column, tl.int64) * m.t.col
    exists = tl.full((ROWS, COLUMNS), True, tl.int1)
    if not WHOLE:
        exists = exists & (row + rows < m.num_rows)[:, None]
    if m.num_columns is not None:
        exists = exists & (column + columns < m.num_columns)[None, :]
    return base + (rows.to(tl.int64)[:, None] * m.t.row + columns.to(tl.int64)[None, :] * m.t.col), exists


@triton.jit
def load_rows(m, row, ROWS: tl.constexpr, column, COLUMNS: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of a matrix; 0 beyond it. A descriptor knows where the tensor ends, not where a sequence does: it takes
    the tiles whose rows exist."""
    if WHOLE and m.tiles is not None:
        at = [m.batch, m.head, (m.first_row + row).to(tl.int32), column]
        return tl.reshape(m.tiles.load(at), (ROWS, COLUMNS))
    addresses, exists = _tile_of(m, row, ROWS, column, COLUMNS, WHOLE)
    return tl.load(addresses, mask=exists, other=0.0)


@triton.jit
def store_rows(m, row, column, tile):
    addresses, exists = _tile_of(m, row, tile.shape[0], column, tile.shape[1], False)
    tl.store(addresses, narrowed(tile, m.t.data.dtype.element_ty), mask=exists)


@triton.jit
def multiply(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b in float32. The interpreter would multiply the bits of bfloat16."""
    if INTERPRETED:
        return tl.dot(widened(a), widened(b), accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def products(tile, a, row, ROWS: tl.constexpr, b, column, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
             CHUNKS: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr):
    """a[rows] @ b[columns]^T, both of them rows of matrices. With one chunk, `tile` is that of a, already loaded.
    WHOLE: all rows of b exist."""
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        if CHUNKS > 1:
            tile = load_rows(a, row, ROWS, chunk * DEPTH, DEPTH, False)
        other = load_rows(b, column, COLUMNS, chunk * DEPTH, DEPTH, WHOLE)
        result = multiply(tile, tl.trans(other), result, PRECISION)
    return result


# ---- which keys ----


@triton.jit
def keys_of_rows(p, s, row, row_stop, BLOCK_N: tl.constexpr):
    """Blocks of keys for rows [row, row_stop): (start, full_start, full_stop, stop).

    Between full_start and full_stop every row takes every key, as far as can be told without a mask or bias. All but
    stop are multiples of BLOCK_N, counted from the sequence's own key 0: a row has the same bits whatever was skipped.
    """
    stop = s.len_k
    full_stop = s.len_k
    if p.window_right is not None:
        stop = clamp(row_stop + s.diagonal + p.window_right, 0, s.len_k)
        full_stop = clamp(row + s.diagonal + p.window_right + 1, 0, s.len_k)
    start = tl.full((), 0, tl.int32)
    full_start = start
    if p.window_left is not None:
        start = clamp(row + s.diagonal - p.window_left, 0, s.len_k) // BLOCK_N * BLOCK_N
        full_start = clamp(row_stop - 1 + s.diagonal - p.window_left, 0, s.len_k)
        full_start = (full_start + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_stop = tl.maximum(full_stop // BLOCK_N * BLOCK_N, full_start)
    return start, full_start, full_stop, stop


@triton.jit
def rows_of_keys(p, s, key, key_stop, BLOCK_M: tl.constexpr):
    """The other way round: blocks of rows that take keys [key, key_stop), in the same order."""
    stop = s.len_q
    full_stop = s.len_q
    start = tl.full((), 0, tl.int32)
    full_start = start
    if p.window_right is not None:
        start = clamp(key - s.diagonal - p.window_right, 0, s.len_q) // BLOCK_M * BLOCK_M
        full_start = clamp(key_stop - 1 - s.diagonal - p.window_right, 0, s.len_q)
        full_start = (full_start + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if p.window_left is not None:
        stop = clamp(key_stop - s.diagonal + p.window_left, 0, s.len_q)
        full_stop = clamp(key - s.diagonal + p.window_left + 1, 0, s.len_q)
    full_stop = tl.maximum(full_stop // BLOCK_M * BLOCK_M, full_start)
    return start, full_start, full_stop, stop


# ---- from product to score ----


@triton.jit
def selects(p, EDGES: tl.constexpr):
    """Whether a walk excludes pairs by select: for a length, a window or a mask. A bias of -inf need not be looked for,
    it is added; what is not finite in spite of it sends the program on the walk over kept pairs, where all select."""
    SELECTS: tl.constexpr = EDGES or (p.mask is not None)
    return SELECTS


@triton.jit
def finish_scores(p, s, product, batch, head, rows, columns, EDGES: tl.constexpr):
    """(scores, keep, slope of the softcap) of a tile of products q . k.

    EDGES: some pair may be excluded by length or window. Where nothing selects, keep is not looked at.
    """
    keep = columns >= 0
    if EDGES:
        keep = (columns < s.len_k) & (rows < s.len_q)
        if p.window_right is not None:
            keep = keep & (columns <= rows + (s.diagonal + p.window_right))
        if p.window_left is not None:
            keep = keep & (columns >= rows + (s.diagonal - p.window_left))
    slope = 1.0
    score = product
    if p.transforms is None:
        if p.negates is not None:
            score = -product
    elif p.softcap is not None:
        score, slope = tanh_and_slope(product * p.scale)
        score = score * p.softcap
    elif p.bias is None:
        score = product * p.scale
    if (p.mask is not None) or (p.bias is not None):
        inside = rows < s.len_q
        if EDGES:
            inside = inside & (columns < s.len_k)
        row64, column64 = rows.to(tl.int64), columns.to(tl.int64)
        if p.mask is not None:
            addresses = base_of(p.mask, batch, head, 0) + row64 * p.mask.row + column64 * p.mask.col
            keep = keep & (tl.load(addresses, mask=inside, other=0) != 0)
        if p.bias is not None:
            addresses = base_of(p.bias, batch, head, 0) + row64 * p.bias.row + column64 * p.bias.col
            bias = widened(tl.load(addresses, mask=inside, other=0.0))
            if selects(p, EDGES):
                keep = keep & (bias != float("-inf"))
            if p.softcap is not None:
                score = score + bias
            else:
                score = fma(product, p.scale, bias)
    if p.alibi_slopes is not None:
        score = score - alibi_slope(p, batch, head) * distance(s, rows, columns)
    return score, keep, slope


@triton.jit
def alibi_slope(p, batch, head):
    return tl.load(p.alibi_slopes + batch * p.alibi_batch + head)


@triton.jit
def distance(s, rows, columns):
    return tl.abs(rows + s.diagonal - columns).to(tl.float32)


@triton.jit
def tanh_and_slope(x):
    """tanh and its derivative, each without cancellation: with u = 2 / (e^2x + 1), 1 - u and u (2 - u)."""
    square = x * x
    size = tl.abs(x)
    q = fma(square, -5.70498872745e-3, 2.06390887954e-2)
    q = fma(q, square, -5.37397155531e-2)
    q = fma(q, square, 1.33314422036e-1)
    q = fma(q, square, -3.33332819422e-1)
    near = fma(x * square, q, x)
    in_range = tl.where(size > TANH_LARGEST, TANH_LARGEST, size)  # in this order a NaN is kept
    u = 2.0 / (exp_scaled(in_range + in_range, 1.0, LOG2E, -88.0, True) + 1.0)
    far = tl.where(x < 0, u - 1.0, 1.0 - u)
    small = size < TANH_SMALL
    return tl.where(small, near, far), tl.where(small, fma(-near, near, 1.0), u * (2.0 - u))


# ---- from score to weight ----


@triton.jit
def exp_scaled(x, scale, exp2_scale, lowest, EXACT: tl.constexpr):
    """exp(scale * x), a NaN kept. EXACT: <= 1 ULP, 0 below lowest = -88 / scale; else what the GPU's ex2 gives."""
    if EXACT:
        x = tl.where(x < lowest, lowest, x)
        shifted = fma(x, exp2_scale, BIASED_INTEGER)
        n = shifted - BIASED_INTEGER
        r = fma(-n, LN2_LO, fma(x, scale, n * -LN2_HI))  # n * ln2_hi is exact
        q = fma(fma(fma(fma(r, Q5, Q4), r, Q3), r, Q2), r, Q1)
        q = fma(r * r, q, r) + 1.0
        return q * (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    else:
        return tl.exp2(x * exp2_scale)


@triton.jit
def weigh(p, difference, EXACT: tl.constexpr):
    """exp(logit_scale * difference), for a score's difference from its row's reference."""
    return exp_scaled(difference, p.logit_scale, p.exp2_scale, p.lowest, EXACT)


@triton.jit
def kept_draws(p, batch, head, rows, key, BLOCK_N: tl.constexpr):
    """Which weights of [M, BLOCK_N] dropout keeps: one Philox4x32-10 word per weight (CONTRACT section 3).

    Counter (key / 4, query, batch * H + head, offset), word key % 4. rows is [M], key the first one, a multiple of 4.
    """
    seed = tl.load(p.dropout_seed)
    offset = tl.load(p.dropout_seed + 1).to(tl.int32)
    groups: tl.constexpr = BLOCK_N // 4
    counter = (key // 4 + tl.arange(0, groups))[None, :] + tl.zeros_like(rows)[:, None]
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = tl.philox(seed, counter, rows[:, None] + zero, zero + (batch * p.num_heads + head), zero + offset)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], BLOCK_N))
    return words.to(tl.int64) >= p.dropout_threshold


@triton.jit
def finish_rows(p, result, maximum, total, head):
    """(output, lse) of rows from weighted sums, largest scores and sums of weights; the head's sink joins them here."""
    top = tl.where(maximum == float("-inf"), maximum, maximum * p.logit_scale)
    if p.sinks is not None:
        sink = tl.load(p.sinks + head) + tl.zeros_like(top)
        higher = tl.maximum(top, sink)
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        factor = tl.exp(top - reference)
        total = total * factor + tl.exp(sink - reference)
        result = tl.where((top == float("-inf"))[:, None], 0.0, result * factor[:, None])
        top = higher
    if p.dropout_seed is not None:
        result = result * p.dropout_scale
    nothing = total == 0  # the largest weight of a row is 1, so only a row without keys sums to 0
    divisor = tl.where(nothing, 1.0, total)
    return result / divisor[:, None], tl.where(nothing, float("-inf"), top + tl.log(divisor))


# ---- sums over kept pairs ----


@triton.jit
def some_excluded(p):
    """Whether pairs of tokens that exist may be excluded: by a window, causality, a mask or a bias."""
    EXCLUDED: tl.constexpr = (
        (p.window_left is not None) or (p.window_right is not None) or (p.mask is not None) or (p.bias is not None)
    )
    return EXCLUDED


@triton.jit
def all_finite(tile):
    """Whether a tile holds neither infinity nor NaN."""
    return tl.max(tl.max((~(tl.abs(tile) < float("inf"))).to(tl.int32), 1), 0) == 0


@triton.jit
def multiply_kept(weights, keep, values, accumulator, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """accumulator + weights @ values over the kept pairs: what is excluded may hold anything, 0 * NaN does not enter.

    weights are 0 where not kept. The infinities and NaNs that a row has kept pairs with are counted apart, and give
    what IEEE gives for their sum: weights of either sign with infinities count 1, or 1 and -1 for the infinity that
    comes of them; a NaN, or a kept weight of 0 with an infinity, counts 256 or more.
    """
    wide = widened(values)
    finite = tl.abs(wide) < float("inf")
    result = multiply(narrowed(weights, TYPE), narrowed(tl.where(finite, wide, 0.0), TYPE), accumulator, PRECISION)
    signs = tl.where(weights > 0, 1.0, tl.where(weights < 0, -1.0, 0.0)).to(tl.bfloat16)
    ups = tl.where(wide == float("inf"), 1.0, tl.where(wide == float("-inf"), -1.0, 0.0)).to(tl.bfloat16)
    balance = multiply(signs, ups, tl.zeros_like(result), "ieee")
    pairs = tl.where(keep, tl.where(tl.abs(weights) > 0, 1.0, 256.0), 0.0).to(tl.bfloat16)
    kinds = tl.where(finite, 0.0, tl.where(wide != wide, 256.0, 1.0)).to(tl.bfloat16)
    count = multiply(pairs, kinds, tl.zeros_like(result), "ieee")
    special = tl.where(tl.abs(balance) == count, balance * float("inf"), float("nan"))
    return tl.where(count == 0, result, result + special)
