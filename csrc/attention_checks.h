// What the host sides of attention and of decode_attention share.
#pragma once

#include "checks.h"

namespace transfuse {

constexpr int64_t max_head_dim = 512;
// multiply-adds (about 15 us) below which waking a second thread costs more than it saves
constexpr double serial_work = 2e5;

// An int32 or int64 tensor of `dim` dimensions on the CPU.
inline void check_integers(const char* op, const char* argument, const Tensor& t, int64_t dim = 1) {
  check_cpu(op, argument, t);
  check(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, op, ": ", argument, " has dtype ",
        name_of(t.scalar_type()), ", expected int32 or int64");
  check(t.dim() == dim, op, ": ", argument, " has shape ", shape_of(t), ", expected ", dim == 1 ? "one" : "two",
        dim == 1 ? " dimension" : " dimensions");
}

// The integer `offset` elements after the first.
inline int64_t integer_at(const Tensor& t, int64_t offset) {
  return t.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(t.const_data_ptr())[offset]
                                            : static_cast<const int64_t*>(t.const_data_ptr())[offset];
}

}  // namespace transfuse
