// Which ISA level runs: cpuid once, and an override for tests. Compiled for the baseline CPU.
#include "isa.h"

#include <atomic>
#include <stdexcept>
#include <string>

namespace transfuse::cpu {

namespace {

Isa detect() {
#if defined(TRANSFUSE_ASSUME_ISA)  // the emulated build of the tests: wide levels run on a narrower CPU
  return Isa::TRANSFUSE_ASSUME_ISA;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa widest_of_this_cpu() {
  static const Isa widest = detect();
  return widest;
}

Isa best() {
  int level = num_isa_levels - 1;
  while (level > 0 && !isa_available(static_cast<Isa>(level))) --level;
  return static_cast<Isa>(level);
}

std::atomic<int>& level() {
  static std::atomic<int> value{static_cast<int>(best())};
  return value;
}

}  // namespace

bool isa_built(Isa level) {
  switch (level) {
#ifdef TRANSFUSE_HAS_BASELINE
    case Isa::baseline:
#endif
#ifdef TRANSFUSE_HAS_AVX2
    case Isa::avx2:
#endif
#ifdef TRANSFUSE_HAS_AVX512
    case Isa::avx512:
#endif
#ifdef TRANSFUSE_HAS_AVX512_BF16
    case Isa::avx512_bf16:
#endif
      return true;
    default:
      return false;
  }
}

bool isa_available(Isa level) {
  return isa_built(level) && static_cast<int>(level) <= static_cast<int>(widest_of_this_cpu());
}

Isa isa() {
  return static_cast<Isa>(level().load(std::memory_order_relaxed));
}

void set_isa(Isa wanted) {
  if (!isa_available(wanted)) {
    std::string levels;
    for (int i = 0; i < num_isa_levels; ++i)
      if (isa_available(static_cast<Isa>(i))) levels += std::string(levels.empty() ? "" : ", ") + isa_name(static_cast<Isa>(i));
    throw std::invalid_argument(std::string("set_cpu_isa: level ") + isa_name(wanted) + " is not available here, expected one of " +
                                levels);
  }
  level().store(static_cast<int>(wanted), std::memory_order_relaxed);
}

const char* isa_name(Isa value) {
  constexpr const char* names[num_isa_levels] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(value)];
}

}  // namespace transfuse::cpu
