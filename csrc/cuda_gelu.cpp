// gelu on a GPU: the raw ops of gelu.cpp, registered for CUDA. The arithmetic is kernels/cuda/gelu.cu.
#include "cuda/gelu.cuh"

#include <algorithm>
#include <tuple>

#include "cuda_device.h"
#include "gelu_checks.h"

namespace transfuse {
namespace {

constexpr const char* op = GeluOperands::op;

// input and bias must be contiguous.
cuda::GeluParams params_of(const GeluOperands& operands, const Tensor& input, const std::optional<Tensor>& bias,
                           bool tanh, const Tensor& output, int64_t least_of_chunk) {
  cuda::GeluParams p{};
  p.input = input.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.size = input.numel();
  p.columns = bias ? operands.columns : cuda::gelu_columns;
  p.chunks = p.size == 0 ? 0 : cuda::gelu_chunks((p.size + p.columns - 1) / p.columns, p.columns, least_of_chunk);
  p.tanh = tanh;
  p.float_bias = operands.bias_dtype == DType::f32;
  return p;
}

Tensor gelu_forward(Tensor input, std::optional<Tensor> bias, bool tanh) {
  const GeluOperands operands(Backend::cuda, input, bias);
  const CudaCall call(op, input);
  input = call.contiguous(input);
  bias = call.contiguous(bias);
  const Tensor output = call.empty_like_dense(input);
  call.check(cuda::gelu_forward(params_of(operands, input, bias, tanh, output, 1), operands.dtype, call.stream()));
  return output;
}

std::tuple<Tensor, Tensor> gelu_backward(Tensor grad_output, Tensor input, std::optional<Tensor> bias, bool tanh,
                                         bool need_bias_grad) {
  const GeluOperands operands(Backend::cuda, input, bias, grad_output);
  check(!need_bias_grad || bias, op, ": need_bias_grad is True, expected a bias");
  const CudaCall call(op, input);
  input = call.contiguous(input);
  grad_output = call.contiguous(grad_output);
  bias = call.contiguous(bias);
  const Tensor grad_input = call.empty_like_dense(input);
  const Tensor grad_bias = call.empty({need_bias_grad ? operands.columns : 0}, (bias ? *bias : input).scalar_type());
  cuda::GeluParams p = params_of(operands, input, bias, tanh, grad_input, 4);
  p.grad_output = grad_output.const_data_ptr();
  const int64_t line_size = std::max<int64_t>(1, p.chunks) * p.columns;  // lines are there without rows: sums of 0
  const Tensor lines = call.empty({need_bias_grad ? line_size : 0}, ScalarType::Float);
  if (need_bias_grad) {
    p.bias_lines = static_cast<float*>(lines.mutable_data_ptr());
    p.grad_bias = grad_bias.mutable_data_ptr();
  }
  call.check(cuda::gelu_backward(p, operands.dtype, call.stream()));
  return {grad_input, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  m.impl("gelu_forward", TORCH_BOX(&gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}

}  // namespace transfuse
