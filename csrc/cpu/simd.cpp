#include "cpu/simd.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace mem1::cpu {
namespace {

constexpr SimdLevel kLevels[] = {SimdLevel::kDefault, SimdLevel::kAvx2, SimdLevel::kAvx512,
                                 SimdLevel::kAvx512Bf16};

bool is_compiled(SimdLevel level) {
  switch (level) {
    case SimdLevel::kDefault:
      return true;
    case SimdLevel::kAvx2:
#ifdef MEM1_SIMD_AVX2
      return true;
#else
      return false;
#endif
    case SimdLevel::kAvx512:
#ifdef MEM1_SIMD_AVX512
      return true;
#else
      return false;
#endif
    case SimdLevel::kAvx512Bf16:
#ifdef MEM1_SIMD_AVX512BF16
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool cpu_has(SimdLevel level) {
  if (level == SimdLevel::kDefault) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (level) {
    case SimdLevel::kDefault:
      return true;
    case SimdLevel::kAvx2:
      return avx2;
    case SimdLevel::kAvx512:
      return avx512;
    case SimdLevel::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return false;
}

SimdLevel allowed_by_environment() {
  const char* value = std::getenv("MEM1_SIMD");
  if (value == nullptr || *value == '\0') return SimdLevel::kAvx512Bf16;
  for (SimdLevel level : kLevels) {
    if (std::string_view(value) == simd_name(level)) return level;
  }
  TORCH_CHECK_VALUE(false, "MEM1_SIMD: expected default, avx2, avx512 or avx512bf16, got '", value,
                    "'");
}

SimdLevel choose() {
  const SimdLevel allowed = allowed_by_environment();
  SimdLevel best = SimdLevel::kDefault;
  for (SimdLevel level : kLevels) {
    if (level <= allowed && is_compiled(level) && cpu_has(level)) best = level;
  }
  return best;
}

}  // namespace

const char* simd_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kDefault:
      return "default";
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAvx512Bf16:
      return "avx512bf16";
  }
  return "unknown";
}

SimdLevel simd_level() {
  static const SimdLevel level = choose();
  return level;
}

std::vector<SimdLevel> compiled_simd_levels() {
  std::vector<SimdLevel> levels;
  for (SimdLevel level : kLevels) {
    if (is_compiled(level)) levels.push_back(level);
  }
  return levels;
}

}  // namespace mem1::cpu
