// The launchers of layer_norm.cuh. Policy and arithmetic: norm_rows.cuh and norm_backward.cuh.
#include "cuda/layer_norm.cuh"

#include "cuda/norm_launch.cuh"

namespace transfuse::cuda {

namespace {

struct LayerNorm {
  static constexpr bool centered = true;
};

}  // namespace

cudaError_t layer_norm_forward(const NormForwardParams& params, DType dtype, cudaStream_t stream) {
  return norm_forward<LayerNorm>(params, dtype, stream);
}

cudaError_t layer_norm_backward(const NormBackwardParams& params, DType dtype, cudaStream_t stream) {
  return norm_backward<LayerNorm>(params, dtype, stream);
}

}  // namespace transfuse::cuda
