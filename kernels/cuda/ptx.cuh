// Every instruction written as PTX, one named function each; nothing else in the tree contains asm.
//
// Each function has its cases in tests/emulation/ptx_cases.py, taken from the PTX ISA document, which the emulator of
// tests/emulation and a GPU both have to pass. This file and launch.cuh are the only ones that know of that emulator.
// Source: https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <cstdint>

#ifdef TRANSFUSE_EMULATION
// The instruction stands where it is called: that place is what the emulator compares and reports.
#define TRANSFUSE_SITE , const ::emulation::Site& site = ::emulation::Site::current()
#else
#define TRANSFUSE_SITE
#endif

namespace transfuse::cuda::ptx {

// Where something lies in shared memory, as a number.
#ifdef TRANSFUSE_EMULATION
using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* pointer) { return reinterpret_cast<SharedAddress>(pointer); }
#else
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}
#endif

// ---- cp.async: global to shared memory, past the registers ----

// Bytes (4, 8 or 16) to an address of shared memory; both aligned to Bytes. Of the source only source_bytes are read,
// the rest is zero. Nothing may touch the target before cp_async_wait and, in other threads, a barrier after it.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int source_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef TRANSFUSE_EMULATION
  ::emulation::copy_async(shared, global, Bytes, source_bytes);
#else
  if constexpr (Bytes == 16)  // .cg: past L1, only in this size
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(source_bytes)
                 : "memory");
#endif
}

// The copies issued since the last commit become a group.
__device__ __forceinline__ void cp_async_commit() {
#ifdef TRANSFUSE_EMULATION
  ::emulation::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most GroupsLeft of this thread's newest groups are under way.
template <int GroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
#ifdef TRANSFUSE_EMULATION
  ::emulation::copy_async_wait(GroupsLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#endif
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements from shared memory into mma's fragments ----

// Lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned) and receives of each matrix elements
// (i / 4, 2 * (i % 4)) and the one to its right; Transposed: the one below, of the transposed matrix. All lanes call
// it.
template <int Matrices, bool Transposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&registers)[Matrices], SharedAddress row TRANSFUSE_SITE) {
  static_assert(Matrices == 1 || Matrices == 2 || Matrices == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef TRANSFUSE_EMULATION
  ::emulation::load_matrix(Matrices, Transposed, reinterpret_cast<const void*>(row), registers, site);
#else
  if constexpr (Matrices == 1 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(registers[0]) : "r"(row) : "memory");
  if constexpr (Matrices == 1 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(row)
                 : "memory");
  if constexpr (Matrices == 2 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(row)
                 : "memory");
  if constexpr (Matrices == 2 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(row)
                 : "memory");
  if constexpr (Matrices == 4 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(row)
                 : "memory");
  if constexpr (Matrices == 4 && Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(row)
                 : "memory");
#endif
}

// ---- mma.sync: d += a * b of one warp, float32 accumulators ----

// a: 16x16 by rows, b: 16x8 by columns, d: 16x8. Element pairs of a lie at rows i / 4 (+ 8 in registers 1 and 3) and
// columns 2 * (i % 4) (+ 8 in registers 2 and 3); of b at rows 2 * (i % 4) (+ 8 in register 1) and column i / 4; of d
// at rows i / 4 (+ 8 in 2 and 3) and columns 2 * (i % 4) (+ 1 in 1 and 3).
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2] TRANSFUSE_SITE) {
#ifdef TRANSFUSE_EMULATION
  ::emulation::multiply_accumulate(::emulation::Operand::f16, d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2] TRANSFUSE_SITE) {
#ifdef TRANSFUSE_EMULATION
  ::emulation::multiply_accumulate(::emulation::Operand::bf16, d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// tf32 has k = 8 and one element per register: a at rows i / 4 (+ 8 in 1 and 3), columns i % 4 (+ 4 in 2 and 3); b at
// rows i % 4 (+ 4 in 1), column i / 4. The operands' last 13 bits are ignored.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2] TRANSFUSE_SITE) {
#ifdef TRANSFUSE_EMULATION
  ::emulation::multiply_accumulate(::emulation::Operand::tf32, d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- approximations; .ftz: subnormal arguments and results are 0 ----

// 2^x within 2 ULP.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef TRANSFUSE_EMULATION
  return ::emulation::exp2_approx(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// 1 / x within 1 ULP.
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef TRANSFUSE_EMULATION
  return ::emulation::reciprocal_approx(x);
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// 1 / sqrt(x) within a relative error of 2^-22.9.
__device__ __forceinline__ float rsqrt_approx(float x) {
#ifdef TRANSFUSE_EMULATION
  return ::emulation::rsqrt_approx(x);
#else
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// ---- no instruction at all ----

// x, of which the compiler knows no more: what is made of it is made where it is used, and holds no register before.
template <class T>
__device__ __forceinline__ T opaque(T x) {
#ifndef TRANSFUSE_EMULATION
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// ---- named barriers: bar 1..15 of a part of the block (0 is __syncthreads) ----

// Waits until `threads` threads (whole warps) have come to the barrier, by sync or by arrive.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads TRANSFUSE_SITE) {
#ifdef TRANSFUSE_EMULATION
  ::emulation::block_barrier(barrier, threads, true, 0, site);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

// Counts at the barrier and goes on.
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads TRANSFUSE_SITE) {
#ifdef TRANSFUSE_EMULATION
  ::emulation::block_barrier(barrier, threads, false, 0, site);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
#endif
}

// ---- clusters (sm_90 and later): blocks that read each other's shared memory ----

__device__ __forceinline__ unsigned cluster_rank() {
#ifdef TRANSFUSE_EMULATION
  return ::emulation::cluster_rank();
#else
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#ifdef TRANSFUSE_EMULATION
  return ::emulation::cluster_size();
#else
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#endif
}

// Every thread of every block of the cluster; memory is ordered. No block may exit while another reads its memory.
#ifdef TRANSFUSE_EMULATION
inline void cluster_sync(const ::emulation::Site& site = ::emulation::Site::current()) {
  ::emulation::cluster_barrier(site);
}
#else
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif

// Where this block's shared `pointer` lies in block `rank` of the cluster.
template <typename T>
__device__ __forceinline__ T* cluster_shared(T* pointer, unsigned rank) {
#ifdef TRANSFUSE_EMULATION
  return static_cast<T*>(::emulation::cluster_shared(pointer, rank));
#else
  T* mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
  return mapped;
#endif
}

#undef TRANSFUSE_SITE
}  // namespace transfuse::cuda::ptx
