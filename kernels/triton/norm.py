"""What layer_norm.py and rms_norm.py share: statistics of rows, the forward, the gradients.

    output = (x - mean) * rstd * weight + bias;   x = input, or round(input + residual) if there is one

and, with g = grad_output * weight and xhat the normalised row,

    grad_input  = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_sum
    grad_weight = sum over rows of grad_output * xhat,   grad_bias = sum over rows of grad_output

Without CENTERED (RMSNorm) there is neither mean nor bias.

Policy: statistics are sums over deviations from the row's rounded mean, which is far closer to the mean than a standard
deviation even at mean/std 1e6: short sums in float, their sums in double, the rest in two floats. A row for which that
would not do (constant, beyond float's range, not finite) takes them in double. float32 results round twice: what
x - mean loses is carried along. The backward takes the statistics anew from x, since saved ones would be rounded, and
sums over rows by chunks whose number depends on the shape alone: each program adds its chunk into a line, a second
kernel adds the lines. No atomics: one order, the same on every GPU.
"""

import torch
import triton
import triton.language as tl

from .exact import (
    add_pairs,
    any_true,
    divide_pair,
    inverse_sqrt,
    is_finite,
    multiply_pairs,
    row_sum,
    split,
    to_pair,
    two_sum,
)
from .launch import Launch, architecture_of, launch, taken
from .rows import STREAMED, RowTile, add_lines, as_rows, on_boundary, row_tile, with_rows
from .versions import fma, narrowed, widened

# ---- statistics ----
# How a row is normalised: xhat = (x * scale - mean - mean_tail) * (rest + rest_tail), scale a power of two, so that
# neither x nor rstd = scale * rest leaves float's range.

_SMALLEST_VARIANCE = tl.constexpr(2.0**-80)
_LARGEST_VARIANCE = tl.constexpr(2.0**100)
_LONGEST_FLOAT = tl.constexpr(1 << 24)  # lengths that float holds
_SMALLEST_SCALE = tl.constexpr(2.0**-126)
_LARGEST_SCALE = tl.constexpr(2.0**126)
_EXPONENT_FIELD = tl.constexpr(0x7FF0000000000000)


@triton.jit
def _quick_statistics(shift, deviations, squares, cols, eps_hi, eps_lo, CENTERED: tl.constexpr):
    """From the sums of deviations from `shift` and of their squares, doubles; and whether that is exact enough."""
    length = tl.cast(cols, tl.float32)
    offset_hi, offset_lo = to_pair(deviations)
    offset_hi, offset_lo = divide_pair(offset_hi, offset_lo, length)
    variance_hi, variance_lo = to_pair(squares)
    variance_hi, variance_lo = divide_pair(variance_hi, variance_lo, length)
    if CENTERED:
        square_hi, square_lo = multiply_pairs(offset_hi, offset_lo, offset_hi, offset_lo)
        variance_hi, variance_lo = add_pairs(variance_hi, variance_lo, -square_hi, -square_lo)
    sum_hi, sum_lo = add_pairs(variance_hi, variance_lo, eps_hi, eps_lo)
    rest, rest_tail = inverse_sqrt(sum_hi, sum_lo)
    # Where the squares leave float's range, the shift is farther from the mean than half a standard deviation, or the
    # length is no float. A comparison with a NaN is false.
    quick = (variance_hi > _SMALLEST_VARIANCE) & (variance_hi < _LARGEST_VARIANCE) & (eps_hi < _LARGEST_VARIANCE)
    quick = quick & (cols <= _LONGEST_FLOAT) & (4.0 * offset_hi * offset_hi <= variance_hi)
    return quick, offset_hi + offset_lo, rest, rest_tail


@triton.jit
def _power_of_two_below(x):
    return (x.to(tl.int64, bitcast=True) & _EXPONENT_FIELD).to(tl.float64, bitcast=True)


@triton.jit
def _wide_statistics(mean, squares, cols, eps_hi, eps_lo, CENTERED: tl.constexpr):
    """(scale, mean, mean_tail, rest, rest_tail) from a mean and a sum of squares in double, right for every row."""
    eps = tl.cast(eps_hi, tl.float64) + tl.cast(eps_lo, tl.float64)
    rstd = 1.0 / tl.sqrt(squares / tl.cast(cols, tl.float64) + eps)
    # The exponent of `scale` is near rstd's, as far as x * scale stays a float.
    power = tl.minimum(_power_of_two_below(rstd), _LARGEST_SCALE)
    if CENTERED:
        too_large = tl.abs(mean) * power > _LARGEST_SCALE
        power = tl.where(
            too_large, _power_of_two_below(tl.full(mean.shape, _LARGEST_SCALE, tl.float64) / tl.abs(mean)), power
        )
    power = tl.maximum(power, _SMALLEST_SCALE)
    all_of_mean, all_of_rest = mean * power, rstd / power
    mean_hi, rest = all_of_mean.to(tl.float32), all_of_rest.to(tl.float32)
    mean_tail = (all_of_mean - mean_hi.to(tl.float64)).to(tl.float32)
    rest_tail = (all_of_rest - rest.to(tl.float64)).to(tl.float32)
    return power.to(tl.float32), mean_hi, mean_tail, rest, tl.where(is_finite(rest), rest_tail, 0.0)


@triton.jit
def _statistics(x, inside, cols, eps_hi, eps_lo, CENTERED: tl.constexpr):
    """(scale, mean, mean_tail, rest, rest_tail), [R] each, of the rows of x [R, C], 0 outside."""
    if CENTERED:
        shift = tl.div_rn(row_sum(x).to(tl.float32), tl.cast(cols, tl.float32))
        deviation = tl.where(inside, x - shift[:, None], 0.0)
        deviations = row_sum(deviation)
    else:
        shift = tl.zeros([x.shape[0]], tl.float32)
        deviation = x
        deviations = tl.zeros([x.shape[0]], tl.float64)
    squares = row_sum(deviation * deviation)
    quick, mean_tail, rest, rest_tail = _quick_statistics(shift, deviations, squares, cols, eps_hi, eps_lo, CENTERED)
    scale = tl.full([x.shape[0]], 1.0, tl.float32)
    mean = shift
    if any_true(quick == 0):
        wide_mean = tl.zeros([x.shape[0]], tl.float64)
        if CENTERED:
            wide_mean = tl.sum(x.to(tl.float64), axis=1) / tl.cast(cols, tl.float64)
        wide = tl.where(inside, x.to(tl.float64) - wide_mean[:, None], 0.0)
        s, m, mt, r, rt = _wide_statistics(wide_mean, tl.sum(wide * wide, axis=1), cols, eps_hi, eps_lo, CENTERED)
        scale = tl.where(quick, scale, s)
        mean = tl.where(quick, mean, m)
        mean_tail = tl.where(quick, mean_tail, mt)
        rest = tl.where(quick, rest, r)
        rest_tail = tl.where(quick, rest_tail, rt)
    return scale, mean, mean_tail, rest, rest_tail


@triton.jit
def _streamed_statistics(row, cols, eps_hi, eps_lo, CENTERED: tl.constexpr, COLS: tl.constexpr):
    """The same of one row of any length, at `row`; [1] each."""
    total = tl.zeros([1], tl.float64)
    if CENTERED:
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS)
            total += row_sum(widened(tl.load(row + col, mask=col < cols, other=0.0))[None, :])
    shift = tl.div_rn(total.to(tl.float32), tl.cast(cols, tl.float32))
    deviations = tl.zeros([1], tl.float64)
    squares = tl.zeros([1], tl.float64)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        x = widened(tl.load(row + col, mask=col < cols, other=0.0))[None, :]
        deviation = tl.where((col < cols)[None, :], x - shift[:, None], 0.0)
        if CENTERED:
            deviations += row_sum(deviation)
        squares += row_sum(deviation * deviation)
    quick, mean_tail, rest, rest_tail = _quick_statistics(shift, deviations, squares, cols, eps_hi, eps_lo, CENTERED)
    scale = tl.full([1], 1.0, tl.float32)
    mean = shift
    if any_true(quick == 0):
        wide_total = tl.zeros([1], tl.float64)
        if CENTERED:
            for first in range(0, cols, COLS):
                col = first + tl.arange(0, COLS)
                wide_total += tl.sum(
                    widened(tl.load(row + col, mask=col < cols, other=0.0)).to(tl.float64)[None, :], axis=1
                )
        wide_mean = wide_total / tl.cast(cols, tl.float64)
        wide_squares = tl.zeros([1], tl.float64)
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS)
            x = widened(tl.load(row + col, mask=col < cols, other=0.0)).to(tl.float64)[None, :]
            wide = tl.where((col < cols)[None, :], x - wide_mean[:, None], 0.0)
            wide_squares += tl.sum(wide * wide, axis=1)
        scale, mean, mean_tail, rest, rest_tail = _wide_statistics(
            wide_mean, wide_squares, cols, eps_hi, eps_lo, CENTERED
        )
    return scale, mean, mean_tail, rest, rest_tail


@triton.jit
def _normalize(x, scale, mean, mean_tail, rest, rest_tail, CENTERED: tl.constexpr, PRECISE: tl.constexpr):
    """xhat. PRECISE carries what subtractions round: the forward of float32; for the rest float is enough."""
    scaled = x * scale
    if CENTERED:
        if PRECISE:
            coarse, lost = two_sum(scaled, -mean)
            deviation, lost_too = two_sum(coarse, -mean_tail)
            return fma(deviation, rest, fma(deviation, rest_tail, (lost + lost_too) * rest))
        return fma(scaled - mean, rest, -mean_tail * rest)
    if PRECISE:
        return fma(scaled, rest, scaled * rest_tail)
    return scaled * rest


# ---- forward ----


@triton.jit
def _load_row(parameter, col, cols, otherwise: tl.constexpr):
    """[1, C] of a weight or a bias; where there is none, `otherwise`."""
    if parameter is None:
        row = tl.full([1, col.shape[0]], otherwise, tl.float32)
    else:
        row = widened(tl.load(parameter + col, mask=col < cols, other=otherwise))[None, :]
    return row


@triton.jit
def _outputs(x, weight, bias, scale, mean, mean_tail, rest, rest_tail, CENTERED: tl.constexpr, PRECISE: tl.constexpr):
    xhat = _normalize(
        x, scale[:, None], mean[:, None], mean_tail[:, None], rest[:, None], rest_tail[:, None], CENTERED, PRECISE
    )
    return fma(xhat, weight, bias) if CENTERED else xhat * weight


@triton.jit
def norm_forward_kernel(
    input, input_stride, residual, residual_stride, weight, bias, total, output, rows, cols, eps_hi, eps_lo,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    at = row[:, None] * cols + col[None, :]
    x = widened(tl.load(input + row[:, None] * input_stride + col[None, :], mask=inside, other=0.0))
    if residual is not None:
        y = widened(tl.load(residual + row[:, None] * residual_stride + col[None, :], mask=inside, other=0.0))
        rounded = narrowed(x + y, total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        x = widened(rounded)
    scale, mean, mean_tail, rest, rest_tail = _statistics(x, inside, cols, eps_hi, eps_lo, CENTERED)
    y = _outputs(
        x, _load_row(weight, col, cols, 1.0), _load_row(bias, col, cols, 0.0), scale, mean, mean_tail, rest, rest_tail,
        CENTERED, output.dtype.element_ty == tl.float32,
    )  # fmt: skip
    tl.store(output + at, narrowed(y, output.dtype.element_ty), mask=inside)


@triton.jit
def norm_streamed_forward_kernel(
    input, input_stride, residual, residual_stride, weight, bias, total, output, cols, eps_hi, eps_lo,
    CENTERED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = input + row * input_stride
    if residual is not None:
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS)
            x = widened(tl.load(source + col, mask=col < cols, other=0.0))
            y = widened(tl.load(residual + row * residual_stride + col, mask=col < cols, other=0.0))
            tl.store(total + row * cols + col, narrowed(x + y, total.dtype.element_ty), mask=col < cols)
        source = total + row * cols
        tl.debug_barrier()  # threads read what others wrote
    scale, mean, mean_tail, rest, rest_tail = _streamed_statistics(source, cols, eps_hi, eps_lo, CENTERED, COLS)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        x = widened(tl.load(source + col, mask=col < cols, other=0.0))[None, :]
        y = _outputs(
            x, _load_row(weight, col, cols, 1.0), _load_row(bias, col, cols, 0.0), scale, mean, mean_tail, rest,
            rest_tail, CENTERED, output.dtype.element_ty == tl.float32,
        )  # fmt: skip
        tl.store(output + row * cols + col[None, :], narrowed(y, output.dtype.element_ty), mask=(col < cols)[None, :])


# ---- backward ----


@triton.jit
def _mean_in_float(total, cols):
    """A double sum over a row divided by its length."""
    hi, lo = to_pair(total)
    hi, lo = divide_pair(hi, lo, tl.cast(cols, tl.float32))
    return hi + lo


@triton.jit
def _projected(g, xhat, mean_g, mean_g_xhat, rest, scale, past, HAS_PAST: tl.constexpr, CENTERED: tl.constexpr):
    """grad_input of [R, C] elements; g is grad_output * weight, rounded as in its mean: one element has gradient 0."""
    if CENTERED:
        g = g - mean_g[:, None]
    projected = fma(-xhat, mean_g_xhat[:, None], g) * rest[:, None]
    if HAS_PAST:
        return fma(projected, scale[:, None], past)
    return projected * scale[:, None]


@triton.jit
def norm_backward_kernel(
    grad_output, grad_output_stride, grad_sum, grad_sum_stride, input, input_stride, weight, grad_input, weight_lines,
    bias_lines, rows, cols, chunks, eps_hi, eps_lo, CENTERED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, COLS)
    w = _load_row(weight, col, cols, 1.0)
    weight_part = tl.zeros([ROWS, COLS], tl.float32)
    bias_part = tl.zeros([ROWS, COLS], tl.float32)
    end = rows * (chunk + 1) // chunks
    for first in range(rows * chunk // chunks, end, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row[:, None] < end) & (col[None, :] < cols)
        x = widened(tl.load(input + row[:, None] * input_stride + col[None, :], mask=inside, other=0.0))
        dy = widened(tl.load(grad_output + row[:, None] * grad_output_stride + col[None, :], mask=inside, other=0.0))
        scale, mean, mean_tail, rest, rest_tail = _statistics(x, inside, cols, eps_hi, eps_lo, CENTERED)
        xhat = _normalize(
            x, scale[:, None], mean[:, None], mean_tail[:, None], rest[:, None], rest_tail[:, None], CENTERED, False
        )
        xhat = tl.where(inside, xhat, 0.0)
        if weight_lines is not None:
            weight_part = fma(dy, xhat, weight_part)
        if bias_lines is not None:
            bias_part += dy
        if grad_input is not None:
            g = dy * w
            mean_g = _mean_in_float(row_sum(g), cols) if CENTERED else scale
            mean_g_xhat = _mean_in_float(row_sum(g * xhat), cols)
            past = g
            if grad_sum is not None:
                past = widened(
                    tl.load(grad_sum + row[:, None] * grad_sum_stride + col[None, :], mask=inside, other=0.0)
                )
            dx = _projected(g, xhat, mean_g, mean_g_xhat, rest, scale, past, grad_sum is not None, CENTERED)
            tl.store(
                grad_input + row[:, None] * cols + col[None, :], narrowed(dx, grad_input.dtype.element_ty), mask=inside
            )
    if weight_lines is not None:
        tl.store(weight_lines + chunk * cols + col, tl.sum(weight_part, axis=0), mask=col < cols)
    if bias_lines is not None:
        tl.store(bias_lines + chunk * cols + col, tl.sum(bias_part, axis=0), mask=col < cols)


ROW_VALUES = tl.constexpr(4)  # of a streamed row, for the sums over rows: scale, mean, mean_tail, rest


@triton.jit
def norm_streamed_backward_kernel(
    grad_output, grad_output_stride, grad_sum, grad_sum_stride, input, input_stride, weight, grad_input, row_values,
    cols, eps_hi, eps_lo, CENTERED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """First pass over rows that no program holds: their gradients, and how they are normalised."""
    row = tl.program_id(0).to(tl.int64)
    source = input + row * input_stride
    scale, mean, mean_tail, rest, rest_tail = _streamed_statistics(source, cols, eps_hi, eps_lo, CENTERED, COLS)
    one = tl.arange(0, 1)
    tl.store(row_values + row * ROW_VALUES + one, scale)
    tl.store(row_values + row * ROW_VALUES + 1 + one, mean)
    tl.store(row_values + row * ROW_VALUES + 2 + one, mean_tail)
    tl.store(row_values + row * ROW_VALUES + 3 + one, rest)
    if grad_input is not None:
        sum_g = tl.zeros([1], tl.float64)
        sum_g_xhat = tl.zeros([1], tl.float64)
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS)
            x = widened(tl.load(source + col, mask=col < cols, other=0.0))[None, :]
            dy = widened(tl.load(grad_output + row * grad_output_stride + col, mask=col < cols, other=0.0))[None, :]
            xhat = _normalize(x, scale[:, None], mean[:, None], mean_tail[:, None], rest[:, None], rest_tail[:, None],
                              CENTERED, False)  # fmt: skip
            g = dy * _load_row(weight, col, cols, 1.0)
            sum_g += row_sum(g)
            sum_g_xhat += row_sum(g * tl.where((col < cols)[None, :], xhat, 0.0))
        mean_g = _mean_in_float(sum_g, cols)
        mean_g_xhat = _mean_in_float(sum_g_xhat, cols)
        for first in range(0, cols, COLS):
            col = first + tl.arange(0, COLS)
            x = widened(tl.load(source + col, mask=col < cols, other=0.0))[None, :]
            dy = widened(tl.load(grad_output + row * grad_output_stride + col, mask=col < cols, other=0.0))[None, :]
            xhat = _normalize(x, scale[:, None], mean[:, None], mean_tail[:, None], rest[:, None], rest_tail[:, None],
                              CENTERED, False)  # fmt: skip
            g = dy * _load_row(weight, col, cols, 1.0)
            past = g
            if grad_sum is not None:
                past = widened(tl.load(grad_sum + row * grad_sum_stride + col, mask=col < cols, other=0.0))[None, :]
            dx = _projected(g, xhat, mean_g, mean_g_xhat, rest, scale, past, grad_sum is not None, CENTERED)
            tl.store(
                grad_input + row * cols + col[None, :],
                narrowed(dx, grad_input.dtype.element_ty),
                mask=(col < cols)[None, :],
            )


@triton.jit
def norm_streamed_lines_kernel(
    grad_output, grad_output_stride, input, input_stride, row_values, weight_lines, bias_lines, rows, cols, chunks,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Second pass: COLS columns of the rows of one chunk."""
    chunk = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    weight_part = tl.zeros([ROWS, COLS], tl.float32)
    bias_part = tl.zeros([ROWS, COLS], tl.float32)
    end = rows * (chunk + 1) // chunks
    for first in range(rows * chunk // chunks, end, ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (row[:, None] < end) & (col[None, :] < cols)
        x = widened(tl.load(input + row[:, None] * input_stride + col[None, :], mask=inside, other=0.0))
        dy = widened(tl.load(grad_output + row[:, None] * grad_output_stride + col[None, :], mask=inside, other=0.0))
        values = row_values + row * ROW_VALUES
        scale = tl.load(values, mask=row < end, other=0.0)[:, None]
        mean = tl.load(values + 1, mask=row < end, other=0.0)[:, None]
        mean_tail = tl.load(values + 2, mask=row < end, other=0.0)[:, None]
        rest = tl.load(values + 3, mask=row < end, other=0.0)[:, None]
        if weight_lines is not None:
            xhat = _normalize(x, scale, mean, mean_tail, rest, rest, CENTERED, False)
            weight_part = fma(dy, tl.where(inside, xhat, 0.0), weight_part)
        if bias_lines is not None:
            bias_part += dy
    if weight_lines is not None:
        tl.store(weight_lines + chunk * cols + col, tl.sum(weight_part, axis=0), mask=col < cols)
    if bias_lines is not None:
        tl.store(bias_lines + chunk * cols + col, tl.sum(bias_part, axis=0), mask=col < cols)


# ---- host ----

_MOST_CHUNKS = 512  # keep every GPU of today busy, and cost large batches a few percent of traffic
_LEAST_TILES = 4  # of rows to a chunk: each chunk writes lines of partial sums
FORWARD_TILES = with_rows()
# Of the gradients: x, grad_output and two sums over rows stay in registers.
GRADIENT_TILES = with_rows(RowTile(8192, 1, Launch(16, spill_bytes=64)))
FORWARD_STREAMED, GRADIENT_STREAMED = STREAMED, STREAMED
STREAMED_LINES = RowTile(256, 8, Launch(8))  # of the second pass over long rows


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else on_boundary(tensor.contiguous())


def _shape(input: torch.Tensor, ndim: int) -> tuple[int, int]:
    """(rows, cols)"""
    cols = 1
    for size in input.shape[input.dim() - ndim :]:
        cols *= size
    return (input.numel() // cols if cols else 0), cols


def norm_forward(input, residual, weight, bias, ndim, eps, centered):
    """(output, sum); sum is None without a residual."""
    output = input.new_empty(input.shape)
    total = None if residual is None else input.new_empty(input.shape)
    rows, cols = _shape(input, ndim)
    if output.numel() == 0:
        return output, total
    input, input_stride = as_rows(input, ndim, cols)
    residual, residual_stride = as_rows(residual, ndim, cols)
    eps_hi, eps_lo = split(eps)
    operands = dict(
        input=input, input_stride=input_stride, residual=residual, residual_stride=residual_stride,
        weight=_contiguous(weight), bias=_contiguous(bias), total=total, output=output, cols=cols, eps_hi=eps_hi,
        eps_lo=eps_lo, CENTERED=centered,
    )  # fmt: skip
    tile = row_tile(cols, rows, architecture_of(input.device), FORWARD_TILES)
    if tile is None:
        tile = taken(FORWARD_STREAMED)
        launch(norm_streamed_forward_kernel, (rows,), tile.launch, input.device, COLS=tile.cols, **operands)
    else:
        grid = (triton.cdiv(rows, tile.rows),)
        launch(
            norm_forward_kernel, grid, tile.launch, input.device, rows=rows, ROWS=tile.rows, COLS=tile.cols, **operands
        )
    return output, total


def norm_backward(grad_output, grad_sum, input, weight, bias, ndim, eps, need_input, need_weight, need_bias, centered):
    """(grad_input, grad_weight, grad_bias); one that is not needed has 0 elements."""
    parameter = weight if weight is not None else bias
    dtype = torch.float32 if parameter is None else parameter.dtype
    shape = input.shape[input.dim() - ndim :]
    grad_input = input.new_empty(input.shape if need_input else (0,))
    grad_weight, grad_bias = (
        input.new_empty(shape if need else (0,), dtype=dtype) for need in (need_weight, need_bias)
    )
    rows, cols = _shape(input, ndim)
    if cols == 0:
        return grad_input, grad_weight, grad_bias
    input, input_stride = as_rows(input, ndim, cols)
    grad_output, grad_output_stride = as_rows(grad_output, ndim, cols)
    grad_sum, grad_sum_stride = as_rows(grad_sum, ndim, cols)
    eps_hi, eps_lo = split(eps)
    tile = row_tile(cols, rows, architecture_of(input.device), GRADIENT_TILES)
    lines_tile = taken(STREAMED_LINES)
    rows_at_once = lines_tile.rows if tile is None else tile.rows
    chunks = min(_MOST_CHUNKS, triton.cdiv(rows, _LEAST_TILES * rows_at_once))
    weight_lines, bias_lines = (
        input.new_empty((chunks, cols), dtype=torch.float32) if need else None for need in (need_weight, need_bias)
    )
    device = input.device
    operands = dict(
        grad_output=grad_output, grad_output_stride=grad_output_stride, input=input, input_stride=input_stride,
        cols=cols, CENTERED=centered,
    )  # fmt: skip
    gradient = dict(
        grad_sum=grad_sum, grad_sum_stride=grad_sum_stride, weight=_contiguous(weight),
        grad_input=grad_input if need_input else None, eps_hi=eps_hi, eps_lo=eps_lo,
    )  # fmt: skip
    lines = dict(weight_lines=weight_lines, bias_lines=bias_lines, rows=rows, chunks=chunks)
    if tile is not None:
        launch(
            norm_backward_kernel, (chunks,), tile.launch, device, ROWS=tile.rows, COLS=tile.cols,
            **operands, **gradient, **lines,
        )  # fmt: skip
    else:
        row_values = input.new_empty((rows, ROW_VALUES.value), dtype=torch.float32)
        tile = taken(GRADIENT_STREAMED)
        launch(
            norm_streamed_backward_kernel, (rows,), tile.launch, device, row_values=row_values, COLS=tile.cols,
            **operands, **gradient,
        )  # fmt: skip
        if need_weight or need_bias:
            grid = (triton.cdiv(cols, lines_tile.cols), chunks)
            launch(
                norm_streamed_lines_kernel, grid, lines_tile.launch, device, row_values=row_values,
                ROWS=lines_tile.rows, COLS=lines_tile.cols, **operands, **lines,
            )  # fmt: skip
    for needed, part, total in ((need_weight, weight_lines, grad_weight), (need_bias, bias_lines, grad_bias)):
        if needed:
            add_lines(part, total)
    return grad_input, grad_weight, grad_bias
