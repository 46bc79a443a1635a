// What the CPU and CUDA entry points of prune_kv_ and prune_paged_kv_ share: checks of their
// arguments, and the list of all tensors whose slots move.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "common/slot_tensor.h"
#include "overlap.h"

namespace mem1 {

struct PruneArgs {
  std::vector<SlotTensor> tensors;
  at::ScalarType key_type = at::kFloat;  // of the keys that are rotated
  int batch = 0;
  int capacity = 0;  // slots per row
};

// The widest power of two, up to 16, that divides `value`.
inline int64_t access_unit(int64_t value) {
  const int64_t bits = value | 16;
  return bits & -bits;
}

inline SlotTensor slot_tensor(const at::Tensor& tensor, int64_t first_element, int64_t elements,
                              int page_dim, int slot_dim, int head_dim) {
  const int64_t item = tensor.element_size();
  SlotTensor result{};
  result.data = static_cast<char*>(tensor.data_ptr()) + first_element * item;
  result.page_stride = tensor.stride(page_dim) * item;
  result.slot_stride = tensor.stride(slot_dim) * item;
  result.head_stride = head_dim < 0 ? 0 : tensor.stride(head_dim) * item;
  result.heads = head_dim < 0 ? 1 : static_cast<int32_t>(tensor.size(head_dim));
  result.row_bytes = static_cast<int32_t>(elements * item);
  int64_t parts = reinterpret_cast<int64_t>(result.data) | result.row_bytes;
  if (tensor.size(page_dim) > 1) parts |= result.page_stride;
  if (tensor.size(slot_dim) > 1) parts |= result.slot_stride;
  if (result.heads > 1) parts |= result.head_stride;
  result.unit = static_cast<int32_t>(access_unit(parts));
  return result;
}

// One tensor of a list. Its name is made only when a check fails, since there are many layers.
struct Listed {
  const at::Tensor& tensor;
  const char* list;
  size_t index;

  std::string name() const { return std::string(list) + "[" + std::to_string(index) + "]"; }

  // `expected` has -1 where any size will do.
  void check(at::IntArrayRef expected, const char* layout, const at::Tensor& keep) const {
    bool fits = tensor.dim() == static_cast<int64_t>(expected.size());
    for (size_t d = 0; fits && d < expected.size(); ++d) {
      fits = expected[d] < 0 || tensor.size(d) == expected[d];
    }
    TORCH_CHECK_VALUE(fits, name(), ": expected shape ", expected, " ", layout,
                      ", -1 for any, got ", tensor.sizes());
    TORCH_CHECK_VALUE(tensor.device() == keep.device(), name(), ": expected device ", keep.device(),
                      " (that of keep), got ", tensor.device());
    const int64_t item = tensor.element_size();
    TORCH_CHECK_TYPE(item == 1 || item == 2 || item == 4 || item == 8, name(),
                     ": expected a dtype of 1, 2, 4 or 8 bytes, got ", tensor.scalar_type());
  }

  void check_dense_last() const {
    TORCH_CHECK_VALUE(tensor.size(-1) <= 1 || tensor.stride(-1) == 1, name(),
                      ": expected a contiguous last dimension, got strides ", tensor.strides(),
                      " for shape ", tensor.sizes());
  }
};

// keys, values: [batch, kv_heads, capacity, head_dim]; slots: [batch, capacity].
inline PruneArgs prune_args(at::TensorList keys, at::TensorList values, const at::Tensor& lengths,
                            const at::Tensor& keep, at::TensorList slots,
                            const std::optional<at::Tensor>& position_delta,
                            at::TensorList rope_steps) {
  constexpr const char* kLayout = "[batch, kv_heads, capacity, head_dim]";
  check_dim(keep, "keep", 2, "[batch, capacity]");
  check_dtype(keep, "keep", at::kBool);
  check_last_dim_contiguous(keep, "keep");
  const int64_t batch = keep.size(0);
  const int64_t capacity = keep.size(1);
  TORCH_CHECK_VALUE(capacity < INT32_MAX && batch < INT32_MAX,
                    "keep: expected fewer than 2^31 rows and slots, got ", keep.sizes());
  check_dtype(lengths, "lengths", at::kInt);
  check_shape(lengths, "lengths", {batch}, "[batch]");
  check_device(lengths, "lengths", keep, "keep");
  TORCH_CHECK_VALUE(keys.size() == values.size(), "values: expected ", keys.size(),
                    " tensors like keys, got ", values.size());
  TORCH_CHECK_VALUE(position_delta.has_value() == !rope_steps.empty(),
                    "rope_steps: expected together with position_delta, or neither");
  TORCH_CHECK_VALUE(rope_steps.size() <= 1 || rope_steps.size() == keys.size(),
                    "rope_steps: expected 1 tensor or ", keys.size(), ", got ", rope_steps.size());
  if (position_delta) {
    check_dtype(*position_delta, "position_delta", at::kInt);
    check_shape(*position_delta, "position_delta", {batch, capacity}, "[batch, capacity]");
    check_device(*position_delta, "position_delta", keep, "keep");
    check_last_dim_contiguous(*position_delta, "position_delta");
  }

  MemoryCheck memory;
  memory.write(lengths);
  memory.read(keep);
  if (position_delta) memory.read(*position_delta);
  PruneArgs args;
  args.batch = static_cast<int>(batch);
  args.capacity = static_cast<int>(capacity);
  bool turns = false;
  for (size_t layer = 0; layer < keys.size(); ++layer) {
    for (const bool is_key : {true, false}) {
      const Listed listed{is_key ? keys[layer] : values[layer], is_key ? "keys" : "values", layer};
      const at::Tensor& tensor = listed.tensor;
      listed.check({batch, -1, capacity, -1}, kLayout, keep);
      listed.check_dense_last();
      memory.write(tensor);
      const int64_t head_dim = tensor.size(3);
      if (tensor.numel() == 0) continue;
      int64_t pairs = 0;
      if (is_key && !rope_steps.empty()) {
        const at::Tensor& steps = rope_steps[rope_steps.size() == 1 ? 0 : layer];
        check_dtype(steps, "rope_steps", at::kLong);
        check_dim(steps, "rope_steps", 1, "[pairs]");
        check_contiguous(steps, "rope_steps");
        check_device(steps, "rope_steps", keep, "keep");
        pairs = steps.size(0);
        TORCH_CHECK_VALUE(2 * pairs <= head_dim, listed.name(), ": expected head_dim of at least ",
                          2 * pairs, " (two to a frequency), got ", head_dim);
        if (pairs > 0) {
          check_activation_dtype(tensor, listed.name().c_str());
          TORCH_CHECK_TYPE(!turns || tensor.scalar_type() == args.key_type, listed.name(),
                           ": expected dtype ", args.key_type, " like the other keys, got ",
                           tensor.scalar_type());
          turns = true;
          args.key_type = tensor.scalar_type();
          args.tensors.push_back(slot_tensor(tensor, 0, 2 * pairs, 0, 2, 1));
          args.tensors.back().pairs = static_cast<int32_t>(pairs);
          args.tensors.back().steps = steps.const_data_ptr<int64_t>();
        }
      }
      if (2 * pairs < head_dim) {
        args.tensors.push_back(slot_tensor(tensor, 2 * pairs, head_dim - 2 * pairs, 0, 2, 1));
      }
    }
  }
  for (size_t i = 0; i < slots.size(); ++i) {
    Listed{slots[i], "slots", i}.check({batch, capacity}, "[batch, capacity]", keep);
    memory.write(slots[i]);
    if (slots[i].numel() > 0) args.tensors.push_back(slot_tensor(slots[i], 0, 1, 0, 1, -1));
  }
  memory.finish();
  return args;
}

// keys, values: [pages, page_size, kv_heads, head_dim]; slots: [pages, page_size].
struct PagedPruneArgs : PruneArgs {
  int pages = 0;
  int page_size = 0;
  int max_pages = 0;  // per row
};

inline PagedPruneArgs paged_prune_args(at::TensorList keys, at::TensorList values,
                                       const at::Tensor& block_table, const at::Tensor& lengths,
                                       const at::Tensor& keep,
                                       const std::optional<at::Tensor>& page_refs,
                                       at::TensorList slots, const at::Tensor& freed,
                                       const at::Tensor& freed_counts) {
  constexpr const char* kLayout = "[pages, page_size, kv_heads, head_dim]";
  TORCH_CHECK_VALUE(!keys.empty(), "keys: expected at least one layer, got none");
  check_dim(keys[0], "keys[0]", 4, kLayout);
  const int64_t pages = keys[0].size(0);
  const int64_t page_size = keys[0].size(1);
  TORCH_CHECK_VALUE(page_size > 0, "keys[0]: expected a page size of at least 1, got 0");
  check_dim(keep, "keep", 2, "[batch, tokens]");
  check_dtype(keep, "keep", at::kBool);
  check_last_dim_contiguous(keep, "keep");
  const int64_t batch = keep.size(0);
  check_dtype(block_table, "block_table", at::kInt);
  check_dim(block_table, "block_table", 2, "[batch, max_pages]");
  const int64_t max_pages = block_table.size(1);
  check_shape(block_table, "block_table", {batch, max_pages}, "[batch, max_pages]");
  check_last_dim_contiguous(block_table, "block_table");
  TORCH_CHECK_VALUE(
      pages < INT32_MAX && max_pages * page_size < INT32_MAX && keep.size(1) < INT32_MAX,
      "block_table: expected fewer than 2^31 pages and tokens, got ", block_table.sizes(), " of ",
      page_size, " tokens");
  check_dtype(freed, "freed", at::kInt);
  check_shape(freed, "freed", {batch, max_pages}, "[batch, max_pages]");
  check_last_dim_contiguous(freed, "freed");
  for (const auto& [name, tensor] :
       {std::pair{"lengths", &lengths}, std::pair{"freed_counts", &freed_counts}}) {
    check_dtype(*tensor, name, at::kInt);
    check_shape(*tensor, name, {batch}, "[batch]");
  }
  for (const auto& [name, tensor] :
       {std::pair{"lengths", &lengths}, std::pair{"freed_counts", &freed_counts},
        std::pair{"block_table", &block_table}, std::pair{"freed", &freed}}) {
    check_device(*tensor, name, keep, "keep");
  }
  if (page_refs) {
    check_dtype(*page_refs, "page_refs", at::kInt);
    check_shape(*page_refs, "page_refs", {pages}, "[pages]");
    check_contiguous(*page_refs, "page_refs");
    check_device(*page_refs, "page_refs", keep, "keep");
  }
  TORCH_CHECK_VALUE(keys.size() == values.size(), "values: expected ", keys.size(),
                    " tensors like keys, got ", values.size());

  MemoryCheck memory;
  for (const at::Tensor* tensor : {&lengths, &block_table, &freed, &freed_counts}) {
    memory.write(*tensor);
  }
  memory.read(keep);
  if (page_refs) memory.read(*page_refs);
  PagedPruneArgs args;
  args.batch = static_cast<int>(batch);
  args.pages = static_cast<int>(pages);
  args.page_size = static_cast<int>(page_size);
  args.max_pages = static_cast<int>(max_pages);
  args.capacity = static_cast<int>(std::min(keep.size(1), max_pages * page_size));
  for (size_t layer = 0; layer < keys.size(); ++layer) {
    for (const bool is_key : {true, false}) {
      const Listed listed{is_key ? keys[layer] : values[layer], is_key ? "keys" : "values", layer};
      const at::Tensor& tensor = listed.tensor;
      listed.check({pages, page_size, -1, -1}, kLayout, keep);
      listed.check_dense_last();
      memory.write(tensor);
      if (tensor.numel() > 0) {
        args.tensors.push_back(slot_tensor(tensor, 0, tensor.size(3), 0, 1, 2));
      }
    }
  }
  for (size_t i = 0; i < slots.size(); ++i) {
    Listed{slots[i], "slots", i}.check({pages, page_size}, "[pages, page_size]", keep);
    memory.write(slots[i]);
    if (slots[i].numel() > 0) args.tensors.push_back(slot_tensor(slots[i], 0, 1, 0, 1, -1));
  }
  memory.finish();
  return args;
}

}  // namespace mem1
