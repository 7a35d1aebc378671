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
#include "checks.h"
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
using cpu::DType;

constexpr int64_t max_head_dim = 512;
// multiply-adds (about 15 us) below which waking a second thread costs more than it saves
constexpr double serial_work = 2e5;

// ---- views ----

// Where a tensor keeps batch, head, row and column; -1 for a dimension that it does not have.
struct Dims {
  int batch, head, row, col;
};
constexpr Dims dense_dims{0, 1, 2, 3}, packed_dims{-1, 1, 0, 2}, packed_lse_dims{-1, 0, 1, -1};

int64_t stride_of(const Tensor& t, int dim) { return dim < 0 || dim >= t.dim() ? 0 : t.stride(dim); }

DType storage_of(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16 ? DType::bf16 : DType::f32; }

AttentionTensor view(const Tensor& t, Dims d) {
  return {t.const_data_ptr(), stride_of(t, d.batch), stride_of(t, d.head), stride_of(t, d.row), stride_of(t, d.col),
          storage_of(t)};
}
AttentionTensor view(const std::optional<Tensor>& t, Dims d) {
  return t ? view(*t, d) : AttentionTensor{nullptr, 0, 0, 0, 0, DType::f32};
}
AttentionOutput output_view(const Tensor& t, Dims d) {
  return {t.mutable_data_ptr(), stride_of(t, d.batch), stride_of(t, d.head), stride_of(t, d.row), storage_of(t)};
}

// A [B, H, L, D] view of [B, L, H, D] memory: heads of one token lie together, as the next projection wants them.
Tensor allocate_heads(const char* op, int64_t batch, int64_t heads, int64_t length, int64_t dim, ScalarType type,
                      bool zero) {
  const std::vector<int64_t> shape{batch, length, heads, dim};
  return torch::stable::transpose(zero ? zeros_cpu(op, shape, type) : empty_cpu(op, shape, type), 1, 2);
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

// ---- checks ----

void check_shape(const char* op, const char* argument, const Tensor& t, const std::vector<int64_t>& expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == expected[i];
  if (same) return;
  std::ostringstream text;
  for (size_t i = 0; i < expected.size(); ++i) text << (i ? ", " : "") << expected[i];
  check(false, op, ": ", argument, " has shape ", shape_of(t), ", expected (", text.str(),
        expected.size() == 1 ? ",)" : ")");
}

struct Sizes {
  int64_t num_heads, num_kv_heads, head_dim, value_head_dim;
};

// query, key, value agree with each other; head_dim is the last dimension and the heads are in dimension 1.
Sizes check_query_key_value(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, int64_t ndim) {
  const Tensor* tensors[] = {&query, &key, &value};
  const char* names[] = {"query", "key", "value"};
  for (int i = 0; i < 3; ++i) {
    check_cpu(op, names[i], *tensors[i]);
    kernel_dtype(op, names[i], *tensors[i]);
    check_dtype(op, names[i], *tensors[i], query.scalar_type());
    check(tensors[i]->dim() == ndim, op, ": ", names[i], " has shape ", shape_of(*tensors[i]), ", expected ", ndim,
          " dimensions");
    const int64_t dim = tensors[i]->size(ndim - 1);
    check(dim >= 1 && dim <= max_head_dim, op, ": ", names[i], " has head_dim ", dim, ", expected 1 to ", max_head_dim);
  }
  const Sizes s{query.size(1), key.size(1), query.size(ndim - 1), value.size(ndim - 1)};
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

int64_t integer_at(const Tensor& t, int64_t i) {
  const int64_t offset = i * t.stride(0);
  return t.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(t.const_data_ptr())[offset]
                                            : static_cast<const int64_t*>(t.const_data_ptr())[offset];
}

void check_integers(const char* op, const char* argument, const Tensor& t) {
  check_cpu(op, argument, t);
  check(t.scalar_type() == ScalarType::Int || t.scalar_type() == ScalarType::Long, op, ": ", argument, " has dtype ",
        name_of(t.scalar_type()), ", expected int32 or int64");
  check(t.dim() == 1, op, ": ", argument, " has shape ", shape_of(t), ", expected one dimension");
}

// ---- problems ----

struct Problem {
  AttentionParams params;
  std::vector<AttentionSequence> sequences;
  int64_t tasks = 0;
  double work = 0;  // multiply-adds of the forward

  void add(int64_t batch, int64_t query_row, int64_t key_row, int64_t seqlen_q, int64_t seqlen_k) {
    sequences.push_back({batch, query_row, key_row, seqlen_q, seqlen_k, 0});
    params.max_seqlen_k = std::max(params.max_seqlen_k, seqlen_k);
    work += static_cast<double>(params.num_heads) * seqlen_q * seqlen_k * (params.head_dim + params.value_head_dim);
  }
  // Cuts the queries into tasks: long blocks use a packed key most often, short ones give every thread something to do.
  void finish() {
    constexpr int64_t longest = 128, shortest = 32, tasks_per_thread = 4;
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

AttentionParams common_params(const Tensor& query, const Tensor& key, const Tensor& value, const Sizes& s, Dims dims,
                              double scale, bool causal, bool bottom_right) {
  AttentionParams p{};
  p.query = view(query, dims);
  p.key = view(key, dims);
  p.value = view(value, dims);
  p.num_heads = s.num_heads;
  p.num_kv_heads = s.num_kv_heads;
  p.head_dim = s.head_dim;
  p.value_head_dim = s.value_head_dim;
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.bottom_right = bottom_right;
  return p;
}

Problem dense_problem(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& mask, const std::optional<Tensor>& seqlens_k, double scale,
                      bool causal, bool bottom_right) {
  const char* op = "attention";
  const Sizes s = check_query_key_value(op, query, key, value, 4);
  const int64_t batch = query.size(0), seqlen_q = query.size(2), seqlen_k = key.size(2);
  const std::vector<int64_t> score_shape{batch, s.num_heads, seqlen_q, seqlen_k};
  if (bias) {
    check_cpu(op, "bias", *bias);
    kernel_dtype(op, "bias", *bias);
    check_shape(op, "bias", *bias, score_shape);
  }
  if (mask) {
    check_cpu(op, "mask", *mask);
    check_dtype(op, "mask", *mask, ScalarType::Bool);
    check_shape(op, "mask", *mask, score_shape);
  }
  if (seqlens_k) {
    check_integers(op, "seqlens_k", *seqlens_k);
    check_shape(op, "seqlens_k", *seqlens_k, {batch});
  }
  Problem problem;
  problem.params = common_params(query, key, value, s, dense_dims, scale, causal, bottom_right);
  problem.params.bias = view(bias, dense_dims);
  problem.params.mask = view(mask, dense_dims);
  problem.sequences.reserve(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t valid = seqlens_k ? integer_at(*seqlens_k, b) : seqlen_k;
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
  int64_t before = 0;
  for (int64_t i = 0; i < t.size(0); ++i) {
    const int64_t value = integer_at(t, i);
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
                       const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                       bool causal, bool bottom_right) {
  const char* op = "varlen_attention";
  const Sizes s = check_query_key_value(op, query, key, value, 3);
  check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.size(0), "query", max_seqlen_q, "max_seqlen_q");
  check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key.size(0), "key", max_seqlen_k, "max_seqlen_k");
  check_same_shape(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q, "cu_seqlens_q");
  Problem problem;
  problem.params = common_params(query, key, value, s, packed_dims, scale, causal, bottom_right);
  const int64_t count = cu_seqlens_q.size(0) - 1;
  problem.sequences.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t q = integer_at(cu_seqlens_q, i), k = integer_at(cu_seqlens_k, i);
    problem.add(0, q, k, integer_at(cu_seqlens_q, i + 1) - q, integer_at(cu_seqlens_k, i + 1) - k);
  }
  problem.finish();
  return problem;
}

// ---- forward ----

void run_forward(const char* op, const Problem& problem, const Tensor& output, const Tensor& lse, Dims dims,
                 Dims lse_dims) {
  const AttentionForwardParams params{problem.params, output_view(output, dims), output_view(lse, lse_dims)};
  const cpu::AttentionKernels& kernels = cpu::pick_attention_kernels();
  run_tasks(op, problem.tasks, problem.work, kernels.forward_scratch_bytes(params),
            [&](char* scratch, int64_t begin, int64_t end) { kernels.forward(params, scratch, begin, end); });
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor query, const Tensor key, const Tensor value,
                                             std::optional<Tensor> bias, std::optional<Tensor> mask,
                                             std::optional<Tensor> seqlens_k, double scale, bool causal,
                                             bool bottom_right) {
  const char* op = "attention";
  const Problem problem = dense_problem(query, key, value, bias, mask, seqlens_k, scale, causal, bottom_right);
  const int64_t batch = query.size(0), heads = query.size(1), length = query.size(2);
  const Tensor output = allocate_heads(op, batch, heads, length, value.size(3), query.scalar_type(), false);
  const Tensor lse = empty_cpu(op, {batch, heads, length}, ScalarType::Float);
  run_forward(op, problem, output, lse, dense_dims, dense_dims);
  return {output, lse};
}

std::tuple<Tensor, Tensor> varlen_attention_forward(const Tensor query, const Tensor key, const Tensor value,
                                                    const Tensor cu_seqlens_q, const Tensor cu_seqlens_k,
                                                    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                    bool causal, bool bottom_right) {
  const char* op = "varlen_attention";
  const Problem problem = packed_problem(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                         scale, causal, bottom_right);
  const Tensor output = empty_cpu(op, {query.size(0), query.size(1), value.size(2)}, query.scalar_type());
  const Tensor lse = empty_cpu(op, {query.size(1), query.size(0)}, ScalarType::Float);
  run_forward(op, problem, output, lse, packed_dims, packed_lse_dims);
  return {output, lse};
}

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
  check_dtype(op, "lse", lse, ScalarType::Float);
  check_shape(op, "lse", lse, lse_shape);
  if (!grad_lse) return;
  check_cpu(op, "grad_lse", *grad_lse);
  check_dtype(op, "grad_lse", *grad_lse, ScalarType::Float);
  check_shape(op, "grad_lse", *grad_lse, lse_shape);
}

// One task per key/value head of a sequence; where tasks would add to one bias gradient, one task does them in order.
void run_backward(const char* op, const Problem& problem, const AttentionBackwardParams& params, bool share_batch,
                  bool share_heads) {
  constexpr double products_per_forward = 2.5;
  const cpu::AttentionKernels& kernels = cpu::pick_attention_kernels();
  const int64_t sequences = params.problem.num_sequences, kv_heads = params.problem.num_kv_heads;
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

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(const Tensor grad_output, std::optional<Tensor> grad_lse,
                                                              const Tensor query, const Tensor key,
                                                              const Tensor value, const Tensor output,
                                                              const Tensor lse, std::optional<Tensor> bias,
                                                              std::optional<Tensor> mask,
                                                              std::optional<Tensor> seqlens_k, double scale,
                                                              bool causal, bool bottom_right,
                                                              std::vector<int64_t> bias_shape, bool need_bias_grad) {
  const char* op = "attention";
  const Problem problem = dense_problem(query, key, value, bias, mask, seqlens_k, scale, causal, bottom_right);
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
                                 {nullptr, 0, 0, 0, 0}};
  params.problem.lse = view(lse, dense_dims);
  if (!need_bias_grad) {
    run_backward(op, problem, params, false, false);
    return {grad_query, grad_key, grad_value, empty_cpu(op, {0}, type)};
  }
  check(bias.has_value(), op, ": need_bias_grad is set, expected a bias");
  const int64_t full[] = {batch, heads, seqlen_q, seqlen_k};
  check(bias_shape.size() == 4, op, ": bias_shape has ", bias_shape.size(), " entries, expected 4");
  int64_t strides[4], stride = 1;
  for (int i = 3; i >= 0; --i) {
    check(bias_shape[i] == full[i] || bias_shape[i] == 1, op, ": bias_shape[", i, "] is ", bias_shape[i],
          ", expected 1 or ", full[i]);
    strides[i] = bias_shape[i] == full[i] ? stride : 0;
    stride *= bias_shape[i];
  }
  const Tensor grad_bias = zeros_cpu(op, bias_shape, ScalarType::Double);
  params.grad_bias = {static_cast<double*>(grad_bias.mutable_data_ptr()), strides[0], strides[1], strides[2],
                      strides[3]};
  run_backward(op, problem, params, bias_shape[0] != batch, bias_shape[1] != heads);
  return {grad_query, grad_key, grad_value, torch::stable::to(grad_bias, bias->scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(const Tensor grad_output, std::optional<Tensor> grad_lse,
                                                             const Tensor query, const Tensor key, const Tensor value,
                                                             const Tensor output, const Tensor lse,
                                                             const Tensor cu_seqlens_q, const Tensor cu_seqlens_k,
                                                             int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                                                             bool causal, bool bottom_right) {
  const char* op = "varlen_attention";
  const Problem problem = packed_problem(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                         scale, causal, bottom_right);
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
                                 {nullptr, 0, 0, 0, 0}};
  params.problem.lse = view(lse, packed_lse_dims);
  run_backward(op, problem, params, false, false);
  return {grad_query, grad_key, grad_value};
}

}  // namespace
}  // namespace transfuse

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? seqlens_k, "
      "float scale, bool causal, bool bottom_right) -> (Tensor, Tensor)");
  m.def(
      "varlen_attention_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "int max_seqlen_q, int max_seqlen_k, float scale, bool causal, bool bottom_right) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor output, Tensor lse, Tensor? bias, Tensor? mask, Tensor? seqlens_k, float scale, bool causal, "
      "bool bottom_right, int[] bias_shape, bool need_bias_grad) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "varlen_attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor output, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
      "float scale, bool causal, bool bottom_right) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&transfuse::attention_forward));
  m.impl("varlen_attention_forward", TORCH_BOX(&transfuse::varlen_attention_forward));
  m.impl("attention_backward", TORCH_BOX(&transfuse::attention_backward));
  m.impl("varlen_attention_backward", TORCH_BOX(&transfuse::varlen_attention_backward));
}
