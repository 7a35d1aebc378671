// GELU, erf and tanh form: x * Phi(x). Tensors of doubles: gelu_f64.h.
//
// Both forms are written with t = |x| as  gelu(x) = max(x, 0) - t * tail(t),  where tail(t) = Phi(-t) falls to 0:
//   erf:   Phi(-t) = exp(-t^2/2) * R(t), R the Mills ratio over sqrt(2 pi);
//   tanh:  Phi(-t) = E / (1 + E), E = exp(-t (c0 + c1 t^2)).
// Nothing cancels for x < 0, where the result is -t * tail(t) alone, so the tail keeps its relative accuracy down to
// the last subnormal. Likewise gelu'(x) = h(t) for x < 0 and 1 - h(t) for x >= 0 with h(t) = tail(t) - t * density(t).
//
// Most inputs lie in |x| < 63/16, where both tails are polynomials in float (gelu_segments.h). The lanes beyond, one in
// twenty where x has standard deviation 2, are gathered and evaluated sixteen at a time, in float too (gelu_far.h). A
// bfloat16 is rounded from either float: none of its inputs lies so near the middle of two results that the float's error
// chooses the wrong one. Lanes of float16 that lie so near are evaluated again, in double.
#include "gelu.h"

#include <type_traits>

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

// Lanes whose float y may round to the wrong float16. Subnormal float16s are 2^-24 apart, as the floats' upper bits
// are from 2^-14 on.
TRANSFUSE_INLINE mask near_middle_of_f16(f32 y) {
  constexpr int32_t cut_bits = (1 << 13) - 1, middle = 1 << 12, error = 8;
  const f32 size = abs(y), least_normal = set1(0x1p-14f);
  const f32 shown = select(size < least_normal, size + least_normal, size);
  return less_unsigned((bits(shown) & set1i(cut_bits)) - set1i(middle - error), set1i(2 * error));
}

// The two functions of (x, grad_output). In float: `core`, and `far` for the lanes that is_far names. In double: `full`.

template <class Form>
struct Forward {
  static constexpr bool takes_gradient = false;
  // A 16-bit x from segments_end on is its own gelu: the tail is below half its last place.
  template <class T>
  TRANSFUSE_INLINE static f32 core(f32 x, f32, T) {
    const f32 t = abs(x), y = fnma(t, evaluate(Form::Core::tail, t), max(zero(), x));
    return std::is_same_v<T, float> ? y : select(x >= set1(segments_end), x, y);
  }
  template <class T>
  TRANSFUSE_INLINE static mask is_far(f32 x, T) {
    return std::is_same_v<T, float> ? abs(x) >= set1(segments_end) : x <= set1(-segments_end);
  }
  TRANSFUSE_INLINE static f32 far(f32 x, f32) {
    const f32 y = value(Form::Far::tail(min(set1(Form::Far::cut), abs(x))));
    return select(x < zero(), -y, x - y);
  }
  TRANSFUSE_INLINE static wide full(wide x, wide) {
    return {gelu_full<typename Form::Full>(x.lo), gelu_full<typename Form::Full>(x.hi)};
  }
};

template <class Form>
struct Backward {
  static constexpr bool takes_gradient = true;
  template <class T>
  TRANSFUSE_INLINE static f32 core(f32 x, f32 grad_output, T) {
    const f32 h = evaluate(Form::Core::slope, abs(x) - set1(Form::Core::shift));
    return grad_output * select(x < zero(), h, set1(1.0f) - h);
  }
  template <class T>
  TRANSFUSE_INLINE static mask is_far(f32 x, T) {
    return abs(x) >= set1(segments_end);
  }
  TRANSFUSE_INLINE static f32 far(f32 x, f32 grad_output) {
    const mask negative = x < zero();
    const Scaled slope = Form::Far::slope(min(set1(Form::Far::cut), abs(x)));
    const f32 h = value({slope.fraction * select(negative, grad_output, set1(1.0f)), slope.power});
    return select(negative, h, grad_output * (set1(1.0f) - h));
  }
  TRANSFUSE_INLINE static wide full(wide x, wide grad_output) {
    using Full = typename Form::Full;
    return grad_output * wide{gelu_slope_full<Full>(x.lo), gelu_slope_full<Full>(x.hi)};
  }
};

// The rows in pieces of at most `block` elements: piece(first, column, length), first the number of its first element.
constexpr int64_t block = 1024, group_length = 4 * lanes;
template <class Piece>
TRANSFUSE_INLINE void for_each_piece(const GeluParams& p, int64_t begin, int64_t end, Piece piece) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * p.columns;
    const int64_t length = p.size - first < p.columns ? p.size - first : p.columns;
    for (int64_t i = 0; i < length; i += block) piece(first + i, i, length - i < block ? length - i : block);
  }
}

// x = input + bias rounded to the storage type: fused equals unfused, where input + bias is a tensor of that type.
template <class V, class T, class B>
TRANSFUSE_INLINE V load_sum(const T* input, const B* bias, int64_t column, int64_t n) {
  const V x = load_as<V>(input, n);
  return bias ? rounded(x + load_as<V>(bias + column, n), T{}) : x;
}

TRANSFUSE_INLINE void add_to(double* sums, wide x, int64_t n) { store_wide(sums, load_wide(sums, n) + x, n); }

// Lanes of a piece, gathered to be evaluated sixteen at a time.
template <class Function>
struct GatheredLanes {
  alignas(64) float x[block + lanes], grad_output[block + lanes];
  int32_t at[block + lanes];
  int64_t count = 0;

  TRANSFUSE_INLINE void add(mask which, f32 x_lanes, f32 grad_output_lanes, i32 at_lanes) {
    store_compressed(x + count, x_lanes, which);
    if constexpr (Function::takes_gradient) store_compressed(grad_output + count, grad_output_lanes, which);
    store_compressed(at + count, at_lanes, which);
    count += __builtin_popcount(to_bits(which));
  }
  // results[at] = evaluate(x, grad_output, at, n) of each lane, n lanes at a time. None is left.
  template <class Evaluate>
  TRANSFUSE_INLINE void scatter(float* results, Evaluate evaluate) {
    for_each_vec(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const f32 grad = Function::takes_gradient ? load_n(grad_output + i, n) : zero();
      alignas(64) float values[lanes];
      store(values, evaluate(load_n(x + i, n), grad, load(at + i), n));
      for (int64_t lane = 0; lane < n; ++lane) results[at[i + lane]] = values[lane];
    });
    count = 0;
  }
};

// A lane's method depends on its own values alone, and so do its bits.
template <class Function, class T, class B>
[[gnu::noinline]] void run_rows(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  constexpr bool is_f32 = std::is_same_v<T, float>, is_f16 = std::is_same_v<T, f16>;
  const T* input = static_cast<const T*>(p.input);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  const B* bias = static_cast<const B*>(p.bias);
  T* output = static_cast<T*>(p.output);
  alignas(64) float buffer[block];
  GatheredLanes<Function> far, doubtful;
  for_each_piece(p, begin, end, [&](int64_t first, int64_t column, int64_t length) __attribute__((always_inline)) {
    float* results = is_f32 ? reinterpret_cast<float*>(output + first) : buffer;
    const auto x_at = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      return load_sum<f32>(input + first + i, bias, column + i, n);
    };
    const auto grad_at = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      return Function::takes_gradient ? load_n(grad_output + first + i, n) : zero();
    };
    for (int64_t group = 0; group < length; group += group_length) {
      const int64_t group_end = length - group < group_length ? length - group : group_length;
      mask left = {};
      for_each_vec(group_end, [&](int64_t in_group, int64_t n) __attribute__((always_inline)) {
        const int64_t i = group + in_group;
        const f32 x = x_at(i, n), y = Function::core(x, grad_at(i, n), T{});
        store_n(results + i, y, n);
        left = left | Function::is_far(x, T{});
        if constexpr (is_f16) left = left | near_middle_of_f16(y);
      });
      if (!any(left)) continue;
      for_each_vec(group_end, [&](int64_t in_group, int64_t n) __attribute__((always_inline)) {
        const int64_t i = group + in_group;
        const f32 x = x_at(i, n), grad = grad_at(i, n);
        const mask is_far = Function::is_far(x, T{});
        const i32 at = iota() + set1i(static_cast<int32_t>(i));
        far.add(is_far, x, grad, at);
        if constexpr (is_f16) doubtful.add(near_middle_of_f16(load_n(results + i, n)) & ~is_far, x, grad, at);
      });
    }
    far.scatter(results, [&](f32 x, f32 grad, i32 at, int64_t n) __attribute__((always_inline)) {
      const f32 y = Function::far(x, grad);
      if constexpr (is_f16) doubtful.add(near_middle_of_f16(y) & first_n(n), x, grad, at);
      return y;
    });
    if constexpr (is_f16) {
      doubtful.scatter(results, [](f32 x, f32 grad, i32, int64_t) __attribute__((always_inline)) {
        return narrow_to_odd(Function::full(widen(x), widen(grad)));
      });
    }
    if (is_f32 && bias_sum == nullptr) return;
    for_each_vec(length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const f32 y = load_n(results + i, n);
      if constexpr (!is_f32) store_n(output + first + i, y, n);
      if (bias_sum != nullptr) add_to(bias_sum + column + i, widen(y), n);
    });
  });
}

template <class Function>
[[gnu::noinline]] void run_rows_of_doubles(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  const double* input = static_cast<const double*>(p.input);
  const double* grad_output = static_cast<const double*>(p.grad_output);
  const double* bias = static_cast<const double*>(p.bias);
  double* output = static_cast<double*>(p.output);
  for_each_piece(p, begin, end, [&](int64_t first, int64_t column, int64_t length) __attribute__((always_inline)) {
    for_each_vec(length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const wide x = load_sum<wide>(input + first + i, bias, column + i, n);
      const wide grad = Function::takes_gradient ? load_wide(grad_output + first + i, n) : x;
      const wide y = Function::full(x, grad);
      store_wide(output + first + i, y, n);
      if (bias_sum != nullptr) add_to(bias_sum + column + i, y, n);
    });
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

template <template <class> class Function>
void run(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  with_form(p, [&](auto form, auto type, auto bias_type) {
    using F = Function<decltype(form)>;
    using T = decltype(type);
    if constexpr (std::is_same_v<T, double>) {
      run_rows_of_doubles<F>(p, begin, end, bias_sum);
    } else {
      run_rows<F, T, decltype(bias_type)>(p, begin, end, bias_sum);
    }
  });
}
void forward(const GeluParams& p, int64_t begin, int64_t end) { run<Forward>(p, begin, end, nullptr); }
void backward(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  run<Backward>(p, begin, end, bias_sum);
}

template <class B>
void round_to(const double* sums, void* grad_bias, int64_t columns) {
  B* out = static_cast<B*>(grad_bias);
  for_each_vec(columns, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    store_wide(out + i, load_wide(sums + i, n), n);
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
