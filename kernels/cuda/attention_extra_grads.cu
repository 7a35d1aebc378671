// Gradients of what stands beside query, key and value, where it was broadcast: sums of parts in one order.
//
//   dbias = sum of dS        dslope = -sum of dS * distance        dsink = -sum of P_sink * delta
//
// The owners in attention_backward.cuh leave one float per row, or per column, of each head of each sequence: as many
// as lse has, or as there are keys. A bias with rows and columns of its own has no parts (attention_backward_bias.cuh).
#include "cuda/attention.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace transfuse::cuda {

namespace {

constexpr int threads = 256;

// `lanes` threads add what belongs to one sum, every lanes-th part in order, in two floats.
template <int lanes>
__global__ void __launch_bounds__(threads) attention_add_parts_kernel(const __grid_constant__ AttentionPartsParams g) {
  __shared__ Exchange<Pair, lanes> exchange;
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x) / lanes;
  const bool exists = number < g.sizes_of_sums[0] * g.sizes_of_sums[1] * g.sizes_of_sums[2];
  int64_t left = exists ? number : 0, first = 0, stride = 1, strides[3], repeats[3];
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    first += left % g.sizes_of_sums[d] * stride;
    left /= g.sizes_of_sums[d];
    repeats[d] = g.sizes_of_sums[d] == g.sizes[d] ? 1 : g.sizes[d];
    strides[d] = stride;
    stride *= g.sizes[d];
  }
  Pair sum = {0, 0};
  for (int64_t part = threadIdx.x % lanes; part < repeats[0] * repeats[1] * repeats[2]; part += lanes) {
    const int64_t inner = part / repeats[2];
    const int64_t before = inner / repeats[1] * strides[0] + inner % repeats[1] * strides[1];
    sum = sum + g.parts[first + before + part % repeats[2] * strides[2]];
  }
  sum = reduce<lanes>(sum, Add{}, exchange);
  if (exists && threadIdx.x % lanes == 0) g.sums[number] = to_float(sum);
}

template <int lanes>
cudaError_t add_parts(const AttentionPartsParams& g, int64_t sums, cudaStream_t stream) {
  const int64_t blocks = (sums * lanes + threads - 1) / threads;
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  return launch(attention_add_parts_kernel<lanes>, dim3(static_cast<unsigned>(blocks)), dim3(threads), 0, stream, g);
}

}  // namespace

cudaError_t attention_add_parts(const AttentionPartsParams& g, cudaStream_t stream) {
  constexpr int64_t many_parts = 1024;
  const int64_t parts = g.sizes[0] * g.sizes[1] * g.sizes[2];
  const int64_t sums = g.sizes_of_sums[0] * g.sizes_of_sums[1] * g.sizes_of_sums[2];
  if (parts == 0 || sums == 0) return cudaSuccess;
  return parts / sums >= many_parts ? add_parts<threads>(g, sums, stream) : add_parts<warp_size>(g, sums, stream);
}

}  // namespace transfuse::cuda
