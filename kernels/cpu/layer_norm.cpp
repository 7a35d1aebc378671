// See layer_norm.h for the formula and the policy. Compiled once per ISA level.
#include "cpu/layer_norm.h"

#include "cpu/vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

namespace {

// Rows that go through the last pass together, so that a vector of weights is widened to double once for all of them.
constexpr int64_t group_rows = 4;

struct Statistics {
  double mean, rstd;
};

// Sixteen values in double.
struct wide {
  f64 lo, hi;
};
TRANSFUSE_INLINE wide widen(f32 x) { return {low(x), high(x)}; }
template <class T>
TRANSFUSE_INLINE wide load_wide(const T* p, int64_t n) { return widen(load_n(p, n)); }
TRANSFUSE_INLINE wide broadcast(double x) { return {set1d(x), set1d(x)}; }
TRANSFUSE_INLINE wide operator+(wide x, wide y) { return {x.lo + y.lo, x.hi + y.hi}; }
TRANSFUSE_INLINE wide operator-(wide x, wide y) { return {x.lo - y.lo, x.hi - y.hi}; }
TRANSFUSE_INLINE wide operator*(wide x, wide y) { return {x.lo * y.lo, x.hi * y.hi}; }
TRANSFUSE_INLINE wide fma(wide x, wide y, wide z) { return {fma(x.lo, y.lo, z.lo), fma(x.hi, y.hi, z.hi)}; }
TRANSFUSE_INLINE wide fnma(wide x, wide y, wide z) { return {fnma(x.lo, y.lo, z.lo), fnma(x.hi, y.hi, z.hi)}; }
TRANSFUSE_INLINE wide load_wide(const double* p) { return {load(p), load(p + lanes64)}; }
TRANSFUSE_INLINE void store_wide(double* p, wide x) {
  store(p, x.lo);
  store(p + lanes64, x.hi);
}
template <class T>
TRANSFUSE_INLINE void store_rounded(T* p, wide x, int64_t n) { store_n(p, narrow(x.lo, x.hi), n); }
TRANSFUSE_INLINE double reduce_add(wide x) { return reduce_add(x.lo + x.hi); }

// Mean and 1/sqrt(variance + eps) of a row, in one pass over x - x[0].
//
// An element of the row is a shift that cannot fail: (x[0] - mean)^2 <= cols * variance, so the subtraction in
// `variance` loses at most a factor cols + 1 out of double's 2^53. A constant row has variance exactly 0 and mean
// exactly x[0]; inf - inf turns a row with an infinity into NaN.
template <class T>
TRANSFUSE_INLINE Statistics row_statistics(const T* x, int64_t cols, double eps) {
  if (cols == 0) return {0, __builtin_nan("")};  // as torch
  const float first = to_float(x[0]);
  const wide shift = broadcast(first);
  wide sum = broadcast(0), squares = broadcast(0);
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const f32 values = n == lanes ? load(x + i) : select(first_n(n), load(x + i, n), set1(first));
    const wide shifted = widen(values) - shift;
    sum = sum + shifted;
    squares = fma(shifted, shifted, squares);
  });
  const double total = reduce_add(sum), offset = total / cols;
  const double variance = (reduce_add(squares) - total * offset) / cols;
  return {first + offset, 1 / __builtin_sqrt(variance + eps)};
}

template <class T>
TRANSFUSE_INLINE void add_rows(const T* x, const T* y, T* sum, int64_t size) {
  for_each_vec(size, [&](int64_t i, int64_t n) __attribute__((always_inline)) { store_n(sum + i, load_n(x + i, n) + load_n(y + i, n), n); });
}

// `count` consecutive rows, their statistics known.
template <int64_t count, class T, class W>
TRANSFUSE_INLINE void normalize_rows(const T* x, const Statistics* rows, const W* weight, const W* bias, T* output, int64_t cols) {
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const wide scale = weight ? load_wide(weight + i, n) : broadcast(1);
    const wide offset = bias ? load_wide(bias + i, n) : broadcast(0);
    for (int64_t r = 0; r < count; ++r) {
      const wide normalized = (load_wide(x + r * cols + i, n) - broadcast(rows[r].mean)) * broadcast(rows[r].rstd);
      store_rounded(output + r * cols + i, fma(normalized, scale, offset), n);
    }
  });
}

template <class T, class W>
void forward_rows(const LayerNormForwardParams& p, int64_t begin, int64_t end) {
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
      rows[r] = row_statistics(x + r * cols, cols, p.eps);
      p.mean[row + r] = static_cast<float>(rows[r].mean);
      p.rstd[row + r] = static_cast<float>(rows[r].rstd);
    }
    T* output = static_cast<T*>(p.output) + row * cols;
    if (count == group_rows)
      normalize_rows<group_rows>(x, rows, weight, bias, output, cols);
    else
      for (int64_t r = 0; r < count; ++r) normalize_rows<1>(x + r * cols, rows + r, weight, bias, output + r * cols, cols);
  }
}

// What the backward of one row needs besides the row: with g = grad_output * weight and xhat the normalised row,
//   grad_input = rstd * (g - mean(g) - xhat * mean(g * xhat))
struct Projections {
  Statistics row;
  double g;       // rstd * mean(g)
  double g_xhat;  // rstd * mean(g * xhat)
};

// The statistics are taken anew from the input: the saved ones are float32, and a mean rounded to float32 is off by a
// tenth of a standard deviation at mean/std 1e6.
template <class T, class W>
TRANSFUSE_INLINE Projections row_projections(const T* x, const T* grad_output, const W* weight, int64_t cols, double eps) {
  const Statistics row = row_statistics(x, cols, eps);
  const wide mean = broadcast(row.mean);
  wide sum_g = broadcast(0), sum_g_centered = broadcast(0);
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const wide grad = load_wide(grad_output + i, n);  // 0 past the end of the row: those lanes add nothing
    const wide g = weight ? grad * load_wide(weight + i, n) : grad;
    sum_g = sum_g + g;
    sum_g_centered = fma(g, load_wide(x + i, n) - mean, sum_g_centered);
  });
  return {row, row.rstd * (reduce_add(sum_g) / cols), row.rstd * (row.rstd * (reduce_add(sum_g_centered) / cols))};
}

template <int64_t count, class T, class W>
TRANSFUSE_INLINE void differentiate_rows(const LayerNormBackwardParams& p, int64_t row, const Projections* rows, double* weight_sums,
                                         double* bias_sums) {
  const int64_t cols = p.cols;
  const T* x = static_cast<const T*>(p.input) + row * cols;
  const T* grad_output = static_cast<const T*>(p.grad_output) + row * cols;
  const T* grad_sum = p.grad_sum ? static_cast<const T*>(p.grad_sum) + row * cols : nullptr;
  T* grad_input = p.grad_input ? static_cast<T*>(p.grad_input) + row * cols : nullptr;
  const W* weight = static_cast<const W*>(p.weight);
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const wide scale = weight ? load_wide(weight + i, n) : broadcast(1);
    wide weight_sum = weight_sums ? load_wide(weight_sums + i) : broadcast(0);
    wide bias_sum = bias_sums ? load_wide(bias_sums + i) : broadcast(0);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = r * cols + i;
      const wide rstd = broadcast(rows[r].row.rstd);
      const wide xhat = (load_wide(x + at, n) - broadcast(rows[r].row.mean)) * rstd;
      const wide grad = load_wide(grad_output + at, n);
      weight_sum = fma(grad, xhat, weight_sum);
      bias_sum = bias_sum + grad;
      if (!grad_input) continue;
      const wide past_norm = grad_sum ? load_wide(grad_sum + at, n) : broadcast(0);
      const wide through_statistics = fma(xhat, broadcast(rows[r].g_xhat), broadcast(rows[r].g));
      store_rounded(grad_input + at, fma(grad * scale, rstd, past_norm) - through_statistics, n);
    }
    if (weight_sums) store_wide(weight_sums + i, weight_sum);
    if (bias_sums) store_wide(bias_sums + i, bias_sum);
  });
}

template <class T, class W>
void backward_chunks(const LayerNormBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t cols = p.cols, padded = layer_norm_padded_cols(cols);
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
      Projections rows[group_rows];
      for (int64_t r = 0; r < count; ++r)
        rows[r] = row_projections(static_cast<const T*>(p.input) + (row + r) * cols, static_cast<const T*>(p.grad_output) + (row + r) * cols,
                                  static_cast<const W*>(p.weight), cols, p.eps);
      if (count == group_rows)
        differentiate_rows<group_rows, T, W>(p, row, rows, weight_sums, bias_sums);
      else
        for (int64_t r = 0; r < count; ++r) differentiate_rows<1, T, W>(p, row + r, rows + r, weight_sums, bias_sums);
    }
  }
}

template <class W>
TRANSFUSE_INLINE void add_lines(const double* lines, void* total, const LayerNormBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t padded = layer_norm_padded_cols(p.cols);
  for (int64_t i = begin * lanes; i < p.cols && i < end * lanes; i += lanes) {
    wide sum = broadcast(0);
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum = sum + load_wide(lines + chunk * padded + i);
    store_rounded(static_cast<W*>(total) + i, sum, p.cols - i < lanes ? p.cols - i : lanes);
  }
}

template <class W>
void reduce_blocks(const LayerNormBackwardParams& p, int64_t begin, int64_t end) {
  if (p.weight_sums) add_lines<W>(p.weight_sums, p.grad_weight, p, begin, end);
  if (p.bias_sums) add_lines<W>(p.bias_sums, p.grad_bias, p, begin, end);
}

void forward(const LayerNormForwardParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::f32)
    forward_rows<float, float>(p, begin, end);
  else if (p.param_dtype == DType::f32)
    forward_rows<bf16, float>(p, begin, end);
  else
    forward_rows<bf16, bf16>(p, begin, end);
}

void backward(const LayerNormBackwardParams& p, int64_t begin, int64_t end) {
  if (p.dtype == DType::f32)
    backward_chunks<float, float>(p, begin, end);
  else if (p.param_dtype == DType::f32)
    backward_chunks<bf16, float>(p, begin, end);
  else
    backward_chunks<bf16, bf16>(p, begin, end);
}

void reduce(const LayerNormBackwardParams& p, int64_t begin, int64_t end) {
  if (p.param_dtype == DType::f32)
    reduce_blocks<float>(p, begin, end);
  else
    reduce_blocks<bf16>(p, begin, end);
}

}  // namespace

static_assert(layer_norm_block == lanes, "reduce works in whole vectors");

extern const LayerNormKernels layer_norm_kernels = {forward, backward, reduce};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
