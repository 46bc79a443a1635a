"""The paper's table: figures counted by hand, and the command line on tiny saved models."""

from __future__ import annotations

import json
import random

import pytest
from agent_models import Script, completions, greedy_writer, make_model, make_tokenizer
from local_server import serve

from mem1_kernels.agent import evaluate as module
from mem1_kernels.agent.agent import MemoryEfficientAgent
from mem1_kernels.agent.evaluate import MODES, evaluate, main, measure, table
from mem1_kernels.agent.qa import QATask
from mem1_kernels.agent.retrieval import BM25, Passage, write_corpus
from mem1_kernels.agent.tasks import VOCABULARY, ChainTask, TableEnvironment, Teacher
from mem1_kernels.agent.world import make_world

PASSAGES = [Passage("1", "Chad\nN'Djamena"), Passage("2", "Mali\nBamako")]


class Words:
    """Turns that are ids already."""

    def encode(self, text, add_special_tokens):
        return text


def chain_agent(mode: str, **options) -> MemoryEfficientAgent:
    options = {"environment": TableEnvironment, "progress": False, "max_new_tokens": 8, **options}
    return MemoryEfficientAgent(
        make_model(VOCABULARY),
        engine=MODES[mode].engine,
        retention=MODES[mode].retention,
        **options,
    )


def taught(task: ChainTask) -> list[list[int]]:
    segments, _ = Teacher().play(task)
    return [[*s.ids, *a.ids] for s, a in zip(segments[1::3], segments[2::3], strict=True)]


@pytest.mark.parametrize("mode", ["pruned", "full", "reprefill"])
@pytest.mark.parametrize("hops", [2, 8, 32])
def test_a_chain_by_hand(monkeypatch, mode, hops):
    """A turn is 3 + 3 + 7 tokens, the last one 3 + 3; the prompt is 4."""
    task = ChainTask.sample(hops, random.Random(hops))
    Script(monkeypatch, Words(), taught(task))
    results = chain_agent(mode).run([task], max_turns=hops + 1)
    line = measure(results, mode=mode, objectives=hops, seconds=1.5)
    assert (line.em, line.f1, line.turns, line.errors, line.seconds) == (1, None, hops + 1, 0, 1.5)
    contexts = [13 * turn for turn in range(hops + 1)] if mode == "full" else [0] + [13] * hops
    assert line.peak_tokens == contexts[-1] + 6
    assert line.dependency == sum(3 * (at + 1.5) + 3 * (at + 3 + 1.5) for at in contexts)
    assert line.compression == pytest.approx((contexts[-1] + 6) / (13 * hops + 6))
    assert line.peak_context == 4 + contexts[-1] + 6


def qa_results(monkeypatch, *replies: str):
    tokenizer = make_tokenizer()
    task = QATask(("Chad?", "Mali?"), (("The N'Djamena",), ("Bamako", "BKO")))
    Script(monkeypatch, tokenizer, *([f"<think>.</think><answer>{r}</answer>"] for r in replies))
    agent = MemoryEfficientAgent(
        make_model(len(tokenizer)),
        tokenizer=tokenizer,
        environment=BM25(PASSAGES),
        progress=False,
    )
    return agent.run([task] * len(replies))


def test_questions_by_hand(monkeypatch):
    results = qa_results(monkeypatch, "n'djamena; the BKO", "N'Djamena; Bamako city", "Bamako")
    line = measure(results, mode="pruned", objectives=2, seconds=0.0)
    assert line.em == pytest.approx((2 + 1 + 0) / 3)
    assert line.f1 == pytest.approx((2 + (1 + 2 / 3) + 0) / 3)
    assert line.errors == 1
    tokens = [sum(result.turns[0].tokens) for result in results]
    assert line.peak_tokens == pytest.approx(sum(tokens) / 3)


def test_as_the_released_script_counts(monkeypatch):
    """Articles stay, a state counts twice, and a peak counts only where something was right."""
    results = qa_results(monkeypatch, "n'djamena; Bamako", "x; y")
    line = measure(results, mode="pruned", objectives=2, seconds=0.0, released=True)
    assert line.em == 0.5
    assert line.f1 == pytest.approx((1 + 2 * 2 / (2 + 3)) / 2)
    state, action, _ = results[0].turns[0].tokens
    assert line.peak_tokens == 2 * state + action
    nothing = measure(results[1:], mode="pruned", objectives=2, seconds=0.0, released=True)
    assert nothing.peak_tokens is None
    assert nothing.em == 0.0
    assert " - " in table([nothing])


def test_every_mode_gets_the_same_tasks_and_enough_turns(monkeypatch):
    seen: list[tuple[str, int, int]] = []
    seeds: list[int] = []

    def make(mode):
        agent = chain_agent(mode)
        run = agent.run

        def spy(tasks, *, max_turns):
            seeds.append(agent.generation.seed)
            seen.append((mode, len(tasks), max_turns))
            assert all(task in drawn[task.searches] for task in tasks)
            return run(tasks, max_turns=max_turns)

        agent.run = spy
        return agent

    rng = random.Random(0)
    drawn = {hops: [ChainTask.sample(hops, rng) for _ in range(3)] for hops in (2, 8)}
    told = []
    lines = evaluate(
        make,
        drawn.__getitem__,
        modes=["full", "pruned"],
        objectives=[2, 8],
        batch=2,
        max_turns=4,
        report=told.append,
    )
    assert told == lines
    assert [(line.mode, line.objectives, line.episodes) for line in lines] == [
        (mode, hops, 3) for mode in ("full", "pruned") for hops in (2, 8)
    ]
    assert seen[:5] == [
        ("full", 1, 1),
        ("full", 2, 4),
        ("full", 1, 4),
        ("full", 2, 9),
        ("full", 1, 9),
    ]
    assert seeds[:5] == [0, 0, 2, 0, 2], "batches that draw differently, the same for every line"


def test_the_command_line_on_a_chain(tmp_path, capsys):
    make_model(VOCABULARY).save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--task", "chain", "--objectives", "2", "4"]
    arguments += ["--episodes", "2", "--max-new-tokens", "7", "--out", str(tmp_path / "out")]
    lines = main(arguments)
    printed = capsys.readouterr().out
    assert table(lines) in printed
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [(line["mode"], line["objectives"]) for line in record["lines"]] == [
        (mode, hops) for mode in ("pruned", "full", "reprefill") for hops in (2, 4)
    ]
    assert record["options"]["task"] == "chain"
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 5000


def test_the_command_line_on_questions_and_a_server(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    write_corpus(PASSAGES, tmp_path / "corpus.jsonl")
    questions = [{"question": f"What is {n}?", "golden_answers": [str(n)]} for n in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    with serve(completions(greedy_writer(model, tokenizer))) as server:
        lines = main(
            [
                *(str(tmp_path / "model"), "--server", f"{server.url}/v1", "--released"),
                *("--data", str(tmp_path / "data.jsonl")),
                *("--corpus", str(tmp_path / "corpus.jsonl"), "--objectives", "2"),
                *("--episodes", "1", "--max-new-tokens", "3", "--max-turns", "2"),
                *("--out", str(tmp_path / "out")),
            ]
        )
    assert [line.mode for line in lines] == ["server", "server-full"]
    assert [line.errors for line in lines] == [1, 1]
    assert lines[0].em == 0.0


def test_the_factbook_is_the_default():
    options = module._parse(["mem1-7b", "--episodes", "3"])
    world = module._world(options)
    tasks = module._drawer(world, options)(4)
    assert len(tasks) == 3
    assert all(len(task.questions) == 4 for task in tasks)
    ((found,),) = world.make().retriever.search(["capital of Chad N'Djamena"], 1)
    assert found.title.startswith("Chad")


def test_the_command_line_in_a_shop(tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    make_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    lines = main(
        [
            *(str(tmp_path / "model"), "--task", "webshop", "--modes", "pruned"),
            *("--episodes", "2", "--max-new-tokens", "3", "--max-turns", "2"),
            *("--out", str(tmp_path / "out")),
        ]
    )
    (line,) = lines
    assert (line.objectives, line.em, line.f1, line.reward) == (1, None, None, 0.0)
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["options"]["corpus"] == "" and record["lines"][0]["reward"] == 0.0


def test_a_purchase_by_hand(monkeypatch):
    """The reward of the shop is measured, and there is no EM."""
    tokenizer = make_tokenizer()
    world = make_world("webshop", sizes=[1])
    goal = world.eval_tasks(1)[0]
    actions = [f"search[{goal.product.title}]", f"click[{goal.product.asin}]", "click[Buy Now]"]
    body = "<think>.</think><summary>.</summary><answer>{}</answer>".format
    Script(monkeypatch, tokenizer, [body(action) for action in actions])
    agent = MemoryEfficientAgent(
        make_model(len(tokenizer)), tokenizer=tokenizer, environment=world.make, progress=False
    )
    results = agent.run([goal])
    line = measure(results, mode="pruned", objectives=1, seconds=0.0, released=True)
    assert (line.em, line.f1, line.turns) == (None, None, 3)
    assert 0 < line.reward < 1, "no option was chosen"
    assert line.peak_tokens is not None, "what earned a reward counts"


def test_errors():
    with pytest.raises(ValueError, match="results: expected at least one"):
        measure([], mode="pruned", objectives=2, seconds=0.0)

    def none(*_):
        raise AssertionError("nothing may run")

    for match, options in (
        ("modes: expected some of pruned, full", {"modes": ["fast"]}),
        ("objectives: expected numbers from 1", {"objectives": [0]}),
        ("objectives: expected numbers from 1", {"objectives": []}),
        ("batch: expected at least 1, got 0", {"batch": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate(none, none, **options)
    for arguments in (["m", "--episodes", "0"], ["m", "--modes", "server"]):
        with pytest.raises(SystemExit, match="expected at least 1|need --server"):
            main(arguments)
