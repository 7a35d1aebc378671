// Which tensors of attention can be read in vectors of 16 bytes, or in pairs of elements: decided once per call.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/vector.cuh"

namespace transfuse::cuda {

// Every row begins on a boundary; of a chunk that the last column cuts, cp.async reads a part.
template <class T>
bool whole_rows(const AttentionTensor& t) {
  const auto whole = [](int64_t stride) { return stride % width<T> == 0; };
  return t.col == 1 && reinterpret_cast<uintptr_t>(t.data) % vector_bytes == 0 && whole(t.batch) && whole(t.head) &&
      whole(t.row);
}
template <class T>
bool whole_rows(const AttentionOutput& t, int columns) {
  return whole_rows<T>(AttentionTensor{t.data, t.batch, t.head, t.row, 1}) && columns % width<T> == 0;
}

// Two neighbouring keys, the first of them even, are one access of `bytes`.
inline bool aligned_pairs(const AttentionTensor& t, int64_t element_bytes) {
  const auto even = [](int64_t stride) { return stride % 2 == 0; };
  return t.data && t.col == 1 && reinterpret_cast<uintptr_t>(t.data) % (2 * element_bytes) == 0 && even(t.batch) &&
      even(t.head) && even(t.row);
}

}  // namespace transfuse::cuda
