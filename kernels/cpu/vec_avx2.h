// vec.h on AVX2 + FMA + F16C: two registers per vector. Included by vec.h alone.
#pragma once

#include <immintrin.h>

namespace transfuse::cpu::TRANSFUSE_ISA {

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
TRANSFUSE_INLINE i32 mul_low(i32 x, i32 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
TRANSFUSE_INLINE __m256i mul_high_unsigned(__m256i x, __m256i y) {
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(x, y), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(y, 32));
  return _mm256_blend_epi32(even, odd, 0xAA);
}
TRANSFUSE_INLINE i32 mul_high_unsigned(i32 x, i32 y) { return {mul_high_unsigned(x.a, y.a), mul_high_unsigned(x.b, y.b)}; }
TRANSFUSE_INLINE mask less_unsigned(i32 x, i32 y) {
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  const auto less = [&](__m256i a, __m256i b) __attribute__((always_inline)) {
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_xor_si256(b, sign), _mm256_xor_si256(a, sign)));
  };
  return {less(x.a, y.a), less(x.b, y.b)};
}
TRANSFUSE_INLINE i32 load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
TRANSFUSE_INLINE f32 lookup(const float (&table)[lookup_size], i32 index) {
  const __m256i last = _mm256_set1_epi32(lookup_size - 1);
  return {_mm256_i32gather_ps(table, _mm256_and_si256(index.a, last), sizeof(float)),
          _mm256_i32gather_ps(table, _mm256_and_si256(index.b, last), sizeof(float))};
}
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

TRANSFUSE_INLINE f32 load(const f16* p) {
  const __m128i* half = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
}
TRANSFUSE_INLINE f32 load(const f16* p, int64_t n) {
  alignas(32) f16 buffer[16] = {};
  for (int64_t i = 0; i < n && i < lanes; ++i) buffer[i] = p[i];
  return load(buffer);
}
TRANSFUSE_INLINE void store(f16* p, f32 x) {
  constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, rounding));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, rounding));
}
TRANSFUSE_INLINE void store(f16* p, f32 x, int64_t n) {
  alignas(32) f16 buffer[16];
  store(buffer, x);
  for (int64_t i = 0; i < n && i < lanes; ++i) p[i] = buffer[i];
}

TRANSFUSE_INLINE f64 set1d(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
TRANSFUSE_INLINE f64 widen(__m256 x) { return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))}; }
TRANSFUSE_INLINE f64 low(f32 x) { return widen(x.a); }
TRANSFUSE_INLINE f64 high(f32 x) { return widen(x.b); }
TRANSFUSE_INLINE f32 narrow(f64 lo, f64 hi) {
  return {_mm256_set_m128(_mm256_cvtpd_ps(lo.b), _mm256_cvtpd_ps(lo.a)), _mm256_set_m128(_mm256_cvtpd_ps(hi.b), _mm256_cvtpd_ps(hi.a))};
}
TRANSFUSE_INLINE f64 load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
TRANSFUSE_INLINE mask64 first_n64(int64_t n) {
  const __m256i count = _mm256_set1_epi64x(n);
  return {_mm256_castsi256_pd(_mm256_cmpgt_epi64(count, _mm256_setr_epi64x(0, 1, 2, 3))),
          _mm256_castsi256_pd(_mm256_cmpgt_epi64(count, _mm256_setr_epi64x(4, 5, 6, 7)))};
}
TRANSFUSE_INLINE f64 load(const double* p, int64_t n) {
  const mask64 m = first_n64(n);
  return {_mm256_maskload_pd(p, _mm256_castpd_si256(m.a)), _mm256_maskload_pd(p + 4, _mm256_castpd_si256(m.b))};
}
TRANSFUSE_INLINE f64 load64(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))}; }
TRANSFUSE_INLINE __m256d load_quarter(const bf16* p) {
  const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16)));
}
TRANSFUSE_INLINE f64 load64(const bf16* p) { return {load_quarter(p), load_quarter(p + 4)}; }
TRANSFUSE_INLINE f64 load64(const f16* p) {
  const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return widen(x);
}
TRANSFUSE_INLINE void store64(float* p, f64 x) {
  _mm_storeu_ps(p, _mm256_cvtpd_ps(x.a));
  _mm_storeu_ps(p + 4, _mm256_cvtpd_ps(x.b));
}
TRANSFUSE_INLINE void store(double* p, f64 x) {
  _mm256_storeu_pd(p, x.a);
  _mm256_storeu_pd(p + 4, x.b);
}
TRANSFUSE_INLINE void store(double* p, f64 x, int64_t n) {
  const mask64 m = first_n64(n);
  _mm256_maskstore_pd(p, _mm256_castpd_si256(m.a), x.a);
  _mm256_maskstore_pd(p + 4, _mm256_castpd_si256(m.b), x.b);
}
TRANSFUSE_INLINE f64 operator+(f64 x, f64 y) { return {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)}; }
TRANSFUSE_INLINE f64 operator-(f64 x, f64 y) { return {_mm256_sub_pd(x.a, y.a), _mm256_sub_pd(x.b, y.b)}; }
TRANSFUSE_INLINE f64 operator*(f64 x, f64 y) { return {_mm256_mul_pd(x.a, y.a), _mm256_mul_pd(x.b, y.b)}; }
TRANSFUSE_INLINE f64 operator/(f64 x, f64 y) { return {_mm256_div_pd(x.a, y.a), _mm256_div_pd(x.b, y.b)}; }
TRANSFUSE_INLINE f64 fma(f64 x, f64 y, f64 z) { return {_mm256_fmadd_pd(x.a, y.a, z.a), _mm256_fmadd_pd(x.b, y.b, z.b)}; }
TRANSFUSE_INLINE f64 fnma(f64 x, f64 y, f64 z) { return {_mm256_fnmadd_pd(x.a, y.a, z.a), _mm256_fnmadd_pd(x.b, y.b, z.b)}; }
TRANSFUSE_INLINE f64 fms(f64 x, f64 y, f64 z) { return {_mm256_fmsub_pd(x.a, y.a, z.a), _mm256_fmsub_pd(x.b, y.b, z.b)}; }
TRANSFUSE_INLINE f64 sqrt(f64 x) { return {_mm256_sqrt_pd(x.a), _mm256_sqrt_pd(x.b)}; }
#define TRANSFUSE_COMPARE(op, code)                                        \
  TRANSFUSE_INLINE mask64 operator op(f64 x, f64 y) {                      \
    return {_mm256_cmp_pd(x.a, y.a, code), _mm256_cmp_pd(x.b, y.b, code)}; \
  }
TRANSFUSE_COMPARE(<, _CMP_LT_OQ)
TRANSFUSE_COMPARE(<=, _CMP_LE_OQ)
TRANSFUSE_COMPARE(>, _CMP_GT_OQ)
TRANSFUSE_COMPARE(>=, _CMP_GE_OQ)
TRANSFUSE_COMPARE(==, _CMP_EQ_OQ)
#undef TRANSFUSE_COMPARE
TRANSFUSE_INLINE mask64 isnan(f64 x) { return {_mm256_cmp_pd(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_pd(x.b, x.b, _CMP_UNORD_Q)}; }
TRANSFUSE_INLINE mask64 operator&(mask64 x, mask64 y) { return {_mm256_and_pd(x.a, y.a), _mm256_and_pd(x.b, y.b)}; }
TRANSFUSE_INLINE mask64 operator|(mask64 x, mask64 y) { return {_mm256_or_pd(x.a, y.a), _mm256_or_pd(x.b, y.b)}; }
TRANSFUSE_INLINE mask64 operator~(mask64 x) {
  const __m256d ones = _mm256_castsi256_pd(_mm256_set1_epi64x(-1));
  return {_mm256_xor_pd(x.a, ones), _mm256_xor_pd(x.b, ones)};
}
TRANSFUSE_INLINE bool all(mask64 x) { return _mm256_movemask_pd(_mm256_and_pd(x.a, x.b)) == 0xF; }
TRANSFUSE_INLINE mask64 widen_mask(__m256 x) {
  const __m256i m = _mm256_castps_si256(x);
  return {_mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(m))),
          _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_extracti128_si256(m, 1)))};
}
TRANSFUSE_INLINE mask64 low(mask x) { return widen_mask(x.a); }
TRANSFUSE_INLINE mask64 high(mask x) { return widen_mask(x.b); }
TRANSFUSE_INLINE __m256 narrow_mask(mask64 x) {  // the low words of eight lanes
  const __m256 both = _mm256_shuffle_ps(_mm256_castpd_ps(x.a), _mm256_castpd_ps(x.b), 0x88);
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(both), 0xD8));  // shuffle works in 128-bit halves
}
TRANSFUSE_INLINE mask narrow(mask64 lo, mask64 hi) { return {narrow_mask(lo), narrow_mask(hi)}; }
// The bits of x and of word, as a double.
TRANSFUSE_INLINE f64 and_bits(f64 x, uint64_t word) {
  const __m256d w = _mm256_castsi256_pd(_mm256_set1_epi64x(static_cast<long long>(word)));
  return {_mm256_and_pd(x.a, w), _mm256_and_pd(x.b, w)};
}
TRANSFUSE_INLINE f64 or_bits(f64 x, uint64_t word) {
  const __m256d w = _mm256_castsi256_pd(_mm256_set1_epi64x(static_cast<long long>(word)));
  return {_mm256_or_pd(x.a, w), _mm256_or_pd(x.b, w)};
}
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
TRANSFUSE_INLINE f32 from_halves(__m256 lo, __m256 hi) { return {lo, hi}; }
TRANSFUSE_INLINE __m256d half0(f64 x) { return x.a; }
TRANSFUSE_INLINE __m256d half1(f64 x) { return x.b; }

}  // namespace transfuse::cpu::TRANSFUSE_ISA

#include "vec_x86_halves.h"
