// The code of every attention_<level>.cpp, which sets MEM1_ATTENTION to its table's name.
// Everything here has internal linkage, since each level compiles it anew.
//
// Scores are kept transposed, [keys, query lanes]: a query is a lane of a vector, so the softmax
// needs no sums across lanes, a key's visible queries [k, expiry[k]) are a run of lanes, and every
// matrix product has the shape  c[rows, lanes] += a[rows, depth] * b[depth, lanes]  with one
// element of `a` for all lanes at a time.
#include <math.h>
#include <string.h>

#include <thread>

#include "cpu/attention.h"
#include "cpu/float_types.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace mem1::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMicroRows = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kMicroRows = 4;
#else
constexpr int kLanes = 4;
constexpr int kMicroRows = 4;
#endif
constexpr int kMicroVecs = 2;
constexpr int kTileVecs = kTile / kLanes;

// Keys of a partial tile that share one range of lanes.
constexpr int kStripKeys = 32;
constexpr int kMaxStrips = kTile / kStripKeys;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

constexpr float kLog2e = 1.44269504088896341f;

inline Vec& at(float* p) { return *reinterpret_cast<Vec*>(p); }
inline const Vec& at(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec splat(float x) { return x - Vec{}; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// e^x for x <= 87, within 2e-7 of it near 0 and |x| 1e-7 elsewhere; 0 below -87. A NaN stays one.
inline Vec exp(Vec x) {
  const Vec to_integer = splat(0x1.8p23f);
  const Vec clamped = x < -87.f ? splat(-87.f) : x;
  const Vec power = clamped * kLog2e;
  const Vec shifted = power + to_integer;
  const Vec f = power - (shifted - to_integer);
  Vec y = 1.5353362e-4f * f + 1.3398875e-3f;
  y = y * f + 9.6184369e-3f;
  y = y * f + 5.5503324e-2f;
  y = y * f + 2.4022648e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.f;
  const Vec result = (Vec)((IntVec)y + ((IntVec)shifted << 23));
  return x < -87.f ? Vec{} : result;
}

// Within 2e-7, relative.
inline Vec tanh(Vec x) {
  const Vec z = x * x;
  Vec y = -5.5910158e-3f * z + 2.0538820e-2f;
  y = y * z + -5.3709656e-2f;
  y = y * z + 1.3331093e-1f;
  y = y * z + -3.3333269e-1f;
  const Vec small = x + x * z * y;
  const Vec magnitude = x < 0.f ? -x : x;
  const Vec bounded = magnitude > 10.f ? splat(10.f) : magnitude;
  const Vec large = 1.f - 2.f / (exp(2 * bounded) + 1.f);
  return magnitude < 0.625f ? small : (x < 0.f ? -large : large);
}

inline IntVec lane_index() {
  IntVec index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

// How products are formed. Operands are 32-bit words that hold one fp32, or two bf16 that are
// neighbours along the depth; sums are fp32.
struct Fp32Words {
  static constexpr int kPerWord = 1;

  static Vec multiply_add(Vec sum, float a, Vec b) { return sum + a * b; }

  // Lanes of one row, of an operand whose depth runs along the lanes.
  static void store_lanes(float* row, int lane, Vec x) { at(row + lane) = x; }

  // Two rows of an operand whose depth runs along the rows.
  static void store_rows(float* rows, int row, int lane, Vec even, Vec odd) {
    at(rows + row * kLaneStride + lane) = even;
    at(rows + (row + 1) * kLaneStride + lane) = odd;
  }

  // A token's words, with the depth along head_dim.
  template <typename Element>
  static void pack_row(float* words, const typename Element::Stored* row, int head_dim) {
    for (int d = 0; d < head_dim; ++d) words[d] = Element::load(row[d]);
  }

  // Words with the depth along the tokens, of kPerWord tokens.
  template <typename Element>
  static void pack_tokens(float* words, const typename Element::Stored* const* rows, int head_dim) {
    pack_row<Element>(words, rows[0], head_dim);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Words {
  typedef uint16_t ShortVec __attribute__((vector_size(kLanes * 2)));
  static constexpr int kPerWord = 2;

  static Vec multiply_add(Vec sum, float a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)splat(a), (__m512bh)b);
  }

  static void store_lanes(float* row, int lane, Vec x) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(row + lane / 2), (__m256i)_mm512_cvtneps_pbh(x));
  }

  static void store_rows(float* rows, int row, int lane, Vec even, Vec odd) {
    const IntVec low = __builtin_convertvector((ShortVec)_mm512_cvtneps_pbh(even), IntVec);
    const IntVec high = __builtin_convertvector((ShortVec)_mm512_cvtneps_pbh(odd), IntVec);
    at(rows + row / 2 * kLaneStride + lane) = (Vec)(low | high << 16);
  }

  template <typename Element>
  static void pack_row(float* words, const uint16_t* row, int head_dim) {
    memcpy(words, row, head_dim * sizeof(uint16_t));
  }

  template <typename Element>
  static void pack_tokens(float* words, const uint16_t* const* rows, int head_dim) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(words);
    for (int d = 0; d < head_dim; ++d)
      pairs[d] = rows[0][d] | static_cast<uint32_t>(rows[1][d]) << 16;
  }
};
#endif

// Longer sums are sums of sums of this many words, which keeps more digits.
#ifndef KDB
#define KDB 64
#endif
constexpr int kDepthBlock = KDB;

// Which side of `a` is contiguous in memory.
enum class Contiguous { kDepth, kRows };

template <typename Words, Contiguous kContiguous, int kVecs>
inline void multiply_micro(int depth, const float* a, int64_t a_stride, const float* b,
                           int64_t b_stride, float* c, int64_t c_stride, bool add) {
  for (int from = 0; from < depth; from += kDepthBlock, add = true) {
    const int to = from + kDepthBlock < depth ? from + kDepthBlock : depth;
    Vec sum[kMicroRows][kVecs] = {};
    for (int i = from; i < to; ++i, b += b_stride) {
      Vec lanes[kVecs];
      for (int v = 0; v < kVecs; ++v) lanes[v] = at(b + v * kLanes);
      for (int r = 0; r < kMicroRows; ++r) {
        const float x =
            kContiguous == Contiguous::kDepth ? a[r * a_stride + i] : a[i * a_stride + r];
        for (int v = 0; v < kVecs; ++v) sum[r][v] = Words::multiply_add(sum[r][v], x, lanes[v]);
      }
    }
    for (int r = 0; r < kMicroRows; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        Vec& out = at(c + r * c_stride + v * kLanes);
        out = add ? out + sum[r][v] : sum[r][v];
      }
    }
  }
}

// c[rows, lanes] = (add ? c : 0) + a[rows, depth] * b[depth, lanes]; rows: a multiple of
// kMicroRows, depth: in words.
template <typename Words, Contiguous kContiguous>
void multiply(int rows, int vecs, int depth, const float* a, int64_t a_stride, const float* b,
              int64_t b_stride, float* c, int64_t c_stride, bool add) {
  const int64_t a_step = kContiguous == Contiguous::kDepth ? a_stride : 1;
  for (int v = 0; v < vecs; v += kMicroVecs) {
    const int64_t lane = v * kLanes;
    for (int r = 0; r < rows; r += kMicroRows) {
      if (vecs - v >= kMicroVecs) {
        multiply_micro<Words, kContiguous, kMicroVecs>(depth, a + r * a_step, a_stride, b + lane,
                                                       b_stride, c + r * c_stride + lane, c_stride,
                                                       add);
      } else {
        multiply_micro<Words, kContiguous, 1>(depth, a + r * a_step, a_stride, b + lane, b_stride,
                                              c + r * c_stride + lane, c_stride, add);
      }
    }
  }
}

// to[c, r] = from[r, c]
void transpose(int rows, int columns, const float* from, int64_t from_stride, float* to,
               int64_t to_stride) {
  constexpr int kBlock = 8;
  for (int r = 0; r < rows; r += kBlock) {
    for (int c = 0; c < columns; ++c) {
      for (int i = 0; i < kBlock; ++i) to[c * to_stride + r + i] = from[(r + i) * from_stride + c];
    }
  }
}

// One tile of tokens; those that are not kept, or lie behind the last token, become zeros.
template <typename Element>
class TokenRows {
 public:
  using Stored = typename Element::Stored;

  TokenRows(const Rows& rows, int64_t first, int64_t tokens, const bool* keep)
      : data_(reinterpret_cast<const Stored*>(rows.data) + first * rows.stride),
        stride_(rows.stride),
        count_(tokens - first < kTile ? static_cast<int>(tokens - first) : kTile),
        keep_(keep) {}

  const Stored* operator[](int row) const {
    static const Stored zeros[256] = {};
    return row < count_ && (keep_ == nullptr || keep_[row]) ? data_ + row * stride_ : zeros;
  }

 private:
  const Stored* data_;
  int64_t stride_;
  int count_;
  const bool* keep_;
};

inline int round_up(int x, int step) { return (x + step - 1) / step * step; }

// words[kTile, head_stride], depth along head_dim.
template <typename Element, typename Words>
void pack_rows(const TokenRows<Element>& tokens, int head_dim, float* words) {
  for (int row = 0; row < kTile; ++row) {
    Words::template pack_row<Element>(words + row * head_stride(head_dim), tokens[row], head_dim);
  }
}

// words[kTile / kPerWord, head_stride], depth along the tokens; lanes behind head_dim are 0.
template <typename Element, typename Words>
void pack_tokens(const TokenRows<Element>& tokens, int head_dim, float* words) {
  constexpr int kPerWord = Words::kPerWord;
  for (int row = 0; row < kTile; row += kPerWord, words += head_stride(head_dim)) {
    const typename Element::Stored* rows[kPerWord];
    for (int i = 0; i < kPerWord; ++i) rows[i] = tokens[row + i];
    Words::template pack_tokens<Element>(words, rows, head_dim);
    for (int d = head_dim; d < round_up(head_dim, kLanes); ++d) words[d] = 0;
  }
}

// words[head_dim / kPerWord, kLaneStride], depth along head_dim; `rows` is overwritten.
template <typename Element, typename Words>
void pack_transposed(const TokenRows<Element>& tokens, int head_dim, float* rows, float* words) {
  pack_rows<Element, Words>(tokens, head_dim, rows);
  transpose(kTile, head_dim / Words::kPerWord, rows, head_stride(head_dim), words, kLaneStride);
}

template <typename Element>
void store_tokens(const float* from, int head_dim, float scale, const Rows& to, int64_t first,
                  int64_t tokens) {
  using Stored = typename Element::Stored;
  for (int row = 0; row < kTile && first + row < tokens; ++row) {
    Stored* out = reinterpret_cast<Stored*>(to.data) + (first + row) * to.stride;
    const float* in = from + row * head_stride(head_dim);
    for (int d = 0; d < head_dim; ++d) out[d] = Element::store(scale * in[d]);
  }
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

  Mask(const TileList& list, int64_t query_tile, int64_t tokens)
      : first_query(static_cast<int>(query_tile) * kTile),
        first_key(0),
        queries(tokens - first_query < kTile ? static_cast<int>(tokens) - first_query : kTile),
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

// -1 where the query, one a lane, sees the key.
inline IntVec visible(int key, int expiry, IntVec query, IntVec floor) {
  return (floor <= key) & (key <= query) & (query < expiry);
}

// A rectangle of a tile that holds all that is visible between its keys and the tile's queries.
struct Strip {
  int key_begin, key_end;  // multiples of kMicroRows
  int vec_begin, vec_end;
  bool masked;

  int keys() const { return key_end - key_begin; }
  int vecs() const { return vec_end - vec_begin; }
};

// The strip of keys [from, from + kStripKeys), cut down to what is visible; its `vecs()` may be 0.
Strip cut_strip(const Mask& mask, int from) {
  int key_begin = kTile, key_end = 0, lane_begin = kTile, lane_end = 0;
  for (int k = from; k < from + kStripKeys; ++k) {
    const int begin = mask.begin(k), end = mask.end(k);
    if (begin >= end) continue;
    key_begin = k < key_begin ? k : key_begin;
    key_end = k + 1;
    lane_begin = begin < lane_begin ? begin : lane_begin;
    lane_end = end > lane_end ? end : lane_end;
  }
  const int last_key = mask.first_key + key_end - 1;
  while (lane_begin < lane_end && mask.floor[lane_begin] > last_key) ++lane_begin;
  while (lane_begin < lane_end && mask.floor[lane_end - 1] > last_key) --lane_end;
  if (lane_begin >= lane_end) return {from, from, 0, 0, false};

  Strip strip{key_begin / kMicroRows * kMicroRows, round_up(key_end, kMicroRows),
              lane_begin / kLanes, round_up(lane_end, kLanes) / kLanes, false};
  const int first_lane = strip.vec_begin * kLanes;
  const int last_lane =
      strip.vec_end * kLanes < mask.queries ? strip.vec_end * kLanes : mask.queries;
  for (int k = strip.key_begin; k < strip.key_end; ++k) {
    strip.masked |= mask.begin(k) > first_lane || mask.end(k) < last_lane;
  }
  for (int q = first_lane; q < last_lane; ++q) {
    strip.masked |= mask.floor[q] > mask.first_key + strip.key_begin;
  }
  return strip;
}

// Strips of a tile, merged where that needs no mask; returns how many.
int cut_strips(const Mask& mask, bool partial, Strip* strips) {
  if (!partial) {
    strips[0] = {0, kTile, 0, kTileVecs, false};
    return 1;
  }
  int count = 0;
  for (int from = 0; from < kTile; from += kStripKeys) {
    const Strip strip = cut_strip(mask, from);
    if (strip.vecs() == 0) continue;
    Strip* last = count > 0 ? &strips[count - 1] : nullptr;
    if (last != nullptr && !last->masked && !strip.masked && last->key_end == strip.key_begin &&
        last->vec_begin == strip.vec_begin && last->vec_end == strip.vec_end) {
      last->key_end = strip.key_end;
    } else {
      strips[count++] = strip;
    }
  }
  return count;
}

// From dot products to scores.
struct ScoreScale {
  float inner;
  float softcap;

  explicit ScoreScale(const Problem& problem)
      : inner(problem.softcap == 0 ? problem.scale : problem.scale / problem.softcap),
        softcap(problem.softcap) {}
};

// Scores of one key as kVecs vectors of queries; `slope` gets d score / d dot, up to its scale.
template <bool kMasked, bool kSoftcap>
inline Vec masked_score(const ScoreScale& scale, const Mask& mask, int k, int lane, Vec dot,
                        Vec* slope) {
  Vec score = dot * scale.inner;
  if constexpr (kSoftcap) {
    score = tanh(score);
    *slope = 1.f - score * score;
    score *= scale.softcap;
  }
  if constexpr (kMasked) {
    const IntVec index = lane_index() + (mask.first_query + lane);
    const IntVec floor = *reinterpret_cast<const IntVec*>(mask.floor + lane);
    const IntVec seen = visible(mask.first_key + k, mask.expiry[k], index, floor);
    score = seen ? score : splat(-INFINITY);
  }
  return score;
}

// One step of the online softmax. The dot products of the strip's keys with kVecs vectors of
// queries become exp(score - maximum), as words of a product over the keys; what these queries
// gathered so far is rescaled to the new maximum.
template <typename Words, bool kMasked, bool kSoftcap, int kVecs>
void online_softmax_update(const ScoreScale& scale, const Mask& mask, const Strip& strip, int lane,
                           int head_dim, float* scores, float* row_max, float* row_sum,
                           float* out) {
  for (int v = 0; v < kVecs; ++v, lane += kLanes) {
    const Vec old_top = at(row_max + lane);
    Vec top = old_top, unused;
    for (int k = strip.key_begin; k < strip.key_end; ++k) {
      Vec& score = at(scores + k * kLaneStride + lane);
      score = masked_score<kMasked, kSoftcap>(scale, mask, k, lane, score, &unused);
      top = max(score, top);
    }
    const Vec base = top == -INFINITY ? Vec{} : top;
    const Vec rescale = exp(old_top - base);
    Vec sum{};
    for (int k = strip.key_begin; k < strip.key_end; k += 2) {
      const Vec even = exp(at(scores + k * kLaneStride + lane) - base);
      const Vec odd = exp(at(scores + (k + 1) * kLaneStride + lane) - base);
      sum += even + odd;
      Words::store_rows(scores, k, lane, even, odd);
    }
    at(row_max + lane) = top;
    at(row_sum + lane) = at(row_sum + lane) * rescale + sum;
    for (int d = 0; d < head_dim; ++d) at(out + d * kLaneStride + lane) *= rescale;
  }
}

// Dot products q.k (`scores`) and dO.v (`grad_scores`) of the strip's keys with kVecs vectors of
// queries become P and dS: both as words of a product over the queries, in place, and dS in
// `grad_rows` as words of one over the keys.
template <typename Words, bool kMasked, bool kSoftcap, int kVecs>
void differentiate_softmax(const ScoreScale& scale, const Mask& mask, const Strip& strip, int lane,
                           const float* lse, const float* delta, float* scores, float* grad_scores,
                           float* grad_rows) {
  for (int v = 0; v < kVecs; ++v, lane += kLanes) {
    const Vec log_sum = at(lse + lane), offset = at(delta + lane);
    for (int k = strip.key_begin; k < strip.key_end; k += 2) {
      Vec grad[2];
      for (int i = 0; i < 2; ++i) {
        float* score_row = scores + (k + i) * kLaneStride;
        float* grad_row = grad_scores + (k + i) * kLaneStride;
        Vec slope;
        const Vec score =
            masked_score<kMasked, kSoftcap>(scale, mask, k + i, lane, at(score_row + lane), &slope);
        const Vec p = exp(score - log_sum);
        grad[i] = p * (at(grad_row + lane) - offset);
        if constexpr (kSoftcap) grad[i] *= slope;
        Words::store_lanes(score_row, lane, p);
        Words::store_lanes(grad_row, lane, grad[i]);
      }
      if (grad_rows != grad_scores) Words::store_rows(grad_rows, k, lane, grad[0], grad[1]);
    }
  }
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// Calls step(masked, softcap, vecs, lane), the first three as types, for all lanes of the strip.
template <typename Step>
inline void for_lanes(const Strip& strip, bool softcap, const Step& step) {
  const auto with_vecs = [&](auto masked, auto capped) {
    int vec = strip.vec_begin;
    for (; vec + kMicroVecs <= strip.vec_end; vec += kMicroVecs) {
      step(masked, capped, Count<kMicroVecs>{}, vec * kLanes);
    }
    for (; vec < strip.vec_end; ++vec) step(masked, capped, Count<1>{}, vec * kLanes);
  };
  if (strip.masked) {
    softcap ? with_vecs(Flag<true>{}, Flag<true>{}) : with_vecs(Flag<true>{}, Flag<false>{});
  } else {
    softcap ? with_vecs(Flag<false>{}, Flag<true>{}) : with_vecs(Flag<false>{}, Flag<false>{});
  }
}

struct Scratch {
  float* next;

  float* take(int64_t count) {
    float* taken = next;
    next += count;
    return taken;
  }
  float* rows(int head_dim) { return take(kTile * head_stride(head_dim)); }
  float* lanes(int count) { return take(count * kLaneStride); }
};

template <typename Element, typename Words>
void forward(const ForwardTile& tile, float* scratch) {
  const Problem& problem = tile.problem;
  const TileList& list = tile.list;
  const int head_dim = problem.head_dim;
  const int64_t row_stride = head_stride(head_dim);
  constexpr int kPerWord = Words::kPerWord;

  Scratch memory{scratch};
  float* const query = memory.lanes(head_dim);
  float* const out = memory.lanes(head_dim);
  float* const key = memory.rows(head_dim);
  float* const value = memory.rows(head_dim);
  float* const scores = memory.lanes(kTile);
  float* const row_max = memory.lanes(1);
  float* const row_sum = memory.lanes(1);

  const int64_t first_query = tile.tile * kTile;
  const TokenRows<Element> query_rows(tile.query, first_query, problem.tokens, nullptr);
  pack_transposed<Element, Words>(query_rows, head_dim, key, query);
  memset(out, 0, sizeof(float) * head_dim * kLaneStride);
  memset(row_sum, 0, sizeof(float) * kTile);
  for (int q = 0; q < kTile; ++q) row_max[q] = -INFINITY;

  const ScoreScale scale(problem);
  Mask mask(list, tile.tile, problem.tokens);
  for (int entry = 0; entry < list.count; ++entry) {
    const bool partial = entry < list.partial;
    mask.move_to(list, list.tiles[entry], problem.tokens);
    Strip strips[kMaxStrips];
    const int strip_count = cut_strips(mask, partial, strips);
    const bool* keep = partial ? mask.alive : nullptr;
    pack_rows<Element, Words>(TokenRows<Element>(tile.key, mask.first_key, problem.tokens, keep),
                              head_dim, key);
    pack_tokens<Element, Words>(
        TokenRows<Element>(tile.value, mask.first_key, problem.tokens, keep), head_dim, value);
    for (int i = 0; i < strip_count; ++i) {
      const Strip& strip = strips[i];
      const int64_t key_word = strip.key_begin / kPerWord;
      for_lanes(strip, problem.softcap != 0, [&](auto masked, auto softcap, auto vecs, int lane) {
        multiply<Words, Contiguous::kDepth>(
            strip.keys(), vecs.value, head_dim / kPerWord, key + strip.key_begin * row_stride,
            row_stride, query + lane, kLaneStride, scores + strip.key_begin * kLaneStride + lane,
            kLaneStride, false);
        online_softmax_update<Words, masked.value, softcap.value, vecs.value>(
            scale, mask, strip, lane, head_dim, scores, row_max, row_sum, out);
        multiply<Words, Contiguous::kRows>(head_dim, vecs.value, strip.keys() / kPerWord,
                                           value + key_word * row_stride, row_stride,
                                           scores + key_word * kLaneStride + lane, kLaneStride,
                                           out + lane, kLaneStride, true);
      });
    }
  }

  for (int lane = 0; lane < kTile; lane += kLanes) {
    const Vec sum = at(row_sum + lane);
    const Vec normalizer = sum == 0.f ? Vec{} : 1.f / sum;
    for (int d = 0; d < head_dim; ++d) at(out + d * kLaneStride + lane) *= normalizer;
  }
  transpose(head_dim, kTile, out, kLaneStride, key, row_stride);
  store_tokens<Element>(key, head_dim, 1.f, tile.out, first_query, problem.tokens);
  for (int q = 0; q < mask.queries; ++q) {
    tile.lse[first_query + q] = row_sum[q] == 0 ? -INFINITY : row_max[q] + logf(row_sum[q]);
  }
}

// Per query: the LSE (+inf for one that sees nothing, so that its P is 0), and
// rowsum(dO * out) - d LSE.
template <typename Element>
void prepare_rows(const BackwardTile& tile, bool* keep, float* lse, float* delta) {
  const Problem& problem = tile.problem;
  const int64_t first = tile.tile * kTile;
  for (int q = 0; q < kTile; ++q) {
    keep[q] = first + q < problem.tokens && tile.lse[first + q] != -INFINITY;
    lse[q] = keep[q] ? tile.lse[first + q] : INFINITY;
  }
  const TokenRows<Element> grad_out(tile.grad_out, first, problem.tokens, keep);
  const TokenRows<Element> out(tile.out, first, problem.tokens, keep);
  for (int q = 0; q < kTile; ++q) {
    float sums[8] = {};
    for (int d = 0; d < problem.head_dim; d += 8) {
      for (int i = 0; i < 8; ++i) {
        sums[i] += Element::load(grad_out[q][d + i]) * Element::load(out[q][d + i]);
      }
    }
    delta[q] =
        ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    if (keep[q] && tile.grad_lse != nullptr) delta[q] -= tile.grad_lse[first + q];
  }
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

template <typename Element, typename Words>
void backward(const BackwardTile& tile, float* scratch) {
  const Problem& problem = tile.problem;
  const TileList& list = tile.list;
  const int head_dim = problem.head_dim;
  const int head_vecs = round_up(head_dim, kLanes) / kLanes;
  const int64_t row_stride = head_stride(head_dim);
  constexpr int kPerWord = Words::kPerWord;

  Scratch memory{scratch};
  float* const query_t = memory.lanes(head_dim);
  float* const grad_out_t = memory.lanes(head_dim);
  float* const grad_query = memory.lanes(head_dim);
  float* const query = memory.rows(head_dim);
  float* const grad_out = memory.rows(head_dim);
  float* const key = memory.rows(head_dim);
  float* const value = memory.rows(head_dim);
  float* const key_tokens = kPerWord == 1 ? key : memory.rows(head_dim);
  float* const scores = memory.lanes(kTile);
  float* const grad_scores = memory.lanes(kTile);
  float* const grad_rows = kPerWord == 1 ? grad_scores : memory.lanes(kTile);
  float* const lse = memory.lanes(1);
  float* const delta = memory.lanes(1);

  const int64_t first_query = tile.tile * kTile;
  bool seeing[kTile];
  prepare_rows<Element>(tile, seeing, lse, delta);
  const TokenRows<Element> query_rows(tile.query, first_query, problem.tokens, seeing);
  const TokenRows<Element> grad_out_rows(tile.grad_out, first_query, problem.tokens, seeing);
  pack_transposed<Element, Words>(query_rows, head_dim, key, query_t);
  pack_transposed<Element, Words>(grad_out_rows, head_dim, key, grad_out_t);
  pack_tokens<Element, Words>(query_rows, head_dim, query);
  pack_tokens<Element, Words>(grad_out_rows, head_dim, grad_out);
  memset(grad_query, 0, sizeof(float) * head_dim * kLaneStride);

  const ScoreScale scale(problem);
  Mask mask(list, tile.tile, problem.tokens);
  for (Ascending entries(list); !entries.done();) {
    const int entry = entries.next();
    const int64_t key_tile = list.tiles[entry];
    const bool partial = entry < list.partial;
    mask.move_to(list, key_tile, problem.tokens);
    Strip strips[kMaxStrips];
    const int strip_count = cut_strips(mask, partial, strips);
    const bool* keep = partial ? mask.alive : nullptr;
    const TokenRows<Element> key_rows(tile.key, mask.first_key, problem.tokens, keep);
    const TokenRows<Element> value_rows(tile.value, mask.first_key, problem.tokens, keep);
    pack_rows<Element, Words>(key_rows, head_dim, key);
    pack_rows<Element, Words>(value_rows, head_dim, value);
    if (key_tokens != key) pack_tokens<Element, Words>(key_rows, head_dim, key_tokens);

    for (int i = 0; i < strip_count; ++i) {
      const Strip& strip = strips[i];
      const int64_t key_row = strip.key_begin * row_stride;
      const int64_t score_row = strip.key_begin * kLaneStride;
      const int64_t key_word = strip.key_begin / kPerWord;
      for_lanes(strip, problem.softcap != 0, [&](auto masked, auto softcap, auto vecs, int lane) {
        multiply<Words, Contiguous::kDepth>(strip.keys(), vecs.value, head_dim / kPerWord,
                                            key + key_row, row_stride, query_t + lane, kLaneStride,
                                            scores + score_row + lane, kLaneStride, false);
        multiply<Words, Contiguous::kDepth>(
            strip.keys(), vecs.value, head_dim / kPerWord, value + key_row, row_stride,
            grad_out_t + lane, kLaneStride, grad_scores + score_row + lane, kLaneStride, false);
        differentiate_softmax<Words, masked.value, softcap.value, vecs.value>(
            scale, mask, strip, lane, lse, delta, scores, grad_scores, grad_rows);
        multiply<Words, Contiguous::kRows>(head_dim, vecs.value, strip.keys() / kPerWord,
                                           key_tokens + key_word * row_stride, row_stride,
                                           grad_rows + key_word * kLaneStride + lane, kLaneStride,
                                           grad_query + lane, kLaneStride, true);
      });
    }

    const Turns& turns = tile.turns;
    int64_t* const turn = turns.turn + key_tile;
    const int64_t own = ticket(turns.tile, turns.member, turns.group);
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != own) std::this_thread::yield();
    float* const grad_key = tile.sums + key_tile * 2 * kTile * row_stride;
    float* const grad_value = grad_key + kTile * row_stride;
    if (own == first_ticket(turns.first[key_tile], turns.group)) {
      memset(grad_key, 0, sizeof(float) * 2 * kTile * row_stride);
    }
    for (int i = 0; i < strip_count; ++i) {
      const Strip& strip = strips[i];
      const int64_t query_word = strip.vec_begin * kLanes / kPerWord;
      const int64_t score = strip.key_begin * kLaneStride + query_word;
      const int depth = strip.vecs() * kLanes / kPerWord;
      multiply<Words, Contiguous::kDepth>(strip.keys(), head_vecs, depth, scores + score,
                                          kLaneStride, grad_out + query_word * row_stride,
                                          row_stride, grad_value + strip.key_begin * row_stride,
                                          row_stride, true);
      multiply<Words, Contiguous::kDepth>(strip.keys(), head_vecs, depth, grad_scores + score,
                                          kLaneStride, query + query_word * row_stride, row_stride,
                                          grad_key + strip.key_begin * row_stride, row_stride,
                                          true);
    }
    const int64_t following = turns.member + 1 < turns.group
                                  ? own - 1
                                  : first_ticket(turns.following[entry], turns.group);
    if (following == kNoTicket) {
      store_tokens<Element>(grad_key, head_dim, problem.scale, tile.grad_key, mask.first_key,
                            problem.tokens);
      store_tokens<Element>(grad_value, head_dim, 1.f, tile.grad_value, mask.first_key,
                            problem.tokens);
    }
    __atomic_store_n(turn, following, __ATOMIC_RELEASE);
  }

  transpose(head_dim, kTile, grad_query, kLaneStride, key, row_stride);
  store_tokens<Element>(key, head_dim, problem.scale, tile.grad_query, first_query, problem.tokens);
}

#if defined(__AVX512BF16__)
void forward_tile(const ForwardTile& tile, float* scratch) {
  forward<BFloat16, Bf16Words>(tile, scratch);
}

void backward_tile(const BackwardTile& tile, float* scratch) {
  backward<BFloat16, Bf16Words>(tile, scratch);
}
#else
void forward_tile(const ForwardTile& tile, float* scratch) {
  switch (tile.problem.type) {
    case ElementType::kFloat:
      return forward<Float, Fp32Words>(tile, scratch);
    case ElementType::kHalf:
      return forward<Half, Fp32Words>(tile, scratch);
    case ElementType::kBFloat16:
      return forward<BFloat16, Fp32Words>(tile, scratch);
  }
}

void backward_tile(const BackwardTile& tile, float* scratch) {
  switch (tile.problem.type) {
    case ElementType::kFloat:
      return backward<Float, Fp32Words>(tile, scratch);
    case ElementType::kHalf:
      return backward<Half, Fp32Words>(tile, scratch);
    case ElementType::kBFloat16:
      return backward<BFloat16, Fp32Words>(tile, scratch);
  }
}
#endif

}  // namespace

const AttentionKernels MEM1_ATTENTION{forward_tile, backward_tile};

}  // namespace mem1::cpu
