"""Block shapes of the attention kernels, by GPU generation, head_dim, dtype and pass.

Plain data: nothing is imported but types, and nothing is timed at import or at a call. Of each list
the first entry ships; the rest are what a tuning run has to choose from. For the H100 every entry
compiles without a spill and within the shared memory, in bfloat16 and float32, and so do the 16-bit
ones of others for the A100 (8.0) and the RTX 4090 (8.9): python_tests/test_sm90_compile.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """How one pass is cut. All block sizes are in tokens and divide a plan's tile of 128."""

    block_m: int
    """Queries in a block."""
    block_n: int
    """Keys in a block."""
    part: int
    """Tokens of the inner side per step in partial tiles, where masks need registers too."""
    num_warps: int
    """At most block / 16 of the outer side, or the tensor cores compute the same rows twice."""
    num_stages: int
    """Steps that loads run ahead, plus one."""
    pipelined: bool = False
    """Forward only: a block's weights are made while the tensor cores multiply the block before.
    `part` must be `block_n`, since partial and full tiles share the pipeline."""


Passes = dict[str, list[Config]]

# Up to this head_dim: what each pass may use, the shipped one first.
Table = dict[int, Passes]

HOPPER_16_BIT: Table = {
    64: {
        "fwd": [
            Config(128, 64, 64, 8, 4, pipelined=True),
            Config(128, 64, 64, 8, 3, pipelined=True),
            Config(128, 128, 64, 8, 3),
            Config(128, 64, 64, 8, 3),
            Config(64, 64, 64, 4, 3),
        ],
        "dkdv": [Config(128, 128, 64, 8, 2), Config(64, 128, 32, 8, 2)],
        "dq": [Config(128, 128, 64, 8, 2), Config(128, 64, 64, 8, 3)],
    },
    128: {
        "fwd": [
            Config(128, 64, 64, 8, 4, pipelined=True),
            Config(128, 64, 64, 8, 3, pipelined=True),
            Config(128, 64, 64, 8, 2, pipelined=True),
            Config(128, 128, 64, 8, 3),
            Config(128, 128, 64, 8, 2),
            Config(128, 64, 64, 8, 3),
        ],
        "dkdv": [Config(64, 128, 32, 8, 2)],
        "dq": [Config(128, 128, 64, 8, 2), Config(128, 64, 64, 8, 3)],
    },
    192: {
        "fwd": [Config(128, 64, 32, 8, 3), Config(128, 64, 32, 8, 2)],
        "dkdv": [Config(32, 128, 32, 8, 2)],
        "dq": [Config(128, 64, 32, 8, 2)],
    },
    256: {
        "fwd": [Config(128, 64, 32, 8, 2)],
        "dkdv": [Config(32, 128, 32, 8, 2)],
        "dq": [Config(128, 32, 32, 8, 2)],
    },
}

# These fit in the 99 KiB of shared memory per block of the smallest GPUs since Ampere.
OTHERS_16_BIT: Table = {
    128: {
        "fwd": [Config(64, 64, 32, 4, 2)],
        "dkdv": [Config(32, 64, 32, 4, 2)],
        "dq": [Config(64, 32, 32, 4, 2)],
    },
    256: {
        "fwd": [Config(64, 32, 16, 4, 2)],
        "dkdv": [Config(16, 64, 16, 4, 2)],
        "dq": [Config(64, 16, 16, 4, 2)],
    },
}

# Exact products have no tensor core: operands live in registers, so blocks are small. They fit the
# A100 too, where a few spill up to 16 bytes.
FLOAT_32: Table = {
    32: {
        "fwd": [Config(64, 32, 32, 4, 2)],
        "dkdv": [Config(32, 32, 32, 8, 2)],
        "dq": [Config(32, 32, 32, 4, 2)],
    },
    64: {
        "fwd": [Config(64, 32, 32, 8, 2)],
        "dkdv": [Config(32, 32, 32, 8, 2)],
        "dq": [Config(64, 32, 32, 8, 2)],
    },
    128: {
        "fwd": [Config(32, 32, 32, 16, 2)],
        "dkdv": [Config(16, 32, 16, 8, 2)],
        "dq": [Config(32, 16, 16, 16, 2)],
    },
    256: {
        "fwd": [Config(32, 16, 16, 8, 2)],
        "dkdv": [Config(16, 16, 16, 4, 2)],
        "dq": [Config(32, 16, 16, 8, 2)],
    },
}


# For the backward's two kernels that only stream: the preprocess and the sum of pieces.
STREAMING = Config(32, 32, 32, 8, 3)


def candidates(pass_name: str, generation: int, head_dim: int, itemsize: int) -> list[Config]:
    """What a pass may use, the shipped one first.

    Args:
        pass_name: "fwd", or of the backward "preprocess", "dkdv", "sum" or "dq".
        generation: the GPU's compute capability, major number.
        itemsize: bytes of the inputs' dtype, 2 or 4.

    >>> candidates("fwd", 9, 128, 2)[0]
    Config(block_m=128, block_n=64, part=64, num_warps=8, num_stages=4, pipelined=True)
    """
    if pass_name in ("preprocess", "sum"):
        return [STREAMING]
    table = FLOAT_32 if itemsize == 4 else HOPPER_16_BIT if generation == 9 else OTHERS_16_BIT
    return table[min(size for size in table if head_dim <= size)][pass_name]


def select(pass_name: str, generation: int, head_dim: int, itemsize: int) -> Config:
    """The shipped configuration of a pass."""
    return candidates(pass_name, generation, head_dim, itemsize)[0]


def head_chunks(head_dim: int, widest: int = 256) -> tuple[int, int]:
    """head_dim as one or two powers of two from 16 to `widest`; of these the last may be padded.

    >>> [head_chunks(d) for d in (16, 24, 80, 96, 104, 192)]
    [(16, 0), (32, 0), (64, 16), (64, 32), (128, 0), (128, 64)]
    >>> head_chunks(256, widest=128)
    (128, 128)
    """
    first = min(widest, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    second = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    return (2 * first, 0) if second == first < widest else (first, second)


def dkdv_chunks(head_dim: int) -> tuple[tuple[int, int], list[int | None]]:
    """Chunks for dK/dV, and which of them each launch accumulates (None: all of them).

    Above 128, dK and dV of one block do not fit into registers together, so that there is a launch
    for each chunk, and each computes the scores again.
    """
    chunks = head_chunks(head_dim, widest=128)
    return chunks, [None] if head_dim <= 128 else [0, 1]
