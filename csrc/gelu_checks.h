// What gelu checks of its operands, on the CPU and on a GPU.
#pragma once

#include <optional>

#include "checks.h"

namespace transfuse {

// Input and bias; grad_output too in the backward.
struct GeluOperands {
  static constexpr const char* op = "gelu";
  DType dtype, bias_dtype;
  int64_t columns = 0;  // of the bias, where there is one

  GeluOperands(Backend backend, const Tensor& input, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& grad_output = std::nullopt)
      : dtype(kernel_dtype(op, "input", input, backend)), bias_dtype(dtype) {
    if (grad_output) {
      check_dtype(op, "grad_output", *grad_output, input.scalar_type());
      check_same_shape(op, "grad_output", *grad_output, input, "input");
    }
    if (bias) check_bias(input, *bias);
    check_device(op, "input", input, backend);
    if (grad_output) check_place("grad_output", *grad_output, input, backend);
    if (bias) check_place("bias", *bias, input, backend);
  }

 private:
  static void check_place(const char* argument, const Tensor& t, const Tensor& input, Backend backend) {
    check_device(op, argument, t, backend);
    if (backend == Backend::cuda) check_same_device(op, argument, t, input, "input");
  }
  void check_bias(const Tensor& input, const Tensor& bias) {
    const ScalarType type = input.scalar_type();
    const bool narrow_input = type == ScalarType::BFloat16 || type == ScalarType::Half;
    check(bias.scalar_type() == type || (narrow_input && bias.scalar_type() == ScalarType::Float), op,
          ": bias has dtype ", name_of(bias.scalar_type()), ", expected ", name_of(type), " (input's)",
          narrow_input ? " or float32" : "");
    check(input.dim() >= 1, op, ": input has shape (), expected at least one dimension to add bias to");
    columns = input.size(input.dim() - 1);
    if (bias.dim() != 1 || bias.size(0) != columns)  // words cost a microsecond
      check(false, op, ": bias has shape ", shape_of(bias), ", expected (", columns, ",) (input's last dimension)");
    bias_dtype = dtype_of(bias);
  }
};

}  // namespace transfuse
