// See layer_norm.h for the policy, norm_rows.h for the rows. Compiled once per ISA level.
#include "cpu/layer_norm.h"

#include "cpu/norm_rows.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

namespace {

struct LayerNorm {
  static constexpr bool centered = true;

  // Mean and 1/sqrt(variance + eps) of a row, in one pass over x - x[0].
  //
  // An element of the row is a shift that cannot fail: (x[0] - mean)^2 <= cols * variance, so the subtraction in
  // `variance` loses at most a factor cols + 1 out of double's 2^53. A constant row has variance exactly 0 and mean
  // exactly x[0]; inf - inf turns a row with an infinity into NaN.
  template <class T>
  [[gnu::noinline]] static Statistics statistics(const T* x, int64_t cols, double eps) {
    if (cols == 0) return {0, __builtin_nan("")};  // as torch
    const float first = to_float(x[0]);
    const wide shift = set1w(first);
    wide sum = set1w(0), squares = set1w(0);
    for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const wide values = n == lanes ? load_wide(x + i, n) : widen(select(first_n(n), load(x + i, n), set1(first)));
      const wide shifted = values - shift;
      sum = sum + shifted;
      squares = fma(shifted, shifted, squares);
    });
    const double total = reduce_add(sum), offset = total / cols;
    const double variance = (reduce_add(squares) - total * offset) / cols;
    return {first + offset, 1 / __builtin_sqrt(variance + eps)};
  }

  // float64 has no wider type to lean on: the mean is a sum of two doubles, found over x - x[0] and corrected by the
  // mean of the deviations from it, and the variance is that of the deviations.
  TRANSFUSE_INLINE static Statistics statistics(const double* x, int64_t cols, double eps) {
    if (cols == 0) return {0, __builtin_nan("")};
    const double scale = unit_scale(x, cols, eps), first = x[0] * scale;
    const auto value = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      return load_wide(x + i, n) * set1w(scale);
    };
    const double offset = row_sum(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                            return value(i, n) - set1w(first);
                          }) / cols;
    const Pair<double> mean = two_sum(first, offset);
    const auto deviation = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      return (value(i, n) - set1w(mean.hi)) - set1w(mean.lo);
    };
    const double correction = row_sum(cols, deviation) / cols;
    const double square = row_sum(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                            const wide d = deviation(i, n);
                            return d * d;
                          }) / cols;
    const Pair<double> rstd = scaled_rstd(square - correction * correction, eps, scale);
    return {mean.hi, rstd.hi, mean.lo + correction, rstd.lo, scale};
  }
};

}  // namespace

extern const NormKernels layer_norm_kernels = norm_kernels<LayerNorm>();

}  // namespace transfuse::cpu::TRANSFUSE_ISA
