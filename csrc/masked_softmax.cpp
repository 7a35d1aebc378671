// masked_softmax: checks, allocation, threads. The arithmetic is kernels/cpu/masked_softmax.cpp.
#include "allocate.h"
#include "masked_softmax_checks.h"
#include "parallel.h"

#include "cpu/masked_softmax.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace transfuse {
namespace {

using masked_softmax::op;

constexpr int64_t elements_per_task = 16384;  // below this a second thread costs more than it brings

int64_t rows_per_task(int64_t keys) { return std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, keys)); }

// mask is expanded to input's shape (stride 0 where it is broadcast).
Tensor masked_softmax_forward(Tensor input, std::optional<Tensor> mask, double scale, bool causal, bool bottom_right) {
  masked_softmax::check_forward(input, mask, scale, causal, Backend::cpu);
  const int64_t dims = input.dim();
  cpu::MaskedSoftmaxParams p{};
  p.dtype = dtype_of(input);
  if (mask) {
    p.mask_kind = masked_softmax::mask_kind<cpu::MaskKind>(*mask, input);
    p.mask = mask->const_data_ptr();
  }
  input = contiguous(op, input);
  Tensor output = empty_like_dense(op, input);
  if (input.numel() == 0) return output;

  std::vector<int64_t> outer_sizes, mask_strides;
  for (int64_t d = 0; d < dims; ++d) {
    if (d + 1 < dims) outer_sizes.push_back(input.size(d));
    if (mask) mask_strides.push_back(mask->stride(d));
  }
  p.input = input.const_data_ptr();
  p.output = output.mutable_data_ptr();
  p.keys = input.size(dims - 1);
  p.queries = dims >= 2 ? input.size(dims - 2) : 1;
  p.outer_dims = dims - 1;
  p.outer_sizes = outer_sizes.data();
  p.mask_strides = mask_strides.data();
  p.scale = scale;
  p.causal = causal;
  p.causal_offset = bottom_right ? p.keys - p.queries : 0;
  const auto& kernels = cpu::pick_masked_softmax_kernels();
  parallel_for(0, input.numel() / p.keys, rows_per_task(p.keys), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(cpu::masked_softmax_scratch(p));
    kernels.forward(p, begin, end, scratch.data());
  });
  return output;
}

// grad_output and output must be contiguous.
cpu::MaskedSoftmaxGradParams grad_params(const Tensor& grad_output, const Tensor& output, double scale) {
  cpu::MaskedSoftmaxGradParams p{};
  p.grad_output = grad_output.const_data_ptr();
  p.output = output.const_data_ptr();
  p.keys = output.size(output.dim() - 1);
  p.scale = scale;
  p.dtype = kernel_dtype(op, "output", output);
  return p;
}

Tensor masked_softmax_backward(Tensor grad_output, Tensor output, double scale) {
  masked_softmax::check_backward(grad_output, output, Backend::cpu);
  masked_softmax::check_scale(scale);
  grad_output = contiguous(op, grad_output);
  output = contiguous(op, output);
  Tensor grad_input = empty_like_dense(op, output);
  if (output.numel() == 0) return grad_input;
  cpu::MaskedSoftmaxGradParams p = grad_params(grad_output, output, scale);
  p.grad_input = grad_input.mutable_data_ptr();
  const auto& kernels = cpu::pick_masked_softmax_kernels();
  parallel_for(0, output.numel() / p.keys, rows_per_task(p.keys),
                              [&](int64_t begin, int64_t end) { kernels.backward(p, begin, end); });
  return grad_input;
}

// Which row of the mask each row of the output used, as rows grouped by mask row, ascending within each group.
struct RowsOfMask {
  std::vector<int64_t> rows, first;  // rows of mask row m: rows[first[m]], ..., rows[first[m + 1] - 1]
};

RowsOfMask group_rows(const Tensor& output, const Tensor& mask) {
  const int64_t outer = output.dim() - 1;
  int64_t count = 1, mask_rows = 1;
  for (int64_t d = 0; d < outer; ++d) {
    count *= output.size(d);
    mask_rows *= mask.size(d);
  }
  std::vector<int64_t> used(count);
  for (int64_t row = 0; row < count; ++row) {
    int64_t rest = row, stride = 1;
    for (int64_t d = outer - 1; d >= 0; --d) {
      if (mask.size(d) != 1) used[row] += rest % output.size(d) * stride;
      stride *= mask.size(d);
      rest /= output.size(d);
    }
  }
  RowsOfMask groups{std::vector<int64_t>(count), std::vector<int64_t>(mask_rows + 1)};
  for (int64_t m : used) ++groups.first[m + 1];
  for (int64_t m = 0; m < mask_rows; ++m) groups.first[m + 1] += groups.first[m];
  std::vector<int64_t> next = groups.first;
  for (int64_t row = 0; row < count; ++row) groups.rows[next[used[row]]++] = row;
  return groups;
}

// Gradient of an additive mask of as many dimensions as output, size 1 where it was broadcast. Each mask element sums its
// rows in ascending order in double, whatever the number of threads. The result is float64 beside a float64 output, else
// float32; the caller rounds to the mask's dtype.
Tensor masked_softmax_mask_backward(Tensor grad_output, Tensor output, Tensor mask) {
  masked_softmax::check_backward(grad_output, output, Backend::cpu);
  masked_softmax::check_mask_backward(output, mask);
  grad_output = contiguous(op, grad_output);
  output = contiguous(op, output);
  const ScalarType result_type = output.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor grad_mask = zeros_cpu(op, std::vector<int64_t>(mask.sizes().begin(), mask.sizes().end()), result_type);
  if (output.numel() == 0) return grad_mask;
  const cpu::MaskedSoftmaxGradParams p = grad_params(grad_output, output, 1.0);
  const RowsOfMask groups = group_rows(output, mask);
  const int64_t mask_keys = mask.size(mask.dim() - 1);
  void* result = grad_mask.mutable_data_ptr();
  const auto put = [&](int64_t at, double sum) {
    if (result_type == ScalarType::Double) {
      static_cast<double*>(result)[at] = sum;
    } else {
      static_cast<float*>(result)[at] = static_cast<float>(sum);
    }
  };
  const auto& kernels = cpu::pick_masked_softmax_kernels();
  parallel_for(0, static_cast<int64_t>(groups.first.size()) - 1, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(p.keys);
    for (int64_t m = begin; m < end; ++m) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t i = groups.first[m]; i < groups.first[m + 1]; ++i) kernels.add_score_gradient(p, groups.rows[i], sums.data());
      if (mask_keys == p.keys) {
        for (int64_t j = 0; j < p.keys; ++j) put(m * mask_keys + j, sums[j]);
      } else {
        double total = 0.0;
        for (double sum : sums) total += sum;
        put(m, total);
      }
    }
  });
  return grad_mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(transfuse, m) {
  m.def("masked_softmax_forward(Tensor input, Tensor? mask, float scale, bool causal, bool bottom_right) -> Tensor");
  m.def("masked_softmax_backward(Tensor grad_output, Tensor output, float scale) -> Tensor");
  m.def("masked_softmax_mask_backward(Tensor grad_output, Tensor output, Tensor mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(transfuse, CPU, m) {
  m.impl("masked_softmax_forward", TORCH_BOX(&masked_softmax_forward));
  m.impl("masked_softmax_backward", TORCH_BOX(&masked_softmax_backward));
  m.impl("masked_softmax_mask_backward", TORCH_BOX(&masked_softmax_mask_backward));
}

}  // namespace transfuse
