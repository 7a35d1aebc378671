// bfloat16 operands where the CPU multiplies them in pairs (vec.h's dot): the second form of the panels, and of the two
// products of the forward. Those of the backward: attention_backward_pairs.h.
//
// A pair is two neighbours along the depth of a product: dimensions 2i, 2i + 1 of queries and keys, keys 2j, 2j + 1 of
// weights and values. Queries, keys and values are stored as they come; weights are rounded to bfloat16, their sum is
// not. Layout, in pairs: queries [D / 2][16 queries], keys [key][D / 2], values [Dv / 16][keys / 2][16], weights
// [keys / 2][16 queries].
//
// Policy: dot() takes subnormal numbers as 0. For scores that is below their rounding (a query or key element below
// 2^-126 counts beside another above 2^100 only). Values of such a size are a result of their own: elements below
// `tiny` are left out of the pairs and added in float, and so are infinities and NaN, which an excluded key must not
// bring in through 0 * inf. A key without such elements adds exact zeros there, so no row depends on another's keys.
#pragma once

#include "attention_scores.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

TRANSFUSE_INLINE bool multiplies_pairs(const AttentionParams& p) {
  return has_bf16_dot && !in_double && p.query.dtype == DType::bf16;
}

constexpr int64_t pair_chain = 32;  // pairs per chain of dots
constexpr float tiny = 0x1p-100f;   // products with weights down to 2^-26 stay normal

TRANSFUSE_INLINE int64_t pairs(int64_t n) { return (n + 1) / 2; }
// Pairs from one row to the next of rows of n elements, whole panels.
TRANSFUSE_INLINE int64_t row_pairs(int64_t n) { return panels(pairs(n)) * panel; }
TRANSFUSE_INLINE int64_t key_pairs(const AttentionParams& p) { return row_pairs(p.head_dim); }

// ---- into pairs ----

// Up to 32 elements as sixteen pairs, absent ones 0.
TRANSFUSE_INLINE i32 load_pairs(const bf16* source, int64_t col_stride, int64_t n) {
  alignas(64) bf16 x[2 * panel];
  if (col_stride != 1 || n < 2 * panel) {
    for (int64_t i = 0; i < 2 * panel; ++i) x[i] = i < n ? source[i * col_stride] : bf16{0};
    source = x;
  }
  int32_t words[panel];
  __builtin_memcpy(words, source, sizeof words);
  return load(words);
}

TRANSFUSE_INLINE f32 load_columns(const bf16* source, int64_t col_stride, int64_t n) {
  if (col_stride == 1) return load_n(source, n);
  alignas(64) float x[panel] = {};
  for (int64_t i = 0; i < n; ++i) x[i] = to_float(source[i * col_stride]);
  return load(x);
}

TRANSFUSE_INLINE void store_pairs(int32_t* out, i32 x) { store(reinterpret_cast<float*>(out), from_bits(x)); }

// Up to 16 rows as one transposed panel, [cols / 2][16], absent rows 0, negated where `sign` is negative.
void pack_across_pairs(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t cols,
                       real sign, int32_t* out) {
  const i32 flip = set1i(sign < 0 ? INT32_MIN | 0x8000 : 0);
  const bf16* source = at<bf16>(t, batch, head, row, 0);
  for (int64_t c = 0; c < cols; c += 2 * panel) {
    const int64_t n = smaller(2 * panel, cols - c);
    f32 x[panel];
    for (int64_t r = 0; r < panel; ++r)
      x[r] = r < rows ? from_bits(load_pairs(source + r * t.row + c * t.col, t.col, n) ^ flip) : zero();
    store_transposed(reinterpret_cast<float*>(out) + c / 2 * panel, x, pairs(n));
  }
}

// Rows as they come, row_pairs(cols) apart.
void pack_row_pairs(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t cols,
                    int32_t* out) {
  const bf16* source = at<bf16>(t, batch, head, row, 0);
  for (int64_t r = 0; r < rows; ++r, source += t.row) {
    for (int64_t c = 0; c < cols; c += 2 * panel)
      store_pairs(out + r * row_pairs(cols) + c / 2,
                  load_pairs(source + c * t.col, t.col, smaller(2 * panel, cols - c)));
  }
}

TRANSFUSE_INLINE mask exceptional(f32 x) {
  return ((abs(x) < set1(tiny)) & ~(x == zero())) | ~(abs(x) < set1(__builtin_inff()));
}

// Ordinary values into pairs, [Dv / 16][key_block / 2][16]. If there are others they go to `rest`, [Dv / 16][key_block]
// [16], with zeros between them. Says whether there are.
TRANSFUSE_INLINE bool pack_value_pairs(const AttentionParams& p, int64_t batch, int64_t kv_head, int64_t row,
                                       int64_t keys, int32_t* out, float* rest) {
  const AttentionTensor& t = p.value;
  const bf16* source = at<bf16>(t, batch, kv_head, row, 0);
  const auto load_value = [&](int64_t j, int64_t c) {
    return j < keys ? load_columns(source + j * t.row + c * t.col, t.col, smaller(panel, p.value_head_dim - c)) : zero();
  };
  mask found = first_n(0);
  for (int64_t j = 0; j < keys; j += 2) {
    for (int64_t c = 0; c < p.value_head_dim; c += panel) {
      const f32 even = load_value(j, c), odd = load_value(j + 1, c);
      const mask of_even = exceptional(even), of_odd = exceptional(odd);
      found = found | of_even | of_odd;
      store_pairs(out + (c / panel * (key_block / 2) + j / 2) * panel,
                  pair_up(select(of_even, zero(), even), select(of_odd, zero(), odd)));
    }
  }
  if (!any(found)) return false;
  for (int64_t j = 0; j < keys; ++j)
    for (int64_t c = 0; c < p.value_head_dim; c += panel) {
      const f32 x = load_value(j, c);
      store(rest + (c / panel * key_block + j) * panel, select(exceptional(x), x, zero()));
    }
  return true;
}

// Weights of one panel of queries, [keys][16].
TRANSFUSE_INLINE void pack_weight_pairs(const float* weights, int64_t keys, int32_t* out) {
  for (int64_t j = 0; j < keys; j += 2)
    store_pairs(out + j / 2 * panel, round_to_pairs(load(weights + j * panel),
                                                    j + 1 < keys ? load(weights + (j + 1) * panel) : zero()));
}

// ---- products ----

// c[r][0..16) = or += sum over k of the dots of A(r, k) and b[k][0..16), in pairs; A(r, k) at a[r * row + k * step].
template <int R>
TRANSFUSE_INLINE void pair_product_tile(const int32_t* a, int64_t row, int64_t step, const int32_t* b, int64_t depth,
                                        float* c, bool accumulate) {
  int64_t start = 0;
  do {
    f32 sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = zero();
    const int64_t stop = smaller(depth, start + pair_chain);
    for (int64_t k = start; k < stop; ++k) {
      const i32 x = load(b + k * panel);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r] = dot(sum[r], set1i(a[r * row + k * step]), x);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      store(c + r * panel, accumulate || start > 0 ? load(c + r * panel) + sum[r] : sum[r]);
    start += pair_chain;
  } while (start < depth);
}

// c[r] = or += the dots of A(r, k) and b[k] for all rows.
TRANSFUSE_INLINE void pair_product(const int32_t* a, int64_t row, int64_t step, const int32_t* b, int64_t depth,
                                   float* c, int64_t rows, bool accumulate) {
  for_each_tile(rows, [&](int64_t r, auto tile) __attribute__((always_inline)) {
    pair_product_tile<tile.value>(a + r * row, row, step, b, depth, c + r * panel, accumulate);
  });
}

// ---- operands of the scores, in either form ----

// A panel of queries and the keys from some key on. Both forms take no more memory than [D / 16 rounded up][rows][16].
struct ScoreOperands {
  const AttentionParams& p;
  const real *queries, *keys;
  int64_t key_rows;  // keys in a panel, where keys are panels

  ScoreOperands(const AttentionParams& params, const real* panel_of_queries, const real* packed_keys, int64_t rows,
                int64_t first_key)
      : p(params), queries(panel_of_queries), keys(packed_keys), key_rows(rows) {
    keys = multiplies_pairs(p) ? as_reals(as_pairs(keys) + first_key * key_pairs(p)) : keys + first_key * panel;
  }

  static const int32_t* as_pairs(const real* x) { return reinterpret_cast<const int32_t*>(x); }
  static const real* as_reals(const int32_t* x) { return reinterpret_cast<const real*>(x); }

  // scores[key][query] of n keys.
  void find_scores(int64_t n, real* scores) const {
    if (!multiplies_pairs(p)) return product<Along::rows>(keys, key_rows * panel, queries, p.head_dim, scores, n, false);
    pair_product(as_pairs(keys), key_pairs(p), 1, as_pairs(queries), pairs(p.head_dim),
                 reinterpret_cast<float*>(scores), n, false);
  }
  // Element d of each query, and of one key.
  vec query(int64_t d) const {
    if (!multiplies_pairs(p)) return load_row(queries + d * panel);
    const i32 x = load(as_pairs(queries) + d / 2 * panel);
    return to_vec(d % 2 ? odd_of(x) : even_of(x));
  }
  real key(int64_t j, int64_t d) const {
    if (!multiplies_pairs(p)) return keys[d / panel * key_rows * panel + j * panel + d % panel];
    const uint32_t x = static_cast<uint32_t>(as_pairs(keys)[j * key_pairs(p) + d / 2]);
    return to_float(bf16{static_cast<uint16_t>(d % 2 ? x >> 16 : x)});
  }
};

void pack_score_queries(const AttentionParams& p, int64_t batch, int64_t head, int64_t row, int64_t rows,
                        real* out) {
  if (multiplies_pairs(p))
    pack_across_pairs(p.query, batch, head, row, rows, p.head_dim, query_sign(p), reinterpret_cast<int32_t*>(out));
  else
    pack_tensor_transposed(p.query, batch, head, row, rows, p.head_dim, query_sign(p), out);
}

void pack_score_keys(const AttentionParams& p, int64_t batch, int64_t kv_head, int64_t row, int64_t keys, real* out,
                     int64_t key_rows) {
  if (multiplies_pairs(p))
    pack_row_pairs(p.key, batch, kv_head, row, keys, p.head_dim, reinterpret_cast<int32_t*>(out));
  else
    pack_tensor_rows(p.key, batch, kv_head, row, keys, p.head_dim, out, key_rows);
}

}  // namespace
}  // namespace transfuse::cpu::TRANSFUSE_ISA
