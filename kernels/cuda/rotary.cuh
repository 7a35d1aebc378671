// Rotary embedding on a GPU: what the host hands to the kernels. Arithmetic: rotary.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace transfuse::cuda {

struct RotaryTensor {
  const void* data;
  int64_t batch, head, token, col;  // strides, in elements; anything, 0 where a table serves many rows
};

struct RotaryOutput {
  void* data;
  int64_t batch, head, token;  // strides, in elements; columns are adjacent
};

struct RotaryParams {
  RotaryTensor input, cos, sin;                       // [B, H, L, D] and [B, H, L, R/2]
  RotaryOutput output;                                // [B, H, L, D] of input's dtype
  int64_t batch, num_heads, length, head_dim, pairs;  // B, H, L, D, R/2
  bool float_tables;                                  // beside a 16-bit input
  bool interleaved;                                   // pairs are columns (2i, 2i + 1), else (i, i + R/2)
  bool inverse;                                       // rotates by the negative angle
  bool heads_inner;                                   // rows are visited heads of a token first, as they lie in memory
  bool whole_vectors;                                 // found by the launcher
};

struct RotaryTablesParams {
  RotaryTensor grad_output, input;  // [B, H, L, D] of one dtype
  void *grad_cos, *grad_sin;        // [B or 1, L, R/2], dense
  int64_t batch, num_heads, length, pairs;
  bool float_tables;
  bool shared;  // one table for the whole batch: its gradient sums over it
  bool interleaved, inverse;
};

cudaError_t rotary_forward(const RotaryParams& params, DType dtype, cudaStream_t stream);
cudaError_t rotary_backward(const RotaryTablesParams& params, DType dtype, cudaStream_t stream);

}  // namespace transfuse::cuda
