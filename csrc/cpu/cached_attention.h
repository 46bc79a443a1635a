// Some query rows of one kv head over a run of its cache slots: what cached_attention.cpp asks of
// each SIMD level. No torch here; see cpu/simd.h.
#pragma once

#include <stdint.h>

#include "cpu/attention.h"

namespace mem1::cpu {

// Up to here rows share each key as it comes from memory; more are matrix products over tiles.
constexpr int kFewRows = 16;

// Slots that few rows meet at a time.
constexpr int kSlotBlock = 64;

// One position per slot, int32 or int64.
struct Positions {
  const char* data;  // null: no window
  int64_t stride;    // bytes from one slot to the next
  bool wide;         // int64
};

// Row r is head r % group of the group, at new token r / group.
struct CachedRows {
  ElementType type;
  int head_dim;
  float scale;
  float softcap;  // 0: none
  int group;
  const char* query;  // of new token 0 and the group's first head
  int64_t token_stride, head_stride;
  int64_t first_row;
  int rows;            // first_row .. first_row + rows - 1; at most kTile
  int64_t first_slot;  // of new token 0; token t sees the slots up to first_slot + t
  Rows key, value;     // a token is a slot
  int64_t slot_begin, slot_end;
  Positions position_ids;
  int64_t window;
  float* out;  // [rows, head_dim], as if the slots of this split were all
  float* lse;  // [rows]; -infinity: no slot of this split is seen
};

// Splits of the same rows, to be added up.
struct CachedSplits {
  ElementType type;
  int head_dim;
  int group;
  int64_t first_row;
  int rows;
  int splits;
  float* out;        // [splits, rows, head_dim]; split 0 is overwritten
  const float* lse;  // [splits, rows]
  char* result;      // of new token 0 and the group's first head
  int64_t token_stride, head_stride;
  float* result_lse;  // likewise
  int64_t lse_token_stride, lse_head_stride;
};

// Floats of scratch that a thread needs.
static inline int64_t cached_scratch(int head_dim) {
  const int64_t few = kFewRows * (2 * (head_dim + 32) + kSlotBlock + 4) + kSlotBlock;
  const int64_t many = forward_scratch(head_dim) + 3 * kLaneStride;
  return few > many ? few : many;
}

struct CachedAttentionKernels {
  void (*attend)(const CachedRows& unit, float* scratch);
  void (*combine)(const CachedSplits& splits);
};

extern const CachedAttentionKernels cached_attention_default;
extern const CachedAttentionKernels cached_attention_avx2;
extern const CachedAttentionKernels cached_attention_avx512;
// bfloat16 only.
extern const CachedAttentionKernels cached_attention_avx512bf16;
extern const CachedAttentionKernels cached_attention_amx;

}  // namespace mem1::cpu
