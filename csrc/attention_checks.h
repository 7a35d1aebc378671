// What the host sides of attention share, on the CPU and on a GPU, and those of decode_attention.
#pragma once

#include <cmath>
#include <vector>

#include "checks.h"

namespace transfuse {

constexpr int64_t max_head_dim = 512;
// multiply-adds (about 15 us) below which waking a second thread costs more than it saves
constexpr double serial_work = 2e5;

// An int32 or int64 tensor of `dim` dimensions.
inline void check_integers(const char* op, const char* argument, const Tensor& t, int64_t dim = 1,
                           Backend backend = Backend::cpu) {
  check_device(op, argument, t, backend);
  check(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, op, ": ", argument, " has dtype ",
        name_of(t.scalar_type()), ", expected int32 or int64");
  check(t.dim() == dim, op, ": ", argument, " has shape ", shape_of(t), ", expected ", dim == 1 ? "one" : "two",
        dim == 1 ? " dimension" : " dimensions");
}

// The integer `offset` elements after the first.
inline int64_t integer_at(const Tensor& t, int64_t offset) {
  return t.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(t.const_data_ptr())[offset]
                                            : static_cast<const int64_t*>(t.const_data_ptr())[offset];
}

inline void check_shape(const char* op, const char* argument, const Tensor& t, const std::vector<int64_t>& expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == expected[i];
  if (same) return;
  std::ostringstream text;
  for (size_t i = 0; i < expected.size(); ++i) text << (i ? ", " : "") << expected[i];
  check(false, op, ": ", argument, " has shape ", shape_of(t), ", expected (", text.str(),
        expected.size() == 1 ? ",)" : ")");
}

struct AttentionSizes {
  int64_t num_heads, num_kv_heads, head_dim, value_head_dim;
};

// query, key, value agree with each other; head_dim is the last dimension and the heads are in dimension 1.
inline AttentionSizes check_query_key_value(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                                            int64_t ndim, Backend backend = Backend::cpu,
                                            int64_t largest_head_dim = max_head_dim) {
  const Tensor* tensors[] = {&query, &key, &value};
  const char* names[] = {"query", "key", "value"};
  for (int i = 0; i < 3; ++i) {
    check_device(op, names[i], *tensors[i], backend);
    if (backend == Backend::cuda) check_same_device(op, names[i], *tensors[i], query, "query");
    kernel_dtype(op, names[i], *tensors[i], backend);
    check_dtype(op, names[i], *tensors[i], query.scalar_type());
    check(tensors[i]->dim() == ndim, op, ": ", names[i], " has shape ", shape_of(*tensors[i]), ", expected ", ndim,
          " dimensions");
    const int64_t dim = tensors[i]->size(ndim - 1);
    check(dim >= 1 && dim <= largest_head_dim, op, ": ", names[i], " has head_dim ", dim, ", expected 1 to ",
          largest_head_dim);
  }
  const AttentionSizes s{query.size(1), key.size(1), query.size(ndim - 1), value.size(ndim - 1)};
  check(key.size(ndim - 1) == s.head_dim, op, ": key has head_dim ", key.size(ndim - 1), ", expected ", s.head_dim,
        " (query's)");
  check(value.size(1) == s.num_kv_heads, op, ": value has ", value.size(1), " heads, expected ", s.num_kv_heads,
        " (key's)");
  check(s.num_kv_heads == 0 ? s.num_heads == 0 : s.num_heads % s.num_kv_heads == 0, op, ": query has ", s.num_heads,
        " heads, expected a multiple of ", s.num_kv_heads, " (key's)");
  const int64_t row = ndim == 4 ? 2 : 0;
  check(value.size(row) == key.size(row), op, ": value has length ", value.size(row), ", expected ", key.size(row),
        " (key's)");
  if (ndim == 4)
    for (int i = 1; i < 3; ++i)
      check(tensors[i]->size(0) == query.size(0), op, ": ", names[i], " has batch ", tensors[i]->size(0), ", expected ",
            query.size(0), " (query's)");
  return s;
}

// What attention and varlen_attention take beside the tensors of their layout, as it comes through the schemas.
struct AttentionOptions {
  const std::optional<Tensor>&bias, &alibi_slopes, &sinks, &dropout_seed;
  double scale;
  bool causal, bottom_right;
  int64_t window_left, window_right;  // -1: unbounded
  double softcap;                     // 0: none
  double dropout_p;

  // Keys that take part to the left and right of the diagonal, at most `unbounded`.
  int64_t left(const char* op, int64_t unbounded) const { return side(op, "window_left", window_left, unbounded); }
  int64_t right(const char* op, int64_t unbounded) const {
    const int64_t of_window = side(op, "window_right", window_right, unbounded);
    return causal ? 0 : of_window;
  }

 private:
  static int64_t side(const char* op, const char* argument, int64_t side, int64_t unbounded) {
    check(side >= -1, op, ": ", argument, " is ", side, ", expected at least 0, or -1 for no bound");
    return side < 0 || side > unbounded ? unbounded : side;
  }
};

// Of a batch of `batch` sequences, the longest with seqlen_q queries and seqlen_k keys.
inline void check_options(const char* op, const AttentionOptions& o, const Tensor& query, int64_t batch,
                          int64_t num_heads, int64_t seqlen_q, int64_t seqlen_k, Backend backend = Backend::cpu) {
  const auto check_place = [&](const char* argument, const Tensor& t) {
    check_device(op, argument, t, backend);
    if (backend == Backend::cuda) check_same_device(op, argument, t, query, "query");
  };
  if (o.bias) {
    check_place("bias", *o.bias);
    check(o.bias->scalar_type() == query.scalar_type() || o.bias->scalar_type() == ScalarType::Float, op,
          ": bias has dtype ", name_of(o.bias->scalar_type()), ", expected ", name_of(query.scalar_type()),
          " (query's) or float32");
    check_shape(op, "bias", *o.bias, {batch, num_heads, seqlen_q, seqlen_k});
  }
  if (o.alibi_slopes) {
    const bool per_batch = o.alibi_slopes->dim() == 2;
    check_shape(op, "alibi_slopes", *o.alibi_slopes,
                per_batch ? std::vector<int64_t>{batch, num_heads} : std::vector<int64_t>{num_heads});
    check_place("alibi_slopes", *o.alibi_slopes);
    kernel_dtype(op, "alibi_slopes", *o.alibi_slopes);
  }
  if (o.sinks) {
    check_shape(op, "sinks", *o.sinks, {num_heads});
    check_place("sinks", *o.sinks);
    kernel_dtype(op, "sinks", *o.sinks);
  }
  check(o.softcap >= 0, op, ": softcap is ", o.softcap, ", expected a positive number, or 0 for none");
  check(o.dropout_p >= 0 && o.dropout_p <= 1, op, ": dropout_p is ", o.dropout_p, ", expected 0 <= dropout_p <= 1");
  if (o.dropout_p > 0) {
    check(o.dropout_seed.has_value(), op, ": dropout_p is ", o.dropout_p, ", expected a dropout_seed");
    check_integers(op, "dropout_seed", *o.dropout_seed, 1, backend);
    check_place("dropout_seed", *o.dropout_seed);
    check_shape(op, "dropout_seed", *o.dropout_seed, {2});
  }
}

inline void check_mask(const char* op, const Tensor& mask, const Tensor& query, int64_t seqlen_k,
                       Backend backend = Backend::cpu) {
  check_device(op, "mask", mask, backend);
  if (backend == Backend::cuda) check_same_device(op, "mask", mask, query, "query");
  check_dtype(op, "mask", mask, ScalarType::Bool);
  check_shape(op, "mask", mask, {query.size(0), query.size(1), query.size(2), seqlen_k});
}

}  // namespace transfuse
