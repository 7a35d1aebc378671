// The second stage of every sum over rows: chunks of rows have left a line of partial sums each, and these are added in
// one order that depends on the number of chunks alone.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace transfuse::cuda {

// One sum over rows; without lines there is nothing to add.
struct Lines {
  const float* lines;  // [chunks, columns]
  void* total;         // [columns], float32 or the storage type
};

struct LinesParams {
  Lines sums[2];
  int64_t chunks, columns;
  bool total_in_float;
};

namespace {

constexpr int line_columns = 32, line_groups = 16;  // a block: 32 columns, every 16th line to a warp
constexpr int lines_ahead = 8;                      // lines of a warp that are read before they are added

template <class T>
__global__ void __launch_bounds__(line_columns* line_groups) add_lines_kernel(const __grid_constant__ LinesParams p) {
  __shared__ float parts[line_groups][line_columns];
  const Lines sum = p.sums[blockIdx.y];
  const int column = threadIdx.x % line_columns, group = threadIdx.x / line_columns;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * line_columns + column;
  float part = 0;
  for (int64_t first = group; first < p.chunks && at < p.columns; first += lines_ahead * line_groups) {
    float terms[lines_ahead];
#pragma unroll
    for (int i = 0; i < lines_ahead; ++i) {
      const int64_t chunk = first + i * line_groups;
      terms[i] = chunk < p.chunks ? sum.lines[chunk * p.columns + at] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < lines_ahead; ++i) part += terms[i];
  }
  parts[group][column] = part;
  __syncthreads();
  if (group != 0 || at >= p.columns) return;
  float terms[line_groups];
#pragma unroll
  for (int i = 0; i < line_groups; ++i) terms[i] = parts[i][column];
  const float total = sum_by_halves(terms);
  if (p.total_in_float) {
    static_cast<float*>(sum.total)[at] = total;
  } else {
    static_cast<T*>(sum.total)[at] = from_float<T>(total);
  }
}

// The sums that have lines, in one launch.
template <class T>
cudaError_t add_lines(LinesParams p, cudaStream_t stream) {
  if (p.sums[0].lines == nullptr) p.sums[0] = p.sums[1], p.sums[1] = {};
  const unsigned sums = (p.sums[0].lines != nullptr) + (p.sums[1].lines != nullptr);
  const dim3 grid(static_cast<unsigned>((p.columns + line_columns - 1) / line_columns), sums);
  return launch(add_lines_kernel<T>, grid, dim3(line_columns * line_groups), 0, stream, p);
}

}  // namespace

}  // namespace transfuse::cuda
