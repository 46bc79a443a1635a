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

enum class SimdLevel { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The highest level that is compiled, that the CPU has, and that the environment variable
// MEM1_SIMD (default, avx2, avx512 or avx512bf16), if set, allows. Decided once.
// Throws ValueError for any other value of MEM1_SIMD.
SimdLevel simd_level();

const char* simd_name(SimdLevel level);

// In ascending order; kDefault is always there.
std::vector<SimdLevel> compiled_simd_levels();

}  // namespace mem1::cpu
