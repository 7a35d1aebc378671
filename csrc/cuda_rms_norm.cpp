// RMSNorm on a GPU: the raw ops of rms_norm.cpp, registered for CUDA; cuda_norm.h allocates and launches.
#include "cuda/rms_norm.cuh"

#include <tuple>

#include "cuda_norm.h"

namespace transfuse {
namespace {

Tensor rms_norm_forward(const Tensor& input, const std::optional<Tensor>& weight, int64_t normalized_ndim, double eps) {
  const NormOperands operands(Backend::cuda, "rms_norm", input, weight, std::nullopt, normalized_ndim, eps);
  return cuda_norm_forward(operands, std::nullopt, cuda::rms_norm_forward).output;
}

std::tuple<Tensor, Tensor> add_rms_norm_forward(const Tensor& input, const Tensor& residual,
                                                const std::optional<Tensor>& weight, int64_t normalized_ndim,
                                                double eps) {
  const NormOperands operands(Backend::cuda, "add_rms_norm", input, weight, std::nullopt, normalized_ndim, eps);
  CudaNormForward result = cuda_norm_forward(operands, residual, cuda::rms_norm_forward);
  return {result.output, *result.sum};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_output, const std::optional<Tensor>& grad_sum,
                                             const Tensor& input, const std::optional<Tensor>& weight,
                                             int64_t normalized_ndim, double eps, bool need_input, bool need_weight) {
  const NormOperands operands(Backend::cuda, "rms_norm_backward", input, weight, std::nullopt, normalized_ndim, eps);
  CudaNormBackward result =
      cuda_norm_backward(operands, grad_output, grad_sum, need_input, need_weight, false, cuda::rms_norm_backward);
  return {result.grad_input, result.grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("add_rms_norm_forward", TORCH_BOX(&add_rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace transfuse
