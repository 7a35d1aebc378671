// GELU, erf and tanh form: x * Phi(x). As on the CPU (kernels/cpu/gelu.cpp says why), with t = |x|,
//
//   gelu(x) = max(x, 0) - t * tail(t),   gelu'(x) = h(t) for x < 0 and 1 - h(t) for x >= 0
//
// where tail and h are polynomials in float on |x| < 63/16, and in double beyond and for the float16 results that lie
// too near the middle of two neighbours. Tables, polynomials and operations are the CPU's, and so are the bits.
//
// Policy: a thread owns one vector of columns and goes down the rows of its block's chunk; so the bias is loaded once
// and the bias gradient stays in registers. The table of coefficients lies in shared memory once per lane: a lookup by
// 32 lanes in 32 segments meets no bank twice, and six of them keep up with the memory.
#include "cuda/gelu.cuh"

#include <type_traits>

#include "cuda/exp.cuh"
#include "cuda/lines.cuh"
#include "gelu_tables.h"

namespace transfuse::cuda {

namespace {

__constant__ Segments erf_tail = ErfSegments::tail, erf_slope = ErfSegments::slope;
__constant__ Segments tanh_tail = TanhSegments::tail, tanh_slope = TanhSegments::slope;
__constant__ MillsRatio mills = mills_ratio;

constexpr double cut = 16.0;  // beyond it every tail is far below the last subnormal

template <int n>
__device__ __forceinline__ double polynomial(const double (&c)[n], double t) {
  double sum = c[n - 1];
#pragma unroll
  for (int i = n - 2; i >= 0; --i) sum = fma(sum, t, c[i]);
  return sum;
}

struct Erf {
  static constexpr float slope_shift = ErfSegments::shift;
  __device__ static const Segments& tail_segments() { return erf_tail; }
  __device__ static const Segments& slope_segments() { return erf_slope; }
  __device__ static double gaussian(double t) { return exp_wide(t * t * -0.5); }
  // t * Phi(-t)
  __device__ static double tail(double t) { return t * gaussian(t) * polynomial(mills.p, t) / polynomial(mills.q, t); }
  // Phi(-t) - t phi(t)
  __device__ static double slope(double t) {
    const double ratio = polynomial(mills.p, t) / polynomial(mills.q, t);
    return gaussian(t) * fma(-t, inverse_sqrt_2pi, ratio);
  }
};

struct Tanh {
  static constexpr float slope_shift = TanhSegments::shift;
  __device__ static const Segments& tail_segments() { return tanh_tail; }
  __device__ static const Segments& slope_segments() { return tanh_slope; }
  __device__ static double decay(double t) { return exp_wide(t * fma(t * t, -tanh_c1, -tanh_c0)); }
  __device__ static double tail(double t) {
    const double e = decay(t);
    return t * e / (e + 1.0);
  }
  __device__ static double slope(double t) {
    const double e = decay(t), upper = 1.0 / (e + 1.0);
    const double rate = t * fma(t * t, 3 * tanh_c1, tanh_c0);
    return e * upper * fma(-rate, upper, 1.0);
  }
};

// ---- one element ----

// Where the coefficients of each lane lie: [coefficient][segment][lane].
constexpr int gelu_threads = 256;
constexpr int table_floats = num_coefficients * num_segments * warp_size;

__device__ __forceinline__ void fill_table(const Segments& segments, float* table) {
  for (int i = threadIdx.x; i < table_floats; i += gelu_threads)
    table[i] = segments.coefficients[i / warp_size / num_segments][i / warp_size % num_segments];
}

// The polynomial of the segment that holds t; beyond segments_end any number, of a NaN NaN.
__device__ __forceinline__ float evaluate(const float* table, float t) {
  const float rounded = t + segment_rounding, u = t - (rounded - segment_rounding);
  const int segment = static_cast<int>(__float_as_uint(rounded) % num_segments);
  const float* of_lane = table + segment * warp_size + threadIdx.x % warp_size;
  constexpr int stride = num_segments * warp_size;
  float sum = of_lane[(num_coefficients - 1) * stride];
#pragma unroll
  for (int i = num_coefficients - 2; i >= 0; --i) sum = fmaf(sum, u, of_lane[i * stride]);
  return sum;
}

struct Forward {
  template <class Form>
  __device__ static const Segments& segments() {
    return Form::tail_segments();
  }
  // For |x| < segments_end. A zero keeps its sign, a NaN stays.
  template <class Form>
  __device__ static float core(const float* table, float x, float) {
    const float t = fabsf(x);
    return fmaf(-t, evaluate(table, t), x < 0.0f ? -0.0f : x);
  }
  template <class Form>
  __device__ static double everywhere(double x, double) {
    return (x < 0.0 ? -0.0 : x) - Form::tail(fmin(fabs(x), cut));
  }
};

struct Backward {
  template <class Form>
  __device__ static const Segments& segments() {
    return Form::slope_segments();
  }
  template <class Form>
  __device__ static float core(const float* table, float x, float grad_output) {
    const float h = evaluate(table, fabsf(x) - Form::slope_shift);
    return grad_output * (x < 0.0f ? h : 1.0f - h);
  }
  template <class Form>
  __device__ static double everywhere(double x, double grad_output) {
    const double h = Form::slope(fmin(fabs(x), cut));
    return grad_output * (x < 0.0 ? h : 1.0 - h);
  }
};

// Whether y = f(x), found by a core, may not be the right result for storage as T.
template <class T>
__device__ __forceinline__ bool uncertain(float x, float y) {
  if (fabsf(x) >= segments_end) return true;
  if constexpr (!std::is_same_v<T, f16>) {
    return false;
  } else {
    constexpr uint32_t cut_bits = (1 << 13) - 1, middle = 1 << 12, error = 8;
    return (__float_as_uint(y) & cut_bits) - (middle - error) < 2 * error || fabsf(y) < 0x1p-14f;
  }
}

// A double rounded to float, for storage as T. Twice rounded, two of float16's results would be the wrong neighbour: on
// the way there the last bit says that something was cut off. None of bfloat16's is (all of them were tried).
template <class T>
__device__ __forceinline__ float narrow_for(double x) {
  const float nearest = static_cast<float>(x);
  if (!std::is_same_v<T, f16> || static_cast<double>(nearest) == x) return nearest;
  const uint32_t too_large = fabs(static_cast<double>(nearest)) > fabs(x);
  return __uint_as_float((__float_as_uint(nearest) - too_large) | 1u);
}

// ---- rows ----

// f of one vector; x is overwritten by it.
template <class Direction, class Form, class T>
__device__ __forceinline__ void apply(const float* table, const float (&grad)[width<T>], float (&x)[width<T>]) {
  constexpr int n = width<T>;
  float y[n];
  unsigned left = 0;  // bit i: element i is to be done in double
#pragma unroll
  for (int i = 0; i < n; ++i) {
    y[i] = Direction::template core<Form>(table, x[i], grad[i]);
    left |= static_cast<unsigned>(uncertain<T>(x[i], y[i])) << i;
  }
#pragma unroll 1
  for (; left != 0; left &= left - 1) {  // few: not worth n copies of the code
    float value = 0, incoming = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      value = left & -left & (1u << i) ? x[i] : value;
      incoming = left & -left & (1u << i) ? grad[i] : incoming;
    }
    const float result = narrow_for<T>(Direction::template everywhere<Form>(value, incoming));
#pragma unroll
    for (int i = 0; i < n; ++i) y[i] = left & -left & (1u << i) ? result : y[i];
  }
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = y[i];
}

// Threads that share a row's vectors; the block's other groups take the next rows. Few stay without a vector: rows of
// 768 16-bit elements go to 32 threads three times, not to 128 of which a quarter idles.
__host__ __device__ constexpr int threads_of_row(int64_t vectors) {
  int threads = gelu_threads;
  while (threads > warp_size && (vectors + threads - 1) / threads * threads - vectors > vectors / 8) threads /= 2;
  while (threads > 1 && threads / 2 >= vectors) threads /= 2;
  return threads;
}

template <class Direction, class Form, class T>
__global__ void __launch_bounds__(gelu_threads, 2) gelu_kernel(const __grid_constant__ GeluParams p) {
  constexpr int n = width<T>;
  constexpr bool backward = std::is_same_v<Direction, Backward>;
  __shared__ float table[table_floats];
  fill_table(Direction::template segments<Form>(), table);
  __syncthreads();

  const int threads = threads_of_row((p.columns + n - 1) / n), groups = gelu_threads / threads;
  const int group = static_cast<int>(threadIdx.x) / threads;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * threads + threadIdx.x % threads) * n;
  const bool has_columns = column < p.columns;
  float bias[n], bias_part[n] = {};
#pragma unroll
  for (int i = 0; i < n; ++i) bias[i] = 0;
  if (p.bias != nullptr && has_columns) {
    if (p.float_bias)
      load_floats(static_cast<const float*>(p.bias), column, p.columns, p.whole_vectors, bias);
    else
      load_floats(static_cast<const T*>(p.bias), column, p.columns, p.whole_vectors, bias);
  }

  const int64_t rows = (p.size + p.columns - 1) / p.columns;
  const int64_t end = rows * (blockIdx.x + 1) / p.chunks;
  for (int64_t row = rows * blockIdx.x / p.chunks + group; row < end; row += groups) {
    const int64_t first = row * p.columns, length = p.size - first < p.columns ? p.size - first : p.columns;
    if (column >= length) continue;
    const bool whole = p.whole_vectors && column + n <= length;
    float x[n], grad[n];
    unpack<T>(load_vector(static_cast<const T*>(p.input) + first, column, length, whole), x);
    if (backward) unpack<T>(load_vector(static_cast<const T*>(p.grad_output) + first, column, length, whole), grad);
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] += bias[i];
      unpack<T>(pack<T>(x), x);  // as the unfused sum is: a tensor of the storage type
    }
    apply<Direction, Form, T>(table, grad, x);
    store_vector(static_cast<T*>(p.output) + first, column, length, whole, pack<T>(x));
    if (backward) {
#pragma unroll
      for (int i = 0; i < n; ++i) bias_part[i] += x[i];
    }
  }
  if (!backward || p.bias_lines == nullptr) return;

  // The groups' parts, added in the order of the groups; the table has served.
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) table[i * gelu_threads + threadIdx.x] = bias_part[i];
  __syncthreads();
  if (group != 0 || !has_columns) return;
  float* line = p.bias_lines + static_cast<int64_t>(blockIdx.x) * p.columns;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float total = bias_part[i];
    for (int other = 1; other < groups; ++other) total += table[i * gelu_threads + other * threads + threadIdx.x];
    if (column + i < p.columns) line[column + i] = total;
  }
}

template <class Direction>
cudaError_t run_gelu(GeluParams p, DType dtype, cudaStream_t stream) {
  if (p.size == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto whole = [&](const void* data) {
      return data == nullptr || whole_vectors<T>(data, p.columns, p.columns);
    };
    const bool bias_is_whole =
        p.bias == nullptr || (p.float_bias ? whole_vectors<float>(p.bias, p.columns, 0) : whole(p.bias));
    p.whole_vectors = whole(p.input) && whole(p.output) && whole(p.grad_output) && bias_is_whole;
    const int64_t vectors = (p.columns + width<T> - 1) / width<T>;
    const int64_t threads = threads_of_row(vectors);
    const dim3 grid(static_cast<unsigned>(p.chunks), static_cast<unsigned>((vectors + threads - 1) / threads));
    const auto kernel = p.tanh ? gelu_kernel<Direction, Tanh, T> : gelu_kernel<Direction, Erf, T>;
    const cudaError_t error = launch(kernel, grid, dim3(gelu_threads), 0, stream, p);
    if (error != cudaSuccess || p.bias_lines == nullptr) return error;
    return add_lines<T>({p.bias_lines, p.grad_bias, p.chunks, p.columns, p.float_bias}, stream);
  });
}

}  // namespace

cudaError_t gelu_forward(const GeluParams& params, DType dtype, cudaStream_t stream) {
  return run_gelu<Forward>(params, dtype, stream);
}

cudaError_t gelu_backward(const GeluParams& params, DType dtype, cudaStream_t stream) {
  return run_gelu<Backward>(params, dtype, stream);
}

}  // namespace transfuse::cuda
