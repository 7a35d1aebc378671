// See layer_norm.h for the formula and the policy. Compiled once per ISA level.
#include "cpu/layer_norm.h"

#include "cpu/vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {

namespace {

// Rows that go through the last pass together, so that a vector of weights is loaded and widened once for both. More
// rows gain nothing measurable and leave L1 at 4096 columns.
constexpr int64_t group_rows = 2;
static_assert(group_rows == 2, "the last group is a pair or a single row");

struct Statistics {
  double mean, rstd;
};

// Mean and 1/sqrt(variance + eps) of a row, in one pass over x - x[0].
//
// An element of the row is a shift that cannot fail: (x[0] - mean)^2 <= cols * variance, so the subtraction in
// `variance` loses at most a factor cols + 1 out of double's 2^53. A constant row has variance exactly 0 and mean
// exactly x[0]; inf - inf turns a row with an infinity into NaN.
template <class T>
TRANSFUSE_INLINE Statistics row_statistics(const T* x, int64_t cols, double eps) {
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
    power = smaller(power, power_of_two_below(largest / __builtin_fabs(row.mean)));
    power = power < smallest ? smallest : power;
    scale = static_cast<float>(power);
    mean = static_cast<float>(row.mean * power);
    rest = static_cast<float>(row.rstd / power);
    remainder = static_cast<float>((mean - row.mean * power) * (row.rstd / power));
  }
  TRANSFUSE_INLINE f32 normalize(f32 x) const {
    return fma(fms(x, set1(scale), set1(mean)), set1(rest), set1(remainder));
  }
};

// `count` consecutive rows, their statistics known: float32 in double, so that the only rounding is the result's ...
template <int64_t count, class W>
TRANSFUSE_INLINE void normalize_rows(const float* x, const Statistics* rows, const W* weight, const W* bias,
                                     float* output, int64_t cols) {
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const wide scale = weight ? load_wide(weight + i, n) : set1w(1);
    const wide offset = bias ? load_wide(bias + i, n) : set1w(0);
    for (int64_t r = 0; r < count; ++r) {
      const wide normalized = (load_wide(x + r * cols + i, n) - set1w(rows[r].mean)) * set1w(rows[r].rstd);
      store_wide(output + r * cols + i, fma(normalized, scale, offset), n);
    }
  });
}

// ... and bfloat16 in float, whose sixteen more bits are enough.
template <int64_t count, class W>
TRANSFUSE_INLINE void normalize_rows(const bf16* x, const Statistics* statistics, const W* weight, const W* bias,
                                     bf16* output, int64_t cols) {
  FloatRow rows[count];
  for (int64_t r = 0; r < count; ++r) rows[r] = FloatRow(statistics[r]);
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const f32 scale = weight ? load_n(weight + i, n) : set1(1);
    const f32 offset = bias ? load_n(bias + i, n) : zero();
    for (int64_t r = 0; r < count; ++r)
      store_n(output + r * cols + i, fma(rows[r].normalize(load_n(x + r * cols + i, n)), scale, offset), n);
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
      normalize_rows<1>(x, rows, weight, bias, output, cols);
  }
}

// What the backward of one row needs besides the row. With g = grad_output * weight and xhat the normalised row,
//   grad_input = rstd * (g - mean(g) - xhat * mean(g * xhat))
struct Projections {
  FloatRow row;
  float mean_g, mean_g_xhat;
};

// The statistics are taken anew from the input: the saved ones are float32, and a mean rounded to float32 is off by a
// tenth of a standard deviation at mean/std 1e6. The two means here are sums of float products, in float over a block
// of columns (their errors are divided by cols) and in double over the blocks.
template <class T, class W>
TRANSFUSE_INLINE Projections project_row(const T* x, const T* grad_output, const W* weight, int64_t cols, double eps) {
  constexpr int64_t block_cols = 32 * lanes;
  const FloatRow row(row_statistics(x, cols, eps));
  double mean_g = 0, mean_g_xhat = 0;
  for (int64_t block = 0; block < cols; block += block_cols) {
    const int64_t size = cols - block < block_cols ? cols - block : block_cols;
    f32 sum_g = zero(), sum_g_xhat = zero();
    for_each_vec(size, [&](int64_t offset, int64_t n) __attribute__((always_inline)) {
      const int64_t i = block + offset;
      const f32 grad = load_n(grad_output + i, n);  // 0 past the end of the row: those lanes add nothing
      const f32 g = weight ? grad * load_n(weight + i, n) : grad;
      sum_g = sum_g + g;
      sum_g_xhat = fma(g, row.normalize(load_n(x + i, n)), sum_g_xhat);
    });
    mean_g += reduce_add(widen(sum_g));
    mean_g_xhat += reduce_add(widen(sum_g_xhat));
  }
  return {row, static_cast<float>(mean_g / cols), static_cast<float>(mean_g_xhat / cols)};
}

template <int64_t count, class T, class W>
TRANSFUSE_INLINE void differentiate_rows(const LayerNormBackwardParams& p, int64_t row, const Projections* rows,
                                         double* weight_sums, double* bias_sums) {
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
      const f32 projected = fnma(xhat, set1(rows[r].mean_g_xhat), grad * scale - set1(rows[r].mean_g));
      const f32 past_norm = grad_sum ? load_n(grad_sum + at, n) : zero();
      store_n(grad_input + at, fma(projected * set1(rows[r].row.rest), set1(rows[r].row.scale), past_norm), n);
    }
    if (weight_sums) store_wide(weight_sums + i, load_wide(weight_sums + i) + widen(weight_sum));
    if (bias_sums) store_wide(bias_sums + i, load_wide(bias_sums + i) + widen(bias_sum));
  });
}

template <class T, class W>
void backward_chunks(const LayerNormBackwardParams& p, int64_t begin, int64_t end) {
  const int64_t cols = p.cols, padded = layer_norm_padded_cols(cols);
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
      Projections rows[group_rows];
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (row + r) * cols;
        rows[r] = project_row(input + at, grad_output + at, weight, cols, p.eps);
      }
      if (count == group_rows)
        differentiate_rows<group_rows, T, W>(p, row, rows, weight_sums, bias_sums);
      else
        differentiate_rows<1, T, W>(p, row, rows, weight_sums, bias_sums);
    }
  }
}

template <class W>
TRANSFUSE_INLINE void add_lines(const double* lines, void* total, const LayerNormBackwardParams& p, int64_t begin,
                                int64_t end) {
  const int64_t padded = layer_norm_padded_cols(p.cols);
  for (int64_t i = begin * lanes; i < p.cols && i < end * lanes; i += lanes) {
    wide sum = set1w(0);
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum = sum + load_wide(lines + chunk * padded + i);
    store_wide(static_cast<W*>(total) + i, sum, p.cols - i < lanes ? p.cols - i : lanes);
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
