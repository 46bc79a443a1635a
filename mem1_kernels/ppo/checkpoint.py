"""Checkpoints: the weights, the optimizer, the reference, and the number of the next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mem1_kernels.ppo.learner import Learner, reshard


def _state(learner: Learner, step: int) -> dict[str, Any]:
    """What a checkpoint holds. Before the first step the optimizer has no state."""
    reshard(learner.module)
    options = StateDictOptions(ignore_frozen_params=True)
    state: dict[str, Any] = {
        "model": get_model_state_dict(learner.model, options=options),
        "reference": learner.reference,
    }
    if step:
        optimizer = learner.optimizer.optimizer
        state["optimizer"] = get_optimizer_state_dict(learner.model, optimizer, options=options)
    return state


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in `out`, by step."""
    found = [(int(path.name[11:]), path) for path in out.glob("checkpoint-" + "[0-9]" * 6)]
    return sorted((step, path) for step, path in found if (path / ".metadata").exists())


def save_checkpoint(learner: Learner, out: Path, step: int) -> None:
    """Writes a checkpoint, after which the next step is `step`, and drops old ones."""
    dcp.save(_state(learner, step), checkpoint_id=str(out / f"checkpoint-{step:06d}"))
    if learner.accelerator.is_main_process:
        for _, path in checkpoints(out)[: -learner.config.keep_checkpoints]:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    learner.accelerator.wait_for_everyone()


def load_checkpoint(learner: Learner, step: int, path: Path) -> None:
    """Brings weights, optimizer and reference back to what they were at `step`."""
    state = _state(learner, step)
    dcp.load(state, checkpoint_id=str(path))
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_model_state_dict(learner.model, state["model"], options=options)
    if step:
        set_optimizer_state_dict(
            learner.model, learner.optimizer.optimizer, state["optimizer"], options=options
        )
