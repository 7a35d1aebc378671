// The gradient of a bias that has rows and columns of its own and is broadcast over batch or heads:
//
//   dbias[q, k] = sum of dS[b, h, q, k] over the sequences b and heads h that it was broadcast to
//
// A block owns a tile of the gradient, takes the scores and dP of each sequence and head in order once more, and keeps
// the sum in its registers: two products more instead of dS of the whole problem in memory.
//
// Policy: attention_backward.cuh. One stage: with four tiles of each head the second one would take the memory of the
// blocks that run beside.
#pragma once

#include "cuda/attention_backward_keys.cuh"

namespace transfuse::cuda {

template <class Type, int HeadDim>
struct AttentionGradBiasPolicy {
  using T = Type;
  static constexpr int warps = 4, threads = warps * warp_size, warp_rows = 16;
  static constexpr int head_dim = HeadDim;
  static constexpr int queries = warps * warp_rows, keys = 32;  // of a tile; 64 keys spill (nvcc 13.0)
  using QueryTile = SharedTile<T, queries, HeadDim>;
  using KeyTile = SharedTile<T, keys, HeadDim>;
  static constexpr int shared_bytes = 2 * QueryTile::bytes + 2 * KeyTile::bytes;
  static_assert(shared_bytes <= 99 * 1024, "the tiles fit a block's shared memory everywhere");
};

namespace {

// Sequences and heads [begin, end) whose dS one plane of the gradient sums.
struct BiasPlane {
  int64_t batch, batch_end;
  int head, head_end;

  __device__ __forceinline__ BiasPlane(const AttentionGradParams& g, int64_t number) {
    const int own_head = static_cast<int>(number % g.grad_bias_heads);
    const int64_t own_batch = number / g.grad_bias_heads;
    const bool all_heads = g.grad_bias_heads != g.problem.num_heads;
    const bool all_batches = g.grad_bias_batch != g.problem.num_sequences;
    batch = all_batches ? 0 : own_batch;
    batch_end = all_batches ? g.problem.num_sequences : own_batch + 1;
    head = all_heads ? 0 : own_head;
    head_end = all_heads ? g.problem.num_heads : own_head + 1;
  }
};

template <class Policy>
struct BiasGradBlock {
  using T = typename Policy::T;
  static constexpr int keys = Policy::keys;
  const AttentionGradParams& g;
  const AttentionParams& p;
  const typename Policy::QueryTile query_tile, grad_tile;
  const typename Policy::KeyTile key_tile, value_tile;
  const int query, key, warp_row;  // of the tile's first pair; the warp's first row
  float sums[keys / 8][4];

  __device__ __forceinline__ BiasGradBlock(const AttentionGradParams& params, int first_query, int first_key, T* shared)
      : g(params),
        p(params.problem),
        query_tile{shared},
        grad_tile{query_tile.data + Policy::queries * Policy::head_dim},
        key_tile{grad_tile.data + Policy::queries * Policy::head_dim},
        value_tile{key_tile.data + keys * Policy::head_dim},
        query(first_query),
        key(first_key),
        warp_row(static_cast<int>(threadIdx.x) / warp_size * Policy::warp_rows) {
#pragma unroll
    for (int n = 0; n < keys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[n][e] = 0;
  }
  __device__ __forceinline__ int query_of(int half) const { return query + warp_row + fragment_row() + 8 * half; }

  template <class Tile>
  __device__ __forceinline__ void load(const Tile& tile, const AttentionTensor& t, const AttentionSequence& s, int head,
                                       int64_t row, int rows, int columns, bool whole) const {
    load_tile<Policy::threads>(
        tile, row_of<T>(t, s.batch, head, row), [&](int r) { return r * t.row; }, t.col, rows, columns, whole);
  }

  // Whether some pair of the tile may take part.
  __device__ __forceinline__ bool is_seen(const AttentionSequence& s) const {
    if (query >= s.seqlen_q) return false;
    const int last = min(query + Policy::queries, s.seqlen_q) - 1;
    return keys_of_query(p, s, query).begin < key + keys && keys_of_query(p, s, last).end > key;
  }

  __device__ __forceinline__ void add(const AttentionSequence& s, int head) {
    const int kv_head = head / (p.num_heads / p.num_kv_heads);
    const int queries_left = s.seqlen_q - query, keys_left = s.seqlen_k - key;
    __syncthreads();  // nobody reads the tiles of the head before any more
    load(query_tile, p.query, s, head, s.query_row + query, queries_left, p.head_dim, p.whole_query);
    load(grad_tile, g.grad_output, s, head, s.query_row + query, queries_left, p.value_head_dim, g.whole_grad_output);
    load(key_tile, p.key, s, kv_head, s.key_row + key, keys_left, p.head_dim, p.whole_key);
    load(value_tile, p.value, s, kv_head, s.key_row + key, keys_left, p.value_head_dim, p.whole_value);
    ptx::cp_async_commit();
    RowStatistics rows[2];
    bool saturated = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[half] = read_row(g, s, head, min(query_of(half), s.seqlen_q - 1));
      saturated |= is_saturated(rows[half].reference, p.logit_scale);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tiles are there for all
    const bool refine = p.softcap == 0 && __any_sync(whole_warp, saturated);
    ScoreFragment<keys> scores[1], products[1];
    ProductRests<keys> rests;
    careful_products<T>(scores, rests, query_tile, key_tile, warp_row, refine,
                        [&](int, int e) { return is_huge(rows[e / 2].reference * p.logit_scale); });
    multiply_keys(products, grad_tile, value_tile, warp_row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = min(query_of(half), s.seqlen_q - 1);
      const KeyRange seen = keys_of_query(p, s, at);
#pragma unroll
      for (int n = 0; n < keys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int e = 2 * half + i, of_key = key + 8 * n + fragment_column() + i;
          const bool inside = query_of(half) < s.seqlen_q && of_key >= seen.begin && of_key < seen.end;
          sums[n][e] += pair_grad<T, true>(p, s, head, at, of_key, inside, scores[0].x[n][e], rests.at(n, e),
                                           products[0].x[n][e], rows[half])
                            .grad_score;
        }
    }
  }

  __device__ __forceinline__ void write(int64_t batch, int head) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int of_query = query_of(e / 2);
#pragma unroll
      for (int n = 0; n < keys / 8; ++n) {
        const int of_key = key + 8 * n + fragment_column() + e % 2;
        if (of_query < p.max_seqlen_q && of_key < p.max_seqlen_k)
          write_grad_bias<T>(g, batch, head, of_query, of_key, sums[n][e]);
      }
    }
  }
};

template <class Policy>
__global__ void __launch_bounds__(Policy::threads)
    attention_grad_bias_kernel(const __grid_constant__ AttentionGradParams g) {
  const AttentionParams& p = g.problem;
  const int key_tiles = (p.max_seqlen_k + Policy::keys - 1) / Policy::keys;
  const int query_tiles = (p.max_seqlen_q + Policy::queries - 1) / Policy::queries;
  int64_t number = blockIdx.x;
  const int key = static_cast<int>(number % key_tiles) * Policy::keys;
  number /= key_tiles;
  const int query = static_cast<int>(number % query_tiles) * Policy::queries;
  const BiasPlane plane(g, number / query_tiles);
  BiasGradBlock<Policy> block(g, query, key, reinterpret_cast<typename Policy::T*>(dynamic_shared()));
  for (int64_t batch = plane.batch; batch < plane.batch_end; ++batch) {
    const AttentionSequence s = sequence_of(p, batch);
    if (!block.is_seen(s)) continue;
    for (int head = plane.head; head < plane.head_end; ++head) block.add(s, head);
  }
  block.write(plane.batch, plane.head);  // strides are 0 where the gradient has one plane for all
}

}  // namespace

}  // namespace transfuse::cuda
