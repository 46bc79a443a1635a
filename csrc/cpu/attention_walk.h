// What attention_kernel.h and attention_amx.cpp share: the mask between two tiles, the order of key
// tiles, whose turn it is to add to one. Everything here has internal linkage, since each level
// compiles it anew.
#pragma once

#include <thread>

#include "cpu/attention.h"
#include "cpu/tile_math.h"

namespace mem1::cpu {
namespace {

// The first `rows` of from[., stride] to the tokens from `first` on.
template <typename Element>
void store_tokens(const float* from, int64_t stride, int rows, int head_dim, float scale,
                  const Rows& to, int64_t first) {
  using Stored = typename Element::Stored;
  for (int row = 0; row < rows; ++row) {
    Stored* out = reinterpret_cast<Stored*>(to.data) + (first + row) * to.stride;
    for (int d = 0; d < head_dim; ++d) out[d] = Element::store(scale * from[row * stride + d]);
  }
}

// Tokens of a tile.
inline int tile_rows(int64_t first, int64_t tokens) {
  return tokens - first < kTile ? static_cast<int>(tokens - first) : kTile;
}

// The mask between one query tile and one key tile.
struct Mask {
  int first_query;
  int first_key;
  int queries;  // in the tile
  bool has_floor;
  alignas(64) int32_t floor[kTile];   // of each query
  alignas(64) int32_t expiry[kTile];  // of each key; 0 behind the last token
  alignas(64) bool alive[kTile];      // keys that see themselves

  Mask(const TileList& list, int64_t first, int64_t tokens)
      : first_query(static_cast<int>(first)),
        first_key(0),
        queries(tile_rows(first_query, tokens)),
        has_floor(list.floor != nullptr) {
    for (int q = 0; q < kTile; ++q) {
      const bool bounded = has_floor && q < queries;
      floor[q] = bounded ? list.floor[first_query + q] : 0;
    }
  }

  void move_to(const TileList& list, int64_t key_tile, int tokens) {
    first_key = static_cast<int>(key_tile) * kTile;
    for (int k = 0; k < kTile; ++k) {
      const int key = first_key + k;
      const int end = key < tokens ? list.expiry[key] : 0;
      expiry[k] = end < 0 ? 0 : end > tokens ? tokens : end;
      alive[k] = expiry[k] > key;
    }
  }

  // The first and the last + 1 lane that see key k, floors aside.
  int begin(int k) const { return first_key + k > first_query ? first_key + k - first_query : 0; }
  int end(int k) const {
    return expiry[k] - first_query < queries ? expiry[k] - first_query : queries;
  }
};

// -1 where the query of each lane sees the key.
inline IntVec visible(int key, int expiry, IntVec query, IntVec floor) {
  return (floor <= key) & (key <= query) & (query < expiry);
}

// The entries of a TileList by ascending key tile, so that query tiles meet the key tiles, and wait
// for each other there, in one order.
class Ascending {
 public:
  explicit Ascending(const TileList& list) : list_(list), partial_(0), full_(list.partial) {}

  bool done() const { return partial_ == list_.partial && full_ == list_.count; }

  int next() {
    const bool take_partial = full_ == list_.count || (partial_ < list_.partial &&
                                                       list_.tiles[partial_] < list_.tiles[full_]);
    return take_partial ? partial_++ : full_++;
  }

 private:
  const TileList& list_;
  int partial_, full_;
};

// The turn of one query tile and head to add to a key tile, which `entry` of its list names.
class Turn {
 public:
  Turn(const Turns& turns, int64_t key_tile, int entry)
      : shown_(turns.turn + key_tile),
        own_(ticket(turns.tile, turns.member, turns.group)),
        first_(first_ticket(turns.first[key_tile], turns.group)),
        following_(turns.member + 1 < turns.group
                       ? own_ - 1
                       : first_ticket(turns.following[entry], turns.group)) {}

  void wait() const {
    while (__atomic_load_n(shown_, __ATOMIC_ACQUIRE) != own_) std::this_thread::yield();
  }
  void pass_on() const { __atomic_store_n(shown_, following_, __ATOMIC_RELEASE); }

  bool is_first() const { return own_ == first_; }
  bool is_last() const { return following_ == kNoTicket; }

 private:
  int64_t* const shown_;
  const int64_t own_, first_, following_;
};

}  // namespace
}  // namespace mem1::cpu
