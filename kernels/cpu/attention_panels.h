// Panels: the one data layout of the attention kernels, how data gets into it, and the one matrix product over it.
//
// A panel is [n][16] floats, adjacent. A matrix [rows, cols] is packed as panels of 16 columns: element (r, c) at
// [c / 16][r][c % 16]; transposed, as panels of 16 rows: element (r, c) at [r / 16][c][r % 16]. Scores are held
// transposed, [key][16 queries]: a softmax over keys then runs down the panel with one query per lane, so it needs no
// reduction across lanes, and a key-length tail needs no mask.
//
// Policy: an element of a product is one chain of FMAs in the order of depth, restarted every `chain` terms and summed
// in order. Tiles only choose which elements are computed together, so results do not depend on the tile shape.
#pragma once

#include "attention.h"
#include "exp.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

struct byte {  // one element of a boolean mask
  uint8_t value;
};
TRANSFUSE_INLINE float to_float(byte x) { return x.value ? 1.0f : 0.0f; }
TRANSFUSE_INLINE f32 load(const byte* p) {
  return select(nonzero(reinterpret_cast<const uint8_t*>(p)), set1(1.0f), zero());
}
TRANSFUSE_INLINE f32 load(const byte* p, int64_t n) {
  alignas(64) float x[lanes] = {};
  for (int64_t i = 0; i < n; ++i) x[i] = to_float(p[i]);
  return load(x);
}

namespace {

constexpr int64_t panel = lanes;
constexpr int64_t chain = 32;  // terms per chain: bounds the rounding error of long sums, and costs one add in 32
#if defined(__AVX512F__)
constexpr int tile_rows = 16;  // 16 accumulators of one register each
#else
constexpr int tile_rows = 6;  // 12 of the 16 registers accumulate
#endif

TRANSFUSE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TRANSFUSE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
TRANSFUSE_INLINE int64_t panels(int64_t n) { return (n + panel - 1) / panel; }

// Hands out pieces of the caller's scratch, whole panel rows each; without memory it only counts.
struct Arena {
  float* memory;
  int64_t floats = 0;

  float* take(int64_t n) {
    float* start = memory ? memory + floats : nullptr;
    floats += n;
    return start;
  }
  int64_t bytes() const { return floats * static_cast<int64_t>(sizeof(float)); }
};

// ---- into panels ----

// n elements `stride` apart, the other lanes 0.
template <class T>
TRANSFUSE_INLINE f32 load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_n(p, n);
  alignas(64) float x[panel] = {};
  for (int64_t i = 0; i < n; ++i) x[i] = to_float(p[i * stride]);
  return load(x);
}

// Packs rows into panels of 16 columns, `panel_rows` rows apart, tail columns 0. Says whether all elements are finite.
template <class T>
bool pack_rows(const T* source, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, float* out,
               int64_t panel_rows) {
  f32 defect = zero();  // x - x is NaN for inf and NaN
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = source + r * row_stride;
    for (int64_t c = 0; c < cols; c += panel) {
      const f32 x = load_strided(row + c * col_stride, col_stride, smaller(panel, cols - c));
      defect = defect + (x - x);
      store(out + c * panel_rows + r * panel, x);
    }
  }
  return !any(isnan(defect));
}

// Packs up to 16 rows as one transposed panel [cols][16], times `factor`, absent rows 0.
template <class T>
void pack_transposed_panel(const T* source, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols,
                           float factor, float* out) {
  const f32 factors = set1(factor);
  for (int64_t c = 0; c < cols; c += panel) {
    const int64_t n = smaller(panel, cols - c);
    f32 row[panel];
    for (int64_t r = 0; r < panel; ++r) {
      const T* from = source + r * row_stride + c * col_stride;
      row[r] = r < rows ? load_strided(from, col_stride, n) * factors : zero();
    }
    store_transposed(out + c * panel, row, n);
  }
}

// ---- products ----

// What the A operand is: element (r, k) at a[r * 16 + k] of panels of 16 k (rows), or at a[k * 16 + r] (columns).
enum class Along { rows, columns };

// c[r][0..16) = or += sum over k of A(r, k) * b[k][0..16) for R rows. `a_panel` leads from 16 k to the next 16.
template <int R, Along along>
TRANSFUSE_INLINE void product_tile(const float* a, int64_t a_panel, const float* b, int64_t depth, float* c,
                                   bool accumulate) {
  constexpr int64_t row = along == Along::rows ? panel : 1, step = along == Along::rows ? 1 : panel;
  int64_t start = 0;
  do {  // at least once: without terms the sum is 0
    f32 sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = zero();
    const int64_t stop = smaller(depth, start + chain);
    for (int64_t k0 = start; k0 < stop; k0 += panel) {
      const float* ak = a + k0 / panel * a_panel;
      const float* bk = b + k0 * panel;
      const int64_t n = smaller(panel, stop - k0);
      for (int64_t k = 0; k < n; ++k) {
        const f32 x = load(bk + k * panel);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r] = fma(set1(ak[r * row + k * step]), x, sum[r]);
      }
    }
    if (accumulate || start > 0) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r] = load(c + r * panel) + sum[r];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(c + r * panel, sum[r]);
    start += chain;
  } while (start < depth);
}

template <Along along>
void product(const float* a, int64_t a_panel, const float* b, int64_t depth, float* c, int64_t rows, bool accumulate) {
  constexpr int64_t row = along == Along::rows ? panel : 1;
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows)
    product_tile<tile_rows, along>(a + r * row, a_panel, b, depth, c + r * panel, accumulate);
  if (tile_rows > 8 && rows - r >= 8) {
    product_tile<8, along>(a + r * row, a_panel, b, depth, c + r * panel, accumulate);
    r += 8;
  }
  if (rows - r >= 4) {
    product_tile<4, along>(a + r * row, a_panel, b, depth, c + r * panel, accumulate);
    r += 4;
  }
  if (rows - r >= 2) {
    product_tile<2, along>(a + r * row, a_panel, b, depth, c + r * panel, accumulate);
    r += 2;
  }
  if (rows - r >= 1) product_tile<1, along>(a + r * row, a_panel, b, depth, c + r * panel, accumulate);
}

// The same chains without the terms whose keep(r, k), laid out as A, is 0: 0 * inf and 0 * NaN must not enter a sum.
template <Along along>
void product_of_kept(const float* a, const float* keep, int64_t a_panel, const float* b, int64_t depth, float* c,
                     int64_t rows, bool accumulate) {
  constexpr int64_t row = along == Along::rows ? panel : 1, step = along == Along::rows ? 1 : panel;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t start = 0;
    do {
      f32 sum = zero();
      for (int64_t k = start; k < smaller(depth, start + chain); ++k) {
        const int64_t at = r * row + k / panel * a_panel + k % panel * step;
        if (keep[at] != 0.0f) sum = fma(set1(a[at]), load(b + k * panel), sum);
      }
      if (accumulate || start > 0) sum = load(c + r * panel) + sum;
      store(c + r * panel, sum);
      start += chain;
    } while (start < depth);
  }
}

// ---- one head of one sequence ----

template <class T>
TRANSFUSE_INLINE const T* at(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t col) {
  return static_cast<const T*>(t.data) + batch * t.batch + head * t.head + row * t.row + col * t.col;
}

// Calls body with a pointer of the tensor's storage type.
template <class Body>
TRANSFUSE_INLINE auto with_type(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t col,
                                Body body) {
  return t.dtype == DType::f32 ? body(at<float>(t, batch, head, row, col)) : body(at<bf16>(t, batch, head, row, col));
}

bool pack_tensor_rows(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t cols,
                      float* out, int64_t panel_rows) {
  return with_type(t, batch, head, row, 0,
                   [&](auto* p) { return pack_rows(p, t.row, t.col, rows, cols, out, panel_rows); });
}

void pack_tensor_transposed(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows,
                            int64_t cols, float factor, float* out) {
  with_type(t, batch, head, row, 0, [&](auto* p) { pack_transposed_panel(p, t.row, t.col, rows, cols, factor, out); });
}

// A negative scale is moved into the queries, so that the largest score is the largest logit.
TRANSFUSE_INLINE float query_sign(const AttentionParams& p) { return p.scale < 0.0f ? -1.0f : 1.0f; }
TRANSFUSE_INLINE float score_scale(const AttentionParams& p) { return p.scale < 0.0f ? -p.scale : p.scale; }
// What a stored score has still to be multiplied by: adding a bias needs the product first.
TRANSFUSE_INLINE float logit_scale(const AttentionParams& p) { return p.bias.data ? 1.0f : score_scale(p); }

// Keys [0, key_limit) may take part in row `query`.
TRANSFUSE_INLINE int64_t key_limit(const AttentionParams& p, const AttentionSequence& s, int64_t query) {
  if (!p.causal) return s.seqlen_k;
  const int64_t limit = query + 1 + (p.bottom_right ? s.seqlen_k - s.seqlen_q : 0);
  return larger(0, smaller(limit, s.seqlen_k));
}

// Keys from here on are excluded for all queries by a mask or bias that is the same for all of them (padding): their
// zeros need not be added.
int64_t padding_start(const AttentionParams& p, const AttentionSequence& s, int64_t head, int64_t stop) {
  if (p.mask.data && p.mask.row == 0)
    while (stop > 0 && at<byte>(p.mask, s.batch, head, 0, stop - 1)->value == 0) --stop;
  if (p.bias.data && p.bias.row == 0)
    with_type(p.bias, s.batch, head, 0, 0, [&](auto* first) {
      while (stop > 0 && to_float(first[(stop - 1) * p.bias.col]) == -__builtin_inff()) --stop;
    });
  return stop;
}

// Whether no pair of the rows from `query` on and keys [key, key + keys) is excluded or carries a bias.
TRANSFUSE_INLINE bool tile_is_plain(const AttentionParams& p, const AttentionSequence& s, int64_t query, int64_t key,
                                    int64_t keys) {
  return !p.mask.data && !p.bias.data && key + keys <= key_limit(p, s, query);
}

// The tile of a mask or bias for one panel of queries, [keys][16 queries].
template <class T>
void pack_tile(const T* first, const AttentionTensor& t, int64_t rows, int64_t keys, float* out) {
  if (t.row != 0) return pack_transposed_panel(first, t.row, t.col, rows, keys, 1.0f, out);
  for (int64_t j = 0; j < keys; ++j) store(out + j * panel, set1(to_float(first[j * t.col])));
}

// For one panel of scores [keys][16 queries]: keep = 1 where the pair takes part, 0 where it is excluded, by the one
// predicate of all kinds of exclusion; and score = scale * score + bias where there is a bias. `bias` is scratch. Says
// whether some pair is excluded.
bool apply_mask_and_bias(const AttentionParams& p, const AttentionSequence& s, int64_t head, int64_t query,
                         int64_t rows, int64_t key, int64_t keys, float* scores, float* keep, float* bias) {
  if (p.mask.data) pack_tile(at<byte>(p.mask, s.batch, head, query, key), p.mask, rows, keys, keep);
  if (p.bias.data)
    with_type(p.bias, s.batch, head, query, key, [&](auto* first) { pack_tile(first, p.bias, rows, keys, bias); });
  alignas(64) float index[panel];
  for (int64_t i = 0; i < panel; ++i) index[i] = static_cast<float>(i);
  const f32 lane = load(index), one = set1(1.0f), nothing = set1(-__builtin_inff()), scale = set1(score_scale(p));
  const bool masked = p.mask.data, biased = p.bias.data, causal = p.causal;  // stores below may alias p, but not these
  const int64_t first_seen = key - query - (p.bottom_right ? s.seqlen_k - s.seqlen_q : 0);
  f32 all_kept = one;
  for (int64_t j = 0; j < keys; ++j) {
    f32 kept = masked ? load(keep + j * panel) : one;
    const int64_t first_lane = first_seen + j;  // the first query that sees key + j
    if (causal && first_lane > 0)
      kept = select(lane < set1(static_cast<float>(smaller(first_lane, panel))), zero(), kept);
    if (biased) {
      const f32 b = load(bias + j * panel);
      store(scores + j * panel, fma(load(scores + j * panel), scale, b));
      kept = select(b == nothing, zero(), kept);
    }
    all_kept = min(all_kept, kept);
    store(keep + j * panel, kept);
  }
  return any(all_kept == zero());
}

// exp(scale * difference) for difference <= 0, <= 1 ULP, since the product is not rounded. Weights below 2^-126 are 0.
struct ScaledExp {
  f32 scale, scale_log2e, lowest;

  TRANSFUSE_INLINE explicit ScaledExp(float s) : scale(set1(s)), scale_log2e(set1(s * exp_log2e)) {
    constexpr float zero_from = -88.0f, largest = 0x1.fffffep127f;  // e^-88 < 2^-126
    // A finite bound, since -inf * scale - n ln 2 is NaN.
    lowest = set1(s > 0.0f ? __builtin_fmaxf(-largest, zero_from / s) : 0.0f);
  }
  TRANSFUSE_INLINE f32 operator()(f32 difference) const {
    const f32 integer = set1(exp_integer + 127.0f);  // the low bits of the sum are the biased exponent, 0 from e^-88 on
    const f32 d = max(lowest, difference);           // in this order a NaN is kept
    const f32 shifted = fma(d, scale_log2e, integer);
    const f32 n = shifted - integer;
    const f32 r = fnma(n, set1(exp_ln2_lo), fma(d, scale, n * set1(-exp_ln2_hi)));  // n * ln2_hi is exact
    return exp_polynomial(r) * from_bits(shift_left<23>(bits(shifted)));
  }
};

// ---- saturated rows ----
//
// A score of size x carries an absolute error of about x * 2^-24, and exp makes it a relative error of the weights.
// Rows whose largest logit is beyond saturated_logit therefore compute their leading scores again in double, and keep
// all scores relative to an anchor of the row's size, so that rounding them to float costs nothing that matters.

constexpr float saturated_logit = 128.0f;
constexpr float leading_logits = 32.0f;       // e^-32 of the largest weight is below the rounding of the sum
constexpr float score_rounding = 0x1p-15f;    // a bound of a score's relative error, for what may be leading

TRANSFUSE_INLINE mask saturated(f32 maximum, float scale) {
  const f32 size = abs(maximum) * set1(scale);
  return (size > set1(saturated_logit)) & (size < set1(__builtin_inff()));
}

// scores[key] - anchor, in rows (lanes) of `refine` exact to one rounding where the score may lead given the row's
// maximum. `queries` is the transposed panel, `keys` the first key in panels `key_panel` apart, bias a panel or null.
void refine_scores(const AttentionParams& p, const float* queries, const float* keys, int64_t key_panel, int64_t n,
                   const float* bias, mask refine, f32 anchor, f32 maximum, float* scores) {
  const f32 leading = maximum - fma(abs(maximum), set1(score_rounding), set1(leading_logits / logit_scale(p)));
  const f64 scale = set1d(score_scale(p));
  for (int64_t j = 0; j < n; ++j) {
    const f32 score = load(scores + j * panel);
    const mask leads = refine & (score >= leading);
    f32 shifted = score - anchor;
    if (any(leads)) {
      f64 lo = zero64(), hi = zero64();
      for (int64_t d = 0; d < p.head_dim; ++d) {
        const f32 q = load(queries + d * panel);
        const f64 k = set1d(keys[d / panel * key_panel + j * panel + d % panel]);
        lo = fma(low(q), k, lo);
        hi = fma(high(q), k, hi);
      }
      if (bias) {
        const f32 b = load(bias + j * panel);
        lo = fma(lo, scale, low(b));
        hi = fma(hi, scale, high(b));
      }
      shifted = select(leads, narrow(lo - low(anchor), hi - high(anchor)), shifted);
    }
    store(scores + j * panel, shifted);
  }
}

// The largest kept score of each row; keep is null where all are. A NaN score is passed over: it shows in the sum.
f32 row_maximum(const float* scores, const float* keep, int64_t n) {
  const f32 nothing = set1(-__builtin_inff());
  f32 most[4] = {nothing, nothing, nothing, nothing};
  int64_t j = 0;
  const auto take = [&](int64_t at, f32& m) {
    const f32 score = load(scores + at * panel);
    m = max(keep ? select(load(keep + at * panel) > zero(), score, nothing) : score, m);  // m where the score is NaN
  };
  for (; j + 4 <= n; j += 4)
    for (int64_t u = 0; u < 4; ++u) take(j + u, most[u]);
  for (; j < n; ++j) take(j, most[0]);
  return max(max(most[0], most[1]), max(most[2], most[3]));
}

}  // namespace
}  // namespace transfuse::cpu::TRANSFUSE_ISA
