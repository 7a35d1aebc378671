// Attention forward in float32: every product and sum is an IEEE operation, no tensor core.
//
// The walk of attention_forward.cuh, with sums in the registers of a grid of threads: eight neighbouring lanes share
// the rows, each with every eighth key and, for the output, four of every 32 columns. Scores are sums of 16 products at
// a time, weights go through shared memory to whoever needs them.
//
// Policy: keys and values have one place each; while scores are taken the values of the same block are on their way,
// and the next keys while values are added. An excluded weight is written as -0: it is told from a weight of 0 that
// takes part where values are not finite, and adds nothing anywhere.
#pragma once

#include "cuda/attention_dropout.cuh"
#include "cuda/attention_softmax.cuh"
#include "cuda/launch.cuh"

namespace transfuse::cuda {

template <int HeadDim>
struct SimtPolicy {
  static constexpr int head_dim = HeadDim;
  static constexpr int queries = HeadDim <= 128 ? 64 : 32, keys = HeadDim <= 128 ? 32 : 16;
  static constexpr int threads = 128, key_lanes = 8, row_groups = threads / key_lanes;
  static constexpr int rows = queries / row_groups, columns = keys / key_lanes;  // of one thread
  static constexpr int column_groups = HeadDim / (4 * key_lanes);
  using QueryTile = SharedTile<float, queries, HeadDim>;
  using KeyTile = SharedTile<float, keys, HeadDim>;
  static constexpr int weight_stride = keys + 1;
  static constexpr int shared_bytes =
      QueryTile::bytes + 2 * KeyTile::bytes + queries * weight_stride * static_cast<int>(sizeof(float));
  static_assert(shared_bytes <= 99 * 1024, "the tiles fit a block's shared memory everywhere");
};

namespace {

__device__ __forceinline__ void load_four(const float* from, float (&x)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// x / divisor rounded once, from the divisor's reciprocal.
__device__ __forceinline__ float quotient(float x, float divisor, float reciprocal) {
  const float rounded = x * reciprocal;
  const float rest = fmaf(-rounded, divisor, x);
  return rest != rest ? rounded : fmaf(rest, reciprocal, rounded);  // a rest of inf - inf says nothing
}

template <class Policy>
struct SimtBlock {
  static constexpr int keys = Policy::keys, my_rows = Policy::rows, my_keys = Policy::columns,
                       groups = Policy::column_groups;

  const AttentionParams& p;
  const AttentionTask& task;
  const AttentionSequence& sequence;
  const typename Policy::QueryTile query_tile;
  const typename Policy::KeyTile key_tile, value_tile;
  float* weights;                     // [queries][weight_stride]
  const int key_lane, row_group;      // keys key_lane + 8 j, rows row_group * my_rows + i
  float output[my_rows][groups][4];   // columns 32 g + 4 key_lane and on
  float maximum[my_rows], sum[my_rows], anchor[my_rows];

  __device__ __forceinline__ SimtBlock(const AttentionParams& params, const AttentionTask& its_task, float* shared)
      : p(params),
        task(its_task),
        sequence(its_task.sequence),
        query_tile{shared},
        key_tile{query_tile.data + Policy::queries * Policy::head_dim},
        value_tile{key_tile.data + keys * Policy::head_dim},
        weights(value_tile.data + keys * Policy::head_dim),
        key_lane(static_cast<int>(threadIdx.x) % Policy::key_lanes),
        row_group(static_cast<int>(threadIdx.x) / Policy::key_lanes) {}

  __device__ __forceinline__ int tile_row(int i) const { return row_group * my_rows + i; }
  __device__ __forceinline__ float& weight_at(int row, int key) const {
    return weights[row * Policy::weight_stride + key];
  }

  // ---- load ----

  __device__ __forceinline__ void load_queries() const {
    const float* first = row_of<float>(p.query, sequence.batch, task.first_head, sequence.query_row);
    load_tile<Policy::threads>(
        query_tile, first,
        [&](int row) { return task.query(row) * p.query.row + (task.head(row) - task.first_head) * p.query.head; },
        p.query.col, task.num_rows, p.head_dim, p.whole_query);
  }
  __device__ __forceinline__ void load_rows(const typename Policy::KeyTile& tile, const AttentionTensor& t, int key,
                                            int columns, bool whole) const {
    const float* first = row_of<float>(t, sequence.batch, task.kv_head, sequence.key_row + key);
    load_tile<Policy::threads>(
        tile, first, [&](int row) { return row * t.row; }, t.col, sequence.seqlen_k - key, columns, whole);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_keys(int key) const {
    load_rows(key_tile, p.key, key, p.head_dim, p.whole_key);
  }
  __device__ __forceinline__ void load_values(int key) const {
    load_rows(value_tile, p.value, key, p.value_head_dim, p.whole_value);
  }

  // ---- scores ----

  __device__ __forceinline__ void multiply_keys(float (&scores)[my_rows][my_keys]) const {
    constexpr int chain = 4;  // chunks of four products that are summed before they join the score
#pragma unroll
    for (int i = 0; i < my_rows; ++i)
#pragma unroll
      for (int j = 0; j < my_keys; ++j) scores[i][j] = 0;
#pragma unroll 1
    for (int begin = 0; begin < Policy::QueryTile::chunks; begin += chain) {
      float part[my_rows][my_keys] = {};
#pragma unroll
      for (int chunk = 0; chunk < chain; ++chunk) {
        float key[my_keys][4];
#pragma unroll
        for (int j = 0; j < my_keys; ++j)
          load_four(key_tile.at(key_lane + Policy::key_lanes * j, begin + chunk), key[j]);
#pragma unroll
        for (int i = 0; i < my_rows; ++i) {
          float query[4];
          load_four(query_tile.at(tile_row(i), begin + chunk), query);
#pragma unroll
          for (int j = 0; j < my_keys; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) part[i][j] = fmaf(query[c], key[j][c], part[i][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < my_rows; ++i)
#pragma unroll
        for (int j = 0; j < my_keys; ++j) scores[i][j] += part[i][j];
    }
  }

  // ---- mask ----

  // Whether the pair takes part, and its score; `score` is the product on entry.
  __device__ __forceinline__ bool finish_score(float& score, const ScoreRow& row, int key) const {
    bool takes_part = key >= row.seen.begin && key < row.seen.end;
    if (p.mask.data && takes_part)
      takes_part = row_of<uint8_t>(p.mask, sequence.batch, row.head, row.query)[key * p.mask.col] != 0;
    float bias = 0;
    if (p.bias.data && takes_part) {
      bias = row_of<float>(p.bias, sequence.batch, row.head, row.query)[key * p.bias.col];
      takes_part = bias != -attention_infinity;
    }
    if (p.transforms) {
      const bool capped = p.softcap > 0;
      const float factor = capped ? p.softcap : p.scale;
      if (capped) score = tanh_and_slope(score * p.scale_over_softcap).value;
      score = p.bias.data ? fmaf(score, factor, bias) : score * factor;
      if (p.alibi_slopes)
        score = fmaf(-alibi_slope(p, sequence, row.head), distance(p, sequence, row.query, key), score);
    }
    return takes_part;
  }

  // The score minus the row's anchor, its product added in two floats.
  __device__ __forceinline__ float refined_score(int i, int at, const ScoreRow& row, int key) const {
    Pair product = {0, 0};
#pragma unroll 1
    for (int chunk = 0; chunk < Policy::QueryTile::chunks; ++chunk) {
      float query[4], other[4];
      load_four(query_tile.at(tile_row(i), chunk), query);
      load_four(key_tile.at(at, chunk), other);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const Pair term = two_product(query[c], other[c]), total = two_sum(product.hi, term.hi);
        product = {total.hi, product.lo + (total.lo + term.lo)};
      }
    }
    if (!isfinite(product.hi + product.lo)) return product.hi;
    if (!p.transforms) return (product.hi - anchor[i]) + product.lo;
    double logit = (static_cast<double>(product.hi) + product.lo) * p.scale;
    if (p.bias.data) logit += row_of<float>(p.bias, sequence.batch, row.head, row.query)[key * p.bias.col];
    if (p.alibi_slopes)
      logit -= static_cast<double>(alibi_slope(p, sequence, row.head)) * distance(p, sequence, row.query, key);
    return static_cast<float>(logit - anchor[i]);
  }

  // ---- online softmax ----

  // One row: its scores become weights in shared memory. The same for all eight lanes of the row but for their keys.
  __device__ __forceinline__ void update_softmax(float (&scores)[my_keys], int i, int key) {
    const ScoreRow row = score_row(p, task, tile_row(i));
    bool takes_part[my_keys];
    float most = -attention_infinity;
#pragma unroll
    for (int j = 0; j < my_keys; ++j) {
      takes_part[j] = finish_score(scores[j], row, key + key_lane + Policy::key_lanes * j);
      if (takes_part[j]) most = fmaxf(most, scores[j]);
    }
    most = largest_of_lanes(most);
    bool refine = p.softcap == 0 && wants_refining(most, maximum[i], anchor[i], p.logit_scale);
    if (__any_sync(whole_warp, refine)) {
      refine = refine && follow_maximum(maximum[i], anchor[i], most, p.logit_scale);
      most = -attention_infinity;
#pragma unroll
      for (int j = 0; j < my_keys; ++j) {
        const int at = key_lane + Policy::key_lanes * j;
        if (refine && takes_part[j]) scores[j] = refined_score(i, at, row, key + at);
        if (takes_part[j]) most = fmaxf(most, scores[j]);
      }
      most = largest_of_lanes(most);
    }
    const float before = maximum[i];
    most = maximum[i] = fmaxf(most, before);
    const float shift = most == -attention_infinity ? 0.0f : most;
    const float factor = before == most ? 1.0f : exp_scaled(before - shift, p.logit_scale);
    float total = 0;
#pragma unroll
    for (int j = 0; j < my_keys; ++j) {
      const int at = key_lane + Policy::key_lanes * j;
      const float difference = scores[j] - shift;
      float weight = -0.0f;
      if (takes_part[j]) weight = difference != difference ? difference : exp_scaled(difference, p.logit_scale);
      total += weight;
      if (p.dropout_seed && takes_part[j]) {
        const PhiloxWords words = dropout_words(p, sequence, row.query, row.head, (key + at) / 4 * 4);
        const uint32_t low = key_lane & 1 ? words.word[1] : words.word[0];
        const uint32_t high = key_lane & 1 ? words.word[3] : words.word[2];
        const uint32_t word = key_lane & 2 ? high : low;  // of key % 4
        weight = kept_weight(p, word, weight);
      }
      weight_at(tile_row(i), at) = weight;
    }
    sum[i] = fmaf(sum[i], factor, total);
#pragma unroll
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int c = 0; c < 4; ++c) output[i][g][c] *= factor;
  }
  __device__ __forceinline__ float largest_of_lanes(float x) const {
#pragma unroll
    for (int apart = 1; apart < Policy::key_lanes; apart *= 2) x = fmaxf(x, shuffle_xor(x, apart));
    return x;
  }

  // ---- accumulate ----

  __device__ __forceinline__ void add_values(bool kept_alone) {
    constexpr int chain = 4;  // keys whose products are summed before they join the output
#pragma unroll 1
    for (int begin = 0; begin < keys; begin += chain) {
      float weight[my_rows][chain];
#pragma unroll
      for (int i = 0; i < my_rows; ++i)
#pragma unroll
        for (int j = 0; j < chain; ++j) weight[i][j] = weight_at(tile_row(i), begin + j);
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        float value[chain][4];
#pragma unroll
        for (int j = 0; j < chain; ++j) load_four(value_tile.at(begin + j, Policy::key_lanes * g + key_lane), value[j]);
#pragma unroll
        for (int i = 0; i < my_rows; ++i)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float part = 0;
#pragma unroll
            for (int j = 0; j < chain; ++j) {
              const bool excluded = kept_alone && __float_as_uint(weight[i][j]) == 0x80000000u;
              part = fmaf(weight[i][j], excluded ? 0.0f : value[j][c], part);
            }
            output[i][g][c] += part;
          }
      }
    }
  }

  // ---- all keys ----

  __device__ __forceinline__ void walk_keys(bool kept_alone) {
#pragma unroll
    for (int i = 0; i < my_rows; ++i) {
      maximum[i] = -attention_infinity;
      sum[i] = anchor[i] = 0;
#pragma unroll
      for (int g = 0; g < groups; ++g)
#pragma unroll
        for (int c = 0; c < 4; ++c) output[i][g][c] = 0;
    }
    const KeyRange walked = task.seen_by_some(p, 0, Policy::queries);
    const int first = walked.begin / keys * keys;
    if (first < walked.end) load_keys(first);
    for (int key = first; key < walked.end; key += keys) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // keys are there for all, and nobody reads values or weights any more
      load_values(key);
      float scores[my_rows][my_keys];
      multiply_keys(scores);
#pragma unroll
      for (int i = 0; i < my_rows; ++i) update_softmax(scores[i], i, key);
      ptx::cp_async_wait<0>();
      __syncthreads();  // values and weights are there for all, and nobody reads keys any more
      if (key + keys < walked.end) load_keys(key + keys);
      add_values(kept_alone);
    }
    ptx::cp_async_wait<0>();
  }

  __device__ __forceinline__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < my_rows; ++i)
#pragma unroll
      for (int g = 0; g < groups; ++g)
#pragma unroll
        for (int c = 0; c < 4; ++c) finite &= fabsf(output[i][g][c]) < attention_infinity;
    return finite;
  }

  // ---- finish ----

  __device__ __forceinline__ void write_rows() {
#pragma unroll
    for (int i = 0; i < my_rows; ++i) {
      const int row = tile_row(i), query = task.query(row), head = task.head(row);
#pragma unroll
      for (int apart = 1; apart < Policy::key_lanes; apart *= 2) sum[i] += shuffle_xor(sum[i], apart);
      const RowEnd end = end_of_row(p, head, maximum[i], anchor[i], sum[i]);
      const float reciprocal = 1.0f / end.divisor;
      if (row >= task.num_rows) continue;
      if (key_lane == 0) row_of<float>(p.lse, sequence.batch, head, sequence.query_row)[query * p.lse.row] = end.lse;
      float* to = row_of<float>(p.output, sequence.batch, head, sequence.query_row) + query * p.output.row;
#pragma unroll
      for (int g = 0; g < groups; ++g) {
        float x[4];
#pragma unroll
        for (int c = 0; c < 4; ++c)
          x[c] = end.factor == 0 ? 0.0f : quotient(output[i][g][c] * end.factor, end.divisor, reciprocal);
        const int column = 4 * (Policy::key_lanes * g + key_lane);
        if (column < p.value_head_dim) store_vector(to, column, p.value_head_dim, p.whole_output, pack<float>(x));
      }
    }
  }
};

template <class Policy>
__global__ void __launch_bounds__(Policy::threads, 1)
    attention_simt_forward_kernel(const __grid_constant__ AttentionParams p) {
  const AttentionTask task(p, Policy::queries, blockIdx.x);
  if (task.num_rows <= 0) return;
  SimtBlock<Policy> block(p, task, reinterpret_cast<float*>(dynamic_shared()));
  block.load_queries();
  for (bool kept_alone = false;; kept_alone = true) {
    block.walk_keys(kept_alone);
    if (kept_alone || !p.excludes) break;
    if (!__syncthreads_or(!block.is_finite())) break;
  }
  block.write_rows();
}

}  // namespace

}  // namespace transfuse::cuda
