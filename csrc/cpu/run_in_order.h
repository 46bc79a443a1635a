// Spreads work of uneven size over all threads. Each thread has its own scratch memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mem1::cpu {

// Runs unit(index, scratch) for all units; threads claim them in ascending order.
template <typename Unit>
void run_in_order(int64_t units, int64_t scratch_floats, const Unit& unit) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), units);
  const at::Tensor scratch = at::empty({threads, scratch_floats}, at::kFloat);
  std::atomic<int64_t> claimed{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      float* memory = scratch.data_ptr<float>() + thread * scratch_floats;
      for (int64_t i; (i = claimed.fetch_add(1, std::memory_order_relaxed)) < units;) {
        unit(i, memory);
      }
    }
  });
}

}  // namespace mem1::cpu
