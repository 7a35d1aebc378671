// Gradients of what stands beside query, key and value: biases, ALiBi slopes and sinks, each a sum over the dimensions
// in which its argument was broadcast, in one order and in two floats.
//
//   dbias = sum of dS        dslope = -sum of dS * distance        dsink = -sum of exp(sink - lse) * delta
//
// dS comes from its owners in attention_backward.cuh, one float for every pair of the problem: as large as a bias that
// is broadcast nowhere. Memory for it is taken where such a gradient is wanted, and nowhere else.
#include "cuda/attention_softmax.cuh"
#include "cuda/launch.cuh"
#include "cuda/lines.cuh"

namespace transfuse::cuda {

namespace {

constexpr int threads = 256;

// A thread adds the pairs that one element of the bias was used for.
__global__ void __launch_bounds__(threads)
    attention_bias_grad_kernel(const __grid_constant__ AttentionBiasGradParams g) {
  int64_t at = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (at >= g.bias_sizes[0] * g.bias_sizes[1] * g.bias_sizes[2] * g.bias_sizes[3]) return;
  float* to = g.grad_bias + at;
  int64_t strides[4], repeats[4], first = 0, stride = 1;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    first += at % g.bias_sizes[d] * stride;
    at /= g.bias_sizes[d];
    repeats[d] = g.bias_sizes[d] == g.sizes[d] ? 1 : g.sizes[d];
    strides[d] = stride;
    stride *= g.sizes[d];
  }
  Pair sum = {0, 0};
  for (int64_t b = 0; b < repeats[0]; ++b)
    for (int64_t h = 0; h < repeats[1]; ++h)
      for (int64_t q = 0; q < repeats[2]; ++q)
        for (int64_t k = 0; k < repeats[3]; ++k)
          sum = sum + g.grad_scores[first + b * strides[0] + h * strides[1] + q * strides[2] + k * strides[3]];
  *to = to_float(sum);
}

// A block adds what one head of one sequence has: of its slope where there are dS, else of its sink.
__global__ void __launch_bounds__(threads)
    attention_head_grad_kernel(const __grid_constant__ AttentionHeadGradParams g) {
  __shared__ Exchange<Pair, threads> exchange;
  const AttentionParams& p = g.problem;
  const int head = static_cast<int>(blockIdx.x % p.num_heads);
  const AttentionSequence s = sequence_of(p, blockIdx.x / p.num_heads);
  Pair sum = {0, 0};
  if (g.grad_scores) {
    const float* scores = g.grad_scores + static_cast<int64_t>(blockIdx.x) * p.max_seqlen_q * p.max_seqlen_k;
    for (int64_t pair = threadIdx.x; pair < static_cast<int64_t>(s.seqlen_q) * s.seqlen_k; pair += threads) {
      const int query = static_cast<int>(pair / s.seqlen_k), key = static_cast<int>(pair % s.seqlen_k);
      const float away = distance(p, s, query, key);
      sum = sum + two_product(scores[static_cast<int64_t>(query) * p.max_seqlen_k + key], -away);
    }
  } else if (p.sinks[head] != -attention_infinity) {
    for (int64_t query = threadIdx.x; query < s.seqlen_q; query += threads) {
      const float lse = row_of<float>(g.lse, s.batch, head, s.query_row + query)[0];
      const float delta = row_of<float>(g.delta, s.batch, head, s.query_row + query)[0];
      const double above = static_cast<double>(p.sinks[head]) - lse;
      sum = sum + two_product(above == above ? exp_of_difference(above) : lse, -delta);
    }
  }
  sum = reduce<threads>(sum, Add{}, exchange);
  if (threadIdx.x == 0) g.grad[blockIdx.x] = to_float(sum);
}

}  // namespace

cudaError_t attention_bias_backward(const AttentionBiasGradParams& g, cudaStream_t stream) {
  const int64_t elements = g.bias_sizes[0] * g.bias_sizes[1] * g.bias_sizes[2] * g.bias_sizes[3];
  const int64_t blocks = (elements + threads - 1) / threads;
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  return launch(attention_bias_grad_kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, stream, g);
}

cudaError_t attention_head_backward(const AttentionHeadGradParams& g, cudaStream_t stream) {
  const AttentionParams& p = g.problem;
  const int64_t blocks = p.num_sequences * p.num_heads;
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  const cudaError_t error =
      launch(attention_head_grad_kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, stream, g);
  if (error != cudaSuccess || !g.total) return error;
  return add_lines<float>({g.grad, g.total, p.num_sequences, p.num_heads, true}, stream);
}

}  // namespace transfuse::cuda
