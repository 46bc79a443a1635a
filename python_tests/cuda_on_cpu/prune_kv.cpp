// csrc/cuda/prune_kv.cuh on the CPU, for ctypes.
#include <algorithm>
#include <cstdio>
#include <exception>

#include "cuda_on_cpu.h"

#define MEM1_PRUNE_THREADS 64
#include "cpu/float_types.h"
#include "cuda/prune_kv.cuh"

using namespace mem1;
using namespace mem1::cuda;

namespace {

constexpr int kMax = 8;

template <typename Params>
void set_tensors(Params& params, const SlotTensor* tensors, int count, int parts) {
  params.tensors = count;
  params.parts = parts;
  params.max_heads = 1;
  for (int i = 0; i < count; ++i) {
    params.tensor[i] = tensors[i];
    params.max_heads = std::max(params.max_heads, tensors[i].heads);
  }
}

// 0, or 1 if a thread trapped, or 2 if barriers do not match.
template <typename Kernel>
int run(int batch, int blocks, int64_t shared_bytes, unsigned seed, const Kernel& kernel) {
  const dim3 grid{static_cast<unsigned>(blocks), static_cast<unsigned>(batch), 1};
  try {
    return cuda_on_cpu::launch(grid, kThreads, shared_bytes, seed, kernel) ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}

template <typename Key>
int run_dense(const PruneParams<kMax>& params, bool ordered, int batch, int blocks, unsigned seed) {
  const int64_t shared_bytes = prune_shared_bytes(params.row.capacity);
  if (ordered) {
    return run(batch, blocks, shared_bytes, seed,
               [&] { prune_kv_kernel<Key, true, kMax>(params); });
  }
  return run(batch, blocks, shared_bytes, seed, [&] { prune_kv_kernel<Key, false, kMax>(params); });
}

}  // namespace

// key_type: 0: no key turns, 1: fp32, 2: fp16, 3: bf16.
extern "C" int prune_kv(Row row, const int32_t* position_delta, int64_t delta_stride, int ordered,
                        int interleaved, int key_type, const SlotTensor* tensors, int count,
                        int batch, int blocks, int parts, unsigned seed) {
  PruneParams<kMax> params{};
  params.row = row;
  params.position_delta = position_delta;
  params.delta_stride = delta_stride;
  params.interleaved = interleaved != 0;
  set_tensors(params, tensors, count, ordered ? 1 : parts);
  switch (key_type) {
    case 0:
      return run_dense<NoKey>(params, ordered != 0, batch, blocks, seed);
    case 1:
      return run_dense<FloatKey>(params, ordered != 0, batch, blocks, seed);
    case 2:
      return run_dense<HalfKey>(params, ordered != 0, batch, blocks, seed);
    default:
      return run_dense<BFloat16Key>(params, ordered != 0, batch, blocks, seed);
  }
}

extern "C" int prune_paged_kv(Row row, int32_t* block_table, int64_t table_stride, int32_t* freed,
                              int64_t freed_stride, int32_t* freed_counts, const int32_t* page_refs,
                              int pages, int page_size, int max_pages, const SlotTensor* tensors,
                              int count, int batch, int blocks, unsigned seed) {
  PagedPruneParams<kMax> params{};
  params.row = row;
  params.block_table = block_table;
  params.table_stride = table_stride;
  params.freed = freed;
  params.freed_stride = freed_stride;
  params.freed_counts = freed_counts;
  params.count_stride = 1;
  params.page_refs = page_refs;
  params.pages = pages;
  params.page_size = page_size;
  params.max_pages = max_pages;
  set_tensors(params, tensors, count, 1);
  return run(batch, blocks, paged_shared_bytes(row.capacity, max_pages), seed,
             [&] { prune_paged_kv_kernel<kMax>(params); });
}
