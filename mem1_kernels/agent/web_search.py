"""Web search as a retriever: SerpApi or Serper, with an on-disk cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mem1_kernels._secrets import public_address
from mem1_kernels._text import valid_text
from mem1_kernels.agent._files import parse_json, written_whole
from mem1_kernels.agent._http import HTTP, MAX_BYTES, RETRIES, SHOWN, TIMEOUT
from mem1_kernels.agent.environment import ToolError
from mem1_kernels.agent.retrieval import Passage, check_search


@dataclass(frozen=True)
class Provider:
    """How to ask a search service and read its reply.

    Args:
        url: its address.
        key: the environment variable with its key.
        ask: (query, topk, key) -> method and arguments of the request.
        organic, answer: the fields of a reply with the results and with the direct answer.
    """

    url: str
    key: str
    ask: Callable[[str, int, str], tuple[str, dict[str, Any]]]
    organic: str
    answer: str


def _ask_serper(query: str, topk: int, key: str) -> tuple[str, dict[str, Any]]:
    return "POST", {"json": {"q": query, "num": topk}, "headers": {"X-API-KEY": key}}


def _ask_serpapi(query: str, topk: int, key: str) -> tuple[str, dict[str, Any]]:
    return "GET", {"params": {"engine": "google", "q": query, "num": topk, "api_key": key}}


PROVIDERS = {
    "serper": Provider(
        "https://google.serper.dev/search", "SERPER_API_KEY", _ask_serper, "organic", "answerBox"
    ),
    "serpapi": Provider(
        "https://serpapi.com/search.json",
        "SERPAPI_API_KEY",
        _ask_serpapi,
        "organic_results",
        "answer_box",
    ),
}


class WebSearch:
    """Search results as passages of title and snippet; a direct answer, if any, comes first.

    The key is read from the environment. It stands in no result, no cache file, no error message
    and no log record, also where the server echoes it.

    Args:
        provider: "serper" or "serpapi".
        cache: folder where replies are kept, one file per query; several processes may share it.
            None: no cache.
        url: another address that speaks the same JSON.
        timeout: seconds per attempt, from the connection to the last byte.
        retries: further attempts after a failure that may pass.
        max_bytes: bytes of a reply, unpacked; a longer one is an error.

    Raises:
        ValueError: an unknown provider, no key in the environment or one that no header can hold,
            an argument out of its range.
    """

    def __init__(
        self,
        provider: str = "serper",
        *,
        cache: str | Path | None = None,
        url: str | None = None,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if provider not in PROVIDERS:
            raise ValueError(f"provider: expected one of {sorted(PROVIDERS)}, got {provider!r}")
        self.name = provider
        self.provider = PROVIDERS[provider]
        self._key = os.environ.get(self.provider.key, "").strip()
        if not self._key:
            raise ValueError(f"{provider}: expected a key in ${self.provider.key}, got none")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(f"{provider}: expected printable ASCII in ${self.provider.key}")
        address = url or self.provider.url
        self.url = public_address(address)
        self.cache = Path(cache) if cache is not None else None
        self._http = HTTP(
            provider,
            address,
            secrets=[self._key],
            timeout=timeout,
            retries=retries,
            max_bytes=max_bytes,
        )

    def search(self, queries: Sequence[str], topk: int = 3) -> list[list[Passage]]:
        """At most `topk` passages for each query, best first.

        Raises:
            ToolError: no answer, one that is not a search result, or a cache that cannot be used.
        """
        check_search(queries, topk)
        return [self._cached(valid_text(query), topk) for query in queries]

    def _cached(self, query: str, topk: int) -> list[Passage]:
        if self.cache is None:
            return self._ask(query, topk)
        asked = json.dumps([self.name, self.url, query, topk])
        file = self.cache / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"
        problem = ""
        try:
            if file.exists():
                return _read_cached(file)
        except OSError as error:
            problem = f"cannot read the cache file {file}: {error.strerror}"
        except ValueError as error:
            problem = f"damaged cache file {file} ({error}), delete it"
        if problem:
            raise ToolError(f"{self.name}: {problem}")
        passages = self._ask(query, topk)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as part:
                json.dump([asdict(passage) for passage in passages], part, ensure_ascii=False)
        except OSError as error:
            problem = f"cannot write the cache file {file}: {error.strerror}"
        if problem:
            raise ToolError(f"{self.name}: {problem}")
        return passages

    def _ask(self, query: str, topk: int) -> list[Passage]:
        method, arguments = self.provider.ask(query, topk, self._key)
        return self._http.json(method, lambda reply: self._read(reply, topk), **arguments)

    def _read(self, reply: Mapping[str, Any], topk: int) -> list[Passage]:
        results = list(reply.get(self.provider.organic) or [])
        direct = reply.get(self.provider.answer)
        error = str(reply.get("error", ""))[:SHOWN]
        # SerpApi calls it an error when nothing was found: "... hasn't returned any results ..."
        if error and not results and not direct and "any results" not in error:
            raise ToolError(f"{self.name}: {error}")
        answer = [direct] if isinstance(direct, Mapping) else []
        passages = []
        for result in [*answer, *results][:topk]:
            text = result.get("answer") or result.get("snippet") or ""
            title = result.get("title") or "Untitled"
            passages.append(Passage(str(result.get("link", "")), f"{title}\n{text}"))
        return passages


def _read_cached(file: Path) -> list[Passage]:
    """The passages of a cache file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    found = parse_json(file.read_text("utf-8"))
    if not isinstance(found, list):
        raise ValueError("no list of passages")
    try:
        return [Passage(**passage) for passage in found]
    except TypeError as error:
        raise ValueError(str(error)) from None
