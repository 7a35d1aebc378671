// The second kernel of attention's backward: dK and dV, and the gradient of a bias as large as the scores.
// Method and numerics: attention_backward.cuh.
#pragma once

#include "cuda/attention_backward.cuh"

namespace transfuse::cuda {

namespace {

// ---- dK and dV: a tile of keys walks the queries that see it ----

template <class Policy>
struct KeyGradBlock : GradBlock<Policy> {
  using Base = GradBlock<Policy>;
  using T = typename Policy::T;
  static constexpr int queries = Policy::walked;
  const int key, first_column;  // of the tile, and of the block's share of the columns
  float grad_key[1][Policy::columns / 8][4], grad_value[1][Policy::columns / 8][4];
  float key_sum[2];  // of one head's dS, the thread's own part
  bool asks_for_more;  // as in QueryGradBlock, found on the way
  using Base::g, Base::p, Base::shared, Base::task, Base::sequence, Base::stage_of;

  __device__ __forceinline__ KeyGradBlock(const AttentionGradParams& params, const GradShared<Policy>& its, T* tiles,
                                          int first_key, int share)
      : Base(params, its, tiles),
        key(first_key),
        first_column(share * Policy::columns) {}

  // Found wherever it is wanted: a register that held it would be spilled.
  __device__ __forceinline__ int rows() const { return min(Policy::owned, sequence.seqlen_k - key); }
  __device__ __forceinline__ void load_keys() const {
    this->load(this->first_owned, p.key, task.kv_head, sequence.key_row + key, rows(), p.head_dim, p.whole_key);
    this->load(this->second_owned, p.value, task.kv_head, sequence.key_row + key, rows(), p.value_head_dim,
               p.whole_value);
  }
  __device__ __forceinline__ float* statistics_of(int stage) const { return this->statistics + 3 * queries * stage; }
  // What is loaded step by step: the queries and dO of a head, and the thread's share of the statistics.
  struct Streams {
    static constexpr int shares = (3 * queries + Policy::threads - 1) / Policy::threads;
    typename Base::Stream query{nullptr, 0}, grad{nullptr, 0};
    const float* statistic[shares];
  };
  // Element i of statistics_of belongs to query i % queries and to this.
  __device__ __forceinline__ const AttentionOutput& statistic_of(int i) const {
    return i < queries ? g.reference : i < 2 * queries ? g.normaliser : g.delta;
  }
  __device__ __forceinline__ void load_queries(Streams& streams, int head, int query, int stage, bool is_first) const {
    const int64_t row = sequence.query_row + query;
    const int left = sequence.seqlen_q - query, thread = ptx::opaque(threadIdx.x);
    if (is_first) {  // of its head
      streams.query = typename Base::Stream(row_of<T>(p.query, sequence.batch, head, row), p.query.row);
      streams.grad = typename Base::Stream(row_of<T>(g.grad_output, sequence.batch, head, row), g.grad_output.row);
#pragma unroll
      for (int j = 0; j < Streams::shares; ++j) {
        const int i = j * Policy::threads + thread;
        streams.statistic[j] = row_of<float>(statistic_of(i), sequence.batch, head, row + i % queries);
      }
    }
    if (query + queries <= shared.streamed_end) {
      streams.query.load(stage_of(this->first_walked, stage), p.query.row);
      streams.grad.load(stage_of(this->second_walked, stage), g.grad_output.row);
    } else {
      this->load(stage_of(this->first_walked, stage), p.query, head, row, left, p.head_dim, p.whole_query);
      this->load(stage_of(this->second_walked, stage), g.grad_output, head, row, left, p.value_head_dim,
                 g.whole_grad_output);
    }
#pragma unroll
    for (int j = 0; j < Streams::shares; ++j) {
      const int i = j * Policy::threads + thread;
      if (i >= 3 * queries) break;
      ptx::cp_async<sizeof(float)>(statistics_of(stage) + i, streams.statistic[j],
                                   i % queries < left ? sizeof(float) : 0);
      streams.statistic[j] += queries * statistic_of(i).row;
    }
  }

  // As take_keys of QueryGradBlock. Of queries past the last one the statistics are 0, so what they add is.
  __device__ __forceinline__ void take_queries(int query, int stage, const typename Base::Held& held_keys,
                                               const typename Base::Held& held_values) {
    constexpr bool held = Policy::holds_keys;
    ScoreFragment<queries> scores[1], grads[1];
    const float* statistics = statistics_of(stage);
#pragma unroll
    for (int i = 0; i < queries; i += warp_size) {
      const float reference = statistics[(i + lane_of_warp()) % queries];
      asks_for_more |= is_saturated(reference, p.logit_scale) || reference == -attention_infinity;
    }
    this->template multiply_owned<held>(scores, this->first_owned, held_keys, stage_of(this->first_walked, stage));
    if (this->is_edge(query)) exclude_unseen(scores[0], {seeing(0), seeing(1)}, query);
    this->template multiply_owned<held>(grads, this->second_owned, held_values, stage_of(this->second_walked, stage));
#pragma unroll
    for (int n = 0; n < queries / 8; ++n) {
      const float* of = statistics + 8 * n + fragment_column();
      const float2 reference = *reinterpret_cast<const float2*>(of);
      const float2 normaliser = *reinterpret_cast<const float2*>(of + queries);
      const float2 delta = *reinterpret_cast<const float2*>(of + 2 * queries);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool low = e % 2 == 0;
        const float weight = weight_of<T>(p, scores[0].x[n][e] - (low ? reference.x : reference.y)) *
            (low ? normaliser.x : normaliser.y);
        grads[0].x[n][e] = weight * (grads[0].x[n][e] - (low ? delta.x : delta.y));
        scores[0].x[n][e] = weight;
      }
    }
    const int chunk = first_column / width<T>;
    add_values<T>(grad_value, scores, stage_of(this->second_walked, stage), chunk);
    add_values<T>(grad_key, grads, stage_of(this->first_walked, stage), chunk);
  }
  // The queries that see one of the thread's keys.
  __device__ __forceinline__ ScoreRow seeing(int half) const {
    const int of_row = key + this->row_of_thread(half);
    return {of_row < sequence.seqlen_k ? queries_of_keys(p, sequence, of_row, 1) : KeyRange{0, 0}, 0, 0};
  }

  // So few queries at a time that all of it finds registers.
  static constexpr int exact_queries = Policy::general ? queries : 16;
  using ExactTile = SharedTile<T, exact_queries, Policy::head_dim>;
  __device__ __forceinline__ void take_queries_exactly(int head, int first_query, int stage, bool kept_alone) {
#pragma unroll 1
    for (int down = 0; down < queries; down += exact_queries)
      take_some_exactly(head, first_query + down, ExactTile{stage_of(this->first_walked, stage).at(down, 0)},
                        ExactTile{stage_of(this->second_walked, stage).at(down, 0)}, statistics_of(stage) + down,
                        kept_alone);
  }
  __device__ __forceinline__ void take_some_exactly(int head, int query, const ExactTile& query_tile,
                                                    const ExactTile& grad_tile, const float* statistics,
                                                    bool kept_alone) {
    ScoreFragment<exact_queries> scores[1], weights[1], grads[1];
    ProductRests<exact_queries> rests;
    const bool saturated = is_saturated(statistics[lane_of_warp() % exact_queries], p.logit_scale);
    const bool refine = p.softcap == 0 && __any_sync(whole_warp, saturated);
    careful_products<T>(scores, rests, this->first_owned, query_tile, this->warp_row, refine,
                        [&](int n, int e) {
                          return is_huge(statistics[8 * n + fragment_column() + e % 2] * p.logit_scale);
                        });
    multiply_keys(grads, this->second_owned, grad_tile, this->warp_row);
    weights[0].excluded = 0;
    const ScoreRow seen_by[2] = {seeing(0), seeing(1)};
#pragma unroll
    for (int n = 0; n < exact_queries / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * n + fragment_column() + i, at = query + column;
        const RowStatistics row = {statistics[column], statistics[queries + column], statistics[2 * queries + column]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int e = 2 * half + i, of_row = key + this->row_of_thread(half);
          const bool inside = at >= seen_by[half].seen.begin && at < seen_by[half].seen.end;
          const PairGrad of = pair_grad<T, Policy::general>(p, sequence, head, at, of_row, inside, scores[0].x[n][e],
                                                            rests.at(n, e), grads[0].x[n][e], row);
          weights[0].x[n][e] = of.dropped_weight;
          grads[0].x[n][e] = of.grad_product;
          if constexpr (Policy::general) {
            key_sum[half] += of.grad_score;
            if (of.kept && first_column == 0 && g.whole_grad_bias)
              write_grad_bias<T>(g, sequence.batch, head, at, of_row, of.grad_score);
          }
          if (!of.kept) weights[0].excluded |= 1u << (4 * n + e);
        }
      }
    grads[0].excluded = weights[0].excluded;
    const int chunk = first_column / width<T>;
    if (kept_alone) {
      add_kept_values<T>(grad_value, weights, grad_tile, chunk);
      add_kept_values<T>(grad_key, grads, query_tile, chunk);
    } else {
      add_values<T>(grad_value, weights, grad_tile, chunk);
      add_values<T>(grad_key, grads, query_tile, chunk);
    }
  }

  template <bool exact>
  __device__ __forceinline__ void walk_queries(bool kept_alone) {
    this->clear(grad_key);
    this->clear(grad_value);
    key_sum[0] = key_sum[1] = 0;
    asks_for_more = false;
    const int group = p.num_heads / p.num_kv_heads;
    const int first_head = task.kv_head * group, last_head = first_head + group - 1;
    const int first = shared.seen.begin / queries * queries, end = shared.seen.end;
    if (first >= end) return;
    Streams streams;
    load_queries(streams, first_head, first, 0, true);
    ptx::cp_async_commit();
    typename Base::Held held_keys, held_values;
    this->template hold<!exact && Policy::holds_keys>(held_keys, held_values);
    int stage = 0;
#pragma unroll 1
    for (int head = first_head; head <= last_head; ++head) {
#pragma unroll 1
      for (int query = first; query < end; query += queries) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // this stage is there for all, and nobody reads the other one any more
        const bool is_last = query + queries >= end;
        if (!is_last || head < last_head)
          load_queries(streams, head + is_last, is_last ? first : query + queries, stage ^ 1, is_last);
        ptx::cp_async_commit();
        if constexpr (exact)
          take_queries_exactly(head, query, stage, kept_alone);
        else if (this->takes_part(query))
          take_queries(query, stage, held_keys, held_values);
        stage ^= 1;
      }
      if (Policy::general && g.key_sums) write_key_sums(head);
    }
    ptx::cp_async_wait<0>();
  }
  // Of a head that is done.
  __device__ __forceinline__ void write_key_sums(int head) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = this->row_of_thread(half);
      const float sum = sum_of_row(key_sum[half]);
      if (row < rows() && fragment_column() == 0 && first_column == 0)
        g.key_sums[(sequence.batch * p.num_heads + head) * p.max_seqlen_k + key + row] = sum;
      key_sum[half] = 0;
    }
  }
  __device__ __forceinline__ void write_rows() const {
    this->write(grad_key, g.grad_key, task.kv_head, sequence.key_row + key, rows(), first_column, p.head_dim,
                {p.scale, p.scale});
    this->write(grad_value, g.grad_value, task.kv_head, sequence.key_row + key, rows(), first_column, p.value_head_dim,
                {1.0f, 1.0f});
  }
};

template <class Policy>
__global__ void __launch_bounds__(Policy::threads, 1)
    attention_grad_key_kernel(const __grid_constant__ AttentionGradParams g) {
  const AttentionParams& p = g.problem;
  int64_t block_number = blockIdx.x;
  const int share = static_cast<int>(block_number % Policy::column_shares);
  block_number /= Policy::column_shares;
  const int tiles = (p.max_seqlen_k + Policy::owned - 1) / Policy::owned;
  const int key = static_cast<int>(block_number % tiles) * Policy::owned;
  block_number /= tiles;
  __shared__ GradShared<Policy> shared;
  if (threadIdx.x < Policy::warps) {
    const AttentionTask task(AttentionTask::KeysAlone{}, p, static_cast<int>(block_number % p.num_kv_heads),
                             block_number / p.num_kv_heads);
    const AttentionSequence& s = task.sequence;
    const int first_key = key + static_cast<int>(threadIdx.x) * Policy::warp_rows;
    if (threadIdx.x == 0) {
      shared.task = task;
      shared.seen = queries_of_keys(p, s, key, min(Policy::owned, s.seqlen_k - key));
      const bool whole = p.whole_query && g.whole_grad_output && p.head_dim == Policy::head_dim &&
          p.value_head_dim == Policy::head_dim;
      shared.streamed_end = whole ? s.seqlen_q : 0;
    }
    shared.some[threadIdx.x] = queries_of_keys(p, s, first_key, Policy::warp_rows);
    shared.all[threadIdx.x] = queries_that_see(p, s, first_key, Policy::warp_rows);
  }
  __syncthreads();
  if (key >= shared.task.sequence.seqlen_k) return;
  KeyGradBlock<Policy> block(g, shared, reinterpret_cast<typename Policy::T*>(dynamic_shared()), key, share);
  block.load_keys();
  const auto is_finite = [&] { return block.is_finite(block.grad_key) && block.is_finite(block.grad_value); };
  bool exact = Policy::general, kept_alone = false;
  if constexpr (!Policy::general) {
    block.template walk_queries<false>(false);
    exact = __syncthreads_or(block.asks_for_more);
    kept_alone = p.excludes && __syncthreads_or(!is_finite());
  }
  while (exact || kept_alone) {
    block.template walk_queries<true>(kept_alone);
    if (kept_alone || !p.excludes) break;
    exact = false;
    kept_alone = __syncthreads_or(!is_finite());
  }
  block.write_rows();
}

}  // namespace

}  // namespace transfuse::cuda
