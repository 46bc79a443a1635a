"""The plan's lists against the dense mask, for any expiry and floor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1_kernels import BlockPlan, pack, unroll, visible
from mem1_kernels.block_plan import BLOCK, MIN_CHUNK, build_lists
from mem1_kernels.ops._library import HAS_EXTENSION, OBSTACLE
from mem1_kernels.testing import random_expiry, turns

needs_extension = pytest.mark.skipif(not HAS_EXTENSION, reason=f"no extension: {OBSTACLE}")
SIZES = [1, 63, 127, 128, 129, 255, 256, 700, 1500]


def check_plan(plan: BlockPlan) -> None:
    layouts, tokens = plan.expiry.shape
    n = -(-tokens // BLOCK)
    mask = torch.zeros(layouts, n * BLOCK, n * BLOCK, dtype=torch.bool)
    mask[:, :tokens, :tokens] = visible(plan.expiry, plan.floor)
    tiles = mask.view(layouts, n, BLOCK, n, BLOCK)
    some, every = tiles.any(4).any(2), tiles.all(4).all(2)
    for layout in range(layouts):
        check_lists(plan, layout, "row", some[layout], every[layout], plan.floor is not None)
        check_lists(plan, layout, "col", some[layout].T, every[layout].T, plan.floor is not None)
        check_items(plan, layout)


def check_lists(plan, layout, side, some, every, has_floor) -> None:
    offsets, partial, tiles, order = (
        plan.named()[f"{side}_{name}"][layout].tolist()
        for name in ("offsets", "partial", "tiles", "order")
    )
    n = len(order)
    assert offsets[0] == 0
    assert len(tiles) == n * (n + 1) // 2
    assert not any(tiles[offsets[-1] :])
    weights = []
    for i in range(n):
        listed = tiles[offsets[i] : offsets[i + 1]]
        head, rest = listed[: partial[i]], listed[partial[i] :]
        assert rest == every[i].nonzero().flatten().tolist()
        want = (some[i] & ~every[i]).nonzero().flatten().tolist()
        assert head == sorted(set(head))
        assert set(want) <= set(head) if has_floor else want == head
        weights.append(4 * len(head) + 3 * len(rest))
    assert sorted(order) == list(range(n))
    ordered = [weights[i] for i in order]
    assert ordered == sorted(ordered, reverse=True)


def check_items(plan, layout) -> None:
    fields = ("item_column", "item_begin", "item_end", "item_slot")
    lists = plan.named()
    items = list(zip(*(lists[name][layout].tolist() for name in fields), strict=True))
    offsets = lists["col_offsets"][layout].tolist()
    n = len(offsets) - 1
    used = [item for item in items if item[0] >= 0]
    assert items[: len(used)] == used, "unused items come last"
    work = [end - begin for _, begin, end, _ in used]
    assert work == sorted(work, reverse=True)
    chunk = max(MIN_CHUNK, -(-2 * offsets[-1] // n))
    assert max(work) <= chunk
    slots = []
    for column in range(n):
        pieces = sorted(item[1:] for item in used if item[0] == column)
        ends = [offsets[column], *(end for _, end, _ in pieces)]
        assert ends[:-1] == [begin for begin, _, _ in pieces]
        assert ends[-1] == offsets[column + 1]
        first, count = (int(lists[f"col_{x}"][layout, column]) for x in ("first_slot", "slots"))
        if len(pieces) == 1:
            assert (pieces[0][2], first, count) == (-1, -1, 0)
        else:
            assert [slot for _, _, slot in pieces] == list(range(first, first + count))
            slots += range(first, first + count)
    assert len(slots) == len(set(slots)) <= n
    assert not slots or max(slots) < n


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("batch", [None, 3])
def test_random_expiry_and_floor(tokens, batch):
    generator = torch.Generator().manual_seed(tokens)
    expiry = random_expiry(tokens, generator, batch)
    floor = torch.randint(0, tokens, expiry.shape, generator=generator)
    check_plan(BlockPlan.from_expiry(expiry))
    check_plan(BlockPlan.from_expiry(expiry, floor))
    check_plan(BlockPlan.from_expiry(torch.full_like(expiry, tokens), floor.sort(-1).values))


@pytest.mark.parametrize("tokens", SIZES)
def test_causal_dead_and_windowed(tokens):
    token = torch.arange(tokens)
    for expiry in (torch.full((tokens,), tokens), token, torch.zeros_like(token) - 1, token + 200):
        check_plan(BlockPlan.from_expiry(expiry))


@given(st.integers(1, 700), st.integers(1, 14), st.integers(0, 90), st.integers(0, 500))
@settings(max_examples=25, deadline=None)
def test_mem1_layouts(prompt, count, write, info):
    check_plan(BlockPlan.of(turns(prompt, count, write, 16, info)))


def test_a_long_prompt_column_is_split():
    plan = BlockPlan.of(turns(128, 40, 50, 14, 192))
    assert int(plan.named()["col_slots"][0, 0]) > 1
    check_plan(plan)


def test_memory_is_what_the_docstring_says():
    plan = BlockPlan.from_expiry(torch.arange(1, 32769))
    n = 256
    assert plan.lists.numel() * 4 == 4 * (n * (n + 1) + 2 * (3 * n + 1) + 4 * 2 * n + 2 * n + 2 * 3)


def test_int64_and_strided_input_give_the_same_plan():
    expiry = random_expiry(300, torch.Generator().manual_seed(0), 2)
    want = BlockPlan.from_expiry(expiry)
    spread = torch.stack([expiry.long(), expiry.long()], 2)[:, :, 0]
    got = BlockPlan.from_expiry(spread)
    assert torch.equal(got.expiry, want.expiry)
    assert torch.equal(got.lists, want.lists)


def test_a_plan_of_a_layout_knows_what_a_model_must_be_given():
    line = turns(9, 3, 2, 2, 6)
    plan = BlockPlan.of(line)
    assert torch.equal(plan.lists, BlockPlan.from_expiry(line.expiry).lists)
    assert plan.predecessor.tolist() == [list(range(-1, line.num_tokens - 1))]
    assert not plan.needs_position_ids
    for layout in (
        pack([line, line]),
        pack([[line, line]]),
        unroll(line),
        line.replaced(position_ids=line.position_ids + 1),
    ):
        plan = BlockPlan.of(layout).to("cpu")
        assert plan.needs_position_ids and torch.equal(plan.predecessor[0], layout.predecessor)
    bare = BlockPlan.from_expiry(line.expiry)
    assert bare.predecessor is None and not bare.needs_position_ids


def masks(tokens: int, layouts: int, generator: torch.Generator):
    """(expiry, floor) of every kind, int32 [layouts, tokens]; no floor is one of them."""
    token = torch.arange(tokens, dtype=torch.int32)

    def numbers(low: int, high: int) -> torch.Tensor:
        shape = (layouts, tokens)
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    expiries = [
        numbers(-5, 2 * tokens),
        token + numbers(0, 400),
        (token + numbers(0, 400)).cummax(1).values,
        numbers(tokens, tokens + 1),
        numbers(-(2**31), 2**31 - 1),
    ]
    floors = [
        None,
        numbers(-9, tokens + 9),
        numbers(-9, tokens + 9).sort(1).values,
        (token - numbers(0, 300)).clamp(min=0),
        numbers(-(2**31), 2**31 - 1),
    ]
    for expiry in expiries:
        for floor in floors:
            yield expiry.contiguous(), floor


@pytest.mark.parametrize("tokens", [*SIZES, 5000])
@pytest.mark.parametrize("layouts", [1, 3])
def test_the_compiled_op_gives_the_lists_of_plain_torch(tokens, layouts):
    """Entry by entry, the unused ones included."""
    generator = torch.Generator().manual_seed(tokens)
    for expiry, floor in masks(tokens, layouts, generator):
        got = torch.ops.mem1.block_plan(expiry, floor)
        assert torch.equal(got, build_lists(expiry, floor))


def test_the_compiled_op_takes_strided_rows_and_threads_agree():
    expiry, floor = torch.randint(0, 900, (2, 7, 700), dtype=torch.int32).mT.contiguous().mT
    assert not expiry.is_contiguous()
    want = build_lists(expiry, floor)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(torch.ops.mem1.block_plan(expiry, floor), want)
    finally:
        torch.set_num_threads(threads)


@needs_extension
def test_a_million_tokens_list_what_they_see():
    """268 MB of lists, of which a fraction is touched; plain torch would need minutes here."""
    expiry = torch.arange(2**20, dtype=torch.int32)[None] + 300
    plan = BlockPlan.from_expiry(expiry)
    n = 2**20 // BLOCK
    rows, offsets, partial, tiles = (x[0] for x in plan.rows)
    # A tile sees itself, the two before it, and a part of the third.
    assert offsets.diff().tolist() == [1, 2, 3] + [4] * (n - 3)
    assert tiles[offsets[5000] : offsets[5001]].tolist() == [4997, 4998, 5000, 4999]
    assert partial.tolist() == [1, 1, 2] + [3] * (n - 3)
    assert sorted(rows.tolist()) == list(range(n))


@pytest.mark.parametrize(
    ("expiry", "floor", "message"),
    [
        (torch.zeros(3, 4), None, "expiry: expected int32"),
        (torch.zeros(4, dtype=torch.int32), None, "expiry: expected int32"),
        (torch.zeros(2, 0, dtype=torch.int32), None, "expiry: expected int32"),
        (torch.zeros(2, 4).int(), torch.zeros(2, 5).int(), "floor: expected int32"),
        (torch.zeros(2, 4).int(), torch.zeros(2, 4).long(), "floor: expected int32"),
    ],
)
@needs_extension
def test_the_compiled_op_checks_what_it_reads(expiry, floor, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.mem1.block_plan(expiry, floor)


def test_errors():
    with pytest.raises(TypeError, match="layout: expected a Layout, got Tensor"):
        BlockPlan.of(torch.zeros(4).int())
    with pytest.raises(ValueError, match="expiry: expected at least one token, got none"):
        BlockPlan.from_expiry(torch.zeros(0, dtype=torch.int32))
    with pytest.raises(TypeError, match="expiry: expected int32 or int64, got torch.float32"):
        BlockPlan.from_expiry(torch.zeros(4))
    with pytest.raises(ValueError, match="floor: expected the shape of expiry"):
        BlockPlan.from_expiry(torch.zeros(4).int(), torch.zeros(5).int())


def test_opcheck():
    expiry = random_expiry(300, torch.Generator().manual_seed(0), 2)
    torch.library.opcheck(torch.ops.mem1.block_plan, (expiry, None))
    torch.library.opcheck(torch.ops.mem1.block_plan, (expiry, torch.zeros_like(expiry)))
