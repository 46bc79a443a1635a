// Angles of a rotation by a whole number of positions; no torch.
//
// A frequency is kept as the part of a turn that one position makes, in units of 2^-64 turns. Whole
// turns drop out as the product of step and positions wraps, so that the angle is exact to
// |positions| * 2^-65 turns, without floating-point range reduction, at any distance.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define MEM1_ANGLE_INLINE __host__ __device__ __forceinline__
#else
#define MEM1_ANGLE_INLINE static inline
#endif

namespace mem1 {

// The angle's top 32 bits, in units of 2^-32 turns.
MEM1_ANGLE_INLINE uint32_t turn_fraction(int64_t step, int32_t positions) {
  const uint64_t product =
      static_cast<uint64_t>(step) * static_cast<uint64_t>(static_cast<int64_t>(positions));
  return static_cast<uint32_t>(product >> 32);
}

// cos and sin of an angle in units of 2^-32 turns, within 2e-7: Taylor series over an eighth of a
// turn either way, then the quarter's swap and signs.
MEM1_ANGLE_INLINE void turn_cos_sin(uint32_t angle, float* cosine, float* sine) {
  const uint32_t quarter = (angle + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int32_t>(angle - (quarter << 30))) *
                  1.46291807926715968e-9f;  // 2 pi / 2^32
  const float y = x * x;
  const float s =
      x * (1.f + y * (-1.f / 6 + y * (1.f / 120 + y * (-1.f / 5040 + y * (1.f / 362880)))));
  const float c =
      1.f +
      y * (-1.f / 2 + y * (1.f / 24 + y * (-1.f / 720 + y * (1.f / 40320 + y * (-1.f / 3628800)))));
  const bool swap = quarter & 1u;
  const float plain_cosine = swap ? s : c;
  const float plain_sine = swap ? c : s;
  *cosine = ((quarter + 1u) & 2u) ? -plain_cosine : plain_cosine;
  *sine = (quarter & 2u) ? -plain_sine : plain_sine;
}

}  // namespace mem1
