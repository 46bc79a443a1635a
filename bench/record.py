"""Result files: what every benchmark writes, and how they are read again. Imports no torch.

A file is `{"environment": ..., "options": ..., "rows": [...]}`. The environment names the device,
its driver, the threads, the versions, the commit and the time (UTC). Files from before 2026-11-27
have neither `options` nor the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-attn-4", "flashinfer-python")


def output(*command: str) -> str | None:
    """What a command prints when run in the repository; None where it fails or is missing."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# Of the code that runs, even if something is committed while it does.
COMMIT = output("git", "describe", "--always", "--dirty")


def environment(device: str | None) -> dict[str, Any]:
    """Device, driver or SIMD level, versions, commit and time, as every result file has them.

    Args:
        device: "cpu" or "cuda"; None: nothing runs, code is only compiled.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": versions,
        "commit": COMMIT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device:
        import torch

        cuda = device == "cuda"
        record["device"] = torch.cuda.get_device_name() if cuda else _cpu_name()
        record["threads"] = torch.get_num_threads()
        if cuda:
            query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
            record["driver"] = output(*query)
            record["cuda"] = torch.version.cuda
        else:
            from mem1_kernels import info

            # "avx512 in use, of ..."; nothing without the extension.
            record["simd"] = info.extension().get("SIMD", "").partition(" ")[0] or None
    return record


def write_results(options: argparse.Namespace, device: str | None, **content: Any) -> None:
    """Writes `{"environment", "options", **content}` to `<out>/<name>.json`, if `--out` is given.

    Args:
        options: of the benchmark, with those of `bench.cli.make_parser`.
        device: see `environment`.
    """
    if options.out is None:
        return
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    said = {name: value for name, value in vars(options).items() if name not in ("out", "name")}
    record = {"environment": environment(device), "options": said, **content}
    (folder / f"{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")


@dataclass(frozen=True)
class Report:
    """One result file.

    Args:
        name: its path below the folder that it was read from, without the suffix.
        content: the JSON.
        stored: when it was committed (Unix seconds), where it comes from git; else None.
    """

    name: str
    content: dict[str, Any]
    stored: float | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content.get("rows", [])

    @property
    def environment(self) -> dict[str, Any]:
        return self.content.get("environment", {})

    @property
    def device(self) -> str:
        """The device and how it was used, in words."""
        threads = self.environment.get("threads")
        name = self.environment.get("device") or self.content.get("device")
        if name is None:
            capability = self.content.get("capability")
            return f"compiled for sm_{capability}, not run" if capability else "device not recorded"
        if name == "cpu":
            return "CPU, its model not recorded"
        # Threads matter on a CPU only.
        gpu = self.environment.get("cuda")
        if gpu or threads is None:
            return name
        return f"{name}, {threads} thread{'s' if threads > 1 else ''}"

    @property
    def commit(self) -> str:
        return self.environment.get("commit") or "commit not recorded"

    @property
    def versions(self) -> dict[str, str]:
        """Package to version, of the packages that were there."""
        said = self.environment.get("versions") or self.content
        return {name: said[name] for name in PACKAGES if said.get(name)}


def read_folder(folder: Path) -> list[Report]:
    """The JSON objects below a folder, by name."""
    found = {path: json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}
    return [
        Report(path.relative_to(folder).with_suffix("").as_posix(), content)
        for path, content in found.items()
        if isinstance(content, dict)
    ]


def _cpu_name() -> str:
    lines = output("lscpu") or ""
    names = [line.split(":", 1)[1].strip() for line in lines.splitlines() if "Model name" in line]
    return names[0] if names else platform.processor() or platform.machine()
