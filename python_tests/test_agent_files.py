"""Text and files as they come: encodings, line ends, damage, and a line that says what is wrong."""

from __future__ import annotations

import json
import os
import stat

import pytest
from local_server import serve

from mem1_kernels._text import valid_text
from mem1_kernels.agent._files import parse_json, read_jsonl, written_whole
from mem1_kernels.agent.environment import ToolError
from mem1_kernels.agent.qa import load_questions
from mem1_kernels.agent.retrieval import RetrievalServer, open_retriever, read_corpus

LINES = ['{"id": "1", "contents": "café\\nx"}', '{"id": "2", "contents": "b"}']


def same(value):
    return value


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("plain", "plain"),
        ("汉字 😀", "汉字 😀"),
        ("\ud83d", "\ufffd"),
        ("\ude00", "\ufffd"),
        ("a\ud83db", "a\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ud83d\ude00", "\ufffd😀"),
        ("\udce9", "\ufffd"),  # what os.fsdecode makes of a byte that is none
        ("\x00\ufeff", "\x00\ufeff"),
    ],
)
def test_valid_text(text, valid):
    assert valid_text(text) == valid
    valid_text(text).encode()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks(tmp_path, end, last, mark):
    path = tmp_path / "x.jsonl"
    text = end.join(["", *LINES, ""]) if last else end.join(LINES)
    path.write_bytes(mark + text.encode())
    assert read_jsonl(path, same) == [json.loads(line) for line in LINES]
    assert [passage.contents for passage in read_corpus(path)] == ["café\nx", "b"]


def test_separators_of_unicode_end_no_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": "b\u2028c\u0085d\x0b"}, ensure_ascii=False), encoding="utf-8")
    assert read_jsonl(path, same) == [{"a": "b\u2028c\u0085d\x0b"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("\n".join(LINES).encode("utf-16"), ": expected UTF-8, got UTF-16; convert it"),
        (b"\xfe\xff" + "{}".encode("utf-16-be"), ": expected UTF-8, got UTF-16"),
        ("{}".encode("utf-32"), ": expected UTF-8, got UTF-32"),
        ("{}\n".encode("utf-16-le"), ", line 1: expected JSON .*, got '{.x00}.x00'"),
        (
            b'{"a": 1}\n{"a": "caf\xe9"}\n',
            r", line 2: expected UTF-8, got byte b'.xe9' at column 11",
        ),
        (b'{"a": 1}\n\n{"a":\n', r", line 3: expected JSON \(.* at column 6\), got '{\"a\":'"),
        (b"[" * 200_000, r", line 1: expected JSON \(nested too deeply\), got '\[\[.*…'"),
        (b'{"a": Infinity}', r", line 1: expected JSON \(Infinity is no JSON number\)"),
        (b"", ": expected one JSON object per line, got an empty file"),
        (b"\xef\xbb\xbf\n \r\n", ": expected one JSON object per line, got an empty file"),
        (b'{"a": 1}{"a": 2}\n', ", line 1: expected JSON .Extra data at column 9"),
        (b'{"a": 1}\r{"a": 2}\r', ", line 1: expected JSON .Extra data"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, data, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^corpus: {path}{message}") as caught:
        read_jsonl(path, same, option="corpus")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("id"), "expected 'id', got"),
        (ValueError("no good"), "no good, got"),
        (TypeError("no good"), "no good, got"),
        (AttributeError("no good"), "no good, got"),
        (IndexError("no good"), "no good, got"),
    ],
)
def test_a_record_that_does_not_fit(tmp_path, error, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}')

    def read(value):
        raise error

    with pytest.raises(ValueError, match=f"^{path}, line 1: {message} '{{\"a\": 1}}'$"):
        read_jsonl(path, read)


@pytest.mark.parametrize("read", [open_retriever, load_questions])
def test_a_file_that_cannot_be_opened(tmp_path, read, monkeypatch):
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(
        FileNotFoundError, match="^data: .*missing.jsonl: No such file or directory$"
    ):
        read(tmp_path / "missing.jsonl", option="data")
    with pytest.raises(IsADirectoryError, match="^data: .*folder.jsonl: Is a directory$"):
        read(folder, option="data")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="^data: .*x.jsonl: Not a directory$"):
        read(tmp_path / "file" / "x.jsonl", option="data")

    def refused(*_):
        raise PermissionError(13, "Permission denied", "x.jsonl")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(PermissionError, match="^data: x.jsonl: Permission denied$"):
        read("x.jsonl", option="data")


def test_json_as_it_is_written_down():
    assert parse_json('{"a\\ud83d": ["\\ude00", 1.5, null, true]}') == {
        "a\ufffd": ["\ufffd", 1.5, None, True]
    }
    for text in ("NaN", "[-Infinity]", "", "{'a': 1}", "[" * 99_999, '{"a":' * 99_999):
        with pytest.raises(ValueError):
            parse_json(text)


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with written_whole(path) as file:
            file.write("half")
            file.flush()
            assert path.read_text() == "old"
            raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with written_whole(path) as file:
        file.write("né")
    assert path.read_text(encoding="utf-8") == "né" and list(tmp_path.iterdir()) == [path]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, "as any file that open() makes"


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with written_whole(tmp_path / "link") as file:
        file.write("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "x"
    with written_whole("/dev/null") as file:
        file.write("x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        with written_whole(tmp_path / "no" / "x.txt"):
            raise AssertionError("nothing may be written")


@pytest.mark.parametrize("path", ["a\0b.jsonl", "\ud83d.jsonl"])
def test_a_name_that_no_file_can_have(path):
    for read in (open_retriever, load_questions):
        with pytest.raises(ValueError, match="no file can have this name"):
            read(path)


@pytest.mark.parametrize("path", [None, 5, b"a.jsonl"])
def test_a_path_of_another_type(path):
    with pytest.raises(TypeError, match="corpus: expected a path, got"):
        open_retriever(path)
    with pytest.raises(TypeError, match="path: expected a path, got"):
        load_questions(path)


def test_a_file_name_does_not_steer_the_terminal():
    for read in (open_retriever, load_questions):
        with pytest.raises(FileNotFoundError) as caught:
            read("\x1b[31m.jsonl")
        assert "\\x1b[31m.jsonl: No such file" in str(caught.value)


def test_numbers_that_no_float_can_hold(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "q", "golden_answers": [10**400]}))
    with pytest.raises(ValueError, match="line 1: golden_answers: expected texts or numbers, got"):
        load_questions(path)
    reply = {"result": [[{"document": {"id": "1", "contents": "a"}, "score": 10**400}]]}
    with serve(lambda request: reply) as server:
        with pytest.raises(ToolError, match="score: expected a finite number, got 1000"):
            RetrievalServer(server.url, retries=0).search(["q"])
