// ldmatrix, mma.sync and the approximate instructions.
//
// How a tensor core adds: it takes the products of `block` steps of k exactly, aligns them and the accumulator to the
// largest exponent, cuts each off `extra_bits` below float32's last place, adds the rest exactly and cuts the sum off
// to float32. Figures per architecture from F. A. Khattak and M. Mikaitis, Accurate Models of NVIDIA Tensor Cores,
// 2025, https://arxiv.org/abs/2512.07004. Compared once with what they measured (model_validation of
// github.com/north-numerical-computing/MATLAB-tensor-core): 5000 sums each of f16, bf16 and tf32 on an A100 and on an
// H100, all 30,000 equal bit for bit.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "machine.h"

namespace emulation {

namespace {

struct Adder {
  int block_16bit, block_tf32;  // products added at once
  int extra_bits;
};
constexpr Adder ampere{8, 4, 1};   // sm_80
constexpr Adder hopper{16, 8, 2};  // sm_90
Adder adder = ampere;

constexpr int float_fraction_bits = 23;
constexpr int smallest_exponent = -126;  // float32's; subnormals have it too

float operand(Operand type, unsigned bits) {
  switch (type) {
    case Operand::f16: return static_cast<float>(std::bit_cast<_Float16>(static_cast<unsigned short>(bits)));
    case Operand::bf16: return std::bit_cast<float>(bits << 16);
    case Operand::tf32: return std::bit_cast<float>(bits & 0xffffe000u);  // the last 13 bits are not wired
  }
  return 0.0f;
}

int exponent_of(float value, int smallest) { return std::max(std::ilogb(value), smallest); }

// The sum of count products and c as the hardware's adder gives it.
float add_block(const float* a, const float* b, int count, float c, Operand type) {
  const int smallest_operand = type == Operand::f16 ? -14 : smallest_exponent;
  double special = c;  // NaN and infinities behave as in any sum
  int largest = c == 0.0f ? INT32_MIN : exponent_of(c, smallest_exponent);
  for (int k = 0; k < count; ++k) {
    special += static_cast<double>(a[k]) * b[k];
    if (a[k] != 0.0f && b[k] != 0.0f && std::isfinite(a[k]) && std::isfinite(b[k]))
      largest = std::max(largest, exponent_of(a[k], smallest_operand) + exponent_of(b[k], smallest_operand));
  }
  if (!std::isfinite(special)) return static_cast<float>(special);
  if (largest == INT32_MIN) return 0.0f;
  // Every addend as a whole number of the last kept place.
  const int last_place = largest - float_fraction_bits - adder.extra_bits;
  const auto cut = [last_place](double value) {
    return static_cast<int64_t>(std::trunc(std::ldexp(value, -last_place)));
  };
  int64_t sum = cut(c);
  for (int k = 0; k < count; ++k)
    sum += cut(static_cast<double>(a[k]) * b[k]);  // products of 11 bits are exact in double
  if (sum == 0) return 0.0f;
  const uint64_t size = static_cast<uint64_t>(std::abs(sum));
  const int top = 63 - std::countl_zero(size) + last_place;
  const int kept_place = std::max(top, smallest_exponent) - float_fraction_bits;
  const double kept = kept_place > last_place
                          ? std::ldexp(static_cast<double>(size >> std::min(63, kept_place - last_place)), kept_place)
                          : std::ldexp(static_cast<double>(size), last_place);
  return static_cast<float>(sum < 0 ? -kept : kept);
}

struct MatrixLane {
  int matrices;
  bool transposed;
  const void* row;
  uint32_t* registers;
};

constexpr int matrix_rows = 8, row_bytes = 16;

void apply_load_matrix(void* const* lanes, unsigned, Thread& first) {
  const auto* shape = static_cast<MatrixLane*>(lanes[0]);
  Thread* const collector = current;
  for (int matrix = 0; matrix < shape->matrices; ++matrix) {
    uint16_t elements[matrix_rows][matrix_rows];
    for (int row = 0; row < matrix_rows; ++row) {
      const int owner = matrix * matrix_rows + row;
      const void* address = static_cast<MatrixLane*>(lanes[owner])->row;
      current = first.block->threads[first.number + owner];
      if (reinterpret_cast<uintptr_t>(address) % row_bytes != 0)
        fail("misaligned access", "gives ldmatrix a row that is not aligned to 16 bytes", collector->pc);
      check_access(address, row_bytes, Access::read, collector->pc);
      std::memcpy(elements[row], address, row_bytes);
    }
    for (unsigned lane = 0; lane < warp_size; ++lane) {
      const unsigned row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = shape->transposed ? elements[column][row] : elements[row][column];
      const uint32_t high = shape->transposed ? elements[column + 1][row] : elements[row][column + 1];
      static_cast<MatrixLane*>(lanes[lane])->registers[matrix] = low | high << 16;
    }
  }
  current = collector;
}

struct ProductLane {
  Operand type;
  float* d;
  const uint32_t *a, *b;
};

constexpr int m = 16, n = 8, max_k = 16;

void apply_product(void* const* lanes, unsigned, Thread&) {
  const Operand type = static_cast<ProductLane*>(lanes[0])->type;
  const bool wide = type == Operand::tf32;
  const int k = wide ? 8 : 16, block = wide ? adder.block_tf32 : adder.block_16bit;
  float a[m][max_k], b[n][max_k];
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const auto& mine = *static_cast<ProductLane*>(lanes[lane]);
    const unsigned group = lane / 4, member = lane % 4;
    for (unsigned r = 0; r < 4; ++r) {
      const unsigned row = group + r % 2 * 8;
      if (wide) {
        a[row][member + r / 2 * 4] = operand(type, mine.a[r]);
      } else {
        const unsigned column = member * 2 + r / 2 * 8;
        a[row][column] = operand(type, mine.a[r] & 0xffff);
        a[row][column + 1] = operand(type, mine.a[r] >> 16);
      }
    }
    for (unsigned r = 0; r < 2; ++r) {
      if (wide) {
        b[group][member + r * 4] = operand(type, mine.b[r]);
      } else {
        const unsigned row = member * 2 + r * 8;
        b[group][row] = operand(type, mine.b[r] & 0xffff);
        b[group][row + 1] = operand(type, mine.b[r] >> 16);
      }
    }
  }
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    float* d = static_cast<ProductLane*>(lanes[lane])->d;
    for (unsigned r = 0; r < 4; ++r) {
      const unsigned row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      for (int start = 0; start < k; start += block)
        d[r] = add_block(a[row] + start, b[column] + start, block, d[r], type);
    }
  }
}

// One unit of the last place up or down, or neither, decided by the bits of the argument: within what is documented,
// and never twice the exact result by luck.
float nudged(float exact, float argument) {
  const uint32_t hash = std::bit_cast<uint32_t>(argument) * 2654435761u >> 30;
  if (hash == 0) return std::nextafter(exact, INFINITY);
  return hash == 1 ? std::nextafter(exact, -INFINITY) : exact;
}

float flushed(float value) { return std::abs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

bool is_power_of_two(float value) {
  int exponent;
  return std::abs(std::frexp(value, &exponent)) == 0.5f;
}

}  // namespace

void load_matrix(int matrices, bool transposed, const void* row, uint32_t* registers, const Site& site) {
  MatrixLane lane{matrices, transposed, row, registers};
  gather("ldmatrix", ~0u, &lane, apply_load_matrix, site, __builtin_return_address(0));
}

void multiply_accumulate(Operand type, float* d, const uint32_t* a, const uint32_t* b, const Site& site) {
  ProductLane lane{type, d, a, b};
  gather("mma", ~0u, &lane, apply_product, site, __builtin_return_address(0));
}

// ex2.approx.ftz: 2 ULP.
float exp2_approx(float x) {
  if (x != x) return std::bit_cast<float>(0x7fffffffu);
  const float result = flushed(static_cast<float>(std::exp2(static_cast<double>(flushed(x)))));
  return std::isinf(result) || result == 0.0f || std::rint(x) == x || flushed(x) == 0.0f ? result
                                                                                         : flushed(nudged(result, x));
}

// rcp.approx.ftz: 1 ULP.
float reciprocal_approx(float x) {
  if (x != x) return std::bit_cast<float>(0x7fffffffu);
  const float result = flushed(1.0f / flushed(x));
  return std::isinf(x) || std::isinf(result) || result == 0.0f || is_power_of_two(x) ? result
                                                                                     : flushed(nudged(result, x));
}

// rsqrt.approx.ftz: a relative error of 2^-22.9.
float rsqrt_approx(float x) {
  if (x != x || flushed(x) < 0.0f) return std::bit_cast<float>(0x7fffffffu);
  const float result = static_cast<float>(1.0 / std::sqrt(static_cast<double>(flushed(x))));
  return std::isinf(x) || flushed(x) == 0.0f || is_power_of_two(x) ? result : nudged(result, x);
}

}  // namespace emulation

// 80 or 90: whose tensor cores add; mma.sync runs on both.
extern "C" int emulation_set_tensor_core(int architecture) {
  if (architecture != 80 && architecture != 90) return 1;
  emulation::adder = architecture == 80 ? emulation::ampere : emulation::hopper;
  return 0;
}
