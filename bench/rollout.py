"""Rollouts end to end: a pruned cache against full context and against sending the text again.

    python -m bench.rollout --turns 2 8 16 --out out/bench    # writes out/bench/rollout.json

A random Qwen2 writes every turn to its token limit (40 of state and 16 of action) and then reads
500 tokens; the prompt has 300. Rows of a batch are equally long. Ways to run it:

- pruned: the retention policy mem1 on a pruned cache, positions counting on;
- reprefill: the same policy without a pruned cache: the live text is sent again every turn;
- full: nothing is dropped, on the same cache and attention kernels;
- hf full: nothing is dropped, as transformers does it: DynamicCache and its sdpa attention.

The work is the generated tokens: `tokens_s` is `batch * turns * 56` over the seconds of a rollout,
prefills included. `peak_mb` is `peak tokens of a row * batch * bytes that a token takes in all
layers`. `over_pruned` is a way's time over the pruned one's, round by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from bench import cli
from bench.record import write_results
from bench.timing import measure, print_row
from mem1_kernels import Retention, keep_all, mem1
from mem1_kernels.rollout import Generation, HFEngine, Rollout, Turn
from mem1_kernels.trajectory import Positions

PROMPT, STATE, ACTION, INFO = 300, 40, 16, 500
WRITTEN = STATE + ACTION
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COLUMNS = ["turns", "way", "total", "peak_context", "peak_mb", "seconds", "tokens_s", "over_pruned"]


def make_model(args: argparse.Namespace) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256),
        max_position_embeddings=2**17,
        attn_implementation="sdpa",
    )
    return Qwen2ForCausalLM(config).eval().to(args.device, DTYPES[args.dtype])


def token_ids(batch: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 1024, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def ours(
    model: Any, turns: int, batch: int, retention: Retention, positions: Positions = "kept"
) -> Callable[[], list[Rollout]]:
    """A rollout of so many turns, to be timed; observations are random."""
    engine = HFEngine(model, positions=positions)
    generation = Generation(
        retention=retention,
        max_turns=turns,
        max_new_tokens=WRITTEN,
        state_tokens=lambda ids: STATE,
    )
    prompts = token_ids(batch, PROMPT, 0).tolist()

    def respond(written: list[Turn]) -> list[list[int]]:
        return token_ids(batch, INFO, written[0].number).tolist()

    return lambda: engine.run(prompts, respond, generation)


@torch.no_grad()
def hf_full(model: Any, turns: int, batch: int) -> int:
    """The same work by transformers' own cache and attention; returns the tokens it held."""
    cache = DynamicCache(config=model.config)
    device = next(model.parameters()).device

    def feed(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, past_key_values=cache, logits_to_keep=1).logits[:, 0].float()

    logits = feed(token_ids(batch, PROMPT, 0).to(device))
    for turn in range(1, turns + 1):
        for _ in range(WRITTEN):
            token = torch.multinomial(torch.log_softmax(logits, 1).exp(), 1)
            logits = feed(token)
        if turn < turns:
            logits = feed(token_ids(batch, INFO, turn).to(device))
    return cache.get_seq_length()


def rows_for(turns: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    model = make_model(args)
    peak: dict[str, int] = {}

    def noting_peak(way: str, run: Callable[[], list[Rollout]]) -> Callable[[], None]:
        def timed() -> None:
            peak[way] = max(rollout.peak_context for rollout in run())

        return timed

    batch = args.batch
    candidates: dict[str, Callable[[], None]] = {
        "pruned": noting_peak("pruned", ours(model, turns, batch, mem1)),
        "reprefill": noting_peak("reprefill", ours(model, turns, batch, mem1, "reprefill")),
        "full": noting_peak("full", ours(model, turns, batch, keep_all)),
        "hf full": lambda: peak.update({"hf full": hf_full(model, turns, batch)}),
    }
    candidates = {way: candidates[way] for way in ("pruned", *args.ways)}
    # On a GPU the first run of a way compiles its kernels.
    warmup = int(args.device == "cuda")
    times = measure(candidates, device=args.device, rounds=args.rounds, seconds=1e9, warmup=warmup)
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    token_bytes *= DTYPES[args.dtype].itemsize
    return [
        {
            "turns": turns,
            "way": way,
            "batch": batch,
            "total": PROMPT + turns * WRITTEN + (turns - 1) * INFO,
            "peak_context": peak[way],
            "peak_mb": batch * peak[way] * token_bytes / 1e6,
            "seconds": times[way].median,
            "tokens_s": batch * turns * WRITTEN / times[way].median,
            "over_pruned": times[way].over(times["pruned"]),
            "time": times[way].row(),
        }
        for way in candidates
    ]


QUICK = {"turns": [3], "batch": 2, "layers": 2, "rounds": 1}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "rollout", quick=QUICK, rounds=3)
    add = parser.add_argument
    ways = ["reprefill", "full", "hf full"]
    add("--turns", nargs="+", type=int, default=[2, 8, 16], help="lengths of the rollout")
    add("--ways", nargs="*", choices=ways, default=ways, help="what runs beside the pruned cache")
    add("--batch", type=int, default=4, help="rows side by side")
    add("--layers", type=int, default=4, help="of the model")
    add("--hidden", type=int, default=256, help="its width, a multiple of 256")
    add("--dtype", choices=DTYPES, default="float32", help="of the model and its cache")
    return parser


def main() -> None:
    args = cli.parse(make_parser(), QUICK)
    print_row({name: name for name in COLUMNS}, COLUMNS)
    rows = []
    for turns in args.turns:
        for row in rows_for(turns, args):
            rows.append(row)
            print_row(row, COLUMNS)
        write_results(args, args.device, rows=rows)


if __name__ == "__main__":
    main()
