"""Agents on vLLM: full context, the live text sent again, and tokens dropped in place.

    bash python_tests/vllm_env.sh .venv-vllm python -m bench.serving --out out/bench

In an environment with vLLM (`make test-vllm` makes one). A random Llama writes every turn to its
token limit (40 of state and 16 of action) and then reads an observation; the prompt has 300 tokens.
Ways to run it, on the same weights, in turns:

- vllm full: nothing is dropped; vLLM's prefix cache serves what was there before;
- vllm reprefill: the policy's live text is sent again every turn, with the prefix cache;
- vllm in place: the policy's tokens leave vLLM's cache in place (`mem1_kernels.vllm`);
- ours in place: the same by `HFEngine`, without vLLM.

The shapes: `mem1` and `keep_last(3)` with observations of 500 and of 2,000 tokens, and `fold` with
branches of three turns, which are dropped at their return.

The work is the written tokens, `batch * turns * 56`. `tokens_s` and `tokens_cpu_s` are those over
the seconds and the CPU seconds of the process, prefills included. `peak_blocks` is the most KV
blocks that vLLM held for all rows at once, of `--block-size` tokens each. `first_ms` is the time
from a tool's return to the row's next token, the mean over rows and turns. `over_in_place` is a
way's CPU time over that of vllm in place, the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import cli
from bench.record import write_results
from bench.timing import print_row
from mem1_kernels import Retention, fold, keep_all, keep_last, mem1
from mem1_kernels.rollout import Generation, HFEngine
from mem1_kernels.vllm import VLLMEngine

PROMPT, STATE, ACTION = 300, 40, 16
WRITTEN = STATE + ACTION
VOCABULARY = 1024
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COLUMNS = ["shape", "batch", "way", "peak_blocks", "tokens_s", "tokens_cpu_s", "first_ms"]
COLUMNS += ["over_in_place"]


@dataclass
class Shape:
    """A policy and the tokens of an observation; fold opens and closes branches."""

    retention: Retention
    read: int
    depth: Any = None


def branches(turn: Any) -> int:
    """A branch of three turns, a turn outside, and so on."""
    return turn.depth + (turn.number % 4 == 1) - (turn.number % 4 == 0)


SHAPES = {
    "mem1 500": Shape(mem1, 500),
    "mem1 2000": Shape(mem1, 2000),
    "keep_last(3) 500": Shape(keep_last(3), 500),
    "keep_last(3) 2000": Shape(keep_last(3), 2000),
    "fold 500": Shape(fold, 500, branches),
}


@dataclass
class Run:
    """What one rollout took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_blocks: int = 0
    first: list[float] = field(default_factory=list)


def token_ids(rows: int, tokens: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (rows, tokens), generator=generator).tolist()


def blocks_of(engine: Any) -> int:
    """The KV blocks that vLLM holds now; 0 for an engine without."""
    if not isinstance(engine, VLLMEngine):
        return 0
    core = engine.llm.llm_engine.engine_core.engine_core
    manager = core.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    return len({block.block_id for blocks in manager.req_to_blocks.values() for block in blocks})


def rollout(engine: Any, shape: Shape, full: bool, batch: int, turns: int, seed: int) -> Run:
    run = Run()
    returned: dict[int, float] = {}
    count = 0

    def respond(written: Any) -> list[list[int]]:
        replies = token_ids(batch, shape.read, 1000 * seed + written[0].number)
        returned.update(dict.fromkeys(range(batch), time.perf_counter()))
        return replies

    def on_tokens(row: int, ids: Any) -> None:
        nonlocal count
        if row in returned:
            run.first.append(time.perf_counter() - returned.pop(row))
        count += 1
        if count % 20 == 0:
            run.peak_blocks = max(run.peak_blocks, blocks_of(engine))

    generation = Generation(
        retention=keep_all if full else shape.retention,
        max_turns=turns,
        max_new_tokens=WRITTEN,
        state_tokens=lambda ids: STATE,
        depth=None if full else shape.depth,
    )
    prompts = token_ids(batch, PROMPT, 999 + seed)
    started, cpu = time.perf_counter(), time.process_time()
    rollouts = engine.run(prompts, respond, generation, on_tokens)
    run.seconds, run.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    problems = [rollout.error for rollout in rollouts if rollout.error]
    if problems:
        raise RuntimeError(problems[0])
    return run


def engines(args: argparse.Namespace) -> dict[str, tuple[Any, bool]]:
    """The ways: an engine each, and whether it keeps everything."""
    torch.manual_seed(0)
    positions = 2**15
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        max_position_embeddings=positions,
    )
    model = LlamaForCausalLM(config).to(DTYPES[args.dtype]).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        in_place = VLLMEngine(
            folder,
            dtype=args.dtype,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=positions,
            max_num_seqs=max(args.batch),
            block_size=args.block_size,
            kv_cache_memory_bytes=args.cache_gib * 2**30,
        )
    again = VLLMEngine(in_place.llm, positions="reprefill")
    return {
        "vllm in place": (in_place, False),
        "vllm reprefill": (again, False),
        "vllm full": (again, True),
        "ours in place": (HFEngine(model), False),
    }


def rows_of(
    name: str, batch: int, ways: dict[str, tuple[Any, bool]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    for round_number in range(args.rounds):
        for way, (engine, full) in ways.items():
            done = rollout(engine, SHAPES[name], full, batch, args.turns, round_number)
            runs[way].append(done)
    work = batch * args.turns * WRITTEN
    rows = []
    for way, each in runs.items():
        pairs = zip(each, runs["vllm in place"], strict=True)
        rows.append(
            {
                "shape": name,
                "batch": batch,
                "way": way,
                "peak_blocks": max(run.peak_blocks for run in each),
                "seconds": statistics.median(run.seconds for run in each),
                "tokens_s": work / statistics.median(run.seconds for run in each),
                "tokens_cpu_s": work / statistics.median(run.cpu_seconds for run in each),
                "first_ms": 1e3 * statistics.mean(x for run in each for x in run.first),
                "over_in_place": statistics.median(
                    mine.cpu_seconds / theirs.cpu_seconds for mine, theirs in pairs
                ),
            }
        )
    return rows


QUICK = {"turns": 3, "batch": [1], "layers": 2, "hidden": 256, "rounds": 1}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "serving", quick=QUICK, devices=("cpu",), rounds=1)
    add = parser.add_argument
    add("--turns", type=int, default=8, help="of an episode")
    add("--batch", nargs="+", type=int, default=[1, 8, 32], help="rows side by side")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which to run")
    add("--layers", type=int, default=8, help="of the model")
    add("--hidden", type=int, default=512, help="its width, a multiple of 256")
    add("--dtype", choices=DTYPES, default="float32", help="of the model and its cache")
    add("--block-size", type=int, default=32, help="tokens of a KV block")
    add("--cache-gib", type=int, default=4, help="GiB of vLLM's KV cache")
    return parser


def main() -> None:
    args = cli.parse(make_parser(), QUICK)
    ways = engines(args)
    for engine, full in ways.values():  # what is allocated and compiled at the first use
        rollout(engine, SHAPES["mem1 500"], full, 1, 2, 77)
    print_row({name: name for name in COLUMNS}, COLUMNS)
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        for name in args.shapes:
            for row in rows_of(name, batch, ways, args):
                rows.append(row)
                print_row(row, COLUMNS)
            write_results(args, "cpu", rows=rows)


if __name__ == "__main__":
    main()
