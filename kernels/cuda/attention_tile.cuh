// Tiles of rows in shared memory: how they are laid out, filled and read as operands of mma.sync.
//
// Policy: a tile is rows of 16-byte chunks, and a chunk's place is swizzled by its row, so that the eight rows that one
// ldmatrix reads lie in eight different groups of banks. What lies past the last row or column is 0: it takes part in
// products, and adds nothing to them.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace transfuse::cuda {

template <class T, int Rows, int Columns>
struct SharedTile {
  static constexpr int rows = Rows, columns = Columns, chunks = Columns / width<T>;
  static constexpr int bytes = Rows * Columns * static_cast<int>(sizeof(T));
  T* data;

  // The place of elements [chunk * width, (chunk + 1) * width) of a row.
  __device__ __forceinline__ T* at(int row, int chunk) const {
    static_assert(chunks % 4 == 0, "rows of whole groups of four chunks");
    const int swizzled = chunks % 8 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
    return data + (row * chunks + swizzled) * width<T>;
  }
};

// Fills a tile with rows [0, rows) and columns [0, columns) of memory, row r at first + offset(r). By cp.async where rows
// are whole vectors on their boundaries: the caller commits and waits, and a barrier follows, in either case.
template <int threads, class Tile, class T, class Offset>
__device__ __forceinline__ void load_tile(const Tile& tile, const T* first, Offset offset, int64_t column_stride,
                                          int rows, int columns, bool whole) {
  constexpr int chunks = Tile::chunks, all = Tile::rows * chunks;
  if (whole) {
#pragma unroll
    for (int i = 0; i < (all + threads - 1) / threads; ++i) {
      const int place = i * threads + static_cast<int>(threadIdx.x), row = place / chunks, chunk = place % chunks;
      if (all % threads != 0 && place >= all) break;
      const int elements = row < rows ? min(max(columns - chunk * width<T>, 0), width<T>) : 0;
      const T* from = elements > 0 ? first + offset(row) + chunk * width<T> : first;
      ptx::cp_async<vector_bytes>(tile.at(row, chunk), from, elements * static_cast<int>(sizeof(T)));
    }
    return;
  }
#pragma unroll 1
  for (int place = threadIdx.x; place < all; place += threads) {
    const int row = place / chunks, chunk = place % chunks;
    const T* from = first + offset(row < rows ? row : 0) + chunk * width<T> * column_stride;
    T* to = tile.at(row, chunk);
#pragma unroll
    for (int j = 0; j < width<T>; ++j)
      to[j] = row < rows && chunk * width<T> + j < columns ? from[j * column_stride] : T{};
  }
}

// ---- fragments of mma.m16n8k16 ----

template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16_f16(d, a, b);
}
template <>
__device__ __forceinline__ void multiply<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ptx::mma_m16n8k16_bf16(d, a, b);
}

// Two floats as one register of a fragment, rounded to nearest even.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float low, float high);
template <>
__device__ __forceinline__ uint32_t pair_of<f16>(float low, float high) {
  return bits_of(__floats2half2_rn(low, high));
}
template <>
__device__ __forceinline__ uint32_t pair_of<bf16>(float low, float high) {
  return bits_of(__floats2bfloat162_rn(low, high));
}

// What this lane holds of an accumulator: rows lane / 4 and that + 8, columns 2 * (lane % 4) and the one to its right.
__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x) % warp_size; }
__device__ __forceinline__ int fragment_row() { return lane_of_warp() / 4; }
__device__ __forceinline__ int fragment_column() { return lane_of_warp() % 4 * 2; }

// Rows [row, row + 16), columns [16 * step, 16 * step + 16) as the first operand.
template <class Tile>
__device__ __forceinline__ void load_rows_fragment(uint32_t (&a)[4], const Tile& tile, int row, int step) {
  const int lane = lane_of_warp();
  ptx::ldmatrix<4>(a, tile.at(row + lane % 16, 2 * step + lane / 16));
}

// The second operand of products with rows: two fragments, for rows [row, row + 8) and [row + 8, row + 16).
template <class Tile>
__device__ __forceinline__ void load_columns_fragments(uint32_t (&b)[2][2], const Tile& tile, int row, int step) {
  const int lane = lane_of_warp();
  uint32_t registers[4];
  ptx::ldmatrix<4>(registers, tile.at(row + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  b[0][0] = registers[0], b[0][1] = registers[1];
  b[1][0] = registers[2], b[1][1] = registers[3];
}

// The second operand of sums of rows [row, row + 16): two fragments, for columns [8 * chunk, 8 * chunk + 8) and the
// next 8.
template <class Tile>
__device__ __forceinline__ void load_sum_fragments(uint32_t (&b)[2][2], const Tile& tile, int row, int chunk) {
  const int lane = lane_of_warp();
  uint32_t registers[4];
  ptx::ldmatrix<4, true>(registers, tile.at(row + lane % 16, chunk + lane / 16));
  b[0][0] = registers[0], b[0][1] = registers[1];
  b[1][0] = registers[2], b[1][1] = registers[3];
}

}  // namespace transfuse::cuda
