// Dropout of attention weights: one Philox word per weight, the same on every backend (CONTRACT section 3).
//
// Counter (key / 4, query, batch * H + head, offset), word key % 4, Philox key = seed; a weight is kept if its word is
// at least probability * 2^32, and is then divided by 1 - probability. Positions count within the sequence.
#pragma once

#include "attention_scores.h"
#include "philox.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

// Calls body(j, kept) for each key + j of the panel, kept = 1 or 0 per query. The panel starts at a multiple of 4 keys.
template <class Body>
TRANSFUSE_INLINE void for_each_draw(const ScorePanel& t, Body body) {
  constexpr int64_t words = 4;
  const AttentionDropout& dropout = t.p.dropout;
  const double threshold = __builtin_ceil(dropout.probability * 0x1p32);  // for an integer the same bound
  const bool drops_all = threshold >= 0x1p32;
  const i32 lowest_kept = set1i(static_cast<int32_t>(drops_all ? 0u : static_cast<uint32_t>(threshold)));
  const i32 query = iota() + set1i(static_cast<int32_t>(t.query));
  const i32 head = set1i(static_cast<int32_t>(t.s.batch * t.p.num_heads + t.head));
  const i32 offset = set1i(static_cast<int32_t>(dropout.offset));
  const uint32_t seed_low = static_cast<uint32_t>(dropout.seed), seed_high = static_cast<uint32_t>(dropout.seed >> 32);
  for (int64_t j = 0; j < t.keys; j += words) {
    const PhiloxWords draw =
        philox({{set1i(static_cast<int32_t>((t.key + j) / words)), query, head, offset}}, seed_low, seed_high);
    for (int64_t w = 0; w < smaller(words, t.keys - j); ++w) {
      const mask dropped = less_unsigned(draw.word[w], lowest_kept);
      body(j + w, to_vec(select(dropped, set1(0.0f), set1(drops_all ? 0.0f : 1.0f))));
    }
  }
}

// Dropped weights become 0; the division by 1 - probability is left to whoever divides by the sum.
TRANSFUSE_INLINE void drop_weights(const ScorePanel& t, real* weights) {
  for_each_draw(t, [&](int64_t j, vec kept) { store_row(weights + j * panel, load_row(weights + j * panel) * kept); });
}

}  // namespace
}  // namespace transfuse::cpu::TRANSFUSE_ISA
