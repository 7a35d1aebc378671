// GELU of doubles to the last places: what gelu.cpp runs for float64 tensors.
//
// As for floats, gelu(x) = max(x, 0) - t Phi(-t) with t = |x|, and gelu'(x) = h(t) for x < 0 and 1 - h(t) else, where
// h(t) = Phi(-t) - t phi(t); but here everything must hold to 2^-53:
//   t <= 1.5   polynomials in 1.5 - t >= 0, where all large terms have one sign: erf's Phi(-t), and both forms' h(t) as
//              (t - root) times a polynomial, so that the slope keeps its relative accuracy around its root;
//   t > 1.5    erf: exp(-t^2/2) times the Mills ratio, a polynomial in 1 / (t + 4); tanh: exp(-z) / (1 + exp(-z)),
//              which also serves tanh's Phi(-t) everywhere.
// The exponents t^2/2 and z are carried as hi + lo: near 745 a rounded one alone would cost 300 ULP. The power of two
// of exp is applied last, so that a subnormal result is rounded once.
//
// | largest error in ULP of double, measured on 600,000 points | with FMA | without |
// |------------------------------------------------------------|----------|---------|
// | erf, forward                                               | 3.3      | 3.7     |
// | erf, slope (its root included)                             | 2.6      | 3.5     |
// | tanh, forward                                              | 3.1      | 3.1     |
// | tanh, slope (its root included)                            | 3.8      | 3.8     |
#pragma once

#include "exact.h"
#include "exp.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

constexpr double near_limit = 1.5;
// Phi(-(1.5 - e)), e in [0, 1.5], relative error 2^-62.
constexpr double near_phi[] = {
    0x1.11a46d89647efp-4, 0x1.0940856d21e85p-3, 0x1.8de0c823b2d9dp-4, 0x1.ba1633b5e4ccdp-6, -0x1.8de0c8243c01bp-8,
    -0x1.809d8e3dc3996p-8, -0x1.58d3e27b5d480p-11, 0x1.2468b17cd7690p-11, 0x1.6f16445da6a35p-13,
    -0x1.a4301258a417ap-16, -0x1.4444b68bf76e0p-16, -0x1.2e52632cbfaaep-21, 0x1.6c93c440dd583p-20,
    0x1.00e1248cb7d6fp-22, -0x1.bfa454bc4fc42p-24, 0x1.2be5d5130b57dp-28, -0x1.606ff8166d544p-27,
    0x1.9cb53bddbe8bep-28, -0x1.472dfbff17aa9p-30, 0x1.72f00c561c428p-34};
// h(1.5 - e) / (1.5 - e - root), relative error 2^-59 and 2^-58.
constexpr double erf_near_slope[] = {
    -0x1.5ce8c8c9c6b43p-3, -0x1.157a4a1185fcep-2, -0x1.1468e2cdbe3f3p-3, 0x1.9b5896d4331aap-7, 0x1.1f01541e7286cp-5,
    0x1.f6e868b1bf5e4p-8, -0x1.e81b69a174260p-9, -0x1.dd6c9237d73dcp-10, 0x1.02b79848632f0p-13, 0x1.c7f684834b3bdp-13,
    0x1.43eb547bf394ap-16, -0x1.17a8fb7121a55p-16, -0x1.05fb18a3661fep-18, 0x1.32609a3a18480p-20,
    0x1.2e4c495b44d7fp-23, 0x1.979ae4d7b6d72p-24, -0x1.31eba35d5ececp-24, 0x1.7bca9049e82e2p-27,
    0x1.02d58e3e94883p-32, -0x1.266f50c2ce928p-33};
constexpr double tanh_near_slope[] = {
    -0x1.5de24682977f4p-3, -0x1.13d42436f5fbep-2, -0x1.10bdcebf05b9ap-3, 0x1.65657c6e321e7p-7, 0x1.12ecf22519eedp-5,
    0x1.1447e1f65c9dep-7, -0x1.8f55dfd4b43abp-9, -0x1.08c4fcb588d85p-9, -0x1.701fd7defa2cdp-14, 0x1.03022376521aep-12,
    0x1.2c53234d69c8ap-14, -0x1.6eef9702c4c0ap-16, -0x1.5d20ccbd6b7c7p-18, -0x1.7c7c180ad9d16p-17,
    0x1.cc0b7d8a087e1p-17, -0x1.4abf6b54cc3bbp-17, 0x1.b88860512c2d9p-18, -0x1.c14dacd6f16cdp-19,
    0x1.2ae54836c7c19p-20, -0x1.e08dc7e607a8bp-23, 0x1.a21eedc9084e2p-26, -0x1.237ea986b17eep-30};
constexpr double erf_root_hi = 0x1.80ead197f00b4p-1, erf_root_lo = -0x1.13e74c58cada8p-56;
constexpr double tanh_root_hi = 0x1.81429f9e97e4dp-1, tanh_root_lo = -0x1.4f523ed77dbdcp-55;
// R(t) (t + 4), R(t) = Phi(-t) exp(t^2/2), by 1 / (t + 4), t in [1.5, 39], relative error 2^-59.
constexpr double mills_far[] = {
    0x1.9884533d4a538p-2, 0x1.9884533b17616p+0, 0x1.7efc0e59cfe73p+2, 0x1.4beb7c8172f32p+4, 0x1.041cb03bfd89cp+6,
    0x1.6238d63755d5dp+7, 0x1.800daa58c12b8p+8, 0x1.c4c628fbedd1fp+8, -0x1.a4e8fb44caf04p+8, -0x1.a0a82fa3d2809p+13,
    0x1.f4fe870cbb0fap+15, -0x1.bb34d670c3ed2p+19, 0x1.cd9760fb43c98p+22, -0x1.5cc1d21bc2a2dp+25,
    0x1.98a8c67a97fccp+27, -0x1.2d89a92dad504p+29, 0x1.1ed132c8fbcedp+29, 0x1.50f811122e24ap+31,
    -0x1.6437ed428b211p+33, 0x1.1ca72443c1a10p+34, -0x1.6348a77747bb8p+33};
constexpr double mills_shift = 4.0;
constexpr double phi0_hi = 0x1.9884533d43651p-2, phi0_lo = -0x1.cbc0d30ebfd15p-56;  // 1 / sqrt(2 pi)
// tanh's argument, doubled: z = t (c0 + c1 t^2), c0 = 2 sqrt(2/pi), c1 = 0.044715 c0.
constexpr double z_c0_hi = 0x1.9884533d43651p+0, z_c0_lo = -0x1.cbc0d30ebfd15p-54;
constexpr double z_c1_hi = 0x1.2444f2a4d8b4bp-4, z_c1_lo = -0x1.6c843a29d1c70p-61;

// c[first] + c[first + 1] t + ...
template <int first = 0, int n>
TRANSFUSE_INLINE f64 horner(const double (&c)[n], f64 t) {
  f64 sum = set1d(c[n - 1]);
#pragma GCC unroll 24
  for (int i = n - 2; i >= first; --i) sum = fma(sum, t, set1d(c[i]));
  return sum;
}

// near(t) where t <= 1.5, far(t) elsewhere; a NaN is near.
template <class Near, class Far>
TRANSFUSE_INLINE f64 by_zone(f64 t, Near near, Far far) {
  const mask64 outside = t > set1d(near_limit);
  const f64 inside = near(t);
  return any(outside) ? select(outside, far(t), inside) : inside;
}

struct ErfFull {
  static constexpr double cut = 39.0;  // Phi(-39) is far below the last subnormal

  TRANSFUSE_INLINE static Exponential gaussian(f64 t) {
    const Pair<f64> square = two_product(t, t);
    return exp_parts(square.hi * set1d(-0.5), square.lo * set1d(-0.5));
  }
  struct Mills {
    f64 w;
    Pair<f64> factor;  // R(t) = w * factor
  };
  // w, the rounded 1 / (t + 4), stands for a point beside t. There R is read, and moved to t along its slope
  // t R - phi(0); the move joins the polynomial before its last addition.
  TRANSFUSE_INLINE static Mills mills(f64 t) {
    const f64 shift = set1d(mills_shift), s = t + shift, w = set1d(1.0) / s;
    const Pair<f64> one = two_product(w, s);
    const f64 miss = ((one.hi - set1d(1.0)) + one.lo + w * (t - (s - shift))) * s;
    const f64 first = set1d(mills_far[0]), rest = w * horner<1>(mills_far, w);
    const f64 move = (t * w * (first + rest) - set1d(phi0_hi)) * miss * s;
    return {w, two_sum(first, rest + move)};
  }
  // t * Phi(-t)
  TRANSFUSE_INLINE static f64 tail(f64 t) {
    return by_zone(
        t, [](f64 t) __attribute__((always_inline)) { return t * horner(near_phi, set1d(near_limit) - t); },
        [](f64 t) __attribute__((always_inline)) {
          const Exponential e = gaussian(t);
          const Mills m = mills(t);
          const f64 rest = t * m.w * e.fraction;
          return scale_by_power(fma(rest, m.factor.lo, rest * m.factor.hi), e.power);
        });
  }
  // Phi(-t) - t phi(t)
  TRANSFUSE_INLINE static f64 slope(f64 t) {
    return by_zone(
        t,
        [](f64 t) __attribute__((always_inline)) {
          return ((t - set1d(erf_root_hi)) - set1d(erf_root_lo)) * horner(erf_near_slope, set1d(near_limit) - t);
        },
        [](f64 t) __attribute__((always_inline)) {
          const Exponential e = gaussian(t);
          const Mills m = mills(t);
          const f64 ratio = fma(m.w, m.factor.lo, m.w * m.factor.hi);
          const f64 difference = fnma(t, set1d(phi0_hi), fnma(t, set1d(phi0_lo), ratio));
          return scale_by_power(difference * e.fraction, e.power);
        });
  }
};

struct TanhFull {
  static constexpr double cut = 22.0;  // exp(-z(22)) is far below the last subnormal

  // exp(-z), not scaled yet.
  TRANSFUSE_INLINE static Exponential decay(f64 t) {
    const Pair<f64> square = two_product(t, t);
    const Pair<f64> cubic = two_product(square.hi, set1d(z_c1_hi));
    const Pair<f64> rate = two_sum(set1d(z_c0_hi), cubic.hi);
    const f64 rate_lo = rate.lo + (set1d(z_c0_lo) + cubic.lo + square.hi * set1d(z_c1_lo) + square.lo * set1d(z_c1_hi));
    const Pair<f64> z = two_product(t, rate.hi);
    return exp_parts(-z.hi, -(z.lo + t * rate_lo));
  }
  // t * E / (1 + E), E = exp(-z)
  TRANSFUSE_INLINE static f64 tail(f64 t) {
    const Exponential e = decay(t);
    const f64 below = set1d(1.0) + scale_by_power(e.fraction, e.power);
    return scale_by_power(t * e.fraction / below, e.power);
  }
  // E / (1 + E) (1 - t z'(t) / (1 + E))
  TRANSFUSE_INLINE static f64 slope(f64 t) {
    return by_zone(
        t,
        [](f64 t) __attribute__((always_inline)) {
          return ((t - set1d(tanh_root_hi)) - set1d(tanh_root_lo)) * horner(tanh_near_slope, set1d(near_limit) - t);
        },
        [](f64 t) __attribute__((always_inline)) {
          const Exponential e = decay(t);
          // h = E (1 + E - t z') / (1 + E)^2; what rounding took from each term of the difference is given back to it,
          // and so is twice what it took from 1 + E below the line.
          const Pair<f64> below = two_sum(set1d(1.0), scale_by_power(e.fraction, e.power));
          const Pair<f64> inner = two_sum(set1d(z_c0_hi), t * t * set1d(3 * z_c1_hi));
          const Pair<f64> rate = two_product(t, inner.hi);
          const f64 minus_rate = -rate.hi, rounded = below.hi + minus_rate;
          const f64 lost = sum_residual(below.hi, minus_rate, rounded) - (rate.lo + t * inner.lo);
          const f64 difference = rounded + (lost + below.lo * (set1d(1.0) - rounded - rounded));
          return scale_by_power(e.fraction * difference / (below.hi * below.hi), e.power);
        });
  }
};

// In min the operand that holds a NaN stands second: it is the one that is kept.
template <class Form>
TRANSFUSE_INLINE f64 gelu_full(f64 x) {
  const f64 tail = Form::tail(min(set1d(Form::cut), abs(x)));
  return select(x < zero64(), -tail, x - tail);
}

template <class Form>
TRANSFUSE_INLINE f64 gelu_slope_full(f64 x) {
  const f64 h = Form::slope(min(set1d(Form::cut), abs(x)));
  return select(x < zero64(), h, set1d(1.0) - h);
}

}  // namespace transfuse::cpu::TRANSFUSE_ISA
