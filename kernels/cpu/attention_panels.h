// Panels: the one data layout of the attention kernels, how data gets into it, and the one matrix product over it.
//
// A panel is [n][16] numbers, adjacent. A matrix [rows, cols] is packed as panels of 16 columns: element (r, c) at
// [c / 16][r][c % 16]; transposed, as panels of 16 rows: element (r, c) at [r / 16][c][r % 16]. Scores are held
// transposed, [key][16 queries]: a softmax over keys then runs down the panel with one query per lane, so it needs no
// reduction across lanes, and a key-length tail needs no mask.
//
// Policy: an element of a product is one chain of FMAs in the order of depth, restarted every `chain` terms and summed
// in order. Tiles only choose which elements are computed together, so results do not depend on the tile shape.
//
// The kernels say `real` for what they compute in and `vec` for 16 of it: float, and double where a source is compiled
// again with TRANSFUSE_ATTENTION_DOUBLE, for float64 (attention_f64.cpp, attention_backward_f64.cpp).
#pragma once

#include <type_traits>

#include "attention.h"
#include "exp.h"
#include "log.h"
#include "vec.h"

#ifdef TRANSFUSE_ATTENTION_DOUBLE
#define TRANSFUSE_ATTENTION_NAME(name) name##_f64
#else
#define TRANSFUSE_ATTENTION_NAME(name) name
#endif

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

#ifdef TRANSFUSE_ATTENTION_DOUBLE
using real = double;
TRANSFUSE_INLINE wide to_vec(f32 x) { return widen(x); }
TRANSFUSE_INLINE wide to_wide(wide x) { return x; }
TRANSFUSE_INLINE wide from_wide(wide x) { return x; }
TRANSFUSE_INLINE wide natural_log(wide x) {
  alignas(64) double lane[lanes];
  store_wide(lane, x);
  for (double& l : lane) l = __builtin_log(l);
  return load_wide(lane);
}
template <class T>
TRANSFUSE_INLINE real to_real(T x) { return to_double(x); }
#else
using real = float;
TRANSFUSE_INLINE f32 to_vec(f32 x) { return x; }
TRANSFUSE_INLINE wide to_wide(f32 x) { return widen(x); }
TRANSFUSE_INLINE f32 from_wide(wide x) { return narrow(x); }
TRANSFUSE_INLINE f32 natural_log(f32 x) { return log(x); }
template <class T>
TRANSFUSE_INLINE real to_real(T x) { return to_float(x); }
#endif
using vec = Vec<real>;
using vec_mask = Lanes<real>::mask_type;
constexpr bool in_double = sizeof(real) == sizeof(double);
constexpr real infinity = static_cast<real>(__builtin_inf());

constexpr int64_t panel = lanes;
constexpr int64_t chain = 32;  // terms per chain: bounds the rounding error of long sums, and costs one add in 32
#if defined(__AVX512F__)
constexpr int tile_rows = in_double ? 8 : 16;  // 16 of the 32 registers accumulate
#elif defined(__AVX2__)
constexpr int tile_rows = in_double ? 3 : 6;  // 12 of the 16 registers accumulate
#else
constexpr int tile_rows = in_double ? 1 : 2;
#endif

TRANSFUSE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TRANSFUSE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
TRANSFUSE_INLINE int64_t panels(int64_t n) { return (n + panel - 1) / panel; }

TRANSFUSE_INLINE vec fill(real x) { return splat<vec>(x); }
TRANSFUSE_INLINE vec load_row(const real* p) { return load_as<vec>(p, panel); }
TRANSFUSE_INLINE void store_row(real* p, vec x) { store_as(p, x, panel); }
TRANSFUSE_INLINE vec lane_index() { return to_vec(to_float(iota())); }

// body(j, u) for j in [0, n), u = j % 4 as a constant: sums that body keeps per u stay in registers.
template <class Body>
TRANSFUSE_INLINE void for_each_in_fours(int64_t n, Body body) {
  const std::integral_constant<int, 0> zeroth;
  const std::integral_constant<int, 1> first;
  const std::integral_constant<int, 2> second;
  const std::integral_constant<int, 3> third;
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    body(j, zeroth);
    body(j + 1, first);
    body(j + 2, second);
    body(j + 3, third);
  }
  if (j < n) body(j, zeroth);
  if (j + 1 < n) body(j + 1, first);
  if (j + 2 < n) body(j + 2, second);
}

// body(truth) with `truth` as a constant, for loops that are compiled once for each.
template <class Body>
TRANSFUSE_INLINE auto with_constant(bool truth, Body body) {
  return truth ? body(std::true_type()) : body(std::false_type());
}

// Hands out pieces of the caller's scratch, whole panel rows each; without memory it only counts.
struct Arena {
  real* memory;
  int64_t count = 0;

  real* take(int64_t n) {
    real* start = memory ? memory + count : nullptr;
    count += n;
    return start;
  }
  int64_t bytes() const { return count * static_cast<int64_t>(sizeof(real)); }
};

// ---- into panels ----

struct byte {  // one element of a boolean mask
  uint8_t value;
};

// n elements `stride` apart, the other lanes 0.
template <class T>
TRANSFUSE_INLINE vec load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_as<vec>(p, n);
  alignas(64) real x[panel] = {};
  for (int64_t i = 0; i < n; ++i) x[i] = to_real(p[i * stride]);
  return load_row(x);
}
// 1 where the byte is not 0.
TRANSFUSE_INLINE vec load_strided(const byte* p, int64_t stride, int64_t n) {
  if (stride == 1 && n == panel)
    return to_vec(select(nonzero(reinterpret_cast<const uint8_t*>(p)), set1(1.0f), set1(0.0f)));
  alignas(64) real x[panel] = {};
  for (int64_t i = 0; i < n; ++i) x[i] = p[i * stride].value ? 1 : 0;
  return load_row(x);
}
TRANSFUSE_INLINE real to_real(byte x) { return x.value ? 1 : 0; }

// Packs rows into panels of 16 columns, `panel_rows` rows apart, tail columns 0. Says whether all elements are finite.
template <class T>
bool pack_rows(const T* source, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, real* out,
               int64_t panel_rows) {
  vec defect = fill(0);  // x - x is NaN for inf and NaN
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = source + r * row_stride;
    for (int64_t c = 0; c < cols; c += panel) {
      const vec x = load_strided(row + c * col_stride, col_stride, smaller(panel, cols - c));
      defect = defect + (x - x);
      store_row(out + c * panel_rows + r * panel, x);
    }
  }
  return !any(isnan(defect));
}

// Packs up to 16 rows as one transposed panel [cols][16], times `factor`, absent rows 0.
template <class T>
void pack_transposed_panel(const T* source, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols,
                           real factor, real* out) {
  const vec factors = fill(factor);
  for (int64_t c = 0; c < cols; c += panel) {
    const int64_t n = smaller(panel, cols - c);
    vec x[panel];
    for (int64_t r = 0; r < panel; ++r)
      x[r] = r < rows ? load_strided(source + r * row_stride + c * col_stride, col_stride, n) * factors : fill(0);
    store_transposed(out + c * panel, x, n);
  }
}

// ---- products ----

// What the A operand is: element (r, k) at a[r * 16 + k] of panels of 16 k (rows), or at a[k * 16 + r] (columns).
enum class Along { rows, columns };

// c[r][0..16) = or += sum over k of A(r, k) * b[k][0..16) for R rows. `a_panel` leads from 16 k to the next 16.
template <int R, Along along>
TRANSFUSE_INLINE void product_tile(const real* a, int64_t a_panel, const real* b, int64_t depth, real* c,
                                   bool accumulate) {
  constexpr int64_t row = along == Along::rows ? panel : 1, step = along == Along::rows ? 1 : panel;
  int64_t start = 0;
  do {  // at least once: without terms the sum is 0
    vec sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r] = fill(0);
    const int64_t stop = smaller(depth, start + chain);
    for (int64_t k0 = start; k0 < stop; k0 += panel) {
      const real* ak = a + k0 / panel * a_panel;
      const real* bk = b + k0 * panel;
      const int64_t n = smaller(panel, stop - k0);
      for (int64_t k = 0; k < n; ++k) {
        const vec x = load_row(bk + k * panel);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r] = fma(fill(ak[r * row + k * step]), x, sum[r]);
      }
    }
    if (accumulate || start > 0) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r] = load_row(c + r * panel) + sum[r];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store_row(c + r * panel, sum[r]);
    start += chain;
  } while (start < depth);
}

// Calls body(r, n) for tiles of n rows from row r on: whole ones, then one of just the rows that are left.
template <int R, class Body>
TRANSFUSE_INLINE void for_last_tile(int64_t r, int64_t rows, Body body) {
  if constexpr (R > 0) {
    if (rows == R) return body(r, std::integral_constant<int, R>());
    for_last_tile<R - 1>(r, rows, body);
  }
}
template <class Body>
TRANSFUSE_INLINE void for_each_tile(int64_t rows, Body body) {
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows) body(r, std::integral_constant<int, tile_rows>());
  for_last_tile<tile_rows - 1>(r, rows - r, body);
}

template <Along along>
void product(const real* a, int64_t a_panel, const real* b, int64_t depth, real* c, int64_t rows, bool accumulate) {
  constexpr int64_t row = along == Along::rows ? panel : 1;
  for_each_tile(rows, [&](int64_t r, auto n) __attribute__((always_inline)) {
    product_tile<n.value, along>(a + r * row, a_panel, b, depth, c + r * panel, accumulate);
  });
}

// The same chains without the terms whose keep(r, k), laid out as A, is 0: 0 * inf and 0 * NaN must not enter a sum.
template <Along along>
void product_of_kept(const real* a, const real* keep, int64_t a_panel, const real* b, int64_t depth, real* c,
                     int64_t rows, bool accumulate) {
  constexpr int64_t row = along == Along::rows ? panel : 1, step = along == Along::rows ? 1 : panel;
  for (int64_t r = 0; r < rows; ++r) {
    int64_t start = 0;
    do {
      vec sum = fill(0);
      for (int64_t k = start; k < smaller(depth, start + chain); ++k) {
        const int64_t at = r * row + k / panel * a_panel + k % panel * step;
        if (keep[at] != 0) sum = fma(fill(a[at]), load_row(b + k * panel), sum);
      }
      if (accumulate || start > 0) sum = load_row(c + r * panel) + sum;
      store_row(c + r * panel, sum);
      start += chain;
    } while (start < depth);
  }
}

// ---- one head of one sequence ----

template <class T>
TRANSFUSE_INLINE const T* at(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t col) {
  return static_cast<const T*>(t.data) + batch * t.batch + head * t.head + row * t.row + col * t.col;
}

// Calls body with a null pointer of the storage type: float, bf16 or f16 where the kernel computes in float; double, or
// float for a bias, where it computes in double.
template <class Body>
TRANSFUSE_INLINE auto with_storage(DType dtype, Body body) {
  if constexpr (in_double) {
    return dtype == DType::f64 ? body(static_cast<double*>(nullptr)) : body(static_cast<float*>(nullptr));
  } else {
    if (dtype == DType::f32) return body(static_cast<float*>(nullptr));
    if (dtype == DType::bf16) return body(static_cast<bf16*>(nullptr));
    return body(static_cast<f16*>(nullptr));
  }
}

// Calls body with a pointer of the tensor's storage type.
template <class Body>
TRANSFUSE_INLINE auto with_type(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t col,
                                Body body) {
  return with_storage(t.dtype, [&](auto* type) {
    return body(at<std::remove_pointer_t<decltype(type)>>(t, batch, head, row, col));
  });
}

// Cache lines that will be wanted soon, asked for a few at a time between arithmetic: all at once they would fill the
// queue of misses, and the loads that are wanted now would wait behind them. On strided views of a projection every row
// lies on a page of its own, where the CPU fetches nothing by itself.
class Prefetch {
 public:
  // Rows of `cols` columns, but at most `most_rows`: a long sequence is streamed in any case.
  void add(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t cols) {
    if (t.col != 1 || rows <= 0) return;  // other columns come in no order that a line would help
    const int64_t size = t.dtype == DType::f64 ? 8 : t.dtype == DType::f32 ? 4 : 2;
    const auto* first = static_cast<const char*>(t.data) + (batch * t.batch + head * t.head + row * t.row) * size;
    regions_[count_++] = {first, t.row * size, smaller(rows, most_rows), cols * size};
    lines_ += smaller(rows, most_rows) * ((cols * size + line - 1) / line);
  }
  void add(const AttentionOutput& t, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t cols) {
    add(AttentionTensor{t.data, t.batch, t.head, t.row, 1, t.dtype}, batch, head, row, rows, cols);
  }
  // Spreads the lines over `steps` calls of step().
  void spread(int64_t steps) { per_step_ = (lines_ + steps - 1) / larger(1, steps); }
  TRANSFUSE_INLINE void step() {
    for (int64_t i = 0; i < per_step_ && at_ < count_; ++i) {
      Region& region = regions_[at_];
      __builtin_prefetch(region.row + byte_, 0, second_level);
      if ((byte_ += line) < region.bytes) continue;
      byte_ = 0;
      region.row += region.step;
      if (--region.rows == 0) ++at_;
    }
  }

 private:
  static constexpr int64_t line = 64, most_rows = 256, most_regions = 7;
  static constexpr int second_level = 2;  // what waits for the next task would only be evicted from the first
  struct Region {
    const char* row;
    int64_t step, rows, bytes;
  };
  Region regions_[most_regions];
  int64_t count_ = 0, at_ = 0, byte_ = 0, lines_ = 0, per_step_ = 0;
};

bool pack_tensor_rows(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t cols,
                      real* out, int64_t panel_rows) {
  return with_type(t, batch, head, row, 0,
                   [&](auto* p) { return pack_rows(p, t.row, t.col, rows, cols, out, panel_rows); });
}

void pack_tensor_transposed(const AttentionTensor& t, int64_t batch, int64_t head, int64_t row, int64_t rows,
                            int64_t cols, real factor, real* out) {
  with_type(t, batch, head, row, 0,
            [&](auto* p) { pack_transposed_panel(p, t.row, t.col, rows, cols, factor, out); });
}

// The tile of a mask or bias for one panel of queries, [keys][16 queries].
template <class T>
void pack_tile(const T* first, const AttentionTensor& t, int64_t rows, int64_t keys, real* out) {
  if (t.row != 0) return pack_transposed_panel(first, t.row, t.col, rows, keys, 1, out);
  for (int64_t j = 0; j < keys; ++j) store_row(out + j * panel, fill(to_real(first[j * t.col])));
}

}  // namespace
}  // namespace transfuse::cpu::TRANSFUSE_ISA
