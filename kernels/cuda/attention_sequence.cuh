// Where the sequences of a problem lie, which tile a block works on, and which keys take part in its rows.
//
// Policy: blocks of keys are counted from the sequence's own key 0, so a row has the same bits whatever was skipped,
// and wherever its sequence lies in the batch. Tables of lengths and offsets are not trusted: whatever they hold, every
// row lies within the tensors.
#pragma once

#include "cuda/attention.cuh"

namespace transfuse::cuda {

__device__ __forceinline__ int64_t clamped(int64_t x, int64_t lowest, int64_t highest) {
  return x < lowest ? lowest : x > highest ? highest : x;
}

__device__ __forceinline__ int64_t integer_at(const IntegerTable& table, int64_t index) {
  return table.wide ? static_cast<const int64_t*>(table.data)[index * table.stride]
                    : static_cast<const int32_t*>(table.data)[index * table.stride];
}

struct AttentionSequence {
  int64_t batch;               // its number in the batch
  int64_t query_row, key_row;  // of the first token
  int seqlen_q, seqlen_k;      // valid queries and keys
};

__device__ __forceinline__ AttentionSequence sequence_of(const AttentionParams& p, int64_t index) {
  AttentionSequence s{index, 0, 0, p.max_seqlen_q, p.max_seqlen_k};
  if (p.offsets_q.data) {
    s.query_row = clamped(integer_at(p.offsets_q, index), 0, p.tokens_q);
    s.key_row = clamped(integer_at(p.offsets_k, index), 0, p.tokens_k);
    const int64_t query_stop = clamped(integer_at(p.offsets_q, index + 1), s.query_row, p.tokens_q);
    const int64_t key_stop = clamped(integer_at(p.offsets_k, index + 1), s.key_row, p.tokens_k);
    s.seqlen_q = static_cast<int>(clamped(query_stop - s.query_row, 0, p.max_seqlen_q));
    s.seqlen_k = static_cast<int>(clamped(key_stop - s.key_row, 0, p.max_seqlen_k));
  }
  if (p.seqlens_k.data) s.seqlen_k = static_cast<int>(clamped(integer_at(p.seqlens_k, index), 0, s.seqlen_k));
  return s;
}

// The key that stands opposite query 0.
__device__ __forceinline__ int diagonal(const AttentionParams& p, const AttentionSequence& s) {
  return p.bottom_right ? s.seqlen_k - s.seqlen_q : 0;
}

// Keys, or queries, [begin, end).
struct KeyRange {
  int begin, end;
};

// By window, causality and length. Neither bound falls as query grows.
__device__ __forceinline__ KeyRange keys_of_query(const AttentionParams& p, const AttentionSequence& s, int query) {
  const int64_t opposite = static_cast<int64_t>(query) + diagonal(p, s);
  return {static_cast<int>(clamped(opposite - p.window_left, 0, s.seqlen_k)),
          static_cast<int>(clamped(opposite + p.window_right + 1, 0, s.seqlen_k))};
}

// The other way round: queries that may see some of the keys [key, key + keys).
__device__ __forceinline__ KeyRange queries_of_keys(const AttentionParams& p, const AttentionSequence& s, int key,
                                                    int keys) {
  const int64_t opposite = diagonal(p, s);
  return {static_cast<int>(clamped(key - opposite - p.window_right, 0, s.seqlen_q)),
          static_cast<int>(clamped(key + keys - opposite + p.window_left, 0, s.seqlen_q))};
}

// Queries each of which sees all of these keys; none where a key is past the last one. Its end may lie past theirs.
__device__ __forceinline__ KeyRange queries_that_see(const AttentionParams& p, const AttentionSequence& s, int key,
                                                     int keys) {
  constexpr int64_t far = 1 << 30;
  const int64_t opposite = diagonal(p, s);
  if (key + keys > s.seqlen_k) return {static_cast<int>(far), 0};
  return {static_cast<int>(clamped(key + keys - 1 - opposite - p.window_right, 0, far)),
          static_cast<int>(clamped(key + 1 - opposite + p.window_left, 0, far))};
}

template <class T>
__device__ __forceinline__ const T* row_of(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(t.data) + batch * t.batch + head * t.head + row * t.row;
}
template <class T>
__device__ __forceinline__ T* row_of(const AttentionOutput& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(t.data) + batch * t.batch + head * t.head + row * t.row;
}

// The rows of one block: queries of one sequence and head, or, where heads are packed, of all the query heads that
// share a key head, head by head within a query. A row's arithmetic is the same in either.
struct AttentionTask {
  AttentionSequence sequence;
  int first_row, num_rows;  // num_rows may be 0 or less: nothing to do
  int first_head, kv_head, packed_heads;

  AttentionTask() = default;  // for shared memory, where it waits for its few readers and takes no registers
  __device__ __forceinline__ AttentionTask(const AttentionParams& p, int tile_queries, int64_t block) {
    packed_heads = p.packed_heads;
    const int64_t tiles = attention_tile_count(p, tile_queries);
    const int head_groups = p.num_heads / packed_heads;
    const int64_t tile = tiles - 1 - block % tiles;  // the longest of a causal problem come first
    block /= tiles;
    first_head = static_cast<int>(block % head_groups) * packed_heads;
    kv_head = first_head / (p.num_heads / p.num_kv_heads);
    sequence = sequence_of(p, block / head_groups);
    const int64_t first = tile * tile_queries, all = static_cast<int64_t>(sequence.seqlen_q) * packed_heads;
    first_row = static_cast<int>(first);
    num_rows = static_cast<int>(clamped(all - first, 0, tile_queries));
  }
  // No rows of queries: the keys of one key head.
  struct KeysAlone {};
  __device__ __forceinline__ AttentionTask(KeysAlone, const AttentionParams& p, int its_kv_head, int64_t its_sequence)
      : sequence(sequence_of(p, its_sequence)),
        first_row(0),
        num_rows(0),
        first_head(0),
        kv_head(its_kv_head),
        packed_heads(1) {}
  __host__ __device__ static int64_t attention_tile_count(const AttentionParams& p, int tile_queries) {
    return (static_cast<int64_t>(p.max_seqlen_q) * p.packed_heads + tile_queries - 1) / tile_queries;
  }

  // Of a row of the tile; rows past the last one stand for the last one, and are not written.
  __device__ __forceinline__ int existing(int row) const { return row < num_rows ? row : num_rows - 1; }
  __device__ __forceinline__ int query(int row) const {
    return packed_heads == 1 ? first_row + existing(row) : (first_row + existing(row)) / packed_heads;
  }
  __device__ __forceinline__ int head(int row) const {
    return packed_heads == 1 ? first_head : first_head + (first_row + existing(row)) % packed_heads;
  }

  // The keys that some of the rows [row, row + rows) may see.
  __device__ __forceinline__ KeyRange seen_by_some(const AttentionParams& p, int row, int rows) const {
    return {keys_of_query(p, sequence, query(row)).begin, keys_of_query(p, sequence, query(row + rows - 1)).end};
  }
  // The keys that all of them see, as far as can be told without a mask or bias.
  __device__ __forceinline__ KeyRange seen_by_all(const AttentionParams& p, int row, int rows) const {
    return {keys_of_query(p, sequence, query(row + rows - 1)).begin, keys_of_query(p, sequence, query(row)).end};
  }
};

}  // namespace transfuse::cuda
