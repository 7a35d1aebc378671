// Host side of rotary: schemas, checks, allocation, threads. The arithmetic is kernels/cpu/rotary.cpp.
#include "cpu/rotary.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "allocate.h"
#include "parallel.h"
#include "rotary_checks.h"

namespace transfuse {
namespace {

using cpu::RotaryTensor;

using rotary::op;

constexpr int64_t min_elements_per_task = 16384;  // below this a second thread costs more than it brings

int64_t grain(int64_t elements_per_row) {
  return std::max<int64_t>(1, min_elements_per_task / std::max<int64_t>(1, elements_per_row));
}

RotaryTensor rows_view(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), kernel_dtype(op, "input", t)};
}

// [L, R/2], or [B or 1, L, R/2]: the batch has stride 0 where it shares one table.
RotaryTensor table_view(const char* argument, const Tensor& t) {
  const bool batched = t.dim() == 3 && t.size(0) != 1;
  return {t.const_data_ptr(), batched ? t.stride(0) : 0, 0, t.stride(t.dim() - 2), t.stride(t.dim() - 1),
          kernel_dtype(op, argument, t)};
}

Tensor rotary_forward(const Tensor input, const Tensor cos, const Tensor sin, bool interleaved, bool inverse) {
  rotary::check_forward(input, cos, sin, Backend::cpu);
  const int64_t batch = input.size(0), heads = input.size(1), length = input.size(2), head_dim = input.size(3);
  const bool together = rotary::heads_lie_together(input);
  const std::vector<int64_t> shape = together ? std::vector<int64_t>{batch, length, heads, head_dim}
                                              : std::vector<int64_t>{batch, heads, length, head_dim};
  Tensor output = empty_cpu(op, shape, input.scalar_type());
  if (together) output = torch::stable::transpose(output, 1, 2);
  if (output.numel() == 0) return output;

  cpu::RotaryParams p{};
  p.input = rows_view(input);
  p.cos = table_view("cos", cos);
  p.sin = table_view("sin", sin);
  p.output = {output.mutable_data_ptr(), output.stride(0), output.stride(1), output.stride(2)};
  p.num_heads = heads;
  p.length = length;
  p.head_dim = head_dim;
  p.pairs = cos.size(cos.dim() - 1);
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.heads_inner = together;
  const auto& kernels = cpu::pick_rotary_kernels();
  parallel_for(0, batch * heads * length, grain(head_dim),
               [&](int64_t begin, int64_t end) { kernels.rotate(p, begin, end); });
  return output;
}

// Gradients of cos and sin. (That of the input is rotary_forward of grad_output, by the negative angle.)
std::tuple<Tensor, Tensor> rotary_backward(const Tensor grad_output, const Tensor input, const Tensor cos,
                                           bool interleaved, bool inverse) {
  rotary::check_backward(grad_output, input, cos, Backend::cpu);
  const Tensor grad_cos = empty_like_dense(op, cos), grad_sin = empty_like_dense(op, cos);
  if (cos.numel() == 0) return {grad_cos, grad_sin};

  cpu::RotaryTablesParams p{};
  p.grad_output = rows_view(grad_output);
  p.input = rows_view(input);
  p.grad_cos = grad_cos.mutable_data_ptr();
  p.grad_sin = grad_sin.mutable_data_ptr();
  p.batch = input.size(0);
  p.num_heads = input.size(1);
  p.length = input.size(2);
  p.pairs = cos.size(cos.dim() - 1);
  p.dtype = kernel_dtype(op, "cos", cos);
  p.shared = cos.dim() == 2 || cos.size(0) == 1;
  p.interleaved = interleaved;
  p.inverse = inverse;
  const int64_t table_rows = cos.numel() / p.pairs;
  const auto& kernels = cpu::pick_rotary_kernels();
  parallel_for(0, table_rows, grain(input.numel() / table_rows),
               [&](int64_t begin, int64_t end) { kernels.table_gradients(p, begin, end); });
  return {grad_cos, grad_sin};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("rotary_forward(Tensor input, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor");
  m.def(
      "rotary_backward(Tensor grad_output, Tensor input, Tensor cos, bool interleaved, bool inverse)"
      " -> (Tensor grad_cos, Tensor grad_sin)");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("rotary_forward", TORCH_BOX(&rotary_forward));
  m.impl("rotary_backward", TORCH_BOX(&rotary_backward));
}

}  // namespace transfuse
