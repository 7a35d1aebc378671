// Attention forward on tensor cores: softmax(scores) V over blocks of keys, no matrix of Lq x Lk anywhere.
//
// A block of threads takes a tile of queries of one head and walks the blocks of keys that some of its rows see: load,
// scores, mask, online softmax, accumulate; finish (Milakov and Gimelshein, 2018; Dao et al., 2022). Products are
// mma.m16n8k16 with float accumulators; weights are rounded to the storage type for the second product and nowhere
// else.
//
// Policy: keys and values lie in a ring of two stages in shared memory: while one is multiplied, cp.async fills the
// other, and one barrier per block of keys hands them over. A warp owns 16 or 32 rows and everything that belongs to
// them: scores, weights, statistics and output stay in its registers. A row's arithmetic depends on its own keys alone,
// block by block from the sequence's key 0: batch, packing, masks and the tile's other rows change no bit.
#pragma once

#include "cuda/attention_dropout.cuh"
#include "cuda/attention_softmax.cuh"
#include "cuda/attention_values.cuh"
#include "cuda/launch.cuh"

namespace transfuse::cuda {

// Shared memory that a block may have, by the architecture that code was compiled for.
constexpr int shared_kb_of(int architecture) {
  return architecture == 80 || architecture == 87                           ? 163
         : architecture == 90 || (architecture >= 100 && architecture < 120) ? 227
                                                                             : 99;
}
// Whether a row of attention_tiles is compiled for an architecture: the one with the most memory that fits, and on
// sm_80, whose code also runs on GPUs with less, all that fit.
constexpr bool tile_is_built(int row, int architecture) {
  const int most = shared_kb_of(architecture);
  if (attention_tiles[row].shared_kb > most) return false;
  if (architecture == 80) return true;
  for (const AttentionTile& other : attention_tiles)
    if (other.head_dim == attention_tiles[row].head_dim && other.shared_kb <= most &&
        other.shared_kb > attention_tiles[row].shared_kb)
      return false;
  return true;
}

// General: with biases, masks, ALiBi, softcap, dropout or a scale that is not positive, each asked for at run time. The
// plain kernel has causality, windows, lengths and sinks.
template <class Type, int Row, bool General>
struct AttentionPolicy {
  using T = Type;
  static constexpr bool general = General;
  static constexpr int head_dim = attention_tiles[Row].head_dim, queries = attention_tiles[Row].queries,
                       keys = attention_tiles[Row].keys;
  static constexpr int warps = General ? attention_tiles[Row].general_warps : attention_tiles[Row].warps;
  static constexpr int threads = warps * warp_size;
  static constexpr int warp_rows = queries / warps, m_tiles = warp_rows / 16;
  static constexpr int stages = 2;
  using QueryTile = SharedTile<T, queries, head_dim>;
  using KeyTile = SharedTile<T, keys, head_dim>;
  static constexpr int shared_bytes = QueryTile::bytes + 2 * stages * KeyTile::bytes;
  static_assert(shared_bytes <= attention_tiles[Row].shared_kb * 1024, "the tiles fit a block's shared memory");
  static_assert(warp_rows % 16 == 0 && keys % 16 == 0, "whole fragments");
#ifdef __CUDA_ARCH__
  static constexpr bool is_built = tile_is_built(Row, __CUDA_ARCH__ / 10);
#else
  static constexpr bool is_built = true;
#endif
};

namespace {

template <class Policy>
struct ForwardBlock {
  using T = typename Policy::T;
  static constexpr int keys = Policy::keys, m_tiles = Policy::m_tiles, columns = Policy::head_dim / 8;

  const AttentionParams& p;
  const AttentionTask& task;
  const AttentionSequence& sequence;
  const typename Policy::QueryTile query_tile;
  const typename Policy::KeyTile first_key_tile, first_value_tile;  // of the ring's first stage
  const int warp_row;                                               // the warp's first row in the tile
  float output[m_tiles][columns][4];
  SoftmaxRows rows[m_tiles];

  __device__ __forceinline__ ForwardBlock(const AttentionParams& params, const AttentionTask& its_task, T* shared)
      : p(params),
        task(its_task),
        sequence(its_task.sequence),
        query_tile{shared},
        first_key_tile{shared + Policy::queries * Policy::head_dim},
        first_value_tile{first_key_tile.data + Policy::stages * keys * Policy::head_dim},
        warp_row(static_cast<int>(threadIdx.x) / warp_size * Policy::warp_rows) {}

  __device__ __forceinline__ typename Policy::KeyTile stage_of(const typename Policy::KeyTile& first, int stage) const {
    return {first.data + stage * keys * Policy::head_dim};
  }
  // Row of the tile of a thread's fragment t, `half` 0 or 1 for its two rows.
  __device__ __forceinline__ int tile_row(int t, int half) const {
    return warp_row + 16 * t + fragment_row() + 8 * half;
  }

  // ---- load ----

  __device__ __forceinline__ void load_queries() const {
    const T* first = row_of<T>(p.query, sequence.batch, task.first_head, sequence.query_row);
    load_tile<Policy::threads>(
        query_tile, first,
        [&](int row) { return task.query(row) * p.query.row + (task.head(row) - task.first_head) * p.query.head; },
        p.query.col, task.num_rows, p.head_dim, p.whole_query);
  }
  __device__ __forceinline__ void load_keys(int key, int stage) const {
    const int rows_left = sequence.seqlen_k - key;
    const T* keys_at = row_of<T>(p.key, sequence.batch, task.kv_head, sequence.key_row + key);
    const T* values_at = row_of<T>(p.value, sequence.batch, task.kv_head, sequence.key_row + key);
    load_tile<Policy::threads>(
        stage_of(first_key_tile, stage), keys_at, [&](int row) { return row * p.key.row; }, p.key.col, rows_left,
        p.head_dim, p.whole_key);
    load_tile<Policy::threads>(
        stage_of(first_value_tile, stage), values_at, [&](int row) { return row * p.value.row; }, p.value.col,
        rows_left, p.value_head_dim, p.whole_value);
  }

  // ---- mask ----

  // What is added to the scores of a block of keys, and which of them take part.
  __device__ __forceinline__ void finish_scores(ScoreFragment<keys> (&scores)[m_tiles], int key, bool edge) const {
    if (!edge && !Policy::general) return;
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      const ScoreRow places[2] = {score_row(p, task, tile_row(t, 0)), score_row(p, task, tile_row(t, 1))};
      if constexpr (Policy::general) {
        if (p.transforms) transform_scores<T>(scores[t], p, sequence, places, key);
        if (p.mask.data) exclude_masked(scores[t], p, sequence, places, key);
      }
      if (edge) exclude_unseen(scores[t], places, key);
    }
  }

  // ---- online softmax ----

  __device__ __forceinline__ void update_softmax(ScoreFragment<keys>& scores, int t, int key, int stage) {
    float maxima[2], factors[2];
    row_maxima(scores, maxima);
    const bool refine = wants_refining(rows[t], maxima, p.logit_scale);
    if ((!Policy::general || p.softcap == 0) && __any_sync(whole_warp, refine)) {
      const ScoreRow places[2] = {score_row(p, task, tile_row(t, 0)), score_row(p, task, tile_row(t, 1))};
      const RowAnchor anchor = follow_maximum(rows[t], maxima, p.logit_scale);
      refine_scores<T, Policy::head_dim / 16>(
          scores, p, sequence, places, anchor, RowsOperand<typename Policy::QueryTile>(query_tile, warp_row + 16 * t),
          ProductsOperand<typename Policy::KeyTile>(stage_of(first_key_tile, stage)), key, Policy::general);
      row_maxima(scores, maxima);
    }
    take_weights(scores, rows[t], maxima, p.exp2_scale, factors);
    if constexpr (Policy::general) {
      if (p.dropout_seed) {
        const ScoreRow places[2] = {score_row(p, task, tile_row(t, 0)), score_row(p, task, tile_row(t, 1))};
        drop_weights(scores, p, sequence, places, key);
      }
    }
    if (!__any_sync(whole_warp, factors[0] != 1.0f || factors[1] != 1.0f)) return;
#pragma unroll
    for (int n = 0; n < columns; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) output[t][n][e] *= factors[e / 2];
  }

  // ---- one block of keys ----

  __device__ __forceinline__ void take_keys(int key, int stage, bool edge, bool kept_alone) {
    ScoreFragment<keys> scores[m_tiles];
    multiply_keys(scores, query_tile, stage_of(first_key_tile, stage), warp_row);
    finish_scores(scores, key, edge);
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) update_softmax(scores[t], t, key, stage);
    if (kept_alone)
      add_kept_values<T>(output, scores, stage_of(first_value_tile, stage));
    else
      add_values<T>(output, scores, stage_of(first_value_tile, stage));
  }

  // ---- all of them ----

  __device__ __forceinline__ void walk_keys(bool kept_alone) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      rows[t] = SoftmaxRows();
#pragma unroll
      for (int n = 0; n < columns; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) output[t][n][e] = 0;
    }
    const KeyRange walked = task.seen_by_some(p, 0, Policy::queries);
    const KeyRange some = task.seen_by_some(p, warp_row, Policy::warp_rows);
    const KeyRange all = task.seen_by_all(p, warp_row, Policy::warp_rows);
    int stage = 0;
    const int first = walked.begin / keys * keys;
    if (first < walked.end) load_keys(first, stage);
    ptx::cp_async_commit();
    for (int key = first; key < walked.end; key += keys) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage is there for all, and nobody reads the other one any more
      if (key + keys < walked.end) load_keys(key + keys, stage ^ 1);
      ptx::cp_async_commit();
      if (key < some.end && key + keys > some.begin)
        take_keys(key, stage, key < all.begin || key + keys > all.end, kept_alone);
      stage ^= 1;
    }
    if (first < walked.end) return;
    ptx::cp_async_wait<0>();  // no key at all: the queries' place is still to be filled
    __syncthreads();
  }

  __device__ __forceinline__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (int t = 0; t < m_tiles; ++t)
#pragma unroll
      for (int n = 0; n < columns; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) finite &= fabsf(output[t][n][e]) < attention_infinity;
    return finite;
  }

  // ---- finish ----

  // Divides by the sums, rounds once, and writes the warp's rows. In shared memory the outputs take the place of the
  // queries, so that they leave in whole vectors.
  __device__ __forceinline__ void write_rows() {
    __syncwarp();  // no lane reads the warp's queries any more
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile_row(t, half), query = task.query(row), head = task.head(row);
        const RowEnd end =
            end_of_row(p, head, rows[t].maximum[half], rows[t].anchor[half], sum_of_row(rows[t].sum[half]));
        if (row < task.num_rows && fragment_column() == 0)
          row_of<float>(p.lse, sequence.batch, head, sequence.query_row)[query * p.lse.row] = end.lse;
        const float share = end.factor / end.divisor;
#pragma unroll
        for (int n = 0; n < columns; ++n) {
          const float* x = output[t][n] + 2 * half;
          const float low = end.factor == 0 ? 0.0f : x[0] * share, high = end.factor == 0 ? 0.0f : x[1] * share;
          *reinterpret_cast<uint32_t*>(query_tile.at(row, n) + fragment_column()) = pair_of<T>(low, high);
        }
      }
    }
    __syncwarp();
    constexpr int chunks = Policy::QueryTile::chunks;
#pragma unroll 1
    for (int place = lane_of_warp(); place < Policy::warp_rows * chunks; place += warp_size) {
      const int row = warp_row + place / chunks, chunk = place % chunks;
      if (row >= task.num_rows || chunk * width<T> >= p.value_head_dim) continue;
      T* to = row_of<T>(p.output, sequence.batch, task.head(row), sequence.query_row) + task.query(row) * p.output.row;
      const uint4 v = *reinterpret_cast<const uint4*>(query_tile.at(row, chunk));
      store_vector(to, chunk * width<T>, p.value_head_dim, p.whole_output, Packed{{v.x, v.y, v.z, v.w}});
    }
  }
};

template <class Policy>
__global__ void __launch_bounds__(Policy::threads)
    attention_forward_kernel(const __grid_constant__ AttentionParams p) {
  if constexpr (Policy::is_built) {
    const AttentionTask task(p, Policy::queries, blockIdx.x);
    if (task.num_rows <= 0) return;
    ForwardBlock<Policy> block(p, task, reinterpret_cast<typename Policy::T*>(dynamic_shared()));
    block.load_queries();  // the first group of copies, with the first keys
    for (bool kept_alone = false;; kept_alone = true) {
      block.walk_keys(kept_alone);
      if (kept_alone || !p.excludes) break;
      if (!__syncthreads_or(!block.is_finite())) break;
    }
    block.write_rows();
  }
}

}  // namespace

}  // namespace transfuse::cuda
