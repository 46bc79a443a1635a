"""Turn-by-turn generation on a context that is pruned as the retention policy says.

A rollout and a training step must compute the same function. So a `Rollout` carries the layout
that reproduces it, `collate` packs rollouts for a trainer, and `score` gives the log-probs that the
trainer will see: equal to those that were sampled from, up to rounding.

    HFEngine(model)                                             pruned cache, in this process
    HFEngine(model, positions="compact")                        its gaps closed at every boundary
    HFEngine(model, positions="reprefill")                      the live text sent again every turn
    ServerEngine("http://127.0.0.1:8000/v1", name, tokenizer)   vLLM or SGLang
"""

from mem1_kernels.rollout.engine import (
    Engine,
    EngineError,
    Generation,
    OnTokens,
    Respond,
    Rollout,
    Turn,
)
from mem1_kernels.rollout.hf_engine import HFEngine, TrajectoryRollout
from mem1_kernels.rollout.loop import Backend, RolloutRow, Written, open_rows, run_turns
from mem1_kernels.rollout.server_engine import ServerEngine
from mem1_kernels.rollout.training import collate, score

__all__ = [
    "Backend",
    "Engine",
    "EngineError",
    "Generation",
    "HFEngine",
    "OnTokens",
    "Respond",
    "Rollout",
    "RolloutRow",
    "ServerEngine",
    "TrajectoryRollout",
    "Turn",
    "Written",
    "collate",
    "open_rows",
    "run_turns",
    "score",
]
