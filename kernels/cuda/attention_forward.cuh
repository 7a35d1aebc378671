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

// What a block of threads finds once and reads seldom. It lies in shared memory: the registers are the products'.
template <class Policy>
struct ForwardShared {
  AttentionTask task;
  KeyRange walked;                                   // the keys that some row of the tile sees
  KeyRange some[Policy::warps], all[Policy::warps];  // that some, or all, of a warp's rows see
  int streamed_end;                                  // keys in front of it come in whole tiles of whole vectors
  ScoreRow rows[Policy::general ? Policy::queries : 1];  // of the general kernel, which asks in each block of keys
};

template <class Policy>
struct ForwardBlock {
  using T = typename Policy::T;
  static constexpr int keys = Policy::keys, m_tiles = Policy::m_tiles, columns = Policy::head_dim / 8;
  using KeyStream = TileStream<Policy::threads, typename Policy::KeyTile>;

  const AttentionParams& p;
  const ForwardShared<Policy>& shared;
  const AttentionTask& task;
  const AttentionSequence& sequence;
  const typename Policy::QueryTile query_tile;
  const typename Policy::KeyTile first_key_tile, first_value_tile;  // of the ring's first stage
  const int warp_row;                                               // the warp's first row in the tile
  float output[m_tiles][columns][4];
  SoftmaxRows rows[m_tiles];
  bool saturated;  // some row of the thread asks for an exact walk

  __device__ __forceinline__ ForwardBlock(const AttentionParams& params, const ForwardShared<Policy>& its,
                                          T* tiles)
      : p(params),
        shared(its),
        task(its.task),
        sequence(its.task.sequence),
        query_tile{tiles},
        first_key_tile{tiles + Policy::queries * Policy::head_dim},
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
  __device__ __forceinline__ const T* rows_from(const AttentionTensor& t, int key) const {
    return row_of<T>(t, sequence.batch, task.kv_head, sequence.key_row + key);
  }
  // Any block of keys, into any tile.
  __device__ __forceinline__ void load_rows(const AttentionTensor& t, int key, const typename Policy::KeyTile& tile,
                                            int columns_there, bool whole) const {
    load_tile<Policy::threads>(
        tile, rows_from(t, key), [&](int row) { return row * t.row; }, t.col, sequence.seqlen_k - key, columns_there,
        whole);
  }

  // ---- mask ----

  // The thread's two rows of a fragment.
  struct Places {
    ScoreRow row[2];
  };
  __device__ __forceinline__ Places places_of(int t) const {
    if constexpr (Policy::general)
      return {{shared.rows[tile_row(t, 0)], shared.rows[tile_row(t, 1)]}};
    else
      return {{score_row(p, task, tile_row(t, 0)), score_row(p, task, tile_row(t, 1))}};
  }

  // What is added to the scores of a block of keys, and which of them take part.
  __device__ __forceinline__ void finish_scores(ScoreFragment<keys>& scores, int t, int key, bool edge) const {
    if (!edge && !(Policy::general && (p.transforms || p.mask.data))) return;
    const Places places = places_of(t);
    if constexpr (Policy::general) {
      if (p.transforms) transform_scores<T>(scores, p, sequence, places.row, key);
      if (p.mask.data) exclude_masked(scores, p, sequence, places.row, key);
    }
    if (edge) exclude_unseen(scores, places.row, key);
  }

  // ---- online softmax ----

  template <bool exact>
  __device__ __forceinline__ void update_softmax(ScoreFragment<keys>& scores, int t, int key, int stage) {
    float maxima[2], factors[2];
    row_maxima(scores, maxima);
    const bool refine = (!Policy::general || p.softcap == 0) && wants_refining(rows[t], maxima, p.logit_scale);
    if constexpr (exact) {
      if (__any_sync(whole_warp, refine)) refine_rows(scores, t, maxima, key, stage);
    } else {
      saturated |= refine;
    }
    take_weights(scores, rows[t], maxima, p.exp2_scale, factors);
    if constexpr (Policy::general) {
      if (p.dropout_seed) drop_weights(scores, p, sequence, places_of(t).row, key);
    }
    if (!__any_sync(whole_warp, factors[0] != 1.0f || factors[1] != 1.0f)) return;
#pragma unroll
    for (int n = 0; n < columns; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) output[t][n][e] *= factors[e / 2];
  }

  __device__ __forceinline__ void refine_rows(ScoreFragment<keys>& scores, int t, float (&maxima)[2], int key,
                                              int stage) {
    const RowAnchor anchor = follow_maximum(rows[t], maxima, p.logit_scale);
    refine_scores<T, Policy::head_dim / 16>(
        scores, p, sequence, places_of(t).row, anchor,
        RowsOperand<typename Policy::QueryTile>(query_tile, warp_row + 16 * t),
        ProductsOperand<typename Policy::KeyTile>(stage_of(first_key_tile, stage)), key, Policy::general);
    row_maxima(scores, maxima);
  }

  // ---- one block of keys ----

  // Each fragment of keys and values meets all rows of the warp.
  __device__ __forceinline__ void take_keys(int key, int stage, bool edge) {
    ScoreFragment<keys> scores[m_tiles];
    multiply_keys(scores, query_tile, stage_of(first_key_tile, stage), warp_row);
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) finish_scores(scores[t], t, key, edge);
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) update_softmax<false>(scores[t], t, key, stage);
    add_values<T>(output, scores, stage_of(first_value_tile, stage));
  }
  // 16 rows at a time, so that what refining takes finds registers. Rows that need none of it have the same bits.
  __device__ __forceinline__ void take_keys_exactly(int key, int stage, bool edge, bool kept_alone) {
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      ScoreFragment<keys> scores[1];
      multiply_keys(scores, query_tile, stage_of(first_key_tile, stage), warp_row + 16 * t);
      finish_scores(scores[0], t, key, edge);
      update_softmax<true>(scores[0], t, key, stage);
      float(&sums)[1][columns][4] = reinterpret_cast<float(&)[1][columns][4]>(output[t]);
      if (kept_alone)
        add_kept_values<T>(sums, scores, stage_of(first_value_tile, stage));
      else
        add_values<T>(sums, scores, stage_of(first_value_tile, stage));
    }
  }

  // ---- all of them ----

  template <bool exact>
  __device__ __forceinline__ void walk_keys(bool kept_alone) {
    saturated = false;
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) {
      rows[t] = SoftmaxRows();
#pragma unroll
      for (int n = 0; n < columns; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) output[t][n][e] = 0;
    }
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    const KeyRange& walked = shared.walked;
    const int first = walked.begin / keys * keys;
    KeyStream key_stream(rows_from(p.key, first), p.key.row), value_stream(rows_from(p.value, first), p.value.row);
    const auto stage_at = [](unsigned key) { return static_cast<int>(key / keys % Policy::stages); };
    const auto load_keys = [&](int key) {
      const typename Policy::KeyTile key_tile = stage_of(first_key_tile, stage_at(key));
      const typename Policy::KeyTile value_tile = stage_of(first_value_tile, stage_at(key));
      if (key + keys <= shared.streamed_end) {
        key_stream.load(key_tile, p.key.row);
        value_stream.load(value_tile, p.value.row);
      } else {
        load_rows(p.key, key, key_tile, p.head_dim, p.whole_key);
        load_rows(p.value, key, value_tile, p.value_head_dim, p.whole_value);
      }
    };
    if (first < walked.end) load_keys(first);
    ptx::cp_async_commit();
#pragma unroll 1
    for (int key = first; key < walked.end; key += keys) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage is there for all, and nobody reads the other one any more
      if (key + keys < walked.end) load_keys(key + keys);
      ptx::cp_async_commit();
      const KeyRange some = shared.some[warp], all = shared.all[warp];
      if (key < some.end && key + keys > some.begin) {
        const bool edge = key < all.begin || key + keys > all.end;
        if constexpr (exact)
          take_keys_exactly(key, stage_at(key), edge, kept_alone);
        else
          take_keys(key, stage_at(key), edge);
      }
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
    __shared__ ForwardShared<Policy> shared;
    if (threadIdx.x < Policy::warps) {
      const AttentionTask task(p, Policy::queries, blockIdx.x);
      const int first_row = static_cast<int>(threadIdx.x) * Policy::warp_rows;
      if (threadIdx.x == 0) {
        shared.task = task;
        shared.walked = task.seen_by_some(p, 0, Policy::queries);
        const bool whole = p.whole_key && p.whole_value && p.head_dim == Policy::head_dim &&
            p.value_head_dim == Policy::head_dim;
        shared.streamed_end = whole ? task.sequence.seqlen_k : 0;
      }
      shared.some[threadIdx.x] = task.seen_by_some(p, first_row, Policy::warp_rows);
      shared.all[threadIdx.x] = task.seen_by_all(p, first_row, Policy::warp_rows);
    }
    __syncthreads();
    if (shared.task.num_rows <= 0) return;
    if constexpr (Policy::general) {
      for (int row = threadIdx.x; row < Policy::queries; row += Policy::threads)
        shared.rows[row] = score_row(p, shared.task, row);  // the first block of keys has a barrier before their use
    }
    ForwardBlock<Policy> block(p, shared, reinterpret_cast<typename Policy::T*>(dynamic_shared()));
    block.load_queries();  // the first group of copies, with the first keys
    block.template walk_keys<false>(false);
    const bool refine = __syncthreads_or(block.saturated);
    const bool kept_alone = p.excludes && __syncthreads_or(!block.is_finite());
    if (refine || kept_alone) block.template walk_keys<true>(kept_alone);
    block.write_rows();
  }
}

}  // namespace

}  // namespace transfuse::cuda
