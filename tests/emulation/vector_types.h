// CUDA's built-in vector types, with CUDA's alignments: a misaligned access is reported as the device would fault.
#pragma once

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// clang-format off
#define TRANSFUSE_VECTORS(T, name, align2, align4)                                          \
  struct name##1 { T x; };                                                                  \
  struct alignas(align2) name##2 { T x, y; };                                               \
  struct name##3 { T x, y, z; };                                                            \
  struct alignas(align4) name##4 { T x, y, z, w; };                                         \
  constexpr name##1 make_##name##1(T x) { return {x}; }                                     \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                             \
  constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                     \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
TRANSFUSE_VECTORS(signed char, char, 2, 4)
TRANSFUSE_VECTORS(unsigned char, uchar, 2, 4)
TRANSFUSE_VECTORS(short, short, 4, 8)
TRANSFUSE_VECTORS(unsigned short, ushort, 4, 8)
TRANSFUSE_VECTORS(int, int, 8, 16)
TRANSFUSE_VECTORS(unsigned, uint, 8, 16)
TRANSFUSE_VECTORS(long long, longlong, 16, 16)
TRANSFUSE_VECTORS(unsigned long long, ulonglong, 16, 16)
TRANSFUSE_VECTORS(float, float, 8, 16)
TRANSFUSE_VECTORS(double, double, 16, 16)
#undef TRANSFUSE_VECTORS
// clang-format on
