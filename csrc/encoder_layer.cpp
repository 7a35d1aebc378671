// One post-norm encoder layer in one call: products, attention and norms of this folder, one after the other.
//
// Between them Python and its dispatcher would take longer than the arithmetic of a short text does.
#include <algorithm>
#include <optional>
#include <tuple>

#include "allocate.h"
#include "attention.h"
#include "checks.h"
#include "cpu/layer_norm.h"
#include "norm.h"
#include "packed_linear.h"

namespace transfuse {
namespace {

constexpr const char* op = "encoder_layer";
constexpr int64_t piece_rows = 256;  // whose wide activations stay in the second-level cache

// The context [tokens, heads * head_dim] of packed sequences, or of a padded batch with or without a mask or bias.
Tensor attend(const Tensor& query_key_value, const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& mask,
              const std::optional<Tensor>& bias, int64_t batch, int64_t max_seqlen, int64_t heads, int64_t head_dim,
              double scale) {
  const int64_t tokens = query_key_value.size(0), width = heads * head_dim, step = 3 * width;
  constexpr bool causal = false, bottom_right = false;
  constexpr int64_t no_window = -1;
  constexpr double no_softcap = 0, no_dropout = 0;
  const auto part = [&](int64_t index) {
    return cu_seqlens ? view_of(op, query_key_value, {tokens, heads, head_dim}, {step, head_dim, 1}, index * width)
                      : view_of(op, query_key_value, {batch, heads, max_seqlen, head_dim},
                                {max_seqlen * step, head_dim, step, 1}, index * width);
  };
  const Tensor query = part(0), key = part(1), value = part(2);
  const Tensor context = std::get<0>(
      cu_seqlens ? varlen_attention_forward(query, key, value, *cu_seqlens, *cu_seqlens, {}, {}, {}, {}, max_seqlen,
                                            max_seqlen, scale, causal, bottom_right, no_window, no_window, no_softcap,
                                            no_dropout)
                 : attention_forward(query, key, value, bias, mask, {}, {}, {}, {}, scale, causal, bottom_right,
                                     no_window, no_window, no_softcap, no_dropout));
  return view_of(op, context, {tokens, width}, {width, 1});
}

// residual = LayerNorm(update + residual), row by row.
void add_norm_into(const Tensor& residual, const Tensor& update, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps, const Tensor& out) {
  norm_forward(NormOperands(op, update, weight, bias, 1, eps), residual, cpu::pick_layer_norm_kernels(), out);
}

Tensor encoder_layer(const Tensor hidden, std::optional<Tensor> cu_seqlens, std::optional<Tensor> mask,
                     std::optional<Tensor> bias, int64_t batch, int64_t max_seqlen, int64_t num_heads, int64_t head_dim,
                     double scale, const Tensor query_key_value_weight, std::optional<Tensor> query_key_value_bias,
                     const Tensor context_weight, std::optional<Tensor> context_bias,
                     std::optional<Tensor> attention_norm_weight, std::optional<Tensor> attention_norm_bias,
                     double attention_norm_eps, const Tensor wide_weight, std::optional<Tensor> wide_bias,
                     const Tensor narrow_weight, std::optional<Tensor> narrow_bias,
                     std::optional<Tensor> output_norm_weight, std::optional<Tensor> output_norm_bias,
                     double output_norm_eps, int64_t intermediate_size, bool tanh) {
  constexpr cpu::Activation none = cpu::Activation::none;
  check(hidden.dim() == 2 && hidden.is_contiguous(), op, ": hidden has shape ", shape_of(hidden),
        ", expected a contiguous (tokens, hidden_size)");
  check(num_heads >= 1 && head_dim >= 1, op, ": num_heads and head_dim are ", num_heads, " and ", head_dim,
        ", expected at least 1");
  const int64_t tokens = hidden.size(0), width = hidden.size(1);
  check(cu_seqlens || batch * max_seqlen == tokens, op, ": hidden has ", tokens, " tokens, expected ", batch, " x ",
        max_seqlen);
  const Tensor query_key_value =
      packed_linear(hidden, query_key_value_weight, query_key_value_bias, 3 * num_heads * head_dim, none);
  const Tensor context =
      attend(query_key_value, cu_seqlens, mask, bias, batch, max_seqlen, num_heads, head_dim, scale);
  const Tensor attended = packed_linear(context, context_weight, context_bias, width, none);
  add_norm_into(hidden, attended, attention_norm_weight, attention_norm_bias, attention_norm_eps, attended);
  for (int64_t begin = 0; begin < tokens; begin += piece_rows) {
    const Tensor rows =
        view_of(op, attended, {std::min(piece_rows, tokens - begin), width}, {width, 1}, begin * width);
    const Tensor wide = packed_linear(rows, wide_weight, wide_bias, intermediate_size, cpu::gelu_activation(tanh));
    const Tensor update = packed_linear(wide, narrow_weight, narrow_bias, width, none);
    add_norm_into(rows, update, output_norm_weight, output_norm_bias, output_norm_eps, rows);
  }
  return attended;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def(
      "encoder_layer(Tensor hidden, Tensor? cu_seqlens, Tensor? mask, Tensor? bias, int batch, int max_seqlen, "
      "int num_heads, int head_dim, float scale, Tensor query_key_value_weight, Tensor? query_key_value_bias, "
      "Tensor context_weight, Tensor? context_bias, Tensor? attention_norm_weight, Tensor? attention_norm_bias, "
      "float attention_norm_eps, Tensor wide_weight, Tensor? wide_bias, Tensor narrow_weight, Tensor? narrow_bias, "
      "Tensor? output_norm_weight, Tensor? output_norm_bias, float output_norm_eps, int intermediate_size, bool tanh) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) { m.impl("encoder_layer", TORCH_BOX(&encoder_layer)); }

}  // namespace transfuse
