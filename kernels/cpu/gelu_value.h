// GELU of one vector in float, for kernels that apply it to a value they hold. Arithmetic: gelu.cpp.
#pragma once

#include "gelu_far.h"
#include "gelu_segments.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

struct Erf {
  using Core = ErfSegments;
  using Far = ErfFar;
};
struct Tanh {
  using Core = TanhSegments;
  using Far = TanhFar;
};

template <class Form>
struct GeluValue {
  TRANSFUSE_INLINE static f32 core(f32 x) {
    const f32 t = abs(x);
    return fnma(t, evaluate(Form::Core::tail, t), max(zero(), x));
  }
  TRANSFUSE_INLINE static mask is_far(f32 x) { return abs(x) >= set1(segments_end); }
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
