// Masked softmax of rows: y_j = exp(s_j - m) / sum, s = scale * x + mask over the valid keys of the row, 0 elsewhere.
//
// A score is carried as hi + lo, so that neither scale * x, nor the mask's addition, nor s - m loses a bit that exp would
// magnify: at logits around 100 a rounded score alone costs 60 ULP of its weight. The weights are summed in double and
// the quotient is one rounding. Error <= 3 ULP per element (exp 0.9, its share in the sum, the quotient 0.5).
//
// Rows by their largest score m:  no valid key: 0.  m NaN or infinite: NaN at the valid keys.  |m| > 1024: the residuals
// are no longer small, the row is done in double.  Else: sixteen floats at a time.
// Reductions run over keys in lanes (key % 16) and one fixed tree, so excluded keys at the end of a row change no bit.
#include "masked_softmax.h"

#include "exp.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

constexpr float infinity = __builtin_inff();
constexpr float wide_score = 1024.0f;
// A score within exp's reach of |m| <= 1024 has a residual below this; a weight of 0 must not be disturbed by its own.
constexpr float largest_residual = 0x1p-12f;
constexpr double lowest_exponent = -690.0;  // of exp(f64); rounds to a weight of 0

struct NoMask {};
template <class M>
constexpr bool is_additive = false;
template <>
constexpr bool is_additive<float> = true;
template <>
constexpr bool is_additive<bf16> = true;

// The valid keys of one row: [0, length) where the mask keeps them.
template <class T, class M>
struct Row {
  const T* input;
  const M* mask;
  int64_t mask_stride;
  int64_t length;
};

// Sixteen keys of a row: input, what is added to it, and which of them are valid.
struct Keys {
  f32 x, bias;
  mask valid;
};

template <class M>
TRANSFUSE_INLINE f32 load_bias(const M* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_n(p, n);
  alignas(64) float values[lanes] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = to_float(p[i * stride]);
  return load(values);
}
// A boolean mask comes as bytes; a strided or short stretch is brought together first.
TRANSFUSE_INLINE mask load_keep(const uint8_t* p, int64_t stride, int64_t n) {
  if (stride == 1 && n == lanes) return nonzero(p);
  alignas(16) uint8_t bytes[lanes] = {};
  for (int64_t i = 0; i < n; ++i) bytes[i] = p[i * stride];
  return nonzero(bytes);
}

template <class T>
TRANSFUSE_INLINE Keys load_keys(const Row<T, NoMask>& row, int64_t i, int64_t n) {
  return {load_n(row.input + i, n), zero(), first_n(n)};
}
template <class T>
TRANSFUSE_INLINE Keys load_keys(const Row<T, uint8_t>& row, int64_t i, int64_t n) {
  const mask keep = load_keep(row.mask + i * row.mask_stride, row.mask_stride, n);
  return {load_n(row.input + i, n), zero(), first_n(n) & keep};
}
template <class T, class M>
TRANSFUSE_INLINE Keys load_keys(const Row<T, M>& row, int64_t i, int64_t n) {
  const f32 bias = load_bias(row.mask + i * row.mask_stride, row.mask_stride, n);
  return {load_n(row.input + i, n), bias, first_n(n) & ~(bias == set1(-infinity))};
}

// A double in every lane as hi + lo, so that float arithmetic with it keeps its residual.
struct Split {
  f32 hi, lo;
  explicit Split(double x) : hi(set1(static_cast<float>(x))), lo(set1(static_cast<float>(x - static_cast<float>(x)))) {}
};

struct Score {
  f32 hi, lo;  // hi the rounded score, lo what rounding took
};

// a + b = sum + the returned residual, exactly.
TRANSFUSE_INLINE f32 sum_residual(f32 a, f32 b, f32 sum) {
  const f32 b_part = sum - a;
  return (a - (sum - b_part)) + (b - b_part);
}

template <class M>
TRANSFUSE_INLINE Score score_of(const Keys& keys, const Split& scale) {
  const f32 product = keys.x * scale.hi;
  const f32 residual = fma(keys.x, scale.lo, fms(keys.x, scale.hi, product));
  if constexpr (is_additive<M>) {
    const f32 sum = product + keys.bias;
    return {sum, residual + sum_residual(product, keys.bias, sum)};
  } else {
    return {product, residual};
  }
}

template <class T, class M>
TRANSFUSE_INLINE float largest_score(const Row<T, M>& row, const Split& scale, bool& any_valid) {
  f32 largest = set1(-infinity);
  mask seen = first_n(0);
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Keys keys = load_keys(row, i, n);
    seen = seen | keys.valid;
    largest = max_nan(select(keys.valid, score_of<M>(keys, scale).hi, set1(-infinity)), largest);
  });
  any_valid = any(seen);
  return reduce_max(largest);
}

// Writes exp(score - largest) to weights and returns their sum.
template <class T, class M>
TRANSFUSE_INLINE double exponentials(const Row<T, M>& row, const Split& scale, float largest, float* weights) {
  f64 sum_low = zero64(), sum_high = zero64();
  const f32 shift = set1(-largest);
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Keys keys = load_keys(row, i, n);
    const Score score = score_of<M>(keys, scale);
    const f32 exponent = score.hi + shift;
    // An infinite input makes its residual NaN; min and max give their second operand there.
    f32 residual = score.lo + sum_residual(score.hi, shift, exponent);
    residual = max(min(residual, set1(largest_residual)), set1(-largest_residual));
    const f32 weight = select(keys.valid, exp_nonpositive(exponent, residual), zero());
    store_n(weights + i, weight, n);
    sum_low = sum_low + low(weight);
    sum_high = sum_high + high(weight);
  });
  return reduce_add(sum_low + sum_high);
}

struct WideScores {
  f64 low, high;
};

// The scores of a row of large scores, in double; an excluded key's is -inf.
template <class T, class M>
TRANSFUSE_INLINE WideScores wide_scores(const Row<T, M>& row, double scale, int64_t i, int64_t n) {
  const Keys keys = load_keys(row, i, n);
  const f32 x = select(keys.valid, keys.x, zero());
  const f32 bias = select(keys.valid, keys.bias, set1(-infinity));
  return {fma(low(x), set1d(scale), low(bias)), fma(high(x), set1d(scale), high(bias))};
}

template <class T, class M>
double wide_exponentials(const Row<T, M>& row, double scale, float* weights) {
  f64 largest_lanes = set1d(-infinity);
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const WideScores s = wide_scores(row, scale, i, n);
    largest_lanes = max(largest_lanes, max(s.low, s.high));
  });
  alignas(64) double values[lanes64];
  store(values, largest_lanes);
  double largest = values[0];
  for (int64_t i = 1; i < lanes64; ++i) largest = values[i] > largest ? values[i] : largest;

  f64 sum_low = zero64(), sum_high = zero64();
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const WideScores s = wide_scores(row, scale, i, n);
    const f64 shift = set1d(-largest), lowest = set1d(lowest_exponent);
    const f32 weight = narrow(exp(max(s.low + shift, lowest)), exp(max(s.high + shift, lowest)));
    store_n(weights + i, weight, n);
    sum_low = sum_low + low(weight);
    sum_high = sum_high + high(weight);
  });
  return reduce_add(sum_low + sum_high);
}

template <class T>
TRANSFUSE_INLINE void fill_zero(T* output, int64_t begin, int64_t end) {
  for_each_vec(end - begin, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    store_n(output + begin + i, zero(), n);
  });
}

template <class T, class M>
TRANSFUSE_INLINE void softmax_row(const Row<T, M>& row, double scale, T* output, float* weights) {
  const Split split(scale);
  bool any_valid = false;
  const float largest = largest_score(row, split, any_valid);
  if (!any_valid) return fill_zero(output, 0, row.length);
  if (!(__builtin_fabsf(largest) < infinity)) {
    const f32 nan = set1(__builtin_nanf(""));
    for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      store_n(output + i, select(load_keys(row, i, n).valid, nan, zero()), n);
    });
    return;
  }
  const double sum = __builtin_fabsf(largest) <= wide_score ? exponentials(row, split, largest, weights)
                                                            : wide_exponentials(row, scale, weights);
  const Split inverse(1.0 / sum);
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const f32 weight = load_n(weights + i, n);
    store_n(output + i, fma(weight, inverse.hi, weight * inverse.lo), n);
  });
}

TRANSFUSE_INLINE int64_t mask_offset(const MaskedSoftmaxParams& p, int64_t row) {
  int64_t offset = 0;
  for (int64_t d = p.outer_dims - 1; d >= 0; --d) {
    offset += (row % p.outer_sizes[d]) * p.mask_strides[d];
    row /= p.outer_sizes[d];
  }
  return offset;
}

template <class T, class M>
void forward_rows(const MaskedSoftmaxParams& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    int64_t length = p.keys;
    if (p.causal) {
      const int64_t visible = i % p.queries + p.causal_offset + 1;
      length = visible < 0 ? 0 : (visible < p.keys ? visible : p.keys);
    }
    Row<T, M> row{static_cast<const T*>(p.input) + i * p.keys, nullptr, 0, length};
    if (p.mask) {
      row.mask = static_cast<const M*>(p.mask) + mask_offset(p, i);
      row.mask_stride = p.mask_strides[p.outer_dims];
    }
    T* output = static_cast<T*>(p.output) + i * p.keys;
    softmax_row(row, p.scale, output, scratch);
    fill_zero(output, length, p.keys);
  }
}

template <class T>
void forward_type(const MaskedSoftmaxParams& p, int64_t begin, int64_t end, float* scratch) {
  switch (p.mask_kind) {
    case MaskKind::none:
      return forward_rows<T, NoMask>(p, begin, end, scratch);
    case MaskKind::keep:
      return forward_rows<T, uint8_t>(p, begin, end, scratch);
    case MaskKind::additive_f32:
      return forward_rows<T, float>(p, begin, end, scratch);
    case MaskKind::additive_bf16:
      return forward_rows<T, bf16>(p, begin, end, scratch);
  }
}

void forward(const MaskedSoftmaxParams& p, int64_t begin, int64_t end, float* scratch) {
  p.dtype == DType::f32 ? forward_type<float>(p, begin, end, scratch) : forward_type<bf16>(p, begin, end, scratch);
}

// The gradient of the scores is y * (dy - mean), mean = sum(dy * y). A weight of 0 takes and gives none, whatever its dy:
// an excluded key's gradient is 0 even where dy is not finite or the row is NaN.
template <class T>
struct GradRow {
  const T* dy;
  const T* y;
  int64_t keys;
};

// dy * y of the keys [i, i + 16); a weight of 0 is skipped where asked, so that an infinite dy beside it does no harm.
template <bool skip_zero, class T>
TRANSFUSE_INLINE f32 product(const GradRow<T>& row, int64_t i) {
  const int64_t n = row.keys - i < lanes ? row.keys - i : lanes;
  if (n <= 0) return zero();
  const f32 weight = load_n(row.y + i, n), incoming = load_n(row.dy + i, n);
  if constexpr (!skip_zero) return weight * incoming;
  return select(weight == zero(), zero(), weight * incoming);
}

// Four products of sixteen keys are added in float, those sums in double; by key number alone, whatever the row's length.
template <bool skip_zero, class T>
TRANSFUSE_INLINE double sum_of_products(const GradRow<T>& row) {
  f64 sum_low = zero64(), sum_high = zero64();
  for (int64_t i = 0; i < row.keys; i += 4 * lanes) {
    const f32 four = (product<skip_zero>(row, i) + product<skip_zero>(row, i + lanes)) +
                     (product<skip_zero>(row, i + 2 * lanes) + product<skip_zero>(row, i + 3 * lanes));
    sum_low = sum_low + low(four);
    sum_high = sum_high + high(four);
  }
  return reduce_add(sum_low + sum_high);
}

template <class T>
TRANSFUSE_INLINE double mean_gradient(const GradRow<T>& row) {
  const double sum = sum_of_products<false>(row);
  return __builtin_fabs(sum) < __builtin_inf() ? sum : sum_of_products<true>(row);
}

template <class T>
TRANSFUSE_INLINE f32 score_gradient(const GradRow<T>& row, int64_t i, int64_t n, const Split& mean) {
  const f32 weight = load_n(row.y + i, n);
  const f32 centred = (load_n(row.dy + i, n) - mean.hi) - mean.lo;
  return select(weight == zero(), zero(), weight * centred);
}

template <class T>
GradRow<T> grad_row(const MaskedSoftmaxGradParams& p, int64_t row) {
  return {static_cast<const T*>(p.grad_output) + row * p.keys, static_cast<const T*>(p.output) + row * p.keys, p.keys};
}

template <class T>
void backward_rows(const MaskedSoftmaxGradParams& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const GradRow<T> row = grad_row<T>(p, r);
    T* grad_input = static_cast<T*>(p.grad_input) + r * p.keys;
    const Split mean(mean_gradient(row));
    const f32 scale = set1(static_cast<float>(p.scale));
    for_each_vec(p.keys, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      store_n(grad_input + i, score_gradient(row, i, n, mean) * scale, n);
    });
  }
}

template <class T>
void add_row_gradient(const MaskedSoftmaxGradParams& p, int64_t r, double* sums) {
  const GradRow<T> row = grad_row<T>(p, r);
  const Split mean(mean_gradient(row));
  for_each_vec(p.keys, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    alignas(64) float gained[lanes];
    store(gained, score_gradient(row, i, n, mean));
    for (int64_t j = 0; j < n; ++j) sums[i + j] += gained[j];
  });
}

void backward(const MaskedSoftmaxGradParams& p, int64_t begin, int64_t end) {
  p.dtype == DType::f32 ? backward_rows<float>(p, begin, end) : backward_rows<bf16>(p, begin, end);
}

void add_score_gradient(const MaskedSoftmaxGradParams& p, int64_t row, double* sums) {
  p.dtype == DType::f32 ? add_row_gradient<float>(p, row, sums) : add_row_gradient<bf16>(p, row, sums);
}

}  // namespace

extern const MaskedSoftmaxKernels masked_softmax_kernels = {forward, backward, add_score_gradient};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
