"""What travels with each of verl's samples, and a micro-batch of samples as one packed row.

A sample of verl is a prompt and a response, which are the tokens of a layout in its order: a
trajectory ("kept") or an unrolled one ("reprefill"). Which of them each token sees, where it stands
and what predicts it is said by runs of tokens. A run is four integers, and a trajectory has a few
of them per turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from mem1_kernels.trajectory import Layout

Run: TypeAlias = tuple[int, int, int, int]
"""(tokens, expiry, position of the first, predecessor of the first). Within a run the expiry stays,
and position and predecessor go up by one."""


def encode_runs(layout: Layout) -> list[Run]:
    """A layout's expiry, positions and predecessors as runs.

    What predicts a token matters only for tokens in the loss; for others it is the one before.

    Raises:
        ValueError: a layout without tokens, with a floor, or of "compact" positions.

    >>> from mem1_kernels import Segment, Trajectory
    >>> turn = lambda t: [Segment("action", 1, t), Segment("info", 2, t)]
    >>> encode_runs(Trajectory([Segment("prompt", 2), *turn(1), *turn(2), *turn(3)]))
    [(2, 11, 0, -1), (3, 6, 2, 1), (3, 9, 5, 4), (3, 11, 8, 7)]
    """
    if not layout.num_tokens:
        raise ValueError("layout: expected at least one token, got none")
    if layout.floor is not None:
        raise ValueError("layout: expected one without a floor")
    if layout.positions == "compact":
        raise ValueError("layout: expected 'kept' or 'reprefill' positions, got 'compact'")
    expiry, position = layout.expiry.long(), layout.position_ids
    index = torch.arange(layout.num_tokens)
    before = torch.where(layout.loss_mask, layout.predecessor, index - 1)
    goes_on = (expiry[1:] == expiry[:-1]) & (position[1:] == position[:-1] + 1)
    goes_on &= before[1:] == before[:-1] + 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (~goes_on).nonzero().flatten() + 1])
    counts = torch.cat([starts[1:], torch.tensor([layout.num_tokens])]) - starts
    columns = (counts, expiry[starts], position[starts], before[starts])
    return [(a, b, c, d) for a, b, c, d in zip(*(x.tolist() for x in columns), strict=True)]


@dataclass(frozen=True)
class Sample:
    """One sample: its runs as tensors, all int64 `[tokens]`."""

    expiry: Tensor
    position_ids: Tensor
    predecessor: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.expiry)


def decode_runs(runs: Sequence[Run]) -> Sample:
    """The inverse of `encode_runs`.

    >>> decode_runs([(2, 3, 0, -1), (1, 3, 5, 0)]).position_ids.tolist()
    [0, 1, 5]
    """
    count, expiry, position, before = torch.tensor(runs, dtype=torch.int64).reshape(-1, 4).T
    within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
    return Sample(
        expiry.repeat_interleave(count),
        position.repeat_interleave(count) + within,
        before.repeat_interleave(count) + within,
    )


def causal(tokens: int) -> Sample:
    """A sample in which every token sees all before it, as verl's fill-in samples do."""
    index = torch.arange(tokens)
    return Sample(torch.full_like(index, tokens), index, index - 1)


@dataclass(frozen=True)
class PackedSamples:
    """The samples of a micro-batch as one row; all int64.

    Args:
        source: `[packed tokens]`, the place of each in the samples laid behind each other.
        expiry, position_ids: `[packed tokens]`.
        rows: `[tokens of the samples]`: the packed token whose output verl reads there. It reads
            what predicts token j at the place of token j - 1.
        shared: how many tokens of prompts stand once instead of several times.
    """

    source: Tensor
    expiry: Tensor
    position_ids: Tensor
    rows: Tensor
    shared: int

    @property
    def reads_in_order(self) -> bool:
        """Whether `rows` is 0, 1, 2, ..., so that nothing has to be gathered."""
        return torch.equal(self.rows, torch.arange(len(self.source)))


def pack_samples(
    samples: Sequence[Sample], prompts: Sequence[Sequence[int]], *, share: bool = True
) -> PackedSamples:
    """Lays samples behind each other; those with the same prompt form a tree behind one.

    A prompt is shared where nothing of it is dropped and its positions are 0, 1, 2, ...: what its
    tokens compute is then the same for all samples of a group. A sample's last token predicts
    nothing, so its row is its own.

    Args:
        samples: in verl's order.
        prompts: the token ids of their prompts.
        share: False keeps every prompt where it is.

    >>> one = causal(4)
    >>> packed = pack_samples([one, one], [[5, 6], [5, 6]])
    >>> packed.expiry.tolist(), packed.position_ids.tolist()
    ([6, 6, 4, 4, 6, 6], [0, 1, 2, 3, 2, 3])
    >>> packed.rows.tolist(), packed.shared
    ([0, 1, 2, 3, 0, 1, 4, 5], 2)
    """
    begins = [0, *accumulate(sample.num_tokens for sample in samples)]
    groups: dict[object, list[int]] = {}
    for number, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
        key = tuple(prompt) if share and _shares(sample, len(prompt)) else number
        groups.setdefault(key, []).append(number)
    sources, expiries, positions, length = [], [], [], 0
    places = torch.empty(begins[-1], dtype=torch.int64)  # the packed token of each sample's token
    for members in groups.values():
        common = len(prompts[members[0]]) if len(members) > 1 else 0
        begin, stem = length, slice(0, common)
        if common:
            first = samples[members[0]]
            sources.append(begins[members[0]] + torch.arange(common))
            positions.append(first.position_ids[stem])
            whole = common + sum(samples[member].num_tokens - common for member in members)
            expiries.append(torch.full((common,), begin + whole))
            length += common
        for member in members:
            sample, offset = samples[member], begins[member]
            own = sample.num_tokens - common
            sources.append(offset + common + torch.arange(own))
            positions.append(sample.position_ids[common:])
            seen = sample.expiry[common:].clamp(max=sample.num_tokens)
            expiries.append(seen - common + length)
            places[offset : offset + common] = begin + torch.arange(common)
            places[offset + common : offset + sample.num_tokens] = length + torch.arange(own)
            length += own
    return PackedSamples(
        source=torch.cat(sources),
        expiry=torch.cat(expiries),
        position_ids=torch.cat(positions),
        rows=places[_read_at(samples, begins)],
        shared=begins[-1] - length,
    )


def _shares(sample: Sample, prompt: int) -> bool:
    """Whether a sample's prompt may stand behind others' branches too."""
    return (
        0 < prompt < sample.num_tokens
        and bool((sample.expiry[:prompt] >= sample.num_tokens).all())
        and torch.equal(sample.position_ids[:prompt], torch.arange(prompt))
    )


def _read_at(samples: Sequence[Sample], begins: Sequence[int]) -> Tensor:
    """For each token j of the samples, the token whose output predicts token j + 1."""
    rows = []
    for sample, begin in zip(samples, begins, strict=False):
        following = sample.predecessor[1:].clamp(min=0)
        rows.append(begin + torch.cat([following, torch.tensor([sample.num_tokens - 1])]))
    return torch.cat(rows)
