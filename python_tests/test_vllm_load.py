"""64 sessions at once on a real vLLM server: slow tools, cancellations, lost replies, a full cache.

Run by `make test-vllm VLLM_TEST_ARGS="-m slow"`; MEM1_LOAD_MINUTES says for how long (default: two
rounds).
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: make test-vllm")

import httpx
from vllm_models import FP32, GENERATION, differences, load, running, save_model

from mem1_kernels import keep_last, mem1
from mem1_kernels.rollout import EngineError
from mem1_kernels.vllm import VLLMServerEngine

pytestmark = pytest.mark.slow

SESSIONS, TURNS = 64, 20
ENLARGE = "Enlarge the KV cache (kv_cache_memory_bytes)"


class Cancelled(Exception):
    pass


class Client:
    """One session, driven as an agent would: what becomes of it is in `outcome`."""

    def __init__(self, engine: VLLMServerEngine, seed: int) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.generation = replace(
            GENERATION,
            retention=self.random.choice([mem1, keep_last(2), keep_last(4)]),
            max_turns=TURNS,
            seed=seed,
        )
        # One in eight gives up in the middle; half of those leave without a word.
        self.gives_up = self.random.randint(2, TURNS - 1) if seed % 8 == 0 else None
        self.silent = seed % 16 == 0
        self.rollout = None
        self.outcome = ""

    def respond(self, turns):
        (turn,) = turns
        time.sleep(self.random.expovariate(1 / 0.05))
        if turn.number == self.gives_up:
            raise Cancelled
        return [[self.random.randint(20, 119)] * self.random.randint(0, 30)]

    def run(self) -> None:
        prompt = [self.random.randint(20, 119) for _ in range(self.random.randint(20, 60))]
        try:
            (self.rollout,) = self.engine.run([prompt], self.respond, self.generation)
            self.outcome = self.rollout.error or "done"
        except Cancelled:
            self.outcome = "cancelled"
        except EngineError as error:  # its first turn already found no room
            self.outcome = str(error)


def lossy(engine: VLLMServerEngine, quiet: threading.local) -> None:
    """One reply in ten is lost on its way; silent clients never say that they are gone."""
    send, dice, lock = engine._client.stream, random.Random(5), threading.Lock()

    class Lost:
        def __init__(self, method, path, **options) -> None:
            self.inner = send(method, path, **options)
            with lock:
                self.lost = method == "POST" and dice.random() < 0.1
            if method == "DELETE" and getattr(quiet, "on", False):
                raise EngineError("left without a word")

        def __enter__(self):
            reply = self.inner.__enter__()
            if self.lost:
                reply.iter_lines = self.cut
            return reply

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def cut(self):
            raise httpx.ReadError("lost")
            yield ""

    engine._client.stream = Lost


def round_of(url: str, seed: int) -> list[Client]:
    engine = VLLMServerEngine(url, retries=8)
    quiet = threading.local()
    lossy(engine, quiet)
    clients = [Client(engine, seed + index) for index in range(SESSIONS)]

    def run(client: Client) -> None:
        quiet.on = client.silent
        client.run()

    with ThreadPoolExecutor(SESSIONS) as pool:
        list(pool.map(run, clients))
    return clients


def settled(url: str) -> tuple[int, float]:
    """Open sessions and the part of the KV blocks in use, once all that is idle is closed."""
    for _ in range(400):
        open_sessions = httpx.get(f"{url}/v1/mem1").json()["sessions"]
        if open_sessions == 0:
            break
        time.sleep(0.2)
    step = {"chunks": [{"token_ids": [20], "max_tokens": 1}]}  # the metrics follow a step
    httpx.post(f"{url}/v1/mem1/sessions/last/steps/1", json=step, timeout=60)
    httpx.delete(f"{url}/v1/mem1/sessions/last")
    httpx.post(
        f"{url}/v1/completions",
        json={
            "model": httpx.get(f"{url}/v1/mem1").json()["model"],
            "prompt": [20],
            "max_tokens": 1,
        },
        timeout=60,
    )
    time.sleep(0.5)
    text = httpx.get(f"{url}/metrics").text
    return open_sessions, float(re.search(r"^vllm:kv_cache_usage_perc\S* (\S+)$", text, re.M)[1])


def resident(url: str) -> int:
    """Bytes that the server's processes hold."""
    port = url.rpartition(":")[2]
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if f"MEM1_LOAD_PORT={port}".encode() not in file.read():
                    continue
            with open(f"/proc/{pid}/statm") as file:
                total += int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            continue
    return total


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("blocks", [512, 160], ids=["room for all", "too little room"])
def test_many_sessions(folder, blocks):
    model = load(folder)
    with running(
        folder,
        "--skip-tokenizer-init",
        "--max-num-seqs",
        "96",
        "--num-gpu-blocks-override",
        str(blocks),
        "--additional-config",
        '{"mem1": {"stall_seconds": 2}}',
        MEM1_SESSION_IDLE="20",
    ) as url:
        end = time.monotonic() + 60 * float(os.environ.get("MEM1_LOAD_MINUTES", "0"))
        memory: list[int] = []
        number = 0
        while number < 2 or time.monotonic() < end:
            clients = round_of(url, 1000 * number)
            check(clients, model, room=blocks > 500)
            assert settled(url) == (0, 0.0)  # nothing is left, no block leaked
            memory.append(resident(url))
            number += 1
            print(f"round {number}: {memory[-1] / 2**20:.0f} MiB", flush=True)
        assert memory[-1] <= 1.05 * memory[0]


def check(clients: list[Client], model, room: bool) -> None:
    outcomes = [client.outcome for client in clients]
    ended = [text for text in outcomes if text not in ("done", "cancelled")]
    print(
        outcomes.count("done"),
        "done,",
        outcomes.count("cancelled"),
        "cancelled,",
        len(ended),
        "ended",
    )
    assert [text for text in ended if ENLARGE not in text] == []
    if room:
        assert not ended
    assert outcomes.count("done") >= SESSIONS // 4
    for client in clients:
        assert (client.outcome == "cancelled") <= (client.gives_up is not None)
        if client.outcome == "done":
            assert len(client.rollout.turns) == TURNS
        if client.rollout is not None and client.rollout.turns:
            assert float(differences(model, [client.rollout]).max()) <= FP32
