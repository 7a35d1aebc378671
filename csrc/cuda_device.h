// What the ops of _C_cuda share: the GPU and the stream of a call, memory on it, and errors of CUDA in the op's words.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "allocate.h"
#include "checks.h"

namespace transfuse {

inline void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

// torch's current stream. Its getter lives in libtorch_cuda, which _C_cuda does not link: it is looked up at the first
// launch, in the library as torch has loaded it, so that the module also imports beside a torch without CUDA.
inline cudaStream_t current_stream(const char* op, int32_t device) {
  using Getter = int32_t (*)(int32_t device, void** stream);
  constexpr const char* name = "aoti_torch_get_current_cuda_stream";
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Getter>(dlsym(library ? library : RTLD_DEFAULT, name));
  }();
  if (!getter)
    throw std::runtime_error(std::string(op) + ": this torch is built without CUDA (it has no " + name + ")");
  void* stream = nullptr;
  if (getter(device, &stream))
    throw std::runtime_error(std::string(op) + ": torch has no current stream on this device");
  return static_cast<cudaStream_t>(stream);
}

// Why an allocation failed. A GPU that cannot be asked any more is lost to an error of an earlier kernel: callers that
// answer "out of memory" with smaller batches must not be misled.
inline std::string allocation_failure() {
  size_t free = 0, total = 0;
  const cudaError_t error = cudaMemGetInfo(&free, &total);
  return error == cudaSuccess ? " (CUDA out of memory)" : std::string(" (CUDA error: ") + cudaGetErrorString(error) + ")";
}

// One call of an op on the GPU where `input` lies: that GPU is the current one as long as this lives.
class CudaCall {
 public:
  CudaCall(const char* op, const Tensor& input)
      : op_(op), device_(input.get_device_index()), guard_(device_), stream_(current_stream(op, device_)) {}

  cudaStream_t stream() const { return stream_; }
  // What a launcher returned.
  void check(cudaError_t error) const { check_cuda(op_, error); }

  Tensor empty(const int64_t* sizes, int64_t dim, ScalarType type) const {
    Tensor result = allocate(op_, sizes, dim, type, aoti_torch_device_type_cuda(), device_, allocation_failure);
    if (nan_filled_empty && result.numel())
      check(cudaMemsetAsync(result.mutable_data_ptr(), 0xFF, result.numel() * result.element_size(), stream_));
    return result;
  }
  Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) const {
    return empty(sizes.data(), static_cast<int64_t>(sizes.size()), type);
  }
  Tensor empty_like_dense(const Tensor& t) const { return empty(t.sizes().data(), t.dim(), t.scalar_type()); }
  Tensor contiguous(const Tensor& t) const {
    if (t.is_contiguous()) return t;
    Tensor result = empty_like_dense(t);
    return torch::stable::copy_(result, t);
  }
  std::optional<Tensor> contiguous(const std::optional<Tensor>& t) const {
    return t ? std::optional<Tensor>(contiguous(*t)) : std::nullopt;
  }

 private:
  const char* op_;
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace transfuse
