// GELU of rows on a GPU, forward and backward, with an optional bias added first. Arithmetic: gelu.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dtype.h"

namespace transfuse::cuda {

// Row i is the elements [i * columns, min((i + 1) * columns, size)) of every dense [size] array. With a bias, columns
// is its length and divides size; without one, columns is gelu_columns.
struct GeluParams {
  const void* input;
  const void* bias;         // [columns] or null
  const void* grad_output;  // backward only
  void* output;             // forward: the result; backward: the gradient of input + bias
  float* bias_lines;        // backward: [chunks, columns] sums over a chunk's rows; null where not wanted
  void* grad_bias;          // [columns] of the bias' type
  int64_t size, columns, chunks;
  bool tanh, float_bias;
};

constexpr int64_t gelu_columns = 2048;

// Chunks of rows, one to a block: their number depends on the rows' and their length alone. A block goes through its
// rows gelu_columns elements at a time, or about; at least `least` times: sums over rows want to be more than one.
constexpr int64_t gelu_chunks(int64_t rows, int64_t columns, int64_t least) {
  const int64_t at_a_time = columns < gelu_columns ? gelu_columns / (columns < 1 ? 1 : columns) : 1;
  const int64_t chunks = (rows + least * at_a_time - 1) / (least * at_a_time);
  return chunks < 1024 ? chunks : 1024;
}

cudaError_t gelu_forward(const GeluParams& params, DType dtype, cudaStream_t stream);
cudaError_t gelu_backward(const GeluParams& params, DType dtype, cudaStream_t stream);

}  // namespace transfuse::cuda
