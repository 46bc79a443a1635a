"""What the pages show and the code knows: pictures of masks, tables of figures and of options.

    python -m docs.generate            draws the pictures into docs/images
    python -m docs.generate --tables   puts the tables into the pages

The tables stand between marks in the pages; python_tests/test_docs.py holds them to the code and
to the results in bench/results.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.report import ablation, attention, filled, hops, markdown, prune, rollout
from mem1_kernels import (
    Layout,
    Segment,
    TokenRow,
    Trajectory,
    clear_tool_results,
    fold,
    keep_all,
    keep_last,
    mem1_release,
    memento,
    pack,
    pack_tree,
    strip_reasoning,
    sub_agents,
    unroll,
)
from mem1_kernels.ppo.config import Option
from mem1_kernels.ppo.config import options as config_options
from mem1_kernels.trajectory import Span

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
PIXELS, COLOURS = 640, 32


def turn(number: int, depth: int = 0) -> list[Segment]:
    """A turn as in the released question-answering runs, a tenth as long."""
    lengths = {"state": 5, "action": 3, "info": 24}
    return [Segment(role, count, number, depth) for role, count in lengths.items()]


def segments(turns: int) -> list[Segment]:
    """A prompt and some turns; the last one ends with its action."""
    listed = [Segment("prompt", 20)]
    for number in range(1, turns + 1):
        listed += turn(number)
    return listed[:-1]


def forget_observations(segments: Sequence[Segment]) -> list[int]:
    """States and actions stay; an observation goes when the next one comes."""
    infos = [index for index, segment in enumerate(segments) if segment.role == "info"]
    following = dict(zip(infos, infos[1:], strict=False))
    return [following.get(index, len(segments)) for index in range(len(segments))]


def branches() -> list[Segment]:
    """Turns 2 and 3 are written in a branch, which returns with the observation of turn 3."""
    listed = [Segment("prompt", 20), *turn(1), *turn(2, depth=1), *turn(3, depth=1)[:-1]]
    return [*listed, Segment("info", 8, 3), *turn(4)[:-1]]


def rolled_back() -> list[Segment]:
    """The same branch, but it failed: its observation takes back the turn that opened it."""
    listed = [Segment("prompt", 20), *turn(1), *turn(2)[:-1], Segment("info", 24, 2, 1)]
    listed += [*turn(3, depth=1)[:-1], Segment("info", 8, 3, name="rollback")]
    return [*listed, *turn(4)[:-1]]


def blocks() -> list[Segment]:
    """One turn of three blocks of reasoning, each with its summary, and an action."""
    listed = [Segment("prompt", 20)]
    for length in (30, 24, 36):
        listed += [Segment("state", length, 1, name="block")]
        listed += [Segment("state", 7, 1, name="summary")]
    return [*listed, Segment("action", 12, 1)]


def foreign() -> Trajectory:
    """What an engine dropped that keeps 40 keys: the first four, every fourth, and the newest."""
    tokens = 110
    order = [key for key in range(4, tokens) if key % 4]
    dropped = zip(order, range(40, tokens), strict=False)
    evicted_at: list[int | None] = [None] * tokens
    for key, step in dropped:
        evicted_at[key] = max(step, key + 1)
    in_loss = [20 <= token < 60 or token >= 80 for token in range(tokens)]
    return Trajectory.from_evictions(range(tokens), evicted_at, loss_mask=in_loss)


CLEARED = clear_tool_results(90, keep=1, placeholder=(0, 0, 0))
"""Above 90 tokens, all observations but the newest go."""


def member(state: int, info: int) -> Trajectory:
    """One answer of a group: a prompt that all share, and two turns."""
    first = [Segment("state", state, 1), Segment("action", 3, 1), Segment("info", info, 1)]
    return Trajectory([Segment("prompt", 30), *first, *turn(2)[:-1]])


def branching() -> Layout:
    """A run of three turns, a retry of the third, a sub-agent, and what follows a compaction."""
    runs = [
        ["prompt", *turn_pieces(1), *turn_pieces(2), *turn_pieces(3)],
        ["prompt", *turn_pieces(1), *turn_pieces(2), *turn_pieces("3 again")],
        ["prompt", *turn_pieces(1), "info: task", *turn_pieces("sub-agent"), "action: report"],
        ["prompt", "state: summary", *turn_pieces(4)],
    ]
    lengths = {"prompt": 20, "state": 5, "action": 3, "info": 24}
    names = list(dict.fromkeys(piece for run in runs for piece in run))
    pieces = [[(names.index(p), lengths[p.partition(":")[0]]) for p in run] for run in runs]
    rows = [TokenRow([100 * n + i for n, count in run for i in range(count)]) for run in pieces]
    tree = pack_tree(rows)
    assert tree.token_ids is not None
    found = (tree.token_ids // 100).tolist()
    starts = [at for at in range(len(found)) if at == 0 or found[at] != found[at - 1]]
    return tree.replaced(
        spans=tuple(
            Span(names[found[start]].partition(":")[0], 0, start, stop)
            for start, stop in zip(starts, [*starts[1:], len(found)], strict=True)
        )
    )


def turn_pieces(name: int | str) -> list[str]:
    return [f"{role}: turn {name}" for role in ("state", "action", "info")]


PICTURES: dict[str, Callable[[], Layout]] = {
    "mem1": lambda: Trajectory(segments(4)),
    "mem1_release": lambda: Trajectory(segments(4), mem1_release),
    "keep_all": lambda: Trajectory(segments(4), keep_all),
    "keep_last": lambda: Trajectory(segments(4), keep_last(2)),
    "fold": lambda: Trajectory(branches(), fold),
    "strip_reasoning": lambda: Trajectory(segments(4), strip_reasoning()),
    "clear_tool_results": lambda: Trajectory(segments(5), CLEARED),
    "placeholders": lambda: unroll(Trajectory(segments(5), CLEARED)),
    "sub_agents": lambda: Trajectory(rolled_back(), sub_agents),
    "memento": lambda: Trajectory(blocks(), memento),
    "evictions": foreign,
    "own_policy": lambda: Trajectory(segments(4), forget_observations),
    "packed": lambda: pack([Trajectory(segments(2)), Trajectory(segments(3))]),
    "group": lambda: pack([[member(8, 20), member(4, 30), member(12, 16)]]),
    "branching": branching,
    "unrolled": lambda: unroll(Trajectory(segments(4))),
}
"""The masks that the pages show, by the names of their files."""


def held(layout: Layout) -> list[int]:
    """How many tokens the context holds after each token."""
    alive = torch.arange(layout.num_tokens)[:, None] < layout.expiry
    return alive.tril().sum(1).tolist()


def draw_context(path: Path) -> None:
    """The tokens that are held while sixteen turns are written, under two policies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    turns = [Segment("prompt", 300)]
    for number in range(1, 17):
        turns += [Segment("state", 40, number), Segment("action", 16, number)]
        turns += [Segment("info", 500, number)]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    full, pruned = Trajectory(turns, keep_all), Trajectory(turns)
    axes.plot(held(full), color="#3f72af", label=f"full context: {full.peak_context:,} tokens")
    axes.plot(held(pruned), color="#2a9d8f", label=f"mem1: at most {pruned.peak_context:,} tokens")
    axes.set_xlabel("tokens written and read so far")
    axes.set_ylabel("tokens in the context")
    axes.set_xlim(0, full.num_tokens)
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)


def shrink(path: Path) -> None:
    """A picture of few colours needs few bytes."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    image.thumbnail((2 * PIXELS if image.width > image.height else PIXELS, PIXELS))
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def draw() -> None:
    """All pictures."""
    IMAGES.mkdir(exist_ok=True)
    for name, make in PICTURES.items():
        make().plot(IMAGES / f"{name}.png")
        shrink(IMAGES / f"{name}.png")
    draw_context(IMAGES / "context.png")
    shrink(IMAGES / "context.png")


def _default(option: Option) -> str:
    value = option.default
    if option.kind is tuple:
        return " ".join(map(str, value))
    if option.kind is bool:
        return "true" if value else "false"
    return f"{value}" if value != "" else "empty"


def _values(option: Option) -> str:
    if option.choices:
        return ", ".join(f"`{choice}`" for choice in option.choices)
    kinds = {str: "text", bool: "true or false", int: "integer", float: "number", tuple: ""}
    bound = "" if option.bound.text == "any value" else option.bound.text
    return ", ".join(part for part in (kinds[option.kind], bound) if part)


def options() -> str:
    """Every option of a PPO run."""
    rows = [
        [f"`{option.name}`", f"`{_default(option)}`", _values(option), option.help]
        for option in config_options()
    ]
    return markdown(["option", "default", "values", "meaning"], rows)


def examples() -> str:
    """Every file in examples/: what its docstring says, and a box that includes its code."""
    parts = []
    for path in sorted((DOCS.parent / "examples").glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text()))
        if said:
            title = path.stem.replace("_", " ").capitalize()
            box = f'??? example "examples/{path.name}"'
            code = f'    ``` {{ .python }}\n    --8<-- "examples/{path.name}"\n    ```'
            parts.append(f"## {title}\n\n{said.splitlines()[0]}\n\n{box}\n\n{code}")
    return "\n\n".join(parts)


TABLES: dict[str, Sequence[Callable[[], str]]] = {
    "examples.md": (examples,),
    "performance.md": (attention, rollout, prune),
    "ppo.md": (options, hops, ablation),
}
"""What each page holds between marks."""


def tabled(page: str) -> str:
    """The text of a page with its tables as the code and the results have them now."""
    return filled((DOCS / page).read_text(), TABLES[page])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="write the tables, draw nothing")
    if parser.parse_args().tables:
        for page in TABLES:
            (DOCS / page).write_text(tabled(page))
    else:
        draw()


if __name__ == "__main__":
    main()
