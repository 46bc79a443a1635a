"""What the Triton kernels of append_kv_ and cached_attention compile to for Hopper; no GPU needed.

Run as a script it compiles them, in a process without the interpreter, and prints what it found.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = 227 * 1024
SMALL_SHARED_MEMORY = 99 * 1024
# dtype, head_dim, query rows, and the dtype of position_ids: None: neither window nor softcap;
# "cap": softcap alone; otherwise both.
DECODE = [
    ("bf16", 128, 7, None),
    ("bf16", 128, 7, "i64"),
    ("bf16", 128, 7, "i32"),
    ("bf16", 128, 64, None),
    ("bf16", 128, 64, "i64"),
    ("bf16", 128, 64, "i32"),
    ("bf16", 128, 3500, None),
    ("bf16", 128, 3500, "i64"),
    ("bf16", 128, 3500, "i32"),
    ("bf16", 128, 3500, "cap"),
    ("bf16", 64, 3500, None),
    ("bf16", 64, 3500, "i32"),
    ("bf16", 64, 3500, "cap"),
    ("bf16", 96, 3500, "i32"),
    ("bf16", 80, 7, None),
    ("bf16", 192, 3500, None),
    ("bf16", 192, 3500, "i32"),
    ("bf16", 192, 3500, "i64"),
    ("bf16", 192, 3500, "cap"),
    ("bf16", 256, 7, None),
    ("bf16", 256, 3500, None),
    ("bf16", 256, 3500, "i64"),
    ("bf16", 256, 3500, "i32"),
    ("bf16", 256, 3500, "cap"),
    ("fp32", 128, 7, "i64"),
    ("fp32", 256, 7, None),
]
# The same for the generation before, in the shared memory of its consumer cards.
SM_89 = [("bf16", 128, 7, "i64"), ("bf16", 128, 3500, "i64"), ("bf16", 256, 3500, "i64")]


def compile_all() -> dict[str, dict]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mem1_kernels.ops.triton import cached_attention as launchers
    from mem1_kernels.ops.triton import cached_attention_kernels as kernels
    from mem1_kernels.ops.triton.attention_configs import head_chunks

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def tool(name: str, *arguments: str) -> str:
        command = [str(tools / name), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def look_at(
        kernel, pointers: dict, constants: dict, warps: int, stages: int, capability: int = 90
    ) -> dict:
        signature, attributes = {}, {}
        for i, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif name in pointers:
                signature[name] = f"*{pointers[name]}"
            else:
                signature[name] = "fp32" if name in ("pre", "post") else "i32"
            if name in pointers or name.startswith("stride"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = triton.compile(
            ASTSource(kernel, signature, places, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps, "num_stages": stages, **launchers.FUSED},
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = dict(re.findall(r"(\w+):(\d+)", tool("cuobjdump", "-res-usage", file.name)))
            code = tool("nvdisasm", file.name)
        return {
            "registers": int(usage["REG"]),
            "stack": int(usage["STACK"]),
            "local": int(usage["LOCAL"]),
            "shared": compiled.metadata.shared,
            "wgmma": "HGMMA" in code,
            "asynchronous": code.count("LDGSTS.E.BYPASS.128"),
            "wide_loads": code.count("LDG.E.128"),
        }

    rows = {"lengths_ptr": "i32", "counts_ptr": "i32"}
    partial = {"split_out_ptr": "fp32", "split_lse_ptr": "fp32", "lse_ptr": "fp32"}
    schedule = {"GROUP": 7, "HAS_COUNTS": True, "BLOCK_B": 64, "MIN_TILES": launchers.MIN_TILES}
    found = {}
    cases = [(90, *case) for case in DECODE] + [(89, *case) for case in SM_89]
    for capability, dtype, head_dim, query_rows, position_dtype in cases:
        torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        windowed = position_dtype in ("i32", "i64")
        capped = position_dtype is not None
        config = launchers.select_config(
            query_rows,
            head_dim,
            torch_dtype,
            capability // 10,
            {"i32": torch.int32, "i64": torch.int64}.get(position_dtype),
        )
        chunk, rest = head_chunks(head_dim)
        constants = {
            **schedule,
            "HAS_WINDOW": windowed,
            "HAS_SOFTCAP": capped,
            "SPLIT": True,
            "HEAD_DIM": head_dim,
            "D0": chunk,
            "D1": rest,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }
        pointers = {
            **rows,
            **partial,
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), dtype),
        }
        if windowed:
            pointers["position_ids_ptr"] = position_dtype
        else:
            constants["position_ids_ptr"] = None
        name = f"decode {dtype} head_dim {head_dim} rows {query_rows}"
        if capped:
            name += f" all {position_dtype}" if windowed else " softcap"
        found[name if capability == 90 else f"sm_{capability} {name}"] = look_at(
            kernels._decode_kernel,
            pointers,
            constants,
            config.num_warps,
            config.num_stages,
            capability,
        )
    constants = {**schedule, "HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_S": 32, "BLOCK_N": 64}
    pointers = {**rows, **partial, "out_ptr": "bf16"}
    found["combine"] = look_at(kernels._combine_kernel, pointers, constants, 4, 3)
    constants = {
        "HEAD_DIM": 128,
        "BLOCK_D": 128,
        "BLOCK_ROWS": 16,
        "HAS_COUNTS": True,
        "KV_HEADS": 4,
    }
    caches = ("keys_ptr", "values_ptr", "key_cache_ptr", "value_cache_ptr")
    pointers = {**rows, **dict.fromkeys(caches, "i16")}
    found["append"] = look_at(kernels._append_kernel, pointers, constants, 4, 3)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_no_spills_and_shared_memory_fits(found):
    assert len(found) == len(DECODE) + len(SM_89) + 2
    for name, kernel in found.items():
        print(name, kernel)
        limit = SMALL_SHARED_MEMORY if name.startswith("sm_89") else SHARED_MEMORY
        assert kernel["stack"] == kernel["local"] == 0, f"{name} spills"
        assert kernel["shared"] <= limit, f"{name}: {kernel['shared']} bytes"


def test_three_decode_programs_fit_on_a_multiprocessor(found):
    kernel = found["decode bf16 head_dim 128 rows 7"]
    assert 3 * (kernel["shared"] + 1024) <= SHARED_MEMORY + 1024
    assert 3 * 128 * kernel["registers"] <= 65536


def test_many_rows_use_the_tensor_cores_of_hopper(found):
    for name, kernel in found.items():
        if name.startswith("decode bf16") and "rows 7" not in name:
            assert kernel["wgmma"], name


def test_memory_is_read_sixteen_bytes_at_a_time(found):
    for name, kernel in found.items():
        if "decode" in name:
            assert kernel["asynchronous"] > 0, name
    assert found["append"]["wide_loads"] > 0
    assert found["combine"]["wide_loads"] > 0


if __name__ == "__main__":
    print(json.dumps(compile_all()))
