// Attention of a few new queries against a long cache, on a GPU: what the host hands to the kernels. Plain data only.
//
// The rows of a problem are the queries of the heads that share a key head; a tile of them walks a part of the keys.
// Keys are split by the entry's own length alone, in parts counted from its own key 0: neither the batch, nor the
// layout of the cache, nor the number of multiprocessors changes a bit. Method: attention_decode_parts.cuh.
#pragma once

#include "cuda/attention.cuh"

namespace transfuse::cuda {

constexpr int decode_part_keys = 256;  // of the shortest part
constexpr int decode_most_parts = 64;  // of one entry: longer ones have longer parts
constexpr int decode_widest_head_dim = 256;
constexpr int decode_most_tile_rows = 16;
constexpr int64_t decode_most_scratch = int64_t{256} << 20;  // bytes of partial results, where more than a tile each

// Where an entry's keys lie. A contiguous cache has one block of `capacity` rows per entry.
struct DecodeCache {
  IntegerTable lengths;  // [B], valid keys before the new ones
  const void* table;     // [B, max_blocks], or null: entry b is block b
  int64_t table_batch, table_page;
  bool table_wide;
  int64_t num_blocks, num_new;
  int block_size, capacity;  // capacity: keys of one entry
};

struct DecodeParams {
  AttentionParams problem;  // key's and value's batch stride goes from block to block, row's within one
  DecodeCache cache;
  int parts;               // the most that an entry in a cache of this capacity has
  int partial_columns;     // value_head_dim in whole vectors of four
  int slice_rows;          // rows of each problem that are computed together; where there are more, launch by launch
  int slice_first;         // the first of them: the launcher's
  float* partial_outputs;  // [B, Hkv, slice_rows, parts, partial_columns]; where parts > 1
  float* partial_stats;    // [B, Hkv, slice_rows, parts, decode_stats]
};
constexpr int decode_stats = 3;  // of a row of a part: maximum, anchor, sum

struct DecodeAppendParams {
  DecodeCache cache;
  AttentionOutput targets[2];    // keys and values: block, head, row in the block
  int64_t target_cols[2];        // strides of their columns
  AttentionTensor sources[2];    // [B, Hkv, num_new, D | Dv]
  int columns[2];
  bool whole[2];  // found by the launcher
  int num_kv_heads;
  int64_t batch;
};

// How the work is cut: the most parts of an entry of that capacity, and how many rows have their partial results at
// once. Neither changes a bit.
void attention_decode_cut(DecodeParams& params);

cudaError_t attention_decode_forward(const DecodeParams& params, DType dtype, cudaStream_t stream);
cudaError_t attention_decode_append(const DecodeAppendParams& params, DType dtype, cudaStream_t stream);

}  // namespace transfuse::cuda
