// log of sixteen floats, <= 1 ULP for normal x > 0; NaN stays. Nothing is promised of other x.
//
// Policy: x = m 2^n with m in [sqrt(1/2), sqrt(2)) and f = m - 1 exact; log m = f - f^2 / 2 + f^3 p(f), p a polynomial of
// degree 8, and n ln 2 comes in two parts, of which the larger has so few bits that its product with n is exact.
#pragma once

#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

TRANSFUSE_INLINE f32 log(f32 x) {
  const i32 root_half = bits(set1(0x1.6a09e6p-1f));  // exponents count from it, so that f is small on both sides of 1
  const i32 above = bits(x) - root_half;
  const f32 n = to_float(shift_right_signed<23>(above));
  const f32 f = from_bits((above & set1i(0x7FFFFF)) + root_half) - set1(1.0f);
  f32 p = set1(7.0376836292e-2f);
  p = fma(p, f, set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  const f32 square = f * f;
  const f32 tail = fma(n, set1(-2.12194440e-4f), fma(square, set1(-0.5f), f * square * p));
  const f32 result = fma(n, set1(0.693359375f), f + tail);
  return select(isnan(x), x, result);
}

}  // namespace transfuse::cpu::TRANSFUSE_ISA
