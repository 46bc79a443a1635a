"""What every engine is asked and what it answers: `Generation` in, `Rollout` out.

An engine runs a batch of prompts through turns. `HFEngine` does it in this process, `ServerEngine`
over HTTP; your own engine brings a `Backend` to `run_turns` (see `mem1_kernels.rollout.loop`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from mem1_kernels.retention import GENERATED, Retention, Segment, mem1
from mem1_kernels.trajectory import Layout, Positions, Trajectory, compacted
from mem1_kernels.tree import unroll


@dataclass
class Turn:
    """What one row wrote in one turn.

    Args:
        row: the index of its prompt.
        number: counted from 1.
        token_ids: what was sampled, the stop included.
        closed: True if a stop ended the turn, False if the token limit cut it.
        depth: how deep in branches it was written (0: in none).
    """

    row: int
    number: int
    token_ids: list[int]
    closed: bool
    depth: int = 0


@dataclass
class Rollout:
    """One finished trajectory.

    Args:
        trajectory: all its tokens, under the policy that pruned it.
        log_probs: float32 `[tokens]`, of each generated token when it was sampled (at the rollout's
            temperature); 0 elsewhere.
        positions: the form that the rollout computed.
        peak_context: the most tokens that its context held at once, the prompt included.
        turns: what was generated, turn by turn.
        error: why the engine ended the row before its time, or "".
    """

    trajectory: Trajectory
    log_probs: Tensor
    positions: Positions
    peak_context: int
    turns: list[Turn]
    error: str = ""

    def __repr__(self) -> str:
        return (
            f"Rollout({len(self.turns)} turns, {self.trajectory.num_tokens} tokens, at most "
            f"{self.peak_context} held, positions={self.positions!r})"
        )

    @property
    def layout(self) -> Layout:
        """The layout whose forward pass computes what this rollout computed."""
        if self.positions == "reprefill":
            return unroll(self.trajectory)
        return self.trajectory if self.positions == "kept" else compacted(self.trajectory)

    @property
    def sampled(self) -> Tensor:
        """bool `[tokens]`: the tokens that the policy sampled, in the loss or not."""
        segments = self.trajectory.segments
        counts = torch.tensor([segment.num_tokens for segment in segments])
        return torch.tensor([s.role in GENERATED for s in segments]).repeat_interleave(counts)

    def relabelled(self, label: Callable[[Sequence[Segment]], Sequence[Segment]]) -> Rollout:
        """This rollout with other tokens in the loss, or with other weights.

        For what shows only afterwards: an attempt that was rejected, a summary that counts double.

        Args:
            label: the segments -> the same, each with its `trainable` and `weight`.

        Raises:
            TypeError: what `label` returns is no sequence of segments.
            ValueError: they differ in more than `trainable` and `weight`.

        >>> trajectory = Trajectory([Segment("prompt", [1]), Segment("state", [2], 1),
        ...                          Segment("action", [3], 1)])
        >>> rollout = Rollout(trajectory, torch.zeros(3), "kept", 3, [])
        >>> def actions(segments):
        ...     return [replace(s, trainable=s.role == "action") for s in segments]
        >>> rollout.relabelled(actions).trajectory.loss_mask.tolist()
        [False, False, True]
        """
        segments = self.trajectory.segments
        labelled = list(label(segments))
        for segment in labelled:
            if not isinstance(segment, Segment):
                raise TypeError(f"label: expected Segments, got {type(segment).__name__}")
        same = [
            replace(new, trainable=old.trainable, weight=old.weight) == old
            for new, old in zip(labelled, segments, strict=False)
        ]
        if len(labelled) != len(segments) or not all(same):
            raise ValueError(
                f"label: expected the same {len(segments)} segments with other `trainable` and "
                f"`weight`, got {len(labelled)}, of which {sum(same)} are the same"
            )
        return replace(self, trajectory=Trajectory(labelled, self.trajectory.retention))


Respond: TypeAlias = Callable[[Sequence[Turn]], Sequence["Sequence[int] | None"]]
"""The environment's side: for each turn just written, the observation's token ids (an empty list
is an empty observation), or None where the episode is over."""

OnTokens: TypeAlias = Callable[[int, Sequence[int]], None]
"""(row, ids just sampled in it), called while a turn is written, perhaps from another thread."""


@dataclass(frozen=True)
class Generation:
    """What to sample, and until when. Every engine takes this one object.

    Args:
        retention: which segment drops which. What it says of the past must not change as segments
            are added, and it must drop between turns, or inside one at a mark; both are checked.
        max_turns: number of turns after which a row ends.
        max_new_tokens: number of tokens after which a turn is cut (its `closed` is False then).
        stop_ids: token ids that end a turn; they belong to it.
        stop_strings: texts that end a turn; the engine needs a tokenizer for them.
        state_tokens: ids of a turn -> how many of them are its state, the rest being its action.
            Default: none. It matters only to policies that treat the two differently.
        depth: for `fold`: how deep in branches the observation behind a turn, and the next turn,
            are written. For a turn that opens a branch, return `turn.depth + 1`; for one that
            returns from it, `turn.depth - 1`: its observation is what the branch reports.
            Default: all at depth 0.
        mark: what was written since the last mark of a turn -> the name of the segment that ends
            with it, or None: it goes on. Asked after every token. A segment that ends at a mark is
            a state of that name, and the policy may drop at a mark, inside the turn. What is behind
            the last mark is state and action as `state_tokens` says. Default: no marks.
        info_name: the name (`Segment.name`) of the observation behind a turn, such as that of its
            tool. Asked before `depth`. Default: "".
        temperature: of sampling. 0 is greedy; log-probs are then those at temperature 1.
        seed: of sampling. None: torch's default generator, or the server's own choice (always, for
            a `ServerEngine` that is not `seeded`).

    Raises:
        TypeError: stops that are not integers or strings; a retention, `state_tokens`, `depth`,
            `mark` or `info_name` that is not a function; a number of another type.
        ValueError: an argument out of its range.

    >>> Generation(max_turns=4, stop_ids=[3]).stop_ids
    (3,)
    """

    retention: Retention = mem1
    max_turns: int = 20
    max_new_tokens: int = 256
    stop_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    state_tokens: Callable[[list[int]], int] | None = None
    depth: Callable[[Turn], int] | None = None
    mark: Callable[[list[int]], str | None] | None = None
    info_name: Callable[[Turn], str] | None = None
    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.retention):
            raise TypeError(f"retention: expected a function such as mem1, got {self.retention!r}")
        for name in ("state_tokens", "depth", "mark", "info_name"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a function or None, got {function!r}")
        if self.seed is not None:
            check_count("seed", self.seed, -(2**63))
            if self.seed >= 2**64:
                raise ValueError(f"seed: expected less than 2^64, got {self.seed}")
        check_count("max_turns", self.max_turns)
        check_count("max_new_tokens", self.max_new_tokens)
        check_temperature(self.temperature)
        if isinstance(self.stop_strings, str) or not isinstance(self.stop_strings, Sequence | Set):
            one = isinstance(self.stop_strings, str)
            got = "one string" if one else type(self.stop_strings).__name__
            raise TypeError(f"stop_strings: expected a sequence of strings, got {got}")
        for stop in self.stop_strings:
            if not isinstance(stop, str) or not stop:
                raise ValueError(f"stop_strings: expected strings that are not empty, got {stop!r}")
        object.__setattr__(self, "stop_ids", tuple(read_ids("stop_ids", self.stop_ids)))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))


class Engine(Protocol):
    """Runs a batch of prompts through turns.

    Attributes:
        tokenizer: a Hugging Face tokenizer, or None for models that know token ids only.
        eos_ids: ids with which the model ends a text.
        vocabulary: ids from 0 to this number, exclusive, are known to the model; None: unknown.
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]

    @property
    def vocabulary(self) -> int | None: ...

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation,
        on_tokens: OnTokens | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in order; `respond` is called after every turn."""


class EngineError(RuntimeError):
    """An engine could not generate: no server there, a refusal, or a reply without token ids."""


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises TypeError or ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_temperature(temperature: float) -> None:
    """Raises TypeError or ValueError unless one can sample at it."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: expected a number, got {temperature!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")


def read_ids(name: str, values: Any) -> list[int]:
    """A sequence, tensor or array of integers as a list.

    Raises:
        TypeError: anything else.
    """
    listed = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(listed, str) or not isinstance(listed, (Sequence, Set)):
        raise TypeError(f"{name}: expected token ids, got {type(values).__name__}")
    try:
        return [operator.index(value) for value in listed]
    except TypeError:
        raise TypeError(f"{name}: expected integer token ids, got {values!r}") from None


def eos_ids(*values: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids in `values`, each once, in order.

    >>> eos_ids(2, [2, 7], None)
    (2, 7)
    """
    flat = [i for v in values if v is not None for i in ([v] if isinstance(v, int) else v)]
    return tuple(dict.fromkeys(flat))
