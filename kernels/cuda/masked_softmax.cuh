// softmax(scale * input + mask) of rows on a GPU, excluded keys weighing exactly 0; forward and backward. Method:
// masked_softmax.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/divide.cuh"
#include "dtype.h"

namespace transfuse::cuda {

// keep: bytes, 0 excludes; additive: in the input's type; additive_f32: in float beside another input type.
enum class MaskKind : int { none = 0, keep = 1, additive = 2, additive_f32 = 3 };

constexpr int max_outer_dims = 8;

// Rows are the outer dimensions of [..., queries, keys], flattened; input, output and gradients are dense.
struct MaskedSoftmaxParams {
  const void* input;
  const void* mask;  // any strides, broadcast by stride 0
  void* output;
  int64_t rows, keys, queries;
  int outer_dims;                              // dimensions before keys, neighbours merged where strides allow
  int64_t outer_sizes[max_outer_dims];         // [outer_dims]
  int64_t outer_mask_strides[max_outer_dims];  // [outer_dims], in elements
  int64_t mask_stride;                         // of the keys
  float scale, scale_rest;                     // the two floats that add up to the scale
  int64_t causal_offset;                       // query i sees keys j <= i + causal_offset
  bool causal;
  MaskKind mask_kind;
  // Found by the launcher.
  bool whole_vectors, whole_mask;
  bool few_rows;                     // the dividers serve
  Divider by_queries;
  Divider by_outer[max_outer_dims];  // by outer_sizes
  float exponent_scale;              // |scale| log2(e)
  uint32_t sign_bits;                // of two 16-bit elements, where the scale is negative
};

// grad_input = scale * output * (grad_output - mean), mean = sum(grad_output * output).
struct MaskedSoftmaxGradParams {
  const void* grad_output;
  const void* output;  // of the forward
  void* grad_input;    // null where only the means are wanted
  float* means;        // [rows, 2], the two floats of each row's mean; or null
  int64_t rows, keys;
  float scale;
  bool whole_vectors;  // found by the launcher
};

// The gradient of an additive mask [mask_rows, mask_keys], mask_keys = keys or 1: each element adds the score gradients
// of the rows that used it. Row of repeat r of mask row m: base(m) + shift(r), each a sum over dimensions of index *
// stride.
struct MaskGradParams {
  const void* grad_output;
  const void* output;
  const float* means;  // [rows, 2]
  float* lines;        // [chunks, mask_rows * keys]
  float* sums;         // [mask_rows, keys]; where mask_keys is 1, before the sum over keys
  float* grad_mask;    // [mask_rows, mask_keys]; is `sums` where mask_keys is keys
  int64_t keys, mask_keys, mask_rows, repeats, chunks;
  int base_dims, shift_dims;
  int64_t base_sizes[max_outer_dims], base_strides[max_outer_dims];    // of the dimensions that the mask has, in rows
  int64_t shift_sizes[max_outer_dims], shift_strides[max_outer_dims];  // of those in which it is broadcast
};

// Depends on the number of repeats alone.
constexpr int64_t mask_grad_chunks(int64_t repeats) { return repeats < 32 ? 1 : repeats < 16 * 64 ? repeats / 16 : 64; }

cudaError_t masked_softmax_forward(const MaskedSoftmaxParams& params, DType dtype, cudaStream_t stream);
cudaError_t masked_softmax_backward(const MaskedSoftmaxGradParams& params, DType dtype, cudaStream_t stream);
cudaError_t masked_softmax_mask_backward(const MaskGradParams& params, DType dtype, cudaStream_t stream);

}  // namespace transfuse::cuda
