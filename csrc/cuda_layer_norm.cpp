// LayerNorm on a GPU: the raw ops of layer_norm.cpp, registered for CUDA; cuda_norm.h allocates and launches.
#include "cuda/layer_norm.cuh"

#include <tuple>

#include "cuda_norm.h"

namespace transfuse {
namespace {

Tensor layer_norm_forward(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                          int64_t normalized_ndim, double eps) {
  const NormOperands operands(Backend::cuda, "layer_norm", input, weight, bias, normalized_ndim, eps);
  return cuda_norm_forward(operands, std::nullopt, cuda::layer_norm_forward).output;
}

std::tuple<Tensor, Tensor> add_layer_norm_forward(const Tensor& input, const Tensor& residual,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, int64_t normalized_ndim,
                                                  double eps) {
  const NormOperands operands(Backend::cuda, "add_layer_norm", input, weight, bias, normalized_ndim, eps);
  CudaNormForward result = cuda_norm_forward(operands, residual, cuda::layer_norm_forward);
  return {result.output, *result.sum};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output, const std::optional<Tensor>& grad_sum,
                                                       const Tensor& input, const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias, int64_t normalized_ndim,
                                                       double eps, bool need_input, bool need_weight, bool need_bias) {
  const NormOperands operands(Backend::cuda, "layer_norm_backward", input, weight, bias, normalized_ndim, eps);
  CudaNormBackward result = cuda_norm_backward(operands, grad_output, grad_sum, need_input, need_weight, need_bias,
                                               cuda::layer_norm_backward);
  return {result.grad_input, result.grad_weight, result.grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  m.impl("add_layer_norm_forward", TORCH_BOX(&add_layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace transfuse
