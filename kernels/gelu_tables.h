// The coefficients of GELU's tail and of the tail of its derivative in float, for the erf and the tanh form: segments
// on [0, 63/16), and the factors beside an exponential that hold beyond. One home for the CPU and the GPU, which so
// give the same bits.
//
// A segment of width 1/8 has a polynomial of degree 5 in u = t - centre, |u| <= 1/16, whose coefficients are looked up
// by the segment's number: minimax in relative error, 2^-27 at worst, with the constant term rounded to float first.
// The subtraction that gives u is exact. Centres are k / 8 for `tail` and k / 8 + shift for `slope`, where the shift
// moves one of them onto the root of gelu' (to 2^-20), so that the derivative keeps its relative accuracy down to its
// zero.
#pragma once

namespace transfuse {

namespace {  // what kernels/cpu compiles once per ISA level must have no name that the linker merges

constexpr float segments_end = 63.0f / 16;
constexpr float segment_rounding = 0x1.8p20f;  // adding it rounds to a multiple of 1/8, whose number the low bits hold
constexpr int num_segments = 32, num_coefficients = 6;

struct Segments {
  float coefficients[num_coefficients][num_segments];  // coefficient i of segment k: [i][k]
};

struct ErfSegments {
  // Phi(-t)
  static constexpr Segments tail = {{
    {0x1p-1f, 0x1.cd116cp-2f, 0x1.9aecbap-2f, 0x1.6a527ap-2f, 0x1.3bf144p-2f, 0x1.105e82p-2f, 0x1.d022p-3f,
     0x1.86bb5p-3f, 0x1.44ed0cp-3f, 0x1.0ad7dap-3f, 0x1.b0bdd2p-4f, 0x1.5a6196p-4f, 0x1.11a46ep-4f, 0x1.aaa65cp-5f,
     0x1.482a24p-5f, 0x1.f20394p-6f, 0x1.74bcf8p-6f, 0x1.13243cp-6f, 0x1.90925p-7f, 0x1.1f85a2p-7f, 0x1.96f4e6p-8f,
     0x1.1bee6cp-8f, 0x1.869044p-9f, 0x1.08c89p-9f, 0x1.61de2p-10f, 0x1.d21af4p-11f, 0x1.2e86fep-11f, 0x1.8301bep-12f,
     0x1.e7dbcap-13f, 0x1.2eff8p-13f, 0x1.72d956p-14f, 0x1.bf3766p-15f},
    {-0x1.988454p-2f, -0x1.95567ap-2f, -0x1.8bf2bap-2f, -0x1.7cc796p-2f, -0x1.6883dp-2f, -0x1.50096cp-2f,
     -0x1.345d5ep-2f, -0x1.169596p-2f, -0x1.ef8e5ap-3f, -0x1.b1ec62p-3f, -0x1.7610bap-3f, -0x1.3d7712p-3f,
     -0x1.094086p-3f, -0x1.b46178p-4f, -0x1.616454p-4f, -0x1.19bfa2p-4f, -0x1.ba4b44p-5f, -0x1.55c74p-5f,
     -0x1.0402ep-5f, -0x1.857a94p-6f, -0x1.1f2f06p-6f, -0x1.a0f22cp-7f, -0x1.29fa56p-7f, -0x1.a34ea4p-8f,
     -0x1.227214p-8f, -0x1.8c2226p-9f, -0x1.09f38ep-9f, -0x1.5f90f6p-10f, -0x1.c9897ep-11f, -0x1.251bf8p-11f,
     -0x1.71b92ep-12f, -0x1.cb2206p-13f},
    {-0x1.570b9ep-30f, 0x1.957422p-6f, 0x1.8c1998p-5f, 0x1.1d7636p-4f, 0x1.687b14p-4f, 0x1.a421cap-4f, 0x1.ce9166p-4f,
     0x1.e77b5ap-4f, 0x1.ef89dcp-4f, 0x1.e82ae4p-4f, 0x1.d38e52p-4f, 0x1.b485a4p-4f, 0x1.8ddd1cp-4f, 0x1.628f1ep-4f,
     0x1.35381cp-4f, 0x1.082582p-4f, 0x1.ba4bfap-5f, 0x1.6b21b8p-5f, 0x1.248186p-5f, 0x1.ce80bep-6f, 0x1.66f9c8p-6f,
     0x1.119efep-6f, 0x1.99b6ccp-7f, 0x1.2d6254p-7f, 0x1.b3aa4cp-8f, 0x1.357b56p-8f, 0x1.b02ab4p-9f, 0x1.28a284p-9f,
     0x1.905762p-10f, 0x1.09a108p-10f, 0x1.5a9dcp-11f, 0x1.bcc8fp-12f},
    {0x1.10584ep-4f, 0x1.09fa38p-4f, 0x1.eec9eep-5f, 0x1.b4916ap-5f, 0x1.6897aap-5f, 0x1.10d15ap-5f, 0x1.67a5c4p-6f,
     0x1.5cb19p-7f, 0x1.b47b32p-18f, -0x1.336948p-7f, -0x1.185f16p-6f, -0x1.790b64p-6f, -0x1.b9f9b8p-6f,
     -0x1.dd49ep-6f, -0x1.e5eca8p-6f, -0x1.d894a6p-6f, -0x1.ba4e8cp-6f, -0x1.907b98p-6f, -0x1.60104ep-6f,
     -0x1.2d3a8ap-6f, -0x1.f68ca2p-7f, -0x1.9958ccp-7f, -0x1.45e582p-7f, -0x1.fbcca2p-8f, -0x1.834024p-8f,
     -0x1.215f3ep-8f, -0x1.a7d898p-9f, -0x1.306b7p-9f, -0x1.acedc8p-10f, -0x1.288a56p-10f, -0x1.9276c2p-11f,
     -0x1.0c20ecp-11f},
    {-0x1.41482cp-19f, -0x1.04aaecp-7f, -0x1.0f4afep-6f, -0x1.24ca66p-7f, -0x1.276afcp-6f, -0x1.c4f992p-6f,
     -0x1.8cf596p-6f, -0x1.41521ep-6f, -0x1.38516cp-6f, -0x1.1df464p-6f, -0x1.8b705ap-7f, -0x1.52276p-7f,
     -0x1.5361cep-8f, -0x1.51cb1ep-9f, 0x1.439c6ap-12f, 0x1.2f6858p-9f, 0x1.20cf68p-8f, 0x1.7e717p-8f, 0x1.9f9e56p-8f,
     0x1.9a2f74p-8f, 0x1.88ba7ep-8f, 0x1.627e72p-8f, 0x1.3a5854p-8f, 0x1.04e2ecp-8f, 0x1.b55e56p-9f, 0x1.5bbdc6p-9f,
     0x1.1186d4p-9f, 0x1.9e9f54p-10f, 0x1.35b46p-10f, 0x1.c1e488p-11f, 0x1.3fa9f8p-11f, 0x1.bdd386p-12f},
    {-0x1.45f6ap-7f, -0x1.05e198p-7f, -0x1.ff829ap-9f, -0x1.e48bb6p-7f, -0x1.cad4b4p-8f, 0x1.208e6cp-8f,
     0x1.ed2914p-10f, -0x1.5c6d0cp-10f, 0x1.366c4cp-9f, 0x1.72f3d2p-8f, 0x1.a56e96p-9f, 0x1.cb6ffap-8f,
     0x1.0ec84ap-8f, 0x1.5290eap-8f, 0x1.2549f8p-8f, 0x1.199edcp-8f, 0x1.4124fap-9f, 0x1.6738d4p-11f,
     -0x1.52b30ep-14f, -0x1.59e97cp-12f, -0x1.b72b1cp-11f, -0x1.f58164p-11f, -0x1.486edap-10f, -0x1.02091p-10f,
     -0x1.2cda32p-10f, -0x1.fabc14p-11f, -0x1.d40e52p-11f, -0x1.75b962p-11f, -0x1.35a0a2p-11f, -0x1.dcfa3ep-12f,
     -0x1.64566ep-12f, -0x1.07c62ep-12f}}};
  static constexpr float shift = 1878 * 0x1p-20f;
  static constexpr Segments slope = {{
    {0x1.fe8964p-2f, 0x1.98f5e8p-2f, 0x1.369078p-2f, 0x1.b48678p-3f, 0x1.0d1cbep-3f, 0x1.eb07c2p-5f, 0x1.e5db12p-23f,
     -0x1.88149ap-5f, -0x1.5707cep-4f, -0x1.bbc746p-4f, -0x1.f7012p-4f, -0x1.076278p-3f, -0x1.04efep-3f,
     -0x1.ef4aa4p-4f, -0x1.c5ae1cp-4f, -0x1.930288p-4f, -0x1.5c513cp-4f, -0x1.25959ep-4f, -0x1.e3750ep-5f,
     -0x1.855b68p-5f, -0x1.3304b2p-5f, -0x1.da6f6ep-6f, -0x1.676acap-6f, -0x1.0b1ad8p-6f, -0x1.859e28p-7f,
     -0x1.16f91ep-7f, -0x1.885206p-8f, -0x1.0ef8aep-8f, -0x1.6fc25cp-9f, -0x1.ea7828p-10f, -0x1.417242p-10f,
     -0x1.9e2a88p-11f},
    {-0x1.9883fcp-1f, -0x1.91fd32p-1f, -0x1.7f397ep-1f, -0x1.6182fap-1f, -0x1.3ad834p-1f, -0x1.0db9b6p-1f,
     -0x1.b9d9aap-2f, -0x1.56774p-2f, -0x1.ece52p-3f, -0x1.3c462ap-3f, -0x1.433ae4p-4f, -0x1.089cb8p-6f,
     0x1.0e3a96p-5f, 0x1.194712p-4f, 0x1.788342p-4f, 0x1.ab7ad2p-4f, 0x1.ba4a8ap-4f, 0x1.ad8e44p-4f, 0x1.8d9598p-4f,
     0x1.61ce78p-4f, 0x1.3068c8p-4f, 0x1.fc5d98p-5f, 0x1.9d11cp-5f, 0x1.4740b2p-5f, 0x1.fa54eap-6f, 0x1.7eeeb8p-6f,
     0x1.1b622ap-6f, 0x1.9ab80ep-7f, 0x1.23a24ap-7f, 0x1.96021ap-8f, 0x1.152dcep-8f, 0x1.734e4ap-9f},
    {0x1.d11228p-10f, 0x1.997cb4p-4f, 0x1.885906p-3f, 0x1.1495cp-2f, 0x1.52b81cp-2f, 0x1.7b7382p-2f, 0x1.8d9a8cp-2f,
     0x1.8a0346p-2f, 0x1.73394ap-2f, 0x1.4d125cp-2f, 0x1.1c2d4p-2f, 0x1.cac1c4p-3f, 0x1.5a87dp-3f, 0x1.df0c92p-4f,
     0x1.1f5d78p-4f, 0x1.f770ap-6f, -0x1.8e9a2ap-12f, -0x1.7ad66ap-6f, -0x1.381f42p-5f, -0x1.7c056ap-5f,
     -0x1.93e80ap-5f, -0x1.8b2814p-5f, -0x1.6c5e34p-5f, -0x1.40b368p-5f, -0x1.0f9418p-5f, -0x1.bcb7fep-6f,
     -0x1.614598p-6f, -0x1.10fabcp-6f, -0x1.9b1d0cp-7f, -0x1.2e1cfep-7f, -0x1.b1d72ep-8f, -0x1.30a07ep-8f},
    {0x1.efb1f2p-3f, 0x1.068f1ap-2f, 0x1.d595eap-3f, 0x1.7fd53ap-3f, 0x1.144e74p-3f, 0x1.3a3542p-4f, 0x1.2a31ccp-6f,
     -0x1.25185cp-5f, -0x1.4cb2f2p-4f, -0x1.d8d3d8p-4f, -0x1.18c38cp-3f, -0x1.2b9766p-3f, -0x1.2775d8p-3f,
     -0x1.10b8f4p-3f, -0x1.d978f8p-4f, -0x1.8214e2p-4f, -0x1.258d1p-4f, -0x1.98c272p-5f, -0x1.f34154p-6f,
     -0x1.d5793ep-7f, -0x1.e78d7p-10f, 0x1.c9d89ap-8f, 0x1.9beef4p-7f, 0x1.fa10bcp-7f, 0x1.0a3e2p-6f, 0x1.ff47ep-7f,
     0x1.cc6ae8p-7f, 0x1.8a9d1cp-7f, 0x1.4497d4p-7f, 0x1.01a948p-7f, 0x1.8c50bp-8f, 0x1.281422p-8f},
    {0x1.14e27p-1f, -0x1.5d20c8p-5f, -0x1.3dc6fep-4f, -0x1.90488p-4f, -0x1.c45a12p-4f, -0x1.e587d6p-4f,
     -0x1.d29758p-4f, -0x1.9bb012p-4f, -0x1.4b1918p-4f, -0x1.cb1cdap-5f, -0x1.ec8dfcp-6f, -0x1.0b1516p-8f,
     0x1.16721p-6f, 0x1.e0bf9cp-6f, 0x1.3b29d6p-5f, 0x1.703be2p-5f, 0x1.63fbdep-5f, 0x1.4d8c84p-5f, 0x1.201d94p-5f,
     0x1.ceb448p-6f, 0x1.4c4c3p-6f, 0x1.cdce08p-7f, 0x1.1c83fp-7f, 0x1.9de3dcp-9f, -0x1.60d59p-21f, -0x1.254d6ep-9f,
     -0x1.ed7d7ep-9f, -0x1.135d36p-8f, -0x1.133882p-8f, -0x1.0059d8p-8f, -0x1.b97a16p-9f, -0x1.6b1248p-9f},
    {-0x1.01d50ap2f, -0x1.cb01e4p-5f, -0x1.616e86p-5f, -0x1.04bd6cp-5f, -0x1.83601cp-6f, 0x1.657bfp-11f,
     0x1.de6d2cp-7f, 0x1.bcda78p-6f, 0x1.14724ap-5f, 0x1.4b56c2p-5f, 0x1.54569ep-5f, 0x1.508f12p-5f, 0x1.17f52p-5f,
     0x1.517cf6p-6f, 0x1.6125dap-7f, 0x1.13c056p-8f, -0x1.d4ea0ap-9f, -0x1.048ab6p-7f, -0x1.5fd606p-7f,
     -0x1.852b02p-7f, -0x1.7ac762p-7f, -0x1.56031ep-7f, -0x1.22c0c6p-7f, -0x1.a6831ap-8f, -0x1.316c56p-8f,
     -0x1.865f1ep-9f, -0x1.64065p-10f, -0x1.bbaa38p-12f, 0x1.2399aep-12f, 0x1.9680b4p-11f, 0x1.f16ce4p-11f,
     0x1.001b38p-10f}}};
};

struct TanhSegments {
  // E / (1 + E)
  static constexpr Segments tail = {{
    {0x1p-1f, 0x1.cd1196p-2f, 0x1.9aee04p-2f, 0x1.6a5698p-2f, 0x1.3bfa4cp-2f, 0x1.106e68p-2f, 0x1.d0523p-3f,
     0x1.86fc76p-3f, 0x1.453d22p-3f, 0x1.0b3234p-3f, 0x1.b1795ep-4f, 0x1.5b13b6p-4f, 0x1.123c8ep-4f, 0x1.ab859p-5f,
     0x1.48a34ap-5f, 0x1.f215p-6f, 0x1.73ef8ap-6f, 0x1.118edep-6f, 0x1.8c25e8p-7f, 0x1.1a396ep-7f, 0x1.8b6cccp-8f,
     0x1.103a64p-8f, 0x1.701acep-9f, 0x1.e87a7ep-10f, 0x1.3dd716p-10f, 0x1.95510ap-11f, 0x1.fa1996p-12f,
     0x1.352504p-12f, 0x1.71379ap-13f, 0x1.aebd2cp-14f, 0x1.ea7566p-15f, 0x1.104e78p-15f},
    {-0x1.988454p-2f, -0x1.95528p-2f, -0x1.8be3bp-2f, -0x1.7ca8dp-2f, -0x1.685438p-2f, -0x1.4fcc06p-2f,
     -0x1.341904p-2f, -0x1.1653f8p-2f, -0x1.ef2634p-3f, -0x1.b1b338p-3f, -0x1.7614e2p-3f, -0x1.3dbe84p-3f,
     -0x1.09c7acp-3f, -0x1.b5d624p-4f, -0x1.6318e4p-4f, -0x1.1b86dep-4f, -0x1.bda58p-5f, -0x1.58a19ap-5f,
     -0x1.06289ap-5f, -0x1.882992p-6f, -0x1.20431p-6f, -0x1.a03e64p-7f, -0x1.26ffdap-7f, -0x1.9a2f3ep-8f,
     -0x1.178bf2p-8f, -0x1.753c28p-9f, -0x1.e7bfcap-10f, -0x1.37b01ap-10f, -0x1.8546c2p-11f, -0x1.dab3b6p-12f,
     -0x1.1a5e3cp-12f, -0x1.477186p-13f},
    {-0x1.672a38p-30f, 0x1.97bc2ap-6f, 0x1.8dee3ep-5f, 0x1.1ea6f4p-4f, 0x1.696648p-4f, 0x1.a4ad9ap-4f, 0x1.ceb24ep-4f,
     0x1.e70bd2p-4f, 0x1.ee645p-4f, 0x1.e6797ep-4f, 0x1.d18ac8p-4f, 0x1.b271d6p-4f, 0x1.8c0d42p-4f, 0x1.61392ep-4f,
     0x1.348fb4p-4f, 0x1.0834a4p-4f, 0x1.bbbdecp-5f, 0x1.6d9ab2p-5f, 0x1.279c68p-5f, 0x1.d5107cp-6f, 0x1.6d24f2p-6f,
     0x1.16d146p-6f, 0x1.a178e6p-7f, 0x1.324a7cp-7f, 0x1.b82a36p-8f, 0x1.358efcp-8f, 0x1.a9d792p-9f, 0x1.1e3ffcp-9f,
     0x1.77c734p-10f, 0x1.e15302p-11f, 0x1.2c8186p-11f, 0x1.6d7f42p-12f},
    {0x1.11b164p-4f, 0x1.0b1bc8p-4f, 0x1.f04aap-5f, 0x1.b4abfap-5f, 0x1.67c48p-5f, 0x1.0ed74p-5f, 0x1.613aa8p-6f,
     0x1.4d3c0ep-7f, -0x1.b44446p-12f, -0x1.3d9b5ap-7f, -0x1.1ab3ecp-6f, -0x1.77f93ep-6f, -0x1.b5ee52p-6f,
     -0x1.d6b47p-6f, -0x1.de3d72p-6f, -0x1.d0f13p-6f, -0x1.b3e0bcp-6f, -0x1.8c083ap-6f, -0x1.5dfd9ap-6f,
     -0x1.2d531ap-6f, -0x1.fa6a7p-7f, -0x1.9fb2f6p-7f, -0x1.4d680ap-7f, -0x1.055f32p-7f, -0x1.90695cp-8f,
     -0x1.2ba36ep-8f, -0x1.b5db28p-9f, -0x1.382f8ap-9f, -0x1.b2107p-10f, -0x1.26102p-10f, -0x1.83e868p-11f,
     -0x1.f1d8f8p-12f},
    {-0x1.505ff8p-19f, -0x1.b2b7e4p-7f, -0x1.4214c4p-6f, -0x1.1de98ep-6f, -0x1.b2878cp-7f, -0x1.3bc92cp-6f,
     -0x1.769c1cp-6f, -0x1.8aa6bep-6f, -0x1.54ddb8p-6f, -0x1.3eca7ep-6f, -0x1.d96264p-7f, -0x1.6d37dep-7f,
     -0x1.a513e4p-8f, -0x1.cbbc2ep-10f, 0x1.5cdb74p-11f, 0x1.721546p-9f, 0x1.2cf6cp-8f, 0x1.7829aap-8f,
     0x1.7716e2p-8f, 0x1.89d79ap-8f, 0x1.79bep-8f, 0x1.568138p-8f, 0x1.356a7cp-8f, 0x1.092a7ep-8f, 0x1.c00e74p-9f,
     0x1.6afce4p-9f, 0x1.1e7d8ep-9f, 0x1.b5ebd6p-10f, 0x1.479a8cp-10f, 0x1.d9597cp-11f, 0x1.4df058p-11f,
     0x1.c85986p-12f},
    {-0x1.4d6502p-7f, -0x1.df2b12p-9f, -0x1.59ddcep-10f, -0x1.9a33cap-8f, -0x1.a3187ap-7f, -0x1.918e7ep-8f,
     0x1.26a23ap-14f, 0x1.5ac326p-8f, 0x1.693a2ap-8f, 0x1.39cf28p-7f, 0x1.07ff3ap-7f, 0x1.2d52c6p-7f, 0x1.ccdd7ap-8f,
     0x1.e443d2p-9f, 0x1.d7d5p-9f, 0x1.67e758p-9f, 0x1.6af2f6p-10f, 0x1.78a3dp-13f, 0x1.a7233cp-11f, -0x1.13a794p-12f,
     -0x1.409e8p-11f, -0x1.3efe5p-11f, -0x1.08c3dcp-10f, -0x1.065cecp-10f, -0x1.25d73ap-10f, -0x1.0a2c32p-10f,
     -0x1.d7ebdp-11f, -0x1.83bf26p-11f, -0x1.469a72p-11f, -0x1.f7132cp-12f, -0x1.87fecap-12f, -0x1.1f9548p-12f}}};
  static constexpr float shift = 2580 * 0x1p-20f;
  static constexpr Segments slope = {{
    {0x1.fdfd5ep-2f, 0x1.986cd6p-2f, 0x1.361254p-2f, 0x1.b3b41p-3f, 0x1.0c876ap-3f, 0x1.e9da28p-5f, 0x1.b37d56p-22f,
     -0x1.87186ap-5f, -0x1.56409ap-4f, -0x1.bb001ep-4f, -0x1.f68a88p-4f, -0x1.07737p-3f, -0x1.056554p-3f,
     -0x1.f10ce6p-4f, -0x1.c8308ap-4f, -0x1.960c82p-4f, -0x1.5f9348p-4f, -0x1.28b7cep-4f, -0x1.e8d6b6p-5f,
     -0x1.895ce2p-5f, -0x1.355d6cp-5f, -0x1.dbb0b8p-6f, -0x1.65844ap-6f, -0x1.06a1dcp-6f, -0x1.79091ep-7f,
     -0x1.08579ap-7f, -0x1.69de66p-8f, -0x1.e35b62p-9f, -0x1.3acb3ep-9f, -0x1.8f955cp-10f, -0x1.edf4fp-11f,
     -0x1.291fb8p-11f},
    {-0x1.9883bp-1f, -0x1.91e37p-1f, -0x1.7efa64p-1f, -0x1.611ad4p-1f, -0x1.3a4e28p-1f, -0x1.0d1fep-1f,
     -0x1.b8bafep-2f, -0x1.55a7c6p-2f, -0x1.ec4928p-3f, -0x1.3ce7ap-3f, -0x1.46f564p-4f, -0x1.1f54c4p-6f,
     0x1.00d45cp-5f, 0x1.12b7a2p-4f, 0x1.733d72p-4f, 0x1.a866e4p-4f, 0x1.b9e8a4p-4f, 0x1.afe4f8p-4f, 0x1.923af6p-4f,
     0x1.680682p-4f, 0x1.374fe8p-4f, 0x1.04e57ep-4f, 0x1.a8aef2p-5f, 0x1.501a48p-5f, 0x1.02d6acp-5f, 0x1.84124ep-6f,
     0x1.1b31fap-6f, 0x1.924ca2p-7f, 0x1.160b84p-7f, 0x1.75d312p-8f, 0x1.e89d46p-9f, 0x1.36458ep-9f},
    {0x1.d0a096p-10f, 0x1.9d564ap-4f, 0x1.8ad868p-3f, 0x1.15cb88p-2f, 0x1.538ec6p-2f, 0x1.7b9096p-2f, 0x1.8cd19ap-2f,
     0x1.88579ep-2f, 0x1.70e74ap-2f, 0x1.4a8232p-2f, 0x1.19e48cp-2f, 0x1.c7ae2cp-3f, 0x1.599f68p-3f, 0x1.e1f956p-4f,
     0x1.268df4p-4f, 0x1.0feb2p-5f, 0x1.32bde4p-9f, -0x1.519af6p-6f, -0x1.284db8p-5f, -0x1.72f2fap-5f,
     -0x1.92131ep-5f, -0x1.8fd508p-5f, -0x1.75dd1cp-5f, -0x1.4cf0b6p-5f, -0x1.1c6d3cp-5f, -0x1.d42918p-6f,
     -0x1.7427f2p-6f, -0x1.1e30f6p-6f, -0x1.aa3264p-7f, -0x1.3368d2p-7f, -0x1.ada2ap-8f, -0x1.22d8e2p-8f},
    {0x1.201156p-2f, 0x1.079f5ap-2f, 0x1.d6539cp-3f, 0x1.7eba4p-3f, 0x1.112dfcp-3f, 0x1.314c74p-4f, 0x1.029a92p-6f,
     -0x1.365132p-5f, -0x1.51af02p-4f, -0x1.d8c57ap-4f, -0x1.15f3d2p-3f, -0x1.26891ap-3f, -0x1.212a96p-3f,
     -0x1.0a7ffap-3f, -0x1.cfa2f4p-4f, -0x1.7cae1p-4f, -0x1.254d6ap-4f, -0x1.a1cb8ap-5f, -0x1.09951p-5f,
     -0x1.113d1cp-6f, -0x1.10b9bcp-8f, 0x1.4e3fc2p-8f, 0x1.731a58p-7f, 0x1.e8aa1p-7f, 0x1.0c0928p-6f, 0x1.094634p-6f,
     0x1.e8d4e8p-7f, 0x1.a9b12cp-7f, 0x1.614e1ep-7f, 0x1.18d02ap-7f, 0x1.acc01ep-8f, 0x1.3aeffcp-8f},
    {-0x1.49b9c2p-2f, -0x1.f7de82p-6f, -0x1.27f328p-4f, -0x1.83272ep-4f, -0x1.d4d6c4p-4f, -0x1.e98418p-4f,
     -0x1.d253bp-4f, -0x1.956aep-4f, -0x1.43072ep-4f, -0x1.aba0a6p-5f, -0x1.da2a2ep-6f, -0x1.a2c37p-9f,
     0x1.0b2c78p-6f, 0x1.e816b6p-6f, 0x1.2de1ccp-5f, 0x1.56e9f8p-5f, 0x1.53a68ap-5f, 0x1.424352p-5f, 0x1.1c5dd8p-5f,
     0x1.dfa69cp-6f, 0x1.5f2b1cp-6f, 0x1.fdaaf6p-7f, 0x1.3ae9c8p-7f, 0x1.30aca4p-8f, 0x1.0cbdcp-10f, -0x1.be32bp-10f,
     -0x1.b303d8p-9f, -0x1.13492p-8f, -0x1.23c6c2p-8f, -0x1.17a5dcp-8f, -0x1.f0644cp-9f, -0x1.9dff96p-9f},
    {0x1.28fb72p1f, -0x1.b5155ep-5f, -0x1.8e39bap-5f, -0x1.2c8364p-5f, -0x1.0e2e38p-6f, 0x1.e9542p-10f,
     0x1.0c4b48p-6f, 0x1.0498aep-5f, 0x1.122264p-5f, 0x1.72cf3cp-5f, 0x1.2cc954p-5f, 0x1.3e7ecap-5f, 0x1.015084p-5f,
     0x1.54f7c4p-6f, 0x1.1ecb5ep-7f, 0x1.76105ap-9f, -0x1.de534ap-9f, -0x1.bb59e2p-8f, -0x1.262924p-7f,
     -0x1.3d484ep-7f, -0x1.5d702ep-7f, -0x1.3dc32p-7f, -0x1.161fd4p-7f, -0x1.c2f2e8p-8f, -0x1.524138p-8f,
     -0x1.ca7426p-9f, -0x1.116e0ap-9f, -0x1.e0ab22p-11f, -0x1.15d01cp-15f, 0x1.33c698p-11f, 0x1.f05d36p-11f,
     0x1.1df5acp-10f}}};
};

// Beyond: kernels/cpu/gelu_far.h has the formulas. Where t is above `cut` it is cut there: every result has long been
// 0.
struct FarFactors {
  float tail[7], slope[7];
};

struct ErfFarTable {
  static constexpr float cut = 18.0f;
  static constexpr FarFactors factors = {
    {0x1.988452p-2f, -0x1.9881bep-2f, 0x1.31ef26p+0f, -0x1.756668p+2f, 0x1.17965p+5f, -0x1.6d9bf2p+7f,
     0x1.02efc2p+9f},
    {0x1.988454p-2f, -0x1.98858p-2f, 0x1.990c86p-2f, -0x1.38681p+0f, 0x1.955562p+2f, -0x1.265daap+5f,
     0x1.f6810ep+6f}};
};

struct TanhFarTable {
  static constexpr float cut = 12.5f;
  // The coefficients of z = t (c0 + c1 t^2), 2 sqrt(2/pi) and 0.044715 times that, each in two floats.
  static constexpr double c0 = 0x1.9884533d43651p+0, c1 = 0x1.2444f2a4d8b4bp-4;
  static constexpr float c0_hi = static_cast<float>(c0), c0_lo = static_cast<float>(c0 - c0_hi);
  static constexpr float c1_hi = static_cast<float>(c1), c1_lo = static_cast<float>(c1 - c1_hi);
  // Those of z' = c0 + 3 c1 t^2.
  static constexpr float rate_hi = static_cast<float>(3 * c1), rate_lo = static_cast<float>(3 * c1 - rate_hi);
};

}  // namespace

}  // namespace transfuse
