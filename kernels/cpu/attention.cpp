// Attention forward: softmax(scale * Q K^T + bias) V over blocks of keys, no matrix of Lq x Lk anywhere.
//
// A task packs a block of queries, then walks the key blocks of its sequence from key 0; per block the keys and values are packed
// once, and each panel of 16 queries computes its scores, updates its maximum, sum and output.
// Policy: the maximum is exact and is that of unscaled scores, the scale enters inside exp, weights stay float32, the
// division comes once at the end. A row's arithmetic depends on its own keys alone: an excluded key adds exact zeros,
// and blocks start at the sequence's own key 0, so batch, packing, masks and threads leave every bit as it is.
#include "attention_panels.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

int64_t attention_backward_scratch_bytes(const AttentionBackwardParams& params);
void attention_backward(const AttentionBackwardParams& params, void* scratch, int64_t sequence, int64_t kv_head);

namespace {

constexpr int64_t key_block = 128;  // one panel of scores is 8 KiB: it stays in the first-level cache

struct Scratch {
  float *queries;        // [query panels][D][16], transposed
  float *keys, *values;  // [D / 16][key_block][16], [Dv / 16][key_block][16]
  float* output;         // [Dv / 16][query_block][16]
  float *scores, *keep, *bias;  // [key_block][16]
  float *maximum, *sum, *anchor;  // [query_block]; maximum and scores are relative to anchor
  int64_t floats;

  Scratch(const AttentionParams& p, void* memory) : floats(0) {
    const int64_t query_block = p.query_block, d = panels(p.head_dim) * panel, dv = panels(p.value_head_dim) * panel;
    queries = take(memory, query_block * d);
    keys = take(memory, key_block * d);
    values = take(memory, key_block * dv);
    output = take(memory, query_block * dv);
    scores = take(memory, key_block * panel);
    keep = take(memory, key_block * panel);
    bias = take(memory, key_block * panel);
    maximum = take(memory, query_block);
    sum = take(memory, query_block);
    anchor = take(memory, query_block);
  }
  float* take(void* memory, int64_t n) {
    float* start = static_cast<float*>(memory) + floats;
    floats += n;
    return start;
  }
};

int64_t forward_scratch_bytes(const AttentionForwardParams& params) {
  alignas(64) static float anchor[1];
  return Scratch(params.problem, anchor).floats * static_cast<int64_t>(sizeof(float));
}

// Turns the scores of the panel at row r into weights exp(logit - maximum), and brings the sum and output of its rows to
// the new maximum.
void softmax_panel(const AttentionParams& p, const Scratch& s, int64_t r, int64_t keys, bool first_block, bool excludes) {
  const float scale = logit_scale(p);
  const ScaledExp weight(scale);
  float* scores = s.scores;
  const float* keep = excludes ? s.keep : nullptr;
  const f32 before = load(s.maximum + r);
  f32 anchor = load(s.anchor + r);
  f32 maximum = row_maximum(scores, keep, keys);
  const mask refine = saturated(maximum, scale) | ~(anchor == zero());
  if (any(refine)) {
    if (first_block) store(s.anchor + r, anchor = select(refine, maximum, zero()));
    refine_scores(p, s.queries + r * p.head_dim, s.keys, key_block * panel, keys, p.bias.data ? s.bias : nullptr, refine, anchor,
                  max(maximum, before + anchor), scores);
    maximum = row_maximum(scores, keep, keys);
  }
  maximum = max(maximum, before);

  f32 sums[4] = {zero(), zero(), zero(), zero()};
  const auto emit = [&](int64_t j, f32& sum) {
    f32 w = weight(load(scores + j * panel) - maximum);
    if (keep) w = select(load(keep + j * panel) > zero(), w, zero());
    sum = sum + w;
    store(scores + j * panel, w);
  };
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4)
    for (int64_t u = 0; u < 4; ++u) emit(j + u, sums[u]);
  for (int64_t u = 0; j < keys; ++j, ++u) emit(j, sums[u]);
  const f32 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);

  store(s.maximum + r, maximum);
  if (first_block) return store(s.sum + r, sum);
  const mask same = before == maximum;  // also where nothing was kept so far: both -inf
  const f32 factor = select(same, set1(1.0f), weight(before - maximum));
  store(s.sum + r, fma(load(s.sum + r), factor, sum));
  if (all(same)) return;
  alignas(64) float factors[panel];
  store(factors, factor);
  for (int64_t c = 0; c < panels(p.value_head_dim); ++c) {
    float* output = s.output + (c * p.query_block + r) * panel;
    for (int64_t i = 0; i < panel; ++i) store(output + i * panel, load(output + i * panel) * set1(factors[i]));
  }
}

// Divides by the sum, rounds once, writes rows and lse.
template <class T>
void write_rows(const AttentionForwardParams& params, const AttentionSequence& sequence, int64_t head, int64_t query, int64_t rows,
                bool empty, const Scratch& s) {
  const AttentionParams& p = params.problem;
  T* out = static_cast<T*>(params.output.data) + sequence.batch * params.output.batch + head * params.output.head +
      (sequence.query_row + query) * params.output.row;
  float* lse = static_cast<float*>(params.lse.data) + sequence.batch * params.lse.batch + head * params.lse.head +
      (sequence.query_row + query) * params.lse.row;
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = empty ? 0.0f : s.sum[r];
    const bool nothing = sum == 0.0f;  // the largest weight of a row is 1, so only a row without keys sums to 0
    const double top = (static_cast<double>(s.maximum[r]) + s.anchor[r]) * logit_scale(p);
    lse[r * params.lse.row] = nothing ? -__builtin_inff() : static_cast<float>(top + __builtin_logf(sum));
    const f32 divisor = set1(sum);
    for_each_vec(p.value_head_dim, [&](int64_t c, int64_t n) {
      const f32 x = nothing ? zero() : load(s.output + c * p.query_block + r * panel) / divisor;
      store_n(out + r * params.output.row + c, x, n);
    });
  }
}

void forward_task(const AttentionForwardParams& params, const AttentionSequence& sequence, int64_t head, int64_t query, const Scratch& s) {
  const AttentionParams& p = params.problem;
  const int64_t rows = smaller(p.query_block, sequence.seqlen_q - query);
  const int64_t kv_head = head / (p.num_heads / p.num_kv_heads);
  const int64_t output_panels = panels(p.value_head_dim);
  const int64_t key_stop = padding_start(p, sequence, head, key_limit(p, sequence, query + rows - 1));
  for (int64_t r = 0; r < rows; r += panel)
    pack_tensor_transposed(p.query, sequence.batch, head, sequence.query_row + query + r, smaller(panel, rows - r), p.head_dim,
                           query_sign(p), s.queries + r * p.head_dim);
  for (int64_t r = 0; r < rows; r += panel) {
    store(s.maximum + r, set1(-__builtin_inff()));
    store(s.anchor + r, zero());
  }

  for (int64_t key = 0; key < key_stop; key += key_block) {
    const int64_t block_keys = smaller(key_block, key_stop - key);
    pack_tensor_rows(p.key, sequence.batch, kv_head, sequence.key_row + key, block_keys, p.head_dim, s.keys, key_block);
    const bool finite = pack_tensor_rows(p.value, sequence.batch, kv_head, sequence.key_row + key, block_keys, p.value_head_dim, s.values,
                                         key_block);
    for (int64_t r = 0; r < rows; r += panel) {
      const int64_t panel_rows = smaller(panel, rows - r);
      const int64_t keys = larger(0, smaller(block_keys, key_limit(p, sequence, query + r + panel_rows - 1) - key));
      if (keys == 0 && key > 0) continue;
      product<Along::rows>(s.keys, key_block * panel, s.queries + r * p.head_dim, p.head_dim, s.scores, keys, false);
      const bool excludes = !tile_is_plain(p, sequence, query + r, key, keys) &&
          apply_mask_and_bias(p, sequence, head, query + r, panel_rows, key, keys, s.scores, s.keep, s.bias);
      softmax_panel(p, s, r, keys, key == 0, excludes);
      for (int64_t c = 0; c < output_panels; ++c) {
        const float* values = s.values + c * key_block * panel;
        float* output = s.output + (c * p.query_block + r) * panel;
        if (finite || !excludes)
          product<Along::columns>(s.scores, panel * panel, values, keys, output, panel_rows, key > 0);
        else
          product_of_kept<Along::columns>(s.scores, s.keep, panel * panel, values, keys, output, panel_rows, key > 0);
      }
    }
  }
  if (p.query.dtype == DType::f32)
    write_rows<float>(params, sequence, head, query, rows, key_stop == 0, s);
  else
    write_rows<bf16>(params, sequence, head, query, rows, key_stop == 0, s);
}

void forward(const AttentionForwardParams& params, void* memory, int64_t begin, int64_t end) {
  const AttentionParams& p = params.problem;
  const Scratch scratch(p, memory);
  int64_t low = 0, high = p.num_sequences;  // the last sequence whose first task is not after `begin`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (p.sequences[middle].first_task <= begin ? low : high) = middle;
  }
  const AttentionSequence* sequence = p.sequences + low;
  for (int64_t task = begin; task < end; ++task) {
    int64_t blocks, local;
    for (;; ++sequence) {  // sequences without queries have no task
      blocks = (sequence->seqlen_q + p.query_block - 1) / p.query_block;
      local = task - sequence->first_task;
      if (local < blocks * p.num_heads) break;
    }
    forward_task(params, *sequence, local / blocks, local % blocks * p.query_block, scratch);
  }
}

}  // namespace

const AttentionKernels attention_kernels = {forward_scratch_bytes, attention_backward_scratch_bytes, forward, attention_backward};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
