// Rotation of one slot's keys by a whole number of positions, at every SIMD level.
#pragma once

#include <stdint.h>

#include "cpu/float_types.h"

namespace mem1::cpu {

// One slot of one layer: `heads` rows. Their first 2 * pairs elements are rotated, pair i by
// steps[i] * positions (units in common/rope_angle.h). Source and destination may be the same.
struct RotatedSlot {
  ElementType type;
  const char* source;
  char* destination;
  int64_t head_stride;  // bytes, the same in source and destination
  int heads;
  int pairs;
  bool interleaved;  // pairs are elements (2i, 2i + 1), not (i, i + pairs)
  const int64_t* steps;
  int32_t positions;
  float* scratch;  // [2 * pairs]
};

void rotate_keys_default(const RotatedSlot& slot);
void rotate_keys_avx2(const RotatedSlot& slot);
void rotate_keys_avx512(const RotatedSlot& slot);

}  // namespace mem1::cpu
