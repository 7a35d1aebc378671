// Masked softmax of rows: y_j = exp(s_j - m) / sum, s = scale * x + mask over the valid keys of the row, 0 elsewhere.
//
// A score is carried as hi + lo, so that neither scale * x nor the mask's addition loses a bit that exp would magnify:
// at logits around 100 a rounded score alone costs 60 ULP of its weight. s and m meet as powers of two alone, whose
// difference is exact. The weights are summed in double, four of them at a time, and the quotient is one rounding.
// Error <= 3 ULP per element (exp 1.2, its share in the sum, the quotient 0.5).
//
// Rows by their largest score m:  no valid key: 0.  m NaN or infinite: NaN at the valid keys.  |m| > 1024: the residuals
// are no longer small, the row is done in double.  Else: sixteen floats at a time. Rows of doubles are done in double
// with the same hi + lo, and their weights are summed with a residual too.
// Reductions run over keys in lanes (key % 16) and one fixed tree, so excluded keys at the end of a row change no bit.
#include "masked_softmax.h"

#include <type_traits>

#include "exact.h"
#include "exp.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

constexpr float infinity = __builtin_inff();
constexpr float wide_score = 1024.0f;
constexpr double lowest_exponent = -690.0;  // of exp(f64); rounds to a weight of 0
// A double above this has a residual that its weight feels.
constexpr double residual_counts = 0x1p40;

struct NoMask {};
template <class M>
constexpr bool is_additive = !std::is_same_v<M, NoMask> && !std::is_same_v<M, uint8_t>;

// What rows of storage type T are computed in: sixteen floats, or sixteen doubles for doubles.
template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
using VecOf = Vec<RealOf<T>>;
template <class T>
using MaskOf = typename Lanes<RealOf<T>>::mask_type;
TRANSFUSE_INLINE wide in_double(f32 x) { return widen(x); }
TRANSFUSE_INLINE wide in_double(wide x) { return x; }
template <class V>
TRANSFUSE_INLINE auto lanes_where(mask m) {
  if constexpr (std::is_same_v<V, f32>) {
    return m;
  } else {
    return widen(m);
  }
}

// One row, and its valid keys: [0, length) where the mask keeps them.
template <class T, class M>
struct Row {
  const T* input;
  T* output;
  const M* mask;
  int64_t mask_stride;
  int64_t length;
};

// Sixteen keys of a row: input, what is added to it, and which of them are valid.
template <class T>
struct Keys {
  VecOf<T> x, bias;
  MaskOf<T> valid;
};

template <class V, class M>
TRANSFUSE_INLINE V load_bias(const M* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_as<V>(p, n);
  alignas(64) M values[lanes] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = p[i * stride];
  return load_as<V>(values);
}
// A boolean mask comes as bytes; a strided or short stretch is brought together first.
TRANSFUSE_INLINE mask load_keep(const uint8_t* p, int64_t stride, int64_t n) {
  if (stride == 1 && n == lanes) return nonzero(p);
  alignas(16) uint8_t bytes[lanes] = {};
  for (int64_t i = 0; i < n; ++i) bytes[i] = p[i * stride];
  return nonzero(bytes);
}

template <class T>
TRANSFUSE_INLINE Keys<T> load_keys(const Row<T, NoMask>& row, int64_t i, int64_t n) {
  return {load_as<VecOf<T>>(row.input + i, n), splat<VecOf<T>>(0.0), lanes_where<VecOf<T>>(first_n(n))};
}
template <class T>
TRANSFUSE_INLINE Keys<T> load_keys(const Row<T, uint8_t>& row, int64_t i, int64_t n) {
  const mask keep = load_keep(row.mask + i * row.mask_stride, row.mask_stride, n);
  return {load_as<VecOf<T>>(row.input + i, n), splat<VecOf<T>>(0.0), lanes_where<VecOf<T>>(first_n(n) & keep)};
}
template <class T, class M>
TRANSFUSE_INLINE Keys<T> load_keys(const Row<T, M>& row, int64_t i, int64_t n) {
  const VecOf<T> bias = load_bias<VecOf<T>>(row.mask + i * row.mask_stride, row.mask_stride, n);
  const MaskOf<T> excluded = bias == splat<VecOf<T>>(-infinity);
  return {load_as<VecOf<T>>(row.input + i, n), bias, lanes_where<VecOf<T>>(first_n(n)) & ~excluded};
}

// A double in every lane as hi + lo, so that arithmetic in Real keeps its residual (of a double there is none).
template <class Real>
struct Split {
  Vec<Real> hi, lo;
  explicit Split(double x) : hi(splat<Vec<Real>>(x)), lo(splat<Vec<Real>>(x - static_cast<Real>(x))) {}
};

struct Score {
  f32 hi, lo;  // hi the rounded score, lo what rounding took
};

template <class M, class T>
TRANSFUSE_INLINE Score score_of(const Keys<T>& keys, const Split<float>& scale) {
  const f32 product = keys.x * scale.hi;
  const f32 residual = fma(keys.x, scale.lo, fms(keys.x, scale.hi, product));
  if constexpr (is_additive<M>) {
    // Where the bias takes most of the product away, the residual is no longer small beside the sum: it joins it. That
    // of an infinite score is NaN and stays out.
    const f32 sum = product + keys.bias, rest = residual + sum_residual(product, keys.bias, sum);
    const f32 joined = select(isnan(rest), sum, sum + rest);
    return {joined, rest - (joined - sum)};
  } else {
    return {product, residual};
  }
}

template <class T, class M>
TRANSFUSE_INLINE float largest_score(const Row<T, M>& row, const Split<float>& scale, bool& any_valid) {
  f32 largest = set1(-infinity);
  mask seen = first_n(0);
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Keys<T> keys = load_keys(row, i, n);
    seen = seen | keys.valid;
    largest = max_nan(select(keys.valid, score_of<M>(keys, scale).hi, set1(-infinity)), largest);
  });
  any_valid = any(seen);
  return reduce_max(largest);
}

// What the next group of rows reads and this one writes is on its way while exponentials are taken.
template <class T, class M>
TRANSFUSE_INLINE void prefetch(const Row<T, M>& row, int64_t i, int64_t group) {
  __builtin_prefetch(row.input + i + group);
  __builtin_prefetch(row.output + i, 1);
}

// Writes exp(score - largest), up to a factor that all of them share, to weights and returns their sum. Four weights of
// sixteen keys are added as they are, those sums in double; by key number alone, whatever the row's length.
template <class T, class M>
TRANSFUSE_INLINE double exponentials(const Row<T, M>& row, const Split<float>& scale, float largest, float* weights,
                                    int64_t group = 0) {
  constexpr int64_t step = 4 * lanes;
  const RowExponential exp(largest);
  const auto weight_at = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Keys<T> keys = load_keys(row, i, n);
    prefetch(row, i, group);
    const Score score = score_of<M>(keys, scale);
    const f32 counted = select(score.hi <= exp.lowest, zero(), exp(score.hi, score.lo));
    const f32 weight = select(keys.valid, counted, zero());
    store_n(weights + i, weight, n);
    return weight;
  };
  wide sum = set1w(0.0);
  int64_t i = 0;
  for (; i + step <= row.length; i += step) {
    const f32 two = weight_at(i, lanes) + weight_at(i + lanes, lanes);
    sum = sum + widen(two + (weight_at(i + 2 * lanes, lanes) + weight_at(i + 3 * lanes, lanes)));
  }
  if (i < row.length) {
    f32 four[4] = {zero(), zero(), zero(), zero()};
    for_each_vec(row.length - i, [&](int64_t at, int64_t n) __attribute__((always_inline)) {
      four[at / lanes] = weight_at(i + at, n);
    });
    sum = sum + widen((four[0] + four[1]) + (four[2] + four[3]));
  }
  return reduce_add(sum);
}

// 16-bit scores that no bias can cancel. Half a unit of a result is 2^-12 of it at least: s - m, rounded once, needs no
// residual (2^-17 of a weight that counts), and weights are summed in float over a block.
template <class T, class M>
constexpr bool is_light = sizeof(T) == 2 && !is_additive<M>;

// The largest score that is a number; a NaN comes out of the weights' sum.
template <class T, class M>
TRANSFUSE_INLINE float largest_number(const Row<T, M>& row, const Split<float>& scale) {
  f32 largest = set1(-infinity);
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Keys<T> keys = load_keys(row, i, n);
    largest = max(select(keys.valid, score_of<M>(keys, scale).hi, set1(-infinity)), largest);
  });
  return reduce_max(largest);
}

// As exponentials(), but all of them times 2^25.
template <class T, class M>
TRANSFUSE_INLINE double light_exponentials(const Row<T, M>& row, f32 scale, float largest, float* weights,
                                          int64_t group) {
  constexpr int64_t block_keys = 8 * lanes;
  wide sum = set1w(0.0);
  for (int64_t block = 0; block < row.length; block += block_keys) {
    f32 block_sum = zero();
    const int64_t rest = row.length - block;
    for_each_vec(rest < block_keys ? rest : block_keys, [&](int64_t at, int64_t n) __attribute__((always_inline)) {
      const int64_t i = block + at;
      const Keys<T> keys = load_keys(row, i, n);
      prefetch(row, i, group);
      const f32 weight = select(keys.valid, exp_times_2_25(fms(keys.x, scale, set1(largest))), zero());
      store_n(weights + i, weight, n);
      block_sum = block_sum + weight;
    });
    sum = sum + widen(block_sum);
  }
  return reduce_add(sum);
}

template <class T>
TRANSFUSE_INLINE void divide(const float* weights, double sum, T* output, int64_t length) {
  const Split<float> inverse(1.0 / sum);
  for_each_vec(length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const f32 weight = load_n(weights + i, n);
    store_n(output + i, sizeof(T) == 2 ? weight * inverse.hi : fma(weight, inverse.hi, weight * inverse.lo), n);
  });
}

// The scores of a row of large scores, in double; an excluded key's is -inf. Products of floats are exact there.
template <class T, class M>
TRANSFUSE_INLINE wide wide_scores(const Row<T, M>& row, const Split<float>& scale, int64_t i, int64_t n) {
  const Keys<T> keys = load_keys(row, i, n);
  const f32 x = select(keys.valid, keys.x, zero()), finite = select(abs(x) < set1(infinity), x, zero());
  const wide bias = widen(select(keys.valid, keys.bias, set1(-infinity)));
  return (widen(x) * widen(scale.hi) + bias) + widen(finite) * widen(scale.lo);
}

template <class T, class M>
double wide_exponentials(const Row<T, M>& row, const Split<float>& scale, float* weights) {
  wide largest = set1w(-infinity);
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    largest = max(largest, wide_scores(row, scale, i, n));
  });
  const wide shift = set1w(-reduce_max(largest)), lowest = set1w(lowest_exponent);
  wide sum = set1w(0.0);
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const f32 weight = narrow(exp(max(wide_scores(row, scale, i, n) + shift, lowest)));
    store_n(weights + i, weight, n);
    sum = sum + widen(weight);
  });
  return reduce_add(sum);
}

template <class T>
TRANSFUSE_INLINE void fill_zero(T* output, int64_t begin, int64_t end) {
  for_each_vec(end - begin, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    store_as(output + begin + i, splat<VecOf<T>>(0.0), n);
  });
}

// A row whose largest score is NaN or infinite.
template <class T, class M>
TRANSFUSE_INLINE void fill_nan(const Row<T, M>& row) {
  const VecOf<T> nan = splat<VecOf<T>>(__builtin_nan(""));
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    store_as(row.output + i, select(load_keys(row, i, n).valid, nan, splat<VecOf<T>>(0.0)), n);
  });
}

// A row that takes more than the usual one: without a valid key, with a NaN, with large or infinite scores.
template <class T, class M>
[[gnu::noinline]] void unusual_row(const Row<T, M>& row, const Split<float>& scale, float* weights) {
  bool any_valid = false;
  const float largest = largest_score(row, scale, any_valid);
  if (!any_valid) return fill_zero(row.output, 0, row.length);
  if (!(__builtin_fabsf(largest) < infinity)) return fill_nan(row);
  const double sum = __builtin_fabsf(largest) <= wide_score ? exponentials(row, scale, largest, weights)
                                                            : wide_exponentials(row, scale, weights);
  divide(weights, sum, row.output, row.length);
}

// Rows that are short go in groups, stage by stage: a stage of the next row begins while a reduction of this one ends.
constexpr int64_t group_rows = masked_softmax_group_rows;

TRANSFUSE_INLINE int64_t rows_at_once(int64_t keys, int64_t rows_left) {
  return keys > masked_softmax_longest_grouped ? 1 : (rows_left < group_rows ? rows_left : group_rows);
}

template <class T, class M>
TRANSFUSE_INLINE void softmax_rows(const Row<T, M>* rows, int64_t count, double scale, float* scratch,
                                   int64_t keys) {
  const Split<float> split(scale);
  float largest[group_rows];
  double sums[group_rows];
  for (int64_t r = 0; r < count; ++r) largest[r] = largest_number(rows[r], split);
  for (int64_t r = 0; r < count; ++r) {
    if constexpr (is_light<T, M>) {
      sums[r] = light_exponentials(rows[r], split.hi, largest[r], scratch + r * keys, count * keys);
    } else {
      sums[r] = exponentials(rows[r], split, largest[r], scratch + r * keys, count * keys);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    if (__builtin_fabsf(largest[r]) <= wide_score && sums[r] == sums[r])
      divide(scratch + r * keys, sums[r], rows[r].output, rows[r].length);
    else
      unusual_row(rows[r], split, scratch + r * keys);
  }
}

// ---- rows of doubles ----

// The residual of an infinite score is NaN, and so is that of a product beyond 2^996: they count as 0.
TRANSFUSE_INLINE f64 nan_as_zero(f64 x) { return select(isnan(x), zero64(), x); }

template <class M>
TRANSFUSE_INLINE Pair<f64> exact_score(f64 x, f64 bias, f64 scale) {
  const Pair<f64> product = two_product(x, scale);
  if constexpr (is_additive<M>) {
    const Pair<f64> sum = two_sum(product.hi, bias);
    const f64 rest = nan_as_zero(product.lo + sum.lo), joined = sum.hi + rest;
    return {joined, rest - (joined - sum.hi)};
  } else {
    return {product.hi, nan_as_zero(product.lo)};
  }
}

struct WidePair {
  wide hi, lo;
};
template <class M>
TRANSFUSE_INLINE WidePair exact_scores(const Keys<double>& keys, double scale) {
  const Pair<f64> low = exact_score<M>(keys.x.lo, keys.bias.lo, set1d(scale));
  const Pair<f64> high = exact_score<M>(keys.x.hi, keys.bias.hi, set1d(scale));
  return {{low.hi, high.hi}, {low.lo, high.lo}};
}

// exp(score - largest), both of them exact.
TRANSFUSE_INLINE f64 exact_weight(f64 score, f64 score_rest, f64 largest, f64 largest_rest) {
  const Pair<f64> difference = two_sum(score, -largest);
  const f64 rest = nan_as_zero(difference.lo + (score_rest - largest_rest));
  const f64 exponent = difference.hi + rest;
  const f64 limit = set1d(exp_full_residual);  // only a weight of 0 has a larger one
  return exp_full(exponent, max(min(sum_residual(difference.hi, rest, exponent), limit), -limit));
}

// The sum of sixteen lanes and of what their rounding took, rounded once.
TRANSFUSE_INLINE double sum_of_lanes(wide sum, wide lost) {
  alignas(64) double part[lanes];
  store_wide(part, sum);
  double total = 0.0, rest = reduce_add(lost);
  for (int64_t i = 0; i < lanes; ++i) {
    const double next = total + part[i];
    rest += sum_residual(total, part[i], next);
    total = next;
  }
  return total + rest;
}

template <class M>
TRANSFUSE_INLINE void softmax_row(const Row<double, M>& row, double scale) {
  double* output = row.output;
  const wide lowest = set1w(-infinity);
  wide largest_lanes = lowest;
  wide_mask seen = first_n_wide(0);
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Keys<double> keys = load_keys(row, i, n);
    seen = seen | keys.valid;
    largest_lanes = max_nan(select(keys.valid, exact_scores<M>(keys, scale).hi, lowest), largest_lanes);
  });
  const double largest = reduce_max(largest_lanes);
  if (!any(seen)) return fill_zero(output, 0, row.length);
  if (!(__builtin_fabs(largest) < __builtin_inf())) return fill_nan(row);

  // Between scores beyond exp's reach of each other the residual of the largest decides nothing; near 2^53 it does.
  double largest_rest = 0.0;
  if (__builtin_fabs(largest) > residual_counts) {
    wide rest_lanes = lowest;
    for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const Keys<double> keys = load_keys(row, i, n);
      const WidePair score = exact_scores<M>(keys, scale);
      rest_lanes = max(rest_lanes, select(keys.valid & (score.hi == set1w(largest)), score.lo, lowest));
    });
    largest_rest = reduce_max(rest_lanes);
  }

  wide sum = set1w(0.0), lost = set1w(0.0);
  const f64 most = set1d(largest), most_rest = set1d(largest_rest);
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const Keys<double> keys = load_keys(row, i, n);
    const WidePair score = exact_scores<M>(keys, scale);
    const wide weight = select(keys.valid, wide{exact_weight(score.hi.lo, score.lo.lo, most, most_rest),
                                                exact_weight(score.hi.hi, score.lo.hi, most, most_rest)}, set1w(0.0));
    store_wide(output + i, weight, n);
    const wide next = sum + weight;
    lost = lost + sum_residual(sum, weight, next);
    sum = next;
  });
  const wide total = set1w(sum_of_lanes(sum, lost));
  for_each_vec(row.length, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    store_wide(output + i, load_wide(output + i, n) / total, n);
  });
}

template <class M>
TRANSFUSE_INLINE void softmax_rows(const Row<double, M>* rows, int64_t count, double scale, float*, int64_t) {
  for (int64_t r = 0; r < count; ++r) softmax_row(rows[r], scale);
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
Row<T, M> row_of(const MaskedSoftmaxParams& p, int64_t i) {
  int64_t length = p.keys;
  if (p.causal) {
    const int64_t visible = i % p.queries + p.causal_offset + 1;
    length = visible < 0 ? 0 : (visible < p.keys ? visible : p.keys);
  }
  const T* input = static_cast<const T*>(p.input) + i * p.keys;
  Row<T, M> row{input, static_cast<T*>(p.output) + i * p.keys, nullptr, 0, length};
  if (p.mask) {
    row.mask = static_cast<const M*>(p.mask) + mask_offset(p, i);
    row.mask_stride = p.mask_strides[p.outer_dims];
  }
  return row;
}

template <class T, class M>
void forward_rows(const MaskedSoftmaxParams& p, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin, count; i < end; i += count) {
    count = rows_at_once(p.keys, end - i);
    Row<T, M> rows[group_rows];
    for (int64_t r = 0; r < count; ++r) rows[r] = row_of<T, M>(p, i + r);
    softmax_rows(rows, count, p.scale, scratch, p.keys);
    for (int64_t r = 0; r < count; ++r) fill_zero(rows[r].output, rows[r].length, p.keys);
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
    case MaskKind::additive:
      return forward_rows<T, T>(p, begin, end, scratch);
  }
}

template <class Call>
TRANSFUSE_INLINE void with_type(DType dtype, Call call) {
  switch (dtype) {
    case DType::f32:
      return call(float{});
    case DType::bf16:
      return call(bf16{});
    case DType::f16:
      return call(f16{});
    case DType::f64:
      return call(double{});
  }
}

void forward(const MaskedSoftmaxParams& p, int64_t begin, int64_t end, float* scratch) {
  with_type(p.dtype, [&](auto type) { forward_type<decltype(type)>(p, begin, end, scratch); });
}

// The gradient of the scores is y * (dy - mean), mean = sum(dy * y). A weight of 0 takes and gives none, whatever its dy:
// an excluded key's gradient is 0 even where dy is not finite or the row is NaN.
template <class T>
struct GradRow {
  const T* dy;
  const T* y;
  int64_t keys;
};

// dy * y of the keys [i, i + 16) below end; a weight of 0 is skipped where asked, so that an infinite dy beside it
// does no harm.
template <bool skip_zero, class T>
TRANSFUSE_INLINE VecOf<T> product(const GradRow<T>& row, int64_t i, int64_t end) {
  using V = VecOf<T>;
  const int64_t n = end - i < lanes ? end - i : lanes;
  if (n <= 0) return splat<V>(0.0);
  const V weight = load_as<V>(row.y + i, n), incoming = load_as<V>(row.dy + i, n);
  if constexpr (!skip_zero) return weight * incoming;
  return select(weight == splat<V>(0.0), splat<V>(0.0), weight * incoming);
}

// Four products of sixteen keys are added as they are, those sums in double; by key number alone, whatever the row's
// length.
template <bool skip_zero, class T>
TRANSFUSE_INLINE double sum_of_products(const GradRow<T>& row) {
  constexpr int64_t step = 4 * lanes;
  wide sum = set1w(0.0);
  const auto add_four = [&](int64_t i, int64_t end) __attribute__((always_inline)) {
    const VecOf<T> four = (product<skip_zero>(row, i, end) + product<skip_zero>(row, i + lanes, end)) +
                          (product<skip_zero>(row, i + 2 * lanes, end) + product<skip_zero>(row, i + 3 * lanes, end));
    sum = sum + in_double(four);
  };
  int64_t i = 0;
  for (; i + step <= row.keys; i += step) add_four(i, i + step);
  if (i < row.keys) add_four(i, row.keys);
  return reduce_add(sum);
}

// The same of bfloat16, whose products with neighbours go in pairs: in float over four pairs of sixteen.
TRANSFUSE_INLINE f32 pair_products(f32 sum, const bf16* y, const bf16* dy) {
  const i32 weights = load_pairs(y), incoming = load_pairs(dy);
  return fma(even_of(weights), even_of(incoming), fma(odd_of(weights), odd_of(incoming), sum));
}
TRANSFUSE_INLINE double sum_of_all_products(const GradRow<bf16>& row) {
  constexpr int64_t step = 2 * lanes, block = 4 * step;
  wide sum = set1w(0.0);
  int64_t i = 0;
  for (; i + block <= row.keys; i += block) {
    f32 part = zero();
    for (int64_t j = i; j < i + block; j += step) part = pair_products(part, row.y + j, row.dy + j);
    sum = sum + widen(part);
  }
  if (i < row.keys) {
    f32 part = zero();
    for (; i + step <= row.keys; i += step) part = pair_products(part, row.y + i, row.dy + i);
    if (i < row.keys) {
      bf16 y[step] = {}, dy[step] = {};
      __builtin_memcpy(y, row.y + i, (row.keys - i) * sizeof *y);
      __builtin_memcpy(dy, row.dy + i, (row.keys - i) * sizeof *dy);
      part = pair_products(part, y, dy);
    }
    sum = sum + widen(part);
  }
  return reduce_add(sum);
}

template <class T>
TRANSFUSE_INLINE double sum_of_all_products(const GradRow<T>& row) {
  return sum_of_products<false>(row);
}

// Where the sum of all products is no larger than this, every product is finite and so is every dy - mean: a weight of 0
// gives 0 by itself.
constexpr double usual_mean = 0x1p100;
TRANSFUSE_INLINE bool is_usual(double sum) { return __builtin_fabs(sum) <= usual_mean; }

template <class T>
[[gnu::noinline]] double finite_mean(const GradRow<T>& row, double sum) {
  return __builtin_fabs(sum) < __builtin_inf() ? sum : sum_of_products<true>(row);
}

template <bool skip_zero, class T>
TRANSFUSE_INLINE VecOf<T> score_gradient(const GradRow<T>& row, int64_t i, int64_t n, const Split<RealOf<T>>& mean) {
  using V = VecOf<T>;
  const V weight = load_as<V>(row.y + i, n);
  V centred = load_as<V>(row.dy + i, n) - mean.hi;
  if constexpr (sizeof(T) > 2) centred = centred - mean.lo;
  if constexpr (!skip_zero) return weight * centred;
  return select(weight == splat<V>(0.0), splat<V>(0.0), weight * centred);
}

template <bool skip_zero, class T>
TRANSFUSE_INLINE void store_gradient(const GradRow<T>& row, double row_mean, double scale, T* grad_input) {
  const Split<RealOf<T>> mean(row_mean);
  const VecOf<T> factor = splat<VecOf<T>>(scale);
  int64_t begin = 0;
  if constexpr (std::is_same_v<T, bf16> && !skip_zero) {
    for (; begin + 2 * lanes <= row.keys; begin += 2 * lanes) {
      const i32 weight = load_pairs(row.y + begin), incoming = load_pairs(row.dy + begin);
      const f32 even = (even_of(weight) * (even_of(incoming) - mean.hi)) * factor;
      const f32 odd = (odd_of(weight) * (odd_of(incoming) - mean.hi)) * factor;
      store_pairs(grad_input + begin, round_to_exact_pairs(even, odd));
    }
  }
  for_each_vec(row.keys - begin, [&](int64_t at, int64_t n) __attribute__((always_inline)) {
    store_as(grad_input + begin + at, score_gradient<skip_zero>(row, begin + at, n, mean) * factor, n);
  });
}

template <class T>
[[gnu::noinline]] void store_unusual_gradient(const GradRow<T>& row, double sum, double scale, T* grad_input) {
  store_gradient<true>(row, finite_mean(row, sum), scale, grad_input);
}

template <class T>
GradRow<T> grad_row(const MaskedSoftmaxGradParams& p, int64_t row) {
  return {static_cast<const T*>(p.grad_output) + row * p.keys, static_cast<const T*>(p.output) + row * p.keys, p.keys};
}

template <class T>
void backward_rows(const MaskedSoftmaxGradParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin, count; i < end; i += count) {
    count = rows_at_once(p.keys, end - i);
    double sums[group_rows];
    for (int64_t r = 0; r < count; ++r) sums[r] = sum_of_all_products(grad_row<T>(p, i + r));
    for (int64_t r = 0; r < count; ++r) {
      const GradRow<T> row = grad_row<T>(p, i + r);
      T* grad_input = static_cast<T*>(p.grad_input) + (i + r) * p.keys;
      if (is_usual(sums[r]))
        store_gradient<false>(row, sums[r], p.scale, grad_input);
      else
        store_unusual_gradient(row, sums[r], p.scale, grad_input);
    }
  }
}

template <class T>
void add_row_gradient(const MaskedSoftmaxGradParams& p, int64_t r, double* sums) {
  const GradRow<T> row = grad_row<T>(p, r);
  const Split<RealOf<T>> mean(finite_mean(row, sum_of_all_products(row)));
  for_each_vec(p.keys, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    alignas(64) double gained[lanes];
    store_wide(gained, in_double(score_gradient<true>(row, i, n, mean)));
    for (int64_t j = 0; j < n; ++j) sums[i + j] += gained[j];
  });
}

void backward(const MaskedSoftmaxGradParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) { backward_rows<decltype(type)>(p, begin, end); });
}

void add_score_gradient(const MaskedSoftmaxGradParams& p, int64_t row, double* sums) {
  with_type(p.dtype, [&](auto type) { add_row_gradient<decltype(type)>(p, row, sums); });
}

}  // namespace

extern const MaskedSoftmaxKernels masked_softmax_kernels = {forward, backward, add_score_gradient};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
