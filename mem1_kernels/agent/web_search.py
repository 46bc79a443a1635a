"""Web search as a retriever: SerpApi or Serper, with an on-disk cache."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mem1_kernels.agent._http import HTTP
from mem1_kernels.agent.environment import ToolError
from mem1_kernels.agent.retrieval import Passage


@dataclass(frozen=True)
class Provider:
    """How a search service is asked and read.

    Args:
        url: its address.
        key: the environment variable that holds its key.
        ask: (query, topk, key) -> method and arguments of the request.
        organic, answer: names of the list of results and of the direct answer in its reply.
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
    """Search results as passages of title and snippet, behind a direct answer if there is one.

    The key is read from the environment and stands in no cache file and in no error message.
    SerpApi takes it in the URL, which httpx's own logger writes at INFO; Serper in a header.

    Args:
        provider: "serper" or "serpapi".
        cache: folder where replies are kept, one file a query; None for no cache.
        url: another address that speaks the same JSON.
        timeout, retries: seconds, and further attempts after a failure that may pass.

    Raises:
        ValueError: an unknown provider, or no key in the environment.
    """

    def __init__(
        self,
        provider: str = "serper",
        *,
        cache: str | Path | None = None,
        url: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
    ) -> None:
        if provider not in PROVIDERS:
            raise ValueError(f"provider: expected one of {sorted(PROVIDERS)}, got {provider!r}")
        self.name = provider
        self.provider = PROVIDERS[provider]
        self._key = os.environ.get(self.provider.key, "")
        if not self._key:
            raise ValueError(f"{provider}: expected a key in ${self.provider.key}, got none")
        self.url = url or self.provider.url
        self.cache = Path(cache) if cache is not None else None
        self._http = HTTP(provider, timeout=timeout, retries=retries)

    def search(self, queries: Sequence[str], topk: int = 3) -> list[list[Passage]]:
        """At most `topk` passages for each query, best first.

        Raises:
            ToolError: no answer, or one that is no search result.
        """
        if topk < 1:
            raise ValueError(f"topk: expected at least 1, got {topk}")
        return [self._cached(query, topk) for query in queries]

    def _cached(self, query: str, topk: int) -> list[Passage]:
        if self.cache is None:
            return self._ask(query, topk)
        asked = json.dumps([self.name, self.url, query, topk])
        file = self.cache / f"{hashlib.sha256(asked.encode()).hexdigest()}.json"
        if file.exists():
            try:
                found = json.loads(file.read_text("utf-8"))
                if not isinstance(found, list):
                    raise TypeError("no list of passages")
                return [Passage(**passage) for passage in found]
            except (ValueError, TypeError) as error:
                raise ToolError(f"{self.name}: damaged cache file {file}, delete it") from error
        passages = self._ask(query, topk)
        self.cache.mkdir(parents=True, exist_ok=True)
        # written beside and renamed, so that no reader ever sees half of it
        handle, name = tempfile.mkstemp(dir=self.cache, suffix=".part")
        with open(handle, "w", encoding="utf-8") as part:
            json.dump([asdict(passage) for passage in passages], part, ensure_ascii=False)
        os.replace(name, file)
        return passages

    def _ask(self, query: str, topk: int) -> list[Passage]:
        method, arguments = self.provider.ask(query, topk, self._key)
        try:
            return self._http.json(
                method, self.url, lambda reply: self._read(reply, topk), **arguments
            )
        except ToolError as error:
            raise ToolError(str(error).replace(self._key, "***")) from None

    def _read(self, reply: Mapping[str, Any], topk: int) -> list[Passage]:
        results = list(reply.get(self.provider.organic) or [])
        direct = reply.get(self.provider.answer)
        error = str(reply.get("error", ""))
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
