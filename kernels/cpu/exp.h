// exp of sixteen floats (and of eight doubles), the one that every CPU row kernel shares.
//
// | function                       | range of x     | error    | special values                                  |
// |--------------------------------|----------------|----------|-------------------------------------------------|
// | exp(x)                         | (-inf, 88.72]  | <= 1 ULP | exp(0) = 1, exp(-inf) = 0, above inf, NaN stays |
// | exp(x, residual)               | (-inf, 88.72]  | <= 1 ULP | |residual| <= 1e-4 and finite                   |
// | exp_times_2_25(x)              | (-inf, 60]     | 2^-18    | for results rounded to 16 bits; NaN stays       |
// | RowExponential(m)(x, residual) | [m - 104.5, m] | <= 1.2   | e^x over a power of two of m's; |m| <= 1024     |
// | exp(f64 x)                     | [-690, 690]    | 2^-40    | for results rounded to float later; NaN stays   |
// | exp_full(f64 x[, residual])    | (-inf, 709.78] | <= 1 ULP | of double; as exp(x); |residual| <= 2^-10       |
//
// The bounds hold for every float of the range, subnormal results included (measured over all of them: 0.895 ULP).
// exp_full needs no FMA for its bound (measured on 500,000 points against 160-bit arithmetic, with FMA and without:
// 0.76 ULP of double, just above and in the subnormals). The doubles' functions take `wide` too.
//
// Policy: x = n ln 2 + r with |r| <= ln 2 / 2, where n ln2_hi is exact; e^r = 1 + r (1 + r q(r)), q a minimax
// polynomial of degree 4 for floats (relative error 2^-28), of degree 10 in exp_full (2^-63). The power of two is applied
// last and only its final factor rounds, so a subnormal result is rounded once. A NaN passes through every
// multiplication; no bit of it is reinterpreted.
#pragma once

#include "exp_constants.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

// (e^r - 1) / r for |r| <= ln 2 / 2.
TRANSFUSE_INLINE f32 exp_quotient(f32 r) {
  f32 q = set1(exp_q5);
  q = fma(q, r, set1(exp_q4));
  q = fma(q, r, set1(exp_q3));
  q = fma(q, r, set1(exp_q2));
  q = fma(q, r, set1(exp_q1));
  return fma(q, r, set1(1.0f));
}

// e^r for |r| <= ln 2 / 2.
TRANSFUSE_INLINE f32 exp_polynomial(f32 r) { return fma(exp_quotient(r), r, set1(1.0f)); }

// What is left of x + residual after taking n ln 2 out.
TRANSFUSE_INLINE f32 exp_reduced(f32 x, f32 n, f32 residual) {
  return fnma(n, set1(exp_ln2_lo), fnma(n, set1(exp_ln2_hi), x)) + residual;
}

// e^r for that r.
TRANSFUSE_INLINE f32 exp_fraction(f32 x, f32 n, f32 residual) {
  return exp_polynomial(exp_reduced(x, n, residual));
}

// a * (1 + excess) * 2^power for any a: one FMA, where a rounded e^r would be rounded once more.
struct FloatExponential {
  f32 excess;
  i32 power;
};

// e^(x + residual), |x| <= 170.
TRANSFUSE_INLINE FloatExponential exp_parts(f32 x, f32 residual) {
  const f32 shifted = fma(x, set1(exp_log2e), set1(exp_integer));
  const f32 r = exp_reduced(x, shifted - set1(exp_integer), residual);
  return {exp_quotient(r) * r, bits(shifted) - bits(set1(exp_integer))};
}

// a * 2^n, |n| <= 252: more than one float holds, so two factors. The first is exact where a is near 1.
TRANSFUSE_INLINE f32 scale_by_power(f32 a, i32 n) {
  const i32 half = shift_right_signed<1>(n), bias = set1i(127);
  return (a * from_bits(shift_left<23>(half + bias))) * from_bits(shift_left<23>(n - half + bias));
}

TRANSFUSE_INLINE f32 exp(f32 x, f32 residual) {
  x = min(set1(exp_highest), max(set1(exp_lowest), x));  // in this order a NaN is kept
  const f32 shifted = fma(x, set1(exp_log2e), set1(exp_integer));
  const f32 fraction = exp_fraction(x, shifted - set1(exp_integer), residual);
  return scale_by_power(fraction, bits(shifted) - bits(set1(exp_integer)));
}

// e^x * 2^25, never subnormal: for a caller whose next factor takes the power of two along. As exp_nonpositive, with a
// polynomial of two terms less.
TRANSFUSE_INLINE f32 exp_times_2_25(f32 x) {
  // The exponent field of 2^(n + 25) comes straight from the low bits of the rounding sum. At exp_lowest n is -152 and
  // the field 0: a factor of 0, where an underflow to 0 would cost a hundred cycles.
  const f32 integer = set1(exp_integer + 127.0f + 25.0f);
  x = max(set1(exp_lowest), x);
  const f32 shifted = fma(x, set1(exp_log2e), integer);
  const f32 r = fnma(shifted - integer, set1(0x1.62e430p-1f), x);
  f32 p = set1(0x1.541482p-5f);
  p = fma(p, r, set1(0x1.57cf54p-3f));
  p = fma(p, r, set1(0x1.0003f6p-1f));
  p = fma(p, r, set1(0x1.fffba6p-1f));
  p = fma(p, r, set1(1.0f));
  return p * from_bits(shift_left<23>(bits(shifted)));
}

// For the ratios of exponentials in a row: e^(x + residual) * 2^(25 - p), p the power of two in e^largest. The powers
// are subtracted as integers: there is no x - largest to round. Below `lowest`, where ratios round to 0, the result is
// any number.
struct RowExponential {
  f32 integer, lowest;

  explicit RowExponential(float largest) : lowest(set1(largest - 104.5f)) {
    const float power = (largest * exp_log2e + exp_integer) - exp_integer;
    integer = set1(exp_integer + 127.0f + 25.0f - power);
  }
  TRANSFUSE_INLINE f32 operator()(f32 x, f32 residual) const {
    const f32 shifted = fma(x, set1(exp_log2e), integer), n = shifted - integer;
    // 13 bits of ln 2, so that n * ln2_hi is exact for |n| < 2^11, and the rest.
    const f32 r = fnma(n, set1(0x1.0bfbe8p-15f), fnma(n, set1(0x1.62ep-1f), x)) + residual;
    return exp_polynomial(r) * from_bits(shift_left<23>(bits(shifted)));
  }
};

TRANSFUSE_INLINE f32 exp(f32 x) { return exp(x, zero()); }

TRANSFUSE_INLINE f64 exp(f64 x) {
  const f64 integer = set1d(0x1.8p52);  // adding it rounds to an integer
  const f64 n = fma(x, set1d(0x1.71547652b82fep+0), integer) - integer;
  const f64 r = fnma(n, set1d(0x1.62e42fefa39efp-1), x);
  f64 p = set1d(0x1.9eda9448300fep-16);
  p = fma(p, r, set1d(0x1.a1a81e1776288p-13));
  p = fma(p, r, set1d(0x1.6c18b3414f00ap-10));
  p = fma(p, r, set1d(0x1.111082adb52aap-7));
  p = fma(p, r, set1d(0x1.5555540506dfbp-5));
  p = fma(p, r, set1d(0x1.555555a082e91p-3));
  p = fma(p, r, set1d(0x1.0000000087fb5p-1));
  p = fma(p, r, set1d(0x1.ffffffffd5628p-1));
  p = fma(p, r, set1d(0x1.ffffffffff7a2p-1));
  return ldexp(p, n);
}

// ---- double to the last place ----

constexpr double exp_full_lowest = -800.0;                 // rounds to 0, times any factor up to 1e22 too
constexpr double exp_full_highest = 710.0;                 // overflows, and so does everything above
constexpr double exp_full_residual = 0x1p-10;              // the largest
constexpr double exp_full_ln2_hi = 0x1.62e42fefa3000p-1;   // 41 bits: n * ln2_hi is exact for |n| < 2^12
constexpr double exp_full_ln2_lo = 0x1.3de6af278ece6p-42;  // ln 2 - ln2_hi

// fraction * 2^power, not multiplied yet: a caller whose result may be subnormal multiplies the fraction first.
struct Exponential {
  f64 fraction, power;
};

// a * 2^n for integral |n| <= 1200. Two steps, the first exact, so that a subnormal result is rounded once.
TRANSFUSE_INLINE f64 scale_by_power(f64 a, f64 n) {
  const f64 half = round(n * set1d(0.5));
  return ldexp(ldexp(a, half), n - half);
}

// e^(x + residual), the fraction in [0.7, 1.42] within 0.7 ULP: 1 + r is split into sum and rounding error, and the rest
// of the series, e^r - 1 - r = r^2 q(r) <= 0.07, is added to the latter.
TRANSFUSE_INLINE Exponential exp_parts(f64 x, f64 residual) {
  x = min(set1d(exp_full_highest), max(set1d(exp_full_lowest), x));  // in this order a NaN is kept
  const f64 integer = set1d(0x1.8p52);
  const f64 n = fma(x, set1d(0x1.71547652b82fep+0), integer) - integer;
  const f64 big = fnma(n, set1d(exp_full_ln2_hi), x);  // exact
  const f64 small = fnma(n, set1d(exp_full_ln2_lo), residual);
  const f64 r = big + small;
  const f64 r_error = (big - r) + small;
  f64 q = set1d(0x1.1e42d1d29ee63p-29);  // minimax, 2^-63 of e^r
  q = fma(q, r, set1d(0x1.af645b5b01c83p-26));
  q = fma(q, r, set1d(0x1.27e5a7a18a561p-22));
  q = fma(q, r, set1d(0x1.71ddf4f83dd5ap-19));
  q = fma(q, r, set1d(0x1.a01a014312b66p-16));
  q = fma(q, r, set1d(0x1.a01a01b149521p-13));
  q = fma(q, r, set1d(0x1.6c16c16c2b6d2p-10));
  q = fma(q, r, set1d(0x1.111111110f306p-7));
  q = fma(q, r, set1d(0x1.555555555551cp-5));
  q = fma(q, r, set1d(0x1.555555555555ap-3));
  q = fma(q, r, set1d(0.5));
  const f64 sum = set1d(1.0) + r;
  const f64 sum_error = (set1d(1.0) - sum) + r;
  return {sum + (sum_error + fma(r * r, q, r_error)), n};
}

TRANSFUSE_INLINE f64 exp_full(f64 x, f64 residual) {
  const Exponential e = exp_parts(x, residual);
  return scale_by_power(e.fraction, e.power);
}

TRANSFUSE_INLINE f64 exp_full(f64 x) { return exp_full(x, zero64()); }

TRANSFUSE_INLINE wide exp(wide x) { return {exp(x.lo), exp(x.hi)}; }
TRANSFUSE_INLINE wide exp_full(wide x) { return {exp_full(x.lo), exp_full(x.hi)}; }
TRANSFUSE_INLINE wide exp_full(wide x, wide residual) {
  return {exp_full(x.lo, residual.lo), exp_full(x.hi, residual.hi)};
}

}  // namespace transfuse::cpu::TRANSFUSE_ISA
