// Every operation of kernels/cpu/vec.h on fixed inputs, hashed. Built once per ISA level. Prints two hashes: of what is
// exact or rounded once everywhere, equal on all levels; and of fused multiply-adds, equal on all levels that have them.
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "vec.h"

using namespace transfuse::cpu::TRANSFUSE_ISA;
using transfuse::cpu::bf16;
using transfuse::cpu::f16;

static unsigned digest = 0;

static void mix(f32 v) {  // the bits of a NaN are the processor's own
  float lane[16];
  unsigned word[16];
  store(lane, select(isnan(v), from_bits(set1i(0x7FC00000)), v));
  memcpy(word, lane, sizeof lane);
  for (unsigned w : word) digest = digest * 31 + w;
}
static void mix(f64 v) {
  double lane[8];
  unsigned word[16];
  store(lane, select(isnan(v), set1d(__builtin_nan("")), v));
  memcpy(word, lane, sizeof lane);
  for (unsigned w : word) digest = digest * 31 + w;
}

int main() {
  float x[64], y[64];
  for (int i = 0; i < 64; ++i) {
    x[i] = (i - 20) * 1.37f;
    y[i] = (i % 7) * 0.31f - 1;
  }
  const f32 a = load(x + 3), b = load(y + 5), t = load(x, 11), z = load(y + 1, 16), nan = (a - a) / zero();
  for (f32 v : {a + b, a - b, a * b, a / b, sqrt(abs(a)), round(a), -a, max(a, b),
                min(a, b), max_nan(a, b), max_nan(nan, b), ldexp(a, round(b * set1(9))), ldexp(a, set1(-140)), to_float(to_int(a))})
    mix(select(isnan(v), set1(7), v));
  for (mask m : {a < b, a <= b, a > b, a >= b, a == a, isnan(nan), (a < b) & (t > z), (a < b) | (t > z), ~(a < b), first_n(5)}) {
    mix(select(m, a, b));
    digest = digest * 31 + any(m) * 2 + all(m);
  }
  float table[lookup_size];
  for (int i = 0; i < lookup_size; ++i) table[i] = i * 0.37f - 5;
  mix(lookup(table, bits(a)));  // by the low bits of an index of any size
  mix(lookup(table, iota() + set1i(lookup_size - 3)));
  static float entries[1 << 16];
  static bf16 numbers[1 << 16];
  for (int i = 0; i < 1 << 16; ++i) numbers[i].bits = static_cast<uint16_t>(i * 40503 + 11), entries[i] = i * 0.37f - 5;
  bf16 at[lanes], found[lanes];
  store(at, a);
  gather(found, numbers, at);
  mix(gather(entries, at));
  mix(load(found));
  float kept[lanes] = {};
  int32_t kept_numbers[lanes] = {};
  store_compressed(kept, a, a < b);
  store_compressed(kept_numbers, iota(), a < b);
  for (int i = 0; i < __builtin_popcount(to_bits(a < b)); ++i) mix(set1(kept[i] * kept_numbers[i]));
  unsigned char bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = i % 3;
  mix(select(nonzero(bytes), a, b));
  for (i32 v : {bits(a) + bits(b), bits(a) - set1i(12345), bits(a) & bits(b), bits(a) | bits(b), bits(a) ^ bits(b),
                shift_left<3>(bits(a)), shift_right<3>(bits(a)), shift_right_signed<3>(bits(a))})
    mix(from_bits(v));
  bf16 half[16];
  store(half, a);
  mix(load(half));
  mix(load(half, 7));
  store(half, b, 5);
  mix(load(half));
  store(half, nan);
  mix(select(isnan(load(half)), a, b));
  const f64 la = low(a), lb = low(b), hb = high(b);
  for (f64 v : {la + hb, la - hb, la * hb, la / hb, sqrt(abs(la)), -la, max_nan(la, lb), and_bits(la, 0xFFFFFFFFF8000000u), or_bits(la, 12345),
                round_to_odd(la / hb), select(la <= lb, hb, la), select(la >= lb, hb, la), select(la == la, hb, la), select(la < lb, hb, la), select(la > lb, hb, la),
                max(la, lb), min(la, lb), round(la), abs(la), ldexp(la, round(lb)), set1d(reduce_add(la))})
    mix(v);
  mix(narrow(la / hb, high(a) / high(t + set1(1))));
  mix(set1(reduce_add(a)));
  mix(set1(reduce_max(a)));
  store(x, a, 9);
  mix(load(x));

  for (i32 v : {mul_low(bits(a), bits(b)), mul_high_unsigned(bits(a), bits(b)), iota() + set1i(3)}) mix(from_bits(v & set1i(0x7F7FFFFF)));
  mix(select(less_unsigned(bits(a), bits(b)), a, b));

  float special[16] = {0, -0.0f, 1, 65504, 65519, 65520, -70000, 6e-5f, 6.1e-5f, 5.9e-8f, 2.9e-8f, 3e-8f, 1e-9f, 1.0009765625f, 1.00048828125f, 0.33f};
  f16 small[16];
  store(small, load(special));
  mix(load(small));
  mix(load(small, 3));
  for (f16 h : small) digest = digest * 31 + h.bits;
  store(small, a / set1(0.0f));
  mix(load(small));
  store(small, b, 5);
  mix(load64(small));
  mix(load64(small + 8));
  store(small, nan);
  mix(select(isnan(load(small)), a, b));
  digest = digest * 31 + static_cast<unsigned>(to_float(small[3]) == to_float(small[3]));

  double d[32];
  for (int i = 0; i < 32; ++i) d[i] = (i - 9) * 0.7 / 3;
  mix(load(d + 1, 5));
  mix(load(d + 1, 8));
  store(d + 4, la / hb, 3);
  mix(load(d));
  const wide w = load_wide(d + 2), part = load_wide(d + 2, 11), ab = widen(a);
  for (wide v : {w + ab, w - ab, w * ab, w / ab, -w, max(w, ab), min(w, part), abs(w), sqrt(abs(w)), round(w), select(w < ab, part, w),
                 select(widen(a < b), part, w), select((w > ab) & ~(w >= part), w, ab), select(first_n(9), w, part), load_wide(half, 7)}) {
    mix(v.lo);
    mix(v.hi);
    mix(narrow(v));
    mix(narrow_to_odd(v));
    mix(set1(static_cast<float>(reduce_add(v))));
    mix(set1(static_cast<float>(reduce_max(v))));
  }
  mix(select(narrow(w < ab), a, b));
  digest = digest * 31 + any(w < ab) * 8 + all(w < ab) * 4 + any(w == w) * 2 + all(w == w) + to_bits(a < b);
  store_wide(half, w);
  mix(load(half));
  store_wide(small, w, 13);
  mix(load(small, 13));
  store_wide(d, ab, 11);
  store_wide(x, w, 10);
  for (double v : d) mix(set1d(v));
  mix(load(x));
  f32 rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = a * set1(i + 0.5f);
  float square[256];
  store_transposed(square, rows, 16);
  for (int i = 0; i < 256; i += 16) mix(load(square + i));
  printf("%u ", digest);

  for (f32 v : {fma(a, b, t), fms(a, b, t), fnma(a, b, t)}) mix(v);
  for (f64 v : {fma(la, lb, hb), fms(la, lb, hb), fnma(la, lb, hb)}) mix(v);
  for (wide v : {fma(w, ab, part), fms(w, ab, part), fnma(w, ab, part)}) mix(v.lo + v.hi);
  printf("%u\n", digest);
}
