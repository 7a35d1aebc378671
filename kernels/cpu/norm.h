// What a norm's kernels are told: LayerNorm and RMSNorm over the rows of dense [rows, cols] matrices.
//
//   output = (x - mean) * rstd * weight + bias;   x = input, or round(input + residual) if there is one
//
// RMSNorm has neither mean nor bias: those pointers are null. What mean and rstd are stands in <op>.h.
#pragma once

#include "isa.h"

namespace transfuse::cpu {

struct NormForwardParams {
  const void* input;     // [rows, cols] dtype
  const void* residual;  // the same, or null: the plain norm
  const void* weight;    // [cols] param_dtype, or null: 1
  const void* bias;      // [cols] param_dtype, or null: 0
  void* sum;             // [rows, cols] dtype; written where there is a residual
  void* output;          // [rows, cols] dtype
  int64_t cols;
  double eps;
  DType dtype, param_dtype;
};

// The gradients of weight and bias are sums over rows. Rows are cut into chunks that depend on their number alone;
// each chunk adds its rows in order to its own line of `weight_sums` and `bias_sums`, and `reduce` adds the lines.
struct NormBackwardParams {
  const void* grad_output;  // [rows, cols] dtype
  const void* grad_sum;     // the same, or null: gradient that reaches the normalised x past the norm
  const void* input;        // [rows, cols] dtype: what was normalised
  const void* weight;       // [cols] param_dtype, or null
  void* grad_input;         // [rows, cols] dtype, or null where not wanted
  double* weight_sums;      // [chunks, padded_cols], or null where not wanted
  double* bias_sums;        // the same
  void* grad_weight;        // [cols] param_dtype
  void* grad_bias;          // [cols] param_dtype
  int64_t rows, cols, chunks;
  double eps;
  DType dtype, param_dtype;
};

constexpr int64_t norm_block = 16;  // columns per unit of work of `reduce`

// Fewer than 16 rows are not worth a line of sums; more than 64 lines cost more to add than threads would gain.
constexpr int64_t norm_chunks(int64_t rows) {
  return rows < 32 ? 1 : rows / 16 < 64 ? rows / 16 : 64;
}
constexpr int64_t norm_padded_cols(int64_t cols) {
  return (cols + norm_block - 1) / norm_block * norm_block;
}

struct NormKernels {
  void (*forward)(const NormForwardParams&, int64_t row_begin, int64_t row_end);
  void (*backward)(const NormBackwardParams&, int64_t chunk_begin, int64_t chunk_end);
  void (*reduce)(const NormBackwardParams&, int64_t block_begin, int64_t block_end);
};

}  // namespace transfuse::cpu
