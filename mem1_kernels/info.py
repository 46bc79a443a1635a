"""`python -m mem1_kernels.info`: versions, devices, which implementation each op uses and why."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

import mem1_kernels
from mem1_kernels.ops import _library
from mem1_kernels.ops._extension import REBUILD

PACKAGES = ("torch", "triton", "transformers", "numpy", "flash-attn")


def versions() -> dict[str, str]:
    """The version of Python, of this package and of each package it builds on, or "not installed".

    >>> versions()["mem1_kernels"] == mem1_kernels.__version__
    True
    """
    found = {"mem1_kernels": mem1_kernels.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__
    return found


def devices() -> dict[str, str]:
    """What each device that torch sees is, by torch's name for it.

    >>> "threads" in devices()["cpu"]
    True
    """
    found = {
        "cpu": f"{platform.machine()}, {os.cpu_count()} logical cores, "
        f"{torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return found


def extension() -> dict[str, str]:
    """What `mem1_kernels._C` was built from and what it uses here; {} where it is not loaded.

    >>> set(extension()) in (set(), {"torch", "compiler", "SIMD", "threads", "CUDA", "sources"})
    True
    """
    if not _library.HAS_EXTENSION:
        return {}
    from mem1_kernels import _C

    built = _C.build_info()
    return {
        "torch": f"built against {built['torch']}",
        "compiler": built["compiler"],
        "SIMD": f"{built['simd']} in use ({built['simd_reason']}), "
        f"of {', '.join(built['simd_compiled'])}",
        "threads": "OpenMP, as many as torch uses" if built["openmp"] else "one (no OpenMP)",
        "CUDA": ", ".join(built["cuda_archs"]) or "not built",
        "sources": ", ".join(built["sources"]),
    }


def operators() -> dict[str, dict[str, str]]:
    """Which implementation serves each operator on each device: `{op: {device: implementation}}`.

    >>> sorted(operators()["trajectory_attention_fwd"])
    ['CPU', 'CUDA']
    """
    table: dict[str, dict[str, str]] = {}
    for (op, device), implementation in _library.implementations.items():
        table.setdefault(op, {})[device] = implementation
    return table


def report() -> str:
    """All of it as text.

    >>> print(report().splitlines()[0])
    versions
    """
    built = extension() or {"not loaded": f"{_library.OBSTACLE}; to build it: {REBUILD}"}
    sections = [("versions", versions()), ("devices", devices()), ("extension _C", built)]
    for op, by_device in operators().items():
        sections.append((f"op {op}", by_device))
    lines = []
    for title, entries in sections:
        lines.append(title)
        lines += [f"  {name:<13} {value}" for name, value in entries.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
