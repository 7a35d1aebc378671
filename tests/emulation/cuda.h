// CUDA's words for g++: with -include of this file a .cu compiles as C++20 and its kernels run on emulator.h.
//
// A thread is a fiber, so words like threadIdx are calls. __shared__ variables are thread_local statics: all fibers run
// on one thread of the host, and the thread_local segment of the library holds shared variables and nothing else, which
// is how the emulator knows their addresses.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

#include "cuda_runtime.h"
#include "emulator.h"

#define TRANSFUSE_EMULATION 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)
#define __shared__ static thread_local __attribute__((aligned(16)))

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())
constexpr int warpSize = 32;

// Words are always inlined, so that what a report calls the caller is the kernel's own line.
#define TRANSFUSE_WORD inline __attribute__((always_inline))

// ---- barriers ----

TRANSFUSE_WORD void __syncthreads(emulation::Site site = emulation::Site::current()) {
  emulation::block_barrier(0, emulation::all_threads, true, 0, site);
}
TRANSFUSE_WORD int __syncthreads_count(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::block_barrier(0, emulation::all_threads, true, predicate, site).count;
}
TRANSFUSE_WORD int __syncthreads_or(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::block_barrier(0, emulation::all_threads, true, predicate, site).any;
}
TRANSFUSE_WORD int __syncthreads_and(int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::block_barrier(0, emulation::all_threads, true, predicate, site).all;
}
TRANSFUSE_WORD void __syncwarp(unsigned mask = 0xffffffffu, emulation::Site site = emulation::Site::current()) {
  emulation::warp_barrier(mask, site);
}
// Fences order one thread's accesses. Between threads only barriers make an edge here, as the kernels are written.
TRANSFUSE_WORD void __threadfence_block() {}
TRANSFUSE_WORD void __threadfence() {}
[[noreturn]] TRANSFUSE_WORD void __trap(emulation::Site site = emulation::Site::current()) { emulation::trap(site); }

// ---- the warp ----

namespace emulation {
template <typename T>
TRANSFUSE_WORD T shuffle_as(Shuffle kind, unsigned mask, T value, int operand, int width, const Site& site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulation

template <typename T>
TRANSFUSE_WORD T __shfl_sync(unsigned mask, T value, int lane, int width = 32,
                             emulation::Site site = emulation::Site::current()) {
  return emulation::shuffle_as(emulation::Shuffle::index, mask, value, lane, width, site);
}
template <typename T>
TRANSFUSE_WORD T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                emulation::Site site = emulation::Site::current()) {
  return emulation::shuffle_as(emulation::Shuffle::up, mask, value, static_cast<int>(delta), width, site);
}
template <typename T>
TRANSFUSE_WORD T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                  emulation::Site site = emulation::Site::current()) {
  return emulation::shuffle_as(emulation::Shuffle::down, mask, value, static_cast<int>(delta), width, site);
}
template <typename T>
TRANSFUSE_WORD T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                                 emulation::Site site = emulation::Site::current()) {
  return emulation::shuffle_as(emulation::Shuffle::exclusive_or, mask, value, lanes, width, site);
}
TRANSFUSE_WORD unsigned __ballot_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::ballot(mask, predicate != 0, site);
}
TRANSFUSE_WORD int __any_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::ballot(mask, predicate != 0, site) != 0;
}
TRANSFUSE_WORD int __all_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::current()) {
  return emulation::ballot(mask, predicate != 0, site) == mask;
}
#define TRANSFUSE_REDUCE(word, kind)                                                                                 \
  template <typename T>                                                                                              \
  TRANSFUSE_WORD T word(unsigned mask, T value, emulation::Site site = emulation::Site::current()) {                 \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4, "redux.sync takes 32-bit integers");                      \
    return static_cast<T>(emulation::warp_reduce(emulation::Reduce::kind, mask, static_cast<int64_t>(value), site)); \
  }
TRANSFUSE_REDUCE(__reduce_add_sync, add)
TRANSFUSE_REDUCE(__reduce_min_sync, minimum)
TRANSFUSE_REDUCE(__reduce_max_sync, maximum)
TRANSFUSE_REDUCE(__reduce_and_sync, bit_and)
TRANSFUSE_REDUCE(__reduce_or_sync, bit_or)
TRANSFUSE_REDUCE(__reduce_xor_sync, bit_xor)
#undef TRANSFUSE_REDUCE

// ---- atomics ----

namespace emulation {
// Threads change only at barriers, so a plain update is atomic; uninstrumented, since check_atomic has looked at it.
template <typename T, typename Update>
__attribute__((noinline, no_sanitize("thread"))) T atomic_update(T* address, Update update) {
  check_atomic(address, sizeof(T));
  const T before = *address;
  *address = update(before);
  return before;
}
}  // namespace emulation

template <typename T>
TRANSFUSE_WORD T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulation::atomic_update(address, [=](T before) { return before + value; });
}
template <typename T>
TRANSFUSE_WORD T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulation::atomic_update(address, [=](T before) { return before < value ? value : before; });
}
template <typename T>
TRANSFUSE_WORD T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulation::atomic_update(address, [=](T before) { return value < before ? value : before; });
}
template <typename T>
TRANSFUSE_WORD T atomicOr(T* address, std::type_identity_t<T> value) {
  return emulation::atomic_update(address, [=](T before) { return before | value; });
}
template <typename T>
TRANSFUSE_WORD T atomicAnd(T* address, std::type_identity_t<T> value) {
  return emulation::atomic_update(address, [=](T before) { return before & value; });
}
template <typename T>
TRANSFUSE_WORD T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulation::atomic_update(address, [=](T) { return value; });
}
template <typename T>
TRANSFUSE_WORD T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return emulation::atomic_update(address, [=](T before) { return before == compare ? value : before; });
}

// ---- loads and stores with a cache hint: the hint is speed alone ----

template <typename T>
TRANSFUSE_WORD T __ldg(const T* address) {
  return *address;
}
template <typename T>
TRANSFUSE_WORD T __ldcs(const T* address) {
  return *address;
}
template <typename T>
TRANSFUSE_WORD T __ldcg(const T* address) {
  return *address;
}
template <typename T>
TRANSFUSE_WORD T __ldca(const T* address) {
  return *address;
}
template <typename T>
TRANSFUSE_WORD T __ldlu(const T* address) {
  return *address;
}
template <typename T>
TRANSFUSE_WORD void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
TRANSFUSE_WORD void __stcg(T* address, T value) {
  *address = value;
}
template <typename T>
TRANSFUSE_WORD void __stwb(T* address, T value) {
  *address = value;
}
template <typename T>
TRANSFUSE_WORD void __stwt(T* address, T value) {
  *address = value;
}

// ---- arithmetic ----
// The _rn words are IEEE operations: g++ rounds each so under -ffp-contract=off.

TRANSFUSE_WORD float __fadd_rn(float a, float b) { return a + b; }
TRANSFUSE_WORD float __fsub_rn(float a, float b) { return a - b; }
TRANSFUSE_WORD float __fmul_rn(float a, float b) { return a * b; }
TRANSFUSE_WORD float __fdiv_rn(float a, float b) { return a / b; }
TRANSFUSE_WORD float __frcp_rn(float a) { return 1.0f / a; }
TRANSFUSE_WORD float __fsqrt_rn(float a) { return std::sqrt(a); }
TRANSFUSE_WORD float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
TRANSFUSE_WORD double __dadd_rn(double a, double b) { return a + b; }
TRANSFUSE_WORD double __dsub_rn(double a, double b) { return a - b; }
TRANSFUSE_WORD double __dmul_rn(double a, double b) { return a * b; }
TRANSFUSE_WORD double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
TRANSFUSE_WORD float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
TRANSFUSE_WORD float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
TRANSFUSE_WORD int __float_as_int(float value) { return std::bit_cast<int>(value); }
TRANSFUSE_WORD unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
TRANSFUSE_WORD long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
TRANSFUSE_WORD double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
TRANSFUSE_WORD int __double2hiint(double value) { return static_cast<int>(__double_as_longlong(value) >> 32); }
TRANSFUSE_WORD int __double2loint(double value) { return static_cast<int>(__double_as_longlong(value)); }
TRANSFUSE_WORD double __hiloint2double(int high, int low) {
  return __longlong_as_double(static_cast<long long>(
      (static_cast<unsigned long long>(static_cast<unsigned>(high)) << 32) | static_cast<unsigned>(low)));
}
TRANSFUSE_WORD int __popc(unsigned bits) { return std::popcount(bits); }
TRANSFUSE_WORD int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
TRANSFUSE_WORD int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1; }
TRANSFUSE_WORD unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
TRANSFUSE_WORD int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
TRANSFUSE_WORD int __float2int_rz(float value) { return static_cast<int>(value); }
TRANSFUSE_WORD float __int2float_rn(int value) { return static_cast<float>(value); }
TRANSFUSE_WORD float __double2float_rn(double value) { return static_cast<float>(value); }
// Within 2 ULP on the device; here exact, since ptx.cuh is where approximations have their names.
TRANSFUSE_WORD float rsqrtf(float value) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(value))); }
TRANSFUSE_WORD double rsqrt(double value) { return 1.0 / std::sqrt(value); }
TRANSFUSE_WORD float __saturatef(float value) { return value >= 0.0f ? (value <= 1.0f ? value : 1.0f) : 0.0f; }

// CUDA's unqualified overloads.
#define TRANSFUSE_MIN_MAX(T)                                         \
  TRANSFUSE_WORD constexpr T min(T a, T b) { return b < a ? b : a; } \
  TRANSFUSE_WORD constexpr T max(T a, T b) { return a < b ? b : a; }
TRANSFUSE_MIN_MAX(int)
TRANSFUSE_MIN_MAX(unsigned)
TRANSFUSE_MIN_MAX(long)
TRANSFUSE_MIN_MAX(unsigned long)
TRANSFUSE_MIN_MAX(long long)
TRANSFUSE_MIN_MAX(unsigned long long)
#undef TRANSFUSE_MIN_MAX
TRANSFUSE_WORD float min(float a, float b) { return std::fmin(a, b); }
TRANSFUSE_WORD float max(float a, float b) { return std::fmax(a, b); }
TRANSFUSE_WORD double min(double a, double b) { return std::fmin(a, b); }
TRANSFUSE_WORD double max(double a, double b) { return std::fmax(a, b); }
