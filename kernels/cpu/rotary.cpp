// Rotary embedding: each pair (a, b) of a row's leading R columns becomes (a cos - b sin, b cos + a sin).
//
// Policy: computed in double, rounded once. Products of two floats are exact in double, so a float32 or 16-bit result
// carries the one rounding at the end even where the two products cancel. Columns from R on are copied bit for bit.
#include "rotary.h"

#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

struct Pairs {
  wide first, second;
};

// Where the pairs of a row lie: pair i is columns i * step and i * step + distance.
struct Layout {
  int64_t step, distance;

  Layout(bool interleaved, int64_t pairs) : step(interleaved ? 2 : 1), distance(interleaved ? 1 : pairs) {}
};

// n values `stride` apart, the other lanes 0.
template <class T>
TRANSFUSE_INLINE wide load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_wide(p, n);
  alignas(64) double x[lanes] = {};
  for (int64_t i = 0; i < n; ++i) x[i] = to_double(p[i * stride]);
  return load_wide(x);
}

template <class T>
TRANSFUSE_INLINE void store_strided(T* p, int64_t stride, wide x, int64_t n) {
  if (stride == 1) return store_wide(p, x, n);
  alignas(64) T rounded[lanes];
  store_wide(rounded, x);
  for (int64_t i = 0; i < n; ++i) p[i * stride] = rounded[i];
}

// n pairs from pair i on of a row whose columns are `col` apart.
template <class T>
TRANSFUSE_INLINE Pairs load_pairs(const T* row, int64_t col, Layout at, int64_t i, int64_t n) {
  const T* first = row + i * at.step * col;
  return {load_strided(first, at.step * col, n), load_strided(first + at.distance * col, at.step * col, n)};
}

template <class T>
TRANSFUSE_INLINE const T* row_of(const RotaryTensor& t, int64_t batch, int64_t head, int64_t token) {
  return static_cast<const T*>(t.data) + batch * t.batch + head * t.head + token * t.token;
}

// T: storage of input and output, U: of the tables.
template <class T, class U>
void rotate_rows(const RotaryParams& p, int64_t begin, int64_t end) {
  const Layout at(p.interleaved, p.pairs);
  const int64_t inner = p.heads_inner ? p.num_heads : p.length, rows = p.num_heads * p.length;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t batch = r / rows, major = r % rows / inner, minor = r % inner;
    const int64_t head = p.heads_inner ? minor : major, token = p.heads_inner ? major : minor;
    const T* x = row_of<T>(p.input, batch, head, token);
    const U *cosines = row_of<U>(p.cos, batch, head, token), *sines = row_of<U>(p.sin, batch, head, token);
    T* out = static_cast<T*>(p.output.data) + batch * p.output.batch + head * p.output.head + token * p.output.token;
    for_each_vec(p.pairs, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      const Pairs v = load_pairs(x, p.input.col, at, i, n);
      const wide c = load_strided(cosines + i * p.cos.col, p.cos.col, n);
      const wide s = load_strided(sines + i * p.sin.col, p.sin.col, n);
      const wide sine = p.inverse ? -s : s;
      T* to = out + i * at.step;
      store_strided(to, at.step, fms(v.first, c, v.second * sine), n);
      store_strided(to + at.distance, at.step, fma(v.second, c, v.first * sine), n);
    });
    for (int64_t c = 2 * p.pairs; c < p.head_dim; ++c) out[c] = x[c * p.input.col];
  }
}

// A row of the tables' gradients: the sum over heads, and over the batch where it shares the tables, in that order.
template <class T, class U>
void sum_table_rows(const RotaryTablesParams& p, int64_t begin, int64_t end) {
  const Layout at(p.interleaved, p.pairs);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t token = r % p.length, first = p.shared ? 0 : r / p.length, last = p.shared ? p.batch : first + 1;
    for_each_vec(p.pairs, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      wide by_cos = splat<wide>(0.0), by_sin = splat<wide>(0.0);
      for (int64_t batch = first; batch < last; ++batch)
        for (int64_t head = 0; head < p.num_heads; ++head) {
          const Pairs g = load_pairs(row_of<T>(p.grad_output, batch, head, token), p.grad_output.col, at, i, n);
          const Pairs x = load_pairs(row_of<T>(p.input, batch, head, token), p.input.col, at, i, n);
          by_cos = by_cos + fma(g.first, x.first, g.second * x.second);
          by_sin = by_sin + fms(g.second, x.first, g.first * x.second);
        }
      store_wide(static_cast<U*>(p.grad_cos) + r * p.pairs + i, by_cos, n);
      store_wide(static_cast<U*>(p.grad_sin) + r * p.pairs + i, p.inverse ? -by_sin : by_sin, n);
    });
  }
}

// Calls body(T{}, U{}) for the storage types of rows and tables: the same, or float tables beside 16-bit rows.
template <class Body>
TRANSFUSE_INLINE void with_types(DType rows, DType tables, Body body) {
  switch (rows) {
    case DType::f32:
      return body(float{}, float{});
    case DType::f64:
      return body(double{}, double{});
    case DType::bf16:
      return tables == DType::f32 ? body(bf16{}, float{}) : body(bf16{}, bf16{});
    case DType::f16:
      return tables == DType::f32 ? body(f16{}, float{}) : body(f16{}, f16{});
  }
}

void rotate(const RotaryParams& p, int64_t begin, int64_t end) {
  with_types(p.input.dtype, p.cos.dtype,
             [&](auto row, auto table) { rotate_rows<decltype(row), decltype(table)>(p, begin, end); });
}

void table_gradients(const RotaryTablesParams& p, int64_t begin, int64_t end) {
  with_types(p.input.dtype, p.dtype,
             [&](auto row, auto table) { sum_table_rows<decltype(row), decltype(table)>(p, begin, end); });
}

}  // namespace

extern const RotaryKernels rotary_kernels = {rotate, table_gradients};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
