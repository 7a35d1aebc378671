// A linear layer on packed weights, with what follows it: output = activation(input @ weight^T + bias).
//
// Packed, a weight [out, in] is panels of 32 output columns, [panel][step][32] elements side by side, absent ones 0. A
// step is one input channel of float32, or a pair of bfloat16 channels: [panel][step][32][2].
//
// Policy: every element of the product is one chain of FMAs in the order of the channels (bfloat16: of the pairs, by
// vdpbf16ps where the CPU has it, which takes subnormal numbers for 0), in float32, and is rounded to its type once,
// after bias and activation. No tile, thread or other row has a part in it, so a row's bits are its own.
#pragma once

#include "isa.h"

namespace transfuse::cpu {

enum class Activation : int { none, gelu_erf, gelu_tanh };
constexpr Activation gelu_activation(bool tanh) { return tanh ? Activation::gelu_tanh : Activation::gelu_erf; }

struct PackedLinearParams {
  const void* input;   // [rows, in] dtype
  const void* weight;  // packed, dtype
  const float* bias;   // [out], or null: 0
  void* output;        // [rows, out] dtype
  int64_t rows, in, out;
  DType dtype;  // f32 or bf16
  Activation activation;
};

constexpr int64_t packed_linear_columns = 32;  // of a panel
constexpr int64_t packed_linear_panels(int64_t out) { return (out + packed_linear_columns - 1) / packed_linear_columns; }

// Rows that pass a panel together: as many as leave room for it in the second-level cache.
constexpr int64_t packed_linear_block_rows(int64_t in, DType dtype) {
  constexpr int64_t bytes = int64_t{512} << 10, most = 252, least = 14;
  const int64_t rows = bytes / ((in > 0 ? in : 1) * (dtype == DType::f32 ? 4 : 2));
  return rows > most ? most : rows < least ? least : rows / least * least;
}
constexpr int64_t packed_linear_blocks(const PackedLinearParams& p) {
  const int64_t rows = packed_linear_block_rows(p.in, p.dtype);
  return (p.rows + rows - 1) / rows;
}

struct PackedLinearKernels {
  // Tasks [begin, end): task i is block i / panels of rows (all of nearly one size) on panel i % panels.
  void (*forward)(const PackedLinearParams& p, int64_t begin, int64_t end);
};

TRANSFUSE_DECLARE_KERNELS(PackedLinearKernels, packed_linear_kernels)

}  // namespace transfuse::cpu
