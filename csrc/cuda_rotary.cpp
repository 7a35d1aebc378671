// rotary on a GPU: the raw ops of rotary.cpp, registered for CUDA. The arithmetic is kernels/cuda/rotary.cu.
#include "cuda/rotary.cuh"

#include <tuple>
#include <vector>

#include "cuda_device.h"
#include "rotary_checks.h"

namespace transfuse {
namespace {

using cuda::RotaryTensor;
using rotary::op;

RotaryTensor rows_view(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// [L, R/2], or [B or 1, L, R/2]: the batch has stride 0 where it shares one table.
RotaryTensor table_view(const Tensor& t) {
  const bool batched = t.dim() == 3 && t.size(0) != 1;
  return {t.const_data_ptr(), batched ? t.stride(0) : 0, 0, t.stride(t.dim() - 2), t.stride(t.dim() - 1)};
}

Tensor rotary_forward(const Tensor input, const Tensor cos, const Tensor sin, bool interleaved, bool inverse) {
  rotary::check_forward(input, cos, sin, Backend::cuda);
  const CudaCall call(op, input);
  const int64_t batch = input.size(0), heads = input.size(1), length = input.size(2), head_dim = input.size(3);
  const bool together = rotary::heads_lie_together(input);
  const std::vector<int64_t> shape = together ? std::vector<int64_t>{batch, length, heads, head_dim}
                                              : std::vector<int64_t>{batch, heads, length, head_dim};
  Tensor output = call.empty(shape, input.scalar_type());
  if (together) output = torch::stable::transpose(output, 1, 2);

  cuda::RotaryParams p{};
  p.input = rows_view(input);
  p.cos = table_view(cos);
  p.sin = table_view(sin);
  p.output = {output.mutable_data_ptr(), output.stride(0), output.stride(1), output.stride(2)};
  p.batch = batch;
  p.num_heads = heads;
  p.length = length;
  p.head_dim = head_dim;
  p.pairs = cos.size(cos.dim() - 1);
  p.float_tables = dtype_of(cos) == DType::f32;
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.heads_inner = together;
  call.check(cuda::rotary_forward(p, dtype_of(input), call.stream()));
  return output;
}

// Gradients of cos and sin. (That of the input is rotary_forward of grad_output, by the negative angle.)
std::tuple<Tensor, Tensor> rotary_backward(const Tensor grad_output, const Tensor input, const Tensor cos,
                                           bool interleaved, bool inverse) {
  rotary::check_backward(grad_output, input, cos, Backend::cuda);
  const CudaCall call(op, input);
  const Tensor grad_cos = call.empty_like_dense(cos), grad_sin = call.empty_like_dense(cos);
  cuda::RotaryTablesParams p{};
  p.grad_output = rows_view(grad_output);
  p.input = rows_view(input);
  p.grad_cos = grad_cos.mutable_data_ptr();
  p.grad_sin = grad_sin.mutable_data_ptr();
  p.batch = input.size(0);
  p.num_heads = input.size(1);
  p.length = input.size(2);
  p.pairs = cos.size(cos.dim() - 1);
  p.float_tables = dtype_of(cos) == DType::f32;
  p.shared = cos.dim() == 2 || cos.size(0) == 1;
  p.interleaved = interleaved;
  p.inverse = inverse;
  call.check(cuda::rotary_backward(p, dtype_of(input), call.stream()));
  return {grad_cos, grad_sin};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  m.impl("rotary_forward", TORCH_BOX(&rotary_forward));
  m.impl("rotary_backward", TORCH_BOX(&rotary_backward));
}

}  // namespace transfuse
