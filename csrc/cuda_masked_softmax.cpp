// masked_softmax on a GPU: the raw ops of masked_softmax.cpp, registered for CUDA. The arithmetic is
// kernels/cuda/masked_softmax.cu, and masked_softmax_mask.cu for the mask's own gradient.
#include "cuda/masked_softmax.cuh"

#include <vector>

#include "cuda_device.h"
#include "masked_softmax_checks.h"

namespace transfuse {
namespace {

using masked_softmax::op;

// Dimensions as sizes and strides in the order of an index's digits, neighbours merged where one stride serves both.
class MergedDims {
 public:
  void add(int64_t size, int64_t stride) {
    if (size == 1) return;
    if (!sizes_.empty() && strides_.back() == stride * size) {
      sizes_.back() *= size;
      strides_.back() = stride;
      return;
    }
    sizes_.push_back(size);
    strides_.push_back(stride);
  }
  bool fits() const { return sizes_.size() <= cuda::max_outer_dims; }
  // Returns their number.
  int write(int64_t* sizes, int64_t* strides) const {
    for (size_t i = 0; i < sizes_.size(); ++i) {
      sizes[i] = sizes_[i];
      strides[i] = strides_[i];
    }
    return static_cast<int>(sizes_.size());
  }

 private:
  std::vector<int64_t> sizes_, strides_;
};

MergedDims outer_dims(const Tensor& mask) {
  MergedDims dims;
  for (int64_t d = 0; d + 1 < mask.dim(); ++d) dims.add(mask.size(d), mask.stride(d));
  return dims;
}

// mask is expanded to input's shape (stride 0 where it is broadcast).
Tensor masked_softmax_forward(Tensor input, std::optional<Tensor> mask, double scale, bool causal, bool bottom_right) {
  masked_softmax::check_forward(input, mask, scale, causal, Backend::cuda);
  cuda::MaskedSoftmaxParams p{};
  if (mask) p.mask_kind = masked_softmax::mask_kind<cuda::MaskKind>(*mask, input);
  const CudaCall call(op, input);
  input = call.contiguous(input);
  const Tensor output = call.empty_like_dense(input);
  if (input.numel() == 0) return output;
  const int64_t dims = input.dim();
  if (mask) {
    if (!outer_dims(*mask).fits()) mask = call.contiguous(*mask);
    p.mask = mask->const_data_ptr();
    p.mask_stride = mask->stride(dims - 1);
    p.outer_dims = outer_dims(*mask).write(p.outer_sizes, p.outer_mask_strides);
  }
  p.input = input.const_data_ptr();
  p.output = output.mutable_data_ptr();
  p.keys = input.size(dims - 1);
  p.queries = dims >= 2 ? input.size(dims - 2) : 1;
  p.rows = input.numel() / p.keys;
  p.scale = static_cast<float>(scale);
  p.scale_rest = static_cast<float>(scale - p.scale);
  p.causal = causal;
  p.causal_offset = bottom_right ? p.keys - p.queries : 0;
  call.check(cuda::masked_softmax_forward(p, dtype_of(input), call.stream()));
  return output;
}

// grad_output and output must be contiguous.
cuda::MaskedSoftmaxGradParams grad_params(const Tensor& grad_output, const Tensor& output, double scale) {
  cuda::MaskedSoftmaxGradParams p{};
  p.grad_output = grad_output.const_data_ptr();
  p.output = output.const_data_ptr();
  p.keys = output.size(output.dim() - 1);
  p.rows = output.numel() / p.keys;
  p.scale = static_cast<float>(scale);
  return p;
}

Tensor masked_softmax_backward(Tensor grad_output, Tensor output, double scale) {
  masked_softmax::check_backward(grad_output, output, Backend::cuda);
  masked_softmax::check_scale(scale);
  const CudaCall call(op, output);
  grad_output = call.contiguous(grad_output);
  output = call.contiguous(output);
  const Tensor grad_input = call.empty_like_dense(output);
  if (output.numel() == 0) return grad_input;
  cuda::MaskedSoftmaxGradParams p = grad_params(grad_output, output, scale);
  p.grad_input = grad_input.mutable_data_ptr();
  call.check(cuda::masked_softmax_backward(p, dtype_of(output), call.stream()));
  return grad_input;
}

// Gradient of an additive mask of as many dimensions as output, size 1 where it was broadcast; float32, the caller
// rounds.
Tensor masked_softmax_mask_backward(Tensor grad_output, Tensor output, Tensor mask) {
  masked_softmax::check_backward(grad_output, output, Backend::cuda);
  masked_softmax::check_mask_backward(output, mask);
  const CudaCall call(op, output);
  Tensor grad_mask = call.empty(mask.sizes().data(), mask.dim(), ScalarType::Float);
  if (grad_mask.numel() == 0) return grad_mask;
  if (output.numel() == 0) return torch::stable::zero_(grad_mask);
  grad_output = call.contiguous(grad_output);
  output = call.contiguous(output);
  cuda::MaskedSoftmaxGradParams means_of = grad_params(grad_output, output, 1.0);
  const Tensor means = call.empty({means_of.rows, 2}, ScalarType::Float);
  means_of.means = static_cast<float*>(means.mutable_data_ptr());
  call.check(cuda::masked_softmax_backward(means_of, dtype_of(output), call.stream()));

  cuda::MaskGradParams p{};
  MergedDims base, shift;
  int64_t rows_apart = 1;  // of dimension d, in rows of the output
  std::vector<int64_t> strides(output.dim());
  for (int64_t d = output.dim() - 2; d >= 0; --d) {
    strides[d] = rows_apart;
    rows_apart *= output.size(d);
  }
  p.mask_rows = p.repeats = 1;
  for (int64_t d = 0; d + 1 < output.dim(); ++d) {
    const bool broadcast = mask.size(d) == 1;
    (broadcast ? shift : base).add(output.size(d), strides[d]);
    (broadcast ? p.repeats : p.mask_rows) *= output.size(d);
  }
  check(base.fits() && shift.fits(), op, ": mask is broadcast in more than ", cuda::max_outer_dims,
        " separate dimensions");
  p.base_dims = base.write(p.base_sizes, p.base_strides);
  p.shift_dims = shift.write(p.shift_sizes, p.shift_strides);
  p.grad_output = means_of.grad_output;
  p.output = means_of.output;
  p.means = means_of.means;
  p.keys = means_of.keys;
  p.mask_keys = mask.size(mask.dim() - 1);
  p.chunks = cuda::mask_grad_chunks(p.repeats);
  const Tensor lines = call.empty({p.chunks, p.mask_rows * p.keys}, ScalarType::Float);
  const Tensor sums = call.empty({p.mask_keys == p.keys ? 0 : p.mask_rows * p.keys}, ScalarType::Float);
  p.lines = static_cast<float*>(lines.mutable_data_ptr());
  p.grad_mask = static_cast<float*>(grad_mask.mutable_data_ptr());
  p.sums = p.mask_keys == p.keys ? p.grad_mask : static_cast<float*>(sums.mutable_data_ptr());
  call.check(cuda::masked_softmax_mask_backward(p, dtype_of(output), call.stream()));
  return grad_mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transfuse, CUDA, m) {
  m.impl("masked_softmax_forward", TORCH_BOX(&masked_softmax_forward));
  m.impl("masked_softmax_backward", TORCH_BOX(&masked_softmax_backward));
  m.impl("masked_softmax_mask_backward", TORCH_BOX(&masked_softmax_mask_backward));
}

}  // namespace transfuse
