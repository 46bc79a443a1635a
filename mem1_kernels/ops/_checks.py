"""Checks that the ops share: what they take, and what they tell autograd."""

from __future__ import annotations

import torch
from torch import Tensor

# What every kernel computes on.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError for a query that no attention kernel takes."""
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(f"query: expected head_dim 16 to 256 in steps of 8, got {head_dim}")


def check_scale(head_dim: int, scale: float | None, softcap: float | None) -> float:
    """The scale of the scores; default: `head_dim ** -0.5`.

    Both lie between 1e-18 and 1e18: then no scores of inputs in float16's range overflow float32,
    and neither does `scale / softcap`.

    Raises:
        TypeError: scale or softcap is not a number.
        ValueError: one outside these bounds.
    """
    scale = head_dim**-0.5 if scale is None else scale
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
            raise TypeError(f"{name}: expected a number or None, got {type(value).__name__}")
        # As literals: torch.compile would take the bounds for inputs otherwise.
        if not 1e-18 <= value <= 1e18:
            raise ValueError(f"{name}: expected 1e-18 to 1e18 or None, got {value}")
    return float(scale)


def check_window(window: int) -> int:
    """The window, at most 2**62, so that it fits int64 with room for a position.

    Raises:
        TypeError: not an integer.
        ValueError: less than 1.
    """
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"window: expected an int or None, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window: expected at least 1 token or None, got {window}")
    return min(window, 2**62)


def check_plain(name: str, x: Tensor) -> None:
    """Raises ValueError for a tensor whose bytes are not its values."""
    if not torch.compiler.is_compiling() and (x.is_conj() or x.is_neg()):
        raise ValueError(f"{name}: expected a plain tensor, got a lazy conjugate or negative view")


def mark_written(*written: Tensor) -> None:
    """Tells autograd, so that a backward pass through what was overwritten raises."""
    if not torch.compiler.is_compiling():  # compiled code does that by itself
        torch.autograd.graph.increment_version([x for x in written if not x.is_inference()])
