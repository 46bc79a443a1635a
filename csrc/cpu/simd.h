// SIMD levels: which ones this build holds, and which one the running CPU gets.
//
// A kernel that wants several levels is one header, included by <name>_default.cpp,
// <name>_avx2.cpp and <name>_avx512.cpp, each in a namespace of its own. These files must not
// include torch or the standard containers: an inline function compiled there with AVX-512 could be
// the copy that the linker keeps for the whole module, and would then fault on an older CPU.
#pragma once

#include <string>
#include <vector>

#include "mem1_build_config.h"  // MEM1_SIMD_AVX2, MEM1_SIMD_AVX512, ...: levels in this build

namespace mem1::cpu {

enum class SimdLevel { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

struct SimdChoice {
  SimdLevel level;
  std::string reason;  // why no higher compiled level, or that this is the highest
};

// The highest level that is compiled, that the CPU and the kernel of the operating system grant,
// and that is not slower there than a lower one. The environment variable MEM1_SIMD (default, avx2,
// avx512, avx512bf16 or amx), if set, bounds the level; the level that it names is taken also where
// it is slower. Decided once. Throws ValueError for any other value of MEM1_SIMD.
const SimdChoice& simd_choice();

inline SimdLevel simd_level() { return simd_choice().level; }

const char* simd_name(SimdLevel level);

// In ascending order; kDefault is always there.
std::vector<SimdLevel> compiled_simd_levels();

}  // namespace mem1::cpu
