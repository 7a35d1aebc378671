// CUDA's bfloat16: conversions rounded to nearest even, NaN becomes 0x7fff as on the device.
#pragma once

#include <bit>
#include <cmath>

#include "vector_types.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};

struct alignas(2) __nv_bfloat16 {
  unsigned short __x;

  __nv_bfloat16() = default;  // trivial, so that it may stand in shared memory
  constexpr __nv_bfloat16(__nv_bfloat16_raw raw) : __x(raw.x) {}
  __nv_bfloat16(float value) : __x(rounded(value)) {}
  __nv_bfloat16(double value) : __x(rounded(rounded_to_odd(value))) {}
  operator float() const { return std::bit_cast<float>(static_cast<unsigned>(__x) << 16); }
  operator __nv_bfloat16_raw() const { return {__x}; }

 private:
  static unsigned short rounded(float value) {
    if (std::isnan(value)) return 0x7fff;
    const unsigned bits = std::bit_cast<unsigned>(value);
    return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  // Rounding twice is right where the first rounding leaves an odd last bit whenever it is not exact.
  static float rounded_to_odd(double value) {
    const float nearest = static_cast<float>(value);
    const unsigned bits = std::bit_cast<unsigned>(nearest);
    if (!std::isfinite(nearest) || static_cast<double>(nearest) == value || bits & 1) return nearest;
    return std::bit_cast<float>(std::abs(static_cast<double>(nearest)) < std::abs(value) ? bits + 1 : bits - 1);
  }
};
using nv_bfloat16 = __nv_bfloat16;

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;

  __nv_bfloat162() = default;
  constexpr __nv_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) : x(x), y(y) {}
  // Rounding twice is right where the first rounding leaves an odd last bit whenever it is not exact.
  static float rounded_to_odd(double value) {
    const float nearest = static_cast<float>(value);
    const unsigned bits = std::bit_cast<unsigned>(nearest);
    if (!std::isfinite(nearest) || static_cast<double>(nearest) == value || bits & 1) return nearest;
    return std::bit_cast<float>(std::abs(static_cast<double>(nearest)) < std::abs(value) ? bits + 1 : bits - 1);
  }
};
using nv_bfloat162 = __nv_bfloat162;

inline float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value); }
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __double2bfloat16(double value) { return __nv_bfloat16(value); }
inline float __low2float(__nv_bfloat162 pair) { return __bfloat162float(pair.x); }
inline float __high2float(__nv_bfloat162 pair) { return __bfloat162float(pair.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {__bfloat162float(pair.x), __bfloat162float(pair.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) { return {__nv_bfloat16(low), __nv_bfloat16(high)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 pair) { return {__nv_bfloat16(pair.x), __nv_bfloat16(pair.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 low, __nv_bfloat16 high) { return {low, high}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16_raw{bits}; }
inline bool __hisnan(__nv_bfloat16 value) { return std::isnan(__bfloat162float(value)); }
