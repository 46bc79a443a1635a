"""The command-line options that all benchmarks share. Imports no torch: sm90_table runs without."""

from __future__ import annotations

import argparse


class Help(argparse.RawDescriptionHelpFormatter):
    """Writes the default behind the help of every option whose help does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", action.default
        if "default" in text or value is argparse.SUPPRESS:
            return text
        if action.const is True:
            value = "on" if value else "off"
        elif isinstance(value, (list, tuple)):
            value = " ".join(map(str, value))
        return f"{text} (default: {value})"


def make_parser(
    doc: str,
    name: str,
    *,
    quick: str,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    rounds: int | None = 15,
) -> argparse.ArgumentParser:
    """A parser with `--device`, `--rounds`, `--quick`, `--out` and `--name`.

    Args:
        doc: the docstring of the benchmark; it becomes the text of `--help`.
        name: of the benchmark's JSON file, without the suffix.
        quick: what `--quick` measures.
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
    parser.add_argument("--quick", action="store_true", help=f"a smoke run: {quick}")
    parser.add_argument(
        "--out", metavar="FOLDER", help="folder to write NAME.json into (default: nothing is kept)"
    )
    parser.add_argument("--name", default=name, help="name of that file, without .json")
    return parser
