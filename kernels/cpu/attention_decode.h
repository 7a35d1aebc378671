// Attention against a key/value cache on raw pointers: what the host hands to the kernels. Plain data only.
//
// A row is one query of one query head. The rows that share a key/value head form a tile, cut at decode_tile_rows: a
// tile reads its keys and values once for all of its rows.
#pragma once

#include "isa.h"

namespace transfuse::cpu {

constexpr int64_t decode_chunk_keys = 256;  // keys of one partial result; fixed, so the order of every sum is too
constexpr int64_t decode_tile_rows = 64;    // bounds the scratch; results do not depend on it

struct DecodeTensor {
  const void* data;  // null when absent
  int64_t batch, head, row, col;  // strides, in elements; of a paged cache: block, head, row in the block, column
  DType dtype;
};

struct DecodeOutput {
  void* data;
  int64_t batch, head, row;  // strides, in elements; columns are adjacent
  DType dtype;
};

struct DecodeParams {
  DecodeTensor query;       // [B, Hq, Lq, D]
  DecodeTensor key, value;  // [B, Hkv, Lmax, D | Dv], or pages [blocks, Hkv, block_size, D | Dv]
  DecodeTensor bias;        // [B, Hq, Lq, Lmax], added to scale * score; -inf excludes
  const double* alibi_slopes;  // [B, Hq], `alibi_batch` from one batch entry to the next; null when absent
  const double* sinks;         // [Hq]; null when absent
  const int64_t* lengths;      // [B], valid keys, the queries' own included
  const int64_t* block_table;  // [B, max_blocks]; null: batch entry b is block b, of block_size Lmax
  int64_t max_blocks, block_size, alibi_batch;
  int64_t num_heads, num_kv_heads, seqlen_q, head_dim, value_head_dim;
  int64_t window_left;  // keys before the query's own position that take part; negative: all
  double scale, softcap;  // softcap 0: none
  DecodeOutput output;  // [B, Hq, Lq, Dv]
  DecodeOutput lse;     // [B, Hq, Lq], float32, or float64 for float64
};

// Chunks [first_chunk, last_chunk) of the keys of a tile. The host leaves out chunks that no row of the tile may see.
struct DecodeTask {
  int64_t batch, kv_head;
  int64_t first_row, rows;  // of the tile: row r is query r % Lq of the group's head r / Lq
  int64_t first_chunk, last_chunk;
};

struct DecodeKernels {
  int64_t (*scratch_doubles)(const DecodeParams&);  // per concurrent call
  int64_t (*partial_doubles)(const DecodeParams&);  // per chunk of a tile
  // A tile over all of its chunks, and its output.
  void (*attend)(const DecodeParams&, const DecodeTask&, double* scratch);
  // The same in two steps, for many threads: partial results of some chunks, adjacent; then the output from all.
  void (*attend_chunks)(const DecodeParams&, const DecodeTask&, double* scratch, double* partials);
  void (*finish)(const DecodeParams&, const DecodeTask&, double* scratch, const double* partials);
};

TRANSFUSE_DECLARE_KERNELS(DecodeKernels, decode_kernels)

}  // namespace transfuse::cpu
