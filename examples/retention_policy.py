"""Your own retention policy: one function prunes the rollout's cache and masks training.

    python examples/retention_policy.py

Here: states and actions stay, and an observation goes when the next one comes, but for those of
turns whose state holds the token PIN.
"""

from collections.abc import Sequence

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mem1_kernels import Segment, Trajectory
from mem1_kernels.rollout import Generation, HFEngine, collate, score

PIN = 7


def forget_observations(segments: Sequence[Segment]) -> list[int]:
    """For each segment, the index of the first segment that no longer sees it.

    A rollout asks with the segments so far and the one to come. It may drop where a turn or an
    observation begins, and must not change what it said of earlier drops.
    """
    pinned = {s.turn for s in segments if s.role == "state" and PIN in (s.ids or ())}
    infos = [index for index, segment in enumerate(segments) if segment.role == "info"]
    following = dict(zip(infos, infos[1:]))
    return [
        following.get(index, len(segments)) if segment.turn not in pinned else len(segments)
        for index, segment in enumerate(segments)
    ]


def main() -> float:
    segments = [Segment("prompt", [1, 2])]
    for turn in (1, 2, 3):
        state = [PIN if turn == 1 else 9]
        segments += [Segment("state", state, turn), Segment("action", [4], turn)]
        segments += [Segment("info", [5] * 6, turn)]
    trajectory = Trajectory(segments, forget_observations)
    for span in trajectory.spans:
        print(f"turn {span.turn} {span.role:7} expires at {int(trajectory.expiry[span.start])}")

    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=64, hidden_size=64, intermediate_size=64)
    config.update({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2})
    model = Qwen2ForCausalLM(config)
    generation = Generation(
        retention=forget_observations,
        max_turns=6,
        max_new_tokens=8,
        state_tokens=lambda ids: len(ids) // 2,  # the first half of a turn is its state
        seed=0,
    )
    rollouts = HFEngine(model).run(
        [[5, 9, 11], [7, 8]], lambda turns: [[20, 21, 22, 23]] * len(turns), generation
    )
    layout, sampled = collate(rollouts)
    with torch.no_grad():
        gap = float((score(model, layout) - sampled).abs().max())
    for rollout in rollouts:
        print(rollout)
    print(f"largest |rollout - training| log-prob: {gap:.1e}")
    return gap


if __name__ == "__main__":
    main()
