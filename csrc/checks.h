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

#include "dtype.h"

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
inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      return DType::f32;
  }
}

// Where the tensors of an op must lie. One home of the checks serves both modules: _C says cpu, _C_cuda says cuda.
enum class Backend { cpu, cuda };

// float32, bfloat16, float16 or, on the CPU, float64, as the kernels' own DType.
inline DType kernel_dtype(const char* op, const char* argument, const Tensor& t, Backend backend = Backend::cpu) {
  const ScalarType type = t.scalar_type();
  const bool everywhere = type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  const bool on_cpu = backend == Backend::cpu;
  check(everywhere || (on_cpu && type == ScalarType::Double), op, ": ", argument, " has dtype ", name_of(type),
        on_cpu ? ", expected float32, bfloat16, float16 or float64" : ", expected float32, bfloat16 or float16");
  return dtype_of(t);
}

inline void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType expected) {
  check(t.scalar_type() == expected, op, ": ", argument, " has dtype ", name_of(t.scalar_type()), ", expected ", name_of(expected));
}

inline void check_device(const char* op, const char* argument, const Tensor& t, Backend backend) {
  const bool on_cpu = backend == Backend::cpu;
  check(on_cpu ? t.is_cpu() : t.is_cuda(), op, ": ", argument, " is on another device, expected ",
        on_cpu ? "cpu" : "cuda");
}
inline void check_cpu(const char* op, const char* argument, const Tensor& t) {
  check_device(op, argument, t, Backend::cpu);
}
// The tensor lies where the op's first one does: kernels read all of their operands on one GPU.
inline void check_same_device(const char* op, const char* argument, const Tensor& t, const Tensor& other,
                              const char* other_name) {
  check(t.get_device_index() == other.get_device_index(), op, ": ", argument, " is on cuda:", t.get_device_index(),
        ", expected cuda:", other.get_device_index(), " (", other_name, "'s)");
}

inline void check_same_shape(const char* op, const char* argument, const Tensor& t, const Tensor& other, const char* other_name) {
  if (same_shape(t, other)) return;  // words cost a microsecond
  check(false, op, ": ", argument, " has shape ", shape_of(t), ", expected ", shape_of(other), " (", other_name, "'s)");
}

}  // namespace transfuse
