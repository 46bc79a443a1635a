// Argument checks whose messages name the argument, the expected and the got.
// A wrong dtype raises TypeError, everything else ValueError.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <initializer_list>

namespace mem1 {

inline void check_dtype(const at::Tensor& tensor, const char* name, at::ScalarType expected) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, name, ": expected dtype ", expected, ", got ",
                   tensor.scalar_type());
}

// fp32, fp16 or bf16: what every kernel here computes on.
inline void check_activation_dtype(const at::Tensor& tensor, const char* name) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, name,
                   ": expected dtype Float, Half or BFloat16, got ", dtype);
}

// `layout` spells the dimensions, such as "[batch, tokens, heads, head_dim]".
inline void check_dim(const at::Tensor& tensor, const char* name, int64_t expected,
                      const char* layout) {
  TORCH_CHECK_VALUE(tensor.dim() == expected, name, ": expected ", expected, " dimensions ", layout,
                    ", got shape ", tensor.sizes());
}

inline void check_shape(const at::Tensor& tensor, const char* name, at::IntArrayRef expected,
                        const char* layout) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, name, ": expected shape ", expected, " ", layout,
                    ", got ", tensor.sizes());
}

inline void check_shape(const at::Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> expected, const char* layout) {
  check_shape(tensor, name, at::IntArrayRef(expected), layout);
}

// Same device as `reference`, which the message calls `reference_name`.
inline void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& reference,
                         const char* reference_name) {
  TORCH_CHECK_VALUE(tensor.device() == reference.device(), name, ": expected device ",
                    reference.device(), " (that of ", reference_name, "), got ", tensor.device());
}

inline void check_last_dim_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() > 0 && (tensor.size(-1) <= 1 || tensor.stride(-1) == 1), name,
                    ": expected a contiguous last dimension, got strides ", tensor.strides(),
                    " for shape ", tensor.sizes());
}

inline void check_contiguous(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ",
                    tensor.strides(), " for shape ", tensor.sizes());
}

}  // namespace mem1
