// GELU of floats beyond its segments, 63/16 <= t = |x| (gelu.cpp), for the erf and the tanh form: an exponential times
// a smooth factor. The exponential's argument is as large as 100 and carried with what its rounding took; its power of
// two is applied last, so that a subnormal result is rounded once.
//   erf:   t Phi(-t) = exp(-t^2/2) G(1/t^2),   Phi(-t) - t phi(t) = -exp(-t^2/2) t H(1/t^2),
//          G and H minimax polynomials in relative error, 2^-27;
//   tanh:  with E = exp(-z), z = t (c0 + c1 t^2) <= 2^-15:  Phi(-t) = E / (1 + E) = E (1 - E) to 2^-30, and
//          Phi(-t) - t phi(t) = E U (1 - r U) = -E (r - 1 - E (2 r - 1)) to 2^-27, U = 1 / (1 + E), r = t z'(t).
// Constants: gelu_tables.h.
#pragma once

#include "exact.h"
#include "exp.h"
#include "gelu_tables.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

template <int n>
TRANSFUSE_INLINE f32 polynomial(const float (&c)[n], f32 t) {
  f32 sum = set1(c[n - 1]);
#pragma GCC unroll 8
  for (int i = n - 2; i >= 0; --i) sum = fma(sum, t, set1(c[i]));
  return sum;
}

// fraction * 2^power, not multiplied yet.
struct Scaled {
  f32 fraction;
  i32 power;
};
TRANSFUSE_INLINE Scaled product(f32 a, FloatExponential e) { return {fma(a, e.excess, a), e.power}; }
TRANSFUSE_INLINE f32 value(Scaled a) { return scale_by_power(a.fraction, a.power); }

struct ErfFar {
  using Table = ErfFarTable;
  static constexpr float cut = Table::cut;

  // exp(-t^2/2)
  TRANSFUSE_INLINE static FloatExponential gaussian(f32 t, f32 square) {
    const f32 half = set1(-0.5f);
    return exp_parts(square * half, fms(t, t, square) * half);
  }
  // t Phi(-t)
  TRANSFUSE_INLINE static Scaled tail(f32 t) {
    const f32 square = t * t;
    return product(polynomial(Table::factors.tail, set1(1.0f) / square), gaussian(t, square));
  }
  // Phi(-t) - t phi(t)
  TRANSFUSE_INLINE static Scaled slope(f32 t) {
    const f32 square = t * t;
    return product(-t * polynomial(Table::factors.slope, set1(1.0f) / square), gaussian(t, square));
  }
};

struct TanhFar {
  using Table = TanhFarTable;
  static constexpr float cut = Table::cut;

  // exp(-z)
  TRANSFUSE_INLINE static FloatExponential decay(f32 t) {
    const f32 square = t * t, square_lo = fms(t, t, square);
    const f32 cubic = square * set1(Table::c1_hi);
    const f32 cubic_error = fms(square, set1(Table::c1_hi), cubic);
    const f32 cubic_lo = fma(square, set1(Table::c1_lo), fma(square_lo, set1(Table::c1_hi), cubic_error));
    const Pair<f32> rate = two_sum(set1(Table::c0_hi), cubic);
    const f32 rate_lo = rate.lo + (cubic_lo + set1(Table::c0_lo));
    const f32 z = t * rate.hi, z_lo = fma(t, rate_lo, fms(t, rate.hi, z));
    return exp_parts(-z, -z_lo);
  }
  // t Phi(-t)
  TRANSFUSE_INLINE static Scaled tail(f32 t) {
    const FloatExponential e = decay(t);
    return product(fnma(t, value(product(set1(1.0f), e)), t), e);
  }
  // Phi(-t) - t phi(t)
  TRANSFUSE_INLINE static Scaled slope(f32 t) {
    const FloatExponential e = decay(t);
    const f32 one = set1(1.0f), decayed = value(product(one, e));
    const f32 square = t * t, square_lo = fms(t, t, square), three_c1 = set1(Table::rate_hi);
    const f32 inner_rest = fma(square, set1(Table::rate_lo), fma(square_lo, three_c1, set1(Table::c0_hi)));
    const f32 inner = fma(square, three_c1, inner_rest);
    const f32 rate = t * inner;
    return product(-fms(t, inner, fma(decayed, rate + rate - one, one)), e);
  }
};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
