// The code of attention_amx.cpp, which sets MEM1_ATTENTION to its table's name: bfloat16, with
// matrix products on AMX tile registers and the softmax in AVX-512.
//
// As in attention_kernel.h scores are kept transposed, [keys, query lanes]. Every product has the
// shape  c[rows, lanes] += a[rows, depth] * b[depth, lanes],  32 rows by 32 lanes at a time. Its
// bfloat16 operands lie in memory as the registers hold them, 1 KiB each: a "left" register has 16
// rows of 32 neighbours in depth; a "right" one has 16 pairs of neighbours in depth for 16 lanes.
//
//   forward:   S^T = K Q^T,   O^T += V^T P^T
//   backward:  S^T = K Q^T,   dP^T = V dO^T,   dQ^T += K^T dS^T,   dV += P^T dO,   dK += dS^T Q
//
// K, V^T (forward) and K, V, K^T (backward) are packed once for all query tiles and heads.
#include "cpu/amx_math.h"
#include "cpu/attention_walk.h"

namespace mem1::cpu {
namespace {

constexpr int kBlocks = kTile / kBlock;
constexpr int64_t kPairBytes = 2 * kRegisterBytes;
constexpr int kMostChunks = 256 / kBlock;

// Bytes of kTile tokens in either kind of register.
inline int64_t tile_bytes(int head_dim) { return kTile * amx_head(head_dim) * 2; }

// Some of the chunks of a product's depth, by number.
struct Chunks {
  int count = 0;
  int index[kMostChunks];

  void add(int chunk) { index[count++] = chunk; }
  static Chunks first(int count) {
    Chunks all;
    for (int i = 0; i < count; ++i) all.add(i);
    return all;
  }
};

// A 32-row or 32-lane operand: its two registers for chunk i lie at data + i * chunk_step and
// second_step behind that.
struct Operand {
  const char* data;
  int64_t chunk_step, second_step;

  const char* first(int chunk) const { return data + chunk * chunk_step; }
};

// Up to two chunks of a product  c[32, 32] = (add ? c : 0) + a[32, depth] * b[depth, 32].
// Consecutive slices of a product keep c in registers.
struct Slice {
  float* c;
  int64_t row_bytes;
  const char *a[2], *b[2];
  int64_t a_second, b_second;
  bool two;                // chunks
  bool zero, load, store;  // c: start from 0, or from memory; leave it in memory
};

// A slice in four parts, so that other work may stand between them.
template <int kPart>
__attribute__((always_inline)) inline void multiply_part(const Slice& slice) {
  constexpr int kChunk = kPart / 2;
  if (kChunk == 1 && !slice.two) {
    // There is no second chunk.
  } else if constexpr (kPart % 2 == 0) {
    if (kPart == 0 && slice.zero) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    if (kPart == 0 && slice.load) {
      _tile_loadd(0, slice.c, slice.row_bytes);
      _tile_loadd(1, slice.c + 16, slice.row_bytes);
      _tile_loadd(2, slice.c + 4 * slice.row_bytes, slice.row_bytes);
      _tile_loadd(3, slice.c + 4 * slice.row_bytes + 16, slice.row_bytes);
    }
    _tile_loadd(4, slice.a[kChunk], 64);
    _tile_loadd(6, slice.b[kChunk], 64);
    _tile_loadd(7, slice.b[kChunk] + slice.b_second, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  } else {
    _tile_loadd(5, slice.a[kChunk] + slice.a_second, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

inline void store_slice(const Slice& slice) {
  if (slice.store) {
    _tile_stored(0, slice.c, slice.row_bytes);
    _tile_stored(1, slice.c + 16, slice.row_bytes);
    _tile_stored(2, slice.c + 4 * slice.row_bytes, slice.row_bytes);
    _tile_stored(3, slice.c + 4 * slice.row_bytes + 16, slice.row_bytes);
  }
}

inline void multiply_slice(const Slice& slice) {
  finish_stores();
  multiply_part<0>(slice);
  multiply_part<1>(slice);
  multiply_part<2>(slice);
  multiply_part<3>(slice);
  store_slice(slice);
}

// Calls use(slice) for the slices of  c[32, 32] = (add ? c : 0) + a[32, depth] * b[depth, 32],
// where chunk left.index[i] of a meets chunk right.index[i] of b.
template <typename Use>
inline void cut_slices(float* c, int64_t c_stride, bool add, const Operand& a, const Chunks& left,
                       const Operand& b, const Chunks& right, const Use& use) {
  for (int i = 0; i < left.count; i += 2) {
    const int second = i + 1 < left.count ? i + 1 : i;
    use(Slice{c,
              c_stride * 4,
              {a.first(left.index[i]), a.first(left.index[second])},
              {b.first(right.index[i]), b.first(right.index[second])},
              a.second_step,
              b.second_step,
              second != i,
              i == 0 && !add,
              i == 0 && add,
              i + 2 >= left.count});
  }
}

inline void multiply_block(float* c, int64_t c_stride, bool add, const Operand& a,
                           const Chunks& left, const Operand& b, const Chunks& right) {
  cut_slices(c, c_stride, add, a, left, b, right,
             [](const Slice& slice) { multiply_slice(slice); });
}

// Left registers [token / 16, chunk of head_dim]: a token's elements are a row.
template <typename Tokens>
void pack_left(const Tokens& tokens, int head_dim, char* to) {
  for (int row = 0; row < kTile; row += 16) {
    for (int d = 0; d < head_dim; d += kBlock, to += kRegisterBytes) {
      Vec words[16];
      load_words(tokens, row, d, head_dim, words);
      for (int i = 0; i < 16; ++i) _mm512_store_ps(to + i * 64, words[i]);
    }
  }
}

// Left registers [dimension / 16, block of tokens]: a dimension's 32 tokens are a row.
template <typename Tokens>
void pack_left_transposed(const Tokens& tokens, int head_dim, char* to) {
  for (int row = 0; row < kTile; row += kBlock) {
    for (int d = 0; d < head_dim; d += kBlock) {
      char* const first = to + (d / 16 * kBlocks + row / kBlock) * kRegisterBytes;
      for (int half = 0; half < 2; ++half) {
        Vec words[16];
        load_words(tokens, row + half * 16, d, head_dim, words);
        transpose_block(words);  // [pair of dimensions, token]
        for (int pair = 0; pair < 16; ++pair) {
          const __m512i both = (__m512i)words[pair];
          char* const even =
              first + pair / 8 * kBlocks * kRegisterBytes + pair % 8 * 128 + half * 32;
          _mm256_store_si256(reinterpret_cast<__m256i*>(even), _mm512_cvtepi32_epi16(both));
          _mm256_store_si256(reinterpret_cast<__m256i*>(even + 64),
                             _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
        }
      }
    }
  }
}

// Right registers [block of tokens, chunk of head_dim, 2]: a token is a lane, depth is along
// head_dim. `flip` is xored to every word.
template <typename Tokens>
void pack_right(const Tokens& tokens, int rows, int head_dim, uint32_t flip, char* to) {
  const IntVec flips = static_cast<int>(flip) - IntVec{};
  for (int row = 0; row < rows; row += kBlock) {
    for (int d = 0; d < head_dim; d += kBlock) {
      for (int half = 0; half < 2; ++half, to += kRegisterBytes) {
        Vec words[16];
        load_words(tokens, row + half * 16, d, head_dim, words);
        transpose_block(words);
        for (int i = 0; i < 16; ++i)
          _mm512_store_si512(to + i * 64, (__m512i)((IntVec)words[i] ^ flips));
      }
    }
  }
}

// Words of the elements of two rows, of the second one in the upper halves.
inline __m512i interleave_rows(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// Right registers [block of tokens, dimension / 16]: a dimension is a lane, depth is along tokens.
template <typename Tokens>
void pack_right_tokens(const Tokens& tokens, int head_dim, char* to) {
  const int chunks = head_chunks(head_dim);
  for (int row = 0; row < kTile; row += kBlock) {
    for (int chunk = 0; chunk < chunks; ++chunk, to += kPairBytes) {
      for (int half = 0; half < 2; ++half) {
        Vec words[16];
        load_words(tokens, row + half * 16, chunk * kBlock, head_dim, words);
        for (int pair = 0; pair < 8; ++pair) {
          const __m512i even = (__m512i)words[2 * pair], odd = (__m512i)words[2 * pair + 1];
          char* const lanes = to + (half * 8 + pair) * 64;
          _mm512_store_si512(
              lanes, interleave_rows(_mm512_castsi512_si256(even), _mm512_castsi512_si256(odd)));
          _mm512_store_si512(lanes + kRegisterBytes,
                             interleave_rows(_mm512_extracti64x4_epi64(even, 1),
                                             _mm512_extracti64x4_epi64(odd, 1)));
        }
      }
    }
  }
}

// Which key blocks of a tile a query block meets.
struct Meeting {
  Chunks keys;
  bool masked[kBlocks];
};

Meeting meet_all() {
  Meeting meeting;
  for (int k = 0; k < kBlocks; ++k) {
    meeting.masked[k] = false;
    meeting.keys.add(k);
  }
  return meeting;
}

Meeting meet(const Mask& mask, int query_block) {
  const int begin = query_block * kBlock;
  const int end = begin + kBlock < mask.queries ? begin + kBlock : mask.queries;
  int least_floor = INT32_MAX, most_floor = 0;
  for (int q = begin; q < end; ++q) {
    least_floor = mask.floor[q] < least_floor ? mask.floor[q] : least_floor;
    most_floor = mask.floor[q] > most_floor ? mask.floor[q] : most_floor;
  }
  Meeting meeting;
  for (int k = 0; k < kBlocks; ++k) {
    const int first_key = mask.first_key + k * kBlock;
    if (least_floor >= first_key + kBlock) continue;
    bool any = false, all = most_floor <= first_key;
    for (int i = k * kBlock; i < (k + 1) * kBlock; ++i) {
      any |= mask.begin(i) < end && mask.end(i) > begin && mask.end(i) > mask.begin(i);
      all &= mask.begin(i) <= begin && mask.end(i) >= end;
    }
    if (!any) continue;
    meeting.masked[meeting.keys.count] = !all;
    meeting.keys.add(k);
  }
  return meeting;
}

// The two vectors of a query block.
inline Vec* block_vecs(float* row) { return reinterpret_cast<Vec*>(row); }
inline const Vec* block_vecs(const float* row) { return reinterpret_cast<const Vec*>(row); }

// What the lanes of a query block see of a key block.
struct BlockMask {
  int first_key;
  const int32_t* expiry;
  IntVec query[2], floor[2];

  BlockMask(const Mask& mask, int query_block, int key_block)
      : first_key(mask.first_key + key_block * kBlock), expiry(mask.expiry + key_block * kBlock) {
    for (int v = 0; v < 2; ++v) {
      const int lane = query_block * kBlock + v * kLanes;
      query[v] = lane_index() + (mask.first_query + lane);
      floor[v] = *reinterpret_cast<const IntVec*>(mask.floor + lane);
    }
  }

  IntVec seen(int key, int v) const {
    return visible(first_key + key, expiry[key], query[v], floor[v]);
  }
};

// Dot products of a key block to scores, in place where they change; raises `top`.
template <bool kMasked, bool kSoftcap>
void find_top(const Exponent& exponent, const BlockMask& mask, float* scores, Vec* top) {
  Vec tops[2][2] = {{top[0], top[1]}, {top[0], top[1]}};
  for (int key = 0; key < kBlock; key += 2) {
    for (int i = 0; i < 2; ++i) {
      Vec* const row = block_vecs(scores + (key + i) * kBlock);
      for (int v = 0; v < 2; ++v) {
        Vec score = row[v];
        if constexpr (kSoftcap) score = tanh(score * exponent.inner) * exponent.outer;
        if constexpr (kMasked) score = mask.seen(key + i, v) ? score : splat(-INFINITY);
        if constexpr (kMasked || kSoftcap) row[v] = score;
        tops[i][v] = _mm512_max_ps(score, tops[i][v]);
      }
    }
  }
  for (int v = 0; v < 2; ++v) top[v] = _mm512_max_ps(tops[0][v], tops[1][v]);
}

// Keys of an exponentiate() call.
constexpr int kStripKeys = 16;

// Scores of kStripKeys keys to P, as right registers; adds to `sums`. The parts of kSlices slices
// stand between the pairs of keys, so that tile and vector units work side by side.
template <bool kMasked, int kSlices>
void exponentiate(float c, const Vec* base, const float* scores, char* probabilities, Sums* sums,
                  const Slice* slices) {
  Sums sum[2] = {sums[0], sums[1]};
  if (kSlices != 0) finish_stores();
#pragma GCC unroll 8
  for (int pair = 0; pair < kStripKeys / 2; ++pair) {
    if (kSlices == 1) {
      if (pair == 0) multiply_part<0>(slices[0]);
      if (pair == 1) multiply_part<1>(slices[0]);
      if (pair == 3) multiply_part<2>(slices[0]);
      if (pair == 4) multiply_part<3>(slices[0]);
      if (pair == 6) store_slice(slices[0]);
    }
    if (kSlices == 2) {
      if (pair == 4) store_slice(slices[0]);
      if (pair % 4 == 0) multiply_part<0>(slices[pair / 4]);
      if (pair % 4 == 1) multiply_part<1>(slices[pair / 4]);
      if (pair % 4 == 2) multiply_part<2>(slices[pair / 4]);
      if (pair % 4 == 3) multiply_part<3>(slices[pair / 4]);
    }
    for (int v = 0; v < 2; ++v) {
      Vec p[2];
      for (int i = 0; i < 2; ++i) {
        const Vec score = block_vecs(scores + (2 * pair + i) * kBlock)[v];
        p[i] = exp2(score * c - base[v]);
        if (kMasked) p[i] = score == -INFINITY ? Vec{} : p[i];
      }
      const __m512i words = pair_rows(p[0], p[1]);
      sum[v].add(p[0], p[1], words);
      _mm512_store_si512(probabilities + v * kRegisterBytes + pair * 64, words);
    }
  }
  if (kSlices == 2) store_slice(slices[1]);
  for (int v = 0; v < 2; ++v) sums[v] = sum[v];
}

// rows[., 32] *= factor, per lane.
inline void scale_lanes(float* rows, int count, const Vec* factor) {
  for (int i = 0; i < count; ++i) {
    Vec* const row = block_vecs(rows + i * kBlock);
    row[0] *= factor[0];
    row[1] *= factor[1];
  }
}

struct ByteScratch {
  char* next;

  explicit ByteScratch(float* scratch) : next(reinterpret_cast<char*>(scratch)) {}
  char* take(int64_t bytes) {
    char* const taken = next;
    next += bytes;
    return taken;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(take(count * 4)); }
};

// The first `rows` lanes of from[head_dim, 32], times their factor, to the tokens from `first` on.
void store_block(const float* from, int head_dim, const Vec* factor, const Rows& to, int64_t first,
                 int rows) {
  for (int d = 0; d < head_dim; d += 16) {
    const __mmask16 there = head_dim - d < 16 ? (1u << (head_dim - d)) - 1 : 0xffff;
    for (int v = 0; v < 2; ++v) {
      Vec block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) block[i] = block_vecs(from + (d + i) * kBlock)[v] * factor[v];
      transpose_block(block);
      uint16_t* out = reinterpret_cast<uint16_t*>(to.data) + (first + v * 16) * to.stride + d;
      for (int i = 0; i < 16 && v * 16 + i < rows; ++i, out += to.stride) {
        _mm256_mask_storeu_epi16(out, there, (__m256i)_mm512_cvtneps_pbh(block[i]));
      }
    }
  }
}

int64_t packed_bytes(int head_dim, bool backward) {
  return (backward ? 3 : 2) * tile_bytes(head_dim);
}

void pack(const KeyTile& tile) {
  const int head_dim = tile.problem.head_dim;
  const int64_t first = tile.tile * kTile;
  bool keep[kTile];
  for (int k = 0; k < kTile; ++k) {
    keep[k] = first + k < tile.problem.tokens && tile.expiry[first + k] > first + k;
  }
  const TokenRows<BFloat16> keys(tile.key, first, tile.problem.tokens, keep);
  const TokenRows<BFloat16> values(tile.value, first, tile.problem.tokens, keep);
  char* const second = tile.packed + tile_bytes(head_dim);
  pack_left(keys, head_dim, tile.packed);
  if (tile.backward) {
    pack_left(values, head_dim, second);
    pack_left_transposed(keys, head_dim, second + tile_bytes(head_dim));
  } else {
    pack_left_transposed(values, head_dim, second);
  }
}

// Tokens as a left operand with depth along head_dim (of pack_left), and dimensions as one with
// depth along tokens (of pack_left_transposed).
inline Operand left_tokens(const char* packed, int block, int chunks) {
  return {packed + block * 2 * chunks * kRegisterBytes, kRegisterBytes, chunks * kRegisterBytes};
}
inline Operand left_dims(const char* packed, int chunk) {
  return {packed + chunk * 2 * kBlocks * kRegisterBytes, kRegisterBytes, kBlocks * kRegisterBytes};
}
// Tokens as the lanes of a right operand, with depth along head_dim (of pack_right).
inline Operand right_tokens(const char* packed, int block, int chunks) {
  return {packed + block * chunks * kPairBytes, kPairBytes, kRegisterBytes};
}

// Key blocks that a query block meets at a time in the forward pass: what fits the first cache.
constexpr int kStepBlocks = 2;

struct Step {
  int count;
  int blocks[kStepBlocks];  // of keys
  bool masked[kStepBlocks];
  const char *key, *value;  // of the key tile, packed
  float* scores;
  char* probabilities;
  Vec base[2], rescale[2];
  bool rescaled;

  float* block_scores(int i) const { return scores + i * kBlock * kBlock; }
};

// The steps of one query block.
class Steps {
 public:
  Steps(const ForwardTile& tile, int query_block, Mask* mask)
      : tile_(tile), query_block_(query_block), mask_(mask) {}

  // False behind the last one. The mask is that of the step.
  bool next(Step* step) {
    const TileList& list = tile_.list;
    while (from_ == meeting_.keys.count) {
      if (++entry_ == list.count) return false;
      from_ = 0;
      if (entry_ < list.partial) {
        mask_->move_to(list, list.tiles[entry_], tile_.problem.tokens);
        meeting_ = meet(*mask_, query_block_);
      } else {
        meeting_ = meet_all();
      }
    }
    const int head_dim = tile_.problem.head_dim;
    step->key = tile_.packed + list.tiles[entry_] * packed_bytes(head_dim, false);
    step->value = step->key + tile_bytes(head_dim);
    step->count = 0;
    for (; from_ < meeting_.keys.count && step->count < kStepBlocks; ++from_, ++step->count) {
      step->blocks[step->count] = meeting_.keys.index[from_];
      step->masked[step->count] = meeting_.masked[from_];
    }
    return true;
  }

 private:
  const ForwardTile& tile_;
  const int query_block_;
  Mask* const mask_;
  int entry_ = -1, from_ = 0;
  Meeting meeting_;
};

// Masks a step's scores, and moves the base of the lanes where they exceed it; a base is -infinity
// before the first key.
void find_base(const Exponent& exponent, bool softcap, const Mask& mask, int query_block,
               const Vec* base, Step* step) {
  Vec top[2] = {splat(-INFINITY), splat(-INFINITY)};
  for (int i = 0; i < step->count; ++i) {
    const BlockMask seen(mask, query_block, step->blocks[i]);
    float* const scores = step->block_scores(i);
    if (step->masked[i]) {
      softcap ? find_top<true, true>(exponent, seen, scores, top)
              : find_top<true, false>(exponent, seen, scores, top);
    } else {
      softcap ? find_top<false, true>(exponent, seen, scores, top)
              : find_top<false, false>(exponent, seen, scores, top);
    }
  }
  step->rescaled = false;
  for (int v = 0; v < 2; ++v) {
    const Vec own = top[v] == -INFINITY ? top[v] : round_up(top[v] * exponent.c);
    const __mmask16 move = _mm512_cmp_ps_mask(own, base[v] + kBaseSlack, _CMP_GT_OQ);
    step->base[v] = _mm512_mask_mov_ps(base[v], move, own);
    step->rescale[v] = base[v] == -INFINITY ? Vec{} : exp2(base[v] - step->base[v]);
    step->rescaled |= move != 0;
  }
}

// One query block of a tile. Three steps are under way at a time: the products q.k of the next one
// and P V of the previous one are issued between the exponentials of the current one, so that the
// CPU runs them side by side.
void forward_block(const ForwardTile& tile, int query_block, Mask* mask, float* scratch) {
  const Problem& problem = tile.problem;
  const int head_dim = problem.head_dim, chunks = head_chunks(head_dim);
  const int padded = static_cast<int>(amx_head(head_dim));
  const int64_t first_query = tile.first_query + query_block * kBlock;
  const int queries = mask->queries - query_block * kBlock;

  ByteScratch memory(scratch);
  char* const query = memory.take(kBlock * padded * 2);
  float* const out = memory.floats(padded * kBlock);
  float* const scores[2] = {memory.floats(kStepBlocks * kBlock * kBlock),
                            memory.floats(kStepBlocks * kBlock * kBlock)};
  char* const probabilities[2] = {memory.take(kStepBlocks * kPairBytes),
                                  memory.take(kStepBlocks * kPairBytes)};
  pack_right(TokenRows<BFloat16>(tile.query, first_query, problem.tokens, nullptr), kBlock,
             head_dim, query_flip(problem.scale), query);
  const Exponent exponent(problem.scale, problem.softcap);
  const Chunks head = Chunks::first(chunks), in_order = Chunks::first(kStepBlocks);
  Vec base[2] = {splat(-INFINITY), splat(-INFINITY)};
  Sums sum[2];
  bool fresh = true;

  // The products of the next and the previous step that are not begun yet.
  Slice slices[kStepBlocks * kMostChunks / 2 + kMostChunks * ((kStepBlocks + 1) / 2) + 1];
  int slice_count = 0;
  const auto push = [&](const Slice& slice) { slices[slice_count++] = slice; };
  const auto push_keys = [&](const Step& step) {
    for (int i = 0; i < step.count; ++i) {
      cut_slices(step.block_scores(i), kBlock, false, left_tokens(step.key, step.blocks[i], chunks),
                 head, right_tokens(query, 0, chunks), head, push);
    }
  };
  const auto push_values = [&](const Step& step) {
    Chunks keys;
    for (int i = 0; i < step.count; ++i) keys.add(step.blocks[i]);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      cut_slices(out + chunk * kBlock * kBlock, kBlock, !fresh, left_dims(step.value, chunk), keys,
                 {step.probabilities, kPairBytes, kRegisterBytes}, in_order, push);
    }
  };

  Step steps[3];
  Steps all(tile, query_block, mask);
  int number = 0;
  const auto take = [&]() -> Step* {
    Step* const step = &steps[number % 3];
    step->scores = scores[number % 2];
    step->probabilities = probabilities[number % 2];
    ++number;
    return all.next(step) ? step : nullptr;
  };
  Step *previous = nullptr, *current = take();
  if (current != nullptr) push_keys(*current);
  for (int i = 0; i < slice_count; ++i) multiply_slice(slices[i]);
  while (current != nullptr || previous != nullptr) {
    Step* next = nullptr;
    if (current != nullptr) {
      find_base(exponent, problem.softcap != 0, *mask, query_block, base, current);
      for (int v = 0; v < 2; ++v) base[v] = current->base[v];
      next = take();
    }
    slice_count = 0;
    if (previous != nullptr) {
      if (previous->rescaled && !fresh) scale_lanes(out, padded, previous->rescale);
      push_values(*previous);
    }
    if (next != nullptr) push_keys(*next);
    int done = 0;
    if (current != nullptr) {
      for (int v = 0; v < 2; ++v) sum[v].rescale(current->rescale[v]);
      const int strips = current->count * kBlock / kStripKeys;
      for (int strip = 0; strip < strips; ++strip) {
        const int i = strip * kStripKeys / kBlock, key = strip * kStripKeys % kBlock;
        const float* const from = current->block_scores(i) + key * kBlock;
        char* const to = current->probabilities + i * kPairBytes + key / 2 * 64;
        const int until = slice_count * (strip + 1) / strips;
        const int between = until - done < 2 ? until - done : 2;
        static constexpr decltype(&exponentiate<false, 0>) kExponentiate[2][3] = {
            {exponentiate<false, 0>, exponentiate<false, 1>, exponentiate<false, 2>},
            {exponentiate<true, 0>, exponentiate<true, 1>, exponentiate<true, 2>}};
        const auto step = kExponentiate[current->masked[i]][between];
        step(exponent.c, base, from, to, sum, slices + done);
        for (done += between; done < until; ++done) multiply_slice(slices[done]);
      }
    }
    for (; done < slice_count; ++done) multiply_slice(slices[done]);
    if (previous != nullptr) fresh = false;
    previous = current;
    current = next;
  }

  if (fresh) memset(out, 0, padded * kBlock * sizeof(float));
  Vec normalizer[2];
  for (int v = 0; v < 2; ++v) normalizer[v] = sum[v].normalizer();
  store_block(out, head_dim, normalizer, tile.out, first_query, queries);
  for (int q = 0; q < kBlock && q < queries; ++q) {
    const float total = sum[q / kLanes].exact[q % kLanes];
    tile.lse[first_query + q] =
        total == 0 ? -INFINITY : base[q / kLanes][q % kLanes] * kLn2 + logf(total);
  }
}

void forward_tile(const ForwardTile& tile, float* scratch) {
  take_tile_registers();
  Mask mask(tile.list, tile.first_query, tile.problem.tokens);
  for (int q = 0; q * kBlock < mask.queries; ++q) forward_block(tile, q, &mask, scratch);
  _tile_release();
}

// Dot products q.k (`scores`) and dO.v (`grads`) of a key block to P^T (left), dS^T (left) and dS^T
// (right), all as registers.
template <bool kMasked, bool kSoftcap>
void differentiate(const Exponent& exponent, const BlockMask& mask, const Vec* lse,
                   const Vec* delta, const float* scores, const float* grads, char* p_left,
                   char* ds_left, char* ds_right) {
  for (int key = 0; key < kBlock; key += 2) {
    Vec grad[2][2];
    for (int i = 0; i < 2; ++i) {
      const int row = key + i;
      Vec p[2];
      for (int v = 0; v < 2; ++v) {
        Vec score = block_vecs(scores + row * kBlock)[v];
        Vec slope;
        if constexpr (kSoftcap) {
          score = tanh(score * exponent.inner);
          slope = 1.f - score * score;
          score *= exponent.outer;
        }
        p[v] = exp2(score * exponent.c - lse[v]);
        grad[i][v] = p[v] * (block_vecs(grads + row * kBlock)[v] - delta[v]);
        if constexpr (kSoftcap) grad[i][v] *= slope;
        if constexpr (kMasked) {
          const IntVec seen = mask.seen(row, v);
          p[v] = seen ? p[v] : Vec{};
          grad[i][v] = seen ? grad[i][v] : Vec{};
        }
      }
      const int64_t at = row / 16 * kBlocks * kRegisterBytes + row % 16 * 64;
      _mm512_store_si512(p_left + at, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
      _mm512_store_si512(ds_left + at, (__m512i)_mm512_cvtne2ps_pbh(grad[i][1], grad[i][0]));
    }
    for (int v = 0; v < 2; ++v) {
      _mm512_store_si512(ds_right + v * kRegisterBytes + key / 2 * 64,
                         pair_rows(grad[0][v], grad[1][v]));
    }
  }
}

void backward_tile(const BackwardTile& tile, float* scratch) {
  const Problem& problem = tile.problem;
  const TileList& list = tile.list;
  const int head_dim = problem.head_dim, chunks = head_chunks(head_dim);
  const int64_t row_stride = amx_head_stride(head_dim);
  const int64_t grad_floats = amx_head(head_dim) * kBlock;

  ByteScratch memory(scratch);
  char* const query_t = memory.take(tile_bytes(head_dim));
  char* const grad_out_t = memory.take(tile_bytes(head_dim));
  char* const query = memory.take(tile_bytes(head_dim));
  char* const grad_out = memory.take(tile_bytes(head_dim));
  float* const grad_query = memory.floats(kBlocks * grad_floats);
  char* const p_left = memory.take(kTile * kTile * 2);
  char* const ds_left = memory.take(kTile * kTile * 2);
  char* const ds_right = memory.take(kBlocks * kPairBytes);
  float* const scores = memory.floats(kTile * kBlock);
  float* const grads = memory.floats(kTile * kBlock);
  alignas(64) float lse[kTile], delta[kTile];

  const int64_t first_query = tile.tile * kTile;
  bool seeing[kTile];
  for (int q = 0; q < kTile; ++q) {
    const int64_t token = first_query + q;
    seeing[q] = token < problem.tokens && tile.lse[token] != -INFINITY;
    lse[q] = seeing[q] ? tile.lse[token] * kLog2e : INFINITY;  // so that P is 0
  }
  const TokenRows<BFloat16> query_rows(tile.query, first_query, problem.tokens, seeing);
  const TokenRows<BFloat16> out_rows(tile.out, first_query, problem.tokens, seeing);
  const TokenRows<BFloat16> grad_out_rows(tile.grad_out, first_query, problem.tokens, seeing);
  pack_right(query_rows, kTile, head_dim, query_flip(problem.scale), query_t);
  pack_right(grad_out_rows, kTile, head_dim, 0, grad_out_t);
  pack_right_tokens(query_rows, head_dim, query);
  pack_right_tokens(grad_out_rows, head_dim, grad_out);

  take_tile_registers();
  const Chunks head = Chunks::first(chunks), in_order = Chunks::first(kBlocks);
  // delta = rowsum(dO * out) - dLSE by the same products as dO.v, so that the two cancel for a
  // query that sees one key.
  char* const out_left = reinterpret_cast<char*>(grad_query);
  pack_left(out_rows, head_dim, out_left);
  for (int q = 0; q < kBlocks; ++q) {
    multiply_block(scores, kBlock, false, left_tokens(out_left, q, chunks), head,
                   right_tokens(grad_out_t, q, chunks), head);
    for (int i = 0; i < kBlock; ++i) {
      const int lane = q * kBlock + i;
      const bool has_grad = seeing[lane] && tile.grad_lse != nullptr;
      delta[lane] = scores[i * kBlock + i] - (has_grad ? tile.grad_lse[first_query + lane] : 0);
    }
  }

  const Exponent exponent(problem.scale, problem.softcap);
  const bool softcap = problem.softcap != 0;
  bool fresh[kBlocks] = {true, true, true, true};
  Mask mask(list, first_query, problem.tokens);
  for (Ascending entries(list); !entries.done();) {
    const int entry = entries.next();
    const bool partial = entry < list.partial;
    const int64_t key_tile = list.tiles[entry];
    const char* const key = tile.packed + key_tile * packed_bytes(head_dim, true);
    const char* const value = key + tile_bytes(head_dim);
    const char* const key_t = value + tile_bytes(head_dim);
    mask.move_to(list, key_tile, problem.tokens);
    Chunks queries[kBlocks];  // that meet each key block
    for (int q = 0; q * kBlock < mask.queries; ++q) {
      const Meeting meeting = partial ? meet(mask, q) : meet_all();
      const int count = meeting.keys.count;
      if (count == 0) continue;
      const Vec* const block_lse = block_vecs(lse + q * kBlock);
      const Vec* const block_delta = block_vecs(delta + q * kBlock);
      for (int i = 0; i < count; ++i) {
        const int k = meeting.keys.index[i];
        queries[k].add(q);
        multiply_block(scores, kBlock, false, left_tokens(key, k, chunks), head,
                       right_tokens(query_t, q, chunks), head);
        multiply_block(grads, kBlock, false, left_tokens(value, k, chunks), head,
                       right_tokens(grad_out_t, q, chunks), head);
        const auto step =
            meeting.masked[i]
                ? (softcap ? differentiate<true, true> : differentiate<true, false>)
                : (softcap ? differentiate<false, true> : differentiate<false, false>);
        const int64_t at = (k * 2 * kBlocks + q) * kRegisterBytes;
        step(exponent, BlockMask(mask, q, k), block_lse, block_delta, scores, grads, p_left + at,
             ds_left + at, ds_right + i * kPairBytes);
      }
      for (int chunk = 0; chunk < chunks; ++chunk) {
        multiply_block(grad_query + q * grad_floats + chunk * kBlock * kBlock, kBlock, !fresh[q],
                       left_dims(key_t, chunk), meeting.keys,
                       {ds_right, kPairBytes, kRegisterBytes}, in_order);
      }
      fresh[q] = false;
    }

    const Turn turn(tile.turns, key_tile, entry);
    turn.wait();
    float* const grad_key = tile.sums + key_tile * sums_floats(head_dim);
    float* const grad_value = grad_key + kTile * row_stride;
    if (turn.is_first()) memset(grad_key, 0, sizeof(float) * sums_floats(head_dim));
    for (int k = 0; k < kBlocks; ++k) {
      if (queries[k].count == 0) continue;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const int64_t at = k * kBlock * row_stride + chunk * kBlock;
        const int64_t step = chunks * kPairBytes;
        multiply_block(grad_value + at, row_stride, true, left_dims(p_left, k), queries[k],
                       {grad_out + chunk * kPairBytes, step, kRegisterBytes}, queries[k]);
        multiply_block(grad_key + at, row_stride, true, left_dims(ds_left, k), queries[k],
                       {query + chunk * kPairBytes, step, kRegisterBytes}, queries[k]);
      }
    }
    if (turn.is_last()) {
      const int keys = tile_rows(mask.first_key, problem.tokens);
      store_tokens<BFloat16>(grad_key, row_stride, keys, head_dim, problem.scale, tile.grad_key,
                             mask.first_key);
      store_tokens<BFloat16>(grad_value, row_stride, keys, head_dim, 1.f, tile.grad_value,
                             mask.first_key);
    }
    turn.pass_on();
  }

  for (int q = 0; q * kBlock < mask.queries; ++q) {
    float* const block = grad_query + q * grad_floats;
    if (fresh[q]) memset(block, 0, grad_floats * sizeof(float));
    const int first = q * kBlock;
    const int rows = mask.queries - first < kBlock ? mask.queries - first : kBlock;
    const Vec scale[2] = {splat(problem.scale), splat(problem.scale)};
    store_block(block, head_dim, scale, tile.grad_query, first_query + first, rows);
  }
  _tile_release();
}

}  // namespace

const AttentionKernels MEM1_ATTENTION{forward_tile, backward_tile, packed_bytes, pack};

}  // namespace mem1::cpu
