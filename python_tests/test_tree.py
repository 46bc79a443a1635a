"""`pack_tree`: logits and gradients are those of each row run alone, whatever the rows share."""

from __future__ import annotations

import random
from copy import deepcopy

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1_kernels import (
    BlockPlan,
    Segment,
    TokenRow,
    Trajectory,
    fold,
    pack,
    pack_tree,
    trajectory_attention,
    unroll,
    visible,
)
from mem1_kernels.hf import TrajectoryCollator, patched
from mem1_kernels.retention import retained
from mem1_kernels.rollout import score
from mem1_kernels.testing import assert_within_budget

VOCABULARY = 40


def random_rows(rng: random.Random, count: int, depth: int, alphabet: int = 3) -> list[TokenRow]:
    """Rows that branch off one another again and again, some empty, equal, or prefixes."""
    rows: list[list[int]] = [[rng.randrange(alphabet) for _ in range(rng.randint(0, 6))]]
    while len(rows) < count:
        base = rng.choice(rows)
        kept = base[: rng.randint(0, len(base))]
        more = [rng.randrange(alphabet) for _ in range(rng.randint(0, 2 * depth))]
        rows.append(rng.choice([kept + more, list(base), kept]))
    rng.shuffle(rows)
    made = []
    for ids in rows:
        mask = [rng.random() < 0.5 for _ in ids]
        weights = [rng.random() for _ in ids] if rng.random() < 0.5 else None
        made.append(TokenRow(ids, mask, weights))
    return made if any(len(row) for row in made) else [TokenRow([1])]


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 12), st.integers(1, 4))
def test_every_token_sees_its_own_row_and_nothing_else(seed, count, depth, alphabet):
    rows = random_rows(random.Random(seed), count, depth, alphabet)
    tree = pack_tree(rows)
    ids, seen = tree.token_ids, visible(tree.expiry)
    places = tree.gather_rows(torch.arange(tree.num_tokens))
    for row, place in zip(rows, places, strict=True):
        assert torch.equal(ids[place], row.token_ids)
        assert torch.equal(tree.position_ids[place], torch.arange(len(row)))
        for depth_here, token in enumerate(place.tolist()):
            assert seen[token].nonzero().flatten().tolist() == place[: depth_here + 1].tolist()
            assert tree.predecessor[token] == (place[depth_here - 1] if depth_here else -1)
    # shared once: no two tokens of the tree are the same prefix
    prefixes = {tuple(row.token_ids[: n + 1].tolist()) for row in rows for n in range(len(row))}
    assert tree.num_tokens == len(prefixes)
    joined = torch.cat([row.token_ids for row in rows])
    assert torch.equal(joined[tree.source], ids) and tree.source_tokens == len(joined)
    weights = torch.zeros(tree.num_tokens)
    for row, place in zip(rows, places, strict=True):
        own = torch.ones(len(row)) if row.weights is None else row.weights
        weights[place] += own * row.loss_mask
        assert tree.loss_mask[place[row.loss_mask]].all()
    assert torch.allclose(tree.weights, weights)
    assert int(tree.loss_mask.sum()) == int((weights > 0).sum())


def test_rows_stand_in_the_order_given():
    rows = [TokenRow([9, 8, 1]), TokenRow([9, 8, 0]), TokenRow([9, 2]), TokenRow([1]), TokenRow([])]
    tree = pack_tree(rows)
    assert tree.token_ids.tolist() == [9, 8, 1, 0, 2, 1]
    assert tree.document.tolist() == [0, 0, 0, 1, 2, 3] and tree.num_documents == 5
    assert tree.predecessor.tolist() == [-1, 0, 1, 1, 0, -1]


def deep_rows(rng: random.Random, count: int, depth: int) -> list[TokenRow]:
    """Rows that leave one line of `depth` forks, some again and again, some where others end."""
    line: list[int] = []
    ends = []
    for _ in range(depth):
        line += [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 5))]
        ends.append(len(line))
    rows = [line, [], *(line[:end] for end in ends)]
    while len(rows) < count:
        end = ends[rng.randrange(depth)]
        fork = (line + [0])[end] + 1  # another token than the line's next one
        rows.append([*line[:end], fork, *(rng.randrange(2) for _ in range(rng.randint(0, 6)))])
    rng.shuffle(rows)
    return [TokenRow(ids) for ids in rows[:count]]


def forks(tree) -> int:
    """The most forks on the way to one token: tokens that predict more than one, or end a row."""
    several = torch.zeros(tree.num_tokens, dtype=torch.int64)
    before = tree.predecessor[tree.predecessor >= 0]
    several.index_add_(0, before, torch.ones_like(before))
    last = [place[-1] for place in tree.gather_rows(torch.arange(tree.num_tokens)) if len(place)]
    several.index_add_(0, torch.stack(last), torch.ones(len(last), dtype=torch.int64))
    above: list[int] = []
    for token, parent in enumerate(tree.predecessor.tolist()):
        above.append((above[parent] if parent >= 0 else 0) + int(several[token] > 1))
    return max(above)


def attention_apart(rows, query, key, value):
    """Causal attention of each row alone; row tokens are laid behind each other."""
    outs, begin = [], 0
    for row in rows:
        end = begin + len(row)
        if len(row):
            part = (x[:, begin:end].transpose(1, 2) for x in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(
                *part, is_causal=True, scale=0.25
            )
            outs.append(out.transpose(1, 2))
        begin = end
    return torch.cat(outs, 1)


FAMILIES = {
    "2 rows": lambda: random_rows(random.Random(2), 2, 3),
    "7 rows": lambda: random_rows(random.Random(7), 7, 20),
    "60 rows": lambda: random_rows(random.Random(60), 60, 8),
    "500 rows": lambda: random_rows(random.Random(500), 500, 12),
    "depth 50": lambda: deep_rows(random.Random(1), 120, 50),
    "depth 50, 500 rows": lambda: deep_rows(random.Random(2), 500, 50),
    "one row 40 times": lambda: [TokenRow(list(range(30)))] * 40,
    "each row a prefix of the next": lambda: [TokenRow(list(range(n))) for n in range(130)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_those_of_the_rows_apart_in_fp64(family):
    rows = FAMILIES[family]()
    tree = pack_tree(rows)
    if family.startswith("depth"):
        assert forks(tree) >= 50
    generator = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(1, tree.num_tokens, 2, 16, dtype=torch.float64, generator=generator)
        for _ in range(3)
    ]
    grad = torch.randn(1, tree.source_tokens, 2, 16, dtype=torch.float64, generator=generator)

    def apart(dtype):
        """Output and gradients of the rows run apart, over the same shared inputs."""
        inputs = [x.to(dtype).requires_grad_() for x in exact]
        out = attention_apart(rows, *(x[:, tree.index] for x in inputs))
        return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]

    inputs = [x.float().requires_grad_() for x in exact]
    out = trajectory_attention(*inputs, plan=BlockPlan.of(tree), scale=0.25)
    gathered = torch.cat(tree.gather_rows(out[0]))[None]
    mine = [gathered, *torch.autograd.grad(gathered, inputs, grad.float())]
    names = ("out", "grad of query", "grad of key", "grad of value")
    for name, got, plain, want in zip(
        names, mine, apart(torch.float32), apart(torch.float64), strict=True
    ):
        assert_within_budget(name, got, plain, want)


@pytest.mark.parametrize("count", [2, 12])
def test_a_models_log_probs_and_gradients_equal_those_of_the_rows_apart(count):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = transformers.Qwen2ForCausalLM(config)
    coarse, exact = deepcopy(model), deepcopy(model).double()
    rng = random.Random(count)
    rows = random_rows(rng, count, 9, alphabet=VOCABULARY)
    rows = [
        TokenRow([1, *row.token_ids.tolist()], [0, *row.loss_mask.int().tolist()]) for row in rows
    ]
    tree = pack_tree(rows)
    weights = [torch.rand(len(row)) for row in rows]

    with patched(model):
        log_probs = tree.gather_rows(score(model, tree))
        parts = zip(weights, log_probs, rows, strict=True)
        loss = sum((weight * got * row.loss_mask).sum() for weight, got, row in parts)
        loss.backward()
    mine = {name: p.grad for name, p in model.named_parameters()}
    plain = {name: p.grad for name, p in grad_apart(coarse, rows, weights).named_parameters()}
    for name, parameter in grad_apart(exact, rows, weights).named_parameters():
        assert_within_budget(name, mine[name], plain[name], parameter.grad)
    with torch.no_grad():
        for row, got in zip(rows, log_probs, strict=True):
            alone = log_probs_alone(exact, row)
            assert (alone - got * row.loss_mask).abs().max() <= 2e-5


def log_probs_alone(model, row: TokenRow) -> torch.Tensor:
    """Of the row's tokens in the loss, by a causal pass of the row alone; 0 elsewhere."""
    ids = row.token_ids[None]
    logits = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    alone = torch.zeros(len(row), dtype=logits.dtype)
    alone[1:] = logits.gather(1, ids[0, 1:, None])[:, 0]
    return alone * row.loss_mask


def grad_apart(model, rows, weights):
    """The model with the gradient of the weighted loss, row by row."""
    parts = zip(rows, weights, strict=True)
    sum((weight * log_probs_alone(model, row)).sum() for row, weight in parts).backward()
    return model


def test_trees_are_layouts():
    tree = pack_tree([TokenRow([1, 2, 3], [0, 1, 1]), TokenRow([1, 5], [0, 1])])
    both = pack([tree, tree])
    assert both.num_tokens == 8 and both.num_documents == 4
    assert both.expiry.tolist() == [4, 3, 3, 4, 8, 7, 7, 8]
    moved = tree.to("cpu")
    assert type(moved) is type(tree) and torch.equal(moved.expiry, tree.expiry)
    assert tree.positions == "reprefill"


def test_many_tokens_in_linear_time_and_memory():
    """A million tokens: 500 rows that share 1,000 and go on for 1,000 more each."""
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(0, 1000, (1000,), generator=generator)
    rows = [
        TokenRow(torch.cat([prefix, torch.randint(0, 1000, (1000,), generator=generator)]))
        for _ in range(500)
    ]
    tree = pack_tree(rows)
    assert 1000 + 500 * 990 < tree.num_tokens <= 501_000
    ladder = torch.randint(0, 9, (2000,), generator=generator)
    deep = pack_tree([TokenRow(ladder[: n + 1]) for n in range(1400)])  # prefixes of each other
    assert deep.num_tokens == 1400 and deep.source_tokens == 980_700
    assert (deep.expiry == 1400).all()


ERRORS = {
    "token_ids: expected ids >= 0, got -1": (ValueError, lambda: TokenRow([-1])),
    "token_ids: expected torch.int64": (TypeError, lambda: TokenRow([1.5])),
    "token_ids: expected [tokens], got [1, 2]": (ValueError, lambda: TokenRow([[1, 2]])),
    "loss_mask: expected 2 values like token_ids, got 1": (
        ValueError,
        lambda: TokenRow([1, 2], [True]),
    ),
    "loss_mask: expected torch.bool": (TypeError, lambda: TokenRow([1, 2], [0, 2])),
    "weights: expected finite numbers where loss_mask": (
        ValueError,
        lambda: TokenRow([1, 2], [0, 1], weights=[0.0, float("nan")]),
    ),
    "log_probs: expected torch.float32": (
        TypeError,
        lambda: TokenRow([1], [1], log_probs=torch.tensor([True])),
    ),
    "rows: expected TokenRows, got list": (TypeError, lambda: pack_tree([[1]])),
    "rows: expected at least one token": (ValueError, lambda: pack_tree([TokenRow([])])),
    "values: expected [1, ...], got [2]": (
        ValueError,
        lambda: pack_tree([TokenRow([1])]).gather_rows(torch.zeros(2)),
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    kind, call = ERRORS[message]
    with pytest.raises(kind) as raised:
        call()
    assert message in str(raised.value)


def test_what_is_not_in_the_loss_may_be_anything():
    row = TokenRow([1, 2], [0, 1], weights=[float("nan"), 2.0], log_probs=[float("nan"), -1.0])
    assert pack_tree([row]).weights.tolist() == [0.0, 2.0]


def test_text_that_survives_is_computed_once_when_it_is_sent_again():
    """A branch returns: the outer text before it stays, and is shared by all later turns."""
    segments = [Segment("prompt", 10)]
    for turn, depth in enumerate((0, 1, 1, 0, 0, 1, 0), 1):
        segments += [Segment("action", 5, turn, depth), Segment("info", 20, turn, depth)]
    trajectory = Trajectory(segments, fold)
    layout = unroll(trajectory)
    expires, _ = retained(segments, fold)
    contexts = [
        [i for i in range(index + 1) if expires[i] > index]
        for index, segment in enumerate(segments)
        if segment.role == "action"
    ]
    prefixes = {tuple(context[:n]) for context in contexts for n in range(1, len(context) + 1)}
    once = sum(segments[prefix[-1]].num_tokens for prefix in prefixes)
    apart = sum(segments[i].num_tokens for context in contexts for i in context)
    assert layout.num_tokens == once < apart
    assert int(layout.loss_mask.sum()) == 5 * 7
    assert sorted(layout.source[layout.loss_mask].tolist()) == sorted(
        trajectory.loss_mask.nonzero().flatten().tolist()
    )


collate = TrajectoryCollator()
SEGMENTS = [["prompt", 0, [5, 6]], ["state", 1, [7]], ["action", 1, [8]]]
ODD = {
    "examples: expected a list of examples, got NoneType": lambda: collate(None),
    "examples: expected a list of examples, got int": lambda: collate(5),
    "examples: expected a list of examples, got one": lambda: collate({"segments": SEGMENTS}),
    "examples: expected one with 'segments', got int": lambda: collate([5]),
    "examples: expected 'segments' in example 0, got .5, 'a'.": lambda: collate([{5: 1, "a": 2}]),
    "segments: expected a list of segments, got int": lambda: collate([{"segments": 5}]),
    "segments: expected a list of segments, got str": lambda: collate([{"segments": "abc"}]),
    "ids: expected token ids, got int": lambda: collate([{"segments": [["prompt", 0, 5]]}]),
    "ids: expected token ids, got str": lambda: collate([{"segments": [["prompt", 0, "a"]]}]),
    "tokens: expected integer ids, got 1.5": lambda: Segment("prompt", [1.5]),
    "tokens: expected ids below 2.63, got": lambda: Segment("prompt", [2**63]),
    "retention: expected a function such as mem1, got 5": lambda: TrajectoryCollator(5),
    "token_ids: expected numbers, got None": lambda: TokenRow(None),
    "weights: expected numbers, got .None, 1.": lambda: TokenRow([1, 2], [0, 1], [None, 1]),
    "rows: expected a list of TokenRows, got NoneType": lambda: pack_tree(None),
    "rows: expected a list of TokenRows, got TokenRow": lambda: pack_tree(TokenRow([1, 2])),
    "items: expected a list of trajectories or groups, got int": lambda: pack(5),
    "items: expected trajectories or groups, got NoneType": lambda: pack([None]),
    "segments: expected Segments, got NoneType": lambda: Trajectory(None),
    "values: expected a tensor, got list": lambda: pack_tree([TokenRow([1])]).gather_rows([1]),
}


@pytest.mark.parametrize("message", ODD)
def test_arguments_of_another_type(message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        ODD[message]()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_ids_of_any_array(kind):
    example = {"segments": [["prompt", 0, kind([5, 6])], ["state", 1, kind([7])]]}
    assert collate([example])["input_ids"].tolist() == [[5, 6, 7]]
