// tanh of floats and its derivative, each within 2 ULP, for the softcap of attention: the constants of
// kernels/cpu/tanh.h.
#pragma once

#include <cuda_runtime.h>

#include "exp.cuh"

namespace transfuse::cuda {

struct TanhAndSlope {
  float value, slope;
};

// Neither cancels, near 0 or far from it: with u = 2 / (e^2x + 1) they are 1 - u and u (2 - u) beyond 0.625; below,
// Cephes' tanhf (Moshier).
__device__ __forceinline__ TanhAndSlope tanh_and_slope(float x) {
  constexpr float small = 0.625f, largest = 44.0f;  // tanh is 1 long before
  const float square = x * x, size = fabsf(x);
  float q = -5.70498872745e-3f;
  q = fmaf(q, square, 2.06390887954e-2f);
  q = fmaf(q, square, -5.37397155531e-2f);
  q = fmaf(q, square, 1.33314422036e-1f);
  q = fmaf(q, square, -3.33332819422e-1f);
  const float near = fmaf(x * square, q, x);
  const float e = exp_nonpositive(-2.0f * fminf(size, largest), 0.0f);
  const float u = 2.0f * e / (1.0f + e), far = copysignf(1.0f - u, x);
  if (size != size) return {x, x};
  return size < small ? TanhAndSlope{near, fmaf(-near, near, 1.0f)} : TanhAndSlope{far, u * (2.0f - u)};
}

}  // namespace transfuse::cuda
