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
  return Isa::none;
}

std::atomic<int>& level() {
  static std::atomic<int> value{static_cast<int>(best_isa())};
  return value;
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa isa() {
  return static_cast<Isa>(level().load(std::memory_order_relaxed));
}

void set_isa(Isa wanted) {
  if (wanted == Isa::none || static_cast<int>(wanted) > static_cast<int>(best_isa()))
    throw std::invalid_argument(std::string("set_cpu_isa: level ") + isa_name(wanted) + " is not available on this CPU, expected at most " +
                                isa_name(best_isa()));
  level().store(static_cast<int>(wanted), std::memory_order_relaxed);
}

const char* isa_name(Isa value) {
  switch (value) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    default:
      return "none";
  }
}

}  // namespace transfuse::cpu
