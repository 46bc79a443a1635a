// What the AMX kernels share: tile registers, their operands, exponentials. Everything here has
// internal linkage, since each level compiles it anew.
#pragma once

// GCC 12 takes "undefined" vectors inside these intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "cpu/attention.h"
#include "cpu/tile_math.h"

namespace mem1::cpu {
namespace {

// Elements of depth in a row of a tile register, and keys or queries of a product at a time.
constexpr int kBlock = 32;
constexpr int64_t kRegisterBytes = 1024;

// Chunks of head_dim: 32 dimensions each, the last one padded with zeros.
inline int head_chunks(int head_dim) { return static_cast<int>(amx_head(head_dim)) / kBlock; }

// This thread's tile registers become 16 rows of 64 bytes, until _tile_release(). Not a class with
// a destructor: a file of a SIMD level has no exception tables, whose symbols other files share.
inline void take_tile_registers() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  // The intrinsic says that it reads the first eight bytes only.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

// The intrinsics that load tile registers do not say that they read memory.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// x[i][j] becomes x[j][i].
__attribute__((always_inline)) inline void transpose_block(Vec (&x)[16]) {
  Vec next[16];
  // Each pass moves one bit of a row's number into its columns' numbers.
#pragma GCC unroll 4
  for (int pass = 0; pass < 4; ++pass) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = interleave(x[i], x[i + 8], false);
      next[2 * i + 1] = interleave(x[i], x[i + 8], true);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = next[i];
  }
}

// 16 tokens' words of two elements each, from dimension `from` on; behind head_dim they are 0.
template <typename Tokens>
__attribute__((always_inline)) inline void load_words(const Tokens& tokens, int row, int from,
                                                      int head_dim, Vec (&words)[16]) {
  const int count = head_dim - from;
  const __mmask32 there = count < kBlock ? (1u << count) - 1 : ~0u;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    words[i] = (Vec)_mm512_maskz_loadu_epi16(there, tokens[row + i] + from);
  }
}

// 2^x within 2e-6, relative, for x <= 127; anything below -126 gives 2^-126. A NaN stays one.
inline Vec exp2(Vec x) {
  const __m512 table = _mm512_setr_ps(0x1p0f, 0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f,
                                      0x1.306fep0f, 0x1.3dea64p0f, 0x1.4bfdaep0f, 0x1.5ab07ep0f,
                                      0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f,
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

// The sums of P over the keys. What multiplies the values is P rounded to bfloat16, so that is what
// normalizes them too: then the weight of a key that outweighs the others is exactly 1.
struct Sums {
  Vec exact{}, rounded{};

  void add(Vec even, Vec odd, __m512i words) {
    exact += even + odd;
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    rounded = _mm512_dpbf16_ps(rounded, (__m512bh)words, (__m512bh)ones);
  }
  void rescale(Vec factor) {
    exact *= factor;
    rounded *= factor;
  }
  // 0 where no key was seen.
  Vec normalizer() const { return rounded == 0.f ? Vec{} : 1.f / rounded; }
};

// P = 2^(c score - base), and a base up to this far below the maximum serves as well as the
// maximum. Bases are integers: see Bf16Words::base.
constexpr float kBaseSlack = 8;

inline Vec round_up(Vec x) {
  return _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}

}  // namespace
}  // namespace mem1::cpu
