// The second stage of every sum over rows: chunks of rows have left a line of partial sums each, and these are added in
// one order that depends on the number of chunks alone.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace transfuse::cuda {

struct LinesParams {
  const float* lines;  // [chunks, columns]
  void* total;         // [columns], float32 or the storage type
  int64_t chunks, columns;
  bool total_in_float;
};

namespace {

constexpr int line_columns = 32, line_groups = 16;  // a block: 32 columns, every 16th line to a warp

template <class T>
__global__ void __launch_bounds__(line_columns* line_groups) add_lines_kernel(const __grid_constant__ LinesParams p) {
  __shared__ float parts[line_groups][line_columns];
  const int column = threadIdx.x % line_columns, group = threadIdx.x / line_columns;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * line_columns + column;
  float part = 0;
  for (int64_t chunk = group; chunk < p.chunks && at < p.columns; chunk += line_groups)
    part += p.lines[chunk * p.columns + at];
  parts[group][column] = part;
  __syncthreads();
  if (group != 0 || at >= p.columns) return;
  float terms[line_groups];
#pragma unroll
  for (int i = 0; i < line_groups; ++i) terms[i] = parts[i][column];
  const float total = sum_by_halves(terms);
  if (p.total_in_float) {
    static_cast<float*>(p.total)[at] = total;
  } else {
    static_cast<T*>(p.total)[at] = from_float<T>(total);
  }
}

template <class T>
cudaError_t add_lines(const LinesParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.columns + line_columns - 1) / line_columns));
  return launch(add_lines_kernel<T>, grid, dim3(line_columns * line_groups), 0, stream, p);
}

}  // namespace

}  // namespace transfuse::cuda
