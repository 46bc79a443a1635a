"""Supervised fine-tuning on trajectories with transformers' Trainer, or with TRL's SFTTrainer.

    python examples/sft_trainer.py            transformers.Trainer
    python examples/sft_trainer.py --trl      trl.SFTTrainer
    python examples/sft_trainer.py --liger    with Liger's kernels, where liger-kernel is installed

Three lines are ours: patch the model, keep the dataset's columns, take the collator. Nothing is
padded, and the loss is that of each trajectory alone under a dense mask.
"""

import argparse
import random
import tempfile
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models

from mem1_kernels.agent.tasks import VOCABULARY, ChainTask, Teacher
from mem1_kernels.hf import TrajectoryCollator, patch


def traces(count: int) -> list[dict[str, Any]]:
    """What a teacher wrote, a trajectory per example: role, turn and token ids of each segment."""
    rng = random.Random(0)
    examples = []
    for _ in range(count):
        segments, _ = Teacher().play(ChainTask.sample(rng.randint(1, 3), rng))
        rows = [{"role": s.role, "turn": s.turn, "ids": list(s.ids or ())} for s in segments]
        examples.append({"segments": rows})
    return examples


def main(trl: bool, liger: bool = False, steps: int = 40, batch_size: int = 16) -> list[float]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    shape = transformers.Qwen2Config(vocab_size=VOCABULARY, **sizes)
    model = patch(transformers.Qwen2ForCausalLM(shape))  # 1: it takes plans now
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "remove_unused_columns": False,  # 2: the collator needs the segments
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": 3e-3,
        "logging_steps": 5,
        "report_to": [],
        "use_liger_kernel": liger,  # its fused head takes the collator's shift_labels
        "liger_kernel_config": {"rope": False, "rms_norm": False, "swiglu": False},
        "use_cpu": not torch.cuda.is_available(),
    }
    parts: dict[str, Any] = {"data_collator": TrajectoryCollator()}  # 3: packs, plans, shifts
    if trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        words = Tokenizer(models.WordLevel({"<eos>": 0}))  # TRL wants a tokenizer: put yours here
        parts["processing_class"] = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
        )
        arguments = SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = SFTTrainer(
            model, arguments, train_dataset=Dataset.from_list(traces(400)), **parts
        )
    else:
        arguments = transformers.TrainingArguments(**options)
        trainer = transformers.Trainer(model, arguments, train_dataset=traces(400), **parts)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", action="store_true", help="with TRL's SFTTrainer")
    parser.add_argument("--liger", action="store_true", help="with Liger's kernels")
    print(main(**vars(parser.parse_args())))
