"""Tools by name: functions, or what a server offers, as an environment.

    <think> what to remember </think><tool>{"name": "read", "arguments": {"path": "a.txt"}}</tool>

The result comes back as text. `plugs.mcp` brings the tools of an MCP server; `Tool.of` makes one of
a Python function.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from mem1_kernels._text import error_text, valid_text
from mem1_kernels.agent._files import parse_json, shown
from mem1_kernels.agent.environment import Step, ToolError
from mem1_kernels.agent.qa import QATask, score_answers
from mem1_kernels.agent.tags import MALFORMED, ParsedTurn, TagSet

TOOLS = TagSet(actions={"tool": "tool", "answer": "answer"}, info="result")
"""The tags of `ToolBox`."""

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


@dataclass(frozen=True)
class Tool:
    """Something an agent can call.

    Args:
        name: what the policy calls it.
        description: what it does, for the policy.
        parameters: a JSON schema of its arguments, an object.
        call: (arguments) -> the result as text. What it raises goes back to the policy as text,
            except `ToolError`, which ends the episode.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[[dict[str, Any]], str]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Tool:
        """A Python function as a tool: its name, the first line of its docstring, its parameters.

        Raises:
            TypeError: a parameter that is not annotated as str, int, float or bool.

        >>> def add(a: int, b: int = 1) -> int:
        ...     '''The sum of two numbers.'''
        ...     return a + b
        >>> tool = Tool.of(add)
        >>> tool.call({"a": 2}), tool.parameters["required"]
        ('3', ['a'])
        """
        hints = get_type_hints(function)
        properties = {}
        required = []
        for name, parameter in inspect.signature(function).parameters.items():
            if hints.get(name) not in _TYPES:
                raise TypeError(
                    f"function: expected parameter {name!r} of {function.__name__} annotated as "
                    f"str, int, float or bool, got {hints.get(name)!r}"
                )
            properties[name] = {"type": _TYPES[hints[name]]}
            if parameter.default is parameter.empty:
                required.append(name)
        about = (inspect.getdoc(function) or "").partition("\n")[0]
        schema = {"type": "object", "properties": properties, "required": required}
        return cls(function.__name__, about, schema, lambda arguments: str(function(**arguments)))

    @property
    def line(self) -> str:
        """The tool as one line of a prompt; arguments that may be left out have a "?".

        >>> Tool("read", "Reads a file.", {"properties": {"path": {"type": "string"}},
        ...                                "required": ["path"]}, str).line
        '- read(path: string): Reads a file.'
        """
        required = self.parameters.get("required", ())
        parts = [
            f"{name}{'' if name in required else '?'}: {_type_of(about)}"
            for name, about in self.parameters.get("properties", {}).items()
        ]
        return f"- {self.name}({', '.join(parts)}): {' '.join(self.description.split())}"


def _type_of(schema: Any) -> str:
    said = schema.get("type", "any") if isinstance(schema, Mapping) else "any"
    return said if isinstance(said, str) else "any"


class ToolBox:
    """An environment whose actions are calls of tools, and an answer.

    A call that cannot be read, an unknown tool, missing and unknown arguments and what a tool
    raises come back as text: they cost a turn and end nothing.

    Args:
        tools: what may be called.
        score: (answer, task) -> reward, for tasks of your own. Default: for a `QATask` with golden
            answers, the share that matches; else 0.

    Raises:
        ValueError: no tools, or two of one name.

    >>> def add(a: int, b: int) -> int:
    ...     '''The sum of two numbers.'''
    ...     return a + b
    >>> box = ToolBox([Tool.of(add)])
    >>> prompt = box.reset(QATask(("What is 2 + 3?",), (("5",),)))
    >>> call = '<think>?</think><tool>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool>'
    >>> box.step(TOOLS.parse(call)).observation
    '5'
    >>> box.step(TOOLS.parse("<think>5</think><answer>5</answer>")).reward
    1.0
    """

    tags = TOOLS

    def __init__(
        self, tools: Sequence[Tool], *, score: Callable[[str, Any], float] | None = None
    ) -> None:
        self.tools = {tool.name: tool for tool in tools}
        if not tools or len(self.tools) != len(tools):
            got = [tool.name for tool in tools]
            raise ValueError(f"tools: expected at least one, each of another name, got {got}")
        self.score = score
        self._task: Any = None

    def reset(self, task: QATask | str) -> str:
        """Begins an episode.

        Args:
            task: a `QATask`, or what to do as text.

        Raises:
            TypeError: anything else.
        """
        if not isinstance(task, QATask | str):
            raise TypeError(f"task: expected a QATask or text, got {type(task).__name__}")
        self._task = task
        return tools_prompt(task, list(self.tools.values()))

    def step(self, turn: ParsedTurn) -> Step:
        """Calls a tool, or ends with the answer.

        Raises:
            RuntimeError: no episode has begun.
            ToolError: a tool cannot go on.
        """
        if self._task is None:
            raise RuntimeError("step: expected reset(task) first")
        if turn.kind == MALFORMED:
            return Step(f"This turn could not be read: {turn.error}.")
        if turn.kind == "tool":
            return Step(self._call(str(turn.payload)))
        said, task = str(turn.payload), self._task
        if self.score is not None:
            return Step("", self.score(said, task), True)
        if isinstance(task, QATask) and task.golden_answers:
            scores = score_answers(said, task.golden_answers)
            return Step("", sum(scores["em"]) / len(scores["em"]), True, scores)
        return Step("", 0.0, True)

    def _call(self, payload: str) -> str:
        try:
            asked = parse_json(payload)
        except ValueError as error:
            return f"error: expected a call in JSON ({error}), got {shown(payload)}"
        if not isinstance(asked, dict) or not isinstance(asked.get("arguments", {}), dict):
            return 'error: expected {"name": ..., "arguments": {...}}'
        tool = self.tools.get(str(asked.get("name")))
        if tool is None:
            return f"error: expected a tool of {', '.join(self.tools)}, got {asked.get('name')!r}"
        arguments = asked.get("arguments", {})
        known = tool.parameters.get("properties", {})
        missing = [n for n in tool.parameters.get("required", ()) if n not in arguments]
        unknown = [name for name in arguments if name not in known]
        if missing or unknown:
            got = f"missing {missing}" if missing else f"unknown {unknown}"
            return f"error: {tool.name} takes {list(known)}; {got}"
        try:
            return valid_text(tool.call(arguments)) or "(no text)"
        except ToolError:
            raise
        except Exception as error:  # of a tool: the policy may try another call
            return f"error: {error_text(error)}"


def tools_prompt(task: QATask | str, tools: Sequence[Tool]) -> str:
    """The rules, the tools and the task; what comes from outside has its tags defused."""
    if isinstance(task, QATask):
        lines = [f"{n}. {question}" for n, question in enumerate(task.questions, 1)]
        asked = "\n".join([*([task.topic] if task.topic else []), *lines])
        form = "the answers in the order of the questions, separated by semicolons"
    else:
        asked, form = task, "the answer"
    offered = "\n".join(tool.line for tool in tools)
    example = json.dumps({"name": "...", "arguments": {"...": "..."}})
    return (
        f"You work with tools, turn by turn. In every turn, first write <{TOOLS.state}> ... "
        f"</{TOOLS.state}>. It is your only memory: older turns and results are removed, so carry "
        "over all that you still need.\nThen do one of two things:\n"
        f"- <tool>{example}</tool>; the result comes back in <{TOOLS.info}> ... </{TOOLS.info}>.\n"
        f"- <answer> ... </answer> with {form}. This ends the task.\n\n"
        f"The tools:\n{TOOLS.guard(valid_text(offered))}\n\n{TOOLS.guard(valid_text(asked))}\n"
    )
