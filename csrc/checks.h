// Argument checks of the raw ops. Every message says op, argument, expected and got (CONTRACT section 5).
//
// std::invalid_argument crosses the stable ABI as a clean ValueError; STD_TORCH_CHECK would put file and line in front.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace transfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

// A shape as messages show it. It is spelled out only when it is written: checks name shapes on every call, and hardly
// any of them fails.
struct ShapeOf {
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& text, const ShapeOf& shape) {
  const Tensor& t = shape.tensor;
  text << '(';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  return text << (t.dim() == 1 ? ",)" : ")");
}
inline ShapeOf shape_of(const Tensor& t) { return {t}; }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// The kernels' own DType; float32 too for what is no floating type (a mask's bytes: kernels do not look at it).
inline cpu::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return cpu::DType::bf16;
    case ScalarType::Half:
      return cpu::DType::f16;
    case ScalarType::Double:
      return cpu::DType::f64;
    default:
      return cpu::DType::f32;
  }
}

// float32, bfloat16, float16 or float64, as the kernels' own DType.
inline cpu::DType kernel_dtype(const char* op, const char* argument, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half || type == ScalarType::Double, op,
        ": ", argument, " has dtype ", name_of(type), ", expected float32, bfloat16, float16 or float64");
  return dtype_of(t);
}

inline void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType expected) {
  check(t.scalar_type() == expected, op, ": ", argument, " has dtype ", name_of(t.scalar_type()), ", expected ", name_of(expected));
}

inline void check_cpu(const char* op, const char* argument, const Tensor& t) {
  check(t.is_cpu(), op, ": ", argument, " is on another device, expected cpu");
}

inline void check_same_shape(const char* op, const char* argument, const Tensor& t, const Tensor& other, const char* other_name) {
  if (same_shape(t, other)) return;  // words cost a microsecond
  check(false, op, ": ", argument, " has shape ", shape_of(t), ", expected ", shape_of(other), " (", other_name, "'s)");
}

}  // namespace transfuse
