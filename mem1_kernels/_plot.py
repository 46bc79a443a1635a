"""The picture of a layout's mask, and a word that all pictures use. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mem1_kernels.trajectory import Layout

COLOURS = {"prompt": "#4c566a", "state": "#2a9d8f", "action": "#e9a23b", "info": "#3f72af"}


def plot_mask(layout: Layout, path: str | Path, *, max_pixels: int) -> None:
    """Draws queries downwards and keys to the right, each visible pair in its key's role colour."""
    if layout.num_tokens == 0:
        raise ValueError("layout: expected at least one token, got none")
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install mem1-kernels[plot]") from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    tokens = layout.num_tokens
    sample = torch.linspace(0, tokens - 1, min(tokens, max_pixels)).long()
    query, key = sample[:, None], sample[None, :]
    mask = (key <= query) & (query < layout.expiry.cpu()[sample])
    if layout.floor is not None:
        mask &= layout.floor.cpu()[sample][:, None] <= key

    roles = list(COLOURS)
    palette = torch.tensor([matplotlib.colors.to_rgb(COLOURS[role]) for role in roles])
    role_of = torch.zeros(tokens, dtype=torch.int64)
    for span in layout.spans:
        role_of[span.start : span.stop] = roles.index(span.role)
    picture = torch.ones(len(sample), len(sample), 3)
    colours = palette[role_of[sample]]
    picture = torch.where(mask[..., None], colours[None], picture)

    figure = Figure(figsize=(7, 7))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.14, 0.09, 0.82, 0.82))
    axes.imshow(picture.numpy(), extent=(0, tokens, tokens, 0), interpolation="nearest")
    strip = tokens * 0.018
    for span in layout.spans:
        length, colour = span.stop - span.start, COLOURS[span.role]
        for corner, width, height in (
            ((span.start, -1.3 * strip), length, strip),
            ((-1.3 * strip, span.start), strip, length),
        ):
            axes.add_patch(Rectangle(corner, width, height, color=colour, clip_on=False))
        axes.axhline(span.stop, color="#d8dee9", linewidth=0.4)
        axes.axvline(span.stop, color="#d8dee9", linewidth=0.4)
    axes.set_xlim(0, tokens)
    axes.set_ylim(tokens, 0)
    axes.tick_params(axis="both", pad=12)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    seen = {span.role for span in layout.spans}
    axes.legend(
        handles=[Patch(color=COLOURS[role], label=role) for role in roles if role in seen],
        loc="upper right",
        frameon=False,
    )
    area = layout.visible_pairs / (tokens * (tokens + 1) / 2)
    axes.set_title(
        f"{tokens:,} tokens, {area:.0%} of the causal pairs visible, "
        f"peak context {layout.peak_context:,}",
        pad=22,
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def size_unit(task: str) -> str:
    """What the size of a task counts.

    >>> size_unit("chain"), size_unit("lookup"), size_unit("qa")
    ('hops', 'keys', 'objectives')
    """
    return {"chain": "hops", "lookup": "keys"}.get(task, "objectives")
