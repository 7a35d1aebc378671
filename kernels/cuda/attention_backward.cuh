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

#include "cuda/attention_forward.cuh"

namespace transfuse::cuda {

// Tiles by head dimension. A warp of the second kernel holds the accumulators of dK and dV for 16 keys; where these do
// not fit the registers, blocks share the columns of both, and each takes the scores for itself.
template <class Type, int HeadDim, bool General>
struct AttentionGradPolicy {
  using T = Type;
  static constexpr bool general = General;
  static constexpr int head_dim = HeadDim, stages = 2;
  static constexpr int warps = 4, threads = warps * warp_size, warp_rows = 16;
  static constexpr int owned = warps * warp_rows;                // queries, or keys, of a block
  static constexpr int walked = HeadDim <= 96 ? 32 : 16;         // keys, or queries, of one step
  static constexpr int column_shares = HeadDim <= 128 ? 1 : 2;   // of dK and dV
  static constexpr int columns = HeadDim / column_shares;
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

// One pair of a query and a key: what its score is made of, and whether it takes part.
struct PairScore {
  float score, cap_slope;
  bool kept;
};

// From a product to a score, element by element: the general kernels of the backward look everything up where it lies.
template <class T>
__device__ __forceinline__ PairScore pair_score(const AttentionParams& p, const AttentionSequence& s, int head,
                                                int query, int key, bool inside, float product) {
  PairScore r{product, 1.0f, inside};
  if (p.mask.data && r.kept) r.kept = row_of<uint8_t>(p.mask, s.batch, head, query)[key * p.mask.col] != 0;
  if (!p.transforms) return r;
  float bias = 0;
  if (p.bias.data && r.kept) {
    bias = p.bias_in_float ? row_of<float>(p.bias, s.batch, head, query)[key * p.bias.col]
                           : to_float(row_of<T>(p.bias, s.batch, head, query)[key * p.bias.col]);
    r.kept = bias != -attention_infinity;
  }
  if (p.softcap > 0) {
    const TanhAndSlope capped = tanh_and_slope(product * p.scale_over_softcap);
    r.score = fmaf(capped.value, p.softcap, bias);
    r.cap_slope = capped.slope;
  } else {
    r.score = fmaf(product, p.scale, bias);
  }
  if (p.alibi_slopes) r.score = fmaf(-alibi_slope(p, s, head), distance(p, s, query, key), r.score);
  return r;
}

// What a pair needs of its row. A row without any key that takes part has a reference of -inf.
struct RowStatistics {
  float reference;   // a score near the row's lse, or its largest one
  float normaliser;  // P = normaliser * exp(score - reference)
  float delta;
};

struct PairGrad {
  float score, weight;                             // the weight before dropout
  float dropped_weight, grad_score, grad_product;  // P * D, dS, dR
  float cap_slope;
  bool kept;
};

// exp(logit_scale * difference), as exact as the type asks for; a NaN stays.
template <class T>
__device__ __forceinline__ float weight_of(const AttentionParams& p, float difference) {
  constexpr float largest = 64.0f;  // of exponents; only an lse that is not this row's has larger ones
  if constexpr (sizeof(T) == 4)
    return difference != difference     ? difference
        : difference * p.logit_scale > largest ? exp_nonpositive(largest, 0.0f)
                                               : exp_scaled(difference, p.logit_scale);
  return ptx::exp2_approx(difference * p.exp2_scale);
}

// P and dS of one pair. `rest` is what rounding took from the product.
template <class T, bool general>
__device__ __forceinline__ PairGrad pair_grad(const AttentionParams& p, const AttentionSequence& s, int head, int query,
                                              int key, bool inside, float product, float rest, float grad_weight,
                                              const RowStatistics& row) {
  PairScore of{product, 1.0f, inside};
  if constexpr (general) of = pair_score<T>(p, s, head, query, key, inside, product);
  PairGrad r{of.score, 0, 0, 0, 0, of.cap_slope, of.kept};
  if (!of.kept || row.reference == -attention_infinity) return r;
  const float difference = (of.score - row.reference) + rest * p.rest_scale;
  r.weight = r.dropped_weight = weight_of<T>(p, difference) * row.normaliser;
  if constexpr (general) {
    if (p.dropout_seed) {
      const PhiloxWords words = dropout_words(p, s, query, head, key / 4 * 4);
      const uint32_t low = key & 1 ? words.word[1] : words.word[0], high = key & 1 ? words.word[3] : words.word[2];
      const bool keeps = (key & 2 ? high : low) >= p.dropout_threshold && !p.drops_all;
      const float share = keeps ? p.dropout_scale : 0.0f;
      r.dropped_weight *= share;
      grad_weight *= share;
    }
  }
  r.grad_score = r.weight * (grad_weight - row.delta);
  r.grad_product = r.grad_score * of.cap_slope;
  return r;
}

// ---- what the sums of a row say ----

// From here on floats are too coarse for exp(score - lse) not to overflow: such a row is taken relative to its largest
// score, and products are what one float holds.
constexpr float huge_logit = 0x1p24f;
__device__ __forceinline__ bool is_huge(float logit) {
  return fabsf(logit) > huge_logit && fabsf(logit) < attention_infinity;
}

// lse as a score.
__device__ __forceinline__ float reference_of(float lse, float logit_scale) {
  const float score = lse / logit_scale;
  return isfinite(score) || !isfinite(lse) ? score : 0.0f;
}

// Over the keys of a row, with w = exp(score - reference).
struct RowSums {
  float weights, grads;    // of w, and of w * (dP - delta)
  float slope, distances;  // of -w * (dP - delta) * distance, and of w * distance
};

struct RowGrad {
  float normaliser, delta;
  float slope, sink, sum;  // the row's parts of dslope and dsink, and the sum of its dS
};

__device__ __forceinline__ double exp_in_range(double x) {
  constexpr double range = 690;  // of exp_wide
  return x != x ? x : exp_wide(fmin(fmax(x, -range), range));
}

// `row` has a normaliser of 1.
__device__ __forceinline__ RowGrad grad_of_row(const AttentionParams& p, int head, float lse, float grad_lse,
                                               const RowStatistics& row, const RowSums& sums) {
  constexpr double lse_rounding = 0x1p-20;  // a few ulp
  if (lse == -attention_infinity) return {0, -grad_lse, 0, 0, 0};
  const double logit = static_cast<double>(row.reference) * p.logit_scale;
  const double sink = p.sinks ? p.sinks[head] : -__builtin_huge_val();
  const double share = sink == -__builtin_huge_val() ? 0.0 : exp_in_range(sink - logit);
  const double whole = sums.weights + share, relative = exp_in_range(logit - lse);
  const double size = fmax(fabs(static_cast<double>(lse)), fabs(logit));
  const bool is_part = whole < __builtin_huge_val() && fabs(relative * whole - 1) > lse_rounding * (1 + size);
  const double factor = is_part ? relative : 1 / whole, normaliser = sums.weights == 0 ? 0.0 : factor;
  const double sum_of_products = normaliser * sums.grads + normaliser * sums.weights * row.delta;  // of P * dP
  const double delta = is_part ? row.delta : sum_of_products - grad_lse;
  return {static_cast<float>(normaliser),
          static_cast<float>(delta),
          static_cast<float>(normaliser * (sums.slope + (delta - row.delta) * sums.distances)),
          static_cast<float>(share == 0 ? 0.0 : -factor * share * delta),
          static_cast<float>(sum_of_products - normaliser * sums.weights * delta)};
}

// Leaves them for the kernels that follow. One lane of a row calls it.
__device__ __forceinline__ void write_row(const AttentionGradParams& g, const AttentionSequence& s, int head, int query,
                                          float reference, const RowGrad& of) {
  const int64_t row = s.query_row + query;
  row_of<float>(g.reference, s.batch, head, row)[0] = reference;
  row_of<float>(g.normaliser, s.batch, head, row)[0] = of.normaliser;
  row_of<float>(g.delta, s.batch, head, row)[0] = of.delta;
  const int64_t part = (s.batch * g.problem.num_heads + head) * g.problem.max_seqlen_q + query;
  if (g.slope_parts) g.slope_parts[part] = of.slope;
  if (g.sink_parts) g.sink_parts[part] = of.sink;
  if (g.row_sums) g.row_sums[part] = of.sum;
}

__device__ __forceinline__ RowStatistics read_row(const AttentionGradParams& g, const AttentionSequence& s, int head,
                                                  int query) {
  const int64_t row = s.query_row + query;
  return {row_of<float>(g.reference, s.batch, head, row)[0], row_of<float>(g.normaliser, s.batch, head, row)[0],
          row_of<float>(g.delta, s.batch, head, row)[0]};
}

// The element of a bias's gradient that belongs to a pair.
template <class T>
__device__ __forceinline__ void write_grad_bias(const AttentionGradParams& g, int64_t batch, int head, int query,
                                                int key, float value) {
  if (sizeof(T) == 4 || g.problem.bias_in_float)
    row_of<float>(g.grad_bias, batch, head, query)[key] = value;
  else
    row_of<T>(g.grad_bias, batch, head, query)[key] = from_float<T>(value);
}

// What rounding took from the products of 16 rows with Others others, as bfloat16: a share of 2^-9 of it decides
// nothing, and registers are scarce.
template <int Others>
struct ProductRests {
  uint32_t pairs[Others / 8][2];

  __device__ __forceinline__ float at(int n, int e) const {
    const uint32_t pair = pairs[n][e / 2];
    return __uint_as_float(e % 2 == 0 ? pair << 16 : pair & 0xFFFF0000u);
  }
};

// Products of 16 rows with all rows of another tile; in two floats where some row is saturated, else the rests are 0.
// In huge rows too: huge(n, e).
template <class T, int Others, class RowsTile, class OthersTile, class Huge>
__device__ __forceinline__ void careful_products(ScoreFragment<Others> (&products)[1], ProductRests<Others>& rests,
                                                 const RowsTile& rows, const OthersTile& others, int row, bool refine,
                                                 Huge huge) {
  multiply_keys(products, rows, others, row);
#pragma unroll
  for (int n = 0; n < Others / 8; ++n) rests.pairs[n][0] = rests.pairs[n][1] = 0;
  if (!refine) return;
  const RowsOperand<RowsTile> first(rows, row);
  const ProductsOperand<OthersTile> second(others);
#pragma unroll
  for (int n = 0; n < Others / 8; ++n) {
    Pair sums[4];
    multiply_in_two_floats<T, RowsTile::columns / 16>(sums, first, second, 8 * n);
    float rest[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool finite = isfinite(sums[e].hi + sums[e].lo);
      if (finite) products[0].x[n][e] = sums[e].hi;
      rest[e] = finite && !huge(n, e) ? sums[e].lo : 0.0f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) rests.pairs[n][half] = pair_of<bf16>(rest[2 * half], rest[2 * half + 1]);
  }
}

template <class Policy>
struct GradBlock {
  using T = typename Policy::T;
  static constexpr int walked = Policy::walked;
  const AttentionGradParams& g;
  const AttentionParams& p;
  const AttentionTask& task;
  const AttentionSequence& sequence;
  const typename Policy::OwnedTile first_owned, second_owned;      // queries and dO, or keys and values
  const typename Policy::WalkedTile first_walked, second_walked;   // of the ring's first stage: the others
  float* statistics;                                               // [stages][3][walked]: RowStatistics
  const int warp_row;

  __device__ __forceinline__ GradBlock(const AttentionGradParams& params, const AttentionTask& its_task, T* shared)
      : g(params),
        p(params.problem),
        task(its_task),
        sequence(its_task.sequence),
        first_owned{shared},
        second_owned{shared + Policy::owned * Policy::head_dim},
        first_walked{shared + 2 * Policy::owned * Policy::head_dim},
        second_walked{first_walked.data + Policy::stages * walked * Policy::head_dim},
        statistics(reinterpret_cast<float*>(second_walked.data + Policy::stages * walked * Policy::head_dim)),
        warp_row(static_cast<int>(threadIdx.x) / warp_size * Policy::warp_rows) {}

  __device__ __forceinline__ typename Policy::WalkedTile stage_of(const typename Policy::WalkedTile& first,
                                                                  int stage) const {
    return {first.data + stage * walked * Policy::head_dim};
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
  using Base::Base, Base::g, Base::p, Base::task, Base::sequence, Base::stage_of;

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
  __device__ __forceinline__ void load_keys(int key, int stage) const {
    const int left = sequence.seqlen_k - key;
    this->load(stage_of(this->first_walked, stage), p.key, task.kv_head, sequence.key_row + key, left, p.head_dim,
               p.whole_key);
    this->load(stage_of(this->second_walked, stage), p.value, task.kv_head, sequence.key_row + key, left,
               p.value_head_dim, p.whole_value);
  }
  __device__ __forceinline__ float& shared_sum(int number) const {
    return this->statistics[Policy::statistics_bytes / sizeof(float) + number * Policy::threads + threadIdx.x];
  }
  __device__ __forceinline__ void add_sums(int half, float weight_sum, float grad_sum) {
    if constexpr (Policy::sums_in_registers) {
      weights[half] = weights[half] + weight_sum;
      grads[half] = grads[half] + grad_sum;
    } else {
      shared_sum(half) += weight_sum;
      shared_sum(2 + half) += grad_sum;
    }
  }
  __device__ __forceinline__ bool huge(int half) const { return is_huge(rows[half].reference * p.logit_scale); }

  __device__ __forceinline__ void take_keys(int key, int stage, GradWalk walk) {
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
    const KeyRange seen = task.seen_by_some(p, 0, Policy::owned);
    const int first = seen.begin / keys * keys;
    int stage = 0;
    if (first < seen.end) load_keys(first, stage);
    ptx::cp_async_commit();
    for (int key = first; key < seen.end; key += keys) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage is there for all, and nobody reads the other one any more
      if (key + keys < seen.end) load_keys(key + keys, stage ^ 1);
      ptx::cp_async_commit();
      take_keys(key, stage, walk);
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
  const AttentionTask task(g.problem, Policy::owned, blockIdx.x);
  if (task.num_rows <= 0) return;
  QueryGradBlock<Policy> block(g, task, reinterpret_cast<typename Policy::T*>(dynamic_shared()));
  block.load_queries();
  GradWalk walk = __syncthreads_or(block.has_huge_rows()) ? GradWalk::maxima : GradWalk::all;
  for (;;) {
    block.walk_keys(walk);
    if (walk == GradWalk::maxima) {
      __syncthreads();  // nobody reads the last stage any more
      block.take_maxima();
      walk = GradWalk::all;
      continue;
    }
    if (walk == GradWalk::kept_alone || !g.problem.excludes) break;
    if (!__syncthreads_or(!block.is_finite(block.grad_query))) break;
    walk = GradWalk::kept_alone;
  }
  block.write_rows();
}

// ---- dK and dV: a tile of keys walks the queries that see it ----

template <class Policy>
struct KeyGradBlock : GradBlock<Policy> {
  using Base = GradBlock<Policy>;
  using T = typename Policy::T;
  static constexpr int queries = Policy::walked;
  const int key, first_column;  // of the tile, and of the block's share of the columns
  float grad_key[1][Policy::columns / 8][4], grad_value[1][Policy::columns / 8][4];
  float key_sum[2];  // of one head's dS, the thread's own part
  using Base::g, Base::p, Base::task, Base::sequence, Base::stage_of;

  __device__ __forceinline__ KeyGradBlock(const AttentionGradParams& params, const AttentionTask& its_task, T* shared,
                                          int first_key, int share)
      : Base(params, its_task, shared),
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
  __device__ __forceinline__ void load_queries(int head, int query, int stage) const {
    const int left = sequence.seqlen_q - query;
    this->load(stage_of(this->first_walked, stage), p.query, head, sequence.query_row + query, left, p.head_dim,
               p.whole_query);
    this->load(stage_of(this->second_walked, stage), g.grad_output, head, sequence.query_row + query, left,
               p.value_head_dim, g.whole_grad_output);
    for (int i = threadIdx.x; i < 3 * queries; i += Policy::threads)
      statistics_of(stage)[i] = this->statistic(
          i < queries ? g.reference : i < 2 * queries ? g.normaliser : g.delta, head, query + i % queries);
  }

  __device__ __forceinline__ void take_queries(int head, int query, int stage, bool kept_alone) {
    ScoreFragment<queries> scores[1], weights[1], grads[1];
    ProductRests<queries> rests;
    const float* statistics = statistics_of(stage);
    const bool saturated = is_saturated(statistics[lane_of_warp() % queries], p.logit_scale);
    const bool refine = p.softcap == 0 && __any_sync(whole_warp, saturated);
    careful_products<T>(scores, rests, this->first_owned, stage_of(this->first_walked, stage), this->warp_row, refine,
                        [&](int n, int e) {
                          return is_huge(statistics[8 * n + fragment_column() + e % 2] * p.logit_scale);
                        });
    multiply_keys(grads, this->second_owned, stage_of(this->second_walked, stage), this->warp_row);
    weights[0].excluded = 0;
#pragma unroll
    for (int n = 0; n < queries / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 8 * n + fragment_column() + i, at = query + column;
        const KeyRange seen = keys_of_query(p, sequence, min(at, sequence.seqlen_q - 1));
        const RowStatistics row = {statistics[column], statistics[queries + column], statistics[2 * queries + column]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int e = 2 * half + i, of_row = key + this->row_of_thread(half);
          const bool inside = at < sequence.seqlen_q && of_row >= seen.begin && of_row < seen.end;
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
      add_kept_values<T>(grad_value, weights, stage_of(this->second_walked, stage), chunk);
      add_kept_values<T>(grad_key, grads, stage_of(this->first_walked, stage), chunk);
    } else {
      add_values<T>(grad_value, weights, stage_of(this->second_walked, stage), chunk);
      add_values<T>(grad_key, grads, stage_of(this->first_walked, stage), chunk);
    }
  }

  __device__ __forceinline__ void walk_queries(bool kept_alone) {
    this->clear(grad_key);
    this->clear(grad_value);
    key_sum[0] = key_sum[1] = 0;
    const KeyRange seeing = queries_of_keys(p, sequence, key, rows());
    const int first = seeing.begin / queries * queries, group = p.num_heads / p.num_kv_heads;
    const int steps = seeing.end > first ? (seeing.end - first + queries - 1) / queries : 0;  // of a head
    // Which head and queries a step is about is found twice: a register that holds it would be wanted elsewhere.
    const auto head_of = [&](int step) { return task.kv_head * group + step / steps; };
    const auto query_of = [&](int step) { return first + step % steps * queries; };
    const auto load_step = [&](int step) {
      if (step < steps * group) load_queries(head_of(step), query_of(step), step % 2);
      ptx::cp_async_commit();
    };
    load_step(0);
    for (int step = 0; step < steps * group; ++step) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage is there for all, and nobody reads the other one any more
      load_step(step + 1);
      take_queries(head_of(step), query_of(step), step % 2, kept_alone);
      if (Policy::general && g.key_sums && (step + 1) % steps == 0) write_key_sums(head_of(step));
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
  const AttentionTask task(AttentionTask::KeysAlone{}, p, static_cast<int>(block_number % p.num_kv_heads),
                           block_number / p.num_kv_heads);
  if (key >= task.sequence.seqlen_k) return;
  KeyGradBlock<Policy> block(g, task, reinterpret_cast<typename Policy::T*>(dynamic_shared()), key, share);
  block.load_keys();
  for (bool kept_alone = false;; kept_alone = true) {
    block.walk_queries(kept_alone);
    if (kept_alone || !p.excludes) break;
    if (!__syncthreads_or(!block.is_finite(block.grad_key) || !block.is_finite(block.grad_value))) break;
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
