// RMSNorm on the CPU: schemas of the raw ops; norm.h checks, allocates and threads. The arithmetic is
// kernels/cpu/rms_norm.cpp.
#include "cpu/rms_norm.h"

#include <tuple>

#include "norm.h"

namespace transfuse {

Tensor rms_norm_forward(const Tensor& input, const std::optional<Tensor>& weight, int64_t normalized_ndim,
                        double eps) {
  const NormOperands operands(Backend::cpu, "rms_norm", input, weight, std::nullopt, normalized_ndim, eps);
  return norm_forward(operands, std::nullopt, cpu::pick_rms_norm_kernels()).output;
}

std::tuple<Tensor, Tensor> add_rms_norm_forward(const Tensor& input, const Tensor& residual,
                                                const std::optional<Tensor>& weight, int64_t normalized_ndim,
                                                double eps) {
  const NormOperands operands(Backend::cpu, "add_rms_norm", input, weight, std::nullopt, normalized_ndim, eps);
  NormForwardResult result = norm_forward(operands, residual, cpu::pick_rms_norm_kernels());
  return {result.output, result.sum};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const std::optional<Tensor>& grad_sum,
                                             const Tensor& input, const std::optional<Tensor>& weight,
                                             int64_t normalized_ndim, double eps, bool need_input, bool need_weight) {
  const NormOperands operands(Backend::cpu, "rms_norm_backward", input, weight, std::nullopt, normalized_ndim, eps);
  NormBackwardResult result =
      norm_backward(operands, grad_output, grad_sum, need_input, need_weight, false, cpu::pick_rms_norm_kernels());
  return {result.grad_input, result.grad_weight};
}

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("rms_norm_forward(Tensor input, Tensor? weight, int normalized_ndim, float eps) -> Tensor");
  m.def(
      "add_rms_norm_forward(Tensor input, Tensor residual, Tensor? weight, int normalized_ndim, float eps)"
      " -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? weight, int normalized_ndim,"
      " float eps, bool need_input, bool need_weight) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("add_rms_norm_forward", TORCH_BOX(&add_rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace transfuse
