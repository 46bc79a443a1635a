// Which slots of a cache row move where when the row is pruned. Plain arithmetic on bits, shared by
// the CPU and CUDA kernels; no torch.
//
// A row holds `length` slots, of which those with their bit set survive; n is their number.
//   hole filling: the r-th survivor in a slot >= n moves to the r-th hole (dead slot < n). Sources
//     and destinations are disjoint, so every move is independent of the others.
//   ordered: the r-th survivor moves to slot r. A destination may be the source of a later move, so
//     moves run in ascending order, or in chunks that are read whole before they are written.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define MEM1_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MEM1_HOST_DEVICE inline
#endif

namespace mem1 {

constexpr int kWordSlots = 32;  // slots per word of bits
constexpr int kGroupWords = 4;  // words per group; its survivors are counted together
constexpr int kGroupSlots = kWordSlots * kGroupWords;

// Groups per row. The last one may be empty: rank(length) then still reads inside the array.
MEM1_HOST_DEVICE int prune_groups(int length) { return length / kGroupSlots + 1; }

MEM1_HOST_DEVICE int count_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// Index of the lowest bit set; bits != 0.
MEM1_HOST_DEVICE int lowest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// A mask of the lowest `count` bits, for any count.
MEM1_HOST_DEVICE uint32_t low_bits(int count) {
  if (count <= 0) return 0;
  return count >= kWordSlots ? ~0u : (1u << count) - 1;
}

// Turns four keep bytes (not 0: keep; the first is the low byte) into four bits.
MEM1_HOST_DEVICE uint32_t pack_keep(uint32_t bytes) {
  const uint32_t ones = ((((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) >> 7) & 0x01010101u;
  return (ones * 0x01020408u) >> 24 & 0xfu;
}

// The survivors of one row. Bits of slots >= length are 0.
struct Survivors {
  const uint32_t* words;      // [groups * kGroupWords], bit i of word w: slot 32 w + i
  const int32_t* group_rank;  // [groups], survivors in front of each group

  // Survivors in slots < slot, for slot <= length.
  MEM1_HOST_DEVICE int rank(int slot) const {
    const int word = slot / kWordSlots;
    const int group = slot / kGroupSlots;
    int count = group_rank[group];
    for (int w = group * kGroupWords; w < word; ++w) count += count_bits(words[w]);
    return count + count_bits(words[word] & low_bits(slot % kWordSlots));
  }

  MEM1_HOST_DEVICE bool at(int slot) const {
    return words[slot / kWordSlots] >> (slot % kWordSlots) & 1u;
  }

  // The first dead slot, or n if the n survivors fill slots 0 .. n - 1 already.
  MEM1_HOST_DEVICE int first_hole(int n) const {
    int full = 0, candidates_end = n;  // rank(full) == full; first hole <= candidates_end
    while (full < candidates_end) {
      const int middle = (full + candidates_end + 1) / 2;
      if (rank(middle) == middle) {
        full = middle;
      } else {
        candidates_end = middle - 1;
      }
    }
    return full;
  }
};

// The moves of one row, numbered 0 .. count - 1 in ascending order of source and of destination.
struct RowMoves {
  int survivors;    // n
  int count;        // of moves
  int source_from;  // survivors in slots >= source_from move
  int stay_end;     // survivors in slots < stay_end stay where they are
};

MEM1_HOST_DEVICE RowMoves plan_row(const Survivors& kept, int n, bool ordered) {
  if (ordered) {
    const int hole = kept.first_hole(n);
    return {n, n - hole, hole, hole};
  }
  return {n, n - kept.rank(n), n, n};
}

// Calls emit(move, slot) for the set bits of a word, as long as the move lies in [begin, end). The
// lowest bit belongs to move first_move, and each further one to the next move.
template <typename Emit>
MEM1_HOST_DEVICE void emit_bits(uint32_t bits, int first_slot, int first_move, int begin, int end,
                                const Emit& emit) {
  for (int move = first_move; bits != 0 && move < end; bits &= bits - 1, ++move) {
    if (move >= begin) emit(move, first_slot + lowest_bit(bits));
  }
}

// Sources of moves [begin, end) that lie in `word`.
template <typename Emit>
MEM1_HOST_DEVICE void emit_sources(const Survivors& kept, const RowMoves& moves, int word,
                                   int begin, int end, const Emit& emit) {
  const int slot = word * kWordSlots;
  const uint32_t bits = kept.words[word] & ~low_bits(moves.source_from - slot);
  if (bits == 0) return;
  const int before = slot > moves.source_from ? kept.rank(slot) : kept.rank(moves.source_from);
  emit_bits(bits, slot, before - (moves.survivors - moves.count), begin, end, emit);
}

// Destinations of moves [begin, end) that lie in `word`, under hole filling.
template <typename Emit>
MEM1_HOST_DEVICE void emit_holes(const Survivors& kept, const RowMoves& moves, int word, int begin,
                                 int end, const Emit& emit) {
  const int slot = word * kWordSlots;
  const uint32_t bits = ~kept.words[word] & low_bits(moves.survivors - slot);
  if (bits == 0) return;
  emit_bits(bits, slot, slot - kept.rank(slot), begin, end, emit);
}

// How a paged row is pruned. Token t of the row lies in page t / page_size of its table. Whole
// pages, all of whose tokens survive, are left alone. The others are taken in the order of their
// kind below, and the survivors in them, `packed` in number, are hole-filled as one row of its own:
// what lies behind slot `packed` moves to the holes before it. The pages that hold slots < packed
// stay with the row, which must be allowed to write them; all others are freed. So a run of holes
// costs at most the moves of the two pages at its edges.
enum PageKind : int {
  kWholePage = 0,
  kOwnedPartial = 1,
  kOwnedDead = 2,
  kSharedPage = 3,  // read, never written; not whole
  kPageKinds = 4,
};

MEM1_HOST_DEVICE PageKind page_kind(int survivors, int page_size, bool shared) {
  if (survivors == page_size) return kWholePage;
  if (shared) return kSharedPage;
  return survivors > 0 ? kOwnedPartial : kOwnedDead;
}

}  // namespace mem1
