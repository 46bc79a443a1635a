"""Checkpoints: the weights, the optimizer, the reference, and the number of the next step.

A checkpoint is a folder that torch.distributed.checkpoint (DCP) wrote, with the SHA-256 of each
file in SHA256SUMS, as `sha256sum -c` reads it. It is loaded only if they are right. That finds
damage, but not what somebody wrote to do harm, and DCP unpickles what it reads: a pickle may run
any command. So only the types that a checkpoint needs are unpickled.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mem1_kernels.ppo.files import from_main, named, part_of, remove, replaced, settle
from mem1_kernels.ppo.learner import Learner, reshard

SUMS = "SHA256SUMS"

# What DCP's .metadata is made of.
_METADATA_TYPES = {
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),  # Python 3.13
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.serialization": ("_get_layout",),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if dtype or (module, name) == ("torch", "Size") or name in _METADATA_TYPES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class _Reader(dcp.FileSystemReader):
    """Reads .metadata without running what it asks for."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Planner(dcp.DefaultLoadPlanner):
    """Takes values that are not tensors, such as learning rates, without running what they ask."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def read_metadata(path: Path) -> Metadata:
    """What a checkpoint's .metadata says; nothing that it asks for is run.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what DCP writes.
    """
    data = (path / ".metadata").read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
        stray = [name for name in _files(metadata) if Path(name).name != name]
    except Exception as error:  # an unpickler raises whatever the data make it raise
        raise ValueError(f".metadata is not that of a checkpoint: {error}") from None
    if stray:
        raise ValueError(f".metadata names files elsewhere: {', '.join(stray)}")
    return metadata


def _files(metadata: Metadata) -> set[str]:
    """The files that a checkpoint's values are in."""
    return {info.relative_path for info in metadata.storage_data.values()}


def _digests(path: Path, names: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of files in a folder; several are read at once."""

    def digest(name: str) -> str:
        found = hashlib.sha256()
        with open(path / name, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
        return found.hexdigest()

    names = sorted(names)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _check(path: Path) -> None:
    """Raises ValueError or OSError unless a checkpoint is as it was written."""
    written: dict[str, str] = {}
    for number, line in enumerate((path / SUMS).read_text("utf-8").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line)
        if match is None:
            raise ValueError(f"{SUMS}, line {number}: expected a SHA-256 and the name of a file")
        written[match[2]] = match[1]
    found = _digests(path, written)
    wrong = [name for name in found if found[name] != written[name]]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: another SHA-256 than in {SUMS}")
    missing = {".metadata", *_files(read_metadata(path))} - written.keys()
    if missing:
        raise ValueError(f"{SUMS} has no line for {', '.join(sorted(missing))}")


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The checkpoints in `out`, by step."""
    found = ((re.fullmatch(r"checkpoint-(\d{6,})", path.name), path) for path in out.iterdir())
    return sorted((int(name[1]), path) for name, path in found if name)


def newest_checkpoint(out: Path, accelerator: Accelerator, resume: bool) -> tuple[int, Path] | None:
    """The step and the path of the newest checkpoint in `out` that is intact, or None if there are
    no checkpoints. All processes must call.

    Newer ones that are damaged are named in a warning, and get a name that ends in .damaged.

    Raises:
        ValueError: there are checkpoints, but none is intact, or `resume` is False.
    """

    def find() -> tuple[int, Path] | None:
        found = checkpoints(out)
        if found and not resume:
            raise ValueError(f"out: {out} holds checkpoints; set resume, or take another folder")
        damaged: dict[Path, str] = {}
        for step, path in reversed(found):
            reason = _damage(path)
            if not reason:
                _set_aside(damaged, path)
                return step, path
            damaged[path] = reason
        if damaged:
            said = "; ".join(f"{path}: {reason}" for path, reason in damaged.items())
            raise ValueError(f"resume: expected an intact checkpoint, got damaged ones ({said})")
        return None

    return from_main(accelerator.is_main_process, find)


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint, or ""."""
    try:
        _check(path)
    except OSError as error:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    except ValueError as error:
        return str(error)
    return ""


def _set_aside(damaged: Mapping[Path, str], intact: Path) -> None:
    """Renames damaged checkpoints, so that the run can write theirs anew, and says so."""
    for path, reason in damaged.items():
        aside = path.with_name(f"{path.name}.damaged")
        remove(aside)
        path.rename(aside)
        warnings.warn(
            f"resume: {path} is damaged ({reason}) and is now called {aside.name}; the run goes on "
            f"from {intact.name}",
            stacklevel=2,
        )


def _state(learner: Learner, step: int) -> dict[str, Any]:
    """What a checkpoint holds. Before the first step the optimizer has no state."""
    reshard(learner.module)
    options = StateDictOptions(ignore_frozen_params=True)
    state: dict[str, Any] = {
        "model": get_model_state_dict(learner.model, options=options),
        "reference": learner.reference,
    }
    if step:
        optimizer = learner.optimizer.optimizer
        state["optimizer"] = get_optimizer_state_dict(learner.model, optimizer, options=options)
    return state


def save_checkpoint(learner: Learner, out: Path, step: int) -> None:
    """Writes a checkpoint, after which the next step is `step`, and drops old ones.

    Raises:
        OSError: it cannot be written. Older ones stay.
    """
    is_main = learner.accelerator.is_main_process
    path = out / f"checkpoint-{step:06d}"
    part = part_of(path)

    def finish() -> None:
        with named(path):
            sums = _digests(part, {".metadata", *_files(read_metadata(part))})
            lines = (f"{digest}  {name}\n" for name, digest in sums.items())
            (part / SUMS).write_text("".join(lines), "utf-8")
            settle(part, path)

    from_main(is_main, lambda: remove(part))  # what a run that was killed left
    try:
        dcp.save(_state(learner, step), checkpoint_id=str(part))
        from_main(is_main, finish)
    except BaseException as error:
        if is_main:
            remove(part)
        if isinstance(error, CheckpointException):
            raise OSError(f"{path} cannot be written: {_reason(error)}") from error
        raise
    if is_main:
        drop_old(out, step, learner.config.keep_checkpoints)


def drop_old(out: Path, step: int, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints up to `step`; one that resists stays."""
    for _, path in [item for item in checkpoints(out) if item[0] <= step][:-keep]:
        try:
            remove(path)
        except OSError as error:
            warnings.warn(f"{path} cannot be removed ({error})", stacklevel=2)


def load_checkpoint(learner: Learner, step: int, path: Path) -> None:
    """Brings weights, optimizer and reference back to what they were at `step`.

    Raises:
        ValueError: it is the checkpoint of another model, or what it holds is no plain data.
    """
    state = _state(learner, step)
    try:
        dcp.load(state, storage_reader=_Reader(path), planner=_Planner())
    except CheckpointException as error:
        raise ValueError(f"resume: {path} does not fit this run: {_reason(error)}") from error
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_model_state_dict(learner.model, state["model"], options=options)
    if step:
        set_optimizer_state_dict(
            learner.model, learner.optimizer.optimizer, state["optimizer"], options=options
        )


def save_policy(policy: Any, tokenizer: Any, path: Path) -> None:
    """Writes a policy, and the tokenizer if there is one, into a folder as transformers reads it.

    Raises:
        OSError: it cannot be written. What is there stays.
    """
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one per file of weights
    with replaced(path) as part:
        try:
            policy.save_pretrained(part)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        finally:
            if bars:
                logging.enable_progress_bar()
        if tokenizer is not None:
            tokenizer.save_pretrained(part)


def _reason(error: CheckpointException) -> str:
    """What went wrong first, on whichever process, in a line; a Ctrl-C is raised again."""
    first = next(iter(error.failures.values()))[0]
    if isinstance(first, KeyboardInterrupt):
        raise first
    if isinstance(first, pickle.UnpicklingError):
        return "it asks for more than plain data"  # torch's own text advises to run it
    under: BaseException | None = first  # torch's C++ says little of an OSError
    while under is not None and not isinstance(under, OSError):
        under = under.__context__
    return f"{type(under or first).__name__}: {under or first}".splitlines()[0]
