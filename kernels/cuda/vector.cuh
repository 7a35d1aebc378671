// Vectors of 16 bytes in registers: how rows of float, float16 and bfloat16 are read, widened, rounded and written.
//
// Policy: a vector is one 128-bit access where the whole row lies on 16-byte boundaries, and else its elements one by
// one; which of the two is decided once per call (whole_vectors). Either way an element belongs to the same thread, so
// that alignment changes no bit of a result. What lies past the end of a row reads as 0 and is not written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace transfuse::cuda {

// Storage types as their bits, as on the CPU.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int vector_bytes = 16;
template <class T>
constexpr int width = vector_bytes / static_cast<int>(sizeof(T));

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// A vector as memory holds it. Kernels keep rows in this form: half the registers for 16-bit types.
struct Packed {
  uint32_t word[4];
};

template <class T>
__device__ __forceinline__ void unpack(const Packed& v, float (&x)[width<T>]);
template <>
__device__ __forceinline__ void unpack<float>(const Packed& v, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(v.word[i]);
}
template <>
__device__ __forceinline__ void unpack<bf16>(const Packed& v, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(v.word[i] << 16);
    x[2 * i + 1] = __uint_as_float(v.word[i] & 0xFFFF0000u);
  }
}
template <>
__device__ __forceinline__ void unpack<f16>(const Packed& v, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __half2float(__ushort_as_half(static_cast<uint16_t>(v.word[i])));
    x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(v.word[i] >> 16)));
  }
}

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 pair) {
  return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}
__device__ __forceinline__ uint32_t bits_of(__half2 pair) {
  return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ Packed pack(const float (&x)[width<T>]);
template <>
__device__ __forceinline__ Packed pack<float>(const float (&x)[4]) {
  Packed v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = __float_as_uint(x[i]);
  return v;
}
template <>
__device__ __forceinline__ Packed pack<bf16>(const float (&x)[8]) {
  Packed v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = bits_of(__floats2bfloat162_rn(x[2 * i], x[2 * i + 1]));
  return v;
}
template <>
__device__ __forceinline__ Packed pack<f16>(const float (&x)[8]) {
  Packed v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = bits_of(__floats2half2_rn(x[2 * i], x[2 * i + 1]));
  return v;
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(bf16 x) { return x.bits; }
__device__ __forceinline__ uint32_t bits_of(f16 x) { return x.bits; }

// The vector of row elements [begin, begin + width), of which those from `end` on are 0.
template <class T>
__device__ __forceinline__ Packed load_vector(const T* row, int64_t begin, int64_t end, bool whole_vectors) {
  if (whole_vectors) {
    const uint4 v = *reinterpret_cast<const uint4*>(row + begin);
    return {{v.x, v.y, v.z, v.w}};
  }
  constexpr int per_word = 4 / static_cast<int>(sizeof(T));
  Packed v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v.word[i] = 0;
#pragma unroll
    for (int j = 0; j < per_word; ++j) {
      const int64_t at = begin + i * per_word + j;
      if (at < end) v.word[i] |= bits_of(row[at]) << (32 / per_word * j);
    }
  }
  return v;
}

__device__ __forceinline__ void set_bits(float& x, uint32_t bits) { x = __uint_as_float(bits); }
__device__ __forceinline__ void set_bits(bf16& x, uint32_t bits) { x.bits = static_cast<uint16_t>(bits); }
__device__ __forceinline__ void set_bits(f16& x, uint32_t bits) { x.bits = static_cast<uint16_t>(bits); }

template <class T>
__device__ __forceinline__ void store_vector(T* row, int64_t begin, int64_t end, bool whole_vectors, const Packed& v) {
  if (whole_vectors) {
    *reinterpret_cast<uint4*>(row + begin) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
    return;
  }
  constexpr int per_word = 4 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < per_word; ++j) {
      const int64_t at = begin + i * per_word + j;
      if (at < end) set_bits(row[at], v.word[i] >> (32 / per_word * j));
    }
  }
}

// n floats, or n 16-bit values widened, of the elements from `begin` on; those from `end` on are 0. For operands whose
// type is not the row's: weights in float beside 16-bit rows.
template <class T, int n>
__device__ __forceinline__ void load_floats(const T* row, int64_t begin, int64_t end, bool whole_vectors,
                                            float (&x)[n]) {
  static_assert(n % width<T> == 0 || width<T> % n == 0, "whole vectors");
  if constexpr (n >= width<T>) {
#pragma unroll
    for (int i = 0; i < n; i += width<T>) {
      float part[width<T>];
      unpack<T>(load_vector(row, begin + i, end, whole_vectors), part);
#pragma unroll
      for (int j = 0; j < width<T>; ++j) x[i + j] = part[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = begin + i < end ? to_float(row[begin + i]) : 0.0f;
  }
}

// Whether rows of `cols` elements, `stride` elements apart from `data` on, consist of whole vectors on their
// boundaries.
template <class T>
bool whole_vectors(const void* data, int64_t cols, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % vector_bytes == 0 && cols % width<T> == 0 && stride % width<T> == 0;
}

// Calls body(T{}) for the storage type of a run-time dtype.
template <class Body>
cudaError_t with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    default:
      return cudaErrorInvalidValue;  // float64 stays on the CPU: the host refuses it in words
  }
}

}  // namespace transfuse::cuda
