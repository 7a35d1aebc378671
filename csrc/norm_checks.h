// What layer_norm and rms_norm check of their operands, on the CPU and on a GPU.
#pragma once

#include <optional>
#include <vector>

#include "allocate.h"
#include "checks.h"

namespace transfuse {

// The input as a matrix: `rows` leading elements, `cols` in the normalised dimensions.
struct NormMatrix {
  int64_t rows = 1, cols = 1;
  std::vector<int64_t> normalized_shape;

  NormMatrix(const char* op, const Tensor& input, int64_t normalized_ndim) {
    check(normalized_ndim >= 1 && normalized_ndim <= input.dim(), op, ": normalized_ndim is ", normalized_ndim,
          ", expected 1 to ", input.dim(), " (input's number of dimensions)");
    const auto sizes = input.sizes();
    normalized_shape.assign(sizes.end() - normalized_ndim, sizes.end());
    for (int64_t i = 0; i < input.dim(); ++i) (i < input.dim() - normalized_ndim ? rows : cols) *= sizes[i];
  }
};

// Input, weight and bias of one call, checked, on the CPU the latter two contiguous; bias is absent in a norm without
// one.
struct NormOperands {
  const char* op;
  Tensor input;
  std::optional<Tensor> weight, bias;
  NormMatrix matrix;
  double eps;
  DType dtype;
  ScalarType param_type = ScalarType::Float;  // of weight and bias; float32 where there is neither
  DType param_dtype = DType::f32;

  NormOperands(Backend backend, const char* op, const Tensor& input, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, int64_t normalized_ndim, double eps)
      : op(op),
        input(input),
        weight(weight),
        bias(bias),
        matrix(op, input, normalized_ndim),
        eps(eps),
        backend(backend) {
    dtype = kernel_dtype(op, "input", input, backend);
    if (weight) check_parameter("weight", *weight);
    if (bias) check_parameter("bias", *bias);
    if (weight && bias) check_dtype(op, "bias", *bias, weight->scalar_type());
    check_device(op, "input", input, backend);
    if (backend == Backend::cpu) {
      this->weight = contiguous(op, weight);
      this->bias = contiguous(op, bias);
    }
    if (!weight && !bias) return;
    param_type = (weight ? *weight : *bias).scalar_type();
    param_dtype = dtype_of(weight ? *weight : *bias);
  }

  // A tensor of the input's dtype and shape, or none.
  void check_like_input(const char* argument, const std::optional<Tensor>& t) const {
    if (!t) return;
    check_dtype(op, argument, *t, input.scalar_type());
    check_same_shape(op, argument, *t, input, "input");
    check_place(argument, *t);
  }

 private:
  Backend backend;

  void check_place(const char* argument, const Tensor& t) const {
    check_device(op, argument, t, backend);
    if (backend == Backend::cuda) check_same_device(op, argument, t, input, "input");
  }
  void check_parameter(const char* argument, const Tensor& parameter) const {
    bool fits = parameter.dim() == static_cast<int64_t>(matrix.normalized_shape.size());
    for (int64_t i = 0; fits && i < parameter.dim(); ++i) fits = parameter.size(i) == matrix.normalized_shape[i];
    if (!fits)
      check(false, op, ": ", argument, " has shape ", shape_of(parameter), ", expected the last dimensions of input's ",
            shape_of(input));
    const bool float_beside_16_bit = parameter.scalar_type() == ScalarType::Float && dtype != DType::f64;
    if (!float_beside_16_bit) check_dtype(op, argument, parameter, input.scalar_type());
    check_place(argument, parameter);
  }
};

inline const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace transfuse
