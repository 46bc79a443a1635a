"""A tiny text model with its tokenizer, a script that says what it samples, and a server for it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence

import tokenizers
import torch
import transformers
from local_server import Request
from tokenizers import decoders, models, pre_tokenizers, trainers

from mem1_kernels.agent.qa import QATask, prompt
from mem1_kernels.rollout import hf_engine

END = "<|end|>"


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE over the words of a prompt: tags are several tokens, and ">" may merge."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([prompt(QATask(("What is it?", "Where is it?")))], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def make_bytes_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes as tokens."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters), 1)}
    core = tokenizers.Tokenizer(models.BPE({"<eos>": 0, **vocabulary}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def make_model(vocabulary: int) -> transformers.Qwen2ForCausalLM:
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    return transformers.Qwen2ForCausalLM(config).eval()


class Script:
    """Stands in for sampling: row r writes turns[r][0], turns[r][1], ...; log-probs stay true.

    Each text must end where its turn does: at a closing tag, or at the token limit.
    """

    def __init__(self, monkeypatch, tokenizer, *rows: Sequence[str]) -> None:
        encode = tokenizer.encode
        self.turns = [[encode(turn, add_special_tokens=False) for turn in row] for row in rows]
        self.number = 0
        self.writing: list[list[int]] = []
        monkeypatch.setattr(hf_engine, "_sample", self.sample)

    def sample(self, logits, temperature, generator):
        if not self.writing:
            self.writing = [list(row[self.number]) for row in self.turns if len(row) > self.number]
            self.number += 1
        assert len(logits) == len(self.writing)
        tokens = torch.tensor([turn.pop(0) for turn in self.writing])
        self.writing = [turn for turn in self.writing if turn]
        return tokens, logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]


def completions(
    write: Callable[[list[int], dict], tuple[list[int], list[float], str]],
) -> Callable[[Request], object]:
    """A /v1/completions endpoint as vLLM and SGLang have it; streams one token a part if asked.

    write(prompt ids, request) -> (ids, log-probs, finish reason).
    """

    def choice(prompt, ids, log_probs, finish):
        return {
            "index": 0,
            "text": "".join(f"[{i}]" for i in ids),
            "finish_reason": finish,
            "logprobs": {"token_logprobs": log_probs, "tokens": [""] * len(ids)},
            "token_ids": ids,
            "prompt_token_ids": prompt,
        }

    def reply(choice, request):
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1,
            "model": request["model"],
            "choices": [choice],
        }

    def answer(request: Request) -> object:
        asked = request.json
        ids, log_probs, finish = write(asked["prompt"], asked)
        if not asked["stream"]:
            return reply(choice(asked["prompt"], ids, log_probs, finish), asked)
        parts = [
            choice(asked["prompt"] if at == 0 else None, [i], [p], None)
            for at, i, p in zip(itertools.count(), ids, log_probs)
        ]
        parts.append(choice(None, [], [], finish))
        events = [json.dumps(reply(part, asked)) for part in parts] + ["[DONE]"]
        return "".join(f"data: {event}\n\n" for event in events)

    return answer


def greedy_writer(model, tokenizer):
    """Writes what the model finds most likely, each token by a whole forward pass."""

    @torch.no_grad()
    def write(prompt: list[int], asked: dict) -> tuple[list[int], list[float], str]:
        ids: list[int] = []
        log_probs: list[float] = []
        while len(ids) < asked["max_tokens"]:
            logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
            log_probs.append(float(logits.log_softmax(0)[ids[-1]]))
            text = tokenizer.decode(ids)
            if ids[-1] in asked["stop_token_ids"] or any(s in text for s in asked.get("stop", ())):
                return ids, log_probs, "stop"
        return ids, log_probs, "length"

    return write
