// move_slots_ on the CPU: a list of moves between the slots of a paged cache, in all layers.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"
#include "cpu/slot_runs.h"
#include "ops.h"
#include "prune_args.h"

namespace mem1 {
namespace {

constexpr const char* kPages = "[pages, heads, page_size, row]";

// The slots of a list, all of which lie in 0 .. slots - 1.
std::vector<int64_t> read_slots(const at::Tensor& list, const char* name, int64_t slots) {
  check_dtype(list, name, at::kLong);
  check_dim(list, name, 1, "[moves]");
  check_contiguous(list, name);
  const int64_t* data = list.const_data_ptr<int64_t>();
  std::vector<int64_t> result(data, data + list.size(0));
  for (const int64_t slot : result) {
    TORCH_CHECK_VALUE(slot >= 0 && slot < slots, name, ": expected slots 0 to ", slots - 1,
                      ", got ", slot);
  }
  return result;
}

// No slot is written twice, and none that is read is written: the moves then have no order.
void check_apart(const std::vector<int64_t>& sources, std::vector<int64_t> destinations) {
  std::sort(destinations.begin(), destinations.end());
  const auto twice = std::adjacent_find(destinations.begin(), destinations.end());
  TORCH_CHECK_VALUE(twice == destinations.end(), "destinations: expected every slot once, got ",
                    *twice, " again");
  for (const int64_t source : sources) {
    TORCH_CHECK_VALUE(!std::binary_search(destinations.begin(), destinations.end(), source),
                      "destinations: expected no slot of sources, got ", source);
  }
}

std::vector<int32_t> read_offsets(const at::Tensor& offsets, int64_t page_size, int64_t row) {
  check_dtype(offsets, "offsets", at::kInt);
  check_shape(offsets, "offsets", {page_size, row}, "[page_size, row]");
  check_contiguous(offsets, "offsets");
  const int32_t* data = offsets.const_data_ptr<int32_t>();
  std::vector<int32_t> result(data, data + offsets.numel());
  std::vector<char> seen(result.size(), 0);
  for (const int32_t at : result) {
    TORCH_CHECK_VALUE(at >= 0 && at < static_cast<int64_t>(seen.size()) && !seen[at],
                      "offsets: expected each of 0 to ", result.size() - 1, " once, got ", at);
    seen[at] = 1;
  }
  return result;
}

// One head: element i of a slot lies at offsets[slot in page][i] of its page.
template <typename Element>
void move_packed(char* head, int64_t page_stride, const std::vector<Run>& moves,
                 const std::vector<int32_t>& offsets, int64_t row) {
  for (const Run& move : moves) {
    auto* from = reinterpret_cast<const Element*>(head + move.source_page * page_stride);
    auto* to = reinterpret_cast<Element*>(head + move.destination_page * page_stride);
    const int32_t* from_at = offsets.data() + move.source * row;
    const int32_t* to_at = offsets.data() + move.destination * row;
    for (int64_t i = 0; i < row; ++i) to[to_at[i]] = from[from_at[i]];
  }
}

void move_all_packed(const std::vector<SlotTensor>& tensors, const std::vector<Run>& moves,
                     const std::vector<int32_t>& offsets, int64_t row) {
  std::vector<std::pair<const SlotTensor*, int>> tasks;
  for (const SlotTensor& tensor : tensors) {
    for (int head = 0; head < tensor.heads; ++head) tasks.emplace_back(&tensor, head);
  }
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const SlotTensor& tensor = *tasks[i].first;
      char* head = tensor.data + tasks[i].second * tensor.head_stride;
      switch (tensor.row_bytes / row) {
        case 1:
          move_packed<uint8_t>(head, tensor.page_stride, moves, offsets, row);
          break;
        case 2:
          move_packed<uint16_t>(head, tensor.page_stride, moves, offsets, row);
          break;
        case 4:
          move_packed<uint32_t>(head, tensor.page_stride, moves, offsets, row);
          break;
        default:
          move_packed<uint64_t>(head, tensor.page_stride, moves, offsets, row);
      }
    }
  });
}

}  // namespace

void move_slots_cpu(at::TensorList pages, const at::Tensor& sources, const at::Tensor& destinations,
                    const std::optional<at::Tensor>& offsets) {
  TORCH_CHECK_VALUE(!pages.empty(), "pages: expected at least one layer, got none");
  check_dim(pages[0], "pages[0]", 4, kPages);
  const int64_t count = pages[0].size(0), page_size = pages[0].size(2), row = pages[0].size(3);
  MemoryCheck memory;
  std::vector<SlotTensor> tensors;
  for (size_t layer = 0; layer < pages.size(); ++layer) {
    const Listed listed{pages[layer], "pages", layer};
    const int64_t elements = offsets ? row : -1;
    listed.check({count, -1, page_size, elements}, kPages, sources);
    listed.check_dense_last();
    memory.write(pages[layer]);
    TORCH_CHECK_VALUE(!offsets || page_size <= 1 || pages[layer].stride(2) == row, listed.name(),
                      ": expected a page's head in one piece for offsets, got strides ",
                      pages[layer].strides());
    if (pages[layer].numel() > 0) {
      tensors.push_back(slot_tensor(pages[layer], 0, pages[layer].size(3), 0, 2, 1));
    }
  }
  memory.read(sources);
  memory.read(destinations);
  if (offsets) memory.read(*offsets);
  memory.finish();
  check_device(destinations, "destinations", sources, "sources");
  const auto from = read_slots(sources, "sources", count * page_size);
  const auto to = read_slots(destinations, "destinations", count * page_size);
  TORCH_CHECK_VALUE(from.size() == to.size(), "destinations: expected ", from.size(),
                    " slots like sources, got ", to.size());
  check_apart(from, to);
  const auto where = offsets ? read_offsets(*offsets, page_size, row) : std::vector<int32_t>();

  std::vector<Run> moves;
  for (size_t i = 0; i < from.size(); ++i) {
    const Run move{static_cast<int>(from[i] / page_size), static_cast<int>(from[i] % page_size),
                   static_cast<int>(to[i] / page_size), static_cast<int>(to[i] % page_size), 1};
    if (offsets) {
      moves.push_back(move);
    } else {
      append_move(moves, move);
    }
  }
  if (offsets) {
    move_all_packed(tensors, moves, where, row);
  } else {
    copy_all(tensors, {moves});
  }
}

}  // namespace mem1
