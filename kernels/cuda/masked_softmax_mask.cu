// The gradient of an additive mask: each of its elements adds the score gradients of the rows that used it.
//
// Policy: a thread takes one key of one row of the mask and goes through a chunk of its repeats in ascending order; the
// chunks' lines are added in one order (lines.cuh), and where the mask is broadcast over keys, its keys last. Every
// sum's order depends on the shapes alone.
#include "cuda/lines.cuh"
#include "cuda/masked_softmax.cuh"

namespace transfuse::cuda {

namespace {

constexpr int mask_grad_threads = 128;

__device__ __forceinline__ int64_t row_offset(int64_t index, int dims, const int64_t (&sizes)[max_outer_dims],
                                              const int64_t (&strides)[max_outer_dims]) {
  int64_t offset = 0;
  for (int d = dims - 1; d >= 0; --d) {
    offset += index % sizes[d] * strides[d];
    index /= sizes[d];
  }
  return offset;
}

// blockIdx.x: keys of a row of the mask; blockIdx.y: a chunk of its repeats.
template <class T>
__global__ void __launch_bounds__(mask_grad_threads) mask_grad_kernel(const __grid_constant__ MaskGradParams p) {
  const int64_t blocks_of_row = (p.keys + mask_grad_threads - 1) / mask_grad_threads, chunk = blockIdx.y;
  const int64_t mask_row = blockIdx.x / blocks_of_row;
  const int64_t key = blockIdx.x % blocks_of_row * mask_grad_threads + threadIdx.x;
  if (key >= p.keys) return;
  const int64_t base = row_offset(mask_row, p.base_dims, p.base_sizes, p.base_strides);
  // Divisions only where a dimension other than the last goes on.
  const bool broadcast = p.shift_dims > 0;
  const int64_t run = broadcast ? p.shift_sizes[p.shift_dims - 1] : 1;
  const int64_t step = broadcast ? p.shift_strides[p.shift_dims - 1] : 0;
  const int64_t first = p.repeats * chunk / p.chunks, end = p.repeats * (chunk + 1) / p.chunks;
  int64_t left_of_run = run - first % run, row = base + row_offset(first, p.shift_dims, p.shift_sizes, p.shift_strides);
  float sum = 0;
  for (int64_t repeat = first; repeat < end; ++repeat, --left_of_run, row += step) {
    if (left_of_run == 0) {
      left_of_run = run;
      row = base + row_offset(repeat, p.shift_dims, p.shift_sizes, p.shift_strides);
    }
    const int64_t at = row * p.keys + key;
    const float weight = to_float(static_cast<const T*>(p.output)[at]);
    const float grad = to_float(static_cast<const T*>(p.grad_output)[at]);
    if (weight != 0.0f) sum += weight * ((grad - p.means[2 * row]) - p.means[2 * row + 1]);
  }
  p.lines[(chunk * p.mask_rows + mask_row) * p.keys + key] = sum;
}

// A block adds the keys of one row of the mask.
__global__ void __launch_bounds__(mask_grad_threads) mask_grad_keys_kernel(const __grid_constant__ MaskGradParams p) {
  __shared__ Exchange<Pair, mask_grad_threads> exchange;
  const float* row = p.sums + static_cast<int64_t>(blockIdx.x) * p.keys;
  Pair sum = {0, 0};
  for (int64_t key = threadIdx.x; key < p.keys; key += mask_grad_threads) sum = sum + row[key];
  sum = reduce<mask_grad_threads>(sum, Add{}, exchange);
  if (threadIdx.x == 0) p.grad_mask[blockIdx.x] = to_float(sum);
}

}  // namespace

cudaError_t masked_softmax_mask_backward(const MaskGradParams& p, DType dtype, cudaStream_t stream) {
  const int64_t blocks = p.mask_rows * ((p.keys + mask_grad_threads - 1) / mask_grad_threads);
  if (blocks > most_blocks) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.chunks));
  cudaError_t error = with_type(dtype, [&](auto type) {
    return launch(mask_grad_kernel<decltype(type)>, grid, dim3(mask_grad_threads), 0, stream, p);
  });
  if (error != cudaSuccess) return error;
  error = add_lines<float>({{{p.lines, p.sums}}, p.chunks, p.mask_rows * p.keys, true}, stream);
  if (error != cudaSuccess || p.mask_keys == p.keys) return error;
  return launch(mask_grad_keys_kernel, dim3(static_cast<unsigned>(p.mask_rows)), dim3(mask_grad_threads), 0, stream, p);
}

}  // namespace transfuse::cuda
