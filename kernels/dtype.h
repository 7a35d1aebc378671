// Storage types that a kernel is told at run time, on every backend.
#pragma once

namespace transfuse {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

}  // namespace transfuse
