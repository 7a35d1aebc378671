"""Rotary embedding in Triton: each pair (a, b) of a row's leading R columns becomes (a cos - b sin, b cos + a sin).

Policy: computed in double, rounded once, as on the CPU: products of two floats are exact in double, so that a result
carries the one rounding at the end even where the two products cancel. Columns from R on are copied. Rows are numbered
as they lie in memory, so that neighbouring programs read neighbouring ones.
"""

import triton
import triton.language as tl

from .exact import store_double
from .launch import Launch, launch
from .rows import RowTile, tile_of_elements
from .versions import widened


@triton.jit
def _load_double(pointers, inside):
    return widened(tl.load(pointers, mask=inside, other=0.0)).to(tl.float64)


@triton.jit
def rotary_forward_kernel(
    input, input_batch, input_head, input_token, input_col, cos, cos_batch, cos_token, cos_col, sin, sin_batch,
    sin_token, sin_col, output, output_batch, output_head, output_token, rows, inner, outer, head_dim, pairs,
    HEADS_INNER: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    minor = row % inner
    major = row // inner % outer
    batch = row // inner // outer
    head, token = (minor, major) if HEADS_INNER else (major, minor)
    source = input + (batch * input_batch + head * input_head + token * input_token)[:, None]
    target = output + (batch * output_batch + head * output_head + token * output_token)[:, None]

    pair = (tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)).to(tl.int64)[None, :]  # times a stride
    inside = (row < rows)[:, None] & (pair < pairs)
    first = 2 * pair if INTERLEAVED else pair
    second = first + (1 if INTERLEAVED else pairs)
    a = _load_double(source + first * input_col, inside)
    b = _load_double(source + second * input_col, inside)
    cosine = _load_double(cos + (batch * cos_batch + token * cos_token)[:, None] + pair * cos_col, inside)
    sine = _load_double(sin + (batch * sin_batch + token * sin_token)[:, None] + pair * sin_col, inside)
    if INVERSE:
        sine = -sine
    store_double(target + first, a * cosine - b * sine, inside)
    store_double(target + second, b * cosine + a * sine, inside)

    if tl.program_id(1) == 0:
        for begin in range(2 * pairs, head_dim, PAIRS):
            col = (begin + tl.arange(0, PAIRS)).to(tl.int64)[None, :]
            inside = (row < rows)[:, None] & (col < head_dim)
            tl.store(target + col, tl.load(source + col * input_col, mask=inside, other=0.0), mask=inside)


@triton.jit
def rotary_backward_kernel(
    grad_output, grad_batch, grad_head, grad_token, grad_col, input, input_batch, input_head, input_token, input_col,
    grad_cos, grad_sin, repeats, heads, length, pairs, SHARED: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The gradients of one row of the tables: a sum over heads, and over the batch where it shares the tables."""
    table_row = tl.program_id(0).to(tl.int64)
    token = table_row % length
    pair = (tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)).to(tl.int64)[None, :]  # times a stride
    first = 2 * pair if INTERLEAVED else pair
    second = first + (1 if INTERLEAVED else pairs)
    by_cos = tl.zeros([ROWS, PAIRS], tl.float64)
    by_sin = tl.zeros([ROWS, PAIRS], tl.float64)
    for begin in range(0, repeats, ROWS):
        repeat = begin + tl.arange(0, ROWS).to(tl.int64)
        inside = (repeat < repeats)[:, None] & (pair < pairs)
        batch = repeat // heads if SHARED else table_row // length
        head = repeat % heads
        g = grad_output + (batch * grad_batch + head * grad_head + token * grad_token)[:, None]
        x = input + (batch * input_batch + head * input_head + token * input_token)[:, None]
        g1 = _load_double(g + first * grad_col, inside)
        g2 = _load_double(g + second * grad_col, inside)
        x1 = _load_double(x + first * input_col, inside)
        x2 = _load_double(x + second * input_col, inside)
        by_cos += g1 * x1 + g2 * x2
        by_sin += g2 * x1 - g1 * x2
    at = table_row * pairs + pair
    total = tl.sum(by_sin, axis=0)[None, :]
    store_double(grad_cos + at, tl.sum(by_cos, axis=0)[None, :], pair < pairs)
    store_double(grad_sin + at, -total if INVERSE else total, pair < pairs)


# ---- host ----

FORWARD_TILE = RowTile(256, 4, Launch(4))  # pairs and rows
BACKWARD_TILE = RowTile(256, 4, Launch(4))


def _table_strides(table):
    """(batch, token, column) of [L, R/2] or [B or 1, L, R/2]: 0 for a batch that shares one table."""
    batched = table.dim() == 3 and table.shape[0] != 1
    return (table.stride(0) if batched else 0), table.stride(-2), table.stride(-1)


def rotary_forward(input, cos, sin, interleaved, inverse):
    batch, heads, length, head_dim = input.shape
    heads_inner = input.stride(1) < input.stride(2)
    if heads_inner:
        output = input.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    else:
        output = input.new_empty(batch, heads, length, head_dim)
    pairs = cos.shape[-1]
    rows = batch * heads * length
    if output.numel() == 0:
        return output
    tile = tile_of_elements(FORWARD_TILE, pairs, rows, input.device)
    grid = (triton.cdiv(rows, tile.rows), max(1, triton.cdiv(pairs, tile.cols)))
    cos_batch, cos_token, cos_col = _table_strides(cos)
    sin_batch, sin_token, sin_col = _table_strides(sin)
    launch(
        rotary_forward_kernel, grid, tile.launch, input.device, input=input, input_batch=input.stride(0),
        input_head=input.stride(1), input_token=input.stride(2), input_col=input.stride(3), cos=cos,
        cos_batch=cos_batch, cos_token=cos_token, cos_col=cos_col, sin=sin, sin_batch=sin_batch, sin_token=sin_token,
        sin_col=sin_col, output=output, output_batch=output.stride(0), output_head=output.stride(1),
        output_token=output.stride(2), rows=rows, inner=heads if heads_inner else length, outer=length if heads_inner
        else heads, head_dim=head_dim, pairs=pairs, HEADS_INNER=heads_inner, INTERLEAVED=interleaved, INVERSE=inverse,
        ROWS=tile.rows, PAIRS=tile.cols,
    )  # fmt: skip
    return output


def rotary_backward(grad_output, input, cos, interleaved, inverse):
    """Gradients of cos and sin. (That of input is rotary_forward of grad_output, by the negative angle.)"""
    batch, heads, length, _ = input.shape
    grad_cos, grad_sin = cos.new_empty(cos.shape), cos.new_empty(cos.shape)
    pairs = cos.shape[-1]
    if grad_cos.numel() == 0:
        return grad_cos, grad_sin
    shared = cos.dim() == 2 or cos.shape[0] == 1
    table_rows, repeats = (length, batch * heads) if shared else (batch * length, heads)
    tile = tile_of_elements(BACKWARD_TILE, pairs, repeats, input.device)
    launch(
        rotary_backward_kernel, (table_rows, triton.cdiv(pairs, tile.cols)), tile.launch, input.device,
        grad_output=grad_output, grad_batch=grad_output.stride(0), grad_head=grad_output.stride(1),
        grad_token=grad_output.stride(2), grad_col=grad_output.stride(3), input=input, input_batch=input.stride(0),
        input_head=input.stride(1), input_token=input.stride(2), input_col=input.stride(3), grad_cos=grad_cos,
        grad_sin=grad_sin, repeats=repeats, heads=heads, length=length, pairs=pairs, SHARED=shared,
        INTERLEAVED=interleaved, INVERSE=inverse, ROWS=tile.rows, PAIRS=tile.cols,
    )  # fmt: skip
    return grad_cos, grad_sin
