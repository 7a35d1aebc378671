// Linear layers on packed weights. Layout and policy: packed_linear.h.
//
// A tile of rows x 32 columns is summed in registers over all input channels: two loads of weights and a broadcast per
// row feed two FMAs a row, so that the multiplier never waits. Weights stream through once per block of rows, a chunk of a
// panel at a time, which stays in the second-level cache for all tiles of the block; between chunks the sums of a tile lie
// in memory. The lines that come next are asked for ahead, since with few rows the weights of a whole model pass the cache
// at every call.
#include "packed_linear.h"

#include "gelu_value.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

constexpr int64_t columns = packed_linear_columns;
#if defined(__AVX512F__)
constexpr int tile_rows = 14, tile_vectors = 2;  // 28 of the 32 registers accumulate
#elif defined(__AVX2__)
constexpr int tile_rows = 6, tile_vectors = 1;  // 12 of 16
#else
constexpr int tile_rows = 2, tile_vectors = 1;
#endif
constexpr int64_t prefetch_bytes = 4096, chunk_bytes = int64_t{128} << 10;
// Rows a multiple of `way_bytes` apart fall on the same few lines of the first-level cache, fewer than a tile has rows.
constexpr int64_t way_bytes = 4096, copied_bytes = 1024, line_bytes = 64;

// What one step of a chain multiplies.
template <class T>
struct Step;
template <>
struct Step<float> {
  static constexpr int64_t channels = 1;
  TRANSFUSE_INLINE static f32 weights(const float* p) { return load(p); }
  TRANSFUSE_INLINE static f32 broadcast(const float* p) { return set1(*p); }
  TRANSFUSE_INLINE static f32 add(f32 sum, f32 x, f32 w) { return fma(x, w, sum); }
};
template <>
struct Step<bf16> {
  static constexpr int64_t channels = 2;
  TRANSFUSE_INLINE static i32 weights(const bf16* p) { return load_pairs(p); }
  TRANSFUSE_INLINE static i32 broadcast(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return set1i(pair);
  }
  TRANSFUSE_INLINE static f32 add(f32 sum, i32 x, i32 w) { return dot(sum, x, w); }
};

// sums[r][0..16 * vectors) = or += `rows` rows of x, `row` elements apart, times columns of a panel, over n channels.
template <int rows, int vectors, class T>
[[gnu::noinline]] void multiply_tile(const T* x, int64_t row, const T* weight, int64_t n, float* sums, bool more) {
  constexpr int64_t channels = Step<T>::channels, ahead = prefetch_bytes / sizeof(T);
  f32 sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) sum[r][v] = more ? load(sums + r * columns + v * lanes) : zero();
  const auto step = [&](const T* from, int64_t stride, const T* w) __attribute__((always_inline)) {
    decltype(Step<T>::weights(w)) vector[vectors];
    for (int v = 0; v < vectors; ++v) {
      vector[v] = Step<T>::weights(w + v * lanes * channels);
      __builtin_prefetch(w + v * lanes * channels + ahead);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const auto broadcast = Step<T>::broadcast(from + r * stride);
      for (int v = 0; v < vectors; ++v) sum[r][v] = Step<T>::add(sum[r][v], broadcast, vector[v]);
    }
  };
  int64_t i = 0;
  for (; i + channels <= n; i += channels) step(x + i, row, weight + i * columns);
  if (i < n) {  // the last channel of an odd number, beside a 0
    T last[rows][channels] = {};
    for (int r = 0; r < rows; ++r) last[r][0] = x[r * row + i];
    step(last[0], channels, weight + i * columns);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) store(sums + r * columns + v * lanes, sum[r][v]);
}

// multiply_tile<rows> for a number of rows known only now.
template <int most, class T>
TRANSFUSE_INLINE void multiply_rows(int64_t rows, const T* x, int64_t row, const T* weight, int64_t n, float* sums,
                                    bool more) {
  if constexpr (most > 0) {
    if (rows < most) return multiply_rows<most - 1>(rows, x, row, weight, n, sums, more);
    for (int64_t v = 0; v < columns / lanes; v += tile_vectors)
      multiply_tile<most, tile_vectors>(x, row, weight + v * lanes * Step<T>::channels, n, sums + v * lanes, more);
  }
}

struct Identity {
  TRANSFUSE_INLINE static f32 of(f32 x) { return x; }
};

// Bias, activation and the one rounding of a panel's columns.
template <class Function, class T>
[[gnu::noinline]] void finish(const PackedLinearParams& p, const float* sums, int64_t row, int64_t rows,
                              int64_t column) {
  T* output = static_cast<T*>(p.output) + row * p.out;
  for (int64_t first = column; first < column + columns && first < p.out; first += lanes) {
    const int64_t n = p.out - first < lanes ? p.out - first : lanes;
    const f32 bias = p.bias ? load_n(p.bias + first, n) : zero();
    for (int64_t r = 0; r < rows; ++r)
      store_n(output + r * p.out + first, Function::of(load(sums + r * columns + first - column) + bias), n);
  }
}

// The rows of a tile side by side in `copies`, each a line further than the channels are long.
template <class T>
TRANSFUSE_INLINE void copy_rows(const T* x, int64_t row, int64_t rows, int64_t n, T* copies, int64_t copied_row) {
  for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(copies + r * copied_row, x + r * row, static_cast<size_t>(n) * sizeof(T));
}

template <class Function, class T>
void run(const PackedLinearParams& p, int64_t begin, int64_t end) {
  constexpr int64_t channels = Step<T>::channels, size = sizeof(T), copied_row = (copied_bytes + line_bytes) / size;
  const bool copied = p.in * size % way_bytes == 0;
  const int64_t chunk = copied ? copied_bytes / size : chunk_bytes / (columns * size);
  const int64_t panels = packed_linear_panels(p.out), blocks = packed_linear_blocks(p);
  const int64_t padded_in = (p.in + channels - 1) / channels * channels;
  alignas(64) float sums[packed_linear_block_rows * columns];
  alignas(64) T copies[tile_rows * copied_row];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t block = task / panels, panel = task % panels;
    const int64_t first = p.rows * block / blocks, rows = p.rows * (block + 1) / blocks - first;
    const T* weight = static_cast<const T*>(p.weight) + panel * padded_in * columns;
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    int64_t channel = 0;
    do {  // at least once: without channels the sums are 0
      const int64_t n = p.in - channel < chunk ? p.in - channel : chunk;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = rows * tile / tiles, of_tile = rows * (tile + 1) / tiles - row;
        const T* x = static_cast<const T*>(p.input) + (first + row) * p.in + channel;
        if (copied) copy_rows(x, p.in, of_tile, n, copies, copied_row);
        multiply_rows<tile_rows>(of_tile, copied ? copies : x, copied ? copied_row : p.in, weight + channel * columns, n,
                                 sums + row * columns, channel > 0);
      }
    } while ((channel += chunk) < p.in);
    finish<Function, T>(p, sums, first, rows, panel * columns);
  }
}

template <class Function>
void run_dtype(const PackedLinearParams& p, int64_t begin, int64_t end) {
  p.dtype == DType::f32 ? run<Function, float>(p, begin, end) : run<Function, bf16>(p, begin, end);
}

void forward(const PackedLinearParams& p, int64_t begin, int64_t end) {
  switch (p.activation) {
    case Activation::none:
      return run_dtype<Identity>(p, begin, end);
    case Activation::gelu_erf:
      return run_dtype<GeluValue<Erf>>(p, begin, end);
    case Activation::gelu_tanh:
      return run_dtype<GeluValue<Tanh>>(p, begin, end);
  }
}

}  // namespace

extern const PackedLinearKernels packed_linear_kernels = {forward};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
