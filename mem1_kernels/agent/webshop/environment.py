"""WebShop in text: search, look at products, choose options, buy.

The environment uses a site: `ShopSite` is the procedural shop in this process, `RemoteSite`
(`server.py`) a real WebShop server. A page is shown as in the original's text mode: pieces of text
with [SEP] between them, then the actions that it allows.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mem1_kernels.agent.environment import Step
from mem1_kernels.agent.tags import MALFORMED, WEBSHOP, ParsedTurn, TagSet
from mem1_kernels.agent.webshop.catalogue import Product
from mem1_kernels.agent.webshop.shop import Goal, Shop, reward

PER_PAGE = 10
BACK, PREVIOUS, NEXT, BUY = "back to search", "< prev", "next >", "buy now"
DETAILS = ("description", "features")


@dataclass(frozen=True)
class View:
    """A page of a site.

    Args:
        texts: the pieces of text of the page.
        clickables: what may be clicked, in lower case.
        searchable: the page has a search bar.
        reward: of the purchase, once something has been bought; None before.
        scores: parts of that reward by name.
    """

    texts: tuple[str, ...]
    clickables: tuple[str, ...] = ()
    searchable: bool = False
    reward: float | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)


class Site(Protocol):
    """A shop for one customer at a time."""

    def open(self, task: Any) -> tuple[str, View]:
        """A new session: the customer's instruction, and the first page."""

    def search(self, keywords: str) -> View:
        """The results for keywords; only asked where the page is searchable."""

    def click(self, name: str) -> View:
        """The page after a click on something clickable of the last page."""


class ShopSite:
    """The procedural shop as a site; a task is a `Goal`.

    >>> shop = Shop(products=300)
    >>> site, goal = ShopSite(shop), shop.goals(1)[0]
    >>> _ = site.open(goal)
    >>> site.search(goal.product.title).clickables[:2]
    ('back to search', 'next >')
    >>> site.click(goal.product.asin.lower()).texts[-1]
    'Buy Now'
    """

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self._goal: Goal | None = None
        self._where = "search"
        self._results: list[Product] = []
        self._page = 1
        self._product: Product | None = None
        self._options: dict[str, str] = {}

    def open(self, task: Goal) -> tuple[str, View]:
        """A new session."""
        if not isinstance(task, Goal):
            raise TypeError(f"task: expected a Goal, got {type(task).__name__}")
        self._goal, self._options = task, {}
        return task.instruction, self._search_page()

    def search(self, keywords: str) -> View:
        """The first page of results."""
        self._results = self.shop.search(keywords)
        return self._results_page(1)

    def click(self, name: str) -> View:
        """Follows a link, chooses an option or buys."""
        if name == BACK:
            return self._search_page()
        if self._where == "results":
            if name in (NEXT, PREVIOUS):
                return self._results_page(self._page + (1 if name == NEXT else -1))
            return self._product_page(self.shop.products[name.upper()])
        assert self._product is not None and self._goal is not None
        if self._where == "detail":
            return self._product_page(self._product)
        if name == PREVIOUS:
            return self._results_page(self._page)
        if name in DETAILS:
            return self._detail_page(self._product, name)
        if name == BUY:
            bought = reward(self._product, self._goal, self._options)._asdict()
            return View((), reward=bought.pop("total"), scores=bought)
        for option, values in self._product.options.items():
            if name in values:
                self._options[option] = name
        return self._product_page(self._product)

    def _search_page(self) -> View:
        self._where = "search"
        return View(("WebShop", "Search"), searchable=True)

    def _results_page(self, page: int) -> View:
        self._where, self._page, self._options = "results", page, {}
        shown = self._results[(page - 1) * PER_PAGE : page * PER_PAGE]
        total = len(self._results)
        steps = [PREVIOUS] * (page > 1) + [NEXT] * (page * PER_PAGE < total)
        texts = ["Back to Search", f"Page {page} (Total results: {total})"]
        texts += [step.capitalize() for step in steps]
        for item in shown:
            texts += [item.asin, item.title, f"${item.price:.2f}"]
        return View(tuple(texts), (BACK, *steps, *(item.asin.lower() for item in shown)))

    def _product_page(self, product: Product) -> View:
        self._where, self._product = "product", product
        texts = ["Back to Search", "< Prev"]
        for option, values in product.options.items():
            texts += [
                option,
                *(f"{v} (chosen)" if v in self._options.values() else v for v in values),
            ]
        texts += [
            product.title,
            f"Price: ${product.price:.2f}",
            "Description",
            "Features",
            "Buy Now",
        ]
        choices = [value for values in product.options.values() for value in values]
        return View(tuple(texts), (BACK, PREVIOUS, *choices, *DETAILS, BUY))

    def _detail_page(self, product: Product, name: str) -> View:
        self._where = "detail"
        told = (product.description,) if name == "description" else product.features
        return View(("Back to Search", "< Prev", *told), (BACK, PREVIOUS))


class WebShop:
    """Shopping on a site. Buying ends the episode, with the reward of the purchase.

    An action is `search[keywords]` or `click[something on the page]`, in any case. Another action
    and a turn that cannot be read cost a turn: the page stays, with a line that says so.

    >>> shop = Shop(products=300)
    >>> environment, goal = WebShop(ShopSite(shop)), shop.goals(1)[0]
    >>> prompt = environment.reset(goal)
    >>> actions = [f"search[{goal.product.title}]", f"click[{goal.product.asin}]"]
    >>> actions += [f"click[{value}]" for value in goal.options.values()] + ["click[Buy Now]"]
    >>> turns = [ParsedTurn("act", "", action, True) for action in actions]
    >>> [environment.step(turn).reward for turn in turns]
    [0.0, 0.0, 0.0, 0.0, 1.0]
    """

    def __init__(self, site: Site, *, tags: TagSet = WEBSHOP) -> None:
        if set(tags.actions) != {"act"}:
            raise ValueError(f"tags: expected one action, act, got {sorted(tags.actions)}")
        self.site = site
        self.tags = tags
        self._view: View | None = None

    def __copy__(self) -> WebShop:
        """An environment for another customer, with a copy of the site."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | {"site": copy.copy(self.site)}
        return other

    def reset(self, task: Any) -> str:
        """Begins a session; the task is what the site takes."""
        instruction, self._view = self.site.open(task)
        return _prompt(instruction, self.tags) + "\n" + _show(self._view)

    def step(self, turn: ParsedTurn) -> Step:
        """Does what the turn says.

        Raises:
            RuntimeError: no session is open, or something has been bought in it.
            ToolError: the site failed.
        """
        view = self._view
        if view is None or view.reward is not None:
            raise RuntimeError("step: expected reset(task) first")
        found = re.fullmatch(
            r"(search|click)\[(.*)\]", str(turn.payload), re.DOTALL | re.IGNORECASE
        )
        verb, what = (found[1].lower(), found[2].strip()) if found else ("", "")
        if turn.kind == MALFORMED:
            return Step(f"This turn could not be read.\n{_show(view)}")
        if verb == "search" and view.searchable and what:
            self._view = self.site.search(what)
        elif verb == "click" and what.lower() in view.clickables:
            self._view = self.site.click(what.lower())
        else:
            return Step(f"This action is not available here.\n{_show(view)}")
        if self._view.reward is not None:
            return Step("", self._view.reward, True, self._view.scores)
        return Step(_show(self._view))


def _show(view: View) -> str:
    actions = ["search[<keywords>]"] * view.searchable
    actions += [f"click[{name}]" for name in view.clickables]
    return " [SEP] ".join(view.texts) + "\nAvailable actions: " + ", ".join(actions)


def _prompt(instruction: str, tags: TagSet) -> str:
    reasoning = f"<{tags.reasoning}> ... </{tags.reasoning}> to think, " if tags.reasoning else ""
    return f"""You shop online: find a product that fits the wish below, choose its options, buy it.

In every turn you see a page in <{tags.info}> ... </{tags.info}>. Write {reasoning}\
<{tags.state}> ... </{tags.state}> with all that you need to remember, as older turns and pages \
are removed, and then one action that the page allows in \
<{tags.actions["act"]}> ... </{tags.actions["act"]}>:
- search[keywords] on the search page
- click[...] with a product number, an option, or a button such as Next > or Buy Now
Buying ends the task. The closer the product, its options and its price are to the wish, the better.

Wish: {tags.guard(instruction)}
"""
