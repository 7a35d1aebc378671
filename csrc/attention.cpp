// Host side of attention and varlen_attention: schemas, checks, allocation, threads.
//
// Both ops are one kernel over a list of sequences: dense [B, H, L, D] is one sequence per batch entry, packed
// [tokens, H, D] one per cu_seqlens entry. Tasks are handed to threads one after the other as they finish, which is
// balanced for any mixture of lengths; the kernels' results do not depend on who runs a task.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "allocate.h"
#include "attention.h"
#include "attention_checks.h"
#include "cpu/attention.h"
#include "parallel.h"

namespace transfuse {
namespace {

using cpu::AttentionBackwardParams;
using cpu::AttentionForwardParams;
using cpu::AttentionOutput;
using cpu::AttentionParams;
using cpu::AttentionSequence;
using cpu::AttentionTensor;

// ---- views ----

// Where a tensor keeps batch, head, row and column; -1 for a dimension that it does not have.
struct Dims {
  int batch, head, row, col;
};
constexpr Dims dense_dims{0, 1, 2, 3}, packed_dims{-1, 1, 0, 2}, packed_lse_dims{-1, 0, 1, -1};
// A bias is [B, Hq, Lq, Lk] in both: of a packed batch, B counts sequences and Lq, Lk are the longest.
constexpr Dims bias_dims = dense_dims;

int64_t stride_of(const Tensor& t, int dim) { return dim < 0 || dim >= t.dim() ? 0 : t.stride(dim); }

AttentionTensor view(const Tensor& t, Dims d) {
  return {t.const_data_ptr(), stride_of(t, d.batch), stride_of(t, d.head), stride_of(t, d.row), stride_of(t, d.col),
          dtype_of(t)};
}
AttentionTensor view(const std::optional<Tensor>& t, Dims d) {
  return t ? view(*t, d) : AttentionTensor{nullptr, 0, 0, 0, 0, DType::f32};
}
AttentionOutput output_view(const Tensor& t, Dims d) {
  return {t.mutable_data_ptr(), stride_of(t, d.batch), stride_of(t, d.head), stride_of(t, d.row), dtype_of(t)};
}

// A [B, H, L, D] view of [B, L, H, D] memory: heads of one token lie together, as the next projection wants them.
Tensor allocate_heads(const char* op, int64_t batch, int64_t heads, int64_t length, int64_t dim, ScalarType type,
                      bool zero) {
  const std::vector<int64_t> shape{batch, length, heads, dim};
  const Tensor memory = zero ? zeros_cpu(op, shape, type) : empty_cpu(op, shape, type);
  return view_of(op, memory, {batch, heads, length, dim},
                 {memory.stride(0), memory.stride(2), memory.stride(1), memory.stride(3)});
}

ScalarType statistics_type(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const cpu::AttentionKernels& pick_kernels(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? cpu::pick_attention_kernels_f64() : cpu::pick_attention_kernels();
}

// ---- threads ----

// Scratch of the calling thread, kept between calls while it is small.
class Scratch {
 public:
  Scratch(const char* op, int64_t bytes) {
    Cache& c = cache();
    if (bytes > c.bytes) {
      c.release();
      const size_t size = (static_cast<size_t>(bytes) + alignment - 1) / alignment * alignment;
      c.memory = std::aligned_alloc(alignment, size);
      if (!c.memory) could_not_allocate(op, static_cast<double>(size), " of scratch");
      c.bytes = static_cast<int64_t>(size);
    }
  }
  ~Scratch() {
    if (cache().bytes > kept_bytes) cache().release();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(cache().memory); }

  static constexpr size_t alignment = 64;

 private:
  struct Cache {
    void* memory = nullptr;
    int64_t bytes = 0;
    void release() {
      std::free(memory);
      memory = nullptr;
      bytes = 0;
    }
    ~Cache() { release(); }
  };
  static constexpr int64_t kept_bytes = int64_t{64} << 20;
  static Cache& cache() {
    static thread_local Cache value;
    return value;
  }
};

// Calls run(scratch, begin, end) over [0, tasks), on as many threads as the work is worth.
template <class Run>
void run_tasks(const char* op, int64_t tasks, double work, int64_t scratch_bytes, const Run& run) {
  if (tasks == 0) return;
  constexpr int64_t shares = 8;  // pieces per thread: enough to even out lengths, few enough to cost nothing
  const int64_t threads = work < serial_work ? 1 : std::min(num_threads(), tasks);
  const int64_t stride = (scratch_bytes + Scratch::alignment - 1) / Scratch::alignment * Scratch::alignment;
  const Scratch scratch(op, stride * threads);
  char* memory = scratch.data();
  if (threads == 1) return run(memory, int64_t{0}, tasks);
  const int64_t piece = std::max<int64_t>(1, tasks / (threads * shares));
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t worker, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(piece)) < tasks;)
      run(memory + worker * stride, begin, std::min(begin + piece, tasks));
  });
}

// ---- problems ----

struct Problem {
  AttentionParams params;
  std::vector<AttentionSequence> sequences;
  std::vector<Tensor> kept;  // what params points into and the caller does not hold
  int64_t tasks = 0;
  double work = 0;  // multiply-adds of the forward

  void add(int64_t batch, int64_t query_row, int64_t key_row, int64_t seqlen_q, int64_t seqlen_k) {
    sequences.push_back({batch, query_row, key_row, seqlen_q, seqlen_k, 0});
    params.max_seqlen_k = std::max(params.max_seqlen_k, seqlen_k);
    work += static_cast<double>(params.num_heads) * seqlen_q * seqlen_k * (params.head_dim + params.value_head_dim);
  }
  // Cuts the queries into tasks: long blocks use a packed key most often, short ones give every thread something to do.
  void finish() {
    constexpr int64_t longest = 256, shortest = 32, tasks_per_thread = 4;
    const int64_t enough = tasks_per_thread * num_threads();
    for (params.query_block = longest;; params.query_block /= 2) {
      tasks = 0;
      for (AttentionSequence& s : sequences) {
        s.first_task = tasks;
        tasks += (s.seqlen_q + params.query_block - 1) / params.query_block * params.num_heads;
      }
      if (tasks >= enough || params.query_block == shortest) break;
    }
    params.sequences = sequences.data();
    params.num_sequences = static_cast<int64_t>(sequences.size());
  }
};

AttentionParams common_params(const Tensor& query, const Tensor& key, const Tensor& value, const AttentionSizes& s,
                              Dims dims) {
  AttentionParams p{};
  p.query = view(query, dims);
  p.key = view(key, dims);
  p.value = view(value, dims);
  p.num_heads = s.num_heads;
  p.num_kv_heads = s.num_kv_heads;
  p.head_dim = s.head_dim;
  p.value_head_dim = s.value_head_dim;
  return p;
}

// One double per head (or per batch entry and head), adjacent, whatever dtype and strides they came in.
const double* doubles_of(Problem& problem, const char* op, const Tensor& t) {
  problem.kept.push_back(contiguous(op, torch::stable::to(t, ScalarType::Double)));
  return static_cast<const double*>(problem.kept.back().const_data_ptr());
}

void add_options(Problem& problem, const char* op, const AttentionOptions& o, const Tensor& query, int64_t batch,
                 int64_t seqlen_q, int64_t seqlen_k) {
  AttentionParams& p = problem.params;
  check_options(op, o, query, batch, p.num_heads, seqlen_q, seqlen_k);
  p.bias = view(o.bias, bias_dims);
  if (o.alibi_slopes) {
    p.alibi_slopes = doubles_of(problem, op, *o.alibi_slopes);
    p.alibi_batch = o.alibi_slopes->dim() == 2 ? p.num_heads : 0;
  }
  if (o.sinks) p.sinks = doubles_of(problem, op, *o.sinks);
  if (o.dropout_p > 0)
    p.dropout = {o.dropout_p, integer_at(*o.dropout_seed, 0), integer_at(*o.dropout_seed, o.dropout_seed->stride(0))};
  p.scale = o.scale;
  p.softcap = o.softcap;
  p.bottom_right = o.bottom_right;
  p.window_left = o.left(op, cpu::attention_unbounded);
  p.window_right = o.right(op, cpu::attention_unbounded);
}

Problem dense_problem(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                      const std::optional<Tensor>& seqlens_k, const AttentionOptions& options) {
  const char* op = "attention";
  const AttentionSizes s = check_query_key_value(op, query, key, value, 4);
  const int64_t batch = query.size(0), seqlen_q = query.size(2), seqlen_k = key.size(2);
  if (mask) check_mask(op, *mask, query, seqlen_k);
  if (seqlens_k) {
    check_integers(op, "seqlens_k", *seqlens_k);
    check_shape(op, "seqlens_k", *seqlens_k, {batch});
  }
  Problem problem;
  problem.params = common_params(query, key, value, s, dense_dims);
  add_options(problem, op, options, query, batch, seqlen_q, seqlen_k);
  problem.params.mask = view(mask, dense_dims);
  problem.sequences.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t valid = seqlens_k ? integer_at(*seqlens_k, b * seqlens_k->stride(0)) : seqlen_k;
    check(valid >= 0 && valid <= seqlen_k, op, ": seqlens_k[", b, "] is ", valid, ", expected 0 to ", seqlen_k,
          " (key's length)");
    problem.add(b, 0, 0, seqlen_q, valid);
  }
  problem.finish();
  return problem;
}

// From 0, never falling, ending at the number of tokens, no step above max_seqlen; the first bad entry is named.
void check_cu_seqlens(const char* argument, const Tensor& t, int64_t tokens, const char* owner, int64_t max_seqlen,
                      const char* max_name) {
  const char* op = "varlen_attention";
  check_integers(op, argument, t);
  check(t.size(0) >= 1, op, ": ", argument, " has shape ", shape_of(t), ", expected at least one entry");
  const int64_t stride = t.stride(0);
  int64_t before = 0;
  for (int64_t i = 0; i < t.size(0); ++i) {
    const int64_t value = integer_at(t, i * stride);
    check(i > 0 || value == 0, op, ": ", argument, "[0] is ", value, ", expected 0");
    check(value >= before, op, ": ", argument, "[", i, "] is ", value, ", expected at least ", before,
          " (the entry before)");
    check(value <= tokens, op, ": ", argument, "[", i, "] is ", value, ", expected at most ", tokens, " (", owner,
          "'s tokens)");
    check(value - before <= max_seqlen, op, ": ", argument, "[", i, "] is ", value, ", a sequence of length ",
          value - before, ", expected at most ", max_seqlen, " (", max_name, ")");
    before = value;
  }
  check(before == tokens, op, ": ", argument, "[", t.size(0) - 1, "] is ", before, ", expected ", tokens, " (", owner,
        "'s tokens)");
}

Problem packed_problem(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
                       const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                       const AttentionOptions& options) {
  const char* op = "varlen_attention";
  const AttentionSizes s = check_query_key_value(op, query, key, value, 3);
  check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.size(0), "query", max_seqlen_q, "max_seqlen_q");
  check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.size(0), "key", max_seqlen_k, "max_seqlen_k");
  check_same_shape(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q, "cu_seqlens_q");
  Problem problem;
  problem.params = common_params(query, key, value, s, packed_dims);
  const int64_t count = cu_seqlens_q.size(0) - 1;
  add_options(problem, op, options, query, count, max_seqlen_q, max_seqlen_k);
  problem.sequences.reserve(count);
  const int64_t stride_q = cu_seqlens_q.stride(0), stride_k = cu_seqlens_k.stride(0);
  int64_t q = 0, k = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t q_end = integer_at(cu_seqlens_q, (i + 1) * stride_q);
    const int64_t k_end = integer_at(cu_seqlens_k, (i + 1) * stride_k);
    problem.add(i, q, k, q_end - q, k_end - k);
    q = q_end;
    k = k_end;
  }
  problem.finish();
  return problem;
}

// ---- forward ----

void run_forward(const char* op, const Problem& problem, const Tensor& query, const Tensor& output, const Tensor& lse,
                 Dims dims, Dims lse_dims) {
  const AttentionForwardParams params{problem.params, output_view(output, dims), output_view(lse, lse_dims)};
  const cpu::AttentionKernels& kernels = pick_kernels(query);
  run_tasks(op, problem.tasks, problem.work, kernels.forward_scratch_bytes(params),
            [&](char* scratch, int64_t begin, int64_t end) { kernels.forward(params, scratch, begin, end); });
}

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const Tensor query, const Tensor key, const Tensor value,
                                             std::optional<Tensor> bias, std::optional<Tensor> mask,
                                             std::optional<Tensor> seqlens_k, std::optional<Tensor> alibi_slopes,
                                             std::optional<Tensor> sinks, std::optional<Tensor> dropout_seed,
                                             double scale, bool causal, bool bottom_right, int64_t window_left,
                                             int64_t window_right, double softcap, double dropout_p) {
  const char* op = "attention";
  const AttentionOptions options{bias,         alibi_slopes, sinks,        dropout_seed, scale,    causal,
                                 bottom_right, window_left,  window_right, softcap,      dropout_p};
  const Problem problem = dense_problem(query, key, value, mask, seqlens_k, options);
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  const Tensor output = allocate_heads(op, batch, heads, length, value.size(3), query.scalar_type(), false);
  const Tensor lse = empty_cpu(op, {batch, heads, length}, statistics_type(query));
  run_forward(op, problem, query, output, lse, dense_dims, dense_dims);
  return {output, lse};
}

std::tuple<Tensor, Tensor> varlen_attention_forward(const Tensor query, const Tensor key, const Tensor value,
                                                    const Tensor cu_seqlens_q, const Tensor cu_seqlens_k,
                                                    std::optional<Tensor> bias, std::optional<Tensor> alibi_slopes,
                                                    std::optional<Tensor> sinks, std::optional<Tensor> dropout_seed,
                                                    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                    bool causal, bool bottom_right, int64_t window_left,
                                                    int64_t window_right, double softcap, double dropout_p) {
  const char* op = "varlen_attention";
  const AttentionOptions options{bias,         alibi_slopes, sinks,        dropout_seed, scale,    causal,
                                 bottom_right, window_left,  window_right, softcap,      dropout_p};
  const Problem problem =
      packed_problem(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options);
  const Tensor output = empty_cpu(op, {query.size(0), query.size(1), value.size(2)}, query.scalar_type());
  const Tensor lse = empty_cpu(op, {query.size(1), query.size(0)}, statistics_type(query));
  run_forward(op, problem, query, output, lse, packed_dims, packed_lse_dims);
  return {output, lse};
}

namespace {

// ---- backward ----

// What a backward takes beside the inputs: shapes as the forward left them.
void check_saved(const char* op, const Tensor& query, const Tensor& value, const Tensor& grad_output,
                 const std::optional<Tensor>& grad_lse, const Tensor& output, const Tensor& lse,
                 const std::vector<int64_t>& lse_shape) {
  std::vector<int64_t> output_shape(query.sizes().begin(), query.sizes().end());
  output_shape.back() = value.size(value.dim() - 1);
  const Tensor* outputs[] = {&grad_output, &output};
  const char* names[] = {"grad_output", "output"};
  for (int i = 0; i < 2; ++i) {
    check_cpu(op, names[i], *outputs[i]);
    check_dtype(op, names[i], *outputs[i], query.scalar_type());
    check_shape(op, names[i], *outputs[i], output_shape);
  }
  check_cpu(op, "lse", lse);
  check_dtype(op, "lse", lse, statistics_type(query));
  check_shape(op, "lse", lse, lse_shape);
  if (!grad_lse) return;
  check_cpu(op, "grad_lse", *grad_lse);
  check_dtype(op, "grad_lse", *grad_lse, statistics_type(query));
  check_shape(op, "grad_lse", *grad_lse, lse_shape);
}

// Gradients of what is not query, key or value: which are wanted, and where they are gathered.
struct ExtraGrads {
  bool bias, alibi_slopes, sinks;
  std::vector<int64_t> bias_shape;  // as the caller gave it: 1 where it broadcasts
};
struct Gathered {
  Tensor bias, alibi_slopes, sinks;  // float64; one row per sequence but for bias
};

Gathered gather_extras(const char* op, const Problem& problem, const AttentionOptions& options,
                       const ExtraGrads& wanted, AttentionBackwardParams& params) {
  const AttentionParams& p = problem.params;
  check(!wanted.bias || options.bias, op, ": need_bias_grad is set, expected a bias");
  check(!wanted.alibi_slopes || options.alibi_slopes, op, ": need_alibi_grad is set, expected alibi_slopes");
  check(!wanted.sinks || options.sinks, op, ": need_sinks_grad is set, expected sinks");
  std::vector<int64_t> bias_shape{0};
  if (wanted.bias) {
    bias_shape = wanted.bias_shape;
    check(bias_shape.size() == 4, op, ": bias_shape has ", bias_shape.size(), " entries, expected 4");
    int64_t strides[4], stride = 1;
    for (int i = 3; i >= 0; --i) {
      const int64_t full = options.bias->size(i);
      check(bias_shape[i] == full || bias_shape[i] == 1, op, ": bias_shape[", i, "] is ", bias_shape[i],
            ", expected 1 or ", full);
      strides[i] = bias_shape[i] == full ? stride : 0;
      stride *= bias_shape[i];
    }
    params.grad_bias = {nullptr, strides[0], strides[1], strides[2], strides[3]};
  }
  const auto per_sequence = [&](bool want) {
    return zeros_cpu(op, {want ? p.num_sequences : 0, p.num_heads}, ScalarType::Double);
  };
  Gathered g{zeros_cpu(op, bias_shape, ScalarType::Double), per_sequence(wanted.alibi_slopes),
             per_sequence(wanted.sinks)};
  const auto data = [](bool want, const Tensor& t) {
    return want ? static_cast<double*>(t.mutable_data_ptr()) : nullptr;
  };
  params.grad_bias.data = data(wanted.bias, g.bias);
  params.grad_alibi_slopes = data(wanted.alibi_slopes, g.alibi_slopes);
  params.grad_sinks = data(wanted.sinks, g.sinks);
  return g;
}

// The gradient in the argument's own shape and dtype, empty where none is wanted; where all sequences share the
// argument their rows are added in order.
Tensor finish_extra(const char* op, bool wanted, const Tensor& gathered, const std::optional<Tensor>& argument,
                    const Tensor& query) {
  if (!wanted) return empty_cpu(op, {0}, argument ? argument->scalar_type() : query.scalar_type());
  if (gathered.dim() == 4 || argument->dim() == 2) return torch::stable::to(gathered, argument->scalar_type());
  const int64_t sequences = gathered.size(0), heads = gathered.size(1);
  const Tensor total = zeros_cpu(op, {heads}, ScalarType::Double);
  pick_kernels(query).add_sequences(static_cast<const double*>(gathered.const_data_ptr()), sequences, heads,
                                    static_cast<double*>(total.mutable_data_ptr()));
  return torch::stable::to(total, argument->scalar_type());
}

// One task per key/value head of a sequence; where tasks would add to one bias gradient, one task does them in order.
void run_backward(const char* op, const Problem& problem, const Tensor& query, const AttentionBackwardParams& params) {
  constexpr double products_per_forward = 2.5;
  const cpu::AttentionKernels& kernels = pick_kernels(query);
  const int64_t sequences = params.problem.num_sequences, kv_heads = params.problem.num_kv_heads;
  const bool share_batch = params.grad_bias.data && params.grad_bias.batch == 0;
  const bool share_heads = params.grad_bias.data && params.grad_bias.head == 0;
  const int64_t batches = share_batch ? 1 : sequences, batch_step = share_batch ? sequences : 1;
  const int64_t heads = share_heads ? 1 : kv_heads, head_step = share_heads ? kv_heads : 1;
  if (sequences == 0 || kv_heads == 0) return;
  run_tasks(op, batches * heads, problem.work * products_per_forward, kernels.backward_scratch_bytes(params),
            [&](char* scratch, int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task)
                for (int64_t i = 0; i < batch_step; ++i)
                  for (int64_t j = 0; j < head_step; ++j)
                    kernels.backward(params, scratch, task / heads * batch_step + i, task % heads * head_step + j);
            });
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Grads attention_backward(const Tensor grad_output, std::optional<Tensor> grad_lse, const Tensor query, const Tensor key,
                         const Tensor value, const Tensor output, const Tensor lse, std::optional<Tensor> bias,
                         std::optional<Tensor> mask, std::optional<Tensor> seqlens_k,
                         std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
                         std::optional<Tensor> dropout_seed, double scale, bool causal, bool bottom_right,
                         int64_t window_left, int64_t window_right, double softcap, double dropout_p,
                         std::vector<int64_t> bias_shape, bool need_bias_grad, bool need_alibi_grad,
                         bool need_sinks_grad) {
  const char* op = "attention";
  const AttentionOptions options{bias,         alibi_slopes, sinks,        dropout_seed, scale,    causal,
                                 bottom_right, window_left,  window_right, softcap,      dropout_p};
  const Problem problem = dense_problem(query, key, value, mask, seqlens_k, options);
  const int64_t batch = query.size(0), heads = query.size(1), seqlen_q = query.size(2), seqlen_k = key.size(2);
  check_saved(op, query, value, grad_output, grad_lse, output, lse, {batch, heads, seqlen_q});
  const ScalarType type = query.scalar_type();
  const int64_t kv_heads = key.size(1), head_dim = query.size(3), value_head_dim = value.size(3);
  const bool ragged = seqlens_k.has_value();  // rows beyond a sequence's keys are not visited: they start as 0
  const Tensor grad_query = allocate_heads(op, batch, heads, seqlen_q, head_dim, type, false);
  const Tensor grad_key = allocate_heads(op, batch, kv_heads, seqlen_k, head_dim, type, ragged);
  const Tensor grad_value = allocate_heads(op, batch, kv_heads, seqlen_k, value_head_dim, type, ragged);
  AttentionBackwardParams params{problem.params,
                                 view(grad_output, dense_dims),
                                 view(output, dense_dims),
                                 view(grad_lse, dense_dims),
                                 output_view(grad_query, dense_dims),
                                 output_view(grad_key, dense_dims),
                                 output_view(grad_value, dense_dims),
                                 {nullptr, 0, 0, 0, 0},
                                 nullptr,
                                 nullptr};
  params.problem.lse = view(lse, dense_dims);
  const ExtraGrads wanted{need_bias_grad, need_alibi_grad, need_sinks_grad, bias_shape};
  const Gathered extras = gather_extras(op, problem, options, wanted, params);
  run_backward(op, problem, query, params);
  return {grad_query,
          grad_key,
          grad_value,
          finish_extra(op, wanted.bias, extras.bias, bias, query),
          finish_extra(op, wanted.alibi_slopes, extras.alibi_slopes, alibi_slopes, query),
          finish_extra(op, wanted.sinks, extras.sinks, sinks, query)};
}

Grads varlen_attention_backward(const Tensor grad_output, std::optional<Tensor> grad_lse, const Tensor query,
                                const Tensor key, const Tensor value, const Tensor output, const Tensor lse,
                                const Tensor cu_seqlens_q, const Tensor cu_seqlens_k, std::optional<Tensor> bias,
                                std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks,
                                std::optional<Tensor> dropout_seed, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                double scale, bool causal, bool bottom_right, int64_t window_left, int64_t window_right,
                                double softcap, double dropout_p, std::vector<int64_t> bias_shape, bool need_bias_grad,
                                bool need_alibi_grad, bool need_sinks_grad) {
  const char* op = "varlen_attention";
  const AttentionOptions options{bias,         alibi_slopes, sinks,        dropout_seed, scale,    causal,
                                 bottom_right, window_left,  window_right, softcap,      dropout_p};
  const Problem problem =
      packed_problem(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options);
  check_saved(op, query, value, grad_output, grad_lse, output, lse, {query.size(1), query.size(0)});
  const ScalarType type = query.scalar_type();
  const auto like = [&](const Tensor& t) { return empty_cpu(op, {t.size(0), t.size(1), t.size(2)}, type); };
  const Tensor grad_query = like(query), grad_key = like(key), grad_value = like(value);
  AttentionBackwardParams params{problem.params,
                                 view(grad_output, packed_dims),
                                 view(output, packed_dims),
                                 view(grad_lse, packed_lse_dims),
                                 output_view(grad_query, packed_dims),
                                 output_view(grad_key, packed_dims),
                                 output_view(grad_value, packed_dims),
                                 {nullptr, 0, 0, 0, 0},
                                 nullptr,
                                 nullptr};
  params.problem.lse = view(lse, packed_lse_dims);
  const ExtraGrads wanted{need_bias_grad, need_alibi_grad, need_sinks_grad, bias_shape};
  const Gathered extras = gather_extras(op, problem, options, wanted, params);
  run_backward(op, problem, query, params);
  return {grad_query,
          grad_key,
          grad_value,
          finish_extra(op, wanted.bias, extras.bias, bias, query),
          finish_extra(op, wanted.alibi_slopes, extras.alibi_slopes, alibi_slopes, query),
          finish_extra(op, wanted.sinks, extras.sinks, sinks, query)};
}

}  // namespace
}  // namespace transfuse

#define TRANSFUSE_ATTENTION_OPTIONS \
  "float scale, bool causal, bool bottom_right, int window_left, int window_right, float softcap, float dropout_p"
#define TRANSFUSE_ATTENTION_NEEDS "int[] bias_shape, bool need_bias_grad, bool need_alibi_grad, bool need_sinks_grad"

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? seqlens_k, "
      "Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, " TRANSFUSE_ATTENTION_OPTIONS
      ") -> (Tensor, Tensor)");
  m.def(
      "varlen_attention_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, int max_seqlen_q, int max_seqlen_k, "
      TRANSFUSE_ATTENTION_OPTIONS ") -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor output, Tensor lse, Tensor? bias, Tensor? mask, Tensor? seqlens_k, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor? dropout_seed, " TRANSFUSE_ATTENTION_OPTIONS ", " TRANSFUSE_ATTENTION_NEEDS
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "varlen_attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor output, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? bias, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor? dropout_seed, int max_seqlen_q, int max_seqlen_k, " TRANSFUSE_ATTENTION_OPTIONS
      ", " TRANSFUSE_ATTENTION_NEEDS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&transfuse::attention_forward));
  m.impl("varlen_attention_forward", TORCH_BOX(&transfuse::varlen_attention_forward));
  m.impl("attention_backward", TORCH_BOX(&transfuse::attention_backward));
  m.impl("varlen_attention_backward", TORCH_BOX(&transfuse::varlen_attention_backward));
}
