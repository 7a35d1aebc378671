// The rows of LayerNorm and RMSNorm, forward and backward, for a Norm (layer_norm.cpp, rms_norm.cpp) that says
//
//   centered                          whether it has a mean, and with it a bias
//   statistics(x, cols, eps)          a row's Statistics
//
// Policy: the float32 forward stays in double to its end and rounds once; where four roundings in float do no harm, in
// the bfloat16 forward and in the backward, the row is normalised in float against a mean of two floats. Rows go in
// pairs that share the loads of the weights, and a pair is still in L1 when its last pass starts.
#pragma once

#include "cpu/norm.h"
#include "cpu/vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

namespace {

// Rows that go through the last pass together, so that a vector of weights is loaded and widened once for both. More
// rows gain nothing measurable and leave L1 at 4096 columns.
constexpr int64_t group_rows = 2;
static_assert(group_rows == 2, "the last group is a pair or a single row");
static_assert(norm_block == lanes, "reduce works in whole vectors");

struct Statistics {
  double mean, rstd;
};

// Sixteen values in double.
struct wide {
  f64 lo, hi;
};
TRANSFUSE_INLINE wide widen(f32 x) { return {low(x), high(x)}; }
template <class T>
TRANSFUSE_INLINE wide load_wide(const T* p, int64_t n) {
  return n == lanes ? wide{load64(p), load64(p + lanes64)} : widen(load(p, n));
}
TRANSFUSE_INLINE wide broadcast(double x) { return {set1d(x), set1d(x)}; }
TRANSFUSE_INLINE wide operator+(wide x, wide y) { return {x.lo + y.lo, x.hi + y.hi}; }
TRANSFUSE_INLINE wide operator-(wide x, wide y) { return {x.lo - y.lo, x.hi - y.hi}; }
TRANSFUSE_INLINE wide operator*(wide x, wide y) { return {x.lo * y.lo, x.hi * y.hi}; }
TRANSFUSE_INLINE wide fma(wide x, wide y, wide z) { return {fma(x.lo, y.lo, z.lo), fma(x.hi, y.hi, z.hi)}; }
TRANSFUSE_INLINE wide load_wide(const double* p) { return {load(p), load(p + lanes64)}; }
TRANSFUSE_INLINE void store_wide(double* p, wide x) {
  store(p, x.lo);
  store(p + lanes64, x.hi);
}
TRANSFUSE_INLINE void store_rounded(bf16* p, wide x, int64_t n) { store_n(p, narrow(x.lo, x.hi), n); }
TRANSFUSE_INLINE void store_rounded(float* p, wide x, int64_t n) {
  if (n < lanes) return store(p, narrow(x.lo, x.hi), n);
  store64(p, x.lo);
  store64(p + lanes64, x.hi);
}
TRANSFUSE_INLINE double reduce_add(wide x) { return reduce_add(x.lo + x.hi); }

template <class T>
TRANSFUSE_INLINE void add_rows(const T* x, const T* y, T* sum, int64_t size) {
  for_each_vec(size, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    store_n(sum + i, load_n(x + i, n) + load_n(y + i, n), n);
  });
}

// The largest power of two <= x, for a normal x > 0.
TRANSFUSE_INLINE double power_of_two_below(double x) {
  uint64_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  u &= uint64_t{0x7FF} << 52;
  __builtin_memcpy(&x, &u, sizeof u);
  return x;
}
TRANSFUSE_INLINE double smaller(double x, double y) { return x < y ? x : y; }

// A row's normalisation in float, good to 1.5 ULP at every size of x. The row is first scaled by a power of two near
// rstd, exactly, so that neither x = 1e37 nor rstd = 1e37 leaves float's range; the mean is a sum of two floats, and x
// minus the first of them is exact wherever the mean is large against the deviation.
template <bool centered>
struct FloatRow {
  float scale;      // power of two, rstd = scale * rest
  float mean;       // scale * the row's mean, rounded
  float rest;
  float remainder;  // rest * (what `mean` was rounded by)

  FloatRow() = default;
  TRANSFUSE_INLINE explicit FloatRow(const Statistics& row) {
    constexpr double smallest = 0x1p-126, largest = 0x1p126;
    double power = smaller(power_of_two_below(row.rstd), largest);
    // A constant row may have a mean * rstd beyond float's range.
    if (centered) power = smaller(power, power_of_two_below(largest / __builtin_fabs(row.mean)));
    power = power < smallest ? smallest : power;
    scale = static_cast<float>(power);
    mean = static_cast<float>(row.mean * power);
    rest = static_cast<float>(row.rstd / power);
    remainder = static_cast<float>((mean - row.mean * power) * (row.rstd / power));
  }
  TRANSFUSE_INLINE f32 normalize(f32 x) const {
    if constexpr (centered) return fma(fms(x, set1(scale), set1(mean)), set1(rest), set1(remainder));
    return x * set1(scale) * set1(rest);
  }
};

// `count` consecutive rows, their statistics known: float32 in double, so that the only rounding is the result's ...
template <class Norm, int64_t count, class W>
TRANSFUSE_INLINE void normalize_rows(const float* x, const Statistics* rows, const W* weight, const W* bias,
                                     float* output, int64_t cols) {
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const wide scale = weight ? load_wide(weight + i, n) : broadcast(1);
    const wide offset = bias ? load_wide(bias + i, n) : broadcast(0);
    for (int64_t r = 0; r < count; ++r) {
      const wide values = load_wide(x + r * cols + i, n);
      if constexpr (Norm::centered) {
        const wide normalized = (values - broadcast(rows[r].mean)) * broadcast(rows[r].rstd);
        store_rounded(output + r * cols + i, fma(normalized, scale, offset), n);
      } else {
        store_rounded(output + r * cols + i, values * broadcast(rows[r].rstd) * scale, n);
      }
    }
  });
}

// ... and bfloat16 in float, whose sixteen more bits are enough.
template <class Norm, int64_t count, class W>
TRANSFUSE_INLINE void normalize_rows(const bf16* x, const Statistics* statistics, const W* weight, const W* bias,
                                     bf16* output, int64_t cols) {
  FloatRow<Norm::centered> rows[count];
  for (int64_t r = 0; r < count; ++r) rows[r] = FloatRow<Norm::centered>(statistics[r]);
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const f32 scale = weight ? load_n(weight + i, n) : set1(1);
    const f32 offset = bias ? load_n(bias + i, n) : zero();
    for (int64_t r = 0; r < count; ++r) {
      const f32 normalized = rows[r].normalize(load_n(x + r * cols + i, n));
      store_n(output + r * cols + i, Norm::centered ? fma(normalized, scale, offset) : normalized * scale, n);
    }
  });
}

template <class Norm, class T, class W>
void forward_rows(const NormForwardParams& p, int64_t begin, int64_t end) {
  const int64_t cols = p.cols;
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);
  for (int64_t row = begin; row < end; row += group_rows) {
    const int64_t count = end - row < group_rows ? end - row : group_rows;
    const T* x = static_cast<const T*>(p.input) + row * cols;
    if (p.residual) {
      T* sum = static_cast<T*>(p.sum) + row * cols;
      add_rows(x, static_cast<const T*>(p.residual) + row * cols, sum, count * cols);
      x = sum;
    }
    Statistics rows[group_rows];
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = Norm::statistics(x + r * cols, cols, p.eps);
      if (Norm::centered) p.mean[row + r] = static_cast<float>(rows[r].mean);
      p.rstd[row + r] = static_cast<float>(rows[r].rstd);
    }
    T* output = static_cast<T*>(p.output) + row * cols;
    if (count == group_rows)
      normalize_rows<Norm, group_rows>(x, rows, weight, bias, output, cols);
    else
      normalize_rows<Norm, 1>(x, rows, weight, bias, output, cols);
  }
}

// What the backward of one row needs besides the row. With g = grad_output * weight and xhat the normalised row,
//   grad_input = rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g) where the norm is not centered
template <bool centered>
struct Projections {
  FloatRow<centered> row;
  float mean_g, mean_g_xhat;
};

// The statistics are taken anew from the input: the saved ones are float32, and a mean rounded to float32 is off by a
// tenth of a standard deviation at mean/std 1e6. The two means here are sums of float products, in float over a block
// of columns (their errors are divided by cols) and in double over the blocks.
template <class Norm, class T, class W>
TRANSFUSE_INLINE Projections<Norm::centered> project_row(const T* x, const T* grad_output, const W* weight,
                                                         int64_t cols, double eps) {
  constexpr int64_t block_cols = 32 * lanes;
  const FloatRow<Norm::centered> row(Norm::statistics(x, cols, eps));
  double mean_g = 0, mean_g_xhat = 0;
  for (int64_t block = 0; block < cols; block += block_cols) {
    const int64_t size = cols - block < block_cols ? cols - block : block_cols;
    f32 sum_g = zero(), sum_g_xhat = zero();
    for_each_vec(size, [&](int64_t offset, int64_t n) __attribute__((always_inline)) {
      const int64_t i = block + offset;
      const f32 grad = load_n(grad_output + i, n);  // 0 past the end of the row: those lanes add nothing
      const f32 g = weight ? grad * load_n(weight + i, n) : grad;
      if (Norm::centered) sum_g = sum_g + g;
      sum_g_xhat = fma(g, row.normalize(load_n(x + i, n)), sum_g_xhat);
    });
    mean_g += reduce_add(widen(sum_g));
    mean_g_xhat += reduce_add(widen(sum_g_xhat));
  }
  return {row, static_cast<float>(mean_g / cols), static_cast<float>(mean_g_xhat / cols)};
}

template <class Norm, int64_t count, class T, class W>
TRANSFUSE_INLINE void differentiate_rows(const NormBackwardParams& p, int64_t row,
                                         const Projections<Norm::centered>* rows, double* weight_sums,
                                         double* bias_sums) {
  const int64_t cols = p.cols;
  const T* x = static_cast<const T*>(p.input) + row * cols;
  const T* grad_output = static_cast<const T*>(p.grad_output) + row * cols;
  const T* grad_sum = p.grad_sum ? static_cast<const T*>(p.grad_sum) + row * cols : nullptr;
  T* grad_input = p.grad_input ? static_cast<T*>(p.grad_input) + row * cols : nullptr;
  const W* weight = static_cast<const W*>(p.weight);
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const f32 scale = weight ? load_n(weight + i, n) : set1(1);
    f32 weight_sum = zero(), bias_sum = zero();
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = r * cols + i;
      const f32 xhat = rows[r].row.normalize(load_n(x + at, n));
      const f32 grad = load_n(grad_output + at, n);
      weight_sum = fma(grad, xhat, weight_sum);
      bias_sum = bias_sum + grad;
      if (!grad_input) continue;
      const f32 g = Norm::centered ? grad * scale - set1(rows[r].mean_g) : grad * scale;
      const f32 projected = fnma(xhat, set1(rows[r].mean_g_xhat), g);
      const f32 past_norm = grad_sum ? load_n(grad_sum + at, n) : zero();
      store_n(grad_input + at, fma(projected * set1(rows[r].row.rest), set1(rows[r].row.scale), past_norm), n);
    }
    if (weight_sums) store_wide(weight_sums + i, load_wide(weight_sums + i) + widen(weight_sum));
    if (bias_sums) store_wide(bias_sums + i, load_wide(bias_sums + i) + widen(bias_sum));
  });
}

template <class Norm, class T, class W>
void backward_chunks(const NormBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t cols = p.cols, padded = norm_padded_cols(cols);
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
    for (int64_t row = row_begin; row < row_end; row += group_rows) {
      const int64_t count = row_end - row < group_rows ? row_end - row : group_rows;
      Projections<Norm::centered> rows[group_rows];
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (row + r) * cols;
        rows[r] = project_row<Norm>(input + at, grad_output + at, weight, cols, p.eps);
      }
      if (count == group_rows)
        differentiate_rows<Norm, group_rows, T, W>(p, row, rows, weight_sums, bias_sums);
      else
        differentiate_rows<Norm, 1, T, W>(p, row, rows, weight_sums, bias_sums);
    }
  }
}

template <class W>
TRANSFUSE_INLINE void add_lines(const double* lines, void* total, const NormBackwardParams& p, int64_t begin,
                                int64_t end) {
  const int64_t padded = norm_padded_cols(p.cols);
  for (int64_t i = begin * lanes; i < p.cols && i < end * lanes; i += lanes) {
    wide sum = broadcast(0);
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum = sum + load_wide(lines + chunk * padded + i);
    store_rounded(static_cast<W*>(total) + i, sum, p.cols - i < lanes ? p.cols - i : lanes);
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
  if (dtype == DType::f32) return run(Storage<float, float>{});
  if (param_dtype == DType::f32) return run(Storage<bf16, float>{});
  return run(Storage<bf16, bf16>{});
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
