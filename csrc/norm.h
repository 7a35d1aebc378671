// What layer_norm and rms_norm share on the host: checks, allocation, threads. Arithmetic: kernels/cpu/norm_rows.h.
#pragma once

#include "cpu/norm.h"

#include <algorithm>
#include <vector>

#include "allocate.h"
#include "checks.h"
#include "parallel.h"

namespace transfuse {

// The input as a matrix: `rows` leading elements, `cols` in the normalised dimensions.
struct NormMatrix {
  int64_t rows = 1, cols = 1;
  std::vector<int64_t> normalized_shape;

  NormMatrix(const char* op, const Tensor& input, int64_t normalized_ndim) {
    check(normalized_ndim >= 1 && normalized_ndim <= input.dim(), op, ": normalized_ndim is ", normalized_ndim,
          ", expected 1 to ", input.dim(), " (input's number of dimensions)");
    const auto sizes = input.sizes();
    normalized_shape.assign(sizes.end() - normalized_ndim, sizes.end());
    for (int64_t i = 0; i < input.dim(); ++i) (i < input.dim() - normalized_ndim ? rows : cols) *= sizes[i];
  }
};

// Input, weight and bias of one call, checked, the latter two contiguous; bias is absent in a norm without one.
struct NormOperands {
  const char* op;
  Tensor input;
  std::optional<Tensor> weight, bias;
  NormMatrix matrix;
  double eps;
  cpu::DType dtype;
  ScalarType param_type = ScalarType::Float;  // of weight and bias; float32 where there is neither
  cpu::DType param_dtype = cpu::DType::f32;

  NormOperands(const char* op, const Tensor& input, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, int64_t normalized_ndim, double eps)
      : op(op), input(input), weight(weight), bias(bias), matrix(op, input, normalized_ndim), eps(eps) {
    check_cpu(op, "input", input);
    dtype = kernel_dtype(op, "input", input);
    if (weight) check_parameter("weight", *weight);
    if (bias) check_parameter("bias", *bias);
    this->weight = contiguous(op, weight);
    this->bias = contiguous(op, bias);
    if (weight && bias) check_dtype(op, "bias", *bias, weight->scalar_type());
    if (!weight && !bias) return;
    param_type = (weight ? *weight : *bias).scalar_type();
    param_dtype = dtype_of(weight ? *weight : *bias);
  }

  // A tensor of the input's dtype and shape, or none.
  void check_like_input(const char* argument, const std::optional<Tensor>& t) const {
    if (!t) return;
    check_cpu(op, argument, *t);
    check_dtype(op, argument, *t, input.scalar_type());
    check_same_shape(op, argument, *t, input, "input");
  }

 private:
  void check_parameter(const char* argument, const Tensor& parameter) const {
    check_cpu(op, argument, parameter);
    bool fits = parameter.dim() == static_cast<int64_t>(matrix.normalized_shape.size());
    for (int64_t i = 0; fits && i < parameter.dim(); ++i) fits = parameter.size(i) == matrix.normalized_shape[i];
    if (!fits)
      check(false, op, ": ", argument, " has shape ", shape_of(parameter), ", expected the last dimensions of input's ",
            shape_of(input));
    const bool float_beside_16_bit = parameter.scalar_type() == ScalarType::Float && dtype != cpu::DType::f64;
    if (!float_beside_16_bit) check_dtype(op, argument, parameter, input.scalar_type());
  }
};

inline const void* data_of(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}
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
