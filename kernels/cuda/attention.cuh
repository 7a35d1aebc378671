// Attention on a GPU: what the host hands to the kernels, and the tiles they are compiled for.
//
// A problem is a list of sequences. A dense batch is one sequence per batch entry; a packed (varlen) batch is one per
// entry of the offsets, whose tensors have batch stride 0 and a first row. Strides count elements and may be anything.
// Method: attention_forward.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace transfuse::cuda {

struct AttentionTensor {
  const void* data;               // null when absent
  int64_t batch, head, row, col;  // strides, in elements
};

struct AttentionOutput {
  void* data;
  int64_t batch, head, row;  // strides, in elements; columns are adjacent
};

// Lengths or offsets as they come: int32 or int64, any stride.
struct IntegerTable {
  const void* data;  // null when absent
  int64_t stride;
  bool wide;
};

constexpr int64_t attention_unbounded = int64_t{1} << 40;  // a side of the window without a limit

struct AttentionParams {
  AttentionTensor query, key, value;  // [B, Hq, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv]
  AttentionTensor bias;               // [B, Hq, Lq, Lk], added to the score; -inf excludes
  AttentionTensor mask;               // [B, Hq, Lq, Lk], one byte each, 0 excludes
  AttentionOutput output;             // [B, Hq, Lq, Dv]
  AttentionOutput lse;                // [B, Hq, Lq], float
  IntegerTable offsets_q, offsets_k;  // [N + 1], of a packed batch; clamped into [0, tokens]
  IntegerTable seqlens_k;             // [B], clamped into [0, max_seqlen_k]
  const float* alibi_slopes;          // null, or slope of (batch, head) at batch * alibi_batch + head
  int64_t alibi_batch;
  const float* sinks;           // null, or one more logit per head [Hq]
  const int64_t* dropout_seed;  // null, or Philox's key and the last word of its counter
  uint32_t dropout_threshold;   // the smallest word that keeps a weight
  float kept_share;             // 1 - dropout_p
  bool drops_all;               // no word does
  int64_t num_sequences, tokens_q, tokens_k;
  int max_seqlen_q, max_seqlen_k;  // of all sequences
  int num_heads, num_kv_heads, head_dim, value_head_dim;
  // Keys i + offset - left .. i + offset + right take part in row i; causal is right = 0. The offset is 0, or
  // seqlen_k - seqlen_q for bottom_right.
  int64_t window_left, window_right;
  bool bottom_right;
  bool bias_in_float;                 // beside 16-bit queries
  bool transforms;                    // a stored score is more than the product: it has its scale
  float scale;                        // of the product
  float softcap, scale_over_softcap;  // 0: none
  float logit_scale;                  // what a stored score has still to be multiplied by
  // Found by the launcher.
  float exp2_scale;     // logit_scale * log2(e)
  float dropout_scale;  // 1 / kept_share
  float rest_scale;     // of a product, in a stored score: scale where it transforms, else 1
  int packed_heads;  // query heads of one key head that share a tile
  bool excludes;     // some pair of tokens may be excluded: by a window, causality, a mask or a bias
  bool whole_query, whole_key, whole_value, whole_output;  // rows are whole vectors on their boundaries
  bool mask_pairs, bias_pairs;                             // two neighbouring keys are one aligned access
};

struct AttentionGradParams {
  AttentionParams problem;
  AttentionTensor grad_output, output;           // [B, Hq, Lq, Dv]
  AttentionTensor lse, grad_lse;                 // [B, Hq, Lq], float; grad_lse may be absent
  AttentionOutput reference, normaliser, delta;  // the same, scratch: what the first kernel finds of each row
  AttentionOutput grad_query, grad_key, grad_value;
  // [B or 1, Hq or 1, Lq, Lk] in the bias's dtype, or absent; stride 0 where the bias was broadcast. Zero-filled.
  AttentionOutput grad_bias;
  int grad_bias_batch, grad_bias_heads;  // its first two sizes
  // Sums of one row or column each, null where nobody wants them, zero-filled: [N, Hq, max_seqlen_q], in the last
  // [N, Hq, max_seqlen_k].
  float *slope_parts, *sink_parts, *row_sums, *key_sums;
  // Found by the launcher.
  bool whole_grad_output;
  bool whole_grad_bias;  // broadcast nowhere
};

// sums[i] = the sum of parts over all dimensions in which sizes_of_sums is 1; both are contiguous.
struct AttentionPartsParams {
  const float* parts;
  float* sums;
  int64_t sizes[3], sizes_of_sums[3];
};

/* Tiles of the forward on tensor cores, one row per head dimension and size of a block's shared memory: of the rows
   that the GPU has the memory for, the one that takes most.

   Two stages of keys and values beside the queries fit one block's shared memory. A warp holds 32 queries where
   registers allow, so that each fragment of keys and values is used twice: with 16 the reads of shared memory alone
   take as long as the products. The number of keys is what registers leave beside the output's accumulators: with 32
   queries 64 keys spill at 128 dimensions (nvcc 13.0). There 48 keys let two blocks of four warps share the 164 KB of
   sm_80; in 99 KB there is one block, and it has eight warps. At 256 dimensions 227 KB take twice the keys, which the
   queries are read for half as often. Arithmetic and the compiler's figures alone, no timing. */
struct AttentionTile {
  int head_dim, shared_kb;
  int queries, keys;         // of a tile
  int warps, general_warps;  // of the plain kernel, and of the one with biases, masks, softcap and dropout
};
constexpr AttentionTile attention_tiles[] = {
    {32, 99, 128, 64, 4, 8},   {64, 99, 128, 64, 4, 8}, {96, 99, 128, 64, 4, 8},
    {128, 99, 128, 64, 8, 8},  {128, 163, 128, 48, 4, 8}, {192, 99, 64, 32, 4, 4},
    {192, 163, 128, 64, 8, 8}, {256, 99, 64, 16, 4, 4}, {256, 163, 128, 32, 8, 8},
    {256, 227, 128, 64, 8, 8},
};

// The widest head dimension that the units of this build take in 16 bits; float32 always takes 256.
int attention_widest_head_dim();

cudaError_t attention_add_parts(const AttentionPartsParams& params, cudaStream_t stream);
cudaError_t attention_backward(const AttentionGradParams& params, DType dtype, cudaStream_t stream);
cudaError_t attention_forward(const AttentionParams& params, DType dtype, cudaStream_t stream);

}  // namespace transfuse::cuda
