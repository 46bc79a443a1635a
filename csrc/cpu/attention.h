// One query tile of one head, forward and backward: what attention.cpp asks of each SIMD level.
//
// Tiles are those of BlockPlan: kTile tokens on each side. No torch here; see cpu/simd.h.
#pragma once

#include <stdint.h>

#include "cpu/float_types.h"

namespace mem1::cpu {

constexpr int kTile = 128;

// Tokens of one head of one batch row: head_dim contiguous elements each.
struct Rows {
  char* data;
  int64_t stride;  // elements from one token to the next
};

// Which keys a query tile meets: its entries of BlockPlan's rows, and the mask behind them.
struct TileList {
  const int32_t* expiry;  // [tokens]
  const int32_t* floor;   // [tokens] or null
  const int32_t* tiles;   // [count] key tiles: the partial ones, ascending, then the full ones
  int partial;
  int count;
};

struct Problem {
  ElementType type;
  int64_t tokens;
  int head_dim;
  float scale;
  float softcap;  // 0: none
};

// A key tile, to be packed as operands of matrix products, once for all query tiles and heads that
// meet it. Keys that nobody sees become zeros.
struct KeyTile {
  Problem problem;
  const int32_t* expiry;  // [tokens]
  int64_t tile;
  Rows key, value;
  bool backward;  // the operands of the backward pass
  char* packed;
};

struct ForwardTile {
  Problem problem;
  TileList list;
  int64_t first_query;  // the token of the first of up to kTile queries
  Rows query, key, value, out;
  float* lse;          // [tokens]
  const char* packed;  // [key tiles] of a level that packs them
};

// Query tiles add their parts of dK and dV to a key tile in an order that the plan alone decides,
// so that results do not depend on the number of threads: by descending query tile, and for each by
// ascending head of the group. They are claimed in that order too, so nobody waits for work that no
// thread has begun. A ticket is one place in the order; whoever holds the one that `turn` shows
// adds.
struct Turns {
  int64_t tile, member, group;  // query tile, and its head within the group of `group` heads
  int64_t* turn;                // [key tiles] ticket of the next one
  const int64_t* first;         // [key tiles] query tile that comes first
  const int64_t* following;     // [count] query tile that comes next there; -1: none
};

constexpr int64_t kNoTicket = -1;

static inline int64_t ticket(int64_t query_tile, int64_t member, int64_t group) {
  return query_tile * group + (group - 1 - member);
}

static inline int64_t first_ticket(int64_t query_tile, int64_t group) {
  return query_tile < 0 ? kNoTicket : ticket(query_tile, 0, group);
}

struct BackwardTile {
  Problem problem;
  TileList list;
  int64_t tile;
  Rows query, key, value, out, grad_out;
  const float* lse;
  const float* grad_lse;  // [tokens] or null
  Rows grad_query, grad_key, grad_value;
  float* sums;  // [key tiles, sums_floats(head_dim)]: dK and dV so far
  Turns turns;
  const char* packed;  // [key tiles] of a level that packs them
};

// head_dim in whole vectors of any SIMD level.
static inline int padded_head(int head_dim) { return (head_dim + 15) / 16 * 16; }

// Floats from one head_dim-long row of a packed tile to the next, and from one row of kTile query
// lanes to the next: an odd number of cache lines, so that columns spread over all cache sets.
static inline int64_t head_stride(int head_dim) { return padded_head(head_dim) / 32 * 32 + 16; }
constexpr int64_t kLaneStride = kTile + 16;

// The same where head_dim is padded to whole rows of an AMX tile.
static inline int64_t amx_head(int head_dim) { return (head_dim + 31) / 32 * 32; }
static inline int64_t amx_head_stride(int head_dim) { return amx_head(head_dim) + 16; }

// Floats of dK and dV of one key tile, at any level.
static inline int64_t sums_floats(int head_dim) { return 2 * kTile * amx_head_stride(head_dim); }

// Floats of scratch that a thread needs.
static inline int64_t forward_scratch(int head_dim) {
  return (2 * padded_head(head_dim) + kTile + 4) * kLaneStride + 2 * kTile * head_stride(head_dim);
}
static inline int64_t backward_scratch(int head_dim) {
  return (3 * padded_head(head_dim) + 3 * kTile + 4) * kLaneStride +
         5 * kTile * head_stride(head_dim);
}

struct AttentionKernels {
  void (*forward)(const ForwardTile& tile, float* scratch);
  void (*backward)(const BackwardTile& tile, float* scratch);
  // Of a level that packs key tiles: how many bytes each takes, and the packing. Else null.
  int64_t (*packed_bytes)(int head_dim, bool backward);
  void (*pack)(const KeyTile& tile);
};

// Those that are fastest here for such elements.
const AttentionKernels& attention_kernels(ElementType type);

extern const AttentionKernels attention_default;
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;
// bfloat16 only.
extern const AttentionKernels attention_avx512bf16;
extern const AttentionKernels attention_amx;

}  // namespace mem1::cpu
