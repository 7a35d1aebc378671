// GELU, erf and tanh form: x * Phi(x). Tensors of doubles: gelu_f64.h.
//
// Both forms are written with t = |x| as  gelu(x) = max(x, 0) - t * tail(t),  where tail(t) = Phi(-t) falls to 0:
//   erf:   Phi(-t) = exp(-t^2/2) * R(t), R the Mills ratio over sqrt(2 pi);
//   tanh:  Phi(-t) = E / (1 + E), E = exp(-t (c0 + c1 t^2)).
// Nothing cancels for x < 0, where the result is -t * tail(t) alone, so the tail keeps its relative accuracy down to
// the last subnormal. Likewise gelu'(x) = h(t) for x < 0 and 1 - h(t) for x >= 0 with h(t) = tail(t) - t * density(t).
//
// Most floats lie in |x| < 63/16, where both tails are polynomials in float (gelu_segments.h). The lanes beyond, one in
// twenty where x has standard deviation 2, are gathered and evaluated sixteen at a time, in float too (gelu_far.h).
//
// A 16-bit type has 65,536 inputs: its gelu and gelu' are tables, filled in double where first used. The inputs of a
// layer share their few exponents, so that what is read of a table, 5 KB for bfloat16, stays in L1.
#include "gelu.h"

#include <type_traits>

#include "gelu_value.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

// The two functions. In float, of (x, grad_output): `core`, and `far` for the lanes that is_far names. In double, of x
// where grad_output is 1: `full`.

template <class Form>
struct Forward {
  static constexpr bool takes_gradient = false;
  TRANSFUSE_INLINE static f32 core(f32 x, f32) { return GeluValue<Form>::core(x); }
  TRANSFUSE_INLINE static f32 far(f32 x, f32) { return GeluValue<Form>::far(x); }
  TRANSFUSE_INLINE static f64 full(f64 x) { return gelu_full<typename Form::Full>(x); }
};

template <class Form>
struct Backward {
  static constexpr bool takes_gradient = true;
  TRANSFUSE_INLINE static f32 core(f32 x, f32 grad_output) {
    const f32 h = evaluate(Form::Core::slope, abs(x) - set1(Form::Core::shift));
    return grad_output * select(x < zero(), h, set1(1.0f) - h);
  }
  TRANSFUSE_INLINE static f32 far(f32 x, f32 grad_output) {
    const mask negative = x < zero();
    const Scaled slope = Form::Far::slope(min(set1(Form::Far::cut), abs(x)));
    const f32 h = value({slope.fraction * select(negative, grad_output, set1(1.0f)), slope.power});
    return select(negative, h, grad_output * (set1(1.0f) - h));
  }
  TRANSFUSE_INLINE static f64 full(f64 x) { return gelu_slope_full<typename Form::Full>(x); }
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
  // results[at] = Function::far(x, grad_output) of each lane. None is left.
  TRANSFUSE_INLINE void scatter(float* results) {
    for_each_vec(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const f32 grad = Function::takes_gradient ? load_n(grad_output + i, n) : zero();
      alignas(64) float values[lanes];
      store(values, Function::far(load_n(x + i, n), grad));
      for (int64_t lane = 0; lane < n; ++lane) results[at[i + lane]] = values[lane];
    });
    count = 0;
  }
};

// A lane's method depends on its own values alone, and so do its bits.
template <class Function>
[[gnu::noinline]] void run_rows_of_floats(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  const float* input = static_cast<const float*>(p.input);
  const float* grad_output = static_cast<const float*>(p.grad_output);
  const float* bias = static_cast<const float*>(p.bias);
  float* output = static_cast<float*>(p.output);
  GatheredLanes<Function> far;
  for_each_piece(p, begin, end, [&](int64_t first, int64_t column, int64_t length) __attribute__((always_inline)) {
    float* results = output + first;
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
        const f32 x = x_at(i, n);
        store_n(results + i, Function::core(x, grad_at(i, n)), n);
        left = left | is_far(x);
      });
      if (!any(left)) continue;
      for_each_vec(group_end, [&](int64_t in_group, int64_t n) __attribute__((always_inline)) {
        const int64_t i = group + in_group;
        const f32 x = x_at(i, n);
        far.add(is_far(x), x, grad_at(i, n), iota() + set1i(static_cast<int32_t>(i)));
      });
    }
    far.scatter(results);
    if (bias_sum == nullptr) return;
    for_each_vec(length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      add_to(bias_sum + column + i, widen(load_n(results + i, n)), n);
    });
  });
}

// Function::full of every T: rounded to T what the forward gives; as floats what grad_output is multiplied with. These
// are rounded to odd, so that the product with a power of two is one rounding of the double.
template <class Function, class T>
struct Table {
  using Entry = std::conditional_t<Function::takes_gradient, float, T>;
  alignas(64) Entry values[1 << 16];

  Table() {
    for (int32_t i = 0; i < 1 << 16; i += lanes) {
      T x[lanes];
      for (int32_t lane = 0; lane < lanes; ++lane) x[lane].bits = static_cast<uint16_t>(i + lane);
      store(values + i, narrow_to_odd(wide{Function::full(load64(x)), Function::full(load64(x + lanes64))}));
    }
  }
};

template <class Function, class T>
[[gnu::noinline]] const typename Table<Function, T>::Entry* table_of() {
  static const Table<Function, T> table;
  return table.values;
}

template <class Function, class T, class B>
[[gnu::noinline]] void run_rows_of_16_bits(const GeluParams& p, int64_t begin, int64_t end, double* bias_sum) {
  constexpr int64_t ahead = block;  // elements to prefetch: the many loads of a table leave the prefetchers behind
  const auto* table = table_of<Function, T>();
  const T* input = static_cast<const T*>(p.input);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  const B* bias = static_cast<const B*>(p.bias);
  T* output = static_cast<T*>(p.output);
  alignas(64) T sums[block];
  for_each_piece(p, begin, end, [&](int64_t first, int64_t column, int64_t length) __attribute__((always_inline)) {
    const T* x = input + first;
    T* results = output + first;
    if (bias) {
      for_each_vec(length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        store_n(sums + i, load_n(x + i, n) + load_n(bias + column + i, n), n);
      });
      x = sums;
    }
    for_each_vec(length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      if (i % (2 * lanes) == 0) {
        __builtin_prefetch(input + first + i + ahead);
        __builtin_prefetch(results + i + ahead, 1);
        if (Function::takes_gradient) __builtin_prefetch(grad_output + first + i + ahead);
      }
      if constexpr (Function::takes_gradient) {
        T padded[lanes] = {};
        if (n < lanes) __builtin_memcpy(padded, x + i, static_cast<size_t>(n) * sizeof(T));
        const f32 slope = gather(table, n < lanes ? padded : x + i), y = load_n(grad_output + first + i, n) * slope;
        store_n(results + i, y, n);
        if (bias_sum != nullptr) add_to(bias_sum + column + i, widen(y), n);
      } else if (n == lanes) {
        gather(results + i, table, x + i);
      } else {
        for (int64_t k = 0; k < n; ++k) results[i + k] = table[x[i + k].bits];
      }
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
      wide y = {Function::full(x.lo), Function::full(x.hi)};
      if (Function::takes_gradient) y = load_wide(grad_output + first + i, n) * y;
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
    } else if constexpr (std::is_same_v<T, float>) {
      run_rows_of_floats<F>(p, begin, end, bias_sum);
    } else {
      run_rows_of_16_bits<F, T, decltype(bias_type)>(p, begin, end, bias_sum);
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
