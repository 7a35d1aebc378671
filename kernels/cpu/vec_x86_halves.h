// What the AVX2 and AVX-512 levels do alike, on the two halves of an f32 or f64. Included by them alone.
#pragma once

#include <immintrin.h>

namespace transfuse::cpu::TRANSFUSE_ISA {

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
TRANSFUSE_INLINE double reduce_max(f64 x) {
  if (any(isnan(x))) return __builtin_nan("");
  const __m256d m4 = _mm256_max_pd(half0(x), half1(x));
  const __m128d m2 = _mm_max_pd(_mm256_castpd256_pd128(m4), _mm256_extractf128_pd(m4, 1));
  return _mm_cvtsd_f64(_mm_max_sd(m2, _mm_unpackhi_pd(m2, m2)));
}

// table[x] of sixteen 16-bit x, whose bits are its index. One load for each entry: a gather instruction takes longer.
template <class Table>
TRANSFUSE_INLINE auto entry(const Table* table, const void* x, int i) {
  uint32_t two;
  __builtin_memcpy(&two, static_cast<const char*>(x) + i / 2 * sizeof two, sizeof two);
  return table + (i % 2 ? two >> 16 : two & 0xFFFF);
}
TRANSFUSE_INLINE __m128i gather8(const uint16_t* table, const void* x) {
  __m128i found = _mm_insert_epi16(_mm_setzero_si128(), *entry(table, x, 0), 0);
  found = _mm_insert_epi16(found, *entry(table, x, 1), 1);
  found = _mm_insert_epi16(found, *entry(table, x, 2), 2);
  found = _mm_insert_epi16(found, *entry(table, x, 3), 3);
  found = _mm_insert_epi16(found, *entry(table, x, 4), 4);
  found = _mm_insert_epi16(found, *entry(table, x, 5), 5);
  found = _mm_insert_epi16(found, *entry(table, x, 6), 6);
  return _mm_insert_epi16(found, *entry(table, x, 7), 7);
}
template <class T>
TRANSFUSE_INLINE void gather(T* out, const T* table, const T* x) {
  for (int64_t i = 0; i < lanes; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), gather8(&table->bits, x + i));
}
TRANSFUSE_INLINE __m128 gather4(const float* table, const void* x) {
  const __m128 two = _mm_insert_ps(_mm_load_ss(entry(table, x, 0)), _mm_load_ss(entry(table, x, 1)), 0x10);
  const __m128 three = _mm_insert_ps(two, _mm_load_ss(entry(table, x, 2)), 0x20);
  return _mm_insert_ps(three, _mm_load_ss(entry(table, x, 3)), 0x30);
}
template <class T>
TRANSFUSE_INLINE f32 gather(const float* table, const T* x) {
  const auto half = [&](int64_t i) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(gather4(table, x + i)), gather4(table, x + i + 4), 1);
  };
  return from_halves(half(0), half(8));
}

TRANSFUSE_INLINE void transpose8(__m256* x) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
// Sixteen rows as columns: out[16 c + r] = rows[r][c] for c in [0, n).
TRANSFUSE_INLINE void store_transposed(float* out, const f32* rows, int64_t n) {
  for (int64_t r = 0; r < lanes; r += 8) {
    __m256 left[8], right[8];
    for (int64_t i = 0; i < 8; ++i) {
      left[i] = half0(rows[r + i]);
      right[i] = half1(rows[r + i]);
    }
    transpose8(left);
    transpose8(right);
    for (int64_t i = 0; i < 8 && i < n; ++i) _mm256_storeu_ps(out + i * lanes + r, left[i]);
    for (int64_t i = 8; i < n; ++i) _mm256_storeu_ps(out + i * lanes + r, right[i - 8]);
  }
}

}  // namespace transfuse::cpu::TRANSFUSE_ISA
