// decode_attention on a GPU: the raw ops of attention_decode.cpp, registered for CUDA. The arithmetic is
// kernels/cuda/attention_decode*.
//
// Nothing is read back from the GPU: lengths and block numbers are clamped where they are used, so that calls need no
// synchronisation and can be captured in a graph while the sequences grow.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "attention_decode_checks.h"
#include "cuda/attention_decode.cuh"
#include "cuda_attention.h"

namespace transfuse {
namespace {

using cuda::AttentionParams;
using decode::CacheSizes;
using decode::op;
constexpr int64_t widest = cuda::decode_widest_head_dim;

Dims cache_dims(const CacheSizes& c) { return c.paged ? Dims{0, 2, 1, 3} : dense_dims; }

CacheSizes check_cache(const Tensor& key, const Tensor& value, const Tensor& seqlens,
                       const std::optional<Tensor>& block_table) {
  const CacheSizes c = decode::check_cache(key, value, seqlens, block_table, Backend::cuda, widest);
  check_same_device(op, "value_cache", value, key, "key_cache");
  check_same_device(op, "cache_seqlens", seqlens, key, "key_cache");
  if (block_table) check_same_device(op, "block_table", *block_table, key, "key_cache");
  return c;
}

cuda::DecodeCache cache_of(const CacheSizes& c, const Tensor& seqlens, const std::optional<Tensor>& block_table,
                           int64_t num_new) {
  cuda::DecodeCache cache{};
  cache.lengths = table_of(seqlens);
  if (block_table) {
    cache.table = block_table->const_data_ptr();
    cache.table_batch = block_table->stride(0);
    cache.table_page = block_table->stride(1);
    cache.table_wide = block_table->scalar_type() == ScalarType::Long;
  }
  cache.num_blocks = counted(op, "the number of blocks", c.num_blocks);
  cache.num_new = counted(op, "the number of new keys", num_new);
  cache.block_size = counted(op, "the size of a block", c.block_size);
  cache.capacity = counted(op, "the cache's capacity", c.capacity);
  return cache;
}

void decode_attention_append(const Tensor key_cache, const Tensor value_cache, const Tensor cache_seqlens,
                             std::optional<Tensor> block_table, const Tensor new_key, const Tensor new_value) {
  decode::check_new_length(new_key);
  const CacheSizes c = check_cache(key_cache, value_cache, cache_seqlens, block_table);
  decode::check_append(key_cache, value_cache, new_key, new_value, c, Backend::cuda, widest);
  check_same_device(op, "new_key", new_key, key_cache, "key_cache");
  check_same_device(op, "new_value", new_value, key_cache, "key_cache");
  const CudaCall call(op, key_cache);
  cuda::DecodeAppendParams a{};
  a.cache = cache_of(c, cache_seqlens, block_table, new_key.size(2));
  a.num_kv_heads = counted(op, "the number of key heads", c.num_kv_heads);
  a.batch = c.batch;
  const Tensor *caches[] = {&key_cache, &value_cache}, *added[] = {&new_key, &new_value};
  for (int i = 0; i < 2; ++i) {
    a.targets[i] = output_view(*caches[i], cache_dims(c));
    a.target_cols[i] = caches[i]->stride(3);
    a.sources[i] = view(*added[i], dense_dims);
    a.columns[i] = static_cast<int>(added[i]->size(3));
  }
  call.check(cuda::attention_decode_append(a, dtype_of(key_cache), call.stream()));
}

// Partial results, where the cache has room for more than one part.
std::vector<Tensor> allocate_parts(const CudaCall& call, cuda::DecodeParams& d) {
  cuda::attention_decode_cut(d);
  if (d.parts == 1) return {};
  const int64_t rows = d.problem.num_sequences * d.problem.num_kv_heads * d.slice_rows;
  std::vector<Tensor> kept{call.empty({rows, d.parts, d.partial_columns}, ScalarType::Float),
                           call.empty({rows, d.parts, cuda::decode_stats}, ScalarType::Float)};
  d.partial_outputs = static_cast<float*>(kept[0].mutable_data_ptr());
  d.partial_stats = static_cast<float*>(kept[1].mutable_data_ptr());
  return kept;
}

// num_new: keys that decode_attention_append has written after cache_seqlens. window_left < 0: none. softcap 0: none.
std::tuple<Tensor, Tensor> decode_attention_forward(const Tensor query, const Tensor key_cache,
                                                    const Tensor value_cache, const Tensor cache_seqlens,
                                                    std::optional<Tensor> block_table, std::optional<Tensor> bias,
                                                    std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
                                                    int64_t num_new, double scale, int64_t window_left,
                                                    double softcap) {
  const CacheSizes c = check_cache(key_cache, value_cache, cache_seqlens, block_table);
  decode::check_query(query, key_cache, c, num_new, softcap, Backend::cuda, widest);
  check_same_device(op, "query", query, key_cache, "key_cache");
  const auto check_option = [&](const char* argument, const std::optional<Tensor>& t) {
    if (t) check_same_device(op, argument, *t, key_cache, "key_cache");
  };
  if (bias) decode::check_bias(*bias, query, c.capacity, Backend::cuda);
  if (alibi_slopes) decode::check_per_head("alibi_slopes", *alibi_slopes, query, true, Backend::cuda);
  if (sinks) decode::check_per_head("sinks", *sinks, query, false, Backend::cuda);
  check_option("attn_bias", bias);
  check_option("alibi_slopes", alibi_slopes);
  check_option("sinks", sinks);

  const CudaCall call(op, query);
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  const Tensor output = empty_heads(op, call, batch, heads, length, value_cache.size(3), query.scalar_type());
  const Tensor lse = call.empty({batch, heads, length}, ScalarType::Float);
  std::vector<Tensor> kept;
  cuda::DecodeParams d{};
  d.cache = cache_of(c, cache_seqlens, block_table, num_new);
  AttentionParams& p = d.problem;
  p.query = view(query, dense_dims);
  p.key = view(key_cache, cache_dims(c));
  p.value = view(value_cache, cache_dims(c));
  p.bias = view(bias, dense_dims);
  p.bias_in_float = bias && query.scalar_type() != ScalarType::Float && bias->scalar_type() == ScalarType::Float;
  if (bias && !p.bias_in_float) check_dtype(op, "attn_bias", *bias, query.scalar_type());
  if (alibi_slopes) p.alibi_slopes = kept_floats(call, *alibi_slopes, kept);
  p.alibi_batch = alibi_slopes && alibi_slopes->dim() == 2 ? heads : 0;
  if (sinks) p.sinks = kept_floats(call, *sinks, kept);
  p.kept_share = 1.0f;
  p.num_sequences = batch;
  p.max_seqlen_q = counted(op, "query's length", length);
  p.max_seqlen_k = d.cache.capacity;
  p.num_heads = counted(op, "the number of heads", heads);
  p.num_kv_heads = static_cast<int>(c.num_kv_heads);
  p.head_dim = static_cast<int>(query.size(3));
  p.value_head_dim = static_cast<int>(value_cache.size(3));
  p.window_left = window_left < 0 ? cuda::attention_unbounded : std::min(window_left, cuda::attention_unbounded);
  set_scale(p, scale, softcap);
  p.output = output_view(output, dense_dims);
  p.lse = output_view(lse, dense_dims);
  counted(op, "the queries of a key head",
          p.num_kv_heads > 0 ? static_cast<int64_t>(p.num_heads) / p.num_kv_heads * length : 0);
  const std::vector<Tensor> parts = allocate_parts(call, d);
  call.check(cuda::attention_decode_forward(d, dtype_of(query), call.stream()));
  return {output, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  m.impl("decode_attention_append", TORCH_BOX(&decode_attention_append));
  m.impl("decode_attention_forward", TORCH_BOX(&decode_attention_forward));
}

}  // namespace transfuse
