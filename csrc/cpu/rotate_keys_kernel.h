// The code of every rotate_keys_<level>.cpp, which sets MEM1_ROTATE_KEYS to its function's name.
// Everything here has internal linkage, since each level compiles it anew.
#include <string.h>

#include "common/rope_angle.h"
#include "cpu/rotate_keys.h"

namespace mem1::cpu {
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
  static uint16_t store(float x) {  // to nearest, ties to even; a NaN stays one
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
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
  }
};

template <typename Type, bool kInterleaved>
void rotate_heads(const RotatedSlot& slot) {
  using Stored = typename Type::Stored;
  const int pairs = slot.pairs;
  float* const cosine = slot.scratch;
  float* const sine = slot.scratch + pairs;
  for (int i = 0; i < pairs; ++i) {
    turn_cos_sin(turn_fraction(slot.steps[i], slot.positions), &cosine[i], &sine[i]);
  }
  for (int head = 0; head < slot.heads; ++head) {
    const Stored* source = reinterpret_cast<const Stored*>(slot.source + head * slot.head_stride);
    Stored* destination = reinterpret_cast<Stored*>(slot.destination + head * slot.head_stride);
    // Either the same memory element for element, or memory apart.
#pragma GCC ivdep
    for (int i = 0; i < pairs; ++i) {
      const int first = kInterleaved ? 2 * i : i;
      const int second = kInterleaved ? 2 * i + 1 : i + pairs;
      const float x = Type::load(source[first]);
      const float y = Type::load(source[second]);
      destination[first] = Type::store(x * cosine[i] - y * sine[i]);
      destination[second] = Type::store(x * sine[i] + y * cosine[i]);
    }
  }
}

template <typename Type>
void rotate_type(const RotatedSlot& slot) {
  if (slot.interleaved) {
    rotate_heads<Type, true>(slot);
  } else {
    rotate_heads<Type, false>(slot);
  }
}

}  // namespace

void MEM1_ROTATE_KEYS(const RotatedSlot& slot) {
  switch (slot.type) {
    case KeyType::kFloat:
      return rotate_type<Float>(slot);
    case KeyType::kHalf:
      return rotate_type<Half>(slot);
    case KeyType::kBFloat16:
      return rotate_type<BFloat16>(slot);
  }
}

}  // namespace mem1::cpu
