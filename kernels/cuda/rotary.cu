// Rotary embedding: each pair (a, b) of a row's leading R columns becomes (a cos - b sin, b cos + a sin).
//
// Policy: computed in double, rounded once, as on the CPU: products of two floats are exact in double, so that a result
// carries the one rounding at the end even where the two products cancel. Columns from R on are copied bit for bit. A
// thread takes as many neighbouring pairs as make two vectors of 16 bytes (one of them twice where pairs interleave).
#include "cuda/rotary.cuh"

#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace transfuse::cuda {

namespace {

constexpr int rotary_threads = 128;

// A double as storage type T, rounded once.
template <class T>
__device__ __forceinline__ T from_double(double x);
template <>
__device__ __forceinline__ float from_double<float>(double x) {
  return static_cast<float>(x);
}
template <>
__device__ __forceinline__ bf16 from_double<bf16>(double x) {
  return {__bfloat16_as_ushort(__double2bfloat16(x))};
}
template <>
__device__ __forceinline__ f16 from_double<f16>(double x) {
  return {__half_as_ushort(__double2half(x))};
}

struct RowIndex {
  int64_t batch, head, token;
};
// Rows are numbered as they lie in memory, so that neighbouring threads read neighbouring ones.
template <class Int>
__device__ __forceinline__ RowIndex row_index(const RotaryParams& p, Int row) {
  const Int inner = static_cast<Int>(p.heads_inner ? p.num_heads : p.length);
  const Int outer = static_cast<Int>(p.heads_inner ? p.length : p.num_heads);
  const Int minor = row % inner, rest = row / inner, major = rest % outer, batch = rest / outer;
  if (p.heads_inner) return {batch, minor, major};
  return {batch, major, minor};
}

template <class T>
__device__ __forceinline__ const T* row_of(const RotaryTensor& t, const RowIndex& at) {
  return static_cast<const T*>(t.data) + at.batch * t.batch + at.head * t.head + at.token * t.token;
}

struct Rotated {
  double first, second;
};
__device__ __forceinline__ Rotated rotate(double a, double b, double cosine, double sine) {
  return {fma(a, cosine, -(b * sine)), fma(b, cosine, a * sine)};
}

// n neighbouring pairs from pair i on, every operand in whole vectors. n is width<T>, or half of it for interleaved
// pairs.
template <class T, class U, bool interleaved>
__device__ __forceinline__ void rotate_vectors(const RotaryParams& p, const T* x, const U* cosines, const U* sines,
                                               T* out, int64_t i) {
  constexpr int w = width<T>, n = interleaved ? w / 2 : w;
  float cosine[n], sine[n], a[w], b[w];
  load_floats(cosines, i, i + n, true, cosine);
  load_floats(sines, i, i + n, true, sine);
  T result_a[w], result_b[w];
  unpack<T>(load_vector(x, interleaved ? 2 * i : i, p.head_dim, true), a);
  if (!interleaved) unpack<T>(load_vector(x, i + p.pairs, p.head_dim, true), b);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const float first = interleaved ? a[2 * j] : a[j], second = interleaved ? a[2 * j + 1] : b[j];
    const Rotated rotated = rotate(first, second, cosine[j], p.inverse ? -sine[j] : sine[j]);
    result_a[interleaved ? 2 * j : j] = from_double<T>(rotated.first);
    (interleaved ? result_a[2 * j + 1] : result_b[j]) = from_double<T>(rotated.second);
  }
  Packed packed;
  const auto pack_bits = [&](const T(&result)[w]) {
    constexpr int per_word = w / 4;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      packed.word[word] = 0;
#pragma unroll
      for (int j = 0; j < per_word; ++j)
        packed.word[word] |= bits_of(result[word * per_word + j]) << (32 / per_word * j);
    }
  };
  pack_bits(result_a);
  store_vector(out, interleaved ? 2 * i : i, p.head_dim, true, packed);
  if (interleaved) return;
  pack_bits(result_b);
  store_vector(out, i + p.pairs, p.head_dim, true, packed);
}

// threadIdx.x goes along a row, threadIdx.y over rows.
template <class T, class U>
__global__ void __launch_bounds__(rotary_threads) rotary_forward_kernel(const __grid_constant__ RotaryParams p) {
  const int64_t rows = p.batch * p.num_heads * p.length;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  // A 64-bit division costs as much as moving the row.
  const RowIndex at = rows <= 0xFFFFFFFFll ? row_index(p, static_cast<uint32_t>(row)) : row_index(p, row);
  const T* x = row_of<T>(p.input, at);
  const U *cosines = row_of<U>(p.cos, at), *sines = row_of<U>(p.sin, at);
  T* out =
      static_cast<T*>(p.output.data) + at.batch * p.output.batch + at.head * p.output.head + at.token * p.output.token;
  int64_t done = 0;  // pairs
  if (p.whole_vectors) {
    const int n = p.interleaved ? width<T> / 2 : width<T>;
    for (int64_t i = threadIdx.x * n; i < p.pairs; i += blockDim.x * n) {
      if (p.interleaved)
        rotate_vectors<T, U, true>(p, x, cosines, sines, out, i);
      else
        rotate_vectors<T, U, false>(p, x, cosines, sines, out, i);
    }
    done = p.pairs;
  }
  const int64_t step = p.interleaved ? 2 : 1, distance = p.interleaved ? 1 : p.pairs;
  for (int64_t i = done + threadIdx.x; i < p.pairs; i += blockDim.x) {
    const int64_t first = i * step, second = first + distance;
    const double cosine = to_float(cosines[i * p.cos.col]), sine = to_float(sines[i * p.sin.col]);
    const Rotated rotated =
        rotate(to_float(x[first * p.input.col]), to_float(x[second * p.input.col]), cosine, p.inverse ? -sine : sine);
    out[first] = from_double<T>(rotated.first);
    out[second] = from_double<T>(rotated.second);
  }
  for (int64_t c = 2 * p.pairs + threadIdx.x; c < p.head_dim; c += blockDim.x) out[c] = x[c * p.input.col];
}

// A thread takes one pair of one row of the tables: the sum over heads, and over the batch where it shares the tables,
// in that order.
template <class T, class U>
__global__ void __launch_bounds__(rotary_threads) rotary_tables_kernel(const __grid_constant__ RotaryTablesParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * rotary_threads + threadIdx.x;
  const int64_t table_row = at / p.pairs, pair = at % p.pairs;
  if (table_row >= (p.shared ? 1 : p.batch) * p.length) return;
  const int64_t token = table_row % p.length;
  const int64_t begin = p.shared ? 0 : table_row / p.length, end = p.shared ? p.batch : begin + 1;
  const int64_t first = pair * (p.interleaved ? 2 : 1), second = first + (p.interleaved ? 1 : p.pairs);
  double by_cos = 0, by_sin = 0;
  for (int64_t batch = begin; batch < end; ++batch) {
    for (int64_t head = 0; head < p.num_heads; ++head) {
      const RowIndex row = {batch, head, token};
      const T *g = row_of<T>(p.grad_output, row), *x = row_of<T>(p.input, row);
      const double g1 = to_float(g[first * p.grad_output.col]), g2 = to_float(g[second * p.grad_output.col]);
      const double x1 = to_float(x[first * p.input.col]), x2 = to_float(x[second * p.input.col]);
      by_cos += fma(g1, x1, g2 * x2);
      by_sin += fma(g2, x1, -(g1 * x2));
    }
  }
  static_cast<U*>(p.grad_cos)[at] = from_double<U>(by_cos);
  static_cast<U*>(p.grad_sin)[at] = from_double<U>(p.inverse ? -by_sin : by_sin);
}

// Calls body(T{}, U{}) for the storage types of rows and tables: the same, or float tables beside 16-bit rows.
template <class Body>
cudaError_t with_types(DType dtype, bool float_tables, Body body) {
  return with_type(dtype, [&](auto type) { return float_tables ? body(type, float{}) : body(type, type); });
}

template <class T, class U>
bool rows_are_whole(const RotaryParams& p) {
  const int64_t n = p.interleaved ? width<T> / 2 : width<T>;
  const auto whole = [](const RotaryTensor& t, int64_t per_vector) {
    return t.col == 1 && reinterpret_cast<uintptr_t>(t.data) % vector_bytes == 0 && t.batch % per_vector == 0 &&
           t.head % per_vector == 0 && t.token % per_vector == 0;
  };
  const RotaryTensor output = {p.output.data, p.output.batch, p.output.head, p.output.token, 1};
  // A table's vector may be half of the row's where pairs interleave: its own loads fall back then.
  return p.pairs % n == 0 && p.pairs % width<U> == 0 && whole(p.input, width<T>) && whole(output, width<T>) &&
         whole(p.cos, width<U>) && whole(p.sin, width<U>) && (p.interleaved || p.pairs % width<T> == 0);
}

}  // namespace

cudaError_t rotary_forward(const RotaryParams& params, DType dtype, cudaStream_t stream) {
  const int64_t rows = params.batch * params.num_heads * params.length;
  if (rows == 0 || params.head_dim == 0) return cudaSuccess;
  return with_types(dtype, params.float_tables, [&](auto row, auto table) {
    using T = decltype(row);
    using U = decltype(table);
    RotaryParams p = params;
    p.whole_vectors = rows_are_whole<T, U>(p);
    const int64_t work = p.whole_vectors ? p.head_dim / width<T> : p.head_dim;
    unsigned along = 4;
    while (along < 32 && along < work) along *= 2;
    const dim3 block(along, rotary_threads / along);
    return launch(rotary_forward_kernel<T, U>, dim3(static_cast<unsigned>((rows + block.y - 1) / block.y)), block, 0,
                  stream, p);
  });
}

cudaError_t rotary_backward(const RotaryTablesParams& p, DType dtype, cudaStream_t stream) {
  const int64_t elements = (p.shared ? 1 : p.batch) * p.length * p.pairs;
  if (elements == 0) return cudaSuccess;
  return with_types(dtype, p.float_tables, [&](auto row, auto table) {
    const dim3 grid(static_cast<unsigned>((elements + rotary_threads - 1) / rotary_threads));
    return launch(rotary_tables_kernel<decltype(row), decltype(table)>, grid, dim3(rotary_threads), 0, stream, p);
  });
}

}  // namespace transfuse::cuda
