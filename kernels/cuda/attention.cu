// Attention on a GPU: what the launcher finds out about a problem, and which unit runs it.
//
// The kernels are in attention_forward.cuh and attention_backward.cuh (float16, bfloat16), and attention_simt.cuh
// (float32). Those of the 16-bit types are compiled in one unit per head dimension and type;
// TRANSFUSE_ATTENTION_HEAD_DIMS lists those of this build, as TRANSFUSE_UNIT(64) TRANSFUSE_UNIT(128).
#include "cuda/attention.cuh"

#include "cuda/attention_alignment.cuh"
#include "exp_constants.h"

namespace transfuse::cuda {

cudaError_t attention_forward_f32(const AttentionParams& p, cudaStream_t stream);
cudaError_t attention_backward_f32(const AttentionGradParams& g, cudaStream_t stream);
#define TRANSFUSE_UNIT(head_dim)                                                                                      \
  cudaError_t attention_forward_##head_dim##_f16(const AttentionParams& p, bool general, cudaStream_t stream);        \
  cudaError_t attention_forward_##head_dim##_bf16(const AttentionParams& p, bool general, cudaStream_t stream);       \
  cudaError_t attention_backward_##head_dim##_f16(const AttentionGradParams& g, bool general, cudaStream_t stream);   \
  cudaError_t attention_backward_##head_dim##_bf16(const AttentionGradParams& g, bool general, cudaStream_t stream);
TRANSFUSE_ATTENTION_HEAD_DIMS
#undef TRANSFUSE_UNIT

namespace {

// Query heads of one key head lie in one tile where a head's own queries would leave most of it empty. Results do not
// depend on it.
int heads_of_a_tile(const AttentionParams& p) {
  constexpr int smallest_tile = 32;
  return p.max_seqlen_q < smallest_tile ? p.num_heads / p.num_kv_heads : 1;
}

template <class T>
AttentionParams prepared(AttentionParams p) {
  p.exp2_scale = p.logit_scale * exp_log2e;
  p.dropout_scale = 1.0f / p.kept_share;
  p.rest_scale = p.transforms ? p.scale : 1.0f;
  p.packed_heads = heads_of_a_tile(p);
  p.excludes =
      p.mask.data || p.bias.data || p.window_left < attention_unbounded || p.window_right < attention_unbounded;
  p.whole_query = whole_rows<T>(p.query);
  p.whole_key = whole_rows<T>(p.key);
  p.whole_value = whole_rows<T>(p.value);
  p.whole_output = whole_rows<T>(p.output, p.value_head_dim);
  p.mask_pairs = aligned_pairs(p.mask, 1);
  p.bias_pairs = aligned_pairs(p.bias, p.bias_in_float ? 4 : static_cast<int64_t>(sizeof(T)));
  return p;
}

template <class T>
AttentionGradParams prepared(AttentionGradParams g) {
  g.problem = prepared<T>(g.problem);
  g.problem.packed_heads = 1;
  g.whole_grad_output = whole_rows<T>(g.grad_output);
  g.whole_grad_bias = g.grad_bias.data && g.grad_bias_batch == g.problem.num_sequences &&
      g.grad_bias_heads == g.problem.num_heads;
  return g;
}

bool is_general(const AttentionParams& p) { return p.transforms || p.mask.data || p.dropout_seed; }
int widest_head_dim(const AttentionParams& p) { return p.head_dim > p.value_head_dim ? p.head_dim : p.value_head_dim; }

}  // namespace

cudaError_t attention_forward(const AttentionParams& params, DType dtype, cudaStream_t stream) {
  if (params.num_heads == 0 || params.max_seqlen_q == 0 || params.num_sequences == 0) return cudaSuccess;
  if (dtype == DType::f32) return attention_forward_f32(prepared<float>(params), stream);
  const AttentionParams p = dtype == DType::f16 ? prepared<f16>(params) : prepared<bf16>(params);
  const bool general = is_general(p);
  const int widest = widest_head_dim(p);
#define TRANSFUSE_UNIT(of_unit)                                                            \
  if (widest <= of_unit)                                                                   \
    return dtype == DType::f16 ? attention_forward_##of_unit##_f16(p, general, stream)     \
                               : attention_forward_##of_unit##_bf16(p, general, stream);
  TRANSFUSE_ATTENTION_HEAD_DIMS
#undef TRANSFUSE_UNIT
  return cudaErrorNotSupported;
}

cudaError_t attention_backward(const AttentionGradParams& params, DType dtype, cudaStream_t stream) {
  if (params.problem.num_heads == 0 || params.problem.num_sequences == 0) return cudaSuccess;
  if (dtype == DType::f32) return attention_backward_f32(prepared<float>(params), stream);
  const AttentionGradParams g = dtype == DType::f16 ? prepared<f16>(params) : prepared<bf16>(params);
  const bool general = is_general(g.problem);
  const int widest = widest_head_dim(g.problem);
#define TRANSFUSE_UNIT(of_unit)                                                             \
  if (widest <= of_unit)                                                                    \
    return dtype == DType::f16 ? attention_backward_##of_unit##_f16(g, general, stream)     \
                               : attention_backward_##of_unit##_bf16(g, general, stream);
  TRANSFUSE_ATTENTION_HEAD_DIMS
#undef TRANSFUSE_UNIT
  return cudaErrorNotSupported;
}

int attention_widest_head_dim() {
  int widest = 0;
#define TRANSFUSE_UNIT(of_unit) widest = of_unit;
  TRANSFUSE_ATTENTION_HEAD_DIMS
#undef TRANSFUSE_UNIT
  return widest;
}

}  // namespace transfuse::cuda
