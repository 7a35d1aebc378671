// The host side of packed_linear.cpp, for host code that composes it.
#pragma once

#include <optional>

#include "checks.h"
#include "cpu/packed_linear.h"

namespace transfuse {

// input [rows, in] and the packed weight of [out_features, in], both float32 or bfloat16; bias [out_features] float32.
Tensor packed_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out_features,
                     cpu::Activation activation);

}  // namespace transfuse
