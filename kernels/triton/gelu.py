"""GELU in Triton, erf and tanh form: x * Phi(x). As on the CPU (kernels/cpu/gelu.cpp says why), with t = |x|,

    gelu(x) = max(x, 0) - t * tail(t),   gelu'(x) = h(t) for x < 0 and 1 - h(t) for x >= 0

where tail and h are polynomials on |x| < 63/16 (gelu_tables.py) and an exponential beyond (gelu_far.py). Constants and
operations are those of the CPU's floats, and so are the bits. 16-bit types, which have tables on the CPU, are rounded
from these floats: none of bfloat16's lies so near the middle of two results that the float's error chooses the wrong
one, and of float16's the few that do are listed (_on_right_side).

Policy: a program owns some columns and goes down the rows of its chunk, so that the bias is loaded once and its
gradient stays in registers. The gradient of the bias is a sum by chunks, then over chunks (rows.py).
"""

import torch
import triton
import triton.language as tl

from .gelu_far import CUT_ERF, CUT_TANH, erf_slope, erf_tail, tanh_slope, tanh_tail
from .gelu_tables import NUM_COEFFICIENTS, NUM_SEGMENTS, SEGMENTS
from .launch import Launch, is_recording, launch
from .rows import RowTile, add_lines, on_boundary, tile_of_elements
from .versions import fma, narrowed, widened

_SEGMENTS_END = tl.constexpr(63.0 / 16)
_SEGMENT_ROUNDING = tl.constexpr(1.5 * 2.0**20)  # adding it rounds to a multiple of 1/8, whose number the low bits hold
_COEFFICIENTS, _SEGMENTS = tl.constexpr(NUM_COEFFICIENTS), tl.constexpr(NUM_SEGMENTS)
# Of the slope's segments: moves a centre onto the root of gelu'.
_SHIFT_ERF, _SHIFT_TANH = tl.constexpr(1878 * 2.0**-20), tl.constexpr(2580 * 2.0**-20)


@triton.jit
def _evaluate(table, t):
    """The polynomial of the segment that holds t; beyond _SEGMENTS_END any number, of a NaN NaN."""
    rounded = t + _SEGMENT_ROUNDING
    u = t - (rounded - _SEGMENT_ROUNDING)
    segment = rounded.to(tl.int32, bitcast=True) & (_SEGMENTS - 1)
    total = tl.load(table + (_COEFFICIENTS - 1) * _SEGMENTS + segment)
    for i in tl.static_range(_COEFFICIENTS - 1):
        total = fma(total, u, tl.load(table + (_COEFFICIENTS - 2 - i) * _SEGMENTS + segment))
    return total


def _floats(text):
    return [tl.constexpr(float.fromhex(word)) for word in text.split()]


# float16 numbers x whose float lies on the wrong side of the middle of two results, and the float next to it on the
# right side; found by trying all of them.
_X0, _X1, _X2, _X3, _X4 = _floats("0x1p-24 0x1.5fp-10 0x1.69cp-2 -0x1.ff8p-3 0x1.e14p-11")
_Y0, _Y1, _Y1_NEGATIVE = _floats("0x1.000002p-25 0x1.5f5ffep-11 -0x1.5ea002p-11")
_TANH_Y2, _TANH_Y2_NEGATIVE, _TANH_Y3 = _floats("0x1.cda002p-3 -0x1.05dffep-3 -0x1.9aa002p-4")
_X5, _SLOPE4, _ERF_SLOPE5 = _floats("-0x1.e14p-12 0x1.005ffep-1 0x1.ffa002p-2")


@triton.jit
def _on_right_side(x, y, TANH: tl.constexpr):
    y = tl.where(x == _X0, _Y0, y)
    y = tl.where(x == _X1, _Y1, y)
    y = tl.where(x == -_X1, _Y1_NEGATIVE, y)
    if TANH:
        y = tl.where(x == _X2, _TANH_Y2, y)
        y = tl.where(x == -_X2, _TANH_Y2_NEGATIVE, y)
        y = tl.where(x == _X3, _TANH_Y3, y)
    return y


@triton.jit
def _slope_on_right_side(x, slope, TANH: tl.constexpr):
    slope = tl.where(x == _X4, _SLOPE4, slope)
    return slope if TANH else tl.where(x == _X5, _ERF_SLOPE5, slope)


@triton.jit
def _any(condition):
    return tl.max(tl.max(tl.where(condition, 1, 0), axis=1), axis=0) > 0


@triton.jit
def _forward(table, x, TANH: tl.constexpr, dtype: tl.constexpr):
    """gelu of floats that hold numbers of `dtype`. A zero keeps its sign, a NaN stays.

    A sign is changed by -1.0 *: Triton 3.6 takes -x for 0 - x, and so -0 for 0.
    """
    t = tl.abs(x)
    y = fma(-1.0 * t, _evaluate(table, t), tl.where(x < 0, -0.0, x))
    if dtype == tl.float32:
        far = t >= _SEGMENTS_END
    else:
        # A 16-bit x from there on is its own gelu: the tail is below half its last place.
        y = tl.where(x >= _SEGMENTS_END, x, y)
        far = x <= -_SEGMENTS_END
    if _any(far):
        if TANH:
            tail = tanh_tail(tl.minimum(tl.maximum(t, _SEGMENTS_END), CUT_TANH))
        else:
            tail = erf_tail(tl.minimum(tl.maximum(t, _SEGMENTS_END), CUT_ERF))
        y = tl.where(far, tl.where(x < 0, -1.0 * tail, x - tail), y)
    return _on_right_side(x, y, TANH) if dtype == tl.float16 else y


@triton.jit
def _backward(table, x, grad_output, TANH: tl.constexpr, dtype: tl.constexpr):
    """grad_output times gelu'(x)."""
    t = tl.abs(x)
    h = _evaluate(table, t - (_SHIFT_TANH if TANH else _SHIFT_ERF))
    slope = tl.where(x < 0, h, 1.0 - h)
    y = grad_output * (_slope_on_right_side(x, slope, TANH) if dtype == tl.float16 else slope)
    far = t >= _SEGMENTS_END
    if _any(far):
        # A subnormal slope times grad_output is rounded once: the power of two comes last.
        factor = tl.where(x < 0, grad_output, 1.0)
        if TANH:
            h = tanh_slope(tl.minimum(tl.maximum(t, _SEGMENTS_END), CUT_TANH), factor)
        else:
            h = erf_slope(tl.minimum(tl.maximum(t, _SEGMENTS_END), CUT_ERF), factor)
        y = tl.where(far, tl.where(x < 0, h, grad_output * (1.0 - h)), y)
    return y


@triton.jit
def _with_bias(x, bias, col, columns, dtype: tl.constexpr):
    """input + bias, rounded to the storage type as the unfused sum is."""
    return widened(narrowed(x + widened(tl.load(bias + col, mask=col < columns, other=0.0))[None, :], dtype))


@triton.jit
def _tile_of_program(columns, COLS: tl.constexpr):
    """(tile or chunk of rows, tile of columns): both unbounded, so both along the grid's first axis."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, COLS)
    return program // tiles, program % tiles


@triton.jit
def gelu_forward_kernel(
    input, bias, output, table, size, columns, TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row_tile, col_tile = _tile_of_program(columns, COLS)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    col = col_tile * COLS + tl.arange(0, COLS)
    at = row[:, None] * columns + col[None, :]
    inside = (col[None, :] < columns) & (at < size)
    x = widened(tl.load(input + at, mask=inside, other=0.0))
    if bias is not None:
        x = _with_bias(x, bias, col, columns, input.dtype.element_ty)
    y = _forward(table, x, TANH, input.dtype.element_ty)
    tl.store(output + at, narrowed(y, output.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward_kernel(
    grad_output, input, bias, grad_input, bias_lines, table, size, columns, rows, chunks, TANH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    chunk, col_tile = _tile_of_program(columns, COLS)
    col = col_tile * COLS + tl.arange(0, COLS)
    part = tl.zeros([ROWS, COLS], tl.float32)
    end = rows * (chunk + 1) // chunks
    for first in range(rows * chunk // chunks, end, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * columns + col[None, :]
        inside = (row[:, None] < end) & (col[None, :] < columns) & (at < size)
        x = widened(tl.load(input + at, mask=inside, other=0.0))
        if bias is not None:
            x = _with_bias(x, bias, col, columns, input.dtype.element_ty)
        dy = widened(tl.load(grad_output + at, mask=inside, other=0.0))
        y = _backward(table, x, dy, TANH, input.dtype.element_ty)
        tl.store(grad_input + at, narrowed(y, grad_input.dtype.element_ty), mask=inside)
        if bias_lines is not None:
            part += tl.where(inside, y, 0.0)
    if bias_lines is not None:
        tl.store(bias_lines + chunk * columns + col, tl.sum(part, axis=0), mask=col < columns)


@triton.jit
def gelu_table_kernel(table, numbers, COUNT: tl.constexpr):
    """Floats that arrive as arguments, one after the other."""
    for i in tl.static_range(COUNT):
        tl.store(table + i, numbers[i])


# ---- host ----

FORWARD_TILE = RowTile(1024, 1, Launch(8, spill_bytes=8))
BACKWARD_TILE = RowTile(1024, 1, Launch(8, spill_bytes=8))
_COLUMNS = 2048  # of a tensor without bias, which has no columns of its own
_MOST_CHUNKS, _LEAST_TILES = 1024, 4


_TABLE_LAUNCH = Launch(1)
_tables: dict[tuple[bool, bool, torch.device], torch.Tensor] = {}


def _is_captured(device: torch.device) -> bool:
    """Whether the device's current stream is being captured in a graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _table(tanh: bool, backward: bool, device: torch.device) -> torch.Tensor:
    """The coefficients on a device.

    A kernel writes them, out of its own arguments: a copy from the host cannot be captured in a CUDA graph, and the
    first call may lie in one. There the table is the graph's: written at each replay, in memory of the graph's own, so
    it is not kept for others.
    """
    found = _tables.get((tanh, backward, device))
    if found is not None:
        return found
    rows = SEGMENTS["tanh" if tanh else "erf", "backward" if backward else "forward"]
    numbers = tuple(x for row in rows for x in row)
    table = torch.empty(len(numbers), dtype=torch.float32, device=device)
    launch(gelu_table_kernel, (1,), _TABLE_LAUNCH, device, table=table, numbers=numbers, COUNT=len(numbers))
    if is_recording() or _is_captured(device):
        return table
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams read it without waiting for this one
    _tables[tanh, backward, device] = table
    return table


def gelu_forward(input, bias, tanh):
    input = input.contiguous()
    output = input.new_empty(input.shape)
    if input.numel() == 0:
        return output
    columns = _COLUMNS if bias is None else bias.numel()
    rows = triton.cdiv(input.numel(), columns)
    tile = tile_of_elements(FORWARD_TILE, columns, rows, input.device)
    grid = (triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.cols),)
    launch(
        gelu_forward_kernel, grid, tile.launch, input.device, input=input,
        bias=None if bias is None else bias.contiguous(), output=output,
        table=_table(tanh, False, input.device), size=input.numel(), columns=columns, TANH=tanh, ROWS=tile.rows,
        COLS=tile.cols,
    )  # fmt: skip
    return output


def gelu_backward(grad_output, input, bias, tanh, need_bias_grad):
    input, grad_output = (on_boundary(tensor.contiguous()) for tensor in (input, grad_output))
    grad_input = input.new_empty(input.shape)
    like = input if bias is None else bias
    grad_bias = like.new_empty(bias.shape if need_bias_grad else (0,))
    columns = _COLUMNS if bias is None else bias.numel()
    if columns == 0:
        return grad_input, grad_bias
    rows = triton.cdiv(input.numel(), columns)
    tile = tile_of_elements(BACKWARD_TILE, columns, rows, input.device)
    chunks = triton.cdiv(rows, tile.rows)
    bias_lines = None
    if need_bias_grad:
        chunks = min(_MOST_CHUNKS, triton.cdiv(rows, _LEAST_TILES * tile.rows))
        bias_lines = input.new_empty((chunks, columns), dtype=torch.float32)
    grid = (chunks * triton.cdiv(columns, tile.cols),)
    launch(
        gelu_backward_kernel, grid, tile.launch, input.device, grad_output=grad_output, input=input,
        bias=None if bias is None else bias.contiguous(), grad_input=grad_input, bias_lines=bias_lines,
        table=_table(tanh, True, input.device), size=input.numel(), columns=columns, rows=rows, chunks=chunks,
        TANH=tanh, ROWS=tile.rows, COLS=tile.cols,
    )  # fmt: skip
    if need_bias_grad:
        add_lines(bias_lines, grad_bias)
    return grad_input, grad_bias
