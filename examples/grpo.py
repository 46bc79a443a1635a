"""GRPO without our trainer: roll out, pack, score, and one loss of pure functions.

    python examples/grpo.py

The policy is a tiny Qwen2 that has learned a little from a teacher; put yours in its place.
"""

import random

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mem1_kernels import Trajectory, pack
from mem1_kernels.agent import Episodes
from mem1_kernels.agent.tasks import VOCABULARY, ChainTask, TableEnvironment, Teacher
from mem1_kernels.hf import patch
from mem1_kernels.ppo import grpo_advantages, on_every_token, policy_loss
from mem1_kernels.rollout import Generation, HFEngine, collate, score

GROUP = 8  # episodes of the same task


def warm_start(model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, steps: int) -> None:
    rng = random.Random(0)
    for _ in range(steps):
        teacher = Teacher(0.6, rng)  # forgets two nodes in five
        traces = [teacher.play(ChainTask.sample(rng.randint(1, 2), rng))[0] for _ in range(32)]
        layout = pack([Trajectory(segments) for segments in traces])
        loss = -score(model, layout)[layout.loss_mask].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(steps: int = 8, warm_steps: int = 300) -> list[float]:
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128)
    config.update({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2})
    model = patch(Qwen2ForCausalLM(config))  # from here on it takes plans
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    warm_start(model, optimizer, warm_steps)

    engine, rng, rewards = HFEngine(model), random.Random(1), []
    for step in range(steps):
        tasks = [ChainTask.sample(rng.randint(1, 2), rng) for _ in range(16)]
        every = [task for task in tasks for _ in range(GROUP)]
        generation = Generation(max_turns=5, max_new_tokens=9, seed=step)
        episodes = Episodes(TableEnvironment, every, engine, generation)
        rollouts = engine.run(episodes.prompts, episodes.respond, episodes.generation)
        results = episodes.results(rollouts)

        # Each group behind its prompt, as one row; `sampled` is laid out like the row's tokens.
        groups = [rollouts[at : at + GROUP] for at in range(0, len(rollouts), GROUP)]
        layout, sampled = collate(groups)
        reward = torch.tensor([result.reward for result in results])
        advantages = grpo_advantages(reward, torch.arange(len(results)) // GROUP)

        mask = layout.loss_mask  # the tokens that the policy wrote
        log_probs = score(model, layout)  # float32 [tokens], differentiable
        gap = (log_probs - sampled)[mask].abs().max().item()
        loss = policy_loss(
            log_probs,
            sampled,  # exact, so the rollout's log-probs are the old ones
            on_every_token(advantages, mask, layout.document),  # document: which episode
            mask,
            denominator=int(mask.sum()),
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rewards.append(float(reward.mean()))
        print(f"step {step}  reward {rewards[-1]:.3f}  rollout against training {gap:.0e}")
    return rewards


if __name__ == "__main__":
    main()
