// append_kv_ and cached_attention on the CPU. Attention is cut into units of query rows of one kv
// head over a split of its slots, by the shapes and lengths alone, so that results do not depend on
// the number of threads.
#include "cpu/cached_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/cached_prefill.h"
#include "cpu/element_type.h"
#include "cpu/run_in_order.h"
#include "cpu/simd.h"
#include "ops.h"
#include "overlap.h"

namespace mem1 {
namespace {

using cpu::kFewRows;
using cpu::kTile;

constexpr const char* kCacheLayout = "[batch, kv_heads, capacity, head_dim]";
constexpr int64_t kSplitSlots = 512;
// Query tiles of a row and kv head up to which its slots are split; more are units enough.
constexpr int64_t kMostSplitTiles = 2;
constexpr int64_t kAppendGrainBytes = 32 * 1024;

struct CacheShape {
  int64_t batch, kv_heads, capacity, head_dim;
};

CacheShape check_caches(const at::Tensor& key_cache, const at::Tensor& value_cache) {
  check_dim(key_cache, "key_cache", 4, kCacheLayout);
  check_shape(value_cache, "value_cache", key_cache.sizes(), kCacheLayout);
  check_dtype(value_cache, "value_cache", key_cache.scalar_type());
  check_last_dim_contiguous(key_cache, "key_cache");
  check_last_dim_contiguous(value_cache, "value_cache");
  return {key_cache.size(0), key_cache.size(1), key_cache.size(2), key_cache.size(3)};
}

std::vector<int64_t> read_rows(const at::Tensor& tensor, const char* name, int64_t batch) {
  check_dtype(tensor, name, at::kInt);
  check_shape(tensor, name, {batch}, "[batch]");
  std::vector<int64_t> rows(batch);
  const int32_t* data = tensor.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < batch; ++b) rows[b] = data[b * tensor.stride(0)];
  return rows;
}

void check_range(const std::vector<int64_t>& rows, const char* name, int64_t row, int64_t least,
                 int64_t most, const char* meaning) {
  TORCH_CHECK_VALUE(rows[row] >= least && rows[row] <= most, name, ": expected ", least, " to ",
                    most, " (", meaning, ") in row ", row, ", got ", rows[row]);
}

// The kernels compare positions as int32, relative to the least one that a new token sees.
template <typename Position>
void check_spread(const at::Tensor& position_ids, int64_t row, int64_t begin, int64_t end,
                  int64_t window) {
  const Position* data = position_ids.const_data_ptr<Position>() + row * position_ids.stride(0);
  int64_t least = std::numeric_limits<int64_t>::max();
  int64_t most = std::numeric_limits<int64_t>::min();
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t position = data[slot * position_ids.stride(1)];
    int64_t first;
    if (__builtin_sub_overflow(position, window - 1, &first)) {
      first = std::numeric_limits<int64_t>::min();
    }
    least = std::min(least, first);
    most = std::max(most, first);
  }
  constexpr uint64_t kMost = std::numeric_limits<int32_t>::max() - 1;
  TORCH_CHECK_VALUE(begin >= end || static_cast<uint64_t>(most) - least < kMost,
                    "position_ids: expected the new tokens of a row less than 2^31 apart, got ",
                    most - static_cast<uint64_t>(least), " in row ", row);
}

const cpu::CachedAttentionKernels& kernels(cpu::ElementType type) {
  switch (cpu::simd_level()) {
#ifdef MEM1_SIMD_AMX
    case cpu::SimdLevel::kAmx:
      if (type == cpu::ElementType::kBFloat16) return cpu::cached_attention_amx;
      return cpu::cached_attention_avx512;
#endif
#ifdef MEM1_SIMD_AVX512BF16
    case cpu::SimdLevel::kAvx512Bf16:
      if (type == cpu::ElementType::kBFloat16) return cpu::cached_attention_avx512bf16;
      [[fallthrough]];
#endif
#ifdef MEM1_SIMD_AVX512
    case cpu::SimdLevel::kAvx512:
      return cpu::cached_attention_avx512;
#endif
#ifdef MEM1_SIMD_AVX2
    case cpu::SimdLevel::kAvx2:
      return cpu::cached_attention_avx2;
#endif
    default:
      return cpu::cached_attention_default;
  }
}

const char* data_at(const at::Tensor& tensor, int64_t elements) {
  return static_cast<const char*>(tensor.const_data_ptr()) + elements * tensor.element_size();
}

cpu::Rows slots_of(const at::Tensor& cache, int64_t batch, int64_t head) {
  const int64_t offset = batch * cache.stride(0) + head * cache.stride(1);
  return {const_cast<char*>(data_at(cache, offset)), cache.stride(2)};
}

// Query rows of one kv head of one batch row, and where the partial results of their splits lie.
struct Group {
  int64_t batch, head;
  int64_t first_row;
  int rows;
  int64_t slot_end;
  int splits;
  int64_t first_partial;  // rows of the workspace before this group's
};

struct Unit {
  int64_t group;
  int split;
};

}  // namespace

void append_kv_cpu(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& key_cache,
                   const at::Tensor& value_cache, const at::Tensor& lengths,
                   const std::optional<at::Tensor>& counts) {
  const CacheShape shape = check_caches(key_cache, value_cache);
  check_dim(keys, "keys", 4, "[batch, kv_heads, new_tokens, head_dim]");
  const int64_t new_tokens = keys.size(2);
  const std::pair<const char*, const at::Tensor&> sources[] = {{"keys", keys}, {"values", values}};
  for (const auto& [name, tensor] : sources) {
    check_shape(tensor, name, {shape.batch, shape.kv_heads, new_tokens, shape.head_dim},
                "[batch, kv_heads, new_tokens, head_dim]");
    check_dtype(tensor, name, key_cache.scalar_type());
    check_last_dim_contiguous(tensor, name);
  }
  MemoryCheck memory;
  memory.write(key_cache);
  memory.write(value_cache);
  memory.read(keys);
  memory.read(values);
  memory.finish();
  const std::vector<int64_t> held = read_rows(lengths, "lengths", shape.batch);
  const std::vector<int64_t> taken = counts ? read_rows(*counts, "counts", shape.batch)
                                            : std::vector<int64_t>(shape.batch, new_tokens);
  for (int64_t b = 0; b < shape.batch; ++b) {
    check_range(taken, "counts", b, 0, new_tokens, "the new tokens");
    check_range(held, "lengths", b, 0, shape.capacity - taken[b],
                "what the capacity leaves room for");
  }

  if (new_tokens == 0 || shape.head_dim == 0) return;
  const int64_t row_bytes = shape.head_dim * key_cache.element_size();
  const auto copy = [&](const at::Tensor& from, const at::Tensor& to, int64_t b, int64_t h) {
    const char* source = data_at(from, b * from.stride(0) + h * from.stride(1));
    char* target = const_cast<char*>(
        data_at(to, b * to.stride(0) + h * to.stride(1) + held[b] * to.stride(2)));
    const int64_t source_step = from.stride(2) * from.element_size();
    const int64_t target_step = to.stride(2) * to.element_size();
    if (source_step == row_bytes && target_step == row_bytes) {
      std::memcpy(target, source, taken[b] * row_bytes);
      return;
    }
    for (int64_t t = 0; t < taken[b]; ++t) {
      std::memcpy(target + t * target_step, source + t * source_step, row_bytes);
    }
  };
  const int64_t unit_bytes = std::max<int64_t>(1, 2 * new_tokens * row_bytes);
  const int64_t grain = std::max<int64_t>(1, kAppendGrainBytes / unit_bytes);
  at::parallel_for(0, shape.batch * shape.kv_heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      copy(keys, key_cache, i / shape.kv_heads, i % shape.kv_heads);
      copy(values, value_cache, i / shape.kv_heads, i % shape.kv_heads);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> cached_attention_cpu(
    const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
    const at::Tensor& lengths, const std::optional<at::Tensor>& counts,
    const std::optional<at::Tensor>& position_ids, int64_t window, double scale, double softcap) {
  const CacheShape shape = check_caches(key_cache, value_cache);
  check_activation_dtype(query, "query");
  check_dtype(key_cache, "key_cache", query.scalar_type());
  check_dim(query, "query", 4, "[batch, new_tokens, heads, head_dim]");
  check_last_dim_contiguous(query, "query");
  const int64_t new_tokens = query.size(1), heads = query.size(2);
  check_shape(query, "query", {shape.batch, new_tokens, heads, shape.head_dim},
              "[batch, new_tokens, heads, head_dim]");
  TORCH_CHECK_VALUE(shape.kv_heads >= 1 && heads >= 1 && heads % shape.kv_heads == 0,
                    "query: expected heads divisible by ", shape.kv_heads, " kv_heads, got ",
                    heads);
  TORCH_CHECK_VALUE(shape.head_dim % 8 == 0 && shape.head_dim >= 16 && shape.head_dim <= 256,
                    "query: expected head_dim 16 to 256 in steps of 8, got ", shape.head_dim);
  TORCH_CHECK_VALUE(shape.capacity < std::numeric_limits<int32_t>::max() - kTile,
                    "key_cache: expected a capacity below 2^31 - 129, got ", shape.capacity);
  if (position_ids) {
    const at::ScalarType dtype = position_ids->scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong,
                     "position_ids: expected dtype Int or Long, got ", dtype);
    check_shape(*position_ids, "position_ids", {shape.batch, shape.capacity}, "[batch, capacity]");
    TORCH_CHECK_VALUE(window >= 1, "window: expected at least 1 token, got ", window);
  }
  const std::vector<int64_t> held = read_rows(lengths, "lengths", shape.batch);
  std::vector<int64_t> taken(shape.batch);
  if (counts) taken = read_rows(*counts, "counts", shape.batch);
  for (int64_t b = 0; b < shape.batch; ++b) {
    check_range(held, "lengths", b, 0, shape.capacity, "the capacity");
    if (!counts) taken[b] = held[b] == 0 ? 0 : new_tokens;
    check_range(taken, "counts", b, 0, new_tokens, "the new tokens");
    check_range(held, "lengths", b, taken[b], shape.capacity, "the new tokens and the capacity");
    if (!position_ids) continue;
    const int64_t begin = held[b] - taken[b];
    if (position_ids->scalar_type() == at::kLong) {
      check_spread<int64_t>(*position_ids, b, begin, held[b], window);
    } else {
      check_spread<int32_t>(*position_ids, b, begin, held[b], window);
    }
  }

  const at::Tensor out = at::empty(query.sizes(), query.options());
  const at::Tensor lse =
      at::empty({shape.batch, heads, new_tokens}, query.options().dtype(at::kFloat));
  const int64_t element = query.element_size();
  for (int64_t b = 0; b < shape.batch; ++b) {
    if (taken[b] == new_tokens) continue;
    const int64_t token_bytes = heads * shape.head_dim * element;
    std::memset(static_cast<char*>(out.data_ptr()) + (b * new_tokens + taken[b]) * token_bytes, 0,
                (new_tokens - taken[b]) * token_bytes);
    for (int64_t h = 0; h < heads; ++h) {
      float* row = lse.data_ptr<float>() + (b * heads + h) * new_tokens;
      std::fill(row + taken[b], row + new_tokens, -std::numeric_limits<float>::infinity());
    }
  }

  const int64_t group_heads = heads / shape.kv_heads;
  std::vector<Group> groups;
  std::vector<Unit> units;
  int64_t partials = 0;
  std::vector<PrefillRow> many;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t rows = taken[b] * group_heads;
    if (rows > kFewRows && !position_ids && packs_key_tiles(query.scalar_type())) {
      many.push_back({b, held[b], taken[b]});
      continue;
    }
    const int64_t tiles = rows <= kFewRows ? rows > 0 : (rows + kTile - 1) / kTile;
    for (int64_t i = 0; i < tiles * shape.kv_heads; ++i) {
      const int64_t tile = tiles - 1 - i / shape.kv_heads;  // those that see most come first
      const int64_t first_row = tile * kTile, end_row = std::min<int64_t>(first_row + kTile, rows);
      const int64_t slot_end = held[b] - taken[b] + (end_row - 1) / group_heads + 1;
      const int64_t splits =
          tiles <= kMostSplitTiles ? (slot_end + kSplitSlots - 1) / kSplitSlots : 1;
      for (int64_t split = 0; split < splits; ++split) {
        units.push_back({static_cast<int64_t>(groups.size()), static_cast<int>(split)});
      }
      groups.push_back({b, i % shape.kv_heads, first_row, static_cast<int>(end_row - first_row),
                        slot_end, static_cast<int>(splits), partials});
      if (splits > 1) partials += splits * (end_row - first_row);
    }
  }

  if (!many.empty()) prefill(query, key_cache, value_cache, many, scale, softcap, out, lse);
  const cpu::ElementType type = cpu::element_type(query.scalar_type());
  const cpu::CachedAttentionKernels& kernel = kernels(type);
  const int head_dim = static_cast<int>(shape.head_dim);
  const at::Tensor partial_out = at::empty({partials, head_dim}, at::kFloat);
  const at::Tensor partial_lse = at::empty({partials}, at::kFloat);
  const auto combine = [&](const Group& group, float* group_out, const float* group_lse) {
    const int64_t head = group.head * group_heads;
    kernel.combine(
        {type, head_dim, static_cast<int>(group_heads), group.first_row, group.rows, group.splits,
         group_out, group_lse,
         const_cast<char*>(data_at(out, (group.batch * new_tokens * heads + head) * head_dim)),
         heads * head_dim, head_dim,
         lse.data_ptr<float>() + (group.batch * heads + head) * new_tokens, 1, new_tokens});
  };
  const int64_t unit_scratch = cpu::cached_scratch(head_dim);
  const auto attend = [&](int64_t index, float* scratch) {
    const Unit& unit = units[index];
    const Group& group = groups[unit.group];
    float* group_out = scratch + unit_scratch;
    float* group_lse = group_out + static_cast<int64_t>(kTile) * head_dim;
    if (group.splits > 1) {
      const int64_t row = group.first_partial + unit.split * group.rows;
      group_out = partial_out.data_ptr<float>() + row * head_dim;
      group_lse = partial_lse.data_ptr<float>() + row;
    }
    const int64_t b = group.batch;
    cpu::Positions slots_positions{nullptr, 0, false};
    if (position_ids) {
      slots_positions = {data_at(*position_ids, b * position_ids->stride(0)),
                         position_ids->stride(1) * position_ids->element_size(),
                         position_ids->scalar_type() == at::kLong};
    }
    const int64_t begin = group.splits > 1 ? unit.split * kSplitSlots : 0;
    const int64_t end =
        group.splits > 1 ? std::min(begin + kSplitSlots, group.slot_end) : group.slot_end;
    kernel.attend(
        {type, head_dim, static_cast<float>(scale), static_cast<float>(softcap),
         static_cast<int>(group_heads),
         data_at(query, b * query.stride(0) + group.head * group_heads * query.stride(2)),
         query.stride(1), query.stride(2), group.first_row, group.rows, held[b] - taken[b],
         slots_of(key_cache, b, group.head), slots_of(value_cache, b, group.head), begin, end,
         slots_positions, window, group_out, group_lse},
        scratch);
    if (group.splits == 1) combine(group, group_out, group_lse);
  };
  cpu::run_in_order(static_cast<int64_t>(units.size()),
                    unit_scratch + static_cast<int64_t>(kTile) * (head_dim + 1), attend);
  if (partials > 0) {
    at::parallel_for(0, static_cast<int64_t>(groups.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Group& group = groups[i];
        if (group.splits == 1) continue;
        combine(group, partial_out.data_ptr<float>() + group.first_partial * head_dim,
                partial_lse.data_ptr<float>() + group.first_partial);
      }
    });
  }
  return {out, lse};
}

}  // namespace mem1
