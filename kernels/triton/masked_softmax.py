"""Masked softmax of rows in Triton: y_j = exp(s_j - m) / sum, s = scale * x + mask over the valid keys, 0 elsewhere.

A score is carried as two floats, so that neither scale * x, nor the mask's addition, nor s - m loses a bit that exp
would magnify: at logits around 100 a rounded score alone costs 60 ULP of its weight. Weights are summed in float over a
few neighbours and in double over those sums; the quotient is one rounding.

Rows by their largest score m:  no valid key: 0.  m NaN or infinite: NaN at the valid keys.  |m| > 2^20: the second
float of the largest score decides too.

Policy: as rows.py says; rows longer than a program holds are read three times.
"""

import torch
import triton
import triton.language as tl

from .exact import (
    any_true,
    is_finite,
    quick_two_sum,
    row_max_or_nan,
    row_sum,
    split,
    to_pair,
    two_product,
    two_sum,
)
from .exp import exp_nonpositive
from .launch import Launch, architecture_of, launch, taken
from .rows import ALIGNED_ELEMENTS, STREAMED, RowTile, add_lines, is_aligned, on_boundary, row_tile, with_rows
from .versions import fma, narrowed, widened

_INFINITY = tl.constexpr(float("inf"))
_REST_COUNTS = tl.constexpr(2.0**20)  # below, the largest score's residual is no more than another's
_MOST_RESIDUAL = tl.constexpr(2.0**-12)  # only a weight of 0 has one beyond, or one that is not finite

# ---- scores ----


@triton.jit
def _digits(index, d0, s0, d1, s1, d2, s2, d3, s3, DIMS: tl.constexpr):
    """The offset of an index whose digits, the last one first, have sizes d and strides s."""
    offset = tl.zeros_like(index)
    if DIMS > 0:
        offset += index % d0 * s0
        index = index // d0
    if DIMS > 1:
        offset += index % d1 * s1
        index = index // d1
    if DIMS > 2:
        offset += index % d2 * s2
        index = index // d2
    if DIMS > 3:
        offset += index % d3 * s3
    return offset


@triton.jit
def _visible(row, keys, queries, causal_offset, CAUSAL: tl.constexpr):
    """How many of its first keys a row may see; [R]."""
    length = tl.zeros_like(row) + keys
    if CAUSAL:
        length = tl.minimum(tl.maximum(row % queries + causal_offset + 1, 0), length)
    return length


@triton.jit
def _mask_rows(mask, row, d0, s0, d1, s1, d2, s2, d3, s3, DIMS: tl.constexpr, WHOLE_MASK: tl.constexpr):
    """Where the mask of each row begins; [R, 1]."""
    offset = _digits(row, d0, s0, d1, s1, d2, s2, d3, s3, DIMS)
    if WHOLE_MASK:
        mask = tl.multiple_of(mask, 16)
        offset = tl.multiple_of(offset, [16])
    return mask + offset[:, None]


@triton.jit
def _scores(
    input, mask, key, inside, visible, mask_key_stride, scale, scale_rest, KEEP: tl.constexpr, WHOLE_MASK: tl.constexpr
):
    """(hi, lo, valid) of the keys at `input` and `mask`: rounded scores, what rounding took, whether they take part."""
    x = widened(tl.load(input, mask=inside, other=0.0))
    hi, error = two_product(x, tl.zeros_like(x) + scale)
    lo = fma(x, tl.zeros_like(x) + scale_rest, error)
    valid = inside & (key < visible)
    if mask is not None:
        mask = mask + (key if WHOLE_MASK else key.to(tl.int64) * mask_key_stride)
        if KEEP:
            valid = valid & (tl.load(mask, mask=inside, other=0) != 0)
        else:
            bias = widened(tl.load(mask, mask=inside, other=0.0))
            valid = valid & (bias != -_INFINITY)
            total, error = two_sum(hi, bias)
            joined, rest = quick_two_sum(total, lo + error)
            hi = tl.where(is_finite(joined), joined, total)  # the residual of an infinite sum is NaN
            lo = rest
    return hi, tl.where(is_finite(lo), lo, 0.0), valid


@triton.jit
def _weights(hi, lo, valid, largest, largest_rest):
    """exp(score - largest), 0 of what is not valid."""
    difference, error = two_sum(hi, -largest)
    rest = error + (lo - largest_rest)
    exponent, residual = quick_two_sum(difference, tl.where(is_finite(rest), rest, 0.0))
    residual = tl.minimum(tl.maximum(residual, -_MOST_RESIDUAL), _MOST_RESIDUAL)
    return tl.where(valid, exp_nonpositive(exponent, residual), 0.0)


@triton.jit
def _inverse(total):
    """1 / a double sum, as a pair."""
    hi, lo = to_pair(total)
    inverse = tl.div_rn(1.0, hi)
    return inverse, fma(-inverse, lo, fma(-inverse, hi, 1.0)) * inverse


@triton.jit
def _quotients(weights, valid, inverse_hi, inverse_lo, some, largest):
    """Weights become results; [R] of the row beside [R, C]."""
    no_number = some & (is_finite(largest) == 0)
    quotient = fma(weights, inverse_hi[:, None] + tl.zeros_like(weights), weights * inverse_lo[:, None])
    quotient = tl.where(valid & no_number[:, None], float("nan"), quotient)
    return tl.where(some[:, None] & (valid | (no_number == 0)[:, None]), quotient, 0.0)


# ---- forward ----


# What the compiler may not take from a mask's strides and address: a row's bits would depend on them (rows.py).
_PLAIN = ("mask_key_stride", *(f"{letter}{dim}" for dim in range(4) for letter in "ds"))


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=("mask",))
def masked_softmax_forward_kernel(
    input, mask, output, rows, keys, queries, causal_offset, scale, scale_rest, mask_key_stride, d0, s0, d1, s1, d2, s2,
    d3, s3, DIMS: tl.constexpr, CAUSAL: tl.constexpr, KEEP: tl.constexpr, WHOLE_MASK: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, COLS)[None, :]
    inside = (row[:, None] < rows) & (key < keys)
    at = row[:, None] * keys + key
    if mask is not None:
        mask = _mask_rows(mask, row, d0, s0, d1, s1, d2, s2, d3, s3, DIMS, WHOLE_MASK)
    visible = _visible(row, keys, queries, causal_offset, CAUSAL)[:, None]
    hi, lo, valid = _scores(
        input + at, mask, key, inside, visible, mask_key_stride, scale, scale_rest, KEEP, WHOLE_MASK
    )
    largest = row_max_or_nan(tl.where(valid, hi, -_INFINITY))
    some = tl.max(tl.where(valid, 1, 0), axis=1) > 0
    rest = tl.zeros_like(largest)
    counts = is_finite(largest) & (tl.abs(largest) > _REST_COUNTS)
    if any_true(counts):
        found = tl.max(tl.where(valid & (hi == largest[:, None]), lo, -_INFINITY), axis=1)
        rest = tl.where(counts, found, 0.0)
    weights = _weights(hi, lo, valid, largest[:, None], rest[:, None])
    inverse_hi, inverse_lo = _inverse(row_sum(weights))
    y = _quotients(weights, valid, inverse_hi, inverse_lo, some, largest)
    tl.store(output + at, narrowed(y, output.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=("mask",))
def masked_softmax_streamed_forward_kernel(
    input, mask, output, keys, queries, causal_offset, scale, scale_rest, mask_key_stride, d0, s0, d1, s1, d2, s2, d3,
    s3, DIMS: tl.constexpr, CAUSAL: tl.constexpr, KEEP: tl.constexpr, WHOLE_MASK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    source = input + row[:, None] * keys
    if mask is not None:
        mask = _mask_rows(mask, row, d0, s0, d1, s1, d2, s2, d3, s3, DIMS, WHOLE_MASK)
    visible = _visible(row, keys, queries, causal_offset, CAUSAL)[:, None]
    largest = tl.full([1], -_INFINITY, tl.float32)
    found = tl.zeros([1], tl.int32)
    for first in range(0, keys, COLS):
        key = (first + tl.arange(0, COLS))[None, :]
        hi, lo, valid = _scores(
            source + key, mask, key, key < keys, visible, mask_key_stride, scale, scale_rest, KEEP, WHOLE_MASK
        )
        block = row_max_or_nan(tl.where(valid, hi, -_INFINITY))
        either_nan = (block != block) | (largest != largest)
        largest = tl.where(either_nan, float("nan"), tl.maximum(largest, block))
        found = tl.maximum(found, tl.max(tl.where(valid, 1, 0), axis=1))
    some = found > 0
    rest = tl.zeros([1], tl.float32)
    if any_true(is_finite(largest) & (tl.abs(largest) > _REST_COUNTS)):
        rest = tl.full([1], -_INFINITY, tl.float32)
        for first in range(0, keys, COLS):
            key = (first + tl.arange(0, COLS))[None, :]
            hi, lo, valid = _scores(
                source + key, mask, key, key < keys, visible, mask_key_stride, scale, scale_rest, KEEP, WHOLE_MASK
            )
            rest = tl.maximum(rest, tl.max(tl.where(valid & (hi == largest[:, None]), lo, -_INFINITY), axis=1))
    total = tl.zeros([1], tl.float64)
    for first in range(0, keys, COLS):
        key = (first + tl.arange(0, COLS))[None, :]
        hi, lo, valid = _scores(
            source + key, mask, key, key < keys, visible, mask_key_stride, scale, scale_rest, KEEP, WHOLE_MASK
        )
        total += row_sum(_weights(hi, lo, valid, largest[:, None], rest[:, None]))
    inverse_hi, inverse_lo = _inverse(total)
    for first in range(0, keys, COLS):
        key = (first + tl.arange(0, COLS))[None, :]
        hi, lo, valid = _scores(
            source + key, mask, key, key < keys, visible, mask_key_stride, scale, scale_rest, KEEP, WHOLE_MASK
        )
        weights = _weights(hi, lo, valid, largest[:, None], rest[:, None])
        y = _quotients(weights, valid, inverse_hi, inverse_lo, some, largest)
        tl.store(output + row[:, None] * keys + key, narrowed(y, output.dtype.element_ty), mask=key < keys)


# ---- backward: grad_input = scale * output * (grad_output - mean), mean = sum(grad_output * output) ----


@triton.jit
def _product_sum(weight, grad):
    """A weight of 0 takes and gives no gradient: an excluded key's is 0 even where its dy is not finite."""
    return row_sum(tl.where(weight == 0, 0.0, weight * grad))


@triton.jit
def _score_gradient(weight, grad, mean_hi, mean_lo):
    return tl.where(weight == 0, 0.0, weight * ((grad - mean_hi) - mean_lo))


@triton.jit
def masked_softmax_backward_kernel(
    grad_output, output, grad_input, means, rows, keys, scale, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Writes grad_input, or each row's mean as a pair, or both."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key = tl.arange(0, COLS)[None, :]
    inside = (row[:, None] < rows) & (key < keys)
    at = row[:, None] * keys + key
    weight = widened(tl.load(output + at, mask=inside, other=0.0))
    grad = widened(tl.load(grad_output + at, mask=inside, other=0.0))
    mean_hi, mean_lo = to_pair(_product_sum(weight, grad))
    if means is not None:
        tl.store(means + 2 * row, mean_hi, mask=row < rows)
        tl.store(means + 2 * row + 1, mean_lo, mask=row < rows)
    if grad_input is not None:
        dx = _score_gradient(weight, grad, mean_hi[:, None], mean_lo[:, None]) * scale
        tl.store(grad_input + at, narrowed(dx, grad_input.dtype.element_ty), mask=inside)


@triton.jit
def masked_softmax_streamed_backward_kernel(grad_output, output, grad_input, means, keys, scale, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    total = tl.zeros([1], tl.float64)
    for first in range(0, keys, COLS):
        key = (first + tl.arange(0, COLS))[None, :]
        at = row[:, None] * keys + key
        weight = widened(tl.load(output + at, mask=key < keys, other=0.0))
        total += _product_sum(weight, widened(tl.load(grad_output + at, mask=key < keys, other=0.0)))
    mean_hi, mean_lo = to_pair(total)
    if means is not None:
        tl.store(means + 2 * row, mean_hi)
        tl.store(means + 2 * row + 1, mean_lo)
    if grad_input is not None:
        for first in range(0, keys, COLS):
            key = (first + tl.arange(0, COLS))[None, :]
            at = row[:, None] * keys + key
            weight = widened(tl.load(output + at, mask=key < keys, other=0.0))
            grad = widened(tl.load(grad_output + at, mask=key < keys, other=0.0))
            dx = _score_gradient(weight, grad, mean_hi[:, None], mean_lo[:, None]) * scale
            tl.store(grad_input + at, narrowed(dx, grad_input.dtype.element_ty), mask=key < keys)


# ---- the gradient of an additive mask: each of its elements adds the score gradients of the rows that used it ----


@triton.jit
def masked_softmax_mask_lines_kernel(
    grad_output, output, means, lines, mask_rows, keys, repeats, chunks, b0, t0, b1, t1, b2, t2, b3, t3, d0, s0, d1, s1,
    d2, s2, d3, s3, BASE_DIMS: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Some keys of a row of the mask, over a chunk of its repeats; rows are base(mask row) + shift(repeat)."""
    program = tl.program_id(0).to(tl.int64)
    key_tiles = tl.cdiv(keys, COLS)
    key = (program % key_tiles * COLS + tl.arange(0, COLS))[None, :]
    chunk = program // key_tiles % chunks
    mask_row = program // key_tiles // chunks
    base = _digits(mask_row + tl.zeros([1], tl.int64), b0, t0, b1, t1, b2, t2, b3, t3, BASE_DIMS)
    part = tl.zeros([ROWS, COLS], tl.float32)
    end = repeats * (chunk + 1) // chunks
    for first in range(repeats * chunk // chunks, end, ROWS):
        repeat = first + tl.arange(0, ROWS).to(tl.int64)
        row = base + _digits(repeat, d0, s0, d1, s1, d2, s2, d3, s3, DIMS)
        inside = (repeat < end)[:, None] & (key < keys)
        at = row[:, None] * keys + key
        weight = widened(tl.load(output + at, mask=inside, other=0.0))
        grad = widened(tl.load(grad_output + at, mask=inside, other=0.0))
        mean_hi = tl.load(means + 2 * row, mask=repeat < end, other=0.0)
        mean_lo = tl.load(means + 2 * row + 1, mask=repeat < end, other=0.0)
        part += _score_gradient(weight, grad, mean_hi[:, None], mean_lo[:, None])
    at = (chunk * mask_rows + mask_row) * keys + key
    tl.store(lines + at, tl.sum(part, axis=0)[None, :], mask=key < keys)


@triton.jit
def masked_softmax_mask_keys_kernel(sums, grad_mask, keys, COLS: tl.constexpr):
    """The sum over keys, for a mask that is broadcast over them."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([1], tl.float64)
    for first in range(0, keys, COLS):
        key = first + tl.arange(0, COLS)
        total += row_sum(tl.load(sums + row * keys + key, mask=key < keys, other=0.0)[None, :])
    tl.store(grad_mask + row + tl.arange(0, 1), total.to(tl.float32))


# ---- host ----

_MOST_DIMS = 4
FORWARD_TILES, GRADIENT_TILES = with_rows(), with_rows()
FORWARD_STREAMED, GRADIENT_STREAMED = RowTile(4096, 1, Launch(8, spill_bytes=8)), STREAMED
MASK_TILE = RowTile(128, 16, Launch(4))  # of the mask's gradient
MASK_KEYS = RowTile(4096, 1, Launch(4))  # of its sum over keys


def _merged(dims):
    """(size, stride) pairs, outermost first, neighbours merged where one stride serves both."""
    merged = []
    for size, stride in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def _digit_arguments(dims, names):
    """The arguments that _digits takes, innermost dimension first."""
    padded = list(reversed(dims)) + [(1, 0)] * (_MOST_DIMS - len(dims))
    return {f"{name}{i}": pair[j] for i, pair in enumerate(padded) for j, name in enumerate(names)}


def _on_boundaries(mask):
    """The mask with every row on a boundary, none of its broadcast dimensions written out."""
    if is_aligned(mask) and all(size == 1 or stride % ALIGNED_ELEMENTS == 0 for size, stride in _lead(mask)):
        return mask
    own = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]
    return own.clone(memory_format=torch.contiguous_format).expand(mask.shape)


def _lead(mask):
    return zip(mask.shape[:-1], mask.stride()[:-1], strict=True)


def masked_softmax_forward(input, mask, scale, causal, bottom_right):
    input = on_boundary(input.contiguous())
    output = input.new_empty(input.shape)
    if input.numel() == 0:
        return output
    keys = input.shape[-1]
    queries = input.shape[-2] if input.dim() >= 2 else 1
    rows = input.numel() // keys
    dims, keep, whole_mask = [], False, False
    if mask is not None:
        keep = mask.dtype == torch.bool
        if len(_merged(_lead(mask))) > _MOST_DIMS:
            mask = mask.contiguous()
        whole_mask = keys % ALIGNED_ELEMENTS == 0 and mask.stride(-1) == 1
        mask = _on_boundaries(mask) if whole_mask else mask
        dims = _merged(_lead(mask))
        mask = mask.view(torch.uint8) if keep else mask
    scale_hi, scale_rest = split(scale)
    operands = dict(
        input=input, mask=mask, output=output, keys=keys, queries=queries,
        causal_offset=keys - queries if bottom_right else 0, scale=scale_hi, scale_rest=scale_rest,
        mask_key_stride=0 if mask is None else mask.stride(-1), DIMS=len(dims), CAUSAL=causal, KEEP=keep,
        WHOLE_MASK=whole_mask, **_digit_arguments(dims, "ds"),
    )  # fmt: skip
    tile = row_tile(keys, rows, architecture_of(input.device), FORWARD_TILES)
    if tile is None:
        tile = taken(FORWARD_STREAMED)
        launch(
            masked_softmax_streamed_forward_kernel, (rows,), tile.launch, input.device, COLS=tile.cols, **operands
        )
    else:
        grid = (triton.cdiv(rows, tile.rows),)
        launch(
            masked_softmax_forward_kernel, grid, tile.launch, input.device, rows=rows, ROWS=tile.rows, COLS=tile.cols,
            **operands,
        )  # fmt: skip
    return output


def _differentiate(grad_output, output, grad_input, means, scale):
    """All contiguous, with at least one element."""
    keys = output.shape[-1]
    rows = output.numel() // keys
    operands = dict(
        grad_output=grad_output, output=output, grad_input=grad_input, means=means, keys=keys, scale=split(scale)[0]
    )
    tile = row_tile(keys, rows, architecture_of(output.device), GRADIENT_TILES)
    if tile is None:
        tile = taken(GRADIENT_STREAMED)
        launch(
            masked_softmax_streamed_backward_kernel, (rows,), tile.launch, output.device, COLS=tile.cols, **operands
        )
    else:
        grid = (triton.cdiv(rows, tile.rows),)
        launch(
            masked_softmax_backward_kernel, grid, tile.launch, output.device, rows=rows, ROWS=tile.rows, COLS=tile.cols,
            **operands,
        )  # fmt: skip


def masked_softmax_backward(grad_output, output, scale):
    grad_output, output = (on_boundary(tensor.contiguous()) for tensor in (grad_output, output))
    grad_input = output.new_empty(output.shape)
    if output.numel() > 0:
        _differentiate(grad_output, output, grad_input, None, scale)
    return grad_input


def _chunks_of(repeats):
    """Depends on the number of repeats alone."""
    return 1 if repeats < 32 else repeats // 16 if repeats < 16 * 64 else 64


def masked_softmax_mask_backward(grad_output, output, mask):
    """Gradient of an additive mask of as many dimensions as output, size 1 where it was broadcast; float32."""
    grad_mask = output.new_empty(mask.shape, dtype=torch.float32)
    if grad_mask.numel() == 0:
        return grad_mask
    if output.numel() == 0:
        return grad_mask.zero_()
    lead = list(zip(mask.shape[:-1], output.shape[:-1], strict=True))
    strides, apart = [], 1  # of each dimension, in rows of the output
    for _, size in reversed(lead):
        strides.insert(0, apart)
        apart *= size
    base = _merged((size, stride) for (held, size), stride in zip(lead, strides, strict=True) if held != 1)
    shift = _merged((size, stride) for (held, size), stride in zip(lead, strides, strict=True) if held == 1)
    if max(len(base), len(shift)) > _MOST_DIMS:
        # The mask's dimensions in front, those in which it is broadcast behind: one of each.
        order = sorted(range(len(lead)), key=lambda d: lead[d][0] == 1) + [len(lead)]
        moved = mask.permute(order)
        found = masked_softmax_mask_backward(
            grad_output.permute(order).contiguous(), output.permute(order).contiguous(), moved
        )
        return found.permute([order.index(d) for d in range(len(order))]).contiguous()
    grad_output, output = (on_boundary(tensor.contiguous()) for tensor in (grad_output, output))
    keys = output.shape[-1]
    means = output.new_empty((output.numel() // keys, 2), dtype=torch.float32)
    _differentiate(grad_output, output, None, means, 1.0)
    mask_rows = grad_mask.numel() // mask.shape[-1]
    repeats = output.numel() // keys // mask_rows
    chunks = _chunks_of(repeats)
    lines = output.new_empty((chunks, mask_rows * keys), dtype=torch.float32)
    tile = taken(MASK_TILE)
    launch(
        masked_softmax_mask_lines_kernel, (mask_rows * chunks * triton.cdiv(keys, tile.cols),), tile.launch,
        output.device, grad_output=grad_output, output=output, means=means, lines=lines, mask_rows=mask_rows, keys=keys,
        repeats=repeats, chunks=chunks, BASE_DIMS=len(base), DIMS=len(shift), ROWS=tile.rows, COLS=tile.cols,
        **_digit_arguments(base, "bt"), **_digit_arguments(shift, "ds"),
    )  # fmt: skip
    sums = grad_mask if mask.shape[-1] == keys else output.new_empty((mask_rows, keys), dtype=torch.float32)
    add_lines(lines, sums)
    if sums is not grad_mask:
        tile = taken(MASK_KEYS)
        launch(
            masked_softmax_mask_keys_kernel, (mask_rows,), tile.launch, output.device, sums=sums, grad_mask=grad_mask,
            keys=keys, COLS=tile.cols,
        )  # fmt: skip
    return grad_mask
