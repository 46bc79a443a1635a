// The lists of a BlockPlan, as build_lists in mem1_kernels/block_plan.py makes them, entry by
// entry. Time and memory grow with the tokens and the tiles listed, not with the pairs of tiles.
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <vector>

#include "../ops.h"

namespace mem1 {
namespace {

constexpr int64_t kTile = 128;     // BLOCK in block_plan.py
constexpr int64_t kMinChunk = 8;   // MIN_CHUNK
constexpr int64_t kAlignment = 4;  // a list starts at a multiple of so many entries

// What the tokens of a tile say together.
struct Tile {
  int32_t first_end;  // the smallest expiry; 0 where the tile reaches behind the last token
  int32_t last_end;   // the largest expiry of a key that some query sees, or 0
  int32_t lowest_floor, highest_floor;
};

std::vector<Tile> summarise(const int32_t* expiry, const int32_t* floor, int64_t tokens) {
  std::vector<Tile> tiles((tokens + kTile - 1) / kTile);
  for (int64_t tile = 0; tile < static_cast<int64_t>(tiles.size()); ++tile) {
    const int64_t begin = tile * kTile, end = std::min(begin + kTile, tokens);
    int32_t first = std::numeric_limits<int32_t>::max(), last = 0;
    for (int64_t k = begin; k < end; ++k) {
      first = std::min(first, expiry[k]);
      last = std::max(last, expiry[k] > k ? expiry[k] : 0);
    }
    int32_t lowest = 0, highest = 0;
    if (floor != nullptr) {
      const auto range = std::minmax_element(floor + begin, floor + end);
      lowest = *range.first;
      highest = *range.second;
      if (end < begin + kTile) {  // rows behind the last token: no floor below it
        lowest = std::min(lowest, static_cast<int32_t>(tokens));
        highest = std::max(highest, 0);
      }
    }
    if (end < begin + kTile) first = std::min(first, 0);
    tiles[tile] = {first, last, lowest, highest};
  }
  return tiles;
}

// The lists of one side: whose tiles meet which of the other side.
struct Side {
  int32_t *order, *offsets, *partial, *tiles;
};

// Stable, the most work first. A partial tile costs about a third more than a full one.
void write_order(const Side& side, int64_t n) {
  std::vector<int64_t> work(n);
  for (int64_t i = 0; i < n; ++i) {
    work[i] = 3 * (side.offsets[i + 1] - side.offsets[i]) + side.partial[i];
  }
  std::iota(side.order, side.order + n, 0);
  std::stable_sort(side.order, side.order + n,
                   [&](int32_t a, int32_t b) { return work[a] > work[b]; });
}

void write_rows(const std::vector<Tile>& tiles, int64_t tokens, bool has_floor, const Side& rows) {
  const int64_t n = tiles.size();
  // Key tiles that a query tile to come may still see, ascending. One that expired is taken out
  // when it is met, so all query tiles together meet no more than what they list and the n that
  // die.
  std::vector<int32_t> alive, full;
  alive.reserve(n);
  int32_t* out = rows.tiles;
  for (int64_t q = 0; q < n; ++q) {
    alive.push_back(q);
    const int64_t first_row = q * kTile, next_row = first_row + kTile;
    const Tile& query = tiles[q];
    const int64_t from = has_floor ? query.lowest_floor : 0;
    const auto start = std::partition_point(alive.begin(), alive.end(),
                                            [&](int64_t k) { return (k + 1) * kTile <= from; });
    auto stays = start;
    int32_t* const list = out;
    full.clear();
    for (auto it = start; it != alive.end(); ++it) {
      const int64_t k = *it;
      if (tiles[k].last_end <= first_row) continue;
      *stays++ = k;
      const bool whole = k < q && tiles[k].first_end >= next_row && next_row <= tokens &&
                         (!has_floor || query.highest_floor <= k * kTile);
      if (whole) {
        full.push_back(k);
      } else {
        *out++ = k;
      }
    }
    alive.erase(stays, alive.end());
    rows.offsets[q] = list - rows.tiles;
    rows.partial[q] = out - list;
    out = std::copy(full.begin(), full.end(), out);
  }
  rows.offsets[n] = out - rows.tiles;
  write_order(rows, n);
}

void write_columns(const Side& rows, int64_t n, const Side& columns) {
  std::vector<int32_t> counts(n), full(n);
  const auto for_each = [&](const auto& visit) {
    for (int64_t q = 0; q < n; ++q) {
      const int32_t partial_end = rows.offsets[q] + rows.partial[q];
      for (int32_t at = rows.offsets[q]; at < rows.offsets[q + 1]; ++at) {
        visit(q, rows.tiles[at], at < partial_end);
      }
    }
  };
  std::fill_n(columns.partial, n, 0);
  for_each([&](int64_t, int32_t k, bool partial) {
    ++counts[k];
    columns.partial[k] += partial;
  });
  std::vector<int32_t>& next_partial = counts;
  std::vector<int32_t>& next_full = full;
  columns.offsets[0] = 0;
  for (int64_t k = 0; k < n; ++k) {
    const int32_t begin = columns.offsets[k];
    columns.offsets[k + 1] = begin + counts[k];
    next_partial[k] = begin;
    next_full[k] = begin + columns.partial[k];
  }
  for_each([&](int64_t q, int32_t k, bool partial) {
    columns.tiles[partial ? next_partial[k]++ : next_full[k]++] = q;
  });
  write_order(columns, n);
}

struct Items {
  int32_t *column, *begin, *end, *slot, *first_slot, *slots;
};

// Pieces of columns, the heaviest first. Twice the mean length bounds the pieces of split columns
// by n, and all items by 2 n.
void write_items(const Side& columns, int64_t n, const Items& items) {
  struct Item {
    int32_t column, begin, end, slot;
  };
  std::vector<Item> found;
  found.reserve(2 * n);
  const int64_t listed = columns.offsets[n];
  const int64_t chunk = std::max(kMinChunk, (2 * listed + n - 1) / n);
  int32_t slots = 0;
  for (int32_t k = 0; k < n; ++k) {
    const int64_t begin = columns.offsets[k], end = columns.offsets[k + 1], length = end - begin;
    const int64_t pieces = length > chunk ? (length + chunk - 1) / chunk : 1;
    const int64_t step = (length + pieces - 1) / pieces;
    items.slots[k] = pieces > 1 ? pieces : 0;
    items.first_slot[k] = pieces > 1 ? slots : -1;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t stop = std::min(begin + piece * step + step, end);
      found.push_back({k, static_cast<int32_t>(std::min(begin + piece * step, stop)),
                       static_cast<int32_t>(stop), pieces > 1 ? slots++ : -1});
    }
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const Item& a, const Item& b) { return a.end - a.begin > b.end - b.begin; });
  for (int64_t i = 0; i < 2 * n; ++i) {
    const bool used = i < static_cast<int64_t>(found.size());
    const Item item = used ? found[i] : Item{-1, 0, 0, -1};
    items.column[i] = item.column;
    items.begin[i] = item.begin;
    items.end[i] = item.end;
    items.slot[i] = item.slot;
  }
}

}  // namespace

at::Tensor block_plan_cpu(const at::Tensor& expiry, const std::optional<at::Tensor>& floor) {
  TORCH_CHECK_VALUE(expiry.dim() == 2 && expiry.scalar_type() == at::kInt && expiry.is_cpu() &&
                        expiry.size(1) > 0,
                    "expiry: expected int32 [layouts, tokens] on the CPU, got ",
                    expiry.scalar_type(), " ", expiry.sizes());
  TORCH_CHECK_VALUE(!floor || (floor->sizes() == expiry.sizes() &&
                               floor->scalar_type() == at::kInt && floor->is_cpu()),
                    "floor: expected int32 ", expiry.sizes(), " like expiry, got ",
                    floor ? floor->sizes() : at::IntArrayRef{});
  const int64_t layouts = expiry.size(0), tokens = expiry.size(1);
  const int64_t n = (tokens + kTile - 1) / kTile, capacity = n * (n + 1) / 2;
  // In the order of NAMES in block_plan.py.
  const std::vector<int64_t> widths = {n,        n + 1, n,     capacity, n,     n + 1, n,
                                       capacity, 2 * n, 2 * n, 2 * n,    2 * n, n,     n};
  std::vector<int64_t> starts;
  int64_t size = 0;
  for (const int64_t width : widths) {
    starts.push_back(size);
    size += (layouts * width + kAlignment - 1) / kAlignment * kAlignment;
  }
  // Zeros that take memory only where something is written: unused room costs addresses alone.
  auto* const memory = static_cast<int32_t*>(std::calloc(size, sizeof(int32_t)));
  TORCH_CHECK(memory != nullptr || size == 0, "block_plan: no room for ", size, " int32");
  const at::Tensor lists = at::from_blob(memory, {size}, &std::free, at::kInt);

  const at::Tensor ends = expiry.contiguous();
  const at::Tensor floors = floor ? floor->contiguous() : at::Tensor();
  at::parallel_for(0, layouts, 1, [&](int64_t first, int64_t last) {
    for (int64_t layout = first; layout < last; ++layout) {
      const auto list = [&](int index) { return memory + starts[index] + layout * widths[index]; };
      const Side rows{list(0), list(1), list(2), list(3)};
      const Side columns{list(4), list(5), list(6), list(7)};
      const int32_t* const row_floor =
          floor ? floors.const_data_ptr<int32_t>() + layout * tokens : nullptr;
      const auto tiles =
          summarise(ends.const_data_ptr<int32_t>() + layout * tokens, row_floor, tokens);
      write_rows(tiles, tokens, floor.has_value(), rows);
      write_columns(rows, n, columns);
      write_items(columns, n, {list(8), list(9), list(10), list(11), list(12), list(13)});
    }
  });
  return lists;
}

}  // namespace mem1
