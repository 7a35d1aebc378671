// What layer_norm and rms_norm share on the host, on the CPU: allocation and threads. Arithmetic:
// kernels/cpu/norm_rows.h.
#pragma once

#include "cpu/norm.h"

#include <algorithm>
#include <vector>

#include "allocate.h"
#include "norm_checks.h"
#include "parallel.h"

namespace transfuse {

// A task below 16384 elements (some 5 us) is not worth a thread.
inline int64_t norm_grain(int64_t elements_per_unit) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements_per_unit));
}

// The norm of `operands`, whose weight and bias are contiguous; input, residual, sum and output are still to be set.
inline cpu::NormForwardParams norm_forward_params(const NormOperands& operands) {
  cpu::NormForwardParams params{};
  params.weight = data_of(operands.weight);
  params.bias = data_of(operands.bias);
  params.cols = operands.matrix.cols;
  params.eps = operands.eps;
  params.dtype = operands.dtype;
  params.param_dtype = operands.param_dtype;
  return params;
}

struct NormForwardResult {
  Tensor output, sum;  // sum where there is a residual
};

inline NormForwardResult norm_forward(const NormOperands& operands, const std::optional<Tensor>& residual,
                                      const cpu::NormKernels& kernels) {
  const char* op = operands.op;
  operands.check_like_input("residual", residual);
  const Tensor x = contiguous(op, operands.input);
  const std::optional<Tensor> y = contiguous(op, residual);
  NormForwardResult result;
  cpu::NormForwardParams params = norm_forward_params(operands);
  result.output = empty_like_dense(op, operands.input);
  if (residual) {
    result.sum = empty_like_dense(op, operands.input);
    params.sum = result.sum.mutable_data_ptr();
  }
  params.input = x.const_data_ptr();
  params.residual = data_of(y);
  params.output = result.output.mutable_data_ptr();
  parallel_for(0, operands.matrix.rows, norm_grain(operands.matrix.cols),
               [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
  return result;
}

struct NormBackwardResult {
  Tensor grad_input, grad_weight, grad_bias;  // one that is not needed has 0 elements
};

// `operands.input` is what was normalised: where there was a residual, the sum that the forward returned.
inline NormBackwardResult norm_backward(const NormOperands& operands, const Tensor& grad_output,
                                        const std::optional<Tensor>& grad_sum, bool need_input, bool need_weight,
                                        bool need_bias, const cpu::NormKernels& kernels) {
  const char* op = operands.op;
  const NormMatrix& matrix = operands.matrix;
  operands.check_like_input("grad_output", grad_output);
  operands.check_like_input("grad_sum", grad_sum);
  const Tensor x = contiguous(op, operands.input), grad = contiguous(op, grad_output);
  const std::optional<Tensor> grad_past_norm = contiguous(op, grad_sum);

  const int64_t chunks = cpu::norm_chunks(matrix.rows), padded_cols = cpu::norm_padded_cols(matrix.cols);
  const std::vector<int64_t> nothing{0}, lines{(need_weight + need_bias) * chunks * padded_cols};
  const Tensor grad_input =
      need_input ? empty_like_dense(op, operands.input) : empty_cpu(op, nothing, operands.input.scalar_type());
  const Tensor grad_weight = empty_cpu(op, need_weight ? matrix.normalized_shape : nothing, operands.param_type);
  const Tensor grad_bias = empty_cpu(op, need_bias ? matrix.normalized_shape : nothing, operands.param_type);
  const Tensor sums = empty_cpu(op, lines, ScalarType::Double);
  double* line = static_cast<double*>(sums.mutable_data_ptr());

  cpu::NormBackwardParams params{};
  params.grad_output = grad.const_data_ptr();
  params.grad_sum = data_of(grad_past_norm);
  params.input = x.const_data_ptr();
  params.weight = data_of(operands.weight);
  params.grad_input = need_input ? grad_input.mutable_data_ptr() : nullptr;
  params.weight_sums = need_weight ? line : nullptr;
  params.bias_sums = need_bias ? line + need_weight * chunks * padded_cols : nullptr;
  params.grad_weight = grad_weight.mutable_data_ptr();
  params.grad_bias = grad_bias.mutable_data_ptr();
  params.rows = matrix.rows;
  params.cols = matrix.cols;
  params.chunks = chunks;
  params.eps = operands.eps;
  params.dtype = operands.dtype;
  params.param_dtype = operands.param_dtype;
  parallel_for(0, chunks, norm_grain(matrix.rows / chunks * matrix.cols),
               [&](int64_t begin, int64_t end) { kernels.backward(params, begin, end); });
  if (need_weight || need_bias)
    parallel_for(0, padded_cols / cpu::norm_block, norm_grain(chunks * cpu::norm_block),
                 [&](int64_t begin, int64_t end) { kernels.reduce(params, begin, end); });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace transfuse
