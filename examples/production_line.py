"""A production line whose constraints change while it runs: orders come in, a plan goes to a file.

python examples/production_line.py                            a scripted policy
python examples/production_line.py Qwen/Qwen2.5-7B-Instruct   any model

A file holds orders and changes as they happen: what is in force has to be kept in the state.
"""

import json
import random
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mem1_kernels.agent import MemoryEfficientAgent
from mem1_kernels.agent.tools import Tool, ToolBox
from mem1_kernels.plugs.chat import TextEngine

CHANGE, ORDER = r"change: (.) takes at most (\d)", r"order (\d+): size (\d)"


def events(number: int = 40) -> list[str]:
    rng, most, lines = random.Random(0), dict.fromkeys("ABC", 9), []
    for at in range(number):
        if at % 4 == 3:
            most[machine := rng.choice("ABC")] = rng.randint(0, 9)
            lines.append(f"change: {machine} takes at most {most[machine]}")
        else:
            lines.append(f"order {at}: size {rng.randint(0, max(most.values()))}")
    return lines


def violations(lines: list[str], plan: dict[str, str]) -> int:  # orders on no fitting machine
    most, wrong = dict.fromkeys("ABC", 9), 0
    for line in lines:
        if change := re.fullmatch(CHANGE, line):
            most[change[1]] = int(change[2])
        elif order := re.fullmatch(ORDER, line):
            wrong += most.get(plan.get(order[1], ""), -1) < int(order[2])
    return wrong


def scripted(context: str) -> str:
    states = re.findall(r"<think>(\{.*?\})</think>", context)
    most = json.loads(states[-1]) if states else dict.fromkeys("ABC", 9)
    seen, call = context.rpartition("<result>")[2], {"name": "next"}
    if change := re.search(CHANGE, seen):
        most[change[1]] = int(change[2])
    elif order := re.search(ORDER, seen):
        fits = next(machine for machine in "ABC" if most[machine] >= int(order[2]))
        call = {"name": "plan", "arguments": {"order": order[1], "machine": fits}}
    action = "<answer>done</answer>" if "is over" in seen else f"<tool>{json.dumps(call)}</tool>"
    return f"<think>{json.dumps(most)}</think>{action}"


def main(model: Any = None, tokenizer: Any = None, max_turns: int = 80) -> tuple[Any, int]:
    with TemporaryDirectory() as folder:
        line, path, lines = Path(folder) / "line.txt", Path(folder) / "plan.json", events()
        path.write_text("{}")
        line.write_text("\n".join([*lines, "the shift is over"]))
        news = iter(line.read_text().splitlines())

        def plan(order: str, machine: str) -> str:
            """Puts an order on machine A, B or C."""
            path.write_text(json.dumps(json.loads(path.read_text()) | {order: machine}))
            return "planned"

        box = ToolBox([Tool("next", "What happens next.", {}, lambda _: next(news)), Tool.of(plan)])
        engine = TextEngine(scripted) if model is None else "pruned"
        agent = MemoryEfficientAgent(model, tokenizer=tokenizer, engine=engine, environment=box)
        result = agent.process("Plan each order on a machine that fits.", max_turns=max_turns)
        wrong = violations(lines, json.loads(path.read_text()))
    print(f"{len(result.turns)} turns, {wrong} violations, at most {result.peak_context} tokens")
    return result, wrong


if __name__ == "__main__":
    main(*sys.argv[1:2])
