// Registers the compiled kernels for the `mem1::` schemas that mem1_kernels/ops/_library.py
// declares. In module _C it also binds functions that are not tensor ops: what this build contains.
#include "ops.h"

#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <exception>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/simd.h"
#include "mem1_build_config.h"

namespace {

// ops/_extension.py reads this from the file, to recognize the build without loading the module.
__attribute__((used)) constexpr char kBuiltAgainst[] =
    "mem1_kernels._C is built against torch " TORCH_VERSION;

using OpNames = std::map<std::string, std::vector<std::string>>;

OpNames& compiled_ops() {
  static OpNames names{{"CPU", {}}, {"CUDA", {}}};
  return names;
}

template <typename Function>
void add(torch::Library& library, const char* backend, const char* name, Function* function) {
  library.impl(name, function);
  compiled_ops()[backend].emplace_back(name);
}

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
}

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  std::vector<std::string> levels;
  for (auto level : mem1::cpu::compiled_simd_levels())
    levels.push_back(mem1::cpu::simd_name(level));
#ifdef _OPENMP
  const bool openmp = true;
#else
  const bool openmp = false;
#endif
  pybind11::dict info;
  info["sources"] = words(MEM1_SOURCES);
  info["ops"] = compiled_ops();
  info["cuda_archs"] = words(MEM1_CUDA_ARCHS);
  info["compiler"] = compiler();
  info["torch"] = TORCH_VERSION;
  info["simd_compiled"] = levels;
  info["simd"] = mem1::cpu::simd_name(mem1::cpu::simd_level());
  info["simd_reason"] = mem1::cpu::simd_choice().reason;
  info["openmp"] = openmp;
  return info;
}

}  // namespace

TORCH_LIBRARY_IMPL(mem1, CPU, library) {
  add(library, "CPU", "block_plan", &mem1::block_plan_cpu);
  add(library, "CPU", "trajectory_attention_fwd", &mem1::trajectory_attention_fwd_cpu);
  add(library, "CPU", "trajectory_attention_bwd", &mem1::trajectory_attention_bwd_cpu);
  add(library, "CPU", "append_kv_", &mem1::append_kv_cpu);
  add(library, "CPU", "cached_attention", &mem1::cached_attention_cpu);
  add(library, "CPU", "prune_kv_", &mem1::prune_kv_cpu);
  add(library, "CPU", "prune_paged_kv_", &mem1::prune_paged_kv_cpu);
  add(library, "CPU", "move_slots_", &mem1::move_slots_cpu);
}

#ifdef MEM1_WITH_CUDA
TORCH_LIBRARY_IMPL(mem1, CUDA, library) {
  add(library, "CUDA", "prune_kv_", &mem1::prune_kv_cuda);
  add(library, "CUDA", "prune_paged_kv_", &mem1::prune_paged_kv_cuda);
}
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of mem1_kernels; its tensor ops are under torch.ops.mem1.";
  // Inside a tensor op torch does this.
  pybind11::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const c10::ValueError& error) {
      PyErr_SetString(PyExc_ValueError, error.what_without_backtrace());
    }
  });
  m.def("build_info", &build_info,
        "What this module was built from and what it uses on this CPU: a dict with sources, ops "
        "(names by backend), cuda_archs, compiler, torch (version built against), simd_compiled, "
        "simd (the level in use), simd_reason and openmp.");
}
