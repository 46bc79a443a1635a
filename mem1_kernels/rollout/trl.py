"""GRPO with TRL's trainer on rollouts whose context was pruned.

TRL (1.16) takes rollouts by `rollout_func`, but hands what else they know to the reward functions
only, and pads the rows: its forward pass would be causal over each row. So one private method is
overridden, the one that computes log-probs and entropies for the loss, for the old log-probs and
for the reference. The rest of the trainer is TRL's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.hf import is_patched
from mem1_kernels.rollout.engine import Rollout
from mem1_kernels.trajectory import Layout, pack

try:
    from trl import GRPOTrainer
except ImportError:
    raise ImportError("trl is not installed (`pip install trl`)") from None

_OVERRIDDEN = "_get_per_token_logps_and_entropies"
_EXPECTED = ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
_found = list(inspect.signature(getattr(GRPOTrainer, _OVERRIDDEN, lambda: None)).parameters)
if _found[1:6] != _EXPECTED:
    raise ImportError(
        f"trl: expected GRPOTrainer.{_OVERRIDDEN}({', '.join(_EXPECTED)}, ...), as in 1.16, "
        f"got ({', '.join(_found[1:6])})"
    )


class TrajectoryGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, whose forward passes see what the rollouts saw.

    Its arguments are GRPOTrainer's, and `rollout_func(prompts, trainer)` returns
    `trainer.take(rollouts)`. A row of TRL's batch finds its layout again by its tokens.
    examples/grpo_trl.py is a whole run. TRL computes under bfloat16 autocast by default;
    `bf16=False` computes as an engine in float32 does.

    Raises:
        ValueError: a model that is not patched (`mem1_kernels.hf.patch`); in a step, images,
            `mask_truncated_completions`, the load-balancing loss of experts, or rows that `take`
            did not return.
        ImportError (of the module): no trl, or one whose method takes other arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Evaluation may come between the steps that share a batch.
        self._layouts: dict[bool, dict[tuple[int, ...], Layout]] = {}
        super().__init__(*args, **kwargs)
        if not is_patched(self.accelerator.unwrap_model(self.model)):
            raise ValueError("model: expected a patched one (mem1_kernels.hf.patch)")

    def take(self, rollouts: Sequence[Rollout], **columns: list[Any]) -> dict[str, list[Any]]:
        """What a `rollout_func` returns for these rollouts.

        Args:
            rollouts: one per prompt, in order.
            columns: further values per rollout, for the reward functions.

        Returns:
            prompt_ids, completion_ids, logprobs (as sampled; 0 for what was not), env_mask (1 for
            generated tokens), and the columns.

        Raises:
            ValueError: a rollout without a completion; rollouts of the same tokens that saw
                different ones of them; or a column of another length.
        """
        known: dict[tuple[int, ...], Layout] = {}
        made: dict[str, list[Any]] = {
            name: [] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask")
        }
        for number, rollout in enumerate(rollouts):
            trajectory, layout = rollout.trajectory, rollout.layout
            assert trajectory.token_ids is not None
            ids = trajectory.token_ids.tolist()
            prompt = next(
                (span.start for span in trajectory.spans if span.role != "prompt"), len(ids)
            )
            if prompt == len(ids):
                raise ValueError(f"rollouts: expected a completion in rollout {number}, got none")
            same = known.setdefault(tuple(ids), layout)
            if not (
                torch.equal(same.expiry, layout.expiry) and torch.equal(same.source, layout.source)
            ):
                raise ValueError(
                    f"rollouts: rollout {number} has the tokens of another one, but saw other ones "
                    "of them; TRL's rows cannot tell the two apart"
                )
            made["prompt_ids"].append(ids[:prompt])
            made["completion_ids"].append(ids[prompt:])
            made["logprobs"].append(rollout.log_probs[prompt:].tolist())
            made["env_mask"].append(trajectory.loss_mask[prompt:].int().tolist())
        for name, values in columns.items():
            if len(values) != len(rollouts):
                raise ValueError(f"{name}: expected {len(rollouts)} values, got {len(values)}")
        self._layouts[self._is_training()] = known
        return {**made, **columns}

    def _is_training(self) -> bool:
        assert self.model is not None
        return bool(self.model.training)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if compute_aux_loss:
            raise ValueError("router_aux_loss_coef: expected 0; it counts padding that is not here")
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]}: images are not supported")
        size = batch_size or len(input_ids)
        parts = [
            self._score(model, input_ids[at : at + size], attention_mask[at : at + size].bool())
            for at in range(0, len(input_ids), size)
        ]
        log_probs = torch.cat([part for part, _ in parts])[:, -logits_to_keep:]
        entropies = None
        if compute_entropy:
            entropies = torch.cat([part for _, part in parts])[:, -logits_to_keep:]
        return log_probs, entropies, None

    def _score(self, model: Any, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        """Log-probs and entropies at the generated tokens of padded rows, 0 elsewhere."""
        known = self._layouts.get(self._is_training(), {})
        layouts = []
        for ids, own in zip(input_ids, mask, strict=True):
            layout = known.get(tuple(ids[own].tolist()))
            if layout is None:
                raise ValueError(
                    "rollout_func: expected rows that take() returned for the last prompts "
                    "(mask_truncated_completions changes rows, and is not supported)"
                )
            layouts.append(layout)
        layout = pack(layouts).to(input_ids.device)
        assert layout.token_ids is not None
        labels = layout.shift_labels()[None]
        with self.accelerator.autocast():
            out = model(
                input_ids=layout.token_ids[None],
                position_ids=layout.position_ids[None],
                plan=BlockPlan.of(layout),
                labels=labels,
                shift_labels=labels,
                fused_lm_head=True,
            )
        generated = layout.loss_mask.nonzero().flatten()

        def padded(predicted: Tensor) -> Tensor:
            """From the tokens that predict to the predicted ones, in the order of the rows."""
            values = predicted[0, layout.predecessor[generated]]
            flat = values.new_zeros(layout.source_tokens)
            flat = flat.index_put((layout.source[generated],), values)
            return flat.new_zeros(input_ids.shape).masked_scatter(mask, flat)

        # A reference model computes no entropies.
        return padded(out.log_probs), None if out.entropy is None else padded(out.entropy)
