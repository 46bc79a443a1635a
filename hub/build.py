"""Writes the hub kernel: `python hub/build.py build/hub`.

The source is `mem1_kernels/`: what `__init__.py` imports, and all of `ops/`. Hub kernels may not
import themselves by name, and every build registers its operators under a name of its own. So
absolute imports become relative ones and `mem1::` becomes the build's namespace.

The folder that comes out is a kernel-builder project, and its `build/` holds the two variants that
`kernels.get_local_kernel` loads.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

HUB = Path(__file__).resolve().parent
ROOT = HUB.parent
PACKAGE = "mem1_kernels"

# The hub kernel has no compiled code.
EXTENSION = '''"""A hub kernel has no compiled module: Triton on CUDA, plain torch on the CPU."""


def load() -> str:
    return "a hub kernel"
'''

# kernel-builder writes this file anew, to the same effect.
OPS = '''"""The operators of this build, in a namespace that no other build shares."""

import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{ops.name}}::{{op_name}}"
'''


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the hub kernel and its two variants.")
    parser.add_argument("out", type=Path, help="folder to write, for instance build/hub")
    build(parser.parse_args().out)


def build(out: Path) -> None:
    """Writes the kernel-builder project, with its built variants, into the folder `out`.

    Raises:
        FileExistsError: `out` holds something that is not an earlier build of this script.
    """
    if out.exists() and any(out.iterdir()) and not (out / "build.toml").exists():
        raise FileExistsError(f"{out}: expected a new folder or an earlier build, got other files")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(
        HUB,
        out,
        ignore=shutil.ignore_patterns("build.py", "transformers_attention.py", "__pycache__"),
    )
    general = tomllib.loads((HUB / "build.toml").read_text())["general"]

    sources = kernel_sources()
    for path, text in sources.items():
        write(out / "torch-ext" / PACKAGE / path, text)

    # Of the content, so that the same source gives the same name.
    digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode())
    unique_id = digest.hexdigest()[:7]
    for backend in general["backends"]:
        namespace = f"_{PACKAGE}_{backend}_{unique_id}"
        variant = out / "build" / f"torch-{backend}"
        write(variant / "_ops.py", OPS.format(namespace=namespace))
        for path, text in sources.items():
            write(variant / path, text)
        metadata = {
            "name": general["name"],
            "id": namespace,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "kernel-depends": [],
            "backend": {"type": backend},
        }
        write(variant / "metadata.json", json.dumps(metadata, indent=2) + "\n")


def kernel_sources() -> dict[str, str]:
    """The kernel's Python files by their path in it, without `_ops.py`."""
    package = ROOT / PACKAGE
    waiting = [package / "__init__.py", *(package / "ops").rglob("*.py")]
    sources: dict[str, str] = {}
    while waiting:
        path = waiting.pop()
        name = path.relative_to(package).as_posix()
        if name in sources:
            continue
        text, imported = rewritten(path.read_text(), name)
        sources[name] = text
        waiting += [source for module in imported for source in files_of(module)]
    sources["ops/_extension.py"] = EXTENSION
    sources["transformers_attention.py"] = (HUB / "transformers_attention.py").read_text()
    sources["__init__.py"] += (
        "\nfrom .transformers_attention import flash_attn_forward, supports_flash_attn\n"
        "\n__all__ += ['flash_attn_forward', 'supports_flash_attn']\n"
    )
    return dict(sorted(sources.items()))


def files_of(module: str) -> list[Path]:
    """The file of a module of the package, and of the packages around it."""
    found = []
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:count])
        found += [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.exists()]
    return found


def rewritten(text: str, name: str) -> tuple[str, list[str]]:
    """A source file as the hub wants it, and the modules of the package that it imports.

    Raises:
        ValueError: a use of the package's or the operators' name that it cannot rewrite.
    """
    imported: list[str] = []
    lines = text.splitlines(keepends=True)
    dots = "." * (name.count("/") + 1)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(x.name.startswith(PACKAGE) for x in node.names):
            raise ValueError(f"{name}:{node.lineno}: expected `from {PACKAGE}… import …`")
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        if node.module and node.module.split(".")[0] == PACKAGE:
            imported += [node.module, *(f"{node.module}.{x.name}" for x in node.names)]
            line = lines[node.lineno - 1]
            relative = dots + node.module.removeprefix(PACKAGE).removeprefix(".")
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {relative} ", 1)

    text, uses = "".join(lines), 0
    for pattern, replacement in (
        (r"\btorch\.ops\.mem1\b", "_ops"),
        (r'Library\("mem1"', "Library(_ops.name"),
        (r'f"mem1::\{(\w+)\}"', r"add_op_namespace_prefix(\1)"),
        (r'"mem1::(\w+)"', r'add_op_namespace_prefix("\1")'),
    ):
        text, count = re.subn(pattern, replacement, text)
        uses += count
    if left := re.search(r"""["']mem1::""", text):
        raise ValueError(f"{name}: cannot rewrite {left.group()}")
    if uses:
        future = "from __future__ import annotations\n"
        if future not in text:
            raise ValueError(f"{name}: expected the line {future!r}, behind which imports can go")
        text = text.replace(
            future, f"{future}\nfrom {dots}_ops import add_op_namespace_prefix, ops as _ops\n", 1
        )
    return text, imported


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    main()
