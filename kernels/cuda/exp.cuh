// exp on a GPU, as kernels/cpu/exp.h has it: the same constants and operations, so the same bits. ex2.approx would cost
// 2 ULP.
//
// | function                     | range of x   | error    | special values                                 |
// |------------------------------|--------------|----------|------------------------------------------------|
// | exp_nonpositive(x, residual) | (-inf, 70]   | <= 1 ULP | exp(-inf) = 0; |residual| <= 1e-4 and finite   |
// | exp_parts(x, residual)       | [-170, 170]  | 2^-28    | a power of two apart; |residual| <= 1e-4       |
// | exp_wide(double x)           | [-690, 690]  | 2^-40    | for results rounded to 16 bits later           |
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "exp_constants.h"

namespace transfuse::cuda {

// (e^r - 1) / r for |r| <= ln 2 / 2.
__device__ __forceinline__ float exp_quotient(float r) {
  float q = exp_q5;
  q = fmaf(q, r, exp_q4);
  q = fmaf(q, r, exp_q3);
  q = fmaf(q, r, exp_q2);
  q = fmaf(q, r, exp_q1);
  return fmaf(q, r, 1.0f);
}

// What is left of x + residual after taking n ln 2 out.
__device__ __forceinline__ float exp_reduced(float x, float n, float residual) {
  return fmaf(-n, exp_ln2_lo, fmaf(-n, exp_ln2_hi, x)) + residual;
}

// e^(x + residual).
__device__ __forceinline__ float exp_nonpositive(float x, float residual) {
  // The low bits of the rounding sum are the exponent field of 2^(n + 25); 2^-25 comes last, so that a subnormal result
  // is rounded once.
  constexpr float integer = exp_integer + 127.0f + 25.0f;
  x = fmaxf(x, exp_lowest);
  const float shifted = fmaf(x, exp_log2e, integer);
  const float r = exp_reduced(x, shifted - integer, residual);
  const float fraction = fmaf(exp_quotient(r), r, 1.0f);
  return fraction * __uint_as_float(__float_as_uint(shifted) << 23) * 0x1p-25f;
}

// a * (1 + excess) * 2^power for any a: one FMA, where a rounded e^r would be rounded once more.
struct FloatExponential {
  float excess;
  int power;
};

// e^(x + residual).
__device__ __forceinline__ FloatExponential exp_parts(float x, float residual) {
  const float shifted = fmaf(x, exp_log2e, exp_integer);
  const float r = exp_reduced(x, shifted - exp_integer, residual);
  return {exp_quotient(r) * r, __float_as_int(shifted) - __float_as_int(exp_integer)};
}

// a * 2^n, |n| <= 252: more than one float holds, so two factors. The first is exact where a is near 1.
__device__ __forceinline__ float scale_by_power(float a, int n) {
  const int half = n >> 1;
  return a * __int_as_float((half + 127) << 23) * __int_as_float((n - half + 127) << 23);
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
