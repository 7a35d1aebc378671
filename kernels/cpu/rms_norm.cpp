// See rms_norm.h for the policy, norm_rows.h for the rows. Compiled once per ISA level.
#include "cpu/rms_norm.h"

#include "cpu/norm_rows.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

namespace {

struct RMSNorm {
  static constexpr bool centered = false;

  template <class T>
  [[gnu::noinline]] static Statistics statistics(const T* x, int64_t cols, double eps) {
    wide squares = set1w(0);
    for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const wide values = load_wide(x + i, n);  // 0 past the end of the row
      squares = fma(values, values, squares);
    });
    return {0, 1 / __builtin_sqrt(reduce_add(squares) / cols + eps)};
  }
  TRANSFUSE_INLINE static Statistics statistics(const double* x, int64_t cols, double eps) {
    const double scale = unit_scale(x, cols, eps);
    const double square = row_sum(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                            const wide value = load_wide(x + i, n) * set1w(scale);
                            return value * value;
                          }) / cols;
    const Pair<double> rstd = scaled_rstd(square, eps, scale);
    return {0, rstd.hi, 0, rstd.lo, scale};
  }
};

}  // namespace

extern const NormKernels rms_norm_kernels = norm_kernels<RMSNorm>();

}  // namespace transfuse::cpu::TRANSFUSE_ISA
