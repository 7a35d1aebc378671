// The host side of packed_linear.cpp, for host code that composes it.
#pragma once

#include <optional>

#include "checks.h"
#include "cpu/packed_linear.h"

namespace transfuse {

// The layer of a packed weight of [out_features, in], checked; input, output and rows are still to be set.
cpu::PackedLinearParams packed_linear_params(ScalarType type, int64_t in, const Tensor& weight,
                                             const std::optional<Tensor>& bias, int64_t out_features,
                                             cpu::Activation activation);

// The output [rows, out] of input [rows, in] of the layer's own dtype.
Tensor packed_linear(const Tensor& input, cpu::PackedLinearParams layer);

}  // namespace transfuse
