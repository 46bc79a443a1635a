"""What each token of an agent's trajectory sees, where it stands, and what predicts it.

A retention policy (`mem1_kernels.retention`) gives each token an expiry, which is the whole mask
(see `mem1_kernels.mask`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from mem1_kernels.evictions import recorded
from mem1_kernels.mask import visible_pairs
from mem1_kernels.retention import ROLES, Retention, Segment, listed, mem1, retained

Positions: TypeAlias = Literal["kept", "compact", "reprefill"]
"""Which positions a rollout and the layout that trains it use: "kept" positions go on counting over
dropped tokens, as in a cache that is pruned; with "compact" ones that cache also moves what is left
to positions 0, 1, 2, ...; "reprefill" positions are those of an engine that sends the live text
again."""


def check_positions(value: object, name: str = "positions") -> Positions:
    """`value`, if it is one of the forms of `Positions`.

    Raises:
        ValueError: anything else.

    >>> check_positions("kept")
    'kept'
    """
    for form in get_args(Positions):
        if isinstance(value, str) and value == form:
            return form
    *others, final = map(repr, get_args(Positions))
    expected = f"{', '.join(others)} or {final}"
    raise ValueError(f"{name}: expected {expected}, got {value!r}")


class Span(NamedTuple):
    """Where a segment lies in a layout: tokens `start` to `stop` (exclusive)."""

    role: str
    turn: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Layout:
    """Tokens in packed order, with all that a forward pass and a loss need to know of them.

    Made by `Trajectory`, `pack` and `unroll`. All tensors are `[tokens]`:

        expiry          int32  first index whose query no longer sees this token
        floor           int32  first token that this query sees; None: 0 for every query
        position_ids    int64  RoPE positions
        loss_mask       bool   tokens in the loss: those that the model generated, unless their
                               segment's `trainable` says otherwise
        predecessor     int64  the token whose logits predict this one (-1: none)
        document        int64  which of the `num_documents` packed trajectories it belongs to
        source          int64  its index in the concatenated trajectories:
                               `torch.cat(per_trajectory_values)[source]` has this layout's order
        token_ids       int64  None: the segments were given as counts
        weights         float32  of each token in the loss; None: 1 for all
        prompt_stop     int64  "compact" only: where the prompt that this token sees ends
        kept_position_ids      int64  "compact" only: the positions at which a query meets all keys
                               but its prompt's; it meets these at position_ids

    `spans` says where each segment lies. `source_tokens` is the number of tokens of all
    trajectories together; it differs from `num_tokens` where a layout repeats tokens or shares a
    prompt. `positions` says which form the position_ids have. Training is exact only in the form
    that the rollout used.

    A layout does not change after it is made; `replaced` makes another one.

    Raises:
        TypeError: a field of another type.
        ValueError: a field of another shape, or `positions` of no known form.
    """

    expiry: Tensor
    floor: Tensor | None
    position_ids: Tensor
    loss_mask: Tensor
    predecessor: Tensor
    document: Tensor
    num_documents: int
    source: Tensor
    source_tokens: int
    token_ids: Tensor | None
    spans: tuple[Span, ...]
    positions: Positions
    weights: Tensor | None = None
    prompt_stop: Tensor | None = None
    kept_position_ids: Tensor | None = None

    def __post_init__(self) -> None:
        check_positions(self.positions)
        for name in _OF_COMPACT:
            if (getattr(self, name) is None) == (self.positions == "compact"):
                want = "a tensor" if self.positions == "compact" else "None"
                raise ValueError(f"{name}: expected {want} for {self.positions!r} positions")
        for name in _PER_TOKEN:
            value = getattr(self, name)
            if value is None and name in ("floor", "token_ids", "weights", *_OF_COMPACT):
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
            if value.shape != (self.num_tokens,):
                expected, got = [self.num_tokens], list(value.shape)
                raise ValueError(f"{name}: expected {expected} like expiry, got {got}")
        # The mark makes a BlockPlan of this expiry without the floor raise. It is put on a view of
        # our own, so that the caller's tensor stays as it is.
        expiry: Any = self.expiry.detach()
        expiry.needs_floor = self.floor is not None
        object.__setattr__(self, "expiry", expiry)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_tokens} tokens, {self.num_documents} document(s), "
            f"{int(self.loss_mask.sum())} in the loss, positions={self.positions!r})"
            if self.num_tokens
            else f"{type(self).__name__}(0 tokens)"
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self.expiry.numel()

    @cached_property
    def peak_context(self) -> int:
        """The most tokens that are alive at once: the slots that a pruned cache row needs."""
        count = self.num_tokens
        begin = torch.arange(count, device=self.expiry.device)
        end = self.expiry.long().clamp(max=count)
        change = torch.zeros(count + 1, dtype=torch.int64, device=self.expiry.device)
        lives = end > begin
        change.index_add_(0, begin[lives], torch.ones_like(begin[lives]))
        change.index_add_(0, end[lives], -torch.ones_like(end[lives]))
        return int(change.cumsum(0).max()) if count else 0

    @cached_property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs are visible: the exact work of attention over this layout."""
        return visible_pairs(self.expiry, self.floor)

    @cached_property
    def turn(self) -> Tensor:
        """int64 `[tokens]`: the turn of each token's segment.

        Raises:
            ValueError: the layout knows no segments, as one from `pack_tree`.
        """
        return self._per_span([span.turn for span in self.spans])

    @cached_property
    def role(self) -> Tensor:
        """int64 `[tokens]`: the role of each token's segment, as an index into `ROLES`.

        Raises:
            ValueError: the layout knows no segments, as one from `pack_tree`.

        >>> Trajectory([Segment("prompt", 2), Segment("action", 1, 1)]).role.tolist()
        [0, 0, 2]
        """
        return self._per_span([ROLES.index(span.role) for span in self.spans])

    def _per_span(self, values: Sequence[int]) -> Tensor:
        counts = torch.tensor([span.stop - span.start for span in self.spans], dtype=torch.int64)
        if int(counts.sum()) != self.num_tokens:
            raise ValueError("layout: knows no segments, so its tokens have no turns and no roles")
        starts = torch.tensor([span.start for span in self.spans], dtype=torch.int64)
        order = starts.argsort(stable=True)
        per_token = torch.tensor(values, dtype=torch.int64)[order].repeat_interleave(counts[order])
        return per_token.to(self.expiry.device)

    @cached_property
    def positions_are_consecutive(self) -> bool:
        """Whether `position_ids` are 0, 1, 2, ..., as a model takes them by default."""
        index = torch.arange(self.num_tokens, device=self.position_ids.device)
        return torch.equal(self.position_ids, index)

    def shift_labels(self, ignore_index: int = -100) -> Tensor:
        """The id that each token has to predict: transformers' `shift_labels=`.

        A causal LM moves its `labels=` by one. That is wrong where a token is not predicted by the
        one before it. Pass these labels twice: `labels=shifted, shift_labels=shifted`.

        Args:
            ignore_index: the label of a token that predicts nothing in the loss.

        Returns:
            int64 `[tokens]`: the id of the generated token that each token predicts.

        Raises:
            ValueError: the layout has no token ids; nothing predicts a generated token; or, in a
                tree, one token predicts several (the last token of a prompt with branches). Gather
                the logits by `predecessor` then, or take `mem1_kernels.rollout.score`.

        >>> Trajectory([Segment("prompt", [5, 6]), Segment("action", [7, 8], 1)]).shift_labels()
        tensor([-100,    7,    8, -100])
        """
        if self.token_ids is None:
            raise ValueError("layout: has no token ids; its segments were given as counts")
        generated = self.loss_mask.nonzero().flatten()
        before = self.predecessor[generated]
        if bool((before < 0).any()):
            token = int(generated[before < 0][0])
            raise ValueError(f"layout: token {token} is generated, but nothing predicts it")
        if len(before.unique()) < len(before):
            token = int(before[before.bincount()[before] > 1][0])
            raise ValueError(
                f"layout: token {token} predicts the first token of several branches, but "
                "shift_labels hold one label per token; gather the logits by layout.predecessor"
            )
        return torch.full_like(self.predecessor, ignore_index).index_put(
            (before,), self.token_ids[generated]
        )

    def shift_weights(self) -> Tensor:
        """The weight of what each token predicts, as `shift_labels` has its id.

        Returns:
            float32 `[tokens]`: 0 where a token predicts nothing in the loss.

        Raises:
            ValueError: as for `shift_labels`.

        >>> trained = Segment("action", [7, 8], 1, weight=0.5)
        >>> Trajectory([Segment("prompt", [5, 6]), trained]).shift_weights()
        tensor([0.0000, 0.5000, 0.5000, 0.0000])
        """
        self.shift_labels()  # raises where one value per token does not do
        weights = self.loss_mask.float() if self.weights is None else self.weights
        generated = self.loss_mask.nonzero().flatten()
        before = self.predecessor[generated]
        return torch.zeros_like(weights).index_put((before,), weights[generated])

    def replaced(self, **changes: Any) -> Layout:
        """This layout with some fields replaced, as a plain Layout.

        Raises:
            TypeError: a name that is not a field, or a value of another type.
            ValueError: a value that does not fit.

        >>> trajectory = Trajectory([Segment("prompt", 2), Segment("action", 1, 1)])
        >>> trajectory.replaced(position_ids=trajectory.position_ids + 5).position_ids.tolist()
        [5, 6, 7]
        """
        values = {field.name: getattr(self, field.name) for field in fields(Layout)}
        if unknown := sorted(changes.keys() - values.keys()):
            raise TypeError(f"replaced: expected fields of a Layout, got {unknown}")
        return Layout(**{**values, **changes})

    def to(self, device: torch.device | str) -> Layout:
        """This layout with its tensors on `device`."""
        tensors = {name: getattr(self, name) for name in _PER_TOKEN}
        moved = self.replaced(
            **{name: None if x is None else x.to(device) for name, x in tensors.items()}
        )
        # Known here, it need not be read back from the device there.
        moved.__dict__["positions_are_consecutive"] = self.positions_are_consecutive
        return moved

    def plot(self, path: str | Path, *, max_pixels: int = 1200) -> None:
        """Draws the mask, with its segments along both axes, into the image file `path`.

        A layout of more than `max_pixels` tokens is sampled evenly.

        Raises:
            ImportError: matplotlib is not installed (`pip install mem1-kernels[plot]`).
            ValueError: the layout is empty.
        """
        from mem1_kernels._plot import plot_mask

        plot_mask(self, path, max_pixels=max_pixels)


_PER_TOKEN = (
    "expiry",
    "floor",
    "position_ids",
    "loss_mask",
    "predecessor",
    "document",
    "source",
    "token_ids",
    "weights",
    "prompt_stop",
    "kept_position_ids",
)
"""The fields of a Layout that are tensors."""

_OF_COMPACT = ("prompt_stop", "kept_position_ids")
"""The fields that a Layout of "compact" positions has, and no other."""


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Trajectory(Layout):
    """One agent's trajectory under a retention policy. Its positions are the "kept" ones.

    Args:
        segments: what was written, in order; turns never decrease.
        retention: which segment drops which (default: `mem1`).

    Raises:
        TypeError: something that is not a Segment, or a policy that is no function.
        ValueError: no segments, decreasing turns, some segments with ids and some without, or a
            policy whose result does not fit (see `retained`).

    >>> trajectory = Trajectory([
    ...     Segment("prompt", 2), Segment("state", 1, 1), Segment("action", 1, 1),
    ...     Segment("info", 2, 1), Segment("state", 1, 2), Segment("action", 1, 2),
    ...     Segment("info", 1, 2)])
    >>> trajectory.expiry.tolist()
    [9, 9, 8, 8, 8, 8, 9, 9, 9]
    >>> trajectory.peak_context, trajectory.visible_pairs
    (8, 41)
    """

    segments: tuple[Segment, ...]
    retention: Retention

    def __init__(self, segments: Sequence[Segment], retention: Retention = mem1) -> None:
        segments = tuple(listed("segments", segments, "Segments"))
        if not segments:
            raise ValueError("segments: expected at least one, got none")
        for segment in segments:
            if not isinstance(segment, Segment):
                raise TypeError(f"segments: expected Segments, got {type(segment).__name__}")
        for before, after in zip(segments, segments[1:], strict=False):
            if after.turn < before.turn:
                raise ValueError(
                    f"segments: turns must not decrease, got {after.turn} after {before.turn}"
                )
        expires, floors = retained(segments, retention)
        counts = torch.tensor([segment.num_tokens for segment in segments])
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        tokens = int(bounds[-1])

        def per_token(values: Sequence[float] | Tensor) -> Tensor:
            return torch.repeat_interleave(torch.as_tensor(values), counts)

        index = torch.arange(tokens)
        super().__init__(
            expiry=per_token(bounds[torch.tensor(expires)]).int(),
            floor=None if floors is None else per_token(bounds[torch.tensor(floors)]).int(),
            position_ids=index,
            loss_mask=per_token([segment.in_loss for segment in segments]),
            predecessor=index - 1,
            document=torch.zeros_like(index),
            num_documents=1,
            source=index,
            source_tokens=tokens,
            token_ids=_join_ids(segments),
            spans=tuple(
                Span(segment.role, segment.turn, start, stop)
                for segment, start, stop in zip(
                    segments, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True
                )
            ),
            positions="kept",
            weights=(
                per_token([float(segment.weight) for segment in segments])
                if any(segment.weight != 1 for segment in segments)
                else None
            ),
        )
        object.__setattr__(self, "segments", segments)
        object.__setattr__(self, "retention", retention)

    @classmethod
    def from_evictions(
        cls,
        token_ids: Sequence[int] | Tensor,
        evicted_at: Sequence[int | None] | Tensor | None = None,
        *,
        live: Sequence[tuple[int, Sequence[int] | Tensor]] | None = None,
        loss_mask: Sequence[int] | Tensor | None = None,
        weights: Sequence[float] | Tensor | None = None,
    ) -> Trajectory:
        """What another engine wrote, with the keys that it dropped on the way, token by token.

        For engines that drop keys in place and let positions go on counting. A step is a number of
        tokens: at step s the keys of tokens 0 to s - 1 have been computed, and token s comes next.
        So a token that leaves at step s is seen by tokens up to s - 1, and `expiry` is its step.

        Args:
            token_ids: int64 `[tokens]`, all of them, dropped or not.
            evicted_at: int64 `[tokens]`, the step at which each key left; None or a step >= tokens:
                it never did.
            live: in place of `evicted_at`: snapshots (step, indices of the tokens in the cache), in
                order. A token leaves at the first snapshot without it, so there must be one at each
                step at which something left.
            loss_mask: bool `[tokens]`: what is trained. None: nothing is.
            weights: float `[tokens]`: of each token in the loss. None: 1.

        Returns:
            The trajectory. What is in the loss is an action; the turns are counted from 1 and begin
            with it; what is before the first is the prompt, the rest is info. Tokens of one step
            form one segment, which `retention` drops at that step.

        Raises:
            TypeError: values of another type.
            ValueError: no tokens; both or none of `evicted_at` and `live`; another number of values
                than of tokens; a token that leaves before it is written; snapshots whose steps fall
                or that hold tokens which were not written; a key that comes back.

        Source: in-place eviction as in MEMENTO, arXiv 2604.09852.

        >>> made = Trajectory.from_evictions([5, 6, 7, 8], [None, 3, None, None],
        ...                                  loss_mask=[0, 1, 1, 1])
        >>> made.expiry.tolist(), made.position_ids.tolist()
        ([4, 3, 4, 4], [0, 1, 2, 3])
        >>> same = Trajectory.from_evictions([5, 6, 7, 8], live=[(3, [0, 2]), (4, [0, 2, 3])])
        >>> same.expiry.tolist()
        [4, 3, 4, 4]
        """
        segments, retention = recorded(
            token_ids, evicted_at, live=live, loss_mask=loss_mask, weights=weights
        )
        return cls(segments, retention)


def _join_ids(segments: Sequence[Segment]) -> Tensor | None:
    filled = [segment for segment in segments if segment.num_tokens]
    with_ids = [segment for segment in filled if segment.ids is not None]
    if with_ids and len(with_ids) != len(filled):
        raise ValueError(
            "segments: expected ids in all or in none, "
            f"got them in {len(with_ids)} of {len(filled)}"
        )
    if filled and not with_ids:
        return None
    return torch.tensor([i for segment in filled for i in segment.ids or ()], dtype=torch.int64)


def _prompt_tokens(layout: Layout) -> int:
    """How many tokens the leading prompt segments hold."""
    stop = 0
    for span in layout.spans:
        if span.role != "prompt":
            break
        stop = span.stop
    return stop


def compacted(trajectory: Trajectory) -> Layout:
    """The layout of a trajectory whose rollout moved what was left at every boundary ("compact").

    In the cache the prompt is followed by one run of the newest tokens, without a gap. So a query
    meets the keys of that run at the distance they were written at, and the prompt's keys at the
    distance that is left. Each token is in the layout once. A forward pass computes at the cache's
    `position_ids`, which stay below the peak context; attention to the run turns its queries and
    keys on to `kept_position_ids`, and so to the distance at which they were written.

    Raises:
        TypeError: something that is not a Trajectory.
        ValueError: a policy that drops a part of the prompt, has floors, or leaves anything else
            than the prompt and one run of the newest tokens (`fold`).

    >>> turn = lambda t: [Segment("action", 2, t), Segment("info", 3, t)]
    >>> layout = compacted(Trajectory([Segment("prompt", 2), *turn(1), *turn(2)]))
    >>> layout.kept_position_ids.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    >>> layout.position_ids.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6]
    """
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"trajectory: expected a Trajectory, got {type(trajectory).__name__}")
    name = getattr(trajectory.retention, "__name__", repr(trajectory.retention))
    prompt, expiry = _prompt_tokens(trajectory), trajectory.expiry.long()
    behind = expiry[prompt:]
    wrong = ""
    if trajectory.floor is not None:
        wrong = "has floors"
    elif bool((expiry[:prompt] < trajectory.num_tokens).any()):
        wrong = "drops the prompt"
    elif bool((behind.diff() < 0).any()):
        wrong = "drops tokens between others that stay"
    if wrong:
        raise ValueError(f"retention: {ONE_RUN}; {name} {wrong}")
    index = torch.arange(trajectory.num_tokens)
    dropped = torch.searchsorted(behind.contiguous(), index, right=True)
    dropped = torch.minimum(dropped, (index - prompt).clamp(min=0))
    values = {field.name: getattr(trajectory, field.name) for field in fields(Layout)}
    changes = {
        "positions": "compact",
        "prompt_stop": torch.full_like(index, prompt),
        "position_ids": index - dropped,
        "kept_position_ids": index,
    }
    return Layout(**{**values, **changes})


ONE_RUN = (
    "positions='compact' needs a policy that leaves the prompt and one run of the newest tokens"
)


def pack(items: Sequence[Layout | Sequence[Layout]]) -> Layout:
    """Puts trajectories into one row for one forward pass; none sees another.

    An item that is itself a sequence is a group that shares one prompt (GRPO): the prompt is stored
    and computed once, and the rest of each member follows as a branch of a tree.

    Args:
        items: trajectories, or groups of them; also what `unroll` and `pack` return.

    Returns:
        A Layout; `document` numbers the members in the order given.

    Raises:
        TypeError: something that is not a trajectory or group of them.
        ValueError: nothing to pack; both forms of positions; token ids in some only; or a group
            whose prompts differ, are empty, expire, or are in the loss.

    >>> a = Trajectory([Segment("prompt", 2), Segment("action", 2, 1)])
    >>> b = Trajectory([Segment("prompt", 2), Segment("action", 1, 1)])
    >>> pack([a, b]).expiry.tolist()
    [4, 4, 4, 4, 7, 7, 7]
    >>> tree = pack([[a, b]])
    >>> tree.expiry.tolist(), tree.position_ids.tolist(), tree.predecessor.tolist()
    ([5, 5, 4, 4, 5], [0, 1, 2, 3, 2], [-1, 0, 1, 2, 1])
    """
    if isinstance(items, Layout):
        raise TypeError(f"items: expected a sequence, got one {type(items).__name__}")
    groups = [
        [item] if isinstance(item, Layout) else listed("items", item, "trajectories or groups")
        for item in listed("items", items, "a list of trajectories or groups")
    ]
    members = [member for group in groups for member in group]
    for member in members:
        if not isinstance(member, Layout):
            raise TypeError(f"items: expected trajectories, got {type(member).__name__}")
    if not members or not all(groups):
        raise ValueError("items: expected at least one trajectory, and none of the groups empty")
    forms = {member.positions for member in members}
    if len(forms) > 1:
        raise ValueError(f"items: expected positions of one form, got {sorted(forms)}")
    if len({member.token_ids is None for member in members}) > 1:
        raise ValueError("items: expected token ids in all trajectories or in none")

    parts: dict[str, list[Tensor]] = {name: [] for name in _PER_TOKEN}
    spans: list[Span] = []
    has_floor = any(member.floor is not None for member in members)
    has_weights = any(member.weights is not None for member in members)
    base = source_base = document_base = 0
    for group in groups:
        shared = _check_shared_prompt(group) if len(group) > 1 else 0
        group_stop = base + shared + sum(member.num_tokens - shared for member in group)
        branch = base + shared
        for number, member in enumerate(group):
            shift = branch - shared
            rest = slice(0 if number == 0 else shared, None)

            def place(index: Tensor, shift: int = shift, base: int = base, shared: int = shared):
                """The packed indices of the member's tokens; the shared prompt is stored once."""
                return index + torch.where(index < shared, base, shift)

            expiry = member.expiry + shift
            if number == 0:
                expiry[:shared] = group_stop
            before = member.predecessor
            parts["expiry"].append(expiry[rest])
            parts["predecessor"].append(torch.where(before < 0, before, place(before))[rest])
            parts["document"].append((member.document + document_base)[rest])
            parts["source"].append((member.source + source_base)[rest])
            for name in ("position_ids", "loss_mask", "token_ids", "kept_position_ids"):
                if getattr(member, name) is not None:
                    parts[name].append(getattr(member, name)[rest])
            if has_weights:
                given = member.weights
                if given is None:
                    given = torch.ones(member.num_tokens, device=member.expiry.device)
                parts["weights"].append(given[rest])
            if member.prompt_stop is not None:
                # The stop is exclusive: it goes where the prompt's last token goes.
                parts["prompt_stop"].append((place(member.prompt_stop - 1) + 1)[rest])
            if has_floor:
                floor = torch.zeros_like(expiry) if member.floor is None else member.floor
                parts["floor"].append(place(floor)[rest])
            spans += [
                span._replace(start=span.start + shift, stop=span.stop + shift)
                for span in member.spans
                if number == 0 or span.start >= shared
            ]
            branch += member.num_tokens - shared
            source_base += member.source_tokens
            document_base += member.num_documents
        base = group_stop
    fields = {name: torch.cat(values) if values else None for name, values in parts.items()}
    return Layout(
        **fields,  # type: ignore[arg-type]
        num_documents=document_base,
        source_tokens=source_base,
        spans=tuple(spans),
        positions=members[0].positions,
    )


def _check_shared_prompt(group: Sequence[Layout]) -> int:
    lengths = [_prompt_tokens(member) for member in group]
    shared = lengths[0]
    if shared == 0 or any(length != shared for length in lengths):
        raise ValueError(f"items: a group needs one prompt of one length, got lengths {lengths}")
    for number, member in enumerate(group):
        if bool((member.expiry[:shared] < member.num_tokens).any()):
            raise ValueError(f"items: member {number} of a group drops a part of the shared prompt")
        if bool(member.loss_mask[:shared].any()):
            raise ValueError(
                f"items: member {number} of a group trains the shared prompt; pack the members "
                "one after the other"
            )
        for name in ("token_ids", "position_ids"):
            mine, first = getattr(member, name), getattr(group[0], name)
            if mine is not None and not torch.equal(mine[:shared], first[:shared]):
                raise ValueError(f"items: member {number} of a group has another prompt ({name})")
    return shared
