// LayerNorm on the CPU: schemas of the raw ops; norm.h checks, allocates and threads. The arithmetic is
// kernels/cpu/layer_norm.cpp.
#include "cpu/layer_norm.h"

#include <tuple>

#include "norm.h"

namespace transfuse {

Tensor layer_norm_forward(const Tensor& input, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                          int64_t normalized_ndim, double eps) {
  const NormOperands operands(Backend::cpu, "layer_norm", input, weight, bias, normalized_ndim, eps);
  return norm_forward(operands, std::nullopt, cpu::pick_layer_norm_kernels()).output;
}

std::tuple<Tensor, Tensor> add_layer_norm_forward(const Tensor& input, const Tensor& residual,
                                                  const std::optional<Tensor>& weight,
                                                  const std::optional<Tensor>& bias, int64_t normalized_ndim,
                                                  double eps) {
  const NormOperands operands(Backend::cpu, "add_layer_norm", input, weight, bias, normalized_ndim, eps);
  NormForwardResult result = norm_forward(operands, residual, cpu::pick_layer_norm_kernels());
  return {result.output, result.sum};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output, const std::optional<Tensor>& grad_sum,
                                                       const Tensor& input, const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias, int64_t normalized_ndim,
                                                       double eps, bool need_input, bool need_weight, bool need_bias) {
  const NormOperands operands(Backend::cpu, "layer_norm_backward", input, weight, bias, normalized_ndim, eps);
  NormBackwardResult result = norm_backward(operands, grad_output, grad_sum, need_input, need_weight, need_bias,
                                            cpu::pick_layer_norm_kernels());
  return {result.grad_input, result.grad_weight, result.grad_bias};
}

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def(
      "layer_norm_forward(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps) -> Tensor");
  m.def(
      "add_layer_norm_forward(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, int normalized_ndim,"
      " float eps) -> (Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? weight, Tensor? bias,"
      " int normalized_ndim, float eps, bool need_input, bool need_weight, bool need_bias)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  m.impl("add_layer_norm_forward", TORCH_BOX(&add_layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace transfuse
