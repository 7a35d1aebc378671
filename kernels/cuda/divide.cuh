// Division of row numbers by sizes that the host knows: a multiplication, where the hardware's takes twenty
// instructions in 32 bits and some hundred in 64. Host code; masked_softmax_rows.cuh divides.
#pragma once

#include <cstdint>

namespace transfuse::cuda {

// n / divisor is (high half of n * multiplier + n) >> shift for 0 <= n < 2^31, exact (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t divisor, multiplier, shift;
};
constexpr int64_t divider_limit = int64_t{1} << 31;

// For 1 <= divisor < 2^31.
inline Divider divider_of(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t over = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  const uint64_t multiplier = (over << 32) / static_cast<uint64_t>(divisor) + 1;
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(multiplier), shift};
}

}  // namespace transfuse::cuda
