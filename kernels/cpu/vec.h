// The one SIMD interface of the CPU kernels: f32, sixteen float lanes on every ISA level, and f64, eight doubles.
//
// Policy: the number of lanes is the same everywhere (AVX2 holds an f32 in two registers), so one reduction tree, and
// with it every bit of a result, is the same on every level that has FMA. Nothing here contracts by itself
// (-ffp-contract=off): an FMA is written fma(). Conversions to bfloat16 round to nearest even with subnormals kept
// (vcvtneps2bf16 would flush them). Memory is touched only at lanes < n, so a tail never reads past its row.
#pragma once

#include <immintrin.h>

#include "isa.h"

#ifndef TRANSFUSE_ISA
#error "vec.h is for sources compiled once per ISA level (-DTRANSFUSE_ISA=...)"
#endif

#define TRANSFUSE_INLINE inline __attribute__((always_inline))

namespace transfuse::cpu::TRANSFUSE_ISA {

constexpr int64_t lanes = 16;
constexpr int64_t lanes64 = 8;

#if defined(__AVX512F__)

struct f32 {
  __m512 v;
};
struct i32 {
  __m512i v;
};
struct mask {  // one bit per lane
  __mmask16 v;
};
struct f64 {
  __m512d v;
};
struct mask64 {
  __mmask8 v;
};

TRANSFUSE_INLINE mask first_n(int64_t n) {
  return {static_cast<__mmask16>(n >= 16 ? 0xFFFFu : (1u << n) - 1u)};
}
TRANSFUSE_INLINE f32 set1(float x) { return {_mm512_set1_ps(x)}; }
TRANSFUSE_INLINE f32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
TRANSFUSE_INLINE f32 load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first_n(n).v, p)}; }
TRANSFUSE_INLINE void store(float* p, f32 a) { _mm512_storeu_ps(p, a.v); }
TRANSFUSE_INLINE void store(float* p, f32 a, int64_t n) { _mm512_mask_storeu_ps(p, first_n(n).v, a.v); }

TRANSFUSE_INLINE f32 operator+(f32 a, f32 b) { return {_mm512_add_ps(a.v, b.v)}; }
TRANSFUSE_INLINE f32 operator-(f32 a, f32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
TRANSFUSE_INLINE f32 operator*(f32 a, f32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
TRANSFUSE_INLINE f32 operator/(f32 a, f32 b) { return {_mm512_div_ps(a.v, b.v)}; }
TRANSFUSE_INLINE f32 fma(f32 a, f32 b, f32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a*b + c
TRANSFUSE_INLINE f32 fms(f32 a, f32 b, f32 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }    // a*b - c
TRANSFUSE_INLINE f32 fnma(f32 a, f32 b, f32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a*b
TRANSFUSE_INLINE f32 sqrt(f32 a) { return {_mm512_sqrt_ps(a.v)}; }
TRANSFUSE_INLINE f32 round(f32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

TRANSFUSE_INLINE mask operator<(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
TRANSFUSE_INLINE mask operator<=(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
TRANSFUSE_INLINE mask operator>(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
TRANSFUSE_INLINE mask operator>=(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
TRANSFUSE_INLINE mask operator==(f32 a, f32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
TRANSFUSE_INLINE mask isnan(f32 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
TRANSFUSE_INLINE mask operator&(mask a, mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
TRANSFUSE_INLINE mask operator|(mask a, mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
TRANSFUSE_INLINE mask operator~(mask a) { return {static_cast<__mmask16>(~a.v)}; }
TRANSFUSE_INLINE bool any(mask a) { return a.v != 0; }
TRANSFUSE_INLINE uint32_t to_bits(mask a) { return a.v; }  // lane i is bit i
TRANSFUSE_INLINE bool all(mask a) { return a.v == 0xFFFF; }
TRANSFUSE_INLINE f32 select(mask m, f32 yes, f32 no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
// Lanes where the byte is not 0 (a boolean mask row).
TRANSFUSE_INLINE mask nonzero(const uint8_t* p) {
  return {_mm_test_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

TRANSFUSE_INLINE i32 bits(f32 a) { return {_mm512_castps_si512(a.v)}; }
TRANSFUSE_INLINE f32 from_bits(i32 a) { return {_mm512_castsi512_ps(a.v)}; }
TRANSFUSE_INLINE i32 set1i(int32_t x) { return {_mm512_set1_epi32(x)}; }
TRANSFUSE_INLINE i32 to_int(f32 a) { return {_mm512_cvtps_epi32(a.v)}; }  // rounds to nearest even
TRANSFUSE_INLINE f32 to_float(i32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
TRANSFUSE_INLINE i32 operator+(i32 a, i32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
TRANSFUSE_INLINE i32 operator-(i32 a, i32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
TRANSFUSE_INLINE i32 operator&(i32 a, i32 b) { return {_mm512_and_si512(a.v, b.v)}; }
TRANSFUSE_INLINE i32 operator|(i32 a, i32 b) { return {_mm512_or_si512(a.v, b.v)}; }
TRANSFUSE_INLINE i32 operator^(i32 a, i32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n>
TRANSFUSE_INLINE i32 shift_left(i32 a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n>
TRANSFUSE_INLINE i32 shift_right(i32 a) { return {_mm512_srli_epi32(a.v, n)}; }  // logical
template <int n>
TRANSFUSE_INLINE i32 shift_right_signed(i32 a) { return {_mm512_srai_epi32(a.v, n)}; }
// a * 2^n with n integral, one rounding, subnormal results right (n is a float holding an integer, |n| <= 300).
TRANSFUSE_INLINE f32 ldexp(f32 a, f32 n) { return {_mm512_scalef_ps(a.v, n.v)}; }

TRANSFUSE_INLINE f32 load(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
TRANSFUSE_INLINE f32 load(const bf16* p, int64_t n) {
  const __m256i h = _mm256_maskz_loadu_epi16(first_n(n).v, p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
TRANSFUSE_INLINE __m256i round_to_bf16(f32 a) {
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  r = _mm512_mask_blend_epi32(isnan(a).v, r, _mm512_or_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(0x40)));
  return _mm512_cvtepi32_epi16(r);
}
TRANSFUSE_INLINE void store(bf16* p, f32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(a)); }
TRANSFUSE_INLINE void store(bf16* p, f32 a, int64_t n) { _mm256_mask_storeu_epi16(p, first_n(n).v, round_to_bf16(a)); }

TRANSFUSE_INLINE f64 set1d(double x) { return {_mm512_set1_pd(x)}; }
TRANSFUSE_INLINE f64 low(f32 a) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v))}; }        // lanes 0..7
TRANSFUSE_INLINE f64 high(f32 a) { return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))}; }  // lanes 8..15
TRANSFUSE_INLINE f32 narrow(f64 lo, f64 hi) {  // one rounding
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(lo.v)), _mm512_cvtpd_ps(hi.v), 1)};
}
TRANSFUSE_INLINE f64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
// Eight values from memory in double, and back with one rounding. On AVX2 a conversion that reads memory costs a quarter
// of load, low() and high(), which move a half between the lanes of a register first.
TRANSFUSE_INLINE f64 load64(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
TRANSFUSE_INLINE f64 load64(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)))};
}
TRANSFUSE_INLINE void store64(float* p, f64 a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.v)); }
TRANSFUSE_INLINE void store(double* p, f64 a) { _mm512_storeu_pd(p, a.v); }
TRANSFUSE_INLINE f64 operator+(f64 a, f64 b) { return {_mm512_add_pd(a.v, b.v)}; }
TRANSFUSE_INLINE f64 operator-(f64 a, f64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
TRANSFUSE_INLINE f64 operator*(f64 a, f64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
TRANSFUSE_INLINE f64 operator/(f64 a, f64 b) { return {_mm512_div_pd(a.v, b.v)}; }
TRANSFUSE_INLINE f64 fma(f64 a, f64 b, f64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
TRANSFUSE_INLINE f64 fnma(f64 a, f64 b, f64 c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
TRANSFUSE_INLINE mask64 operator<(f64 a, f64 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)}; }
TRANSFUSE_INLINE mask64 operator>(f64 a, f64 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
TRANSFUSE_INLINE bool any(mask64 a) { return a.v != 0; }
TRANSFUSE_INLINE f64 select(mask64 m, f64 yes, f64 no) { return {_mm512_mask_blend_pd(m.v, no.v, yes.v)}; }
TRANSFUSE_INLINE f64 max(f64 a, f64 b) { return {_mm512_max_pd(a.v, b.v)}; }  // b where either is NaN
TRANSFUSE_INLINE f64 min(f64 a, f64 b) { return {_mm512_min_pd(a.v, b.v)}; }
TRANSFUSE_INLINE f64 round(f64 a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
TRANSFUSE_INLINE f64 abs(f64 a) { return {_mm512_abs_pd(a.v)}; }
// a * 2^n for integral n with |n| <= 1000 and a normal result.
TRANSFUSE_INLINE f64 ldexp(f64 a, f64 n) { return {_mm512_scalef_pd(a.v, n.v)}; }

TRANSFUSE_INLINE f32 max(f32 a, f32 b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
TRANSFUSE_INLINE f32 min(f32 a, f32 b) { return {_mm512_min_ps(a.v, b.v)}; }
TRANSFUSE_INLINE f32 abs(f32 a) { return {_mm512_abs_ps(a.v)}; }

// The halves of an f32, for the fixed trees below.
TRANSFUSE_INLINE __m256 half0(f32 a) { return _mm512_castps512_ps256(a.v); }
TRANSFUSE_INLINE __m256 half1(f32 a) { return _mm512_extractf32x8_ps(a.v, 1); }
TRANSFUSE_INLINE __m256d half0(f64 a) { return _mm512_castpd512_pd256(a.v); }
TRANSFUSE_INLINE __m256d half1(f64 a) { return _mm512_extractf64x4_pd(a.v, 1); }

#else  // AVX2 + FMA + F16C: two registers per vector

struct f32 {
  __m256 a, b;
};
struct i32 {
  __m256i a, b;
};
struct mask {  // all ones or all zeros per lane
  __m256 a, b;
};
struct f64 {
  __m256d a, b;
};
struct mask64 {
  __m256d a, b;
};

TRANSFUSE_INLINE mask first_n(int64_t n) {
  const __m256i count = _mm256_set1_epi32(static_cast<int>(n));
  const __m256i lo = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), hi = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(count, lo)), _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, hi))};
}
TRANSFUSE_INLINE f32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TRANSFUSE_INLINE f32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TRANSFUSE_INLINE f32 load(const float* p, int64_t n) {
  const mask m = first_n(n);
  return {_mm256_maskload_ps(p, _mm256_castps_si256(m.a)), _mm256_maskload_ps(p + 8, _mm256_castps_si256(m.b))};
}
TRANSFUSE_INLINE void store(float* p, f32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
TRANSFUSE_INLINE void store(float* p, f32 x, int64_t n) {
  const mask m = first_n(n);
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.a), x.a);
  _mm256_maskstore_ps(p + 8, _mm256_castps_si256(m.b), x.b);
}

TRANSFUSE_INLINE f32 operator+(f32 x, f32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
TRANSFUSE_INLINE f32 operator-(f32 x, f32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
TRANSFUSE_INLINE f32 operator*(f32 x, f32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
TRANSFUSE_INLINE f32 operator/(f32 x, f32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
TRANSFUSE_INLINE f32 fma(f32 x, f32 y, f32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
TRANSFUSE_INLINE f32 fms(f32 x, f32 y, f32 z) { return {_mm256_fmsub_ps(x.a, y.a, z.a), _mm256_fmsub_ps(x.b, y.b, z.b)}; }
TRANSFUSE_INLINE f32 fnma(f32 x, f32 y, f32 z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
TRANSFUSE_INLINE f32 sqrt(f32 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
TRANSFUSE_INLINE f32 round(f32 x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

#define TRANSFUSE_COMPARE(op, code)                                                             \
  TRANSFUSE_INLINE mask operator op(f32 x, f32 y) {                                             \
    return {_mm256_cmp_ps(x.a, y.a, code), _mm256_cmp_ps(x.b, y.b, code)};                      \
  }
TRANSFUSE_COMPARE(<, _CMP_LT_OQ)
TRANSFUSE_COMPARE(<=, _CMP_LE_OQ)
TRANSFUSE_COMPARE(>, _CMP_GT_OQ)
TRANSFUSE_COMPARE(>=, _CMP_GE_OQ)
TRANSFUSE_COMPARE(==, _CMP_EQ_OQ)
#undef TRANSFUSE_COMPARE
TRANSFUSE_INLINE mask isnan(f32 x) { return {_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q)}; }
TRANSFUSE_INLINE mask operator&(mask x, mask y) { return {_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
TRANSFUSE_INLINE mask operator|(mask x, mask y) { return {_mm256_or_ps(x.a, y.a), _mm256_or_ps(x.b, y.b)}; }
TRANSFUSE_INLINE mask operator~(mask x) {
  const __m256 ones = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  return {_mm256_xor_ps(x.a, ones), _mm256_xor_ps(x.b, ones)};
}
TRANSFUSE_INLINE bool any(mask x) { return _mm256_movemask_ps(_mm256_or_ps(x.a, x.b)) != 0; }
TRANSFUSE_INLINE uint32_t to_bits(mask x) {
  return static_cast<uint32_t>(_mm256_movemask_ps(x.a)) | static_cast<uint32_t>(_mm256_movemask_ps(x.b)) << 8;
}
TRANSFUSE_INLINE bool all(mask x) { return _mm256_movemask_ps(_mm256_and_ps(x.a, x.b)) == 0xFF; }
TRANSFUSE_INLINE f32 select(mask m, f32 yes, f32 no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
TRANSFUSE_INLINE mask nonzero(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i zero = _mm256_setzero_si256();
  const __m256i lo = _mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(bytes), zero);
  const __m256i hi = _mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)), zero);
  return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
}

TRANSFUSE_INLINE i32 bits(f32 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
TRANSFUSE_INLINE f32 from_bits(i32 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
TRANSFUSE_INLINE i32 set1i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
TRANSFUSE_INLINE i32 to_int(f32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
TRANSFUSE_INLINE f32 to_float(i32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
TRANSFUSE_INLINE i32 operator+(i32 x, i32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
TRANSFUSE_INLINE i32 operator-(i32 x, i32 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
TRANSFUSE_INLINE i32 operator&(i32 x, i32 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
TRANSFUSE_INLINE i32 operator|(i32 x, i32 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
TRANSFUSE_INLINE i32 operator^(i32 x, i32 y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int n>
TRANSFUSE_INLINE i32 shift_left(i32 x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
template <int n>
TRANSFUSE_INLINE i32 shift_right(i32 x) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
template <int n>
TRANSFUSE_INLINE i32 shift_right_signed(i32 x) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
// a * 2^n with n integral, |n| <= 300. Two exact steps and one that rounds: n is split so that each factor is normal.
TRANSFUSE_INLINE f32 ldexp(f32 a, f32 n) {
  const i32 k = to_int(n);
  const i32 half = shift_right_signed<1>(k), rest = k - half;
  const i32 bias = set1i(127);
  const f32 s0 = from_bits(shift_left<23>(half + bias));
  const i32 quarter = shift_right_signed<1>(rest), last = rest - quarter;
  const f32 s1 = from_bits(shift_left<23>(quarter + bias)), s2 = from_bits(shift_left<23>(last + bias));
  // |half| <= 150 would overflow the exponent field only for |n| > 252; scores use |n| <= 252.
  return ((a * s0) * s1) * s2;
}

TRANSFUSE_INLINE f32 widen_bf16(__m256i h) {
  const __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(h)), hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
TRANSFUSE_INLINE f32 load(const bf16* p) {  // two loads that widen, not one and a move between the lanes
  const __m128i* half = reinterpret_cast<const __m128i*>(p);
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(half)), hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(half + 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
TRANSFUSE_INLINE f32 load(const bf16* p, int64_t n) {
  alignas(32) uint16_t buffer[16] = {};
  for (int64_t i = 0; i < n && i < lanes; ++i) buffer[i] = p[i].bits;
  return widen_bf16(_mm256_load_si256(reinterpret_cast<const __m256i*>(buffer)));
}
TRANSFUSE_INLINE __m256i round_half_to_bf16(__m256 a) {  // 8 results in the low 16 bits of 8 words
  const __m256i x = _mm256_castps_si256(a);
  const __m256i top = _mm256_srli_epi32(x, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(r, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
TRANSFUSE_INLINE __m256i round_to_bf16(f32 x) {
  const __m256i packed = _mm256_packus_epi32(round_half_to_bf16(x.a), round_half_to_bf16(x.b));
  return _mm256_permute4x64_epi64(packed, 0xD8);  // packus works within 128-bit lanes: restore the order 0 2 1 3
}
TRANSFUSE_INLINE void store(bf16* p, f32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(x)); }
TRANSFUSE_INLINE void store(bf16* p, f32 x, int64_t n) {
  alignas(32) uint16_t buffer[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(buffer), round_to_bf16(x));
  for (int64_t i = 0; i < n && i < lanes; ++i) p[i].bits = buffer[i];
}

TRANSFUSE_INLINE f64 set1d(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
TRANSFUSE_INLINE f64 widen(__m256 x) { return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))}; }
TRANSFUSE_INLINE f64 low(f32 x) { return widen(x.a); }
TRANSFUSE_INLINE f64 high(f32 x) { return widen(x.b); }
TRANSFUSE_INLINE f32 narrow(f64 lo, f64 hi) {
  return {_mm256_set_m128(_mm256_cvtpd_ps(lo.b), _mm256_cvtpd_ps(lo.a)), _mm256_set_m128(_mm256_cvtpd_ps(hi.b), _mm256_cvtpd_ps(hi.a))};
}
TRANSFUSE_INLINE f64 load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
TRANSFUSE_INLINE f64 load64(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))}; }
TRANSFUSE_INLINE __m256d load_quarter(const bf16* p) {
  const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16)));
}
TRANSFUSE_INLINE f64 load64(const bf16* p) { return {load_quarter(p), load_quarter(p + 4)}; }
TRANSFUSE_INLINE void store64(float* p, f64 x) {
  _mm_storeu_ps(p, _mm256_cvtpd_ps(x.a));
  _mm_storeu_ps(p + 4, _mm256_cvtpd_ps(x.b));
}
TRANSFUSE_INLINE void store(double* p, f64 x) {
  _mm256_storeu_pd(p, x.a);
  _mm256_storeu_pd(p + 4, x.b);
}
TRANSFUSE_INLINE f64 operator+(f64 x, f64 y) { return {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)}; }
TRANSFUSE_INLINE f64 operator-(f64 x, f64 y) { return {_mm256_sub_pd(x.a, y.a), _mm256_sub_pd(x.b, y.b)}; }
TRANSFUSE_INLINE f64 operator*(f64 x, f64 y) { return {_mm256_mul_pd(x.a, y.a), _mm256_mul_pd(x.b, y.b)}; }
TRANSFUSE_INLINE f64 operator/(f64 x, f64 y) { return {_mm256_div_pd(x.a, y.a), _mm256_div_pd(x.b, y.b)}; }
TRANSFUSE_INLINE f64 fma(f64 x, f64 y, f64 z) { return {_mm256_fmadd_pd(x.a, y.a, z.a), _mm256_fmadd_pd(x.b, y.b, z.b)}; }
TRANSFUSE_INLINE f64 fnma(f64 x, f64 y, f64 z) { return {_mm256_fnmadd_pd(x.a, y.a, z.a), _mm256_fnmadd_pd(x.b, y.b, z.b)}; }
TRANSFUSE_INLINE mask64 operator<(f64 x, f64 y) { return {_mm256_cmp_pd(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_pd(x.b, y.b, _CMP_LT_OQ)}; }
TRANSFUSE_INLINE mask64 operator>(f64 x, f64 y) { return {_mm256_cmp_pd(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_pd(x.b, y.b, _CMP_GT_OQ)}; }
TRANSFUSE_INLINE bool any(mask64 x) { return _mm256_movemask_pd(_mm256_or_pd(x.a, x.b)) != 0; }
TRANSFUSE_INLINE f64 select(mask64 m, f64 yes, f64 no) {
  return {_mm256_blendv_pd(no.a, yes.a, m.a), _mm256_blendv_pd(no.b, yes.b, m.b)};
}
TRANSFUSE_INLINE f64 max(f64 x, f64 y) { return {_mm256_max_pd(x.a, y.a), _mm256_max_pd(x.b, y.b)}; }  // y where either is NaN
TRANSFUSE_INLINE f64 min(f64 x, f64 y) { return {_mm256_min_pd(x.a, y.a), _mm256_min_pd(x.b, y.b)}; }
TRANSFUSE_INLINE f64 round(f64 x) {
  return {_mm256_round_pd(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_pd(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
TRANSFUSE_INLINE f64 abs(f64 x) {
  const __m256d sign = _mm256_set1_pd(-0.0);
  return {_mm256_andnot_pd(sign, x.a), _mm256_andnot_pd(sign, x.b)};
}
TRANSFUSE_INLINE __m256d power_of_two(__m256d n) {  // 2^n for integral |n| <= 1000: the sum's low bits are n + 1023
  const __m256d sum = _mm256_add_pd(n, _mm256_set1_pd(0x1.8p52 + 1023.0));
  return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(sum), 52));
}
TRANSFUSE_INLINE f64 ldexp(f64 x, f64 n) { return {_mm256_mul_pd(x.a, power_of_two(n.a)), _mm256_mul_pd(x.b, power_of_two(n.b))}; }

TRANSFUSE_INLINE f32 max(f32 x, f32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }  // y where either is NaN
TRANSFUSE_INLINE f32 min(f32 x, f32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
TRANSFUSE_INLINE f32 abs(f32 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}

TRANSFUSE_INLINE __m256 half0(f32 x) { return x.a; }
TRANSFUSE_INLINE __m256 half1(f32 x) { return x.b; }
TRANSFUSE_INLINE __m256d half0(f64 x) { return x.a; }
TRANSFUSE_INLINE __m256d half1(f64 x) { return x.b; }

#endif

// ---- the same on every level ----

TRANSFUSE_INLINE f32 zero() { return set1(0.0f); }
TRANSFUSE_INLINE f64 zero64() { return set1d(0.0); }
TRANSFUSE_INLINE f32 operator-(f32 a) { return from_bits(bits(a) ^ set1i(INT32_MIN)); }
TRANSFUSE_INLINE f32 max_nan(f32 a, f32 b) { return select(isnan(a), a, max(a, b)); }  // NaN where either is NaN

// Sum over lanes, one fixed tree: (i, i+8), then (i, i+4), (i, i+2), (i, i+1).
TRANSFUSE_INLINE float reduce_add(f32 x) {
  const __m256 s8 = _mm256_add_ps(half0(x), half1(x));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
TRANSFUSE_INLINE double reduce_add(f64 x) {
  const __m256d s4 = _mm256_add_pd(half0(x), half1(x));
  const __m128d s2 = _mm_add_pd(_mm256_castpd256_pd128(s4), _mm256_extractf128_pd(s4, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s2, _mm_unpackhi_pd(s2, s2)));
}
// Largest lane; a NaN in any lane gives NaN (a row maximum propagates NaN).
TRANSFUSE_INLINE float reduce_max(f32 x) {
  if (any(isnan(x))) return __builtin_nanf("");
  const __m256 m8 = _mm256_max_ps(half0(x), half1(x));
  const __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
  const __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
  return _mm_cvtss_f32(_mm_max_ss(m2, _mm_shuffle_ps(m2, m2, 1)));
}

// The one loop with a tail: body(i, n) for i = 0, 16, 32, ... with n lanes to do, 16 but for the last.
template <class Body>
TRANSFUSE_INLINE void for_each_vec(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) body(i, lanes);
  if (i < size) body(i, size - i);
}
// Full vectors and the tail of either storage type, with the full case free of a mask.
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
TRANSFUSE_INLINE float to_float(float x) { return x; }
TRANSFUSE_INLINE float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, sizeof f);
  return f;
}

}  // namespace transfuse::cpu::TRANSFUSE_ISA
