// GELU, erf and tanh form: x * Phi(x), evaluated in double and rounded once.
//
// Both forms are written with t = |x| as  gelu(x) = max(x, 0) - t * tail(t),  where tail(t) = Phi(-t) falls to 0:
//   erf:   Phi(-t) = exp(-t^2/2) * R(t), R the Mills ratio over sqrt(2 pi), a rational function of t;
//   tanh:  Phi(-t) = E / (1 + E), E = exp(-t (c0 + c1 t^2)).
// Nothing cancels for x < 0, where the result is -t * tail(t) alone, so the tail keeps its relative accuracy down to the
// last subnormal. Likewise gelu'(x) = h(t) for x < 0 and 1 - h(t) for x >= 0 with h(t) = tail(t) - t * density(t).
//
// Most inputs of the erf form lie in |x| <= 4, where an odd polynomial serves both signs at half the price.
//
// Error: 2^-33 relative before the one rounding, so at most 0.51 ULP forward; backward the same but for the
// neighbourhood of the root, where gelu' itself cancels (2^-39 absolute).
// Beyond t = 16 every tail is far below the last subnormal, so t is cut there: infinities and huge inputs need no case.
#include "gelu.h"

#include "exp.h"
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
// Phi(x) = 1/2 + x C(x^2) for |x| <= 4, relative error 2^-33 of Phi down to Phi(-4): no exp, no division.
constexpr double core_limit = 4.0;
constexpr double core_forward[] = {
    0x1.988453391a85ap-2, -0x1.1058370c31864p-4, 0x1.46d03a4b26f35p-7, -0x1.373ff0699c0d2p-10,
    0x1.e4277ad53f881p-14, -0x1.3cdb28ca50140p-17, 0x1.653e53353492ap-21, -0x1.60f00f44254e3p-25,
    0x1.34d056a9b064bp-29, -0x1.dfd0763912ea0p-34, 0x1.482d94e1e8da1p-38, -0x1.82c482f4184fap-43,
    0x1.7ac8d11adc567p-48, -0x1.2494f4c7f804cp-53, 0x1.4a5ed09f04dafp-59, -0x1.e01963fbe1cf4p-66,
    0x1.4e6151ba6bdaap-73};
// gelu'(x) = 1/2 + x S(x^2) there, error 2^-33 of max(|gelu'|, 2e-4) where gelu' is small.
constexpr double core_slope[] = {
    0x1.9884533bd0e0dp-1, -0x1.1058376684b0ap-2, 0x1.ea3861909b8d7p-5, -0x1.374030391023fp-7,
    0x1.2e9a710ac6aa4p-10, -0x1.db58ad5c62c63p-14, 0x1.38c7b84b2408fp-17, -0x1.61c965e7f7909p-21,
    0x1.5e2e410e1e88ap-25, -0x1.32a479c156acep-29, 0x1.dc450d6889f2fp-34, -0x1.4538f5ee20ccap-38,
    0x1.7e2b5ac16c7d7p-43, -0x1.74c9ba5096f21p-48, 0x1.1e96c989a43d3p-53, -0x1.41f3db7050be3p-59,
    0x1.d17100e8f3055p-66, -0x1.42877d286966bp-73};
constexpr double inverse_sqrt_2pi = 0x1.9884533d43651p-2;
// tanh's argument, doubled: 2 sqrt(2/pi) (t + 0.044715 t^3).
constexpr double tanh_c0 = 0x1.9884533d43651p+0, tanh_c1 = 0x1.2444f2a4d8b4bp-4;

struct Erf {
  static constexpr bool has_core = true;
  TRANSFUSE_INLINE static f64 core(f64 x) { return x * fma(polynomial(core_forward, x * x), x, set1d(0.5)); }
  TRANSFUSE_INLINE static f64 core_derivative(f64 x) { return fma(polynomial(core_slope, x * x), x, set1d(0.5)); }
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

// A lane takes the core or the tail form by its own value alone, so its bits do not depend on its neighbours.
template <class Form>
TRANSFUSE_INLINE f64 gelu(f64 x) {
  if constexpr (Form::has_core) {
    const mask64 outside = abs(x) > set1d(core_limit);
    const f64 core = Form::core(x);
    return any(outside) ? select(outside, gelu_everywhere<Form>(x), core) : core;
  } else {
    return gelu_everywhere<Form>(x);
  }
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

// A float rounded to the storage type: fused equals unfused, where input + bias is a tensor of that type.
TRANSFUSE_INLINE f32 rounded(f32 x, float) { return x; }
TRANSFUSE_INLINE f32 rounded(f32 x, bf16) {
  const i32 odd = shift_right<16>(bits(x)) & set1i(1);
  const i32 r = (bits(x) + odd + set1i(0x7FFF)) & set1i(static_cast<int32_t>(0xFFFF0000u));
  return select(isnan(x), x, from_bits(r));
}

// Runs body(i, n, x) over the vectors of each row, x = input + bias.
template <class T, class B, class Body>
TRANSFUSE_INLINE void for_each_sum(const GeluParams& p, int64_t begin, int64_t end, Body body) {
  const T* input = static_cast<const T*>(p.input);
  const B* bias = static_cast<const B*>(p.bias);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * p.columns;
    const int64_t length = p.size - first < p.columns ? p.size - first : p.columns;
    for_each_vec(length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      f32 x = load_n(input + first + i, n);
      if (bias) x = rounded(x + load_n(bias + i, n), T{});
      body(first + i, i, n, x);
    });
  }
}

template <class Form, class T, class B>
void forward_rows(const GeluParams& p, int64_t begin, int64_t end) {
  T* output = static_cast<T*>(p.output);
  for_each_sum<T, B>(p, begin, end, [&](int64_t at, int64_t, int64_t n, f32 x) __attribute__((always_inline)) {
    store_n(output + at, narrow(gelu<Form>(low(x)), gelu<Form>(high(x))), n);
  });
}

template <class Form, class T, class B>
void backward_rows(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  const T* grad_output = static_cast<const T*>(p.grad_output);
  T* output = static_cast<T*>(p.output);
  for_each_sum<T, B>(p, begin, end, [&](int64_t at, int64_t column, int64_t n, f32 x) __attribute__((always_inline)) {
    const f32 dy = load_n(grad_output + at, n);
    const f64 lo = low(dy) * gelu_slope<Form>(low(x)), hi = high(dy) * gelu_slope<Form>(high(x));
    store_n(output + at, narrow(lo, hi), n);
    if (bias_sum == nullptr) return;
    alignas(64) double gained[lanes];
    store(gained, lo);
    store(gained + lanes64, hi);
    for (int64_t i = 0; i < n; ++i) bias_sum[column + i] += gained[i];
  });
}

// One function per (form, storage type, bias type), chosen by the parameters.
template <class Form, class T, class Call>
TRANSFUSE_INLINE void with_bias_type(const GeluParams& p, Call call) {
  p.bias_dtype == DType::f32 ? call(Form{}, T{}, float{}) : call(Form{}, T{}, bf16{});
}
template <class Form, class Call>
TRANSFUSE_INLINE void with_types(const GeluParams& p, Call call) {
  p.dtype == DType::f32 ? with_bias_type<Form, float>(p, call) : with_bias_type<Form, bf16>(p, call);
}
template <class Call>
TRANSFUSE_INLINE void with_form(const GeluParams& p, Call call) {
  p.tanh ? with_types<Tanh>(p, call) : with_types<Erf>(p, call);
}

void forward(const GeluParams& p, int64_t begin, int64_t end) {
  with_form(p, [&](auto form, auto type, auto bias_type) {
    forward_rows<decltype(form), decltype(type), decltype(bias_type)>(p, begin, end);
  });
}

void backward(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  with_form(p, [&](auto form, auto type, auto bias_type) {
    backward_rows<decltype(form), decltype(type), decltype(bias_type)>(p, begin, end, bias_sum);
  });
}

template <class B>
void round_to(const double* sums, B* out, int64_t columns) {
  for_each_vec(columns, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    alignas(64) double part[lanes] = {};
    for (int64_t j = 0; j < n; ++j) part[j] = sums[i + j];
    store_n(out + i, narrow(load(part), load(part + lanes64)), n);
  });
}

void round_sums(const double* sums, void* grad_bias, int64_t columns, DType bias_dtype) {
  bias_dtype == DType::f32 ? round_to(sums, static_cast<float*>(grad_bias), columns)
                           : round_to(sums, static_cast<bf16*>(grad_bias), columns);
}

}  // namespace

extern const GeluKernels gelu_kernels = {forward, backward, round_sums};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
