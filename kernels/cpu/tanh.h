// tanh and its derivative on sixteen lanes, for the softcap of attention.
//
// tanh is within 2 ULP of its type at every size, the derivative too: neither cancels, near 0 or far from it.
#pragma once

#include "exp.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

// tanh(x) / x - 1 for |x| < 0.625, over x^2: Cephes' tanhf and tanh (Moshier), 2^-24 and 2^-55.
TRANSFUSE_INLINE f32 tanh_tail(f32 z) {
  f32 q = set1(-5.70498872745e-3f);
  q = fma(q, z, set1(2.06390887954e-2f));
  q = fma(q, z, set1(-5.37397155531e-2f));
  q = fma(q, z, set1(1.33314422036e-1f));
  return fma(q, z, set1(-3.33332819422e-1f));
}
TRANSFUSE_INLINE wide tanh_tail(wide z) {
  wide p = splat<wide>(-9.64399179425052238628e-1);
  p = fma(p, z, splat<wide>(-9.92877231001918586564e1));
  p = fma(p, z, splat<wide>(-1.61468768441708447952e3));
  wide q = z + splat<wide>(1.12811678491632931402e2);
  q = fma(q, z, splat<wide>(2.23548839060100448583e3));
  q = fma(q, z, splat<wide>(4.84406305325125486048e3));
  return p / q;
}
TRANSFUSE_INLINE f32 exp_any(f32 x) { return exp(x); }
TRANSFUSE_INLINE wide exp_any(wide x) { return exp_full(x); }

template <class V>
struct TanhAndSlope {
  V value, slope;
};

// tanh and its derivative, each without cancellation: with u = 2 / (e^2x + 1), 1 - u and u (2 - u).
template <class V, class Real>
TRANSFUSE_INLINE TanhAndSlope<V> tanh_and_slope(V x, Real largest) {
  const V one = splat<V>(1), two = splat<V>(2), z = x * x, size = abs(x);
  const auto small = size < splat<V>(static_cast<Real>(0.625));
  const V size_in_range = min(splat<V>(largest), size);  // in this order a NaN is kept
  const V u = two / (exp_any(size_in_range + size_in_range) + one);
  const V near = fma(x * z, tanh_tail(z), x), far = one - u;
  return {select(small, near, select(x < splat<V>(0), -far, far)), select(small, fnma(near, near, one), u * (two - u))};
}
TRANSFUSE_INLINE TanhAndSlope<f32> tanh_and_slope(f32 x) { return tanh_and_slope(x, 44.0f); }   // e^88 is finite
TRANSFUSE_INLINE TanhAndSlope<wide> tanh_and_slope(wide x) { return tanh_and_slope(x, 350.0); }  // e^700 is finite

}  // namespace transfuse::cpu::TRANSFUSE_ISA
