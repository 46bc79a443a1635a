// Maps a tensor's dtype to the element type of the kernels.
#pragma once

#include <c10/core/ScalarType.h>

#include "cpu/float_types.h"

namespace mem1::cpu {

// For a dtype that check_activation_dtype accepts.
inline ElementType element_type(at::ScalarType dtype) {
  if (dtype == at::kFloat) return ElementType::kFloat;
  return dtype == at::kHalf ? ElementType::kHalf : ElementType::kBFloat16;
}

}  // namespace mem1::cpu
