"""Episodes: the tasks that are drawn, the traces that teach, the means of scores."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from agent_models import make_bytes_tokenizer
from ppo_runs import small

from mem1_kernels import mem1
from mem1_kernels.ppo.episodes import mean_scores, read_transcripts, world_of
from mem1_kernels.ppo.learner import Learner
from mem1_kernels.ppo.trainer import train
from mem1_kernels.ppo.warm_start import warm_start
from python_tests.talking_processes import Talk

Accelerator = pytest.importorskip("accelerate").Accelerator


def test_warm_start_learns_and_transcripts_teach_too(tmp_path):
    config = small(tmp_path, sft_steps=40, sft_jump=50, save_transcripts=True, steps=1)
    learner = Learner(config, Accelerator())
    start = warm_start(learner, world_of(config), mem1, False)
    assert start < 2.0  # from log 50 = 3.9
    run = train(config, progress=False)
    assert len(run.history) == 1
    path = tmp_path / "run" / "transcripts" / "000000.jsonl"
    traces = read_transcripts(str(path))
    assert len(traces) == config.episodes
    assert {s.role for segments, _ in traces for s in segments} >= {"prompt", "state", "action"}
    again = replace(config, transcripts=str(path), sft_keep=1.0, positions="reprefill", sft_jump=0)
    learner = Learner(again, Accelerator())
    assert warm_start(learner, world_of(again), mem1, False) < 2.0
    path.write_text('{"segments": [["prompt", 0, [1]]]}\n')
    with pytest.raises(ValueError, match="000000.jsonl, line 1: no transcript"):
        read_transcripts(str(path))


def test_scores_of_several_objectives():
    class Scored:
        def __init__(self, **scores):
            self.scores = scores

    episodes = [Scored(em=[1.0, 0.0], f1=[1.0, 0.5]), Scored(em=[1.0]), Scored()]
    means = mean_scores(episodes)
    assert means["em"] == pytest.approx(2 / 3)
    assert (means["em_1"], means["em_2"], means["f1_2"]) == (1.0, 0.0, 0.5)


def test_questions_need_to_be_enough_for_the_sizes_that_are_drawn(tmp_path):
    make_bytes_tokenizer().save_pretrained(tmp_path / "model")
    records = [{"question": f"Where is {n}?", "golden_answers": [str(n)]} for n in range(5)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "1", "contents": "a\nb"}))
    files = {"data": str(tmp_path / "qa.jsonl"), "corpus": str(tmp_path / "corpus.jsonl")}
    options = {"task": "qa", "model": str(tmp_path / "model"), "sizes": (2,), **files}
    world = world_of(small(tmp_path, eval_every=0, eval_sizes=(2, 32), **options))
    assert len(world.draw(2, random.Random(0)).questions) == 2
    assert len(world.draw_eval(2, random.Random(0)).questions) == 2
    with pytest.raises(ValueError, match="expected at least 32 questions, got 5"):
        world_of(small(tmp_path, eval_every=1, eval_sizes=(2, 32), **options))
    with pytest.raises(ValueError, match="expected at least 9 questions, got 5"):
        world_of(small(tmp_path, eval_every=0, **options | {"sizes": (9,)}))


def test_a_size_that_a_task_does_not_have(tmp_path):
    with pytest.raises(ValueError, match=r"eval_sizes: keys: expected 1\.\.9, got 16"):
        world_of(small(tmp_path, task="lookup", sizes=(1,), eval_every=1, eval_sizes=(2, 16)))


def test_an_episode_that_cannot_begin_ends_alone(tmp_path):
    """Its reset fails, or its prompt or observation holds ids that the model does not have."""

    class Fragile(Talk):
        begun = 0

        def reset(self, task):
            type(self).begun += 1
            if self.begun == 2:
                raise KeyError("no such table")
            prompt = super().reset(task)
            return [*prompt, 10**6] if self.begun == 3 else prompt

        def step(self, turn):
            step = super().step(turn)
            return step._replace(observation=[-5]) if self.begun == 5 and not step.done else step

    config = small(tmp_path, steps=2, sft_steps=0)
    run = train(config, world=replace(world_of(config), make=Fragile), progress=False)
    assert run.history[0]["failed"] >= 2
    assert len(run.rewards) == 2
