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

// A number as the adder takes it: (-1)^negative * size * 2^(exponent - fraction bits). Zero has no exponent to align to.
struct Aligned {
  int size, exponent, negative;
};

constexpr int no_exponent = -10000, smallest_sum = 2 * smallest_exponent;

Aligned aligned(float value, int fraction_bits, int smallest) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const int biased = static_cast<int>(bits >> 23 & 0xff);
  const int fraction = static_cast<int>(bits & 0x7fffff);
  const int negative = -static_cast<int>(bits >> 31);
  if (biased == 0 && fraction == 0) return {0, no_exponent, negative};
  // Below the operand's normal numbers the leading one stands further right.
  const int exponent = std::max(biased - 127, smallest_exponent);
  const int size = biased == 0 ? fraction : fraction | 1 << 23;
  const int raised = std::max(exponent, smallest);
  return {size >> (float_fraction_bits - fraction_bits + raised - exponent), raised, negative};
}

// The sum, a whole number of `last_place`s, cut off to float32.
float cut_off(int64_t sum, int last_place) {
  const double exact = static_cast<double>(sum) * std::bit_cast<double>(static_cast<int64_t>(1023 + last_place) << 52);
  const float nearest = static_cast<float>(exact);
  const bool too_far = std::abs(nearest) > std::abs(exact) && std::abs(exact) < 0x1p128;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - too_far);
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

// One operand of a product: element (k, i) at [k][i], so that the adders of all i take one step of k together.
template <int rows>
struct Matrix {
  float values[max_k][rows];
  int sizes[max_k][rows], exponents[max_k][rows], signs[max_k][rows];
  bool is_finite = true;

  void set(int k, int i, float value, int fraction_bits, int smallest) {
    const Aligned number = aligned(value, fraction_bits, smallest);
    values[k][i] = value;
    sizes[k][i] = number.size;
    exponents[k][i] = number.exponent;
    signs[k][i] = number.negative;
    is_finite = is_finite && std::isfinite(value);
  }
};

// d[j] += the products of row `row` of a with the n columns of b, steps k of [start, start + count).
void add_products(const Matrix<m>& a, const Matrix<n>& b, int row, int start, int count, float (&d)[n],
                  int fraction_bits) {
  Aligned c[n];
  int largest[n];
  for (int j = 0; j < n; ++j) {
    c[j] = aligned(d[j], float_fraction_bits, smallest_exponent);
    largest[j] = c[j].exponent;
  }
  for (int k = start; k < start + count; ++k)
    for (int j = 0; j < n; ++j)
      largest[j] = std::max(largest[j], a.exponents[k][row] + b.exponents[k][j]);
  // Every product as a whole number of the last kept place: 27 bits at most once it is moved up, and 16 of them.
  const int up = float_fraction_bits + adder.extra_bits - 2 * fraction_bits;
  int sums[n] = {};
  for (int k = start; k < start + count; ++k)
    for (int j = 0; j < n; ++j) {
      const int below = std::min(largest[j] - a.exponents[k][row] - b.exponents[k][j], 31);
      const int sign = a.signs[k][row] ^ b.signs[k][j];
      sums[j] += (((a.sizes[k][row] * b.sizes[k][j]) << up >> below) ^ sign) - sign;
    }
  for (int j = 0; j < n; ++j) {
    largest[j] = std::max(largest[j], smallest_sum);  // nothing but zeros
    const int addend = c[j].size << adder.extra_bits >> std::min(largest[j] - c[j].exponent, 31);
    d[j] = cut_off(static_cast<int64_t>(sums[j]) + ((addend ^ c[j].negative) - c[j].negative),
                   largest[j] - float_fraction_bits - adder.extra_bits);
  }
}

// NaN and infinities, in an operand or before it, behave as in any sum.
void keep_special(const Matrix<m>& a, const Matrix<n>& b, int row, int start, int count, const float (&before)[n],
                  float (&d)[n]) {
  for (int j = 0; j < n; ++j) {
    if (a.is_finite && b.is_finite && std::isfinite(before[j])) continue;
    double sum = before[j];
    for (int k = start; k < start + count; ++k) sum += static_cast<double>(a.values[k][row]) * b.values[k][j];
    if (!std::isfinite(sum)) d[j] = static_cast<float>(sum);
  }
}

void apply_product(void* const* lanes, unsigned, Thread&) {
  const Operand type = static_cast<ProductLane*>(lanes[0])->type;
  const bool wide = type == Operand::tf32;
  const int k = wide ? 8 : 16, block = wide ? adder.block_tf32 : adder.block_16bit;
  const int fraction_bits = type == Operand::bf16 ? 7 : 10;
  const int smallest = type == Operand::f16 ? -14 : smallest_exponent;
  Matrix<m> a;
  Matrix<n> b;
  float d[m][n];
  for (unsigned lane = 0; lane < warp_size; ++lane) {
    const auto& mine = *static_cast<ProductLane*>(lanes[lane]);
    const unsigned group = lane / 4, member = lane % 4;
    const auto set = [&](auto& matrix, unsigned column, unsigned row, unsigned bits) {
      matrix.set(column, row, operand(type, bits), fraction_bits, smallest);
    };
    for (unsigned r = 0; r < 4; ++r) {
      const unsigned row = group + r % 2 * 8;
      if (wide) {
        set(a, member + r / 2 * 4, row, mine.a[r]);
      } else {
        const unsigned column = member * 2 + r / 2 * 8;
        set(a, column, row, mine.a[r] & 0xffff);
        set(a, column + 1, row, mine.a[r] >> 16);
      }
      d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2] = mine.d[r];
    }
    for (unsigned r = 0; r < 2; ++r) {
      if (wide) {
        set(b, member + r * 4, group, mine.b[r]);
      } else {
        const unsigned row = member * 2 + r * 8;
        set(b, row, group, mine.b[r] & 0xffff);
        set(b, row + 1, group, mine.b[r] >> 16);
      }
    }
  }
  for (int row = 0; row < m; ++row)
    for (int start = 0; start < k; start += block) {
      float before[n];
      std::copy(d[row], d[row] + n, before);
      add_products(a, b, row, start, block, d[row], fraction_bits);
      keep_special(a, b, row, start, block, before, d[row]);
    }
  for (unsigned lane = 0; lane < warp_size; ++lane)
    for (unsigned r = 0; r < 4; ++r)
      static_cast<ProductLane*>(lanes[lane])->d[r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
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
