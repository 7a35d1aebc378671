// GELU of a vector in float, in the pieces gelu.cpp takes and in one for kernels that hold the value. Arithmetic: gelu.cpp.
#pragma once

#include "gelu_f64.h"
#include "gelu_far.h"
#include "gelu_segments.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

struct Erf {
  using Core = ErfSegments;
  using Far = ErfFar;
  using Full = ErfFull;
};
struct Tanh {
  using Core = TanhSegments;
  using Far = TanhFar;
  using Full = TanhFull;
};

// Lanes for which `far` has the value, not `core`.
TRANSFUSE_INLINE mask is_far(f32 x) { return abs(x) >= set1(segments_end); }

template <class Form>
struct GeluValue {
  TRANSFUSE_INLINE static f32 core(f32 x) {
    const f32 t = abs(x);
    return fnma(t, evaluate(Form::Core::tail, t), max(zero(), x));
  }
  TRANSFUSE_INLINE static f32 far(f32 x) {
    const f32 y = value(Form::Far::tail(min(set1(Form::Far::cut), abs(x))));
    return select(x < zero(), -y, x - y);
  }
  TRANSFUSE_INLINE static f32 of(f32 x) {
    const f32 y = core(x);
    const mask beyond = is_far(x);
    return __builtin_expect(any(beyond), 0) ? select(beyond, far(x), y) : y;
  }
};

}  // namespace
}  // namespace transfuse::cpu::TRANSFUSE_ISA
