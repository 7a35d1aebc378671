// RMSNorm on a GPU (norm.cuh): rstd = 1 / sqrt(mean(x^2) + eps) of each row.
#pragma once

#include "cuda/norm.cuh"

namespace transfuse::cuda {

cudaError_t rms_norm_forward(const NormForwardParams& params, DType dtype, cudaStream_t stream);
cudaError_t rms_norm_backward(const NormBackwardParams& params, DType dtype, cudaStream_t stream);

}  // namespace transfuse::cuda
