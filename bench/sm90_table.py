"""What the Triton attention kernels compile to for a GPU that need not be there.

    python -m bench.sm90_table --markdown
    python -m bench.sm90_table --out out/bench    # writes out/bench/triton-<version>.json

Compiles each shipped configuration for every dtype and head_dim, by default for the H100, and
reads registers, stack (spills), shared memory, tensor-core instructions and asynchronous copies out
of the machine code. Imports triton but not torch, so that it can look at a version of triton that
torch does not come with. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import cli
from bench.record import ROOT, write_results

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = 232448
"""Bytes of shared memory a block may have on the H100: 227 KiB."""
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
PASSES = ("fwd", "dkdv", "dq", "preprocess", "sum")
PLAIN = {"floor": False, "softcap": False}
ALL_FLAGS = {"floor": True, "softcap": True}


def _modules() -> tuple[types.ModuleType, types.ModuleType]:
    """The kernels and their configurations, without running the package (which needs torch)."""
    for name in ("mem1_kernels", "mem1_kernels.ops", "mem1_kernels.ops.triton"):
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
            sys.modules[name] = package
    modules = ("attention_kernels", "attention_configs")
    kernels, configs = (importlib.import_module(f"mem1_kernels.ops.triton.{m}") for m in modules)
    return kernels, configs


def _source(kernel, dtype: str, constants: dict[str, object]) -> ASTSource:
    """The kernel with aligned tensors and strides, as a launch on contiguous inputs has them."""
    fp32 = ("lse", "lse2", "delta", "grad_lse", "work_dk", "work_dv")
    int32 = ("expiry", "floor", "row_", "col_", "item_")
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        tensor = name.removesuffix("_ptr")
        if name in constants:
            signature[name] = "constexpr"
        elif name != tensor:
            element = "fp32" if tensor in fp32 else "i32" if tensor.startswith(int32) else dtype
            signature[name] = "*" + element
        else:
            signature[name] = "fp32" if name in ("pre", "post", "scale") else "i32"
        aligned = constants.get("ALIGN", 16) == 16 and name.startswith("stride")
        if signature[name].startswith("*") or aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _tensor_core_loops(sass: str) -> list[dict[str, int]]:
    """What each loop with an HGMMA does in one round, in the order of the code.

    hgmma: how many it starts; waits: how often it waits until all of them are done (once per group,
    unless ptxas serialised them); exponentials: MUFU.EX2, and how many of these are issued while an
    HGMMA is under way, which they hide behind.
    """
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", sass, re.MULTILINE)
    index = {int(address, 16): line for line, (address, _) in enumerate(code)}
    loops = []
    for last, (_, instruction) in enumerate(code):
        branch = re.match(r"BRA\S* .*?(0x[0-9a-f]+)", instruction)
        first = index.get(int(branch[1], 16), last + 1) if branch else last + 1
        names = [name.split()[0] for _, name in code[first : last + 1]]
        if not any(name.startswith("HGMMA") for name in names):
            continue
        found = dict.fromkeys(("hgmma", "waits", "exponentials", "hidden_exponentials"), 0)
        under_way = False
        for turn in range(2):  # the first, to know what is under way when a round begins
            for name in names:
                if name.startswith("HGMMA"):
                    under_way = True
                    found["hgmma"] += turn
                elif name.startswith("WARPGROUP.DEPBAR"):
                    under_way = False
                    found["waits"] += turn
                elif name.startswith("MUFU.EX2"):
                    found["exponentials"] += turn
                    found["hidden_exponentials"] += turn * under_way
        loops.append(found)
    return loops


def _inspect(cubin: bytes) -> dict[str, object]:
    """Resources and the instructions that matter, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [str(TOOLS / "cuobjdump"), option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    count = {op: len(re.findall(rf"\b{op}\b", sass)) for op in ("HGMMA", "LDGSTS", "LDL", "STL")}
    return {
        "registers": int(resources["REG"]),
        "stack": int(resources["STACK"]) + int(resources["LOCAL"]),
        "spill_instructions": count["LDL"] + count["STL"],
        "hgmma": count["HGMMA"],
        "async_copies": count["LDGSTS"],
        "loops": _tensor_core_loops(sass),
    }


def compile_pass(
    name: str,
    dtype: str,
    head_dim: int,
    flags: dict[str, bool] = PLAIN,
    capability: int = 90,
    candidate: int = 0,
    group: int = 4,
) -> list[dict[str, object]]:
    """Compiles one configuration of a pass; a row for each of its launches.

    Args:
        name: one of PASSES.
        dtype: "bf16", "fp16" or "fp32".
        capability: compute capability, 90 for the H100.
        candidate: which of `attention_configs.candidates`; 0 ships.
        group: query heads for each kv head.
    """
    kernels, configs = _modules()
    config = configs.candidates(name, capability // 10, head_dim, DTYPES[dtype])[candidate]
    chunks, launches = configs.head_chunks(head_dim), [None]
    if name == "dkdv":
        chunks, launches = configs.dkdv_chunks(head_dim)
    kernel = getattr(kernels, "_fwd_kernel" if name == "fwd" else f"_bwd_{name}_kernel")
    rows = []
    for launch in launches:
        constants = {
            "TILE": 128,
            "GROUP": group,
            "ALIGN": math.gcd(16, head_dim),
            "HAS_FLOOR": flags["floor"],
            "HAS_SOFTCAP": flags["softcap"],
            "HEAD_DIM": head_dim,
            "D0": chunks[0],
            "D1": chunks[1],
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "PART": config.part,
            "PIPELINED": config.pipelined,
        }
        if name == "dkdv":
            constants["CHUNK"] = launch
        if name == "preprocess":
            constants["HAS_GRAD_LSE"] = True
        if not flags["floor"]:
            constants["floor_ptr"] = None
        constants = {key: constants[key] for key in kernel.arg_names if key in constants}
        compiled = triton.compile(
            _source(kernel, dtype, constants),
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
                "enable_fp_fusion": True,
            },
        )
        rows.append(
            {
                "pass": name,
                "dtype": dtype,
                "head_dim": head_dim,
                **flags,
                "chunk": launch,
                **config._asdict(),
                "shared": compiled.metadata.shared,
                **_inspect(compiled.asm["cubin"]),
            }
        )
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    """The rows as a table."""
    columns = {
        "pass": "pass",
        "dtype": "dtype",
        "head_dim": "head_dim",
        "block_m": "queries",
        "block_n": "keys",
        "part": "partial",
        "pipelined": "pipelined",
        "num_warps": "warps",
        "num_stages": "stages",
        "registers": "registers",
        "stack": "spilled bytes",
        "shared": "shared bytes",
        "hgmma": "HGMMA",
    }
    lines = [f"| {' | '.join(columns.values())} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(row[key]) for key in columns)} |" for row in rows]
    return "\n".join(lines)


QUICK = {"passes": PASSES[:3], "dtypes": ["bf16"], "head_dims": [128]}


def make_parser() -> argparse.ArgumentParser:
    name = f"triton-{triton.__version__}"
    parser = cli.make_parser(__doc__, name, quick=QUICK, devices=(), rounds=None)
    add = parser.add_argument
    add("--passes", nargs="+", choices=PASSES, default=PASSES, help="which kernels")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of q, k, v")
    add("--head-dims", nargs="+", type=int, default=HEAD_DIMS, help="of q, k, v")
    add("--all-flags", action="store_true", help="with floor and softcap")
    add("--candidates", action="store_true", help="also the configurations that do not ship")
    add("--capability", type=int, default=90, help="compute capability to compile for")
    add("--markdown", action="store_true", help="print a table, not JSON lines")
    return parser


def main() -> None:
    args = cli.parse(make_parser(), QUICK)
    _, configs = _modules()
    rows: list[dict[str, object]] = []
    for name in args.passes:
        for dtype in args.dtypes:
            for head_dim in args.head_dims:
                generation = args.capability // 10
                found = configs.candidates(name, generation, head_dim, DTYPES[dtype])
                for candidate in range(len(found) if args.candidates else 1):
                    flags = ALL_FLAGS if args.all_flags else PLAIN
                    new = compile_pass(name, dtype, head_dim, flags, args.capability, candidate)
                    rows += new
                    if not args.markdown:
                        print(*map(json.dumps, new), sep="\n", flush=True)
    if args.markdown:
        print(markdown(rows))
    said = {"triton": triton.__version__, "capability": args.capability}
    write_results(args, None, **said, rows=rows)


if __name__ == "__main__":
    main()
