// csrc/cuda_<op>.cpp for g++ and the emulator: the very host code of _C_cuda, on tensors that lie in CPU memory.
//
// Included in front of it, this file takes "cuda" for "cpu", registers the ops under a name of the test's own, and
// tells the emulator of every tensor that the host code makes.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "cuda_runtime.h"

// memory.cpp: 1 initialised, 2 uninitialised. What is registered here is forgotten when the call is over.
extern "C" void emulation_register_made(uintptr_t begin, size_t bytes, int contents);

namespace emulation {

inline AOTITorchError empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                    int32_t device_type, int32_t, AtenTensorHandle* made) {
  const AOTITorchError error = aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, 0, made);
  if (error) return error;
  void* data = nullptr;
  int64_t elements = 0;
  aoti_torch_get_data_ptr(*made, &data);
  aoti_torch_get_numel(*made, &elements);
  const size_t bytes = static_cast<size_t>(elements) * aoti_torch_dtype_element_size(dtype);
  constexpr size_t touched_bytes = size_t{1} << 28;            // beyond, memory that is not touched is not there
  if (bytes <= touched_bytes) std::memset(data, 0xff, bytes);  // NaN in every dtype
  emulation_register_made(reinterpret_cast<uintptr_t>(data), bytes, 2);
  return error;
}

struct NoDeviceGuard {
  explicit NoDeviceGuard(int32_t) {}
};

inline int32_t current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

inline void* look_up(void*, const char* name) {
  return std::strcmp(name, "aoti_torch_get_current_cuda_stream") == 0 ? reinterpret_cast<void*>(current_stream)
                                                                      : nullptr;
}

}  // namespace emulation

namespace torch::stable {

// A copy that the host has made is initialised.
inline Tensor emulated_copy_(Tensor& to, const Tensor& from) {
  copy_(to, from);
  emulation_register_made(reinterpret_cast<uintptr_t>(to.data_ptr()),
                          static_cast<size_t>(to.numel() * to.element_size()), 1);
  return to;
}

namespace accelerator {
using NoDeviceGuard = ::emulation::NoDeviceGuard;
}

}  // namespace torch::stable

#define is_cuda is_cpu
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define aoti_torch_empty_strided ::emulation::empty_strided
#define copy_ emulated_copy_
#define DeviceGuard NoDeviceGuard
#define dlsym ::emulation::look_up
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name_space, key, module) \
  _STABLE_TORCH_LIBRARY_IMPL(TRANSFUSE_EMULATED_NAMESPACE, CPU, module, C10_UID)
