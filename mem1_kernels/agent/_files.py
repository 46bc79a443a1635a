"""Text and files from outside: valid Unicode, JSON as it is written down, whole files or none."""

from __future__ import annotations

import json
import os
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

from mem1_kernels._text import printable, valid_text

SHOWN = 80
REASON = 200
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_UTF8_MARK = b"\xef\xbb\xbf"

_Record = TypeVar("_Record")


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string in it, keys included, replaced by `change(string)`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_text(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): map_text(item, change) for key, item in value.items()}
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold.

    >>> is_number(3), is_number(10**400), is_number(True)
    (True, False, False)
    """
    most = sys.float_info.max
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -most <= value <= most


def parse_json(text: str) -> Any:
    """A JSON value whose strings are valid Unicode (`valid_text`).

    Raises:
        ValueError: text that is not JSON; NaN and Infinity, which JSON does not have; values
            nested too deeply.

    >>> parse_json('{"a": [1, "\\\\ud83d"]}') == {"a": [1, "\\ufffd"]}
    True
    """
    try:
        return map_text(json.loads(text, parse_constant=_no_constant), valid_text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_jsonl(
    path: str | Path, read: Callable[[Any], _Record], *, option: str = ""
) -> list[_Record]:
    """Reads a file of one JSON value per line; blank lines are left out.

    The file is UTF-8, with or without a byte order mark; lines end in LF or CRLF.

    Args:
        read: makes a record of a line's JSON value; LookupError, TypeError, ValueError and
            AttributeError say that the value does not fit.
        option: what the caller calls `path`, for error messages.

    Raises:
        OSError: a file that cannot be read (missing, a folder, no permission).
        ValueError: another encoding, a line that is not JSON or does not fit, or no record at
            all. The message names the option, the file and the line.
    """
    name = path_name(path, option)
    records: list[_Record] = []
    try:
        with open_binary(path, name) as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = _without_mark(line, name)
                if line.strip():
                    records.append(_read_line(line, f"{name}, line {number}", read))
    except OSError as error:
        raise named_error(error, name) from None
    if not records:
        raise ValueError(f"{name}: expected one JSON object per line, got an empty file")
    return records


def path_name(path: str | Path, option: str) -> str:
    """A path for error messages, on one line.

    Raises:
        TypeError: no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{option or 'path'}: expected a path, got {type(path).__name__}")
    name = printable(str(path)).replace("\n", "\\n")
    return f"{option}: {name}" if option else name


def open_binary(path: str | Path, name: str) -> BinaryIO:
    """The file, for reading.

    Raises:
        OSError: it cannot be opened.
        ValueError: a path that no file can have.
    """
    try:
        return open(path, "rb")
    except ValueError:  # a NUL, or a lone surrogate
        raise ValueError(f"{name:.200}: expected a path, but no file can have this name") from None


def named_error(error: OSError, name: str) -> OSError:
    """The same kind of error with a message of one line that begins with `name`."""
    return type(error)(f"{name}: {error.strerror or error}")


def _without_mark(line: bytes, name: str) -> bytes:
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if line.startswith(mark):
            raise ValueError(f"{name}: expected UTF-8, got {encoding}; convert it with iconv")
    return line.removeprefix(_UTF8_MARK)


def _read_line(line: bytes, name: str, read: Callable[[Any], _Record]) -> _Record:
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        got = line[error.start : error.start + 1]
        raise ValueError(
            f"{name}: expected UTF-8, got byte {got!r} at column {error.start + 1}"
        ) from None
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{name}: expected JSON ({reason}), got {shown(text)}") from None
    except ValueError as error:
        raise ValueError(f"{name}: expected JSON ({error}), got {shown(text)}") from None
    try:
        return read(value)
    except KeyError as error:
        raise ValueError(f"{name}: expected {error.args[0]!r}, got {shown(text)}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = str(error)[:REASON]
        raise ValueError(f"{name}: {reason}, got {shown(text)}") from None


def shown(text: str, limit: int = SHOWN) -> str:
    """The beginning of a text, quoted, for an error message."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


@contextmanager
def written_whole(path: str | Path) -> Iterator[TextIO]:
    """A UTF-8 text file that appears under its name when it is complete, or not at all.

    It is written beside its place and renamed, so no reader sees half of it and a full disk costs
    no older file. What is no regular file (a pipe, a device) is written directly.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    real = Path(os.path.realpath(path))
    if real.exists() and not stat.S_ISREG(real.stat().st_mode):
        with open(real, "w", encoding="utf-8") as file:
            yield file
        return
    part = real.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open(part, "x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, real)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
