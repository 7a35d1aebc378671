// Dropout of attention weights: one Philox word per weight, the same on every backend (CONTRACT section 3).
//
// Counter (key / 4, query, batch * H + head, offset), word key % 4, Philox key = seed; a weight is kept if its word is
// at least probability * 2^32, and is then divided by 1 - probability, which is left to whoever divides by the sum.
// Positions count within the sequence. A dropped weight is a weight of 0 that takes part.
#pragma once

#include "cuda/attention_scores.cuh"
#include "cuda/philox.cuh"

namespace transfuse::cuda {

// The words of four neighbouring keys, `key` a multiple of 4.
__device__ __forceinline__ PhiloxWords dropout_words(const AttentionParams& p, const AttentionSequence& s, int query,
                                                     int head, int key) {
  const uint64_t seed = static_cast<uint64_t>(p.dropout_seed[0]);
  const uint32_t of_head = static_cast<uint32_t>(s.batch * p.num_heads + head);
  return philox({{static_cast<uint32_t>(key) / 4, static_cast<uint32_t>(query), of_head,
                  static_cast<uint32_t>(p.dropout_seed[1])}},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

__device__ __forceinline__ float kept_weight(const AttentionParams& p, uint32_t word, float weight) {
  return word >= p.dropout_threshold && !p.drops_all ? weight : weight * 0.0f;
}

// Two neighbouring lanes hold the same four keys in the same two rows: each draws for one row, and they swap.
template <int Keys>
__device__ __forceinline__ void drop_weights(ScoreFragment<Keys>& weights, const AttentionParams& p,
                                             const AttentionSequence& s, const ScoreRow (&rows)[2], int key) {
  const bool odd = threadIdx.x % 2 != 0;
  const int query = odd ? rows[1].query : rows[0].query, head = odd ? rows[1].head : rows[0].head;
#pragma unroll
  for (int n = 0; n < Keys / 8; ++n) {
    const PhiloxWords own = dropout_words(p, s, query, head, key + 8 * n + fragment_column() / 4 * 4);
    const uint32_t first = __shfl_xor_sync(whole_warp, odd ? own.word[0] : own.word[2], 1);
    const uint32_t second = __shfl_xor_sync(whole_warp, odd ? own.word[1] : own.word[3], 1);
    const uint32_t words[4] = {odd ? first : own.word[0], odd ? second : own.word[1], odd ? own.word[2] : first,
                               odd ? own.word[3] : second};
#pragma unroll
    for (int e = 0; e < 4; ++e) weights.x[n][e] = kept_weight(p, words[e], weights.x[n][e]);
  }
}

}  // namespace transfuse::cuda
