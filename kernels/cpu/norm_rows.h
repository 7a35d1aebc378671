// The rows of LayerNorm and RMSNorm, forward and backward, for a Norm (layer_norm.cpp, rms_norm.cpp) that says
//
//   centered                       whether it has a mean, and with it a bias
//   statistics(x, cols, eps)       a row's Statistics; of float64 rows in a pass of their own
//
// Policy: statistics are sums in float over deviations from a value of the row, in double where that would not do. The
// float32 forward rounds about once; where four roundings in float do no harm, in the forward of the 16-bit types and in
// the backward, a row is normalised in float against a mean of two floats; a float64 row in double against a mean and an
// rstd of two doubles. Rows go in groups that share the loads of the weights where that pays, and a group is still in L1
// when its last pass starts; no row's bits depend on its group. No residual is taken from an FMA: the baseline level has
// none.
#pragma once

#include <type_traits>

#include "cpu/exact.h"
#include "cpu/norm.h"
#include "cpu/vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

namespace {

// Rows that go through the last pass together, so that a vector of weights is loaded and widened once for all of them. In
// the backward the terms of the weights' gradients, too, are added in float over a group and then once in double; the
// groups follow from the number of rows and columns, and with them the order of these sums.
constexpr int64_t pair_rows = 2;
constexpr int64_t backward_group_rows = 4;
// Rows whose statistics are taken one after the other before the first is normalised: sums of the next row fill the time
// in which the last one's mean and rstd are worked out. They stay in L1.
constexpr int64_t group_rows = 4, group_bytes = 16 << 10;
static_assert(norm_block == lanes, "reduce works in whole vectors");
// From here on what a call reads and writes is far from the core, and order of access counts for more than instructions.
constexpr int64_t far_bytes = int64_t{16} << 20;
constexpr int64_t near_row_bytes = 24 << 10;    // rows of up to this size stay in L1 beside the weights
constexpr int64_t near_weight_bytes = 8 << 10;  // weights of up to this size are in L1 for every row
// Columns whose terms are added in lanes before the lanes are added to the row's sum, in double: rounding errors grow
// with the lengths of both sums instead of their product.
constexpr int64_t sum_block = 32 * lanes;

// Of one row times `scale`, a power of two: 1 but for float64, whose squares could leave double's range and whose mean
// and rstd are sums of two doubles.
struct Statistics {
  double mean = 0, rstd = 0;
  double mean_tail = 0, rstd_tail = 0;
  double scale = 1;
  bool quick = false;  // taken in float: rstd and the deviations are far from the ends of float's range
};

// ---- statistics of float64 rows: what they need beyond double is a sum of two, without an FMA ----

// Sum of term(i, n) over a row. Only the sums in the lanes of a block round as they go.
template <class Term>
TRANSFUSE_INLINE double row_sum(int64_t cols, Term term) {
  Pair<double> sum = {0, 0};
  for (int64_t block = 0; block < cols; block += sum_block) {
    wide block_sum = set1w(0);
    for_each_vec(cols - block < sum_block ? cols - block : sum_block,
                 [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                   const wide value = term(block + i, n);
                   block_sum = block_sum + (n == lanes ? value : select(first_n_wide(n), value, set1w(0)));
                 });
    const Pair<double> longer = two_sum(sum.hi, reduce_add(block_sum));
    sum = {longer.hi, sum.lo + longer.lo};
  }
  return sum.lo == sum.lo ? sum.hi + sum.lo : sum.hi;  // an infinite sum has no remainder
}

// The largest power of two <= x, for a normal x > 0.
TRANSFUSE_INLINE double power_of_two_below(double x) {
  uint64_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  u &= uint64_t{0x7FF} << 52;
  __builtin_memcpy(&x, &u, sizeof u);
  return x;
}
// 1 / x for a power of two whose inverse is normal.
TRANSFUSE_INLINE double inverse_of_power(double x) {
  uint64_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  u = (uint64_t{2046} << 52) - u;
  __builtin_memcpy(&x, &u, sizeof u);
  return x;
}
TRANSFUSE_INLINE double smaller(double x, double y) { return x < y ? x : y; }
TRANSFUSE_INLINE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
TRANSFUSE_INLINE double larger(double x, double y) { return x > y ? x : y; }

// The power of two that brings the larger of sqrt(eps) and the row's largest |x| to between 1 and 2, as far as one
// double can. Neither a NaN nor an infinity shows here: both pass through the sums.
TRANSFUSE_INLINE double unit_scale(const double* x, int64_t cols, double eps) {
  constexpr double smallest = 0x1p-1022, largest = 0x1.fffffffffffffp1023;
  wide size = set1w(larger(__builtin_sqrt(eps), smallest));
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    size = max(abs(load_wide(x + i, n)), size);
  });
  return 1 / power_of_two_below(smaller(reduce_max(size), largest));
}
// 1/sqrt(square + eps) of a row whose `square` was taken at `scale`: the rounded one and a Newton step from it, whose
// residual is exact. eps stays above 0 at any scale, so that a constant row is 0 and not 0/0.
TRANSFUSE_INLINE Pair<double> scaled_rstd(double square, double eps, double scale) {
  constexpr double smallest = 0x1p-900;  // far below the square of any row that is not constant
  const Pair<double> radicand = two_sum(square, eps > 0 ? larger(eps * scale * scale, smallest) : 0.0);
  const double rstd = 1 / __builtin_sqrt(radicand.hi);
  const Pair<double> inverse = two_product(rstd, rstd), one = two_product(radicand.hi, inverse.hi);
  const double residual = ((1 - one.hi) - one.lo) - radicand.hi * inverse.lo - radicand.lo * inverse.hi;
  const double step = rstd * residual / 2;
  return {rstd, step == step ? step : 0};  // no step from 0 or infinity
}

// ---- statistics of the other types: in float where that is exact enough, which is nearly always ----

// What deviations are taken from: the mean of a row's first vector.
template <bool centered>
TRANSFUSE_INLINE float shift_of(f32 first, int64_t cols) {
  return centered ? reduce_add(first) / static_cast<float>(cols < lanes ? cols : lanes) : 0;
}

// Sums of the deviations of a row, in `chains` chains within a block (four have ten terms at most) and in double over
// blocks.
template <bool centered, int64_t chains>
struct DeviationSums {
  f32 sums[chains], squares[chains];
  wide sum = set1w(0), square = set1w(0);

  TRANSFUSE_INLINE void begin_block() {
    for (int64_t c = 0; c < chains; ++c) sums[c] = squares[c] = zero();
  }
  TRANSFUSE_INLINE void add(int64_t chain, f32 deviation) {
    if (centered) sums[chain] = sums[chain] + deviation;
    squares[chain] = fma(deviation, deviation, squares[chain]);
  }
  TRANSFUSE_INLINE static f32 joined(const f32* chain) {
    if constexpr (chains == 2) return chain[0] + chain[1];
    return (chain[0] + chain[1]) + (chain[2] + chain[3]);
  }
  TRANSFUSE_INLINE void end_block() {
    if (centered) sum = sum + widen(joined(sums));
    square = square + widen(joined(squares));
  }
  // False where float is not enough: the shift is farther from the mean than a standard deviation, or the squares leave
  // float's range, or the row is constant or not finite. Deviations are exact wherever the mean is large against them, so
  // that the variance is good to 2^-23.
  TRANSFUSE_INLINE bool finish(float shift, int64_t cols, double eps, Statistics& row) const {
    constexpr double smallest = 0x1p-80, largest = 0x1p100;
    const double mean_square = reduce_add(square) / cols, offset = centered ? reduce_add(sum) / cols : 0;
    const double variance = mean_square - offset * offset;
    if (!(mean_square > smallest && mean_square < largest && offset * offset <= variance && eps < largest)) return false;
    row = {shift + offset, 1 / __builtin_sqrt(variance + eps)};
    row.quick = true;
    return true;
  }
};

// body(chain, i, n) over the vectors of a row that lie in [block, end), in turns over the chains.
template <int64_t chains, class Body>
TRANSFUSE_INLINE void for_each_chained(int64_t block, int64_t end, Body body) {
  int64_t i = block;
  for (; i + chains * lanes <= end; i += chains * lanes)
    for (int64_t c = 0; c < chains; ++c) body(c, i + c * lanes, lanes);
  for (; i + lanes <= end; i += lanes) body(0, i, lanes);
  if (i < end) body(1, i, end - i);
}

// Mean and rstd of a row whose vectors are value(i, n), each asked for once, in one pass; false as finish().
template <bool centered, class Value>
TRANSFUSE_INLINE bool quick_statistics(int64_t cols, double eps, float shift, Value value, Statistics& row) {
  constexpr int64_t chains = 4;
  DeviationSums<centered, chains> sums;
  for (int64_t block = 0; block < cols; block += sum_block) {
    sums.begin_block();
    for_each_chained<chains>(block, smaller(cols, block + sum_block), [&](int64_t chain, int64_t i, int64_t n)
                             __attribute__((always_inline)) {
      const f32 deviation = value(i, n) - set1(shift);
      sums.add(chain, n == lanes ? deviation : select(first_n(n), deviation, zero()));
    });
    sums.end_block();
  }
  return sums.finish(shift, cols, eps, row);
}

template <class Norm, class T>
TRANSFUSE_INLINE Statistics statistics_of(const T* x, int64_t cols, double eps) {
  const auto value = [&](int64_t i, int64_t n) __attribute__((always_inline)) { return load_n(x + i, n); };
  const float shift = shift_of<Norm::centered>(value(0, smaller(cols, lanes)), cols);
  Statistics row;
  return quick_statistics<Norm::centered>(cols, eps, shift, value, row) ? row : Norm::statistics(x, cols, eps);
}
template <class Norm>
TRANSFUSE_INLINE Statistics statistics_of(const double* x, int64_t cols, double eps) {
  return Norm::statistics(x, cols, eps);
}

// ---- one row's normalisation, xhat = (x - mean) * rstd, where rstd = scale * rest and scale is a power of two ----

// float32 in double.
template <bool centered>
struct WideRow {
  using V = wide;
  double mean, rstd;

  TRANSFUSE_INLINE explicit WideRow(const Statistics& row) : mean(row.mean), rstd(row.rstd) {}
  TRANSFUSE_INLINE wide normalize(wide x) const { return (centered ? x - set1w(mean) : x) * set1w(rstd); }
};

// float32 in float with one rounding worth the name, for rows taken quickly. The mean is rounded to a multiple of about
// an eighth of the standard deviation, so coarse that what rounding takes from x - mean is found exactly (whichever of
// the two is larger) and given back with what the roundings of mean and rstd took.
template <bool centered>
struct PreciseRow {
  using V = f32;
  float mean, rest;
  float rest_tail;  // what `rest` was rounded by
  float remainder;  // rest * (what `mean` was rounded by)

  TRANSFUSE_INLINE explicit PreciseRow(const Statistics& row) {
    rest = static_cast<float>(row.rstd);
    rest_tail = static_cast<float>(row.rstd - rest);
    const double multiple = inverse_of_power(power_of_two_below(row.rstd)) * (0x1.8p52 / 8);  // adding it rounds
    mean = static_cast<float>((row.mean + multiple) - multiple);
    remainder = static_cast<float>((mean - row.mean) * row.rstd);
  }
  TRANSFUSE_INLINE f32 normalize(f32 x) const {
    if constexpr (!centered) return fma(x, set1(rest), x * set1(rest_tail));
    const f32 deviation = x - set1(mean), lost = x - (deviation + set1(mean));
    const f32 tail = fma(lost, set1(rest), fma(deviation, set1(rest_tail), set1(remainder)));
    return fma(deviation, set1(rest), tail);
  }
};

// 16-bit types, and float32 in the backward, in float: good to 1.5 ULP at every size of x. The row is first scaled by a
// power of two near rstd, exactly, so that neither x = 1e37 nor rstd = 1e37 leaves float's range; the mean is a sum of
// two floats, and x minus the first of them is exact wherever the mean is large against the deviation.
template <bool centered>
struct FloatRow {
  using Real = float;
  using V = f32;
  float scale;
  float mean;  // scale * the row's mean, rounded
  float rest;
  float remainder;  // rest * (what `mean` was rounded by)

  FloatRow() = default;
  TRANSFUSE_INLINE explicit FloatRow(const Statistics& row) {
    constexpr double smallest = 0x1p-126, largest = 0x1p126;
    double power = smaller(power_of_two_below(row.rstd), largest);
    // A constant row may have a mean * rstd beyond float's range.
    if (centered && __builtin_fabs(row.mean) * power > largest) power = power_of_two_below(largest / __builtin_fabs(row.mean));
    power = power < smallest ? smallest : power;
    const double all_of_mean = row.mean * power, all_of_rest = row.rstd * inverse_of_power(power);
    scale = static_cast<float>(power);
    mean = static_cast<float>(all_of_mean);
    rest = static_cast<float>(all_of_rest);
    remainder = static_cast<float>((mean - all_of_mean) * all_of_rest);
  }
  TRANSFUSE_INLINE f32 deviation(f32 x) const {
    return centered ? fms(x, set1(scale), set1(mean)) : x * set1(scale);
  }
  TRANSFUSE_INLINE f32 normalize(f32 x) const {
    return centered ? fma(deviation(x), set1(rest), set1(remainder)) : deviation(x) * set1(rest);
  }
  // The mean of g * xhat, given those of g * deviation and of g.
  TRANSFUSE_INLINE double from_deviation(double g_deviation, double g) const {
    return centered ? g_deviation * rest + g * remainder : g_deviation * rest;
  }
};

// float64 in double.
template <bool centered>
struct DoubleRow {
  using Real = double;
  using V = wide;
  double scale, mean, rest;
  double rest_tail;  // what `rest` was rounded by
  double remainder;  // rest * (what `mean` was rounded by)

  DoubleRow() = default;
  TRANSFUSE_INLINE explicit DoubleRow(const Statistics& row)
      : scale(row.scale),
        mean(row.mean),
        rest(row.rstd),
        rest_tail(row.rstd_tail),
        remainder(row.mean_tail * row.rstd) {}
  TRANSFUSE_INLINE wide deviation(wide x) const {
    return centered ? x * set1w(scale) - set1w(mean) : x * set1w(scale);
  }
  TRANSFUSE_INLINE wide normalize(wide x) const {
    const wide d = deviation(x), tail = d * set1w(rest_tail);
    return fma(d, set1w(rest), centered ? tail - set1w(remainder) : tail);
  }
  TRANSFUSE_INLINE double from_deviation(double g_deviation, double g) const {
    return g_deviation * rest + (g_deviation * rest_tail - (centered ? g * remainder : 0));
  }
};

// How rows of storage type T are normalised, in the backward and in the forward; there float32 has the two above.
template <class T, bool centered>
using RowOf = std::conditional_t<std::is_same_v<T, double>, DoubleRow<centered>, FloatRow<centered>>;

// ---- forward ----

// `count` consecutive rows, their statistics known.
template <class Norm, class Row, int64_t count, class T, class W>
TRANSFUSE_INLINE void normalize_rows(const T* x, const Statistics* statistics, const W* weight, const W* bias,
                                     T* output, int64_t cols) {
  using V = typename Row::V;
  static_assert(count <= pair_rows);
  const Row rows[pair_rows] = {Row(statistics[0]), Row(statistics[count - 1])};
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const V scale = weight ? load_as<V>(weight + i, n) : splat<V>(1);
    const V offset = bias ? load_as<V>(bias + i, n) : splat<V>(0);
    for (int64_t r = 0; r < count; ++r) {
      const V normalized = rows[r].normalize(load_as<V>(x + r * cols + i, n));
      if (count == 1) __builtin_prefetch(x + cols + i);
      store_as(output + r * cols + i, Norm::centered ? fma(normalized, scale, offset) : normalized * scale, n);
    }
  });
}
template <class Norm, int64_t count, class T, class W>
TRANSFUSE_INLINE void normalize_group(const T* x, const Statistics* statistics, const W* weight, const W* bias,
                                      T* output, int64_t cols) {
  if constexpr (!std::is_same_v<T, float>) {
    normalize_rows<Norm, RowOf<T, Norm::centered>, count>(x, statistics, weight, bias, output, cols);
  } else if (statistics[0].quick && statistics[count - 1].quick) {
    normalize_rows<Norm, PreciseRow<Norm::centered>, count>(x, statistics, weight, bias, output, cols);
  } else if constexpr (count == 1) {
    normalize_rows<Norm, WideRow<Norm::centered>, 1>(x, statistics, weight, bias, output, cols);
  } else {
    for (int64_t r = 0; r < count; ++r)
      normalize_group<Norm, 1>(x + r * cols, statistics + r, weight, bias, output + r * cols, cols);
  }
}

// Statistics of one row where there is a residual, and the row itself: the sum, whose place is x. It may be the place of
// either addend.
template <class Norm, class T>
TRANSFUSE_INLINE Statistics begin_row(const T* input, const T* residual, T* x, int64_t cols, double eps) {
  const auto sum = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    return rounded(load_n(input + i, n) + load_n(residual + i, n), T{});
  };
  const auto stored_sum = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const f32 value = sum(i, n);
    store_n(x + i, value, n);
    return value;
  };
  const float shift = shift_of<Norm::centered>(sum(0, smaller(cols, lanes)), cols);
  Statistics row;
  return quick_statistics<Norm::centered>(cols, eps, shift, stored_sum, row) ? row : Norm::statistics(x, cols, eps);
}
template <class Norm>
TRANSFUSE_INLINE Statistics begin_row(const double* input, const double* residual, double* x, int64_t cols, double eps) {
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    store_wide(x + i, load_wide(input + i, n) + load_wide(residual + i, n), n);
  });
  return Norm::statistics(x, cols, eps);
}

template <class Norm, class T, class W>
[[gnu::noinline]] void forward_rows(const NormForwardParams& p, int64_t begin, int64_t end) {
  const int64_t cols = p.cols;
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);
  // Two rows at a time load weights once and make twice as many streams through memory.
  const bool far = p.residual || 2 * (end - begin) * cols * int64_t{sizeof(T)} >= far_bytes;
  const bool singly = far && cols * int64_t{sizeof(W)} <= near_weight_bytes;
  const int64_t at_once = singly ? 1 : (group_rows * cols * int64_t{sizeof(T)} <= group_bytes ? group_rows : pair_rows);
  for (int64_t row = begin, count; row < end; row += count) {
    count = smaller(end - row, at_once);
    const T* input = static_cast<const T*>(p.input) + row * cols;
    const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * cols : nullptr;
    T* sum = static_cast<T*>(p.sum) + row * cols;
    Statistics rows[group_rows];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = r * cols;
      rows[r] = residual ? begin_row<Norm>(input + at, residual + at, sum + at, cols, p.eps)
                         : statistics_of<Norm>(input + at, cols, p.eps);
    }
    const T* x = residual ? sum : input;
    T* output = static_cast<T*>(p.output) + row * cols;
    int64_t r = 0;
    for (; r + pair_rows <= count; r += pair_rows)
      normalize_group<Norm, pair_rows>(x + r * cols, rows + r, weight, bias, output + r * cols, cols);
    if (r < count) normalize_group<Norm, 1>(x + r * cols, rows + r, weight, bias, output + r * cols, cols);
  }
}

// ---- backward ----

// What the backward of one row needs besides the row. With g = grad_output * weight and xhat the normalised row,
//   grad_input = rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g) where the norm is not centered
template <class Row>
struct Projections {
  Row row;
  typename Row::Real mean_g, mean_g_xhat;
};

// The statistics are taken anew from the input: the saved ones are float32, and a mean rounded to float32 is off by a
// tenth of a standard deviation at mean/std 1e6. The two means here are sums of products in the row's own type, over a
// block of columns (their errors are divided by cols), and in double over the blocks. What is summed in place of
// g * xhat = g * (deviation * rest + remainder) is g * deviation.
template <class Norm, class T, class W>
[[gnu::noinline]] Projections<RowOf<T, Norm::centered>> project_after_statistics(const T* x, const T* grad_output,
                                                                                 const W* weight, int64_t cols,
                                                                                 double eps) {
  using Row = RowOf<T, Norm::centered>;
  using V = typename Row::V;
  using Real = typename Row::Real;
  const Row row(statistics_of<Norm>(x, cols, eps));
  double mean_g = 0, mean_g_deviation = 0;
  for (int64_t block = 0; block < cols; block += sum_block) {
    V sum_g[2] = {splat<V>(0), splat<V>(0)}, sum_g_deviation[2] = {splat<V>(0), splat<V>(0)};
    const auto add = [&](int64_t chain, int64_t i, int64_t n) __attribute__((always_inline)) {
      const V grad = load_as<V>(grad_output + i, n);  // 0 past the end of the row: adds nothing
      const V g = weight ? grad * load_as<V>(weight + i, n) : grad;
      if (Norm::centered) sum_g[chain] = sum_g[chain] + g;
      sum_g_deviation[chain] = fma(g, row.deviation(load_as<V>(x + i, n)), sum_g_deviation[chain]);
    };
    const int64_t end = cols - block < sum_block ? cols : block + sum_block;
    int64_t i = block;
    for (; i + 2 * lanes <= end; i += 2 * lanes) {
      add(0, i, lanes);
      add(1, i + lanes, lanes);
    }
    for (; i < end; i += lanes) add(0, i, end - i < lanes ? end - i : lanes);
    mean_g += reduce_add(widen(sum_g[0] + sum_g[1]));
    mean_g_deviation += reduce_add(widen(sum_g_deviation[0] + sum_g_deviation[1]));
  }
  mean_g /= cols;
  mean_g_deviation /= cols;
  return {row, static_cast<Real>(mean_g), static_cast<Real>(row.from_deviation(mean_g_deviation, mean_g))};
}

// The same in one pass with the statistics, for nearly every row: the deviations are those from the shift, which is within
// a standard deviation of the mean. Left out are rows whose products with g might leave float's range.
template <class Norm, class T, class W>
TRANSFUSE_INLINE auto project_row(const T* x, const T* grad_output, const W* weight, int64_t cols, double eps) {
  if constexpr (std::is_same_v<T, double>) {
    return project_after_statistics<Norm>(x, grad_output, weight, cols, eps);
  } else {
    constexpr int64_t chains = 2;
    constexpr double smallest = 0x1p-50, largest = 0x1p20;
    const float shift = shift_of<Norm::centered>(load_n(x, smaller(cols, lanes)), cols);
    DeviationSums<Norm::centered, chains> sums;
    wide sum_g = set1w(0), sum_g_deviation = set1w(0);
    for (int64_t block = 0; block < cols; block += sum_block) {
      f32 block_g[chains] = {zero(), zero()}, block_g_deviation[chains] = {zero(), zero()};
      sums.begin_block();
      for_each_chained<chains>(block, smaller(cols, block + sum_block), [&](int64_t chain, int64_t i, int64_t n)
                               __attribute__((always_inline)) {
        f32 deviation = load_n(x + i, n) - set1(shift);
        if (n < lanes) deviation = select(first_n(n), deviation, zero());
        sums.add(chain, deviation);
        const f32 grad = load_n(grad_output + i, n), g = weight ? grad * load_n(weight + i, n) : grad;
        if (Norm::centered) block_g[chain] = block_g[chain] + g;
        block_g_deviation[chain] = fma(g, deviation, block_g_deviation[chain]);
      });
      sums.end_block();
      if (Norm::centered) sum_g = sum_g + widen(block_g[0] + block_g[1]);
      sum_g_deviation = sum_g_deviation + widen(block_g_deviation[0] + block_g_deviation[1]);
    }
    Statistics row;
    const bool quick = sums.finish(shift, cols, eps, row);
    const double mean_g = Norm::centered ? reduce_add(sum_g) / cols : 0;
    const double mean_g_xhat = (reduce_add(sum_g_deviation) / cols - (row.mean - shift) * mean_g) * row.rstd;
    if (!(quick && row.rstd > smallest && row.rstd < largest && mean_g_xhat - mean_g_xhat == 0))
      return project_after_statistics<Norm>(x, grad_output, weight, cols, eps);
    using Row = RowOf<T, Norm::centered>;
    return Projections<Row>{Row(row), static_cast<float>(mean_g), static_cast<float>(mean_g_xhat)};
  }
}

template <class Norm, int64_t count, class T, class W, class Row>
TRANSFUSE_INLINE void differentiate_rows(const NormBackwardParams& p, int64_t row, const Projections<Row>* rows,
                                         double* weight_sums, double* bias_sums) {
  using V = typename Row::V;
  const int64_t cols = p.cols;
  const T* x = static_cast<const T*>(p.input) + row * cols;
  const T* grad_output = static_cast<const T*>(p.grad_output) + row * cols;
  const T* grad_sum = p.grad_sum ? static_cast<const T*>(p.grad_sum) + row * cols : nullptr;
  T* grad_input = p.grad_input ? static_cast<T*>(p.grad_input) + row * cols : nullptr;
  const W* weight = static_cast<const W*>(p.weight);
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const V scale = weight ? load_as<V>(weight + i, n) : splat<V>(1);
    V weight_sum = splat<V>(0), bias_sum = splat<V>(0);
#pragma GCC unroll 4
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = r * cols + i;
      const V xhat = rows[r].row.normalize(load_as<V>(x + at, n));
      const V grad = load_as<V>(grad_output + at, n);
      weight_sum = fma(grad, xhat, weight_sum);
      bias_sum = bias_sum + grad;
      __builtin_prefetch(x + count * cols + at);
      __builtin_prefetch(grad_output + count * cols + at);
      if (!grad_input) continue;
      const V product = grad * scale;  // rounded as in the mean, so that a row of one element has the gradient 0
      const V g = Norm::centered ? product - splat<V>(rows[r].mean_g) : product;
      const V projected = fnma(xhat, splat<V>(rows[r].mean_g_xhat), g);
      const V past_norm = grad_sum ? load_as<V>(grad_sum + at, n) : splat<V>(0);
      store_as(grad_input + at, fma(projected * splat<V>(rows[r].row.rest), splat<V>(rows[r].row.scale), past_norm), n);
    }
    if (weight_sums) store_wide(weight_sums + i, load_wide(weight_sums + i) + widen(weight_sum));
    if (bias_sums) store_wide(bias_sums + i, load_wide(bias_sums + i) + widen(bias_sum));
  });
}

template <class Norm, class T, class W>
[[gnu::noinline]] void backward_chunks(const NormBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t cols = p.cols, padded = norm_padded_cols(cols);
  const bool far = 3 * p.rows * cols * int64_t{sizeof(T)} >= far_bytes;  // of all rows: every thread adds alike
  const int64_t pair_bytes = 2 * pair_rows * cols * int64_t{sizeof(T)};
  const bool in_pairs = 2 * pair_bytes > near_row_bytes && pair_bytes <= near_row_bytes;
  const int64_t at_once = far ? 1 : (in_pairs ? pair_rows : backward_group_rows);
  const T* input = static_cast<const T*>(p.input);
  const T* grad_output = static_cast<const T*>(p.grad_output);
  const W* weight = static_cast<const W*>(p.weight);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t row_begin = p.rows * chunk / p.chunks, row_end = p.rows * (chunk + 1) / p.chunks;
    double* weight_sums = p.weight_sums ? p.weight_sums + chunk * padded : nullptr;
    double* bias_sums = p.bias_sums ? p.bias_sums + chunk * padded : nullptr;
    for (int64_t i = 0; i < padded; ++i) {
      if (weight_sums) weight_sums[i] = 0;
      if (bias_sums) bias_sums[i] = 0;
    }
    for (int64_t row = row_begin, count; row < row_end; row += count) {
      count = smaller(row_end - row, at_once);
      Projections<RowOf<T, Norm::centered>> rows[backward_group_rows];
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (row + r) * cols;
        rows[r] = project_row<Norm>(input + at, grad_output + at, weight, cols, p.eps);
      }
      if (count == backward_group_rows) {
        differentiate_rows<Norm, backward_group_rows, T, W>(p, row, rows, weight_sums, bias_sums);
        continue;
      }
      if (in_pairs && count == pair_rows) {
        differentiate_rows<Norm, pair_rows, T, W>(p, row, rows, weight_sums, bias_sums);
        continue;
      }
      for (int64_t r = 0; r < count; ++r)
        differentiate_rows<Norm, 1, T, W>(p, row + r, rows + r, weight_sums, bias_sums);
    }
  }
}

template <class W>
TRANSFUSE_INLINE void add_lines(const double* lines, void* total, const NormBackwardParams& p, int64_t begin,
                                int64_t end) {
  const int64_t padded = norm_padded_cols(p.cols);
  for (int64_t i = begin * lanes; i < p.cols && i < end * lanes; i += lanes) {
    wide sum = set1w(0);
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum = sum + load_wide(lines + chunk * padded + i);
    store_wide(static_cast<W*>(total) + i, sum, p.cols - i < lanes ? p.cols - i : lanes);
  }
}

// ---- from run-time dtypes to types ----

template <class T, class W>
struct Storage {
  using Element = T;
  using Parameter = W;
};
template <class Run>
void with_storage(DType dtype, DType param_dtype, const Run& run) {
  const bool float_parameters = param_dtype == DType::f32;
  switch (dtype) {
    case DType::f32:
      return run(Storage<float, float>{});
    case DType::bf16:
      return float_parameters ? run(Storage<bf16, float>{}) : run(Storage<bf16, bf16>{});
    case DType::f16:
      return float_parameters ? run(Storage<f16, float>{}) : run(Storage<f16, f16>{});
    case DType::f64:
      return run(Storage<double, double>{});
  }
}

template <class Norm>
void forward(const NormForwardParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, p.param_dtype, [&](auto storage) {
    forward_rows<Norm, typename decltype(storage)::Element, typename decltype(storage)::Parameter>(p, begin, end);
  });
}

template <class Norm>
void backward(const NormBackwardParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, p.param_dtype, [&](auto storage) {
    backward_chunks<Norm, typename decltype(storage)::Element, typename decltype(storage)::Parameter>(p, begin, end);
  });
}

void reduce(const NormBackwardParams& p, int64_t begin, int64_t end) {
  with_storage(p.dtype, p.param_dtype, [&](auto storage) {
    using W = typename decltype(storage)::Parameter;
    if (p.weight_sums) add_lines<W>(p.weight_sums, p.grad_weight, p, begin, end);
    if (p.bias_sums) add_lines<W>(p.bias_sums, p.grad_bias, p, begin, end);
  });
}

template <class Norm>
constexpr NormKernels norm_kernels() {
  return {forward<Norm>, backward<Norm>, reduce};
}

}  // namespace

}  // namespace transfuse::cpu::TRANSFUSE_ISA
