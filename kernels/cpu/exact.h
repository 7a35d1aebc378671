// Sums and products of doubles, in vectors or alone, with what their rounding took. No FMA is used: double precision has its residuals on
// every ISA level (the baseline has no double FMA), and the bits are the same on all of them.
#pragma once

#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

// hi + lo, |lo| <= ulp(hi) / 2. V is f64 or double.
template <class V>
struct Pair {
  V hi, lo;
};

// a + b = sum + residual exactly, sum the rounded one (Knuth).
template <class V>
TRANSFUSE_INLINE V sum_residual(V a, V b, V sum) {
  const V b_part = sum - a;
  return (a - (sum - b_part)) + (b - b_part);
}

template <class V>
TRANSFUSE_INLINE Pair<V> two_sum(V a, V b) {
  const V sum = a + b;
  return {sum, sum_residual(a, b, sum)};
}

// The leading 26 bits of a; the rest, a - leading_half(a), has 26 too (Veltkamp). For |a| < 2^996.
constexpr double half_cut = 0x1p27 + 1.0;
TRANSFUSE_INLINE f64 leading_half(f64 a) {
  const f64 c = a * set1d(half_cut);
  return c - (c - a);
}
TRANSFUSE_INLINE double leading_half(double a) {
  const double c = a * half_cut;
  return c - (c - a);
}

// a * b exactly (Dekker), for factors below 2^996 whose residual is no subnormal.
template <class V>
TRANSFUSE_INLINE Pair<V> two_product(V a, V b) {
  const V product = a * b;
  const V a_hi = leading_half(a), b_hi = leading_half(b), a_lo = a - a_hi, b_lo = b - b_hi;
  return {product, ((a_hi * b_hi - product) + a_hi * b_lo + a_lo * b_hi) + a_lo * b_lo};
}

}  // namespace transfuse::cpu::TRANSFUSE_ISA
