"""The centre of the suite: what a rollout sampled is what training computes.

Tiny random models of four families; ragged rows of one to twelve turns; every policy; pruning by
holes and in order; kept and re-prefilled positions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from mem1_kernels import (
    BlockPlan,
    Segment,
    Trajectory,
    clear_tool_results,
    fold,
    keep_all,
    keep_last,
    mem1,
    mem1_release,
    memento,
    pack,
    strip_reasoning,
    sub_agents,
    unroll,
    visible,
)
from mem1_kernels.hf import patched
from mem1_kernels.rollout import Generation, HFEngine, Rollout, TrajectoryRollout, collate, score
from mem1_kernels.rollout.loop import Written, open_rows, run_turns

VOCABULARY = 60
STOP = 3

FAMILIES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
    ),
}


SCALED = {
    "granite": (
        transformers.GraniteConfig,
        transformers.GraniteForCausalLM,
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
        },
    ),
    "cohere": (transformers.CohereConfig, transformers.CohereForCausalLM, {"logit_scale": 0.25}),
    "cohere2": (
        transformers.Cohere2Config,
        transformers.Cohere2ForCausalLM,
        {"logit_scale": 0.25, "head_dim": 16, "sliding_window": 24},
    ),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 3.0,
        },
    ),
}
"""Models that scale or cap their logits, and some that scale more than these."""


def make_model(family: str, dtype: torch.dtype = torch.float32):
    config_class, model_class, extra = {**FAMILIES, **SCALED}[family]
    torch.manual_seed(1)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3 if family == "gemma3" else 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        **(
            {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
            if family == "gemma3"
            else {}
        ),
        **extra,
    )
    return model_class(config).to(dtype).eval()


class World:
    """Answers with seeded observations, some of them empty; ends row r after its own last turn."""

    def __init__(self, last_turns: list[int], seed: int = 0) -> None:
        self.last_turns = last_turns
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, turns):
        replies = []
        for turn in turns:
            length = int(torch.randint(0, 14, (), generator=self.generator))
            ids = torch.randint(4, VOCABULARY, (length,), generator=self.generator).tolist()
            done = turn.number >= self.last_turns[turn.row]
            replies.append(None if done else [] if turn.number % 4 == 3 else ids)
        return replies


PROMPTS = [[5, 9, 11, 7, 30, 8], [6, 7], list(range(10, 27)), [40]]
LAST_TURNS = [12, 1, 5, 3]


OF_ENGINES = ("tokenizer", "positions", "capacity", "ordered")


def roll(model, prompts, respond, seed: int = 0, **options) -> list[Rollout]:
    """A rollout whose options are those of HFEngine and of Generation."""
    engine = HFEngine(model, **{n: options.pop(n) for n in OF_ENGINES if n in options})
    generator = torch.Generator(model.device).manual_seed(seed)
    return engine.run(prompts, respond, Generation(**options), generator=generator)


def run(model, seed: int = 0, **options) -> list[Rollout]:
    options = {"max_turns": 12, "max_new_tokens": 9, "stop_ids": [STOP], **options}
    options.setdefault("state_tokens", lambda ids: len(ids) // 2)
    return roll(model, PROMPTS, World(LAST_TURNS, seed), seed, **options)


def largest_difference(model, rollouts: list[Rollout], temperature: float = 1.0) -> float:
    layout, sampled = collate(rollouts)
    with torch.no_grad():
        scored = score(model, layout, temperature=temperature).cpu()
    return float((scored - sampled).abs().max())


POLICIES = {"mem1": mem1, "keep_last": keep_last(2), "keep_all": keep_all, "fold": fold}


def branches(turn) -> int:
    """Two turns of three are written in a branch, and one of six in a branch of that branch."""
    return (0, 1, 1, 0, 1, 2)[turn.number % 6]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_rollout_equals_training(family, policy, positions, record_property):
    model = make_model(family)
    rollouts = run(model, retention=POLICIES[policy], positions=positions, depth=branches)
    assert [len(rollout.turns) for rollout in rollouts] == LAST_TURNS
    longest = rollouts[0]
    assert (longest.peak_context < longest.trajectory.num_tokens - 9) == (policy != "keep_all")
    difference = largest_difference(model, rollouts)
    record_property("largest_difference", difference)
    assert difference <= 2e-5
    for rollout in rollouts:
        assert rollout.log_probs.ne(0).sum() == rollout.trajectory.loss_mask.sum()


def mark(ids):
    """A block or a summary ends with every second id or so, and two marks may follow each other."""
    return {0: "block", 1: "summary"}.get(ids[-1] % 4)


def mem1_and_blocks(segments):
    """Turns go as in MEM1, and blocks inside them as in MEMENTO."""
    return [min(ends) for ends in zip(mem1(segments), memento(segments), strict=True)]


EDITING = {
    "strip_reasoning": {"retention": strip_reasoning()},
    "strip_reasoning(1)": {"retention": strip_reasoning(1)},
    "clear_tool_results": {
        "retention": clear_tool_results(
            50, keep=1, exclude=("pin",), at_least=6, placeholder=(44, 45)
        ),
        "info_name": lambda turn: "pin" if turn.number % 5 == 2 else "search",
    },
    "sub_agents": {
        "retention": sub_agents,
        "depth": branches,
        "info_name": lambda turn: "rollback" if turn.number % 6 == 3 else "",
    },
    "memento": {"retention": memento, "mark": mark, "max_new_tokens": 24},
    "mem1 and memento": {"retention": mem1_and_blocks, "mark": mark, "state_tokens": None},
}
"""Policies that people run, with what tells them what to drop."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EDITING)
@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_edited_contexts_equal_training(name, family, positions, record_property):
    model = make_model(family)
    rollouts = run(model, positions=positions, **EDITING[name])
    assert [len(rollout.turns) for rollout in rollouts] == LAST_TURNS
    difference = largest_difference(model, rollouts)
    record_property("largest_difference", difference)
    assert difference <= 2e-5
    dropped = 0
    for rollout in rollouts:
        trajectory = rollout.trajectory
        assert rollout.log_probs.ne(0).sum() == trajectory.loss_mask.sum()
        ids = [token for turn in rollout.turns for token in turn.token_ids]
        assert trajectory.token_ids[trajectory.loss_mask].tolist() == ids
        dropped += int((trajectory.expiry < trajectory.num_tokens).sum())
    assert dropped > 20


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_drops_inside_a_turn_change_what_its_rest_sees(positions):
    """Blocks go while their turn is written; masked between turns only, it is another function."""
    model = make_model("qwen2")
    options = {"retention": memento, "mark": mark, "max_new_tokens": 24, "positions": positions}
    rollouts = run(model, **options)
    inside = 0
    for rollout in rollouts:
        trajectory = rollout.trajectory
        for span in trajectory.spans:
            end = int(trajectory.expiry[span.start]) if span.stop > span.start else 0
            inside += 0 < end < trajectory.num_tokens and trajectory.turn[end] == span.turn
        summaries = [s for s in trajectory.segments if s.name == "summary"]
        assert all(mark(list(summary.ids)) == "summary" for summary in summaries)
    assert inside > 5

    def between(segments):
        """The same blocks, but each goes where its turn ends."""
        ends = {s.turn: index + 1 for index, s in enumerate(segments) if s.role == "action"}
        return [
            end if end == len(segments) else min(ends[s.turn], len(segments))
            for end, s in zip(memento(segments), segments, strict=True)
        ]

    late = [
        Trajectory(r.trajectory.segments, between)
        if positions == "kept"
        else unroll(Trajectory(r.trajectory.segments, between))
        for r in rollouts
    ]
    layout = pack(late)
    sampled = torch.cat([rollout.log_probs for rollout in rollouts])[layout.source]
    with torch.no_grad():
        difference = (score(model, layout) - sampled)[layout.loss_mask].abs().max()
    assert difference > 0.05


def test_a_kept_cache_is_smaller_while_the_turn_is_written():
    model = make_model("qwen2")
    options = {"mark": mark, "max_new_tokens": 40, "stop_ids": [], "max_turns": 1}
    pruned = roll(model, PROMPTS, World([1] * 4), retention=memento, **options)
    whole = roll(model, PROMPTS, World([1] * 4), retention=keep_all, **options)
    for a, b in zip(pruned, whole, strict=True):
        assert a.trajectory.num_tokens == b.trajectory.num_tokens
        assert a.peak_context <= a.trajectory.peak_context
    assert sum(r.peak_context for r in pruned) < sum(r.peak_context for r in whole)


def test_marks_alone_change_nothing():
    """Without drops a turn in pieces is the turn: same ids, same log-probs, same layout."""
    model = make_model("qwen2")
    for positions in ("kept", "reprefill"):
        plain = run(model, retention=keep_all, positions=positions, temperature=0)
        marked = run(model, retention=keep_all, positions=positions, temperature=0, mark=mark)
        for a, b in zip(plain, marked, strict=True):
            assert torch.equal(a.trajectory.token_ids, b.trajectory.token_ids)
            assert torch.equal(a.log_probs, b.log_probs)
            assert len(b.trajectory.segments) > len(a.trajectory.segments)
            for name in ("expiry", "position_ids", "loss_mask", "predecessor"):
                assert torch.equal(getattr(a.layout, name), getattr(b.layout, name))


def test_marks_of_another_type():
    with pytest.raises(TypeError, match="name: expected text, got 3"):
        run(make_model("qwen2"), retention=memento, mark=lambda ids: 3)
    with pytest.raises(TypeError, match="mark: expected a function or None, got 'block'"):
        Generation(mark="block")
    with pytest.raises(TypeError, match="info_name: expected a function or None, got 'search'"):
        Generation(info_name="search")


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_a_mark_that_raises_ends_its_row_alone(positions):
    """In some turn, behind marks; what remains of the row, and the others, is exact."""
    asked = []

    def raising(ids):
        asked.append(ids)
        if len(asked) == 90:
            raise RuntimeError("no such block")
        return mark(ids)

    model = make_model("qwen2")
    options = {"retention": memento, "positions": positions, "temperature": 0}
    rollouts = run(model, mark=raising, **options)
    broken = [rollout for rollout in rollouts if rollout.error]
    assert ["no such block" in rollout.error for rollout in broken] == [True]
    assert largest_difference(model, rollouts) <= 2e-5
    others = [len(r.turns) == last for r, last in zip(rollouts, LAST_TURNS, strict=True)]
    assert sum(others) == len(rollouts) - 1


def test_an_engine_that_writes_whole_turns_refuses_marks():
    class Whole:
        def __getattr__(self, name):
            raise AssertionError(f"{name} is called")

    class Backend(Whole):
        marks = False

    generation = Generation(mark=mark)
    rows = open_rows([[1]], generation, "reprefill")
    with pytest.raises(ValueError, match="mark: this engine writes whole turns"):
        run_turns(rows, Backend(), World([1]), generation)


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_a_turn_that_breaks_off_takes_its_marks_back(positions):
    """The engine fails in turn 2, behind a mark at which a block went: the row ends with turn 1."""

    class Backend:
        marks = True

        def drop(self, row, *what):
            pass

        read = retire = drop

        def write(self, rows, number):
            written = []
            for row in rows:
                ids = [4, 6, 9, 10] if number == 1 else [8, 7, 5]
                for count in range(1, len(ids) + 1):
                    row.wrote_on(number, ids[:count])
                error = "gone" if number == 2 else ""
                written.append(Written(ids, [-1.0] * len(ids), True, error))
            return written

    generation = Generation(retention=memento, mark=mark)
    rows = open_rows([[1, 2]], generation, positions)
    (rollout,) = run_turns(rows, Backend(), lambda turns: [[20]] * len(turns), generation)
    assert rollout.error == "gone"
    assert rollout.trajectory.token_ids.tolist() == [1, 2, 4, 6, 9, 10, 20]
    assert rollout.trajectory.expiry.tolist() == [7, 7, 5, 7, 7, 7, 7]
    assert rollout.log_probs.tolist() == [0, 0, -1, -1, -1, -1, 0]


def test_a_policy_that_drops_at_no_mark_is_refused():
    """It says after the fact that a state went inside its turn, where no mark was."""

    def early(segments):
        end = len(segments)
        return [index + 1 if s.role == "state" else end for index, s in enumerate(segments)]

    with pytest.raises(ValueError, match="a policy must drop between turns or at marks"):
        run(make_model("qwen2"), retention=early, mark=lambda ids: None, max_turns=1)


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_what_is_trained_and_how_much(positions):
    """A rejected attempt is left out, an observation is trained, a state counts twice."""
    model = make_model("qwen2")

    def label(segments):
        labelled = []
        for segment in segments:
            trainable, weight = None, 1.0
            if segment.role == "action" and segment.turn % 3 == 1:
                trainable = False
            elif segment.role == "info" and segment.turn % 2 == 0:
                trainable, weight = True, 0.25
            elif segment.role == "state":
                weight = 2.0
            labelled.append(replace(segment, trainable=trainable, weight=weight))
        return labelled

    rollouts = run(model, positions=positions)
    labelled = [rollout.relabelled(label) for rollout in rollouts]
    layout, sampled = collate(labelled)
    plain, plain_sampled = collate(rollouts)
    with torch.no_grad():
        scored, plain_scored = score(model, layout), score(model, plain)
    # Of each trajectory's tokens: whether it is in the loss, its weight, its log-probs.
    want_mask = torch.cat([r.trajectory.loss_mask for r in labelled])
    want_weights = torch.cat([r.trajectory.weights for r in labelled])
    role = torch.cat([r.trajectory.role for r in rollouts])
    assert torch.equal(layout.source[layout.loss_mask].sort().values, want_mask.nonzero()[:, 0])
    in_loss = layout.source[layout.loss_mask]
    assert torch.equal(layout.weights[layout.loss_mask], want_weights[in_loss])
    trained_infos = layout.loss_mask & (role[layout.source] == 3)
    left_out = ~want_mask & torch.cat([r.sampled for r in rollouts])
    assert trained_infos.any() and left_out.any()
    assert {0.25, 1.0, 2.0} == set(layout.weights[layout.loss_mask].tolist())
    # What was sampled scores as sampled; what was read has no sampled log-prob.
    assert torch.equal(sampled.isnan(), trained_infos)
    both = layout.loss_mask & ~trained_infos
    assert (scored - sampled)[both].abs().max() <= 2e-5
    # And what is in both layouts scores alike.
    of_plain = torch.zeros(layout.source_tokens)
    of_plain[plain.source[plain.loss_mask]] = plain_scored[plain.loss_mask]
    assert (of_plain[layout.source[both]] - scored[both]).abs().max() <= 2e-5
    assert plain.weights is None and not plain_sampled.isnan().any()


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_a_trained_observation_scores_as_it_was_read(positions):
    """Against the stock model on the text that was live when the observation came."""
    model = make_model("qwen2")
    rollout = run(model, positions=positions)[0]

    def label(segments):
        return [replace(s, trainable=s.role == "info") for s in segments]

    layout = rollout.relabelled(label).layout
    with torch.no_grad():
        scored = score(model, layout)
    got = torch.full((layout.source_tokens,), torch.nan)
    got[layout.source[layout.loss_mask]] = scored[layout.loss_mask]
    trajectory = rollout.trajectory
    assert torch.equal(~got.isnan(), trajectory.role == 3)
    for span in trajectory.spans:
        if span.role != "info" or span.stop == span.start:
            continue
        seen = torch.arange(span.stop)
        if positions == "reprefill":
            seen = seen[trajectory.expiry[: span.stop] > span.start]
            ids = trajectory.token_ids[seen]
            with torch.no_grad():
                log_probs = model(ids[None]).logits[0].log_softmax(1)
        else:
            with torch.no_grad():
                log_probs = score_all(model, trajectory)
            ids = trajectory.token_ids[seen]
        for token in range(span.start, span.stop):
            at = int((seen == token).nonzero()[0])
            assert abs(got[token] - log_probs[at - 1, ids[at]]) <= 2e-5


def score_all(model, trajectory):
    """Log-probs of every id at every token, under the trajectory's dense mask in stock SDPA."""
    mask = visible(trajectory.expiry)[None, None]
    return model(trajectory.token_ids[None], attention_mask=mask).logits[0].log_softmax(1)


def test_labels_that_do_not_fit():
    rollout = run(make_model("qwen2"))[0]
    with pytest.raises(ValueError, match="label: expected the same .* segments with other"):
        rollout.relabelled(lambda segments: segments[:-1])
    with pytest.raises(ValueError, match="label: expected the same .* segments with other"):
        rollout.relabelled(lambda segments: [replace(s, name="x") for s in segments])
    with pytest.raises(TypeError, match="label: expected Segments, got int"):
        rollout.relabelled(lambda segments: [1] * len(segments))


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
@pytest.mark.parametrize("family", SCALED)
def test_scores_go_by_the_logits_that_the_model_gives(family, positions):
    """Scales and caps behind the head included: the head's weights alone would not do."""
    model = make_model(family)
    rollouts = run(model, positions=positions)
    assert largest_difference(model, rollouts) <= 2e-5
    layout, sampled = collate(rollouts)
    with torch.no_grad(), patched(model):
        hidden = model.model(
            layout.token_ids[None],
            position_ids=layout.position_ids[None],
            plan=BlockPlan.of(layout),
        ).last_hidden_state[0]
        head_only = torch.log_softmax(model.lm_head(hidden), 1)
    target = layout.loss_mask.nonzero().flatten()
    unscaled = head_only[layout.predecessor[target], layout.token_ids[target]]
    assert (unscaled - sampled[target]).abs().max() > 0.1


@pytest.mark.parametrize("options", [{"ordered": True}, {"temperature": 0}, {"temperature": 0.7}])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_ordered_pruning_and_temperatures(options, family, positions):
    model = make_model(family)
    rollouts = run(model, positions=positions, **options)
    assert largest_difference(model, rollouts, options.get("temperature", 1.0)) <= 2e-5


def test_greedy_rollout_is_the_same_ordered_or_not():
    model = make_model("gemma3")
    holes, ordered = (run(model, temperature=0, ordered=ordered) for ordered in (False, True))
    for a, b in zip(holes, ordered, strict=True):
        assert torch.equal(a.trajectory.token_ids, b.trajectory.token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_exact_as_the_models_own_decoding(family):
    """No larger than the difference between this model's prefill and its step-by-step decode."""
    model = make_model(family, torch.bfloat16)
    rollouts = run(model)
    own = 0.0
    for rollout in rollouts:
        ids = rollout.trajectory.token_ids[None]
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits[0].float().log_softmax(1)
            cache = transformers.DynamicCache(config=model.config)
            for token in range(ids.shape[1]):
                step = model(ids[:, token : token + 1], past_key_values=cache).logits[0, 0]
                own = max(own, float((step.float().log_softmax(0) - whole[token]).abs().max()))
    assert largest_difference(model, rollouts) <= own


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_context_never_exceeds_the_trajectorys_peak(positions):
    rollouts = run(make_model("qwen2"), positions=positions)
    for rollout in rollouts:
        assert rollout.peak_context <= rollout.trajectory.peak_context
    longest = rollouts[0]
    assert longest.peak_context < longest.trajectory.num_tokens / 2


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_a_group_behind_one_prompt_scores_the_same(positions):
    model = make_model("qwen2")
    options = {"positions": positions, "max_turns": 4, "max_new_tokens": 6, "stop_ids": [STOP]}
    rollouts = roll(model, [PROMPTS[0]] * 3, World([4, 2, 3]), **options)
    layout, sampled = collate([rollouts])
    assert layout.num_tokens < collate(rollouts)[0].num_tokens
    with torch.no_grad():
        assert float((score(model, layout) - sampled).abs().max()) <= 2e-5


def test_the_wrong_pairing_differs_and_is_refused():
    model = make_model("qwen2")
    kept, sent_again = run(model), run(model, positions="reprefill")
    with torch.no_grad():
        for rollouts, wrong in (
            (kept, [unroll(rollout.trajectory) for rollout in kept]),
            (sent_again, [rollout.trajectory for rollout in sent_again]),
        ):
            layout = pack(wrong)
            sampled = torch.cat([rollout.log_probs for rollout in rollouts])[layout.source]
            difference = (score(model, layout) - sampled)[layout.loss_mask].abs().max()
            assert difference > 0.05
    with pytest.raises(ValueError, match="their positions are 'reprefill', the trainer's 'kept'"):
        collate(sent_again, positions="kept")
    with pytest.raises(ValueError, match="positions of one form"):
        collate([kept[0], sent_again[1]])


def test_the_wrong_policy_differs():
    """Scored under full context or under the released mask, the same tokens get other log-probs."""
    model = make_model("qwen2")
    rollout = run(model)[0]
    from mem1_kernels import Trajectory

    for wrong in (keep_all, mem1_release):
        layout = Trajectory(rollout.trajectory.segments, wrong)
        with torch.no_grad():
            difference = (score(model, layout) - rollout.log_probs)[layout.loss_mask].abs().max()
        assert difference > 0.05


def test_stop_strings_end_a_turn():
    class Tokenizer:
        def decode(self, ids):
            return "".join(chr(96 + i) for i in ids)

    model = make_model("qwen2")
    rollouts = roll(
        model,
        PROMPTS,
        World([3] * 4),
        max_turns=3,
        max_new_tokens=30,
        stop_strings=[chr(96 + 7), chr(96 + 9)],
        tokenizer=Tokenizer(),
    )
    for rollout in rollouts:
        for turn in rollout.turns:
            assert (turn.token_ids[-1] in (7, 9)) == turn.closed
            assert not {7, 9} & set(turn.token_ids[:-1])


def test_the_model_is_left_as_it_was():
    model = make_model("qwen2").train()
    ids = torch.tensor([PROMPTS[0]])
    before = model(ids).logits
    run(model)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)


def test_scores_are_differentiable():
    model = make_model("qwen2")
    layout, _ = collate(run(model))
    score(model, layout).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with patched(model):
        score(model, layout)


def test_a_policy_that_takes_back_a_drop_is_refused():
    def fickle(segments):
        end = len(segments)
        late = end > 8
        return [
            index + 1 if s.role == "info" and not late and index + 1 < end else end
            for index, s in enumerate(segments)
        ]

    with pytest.raises(ValueError, match="never change what it said of earlier drops"):
        run(make_model("qwen2"), retention=fickle)


def test_a_policy_that_drops_inside_a_turn_is_refused_in_the_last_turn_too():
    def early(segments):
        end = len(segments)
        return [index + 1 if s.role == "state" else end for index, s in enumerate(segments)]

    with pytest.raises(ValueError, match="a policy must drop between turns"):
        run(make_model("qwen2"), retention=early, max_turns=1)


def test_a_policy_with_floors_is_refused():
    for positions in ("kept", "reprefill"):
        with pytest.raises(ValueError, match="a policy without floors, got mem1_release"):
            run(make_model("qwen2"), retention=mem1_release, positions=positions)


def test_a_prompt_may_be_dropped_from_a_kept_cache_only():
    def window(segments):
        """The prompt goes when the first turn begins, each turn when the one after next does."""
        first = {}
        for index, segment in enumerate(segments):
            first.setdefault(segment.turn, index)
        later = [1 if s.role == "prompt" else s.turn + 2 for s in segments]
        return [first.get(turn, len(segments)) for turn in later]

    model = make_model("qwen2")
    rollouts = run(model, retention=window)
    assert largest_difference(model, rollouts) <= 2e-5
    with pytest.raises(ValueError, match="window drops the prompt"):
        run(model, retention=window, positions="reprefill")


ERRORS = {
    "positions: expected 'kept', 'compact' or 'reprefill', got 'dense'": {"positions": "dense"},
    "max_turns: expected at least 1, got 0": {"max_turns": 0},
    "max_new_tokens: expected at least 1, got 0": {"max_new_tokens": 0},
    "temperature: expected 0 or more, got -1": {"temperature": -1},
    "stop_strings: need a tokenizer": {"stop_strings": ["a"]},
    "stop_strings: expected strings that are not empty, got ''": {"stop_strings": ["a", ""]},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message):
        roll(make_model("qwen2"), [[1]], World([1]), **ERRORS[message])


def test_run_errors():
    engine = HFEngine(make_model("qwen2"))
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        engine.run([], World([]))
    with pytest.raises(ValueError, match="prompts: expected at least one, and none of them empty"):
        engine.run([[1], []], World([1, 1]))
    with pytest.raises(ValueError, match="respond: expected 1 replies, got 2"):
        engine.run([[1]], lambda turns: [None, None], Generation(max_new_tokens=2))


class Letters:
    def decode(self, ids):
        return "".join(chr(96 + i) for i in ids)


WRONG_TYPES = {
    "stop_strings: expected a sequence of strings, got one string": {"stop_strings": "</a>"},
    "stop_ids: expected integer token ids": {"stop_ids": ["3"]},
    "stop_ids: expected token ids, got int": {"stop_ids": 3},
    "stop_strings: expected a sequence of strings, got int": {"stop_strings": 3},
    "seed: expected an integer, got 'a'": {"seed": "a"},
    "seed: expected an integer, got 1.5": {"seed": 1.5},
    "seed: expected an integer, got True": {"seed": True},
    "depth: expected a function or None, got 3": {"depth": 3},
    "state_tokens: expected a function or None, got 3": {"state_tokens": 3},
}


@pytest.mark.parametrize("message", WRONG_TYPES)
def test_stops_of_another_type(message):
    with pytest.raises(TypeError, match=message):
        Generation(**WRONG_TYPES[message])


ROPES = {
    "longrope": (
        "Phi3",
        {"original_max_position_embeddings": 32, "max_position_embeddings": 128},
        {
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 32,
        },
    ),
    "dynamic": ("Qwen2", {"max_position_embeddings": 32}, {"factor": 4.0}),
}


@pytest.mark.parametrize("kind", ROPES)
def test_a_rope_that_changes_on_the_way_is_refused_from_there(kind):
    family, own, rope = ROPES[kind]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **rope},
        **own,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    layout, sampled = collate(roll(model, [[5, 9]], World([2]), max_turns=3, max_new_tokens=4))
    assert 8 < layout.num_tokens <= 32
    with torch.no_grad():
        assert (score(model, layout) - sampled).abs().max() <= 2e-5
    with pytest.raises(ValueError, match="position_ids: expected less than 32, from where"):
        roll(model, [[5, 9]], World([9]), max_turns=9, max_new_tokens=9)
    longer = Trajectory([Segment("prompt", [5] * 30), Segment("action", [7] * 3, 1)])
    with pytest.raises(ValueError, match="layout: expected positions less than 32, .*, got 32"):
        score(model, longer)


def test_logits_that_are_no_numbers():
    model = make_model("qwen2")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises((FloatingPointError, RuntimeError), match="row 0|probability tensor"):
            roll(model, [[1]], World([1]), max_new_tokens=2, temperature=temperature)


def test_score_refuses_checkpointing_around_its_own_patch():
    model = make_model("qwen2")
    layout, _ = collate(run(model)[:1])
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="model: with gradient checkpointing the backward pass"):
        score(model, layout)
    with patched(model):
        score(model, layout).sum().backward()
    assert model.lm_head.weight.grad is not None


def test_collate_takes_rollouts_only():
    rollout = run(make_model("qwen2"))[0]
    with pytest.raises(TypeError, match="rollouts: expected a sequence, got one Rollout"):
        collate(rollout)
    with pytest.raises(TypeError, match="rollouts: expected Rollouts, got Trajectory"):
        collate([rollout, [rollout.trajectory]])


def test_stops_and_prompts_may_be_tensors():
    model = make_model("qwen2")
    want = run(model)
    got = roll(
        model,
        [torch.tensor(p) for p in PROMPTS],
        World(LAST_TURNS),
        max_turns=12,
        max_new_tokens=9,
        stop_ids=torch.tensor([STOP]),
        state_tokens=lambda ids: len(ids) // 2,
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.trajectory.token_ids, b.trajectory.token_ids)


def test_the_old_name_still_works():
    """`TrajectoryRollout` stood in the README of 0.1."""
    model = make_model("qwen2")
    with pytest.warns(DeprecationWarning, match="use HFEngine"):
        old = TrajectoryRollout(model, max_turns=3, max_new_tokens=4, stop_ids=[STOP])
    got = old.run([[5, 9]], World([3]), generator=torch.Generator().manual_seed(0))
    (want,) = roll(model, [[5, 9]], World([3]), max_turns=3, max_new_tokens=4, stop_ids=[STOP])
    assert torch.equal(got[0].trajectory.token_ids, want.trajectory.token_ids)
    assert torch.equal(got[0].log_probs, want.log_probs)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_that_torch_does_not_take(seed):
    with pytest.raises(ValueError, match="seed: expected "):
        Generation(seed=seed)
    Generation(seed=2**64 - 1)


@pytest.mark.parametrize("reply", [[20.7, 21.0], "20", ["20"], {20: 1}, torch.tensor([20.5])])
def test_replies_of_another_type(reply):
    with pytest.raises(TypeError, match="respond, row 0: expected .*token ids, got"):
        run_one(lambda turns: [reply])


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary(token):
    message = f"row 0: expected token ids from 0 to {VOCABULARY - 1}, got"
    if token >= 0:
        with pytest.raises(ValueError, match=message):
            run_one(lambda turns: [[4, token]])
    with pytest.raises(ValueError, match=message if token >= 0 else "tokens: expected ids >= 0"):
        roll(make_model("qwen2"), [[5, token]], World([1]))


def run_one(respond):
    return roll(make_model("qwen2"), [[5, 6]], respond, max_turns=2, max_new_tokens=2)


@pytest.mark.parametrize("temperature", [-1.0, float("nan")])
def test_a_temperature_that_is_none(temperature):
    model = make_model("qwen2")
    with pytest.raises(ValueError, match="temperature: expected 0 or more, got"):
        Generation(temperature=temperature)
    layout, _ = collate(run(model))
    with pytest.raises(ValueError, match="temperature: expected 0 or more, got"):
        score(model, layout, temperature=temperature)
