// The ISA levels a CPU kernel is compiled for, and how a kernel table is declared in each of them.
//
// Policy: kernels/cpu/<op>.cpp is compiled once per level with -DTRANSFUSE_ISA=<level>; everything it defines lives
// in transfuse::cpu::<level>, so that no symbol of a wider level can be picked by the linker for a narrower one.
// `baseline` is portable vector code and runs on every CPU; avx512_bf16 is a level of its own, since vdpbf16ps traps on
// older AVX-512 chips. CMake defines TRANSFUSE_HAS_<LEVEL> for those that are built.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace transfuse::cpu {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int num_isa_levels = 4;

// The level in force: the best one at first; set_isa changes it (tests force every level the machine has).
Isa isa();
void set_isa(Isa level);
bool isa_available(Isa level);  // built, and this CPU runs it
bool isa_built(Isa level);
const char* isa_name(Isa level);

// Storage types. Kernels know no framework, so the 16-bit ones are their bits.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

using transfuse::DType;

}  // namespace transfuse::cpu

#ifdef TRANSFUSE_HAS_BASELINE
#define TRANSFUSE_CASE_BASELINE(name) case Isa::baseline: return baseline::name;
#else
#define TRANSFUSE_CASE_BASELINE(name)
#endif
#ifdef TRANSFUSE_HAS_AVX2
#define TRANSFUSE_CASE_AVX2(name) case Isa::avx2: return avx2::name;
#else
#define TRANSFUSE_CASE_AVX2(name)
#endif
#ifdef TRANSFUSE_HAS_AVX512
#define TRANSFUSE_CASE_AVX512(name) case Isa::avx512: return avx512::name;
#else
#define TRANSFUSE_CASE_AVX512(name)
#endif
#ifdef TRANSFUSE_HAS_AVX512_BF16
#define TRANSFUSE_CASE_AVX512_BF16(name) case Isa::avx512_bf16: return avx512_bf16::name;
#else
#define TRANSFUSE_CASE_AVX512_BF16(name)
#endif

// Declares `const Table name` in every level and `const Table& pick_name()` that gives the one of the level in force.
#define TRANSFUSE_DECLARE_KERNELS(Table, name) \
  namespace baseline {                         \
  extern const Table name;                     \
  }                                            \
  namespace avx2 {                             \
  extern const Table name;                     \
  }                                            \
  namespace avx512 {                           \
  extern const Table name;                     \
  }                                            \
  namespace avx512_bf16 {                      \
  extern const Table name;                     \
  }                                            \
  inline const Table& pick_##name() {          \
    switch (isa()) {                           \
      TRANSFUSE_CASE_BASELINE(name)            \
      TRANSFUSE_CASE_AVX2(name)                \
      TRANSFUSE_CASE_AVX512(name)              \
      TRANSFUSE_CASE_AVX512_BF16(name)         \
      default:                                 \
        __builtin_unreachable();               \
    }                                          \
  }
