// Every operation of kernels/cpu/vec.h on fixed inputs, hashed. Built once per ISA level: the hashes must be equal.
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "vec.h"

using namespace transfuse::cpu::TRANSFUSE_ISA;
using transfuse::cpu::bf16;

static unsigned digest = 0;

static void mix(f32 v) {
  float lane[16];
  unsigned word[16];
  store(lane, v);
  memcpy(word, lane, sizeof lane);
  for (unsigned w : word) digest = digest * 31 + w;
}
static void mix(f64 v) {
  double lane[8];
  unsigned word[16];
  store(lane, v);
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
  for (f32 v : {a + b, a - b, a * b, a / b, fma(a, b, t), fms(a, b, t), fnma(a, b, t), sqrt(abs(a)), round(a), -a, max(a, b),
                min(a, b), max_nan(a, b), max_nan(nan, b), ldexp(a, round(b * set1(9))), ldexp(a, set1(-140)), to_float(to_int(a))})
    mix(select(isnan(v), set1(7), v));
  for (mask m : {a < b, a <= b, a > b, a >= b, a == a, isnan(nan), (a < b) & (t > z), (a < b) | (t > z), ~(a < b), first_n(5)}) {
    mix(select(m, a, b));
    digest = digest * 31 + any(m) * 2 + all(m);
  }
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
  for (f64 v : {la + hb, la - hb, la * hb, la / hb, fma(la, lb, hb), fnma(la, lb, hb), select(la < lb, hb, la), select(la > lb, hb, la),
                max(la, lb), min(la, lb), round(la), abs(la), ldexp(la, round(lb)), set1d(reduce_add(la))})
    mix(v);
  mix(narrow(la / hb, high(a) / high(t + set1(1))));
  mix(set1(reduce_add(a)));
  mix(set1(reduce_max(a)));
  store(x, a, 9);
  mix(load(x));
  printf("%u\n", digest);
}
