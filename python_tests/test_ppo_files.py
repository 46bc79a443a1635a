"""Files that are written whole or not at all, and the folder that one run has at a time."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ppo_runs import full_disk

from mem1_kernels.ppo.files import claimed, from_main, named, remove, replaced


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        with replaced(path) as part:
            assert not part.exists()
            part.write_text(text)
            assert path.exists() == (text == "second")
        assert path.read_text() == text
    assert names(tmp_path) == {"a.txt"}


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="a.txt"), full_disk(), replaced(path) as part:
        part.write_text("new")
    with pytest.raises(KeyboardInterrupt), replaced(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), replaced(path):
        pass  # nothing was written
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "policy"
    (tmp_path / ".policy.part").mkdir()  # of a run that was killed
    (tmp_path / ".policy.part" / "stale").touch()
    for text in ("first", "second"):
        with replaced(path) as part:
            (part / "inner").mkdir(parents=True)
            (part / "inner" / text).write_text(text)
        assert names(path / "inner") == {text}
    with pytest.raises(RuntimeError), replaced(path) as part:
        part.mkdir()
        raise RuntimeError
    assert names(path / "inner") == {"second"}
    assert names(tmp_path) == {"policy"}


def test_a_folder_is_put_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "policy"
    path.mkdir()
    (path / "weights").touch()

    def stopped(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(KeyboardInterrupt), replaced(path) as part:
        part.mkdir()
    assert names(tmp_path) == {"policy"}
    assert names(path) == {"weights"}


def test_a_link_goes_on_pointing_to_the_file_that_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "a.txt"
    link.symlink_to(tmp_path / "elsewhere" / "a.txt")
    with replaced(link) as part:
        part.write_text("text")
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "a.txt").read_text() == "text"


def test_what_a_link_points_to_is_not_removed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a.txt").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("old", "link", "none"):
        remove(tmp_path / name)
    assert names(tmp_path) == {"kept"}
    assert names(tmp_path / "kept") == {"a.txt"}


def test_an_error_is_given_the_name_that_it_lacks():
    with pytest.raises(OSError, match="No space left on device: 'metrics.jsonl'"):
        with named(Path("metrics.jsonl")), open("/dev/full", "w") as file:
            file.write("text")
            file.flush()
    with pytest.raises(FileNotFoundError, match="'no/such'"), named(Path("metrics.jsonl")):
        open("no/such")


def test_a_folder_has_one_run_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    with claimed(folder, True):
        with pytest.raises(ValueError, match=rf"^out: another run \(process {os.getpid()} on .*\)"):
            with claimed(folder, True):
                raise AssertionError
        with claimed(tmp_path / "other", True):
            pass
    with claimed(folder, True):
        pass


def test_a_run_that_is_killed_frees_its_folder(tmp_path):
    child = os.fork()
    if child == 0:
        with claimed(tmp_path / "run", True):
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert f"process {child} " in (tmp_path / "run" / ".lock").read_text()
    with claimed(tmp_path / "run", True):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"^out: {path} cannot be written"):
            with claimed(path, True):
                raise AssertionError
    with pytest.raises(OSError, match="^out: .* cannot be written"), full_disk():
        with claimed(tmp_path / "run", True):
            raise AssertionError


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked .Function not implemented."):
        with claimed(tmp_path / "run", True):
            pass


def test_the_main_process_answers_for_all():
    assert from_main(True, lambda: 7) == 7
    assert from_main(False, lambda: 7) is None  # what was broadcast, which here is nothing

    def fails():
        raise ValueError("out: no")

    with pytest.raises(ValueError, match="out: no"):
        from_main(True, fails)
