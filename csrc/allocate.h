// Dense uninitialised tensors without the dispatcher: torch::stable::new_empty looks the op up by name and boxes
// its arguments on each call (1 to 2 us), this is 0.3 us on the CPU, and an op on a single row has three results.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace transfuse {

// Set by tests (set_nan_filled_empty of each module): every byte 0xFF, a NaN in all floating dtypes, so that an element
// never written shows. torch's own fill_uninitialized_memory does not reach tensors made here.
inline bool nan_filled_empty = false;

// CONTRACT section 5: an allocation that fails names the op and the bytes. In double, since the product may overflow.
[[noreturn]] inline void could_not_allocate(const char* op, double bytes, const std::string& why = "") {
  std::ostringstream text;
  text.precision(0);
  text << op << ": could not allocate " << std::fixed << bytes << " bytes" << why;
  throw std::runtime_error(text.str());
}

// A large result lies in pages that the system clears when they are first written, 4 KiB at a time at 2 to 5 GB/s: twice
// what the op itself takes. In huge pages that is four times as fast. Advice, which a system may refuse; only whole huge
// pages within the tensor are named, so that no memory is taken beyond it.
inline void prefer_huge_pages(const torch::stable::Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge_page = uintptr_t{2} << 20, least = 2 * huge_page;
  const uintptr_t bytes = t.numel() * t.element_size();
  if (bytes < least) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t begin = (data + huge_page - 1) & ~(huge_page - 1), end = (data + bytes) & ~(huge_page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// rows * columns elements, all 0 or false.
template <class T>
std::vector<T> zero_vector(const char* op, int64_t rows, int64_t columns = 1) {
  int64_t count;
  if (!__builtin_mul_overflow(rows, columns, &count)) {
    try {
      return std::vector<T>(count);
    } catch (const std::bad_alloc&) {
    } catch (const std::length_error&) {
    }
  }
  could_not_allocate(op, static_cast<double>(rows) * columns * sizeof(T));
}

// On the device of that type (aoti_torch_device_type_*) and index. `why` ends the words of a failed allocation.
inline torch::stable::Tensor allocate(const char* op, const int64_t* sizes, int64_t dim,
                                      torch::headeronly::ScalarType type, int32_t device_type, int32_t device_index,
                                      std::string (*why)() = nullptr) {
  constexpr int64_t inline_dims = 8;
  int64_t inline_strides[inline_dims];
  std::vector<int64_t> more_strides(dim > inline_dims ? dim : 0);
  int64_t* strides = dim > inline_dims ? more_strides.data() : inline_strides;
  const auto bytes = [&] {
    double product = static_cast<double>(aoti_torch_dtype_element_size(static_cast<int32_t>(type)));
    for (int64_t i = 0; i < dim; ++i) product *= static_cast<double>(sizes[i]);
    return product;
  };
  const auto failed = [&] { could_not_allocate(op, bytes(), why ? why() : ""); };
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    if (__builtin_mul_overflow(stride, sizes[i] > 1 ? sizes[i] : 1, &stride)) failed();
  }
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(type), device_type, device_index, &handle))
    failed();
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor empty_cpu(const char* op, const int64_t* sizes, int64_t dim,
                                       torch::headeronly::ScalarType type) {
  torch::stable::Tensor result = allocate(op, sizes, dim, type, aoti_torch_device_type_cpu(), 0);
  prefer_huge_pages(result);
  if (nan_filled_empty && result.numel())
    std::memset(result.mutable_data_ptr(), 0xFF, result.numel() * result.element_size());
  return result;
}
inline torch::stable::Tensor empty_cpu(const char* op, const std::vector<int64_t>& sizes,
                                       torch::headeronly::ScalarType type) {
  return empty_cpu(op, sizes.data(), static_cast<int64_t>(sizes.size()), type);
}
inline torch::stable::Tensor zeros_cpu(const char* op, const std::vector<int64_t>& sizes,
                                       torch::headeronly::ScalarType type) {
  torch::stable::Tensor result = empty_cpu(op, sizes, type);
  return torch::stable::zero_(result);
}
inline torch::stable::Tensor empty_like_dense(const char* op, const torch::stable::Tensor& t) {
  return empty_cpu(op, t.sizes().data(), t.dim(), t.scalar_type());
}

// Another view of a tensor's memory, `offset` elements after its first; torch::stable's own go through the dispatcher, 2 us.
inline torch::stable::Tensor view_of(const char* op, const torch::stable::Tensor& t, std::initializer_list<int64_t> sizes,
                                     std::initializer_list<int64_t> strides, int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  if (aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), offset,
                                     &handle))
    throw std::runtime_error(std::string(op) + ": could not make a view");
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor contiguous(const char* op, const torch::stable::Tensor& t) {
  if (t.is_contiguous()) return t;
  torch::stable::Tensor result = empty_like_dense(op, t);
  return torch::stable::copy_(result, t);
}
inline std::optional<torch::stable::Tensor> contiguous(const char* op, const std::optional<torch::stable::Tensor>& t) {
  return t ? std::optional<torch::stable::Tensor>(contiguous(op, *t)) : std::nullopt;
}

}  // namespace transfuse
