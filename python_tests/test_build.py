"""The build: one list of sources, SIMD flags by suffix, MEM1_BUILD_CUDA, what _C says of itself."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mem1_kernels.ops import _library

ROOT = Path(__file__).resolve().parents[1]
needs_extension = pytest.mark.skipif(not _library.HAS_EXTENSION, reason="extension not built")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("mem1_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_setup(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def ask_extension(expression: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Prints `expression` of `info = _C.build_info()` in a new process."""
    code = (
        "import mem1_kernels\nfrom mem1_kernels import _C\n"
        f"info = _C.build_info()\nprint({expression})"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_every_source_is_listed_once(build):
    on_disk = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.cpp", "*.cu")
        for path in (ROOT / "csrc").rglob(pattern)
    }
    listed = build.read_sources()
    assert sorted(listed) == sorted(on_disk)


@pytest.mark.parametrize(
    ("source", "level"),
    [
        ("csrc/cpu/attention_avx2.cpp", "avx2"),
        ("csrc/cpu/attention_avx512.cpp", "avx512"),
        ("csrc/cpu/attention_avx512bf16.cpp", "avx512bf16"),
        ("csrc/cpu/attention_amx.cpp", "amx"),
        ("csrc/cpu/attention_amx_kernel.h", None),
        ("csrc/cpu/attention_default.cpp", None),
        ("csrc/cpu/avx2.cpp", "avx2"),
        ("csrc/ops.cpp", None),
    ],
)
def test_simd_level_is_the_suffix(build, source, level):
    assert build.simd_level(source) == level


@pytest.mark.parametrize(
    ("choice", "torch_cuda", "nvcc", "sources", "expected", "reason"),
    [
        ("auto", "13.0", "13.0", ["a.cu"], True, "nvcc 13.0, torch with CUDA 13.0"),
        ("1", "13.0", "13.2", ["a.cu"], True, "nvcc 13.2"),
        ("0", "13.0", "13.0", ["a.cu"], False, "MEM1_BUILD_CUDA=0"),
        ("auto", None, "13.0", ["a.cu"], False, "has no CUDA"),
        ("auto", "13.0", None, ["a.cu"], False, "nvcc was not found"),
        (
            "auto",
            "12.8",
            "13.0",
            ["a.cu"],
            False,
            "nvcc is 13.0 but torch was built with CUDA 12.8",
        ),
        ("auto", "13.0", "13.0", [], False, "lists no .cu file"),
    ],
)
def test_cuda_decision(build, choice, torch_cuda, nvcc, sources, expected, reason):
    decision, why = build.decide_cuda(choice, torch_cuda, nvcc, sources)
    assert decision is expected
    assert reason in why


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "sources", "reason"),
    [
        (None, "13.0", ["a.cu"], "has no CUDA"),
        ("13.0", None, ["a.cu"], "nvcc was not found"),
        ("12.8", "13.0", ["a.cu"], "nvcc is 13.0"),
        ("13.0", "13.0", [], "lists no .cu file"),
    ],
)
def test_demanded_cuda_fails_hard(build, torch_cuda, nvcc, sources, reason):
    with pytest.raises(SystemExit, match=f"MEM1_BUILD_CUDA=1 cannot be met: .*{reason}"):
        build.decide_cuda("1", torch_cuda, nvcc, sources)


@pytest.mark.parametrize("choice", ["", "2"])
def test_other_values_of_build_cuda_are_rejected(choice):
    result = run_setup(MEM1_BUILD_CUDA=choice)
    assert result.returncode != 0
    assert f"MEM1_BUILD_CUDA: expected auto, 0 or 1, got {choice!r}" in result.stderr


def test_setup_says_what_it_decided():
    result = run_setup(MEM1_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "CUDA off: MEM1_BUILD_CUDA=0" in result.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_setup_fails_where_demanded_cuda_cannot_be():
    result = run_setup(MEM1_BUILD_CUDA="1")
    assert result.returncode != 0
    assert "MEM1_BUILD_CUDA=1 cannot be met" in result.stderr


def test_setup_goes_on_without_a_compiler():
    result = run_setup(MEM1_BUILD_CUDA="auto", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert "no extension, CPU ops will run plain torch: the C++ compiler no-such-compiler" in (
        result.stdout
    )


@pytest.fixture(scope="module")
def cmake_commands(tmp_path_factory) -> Iterator[dict[str, list[str]]]:
    """The compile command of each source as CMake has it."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    folder = tmp_path_factory.mktemp("cmake")
    result = subprocess.run(
        [
            *("cmake", "-S", str(ROOT), "-B", str(folder)),
            f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        env={**os.environ, "MEM1_BUILD_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    if torch.version.cuda and "cannot find the CUDA" in result.stderr:
        pytest.skip("torch's CMake package wants the CUDA toolkit that its torch was built with")
    assert result.returncode == 0, result.stdout + result.stderr
    entries = json.loads((folder / "compile_commands.json").read_text())
    commands = {
        Path(entry["file"]).relative_to(ROOT).as_posix(): shlex.split(entry["command"])
        for entry in entries
    }
    assert len(commands) == len(entries)
    commands["mem1_build_config.h"] = (
        (folder / "generated" / "mem1_build_config.h").read_text().split()
    )
    yield commands
    shutil.rmtree(folder)


def test_cmake_builds_what_setup_builds(build, cmake_commands):
    listed = [source for source in build.read_sources() if not source.endswith(".cu")]
    levels = build.buildable_simd_levels(listed)
    sources = [source for source in listed if build.simd_level(source) in (None, *levels)]
    config = cmake_commands["mem1_build_config.h"]
    assert config == build.build_config(sources, levels, "").split()
    assert cmake_commands.keys() - {"mem1_build_config.h"} == set(sources)
    for source in sources:
        machine_flags = [flag for flag in cmake_commands[source] if flag.startswith("-m")]
        level = build.simd_level(source)
        assert machine_flags == (build.SIMD_FLAGS[level] if level else [])
        for flag in ("-O3", "-fno-math-errno", "-fno-trapping-math", *build.OPENMP_FLAGS):
            assert flag in cmake_commands[source]


def test_cmake_rejects_other_values_of_build_cuda(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    result = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path)],
        env={**os.environ, "MEM1_BUILD_CUDA": "yes"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "expected auto, 0 or 1, got 'yes'" in result.stderr


def test_simd_objects_define_no_symbol_that_others_share(build):
    """The linker may keep an AVX-512 copy of an inline function for the whole module."""
    objects = ROOT / "build" / f"setup-{sys.implementation.cache_tag}"
    found = {level: sorted((objects / level).rglob("*.o")) for level in build.SIMD_FLAGS}
    if not any(found.values()):
        pytest.skip("no SIMD objects of setup.py are at hand")
    for level, paths in found.items():
        for path in paths:
            listing = subprocess.run(
                ["nm", "-C", "--defined-only", str(path)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines()]
            shared = [name for kind, name in symbols if kind in "WVu" and level not in name]
            assert not shared, f"{path.name} defines {shared}"


@needs_extension
def test_build_info_names_the_listed_sources(build):
    from mem1_kernels import _C

    info = _C.build_info()
    listed = build.read_sources()
    assert set(info["sources"]) <= set(listed)
    left_out = [source for source in listed if source not in info["sources"]]
    for source in left_out:
        cuda_off = source.endswith(".cu") and not info["cuda_archs"]
        assert cuda_off or build.simd_level(source) not in (None, *info["simd_compiled"])
    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["simd"] in info["simd_compiled"]
    assert info["simd_compiled"][0] == "default"


@needs_extension
def test_build_info_names_ops_that_the_dispatcher_has():
    from mem1_kernels import _C

    for backend, names in _C.build_info()["ops"].items():
        for name in names:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mem1::{name}", backend)
            assert _library.implementations[name, backend].startswith("mem1_kernels._C")


@needs_extension
def test_simd_level_can_be_lowered():
    from mem1_kernels import _C

    for level in _C.build_info()["simd_compiled"]:
        result = ask_extension("info['simd']", MEM1_SIMD=level)
        assert result.returncode == 0, result.stderr
        order = ["default", "avx2", "avx512", "avx512bf16", "amx"]
        assert order.index(result.stdout.strip()) <= order.index(level)


# Makes the Linux kernel refuse arch_prctl(ARCH_REQ_XCOMP_PERM, ...), as one without AMX does.
REFUSE_TILE_REGISTERS = """
import ctypes, struct
def bpf(code, true, false, k):
    return struct.pack("HBBI", code, true, false, k)
load, equals, answer = 0x20, 0x15, 0x06
program = b"".join([
    bpf(load, 0, 0, 0),              # the number of the system call
    bpf(equals, 0, 3, 158),          # arch_prctl
    bpf(load, 0, 0, 16),             # its first argument
    bpf(equals, 0, 1, 0x1023),       # ARCH_REQ_XCOMP_PERM
    bpf(answer, 0, 0, 0x00050001),   # fails with EPERM
    bpf(answer, 0, 0, 0x7FFF0000),   # is let through
])
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_char_p)]
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0
assert prctl(22, 2, ctypes.byref(Filter(len(program) // 8, program)), 0, 0) == 0
"""


def cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    return set(path.read_text().split()) if path.exists() else set()


@needs_extension
@pytest.mark.skipif("amx_bf16" not in cpu_flags(), reason="the CPU has no AMX")
def test_refused_tile_registers_leave_the_next_level_and_the_reason():
    code = REFUSE_TILE_REGISTERS + (
        "import torch\n"
        "from mem1_kernels import BlockPlan, _C, trajectory_attention\n"
        "info = _C.build_info()\n"
        "query = torch.ones(1, 40, 1, 16, dtype=torch.bfloat16)\n"
        "plan = BlockPlan.from_expiry(torch.full((40,), 40))\n"
        "assert (trajectory_attention(query, query, query, plan=plan) == 1).all()\n"
        "print(info['simd'], '-', info['simd_reason'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MEM1_SIMD"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    refusal = "amx: the operating system refuses the tile registers: Operation not permitted"
    if "GenuineIntel" in cpu_flags():
        slower = "avx512bf16: slower than avx512 on CPUs of Intel"
        assert result.stdout.strip() == f"avx512 - {refusal}; {slower}"
    else:
        assert result.stdout.strip() == f"avx512bf16 - {refusal}"


@needs_extension
def test_simd_level_comes_with_its_reason():
    assert ask_extension("info['simd_reason']", MEM1_SIMD="avx2").stdout.strip()
    assert ask_extension("info['simd_reason']", MEM1_SIMD="default").stdout == "MEM1_SIMD=default\n"


@needs_extension
def test_unknown_simd_level_is_rejected():
    result = ask_extension("info['simd']", MEM1_SIMD="sse9")
    assert result.returncode != 0
    expected = "MEM1_SIMD: expected default, avx2, avx512, avx512bf16 or amx, got 'sse9'"
    assert f"ValueError: {expected}" in result.stderr
