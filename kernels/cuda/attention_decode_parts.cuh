// The frame of decode's kernels: which keys a block takes, where they lie, and how the results of parts become one.
//
// A block takes a tile of rows and one part of the entry's keys; each of its warps walks every fourth group of keys on
// its own. A lane copies with cp.async what it alone will read, into its own places of shared memory: a queue that
// needs no barrier, in which keys or values are always under way. In the end the warps' results are folded in the order
// of the warps, and, by a second kernel, those of the parts in the order of the parts. No sum is unordered.
//
// Why tensor cores in 16 bits (attention_decode_mma.cuh) and plain FMA in float32 (attention_decode_simt.cuh). Reading
// at the 4.3 TB/s of an H200, each of 132 multiprocessors gets 18 bytes per clock at 1.8 GHz. One key and value of 128
// dimensions in 16 bits are 512 bytes, 28 clocks, in which 113 instructions of warps can be issued. With plain FMA, R
// rows of one key head take 8 R of them for the products, 8 to widen, and about 2 R + 4 to sum over lanes and for the
// softmax: 52 for R = 4, 92 for R = 8, and 16 rows would no longer wait for memory. mma.m16n8k16 takes up to 16 rows at
// the same price: two instructions per key, 4 clocks of the tensor cores at 1024 products per clock, and a few dozen
// for copies, fragments and softmax. In float32 a key has 57 clocks, or 226 instructions; 8 rows of plain FMA take 64
// for the products and about as many for operands and softmax, and IEEE products are what float32 promises. Counted,
// not measured.
//
// Policy: a row's arithmetic is that of its own keys; keys that no row of the tile sees are not read, and a group, warp
// or part without a key changes no bit. What the tables hold is not trusted: lengths are clamped to the cache, block
// numbers to its blocks, so every read lies within it.
#pragma once

#include "cuda/attention_decode.cuh"
#include "cuda/attention_softmax.cuh"
#include "cuda/launch.cuh"

namespace transfuse::cuda {

namespace {

constexpr int decode_warps = 4, decode_threads = decode_warps * warp_size;

// How long the parts of an entry of that many keys are.
__host__ __device__ __forceinline__ int decode_keys_of_part(int length) {
  constexpr int unit = decode_part_keys * decode_most_parts;
  return decode_part_keys * (length > unit ? (length + unit - 1) / unit : 1);
}

// ---- where keys lie ----

__device__ __forceinline__ int length_of_entry(const DecodeCache& c, int64_t batch) {
  const int64_t before = clamped(integer_at(c.lengths, batch), 0, c.capacity);
  return static_cast<int>(clamped(before + c.num_new, 0, c.num_blocks > 0 ? c.capacity : 0));
}

struct DecodePlace {
  int block, row;
};

// As the table says; the block may not exist.
__device__ __forceinline__ int64_t block_in_table(const DecodeCache& c, int64_t batch, int page) {
  const int64_t at = batch * c.table_batch + page * c.table_page;
  return c.table_wide ? static_cast<const int64_t*>(c.table)[at] : static_cast<const int32_t*>(c.table)[at];
}

// Of a key below the capacity.
__device__ __forceinline__ DecodePlace place_of_key(const DecodeCache& c, int64_t batch, int key) {
  if (!c.table) return {static_cast<int>(batch), key};
  const int page = static_cast<int>(static_cast<unsigned>(key) / static_cast<unsigned>(c.block_size));
  const int64_t block = clamped(block_in_table(c, batch, page), 0, c.num_blocks - 1);
  return {static_cast<int>(block), key - page * c.block_size};
}

// ---- the work of a block ----

// Tiles of rows are next to each other: those that share keys find them in the cache of the GPU.
struct DecodeWork {
  AttentionTask task;
  int part;
  KeyRange keys;  // of the part, that some row of the tile sees
  int64_t first_row;  // of the tile, among those of all problems that the launch takes

  __device__ __forceinline__ DecodeWork(const DecodeParams& d, int tile_rows, int64_t block)
      : task(AttentionTask::KeysAlone{}, d.problem, 0, 0) {
    const AttentionParams& p = d.problem;
    const int group = p.num_heads / p.num_kv_heads;
    const int tiles = (d.slice_rows + tile_rows - 1) / tile_rows;
    const int row_of_slice = static_cast<int>(block % tiles) * tile_rows;
    block /= tiles;
    part = static_cast<int>(block % d.parts);
    block /= d.parts;
    task.kv_head = static_cast<int>(block % p.num_kv_heads);
    task.first_head = task.kv_head * group;
    task.packed_heads = group;
    task.sequence.batch = block / p.num_kv_heads;
    task.sequence.seqlen_k = length_of_entry(d.cache, task.sequence.batch);
    task.first_row = d.slice_first + row_of_slice;
    task.num_rows = min(d.slice_rows - row_of_slice, tile_rows);
    first_row = block * d.slice_rows + row_of_slice;
    const int length = task.sequence.seqlen_k, part_keys = decode_keys_of_part(length);
    const KeyRange seen = task.seen_by_some(p, 0, tile_rows);
    keys = {static_cast<int>(clamped(static_cast<int64_t>(part) * part_keys, seen.begin, seen.end)),
            static_cast<int>(clamped((static_cast<int64_t>(part) + 1) * part_keys, seen.begin, seen.end))};
  }
};

// The row that a block of the second kernel folds.
__device__ __forceinline__ void take_row(AttentionTask& task, const DecodeParams& d, int64_t row) {
  const AttentionParams& p = d.problem;
  const int group = p.num_heads / p.num_kv_heads;
  const int64_t head = row / d.slice_rows;
  task.kv_head = static_cast<int>(head % p.num_kv_heads);
  task.first_head = task.kv_head * group;
  task.packed_heads = group;
  task.sequence.batch = head / p.num_kv_heads;
  task.sequence.seqlen_k = length_of_entry(d.cache, task.sequence.batch);
  task.first_row = d.slice_first + static_cast<int>(row % d.slice_rows);
  task.num_rows = 1;
}

// How a warp reads a group of its keys, or their values: a lane looks up one place, and all know it.
template <class T>
struct DecodeReader {
  const DecodeParams& d;
  const DecodeWork& work;
  DecodePlace place;  // of the lane's key of the group that is under way

  __device__ __forceinline__ bool is_read(int key) const { return key >= work.keys.begin && key < work.keys.end; }
  __device__ __forceinline__ void find(int key) {
    place = is_read(key) ? place_of_key(d.cache, work.task.sequence.batch, key) : DecodePlace{0, 0};
  }
  // Where the key that lane `of` has looked up lies in a tensor; all lanes call it together.
  __device__ __forceinline__ int64_t offset(const AttentionTensor& t, int of) const {
    const int64_t block = __shfl_sync(whole_warp, place.block, of), row = __shfl_sync(whole_warp, place.row, of);
    return block * t.batch + work.task.kv_head * t.head + row * t.row;
  }
  // A vector of columns of the row at `offset`: zeros from `columns` on.
  template <bool whole>
  static __device__ __forceinline__ void copy(T* to, const AttentionTensor& t, int64_t offset, int column,
                                              int columns) {
    const T* base = static_cast<const T*>(t.data);
    const int elements = min(max(columns - column, 0), width<T>);
    if constexpr (whole) {
      const T* from = elements > 0 ? base + offset + column : base;
      ptx::cp_async<vector_bytes>(to, from, elements * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll
      for (int j = 0; j < width<T>; ++j) to[j] = j < elements ? base[offset + (column + j) * t.col] : T{};
    }
  }
};

// ---- folding ----

struct PartStats {
  float maximum, anchor, sum;  // maximum is relative to the anchor
};

__device__ __forceinline__ double top_of(const PartStats& s) { return static_cast<double>(s.maximum) + s.anchor; }

// What the sums of a part count for beside the part with the largest score. A NaN or infinite score has made its sums
// NaN, which no factor takes away.
__device__ __forceinline__ float share_of_part(const PartStats& s, const PartStats& largest, float logit_scale) {
  if (s.maximum == -attention_infinity) return 0.0f;
  const double below = (static_cast<double>(s.maximum) - largest.maximum) +
      (static_cast<double>(s.anchor) - largest.anchor);
  return exp_of_difference(below * logit_scale);
}

// The first of the largest.
template <class StatsOf>
__device__ __forceinline__ PartStats largest_part(int first, int stop, StatsOf stats_of) {
  PartStats largest{-attention_infinity, 0, 0};
  for (int i = first; i < stop; ++i) {
    const PartStats s = stats_of(i);
    if (top_of(s) > top_of(largest)) largest = s;
  }
  return largest;
}

// Four columns of a finished row, divided and rounded once.
template <class T>
__device__ __forceinline__ void write_columns(const AttentionParams& p, const AttentionTask& task, int row, int column,
                                              const RowEnd& end, const float (&x)[4]) {
  const int query = task.query(row), head = task.head(row);
  T* to = row_of<T>(p.output, task.sequence.batch, head, 0) + query * p.output.row;
#pragma unroll
  for (int c = 0; c < 4; ++c)
    if (column + c < p.value_head_dim)
      to[column + c] = from_float<T>(end.factor == 0 ? 0.0f : x[c] * end.factor / end.divisor);
}
__device__ __forceinline__ void write_lse(const AttentionParams& p, const AttentionTask& task, int row, float lse) {
  row_of<float>(p.lse, task.sequence.batch, task.head(row), 0)[task.query(row) * p.lse.row] = lse;
}

// Where the warps of a block leave what they found: sums of values [rows][columns] each, and their rows' statistics.
template <int Rows>
struct WarpResults {
  PartStats stats[decode_warps][Rows];
  float shares[decode_warps][Rows];
  RowEnd ends[Rows];
};

// Folds the warps' results into those of the part, or of the row where there is one part alone. All threads of the
// block come here; outputs(warp) is where a warp has left its sums.
template <class T, int Rows, int Columns, class OutputsOf>
__device__ __forceinline__ void fold_warps(const DecodeParams& d, const DecodeWork& work, WarpResults<Rows>& results,
                                           OutputsOf outputs_of) {
  const AttentionParams& p = d.problem;
  static_assert(Rows <= decode_threads, "a thread for each row");
  __syncthreads();  // every warp has left its results
  const int own = static_cast<int>(threadIdx.x);
  if (own < work.task.num_rows) {
    const PartStats largest = largest_part(0, decode_warps, [&](int warp) { return results.stats[warp][own]; });
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < decode_warps; ++warp) {
      const float share = share_of_part(results.stats[warp][own], largest, p.logit_scale);
      results.shares[warp][own] = share;
      sum = fmaf(results.stats[warp][own].sum, share, sum);
    }
    if (d.parts == 1) {
      results.ends[own] = end_of_row(p, work.task.head(own), largest.maximum, largest.anchor, sum);
      write_lse(p, work.task, own, results.ends[own].lse);
    } else {
      float* stats = d.partial_stats + ((work.first_row + own) * d.parts + work.part) * decode_stats;
      stats[0] = largest.maximum, stats[1] = largest.anchor, stats[2] = sum;
    }
  }
  __syncthreads();
  constexpr int vectors = Columns / 4;
  for (int place = own; place < work.task.num_rows * vectors; place += decode_threads) {
    const int row = place / vectors, column = place % vectors * 4;
    if (column >= p.value_head_dim) continue;
    float x[4] = {};
#pragma unroll
    for (int warp = 0; warp < decode_warps; ++warp) {
      const float4 part = *reinterpret_cast<const float4*>(outputs_of(warp) + row * Columns + column);
      const float share = results.shares[warp][row];
      x[0] = fmaf(part.x, share, x[0]), x[1] = fmaf(part.y, share, x[1]);
      x[2] = fmaf(part.z, share, x[2]), x[3] = fmaf(part.w, share, x[3]);
    }
    if (d.parts == 1) {
      write_columns<T>(p, work.task, row, column, results.ends[row], x);
    } else {
      const int64_t at = ((work.first_row + row) * d.parts + work.part) * d.partial_columns + column;
      *reinterpret_cast<float4*>(d.partial_outputs + at) = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
}

// A block folds the parts of one row: each warp every fourth part in order, and then the warps in order.
template <class T>
__global__ void __launch_bounds__(decode_threads, 8)
    attention_decode_fold_kernel(const __grid_constant__ DecodeParams d) {
  __shared__ PartStats stats[decode_most_parts];
  __shared__ float shares[decode_most_parts];
  __shared__ float sums[decode_warps][decode_widest_head_dim];
  const AttentionParams& p = d.problem;
  AttentionTask task(AttentionTask::KeysAlone{}, p, 0, 0);
  take_row(task, d, blockIdx.x);
  const int length = task.sequence.seqlen_k, part_keys = decode_keys_of_part(length);
  // Parts that some row of the tile may have seen are written; those of this row are among them.
  const KeyRange seen = task.seen_by_some(p, 0, 1);
  const int first = seen.begin < seen.end ? seen.begin / part_keys : 0;
  const int stop = seen.begin < seen.end ? (seen.end - 1) / part_keys + 1 : 0;
  const int64_t row_parts = static_cast<int64_t>(blockIdx.x) * d.parts;
  const int own = static_cast<int>(threadIdx.x), warp = own / warp_size, lane = own % warp_size;
  for (int part = first + own; part < stop; part += decode_threads) {
    const float* from = d.partial_stats + (row_parts + part) * decode_stats;
    stats[part] = {from[0], from[1], from[2]};
  }
  __syncthreads();
  const PartStats largest = largest_part(first, stop, [&](int part) { return stats[part]; });
  for (int part = first + own; part < stop; part += decode_threads)
    shares[part] = share_of_part(stats[part], largest, p.logit_scale);
  __syncthreads();
  for (int column = 4 * lane; column < d.partial_columns; column += 4 * warp_size) {
    float x[4] = {};
#pragma unroll 4
    for (int part = first + ((warp - first) & (decode_warps - 1)); part < stop; part += decode_warps) {
      const float4 of_part =
          *reinterpret_cast<const float4*>(d.partial_outputs + (row_parts + part) * d.partial_columns + column);
      const float share = shares[part];
      x[0] = fmaf(of_part.x, share, x[0]), x[1] = fmaf(of_part.y, share, x[1]);
      x[2] = fmaf(of_part.z, share, x[2]), x[3] = fmaf(of_part.w, share, x[3]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[warp][column + c] = x[c];
  }
  float sum = 0;
  for (int part = first; part < stop; ++part) sum = fmaf(stats[part].sum, shares[part], sum);
  const RowEnd end = end_of_row(p, task.head(0), largest.maximum, largest.anchor, sum);
  if (own == 0) write_lse(p, task, 0, end.lse);
  __syncthreads();
  for (int column = 4 * own; column < d.partial_columns; column += 4 * decode_threads) {
    float x[4] = {};
#pragma unroll
    for (int w = 0; w < decode_warps; ++w)
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] += sums[w][column + c];
    write_columns<T>(p, task, 0, column, end, x);
  }
}

}  // namespace

}  // namespace transfuse::cuda
