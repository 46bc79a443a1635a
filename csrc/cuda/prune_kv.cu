// prune_kv_ and prune_paged_kv_ on the GPU: arguments, grid, launch. The kernels are in
// prune_kv.cuh.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <vector>

#include "cuda/prune_kv.cuh"
#include "ops.h"
#include "prune_args.h"

namespace mem1 {
namespace {

using namespace cuda;

// Tensors per launch: kFew fit in the 4 KiB of kernel parameters that every driver allows, kMany in
// the 32 KiB of sm_70 and newer. More tensors take several launches.
constexpr int kFew = 64;
constexpr int kMany = 512;
constexpr int kMostRows = 65535;             // of a grid's second dimension
constexpr int kMostParts = 16;               // more blocks per head are hardly worth it
constexpr int64_t kPlainShared = 48 * 1024;  // bytes per block without raising the limit

struct Grid {
  int blocks;  // per row
  int parts;
};

// Divides the blocks that the device can run at once among the rows, and then among tensors, heads
// and moves, so that each block has the same number of work items.
Grid choose_grid(int64_t resident, int batch, int64_t heads, bool split, int length_bits) {
  const int64_t wanted = std::max<int64_t>(1, resident / batch);
  const int64_t parts =
      split ? std::clamp<int64_t>((wanted + heads - 1) / heads, 1, kMostParts) : 1;
  const int64_t items = heads * parts;
  const int64_t most_readers = (int64_t{1} << (32 - length_bits)) - 1;
  const int64_t rounds = (items + wanted - 1) / wanted;
  const int64_t blocks = std::min((items + rounds - 1) / rounds, most_readers);
  return {static_cast<int>(blocks), static_cast<int>(parts)};
}

// How many bits can hold twice the capacity.
int length_bits(int capacity) {
  int bits = 1;
  while (capacity >> (bits - 1) != 0) ++bits;
  return bits;
}

template <typename Params>
void launch(void (*kernel)(const Params), const Params& params, int batch, int blocks,
            int64_t shared_bytes) {
  kernel<<<dim3(blocks, batch), kThreads, shared_bytes, c10::cuda::getCurrentCUDAStream()>>>(
      params);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// Blocks of `kernel` that the device can run at once. Raises the limit of shared memory if needed.
template <typename Params>
int64_t resident_blocks(void (*kernel)(const Params), int64_t shared_bytes, const char* argument) {
  const int most_shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  TORCH_CHECK_VALUE(shared_bytes <= most_shared, argument, ": a row this long needs ", shared_bytes,
                    " bytes of shared memory, and the device has ", most_shared);
  if (shared_bytes > kPlainShared) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  }
  int blocks = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &blocks, reinterpret_cast<const void*>(kernel), kThreads, shared_bytes));
  return std::max<int64_t>(1, int64_t{blocks} * device_attribute(cudaDevAttrMultiProcessorCount));
}

Row row_params(const at::Tensor& lengths, const at::Tensor& keep, int capacity) {
  Row row{};
  row.lengths = lengths.data_ptr<int32_t>();
  row.length_stride = lengths.stride(0);
  row.keep = reinterpret_cast<const uint8_t*>(keep.const_data_ptr<bool>());
  row.keep_stride = keep.stride(0);
  row.capacity = capacity;
  row.length_bits = length_bits(capacity);
  return row;
}

template <typename Params>
void set_tensors(Params& params, const SlotTensor* first, int count) {
  params.tensors = count;
  params.max_heads = 1;
  for (int i = 0; i < count; ++i) {
    params.tensor[i] = first[i];
    params.max_heads = std::max(params.max_heads, first[i].heads);
  }
}

// Launches over all tensors, at most kMax at a time; the last launch writes the new lengths.
template <int kMax, template <int> typename Params, typename Fill>
void launch_all(void (*kernel)(const Params<kMax>), const PruneArgs& args, bool split,
                int64_t shared_bytes, const char* argument, const Fill& fill) {
  const int64_t resident = resident_blocks(kernel, shared_bytes, argument);
  const int tensors = static_cast<int>(args.tensors.size());
  int first = 0;
  do {
    Params<kMax> params{};
    const int count = std::min(kMax, tensors - first);
    set_tensors(params, args.tensors.data() + first, count);
    fill(params);
    const Grid grid = choose_grid(resident, args.batch, std::max(1, count * params.max_heads),
                                  split, params.row.length_bits);
    params.parts = grid.parts;
    first += count;
    params.row.readers = first == tensors ? grid.blocks : 0;
    launch(kernel, params, args.batch, grid.blocks, shared_bytes);
  } while (first < tensors);
}

template <typename Key, bool kOrdered, typename Fill>
void launch_dense(const PruneArgs& args, const Fill& fill) {
  const int64_t shared_bytes = prune_shared_bytes(args.capacity);
  if (args.tensors.size() <= kFew) {
    launch_all<kFew, PruneParams>(prune_kv_kernel<Key, kOrdered, kFew>, args, !kOrdered,
                                  shared_bytes, "keep", fill);
  } else {
    launch_all<kMany, PruneParams>(prune_kv_kernel<Key, kOrdered, kMany>, args, !kOrdered,
                                   shared_bytes, "keep", fill);
  }
}

template <typename Key, typename Fill>
void launch_dense(const PruneArgs& args, bool ordered, const Fill& fill) {
  if (ordered) {
    launch_dense<Key, true>(args, fill);
  } else {
    launch_dense<Key, false>(args, fill);
  }
}

void check_rows(int batch) {
  TORCH_CHECK_VALUE(batch <= kMostRows, "keep: expected at most ", kMostRows, " rows, got ", batch);
}

}  // namespace

void prune_kv_cuda(at::TensorList keys, at::TensorList values, const at::Tensor& lengths,
                   const at::Tensor& keep, at::TensorList slots, bool ordered,
                   const std::optional<at::Tensor>& position_delta, at::TensorList rope_steps,
                   bool interleaved) {
  const PruneArgs args = prune_args(keys, values, lengths, keep, slots, position_delta, rope_steps);
  check_rows(args.batch);
  if (args.batch == 0 || args.capacity == 0) return;
  const c10::cuda::CUDAGuard guard(keep.device());
  const auto fill = [&](auto& params) {
    params.row = row_params(lengths, keep, args.capacity);
    params.interleaved = interleaved;
    if (position_delta) {
      params.position_delta = position_delta->const_data_ptr<int32_t>();
      params.delta_stride = position_delta->stride(0);
    }
  };
  const bool turns = std::any_of(args.tensors.begin(), args.tensors.end(),
                                 [](const SlotTensor& tensor) { return tensor.pairs > 0; });
  if (!turns) {
    launch_dense<NoKey>(args, ordered, fill);
  } else if (args.key_type == at::kFloat) {
    launch_dense<FloatKey>(args, ordered, fill);
  } else if (args.key_type == at::kHalf) {
    launch_dense<HalfKey>(args, ordered, fill);
  } else {
    launch_dense<BFloat16Key>(args, ordered, fill);
  }
}

void prune_paged_kv_cuda(at::TensorList keys, at::TensorList values, const at::Tensor& block_table,
                         const at::Tensor& lengths, const at::Tensor& keep,
                         const std::optional<at::Tensor>& page_refs, at::TensorList slots,
                         const at::Tensor& freed, const at::Tensor& freed_counts) {
  const PagedPruneArgs args = paged_prune_args(keys, values, block_table, lengths, keep, page_refs,
                                               slots, freed, freed_counts);
  check_rows(args.batch);
  const c10::cuda::CUDAGuard guard(keep.device());
  if (args.batch == 0 || args.capacity == 0) {
    freed.fill_(-1);
    freed_counts.zero_();
    return;
  }
  const auto fill = [&](auto& params) {
    params.row = row_params(lengths, keep, args.capacity);
    params.block_table = block_table.data_ptr<int32_t>();
    params.table_stride = block_table.stride(0);
    params.freed = freed.data_ptr<int32_t>();
    params.freed_stride = freed.stride(0);
    params.freed_counts = freed_counts.data_ptr<int32_t>();
    params.count_stride = freed_counts.stride(0);
    params.page_refs = page_refs ? page_refs->const_data_ptr<int32_t>() : nullptr;
    params.pages = args.pages;
    params.page_size = args.page_size;
    params.max_pages = args.max_pages;
  };
  const int64_t shared_bytes = paged_shared_bytes(args.capacity, args.max_pages);
  if (args.tensors.size() <= kFew) {
    launch_all<kFew, PagedPruneParams>(prune_paged_kv_kernel<kFew>, args, false, shared_bytes,
                                       "block_table", fill);
  } else {
    launch_all<kMany, PagedPruneParams>(prune_paged_kv_kernel<kMany>, args, false, shared_bytes,
                                        "block_table", fill);
  }
}

}  // namespace mem1
