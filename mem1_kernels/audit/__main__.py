"""Does a trainer's forward pass see what the rollout saw?

    python -m mem1_kernels.audit MODEL BATCH

BATCH is a file of rollouts: JSON lines of token_ids, loss_mask, log_probs and evicted_at (.jsonl),
or what slime (.pt), TRL (.parquet) and verl (.jsonl) dump. docs/audit.md says what each number
means.

Exit code: 0 the trainer sees what the rollout saw, 1 it does not, 2 the input is wrong, 3 the batch
holds no log-probs to tell by.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mem1_kernels._text import printable
from mem1_kernels.audit import Batch, Findings, Gap, audit, read_batch
from mem1_kernels.ppo.config import loading

PROGRAM = "python -m mem1_kernels.audit"


def faults(found: Findings, trainer: str, allowed: float) -> list[str]:
    """Why the trainer sees something else; empty if it does not."""
    said = []
    if trainer == "causal" and found.leaking_tokens:
        said.append("tokens in the loss see tokens that were gone")
    if trainer == "causal" and found.moved_tokens:
        said.append("tokens stand at other positions")
    gap = found.causal if trainer == "causal" else found.exact
    if gap is not None and not gap.outside <= allowed:
        said.append(f"more than {allowed:.2%} of the ratios are outside the clip range")
    return said


def code_of(found: Findings, trainer: str, allowed: float) -> int:
    """The exit code."""
    if faults(found, trainer, allowed):
        return 1
    return 3 if found.causal is None else 0


def text(found: Findings, batch: Batch, options: argparse.Namespace) -> str:
    """The findings in words."""
    share = found.loss_tokens or 1

    def of(gap: Gap) -> str:
        return (
            f"mean {gap.mean:.1e}, largest {gap.largest:.1e}; {gap.outside:.1%} of "
            f"{gap.tokens:,} ratios outside {1 - options.clip:g} to {1 + options.clip:g}"
        )

    lines = [
        ("batch", f"{batch.source}: {found.rows:,} rows, {found.tokens:,} tokens, "
                  f"{found.loss_tokens:,} in the loss"),
        ("leaks", f"{found.leaking_tokens:,} tokens in the loss "
                  f"({found.leaking_tokens / share:.1%}) see tokens that were gone, in "
                  f"{found.leaked_pairs:,} pairs" if found.leaking_tokens else "none"),
        ("positions", f"{found.moved_tokens:,} tokens stood elsewhere in the rollout"
                      if found.moved_tokens else "0, 1, 2, ... in every row"),
    ]  # fmt: skip
    if found.causal is None or found.exact is None:
        lines.append(("log-probs", "none recorded, so not compared"))
    else:
        lines.append(("log-probs", f"plain causal pass: {of(found.causal)}"))
        if found.exact is not found.causal:
            lines.append(("", f"pass as sampled: {of(found.exact)}"))
    if found.drifted_rows is None:
        why = "the model has no tokenizer" if batch.has_ids else "the file holds text, not ids"
        lines.append(("text", f"drift not measured: {why}"))
    else:
        where = f", first at {found.drift}" if found.drift else ""
        lines.append(("text", f"{found.drifted_rows:,} rows change when tokenized again{where}"))
    saved = found.tokens - found.tree_tokens
    lines.append(("prefixes", f"{saved:,} tokens ({saved / found.tokens:.1%}) repeat a prefix"))
    if found.flops is None or found.tree_flops is None:
        lines.append(("", "FLOP not counted: the model has experts"))
    else:
        less = 1 - found.tree_flops / found.flops
        lines.append(
            ("", f"as a tree: {found.tree_flops:.2e} instead of {found.flops:.2e} FLOP, "
                 f"{less:.1%} less")
        )  # fmt: skip
    said = faults(found, options.trainer, options.allowed)
    verdict = {
        0: f"pass: the trainer ({options.trainer}) sees what the rollout saw",
        1: "fail: " + "\n      ".join(said),
        3: "cannot tell: no log-probs were recorded",
    }[code_of(found, options.trainer, options.allowed)]
    return "\n".join([*(f"{name:11}{said}" for name, said in lines), verdict])


def _share(said: str) -> float:
    value = float(said)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {said}")
    return value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(flag: str, text: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if "default" in options else ""
        parser.add_argument(flag, help=text + shown, **options)

    add("model", "a Hugging Face id or a path: the policy that sampled the batch")
    add("batch", "file of rollouts")
    add(
        "--trainer",
        "what the verdict is of: a plain causal pass over each row, or one that honours the "
        "evictions and positions of the batch",
        choices=("causal", "exact"),
        default="causal",
    )
    add("--clip", "ratios outside 1 - CLIP to 1 + CLIP count", type=float, default=0.2)
    add("--allowed", "share of the ratios that may be outside", type=_share, default=0.01)
    add("--temperature", "of the recorded log-probs", type=float, default=1.0)
    add("--dtype", "of the model", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--device", "where to compute", default="cpu")
    add("--tokens", "of one forward pass, at most", type=int, default=16384)
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    return parser.parse_args(arguments)


def _tokenizer(name: str) -> Any:
    """The model's tokenizer; None if it has none."""
    from transformers import AutoConfig, AutoTokenizer

    with loading("model", name):
        AutoConfig.from_pretrained(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None
    # transformers makes an empty one where there are no files.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def _model(options: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with loading("model", options.model):
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        )
    try:
        return model.to(options.device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {str(error).splitlines()[0]}") from None


def _finite(value: Any) -> Any:
    """As JSON can hold it: null for a number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was found; returns the exit code."""
    options = _parse(arguments)
    try:
        tokenizer = _tokenizer(options.model)
        batch = read_batch(options.batch, tokenizer)
        found = audit(
            _model(options),
            batch,
            tokenizer=tokenizer,
            clip=options.clip,
            temperature=options.temperature,
            tokens=options.tokens,
        )
    except (ImportError, OSError, ValueError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            said = f"{error.filename}: {error.strerror}"
        print(printable(f"{PROGRAM}: error: {' '.join(said.split())}"), file=sys.stderr)
        return 2
    if options.json:
        why = faults(found, options.trainer, options.allowed)
        code = code_of(found, options.trainer, options.allowed)
        verdict = {0: "pass", 1: "fail", 3: "cannot tell"}[code]
        extra = {"source": batch.source, "trainer": options.trainer, "verdict": verdict}
        print(json.dumps(_finite({**extra, "faults": why, **asdict(found)}), allow_nan=False))
        return code
    print(printable(text(found, batch, options)))
    return code_of(found, options.trainer, options.allowed)


if __name__ == "__main__":
    sys.exit(main())
