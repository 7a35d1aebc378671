// GELU, erf and tanh form: x * Phi(x). Tensors of doubles: gelu_f64.h.
//
// Both forms are written with t = |x| as  gelu(x) = max(x, 0) - t * tail(t),  where tail(t) = Phi(-t) falls to 0:
//   erf:   Phi(-t) = exp(-t^2/2) * R(t), R the Mills ratio over sqrt(2 pi), a rational function of t;
//   tanh:  Phi(-t) = E / (1 + E), E = exp(-t (c0 + c1 t^2)).
// Nothing cancels for x < 0, where the result is -t * tail(t) alone, so the tail keeps its relative accuracy down to the
// last subnormal. Likewise gelu'(x) = h(t) for x < 0 and 1 - h(t) for x >= 0 with h(t) = tail(t) - t * density(t).
//
// Most inputs lie in |x| < 63/16, where both tails are polynomials in float (gelu_segments.h). Beyond, and for the few
// lanes whose float result lies so near the middle of two float16 that its error could choose the wrong one, they are
// evaluated in double: an error of 2^-29 relative (the derivative near its root: 2^-41 absolute), rounded once.
// Beyond t = 16 every tail is far below the last subnormal, so t is cut there: infinities and huge inputs need no case.
#include "gelu.h"

#include <type_traits>

#include "exp.h"
#include "gelu_f64.h"
#include "gelu_segments.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

constexpr double cut = 16.0;

template <int n>
TRANSFUSE_INLINE f64 polynomial(const double (&c)[n], f64 t) {
  f64 sum = set1d(c[n - 1]);
#pragma GCC unroll 20
  for (int i = n - 2; i >= 0; --i) sum = fma(sum, t, set1d(c[i]));
  return sum;
}

// R(t) = Phi(-t) exp(t^2/2) = P(t) / Q(t) on [0, 16], relative error 2^-39.
constexpr double mills_p[] = {
    0x1.00000000014d9p-1, 0x1.25072584c3476p-1, 0x1.4988d461fe849p-2, 0x1.be1acc2038532p-4,
    0x1.7b786ab4ec994p-6, 0x1.8182bbd553799p-9, 0x1.73d7f2412f026p-13};
constexpr double mills_q[] = {
    0x1.0000000000000p+0, 0x1.f1494f2405f07p+0, 0x1.b18b5af48110bp+0, 0x1.ba3fb22d2cdabp-1,
    0x1.1f1baeee1a755p-2, 0x1.df3c2e2f4dcd5p-5, 0x1.e32a91e3f0ef9p-8, 0x1.d20965981f27fp-12};
constexpr double inverse_sqrt_2pi = 0x1.9884533d43651p-2;
// tanh's argument, doubled: 2 sqrt(2/pi) (t + 0.044715 t^3).
constexpr double tanh_c0 = 0x1.9884533d43651p+0, tanh_c1 = 0x1.2444f2a4d8b4bp-4;

struct Erf {
  using Full = ErfFull;
  using Core = ErfSegments;
  TRANSFUSE_INLINE static f64 gaussian(f64 t) { return exp(t * t * set1d(-0.5)); }
  // t * Phi(-t)
  TRANSFUSE_INLINE static f64 tail(f64 t) { return t * gaussian(t) * polynomial(mills_p, t) / polynomial(mills_q, t); }
  // Phi(-t) - t phi(t)
  TRANSFUSE_INLINE static f64 slope(f64 t) {
    const f64 mills = polynomial(mills_p, t) / polynomial(mills_q, t);
    return gaussian(t) * fnma(t, set1d(inverse_sqrt_2pi), mills);
  }
};

struct Tanh {
  using Full = TanhFull;
  using Core = TanhSegments;
  TRANSFUSE_INLINE static f64 tail(f64 t) {
    const f64 e = exp(t * fma(t * t, set1d(-tanh_c1), set1d(-tanh_c0)));
    return t * e / (e + set1d(1.0));
  }
  TRANSFUSE_INLINE static f64 slope(f64 t) {
    const f64 t2 = t * t;
    const f64 e = exp(t * fma(t2, set1d(-tanh_c1), set1d(-tanh_c0)));
    const f64 upper = set1d(1.0) / (e + set1d(1.0));  // Phi(t)
    const f64 rate = t * fma(t2, set1d(3 * tanh_c1), set1d(tanh_c0));
    return e * upper * fnma(rate, upper, set1d(1.0));
  }
};

// In min and max the operand that holds a NaN, or the sign of a zero, stands second: it is the one that is kept.
TRANSFUSE_INLINE f64 cut_abs(f64 x) { return min(set1d(cut), abs(x)); }

template <class Form>
TRANSFUSE_INLINE f64 gelu_everywhere(f64 x) {
  return max(zero64(), x) - Form::tail(cut_abs(x));
}

template <class Form>
TRANSFUSE_INLINE f64 slope_everywhere(f64 x) {
  const f64 h = Form::slope(cut_abs(x));
  return select(x < zero64(), h, set1d(1.0) - h);
}

// The same for |x| < segments_end, in float.
template <class Form>
TRANSFUSE_INLINE f32 gelu_core(f32 x) {
  const f32 t = abs(x);
  return fnma(t, evaluate(Form::Core::tail, t), max(zero(), x));
}

template <class Form>
TRANSFUSE_INLINE f32 slope_core(f32 x) {
  const f32 h = evaluate(Form::Core::slope, abs(x) - set1(Form::Core::shift));
  return select(x < zero(), h, set1(1.0f) - h);
}

// gelu(x) for storage as T. A 16-bit x from segments_end on is its own gelu: the tail is below half its last place.
template <class Form, class T>
TRANSFUSE_INLINE f32 gelu_core_for(f32 x) {
  const f32 core = gelu_core<Form>(x);
  return std::is_same_v<T, float> ? core : select(x >= set1(segments_end), x, core);
}

// Lanes whose result y = f(x), found by a core, may not be the right one for storage as T.
TRANSFUSE_INLINE mask uncertain(f32 x, f32, float) { return abs(x) >= set1(segments_end); }
TRANSFUSE_INLINE mask uncertain(f32 x, f32, bf16) { return abs(x) >= set1(segments_end); }
TRANSFUSE_INLINE mask uncertain(f32 x, f32 y, f16) {
  constexpr int32_t cut_bits = (1 << 13) - 1, middle = 1 << 12, error = 8;
  const mask near_middle = less_unsigned((bits(y) & set1i(cut_bits)) - set1i(middle - error), set1i(2 * error));
  return near_middle | (abs(y) < set1(0x1p-14f)) | (abs(x) >= set1(segments_end));  // subnormals have other middles
}

// What the sum of input and bias is computed in.
template <class T>
using SumOf = Vec<std::conditional_t<std::is_same_v<T, double>, double, float>>;

// Runs body(element, column, n, x) over the vectors of each row, x = input + bias rounded to the storage type: fused equals
// unfused, where input + bias is a tensor of that type.
template <class T, class B, class Body>
TRANSFUSE_INLINE void for_each_sum(const GeluParams& p, int64_t begin, int64_t end, Body body) {
  const T* input = static_cast<const T*>(p.input);
  const B* bias = static_cast<const B*>(p.bias);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * p.columns;
    const int64_t length = p.size - first < p.columns ? p.size - first : p.columns;
    for_each_vec(length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      auto x = load_as<SumOf<T>>(input + first + i, n);
      if (bias) x = rounded(x + load_as<SumOf<T>>(bias + i, n), T{});
      body(first + i, i, n, x);
    });
  }
}

// A double rounded to float, for storage as T. Twice rounded, two of float16's results would be the wrong neighbour; none
// of bfloat16's is (all of them were tried).
template <class T>
TRANSFUSE_INLINE f32 narrow_for(wide x) {
  if constexpr (std::is_same_v<T, f16>) {
    return narrow_to_odd(x);
  } else {
    return narrow(x);
  }
}

template <class Form, class T>
TRANSFUSE_INLINE f32 gelu_everywhere(f32 x) {
  return narrow_for<T>(wide{gelu_everywhere<Form>(low(x)), gelu_everywhere<Form>(high(x))});
}

// The few uncertain lanes wait here until there are sixteen of them.
template <class Form, class T>
struct WaitingLanes {
  T* output;
  alignas(64) float x[lanes] = {};
  int64_t at[lanes] = {};
  int64_t count = 0;

  // Lane i, where bit i of `which` is set, is x[i] and belongs at output[first + i]. Out of line: the loop over the other
  // lanes keeps its tables in registers.
  [[gnu::noinline]] void add(const float* values, uint32_t which, int64_t first) {
    for (; which != 0; which &= which - 1) {
      const int lane = __builtin_ctz(which);
      x[count] = values[lane];
      at[count] = first + lane;
      if (++count == lanes) flush();
    }
  }
  void flush() {
    alignas(64) T results[lanes];
    store(results, gelu_everywhere<Form, T>(load(x)));
    for (int64_t i = 0; i < count; ++i) output[at[i]] = results[i];
    count = 0;
  }
};

// A lane takes the core or the double form by its own value alone, so its bits do not depend on its neighbours.
template <class Form, class T, class B>
[[gnu::noinline]] void forward_rows(const GeluParams& p, int64_t begin, int64_t end) {
  T* output = static_cast<T*>(p.output);
  WaitingLanes<Form, T> waiting{output};
  for_each_sum<T, B>(p, begin, end, [&](int64_t at, int64_t, int64_t n, f32 x) __attribute__((always_inline)) {
    const f32 core = gelu_core_for<Form, T>(x);
    mask left = uncertain(x, core, T{});
    if constexpr (!std::is_same_v<T, float>) left = left & (x < set1(segments_end));
    store_n(output + at, core, n);
    if (__builtin_expect(!any(left), 1)) return;
    alignas(64) float values[lanes];
    store(values, x);
    waiting.add(values, to_bits(left) & ((uint32_t{1} << n) - 1), at);
  });
  waiting.flush();
}

template <class Form>
void forward_rows_of_doubles(const GeluParams& p, int64_t begin, int64_t end) {
  double* output = static_cast<double*>(p.output);
  for_each_sum<double, double>(p, begin, end, [&](int64_t at, int64_t, int64_t n, wide x) __attribute__((always_inline)) {
    store_wide(output + at, wide{gelu_full<typename Form::Full>(x.lo), gelu_full<typename Form::Full>(x.hi)}, n);
  });
}

template <class Form, class T>
[[gnu::noinline]] void gradient_everywhere(const float* grad_output, const float* x, float* gradient) {
  const wide value = load_wide(x);
  const wide slope = {slope_everywhere<Form>(value.lo), slope_everywhere<Form>(value.hi)};
  store(gradient, narrow_for<T>(load_wide(grad_output) * slope));
}
template <class Form, class T>
TRANSFUSE_INLINE f32 gradient_of(f32 grad_output, f32 x, T type) {
  const f32 core = grad_output * slope_core<Form>(x);
  const mask left = uncertain(x, core, type);
  if (__builtin_expect(!any(left), 1)) return core;
  alignas(64) float values[3][lanes];
  store(values[0], grad_output);
  store(values[1], x);
  gradient_everywhere<Form, T>(values[0], values[1], values[2]);
  return select(left, load(values[2]), core);
}
template <class Form>
TRANSFUSE_INLINE wide gradient_of(wide grad_output, wide x, double) {
  using Full = typename Form::Full;
  return grad_output * wide{gelu_slope_full<Full>(x.lo), gelu_slope_full<Full>(x.hi)};
}
template <class T>
TRANSFUSE_INLINE void store_rounded(T* p, wide x, int64_t n) {
  store_n(p, narrow_for<T>(x), n);
}
TRANSFUSE_INLINE void store_rounded(double* p, wide x, int64_t n) { store_wide(p, x, n); }

template <class Form, class T, class B>
[[gnu::noinline]] void backward_rows(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  const T* grad_output = static_cast<const T*>(p.grad_output);
  T* output = static_cast<T*>(p.output);
  for_each_sum<T, B>(p, begin, end, [&](int64_t at, int64_t column, int64_t n, auto x) __attribute__((always_inline)) {
    const auto gradient = gradient_of<Form>(load_as<SumOf<T>>(grad_output + at, n), x, T{});
    store_as(output + at, gradient, n);
    if (bias_sum == nullptr) return;
    store_wide(bias_sum + column, load_wide(bias_sum + column, n) + widen(gradient), n);
  });
}

// One function per (form, storage type, bias type), chosen by the parameters.
template <class Form, class T, class Call>
TRANSFUSE_INLINE void with_bias_type(const GeluParams& p, Call call) {
  p.bias_dtype == DType::f32 ? call(Form{}, T{}, float{}) : call(Form{}, T{}, T{});
}
template <class Form, class Call>
TRANSFUSE_INLINE void with_types(const GeluParams& p, Call call) {
  switch (p.dtype) {
    case DType::f32:
      return call(Form{}, float{}, float{});
    case DType::bf16:
      return with_bias_type<Form, bf16>(p, call);
    case DType::f16:
      return with_bias_type<Form, f16>(p, call);
    case DType::f64:
      return call(Form{}, double{}, double{});
  }
}
template <class Call>
TRANSFUSE_INLINE void with_form(const GeluParams& p, Call call) {
  p.tanh ? with_types<Tanh>(p, call) : with_types<Erf>(p, call);
}

void forward(const GeluParams& p, int64_t begin, int64_t end) {
  with_form(p, [&](auto form, auto type, auto bias_type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, double>) {
      forward_rows_of_doubles<decltype(form)>(p, begin, end);
    } else {
      forward_rows<decltype(form), T, decltype(bias_type)>(p, begin, end);
    }
  });
}

void backward(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  with_form(p, [&](auto form, auto type, auto bias_type) {
    backward_rows<decltype(form), decltype(type), decltype(bias_type)>(p, begin, end, bias_sum);
  });
}

template <class B>
void round_to(const double* sums, void* grad_bias, int64_t columns) {
  B* out = static_cast<B*>(grad_bias);
  for_each_vec(columns, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    store_rounded(out + i, load_wide(sums + i, n), n);
  });
}

void round_sums(const double* sums, void* grad_bias, int64_t columns, DType bias_dtype) {
  switch (bias_dtype) {
    case DType::f32:
      return round_to<float>(sums, grad_bias, columns);
    case DType::bf16:
      return round_to<bf16>(sums, grad_bias, columns);
    case DType::f16:
      return round_to<f16>(sums, grad_bias, columns);
    case DType::f64:
      return round_to<double>(sums, grad_bias, columns);
  }
}

}  // namespace

extern const GeluKernels gelu_kernels = {forward, backward, round_sums};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
