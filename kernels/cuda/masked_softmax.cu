// Masked softmax of rows: y_j = exp(s_j - m) / sum, s = scale * x + mask over the valid keys of the row, 0 elsewhere.
//
// Of float32 a score is carried as two floats, so that neither scale * x, nor the mask's addition, nor s - m loses a
// bit that exp would magnify: at logits around 100 a rounded score alone costs 60 ULP of its weight. The weights are
// summed in two floats and the quotient is one rounding: error <= 3 ULP per element. 16-bit rows do with less:
// masked_softmax_16_bit.cuh.
//
// Rows by their largest score m:  no valid key: 0.  m NaN or infinite: NaN at the valid keys.  |m| > 2^20: the second
// float of the largest score decides too.
//
// Policy: the scores of a row stay in the registers of its threads, 16 keys to a thread; rows of more than 8192 keys
// are read three times. Reductions have one tree per row length.
#include "cuda/masked_softmax.cuh"

#include <cmath>
#include <type_traits>

#include "cuda/exact.cuh"
#include "cuda/exp.cuh"
#include "cuda/launch.cuh"
#include "cuda/masked_softmax_16_bit.cuh"
#include "cuda/masked_softmax_rows.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"

namespace transfuse::cuda {

namespace {

// ---- scores ----

// Scores of n neighbouring keys, hi the rounded ones and lo what rounding took; bit i of `valid`: key i takes part.
template <int n>
struct Scores {
  float hi[n], lo[n];
  unsigned valid;
};

// The scores of the vector `x` of keys from `begin` on.
template <class T>
__device__ __forceinline__ Scores<width<T>> scores_of(const MaskedSoftmaxParams& p, const SoftmaxRow& row,
                                                      const float (&x)[width<T>], int64_t begin) {
  constexpr int n = width<T>;
  Scores<n> scores;
  scores.valid = seen_keys<n>(row, begin);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const Pair product = two_product(x[i], p.scale);
    scores.hi[i] = product.hi;
    scores.lo[i] = fmaf(x[i], p.scale_rest, product.lo);
  }
  if (p.mask_kind == MaskKind::keep) {
    scores.valid &= kept_keys<n>(static_cast<const uint8_t*>(row.mask), begin, p.keys, p.mask_stride, p.whole_mask);
  } else if (p.mask_kind != MaskKind::none) {
    float bias[n];
    if (p.mask_kind == MaskKind::additive)
      load_bias(static_cast<const T*>(row.mask), begin, p.keys, p.mask_stride, p.whole_mask, bias);
    else
      load_bias(static_cast<const float*>(row.mask), begin, p.keys, p.mask_stride, p.whole_mask, bias);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const Pair sum = two_sum(scores.hi[i], bias[i]);
      const Pair joined = quick_two_sum(sum.hi, scores.lo[i] + sum.lo);
      const bool finite = isfinite(joined.hi);  // the residual of an infinite sum is NaN
      scores.hi[i] = finite ? joined.hi : sum.hi;
      scores.lo[i] = joined.lo;
      if (bias[i] == -infinity) scores.valid &= ~(1u << i);
    }
  }
#pragma unroll
  for (int i = 0; i < n; ++i) scores.lo[i] = isfinite(scores.lo[i]) ? scores.lo[i] : 0.0f;
  return scores;
}

// ---- the largest score ----

struct Largest {
  float score;  // -inf where there is none
  int any;      // whether there is one
};
__device__ __forceinline__ Largest shuffle_xor(Largest x, int lane_mask) {
  return {__shfl_xor_sync(whole_warp, x.score, lane_mask), __shfl_xor_sync(whole_warp, x.any, lane_mask)};
}
struct LargestOf {
  __device__ __forceinline__ Largest operator()(Largest a, Largest b) const {
    return {MaxOrNaN{}(a.score, b.score), a.any | b.any};
  }
};

template <int n>
__device__ __forceinline__ void take_largest(const Scores<n>& scores, Largest& largest) {
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (scores.valid >> i & 1) largest.score = MaxOrNaN{}(largest.score, scores.hi[i]);
  largest.any |= scores.valid != 0;
}
template <int n>
__device__ __forceinline__ float largest_rest(const Scores<n>& scores, float largest, float rest) {
#pragma unroll
  for (int i = 0; i < n; ++i)
    if ((scores.valid >> i & 1) && scores.hi[i] == largest) rest = fmaxf(rest, scores.lo[i]);
  return rest;
}

// exp(score - largest), 0 of what is not valid.
template <int n>
__device__ __forceinline__ void weights_of(const Scores<n>& scores, Pair largest, float (&weights)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const Pair difference = two_sum(scores.hi[i], -largest.hi);
    const float rest = difference.lo + (scores.lo[i] - largest.lo);
    const Pair exponent = quick_two_sum(difference.hi, isfinite(rest) ? rest : 0.0f);
    // Only a weight of 0 has a residual beyond this, or one that is not finite.
    constexpr float most = 0x1p-12f;
    const float residual = fminf(fmaxf(exponent.lo, -most), most);
    const float weight = exp_nonpositive(exponent.hi, residual);
    weights[i] = scores.valid >> i & 1 ? weight : 0.0f;
  }
}

template <int threads>
struct SoftmaxExchange {
  Exchange<Largest, threads> largest;
  Exchange<float, threads> rest;
  Exchange<Pair, threads> sum;
};

// What a row's weights are multiplied by, or what stands in their place.
struct SoftmaxScale {
  Pair inverse;  // 1 / the sum of the weights
  bool no_key, not_a_number;
};

// `each_score(f)` calls f(scores) for the vectors of a row that this thread holds.
template <int threads, class EachScore>
__device__ __forceinline__ Pair largest_of(EachScore each_score, SoftmaxExchange<threads>& exchange,
                                           SoftmaxScale& scale) {
  constexpr float rest_counts = 0x1p20f;  // below, the largest score's residual is no more than another's
  Largest largest = {-infinity, 0};
  each_score([&](const auto& scores) { take_largest(scores, largest); });
  largest = reduce<threads>(largest, LargestOf{}, exchange.largest);
  scale.no_key = largest.any == 0;
  scale.not_a_number = !scale.no_key && !isfinite(largest.score);
  float rest = 0;
  const bool counts = isfinite(largest.score) && fabsf(largest.score) > rest_counts;
  if (__any_sync(whole_warp, counts)) {  // of a warp that may hold several rows
    rest = -infinity;
    each_score([&](const auto& scores) { rest = largest_rest(scores, largest.score, rest); });
    rest = reduce<threads>(rest, MaxOrNaN{}, exchange.rest);
    if (!counts) rest = 0;
  }
  return {largest.score, rest};
}

__device__ __forceinline__ Pair inverse_of(Pair sum) {
  const float inverse = 1.0f / sum.hi;
  return {inverse, fmaf(-inverse, sum.lo, fmaf(-inverse, sum.hi, 1.0f)) * inverse};
}

// Weights become results.
template <int n>
__device__ __forceinline__ void finish(const SoftmaxScale& scale, unsigned valid, float (&weights)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float quotient = fmaf(weights[i], scale.inverse.hi, weights[i] * scale.inverse.lo);
    const float filled = scale.not_a_number && (valid >> i & 1) ? __int_as_float(0x7FC00000) : 0.0f;
    weights[i] = scale.no_key || scale.not_a_number ? filled : quotient;
  }
}

// ---- forward ----

template <class Policy>
__device__ __forceinline__ void softmax_float32(const MaskedSoftmaxParams& p, int64_t row_number, bool valid,
                                                const HeldRow<Policy>& x, SoftmaxExchange<Policy::threads>& exchange) {
  using T = typename Policy::T;
  constexpr int n = width<T>, vectors = Policy::vectors;
  const SoftmaxRow row = softmax_row<T>(p, valid ? row_number : 0);
  Scores<n> scores[vectors];
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    if (x.holds(v)) {
      float values[n];
      unpack<T>(x.held[v], values);
      scores[v] = scores_of<T>(p, row, values, x.begin(v));
    } else {
      scores[v] = {};
    }
  }
  const auto each_score = [&](auto f) {
#pragma unroll
    for (int v = 0; v < vectors; ++v) f(scores[v]);
  };
  SoftmaxScale scale;
  const Pair largest = largest_of<Policy::threads>(each_score, exchange, scale);
  Pair sum = {0, 0};
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    weights_of(scores[v], largest, scores[v].hi);
#pragma unroll
    for (int i = 0; i < n; ++i) scores[v].lo[i] = scores[v].hi[i];
    sum = sum + sum_by_halves(scores[v].lo);
  }
  scale.inverse = inverse_of(reduce<Policy::threads>(sum, Add{}, exchange.sum));
  if (!valid) return;
  T* output = static_cast<T*>(p.output) + row_number * p.keys;
#pragma unroll
  for (int v = 0; v < vectors; ++v) {
    if (!x.holds(v)) continue;
    finish(scale, scores[v].valid, scores[v].hi);
    store_vector(output, x.begin(v), p.keys, x.whole, pack<T>(scores[v].hi));
  }
}

template <class T, int threads>
__device__ __forceinline__ void wide_softmax_float32(const MaskedSoftmaxParams& p, int64_t row_number,
                                                     SoftmaxExchange<threads>& exchange) {
  constexpr int n = width<T>;
  const SoftmaxRow row = softmax_row<T>(p, row_number);
  const StreamedRow<T, threads> x{static_cast<const T*>(p.input) + row_number * p.keys, p.keys, p.whole_vectors};
  SoftmaxScale scale;
  const auto each_score = [&](auto f) {
    x.each([&](const float (&values)[n], int64_t begin, int) { f(scores_of<T>(p, row, values, begin)); });
  };
  const Pair largest = largest_of<threads>(each_score, exchange, scale);
  Pair sum = {0, 0};
  each_score([&](const Scores<n>& scores) {
    float weights[n];
    weights_of(scores, largest, weights);
    sum = sum + sum_by_halves(weights);
  });
  scale.inverse = inverse_of(reduce<threads>(sum, Add{}, exchange.sum));
  T* output = static_cast<T*>(p.output) + row_number * p.keys;
  x.each([&](const float (&values)[n], int64_t begin, int) {
    const Scores<n> scores = scores_of<T>(p, row, values, begin);
    float weights[n];
    weights_of(scores, largest, weights);
    finish(scale, scores.valid, weights);
    store_vector(output, begin, p.keys, p.whole_vectors, pack<T>(weights));
  });
}

// ---- forward ----

// Blocks that a multiprocessor is to hold: with a bias, 1024 threads. Without it the compiler aims for more on sm_80,
// and spills.
template <class Mask, class Policy>
constexpr int forward_blocks = std::is_same_v<Mask, AdditiveMask> ? 1024 / Policy::block : 1;

template <class Mask, class Policy>
__global__ void __launch_bounds__(Policy::block, forward_blocks<Mask, Policy>)
    masked_softmax_forward_kernel(const __grid_constant__ MaskedSoftmaxParams p) {
  using T = typename Policy::T;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Policy::rows_per_block + threadIdx.x / Policy::threads;
  const bool valid = row < p.rows;  // threads without a row stay for the shuffles
  HeldRow<Policy> x(p.keys, threadIdx.x % Policy::threads);
  x.load(static_cast<const T*>(p.input) + row * p.keys, valid);
  if constexpr (std::is_same_v<T, float>) {
    __shared__ SoftmaxExchange<Policy::threads> exchange;
    softmax_float32(p, row, valid, x, exchange);
  } else {
    __shared__ ShortExchange<Policy::threads> exchange;
    softmax_16_bit<Mask>(p, row, valid, x, exchange);
  }
}

constexpr int wide_row_threads = 512;

template <class Mask, class T>
__global__ void __launch_bounds__(wide_row_threads)
    masked_softmax_wide_forward_kernel(const __grid_constant__ MaskedSoftmaxParams p) {
  if constexpr (std::is_same_v<T, float>) {
    __shared__ SoftmaxExchange<wide_row_threads> exchange;
    wide_softmax_float32<T>(p, blockIdx.x, exchange);
  } else {
    __shared__ ShortExchange<wide_row_threads> exchange;
    __shared__ Exchange<Pair, wide_row_threads> sum;
    wide_softmax_16_bit<Mask, T>(p, blockIdx.x, exchange, sum);
  }
}

// ---- backward ----

// A weight of 0 takes and gives no gradient, whatever its dy: an excluded key's is 0 even where dy is not finite.
template <int n>
__device__ __forceinline__ float sum_of_products(const float (&weight)[n], const float (&grad)[n]) {
  float products[n];
#pragma unroll
  for (int i = 0; i < n; ++i) products[i] = weight[i] == 0.0f ? 0.0f : weight[i] * grad[i];
  return sum_by_halves(products);
}
__device__ __forceinline__ float score_gradient(float weight, float grad, Pair mean) {
  return weight == 0.0f ? 0.0f : weight * ((grad - mean.hi) - mean.lo);
}

// `each_pair(f)` calls f(output, grad_output, begin) for the vectors of a row that this thread holds.
template <class T, int threads, class EachPair>
__device__ __forceinline__ void differentiate(const MaskedSoftmaxGradParams& p, bool whole, int64_t row, bool valid,
                                              bool first_thread, EachPair each_pair,
                                              Exchange<Pair, threads>& exchange) {
  constexpr int n = width<T>;
  Pair mean = {0, 0};
  each_pair([&](float (&weight)[n], float (&grad)[n], int64_t) { mean = mean + sum_of_products(weight, grad); });
  mean = reduce<threads>(mean, Add{}, exchange);
  mean.lo = isfinite(mean.hi) ? mean.lo : 0.0f;
  if (!valid) return;
  if (p.means != nullptr && first_thread) {
    p.means[2 * row] = mean.hi;
    p.means[2 * row + 1] = mean.lo;
  }
  if (p.grad_input == nullptr) return;
  T* grad_input = static_cast<T*>(p.grad_input) + row * p.keys;
  each_pair([&](float (&weight)[n], float (&grad)[n], int64_t begin) {
#pragma unroll
    for (int i = 0; i < n; ++i) grad[i] = score_gradient(weight[i], grad[i], mean) * p.scale;
    store_vector(grad_input, begin, p.keys, whole, pack<T>(grad));
  });
}

template <class Policy>
__global__ void __launch_bounds__(Policy::block)
    masked_softmax_backward_kernel(const __grid_constant__ MaskedSoftmaxGradParams p) {
  using T = typename Policy::T;
  constexpr int n = width<T>;
  __shared__ Exchange<Pair, Policy::threads> exchange;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Policy::rows_per_block + threadIdx.x / Policy::threads;
  const bool valid = row < p.rows;
  HeldRow<Policy> output(p.keys, threadIdx.x % Policy::threads), grad_output(p.keys, output.lane);
  output.load(static_cast<const T*>(p.output) + row * p.keys, valid);
  grad_output.load(static_cast<const T*>(p.grad_output) + row * p.keys, valid);
  const auto each_pair = [&](auto f) {
#pragma unroll
    for (int v = 0; v < Policy::vectors; ++v) {
      if (!output.holds(v)) continue;
      float weight[n], grad[n];
      unpack<T>(output.held[v], weight);
      unpack<T>(grad_output.held[v], grad);
      f(weight, grad, output.begin(v));
    }
  };
  differentiate<T, Policy::threads>(p, output.whole, row, valid, output.lane == 0, each_pair, exchange);
}

template <class T>
__global__ void __launch_bounds__(wide_row_threads)
    masked_softmax_wide_backward_kernel(const __grid_constant__ MaskedSoftmaxGradParams p) {
  constexpr int n = width<T>;
  __shared__ Exchange<Pair, wide_row_threads> exchange;
  const int64_t row = blockIdx.x;
  const StreamedRow<T, wide_row_threads> output{static_cast<const T*>(p.output) + row * p.keys, p.keys,
                                                p.whole_vectors};
  const T* grad_output = static_cast<const T*>(p.grad_output) + row * p.keys;
  const auto each_pair = [&](auto f) {
    output.each([&](float (&weight)[n], int64_t begin, int) {
      float grad[n];
      unpack<T>(load_vector(grad_output, begin, p.keys, p.whole_vectors), grad);
      f(weight, grad, begin);
    });
  };
  differentiate<T, wide_row_threads>(p, output.whole, row, true, threadIdx.x == 0, each_pair, exchange);
}

// ---- launchers ----

// Calls body(RowPolicy{}) for the policy of rows of so many keys, 16 to a thread at most; false where none holds them.
// Rows without whole vectors make do with fewer policies: bits depend on the threads of a row alone.
template <class T, class Body>
bool with_softmax_policy(int64_t keys, bool whole, Body body) {
  constexpr int few = 8 / width<T>, many = 16 / width<T>;
  if (whole) {
    if (keys <= 64) return body(RowPolicy<T, 8, few, true>{}), true;
    if (keys <= 256) return body(RowPolicy<T, 32, few, true>{}), true;
    if (keys <= 512) return body(RowPolicy<T, 32, many, true>{}), true;
    if (keys <= 1024) return body(RowPolicy<T, 128, few, true>{}), true;
    if (keys <= 2048) return body(RowPolicy<T, 128, many, true>{}), true;
    if (keys <= 4096) return body(RowPolicy<T, 256, many, true>{}), true;
    if (keys <= 8192) return body(RowPolicy<T, 512, many, true>{}), true;
  } else {
    if (keys <= 64) return body(RowPolicy<T, 8, few, false>{}), true;
    if (keys <= 512) return body(RowPolicy<T, 32, many, false>{}), true;
    if (keys <= 2048) return body(RowPolicy<T, 128, many, false>{}), true;
    if (keys <= 4096) return body(RowPolicy<T, 256, many, false>{}), true;
    if (keys <= 8192) return body(RowPolicy<T, 512, many, false>{}), true;
  }
  return false;
}

template <class Policy>
dim3 blocks_of(int64_t rows) {
  return dim3(static_cast<unsigned>((rows + Policy::rows_per_block - 1) / Policy::rows_per_block));
}

// Whether the mask's keys can be read as whole vectors beside the input's.
template <class T>
bool mask_is_whole(const MaskedSoftmaxParams& p) {
  const bool bytes = p.mask_kind == MaskKind::keep, floats = p.mask_kind == MaskKind::additive_f32;
  const int64_t item = bytes ? 1 : floats ? sizeof(float) : sizeof(T);
  const int64_t boundary = bytes ? 4 : vector_bytes;  // bytes are read in words
  bool whole = p.mask_stride == 1 && p.keys % width<T> == 0 && reinterpret_cast<uintptr_t>(p.mask) % boundary == 0;
  for (int d = 0; d < p.outer_dims; ++d) whole = whole && p.outer_mask_strides[d] * item % boundary == 0;
  return whole;
}

// Sizes by which row numbers are divided: all below the number of rows.
inline void find_dividers(MaskedSoftmaxParams& p) {
  p.few_rows = p.rows < divider_limit;
  if (!p.few_rows) return;
  p.by_queries = divider_of(p.queries);
  for (int d = 0; d < p.outer_dims; ++d) p.by_outer[d] = divider_of(p.outer_sizes[d]);
}

template <class Mask, class T>
cudaError_t launch_forward(const MaskedSoftmaxParams& p, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const bool held = with_softmax_policy<T>(p.keys, p.whole_vectors, [&](auto policy) {
    using Policy = decltype(policy);
    error = launch(masked_softmax_forward_kernel<Mask, Policy>, blocks_of<Policy>(p.rows), dim3(Policy::block), 0,
                   stream, p);
  });
  if (held) return error;
  return launch(masked_softmax_wide_forward_kernel<Mask, T>, dim3(static_cast<unsigned>(p.rows)),
                dim3(wide_row_threads), 0, stream, p);
}

constexpr double log2_e = 0x1.71547652b82fep+0;

}  // namespace

cudaError_t masked_softmax_forward(const MaskedSoftmaxParams& params, DType dtype, cudaStream_t stream) {
  if (params.rows == 0 || params.keys == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    MaskedSoftmaxParams p = params;
    p.whole_vectors = whole_vectors<T>(p.input, p.keys, p.keys) && whole_vectors<T>(p.output, p.keys, p.keys);
    p.whole_mask = mask_is_whole<T>(p);
    find_dividers(p);
    p.exponent_scale = static_cast<float>(std::fabs(static_cast<double>(p.scale) + p.scale_rest) * log2_e);
    p.sign_bits = p.scale < 0 ? 0x80008000u : 0u;
    if constexpr (std::is_same_v<T, float>) {
      return launch_forward<AnyMask, T>(p, stream);
    } else {
      const bool has_bias = p.mask_kind == MaskKind::additive || p.mask_kind == MaskKind::additive_f32;
      const float size = std::fabs(p.scale);
      const bool is_late = !has_bias && size >= least_late_scale && size <= largest_late_scale;
      return is_late ? launch_forward<KeepMask, T>(p, stream) : launch_forward<AdditiveMask, T>(p, stream);
    }
  });
}

cudaError_t masked_softmax_backward(const MaskedSoftmaxGradParams& params, DType dtype, cudaStream_t stream) {
  if (params.rows == 0 || params.keys == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    MaskedSoftmaxGradParams p = params;
    p.whole_vectors = whole_vectors<T>(p.output, p.keys, p.keys) && whole_vectors<T>(p.grad_output, p.keys, p.keys) &&
                      whole_vectors<T>(p.grad_input, p.keys, p.keys);
    cudaError_t error = cudaSuccess;
    const bool held = with_softmax_policy<T>(p.keys, p.whole_vectors, [&](auto policy) {
      using Policy = decltype(policy);
      error =
          launch(masked_softmax_backward_kernel<Policy>, blocks_of<Policy>(p.rows), dim3(Policy::block), 0, stream, p);
    });
    if (held) return error;
    return launch(masked_softmax_wide_backward_kernel<T>, dim3(static_cast<unsigned>(p.rows)), dim3(wide_row_threads),
                  0, stream, p);
  });
}

}  // namespace transfuse::cuda
