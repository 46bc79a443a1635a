"""What another engine dropped, token by token, as segments and the policy that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mem1_kernels.retention import Retention, Segment

NEVER = torch.iinfo(torch.int64).max
"""When a token leaves that never does."""


@dataclass(frozen=True, repr=False)
class _Recorded:
    """The policy of one trajectory: what was dropped when, by segment."""

    expires: tuple[int, ...]
    __name__: str = field(default="evictions", init=False, compare=False)

    def __repr__(self) -> str:
        return f"evictions of {len(self.expires)} segments"

    def __call__(self, segments: Sequence[Segment]) -> tuple[int, ...]:
        if len(segments) != len(self.expires):
            raise ValueError(
                f"retention: recorded for {len(self.expires)} segments, got {len(segments)}; a "
                "record of evictions says nothing of other trajectories"
            )
        return self.expires


def recorded(
    token_ids: Any,
    evicted_at: Any = None,
    *,
    live: Sequence[tuple[int, Any]] | None = None,
    loss_mask: Any = None,
    weights: Any = None,
) -> tuple[list[Segment], Retention]:
    """The segments and the policy of `Trajectory.from_evictions`, which says what the arguments
    are and what is raised."""
    ids = _integers("token_ids", token_ids)
    if not len(ids):
        raise ValueError("token_ids: expected at least one, got none")
    if (evicted_at is None) == (live is None):
        raise ValueError("evicted_at, live: expected one of them, got both or none")
    if live is None:
        expiry = _evicted_at(evicted_at, len(ids))
    else:
        expiry = _last_seen(live, len(ids))
    in_loss = _per_token("loss_mask", loss_mask, False, len(ids))
    if in_loss.dtype != torch.bool and not bool(((in_loss == 0) | (in_loss == 1)).all()):
        raise TypeError(f"loss_mask: expected bool, got {in_loss.dtype}")
    in_loss = in_loss.bool()
    weight = _per_token("weights", weights, 1.0, len(ids)).double()

    # A segment ends where something leaves, and where what is said of its tokens changes.
    expiry = expiry.clamp(max=len(ids))
    cut = torch.zeros(len(ids) + 1, dtype=torch.bool)
    cut[0] = True
    cut[expiry] = True
    for values in (expiry, in_loss, weight):
        cut[1:-1] |= values[1:] != values[:-1]
    starts = cut[:-1].nonzero().flatten()
    expires = torch.searchsorted(starts, expiry[starts]).tolist()
    segments: list[Segment] = []
    turn = 0
    for start, part in zip(starts.tolist(), ids.tensor_split(starts[1:].tolist()), strict=True):
        generated = bool(in_loss[start])
        role = "action" if generated else "info" if turn else "prompt"
        if generated and (not segments or segments[-1].role != "action"):
            turn += 1
        segments.append(Segment(role, part, turn, weight=float(weight[start])))
    return segments, _Recorded(tuple(expires))


def _evicted_at(values: Any, tokens: int) -> Tensor:
    if not isinstance(values, Tensor):
        values = [NEVER if value is None else value for value in values]
    expiry = _integers("evicted_at", values)
    if len(expiry) != tokens:
        raise ValueError(f"evicted_at: expected {tokens} values like token_ids, got {len(expiry)}")
    early = expiry <= torch.arange(tokens)
    if bool(early.any()):
        token = int(early.nonzero()[0])
        raise ValueError(
            f"evicted_at: token {token} leaves at {int(expiry[token])}, before it is written; "
            f"expected more than {token}, or None: never"
        )
    return expiry


def _last_seen(live: Sequence[tuple[int, Any]], tokens: int) -> Tensor:
    """For each token the step of the first snapshot, after it was written, that lacks it."""
    expiry = torch.full((tokens,), NEVER)
    held = torch.zeros(tokens, dtype=torch.bool)
    before, alive = 0, torch.arange(0)
    for number, (step, kept) in enumerate(live):
        if type(step) is not int or not before <= step <= tokens:
            raise ValueError(
                f"live: expected steps that rise from 0 to at most {tokens}, got {step!r} after "
                f"{before}"
            )
        index = _integers(f"live, step {step}", kept)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < step:
            raise ValueError(
                f"live: expected tokens from 0 to {step - 1} in the cache at step {step}, got "
                f"{int(index.min())} to {int(index.max())}"
            )
        back = index[expiry[index] < NEVER]
        if len(back):
            token = int(back.min())
            raise ValueError(
                f"live: token {token} comes back at step {step} (snapshot {number}); it was gone "
                f"at step {int(expiry[token])}, and a key that left does not return"
            )
        candidates = torch.cat([alive, torch.arange(before, step)])
        held[index] = True
        expiry[candidates[~held[candidates]]] = step
        held[index] = False
        before, alive = step, index
    return expiry


def _integers(name: str, values: Any) -> Tensor:
    try:
        vector = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name}: expected integers ({error})") from None
    wrong = vector.is_floating_point() or vector.is_complex() or vector.dtype == torch.bool
    if wrong and vector.numel():
        raise TypeError(f"{name}: expected integers, got {vector.dtype}")
    if vector.dim() != 1:
        raise ValueError(f"{name}: expected [tokens], got {list(vector.shape)}")
    return vector.long()


def _per_token(name: str, values: Any, default: Any, tokens: int) -> Tensor:
    if values is None:
        return torch.full((tokens,), default)
    try:
        vector = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers ({error})") from None
    if vector.shape != (tokens,):
        raise ValueError(f"{name}: expected [{tokens}] like token_ids, got {list(vector.shape)}")
    return vector
