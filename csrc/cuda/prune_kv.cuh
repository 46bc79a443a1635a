// Pruning of dense and paged KV caches: one launch for all layers, and no memory beside the caches.
//
// Every block works on one row. It reads the row's keep bits, counts them, and so knows every move
// (common/prune_index.h); blocks of a row repeat this, which costs a few microseconds at most, and
// then share out the tensors, heads and moves. No index is written to device memory.
//
// lengths[row] is read by all blocks of the row and written by one. Its upper bits serve as the
// counter that tells the last reader, who writes the new length: no workspace, no second launch,
// and nothing to reset before a graph is replayed.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "common/prune_index.h"
#include "common/rope_angle.h"
#include "common/slot_tensor.h"

#ifndef MEM1_PRUNE_THREADS
#define MEM1_PRUNE_THREADS 256
#endif
#ifndef MEM1_DYNAMIC_SHARED
#define MEM1_DYNAMIC_SHARED(name) extern __shared__ uint4 name[]
#endif

namespace mem1::cuda {

constexpr int kThreads = MEM1_PRUNE_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr int kTileMoves = 1024;  // moves whose slots are listed in shared memory at a time
constexpr int kUnroll = 4;        // accesses in flight per thread
constexpr int kKeepBytes = 16;    // keep bytes that a thread reads at once

struct Row {
  int32_t* lengths;
  int64_t length_stride;
  const uint8_t* keep;
  int64_t keep_stride;
  int capacity;
  int length_bits;  // 2 * capacity < 2^length_bits; the bits above count readers
  int readers;      // blocks per row, if this launch writes the new lengths; otherwise 0
};

template <int kMaxTensors>
struct PruneParams {
  Row row;
  const int32_t* position_delta;
  int64_t delta_stride;
  bool interleaved;
  int parts;      // parts into which the moves of a head are split
  int max_heads;  // of any tensor
  int tensors;
  SlotTensor tensor[kMaxTensors];
};

template <int kMaxTensors>
struct PagedPruneParams {
  Row row;
  int32_t* block_table;
  int64_t table_stride;
  int32_t* freed;
  int64_t freed_stride;
  int32_t* freed_counts;
  int64_t count_stride;
  const int32_t* page_refs;  // null: no page is shared
  int pages;
  int page_size;
  int max_pages;  // of a row
  int parts;
  int max_heads;
  int tensors;
  SlotTensor tensor[kMaxTensors];
};

struct RowShared {
  uint32_t* words;      // [groups * kGroupWords]
  int32_t* group_rank;  // [groups]
  int32_t* scratch;     // [kWarps + 2]
};

inline int64_t row_shared_bytes(int capacity) {
  const int64_t groups = capacity / kGroupSlots + 1;
  return groups * (kGroupWords + 1) * 4 + (kWarps + 2) * 4;
}

inline int64_t prune_shared_bytes(int capacity) {
  return row_shared_bytes(capacity) + 2 * kTileMoves * 4;
}

inline int64_t paged_shared_bytes(int capacity, int max_pages) {
  return row_shared_bytes(capacity) + 4 * kTileMoves * 4 + 3 * (int64_t{max_pages} + 1) * 4;
}

__device__ __forceinline__ int32_t* carve_row(int32_t* memory, int capacity, RowShared* shared) {
  const int groups = prune_groups(capacity);
  shared->words = reinterpret_cast<uint32_t*>(memory);
  shared->group_rank = memory + groups * kGroupWords;
  shared->scratch = shared->group_rank + groups;
  return shared->scratch + kWarps + 2;
}

// The sum of `value` over the block's threads in front of this one, and over all of them. The whole
// block calls it; scratch is free for reuse after the caller's next __syncthreads().
__device__ __forceinline__ int scan_block(int value, int32_t* scratch, int* total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += scratch[w];
    all += scratch[w];
  }
  *total = all;
  return before + sum - value;
}

// The keep bits of slots [slot, slot + 16), 0 at and behind `end`.
__device__ __forceinline__ uint32_t load_keep(const uint8_t* keep, int slot, int end) {
  uint32_t bits = 0;
  if (slot + kKeepBytes <= end && reinterpret_cast<uintptr_t>(keep) % kKeepBytes == 0) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(keep + slot);
    bits = pack_keep(bytes.x) | pack_keep(bytes.y) << 4 | pack_keep(bytes.z) << 8 |
           pack_keep(bytes.w) << 12;
  } else {
    for (int i = 0; i < kKeepBytes && slot + i < end; ++i) {
      bits |= static_cast<uint32_t>(keep[slot + i] != 0) << i;
    }
  }
  return bits;
}

// Lists the survivors of a row of `length` slots and returns their number. `first_bits` are those
// from slot kKeepBytes * threadIdx.x on, loaded before. There is no barrier at the end: group_rank
// is complete after the next one.
__device__ __forceinline__ int count_survivors(const uint8_t* keep, int length, uint32_t first_bits,
                                               const RowShared& shared) {
  const int groups = prune_groups(length);
  uint16_t* halves = reinterpret_cast<uint16_t*>(shared.words);
  for (int chunk = threadIdx.x; chunk * kKeepBytes < groups * kGroupSlots; chunk += kThreads) {
    const int slot = chunk * kKeepBytes;
    uint32_t bits = chunk == static_cast<int>(threadIdx.x) ? first_bits : 0;
    if (chunk >= kThreads && slot < length) bits = load_keep(keep, slot, length);
    halves[chunk] = static_cast<uint16_t>(bits & low_bits(length - slot));
  }
  __syncthreads();
  const int mine = (groups + kThreads - 1) / kThreads;  // groups per thread
  const int begin = threadIdx.x * mine;
  const int end = begin + mine < groups ? begin + mine : groups;
  int count = 0;
  for (int word = begin * kGroupWords; word < end * kGroupWords; ++word) {
    count += count_bits(shared.words[word]);
  }
  int survivors;
  int rank = scan_block(count, shared.scratch, &survivors);
  for (int group = begin; group < end; ++group) {
    shared.group_rank[group] = rank;
    for (int w = 0; w < kGroupWords; ++w) {
      rank += count_bits(shared.words[group * kGroupWords + w]);
    }
  }
  return survivors;
}

__device__ __forceinline__ void trap_unless(bool condition) {
  if (!condition) __trap();
}

// Counts this block as a reader of the row's length. Thread 0 only; true for the last reader.
__device__ __forceinline__ bool count_reader(const Row& row, int32_t* length, int* value) {
  const uint32_t mask = (1u << row.length_bits) - 1;
  uint32_t* shared_length = reinterpret_cast<uint32_t*>(length);
  if (row.readers == 0) {
    *value = *reinterpret_cast<volatile int32_t*>(length);
    return false;
  }
  const uint32_t old = atomicAdd(shared_length, 1u << row.length_bits);
  const int readers_before = static_cast<int>(old >> row.length_bits);
  *value = static_cast<int>(old & mask);
  // A negative length looks like more readers than there are. The lower bits show a length up to
  // twice the capacity. Some larger ones pass for a shorter row; none leads outside the cache.
  trap_unless(readers_before < row.readers);
  return readers_before == row.readers - 1;
}

struct Place {
  int page, slot;
};

// Moves of a dense row, which is one page.
struct DenseMoves {
  int page;
  const int32_t* sources;
  const int32_t* destinations;
  __device__ __forceinline__ Place source(int i) const { return {page, sources[i]}; }
  __device__ __forceinline__ Place destination(int i) const { return {page, destinations[i]}; }
};

struct PagedMoves {
  const int32_t* source_pages;
  const int32_t* source_slots;
  const int32_t* destination_pages;
  const int32_t* destination_slots;
  __device__ __forceinline__ Place source(int i) const {
    return {source_pages[i], source_slots[i]};
  }
  __device__ __forceinline__ Place destination(int i) const {
    return {destination_pages[i], destination_slots[i]};
  }
};

__device__ __forceinline__ char* address(const SlotTensor& tensor, int head, const Place& place) {
  return tensor.data + place.page * tensor.page_stride + head * tensor.head_stride +
         place.slot * tensor.slot_stride;
}

// Copies moves [begin, end) of one head, Unit by Unit. When ordered, each step is read whole before
// it is written, and the whole block must take part.
template <typename Unit, bool kOrdered, typename Moves>
__device__ __forceinline__ void copy_units(const SlotTensor& tensor, int head, const Moves& moves,
                                           int begin, int end) {
  const int row_units = tensor.row_bytes / static_cast<int>(sizeof(Unit));
  for (int first_unit = 0; first_unit < row_units; first_unit += kThreads) {
    const int left = row_units - first_unit;
    const int units = left < kThreads ? left : kThreads;
    const int together = kThreads / units;  // moves side by side
    const int lane = threadIdx.x / units;
    const int64_t offset = (first_unit + threadIdx.x % units) * static_cast<int64_t>(sizeof(Unit));
    for (int step = begin; step < end; step += together * kUnroll) {
      Unit held[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int move = step + u * together + lane;
        if (lane < together && move < end) {
          held[u] =
              *reinterpret_cast<const Unit*>(address(tensor, head, moves.source(move)) + offset);
        }
      }
      if constexpr (kOrdered) __syncthreads();
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int move = step + u * together + lane;
        if (lane < together && move < end) {
          *reinterpret_cast<Unit*>(address(tensor, head, moves.destination(move)) + offset) =
              held[u];
        }
      }
    }
  }
}

template <bool kOrdered, typename Moves>
__device__ __forceinline__ void copy_moves(const SlotTensor& tensor, int head, const Moves& moves,
                                           int begin, int end) {
  switch (tensor.unit) {
    case 16:
      return copy_units<uint4, kOrdered>(tensor, head, moves, begin, end);
    case 8:
      return copy_units<uint2, kOrdered>(tensor, head, moves, begin, end);
    case 4:
      return copy_units<uint32_t, kOrdered>(tensor, head, moves, begin, end);
    case 2:
      return copy_units<uint16_t, kOrdered>(tensor, head, moves, begin, end);
    default:
      return copy_units<uint8_t, kOrdered>(tensor, head, moves, begin, end);
  }
}

struct NoKey {};

struct FloatKey {
  using Stored = float;
  static __device__ __forceinline__ float load(float x) { return x; }
  static __device__ __forceinline__ float store(float x) { return x; }
};

struct HalfKey {
  using Stored = uint16_t;
  static __device__ __forceinline__ float load(uint16_t x) {
#if defined(__CUDACC__)
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#else
    return cpu::Half::load(x);
#endif
  }
  static __device__ __forceinline__ uint16_t store(float x) {
#if defined(__CUDACC__)
    uint16_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    return cpu::Half::store(x);
#endif
  }
};

struct BFloat16Key {
  using Stored = uint16_t;
  static __device__ __forceinline__ float load(uint16_t x) {
#if defined(__CUDACC__)
    return __uint_as_float(static_cast<uint32_t>(x) << 16);
#else
    return cpu::BFloat16::load(x);
#endif
  }
  static __device__ __forceinline__ uint16_t store(float x) {
#if defined(__CUDACC__)
    uint16_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
#else
    return cpu::BFloat16::store(x);
#endif
  }
};

template <typename Stored, int kCount>
struct alignas(sizeof(Stored) * kCount) Vector {
  Stored x[kCount];
};

// One thread's pairs of one key: kCount first and kCount second elements, in either layout.
template <typename Key, int kCount>
struct KeyPart {
  using Stored = typename Key::Stored;
  Vector<Stored, kCount> a, b;

  __device__ __forceinline__ void load(const Stored* at, int64_t second) {
    a = *reinterpret_cast<const Vector<Stored, kCount>*>(at);
    b = *reinterpret_cast<const Vector<Stored, kCount>*>(at + second);
  }
  __device__ __forceinline__ void store(Stored* at, int64_t second) const {
    *reinterpret_cast<Vector<Stored, kCount>*>(at) = a;
    *reinterpret_cast<Vector<Stored, kCount>*>(at + second) = b;
  }
  static __device__ __forceinline__ void turn_pair(Stored& first, Stored& second, float cosine,
                                                   float sine) {
    const float x = Key::load(first);
    const float y = Key::load(second);
    first = Key::store(x * cosine - y * sine);
    second = Key::store(x * sine + y * cosine);
  }
  __device__ __forceinline__ void turn(const float* cosine, const float* sine, bool interleaved) {
    if (interleaved && kCount > 1) {  // a, then b: the pairs one after the other
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        turn_pair(a.x[2 * i], a.x[2 * i + 1], cosine[i], sine[i]);
        turn_pair(b.x[2 * i], b.x[2 * i + 1], cosine[i + kCount / 2], sine[i + kCount / 2]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) turn_pair(a.x[i], b.x[i], cosine[i], sine[i]);
    }
  }
};

// Rotates keys [begin, end) of heads [head, head_end), as `moves` lists them, each by the delta of
// its source. A key that is neither moved nor rotated is not touched.
template <typename Key, int kCount, bool kOrdered, typename Moves>
__device__ __forceinline__ void turn_parts(const SlotTensor& tensor, int head, int head_end,
                                           const Moves& moves, int begin, int end,
                                           const int32_t* delta, bool interleaved) {
  using Stored = typename Key::Stored;
  const int all_parts = tensor.pairs / kCount;
  const int64_t second = interleaved ? kCount : tensor.pairs;
  for (int first_part = 0; first_part < all_parts; first_part += kThreads) {
    const int left = all_parts - first_part;
    const int parts = left < kThreads ? left : kThreads;
    const int together = kThreads / parts;
    const int lane = threadIdx.x / parts;
    const int part = first_part + threadIdx.x % parts;
    const int64_t offset = int64_t{part} * kCount * (interleaved ? 2 : 1);
    for (int step = begin; step < end; step += together) {
      const int move = step + lane;
      bool active = lane < together && move < end;
      Place source{0, -1}, destination{0, -1};
      int positions = 0;
      if (active) {
        source = moves.source(move);
        destination = moves.destination(move);
        active = source.slot >= 0;
        if (active) positions = delta[source.slot];
        active = active && (positions != 0 || source.slot != destination.slot);
      }
      float cosine[kCount], sine[kCount];
      if (active && positions != 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          turn_cos_sin(turn_fraction(tensor.steps[part * kCount + i], positions), &cosine[i],
                       &sine[i]);
        }
      }
      for (int h = head; h < head_end; ++h) {
        KeyPart<Key, kCount> key;
        if (active) {
          key.load(reinterpret_cast<const Stored*>(address(tensor, h, source)) + offset, second);
          if (positions != 0) key.turn(cosine, sine, interleaved);
        }
        if constexpr (kOrdered) __syncthreads();
        if (active) {
          key.store(reinterpret_cast<Stored*>(address(tensor, h, destination)) + offset, second);
        }
      }
    }
  }
}

template <typename Key, bool kOrdered, typename Moves>
__device__ __forceinline__ void turn_moves(const SlotTensor& tensor, int head, int head_end,
                                           const Moves& moves, int begin, int end,
                                           const int32_t* delta, bool interleaved) {
  constexpr int kWide = 4;  // more would not fit the registers
  constexpr int kBytes = kWide * static_cast<int>(sizeof(typename Key::Stored));
  if (tensor.unit >= kBytes && tensor.pairs % kWide == 0) {
    turn_parts<Key, kWide, kOrdered>(tensor, head, head_end, moves, begin, end, delta, interleaved);
  } else {
    turn_parts<Key, 1, kOrdered>(tensor, head, head_end, moves, begin, end, delta, interleaved);
  }
}

// Survivors that stay where they are and are rotated in place; slot -1: nothing there.
struct StayingKeys {
  int page;
  Survivors kept;
  __device__ __forceinline__ Place source(int i) const { return {page, kept.at(i) ? i : -1}; }
  __device__ __forceinline__ Place destination(int i) const { return {page, i}; }
};

struct Span {
  int begin, end;
};

// Part `part` of `parts` of [begin, end).
__device__ __forceinline__ Span part_of(int begin, int end, int part, int parts) {
  const int64_t count = end - begin;
  return {begin + static_cast<int>(count * part / parts),
          begin + static_cast<int>(count * (part + 1) / parts)};
}

template <typename Key, bool kOrdered, int kMaxTensors>
__device__ __forceinline__ void prune_tile(const PruneParams<kMaxTensors>& p,
                                           const DenseMoves& moves, int count,
                                           const Survivors& kept, int stay_end,
                                           const int32_t* delta) {
  const int shares = p.max_heads * p.parts;  // work items per tensor; some may be empty
  for (int item = blockIdx.x; item < p.tensors * shares; item += gridDim.x) {
    const SlotTensor& tensor = p.tensor[item / shares];
    const int share = item % shares;
    if (share >= tensor.heads * p.parts) continue;
    const int head = share / p.parts;
    bool turns = false;
    if constexpr (!std::is_same_v<Key, NoKey>) {
      turns = tensor.pairs > 0;
      if (turns && kOrdered) {
        turn_moves<Key, true>(tensor, head, head + 1, moves, 0, count, delta, p.interleaved);
      } else if (turns) {  // all heads at once, to compute each angle once
        const Span span = part_of(0, count, share, tensor.heads * p.parts);
        turn_moves<Key, false>(tensor, 0, tensor.heads, moves, span.begin, span.end, delta,
                               p.interleaved);
      }
      if (turns && stay_end > 0) {
        const Span span = part_of(0, stay_end, share, tensor.heads * p.parts);
        turn_moves<Key, false>(tensor, 0, tensor.heads, StayingKeys{moves.page, kept}, span.begin,
                               span.end, delta, p.interleaved);
      }
    }
    if (!turns) {
      const Span span = part_of(0, count, share % p.parts, p.parts);
      copy_moves<kOrdered>(tensor, head, moves, span.begin, span.end);
    }
  }
}

template <typename Key, bool kOrdered, int kMaxTensors>
__global__ void __launch_bounds__(kThreads, std::is_same_v<Key, NoKey> ? 4 : 2)
    prune_kv_kernel(const __grid_constant__ PruneParams<kMaxTensors> p) {
  MEM1_DYNAMIC_SHARED(memory);
  RowShared shared;
  int32_t* sources = carve_row(reinterpret_cast<int32_t*>(memory), p.row.capacity, &shared);
  int32_t* destinations = sources + kTileMoves;
  int32_t* const broadcast = shared.scratch + kWarps;

  const int page = blockIdx.y;
  const uint8_t* keep = p.row.keep + page * p.row.keep_stride;
  int32_t* const row_length = p.row.lengths + page * p.row.length_stride;
  const uint32_t first_bits = load_keep(keep, threadIdx.x * kKeepBytes, p.row.capacity);
  bool last_reader = false;
  if (threadIdx.x == 0) {
    int length;
    last_reader = count_reader(p.row, row_length, &length);
    trap_unless(length >= 0 && length <= p.row.capacity);
    *broadcast = length;
  }
  __syncthreads();
  const int length = *broadcast;
  const int survivors = count_survivors(keep, length, first_bits, shared);
  if (last_reader) *row_length = survivors;
  __syncthreads();

  const Survivors kept{shared.words, shared.group_rank};
  const RowMoves row = plan_row(kept, survivors, kOrdered);
  const int32_t* delta =
      p.position_delta == nullptr ? nullptr : p.position_delta + page * p.delta_stride;
  const DenseMoves moves{page, sources, destinations};
  int stay_end = delta == nullptr ? 0 : row.stay_end;  // keys there are rotated with the first tile
  for (int begin = 0; begin < row.count || stay_end > 0; begin += kTileMoves) {
    const int end = begin + kTileMoves < row.count ? begin + kTileMoves : row.count;
    const int words = prune_groups(length) * kGroupWords;
    for (int word = row.source_from / kWordSlots + threadIdx.x; word < words; word += kThreads) {
      emit_sources(kept, row, word, begin, end,
                   [&](int move, int slot) { sources[move - begin] = slot; });
    }
    if (kOrdered) {
      for (int move = begin + threadIdx.x; move < end; move += kThreads) {
        destinations[move - begin] = row.stay_end + move;
      }
    } else {
      for (int word = threadIdx.x; word * kWordSlots < row.survivors; word += kThreads) {
        emit_holes(kept, row, word, begin, end,
                   [&](int move, int slot) { destinations[move - begin] = slot; });
      }
    }
    __syncthreads();
    prune_tile<Key, kOrdered>(p, moves, end - begin, kept, stay_end, delta);
    stay_end = 0;
    __syncthreads();
  }
}

// Survivors of page q of a row.
__device__ __forceinline__ int page_survivors(const Survivors& kept, int q, int page_size,
                                              int length) {
  const int first = q * page_size;
  const int behind = length - first < page_size ? length : first + page_size;
  return kept.rank(behind) - kept.rank(first);
}

template <int kMaxTensors>
__global__ void __launch_bounds__(kThreads, 3)
    prune_paged_kv_kernel(const __grid_constant__ PagedPruneParams<kMaxTensors> p) {
  MEM1_DYNAMIC_SHARED(memory);
  RowShared shared;
  int32_t* list = carve_row(reinterpret_cast<int32_t*>(memory), p.row.capacity, &shared);
  int32_t* const source_pages = list;
  int32_t* const source_slots = list + kTileMoves;
  int32_t* const destination_pages = list + 2 * kTileMoves;
  int32_t* const destination_slots = list + 3 * kTileMoves;
  int32_t* const table = list + 4 * kTileMoves;          // the row's pages, in their old order
  int32_t* const order = table + p.max_pages + 1;        // indices into table, in the new order
  int32_t* const packed_rank = order + p.max_pages + 1;  // survivors before each page to pack
  int32_t* const broadcast = shared.scratch + kWarps;

  const int row = blockIdx.y;
  const uint8_t* keep = p.row.keep + row * p.row.keep_stride;
  int32_t* const row_length = p.row.lengths + row * p.row.length_stride;
  int32_t* const row_table = p.block_table + row * p.table_stride;
  const uint32_t first_bits = load_keep(keep, threadIdx.x * kKeepBytes, p.row.capacity);
  if (threadIdx.x == 0) {
    // Readers count themselves below, so the upper bits may hold others' counts. A length out of
    // range is found there.
    const uint32_t value = *reinterpret_cast<volatile uint32_t*>(row_length);
    const int length = static_cast<int>(value & ((1u << p.row.length_bits) - 1));
    trap_unless(length <= p.row.capacity);
    *broadcast = length;
  }
  __syncthreads();
  const int length = *broadcast;
  const int survivors = count_survivors(keep, length, first_bits, shared);
  const int pages = (length + p.page_size - 1) / p.page_size;
  for (int q = threadIdx.x; q < pages; q += kThreads) {
    const int page = row_table[q];
    trap_unless(page >= 0 && page < p.pages);
    table[q] = page;
  }
  __syncthreads();
  if (threadIdx.x == 0) {  // after the whole block has read the table
    int counted;
    broadcast[1] = count_reader(p.row, row_length, &counted);
  }

  const Survivors kept{shared.words, shared.group_rank};
  const int mine = (pages + kThreads - 1) / kThreads;  // pages per thread
  const int first_page = threadIdx.x * mine;
  const int end_page = first_page + mine < pages ? first_page + mine : pages;
  int place[kPageKinds] = {0, 0, 0, 0}, kinds[kPageKinds];
  for (int q = first_page; q < end_page; ++q) {
    const bool is_shared = p.page_refs != nullptr && p.page_refs[table[q]] > 1;
    const int kind =
        page_kind(page_survivors(kept, q, p.page_size, length), p.page_size, is_shared);
#pragma unroll
    for (int k = 0; k < kPageKinds; ++k) place[k] += k == kind;
  }
  int before = 0;
#pragma unroll
  for (int k = 0; k < kPageKinds; ++k) {
    place[k] = before + scan_block(place[k], shared.scratch, &kinds[k]);
    before += kinds[k];
    __syncthreads();
  }
  for (int q = first_page; q < end_page; ++q) {
    const bool is_shared = p.page_refs != nullptr && p.page_refs[table[q]] > 1;
    const int kind =
        page_kind(page_survivors(kept, q, p.page_size, length), p.page_size, is_shared);
#pragma unroll
    for (int k = 0; k < kPageKinds; ++k) {
      if (k == kind) order[place[k]++] = q;
    }
  }
  __syncthreads();

  const int whole = kinds[kWholePage];
  const int packed = survivors - whole * p.page_size;
  const int receivers = (packed + p.page_size - 1) / p.page_size;
  const int used = whole + receivers;
  const bool untouched = survivors == length;
  const bool fits = receivers <= kinds[kOwnedPartial] + kinds[kOwnedDead];
  if (broadcast[1] != 0) {  // the last reader writes what the others have read
    int32_t* const freed = p.freed + row * p.freed_stride;
    const int count = untouched || !fits ? 0 : pages - used;
    for (int i = threadIdx.x; i < p.max_pages; i += kThreads) {
      freed[i] = i < count ? table[order[used + i]] : -1;
    }
    if (!untouched && fits) {
      for (int i = threadIdx.x; i < pages; i += kThreads) row_table[i] = table[order[i]];
    }
    if (threadIdx.x == 0) {
      p.freed_counts[row * p.count_stride] = untouched || fits ? count : -1;
      *row_length = fits ? survivors : length;
    }
  }
  if (untouched || !fits) return;

  const int packing = pages - whole;
  const int my_packing = (packing + kThreads - 1) / kThreads;
  const int first_packing = threadIdx.x * my_packing;
  const int end_packing =
      first_packing + my_packing < packing ? first_packing + my_packing : packing;
  int in_mine = 0;
  for (int j = first_packing; j < end_packing; ++j) {
    in_mine += page_survivors(kept, order[whole + j], p.page_size, length);
  }
  int all;
  int rank = scan_block(in_mine, shared.scratch, &all);
  for (int j = first_packing; j < end_packing; ++j) {
    packed_rank[j] = rank;
    rank += page_survivors(kept, order[whole + j], p.page_size, length);
  }
  if (threadIdx.x == 0) packed_rank[packing] = all;
  __syncthreads();

  // Survivors before slot v of the pages to pack, laid end to end.
  const auto rank_before = [&](int v) {
    const int j = v / p.page_size;
    if (j >= packing) return packed_rank[packing];
    const int first = order[whole + j] * p.page_size;
    const int token = first + v % p.page_size;
    return packed_rank[j] + kept.rank(token < length ? token : length) - kept.rank(first);
  };
  const int first_source = rank_before(packed);
  const int moves = packed - first_source;
  const PagedMoves places{source_pages, source_slots, destination_pages, destination_slots};
  for (int begin = 0; begin < moves; begin += kTileMoves) {
    const int end = begin + kTileMoves < moves ? begin + kTileMoves : moves;
    for (int v = threadIdx.x; v < packing * p.page_size; v += kThreads) {
      const int q = order[whole + v / p.page_size];
      const int slot = v % p.page_size;
      const int token = q * p.page_size + slot;
      const bool alive = token < length && kept.at(token);
      if (alive != (v >= packed)) continue;
      const int before_v = rank_before(v);
      const int move = alive ? before_v - first_source : v - before_v;
      if (move < begin || move >= end) continue;
      (alive ? source_pages : destination_pages)[move - begin] = table[q];
      (alive ? source_slots : destination_slots)[move - begin] = slot;
    }
    __syncthreads();
    const int shares = p.max_heads * p.parts;
    for (int item = blockIdx.x; item < p.tensors * shares; item += gridDim.x) {
      const SlotTensor& tensor = p.tensor[item / shares];
      const int share = item % shares;
      if (share >= tensor.heads * p.parts) continue;
      const Span span = part_of(0, end - begin, share % p.parts, p.parts);
      copy_moves<false>(tensor, share / p.parts, places, span.begin, span.end);
    }
    __syncthreads();
  }
}

}  // namespace mem1::cuda
