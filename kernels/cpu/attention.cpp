// Attention forward: softmax(scores) V over blocks of keys, no matrix of Lq x Lk anywhere.
//
// A task packs a block of queries, then walks the key blocks of its sequence from the first that some row sees; per
// block the keys and values are packed once, and each panel of 16 queries computes its scores, updates its maximum, sum
// and output. Dropout acts on weights that are already summed, a sink joins the sum at the end.
// Policy: the maximum is exact and is that of the stored scores, weights are never rounded to a storage type, the
// division comes once at the end. A row's arithmetic depends on its own keys alone: an excluded key adds exact zeros,
// and blocks count from the sequence's own key 0, so batch, packing, masks and threads leave every bit as it is.
#include "attention_bf16.h"
#include "attention_dropout.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

int64_t TRANSFUSE_ATTENTION_NAME(attention_backward_scratch_bytes)(const AttentionBackwardParams& params);
void TRANSFUSE_ATTENTION_NAME(attention_backward)(const AttentionBackwardParams& params, void* scratch,
                                                  int64_t sequence, int64_t kv_head);

namespace {

constexpr int64_t keys_per_step = 4;  // of prefetching

struct Scratch {
  real* queries;                 // [query_block / 16][D][16], transposed
  real *keys, *values;           // [D / 16][key_block][16], [Dv / 16][key_block][16]; pairs in the same places
  real *value_rest, *weights;    // of pairs: [Dv / 16][key_block][16], and [key_block / 2][16] pairs
  real* output;                  // [Dv / 16][query_block][16]
  real *scores, *keep, *bias;    // [key_block][16]
  real *maximum, *sum, *anchor;  // [query_block]; maximum and scores are relative to anchor

  Scratch(const AttentionParams& p, Arena& arena) {
    const int64_t d = panels(p.head_dim) * panel, dv = panels(p.value_head_dim) * panel;
    queries = arena.take(p.query_block * d);
    keys = arena.take(key_block * d);
    values = arena.take(key_block * dv);
    value_rest = multiplies_pairs(p) ? arena.take(key_block * dv) : nullptr;
    weights = multiplies_pairs(p) ? arena.take(key_block / 2 * panel) : nullptr;
    output = arena.take(p.query_block * dv);
    scores = arena.take(key_block * panel);
    keep = arena.take(key_block * panel);
    bias = arena.take(key_block * panel);
    maximum = arena.take(p.query_block);
    sum = arena.take(p.query_block);
    anchor = arena.take(p.query_block);
  }
};

int64_t forward_scratch_bytes(const AttentionForwardParams& params) {
  Arena arena{nullptr};
  Scratch(params.problem, arena);
  return arena.bytes();
}

// Turns the scores of the panel at row r of the task into weights exp(logit - maximum), and brings the sum and output
// of its rows to the new maximum.
void softmax_panel(const ScorePanel& t, const ScoreOperands& operands, const Scratch& s, int64_t r, bool first,
                   bool excludes, Prefetch& prefetch) {
  const AttentionParams& p = t.p;
  const real scale = logit_scale(p);
  const ScaledExp weight(scale);
  real* scores = s.scores;
  const real* keep = excludes ? s.keep : nullptr;
  vec before = load_row(s.maximum + r), anchor = load_row(s.anchor + r);
  vec maximum = row_maximum(scores, keep, t.keys);
  const vec_mask refine = saturated(maximum, scale) | ~(anchor == fill(0));
  if (any(refine)) {
    // The anchor follows the maximum: far from it a score would be rounded at the size of the distance.
    const vec higher = select(refine & (maximum > before + anchor), maximum, anchor);
    before = before + (anchor - higher);
    store_row(s.anchor + r, anchor = higher);
    refine_scores(t, operands, s.bias, {refine, anchor, max(maximum, before + anchor)}, scores);
    maximum = row_maximum(scores, keep, t.keys);
  }
  maximum = max(maximum, before);
  const vec shift = select(maximum == fill(-infinity), fill(0), maximum);  // where every score is -inf: weights of 0

  vec sums[4] = {fill(0), fill(0), fill(0), fill(0)};
  with_constant(!keep, [&](auto plain) __attribute__((always_inline)) {
    for_each_in_fours(t.keys, [&](int64_t j, auto u) __attribute__((always_inline)) {
      if (u == 0) prefetch.step();
      vec w = weight(load_row(scores + j * panel) - shift);
      if (!plain) w = select(load_row(keep + j * panel) > fill(0), w, fill(0));
      sums[u] = sums[u] + w;
      store_row(scores + j * panel, w);
    });
  });
  const vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);

  store_row(s.maximum + r, maximum);
  if (first) return store_row(s.sum + r, sum);
  const vec_mask same = before == maximum;  // also where nothing was kept so far: both -inf
  const vec factor = select(same, fill(1), weight(before - maximum));
  store_row(s.sum + r, fma(load_row(s.sum + r), factor, sum));
  if (all(same)) return;
  alignas(64) real factors[panel];
  store_row(factors, factor);
  for (int64_t c = 0; c < panels(p.value_head_dim); ++c) {
    real* output = s.output + (c * p.query_block + r) * panel;
    for (int64_t i = 0; i < panel; ++i) store_row(output + i * panel, load_row(output + i * panel) * fill(factors[i]));
  }
}

// Says whether no value needs care: all are finite, and in pairs none is in value_rest.
bool pack_values(const AttentionParams& p, int64_t batch, int64_t kv_head, int64_t row, int64_t keys,
                 const Scratch& s) {
  if (multiplies_pairs(p))
    return !pack_value_pairs(p, batch, kv_head, row, keys, reinterpret_cast<int32_t*>(s.values),
                             reinterpret_cast<float*>(s.value_rest));
  return pack_tensor_rows(p.value, batch, kv_head, row, keys, p.value_head_dim, s.values, key_block);
}

// Output of the panel at row r += or = weights * values.
void add_values(const ScorePanel& t, const Scratch& s, int64_t r, bool first, bool excludes, bool ordinary) {
  const bool in_pairs = multiplies_pairs(t.p);
  const auto* weights = reinterpret_cast<const int32_t*>(s.weights);
  const auto* values = reinterpret_cast<const int32_t*>(s.values);
  if (in_pairs)
    pack_weight_pairs(reinterpret_cast<const float*>(s.scores), t.keys, reinterpret_cast<int32_t*>(s.weights));
  for (int64_t c = 0; c < panels(t.p.value_head_dim); ++c) {
    real* output = s.output + (c * t.p.query_block + r) * panel;
    if (in_pairs) {
      pair_product(weights, 1, panel, values + c * (key_block / 2) * panel, pairs(t.keys),
                   reinterpret_cast<float*>(output), t.rows, !first);
      if (ordinary) continue;
    }
    const real* panel_values = (in_pairs ? s.value_rest : s.values) + c * key_block * panel;
    const bool accumulate = in_pairs || !first;
    if (ordinary || !excludes)
      product<Along::columns>(s.scores, panel * panel, panel_values, t.keys, output, t.rows, accumulate);
    else
      product_of_kept<Along::columns>(s.scores, s.keep, panel * panel, panel_values, t.keys, output, t.rows, accumulate);
  }
}

// x / divisor rounded once, from the divisor's reciprocal: a division costs as much as ten multiplications.
TRANSFUSE_INLINE vec divide(vec x, vec divisor, vec reciprocal) {
  const vec quotient = x * reciprocal;
  const vec rest = fnma(quotient, divisor, x);
  return select(isnan(rest), quotient, fma(rest, reciprocal, quotient));  // a rest of inf - inf says nothing
}

// What a panel's sums of weights become when the head's sink joins them, and their logarithms beside `top`, the largest
// logits.
void add_sink(double sink, wide top, vec& sum, vec& log_sum) {
  alignas(64) double tops[panel];
  alignas(64) real sums[panel], log_sums[panel];
  store_wide(tops, top);
  store_row(sums, sum);
  store_row(log_sums, log_sum);
  for (int64_t i = 0; i < panel; ++i) {
    const double total = sums[i] + sink_weight(sink, tops[i]);
    if (total > 0) log_sums[i] = static_cast<real>(total < __builtin_inf() ? tops[i] + __builtin_log(total) : sink);
    if (total != total) log_sums[i] = static_cast<real>(total);
    sums[i] = static_cast<real>(total);
  }
  sum = load_row(sums);
  log_sum = load_row(log_sums);
}

// Output 0 for rows of the panel at row r.
void clear_rows(const AttentionParams& p, const Scratch& s, int64_t r, vec_mask rows) {
  alignas(64) real clear[panel];
  store_row(clear, select(rows, fill(1), fill(0)));
  for (int64_t c = 0; c < panels(p.value_head_dim); ++c)
    for (int64_t i = 0; i < panel; ++i)
      if (clear[i] != 0) store_row(s.output + (c * p.query_block + r + i) * panel, fill(0));
}

// Divides by the sum, rounds once, writes rows and lse.
template <class T>
void write_rows(const AttentionForwardParams& params, const AttentionSequence& sequence, int64_t head, int64_t query,
                int64_t rows, const Scratch& s) {
  const AttentionParams& p = params.problem;
  const AttentionOutput& output = params.output;
  T* out = static_cast<T*>(output.data) + sequence.batch * output.batch + head * output.head +
      (sequence.query_row + query) * output.row;
  real* lse = static_cast<real*>(params.lse.data) + sequence.batch * params.lse.batch + head * params.lse.head +
      (sequence.query_row + query) * params.lse.row;
  const double kept_share = p.dropout.probability < 1.0 ? 1.0 - p.dropout.probability : 1.0;
  const wide scale = splat<wide>(logit_scale(p));
  for (int64_t r = 0; r < rows; r += panel) {
    const int64_t panel_rows = smaller(panel, rows - r);
    vec sum = load_row(s.sum + r);
    const vec_mask nothing = sum == fill(0);  // the largest weight of a row is 1, so only a row without keys sums to 0
    const wide top = select(nothing, splat<wide>(-__builtin_inf()),
                            (to_wide(load_row(s.maximum + r)) + to_wide(load_row(s.anchor + r))) * scale);
    vec log_sum = select(nothing, fill(-infinity), from_wide(top + to_wide(natural_log(sum))));
    if (p.sinks && p.sinks[head] != -__builtin_inf()) add_sink(p.sinks[head], top, sum, log_sum);
    if (any(nothing)) clear_rows(p, s, r, nothing);
    sum = from_wide(to_wide(select(nothing, fill(1), sum)) * splat<wide>(kept_share));
    alignas(64) real log_sums[panel], divisors[panel], reciprocals[panel];
    store_row(log_sums, log_sum);
    store_row(divisors, sum);
    store_row(reciprocals, fill(1) / sum);
    for (int64_t i = 0; i < panel_rows; ++i) lse[(r + i) * params.lse.row] = log_sums[i];
    for_each_vec(p.value_head_dim, [&](int64_t c, int64_t n) {
      const real* from = s.output + c * p.query_block + r * panel;
      T* to = out + r * output.row + c;
      for (int64_t i = 0; i < panel_rows; ++i)
        store_as(to + i * output.row, divide(load_row(from + i * panel), fill(divisors[i]), fill(reciprocals[i])), n);
    });
  }
}

// One block of queries of one head.
struct Task {
  const AttentionSequence* sequence;
  int64_t head, query;
};

// What the task writes, and what `next` reads that the task does not.
void prefetch_next(const AttentionForwardParams& params, const Task& task, const Task& next, Prefetch& prefetch) {
  const AttentionParams& p = params.problem;
  const AttentionSequence &now = *task.sequence, &after = *next.sequence;
  const int64_t group = p.num_heads / p.num_kv_heads, kv_head = next.head / group;
  const int64_t rows = smaller(p.query_block, now.seqlen_q - task.query);
  const int64_t next_rows = smaller(p.query_block, after.seqlen_q - next.query);
  prefetch.add(params.output, now.batch, task.head, now.query_row + task.query, rows, p.value_head_dim);
  prefetch.add(p.query, after.batch, next.head, after.query_row + next.query, next_rows, p.head_dim);
  if (&now != &after || task.head / group != kv_head) {
    prefetch.add(p.key, after.batch, kv_head, after.key_row, after.seqlen_k, p.head_dim);
    prefetch.add(p.value, after.batch, kv_head, after.key_row, after.seqlen_k, p.value_head_dim);
  }
  prefetch.spread(panels(rows) * (now.seqlen_k / keys_per_step));
}

// `next` is what the caller will do after it: its rows are fetched during the softmax of these.
void forward_task(const AttentionForwardParams& params, const Task& task, const Task& next, const Scratch& s) {
  const AttentionParams& p = params.problem;
  const AttentionSequence& sequence = *task.sequence;
  const int64_t head = task.head, query = task.query;
  const int64_t rows = smaller(p.query_block, sequence.seqlen_q - query);
  const int64_t group = p.num_heads / p.num_kv_heads, kv_head = head / group;
  Prefetch prefetch;
  prefetch_next(params, task, next, prefetch);
  const int64_t key_stop = padding_start(p, sequence, head, key_end(p, sequence, query + rows - 1));
  for (int64_t r = 0; r < rows; r += panel) {
    pack_score_queries(p, sequence.batch, head, sequence.query_row + query + r, smaller(panel, rows - r),
                       s.queries + r * p.head_dim);
    store_row(s.maximum + r, fill(-infinity));
    store_row(s.sum + r, fill(0));
    store_row(s.anchor + r, fill(0));
  }

  for (int64_t key = first_block(p, sequence, query); key < key_stop; key += key_block) {
    const int64_t block_keys = smaller(key_block, key_stop - key);
    pack_score_keys(p, sequence.batch, kv_head, sequence.key_row + key, block_keys, s.keys, key_block);
    const bool ordinary = pack_values(p, sequence.batch, kv_head, sequence.key_row + key, block_keys, s);
    for (int64_t r = 0; r < rows; r += panel) {
      const int64_t panel_rows = smaller(panel, rows - r), first_key = first_block(p, sequence, query + r);
      const int64_t keys = smaller(block_keys, key_end(p, sequence, query + r + panel_rows - 1) - key);
      if (keys <= 0 || key < first_key) continue;
      const ScorePanel t{p, sequence, head, query + r, panel_rows, key, keys};
      const ScoreOperands operands(p, s.queries + r * p.head_dim, s.keys, key_block, 0);
      operands.find_scores(keys, s.scores);
      const bool excludes = (transforms(p) || !t.takes_all()) && finish_scores(t, s.scores, s.keep, s.bias, nullptr);
      const bool first = key == first_key;
      softmax_panel(t, operands, s, r, first, excludes, prefetch);
      if (p.dropout.probability > 0) drop_weights(t, s.scores);
      add_values(t, s, r, first, excludes, ordinary);
    }
  }
  with_storage(p.query.dtype, [&](auto* type) {
    write_rows<std::remove_pointer_t<decltype(type)>>(params, sequence, head, query, rows, s);
  });
}

void forward(const AttentionForwardParams& params, void* memory, int64_t begin, int64_t end) {
  const AttentionParams& p = params.problem;
  Arena arena{static_cast<real*>(memory)};
  const Scratch scratch(p, arena);
  int64_t low = 0, high = p.num_sequences;  // the last sequence whose first task is not after `begin`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.sequences[middle].first_task <= begin ? low : high) = middle;
  }
  const AttentionSequence* sequence = p.sequences + low;
  const auto find = [&](int64_t task) -> Task {
    for (;; ++sequence) {  // sequences without queries have no task
      const int64_t blocks = (sequence->seqlen_q + p.query_block - 1) / p.query_block;
      const int64_t local = task - sequence->first_task;
      if (local < blocks * p.num_heads) return {sequence, local / blocks, local % blocks * p.query_block};
    }
  };
  Task task = find(begin);
  for (int64_t i = begin; i < end; ++i) {
    const Task next = i + 1 < end ? find(i + 1) : task;
    forward_task(params, task, next, scratch);
    task = next;
  }
}

void add_sequences(const double* parts, int64_t sequences, int64_t num_heads, double* total) {
  for (int64_t i = 0; i < sequences; ++i)
    for (int64_t head = 0; head < num_heads; ++head) total[head] += parts[i * num_heads + head];
}

}  // namespace

const AttentionKernels TRANSFUSE_ATTENTION_NAME(attention_kernels) = {
    forward_scratch_bytes, TRANSFUSE_ATTENTION_NAME(attention_backward_scratch_bytes), forward,
    TRANSFUSE_ATTENTION_NAME(attention_backward), add_sequences};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
