// Lets the AVX-512 level of kernels/cpu run on a CPU without AVX-512: included in front of every kernel source by the
// emulated build (tests/test_isa.py), it gives the intrinsics of vec.h as SIMDe's portable versions. Test code only.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

// Intrinsics that vec.h uses and this SIMDe release does not have, lane by lane.
static inline simde__m512 emulated_maskz_loadu_ps(simde__mmask16 keep, const void* p) {
  float lane[16];
  for (int i = 0; i < 16; ++i) lane[i] = (keep >> i & 1) ? static_cast<const float*>(p)[i] : 0.0f;
  return simde_mm512_loadu_ps(lane);
}
static inline simde__m256i emulated_maskz_loadu_epi16(simde__mmask16 keep, const void* p) {
  uint16_t lane[16];
  for (int i = 0; i < 16; ++i) lane[i] = (keep >> i & 1) ? static_cast<const uint16_t*>(p)[i] : 0;
  return simde_mm256_loadu_si256(reinterpret_cast<const simde__m256i*>(lane));
}
static inline simde__m512i emulated_cvtepu16_epi32(simde__m256i a) {
  uint16_t half[16];
  int32_t lane[16];
  memcpy(half, &a, sizeof half);
  for (int i = 0; i < 16; ++i) lane[i] = half[i];
  return simde_mm512_loadu_si512(lane);
}
static inline simde__m256i emulated_cvtepi32_epi16(simde__m512i a) {
  int32_t lane[16];
  uint16_t half[16];
  memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 16; ++i) half[i] = static_cast<uint16_t>(lane[i]);
  return simde_mm256_loadu_si256(reinterpret_cast<const simde__m256i*>(half));
}
static inline simde__mmask16 emulated_test_epi8_mask(simde__m128i a, simde__m128i b) {
  uint8_t x[16], y[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  simde__mmask16 out = 0;
  for (int i = 0; i < 16; ++i) out = static_cast<simde__mmask16>(out | ((x[i] & y[i]) != 0 ? 1 << i : 0));
  return out;
}
static inline simde__m512i emulated_cvtps_epi32(simde__m512 a) {
  float x[16];
  int32_t lane[16];
  memcpy(x, &a, sizeof x);
  for (int i = 0; i < 16; ++i) lane[i] = fabsf(x[i]) < 2147483648.0f ? static_cast<int32_t>(rintf(x[i])) : INT32_MIN;
  return simde_mm512_loadu_si512(lane);
}
static inline simde__m512 emulated_cvtepi32_ps(simde__m512i a) {
  int32_t lane[16];
  float x[16];
  memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 16; ++i) x[i] = static_cast<float>(lane[i]);
  return simde_mm512_loadu_ps(x);
}
static inline simde__m512d emulated_cvtps_pd(simde__m256 a) {
  float lane[8];
  double x[8];
  memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 8; ++i) x[i] = lane[i];
  return simde_mm512_loadu_pd(x);
}
static inline simde__m256 emulated_cvtpd_ps(simde__m512d a) {
  double lane[8];
  float x[8];
  memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(lane[i]);
  return simde_mm256_loadu_ps(x);
}
static inline simde__m256 emulated_extractf32x8_ps(simde__m512 a, int half) {
  float lane[16];
  memcpy(lane, &a, sizeof lane);
  return simde_mm256_loadu_ps(lane + 8 * half);
}
static inline simde__m512 emulated_insertf32x8(simde__m512 a, simde__m256 b, int half) {
  float lane[16];
  memcpy(lane, &a, sizeof lane);
  memcpy(lane + 8 * half, &b, sizeof b);
  return simde_mm512_loadu_ps(lane);
}
static inline simde__m256d emulated_extractf64x4_pd(simde__m512d a, int half) {
  double lane[8];
  memcpy(lane, &a, sizeof lane);
  return simde_mm256_loadu_pd(lane + 4 * half);
}
static inline simde__m512i emulated_srai_epi32(simde__m512i a, int n) {
  int32_t lane[16];
  memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 16; ++i) lane[i] >>= n;
  return simde_mm512_loadu_si512(lane);
}
static inline void emulated_mask_storeu_ps(void* p, simde__mmask16 keep, simde__m512 a) {
  float lane[16];
  memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 16; ++i)
    if (keep >> i & 1) static_cast<float*>(p)[i] = lane[i];
}
static inline void emulated_mask_storeu_epi16(void* p, simde__mmask16 keep, simde__m256i a) {
  uint16_t lane[16];
  memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 16; ++i)
    if (keep >> i & 1) static_cast<uint16_t*>(p)[i] = lane[i];
}
static inline simde__m512 emulated_scalef_ps(simde__m512 a, simde__m512 n) {
  float x[16], k[16];
  memcpy(x, &a, sizeof x);
  memcpy(k, &n, sizeof k);
  for (int i = 0; i < 16; ++i) x[i] = ldexpf(x[i], static_cast<int>(fmaxf(-400.0f, fminf(400.0f, floorf(k[i])))));
  return simde_mm512_loadu_ps(x);
}
static inline simde__m512d emulated_scalef_pd(simde__m512d a, simde__m512d n) {
  double x[8], k[8];
  memcpy(x, &a, sizeof x);
  memcpy(k, &n, sizeof k);
  for (int i = 0; i < 8; ++i) x[i] = ldexp(x[i], static_cast<int>(fmax(-2200.0, fmin(2200.0, floor(k[i])))));
  return simde_mm512_loadu_pd(x);
}
static inline simde__m512 emulated_roundscale_ps(simde__m512 a) {
  float x[16];
  memcpy(x, &a, sizeof x);
  for (int i = 0; i < 16; ++i) x[i] = rintf(x[i]);
  return simde_mm512_loadu_ps(x);
}
static inline simde__m512d emulated_roundscale_pd(simde__m512d a) {
  double x[8];
  memcpy(x, &a, sizeof x);
  for (int i = 0; i < 8; ++i) x[i] = rint(x[i]);
  return simde_mm512_loadu_pd(x);
}
static inline simde__mmask16 emulated_cmplt_epu32_mask(simde__m512i a, simde__m512i b) {
  uint32_t x[16], y[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  simde__mmask16 less = 0;
  for (int i = 0; i < 16; ++i) less |= static_cast<simde__mmask16>(x[i] < y[i]) << i;
  return less;
}
static inline simde__m512 emulated_cvtph_ps(simde__m256i a) {
  simde__m128i half[2];
  simde__m256 x[2];
  memcpy(half, &a, sizeof half);
  for (int i = 0; i < 2; ++i) x[i] = _mm256_cvtph_ps(half[i]);
  simde__m512 result;
  memcpy(&result, x, sizeof result);
  return result;
}
static inline simde__m256i emulated_cvtps_ph(simde__m512 a) {
  simde__m256 x[2];
  simde__m128i half[2];
  memcpy(x, &a, sizeof x);
  for (int i = 0; i < 2; ++i) half[i] = _mm256_cvtps_ph(x[i], 0);  // to nearest even
  simde__m256i result;
  memcpy(&result, half, sizeof result);
  return result;
}
static inline simde__m512d emulated_maskz_loadu_pd(simde__mmask8 keep, const void* p) {
  double lane[8];
  for (int i = 0; i < 8; ++i) lane[i] = (keep >> i & 1) ? static_cast<const double*>(p)[i] : 0.0;
  return simde_mm512_loadu_pd(lane);
}
static inline void emulated_mask_storeu_pd(void* p, simde__mmask8 keep, simde__m512d a) {
  double lane[8];
  memcpy(lane, &a, sizeof lane);
  for (int i = 0; i < 8; ++i)
    if (keep >> i & 1) static_cast<double*>(p)[i] = lane[i];
}
static inline simde__m512i emulated_mullo_epi32(simde__m512i a, simde__m512i b) {
  uint32_t x[16], y[16];
  memcpy(x, &a, sizeof x);
  memcpy(y, &b, sizeof y);
  for (int i = 0; i < 16; ++i) x[i] *= y[i];
  return simde_mm512_loadu_si512(x);
}
static inline simde__m512d emulated_sqrt_pd(simde__m512d a) {
  double x[8];
  memcpy(x, &a, sizeof x);
  for (int i = 0; i < 8; ++i) x[i] = sqrt(x[i]);
  return simde_mm512_loadu_pd(x);
}

#undef _mm512_cmplt_epu32_mask
#define _mm512_cmplt_epu32_mask(a, b) emulated_cmplt_epu32_mask(a, b)
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps(a) emulated_cvtph_ps(a)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, mode) emulated_cvtps_ph(a)
#undef _mm512_maskz_loadu_pd
#define _mm512_maskz_loadu_pd(keep, p) emulated_maskz_loadu_pd(keep, p)
#undef _mm512_mask_storeu_pd
#define _mm512_mask_storeu_pd(p, keep, a) emulated_mask_storeu_pd(p, keep, a)
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32(a, b) emulated_mullo_epi32(a, b)
#undef _mm512_sqrt_pd
#define _mm512_sqrt_pd(a) emulated_sqrt_pd(a)
#undef _mm512_scalef_ps
#undef _mm512_scalef_pd
#undef _mm512_roundscale_ps
#undef _mm512_roundscale_pd
#undef _mm512_mask_storeu_ps
#undef _mm512_cvtepi32_epi16
#define _mm_test_epi8_mask(a, b) emulated_test_epi8_mask(a, b)
#define _mm512_cvtps_epi32(a) emulated_cvtps_epi32(a)
#define _mm512_cvtepi32_ps(a) emulated_cvtepi32_ps(a)
#undef _mm512_cvtps_pd
#define _mm512_cvtps_pd(a) emulated_cvtps_pd(a)
#undef _mm512_cvtpd_ps
#define _mm512_cvtpd_ps(a) emulated_cvtpd_ps(a)
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps(a, half) emulated_extractf32x8_ps(a, half)
#undef _mm512_insertf32x8
#define _mm512_insertf32x8(a, b, half) emulated_insertf32x8(a, b, half)
#undef _mm512_extractf64x4_pd
#define _mm512_extractf64x4_pd(a, half) emulated_extractf64x4_pd(a, half)
#undef _mm512_srai_epi32
#define _mm512_srai_epi32(a, n) emulated_srai_epi32(a, n)
#define _mm512_maskz_loadu_ps(keep, p) emulated_maskz_loadu_ps(keep, p)
#define _mm256_maskz_loadu_epi16(keep, p) emulated_maskz_loadu_epi16(keep, p)
#define _mm512_cvtepu16_epi32(a) emulated_cvtepu16_epi32(a)
#define _mm512_cvtepi32_epi16(a) emulated_cvtepi32_epi16(a)
#define _mm512_mask_storeu_ps(p, keep, a) emulated_mask_storeu_ps(p, keep, a)
#define _mm256_mask_storeu_epi16(p, keep, a) emulated_mask_storeu_epi16(p, keep, a)
#define _mm512_scalef_ps(a, n) emulated_scalef_ps(a, n)
#define _mm512_scalef_pd(a, n) emulated_scalef_pd(a, n)
#define _mm512_roundscale_ps(a, mode) emulated_roundscale_ps(a)
#define _mm512_roundscale_pd(a, mode) emulated_roundscale_pd(a)

#define __AVX512F__ 1
