// From products to scores, and which pairs take part:
//
//   score = softcap(scale * q . k) + bias - slope * abs(query + offset - key)      softcap(s) = cap * tanh(s / cap)
//
// Policy: exclusion is a predicate, applied by select before the maximum; what is excluded has a score of -inf and a
// bit of its own, since a score that takes part may be -inf as well. A score that nothing is added to is kept without
// its scale: the difference from the row's maximum is taken first, exactly where it matters, and scaled then.
#pragma once

#include "cuda/attention_sequence.cuh"
#include "cuda/attention_tile.cuh"
#include "cuda/exact.cuh"
#include "cuda/tanh.cuh"

namespace transfuse::cuda {

constexpr float attention_infinity = __builtin_huge_valf();

// 16 rows of scores against Keys keys, as the accumulators of a warp hold them: element e of tile n belongs to row
// fragment_row() + 8 * (e / 2) and key 8 * n + fragment_column() + e % 2.
template <int Keys>
struct ScoreFragment {
  static constexpr int tiles = Keys / 8;
  static_assert(4 * tiles <= 32, "one bit for every score of a thread");
  float x[tiles][4];
  uint32_t excluded;  // bit 4 * n + e

  __device__ __forceinline__ void exclude(int n, int e) {
    x[n][e] = -attention_infinity;
    excluded |= 1u << (4 * n + e);
  }
  __device__ __forceinline__ bool is_excluded(int n, int e) const { return excluded >> (4 * n + e) & 1; }
};

// Products of the tile's rows [row, row + 16 * m_tiles) with all of its keys. What a fragment of keys meets is all that
// the warp has: it is read once.
template <int m_tiles, int Keys, class QueryTile, class KeyTile>
__device__ __forceinline__ void multiply_keys(ScoreFragment<Keys> (&scores)[m_tiles], const QueryTile& query,
                                              const KeyTile& key, int row) {
  using T = std::remove_pointer_t<decltype(query.data)>;
#pragma unroll
  for (int t = 0; t < m_tiles; ++t) {
    scores[t].excluded = 0;
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[t].x[n][e] = 0;
  }
  const RowsOperand<QueryTile> queries(query, row);
  const ProductsOperand<KeyTile> keys(key);
#pragma unroll
  for (int step = 0; step < QueryTile::columns / 16; ++step) {
    uint32_t a[m_tiles][4];
#pragma unroll
    for (int t = 0; t < m_tiles; ++t) queries.load(a[t], 16 * t, step);
#pragma unroll
    for (int n = 0; n < Keys / 8; n += 2) {
      uint32_t b[2][2];
      keys.load(b, 8 * n, step);
#pragma unroll
      for (int t = 0; t < m_tiles; ++t) {
        multiply<T>(scores[t].x[n], a[t], b[0]);
        multiply<T>(scores[t].x[n + 1], a[t], b[1]);
      }
    }
  }
}

// The first operand of 16 rows, held in registers from block to block.
template <class Tile>
struct HeldRows {
  static constexpr int steps = Tile::columns / 16;
  uint32_t a[steps][4];

  __device__ __forceinline__ void load(const Tile& tile, int row) {
    const RowsOperand<Tile> rows(tile, row);
#pragma unroll
    for (int step = 0; step < steps; ++step) rows.load(a[step], 0, step);
  }
};

// The same products as above, in the same order.
template <int Keys, class Tile, class KeyTile>
__device__ __forceinline__ void multiply_keys(ScoreFragment<Keys> (&scores)[1], const HeldRows<Tile>& held,
                                              const KeyTile& key) {
  using T = std::remove_pointer_t<decltype(Tile::data)>;
  scores[0].excluded = 0;
  const ProductsOperand<KeyTile> keys(key);
#pragma unroll
  for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[0].x[n][e] = 0;
#pragma unroll
  for (int step = 0; step < HeldRows<Tile>::steps; ++step)
#pragma unroll
    for (int n = 0; n < Keys / 8; n += 2) {
      uint32_t b[2][2];
      keys.load(b, 8 * n, step);
      multiply<T>(scores[0].x[n], held.a[step], b[0]);
      multiply<T>(scores[0].x[n + 1], held.a[step], b[1]);
    }
}

// ---- what is added, and what is excluded ----

// One of the two rows of a fragment that a thread has, against a block of keys that begins at `key`.
struct ScoreRow {
  KeyRange seen;
  int query, head;
};

__device__ __forceinline__ ScoreRow score_row(const AttentionParams& p, const AttentionTask& task, int row) {
  const int query = task.query(row);
  return {keys_of_query(p, task.sequence, query), query, task.head(row)};
}

template <int Keys>
__device__ __forceinline__ void exclude_unseen(ScoreFragment<Keys>& scores, const ScoreRow (&rows)[2], int key) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = key + fragment_column();
    const int begin = rows[half].seen.begin - column, end = rows[half].seen.end - column;
#pragma unroll
    for (int at = 0; at < Keys; ++at)
      if (at % 8 < 2 && at >= end) scores.exclude(at / 8, 2 * half + at % 8);
    if (begin <= 0) continue;
#pragma unroll
    for (int at = 0; at < Keys; ++at)
      if (at % 8 < 2 && at < begin) scores.exclude(at / 8, 2 * half + at % 8);
  }
}

struct Two {
  float x[2];
};

// Two neighbouring elements of a bias, one aligned access.
template <class E>
using PairOf = std::conditional_t<sizeof(E) == 4, float2, uint32_t>;
template <class E>
__device__ __forceinline__ PairOf<E> load_pair(const E* row, int key) {
  return *reinterpret_cast<const PairOf<E>*>(row + key);
}
__device__ __forceinline__ Two widened(float, float2 pair) { return {{pair.x, pair.y}}; }
template <class E>
__device__ __forceinline__ Two widened(E low, uint32_t pair) {
  E high;
  set_bits(low, pair);
  set_bits(high, pair >> 16);
  return {{to_float(low), to_float(high)}};
}

// Elements `key` and key + 1 of a row of a bias, 0 from `end` on. `pairs`: both are one aligned access.
template <class E>
__device__ __forceinline__ Two load_two(const E* row, int64_t stride, int key, int end, bool pairs) {
  if (pairs && key + 1 < end) return widened(E{}, load_pair(row, key));
  return {{key < end ? to_float(row[key * stride]) : 0.0f, key + 1 < end ? to_float(row[(key + 1) * stride]) : 0.0f}};
}

// Calls body(n, half, values) for the biases of a fragment, `half` 0 or 1 for the thread's two rows.
template <class T, int Keys, class Body>
__device__ __forceinline__ void for_each_bias(const AttentionParams& p, const AttentionSequence& s,
                                              const ScoreRow (&rows)[2], int key, Body body) {
  const auto each = [&](auto element) {
    using E = decltype(element);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const E* row = row_of<E>(p.bias, s.batch, rows[half].head, rows[half].query);
      if (p.bias_pairs && key + Keys <= s.seqlen_k) {  // all of them are under way before the first is used
        PairOf<E> pairs[Keys / 8];
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n) pairs[n] = load_pair(row, key + 8 * n + fragment_column());
#pragma unroll
        for (int n = 0; n < Keys / 8; ++n) body(n, half, widened(E{}, pairs[n]));
        continue;
      }
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
        body(n, half, load_two(row, p.bias.col, key + 8 * n + fragment_column(), s.seqlen_k, p.bias_pairs));
    }
  };
  if (p.bias_in_float)
    each(float{});
  else
    each(T{});
}

__device__ __forceinline__ float alibi_slope(const AttentionParams& p, const AttentionSequence& s, int head) {
  return p.alibi_slopes[s.batch * p.alibi_batch + head];
}
// abs(query + offset - key).
__device__ __forceinline__ float distance(const AttentionParams& p, const AttentionSequence& s, int query, int key) {
  return fabsf(static_cast<float>(static_cast<int64_t>(query) + diagonal(p, s) - key));
}

// From products to scores that have their scale, and the exclusion by a bias.
template <class T, int Keys>
__device__ __forceinline__ void transform_scores(ScoreFragment<Keys>& scores, const AttentionParams& p,
                                                 const AttentionSequence& s, const ScoreRow (&rows)[2], int key) {
  const bool capped = p.softcap > 0;
  const float factor = capped ? p.softcap : p.scale;
  if (capped) {
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores.x[n][e] = tanh_and_slope(scores.x[n][e] * p.scale_over_softcap).value;
  }
  if (p.bias.data) {
    for_each_bias<T, Keys>(p, s, rows, key, [&](int n, int half, Two bias) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores.x[n][2 * half + i];
        score = fmaf(score, factor, bias.x[i]);
        if (bias.x[i] == -attention_infinity) scores.exclude(n, 2 * half + i);
      }
    });
  } else {
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores.x[n][e] *= factor;
  }
  if (p.alibi_slopes) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float slope = alibi_slope(p, s, rows[half].head);
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float away = distance(p, s, rows[half].query, key + 8 * n + fragment_column() + i);
          scores.x[n][2 * half + i] = fmaf(-slope, away, scores.x[n][2 * half + i]);
        }
    }
  }
}

template <int Keys>
__device__ __forceinline__ void exclude_masked(ScoreFragment<Keys>& scores, const AttentionParams& p,
                                               const AttentionSequence& s, const ScoreRow (&rows)[2], int key) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint8_t* row = row_of<uint8_t>(p.mask, s.batch, rows[half].head, rows[half].query);
    if (p.mask_pairs && key + Keys <= s.seqlen_k) {  // as for biases
      uint16_t pairs[Keys / 8];
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n)
        pairs[n] = *reinterpret_cast<const uint16_t*>(row + key + 8 * n + fragment_column());
#pragma unroll
      for (int n = 0; n < Keys / 8; ++n) {
        if ((pairs[n] & 0xFF) == 0) scores.exclude(n, 2 * half);
        if (pairs[n] >> 8 == 0) scores.exclude(n, 2 * half + 1);
      }
      continue;
    }
#pragma unroll
    for (int n = 0; n < Keys / 8; ++n) {
      const int at = key + 8 * n + fragment_column();
      if (p.mask_pairs && at + 1 < s.seqlen_k) {
        const uint16_t two = *reinterpret_cast<const uint16_t*>(row + at);
        if ((two & 0xFF) == 0) scores.exclude(n, 2 * half);
        if (two >> 8 == 0) scores.exclude(n, 2 * half + 1);
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (at + i < s.seqlen_k && row[(at + i) * p.mask.col] == 0) scores.exclude(n, 2 * half + i);
      }
    }
  }
}

// ---- saturated rows ----
//
// A score of size x carries an absolute error of about x * 2^-24, and exp makes it a relative error of the weights.
// Rows whose largest logit is beyond saturated_logit therefore take their products again, 16 dimensions at a time and
// added in two floats, and keep all scores relative to an anchor of the row's size, so that rounding them costs nothing
// that matters. A softcap has no such rows: it flattens what it saturates.

constexpr float saturated_logit = 128.0f;

// Products with rows [row, row + 8) of the second operand's tile, added in two floats. Eight rows at a time, as the
// registers that this takes are taken from the whole kernel.
template <class T, int steps, class First, class Second>
__device__ __forceinline__ void multiply_in_two_floats(Pair (&sums)[4], const First& first, const Second& second,
                                                       int row) {
#pragma unroll
  for (int e = 0; e < 4; ++e) sums[e] = {0, 0};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    uint32_t a[4], b[2][2];
    first.load(a, 0, step);
    second.load(b, row / 16 * 16, step);
    float part[4] = {};
    multiply<T>(part, a, b[row / 8 % 2]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Pair sum = two_sum(sums[e].hi, part[e]);
      sums[e] = {sum.hi, sums[e].lo + sum.lo};
    }
  }
}

// Of the thread's two rows.
struct RowAnchor {
  bool refine[2];
  float anchor[2];
};

// scores - anchor in the rows to refine, from operands of products over 16 * steps dimensions.
template <class T, int steps, int Keys, class First, class Second>
__device__ __forceinline__ void refine_scores(ScoreFragment<Keys>& scores, const AttentionParams& p,
                                              const AttentionSequence& s, const ScoreRow (&rows)[2],
                                              const RowAnchor& row_anchor, const First& queries, const Second& keys,
                                              int key, bool general) {
#pragma unroll
  for (int n = 0; n < Keys / 8; ++n) {
    Pair product[4];
    multiply_in_two_floats<T, steps>(product, queries, keys, 8 * n);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2, at = key + 8 * n + fragment_column() + e % 2;
      const Pair exact = product[e];
      if (!row_anchor.refine[half] || scores.is_excluded(n, e)) continue;
      float& score = scores.x[n][e];
      if (!isfinite(exact.hi + exact.lo)) {
        score -= row_anchor.anchor[half];
      } else if (general && p.transforms) {
        double logit = (static_cast<double>(exact.hi) + exact.lo) * p.scale;
        if (p.bias.data && at < s.seqlen_k) {
          const int64_t place = at * p.bias.col;
          logit += p.bias_in_float
              ? row_of<float>(p.bias, s.batch, rows[half].head, rows[half].query)[place]
              : to_float(row_of<T>(p.bias, s.batch, rows[half].head, rows[half].query)[place]);
        }
        if (p.alibi_slopes)
          logit -= static_cast<double>(alibi_slope(p, s, rows[half].head)) * distance(p, s, rows[half].query, at);
        score = static_cast<float>(logit - row_anchor.anchor[half]);
      } else {
        score = (exact.hi - row_anchor.anchor[half]) + exact.lo;
      }
    }
  }
}

}  // namespace transfuse::cuda
