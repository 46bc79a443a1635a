"""Segments, retention policies and layouts against slow, obvious versions."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1_kernels import (
    BlockPlan,
    Layout,
    Segment,
    Trajectory,
    fold,
    keep_all,
    keep_last,
    mem1,
    mem1_release,
    pack,
    trajectory_attention,
    unroll,
    visible,
)
from mem1_kernels.mask import visible_pairs
from mem1_kernels.retention import retained
from mem1_kernels.testing import turns
from mem1_kernels.trajectory import check_positions

GOLDEN = json.loads((Path(__file__).parent / "data" / "mem1_release_masks.json").read_text())


@st.composite
def segment_lists(draw, with_ids=False, max_turns=5, prompt=True):
    """A prompt, then turns with any of state, action and info, some of them empty."""
    segments = [Segment("prompt", draw(st.integers(1, 4)))] if prompt else []
    for turn in range(1, draw(st.integers(1, max_turns)) + 1):
        for role in ("state", "action", "info"):
            if draw(st.booleans()) or role == "action":
                segments.append(
                    Segment(role, draw(st.integers(0, 4)), turn, draw(st.integers(0, 2)))
                )
    if with_ids:
        number = iter(range(100, 10_000))
        segments = [
            Segment(s.role, [next(number) for _ in range(s.num_tokens)], s.turn, s.depth)
            for s in segments
        ]
    return segments


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=range(len(GOLDEN["cases"])))
def test_mem1_release_is_the_released_mask(case):
    segments = [Segment(role, tokens, turn) for role, turn, tokens in case["segments"]]
    trajectory = Trajectory(segments, mem1_release)
    want = torch.tensor([[c == "1" for c in row] for row in case["mask"]])
    assert torch.equal(visible(trajectory.expiry, trajectory.floor), want)
    assert trajectory.visible_pairs == int(want.sum())
    in_loss = torch.tensor([c == "1" for c in case["loss_mask"]])
    for span in trajectory.spans:  # the release counts the prompt in; a prompt is not generated
        if span.role == "prompt":
            in_loss[span.start : span.stop] = False
    assert torch.equal(trajectory.loss_mask, in_loss)


@given(segment_lists())
@settings(max_examples=150, deadline=None)
def test_mem1_mask_is_what_the_paper_says(segments):
    """Token by token: the live context is rebuilt by walking through the trajectory."""
    trajectory = Trajectory(segments)
    mask = visible(trajectory.expiry)
    alive: list[tuple[int, Segment]] = []
    token = 0
    for index, segment in enumerate(segments):
        for _ in range(segment.num_tokens):
            alive.append((token, segment))
            assert mask[token].nonzero().flatten().tolist() == [place for place, _ in alive]
            token += 1
        following = [s for s in segments[index + 1 :] if s.turn == segment.turn]
        writes = segment.role in ("state", "action")
        if writes and not any(s.role in ("state", "action") for s in following):
            alive = [
                (place, s) for place, s in alive if s.role == "prompt" or s.turn == segment.turn
            ]


@given(segment_lists(), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_keep_last_and_fold_and_keep_all(segments, count):
    owner = [index for index, s in enumerate(segments) for _ in range(s.num_tokens)]
    order = list(dict.fromkeys(s.turn for s in segments if s.role != "prompt"))

    def kept_last(key: Segment, query: Segment) -> bool:
        return key.role == "prompt" or order.index(query.turn) - order.index(key.turn) < count

    def folded(key: int, query: int) -> bool:
        return all(segments[i].depth >= segments[key].depth for i in range(key, query + 1))

    masks = {
        "last": visible(Trajectory(segments, keep_last(count)).expiry),
        "fold": visible(Trajectory(segments, fold).expiry),
        "all": visible(Trajectory(segments, keep_all).expiry),
    }
    for i, query in enumerate(owner):
        for k, key in enumerate(owner):
            causal = k <= i
            assert masks["all"][i, k] == causal
            assert masks["fold"][i, k] == (causal and folded(key, query))
            if segments[query].role != "prompt":
                assert masks["last"][i, k] == (causal and kept_last(segments[key], segments[query]))


@given(segment_lists())
@settings(max_examples=60, deadline=None)
def test_a_policy_never_takes_back_a_drop(segments):
    """What is dropped when a segment is about to be written stays so in the whole trajectory."""
    for policy in (mem1, keep_all, keep_last(2), fold):
        final, _ = retained(segments, policy)
        for now in range(1, len(segments)):
            expires, _ = retained(segments[: now + 1], policy)
            for past in range(now):
                assert (expires[past] > now) == (final[past] > now), policy


@given(segment_lists(), st.sampled_from([mem1, keep_all, keep_last(2), fold, mem1_release]))
@settings(max_examples=100, deadline=None)
def test_counts_match_the_dense_mask(segments, policy):
    trajectory = Trajectory(segments, policy)
    mask = visible(trajectory.expiry, trajectory.floor)
    assert trajectory.visible_pairs == int(mask.sum())
    alive = visible(trajectory.expiry).sum(1)
    assert trajectory.peak_context == (int(alive.max()) if len(alive) else 0)


@given(st.integers(1, 40), st.integers(0, 10_000), st.booleans())
@settings(max_examples=100, deadline=None)
def test_visible_pairs_of_any_expiry(tokens, seed, with_floor):
    generator = torch.Generator().manual_seed(seed)
    expiry = torch.randint(-2, tokens + 3, (2, tokens), generator=generator)
    floor = torch.randint(-2, tokens, (2, tokens), generator=generator) if with_floor else None
    assert visible_pairs(expiry, floor) == int(visible(expiry, floor).sum())


@given(st.lists(segment_lists(with_ids=True), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_packed_documents_see_what_they_saw_alone(lists):
    policies = [mem1, mem1_release, keep_last(1), fold]
    members = [Trajectory(s, p) for s, p in zip(lists, policies, strict=False)]
    packed = pack(members)
    want = torch.block_diag(*(visible(m.expiry, m.floor) for m in members))
    assert torch.equal(visible(packed.expiry, packed.floor), want.bool())
    for name in ("token_ids", "position_ids", "loss_mask"):
        assert torch.equal(getattr(packed, name), torch.cat([getattr(m, name) for m in members]))
    assert torch.equal(packed.source, torch.arange(packed.num_tokens))
    counts = torch.tensor([m.num_tokens for m in members])
    assert torch.equal(packed.document, torch.arange(len(members)).repeat_interleave(counts))
    begin = packed.predecessor == -1
    assert int(begin.sum()) == int((counts > 0).sum())


@given(segment_lists(with_ids=True), st.data(), st.sampled_from([mem1, mem1_release, keep_all]))
@settings(max_examples=60, deadline=None)
def test_a_group_behind_one_prompt_sees_what_its_members_saw_alone(first, data, policy):
    prompt = first[0]
    members = [Trajectory(first, policy)]
    for _ in range(data.draw(st.integers(1, 3))):
        rest = data.draw(segment_lists(with_ids=True, prompt=False))
        members.append(Trajectory([prompt, *rest], policy))
    document = Trajectory(data.draw(segment_lists(with_ids=True)), policy)
    packed = pack([document, members, document])
    assert packed.num_tokens == 2 * document.num_tokens + prompt.num_tokens + sum(
        m.num_tokens - prompt.num_tokens for m in members
    )
    mask = visible(packed.expiry, packed.floor)
    for number, member in enumerate([document, *members, document]):
        mine = (packed.document == number).nonzero().flatten()
        if 2 <= number <= len(members):  # the later members' prompt is the first one's
            begin = int((packed.document == 1).nonzero()[0])
            mine = torch.cat([torch.arange(begin, begin + prompt.num_tokens), mine])
        alone = visible(member.expiry, member.floor)
        assert torch.equal(mask[mine][:, mine], alone)
        assert int(mask[mine].sum()) == int(alone.sum())
        for name in ("token_ids", "position_ids", "loss_mask"):
            assert torch.equal(getattr(packed, name)[mine], getattr(member, name))
        before = packed.predecessor[mine]
        local = torch.full((packed.num_tokens + 1,), -1)
        local[mine] = torch.arange(len(mine))
        assert torch.equal(torch.where(before < 0, before, local[before]), member.predecessor)


@given(segment_lists(with_ids=True), st.sampled_from([mem1, keep_all, keep_last(2), fold]))
@settings(max_examples=100, deadline=None)
def test_unroll_is_the_live_text_of_every_generated_segment(segments, policy):
    trajectory = Trajectory(segments, policy)
    layout = unroll(trajectory)
    assert layout.positions == "reprefill"
    assert torch.equal(layout.token_ids, trajectory.token_ids[layout.source])
    generated = layout.source[layout.loss_mask]
    assert generated.sort().values.tolist() == trajectory.loss_mask.nonzero().flatten().tolist()
    in_tree, in_line = visible(layout.expiry), visible(trajectory.expiry)
    for token in layout.loss_mask.nonzero().flatten():
        seen = in_tree[token].nonzero().flatten()
        original = int(layout.source[token])
        assert layout.source[seen].tolist() == in_line[original].nonzero().flatten().tolist()
        assert layout.position_ids[seen].tolist() == list(range(len(seen)))
        before = int(layout.predecessor[token])
        assert before == (seen[-2] if len(seen) > 1 else -1)


def test_unrolled_groups_pack_into_one_tree():
    a, b = (turns(3, n, 2, 1, 4) for n in (3, 2))
    tree = pack([[unroll(a), unroll(b)]])
    assert tree.positions == "reprefill"
    assert tree.num_tokens == unroll(a).num_tokens + unroll(b).num_tokens - 3
    assert tree.source_tokens == a.num_tokens + b.num_tokens


def test_a_custom_policy_is_a_plain_function():
    def forget_info(segments):
        return [i + 1 if s.role == "info" else len(segments) for i, s in enumerate(segments)]

    trajectory = Trajectory(
        [Segment("prompt", 1), Segment("info", 2, 1), Segment("action", 1, 1)], forget_info
    )
    assert trajectory.expiry.tolist() == [4, 3, 3, 4]


def test_peak_context_is_constant_in_the_number_of_turns():
    assert {turns(300, n, 40, 16, 500).peak_context for n in (2, 3, 8, 32)} == {912}


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for layout in (turns(30, 4, 8, 4, 40), unroll(turns(30, 4, 8, 4, 40))):
        layout.plot(tmp_path / "mask.png", max_pixels=100)
        assert (tmp_path / "mask.png").read_bytes()[1:4] == b"PNG"


def _trajectory(**changes):
    arguments = {"segments": [Segment("prompt", 2), Segment("action", 2, 1)], **changes}
    return Trajectory(**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Segment("observation", 3), "role: expected one of"),
        (lambda: Segment("info", -1), "tokens: expected a count >= 0, got -1"),
        (lambda: Segment("info", 1, turn=-1), "turn: expected an integer >= 0, got -1"),
        (lambda: Segment("info", 1, turn=True), "turn: expected an integer >= 0, got True"),
        (lambda: Segment("info", 1, depth=1.5), "depth: expected an integer >= 0, got 1.5"),
        (lambda: Segment("info", "text"), "tokens: expected a count or a 1-D sequence of ids"),
        (lambda: Segment("info", [1, "a"]), "tokens: expected integer ids"),
        (lambda: Segment("info", [1, True]), "tokens: expected integer ids"),
        (lambda: Segment("info", [1, -2]), "tokens: expected ids >= 0, got -2"),
        (lambda: Segment("info", True), "tokens: expected a count or a 1-D sequence of ids"),
        (lambda: Segment("info", torch.zeros(2, 2, dtype=torch.int64)), "tokens: expected integer"),
        (lambda: Trajectory([]), "segments: expected at least one"),
        (
            lambda: Trajectory([Segment("action", 1, 2), Segment("action", 1, 1)]),
            "turns must not decrease, got 1 after 2",
        ),
        (
            lambda: Trajectory([Segment("action", 1), Segment("action", [3])]),
            "expected ids in all or in none, got them in 1 of 2",
        ),
        (lambda: _trajectory(retention=lambda s: [1]), "expected 2 expires, got 1"),
        (lambda: _trajectory(retention=lambda s: [0, 2]), "segment 0 must expire at 1..2, got 0"),
        (lambda: _trajectory(retention=lambda s: [1, 3]), "segment 1 must expire at 2..2, got 3"),
        (lambda: _trajectory(retention=lambda s: ([2, 2], [0])), "expected 2 floors, got 1"),
        (
            lambda: _trajectory(retention=lambda s: ([2, 2], [1, 0])),
            "segment 0 must see from 0..0, got 1",
        ),
        (lambda: keep_last(0), "turns: expected at least 1, got 0"),
        (lambda: pack([]), "items: expected at least one trajectory"),
        (lambda: pack([_trajectory(), []]), "none of the groups empty"),
        (lambda: pack([_trajectory(), unroll(_trajectory())]), "positions of one form"),
        (
            lambda: pack([_trajectory(), _trajectory(segments=[Segment("action", [1])])]),
            "token ids in all trajectories or in none",
        ),
        (
            lambda: pack([[_trajectory(), _trajectory(segments=[Segment("prompt", 3)])]]),
            r"one prompt of one length, got lengths \[2, 3\]",
        ),
        (
            lambda: pack([[_trajectory(segments=[Segment("action", 1)])] * 2]),
            r"one prompt of one length, got lengths \[0, 0\]",
        ),
        (
            lambda: pack([[_trajectory(segments=[Segment("prompt", [i])]) for i in (1, 2)]]),
            "member 1 of a group has another prompt",
        ),
        (
            lambda: pack([[_trajectory(retention=lambda s: [1, 2])] * 2]),
            "member 0 of a group drops a part of the shared prompt",
        ),
        (lambda: unroll(_trajectory(retention=mem1_release)), "a policy with floors has no"),
        (lambda: unroll(_trajectory(retention=lambda s: [1, 2])), "its prompt expires"),
        (
            lambda: check_positions("both"),
            "positions: expected 'kept', 'compact' or 'reprefill', got 'both'",
        ),
        (
            lambda: check_positions(None),
            "positions: expected 'kept', 'compact' or 'reprefill', got None",
        ),
        (lambda: check_positions(["kept"], "form"), "form: expected 'kept', 'compact' or"),
        (
            lambda: _trajectory().replaced(positions="both"),
            "positions: expected 'kept', 'compact' or",
        ),
        (
            lambda: _trajectory().replaced(position_ids=torch.arange(3)),
            r"position_ids: expected \[4\] like expiry, got \[3\]",
        ),
        (lambda: visible(torch.zeros(2, 2, 2, dtype=torch.int32)), r"expected \[tokens\] or"),
        (
            lambda: visible(torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)),
            r"floor: expected the shape of expiry \[2\], got \[3\]",
        ),
    ],
)
def test_value_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_type_errors():
    with pytest.raises(TypeError, match="expiry: expected int32 or int64, got torch.float32"):
        visible(torch.zeros(2))
    with pytest.raises(TypeError, match="expiry: expected a tensor, got list"):
        visible([1, 2])
    with pytest.raises(TypeError, match="segments: expected Segments, got str"):
        Trajectory("abc")
    with pytest.raises(TypeError, match="items: expected trajectories, got Segment"):
        pack([[Segment("prompt", 2)]])
    with pytest.raises(TypeError, match=r"replaced: expected fields of a Layout, got \['segments'"):
        _trajectory().replaced(segments=[])
    with pytest.raises(TypeError, match="position_ids: expected a tensor, got NoneType"):
        _trajectory().replaced(position_ids=None)
    with pytest.raises(TypeError, match="layout: expected a Layout, got Tensor"):
        BlockPlan.of(_trajectory().expiry)
    for turns_kept in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match=r"turns: expected an integer, as in keep_last\(2\)"):
            keep_last(turns_kept)


def test_keep_last_is_a_value():
    policy = keep_last(2)
    assert policy == keep_last(2) != keep_last(3) and hash(policy) == hash(keep_last(2))
    assert repr(policy) == policy.__name__ == "keep_last(2)"
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    with pytest.raises(FrozenInstanceError):
        policy.turns = 3


def test_a_layout_does_not_change():
    trajectory = _trajectory(retention=keep_last(2))
    for name in ("expiry", "position_ids", "positions", "segments", "retention"):
        with pytest.raises(FrozenInstanceError):
            setattr(trajectory, name, None)
    assert trajectory != _trajectory(retention=keep_last(2)) and len({trajectory, trajectory}) == 1

    assert trajectory.peak_context == 4 and trajectory.visible_pairs == 10
    shorter = trajectory.replaced(expiry=torch.tensor([1, 2, 3, 4]), positions="reprefill")
    assert (shorter.peak_context, shorter.visible_pairs, shorter.positions) == (1, 4, "reprefill")
    assert type(shorter) is type(trajectory.to("cpu")) is Layout
    assert trajectory.expiry.tolist() == [4, 4, 4, 4] and trajectory.peak_context == 4
    again = pickle.loads(pickle.dumps(trajectory))
    assert type(again) is Trajectory and again.segments == trajectory.segments
    assert again.retention == trajectory.retention and repr(again) == repr(trajectory)
    assert torch.equal(again.expiry, trajectory.expiry) and again.floor is None


def _with_ids(seed, policy=mem1):
    ids = iter(torch.randint(0, 99, (200,), generator=torch.Generator().manual_seed(seed)).tolist())
    return Trajectory(
        [
            Segment(segment.role, [next(ids) for _ in range(segment.num_tokens)], segment.turn)
            for segment in turns(5, 3, 2, 3, 4).segments
        ],
        policy,
    )


@pytest.mark.parametrize("form", ["line", "packed", "unrolled"])
def test_shift_labels_say_what_each_token_predicts(form):
    line = _with_ids(0)
    layout = {
        "line": line,
        "packed": pack([line, _with_ids(1)]),
        "unrolled": pack([unroll(line), unroll(_with_ids(1))]),
    }[form]
    shifted = layout.shift_labels()
    assert shifted.dtype == torch.int64 and shifted.shape == (layout.num_tokens,)
    want = [-100] * layout.num_tokens
    for token in range(layout.num_tokens):
        if layout.loss_mask[token]:
            want[layout.predecessor[token]] = int(layout.token_ids[token])
    assert shifted.tolist() == want and (shifted != -100).sum() == layout.loss_mask.sum()
    assert torch.equal(layout.shift_labels(-1), shifted.masked_fill(shifted == -100, -1))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (turns(5, 3, 2, 3, 4), "layout: has no token ids"),
        (Trajectory([Segment("action", [1, 2])]), "layout: token 0 is generated, but nothing"),
        (pack([[_with_ids(0), _with_ids(0)]]), "layout: token 4 predicts the first token of sev"),
    ],
)
def test_shift_labels_errors(layout, message):
    with pytest.raises(ValueError, match=message):
        layout.shift_labels()


@pytest.mark.parametrize("form", ["line", "packed", "tree", "copied", "moved"])
def test_an_expiry_is_not_taken_without_its_floor(form):
    """Else queries would see what their floor hides, in silence."""
    line = turns(20, 2, 4, 2, 9, retention=mem1_release)
    layout = {
        "line": line,
        "packed": pack([line, turns(20, 1, 4, 2, 9)]),
        "tree": pack([[line, line]]),
        "copied": copy.deepcopy(line),
        "moved": line.to("cpu"),
    }[form]
    inputs = [torch.randn(1, layout.num_tokens, 1, 16) for _ in range(3)]
    for use in (
        BlockPlan.from_expiry,
        lambda expiry: trajectory_attention(*inputs, expiry),
    ):
        with pytest.raises(ValueError, match="floor: expected the floor of the layout"):
            use(layout.expiry)
    assert torch.equal(BlockPlan.of(layout).floor, layout.floor[None])
    mine = torch.full((layout.num_tokens,), layout.num_tokens)
    layout.replaced(expiry=mine)
    causal = layout.replaced(floor=None)
    for free in (mine, causal.expiry, line.replaced(floor=None).expiry):
        assert BlockPlan.from_expiry(free).floor is None


def test_nested_packs_count_documents():
    a = Trajectory([Segment("prompt", 2), Segment("action", 1, 1)])
    b = Trajectory([Segment("prompt", 2)])  # nothing behind the shared prompt
    flat, nested = pack([[a, b], a]), pack([pack([[a, b]]), a])
    assert flat.document.tolist() == nested.document.tolist() == [0, 0, 0, 2, 2, 2]
    assert flat.num_documents == nested.num_documents == 3


@pytest.mark.parametrize("answer", [torch.tensor([2, 2]), (2, 2), [torch.tensor(2), 2]])
def test_a_policy_may_answer_with_any_integers(answer):
    segments = [Segment("prompt", 2), Segment("action", 1, 1)]
    assert Trajectory(segments, lambda segments: answer).expiry.tolist() == [3, 3, 3]


@pytest.mark.parametrize("answer", [range(2, 3), None, [2.0, 2], "22", 2])
def test_a_policy_that_answers_something_else(answer):
    def policy(segments):
        return answer

    with pytest.raises((TypeError, ValueError), match="policy: expected"):
        Trajectory([Segment("prompt", 2), Segment("action", 1, 1)], policy)
