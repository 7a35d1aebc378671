// What a norm's kernels are told: LayerNorm and RMSNorm over the rows of [rows, cols] matrices on a GPU.
//
//   output = (x - mean) * rstd * weight + bias;   x = input, or round(input + residual) if there is one
//
// RMSNorm has neither mean nor bias. The arithmetic is norm_rows.cuh; layer_norm.cu and rms_norm.cu launch it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace transfuse::cuda {

// Rows of one operand: `stride` elements from the start of one to that of the next, columns adjacent.
struct NormRows {
  const void* data;
  int64_t stride;
};

// A double as the two floats that add up to it.
struct SplitDouble {
  float hi, lo;
};
inline SplitDouble split(double x) {
  const float hi = static_cast<float>(x);
  return {hi, static_cast<float>(x - hi)};
}

struct NormForwardParams {
  NormRows input;      // [rows, cols] dtype
  NormRows residual;   // the same; null: the plain norm
  const void* weight;  // [cols]; null: 1
  const void* bias;    // [cols]; null: 0
  void* sum;           // [rows, cols] dtype, dense; written where there is a residual
  void* output;        // [rows, cols] dtype, dense
  int64_t rows, cols;
  SplitDouble eps;
  bool float_parameters;  // weight and bias are float32 beside a 16-bit input
  // Found by the launcher.
  bool whole_vectors;
  float inverse_cols;
};

// The gradients of weight and bias are sums over rows. Rows are cut into chunks whose number depends on theirs and
// their length, one per block of a persistent grid; a block adds its rows in order to its own line, and a second kernel
// adds the lines.
struct NormBackwardParams {
  NormRows grad_output;  // [rows, cols] dtype
  NormRows grad_sum;     // the same; null: no gradient reaches the normalised x past the norm
  NormRows input;        // what was normalised
  const void* weight;    // [cols]; null: 1
  void* grad_input;      // [rows, cols] dtype, dense; null where not wanted
  float* weight_lines;   // [chunks, cols]; null where not wanted
  float* bias_lines;     // the same
  float* row_values;     // [rows, norm_row_values]: what wide rows need in their second pass; null for other rows
  void* grad_weight;     // [cols] of the parameters' type
  void* grad_bias;       // the same
  int64_t rows, cols, chunks;
  SplitDouble eps;
  bool float_parameters;
  // Found by the launcher.
  bool whole_vectors;
  float inverse_cols;
};

constexpr int64_t norm_row_values = 4;

// At least four rows to a chunk: each writes lines of partial sums. As many as 132 multiprocessors hold blocks of rows
// of so many bytes, on every GPU: there one wave, elsewhere and of rows without whole vectors about one.
constexpr int64_t norm_chunks(int64_t rows, int64_t row_bytes) {
  const int64_t most = row_bytes <= 8192 ? 3 * 132 : 132;  // norm_backward.cuh: blocks of 128 or 512 threads
  return rows < 4 * most ? (rows + 3) / 4 : most;
}
// Rows whose gradients no block holds in registers beside its parts of the sums over rows.
constexpr int64_t norm_gradient_cols = 8192;
constexpr bool norm_gradient_is_wide(int64_t cols) { return cols > norm_gradient_cols; }

}  // namespace transfuse::cuda
