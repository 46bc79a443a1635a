// trajectory_attention on the CPU: checks, the order of the work and its threads. The arithmetic of
// one query tile is in attention_kernel.h, built once per SIMD level.
#include "cpu/attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <vector>

#include "checks.h"
#include "cpu/element_type.h"
#include "cpu/run_in_order.h"
#include "cpu/simd.h"
#include "ops.h"

namespace mem1 {
namespace cpu {

const AttentionKernels& attention_kernels(ElementType type) {
  switch (simd_level()) {
#ifdef MEM1_SIMD_AMX
    case SimdLevel::kAmx:
      if (type == ElementType::kBFloat16) return attention_amx;
      return attention_avx512;
#endif
#ifdef MEM1_SIMD_AVX512BF16
    case SimdLevel::kAvx512Bf16:
      if (type == ElementType::kBFloat16) return attention_avx512bf16;
      [[fallthrough]];
#endif
#ifdef MEM1_SIMD_AVX512
    case SimdLevel::kAvx512:
      return attention_avx512;
#endif
#ifdef MEM1_SIMD_AVX2
    case SimdLevel::kAvx2:
      return attention_avx2;
#endif
    default:
      return attention_default;
  }
}

}  // namespace cpu

namespace {

using cpu::kNoTicket;
using cpu::kTile;

constexpr const char* kActivations = "[batch, tokens, heads, head_dim]";

struct Shape {
  int64_t batch, tokens, heads, kv_heads, head_dim;

  int64_t tiles() const { return (tokens + kTile - 1) / kTile; }
  int64_t group() const { return heads / kv_heads; }
};

Shape check_activations(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  check_dim(query, "query", 4, kActivations);
  check_dim(key, "key", 4, "[batch, tokens, kv_heads, head_dim]");
  check_activation_dtype(query, "query");
  const Shape shape{query.size(0), query.size(1), query.size(2), key.size(2), query.size(3)};
  TORCH_CHECK_VALUE(shape.tokens >= 1 && shape.tokens < INT32_MAX - kTile,
                    "query: expected 1 to 2^31 - 130 tokens, got ", shape.tokens);
  TORCH_CHECK_VALUE(shape.kv_heads >= 1 && shape.heads % shape.kv_heads == 0,
                    "query: expected heads divisible by ", shape.kv_heads, " kv_heads, got ",
                    shape.heads);
  TORCH_CHECK_VALUE(shape.head_dim % 8 == 0 && shape.head_dim >= 16 && shape.head_dim <= 256,
                    "query: expected head_dim 16 to 256 in steps of 8, got ", shape.head_dim);
  check_last_dim_contiguous(query, "query");
  const std::pair<const char*, const at::Tensor&> keys[] = {{"key", key}, {"value", value}};
  for (const auto& [name, tensor] : keys) {
    check_shape(tensor, name, {shape.batch, shape.tokens, shape.kv_heads, shape.head_dim},
                "[batch, tokens, kv_heads, head_dim]");
    check_dtype(tensor, name, query.scalar_type());
    check_device(tensor, name, query, "query");
    check_last_dim_contiguous(tensor, name);
  }
  return shape;
}

// The rows of a BlockPlan, checked so far that no list leads out of bounds or to a tile twice.
struct Plan {
  int64_t layouts;  // 1, or one for each batch row
  int64_t tokens, tiles, capacity;
  const int32_t *expiry, *floor, *order, *offsets, *partial, *lists;

  cpu::TileList list(int64_t layout, int64_t tile) const {
    const int32_t* offset = offsets + layout * (tiles + 1) + tile;
    return {expiry + layout * tokens, floor == nullptr ? nullptr : floor + layout * tokens,
            lists + layout * capacity + offset[0], partial[layout * tiles + tile],
            offset[1] - offset[0]};
  }
};

const int32_t* check_int32(const at::Tensor& tensor, const char* name, at::IntArrayRef shape,
                           const char* layout, const at::Tensor& query) {
  check_dtype(tensor, name, at::kInt);
  check_shape(tensor, name, shape, layout);
  check_device(tensor, name, query, "query");
  check_contiguous(tensor, name);
  return tensor.const_data_ptr<int32_t>();
}

// `from` .. `to` of `tiles` ascend within [0, query_tile].
void check_ascending(const int32_t* tiles, int64_t from, int64_t to, int64_t query_tile) {
  for (int64_t i = from; i < to; ++i) {
    const int32_t least = i > from ? tiles[i - 1] + 1 : 0;
    TORCH_CHECK_VALUE(tiles[i] >= least && tiles[i] <= query_tile,
                      "row_tiles: expected ascending key tiles in 0 to ", query_tile,
                      " for query tile ", query_tile, ", got ", tiles[i], " at ", i);
  }
}

void check_lists(const Plan& plan, int64_t layout) {
  const int64_t n = plan.tiles;
  const int32_t* order = plan.order + layout * n;
  const int32_t* offsets = plan.offsets + layout * (n + 1);
  const int32_t* partial = plan.partial + layout * n;
  const int32_t* tiles = plan.lists + layout * plan.capacity;
  std::vector<bool> ordered(n, false), full(n, false);
  TORCH_CHECK_VALUE(offsets[0] == 0, "row_offsets: expected 0 first, got ", offsets[0]);
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK_VALUE(order[i] >= 0 && order[i] < n && !ordered[order[i]],
                      "row_order: expected a permutation of 0 to ", n - 1, ", got ", order[i],
                      " at ", i);
    ordered[order[i]] = true;
    const int64_t begin = offsets[i], end = offsets[i + 1];
    TORCH_CHECK_VALUE(begin <= end && end <= plan.capacity, "row_offsets: expected ", begin, " to ",
                      plan.capacity, " at ", i + 1, ", got ", end);
    TORCH_CHECK_VALUE(partial[i] >= 0 && partial[i] <= end - begin, "row_partial: expected 0 to ",
                      end - begin, " at ", i, ", got ", partial[i]);
    const int64_t first_full = begin + partial[i];
    check_ascending(tiles, begin, first_full, i);
    check_ascending(tiles, first_full, end, i);
    for (int64_t e = first_full; e < end; ++e) full[tiles[e]] = true;
    for (int64_t e = begin; e < first_full; ++e) {
      TORCH_CHECK_VALUE(!full[tiles[e]], "row_tiles: expected a key tile once for query tile ", i,
                        ", got ", tiles[e], " twice");
    }
    for (int64_t e = first_full; e < end; ++e) full[tiles[e]] = false;
  }
}

Plan check_plan(const Shape& shape, const at::Tensor& query, const at::Tensor& expiry,
                const std::optional<at::Tensor>& floor, at::TensorList rows) {
  check_dim(expiry, "expiry", 2, "[1 or batch, tokens]");
  const int64_t layouts = expiry.size(0) == 1 ? 1 : shape.batch, n = shape.tiles();
  const int64_t capacity = n * (n + 1) / 2;
  TORCH_CHECK_VALUE(rows.size() == 4,
                    "rows: expected row_order, row_offsets, row_partial, row_tiles, got ",
                    rows.size(), " tensors");
  const auto check = [&](const at::Tensor& tensor, const char* name, int64_t length,
                         const char* layout) {
    return check_int32(tensor, name, {layouts, length}, layout, query);
  };
  Plan plan{layouts,
            shape.tokens,
            n,
            capacity,
            check(expiry, "expiry", shape.tokens, "[1 or batch, tokens]"),
            floor ? check(*floor, "floor", shape.tokens, "[1 or batch, tokens]") : nullptr,
            check(rows[0], "row_order", n, "[1 or batch, tiles]"),
            check(rows[1], "row_offsets", n + 1, "[1 or batch, tiles + 1]"),
            check(rows[2], "row_partial", n, "[1 or batch, tiles]"),
            check(rows[3], "row_tiles", capacity, "[1 or batch, tiles (tiles + 1) / 2]")};
  for (int64_t layout = 0; layout < layouts; ++layout) check_lists(plan, layout);
  return plan;
}

cpu::Problem make_problem(const Shape& shape, const at::Tensor& query, double scale,
                          double softcap) {
  TORCH_CHECK_VALUE(std::isfinite(scale), "scale: expected a finite number, got ", scale);
  TORCH_CHECK_VALUE(std::isfinite(softcap) && softcap >= 0,
                    "softcap: expected a number >= 0 (0: none), got ", softcap);
  return {cpu::element_type(query.scalar_type()), shape.tokens, static_cast<int>(shape.head_dim),
          static_cast<float>(scale), static_cast<float>(softcap)};
}

// One head of one batch row of [batch, tokens, heads, head_dim].
cpu::Rows rows_of(const at::Tensor& tensor, int64_t batch, int64_t head) {
  const int64_t offset = batch * tensor.stride(0) + head * tensor.stride(2);
  return {static_cast<char*>(tensor.data_ptr()) + offset * tensor.element_size(), tensor.stride(1)};
}

// The key tiles of every kv head, packed for all query tiles and heads that meet them: a buffer of
// the size of key and value together (forward; head_dim rounded up to 32) or half as much again.
class PackedKeys {
 public:
  PackedKeys(const cpu::AttentionKernels& kernel, const Shape& shape, const Plan& plan,
             const cpu::Problem& problem, const at::Tensor& key, const at::Tensor& value,
             bool backward) {
    if (kernel.pack == nullptr) return;
    tile_bytes_ = kernel.packed_bytes(problem.head_dim, backward);
    tiles_ = plan.tiles;
    const int64_t units = shape.batch * shape.kv_heads * tiles_;
    buffer_ = at::empty({units * tile_bytes_}, at::kByte);
    at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / tiles_ / shape.kv_heads, head = i / tiles_ % shape.kv_heads;
        const int64_t layout = plan.layouts == 1 ? 0 : batch;
        kernel.pack({problem, plan.expiry + layout * plan.tokens, i % tiles_,
                     rows_of(key, batch, head), rows_of(value, batch, head), backward,
                     static_cast<char*>(buffer_.data_ptr()) + i * tile_bytes_});
      }
    });
  }

  // Of one kv head, counted through the batch; null at a level that packs none.
  const char* head(int64_t index) const {
    if (tile_bytes_ == 0) return nullptr;
    return static_cast<const char*>(buffer_.const_data_ptr()) + index * tiles_ * tile_bytes_;
  }

 private:
  at::Tensor buffer_;
  int64_t tile_bytes_ = 0, tiles_ = 0;
};

// The order in which query tiles add to each key tile of one layout: descending, as they are
// claimed, so that under a causal mask the light ones come last.
struct Order {
  std::vector<int64_t> following;  // [listed] the next query tile in the entry's column, or -1
  std::vector<int64_t> first;      // [tiles] the first one of each column, or -1

  Order(const Plan& plan, int64_t layout)
      : following(plan.offsets[layout * (plan.tiles + 1) + plan.tiles]), first(plan.tiles, -1) {
    int64_t entry = 0;
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
      const cpu::TileList list = plan.list(layout, tile);
      for (int i = 0; i < list.count; ++i, ++entry) {
        following[entry] = first[list.tiles[i]];
        first[list.tiles[i]] = tile;
      }
    }
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> trajectory_attention_fwd_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& expiry, const std::optional<at::Tensor>& floor, at::TensorList rows,
    double scale, double softcap) {
  const Shape shape = check_activations(query, key, value);
  const Plan plan = check_plan(shape, query, expiry, floor, rows);
  const cpu::Problem problem = make_problem(shape, query, scale, softcap);
  const cpu::AttentionKernels& kernel = cpu::attention_kernels(problem.type);

  const at::Tensor out = at::empty(query.sizes(), query.options());
  const at::Tensor lse =
      at::empty({shape.batch, shape.heads, shape.tokens}, query.options().dtype(at::kFloat));
  const PackedKeys packed(kernel, shape, plan, problem, key, value, false);
  const int64_t all_heads = shape.batch * shape.heads;
  const auto unit = [&](int64_t index, float* scratch) {
    const int64_t batch = index % all_heads / shape.heads, head = index % shape.heads;
    const int64_t kv_head = head / shape.group();
    const int64_t layout = plan.layouts == 1 ? 0 : batch;
    const int64_t tile = plan.order[layout * plan.tiles + index / all_heads];
    kernel.forward(
        {problem, plan.list(layout, tile), tile * cpu::kTile, rows_of(query, batch, head),
         rows_of(key, batch, kv_head), rows_of(value, batch, kv_head), rows_of(out, batch, head),
         lse.data_ptr<float>() + (batch * shape.heads + head) * shape.tokens,
         packed.head(batch * shape.kv_heads + kv_head)},
        scratch);
  };
  cpu::run_in_order(plan.tiles * all_heads, cpu::forward_scratch(problem.head_dim), unit);
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> trajectory_attention_bwd_cpu(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& expiry, const std::optional<at::Tensor>& floor, at::TensorList rows,
    at::TensorList columns, double scale, double softcap) {
  const Shape shape = check_activations(query, key, value);
  const std::pair<const char*, const at::Tensor&> outputs[] = {{"grad_out", grad_out},
                                                               {"out", out}};
  for (const auto& [name, tensor] : outputs) {
    check_shape(tensor, name, query.sizes(), kActivations);
    check_dtype(tensor, name, query.scalar_type());
    check_device(tensor, name, query, "query");
    check_last_dim_contiguous(tensor, name);
  }
  const auto check_lse = [&](const at::Tensor& tensor, const char* name) {
    check_shape(tensor, name, {shape.batch, shape.heads, shape.tokens}, "[batch, heads, tokens]");
    check_dtype(tensor, name, at::kFloat);
    check_device(tensor, name, query, "query");
  };
  check_lse(lse, "lse");
  if (grad_lse) check_lse(*grad_lse, "grad_lse");
  const Plan plan = check_plan(shape, query, expiry, floor, rows);
  const cpu::Problem problem = make_problem(shape, query, scale, softcap);
  const cpu::AttentionKernels& kernel = cpu::attention_kernels(problem.type);
  const at::Tensor lse_rows = lse.contiguous();
  const at::Tensor grad_lse_rows = grad_lse ? grad_lse->contiguous() : at::Tensor();

  const at::Tensor grad_query = at::empty(query.sizes(), query.options());
  // Key tiles that no query tile meets are not written.
  const at::Tensor grad_key = at::zeros(key.sizes(), key.options());
  const at::Tensor grad_value = at::zeros(value.sizes(), value.options());

  const int64_t n = plan.tiles, group = shape.group(), columns_heads = shape.batch * shape.kv_heads;
  std::vector<Order> orders;
  for (int64_t layout = 0; layout < plan.layouts; ++layout) orders.emplace_back(plan, layout);
  std::vector<int64_t> turns;
  for (int64_t row = 0; row < columns_heads; ++row) {
    const Order& order = orders[plan.layouts == 1 ? 0 : row / shape.kv_heads];
    for (int64_t tile : order.first) turns.push_back(cpu::first_ticket(tile, group));
  }
  const int64_t sums_floats = n * cpu::sums_floats(problem.head_dim);
  const PackedKeys packed(kernel, shape, plan, problem, key, value, true);
  const at::Tensor sums = at::empty({columns_heads, sums_floats}, at::kFloat);

  const auto unit = [&](int64_t index, float* scratch) {
    const int64_t column = index % columns_heads;
    const int64_t batch = column / shape.kv_heads, kv_head = column % shape.kv_heads;
    const int64_t member = index / columns_heads % group;
    const int64_t tile = n - 1 - index / (columns_heads * group);
    const int64_t head = kv_head * group + member;
    const int64_t layout = plan.layouts == 1 ? 0 : batch;
    const int64_t lse_offset = (batch * shape.heads + head) * shape.tokens;
    const Order& order = orders[layout];
    const cpu::TileList list = plan.list(layout, tile);
    kernel.backward({problem,
                     list,
                     tile,
                     rows_of(query, batch, head),
                     rows_of(key, batch, kv_head),
                     rows_of(value, batch, kv_head),
                     rows_of(out, batch, head),
                     rows_of(grad_out, batch, head),
                     lse_rows.data_ptr<float>() + lse_offset,
                     grad_lse ? grad_lse_rows.data_ptr<float>() + lse_offset : nullptr,
                     rows_of(grad_query, batch, head),
                     rows_of(grad_key, batch, kv_head),
                     rows_of(grad_value, batch, kv_head),
                     sums.data_ptr<float>() + column * sums_floats,
                     {tile, member, group, turns.data() + column * n, order.first.data(),
                      order.following.data() + plan.offsets[layout * (n + 1) + tile]},
                     packed.head(column)},
                    scratch);
  };
  cpu::run_in_order(n * columns_heads * group, cpu::backward_scratch(problem.head_dim), unit);
  return {grad_query, grad_key, grad_value};
}

}  // namespace mem1
