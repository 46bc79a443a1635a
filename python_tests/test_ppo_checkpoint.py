"""Checkpoints: written whole, read only as they were written, and harmless if they were not."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ppo_runs import full_disk, small

from mem1_kernels.ppo import checkpoint
from mem1_kernels.ppo.checkpoint import SUMS, checkpoints, drop_old
from mem1_kernels.ppo.files import named
from mem1_kernels.ppo.trainer import Run, train


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of one step, with checkpoints before and after it."""
    folder = tmp_path_factory.mktemp("made")
    train(small(folder, steps=1, save_every=1), progress=False)
    return folder / "run"


@pytest.fixture
def out(made, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def resumed(out: Path, **options) -> Run:
    config = small(out.parent, save_every=1, resume=True)
    return train(replace(config, **options), progress=False)


def sign(path: Path) -> None:
    """Gives a checkpoint that was tampered with the checksums that fit it."""
    files = [file.name for file in path.iterdir() if file.name != SUMS]
    sums = checkpoint._digests(path, files)
    (path / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def test_the_checksums_are_those_that_sha256sum_reads(out):
    for _, path in checkpoints(out):
        names = {line.split("  ")[1] for line in (path / SUMS).read_text().splitlines()}
        assert names == {".metadata", "__0_0.distcp"}
        assert os.system(f"cd {path} && sha256sum --check --quiet --strict {SUMS}") == 0


# damage


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(data)


def cut(name: str):
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


def cut_a_line(path: Path) -> None:
    lines = (path / SUMS).read_text().splitlines(keepends=True)
    (path / SUMS).write_text("".join(lines[1:]))


DAMAGE = {
    "__0_0.distcp: another SHA-256 than in SHA256SUMS": flip_a_byte,
    "__0_0.distcp: another": cut("__0_0.distcp"),
    "__0_0.distcp: No such file": lambda path: (path / "__0_0.distcp").unlink(),
    ".metadata: another SHA-256": cut(".metadata"),
    ".metadata: No such file": lambda path: (path / ".metadata").unlink(),
    "SHA256SUMS: No such file": lambda path: (path / SUMS).unlink(),
    "SHA256SUMS, line 2: expected a SHA-256": cut(SUMS),
    "SHA256SUMS has no line for .metadata": cut_a_line,
    "SHA256SUMS has no line": lambda path: (path / SUMS).write_text(""),
    "SHA256SUMS, line 1": lambda path: (path / SUMS).write_text("0" * 64 + "  ../../x\n"),
    "'utf-8' codec": lambda path: (path / SUMS).write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_found(out, message):
    path = out / "checkpoint-000001"
    assert checkpoint._damage(path) == ""
    DAMAGE[message](path)
    assert message in checkpoint._damage(path)


def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(out):
    whole = train(small(out.parent / "whole", steps=2), progress=False)
    flip_a_byte(out / "checkpoint-000001")
    with pytest.warns(UserWarning, match="checkpoint-000001 is damaged .*goes on from .*-000000"):
        run = resumed(out)
    assert [record["reward"] for record in run.history] == whole.rewards
    for a, b in zip(whole.policy.parameters(), run.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [step for step, _ in checkpoints(out)] == [1, 2]
    assert checkpoint._damage(out / "checkpoint-000001") == ""
    assert (out / "checkpoint-000001.damaged").is_dir()


def test_no_intact_checkpoint_is_no_reason_to_begin_anew(out):
    before = (out / "metrics.jsonl").read_text()
    for step, path in checkpoints(out):
        cut("__0_0.distcp" if step else ".metadata")(path)
    with pytest.raises(ValueError, match="^resume: .*-000001: __0_0.dis.*-000000: .metadata: ano"):
        resumed(out)
    assert [step for step, _ in checkpoints(out)] == [0, 1]  # where they were
    assert (out / "metrics.jsonl").read_text() == before


def test_a_checkpoint_of_another_model_does_not_fit(out):
    with pytest.raises(ValueError, match="^resume: .*000001 does not fit this run: .*lora"):
        resumed(out, lora_rank=4)
    assert [step for step, _ in checkpoints(out)] == [0, 1]


# harm


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def command_as_metadata(path: Path, command: Command) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(command))


def command_inside_metadata(path: Path, command: Command) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data["x"] = command
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def command_of_a_rank(path: Path, command: Command) -> None:
    (path / ".metadata").write_bytes(b"no pickle")
    (path / "__0.metadata").write_bytes(pickle.dumps(command))


def command_in_place_of(value: str):
    """The values are in one file, where .metadata says; so it can point to others behind them."""

    def tamper(path: Path, command: Command) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        (index, info) = next((i, v) for i, v in metadata.storage_data.items() if value in i.fqn)
        file = io.BytesIO()
        torch.save(command, file)
        at, size = (path / "__0_0.distcp").stat().st_size, len(file.getvalue())
        with open(path / "__0_0.distcp", "ab") as values:
            values.write(file.getvalue())
        metadata.storage_data[index] = replace(info, offset=at, length=size)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    return tamper


def file_elsewhere(path: Path, command: Command) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, relative_path="../checkpoint-000000/x")
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


HARM = {
    "it asks for posix.system, which no": command_as_metadata,
    "it asks for posix.system": command_inside_metadata,
    ".metadata is not that of a checkpoint": command_of_a_rank,
    "it asks for more than plain data": command_in_place_of("param_groups.0.lr"),
    "asks for more than plain data": command_in_place_of("model.policy"),
    "names files elsewhere: ../checkpoint-000000/x": file_elsewhere,
}


@pytest.mark.parametrize("message", HARM)
def test_a_checkpoint_that_was_made_to_do_harm_does_none(out, message):
    shutil.rmtree(out / "checkpoint-000000")
    path = out / "checkpoint-000001"
    HARM[message](path, Command(out / "harm"))
    sign(path)
    with pytest.raises(ValueError, match="^resume: .*checkpoint-000001") as caught:
        resumed(out)
    assert message in str(caught.value)
    assert not (out / "harm").exists()


# written whole, and removed


def test_a_full_disk_costs_no_older_checkpoint(out, monkeypatch):
    def save(*args, **kwargs):
        with full_disk(20_000):
            checkpoint.dcp.state_dict_saver.save(*args, **kwargs)

    @contextmanager
    def finishing(path):
        with named(path), full_disk(10):  # the values find room, the checksums do not
            yield

    for name, value, message in (
        ("dcp.save", save, "checkpoint-000002 cannot be written: OSError: .*File too large"),
        ("named", finishing, "File too large: '.*checkpoint-000002'"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"mem1_kernels.ppo.checkpoint.{name}", value)
            with pytest.raises(OSError, match=message):
                resumed(out)
        assert [step for step, _ in checkpoints(out)] == [0, 1]
        assert not list(out.glob(".*.part"))
    resumed(out)
    assert [step for step, _ in checkpoints(out)] == [1, 2]


def test_a_checkpoint_that_is_half_written_is_none(out, monkeypatch):
    def stops(state, checkpoint_id):
        Path(checkpoint_id).mkdir()
        (Path(checkpoint_id) / "__0_0.distcp").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.dcp, "save", stops)
        with pytest.raises(KeyboardInterrupt):
            resumed(out)
    left = out / ".checkpoint-000002.part"
    assert not left.exists()
    left.mkdir()  # of a run that was killed, on more processes
    (left / "__7_0.distcp").touch()
    resumed(out)
    names = {file.name for file in (out / "checkpoint-000002").iterdir()}
    assert names == {".metadata", SUMS, "__0_0.distcp"}


def test_old_checkpoints_go_whatever_is_in_them(tmp_path):
    for step in range(4):
        (tmp_path / f"checkpoint-{step:06d}" / "notes").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step:06d}" / "notes" / "a.txt").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / "checkpoint-000004").symlink_to(tmp_path / "kept")
    (tmp_path / "checkpoint-000000" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "checkpoint-0000001").mkdir()  # step 1, by another name
    (tmp_path / "checkpoint-best").mkdir()
    drop_old(tmp_path, 3, 2)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3, 4]
    drop_old(tmp_path, 5, 1)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-000004", "checkpoint-best", "kept"}


def test_an_old_checkpoint_that_resists_is_said(tmp_path, monkeypatch):
    for step in range(2):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()

    def rmtree(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", rmtree)
    with pytest.warns(UserWarning, match="checkpoint-000000 cannot be removed .*denied"):
        drop_old(tmp_path, 1, 1)


def test_a_million_steps(tmp_path):
    for step in (5, 999_999, 1_000_000, 1_000_001):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [5, 999_999, 1_000_000, 1_000_001]
