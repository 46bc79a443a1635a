"""For the reference: puts the examples of docstrings, lines from `>>>` on, into code blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def fenced(text: str) -> str:
    """`text` with each run of lines that begins with `>>>` in a block of its own."""
    return EXAMPLE.sub(lambda found: f"```pycon\n{found.group()}\n```", text)


class Doctests(griffe.Extension):
    """Changes each docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
