// A tensor whose slots move when a cache is pruned, as the CPU and CUDA kernels see it; no torch.
#pragma once

#include <stdint.h>

namespace mem1 {

// Slot s of head h in page p is the `row_bytes` bytes at
// data + p * page_stride + h * head_stride + s * slot_stride; strides are in bytes.
// A cache that is not paged has one page per batch row.
struct SlotTensor {
  char* data;
  int64_t page_stride;
  int64_t head_stride;
  int64_t slot_stride;
  const int64_t* steps;  // [pairs], see common/rope_angle.h; only with pairs > 0
  int32_t heads;
  int32_t row_bytes;
  int32_t pairs;  // > 0: the row is 2 * pairs elements that are rotated
  int32_t unit;   // the widest access, 1 to 16 bytes, that data, strides and row_bytes allow
};

}  // namespace mem1
