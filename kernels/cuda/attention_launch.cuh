// How one head dimension's kernels are picked and launched: the body of the units that the build makes, one per head
// dimension and type (cmake/attention_unit.cu.in).
#pragma once

#include "cuda/attention_backward_bias.cuh"
#include "cuda/attention_forward.cuh"

namespace transfuse::cuda {

namespace {

template <class Policy>
cudaError_t launch_forward(const AttentionParams& p, cudaStream_t stream) {
  const int64_t tiles = AttentionTask::attention_tile_count(p, Policy::queries);
  const int64_t blocks = tiles * (p.num_heads / p.packed_heads) * p.num_sequences;
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  return launch(attention_forward_kernel<Policy>, dim3(static_cast<unsigned>(blocks)), dim3(Policy::threads),
                Policy::shared_bytes, stream, p);
}

// Tries the rows of attention_tiles from `row` down: the first of this head dimension that was built for the GPU's code
// and fits its memory.
template <class T, int head_dim, int row>
cudaError_t launch_row(const AttentionParams& p, bool general, const CodeTarget& target, cudaStream_t stream) {
  if constexpr (row < 0) {
    return cudaErrorNotSupported;
  } else if constexpr (attention_tiles[row].head_dim != head_dim) {
    return launch_row<T, head_dim, row - 1>(p, general, target, stream);
  } else {
    if (attention_tiles[row].shared_kb > target.shared_kb || !tile_is_built(row, target.architecture))
      return launch_row<T, head_dim, row - 1>(p, general, target, stream);
    return general ? launch_forward<AttentionPolicy<T, row, true>>(p, stream)
                   : launch_forward<AttentionPolicy<T, row, false>>(p, stream);
  }
}

// The last row of a head dimension: the one with the most memory.
constexpr int last_row_of(int head_dim) {
  int row = static_cast<int>(sizeof(attention_tiles) / sizeof(attention_tiles[0])) - 1;
  while (attention_tiles[row].head_dim != head_dim) --row;
  return row;
}

template <class T, int head_dim>
cudaError_t attention_forward_of(const AttentionParams& p, bool general, cudaStream_t stream) {
  constexpr int row = last_row_of(head_dim);
  CodeTarget target{};
  const cudaError_t error = code_target(attention_forward_kernel<AttentionPolicy<T, row, false>>, target);
  return error == cudaSuccess ? launch_row<T, head_dim, row>(p, general, target, stream) : error;
}

template <class T, int head_dim>
cudaError_t launch_grad_bias(const AttentionGradParams& g, cudaStream_t stream) {
  using Policy = AttentionGradBiasPolicy<T, head_dim>;
  const AttentionParams& p = g.problem;
  const int64_t key_tiles = (p.max_seqlen_k + Policy::keys - 1) / Policy::keys;
  const int64_t query_tiles = (p.max_seqlen_q + Policy::queries - 1) / Policy::queries;
  const int64_t blocks = key_tiles * query_tiles * g.grad_bias_batch * g.grad_bias_heads;
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  return launch(attention_grad_bias_kernel<Policy>, dim3(static_cast<unsigned>(blocks)), dim3(Policy::threads),
                Policy::shared_bytes, stream, g);
}

// In order: each takes what the one before leaves of the rows.
template <class Policy>
cudaError_t launch_backward(const AttentionGradParams& g, cudaStream_t stream) {
  const AttentionParams& p = g.problem;
  const int64_t heads = p.num_sequences * p.num_heads, kv_heads = p.num_sequences * p.num_kv_heads;
  const auto tiles = [](int64_t length, int of) { return (length + of - 1) / of; };
  const int64_t deltas = heads * tiles(p.max_seqlen_q, delta_rows);
  const int64_t of_queries = heads * tiles(p.max_seqlen_q, Policy::owned);
  const int64_t of_keys = kv_heads * tiles(p.max_seqlen_k, Policy::owned) * Policy::column_shares;
  if (deltas > most_blocks || of_queries > most_blocks || of_keys > most_blocks) return cudaErrorInvalidConfiguration;
  const auto grid = [](int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); };
  cudaError_t error = launch(attention_delta_kernel<typename Policy::T>, grid(deltas), dim3(delta_rows * warp_size), 0,
                             stream, g);
  if (error != cudaSuccess) return error;
  error = launch(attention_grad_query_kernel<Policy>, grid(of_queries), dim3(Policy::threads), Policy::shared_bytes,
                 stream, g);
  if (error != cudaSuccess) return error;
  error = launch(attention_grad_key_kernel<Policy>, grid(of_keys), dim3(Policy::threads), Policy::shared_bytes, stream,
                 g);
  if (error != cudaSuccess || !g.grad_bias.data || g.whole_grad_bias) return error;
  return launch_grad_bias<typename Policy::T, Policy::head_dim>(g, stream);
}

template <class T, int head_dim>
cudaError_t attention_backward_of(const AttentionGradParams& g, bool general, cudaStream_t stream) {
  return general ? launch_backward<AttentionGradPolicy<T, head_dim, true>>(g, stream)
                 : launch_backward<AttentionGradPolicy<T, head_dim, false>>(g, stream);
}

}  // namespace

}  // namespace transfuse::cuda
