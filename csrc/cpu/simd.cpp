#include "cpu/simd.h"

#include <c10/util/Exception.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mem1::cpu {
namespace {

constexpr SimdLevel kLevels[] = {SimdLevel::kDefault, SimdLevel::kAvx2, SimdLevel::kAvx512,
                                 SimdLevel::kAvx512Bf16, SimdLevel::kAmx};
constexpr const char* kNotThere = "the CPU does not have it";

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
    case SimdLevel::kAmx:
#ifdef MEM1_SIMD_AMX
      return true;
#else
      return false;
#endif
  }
  return false;
}

// Asks the kernel to let this process use the tile registers, which most processes never do and
// which make each thread's saved state 8 KiB larger. Empty, or why not.
std::string request_tile_registers() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return kNotThere;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return std::string("the operating system refuses the tile registers: ") + std::strerror(errno);
#else
  return "on Linux and x86-64 only";
#endif
}

// Empty, or why the level cannot run here.
std::string obstacle(SimdLevel level) {
  if (level == SimdLevel::kDefault) return "";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  switch (level) {
    case SimdLevel::kDefault:
      return "";
    case SimdLevel::kAvx2:
      return avx2 ? "" : kNotThere;
    case SimdLevel::kAvx512:
      return avx512 ? "" : kNotThere;
    case SimdLevel::kAvx512Bf16:
      return avx512bf16 ? "" : kNotThere;
    case SimdLevel::kAmx:
      return avx512bf16 ? request_tile_registers() : kNotThere;
  }
#endif
  return kNotThere;
}

// Intel's dot products of bfloat16 pairs run at half the rate of fused multiply-adds, so that they
// gain nothing, and packing the pairs costs. AMD's run at the full rate.
bool is_slower(SimdLevel level) {
#if defined(__x86_64__)
  return level == SimdLevel::kAvx512Bf16 && __builtin_cpu_is("intel");
#else
  return false;
#endif
}

std::optional<SimdLevel> named_by_environment() {
  const char* value = std::getenv("MEM1_SIMD");
  if (value == nullptr || *value == '\0') return std::nullopt;
  for (SimdLevel level : kLevels) {
    if (std::string_view(value) == simd_name(level)) return level;
  }
  TORCH_CHECK_VALUE(false, "MEM1_SIMD: expected default, avx2, avx512, avx512bf16 or amx, got '",
                    value, "'");
}

SimdChoice choose() {
  const std::optional<SimdLevel> named = named_by_environment();
  std::string reason;
  const auto pass_over = [&](SimdLevel level, const std::string& why) {
    reason += (reason.empty() ? "" : "; ") + std::string(simd_name(level)) + ": " + why;
  };
  const std::vector<SimdLevel> levels = compiled_simd_levels();
  for (auto it = levels.rbegin(); it != levels.rend(); ++it) {
    const SimdLevel level = *it;
    if (named && level > *named) continue;
    const std::string why = obstacle(level);
    if (!why.empty()) {
      pass_over(level, why);
    } else if (named != level && is_slower(level)) {
      pass_over(level, "slower than avx512 on CPUs of Intel");
    } else {
      const std::string bound = named ? std::string("MEM1_SIMD=") + simd_name(*named) : "";
      if (reason.empty()) return {level, named ? bound : "the highest compiled"};
      return {level, named ? bound + "; " + reason : reason};
    }
  }
  return {SimdLevel::kDefault, reason};
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
    case SimdLevel::kAmx:
      return "amx";
  }
  return "unknown";
}

const SimdChoice& simd_choice() {
  static const SimdChoice choice = choose();
  return choice;
}

std::vector<SimdLevel> compiled_simd_levels() {
  std::vector<SimdLevel> levels;
  for (SimdLevel level : kLevels) {
    if (is_compiled(level)) levels.push_back(level);
  }
  return levels;
}

}  // namespace mem1::cpu
