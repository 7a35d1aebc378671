// Decode attention: a few queries against a long cache of keys and values, which are read once for all rows of a tile.
//
// A tile walks its keys in chunks of 256. A chunk gives a partial result (maximum, sum of weights, weighted sum of
// values); partial results are folded in the order of the chunks. Chunks start at the sequence's own key 0, so neither
// batch nor threads nor the layout of the cache enter a row's arithmetic, and a chunk without a key changes no bit.
// Policy: all in double. Reading the cache is what decoding waits for, and in double a saturated row needs no care: the
// products of float and 16-bit scores are exact. Exclusion is a predicate: a key outside of a row's range is not looked
// at, one that the bias excludes is replaced by select and its value is passed over.
#include "attention_decode.h"

#include "exp.h"
#include "tanh.h"
#include "vec.h"

namespace transfuse::cpu::TRANSFUSE_ISA {
namespace {

constexpr int64_t packed_keys = 32;  // keys or values held in double at a time: they stay in the first-level cache
constexpr int dot_keys = 4;          // keys per pass over a query
constexpr int value_vectors = 4;     // vectors of output columns per pass over the values
constexpr double infinity = __builtin_inf();

TRANSFUSE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
TRANSFUSE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
TRANSFUSE_INLINE int64_t padded(int64_t n) { return (n + lanes - 1) / lanes * lanes; }

TRANSFUSE_INLINE int64_t group_rows(const DecodeParams& p) { return p.num_heads / p.num_kv_heads * p.seqlen_q; }
TRANSFUSE_INLINE int64_t largest_tile(const DecodeParams& p) { return smaller(group_rows(p), decode_tile_rows); }

// What is known of a tile's rows after some keys: the maximum, and sums relative to it.
struct Partial {
  double *maximum, *sum;  // [rows]
  double* output;         // [rows][padded Dv]

  Partial(double* memory, int64_t rows) : maximum(memory), sum(memory + rows), output(memory + 2 * rows) {}
};

int64_t partial_doubles(const DecodeParams& p) { return largest_tile(p) * (2 + padded(p.value_head_dim)); }

struct Scratch {
  double* queries;    // [rows][padded D]
  double* packed;     // [packed_keys][padded D or Dv]
  double* scores;     // [rows][decode_chunk_keys], then weights
  uint8_t* excluded;  // [rows][decode_chunk_keys], by the bias
  double *partial, *state;

  Scratch(const DecodeParams& p, double* memory, int64_t& doubles) {
    const int64_t rows = largest_tile(p), d = padded(p.head_dim), dv = padded(p.value_head_dim);
    const auto take = [&](int64_t n) {
      double* start = memory ? memory + doubles : nullptr;
      doubles += n;
      return start;
    };
    queries = take(rows * d);
    packed = take(packed_keys * larger(d, dv));
    scores = take(rows * decode_chunk_keys);
    excluded = reinterpret_cast<uint8_t*>(take(rows * decode_chunk_keys / static_cast<int64_t>(sizeof(double))));
    partial = take(partial_doubles(p));
    state = take(partial_doubles(p));
  }
};

int64_t scratch_doubles(const DecodeParams& p) {
  int64_t doubles = 0;
  Scratch(p, nullptr, doubles);
  return doubles;
}

Scratch scratch_in(const DecodeParams& p, double* memory) {
  int64_t doubles = 0;
  return Scratch(p, memory, doubles);
}

// ---- a row ----

struct Row {
  int64_t head, query;
  int64_t position;     // of the query among the keys; negative: before all of them
  int64_t first, last;  // keys [first, last) may take part
};

TRANSFUSE_INLINE Row row_of(const DecodeParams& p, const DecodeTask& t, int64_t r) {
  const int64_t in_group = t.first_row + r;
  Row row;
  row.head = t.kv_head * (p.num_heads / p.num_kv_heads) + in_group / p.seqlen_q;
  row.query = in_group % p.seqlen_q;
  row.position = p.lengths[t.batch] - p.seqlen_q + row.query;
  row.first = p.window_left < 0 ? 0 : larger(0, row.position - p.window_left);
  row.last = larger(row.first, row.position + 1);
  return row;
}

// ---- into double ----

// One row of columns in double, the padding 0.
template <class T>
TRANSFUSE_INLINE void pack_row(const T* from, int64_t col, int64_t cols, double* to) {
  for_each_vec(cols, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    if (col == 1) return store_wide(to + i, load_wide(from + i, n));
    for (int64_t j = 0; j < lanes; ++j) to[i + j] = j < n ? to_double(from[(i + j) * col]) : 0.0;
  });
}

// Keys or values [begin, end) of a key/value head.
template <class T>
void pack_cache(const DecodeParams& p, const DecodeTask& t, const DecodeTensor& cache, int64_t cols, int64_t begin,
                int64_t end, double* to) {
  for (int64_t key = begin; key < end; ++key, to += padded(cols)) {
    const int64_t page = key / p.block_size;
    const int64_t block = p.block_table ? p.block_table[t.batch * p.max_blocks + page] : t.batch;
    const T* from = static_cast<const T*>(cache.data) + block * cache.batch + t.kv_head * cache.head +
        (key - page * p.block_size) * cache.row;
    pack_row(from, cache.col, cols, to);
  }
}

template <class T>
void pack_queries(const DecodeParams& p, const DecodeTask& t, const Scratch& s) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const Row row = row_of(p, t, r);
    const T* from = static_cast<const T*>(p.query.data) + t.batch * p.query.batch + row.head * p.query.head +
        row.query * p.query.row;
    pack_row(from, p.query.col, p.head_dim, s.queries + r * padded(p.head_dim));
  }
}

// ---- one chunk ----

// scores[k] = query . keys[k] for `count` keys, `depth` (a multiple of the lanes) columns each.
template <int count>
TRANSFUSE_INLINE void dot(const double* query, const double* keys, int64_t depth, double* scores) {
  wide sum[count];
#pragma GCC unroll 4
  for (int k = 0; k < count; ++k) sum[k] = splat<wide>(0.0);
  for (int64_t d = 0; d < depth; d += lanes) {
    const wide q = load_wide(query + d);
#pragma GCC unroll 4
    for (int k = 0; k < count; ++k) sum[k] = fma(q, load_wide(keys + k * depth + d), sum[k]);
  }
#pragma GCC unroll 4
  for (int k = 0; k < count; ++k) scores[k] = reduce_add(sum[k]);
}

// output[c] += sum over keys of weights[k] * values[k][c], keys in order, passing over what is excluded.
template <int vectors>
TRANSFUSE_INLINE void add_values(const double* weights, const uint8_t* excluded, const double* values, int64_t stride,
                                 int64_t keys, double* output) {
  wide sum[vectors];
#pragma GCC unroll 4
  for (int c = 0; c < vectors; ++c) sum[c] = load_wide(output + c * lanes);
  for (int64_t k = 0; k < keys; ++k) {
    if (excluded && excluded[k]) continue;
    const wide weight = splat<wide>(weights[k]);
#pragma GCC unroll 4
    for (int c = 0; c < vectors; ++c) sum[c] = fma(weight, load_wide(values + k * stride + c * lanes), sum[c]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < vectors; ++c) store_wide(output + c * lanes, sum[c]);
}

TRANSFUSE_INLINE wide cap_scores(wide x, double softcap) {
  const wide cap = splat<wide>(softcap);
  return cap * tanh_and_slope(x / cap).value;
}

// n elements of the bias from `offset` on, in double.
template <class T>
TRANSFUSE_INLINE void load_bias(const DecodeTensor& bias, int64_t offset, int64_t n, double* to) {
  const T* from = static_cast<const T*>(bias.data) + offset;
  for (int64_t i = 0; i < n; ++i) to[i] = to_double(from[i * bias.col]);
}

void load_bias(const DecodeTensor& bias, int64_t offset, int64_t n, double* to) {
  switch (bias.dtype) {
    case DType::f32:
      return load_bias<float>(bias, offset, n, to);
    case DType::bf16:
      return load_bias<bf16>(bias, offset, n, to);
    case DType::f16:
      return load_bias<f16>(bias, offset, n, to);
    case DType::f64:
      return load_bias<double>(bias, offset, n, to);
  }
}

// Turns the products of keys [first, last) of a row into logits, everything else into -inf; returns the largest, a NaN
// passed over (it shows in the sum). `start` is the key at scores[0]; keys come in whole vectors from there.
double finish_scores(const DecodeParams& p, const DecodeTask& t, const Row& row, int64_t start, int64_t first,
                     int64_t last, double* scores, uint8_t* excluded) {
  const double slope = p.alibi_slopes ? p.alibi_slopes[t.batch * p.alibi_batch + row.head] : 0.0;
  const int64_t bias_row = t.batch * p.bias.batch + row.head * p.bias.head + row.query * p.bias.row;
  alignas(64) double index[lanes], bias[lanes];
  for (int64_t i = 0; i < lanes; ++i) index[i] = static_cast<double>(i);
  const wide lane = load_wide(index), nothing = splat<wide>(-infinity);
  wide maximum = nothing;
  for (int64_t key = start + (first - start) / lanes * lanes; key < last; key += lanes) {
    double* at = scores + (key - start);
    const int64_t lo = larger(first - key, 0), hi = smaller(last - key, lanes);
    wide x = load_wide(at) * splat<wide>(p.scale);
    if (p.softcap > 0.0) x = cap_scores(x, p.softcap);
    wide_mask kept = (lane >= splat<wide>(static_cast<double>(lo))) & (lane < splat<wide>(static_cast<double>(hi)));
    if (p.bias.data) {
      for (int64_t i = 0; i < lanes; ++i) bias[i] = 0.0;
      load_bias(p.bias, bias_row + (key + lo) * p.bias.col, hi - lo, bias + lo);
      const wide b = load_wide(bias);
      for (int64_t i = 0; i < lanes; ++i) excluded[key - start + i] = bias[i] == -infinity;
      kept = kept & ~(b == nothing);
      x = x + b;
    }
    if (p.alibi_slopes)
      x = fnma(splat<wide>(slope), splat<wide>(static_cast<double>(row.position - key)) - lane, x);
    x = select(kept, x, nothing);
    store_wide(at, x);
    maximum = max(x, maximum);
  }
  return reduce_max(maximum);
}

// The partial result of a tile over one chunk.
template <class T>
void attend_chunk(const DecodeParams& p, const DecodeTask& t, int64_t chunk, const Scratch& s, const Partial& partial) {
  const int64_t start = chunk * decode_chunk_keys, stop = start + decode_chunk_keys;
  const int64_t depth = padded(p.head_dim), width = padded(p.value_head_dim);
  int64_t tile_first = stop, tile_last = start;  // what some row of the tile may see of the chunk
  for (int64_t r = 0; r < t.rows; ++r) {
    const Row row = row_of(p, t, r);
    tile_first = smaller(tile_first, larger(row.first, start));
    tile_last = larger(tile_last, smaller(row.last, stop));
  }

  for (int64_t begin = tile_first; begin < tile_last;) {
    const int64_t end = smaller(begin + packed_keys, tile_last);
    pack_cache<T>(p, t, p.key, p.head_dim, begin, end, s.packed);
    for (int64_t r = 0; r < t.rows; ++r) {
      const Row row = row_of(p, t, r);
      const double* query = s.queries + r * depth;
      double* scores = s.scores + r * decode_chunk_keys - start;
      int64_t key = larger(begin, row.first);
      const int64_t last = smaller(end, row.last);
      for (; key + dot_keys <= last; key += dot_keys)
        dot<dot_keys>(query, s.packed + (key - begin) * depth, depth, scores + key);
      for (; key < last; ++key) dot<1>(query, s.packed + (key - begin) * depth, depth, scores + key);
    }
    begin = end;
  }

  for (int64_t r = 0; r < t.rows; ++r) {
    const Row row = row_of(p, t, r);
    const int64_t first = larger(row.first, start), last = smaller(row.last, stop);
    double* weights = s.scores + r * decode_chunk_keys;
    for (int64_t c = 0; c < width; c += lanes) store_wide(partial.output + r * width + c, splat<wide>(0.0));
    partial.maximum[r] = -infinity;
    partial.sum[r] = 0.0;
    if (first >= last) continue;
    const double maximum =
        finish_scores(p, t, row, start, first, last, weights, s.excluded + r * decode_chunk_keys);
    const wide shift = splat<wide>(maximum == -infinity ? 0.0 : maximum);
    wide sum = splat<wide>(0.0);
    for (int64_t k = (first - start) / lanes * lanes; k < last - start; k += lanes) {
      const wide weight = exp_full(load_wide(weights + k) - shift);
      store_wide(weights + k, weight);
      sum = sum + weight;
    }
    partial.maximum[r] = maximum;
    partial.sum[r] = reduce_add(sum);
  }

  for (int64_t begin = tile_first; begin < tile_last;) {
    const int64_t end = smaller(begin + packed_keys, tile_last);
    pack_cache<T>(p, t, p.value, p.value_head_dim, begin, end, s.packed);
    for (int64_t r = 0; r < t.rows; ++r) {
      const Row row = row_of(p, t, r);
      const int64_t first = larger(begin, row.first), last = smaller(end, row.last);
      if (first >= last) continue;
      const double* weights = s.scores + r * decode_chunk_keys + (first - start);
      const double* values = s.packed + (first - begin) * width;
      const uint8_t* excluded = p.bias.data ? s.excluded + r * decode_chunk_keys + (first - start) : nullptr;
      double* output = partial.output + r * width;
      int64_t c = 0;
      for (; c + value_vectors * lanes <= width; c += value_vectors * lanes)
        add_values<value_vectors>(weights, excluded, values + c, width, last - first, output + c);
      for (; c < width; c += lanes) add_values<1>(weights, excluded, values + c, width, last - first, output + c);
    }
    begin = end;
  }
}

// ---- folding ----

struct Factors {
  double first, second;
};

// e^(a - top) and e^(b - top): 0 for -inf, and NaN where an infinite maximum leaves nothing defined.
TRANSFUSE_INLINE Factors factors_to(double top, double a, double b) {
  alignas(64) double x[lanes] = {};
  x[0] = a - top;
  x[1] = b - top;
  store_wide(x, exp_full(load_wide(x)));
  return {x[0], x[1]};
}

TRANSFUSE_INLINE double finite_or_zero(double maximum) { return maximum == -infinity ? 0.0 : maximum; }

// state and partial together. A partial result without keys leaves every bit of the state as it is.
void fold(const DecodeTask& t, int64_t width, const Partial& partial, const Partial& state) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const double maximum = partial.maximum[r] > state.maximum[r] ? partial.maximum[r] : state.maximum[r];
    const Factors f = factors_to(finite_or_zero(maximum), state.maximum[r], partial.maximum[r]);
    state.maximum[r] = maximum;
    state.sum[r] = state.sum[r] * f.first + partial.sum[r] * f.second;
    const wide before = splat<wide>(f.first), gained = splat<wide>(f.second);
    for (int64_t c = r * width; c < (r + 1) * width; c += lanes)
      store_wide(state.output + c, fma(load_wide(partial.output + c), gained, load_wide(state.output + c) * before));
  }
}

void start_fold(const DecodeTask& t, int64_t width, const Partial& state) {
  for (int64_t r = 0; r < t.rows; ++r) {
    state.maximum[r] = -infinity;
    state.sum[r] = 0.0;
  }
  for (int64_t c = 0; c < t.rows * width; c += lanes) store_wide(state.output + c, splat<wide>(0.0));
}

// Adds the sink, divides by the sum, rounds once, writes rows and lse.
template <class T>
void write_rows(const DecodeParams& p, const DecodeTask& t, const Partial& state) {
  const int64_t width = padded(p.value_head_dim);
  for (int64_t r = 0; r < t.rows; ++r) {
    const Row row = row_of(p, t, r);
    double top = state.maximum[r], sum = state.sum[r], factor = 1.0;
    const bool keyless = sum == 0.0;  // the largest weight of a row is 1
    if (p.sinks) {
      const double sink = p.sinks[row.head];
      top = sink > top ? sink : top;
      const Factors f = factors_to(finite_or_zero(top), state.maximum[r], sink);
      sum = sum * f.first + f.second;
      factor = f.first;
    }
    const double lse = sum == 0.0 ? -infinity : finite_or_zero(top) + __builtin_log(sum);
    const int64_t at = t.batch * p.lse.batch + row.head * p.lse.head + row.query * p.lse.row;
    if (p.lse.dtype == DType::f64)
      static_cast<double*>(p.lse.data)[at] = lse;
    else
      static_cast<float*>(p.lse.data)[at] = static_cast<float>(lse);

    T* out = static_cast<T*>(p.output.data) + t.batch * p.output.batch + row.head * p.output.head +
        row.query * p.output.row;
    const wide divisor = splat<wide>(keyless ? 1.0 : sum), scaled = splat<wide>(keyless ? 1.0 : factor);
    for_each_vec(p.value_head_dim, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
      store_wide(out + c, load_wide(state.output + r * width + c) * scaled / divisor, n);
    });
  }
}

// ---- entry points ----

// Calls body with a value of the storage type.
template <class Body>
TRANSFUSE_INLINE void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
    case DType::f64:
      return body(double{});
  }
}

void attend(const DecodeParams& p, const DecodeTask& t, double* memory) {
  const Scratch s = scratch_in(p, memory);
  const Partial partial(s.partial, t.rows), state(s.state, t.rows);
  start_fold(t, padded(p.value_head_dim), state);
  with_type(p.query.dtype, [&](auto type) {
    pack_queries<decltype(type)>(p, t, s);
    for (int64_t chunk = t.first_chunk; chunk < t.last_chunk; ++chunk) {
      attend_chunk<decltype(type)>(p, t, chunk, s, partial);
      fold(t, padded(p.value_head_dim), partial, state);
    }
    write_rows<decltype(type)>(p, t, state);
  });
}

void attend_chunks(const DecodeParams& p, const DecodeTask& t, double* memory, double* partials) {
  const Scratch s = scratch_in(p, memory);
  with_type(p.query.dtype, [&](auto type) {
    pack_queries<decltype(type)>(p, t, s);
    for (int64_t chunk = t.first_chunk; chunk < t.last_chunk; ++chunk, partials += partial_doubles(p))
      attend_chunk<decltype(type)>(p, t, chunk, s, Partial(partials, t.rows));
  });
}

void finish(const DecodeParams& p, const DecodeTask& t, double* memory, const double* partials) {
  const Scratch s = scratch_in(p, memory);
  const Partial state(s.state, t.rows);
  start_fold(t, padded(p.value_head_dim), state);
  for (int64_t chunk = t.first_chunk; chunk < t.last_chunk; ++chunk, partials += partial_doubles(p))
    fold(t, padded(p.value_head_dim), Partial(const_cast<double*>(partials), t.rows), state);
  with_type(p.query.dtype, [&](auto type) { write_rows<decltype(type)>(p, t, state); });
}

}  // namespace

extern const DecodeKernels decode_kernels = {scratch_doubles, partial_doubles, attend, attend_chunks, finish};

}  // namespace transfuse::cpu::TRANSFUSE_ISA
