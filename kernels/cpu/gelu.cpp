// GELU, erf and tanh form: x * Phi(x), evaluated in double and rounded once. Tensors of doubles: gelu_f64.h.
//
// Both forms are written with t = |x| as  gelu(x) = max(x, 0) - t * tail(t),  where tail(t) = Phi(-t) falls to 0:
//   erf:   Phi(-t) = exp(-t^2/2) * R(t), R the Mills ratio over sqrt(2 pi), a rational function of t;
//   tanh:  Phi(-t) = E / (1 + E), E = exp(-t (c0 + c1 t^2)).
// Nothing cancels for x < 0, where the result is -t * tail(t) alone, so the tail keeps its relative accuracy down to the
// last subnormal. Likewise gelu'(x) = h(t) for x < 0 and 1 - h(t) for x >= 0 with h(t) = tail(t) - t * density(t).
//
// Most inputs of the erf form lie in |x| <= 3.5, where an odd polynomial serves both signs at half the price.
//
// Error: 2^-29 relative before the one rounding, so at most 0.52 ULP forward; backward the same but for the
// neighbourhood of the root, where gelu' itself cancels (2^-41 absolute).
// Beyond t = 16 every tail is far below the last subnormal, so t is cut there: infinities and huge inputs need no case.
#include "gelu.h"

#include <type_traits>

#include "exp.h"
#include "gelu_f64.h"
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

// The same as two chains, of the even and of the odd powers, for polynomials so long that one chain's latency shows.
template <int n>
TRANSFUSE_INLINE f64 long_polynomial(const double (&c)[n], f64 t) {
  const f64 t2 = t * t;
  f64 a = set1d(c[n - 1]), b = set1d(c[n - 2]);
#pragma GCC unroll 20
  for (int i = n - 3; i >= 1; i -= 2) {
    a = fma(a, t2, set1d(c[i]));
    b = fma(b, t2, set1d(c[i - 1]));
  }
  // n odd: a ends at power 0 after one more step; n even: at power 1.
  if constexpr (n % 2 == 1) {
    return fma(b, t, fma(a, t2, set1d(c[0])));
  } else {
    return fma(a, t, b);
  }
}

// R(t) = Phi(-t) exp(t^2/2) = P(t) / Q(t) on [0, 16], relative error 2^-39.
constexpr double mills_p[] = {
    0x1.00000000014d9p-1, 0x1.25072584c3476p-1, 0x1.4988d461fe849p-2, 0x1.be1acc2038532p-4,
    0x1.7b786ab4ec994p-6, 0x1.8182bbd553799p-9, 0x1.73d7f2412f026p-13};
constexpr double mills_q[] = {
    0x1.0000000000000p+0, 0x1.f1494f2405f07p+0, 0x1.b18b5af48110bp+0, 0x1.ba3fb22d2cdabp-1,
    0x1.1f1baeee1a755p-2, 0x1.df3c2e2f4dcd5p-5, 0x1.e32a91e3f0ef9p-8, 0x1.d20965981f27fp-12};
// Phi(x) = 1/2 + x C(x^2) for |x| <= 3.5, relative error 2^-29 of Phi down to Phi(-3.5): no exp, no division.
constexpr float core_limit = 3.5f;
constexpr double core_forward[] = {
    0x1.9884530b7bca8p-2, -0x1.1058327194ab4p-4, 0x1.46cfe98d4692dp-7, -0x1.373d224dbd97ap-10,
    0x1.e409818b9116ap-14, -0x1.3c71d1035cdbap-17, 0x1.633c51421b872p-21, -0x1.59e929436fbc3p-25,
    0x1.22d777553770cp-29, -0x1.9c17d087ceb3cp-34, 0x1.d4ad3d92bec68p-39, -0x1.8b67ee13a75ebp-44,
    0x1.b141ead86a357p-50, -0x1.c8a07883953dfp-57};
// gelu'(x) = 1/2 + x S(x^2) there, error 2^-29 of max(|gelu'|, 2e-4).
constexpr double core_slope[] = {
    0x1.9884532c4532bp-1, -0x1.1058367385558p-2, 0x1.ea384ac692bf2p-5, -0x1.373fa2c751f3ep-7,
    0x1.2e965f0146c50p-10, -0x1.db31e8a6e61b2p-14, 0x1.38497335b2052p-17, -0x1.5f814cb4da844p-21,
    0x1.5680885c6ab00p-25, -0x1.1f94240d75184p-29, 0x1.961452b9d8803p-34, -0x1.cb77ca280bce4p-39,
    0x1.81355a60718acp-44, -0x1.a338ca425a49dp-50, 0x1.b6d2659e5a3ecp-57};
constexpr double inverse_sqrt_2pi = 0x1.9884533d43651p-2;
// tanh's argument, doubled: 2 sqrt(2/pi) (t + 0.044715 t^3).
constexpr double tanh_c0 = 0x1.9884533d43651p+0, tanh_c1 = 0x1.2444f2a4d8b4bp-4;

struct Erf {
  using Full = ErfFull;
  static constexpr bool has_core = true;
  TRANSFUSE_INLINE static f64 core(f64 x) { return x * fma(long_polynomial(core_forward, x * x), x, set1d(0.5)); }
  TRANSFUSE_INLINE static f64 core_derivative(f64 x) { return fma(long_polynomial(core_slope, x * x), x, set1d(0.5)); }
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
  static constexpr bool has_core = false;
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

template <class Form>
TRANSFUSE_INLINE f64 gelu_slope(f64 x) {
  if constexpr (Form::has_core) {
    const mask64 outside = abs(x) > set1d(core_limit);
    const f64 core = Form::core_derivative(x);
    return any(outside) ? select(outside, slope_everywhere<Form>(x), core) : core;
  } else {
    return slope_everywhere<Form>(x);
  }
}

// What the sum of input and bias is computed in.
template <class T>
using SumOf = Vec<std::conditional_t<std::is_same_v<T, double>, double, float>>;

// A sum rounded to the storage type: fused equals unfused, where input + bias is a tensor of that type.
TRANSFUSE_INLINE f32 rounded(f32 x, float) { return x; }
TRANSFUSE_INLINE wide rounded(wide x, double) { return x; }
TRANSFUSE_INLINE f32 rounded(f32 x, f16) {
  f16 half[lanes];
  store(half, x);
  return load(half);
}
TRANSFUSE_INLINE f32 rounded(f32 x, bf16) {
  const i32 odd = shift_right<16>(bits(x)) & set1i(1);
  const i32 r = (bits(x) + odd + set1i(0x7FFF)) & set1i(static_cast<int32_t>(0xFFFF0000u));
  return select(isnan(x), x, from_bits(r));
}

// Runs body(element, column, n, x) over the vectors of each row, x = input + bias.
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

// The few lanes that lie outside the core wait here until there are sixteen of them.
template <class Form, class T>
struct WaitingLanes {
  T* output;
  alignas(64) float x[lanes] = {};
  int64_t at[lanes] = {};
  int64_t count = 0;

  TRANSFUSE_INLINE void add(float value, int64_t where) {
    x[count] = value;
    at[count] = where;
    if (++count == lanes) flush();
  }
  void flush() {
    alignas(64) T results[lanes];
    store(results, gelu_everywhere<Form, T>(load(x)));
    for (int64_t i = 0; i < count; ++i) output[at[i]] = results[i];
    count = 0;
  }
};

constexpr int many_outside = 8;  // of sixteen: then waiting costs more than it saves

// A lane takes the core or the tail form by its own value alone, so its bits do not depend on its neighbours.
template <class Form, class T, class B>
void forward_rows(const GeluParams& p, int64_t begin, int64_t end) {
  T* output = static_cast<T*>(p.output);
  WaitingLanes<Form, T> waiting{output};
  for_each_sum<T, B>(p, begin, end, [&](int64_t at, int64_t, int64_t n, f32 x) __attribute__((always_inline)) {
    if constexpr (Form::has_core) {
      const f32 core = narrow_for<T>(wide{Form::core(low(x)), Form::core(high(x))});
      const mask outside = abs(x) > set1(core_limit);
      uint32_t bits = to_bits(outside);
      if (__builtin_popcount(bits) >= many_outside)
        return store_n(output + at, select(outside, gelu_everywhere<Form, T>(x), core), n);
      store_n(output + at, core, n);
      if (bits == 0) return;
      alignas(64) float values[lanes];
      store(values, x);
      for (; bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        waiting.add(values[lane], at + lane);
      }
    } else {
      store_n(output + at, gelu_everywhere<Form, T>(x), n);
    }
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

template <class Form>
TRANSFUSE_INLINE wide slope_of(f32 x) {
  return {gelu_slope<Form>(low(x)), gelu_slope<Form>(high(x))};
}
template <class Form>
TRANSFUSE_INLINE wide slope_of(wide x) {
  return {gelu_slope_full<typename Form::Full>(x.lo), gelu_slope_full<typename Form::Full>(x.hi)};
}
TRANSFUSE_INLINE wide in_double(f32 x) { return widen(x); }
TRANSFUSE_INLINE wide in_double(wide x) { return x; }
template <class T>
TRANSFUSE_INLINE void store_rounded(T* p, wide x, int64_t n) {
  store_n(p, narrow_for<T>(x), n);
}
TRANSFUSE_INLINE void store_rounded(double* p, wide x, int64_t n) { store_wide(p, x, n); }

template <class Form, class T, class B>
void backward_rows(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  const T* grad_output = static_cast<const T*>(p.grad_output);
  T* output = static_cast<T*>(p.output);
  for_each_sum<T, B>(p, begin, end, [&](int64_t at, int64_t column, int64_t n, auto x) __attribute__((always_inline)) {
    const wide gradient = in_double(load_as<SumOf<T>>(grad_output + at, n)) * slope_of<Form>(x);
    store_rounded(output + at, gradient, n);
    if (bias_sum == nullptr) return;
    alignas(64) double gained[lanes];
    store_wide(gained, gradient);
    for (int64_t i = 0; i < n; ++i) bias_sum[column + i] += gained[i];
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
