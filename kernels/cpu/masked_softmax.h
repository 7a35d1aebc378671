// softmax(scale * input + mask) of rows, excluded keys weighing exactly 0; forward and backward. Method:
// masked_softmax.cpp.
#pragma once

#include <cstdint>

#include "isa.h"

namespace transfuse::cpu {

// keep: bytes, 0 excludes; additive: in the input's type; additive_f32: in float beside another input type.
enum class MaskKind : int { none = 0, keep = 1, additive = 2, additive_f32 = 3 };

// Rows are the outer dimensions of [..., queries, keys], flattened; input, output and gradients are contiguous.
struct MaskedSoftmaxParams {
  const void* input;
  const void* mask;  // any strides, broadcast by stride 0
  void* output;
  int64_t keys, queries;
  int64_t outer_dims;           // dimensions before keys
  const int64_t* outer_sizes;   // [outer_dims]
  const int64_t* mask_strides;  // [outer_dims + 1], in elements, the keys' last
  double scale;
  int64_t causal_offset;  // query i sees keys j <= i + causal_offset
  bool causal;
  DType dtype;
  MaskKind mask_kind;
};

// Floats that hold the weights of the rows that go together, in type float or shorter.
constexpr int64_t masked_softmax_group_rows = 4, masked_softmax_longest_grouped = 1024;
inline int64_t masked_softmax_scratch(const MaskedSoftmaxParams& p) {
  if (p.dtype == DType::f64) return 0;
  return p.keys > masked_softmax_longest_grouped ? p.keys : masked_softmax_group_rows * p.keys;
}

struct MaskedSoftmaxGradParams {
  const void* grad_output;
  const void* output;  // of the forward
  void* grad_input;
  int64_t keys;
  double scale;
  DType dtype;
};

struct MaskedSoftmaxKernels {
  // Rows [begin, end); scratch holds masked_softmax_scratch(p) floats.
  void (*forward)(const MaskedSoftmaxParams& p, int64_t begin, int64_t end, float* scratch);
  // grad_input = scale * output * (grad_output - sum(grad_output * output)) of rows [begin, end).
  void (*backward)(const MaskedSoftmaxGradParams& p, int64_t begin, int64_t end);
  // Adds the gradient of one row's scores (grad_input without the scale) to sums [keys].
  void (*add_score_gradient)(const MaskedSoftmaxGradParams& p, int64_t row, double* sums);
};

TRANSFUSE_DECLARE_KERNELS(MaskedSoftmaxKernels, masked_softmax_kernels)

}  // namespace transfuse::cpu
