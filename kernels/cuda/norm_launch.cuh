// From run-time sizes and dtypes to the kernels of norm_rows.cuh and norm_backward.cuh.
#pragma once

#include "cuda/norm_backward.cuh"
#include "cuda/norm_rows.cuh"

namespace transfuse::cuda {

namespace {

template <class T>
bool parameters_are_whole(const void* data, int64_t cols, bool in_float) {
  if (data == nullptr) return true;
  return in_float ? whole_vectors<float>(data, cols, 0) : whole_vectors<T>(data, cols, 0);
}

template <class T>
bool rows_are_whole(const NormRows& rows, int64_t cols) {
  return rows.data == nullptr || whole_vectors<T>(rows.data, cols, rows.stride);
}

template <class Norm>
cudaError_t norm_forward(NormForwardParams p, DType dtype, cudaStream_t stream) {
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    p.inverse_cols = static_cast<float>(1.0 / static_cast<double>(p.cols));
    p.whole_vectors = rows_are_whole<T>(p.input, p.cols) && rows_are_whole<T>(p.residual, p.cols) &&
                      rows_are_whole<T>({p.sum, p.cols}, p.cols) && rows_are_whole<T>({p.output, p.cols}, p.cols) &&
                      parameters_are_whole<T>(p.weight, p.cols, p.float_parameters) &&
                      parameters_are_whole<T>(p.bias, p.cols, p.float_parameters);
    cudaError_t error = cudaSuccess;
    const bool held = with_row_policy<T>(p.cols, p.whole_vectors, [&](auto policy) {
      using Policy = decltype(policy);
      const int64_t blocks = (p.rows + Policy::rows_per_block - 1) / Policy::rows_per_block;
      error = launch(norm_forward_kernel<Norm, Policy>, dim3(static_cast<unsigned>(blocks)), dim3(Policy::block), 0,
                     stream, p);
    });
    if (held) return error;
    return launch(norm_wide_forward_kernel<Norm, T>, dim3(static_cast<unsigned>(p.rows)), dim3(wide_row_threads), 0,
                  stream, p);
  });
}

// The policy of a row's gradients: beside the row a thread holds its part of two sums over rows, so wide rows have
// twice the threads.
template <class T, class Body>
void with_gradient_policy(int64_t cols, bool whole, Body body) {
  const int64_t vectors = vectors_of<T>(cols);
  if (vectors <= 512 || vectors > 1024)
    with_row_policy<T>(cols, whole, [&](auto policy) {
      if constexpr (policy.threads != 256) body(policy);
    });
  else if (whole)
    body(RowPolicy<T, 512, 2, true>{});
  else
    body(RowPolicy<T, 512, 2, false>{});
}

template <class Norm>
cudaError_t norm_backward(NormBackwardParams p, DType dtype, cudaStream_t stream) {
  if (p.cols == 0) return cudaSuccess;
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    p.inverse_cols = static_cast<float>(1.0 / static_cast<double>(p.cols));
    p.whole_vectors = rows_are_whole<T>(p.input, p.cols) && rows_are_whole<T>(p.grad_output, p.cols) &&
                      rows_are_whole<T>(p.grad_sum, p.cols) && rows_are_whole<T>({p.grad_input, p.cols}, p.cols) &&
                      parameters_are_whole<T>(p.weight, p.cols, p.float_parameters);
    const dim3 chunks(static_cast<unsigned>(p.chunks));
    cudaError_t error = cudaSuccess;
    if (p.rows > 0) {
      if (norm_gradient_is_wide(p.cols)) {
        error = norm_wide_backward<Norm, T>(p, stream);
      } else {
        with_gradient_policy<T>(p.cols, p.whole_vectors, [&](auto policy) {
          using Policy = decltype(policy);
          if constexpr (Policy::threads * Policy::vectors * width<T> <= norm_gradient_cols)
            error = launch(norm_backward_kernel<Norm, Policy>, chunks, dim3(Policy::block), 0, stream, p);
        });
      }
      if (error != cudaSuccess) return error;
    }
    const LinesParams sums = {
        {{p.weight_lines, p.grad_weight}, {p.bias_lines, p.grad_bias}}, p.chunks, p.cols, p.float_parameters};
    return add_lines<T>(sums, stream);
  });
}

}  // namespace

}  // namespace transfuse::cuda
