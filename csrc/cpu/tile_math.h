// Vector arithmetic and small matrix products that the attention kernels of one SIMD level share.
// Everything here has internal linkage, since each level compiles it anew.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/attention.h"
#include "cpu/float_types.h"

#if defined(__AVX512F__) || defined(__F16C__)
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
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

inline Vec& at(float* p) { return *reinterpret_cast<Vec*>(p); }
inline const Vec& at(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline Vec splat(float x) { return x - Vec{}; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// e^x within an ulp or so for x <= 87; anything below -87 gives e^-87. A NaN stays one.
inline Vec exp(Vec x) {
  const Vec to_integer = splat(0x1.8p23f);
  const Vec bounded = max(splat(-87.f), x);
  const Vec shifted = bounded * kLog2e + to_integer;
  const Vec r = bounded - (shifted - to_integer) * kLn2;
  Vec y = 1.3843633e-3f * r + 8.3741732e-3f;
  y = y * r + 4.1668002e-2f;
  y = y * r + 1.6666432e-1f;
  y = y * r + 4.9999994e-1f;
  y = y * r + 1.f;
  y = y * r + 1.f;
  return (Vec)((IntVec)y + ((IntVec)shifted << 23));
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

  // What scores are taken from before they become weights: not below any of them.
  static Vec base(Vec top) { return top; }

  // Lanes of one row, of an operand whose depth runs along the lanes.
  static void store_lanes(float* row, int lane, Vec x) { at(row + lane) = x; }

  // Two rows of an operand whose depth runs along the rows; returns the sum of what was stored.
  static Vec store_rows(float* rows, int row, int lane, Vec even, Vec odd) {
    at(rows + row * kLaneStride + lane) = even;
    at(rows + (row + 1) * kLaneStride + lane) = odd;
    return even + odd;
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

  // A multiple of ln 2, so that a weight has one mantissa whatever the base: then bfloat16 rounds
  // it alike in training and in decoding, which meet keys in other tiles.
  static Vec base(Vec top) {
    const Vec power =
        _mm512_maskz_roundscale_ps(0xffff, top * kLog2e, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
    return top == -INFINITY ? top : power * kLn2;
  }

  static Vec round(Vec x) {
    const ShortVec rounded = (ShortVec)_mm512_cvtneps_pbh(x);
    return (Vec)(__builtin_convertvector(rounded, IntVec) << 16);
  }

  static void store_lanes(float* row, int lane, Vec x) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(row + lane / 2), (__m256i)_mm512_cvtneps_pbh(x));
  }

  static Vec store_rows(float* rows, int row, int lane, Vec even, Vec odd) {
    const IntVec low = __builtin_convertvector((ShortVec)_mm512_cvtneps_pbh(even), IntVec);
    const IntVec high = __builtin_convertvector((ShortVec)_mm512_cvtneps_pbh(odd), IntVec) << 16;
    at(rows + row / 2 * kLaneStride + lane) = (Vec)(low | high);
    return (Vec)(low << 16) + (Vec)high;
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
constexpr int kBlockWords = 64;

// Which side of `a` is contiguous in memory.
enum class Contiguous { kDepth, kRows };

template <typename Words, Contiguous kContiguous, int kVecs>
inline void multiply_micro(int depth, const float* a, int64_t a_stride, const float* b,
                           int64_t b_stride, float* c, int64_t c_stride, bool add, int block) {
  for (int from = 0; from < depth; from += block, add = true) {
    const int to = from + block < depth ? from + block : depth;
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
              int64_t b_stride, float* c, int64_t c_stride, bool add, int block = kBlockWords) {
  const int64_t a_step = kContiguous == Contiguous::kDepth ? a_stride : 1;
  for (int v = 0; v < vecs; v += kMicroVecs) {
    const int64_t lane = v * kLanes;
    for (int r = 0; r < rows; r += kMicroRows) {
      if (vecs - v >= kMicroVecs) {
        multiply_micro<Words, kContiguous, kMicroVecs>(depth, a + r * a_step, a_stride, b + lane,
                                                       b_stride, c + r * c_stride + lane, c_stride,
                                                       add, block);
      } else {
        multiply_micro<Words, kContiguous, 1>(depth, a + r * a_step, a_stride, b + lane, b_stride,
                                              c + r * c_stride + lane, c_stride, add, block);
      }
    }
  }
}

// The lanes of a and b in turn; of their upper halves, if `upper`.
inline Vec interleave(Vec a, Vec b, bool upper) {
#if defined(__clang__)
  Vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = (i % 2 == 0 ? a : b)[i / 2 + upper * kLanes / 2];
  return result;
#else
  IntVec index;
  for (int i = 0; i < kLanes; ++i) index[i] = i / 2 + upper * kLanes / 2 + i % 2 * kLanes;
  return __builtin_shuffle(a, b, index);
#endif
}

// to[c, r] = from[r, c], for rows and columns rounded up to whole vectors.
[[maybe_unused]] void transpose(int rows, int columns, const float* from, int64_t from_stride,
                                float* to, int64_t to_stride) {
  for (int r = 0; r < rows; r += kLanes) {
    for (int c = 0; c < columns; c += kLanes) {
      Vec block[kLanes], next[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = at(from + (r + i) * from_stride + c);
      // Each pass moves one bit of a row's number into its columns' numbers.
      for (int width = 1; width < kLanes; width *= 2) {
        for (int i = 0; i < kLanes / 2; ++i) {
          next[2 * i] = interleave(block[i], block[i + kLanes / 2], false);
          next[2 * i + 1] = interleave(block[i], block[i + kLanes / 2], true);
        }
        for (int i = 0; i < kLanes; ++i) block[i] = next[i];
      }
      for (int i = 0; i < kLanes; ++i) at(to + (c + i) * to_stride + r) = block[i];
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

// words[rows, head_stride], depth along head_dim. `tokens[i]` points at token i's elements.
template <typename Element, typename Words, typename Tokens>
void pack_rows(const Tokens& tokens, int rows, int head_dim, float* words) {
  for (int row = 0; row < rows; ++row) {
    Words::template pack_row<Element>(words + row * head_stride(head_dim), tokens[row], head_dim);
  }
}

// words[rows / kPerWord, head_stride], depth along the tokens; lanes behind head_dim are 0.
template <typename Element, typename Words, typename Tokens>
void pack_tokens(const Tokens& tokens, int rows, int head_dim, float* words) {
  constexpr int kPerWord = Words::kPerWord;
  for (int row = 0; row < rows; row += kPerWord, words += head_stride(head_dim)) {
    const typename Element::Stored* neighbours[kPerWord];
    for (int i = 0; i < kPerWord; ++i) neighbours[i] = tokens[row + i];
    Words::template pack_tokens<Element>(words, neighbours, head_dim);
    for (int d = head_dim; d < round_up(head_dim, kLanes); ++d) words[d] = 0;
  }
}

// words[padded_head / kPerWord, kLaneStride], depth along head_dim, a token per lane; rows: rounded
// up to whole vectors. `packed` is overwritten.
template <typename Element, typename Words, typename Tokens>
void pack_transposed(const Tokens& tokens, int rows, int head_dim, float* packed, float* words) {
  pack_rows<Element, Words>(tokens, rows, head_dim, packed);
  transpose(rows, head_dim / Words::kPerWord, packed, head_stride(head_dim), words, kLaneStride);
}

// From dot products to scores.
struct ScoreScale {
  float inner;
  float outer;  // under a softcap

  ScoreScale(float scale, float softcap)
      : inner(softcap == 0 ? scale : scale / softcap), outer(softcap) {}
};

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

}  // namespace
}  // namespace mem1::cpu
