// One kernel per case of ptx_cases.py: words in, words out. Compiled by g++ for the emulator and by nvcc for a GPU.
#include "cuda/ptx.cuh"

#include <cstdint>
#include <cstring>

#include "cuda/launch.cuh"

namespace {

namespace ptx = transfuse::cuda::ptx;
using transfuse::cuda::dynamic_shared;

struct Params {
  const uint32_t* in;
  uint32_t* out;
  int64_t n;
};

template <float (*function)(float)>
__device__ void elementwise(const Params& p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at < p.n) p.out[at] = __float_as_uint(function(__uint_as_float(p.in[at])));
}
__global__ void exp2_approx(const __grid_constant__ Params p) { elementwise<ptx::exp2_approx>(p); }
__global__ void reciprocal_approx(const __grid_constant__ Params p) { elementwise<ptx::reciprocal_approx>(p); }
__global__ void rsqrt_approx(const __grid_constant__ Params p) { elementwise<ptx::rsqrt_approx>(p); }

// Thread i copies `Bytes` bytes, of which n come from the source.
template <int Bytes>
__global__ void cp_async(const __grid_constant__ Params p) {
  constexpr int words = Bytes / 4;
  auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  ptx::cp_async<Bytes>(shared + threadIdx.x * words, p.in + threadIdx.x * words, static_cast<int>(p.n));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < words; ++i) p.out[threadIdx.x * words + i] = shared[threadIdx.x * words + i];
}

// The older of two groups is there while the newer may be under way; then the newer one too.
__global__ void cp_async_groups(const __grid_constant__ Params p) {
  auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  const unsigned older = threadIdx.x, newer = blockDim.x + threadIdx.x;
  ptx::cp_async<4>(shared + older, p.in + older);
  ptx::cp_async_commit();
  ptx::cp_async<4>(shared + newer, p.in + newer);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  p.out[older] = shared[older];
  ptx::cp_async_wait<0>();
  p.out[newer] = shared[newer];
}

// Lane i points to 16-byte row (5 * i) % 32 of what `in` holds: rows may lie in any order.
template <int Matrices, bool Transposed>
__global__ void ldmatrix(const __grid_constant__ Params p) {
  auto* shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (int i = 0; i < 4; ++i) shared[threadIdx.x * 4 + i] = p.in[threadIdx.x * 4 + i];
  __syncthreads();
  uint32_t registers[Matrices];
  ptx::ldmatrix<Matrices, Transposed>(registers, ptx::shared_address(shared + threadIdx.x * 5 % 32 * 4));
  for (int i = 0; i < Matrices; ++i) p.out[i * 32 + threadIdx.x] = registers[i];
}

// in: per lane four words of a, two of b, four of d; out: four of d.
template <void (*product)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__device__ void multiply(const Params& p) {
  const uint32_t* mine = p.in + threadIdx.x * 10;
  uint32_t a[4], b[2];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = mine[i];
  for (int i = 0; i < 2; ++i) b[i] = mine[4 + i];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(mine[6 + i]);
  product(d, a, b);
  for (int i = 0; i < 4; ++i) p.out[threadIdx.x * 4 + i] = __float_as_uint(d[i]);
}
// With one signature in both worlds: the emulator's functions take the place of the call too.
__device__ void f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_m16n8k16_f16(d, a, b); }
__device__ void bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_m16n8k16_bf16(d, a, b); }
__device__ void tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_m16n8k8_tf32(d, a, b); }
__global__ void mma_m16n8k16_f16(const __grid_constant__ Params p) { multiply<f16>(p); }
__global__ void mma_m16n8k16_bf16(const __grid_constant__ Params p) { multiply<bf16>(p); }
__global__ void mma_m16n8k8_tf32(const __grid_constant__ Params p) { multiply<tf32>(p); }

// Warp 0 hands n words, one after another, to warp 1 through one word of shared memory. Barrier 1: full, 2: empty.
__global__ void named_barriers(const __grid_constant__ Params p) {
  auto* word = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (int64_t i = 0; i < p.n; ++i) {
    if (threadIdx.x < 32) {
      if (i > 0) ptx::named_barrier_sync(2, 64);
      if (threadIdx.x == 0) *word = p.in[i];
      ptx::named_barrier_arrive(1, 64);
    } else {
      ptx::named_barrier_sync(1, 64);
      p.out[i * 32 + threadIdx.x - 32] = *word;
      if (i + 1 < p.n) ptx::named_barrier_arrive(2, 64);
    }
  }
}

__global__ void opaque(const __grid_constant__ Params p) {
  for (int64_t at = threadIdx.x; at < p.n; at += blockDim.x) p.out[at] = ptx::opaque(p.in[at]);
}

// Each block's first thread hands its input to the next block of the cluster; out: rank, size, what came.
__global__ void clusters(const __grid_constant__ Params p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ uint32_t word;
  const unsigned rank = ptx::cluster_rank(), size = ptx::cluster_size();
  ptx::cluster_sync();  // no block writes into one that has not started
  if (threadIdx.x == 0) *ptx::cluster_shared(&word, (rank + 1) % size) = p.in[blockIdx.x];
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    p.out[blockIdx.x * 3] = rank;
    p.out[blockIdx.x * 3 + 1] = size;
    p.out[blockIdx.x * 3 + 2] = word;
  }
#endif
}

}  // namespace

#define CASE(name_of_case, kernel)          \
  if (std::strcmp(name, name_of_case) == 0) \
  return transfuse::cuda::launch(kernel, dim3(grid), dim3(block), shared_bytes, nullptr, params, cluster)

extern "C" int run_ptx_case(const char* name, const uint32_t* in, uint32_t* out, int64_t n, unsigned grid,
                            unsigned block, int64_t shared_bytes, unsigned cluster) {
  const Params params{in, out, n};
  CASE("exp2_approx", exp2_approx);
  CASE("reciprocal_approx", reciprocal_approx);
  CASE("rsqrt_approx", rsqrt_approx);
  CASE("cp_async<4>", cp_async<4>);
  CASE("cp_async<8>", cp_async<8>);
  CASE("cp_async<16>", cp_async<16>);
  CASE("cp_async_groups", cp_async_groups);
  CASE("ldmatrix<1>", (ldmatrix<1, false>));
  CASE("ldmatrix<2>", (ldmatrix<2, false>));
  CASE("ldmatrix<4>", (ldmatrix<4, false>));
  CASE("ldmatrix<1, transposed>", (ldmatrix<1, true>));
  CASE("ldmatrix<2, transposed>", (ldmatrix<2, true>));
  CASE("ldmatrix<4, transposed>", (ldmatrix<4, true>));
  CASE("mma_m16n8k16_f16", mma_m16n8k16_f16);
  CASE("mma_m16n8k16_bf16", mma_m16n8k16_bf16);
  CASE("mma_m16n8k8_tf32", mma_m16n8k8_tf32);
  CASE("named_barriers", named_barriers);
  CASE("clusters", clusters);
  CASE("opaque", opaque);
  return -1;
}
