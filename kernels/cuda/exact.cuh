// Sums and products of floats with what rounding took from them: two floats carry 48 bits, where double is 64 times
// slower than float on most GPUs. The same identities as kernels/cpu/exact.h; an FMA is written, never contracted.
#pragma once

#include <cuda_runtime.h>

namespace transfuse::cuda {

// hi + lo, hi the rounded value.
struct Pair {
  float hi, lo;
};

// Exact for every pair of finite floats whose sum is finite.
__device__ __forceinline__ Pair two_sum(float a, float b) {
  const float sum = a + b, b_part = sum - a;
  return {sum, (a - (sum - b_part)) + (b - b_part)};
}
// The same for |a| >= |b|.
__device__ __forceinline__ Pair quick_two_sum(float a, float b) {
  const float sum = a + b;
  return {sum, b - (sum - a)};
}
// Exact where the product's residual does not underflow.
__device__ __forceinline__ Pair two_product(float a, float b) {
  const float product = a * b;
  return {product, fmaf(a, b, -product)};
}

// To about 2^-46 of the larger operand. Commutative bit for bit, which a butterfly of shuffles relies on.
__device__ __forceinline__ Pair operator+(Pair a, Pair b) {
  const Pair sum = two_sum(a.hi, b.hi);
  return quick_two_sum(sum.hi, sum.lo + (a.lo + b.lo));
}
__device__ __forceinline__ Pair operator+(Pair a, float b) {
  const Pair sum = two_sum(a.hi, b);
  return quick_two_sum(sum.hi, sum.lo + a.lo);
}
__device__ __forceinline__ Pair operator-(Pair a) { return {-a.hi, -a.lo}; }
__device__ __forceinline__ Pair operator*(Pair a, Pair b) {
  const Pair product = two_product(a.hi, b.hi);
  return quick_two_sum(product.hi, fmaf(a.hi, b.lo, fmaf(a.lo, b.hi, product.lo)));
}
__device__ __forceinline__ Pair operator/(Pair a, float b) {
  const float quotient = a.hi / b;
  return quick_two_sum(quotient, (fmaf(-quotient, b, a.hi) + a.lo) / b);
}
__device__ __forceinline__ float to_float(Pair x) { return x.hi + x.lo; }

// 1 / sqrt(x): the rounded one and a Newton step from it, whose residual is exact. No step from 0 or infinity.
__device__ __forceinline__ Pair inverse_sqrt(Pair x) {
  const float root = 1.0f / sqrtf(x.hi);
  const Pair square = two_product(root, root), one = two_product(x.hi, square.hi);
  const float residual = ((1.0f - one.hi) - one.lo) - fmaf(x.hi, square.lo, x.lo * square.hi);
  const float step = root * residual * 0.5f;
  return {root, isfinite(step) ? step : 0.0f};
}

}  // namespace transfuse::cuda
