// The rows of masked_softmax as memory holds them: where a row's mask begins, how many of its keys may be seen, and
// what the mask says about a vector of them.
#pragma once

#include "cuda/masked_softmax.cuh"
#include "cuda/vector.cuh"

namespace transfuse::cuda {

namespace {

// Returns n % divisor, and n becomes n / divisor.
__device__ __forceinline__ uint32_t take_digit(uint32_t& n, const Divider& by) {
  const uint32_t quotient = (__umulhi(n, by.multiplier) + n) >> by.shift, digit = n - quotient * by.divisor;
  n = quotient;
  return digit;
}

// The keys of one row: those in [0, length) are valid where the mask keeps them.
struct SoftmaxRow {
  const void* mask;  // its element of key 0
  int64_t length;
};

template <class T>
__device__ __forceinline__ const void* mask_at(const MaskedSoftmaxParams& p, int64_t offset) {
  const int64_t item_of_bias = p.mask_kind == MaskKind::additive ? sizeof(T) : sizeof(float);
  const int64_t item = p.mask_kind == MaskKind::keep ? 1 : item_of_bias;
  return static_cast<const uint8_t*>(p.mask) + offset * item;  // of no mask: never read
}

__device__ __forceinline__ int64_t visible_keys(const MaskedSoftmaxParams& p, int64_t query) {
  const int64_t visible = query + p.causal_offset + 1;
  return visible < 0 ? 0 : visible < p.keys ? visible : p.keys;
}

template <class T>
__device__ __forceinline__ SoftmaxRow softmax_row(const MaskedSoftmaxParams& p, int64_t row) {
  int64_t length = p.keys, offset = 0;
  if (p.few_rows) {
    if (p.causal) {
      uint32_t left = static_cast<uint32_t>(row);
      length = visible_keys(p, take_digit(left, p.by_queries));
    }
    uint32_t left = static_cast<uint32_t>(row);
    for (int d = p.outer_dims - 1; d >= 0; --d) offset += take_digit(left, p.by_outer[d]) * p.outer_mask_strides[d];
  } else {
    if (p.causal) length = visible_keys(p, row % p.queries);
    for (int d = p.outer_dims - 1; d >= 0; --d) {
      offset += row % p.outer_sizes[d] * p.outer_mask_strides[d];
      row /= p.outer_sizes[d];
    }
  }
  return {mask_at<T>(p, offset), length};
}

// Bit i: the mask's byte of key begin + i is not 0.
template <int n>
__device__ __forceinline__ unsigned kept_keys(const uint8_t* mask, int64_t begin, int64_t end, int64_t stride,
                                              bool whole) {
  unsigned kept = 0;
  if (whole) {
#pragma unroll
    for (int word = 0; word < n / 4; ++word) {
      const uint32_t bytes = *reinterpret_cast<const uint32_t*>(mask + begin + 4 * word);
#pragma unroll
      for (int i = 0; i < 4; ++i) kept |= static_cast<unsigned>((bytes >> (8 * i) & 0xFF) != 0) << (4 * word + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (begin + i < end && mask[(begin + i) * stride] != 0) kept |= 1u << i;
  }
  return kept;
}

template <class M, int n>
__device__ __forceinline__ void load_bias(const M* mask, int64_t begin, int64_t end, int64_t stride, bool whole,
                                          float (&bias)[n]) {
  if (whole) return load_floats(mask, begin, end, true, bias);
#pragma unroll
  for (int i = 0; i < n; ++i) bias[i] = begin + i < end ? to_float(mask[(begin + i) * stride]) : 0.0f;
}

// Of the n keys from `begin` on, bit i: key begin + i comes before the row's length.
template <int n>
__device__ __forceinline__ unsigned seen_keys(const SoftmaxRow& row, int64_t begin) {
  const int64_t left = row.length - begin;
  return left >= n ? (1u << n) - 1 : left <= 0 ? 0u : (1u << left) - 1;
}

}  // namespace

}  // namespace transfuse::cuda
