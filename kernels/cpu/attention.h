// Attention on raw pointers: what the host hands to the kernels. Included by baseline-compiled code: plain data only.
//
// A problem is a list of sequences. A dense batch is one sequence per batch entry; a packed (varlen) batch is one per
// cu_seqlens entry, whose tensors have batch stride 0 and a first row. Strides count elements, and may be anything
// (0, negative, ragged).
#pragma once

#include "isa.h"

namespace transfuse::cpu {

struct AttentionTensor {
  const void* data;  // null when absent
  int64_t batch, head, row, col;  // strides, in elements
  DType dtype;
};

struct AttentionOutput {
  void* data;
  int64_t batch, head, row;  // strides, in elements; columns are adjacent
  DType dtype;
};

struct AttentionSequence {
  int64_t batch;               // its number in the batch
  int64_t query_row, key_row;  // of the first token
  int64_t seqlen_q, seqlen_k;  // valid queries and keys
  int64_t first_task;          // forward tasks of the sequences before this one
};

constexpr int64_t attention_unbounded = int64_t{1} << 62;  // a side of the window without a limit

// Philox's key and last counter word, and the probability to drop a weight.
struct AttentionDropout {
  double probability;  // 0: no dropout
  int64_t seed, offset;
};

// Statistics (lse and its gradient) are float, double where query is.
struct AttentionParams {
  AttentionTensor query, key, value;  // [B, Hq, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv]
  AttentionTensor bias;               // [B, Hq, Lq, Lk], added to the score; -inf excludes
  AttentionTensor mask;               // [B, Hq, Lq, Lk], one byte each, 0 excludes (dtype unused)
  AttentionTensor lse;                // [B, Hq, Lq], col unused; read by the backward
  const double* alibi_slopes;         // null, or slope of (batch, head) at batch * alibi_batch + head
  int64_t alibi_batch;
  const double* sinks;  // null, or one more logit per head [Hq]
  const AttentionSequence* sequences;
  int64_t num_sequences;
  int64_t max_seqlen_k;  // of all sequences
  int64_t num_heads, num_kv_heads, head_dim, value_head_dim;
  int64_t query_block;  // queries in one forward task, a multiple of 16; results do not depend on it
  // Keys i + offset - left .. i + offset + right take part in row i; causal is right = 0. The offset is 0, or
  // seqlen_k - seqlen_q for bottom_right.
  int64_t window_left, window_right;
  double scale;
  double softcap;  // 0: none
  AttentionDropout dropout;
  bool bottom_right;
};

struct AttentionForwardParams {
  AttentionParams problem;
  AttentionOutput output;  // [B, Hq, Lq, Dv]
  AttentionOutput lse;     // [B, Hq, Lq]
};

// Which dimensions of [B, Hq, Lq, Lk] the bias gradient keeps; the others are summed.
struct AttentionBiasGrad {
  double* data;  // null when not wanted; zero-filled by the host
  int64_t batch, head, row, col;  // strides, 0 where the bias was broadcast
};

struct AttentionBackwardParams {
  AttentionParams problem;
  AttentionTensor grad_output;  // [B, Hq, Lq, Dv]
  AttentionTensor output;       // [B, Hq, Lq, Dv]
  AttentionTensor grad_lse;     // [B, Hq, Lq], col unused
  AttentionOutput grad_query, grad_key, grad_value;
  AttentionBiasGrad grad_bias;
  // Null when not wanted, else [num_sequences, Hq], zero-filled by the host: each sequence's part of the gradient.
  double *grad_alibi_slopes, *grad_sinks;
};

struct AttentionKernels {
  // Bytes of 64-byte aligned scratch that each concurrent call needs.
  int64_t (*forward_scratch_bytes)(const AttentionForwardParams&);
  int64_t (*backward_scratch_bytes)(const AttentionBackwardParams&);
  // Task: query_block queries of one head of one sequence, in the order (sequence, head, block).
  void (*forward)(const AttentionForwardParams&, void* scratch, int64_t begin, int64_t end);
  // One key/value head of one sequence with all query heads that share it.
  void (*backward)(const AttentionBackwardParams&, void* scratch, int64_t sequence, int64_t kv_head);
  // total[head] += parts[sequence][head], sequences in order.
  void (*add_sequences)(const double* parts, int64_t sequences, int64_t num_heads, double* total);
};

TRANSFUSE_DECLARE_KERNELS(AttentionKernels, attention_kernels)      // float32, bfloat16, float16: computed in float
TRANSFUSE_DECLARE_KERNELS(AttentionKernels, attention_kernels_f64)  // float64

}  // namespace transfuse::cpu
