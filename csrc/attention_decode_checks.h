// Checks of decode_attention's raw ops, one home for the CPU and a GPU. Values of lengths and block tables are the
// CPU's to look at: on a GPU the kernels clamp them.
#pragma once

#include <optional>
#include <utility>

#include "attention_checks.h"

namespace transfuse::decode {

constexpr const char* op = "decode_attention";

// The widest that a backend takes.
inline void check_tensor(const char* argument, const Tensor& t, ScalarType type, Backend backend, int64_t widest) {
  check_device(op, argument, t, backend);
  kernel_dtype(op, argument, t, backend);
  check_dtype(op, argument, t, type);
  check(t.dim() == 4, op, ": ", argument, " has shape ", shape_of(t), ", expected 4 dimensions");
  check(t.size(3) >= 1 && t.size(3) <= widest, op, ": ", argument, " has head_dim ", t.size(3), ", expected 1 to ",
        widest);
}

struct CacheSizes {
  int64_t batch, num_kv_heads;
  int64_t capacity;                // keys of one batch entry
  int64_t num_blocks, block_size;  // a batch entry is one block where there is no table
  int64_t max_blocks;
  bool paged;
};

// Shapes of the cache and its two tables.
inline CacheSizes check_cache(const Tensor& key, const Tensor& value, const Tensor& seqlens,
                              const std::optional<Tensor>& block_table, Backend backend, int64_t widest) {
  check_tensor("key_cache", key, key.scalar_type(), backend, widest);
  check_tensor("value_cache", value, key.scalar_type(), backend, widest);
  for (int i = 0; i < 3; ++i)
    check(value.size(i) == key.size(i), op, ": value_cache has shape ", shape_of(value),
          ", expected the first three dimensions of key_cache's ", shape_of(key));
  check_integers(op, "cache_seqlens", seqlens, 1, backend);
  CacheSizes c{};
  c.paged = block_table.has_value();
  c.batch = seqlens.size(0);
  c.num_blocks = key.size(0);
  c.num_kv_heads = key.size(c.paged ? 2 : 1);
  c.block_size = key.size(c.paged ? 1 : 2);
  c.max_blocks = 1;
  if (c.paged) {
    check_integers(op, "block_table", *block_table, 2, backend);
    check(block_table->size(0) == c.batch, op, ": block_table has ", block_table->size(0), " rows, expected ", c.batch,
          " (cache_seqlens's)");
    c.max_blocks = block_table->size(1);
  } else {
    check(c.num_blocks == c.batch, op, ": key_cache has batch ", c.num_blocks, ", expected ", c.batch,
          " (cache_seqlens's)");
  }
  c.capacity = c.max_blocks * c.block_size;
  return c;
}

// ---- append ----

inline void check_new(const char* argument, const Tensor& t, const Tensor& cache, const CacheSizes& c, Backend backend,
                      int64_t widest) {
  check_tensor(argument, t, cache.scalar_type(), backend, widest);
  check(t.size(0) == c.batch && t.size(1) == c.num_kv_heads && t.size(3) == cache.size(3), op, ": ", argument,
        " has shape ", shape_of(t), ", expected (", c.batch, ", ", c.num_kv_heads, ", Lnew, ", cache.size(3), ")");
}

// Writing to memory that is its own neighbour would leave whatever came last.
inline void check_writable(const char* argument, const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); ++i)
    check(t.size(i) <= 1 || t.stride(i) != 0, op, ": ", argument, " has stride 0 in dimension ", i,
          ", expected memory of its own to write new keys to");
}

// The bytes from the first to the last element of a tensor.
inline std::pair<const char*, const char*> extent(const Tensor& t) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  const char* first = static_cast<const char*>(t.const_data_ptr());
  return {first, first + (last + 1) * t.element_size()};
}

// What is written may not be what is read.
inline void check_apart(const char* argument, const Tensor& t, const char* cache_name, const Tensor& cache) {
  if (t.numel() == 0 || cache.numel() == 0) return;
  const auto [first, stop] = extent(t);
  const auto [cache_first, cache_stop] = extent(cache);
  check(stop <= cache_first || cache_stop <= first, op, ": ", argument, " lies in the memory of ", cache_name,
        ", expected memory of its own");
}

inline void check_new_length(const Tensor& new_key) {
  check(new_key.dim() == 4, op, ": new_key has shape ", shape_of(new_key), ", expected 4 dimensions");
}
inline void check_append(const Tensor& key_cache, const Tensor& value_cache, const Tensor& new_key,
                         const Tensor& new_value, const CacheSizes& c, Backend backend, int64_t widest) {
  check_new("new_key", new_key, key_cache, c, backend, widest);
  check_new("new_value", new_value, value_cache, c, backend, widest);
  check(new_value.size(2) == new_key.size(2), op, ": new_value has length ", new_value.size(2), ", expected ",
        new_key.size(2), " (new_key's)");
  check_writable("key_cache", key_cache);
  check_writable("value_cache", value_cache);
  check(key_cache.numel() == 0 || key_cache.const_data_ptr() != value_cache.const_data_ptr(), op,
        ": value_cache is key_cache, expected memory of its own to write new values to");
  check_apart("new_key", new_key, "key_cache", key_cache);
  check_apart("new_key", new_key, "value_cache", value_cache);
  check_apart("new_value", new_value, "key_cache", key_cache);
  check_apart("new_value", new_value, "value_cache", value_cache);
}

// ---- forward ----

inline void check_query(const Tensor& query, const Tensor& key_cache, const CacheSizes& c, int64_t num_new,
                        double softcap, Backend backend, int64_t widest) {
  check(num_new >= 0, op, ": num_new is ", num_new, ", expected at least 0");
  check(softcap >= 0, op, ": softcap is ", softcap, ", expected at least 0");
  check_tensor("query", query, key_cache.scalar_type(), backend, widest);
  check(query.size(0) == c.batch, op, ": query has batch ", query.size(0), ", expected ", c.batch,
        " (cache_seqlens's)");
  check(query.size(3) == key_cache.size(3), op, ": key_cache has head_dim ", key_cache.size(3), ", expected ",
        query.size(3), " (query's)");
  const int64_t heads = query.size(1);
  check(c.num_kv_heads == 0 ? heads == 0 : heads % c.num_kv_heads == 0, op, ": query has ", heads,
        " heads, expected a multiple of ", c.num_kv_heads, " (key_cache's)");
}

inline void check_bias(const Tensor& bias, const Tensor& query, int64_t capacity, Backend backend) {
  check_device(op, "attn_bias", bias, backend);
  kernel_dtype(op, "attn_bias", bias, backend);
  const bool fits = bias.dim() == 4 && bias.size(0) == query.size(0) && bias.size(1) == query.size(1) &&
      bias.size(2) == query.size(2) && bias.size(3) == capacity;
  check(fits, op, ": attn_bias has shape ", shape_of(bias), ", expected (", query.size(0), ", ", query.size(1), ", ",
        query.size(2), ", ", capacity, ")");
}

// [Hq], or where `batched` also [B, Hq].
inline void check_per_head(const char* argument, const Tensor& t, const Tensor& query, bool batched, Backend backend) {
  check_device(op, argument, t, backend);
  const bool fits = (t.dim() == 1 && t.size(0) == query.size(1)) ||
      (batched && t.dim() == 2 && t.size(0) == query.size(0) && t.size(1) == query.size(1));
  check(fits, op, ": ", argument, " has shape ", shape_of(t), ", expected (", query.size(1), ",)");
}

}  // namespace transfuse::decode
