// What layer_norm and rms_norm share on the host, on a GPU: views of rows, allocation, the launch.
#pragma once

#include "cuda/norm.cuh"

#include <algorithm>
#include <vector>

#include "cuda_device.h"
#include "norm_checks.h"

namespace transfuse {

// Whether t, seen as rows of its last `normalized_ndim` dimensions, has adjacent columns and one stride between rows;
// that stride. Other layouts are copied first.
inline bool has_row_stride(const Tensor& t, int64_t normalized_ndim, int64_t cols, int64_t& row_stride) {
  const int64_t leading = t.dim() - normalized_ndim;
  int64_t adjacent = 1;
  for (int64_t d = t.dim() - 1; d >= leading; --d) {
    if (t.size(d) != 1 && t.stride(d) != adjacent) return false;
    adjacent *= t.size(d);
  }
  row_stride = cols;
  bool found = false;
  int64_t expected = 0;
  for (int64_t d = leading - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (!found) row_stride = t.stride(d);
    if (found && t.stride(d) != expected) return false;
    found = true;
    expected = t.stride(d) * t.size(d);
  }
  return true;
}

// One operand of a call as rows; it keeps the copy alive that another layout needs.
struct NormRowsView {
  std::optional<Tensor> tensor;
  cuda::NormRows rows{nullptr, 0};

  NormRowsView(const CudaCall& call, const std::optional<Tensor>& t, const NormMatrix& matrix) {
    if (!t) return;
    const int64_t normalized_ndim = static_cast<int64_t>(matrix.normalized_shape.size());
    tensor = has_row_stride(*t, normalized_ndim, matrix.cols, rows.stride) ? *t : call.contiguous(*t);
    if (tensor->is_contiguous()) rows.stride = matrix.cols;
    rows.data = tensor->const_data_ptr();
  }
};

using NormForwardLauncher = cudaError_t (*)(const cuda::NormForwardParams&, DType, cudaStream_t);
using NormBackwardLauncher = cudaError_t (*)(const cuda::NormBackwardParams&, DType, cudaStream_t);

struct CudaNormForward {
  Tensor output;
  std::optional<Tensor> sum;  // where there is a residual
};

inline CudaNormForward cuda_norm_forward(const NormOperands& operands, const std::optional<Tensor>& residual,
                                         NormForwardLauncher launch) {
  const NormMatrix& matrix = operands.matrix;
  operands.check_like_input("residual", residual);
  const CudaCall call(operands.op, operands.input);
  const NormRowsView input(call, operands.input, matrix), other(call, residual, matrix);
  const std::optional<Tensor> weight = call.contiguous(operands.weight), bias = call.contiguous(operands.bias);
  CudaNormForward result{call.empty_like_dense(operands.input), std::nullopt};
  if (residual) result.sum = call.empty_like_dense(operands.input);
  cuda::NormForwardParams params{};
  params.input = input.rows;
  params.residual = other.rows;
  params.weight = data_of(weight);
  params.bias = data_of(bias);
  params.sum = result.sum ? result.sum->mutable_data_ptr() : nullptr;
  params.output = result.output.mutable_data_ptr();
  params.rows = matrix.rows;
  params.cols = matrix.cols;
  params.eps = cuda::split(operands.eps);
  params.float_parameters = operands.param_dtype == DType::f32;
  call.check(launch(params, operands.dtype, call.stream()));
  return result;
}

struct CudaNormBackward {
  Tensor grad_input, grad_weight, grad_bias;  // one that is not needed has 0 elements
};

// `operands.input` is what was normalised: where there was a residual, the sum that the forward returned.
inline CudaNormBackward cuda_norm_backward(const NormOperands& operands, const Tensor& grad_output,
                                           const std::optional<Tensor>& grad_sum, bool need_input, bool need_weight,
                                           bool need_bias, NormBackwardLauncher launch) {
  const NormMatrix& matrix = operands.matrix;
  operands.check_like_input("grad_output", grad_output);
  operands.check_like_input("grad_sum", grad_sum);
  const CudaCall call(operands.op, operands.input);
  const NormRowsView input(call, operands.input, matrix), grad(call, grad_output, matrix), past(call, grad_sum, matrix);
  const std::optional<Tensor> weight = call.contiguous(operands.weight);
  const int64_t item_bytes = operands.dtype == DType::f32 ? 4 : 2;
  const int64_t chunks = cuda::norm_chunks(matrix.rows, matrix.cols * item_bytes);
  const int64_t line_size = std::max<int64_t>(1, chunks) * matrix.cols;  // lines are there without rows: sums of 0
  const std::vector<int64_t> nothing{0};
  const CudaNormBackward result{
      need_input ? call.empty_like_dense(operands.input) : call.empty(nothing, operands.input.scalar_type()),
      call.empty(need_weight ? matrix.normalized_shape : nothing, operands.param_type),
      call.empty(need_bias ? matrix.normalized_shape : nothing, operands.param_type)};
  const Tensor lines = call.empty({(need_weight + need_bias) * line_size}, ScalarType::Float);
  const bool wide = cuda::norm_gradient_is_wide(matrix.cols);
  const Tensor row_values = call.empty({wide ? matrix.rows * cuda::norm_row_values : 0}, ScalarType::Float);
  float* line = static_cast<float*>(lines.mutable_data_ptr());
  cuda::NormBackwardParams params{};
  params.grad_output = grad.rows;
  params.grad_sum = past.rows;
  params.input = input.rows;
  params.weight = data_of(weight);
  params.grad_input = need_input ? result.grad_input.mutable_data_ptr() : nullptr;
  params.weight_lines = need_weight ? line : nullptr;
  params.bias_lines = need_bias ? line + need_weight * line_size : nullptr;
  params.row_values = static_cast<float*>(row_values.mutable_data_ptr());
  params.grad_weight = result.grad_weight.mutable_data_ptr();
  params.grad_bias = result.grad_bias.mutable_data_ptr();
  params.rows = matrix.rows;
  params.cols = matrix.cols;
  params.chunks = chunks;
  params.eps = cuda::split(operands.eps);
  params.float_parameters = operands.param_dtype == DType::f32;
  call.check(launch(params, operands.dtype, call.stream()));
  return result;
}

}  // namespace transfuse
