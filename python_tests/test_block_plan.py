"""The plan's lists against the dense mask, for any expiry and floor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1_kernels import BlockPlan, pack, unroll, visible
from mem1_kernels.block_plan import BLOCK, MIN_CHUNK
from mem1_kernels.testing import random_expiry, turns

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
