"""Passages for a query: BM25 over a local corpus, or a server that speaks `POST /retrieve`.

The corpus format is the one of Search-R1 and MEM1: a JSON object a line, `{"id", "contents"}`, with
the title on the first line of `contents` and the text below.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mem1_kernels.agent._http import HTTP


@dataclass(frozen=True)
class Passage:
    """A passage, found with `score` (higher is better; 0 where none is known).

    >>> passage = Passage("7", '"Chad"\\nIts capital is N\\'Djamena.')
    >>> passage.title, passage.text
    ('Chad', "Its capital is N'Djamena.")
    """

    id: str
    contents: str
    score: float = 0.0

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


def read_corpus(path: str | Path) -> list[Passage]:
    """Reads a JSONL corpus.

    Raises:
        ValueError: a line that is no JSON object with "id" and "contents", with its number.
    """
    passages = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                passages.append(Passage(str(record["id"]), str(record["contents"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{path}, line {number}: expected {{"id", "contents"}}, got {line[:80]!r}'
                ) from error
    return passages


def write_corpus(passages: Iterable[Passage], path: str | Path) -> None:
    """Writes a JSONL corpus that `read_corpus`, Search-R1 and MEM1 read."""
    with open(path, "w", encoding="utf-8") as file:
        for passage in passages:
            record = {"id": passage.id, "contents": passage.contents}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


class BM25:
    """BM25 over passages in memory, by bm25s (`pip install mem1-kernels[agent]`).

    Passages that share no word with the query are not returned.

    Raises:
        ValueError: no passages.

    >>> corpus = BM25([Passage("a", "Chad\\nCapital: N'Djamena"), Passage("b", "Mali\\nBamako")])
    >>> [[passage.id for passage in found] for found in corpus.search(["capital of Chad", "!"], 2)]
    [['a'], []]
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ImportError(
                "bm25s is not installed (`pip install mem1-kernels[agent]`)"
            ) from error
        if not passages:
            raise ValueError("passages: expected at least one, got none")
        self.passages = list(passages)
        self._tokenize: Callable[..., Any] = bm25s.tokenize
        self._index = bm25s.BM25()
        words = self._words([passage.contents for passage in self.passages])
        self._vocabulary = {word for document in words for word in document}
        if self._vocabulary:
            self._index.index(words, show_progress=False)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> BM25:
        """Indexes a JSONL corpus."""
        return cls(read_corpus(path))

    def search(self, queries: Sequence[str], topk: int = 3) -> list[list[Passage]]:
        """At most `topk` passages for each query, best first."""
        _check_topk(topk)
        found = []
        for words in self._words(queries) if queries else []:
            known = [word for word in words if word in self._vocabulary]
            found.append(self._best(known, topk) if known else [])
        return found

    def _best(self, words: list[str], topk: int) -> list[Passage]:
        count = min(topk, len(self.passages))
        places, scores = self._index.retrieve([words], k=count, show_progress=False)
        best = zip(places[0].tolist(), scores[0].tolist(), strict=True)
        return [
            Passage(self.passages[place].id, self.passages[place].contents, score)
            for place, score in best
            if score > 0
        ]

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        return self._tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)


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
        ValueError: none of the three, or a corpus that cannot be read.
        ImportError: a package that is not installed.
    """
    if is_address(corpus):
        return RetrievalServer(str(corpus))
    if str(corpus) == "factbook":
        from mem1_kernels.agent.factbook import Factbook

        return BM25(Factbook().passages)
    if Path(corpus).suffix == ".jsonl":
        return BM25.from_jsonl(corpus)
    raise ValueError(
        f"{option}: expected a .jsonl corpus, the address of a retrieval server or 'factbook', "
        f"got {str(corpus)!r}"
    )


class RetrievalServer:
    """A server that speaks the protocol of Search-R1 and MEM1.

    `POST {url} {"queries": [...], "topk": k, "return_scores": true}` is answered by `{"result":
    [[{"document": {"id", "contents"}, "score"}, ...], ...]}`, one list a query.

    Args:
        url: the address, such as "http://127.0.0.1:8013/retrieve".
        timeout, retries: seconds, and further attempts after a failure that may pass.
    """

    def __init__(self, url: str, *, timeout: float = 30.0, retries: int = 3) -> None:
        self.url = url
        self._http = HTTP(f"retrieval server {url}", timeout=timeout, retries=retries)

    def search(self, queries: Sequence[str], topk: int = 3) -> list[list[Passage]]:
        """At most `topk` passages for each query, best first.

        Raises:
            ToolError: no answer, or one that does not fit the queries.
        """
        _check_topk(topk)
        if not queries:
            return []
        asked = {"queries": list(queries), "topk": topk, "return_scores": True}

        def read(reply: Any) -> list[list[Passage]]:
            found = [[_read_hit(hit) for hit in hits][:topk] for hits in reply["result"]]
            if len(found) != len(queries):
                raise IndexError(f"expected {len(queries)} lists, got {len(found)}")
            return found

        return self._http.json("POST", self.url, read, json=asked)


def _read_hit(hit: Mapping[str, Any]) -> Passage:
    document = hit.get("document", hit)
    contents = document.get("contents")
    if contents is None:
        contents = f"{document['title']}\n{document['text']}"
    return Passage(str(document.get("id", "")), str(contents), float(hit.get("score", 0.0)))


def _check_topk(topk: int) -> None:
    if topk < 1:
        raise ValueError(f"topk: expected at least 1, got {topk}")


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
