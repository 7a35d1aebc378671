// Host side of decode_attention: schemas, checks, appending to the cache, allocation, threads.
//
// Two raw ops: decode_attention_append writes new keys and values into the cache, the one write to an input there is;
// decode_attention_forward reads. Append checks every value that forward checks, so nothing is written before an error.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "allocate.h"
#include "attention_decode_checks.h"
#include "cpu/attention_decode.h"
#include "parallel.h"

namespace transfuse {
namespace {

using cpu::DecodeParams;
using cpu::DecodeTask;
using cpu::DecodeTensor;

using decode::op;
constexpr int64_t serial_elements = 65536;  // elements to copy that are not worth a second thread

// ---- the cache ----

// Where a key/value head's key lies in a cache, whether its pages lie one after the other or anywhere.
struct Cache : decode::CacheSizes {
  std::vector<int64_t> lengths;  // [B], valid keys, new ones included
  std::vector<int64_t> table;    // [B, max_blocks] where paged; entries beyond the length stay 0

  DecodeTensor view(const Tensor& t) const {
    const int head = paged ? 2 : 1, row = paged ? 1 : 2;
    return {t.const_data_ptr(), t.stride(0), t.stride(head), t.stride(row), t.stride(3), dtype_of(t)};
  }
  int64_t block(int64_t b, int64_t key) const { return paged ? table[b * max_blocks + key / block_size] : b; }
};

// Checks shapes and values of the cache and its two tables; names the first bad entry.
Cache make_cache(const Tensor& key, const Tensor& value, const Tensor& seqlens,
                 const std::optional<Tensor>& block_table, int64_t num_new) {
  Cache c{decode::check_cache(key, value, seqlens, block_table, Backend::cpu, max_head_dim), {}, {}};
  c.lengths = zero_vector<int64_t>(op, c.batch);
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t before = integer_at(seqlens, b * seqlens.stride(0));
    check(before >= 0 && before <= c.capacity - num_new, op, ": cache_seqlens[", b, "] is ", before, ", expected 0 to ",
          c.capacity - num_new, " (the cache holds ", c.capacity, num_new ? " keys, new_key brings " : " keys",
          num_new ? std::to_string(num_new) : "", ")");
    c.lengths[b] = before + num_new;
  }
  if (!c.paged) return c;
  c.table = zero_vector<int64_t>(op, c.batch, c.max_blocks);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t page = 0; page * c.block_size < c.lengths[b]; ++page) {
      const int64_t block = integer_at(*block_table, b * block_table->stride(0) + page * block_table->stride(1));
      check(block >= 0 && block < c.num_blocks, op, ": block_table[", b, "][", page, "] is ", block,
            ", expected 0 to ", c.num_blocks - 1, " (key_cache has ", c.num_blocks, " blocks)");
      c.table[b * c.max_blocks + page] = block;
    }
  return c;
}

// ---- append ----

// Heads [begin, end) of all batch entries in order: entries that share a page write to it one after the other.
void copy_heads(const Cache& c, const Tensor& cache, const Tensor& added, int64_t begin, int64_t end) {
  const DecodeTensor to = c.view(cache);
  const int64_t bytes = cache.element_size(), num_new = added.size(2), columns = added.size(3);
  const bool adjacent = to.col == 1 && added.stride(3) == 1;
  char* target = static_cast<char*>(cache.mutable_data_ptr());
  const char* source = static_cast<const char*>(added.const_data_ptr());
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t head = begin; head < end; ++head)
      for (int64_t i = 0; i < num_new; ++i) {
        const int64_t key = c.lengths[b] - num_new + i;
        char* row = target + (c.block(b, key) * to.batch + head * to.head + key % c.block_size * to.row) * bytes;
        const char* from = source + (b * added.stride(0) + head * added.stride(1) + i * added.stride(2)) * bytes;
        if (adjacent)
          std::memcpy(row, from, columns * bytes);
        else
          for (int64_t j = 0; j < columns; ++j)
            std::memcpy(row + j * to.col * bytes, from + j * added.stride(3) * bytes, bytes);
      }
}

void decode_attention_append(const Tensor key_cache, const Tensor value_cache, const Tensor cache_seqlens,
                             std::optional<Tensor> block_table, const Tensor new_key, const Tensor new_value) {
  decode::check_new_length(new_key);
  const Cache c = make_cache(key_cache, value_cache, cache_seqlens, block_table, new_key.size(2));
  decode::check_append(key_cache, value_cache, new_key, new_value, c, Backend::cpu, max_head_dim);
  const int64_t elements = new_key.numel() + new_value.numel();
  parallel_for(0, c.num_kv_heads, elements < serial_elements ? c.num_kv_heads : 1, [&](int64_t begin, int64_t end) {
    copy_heads(c, key_cache, new_key, begin, end);
    copy_heads(c, value_cache, new_value, begin, end);
  });
}

// ---- forward ----

// Threads take tasks one after the other as they finish: balanced for any mixture of lengths.
template <class Run>
void run_tasks(int64_t tasks, int64_t threads, const Run& run) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker, int64_t) {
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) run(worker, task);
  };
  if (threads == 1) return work(0, 1);
  parallel_for(0, threads, 1, work);
}

DecodeTensor bias_view(const Tensor& bias, const Tensor& query, int64_t capacity) {
  decode::check_bias(bias, query, capacity, Backend::cpu);
  return {bias.const_data_ptr(), bias.stride(0), bias.stride(1), bias.stride(2), bias.stride(3),
          kernel_dtype(op, "attn_bias", bias)};
}

// In float64 and contiguous.
const double* per_head(const char* argument, const std::optional<Tensor>& t, const Tensor& query, bool batched) {
  if (!t) return nullptr;
  decode::check_per_head(argument, *t, query, batched, Backend::cpu);
  check_dtype(op, argument, *t, ScalarType::Double);
  check(t->is_contiguous(), op, ": ", argument, " is not contiguous, expected memory without gaps");
  return static_cast<const double*>(t->const_data_ptr());
}

// One task per tile; chunks that the window hides from all rows of a tile are left out.
std::vector<DecodeTask> make_tasks(const DecodeParams& p, const Cache& c) {
  const int64_t rows = p.num_heads / p.num_kv_heads * p.seqlen_q;
  const int64_t tiles = (rows + cpu::decode_tile_rows - 1) / cpu::decode_tile_rows;
  std::vector<DecodeTask> tasks = zero_vector<DecodeTask>(op, c.batch * p.num_kv_heads, tiles);
  auto task = tasks.begin();
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t first_query = c.lengths[b] - p.seqlen_q;
    const int64_t hidden = p.window_left < 0 ? 0 : std::max<int64_t>(0, first_query - p.window_left);
    const int64_t chunks = (c.lengths[b] + cpu::decode_chunk_keys - 1) / cpu::decode_chunk_keys;
    const int64_t first_chunk = hidden / cpu::decode_chunk_keys;
    for (int64_t head = 0; head < p.num_kv_heads; ++head)
      for (int64_t row = 0; row < rows; row += cpu::decode_tile_rows)
        *task++ = {b, head, row, std::min(cpu::decode_tile_rows, rows - row), first_chunk, chunks};
  }
  return tasks;
}

void run_forward(const DecodeParams& p, const Cache& c) {
  const std::vector<DecodeTask> tasks = make_tasks(p, c);
  double work = 0;
  int64_t chunks = 0;
  for (const DecodeTask& t : tasks) {
    const int64_t count = std::max<int64_t>(0, t.last_chunk - t.first_chunk);
    chunks += count;
    work += static_cast<double>(count * cpu::decode_chunk_keys) * t.rows * (p.head_dim + p.value_head_dim);
  }
  const cpu::DecodeKernels& kernels = cpu::pick_decode_kernels();
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  const int64_t threads = work < serial_work ? 1 : std::min(num_threads(), std::max(num_tasks, chunks));
  const int64_t scratch_doubles = kernels.scratch_doubles(p), partial_doubles = kernels.partial_doubles(p);
  // Tiles alone keep the threads busy while there are several for each; a few long ones are cut into their chunks.
  constexpr int64_t tasks_per_thread = 4;
  const bool split = threads > 1 && num_tasks < tasks_per_thread * threads;
  const Tensor scratch = empty_cpu(op, {threads * scratch_doubles}, ScalarType::Double);
  const Tensor partials = empty_cpu(op, {split ? chunks * partial_doubles : 0}, ScalarType::Double);
  double* memory = static_cast<double*>(scratch.mutable_data_ptr());
  double* partial = static_cast<double*>(partials.mutable_data_ptr());
  if (!split)
    return run_tasks(num_tasks, threads, [&](int64_t worker, int64_t task) {
      kernels.attend(p, tasks[task], memory + worker * scratch_doubles);
    });

  std::vector<DecodeTask> pieces = zero_vector<DecodeTask>(op, chunks);
  std::vector<int64_t> first_partial = zero_vector<int64_t>(op, num_tasks);  // of each task
  int64_t piece_count = 0;
  for (int64_t task = 0; task < num_tasks; ++task) {
    first_partial[task] = piece_count;
    for (int64_t chunk = tasks[task].first_chunk; chunk < tasks[task].last_chunk; ++chunk) {
      DecodeTask& piece = pieces[piece_count++] = tasks[task];
      piece.first_chunk = chunk;
      piece.last_chunk = chunk + 1;
    }
  }
  run_tasks(chunks, threads, [&](int64_t worker, int64_t piece) {
    kernels.attend_chunks(p, pieces[piece], memory + worker * scratch_doubles, partial + piece * partial_doubles);
  });
  run_tasks(num_tasks, threads, [&](int64_t worker, int64_t task) {
    kernels.finish(p, tasks[task], memory + worker * scratch_doubles, partial + first_partial[task] * partial_doubles);
  });
}

// num_new: keys that decode_attention_append has written after cache_seqlens. window_left < 0: none. softcap 0: none.
std::tuple<Tensor, Tensor> decode_attention_forward(const Tensor query, const Tensor key_cache,
                                                    const Tensor value_cache, const Tensor cache_seqlens,
                                                    std::optional<Tensor> block_table, std::optional<Tensor> bias,
                                                    std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
                                                    int64_t num_new, double scale, int64_t window_left,
                                                    double softcap) {
  const Cache c = make_cache(key_cache, value_cache, cache_seqlens, block_table, num_new);
  decode::check_query(query, key_cache, c, num_new, softcap, Backend::cpu, max_head_dim);
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  const ScalarType type = query.scalar_type();
  const Tensor output =
      torch::stable::transpose(empty_cpu(op, {batch, length, heads, value_cache.size(3)}, type), 1, 2);
  const Tensor lse =
      empty_cpu(op, {batch, heads, length}, type == ScalarType::Double ? ScalarType::Double : ScalarType::Float);

  DecodeParams p{};
  p.query = {query.const_data_ptr(), query.stride(0), query.stride(1), query.stride(2), query.stride(3),
             dtype_of(query)};
  p.key = c.view(key_cache);
  p.value = c.view(value_cache);
  if (bias) p.bias = bias_view(*bias, query, c.capacity);
  p.alibi_slopes = per_head("alibi_slopes", alibi_slopes, query, true);
  p.alibi_batch = alibi_slopes && alibi_slopes->dim() == 2 ? heads : 0;
  p.sinks = per_head("sinks", sinks, query, false);
  p.lengths = c.lengths.data();
  p.block_table = c.paged ? c.table.data() : nullptr;
  p.max_blocks = c.max_blocks;
  p.block_size = c.paged ? c.block_size : std::max<int64_t>(1, c.capacity);
  p.num_heads = heads;
  p.num_kv_heads = c.num_kv_heads;
  p.seqlen_q = length;
  p.head_dim = query.size(3);
  p.value_head_dim = value_cache.size(3);
  p.window_left = window_left;
  p.scale = scale;
  p.softcap = softcap;
  p.output = {output.mutable_data_ptr(), output.stride(0), output.stride(1), output.stride(2), dtype_of(output)};
  p.lse = {lse.mutable_data_ptr(), lse.stride(0), lse.stride(1), lse.stride(2), dtype_of(lse)};
  if (lse.numel() > 0) run_forward(p, c);
  return {output, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def(
      "decode_attention_append(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, Tensor? block_table,"
      " Tensor new_key, Tensor new_value) -> ()");
  m.def(
      "decode_attention_forward(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens,"
      " Tensor? block_table, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, int num_new, float scale,"
      " int window_left, float softcap) -> (Tensor output, Tensor lse)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("decode_attention_append", TORCH_BOX(&decode_attention_append));
  m.impl("decode_attention_forward", TORCH_BOX(&decode_attention_forward));
}

}  // namespace transfuse
