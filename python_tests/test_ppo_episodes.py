"""Episodes: the tasks that are drawn, the traces that teach, the means of scores."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from agent_models import make_bytes_tokenizer
from ppo_runs import small

from mem1_kernels import Segment, Trajectory, fold, mem1
from mem1_kernels.agent.world import World
from mem1_kernels.ppo.config import Config
from mem1_kernels.ppo.episodes import mean_scores, read_transcripts, world_of
from mem1_kernels.ppo.learner import Learner
from mem1_kernels.ppo.trainer import evaluate, train
from mem1_kernels.ppo.warm_start import warm_start
from python_tests.talking_processes import Talk, talk

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


PROMPT = b'["prompt", 0, [1, 2]]'
TURN = b'["state", 1, [3]], ["action", 1, [4, 5], 1]'
TRACE = b'{"segments": [' + PROMPT + b", " + TURN + b'], "reward": 0.5}'


def test_transcripts_are_read_whatever_ends_their_lines(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + TRACE + b"\r\n\r\n" + TRACE)
    segments = [
        Segment("prompt", [1, 2]),
        Segment("state", [3], 1),
        Segment("action", [4, 5], 1, 1),
    ]
    assert read_transcripts(str(path)) == [(segments, 0.5)] * 2


NO_TRANSCRIPT = {
    "line 1: no transcript .no 'reward'": b'{"segments": [%s]}' % TURN,
    "line 1: no transcript .no 'segments'": b"{}",
    "line 1: no transcript .int too large": b'{"reward": 1%s, "segments": [%s]}'
    % (b"0" * 400, TURN),
    "line 1: no transcript .tokens: expected ids below 2.63": b'{"reward": 1, "segments": '
    b'[["prompt", 0, [1%s]]]}' % (b"0" * 30),
    "line 2: no transcript .Unterminated string starting at at column 16": TRACE
    + b'\n{"segments": [["pro',
    "line 2: no transcript .*'utf-8' codec": TRACE + b"\n\xff",
    "line 1: no transcript .*'utf-8' codec": TRACE.decode().encode("utf-16"),
    "line 1: no transcript .segments: expected tokens of a state or an action": b'{"segments": [%s'
    b'], "reward": 1}' % PROMPT,
    "line 1: no transcript .reward: expected a finite number, got nan": TRACE.replace(
        b"0.5", b"NaN"
    ),
    "line 1: no transcript .role: expected one of .*, got 'think'": TRACE.replace(
        b"state", b"think"
    ),
    "line 1: no transcript .tokens: expected ids >= 0, got -3": TRACE.replace(b"[3]", b"[-3]"),
    "line 1: no transcript .maximum recursion": b"[" * 10**5,
    "line 1: no transcript": b"[]",
    "line 1: no tran": b'"text"',
}


@pytest.mark.parametrize("message", NO_TRANSCRIPT)
def test_a_line_that_is_no_transcript_is_named(tmp_path, message):
    path = tmp_path / "traces.jsonl"
    path.write_bytes(NO_TRANSCRIPT[message])
    with pytest.raises(ValueError, match=f"^transcripts: .*traces.jsonl, {message}"):
        read_transcripts(str(path))


def test_a_file_without_transcripts_is_not_taken_for_a_teacher(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    config = small(tmp_path, transcripts=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="^transcripts: expected at least one in .*empty.jsonl"):
        train(config, progress=False)
    for path, reason in (("none.jsonl", "No such file or directory"), (".", "Is a directory")):
        with pytest.raises(OSError, match=f"^transcripts: .*: {reason}"):
            read_transcripts(str(tmp_path / path))


def test_ids_that_the_model_does_not_know_are_named(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_bytes(TRACE + b"\n" + TRACE.replace(b"[3]", b"[999]"))
    config = small(tmp_path, transcripts=str(path))
    with pytest.raises(ValueError, match="transcripts: expected ids below 54, .* got 999"):
        train(config, progress=False)


# folding


def branching(config: Config) -> World:
    """The world in which every second turn is a branch that returns at once."""
    return replace(talk(config), depth=lambda turn: turn.number % 2)


def test_fold_drops_what_a_branch_wrote_and_its_transcripts_say_so(tmp_path):
    config = small(tmp_path, retention="fold", save_transcripts=True, eval_every=2, eval_sizes=(1,))
    run = train(config, world=branching(config), progress=False)
    steps = [record for record in run.history if "reward" in record]
    assert all(record["dropped_per_turn"] > 0 for record in steps)
    assert all(record["log_prob_gap"] < 1e-3 for record in steps)
    path = tmp_path / "run" / "transcripts" / "000001.jsonl"
    depths = {
        (segment.turn % 2, segment.depth)
        for segments, _ in read_transcripts(str(path))
        for segment in segments
        if segment.role in ("state", "action") and segment.num_tokens
    }
    assert depths == {(1, 0), (0, 1)}
    folded = [Trajectory(segments, fold) for segments, _ in read_transcripts(str(path))]
    assert any((t.expiry < t.num_tokens).any() for t in folded)


def test_fold_needs_a_world_with_branches(tmp_path):
    config = small(tmp_path, retention="fold", sft_steps=10**6)
    message = "retention: fold drops .* World.depth, got None"
    with pytest.raises(ValueError, match=message):
        train(config, world=talk(config), progress=False)
    policy = train(small(tmp_path / "plain", steps=0), progress=False).policy
    with pytest.raises(ValueError, match=message):
        evaluate(config, policy, world=talk(config))
    rows = evaluate(replace(config, eval_episodes=4), policy, world=branching(config), sizes=[2])
    assert rows[0]["peak_context"] < rows[0]["total_tokens"]


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
