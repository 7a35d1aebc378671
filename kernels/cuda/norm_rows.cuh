// The rows of LayerNorm and RMSNorm on a GPU, for a Norm (layer_norm.cu, rms_norm.cu) that says
//
//   centered    whether it has a mean, and with it a bias
//
// Policy: a row stays in the registers of its threads from the one read to the one write. Its statistics are sums of
// two floats over deviations from its rounded mean, which is far closer to the mean than a standard deviation even at
// mean/std 1e6; a row for which that would not do (constant, beyond float's range, not finite) takes them in double.
// float32 results round twice: what x - mean loses is carried along. Rows wider than a block's registers are read three
// times.
//
// The sums over a row's threads have one tree per row length; nothing depends on the batch.
#pragma once

#include <type_traits>

#include "cuda/exact.cuh"
#include "cuda/launch.cuh"
#include "cuda/norm.cuh"
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

template <int threads>
struct NormExchange {
  Exchange<float, threads> mean;
  Exchange<Both<Pair>, threads> moments;
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
template <bool centered, int threads, class Row>
__device__ __forceinline__ Normalization wide_statistics(const Row& row, int64_t cols, SplitDouble eps,
                                                         NormExchange<threads>& exchange) {
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

// All threads of a block call it together; those of one row get the same result.
template <bool centered, int threads, class Row>
__device__ __forceinline__ Normalization normalization_of(const Row& row, int64_t cols, SplitDouble eps,
                                                          NormExchange<threads>& exchange) {
  constexpr int n = Row::n;
  const float length = static_cast<float>(cols);
  float shift = 0;
  if (centered) {
    row.each([&](auto& x, int64_t, int) { shift += sum_by_halves(x); });
    shift = reduce<threads>(shift, Add{}, exchange.mean) / length;
  }
  Both<Pair> moments = {{0, 0}, {0, 0}};
  row.each([&](auto& x, int64_t, int count) {
    float squares[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = i < count ? x[i] - shift : 0.0f;
      squares[i] = x[i] * x[i];
    }
    if (centered) moments.first = moments.first + sum_by_halves(x);
    moments.second = moments.second + sum_by_halves(squares);
  });
  moments = reduce<threads>(moments, Add{}, exchange.moments);

  const Pair offset = moments.first / length, square = moments.second / length;
  const Pair variance = centered ? square + -(offset * offset) : square;
  const Pair rstd = inverse_sqrt(variance + Pair{eps.hi, eps.lo});
  // Where the squares leave float's range, the shift is farther from the mean than half a standard deviation, or the
  // length is no float. A comparison with a NaN is false.
  constexpr float smallest = 0x1p-80f, largest = 0x1p100f;
  constexpr int64_t longest = int64_t{1} << 24;
  const bool quick = variance.hi > smallest && variance.hi < largest && eps.hi < largest && cols <= longest &&
                     4.0f * offset.hi * offset.hi <= variance.hi;
  Normalization result = {1.0f, shift, to_float(offset), rstd.hi, rstd.lo};
  // The vote is a warp's, which may hold several rows; a wider row's threads agree anyway.
  if (__any_sync(whole_warp, !quick)) {
    const Normalization wide = wide_statistics<centered, threads>(row, cols, eps, exchange);
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
    return fmaf(scaled - row.mean, row.rest, -row.mean_tail * row.rest);
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

template <class Norm, class T, class Row>
__device__ __forceinline__ void write_row(const NormForwardParams& p, const Row& row, const Normalization& by,
                                          T* output) {
  constexpr int n = Row::n;
  row.each([&](auto& x, int64_t begin, int) {
    float weight[n], bias[n];
    load_parameters<T>(p.weight, p.float_parameters, begin, p.cols, row.whole, 1.0f, weight);
    if (Norm::centered) load_parameters<T>(p.bias, p.float_parameters, begin, p.cols, row.whole, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float xhat = normalize<Norm::centered, std::is_same_v<T, float>>(x[i], by);
      x[i] = Norm::centered ? fmaf(xhat, weight[i], bias[i]) : xhat * weight[i];
    }
    store_vector(output, begin, p.cols, row.whole, pack<T>(x));
  });
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
  __shared__ NormExchange<Policy::threads> exchange;
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
  const Normalization by = normalization_of<Norm::centered, Policy::threads>(x, p.cols, p.eps, exchange);
  if (valid) write_row<Norm>(p, x, by, static_cast<T*>(p.output) + row * p.cols);
}

constexpr int wide_row_threads = 512;

template <class Norm, class T>
__global__ void __launch_bounds__(wide_row_threads)
    norm_wide_forward_kernel(const __grid_constant__ NormForwardParams p) {
  constexpr int n = width<T>;
  __shared__ NormExchange<wide_row_threads> exchange;
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
  const Normalization by = normalization_of<Norm::centered, wide_row_threads>(x, p.cols, p.eps, exchange);
  write_row<Norm>(p, x, by, static_cast<T*>(p.output) + row * p.cols);
}

}  // namespace

}  // namespace transfuse::cuda
