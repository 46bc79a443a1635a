"""`move_slots_`: every byte where it belongs, nothing else written, bad lists refused."""

from __future__ import annotations

import pytest
import torch
from kv_layouts import assert_same_bytes, random_bytes

from mem1_kernels import move_slots_
from mem1_kernels.ops import reference

PAGES, PAGE_SIZE = 6, 4


def moves(seed: int, count: int = 7):
    order = torch.randperm(PAGES * PAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    return order[:count].contiguous(), order[count : 2 * count].contiguous()


def layers(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """A layer in the order of its dimensions, one with heads last, and a view of half a row."""
    return [
        random_bytes((PAGES, 2, PAGE_SIZE, 6), dtype, seed),
        random_bytes((PAGES, PAGE_SIZE, 3, 5), dtype, seed + 1).transpose(1, 2),
        random_bytes((PAGES, 2, PAGE_SIZE, 12), dtype, seed + 2)[..., :6],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_moves_every_byte_and_no_other(dtype):
    sources, destinations = moves(1)
    pages, expected = layers(dtype, 3), layers(dtype, 3)
    for x in expected:
        flat = x.permute(0, 2, 1, 3).clone()  # [pages, page_size, heads, row]
        flat = flat.reshape(-1, *flat.shape[2:])
        flat[destinations] = flat[sources]
        x.copy_(flat.reshape(PAGES, PAGE_SIZE, *flat.shape[1:]).permute(0, 2, 1, 3))
    move_slots_(pages, sources, destinations)
    for ours, theirs in zip(pages, expected, strict=True):
        assert_same_bytes(ours, theirs, "layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_packed_pages_move_as_unpacked_ones(dtype):
    row = 6
    sources, destinations = moves(2)
    offsets = torch.randperm(PAGE_SIZE * row, generator=torch.Generator().manual_seed(5)).int()
    plain = [random_bytes((PAGES, 2, PAGE_SIZE, row), dtype, seed) for seed in (7, 8)]
    packed = [x.flatten(2)[..., offsets.argsort()].view_as(x).contiguous() for x in plain]
    where = offsets.view(PAGE_SIZE, row)
    checked = [x.clone() for x in packed]
    move_slots_(plain, sources, destinations)
    move_slots_(packed, sources, destinations, offsets=where)
    reference.move_slots_(checked, sources, destinations, where)
    for ours, unpacked, theirs in zip(packed, plain, checked, strict=True):
        assert_same_bytes(ours.flatten(2)[..., offsets.long()].view_as(ours), unpacked, "layer")
        assert_same_bytes(ours, theirs, "layer")


def good_call() -> dict:
    sources, destinations = moves(1)
    return {
        "pages": [torch.zeros(PAGES, 2, PAGE_SIZE, 6)],
        "sources": sources,
        "destinations": destinations,
        "offsets": torch.arange(PAGE_SIZE * 6).int().view(PAGE_SIZE, 6),
    }


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"pages": []}, ValueError, "pages: expected at least one layer"),
        ({"pages": [1.0]}, TypeError, r"pages\[0\]: expected a tensor, got float"),
        ({"pages": [torch.zeros(2, 3)]}, ValueError, r"pages\[0\]: expected \[pages, heads"),
        (
            {"pages": [torch.zeros(6, 2, 4, 5)]},
            ValueError,
            r"offsets: expected contiguous \[4, 5\]",
        ),
        (
            {"pages": [torch.zeros(6, 2, 4, 12)[..., ::2]]},
            ValueError,
            r"pages\[0\]: expected a page",
        ),
        ({"pages": [torch.zeros(6, 2, 4, 6, requires_grad=True)]}, ValueError, "requires grad"),
        ({"sources": torch.arange(3)}, ValueError, "destinations: expected 3 slots like sources"),
        ({"sources": torch.arange(7).int()}, TypeError, "sources: expected int64"),
        ({"sources": torch.arange(18, 25)}, ValueError, "sources: expected slots 0 to 23, got 18"),
        ({"destinations": torch.arange(-1, 6)}, ValueError, "destinations: expected slots 0 to 23"),
        (
            {"destinations": torch.full((7,), 2)},
            ValueError,
            "destinations: expected every slot once",
        ),
        ({"destinations": moves(1)[0]}, ValueError, "destinations: expected no slot of sources"),
        (
            {"offsets": torch.zeros(4, 6).int()},
            ValueError,
            "offsets: expected each of 0 to 23 once",
        ),
        ({"offsets": torch.zeros(4, 6)}, TypeError, "offsets: expected int32"),
    ],
)
def test_bad_arguments(change, error, match):
    arguments = good_call() | change
    before = [x.clone() for x in arguments["pages"] if isinstance(x, torch.Tensor)]
    with pytest.raises(error, match=match):
        move_slots_(arguments.pop("pages"), **arguments)
    for x, old in zip(change.get("pages", []), before, strict=False):
        assert torch.equal(x, old)


def test_the_compiled_op_checks_for_itself():
    arguments = good_call()
    destinations = arguments["destinations"].clone()
    destinations[0] = arguments["sources"][1]
    with pytest.raises(ValueError, match="destinations: expected no slot of sources"):
        torch.ops.mem1.move_slots_(arguments["pages"], arguments["sources"], destinations, None)


def test_opcheck():
    arguments = good_call()
    for offsets in (None, arguments["offsets"]):
        torch.library.opcheck(
            torch.ops.mem1.move_slots_.default,
            (arguments["pages"], arguments["sources"], arguments["destinations"], offsets),
        )


def test_the_triton_launcher_moves_the_same():
    pytest.importorskip("triton")
    from mem1_kernels.ops.triton import prune_kv

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sources, destinations = moves(4)
    ours, theirs = layers(torch.bfloat16, 9), layers(torch.bfloat16, 9)
    if device == "cuda":
        ours = [x.to(device) for x in ours]
    prune_kv.move_slots_(ours, sources.to(device), destinations.to(device), None)
    reference.move_slots_(theirs, sources, destinations, None)
    for x, y in zip(ours, theirs, strict=True):
        assert_same_bytes(x.cpu(), y, "layer")
