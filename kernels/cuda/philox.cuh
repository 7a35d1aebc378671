// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as kernels/cpu/philox.h has
// it. What the counter and the key hold is the caller's (attention: CONTRACT section 3).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace transfuse::cuda {

struct PhiloxWords {
  uint32_t word[4];
};

__device__ __forceinline__ PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  constexpr int rounds = 10;
  constexpr uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    const uint32_t* c = counter.word;
    counter = {{__umulhi(c[2], multiplier1) ^ c[1] ^ key0, c[2] * multiplier1,
                __umulhi(c[0], multiplier0) ^ c[3] ^ key1, c[0] * multiplier0}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace transfuse::cuda
