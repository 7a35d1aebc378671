// LayerNorm on the CPU: schemas, checks, allocation, threads. The arithmetic is kernels/cpu/layer_norm.cpp.
#include "cpu/layer_norm.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "allocate.h"
#include "checks.h"
#include "parallel.h"

namespace transfuse {

namespace {

// A task below this many elements (some 5 us) is not worth a thread.
constexpr int64_t min_elements_per_task = 16384;

// The input as a matrix: `rows` leading elements, `cols` in the normalised dimensions.
struct Matrix {
  int64_t rows = 1, cols = 1;
  std::vector<int64_t> normalized_shape, statistics_shape;  // statistics: the leading sizes, then ones, as in torch

  Matrix(const char* op, const Tensor& input, int64_t normalized_ndim) {
    check(normalized_ndim >= 1 && normalized_ndim <= input.dim(), op, ": normalized_ndim is ", normalized_ndim,
          ", expected 1 to ", input.dim(), " (input's number of dimensions)");
    for (int64_t i = 0; i < input.dim(); ++i) {
      const bool leading = i < input.dim() - normalized_ndim;
      (leading ? rows : cols) *= input.size(i);
      statistics_shape.push_back(leading ? input.size(i) : 1);
      if (!leading) normalized_shape.push_back(input.size(i));
    }
  }
};

void check_parameter(const char* op, const char* argument, const Tensor& parameter, const Matrix& matrix,
                     const Tensor& input) {
  check_cpu(op, argument, parameter);
  bool fits = parameter.dim() == static_cast<int64_t>(matrix.normalized_shape.size());
  for (int64_t i = 0; fits && i < parameter.dim(); ++i) fits = parameter.size(i) == matrix.normalized_shape[i];
  if (!fits)
    check(false, op, ": ", argument, " has shape ", shape_of(parameter), ", expected the last dimensions of input's ",
          shape_of(input));
  if (parameter.scalar_type() != ScalarType::Float) check_dtype(op, argument, parameter, input.scalar_type());
}

// The common dtype of weight and bias; float32 where there is neither.
ScalarType parameter_type(const char* op, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  if (weight && bias) check_dtype(op, "bias", *bias, weight->scalar_type());
  return weight ? weight->scalar_type() : bias ? bias->scalar_type() : ScalarType::Float;
}

void check_operands(const char* op, const Tensor& input, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& bias, const Matrix& matrix) {
  if (weight) check_parameter(op, "weight", *weight, matrix, input);
  if (bias) check_parameter(op, "bias", *bias, matrix, input);
}

const void* data(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}
cpu::DType kernel_dtype(ScalarType type) {
  return type == ScalarType::Float ? cpu::DType::f32 : cpu::DType::bf16;
}
int64_t grain(int64_t elements_per_unit) {
  return std::max<int64_t>(1, min_elements_per_task / std::max<int64_t>(1, elements_per_unit));
}

struct ForwardResult {
  Tensor output, sum, mean, rstd;
};

ForwardResult forward(const char* op, const Tensor& input, const std::optional<Tensor>& residual,
                      const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t normalized_ndim,
                      double eps) {
  check_cpu(op, "input", input);
  const cpu::DType dtype = transfuse::kernel_dtype(op, "input", input);
  const Matrix matrix(op, input, normalized_ndim);
  check_operands(op, input, weight, bias, matrix);
  const ScalarType param_type = parameter_type(op, weight, bias);
  if (residual) {
    check_cpu(op, "residual", *residual);
    check_dtype(op, "residual", *residual, input.scalar_type());
    check_same_shape(op, "residual", *residual, input, "input");
  }
  const Tensor x = contiguous(op, input);
  const std::optional<Tensor> y = contiguous(op, residual), w = contiguous(op, weight), b = contiguous(op, bias);
  ForwardResult result;
  result.output = empty_like_dense(op, input);
  if (residual) result.sum = empty_like_dense(op, input);
  result.mean = empty_cpu(op, matrix.statistics_shape, ScalarType::Float);
  result.rstd = empty_cpu(op, matrix.statistics_shape, ScalarType::Float);
  cpu::LayerNormForwardParams params{};
  params.input = x.const_data_ptr();
  params.residual = data(y);
  params.weight = data(w);
  params.bias = data(b);
  params.sum = residual ? result.sum.mutable_data_ptr() : nullptr;
  params.output = result.output.mutable_data_ptr();
  params.mean = static_cast<float*>(result.mean.mutable_data_ptr());
  params.rstd = static_cast<float*>(result.rstd.mutable_data_ptr());
  params.cols = matrix.cols;
  params.eps = eps;
  params.dtype = dtype;
  params.param_dtype = kernel_dtype(param_type);
  parallel_for(0, matrix.rows, grain(matrix.cols), [&](int64_t begin, int64_t end) {
    cpu::pick_layer_norm_kernels().forward(params, begin, end);
  });
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& input, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, int64_t normalized_ndim,
                                                      double eps) {
  ForwardResult result = forward("layer_norm", input, std::nullopt, weight, bias, normalized_ndim, eps);
  return {result.output, result.mean, result.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& input, const Tensor& residual,
                                                                  const std::optional<Tensor>& weight,
                                                                  const std::optional<Tensor>& bias,
                                                                  int64_t normalized_ndim, double eps) {
  ForwardResult result = forward("add_layer_norm", input, residual, weight, bias, normalized_ndim, eps);
  return {result.output, result.sum, result.mean, result.rstd};
}

// `input` is what was normalised: for add_layer_norm the sum it returned. A gradient not needed has 0 elements.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output, const std::optional<Tensor>& grad_sum,
                                                       const Tensor& input, const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias, int64_t normalized_ndim,
                                                       double eps, bool need_input, bool need_weight, bool need_bias) {
  const char* op = "layer_norm_backward";
  check_cpu(op, "input", input);
  const cpu::DType dtype = transfuse::kernel_dtype(op, "input", input);
  const Matrix matrix(op, input, normalized_ndim);
  check_operands(op, input, weight, bias, matrix);
  const ScalarType param_type = parameter_type(op, weight, bias);
  check_cpu(op, "grad_output", grad_output);
  check_dtype(op, "grad_output", grad_output, input.scalar_type());
  check_same_shape(op, "grad_output", grad_output, input, "input");
  if (grad_sum) {
    check_cpu(op, "grad_sum", *grad_sum);
    check_dtype(op, "grad_sum", *grad_sum, input.scalar_type());
    check_same_shape(op, "grad_sum", *grad_sum, input, "input");
  }
  const Tensor x = contiguous(op, input), grad = contiguous(op, grad_output);
  const std::optional<Tensor> grad_past_norm = contiguous(op, grad_sum), w = contiguous(op, weight);

  const int64_t chunks = cpu::layer_norm_chunks(matrix.rows), padded_cols = cpu::layer_norm_padded_cols(matrix.cols);
  const std::vector<int64_t> nothing{0}, lines{(need_weight + need_bias) * chunks * padded_cols};
  Tensor grad_input = need_input ? empty_like_dense(op, input) : empty_cpu(op, nothing, input.scalar_type());
  Tensor grad_weight = empty_cpu(op, need_weight ? matrix.normalized_shape : nothing, param_type);
  Tensor grad_bias = empty_cpu(op, need_bias ? matrix.normalized_shape : nothing, param_type);
  const Tensor sums = empty_cpu(op, lines, ScalarType::Double);
  double* line = static_cast<double*>(sums.mutable_data_ptr());

  cpu::LayerNormBackwardParams params{};
  params.grad_output = grad.const_data_ptr();
  params.grad_sum = data(grad_past_norm);
  params.input = x.const_data_ptr();
  params.weight = data(w);
  params.grad_input = need_input ? grad_input.mutable_data_ptr() : nullptr;
  params.weight_sums = need_weight ? line : nullptr;
  params.bias_sums = need_bias ? line + need_weight * chunks * padded_cols : nullptr;
  params.grad_weight = grad_weight.mutable_data_ptr();
  params.grad_bias = grad_bias.mutable_data_ptr();
  params.rows = matrix.rows;
  params.cols = matrix.cols;
  params.chunks = chunks;
  params.eps = eps;
  params.dtype = dtype;
  params.param_dtype = kernel_dtype(param_type);
  const auto& kernels = cpu::pick_layer_norm_kernels();
  parallel_for(0, chunks, grain(matrix.rows / chunks * matrix.cols),
                              [&](int64_t begin, int64_t end) { kernels.backward(params, begin, end); });
  if (need_weight || need_bias)
    parallel_for(0, padded_cols / cpu::layer_norm_block, grain(chunks * cpu::layer_norm_block),
                                [&](int64_t begin, int64_t end) { kernels.reduce(params, begin, end); });
  return {grad_input, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def(
      "layer_norm_forward(Tensor input, Tensor? weight, Tensor? bias, int normalized_ndim, float eps)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_forward(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, int normalized_ndim,"
      " float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor input, Tensor? weight, Tensor? bias,"
      " int normalized_ndim, float eps, bool need_input, bool need_weight, bool need_bias)"
      " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  m.impl("add_layer_norm_forward", TORCH_BOX(&add_layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace transfuse
