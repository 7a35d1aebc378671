// What CUDA's words (cuda.h) and the emulation branches of launch.cuh and ptx.cuh ask of the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "vector_types.h"

namespace emulation {

// The place in the kernel's source that a barrier or a warp-wide instruction stands at.
using Site = std::source_location;

// Constant for as long as a thread lives, so that the compiler may keep them in registers.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] unsigned char* dynamic_shared();
[[gnu::const]] unsigned cluster_rank();
[[gnu::const]] unsigned cluster_size();

// Runs a grid to its end. invoke(kernel, params) runs the kernel as one thread.
struct Launch {
  void* kernel;
  void (*invoke)(void* kernel, const void* params);
  const void* params;
  dim3 grid, block;
  unsigned cluster;
  size_t shared_bytes;
};
int launch(const Launch& launch);  // a cudaError_t

// ---- barriers ----

constexpr int all_threads = 0;
struct Votes {
  int count;
  bool any, all;
};
// bar.sync / bar.arrive on barrier 0..15; threads == all_threads means every thread of the block that has not exited.
Votes block_barrier(int barrier, int threads, bool waits, int predicate, const Site& site);
void cluster_barrier(const Site& site);
// Where the same shared variable lies in another block of the cluster.
void* cluster_shared(const void* address, unsigned rank);

// ---- the warp ----

enum class Shuffle { index, up, down, exclusive_or };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int operand, int width, const Site& site);
unsigned ballot(unsigned mask, bool predicate, const Site& site);
enum class Reduce { add, minimum, maximum, bit_and, bit_or, bit_xor };
int64_t warp_reduce(Reduce kind, unsigned mask, int64_t value, const Site& site);
void warp_barrier(unsigned mask, const Site& site);

// ---- memory ----

// An atomic read-modify-write: checked like a write that does not race with other atomics. The caller does it,
// uninstrumented.
void check_atomic(void* address, size_t bytes);
void copy_async(void* shared, const void* global, int bytes, int source_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);

// ---- tensor cores ----

// ldmatrix: lane i brings the address of row i % 8 of matrix i / 8, and takes one register per matrix.
void load_matrix(int matrices, bool transposed, const void* row, uint32_t* registers, const Site& site);
enum class Operand { f16, bf16, tf32 };
// mma.sync m16n8k16 (f16, bf16) and m16n8k8 (tf32): d += a * b, fragments as in the PTX ISA.
void multiply_accumulate(Operand type, float* d, const uint32_t* a, const uint32_t* b, const Site& site);

// ---- approximate instructions, as wrong as their documents allow ----

float exp2_approx(float x);
float reciprocal_approx(float x);
float rsqrt_approx(float x);

// __trap() and what else ends a launch.
[[noreturn]] void trap(const Site& site);

}  // namespace emulation
