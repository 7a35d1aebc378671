// GELU of rows, forward and backward, with an optional bias added first. Arithmetic and error bounds: gelu.cpp.
#pragma once

#include <cstdint>

#include "isa.h"

namespace transfuse::cpu {

// Row i is the elements [i * columns, min((i + 1) * columns, size)) of every [size] array. With a bias, columns is its
// length and divides size; without one, columns is any block length.
struct GeluParams {
  const void* input;
  const void* bias;         // [columns] or null
  const void* grad_output;  // backward only
  void* output;             // forward: the result; backward: the gradient of input + bias
  int64_t size, columns;
  DType dtype;       // of input, grad_output and output
  DType bias_dtype;
  bool tanh;
};

struct GeluKernels {
  // Rows [begin, end).
  void (*forward)(const GeluParams& p, int64_t begin, int64_t end);
  // Rows [begin, end). bias_sum [columns], where not null, gains the sum of the gradient over these rows, in row order.
  void (*backward)(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum);
  // sums [columns] rounded to the bias' type.
  void (*round_sums)(const double* sums, void* grad_bias, int64_t columns, DType bias_dtype);
};

TRANSFUSE_DECLARE_KERNELS(GeluKernels, gelu_kernels)

}  // namespace transfuse::cpu
