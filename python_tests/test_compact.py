"""Compact positions: survivors move at every boundary, and training computes the same."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace

import pytest
import torch
import transformers
from test_exactness import (
    FAMILIES,
    PROMPTS,
    STOP,
    VOCABULARY,
    World,
    largest_difference,
    make_model,
    mark,
    roll,
    run,
)

from mem1_kernels import (
    BlockPlan,
    Segment,
    Trajectory,
    compacted,
    fold,
    keep_all,
    keep_last,
    mem1,
    mem1_release,
    memento,
    pack,
    trajectory_attention,
)
from mem1_kernels.hf import TrajectoryCache, patched, rope_of
from mem1_kernels.rollout import HFEngine, collate, score

POLICIES = {
    "mem1": mem1,
    "keep_last(1)": keep_last(1),
    "keep_last(2)": keep_last(2),
    "keep_all": keep_all,
}


def random_trajectory(seed: int, turns: int = 6, policy=mem1, prompt: int = 7) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> list[int]:
        count = int(torch.randint(least, most, (), generator=generator))
        return torch.randint(4, VOCABULARY, (count,), generator=generator).tolist()

    segments = [Segment("prompt", list(range(4, 4 + prompt)))]
    for turn in range(1, turns + 1):
        segments += [Segment("state", ids(0, 5), turn), Segment("action", ids(1, 4), turn)]
        segments += [Segment("info", ids(0, 9), turn)]
    return Trajectory(segments, policy)


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "cohere", "cohere2", "gemma2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_rollout_equals_training(family, policy, record_property):
    model = make_model(family)
    rollouts = run(model, retention=POLICIES[policy], positions="compact")
    difference = largest_difference(model, rollouts)
    record_property("largest_difference", difference)
    assert difference <= 2e-5
    for rollout in rollouts:
        layout = rollout.layout
        assert int(layout.position_ids.max()) < rollout.trajectory.peak_context


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 7, 20, 60])
def test_positions_stay_below_the_peak_context(turns, ordered, monkeypatch):
    model, highest = make_model("qwen2"), []
    begin = TrajectoryCache.begin

    def watched(cache, *args):
        position_ids = begin(cache, *args)
        highest.append(int(position_ids.max()))
        return position_ids

    monkeypatch.setattr(TrajectoryCache, "begin", watched)
    options = {"max_turns": turns, "max_new_tokens": 6, "stop_ids": [STOP], "ordered": ordered}
    options["state_tokens"] = lambda ids: len(ids) // 2
    world = World([turns] * 2)
    rollouts = roll(model, PROMPTS[:2], world, positions="compact", **options)
    monkeypatch.undo()
    assert largest_difference(model, rollouts) <= 2e-5
    peak = max(rollout.trajectory.peak_context for rollout in rollouts)
    assert max(highest) < peak
    if turns >= 20:
        assert peak < rollouts[0].trajectory.num_tokens / 3
    for rollout in rollouts:
        assert len(rollout.turns) == turns


def newest_three(segments):
    """The prompt and the three newest parts: what a mark ended, a turn's rest, what was read."""
    starts = [
        index
        for index, segment in enumerate(segments)
        if segment.role != "action" or segments[index - 1].role != "state" or segment.name
    ]
    ends = []
    for index, segment in enumerate(segments):
        part = bisect_right(starts, index)  # the parts up to this segment's own
        later = starts[part + 3 :]
        ends.append(len(segments) if segment.role == "prompt" or not later else later[0])
    return ends


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_drops_inside_a_turn(family):
    options = {"retention": newest_three, "mark": mark, "max_new_tokens": 24}
    model = make_model(family)
    rollouts = run(model, positions="compact", **options)
    inside = 0
    for rollout in rollouts:
        trajectory = rollout.trajectory
        assert int(rollout.layout.position_ids.max()) < trajectory.peak_context
        for span in trajectory.spans:
            end = int(trajectory.expiry[span.start]) if span.stop > span.start else 0
            inside += 0 < end < trajectory.num_tokens and trajectory.turn[end] == span.turn
    assert inside > 20
    assert largest_difference(model, rollouts) <= 2e-5


def test_a_row_that_ends_inside_a_turn_leaves_the_others_exact():
    asked = []

    def raising(ids):
        asked.append(ids)
        if len(asked) == 90:
            raise RuntimeError("no such block")
        return mark(ids)

    model = make_model("qwen2")
    options = {"retention": newest_three, "positions": "compact", "mark": raising}
    rollouts = run(model, temperature=0, **options)
    assert sum("no such block" in (rollout.error or "") for rollout in rollouts) == 1
    assert largest_difference(model, rollouts) <= 2e-5


def test_a_policy_that_leaves_a_hole_inside_a_turn_is_refused_when_it_does():
    with pytest.raises(ValueError, match="needs a policy that leaves the prompt and one run"):
        run(make_model("qwen2"), retention=memento, mark=mark, positions="compact")


def test_evictions_of_another_engine():
    ids, trained = list(range(4, 16)), [0] * 4 + [1] * 8
    oldest_first = [None] * 4 + [7, 7, 9, 9, 9, 11, None, None]
    layout = compacted(Trajectory.from_evictions(ids, oldest_first, loss_mask=trained))
    assert layout.kept_position_ids.tolist() == list(range(12))
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 4, 5, 5]
    for evicted in ([None] * 4 + [9, 7] + [None] * 6, [2] + [None] * 11):
        with pytest.raises(ValueError, match="needs a policy that leaves the prompt and one run"):
            compacted(Trajectory.from_evictions(ids, evicted, loss_mask=trained))


def scaled(**rope):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
            initializer_range=0.2, rope_parameters={"rope_theta": 10_000.0, **rope},
        )
    ).eval()  # fmt: skip


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_ropes(kind):
    torch.manual_seed(2)
    model = scaled(**ROPES[kind])
    if kind == "yarn":
        assert model.model.rotary_emb.attention_scaling > 1.1  # must not be applied twice
    assert largest_difference(model, run(model, positions="compact")) <= 2e-5


def test_partial_and_interleaved_rotations():
    torch.manual_seed(2)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"initializer_range": 0.2, "pad_token_id": 0}
    glm = transformers.GlmForCausalLM(transformers.GlmConfig(**shape, head_dim=16)).eval()
    rope = rope_of(glm)
    assert rope.layout == "interleaved"
    assert len(rope.inv_freq[0]) == 4  # half of the head
    assert largest_difference(glm, run(glm, positions="compact")) <= 2e-5


def test_layers_without_rope_do_not_turn():
    config = make_model("cohere2").config
    config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(1)
    model = transformers.Cohere2ForCausalLM(config).eval()
    assert [len(x) for x in rope_of(model).inv_freq] == [8, 0]
    assert largest_difference(model, run(model, positions="compact")) <= 2e-5


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic or longrope"),
        (
            {
                "rope_type": "longrope",
                "factor": 2.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 128,
            },
            "dynamic or longrope",
        ),
    ],
)
def test_ropes_that_change_with_the_length_are_refused(rope, message):
    model = scaled(**rope)
    with pytest.raises(ValueError, match=message):
        HFEngine(model, positions="compact").run([[5, 6]], lambda turns: [None])


def test_models_without_rope_are_refused():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4)
    )
    with pytest.raises(ValueError, match="needs a model with RoPE; GPT2Model has none"):
        rope_of(model)


@pytest.mark.parametrize("policy", [fold, mem1_release, lambda s: [*range(1, len(s) + 1)]])
def test_policies_that_leave_something_else_are_refused(policy):
    segments = [Segment("prompt", 4), Segment("action", 1, 1), Segment("action", 9, 2, depth=1)]
    segments += [Segment("info", 2, 2), Segment("action", 1, 3)]
    with pytest.raises(ValueError, match="one run of the newest tokens"):
        compacted(Trajectory(segments, policy))


def test_a_rollout_refuses_such_a_policy():
    with pytest.raises(ValueError, match="one run of the newest tokens; fold leaves others"):
        run(make_model("qwen2"), retention=fold, positions="compact", depth=lambda t: t.number % 2)


def test_a_group_behind_one_prompt_scores_the_same():
    model = make_model("gemma3")
    options = {"max_turns": 5, "max_new_tokens": 6, "stop_ids": [STOP]}
    rollouts = roll(model, [PROMPTS[2]] * 3, World([5, 2, 3]), positions="compact", **options)
    other = roll(model, [PROMPTS[0]], World([4]), positions="compact", **options)
    layout, sampled = collate([other[0], rollouts])
    assert layout.num_tokens < collate([*other, *rollouts])[0].num_tokens
    with torch.no_grad():
        assert float((score(model, layout) - sampled).abs().max()) <= 2e-5


def test_wrong_pairings_differ():
    """Kept positions, and queries turned by another number of positions, give other log-probs."""
    model = make_model("qwen2")
    rollout = run(model, positions="compact")[0]
    sampled, layout = rollout.log_probs, rollout.layout
    moved = layout.kept_position_ids != layout.position_ids
    where = layout.loss_mask & moved
    off_by_3 = layout.position_ids + 3 * moved
    with torch.no_grad():
        for wrong in (rollout.trajectory, layout.replaced(position_ids=off_by_3)):
            assert (score(model, wrong) - sampled)[where].abs().max() > 0.05
    with pytest.raises(ValueError, match="positions of one form"):
        pack([rollout.trajectory, layout])
    with pytest.raises(ValueError, match="their positions are 'compact', the trainer's 'kept'"):
        collate([rollout], positions="kept")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("group", [False, True])
def test_output_lse_and_gradients_equal_dense_attention_in_fp64(group, softcap):
    members = [
        compacted(random_trajectory(seed, turns)) for seed, turns in ((0, 6), (1, 1), (2, 9))
    ]
    layout = pack([members, compacted(random_trajectory(3, 4, keep_last(2), prompt=3))])
    if not group:
        layout = pack(members)
    n, index = layout.num_tokens, torch.arange(layout.num_tokens)
    torch.manual_seed(0)
    tensors = [torch.randn(1, n, heads, 16) for heads in (4, 4, 2, 2)]
    upstream, upstream_lse = torch.randn(1, n, 4, 16), torch.randn(1, 4, n)

    ours = [x.clone().requires_grad_() for x in tensors]
    query, prompt_query, key, value = ours
    out, lse = trajectory_attention(
        query, key, value, plan=BlockPlan.of(layout), prompt_query=prompt_query,
        softcap=softcap, return_lse=True,
    )  # fmt: skip
    ((out * upstream).sum() + (lse * upstream_lse).sum()).backward()

    dense = [x.double().requires_grad_() for x in tensors]
    query, prompt_query, key, value = dense
    keys, values = (x.repeat_interleave(2, 2) for x in (key, value))
    in_prompt = index < layout.prompt_stop
    to_prompt = in_prompt[None] & ~in_prompt[:, None]  # [query, key]
    near, far = (torch.einsum("bqhd,bkhd->bhqk", q, keys) / 4 for q in (query, prompt_query))
    scores = torch.where(to_prompt, far, near)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    seen = (index[None] <= index[:, None]) & (layout.expiry[None] > index[:, None])
    scores = scores.masked_fill(~seen, float("-inf"))
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(3), values)
    expected_lse = scores.logsumexp(3)
    ((expected * upstream).sum() + (expected_lse * upstream_lse).sum()).backward()

    assert (out - expected).abs().max() < 1e-5
    assert (lse - expected_lse).abs().max() < 1e-5
    for a, b in zip(ours, dense, strict=True):
        assert (a.grad - b.grad).abs().max() < 2e-5


def test_padding_sees_nothing_and_gives_no_nan():
    n = 40
    index = torch.arange(n)
    blind = torch.where(index < n - 4, 0, n)  # the last four see nothing in either part
    plan = replace(
        BlockPlan.from_expiry(torch.full((n,), n), blind),
        prompt=BlockPlan.from_expiry(torch.where(index < 5, n, index), blind),
    )
    query = torch.randn(1, n, 2, 16, requires_grad=True)
    out, lse = trajectory_attention(
        query, query, query, plan=plan, prompt_query=query, return_lse=True
    )
    out.sum().backward()
    assert out[:, -4:].eq(0).all()
    assert lse[..., -4:].eq(float("-inf")).all()
    assert query.grad.isfinite().all()


def test_the_plan_is_not_used_without_the_turned_queries():
    plan = BlockPlan.of(compacted(random_trajectory(0)))
    query = torch.randn(1, plan.tokens, 2, 16)
    with pytest.raises(ValueError, match="prompt_query: expected the queries for the plan"):
        trajectory_attention(query, query, query, plan=plan)
    with pytest.raises(ValueError, match="prompt_query: expected None without"):
        trajectory_attention(query, query, query, prompt_query=query)


def test_gradients_of_a_model_equal_those_under_checkpointing():
    layout = pack([compacted(random_trajectory(seed)) for seed in range(2)])
    gradients = []
    for checkpointing in (False, True):
        model = make_model("gemma3").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with patched(model):
            score(model, layout).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert all(module.training for module in model.modules())
    assert torch.equal(*gradients)


def test_the_fields_of_compact_layouts():
    trajectory = random_trajectory(0)
    with pytest.raises(ValueError, match="prompt_stop: expected a tensor for 'compact'"):
        trajectory.replaced(positions="compact")
    with pytest.raises(ValueError, match="prompt_stop: expected None for 'kept'"):
        compacted(trajectory).replaced(positions="kept")
    with pytest.raises(TypeError, match="expected a Trajectory"):
        compacted(compacted(trajectory))
    with pytest.raises(TypeError, match="rope: expected a Rope"):
        TrajectoryCache(make_model("qwen2"), batch_size=1, rope=3)
