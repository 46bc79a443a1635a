"""What the Triton attention kernels compile to for the H100, read without one.

Each test starts a process of its own, since conftest.py has Triton interpret in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mem1_kernels.ops.triton.attention_configs import FLOAT_32, HOPPER_16_BIT, head_chunks

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
SHARED_LIMIT = {90: 232448, 80: 166912, 89: 101376}
"""Bytes of shared memory a block may have, by compute capability (CUDA C++ programming guide)."""


def compile_rows(*arguments: object) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.sm90_table", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows: list[dict], launches: int, capability: int = 90) -> None:
    assert len(rows) == launches
    for row in rows:
        assert row["stack"] == 0 and row["spill_instructions"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_LIMIT[capability], f"shared memory: {row}"
        multiplies = row["pass"] in ("fwd", "dkdv", "dq")
        # An exact float32 product has no tensor-core instruction.
        tensor_cores = multiplies and capability == 90 and row["dtype"] != "fp32"
        assert (row["hgmma"] > 0) == tensor_cores, f"HGMMA: {row}"
        assert row["async_copies"] > 0 or not multiplies, f"loads are not asynchronous: {row}"
        if tensor_cores:
            # Partial tiles and full ones. One wait for each product, of a chunk of head_dim where
            # there are two: more means that ptxas runs the HGMMAs one after the other.
            assert len(row["loops"]) == 2, f"loops: {row}"
            chunks = 1 + (head_chunks(row["head_dim"])[1] > 0)
            for loop in row["loops"]:
                waits = chunks * {"fwd": 2, "dq": 3, "dkdv": 4}[row["pass"]]
                assert loop["waits"] <= waits, f"HGMMAs are serialised: {row}"


@pytest.mark.parametrize("name", ["fwd", "dkdv", "dq"])
@pytest.mark.parametrize(
    ("dtype", "head_dims"),
    [
        ("bf16", (16, 32, 64, 72, 80)),  # 72: strides are multiples of 8 only
        ("bf16", (96, 128)),
        ("bf16", (192, 256)),
        ("fp16", (64, 128, 256)),
        ("fp32", (16, 32, 64, 80)),
        ("fp32", (128, 256)),
    ],
)
def test_shipped_configurations(name, dtype, head_dims):
    rows = compile_rows("--passes", name, "--dtypes", dtype, "--head-dims", *head_dims)
    wide = sum(head_dim > 128 for head_dim in head_dims)
    check(rows, len(head_dims) + (wide if name == "dkdv" else 0))
    for row in rows:
        if row["dtype"] == "bf16" and row["head_dim"] in (64, 128):
            # Pipelined, all of a block's weights are made beside the product of the block before;
            # in the backward most are beside the product with dO.
            share = 0.9 if name == "fwd" else 0.5
            for loop in row["loops"]:
                hidden = loop["hidden_exponentials"] / loop["exponentials"]
                assert hidden >= share, f"{hidden:.2f} of the exponentials are hidden: {row}"


@pytest.mark.parametrize("name", ["fwd", "dkdv", "dq"])
@pytest.mark.parametrize(("dtype", "table"), [("bf16", HOPPER_16_BIT), ("fp32", FLOAT_32)])
def test_every_candidate_at_the_head_dim_of_its_row(name, dtype, table):
    rows = compile_rows("--candidates", "--passes", name, "--dtypes", dtype, "--head-dims", *table)
    launches = {head_dim: 2 if name == "dkdv" and head_dim > 128 else 1 for head_dim in table}
    check(rows, sum(launches[head_dim] * len(table[head_dim][name]) for head_dim in table))


def test_streaming_kernels():
    shapes = ("--dtypes", "bf16", "fp32", "--head-dims", 80, 256)
    check(compile_rows("--passes", "preprocess", "sum", *shapes), 8)


@pytest.mark.parametrize("name", ["fwd", "dkdv", "dq"])
@pytest.mark.parametrize(("dtype", "head_dims"), [("bf16", (64, 128, 256)), ("fp32", (16, 128))])
def test_floor_and_softcap(name, dtype, head_dims):
    shapes = ("--dtypes", dtype, "--head-dims", *head_dims)
    rows = compile_rows("--passes", name, *shapes, "--all-flags")
    check(rows, len(head_dims) + (name == "dkdv" and 256 in head_dims))


@pytest.mark.parametrize("capability", [80, 89])
def test_other_gpus(capability):
    shapes = ("--dtypes", "bf16", "--head-dims", 128, 256)
    rows = compile_rows("--capability", capability, "--passes", "fwd", "dkdv", "dq", *shapes)
    check(rows, 7, capability)
