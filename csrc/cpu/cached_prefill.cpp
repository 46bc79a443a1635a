#include "cpu/cached_prefill.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/attention.h"
#include "cpu/element_type.h"
#include "cpu/run_in_order.h"

namespace mem1 {
namespace {

using cpu::kTile;

// Up to kTile new tokens of a row. Its lists count from the first key tile: `partial` tiles from
// `full` on, then the `full` ones before them.
struct QueryTile {
  int64_t row, first_slot, list;
  int partial, full;
};

// Of all rows, those that see most first.
std::vector<QueryTile> cut_tiles(const std::vector<PrefillRow>& rows, std::vector<int32_t>* lists) {
  std::vector<QueryTile> tiles;
  for (size_t r = 0; r < rows.size(); ++r) {
    const int64_t begin = rows[r].held - rows[r].taken;
    for (int64_t first = begin; first < rows[r].held; first += kTile) {
      const int64_t last = std::min<int64_t>(first + kTile, rows[r].held) - 1;
      const int full = static_cast<int>((first + 1) / kTile),
                all = static_cast<int>(last / kTile) + 1;
      tiles.push_back(
          {static_cast<int64_t>(r), first, static_cast<int64_t>(lists->size()), all - full, full});
      for (int i = 0; i < all; ++i) lists->push_back((full + i) % all);
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const QueryTile& a, const QueryTile& b) {
    return a.first_slot > b.first_slot;
  });
  return tiles;
}

char* at_element(const at::Tensor& tensor, int64_t elements) {
  return static_cast<char*>(tensor.data_ptr()) + elements * tensor.element_size();
}

}  // namespace

bool packs_key_tiles(at::ScalarType dtype) {
  return cpu::attention_kernels(cpu::element_type(dtype)).pack != nullptr;
}

void prefill(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
             const std::vector<PrefillRow>& rows, double scale, double softcap,
             const at::Tensor& out, const at::Tensor& lse) {
  const cpu::ElementType type = cpu::element_type(query.scalar_type());
  const cpu::AttentionKernels& kernel = cpu::attention_kernels(type);
  const int64_t heads = query.size(2), kv_heads = key_cache.size(1);
  const int head_dim = static_cast<int>(query.size(3));
  const auto problem = [&](const PrefillRow& row) {
    return cpu::Problem{type, row.held, head_dim, static_cast<float>(scale),
                        static_cast<float>(softcap)};
  };
  const auto slots = [&](const at::Tensor& cache, int64_t batch, int64_t head) {
    return cpu::Rows{at_element(cache, batch * cache.stride(0) + head * cache.stride(1)),
                     cache.stride(2)};
  };

  int64_t most = 0;
  std::vector<int64_t> first_packed{0};  // of each row, in tiles of one kv head
  for (const PrefillRow& row : rows) {
    most = std::max(most, row.held);
    first_packed.push_back(first_packed.back() + (row.held + kTile - 1) / kTile);
  }
  // No slot is dropped.
  const std::vector<int32_t> expiry(most, std::numeric_limits<int32_t>::max());
  const int64_t tile_bytes = kernel.packed_bytes(head_dim, false);
  const int64_t packed_tiles = first_packed.back();
  const at::Tensor packed = at::empty({kv_heads * packed_tiles * tile_bytes}, at::kByte);
  const auto packed_row = [&](int64_t row, int64_t kv_head) {
    return static_cast<char*>(packed.data_ptr()) +
           (kv_head * packed_tiles + first_packed[row]) * tile_bytes;
  };
  cpu::run_in_order(kv_heads * packed_tiles, 0, [&](int64_t index, float*) {
    const int64_t kv_head = index / packed_tiles, tile = index % packed_tiles;
    const int64_t row =
        std::upper_bound(first_packed.begin(), first_packed.end(), tile) - first_packed.begin() - 1;
    const int64_t own = tile - first_packed[row];
    kernel.pack({problem(rows[row]), expiry.data(), own, slots(key_cache, rows[row].batch, kv_head),
                 slots(value_cache, rows[row].batch, kv_head), false,
                 packed_row(row, kv_head) + own * tile_bytes});
  });

  std::vector<int32_t> lists;
  const std::vector<QueryTile> tiles = cut_tiles(rows, &lists);
  const auto unit = [&](int64_t index, float* scratch) {
    const QueryTile& tile = tiles[index / heads];
    const PrefillRow& row = rows[tile.row];
    const int64_t head = index % heads, kv_head = head / (heads / kv_heads);
    // Queries, outputs and LSE are counted by slot, as the keys are.
    const int64_t begin = row.held - row.taken, new_tokens = query.size(1);
    const int64_t from = row.batch * query.stride(0) + head * query.stride(2);
    const int64_t to = row.batch * new_tokens * heads + head;
    kernel.forward(
        {problem(row),
         {expiry.data(), nullptr, lists.data() + tile.list, tile.partial, tile.partial + tile.full},
         tile.first_slot,
         {at_element(query, from - begin * query.stride(1)), query.stride(1)},
         slots(key_cache, row.batch, kv_head),
         slots(value_cache, row.batch, kv_head),
         {at_element(out, (to - begin * heads) * head_dim), heads * head_dim},
         lse.data_ptr<float>() + (row.batch * heads + head) * new_tokens - begin,
         packed_row(tile.row, kv_head)},
        scratch);
  };
  cpu::run_in_order(static_cast<int64_t>(tiles.size()) * heads, cpu::forward_scratch(head_dim),
                    unit);
}

}  // namespace mem1
