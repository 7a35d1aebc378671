// The second product of attention: weighted sums of values, and what an excluded value must not bring into them.
//
// A product takes what is excluded times 0, which is NaN where that is not finite. A block whose sums are all finite
// has met nothing of the kind; any other walks its keys once more with add_kept_values, where values that are not
// finite are taken as 0 and what they make of the rows that keep them is found apart. Rows that keep none have the same
// bits in either walk.
#pragma once

#include "cuda/attention_scores.cuh"

namespace transfuse::cuda {

// The weights of 16 keys as the first operand, rounded to the values' type: two tiles of accumulators.
template <class T, int Keys>
__device__ __forceinline__ void weights_fragment(uint32_t (&a)[4], const ScoreFragment<Keys>& weights, int step) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const float(&x)[4] = weights.x[2 * step + tile];
    a[2 * tile] = pair_of<T>(x[0], x[1]);
    a[2 * tile + 1] = pair_of<T>(x[2], x[3]);
  }
}

template <class T, int m_tiles, int Keys, class ValueTile, int columns>
__device__ __forceinline__ void add_values(float (&output)[m_tiles][columns][4],
                                           const ScoreFragment<Keys> (&weights)[m_tiles], const ValueTile& value,
                                           int first_chunk = 0) {
  const SumsOperand<ValueTile> values(value);
#pragma unroll
  for (int step = 0; step < Keys / 16; ++step) {
    uint32_t a[m_tiles][4];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) weights_fragment<T>(a[t], weights[t], step);
#pragma unroll
    for (int n = 0; n < columns; n += 2) {
      uint32_t b[2][2];
      values.load(b, 16 * step, first_chunk + n);
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
        multiply<T>(output[t][n], a[t], b[0]);
        multiply<T>(output[t][n + 1], a[t], b[1]);
      }
    }
  }
}

// ---- over kept pairs alone ----

template <class T>
constexpr uint32_t exponent_bits = 0;
template <>
constexpr uint32_t exponent_bits<f16> = 0x7C00;
template <>
constexpr uint32_t exponent_bits<bf16> = 0x7F80;

// A register of values apart: the finite ones; 1 or -1 for the infinities; and 1 for infinities, 256 for NaN.
struct ValuesApart {
  uint32_t finite, signs, kinds;
};

template <class T>
__device__ __forceinline__ ValuesApart values_apart(uint32_t values) {
  ValuesApart r{0, 0, 0};
#pragma unroll
  for (int shift = 0; shift < 32; shift += 16) {
    const uint32_t x = values >> shift & 0xFFFF;
    const bool is_finite = (x & exponent_bits<T>) != exponent_bits<T>, is_nan = (x & 0x7FFF) > exponent_bits<T>;
    const uint32_t one = pair_of<T>(1.0f, 0.0f), many = pair_of<T>(256.0f, 0.0f);
    r.finite |= (is_finite ? x : 0u) << shift;
    r.signs |= (is_finite || is_nan ? 0u : one | (x & 0x8000)) << shift;
    r.kinds |= (is_finite ? 0u : is_nan ? many : one) << shift;
  }
  return r;
}

// The sign of each weight; and 1 for it, or 256 where it is 0 (or NaN) and yet takes part.
template <class T, int Keys>
__device__ __forceinline__ void kept_fragments(uint32_t (&signs)[4], uint32_t (&kept)[4],
                                               const ScoreFragment<Keys>& weights, int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sign[2], count[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int n = 2 * step + i / 2, e = i % 2 * 2 + j;
      sign[j] = weights.x[n][e] > 0 ? 1.0f : weights.x[n][e] < 0 ? -1.0f : 0.0f;
      count[j] = weights.is_excluded(n, e) ? 0.0f : sign[j] != 0 ? 1.0f : 256.0f;
    }
    signs[i] = pair_of<T>(sign[0], sign[1]);
    kept[i] = pair_of<T>(count[0], count[1]);
  }
}

// What values that are not finite add to the rows that keep them.
template <class T>
__device__ __forceinline__ void add_infinities(float (&sum)[4], const uint32_t (&signs)[4], const uint32_t (&kept)[4],
                                               const ValuesApart& low, const ValuesApart& high) {
  float balance[4] = {}, count[4] = {};
  multiply<T>(balance, signs, {low.signs, high.signs});
  multiply<T>(count, kept, {low.kinds, high.kinds});
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (count[e] != 0)
      sum[e] += fabsf(balance[e]) == count[e] ? balance[e] * attention_infinity : __int_as_float(0x7FC00000);
}

// The same sum over the pairs that are not excluded. What is not finite is counted: infinities of one sign alone give
// that infinity, everything else NaN, as IEEE has it.
template <class T, int m_tiles, int Keys, class ValueTile, int columns>
__device__ __forceinline__ void add_kept_values(float (&output)[m_tiles][columns][4],
                                                const ScoreFragment<Keys> (&weights)[m_tiles], const ValueTile& value,
                                           int first_chunk = 0) {
  const SumsOperand<ValueTile> values(value);
#pragma unroll
  for (int step = 0; step < Keys / 16; ++step) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      uint32_t a[4], signs[4], kept[4];
      weights_fragment<T>(a, weights[t], step);
      kept_fragments<T>(signs, kept, weights[t], step);
#pragma unroll
      for (int n = 0; n < columns; n += 2) {
        uint32_t b[2][2];
        values.load(b, 16 * step, first_chunk + n);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const ValuesApart low = values_apart<T>(b[j][0]), high = values_apart<T>(b[j][1]);
          float(&sum)[4] = output[t][n + j];
          multiply<T>(sum, a, {low.finite, high.finite});
          if (!__any_sync(whole_warp, low.kinds != 0 || high.kinds != 0)) continue;
          add_infinities<T>(sum, signs, kept, low, high);
        }
      }
    }
  }
}

}  // namespace transfuse::cuda
