"""Files that a run leaves: written whole or not at all, in a folder that one run has at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import TypeVar

from accelerate.utils import broadcast_object_list

_T = TypeVar("_T")


def from_main(is_main: bool, make: Callable[[], _T]) -> _T:
    """What `make` returns, or raises, on the main process: on all processes of the launch.

    Raises:
        OSError, ValueError: those of `make`.
    """
    value: _T | None = None
    error: Exception | None = None
    if is_main:
        try:
            value = make()
        except (OSError, ValueError) as raised:
            error = raised
    value, error = broadcast_object_list([value, error])
    if error is not None:
        raise error
    return value


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields the path for a new file or folder, which replaces `path` when the block ends.

    It lies beside `path` until then. So a reader finds the old one or the new one, never half of
    it, and an error (a full disk) leaves the old one.

    Raises:
        OSError: it cannot be written; the message names the file.
    """
    part = part_of(path)
    with named(path):
        try:
            remove(part)
            yield part
            settle(part, path)
        except BaseException:
            remove(part)
            raise


def part_of(path: Path) -> Path:
    """Where a new file or folder is written before it replaces `path`."""
    real = Path(os.path.realpath(path))
    return real.with_name(f".{real.name}.part")


def settle(part: Path, path: Path) -> None:
    """Puts a file or folder that was written whole in the place of `path`."""
    real = Path(os.path.realpath(path))
    old = real.with_name(f".{real.name}.old")
    for file in (part, *part.rglob("*")):
        if file.is_file():
            _sync(file)
    try:
        if part.is_dir() and real.exists():  # a folder can only be renamed to a free name
            remove(old)
            os.rename(real, old)
        os.replace(part, real)
    except BaseException:
        if old.exists() and not real.exists():
            os.rename(old, real)
        raise
    remove(old)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Gives an OSError that names no file this one's name; `write` raises such."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link, if there is one.

    What a link points to stays.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def claimed(folder: Path, is_main: bool) -> Iterator[None]:
    """Makes a folder and keeps other runs out of it.

    The main process holds a lock on `folder/.lock`, which ends with the process, however it ends.
    All processes of the launch must call, and all of them raise.

    Raises:
        ValueError: another run has the folder.
        OSError: the folder cannot be made or written.
    """
    with ExitStack() as stack:

        def lock() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _lock(stack.enter_context(open(folder / ".lock", "a+b", buffering=0)), folder)
            except OSError as error:
                raise OSError(f"out: {folder} cannot be written ({error.strerror})") from None

        from_main(is_main, lock)
        yield


def _lock(file: FileIO, folder: Path) -> None:
    """Locks an open file until it is closed, and writes into it who did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(200).decode("utf-8", "replace").strip()
        raise ValueError(
            f"out: another run ({holder}) writes in {folder}; expected a folder of its own"
        ) from None
    except OSError as error:
        warnings.warn(
            f"out: {folder} cannot be locked ({error.strerror}), so nothing keeps a second run out",
            stacklevel=2,
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
