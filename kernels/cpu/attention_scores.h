// From products to weights: which pairs take part, what turns q * k into a score, and what turns a score into a weight.
//
//   score = softcap(scale * q * k) + bias - slope * abs(query + offset - key)      softcap(s) = cap * tanh(s / cap)
//
// Forward and backward share every line of it, so that the backward meets the forward's scores bit for bit.
// Policy: a plain score is kept without its scale, which enters inside exp, where the product is not rounded; a score
// that something is added to needs the scale first. Where a window begins after key 0, whole blocks of keys are
// skipped, counted from the sequence's own key 0, so a row has the same bits whatever was skipped.
#pragma once

#include "attention_panels.h"
#include "tanh.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

constexpr int64_t key_block = 128;  // one panel of scores is 8 KiB of floats: it stays in the first-level cache

// ---- which keys ----

// The key that stands opposite query 0.
TRANSFUSE_INLINE int64_t diagonal(const AttentionParams& p, const AttentionSequence& s) {
  return p.bottom_right ? s.seqlen_k - s.seqlen_q : 0;
}
// By window, causality and length keys [key_begin, key_end) take part in row `query`. Neither falls as query grows.
TRANSFUSE_INLINE int64_t key_begin(const AttentionParams& p, const AttentionSequence& s, int64_t query) {
  return larger(0, smaller(query + diagonal(p, s) - p.window_left, s.seqlen_k));
}
TRANSFUSE_INLINE int64_t key_end(const AttentionParams& p, const AttentionSequence& s, int64_t query) {
  return larger(0, smaller(query + diagonal(p, s) + p.window_right + 1, s.seqlen_k));
}
// The block of keys that a row starts with.
TRANSFUSE_INLINE int64_t first_block(const AttentionParams& p, const AttentionSequence& s, int64_t query) {
  return key_begin(p, s, query) / key_block * key_block;
}

// Keys from here on are excluded for all queries by a mask or bias that is the same for all of them (padding): their
// zeros need not be added.
int64_t padding_start(const AttentionParams& p, const AttentionSequence& s, int64_t head, int64_t stop) {
  if (p.mask.data && p.mask.row == 0)
    while (stop > 0 && at<byte>(p.mask, s.batch, head, 0, stop - 1)->value == 0) --stop;
  if (p.bias.data && p.bias.row == 0)
    with_type(p.bias, s.batch, head, 0, 0, [&](auto* first) {
      while (stop > 0 && to_real(first[(stop - 1) * p.bias.col]) == -infinity) --stop;
    });
  return stop;
}

// One panel of scores, [keys][16 queries]: rows [query, query + rows) of one head against keys [key, key + keys).
struct ScorePanel {
  const AttentionParams& p;
  const AttentionSequence& s;
  int64_t head, query, rows, key, keys;

  // How far query 0 of the panel stands after its key 0, measured from the diagonal.
  int64_t lead() const { return query + diagonal(p, s) - key; }
  // Whether every row takes every key, as far as can be told without reading a mask or bias.
  bool takes_all() const {
    if (p.mask.data || p.bias.data) return false;
    return key + keys <= key_end(p, s, query) && key >= key_begin(p, s, query + rows - 1);
  }
};

// keep = 1 where the pair takes part, 0 where it is excluded, by the one predicate of all kinds of exclusion. On entry
// the mask's tile is in `keep`, the bias's in `bias`. Says whether some pair is excluded.
bool find_excluded(const ScorePanel& t, const real* bias, real* keep) {
  const AttentionParams& p = t.p;
  const vec lane = lane_index(), one = fill(1), none = fill(0), nothing = fill(-infinity);
  const bool masked = p.mask.data, biased = p.bias.data;  // stores below may alias p, but not these
  const int64_t first_right = -t.lead() - p.window_right, first_left = p.window_left - t.lead();
  vec all_kept = one;
  for (int64_t j = 0; j < t.keys; ++j) {
    vec kept = masked ? load_row(keep + j * panel) : one;
    const int64_t from = first_right + j, to = first_left + j;  // lanes [from, to] see key + j
    if (from > 0) kept = select(lane < fill(static_cast<real>(smaller(from, panel))), none, kept);
    if (to < panel - 1) kept = select(lane > fill(static_cast<real>(larger(to, -1))), none, kept);
    if (biased) kept = select(load_row(bias + j * panel) == nothing, none, kept);
    all_kept = min(all_kept, kept);
    store_row(keep + j * panel, kept);
  }
  return any(all_kept == none);
}

// ---- from product to score ----

// A negative scale is moved into the queries, so that the largest score is the largest logit.
TRANSFUSE_INLINE real query_sign(const AttentionParams& p) { return p.scale < 0 ? -1 : 1; }
TRANSFUSE_INLINE real score_scale(const AttentionParams& p) {
  return static_cast<real>(p.scale < 0 ? -p.scale : p.scale);
}
// Whether a stored score is more than the product: it then has its scale.
TRANSFUSE_INLINE bool transforms(const AttentionParams& p) { return p.bias.data || p.alibi_slopes || p.softcap > 0; }
// What a stored score has still to be multiplied by.
TRANSFUSE_INLINE real logit_scale(const AttentionParams& p) { return transforms(p) ? 1 : score_scale(p); }

// scale, softcap, bias and ALiBi of one head, in float or double.
template <class V, class Real>
struct ScoreTransform {
  V scale, cap, scale_over_cap, slope;
  bool capped, biased, sloped;

  ScoreTransform(const AttentionParams& p, const AttentionSequence& s, int64_t head)
      : capped(p.softcap > 0), biased(p.bias.data), sloped(p.alibi_slopes) {
    const double size = p.scale < 0 ? -p.scale : p.scale;
    scale = splat<V>(static_cast<Real>(size));
    cap = splat<V>(static_cast<Real>(p.softcap));
    constexpr double largest = 0x1.fffffep127;  // a float; so that a tiny cap makes 0 * largest of a score of 0
    scale_over_cap = splat<V>(static_cast<Real>(capped ? __builtin_fmin(size / p.softcap, largest) : 0.0));
    slope = splat<V>(static_cast<Real>(sloped ? p.alibi_slopes[s.batch * p.alibi_batch + head] : 0.0));
  }
  // The score, and d softcap(s) / ds into cap_slope. Without bias, slope or softcap theirs are not looked at.
  TRANSFUSE_INLINE V operator()(V product, V bias, V distance, V& cap_slope) const {
    V score;
    if (capped) {
      const TanhAndSlope<V> t = tanh_and_slope(product * scale_over_cap);
      score = biased ? fma(t.value, cap, bias) : t.value * cap;
      cap_slope = t.slope;
    } else {
      score = biased ? fma(product, scale, bias) : product * scale;
    }
    return sloped ? fnma(slope, abs(distance), score) : score;
  }
};

// From products to scores, in place. `keep` receives which pairs take part unless the panel takes_all(), `bias` is
// scratch for its tile, `cap_slopes`, null or not, receives d softcap(s) / ds. Says whether some pair is excluded.
bool finish_scores(const ScorePanel& t, real* scores, real* keep, real* bias, real* cap_slopes) {
  const AttentionParams& p = t.p;
  const AttentionSequence& s = t.s;
  if (p.mask.data) pack_tile(at<byte>(p.mask, s.batch, t.head, t.query, t.key), p.mask, t.rows, t.keys, keep);
  if (p.bias.data)
    with_type(p.bias, s.batch, t.head, t.query, t.key,
              [&](auto* first) { pack_tile(first, p.bias, t.rows, t.keys, bias); });
  if (transforms(p)) {
    const ScoreTransform<vec, real> transform(p, s, t.head);
    const vec lead = lane_index() + fill(static_cast<real>(t.lead()));
    const vec none = fill(0);
    vec cap_slope = none;
    for (int64_t j = 0; j < t.keys; ++j) {
      const vec added = transform.biased ? load_row(bias + j * panel) : none;
      const vec distance = lead - fill(static_cast<real>(j));
      store_row(scores + j * panel, transform(load_row(scores + j * panel), added, distance, cap_slope));
      if (cap_slopes) store_row(cap_slopes + j * panel, cap_slope);
    }
  }
  return !t.takes_all() && find_excluded(t, bias, keep);
}

// ---- from score to weight ----

// exp(scale * difference) for difference <= 0, <= 1 ULP, since the product is not rounded.
struct ScaledExp {
#ifdef TRANSFUSE_ATTENTION_DOUBLE
  wide scale, lowest;

  TRANSFUSE_INLINE explicit ScaledExp(double s) : scale(fill(s)), lowest(fill(finite_bound(exp_full_lowest, s))) {}
  TRANSFUSE_INLINE wide operator()(wide difference) const {
    const wide d = max(lowest, difference), x = d * scale;  // in this order a NaN is kept
    return exp_full(x, fms(d, scale, x));                   // a level without FMA finds a residual of 0
  }
#else
  f32 scale, scale_log2e, lowest;

  TRANSFUSE_INLINE explicit ScaledExp(float s) : scale(set1(s)), scale_log2e(set1(s * exp_log2e)) {
    constexpr float zero_from = -88.0f;  // e^-88 < 2^-126: weights below that are 0
    lowest = set1(finite_bound(zero_from, s));
  }
  TRANSFUSE_INLINE f32 operator()(f32 difference) const {
    const f32 integer = set1(exp_integer + 127.0f);  // the low bits of the sum are the biased exponent, 0 from e^-88 on
    const f32 d = max(lowest, difference);           // in this order a NaN is kept
    const f32 shifted = fma(d, scale_log2e, integer);
    const f32 n = shifted - integer;
    const f32 r = fnma(n, set1(exp_ln2_lo), fma(d, scale, n * set1(-exp_ln2_hi)));  // n * ln2_hi is exact
    return exp_polynomial(r) * from_bits(shift_left<23>(bits(shifted)));
  }
#endif
  // lowest / s, but finite, since -inf * scale - n ln 2 is NaN.
  static real finite_bound(double lowest, real s) {
    constexpr double largest = in_double ? 0x1.fffffffffffffp1023 : 0x1.fffffep127;
    return s > 0 ? static_cast<real>(__builtin_fmax(-largest, lowest / s)) : 0;
  }
};

// The largest kept score of each row; keep is null where all are. A NaN score is passed over: it shows in the sum.
vec row_maximum(const real* scores, const real* keep, int64_t n) {
  const vec nothing = fill(-infinity);
  vec most[4] = {nothing, nothing, nothing, nothing};
  int64_t j = 0;
  const auto take = [&](int64_t at, vec& m) {
    const vec score = load_row(scores + at * panel);
    m = max(keep ? select(load_row(keep + at * panel) > fill(0), score, nothing) : score, m);  // m where score is NaN
  };
  for (; j + 4 <= n; j += 4)
    for (int64_t u = 0; u < 4; ++u) take(j + u, most[u]);
  for (; j < n; ++j) take(j, most[0]);
  return max(max(most[0], most[1]), max(most[2], most[3]));
}

// What a sink adds to a sum of weights exp(logit - top), NaN for a NaN or +inf sink; top is -inf without any key.
TRANSFUSE_INLINE double sink_weight(double sink, double top) {
  if (sink == -__builtin_inf()) return 0.0;
  if (sink == __builtin_inf()) return __builtin_nan("");
  return __builtin_exp(sink - top);
}

// ---- saturated rows ----
//
// A score of size x carries an absolute error of about x * 2^-24, and exp makes it a relative error of the weights.
// Rows whose largest logit is beyond saturated_logit therefore compute their leading scores again in double, and keep
// all scores relative to an anchor of the row's size, so that rounding them to float costs nothing that matters. Where
// the kernel computes in double there is nothing wider, and no row counts as saturated.

constexpr float saturated_logit = 128.0f;
constexpr float leading_logits = 32.0f;     // e^-32 of the largest weight is below the rounding of the sum
constexpr float score_rounding = 0x1p-15f;  // a bound of a score's relative error, for what may be leading

TRANSFUSE_INLINE vec_mask saturated(vec maximum, real scale) {
  const vec size = abs(maximum) * fill(scale);
  return (size > fill(in_double ? infinity : static_cast<real>(saturated_logit))) & (size < fill(infinity));
}

struct RowState {
  vec_mask refine;
  vec anchor, maximum;  // of the rows to refine; the largest score found so far, not relative to the anchor
};

// scores[key] - anchor, in rows (lanes) of `refine` exact to one rounding where the score may lead given the row's
// maximum. `operands` are what the scores are products of.
template <class Operands>
void refine_scores(const ScorePanel& t, const Operands& operands, const real* bias, const RowState& row, real* scores) {
  const AttentionParams& p = t.p;
  const vec lead = lane_index() + fill(static_cast<real>(t.lead()));
  const vec slack = fma(abs(row.maximum), fill(score_rounding), fill(leading_logits / logit_scale(p)));
  const vec leading = row.maximum - slack;
  const ScoreTransform<wide, double> transform(p, t.s, t.head);
  for (int64_t j = 0; j < t.keys; ++j) {
    const vec score = load_row(scores + j * panel);
    const vec_mask leads = row.refine & (score >= leading);
    vec shifted = score - row.anchor;
    if (any(leads)) {
      wide exact = splat<wide>(0);
      for (int64_t d = 0; d < p.head_dim; ++d)
        exact = fma(to_wide(operands.query(d)), splat<wide>(operands.key(j, d)), exact);
      if (transforms(p)) {
        const wide added = transform.biased ? to_wide(load_row(bias + j * panel)) : exact;
        wide cap_slope = exact;
        exact = transform(exact, added, to_wide(lead - fill(static_cast<real>(j))), cap_slope);
      }
      shifted = select(leads, from_wide(exact - to_wide(row.anchor)), shifted);
    }
    store_row(scores + j * panel, shifted);
  }
}

}  // namespace
}  // namespace transfuse::cpu::TRANSFUSE_ISA
