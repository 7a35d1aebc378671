// What exp of floats is made of: one home for the CPU (kernels/cpu/exp.h says how) and the GPU, which so give the same
// bits. Scalars, which device code may use as they are.
#pragma once

namespace transfuse {

constexpr float exp_log2e = 0x1.715476p+0f;
constexpr float exp_ln2_hi = 0x1.62e400p-1f;   // 15 bits: n * ln2_hi is exact for |n| < 2^9
constexpr float exp_ln2_lo = 0x1.7f7d1cp-20f;  // ln 2 - ln2_hi
constexpr float exp_lowest = -0x1.a56ef8p+6f;  // -152 ln 2: rounds to 0, and so does everything below
constexpr float exp_highest = 89.0f;           // e^89 overflows, and so does everything above
constexpr float exp_integer = 0x1.8p23f;       // adding it rounds to an integer, found in the low bits of the sum

// (e^r - 1) / r = 1 + q1 r + ... + q5 r^5 for |r| <= ln 2 / 2, minimax, relative error of e^r 2^-28.
constexpr float exp_q1 = 0x1.fffffcp-2f;
constexpr float exp_q2 = 0x1.555492p-3f;
constexpr float exp_q3 = 0x1.5558f2p-5f;
constexpr float exp_q4 = 0x1.1239e2p-7f;
constexpr float exp_q5 = 0x1.6a243ap-10f;

}  // namespace transfuse
