// GELU's segments (gelu_tables.h) evaluated on sixteen lanes.
#pragma once

#include "gelu_tables.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

static_assert(num_segments == lookup_size, "a lookup is one instruction");

// The polynomial of the segment that holds t - shift, for shift <= t + 1/16; beyond segments_end any number, of a NaN NaN.
TRANSFUSE_INLINE f32 evaluate(const Segments& segments, f32 t) {
  const f32 rounded = t + set1(segment_rounding);
  const f32 u = t - (rounded - set1(segment_rounding));
  const i32 segment = bits(rounded);
  f32 sum = lookup(segments.coefficients[5], segment);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) sum = fma(sum, u, lookup(segments.coefficients[i], segment));
  return sum;
}

}  // namespace transfuse::cpu::TRANSFUSE_ISA
