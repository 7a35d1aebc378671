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

#include "attention_checks.h"
#include "cuda/attention.cuh"
#include "cuda_device.h"

namespace transfuse {
namespace {

using cuda::AttentionOutput;
using cuda::AttentionParams;
using cuda::AttentionTensor;

// Where a tensor keeps batch, head, row and column; -1 for a dimension that it does not have.
struct Dims {
  int batch, head, row, col;
};
constexpr Dims dense_dims{0, 1, 2, 3}, packed_dims{-1, 1, 0, 2}, packed_lse_dims{-1, 0, 1, -1};

int64_t stride_of(const Tensor& t, int dim) { return dim < 0 || dim >= t.dim() ? 0 : t.stride(dim); }

AttentionTensor view(const Tensor& t, Dims d) {
  return {t.const_data_ptr(), stride_of(t, d.batch), stride_of(t, d.head), stride_of(t, d.row), stride_of(t, d.col)};
}
AttentionTensor view(const std::optional<Tensor>& t, Dims d) {
  return t ? view(*t, d) : AttentionTensor{nullptr, 0, 0, 0, 0};
}
AttentionOutput output_view(const Tensor& t, Dims d) {
  return {t.mutable_data_ptr(), stride_of(t, d.batch), stride_of(t, d.head), stride_of(t, d.row)};
}
cuda::IntegerTable table_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.scalar_type() == ScalarType::Long};
}

// A length as the kernels count it.
int counted(const char* op, const char* argument, int64_t length) {
  constexpr int64_t most = int64_t{1} << 30;  // so that a sum of two is an int
  check(length >= 0 && length <= most, op, ": ", argument, " is ", length, ", expected at most ", most);
  return static_cast<int>(length);
}

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
    p.scale = static_cast<float>(o.scale);
    p.softcap = static_cast<float>(o.softcap);
    // A tiny cap makes 0 * largest of a score of 0.
    constexpr double largest = std::numeric_limits<float>::max();
    if (o.softcap > 0)
      p.scale_over_softcap = static_cast<float>(std::clamp(o.scale / o.softcap, -largest, largest));
    // The largest product is the largest score where the scale is positive.
    p.transforms = o.bias || o.alibi_slopes || o.softcap > 0 || !(p.scale > 0);
    p.logit_scale = p.transforms ? 1.0f : p.scale;
  }

 private:
  // As floats, adjacent, whatever dtype and strides they came in.
  const float* floats_of(const Tensor& t) {
    kept_.push_back(call_.contiguous(torch::stable::to(t, ScalarType::Float)));
    return static_cast<const float*>(kept_.back().const_data_ptr());
  }
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

std::tuple<Tensor, Tensor> attention_forward(const Tensor query, const Tensor key, const Tensor value,
                                             std::optional<Tensor> bias, std::optional<Tensor> mask,
                                             std::optional<Tensor> seqlens_k, std::optional<Tensor> alibi_slopes,
                                             std::optional<Tensor> sinks, std::optional<Tensor> dropout_seed,
                                             double scale, bool causal, bool bottom_right, int64_t window_left,
                                             int64_t window_right, double softcap, double dropout_p) {
  const char* op = "attention";
  const AttentionOptions options{bias,         alibi_slopes, sinks,        dropout_seed, scale,    causal,
                                 bottom_right, window_left,  window_right, softcap,      dropout_p};
  const AttentionSizes s = check_tensors(op, query, key, value, 4);
  const int64_t batch = query.size(0), seqlen_q = query.size(2), seqlen_k = key.size(2);
  check_options(op, options, query, batch, s.num_heads, seqlen_q, seqlen_k, Backend::cuda);
  if (mask) check_mask(op, *mask, query, seqlen_k, Backend::cuda);
  if (seqlens_k) {
    check_integers(op, "seqlens_k", *seqlens_k, 1, Backend::cuda);
    check_same_device(op, "seqlens_k", *seqlens_k, query, "query");
    check_shape(op, "seqlens_k", *seqlens_k, {batch});
  }
  const CudaCall call(op, query);
  // A [B, H, L, D] view of [B, L, H, D] memory: heads of one token lie together, as the next projection wants them.
  const Tensor memory = call.empty({batch, seqlen_q, s.num_heads, s.value_head_dim}, query.scalar_type());
  const Tensor output = view_of(op, memory, {batch, s.num_heads, seqlen_q, s.value_head_dim},
                                {memory.stride(0), memory.stride(2), memory.stride(1), memory.stride(3)});
  const Tensor lse = call.empty({batch, s.num_heads, seqlen_q}, ScalarType::Float);
  Problem problem(call, query, key, value, s, dense_dims);
  problem.add_options(op, options);
  AttentionParams& p = problem.params;
  p.mask = view(mask, dense_dims);
  if (seqlens_k) p.seqlens_k = table_of(*seqlens_k);
  p.num_sequences = batch;
  p.max_seqlen_q = counted(op, "query's length", seqlen_q);
  p.max_seqlen_k = counted(op, "key's length", seqlen_k);
  p.output = output_view(output, dense_dims);
  p.lse = output_view(lse, dense_dims);
  call.check(cuda::attention_forward(p, dtype_of(query), call.stream()));
  return {output, lse};
}

void check_offsets(const char* op, const char* argument, const Tensor& t, const Tensor& query) {
  check_integers(op, argument, t, 1, Backend::cuda);
  check_same_device(op, argument, t, query, "query");
  check(t.size(0) >= 1, op, ": ", argument, " has shape ", shape_of(t), ", expected at least one entry");
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
  const AttentionSizes s = check_tensors(op, query, key, value, 3);
  check_offsets(op, "cu_seqlens_q", cu_seqlens_q, query);
  check_offsets(op, "cu_seqlens_k", cu_seqlens_k, query);
  check_same_shape(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q, "cu_seqlens_q");
  check(max_seqlen_q >= 0 && max_seqlen_k >= 0, op, ": max_seqlen_q and max_seqlen_k are ", max_seqlen_q, " and ",
        max_seqlen_k, ", expected at least 0");
  const int64_t count = cu_seqlens_q.size(0) - 1;
  check_options(op, options, query, count, s.num_heads, max_seqlen_q, max_seqlen_k, Backend::cuda);
  const CudaCall call(op, query);
  const int64_t tokens_q = query.size(0), tokens_k = key.size(0);
  const Tensor output = call.empty({tokens_q, s.num_heads, s.value_head_dim}, query.scalar_type());
  const Tensor lse = call.empty({s.num_heads, tokens_q}, ScalarType::Float);
  Problem problem(call, query, key, value, s, packed_dims);
  problem.add_options(op, options);
  AttentionParams& p = problem.params;
  p.offsets_q = table_of(cu_seqlens_q);
  p.offsets_k = table_of(cu_seqlens_k);
  p.num_sequences = count;
  p.tokens_q = tokens_q;
  p.tokens_k = tokens_k;
  p.max_seqlen_q = counted(op, "query's longest sequence", std::min(max_seqlen_q, tokens_q));
  p.max_seqlen_k = counted(op, "key's longest sequence", std::min(max_seqlen_k, tokens_k));
  p.output = output_view(output, packed_dims);
  p.lse = output_view(lse, packed_lse_dims);
  call.check(cuda::attention_forward(p, dtype_of(query), call.stream()));
  return {output, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("varlen_attention_forward", TORCH_BOX(&varlen_attention_forward));
}

}  // namespace transfuse
