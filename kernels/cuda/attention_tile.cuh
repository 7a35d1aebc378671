// Tiles of rows in shared memory: how they are laid out, filled and read as operands of mma.sync.
//
// Policy: a tile is rows of 16-byte chunks, and a chunk's place is swizzled by its row, so that the eight rows that one
// ldmatrix reads lie in eight different groups of banks. What lies past the last row or column is 0: it takes part in
// products, and adds nothing to them.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

#include <type_traits>

namespace transfuse::cuda {

template <class T, int Rows, int Columns>
struct SharedTile {
  static constexpr int rows = Rows, columns = Columns, chunks = Columns / width<T>;
  static constexpr int bytes = Rows * Columns * static_cast<int>(sizeof(T));
  T* data;

  static_assert(chunks % 4 == 0, "rows of whole groups of four chunks");
  static constexpr int group = chunks % 8 == 0 ? 8 : 4;  // of neighbouring chunks that change places

  // What the chunk's place in its group is xored with. The same eight rows further on.
  static __device__ __forceinline__ int swizzle_of(int row) { return group == 8 ? row & 7 : row >> 1 & 3; }
  // The place of elements [chunk * width, (chunk + 1) * width) of a row.
  __device__ __forceinline__ T* at(int row, int chunk) const {
    return data + (row * chunks + (chunk ^ swizzle_of(row))) * width<T>;
  }
};

// A lane's address in a tile, from which the steps of a product are constants and one xor away. The compiler is not
// told that it stays the same: addresses that it kept for all steps would fill the registers of the whole loop.
template <class Tile>
struct TileReader {
  using T = std::remove_pointer_t<decltype(Tile::data)>;
  ptx::SharedAddress place;

  // Of row `first` and chunk `odd`, 0 or 1.
  __device__ __forceinline__ TileReader(const Tile& tile, int first, int odd)
      : place(ptx::opaque(ptx::shared_address(tile.data) + first * Tile::columns * static_cast<int>(sizeof(T)) +
                          (Tile::swizzle_of(first) ^ odd) * vector_bytes)) {}
  // `down` rows below, a multiple of 8, and `even` chunks to the right.
  __device__ __forceinline__ ptx::SharedAddress at(int down, int even) const {
    constexpr int in_group = Tile::group - 1;
    return (place ^ (even & in_group) * vector_bytes) + (down * Tile::chunks + (even & ~in_group)) * vector_bytes;
  }
};

// How the threads of a block share the chunks of a tile: neighbours take the neighbouring chunks of one group.
template <int threads, class Tile>
struct TileShares {
  static constexpr int group = Tile::group, row_step = threads / group;
  static_assert(threads % group == 0, "whole groups");

  // Calls body(down, right) for what a thread has, so many rows and chunks away from its first row and chunk.
  template <class Body>
  static __device__ __forceinline__ void for_each(int row, Body body) {
#pragma unroll
    for (int down = 0; down < Tile::rows; down += row_step) {
      if (down + row_step > Tile::rows && down + row >= Tile::rows) break;
#pragma unroll
      for (int right = 0; right < Tile::chunks; right += group) body(down, right);
    }
  }
};

// Fills a tile with rows [0, rows) and columns [0, columns) of memory, row r at first + offset(r). By cp.async where
// rows are whole vectors on their boundaries: the caller commits and waits, and a barrier follows, in either case.
template <int threads, class Tile, class T, class Offset>
__device__ __forceinline__ void load_tile(const Tile& tile, const T* first, Offset offset, int64_t column_stride,
                                          int rows, int columns, bool whole) {
  constexpr int chunks = Tile::chunks, all = Tile::rows * chunks;
  const int thread = ptx::opaque(threadIdx.x);  // nothing of this waits in registers while other tiles are multiplied
  if (whole) {
    using Shares = TileShares<threads, Tile>;
    const int first_row = thread / Shares::group, first_chunk = thread % Shares::group;
    Shares::for_each(first_row, [&](int down, int right) {
      const int row = first_row + down, chunk = first_chunk + right;
      const int elements = row < rows ? min(max(columns - chunk * width<T>, 0), width<T>) : 0;
      const T* from = elements > 0 ? first + offset(row) + chunk * width<T> : first;
      ptx::cp_async<vector_bytes>(tile.at(row, chunk), from, elements * static_cast<int>(sizeof(T)));
    });
    return;
  }
#pragma unroll 1
  for (int place = thread; place < all; place += threads) {
    const int row = place / chunks, chunk = place % chunks;
    const T* from = first + offset(row < rows ? row : 0) + chunk * width<T> * column_stride;
    T* to = tile.at(row, chunk);
#pragma unroll
    for (int j = 0; j < width<T>; ++j)
      to[j] = row < rows && chunk * width<T> + j < columns ? from[j * column_stride] : T{};
  }
}

// A thread's share of whole tiles that follow one another in memory: a chunk costs it little more than the copy, since
// its chunks lie constants apart, in memory row by row, and in shared memory, where they all are swizzled alike.
template <int threads, class Tile>
struct TileStream {
  using T = std::remove_pointer_t<decltype(Tile::data)>;
  using Shares = TileShares<threads, Tile>;
  static_assert(Shares::row_step % 8 == 0, "a thread's rows are swizzled alike");
  const T* from;  // the thread's first chunk in the next tile

  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / Shares::group; }
  static __device__ __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % Shares::group; }

  __device__ __forceinline__ TileStream(const T* first_row, int64_t row_stride)
      : from(first_row + row() * row_stride + chunk() * width<T>) {}

  __device__ __forceinline__ void load(const Tile& tile, int64_t row_stride) {
    T* to = tile.at(row(), chunk());
    Shares::for_each(row(), [&](int down, int right) {
      ptx::cp_async<vector_bytes>(to + (down * Tile::chunks + right) * width<T>,
                                  from + down * row_stride + right * width<T>);
    });
    from += Tile::rows * row_stride;
  }
};

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

// Rows [row, row + 16) of a tile as the first operand, 16 columns at a time.
template <class Tile>
struct RowsOperand {
  TileReader<Tile> reader;
  __device__ __forceinline__ RowsOperand(const Tile& tile, int row)
      : reader(tile, row + lane_of_warp() % 16, lane_of_warp() / 16) {}
  // Of rows `down` below, columns [16 * step, 16 * step + 16).
  __device__ __forceinline__ void load(uint32_t (&a)[4], int down, int step) const {
    ptx::ldmatrix<4>(a, reader.at(down, 2 * step));
  }
};

// The second operand of products with the rows of a tile, two fragments of eight rows at a time.
template <class Tile>
struct ProductsOperand {
  TileReader<Tile> reader;
  __device__ __forceinline__ explicit ProductsOperand(const Tile& tile)
      : reader(tile, lane_of_warp() / 16 * 8 + lane_of_warp() % 8, lane_of_warp() / 8 % 2) {}
  // Rows [row, row + 16), columns [16 * step, 16 * step + 16).
  __device__ __forceinline__ void load(uint32_t (&b)[2][2], int row, int step) const {
    uint32_t registers[4];
    ptx::ldmatrix<4>(registers, reader.at(row, 2 * step));
    b[0][0] = registers[0], b[0][1] = registers[1];
    b[1][0] = registers[2], b[1][1] = registers[3];
  }
};

// The second operand of weighted sums of the rows of a tile, two fragments of eight columns at a time.
template <class Tile>
struct SumsOperand {
  TileReader<Tile> reader;
  __device__ __forceinline__ explicit SumsOperand(const Tile& tile)
      : reader(tile, lane_of_warp() % 16, lane_of_warp() / 16) {}
  // Rows [row, row + 16), columns of the chunks `chunk` and chunk + 1.
  __device__ __forceinline__ void load(uint32_t (&b)[2][2], int row, int chunk) const {
    uint32_t registers[4];
    ptx::ldmatrix<4, true>(registers, reader.at(row, chunk));
    b[0][0] = registers[0], b[0][1] = registers[1];
    b[1][0] = registers[2], b[1][1] = registers[3];
  }
};

}  // namespace transfuse::cuda
