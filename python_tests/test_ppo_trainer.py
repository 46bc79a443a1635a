"""The trainer through its public calls: what it refuses, repeats exactly, leaves, and learns.

The rooms it stands on have tests of their own (test_ppo_batch.py, test_ppo_episodes.py, ...), and
so have the functions of the loss (test_ppo_functional.py) and the rollout (test_exactness.py).
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from agent_models import make_bytes_tokenizer
from ppo_runs import small

from mem1_kernels import BlockPlan, keep_all
from mem1_kernels.agent.environment import Step
from mem1_kernels.agent.qa import QATask, RetrievalQA
from mem1_kernels.agent.retrieval import BM25, Passage
from mem1_kernels.agent.tasks import CHAIN_PEAK, TableEnvironment
from mem1_kernels.agent.world import World
from mem1_kernels.hf import unpatch
from mem1_kernels.ppo.checkpoint import checkpoints
from mem1_kernels.ppo.config import Config, read_config
from mem1_kernels.ppo.episodes import read_transcripts, world_of
from mem1_kernels.ppo.learner import attend, make_policy
from mem1_kernels.ppo.trainer import evaluate, train
from mem1_kernels.rollout import HFEngine
from python_tests.talking_processes import make_accelerator, talk

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "qwen2.5-7b-4xh100.toml"


def test_a_forward_pass_under_another_mask_stops_before_the_first_update(tmp_path):
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


# one optimizer step


def parameters_after_a_step(config: Config) -> dict[str, torch.Tensor]:
    """What one step from the first weights leaves; its rollout is the same whatever is packed."""
    run = train(replace(config, steps=1, sft_steps=0), world=talk(config), progress=False)
    figures = [value for value in run.history[0].values() if value is not None]
    assert all(math.isfinite(value) for value in figures)
    return dict(run.policy.named_parameters())


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_step_does_not_depend_on_how_the_tokens_are_packed(tmp_path):
    """To rounding, of which Adam makes more where a gradient is near zero."""
    config = small(tmp_path, epochs=1, minibatch=8, critic="head", entropy_coef=0.01)
    one_row = parameters_after_a_step(replace(config, token_budget=4096))
    assert largest_difference(one_row, parameters_after_a_step(config)) < 1e-4
    checkpointed = replace(config, gradient_checkpointing=True)
    assert largest_difference(one_row, parameters_after_a_step(checkpointed)) < 1e-4


VARIANTS = {
    "grpo": {"algorithm": "grpo", "group_size": 4},
    "rloo": {"algorithm": "rloo", "group_size": 2, "positions": "reprefill"},
    "compact": {"algorithm": "grpo", "group_size": 4, "positions": "compact", "sft_steps": 2},
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


def test_importance_weights_of_an_exact_rollout_change_nothing(tmp_path):
    config = small(tmp_path, epochs=1, minibatch=8)
    plain = parameters_after_a_step(config)
    weighted = parameters_after_a_step(replace(config, importance_cap=2.0))
    assert 0 < largest_difference(plain, weighted) < 1e-4


def test_rollouts_of_another_engine_are_weighted(tmp_path):
    """One that computes in bfloat16 and sends text again; it is refused unless allowed for."""

    def coarse(policy):
        return HFEngine(unpatch(deepcopy(policy)).bfloat16(), positions="reprefill")

    config = small(tmp_path, positions="reprefill", steps=1)
    with pytest.raises(ValueError, match="rollout and trainer differ by up to"):
        train(config, world=talk(config), make_engine=coarse, progress=False)
    with pytest.raises(ValueError, match="their positions are 'reprefill', the trainer's 'kept'"):
        kept = replace(config, out=str(tmp_path / "kept"), positions="kept")
        train(kept, world=talk(kept), make_engine=coarse, progress=False)
    config = replace(config, out=str(tmp_path / "two"), log_prob_tolerance=0.2, importance_cap=2.0)
    run = train(config, world=talk(config), make_engine=coarse, progress=False)
    assert 1e-4 < run.history[0]["log_prob_gap"] < 0.2


def test_groups_of_equal_rewards_teach_nothing(tmp_path):
    """GRPO's and RLOO's advantages are relative to the group: without differences they are 0."""

    class Equal(TableEnvironment):
        def step(self, turn) -> Step:
            return Step([], 0.5, True)

    for algorithm in ("grpo", "rloo"):
        config = small(
            tmp_path / algorithm, group_size=4, algorithm=algorithm, kl_coef=0.0, sft_steps=0
        )
        run = train(config, world=replace(world_of(config), make=Equal), progress=False)
        assert [record["reward"] for record in run.history] == [0.5, 0.5]
        assert [record["grad_norm"] for record in run.history] == [0.0, 0.0]


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
    world = replace(world_of(config), make=Broken)
    run = train(replace(config, save_transcripts=True), world=world, progress=False)
    assert run.history[0]["failed"] == 2
    (row,) = evaluate(config, run.policy, world=world, sizes=(2,))
    assert row["failed"] == config.eval_episodes // 4
    left = read_transcripts(str(tmp_path / "run" / "transcripts" / "000000.jsonl"))
    assert len(left) == 6
    grouped = replace(config, group_size=4)
    Broken.begun = 2
    with pytest.raises(RuntimeError, match="step 0: a tool failed in every group"):
        train(grouped, world=world, progress=False)
    Broken.every = 1
    with pytest.raises(RuntimeError, match="16 of 16 episodes failed"):
        evaluate(replace(config, eval_episodes=16), run.policy, world=world, sizes=(2,))
    with pytest.raises(RuntimeError, match="8 of 8 episodes failed"):
        train(config, world=world, progress=False)


def test_a_score_may_not_be_named_like_a_column(tmp_path):
    class Named(TableEnvironment):
        def step(self, turn) -> Step:
            return Step([], 1.0, True, {"reward": 99.0})

    config = small(tmp_path, steps=1, sft_steps=0)
    with pytest.raises(ValueError, match=re.escape("names of their own, got ['reward']")):
        train(config, world=replace(world_of(config), make=Named), progress=False)


@pytest.mark.parametrize("chat", [False, True])
def test_text_is_written_and_read_by_a_tokenizer(tmp_path, chat):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_bytes_tokenizer()
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


# evaluation


def test_evaluation_shows_a_context_that_does_not_grow(tmp_path):
    config = small(tmp_path, eval_sizes=(1, 3, 9), eval_episodes=4)
    config = replace(config, sft_steps=60, sft_batch=16)
    policy = train(replace(config, steps=0), progress=False).policy
    pruned = evaluate(config, policy)
    whole = evaluate(config, policy, retention=keep_all, sizes=(3, 9))
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
    (path / "checkpoint-000003").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-000003 is damaged .*from checkpoint-000002"):
        again = train(replace(config, resume=True), progress=False)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == again.history
    assert untimed(again.history) == untimed(whole.history)
    for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)


KILLED = """
import json, os, signal, sys
from mem1_kernels.ppo.config import Config
from mem1_kernels.ppo.trainer import train
from mem1_kernels.rollout import HFEngine
played = 0
def dies_in_step_2(policy):
    global played
    played += 1
    if played == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return HFEngine(policy)
train(Config(**json.loads(sys.argv[1])), make_engine=dies_in_step_2, progress=False)
"""


def untimed(history: list[dict]) -> list[dict]:
    """The history without what a clock said."""

    def without(record: dict) -> dict:
        timed = {"tokens_per_second", *(name for name in record if name.startswith("seconds"))}
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
    named += " log_prob_gap_mean peak_context total_tokens tokens_per_second dropped_per_turn"
    named += " explained_variance seconds_rollout seconds_forward seconds_backward cut_turns failed"
    assert not set(named.split()) - record.keys()


def test_errors_of_a_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"lora_rank: peft is not .*mem1-kernels\[lora\]"):
            train(small(tmp_path, lora_rank=4), progress=False)
    config = small(tmp_path)
    world = replace(world_of(config), demonstrate=None)
    with pytest.raises(ValueError, match="transcripts: this task has no teacher"):
        train(config, world=world, progress=False)
    for name, value in (("distributed_type", "DEEPSPEED"), ("mixed_precision", "fp16")):
        stub = SimpleNamespace(
            distributed_type="NO", is_fsdp2=False, mixed_precision="no", is_main_process=True
        )
        setattr(stub, name, value)
        with pytest.raises(ValueError, match=name.replace("distributed_type", "accelerator")):
            train(config, accelerator=stub, progress=False)


def test_numbers_that_are_not_finite_end_the_run(tmp_path):
    config = small(tmp_path, sft_steps=0, kl_coef=0.0)

    def hidden_of_nan(model, layout, plan):
        return attend(model, layout, plan) * torch.nan

    with pytest.raises(ValueError, match="differ by up to nan"):
        train(config, world=talk(config), attend=hidden_of_nan, progress=False)

    def gradient_of_nan(model, layout, plan):
        hidden = attend(model, layout, plan)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * torch.nan)
        return hidden

    with pytest.raises(FloatingPointError, match="gradient norm: expected finite numbers"):
        train(config, world=talk(config), attend=gradient_of_nan, progress=False)


# several processes


def run_together(command, cwd=ROOT):
    """Runs a launcher of processes; one that does not end is told to take them with it."""
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=os.environ | environment, **pipes) as launcher:
        try:
            _, errors = launcher.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            launcher.terminate()
            raise
    assert launcher.returncode == 0, errors[-3000:]


def launch_of_the_recipe() -> list[str]:
    """The command of the recipe up to the module that it starts, in two processes."""
    lines = [line[1:] for line in RECIPE.read_text("utf-8").splitlines() if line.startswith("#  ")]
    words = shlex.split(" ".join(lines[:4]).replace("\\", ""))
    assert words[:2] == ["accelerate", "launch"]
    options = [*words[2 : words.index("-m")], "--num_processes=2"]
    options += ["--num_machines=1", "--dynamo_backend=no", "--main_process_port=0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


def make_model(name: str, shape: dict[str, Any], path: Path) -> str:
    """A small model of random weights in a folder."""
    torch.manual_seed(0)
    tiny = {name: getattr(make_policy(Config()).config, name) for name in TINY}
    config = getattr(transformers, f"{name}Config")(**tiny | shape)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(path)
    return str(path)


TINY = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads max_position_embeddings initializer_range
""".split()


def test_two_processes_give_the_losses_of_one(tmp_path):
    """Two processes over gloo, under DDP and under accelerate's own FSDP2, in one launch.

    Runs that keep checkpoints stop after step 1 and are resumed.
    """
    tied = make_model("Qwen2", {"tie_word_embeddings": True}, tmp_path / "tied")
    float32_rotations = make_model("Olmo2", {"pad_token_id": 0}, tmp_path / "olmo2")
    base = {
        "sizes": [1],
        "sft_steps": 4,
        "sft_batch": 8,
        "max_new_tokens": 9,
        "episodes": 12,
        "minibatch": 6,
        "rollout_batch": 4,
        "token_budget": 100,
        "steps": 3,
        "save_every": 2,
        "eval_every": 3,
        "eval_sizes": [1],
        "eval_episodes": 4,
        "trackers": "",
        "critic": "head",
    }
    short = base | {"steps": 2, "sft_steps": 2, "save_every": 1, "eval_every": 0}
    once = short | {"steps": 1, "sft_steps": 0, "epochs": 1, "save_every": 0}
    second = short | {"critic": "model", "gradient_checkpointing": True, "model": tied}
    coarse = once | {"lora_rank": 4, "dtype": "bfloat16"}
    runs = {
        "whole": (base, ("DDP", "FSDP2")),
        "second model, tied": (second, ("DDP", "FSDP2")),
        "adapters": (short | {"lora_rank": 4, "critic": "detached"}, ("FSDP2",)),
        "adapters on bfloat16": (coarse, ("FSDP2",)),
        "bf16": (once | {"bf16": True}, ("DDP",)),
        "bf16, adapters on bfloat16": (coarse | {"bf16": True}, ("DDP",)),
    }
    cases = [
        {"kind": kind, "options": options | {"out": str(tmp_path / kind / name)}}
        for name, (options, kinds) in runs.items()
        for kind in kinds
    ]
    # In bf16 FSDP2 rounds what autocast does not, so these are compared with a bfloat16 model.
    taught = {"trackers": "", "lr": 1e-2, "critic_lr": 0.1, "out": str(tmp_path / "out")}
    for options in (
        {"critic": "head"},
        {"critic": "head", "model": float32_rotations, "gradient_checkpointing": True},
        {"critic": "model", "model": tied, "lora_rank": 4},
    ):
        cases.append({"kind": "precision", "options": taught | options})
    # The recipe, but for what a test has no time for: whole, and in two parts.
    small_recipe = vars(read_config(RECIPE)) | once | {"critic": "detached", "steps": 2}
    small_recipe |= {"task": "chain", "model": "tiny", "data": "", "corpus": ""}
    for name, every in (("recipe", 0), ("resumed recipe", 1)):
        options = small_recipe | {"save_every": every, "out": str(tmp_path / "FSDP2" / name)}
        cases.append({"kind": "FSDP2", "options": options})
    wide = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024}
    wide = make_model("Qwen2", wide, tmp_path / "wide")
    for checkpointing in (False, True):
        options = {"trackers": "", "model": wide, "token_budget": 1024}
        options["gradient_checkpointing"] = checkpointing
        cases.append({"kind": "memory", "options": options})
    # Units that hold weights which are read outside them.
    for wrap, model, said in (
        ("Linear", "tiny", "got Linear (policy.lm_head)"),
        ("Qwen2Model", tied, "got Qwen2Model (policy.model)"),
    ):
        options = {"trackers": "", "model": model}
        cases.append({"kind": "refused", "options": options, "wrap": wrap, "said": said})
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    run_together([*launch_of_the_recipe(), "-m", "python_tests.talking_processes", str(path)])

    for name, (options, kinds) in runs.items():
        config = Config(**options, out=str(tmp_path / "one" / name))
        accelerator = make_accelerator("DDP", "bf16" if config.bf16 else "no")
        one = train(config, world=talk(config), accelerator=accelerator, progress=False).history
        assert len(one) == config.steps + 2 * bool(config.eval_every)
        for kind in kinds:
            two = history_of(tmp_path / kind / name)
            assert len(two) == len(one)
            for mine, theirs in zip(untimed(one), two, strict=True):
                assert mine.pop("evaluation", None) == theirs.pop("evaluation", None)
                assert theirs == pytest.approx(mine, rel=1e-3, abs=2e-5), (kind, name)
            left = weights_of(tmp_path / kind / name)
            assert largest_difference(weights_of(tmp_path / "one" / name), left) < 1e-4
            saved = [step for step, _ in checkpoints(tmp_path / kind / name)]
            expected = [0, 2] if options is base else [1, 2] if config.save_every else []
            assert saved == expected

    whole, resumed = (tmp_path / "FSDP2" / name for name in ("recipe", "resumed recipe"))
    assert history_of(whole) == history_of(resumed)
    assert len(history_of(whole)) == 2
    assert largest_difference(weights_of(whole), weights_of(resumed)) == 0
    assert all(0 < record["log_prob_gap_mean"] < 0.05 for record in history_of(whole))


def history_of(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return untimed([json.loads(line) for line in lines])


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (path,) = (out / "policy").glob("*.safetensors")
    return load_file(path)


PARTS = """
from dataclasses import replace
from mem1_kernels import fold
from mem1_kernels.agent.world import make_world
from python_tests.talking_processes import Talk

def make():
    chain = make_world("chain", sizes=[1])
    return replace(chain, make=Talk, depth=lambda turn: turn.number % 2)

def fold_too(segments):
    return fold(segments)
"""


def test_the_command_line_trains_in_two_processes(tmp_path):
    """`accelerate launch -m mem1_kernels.ppo` with a config, and with a world and a policy of one's
    own in the current directory; one of the two processes writes and talks.
    """
    (tmp_path / "my_parts.py").write_text(PARTS)
    # --cpu would start one process whatever --num_processes says; this way the CPU has two.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launch += ["--dynamo_backend=no", "--main_process_port=0", "--tee=3"]
    launch += [f"--log_dir={tmp_path / 'logs'}", "-m", "mem1_kernels.ppo"]
    options = {
        "config": ROOT / "configs" / "chain.toml",
        "environment": "my_parts:make",
        "retention": "my_parts:fold_too",
        "out": "run",
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
    run_together([*launch, *(f"--{name}={value}" for name, value in options.items())], tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["step"], "evaluation" in r) for r in records] == [
        (0, True),
        (0, False),
        (1, False),
        (2, True),
    ]
    steps = [r for r in records if "reward" in r]
    assert all(r["log_prob_gap"] < 1e-3 and r["dropped_per_turn"] > 0 for r in steps)
    left = {path.name for path in (tmp_path / "run" / "policy").iterdir()}
    assert left == {"config.json", "generation_config.json", "model.safetensors"}
    logs = {path.parent.name: path for path in (tmp_path / "logs").glob("**/stdout.log")}
    said = {rank: log.read_text().count("metrics.jsonl, curve.png") for rank, log in logs.items()}
    assert said == {"0": 1, "1": 0}
    logs = {path.parent.name: path for path in (tmp_path / "logs").glob("**/stderr.log")}
    said = {rank: log.read_text().count("\nppo, step 2/2: ") for rank, log in logs.items()}
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
