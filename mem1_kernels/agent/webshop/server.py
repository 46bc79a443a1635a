"""A real WebShop server as a site: the pages of its web application, read over HTTP."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import NamedTuple
from urllib.parse import urljoin

from mem1_kernels._secrets import public_address
from mem1_kernels._text import valid_text
from mem1_kernels.agent._http import HTTP, MAX_BYTES, RETRIES, SHOWN, TIMEOUT
from mem1_kernels.agent.environment import ToolError
from mem1_kernels.agent.webshop.environment import View

HIDDEN = {"style", "script", "head", "title"}
EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "wbr"}


@dataclass
class _Target:
    """The address behind a click, and whether a form is sent to it."""

    url: str
    sent: bool


@dataclass
class _Page:
    texts: list[str] = field(default_factory=list)
    targets: dict[str, _Target] = field(default_factory=dict)
    search: str | None = None
    instruction: list[str] = field(default_factory=list)
    reward: float | None = None


class _Open(NamedTuple):
    """An open element, and what the text in it is, given the elements around it."""

    name: str
    product_link: str | None
    hidden: bool
    instruction: bool
    reward: bool
    pre: bool
    button: bool


class _Reader(HTMLParser):
    """Reads the text that a visitor sees and what may be clicked: buttons, products, options.

    The work per element does not depend on the depth of its nesting.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = _Page()
        self._open = [_Open("", None, False, False, False, False, False)]
        self._count: Counter[str] = Counter()
        self._form = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        name, identity = _name(tag), attributes.get("id")
        if tag not in EMPTY:
            outer = self._open[-1]
            linked = tag == "a" and "product-link" in (attributes.get("class") or "").split()
            self._count[name] += 1
            self._open.append(
                _Open(
                    name,
                    product_link=(attributes.get("href") or "") if linked else None,
                    hidden=outer.hidden or tag in HIDDEN,
                    instruction=outer.instruction or identity == "instruction-text",
                    reward=outer.reward or identity == "reward",
                    pre=outer.pre or tag == "pre",
                    button=outer.button or tag == "button",
                )
            )
        if tag == "form":
            self._form = attributes.get("action") or ""
        elif tag == "input" and identity == "search_input":
            self.page.search = self._form
        elif tag == "input" and attributes.get("type") == "radio":
            target = _Target(attributes.get("data-url") or "", sent=False)
            self.page.targets[(attributes.get("value") or "").lower()] = target

    def handle_endtag(self, tag: str) -> None:
        name = _name(tag)
        if not self._count[name]:
            return
        while True:
            closed = self._open.pop().name
            self._count[closed] -= 1
            if closed == name:
                return

    def handle_data(self, data: str) -> None:
        text = " ".join(data.split())
        around = self._open[-1]
        if not text or around.hidden:
            return
        if around.instruction:
            self.page.instruction.append(text.removeprefix("Instruction:").strip())
            return
        if around.reward and around.pre:
            self.page.reward = float(text)
            if not 0 <= self.page.reward <= 1:
                raise ValueError(f"expected a reward from 0 to 1, got {text[:20]!r}")
        self.page.texts.append(text)
        if around.button and self.page.search is None:
            self.page.targets[text.lower()] = _Target(self._form, sent=True)
        elif around.product_link is not None:
            self.page.targets[text.lower()] = _Target(around.product_link, sent=False)


def _name(tag: str) -> str:
    """The name that an end tag closes. WebShop's pages close <h4> by </h5>."""
    return "heading" if len(tag) == 2 and tag[0] == "h" and tag[1] in "123456" else tag


class RemoteSite:
    """The web application of the original WebShop (`web_agent_site/app.py`); a task is a number.

    Every session is new and plays the goal of that number. Links to other servers are errors.

    Args:
        url: where the application runs, such as "http://127.0.0.1:3000"; a user and a password in
            it are sent as Basic authentication and never shown.
        timeout: seconds per attempt, from the connection to the last byte.
        retries: further attempts after a failure that may pass.
        max_bytes: bytes of a page, unpacked; a longer one is an error.

    Raises:
        ValueError: an argument out of its range, an address that is not a http(s) address or has a
            query.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.url = public_address(url).rstrip("/")
        if "?" in url:
            raise ValueError(f"url: expected an address without a query, got {self.url}?...")
        self._http = HTTP(
            f"WebShop server {self.url}",
            url,
            timeout=timeout,
            retries=retries,
            max_bytes=max_bytes,
        )
        self._address = self.url
        self._page = _Page()

    def open(self, task: int) -> tuple[str, View]:
        """A new session with goal number `task`.

        Raises:
            TypeError: a task that is not a number from 0.
            ToolError: no answer, or a page that is none of WebShop's.
        """
        if isinstance(task, bool) or not isinstance(task, int) or task < 0:
            raise TypeError(f"task: expected the number of a goal, got {task!r}")
        # the application takes the goal from the end of a session's name that says "fixed"
        view = self._go("GET", f"{self.url}/{uuid.uuid4().hex}_fixed_{task}")
        instruction = " ".join(filter(None, self._page.instruction))
        if not instruction or not view.searchable:
            raise ToolError(f"WebShop server {self.url}: expected its search page, got another")
        return instruction, view

    def search(self, keywords: str) -> View:
        """Sends the search form."""
        assert self._page.search is not None
        return self._go("POST", self._page.search, {"search_query": valid_text(keywords)})

    def click(self, name: str) -> View:
        """Sends a form or follows a link."""
        target = self._page.targets[name]
        return self._go("POST" if target.sent else "GET", target.url)

    def _go(self, method: str, url: str, form: dict[str, str] | None = None) -> View:
        problem = ""
        try:
            address = urljoin(self._address, url)
        except ValueError:
            raise ToolError(f"WebShop server {self.url}: a link that is not an address") from None
        reply = self._http.request(method, address, form=form)
        self._address = reply.url
        reader = _Reader()
        try:
            reader.feed(reply.text)
        except (ValueError, AssertionError) as error:  # the parser asserts what a page may hold
            problem = f"unreadable page ({str(error)[:SHOWN]})"
        if problem:
            raise ToolError(f"WebShop server {self.url}: {problem}")
        self._page = page = reader.page
        scores = {} if page.reward is None else {"reward": page.reward}
        return View(
            tuple(page.texts), tuple(page.targets), page.search is not None, page.reward, scores
        )
