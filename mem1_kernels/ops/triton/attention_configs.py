"""Block shapes of the attention kernels, by GPU generation, head_dim and dtype.

Plain data: nothing is imported, nothing is tuned at import or at a call.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """How one pass is cut: block sizes in tokens, all dividing 128, warps, and pipeline stages."""

    block_m: int
    """Queries in a block."""
    block_n: int
    """Keys in a block."""
    part: int
    """Tokens a step takes on the inner side in a partial tile, where masks need registers too."""
    num_warps: int
    num_stages: int


HEAD_DIMS = (64, 128, 256)


def head_chunks(head_dim: int) -> tuple[int, int]:
    """head_dim as one or two powers of two >= 16, the second 0 if one does; the sum may exceed it.

    >>> [head_chunks(d) for d in (16, 24, 80, 96, 104, 192)]
    [(16, 0), (32, 0), (64, 16), (64, 32), (128, 0), (128, 64)]
    """
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    second = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    return (2 * first, 0) if second == first else (first, second)


_TABLE = {
    (9, 2, "fwd"): {128: Config(128, 128, 64, 8, 3)},
    (9, 2, "dkdv"): {128: Config(64, 128, 32, 8, 2)},
    (9, 2, "dq"): {128: Config(128, 128, 64, 8, 2)},
}


def select(pass_name: str, major: int, head_dim: int, itemsize: int) -> Config:
    return Config(64, 64, 32, 4, 2)
