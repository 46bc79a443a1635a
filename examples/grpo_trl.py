"""GRPO with TRL's GRPOTrainer, on rollouts whose context is pruned.

    python examples/grpo_trl.py

Ours are the rollouts, and the trainer's forward pass, which sees what they saw: TRL 1.16 hands
`rollout_func`'s further results to reward functions only, so `TrajectoryGRPOTrainer` overrides the
one private method that runs the model.
"""

import random
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig

from mem1_kernels import Trajectory, pack
from mem1_kernels.agent import Episodes
from mem1_kernels.agent.tasks import VOCABULARY, ChainTask, TableEnvironment, Teacher
from mem1_kernels.hf import patch
from mem1_kernels.rollout import Generation, HFEngine, score
from mem1_kernels.rollout.trl import TrajectoryGRPOTrainer


def warm_start(model: Qwen2ForCausalLM, steps: int) -> None:
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        teacher = Teacher(0.6, rng)  # forgets two nodes in five
        traces = [teacher.play(ChainTask.sample(rng.randint(1, 2), rng))[0] for _ in range(32)]
        layout = pack([Trajectory(segments) for segments in traces])
        loss = -score(model, layout)[layout.loss_mask].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def roll_out(prompts: list[str], trainer: TrajectoryGRPOTrainer) -> dict:
    rngs = [random.Random(prompt) for prompt in prompts]  # here a prompt is the seed of a task
    tasks = [ChainTask.sample(rng.randint(1, 2), rng) for rng in rngs]
    engine = HFEngine(trainer.accelerator.unwrap_model(trainer.model))
    generation = Generation(max_turns=5, max_new_tokens=9, seed=trainer.state.global_step)
    episodes = Episodes(TableEnvironment, tasks, engine, generation)
    rollouts = engine.run(episodes.prompts, episodes.respond, episodes.generation)
    results = episodes.results(rollouts)
    return trainer.take(rollouts, score=[result.reward for result in results])


def reward(completions: list, score: list[float], **others) -> list[float]:
    return score


def main(
    steps: int = 8, warm_steps: int = 300, kind=TrajectoryGRPOTrainer, **options
) -> list[dict]:
    torch.manual_seed(0)
    shape: dict = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = patch(Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **shape)))  # takes plans now
    warm_start(model, warm_steps)
    words = Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0")
    settings = {"output_dir": tempfile.mkdtemp(), "report_to": [], "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 64, "num_generations": 8, "learning_rate": 1e-3}
    settings |= {"max_steps": steps, "use_cpu": not torch.cuda.is_available(), **options}
    tasks = Dataset.from_list([{"prompt": str(seed)} for seed in range(64)])
    trainer = kind(
        model, reward, GRPOConfig(**settings), tasks,
        processing_class=tokenizer, rollout_func=roll_out,
    )  # fmt: skip
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    for entry in main():
        print({name: entry[name] for name in ("step", "reward", "entropy") if name in entry})
