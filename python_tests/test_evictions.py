"""Trajectories whose keys another engine dropped: the mask, the input that is refused, the logits.

The oracle of the logits is transformers alone: the stock model decodes token by token on a
DynamicCache, and keys leave it by plain indexing.
"""

from __future__ import annotations

import pickle
import random

import pytest
import torch
import transformers
from test_exactness import FAMILIES, make_model

from mem1_kernels import (
    BlockPlan,
    Segment,
    Trajectory,
    append_kv_,
    cached_attention,
    mem1,
    pack,
    prune_kv_,
    trajectory_attention,
    visible,
)
from mem1_kernels.rollout import score
from mem1_kernels.testing import assert_within_budget, plain_attention


def random_evictions(tokens: int, seed: int) -> list[int | None]:
    """When each key leaves: a third never, the others at once or later, some in the same step."""
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(1, tokens), tokens // 4))
    return [
        None if rng.random() < 0.33 else rng.choice([s for s in steps if s > token] or [None])
        for token in range(tokens)
    ]


def snapshots(evicted_at: list[int | None]) -> list[tuple[int, list[int]]]:
    """What is in the cache after each step at which something left."""
    steps = sorted({step for step in evicted_at if step is not None})
    return [
        (step, [t for t in range(step) if evicted_at[t] is None or evicted_at[t] > step])
        for step in steps
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_is_what_was_in_the_cache(seed):
    rng = random.Random(seed)
    tokens = rng.randint(1, 90)
    evicted_at = random_evictions(tokens, seed)
    in_loss = [rng.random() < 0.6 for _ in range(tokens)]
    weights = [rng.choice([1.0, 0.5, 2.0]) for _ in range(tokens)]
    made = Trajectory.from_evictions(
        list(range(tokens)), evicted_at, loss_mask=in_loss, weights=weights
    )
    mask = visible(made.expiry).tolist()
    for query in range(tokens):
        for key in range(tokens):
            gone = evicted_at[key] is not None and evicted_at[key] <= query
            assert mask[query][key] == (key <= query and not gone)
    assert made.token_ids.tolist() == list(range(tokens))
    assert made.position_ids.tolist() == list(range(tokens))
    assert made.loss_mask.tolist() == in_loss
    if made.weights is not None:
        assert made.weights.tolist() == weights
    else:
        assert set(weights) == {1.0}
    live = Trajectory.from_evictions(torch.arange(tokens), live=snapshots(evicted_at))
    assert torch.equal(live.expiry, made.expiry)
    # It is a trajectory as any other: rebuilt, packed, pickled.
    again = Trajectory(made.segments, pickle.loads(pickle.dumps(made.retention)))
    assert torch.equal(again.expiry, made.expiry) and again.retention == made.retention
    packed = pack([Trajectory([Segment("prompt", [3, 4])]), made])
    assert torch.equal(packed.expiry[2:], made.expiry + 2)


def test_what_our_own_policy_drops_reads_back_the_same():
    turn = [("state", 3), ("action", 2), ("info", 4)]
    segments = [Segment("prompt", range(5))]
    for number in (1, 2, 3, 4):
        segments += [Segment(role, [7] * count, number) for role, count in turn]
    ours = Trajectory(segments, mem1)
    made = Trajectory.from_evictions(ours.token_ids, ours.expiry, loss_mask=ours.loss_mask)
    for name in ("expiry", "position_ids", "loss_mask", "predecessor", "token_ids", "turn"):
        assert torch.equal(getattr(made, name), getattr(ours, name)), name


@torch.no_grad()
def decoded(model, ids: list[int], evicted_at: list[int | None]) -> torch.Tensor:
    """Logits of a stock model that decodes token by token; keys leave its cache by indexing."""
    cache = transformers.DynamicCache(config=model.config)
    held: list[int] = []
    rows = []
    for token, token_id in enumerate(ids):
        kept = [at for at, key in enumerate(held) if (evicted_at[key] or len(ids) + 1) > token]
        if len(kept) < len(held):
            for layer in cache.layers:
                layer.keys = layer.keys[:, :, kept]
                layer.values = layer.values[:, :, kept]
            held = [held[at] for at in kept]
        step = model(
            torch.tensor([[token_id]]),
            position_ids=torch.tensor([[token]]),
            past_key_values=cache,
        )
        held.append(token)
        rows.append(step.logits[0, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma3"])
def test_logits_equal_a_cache_that_evicts_at_these_times(family, seed):
    """gemma3's stock cache of a sliding layer cannot lose single keys; test_exactness has it."""
    model = make_model(family)
    rng = random.Random(seed)
    ids = [rng.randrange(4, 60) for _ in range(120)]
    evicted_at = random_evictions(len(ids), seed)
    evicted_at[0] = None if seed else 50  # the first key, too, may go
    want = torch.log_softmax(decoded(model, ids, evicted_at), 1)
    loss_mask = [0] + [1] * (len(ids) - 1)
    made = Trajectory.from_evictions(ids, evicted_at, loss_mask=loss_mask)
    with torch.no_grad():
        got = score(model, made)[1:]
        causal = score(model, Trajectory.from_evictions(ids, live=[], loss_mask=loss_mask))[1:]
    want = want[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (got - want).abs().max() <= 2e-5
    assert (causal - want).abs().max() > 0.5  # had nothing been dropped


ERRORS = {
    "token_ids: expected at least one, got none": ([], []),
    "expected one of them, got both or none": ([1], None),
    "evicted_at: expected 2 values like token_ids, got 1": ([1, 2], [None]),
    "evicted_at: token 1 leaves at 1, before it is written; expected more than 1": (
        [1, 2],
        [None, 1],
    ),
    "evicted_at: token 0 leaves at -1, before it is written": ([1, 2], [-1, None]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    ids, evicted_at = ERRORS[message]
    with pytest.raises(ValueError, match=message):
        Trajectory.from_evictions(ids, evicted_at)


LIVE_ERRORS = {
    r"live: token 1 comes back at step 4 \(snapshot 1\); it was gone at step 3": [
        (3, [0, 2]),
        (4, [0, 1, 2]),
    ],
    "live: expected steps that rise from 0 to at most 4, got 2 after 3": [(3, [0]), (2, [0])],
    "live: expected steps that rise from 0 to at most 4, got 5 after 0": [(5, [0])],
    "live: expected tokens from 0 to 1 in the cache at step 2, got 0 to 2": [(2, [0, 2])],
}


@pytest.mark.parametrize("message", LIVE_ERRORS)
def test_snapshots_that_cannot_be(message):
    with pytest.raises(ValueError, match=message):
        Trajectory.from_evictions([1, 2, 3, 4], live=LIVE_ERRORS[message])


def test_arguments_of_another_type():
    for arguments, message in (
        (([1.5], [None]), "token_ids: expected integers, got torch.float32"),
        (([1, 2], [1.5, 3.5]), "evicted_at: expected integers, got torch.float32"),
        ((["a"], [None]), "token_ids: expected integers"),
    ):
        with pytest.raises(TypeError, match=message):
            Trajectory.from_evictions(*arguments)
    with pytest.raises(TypeError, match="loss_mask: expected bool, got torch.float32"):
        Trajectory.from_evictions([1], [None], loss_mask=[0.5])
    with pytest.raises(ValueError, match=r"weights: expected \[2\] like token_ids, got \[1\]"):
        Trajectory.from_evictions([1, 2], [None, None], weights=[1.0])
    with pytest.raises(ValueError, match="tokens: expected ids >= 0, got -3"):
        Trajectory.from_evictions([-3], [None])


def test_a_record_is_of_one_trajectory():
    made = Trajectory.from_evictions([1, 2, 3], [2, None, None])
    with pytest.raises(ValueError, match="retention: recorded for 3 segments, got 1"):
        Trajectory([Segment("prompt", 3)], made.retention)


def heads_as_rows(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[1, tokens, heads, head_dim] -> [kv_heads, tokens, heads per KV head, head_dim], a view."""
    return x[0].unflatten(1, (kv_heads, -1)).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_kv_head_may_drop_keys_of_its_own(dtype):
    """KV heads as rows of the batch: attention and gradients within the budget of the kernels, and
    a cache that each head prunes at its own times gives the same rows."""
    tokens, kv_heads, group, head_dim = 150, 2, 3, 16
    generator = torch.Generator().manual_seed(3)
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    query, key, value, grad_out = (
        torch.randn(1, tokens, h, head_dim, generator=generator).to(dtype) for h in heads
    )
    left = [[s or tokens for s in random_evictions(tokens, seed)] for seed in (5, 6)]
    expiry = torch.tensor(left, dtype=torch.int32)
    rows = [heads_as_rows(x, kv_heads) for x in (query, key, value)]
    assert all(
        row.data_ptr() == x.data_ptr() for row, x in zip(rows, (query, key, value), strict=True)
    )
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    plan = BlockPlan.from_expiry(expiry)
    out = trajectory_attention(*(heads_as_rows(x, kv_heads) for x in leaves), plan=plan)
    out.backward(heads_as_rows(grad_out, kv_heads))
    dense = [heads_as_rows(x, kv_heads) for x in (query, key, value)]
    slow = [
        plain_attention(*dense, expiry, None, heads_as_rows(grad_out, kv_heads), dtype=precision)
        for precision in (dtype, torch.float64)
    ]
    assert_within_budget("out", out.detach(), slow[0].out, slow[1].out)
    for name, leaf in zip(("query", "key", "value"), leaves, strict=True):
        plain, exact = (getattr(result, f"grad_{name}") for result in slow)
        assert_within_budget(name, heads_as_rows(leaf.grad, kv_heads), plain, exact)

    shape = (kv_heads, 1, tokens, head_dim)
    keys, values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    ends = torch.zeros(kv_heads, tokens, dtype=torch.int32)
    lengths = torch.zeros(kv_heads, dtype=torch.int32)
    decoded = []
    for now in range(tokens):
        prune_kv_([keys], [values], lengths, keep=ends > now, slots=[ends])
        new = [row[:, now : now + 1] for row in rows]
        append_kv_(new[1].transpose(1, 2), new[2].transpose(1, 2), keys, values, lengths)
        ends[torch.arange(kv_heads), lengths.long()] = expiry[:, now]
        lengths += 1
        decoded.append(cached_attention(new[0], keys, values, lengths))
    assert lengths[0] != lengths[1]
    assert_within_budget("decoded", torch.cat(decoded, 1), slow[0].out, slow[1].out)
