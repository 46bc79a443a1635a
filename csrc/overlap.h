// Which tensors share memory: an op that writes in place must not be given one byte twice.
// mem1_kernels/ops/_memory.py does the same for ops that are not compiled.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace mem1 {

// `width` contiguous bytes at `start`, repeated along dims, the widest stride first.
struct Extent {
  struct Dim {
    int64_t stride;  // bytes
    int64_t size;    // > 1
  };
  static constexpr int kMostDims = 4;
  static bool wider(const Dim& a, const Dim& b) {
    return a.stride != b.stride ? a.stride > b.stride : a.size > b.size;
  }

  int64_t start = 0;
  int64_t width = 0;
  int64_t span = 0;  // bytes from the first to the last
  int dims = 0;
  bool nested = true;  // each stride steps over everything below it, so that no byte comes twice
  std::array<Dim, kMostDims> dim{};

  explicit Extent(const at::Tensor& tensor)
      : start(reinterpret_cast<int64_t>(tensor.const_data_ptr())), width(tensor.element_size()) {
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      const Dim next{tensor.stride(d) * width, tensor.size(d)};
      if (next.size <= 1) continue;
      int place = dims++;
      for (; place > 0 && wider(next, dim[place - 1]); --place) dim[place] = dim[place - 1];
      dim[place] = next;
    }
    while (dims > 0 && dim[dims - 1].stride == width) width *= dim[--dims].size;
    span = width;
    for (int d = dims - 1; d >= 0; --d) {
      nested = nested && dim[d].stride >= span;
      span += dim[d].stride * (dim[d].size - 1);
    }
  }
};

// What is left of an extent below its first `depth` dimensions.
struct ExtentPart {
  const Extent& extent;
  int depth;
  int64_t span;

  const Extent::Dim* widest() const { return depth < extent.dims ? &extent.dim[depth] : nullptr; }
  ExtentPart below() const {
    const Extent::Dim& dim = extent.dim[depth];
    return {extent, depth + 1, span - dim.stride * (dim.size - 1)};
  }
};

inline int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b != 0 && a % b < 0); }

// Whether `a` at 0 and `b` at `distance` have a byte in common; true if that is not known.
inline bool parts_meet(const ExtentPart& a, const ExtentPart& b, int64_t distance) {
  constexpr int64_t kFewCopies = 64;
  if (distance >= a.span || -distance >= b.span) return false;
  const Extent::Dim* const a_dim = a.widest();
  const Extent::Dim* const b_dim = b.widest();
  if (a_dim == nullptr && b_dim == nullptr) return true;
  if (a_dim != nullptr && b_dim != nullptr && a_dim->stride == b_dim->stride) {
    // Copy i of a meets copy k of b only where the inner parts, k - i strides nearer, do.
    const int64_t stride = a_dim->stride;
    const ExtentPart a_inner = a.below(), b_inner = b.below();
    const int64_t first =
        std::max(-floor_divide(distance + b_inner.span - 1, stride), 1 - a_dim->size);
    const int64_t last =
        std::min(floor_divide(a_inner.span - 1 - distance, stride), b_dim->size - 1);
    for (int64_t step = first; step <= last; ++step) {
      if (parts_meet(a_inner, b_inner, distance + step * stride)) return true;
    }
    return false;
  }
  // Only one of them repeats at this stride: its copies one by one, if they are few.
  const bool a_repeats = b_dim == nullptr || (a_dim != nullptr && a_dim->stride > b_dim->stride);
  const Extent::Dim& wide = a_repeats ? *a_dim : *b_dim;
  if (wide.size > kFewCopies) return true;
  for (int64_t i = 0; i < wide.size; ++i) {
    if (a_repeats ? parts_meet(a.below(), b, distance - i * wide.stride)
                  : parts_meet(a, b.below(), distance + i * wide.stride)) {
      return true;
    }
  }
  return false;
}

inline bool extents_meet(const Extent& a, const Extent& b) {
  return !(a.nested && b.nested) || parts_meet({a, 0, a.span}, {b, 0, b.span}, b.start - a.start);
}

// Tensors of one call: those it writes, which must share memory with nothing, and those it reads.
class MemoryCheck {
 public:
  void write(const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(!(c10::GradMode::is_enabled() && tensor.requires_grad()),
                      "expected no tensor that requires gradients to be written in place");
    add(tensor, true);
  }
  void read(const at::Tensor& tensor) { add(tensor, false); }

  // Throws ValueError at the first overlap.
  void finish() {
    std::vector<const Entry*> order;
    order.reserve(entries_.size());
    for (const Entry& entry : entries_) order.push_back(&entry);
    std::sort(order.begin(), order.end(),
              [](const Entry* a, const Entry* b) { return a->extent.start < b->extent.start; });
    std::vector<const Entry*> open;
    for (const Entry* entry : order) {
      TORCH_CHECK_VALUE(!entry->written || entry->extent.nested,
                        "expected every element of a tensor that is written in memory of its own");
      const int64_t start = entry->extent.start;
      open.erase(std::remove_if(open.begin(), open.end(),
                                [start](const Entry* other) {
                                  return other->extent.start + other->extent.span <= start;
                                }),
                 open.end());
      for (const Entry* other : open) {
        TORCH_CHECK_VALUE(
            !(entry->written || other->written) || !extents_meet(other->extent, entry->extent),
            "expected tensors that are written in memory apart from all others, got an overlap");
      }
      open.push_back(entry);
    }
  }

 private:
  struct Entry {
    Extent extent;
    bool written;
  };

  void add(const at::Tensor& tensor, bool written) {
    TORCH_CHECK_VALUE(tensor.dim() <= Extent::kMostDims, "expected at most ", Extent::kMostDims,
                      " dimensions, got shape ", tensor.sizes());
    if (tensor.numel() > 0) entries_.push_back({Extent(tensor), written});
  }

  std::vector<Entry> entries_;
};

}  // namespace mem1
