// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on sixteen counters at once.
// What the counter and the key hold is the caller's (attention: CONTRACT section 3).
#pragma once

#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

struct PhiloxWords {
  i32 word[4];
};

TRANSFUSE_INLINE PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  constexpr int rounds = 10;
  const i32 multiplier0 = set1i(static_cast<int32_t>(0xD2511F53u)), multiplier1 = set1i(static_cast<int32_t>(0xCD9E8D57u));
  for (int round = 0; round < rounds; ++round) {
    const i32* c = counter.word;
    const i32 k0 = set1i(static_cast<int32_t>(key0)), k1 = set1i(static_cast<int32_t>(key1));
    counter = {{mul_high_unsigned(c[2], multiplier1) ^ c[1] ^ k0, mul_low(c[2], multiplier1),
                mul_high_unsigned(c[0], multiplier0) ^ c[3] ^ k1, mul_low(c[0], multiplier0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace transfuse::cpu::TRANSFUSE_ISA
