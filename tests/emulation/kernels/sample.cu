// A small kernel with one of everything, for the emulator's own tests: each row of x divided by its sum.
//
// A block takes a row: it copies tiles of it into shared memory with cp.async, two at a time, adds up the neighbour's
// elements (so that data crosses threads), reduces through shuffles and a shared array, and writes the row.
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace transfuse::cuda {

struct SampleParams {
  const float* x;
  float* y;
  int64_t num_columns, x_row_stride, y_row_stride;
};

constexpr int block_threads = 128;
constexpr int num_warps = block_threads / 32;
constexpr unsigned full_warp = 0xffffffffu;

// The sum over the block, in every thread.
__device__ float block_sum(float value) {
  __shared__ float partial[num_warps];
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(full_warp, value, lanes);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < num_warps; ++warp) total += partial[warp];
  return total;
}

__device__ void copy_tile(float* tile, const float* row, int64_t start, int64_t num_columns) {
  const int64_t column = start + threadIdx.x;
  const bool inside = column < num_columns;
  ptx::cp_async<4>(tile + threadIdx.x, row + (inside ? column : 0), inside ? 4 : 0);
  ptx::cp_async_commit();
}

__global__ void __launch_bounds__(block_threads) sample_kernel(const __grid_constant__ SampleParams params) {
  float* tiles = reinterpret_cast<float*>(dynamic_shared());  // [2, block_threads]
  const int64_t row = blockIdx.x;
  const float* x = params.x + row * params.x_row_stride;
  float* y = params.y + row * params.y_row_stride;
  const int neighbour = (threadIdx.x + 37) % block_threads;

  float sum = 0.0f;
  const int64_t num_tiles = (params.num_columns + block_threads - 1) / block_threads;
  copy_tile(tiles, x, 0, params.num_columns);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    float* now = tiles + tile % 2 * block_threads;
    copy_tile(tiles + (tile + 1) % 2 * block_threads, x, (tile + 1) * block_threads, params.num_columns);
    ptx::cp_async_wait<1>();
    __syncthreads();  // the tile is there for all
    sum += now[neighbour];
    __syncthreads();  // and may be overwritten
  }
  const float total = block_sum(sum);
  for (int64_t column = threadIdx.x; column < params.num_columns; column += block_threads)
    y[column] = x[column] / total;
}

cudaError_t sample(const SampleParams& params, int64_t num_rows, cudaStream_t stream) {
  return launch(sample_kernel, dim3(static_cast<unsigned>(num_rows)), dim3(block_threads),
                2 * block_threads * sizeof(float), stream, params);
}

}  // namespace transfuse::cuda

extern "C" int launch_sample(const float* x, float* y, int64_t num_rows, int64_t num_columns, int64_t x_row_stride,
                             int64_t y_row_stride) {
  return transfuse::cuda::sample({x, y, num_columns, x_row_stride, y_row_stride}, num_rows, nullptr);
}
