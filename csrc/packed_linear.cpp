// Linear layers on packed weights: checks, allocation, threads. The arithmetic is kernels/cpu/packed_linear.cpp.
#include "packed_linear.h"

#include <algorithm>

#include "allocate.h"
#include "checks.h"
#include "parallel.h"

namespace transfuse {
namespace {

constexpr const char* op = "packed_linear";

// Below half a million multiply-adds (some 5 us) a task is not worth a thread; few rows cost what their weights cost.
int64_t panels_per_task(const cpu::PackedLinearParams& p) {
  constexpr int64_t least = int64_t{1} << 19, fewest_rows = 8;
  const int64_t rows = std::max(fewest_rows, p.rows / cpu::packed_linear_blocks(p));
  return std::max<int64_t>(1, least / (rows * std::max<int64_t>(1, p.in) * cpu::packed_linear_columns));
}

}  // namespace

cpu::PackedLinearParams packed_linear_params(ScalarType type, int64_t in, const Tensor& weight,
                                             const std::optional<Tensor>& bias, int64_t out_features,
                                             cpu::Activation activation) {
  check(type == ScalarType::Float || type == ScalarType::BFloat16, op, ": input has dtype ", name_of(type),
        ", expected float32 or bfloat16");
  check_cpu(op, "weight", weight);
  check_dtype(op, "weight", weight, type);
  const int64_t channels = type == ScalarType::Float ? 1 : 2;
  const int64_t steps = (in + channels - 1) / channels, panels = cpu::packed_linear_panels(out_features);
  check(weight.dim() == 3 && weight.is_contiguous() && weight.size(0) == panels && weight.size(1) == steps &&
            weight.size(2) == channels * cpu::packed_linear_columns,
        op, ": weight has shape ", shape_of(weight), ", expected a contiguous (", panels, ", ", steps, ", ",
        channels * cpu::packed_linear_columns, ")");
  if (bias) {
    check_cpu(op, "bias", *bias);
    check_dtype(op, "bias", *bias, ScalarType::Float);
    check(bias->dim() == 1 && bias->size(0) == out_features && bias->is_contiguous(), op, ": bias has shape ",
          shape_of(*bias), ", expected a contiguous (", out_features, ",)");
  }
  cpu::PackedLinearParams p{};
  p.weight = weight.const_data_ptr();
  p.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  p.in = in;
  p.out = out_features;
  p.dtype = dtype_of(weight);
  p.activation = activation;
  return p;
}

Tensor packed_linear(const Tensor& input, cpu::PackedLinearParams p) {
  const Tensor x = contiguous(op, input), output = empty_cpu(op, {input.size(0), p.out}, input.scalar_type());
  p.input = x.const_data_ptr();
  p.output = output.mutable_data_ptr();
  p.rows = input.size(0);
  if (p.rows == 0 || p.out == 0) return output;
  const auto& kernels = cpu::pick_packed_linear_kernels();
  parallel_for(0, cpu::packed_linear_blocks(p) * cpu::packed_linear_panels(p.out), panels_per_task(p),
               [&](int64_t begin, int64_t end) { kernels.forward(p, begin, end); });
  return output;
}

namespace {

Tensor checked(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
               cpu::Activation activation) {
  check_cpu(op, "input", input);
  check(input.dim() == 2, op, ": input has shape ", shape_of(input), ", expected (rows, in)");
  return packed_linear(
      input, packed_linear_params(input.scalar_type(), input.size(1), weight, bias, out_features, activation));
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features) {
  return checked(input, weight, bias, out_features, cpu::Activation::none);
}

Tensor linear_gelu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                   bool tanh) {
  return checked(input, weight, bias, out_features, cpu::gelu_activation(tanh));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("packed_linear(Tensor input, Tensor weight, Tensor? bias, int out_features) -> Tensor");
  m.def("packed_linear_gelu(Tensor input, Tensor weight, Tensor? bias, int out_features, bool tanh) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&linear));
  m.impl("packed_linear_gelu", TORCH_BOX(&linear_gelu));
}

}  // namespace transfuse
