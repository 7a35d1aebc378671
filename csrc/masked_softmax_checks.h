// What masked_softmax checks of its operands, on the CPU and on a GPU.
#pragma once

#include <cmath>
#include <optional>

#include "checks.h"

namespace transfuse::masked_softmax {

constexpr const char* op = "masked_softmax";

inline void check_scale(double scale) {
  check(std::isfinite(static_cast<float>(scale)), op, ": scale is ", scale, ", expected a finite float32");
}

inline void check_place(const char* argument, const Tensor& t, const Tensor& first, const char* first_name,
                        Backend backend) {
  check_device(op, argument, t, backend);
  if (backend == Backend::cuda) check_same_device(op, argument, t, first, first_name);
}

// What a mask does, as each backend's MaskKind: `Kind` has keep, additive and additive_f32.
template <class Kind>
Kind mask_kind(const Tensor& mask, const Tensor& input) {
  if (mask.scalar_type() == ScalarType::Bool) return Kind::keep;
  if (mask.scalar_type() == input.scalar_type()) return Kind::additive;
  check(mask.scalar_type() == ScalarType::Float, op, ": mask has dtype ", name_of(mask.scalar_type()),
        ", expected bool, ", name_of(input.scalar_type()), " (input's) or float32");
  return Kind::additive_f32;
}

// mask is expanded to input's shape.
inline void check_forward(const Tensor& input, const std::optional<Tensor>& mask, double scale, bool causal,
                          Backend backend) {
  const int64_t least = causal ? 2 : 1;
  check(input.dim() >= least, op, ": input has shape ", shape_of(input), ", expected at least ", least, " dimensions");
  check_scale(scale);
  kernel_dtype(op, "input", input, backend);
  if (mask) check_same_shape(op, "mask", *mask, input, "input");
  check_device(op, "input", input, backend);
  if (mask) check_place("mask", *mask, input, "input", backend);
}

inline void check_backward(const Tensor& grad_output, const Tensor& output, Backend backend) {
  kernel_dtype(op, "output", output, backend);
  check_dtype(op, "grad_output", grad_output, output.scalar_type());
  check(output.dim() >= 1, op, ": output has shape (), expected at least one dimension");
  check_same_shape(op, "grad_output", grad_output, output, "output");
  check_device(op, "output", output, backend);
  check_place("grad_output", grad_output, output, "output", backend);
}

// mask has as many dimensions as output, size 1 where it was broadcast.
inline void check_mask_backward(const Tensor& output, const Tensor& mask) {
  check(mask.dim() == output.dim(), op, ": mask has ", mask.dim(), " dimensions, expected ", output.dim(),
        " (output's)");
  for (int64_t d = 0; d < mask.dim(); ++d)
    check(mask.size(d) == output.size(d) || mask.size(d) == 1, op, ": mask has shape ", shape_of(mask),
          ", expected one that broadcasts to ", shape_of(output), " (output's)");
}

}  // namespace transfuse::masked_softmax
