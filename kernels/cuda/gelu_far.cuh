// GELU of floats beyond its segments, 63/16 <= t = |x|: kernels/cpu/gelu_far.h says how, in the same operations.
#pragma once

#include "cuda/exact.cuh"
#include "cuda/exp.cuh"
#include "gelu_tables.h"

namespace transfuse::cuda {

namespace {

__constant__ FarFactors erf_far = ErfFarTable::factors;

template <int n>
__device__ __forceinline__ float polynomial(const float (&c)[n], float t) {
  float sum = c[n - 1];
#pragma unroll
  for (int i = n - 2; i >= 0; --i) sum = fmaf(sum, t, c[i]);
  return sum;
}

// fraction * 2^power, not multiplied yet.
struct Scaled {
  float fraction;
  int power;
};
__device__ __forceinline__ Scaled product(float a, FloatExponential e) { return {fmaf(a, e.excess, a), e.power}; }
__device__ __forceinline__ float value(Scaled a) { return scale_by_power(a.fraction, a.power); }

struct ErfFar {
  static constexpr float cut = ErfFarTable::cut;

  // exp(-t^2/2)
  __device__ static FloatExponential gaussian(Pair square) { return exp_parts(square.hi * -0.5f, square.lo * -0.5f); }
  // t Phi(-t)
  __device__ static Scaled tail(float t) {
    const Pair square = two_product(t, t);
    return product(polynomial(erf_far.tail, 1.0f / square.hi), gaussian(square));
  }
  // Phi(-t) - t phi(t)
  __device__ static Scaled slope(float t) {
    const Pair square = two_product(t, t);
    return product(-t * polynomial(erf_far.slope, 1.0f / square.hi), gaussian(square));
  }
};

struct TanhFar {
  using Table = TanhFarTable;
  static constexpr float cut = Table::cut;

  // exp(-z)
  __device__ static FloatExponential decay(float t) {
    const Pair square = two_product(t, t), cubic = two_product(square.hi, Table::c1_hi);
    const float cubic_lo = fmaf(square.hi, Table::c1_lo, fmaf(square.lo, Table::c1_hi, cubic.lo));
    const Pair rate = two_sum(Table::c0_hi, cubic.hi);
    const float rate_lo = rate.lo + (cubic_lo + Table::c0_lo);
    const Pair z = two_product(t, rate.hi);
    return exp_parts(-z.hi, -fmaf(t, rate_lo, z.lo));
  }
  // t Phi(-t)
  __device__ static Scaled tail(float t) {
    const FloatExponential e = decay(t);
    return product(fmaf(-t, value(product(1.0f, e)), t), e);
  }
  // Phi(-t) - t phi(t)
  __device__ static Scaled slope(float t) {
    const FloatExponential e = decay(t);
    const float decayed = value(product(1.0f, e));
    const Pair square = two_product(t, t);
    const float inner = fmaf(square.hi, Table::rate_hi,
                             fmaf(square.hi, Table::rate_lo, fmaf(square.lo, Table::rate_hi, Table::c0_hi)));
    const float rate = t * inner;
    return product(-fmaf(t, inner, -fmaf(decayed, rate + rate - 1.0f, 1.0f)), e);
  }
};

}  // namespace

}  // namespace transfuse::cuda
