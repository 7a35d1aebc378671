// A double rounded once to a storage type, by way of float: where something is cut off on the way, the float's last bit
// is set (rounding to odd), and two roundings give what one would.
#pragma once

#include "cuda/vector.cuh"

namespace transfuse::cuda {

__device__ __forceinline__ float rounded_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) == x || x != x) return nearest;
  const uint32_t too_large = fabs(static_cast<double>(nearest)) > fabs(x);
  return __uint_as_float((__float_as_uint(nearest) - too_large) | 1u);
}

template <class T>
__device__ __forceinline__ T from_double(double x) {
  return from_float<T>(rounded_to_odd(x));
}
template <>
__device__ __forceinline__ float from_double<float>(double x) {
  return static_cast<float>(x);
}

}  // namespace transfuse::cuda
