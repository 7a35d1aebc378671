// Gradients of LayerNorm and RMSNorm on a GPU. With g = grad_output * weight and xhat the normalised row,
//
//   grad_input  = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_sum, without mean(g) unless the norm is centered
//   grad_weight = sum over rows of grad_output * xhat,   grad_bias = sum over rows of grad_output
//
// Policy: x and grad_output are read once, and the statistics taken anew from x: saved ones would be rounded. A block
// owns a chunk of rows and keeps its part of the sums over rows in registers, one group of threads every
// rows_per_block-th row; the groups' parts are added in order, then the chunks' (norm.cuh). No atomics: one order, the
// same on every GPU. Wide rows do not fit and take a second pass over columns.
#pragma once

#include "cuda/lines.cuh"
#include "cuda/norm_rows.cuh"

namespace transfuse::cuda {

namespace {

struct RowRange {
  int64_t begin, end;
};
__device__ __forceinline__ RowRange rows_of_chunk(const NormBackwardParams& p, int64_t chunk) {
  return {p.rows * chunk / p.chunks, p.rows * (chunk + 1) / p.chunks};
}

// mean(g) and mean(g * xhat) of a row.
struct Projections {
  float g, g_xhat;
};

// Adds one vector of a row to the sums of g and g * xhat; x and grad are overwritten.
template <class Norm, class Sum, int n>
__device__ __forceinline__ void add_projections(const Normalization& by, const float (&weight)[n], float (&x)[n],
                                                float (&grad)[n], Both<Sum>& sums) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    grad[i] *= weight[i];  // 0 past the end of the row, and so is what it multiplies
    x[i] = grad[i] * normalize<Norm::centered, false>(x[i], by);
  }
  if (Norm::centered) sums.first = sums.first + sum_by_halves(grad);
  sums.second = sums.second + sum_by_halves(x);
}

template <class Sum, int threads>
__device__ __forceinline__ Projections projections_of(Both<Sum> sums, const NormBackwardParams& p,
                                                      Exchange<Both<Sum>, threads>& exchange) {
  sums = reduce<threads>(sums, Add{}, exchange);
  return {to_float(over_columns(sums.first, p.cols, p.inverse_cols)),
          to_float(over_columns(sums.second, p.cols, p.inverse_cols))};
}

// The gradient of one vector of a row; grad_output is overwritten by it.
template <class Norm, class T>
__device__ __forceinline__ void write_grad_input(const NormBackwardParams& p, bool whole, int64_t row, int64_t begin,
                                                 const Normalization& by, const Projections& means,
                                                 const float (&weight)[width<T>], const float (&xhat)[width<T>],
                                                 float (&grad)[width<T>]) {
  constexpr int n = width<T>;
  float past_norm[n];
  const bool has_past_norm = p.grad_sum.data != nullptr;
  if (has_past_norm) unpack<T>(load_vector(row_of<T>(p.grad_sum, row), begin, p.cols, whole), past_norm);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float product = grad[i] * weight[i];  // rounded as in the mean: a row of one element has the gradient 0
    const float g = Norm::centered ? product - means.g : product;
    const float projected = fmaf(-xhat[i], means.g_xhat, g) * by.rest;
    grad[i] = has_past_norm ? fmaf(projected, by.scale, past_norm[i]) : projected * by.scale;
  }
  store_vector(static_cast<T*>(p.grad_input) + row * p.cols, begin, p.cols, whole, pack<T>(grad));
}

// The parts of a block's groups of threads, added in the order of the groups into the chunk's line.
template <class Policy>
__device__ __forceinline__ void write_line(float (&part)[Policy::vectors][width<typename Policy::T>], float* line,
                                           int64_t cols, float* shared) {
  constexpr int n = width<typename Policy::T>, groups = Policy::rows_per_block;
  const int group = threadIdx.x / Policy::threads, lane = threadIdx.x % Policy::threads;
  if constexpr (groups > 1) {
#pragma unroll
    for (int v = 0; v < Policy::vectors; ++v) {
#pragma unroll
      for (int i = 0; i < n; ++i) shared[(v * n + i) * Policy::block + threadIdx.x] = part[v][i];
    }
    __syncthreads();
  }
  if (group == 0) {
#pragma unroll
    for (int v = 0; v < Policy::vectors; ++v) {
      const int64_t begin = (static_cast<int64_t>(v) * Policy::threads + lane) * n;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        float total = part[v][i];
        if constexpr (groups > 1) {
          for (int other = 1; other < groups; ++other)
            total += shared[(v * n + i) * Policy::block + other * Policy::threads + lane];
        }
        if (begin + i < cols) line[begin + i] = total;
      }
    }
  }
  if constexpr (groups > 1) __syncthreads();  // `shared` is used again for the next line
}

// Blocks that a multiprocessor is to hold: as many as the largest policy's registers allow, which are more where single
// elements are loaded. Without it the compiler aims higher for small ones and spills.
template <class Policy>
constexpr int blocks_of_128 = Policy::whole ? 3 : 2;
template <class Policy>
constexpr int backward_blocks = Policy::block == 128 ? blocks_of_128<Policy> : 1;

template <class Norm, class Policy>
__global__ void __launch_bounds__(Policy::block, backward_blocks<Policy>)
    norm_backward_kernel(const __grid_constant__ NormBackwardParams p) {
  using T = typename Policy::T;
  using Sum = HeldSum<Policy>;
  constexpr int n = width<T>, vectors = Policy::vectors;
  __shared__ NormExchange<Sum, Policy::threads> exchange;
  __shared__ Exchange<Both<Sum>, Policy::threads> projections;
  __shared__ float parts[Policy::rows_per_block > 1 ? vectors * n * Policy::block : 1];
  float weight_part[vectors][n] = {}, bias_part[vectors][n] = {};

  const RowRange rows = rows_of_chunk(p, blockIdx.x);
  HeldRow<Policy> x(p.cols, threadIdx.x % Policy::threads), grad_output(p.cols, x.lane);
  for (int64_t first = rows.begin; first < rows.end; first += Policy::rows_per_block) {
    const int64_t row = first + threadIdx.x / Policy::threads;
    const bool valid = row < rows.end;  // threads without a row stay for the shuffles
    // The one reduction of such a row must not hand over anew before every warp has taken the last row's.
    if (!Norm::centered && Policy::threads > warp_size && p.grad_input == nullptr) __syncthreads();
    x.load(row_of<T>(p.input, row), valid);
    grad_output.load(row_of<T>(p.grad_output, row), valid);
    const HeldParameters<Policy> weights(p.grad_input == nullptr ? nullptr : p.weight, p.float_parameters, x);
    const Normalization by = normalization_of<Norm::centered>(x, valid, p.cols, p.inverse_cols, p.eps, exchange);
    Projections means = {0, 0};
    if (p.grad_input != nullptr) {
      Both<Sum> sums = {};
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        if (!x.holds(v)) continue;
        float xhat[n], grad[n], weight[n];
        unpack<T>(x.held[v], xhat);
        unpack<T>(grad_output.held[v], grad);
        weights.get(x, v, 1.0f, weight);
        add_projections<Norm>(by, weight, xhat, grad, sums);
      }
      means = projections_of(sums, p, projections);
    }
    if (!valid) continue;
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      if (!x.holds(v)) continue;
      float xhat[n], grad[n], weight[n];
      unpack<T>(x.held[v], xhat);
      unpack<T>(grad_output.held[v], grad);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        xhat[i] = normalize<Norm::centered, false>(xhat[i], by);
        weight_part[v][i] = fmaf(grad[i], xhat[i], weight_part[v][i]);
        if (Norm::centered) bias_part[v][i] += grad[i];
      }
      if (p.grad_input == nullptr) continue;
      weights.get(x, v, 1.0f, weight);
      write_grad_input<Norm, T>(p, x.whole, row, x.begin(v), by, means, weight, xhat, grad);
    }
  }
  const int64_t line = static_cast<int64_t>(blockIdx.x) * p.cols;
  if (p.weight_lines != nullptr) write_line<Policy>(weight_part, p.weight_lines + line, p.cols, parts);
  if (Norm::centered && p.bias_lines != nullptr) write_line<Policy>(bias_part, p.bias_lines + line, p.cols, parts);
}

// ---- rows that no block holds ----

// First pass: a block per row, which leaves its normalisation in row_values.
template <class Norm, class T>
__global__ void __launch_bounds__(wide_row_threads)
    norm_wide_backward_kernel(const __grid_constant__ NormBackwardParams p) {
  constexpr int n = width<T>;
  __shared__ NormExchange<Pair, wide_row_threads> exchange;
  __shared__ Exchange<Both<Pair>, wide_row_threads> projections;
  const int64_t row = blockIdx.x;
  const StreamedRow<T, wide_row_threads> x{row_of<T>(p.input, row), p.cols, p.whole_vectors};
  const T* grad_output = row_of<T>(p.grad_output, row);
  const Normalization by = normalization_of<Norm::centered>(x, true, p.cols, p.inverse_cols, p.eps, exchange);
  if (threadIdx.x == 0) {
    float* values = p.row_values + row * norm_row_values;
    values[0] = by.scale;
    values[1] = by.mean;
    values[2] = by.mean_tail;
    values[3] = by.rest;
  }
  if (p.grad_input == nullptr) return;
  const auto each_vector = [&](auto f) {
    x.each([&](float (&values)[n], int64_t begin, int) {
      float grads[n], weight[n];
      unpack<T>(load_vector(grad_output, begin, p.cols, p.whole_vectors), grads);
      load_parameters<T>(p.weight, p.float_parameters, begin, p.cols, p.whole_vectors, 1.0f, weight);
      f(values, grads, weight, begin);
    });
  };
  Both<Pair> sums = {};
  each_vector([&](float (&xhat)[n], float (&grad)[n], const float (&weight)[n], int64_t) {
    add_projections<Norm>(by, weight, xhat, grad, sums);
  });
  const Projections means = projections_of(sums, p, projections);
  each_vector([&](float (&xhat)[n], float (&grad)[n], const float (&weight)[n], int64_t begin) {
#pragma unroll
    for (int i = 0; i < n; ++i) xhat[i] = normalize<Norm::centered, false>(xhat[i], by);
    write_grad_input<Norm, T>(p, x.whole, row, begin, by, means, weight, xhat, grad);
  });
}

constexpr int columns_threads = 128;

// Second pass: a thread per vector of columns goes through the rows of a chunk.
template <class Norm, class T>
__global__ void __launch_bounds__(columns_threads)
    norm_wide_lines_kernel(const __grid_constant__ NormBackwardParams p) {
  constexpr int n = width<T>;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * columns_threads + threadIdx.x) * n;
  if (begin >= p.cols) return;
  float weight_part[n] = {}, bias_part[n] = {};
  const RowRange rows = rows_of_chunk(p, blockIdx.y);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* values = p.row_values + row * norm_row_values;
    const Normalization by = {values[0], values[1], values[2], values[3], 0.0f};
    float x[n], grad[n];
    unpack<T>(load_vector(row_of<T>(p.input, row), begin, p.cols, p.whole_vectors), x);
    unpack<T>(load_vector(row_of<T>(p.grad_output, row), begin, p.cols, p.whole_vectors), grad);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      weight_part[i] = fmaf(grad[i], normalize<Norm::centered, false>(x[i], by), weight_part[i]);
      if (Norm::centered) bias_part[i] += grad[i];
    }
  }
  const int64_t line = static_cast<int64_t>(blockIdx.y) * p.cols;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (begin + i >= p.cols) continue;
    if (p.weight_lines != nullptr) p.weight_lines[line + begin + i] = weight_part[i];
    if (Norm::centered && p.bias_lines != nullptr) p.bias_lines[line + begin + i] = bias_part[i];
  }
}

template <class Norm, class T>
cudaError_t norm_wide_backward(const NormBackwardParams& p, cudaStream_t stream) {
  const cudaError_t error = launch(norm_wide_backward_kernel<Norm, T>, dim3(static_cast<unsigned>(p.rows)),
                                   dim3(wide_row_threads), 0, stream, p);
  if (error != cudaSuccess || (!p.weight_lines && !p.bias_lines)) return error;
  const int64_t vectors = (p.cols + width<T> - 1) / width<T>;
  const dim3 grid(static_cast<unsigned>((vectors + columns_threads - 1) / columns_threads),
                  static_cast<unsigned>(p.chunks));
  return launch(norm_wide_lines_kernel<Norm, T>, grid, dim3(columns_threads), 0, stream, p);
}

}  // namespace

}  // namespace transfuse::cuda
