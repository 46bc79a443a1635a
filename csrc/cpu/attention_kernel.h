// The code of every attention_<level>.cpp, which sets MEM1_ATTENTION to its table's name.
// Everything here has internal linkage, since each level compiles it anew.
//
// Scores are kept transposed, [keys, query lanes]: a query is a lane of a vector, so the softmax
// needs no sums across lanes, a key's visible queries [k, expiry[k]) are a run of lanes, and every
// matrix product has the shape  c[rows, lanes] += a[rows, depth] * b[depth, lanes]  with one
// element of `a` for all lanes at a time.
#include "cpu/attention_walk.h"

namespace mem1::cpu {
namespace {

constexpr int kTileVecs = kTile / kLanes;

// Keys of a partial tile that share one range of lanes.
constexpr int kStripKeys = 16;
constexpr int kMaxStrips = kTile / kStripKeys;

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

// Scores of one key as kVecs vectors of queries; `slope` gets d score / d dot, up to its scale.
template <bool kMasked, bool kSoftcap>
inline Vec masked_score(const ScoreScale& scale, const Mask& mask, int k, int lane, Vec dot,
                        Vec* slope) {
  Vec score = dot * scale.inner;
  if constexpr (kSoftcap) {
    score = tanh(score);
    *slope = 1.f - score * score;
    score *= scale.outer;
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
// queries become weights exp(score - base), as words of a product over the keys; what these
// queries gathered so far is rescaled to the new base. `row_weight` sums the weights as they
// multiply the values, which may be rounded: it normalizes the output, so that the weight of a key
// that outweighs the others is exactly 1. `row_sum` makes the LSE.
template <typename Words, bool kMasked, bool kSoftcap, int kVecs>
void online_softmax_update(const ScoreScale& scale, const Mask& mask, const Strip& strip, int lane,
                           int head_dim, float* scores, float* row_base, float* row_sum,
                           float* row_weight, float* out) {
  constexpr bool kStored = kMasked || kSoftcap;  // scores that are dear enough to keep for exp
  for (int v = 0; v < kVecs; ++v, lane += kLanes) {
    const Vec old_base = at(row_base + lane);
    Vec tops[2] = {splat(-INFINITY), splat(-INFINITY)}, unused;
    for (int k = strip.key_begin; k < strip.key_end; k += 2) {
      for (int i = 0; i < 2; ++i) {
        Vec& dot = at(scores + (k + i) * kLaneStride + lane);
        const Vec score = masked_score<kMasked, kSoftcap>(scale, mask, k + i, lane, dot, &unused);
        if (kStored) dot = score;
        tops[i] = max(score, tops[i]);
      }
    }
    const Vec new_base = max(Words::base(max(tops[0], tops[1])), old_base);
    const Vec base = new_base == -INFINITY ? Vec{} : new_base;
    Vec sum{}, weight{};
    for (int k = strip.key_begin; k < strip.key_end; k += 2) {
      Vec p[2];
      for (int i = 0; i < 2; ++i) {
        const Vec score = at(scores + (k + i) * kLaneStride + lane);
        p[i] = exp((kStored ? score : score * scale.inner) - base);
        if (kMasked) p[i] = score == -INFINITY ? Vec{} : p[i];
      }
      sum += p[0] + p[1];
      weight += Words::store_rows(scores, k, lane, p[0], p[1]);
    }
    const Vec rescale = exp(old_base - base);
    at(row_base + lane) = new_base;
    at(row_sum + lane) = at(row_sum + lane) * rescale + sum;
    at(row_weight + lane) = at(row_weight + lane) * rescale + weight;
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
        float* const score_row = scores + (k + i) * kLaneStride;
        float* const grad_row = grad_scores + (k + i) * kLaneStride;
        Vec slope;
        const Vec score =
            masked_score<kMasked, kSoftcap>(scale, mask, k + i, lane, at(score_row + lane), &slope);
        Vec p = exp(score - log_sum);
        if (kMasked) p = score == -INFINITY ? Vec{} : p;
        grad[i] = p * (at(grad_row + lane) - offset);
        if (kSoftcap) grad[i] *= slope;
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

template <typename Element, typename Words>
void forward(const ForwardTile& tile, float* scratch) {
  const Problem& problem = tile.problem;
  const TileList& list = tile.list;
  const int head_dim = problem.head_dim;
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

  const int64_t first_query = tile.first_query;
  const TokenRows<Element> query_rows(tile.query, first_query, problem.tokens, nullptr);
  pack_transposed<Element, Words>(query_rows, kTile, head_dim, key, query);
  memset(out, 0, sizeof(float) * head_dim * kLaneStride);
  memset(row_sum, 0, sizeof(float) * kTile);
  memset(row_weight, 0, sizeof(float) * kTile);
  for (int q = 0; q < kTile; ++q) row_base[q] = -INFINITY;

  const ScoreScale scale(problem.scale, problem.softcap);
  Mask mask(list, first_query, problem.tokens);
  for (int entry = 0; entry < list.count; ++entry) {
    const bool partial = entry < list.partial;
    mask.move_to(list, list.tiles[entry], problem.tokens);
    Strip strips[kMaxStrips];
    const int strip_count = cut_strips(mask, partial, strips);
    const bool* keep = partial ? mask.alive : nullptr;
    pack_rows<Element, Words>(TokenRows<Element>(tile.key, mask.first_key, problem.tokens, keep),
                              kTile, head_dim, key);
    pack_tokens<Element, Words>(
        TokenRows<Element>(tile.value, mask.first_key, problem.tokens, keep), kTile, head_dim,
        value);
    for (int i = 0; i < strip_count; ++i) {
      const Strip& strip = strips[i];
      const int64_t key_word = strip.key_begin / kPerWord;
      for_lanes(strip, problem.softcap != 0, [&](auto masked, auto softcap, auto vecs, int lane) {
        multiply<Words, Contiguous::kDepth>(
            strip.keys(), vecs.value, head_dim / kPerWord, key + strip.key_begin * row_stride,
            row_stride, query + lane, kLaneStride, scores + strip.key_begin * kLaneStride + lane,
            kLaneStride, false);
        online_softmax_update<Words, masked.value, softcap.value, vecs.value>(
            scale, mask, strip, lane, head_dim, scores, row_base, row_sum, row_weight, out);
        multiply<Words, Contiguous::kRows>(head_dim, vecs.value, strip.keys() / kPerWord,
                                           value + key_word * row_stride, row_stride,
                                           scores + key_word * kLaneStride + lane, kLaneStride,
                                           out + lane, kLaneStride, true);
      });
    }
  }

  for (int lane = 0; lane < kTile; lane += kLanes) {
    const Vec weight = at(row_weight + lane);
    const Vec normalizer = weight == 0.f ? Vec{} : 1.f / weight;
    for (int d = 0; d < head_dim; ++d) at(out + d * kLaneStride + lane) *= normalizer;
  }
  transpose(head_dim, kTile, out, kLaneStride, key, row_stride);
  store_tokens<Element>(key, row_stride, mask.queries, head_dim, 1.f, tile.out, first_query);
  for (int q = 0; q < mask.queries; ++q) {
    tile.lse[first_query + q] = row_sum[q] == 0 ? -INFINITY : row_base[q] + logf(row_sum[q]);
  }
}

// Words to a block of the sums whose difference matters where a query sees few keys: dO.v in
// partial tiles, and delta.
constexpr int kFineBlockWords = 8;

// Per query, delta = rowsum(dO * out) - dLSE, from transposed operands, in the order of dO.v in
// partial tiles, so that the two cancel for a query that sees one key.
void sum_rows(const float* grad_out, const float* out, int head_dim, const float* grad_lse,
              float* delta) {
  for (int lane = 0; lane < kTile; lane += kLanes) {
    Vec total{};
    for (int from = 0; from < head_dim; from += kFineBlockWords) {
      Vec sum{};
      for (int d = from; d < from + kFineBlockWords; ++d) {
        sum += at(out + d * kLaneStride + lane) * at(grad_out + d * kLaneStride + lane);
      }
      total += sum;
    }
    at(delta + lane) = total - at(grad_lse + lane);
  }
}

template <typename Element, typename Words>
void backward(const BackwardTile& tile, float* scratch) {
  const Problem& problem = tile.problem;
  const TileList& list = tile.list;
  const int head_dim = problem.head_dim;
  const int head_vecs = round_up(head_dim, kLanes) / kLanes;
  const int64_t row_stride = head_stride(head_dim);
  constexpr int kPerWord = Words::kPerWord;

  Scratch memory{scratch};
  float* const query_t = memory.lanes(padded_head(head_dim));
  float* const grad_out_t = memory.lanes(padded_head(head_dim));
  float* const grad_query = memory.lanes(padded_head(head_dim));
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
  for (int q = 0; q < kTile; ++q) {
    const int64_t token = first_query + q;
    seeing[q] = token < problem.tokens && tile.lse[token] != -INFINITY;
    lse[q] = seeing[q] ? tile.lse[token] : INFINITY;  // so that P is 0
    delta[q] = seeing[q] && tile.grad_lse != nullptr ? tile.grad_lse[token] : 0;
  }
  const TokenRows<Element> query_rows(tile.query, first_query, problem.tokens, seeing);
  const TokenRows<Element> out_rows(tile.out, first_query, problem.tokens, seeing);
  const TokenRows<Element> grad_out_rows(tile.grad_out, first_query, problem.tokens, seeing);
  pack_transposed<Element, Fp32Words>(out_rows, kTile, head_dim, key, grad_query);
  pack_transposed<Element, Fp32Words>(grad_out_rows, kTile, head_dim, key, grad_out_t);
  sum_rows(grad_out_t, grad_query, head_dim, delta, delta);
  if (kPerWord != 1)
    pack_transposed<Element, Words>(grad_out_rows, kTile, head_dim, key, grad_out_t);
  pack_transposed<Element, Words>(query_rows, kTile, head_dim, key, query_t);
  pack_tokens<Element, Words>(query_rows, kTile, head_dim, query);
  pack_tokens<Element, Words>(grad_out_rows, kTile, head_dim, grad_out);
  memset(grad_query, 0, sizeof(float) * head_dim * kLaneStride);

  const ScoreScale scale(problem.scale, problem.softcap);
  Mask mask(list, first_query, problem.tokens);
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
    pack_rows<Element, Words>(key_rows, kTile, head_dim, key);
    pack_rows<Element, Words>(value_rows, kTile, head_dim, value);
    if (key_tokens != key) pack_tokens<Element, Words>(key_rows, kTile, head_dim, key_tokens);

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
            grad_out_t + lane, kLaneStride, grad_scores + score_row + lane, kLaneStride, false,
            partial ? kFineBlockWords : kBlockWords);
        differentiate_softmax<Words, masked.value, softcap.value, vecs.value>(
            scale, mask, strip, lane, lse, delta, scores, grad_scores, grad_rows);
        multiply<Words, Contiguous::kRows>(head_dim, vecs.value, strip.keys() / kPerWord,
                                           key_tokens + key_word * row_stride, row_stride,
                                           grad_rows + key_word * kLaneStride + lane, kLaneStride,
                                           grad_query + lane, kLaneStride, true);
      });
    }

    const Turn turn(tile.turns, key_tile, entry);
    turn.wait();
    float* const grad_key = tile.sums + key_tile * 2 * kTile * row_stride;
    float* const grad_value = grad_key + kTile * row_stride;
    if (turn.is_first()) {
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
    if (turn.is_last()) {
      const int keys = tile_rows(mask.first_key, problem.tokens);
      store_tokens<Element>(grad_key, row_stride, keys, head_dim, problem.scale, tile.grad_key,
                            mask.first_key);
      store_tokens<Element>(grad_value, row_stride, keys, head_dim, 1.f, tile.grad_value,
                            mask.first_key);
    }
    turn.pass_on();
  }

  transpose(head_dim, kTile, grad_query, kLaneStride, key, row_stride);
  store_tokens<Element>(key, row_stride, mask.queries, head_dim, problem.scale, tile.grad_query,
                        first_query);
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

const AttentionKernels MEM1_ATTENTION{forward_tile, backward_tile, nullptr, nullptr};

}  // namespace mem1::cpu
