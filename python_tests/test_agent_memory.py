"""`UserMemory`: the last state of each user, across tasks, threads and processes."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from agent_models import Script, make_model, make_tokenizer

from mem1_kernels.agent import BM25, MemoryEfficientAgent, Passage, UserMemory, memory
from mem1_kernels.agent.tasks import TableEnvironment

CORPUS = BM25([Passage("1", "Shoes\nRed shoes come in size 39.")])
USERS = [
    "ana",
    "Ana",
    "ana ",
    " ana",
    "an\u0061\u0301",
    "an\u00e1",
    "a'; DROP TABLE states; --",
    "%",
]


@pytest.fixture
def clock(monkeypatch):
    """The time of day, which the test moves."""

    class Clock:
        now = 1_000_000.0

        def time(self) -> float:
            return self.now

        def __getattr__(self, name):
            return getattr(memory_time, name)

    memory_time = memory.time
    clock = Clock()
    monkeypatch.setattr(memory, "time", clock)
    return clock


@pytest.fixture
def users(tmp_path):
    return UserMemory(tmp_path / "memory.db")


def test_never_the_state_of_another_user(users):
    for user in USERS:
        assert users.open(user).text == ""
        assert users.save(users.open(user), f"of {user!r}")
    assert [users.open(user).text for user in USERS] == [f"of {user!r}" for user in USERS]
    assert users.users() == sorted(USERS)
    assert users.forget("ana") == 1
    assert [users.open(user).text for user in USERS[1:]] == [f"of {u!r}" for u in USERS[1:]]
    borrowed = memory.Notes("Ana", (), (), users.open("ana ").numbers, users.open("Ana").token)
    users.save(borrowed, "new")
    assert users.open("ana ").text == "of 'ana '"


def test_a_state_replaces_what_its_task_opened_and_nothing_else(users):
    users.save(users.open("ana"), "1")
    first, second = users.open("ana"), users.open("ana")
    users.save(first, "2a")
    users.save(second, "2b")
    both = users.open("ana")
    assert both.states == ("2a", "2b")
    users.save(both, "3")
    assert users.open("ana").text == "3"


def test_states_expire_on_the_date_they_were_saved_with(tmp_path, clock):
    users = UserMemory(tmp_path / "memory.db", max_age=100)
    users.retain("bo", max_age=10)
    for user in ("ana", "bo"):
        users.save(users.open(user), "state")
    running = users.open("bo")
    clock.now += 10
    assert [users.open(user).text for user in ("ana", "bo")] == ["state", ""]
    assert users.export("bo")["states"] == []
    assert users.save(running, "later")
    clock.now += 90
    assert users.users() == ["bo"]
    assert users.open("ana").text == ""
    assert users.expire() == 0
    assert b"later" not in tmp_path.joinpath("memory.db").read_bytes()


def test_expire_deletes_for_everybody(tmp_path, clock):
    users = UserMemory(tmp_path / "memory.db", max_age=5)
    for number in range(3):
        users.save(users.open(str(number)), "state")
    assert users.expire() == 0
    clock.now += 5
    assert users.expire() == 3


def test_a_long_state_loses_its_end_and_the_next_task_reads_how_much(tmp_path):
    users = UserMemory(tmp_path / "memory.db", max_characters=10)
    users.retain("bo", max_characters=3)
    for user in ("ana", "bo"):
        users.save(users.open(user), "0123456789🐪x")
    assert users.open("ana").text == "0123456789 [2 characters were cut here]"
    assert users.open("bo").text == "012 [9 characters were cut here]"


def test_forgotten_text_is_in_no_file(tmp_path):
    users = UserMemory(tmp_path / "memory.db")
    secret = "zebra-7391 " * 900  # several pages
    users.save(users.open("ana"), secret[:8000])
    users.save(users.open("bo"), "short")
    held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"zebra-7391" in held
    assert users.forget("ana") == 1
    left = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"zebra" not in left and b"short" in left
    assert users.users() == ["bo"]


def test_a_task_that_runs_while_its_user_is_forgotten_leaves_nothing(users):
    running = users.open("ana")
    users.forget("ana")
    assert not users.save(running, "what was forgotten")
    fresh = users.open("ana")
    assert fresh.text == ""
    assert not users.save(running, "what was forgotten")
    assert users.save(fresh, "new")


def test_a_user_who_is_not_to_be_remembered(users):
    users.save(users.open("ana"), "state")
    running = users.open("ana")
    users.retain("ana", keep=False)
    assert users.open("ana").text == ""
    assert not users.save(running, "state") and not users.save(users.open("ana"), "state")
    users.forget("ana")
    assert not users.save(users.open("ana"), "state"), "the choice outlives forget"
    assert users.export("ana")["keep"] is False and users.users() == ["ana"]
    users.retain("ana")
    assert users.save(users.open("ana"), "state")


def test_export_is_all_there_is(users, clock):
    users.retain("ana", max_age=60.0)
    users.save(users.open("ana"), "Size 39.")
    assert json.loads(json.dumps(users.export("ana"))) == {
        "user": "ana",
        "keep": True,
        "max_characters": None,
        "max_age": 60.0,
        "states": [
            {
                "state": "Size 39.",
                "cut": 0,
                "written": "1970-01-12T13:46:40+00:00",
                "expires": "1970-01-12T13:47:40+00:00",
            }
        ],
    }
    assert users.export("bo")["states"] == [] and users.users() == ["ana"]


def test_the_file_is_its_owners_and_keeps_a_log(users):
    assert stat.S_IMODE(users.path.stat().st_mode) == 0o600
    with sqlite3.connect(users.path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def work(path, worker, rounds, start) -> None:
    start.wait()
    users = UserMemory(path)
    for number in range(rounds):
        notes = users.open("shared")
        facts = set(notes.text.split()) | {f"{worker}:{number}"}
        users.save(notes, " ".join(sorted(facts)))
        own = users.open(f"user {worker}")
        users.save(own, str(int(own.text or 0) + 1))


def test_several_processes_lose_nothing(tmp_path):
    """They create the file together, and each adds facts to one user's state and to its own."""
    context = multiprocessing.get_context("fork")  # no second import of torch per process
    start = context.Event()
    path = tmp_path / "memory.db"
    arguments = [(path, worker, 20, start) for worker in range(4)]
    processes = [context.Process(target=work, args=given) for given in arguments]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    users = UserMemory(path)
    facts = set(users.open("shared").text.split())
    assert facts == {f"{worker}:{number}" for worker in range(4) for number in range(20)}
    assert [users.open(f"user {worker}").text for worker in range(4)] == ["20"] * 4


def test_threads_share_one_memory(users):
    def add(number: int) -> None:
        notes = users.open("shared")
        users.save(notes, f"{notes.text} {number}".strip())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    assert set(users.open("shared").text.split()) == set(map(str, range(40)))


def test_a_file_that_is_something_else(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and long enough to have a header of its own " * 20)
    before = text.read_bytes()
    with pytest.raises(ValueError, match="path: expected an SQLite file, got .*notes.txt"):
        UserMemory(text)
    assert text.read_bytes() == before
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    before = other.read_bytes()
    with pytest.raises(ValueError, match="path: expected a memory of users, got another one"):
        UserMemory(other)
    assert other.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        UserMemory(tmp_path / "nowhere" / "memory.db")


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "user: expected text, got int", lambda users: users.open(3)),
        (ValueError, "user: expected 1 to 256 characters, got 0", lambda users: users.forget("")),
        (ValueError, "user: expected 1 to 256 characters, got 257", lambda u: u.export("a" * 257)),
        (ValueError, "user: expected valid Unicode", lambda users: users.open("\ud800")),
        (TypeError, "state: expected text, got NoneType", lambda u: u.save(u.open("a"), None)),
        (ValueError, "state: expected text, got an empty", lambda u: u.save(u.open("a"), "")),
        (TypeError, "keep: expected True or False, got 0", lambda u: u.retain("a", keep=0)),
        (ValueError, "max_age: expected more than 0", lambda u: u.retain("a", max_age=-1)),
        (ValueError, "max_characters: .* 1, got 0", lambda u: u.retain("a", max_characters=0)),
        (TypeError, "max_age: .* seconds, got '1'", lambda u: UserMemory(u.path, max_age="1")),
        (TypeError, "path: expected a path, got int", lambda u: UserMemory(3)),
    ],
)
def test_arguments(users, error, message, call):
    with pytest.raises(error, match=message):
        call(users)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def make_agent(tokenizer, tmp_path):
    model = make_model(len(tokenizer))

    def make(**options) -> MemoryEfficientAgent:
        options = {"environment": CORPUS, "memory": tmp_path / "memory.db", **options}
        return MemoryEfficientAgent(
            model, tokenizer=tokenizer, progress=False, max_new_tokens=90, **options
        )

    return make


def turns(*states: str) -> list[str]:
    *first, last = states
    return [
        *(f"<think>{state}</think><search>shoes</search>" for state in first),
        f"<think>{last}</think><answer>39</answer>",
    ]


def test_the_next_task_of_a_user_begins_with_the_last_state(monkeypatch, make_agent, tokenizer):
    Script(monkeypatch, tokenizer, turns("Looking.", "Ana wears 39 <|im_end|>."))
    first = make_agent().process("Order", ["Which shoes fit?"], user="ana")
    assert "Your notes" not in first.prompt

    Script(monkeypatch, tokenizer, turns("Bo wears 41."), turns("Ana wears 39, red."), turns("?"))
    agent = make_agent()
    task = first.task
    bo, ana, nobody = agent.run([task] * 3, users=["bo", "ana", None])
    for result in (bo, nobody):
        assert result.prompt == first.prompt
    notes = "Your notes at the end of this user's earlier tasks:\nAna wears 39 ‹|im_end|>.\n"
    assert ana.prompt == f"{first.prompt}\n\n{notes}"
    assert tokenizer.decode(ana.rollout.trajectory.segments[0].ids) == ana.prompt
    assert agent.memory.open("ana").text == "Ana wears 39, red."
    assert agent.memory.users() == ["ana", "bo"]


def test_a_task_without_a_readable_state_leaves_the_old_one(monkeypatch, make_agent, tokenizer):
    agent = make_agent()
    agent.memory.save(agent.memory.open("ana"), "old")
    Script(monkeypatch, tokenizer, ["<answer>39</answer>"])
    agent.process("Order", ["Which?"], user="ana", max_turns=1)
    assert agent.memory.open("ana").text == "old"


def test_users_need_a_memory_and_text(make_agent, tmp_path):
    with pytest.raises(ValueError, match="memory: expected a file beside a user, got None"):
        make_agent(memory=None).process("Order", ["Which?"], user="ana")
    with pytest.raises(ValueError, match="users: expected one per task, 1, got 'a'"):
        make_agent().run(["Order"], users="a")
    with pytest.raises(TypeError, match="memory: expected a UserMemory or the path"):
        make_agent(memory=3)
    with pytest.raises(TypeError, match="notes: expected an environment that speaks text"):
        make_agent(environment=TableEnvironment).run(["any"], users=["ana"])
