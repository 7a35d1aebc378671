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
#include "parallel.h"

namespace transfuse {
namespace {

constexpr const char* op = "encoder_layer";
constexpr int64_t fewest_rows = 48;  // of one thread that are worth streaming all weights through it

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

// What follows the attention: the product of the context, a norm, the feed-forward, a norm.
struct AfterAttention {
  cpu::PackedLinearParams context, wide, narrow;
  cpu::NormForwardParams attention_norm, output_norm;
};

void* at(void* data, int64_t elements, cpu::DType dtype) {
  return static_cast<char*>(data) + elements * (dtype == cpu::DType::f32 ? 4 : 2);
}

// out = norm(update + residual), dense rows; the sum of a row lies in out until it is normalised there.
cpu::NormForwardParams add_norm(cpu::NormForwardParams norm, const void* update, const void* residual, void* out) {
  norm.input = update;
  norm.residual = residual;
  norm.sum = norm.output = out;
  return norm;
}

// Rows [begin, end) on this thread alone, each product's result still in cache where the next step wants it. `scratch`
// holds end - begin rows of both products of the feed-forward.
void run_rows(AfterAttention a, int64_t begin, int64_t end, void* scratch) {
  const auto& kernels = cpu::pick_packed_linear_kernels();
  const auto& norm_kernels = cpu::pick_layer_norm_kernels();
  const cpu::DType dtype = a.context.dtype;
  const int64_t rows = end - begin, width = a.context.out;
  const auto multiply = [&](cpu::PackedLinearParams layer, const void* input, void* output) {
    layer.input = input;
    layer.output = output;
    layer.rows = rows;
    kernels.forward(layer, 0, cpu::packed_linear_blocks(layer) * cpu::packed_linear_panels(layer.out));
  };
  const void* context = at(const_cast<void*>(a.context.input), begin * a.context.in, dtype);
  const void* hidden = at(const_cast<void*>(a.attention_norm.residual), begin * width, dtype);
  void* output = at(a.context.output, begin * width, dtype);
  void* update = at(scratch, rows * a.wide.out, dtype);
  multiply(a.context, context, output);
  norm_kernels.forward(add_norm(a.attention_norm, output, hidden, output), 0, rows);
  multiply(a.wide, output, scratch);
  multiply(a.narrow, scratch, update);
  norm_kernels.forward(add_norm(a.output_norm, update, output, output), 0, rows);
}

// Rows whose wide activations stay in the second-level cache, but not so few that streaming the weights shows.
int64_t block_rows(const cpu::PackedLinearParams& wide) {
  constexpr int64_t bytes = int64_t{512} << 10, fewest = 84;
  const int64_t rows = bytes / (wide.out * (wide.dtype == cpu::DType::f32 ? 4 : 2) + 1);
  return std::clamp(rows, fewest, cpu::packed_linear_block_rows);
}

// All rows, in blocks of nearly one size, as many for every thread.
void run_blocks(const AfterAttention& a, int64_t tokens, ScalarType type) {
  const int64_t most = block_rows(a.wide), workers = num_threads();
  const int64_t blocks = (tokens + most * workers - 1) / (most * workers) * workers;
  const Tensor scratch = empty_cpu(op, {workers, most, a.wide.out + a.context.out}, type);
  void* memory = scratch.mutable_data_ptr();
  parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t block = blocks * worker / workers; block < blocks * (worker + 1) / workers; ++block)
        run_rows(a, tokens * block / blocks, tokens * (block + 1) / blocks,
                 at(memory, worker * most * (a.wide.out + a.context.out), a.context.dtype));
  });
}

// All rows together, the columns of each product shared among the threads: for few rows, which read each weight once.
void run_columns(const AfterAttention& a, const Tensor& context, const Tensor& output) {
  const auto run_norm = [&](const cpu::NormForwardParams& norm, const Tensor& update, const void* residual) {
    const cpu::NormForwardParams p = add_norm(norm, update.const_data_ptr(), residual, output.mutable_data_ptr());
    parallel_for(0, update.size(0), norm_grain(p.cols), [&](int64_t begin, int64_t end) {
      cpu::pick_layer_norm_kernels().forward(p, begin, end);
    });
  };
  run_norm(a.attention_norm, packed_linear(context, a.context), a.attention_norm.residual);
  run_norm(a.output_norm, packed_linear(packed_linear(output, a.wide), a.narrow), output.const_data_ptr());
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
  check(hidden.dim() == 2 && hidden.is_contiguous(), op, ": hidden has shape ", shape_of(hidden),
        ", expected a contiguous (tokens, hidden_size)");
  check(num_heads >= 1 && head_dim >= 1, op, ": num_heads and head_dim are ", num_heads, " and ", head_dim,
        ", expected at least 1");
  const int64_t tokens = hidden.size(0), width = hidden.size(1), context_width = num_heads * head_dim;
  check(cu_seqlens || batch * max_seqlen == tokens, op, ": hidden has ", tokens, " tokens, expected ", batch, " x ",
        max_seqlen);
  check(!cu_seqlens || (!mask && !bias), op, ": mask or bias is given beside cu_seqlens, expected one of them");
  check_cpu(op, "hidden", hidden);
  const ScalarType type = hidden.scalar_type();
  const auto layer = [&](int64_t in, const Tensor& weight, const std::optional<Tensor>& bias, int64_t out,
                         cpu::Activation activation = cpu::Activation::none) {
    return packed_linear_params(type, in, weight, bias, out, activation);
  };
  const NormOperands attention_norm(Backend::cpu, op, hidden, attention_norm_weight, attention_norm_bias, 1, attention_norm_eps);
  const NormOperands output_norm(Backend::cpu, op, hidden, output_norm_weight, output_norm_bias, 1, output_norm_eps);
  AfterAttention after{
      layer(context_width, context_weight, context_bias, width),
      layer(width, wide_weight, wide_bias, intermediate_size, cpu::gelu_activation(tanh)),
      layer(intermediate_size, narrow_weight, narrow_bias, width),
      norm_forward_params(attention_norm),
      norm_forward_params(output_norm),
  };
  const Tensor query_key_value =
      packed_linear(hidden, layer(width, query_key_value_weight, query_key_value_bias, 3 * context_width));
  const Tensor context =
      attend(query_key_value, cu_seqlens, mask, bias, batch, max_seqlen, num_heads, head_dim, scale);
  const Tensor output = empty_cpu(op, {tokens, width}, type);
  after.context.input = context.const_data_ptr();
  after.context.output = output.mutable_data_ptr();
  after.attention_norm.residual = hidden.const_data_ptr();
  tokens < num_threads() * fewest_rows ? run_columns(after, context, output) : run_blocks(after, tokens, type);
  return output;
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
