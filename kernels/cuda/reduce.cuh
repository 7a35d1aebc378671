// Reductions over the threads of a row with one fixed tree: butterflies within warps, then one over the warps' results.
//
// Policy: the tree depends on the number of threads of a row alone, which depends on the row's length alone; so a row's
// bits depend neither on the batch nor on its position in it. Every thread gets the result, the same bits everywhere:
// combine(a, b) must be commutative bit for bit. Shuffles take whole warps: every thread of a block takes part.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "exact.cuh"

namespace transfuse::cuda {

constexpr int warp_size = 32;
constexpr unsigned whole_warp = 0xFFFFFFFFu;

__device__ __forceinline__ float shuffle_xor(float x, int lane_mask) {
  return __shfl_xor_sync(whole_warp, x, lane_mask);
}
__device__ __forceinline__ double shuffle_xor(double x, int lane_mask) {
  return __shfl_xor_sync(whole_warp, x, lane_mask);
}
__device__ __forceinline__ Pair shuffle_xor(Pair x, int lane_mask) {
  return {shuffle_xor(x.hi, lane_mask), shuffle_xor(x.lo, lane_mask)};
}

// Two sums that are taken together.
template <class Real>
struct Both {
  Real first, second;
};
template <class Real>
__device__ __forceinline__ Both<Real> shuffle_xor(Both<Real> x, int lane_mask) {
  return {shuffle_xor(x.first, lane_mask), shuffle_xor(x.second, lane_mask)};
}
template <class Real>
__device__ __forceinline__ Both<Real> operator+(Both<Real> a, Both<Real> b) {
  return {a.first + b.first, a.second + b.second};
}

struct Add {
  template <class Value>
  __device__ __forceinline__ Value operator()(Value a, Value b) const {
    return a + b;
  }
};
// The larger one; of a number and a NaN the number.
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
// The larger one; a NaN where there is one.
struct MaxOrNaN {
  __device__ __forceinline__ float operator()(float a, float b) const {
    return a != a || b != b ? __int_as_float(0x7FC00000) : fmaxf(a, b);
  }
  __device__ __forceinline__ double operator()(double a, double b) const {
    return a != a || b != b ? a + b : fmax(a, b);
  }
};

// Over groups of `threads` neighbouring lanes, a power of two up to a warp.
template <int threads, class Value, class Combine>
__device__ __forceinline__ Value reduce_lanes(Value value, Combine combine) {
#pragma unroll
  for (int distance = threads / 2; distance > 0; distance /= 2) value = combine(value, shuffle_xor(value, distance));
  return value;
}

// What the warps of a block hand to each other in one reduction. Each reduction of a kernel has its own, or a barrier
// stands between two uses of one.
template <class Value, int threads>
struct Exchange {
  Value of_warp[threads > warp_size ? threads / warp_size : 1];
};

// Over groups of `threads` neighbouring threads: a power of two of lanes, or all of a block of up to 1024 threads.
template <int threads, class Value, class Combine>
__device__ __forceinline__ Value reduce(Value value, Combine combine, Exchange<Value, threads>& exchange) {
  static_assert((threads & (threads - 1)) == 0 && threads <= warp_size * warp_size, "one butterfly over the warps");
  if constexpr (threads <= warp_size) {
    return reduce_lanes<threads>(value, combine);
  } else {
    constexpr int warps = threads / warp_size;
    value = reduce_lanes<warp_size>(value, combine);
    if (threadIdx.x % warp_size == 0) exchange.of_warp[threadIdx.x / warp_size] = value;
    __syncthreads();
    return reduce_lanes<warps>(exchange.of_warp[threadIdx.x % warps], combine);
  }
}

// The sum of n floats by halves: of equal terms it is exact, and errors grow with log n.
template <int n>
__device__ __forceinline__ float sum_by_halves(float (&x)[n]) {
#pragma unroll
  for (int half = n / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

}  // namespace transfuse::cuda
