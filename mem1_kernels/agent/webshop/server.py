"""A real WebShop server as a site: the pages of its web application, read over HTTP."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import urljoin

from mem1_kernels.agent._http import HTTP
from mem1_kernels.agent.environment import ToolError
from mem1_kernels.agent.webshop.environment import View

HIDDEN = {"style", "script", "head", "title"}
EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "wbr"}


@dataclass
class _Target:
    """Where a click leads: the address, and whether it is a form that is sent there."""

    url: str
    sent: bool


@dataclass
class _Page:
    texts: list[str] = field(default_factory=list)
    targets: dict[str, _Target] = field(default_factory=dict)
    search: str | None = None
    instruction: str = ""
    reward: float | None = None


class _Reader(HTMLParser):
    """Reads what a visitor sees and may click: buttons of forms, product links, options."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = _Page()
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self._form = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag not in EMPTY:
            self._open.append((tag, attributes))
        if tag == "form":
            self._form = attributes.get("action") or ""
        elif tag == "input" and attributes.get("id") == "search_input":
            self.page.search = self._form
        elif tag == "input" and attributes.get("type") == "radio":
            target = _Target(attributes.get("data-url") or "", sent=False)
            self.page.targets[(attributes.get("value") or "").lower()] = target

    def handle_endtag(self, tag: str) -> None:
        # the pages close headings of one level by another: an end tag closes all h1 to h6 alike
        for place in range(len(self._open) - 1, -1, -1):
            name = self._open[place][0]
            if name == tag or (_is_heading(name) and _is_heading(tag)):
                del self._open[place:]
                return

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        names = [name for name, _ in self._open]
        if not text or HIDDEN.intersection(names):
            return
        ids = [attributes.get("id") for _, attributes in self._open]
        if "instruction-text" in ids:
            self.page.instruction += text.removeprefix("Instruction:").strip()
            return
        if "reward" in ids and "pre" in names:
            self.page.reward = float(text)
        self.page.texts.append(text)
        tag, attributes = self._open[-1] if self._open else ("", {})
        if "button" in names and self.page.search is None:
            self.page.targets[text.lower()] = _Target(self._form, sent=True)
        elif tag == "a" and "product-link" in (attributes.get("class") or "").split():
            self.page.targets[text.lower()] = _Target(attributes.get("href") or "", sent=False)


def _is_heading(tag: str) -> bool:
    return len(tag) == 2 and tag[0] == "h" and tag[1] in "123456"


class RemoteSite:
    """The web application of the original WebShop (`web_agent_site/app.py`); a task is a number.

    Every session is new and plays the goal of that number.

    Args:
        url: where the application runs, such as "http://127.0.0.1:3000".
        timeout, retries: seconds, and further attempts after a failure that may pass.
    """

    def __init__(self, url: str, *, timeout: float = 30.0, retries: int = 3) -> None:
        self.url = url.rstrip("/")
        self._http = HTTP(f"WebShop server {self.url}", timeout=timeout, retries=retries)
        self._address = self.url
        self._page = _Page()

    def open(self, task: int) -> tuple[str, View]:
        """A new session with goal number `task`.

        Raises:
            ToolError: no answer, or a page that is none of WebShop's.
        """
        # the application takes the goal from the end of a session's name that says "fixed"
        view = self._go("GET", f"{self.url}/{uuid.uuid4().hex}_fixed_{task}")
        if not self._page.instruction or not view.searchable:
            raise ToolError(f"WebShop server {self.url}: expected its search page, got another")
        return self._page.instruction, view

    def search(self, keywords: str) -> View:
        """Sends the search form."""
        assert self._page.search is not None
        return self._go("POST", self._page.search, {"search_query": keywords})

    def click(self, name: str) -> View:
        """Sends a form or follows a link."""
        target = self._page.targets[name]
        return self._go("POST" if target.sent else "GET", target.url)

    def _go(self, method: str, url: str, form: dict[str, str] | None = None) -> View:
        response = self._http.request(method, urljoin(self._address, url), data=form)
        self._address = str(response.url)
        reader = _Reader()
        try:
            reader.feed(response.text)
        except ValueError as error:
            raise ToolError(f"WebShop server {self.url}: unreadable page ({error})") from error
        self._page = page = reader.page
        scores = {} if page.reward is None else {"reward": page.reward}
        return View(
            tuple(page.texts), tuple(page.targets), page.search is not None, page.reward, scores
        )
