"""Passages for a query: BM25 over a local corpus, or a server that speaks `POST /retrieve`.

The corpus format is the one of Search-R1 and MEM1: a JSON object per line, `{"id", "contents"}`,
with the title on the first line of `contents` and the text below.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mem1_kernels._secrets import public_address
from mem1_kernels._text import valid_text
from mem1_kernels.agent._files import is_number, path_name, read_jsonl, written_whole
from mem1_kernels.agent._http import HTTP, MAX_BYTES, RETRIES, TIMEOUT
from mem1_kernels.agent._words import Words, split_words
from mem1_kernels.rollout.engine import check_count


@dataclass(frozen=True)
class Passage:
    """A passage, found with `score` (higher is better; 0 where none is known).

    Raises:
        TypeError: contents that are not text. Lone surrogates in them become U+FFFD.

    >>> passage = Passage("7", '"Chad"\\nIts capital is N\\'Djamena.')
    >>> passage.title, passage.text
    ('Chad', "Its capital is N'Djamena.")
    """

    id: str
    contents: str
    score: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.contents, str):
            raise TypeError(f"contents: expected text, got {type(self.contents).__name__}")
        object.__setattr__(self, "contents", valid_text(self.contents))

    @property
    def title(self) -> str:
        """The first line, out of its quotation marks."""
        return self.contents.partition("\n")[0].strip().strip('"')

    @property
    def text(self) -> str:
        """What stands below the title."""
        return self.contents.partition("\n")[2]


class Retriever(Protocol):
    """Anything that finds passages, for several queries at once."""

    def search(self, queries: Sequence[str], topk: int) -> list[list[Passage]]:
        """At most `topk` passages for each query, best first."""


def read_corpus(path: str | Path, *, option: str = "") -> list[Passage]:
    """Reads a JSONL corpus.

    Args:
        option: what the caller calls `path`, for error messages.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a line that is not a JSON object with "id" and "contents", an id that occurs
            twice, or an empty file; see `read_jsonl`.
    """
    seen: set[str] = set()

    def read(record: Any) -> Passage:
        if not isinstance(record, Mapping) or not {"id", "contents"} <= record.keys():
            raise TypeError('expected {"id", "contents"}')
        passage = _passage(record["id"], record["contents"])
        if passage.id in seen:
            raise ValueError(f"id: expected each one once, but {passage.id!r} stands above")
        seen.add(passage.id)
        return passage

    return read_jsonl(path, read, option=option)


def _passage(identifier: Any, contents: Any, score: Any = 0.0) -> Passage:
    """A passage from parts of a JSON object; another type raises TypeError."""
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise TypeError(f"id: expected text or a whole number, got {identifier!r}")
    if not is_number(score):
        raise TypeError(f"score: expected a finite number, got {score!r:.80}")
    return Passage(str(identifier), contents, float(score))


def write_corpus(passages: Iterable[Passage], path: str | Path) -> None:
    """Writes a JSONL corpus that `read_corpus`, Search-R1 and MEM1 read; whole, or not at all."""
    with written_whole(path) as file:
        for passage in passages:
            record = {"id": passage.id, "contents": passage.contents}
            file.write(valid_text(json.dumps(record, ensure_ascii=False)) + "\n")


class BM25:
    """BM25 over passages in memory, by bm25s (`pip install mem1-kernels[agent]`).

    A passage is found by any of its words, in any script (`_words.split_words` says what a word
    is). Single letters are ranked apart and their score is added, so that they do not change the
    order where a query has none. English stop words and symbols count only in a query that has
    no other known word.
    Passages that share no word with the query are not returned.

    Raises:
        ValueError: no passages.

    >>> corpus = BM25([Passage("a", "Chad\\nCapital: N'Djamena"), Passage("b", "乍得的首都")])
    >>> queries = ["capital of Chad", "乍得首都", "!"]
    >>> [[passage.id for passage in found] for found in corpus.search(queries, 2)]
    [['a'], ['b'], []]
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        if not passages:
            raise ValueError("passages: expected at least one, got none")
        self.passages = list(passages)
        texts = [split_words(passage.contents) for passage in self.passages]
        self._words = _Index([text.words for text in texts])
        self._others = _Index([text.short + text.light for text in texts])

    @classmethod
    def from_jsonl(cls, path: str | Path, *, option: str = "") -> BM25:
        """Indexes a JSONL corpus; arguments and errors are those of `read_corpus`."""
        return cls(read_corpus(path, option=option))

    def search(self, queries: Sequence[str], topk: int = 3) -> list[list[Passage]]:
        """At most `topk` passages for each query, best first.

        Raises:
            ValueError: topk < 1.
            TypeError: queries that are not a sequence of texts; a topk that is no integer.
        """
        check_search(queries, topk)
        return [self._find(split_words(query), topk) for query in queries]

    def _find(self, asked: Words, topk: int) -> list[Passage]:
        words = self._words.known(asked.words)
        others = self._others.known(asked.words + asked.short)
        if not words and not others:
            others = self._others.known(asked.light)
        count = min(topk, len(self.passages))
        if not others:
            best = self._words.best(words, count)
        elif not words:
            best = self._others.best(others, count)
        else:
            scores = self._words.scores(words) + self._others.scores(others)
            places = (-scores).argsort(kind="stable")[:count]
            best = zip(places.tolist(), scores[places].tolist(), strict=True)
        return [replace(self.passages[place], score=score) for place, score in best if score > 0]


class _Index:
    """A bm25s index over lists of words."""

    def __init__(self, texts: Sequence[list[str]]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ImportError(
                "bm25s is not installed (`pip install mem1-kernels[agent]`)"
            ) from error
        self._index = bm25s.BM25()
        self._vocabulary = {word for text in texts for word in text}
        if self._vocabulary:
            self._index.index(texts, show_progress=False)

    def known(self, words: Sequence[str]) -> list[str]:
        """Those of the words that stand in a text."""
        return [word for word in words if word in self._vocabulary]

    def scores(self, known: list[str]) -> Any:
        """The score of every text, for words that are known."""
        return self._index.get_scores(known)

    def best(self, known: list[str], count: int) -> Iterable[tuple[int, float]]:
        """(place, score) of the best texts, for words that are known; nothing for no words."""
        if not known:
            return []
        places, scores = self._index.retrieve([known], k=count, show_progress=False)
        return zip(places[0].tolist(), scores[0].tolist(), strict=True)


def is_address(text: str | Path) -> bool:
    """Whether a text is an http(s) address.

    >>> is_address("http://127.0.0.1:8013/retrieve"), is_address("corpus.jsonl")
    (True, False)
    """
    return str(text).startswith(("http://", "https://"))


def open_retriever(corpus: str | Path, *, option: str = "corpus") -> Retriever:
    """The retriever that a text names.

    Args:
        corpus: a path that ends in `.jsonl` (BM25 over that corpus), the http(s) address of a
            retrieval server, or "factbook" (BM25 over the World Factbook, `mem1-kernels[data]`).
        option: what the caller calls `corpus`, for the error message.

    Raises:
        OSError, ValueError: none of the three, or a corpus that cannot be read.
        ImportError: a package that is not installed.
    """
    path_name(corpus, option)
    if is_address(corpus):
        try:
            return RetrievalServer(str(corpus))
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
    if str(corpus) == "factbook":
        from mem1_kernels.agent.factbook import Factbook

        return BM25(Factbook().passages)
    if Path(corpus).suffix == ".jsonl":
        return BM25.from_jsonl(corpus, option=option)
    raise ValueError(
        f"{option}: expected a .jsonl corpus, the address of a retrieval server or 'factbook', "
        f"got {public_address(str(corpus))!r}"
    )


class RetrievalServer:
    """A server that speaks the protocol of Search-R1 and MEM1.

    `POST {url} {"queries": [...], "topk": k, "return_scores": true}` is answered by `{"result":
    [[{"document": {"id", "contents"}, "score"}, ...], ...]}`, one list per query.

    Args:
        url: the address, such as "http://127.0.0.1:8013/retrieve"; a user and a password in it are
            sent as Basic authentication and never shown, and so is its query.
        timeout: seconds per attempt, from the connection to the last byte.
        retries: further attempts after a failure that may pass.
        max_bytes: bytes of a reply, unpacked; a longer one is an error.

    Raises:
        ValueError: an argument out of its range, or `url` is no http(s) address.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.url = public_address(url)
        self._http = HTTP(
            f"retrieval server {self.url}",
            url,
            timeout=timeout,
            retries=retries,
            max_bytes=max_bytes,
        )

    def search(self, queries: Sequence[str], topk: int = 3) -> list[list[Passage]]:
        """At most `topk` passages for each query, best first.

        Raises:
            ToolError: no answer, or one that does not fit the queries.
        """
        check_search(queries, topk)
        if not queries:
            return []
        asked = {"queries": [valid_text(q) for q in queries], "topk": topk, "return_scores": True}

        def read(reply: Any) -> list[list[Passage]]:
            found = [[_read_hit(hit) for hit in hits[:topk]] for hits in reply["result"]]
            if len(found) != len(queries):
                raise IndexError(f"expected {len(queries)} lists, got {len(found)}")
            return found

        return self._http.json("POST", read, json=asked)


def _read_hit(hit: Mapping[str, Any]) -> Passage:
    document = hit.get("document", hit)
    contents = document.get("contents")
    if contents is None:
        contents = f"{document['title']}\n{document['text']}"
    score = hit.get("score")
    return _passage(document.get("id", ""), contents, 0.0 if score is None else score)


def check_search(queries: Sequence[str], topk: int) -> None:
    """Raises unless the arguments are those of a `Retriever.search`."""
    if isinstance(queries, str):
        raise TypeError("queries: expected a sequence of queries, got one string")
    if not isinstance(queries, Sequence):
        raise TypeError(f"queries: expected a sequence of queries, got {type(queries).__name__}")
    for query in queries:
        if not isinstance(query, str):
            raise TypeError(f"queries: expected texts, got {query!r}")
    check_count("topk", topk)


def show_passages(passages: Sequence[Passage]) -> str:
    """The passages as an observation, numbered, in the form that Search-R1 and MEM1 trained on.

    >>> show_passages([Passage("a", "Chad\\nIn Africa.")])
    'Doc 1(Title: Chad) In Africa.'
    >>> show_passages([])
    'Nothing was found.'
    """
    lines = [
        f"Doc {number}(Title: {passage.title}) {passage.text}"
        for number, passage in enumerate(passages, 1)
    ]
    return "\n".join(lines) if lines else "Nothing was found."
