// The launchers of rms_norm.cuh. Policy and arithmetic: norm_rows.cuh and norm_backward.cuh.
#include "cuda/rms_norm.cuh"

#include "cuda/norm_launch.cuh"

namespace transfuse::cuda {

namespace {

struct RMSNorm {
  static constexpr bool centered = false;
};

}  // namespace

cudaError_t rms_norm_forward(const NormForwardParams& params, DType dtype, cudaStream_t stream) {
  return norm_forward<RMSNorm>(params, dtype, stream);
}

cudaError_t rms_norm_backward(const NormBackwardParams& params, DType dtype, cudaStream_t stream) {
  return norm_backward<RMSNorm>(params, dtype, stream);
}

}  // namespace transfuse::cuda
