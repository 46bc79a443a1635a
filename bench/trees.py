"""Training on histories that branch: one prefix tree against its rows run apart.

    python -m bench.trees --layouts group8_1k tau --out out/bench    # writes out/bench/trees.json

A small Qwen2 with random weights computes the log-probs of all tokens in the loss (`forward`), and
those and their gradients (`step`). Ways to do it:

- ours: `pack_tree`, then one pass under its plan;
- packed: the rows behind each other in one pass of our kernels: no padding, nothing shared;
- apart: transformers' own causal sdpa, row by row, gradients summed;
- dense: the same tree under a mask of tokens x tokens, by transformers' sdpa;
- flex: the same tree by FlexAttention, which has no backward on the CPU.

The layouts: GRPO groups of 8 and 16 answers of 500 tokens behind prompts of 1,000 to 8,000; a run
of 20 turns of 160 tokens behind a prompt of 1,500, and 8 retries, which go back to turn 2, 4, ...,
16; the turns of MEM1 trajectories as an engine computes them that sends the text again (prompt 300,
56 written and 500 read per turn).

The work is the tokens of the loss, equal for all ways; `tokens` is how many a way computes to get
there. Masks and plans are made beforehand: `plan_ms` once per batch, for all layers. `first_s` is
the first pass, with what it compiles. `peak_mb` is the highest memory of plan and passes above what
the process held before: of the allocator on a GPU, resident on a CPU. `over_ours` is a way's time
over ours, round by round. `pack` rows: seconds of `pack_tree` alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

from bench import cli
from bench.attention import compiled
from bench.record import write_results
from bench.timing import measure, print_row
from mem1_kernels import BlockPlan, Layout, TokenRow, pack, pack_tree, visible
from mem1_kernels.hf import patch

VOCABULARY = 1024


def tokens_of(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def group(members: int, prompt: int, answer: int = 500) -> list[TokenRow]:
    """A GRPO group: answers of one length behind one prompt."""
    rng = random.Random(0)
    shared = tokens_of(rng, prompt)
    mask = [False] * prompt + [True] * answer
    return [TokenRow(shared + tokens_of(rng, answer), mask) for _ in range(members)]


def retries(turns: int, count: int, prompt: int = 1500) -> list[TokenRow]:
    """A run of turns, and as many retries: each goes back to a turn and writes the rest anew."""
    written, read = 60, 100
    rng = random.Random(0)
    turn = [True] * written + [False] * read
    first = tokens_of(rng, prompt + turns * len(turn))
    mask = [False] * prompt + turns * turn
    rows = [TokenRow(first, mask)]
    for number in range(1, count + 1):
        kept = prompt + number * turns // (count + 2) * len(turn)
        # What is shared is in the loss once.
        own = [False] * kept + mask[kept:]
        rows.append(TokenRow(first[:kept] + tokens_of(rng, len(first) - kept), own))
    return rows


def reprefilled(turns: int) -> list[TokenRow]:
    """The contexts of a MEM1 trajectory whose live text is sent again each turn."""
    rng = random.Random(0)
    prompt, before = tokens_of(rng, 300), []
    rows = []
    for _ in range(turns):
        written = tokens_of(rng, 56)
        mask = [False] * (len(prompt) + len(before)) + [True] * len(written)
        rows.append(TokenRow(prompt + before + written, mask))
        before = written + tokens_of(rng, 500)
    return rows


LAYOUTS: dict[str, Callable[[], list[TokenRow]]] = {
    "group8_1k": partial(group, 8, 1000),
    "group8_4k": partial(group, 8, 4000),
    "group16_1k": partial(group, 16, 1000),
    "group16_8k": partial(group, 16, 8000),
    "tau": partial(retries, 20, 8),
    "mem1_16": partial(reprefilled, 16),
    "mem1_100": partial(reprefilled, 100),
    "small": partial(retries, 4, 2, 20),
}
"""`small` is for tests."""


def flex_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **others: Any
) -> tuple[Tensor, None]:
    """transformers' call for attention, by FlexAttention."""
    out = compiled("flex_attention")(
        query, key, value, block_mask=others["block_mask"], scale=others["scaling"], enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("bench_flex", flex_attention)


def make_model(way: str, options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256),
        max_position_embeddings=2**15,
        attn_implementation="bench_flex" if way == "flex" else "sdpa",
    )
    model = Qwen2ForCausalLM(shape).to(options.device)
    return patch(model) if way in ("ours", "packed") else model


def block_mask(layout: Layout) -> Any:
    expiry = layout.expiry

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < expiry[k])

    tokens = layout.num_tokens
    return compiled("create_block_mask")(
        mask_mod, None, None, tokens, tokens, device=str(expiry.device)
    )


MASKS: dict[str, Callable[[Layout], dict[str, Any]]] = {
    "ours": lambda layout: {"plan": BlockPlan.of(layout)},
    "packed": lambda layout: {"plan": BlockPlan.of(layout)},
    "apart": lambda layout: {},
    "dense": lambda layout: {"attention_mask": visible(layout.expiry)[None, None]},
    "flex": lambda layout: {"block_mask": block_mask(layout)},
}
"""What each way gives the model for one layout."""


def log_probs(model: Any, layout: Layout, mask: dict[str, Any]) -> Tensor:
    """Of the tokens in the loss."""
    assert layout.token_ids is not None
    generated = layout.loss_mask.nonzero().flatten()
    logits = model(
        layout.token_ids[None],
        position_ids=layout.position_ids[None],
        use_cache=False,
        logits_to_keep=layout.predecessor[generated],
        **mask,
    ).logits[0]
    return logits.log_softmax(1).gather(1, layout.token_ids[generated, None])


@dataclass
class Way:
    """One way over one layout, ready to run: a pass per layout with its mask."""

    model: Any
    layouts: list[Layout]
    masks: list[dict[str, Any]]

    @property
    def tokens(self) -> int:
        return sum(layout.num_tokens for layout in self.layouts)

    @torch.no_grad()
    def forward(self) -> float:
        """The sum of the log-probs."""
        parts = zip(self.layouts, self.masks, strict=True)
        return sum(float(log_probs(self.model, *part).sum()) for part in parts)

    def step(self) -> None:
        self.model.zero_grad()
        for layout, mask in zip(self.layouts, self.masks, strict=True):
            (-log_probs(self.model, layout, mask).sum()).backward()


def layouts_for(way: str, rows: Iterable[TokenRow], device: str) -> list[Layout]:
    """What a way computes: a pass each."""
    alone: list[Layout] = [pack_tree([row]) for row in rows]
    trees = {"apart": alone, "packed": [pack(alone)]}.get(way) or [pack_tree(list(rows))]
    return [moved(layout, device) for layout in trees]


def moved(layout: Layout, device: str) -> Layout:
    names = ("expiry", "position_ids", "loss_mask", "predecessor", "document", "source")
    fields = {name: getattr(layout, name).to(device) for name in names}
    return layout.replaced(**fields, token_ids=layout.token_ids.to(device))  # type: ignore[union-attr]


def peak_mb(run: Callable[[], Any], device: str) -> float:
    """The most memory that a call takes on top of what was held before, in 10^6 bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1e6


def _status(name: str) -> int:
    """Bytes, by a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def has_step(way: str, device: str) -> bool:
    """FlexAttention has no backward on the CPU."""
    return way != "flex" or device != "cpu"


def rows_for(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All passes of one layout."""
    rows, device = LAYOUTS[name](), options.device
    case = {"part": "tree", "layout": name, "rows": len(rows)}
    found: list[dict[str, Any]] = []
    ways: dict[str, Way] = {}
    about: dict[str, dict[str, Any]] = {}
    for way in ("ours", *options.ways):
        layouts = layouts_for(way, rows, device)
        tokens = sum(layout.num_tokens for layout in layouts)
        if way == "dense" and tokens > options.dense_limit:
            why = f"a mask of {tokens:,} x {tokens:,}: see --dense-limit"
            found.append({**case, "way": way, "tokens": tokens, "skipped": why})
            continue
        if way == "flex":
            torch._dynamo.reset()  # past a limit of recompilations it would go on uncompiled
        model = make_model(way, options)
        started = time.perf_counter()
        first = Way(model, layouts, [MASKS[way](layout) for layout in layouts])
        total = first.forward()
        about[way] = {"tokens": tokens, "first_s": time.perf_counter() - started}
        about[way]["mean_log_prob"] = total / sum(int(x.loss_mask.sum()) for x in layouts)
        del first

        def whole(way: str = way, model: Any = model, layouts: list[Layout] = layouts) -> None:
            ways[way] = Way(model, layouts, [MASKS[way](layout) for layout in layouts])
            ways[way].step() if has_step(way, device) else ways[way].forward()

        about[way]["peak_mb"] = peak_mb(whole, device)
        model.zero_grad()
    timing = {"device": device, "rounds": options.rounds, "seconds": options.seconds, "warmup": 1}
    plans: dict[str, Callable[[], Any]] = {
        way: partial(MASKS[way], prepared.layouts[0])
        for way, prepared in ways.items()
        if way != "apart"
    }
    for way, timed in measure(plans, **timing).items():
        about[way]["plan_ms"] = 1e3 * timed.median
    for pass_name in ("forward", "step"):
        able = {
            way: getattr(prepared, pass_name)
            for way, prepared in ways.items()
            if pass_name == "forward" or has_step(way, device)
        }
        times = measure(able, **{**timing, "warmup": 0})
        for way, timed in times.items():
            row = {**case, "pass": pass_name, "way": way, **about[way], **timed.row()}
            row["seconds"] = timed.median
            found.append({**row, "over_ours": timed.over(times["ours"])})
    return found


def pack_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """`pack_tree` alone, over a million tokens."""
    ids = torch.randint(0, VOCABULARY, (1_000_000,))
    families = {
        "500 rows, half of each shared": [
            TokenRow(torch.cat([ids[:1000], ids[start : start + 1000]]))
            for start in range(1000, 501_000, 1000)
        ],
        "1,413 rows, each a prefix of the next": [TokenRow(ids[:n]) for n in range(1, 1414)],
    }
    found = []
    for name, rows in families.items():
        runs = {"ours": partial(pack_tree, rows)}
        timed = measure(runs, device="cpu", rounds=options.rounds, warmup=1)["ours"]
        tree = pack_tree(rows)
        row = {"part": "pack", "layout": name, "way": "ours", "tokens": tree.num_tokens}
        found.append(
            {**row, "source_tokens": tree.source_tokens, "seconds": timed.median, **timed.row()}
        )
    return found


COLUMNS = ["part", "layout", "pass", "way", "tokens", "seconds", "over_ours", "plan_ms", "first_s"]
COLUMNS += ["peak_mb", "mean_log_prob", "skipped"]
QUICK = {"layouts": ["group8_1k", "tau"], "layers": 1, "rounds": 1}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "trees", quick=QUICK, rounds=3)
    add = parser.add_argument
    usual = [name for name in LAYOUTS if name != "small"]
    ways = [way for way in MASKS if way != "ours"]
    add("--layouts", nargs="+", choices=list(LAYOUTS), default=usual, help="what is trained on")
    add("--ways", nargs="*", choices=ways, default=ways, help="what runs beside ours")
    add("--dense-limit", type=int, default=10_000, help="most tokens of a tokens x tokens mask")
    add("--layers", type=int, default=2, help="of the model")
    add("--hidden", type=int, default=256, help="its width, a multiple of 256")
    add("--seconds", type=float, default=300.0, help="bound on one measurement, in seconds")
    return parser


def main() -> None:
    options = cli.parse(make_parser(), QUICK)
    print_row({name: name for name in COLUMNS}, COLUMNS)
    found = pack_rows(options)
    for row in found:
        print_row(row, COLUMNS)
    for name in options.layouts:
        for row in rows_for(name, options):
            found.append(row)
            print_row(row, COLUMNS)
        write_results(options, options.device, rows=found)


if __name__ == "__main__":
    main()
