// Few rows (decode) in bfloat16 on AMX tile registers: keys are read where they lie, values become
// pairs of slots on the way; scores are [slots, row lanes]. Part of cached_attention_kernel.h.
//
//   S^T[slots, rows] = K Q^T,   O[rows, head_dim] += P V
#pragma once

#include "cpu/amx_math.h"

namespace mem1::cpu {
namespace {

constexpr int kSlotGroup = 16;  // rows of a tile register
constexpr int kSlotGroups = kSlotBlock / kSlotGroup;
static_assert(kFewRows == kSlotGroup && kLanes == kSlotGroup, "a row is a lane");

// Where lane `lane` of two vectors of interleaved pairs lies in 32 dimensions.
inline int pair_dim(int lane) { return lane % 16 / 4 * 8 + lane / 16 * 4 + lane % 4; }

struct SlotRows {
  const uint16_t* data;
  int64_t stride;
  int count;  // slots from `data` on

  // The first elements of a slot; those behind the last slot or behind `there` are 0.
  __m512i load(int slot, int from, __mmask32 there) const {
    const __mmask32 mask = slot < count ? there : 0;
    return _mm512_maskz_loadu_epi16(mask, data + (mask == 0 ? 0 : slot) * stride + from);
  }
};

// scores[16 slots, rows] of the slots from 16 * group on.
inline void score_slots(const SlotRows& keys, int group, const char* query, int head_dim,
                        char* staging, float* scores) {
  const bool whole = (group + 1) * kSlotGroup <= keys.count;
  const uint16_t* const first = keys.data + group * kSlotGroup * keys.stride;
  finish_stores();
  _tile_zero(0);
  for (int d = 0; d < head_dim; d += kBlock, query += kRegisterBytes) {
    if (whole && d + kBlock <= head_dim) {
      _tile_loadd(1, first + d, keys.stride * 2);
    } else {
      const __mmask32 there = head_dim - d < kBlock ? (1u << (head_dim - d)) - 1 : ~0u;
      for (int i = 0; i < kSlotGroup; ++i) {
        _mm512_store_si512(staging + i * 64, keys.load(group * kSlotGroup + i, d, there));
      }
      finish_stores();
      _tile_loadd(1, staging, 64);
    }
    _tile_loadd(2, query, 64);
    _tile_dpbf16ps(0, 1, 2);
  }
  _tile_stored(0, scores, 64);
}

// out[rows, dimensions d .. d + 31] += P V, in the order of pair_dim.
inline void add_values(const SlotRows& values, int d, int head_dim, const char* probabilities,
                       char* staging, float* out, int64_t stride) {
  const __mmask32 there = head_dim - d < kBlock ? (1u << (head_dim - d)) - 1 : ~0u;
  for (int pair = 0; pair < kSlotBlock / 2; ++pair) {
    const __m512i even = values.load(2 * pair, d, there);
    const __m512i odd = values.load(2 * pair + 1, d, there);
    char* const to = staging + pair / 16 * 2 * kRegisterBytes + pair % 16 * 64;
    _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(to + kRegisterBytes, _mm512_unpackhi_epi16(even, odd));
  }
  finish_stores();
  _tile_loadd(0, out, stride * 4);
  _tile_loadd(1, out + 16, stride * 4);
  for (int part = 0; part < kSlotBlock / kBlock; ++part, staging += 2 * kRegisterBytes) {
    _tile_loadd(2, probabilities + part * kRegisterBytes, 64);
    _tile_loadd(3, staging, 64);
    _tile_loadd(4, staging + kRegisterBytes, 64);
    _tile_dpbf16ps(0, 2, 3);
    _tile_dpbf16ps(1, 2, 4);
  }
  _tile_stored(0, out, stride * 4);
  _tile_stored(1, out + 16, stride * 4);
}

void attend_few_amx(const CachedRows& unit, float* scratch) {
  const int head_dim = unit.head_dim, chunks = head_chunks(head_dim);
  const int64_t padded = amx_head(head_dim);
  const int64_t row_bytes = head_dim * static_cast<int64_t>(sizeof(uint16_t));
  Scratch memory{scratch};
  float* const query = memory.take(chunks * kRegisterBytes / 4);
  float* const out = memory.take(kFewRows * padded);
  float* const scores = memory.take(kSlotBlock * kLanes);
  float* const probabilities = memory.take(kSlotBlock / kBlock * kRegisterBytes / 4);
  char* const staging = reinterpret_cast<char*>(memory.take(kSlotBlock / kBlock * 2 * 256));
  int32_t* const positions = reinterpret_cast<int32_t*>(memory.take(kSlotBlock));
  memset(out, 0, sizeof(float) * kFewRows * padded);
  memset(positions, 0, sizeof(int32_t) * kSlotBlock);
  const IntVec flips = static_cast<int>(query_flip(unit.scale)) - IntVec{};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    Vec words[16];
    load_words(QueryRows<BFloat16>{unit}, 0, chunk * kBlock, head_dim, words);
    transpose_block(words);
    for (int i = 0; i < 16; ++i)
      _mm512_store_si512(query + chunk * 256 + i * 16, (__m512i)((IntVec)words[i] ^ flips));
  }

  take_tile_registers();
  const Sight sight(unit);
  const Exponent exponent(unit.scale, unit.softcap);
  const IntVec last = *reinterpret_cast<const IntVec*>(sight.last);
  const IntVec nearest = *reinterpret_cast<const IntVec*>(sight.nearest);
  const uint16_t* const all_keys = reinterpret_cast<const uint16_t*>(unit.key.data);
  const uint16_t* const all_values = reinterpret_cast<const uint16_t*>(unit.value.data);
  Vec base = splat(-INFINITY);
  Sums sum;
  for (int64_t slot = unit.slot_begin; slot < unit.slot_end; slot += kSlotBlock) {
    const int slots =
        unit.slot_end - slot < kSlotBlock ? static_cast<int>(unit.slot_end - slot) : kSlotBlock;
    if (sight.windowed && !sight.load_positions(unit, slot, slots, positions)) continue;
    const SlotRows keys{all_keys + slot * unit.key.stride, unit.key.stride, slots};
    const SlotRows values{all_values + slot * unit.value.stride, unit.value.stride, slots};
    for (int i = 0; i < kSlotBlock && slot + kSlotBlock + i < unit.slot_end; ++i) {
      prefetch(all_keys + (slot + kSlotBlock + i) * unit.key.stride, row_bytes);
      prefetch(all_values + (slot + kSlotBlock + i) * unit.value.stride, row_bytes);
    }
    for (int group = 0; group < kSlotGroups; ++group) {
      score_slots(keys, group, reinterpret_cast<const char*>(query), head_dim, staging,
                  scores + group * kSlotGroup * kLanes);
    }

    const int first = static_cast<int>(slot - unit.slot_begin);
    const bool masked = sight.windowed || sight.least_last < first + kSlotBlock - 1;
    Vec top = splat(-INFINITY);
    for (int k = 0; k < kSlotBlock; ++k) {
      Vec& score = at(scores + k * kLanes);
      if (unit.softcap != 0) score = tanh(score * exponent.inner) * exponent.outer;
      if (masked) {
        IntVec seen = (last >= first + k) & (k < slots ? IntVec{} - 1 : IntVec{});
        if (sight.windowed) seen &= nearest <= positions[k];
        score = seen ? score : splat(-INFINITY);
      }
      top = _mm512_max_ps(score, top);
    }
    const Vec own = top == -INFINITY ? top : round_up(top * exponent.c);
    const __mmask16 move = _mm512_cmp_ps_mask(own, base + kBaseSlack, _CMP_GT_OQ);
    if (move != 0) {
      const Vec moved = _mm512_mask_mov_ps(base, move, own);
      const Vec rescale = base == -INFINITY ? Vec{} : exp2(base - moved);
      for (int r = 0; r < unit.rows; ++r) {
        for (int64_t d = 0; d < padded; d += kLanes) at(out + r * padded + d) *= rescale[r];
      }
      sum.rescale(rescale);
      base = moved;
    }
    for (int part = 0; part < kSlotBlock / kBlock; ++part) {
      Vec words[16];
      for (int pair = 0; pair < 16; ++pair) {
        Vec p[2];
        for (int i = 0; i < 2; ++i) {
          const Vec score = at(scores + (part * kBlock + 2 * pair + i) * kLanes);
          p[i] = exp2(score * exponent.c - base);
          p[i] = score == -INFINITY ? Vec{} : p[i];
        }
        const __m512i both = pair_rows(p[0], p[1]);
        sum.add(p[0], p[1], both);
        words[pair] = (Vec)both;
      }
      transpose_block(words);
      for (int r = 0; r < 16; ++r) at(probabilities + part * 256 + r * 16) = words[r];
    }
    for (int d = 0; d < head_dim; d += kBlock) {
      add_values(values, d, head_dim, reinterpret_cast<const char*>(probabilities), staging,
                 out + d, padded);
    }
  }
  _tile_release();
  const Vec normalizers = sum.normalizer();
  for (int r = 0; r < unit.rows; ++r) {
    const float normalizer = normalizers[r];
    for (int i = 0; i < padded; ++i) {
      const int d = i / kBlock * kBlock + pair_dim(i % kBlock);
      if (d < head_dim) unit.out[r * head_dim + d] = out[r * padded + i] * normalizer;
    }
    unit.lse[r] = sum.exact[r] == 0 ? -INFINITY : base[r] * kLn2 + logf(sum.exact[r]);
  }
}

}  // namespace
}  // namespace mem1::cpu
