"""The command-line options that all benchmarks share. Imports no torch: sm90_table runs without."""

from __future__ import annotations

import argparse
from typing import Any


class Help(argparse.RawDescriptionHelpFormatter):
    """Writes the default behind the help of every option whose help does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", action.default
        if "default" in text or value is argparse.SUPPRESS:
            return text
        if action.const is True:
            value = "on" if value else "off"
        return f"{text} (default: {_shown(value)})"


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def make_parser(
    doc: str,
    name: str,
    *,
    quick: dict[str, Any],
    devices: tuple[str, ...] = ("cpu", "cuda"),
    rounds: int | None = 15,
) -> argparse.ArgumentParser:
    """A parser with `--device`, `--rounds`, `--quick`, `--out` and `--name`.

    Args:
        doc: the docstring of the benchmark; it becomes the text of `--help`.
        name: of the benchmark's JSON file, without the suffix.
        quick: the options that `--quick` gives other defaults.
        devices: what `--device` may be; none: no such option.
        rounds: default of `--rounds`; None: no such option.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help)
    if devices:
        parser.add_argument(
            "--device", choices=devices, default=devices[0], help="where to measure"
        )
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="times that each is timed")
    shown = ", ".join(f"--{name.replace('_', '-')} {_shown(x)}" for name, x in quick.items())
    parser.add_argument("--quick", action="store_true", help=f"a smoke run: {shown}")
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder to write NAME.json into (default: nothing is kept)"
    )
    parser.add_argument("--name", default=name, help="name of that file, without .json")
    return parser


def parse(parser: argparse.ArgumentParser, quick: dict[str, Any]) -> argparse.Namespace:
    """The command line's options. With `--quick` those that it does not name are the quick ones."""
    if parser.parse_args().quick:
        parser.set_defaults(**quick)
    return parser.parse_args()
