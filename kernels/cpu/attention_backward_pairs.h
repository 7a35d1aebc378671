// The backward's products in pairs of bfloat16 (attention_bf16.h): scores and dP from the tensors as they come, dV, dK
// and dQ from P and dS rounded to bfloat16. Statistics, delta and sums stay float.
//
// Policy: a pair of query and key is ordinary, and goes through the pairs, unless one of the two is careful: a key with
// an exceptional element in K or V, a query with one in Q or dO or whose dS are all tiny. Careful rows hold zeros in the
// pairs, and their products are added in float. Which of the two ways a product goes depends on its own query and key
// alone, so what an excluded key holds changes no bit.
#pragma once

#include "attention_bf16.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

// Of a tile of two panels of queries, whose neighbours lie in one register.
constexpr int64_t tile_pairs = panel;

struct PairScratch {
  int64_t length_pairs;
  int32_t* values;                 // [length][Dv / 2]
  int32_t* keys;                   // [D / 16][length / 2][16], pairs of neighbouring keys
  int32_t *queries, *grads;        // [D / 16][16][16], [Dv / 16][16][16], pairs of neighbouring queries
  int32_t* grads_across;           // [2][Dv / 2][16]
  int32_t *weights, *grad_scores;  // [length][16], pairs of neighbouring queries, from the tile's first key on
  int32_t* grad_scores_across;     // [2][length / 2][16], pairs of neighbouring keys, likewise
  real *careful_keys, *careful_queries;  // [length], [32]: 1 or 0
  real* grad_weights;              // [key_block][16], dP in float

  PairScratch(const AttentionParams& p, int64_t length, Arena& arena) : length_pairs(pairs(length)) {
    const auto take = [&](int64_t n) { return reinterpret_cast<int32_t*>(arena.take(n)); };
    const int64_t d = panels(p.head_dim) * panel, dv = panels(p.value_head_dim) * panel;
    values = take(length * row_pairs(p.value_head_dim));
    keys = take(length_pairs * d);
    queries = take(tile_pairs * d);
    grads = take(tile_pairs * dv);
    grads_across = take(2 * row_pairs(p.value_head_dim) * panel);
    weights = take(2 * length_pairs * tile_pairs);
    grad_scores = take(2 * length_pairs * tile_pairs);
    grad_scores_across = take(2 * length_pairs * panel);
    careful_keys = arena.take(panels(length) * panel);
    careful_queries = arena.take(2 * panel);
    grad_weights = arena.take(key_block * panel);
  }
};

// Marks rows of pack_row_pairs() that hold an exceptional element. Says whether there are.
bool mark_exceptional(const int32_t* rows_of_pairs, int64_t rows, int64_t cols, real* careful) {
  bool found = false;
  for (int64_t r = 0; r < rows; ++r) {
    mask of_row = first_n(0);
    for (int64_t c = 0; c < row_pairs(cols); c += panel) {
      const i32 x = load(rows_of_pairs + r * row_pairs(cols) + c);
      of_row = of_row | exceptional(even_of(x)) | exceptional(odd_of(x));
    }
    if (!any(of_row)) continue;
    careful[r] = 1;
    found = true;
  }
  return found;
}

// Ordinary rows as pairs of neighbours, [cols / 16][panel_pairs][16]. The others are marked and become zeros. Says
// whether there are.
bool pack_neighbours(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t cols,
                     int32_t* out, int64_t panel_pairs, real* careful) {
  const bf16* source = at<bf16>(t, batch, head, row, 0);
  const auto load_element = [&](int64_t r, int64_t c) {
    return r < rows ? load_columns(source + r * t.row + c * t.col, t.col, smaller(panel, cols - c)) : zero();
  };
  bool found = false;
  for (int64_t r = 0; r < rows; r += 2) {
    mask of_even = first_n(0), of_odd = first_n(0);
    for (int64_t c = 0; c < cols; c += panel) {
      const f32 even = load_element(r, c), odd = load_element(r + 1, c);
      of_even = of_even | exceptional(even);
      of_odd = of_odd | exceptional(odd);
      store_pairs(out + (c / panel * panel_pairs + r / 2) * panel, pair_up(even, odd));
    }
    if (!any(of_even | of_odd)) continue;
    found = true;
    if (any(of_even)) careful[r] = 1;
    if (any(of_odd)) careful[r + 1] = 1;
    for (int64_t c = 0; c < cols; c += panel)
      store_pairs(out + (c / panel * panel_pairs + r / 2) * panel,
                  pair_up(any(of_even) ? zero() : load_element(r, c), any(of_odd) ? zero() : load_element(r + 1, c)));
  }
  return found;
}

// One tile's P and dS, [key][16] in two panels `panel_step` apart, rounded into s; zeros for lanes outside `kept` and,
// unless null, for careful keys. largest[h] is the largest |dS| of each lane.
void round_tile(const float* weights, const float* grad_scores, int64_t panel_step, int64_t keys,
                const float* careful_keys, const mask (&kept)[2], const PairScratch& s, f32 (&largest)[2]) {
  largest[0] = largest[1] = zero();
  for (int64_t j = 0; j < keys; j += 2) {
    f32 grad[2][2];
    for (int64_t u = 0; u < 2; ++u) {
      const bool present = j + u < keys && !(careful_keys && careful_keys[j + u] != 0);
      f32 weight[2];
      for (int64_t h = 0; h < 2; ++h) {
        const int64_t from = h * panel_step + (j + u) * panel;
        weight[h] = present ? select(kept[h], load(weights + from), zero()) : zero();
        grad[h][u] = present ? select(kept[h], load(grad_scores + from), zero()) : zero();
        largest[h] = max(abs(grad[h][u]), largest[h]);  // a NaN is passed over
      }
      store_pairs(s.weights + (j + u) * tile_pairs, round_neighbours(weight[0], weight[1]));
      store_pairs(s.grad_scores + (j + u) * tile_pairs, round_neighbours(grad[0][u], grad[1][u]));
    }
    for (int64_t h = 0; h < 2; ++h)
      store_pairs(s.grad_scores_across + (h * s.length_pairs + j / 2) * panel, round_to_pairs(grad[h][0], grad[h][1]));
  }
}

}  // namespace
}  // namespace transfuse::cpu::TRANSFUSE_ISA
