// GELU, erf and tanh form: x * Phi(x). As on the CPU (kernels/cpu/gelu.cpp says why), with t = |x|,
//
//   gelu(x) = max(x, 0) - t * tail(t),   gelu'(x) = h(t) for x < 0 and 1 - h(t) for x >= 0
//
// where tail and h are polynomials in float on |x| < 63/16 and an exponential in float beyond (gelu_far.cuh). Constants
// and operations are those of the CPU's floats, and so are the bits. 16-bit types, which have tables on the CPU, are
// rounded from these floats: no bfloat16 input lies so near the middle of two results that the float's error chooses
// the wrong one; float16 results that do are evaluated again in double.
//
// Policy: a thread owns one vector of columns and goes down the rows of its block's chunk; so the bias is loaded once
// and the bias gradient stays in registers. The table of coefficients lies in shared memory once per lane: a lookup by
// 32 lanes in 32 segments meets no bank twice, and six of them keep up with the memory.
#include "cuda/gelu.cuh"

#include <type_traits>

#include "cuda/exp.cuh"
#include "cuda/gelu_far.cuh"
#include "cuda/lines.cuh"
#include "cuda/rounding.cuh"
#include "gelu_tables.h"

namespace transfuse::cuda {

namespace {

__constant__ Segments erf_tail = ErfSegments::tail, erf_slope = ErfSegments::slope;
__constant__ Segments tanh_tail = TanhSegments::tail, tanh_slope = TanhSegments::slope;

// ---- double, for float16 ----

// R(t) = Phi(-t) exp(t^2/2) = P(t) / Q(t) on [0, 16], relative error 2^-39.
struct MillsRatio {
  double p[7], q[8];
};
__constant__ MillsRatio mills = {
    {0x1.00000000014d9p-1, 0x1.25072584c3476p-1, 0x1.4988d461fe849p-2, 0x1.be1acc2038532p-4, 0x1.7b786ab4ec994p-6,
     0x1.8182bbd553799p-9, 0x1.73d7f2412f026p-13},
    {0x1.0000000000000p+0, 0x1.f1494f2405f07p+0, 0x1.b18b5af48110bp+0, 0x1.ba3fb22d2cdabp-1, 0x1.1f1baeee1a755p-2,
     0x1.df3c2e2f4dcd5p-5, 0x1.e32a91e3f0ef9p-8, 0x1.d20965981f27fp-12}};
constexpr double inverse_sqrt_2pi = 0x1.9884533d43651p-2;
constexpr double double_cut = 16.0;  // beyond it every tail is far below the last subnormal

template <int n>
__device__ __forceinline__ double polynomial(const double (&c)[n], double t) {
  double sum = c[n - 1];
#pragma unroll
  for (int i = n - 2; i >= 0; --i) sum = fma(sum, t, c[i]);
  return sum;
}

struct Erf {
  using Far = ErfFar;
  static constexpr float slope_shift = ErfSegments::shift;
  __device__ static const Segments& tail_segments() { return erf_tail; }
  __device__ static const Segments& slope_segments() { return erf_slope; }
  __device__ static double gaussian(double t) { return exp_wide(t * t * -0.5); }
  // t Phi(-t)
  __device__ static double tail(double t) { return t * gaussian(t) * polynomial(mills.p, t) / polynomial(mills.q, t); }
  // Phi(-t) - t phi(t)
  __device__ static double slope(double t) {
    const double ratio = polynomial(mills.p, t) / polynomial(mills.q, t);
    return gaussian(t) * fma(-t, inverse_sqrt_2pi, ratio);
  }
};

struct Tanh {
  using Far = TanhFar;
  static constexpr float slope_shift = TanhSegments::shift;
  static constexpr double c0 = TanhFarTable::c0, c1 = TanhFarTable::c1;
  __device__ static const Segments& tail_segments() { return tanh_tail; }
  __device__ static const Segments& slope_segments() { return tanh_slope; }
  __device__ static double decay(double t) { return exp_wide(t * fma(t * t, -c1, -c0)); }
  __device__ static double tail(double t) {
    const double e = decay(t);
    return t * e / (e + 1.0);
  }
  __device__ static double slope(double t) {
    const double e = decay(t), upper = 1.0 / (e + 1.0);
    const double rate = t * fma(t * t, 3 * c1, c0);
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

// The two functions of (x, grad_output), as on the CPU. In float: `core`, and `far` where is_far. In double: `full`.

struct Forward {
  template <class Form>
  __device__ static const Segments& segments() {
    return Form::tail_segments();
  }
  // A zero keeps its sign, a NaN stays. A 16-bit x from segments_end on is its own gelu: the tail is below half its
  // last place.
  template <class Form, class T>
  __device__ static float core(const float* table, float x, float) {
    const float t = fabsf(x), y = fmaf(-t, evaluate(table, t), x < 0.0f ? -0.0f : x);
    return !std::is_same_v<T, float> && x >= segments_end ? x : y;
  }
  template <class T>
  __device__ static bool is_far(float x) {
    return std::is_same_v<T, float> ? fabsf(x) >= segments_end : x <= -segments_end;
  }
  template <class Form>
  __device__ static float far(float x, float) {
    const float y = value(Form::Far::tail(fminf(fabsf(x), Form::Far::cut)));
    return x < 0.0f ? -y : x - y;
  }
  template <class Form>
  __device__ static double full(double x, double) {
    return (x < 0.0 ? -0.0 : x) - Form::tail(fmin(fabs(x), double_cut));
  }
};

struct Backward {
  template <class Form>
  __device__ static const Segments& segments() {
    return Form::slope_segments();
  }
  template <class Form, class T>
  __device__ static float core(const float* table, float x, float grad_output) {
    const float h = evaluate(table, fabsf(x) - Form::slope_shift);
    return grad_output * (x < 0.0f ? h : 1.0f - h);
  }
  template <class T>
  __device__ static bool is_far(float x) {
    return fabsf(x) >= segments_end;
  }
  template <class Form>
  __device__ static float far(float x, float grad_output) {
    const bool negative = x < 0.0f;
    const Scaled slope = Form::Far::slope(fminf(fabsf(x), Form::Far::cut));
    const float h = value({slope.fraction * (negative ? grad_output : 1.0f), slope.power});
    return negative ? h : grad_output * (1.0f - h);
  }
  template <class Form>
  __device__ static double full(double x, double grad_output) {
    const double h = Form::slope(fmin(fabs(x), double_cut));
    return grad_output * (x < 0.0 ? h : 1.0 - h);
  }
};

// Whether a float y may round to the wrong T. Subnormal float16s are 2^-24 apart, as the floats' upper bits are from
// 2^-14 on. A bfloat16 is right from either float: none of its results lies so near the middle of two.
template <class T>
__device__ __forceinline__ bool is_doubtful(float y) {
  if constexpr (!std::is_same_v<T, f16>) {
    return false;
  } else {
    constexpr uint32_t cut_bits = (1 << 13) - 1, middle = 1 << 12, error = 8;
    constexpr float least_normal = 0x1p-14f;
    const float size = fabsf(y), shown = size < least_normal ? size + least_normal : size;
    return (__float_as_uint(shown) & cut_bits) - (middle - error) < 2 * error;
  }
}

// ---- rows ----

// f of one vector; x is overwritten by it.
template <class Direction, class Form, class T>
__device__ __forceinline__ void apply(const float* table, const float (&grad)[width<T>], float (&x)[width<T>]) {
  constexpr int n = width<T>;
  float y[n];
  unsigned left = 0;  // bit i: element i is not done yet
#pragma unroll
  for (int i = 0; i < n; ++i) {
    y[i] = Direction::template core<Form, T>(table, x[i], grad[i]);
    left |= static_cast<unsigned>(Direction::template is_far<T>(x[i]) || is_doubtful<T>(y[i])) << i;
  }
#pragma unroll 1
  for (; left != 0; left &= left - 1) {  // few: not worth n copies of the code
    float value = 0, incoming = 0, result = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      value = left & -left & (1u << i) ? x[i] : value;
      incoming = left & -left & (1u << i) ? grad[i] : incoming;
      result = left & -left & (1u << i) ? y[i] : result;
    }
    if (Direction::template is_far<T>(value)) result = Direction::template far<Form>(value, incoming);
    if (is_doubtful<T>(result)) result = rounded_to_odd(Direction::template full<Form>(value, incoming));
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

// whole: every vector of every row lies on its boundary and within the row.
template <class Direction, class Form, class T, bool whole>
__global__ void __launch_bounds__(gelu_threads, 2) gelu_kernel(const __grid_constant__ GeluParams p) {
  constexpr int n = width<T>;
  constexpr bool backward = std::is_same_v<Direction, Backward>;
  __shared__ float table[table_floats];
  const int threads = threads_of_row((p.columns + n - 1) / n), groups = gelu_threads / threads;
  const int group = static_cast<int>(threadIdx.x) / threads;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x % threads) * n;
  const bool has_columns = column < p.columns;

  // The next vectors are under way while these are computed, and the first while the table is filled.
  const int64_t rows = (p.size + p.columns - 1) / p.columns;
  const int64_t end = rows * (blockIdx.y + 1) / p.chunks;
  const auto length_of = [&](int64_t row) { return min(p.size - row * p.columns, p.columns); };
  Packed next_x = {}, next_grad = {};
  const auto fetch = [&](int64_t row) {
    if (row >= end || column >= length_of(row)) return;
    const int64_t first = row * p.columns, length = length_of(row);
    next_x = load_vector(static_cast<const T*>(p.input) + first, column, length, whole);
    if (backward) next_grad = load_vector(static_cast<const T*>(p.grad_output) + first, column, length, whole);
  };
  int64_t row = rows * blockIdx.y / p.chunks + group;
  fetch(row);
  fill_table(Direction::template segments<Form>(), table);
  __syncthreads();

  float bias[n], bias_part[n] = {};
#pragma unroll
  for (int i = 0; i < n; ++i) bias[i] = 0;
  if (p.bias != nullptr && has_columns) {
    if (p.float_bias)
      load_floats(static_cast<const float*>(p.bias), column, p.columns, whole, bias);
    else
      load_floats(static_cast<const T*>(p.bias), column, p.columns, whole, bias);
  }

  for (; row < end; row += groups) {
    const int64_t first = row * p.columns, length = length_of(row);
    if (column >= length) break;  // rows after it are not longer
    float x[n], grad[n];
    unpack<T>(next_x, x);
    if (backward) unpack<T>(next_grad, grad);
    fetch(row + groups);
    if (p.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < n; ++i) x[i] += bias[i];
      unpack<T>(pack<T>(x), x);  // as the unfused sum is: a tensor of the storage type
    }
    apply<Direction, Form, T>(table, grad, x);
    T* output = static_cast<T*>(p.output) + first;
    const Packed result = pack<T>(x);
    if constexpr (whole) {  // by name: the compiler takes a plain 128-bit store apart here
      __stwb(reinterpret_cast<uint4*>(output + column),
             make_uint4(result.word[0], result.word[1], result.word[2], result.word[3]));
    } else {
      store_vector(output, column, length, false, result);
    }
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
  float* line = p.bias_lines + static_cast<int64_t>(blockIdx.y) * p.columns;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float total = bias_part[i];
    for (int other = 1; other < groups; ++other) total += table[i * gelu_threads + other * threads + threadIdx.x];
    if (column + i < p.columns) line[column + i] = total;
  }
}

template <class Direction, class T, bool whole>
cudaError_t launch_gelu(const GeluParams& p, cudaStream_t stream) {
  const int64_t vectors = (p.columns + width<T> - 1) / width<T>, threads = threads_of_row(vectors);
  const dim3 grid(static_cast<unsigned>((vectors + threads - 1) / threads), static_cast<unsigned>(p.chunks));
  const auto kernel = p.tanh ? gelu_kernel<Direction, Tanh, T, whole> : gelu_kernel<Direction, Erf, T, whole>;
  return launch(kernel, grid, dim3(gelu_threads), 0, stream, p);
}

// The elements from `begin` on, a row of their own.
template <class T>
GeluParams rest_from(const GeluParams& p, int64_t begin) {
  const auto moved = [&](const void* data) { return data ? static_cast<const T*>(data) + begin : nullptr; };
  GeluParams rest = p;
  rest.input = moved(p.input);
  rest.grad_output = moved(p.grad_output);
  rest.output = static_cast<T*>(p.output) + begin;
  rest.size = p.size - begin;
  rest.chunks = 1;
  return rest;
}

template <class Direction>
cudaError_t run_gelu(const GeluParams& p, DType dtype, cudaStream_t stream) {
  if (p.columns == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto on_boundary = [&](const void* data) {
      return data == nullptr || whole_vectors<T>(data, p.columns, p.columns);
    };
    const bool bias_is_whole = p.bias == nullptr || !p.float_bias || whole_vectors<float>(p.bias, p.columns, 0);
    const bool whole = on_boundary(p.input) && on_boundary(p.output) && on_boundary(p.grad_output) && bias_is_whole &&
                       (p.float_bias || on_boundary(p.bias));
    cudaError_t error = cudaSuccess;
    if (whole) {
      // Without a bias the last vector may be cut off; it is done alone.
      GeluParams body = p;
      body.size -= p.size % width<T>;
      if (body.size > 0) error = launch_gelu<Direction, T, true>(body, stream);
      if (error == cudaSuccess && body.size < p.size)
        error = launch_gelu<Direction, T, false>(rest_from<T>(p, body.size), stream);
    } else if (p.size > 0) {
      error = launch_gelu<Direction, T, false>(p, stream);
    }
    // Without rows too: the gradient of the bias is then the sum of no lines.
    if (error != cudaSuccess || p.bias_lines == nullptr) return error;
    return add_lines<T>({{{p.bias_lines, p.grad_bias}}, p.chunks, p.columns, p.float_bias}, stream);
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
