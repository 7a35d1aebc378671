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
  TRANSFUSE_INLINE static Statistics statistics(const T* x, int64_t cols, double eps) {
    if (cols == 0) return {0, __builtin_nan("")};  // as torch
    const float first = to_float(x[0]);
    const wide shift = broadcast(first);
    wide sum = broadcast(0), squares = broadcast(0);
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
};

}  // namespace

extern const NormKernels layer_norm_kernels = norm_kernels<LayerNorm>();

}  // namespace transfuse::cpu::TRANSFUSE_ISA
