// Dense uninitialised CPU tensors without the dispatcher: torch::stable::new_empty looks the op up by name and boxes
// its arguments on each call (1 to 2 us), this is 0.3 us, and an op on a single row has three results to allocate.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <vector>

namespace transfuse {

// Set by tests (_C.set_nan_filled_empty): every byte 0xFF, a NaN in all floating dtypes, so that an element never
// written shows. torch's own fill_uninitialized_memory does not reach tensors made here.
inline bool nan_filled_empty = false;

inline torch::stable::Tensor empty_cpu(const int64_t* sizes, int64_t dim, torch::headeronly::ScalarType type) {
  constexpr int64_t inline_dims = 8;
  int64_t inline_strides[inline_dims];
  std::vector<int64_t> more_strides(dim > inline_dims ? dim : 0);
  int64_t* strides = dim > inline_dims ? more_strides.data() : inline_strides;
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(type),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  torch::stable::Tensor result(handle);
  if (nan_filled_empty && result.numel())
    std::memset(result.mutable_data_ptr(), 0xFF, result.numel() * result.element_size());
  return result;
}
inline torch::stable::Tensor empty_cpu(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type) {
  return empty_cpu(sizes.data(), static_cast<int64_t>(sizes.size()), type);
}
inline torch::stable::Tensor empty_like_dense(const torch::stable::Tensor& t) {
  return empty_cpu(t.sizes().data(), t.dim(), t.scalar_type());
}

}  // namespace transfuse
