// Attention in float32: the launcher of attention_simt.cuh.
#include "cuda/attention_simt.cuh"

namespace transfuse::cuda {

namespace {

template <int head_dim>
cudaError_t launch_simt(const AttentionParams& p, cudaStream_t stream) {
  using Policy = SimtPolicy<head_dim>;
  const int64_t tiles = AttentionTask::attention_tile_count(p, Policy::queries);
  const int64_t blocks = tiles * (p.num_heads / p.packed_heads) * p.num_sequences;
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  return launch(attention_simt_forward_kernel<Policy>, dim3(static_cast<unsigned>(blocks)), dim3(Policy::threads),
                Policy::shared_bytes, stream, p);
}

}  // namespace

cudaError_t attention_forward_f32(const AttentionParams& p, cudaStream_t stream) {
  const int widest = p.head_dim > p.value_head_dim ? p.head_dim : p.value_head_dim;
  if (widest <= 32) return launch_simt<32>(p, stream);
  if (widest <= 64) return launch_simt<64>(p, stream);
  if (widest <= 128) return launch_simt<128>(p, stream);
  return widest <= 256 ? launch_simt<256>(p, stream) : cudaErrorNotSupported;
}

}  // namespace transfuse::cuda
