"""Histories that branch, as one layout in which shared text stands once: `pack_tree`, `unroll`.

Compaction, folding, sub-agents, cleared tool results, retries and groups all leave rows of tokens
that begin alike. Such rows are a prefix tree, and a prefix tree is what `expiry` can say: laid out
in depth-first order, a token expires at the end of its subtree.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mem1_kernels.retention import listed, placeholder_of, retained
from mem1_kernels.trajectory import Layout, Span, Trajectory


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One row of tokens as a trainer knows it: a branch of a history, from the first token on.

    Args:
        token_ids: int64 `[tokens]`, or a sequence of integers.
        loss_mask: bool `[tokens]`: what is trained. None: nothing is.
        weights: float32 `[tokens]`: of each token in the loss. None: 1.
        log_probs: float32 `[tokens]`: as they were sampled; read where `loss_mask` is True.
        sample: what the row is a part of (an episode, a rollout id); None: of itself alone.

    Raises:
        TypeError: another dtype.
        ValueError: another number of values than of tokens, a negative id, or, where the token is
            in the loss, a weight or a log-prob that is not finite.

    >>> TokenRow([5, 7, 9], [False, True, True]).token_ids
    tensor([5, 7, 9])
    """

    token_ids: Any
    loss_mask: Any = None
    weights: Any = None
    log_probs: Any = None
    sample: Hashable = None

    def __post_init__(self) -> None:
        ids = _vector("token_ids", self.token_ids, torch.int64)
        if len(ids) and int(ids.min()) < 0:
            raise ValueError(f"token_ids: expected ids >= 0, got {int(ids.min())}")
        mask = self.loss_mask
        mask = torch.zeros(len(ids), dtype=torch.bool) if mask is None else mask
        mask = _vector("loss_mask", mask, torch.bool, len(ids))
        object.__setattr__(self, "token_ids", ids)
        object.__setattr__(self, "loss_mask", mask)
        for name in ("weights", "log_probs"):
            values = getattr(self, name)
            if values is None:
                continue
            values = _vector(name, values, torch.float32, len(ids))
            if not bool(values[mask].isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers where loss_mask is True")
            object.__setattr__(self, name, values)

    def __len__(self) -> int:
        return len(self.token_ids)


def _vector(name: str, values: Any, dtype: torch.dtype, count: int | None = None) -> Tensor:
    try:
        vector = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {values!r:.80} ({error})") from None
    if vector.dim() != 1:
        raise ValueError(f"{name}: expected [tokens], got {list(vector.shape)}")
    if count is not None and len(vector) != count:
        raise ValueError(f"{name}: expected {count} values like token_ids, got {len(vector)}")
    got = vector.dtype
    integers = not (got.is_floating_point or got.is_complex or got == torch.bool)
    fits = {
        torch.int64: integers,
        torch.bool: got == torch.bool or (integers and bool(((vector == 0) | (vector == 1)).all())),
        torch.float32: got.is_floating_point or integers,
    }
    if not fits[dtype] and len(vector):
        raise TypeError(f"{name}: expected {dtype}, got {got}")
    return vector.to("cpu", dtype)


@dataclass(frozen=True, eq=False, repr=False)
class TreeLayout(Layout):
    """A layout in which rows share what they have in common at their beginning.

    Beside what every `Layout` has:

        rows       the rows, as they were given
        index      int64 `[source_tokens]`  for each token of the rows, laid behind each other, its
                   place in this layout
        weights    float32 `[tokens]`  sum of the weights of all rows in whose loss the token is

    `document` of a token is the first row that holds it.
    """

    rows: tuple[TokenRow, ...] = ()
    index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))

    def to(self, device: torch.device | str) -> TreeLayout:
        """This layout with its tensors on `device`; the rows stay where they are."""
        moved: dict[str, Any] = {
            item.name: value.to(device)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)

    def gather_rows(self, values: Tensor) -> list[Tensor]:
        """Per-token results back to each row, in its order; differentiable.

        A token that several rows share gets the sum of their gradients.

        Args:
            values: `[tokens, ...]`, on any device.

        Raises:
            ValueError: values of another number of tokens.

        >>> tree = pack_tree([TokenRow([1, 2, 3]), TokenRow([1, 2, 4])])
        >>> [row.tolist() for row in tree.gather_rows(tree.token_ids)]
        [[1, 2, 3], [1, 2, 4]]
        """
        if not isinstance(values, Tensor):
            raise TypeError(f"values: expected a tensor, got {type(values).__name__}")
        if values.shape[:1] != (self.num_tokens,):
            raise ValueError(f"values: expected [{self.num_tokens}, ...], got {list(values.shape)}")
        gathered = values.index_select(0, self.index.to(values.device))
        return list(gathered.split([len(row) for row in self.rows]))


def pack_tree(rows: Sequence[TokenRow]) -> TreeLayout:
    """Lays rows out as one prefix tree: what rows have in common at their beginning stands once.

    The logits of each row's tokens are those of the row run alone, and so are the gradients of
    losses over them. A prefix counts as common where its token ids are equal, whatever the rows'
    masks say. Rows may be empty, equal, or prefixes of others. The time is linear in the tokens.

    Args:
        rows: the branches, each from its first token on.

    Returns:
        The layout. `position_ids` are those of each row alone (0, 1, 2, ...), so rollouts must have
        used these: the form is "reprefill". `loss_mask` is True where the token is in the loss of
        any row, and `weights` sums over rows. Rows appear in the order given wherever a tree allows
        it.

    Raises:
        TypeError: something that is not a TokenRow.
        ValueError: no rows, or no tokens.

    >>> rows = [TokenRow([1, 2, 3, 4], [0, 0, 1, 1]), TokenRow([1, 2, 5]), TokenRow([1, 2, 3])]
    >>> tree = pack_tree(rows)
    >>> tree.token_ids.tolist(), tree.expiry.tolist()
    ([1, 2, 3, 4, 5], [5, 5, 4, 4, 5])
    >>> tree.position_ids.tolist(), tree.predecessor.tolist()
    ([0, 1, 2, 3, 2], [-1, 0, 1, 2, 1])
    """
    rows = tuple(listed("rows", rows, "a list of TokenRows"))
    for row in rows:
        if not isinstance(row, TokenRow):
            raise TypeError(f"rows: expected TokenRows, got {type(row).__name__}")
    if not any(len(row) for row in rows):
        raise ValueError("rows: expected at least one token, got none")
    tree = _lay_out([row.token_ids for row in rows])
    index, tokens = tree.index, len(tree.source)
    weights = torch.zeros(tokens)
    given = [torch.ones(len(row)) if row.weights is None else row.weights for row in rows]
    masks = torch.cat([row.loss_mask for row in rows])
    weights.index_add_(0, index, torch.cat(given).masked_fill(~masks, 0))
    in_loss = torch.zeros(tokens, dtype=torch.bool)
    in_loss[index[masks]] = True
    return TreeLayout(
        expiry=tree.expiry,
        floor=None,
        position_ids=tree.position_ids,
        loss_mask=in_loss,
        predecessor=tree.predecessor,
        document=tree.row,
        num_documents=len(rows),
        source=tree.source,
        source_tokens=len(index),
        token_ids=torch.cat([row.token_ids for row in rows])[tree.source],
        spans=(),
        positions="reprefill",
        rows=rows,
        index=index,
        weights=weights,
    )


def unroll(trajectory: Trajectory) -> Layout:
    """The re-prefill form: what an engine computes that sends the live text again every turn.

    Each turn is a branch: the prompt, the segments that are alive when the turn starts, at compact
    positions, and then what the turn writes. A turn in which something is dropped at a mark goes on
    in a branch of its own from there. Where the policy has a placeholder, it stands for each
    segment that was dropped; its `source` is that segment's first token.

    Branches share the text that they have in common at their beginning: the prompt, and under
    policies that keep older segments those too. So a turn before which nothing was dropped goes on
    in the branch of the turn before. Every token in the loss is there exactly once, in the branch
    that wrote or read it first. What is not in the loss and was seen by nothing in it is left out.

    Raises:
        TypeError: something that is not a Trajectory.
        ValueError: the policy sets floors (an engine that sends text again cannot hide a part of
            it), or the prompt expires.

    >>> from mem1_kernels import Segment
    >>> turn = lambda t: [Segment("action", 1, t), Segment("info", 2, t)]
    >>> layout = unroll(Trajectory([Segment("prompt", 2), *turn(1), *turn(2), *turn(3)]))
    >>> [(span.role, span.turn) for span in layout.spans]  # doctest: +NORMALIZE_WHITESPACE
    [('prompt', 0), ('action', 1), ('info', 1), ('action', 2),
     ('action', 2), ('info', 2), ('action', 3)]
    >>> layout.position_ids.tolist()
    [0, 1, 2, 3, 4, 5, 2, 3, 4, 5]
    >>> layout.loss_mask.int().tolist()
    [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    """
    if not isinstance(trajectory, Trajectory):
        raise TypeError(f"trajectory: expected a Trajectory, got {type(trajectory).__name__}")
    segments = trajectory.segments
    expires, floors = retained(segments, trajectory.retention)
    if floors is not None:
        raise ValueError("trajectory: a policy with floors has no re-prefill form")
    prompts = next((i for i, s in enumerate(segments) if s.role != "prompt"), len(segments))
    if any(expires[index] < len(segments) for index in range(prompts)):
        raise ValueError("trajectory: its prompt expires, so its turns share none")

    # A row per segment in the loss: the tokens that it sees, by their places in the trajectory, and
    # its own behind them. Places behind the trajectory's end are those of placeholders.
    placeholder = placeholder_of(trajectory.retention)
    tokens, length = trajectory.num_tokens, len(placeholder)
    places = [torch.arange(span.start, span.stop) for span in trajectory.spans]
    first = torch.tensor([span.start for span in trajectory.spans])
    rows = [torch.cat([torch.arange(0), *places[:prompts]])]
    for index, segment in enumerate(segments[prompts:], prompts):
        if segment.in_loss:
            seen = []
            for past in range(index):
                if expires[past] > index:
                    seen.append(places[past])
                elif segments[past].num_tokens:
                    begin = tokens + past * length
                    seen.append(torch.arange(begin, begin + length))
            rows.append(torch.cat([*seen, places[index]]))
    tree = _lay_out(rows)
    place = torch.cat(rows)[tree.source]
    loss_mask = torch.zeros(len(place), dtype=torch.bool)
    loss_mask[tree.index[: len(rows[0])]] = trajectory.loss_mask[rows[0]]
    written = [segment.num_tokens for segment in segments[prompts:] if segment.in_loss]
    end = len(rows[0])
    for row, count in zip(rows[1:], written, strict=True):
        end += len(row)
        loss_mask[tree.index[end - count : end]] = True
    source, ids = place, trajectory.token_ids
    stands_in = place >= tokens
    if bool(stands_in.any()):
        source = place.clone()
        source[stands_in] = first[(place[stands_in] - tokens) // length]
    token_ids = None if ids is None else ids[source]
    if token_ids is not None and bool(stands_in.any()):
        token_ids[stands_in] = torch.tensor(placeholder)[(place[stands_in] - tokens) % length]
    weights = trajectory.weights
    return Layout(
        expiry=tree.expiry,
        floor=None,
        position_ids=tree.position_ids,
        loss_mask=loss_mask,
        predecessor=tree.predecessor,
        document=torch.zeros_like(source),
        num_documents=1,
        source=source,
        source_tokens=tokens,
        token_ids=token_ids,
        spans=_spans(trajectory, place, length),
        positions="reprefill",
        weights=None if weights is None else weights[source],
    )


def _spans(trajectory: Trajectory, place: Tensor, placeholder: int) -> tuple[Span, ...]:
    """Where the pieces of the trajectory's segments lie, once its tokens, and behind them the
    placeholders of its segments, are in this order."""
    counts = torch.tensor([segment.num_tokens for segment in trajectory.segments])
    number = torch.arange(len(counts))
    segment = torch.cat([number.repeat_interleave(counts), number.repeat_interleave(placeholder)])
    segment = segment[place]
    new = torch.ones(len(place), dtype=torch.bool)
    new[1:] = (segment[1:] != segment[:-1]) | (place[1:] != place[:-1] + 1)
    starts = new.nonzero().flatten().tolist()
    return tuple(
        trajectory.spans[int(segment[start])]._replace(start=start, stop=stop)
        for start, stop in zip(starts, [*starts[1:], len(place)], strict=True)
    )


@dataclass
class _Tree:
    """Rows laid out as one prefix tree; all int64 but `expiry`.

    Of each token `[tokens]`: its place in the rows laid behind each other (`source`), the first row
    that holds it, its position, its expiry and its predecessor. Of each token of the rows
    `[source tokens]`: its place in the tree (`index`).
    """

    source: Tensor
    row: Tensor
    position_ids: Tensor
    expiry: Tensor
    predecessor: Tensor
    index: Tensor


def _lay_out(rows: Sequence[Tensor]) -> _Tree:
    nodes, places = _prefix_tree(rows)
    counts = torch.tensor([len(row) for row in rows])
    starts = counts.cumsum(0) - counts
    table = [(n.row, n.start, n.stop, n.first, n.subtree_stop) for n in nodes]
    row, start, stop, first, subtree_stop = torch.tensor(table).reshape(-1, 5).T
    length = stop - start
    offset = length.cumsum(0) - length
    node = torch.arange(len(nodes)).repeat_interleave(length)
    order = torch.arange(len(node))
    within = order - offset[node]
    predecessor = order - 1
    before = [-1 if n.parent is None else n.parent.end - 1 for n in nodes]
    predecessor[offset] = torch.tensor(before, dtype=torch.int64)
    final = torch.empty_like(order)
    final[first[node] + within] = order
    return _Tree(
        source=(starts[row] + start)[node] + within,
        row=row[node],
        position_ids=start[node] + within,
        expiry=subtree_stop[node].int(),
        predecessor=predecessor,
        index=final[places],
    )


@dataclass(eq=False)
class _Node:
    """A run of tokens that the same rows share: tokens `start` to `stop` of `row`, their first.

    `first` is its place in the order in which tokens were found, `offset` that in depth-first
    order, `subtree_stop` where all behind it has ended.
    """

    row: int
    start: int
    stop: int
    first: int
    parent: _Node | None
    children: list[_Node] = field(default_factory=list)
    offset: int = 0
    subtree_stop: int = 0

    @property
    def end(self) -> int:
        """The place behind its last token."""
        return self.offset + self.stop - self.start


def _prefix_tree(rows: Sequence[Tensor]) -> tuple[list[_Node], Tensor]:
    """The compressed prefix tree of rows of ids >= 0, int64 on the CPU.

    Returns:
        The nodes in depth-first order, children in the order of their first rows; and int64
        `[source tokens]`, the place of each row's tokens in the order in which tokens were found.
    """
    words = [_sortable(row) for row in rows]
    begins = [0, *accumulate(map(len, rows))]
    places = torch.empty(begins[-1], dtype=torch.int64)
    root = _Node(0, 0, 0, 0, None)
    path, found = [root], 0
    previous, previous_places = b"", places[:0]
    for row in sorted(range(len(rows)), key=words.__getitem__):
        mine = places[begins[row] : begins[row + 1]]
        shared = _common(previous, words[row])
        # Everything below the shared part is complete; a node that it ends in is cut in two.
        below: _Node | None = None
        while path[-1].stop > shared:
            below = path.pop()
        top = path[-1]
        if below is not None and top.stop < shared:
            upper = _Node(below.row, below.start, shared, below.first, top, [below])
            top.children[-1] = upper
            below.first += shared - below.start
            below.start, below.parent = shared, upper
            path.append(upper)
            top = upper
        mine[:shared] = previous_places[:shared]
        if len(mine) > shared:
            leaf = _Node(row, shared, len(mine), found, top)
            top.children.append(leaf)
            path.append(leaf)
            mine[shared:] = torch.arange(found, found + len(mine) - shared)
            found += len(mine) - shared
        path[-1].row = min(path[-1].row, row)
        previous, previous_places = words[row], mine
    return _depth_first(root), places


def _sortable(row: Tensor) -> bytes:
    """Big-endian bytes sort as ids >= 0 do, and prefixes before what they begin."""
    words = array("q", row.tolist())
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


def _common(a: bytes, b: bytes) -> int:
    """How many ids two rows of `_sortable` bytes have in common at their beginning."""
    count = min(len(a), len(b))
    differ = int.from_bytes(a[:count], "big") ^ int.from_bytes(b[:count], "big")
    return (8 * count - differ.bit_length()) // 64


def _depth_first(root: _Node) -> list[_Node]:
    """Orders the tree by first rows, and sets `row`, `parent`, `offset` and `subtree_stop`."""
    found = [root]
    for node in found:
        found += node.children
    for node in reversed(found):  # a node belongs to the first row that passes through it
        node.row = min([node.row, *(child.row for child in node.children)])
    nodes: list[_Node] = []
    offset = 0
    stack: list[tuple[_Node, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            node.subtree_stop = offset
            continue
        if node is not root:
            node.offset = offset
            offset += node.stop - node.start
            nodes.append(node)
            if node.parent is root:
                node.parent = None
        stack.append((node, True))
        node.children.sort(key=lambda child: child.row)
        stack += [(child, False) for child in reversed(node.children)]
    return nodes
