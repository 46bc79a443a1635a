"""The CUDA kernels' own source, run on the CPU in random orders of threads and blocks."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import c_int, c_int32, c_int64, c_uint, c_void_p
from pathlib import Path

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
from torch import Tensor

from mem1_kernels.ops import reference
from mem1_kernels.ops.rope import Rope

ROOT = Path(__file__).resolve().parent.parent
KEY_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
TRAPPED = 1


class Row(ctypes.Structure):
    _fields_ = [
        ("lengths", c_void_p),
        ("length_stride", c_int64),
        ("keep", c_void_p),
        ("keep_stride", c_int64),
        ("capacity", c_int),
        ("length_bits", c_int),
        ("readers", c_int),
    ]


class SlotTensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("page_stride", c_int64),
        ("head_stride", c_int64),
        ("slot_stride", c_int64),
        ("steps", c_void_p),
        ("heads", c_int32),
        ("row_bytes", c_int32),
        ("pairs", c_int32),
        ("unit", c_int32),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "prune_kv.so"
    folder = ROOT / "python_tests" / "cuda_on_cpu"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    source, output = str(folder / "prune_kv.cpp"), ["-o", str(library)]
    subprocess.run([*compiler.split(), *flags, *include, source, *output], check=True)
    return ctypes.CDLL(str(library))


def slot_tensor(
    x: Tensor, page_dim: int, slot_dim: int, head_dim: int | None, first: int = 0, last: int = -1
) -> SlotTensor:
    """As csrc/prune_args.h makes them; elements [first, last) of the last dimension."""
    item = x.element_size()
    elements = 1 if head_dim is None else (x.shape[-1] if last < 0 else last) - first
    result = SlotTensor(
        data=x.data_ptr() + first * item,
        page_stride=x.stride(page_dim) * item,
        slot_stride=x.stride(slot_dim) * item,
        head_stride=0 if head_dim is None else x.stride(head_dim) * item,
        heads=1 if head_dim is None else x.shape[head_dim],
        row_bytes=elements * item,
    )
    bits = result.data | result.row_bytes | 16
    bits |= result.page_stride if x.shape[page_dim] > 1 else 0
    bits |= result.slot_stride if x.shape[slot_dim] > 1 else 0
    bits |= result.head_stride if result.heads > 1 else 0
    result.unit = bits & -bits
    return result


def make_row(lengths: Tensor, keep: Tensor, capacity: int, readers: int) -> Row:
    return Row(
        lengths.data_ptr(),
        lengths.stride(0),
        keep.data_ptr(),
        keep.stride(0),
        capacity,
        capacity.bit_length() + 1,
        readers,
    )


def run_dense(
    kernels: ctypes.CDLL,
    keys: list[Tensor],
    values: list[Tensor],
    lengths: Tensor,
    keep: Tensor,
    slots: list[Tensor],
    ordered: bool,
    seed: int,
    delta: Tensor | None = None,
    rope: Rope | None = None,
) -> int:
    tensors = []
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        rotated = 0
        if rope is not None:
            steps = rope.steps[layer if len(rope.steps) > 1 else 0]
            rotated = 2 * len(steps)
            if rotated:
                tensors.append(slot_tensor(key, 0, 2, 1, 0, rotated))
                tensors[-1].pairs, tensors[-1].steps = len(steps), steps.data_ptr()
        if rotated < key.shape[3]:
            tensors.append(slot_tensor(key, 0, 2, 1, rotated))
        tensors.append(slot_tensor(value, 0, 2, 1))
    tensors += [slot_tensor(x, 0, 1, None) for x in slots]
    blocks, parts = 1 + seed % 4, 1 + seed % 3
    return kernels.prune_kv(
        make_row(lengths, keep, keep.shape[1], blocks),
        c_void_p(None if delta is None else delta.data_ptr()),
        c_int64(keep.shape[1]),
        int(ordered),
        int(rope is not None and rope.layout == "interleaved"),
        0 if rope is None else KEY_TYPES[keys[0].dtype],
        (SlotTensor * len(tensors))(*tensors),
        len(tensors),
        len(lengths),
        blocks,
        parts,
        c_uint(seed),
    )


@pytest.mark.parametrize("ordered", [False, True], ids=["hole filling", "ordered"])
@pytest.mark.parametrize("storage", STORAGES)
def test_dense_bytes(kernels: ctypes.CDLL, storage: str, ordered: bool) -> None:
    """Rows shorter and longer than a block's first read, a word, a group and a tile of moves."""
    shapes = [(2, 40), (3, 129), (1, 1030), (2, 2100), (1, 4500)]
    for seed, (batch, capacity) in enumerate(shapes):
        for keep_share in (0.5, 0.03, 0.97):
            dtype = (torch.bfloat16, torch.int8, torch.float32)[seed % 3]
            layers = [
                make_layer(storage, batch, heads, capacity, dim, dtype, seed)
                for heads, dim in [(2, 16), (1, 5)]
            ]
            slots = [random_bytes((batch, capacity), torch.int64, seed + 3)]
            lengths, keep = random_rows(batch, capacity, seed, keep_share)
            lengths[0] = capacity
            keys, values = (list(xs) for xs in zip(*layers, strict=True))
            expected = [[x.clone() for x in xs] for xs in (keys, values, slots)]
            expected_lengths = lengths.clone()
            reference.prune_kv_(
                expected[0], expected[1], expected_lengths, keep, expected[2], ordered, None, [],
                False,
            )  # fmt: skip
            assert run_dense(kernels, keys, values, lengths, keep, slots, ordered, seed) == 0
            assert torch.equal(lengths, expected_lengths)
            for got, wanted in zip((keys, values, slots), expected, strict=True):
                for x, y in zip(got, wanted, strict=True):
                    assert_same_bytes(x, y, f"{batch} x {capacity}, {keep_share} kept")


@pytest.mark.parametrize("kept", ["none", "all", "one", "tail", "front"])
def test_special_rows(kernels: ctypes.CDLL, kept: str) -> None:
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
        expected, expected_lengths = [key.clone(), value.clone()], lengths.clone()
        reference.prune_kv_(
            expected[:1], expected[1:], expected_lengths, keep, [], ordered, None, [], False
        )
        assert run_dense(kernels, [key], [value], lengths, keep, [], ordered, 7) == 0
        assert torch.equal(lengths, expected_lengths)
        assert_same_bytes(key, expected[0], "keys")
        assert_same_bytes(value, expected[1], "values")


@pytest.mark.parametrize("ordered", [False, True], ids=["hole filling", "ordered"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", list(KEY_TYPES), ids=str)
def test_rotation(kernels: ctypes.CDLL, dtype: torch.dtype, layout: str, ordered: bool) -> None:
    """Wide and single-element paths, partial rotary dims, a layer without, more than one tile."""
    generator = torch.Generator().manual_seed(0)
    for seed, capacity in enumerate((70, 1500)):
        batch = 2
        inv_freqs = [1e4 ** -(torch.arange(n) / max(n, 1)) for n in (8, 3, 0)]
        rope = Rope(inv_freqs, layout)
        keys = [
            torch.randn(batch, 2, capacity, 20, generator=generator).to(dtype) for _ in inv_freqs
        ]
        keys[1] = keys[1].transpose(1, 2).contiguous().transpose(1, 2)
        values = [x.clone() for x in keys]
        delta = torch.randint(
            -3000, 3000, (batch, capacity), generator=generator, dtype=torch.int32
        )
        delta[:, ::5] = 0
        lengths, keep = random_rows(batch, capacity, seed, 0.6)
        lengths[0] = capacity
        exact, exact_lengths = [x.double() for x in keys], lengths.clone()
        stale = [x.clone() for x in keys]
        expected_values = [x.clone() for x in values]
        reference.prune_kv_(
            exact, expected_values, exact_lengths, keep, [], ordered, delta, rope.steps,
            layout == "interleaved",
        )  # fmt: skip
        status = run_dense(kernels, keys, values, lengths, keep, [], ordered, seed, delta, rope)
        assert status == 0 and torch.equal(lengths, exact_lengths)
        for layer, (key, wanted) in enumerate(zip(keys, exact, strict=True)):
            assert_same_bytes(values[layer], expected_values[layer], "values")
            rounding = wanted.abs() * torch.finfo(dtype).eps / 2
            bound = rounding + 1e-6 * wanted.norm(dim=-1, keepdim=True)
            assert ((key.double() - wanted).abs() <= bound).all()
            rotated = 2 * len(inv_freqs[layer])
            assert torch.equal(key[..., rotated:].double(), wanted[..., rotated:])
            for b in range(batch):
                n = int(lengths[b])
                assert_same_bytes(key[b, :, n:], stale[layer][b, :, n:], "the tail")


@pytest.mark.parametrize("kind", PAGED_KINDS)
def test_paged_bytes(kernels: ctypes.CDLL, kind: str) -> None:
    sizes = [(1, 90), (2, 6), (3, 50), (16, 300), (64, 30), (128, 3)]
    for seed, (page_size, max_pages) in enumerate(sizes):
        for keep_share in (0.1, 0.6, 0.97):
            batch = 3
            table, lengths, keep, pages = paged_rows(
                batch, max_pages, page_size, seed, keep_share, runs=keep_share == 0.97
            )
            layout, key, value = make_pages(kind, pages, page_size, 2, 8, torch.bfloat16, seed)
            slots = random_bytes((pages, page_size), torch.int32, seed + 9)
            generator = torch.Generator().manual_seed(seed)
            refs = torch.randint(1, 4, (pages,), generator=generator, dtype=torch.int32)
            page_refs = refs if seed % 2 else None
            nhd = [x if layout == "NHD" else x.transpose(1, 2) for x in (key, value)]
            expected = [x.clone() for x in (*nhd, slots, table, lengths, table, lengths)]
            reference.prune_paged_kv_(
                expected[:1], expected[1:2], expected[3], expected[4], keep, page_refs,
                expected[2:3], expected[5], expected[6],
            )  # fmt: skip
            freed, counts = torch.full_like(table, 7), torch.full_like(lengths, 7)
            tensors = [slot_tensor(x, 0, 1, 2) for x in nhd] + [slot_tensor(slots, 0, 1, None)]
            blocks = 1 + seed % 3
            status = kernels.prune_paged_kv(
                make_row(lengths, keep, keep.shape[1], blocks),
                c_void_p(table.data_ptr()),
                c_int64(max_pages),
                c_void_p(freed.data_ptr()),
                c_int64(max_pages),
                c_void_p(counts.data_ptr()),
                c_void_p(None if page_refs is None else page_refs.data_ptr()),
                pages,
                page_size,
                max_pages,
                (SlotTensor * 3)(*tensors),
                3,
                batch,
                blocks,
                c_uint(seed),
            )
            assert status == 0
            for name, x, y in zip(
                ("keys", "values", "slots", "block_table", "lengths", "freed", "counts"),
                (*nhd, slots, table, lengths, freed, counts),
                expected,
                strict=True,
            ):
                assert_same_bytes(x, y, f"{name} of {page_size} x {max_pages}")


@pytest.mark.parametrize("length", [-1, -128, 41, 64, 80, 127, -(2**31), -(2**31) + 20])
def test_a_length_out_of_range_traps(kernels: ctypes.CDLL, length: int) -> None:
    for seed in range(4):
        key, value = make_layer("head major", 1, 2, 40, 8, torch.float16, 0)
        lengths = torch.tensor([length], dtype=torch.int32)
        keep = torch.ones(1, 40, dtype=torch.bool)
        assert run_dense(kernels, [key], [value], lengths, keep, [], False, seed) == TRAPPED
