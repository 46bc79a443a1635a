"""Your own environment around a Python tool: a calculator, and sums that need several steps.

python examples/environment.py Qwen/Qwen2.5-0.5B-Instruct                       play
python -m mem1_kernels.ppo --environment examples.environment:world --model ... train
"""

import ast
import operator
import random
import sys
from dataclasses import dataclass
from typing import Any

from mem1_kernels.agent import MemoryEfficientAgent, ParsedTurn, Result, Step, TagSet, World

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculate(expression: str) -> int:
    """The tool."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        raise ValueError("expected whole numbers and + - *")

    return value(ast.parse(expression[:100], mode="eval").body)


@dataclass
class Sums:
    """Some expressions; the answer is the sum of their values."""

    expressions: list[str]
    answer: int

    @classmethod
    def draw(cls, size: int, rng: random.Random) -> "Sums":
        parts = [f"{rng.randint(10, 99)} * {rng.randint(10, 99)}" for _ in range(size)]
        return cls(parts, sum(map(calculate, parts)))


class Calculator:
    tags = TagSet(actions={"calculate": "calc", "answer": "answer"}, info="result")

    def reset(self, task: Sums) -> str:
        self.task = task
        return (
            "Each turn, write what you need to remember in <think> ... </think>: all else is "
            "removed. Then <calc> one expression </calc>, whose value comes back in <result>, or "
            f"<answer> ... </answer>.\nAdd up the values of: {'; '.join(task.expressions)}\n"
        )

    def step(self, turn: ParsedTurn) -> Step:
        if turn.kind == "answer":
            return Step("", float(turn.payload == str(self.task.answer)), True)
        if turn.kind == "calculate":
            try:
                return Step(str(calculate(str(turn.payload))))
            except (ValueError, SyntaxError) as error:
                return Step(f"error: {error}")
        return Step(f"This turn could not be read: {turn.error}")  # costs a turn, ends nothing


def world() -> World:
    return World(draw=Sums.draw, make=Calculator)


def main(model: Any, tokenizer: Any = None) -> Result:
    agent = MemoryEfficientAgent(
        model, tokenizer=tokenizer, environment=Calculator, max_new_tokens=60, max_turns=6
    )
    return agent.process(Sums.draw(3, random.Random(0)))


if __name__ == "__main__":
    print(main(sys.argv[1]))
