// tanh of floats within 2 ULP, for the softcap of attention: the constants and operations of kernels/cpu/tanh.h.
#pragma once

#include <cuda_runtime.h>

#include "exp.cuh"

namespace transfuse::cuda {

// Without cancellation, near 0 or far from it: 1 - 2 / (e^2x + 1) beyond 0.625, Cephes' tanhf (Moshier) below.
__device__ __forceinline__ float tanh_accurate(float x) {
  constexpr float small = 0.625f, largest = 44.0f;  // tanh is 1 long before
  const float square = x * x, size = fabsf(x);
  float q = -5.70498872745e-3f;
  q = fmaf(q, square, 2.06390887954e-2f);
  q = fmaf(q, square, -5.37397155531e-2f);
  q = fmaf(q, square, 1.33314422036e-1f);
  q = fmaf(q, square, -3.33332819422e-1f);
  const float near = fmaf(x * square, q, x);
  const float in_range = size > largest ? largest : size;  // in this order a NaN is kept
  const float e = exp_nonpositive(-(in_range + in_range), 0.0f);
  const float far = 1.0f - 2.0f * e / (1.0f + e);
  const float kept = size != size ? size : far;
  return size < small ? near : copysignf(kept, x);
}

}  // namespace transfuse::cuda
