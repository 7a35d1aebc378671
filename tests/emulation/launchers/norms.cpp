// layer_norm and rms_norm for emulated_ops.py, which does what csrc/cuda_norm.h does for a GPU.
#include "cuda/layer_norm.cuh"
#include "cuda/rms_norm.cuh"

using namespace transfuse;

extern "C" {

int64_t norm_chunks(int64_t rows) { return cuda::norm_chunks(rows); }
bool norm_gradient_is_wide(int64_t cols) { return cuda::norm_gradient_is_wide(cols); }
int64_t norm_row_values() { return cuda::norm_row_values; }

int norm_forward(bool centered, int dtype, const void* input, int64_t input_stride, const void* residual, int64_t residual_stride,
                 const void* weight, const void* bias, void* sum, void* output, int64_t rows, int64_t cols, double eps,
                 bool float_parameters) {
  cuda::NormForwardParams params{};
  params.input = {input, input_stride};
  params.residual = {residual, residual_stride};
  params.weight = weight;
  params.bias = bias;
  params.sum = sum;
  params.output = output;
  params.rows = rows;
  params.cols = cols;
  params.eps = cuda::split(eps);
  params.float_parameters = float_parameters;
  const auto forward = centered ? cuda::layer_norm_forward : cuda::rms_norm_forward;
  return forward(params, static_cast<DType>(dtype), nullptr);
}

int norm_backward(bool centered, int dtype, const void* grad_output, int64_t grad_output_stride, const void* grad_sum,
                  int64_t grad_sum_stride, const void* input, int64_t input_stride, const void* weight, void* grad_input,
                  float* weight_lines, float* bias_lines, float* row_values, void* grad_weight, void* grad_bias, int64_t rows,
                  int64_t cols, int64_t chunks, double eps, bool float_parameters) {
  cuda::NormBackwardParams params{};
  params.grad_output = {grad_output, grad_output_stride};
  params.grad_sum = {grad_sum, grad_sum_stride};
  params.input = {input, input_stride};
  params.weight = weight;
  params.grad_input = grad_input;
  params.weight_lines = weight_lines;
  params.bias_lines = bias_lines;
  params.row_values = row_values;
  params.grad_weight = grad_weight;
  params.grad_bias = grad_bias;
  params.rows = rows;
  params.cols = cols;
  params.chunks = chunks;
  params.eps = cuda::split(eps);
  params.float_parameters = float_parameters;
  const auto backward = centered ? cuda::layer_norm_backward : cuda::rms_norm_backward;
  return backward(params, static_cast<DType>(dtype), nullptr);
}
}
