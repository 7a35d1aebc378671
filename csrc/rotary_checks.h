// What rotary checks of its operands, on the CPU and on a GPU.
#pragma once

#include "checks.h"

namespace transfuse::rotary {

constexpr const char* op = "rotary";

inline void check_rows(const char* argument, const Tensor& t, Backend backend) {
  kernel_dtype(op, argument, t, backend);
  check(t.dim() == 4, op, ": ", argument, " has shape ", shape_of(t), ", expected 4 dimensions");
  check_device(op, argument, t, backend);
}

inline void check_table(const char* argument, const Tensor& t, const Tensor& input, Backend backend) {
  const ScalarType type = input.scalar_type();
  const bool half = type == ScalarType::Half || type == ScalarType::BFloat16;
  check(t.scalar_type() == type || (half && t.scalar_type() == ScalarType::Float), op, ": ", argument, " has dtype ",
        name_of(t.scalar_type()), ", expected ", name_of(type), " (input's)", half ? " or float32" : "");
  const int64_t dim = t.dim();
  const bool fits = (dim == 2 || (dim == 3 && (t.size(0) == 1 || t.size(0) == input.size(0)))) &&
                    t.size(dim - 2) == input.size(2) && 2 * t.size(dim - 1) <= input.size(3);
  check(fits, op, ": ", argument, " has shape ", shape_of(t), ", expected [L, R/2] or [B, L, R/2], R <= D, of input's ",
        shape_of(input));
  check_device(op, argument, t, backend);
  if (backend == Backend::cuda) check_same_device(op, argument, t, input, "input");
}

inline void check_forward(const Tensor& input, const Tensor& cos, const Tensor& sin, Backend backend) {
  check_rows("input", input, backend);
  check_table("cos", cos, input, backend);
  check_table("sin", sin, input, backend);
  check_same_shape(op, "sin", sin, cos, "cos");
  check_dtype(op, "sin", sin, cos.scalar_type());
}

inline void check_backward(const Tensor& grad_output, const Tensor& input, const Tensor& cos, Backend backend) {
  check_rows("input", input, backend);
  check_rows("grad_output", grad_output, backend);
  if (backend == Backend::cuda) check_same_device(op, "grad_output", grad_output, input, "input");
  check_dtype(op, "grad_output", grad_output, input.scalar_type());
  check_same_shape(op, "grad_output", grad_output, input, "input");
  check_table("cos", cos, input, backend);
}

// The result is laid out as the input is: the heads of one token together where they are together there.
inline bool heads_lie_together(const Tensor& input) { return input.stride(1) < input.stride(2); }

}  // namespace transfuse::rotary
