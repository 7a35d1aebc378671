// What the host sides of attention and of decode_attention on a GPU share: how their tensors reach the kernels.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "attention_checks.h"
#include "cuda/attention.cuh"
#include "cuda_device.h"

namespace transfuse {

// Where a tensor keeps batch, head, row and column; -1 for a dimension that it does not have.
struct Dims {
  int batch, head, row, col;
};
constexpr Dims dense_dims{0, 1, 2, 3}, packed_dims{-1, 1, 0, 2}, packed_lse_dims{-1, 0, 1, -1};

inline int64_t stride_of(const Tensor& t, int dim) { return dim < 0 || dim >= t.dim() ? 0 : t.stride(dim); }

inline cuda::AttentionTensor view(const Tensor& t, Dims d) {
  return {t.const_data_ptr(), stride_of(t, d.batch), stride_of(t, d.head), stride_of(t, d.row), stride_of(t, d.col)};
}
inline cuda::AttentionTensor view(const std::optional<Tensor>& t, Dims d) {
  return t ? view(*t, d) : cuda::AttentionTensor{nullptr, 0, 0, 0, 0};
}
inline cuda::AttentionOutput output_view(const Tensor& t, Dims d) {
  return {t.mutable_data_ptr(), stride_of(t, d.batch), stride_of(t, d.head), stride_of(t, d.row)};
}
inline cuda::IntegerTable table_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.scalar_type() == ScalarType::Long};
}

// A length as the kernels count it.
inline int counted(const char* op, const char* argument, int64_t length) {
  constexpr int64_t most = int64_t{1} << 30;  // so that a sum of two is an int
  check(length >= 0 && length <= most, op, ": ", argument, " is ", length, ", expected at most ", most);
  return static_cast<int>(length);
}

// The factors of the scores. Biases and slopes are set before.
inline void set_scale(cuda::AttentionParams& p, double scale, double softcap) {
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  // A tiny cap makes 0 * largest of a score of 0.
  constexpr double largest = std::numeric_limits<float>::max();
  if (softcap > 0) p.scale_over_softcap = static_cast<float>(std::clamp(scale / softcap, -largest, largest));
  // The largest product is the largest score where the scale is positive.
  p.transforms = p.bias.data || p.alibi_slopes || softcap > 0 || !(p.scale > 0);
  p.logit_scale = p.transforms ? 1.0f : p.scale;
}

// As floats, adjacent, whatever dtype and strides they came in; `kept` holds the memory.
inline const float* kept_floats(const CudaCall& call, const Tensor& t, std::vector<Tensor>& kept) {
  kept.push_back(call.contiguous(torch::stable::to(t, ScalarType::Float)));
  return static_cast<const float*>(kept.back().const_data_ptr());
}

// A [B, H, L, D] view of [B, L, H, D] memory: heads of one token lie together, as the next projection wants them.
inline Tensor empty_heads(const char* op, const CudaCall& call, int64_t batch, int64_t heads, int64_t length,
                          int64_t dim, ScalarType type) {
  const Tensor memory = call.empty({batch, length, heads, dim}, type);
  return view_of(op, memory, {batch, heads, length, dim},
                 {memory.stride(0), memory.stride(2), memory.stride(1), memory.stride(3)});
}

}  // namespace transfuse
