"""The CUDA kernels as nvcc compiles them for Hopper: no spills, no local memory, wide accesses."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SM_90A = "-gencode=arch=compute_90a,code=sm_90a"

# One translation unit a header: what its .cu launches (the larger parameter block once: it changes
# nothing but offsets).
UNITS = {
    "prune_kv": """
#include "cuda/prune_kv.cuh"
namespace mem1::cuda {
#define DENSE(Key, ordered, most) \\
  template __global__ void prune_kv_kernel<Key, ordered, most>( \\
      const __grid_constant__ PruneParams<most>);
#define ORDERS(Key, most) DENSE(Key, false, most) DENSE(Key, true, most)
ORDERS(NoKey, 64) ORDERS(FloatKey, 64) ORDERS(HalfKey, 64) ORDERS(BFloat16Key, 64)
ORDERS(NoKey, 512)
template __global__ void prune_paged_kv_kernel<64>(const __grid_constant__ PagedPruneParams<64>);
template __global__ void prune_paged_kv_kernel<512>(const __grid_constant__ PagedPruneParams<512>);
}
""",
}
KERNELS = {"prune_kv": 12}


@pytest.mark.parametrize("name", UNITS)
def test_no_spills_no_local_memory_wide_accesses(name: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    source, cubin = tmp_path / "unit.cu", tmp_path / "unit.cubin"
    source.write_text(UNITS[name])
    command = [nvcc, "-std=c++17", "-O3", SM_90A, "-cubin", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    result = subprocess.run(
        [*command, str(source), "-o", str(cubin)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    said = re.split(r"Compiling entry function '(\w+)'", result.stderr)[1:]
    kernels = dict(zip(said[::2], said[1::2], strict=True))
    assert len(kernels) == KERNELS[name]
    for kernel, text in kernels.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text, kernel
        registers = re.search(r"Used \d+ registers", text)
        print(kernel, registers[0] if registers else text)

    code = machine_code(cubin)
    assert code.keys() == kernels.keys()
    for kernel, text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text), f"{kernel} uses local memory"
        assert re.search(r"\bLDG\.E\.128", text), f"{kernel} reads no 16 bytes at a time"
        assert re.search(r"\bSTG\.E\.128", text), f"{kernel} writes no 16 bytes at a time"


def machine_code(cubin: Path) -> dict[str, str]:
    """Each kernel's SASS."""
    nvdisasm = shutil.which("nvdisasm")
    if nvdisasm is None:
        backend = pytest.importorskip("triton.backends.nvidia", reason="needs nvdisasm")
        nvdisasm = str(Path(backend.__path__[0]) / "bin" / "nvdisasm")
    code = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True)
    sections = re.split(r"\.section\s+\.text\.(\w+)", code.stdout)[1:]
    return dict(zip(sections[::2], sections[1::2], strict=True))
