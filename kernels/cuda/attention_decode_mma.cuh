// Decode in 16 bits: a warp multiplies up to 16 rows with 16 keys at a time on tensor cores.
//
// Keys and values need no tile in shared memory that warps or lanes share, since products do not care for the order of
// dimensions, nor sums for that of keys: a lane reads 16 bytes of a key, dimensions 8 t to 8 t + 7 of every 32
// (t = lane % 4), and these are its fragments of two steps of mma.m16n8k16, queries being laid out alike. Of values it
// reads columns 8 g to 8 g + 7 of every 64 (g = lane / 4) for the four keys whose weights it holds; a pair of keys in
// one register makes the fragment, and a lane's accumulators then belong to eight neighbouring columns.
//
// A warp has 16 KB of keys and values in its places, one to four groups of 16 keys: with two blocks of four warps on a
// multiprocessor 64 to 112 KB are under way at any time, where 4.3 TB/s and 0.8 us of latency ask for 26 KB.
#pragma once

#include "cuda/attention_decode_parts.cuh"
#include "cuda/attention_values.cuh"

namespace transfuse::cuda {

namespace {

template <class Type, int HeadDim>
struct DecodePolicy {
  using T = Type;
  static constexpr int head_dim = HeadDim;  // of keys and of values, rounded up
  static constexpr int rows = 16, keys = 16;
  static constexpr int key_steps = HeadDim / 32, value_steps = HeadDim / 64;
  static constexpr int stages = 256 / HeadDim;              // groups that a warp asks for ahead: 16 KB in each
  static constexpr int stage_elements = 2 * keys * HeadDim;  // a group of keys and one of values
  static constexpr int warp_elements = stages * stage_elements;
  static constexpr int query_bytes = rows * HeadDim * static_cast<int>(sizeof(T));
  static constexpr int warp_bytes = warp_elements * static_cast<int>(sizeof(T));
  static constexpr int shared_bytes =
      query_bytes + decode_warps * warp_bytes + static_cast<int>(sizeof(WarpResults<rows>));
  static_assert(warp_bytes >= rows * HeadDim * static_cast<int>(sizeof(float)), "results take the place of the keys");
  static_assert(shared_bytes <= 99 * 1024, "a block's shared memory everywhere");
};

// Vectors as lanes wrote them for themselves, or, of queries, as all lanes need them.
template <class T>
__device__ __forceinline__ T* place_in(T* places, int vector) {
  return places + (vector * warp_size + lane_of_warp()) * width<std::remove_const_t<T>>;
}
template <class T>
__device__ __forceinline__ uint4 vector_at(const T* places, int vector) {
  return *reinterpret_cast<const uint4*>(place_in(places, vector));
}

// The operands of one step of 16 dimensions, as attention_scores.cuh wants them to refine a score.
template <class T>
struct DecodeQueryOperand {
  const T* places;
  __device__ __forceinline__ void load(uint32_t (&a)[4], int, int step) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = vector_at(places, step / 2 * 2 + half);
      a[half] = step % 2 ? v.z : v.x;
      a[2 + half] = step % 2 ? v.w : v.y;
    }
  }
};
template <class T, int steps>
struct DecodeKeyOperand {
  const T* places;
  __device__ __forceinline__ void load(uint32_t (&b)[2][2], int, int step) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const uint4 v = vector_at(places, tile * steps + step / 2);
      b[tile][0] = step % 2 ? v.z : v.x;
      b[tile][1] = step % 2 ? v.w : v.y;
    }
  }
};

// The lower, or the upper, halves of two registers.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFFu) | b << 16; }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000u); }

template <class Policy>
struct DecodeWarp {
  using T = typename Policy::T;
  static constexpr int keys = Policy::keys, key_steps = Policy::key_steps, value_steps = Policy::value_steps;

  const AttentionParams& p;
  const DecodeWork& work;
  DecodeReader<T> reader;
  const T* query_places;
  T* stages;           // [stages][keys, values]
  const KeyRange seen_by_all;
  float output[8 * value_steps][4];
  SoftmaxRows rows;

  __device__ __forceinline__ DecodeWarp(const DecodeParams& params, const DecodeWork& its_work, const T* queries,
                                        T* its_places)
      : p(params.problem),
        work(its_work),
        reader{params, its_work, {0, 0}},
        query_places(queries),
        stages(its_places),
        seen_by_all(its_work.task.seen_by_all(params.problem, 0, Policy::rows)) {}

  // ---- load ----

  __device__ __forceinline__ T* keys_of(int stage) const { return stages + stage * Policy::stage_elements; }
  __device__ __forceinline__ T* values_of(int stage) const { return keys_of(stage) + keys * Policy::head_dim; }

  __device__ __forceinline__ void load_keys(int key, int stage) {
    reader.find(key + lane_of_warp() % keys);
    __syncwarp();  // no lane reads the keys before
    if (p.whole_key)
      copy_keys<true>(key, stage);
    else
      copy_keys<false>(key, stage);
    ptx::cp_async_commit();
  }
  // Of the same group as the keys before.
  __device__ __forceinline__ void load_values(int key, int stage) {
    __syncwarp();  // no lane reads the values before
    if (p.whole_value)
      copy_values<true>(key, stage);
    else
      copy_values<false>(key, stage);
    ptx::cp_async_commit();
  }
  template <bool whole>
  __device__ __forceinline__ void copy_keys(int key, int stage) const {
#pragma unroll(whole ? 2 : 1)
    for (int tile = 0; tile < 2; ++tile) {
      const int of = 8 * tile + lane_of_warp() / 4, columns = reader.is_read(key + of) ? p.head_dim : 0;
      const int64_t offset = reader.offset(p.key, of);
#pragma unroll(whole ? key_steps : 1)
      for (int step = 0; step < key_steps; ++step)
        reader.template copy<whole>(place_in(keys_of(stage), tile * key_steps + step), p.key, offset,
                                    32 * step + lane_of_warp() % 4 * 8, columns);
    }
  }
  template <bool whole>
  __device__ __forceinline__ void copy_values(int key, int stage) const {
#pragma unroll(whole ? 4 : 1)
    for (int i = 0; i < 4; ++i) {
      const int of = i / 2 * 8 + lane_of_warp() % 4 * 2 + i % 2;
      const int columns = reader.is_read(key + of) ? p.value_head_dim : 0;
      const int64_t offset = reader.offset(p.value, of);
#pragma unroll(whole ? value_steps : 1)
      for (int step = 0; step < value_steps; ++step)
        reader.template copy<whole>(place_in(values_of(stage), 4 * step + i), p.value, offset,
                                    64 * step + lane_of_warp() / 4 * 8, columns);
    }
  }

  // ---- scores ----

  __device__ __forceinline__ void multiply_keys(ScoreFragment<keys>& scores, int stage) const {
    scores.excluded = 0;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores.x[n][e] = 0;
#pragma unroll
    for (int step = 0; step < key_steps; ++step) {
      const uint4 low = vector_at(query_places, 2 * step), high = vector_at(query_places, 2 * step + 1);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint4 k = vector_at(keys_of(stage), n * key_steps + step);
        multiply<T>(scores.x[n], {low.x, high.x, low.y, high.y}, {k.x, k.y});
        multiply<T>(scores.x[n], {low.z, high.z, low.w, high.w}, {k.z, k.w});
      }
    }
  }

  // Of the lane's two rows.
  __device__ __forceinline__ ScoreRow place_of_row(int half) const {
    return score_row(p, work.task, fragment_row() + 8 * half);
  }

  // Scores become weights.
  __device__ __forceinline__ void update_softmax(ScoreFragment<keys>& scores, int key, int stage) {
    const bool edge = key < seen_by_all.begin || key + keys > seen_by_all.end;
    if (p.transforms || edge) {
      const ScoreRow places[2] = {place_of_row(0), place_of_row(1)};
      if (p.transforms) transform_scores<T>(scores, p, work.task.sequence, places, key);
      if (edge) exclude_unseen(scores, places, key);
    }
    float maxima[2], factors[2];
    row_maxima(scores, maxima);
    if (p.softcap == 0 && __any_sync(whole_warp, wants_refining(rows, maxima, p.logit_scale))) {
      const ScoreRow places[2] = {place_of_row(0), place_of_row(1)};
      const RowAnchor anchor = follow_maximum(rows, maxima, p.logit_scale);
      refine_scores<T, 2 * key_steps>(scores, p, work.task.sequence, places, anchor,
                                      DecodeQueryOperand<T>{query_places},
                                      DecodeKeyOperand<T, key_steps>{keys_of(stage)}, key, true);
      row_maxima(scores, maxima);
    }
    take_weights(scores, rows, maxima, p.logit_scale * exp_log2e, factors);
    if (!__any_sync(whole_warp, factors[0] != 1.0f || factors[1] != 1.0f)) return;
#pragma unroll
    for (int n = 0; n < 8 * value_steps; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) output[n][e] *= factors[e / 2];
  }

  // ---- values ----

  // Accumulator 8 * step + j: columns 64 * step + 8 * (2 t + e % 2) + j.
  __device__ __forceinline__ void add_group(const ScoreFragment<keys>& weights, int stage, bool kept_alone) {
    uint32_t a[4], signs[4], kept[4];
    weights_fragment<T>(a, weights, 0);
    if (kept_alone) kept_fragments<T>(signs, kept, weights, 0);
#pragma unroll
    for (int step = 0; step < value_steps; ++step) {
      uint4 v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = vector_at(values_of(stage), 4 * step + i);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = word == 0 ? v[i].x : word == 1 ? v[i].y : word == 2 ? v[i].z : v[i].w;
        const uint32_t low[2] = {low_halves(w[0], w[1]), low_halves(w[2], w[3])};
        const uint32_t high[2] = {high_halves(w[0], w[1]), high_halves(w[2], w[3])};
        float(&first)[4] = output[8 * step + 2 * word], (&second)[4] = output[8 * step + 2 * word + 1];
        if (kept_alone) {
          add_kept(first, a, signs, kept, low);
          add_kept(second, a, signs, kept, high);
        } else {
          multiply<T>(first, a, low);
          multiply<T>(second, a, high);
        }
      }
    }
  }
  // As add_kept_values of attention_values.cuh has it.
  static __device__ __forceinline__ void add_kept(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&signs)[4],
                                                  const uint32_t (&kept)[4], const uint32_t (&values)[2]) {
    const ValuesApart low = values_apart<T>(values[0]), high = values_apart<T>(values[1]);
    multiply<T>(sum, a, {low.finite, high.finite});
    if (__any_sync(whole_warp, low.kinds != 0 || high.kinds != 0))
      add_infinities<T>(sum, signs, kept, low, high);
  }

  // ---- all of the warp's keys ----

  __device__ __forceinline__ void walk_keys(bool kept_alone) {
    rows = SoftmaxRows();
#pragma unroll
    for (int n = 0; n < 8 * value_steps; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) output[n][e] = 0;
    constexpr int apart = decode_warps * keys;  // groups are counted from key 0, so that a row finds its warps anywhere
    const int own = static_cast<int>(threadIdx.x) / warp_size * keys;
    int key = work.keys.begin / apart * apart + own;
    if (key + keys <= work.keys.begin) key += apart;
    if (key >= work.keys.end) return;
    constexpr int ahead = 2 * Policy::stages - 1;  // copies under way while one is waited for
    const auto ask = [&](int of, int stage, bool for_keys) {
      if (of >= work.keys.end)
        ptx::cp_async_commit();
      else if (for_keys)
        load_keys(of, stage);
      else
        load_values(of, stage);
    };
#pragma unroll 1
    for (int stage = 0; stage < Policy::stages; ++stage) {
      ask(key + stage * apart, stage, true);
      ask(key + stage * apart, stage, false);
    }
    for (int stage = 0; key < work.keys.end; key += apart, stage = (stage + 1) % Policy::stages) {
      const int next = key + Policy::stages * apart;
      ptx::cp_async_wait<ahead>();  // keys
      ScoreFragment<keys> scores;
      multiply_keys(scores, stage);
      update_softmax(scores, key, stage);
      ask(next, stage, true);
      ptx::cp_async_wait<ahead>();  // values
      add_group(scores, stage, kept_alone);
      ask(next, stage, false);
    }
    ptx::cp_async_wait<0>();
  }

  __device__ __forceinline__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (int n = 0; n < 8 * value_steps; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) finite &= fabsf(output[n][e]) < attention_infinity;
    return finite;
  }

  // ---- results ----

  __device__ __forceinline__ void leave_results(WarpResults<Policy::rows>& results, float* outputs) const {
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    __syncwarp();  // no lane reads its values
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = fragment_row() + 8 * half;
      const float sum = sum_of_row(rows.sum[half]);
      if (fragment_column() == 0) results.stats[warp][row] = {rows.maximum[half], rows.anchor[half], sum};
#pragma unroll
      for (int step = 0; step < value_steps; ++step)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float* to = outputs + row * Policy::head_dim + 64 * step + 8 * (fragment_column() + i);
#pragma unroll
          for (int j = 0; j < 8; ++j) to[j] = output[8 * step + j][2 * half + i];
        }
    }
  }
};

// The tile's queries in the order of the fragments: of step s of 32 dimensions and lane (g, t) the vectors of rows g
// and g + 8.
template <class Policy>
__device__ __forceinline__ void load_decode_queries(typename Policy::T* to, const AttentionParams& p,
                                                    const DecodeWork& work) {
  using T = typename Policy::T;
  for (int place = threadIdx.x; place < Policy::key_steps * 2 * warp_size; place += decode_threads) {
    const int lane = place % warp_size, row = place / warp_size % 2 * 8 + lane / 4;
    const int column = place / (2 * warp_size) * 32 + lane % 4 * 8;
    const T* from = row_of<T>(p.query, work.task.sequence.batch, work.task.head(row), work.task.query(row));
    const int columns = row < work.task.num_rows ? p.head_dim - column : 0;
    T* vector = to + place * width<T>;
    if (p.whole_query && columns >= width<T>) {
      *reinterpret_cast<uint4*>(vector) = *reinterpret_cast<const uint4*>(from + column);
      continue;
    }
#pragma unroll
    for (int j = 0; j < width<T>; ++j) vector[j] = j < columns ? from[(column + j) * p.query.col] : T{};
  }
}

template <class Policy>
__global__ void __launch_bounds__(decode_threads, 2)
    attention_decode_kernel(const __grid_constant__ DecodeParams d) {
  using T = typename Policy::T;
  const DecodeWork work(d, Policy::rows, blockIdx.x);
  if (d.parts > 1 && work.keys.begin >= work.keys.end) return;
  T* queries = reinterpret_cast<T*>(dynamic_shared());
  T* keys = queries + Policy::rows * Policy::head_dim;
  auto& results = *reinterpret_cast<WarpResults<Policy::rows>*>(keys + decode_warps * Policy::warp_elements);
  const auto outputs_of = [&](int warp) { return reinterpret_cast<float*>(keys + warp * Policy::warp_elements); };
  load_decode_queries<Policy>(queries, d.problem, work);
  __syncthreads();
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  DecodeWarp<Policy> own(d, work, queries, keys + warp * Policy::warp_elements);
  for (bool kept_alone = false;; kept_alone = true) {
    own.walk_keys(kept_alone);
    if (kept_alone || !d.problem.excludes || !__any_sync(whole_warp, !own.is_finite())) break;
  }
  own.leave_results(results, outputs_of(warp));
  fold_warps<T, Policy::rows, Policy::head_dim>(d, work, results, outputs_of);
}

}  // namespace

}  // namespace transfuse::cuda
