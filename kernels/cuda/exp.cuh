// exp on a GPU, as kernels/cpu/exp.h has it: the same polynomials, so the same bits. ex2.approx would cost 2 ULP.
//
// | function                     | range of x   | error    | special values                               |
// |------------------------------|--------------|----------|----------------------------------------------|
// | exp_nonpositive(x, residual) | (-inf, 70]   | <= 1 ULP | exp(-inf) = 0; |residual| <= 1e-4 and finite |
// | exp_wide(double x)           | [-690, 690]  | 2^-40    | for results rounded to float later           |
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace transfuse::cuda {

// e^(x + residual).
__device__ __forceinline__ float exp_nonpositive(float x, float residual) {
  constexpr float lowest = -0x1.a56ef8p+6f;  // -152 ln 2: rounds to 0, and so does everything below
  // Adding it rounds to an integer, whose low bits are then the exponent field of 2^(n + 25); 2^-25 comes last, so that
  // a subnormal result is rounded once.
  constexpr float integer = 0x1.8p23f + 127.0f + 25.0f;
  x = fmaxf(x, lowest);
  const float shifted = fmaf(x, 0x1.715476p+0f, integer), n = shifted - integer;
  const float r =
      fmaf(-n, 0x1.7f7d1cp-20f, fmaf(-n, 0x1.62e400p-1f, x)) + residual;  // ln 2 in two parts, the first exact
  float q = 0x1.6a243ap-10f;
  q = fmaf(q, r, 0x1.1239e2p-7f);
  q = fmaf(q, r, 0x1.5558f2p-5f);
  q = fmaf(q, r, 0x1.555492p-3f);
  q = fmaf(q, r, 0x1.fffffcp-2f);
  const float fraction = fmaf(fmaf(q, r, 1.0f), r, 1.0f);
  return fraction * __uint_as_float(__float_as_uint(shifted) << 23) * 0x1p-25f;
}

__device__ __forceinline__ double exp_wide(double x) {
  constexpr double integer = 0x1.8p52;  // adding it rounds to an integer
  const double n = fma(x, 0x1.71547652b82fep+0, integer) - integer;
  const double r = fma(-n, 0x1.62e42fefa39efp-1, x);
  double p = 0x1.9eda9448300fep-16;
  p = fma(p, r, 0x1.a1a81e1776288p-13);
  p = fma(p, r, 0x1.6c18b3414f00ap-10);
  p = fma(p, r, 0x1.111082adb52aap-7);
  p = fma(p, r, 0x1.5555540506dfbp-5);
  p = fma(p, r, 0x1.555555a082e91p-3);
  p = fma(p, r, 0x1.0000000087fb5p-1);
  p = fma(p, r, 0x1.ffffffffd5628p-1);
  p = fma(p, r, 0x1.ffffffffff7a2p-1);
  // p lies near 1 and |n| below 1000: the power of two goes into the exponent field.
  return __longlong_as_double(__double_as_longlong(p) + static_cast<long long>(n) * (1ll << 52));
}

}  // namespace transfuse::cuda
