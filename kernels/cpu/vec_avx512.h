// vec.h on AVX-512 F, BW, DQ and VL: one register per vector. Included by vec.h alone.
#pragma once

#include <immintrin.h>

namespace transfuse::cpu::TRANSFUSE_ISA {

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
TRANSFUSE_INLINE i32 mul_low(i32 a, i32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
TRANSFUSE_INLINE i32 mul_high_unsigned(i32 a, i32 b) {
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a.v, b.v), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  return {_mm512_mask_blend_epi32(0xAAAA, even, odd)};
}
TRANSFUSE_INLINE mask less_unsigned(i32 a, i32 b) { return {_mm512_cmplt_epu32_mask(a.v, b.v)}; }
TRANSFUSE_INLINE i32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
// table[index mod 32] of every lane.
TRANSFUSE_INLINE f32 lookup(const float (&table)[lookup_size], i32 index) {
  return {_mm512_permutex2var_ps(_mm512_loadu_ps(table), index.v, _mm512_loadu_ps(table + lanes))};
}
// The lanes of a where m, side by side from p on. All sixteen lanes are written.
TRANSFUSE_INLINE void store_compressed(float* p, f32 a, mask m) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m.v, a.v));
}
TRANSFUSE_INLINE void store_compressed(int32_t* p, i32 a, mask m) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m.v, a.v));
}
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
#if defined(__AVX512BF16__)
  // The instruction gives the same bits but for subnormals, which it takes for zeros.
  constexpr int subnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, subnormal) == 0, 1)) return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#endif
  const __m512i x = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  r = _mm512_mask_blend_epi32(isnan(a).v, r, _mm512_or_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(0x40)));
  return _mm512_cvtepi32_epi16(r);
}
TRANSFUSE_INLINE void store(bf16* p, f32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_bf16(a)); }
TRANSFUSE_INLINE void store(bf16* p, f32 a, int64_t n) { _mm256_mask_storeu_epi16(p, first_n(n).v, round_to_bf16(a)); }

TRANSFUSE_INLINE f32 load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
TRANSFUSE_INLINE f32 load(const f16* p, int64_t n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_n(n).v, p))}; }
TRANSFUSE_INLINE __m256i round_to_f16(f32 a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
TRANSFUSE_INLINE void store(f16* p, f32 a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_to_f16(a)); }
TRANSFUSE_INLINE void store(f16* p, f32 a, int64_t n) { _mm256_mask_storeu_epi16(p, first_n(n).v, round_to_f16(a)); }

TRANSFUSE_INLINE f64 set1d(double x) { return {_mm512_set1_pd(x)}; }
TRANSFUSE_INLINE f64 low(f32 a) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v))}; }        // lanes 0..7
TRANSFUSE_INLINE f64 high(f32 a) { return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))}; }  // lanes 8..15
TRANSFUSE_INLINE f32 narrow(f64 lo, f64 hi) {  // one rounding
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(lo.v)), _mm512_cvtpd_ps(hi.v), 1)};
}
TRANSFUSE_INLINE f64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
TRANSFUSE_INLINE f64 load(const double* p, int64_t n) {
  return {_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_n(n < 0 ? 0 : n).v), p)};
}
// Eight values from memory in double, and back with one rounding. On AVX2 a conversion that reads memory costs a quarter
// of load, low() and high(), which move a half between the lanes of a register first.
TRANSFUSE_INLINE f64 load64(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
TRANSFUSE_INLINE f64 load64(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)))};
}
TRANSFUSE_INLINE f64 load64(const f16* p) {
  return {_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
TRANSFUSE_INLINE void store64(float* p, f64 a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.v)); }
TRANSFUSE_INLINE void store(double* p, f64 a) { _mm512_storeu_pd(p, a.v); }
TRANSFUSE_INLINE void store(double* p, f64 a, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_n(n < 0 ? 0 : n).v), a.v);
}
TRANSFUSE_INLINE f64 operator+(f64 a, f64 b) { return {_mm512_add_pd(a.v, b.v)}; }
TRANSFUSE_INLINE f64 operator-(f64 a, f64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
TRANSFUSE_INLINE f64 operator*(f64 a, f64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
TRANSFUSE_INLINE f64 operator/(f64 a, f64 b) { return {_mm512_div_pd(a.v, b.v)}; }
TRANSFUSE_INLINE f64 fma(f64 a, f64 b, f64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
TRANSFUSE_INLINE f64 fnma(f64 a, f64 b, f64 c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
TRANSFUSE_INLINE f64 fms(f64 a, f64 b, f64 c) { return {_mm512_fmsub_pd(a.v, b.v, c.v)}; }
TRANSFUSE_INLINE f64 sqrt(f64 a) { return {_mm512_sqrt_pd(a.v)}; }
TRANSFUSE_INLINE mask64 operator<=(f64 a, f64 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)}; }
TRANSFUSE_INLINE mask64 operator>=(f64 a, f64 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GE_OQ)}; }
TRANSFUSE_INLINE mask64 operator==(f64 a, f64 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)}; }
TRANSFUSE_INLINE mask64 isnan(f64 a) { return {_mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q)}; }
TRANSFUSE_INLINE mask64 operator&(mask64 a, mask64 b) { return {static_cast<__mmask8>(a.v & b.v)}; }
TRANSFUSE_INLINE mask64 operator|(mask64 a, mask64 b) { return {static_cast<__mmask8>(a.v | b.v)}; }
TRANSFUSE_INLINE mask64 operator~(mask64 a) { return {static_cast<__mmask8>(~a.v)}; }
TRANSFUSE_INLINE bool all(mask64 a) { return a.v == 0xFF; }
TRANSFUSE_INLINE mask64 low(mask a) { return {static_cast<__mmask8>(a.v)}; }
TRANSFUSE_INLINE mask64 high(mask a) { return {static_cast<__mmask8>(a.v >> 8)}; }
TRANSFUSE_INLINE mask narrow(mask64 lo, mask64 hi) { return {static_cast<__mmask16>(lo.v | hi.v << 8)}; }
// The bits of a and of word, as a double.
TRANSFUSE_INLINE f64 and_bits(f64 a, uint64_t word) {
  return {_mm512_castsi512_pd(_mm512_and_si512(_mm512_castpd_si512(a.v), _mm512_set1_epi64(static_cast<long long>(word))))};
}
TRANSFUSE_INLINE f64 or_bits(f64 a, uint64_t word) {
  return {_mm512_castsi512_pd(_mm512_or_si512(_mm512_castpd_si512(a.v), _mm512_set1_epi64(static_cast<long long>(word))))};
}
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

#ifdef __AVX512BF16__
constexpr bool has_bf16_dot = true;
TRANSFUSE_INLINE mask is_subnormal(f32 a) { return {_mm512_fpclass_ps_mask(a.v, 0x20)}; }
TRANSFUSE_INLINE f32 dot(f32 sum, i32 a, i32 b) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
TRANSFUSE_INLINE i32 round_neighbours(f32 low, f32 high) {
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v))};
}
TRANSFUSE_INLINE i32 round_to_pairs(f32 even, f32 odd) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_permutexvar_epi16(interleaved, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd.v, even.v)))};
}
#endif

// The halves, for vec_x86_halves.h.
TRANSFUSE_INLINE __m256 half0(f32 a) { return _mm512_castps512_ps256(a.v); }
TRANSFUSE_INLINE __m256 half1(f32 a) { return _mm512_extractf32x8_ps(a.v, 1); }
TRANSFUSE_INLINE f32 from_halves(__m256 lo, __m256 hi) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(lo), hi, 1)};
}
TRANSFUSE_INLINE __m256d half0(f64 a) { return _mm512_castpd512_pd256(a.v); }
TRANSFUSE_INLINE __m256d half1(f64 a) { return _mm512_extractf64x4_pd(a.v, 1); }

}  // namespace transfuse::cpu::TRANSFUSE_ISA

#include "vec_x86_halves.h"
