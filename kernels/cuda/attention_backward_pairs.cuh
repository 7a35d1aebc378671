// What every kernel of attention's backward makes of one pair of a query and a key, and of the sums over a row.
// Method and numerics: attention_backward.cuh.
#pragma once

#include "cuda/attention_dropout.cuh"
#include "cuda/attention_softmax.cuh"

namespace transfuse::cuda {

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

}  // namespace

}  // namespace transfuse::cuda
