"""The trainer: what it packs, scores, refuses, repeats exactly, and that it learns.

The functions of the loss have their own tests (test_ppo_functional.py); so has the rollout
(test_exactness.py).
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mem1_kernels import keep_all, keep_last, mem1
from mem1_kernels.agent.engine import HFEngine
from mem1_kernels.agent.environment import Step
from mem1_kernels.agent.qa import QATask, RetrievalQA
from mem1_kernels.agent.retrieval import BM25, Passage
from mem1_kernels.agent.tasks import CHAIN_PEAK, TableEnvironment
from mem1_kernels.hf import unpatch
from mem1_kernels.ppo.config import Config, parse_arguments, read_config
from mem1_kernels.ppo.memory import main as print_memory
from mem1_kernels.ppo.memory import memory_budget, table
from mem1_kernels.ppo.trainer import (
    ActorCritic,
    Batch,
    Learner,
    Stopwatch,
    World,
    attend,
    check_agreement,
    checkpoints,
    collect,
    draw_tasks,
    estimate_advantages,
    evaluate,
    fill,
    make_policy,
    make_world,
    mean_scores,
    read_transcripts,
    retention_of,
    score_rows,
    train,
    train_on,
    update,
    warm_start,
)
from mem1_kernels.rollout import score
from python_tests.talking_processes import talk

Accelerator = pytest.importorskip("accelerate").Accelerator

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """accelerate keeps its settings for the whole process; a test with others starts anew."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def small(tmp_path: Path, **options) -> Config:
    """A run of seconds: few episodes, short chains."""
    quick = {
        "out": str(tmp_path / "run"),
        "trackers": "",
        "sizes": (1, 2),
        "steps": 2,
        "sft_steps": 4,
        "sft_batch": 8,
        "max_new_tokens": 9,
        "episodes": 8,
        "minibatch": 4,
        "token_budget": 128,
    }
    return Config(**(quick | options))


def played(config: Config):
    """A learner, a played batch and its rows."""
    accelerator = Accelerator()
    world = talk(config)
    learner = Learner(config, accelerator, attend)
    retention = retention_of(config.retention)
    if config.sft_steps:
        warm_start(learner, world, retention, False)
        learner.settle_reference()
    tasks = draw_tasks(config, world, 0)
    episodes = collect(
        config,
        accelerator,
        world,
        learner.engine,
        tasks,
        "test",
        retention=retention,
        temperature=config.temperature,
        max_turns=config.max_turns,
        group_size=config.group_size,
    )
    batch = Batch.of(episodes, accelerator.device)
    rows = batch.rows(range(len(episodes)), config, retention, accelerator.device)
    return learner, batch, rows


# what a batch is


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
@pytest.mark.parametrize("group_size", [1, 4])
def test_rows_hold_every_generated_token_once_and_score_it_as_alone(
    tmp_path, positions, group_size
):
    config = small(tmp_path, positions=positions, group_size=group_size, token_budget=150)
    learner, batch, rows = played(config)
    where = torch.cat([row.where for row in rows])
    assert torch.equal(where.sort().values, torch.arange(len(batch.sampled)))
    log_probs, _ = score_rows(learner, rows, batch.sampled, Stopwatch(where.device))
    alone = [
        score(learner.module.policy, e.rollout.layout).detach()[e.rollout.layout.loss_mask]
        for e in batch.episodes
    ]
    assert (log_probs - torch.cat(alone)).abs().max() < 2e-5
    assert (log_probs - batch.sampled).abs().max() < 2e-5
    assert len(rows) > 1
    longest = max(e.rollout.layout.num_tokens for e in batch.episodes)
    assert all(row.layout.num_tokens <= max(150, longest) for row in rows)
    for row in rows:
        numbers = batch.trajectory[row.where].unique_consecutive().tolist()
        assert len(numbers) == len(set(numbers)) == int(row.layout.document.max()) + 1


def test_a_group_shares_its_prompt_in_a_row(tmp_path):
    config = small(tmp_path, group_size=4, token_budget=4096)
    _, batch, (row,) = played(config)
    whole = sum(e.rollout.trajectory.num_tokens for e in batch.episodes)
    prompt = batch.episodes[0].rollout.trajectory.spans[0].stop
    assert row.layout.num_tokens == whole - 2 * 3 * prompt  # two tasks, four episodes each


def test_the_wrong_pairing_is_refused(tmp_path):
    config = small(tmp_path)
    learner, batch, _ = played(config)
    device = batch.sampled.device
    with pytest.raises(ValueError, match="their positions are 'kept', the trainer's 'reprefill'"):
        batch.rows([0], replace(config, positions="reprefill"), mem1, device)
    for wrong in (keep_all, keep_last(2)):
        with pytest.raises(ValueError, match=f"pruned by 'mem1', but .* by '{wrong.__name__[:9]}"):
            batch.rows([0], config, wrong, device)


def test_a_forward_pass_under_another_mask_stops_before_the_first_update(tmp_path):
    from mem1_kernels import BlockPlan

    def attend_to_all(model, layout, plan):
        return attend(model, layout, BlockPlan.from_expiry(torch.full_like(layout.expiry, 10**6)))

    config = small(tmp_path, sft_steps=0)
    with pytest.raises(ValueError, match="rollout and trainer differ by up to .* off-policy"):
        train(config, world=talk(config), attend=attend_to_all, progress=False)
    loose = replace(config, log_prob_tolerance=float("inf"), steps=1)
    run = train(loose, world=talk(config), attend=attend_to_all, progress=False)
    assert run.history[0]["log_prob_gap"] > 1e-3
    strict = replace(config, log_prob_tolerance=1e-12)
    with pytest.raises(ValueError, match="expected at most 1e-12"):
        train(strict, world=talk(config), progress=False)


def test_fill_keeps_to_its_budget():
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.randint(1, 20) for _ in range(rng.randint(1, 30))]
        bins = fill(sizes, 16)
        assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
        for members in bins:
            assert len(members) == 1 or sum(sizes[item] for item in members) <= 16
        assert sum(sum(sizes[i] for i in members) <= 8 for members in bins) <= 1


# one optimizer step


def parameters_after_update(config: Config) -> dict[str, torch.Tensor]:
    learner, batch, rows = played(config)
    watch = Stopwatch(batch.sampled.device)
    batch.log_probs, batch.values = score_rows(learner, rows, batch.sampled, watch)
    with learner.as_reference():
        batch.reference, _ = score_rows(learner, rows, batch.sampled, watch)
    estimate_advantages(batch, config)
    learner.learning_rates(1e-3, 1e-3)
    figures = update(learner, batch, mem1, 0, watch)
    assert all(map(torch.isfinite, torch.tensor(list(figures.values()))))
    return {n: p.detach().clone() for n, p in learner.module.named_parameters() if p.requires_grad}


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_step_does_not_depend_on_how_the_tokens_are_packed(tmp_path):
    """To rounding, of which Adam makes more where a gradient is near zero."""
    config = small(tmp_path, epochs=1, minibatch=8, critic="head", entropy_coef=0.01)
    one_row = parameters_after_update(replace(config, token_budget=4096))
    assert largest_difference(one_row, parameters_after_update(config)) < 1e-4
    checkpointed = replace(config, gradient_checkpointing=True)
    assert largest_difference(one_row, parameters_after_update(checkpointed)) < 1e-4


VARIANTS = {
    "grpo": {"algorithm": "grpo", "group_size": 4},
    "rloo": {"algorithm": "rloo", "group_size": 2, "positions": "reprefill"},
    "reinforce++": {"algorithm": "reinforce++", "kl_in": "reward", "kl_kind": "k1"},
    "a critic of its own": {
        "critic": "model",
        "kl_in": "reward",
        "kl_coef": 0.1,
        "value_clip": 0.0,
    },
    "a head that trains the policy": {
        "critic": "head",
        "dual_clip": 3.0,
        "gamma": 0.99,
        "lam": 0.9,
    },
    "no reference": {"kl_coef": 0.0, "importance_cap": 2.0},
    "adapters": {"lora_rank": 4, "lr": 1e-3, "warmup": 4, "temperature": 1.3},
    "keep_last": {"retention": "keep_last(2)", "save_transcripts": True, "kl_kind": "k2"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs(tmp_path, name):
    config = small(tmp_path, **VARIANTS[name])
    run = train(config, world=talk(config), progress=False)
    assert len(run.rewards) == config.steps
    for record in run.history:
        assert record["log_prob_gap"] < 1e-3
        assert record["grad_norm"] > 0
        assert ("kl" in record) == (config.kl_coef > 0)
        assert ("value_loss" in record) == (config.algorithm == "ppo")


def test_only_adapters_are_trained_and_the_reference_is_the_model_after_the_warm_start(tmp_path):
    learner, batch, rows = played(small(tmp_path, lora_rank=4))
    assert all("lora_" in name for name in learner.trained)
    watch = Stopwatch(batch.sampled.device)
    before = score_rows(learner, rows, batch.sampled, watch)[0]
    with torch.no_grad():
        for parameter in learner.trained.values():
            parameter.add_(0.05)
    moved = score_rows(learner, rows, batch.sampled, watch)[0]
    assert (moved - before).abs().max() > 0.01
    with learner.as_reference():
        assert torch.equal(score_rows(learner, rows, batch.sampled, watch)[0], before)
    assert torch.equal(score_rows(learner, rows, batch.sampled, watch)[0], moved)


def test_importance_weights_of_an_exact_rollout_change_nothing(tmp_path):
    config = small(tmp_path, epochs=1, minibatch=8)
    plain = parameters_after_update(config)
    weighted = parameters_after_update(replace(config, importance_cap=2.0))
    assert 0 < largest_difference(plain, weighted) < 1e-4


def test_rollouts_of_another_engine_are_weighted(tmp_path):
    """One that computes in bfloat16 and sends text again; it is refused unless allowed for."""

    def coarse(policy):
        return HFEngine(unpatch(deepcopy(policy)).bfloat16(), positions="reprefill")

    config = small(tmp_path, positions="reprefill", steps=1)
    with pytest.raises(ValueError, match="rollout and trainer differ by up to"):
        train(config, world=talk(config), engine=coarse, progress=False)
    with pytest.raises(ValueError, match="their positions are 'reprefill', the trainer's 'kept'"):
        kept = replace(config, out=str(tmp_path / "kept"), positions="kept")
        train(kept, world=talk(kept), engine=coarse, progress=False)
    config = replace(config, out=str(tmp_path / "two"), log_prob_tolerance=0.2, importance_cap=2.0)
    run = train(config, world=talk(config), engine=coarse, progress=False)
    assert 1e-4 < run.history[0]["log_prob_gap"] < 0.2


@pytest.mark.parametrize("critic", ["none", "head", "detached", "model"])
def test_what_the_value_loss_trains(tmp_path, critic):
    config = small(tmp_path, sft_steps=0)
    _, batch, rows = played(config)
    module = ActorCritic(make_policy(config), critic)
    if critic == "none":
        assert module(rows[0].layout, rows[0].plan)[2] is None
        return
    torch.nn.init.normal_(module.value_head.weight)
    _, _, values = module(rows[0].layout, rows[0].plan)
    values.sum().backward()
    assert module.value_head.weight.grad is not None
    trains_policy = any(p.grad is not None for p in module.policy.parameters())
    assert trains_policy == (critic == "head")
    if critic == "model":
        assert all(p.grad is not None for p in module.critic_model.parameters())


def test_advantages_of_groups_are_relative(tmp_path):
    config = small(tmp_path, group_size=4, algorithm="rloo", sft_steps=0)
    _, batch, _ = played(config)
    batch.rewards = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    estimate_advantages(batch, config)
    first = torch.tensor([batch.advantages[at] for at in batch.starts])
    assert torch.allclose(first, torch.tensor([1.0, *[-1 / 3] * 3, 0, 0, 0, 0]))
    assert torch.equal(batch.advantages, first[batch.trajectory])


# warm start


def test_warm_start_learns_and_transcripts_teach_too(tmp_path):
    config = small(tmp_path, sft_steps=40, sft_jump=50, save_transcripts=True, steps=1)
    learner = Learner(config, Accelerator(), attend)
    start = warm_start(learner, make_world(config), mem1, False)
    assert start < 2.0  # from log 50 = 3.9
    run = train(config, progress=False)
    assert len(run.history) == 1
    path = tmp_path / "run" / "transcripts" / "000000.jsonl"
    traces = read_transcripts(str(path))
    assert len(traces) == config.episodes
    assert {s.role for segments, _ in traces for s in segments} >= {"prompt", "state", "action"}
    again = replace(config, transcripts=str(path), sft_keep=1.0, positions="reprefill", sft_jump=0)
    learner = Learner(again, Accelerator(), attend)
    assert warm_start(learner, make_world(again), mem1, False) < 2.0
    path.write_text('{"segments": [["prompt", 0, [1]]]}\n')
    with pytest.raises(ValueError, match="000000.jsonl, line 1: no transcript"):
        read_transcripts(str(path))


# episodes


class Broken(TableEnvironment):
    """Fails in every `every`-th episode."""

    every = 4
    begun = 0

    def reset(self, task):
        type(self).begun += 1
        self.number = type(self).begun
        return super().reset(task)

    def step(self, turn) -> Step:
        if self.number % self.every == 0:
            raise RuntimeError("the tool is broken")
        return super().step(turn)


def test_a_failing_tool_ends_its_episode_and_most_of_them_the_run(tmp_path):
    config = small(tmp_path, steps=1, sft_steps=0)
    world = replace(make_world(config), make=Broken)
    run = train(replace(config, save_transcripts=True), world=world, progress=False)
    assert run.history[0]["failed"] == 2
    learner = Learner(config, Accelerator(), attend)
    (row,) = evaluate(config, learner.engine, world=world, sizes=(2,))
    assert row["failed"] == config.eval_episodes // 4
    left = read_transcripts(str(tmp_path / "run" / "transcripts" / "000000.jsonl"))
    assert len(left) == 6
    grouped = replace(config, group_size=4)
    Broken.begun = 2
    with pytest.raises(RuntimeError, match="step 0: a tool failed in every group"):
        train(grouped, world=world, progress=False)
    Broken.every = 1
    with pytest.raises(RuntimeError, match="16 of 16 episodes failed"):
        evaluate(replace(config, eval_episodes=16), learner.engine, world=world, sizes=(2,))
    with pytest.raises(RuntimeError, match="8 of 8 episodes failed"):
        train(config, world=world, progress=False)


def test_a_score_may_not_be_named_like_a_column(tmp_path):
    class Named(TableEnvironment):
        def step(self, turn) -> Step:
            return Step([], 1.0, True, {"reward": 99.0})

    config = small(tmp_path, steps=1, sft_steps=0)
    with pytest.raises(ValueError, match=re.escape("names of their own, got ['reward']")):
        train(config, world=replace(make_world(config), make=Named), progress=False)


def test_dropout_is_off_and_other_accumulation_is_refused(tmp_path, monkeypatch):
    from mem1_kernels.ppo import trainer

    def with_dropout(config):
        policy = make_policy(config)
        policy.model.layers[0].mlp.add_module("dropout", torch.nn.Dropout(0.5))
        return policy

    make_policy = trainer.make_policy
    monkeypatch.setattr(trainer, "make_policy", with_dropout)
    learner = Learner(small(tmp_path), Accelerator(), attend)
    rates = [m.p for m in learner.module.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.0]
    with pytest.raises(ValueError, match="gradient_accumulation_steps: expected 1, .*, got 4"):
        Learner(small(tmp_path), Accelerator(gradient_accumulation_steps=4), attend)
    with pytest.warns(UserWarning, match="dtype: weights in bfloat16 lose updates"):
        Learner(small(tmp_path, dtype="bfloat16"), Accelerator(), attend)


def test_scores_of_several_objectives():
    class Scored:
        def __init__(self, **scores):
            self.scores = scores

    episodes = [Scored(em=[1.0, 0.0], f1=[1.0, 0.5]), Scored(em=[1.0]), Scored()]
    means = mean_scores(episodes)
    assert means["em"] == pytest.approx(2 / 3)
    assert (means["em_1"], means["em_2"], means["f1_2"]) == (1.0, 0.0, 0.5)


def text_tokenizer():
    """Bytes as tokens, with the calls that the trainer makes of a tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters), 1)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE({"<eos>": 0, **vocabulary}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.mark.parametrize("chat", [False, True])
def test_text_is_written_and_read_by_a_tokenizer(tmp_path, chat):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = text_tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(shape).save_pretrained(tmp_path / "model")
    corpus = BM25([Passage("1", "Chad\nIts capital is N'Djamena."), Passage("2", "Mali\nBamako")])
    task = QATask(("What is the capital of Chad?",), (("N'Djamena",),))
    world = World(lambda size, rng: task, lambda: RetrievalQA(corpus), tokenizer=tokenizer)
    config = small(
        tmp_path,
        task="factbook",
        model=str(tmp_path / "model"),
        sft_steps=0,
        steps=1,
        save_transcripts=True,
        max_turns=3,
        max_new_tokens=12,
        episodes=4,
        token_budget=4096,
    )
    run = train(config, world=world, progress=False)
    record = run.history[0]
    assert record["turns"] == 3  # nothing that can be read, so no episode ends by itself
    assert record["log_prob_gap"] < 1e-3
    assert record["cut_turns"] > 0.5
    assert (tmp_path / "run" / "policy" / "tokenizer.json").exists()
    prompt = read_transcripts(str(tmp_path / "run" / "transcripts" / "000000.jsonl"))[0][0][0]
    assert tokenizer.decode(prompt.ids).endswith("]>") == chat


def test_questions_need_to_be_enough_for_the_sizes_that_are_drawn(tmp_path):
    text_tokenizer().save_pretrained(tmp_path / "model")
    records = [{"question": f"Where is {n}?", "golden_answers": [str(n)]} for n in range(5)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "1", "contents": "a\nb"}))
    files = {"data": str(tmp_path / "qa.jsonl"), "corpus": str(tmp_path / "corpus.jsonl")}
    options = {"task": "qa", "model": str(tmp_path / "model"), "sizes": (2,), **files}
    world = make_world(small(tmp_path, eval_every=0, eval_sizes=(2, 32), **options))
    assert len(world.draw(2, random.Random(0)).questions) == 2
    assert len(world.draw_eval(2, random.Random(0)).questions) == 2
    with pytest.raises(ValueError, match="expected at least 32 questions, got 5"):
        make_world(small(tmp_path, eval_every=1, eval_sizes=(2, 32), **options))
    with pytest.raises(ValueError, match="expected at least 9 questions, got 5"):
        make_world(small(tmp_path, eval_every=0, **options | {"sizes": (9,)}))


# evaluation


def test_evaluation_shows_a_context_that_does_not_grow(tmp_path):
    config = small(tmp_path, eval_sizes=(1, 3, 9), eval_episodes=4)
    config = replace(config, sft_steps=60, sft_batch=16)
    learner = Learner(config, Accelerator(), attend)
    warm_start(learner, make_world(config), mem1, False)
    pruned = evaluate(config, learner.engine)
    whole = evaluate(config, learner.engine, retention=keep_all, sizes=(3, 9))
    assert [row["size"] for row in pruned] == [1, 3, 9]
    assert max(row["peak_context"] for row in pruned) <= CHAIN_PEAK
    assert whole[1]["peak_context"] > 2 * CHAIN_PEAK
    assert all(0 <= row["em"] == row["reward"] <= 1 for row in pruned)


# what a run leaves


def test_a_killed_and_resumed_run_repeats_the_whole_one(tmp_path):
    config = small(tmp_path, steps=4, save_every=1, eval_every=2, eval_sizes=(1,), eval_episodes=4)
    whole = train(replace(config, out=str(tmp_path / "whole")), progress=False)
    path = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, json.dumps(vars(config))]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    saved = [step for step, _ in checkpoints(path)]
    assert saved == [1, 2]
    (path / "checkpoint-000003").mkdir()  # begun, and not complete
    again = train(replace(config, resume=True), progress=False)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again.history
    assert untimed(again.history) == untimed(whole.history)
    for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)


KILLED = """
import json, os, signal, sys
from mem1_kernels.ppo import trainer
from mem1_kernels.ppo.config import Config
options = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}
update = trainer.update
def dies_in_step_2(learner, batch, retention, step, watch):
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(learner, batch, retention, step, watch)
trainer.update = dies_in_step_2
trainer.train(Config(**options), progress=False)
"""


def untimed(history: list[dict]) -> list[dict]:
    """The history without what a clock said."""

    def without(record: dict) -> dict:
        timed = {"tokens_a_second", *(name for name in record if name.startswith("seconds"))}
        return {name: value for name, value in record.items() if name not in timed}

    return [
        without(record | {"evaluation": [without(row) for row in record["evaluation"]]})
        if "evaluation" in record
        else without(record)
        for record in history
    ]


def test_checkpoints_are_not_overwritten_by_accident(tmp_path):
    config = small(tmp_path, steps=1, save_every=1, lora_rank=4, keep_checkpoints=1)
    train(config, progress=False)
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [1]
    with pytest.raises(ValueError, match="out: .* holds checkpoints; set resume"):
        train(config, progress=False)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
        log.write('{"step": 0, "rew')  # killed in the middle of a line
    with pytest.warns(UserWarning, match="resume: gamma, seed differ from what the run began with"):
        run = train(replace(config, resume=True, seed=5, gamma=0.9), progress=False)
    assert len(run.history) == 1


def test_logs_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    config = small(
        tmp_path, trackers="tensorboard", eval_every=1, eval_sizes=(1, 2), eval_episodes=4
    )
    run = train(config, progress=False)
    out = tmp_path / "run"
    assert (out / "curve.png").stat().st_size > 10_000
    assert list(out.glob("ppo/events.out.tfevents.*"))
    assert (out / "policy" / "model.safetensors").exists()
    assert [row["size"] for row in run.evaluation] == [1, 2]
    record = run.history[1]
    named = "reward em kl clip_fraction entropy grad_norm critic_grad_norm approx_kl log_prob_gap"
    named += " log_prob_gap_mean peak_context total_tokens tokens_a_second dropped_a_turn"
    named += " explained_variance seconds_rollout seconds_forward seconds_backward cut_turns failed"
    assert not set(named.split()) - record.keys()


# several processes


def run_together(command):
    """Runs a launcher of processes; one that does not end is told to take them with it."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as launcher:
        try:
            _, errors = launcher.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            launcher.terminate()
            raise
    assert launcher.returncode == 0, errors[-3000:]


def test_two_processes_give_the_losses_of_one(tmp_path):
    """Two processes over gloo, under DDP and FSDP2, each time stopped after step 1 and resumed."""
    from safetensors.torch import load_file

    options = {
        "sizes": 1,
        "sft-steps": 4,
        "sft-batch": 8,
        "max-new-tokens": 9,
        "episodes": 12,
        "minibatch": 6,
        "rollout-batch": 4,
        "token-budget": 100,
        "steps": 3,
        "save-every": 2,
        "eval-every": 3,
        "eval-sizes": 1,
        "eval-episodes": 4,
        "trackers": "",
        "critic": "head",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    config = parse_arguments([*arguments, f"--out={tmp_path / 'one'}"])
    one = train(config, world=talk(config), progress=False)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    launch += ["-m", "python_tests.talking_processes"]
    run_together([*launch, *arguments, f"--out={tmp_path / 'two'}"])
    weights = load_file(tmp_path / "one" / "policy" / "model.safetensors")
    for out in (tmp_path / "two" / "Accelerator", tmp_path / "two" / "ShardedAccelerator"):
        lines = (out / "metrics.jsonl").read_text().splitlines()
        two = untimed([json.loads(line) for line in lines])
        assert len(two) == len(one.history) == 5
        for mine, theirs in zip(untimed(one.history), two, strict=True):
            assert mine.pop("evaluation", None) == theirs.pop("evaluation", None)
            assert theirs == pytest.approx(mine, rel=1e-3, abs=2e-5)
        theirs = load_file(out / "policy" / "model.safetensors")
        assert largest_difference(weights, theirs) < 1e-4
        assert [step for step, _ in checkpoints(out)] == [0, 2]


def test_the_command_line_trains_in_two_processes(tmp_path):
    """`accelerate launch -m mem1_kernels.ppo` with a config; one of the two writes and talks."""
    # --cpu would start one process whatever --num_processes says; this way the CPU has two.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launch += ["--dynamo_backend=no", "--main_process_port=0", "--tee=3"]
    launch += [f"--log_dir={tmp_path / 'logs'}", "-m", "mem1_kernels.ppo"]
    options = {
        "config": "configs/chain.toml",
        "out": tmp_path / "run",
        "trackers": "",
        "sizes": 1,
        "steps": 2,
        "sft-steps": 2,
        "sft-batch": 4,
        "episodes": 8,
        "minibatch": 4,
        "rollout-batch": 4,
        "token-budget": 128,
        "eval-every": 2,
        "eval-sizes": 1,
        "eval-episodes": 4,
    }
    run_together([*launch, *(f"--{name}={value}" for name, value in options.items())])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["step"], "evaluation" in r) for r in records] == [
        (0, True),
        (0, False),
        (1, False),
        (2, True),
    ]
    assert all(r["log_prob_gap"] < 1e-3 for r in records if "reward" in r)
    left = {path.name for path in (tmp_path / "run" / "policy").iterdir()}
    assert left == {"config.json", "generation_config.json", "model.safetensors"}
    logs = {path.parent.name: path for path in (tmp_path / "logs").glob("**/stdout.log")}
    said = {rank: log.read_text().count("metrics.jsonl, curve.png") for rank, log in logs.items()}
    assert said == {"0": 1, "1": 0}


# learning


def test_reward_rises(tmp_path):
    config = read_config(
        ROOT / "configs" / "chain.toml",
        out=str(tmp_path / "run"),
        trackers="",
        eval_every=0,
        steps=5,
        sizes=[1, 2],
        sft_steps=400,
        sft_jump=0,
        episodes=128,
        minibatch=64,
        lr=1e-3,
    )
    run = train(config, progress=False)
    assert max(run.rewards) - run.rewards[0] >= 0.3, run.rewards
    assert max(record["log_prob_gap"] for record in run.history) < 1e-3


def test_bf16_and_the_agreement_that_it_allows(tmp_path):
    config = small(tmp_path, bf16=True, steps=1)
    run = train(config, world=talk(config), progress=False)
    assert 1e-4 < run.history[0]["log_prob_gap"]
    assert run.history[0]["log_prob_gap_mean"] < 0.05


# options


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in fields(Config):
        assert f"--{option.name.replace('_', '-')}" in text
        assert option.metadata["help"].split("[")[0][:30] in text


def test_the_command_line_replaces_what_the_file_says(tmp_path):
    config = parse_arguments(
        ["--config", str(ROOT / "configs/chain.toml"), "--lr", "1", "--sizes", "5", "--bf16"]
    )
    assert (config.lr, config.sizes, config.bf16, config.sft_keep) == (1.0, (5,), True, 0.6)
    with pytest.raises(SystemExit):
        parse_arguments(["--steps", "-1"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_configs_are_read(path):
    assert isinstance(read_config(path), Config)


ERRORS = {
    "algorithm: expected one of": {"algorithm": "sarsa"},
    "steps: expected at least 0, got -1": {"steps": -1},
    "lr: expected a positive number, got 0": {"lr": 0.0},
    "kl_coef: expected at least 0, got nan": {"kl_coef": float("nan")},
    "rollout_batch: expected at least 1, got 0": {"rollout_batch": 0},
    "clip: expected a number between 0 and 1, got 1.0": {"clip": 1.0},
    "dual_clip: expected 0 or a number above 1, got 1.0": {"dual_clip": 1.0},
    "dual_clip: expected 0 or a number above 1, got -2.0": {"dual_clip": -2.0},
    "gamma: expected a number in [0, 1], got 1.5": {"gamma": 1.5},
    "lam: expected a number in [0, 1], got -0.1": {"lam": -0.1},
    "sft_keep: expected a number in [0, 1], got nan": {"sft_keep": float("nan")},
    "sizes: expected whole numbers >= 1, got ()": {"sizes": ()},
    "eval_sizes: expected whole numbers >= 1, got (2, 0.5)": {"eval_sizes": (2, 0.5)},
    "group_size: expected at least 2 for grpo, got 1": {"algorithm": "grpo"},
    "minibatch: expected a multiple of group_size 3": {"group_size": 3, "episodes": 6},
    "kl_in: expected 'loss' for rloo": {
        "algorithm": "rloo",
        "group_size": 2,
        "kl_in": "reward",
    },
    "kl_kind: expected 'k2' or 'k3' in the loss": {"kl_kind": "k1"},
    "sft_jump: expected 0 for compact (re-prefilled) positions, got 1": {
        "positions": "reprefill",
        "sft_jump": 1,
    },
    "sft_steps: expected at least 1 to learn": {"transcripts": "x.jsonl"},
    "data, corpus: expected both for task 'qa', got '' and 'x'": {"task": "qa", "corpus": "x"},
    "model: expected one with a tokenizer for task 'factbook', got 'tiny'": {"task": "factbook"},
    "retention: expected 'mem1', 'keep_all' or": {"retention": "keep_some"},
    "or 'keep_last(n)', got 'keep_last(0)'": {"retention": "keep_last(0)"},
}


@pytest.mark.parametrize("message", ERRORS)
def test_option_errors(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**ERRORS[message])


@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.type in ("int", "float")])
def test_every_number_has_a_range(name):
    if name == "seed":
        assert Config(seed=-1).seed == -1
        return
    for value in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value}"):
            Config(**{name: value})


def test_file_errors(tmp_path):
    path = tmp_path / "c.toml"
    for text, message in (
        ("learning_rate = 1.0", "no option is called 'learning_rate'"),
        ('steps = "3"', "steps: expected int, got '3'"),
        ("bf16 = 1", "bf16: expected bool, got 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            read_config(path)


def test_errors_of_a_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"lora_rank: peft is not .*mem1-kernels\[lora\]"):
            make_policy(small(tmp_path, lora_rank=4))
    with pytest.raises(ValueError, match=r"eval_sizes: keys: expected 1\.\.9, got 16"):
        make_world(small(tmp_path, task="lookup", sizes=(1,), eval_every=1, eval_sizes=(2, 16)))
    config = small(tmp_path)
    world = replace(make_world(config), demonstrate=None)
    with pytest.raises(ValueError, match="transcripts: this task has no teacher"):
        train(config, world=world, progress=False)
    for name, value in (("distributed_type", "DEEPSPEED"), ("mixed_precision", "fp16")):
        stub = SimpleNamespace(distributed_type="NO", is_fsdp2=False, mixed_precision="no")
        setattr(stub, name, value)
        with pytest.raises(ValueError, match=name.replace("distributed_type", "accelerator")):
            Learner(config, stub, attend)
    learner, batch, rows = played(config)

    def not_a_number(row, log_probs, entropy, values):
        return log_probs.sum() * float("nan"), {}

    with pytest.raises(FloatingPointError, match="gradient norm: expected finite numbers"):
        train_on(learner, rows, not_a_number, Stopwatch(batch.sampled.device))
    batch.log_probs = batch.sampled + torch.nan
    with pytest.raises(ValueError, match="differ by up to nan"):
        check_agreement(batch, config, "float32")


# memory


def test_the_memory_budget_of_the_recipe_is_the_one_it_states():
    from transformers import Qwen2Config

    shape = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    path = ROOT / "configs" / "qwen2.5-7b-4xh100.toml"
    config = read_config(path)
    budget = memory_budget(shape, config, processes=4, peak_context=2048)
    assert budget["weights"] == 7_615_616_512  # a fourth of its parameters, four bytes each
    stated = [line[4:] for line in path.read_text().splitlines() if line.startswith("#   ")]
    assert "\n".join(stated[-11:]) == table(budget)
    assert sum(budget.values()) < 0.9 * 85.5e9
    with_critic = memory_budget(
        shape, replace(config, critic="model"), processes=4, peak_context=2048
    )
    assert sum(with_critic.values()) > 85.5e9


def test_the_memory_budget_counts_what_a_run_holds(tmp_path):
    config = small(tmp_path, lora_rank=4, sft_steps=0)
    learner = Learner(config, Accelerator(), attend)
    policy = learner.module.policy
    budget = memory_budget(policy.config, config, processes=1, peak_context=30)
    trained = sum(parameter.numel() for parameter in learner.trained.values())
    assert budget["gradients"] == 4 * trained
    assert budget["weights"] == 4 * sum(parameter.numel() for parameter in policy.parameters())


def test_the_command_line_prints_the_memory_of_a_config(tmp_path, capsys):
    shape = make_policy(small(tmp_path)).config
    shape.save_pretrained(tmp_path / "model")
    path = tmp_path / "run.toml"
    path.write_text(f"model = '{tmp_path / 'model'}'\nrollout_batch = 8\n")
    print_memory([str(path), "--processes=2", "--peak-context=100"])
    budget = memory_budget(shape, read_config(path), processes=2, peak_context=100)
    assert capsys.readouterr().out.strip() == table(budget)


# the ablation's wrong masks


def test_the_masks_of_the_ablation(tmp_path):
    from bench.mask_ablation import attend_as_released, attend_release, released_layout
    from mem1_kernels import Trajectory, mem1_release, pack, visible

    config = small(tmp_path, token_budget=4096)
    learner, batch, (row,) = played(config)
    policy, layout = learner.module.policy, row.layout
    meant = released_layout(layout)
    order = batch.trajectory[row.where].unique_consecutive().tolist()
    direct = pack(
        [Trajectory(batch.episodes[n].rollout.trajectory.segments, mem1_release) for n in order]
    )
    assert torch.equal(visible(meant.expiry, meant.floor), visible(direct.expiry, direct.floor))

    with torch.no_grad():
        hidden = {f.__name__: f(policy, layout, row.plan) for f in (attend, attend_release)}
        released = attend_as_released(policy, layout, row.plan)
        assert torch.equal(attend(policy, layout, row.plan), hidden["attend"])  # patched again
        assert (hidden["attend"] - hidden["attend_release"]).abs().max() > 0.01
        assert (hidden["attend_release"] - released).abs().max() > 0.01
        last = int((layout.document == 0).nonzero().max())
        layout.token_ids[last] = (layout.token_ids[last] + 1) % 50
        changed = (attend_as_released(policy, layout, row.plan) - released).abs().amax(1)
        assert (changed[layout.document == 0] > 0).all()  # the future is seen
        assert (changed[layout.document > 0] == 0).all()  # other trajectories are not
