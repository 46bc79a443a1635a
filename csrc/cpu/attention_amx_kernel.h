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
#include <immintrin.h>

#include "cpu/attention_walk.h"

namespace mem1::cpu {
namespace {

// Keys or queries of a product at a time: two registers.
constexpr int kBlock = 32;
constexpr int kBlocks = kTile / kBlock;
constexpr int64_t kRegisterBytes = 1024;
constexpr int64_t kPairBytes = 2 * kRegisterBytes;
constexpr int kMostChunks = 256 / kBlock;

// Chunks of head_dim: 32 dimensions each, the last one padded with zeros.
inline int head_chunks(int head_dim) { return static_cast<int>(amx_head(head_dim)) / kBlock; }

// Bytes of kTile tokens in either kind of register.
inline int64_t tile_bytes(int head_dim) { return kTile * amx_head(head_dim) * 2; }

// While one lives, this thread's tile registers are 16 rows of 64 bytes.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

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
  const char* second(int chunk) const { return data + chunk * chunk_step + second_step; }
};

// c[32, 32] = (add ? c : 0) + a[32, depth] * b[depth, 32]: chunk left.index[i] of a meets chunk
// right.index[i] of b.
inline void multiply_block(float* c, int64_t c_stride, bool add, const Operand& a,
                           const Chunks& left, const Operand& b, const Chunks& right) {
  const int64_t row_bytes = c_stride * 4;
  float* const lower = c + 16 * c_stride;
  // The loads below do not say that they read memory.
  __asm__ volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, c, row_bytes);
    _tile_loadd(1, c + 16, row_bytes);
    _tile_loadd(2, lower, row_bytes);
    _tile_loadd(3, lower + 16, row_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < left.count; ++i) {
    const int l = left.index[i], r = right.index[i];
    _tile_loadd(4, a.first(l), 64);
    _tile_loadd(6, b.first(r), 64);
    _tile_loadd(7, b.second(r), 64);
    _tile_loadd(5, a.second(l), 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, row_bytes);
  _tile_stored(1, c + 16, row_bytes);
  _tile_stored(2, lower, row_bytes);
  _tile_stored(3, lower + 16, row_bytes);
}

// 16 tokens' words of two elements each, from dimension `from` on; behind head_dim they are 0.
struct alignas(64) WordBlock {
  float words[16][16];

  template <typename Tokens>
  WordBlock(const Tokens& tokens, int row, int from, int head_dim) {
    const int bytes = (head_dim - from < kBlock ? head_dim - from : kBlock) * 2;
    for (int i = 0; i < 16; ++i) {
      if (bytes < 64) memset(words[i], 0, 64);
      memcpy(words[i], tokens[row + i] + from, bytes);
    }
  }
};

// Left registers [token / 16, chunk of head_dim]: a token's elements are a row.
template <typename Tokens>
void pack_left(const Tokens& tokens, int head_dim, char* to) {
  for (int row = 0; row < kTile; row += 16) {
    for (int d = 0; d < head_dim; d += kBlock, to += kRegisterBytes) {
      const WordBlock block(tokens, row, d, head_dim);
      memcpy(to, block.words, sizeof(block.words));
    }
  }
}

// Left registers [dimension / 16, block of tokens]: a dimension's 32 tokens are a row.
template <typename Tokens>
void pack_left_transposed(const Tokens& tokens, int head_dim, char* to) {
  for (int row = 0; row < kTile; row += kBlock) {
    for (int d = 0; d < head_dim; d += kBlock) {
      alignas(64) float turned[2][16][16];  // [tokens / 16, pair of dimensions, token]
      for (int half = 0; half < 2; ++half) {
        const WordBlock block(tokens, row + half * 16, d, head_dim);
        transpose(16, 16, block.words[0], 16, turned[half][0], 16);
      }
      for (int pair = 0; pair < 16; ++pair) {
        const int dim = d + 2 * pair;
        char* const row_even = to + (dim / 16 * kBlocks + row / kBlock) * kRegisterBytes +
                               dim % 16 * 64;
        for (int half = 0; half < 2; ++half) {
          const __m512i both = _mm512_load_si512(turned[half][pair]);
          _mm256_store_si256(reinterpret_cast<__m256i*>(row_even + half * 32),
                             _mm512_cvtepi32_epi16(both));
          _mm256_store_si256(reinterpret_cast<__m256i*>(row_even + 64 + half * 32),
                             _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
        }
      }
    }
  }
}

// Right registers [block of tokens, chunk of head_dim, 2]: a token is a lane, depth is along
// head_dim. `flip` is xored to every word.
template <typename Tokens>
void pack_right(const Tokens& tokens, int head_dim, uint32_t flip, char* to) {
  const __m512i flips = _mm512_set1_epi32(static_cast<int>(flip));
  for (int row = 0; row < kTile; row += kBlock) {
    for (int d = 0; d < head_dim; d += kBlock) {
      for (int half = 0; half < 2; ++half, to += kRegisterBytes) {
        const WordBlock block(tokens, row + half * 16, d, head_dim);
        float* const words = reinterpret_cast<float*>(to);
        transpose(16, 16, block.words[0], 16, words, 16);
        for (int i = 0; flip != 0 && i < 256; i += 16) {
          _mm512_store_si512(words + i, _mm512_xor_si512(_mm512_load_si512(words + i), flips));
        }
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
      const WordBlock blocks[2] = {{tokens, row, chunk * kBlock, head_dim},
                                   {tokens, row + 16, chunk * kBlock, head_dim}};
      for (int pair = 0; pair < 16; ++pair) {
        const float* const even = blocks[pair / 8].words[pair % 8 * 2];
        for (int half = 0; half < 2; ++half) {
          const __m256i* const source = reinterpret_cast<const __m256i*>(even + half * 8);
          _mm512_store_si512(to + half * kRegisterBytes + pair * 64,
                             interleave_rows(_mm256_load_si256(source),
                                             _mm256_load_si256(source + 2)));
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

// For each block of queries; an empty one meets no key.
void meet(const Mask& mask, bool partial, Meeting* meetings) {
  const int query_blocks = (mask.queries + kBlock - 1) / kBlock;
  for (int q = 0; q < kBlocks; ++q) meetings[q].keys.count = 0;
  int floor_least[kBlocks], floor_most[kBlocks];
  for (int q = 0; partial && q < query_blocks; ++q) {
    floor_least[q] = INT32_MAX;
    floor_most[q] = 0;
    for (int i = q * kBlock; i < (q + 1) * kBlock && i < mask.queries; ++i) {
      floor_least[q] = mask.floor[i] < floor_least[q] ? mask.floor[i] : floor_least[q];
      floor_most[q] = mask.floor[i] > floor_most[q] ? mask.floor[i] : floor_most[q];
    }
  }
  for (int k = 0; k < kBlocks; ++k) {
    int least_begin = kTile, most_begin = 0, least_end = kTile, most_end = 0;
    for (int i = k * kBlock; partial && i < (k + 1) * kBlock; ++i) {
      const int begin = mask.begin(i), end = mask.end(i) > begin ? mask.end(i) : begin;
      most_begin = begin > most_begin ? begin : most_begin;
      least_end = end < least_end ? end : least_end;
      if (begin >= end) continue;
      least_begin = begin < least_begin ? begin : least_begin;
      most_end = end > most_end ? end : most_end;
    }
    const int first_key = mask.first_key + k * kBlock;
    for (int q = 0; q < query_blocks; ++q) {
      const int begin = q * kBlock;
      const int end = begin + kBlock < mask.queries ? begin + kBlock : mask.queries;
      bool masked = false;
      if (partial) {
        if (least_begin >= end || most_end <= begin || floor_least[q] >= first_key + kBlock)
          continue;
        masked = most_begin > begin || least_end < end || floor_most[q] > first_key;
      }
      Meeting& meeting = meetings[q];
      meeting.masked[meeting.keys.count] = masked;
      meeting.keys.add(k);
    }
  }
}

// 2^x within 2e-6, relative, for x <= 127; anything below -126 gives 2^-126. A NaN stays one.
inline Vec exp2(Vec x) {
  const __m512 table = _mm512_setr_ps(
      0x1p0f, 0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fep0f, 0x1.3dea64p0f,
      0x1.4bfdaep0f, 0x1.5ab07ep0f, 0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f,
      0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f);
  const Vec to_sixteenths = splat(0x1.8p19f);
  const Vec bounded = _mm512_max_ps(splat(-126.f), x);
  const Vec shifted = bounded + to_sixteenths;
  const Vec rounded = shifted - to_sixteenths;
  const Vec r = bounded - rounded;
  const Vec power = _mm512_permutexvar_ps((__m512i)shifted, table);
  const Vec minus_one = (0.24022651f * r + kLn2) * r;
  return _mm512_maskz_scalef_ps(0xffff, power * minus_one + power, rounded);
}

// How dot products become exponents of 2: those of P are  c * score - ...,  and both are positive
// factors, since the query changes its sign with the scale.
struct Exponent {
  float inner;  // under a softcap: score = outer * tanh(inner * dot)
  float outer;
  float c;

  Exponent(float scale, float softcap) {
    const float positive = scale < 0 ? -scale : scale;
    inner = softcap == 0 ? 0 : positive / softcap;
    outer = softcap * kLog2e;
    c = softcap == 0 ? positive * kLog2e : 1;
  }
};

inline uint32_t query_flip(float scale) { return scale < 0 ? 0x80008000u : 0; }

// Two rows of P or dS as words for a right register.
inline __m512i pair_rows(Vec even, Vec odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)even, half), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_add_epi32((__m512i)odd, half));
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

// Scores of a key block to P, as right registers; adds to `sum`.
template <bool kMasked>
void exponentiate(float c, const Vec* base, const float* scores, char* probabilities, Vec* sum) {
  for (int key = 0; key < kBlock; key += 2) {
    const Vec* const rows[2] = {block_vecs(scores + key * kBlock),
                                block_vecs(scores + (key + 1) * kBlock)};
    for (int v = 0; v < 2; ++v) {
      Vec p[2];
      for (int i = 0; i < 2; ++i) {
        const Vec score = rows[i][v];
        p[i] = exp2(score * c - base[v]);
        if (kMasked) p[i] = score == -INFINITY ? Vec{} : p[i];
      }
      sum[v] += p[0] + p[1];
      _mm512_store_si512(probabilities + v * kRegisterBytes + key / 2 * 64, pair_rows(p[0], p[1]));
    }
  }
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

// The transposed result of a query block to rows of `to`; `staging` has room for it.
void store_block(const float* from, int head_dim, float scale, float* staging, const Rows& to,
                 int64_t first, int rows) {
  const int padded = static_cast<int>(amx_head(head_dim));
  transpose(padded, kBlock, from, kBlock, staging, padded);
  store_tokens<BFloat16>(staging, padded, rows, head_dim, scale, to, first);
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

void forward_tile(const ForwardTile& tile, float* scratch) {
  const Problem& problem = tile.problem;
  const TileList& list = tile.list;
  const int head_dim = problem.head_dim, chunks = head_chunks(head_dim);
  const int64_t out_floats = amx_head(head_dim) * kBlock;

  ByteScratch memory(scratch);
  char* const query = memory.take(tile_bytes(head_dim));
  float* const out = memory.floats(kBlocks * out_floats);
  float* const scores = memory.floats(kTile * kBlock);
  float* const staging = scores;  // up to 32 KiB: scores, probabilities and what follows
  char* const probabilities = memory.take(kBlocks * kPairBytes);
  memory.take(kBlocks * kPairBytes);
  alignas(64) float row_max[kTile], row_sum[kTile] = {};
  for (int q = 0; q < kTile; ++q) row_max[q] = -INFINITY;
  bool fresh[kBlocks] = {true, true, true, true};

  const int64_t first_query = tile.tile * kTile;
  pack_right(TokenRows<BFloat16>(tile.query, first_query, problem.tokens, nullptr), head_dim,
             query_flip(problem.scale), query);
  const TileRegisters registers;
  const Exponent exponent(problem.scale, problem.softcap);
  const bool softcap = problem.softcap != 0;
  const Chunks head = Chunks::first(chunks), in_order = Chunks::first(kBlocks);
  Mask mask(list, tile.tile, problem.tokens);
  Meeting meetings[kBlocks];
  for (int entry = 0; entry < list.count; ++entry) {
    const bool partial = entry < list.partial;
    const int64_t key_tile = list.tiles[entry];
    const char* const key = tile.packed + key_tile * packed_bytes(head_dim, false);
    const char* const value = key + tile_bytes(head_dim);
    if (partial) mask.move_to(list, key_tile, problem.tokens);
    if (partial || entry == list.partial) meet(mask, partial, meetings);
    for (int q = 0; q < kBlocks; ++q) {
      const Meeting& meeting = meetings[q];
      const int count = meeting.keys.count;
      if (count == 0) continue;
      for (int i = 0; i < count; ++i) {
        multiply_block(scores + i * kBlock * kBlock, kBlock, false,
                       left_tokens(key, meeting.keys.index[i], chunks), head,
                       right_tokens(query, q, chunks), head);
      }

      Vec* const max = block_vecs(row_max + q * kBlock);
      Vec* const sum = block_vecs(row_sum + q * kBlock);
      Vec top[2] = {max[0], max[1]};
      for (int i = 0; i < count; ++i) {
        const BlockMask seen(mask, q, meeting.keys.index[i]);
        float* const block = scores + i * kBlock * kBlock;
        if (meeting.masked[i]) {
          softcap ? find_top<true, true>(exponent, seen, block, top)
                  : find_top<true, false>(exponent, seen, block, top);
        } else {
          softcap ? find_top<false, true>(exponent, seen, block, top)
                  : find_top<false, false>(exponent, seen, block, top);
        }
      }
      Vec base[2], rescale[2], added[2] = {};
      bool same = true;
      for (int v = 0; v < 2; ++v) {
        base[v] = top[v] == -INFINITY ? Vec{} : top[v] * exponent.c;
        rescale[v] = max[v] == -INFINITY ? Vec{} : exp2(max[v] * exponent.c - base[v]);
        same &= _mm512_cmpneq_ps_mask(max[v], top[v]) == 0;
        max[v] = top[v];
      }
      for (int i = 0; i < count; ++i) {
        const float* const block = scores + i * kBlock * kBlock;
        const auto step = meeting.masked[i] ? exponentiate<true> : exponentiate<false>;
        step(exponent.c, base, block, probabilities + i * kPairBytes, added);
      }
      float* const block_out = out + q * out_floats;
      if (same) {
        for (int v = 0; v < 2; ++v) sum[v] += added[v];
      } else {
        for (int v = 0; v < 2; ++v) sum[v] = sum[v] * rescale[v] + added[v];
        if (!fresh[q]) scale_lanes(block_out, static_cast<int>(amx_head(head_dim)), rescale);
      }
      for (int chunk = 0; chunk < chunks; ++chunk) {
        multiply_block(block_out + chunk * kBlock * kBlock, kBlock, !fresh[q],
                       left_dims(value, chunk), meeting.keys,
                       {probabilities, kPairBytes, kRegisterBytes}, in_order);
      }
      fresh[q] = false;
    }
  }

  for (int q = 0; q * kBlock < mask.queries; ++q) {
    float* const block_out = out + q * out_floats;
    if (fresh[q]) memset(block_out, 0, out_floats * sizeof(float));
    Vec normalizer[2];
    for (int v = 0; v < 2; ++v) {
      const Vec sum = block_vecs(row_sum + q * kBlock)[v];
      normalizer[v] = sum == 0.f ? Vec{} : 1.f / sum;
    }
    scale_lanes(block_out, static_cast<int>(amx_head(head_dim)), normalizer);
    const int first = q * kBlock;
    const int rows = mask.queries - first < kBlock ? mask.queries - first : kBlock;
    store_block(block_out, head_dim, 1.f, staging, tile.out, first_query + first, rows);
  }
  for (int q = 0; q < mask.queries; ++q) {
    const float base = row_max[q] * exponent.c;
    tile.lse[first_query + q] = row_sum[q] == 0 ? -INFINITY : base * kLn2 + logf(row_sum[q]);
  }
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
  float* const staging = scores;  // and grads
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
  pack_right(query_rows, head_dim, query_flip(problem.scale), query_t);
  pack_right(grad_out_rows, head_dim, 0, grad_out_t);
  pack_right_tokens(query_rows, head_dim, query);
  pack_right_tokens(grad_out_rows, head_dim, grad_out);

  const TileRegisters registers;
  const Chunks head = Chunks::first(chunks), in_order = Chunks::first(kBlocks);
  // delta = rowsum(dO * out) - dLSE by the same products as dO.v, so that the two cancel for a query
  // that sees one key.
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
  Mask mask(list, tile.tile, problem.tokens);
  for (Ascending entries(list); !entries.done();) {
    const int entry = entries.next();
    const bool partial = entry < list.partial;
    const int64_t key_tile = list.tiles[entry];
    const char* const key = tile.packed + key_tile * packed_bytes(head_dim, true);
    const char* const value = key + tile_bytes(head_dim);
    const char* const key_t = value + tile_bytes(head_dim);
    mask.move_to(list, key_tile, problem.tokens);
    Meeting meetings[kBlocks];
    meet(mask, partial, meetings);
    Chunks queries[kBlocks];  // that meet each key block
    for (int q = 0; q < kBlocks; ++q) {
      const Meeting& meeting = meetings[q];
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
        const auto step = meeting.masked[i]
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
    store_block(block, head_dim, problem.scale, staging, tile.grad_query, first_query + first,
                rows);
  }
}

}  // namespace

const AttentionKernels MEM1_ATTENTION{forward_tile, backward_tile, packed_bytes, pack};

}  // namespace mem1::cpu
