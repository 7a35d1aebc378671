// Decode in float32: every product and sum is an IEEE operation, for tiles of up to 8 rows.
//
// Four neighbouring lanes share a key, each with every fourth vector of its dimensions, for all rows of the tile; of
// the sums each lane then keeps those of two rows. Of values a lane has four of every 128 columns. Weights go through
// shared memory from the lanes of a row to those of the columns.
//
// Policy: products are summed four at a time before they join a sum, here and of values. An excluded weight is written
// as -0: it is told from a weight of 0 that takes part where values are not finite, and adds nothing anywhere.
#pragma once

#include "cuda/attention_decode_parts.cuh"
#include "cuda/attention_simt.cuh"

namespace transfuse::cuda {

namespace {

template <int HeadDim>
struct DecodeSimtPolicy {
  static constexpr int head_dim = HeadDim;  // of keys and of values, rounded up
  static constexpr int rows = 8, keys = HeadDim <= 128 ? 16 : 8;
  static constexpr int key_tiles = keys / 8, key_steps = HeadDim / 16, value_steps = HeadDim / 128;
  static constexpr int warp_elements = 2 * keys * HeadDim + rows * keys;  // keys, values, weights
  static constexpr int shared_bytes =
      (rows * HeadDim + decode_warps * warp_elements) * static_cast<int>(sizeof(float)) +
      static_cast<int>(sizeof(WarpResults<rows>));
  static_assert(2 * keys >= rows, "results take the place of keys and values");
  static_assert(shared_bytes <= 99 * 1024, "a block's shared memory everywhere");
};

template <class Policy>
struct DecodeSimtWarp {
  static constexpr int keys = Policy::keys, key_tiles = Policy::key_tiles, key_steps = Policy::key_steps,
                       value_steps = Policy::value_steps, all_rows = Policy::rows, my_rows = all_rows / 4;

  const AttentionParams& p;
  const DecodeWork& work;
  DecodeReader<float> reader;
  const float* queries;  // [rows][head_dim]
  float *key_places, *value_places, *weights;
  const int lane, key_lane, part_lane;  // keys key_lane + 8 n, vectors part_lane + 4 s of their dimensions
  float output[all_rows][value_steps][4];                        // columns 128 * step + 4 * lane and on
  float maximum[my_rows], sum[my_rows], anchor[my_rows];         // of rows part_lane + 4 i

  __device__ __forceinline__ DecodeSimtWarp(const DecodeParams& params, const DecodeWork& its_work,
                                            const float* its_queries, float* its_places)
      : p(params.problem),
        work(its_work),
        reader{params, its_work, {0, 0}},
        queries(its_queries),
        key_places(its_places),
        value_places(its_places + keys * Policy::head_dim),
        weights(value_places + keys * Policy::head_dim),
        lane(lane_of_warp()),
        key_lane(lane / 4),
        part_lane(lane % 4) {}

  // ---- load ----

  __device__ __forceinline__ float* key_vector(int tile, int step) const {
    return key_places + ((tile * key_steps + step) * warp_size + lane) * 4;
  }
  __device__ __forceinline__ float* value_vector(int key, int step) const {
    return value_places + ((key * value_steps + step) * warp_size + lane) * 4;
  }

  __device__ __forceinline__ void load_keys(int key) {
    reader.find(key + lane % keys);
    __syncwarp();  // no lane reads the keys before
    if (p.whole_key)
      copy_keys<true>(key);
    else
      copy_keys<false>(key);
    ptx::cp_async_commit();
  }
  // Of the same group as the keys before.
  __device__ __forceinline__ void load_values(int key) {
    __syncwarp();  // no lane reads the values before
    if (p.whole_value)
      copy_values<true>(key);
    else
      copy_values<false>(key);
    ptx::cp_async_commit();
  }
  template <bool whole>
  __device__ __forceinline__ void copy_keys(int key) const {
#pragma unroll
    for (int tile = 0; tile < key_tiles; ++tile) {
      const int of = 8 * tile + key_lane, columns = reader.is_read(key + of) ? p.head_dim : 0;
      const int64_t offset = reader.offset(p.key, of);
#pragma unroll(whole ? key_steps : 1)
      for (int step = 0; step < key_steps; ++step)
        reader.template copy<whole>(key_vector(tile, step), p.key, offset, 16 * step + 4 * part_lane, columns);
    }
  }
  template <bool whole>
  __device__ __forceinline__ void copy_values(int key) const {
#pragma unroll(whole ? keys : 1)
    for (int of = 0; of < keys; ++of) {
      const int columns = reader.is_read(key + of) ? p.value_head_dim : 0;
      const int64_t offset = reader.offset(p.value, of);
#pragma unroll
      for (int step = 0; step < value_steps; ++step)
        reader.template copy<whole>(value_vector(of, step), p.value, offset, 128 * step + 4 * lane, columns);
    }
  }

  // ---- scores ----

  // Of rows part_lane + 4 i with keys key_lane + 8 n.
  __device__ __forceinline__ void multiply_keys(float (&scores)[my_rows][key_tiles]) const {
    float total[all_rows][key_tiles] = {};
#pragma unroll 2
    for (int step = 0; step < key_steps; ++step) {
      float key[key_tiles][4];
#pragma unroll
      for (int tile = 0; tile < key_tiles; ++tile) load_four(key_vector(tile, step), key[tile]);
#pragma unroll
      for (int row = 0; row < all_rows; ++row) {
        float query[4];
        load_four(queries + row * Policy::head_dim + 16 * step + 4 * part_lane, query);
#pragma unroll
        for (int tile = 0; tile < key_tiles; ++tile) {
          float part = 0;
#pragma unroll
          for (int c = 0; c < 4; ++c) part = fmaf(query[c], key[tile][c], part);
          total[row][tile] += part;
        }
      }
    }
#pragma unroll
    for (int row = 0; row < all_rows; ++row)
#pragma unroll
      for (int tile = 0; tile < key_tiles; ++tile) {
        const float x = reduce_lanes<4>(total[row][tile], Add{});
        if (part_lane == row % 4) scores[row / 4][tile] = x;
      }
  }

  __device__ __forceinline__ const float* bias_row(const ScoreRow& row) const {
    return row_of<float>(p.bias, work.task.sequence.batch, row.head, row.query);
  }

  // Whether the pair takes part, and its score; `score` is the product on entry.
  __device__ __forceinline__ bool finish_score(float& score, const ScoreRow& row, int key) const {
    bool takes_part = key >= row.seen.begin && key < row.seen.end;
    float bias = 0;
    if (p.bias.data && takes_part) {
      bias = bias_row(row)[key * p.bias.col];
      takes_part = bias != -attention_infinity;
    }
    if (p.transforms) {
      const bool capped = p.softcap > 0;
      const float factor = capped ? p.softcap : p.scale;
      if (capped) score = tanh_and_slope(score * p.scale_over_softcap).value;
      score = p.bias.data ? fmaf(score, factor, bias) : score * factor;
      if (p.alibi_slopes)
        score = fmaf(-alibi_slope(p, work.task.sequence, row.head),
                     distance(p, work.task.sequence, row.query, key), score);
    }
    return takes_part;
  }

  // The product of a row and a lane's key, added in two floats; all lanes of the warp call it together.
  __device__ __forceinline__ Pair refined_product(int row, int tile) const {
    Pair product = {0, 0};
#pragma unroll 1
    for (int step = 0; step < key_steps; ++step) {
      float query[4], key[4];
      load_four(queries + row * Policy::head_dim + 16 * step + 4 * part_lane, query);
      load_four(key_vector(tile, step), key);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const Pair term = two_product(query[c], key[c]), total = two_sum(product.hi, term.hi);
        product = {total.hi, product.lo + (total.lo + term.lo)};
      }
    }
    return reduce_lanes<4>(product, Add{});
  }

  // The score minus the row's anchor.
  __device__ __forceinline__ float refined_score(const Pair& product, float its_anchor, const ScoreRow& row,
                                                 int key) const {
    if (!isfinite(product.hi + product.lo)) return product.hi;
    if (!p.transforms) return (product.hi - its_anchor) + product.lo;
    double logit = (static_cast<double>(product.hi) + product.lo) * p.scale;
    if (p.bias.data) logit += bias_row(row)[key * p.bias.col];
    if (p.alibi_slopes)
      logit -= static_cast<double>(alibi_slope(p, work.task.sequence, row.head)) *
          distance(p, work.task.sequence, row.query, key);
    return static_cast<float>(logit - its_anchor);
  }

  // ---- online softmax ----

  // The eight lanes that share a row.
  static __device__ __forceinline__ float largest_of_lanes(float x) {
#pragma unroll
    for (int apart = 4; apart < warp_size; apart *= 2) x = fmaxf(x, shuffle_xor(x, apart));
    return x;
  }

  // Scores become weights in shared memory, and factors what earlier outputs have to be multiplied by.
  __device__ __forceinline__ void update_softmax(float (&scores)[my_rows][key_tiles], int key,
                                                 float (&factors)[my_rows]) {
    bool takes_part[my_rows][key_tiles], refine[my_rows], any = false;
    float most[my_rows];
#pragma unroll
    for (int i = 0; i < my_rows; ++i) {
      const ScoreRow row = score_row(p, work.task, part_lane + 4 * i);
      most[i] = -attention_infinity;
#pragma unroll
      for (int tile = 0; tile < key_tiles; ++tile) {
        takes_part[i][tile] = finish_score(scores[i][tile], row, key + 8 * tile + key_lane);
        if (takes_part[i][tile]) most[i] = fmaxf(most[i], scores[i][tile]);
      }
      most[i] = largest_of_lanes(most[i]);
      refine[i] = p.softcap == 0 && wants_refining(most[i], maximum[i], anchor[i], p.logit_scale);
      any |= refine[i];
    }
    if (__any_sync(whole_warp, any)) refine_scores(scores, most, refine, takes_part, key);
    __syncwarp();  // nobody reads the weights before
#pragma unroll
    for (int i = 0; i < my_rows; ++i) {
      const float before = maximum[i], now = maximum[i] = fmaxf(most[i], before);
      const float shift = now == -attention_infinity ? 0.0f : now;
      factors[i] = before == now ? 1.0f : exp_scaled(before - shift, p.logit_scale);
      float total = 0;
#pragma unroll
      for (int tile = 0; tile < key_tiles; ++tile) {
        const float difference = scores[i][tile] - shift;
        float weight = -0.0f;
        if (takes_part[i][tile])
          weight = difference != difference ? difference : exp_scaled(difference, p.logit_scale);
        total += weight;
        weights[(part_lane + 4 * i) * keys + 8 * tile + key_lane] = weight;
      }
      sum[i] = fmaf(sum[i], factors[i], total);
    }
    __syncwarp();  // weights are there for all
  }

  // Rows to refine keep their scores relative to an anchor, which follows their maximum.
  __device__ __forceinline__ void refine_scores(float (&scores)[my_rows][key_tiles], float (&most)[my_rows],
                                                bool (&refine)[my_rows],
                                                const bool (&takes_part)[my_rows][key_tiles], int key) {
#pragma unroll
    for (int i = 0; i < my_rows; ++i) {
      refine[i] = refine[i] && follow_maximum(maximum[i], anchor[i], most[i], p.logit_scale);
      most[i] = -attention_infinity;
    }
#pragma unroll
    for (int row = 0; row < all_rows; ++row) {
      const int i = row / 4;
      const ScoreRow place_of_row = score_row(p, work.task, row);
#pragma unroll
      for (int tile = 0; tile < key_tiles; ++tile) {
        const Pair product = refined_product(row, tile);
        if (part_lane == row % 4 && refine[i] && takes_part[i][tile])
          scores[i][tile] = refined_score(product, anchor[i], place_of_row, key + 8 * tile + key_lane);
      }
    }
#pragma unroll
    for (int i = 0; i < my_rows; ++i) {
#pragma unroll
      for (int tile = 0; tile < key_tiles; ++tile)
        if (takes_part[i][tile]) most[i] = fmaxf(most[i], scores[i][tile]);
      most[i] = largest_of_lanes(most[i]);
    }
  }

  // ---- values ----

  __device__ __forceinline__ void add_values(const float (&factors)[my_rows], bool kept_alone) {
    constexpr int chain = 4;  // keys whose products are summed before they join the output
#pragma unroll
    for (int row = 0; row < all_rows; ++row) {
      const float factor = __shfl_sync(whole_warp, factors[row / 4], row % 4);
#pragma unroll
      for (int step = 0; step < value_steps; ++step)
#pragma unroll
        for (int c = 0; c < 4; ++c) output[row][step][c] *= factor;
    }
#pragma unroll 1
    for (int begin = 0; begin < keys; begin += chain) {
      float value[chain][value_steps][4];
#pragma unroll
      for (int j = 0; j < chain; ++j)
#pragma unroll
        for (int step = 0; step < value_steps; ++step) load_four(value_vector(begin + j, step), value[j][step]);
#pragma unroll
      for (int row = 0; row < all_rows; ++row) {
        float weight[chain];
        load_four(weights + row * keys + begin, weight);
#pragma unroll
        for (int step = 0; step < value_steps; ++step)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float part = 0;
#pragma unroll
            for (int j = 0; j < chain; ++j) {
              const bool excluded = kept_alone && __float_as_uint(weight[j]) == 0x80000000u;
              part = fmaf(weight[j], excluded ? 0.0f : value[j][step][c], part);
            }
            output[row][step][c] += part;
          }
      }
    }
  }

  // ---- all of the warp's keys ----

  __device__ __forceinline__ void walk_keys(bool kept_alone) {
#pragma unroll
    for (int i = 0; i < my_rows; ++i) {
      maximum[i] = -attention_infinity;
      sum[i] = anchor[i] = 0;
    }
#pragma unroll
    for (int row = 0; row < all_rows; ++row)
#pragma unroll
      for (int step = 0; step < value_steps; ++step)
#pragma unroll
        for (int c = 0; c < 4; ++c) output[row][step][c] = 0;
    constexpr int apart = decode_warps * keys;  // groups are counted from key 0, so that a row finds its warps anywhere
    int key = work.keys.begin / apart * apart + static_cast<int>(threadIdx.x) / warp_size * keys;
    if (key + keys <= work.keys.begin) key += apart;
    if (key >= work.keys.end) return;
    load_keys(key);
    load_values(key);
    for (; key < work.keys.end; key += apart) {
      const bool more = key + apart < work.keys.end;
      ptx::cp_async_wait<1>();  // keys; values are still under way
      float scores[my_rows][key_tiles], factors[my_rows];
      multiply_keys(scores);
      update_softmax(scores, key, factors);
      if (more)
        load_keys(key + apart);
      else
        ptx::cp_async_commit();
      ptx::cp_async_wait<1>();  // values; the next keys are still under way
      add_values(factors, kept_alone);
      if (more)
        load_values(key + apart);
      else
        ptx::cp_async_commit();
    }
    ptx::cp_async_wait<0>();
  }

  __device__ __forceinline__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (int row = 0; row < all_rows; ++row)
#pragma unroll
      for (int step = 0; step < value_steps; ++step)
#pragma unroll
        for (int c = 0; c < 4; ++c) finite &= fabsf(output[row][step][c]) < attention_infinity;
    return finite;
  }

  // ---- results ----

  __device__ __forceinline__ void leave_results(WarpResults<all_rows>& results, float* outputs) const {
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    __syncwarp();  // no lane reads its values
#pragma unroll
    for (int i = 0; i < my_rows; ++i) {
      float total = sum[i];
#pragma unroll
      for (int apart = 4; apart < warp_size; apart *= 2) total += shuffle_xor(total, apart);
      if (key_lane == 0) results.stats[warp][part_lane + 4 * i] = {maximum[i], anchor[i], total};
    }
#pragma unroll
    for (int row = 0; row < all_rows; ++row)
#pragma unroll
      for (int step = 0; step < value_steps; ++step) {
        const float(&x)[4] = output[row][step];
        *reinterpret_cast<float4*>(outputs + row * Policy::head_dim + 128 * step + 4 * lane) =
            make_float4(x[0], x[1], x[2], x[3]);
      }
  }
};

template <class Policy>
__global__ void __launch_bounds__(decode_threads, 2)
    attention_decode_simt_kernel(const __grid_constant__ DecodeParams d) {
  const AttentionParams& p = d.problem;
  const DecodeWork work(d, Policy::rows, blockIdx.x);
  if (d.parts > 1 && work.keys.begin >= work.keys.end) return;
  float* queries = reinterpret_cast<float*>(dynamic_shared());
  float* keys = queries + Policy::rows * Policy::head_dim;
  auto& results = *reinterpret_cast<WarpResults<Policy::rows>*>(keys + decode_warps * Policy::warp_elements);
  const auto outputs_of = [&](int warp) { return keys + warp * Policy::warp_elements; };
  for (int place = threadIdx.x; place < Policy::rows * Policy::head_dim; place += decode_threads) {
    const int row = place / Policy::head_dim, column = place % Policy::head_dim;
    const float* from = row_of<float>(p.query, work.task.sequence.batch, work.task.head(row), work.task.query(row));
    queries[place] = row < work.task.num_rows && column < p.head_dim ? from[column * p.query.col] : 0.0f;
  }
  __syncthreads();
  DecodeSimtWarp<Policy> own(d, work, queries, outputs_of(static_cast<int>(threadIdx.x) / warp_size));
  for (bool kept_alone = false;; kept_alone = true) {
    own.walk_keys(kept_alone);
    if (kept_alone || !p.excludes || !__any_sync(whole_warp, !own.is_finite())) break;
  }
  own.leave_results(results, outputs_of(static_cast<int>(threadIdx.x) / warp_size));
  fold_warps<float, Policy::rows, Policy::head_dim>(d, work, results, outputs_of);
}

}  // namespace

}  // namespace transfuse::cuda
