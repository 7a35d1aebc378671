// The one way to launch a kernel, and the one declaration of dynamic shared memory.
//
// This file and ptx.cuh are the only ones that know of the CPU on which tests/emulation runs these kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace transfuse::cuda {

// The shared memory that launch() was asked for, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#ifdef TRANSFUSE_EMULATION
  return ::emulation::dynamic_shared();
#else
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return shared_memory;
#endif
}

// Along x; 65,535 along y and z.
constexpr int64_t most_blocks = 0x7FFFFFFF;
// A block may have 48 KB without asking the driver first; what is left to them is for a kernel's static __shared__.
constexpr size_t shared_bytes_unasked = 32 * 1024;

// What the code of this process's GPU was compiled for ("80", also where it runs on a later GPU of that family), and the
// shared memory that a block may have there.
struct CodeTarget {
  int architecture, shared_kb;
};

template <typename Params>
cudaError_t code_target(void (*kernel)(Params), CodeTarget& target) {
  int device = 0, bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  target.shared_kb = bytes / 1024;
#ifdef TRANSFUSE_EMULATION
  static_cast<void>(kernel);
  int major = 0, minor = 0;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  target.architecture = 10 * major + minor;
#else
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  target.architecture = attributes.ptxVersion;
#endif
  return error;
}

/* Runs kernel(params) on a grid. An empty grid is no launch and no error.

     __global__ void example_kernel(const __grid_constant__ ExampleParams params);
     return launch(example_kernel, dim3(rows), dim3(256), 0, stream, params);

   cluster_blocks: neighbours along x that share their shared memory (sm_90 and later); the grid is a multiple of it.
   Returns what the launch said; what the kernel does wrong shows at a later call, as always in CUDA. */
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Params& params, unsigned cluster_blocks = 1) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
#ifdef TRANSFUSE_EMULATION
  static_cast<void>(stream);
  const auto invoke = [](void* function, const void* values) {
    reinterpret_cast<void (*)(Params)>(function)(*static_cast<const Params*>(values));
  };
  return static_cast<cudaError_t>(::emulation::launch(
      {reinterpret_cast<void*>(kernel), invoke, &params, grid, block, cluster_blocks, shared_bytes}));
#else
  if (shared_bytes > shared_bytes_unasked) {
    const cudaError_t refused =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (refused != cudaSuccess) return refused;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {cluster_blocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = cluster_blocks > 1 ? 1 : 0;
  Params copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
#endif
}

}  // namespace transfuse::cuda
