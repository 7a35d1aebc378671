// LayerNorm on the CPU, over the rows of dense [rows, cols] matrices:
//
//   output = (x - mean) / sqrt(variance + eps) * weight + bias;   x = input, or round(input + residual) if there is one
//
// Policy: statistics are sums in double, in the backward too, so that a row keeps its precision for mean/std up to 1e6
// and |x| up to 1e37. The float32 forward stays in double to its end and rounds once; where four roundings in float do
// no harm, in the bfloat16 forward and in the backward, the row is normalised in float against a mean of two floats.
// Rows go in pairs that share the loads of the weights, and a pair is still in L1 when its last pass starts.
#pragma once

#include "isa.h"

namespace transfuse::cpu {

struct LayerNormForwardParams {
  const void* input;     // [rows, cols] dtype
  const void* residual;  // the same, or null: plain LayerNorm
  const void* weight;    // [cols] param_dtype, or null: 1
  const void* bias;      // [cols] param_dtype, or null: 0
  void* sum;             // [rows, cols] dtype; written where there is a residual
  void* output;          // [rows, cols] dtype
  float* mean;           // [rows]
  float* rstd;           // [rows]
  int64_t cols;
  double eps;
  DType dtype, param_dtype;
};

// The gradients of weight and bias are sums over rows. Rows are cut into chunks that depend on their number alone;
// each chunk adds its rows in order to its own line of `weight_sums` and `bias_sums`, and `reduce` adds the lines.
struct LayerNormBackwardParams {
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

constexpr int64_t layer_norm_block = 16;  // columns per unit of work of `reduce`

// Fewer than 16 rows are not worth a line of sums; more than 64 lines cost more to add than threads would gain.
constexpr int64_t layer_norm_chunks(int64_t rows) {
  return rows < 32 ? 1 : rows / 16 < 64 ? rows / 16 : 64;
}
constexpr int64_t layer_norm_padded_cols(int64_t cols) {
  return (cols + layer_norm_block - 1) / layer_norm_block * layer_norm_block;
}

struct LayerNormKernels {
  void (*forward)(const LayerNormForwardParams&, int64_t row_begin, int64_t row_end);
  void (*backward)(const LayerNormBackwardParams&, int64_t chunk_begin, int64_t chunk_end);
  void (*reduce)(const LayerNormBackwardParams&, int64_t block_begin, int64_t block_end);
};

TRANSFUSE_DECLARE_KERNELS(LayerNormKernels, layer_norm_kernels)

}  // namespace transfuse::cpu
