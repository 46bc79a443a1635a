"""Builds ``mem1_kernels._C`` with ninja, against the torch that is installed.

`MEM1_BUILD_CUDA` decides on CUDA: `auto` (default) looks for nvcc and a CUDA torch and prints what
it decided, `0` never builds it, `1` fails where it cannot. `TORCH_CUDA_ARCH_LIST` overrides the
architectures. `MEM1_TORCH_IN_VERSION=1` names the torch in the version, for wheels that are given
away: `0.2.0+torch2.13`. Run it as `pip install --no-build-isolation .`; to rebuild what changed,
`python setup.py build_ext --inplace`. An sdist needs no torch.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    MISSING = str(error)
    TorchBuildExtension = build_ext
else:
    MISSING = None
    TorchBuildExtension = cpp_extension.BuildExtension

# Where pip puts ninja: on PATH only while the environment is activated.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])

ROOT = Path(__file__).resolve().parent
SOURCE_LIST = ROOT / "csrc" / "sources.txt"
DEFAULT_CUDA_ARCHS = "8.0+PTX;9.0a"
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
SIMD_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512_FLAGS,
    "avx512bf16": [*AVX512_FLAGS, "-mavx512bf16"],
    "amx": [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
CXX_FLAGS = ["-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# at::parallel_for is a header template: without this flag it runs on one thread.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []


def read_sources() -> list[str]:
    """The files named in csrc/sources.txt, in order."""
    lines = (line.strip() for line in SOURCE_LIST.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def simd_level(source: str) -> str | None:
    """The SIMD level that a file name's suffix asks for, or None."""
    suffix = Path(source).stem.rpartition("_")[2]
    return suffix if suffix in SIMD_FLAGS else None


def compiler() -> list[str]:
    """The C++ compiler's command, as torch's build chooses it."""
    return os.environ.get("CXX", "c++").split()


def compiler_accepts(flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("int main() { return 0; }\n")
        command = [*compiler(), *flags, "-c", str(probe), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def buildable_simd_levels(sources: list[str]) -> list[str]:
    """Levels that the list asks for and that this machine's compiler can build."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    wanted = {simd_level(source) for source in sources}
    return [
        name for name, flags in SIMD_FLAGS.items() if name in wanted and compiler_accepts(flags)
    ]


def nvcc_version() -> str | None:
    """nvcc's release, such as "13.0", or None where there is no nvcc."""
    home = cpp_extension.CUDA_HOME
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else None


def decide_cuda(
    choice: str, torch_cuda: str | None, nvcc: str | None, cuda_sources: list[str]
) -> tuple[bool, str]:
    """Whether to build the CUDA sources, and why.

    Raises SystemExit for a choice other than auto, 0 and 1, and where 1 cannot be met.
    """
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"MEM1_BUILD_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return False, "MEM1_BUILD_CUDA=0"
    if not cuda_sources:
        obstacle = "csrc/sources.txt lists no .cu file"
    elif torch_cuda is None:
        obstacle = f"torch {torch.__version__} has no CUDA"
    elif nvcc is None:
        obstacle = "nvcc was not found (neither CUDA_HOME nor PATH leads to it)"
    elif nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        obstacle = f"nvcc is {nvcc} but torch was built with CUDA {torch_cuda}"
    else:
        return True, f"nvcc {nvcc}, torch with CUDA {torch_cuda}"
    if choice == "1":
        raise SystemExit(f"MEM1_BUILD_CUDA=1 cannot be met: {obstacle}")
    return False, obstacle


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def build_config(sources: list[str], simd_levels: list[str], cuda_archs: str) -> str:
    """The text of mem1_build_config.h, which CMakeLists.txt writes alike."""
    lines = ["#pragma once", ""]
    lines += [f"#define MEM1_SIMD_{level.upper()} 1" for level in simd_levels]
    lines += [f'#define MEM1_SOURCES "{" ".join(sources)}"']
    lines += [f'#define MEM1_CUDA_ARCHS "{cuda_archs.replace(";", " ")}"']
    return "\n".join(lines) + "\n"


def version_suffix() -> str:
    """`+torch2.13` on a wheel, where MEM1_TORCH_IN_VERSION asks for it: the torch built against."""
    choice = os.environ.get("MEM1_TORCH_IN_VERSION", "0")
    if choice not in ("0", "1"):
        raise SystemExit(f"MEM1_TORCH_IN_VERSION: expected 0 or 1, got {choice!r}")
    if choice == "0" or MISSING is not None or "sdist" in sys.argv:
        return ""
    return "+torch" + ".".join(torch.__version__.split(".")[:2])


class EggInfo(egg_info):
    """The version of __init__.py, and the torch built against where MEM1_TORCH_IN_VERSION asks."""

    def finalize_options(self) -> None:
        self.tag_build = version_suffix()
        super().finalize_options()


class BuildPython(build_py):
    """Modules that have left the source leave the build folder too, and so every later wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "mem1_kernels"), ignore_errors=True)
        super().run()


class BuildExtension(TorchBuildExtension):
    """torch's ninja build, plus the flags of each file's SIMD level."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # For an editable install pip names a fresh folder each time; a fixed one rebuilds less.
        self.build_temp = str(ROOT / "build" / f"setup-{sys.implementation.cache_tag}")

    def run(self) -> None:
        if MISSING is not None:
            raise SystemExit(
                f"mem1_kernels builds against the torch you have: {MISSING}.\n"
                "Install torch, setuptools, ninja and pybind11, and give pip --no-build-isolation."
            )
        super().run()

    def build_extension(self, ext: Extension) -> None:
        for level, flags in SIMD_FLAGS.items():
            sources = [source for source in ext.sources if simd_level(source) == level]
            if not sources:
                continue
            arguments = {**ext.extra_compile_args}
            arguments["cxx"] = [*arguments["cxx"], *flags]
            ext.extra_objects += self.compiler.compile(
                sources,
                output_dir=os.path.join(self.build_temp, level),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                debug=self.debug,
                extra_postargs=arguments,
                depends=ext.depends,
            )
        ext.sources = [source for source in ext.sources if simd_level(source) is None]
        super().build_extension(ext)


def extensions() -> list[Extension]:
    """`mem1_kernels._C`, or nothing where there is no C++ compiler: the package works without."""
    listed = read_sources()
    if MISSING is not None:
        return [Extension("mem1_kernels._C", listed)]
    choice = os.environ.get("MEM1_BUILD_CUDA", "auto")
    with_cuda, reason = decide_cuda(
        choice,
        torch.version.cuda,
        nvcc_version(),
        [source for source in listed if source.endswith(".cu")],
    )
    if shutil.which(compiler()[0]) is None:
        obstacle = f"the C++ compiler {compiler()[0]} was not found"
        if choice == "1":
            raise SystemExit(f"MEM1_BUILD_CUDA=1 cannot be met: {obstacle}")
        print(f"mem1_kernels: no extension, CPU ops will run plain torch: {obstacle}")
        return []
    archs = ""
    if with_cuda:
        archs = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)
    levels = buildable_simd_levels(listed)
    sources = [
        source
        for source in listed
        if simd_level(source) in (None, *levels) and (with_cuda or not source.endswith(".cu"))
    ]
    cuda_words = f"CUDA on for {archs}" if with_cuda else "CUDA off"
    print(f"mem1_kernels: {cuda_words}: {reason}; SIMD levels: {', '.join(['default', *levels])}")

    generated = ROOT / "build" / f"setup-{sys.implementation.cache_tag}" / "generated"
    write_if_changed(generated / "mem1_build_config.h", build_config(sources, levels, archs))
    make_extension = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    compiled = make_extension(
        "mem1_kernels._C",
        sources,
        # pybind11's own headers go before torch's copy: _C passes plain values only, so it need
        # not match torch's, and an older torch's copy may not know a newer Python.
        include_dirs=[str(ROOT / "csrc"), str(generated), pybind11.get_include()],
        define_macros=[("MEM1_WITH_CUDA", "1")] if with_cuda else [],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *OPENMP_FLAGS],
            "nvcc": ["-O3", "-lineinfo", "-Xcompiler", "-fvisibility=hidden"],
        },
        extra_link_args=OPENMP_FLAGS,
    )
    return [compiled]


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython, "egg_info": EggInfo},
    )
