// Moves between the slots of a cache, as runs of consecutive slots, and the parallel loop over
// tensors, rows and heads that makes them.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/slot_tensor.h"

namespace mem1 {

constexpr int64_t kTaskBytes = 64 * 1024;  // the least work per thread

struct Run {
  int source_page, source;
  int destination_page, destination;
  int length;
};

inline void append_move(std::vector<Run>& runs, const Run& move) {
  if (!runs.empty()) {
    Run& last = runs.back();
    if (last.source_page == move.source_page && last.source + last.length == move.source &&
        last.destination_page == move.destination_page &&
        last.destination + last.length == move.destination) {
      ++last.length;
      return;
    }
  }
  runs.push_back(move);
}

// Where all heads are side by side in memory: one row to copy for all of them.
inline SlotTensor merge_heads(SlotTensor tensor) {
  if (tensor.pairs == 0 && tensor.heads > 1 && tensor.head_stride == tensor.row_bytes) {
    tensor.row_bytes *= tensor.heads;
    tensor.heads = 1;
  }
  return tensor;
}

inline char* address(const SlotTensor& tensor, int page, int head, int slot) {
  return tensor.data + page * tensor.page_stride + head * tensor.head_stride +
         slot * tensor.slot_stride;
}

// Runs in ascending order, so that `ordered` rows are read before they are overwritten.
inline void copy_runs(const SlotTensor& tensor, int head, const std::vector<Run>& runs) {
  const int64_t row_bytes = tensor.row_bytes;
  for (const Run& run : runs) {
    const char* source = address(tensor, run.source_page, head, run.source);
    char* destination = address(tensor, run.destination_page, head, run.destination);
    if (tensor.slot_stride == row_bytes) {
      std::memmove(destination, source, run.length * row_bytes);
      continue;
    }
    for (int i = 0; i < run.length; ++i) {
      std::memcpy(destination, source, row_bytes);
      source += tensor.slot_stride;
      destination += tensor.slot_stride;
    }
  }
}

// Copies every tensor's runs, row by row and head by head, over all threads.
inline void copy_all(const std::vector<SlotTensor>& tensors,
                     const std::vector<std::vector<Run>>& runs) {
  const int64_t rows = static_cast<int64_t>(runs.size());
  std::vector<int64_t> first_task{0};
  int64_t bytes = 0;
  int64_t moves = 0;
  for (const auto& row : runs) {
    for (const Run& run : row) moves += run.length;
  }
  for (const SlotTensor& tensor : tensors) {
    first_task.push_back(first_task.back() + rows * tensor.heads);
    bytes += moves * tensor.row_bytes * tensor.heads;
  }
  const int64_t tasks = first_task.back();
  if (bytes == 0) return;
  const int64_t grain = std::max<int64_t>(1, tasks * kTaskBytes / bytes);
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    size_t t =
        std::upper_bound(first_task.begin(), first_task.end(), begin) - first_task.begin() - 1;
    for (int64_t task = begin; task < end; ++task) {
      while (task >= first_task[t + 1]) ++t;
      const int64_t index = task - first_task[t];
      const int64_t row = index / tensors[t].heads;
      copy_runs(tensors[t], static_cast<int>(index % tensors[t].heads), runs[row]);
    }
  });
}

}  // namespace mem1
