// A row and who holds it: the threads of a row, the vectors of each, and which of them fit a length.
//
// Policy: a row stays in registers from its one read to its one write. How many threads share it depends on its length
// alone; narrow rows share a block, so that enough loads are under way for the memory (768 to 4096 columns are where
// a row per block leaves it idle).
#pragma once

#include "cuda/vector.cuh"

namespace transfuse::cuda {

namespace {

// Threads per row and 16-byte vectors per thread: the row has at most threads * vectors of them. Whether they are whole
// ones is the policy's too: loads of single elements are the bulk of the code where both can happen.
template <class Element, int threads_per_row, int vectors_per_thread, bool whole_vectors>
struct RowPolicy {
  using T = Element;
  static constexpr int threads = threads_per_row, vectors = vectors_per_thread;
  static constexpr bool whole = whole_vectors;
  static constexpr int block = threads < 128 ? 128 : threads;  // narrow rows share a block
  static constexpr int rows_per_block = block / threads;
};

// The elements of one row that one thread holds: vectors `threads` apart, so that neighbours read neighbouring ones.
template <class Policy>
struct HeldRow {
  using T = typename Policy::T;
  static constexpr int n = width<T>;
  static constexpr bool whole = Policy::whole;
  Packed held[Policy::vectors];
  int cols, lane;

  __device__ __forceinline__ HeldRow(int64_t cols, int lane) : cols(static_cast<int>(cols)), lane(lane) {}
  __device__ __forceinline__ int begin(int v) const { return (v * Policy::threads + lane) * n; }
  __device__ __forceinline__ bool holds(int v) const { return begin(v) < cols; }

  __device__ __forceinline__ void load(const T* row, bool valid) {
#pragma unroll
    for (int v = 0; v < Policy::vectors; ++v)
      held[v] = valid && holds(v) ? load_vector(row, begin(v), cols, whole) : Packed{};
  }
  // f(x, begin, count): the floats of a vector, its first column, how many of them are the row's.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int v = 0; v < Policy::vectors; ++v) {
      if (!holds(v)) continue;
      float x[n];
      unpack<T>(held[v], x);
      f(x, begin(v), whole ? n : min(cols - begin(v), n));
    }
  }
};

// The same for a row that no block holds: it is read again in every pass.
template <class Element, int threads>
struct StreamedRow {
  using T = Element;
  static constexpr int n = width<T>;
  const T* row;
  int64_t cols;
  bool whole;

  template <class F>
  __device__ __forceinline__ void each(F f) const {
    for (int64_t begin = static_cast<int64_t>(threadIdx.x) * n; begin < cols; begin += threads * n) {
      float x[n];
      unpack<T>(load_vector(row, begin, cols, whole), x);
      const int64_t left = cols - begin;
      f(x, begin, left < n ? static_cast<int>(left) : n);
    }
  }
};

template <class T>
int64_t vectors_of(int64_t cols) {
  return (cols + width<T> - 1) / width<T>;
}

constexpr int narrow_row_threads = 8;

// Calls body(RowPolicy{}) for the narrowest policy that holds rows of `cols`; false where none does. A row of 768
// 16-bit elements is three vectors for each lane of a warp, one of 8192 four for each thread of 256. The bits of a row
// depend on the threads alone, so rows without whole vectors make do with fewer policies.
template <class T, class Body>
bool with_row_policy(int64_t cols, bool whole, Body body) {
  const int64_t vectors = vectors_of<T>(cols);
  if (whole) {
    if (vectors <= 8) return body(RowPolicy<T, narrow_row_threads, 1, true>{}), true;
    if (vectors <= 32) return body(RowPolicy<T, 32, 1, true>{}), true;
    if (vectors <= 64) return body(RowPolicy<T, 32, 2, true>{}), true;
    if (vectors <= 128) return body(RowPolicy<T, 32, 4, true>{}), true;
    if (vectors <= 256) return body(RowPolicy<T, 128, 2, true>{}), true;
    if (vectors <= 512) return body(RowPolicy<T, 128, 4, true>{}), true;
    if (vectors <= 1024) return body(RowPolicy<T, 256, 4, true>{}), true;
    if (vectors <= 2048) return body(RowPolicy<T, 512, 4, true>{}), true;
  } else {
    if (vectors <= 8) return body(RowPolicy<T, narrow_row_threads, 1, false>{}), true;
    if (vectors <= 128) return body(RowPolicy<T, 32, 4, false>{}), true;
    if (vectors <= 512) return body(RowPolicy<T, 128, 4, false>{}), true;
    if (vectors <= 1024) return body(RowPolicy<T, 256, 4, false>{}), true;
    if (vectors <= 2048) return body(RowPolicy<T, 512, 4, false>{}), true;
  }
  return false;
}

}  // namespace

}  // namespace transfuse::cuda
