"""GELU of floats beyond its segments, 63/16 <= t = |x|: kernels/cpu/gelu_far.h says how, in the same operations.

An exponential times a smooth factor; the exponential's argument is as large as 100 and carried with what its rounding
took, its power of two is applied last, so that a subnormal result is rounded once.
"""

import triton
import triton.language as tl

from .exact import split, two_product, two_sum
from .exp import exp_parts, scale_by_power
from .versions import fma


def _floats(text):
    return [tl.constexpr(float.fromhex(word)) for word in text.split()]


CUT_ERF, CUT_TANH = tl.constexpr(18.0), tl.constexpr(12.5)  # beyond it every tail is below the last subnormal
# Minimax polynomials in 1 / t^2.
_T0, _T1, _T2, _T3, _T4, _T5, _T6 = _floats(
    "0x1.988452p-2 -0x1.9881bep-2 0x1.31ef26p+0 -0x1.756668p+2 0x1.17965p+5 -0x1.6d9bf2p+7 0x1.02efc2p+9"
)
_S0, _S1, _S2, _S3, _S4, _S5, _S6 = _floats(
    "0x1.988454p-2 -0x1.98858p-2 0x1.990c86p-2 -0x1.38681p+0 0x1.955562p+2 -0x1.265daap+5 0x1.f6810ep+6"
)
# z = t (c0 + c1 t^2): 2 sqrt(2/pi) and 0.044715 times that; and 3 c1 of z'.
_C0, _C1 = float.fromhex("0x1.9884533d43651p+0"), float.fromhex("0x1.2444f2a4d8b4bp-4")


def _pair(x):
    return [tl.constexpr(part) for part in split(x)]


_C0_HI, _C0_LO = _pair(_C0)
_C1_HI, _C1_LO = _pair(_C1)
_RATE_HI, _RATE_LO = _pair(3 * _C1)


@triton.jit
def _times_exponential(a, excess, power):
    """a * (1 + excess) * 2^power: one FMA, where a rounded exponential would be rounded once more."""
    return scale_by_power(fma(a, excess, a), power)


@triton.jit
def _gaussian(square_hi, square_lo):
    return exp_parts(square_hi * -0.5, square_lo * -0.5)


@triton.jit
def erf_tail(t):
    """t Phi(-t)"""
    square_hi, square_lo = two_product(t, t)
    excess, power = _gaussian(square_hi, square_lo)
    r = tl.div_rn(1.0, square_hi)
    p = fma(r, _T6, _T5)
    p = fma(p, r, _T4)
    p = fma(p, r, _T3)
    p = fma(p, r, _T2)
    p = fma(p, r, _T1)
    return _times_exponential(fma(p, r, _T0), excess, power)


@triton.jit
def erf_slope(t, factor):
    """(Phi(-t) - t phi(t)) * factor"""
    square_hi, square_lo = two_product(t, t)
    excess, power = _gaussian(square_hi, square_lo)
    r = tl.div_rn(1.0, square_hi)
    p = fma(r, _S6, _S5)
    p = fma(p, r, _S4)
    p = fma(p, r, _S3)
    p = fma(p, r, _S2)
    p = fma(p, r, _S1)
    a = -t * fma(p, r, _S0)
    return scale_by_power(fma(a, excess, a) * factor, power)


@triton.jit
def _decay(t, square_hi, square_lo):
    """exp(-z) as exp_parts gives it."""
    cubic_hi, cubic_error = two_product(square_hi, tl.full(t.shape, _C1_HI, tl.float32))
    cubic_lo = fma(square_hi, _C1_LO, fma(square_lo, _C1_HI, cubic_error))
    rate_hi, rate_error = two_sum(tl.full(t.shape, _C0_HI, tl.float32), cubic_hi)
    rate_lo = rate_error + (cubic_lo + _C0_LO)
    z_hi, z_lo = two_product(t, rate_hi)
    return exp_parts(-z_hi, -fma(t, rate_lo, z_lo))


@triton.jit
def tanh_tail(t):
    """t Phi(-t) of the tanh form."""
    square_hi, square_lo = two_product(t, t)
    excess, power = _decay(t, square_hi, square_lo)
    decayed = scale_by_power(1.0 + excess, power)
    return _times_exponential(fma(-t, decayed, t), excess, power)


@triton.jit
def tanh_slope(t, factor):
    """(Phi(-t) - t phi(t)) * factor of the tanh form."""
    square_hi, square_lo = two_product(t, t)
    excess, power = _decay(t, square_hi, square_lo)
    decayed = scale_by_power(1.0 + excess, power)
    inner = fma(square_hi, _RATE_HI, fma(square_hi, _RATE_LO, fma(square_lo, _RATE_HI, _C0_HI)))
    rate = t * inner
    a = -fma(t, inner, -fma(decayed, rate + rate - 1.0, 1.0))
    return scale_by_power(fma(a, excess, a) * factor, power)
