"""exp of float32 from tl.fma, as kernels/exp_constants.h and kernels/cuda/exp.cuh have it: the same bits as the CPU.

tl.exp is ex2.approx on a GPU, 2 ULP, and another function in the interpreter.

| function                     | range of x   | error   | special values                                 |
|------------------------------|--------------|---------|------------------------------------------------|
| exp_nonpositive(x, residual) | (-inf, 70]   | 1 ULP   | exp(-inf) = 0; |residual| <= 1e-4 and finite   |
| exp_parts(x, residual)       | [-170, 170]  | 2^-28   | a power of two apart; |residual| <= 1e-4       |
"""

import triton
import triton.language as tl

from .versions import fma

LOG2E = tl.constexpr(float.fromhex("0x1.715476p+0"))
LN2_HI = tl.constexpr(float.fromhex("0x1.62e400p-1"))  # 15 bits: n * LN2_HI is exact for |n| < 2^9
LN2_LO = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
LOWEST = tl.constexpr(float.fromhex("-0x1.a56ef8p+6"))  # -152 ln 2: rounds to 0, and so does everything below
INTEGER = tl.constexpr(float.fromhex("0x1.8p23"))  # adding it rounds to an integer, found in the low bits of the sum
INTEGER_BITS = tl.constexpr(0x4B400000)
# (e^r - 1) / r = 1 + Q1 r + ... + Q5 r^5 for |r| <= ln 2 / 2, relative error of e^r 2^-28.
Q1 = tl.constexpr(float.fromhex("0x1.fffffcp-2"))
Q2 = tl.constexpr(float.fromhex("0x1.555492p-3"))
Q3 = tl.constexpr(float.fromhex("0x1.5558f2p-5"))
Q4 = tl.constexpr(float.fromhex("0x1.1239e2p-7"))
Q5 = tl.constexpr(float.fromhex("0x1.6a243ap-10"))
# The low bits of the rounding sum are the exponent field of 2^(n + 25); 2^-25 comes last, so that a subnormal result is
# rounded once.
_EXPONENT = tl.constexpr(float.fromhex("0x1.8p23") + 127.0 + 25.0)
_LAST = tl.constexpr(2.0**-25)


@triton.jit
def _quotient(r):
    """(e^r - 1) / r."""
    q = fma(r, Q5, Q4)
    q = fma(q, r, Q3)
    q = fma(q, r, Q2)
    q = fma(q, r, Q1)
    return fma(q, r, 1.0)


@triton.jit
def _reduced(x, n, residual):
    """What is left of x + residual after taking n ln 2 out."""
    return fma(-n, LN2_LO, fma(-n, LN2_HI, x)) + residual


@triton.jit
def exp_nonpositive(x, residual):
    """e^(x + residual)."""
    x = tl.maximum(x, LOWEST)
    shifted = fma(x, LOG2E, _EXPONENT)
    r = _reduced(x, shifted - _EXPONENT, residual)
    fraction = fma(_quotient(r), r, 1.0)
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return fraction * power * _LAST


@triton.jit
def exp_parts(x, residual):
    """(excess, power): e^(x + residual) = (1 + excess) * 2^power, power an int32."""
    shifted = fma(x, LOG2E, INTEGER)
    r = _reduced(x, shifted - INTEGER, residual)
    return _quotient(r) * r, shifted.to(tl.int32, bitcast=True) - INTEGER_BITS


@triton.jit
def scale_by_power(a, n):
    """a * 2^n, |n| <= 252: more than one float holds, so two factors. The first is exact where a is near 1."""
    half = n >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    return a * first * second
