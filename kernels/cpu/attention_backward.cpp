// Attention backward: gradients of query, key, value and bias for one key/value head of one sequence.
//
//   P = softmax(scale * Q K^T + bias)    dV = P^T dO    dP = dO V^T    dS = P * (dP - delta)    delta = sum of P * dP
//   dQ = scale * dS K    dK = scale * dS^T Q    dbias = dS, summed over the dimensions in which the bias was broadcast
//
// A tile of 32 queries holds its weights and dP against all keys of its sequence, [key][16 queries] as in the forward
// (linear in the length, never Lq x Lk), so each of the five products is computed once.
// Policy: maximum and sum are computed again from the scores. lse is a float of the size of the largest logit, and
// exp(score - lse) would carry its rounding error, 5e-4 at logits of 1e4; likewise delta from P * dP, since that of the
// rounded output carries the error of the storage type. Queries are walked in order, heads of a group in order, so the
// sums of dK, dV and dbias have one order whatever the number of threads.
#include "attention_panels.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

constexpr int64_t tile = 32;  // queries; as many as `chain`, so that dK and dV are read and written once per chain
constexpr int64_t tile_panels = tile / panel;
constexpr int64_t key_block = 128;  // keys per step: excluded pairs are looked for block by block

struct Scratch {
  int64_t length;                          // keys of the sequence
  float *keys, *values;                    // [D / 16][length][16], [Dv / 16][length][16]
  float *grad_keys, *grad_values;          // the same
  float *queries, *grads;                  // [D / 16][tile][16], [Dv / 16][tile][16]: query and grad_output
  float *queries_across, *grads_across;    // [tile / 16][D][16], [tile / 16][Dv][16]: transposed
  float* grad_queries;                     // [D / 16][tile][16]
  float *weights, *grad_scores, *keep;     // [tile / 16][length][16]
  float* bias;                             // [key_block][16]

  Scratch(const AttentionParams& p, int64_t seqlen_k, Arena& arena) : length(seqlen_k) {
    const int64_t d = panels(p.head_dim) * panel, dv = panels(p.value_head_dim) * panel;
    keys = arena.take(length * d);
    values = arena.take(length * dv);
    grad_keys = arena.take(length * d);
    grad_values = arena.take(length * dv);
    queries = arena.take(tile * d);
    grads = arena.take(tile * dv);
    queries_across = arena.take(tile * d);
    grads_across = arena.take(tile * dv);
    grad_queries = arena.take(tile * d);
    weights = arena.take(tile * length);
    grad_scores = arena.take(tile * length);
    keep = arena.take(tile * length);
    bias = arena.take(key_block * panel);
  }
};

// One tile: where it stands and what must be looked after.
struct Tile {
  const AttentionBackwardParams& params;
  const AttentionParams& p;
  const AttentionSequence& sequence;
  const Scratch& s;
  int64_t head, query, rows;  // rows of [query, query + tile) that exist
  int64_t keys;               // [0, keys) holds every key that some row sees
  bool finite_keys, finite_queries, finite_grads;

  float* weights(int64_t r) const { return s.weights + r * s.length; }  // of the panel that starts at row r
  float* grad_scores(int64_t r) const { return s.grad_scores + r * s.length; }
  float* keep(int64_t r) const { return s.keep + r * s.length; }
  bool plain(int64_t r, int64_t key, int64_t n) const { return tile_is_plain(p, sequence, query + r, key, n); }
  // Whether 0 * inf or 0 * NaN of an excluded pair could enter a product.
  bool guarded() const { return !(finite_keys && finite_queries && finite_grads) && !plain(0, 0, keys); }
  template <class Body>
  void for_each_block(Body body) const {
    for (int64_t key = 0; key < keys; key += key_block) body(key, smaller(key_block, keys - key));
  }
};

// Scores of one block of keys for the panel at row r into weights(r), and what it excludes into keep(r).
void score_block(const Tile& t, int64_t r, int64_t key, int64_t n) {
  const Scratch& s = t.s;
  float* scores = t.weights(r) + key * panel;
  float* keep = t.keep(r) + key * panel;
  product<Along::rows>(s.keys + key * panel, s.length * panel, s.queries_across + r * t.p.head_dim, t.p.head_dim,
                       scores, n, false);
  if (!t.plain(r, key, n))
    apply_mask_and_bias(t.p, t.sequence, t.head, t.query + r, smaller(panel, t.rows - r), key, n, scores, keep, s.bias);
  else if (t.guarded())
    for (int64_t j = 0; j < n; ++j) store(keep + j * panel, set1(1.0f));
}

struct Maximum {
  f32 value, anchor;  // the scores are relative to anchor, 0 but in saturated rows
};

// Scores of the panel at row r into weights(r).
Maximum score_panel(const Tile& t, int64_t r) {
  const auto maximum_of_block = [&](int64_t key, int64_t n) {
    return row_maximum(t.weights(r) + key * panel, t.plain(r, key, n) ? nullptr : t.keep(r) + key * panel, n);
  };
  f32 maximum = set1(-__builtin_inff());
  t.for_each_block([&](int64_t key, int64_t n) {
    score_block(t, r, key, n);
    maximum = max(maximum, maximum_of_block(key, n));
  });
  const mask refine = saturated(maximum, logit_scale(t.p));
  if (!any(refine)) return {maximum, zero()};
  const f32 anchor = select(refine, maximum, zero());
  f32 refined = set1(-__builtin_inff());
  t.for_each_block([&](int64_t key, int64_t n) {
    score_block(t, r, key, n);  // again: refining needs the block's bias
    refine_scores(t.p, t.s.queries_across + r * t.p.head_dim, t.s.keys + key * panel, t.s.length * panel, n,
                  t.p.bias.data ? t.s.bias : nullptr, refine, anchor, maximum, t.weights(r) + key * panel);
    refined = max(refined, maximum_of_block(key, n));
  });
  return {refined, anchor};
}

// weights(r) = exp(logit - maximum), and their sums.
f32 weigh_panel(const Tile& t, int64_t r, f32 maximum) {
  const ScaledExp weight(logit_scale(t.p));
  f32 sums[4] = {zero(), zero(), zero(), zero()};
  t.for_each_block([&](int64_t key, int64_t n) {
    float* weights = t.weights(r) + key * panel;
    const float* keep = t.keep(r) + key * panel;
    const bool plain = t.plain(r, key, n);
    for (int64_t j = 0; j < n; ++j) {
      f32 w = weight(load(weights + j * panel) - maximum);
      if (!plain) w = select(load(keep + j * panel) > zero(), w, zero());
      sums[j % 4] = sums[j % 4] + w;
      store(weights + j * panel, w);
    }
  });
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The rows' entries of a [B, H, L] float tensor, absent rows 0.
f32 load_statistic(const Tile& t, const AttentionTensor& statistic, int64_t r) {
  return load_strided(at<float>(statistic, t.sequence.batch, t.head, t.sequence.query_row + t.query + r, 0),
                      statistic.row, smaller(panel, t.rows - r));
}

// sum of grad_output * output of one row.
float output_dot(const Tile& t, int64_t r) {
  const AttentionTensor& output = t.params.output;
  f32 sum = zero();
  for_each_vec(t.p.value_head_dim, [&](int64_t c, int64_t n) {
    const f32 o = with_type(output, t.sequence.batch, t.head, t.sequence.query_row + t.query + r, c,
                            [&](auto* x) { return load_strided(x, output.col, n); });
    sum = fma(load(t.s.grads + c * tile + r * panel), o, sum);
  });
  return reduce_add(sum);
}

// weights(r) become P and grad_scores(r) become dS.
void differentiate_panel(const Tile& t, int64_t r, Maximum maximum, f32 sum) {
  const Scratch& s = t.s;
  // lse is that of these very keys, or of more keys when a longer row was computed in parts (ring attention): then it
  // is P's true normaliser, and delta is that of the whole row. The weight of this part tells the two apart.
  const f32 lse = load_statistic(t, t.params.problem.lse, r);
  const f32 scale = set1(logit_scale(t.p));
  const f32 part = exp_nonpositive(fma(maximum.value, scale, fms(maximum.anchor, scale, lse))) * sum;
  const f32 rounding = fma(abs(lse), set1(0x1p-20f), set1(0x1p-20f));  // a few ulp of lse
  const mask whole = ~(abs(part - set1(1.0f)) > rounding);
  const f32 normaliser = select(sum > zero(), select(whole, set1(1.0f), part) / sum, select(isnan(sum), sum, zero()));

  f32 deltas[2] = {zero(), zero()};
  t.for_each_block([&](int64_t key, int64_t n) {
    float* weights = t.weights(r) + key * panel;
    float* grad_weights = t.grad_scores(r) + key * panel;
    const float* keep = t.keep(r) + key * panel;
    product<Along::rows>(s.values + key * panel, s.length * panel, s.grads_across + r * t.p.value_head_dim,
                         t.p.value_head_dim, grad_weights, n, false);
    const bool plain = t.plain(r, key, n);
    for (int64_t j = 0; j < n; ++j) {
      f32 w = load(weights + j * panel) * normaliser;
      f32 g = load(grad_weights + j * panel);
      if (!plain) {  // V at an excluded key may be anything; the normaliser of a NaN row is NaN
        const mask kept = load(keep + j * panel) > zero();
        w = select(kept, w, zero());
        g = select(kept, g, zero());
        store(grad_weights + j * panel, g);
      }
      store(weights + j * panel, w);
      deltas[j % 2] = fma(w, g, deltas[j % 2]);
    }
  });
  f32 delta = deltas[0] + deltas[1];
  if (!all(whole)) {
    alignas(64) float of_row[panel];
    for (int64_t i = 0; i < panel; ++i) of_row[i] = r + i < t.rows ? output_dot(t, r + i) : 0.0f;
    delta = select(whole, delta, load(of_row));
  }
  if (t.params.grad_lse.data) delta = delta - load_statistic(t, t.params.grad_lse, r);
  t.for_each_block([&](int64_t key, int64_t n) {
    const float* weights = t.weights(r) + key * panel;
    float* grad_scores = t.grad_scores(r) + key * panel;
    const float* keep = t.keep(r) + key * panel;
    const bool plain = t.plain(r, key, n);
    for (int64_t j = 0; j < n; ++j) {
      f32 g = load(weights + j * panel) * (load(grad_scores + j * panel) - delta);
      if (!plain) g = select(load(keep + j * panel) > zero(), g, zero());
      store(grad_scores + j * panel, g);
    }
  });
}

// out[row] += sum over the tile's queries of A[query][row] * b[query], for all keys as rows.
void add_over_queries(const Tile& t, const float* a, const float* b, int64_t cols, bool finite, float* out) {
  const int64_t a_panel = t.s.length * panel;
  for (int64_t c = 0; c < panels(cols); ++c) {
    const float* bc = b + c * tile * panel;
    float* to = out + c * t.s.length * panel;
    if (finite || !t.guarded())
      product<Along::rows>(a, a_panel, bc, t.rows, to, t.keys, true);
    else
      product_of_kept<Along::rows>(a, t.s.keep, a_panel, bc, t.rows, to, t.keys, true);
  }
}

void find_grad_queries(const Tile& t) {
  for (int64_t r = 0; r < t.rows; r += panel) {
    const int64_t panel_rows = smaller(panel, t.rows - r);
    for (int64_t c = 0; c < panels(t.p.head_dim); ++c) {
      const float* keys = t.s.keys + c * t.s.length * panel;
      float* to = t.s.grad_queries + (c * tile + r) * panel;
      if (t.finite_keys || !t.guarded())
        product<Along::columns>(t.grad_scores(r), panel * panel, keys, t.keys, to, panel_rows, false);
      else
        product_of_kept<Along::columns>(t.grad_scores(r), t.keep(r), panel * panel, keys, t.keys, to, panel_rows,
                                        false);
    }
  }
}

void add_grad_bias(const Tile& t) {
  const AttentionBiasGrad& g = t.params.grad_bias;
  alignas(64) float x[panel];
  for (int64_t r = 0; r < t.rows; r += panel) {
    const int64_t panel_rows = smaller(panel, t.rows - r);
    const mask exists = first_n(panel_rows);
    double* out = g.data + t.sequence.batch * g.batch + t.head * g.head + (t.query + r) * g.row;
    const float* grad_scores = t.grad_scores(r);
    f32 over_keys = zero();
    for (int64_t j = 0; j < t.keys; ++j) {
      const f32 grad = select(exists, load(grad_scores + j * panel), zero());
      if (g.col == 0) {
        over_keys = over_keys + grad;
      } else if (g.row == 0) {
        out[j * g.col] += reduce_add(grad);
      } else {
        store(x, grad);
        for (int64_t i = 0; i < panel_rows; ++i) out[i * g.row + j * g.col] += x[i];
      }
    }
    if (g.col != 0) continue;
    store(x, over_keys);
    for (int64_t i = 0; i < panel_rows; ++i) out[i * g.row] += x[i];
  }
}

// rows of panels times `factor`, rounded once.
template <class T>
void write_rows(const float* source, int64_t panel_rows, int64_t rows, int64_t cols, float factor, T* out,
                int64_t row_stride) {
  const f32 factors = set1(factor);
  for_each_vec(cols, [&](int64_t c, int64_t n) {
    for (int64_t r = 0; r < rows; ++r)
      store_n(out + r * row_stride + c, load(source + c * panel_rows + r * panel) * factors, n);
  });
}

void write_grad(const AttentionOutput& grad, const AttentionSequence& sequence, int64_t head, int64_t row,
                const float* source, int64_t panel_rows, int64_t rows, int64_t cols, float factor) {
  const int64_t offset = sequence.batch * grad.batch + head * grad.head + row * grad.row;
  if (grad.dtype == DType::f32)
    write_rows(source, panel_rows, rows, cols, factor, static_cast<float*>(grad.data) + offset, grad.row);
  else
    write_rows(source, panel_rows, rows, cols, factor, static_cast<bf16*>(grad.data) + offset, grad.row);
}

void differentiate_tile(Tile t) {
  const Scratch& s = t.s;
  const AttentionParams& p = t.p;
  const int64_t row = t.sequence.query_row + t.query, batch = t.sequence.batch;
  const AttentionTensor& grad_output = t.params.grad_output;
  t.finite_queries = pack_tensor_rows(p.query, batch, t.head, row, t.rows, p.head_dim, s.queries, tile);
  t.finite_grads = pack_tensor_rows(grad_output, batch, t.head, row, t.rows, p.value_head_dim, s.grads, tile);
  for (int64_t r = 0; r < t.rows; r += panel) {
    const int64_t n = smaller(panel, t.rows - r);
    pack_tensor_transposed(p.query, batch, t.head, row + r, n, p.head_dim, query_sign(p),
                           s.queries_across + r * p.head_dim);
    pack_tensor_transposed(grad_output, batch, t.head, row + r, n, p.value_head_dim, 1.0f,
                           s.grads_across + r * p.value_head_dim);
  }
  for (int64_t r = 0; r < t.rows; r += panel) {
    const Maximum maximum = score_panel(t, r);
    const f32 sum = weigh_panel(t, r, maximum.value);
    differentiate_panel(t, r, maximum, sum);
  }
  add_over_queries(t, s.weights, s.grads, p.value_head_dim, t.finite_grads, s.grad_values);
  add_over_queries(t, s.grad_scores, s.queries, p.head_dim, t.finite_queries, s.grad_keys);
  find_grad_queries(t);
  if (t.params.grad_bias.data) add_grad_bias(t);
  write_grad(t.params.grad_query, t.sequence, t.head, row, s.grad_queries, tile, t.rows, p.head_dim, p.scale);
}

}  // namespace

int64_t attention_backward_scratch_bytes(const AttentionBackwardParams& params) {
  Arena arena{nullptr};
  Scratch(params.problem, params.problem.max_seqlen_k, arena);
  return arena.bytes();
}

void attention_backward(const AttentionBackwardParams& params, void* memory, int64_t sequence_index, int64_t kv_head) {
  const AttentionParams& p = params.problem;
  const AttentionSequence& sequence = p.sequences[sequence_index];
  const int64_t length = sequence.seqlen_k, group = p.num_heads / p.num_kv_heads;
  Arena arena{static_cast<float*>(memory)};
  const Scratch s(p, length, arena);
  const bool finite_keys =
      pack_tensor_rows(p.key, sequence.batch, kv_head, sequence.key_row, length, p.head_dim, s.keys, s.length);
  pack_tensor_rows(p.value, sequence.batch, kv_head, sequence.key_row, length, p.value_head_dim, s.values, s.length);
  for (float* x = s.grad_keys; x != s.queries; x += panel) store(x, zero());
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t query = 0; query < sequence.seqlen_q; query += tile) {
      const int64_t rows = smaller(tile, sequence.seqlen_q - query);
      const int64_t keys = padding_start(p, sequence, head, key_limit(p, sequence, query + rows - 1));
      differentiate_tile({params, p, sequence, s, head, query, rows, keys, finite_keys, true, true});
    }
  write_grad(params.grad_key, sequence, kv_head, sequence.key_row, s.grad_keys, s.length, length, p.head_dim, p.scale);
  write_grad(params.grad_value, sequence, kv_head, sequence.key_row, s.grad_values, s.length, length, p.value_head_dim,
             1.0f);
}

}  // namespace transfuse::cpu::TRANSFUSE_ISA
