// The one way a kernel starts, and the one way it sees its dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace transfuse::cuda {

// Starts `kernel` with its one parameter. An error of the launch itself comes back; one of the kernel comes later.
template <class Params>
cudaError_t launch(void (*kernel)(const Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Params& params) {
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream);
}

}  // namespace transfuse::cuda
