// gelu: checks, allocation, threads. The arithmetic is kernels/cpu/gelu.cpp.
#include "allocate.h"
#include "gelu_checks.h"
#include "parallel.h"

#include "cpu/gelu.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace transfuse {
namespace {

constexpr const char* op = GeluOperands::op;
constexpr int64_t block_length = 2048;    // elements of a row where no bias gives rows their length
constexpr int64_t elements_per_task = 16384;  // below this a second thread costs more than it brings
constexpr int64_t bias_chunk_rows = 64;   // rows whose bias gradient is summed by one thread; fixed, so the sum is too

// input and bias must be contiguous.
cpu::GeluParams params_of(const GeluOperands& operands, const Tensor& input, const std::optional<Tensor>& bias, bool tanh,
                          const Tensor& output) {
  cpu::GeluParams p{};
  p.input = input.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  p.size = input.numel();
  p.columns = bias ? bias->size(0) : block_length;
  p.dtype = operands.dtype;
  p.bias_dtype = operands.bias_dtype;
  p.tanh = tanh;
  return p;
}

int64_t rows_of(const cpu::GeluParams& p) { return (p.size + p.columns - 1) / p.columns; }
int64_t rows_per_task(const cpu::GeluParams& p) { return std::max<int64_t>(1, elements_per_task / p.columns); }

Tensor gelu_forward(Tensor input, std::optional<Tensor> bias, bool tanh) {
  const GeluOperands operands(Backend::cpu, input, bias);
  input = contiguous(op, input);
  bias = contiguous(op, bias);
  Tensor output = empty_like_dense(op, input);
  if (input.numel() == 0) return output;
  const cpu::GeluParams p = params_of(operands, input, bias, tanh, output);
  const auto& kernels = cpu::pick_gelu_kernels();
  parallel_for(0, rows_of(p), rows_per_task(p), [&](int64_t begin, int64_t end) { kernels.forward(p, begin, end); });
  return output;
}

// The gradient of input + bias and, where wanted, its sum over rows: chunks of a fixed number of rows, added in order.
std::tuple<Tensor, Tensor> gelu_backward(Tensor grad_output, Tensor input, std::optional<Tensor> bias, bool tanh, bool need_bias_grad) {
  const GeluOperands operands(Backend::cpu, input, bias, grad_output);
  check(!need_bias_grad || bias, op, ": need_bias_grad is True, expected a bias");
  input = contiguous(op, input);
  grad_output = contiguous(op, grad_output);
  bias = contiguous(op, bias);
  Tensor grad_input = empty_like_dense(op, input);
  const int64_t columns = need_bias_grad ? bias->size(0) : 0;
  Tensor grad_bias = zeros_cpu(op, {columns}, (bias ? *bias : input).scalar_type());
  if (input.numel() == 0) return {grad_input, grad_bias};

  cpu::GeluParams p = params_of(operands, input, bias, tanh, grad_input);
  p.grad_output = grad_output.const_data_ptr();
  const auto& kernels = cpu::pick_gelu_kernels();
  const int64_t rows = rows_of(p);
  if (!need_bias_grad) {
    parallel_for(0, rows, rows_per_task(p),
                                [&](int64_t begin, int64_t end) { kernels.backward(p, begin, end, nullptr); });
    return {grad_input, grad_bias};
  }
  const int64_t chunks = (rows + bias_chunk_rows - 1) / bias_chunk_rows;
  Tensor sums_of_chunks = zeros_cpu(op, {chunks, columns}, ScalarType::Double);
  double* sums = static_cast<double*>(sums_of_chunks.mutable_data_ptr());
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * bias_chunk_rows;
      kernels.backward(p, first, std::min(rows, first + bias_chunk_rows), sums + chunk * columns);
    }
  });
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < columns; ++i) sums[i] += sums[chunk * columns + i];
  kernels.round_sums(sums, grad_bias.mutable_data_ptr(), columns, p.bias_dtype);
  return {grad_input, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("gelu_forward(Tensor input, Tensor? bias, bool tanh) -> Tensor");
  m.def("gelu_backward(Tensor grad_output, Tensor input, Tensor? bias, bool tanh, bool need_bias_grad) -> (Tensor grad_input, Tensor grad_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("gelu_forward", TORCH_BOX(&gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}

}  // namespace transfuse
