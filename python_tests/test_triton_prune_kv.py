"""The Triton kernels of the pruning ops: interpreted against the reference, compiled for Hopper."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from kv_layouts import (
    PAGED_KINDS,
    STORAGES,
    assert_same_bytes,
    make_layer,
    make_pages,
    paged_rows,
    random_bytes,
    random_rows,
)

from mem1_kernels.ops import reference
from mem1_kernels.ops.rope import Rope

pytest.importorskip("triton")
from mem1_kernels.ops.triton import prune_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # The interpreter runs programs one by one, so few of them; several blocks a row all the same.
    prune_kv.PROGRAMS, prune_kv.LIST_BLOCK = 24, 128


def on_device(xs):
    """Copies on the device with the same strides."""
    copies = []
    for x in xs:
        base = x if x._base is None else x._base
        copy = base.to(DEVICE) if DEVICE == "cuda" else base.clone()
        copies.append(copy.as_strided(x.shape, x.stride(), x.storage_offset()))
    return copies


@pytest.mark.parametrize("ordered", [False, True], ids=["hole filling", "ordered"])
@pytest.mark.parametrize("storage", STORAGES)
def test_dense_bytes(storage: str, ordered: bool) -> None:
    for seed, (batch, capacity) in enumerate([(1, 1), (3, 130), (2, 400), (1, 700)]):
        dtype = (torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.bool)[seed]
        layers = [
            make_layer(storage, batch, heads, capacity, dim, dtype, seed)
            for heads, dim in [(2, 16), (1, 7)]
        ]
        slots = [
            random_bytes((batch, capacity), torch.int64, seed + 3),
            random_bytes((batch, capacity), torch.int16, seed + 4),
        ]
        lengths, keep = random_rows(batch, capacity, seed, 0.6)
        lengths[0] = capacity
        keys, values = (list(xs) for xs in zip(*layers, strict=True))
        mine = [on_device(xs) for xs in (keys, values, slots, [lengths, keep])]
        reference.prune_kv_(keys, values, lengths, keep, slots, ordered, None, [], False)
        prune_kv.prune_kv_(*mine[:2], *mine[3], mine[2], ordered, None, [], False)
        expected = (*keys, *values, *slots, lengths)
        for got, wanted in zip((*mine[0], *mine[1], *mine[2], mine[3][0]), expected, strict=True):
            assert_same_bytes(got.cpu(), wanted, f"{batch} x {capacity}")


@pytest.mark.parametrize("kept", ["none", "all", "one", "tail", "front"])
def test_special_rows(kept: str) -> None:
    batch, capacity = 3, 200
    slot = torch.arange(capacity).expand(batch, capacity)
    keep = {
        "none": slot < 0,
        "all": slot >= 0,
        "one": slot == 77,
        "tail": slot >= 128,
        "front": slot < 96,
    }[kept].contiguous()
    for ordered in (False, True):
        lengths = torch.tensor([200, 0, 128], dtype=torch.int32)
        key, value = make_layer("head major", batch, 2, capacity, 8, torch.float16, 0)
        mine = on_device([key, value, lengths, keep])
        reference.prune_kv_([key], [value], lengths, keep, [], ordered, None, [], False)
        prune_kv.prune_kv_(mine[:1], mine[1:2], *mine[2:], [], ordered, None, [], False)
        for got, wanted in zip(mine, (key, value, lengths, keep), strict=True):
            assert_same_bytes(got.cpu(), wanted, kept)


@pytest.mark.parametrize("ordered", [False, True], ids=["hole filling", "ordered"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rotation(dtype: torch.dtype, layout: str, ordered: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, capacity = 2, 90
    inv_freqs = [1e4 ** -(torch.arange(n) / max(n, 1)) for n in (8, 3, 0)]
    rope = Rope(inv_freqs, layout)
    keys = [torch.randn(batch, 2, capacity, 20, generator=generator).to(dtype) for _ in inv_freqs]
    keys[1] = keys[1].transpose(1, 2).contiguous().transpose(1, 2)
    values = [x.clone() for x in keys]
    delta = torch.randint(-3000, 3000, (batch, capacity), generator=generator, dtype=torch.int32)
    delta[:, ::5], delta[:, 1] = 0, -(2**31)
    lengths, keep = random_rows(batch, capacity, 1, 0.6)
    lengths[0] = capacity
    exact, exact_lengths = [x.double() for x in keys], lengths.clone()
    expected_values = [x.clone() for x in values]
    reference.prune_kv_(
        exact, expected_values, exact_lengths, keep, [], ordered, delta, rope.steps,
        layout == "interleaved",
    )  # fmt: skip
    mine = [on_device(xs) for xs in (keys, values, [lengths, keep, delta], rope.steps)]
    prune_kv.prune_kv_(
        *mine[:2], *mine[2][:2], [], ordered, mine[2][2], mine[3], layout == "interleaved"
    )
    assert torch.equal(mine[2][0].cpu(), exact_lengths)
    for layer, wanted in enumerate(exact):
        key = mine[0][layer].cpu()
        assert_same_bytes(mine[1][layer].cpu(), expected_values[layer], "values")
        # The interpreter cuts to bf16 where the compiled kernel rounds.
        cut = DEVICE == "cpu" and dtype == torch.bfloat16
        rounding = wanted.abs() * torch.finfo(dtype).eps * (1 if cut else 0.5)
        bound = rounding + 1e-6 * wanted.norm(dim=-1, keepdim=True)
        assert ((key.double() - wanted).abs() <= bound).all()
        rotated = 2 * len(inv_freqs[layer])
        assert torch.equal(key[..., rotated:].double(), wanted[..., rotated:])
        for b in range(batch):
            n = int(exact_lengths[b])
            assert_same_bytes(key[b, :, n:], keys[layer][b, :, n:], "the tail")


@pytest.mark.parametrize("kind", PAGED_KINDS)
def test_paged_bytes(kind: str) -> None:
    sizes = [(1, 30), (3, 20), (16, 7)]
    for seed, (page_size, max_pages) in enumerate(sizes):
        for keep_share in (0.1, 0.6, 0.97):
            batch = 3
            table, lengths, keep, pages = paged_rows(
                batch, max_pages, page_size, seed, keep_share, runs=keep_share == 0.97
            )
            if seed % 2:
                keep = torch.cat((keep, keep.new_ones(batch, 5)), 1)
            layout, key, value = make_pages(kind, pages, page_size, 2, 8, torch.bfloat16, seed)
            slots = random_bytes((pages, page_size), torch.int32, seed + 9)
            generator = torch.Generator().manual_seed(seed)
            refs = torch.randint(1, 4, (pages,), generator=generator, dtype=torch.int32)
            page_refs = refs if seed % 2 else None
            key, value = (x if layout == "NHD" else x.transpose(1, 2) for x in (key, value))
            results = []
            for op in (reference.prune_paged_kv_, prune_kv.prune_paged_kv_):
                tensors = (key, value, table, lengths, keep, slots, table, lengths)
                x = (
                    on_device(tensors)
                    if op is prune_kv.prune_paged_kv_
                    else [y.clone() for y in tensors]
                )
                own = page_refs if page_refs is None else page_refs.to(x[0].device)
                op(x[:1], x[1:2], *x[2:5], own, x[5:6], x[6], x[7])
                results.append(x)
            for wanted, got in zip(*results, strict=True):
                assert_same_bytes(got.cpu(), wanted, f"{page_size} x {max_pages}")


def test_a_plan_is_made_once_and_goes_with_its_memory() -> None:
    prune_kv._plans.clear()

    def call(key, value):
        capacity = key.shape[2]
        lengths = torch.tensor([capacity], dtype=torch.int32, device=DEVICE)
        keep = torch.ones(1, capacity, dtype=torch.bool, device=DEVICE)
        prune_kv.prune_kv_([key], [value], lengths, keep, [], False, None, [], False)

    first, second, value = (torch.zeros(1, 1, 8, 8, device=DEVICE) for _ in range(3))
    call(first, value)
    (remembered,) = prune_kv._plans.values()
    call(first.view_as(first), value)
    assert list(prune_kv._plans.values()) == [remembered]
    call(second, value)
    assert len(prune_kv._plans) == 2
    del first
    gc.collect()
    third = torch.zeros(1, 1, 9, 8, device=DEVICE)
    call(third, third.clone())
    assert len(prune_kv._plans) == 2
    assert all(x is not remembered for x in prune_kv._plans.values())


COMPILE = """
import json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mem1_kernels.ops.triton import prune_kv_kernels as k

def compiled(kernel, types, constants, warps, **options):
    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr" if n in constants else "i32") for n in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
                  if signature[n].startswith("*")}
    constexprs = {(names.index(n),): v for n, v in constants.items()}
    source = ASTSource(kernel, signature, constexprs, attributes)
    options |= {"num_warps": warps, "debug": kernel.debug is True}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = code.asm["ptx"]
    return {
        "shared": code.metadata.shared,
        "wide": ptx.count("ld.global.v4.b32") + ptx.count("ld.global.v2.b64"),
        "local": ptx.count(".local"),
        "trap": "assertfail" in ptx,
    }

lists = {"lengths_ptr": "*i32", "keep_ptr": "*u8", "moves_ptr": "*i32", "counts_ptr": "*i32"}
table = {"table_ptr": "*i64", "moves_ptr": "*i32", "counts_ptr": "*i32"}
turn = {**table, "keep_ptr": "*u8", "delta_ptr": "*i32"}
result = {}
for ordered in (False, True):
    order = {"ORDERED": ordered, "PARTS": 1 if ordered else 4}
    result[f"list {ordered}"] = compiled(
        k._list_moves_kernel, lists, {"ORDERED": ordered, "BLOCK": 2048}, 8,
        sanitize_overflow=False)
    for paged in (False, True):
        move = {"ELEMENT": tl.int32, "ALIGNED": 4, "PAGED": paged, "BLOCK_MOVES": 64,
                "BLOCK_ELEMENTS": 64, **order}
        result[f"move {ordered} {paged}"] = compiled(k._move_slots_kernel, table, move, 4)
    for key in (tl.float32, tl.float16, tl.bfloat16):
        for interleaved in (False, True):
            constants = {"KEY": key, "ALIGNED": 8, "INTERLEAVED": interleaved, "BLOCK_MOVES": 16,
                         "BLOCK_PAIRS": 64, **order}
            name = f"turn {ordered} {key} {interleaved}"
            result[name] = compiled(k._turn_keys_kernel, turn, constants, 4)
print(json.dumps(result))
"""


def test_they_compile_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout.splitlines()[-1])
    assert len(kernels) == 18
    for name, found in kernels.items():
        print(name, found)
        assert found["local"] == 0, f"{name} uses local memory"
        assert found["trap"] == name.startswith("list"), name
        if name.startswith("move"):
            assert found["wide"] > 0, f"{name} does not load 16 bytes at a time"
