// Rotary embedding on raw pointers: what the host hands to the kernels. Included by baseline-compiled code: plain data.
#pragma once

#include "isa.h"

namespace transfuse::cpu {

struct RotaryTensor {
  const void* data;
  int64_t batch, head, token, col;  // strides, in elements; anything, 0 where a table serves many rows
  DType dtype;
};

struct RotaryOutput {
  void* data;
  int64_t batch, head, token;  // strides, in elements; columns are adjacent
};

struct RotaryParams {
  RotaryTensor input, cos, sin;  // [B, H, L, D] and [B, H, L, R/2]
  RotaryOutput output;           // [B, H, L, D] of input's dtype
  int64_t num_heads, length, head_dim, pairs;  // H, L, D, R/2
  bool interleaved;              // pairs are columns (2i, 2i + 1), else (i, i + R/2)
  bool inverse;                  // rotates by the negative angle
  bool heads_inner;              // rows are visited heads of a token first, as they lie in memory
};

struct RotaryTablesParams {
  RotaryTensor grad_output, input;  // [B, H, L, D] of one dtype
  void *grad_cos, *grad_sin;        // [B or 1, L, R/2] of `dtype`, dense
  int64_t batch, num_heads, length, pairs;
  DType dtype;
  bool shared;  // one table for the whole batch: its gradient sums over it
  bool interleaved, inverse;
};

struct RotaryKernels {
  void (*rotate)(const RotaryParams&, int64_t begin, int64_t end);                 // rows of [B, H, L]
  void (*table_gradients)(const RotaryTablesParams&, int64_t begin, int64_t end);  // rows of the tables
};

TRANSFUSE_DECLARE_KERNELS(RotaryKernels, rotary_kernels)

}  // namespace transfuse::cpu
