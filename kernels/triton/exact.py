"""Sums and products of floats with what rounding took from them, and sums of rows: kernels/cuda/exact.cuh in Triton.

A pair is two float32 tensors, hi + lo, hi the rounded value: 48 bits, where double is 64 times slower than float on
most GPUs. Kernels are compiled with enable_fp_fusion=False: an FMA is written.
"""

import struct

import triton
import triton.language as tl

from .versions import fma, narrowed


def split(x: float) -> tuple[float, float]:
    """A Python float as two float32 numbers; for hosts."""
    hi = struct.unpack("f", struct.pack("f", x))[0]
    return hi, struct.unpack("f", struct.pack("f", x - hi))[0]


SHORT_SUM = tl.constexpr(8)  # floats that are summed in float before their sum goes to double


@triton.jit
def is_finite(x):
    """Of floats and doubles."""
    return x - x == 0


@triton.jit
def two_sum(a, b):
    """Exact for every pair of finite floats whose sum is finite."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def quick_two_sum(a, b):
    """The same for |a| >= |b|."""
    total = a + b
    return total, b - (total - a)


@triton.jit
def two_product(a, b):
    """Exact where the product's residual does not underflow."""
    product = a * b
    return product, fma(a, b, -product)


@triton.jit
def add_pairs(a_hi, a_lo, b_hi, b_lo):
    """To about 2^-46 of the larger operand."""
    hi, lo = two_sum(a_hi, b_hi)
    return quick_two_sum(hi, lo + (a_lo + b_lo))


@triton.jit
def multiply_pairs(a_hi, a_lo, b_hi, b_lo):
    hi, lo = two_product(a_hi, b_hi)
    return quick_two_sum(hi, fma(a_hi, b_lo, fma(a_lo, b_hi, lo)))


@triton.jit
def divide_pair(a_hi, a_lo, b):
    """By a float."""
    quotient = tl.div_rn(a_hi, b)
    return quick_two_sum(quotient, tl.div_rn(fma(-quotient, b, a_hi) + a_lo, b))


@triton.jit
def inverse_sqrt(x_hi, x_lo):
    """1 / sqrt(x) as a pair: the rounded one and a Newton step from it. No step from 0 or infinity."""
    root = tl.div_rn(1.0, tl.sqrt_rn(x_hi))
    square_hi, square_lo = two_product(root, root)
    one_hi, one_lo = two_product(x_hi, square_hi)
    residual = ((1.0 - one_hi) - one_lo) - fma(x_hi, square_lo, x_lo * square_hi)
    step = root * residual * 0.5
    return root, tl.where(is_finite(step), step, 0.0)


@triton.jit
def to_pair(x):
    """A double as two floats."""
    hi = x.to(tl.float32)
    return hi, tl.where(is_finite(hi), (x - hi.to(tl.float64)).to(tl.float32), 0.0)


@triton.jit
def row_sum(x):
    """Sums of the rows of [R, C] floats, in double: float over SHORT_SUM neighbours, double over those sums.

    One double per eight floats costs little even where double is 64 times slower. The tree depends on C alone.
    """
    short = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // SHORT_SUM, SHORT_SUM]), axis=2)
    return tl.sum(short.to(tl.float64), axis=1)


@triton.jit
def row_max_or_nan(x):
    """The largest of each row of [R, C]; a NaN where there is one."""
    largest = tl.max(x, axis=1)
    return tl.where(tl.max(tl.where(x != x, 1, 0), axis=1) > 0, float("nan"), largest)


@triton.jit
def any_true(condition):
    """Whether any of a 1-D tensor of booleans is true: a scalar to branch on."""
    return tl.max(tl.where(condition, 1, 0), axis=0) > 0


@triton.jit
def round_to_odd(x):
    """A double as the float that a second rounding, to 16 bits, takes where one rounding would have gone."""
    nearest = x.to(tl.float32)
    bits = nearest.to(tl.int32, bitcast=True)
    too_large = tl.where(tl.abs(nearest.to(tl.float64)) > tl.abs(x), 1, 0)
    odd = ((bits - too_large) | 1).to(tl.float32, bitcast=True)
    return tl.where((nearest.to(tl.float64) == x) | (x != x), nearest, odd)


@triton.jit
def store_double(pointers, x, mask):
    """Stores a double rounded once to the pointers' type."""
    if pointers.dtype.element_ty == tl.float32:
        tl.store(pointers, x.to(tl.float32), mask=mask)
    else:
        tl.store(pointers, narrowed(round_to_odd(x), pointers.dtype.element_ty), mask=mask)
