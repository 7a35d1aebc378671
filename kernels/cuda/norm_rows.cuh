// The rows of LayerNorm and RMSNorm on a GPU, for a Norm (layer_norm.cu, rms_norm.cu) that says
//
//   centered    whether it has a mean, and with it a bias
//
// Policy: a row stays in the registers of its threads from the one read to the one write. Its statistics are sums over
// deviations from its rounded mean, which is far closer to the mean than a standard deviation even at mean/std 1e6, and
// what the deviations' own mean is off by is corrected; a row for which that would not do (constant, beyond float's
// range, not finite) takes them in double. The sums are two floats for float32, whose results round twice: what
// x - mean loses is carried along. For 16-bit rows a float does, 2^-20 of a result being less than a hundredth of its
// last place; but for the narrowest, whose xhat takes few values (+-1 where there are two columns): times a 16-bit
// weight and plus a bias these lie in the middle between two results, where a float's last place decides.
// Parameters are read with the row, ahead of the reductions. Rows wider than a block's registers are read three times.
//
// The sums over a row's threads have one tree per row length; nothing depends on the batch.
#pragma once

#include <type_traits>

#include "cuda/exact.cuh"
#include "cuda/launch.cuh"
#include "cuda/norm.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"

namespace transfuse::cuda {

namespace {

// ---- statistics ----

// How a row is normalised: xhat = (x * scale - mean - mean_tail) * (rest + rest_tail), scale a power of two, so that
// neither x nor rstd = scale * rest leaves float's range.
struct Normalization {
  float scale, mean, mean_tail, rest, rest_tail;
};

// What sums over a row are taken in: Pair or float. Wide rows of any type have Pair: their threads add many terms.
template <class Policy>
using HeldSum = std::conditional_t<std::is_same_v<typename Policy::T, float> || Policy::threads == narrow_row_threads,
                                   Pair, float>;

template <class Sum, int threads>
struct NormExchange {
  Exchange<float, threads> mean;
  Exchange<Both<Sum>, threads> moments;
  Exchange<double, threads> sum, squares;
};

__device__ __forceinline__ double power_of_two_below(double x) {
  return __longlong_as_double(__double_as_longlong(x) & 0x7FF0000000000000ll);
}

// From a mean and an rstd in double. The exponent of `scale` is near rstd's, as far as x * scale stays a float.
__device__ __forceinline__ Normalization scaled_normalization(double mean, double rstd, bool centered) {
  constexpr double smallest = 0x1p-126, largest = 0x1p126;
  double power = fmin(power_of_two_below(rstd), largest);
  if (centered && fabs(mean) * power > largest) power = power_of_two_below(largest / fabs(mean));
  power = fmax(power, smallest);
  const double all_of_mean = mean * power, all_of_rest = rstd / power;
  Normalization row;
  row.scale = static_cast<float>(power);
  row.mean = static_cast<float>(all_of_mean);
  row.mean_tail = static_cast<float>(all_of_mean - row.mean);
  row.rest = static_cast<float>(all_of_rest);
  row.rest_tail = isfinite(row.rest) ? static_cast<float>(all_of_rest - row.rest) : 0.0f;
  return row;
}

// In double, right for every row; kept out of the way of the rows that do without.
template <bool centered, class Row, class Sum, int threads>
__device__ __forceinline__ Normalization wide_statistics(const Row& row, int64_t cols, SplitDouble eps,
                                                         NormExchange<Sum, threads>& exchange) {
  double mean = 0;
  if (centered) {
    row.each([&](const auto& x, int64_t, int) {
#pragma unroll
      for (int i = 0; i < Row::n; ++i) mean += x[i];  // 0 past the end of the row
    });
    mean = reduce<threads>(mean, Add{}, exchange.sum) / static_cast<double>(cols);
  }
  double squares = 0;
  row.each([&](const auto& x, int64_t, int count) {
#pragma unroll
    for (int i = 0; i < Row::n; ++i) {
      const double deviation = i < count ? x[i] - mean : 0.0;
      squares = fma(deviation, deviation, squares);
    }
  });
  const double variance = reduce<threads>(squares, Add{}, exchange.squares) / static_cast<double>(cols);
  const double wide_eps = static_cast<double>(eps.hi) + static_cast<double>(eps.lo);
  return scaled_normalization(mean, 1.0 / sqrt(variance + wide_eps), centered);
}

// Of a quotient by the number of columns: exact to the last bits of a Pair, to those of a float where that is enough.
__device__ __forceinline__ Pair over_columns(Pair sum, int64_t cols, float) { return sum / static_cast<float>(cols); }
__device__ __forceinline__ float over_columns(float sum, int64_t, float inverse_cols) { return sum * inverse_cols; }
__device__ __forceinline__ float rounded(Pair x) { return x.hi; }
__device__ __forceinline__ float rounded(float x) { return x; }

__device__ __forceinline__ Pair variance_of(Pair square, Pair offset) { return square + -(offset * offset); }
__device__ __forceinline__ float variance_of(float square, float offset) { return fmaf(-offset, offset, square); }

__device__ __forceinline__ Pair rstd_of(Pair variance, SplitDouble eps) {
  return inverse_sqrt(variance + Pair{eps.hi, eps.lo});
}
__device__ __forceinline__ Pair rstd_of(float variance, SplitDouble eps) {
  return {ptx::rsqrt_approx(variance + eps.hi), 0.0f};
}

// The sum of squares of n floats, by halves.
template <int n>
__device__ __forceinline__ float sum_of_squares(const float (&x)[n]) {
  float squares[n / 2];
#pragma unroll
  for (int i = 0; i < n / 2; ++i) squares[i] = fmaf(x[i + n / 2], x[i + n / 2], x[i] * x[i]);
  return sum_by_halves(squares);
}

// All threads of a block call it together; those of one row get the same result, those of no row (not `valid`) any.
template <bool centered, class Row, class Sum, int threads>
__device__ __forceinline__ Normalization normalization_of(const Row& row, bool valid, int64_t cols, float inverse_cols,
                                                          SplitDouble eps, NormExchange<Sum, threads>& exchange) {
  constexpr int n = Row::n;
  float shift = 0;
  if (centered) {
    row.each([&](auto& x, int64_t, int) { shift += sum_by_halves(x); });
    shift = reduce<threads>(shift, Add{}, exchange.mean) * inverse_cols;
  }
  Both<Sum> moments = {};
  row.each([&](auto& x, int64_t, int count) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = i < count ? x[i] - shift : 0.0f;
    moments.second = moments.second + sum_of_squares(x);
    if (centered) moments.first = moments.first + sum_by_halves(x);
  });
  moments = reduce<threads>(moments, Add{}, exchange.moments);

  const Sum offset = over_columns(moments.first, cols, inverse_cols);
  const Sum square = over_columns(moments.second, cols, inverse_cols);
  const Sum variance = centered ? variance_of(square, offset) : square;
  const Pair rstd = rstd_of(variance, eps);
  // Where the squares leave float's range, the shift is farther from the mean than half a standard deviation, or the
  // length is no float. A comparison with a NaN is false.
  constexpr float smallest = 0x1p-80f, largest = 0x1p100f;
  constexpr int64_t longest = int64_t{1} << 24;
  const float spread = rounded(variance), off = rounded(offset);
  const bool quick = !valid || (spread > smallest && spread < largest && eps.hi < largest && cols <= longest &&
                                4.0f * off * off <= spread);
  Normalization result = {1.0f, shift, to_float(offset), rstd.hi, rstd.lo};
  // The vote is a warp's, which may hold several rows; a wider row's threads agree anyway.
  if (__any_sync(whole_warp, !quick)) {
    const Normalization wide = wide_statistics<centered>(row, cols, eps, exchange);
    if (!quick) result = wide;
  }
  return result;
}

// The forward of float32 carries what its subtractions round, for the other types and the backward float is enough.
template <bool centered, bool precise>
__device__ __forceinline__ float normalize(float x, const Normalization& row) {
  const float scaled = x * row.scale;
  if constexpr (!centered) {
    return precise ? fmaf(scaled, row.rest, scaled * row.rest_tail) : scaled * row.rest;
  } else if constexpr (!precise) {
    return fmaf(fmaf(x, row.scale, -row.mean), row.rest, -row.mean_tail * row.rest);
  } else {
    const Pair coarse = two_sum(scaled, -row.mean), deviation = two_sum(coarse.hi, -row.mean_tail);
    const float lost = coarse.lo + deviation.lo;
    return fmaf(deviation.hi, row.rest, fmaf(deviation.hi, row.rest_tail, lost * row.rest));
  }
}

// ---- forward ----

// Weights or biases of the columns [begin, begin + n), `otherwise` where there are none.
template <class T, int n>
__device__ __forceinline__ void load_parameters(const void* data, bool in_float, int64_t begin, int64_t cols,
                                                bool whole, float otherwise, float (&x)[n]) {
  if (data == nullptr) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = otherwise;
  } else if (!std::is_same_v<T, float> && in_float) {
    load_floats(static_cast<const float*>(data), begin, cols, whole, x);
  } else {
    load_floats(static_cast<const T*>(data), begin, cols, whole, x);
  }
}

// Weights or biases of the vectors of columns that a thread holds. Those of the rows' type are read when the row is;
// float ones beside 16-bit rows, which would take twice the registers of the row itself, when they are used.
template <class Policy>
struct HeldParameters {
  using T = typename Policy::T;
  static constexpr int n = width<T>;
  const void* data;
  bool in_float;
  Packed held[Policy::vectors];

  __device__ __forceinline__ HeldParameters(const void* data, bool in_float, const HeldRow<Policy>& row)
      : data(data), in_float(!std::is_same_v<T, float> && in_float) {
    if (data == nullptr || this->in_float) return;
#pragma unroll
    for (int v = 0; v < Policy::vectors; ++v)
      if (row.holds(v)) held[v] = load_vector(static_cast<const T*>(data), row.begin(v), row.cols, row.whole);
  }
  __device__ __forceinline__ void get(const HeldRow<Policy>& row, int v, float otherwise, float (&x)[n]) const {
    if (data == nullptr || in_float)
      load_parameters<T>(data, true, row.begin(v), row.cols, row.whole, otherwise, x);
    else
      unpack<T>(held[v], x);
  }
};

template <class Norm, class T>
__device__ __forceinline__ Packed normalized(const Normalization& by, const float (&x)[width<T>],
                                             const float (&weight)[width<T>], const float (&bias)[width<T>]) {
  float result[width<T>];
#pragma unroll
  for (int i = 0; i < width<T>; ++i) {
    const float xhat = normalize<Norm::centered, std::is_same_v<T, float>>(x[i], by);
    result[i] = Norm::centered ? fmaf(xhat, weight[i], bias[i]) : xhat * weight[i];
  }
  return pack<T>(result);
}

// input + residual, rounded to the storage type, of one vector.
template <class T>
__device__ __forceinline__ Packed sum_of(const Packed& input, const Packed& residual) {
  float x[width<T>], y[width<T>];
  unpack<T>(input, x);
  unpack<T>(residual, y);
#pragma unroll
  for (int i = 0; i < width<T>; ++i) x[i] += y[i];
  return pack<T>(x);
}

template <class T>
__device__ __forceinline__ const T* row_of(const NormRows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

template <class Norm, class Policy>
__global__ void __launch_bounds__(Policy::block) norm_forward_kernel(const __grid_constant__ NormForwardParams p) {
  using T = typename Policy::T;
  constexpr int n = width<T>;
  __shared__ NormExchange<HeldSum<Policy>, Policy::threads> exchange;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * Policy::rows_per_block + threadIdx.x / Policy::threads;
  const bool valid = row < p.rows;  // threads without a row stay for the shuffles
  HeldRow<Policy> x(p.cols, threadIdx.x % Policy::threads);
  x.load(row_of<T>(p.input, row), valid);
  if (p.residual.data != nullptr) {
    HeldRow<Policy> y(p.cols, x.lane);
    y.load(row_of<T>(p.residual, row), valid);
    T* sum = static_cast<T*>(p.sum) + row * p.cols;
#pragma unroll
    for (int v = 0; v < Policy::vectors; ++v) {
      x.held[v] = sum_of<T>(x.held[v], y.held[v]);
      if (valid && x.holds(v)) store_vector(sum, x.begin(v), p.cols, x.whole, x.held[v]);
    }
  }
  const HeldParameters<Policy> weights(p.weight, p.float_parameters, x);
  const HeldParameters<Policy> biases(Norm::centered ? p.bias : nullptr, p.float_parameters, x);
  const Normalization by = normalization_of<Norm::centered>(x, valid, p.cols, p.inverse_cols, p.eps, exchange);
  if (!valid) return;
  T* output = static_cast<T*>(p.output) + row * p.cols;
#pragma unroll
  for (int v = 0; v < Policy::vectors; ++v) {
    if (!x.holds(v)) continue;
    float values[n], weight[n], bias[n];
    unpack<T>(x.held[v], values);
    weights.get(x, v, 1.0f, weight);
    if (Norm::centered) biases.get(x, v, 0.0f, bias);
    store_vector(output, x.begin(v), p.cols, x.whole, normalized<Norm, T>(by, values, weight, bias));
  }
}

constexpr int wide_row_threads = 512;

template <class Norm, class T>
__global__ void __launch_bounds__(wide_row_threads)
    norm_wide_forward_kernel(const __grid_constant__ NormForwardParams p) {
  constexpr int n = width<T>;
  __shared__ NormExchange<Pair, wide_row_threads> exchange;
  const int64_t row = blockIdx.x;
  const T* input = row_of<T>(p.input, row);
  StreamedRow<T, wide_row_threads> x{input, p.cols, p.whole_vectors};
  if (p.residual.data != nullptr) {
    const T* residual = row_of<T>(p.residual, row);
    T* sum = static_cast<T*>(p.sum) + row * p.cols;
    for (int64_t begin = static_cast<int64_t>(threadIdx.x) * n; begin < p.cols; begin += wide_row_threads * n)
      store_vector(sum, begin, p.cols, p.whole_vectors,
                   sum_of<T>(load_vector(input, begin, p.cols, p.whole_vectors),
                             load_vector(residual, begin, p.cols, p.whole_vectors)));
    x.row = sum;  // each thread reads again what it wrote
  }
  const Normalization by = normalization_of<Norm::centered>(x, true, p.cols, p.inverse_cols, p.eps, exchange);
  T* output = static_cast<T*>(p.output) + row * p.cols;
  x.each([&](const auto& values, int64_t begin, int) {
    float weight[n], bias[n];
    load_parameters<T>(p.weight, p.float_parameters, begin, p.cols, x.whole, 1.0f, weight);
    if (Norm::centered) load_parameters<T>(p.bias, p.float_parameters, begin, p.cols, x.whole, 0.0f, bias);
    store_vector(output, begin, p.cols, x.whole, normalized<Norm, T>(by, values, weight, bias));
  });
}

}  // namespace

}  // namespace transfuse::cuda
