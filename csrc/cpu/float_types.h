// fp32, fp16 and bf16 in memory, as fp32 in registers. Branch-free, so that loops over them become
// vector code at every SIMD level; internal linkage, since each level compiles it anew.
#pragma once

#include <stdint.h>
#include <string.h>

namespace mem1::cpu {

enum class ElementType { kFloat, kHalf, kBFloat16 };

namespace {

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct Float {
  using Stored = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static float load(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }
  static uint16_t store(float x) {  // to nearest, ties to even; a NaN stays NaN
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const uint32_t nan = bits >> 16 | 0x40u;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
};

struct Half {
  using Stored = uint16_t;
  static float load(uint16_t x) {
    const uint32_t magnitude = (x & 0x7fffu) << 13;
    // The exponents' biases differ by 112; the product is exact, for subnormals too.
    const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
    const uint32_t bits = (x & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : scaled;
    return as_float(bits | static_cast<uint32_t>(x & 0x8000u) << 16);
  }
  static uint16_t store(float x) {  // to nearest, ties to even; overflow gives infinity
    const uint32_t bits = as_bits(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Adding 0.5 puts the last bit of a subnormal half at the last bit of the float.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    // Masks: a choice between a float's and an integer's result would become a branch.
    const uint32_t is_subnormal = 0u - (magnitude < 0x38800000u);
    const uint32_t is_large = 0u - (magnitude >= 0x477ff000u);
    const uint32_t is_nan = 0u - (magnitude > 0x7f800000u);
    const uint32_t finite = (subnormal & is_subnormal) | (normal & ~is_subnormal);
    const uint32_t half = (finite & ~is_large) | (0x7c00u & is_large) | (0x200u & is_nan);
    return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
  }
};

}  // namespace
}  // namespace mem1::cpu
