// The code of every cached_attention_<level>.cpp, which sets MEM1_CACHED_ATTENTION to its table's
// name. Everything here has internal linkage, since each level compiles it anew.
//
// Few rows (decode): keys and values are read where they lie, once, each for all rows at a time;
// scores are [rows, slots]. Many rows: tiles are packed for the products of tile_math.h, and scores
// are [slots, row lanes].
#include "cpu/cached_attention.h"
#include "cpu/tile_math.h"

namespace mem1::cpu {
namespace {

// Positions become int32 relative to the least one that a row of the unit sees; anything further
// off is as good as this far. (The caller checks that the rows of a call are not further apart.)
constexpr int64_t kFar = INT32_MAX - 1;

inline int32_t clamp_far(int64_t x) {
  return static_cast<int32_t>(x < -kFar ? -kFar : x > kFar ? kFar : x);
}

// a - b, or the extreme that it passes.
inline int64_t minus(int64_t a, int64_t b) {
  int64_t difference;
  if (!__builtin_sub_overflow(a, b, &difference)) return difference;
  return a < 0 ? INT64_MIN : INT64_MAX;
}

inline int64_t position_of(const Positions& positions, int64_t slot) {
  const char* at = positions.data + slot * positions.stride;
  if (positions.wide) {
    int64_t position;
    memcpy(&position, at, sizeof(position));
    return position;
  }
  int32_t position;
  memcpy(&position, at, sizeof(position));
  return position;
}

// The first position in the window of the token in `slot`.
inline int64_t first_seen(const CachedRows& unit, int64_t slot) {
  return minus(position_of(unit.position_ids, slot), unit.window - 1);
}

// What each row of a unit sees: slots up to `last`, and, under a window, positions from `nearest`
// on.
struct Sight {
  alignas(64) int32_t last[kTile];     // relative to slot_begin; may be negative
  alignas(64) int32_t nearest[kTile];  // relative to `base`
  int32_t least_last;
  bool windowed;
  int64_t base;  // the least position that a row sees

  explicit Sight(const CachedRows& unit)
      : least_last(INT32_MAX), windowed(unit.position_ids.data != nullptr), base(0) {
    for (int r = 0; r < unit.rows; ++r) {
      const int64_t slot = unit.first_slot + (unit.first_row + r) / unit.group;
      last[r] = static_cast<int32_t>(slot - unit.slot_begin);
      least_last = last[r] < least_last ? last[r] : least_last;
      nearest[r] = static_cast<int32_t>(-kFar);
      if (!windowed) continue;
      const int64_t first = first_seen(unit, slot);
      base = r == 0 || first < base ? first : base;
    }
    for (int r = 0; windowed && r < unit.rows; ++r) {
      const int64_t slot = unit.first_slot + (unit.first_row + r) / unit.group;
      nearest[r] = clamp_far(minus(first_seen(unit, slot), base));
    }
    for (int r = unit.rows; r < kTile; ++r) last[r] = nearest[r] = 0;
  }

  // Positions of `count` slots relative to `base`, INT32_MIN where no row sees it; whether some row
  // may see one of them.
  bool load_positions(const CachedRows& unit, int64_t slot, int count, int32_t* positions) const {
    bool seen = false;
    for (int i = 0; i < count; ++i) {
      const int64_t position = position_of(unit.position_ids, slot + i);
      const bool near = position >= base;
      positions[i] = near ? clamp_far(minus(position, base)) : INT32_MIN;
      seen |= near;
    }
    return seen;
  }
};

template <typename Element>
const typename Element::Stored* query_row(const CachedRows& unit, int row) {
  const int64_t index = unit.first_row + row;
  return reinterpret_cast<const typename Element::Stored*>(unit.query) +
         index / unit.group * unit.token_stride + index % unit.group * unit.head_stride;
}

typedef uint16_t ShortVec __attribute__((vector_size(kLanes * 2)));

inline Vec widen(const float* p, Float) {
  Vec x;
  memcpy(&x, p, sizeof(x));
  return x;
}

inline Vec widen(const uint16_t* p, BFloat16) {
  ShortVec x;
  memcpy(&x, p, sizeof(x));
  return (Vec)(__builtin_convertvector(x, IntVec) << 16);
}

inline Vec widen(const uint16_t* p, Half) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff,
                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = Half::load(p[i]);
  return x;
#endif
}

inline Vec shuffle(Vec a, Vec b, IntVec index) {
#if defined(__clang__)
  Vec result;
  for (int i = 0; i < kLanes; ++i)
    result[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Lanes turned by kBy places.
template <int kBy>
inline Vec turn(Vec x) {
  IntVec index{};
  for (int i = 0; i < kLanes; ++i) index[i] = (i + kBy) % kLanes;
  return shuffle(x, x, index);
}

// Every lane: the sum over all lanes that are a multiple of kLeast away.
template <int kLeast, int kBy = kLanes / 2>
inline Vec add_turns(Vec x) {
  if constexpr (kBy < kLeast) {
    return x;
  } else {
    return add_turns<kLeast, kBy / 2>(x + turn<kBy>(x));
  }
}

template <int kBy = kLanes / 2>
inline float max_lanes(Vec x) {
  if constexpr (kBy == 0) {
    return x[0];
  } else {
    return max_lanes<kBy / 2>(max(x, turn<kBy>(x)));
  }
}

// Runs of kWidth lanes: a's even runs between b's even runs, plus the same of the odd ones.
template <int kWidth>
inline Vec add_neighbours(Vec a, Vec b) {
  IntVec even{}, odd{};
  for (int i = 0; i < kLanes; ++i) {
    const int run = i / kWidth;
    even[i] = run / 2 * 2 * kWidth + i % kWidth + (run % 2 == 0 ? 0 : kLanes);
    odd[i] = even[i] + kWidth;
  }
  return shuffle(a, b, even) + shuffle(a, b, odd);
}

// to[0..3] = the sums of the lanes of four vectors.
__attribute__((always_inline)) inline void store_sums(const Vec* x, float* to) {
  const Vec sum =
      add_turns<4>(add_neighbours<2>(add_neighbours<1>(x[0], x[1]), add_neighbours<1>(x[2], x[3])));
  memcpy(to, &sum, 4 * sizeof(float));
}

// How few rows meet keys and values. A vector holds kPerWord elements per lane, as in tile_math.h:
// neighbours of one key for dot products, or those of kPerWord slots for sums over values.
template <typename StoredElement>
struct FloatLanes {
  using Element = StoredElement;
  using Stored = typename Element::Stored;
  using Words = Fp32Words;

  static Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
  static Vec load(const Stored* p) { return widen(p, Element{}); }
  static void load_slots(const Stored* const* slots, int offset, Vec* to) {
    to[0] = load(slots[0] + offset);
  }
  // Where lane `lane` of what load_slots gives lies in head_dim.
  static int dim(int lane) { return lane; }
  // Weights as they multiply the values; `sum` is theirs, and what is returned that of the result.
  static float pack_weights(float*, float sum) { return sum; }
};

#if defined(__AVX512BF16__)
struct Bf16Lanes {
  using Element = BFloat16;
  using Stored = uint16_t;
  using Words = Bf16Words;

  static Vec multiply_add(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static Vec load(const Stored* p) { return _mm512_loadu_ps(p); }
  static void load_slots(const Stored* const* slots, int offset, Vec* to) {
    const __m512i even = _mm512_loadu_si512(slots[0] + offset);
    const __m512i odd = _mm512_loadu_si512(slots[1] + offset);
    to[0] = (Vec)_mm512_unpacklo_epi16(even, odd);
    to[1] = (Vec)_mm512_unpackhi_epi16(even, odd);
  }
  static int dim(int lane) { return lane % 16 / 4 * 8 + lane / 16 * 4 + lane % 4; }
  static float pack_weights(float* weights, float) {
    Vec sum{};
    for (int i = 0; i < kSlotBlock; i += kLanes) {
      const Vec rounded = Words::round(at(weights + i));
      sum += rounded;
      Words::store_lanes(weights, i, rounded);
    }
    return add_turns<1>(sum)[0];
  }
};
#endif

constexpr int kKeysAtOnce = 4;
#if defined(__AVX512F__)
constexpr int kRowsAtOnce = 6;
constexpr int kMostSums = 24;
#else
constexpr int kRowsAtOnce = 2;
constexpr int kMostSums = 8;
#endif

// Room for what a part vector reads and writes behind head_dim.
inline int64_t few_stride(int head_dim) { return round_up(head_dim, 32); }

struct FewRows {
  int64_t stride;  // floats from one row to the next in `query` and `out`
  float* query;    // words
  float* out;      // in the order of Lanes::dim
  float* scores;   // [rows, kSlotBlock]
  float* base;
  float* sum;     // of the weights, for the LSE
  float* weight;  // of the weights as they multiply the values, for the output
  float* rescale;
};

// The first `elements` of a vector from memory, the others 0.
template <typename Lanes>
struct Part {
  static constexpr int kElements = kLanes * Lanes::Words::kPerWord;
  typename Lanes::Stored element[kElements] = {};

  const typename Lanes::Stored* fill(const typename Lanes::Stored* from, int elements) {
    memcpy(element, from, elements * sizeof(*from));
    return element;
  }
};

// scores[r, j] = q[r] . key j for kRows rows and kKeysAtOnce keys.
template <typename Lanes, int kRows>
inline void dot(const float* query, int64_t stride, const typename Lanes::Stored* const* keys,
                int head_dim, float* scores) {
  constexpr int kStep = kLanes * Lanes::Words::kPerWord;
  Vec sum[kRows][kKeysAtOnce] = {};
  const auto add = [&](const Vec* key) {
    for (int r = 0; r < kRows; ++r) {
      const Vec x = at(query + r * stride);
      for (int j = 0; j < kKeysAtOnce; ++j) sum[r][j] = Lanes::multiply_add(sum[r][j], x, key[j]);
    }
  };
  Vec key[kKeysAtOnce];
  int d = 0;
  for (; d + kStep <= head_dim; d += kStep, query += kLanes) {
    for (int j = 0; j < kKeysAtOnce; ++j) key[j] = Lanes::load(keys[j] + d);
    add(key);
  }
  if (d < head_dim) {
    for (int j = 0; j < kKeysAtOnce; ++j) {
      Part<Lanes> part;
      key[j] = Lanes::load(part.fill(keys[j] + d, head_dim - d));
    }
    add(key);
  }
  for (int r = 0; r < kRows; ++r) store_sums(sum[r], scores + r * kSlotBlock);
}

template <typename Lanes, int kRows>
void score_rows(int count, const float* query, int64_t stride,
                const typename Lanes::Stored* const* keys, int head_dim, float* scores) {
  if (count == kRows) return dot<Lanes, kRows>(query, stride, keys, head_dim, scores);
  if constexpr (kRows > 1)
    score_rows<Lanes, kRows - 1>(count, query, stride, keys, head_dim, scores);
}

// Values of consecutive slots, from one element of head_dim on.
template <typename Lanes>
struct Values {
  const typename Lanes::Stored* data;
  int64_t stride;
  int slots;
};

// out[r] = out[r] * rescale[r] + sum over slots of p[r, slot] * value, for kRows rows and kVecs
// vectors; of each slot's values only `part` elements are there, if kPart.
template <typename Lanes, int kRows, int kVecs, bool kPart>
inline void add_vectors(const FewRows& rows, int first, Values<Lanes> values, int d, int part) {
  using Stored = typename Lanes::Stored;
  constexpr int kPerWord = Lanes::Words::kPerWord;
  const float* const weights = rows.scores + first * kSlotBlock;
  float* const out = rows.out + first * rows.stride + d;
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      sum[r][v] = at(out + r * rows.stride + v * kLanes) * rows.rescale[first + r];
    }
  }
  for (int k = 0; k < values.slots; k += kPerWord) {
    const Stored* slots[kPerWord];
    for (int i = 0; i < kPerWord; ++i) {  // a slot behind the last one has weight 0
      slots[i] = values.data + (k + i < values.slots ? k + i : k) * values.stride + d;
    }
    Vec value[kVecs];
    Part<Lanes> parts[kPart ? kPerWord : 1];
    for (int i = 0; kPart && i < kPerWord; ++i) slots[i] = parts[i].fill(slots[i], part);
    for (int v = 0; v < kVecs; v += kPerWord) Lanes::load_slots(slots, v * kLanes, value + v);
    for (int r = 0; r < kRows; ++r) {
      const float weight = weights[r * kSlotBlock + k / kPerWord];
      for (int v = 0; v < kVecs; ++v)
        sum[r][v] = Lanes::Words::multiply_add(sum[r][v], weight, value[v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) at(out + r * rows.stride + v * kLanes) = sum[r][v];
  }
}

template <typename Lanes, int kRows>
void add_rows(int count, const FewRows& rows, int first, const Values<Lanes>& values,
              int head_dim) {
  if (count != kRows) {
    if constexpr (kRows > 1) add_rows<Lanes, kRows - 1>(count, rows, first, values, head_dim);
    return;
  }
  constexpr int kPerWord = Lanes::Words::kPerWord;
  constexpr int kVecs = kMostSums / kRows >= 8 ? 8 : kMostSums / kRows >= 4 ? 4 : 2;
  int d = 0;
  for (; d + kVecs * kLanes <= head_dim; d += kVecs * kLanes) {
    add_vectors<Lanes, kRows, kVecs, false>(rows, first, values, d, 0);
  }
  for (; d + kPerWord * kLanes <= head_dim; d += kPerWord * kLanes) {
    add_vectors<Lanes, kRows, kPerWord, false>(rows, first, values, d, 0);
  }
  if (d < head_dim) add_vectors<Lanes, kRows, kPerWord, true>(rows, first, values, d, head_dim - d);
}

// One row's scores of a block of slots to weights exp(score - base); 0 where the row does not
// see. Returns their sum.
template <typename Words, bool kSoftcap>
float softmax_block(const ScoreScale& scale, const FewRows& rows, int row, int visible,
                    const int32_t* positions, int32_t nearest) {
  float* scores = rows.scores + row * kSlotBlock;
  Vec top = splat(-INFINITY);
  for (int i = 0; i < kSlotBlock; i += kLanes) {
    Vec score = at(scores + i) * scale.inner;
    if constexpr (kSoftcap) score = tanh(score) * scale.outer;
    IntVec seen = lane_index() + i < visible;
    if (positions != nullptr) seen &= *reinterpret_cast<const IntVec*>(positions + i) >= nearest;
    score = seen ? score : splat(-INFINITY);
    at(scores + i) = score;
    top = max(score, top);
  }
  const float block_base = Words::base(splat(max_lanes(top)))[0], old_base = rows.base[row];
  const float new_base = block_base > old_base ? block_base : old_base;
  const float base = new_base == -INFINITY ? 0.f : new_base;
  Vec sum{};
  for (int i = 0; i < kSlotBlock; i += kLanes) {
    const Vec score = at(scores + i);
    const Vec p = score == -INFINITY ? Vec{} : exp(score - base);
    at(scores + i) = p;
    sum += p;
  }
  rows.rescale[row] = exp(splat(old_base - base))[0];
  rows.base[row] = new_base;
  return add_turns<1>(sum)[0];
}

// Into the second cache.
inline void prefetch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
  }
}

template <typename Lanes>
void attend_few(const CachedRows& unit, float* scratch) {
  using Stored = typename Lanes::Stored;
  const int head_dim = unit.head_dim;
  const int64_t row_bytes = head_dim * static_cast<int64_t>(sizeof(Stored));
  Scratch memory{scratch};
  FewRows rows;
  rows.stride = few_stride(head_dim);
  rows.query = memory.take(kFewRows * rows.stride);
  rows.out = memory.take(kFewRows * rows.stride);
  rows.scores = memory.take(kFewRows * kSlotBlock);
  int32_t* const positions = reinterpret_cast<int32_t*>(memory.take(kSlotBlock));
  rows.base = memory.take(kFewRows);
  rows.sum = memory.take(kFewRows);
  rows.weight = memory.take(kFewRows);
  rows.rescale = memory.take(kFewRows);
  memset(rows.query, 0, sizeof(float) * unit.rows * rows.stride);
  memset(rows.out, 0, sizeof(float) * unit.rows * rows.stride);
  memset(rows.scores, 0, sizeof(float) * unit.rows * kSlotBlock);
  memset(positions, 0, sizeof(int32_t) * kSlotBlock);
  for (int r = 0; r < unit.rows; ++r) {
    Lanes::Words::template pack_row<typename Lanes::Element>(
        rows.query + r * rows.stride, query_row<typename Lanes::Element>(unit, r), head_dim);
    rows.base[r] = -INFINITY;
    rows.sum[r] = rows.weight[r] = 0;
  }

  const Sight sight(unit);
  const ScoreScale scale(unit.scale, unit.softcap);
  const Stored* const all_keys = reinterpret_cast<const Stored*>(unit.key.data);
  const Stored* const all_values = reinterpret_cast<const Stored*>(unit.value.data);
  const int parts = (unit.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  for (int64_t slot = unit.slot_begin; slot < unit.slot_end; slot += kSlotBlock) {
    const int slots =
        unit.slot_end - slot < kSlotBlock ? static_cast<int>(unit.slot_end - slot) : kSlotBlock;
    if (sight.windowed && !sight.load_positions(unit, slot, slots, positions)) continue;
    const Values<Lanes> values{all_values + slot * unit.value.stride, unit.value.stride, slots};
    for (int k = 0; k < slots; k += kKeysAtOnce) {
      const Stored* keys[kKeysAtOnce];
      for (int j = 0; j < kKeysAtOnce; ++j) {
        const int i = k + j < slots ? k + j : k;
        keys[j] = all_keys + (slot + i) * unit.key.stride;
        const int64_t ahead = slot + i + kSlotBlock;
        if (ahead >= unit.slot_end) continue;
        prefetch(all_keys + ahead * unit.key.stride, row_bytes);
        prefetch(all_values + ahead * unit.value.stride, row_bytes);
      }
      for (int part = 0; part < parts; ++part) {
        const int first = unit.rows * part / parts, end = unit.rows * (part + 1) / parts;
        score_rows<Lanes, kRowsAtOnce>(end - first, rows.query + first * rows.stride, rows.stride,
                                       keys, head_dim, rows.scores + first * kSlotBlock + k);
      }
    }
    for (int r = 0; r < unit.rows; ++r) {
      const int64_t own = sight.last[r] - (slot - unit.slot_begin) + 1;
      const int visible = own < slots ? static_cast<int>(own) : slots;
      const auto softmax = unit.softcap == 0 ? softmax_block<typename Lanes::Words, false>
                                             : softmax_block<typename Lanes::Words, true>;
      const float sum =
          softmax(scale, rows, r, visible, sight.windowed ? positions : nullptr, sight.nearest[r]);
      const float weight = Lanes::pack_weights(rows.scores + r * kSlotBlock, sum);
      rows.sum[r] = rows.sum[r] * rows.rescale[r] + sum;
      rows.weight[r] = rows.weight[r] * rows.rescale[r] + weight;
    }
    for (int part = 0; part < parts; ++part) {
      const int first = unit.rows * part / parts, end = unit.rows * (part + 1) / parts;
      add_rows<Lanes, kRowsAtOnce>(end - first, rows, first, values, head_dim);
    }
  }
  constexpr int kChunk = kLanes * Lanes::Words::kPerWord;
  for (int r = 0; r < unit.rows; ++r) {
    const float normalizer = rows.weight[r] == 0 ? 0.f : 1 / rows.weight[r];
    const float* from = rows.out + r * rows.stride;
    for (int64_t i = 0; i < rows.stride; ++i) {
      const int64_t d = i / kChunk * kChunk + Lanes::dim(i % kChunk);
      if (d < head_dim) unit.out[r * head_dim + d] = from[i] * normalizer;
    }
    unit.lse[r] = rows.sum[r] == 0 ? -INFINITY : rows.base[r] + logf(rows.sum[r]);
  }
}

template <typename Element>
struct QueryRows {
  const CachedRows& unit;

  const typename Element::Stored* operator[](int row) const {
    static const typename Element::Stored zeros[256] = {};
    return row < unit.rows ? query_row<Element>(unit, row) : zeros;
  }
};

#if defined(__AMX_BF16__)
}  // namespace
}  // namespace mem1::cpu

#include "cpu/cached_attention_amx_kernel.h"

namespace mem1::cpu {
namespace {
#endif

// One step of the online softmax: as in attention, for one vector of rows and `slots` slots.
template <typename Words, bool kMasked, bool kSoftcap>
void softmax_lanes(const ScoreScale& scale, const Sight& sight, int first, int slots,
                   const int32_t* positions, int lane, int head_dim, float* scores, float* row_base,
                   float* row_sum, float* row_weight, float* out) {
  const Vec old_base = at(row_base + lane);
  const IntVec last = *reinterpret_cast<const IntVec*>(sight.last + lane);
  const IntVec nearest = *reinterpret_cast<const IntVec*>(sight.nearest + lane);
  Vec top = splat(-INFINITY);
  for (int k = 0; k < slots; ++k) {
    Vec& score = at(scores + k * kLaneStride + lane);
    score *= scale.inner;
    if constexpr (kSoftcap) score = tanh(score) * scale.outer;
    if constexpr (kMasked) {
      const IntVec seen = (last >= first + k) & (nearest <= positions[k]);
      score = seen ? score : splat(-INFINITY);
    }
    top = max(score, top);
  }
  const Vec new_base = max(Words::base(top), old_base);
  const Vec base = new_base == -INFINITY ? Vec{} : new_base;
  const Vec rescale = exp(old_base - base);
  Vec sum{}, weight{};
  for (int k = 0; k < slots; k += 2) {
    Vec p[2];
    for (int i = 0; i < 2; ++i) {
      const Vec score = at(scores + (k + i) * kLaneStride + lane);
      p[i] = exp(score - base);
      if (kMasked) p[i] = score == -INFINITY ? Vec{} : p[i];
    }
    sum += p[0] + p[1];
    weight += Words::store_rows(scores, k, lane, p[0], p[1]);
  }
  at(row_base + lane) = new_base;
  at(row_sum + lane) = at(row_sum + lane) * rescale + sum;
  at(row_weight + lane) = at(row_weight + lane) * rescale + weight;
  for (int d = 0; d < head_dim; ++d) at(out + d * kLaneStride + lane) *= rescale;
}

template <typename Element, typename Words>
void attend_many(const CachedRows& unit, float* scratch) {
  const int head_dim = unit.head_dim;
  const int64_t row_stride = head_stride(head_dim);
  constexpr int kPerWord = Words::kPerWord;
  Scratch memory{scratch};
  float* const query = memory.lanes(padded_head(head_dim));
  float* const out = memory.lanes(padded_head(head_dim));
  float* const key = memory.rows(head_dim);
  float* const value = memory.rows(head_dim);
  float* const scores = memory.lanes(kTile);
  float* const row_base = memory.lanes(1);
  float* const row_sum = memory.lanes(1);
  float* const row_weight = memory.lanes(1);
  int32_t* const positions = reinterpret_cast<int32_t*>(memory.lanes(1));

  const int vecs = round_up(unit.rows, kLanes) / kLanes;
  pack_transposed<Element, Words>(QueryRows<Element>{unit}, round_up(unit.rows, 16), head_dim, key,
                                  query);
  memset(out, 0, sizeof(float) * head_dim * kLaneStride);
  memset(row_sum, 0, sizeof(float) * kTile);
  memset(row_weight, 0, sizeof(float) * kTile);
  memset(positions, 0, sizeof(int32_t) * kTile);
  for (int r = 0; r < kTile; ++r) row_base[r] = -INFINITY;

  const Sight sight(unit);
  const ScoreScale scale(unit.scale, unit.softcap);
  for (int64_t slot = unit.slot_begin; slot < unit.slot_end; slot += kTile) {
    const int count = unit.slot_end - slot < kTile ? static_cast<int>(unit.slot_end - slot) : kTile;
    const int slots = round_up(count, 8);
    if (sight.windowed && !sight.load_positions(unit, slot, count, positions)) continue;
    const int first = static_cast<int>(slot - unit.slot_begin);
    const bool masked = sight.windowed || sight.least_last < first + slots - 1;
    pack_rows<Element, Words>(TokenRows<Element>(unit.key, slot, unit.slot_end, nullptr), slots,
                              head_dim, key);
    pack_tokens<Element, Words>(TokenRows<Element>(unit.value, slot, unit.slot_end, nullptr), slots,
                                head_dim, value);
    for (int v = 0; v < vecs; v += kMicroVecs) {
      const int at_once = vecs - v < kMicroVecs ? vecs - v : kMicroVecs;
      const int lane = v * kLanes;
      multiply<Words, Contiguous::kDepth>(slots, at_once, head_dim / kPerWord, key, row_stride,
                                          query + lane, kLaneStride, scores + lane, kLaneStride,
                                          false);
      for (int i = 0; i < at_once; ++i) {
        const auto step = masked ? (unit.softcap == 0 ? softmax_lanes<Words, true, false>
                                                      : softmax_lanes<Words, true, true>)
                                 : (unit.softcap == 0 ? softmax_lanes<Words, false, false>
                                                      : softmax_lanes<Words, false, true>);
        step(scale, sight, first, slots, positions, lane + i * kLanes, head_dim, scores, row_base,
             row_sum, row_weight, out);
      }
      multiply<Words, Contiguous::kRows>(head_dim, at_once, slots / kPerWord, value, row_stride,
                                         scores + lane, kLaneStride, out + lane, kLaneStride, true);
    }
  }
  for (int r = 0; r < unit.rows; ++r) {
    const float normalizer = row_weight[r] == 0 ? 0.f : 1 / row_weight[r];
    for (int d = 0; d < head_dim; ++d)
      unit.out[r * head_dim + d] = out[d * kLaneStride + r] * normalizer;
    unit.lse[r] = row_sum[r] == 0 ? -INFINITY : row_base[r] + logf(row_sum[r]);
  }
}

template <typename Lanes>
void attend_rows(const CachedRows& unit, float* scratch) {
  unit.rows <= kFewRows
      ? attend_few<Lanes>(unit, scratch)
      : attend_many<typename Lanes::Element, typename Lanes::Words>(unit, scratch);
}

template <typename Element>
void combine_rows(const CachedSplits& all) {
  using Stored = typename Element::Stored;
  const int head_dim = all.head_dim;
  for (int r = 0; r < all.rows; ++r) {
    float top = -INFINITY;
    for (int s = 0; s < all.splits; ++s) {
      const float lse = all.lse[s * all.rows + r];
      top = lse > top ? lse : top;
    }
    float* const out = all.out + r * static_cast<int64_t>(head_dim);
    float total = 1;
    if (all.splits > 1 && top != -INFINITY) {
      total = 0;
      for (int s = 0; s < all.splits; ++s) {
        const float weight = expf(all.lse[s * all.rows + r] - top);
        const float* from = out + s * static_cast<int64_t>(all.rows) * head_dim;
        total += weight;
        for (int d = 0; d < head_dim; ++d)
          out[d] = s == 0 ? weight * from[d] : out[d] + weight * from[d];
      }
    }
    const int64_t token = (all.first_row + r) / all.group, head = (all.first_row + r) % all.group;
    Stored* result =
        reinterpret_cast<Stored*>(all.result) + token * all.token_stride + head * all.head_stride;
    for (int d = 0; d < head_dim; ++d) result[d] = Element::store(out[d] / total);
    all.result_lse[token * all.lse_token_stride + head * all.lse_head_stride] = top + logf(total);
  }
}

#if defined(__AMX_BF16__)
// So few rows do not pay for making pairs of the values.
constexpr int kRowsWithoutTiles = 3;

void attend(const CachedRows& unit, float* scratch) {
  if (unit.rows <= kRowsWithoutTiles) return attend_few<Bf16Lanes>(unit, scratch);
  if (unit.rows <= kFewRows) return attend_few_amx(unit, scratch);
  attend_many<BFloat16, Bf16Words>(unit, scratch);
}

void combine(const CachedSplits& all) { combine_rows<BFloat16>(all); }
#elif defined(__AVX512BF16__)
void attend(const CachedRows& unit, float* scratch) { attend_rows<Bf16Lanes>(unit, scratch); }

void combine(const CachedSplits& all) { combine_rows<BFloat16>(all); }
#else
void attend(const CachedRows& unit, float* scratch) {
  switch (unit.type) {
    case ElementType::kFloat:
      return attend_rows<FloatLanes<Float> >(unit, scratch);
    case ElementType::kHalf:
      return attend_rows<FloatLanes<Half> >(unit, scratch);
    case ElementType::kBFloat16:
      return attend_rows<FloatLanes<BFloat16> >(unit, scratch);
  }
}

void combine(const CachedSplits& all) {
  switch (all.type) {
    case ElementType::kFloat:
      return combine_rows<Float>(all);
    case ElementType::kHalf:
      return combine_rows<Half>(all);
    case ElementType::kBFloat16:
      return combine_rows<BFloat16>(all);
  }
}
#endif

}  // namespace

const CachedAttentionKernels MEM1_CACHED_ATTENTION{attend, combine};

}  // namespace mem1::cpu
