"""How every benchmark here measures: interleaved rounds in one run, medians with p20 and p80.

Machines are noisy, so what a result says is the ratio between two things measured in the same
run: each round times every candidate once, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

QUEUED = 2_000_000  # clock cycles, about 1 ms, for the host to launch a candidate's kernels in


@dataclass
class Timing:
    """One candidate's times over the rounds, in seconds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, fraction: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[round(fraction * (len(ordered) - 1))]

    def over(self, other: Timing) -> float:
        """Median of this one's time over the other's, round by round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def row(self) -> dict[str, float]:
        return {
            "median_ms": 1e3 * self.median,
            "p20_ms": 1e3 * self.quantile(0.2),
            "p80_ms": 1e3 * self.quantile(0.8),
            "rounds": len(self.seconds),
        }


def measure(
    candidates: dict[str, Callable[[], Any]],
    *,
    device: str,
    rounds: int = 15,
    warmup: int = 2,
    seconds: float = 20.0,
) -> dict[str, Timing]:
    """Times every candidate once a round, for `rounds` rounds or until `seconds` have passed.

    At least three rounds are run. Before each timing a write of 256 MB clears the caches, so that
    nobody finds in them what the candidate before it has read. On CUDA it times with events, on a
    stream kept busy until the candidate is queued: what the host takes to launch is not in it.
    """
    for run in candidates.values():
        for _ in range(warmup):
            run()
    scratch = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
    timer = _cuda_timer if device == "cuda" else _cpu_timer
    times: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - started > seconds:
            break
        for name, run in candidates.items():
            scratch.zero_()
            times[name].append(timer(run))
    return {name: Timing(values) for name, values in times.items()}


def _cpu_timer(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _cuda_timer(run: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUED)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def print_row(row: dict[str, Any], columns: list[str]) -> None:
    """Prints the named columns of one result on a line."""
    cells = []
    for name in columns:
        value = row.get(name, "")
        cells.append(f"{value:.3g}" if isinstance(value, float) else str(value))
    print("  ".join(cell.ljust(max(9, len(n))) for cell, n in zip(cells, columns, strict=True)))
