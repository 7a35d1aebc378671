// Attention backward: gradients of query, key, value, bias, slopes and sinks for one key/value head of one sequence.
//
//   P = softmax(scores)       D = 1 / (1 - p) where dropout keeps, else 0
//   dV = (P * D)^T dO         dP = D * (dO V^T)
//   dS = P * (dP - delta)     delta = sum of P * dP, less the gradient of lse
//   dbias = dS                dslope = -dS * distance        dsink = -P_sink * delta
//   dR = dS * cap_slope       dQ = scale * dR K              dK = scale * dR^T Q
//
// where dbias, dslope and dsink are summed over the dimensions in which their argument was broadcast.
//
// A tile of 32 queries holds its weights and dP against all keys of its sequence, [key][16 queries] as in the forward
// (linear in the length, never Lq x Lk), so each of the five products is computed once.
// Policy: maximum and sum are computed again from the scores. lse is rounded at the size of the largest logit, and
// exp(score - lse) would carry its rounding error, 5e-4 at logits of 1e4; likewise delta from P * dP, since that of the
// rounded output carries the error of the storage type. Queries are walked in order, heads of a group in order, so the
// sums of dK, dV and dbias have one order whatever the number of threads. Where bfloat16 is multiplied in pairs, float
// panels of the operands are packed only where something is careful (attention_backward_pairs.h).
#include "attention_backward_pairs.h"
#include "attention_dropout.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

constexpr int64_t tile = 32;  // queries; as many as `chain`, so that dK and dV are read and written once per chain
constexpr int64_t keys_per_step = 4;  // of prefetching
constexpr real lse_rounding = in_double ? 0x1p-49 : 0x1p-20f;  // a few ulp

struct Scratch {
  int64_t length;                          // keys of the sequence
  real *keys, *values;                     // [D / 16][length][16], [Dv / 16][length][16]
  real *grad_keys, *grad_values;           // the same
  real *queries, *grads;                   // [D / 16][tile][16], [Dv / 16][tile][16]: query and grad_output
  real *queries_across, *grads_across;     // [tile / 16][D][16], [tile / 16][Dv][16]: transposed
  real* score_keys;                        // keys again, where scores take them in pairs
  real* grad_queries;                      // [D / 16][tile][16]
  real *weights, *grad_scores, *keep;      // [tile / 16][length][16]
  real *cap_slopes, *draws;                // the same, with softcap and with dropout: 0 or 1 / (1 - p)
  real* bias;                              // [key_block][16]
  PairScratch pairs;                       // where the products take pairs
  bool float_keys;                         // whether keys and values are packed
  bool careful_keys;                       // of pairs: whether there are

  Scratch(const AttentionParams& p, int64_t seqlen_k, Arena& arena)
      : length(seqlen_k), pairs(p, multiplies_pairs(p) ? seqlen_k : 0, arena), float_keys(false), careful_keys(false) {
    const int64_t d = panels(p.head_dim) * panel, dv = panels(p.value_head_dim) * panel;
    keys = arena.take(length * d);
    values = arena.take(length * dv);
    grad_keys = arena.take(length * d);
    grad_values = arena.take(length * dv);
    queries = arena.take(tile * d);
    grads = arena.take(tile * dv);
    queries_across = arena.take(tile * d);
    grads_across = arena.take(tile * dv);
    score_keys = multiplies_pairs(p) ? arena.take(length * d) : keys;
    grad_queries = arena.take(tile * d);
    weights = arena.take(tile * length);
    grad_scores = arena.take(tile * length);
    keep = arena.take(tile * length);
    cap_slopes = p.softcap > 0 ? arena.take(tile * length) : nullptr;
    draws = p.dropout.probability > 0 ? arena.take(tile * length) : nullptr;
    bias = arena.take(key_block * panel);
  }
};

// One tile: where it stands and what must be looked after.
struct Tile {
  const AttentionBackwardParams& params;
  const AttentionParams& p;
  const AttentionSequence& sequence;
  Scratch& s;
  int64_t head, query, rows;  // rows of [query, query + tile) that exist
  int64_t first_key, keys;    // [first_key, first_key + keys) holds every key that some row sees, from a block's start
  bool finite_keys, finite_queries, finite_grads;
  Prefetch& prefetch;
  bool careful_queries, float_queries;  // of pairs: whether there are; whether queries and grads are packed

  // Panels of the rows from r on, at the tile's first key.
  real* weights(int64_t r) const { return s.weights + r * s.length + first_key * panel; }
  real* grad_scores(int64_t r) const { return s.grad_scores + r * s.length + first_key * panel; }
  real* keep(int64_t r) const { return s.keep + r * s.length + first_key * panel; }
  real* cap_slopes(int64_t r) const { return s.cap_slopes + r * s.length + first_key * panel; }
  real* draws(int64_t r) const { return s.draws + r * s.length + first_key * panel; }
  int64_t panel_rows(int64_t r) const { return smaller(panel, rows - r); }
  // The panel at row r against n keys, the first of them `key` after the tile's first.
  ScorePanel scores(int64_t r, int64_t key, int64_t n) const {
    return {p, sequence, head, query + r, panel_rows(r), first_key + key, n};
  }
  ScoreOperands operands(int64_t r, int64_t key) const {
    return {p, s.queries_across + r * p.head_dim, s.score_keys, s.length, first_key + key};
  }
  bool takes_all(int64_t r, int64_t key, int64_t n) const { return scores(r, key, n).takes_all(); }
  // Whether 0 * inf or 0 * NaN of an excluded pair could enter a product.
  bool guarded() const {
    return !(finite_keys && finite_queries && finite_grads) &&
        !ScorePanel{p, sequence, head, query, rows, first_key, keys}.takes_all();
  }
  // body(key, n) per block; key counts from the tile's first.
  template <class Body>
  void for_each_block(Body body) const {
    for (int64_t key = 0; key < keys; key += key_block) body(key, smaller(key_block, keys - key));
  }
};

// The float panels of the sequence's keys and values. Says whether all keys are finite.
bool pack_float_keys(const AttentionParams& p, const AttentionSequence& sequence, int64_t kv_head, Scratch& s) {
  const int64_t batch = sequence.batch, row = sequence.key_row;
  s.float_keys = true;
  pack_tensor_rows(p.value, batch, kv_head, row, s.length, p.value_head_dim, s.values, s.length);
  return pack_tensor_rows(p.key, batch, kv_head, row, s.length, p.head_dim, s.keys, s.length);
}

// The float panels of the tile's queries and grad_output.
void pack_float_queries(Tile& t) {
  const int64_t batch = t.sequence.batch, row = t.sequence.query_row + t.query, dv = t.p.value_head_dim;
  const AttentionTensor& grad = t.params.grad_output;
  t.float_queries = true;
  t.finite_queries = pack_tensor_rows(t.p.query, batch, t.head, row, t.rows, t.p.head_dim, t.s.queries, tile);
  t.finite_grads = pack_tensor_rows(grad, batch, t.head, row, t.rows, dv, t.s.grads, tile);
  for (int64_t r = 0; r < t.rows; r += panel)
    pack_tensor_transposed(grad, batch, t.head, row + r, t.panel_rows(r), dv, 1, t.s.grads_across + r * dv);
}

// Whatever float panels are missing, for what the pairs leave out.
void pack_floats(Tile& t) {
  if (!t.s.float_keys) pack_float_keys(t.p, t.sequence, t.head / (t.p.num_heads / t.p.num_kv_heads), t.s);
  if (!t.float_queries) pack_float_queries(t);
}

// Scores of one block of keys for the panel at row r into weights(r), and what it excludes into keep(r).
void score_block(const Tile& t, int64_t r, int64_t key, int64_t n) {
  const Scratch& s = t.s;
  real* scores = t.weights(r) + key * panel;
  real* keep = t.keep(r) + key * panel;
  t.operands(r, key).find_scores(n, scores);
  const ScorePanel scored = t.scores(r, key, n);
  const bool takes_all = scored.takes_all();
  if (transforms(t.p) || !takes_all)
    finish_scores(scored, scores, keep, s.bias, s.cap_slopes ? t.cap_slopes(r) + key * panel : nullptr);
  if (takes_all && t.guarded())
    for (int64_t j = 0; j < n; ++j) store_row(keep + j * panel, fill(1));
}

struct Maximum {
  vec value, anchor;  // the scores are relative to anchor, 0 but in saturated rows
};

// Scores of the panel at row r into weights(r).
Maximum score_panel(const Tile& t, int64_t r) {
  const auto maximum_of_block = [&](int64_t key, int64_t n) {
    return row_maximum(t.weights(r) + key * panel, t.takes_all(r, key, n) ? nullptr : t.keep(r) + key * panel, n);
  };
  vec maximum = fill(-infinity);
  t.for_each_block([&](int64_t key, int64_t n) {
    score_block(t, r, key, n);
    maximum = max(maximum, maximum_of_block(key, n));
  });
  const vec_mask refine = saturated(maximum, logit_scale(t.p));
  if (!any(refine)) return {maximum, fill(0)};
  const vec anchor = select(refine, maximum, fill(0));
  vec refined = fill(-infinity);
  t.for_each_block([&](int64_t key, int64_t n) {
    score_block(t, r, key, n);  // again: refining needs the block's bias
    refine_scores(t.scores(r, key, n), t.operands(r, key), t.s.bias, {refine, anchor, maximum},
                  t.weights(r) + key * panel);
    refined = max(refined, maximum_of_block(key, n));
  });
  return {refined, anchor};
}

// weights(r) = exp(logit - maximum), and their sums.
vec weigh_panel(const Tile& t, int64_t r, vec maximum) {
  const ScaledExp weight(logit_scale(t.p));
  const vec shift = select(maximum == fill(-infinity), fill(0), maximum);  // where every score is -inf: weights of 0
  vec total[4] = {fill(0), fill(0), fill(0), fill(0)};
  t.for_each_block([&](int64_t key, int64_t n) {
    real* weights = t.weights(r) + key * panel;
    const real* keep = t.keep(r) + key * panel;
    with_constant(t.takes_all(r, key, n), [&](auto plain) __attribute__((always_inline)) {
      vec sums[4] = {total[0], total[1], total[2], total[3]};  // local, so that they stay in registers
      for_each_in_fours(n, [&](int64_t j, auto u) __attribute__((always_inline)) {
        if (u == 0) t.prefetch.step();
        vec w = weight(load_row(weights + j * panel) - shift);
        if (!plain) w = select(load_row(keep + j * panel) > fill(0), w, fill(0));
        sums[u] = sums[u] + w;
        store_row(weights + j * panel, w);
      });
      for (int u = 0; u < 4; ++u) total[u] = sums[u];
    });
  });
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// The rows' entries of a [B, H, L] statistic, absent rows 0.
vec load_statistic(const Tile& t, const AttentionTensor& statistic, int64_t r) {
  return load_strided(at<real>(statistic, t.sequence.batch, t.head, t.sequence.query_row + t.query + r, 0),
                      statistic.row, t.panel_rows(r));
}

// sum of grad_output * output of one row.
real output_dot(const Tile& t, int64_t r) {
  const AttentionTensor& output = t.params.output;
  vec sum = fill(0);
  for_each_vec(t.p.value_head_dim, [&](int64_t c, int64_t n) {
    const vec o = with_type(output, t.sequence.batch, t.head, t.sequence.query_row + t.query + r, c,
                            [&](auto* x) { return load_strided(x, output.col, n); });
    sum = fma(load_row(t.s.grads + c * tile + r * panel), o, sum);
  });
  return static_cast<real>(reduce_add(sum));
}

// What the sink adds to each row's sum of weights, relative to the row's maximum.
vec sink_weights(const Tile& t, Maximum maximum) {
  alignas(64) real top[panel], anchor[panel], added[panel];
  store_row(top, maximum.value);
  store_row(anchor, maximum.anchor);
  for (int64_t i = 0; i < panel; ++i) {
    const double logit = (static_cast<double>(top[i]) + anchor[i]) * logit_scale(t.p);
    added[i] = static_cast<real>(sink_weight(t.p.sinks[t.head], top[i] == -infinity ? -__builtin_inf() : logit));
  }
  return load_row(added);
}

// P_sink = added / (sum + added) of `whole` rows, else exp(sink - lse); its gradient is -P_sink * delta.
void add_grad_sink(const Tile& t, int64_t r, vec added, vec sum, vec delta, vec lse, vec_mask whole) {
  const double sink = t.p.sinks[t.head];
  if (sink == -__builtin_inf()) return;
  alignas(64) real a[panel], s[panel], d[panel], l[panel], w[panel];
  store_row(a, added);
  store_row(s, sum);
  store_row(d, delta);
  store_row(l, lse);
  store_row(w, select(whole, fill(1), fill(0)));
  double& grad = t.params.grad_sinks[t.sequence.batch * t.p.num_heads + t.head];
  for (int64_t i = 0; i < t.panel_rows(r); ++i) {
    const double share = w[i] != 0 ? 1.0 / (1.0 + static_cast<double>(s[i]) / a[i]) : __builtin_exp(sink - l[i]);
    grad -= share * d[i];
  }
}

// dP of one block of keys for the panel at row r.
void find_grad_weights(const Tile& t, int64_t r, int64_t key, int64_t n, real* out) {
  const Scratch& s = t.s;
  const int64_t dv = t.p.value_head_dim, first = t.first_key + key;
  const auto in_floats = [&](real* to) {
    product<Along::rows>(s.values + first * panel, s.length * panel, s.grads_across + r * dv, dv, to, n, false);
  };
  if (!multiplies_pairs(t.p)) return in_floats(out);
  const int64_t row = row_pairs(dv);
  pair_product(s.pairs.values + first * row, row, 1, s.pairs.grads_across + r * row, pairs(dv),
               reinterpret_cast<float*>(out), n, false);
  if (!s.careful_keys && !t.careful_queries) return;
  in_floats(s.pairs.grad_weights);
  const vec_mask of_queries = load_row(s.pairs.careful_queries + r) > fill(0);
  for (int64_t j = 0; j < n; ++j) {
    const vec_mask careful = of_queries | (fill(s.pairs.careful_keys[first + j]) > fill(0));
    store_row(out + j * panel, select(careful, load_row(s.pairs.grad_weights + j * panel), load_row(out + j * panel)));
  }
}

// V at an excluded key may be anything, and the normaliser of a NaN row is NaN.
TRANSFUSE_INLINE void clear_excluded(const real* keep, vec& weight, vec& grad) {
  const vec_mask kept = load_row(keep) > fill(0);
  weight = select(kept, weight, fill(0));
  grad = select(kept, grad, fill(0));
}

// weights(r) become P, or P * D with dropout, and grad_scores(r) become dS.
void differentiate_panel(Tile& t, int64_t r, Maximum maximum, vec sum) {
  Scratch& s = t.s;
  const vec added = t.p.sinks ? sink_weights(t, maximum) : fill(0);
  const vec total = t.p.sinks ? sum + added : sum;
  // lse is that of these very keys, or of more keys when a longer row was computed in parts (ring attention): then it
  // is P's true normaliser, and delta is that of the whole row. The weight of this part tells the two apart.
  const vec lse = load_statistic(t, t.params.problem.lse, r);
  const vec scale = fill(logit_scale(t.p));
  const vec part = exp_any(fma(maximum.value, scale, fms(maximum.anchor, scale, lse))) * total;
  const vec size = max(abs(lse), abs((maximum.value + maximum.anchor) * scale));
  const vec rounding = fma(size, fill(lse_rounding), fill(lse_rounding));
  const vec_mask all_sink = total == fill(infinity);  // next to the sink the keys weigh nothing
  const vec_mask whole = ~(abs(part - fill(1)) > rounding) | all_sink;
  const vec share = select(whole, fill(1), part) / total;
  const vec normaliser = select(sum > fill(0), share, select(isnan(sum), sum, fill(0)));

  const bool drops = s.draws;
  if (drops) {
    const double p = t.p.dropout.probability;
    const vec scaled = fill(static_cast<real>(p < 1.0 ? 1.0 / (1.0 - p) : 0.0));
    for_each_draw(t.scores(r, 0, t.keys),
                  [&](int64_t j, vec kept) { store_row(t.draws(r) + j * panel, kept * scaled); });
  }
  vec deltas[2] = {fill(0), fill(0)};
  t.for_each_block([&](int64_t key, int64_t n) {
    real* weights = t.weights(r) + key * panel;
    real* grad_weights = t.grad_scores(r) + key * panel;
    const real* keep = t.keep(r) + key * panel;
    const real* draws = drops ? t.draws(r) + key * panel : nullptr;
    find_grad_weights(t, r, key, n, grad_weights);
    const bool takes_all = t.takes_all(r, key, n);
    with_constant(takes_all && !drops, [&](auto plain) __attribute__((always_inline)) {
      for_each_in_fours(n, [&](int64_t j, auto u) __attribute__((always_inline)) {
        if (u == 0) t.prefetch.step();
        vec w = load_row(weights + j * panel) * normaliser;
        vec g = load_row(grad_weights + j * panel);
        if (!plain) {
          if (!takes_all) clear_excluded(keep + j * panel, w, g);
          if (draws) g = g * load_row(draws + j * panel);
          store_row(grad_weights + j * panel, g);
        }
        deltas[u % 2] = fma(w, g, deltas[u % 2]);
      });
    });
  });
  vec delta = deltas[0] + deltas[1];
  if (!all(whole)) {
    if (!t.float_queries) pack_float_queries(t);
    alignas(64) real of_row[panel];
    for (int64_t i = 0; i < panel; ++i) of_row[i] = r + i < t.rows ? output_dot(t, r + i) : 0;
    delta = select(whole, delta, load_row(of_row));
  }
  if (t.params.grad_lse.data) delta = delta - load_statistic(t, t.params.grad_lse, r);
  if (t.params.grad_sinks) add_grad_sink(t, r, added, sum, delta, lse, whole);
  t.for_each_block([&](int64_t key, int64_t n) {
    real* weights = t.weights(r) + key * panel;
    real* grad_scores = t.grad_scores(r) + key * panel;
    const real* keep = t.keep(r) + key * panel;
    const real* draws = drops ? t.draws(r) + key * panel : nullptr;
    const bool takes_all = t.takes_all(r, key, n);
    with_constant(takes_all && !drops, [&](auto plain) __attribute__((always_inline)) {
      for_each_in_fours(n, [&](int64_t j, auto) __attribute__((always_inline)) {
        vec w = load_row(weights + j * panel) * normaliser;
        vec g = w * (load_row(grad_scores + j * panel) - delta);
        if (!plain) {
          if (!takes_all) clear_excluded(keep + j * panel, w, g);
          if (draws) w = w * load_row(draws + j * panel);
        }
        store_row(weights + j * panel, w);
        store_row(grad_scores + j * panel, g);
      });
    });
  });
}

// out[row] += sum over the tile's queries of A[query][row] * b[query], for the tile's keys as rows.
void add_over_queries(const Tile& t, const real* a, const real* b, int64_t cols, bool finite, real* out) {
  const int64_t a_panel = t.s.length * panel;
  for (int64_t c = 0; c < panels(cols); ++c) {
    const real* bc = b + c * tile * panel;
    real* to = out + (c * t.s.length + t.first_key) * panel;
    if (finite || !t.guarded())
      product<Along::rows>(a, a_panel, bc, t.rows, to, t.keys, true);
    else
      product_of_kept<Along::rows>(a, t.keep(0), a_panel, bc, t.rows, to, t.keys, true);
  }
}

void find_grad_queries(const Tile& t) {
  for (int64_t r = 0; r < t.rows; r += panel) {
    for (int64_t c = 0; c < panels(t.p.head_dim); ++c) {
      const real* keys = t.s.keys + (c * t.s.length + t.first_key) * panel;
      real* to = t.s.grad_queries + (c * tile + r) * panel;
      if (t.finite_keys || !t.guarded())
        product<Along::columns>(t.grad_scores(r), panel * panel, keys, t.keys, to, t.panel_rows(r), false);
      else
        product_of_kept<Along::columns>(t.grad_scores(r), t.keep(r), panel * panel, keys, t.keys, to, t.panel_rows(r),
                                        false);
    }
  }
}

void add_grad_bias(const Tile& t, int64_t r) {
  const AttentionBiasGrad& g = t.params.grad_bias;
  const int64_t rows = t.panel_rows(r);
  const vec_mask exists = lane_index() < fill(static_cast<real>(rows));
  double* out = g.data + t.sequence.batch * g.batch + t.head * g.head + (t.query + r) * g.row + t.first_key * g.col;
  const real* grad_scores = t.grad_scores(r);
  if (g.row != 0 && g.col == 1) {  // nothing is summed here: sixteen keys at a time, as they lie in memory
    for_each_vec(t.keys, [&](int64_t j, int64_t n) {
      alignas(64) real by_query[panel * panel];
      vec grads[panel];
      for (int64_t i = 0; i < panel; ++i) grads[i] = i < n ? load_row(grad_scores + (j + i) * panel) : fill(0);
      store_transposed(by_query, grads, panel);
      for (int64_t i = 0; i < rows; ++i) {
        double* to = out + i * g.row + j;
        store_wide(to, load_wide(to, n) + to_wide(load_row(by_query + i * panel)), n);
      }
    });
    return;
  }
  alignas(64) real x[panel];
  vec over_keys = fill(0);
  for (int64_t j = 0; j < t.keys; ++j) {
    const vec grad = select(exists, load_row(grad_scores + j * panel), fill(0));
    if (g.col == 0) {
      over_keys = over_keys + grad;
    } else if (g.row == 0) {
      out[j * g.col] += reduce_add(grad);
    } else {
      store_row(x, grad);
      for (int64_t i = 0; i < rows; ++i) out[i * g.row + j * g.col] += x[i];
    }
  }
  if (g.col != 0) return;
  store_row(x, over_keys);
  for (int64_t i = 0; i < rows; ++i) out[i * g.row] += x[i];
}

void add_grad_alibi_slope(const Tile& t, int64_t r) {
  const auto exists = lane_index() < fill(static_cast<real>(t.panel_rows(r)));
  const vec lead = lane_index() + fill(static_cast<real>(t.scores(r, 0, t.keys).lead()));
  const real* grad_scores = t.grad_scores(r);
  wide sum = splat<wide>(0);
  for (int64_t j = 0; j < t.keys; ++j) {
    const vec grad = select(exists, load_row(grad_scores + j * panel), fill(0));
    sum = fma(to_wide(grad), to_wide(abs(lead - fill(static_cast<real>(j)))), sum);
  }
  t.params.grad_alibi_slopes[t.sequence.batch * t.p.num_heads + t.head] -= reduce_add(sum);
}

// grad_scores(r) become the gradients of what softcap took, which at an excluded pair may have been anything.
void differentiate_softcap(const Tile& t, int64_t r) {
  t.for_each_block([&](int64_t key, int64_t n) {
    real* grad_scores = t.grad_scores(r) + key * panel;
    const real* slopes = t.cap_slopes(r) + key * panel;
    const real* keep = t.keep(r) + key * panel;
    const bool plain = t.takes_all(r, key, n);
    for (int64_t j = 0; j < n; ++j) {
      vec g = load_row(grad_scores + j * panel) * load_row(slopes + j * panel);
      if (!plain) g = select(load_row(keep + j * panel) > fill(0), g, fill(0));
      store_row(grad_scores + j * panel, g);
    }
  });
}

// rows of panels times `factor`, rounded once.
void write_grad(const AttentionOutput& grad, const AttentionSequence& sequence, int64_t head, int64_t row,
                const real* source, int64_t panel_rows, int64_t rows, int64_t cols, real factor) {
  const vec factors = fill(factor);
  with_storage(grad.dtype, [&](auto* type) {
    const int64_t offset = sequence.batch * grad.batch + head * grad.head + row * grad.row;
    auto* out = static_cast<decltype(type)>(grad.data) + offset;
    for_each_vec(cols, [&](int64_t c, int64_t n) {
      for (int64_t r = 0; r < rows; ++r)
        store_as(out + r * grad.row + c, load_row(source + c * panel_rows + r * panel) * factors, n);
    });
  });
}

// P and dS in pairs. A query whose dS are all tiny becomes careful: in pairs they would be taken for zeros.
void round_weights(Tile& t) {
  const Scratch& s = t.s;
  const auto* weights = reinterpret_cast<const float*>(t.weights(0));
  const auto* grad_scores = reinterpret_cast<const float*>(t.grad_scores(0));
  auto* careful_queries = reinterpret_cast<float*>(s.pairs.careful_queries);
  const float* careful_keys =
      s.careful_keys ? reinterpret_cast<const float*>(s.pairs.careful_keys) + t.first_key : nullptr;
  for (bool again = true; again;) {
    mask kept[2];
    f32 largest[2];
    for (int64_t h = 0; h < 2; ++h)
      kept[h] = first_n(larger(0, smaller(panel, t.rows - h * panel))) & ~(load(careful_queries + h * panel) > zero());
    round_tile(weights, grad_scores, s.length * panel, t.keys, careful_keys, kept, s.pairs, largest);
    again = false;
    for (int64_t h = 0; h < 2; ++h) {
      const mask small = exceptional(largest[h]) & (largest[h] < set1(tiny));
      if (!any(small)) continue;
      again = t.careful_queries = true;
      store(careful_queries + h * panel, select(small, set1(1), load(careful_queries + h * panel)));
    }
  }
}

// dV, dK and dQ from the pairs, and in float what they leave out.
void add_pair_products(Tile& t) {
  const Scratch& s = t.s;
  const AttentionParams& p = t.p;
  round_weights(t);
  const auto add_over_queries_of = [&](const int32_t* a, const int32_t* b, int64_t cols, real* out) {
    for (int64_t c = 0; c < panels(cols); ++c)
      pair_product(a, tile_pairs, 1, b + c * tile_pairs * panel, pairs(t.rows),
                   reinterpret_cast<float*>(out + (c * s.length + t.first_key) * panel), t.keys, true);
  };
  add_over_queries_of(s.pairs.weights, s.pairs.grads, p.value_head_dim, s.grad_values);
  add_over_queries_of(s.pairs.grad_scores, s.pairs.queries, p.head_dim, s.grad_keys);
  for (int64_t r = 0; r < t.rows; r += panel)
    for (int64_t c = 0; c < panels(p.head_dim); ++c)
      pair_product(s.pairs.grad_scores_across + r * s.pairs.length_pairs, 1, panel,
                   s.pairs.keys + (c * s.pairs.length_pairs + t.first_key / 2) * panel, pairs(t.keys),
                   reinterpret_cast<float*>(s.grad_queries + (c * tile + r) * panel), t.panel_rows(r), false);
  if (!s.careful_keys && !t.careful_queries) return;
  pack_floats(t);
  for (int64_t r = 0; r < t.rows; r += panel) {  // keep: what takes part and is careful
    const vec of_queries = load_row(s.pairs.careful_queries + r);
    t.for_each_block([&](int64_t key, int64_t n) {
      const bool takes_all = t.takes_all(r, key, n);
      for (int64_t j = 0; j < n; ++j) {
        real* keep = t.keep(r) + (key + j) * panel;
        const vec careful = max(of_queries, fill(s.pairs.careful_keys[t.first_key + key + j]));
        store_row(keep, takes_all ? careful : min(careful, load_row(keep)));
      }
    });
  }
  const auto add_careful = [&](const real* a, const real* b, int64_t cols, real* out) {
    for (int64_t c = 0; c < panels(cols); ++c)
      product_of_kept<Along::rows>(a, t.keep(0), s.length * panel, b + c * tile * panel, t.rows,
                                   out + (c * s.length + t.first_key) * panel, t.keys, true);
  };
  add_careful(t.weights(0), s.grads, p.value_head_dim, s.grad_values);
  add_careful(t.grad_scores(0), s.queries, p.head_dim, s.grad_keys);
  for (int64_t r = 0; r < t.rows; r += panel)
    for (int64_t c = 0; c < panels(p.head_dim); ++c)
      product_of_kept<Along::columns>(t.grad_scores(r), t.keep(r), panel * panel,
                                      s.keys + (c * s.length + t.first_key) * panel, t.keys,
                                      s.grad_queries + (c * tile + r) * panel, t.panel_rows(r), true);
}

// The tile's operands in pairs.
void pack_pair_queries(Tile& t) {
  const PairScratch& s = t.s.pairs;
  const int64_t batch = t.sequence.batch, row = t.sequence.query_row + t.query, dv = t.p.value_head_dim;
  const AttentionTensor& grad = t.params.grad_output;
  for (int64_t r = 0; r < tile; r += panel) store_row(s.careful_queries + r, fill(0));
  t.careful_queries = pack_neighbours(t.p.query, batch, t.head, row, t.rows, t.p.head_dim, s.queries, tile_pairs,
                                      s.careful_queries);
  t.careful_queries |= pack_neighbours(grad, batch, t.head, row, t.rows, dv, s.grads, tile_pairs, s.careful_queries);
  for (int64_t r = 0; r < t.rows; r += panel)
    pack_across_pairs(grad, batch, t.head, row + r, t.panel_rows(r), dv, 1, s.grads_across + r * row_pairs(dv));
  if (t.careful_queries || t.s.careful_keys) pack_floats(t);
}

void pack_pair_keys(const AttentionParams& p, const AttentionSequence& sequence, int64_t kv_head, Scratch& s) {
  const int64_t batch = sequence.batch, row = sequence.key_row, dv = p.value_head_dim;
  for (int64_t j = 0; j < s.length; j += panel) store_row(s.pairs.careful_keys + j, fill(0));
  pack_score_keys(p, batch, kv_head, row, s.length, s.score_keys, 0);
  pack_row_pairs(p.value, batch, kv_head, row, s.length, dv, s.pairs.values);
  s.careful_keys = mark_exceptional(s.pairs.values, s.length, dv, s.pairs.careful_keys);
  s.careful_keys |= pack_neighbours(p.key, batch, kv_head, row, s.length, p.head_dim, s.pairs.keys,
                                    s.pairs.length_pairs, s.pairs.careful_keys);
}

void differentiate_tile(Tile t) {
  Scratch& s = t.s;
  const AttentionParams& p = t.p;
  const int64_t row = t.sequence.query_row + t.query, batch = t.sequence.batch;
  if (multiplies_pairs(p))
    pack_pair_queries(t);
  else
    pack_float_queries(t);
  for (int64_t r = 0; r < t.rows; r += panel)
    pack_score_queries(p, batch, t.head, row + r, t.panel_rows(r), s.queries_across + r * p.head_dim);
  for (int64_t r = 0; r < t.rows; r += panel) {
    const Maximum maximum = score_panel(t, r);
    const vec sum = weigh_panel(t, r, maximum.value);
    differentiate_panel(t, r, maximum, sum);
    if (t.params.grad_bias.data) add_grad_bias(t, r);
    if (t.params.grad_alibi_slopes) add_grad_alibi_slope(t, r);
    if (s.cap_slopes) differentiate_softcap(t, r);
  }
  if (multiplies_pairs(p)) {
    add_pair_products(t);
  } else {
    add_over_queries(t, t.weights(0), s.grads, p.value_head_dim, t.finite_grads, s.grad_values);
    add_over_queries(t, t.grad_scores(0), s.queries, p.head_dim, t.finite_queries, s.grad_keys);
    find_grad_queries(t);
  }
  write_grad(t.params.grad_query, t.sequence, t.head, row, s.grad_queries, tile, t.rows, p.head_dim,
             static_cast<real>(p.scale));
}

// What the tile at (head, query) writes, and what the next one reads that it does not.
void prefetch_next(const AttentionBackwardParams& params, int64_t sequence_index, int64_t head, int64_t query,
                   Prefetch& prefetch) {
  const AttentionParams& p = params.problem;
  const AttentionSequence *now = p.sequences + sequence_index, *after = now;
  const int64_t group = p.num_heads / p.num_kv_heads, kv_head = head / group;
  const int64_t rows = smaller(tile, now->seqlen_q - query);
  prefetch.add(params.grad_query, now->batch, head, now->query_row + query, rows, p.head_dim);
  query += tile;
  if (query >= now->seqlen_q) {
    query = 0;
    if (++head == p.num_heads) {
      head = 0;
      if (sequence_index + 1 < p.num_sequences) ++after;
    }
  }
  const int64_t next_rows = smaller(tile, after->seqlen_q - query), next_kv_head = head / group;
  prefetch.add(p.query, after->batch, head, after->query_row + query, next_rows, p.head_dim);
  prefetch.add(params.grad_output, after->batch, head, after->query_row + query, next_rows, p.value_head_dim);
  if (now != after || kv_head != next_kv_head) {
    prefetch.add(params.grad_key, now->batch, kv_head, now->key_row, now->seqlen_k, p.head_dim);
    prefetch.add(params.grad_value, now->batch, kv_head, now->key_row, now->seqlen_k, p.value_head_dim);
    prefetch.add(p.key, after->batch, next_kv_head, after->key_row, after->seqlen_k, p.head_dim);
    prefetch.add(p.value, after->batch, next_kv_head, after->key_row, after->seqlen_k, p.value_head_dim);
  }
  prefetch.spread(2 * panels(rows) * (now->seqlen_k / keys_per_step));
}

}  // namespace

int64_t TRANSFUSE_ATTENTION_NAME(attention_backward_scratch_bytes)(const AttentionBackwardParams& params) {
  Arena arena{nullptr};
  Scratch(params.problem, params.problem.max_seqlen_k, arena);
  return arena.bytes();
}

void TRANSFUSE_ATTENTION_NAME(attention_backward)(const AttentionBackwardParams& params, void* memory,
                                                  int64_t sequence_index, int64_t kv_head) {
  const AttentionParams& p = params.problem;
  const AttentionSequence& sequence = p.sequences[sequence_index];
  const int64_t length = sequence.seqlen_k, group = p.num_heads / p.num_kv_heads;
  Arena arena{static_cast<real*>(memory)};
  Scratch s(p, length, arena);
  bool finite_keys = true;
  if (multiplies_pairs(p))
    pack_pair_keys(p, sequence, kv_head, s);
  else
    finite_keys = pack_float_keys(p, sequence, kv_head, s);
  for (real* x = s.grad_keys; x != s.queries; x += panel) store_row(x, fill(0));
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t query = 0; query < sequence.seqlen_q; query += tile) {
      const int64_t rows = smaller(tile, sequence.seqlen_q - query), first_key = first_block(p, sequence, query);
      const int64_t stop = padding_start(p, sequence, head, key_end(p, sequence, query + rows - 1));
      Prefetch prefetch;
      prefetch_next(params, sequence_index, head, query, prefetch);
      differentiate_tile({params, p, sequence, s, head, query, rows, first_key, larger(0, stop - first_key),
                          finite_keys, true, true, prefetch, false, false});
    }
  write_grad(params.grad_key, sequence, kv_head, sequence.key_row, s.grad_keys, s.length, length, p.head_dim,
             static_cast<real>(p.scale));
  write_grad(params.grad_value, sequence, kv_head, sequence.key_row, s.grad_values, s.length, length, p.value_head_dim,
             1);
}

}  // namespace transfuse::cpu::TRANSFUSE_ISA
