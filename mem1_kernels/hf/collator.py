"""Trajectories as batches of transformers' Trainer and of TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.retention import Retention, Segment, listed, mem1
from mem1_kernels.trajectory import Trajectory, pack

_MORE = {"depth", "trainable", "weight", "name"}
_KEYS = {"role", "turn", "ids", *_MORE}


class TrajectoryCollator:
    """A data collator: packs trajectories behind each other into one row, with their plan.

    The model must be patched (`mem1_kernels.hf.patch`), and the trainer must keep the columns:
    `remove_unused_columns=False`; for TRL also `dataset_kwargs={"skip_prepare_dataset": True}`.
    The loss is that of the generated tokens (state and action), each predicted by the token that
    the layout says. Segments may say otherwise (`trainable`), and may have a `weight`; the loss is
    then divided by the number of tokens in it, as the trainer counts them.

    Args:
        retention: which segment drops which. Default: mem1.

    Raises (when called):
        TypeError, ValueError: examples without "segments", or with some that are not segments.

    >>> collate = TrajectoryCollator()
    >>> example = {"segments": [["prompt", 0, [5, 6]], ["state", 1, [7]], ["action", 1, [8]]]}
    >>> batch = collate([example, example])
    >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
    ([[5, 6, 7, 8, 5, 6, 7, 8]], [[0, 1, 2, 3, 0, 1, 2, 3]])
    >>> batch["shift_labels"].tolist()
    [[-100, 7, 8, -100, -100, 7, 8, -100]]
    """

    def __init__(self, retention: Retention = mem1) -> None:
        if not callable(retention):
            raise TypeError(f"retention: expected a function such as mem1, got {retention!r}")
        self.retention = retention

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Packs examples.

        Args:
            examples: each with "segments": a list of `Segment`, of [role, turn, token ids], or with
                a depth and more as the trainer's transcripts have them, or of {"role", "turn",
                "ids"} as a column of a `datasets.Dataset` can hold them, with what else a Segment
                has: "depth", "trainable", "weight", "name".

        Returns:
            input_ids, position_ids, labels and shift_labels, int64 `[1, tokens]` each, and plan;
            with weights, loss_weights, float32 `[1, tokens]`. `labels` are the shifted ones too: a
            causal LM needs some to compute its loss, and takes `shift_labels` as they are.
        """
        layouts = []
        if isinstance(examples, Mapping):
            raise TypeError("examples: expected a list of examples, got one")
        for number, example in enumerate(listed("examples", examples, "a list of examples")):
            if not isinstance(example, Mapping):
                raise TypeError(
                    f"examples: expected one with 'segments', got {type(example).__name__}"
                )
            if "segments" not in example:
                raise ValueError(
                    f"examples: expected 'segments' in example {number}, got {list(example)}; "
                    "set remove_unused_columns=False"
                )
            items = listed("segments", example["segments"], "a list of segments")
            segments = [_segment(item) for item in items]
            layouts.append(Trajectory(segments, self.retention))
        layout = pack(layouts)
        labels = layout.shift_labels()[None]
        assert layout.token_ids is not None
        batch = {
            "input_ids": layout.token_ids[None],
            "position_ids": layout.position_ids[None],
            "labels": labels,
            "shift_labels": labels,
            "plan": BlockPlan.of(layout),
        }
        if layout.weights is not None:
            batch["loss_weights"] = layout.shift_weights()[None]
        return batch


def _segment(item: Any) -> Segment:
    if isinstance(item, Segment):
        return item
    more: dict[str, Any] = {}
    if isinstance(item, Mapping) and {"role", "turn", "ids"} <= item.keys() <= _KEYS:
        role, turn, ids = item["role"], item["turn"], item["ids"]
        given = {name: item[name] for name in _MORE if name in item}
        # A column of a data set has every key in every row: there None says nothing.
        more = {name: value for name, value in given.items() if value is not None}
    elif isinstance(item, Sequence) and not isinstance(item, str) and 3 <= len(item) <= 5:
        role, turn, ids, *rest = item
        if rest:
            more["depth"] = rest[0]
        if rest[1:] and isinstance(rest[1], Mapping) and rest[1].keys() <= _MORE:
            more |= rest[1]
        elif rest[1:]:
            raise TypeError(f"segments: expected an object of {sorted(_MORE)}, got {rest[1]!r}")
    else:
        raise TypeError(
            f"segments: expected a Segment or [role, turn, token ids], got {item!r:.80}"
        )
    ids = ids if hasattr(ids, "tolist") else listed("ids", ids, "token ids")
    return Segment(role, ids, turn, **more)
