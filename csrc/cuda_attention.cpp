// attention and varlen_attention on a GPU: the raw ops of attention.cpp, registered for CUDA. The arithmetic is
// kernels/cuda/attention*.cu.
//
// Nothing is read back from the GPU: lengths and offsets are clamped where they are used, and the seed of dropout is
// looked up by the kernel, so that calls need no synchronisation and can be captured in a graph.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda_attention.h"

namespace transfuse {
namespace {

using cuda::AttentionOutput;
using cuda::AttentionParams;

AttentionSizes check_tensors(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                             int64_t ndim) {
  const bool in_float = query.scalar_type() == ScalarType::Float;
  constexpr int64_t widest_in_float = 256;
  const int64_t widest = in_float ? widest_in_float : cuda::attention_widest_head_dim();
  return check_query_key_value(op, query, key, value, ndim, Backend::cuda, widest);
}

// What a call points into and its caller does not hold.
class Problem {
 public:
  AttentionParams params{};

  Problem(const CudaCall& call, const Tensor& query, const Tensor& key, const Tensor& value, const AttentionSizes& s,
          Dims dims)
      : call_(call) {
    params.query = view(query, dims);
    params.key = view(key, dims);
    params.value = view(value, dims);
    params.num_heads = counted("attention", "the number of heads", s.num_heads);
    params.num_kv_heads = static_cast<int>(s.num_kv_heads);
    params.head_dim = static_cast<int>(s.head_dim);
    params.value_head_dim = static_cast<int>(s.value_head_dim);
    bias_in_float_ = query.scalar_type() != ScalarType::Float;
  }

  void add_options(const char* op, const AttentionOptions& o) {
    AttentionParams& p = params;
    p.bias = view(o.bias, dense_dims);
    p.bias_in_float = o.bias && bias_in_float_ && o.bias->scalar_type() == ScalarType::Float;
    if (o.alibi_slopes) {
      p.alibi_slopes = floats_of(*o.alibi_slopes);
      p.alibi_batch = o.alibi_slopes->dim() == 2 ? p.num_heads : 0;
    }
    if (o.sinks) p.sinks = floats_of(*o.sinks);
    p.kept_share = 1.0f;
    if (o.dropout_p > 0) add_dropout(o);
    p.window_left = o.left(op, cuda::attention_unbounded);
    p.window_right = o.right(op, cuda::attention_unbounded);
    p.bottom_right = o.bottom_right;
    set_scale(p, o.scale, o.softcap);
  }

 private:
  const float* floats_of(const Tensor& t) { return kept_floats(call_, t, kept_); }
  void add_dropout(const AttentionOptions& o) {
    kept_.push_back(call_.contiguous(torch::stable::to(*o.dropout_seed, ScalarType::Long)));
    params.dropout_seed = static_cast<const int64_t*>(kept_.back().const_data_ptr());
    const double threshold = std::ceil(o.dropout_p * 0x1p32);  // for an integer the same bound
    params.drops_all = threshold >= 0x1p32;
    params.dropout_threshold = params.drops_all ? 0 : static_cast<uint32_t>(threshold);
    if (o.dropout_p < 1) params.kept_share = static_cast<float>(1.0 - o.dropout_p);
  }

  const CudaCall& call_;
  bool bias_in_float_;
  std::vector<Tensor> kept_;
};

// ---- problems ----

AttentionSizes check_dense(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                           const std::optional<Tensor>& mask, const std::optional<Tensor>& seqlens_k,
                           const AttentionOptions& options) {
  const AttentionSizes s = check_tensors(op, query, key, value, 4);
  check_options(op, options, query, query.size(0), s.num_heads, query.size(2), key.size(2), Backend::cuda);
  if (mask) check_mask(op, *mask, query, key.size(2), Backend::cuda);
  if (seqlens_k) {
    check_integers(op, "seqlens_k", *seqlens_k, 1, Backend::cuda);
    check_same_device(op, "seqlens_k", *seqlens_k, query, "query");
    check_shape(op, "seqlens_k", *seqlens_k, {query.size(0)});
  }
  return s;
}

Problem dense_problem(const char* op, const CudaCall& call, const Tensor& query, const Tensor& key, const Tensor& value,
                      const std::optional<Tensor>& mask, const std::optional<Tensor>& seqlens_k,
                      const AttentionOptions& options, const AttentionSizes& s) {
  Problem problem(call, query, key, value, s, dense_dims);
  problem.add_options(op, options);
  AttentionParams& p = problem.params;
  p.mask = view(mask, dense_dims);
  if (seqlens_k) p.seqlens_k = table_of(*seqlens_k);
  p.num_sequences = query.size(0);
  p.max_seqlen_q = counted(op, "query's length", query.size(2));
  p.max_seqlen_k = counted(op, "key's length", key.size(2));
  return problem;
}

void check_offsets(const char* op, const char* argument, const Tensor& t, const Tensor& query) {
  check_integers(op, argument, t, 1, Backend::cuda);
  check_same_device(op, argument, t, query, "query");
  check(t.size(0) >= 1, op, ": ", argument, " has shape ", shape_of(t), ", expected at least one entry");
}

AttentionSizes check_packed(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                            int64_t max_seqlen_k, const AttentionOptions& options) {
  const AttentionSizes s = check_tensors(op, query, key, value, 3);
  check_offsets(op, "cu_seqlens_q", cu_seqlens_q, query);
  check_offsets(op, "cu_seqlens_k", cu_seqlens_k, query);
  check_same_shape(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q, "cu_seqlens_q");
  check(max_seqlen_q >= 0 && max_seqlen_k >= 0, op, ": max_seqlen_q and max_seqlen_k are ", max_seqlen_q, " and ",
        max_seqlen_k, ", expected at least 0");
  check_options(op, options, query, cu_seqlens_q.size(0) - 1, s.num_heads, max_seqlen_q, max_seqlen_k, Backend::cuda);
  return s;
}

Problem packed_problem(const char* op, const CudaCall& call, const Tensor& query, const Tensor& key,
                       const Tensor& value, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                       int64_t max_seqlen_q, int64_t max_seqlen_k, const AttentionOptions& options,
                       const AttentionSizes& s) {
  Problem problem(call, query, key, value, s, packed_dims);
  problem.add_options(op, options);
  AttentionParams& p = problem.params;
  p.offsets_q = table_of(cu_seqlens_q);
  p.offsets_k = table_of(cu_seqlens_k);
  p.num_sequences = cu_seqlens_q.size(0) - 1;
  p.tokens_q = query.size(0);
  p.tokens_k = key.size(0);
  // No sequence is longer than all of them together; a bias and its gradient have the size that was given.
  if (!options.bias) {
    max_seqlen_q = std::min(max_seqlen_q, p.tokens_q);
    max_seqlen_k = std::min(max_seqlen_k, p.tokens_k);
  }
  p.max_seqlen_q = counted(op, "query's longest sequence", max_seqlen_q);
  p.max_seqlen_k = counted(op, "key's longest sequence", max_seqlen_k);
  return problem;
}

// ---- forward ----

std::tuple<Tensor, Tensor> attention_forward(const Tensor query, const Tensor key, const Tensor value,
                                             std::optional<Tensor> bias, std::optional<Tensor> mask,
                                             std::optional<Tensor> seqlens_k, std::optional<Tensor> alibi_slopes,
                                             std::optional<Tensor> sinks, std::optional<Tensor> dropout_seed,
                                             double scale, bool causal, bool bottom_right, int64_t window_left,
                                             int64_t window_right, double softcap, double dropout_p) {
  const char* op = "attention";
  const AttentionOptions options{bias,         alibi_slopes, sinks,        dropout_seed, scale,    causal,
                                 bottom_right, window_left,  window_right, softcap,      dropout_p};
  const AttentionSizes s = check_dense(op, query, key, value, mask, seqlens_k, options);
  const CudaCall call(op, query);
  const int64_t batch = query.size(0), length = query.size(2);
  const Tensor output = empty_heads(op, call, batch, s.num_heads, length, s.value_head_dim, query.scalar_type());
  const Tensor lse = call.empty({batch, s.num_heads, length}, ScalarType::Float);
  Problem problem = dense_problem(op, call, query, key, value, mask, seqlens_k, options, s);
  AttentionParams& p = problem.params;
  p.output = output_view(output, dense_dims);
  p.lse = output_view(lse, dense_dims);
  call.check(cuda::attention_forward(p, dtype_of(query), call.stream()));
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
  const AttentionSizes s = check_packed(op, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                        options);
  const CudaCall call(op, query);
  const Tensor output = call.empty({query.size(0), s.num_heads, s.value_head_dim}, query.scalar_type());
  const Tensor lse = call.empty({s.num_heads, query.size(0)}, ScalarType::Float);
  Problem problem = packed_problem(op, call, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                   options, s);
  AttentionParams& p = problem.params;
  p.output = output_view(output, packed_dims);
  p.lse = output_view(lse, packed_lse_dims);
  call.check(cuda::attention_forward(p, dtype_of(query), call.stream()));
  return {output, lse};
}

// ---- backward ----

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients of what is not query, key or value: which are wanted, and bias's shape as the caller gave it, 1 where it
// broadcasts.
struct ExtraGrads {
  bool bias, alibi_slopes, sinks;
  const std::vector<int64_t>& bias_shape;
};

void check_wanted(const char* op, const AttentionOptions& options, const ExtraGrads& wanted) {
  check(!wanted.bias || options.bias, op, ": need_bias_grad is set, expected a bias");
  check(!wanted.alibi_slopes || options.alibi_slopes, op, ": need_alibi_grad is set, expected alibi_slopes");
  check(!wanted.sinks || options.sinks, op, ": need_sinks_grad is set, expected sinks");
  if (!wanted.bias) return;
  check(wanted.bias_shape.size() == 4, op, ": bias_shape has ", wanted.bias_shape.size(), " entries, expected 4");
  for (int i = 0; i < 4; ++i)
    check(wanted.bias_shape[i] == options.bias->size(i) || wanted.bias_shape[i] == 1, op, ": bias_shape[", i, "] is ",
          wanted.bias_shape[i], ", expected 1 or ", options.bias->size(i));
}

// What a backward takes beside the inputs: shapes as the forward left them.
void check_saved(const char* op, const Tensor& query, const Tensor& value, const Tensor& grad_output,
                 const std::optional<Tensor>& grad_lse, const Tensor& output, const Tensor& lse,
                 const std::vector<int64_t>& lse_shape) {
  std::vector<int64_t> output_shape(query.sizes().begin(), query.sizes().end());
  output_shape.back() = value.size(value.dim() - 1);
  const auto check_one = [&](const char* argument, const Tensor& t, ScalarType type,
                             const std::vector<int64_t>& shape) {
    check_device(op, argument, t, Backend::cuda);
    check_same_device(op, argument, t, query, "query");
    check_dtype(op, argument, t, type);
    check_shape(op, argument, t, shape);
  };
  check_one("grad_output", grad_output, query.scalar_type(), output_shape);
  check_one("output", output, query.scalar_type(), output_shape);
  check_one("lse", lse, ScalarType::Float, lse_shape);
  if (grad_lse) check_one("grad_lse", *grad_lse, ScalarType::Float, lse_shape);
}

// Zeros, written by the GPU itself.
Tensor zeros(const CudaCall& call, const std::vector<int64_t>& sizes, ScalarType type = ScalarType::Float) {
  const Tensor result = call.empty(sizes, type);
  if (result.numel())
    call.check(cudaMemsetAsync(result.mutable_data_ptr(), 0, result.numel() * result.element_size(), call.stream()));
  return result;
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Parts [N, Hq, L] that are wanted, one per row or column of each head.
class Parts {
 public:
  Parts(const CudaCall& call, bool wanted, const AttentionParams& p, int64_t length) : call_(call) {
    if (wanted) parts_ = zeros(call, {p.num_sequences, p.num_heads, length});
  }
  float* data() const { return parts_ ? floats(*parts_) : nullptr; }

  // Their sum over the dimensions in which sizes are 1, in the shape and dtype of an argument.
  Tensor summed(const std::vector<int64_t>& sizes, const std::vector<int64_t>& shape, ScalarType type) const {
    const Tensor sums = zeros(call_, shape);
    cuda::AttentionPartsParams p{floats(*parts_), floats(sums), {}, {}};
    for (int i = 0; i < 3; ++i) {
      p.sizes[i] = parts_->size(i);
      p.sizes_of_sums[i] = sizes[i];
    }
    call_.check(cuda::attention_add_parts(p, call_.stream()));
    return torch::stable::to(sums, type);
  }

 private:
  const CudaCall& call_;
  std::optional<Tensor> parts_;
};

// Where the gradient of a bias of this shape, broadcast to `whole`, has a plane of its own for a batch entry or head.
AttentionOutput bias_view(const Tensor& grad, const Tensor& whole) {
  const auto stride = [&](int dim) { return grad.size(dim) == whole.size(dim) ? grad.stride(dim) : 0; };
  return {grad.mutable_data_ptr(), stride(0), stride(1), grad.stride(2)};
}

// Runs the kernels; `grads` are of query, key and value.
Grads run_backward(const CudaCall& call, const AttentionParams& problem, const Tensor& query,
                   const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& output,
                   const Tensor& lse, const std::vector<Tensor>& grads, Dims dims, Dims lse_dims,
                   const AttentionOptions& options, const ExtraGrads& wanted) {
  const Tensor reference = call.empty_like_dense(lse), normaliser = call.empty_like_dense(lse),
               delta = call.empty_like_dense(lse);
  cuda::AttentionGradParams g{};
  g.problem = problem;
  g.grad_output = view(grad_output, dims);
  g.output = view(output, dims);
  g.lse = view(lse, lse_dims);
  g.grad_lse = view(grad_lse, lse_dims);
  g.reference = output_view(reference, lse_dims);
  g.normaliser = output_view(normaliser, lse_dims);
  g.delta = output_view(delta, lse_dims);
  g.grad_query = output_view(grads[0], dims);
  g.grad_key = output_view(grads[1], dims);
  g.grad_value = output_view(grads[2], dims);

  // A bias with rows and columns has its gradient written by the kernels, any other is a sum of parts.
  const std::vector<int64_t>& shape = wanted.bias_shape;
  const int64_t queries = problem.max_seqlen_q, keys = problem.max_seqlen_k;
  const bool by_rows = wanted.bias && shape[3] == 1 && keys != 1;
  const bool by_keys = wanted.bias && !by_rows && shape[2] == 1 && queries != 1;
  const Parts slope_parts(call, wanted.alibi_slopes, problem, queries);
  const Parts sink_parts(call, wanted.sinks, problem, queries);
  const Parts row_sums(call, by_rows, problem, queries), key_sums(call, by_keys, problem, keys);
  g.slope_parts = slope_parts.data();
  g.sink_parts = sink_parts.data();
  g.row_sums = row_sums.data();
  g.key_sums = key_sums.data();
  // Of an argument that is not there, or wants no gradient.
  const auto nothing = [&](const std::optional<Tensor>& argument) {
    return call.empty({0}, argument ? argument->scalar_type() : query.scalar_type());
  };
  Tensor grad_bias = nothing(options.bias);
  if (wanted.bias && !by_rows && !by_keys) {
    grad_bias = zeros(call, shape, options.bias->scalar_type());
    if (grad_bias.numel()) g.grad_bias = bias_view(grad_bias, *options.bias);
    g.grad_bias_batch = static_cast<int>(shape[0]);
    g.grad_bias_heads = static_cast<int>(shape[1]);
  }
  call.check(cuda::attention_backward(g, dtype_of(query), call.stream()));
  if (by_rows) grad_bias = row_sums.summed({shape[0], shape[1], shape[2]}, shape, options.bias->scalar_type());
  if (by_keys) grad_bias = key_sums.summed({shape[0], shape[1], shape[3]}, shape, options.bias->scalar_type());

  const auto per_head = [&](const Parts& parts, const Tensor& argument) {
    const std::vector<int64_t> sizes(argument.sizes().begin(), argument.sizes().end());
    return parts.summed({sizes.size() == 2 ? sizes[0] : 1, problem.num_heads, 1}, sizes, argument.scalar_type());
  };
  return {grads[0],
          grads[1],
          grads[2],
          grad_bias,
          wanted.alibi_slopes ? per_head(slope_parts, *options.alibi_slopes) : nothing(options.alibi_slopes),
          wanted.sinks ? per_head(sink_parts, *options.sinks) : nothing(options.sinks)};
}

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
  const ExtraGrads wanted{need_bias_grad, need_alibi_grad, need_sinks_grad, bias_shape};
  check_wanted(op, options, wanted);
  const AttentionSizes s = check_dense(op, query, key, value, mask, seqlens_k, options);
  const int64_t batch = query.size(0), seqlen_q = query.size(2), seqlen_k = key.size(2);
  check_saved(op, query, value, grad_output, grad_lse, output, lse, {batch, s.num_heads, seqlen_q});
  const CudaCall call(op, query);
  const ScalarType type = query.scalar_type();
  const Problem problem = dense_problem(op, call, query, key, value, mask, seqlens_k, options, s);
  const std::vector<Tensor> grads{empty_heads(op, call, batch, s.num_heads, seqlen_q, s.head_dim, type),
                                  empty_heads(op, call, batch, s.num_kv_heads, seqlen_k, s.head_dim, type),
                                  empty_heads(op, call, batch, s.num_kv_heads, seqlen_k, s.value_head_dim, type)};
  if (seqlens_k)  // keys past the length belong to nobody
    for (int i = 1; i < 3; ++i) {
      Tensor grad = grads[i];
      torch::stable::zero_(grad);
    }
  return run_backward(call, problem.params, query, grad_output, grad_lse, output, lse, grads, dense_dims, dense_dims,
                      options, wanted);
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
  const ExtraGrads wanted{need_bias_grad, need_alibi_grad, need_sinks_grad, bias_shape};
  check_wanted(op, options, wanted);
  const AttentionSizes s = check_packed(op, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                        options);
  check_saved(op, query, value, grad_output, grad_lse, output, lse, {query.size(1), query.size(0)});
  const CudaCall call(op, query);
  const Problem problem = packed_problem(op, call, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                                         max_seqlen_k, options, s);
  const std::vector<Tensor> grads{call.empty_like_dense(query), call.empty_like_dense(key),
                                  call.empty_like_dense(value)};
  return run_backward(call, problem.params, query, grad_output, grad_lse, output, lse, grads, packed_dims,
                      packed_lse_dims, options, wanted);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("varlen_attention_forward", TORCH_BOX(&varlen_attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("varlen_attention_backward", TORCH_BOX(&varlen_attention_backward));
}

}  // namespace transfuse
