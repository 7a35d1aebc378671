// Masked softmax of 16-bit rows, forward, in float.
//
//   weight_j = 2^(log2(e) * (s_j - base)),   s = scale * x + bias,   result = weight / sum of weights
//
// What is rounded at the size of a score and not at that of a difference would show at large logits, so:
//   no bias   base is scale * the largest x, and s - base = scale * (x - largest): the maximum is exact.
//   bias      base is the largest of the rounded scores, whatever it is off by, as every weight is off by the same
//             factor; s - base = (scale * x + (bias - base)) + what the inner difference and the scale rounded. Only
//             beyond 2^26 may base be off by more than an exponent holds: then the largest difference is taken out as
//             well.
//
// Error of a result. The exponents of weights that become normal results lie in [-126, 0] (bfloat16) or [-14, 0]
// (float16). They take four roundings at most, of the difference, the factor and the product, each 2^-24 of the
// exponent: together 2^-15.5 or 2^-18.7 of the weight. ex2.approx adds 2^-22 to that (2 ULP, integers not excepted),
// the sum, its reciprocal and the last product 2^-20. So a result is off by 0.006 or 0.008 of its last place beside the
// half one that its own rounding takes. Results of float32 have no such room: they take exp.cuh.
//
// The argument of ex2.approx is at most exponent_shift and a few. A result below 2^-126, which it flushes to 0, is
// below half of the type's last subnormal; -inf gives 0 and NaN NaN.
//
// A key that the mask excludes has the score -inf by select. Sums that are not finite or 0 tell the rows that are not
// ordinary: NaN at their valid keys, 0 elsewhere, which is all 0 where no key is valid.
#pragma once

#include <type_traits>

#include "cuda/exact.cuh"
#include "cuda/masked_softmax_rows.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"

namespace transfuse::cuda {

namespace {

// What a kernel is compiled for: boolean masks or none, with a scale near 1; or any mask and scale, slower. Kernels for
// float32 take all.
struct KeepMask {};
struct AdditiveMask {};
struct AnyMask {};

// Without a bias the scale comes after the difference. Below these scales a difference of bfloat16 numbers that leaves
// float's range would still count, and 0 times the -inf of an excluded key is NaN; above, the factor leaves it.
constexpr float least_late_scale = 0x1p-100f, largest_late_scale = 0x1p100f;

constexpr float infinity = __builtin_huge_valf();

// bfloat16 has results down to 2^-133, and ex2.approx flushes below 2^-126: there weights are 2^24 times what they are.
template <class T>
constexpr float exponent_shift = std::is_same_v<T, bf16> ? 24.0f : 0.0f;

// ---- keys ----

// n neighbouring keys of a row.
template <class Mask, class T>
struct Keys;

// x, or -x under a negative scale; -inf where excluded.
template <class T>
struct Keys<KeepMask, T> {
  static constexpr int n = width<T>;
  struct MaskVector {
    uint32_t kept[n / 4];  // byte i is 0 where key i is excluded
  };
  float x[n];

  __device__ __forceinline__ static MaskVector read_mask(const MaskedSoftmaxParams& p, const SoftmaxRow& row,
                                                         int64_t begin) {
    MaskVector result;
#pragma unroll
    for (int word = 0; word < n / 4; ++word) result.kept[word] = 0xFFFFFFFFu;
    if (p.mask_kind == MaskKind::keep) {
      const uint8_t* mask = static_cast<const uint8_t*>(row.mask);
#pragma unroll
      for (int word = 0; word < n / 4; ++word) {
        const int64_t first = begin + 4 * word;
        if (p.whole_mask) {
          result.kept[word] = *reinterpret_cast<const uint32_t*>(mask + first);
        } else {
          result.kept[word] = 0;
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (first + i < p.keys && mask[(first + i) * p.mask_stride] != 0) result.kept[word] |= 1u << (8 * i);
        }
      }
    }
    return result;
  }

  __device__ __forceinline__ void set(const MaskedSoftmaxParams& p, const SoftmaxRow& row, int64_t begin,
                                      const Packed& packed, const MaskVector& mask) {
    Packed flipped;
#pragma unroll
    for (int i = 0; i < 4; ++i) flipped.word[i] = packed.word[i] ^ p.sign_bits;
    unpack<T>(flipped, x);
    const int64_t left = row.length - begin;
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = mask.kept[i / 4] >> (8 * (i % 4)) & 0xFF ? x[i] : -infinity;
    if (left < n) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] = i < left ? x[i] : -infinity;
    }
  }
  __device__ __forceinline__ float score(const MaskedSoftmaxParams&, int i) const { return x[i]; }
  __device__ __forceinline__ float above(const MaskedSoftmaxParams&, int i, float base) const { return x[i] - base; }
};

// x and the bias; 0 and -inf where excluded.
template <class T>
struct Keys<AdditiveMask, T> {
  static constexpr int n = width<T>;
  struct MaskVector {
    float bias[n];
  };
  float x[n], bias[n];

  __device__ __forceinline__ static MaskVector read_mask(const MaskedSoftmaxParams& p, const SoftmaxRow& row,
                                                         int64_t begin) {
    MaskVector result;
    if (p.mask_kind == MaskKind::additive) {
      load_bias(static_cast<const T*>(row.mask), begin, p.keys, p.mask_stride, p.whole_mask, result.bias);
    } else if (p.mask_kind == MaskKind::additive_f32) {
      load_bias(static_cast<const float*>(row.mask), begin, p.keys, p.mask_stride, p.whole_mask, result.bias);
    } else {
      unsigned kept = ~0u;
      if (p.mask_kind == MaskKind::keep)
        kept = kept_keys<n>(static_cast<const uint8_t*>(row.mask), begin, p.keys, p.mask_stride, p.whole_mask);
#pragma unroll
      for (int i = 0; i < n; ++i) result.bias[i] = kept >> i & 1 ? 0.0f : -infinity;
    }
    return result;
  }
  __device__ __forceinline__ void set(const MaskedSoftmaxParams&, const SoftmaxRow& row, int64_t begin,
                                      const Packed& packed, const MaskVector& mask) {
    unpack<T>(packed, x);
    const int64_t left = row.length - begin;
#pragma unroll
    for (int i = 0; i < n; ++i) bias[i] = mask.bias[i];
    if (left < n) {
#pragma unroll
      for (int i = 0; i < n; ++i) bias[i] = i < left ? bias[i] : -infinity;
    }
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = bias[i] == -infinity ? 0.0f : x[i];
  }
  // NaN of an infinite x, which no maximum takes: above() makes infinity of it again, or NaN.
  __device__ __forceinline__ float score(const MaskedSoftmaxParams& p, int i) const {
    return fmaf(x[i], p.scale_rest, fmaf(x[i], p.scale, bias[i]));
  }
  __device__ __forceinline__ float above(const MaskedSoftmaxParams& p, int i, float base) const {
    const Pair inner = two_sum(bias[i], -base);
    const float rest = fmaf(x[i], p.scale_rest, inner.lo);
    const float finite_rest = fabsf(rest) < infinity ? rest : 0.0f;  // of an infinite sum or x it may be NaN
    return bias[i] == -infinity ? -infinity : fmaf(x[i], p.scale, inner.hi) + finite_rest;
  }
};

template <class Mask>
__device__ __forceinline__ float exponent_factor(const MaskedSoftmaxParams& p) {
  return std::is_same_v<Mask, KeepMask> ? p.exponent_scale : 0x1.715476p+0f;
}

// A score's weight, of its difference from the base.
template <class T>
__device__ __forceinline__ float weight_of(float above, float factor) {
  return ptx::exp2_approx(fmaf(above, factor, exponent_shift<T>));
}

// No key at all: any base will do.
__device__ __forceinline__ float base_of(float largest) { return largest == -infinity ? 0.0f : largest; }
// Whether the base of an additive mask may be too far from the largest score.
__device__ __forceinline__ bool is_far(float base) { return fabsf(base) > 0x1p26f && fabsf(base) < infinity; }

__device__ __forceinline__ bool is_ordinary(float sum) { return sum > 0.0f && sum < infinity; }

// The results of a row whose sum is not ordinary.
template <class T>
__device__ __forceinline__ Packed extraordinary(const MaskedSoftmaxParams& p, const SoftmaxRow& row, int64_t begin) {
  constexpr int n = width<T>;
  unsigned valid = seen_keys<n>(row, begin);
  if (p.mask_kind != MaskKind::none) {
    const auto mask = Keys<AdditiveMask, T>::read_mask(p, row, begin);
#pragma unroll
    for (int i = 0; i < n; ++i) valid &= ~(static_cast<unsigned>(mask.bias[i] == -infinity) << i);
  }
  float result[n];
#pragma unroll
  for (int i = 0; i < n; ++i) result[i] = valid >> i & 1 ? __int_as_float(0x7FC00000) : 0.0f;
  return pack<T>(result);
}

// ---- rows ----

template <int threads>
struct ShortExchange {
  Exchange<float, threads> largest, above, sum;
};

template <class Mask, class Policy>
__device__ __forceinline__ void softmax_16_bit(const MaskedSoftmaxParams& p, int64_t row_number, bool valid,
                                               const HeldRow<Policy>& x, ShortExchange<Policy::threads>& exchange) {
  using T = typename Policy::T;
  constexpr int n = width<T>, vectors = Policy::vectors;
  const SoftmaxRow row = softmax_row<T>(p, valid ? row_number : 0);
  typename Keys<Mask, T>::MaskVector mask[vectors];
#pragma unroll
  for (int v = 0; v < vectors; ++v)
    if (x.holds(v)) mask[v] = Keys<Mask, T>::read_mask(p, row, x.begin(v));
  Keys<Mask, T> keys[vectors];
  float largest = -infinity;
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    if (!x.holds(v)) continue;
    keys[v].set(p, row, x.begin(v), x.held[v], mask[v]);
#pragma unroll
    for (int i = 0; i < n; ++i) largest = fmaxf(largest, keys[v].score(p, i));
  }
  const float base = base_of(reduce<Policy::threads>(largest, Max{}, exchange.largest));

  float weights[vectors][n];
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
#pragma unroll
    for (int i = 0; i < n; ++i) weights[v][i] = x.holds(v) ? keys[v].above(p, i, base) : -infinity;
  }
  if constexpr (std::is_same_v<Mask, AdditiveMask>) {
    if (__any_sync(whole_warp, is_far(base))) {  // of a warp that may hold several rows
      float most = -infinity;
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
#pragma unroll
        for (int i = 0; i < n; ++i) most = fmaxf(most, weights[v][i]);
      }
      most = base_of(reduce<Policy::threads>(most, Max{}, exchange.above));
      if (!is_far(base)) most = 0.0f;
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
#pragma unroll
        for (int i = 0; i < n; ++i) weights[v][i] -= most;
      }
    }
  }
  const float factor = exponent_factor<Mask>(p);
  float sum = 0;
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    float terms[n];
#pragma unroll
    for (int i = 0; i < n; ++i) terms[i] = weights[v][i] = weight_of<T>(weights[v][i], factor);
    sum += sum_by_halves(terms);
  }
  sum = reduce<Policy::threads>(sum, Add{}, exchange.sum);
  if (!valid) return;
  T* output = static_cast<T*>(p.output) + row_number * p.keys;
  if (!is_ordinary(sum)) {
#pragma unroll 1
    for (int v = 0; v < vectors; ++v)
      if (x.holds(v)) store_vector(output, x.begin(v), p.keys, x.whole, extraordinary<T>(p, row, x.begin(v)));
    return;
  }
  const float inverse = ptx::reciprocal_approx(sum);
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    if (!x.holds(v)) continue;
#pragma unroll
    for (int i = 0; i < n; ++i) weights[v][i] *= inverse;
    store_vector(output, x.begin(v), p.keys, x.whole, pack<T>(weights[v]));
  }
}

// A row that no block holds, read in every pass; its many weights are summed in two floats.
template <class Mask, class T, int threads>
__device__ __forceinline__ void wide_softmax_16_bit(const MaskedSoftmaxParams& p, int64_t row_number,
                                                    ShortExchange<threads>& exchange,
                                                    Exchange<Pair, threads>& sum_exchange) {
  constexpr int n = width<T>;
  const SoftmaxRow row = softmax_row<T>(p, row_number);
  const T* input = static_cast<const T*>(p.input) + row_number * p.keys;
  const auto each_keys = [&](auto f) {
    for (int64_t begin = static_cast<int64_t>(threadIdx.x) * n; begin < p.keys; begin += threads * n) {
      Keys<Mask, T> keys;
      keys.set(p, row, begin, load_vector(input, begin, p.keys, p.whole_vectors),
               Keys<Mask, T>::read_mask(p, row, begin));
      f(keys, begin);
    }
  };
  float largest = -infinity;
  each_keys([&](const Keys<Mask, T>& keys, int64_t) {
#pragma unroll
    for (int i = 0; i < n; ++i) largest = fmaxf(largest, keys.score(p, i));
  });
  const float base = base_of(reduce<threads>(largest, Max{}, exchange.largest));
  float most = 0;
  if constexpr (std::is_same_v<Mask, AdditiveMask>) {
    if (is_far(base)) {  // the same in all threads
      most = -infinity;
      each_keys([&](const Keys<Mask, T>& keys, int64_t) {
#pragma unroll
        for (int i = 0; i < n; ++i) most = fmaxf(most, keys.above(p, i, base));
      });
      most = base_of(reduce<threads>(most, Max{}, exchange.above));
    }
  }
  const float factor = exponent_factor<Mask>(p);
  const auto weight = [&](const Keys<Mask, T>& keys, int i) {
    return weight_of<T>(keys.above(p, i, base) - most, factor);
  };
  Pair sums = {0, 0};
  each_keys([&](const Keys<Mask, T>& keys, int64_t) {
    float weights[n];
#pragma unroll
    for (int i = 0; i < n; ++i) weights[i] = weight(keys, i);
    sums = sums + sum_by_halves(weights);
  });
  const float sum = to_float(reduce<threads>(sums, Add{}, sum_exchange));
  const float inverse = ptx::reciprocal_approx(sum);
  T* output = static_cast<T*>(p.output) + row_number * p.keys;
  each_keys([&](const Keys<Mask, T>& keys, int64_t begin) {
    float weights[n];
#pragma unroll
    for (int i = 0; i < n; ++i) weights[i] = weight(keys, i) * inverse;
    const Packed result = is_ordinary(sum) ? pack<T>(weights) : extraordinary<T>(p, row, begin);
    store_vector(output, begin, p.keys, p.whole_vectors, result);
  });
}

}  // namespace

}  // namespace transfuse::cuda
