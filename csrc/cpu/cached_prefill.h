// cached_attention for many new tokens: the query tiles of trajectory attention, over cache slots.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace mem1 {

// A row's new tokens, which are in its last slots.
struct PrefillRow {
  int64_t batch, held, taken;
};

// Whether the level in use packs key tiles of this dtype; others gain nothing from this.
bool packs_key_tiles(at::ScalarType dtype);

// Each token sees the slots up to its own. query and out: [batch, new_tokens, heads, head_dim],
// caches: [batch, kv_heads, capacity, head_dim], lse: [batch, heads, new_tokens].
void prefill(const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache,
             const std::vector<PrefillRow>& rows, double scale, double softcap,
             const at::Tensor& out, const at::Tensor& lse);

}  // namespace mem1
