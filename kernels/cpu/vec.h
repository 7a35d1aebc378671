// The one SIMD interface of the CPU kernels. The same three vectors on every ISA level:
//
//   f32   sixteen floats           mask      its lanes as booleans
//   f64   eight doubles            mask64
//   wide  sixteen doubles, an f32 widened    wide_mask          and i32, sixteen 32-bit integers
//
// Policy: the number of lanes is the same everywhere (AVX2 holds an f32 in two registers), so one reduction tree, and
// with it every bit of a result, is the same on every level that has FMA. Nothing here contracts by itself
// (-ffp-contract=off): an FMA is written fma(). Conversions to bfloat16 round to nearest even with subnormals kept
// (vcvtneps2bf16 would flush them). Memory is touched only at lanes < n, so a tail never reads past its row.
//
// What a level does by itself stands in vec_<level>.h; what follows from that, below.
#pragma once

#include <cstddef>

#include "isa.h"

#ifndef TRANSFUSE_ISA
#error "vec.h is for sources compiled once per ISA level (-DTRANSFUSE_ISA=...)"
#endif

#define TRANSFUSE_INLINE inline __attribute__((always_inline))

namespace transfuse::cpu::TRANSFUSE_ISA {
constexpr int64_t lanes = 16;
constexpr int64_t lanes64 = 8;
constexpr int64_t lookup_size = 32;
}  // namespace transfuse::cpu::TRANSFUSE_ISA

#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace transfuse::cpu::TRANSFUSE_ISA {

TRANSFUSE_INLINE f32 zero() { return set1(0.0f); }
TRANSFUSE_INLINE f64 zero64() { return set1d(0.0); }
TRANSFUSE_INLINE f32 operator-(f32 a) { return from_bits(bits(a) ^ set1i(INT32_MIN)); }
TRANSFUSE_INLINE f64 operator-(f64 a) { return set1d(-0.0) - a; }
TRANSFUSE_INLINE f32 max_nan(f32 a, f32 b) { return select(isnan(a), a, max(a, b)); }  // NaN where either is NaN
TRANSFUSE_INLINE f64 max_nan(f64 a, f64 b) { return select(isnan(a), a, max(a, b)); }
constexpr int32_t lane_numbers[lanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
TRANSFUSE_INLINE i32 iota() { return load(lane_numbers); }

#ifndef __AVX512F__
// The lanes of x where m, side by side from p on. Sixteen lanes may be written.
template <class T, class V>
TRANSFUSE_INLINE void store_compressed(T* p, V x, mask m) {
  T values[lanes];
  static_assert(sizeof values == sizeof x);
  __builtin_memcpy(values, &x, sizeof values);
  for (uint32_t left = to_bits(m); left != 0; left &= left - 1) *p++ = values[__builtin_ctz(left)];
}
#endif

// ---- pairs of bfloat16 ----
//
// An i32 of sixteen pairs, the even element in the low half of a lane. dot(sum, a, b) is fma(even, even, fma(odd, odd,
// sum)). round_to_pairs and round_neighbours round to nearest even, the latter lanes (2i, 2i + 1) of low, then of high, to
// one pair. Where has_bf16_dot, all are single instructions that take and give 0 for every subnormal number.

TRANSFUSE_INLINE f32 even_of(i32 pairs) { return from_bits(shift_left<16>(pairs)); }
TRANSFUSE_INLINE f32 odd_of(i32 pairs) { return from_bits(pairs & set1i(INT32_MIN >> 15)); }
// Of floats that are bfloat16 already.
TRANSFUSE_INLINE i32 pair_up(f32 even, f32 odd) { return bits(odd) | shift_right<16>(bits(even)); }

// round_to_pairs that keeps subnormal numbers on every level.
TRANSFUSE_INLINE i32 round_to_exact_pairs(f32 even, f32 odd) {
  const auto rounded = [](f32 x) {
    const i32 up = bits(x) + (shift_right<16>(bits(x)) & set1i(1)) + set1i(0x7FFF);
    return select(isnan(x), from_bits(bits(x) | set1i(0x400000)), from_bits(up));
  };
#ifdef __AVX512BF16__
  if (__builtin_expect(!any(is_subnormal(even) | is_subnormal(odd)), 1)) return round_to_pairs(even, odd);
#endif
  return pair_up(from_bits(bits(rounded(even)) & set1i(INT32_MIN >> 15)), odd_of(bits(rounded(odd))));
}
TRANSFUSE_INLINE i32 load_pairs(const bf16* p) { return bits(load(reinterpret_cast<const float*>(p))); }
TRANSFUSE_INLINE void store_pairs(bf16* p, i32 pairs) { store(reinterpret_cast<float*>(p), from_bits(pairs)); }

#ifndef __AVX512BF16__
constexpr bool has_bf16_dot = false;
TRANSFUSE_INLINE f32 dot(f32 sum, i32 a, i32 b) {
  return fma(even_of(a), even_of(b), fma(odd_of(a), odd_of(b), sum));
}
TRANSFUSE_INLINE i32 round_to_pairs(f32 even, f32 odd) { return round_to_exact_pairs(even, odd); }
TRANSFUSE_INLINE i32 round_neighbours(f32 low, f32 high) {
  alignas(64) bf16 x[2 * lanes];
  store(x, low);
  store(x + lanes, high);
  int32_t words[lanes];
  __builtin_memcpy(words, x, sizeof words);
  return load(words);
}
#endif

// ---- sixteen doubles ----

struct wide {
  f64 lo, hi;
};
struct wide_mask {
  mask64 lo, hi;
};

TRANSFUSE_INLINE wide widen(f32 x) { return {low(x), high(x)}; }
TRANSFUSE_INLINE wide widen(wide x) { return x; }
TRANSFUSE_INLINE f32 narrow(wide x) { return narrow(x.lo, x.hi); }  // one rounding
TRANSFUSE_INLINE wide_mask widen(mask m) { return {low(m), high(m)}; }
TRANSFUSE_INLINE mask narrow(wide_mask m) { return narrow(m.lo, m.hi); }

#define TRANSFUSE_BINARY(result, op) \
  TRANSFUSE_INLINE result operator op(wide a, wide b) { return {a.lo op b.lo, a.hi op b.hi}; }
TRANSFUSE_BINARY(wide, +)
TRANSFUSE_BINARY(wide, -)
TRANSFUSE_BINARY(wide, *)
TRANSFUSE_BINARY(wide, /)
TRANSFUSE_BINARY(wide_mask, <)
TRANSFUSE_BINARY(wide_mask, <=)
TRANSFUSE_BINARY(wide_mask, >)
TRANSFUSE_BINARY(wide_mask, >=)
TRANSFUSE_BINARY(wide_mask, ==)
#undef TRANSFUSE_BINARY
TRANSFUSE_INLINE wide operator-(wide a) { return {-a.lo, -a.hi}; }
TRANSFUSE_INLINE wide fma(wide a, wide b, wide c) { return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)}; }
TRANSFUSE_INLINE wide fms(wide a, wide b, wide c) { return {fms(a.lo, b.lo, c.lo), fms(a.hi, b.hi, c.hi)}; }
TRANSFUSE_INLINE wide fnma(wide a, wide b, wide c) { return {fnma(a.lo, b.lo, c.lo), fnma(a.hi, b.hi, c.hi)}; }
TRANSFUSE_INLINE wide max(wide a, wide b) { return {max(a.lo, b.lo), max(a.hi, b.hi)}; }  // b where either is NaN
TRANSFUSE_INLINE wide min(wide a, wide b) { return {min(a.lo, b.lo), min(a.hi, b.hi)}; }
TRANSFUSE_INLINE wide max_nan(wide a, wide b) { return {max_nan(a.lo, b.lo), max_nan(a.hi, b.hi)}; }
TRANSFUSE_INLINE wide abs(wide a) { return {abs(a.lo), abs(a.hi)}; }
TRANSFUSE_INLINE wide sqrt(wide a) { return {sqrt(a.lo), sqrt(a.hi)}; }
TRANSFUSE_INLINE wide round(wide a) { return {round(a.lo), round(a.hi)}; }
TRANSFUSE_INLINE wide_mask isnan(wide a) { return {isnan(a.lo), isnan(a.hi)}; }
TRANSFUSE_INLINE wide select(wide_mask m, wide yes, wide no) {
  return {select(m.lo, yes.lo, no.lo), select(m.hi, yes.hi, no.hi)};
}
TRANSFUSE_INLINE wide select(mask m, wide yes, wide no) { return select(widen(m), yes, no); }
TRANSFUSE_INLINE wide_mask operator&(wide_mask a, wide_mask b) { return {a.lo & b.lo, a.hi & b.hi}; }
TRANSFUSE_INLINE wide_mask operator|(wide_mask a, wide_mask b) { return {a.lo | b.lo, a.hi | b.hi}; }
TRANSFUSE_INLINE wide_mask operator~(wide_mask a) { return {~a.lo, ~a.hi}; }
TRANSFUSE_INLINE bool any(wide_mask a) { return any(a.lo | a.hi); }
TRANSFUSE_INLINE bool all(wide_mask a) { return all(a.lo & a.hi); }
TRANSFUSE_INLINE wide_mask first_n_wide(int64_t n) { return widen(first_n(n)); }
TRANSFUSE_INLINE double reduce_add(wide x) { return reduce_add(x.lo + x.hi); }  // (i, i+8) first, as in f32
TRANSFUSE_INLINE double reduce_max(wide x) { return reduce_max(max_nan(x.lo, x.hi)); }
TRANSFUSE_INLINE wide set1w(double x) { return {set1d(x), set1d(x)}; }

// A double rounded to odd at float's precision: rounding the result once more, to a 16-bit type, is then one rounding of
// the double (the lowest bit kept says that something was cut off). Not for float's subnormal range.
TRANSFUSE_INLINE f64 round_to_odd(f64 x) {
  constexpr uint64_t cut_bits = (uint64_t{1} << 29) - 1;
  const f64 kept = and_bits(x, ~cut_bits);
  return select(kept == x, x, or_bits(kept, cut_bits + 1));
}
TRANSFUSE_INLINE f32 narrow_to_odd(wide x) { return narrow(round_to_odd(x.lo), round_to_odd(x.hi)); }

// ---- loads and stores of n lanes, by storage type ----

TRANSFUSE_INLINE f64 load64(const double* p) { return load(p); }
TRANSFUSE_INLINE void store64(double* p, f64 x) { store(p, x); }

// Full vectors and the tail of any storage type, with the full case free of a mask.
template <class T>
TRANSFUSE_INLINE f32 load_n(const T* p, int64_t n) {
  return n == lanes ? load(p) : load(p, n);
}
template <class T>
TRANSFUSE_INLINE void store_n(T* p, f32 a, int64_t n) {
  if (n == lanes)
    store(p, a);
  else
    store(p, a, n);
}
template <class T>
TRANSFUSE_INLINE wide load_wide(const T* p, int64_t n = lanes) {
  return n == lanes ? wide{load64(p), load64(p + lanes64)} : widen(load(p, n));
}
TRANSFUSE_INLINE wide load_wide(const double* p, int64_t n = lanes) {
  return n == lanes ? wide{load(p), load(p + lanes64)}
                    : wide{load(p, n), n > lanes64 ? load(p + lanes64, n - lanes64) : zero64()};
}
// One rounding to the storage type.
template <class T>
TRANSFUSE_INLINE void store_wide(T* p, wide x, int64_t n = lanes) {
  store_n(p, narrow_to_odd(x), n);
}
TRANSFUSE_INLINE void store_wide(float* p, wide x, int64_t n = lanes) {
  if (n < lanes) return store(p, narrow(x), n);
  store64(p, x.lo);
  store64(p + lanes64, x.hi);
}
TRANSFUSE_INLINE void store_wide(double* p, wide x, int64_t n = lanes) {
  if (n == lanes) {
    store(p, x.lo);
    store(p + lanes64, x.hi);
  } else {
    store(p, x.lo, n);
    if (n > lanes64) store(p + lanes64, x.hi, n - lanes64);
  }
}

// ---- code for either arithmetic type: Real is float or double, Vec<Real> its sixteen lanes ----

template <class Real>
struct Lanes;
template <>
struct Lanes<float> {
  using type = f32;
  using mask_type = mask;
};
template <>
struct Lanes<double> {
  using type = wide;
  using mask_type = wide_mask;
};
template <class Real>
using Vec = typename Lanes<Real>::type;

template <class V>
TRANSFUSE_INLINE V splat(double x);
template <>
TRANSFUSE_INLINE f32 splat<f32>(double x) {
  return set1(static_cast<float>(x));
}
template <>
TRANSFUSE_INLINE wide splat<wide>(double x) {
  return set1w(x);
}
template <class V, class T>
TRANSFUSE_INLINE V load_as(const T* p, int64_t n = lanes) {
  if constexpr (sizeof(V) == sizeof(wide)) {
    return load_wide(p, n);
  } else {
    return load_n(p, n);
  }
}
template <class T>
TRANSFUSE_INLINE void store_as(T* p, f32 x, int64_t n = lanes) {
  store_n(p, x, n);
}
template <class T>
TRANSFUSE_INLINE void store_as(T* p, wide x, int64_t n = lanes) {
  store_wide(p, x, n);
}
// What a store in type T and a load give back.
template <class T>
TRANSFUSE_INLINE f32 rounded(f32 x, T) {
  T half[lanes];
  store(half, x);
  return load(half);
}
TRANSFUSE_INLINE f32 rounded(f32 x, float) { return x; }
TRANSFUSE_INLINE wide rounded(wide x, double) { return x; }

TRANSFUSE_INLINE void store_transposed(double* out, const wide* rows, int64_t n) {
  double buffer[lanes][lanes];
  for (int64_t r = 0; r < lanes; ++r) store_wide(buffer[r], rows[r]);
  for (int64_t c = 0; c < n; ++c)
    for (int64_t r = 0; r < lanes; ++r) out[c * lanes + r] = buffer[r][c];
}

// ---- scalars and loops ----

// The one loop with a tail: body(i, n) for i = 0, 16, 32, ... with n lanes to do, 16 but for the last.
template <class Body>
TRANSFUSE_INLINE void for_each_vec(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) body(i, lanes);
  if (i < size) body(i, size - i);
}

TRANSFUSE_INLINE float to_float(float x) { return x; }
TRANSFUSE_INLINE float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, sizeof f);
  return f;
}
TRANSFUSE_INLINE float to_float(f16 x) {
  float lane[lanes];
  store(lane, load(&x, 1));
  return lane[0];
}
template <class T>
TRANSFUSE_INLINE double to_double(T x) {
  return to_float(x);
}
TRANSFUSE_INLINE double to_double(double x) { return x; }

}  // namespace transfuse::cpu::TRANSFUSE_ISA
