// vec.h in the compiler's own vectors, for every CPU that has no level of its own: baseline x86-64, aarch64, others.
// Included by vec.h alone.
//
// Without a hardware FMA fma(f32) is the exact product in double, added there and rounded once more: a residual of a
// product of floats is exact. fma(f64) is then a product and a sum with two roundings: nobody takes a residual from it.
#pragma once

namespace transfuse::cpu::TRANSFUSE_ISA {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

struct f32 {
  f32x16 v;
};
struct i32 {
  i32x16 v;
};
struct mask {  // all ones or all zeros per lane
  i32x16 v;
};
struct f64 {
  f64x8 v;
};
struct mask64 {
  i64x8 v;
};

// A vector whose lane i is value(i), for the few operations that GCC's vectors do not have.
template <class Vector, class Value>
TRANSFUSE_INLINE Vector each(int count, Value value) {
  Vector result = {};
  for (int i = 0; i < count; ++i) result[i] = value(i);
  return result;
}
#define TRANSFUSE_EACH16(type, expression) each<type>(16, [&](int i) __attribute__((always_inline)) { return expression; })
#define TRANSFUSE_EACH8(type, expression) each<type>(8, [&](int i) __attribute__((always_inline)) { return expression; })

TRANSFUSE_INLINE mask first_n(int64_t n) {
  const i32x16 index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return {index < static_cast<int32_t>(n)};
}
TRANSFUSE_INLINE f32 set1(float x) { return {x - f32x16{}}; }
template <class Vector, class T>
TRANSFUSE_INLINE Vector copy_in(const T* p, int64_t n) {
  Vector v = {};
  __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
  return v;
}
TRANSFUSE_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < 0 ? 0 : n < limit ? n : limit; }
TRANSFUSE_INLINE f32 load(const float* p) { return {copy_in<f32x16>(p, lanes)}; }
TRANSFUSE_INLINE f32 load(const float* p, int64_t n) { return {copy_in<f32x16>(p, at_most(n, lanes))}; }
TRANSFUSE_INLINE i32 load(const int32_t* p) { return {copy_in<i32x16>(p, lanes)}; }
TRANSFUSE_INLINE void store(float* p, f32 a) { __builtin_memcpy(p, &a.v, sizeof a.v); }
TRANSFUSE_INLINE void store(float* p, f32 a, int64_t n) {
  __builtin_memcpy(p, &a.v, static_cast<size_t>(at_most(n, lanes)) * sizeof(float));
}

TRANSFUSE_INLINE f32 operator+(f32 a, f32 b) { return {a.v + b.v}; }
TRANSFUSE_INLINE f32 operator-(f32 a, f32 b) { return {a.v - b.v}; }
TRANSFUSE_INLINE f32 operator*(f32 a, f32 b) { return {a.v * b.v}; }
TRANSFUSE_INLINE f32 operator/(f32 a, f32 b) { return {a.v / b.v}; }

TRANSFUSE_INLINE mask operator<(f32 a, f32 b) { return {a.v < b.v}; }
TRANSFUSE_INLINE mask operator<=(f32 a, f32 b) { return {a.v <= b.v}; }
TRANSFUSE_INLINE mask operator>(f32 a, f32 b) { return {a.v > b.v}; }
TRANSFUSE_INLINE mask operator>=(f32 a, f32 b) { return {a.v >= b.v}; }
TRANSFUSE_INLINE mask operator==(f32 a, f32 b) { return {a.v == b.v}; }
TRANSFUSE_INLINE mask isnan(f32 a) { return {a.v != a.v}; }
TRANSFUSE_INLINE mask operator&(mask a, mask b) { return {a.v & b.v}; }
TRANSFUSE_INLINE mask operator|(mask a, mask b) { return {a.v | b.v}; }
TRANSFUSE_INLINE mask operator~(mask a) { return {~a.v}; }
TRANSFUSE_INLINE uint32_t to_bits(mask a) {  // lane i is bit i
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] & 1) << i;
  return bits;
}
// All 64-bit words of a mask, folded by `or` or `and`.
TRANSFUSE_INLINE bool any(mask64 a) { return ((a.v[0] | a.v[1]) | (a.v[2] | a.v[3]) | (a.v[4] | a.v[5]) | (a.v[6] | a.v[7])) != 0; }
TRANSFUSE_INLINE bool all(mask64 a) { return ((a.v[0] & a.v[1]) & (a.v[2] & a.v[3]) & (a.v[4] & a.v[5]) & (a.v[6] & a.v[7])) == -1; }
TRANSFUSE_INLINE bool any(mask a) { return any(mask64{(i64x8)a.v}); }
TRANSFUSE_INLINE bool all(mask a) { return all(mask64{(i64x8)a.v}); }
TRANSFUSE_INLINE f32 select(mask m, f32 yes, f32 no) {
  return {(f32x16)((m.v & (i32x16)yes.v) | (~m.v & (i32x16)no.v))};
}
// Lanes where the byte is not 0 (a boolean mask row).
TRANSFUSE_INLINE mask nonzero(const uint8_t* p) { return {TRANSFUSE_EACH16(i32x16, p[i] != 0 ? -1 : 0)}; }

TRANSFUSE_INLINE i32 bits(f32 a) { return {(i32x16)a.v}; }
TRANSFUSE_INLINE f32 from_bits(i32 a) { return {(f32x16)a.v}; }
TRANSFUSE_INLINE i32 set1i(int32_t x) { return {x - i32x16{}}; }
TRANSFUSE_INLINE f32 to_float(i32 a) { return {__builtin_convertvector(a.v, f32x16)}; }
TRANSFUSE_INLINE i32 operator+(i32 a, i32 b) { return {(i32x16)((u32x16)a.v + (u32x16)b.v)}; }
TRANSFUSE_INLINE i32 operator-(i32 a, i32 b) { return {(i32x16)((u32x16)a.v - (u32x16)b.v)}; }
TRANSFUSE_INLINE i32 operator&(i32 a, i32 b) { return {a.v & b.v}; }
TRANSFUSE_INLINE i32 operator|(i32 a, i32 b) { return {a.v | b.v}; }
TRANSFUSE_INLINE i32 operator^(i32 a, i32 b) { return {a.v ^ b.v}; }
TRANSFUSE_INLINE i32 mul_low(i32 a, i32 b) { return {(i32x16)((u32x16)a.v * (u32x16)b.v)}; }
TRANSFUSE_INLINE i32 mul_high_unsigned(i32 a, i32 b) {
  const u32x16 x = (u32x16)a.v, y = (u32x16)b.v;
  return {TRANSFUSE_EACH16(i32x16, static_cast<int32_t>((static_cast<uint64_t>(x[i]) * y[i]) >> 32))};
}
TRANSFUSE_INLINE mask less_unsigned(i32 a, i32 b) { return {(u32x16)a.v < (u32x16)b.v}; }
TRANSFUSE_INLINE f32 lookup(const float (&table)[lookup_size], i32 index) {
  return {TRANSFUSE_EACH16(f32x16, table[index.v[i] & (lookup_size - 1)])};
}
template <int n>
TRANSFUSE_INLINE i32 shift_left(i32 a) { return {(i32x16)((u32x16)a.v << n)}; }
template <int n>
TRANSFUSE_INLINE i32 shift_right(i32 a) { return {(i32x16)((u32x16)a.v >> n)}; }  // logical
template <int n>
TRANSFUSE_INLINE i32 shift_right_signed(i32 a) { return {a.v >> n}; }

TRANSFUSE_INLINE f32 abs(f32 a) { return from_bits(bits(a) & set1i(INT32_MAX)); }
TRANSFUSE_INLINE f32 max(f32 a, f32 b) { return select(a > b, a, b); }  // b where either is NaN
TRANSFUSE_INLINE f32 min(f32 a, f32 b) { return select(a < b, a, b); }
TRANSFUSE_INLINE f32 sqrt(f32 a) { return {TRANSFUSE_EACH16(f32x16, __builtin_sqrtf(a.v[i]))}; }
TRANSFUSE_INLINE f32 round(f32 a) {  // to nearest even: from 2^23 on every float is an integer
  const f32 integer = set1(0x1p23f), size = abs(a);
  const i32 sign = bits(a) & set1i(INT32_MIN);
  return from_bits(bits(select(size < integer, (size + integer) - integer, size)) | sign);
}
TRANSFUSE_INLINE i32 to_int(f32 a) { return {__builtin_convertvector(round(a).v, i32x16)}; }  // rounds to nearest even

// a * 2^n with n integral, |n| <= 252: exact steps and one that rounds, each factor normal.
TRANSFUSE_INLINE f32 ldexp(f32 a, f32 n) {
  const i32 k = to_int(n), bias = set1i(127);
  const i32 half = shift_right_signed<1>(k), rest = k - half;
  const i32 quarter = shift_right_signed<1>(rest), last = rest - quarter;
  return ((a * from_bits(shift_left<23>(half + bias))) * from_bits(shift_left<23>(quarter + bias))) *
         from_bits(shift_left<23>(last + bias));
}

// ---- 16-bit storage ----

typedef uint16_t u16x16 __attribute__((vector_size(32)));
TRANSFUSE_INLINE i32 load_words(const uint16_t* p, int64_t n) {
  return {__builtin_convertvector(copy_in<u16x16>(p, n), i32x16)};
}
TRANSFUSE_INLINE void store_words(uint16_t* p, i32 a, int64_t n) {
  const u16x16 word = __builtin_convertvector(a.v, u16x16);
  __builtin_memcpy(p, &word, static_cast<size_t>(n) * sizeof(uint16_t));
}
TRANSFUSE_INLINE f32 load(const bf16* p, int64_t n) {
  return from_bits(shift_left<16>(load_words(&p->bits, at_most(n, lanes))));
}
TRANSFUSE_INLINE f32 load(const bf16* p) { return load(p, lanes); }
TRANSFUSE_INLINE void store(bf16* p, f32 a, int64_t n) {
  const i32 x = bits(a), top = shift_right<16>(x);
  const i32 rounded = shift_right<16>(x + (top & set1i(1)) + set1i(0x7FFF));
  const i32 word = bits(select(isnan(a), from_bits(top | set1i(0x40)), from_bits(rounded)));
  store_words(&p->bits, word, at_most(n, lanes));
}
TRANSFUSE_INLINE void store(bf16* p, f32 a) { store(p, a, lanes); }

TRANSFUSE_INLINE f32 load(const f16* p, int64_t n) {
  const i32 word = load_words(&p->bits, at_most(n, lanes));
  const i32 sign = shift_left<16>(word & set1i(0x8000)), rest = shift_left<13>(word & set1i(0x7FFF));
  const f32 finite = from_bits(rest) * set1(0x1p112f);  // the exponents' biases are 15 and 127; subnormals too
  const mask special = ~(from_bits(rest) < set1(0x1p-96f));  // exponent 31: infinities and NaN
  return from_bits(bits(select(special, from_bits(rest | set1i(0x7F800000)), finite)) | sign);
}
TRANSFUSE_INLINE f32 load(const f16* p) { return load(p, lanes); }
TRANSFUSE_INLINE void store(f16* p, f32 a, int64_t n) {
  const i32 size = bits(abs(a)), sign = shift_right<16>(bits(a) & set1i(INT32_MIN));
  const i32 odd = shift_right<13>(size) & set1i(1);
  const i32 normal = shift_right<13>(size - set1i(112 << 23) + set1i(0xFFF) + odd);  // carries into inf by itself
  const f32 unit = set1(0.5f);  // its last place is float16's smallest subnormal
  const i32 subnormal = bits(abs(a) + unit) - bits(unit);
  f32 word = select(abs(a) < set1(0x1p-14f), from_bits(subnormal), from_bits(normal));
  word = select(abs(a) >= set1(65536.0f), from_bits(set1i(0x7C00)), word);
  word = select(isnan(a), from_bits(set1i(0x7E00) | (shift_right<13>(size) & set1i(0x3FF))), word);
  store_words(&p->bits, bits(word) | sign, at_most(n, lanes));
}
TRANSFUSE_INLINE void store(f16* p, f32 a) { store(p, a, lanes); }

// ---- doubles ----

TRANSFUSE_INLINE f64 set1d(double x) { return {x - f64x8{}}; }
// Lanes 0..7 (half 0) or 8..15 (half 1) of a vector of sixteen, and both together.
template <class Half, class Whole>
TRANSFUSE_INLINE Half half_of(Whole a, int half) {
  Half result;
  __builtin_memcpy(&result, reinterpret_cast<const char*>(&a) + half * sizeof result, sizeof result);
  return result;
}
template <class Whole, class Half>
TRANSFUSE_INLINE Whole joined(Half lo, Half hi) {
  Whole result;
  __builtin_memcpy(&result, &lo, sizeof lo);
  __builtin_memcpy(reinterpret_cast<char*>(&result) + sizeof lo, &hi, sizeof hi);
  return result;
}
TRANSFUSE_INLINE f64 low(f32 a) { return {__builtin_convertvector(half_of<f32x8>(a.v, 0), f64x8)}; }
TRANSFUSE_INLINE f64 high(f32 a) { return {__builtin_convertvector(half_of<f32x8>(a.v, 1), f64x8)}; }
TRANSFUSE_INLINE f32 narrow(f64 lo, f64 hi) {  // one rounding
  return {joined<f32x16>(__builtin_convertvector(lo.v, f32x8), __builtin_convertvector(hi.v, f32x8))};
}
TRANSFUSE_INLINE f64 load(const double* p) { return {copy_in<f64x8>(p, lanes64)}; }
TRANSFUSE_INLINE f64 load(const double* p, int64_t n) { return {copy_in<f64x8>(p, at_most(n, lanes64))}; }
TRANSFUSE_INLINE void store(double* p, f64 a) { __builtin_memcpy(p, &a.v, sizeof a.v); }
TRANSFUSE_INLINE void store(double* p, f64 a, int64_t n) {
  __builtin_memcpy(p, &a.v, static_cast<size_t>(at_most(n, lanes64)) * sizeof(double));
}
TRANSFUSE_INLINE f64 load64(const float* p) { return {__builtin_convertvector(copy_in<f32x8>(p, lanes64), f64x8)}; }
TRANSFUSE_INLINE f64 load64(const bf16* p) { return low(load(p, lanes64)); }
TRANSFUSE_INLINE f64 load64(const f16* p) { return low(load(p, lanes64)); }
TRANSFUSE_INLINE void store64(float* p, f64 a) {
  const f32x8 rounded = __builtin_convertvector(a.v, f32x8);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}
TRANSFUSE_INLINE f64 operator+(f64 a, f64 b) { return {a.v + b.v}; }
TRANSFUSE_INLINE f64 operator-(f64 a, f64 b) { return {a.v - b.v}; }
TRANSFUSE_INLINE f64 operator*(f64 a, f64 b) { return {a.v * b.v}; }
TRANSFUSE_INLINE f64 operator/(f64 a, f64 b) { return {a.v / b.v}; }
TRANSFUSE_INLINE mask64 operator<(f64 a, f64 b) { return {a.v < b.v}; }
TRANSFUSE_INLINE mask64 operator<=(f64 a, f64 b) { return {a.v <= b.v}; }
TRANSFUSE_INLINE mask64 operator>(f64 a, f64 b) { return {a.v > b.v}; }
TRANSFUSE_INLINE mask64 operator>=(f64 a, f64 b) { return {a.v >= b.v}; }
TRANSFUSE_INLINE mask64 operator==(f64 a, f64 b) { return {a.v == b.v}; }
TRANSFUSE_INLINE mask64 isnan(f64 a) { return {a.v != a.v}; }
TRANSFUSE_INLINE mask64 operator&(mask64 a, mask64 b) { return {a.v & b.v}; }
TRANSFUSE_INLINE mask64 operator|(mask64 a, mask64 b) { return {a.v | b.v}; }
TRANSFUSE_INLINE mask64 operator~(mask64 a) { return {~a.v}; }
TRANSFUSE_INLINE mask64 low(mask a) { return {__builtin_convertvector(half_of<i32x8>(a.v, 0), i64x8)}; }
TRANSFUSE_INLINE mask64 high(mask a) { return {__builtin_convertvector(half_of<i32x8>(a.v, 1), i64x8)}; }
TRANSFUSE_INLINE mask narrow(mask64 lo, mask64 hi) {
  return {joined<i32x16>(__builtin_convertvector(lo.v, i32x8), __builtin_convertvector(hi.v, i32x8))};
}
TRANSFUSE_INLINE f64 select(mask64 m, f64 yes, f64 no) {
  return {(f64x8)((m.v & (i64x8)yes.v) | (~m.v & (i64x8)no.v))};
}
// The bits of a and of word, as a double.
TRANSFUSE_INLINE f64 and_bits(f64 a, uint64_t word) { return {(f64x8)((i64x8)a.v & static_cast<int64_t>(word))}; }
TRANSFUSE_INLINE f64 or_bits(f64 a, uint64_t word) { return {(f64x8)((i64x8)a.v | static_cast<int64_t>(word))}; }
TRANSFUSE_INLINE f64 max(f64 a, f64 b) { return select(a > b, a, b); }  // b where either is NaN
TRANSFUSE_INLINE f64 min(f64 a, f64 b) { return select(a < b, a, b); }
TRANSFUSE_INLINE f64 abs(f64 a) { return and_bits(a, INT64_MAX); }
TRANSFUSE_INLINE f64 sqrt(f64 a) { return {TRANSFUSE_EACH8(f64x8, __builtin_sqrt(a.v[i]))}; }
TRANSFUSE_INLINE f64 round(f64 a) {
  const f64 integer = set1d(0x1p52), size = abs(a);
  const f64 whole = select(size < integer, (size + integer) - integer, size);
  return {(f64x8)((i64x8)whole.v | ((i64x8)a.v & INT64_MIN))};
}
// a * 2^n for integral n with |n| <= 1000 and a normal result: the low bits of the sum are n + 1023.
TRANSFUSE_INLINE f64 ldexp(f64 a, f64 n) {
  const f64x8 sum = n.v + (0x1.8p52 + 1023.0);
  return {a.v * (f64x8)((i64x8)sum << 52)};
}

// ---- fused multiply-add ----

#if defined(__ARM_FEATURE_FMA)  // every aarch64
TRANSFUSE_INLINE f32 fma(f32 a, f32 b, f32 c) { return {TRANSFUSE_EACH16(f32x16, __builtin_fmaf(a.v[i], b.v[i], c.v[i]))}; }
TRANSFUSE_INLINE f64 fma(f64 a, f64 b, f64 c) { return {TRANSFUSE_EACH8(f64x8, __builtin_fma(a.v[i], b.v[i], c.v[i]))}; }
#else
// Not inlined: it is fifty instructions, and the kernels are made of it.
static __attribute__((noinline, unused)) void fma_in_double(const f32& a, const f32& b, f32& c) {
  c = narrow(low(a) * low(b) + low(c), high(a) * high(b) + high(c));
}
TRANSFUSE_INLINE f32 fma(f32 a, f32 b, f32 c) {
  fma_in_double(a, b, c);
  return c;
}
TRANSFUSE_INLINE f64 fma(f64 a, f64 b, f64 c) { return a * b + c; }
#endif
TRANSFUSE_INLINE f32 negate(f32 a) { return from_bits(bits(a) ^ set1i(INT32_MIN)); }
TRANSFUSE_INLINE f64 negate(f64 a) { return {(f64x8)((i64x8)a.v ^ INT64_MIN)}; }
TRANSFUSE_INLINE f32 fms(f32 a, f32 b, f32 c) { return fma(a, b, negate(c)); }   // a*b - c
TRANSFUSE_INLINE f32 fnma(f32 a, f32 b, f32 c) { return fma(negate(a), b, c); }  // c - a*b
TRANSFUSE_INLINE f64 fms(f64 a, f64 b, f64 c) { return fma(a, b, negate(c)); }
TRANSFUSE_INLINE f64 fnma(f64 a, f64 b, f64 c) { return fma(negate(a), b, c); }

// ---- across lanes ----

// Sum over lanes, one fixed tree: (i, i+8), then (i, i+4), (i, i+2), (i, i+1).
TRANSFUSE_INLINE float reduce_add(f32 x) {
  float s[16];
  store(s, x);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] = s[i] + s[i + width];
  return s[0];
}
TRANSFUSE_INLINE double reduce_add(f64 x) {
  double s[8];
  store(s, x);
  for (int width = 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] = s[i] + s[i + width];
  return s[0];
}
// Largest lane; a NaN in any lane gives NaN (a row maximum propagates NaN).
TRANSFUSE_INLINE float reduce_max(f32 x) {
  if (any(isnan(x))) return __builtin_nanf("");
  float most = x.v[0];
  for (int i = 1; i < 16; ++i) most = x.v[i] > most ? x.v[i] : most;
  return most;
}
TRANSFUSE_INLINE double reduce_max(f64 x) {
  if (any(isnan(x))) return __builtin_nan("");
  double most = x.v[0];
  for (int i = 1; i < 8; ++i) most = x.v[i] > most ? x.v[i] : most;
  return most;
}
// table[x] of sixteen 16-bit x, whose bits are its index.
template <class T>
TRANSFUSE_INLINE void gather(T* out, const T* table, const T* x) {
  for (int i = 0; i < 16; ++i) out[i] = table[x[i].bits];
}
template <class T>
TRANSFUSE_INLINE f32 gather(const float* table, const T* x) {
  return {TRANSFUSE_EACH16(f32x16, table[x[i].bits])};
}
// Sixteen rows as columns: out[16 c + r] = rows[r][c] for c in [0, n).
TRANSFUSE_INLINE void store_transposed(float* out, const f32* rows, int64_t n) {
  float buffer[16][16];
  for (int r = 0; r < 16; ++r) store(buffer[r], rows[r]);
  for (int64_t c = 0; c < n; ++c)
    for (int r = 0; r < 16; ++r) out[c * lanes + r] = buffer[r][c];
}

#undef TRANSFUSE_EACH16
#undef TRANSFUSE_EACH8

}  // namespace transfuse::cpu::TRANSFUSE_ISA
