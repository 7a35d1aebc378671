// Kernels of a few lines for test_emulation_machine.py: one feature of the machine, or one mistake, each.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace {

namespace ptx = transfuse::cuda::ptx;
using transfuse::cuda::dynamic_shared;

constexpr unsigned whole_warp = 0xffffffffu;

struct Params {
  const int* in;
  int* out;
  int64_t n;
};

// ---- what works ----

__global__ void indices(const __grid_constant__ Params p) {
  const int64_t block = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int64_t at = block * blockDim.x * blockDim.y * blockDim.z + thread;
  if (at < p.n) p.out[at] = static_cast<int>(at);
}

__global__ void reverse_through_shared(const __grid_constant__ Params p) {
  __shared__ int values[1024];
  values[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

template <typename T>
__device__ T* shared_of_template() {
  __shared__ T values[64];
  return values;
}

__global__ void two_instances_of_a_template(const __grid_constant__ Params p) {
  shared_of_template<int>()[threadIdx.x] = p.in[threadIdx.x];
  shared_of_template<short>()[threadIdx.x] = static_cast<short>(2 * p.in[threadIdx.x]);
  __syncthreads();
  const int other = 63 - threadIdx.x;
  p.out[threadIdx.x] = shared_of_template<int>()[other] + shared_of_template<short>()[other];
}

__global__ void early_exit(const __grid_constant__ Params p) {
  __shared__ int first;
  if (threadIdx.x >= p.n) return;  // barriers wait for those that are left
  if (threadIdx.x == 0) first = p.in[0];
  __syncthreads();
  p.out[threadIdx.x] = first + static_cast<int>(threadIdx.x);
}

// n chooses the word; lanes get 100 * lane of the lane they read.
__global__ void shuffles(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % 32, value = 100 * lane;
  int result = 0;
  if (p.n == 0) result = __shfl_sync(whole_warp, value, 3);
  if (p.n == 1) result = __shfl_up_sync(whole_warp, value, 2);
  if (p.n == 2) result = __shfl_down_sync(whole_warp, value, 5);
  if (p.n == 3) result = __shfl_xor_sync(whole_warp, value, 1);
  if (p.n == 4) result = __shfl_sync(whole_warp, value, 3, 8);
  if (p.n == 5) result = __shfl_down_sync(whole_warp, value, 5, 8);
  if (p.n == 6) result = static_cast<int>(__ballot_sync(whole_warp, lane % 3 == 0));
  if (p.n == 7) result = __any_sync(whole_warp, lane == 31) + 2 * __all_sync(whole_warp, lane < 31);
  if (p.n == 8) result = __reduce_add_sync(whole_warp, value);
  if (p.n == 9) result = static_cast<int>(__shfl_xor_sync(whole_warp, 1.5 * value, 16));
  p.out[threadIdx.x] = result;
}

// Halves of a warp on ways of their own, each with its own mask.
__global__ void halves_of_a_warp(const __grid_constant__ Params p) {
  if (threadIdx.x < 16)
    p.out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 1);
  else
    p.out[threadIdx.x] = __shfl_xor_sync(0xffff0000u, static_cast<int>(threadIdx.x), 2);
}

__global__ void warp_barriers(const __grid_constant__ Params p) {
  __shared__ int values[256];
  values[threadIdx.x] = p.in[threadIdx.x];
  __syncwarp();
  const int read = values[threadIdx.x ^ 1];
  __syncwarp();
  values[threadIdx.x] = read;
  p.out[threadIdx.x] = values[threadIdx.x];
}

// Warp 0 produces, warps 1 and 2 consume; barrier 1: full, barrier 2: empty.
__global__ void named_barriers(const __grid_constant__ Params p) {
  __shared__ int value;
  const bool produces = threadIdx.x < 32;
  for (int round = 0; round < 3; ++round) {
    if (produces) {
      if (round > 0) ptx::named_barrier_sync(2, 96);
      if (threadIdx.x == 0) value = p.in[round];
      ptx::named_barrier_arrive(1, 96);
    } else {
      ptx::named_barrier_sync(1, 96);
      p.out[round * 64 + threadIdx.x - 32] = value;
      if (round < 2) ptx::named_barrier_arrive(2, 96);
    }
  }
}

__global__ void atomics(const __grid_constant__ Params p) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 2);
  atomicMax(p.out + 1, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(p.out, count);
}

__global__ void votes_of_a_block(const __grid_constant__ Params p) {
  p.out[threadIdx.x] = __syncthreads_count(threadIdx.x % 5 == 0) + 1000 * __syncthreads_or(threadIdx.x == 7) +
                       2000 * __syncthreads_and(threadIdx.x < 7);
}

// Each block writes its rank to its neighbour in the cluster, in static and in dynamic shared memory.
__global__ void clusters(const __grid_constant__ Params p) {
  __shared__ int from_neighbour;
  int* dynamic = reinterpret_cast<int*>(dynamic_shared());
  ptx::cluster_sync();
  const unsigned next = (ptx::cluster_rank() + 1) % ptx::cluster_size();
  if (threadIdx.x == 0) {
    *ptx::cluster_shared(&from_neighbour, next) = static_cast<int>(blockIdx.x);
    *ptx::cluster_shared(dynamic, next) = 10 * static_cast<int>(blockIdx.x);
  }
  ptx::cluster_sync();
  if (threadIdx.x == 0) p.out[blockIdx.x] = from_neighbour + dynamic[0];
}

// Of each float: half below, bfloat16 above.
__global__ void roundings(const __grid_constant__ Params p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.n) return;
  const float value = __int_as_float(p.in[at]);
  const unsigned low = __half_as_ushort(__float2half_rn(value)),
                 high = __bfloat16_as_ushort(__float2bfloat16_rn(value));
  p.out[at] = static_cast<int>(low | high << 16);
}

// The same of the float's neighbours in double, above and below, one after the other.
__global__ void roundings_of_doubles(const __grid_constant__ Params p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.n) return;
  const long long bits = __double_as_longlong(static_cast<double>(__int_as_float(p.in[at])));
  for (int i = 0; i < 2; ++i) {
    const double value = __longlong_as_double(bits + 1 - 2 * i);
    const unsigned low = __half_as_ushort(__double2half(value)), high = __bfloat16_as_ushort(__double2bfloat16(value));
    p.out[2 * at + i] = static_cast<int>(low | high << 16);
  }
}

// Of each 16-bit word: as half, then as bfloat16, as floats.
__global__ void widenings(const __grid_constant__ Params p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.n) return;
  const auto bits = static_cast<unsigned short>(p.in[at]);
  p.out[2 * at] = __float_as_int(__half2float(__ushort_as_half(bits)));
  p.out[2 * at + 1] = __float_as_int(__bfloat162float(__ushort_as_bfloat16(bits)));
}

// ---- what must be found ----

__global__ void race_in_shared(const __grid_constant__ Params p) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];  // no barrier
}

// Everyone reads what thread 0 then overwrites: a race between a read and a write behind it.
__global__ void race_after_read(const __grid_constant__ Params p) {
  __shared__ int value;
  if (threadIdx.x == 0) value = p.in[0];
  __syncthreads();
  p.out[threadIdx.x] = value;
  if (threadIdx.x == 0) value = 1;
}

__global__ void race_between_warps(const __grid_constant__ Params p) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = p.in[threadIdx.x];
  __syncwarp();  // orders one warp, the other warp's values are read
  p.out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void race_between_blocks(const __grid_constant__ Params p) {
  p.out[threadIdx.x] = static_cast<int>(blockIdx.x);
}

__global__ void shuffle_is_no_barrier(const __grid_constant__ Params p) {
  __shared__ int values[32];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = p.in[threadIdx.x];
  const int other = __shfl_xor_sync(whole_warp, static_cast<int>(threadIdx.x), 1);
  p.out[threadIdx.x] = values[other];
}

__global__ void arrive_orders_only_what_is_before(const __grid_constant__ Params p) {
  __shared__ int values[2];
  if (threadIdx.x < 2) values[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) values[0] = p.in[0];
    ptx::named_barrier_arrive(1, 64);
    if (threadIdx.x == 0) values[1] = p.in[1];
  } else {
    ptx::named_barrier_sync(1, 64);
    p.out[threadIdx.x - 32] = values[p.n];
  }
}

__global__ void uninitialised_shared(const __grid_constant__ Params p) {
  __shared__ int values[64];
  if (threadIdx.x < 63) values[threadIdx.x] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = values[63 - threadIdx.x];
}

// As it shows where the reader comes first: what it reads is not there yet.
__global__ void missing_barrier(const __grid_constant__ Params p) {
  __shared__ int values[64];
  values[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = values[63 - threadIdx.x];
}

// The second block finds what the first has left.
__global__ void left_by_another_block(const __grid_constant__ Params p) {
  __shared__ int values[64];
  if (blockIdx.x == 0) values[threadIdx.x] = 1;
  __syncthreads();
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x];
}

__global__ void uninitialised_global(const __grid_constant__ Params p) { p.out[threadIdx.x] += 1; }

__global__ void beyond_global(const __grid_constant__ Params p) { p.out[threadIdx.x] = p.in[threadIdx.x + p.n]; }

__global__ void beyond_shared_array(const __grid_constant__ Params p) {
  __shared__ int values[32];
  values[threadIdx.x + p.n] = 1;
  p.out[threadIdx.x] = 0;
}

__global__ void beyond_dynamic_shared(const __grid_constant__ Params p) {
  reinterpret_cast<int*>(dynamic_shared())[threadIdx.x + p.n] = 1;
  p.out[threadIdx.x] = 0;
}

__global__ void writes_its_input(const __grid_constant__ Params p) { const_cast<int*>(p.in)[threadIdx.x] = 1; }

__global__ void misaligned_vector(const __grid_constant__ Params p) {
  const int4 v = *reinterpret_cast<const int4*>(p.in + p.n);
  if (threadIdx.x == 0) p.out[0] = v.x;
}

__global__ void divergent_barriers(const __grid_constant__ Params p) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
    p.out[threadIdx.x] = 1;
  } else {
    p.out[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void deadlock(const __grid_constant__ Params p) {
  if (threadIdx.x < 32) ptx::named_barrier_sync(1, 64);
  p.out[threadIdx.x] = 1;
}

__global__ void mask_without_the_caller(const __grid_constant__ Params p) {
  p.out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 1);
}

__global__ void mask_with_an_absent_lane(const __grid_constant__ Params p) {
  if (threadIdx.x >= 16) return;
  p.out[threadIdx.x] = __shfl_xor_sync(whole_warp, static_cast<int>(threadIdx.x), 1);
}

__global__ void source_outside_the_mask(const __grid_constant__ Params p) {
  if (threadIdx.x < 16) p.out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 1);
}

__global__ void masks_that_differ(const __grid_constant__ Params p) {
  const unsigned mask = threadIdx.x < 8 ? 0x000000ffu : whole_warp;
  p.out[threadIdx.x] = __shfl_xor_sync(mask, static_cast<int>(threadIdx.x), 1);
}

__global__ void integer_overflow(const __grid_constant__ Params p) {
  const int stride = static_cast<int>(p.n);
  p.out[threadIdx.x] = stride * 1024;
}

__global__ void copy_without_wait(const __grid_constant__ Params p) {
  __shared__ int values[32];
  ptx::cp_async<4>(values + threadIdx.x, p.in + threadIdx.x);
  ptx::cp_async_commit();
  p.out[threadIdx.x] = values[threadIdx.x];
}

__global__ void copy_without_barrier(const __grid_constant__ Params p) {
  __shared__ int values[32];
  values[threadIdx.x] = 0;
  __syncthreads();
  ptx::cp_async<4>(values + threadIdx.x, p.in + threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  p.out[threadIdx.x] = values[31 - threadIdx.x];
}

__global__ void copy_into_a_target_in_flight(const __grid_constant__ Params p) {
  __shared__ int values[32];
  ptx::cp_async<4>(values + threadIdx.x, p.in + threadIdx.x);
  values[threadIdx.x] = 0;
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  p.out[threadIdx.x] = values[threadIdx.x];
}

__global__ void another_threads_stack(const __grid_constant__ Params p) {
  __shared__ int* pointer;
  int mine = static_cast<int>(threadIdx.x);
  if (threadIdx.x == 0) pointer = &mine;
  __syncthreads();
  p.out[threadIdx.x] = *pointer;
  __syncthreads();
}

__global__ void loops_in_registers(const __grid_constant__ Params p) {
  unsigned x = static_cast<unsigned>(p.in[0]) | 1u;
  while (x != 0) x = 3 * x * x * x;  // an odd number stays odd
  p.out[threadIdx.x] = static_cast<int>(x);
}

__global__ void loops_until_another_writes(const __grid_constant__ Params p) {
  const volatile int* flag = p.in;
  while (*flag != 0) {
  }
  p.out[threadIdx.x] = 1;
}

__global__ void loops_over_shuffles(const __grid_constant__ Params p) {
  int x = p.in[threadIdx.x];
  while (__any_sync(whole_warp, x > 0)) x = __shfl_xor_sync(whole_warp, x, 1);
  p.out[threadIdx.x] = x;
}

__global__ void stops_itself(const __grid_constant__ Params) { __trap(); }

}  // namespace

#define CASE(kernel)                   \
  if (std::strcmp(name, #kernel) == 0) \
  return transfuse::cuda::launch(kernel, grid, block, shared_bytes, nullptr, params, cluster)

extern "C" int run_case(const char* name, const int* in, int* out, int64_t n, const unsigned* sizes,
                        int64_t shared_bytes, int cluster) {
  const Params params{in, out, n};
  const dim3 grid(sizes[0], sizes[1], sizes[2]), block(sizes[3], sizes[4], sizes[5]);
  CASE(indices);
  CASE(reverse_through_shared);
  CASE(two_instances_of_a_template);
  CASE(early_exit);
  CASE(shuffles);
  CASE(halves_of_a_warp);
  CASE(warp_barriers);
  CASE(named_barriers);
  CASE(atomics);
  CASE(votes_of_a_block);
  CASE(clusters);
  CASE(roundings);
  CASE(roundings_of_doubles);
  CASE(widenings);
  CASE(race_in_shared);
  CASE(race_after_read);
  CASE(race_between_warps);
  CASE(race_between_blocks);
  CASE(shuffle_is_no_barrier);
  CASE(arrive_orders_only_what_is_before);
  CASE(uninitialised_shared);
  CASE(missing_barrier);
  CASE(left_by_another_block);
  CASE(uninitialised_global);
  CASE(beyond_global);
  CASE(beyond_shared_array);
  CASE(beyond_dynamic_shared);
  CASE(writes_its_input);
  CASE(misaligned_vector);
  CASE(divergent_barriers);
  CASE(deadlock);
  CASE(mask_without_the_caller);
  CASE(mask_with_an_absent_lane);
  CASE(source_outside_the_mask);
  CASE(masks_that_differ);
  CASE(integer_overflow);
  CASE(copy_without_wait);
  CASE(copy_without_barrier);
  CASE(copy_into_a_target_in_flight);
  CASE(another_threads_stack);
  CASE(loops_in_registers);
  CASE(loops_until_another_writes);
  CASE(loops_over_shuffles);
  CASE(stops_itself);
  return -1;
}
