// LayerNorm on a GPU (norm.cuh): mean and rstd = 1 / sqrt(variance + eps) of each row.
#pragma once

#include "cuda/norm.cuh"

namespace transfuse::cuda {

cudaError_t layer_norm_forward(const NormForwardParams& params, DType dtype, cudaStream_t stream);
cudaError_t layer_norm_backward(const NormBackwardParams& params, DType dtype, cudaStream_t stream);

}  // namespace transfuse::cuda
