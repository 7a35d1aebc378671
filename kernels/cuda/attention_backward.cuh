// Attention backward on tensor cores, by owners: nobody adds to what another block writes, and every sum has one order.
//
//   P = exp(score) / sum      D = 1 / (1 - p) where dropout keeps, else 0      delta = sum of P * dP, less dlse
//   dV = (P * D)^T dO         dP = D * (dO V^T)         dS = P * (dP - delta)
//   dR = dS * cap_slope       dQ = scale * dR K         dK = scale * dR^T Q
//   dbias = dS                dslope = -sum of dS * distance                   dsink = -sum of P_sink * delta
//
// A block of the first kernel owns a tile of queries, walks the keys that they see, and writes dQ; one of the second
// owns a tile of keys, walks the queries that see them, heads of a group in order, and writes dK and dV, and the
// gradient of a bias as large as the scores. Scores and dP are so computed twice, seven products instead of five: the
// price of sums without atomics and without a workspace that grows with Lq x Lk. A bias that is broadcast over batch or
// heads has owners of its own (attention_backward_bias.cuh); for one broadcast over rows or columns the two kernels
// leave sums of columns and rows, and for slopes and sinks sums of rows (attention_extra_grads.cu).
//
// Numerics: lse and the output that the forward saved were rounded, and dS is a difference that cancels: over a row it
// sums to dlse less the sink's share. sum(dO * O) from a 16-bit output misses delta by 2^-9 of its terms, all of a row
// to the same side, so that sums of dS (bias, slopes, sinks) were off by up to 6 % of their largest term; and exp(score
// - lse) is off by the rounding of lse, 5e-4 at logits of 1e4. The first kernel therefore takes both as references
// only: it sums weights and dS as they come, and leaves each row's normaliser, one over the sum of its weights, and
// delta plus what its dS summed to, for everyone after it. What dQ misses by the reference delta is one rounding of O,
// as in every other kernel of this kind; float32 corrects it too (attention_simt_backward.cu). Where the sum of weights
// is not what lse says (one part of a row's keys, as in ring attention), lse is the normaliser and sum(dO * O) delta.
//
// Policy: as in the forward. Pairs that are excluded have P = dS = 0 by select; a block whose sums are not finite walks
// once more over kept pairs alone. Saturated rows take their products in two floats. P and dS are rounded to the
// storage type for the products they enter, and nowhere else.
#pragma once

#include "cuda/attention_backward_pairs.cuh"
#include "cuda/attention_values.cuh"
#include "cuda/launch.cuh"

namespace transfuse::cuda {

// Tiles by head dimension. A warp of the second kernel holds the accumulators of dK and dV for 16 keys; where these do
// not fit the registers, blocks share the columns of both, and each takes the scores for itself.
template <class Type, int HeadDim, bool General>
struct AttentionGradPolicy {
  using T = Type;
  static constexpr bool general = General;
  static constexpr int head_dim = HeadDim, stages = 2;
  static constexpr int warps = 4, threads = warps * warp_size, warp_rows = 16;
  static constexpr int owned = warps * warp_rows;               // queries, or keys, of a block
  static constexpr int walked = General ? (HeadDim <= 96 ? 32 : 16)  // keys, or queries, of one step
                                        : HeadDim <= 64 ? 64 : HeadDim <= 128 ? 32 : 16;
  static constexpr int column_shares = HeadDim <= 128 ? 1 : 2;  // of dK and dV
  static constexpr int columns = HeadDim / column_shares;
  // Whether owned rows stay in registers, where they are the first operand of each step's products.
  static constexpr bool holds_queries = HeadDim <= 128, holds_keys = HeadDim <= 96;
  using OwnedTile = SharedTile<T, owned, HeadDim>;
  using WalkedTile = SharedTile<T, walked, HeadDim>;
  static constexpr int statistics_bytes = stages * 3 * walked * static_cast<int>(sizeof(float));
  // The sums of a thread's two rows lie in shared memory where registers end.
  static constexpr bool sums_in_registers = HeadDim <= 192;
  static constexpr int sums_bytes = sums_in_registers ? 0 : 4 * threads * static_cast<int>(sizeof(float));
  static constexpr int shared_bytes =
      2 * OwnedTile::bytes + 2 * stages * WalkedTile::bytes + statistics_bytes + sums_bytes;
  static_assert(shared_bytes <= 99 * 1024, "the tiles fit a block's shared memory everywhere");
};

namespace {

// What a block of threads finds once and reads seldom, as in the forward.
template <class Policy>
struct GradShared {
  AttentionTask task;
  KeyRange seen;                                     // what some owned row has pairs with
  KeyRange some[Policy::warps], all[Policy::warps];  // what some, or all, of a warp's rows have pairs with
  int streamed_end;                                  // what lies in front of it comes in whole tiles of whole vectors
};

template <class Policy>
struct GradBlock {
  using T = typename Policy::T;
  using Stream = TileStream<Policy::threads, typename Policy::WalkedTile>;
  using Held = HeldRows<typename Policy::OwnedTile>;
  static constexpr int walked = Policy::walked;
  const AttentionGradParams& g;
  const AttentionParams& p;
  const GradShared<Policy>& shared;
  const AttentionTask& task;
  const AttentionSequence& sequence;
  const typename Policy::OwnedTile first_owned, second_owned;      // queries and dO, or keys and values
  const typename Policy::WalkedTile first_walked, second_walked;   // of the ring's first stage: the others
  float* statistics;                                               // [stages][3][walked]: RowStatistics
  const int warp_row;

  __device__ __forceinline__ GradBlock(const AttentionGradParams& params, const GradShared<Policy>& its, T* tiles)
      : g(params),
        p(params.problem),
        shared(its),
        task(its.task),
        sequence(its.task.sequence),
        first_owned{tiles},
        second_owned{tiles + Policy::owned * Policy::head_dim},
        first_walked{tiles + 2 * Policy::owned * Policy::head_dim},
        second_walked{first_walked.data + Policy::stages * walked * Policy::head_dim},
        statistics(reinterpret_cast<float*>(second_walked.data + Policy::stages * walked * Policy::head_dim)),
        warp_row(static_cast<int>(threadIdx.x) / warp_size * Policy::warp_rows) {}

  __device__ __forceinline__ typename Policy::WalkedTile stage_of(const typename Policy::WalkedTile& first,
                                                                  int stage) const {
    return {first.data + stage * walked * Policy::head_dim};
  }
  // Whether the warp has pairs with what is walked from `at` on, and whether with all of it.
  __device__ __forceinline__ bool takes_part(int at) const {
    const KeyRange some = shared.some[threadIdx.x / warp_size];
    return at < some.end && at + walked > some.begin;
  }
  __device__ __forceinline__ bool is_edge(int at) const {
    const KeyRange all = shared.all[threadIdx.x / warp_size];
    return at < all.begin || at + walked > all.end;
  }
  __device__ __forceinline__ int row_of_thread(int half) const { return warp_row + fragment_row() + 8 * half; }

  template <class Tile>
  __device__ __forceinline__ void load(const Tile& tile, const AttentionTensor& t, int head, int64_t row, int rows,
                                       int columns, bool whole) const {
    load_tile<Policy::threads>(
        tile, row_of<T>(t, sequence.batch, head, row), [&](int r) { return r * t.row; }, t.col, rows, columns, whole);
  }
  template <class Tensor>
  __device__ __forceinline__ float statistic(const Tensor& t, int head, int query) const {
    return query < sequence.seqlen_q ? row_of<float>(t, sequence.batch, head, sequence.query_row + query)[0] : 0.0f;
  }

  // Products of the warp's rows of an owned tile with a walked one, from registers where the policy has them there.
  template <bool in_registers, class Tile>
  __device__ __forceinline__ void multiply_owned(ScoreFragment<walked> (&products)[1], const Tile& owned,
                                                 const Held& held, const typename Policy::WalkedTile& other) const {
    if constexpr (in_registers)
      multiply_keys(products, held, other);
    else
      multiply_keys(products, owned, other, warp_row);
  }
  template <bool in_registers>
  __device__ __forceinline__ void hold(Held& first, Held& second) const {
    if constexpr (in_registers) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // the owned tiles are there for all
      first.load(first_owned, warp_row);
      second.load(second_owned, warp_row);
    }
  }

  template <int shares>
  __device__ __forceinline__ static void clear(float (&sums)[1][shares][4]) {
#pragma unroll
    for (int n = 0; n < shares; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[0][n][e] = 0;
  }
  template <int shares>
  __device__ __forceinline__ static bool is_finite(const float (&sums)[1][shares][4]) {
    bool finite = true;
#pragma unroll
    for (int n = 0; n < shares; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) finite &= fabsf(sums[0][n][e]) < attention_infinity;
    return finite;
  }
  // The warp's rows of a gradient, rounded once, each lane its own pairs of columns.
  template <int shares>
  __device__ __forceinline__ void write(const float (&sums)[1][shares][4], const AttentionOutput& to, int head,
                                        int64_t first_row, int rows, int first_column, int columns,
                                        const float (&factors)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of_thread(half);
      if (row >= rows) continue;
      T* line = row_of<T>(to, sequence.batch, head, first_row + row);
#pragma unroll
      for (int n = 0; n < shares; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = first_column + 8 * n + fragment_column() + i;
          if (column < columns) line[column] = from_float<T>(sums[0][n][2 * half + i] * factors[half]);
        }
    }
  }
};

// ---- dQ: a tile of queries walks its keys ----

enum class GradWalk { maxima, all, kept_alone };

template <class Policy>
struct QueryGradBlock : GradBlock<Policy> {
  using Base = GradBlock<Policy>;
  using T = typename Policy::T;
  static constexpr int keys = Policy::walked;
  float grad_query[1][Policy::head_dim / 8][4];
  // Of the thread's two rows; sums are the thread's own parts.
  RowStatistics rows[2];
  // Of RowSums. In two floats, as thousands of equal terms are rounded to the same side; in shared memory in one.
  Pair weights[2], grads[2];
  float slope[2], distances[2];  // slope: in a walk for maxima the largest score
  using Base::Base, Base::g, Base::p, Base::shared, Base::task, Base::sequence, Base::stage_of;

  __device__ __forceinline__ int query_of(int half) const { return task.query(this->row_of_thread(half)); }
  __device__ __forceinline__ float lse_of(int half) const {
    return this->statistic(g.lse, task.first_head, query_of(half));
  }

  __device__ __forceinline__ void load_queries() {
    const int head = task.first_head, query = task.first_row, count = task.num_rows;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rows[half] = {reference_of(lse_of(half), p.logit_scale), 1.0f,
                    this->statistic(g.delta, head, query_of(half))};
    this->load(this->first_owned, p.query, head, sequence.query_row + query, count, p.head_dim, p.whole_query);
    this->load(this->second_owned, g.grad_output, head, sequence.query_row + query, count, p.value_head_dim,
               g.whole_grad_output);
  }
  __device__ __forceinline__ void load_keys(typename Base::Stream& key_stream, typename Base::Stream& value_stream,
                                            int key, int stage) const {
    if (key + keys <= shared.streamed_end) {
      key_stream.load(stage_of(this->first_walked, stage), p.key.row);
      value_stream.load(stage_of(this->second_walked, stage), p.value.row);
      return;
    }
    const int left = sequence.seqlen_k - key;
    this->load(stage_of(this->first_walked, stage), p.key, task.kv_head, sequence.key_row + key, left, p.head_dim,
               p.whole_key);
    this->load(stage_of(this->second_walked, stage), p.value, task.kv_head, sequence.key_row + key, left,
               p.value_head_dim, p.whole_value);
  }
  __device__ __forceinline__ float& shared_sum(int number) const {
    return this->statistics[Policy::statistics_bytes / sizeof(float) + number * Policy::threads + threadIdx.x];
  }
  __device__ __forceinline__ static void add_to(Pair& sum, float x) {
    const Pair higher = two_sum(sum.hi, x);
    sum = {higher.hi, sum.lo + higher.lo};
  }
  __device__ __forceinline__ void add_sums(int half, float weight_sum, float grad_sum) {
    if constexpr (Policy::sums_in_registers) {
      add_to(weights[half], weight_sum);
      add_to(grads[half], grad_sum);
    } else {
      shared_sum(half) += weight_sum;
      shared_sum(2 + half) += grad_sum;
    }
  }
  __device__ __forceinline__ bool huge(int half) const { return is_huge(rows[half].reference * p.logit_scale); }

  // Rows whose pairs ask for more than take_keys makes of them: saturated ones, and those without a reference.
  __device__ __forceinline__ bool asks_for_more() const {
    bool more = false;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      more |= is_saturated(rows[half].reference, p.logit_scale) || rows[half].reference == -attention_infinity;
    return more;
  }

  // What pair_grad makes of pairs without bias, mask, softcap, dropout or rests, to the bit; a pair that takes no part
  // has a score of -inf. What is not finite there shows in the sums.
  __device__ __forceinline__ void take_keys(int key, int stage, const typename Base::Held& held_queries,
                                            const typename Base::Held& held_grads) {
    constexpr bool held = Policy::holds_queries;
    ScoreFragment<keys> scores[1], products[1];
    this->template multiply_owned<held>(scores, this->first_owned, held_queries, stage_of(this->first_walked, stage));
    if (this->is_edge(key)) {
      const ScoreRow places[2] = {score_row(p, task, this->row_of_thread(0)),
                                  score_row(p, task, this->row_of_thread(1))};
      exclude_unseen(scores[0], places, key);
    }
    this->template multiply_owned<held>(products, this->second_owned, held_grads, stage_of(this->second_walked, stage));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float weight_sum = 0, grad_sum = 0;
#pragma unroll
      for (int n = 0; n < keys / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          const float weight = weight_of<T>(p, scores[0].x[n][e] - rows[half].reference);
          const float grad_score = weight * (products[0].x[n][e] - rows[half].delta);
          products[0].x[n][e] = grad_score;
          weight_sum += weight;
          grad_sum += grad_score;
        }
      add_sums(half, weight_sum, grad_sum);
    }
    add_values<T>(grad_query, products, stage_of(this->first_walked, stage));
  }

  __device__ __forceinline__ void take_keys_exactly(int key, int stage, GradWalk walk) {
    ScoreFragment<keys> scores[1], products[1];
    ProductRests<keys> rests;
    const bool saturated =
        is_saturated(rows[0].reference, p.logit_scale) || is_saturated(rows[1].reference, p.logit_scale);
    const bool refine = p.softcap == 0 && __any_sync(whole_warp, saturated);
    careful_products<T>(scores, rests, this->first_owned, stage_of(this->first_walked, stage), this->warp_row, refine,
                        [&](int, int e) { return huge(e / 2); });
    multiply_keys(products, this->second_owned, stage_of(this->second_walked, stage), this->warp_row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const ScoreRow row = score_row(p, task, this->row_of_thread(half));
      float weight_sum = 0, grad_sum = 0;
#pragma unroll
      for (int n = 0; n < keys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int e = 2 * half + i, at = key + 8 * n + fragment_column() + i;
          const PairGrad of = pair_grad<T, Policy::general>(
              p, sequence, row.head, row.query, at, at >= row.seen.begin && at < row.seen.end, scores[0].x[n][e],
              rests.at(n, e), products[0].x[n][e], rows[half]);
          products[0].x[n][e] = of.grad_product;
          if (!of.kept) products[0].excluded |= 1u << (4 * n + e);
          weight_sum += of.weight;
          grad_sum += of.grad_score;
          if (walk == GradWalk::maxima) {
            if (of.kept) slope[half] = fmaxf(slope[half], of.score);
          } else if (Policy::general && g.slope_parts) {
            const float away = distance(p, sequence, row.query, at);
            slope[half] = fmaf(of.grad_score, -away, slope[half]);
            distances[half] = fmaf(of.weight, away, distances[half]);
          }
        }
      add_sums(half, weight_sum, grad_sum);
    }
    if (walk == GradWalk::maxima) return;
    if (walk == GradWalk::kept_alone)
      add_kept_values<T>(grad_query, products, stage_of(this->first_walked, stage));
    else
      add_values<T>(grad_query, products, stage_of(this->first_walked, stage));
  }

  template <bool exact>
  __device__ __forceinline__ void walk_keys(GradWalk walk) {
    this->clear(grad_query);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (Policy::sums_in_registers)
        weights[half] = grads[half] = {0, 0};
      else
        shared_sum(half) = shared_sum(2 + half) = 0;
      slope[half] = walk == GradWalk::maxima ? -attention_infinity : 0.0f;
      distances[half] = 0;
    }
    const KeyRange seen = shared.seen;
    const int first = seen.begin / keys * keys;
    const int64_t first_row = sequence.key_row + first;
    typename Base::Stream key_stream(row_of<T>(p.key, sequence.batch, task.kv_head, first_row), p.key.row);
    typename Base::Stream value_stream(row_of<T>(p.value, sequence.batch, task.kv_head, first_row), p.value.row);
    int stage = 0;
    if (first < seen.end) load_keys(key_stream, value_stream, first, stage);
    ptx::cp_async_commit();
    typename Base::Held held_queries, held_grads;
    this->template hold<!exact && Policy::holds_queries>(held_queries, held_grads);
#pragma unroll 1
    for (int key = first; key < seen.end; key += keys) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage is there for all, and nobody reads the other one any more
      if (key + keys < seen.end) load_keys(key_stream, value_stream, key + keys, stage ^ 1);
      ptx::cp_async_commit();
      if constexpr (exact)
        take_keys_exactly(key, stage, walk);
      else if (this->takes_part(key))
        take_keys(key, stage, held_queries, held_grads);
      stage ^= 1;
    }
    ptx::cp_async_wait<0>();
  }

  __device__ __forceinline__ bool has_huge_rows() const { return is_huge(lse_of(0)) || is_huge(lse_of(1)); }
  // After a walk for maxima.
  __device__ __forceinline__ void take_maxima() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = largest_of_row(slope[half]);
      if (is_huge(lse_of(half))) rows[half].reference = most == -attention_infinity ? 0.0f : most;
    }
  }

  __device__ __forceinline__ void write_rows() const {
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = task.first_head;
      const float weight_sum = Policy::sums_in_registers ? to_float(weights[half]) : shared_sum(half);
      const float grad_sum = Policy::sums_in_registers ? to_float(grads[half]) : shared_sum(2 + half);
      const RowSums sums = {sum_of_row(weight_sum), sum_of_row(grad_sum), sum_of_row(slope[half]),
                            sum_of_row(distances[half])};
      const float grad_lse = g.grad_lse.data ? this->statistic(g.grad_lse, head, query_of(half)) : 0.0f;
      const RowGrad of = grad_of_row(p, head, lse_of(half), grad_lse, rows[half], sums);
      factors[half] = of.normaliser * p.scale;
      if (this->row_of_thread(half) < task.num_rows && fragment_column() == 0)
        write_row(g, sequence, head, query_of(half), rows[half].reference, of);
    }
    this->write(grad_query, g.grad_query, task.first_head, sequence.query_row + task.first_row, task.num_rows, 0,
                p.head_dim, factors);
  }
};

template <class Policy>
__global__ void __launch_bounds__(Policy::threads, 1)
    attention_grad_query_kernel(const __grid_constant__ AttentionGradParams g) {
  const AttentionParams& p = g.problem;
  __shared__ GradShared<Policy> shared;
  if (threadIdx.x < Policy::warps) {
    const AttentionTask task(p, Policy::owned, blockIdx.x);
    const int first_row = static_cast<int>(threadIdx.x) * Policy::warp_rows;
    if (threadIdx.x == 0) {
      shared.task = task;
      shared.seen = task.seen_by_some(p, 0, Policy::owned);
      const bool whole = p.whole_key && p.whole_value && p.head_dim == Policy::head_dim &&
          p.value_head_dim == Policy::head_dim;
      shared.streamed_end = whole ? task.sequence.seqlen_k : 0;
    }
    shared.some[threadIdx.x] = task.seen_by_some(p, first_row, Policy::warp_rows);
    shared.all[threadIdx.x] = task.seen_by_all(p, first_row, Policy::warp_rows);
  }
  __syncthreads();
  if (shared.task.num_rows <= 0) return;
  QueryGradBlock<Policy> block(g, shared, reinterpret_cast<typename Policy::T*>(dynamic_shared()));
  block.load_queries();
  if constexpr (!Policy::general) {
    if (!__syncthreads_or(block.asks_for_more())) {
      block.template walk_keys<false>(GradWalk::all);
      if (!p.excludes || !__syncthreads_or(!block.is_finite(block.grad_query))) {
        block.write_rows();
        return;
      }
    }
  }
  GradWalk walk = __syncthreads_or(block.has_huge_rows()) ? GradWalk::maxima : GradWalk::all;
  for (;;) {
    block.template walk_keys<true>(walk);
    if (walk == GradWalk::maxima) {
      __syncthreads();  // nobody reads the last stage any more
      block.take_maxima();
      walk = GradWalk::all;
      continue;
    }
    if (walk == GradWalk::kept_alone || !p.excludes) break;
    if (!__syncthreads_or(!block.is_finite(block.grad_query))) break;
    walk = GradWalk::kept_alone;
  }
  block.write_rows();
}

// ---- the reference delta, sum(dO * O) less dlse: a warp to a row ----

constexpr int delta_rows = 8;

template <class T>
__global__ void __launch_bounds__(delta_rows* warp_size)
    attention_delta_kernel(const __grid_constant__ AttentionGradParams g) {
  const AttentionParams& p = g.problem;
  const int tiles = (p.max_seqlen_q + delta_rows - 1) / delta_rows;
  int64_t block = blockIdx.x;
  const int query = static_cast<int>(block % tiles) * delta_rows + static_cast<int>(threadIdx.x) / warp_size;
  block /= tiles;
  const int head = static_cast<int>(block % p.num_heads);
  const AttentionSequence s = sequence_of(p, block / p.num_heads);
  if (query >= s.seqlen_q) return;  // whole warps
  const int64_t row = s.query_row + query;
  const T* grad = row_of<T>(g.grad_output, s.batch, head, row);
  const T* output = row_of<T>(g.output, s.batch, head, row);
  float sum = 0;
  for (int c = lane_of_warp(); c < p.value_head_dim; c += warp_size)
    sum = fmaf(to_float(grad[c * g.grad_output.col]), to_float(output[c * g.output.col]), sum);
  sum = reduce_lanes<warp_size>(sum, Add{});
  if (lane_of_warp() != 0) return;
  if (g.grad_lse.data) sum -= row_of<float>(g.grad_lse, s.batch, head, row)[0];
  row_of<float>(g.delta, s.batch, head, row)[0] = sum;
}

}  // namespace

}  // namespace transfuse::cuda
