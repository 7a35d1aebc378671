// CUDA's half: conversions rounded to nearest even, NaN becomes 0x7fff as on the device.
#pragma once

#include <bit>
#include <cmath>

#include "vector_types.h"

struct __half_raw {
  unsigned short x;
};

struct alignas(2) __half {
  unsigned short __x;

  __half() = default;  // trivial, so that it may stand in shared memory
  constexpr __half(__half_raw raw) : __x(raw.x) {}
  __half(float value) : __x(rounded(value)) {}
  __half(double value) : __x(rounded(value)) {}
  operator float() const { return static_cast<float>(std::bit_cast<_Float16>(__x)); }
  operator __half_raw() const { return {__x}; }

 private:
  template <typename T>
  static unsigned short rounded(T value) {
    return std::isnan(value) ? 0x7fff : std::bit_cast<unsigned short>(static_cast<_Float16>(value));
  }
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;

  __half2() = default;
  constexpr __half2(__half x, __half y) : x(x), y(y) {}
};
using half2 = __half2;

inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half(float value) { return __half(value); }
inline __half __float2half_rn(float value) { return __half(value); }
inline __half __double2half(double value) { return __half(value); }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float low, float high) { return {__half(low), __half(high)}; }
inline __half2 __float22half2_rn(float2 pair) { return {__half(pair.x), __half(pair.y)}; }
inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half __low2half(__half2 pair) { return pair.x; }
inline __half __high2half(__half2 pair) { return pair.y; }
inline unsigned short __half_as_ushort(__half value) { return value.__x; }
inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
inline bool __hisnan(__half value) { return std::isnan(__half2float(value)); }
