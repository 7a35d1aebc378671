// The ISA levels a CPU kernel is compiled for, and how a kernel table is declared in each of them.
//
// Policy: kernels/cpu/<op>.cpp is compiled once per level with -DTRANSFUSE_ISA=<level>; everything it defines lives
// in transfuse::cpu::<level>, so that no symbol of a wider level can be picked by the linker for a narrower one.
#pragma once

#include <cstdint>

namespace transfuse::cpu {

enum class Isa : int { none = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The level in force. Chosen once from cpuid, lowered only by set_isa (tests force every level the machine has).
Isa isa();
Isa best_isa();
void set_isa(Isa level);
const char* isa_name(Isa level);

// Storage types. Kernels know no framework, so bfloat16 is its bits.
struct bf16 {
  uint16_t bits;
};

enum class DType : int { f32 = 0, bf16 = 1 };

}  // namespace transfuse::cpu

// Declares `const Table name` in every level and `const Table& name()` that picks the level in force.
#define TRANSFUSE_DECLARE_KERNELS(Table, name)                    \
  namespace avx2 {                                                \
  extern const Table name;                                        \
  }                                                               \
  namespace avx512 {                                              \
  extern const Table name;                                        \
  }                                                               \
  namespace avx512_bf16 {                                         \
  extern const Table name;                                        \
  }                                                               \
  inline const Table& pick_##name() {                             \
    switch (isa()) {                                              \
      case Isa::avx512_bf16:                                      \
        return avx512_bf16::name;                                 \
      case Isa::avx512:                                           \
        return avx512::name;                                      \
      default:                                                    \
        return avx2::name;                                        \
    }                                                             \
  }
