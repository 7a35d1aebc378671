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

constexpr int64_t packed_linear_block_rows = 252;  // rows that pass a panel together, while it is in cache
constexpr int64_t packed_linear_blocks(const PackedLinearParams& p) {
  return (p.rows + packed_linear_block_rows - 1) / packed_linear_block_rows;
}

struct PackedLinearKernels {
  // Tasks [begin, end): task i is block i / panels of rows (all of nearly one size) on panel i % panels.
  void (*forward)(const PackedLinearParams& p, int64_t begin, int64_t end);
};

TRANSFUSE_DECLARE_KERNELS(PackedLinearKernels, packed_linear_kernels)

}  // namespace transfuse::cpu
