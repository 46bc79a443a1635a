// The code of every rotate_keys_<level>.cpp, which sets MEM1_ROTATE_KEYS to its function's name.
// Everything here has internal linkage, since each level compiles it anew.
#include "common/rope_angle.h"
#include "cpu/float_types.h"
#include "cpu/rotate_keys.h"

namespace mem1::cpu {
namespace {

template <typename Type, bool kInterleaved>
void rotate_heads(const RotatedSlot& slot) {
  using Stored = typename Type::Stored;
  // 64-bit indices: Python's -fwrapv would keep narrower ones from being vectorized.
  const int64_t pairs = slot.pairs;
  const int64_t step = kInterleaved ? 2 : 1;
  const int64_t partner = kInterleaved ? 1 : pairs;
  float* const cosine = slot.scratch;
  float* const sine = slot.scratch + pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    turn_cos_sin(turn_fraction(slot.steps[i], slot.positions), &cosine[i], &sine[i]);
  }
  for (int head = 0; head < slot.heads; ++head) {
    const Stored* source = reinterpret_cast<const Stored*>(slot.source + head * slot.head_stride);
    Stored* destination = reinterpret_cast<Stored*>(slot.destination + head * slot.head_stride);
    // Source and destination are the same memory, element for element, or do not overlap.
#pragma GCC ivdep
    for (int64_t i = 0; i < pairs; ++i) {
      const float x = Type::load(source[step * i]);
      const float y = Type::load(source[step * i + partner]);
      destination[step * i] = Type::store(x * cosine[i] - y * sine[i]);
      destination[step * i + partner] = Type::store(x * sine[i] + y * cosine[i]);
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
    case ElementType::kFloat:
      return rotate_type<Float>(slot);
    case ElementType::kHalf:
      return rotate_type<Half>(slot);
    case ElementType::kBFloat16:
      return rotate_type<BFloat16>(slot);
  }
}

}  // namespace mem1::cpu
