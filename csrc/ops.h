// The kernels that ops.cpp registers; each is defined in the file named above its declaration.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace mem1 {

// cpu/block_plan.cpp
at::Tensor block_plan_cpu(const at::Tensor& expiry, const std::optional<at::Tensor>& floor);

// cpu/attention.cpp
std::tuple<at::Tensor, at::Tensor> trajectory_attention_fwd_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& expiry, const std::optional<at::Tensor>& floor, at::TensorList rows,
    double scale, double softcap);

std::tuple<at::Tensor, at::Tensor, at::Tensor> trajectory_attention_bwd_cpu(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& expiry, const std::optional<at::Tensor>& floor, at::TensorList rows,
    at::TensorList columns, double scale, double softcap);

// cpu/cached_attention.cpp
void append_kv_cpu(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& key_cache,
                   const at::Tensor& value_cache, const at::Tensor& lengths,
                   const std::optional<at::Tensor>& counts);

std::tuple<at::Tensor, at::Tensor> cached_attention_cpu(
    const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
    const at::Tensor& lengths, const std::optional<at::Tensor>& counts,
    const std::optional<at::Tensor>& position_ids, int64_t window, double scale, double softcap);

// cpu/kv_cache.cpp
void prune_kv_cpu(at::TensorList keys, at::TensorList values, const at::Tensor& lengths,
                  const at::Tensor& keep, at::TensorList slots, bool ordered,
                  const std::optional<at::Tensor>& position_delta, at::TensorList rope_steps,
                  bool interleaved);

void prune_paged_kv_cpu(at::TensorList keys, at::TensorList values, const at::Tensor& block_table,
                        const at::Tensor& lengths, const at::Tensor& keep,
                        const std::optional<at::Tensor>& page_refs, at::TensorList slots,
                        const at::Tensor& freed, const at::Tensor& freed_counts);

// cpu/move_slots.cpp
void move_slots_cpu(at::TensorList pages, const at::Tensor& sources, const at::Tensor& destinations,
                    const std::optional<at::Tensor>& offsets);

// cuda/prune_kv.cu
void prune_kv_cuda(at::TensorList keys, at::TensorList values, const at::Tensor& lengths,
                   const at::Tensor& keep, at::TensorList slots, bool ordered,
                   const std::optional<at::Tensor>& position_delta, at::TensorList rope_steps,
                   bool interleaved);

void prune_paged_kv_cuda(at::TensorList keys, at::TensorList values, const at::Tensor& block_table,
                         const at::Tensor& lengths, const at::Tensor& keep,
                         const std::optional<at::Tensor>& page_refs, at::TensorList slots,
                         const at::Tensor& freed, const at::Tensor& freed_counts);

}  // namespace mem1
