"""A procedural shop like WebShop (arXiv 2207.01206): products, goals and the reward.

Everything follows from a seed: no download, no server. Products have a category, a title, features
(their attributes), options to choose and a price. A goal asks for a product by some of that. What
the paper takes from a tagger, the nouns of a title, is known here: brand, kind and audience.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mem1_kernels.agent.retrieval import BM25, Passage
from mem1_kernels.agent.webshop.catalogue import COLORS, Product, make_product

RESULTS = 50
FUZZY_MATCH = 85.0


@dataclass(frozen=True)
class Goal:
    """What a customer wants: a product like `product`, with these attributes and options.

    Args:
        instruction: the wish in words.
        price_upper: the most that it may cost, in dollars.
    """

    product: Product
    instruction: str
    attributes: tuple[str, ...]
    options: Mapping[str, str]
    price_upper: float


class Reward(NamedTuple):
    """The reward of a purchase and its parts: shares of attributes and options met, price met."""

    total: float
    type: float
    attributes: float
    options: float
    price: float


class Shop:
    """A catalogue, made from `seed`.

    >>> shop = Shop(products=200, seed=1)
    >>> goal = shop.goals(1)[0]
    >>> reward(goal.product, goal, goal.options).total
    1.0
    >>> goal.product.asin in [product.asin for product in shop.search(goal.instruction)]
    True
    """

    def __init__(self, products: int = 3000, seed: int = 0) -> None:
        if products < 1:
            raise ValueError(f"products: expected at least 1, got {products}")
        rng = random.Random(seed)
        made = [make_product(number, rng) for number in range(products)]
        self.products = {product.asin: product for product in made}
        self._index = BM25(
            [
                Passage(item.asin, "\n".join([item.title, item.description, *item.features]))
                for item in made
            ]
        )

    def search(self, keywords: str) -> list[Product]:
        """The fifty best matches for the keywords, best first."""
        (found,) = self._index.search([keywords], RESULTS)
        return [self.products[passage.id] for passage in found]

    def goals(self, count: int, seed: int = 0) -> list[Goal]:
        """Goals for `count` different products, one per product, drawn by `seed`."""
        if not 1 <= count <= len(self.products):
            raise ValueError(f"count: expected 1..{len(self.products)}, got {count}")
        rng = random.Random(seed)
        return [_goal(product, rng) for product in rng.sample(list(self.products.values()), count)]


def _goal(product: Product, rng: random.Random) -> Goal:
    attributes = tuple(rng.sample(product.attributes, rng.randint(1, 2)))
    options = {name: rng.choice(values) for name, values in product.options.items()}
    tens = int(product.price // 10) * 10.0
    upper = tens + 10.0 * rng.randint(2, 4)
    chosen = ", and ".join(f"{name}: {value}" for name, value in options.items())
    instruction = (
        f"Find me {', '.join(attributes)} {product.query} for {product.title.split(' for ')[-1]} "
        f"with {chosen}, and price lower than {upper:.2f} dollars"
    )
    return Goal(product, instruction, attributes, options, upper)


def token_set_ratio(one: str, other: str) -> float:
    """How alike two phrases are, 0 to 100, whatever the order of their words.

    Words in common are set against the words in common with the rest of either phrase; two texts
    score by their longest common subsequence.

    >>> token_set_ratio("essential oils", "oil, essential"), token_set_ratio("red", "dark red")
    (96.29629629629629, 100.0)
    """
    first, second = ({*re.findall(r"\w+", text.lower())} for text in (one, other))
    common = " ".join(sorted(first & second))
    left = f"{common} {' '.join(sorted(first - second))}".strip()
    right = f"{common} {' '.join(sorted(second - first))}".strip()
    pairs = [(common, left), (common, right), (left, right)]
    return max(_similarity(a, b) for a, b in pairs)


def _similarity(one: str, other: str) -> float:
    if not one or not other:
        return 0.0
    row = [0] * (len(other) + 1)
    for letter in one:
        previous = row
        row = [0]
        for place, against in enumerate(other):
            same = previous[place] + 1 if letter == against else 0
            row.append(max(same, row[place], previous[place + 1]))
    return 200.0 * row[-1] / (len(one) + len(other))


def base_color(option: str) -> str:
    """The first color named in an option, in alphabetical order, or the option itself.

    >>> base_color("Deep Navy Blue"), base_color("x-large")
    ('blue', 'x-large')
    """
    words = set(re.findall(r"\w+", option.lower()))
    return next((color for color in COLORS if color in words), option)


def type_reward(product: Product, goal: Goal) -> float:
    """The reward for the kind of product, 0 to 1: how much the titles have in common.

    The score is the share of the goal's nouns in the product's title. None: 0. Below 0.1: 0.1. Up
    to 0.2, of another query and with fewer than two categories in common: 0.5. So WebShop has it.
    """
    wanted = goal.product
    score = len(product.nouns & wanted.nouns) / len(wanted.nouns) if wanted.nouns else 0.2
    if score == 0.0:
        return 0.0
    if score < 0.1:
        return 0.1
    same_category = len(set(product.category) & set(wanted.category)) >= 2
    return 1.0 if product.query == wanted.query or same_category or score > 0.2 else 0.5


def reward(product: Product, goal: Goal, options: Mapping[str, str]) -> Reward:
    """The reward for buying `product` with these options chosen, 0 to 1, as WebShop has it.

        r = r_type * (attributes met + options met + price met) / (attributes + options + 1)

    An attribute is met by one like it among the product's, or by standing in its texts; an option
    by one like it among those chosen, colors by their base color.
    """
    text = " ".join([product.title, product.description, *product.features]).lower()
    met = sum(
        _any_like(wish, product.attributes) or wish.lower() in text for wish in goal.attributes
    )
    chosen = [base_color(value) for value in options.values()]
    fitting = sum(_any_like(base_color(wish), chosen) for wish in goal.options.values())
    affordable = float(product.price <= goal.price_upper)
    kind = type_reward(product, goal)
    parts = len(goal.attributes) + len(goal.options) + 1
    return Reward(
        kind * (met + fitting + affordable) / parts,
        kind,
        met / len(goal.attributes) if goal.attributes else 1.0,
        fitting / len(goal.options) if goal.options else 1.0,
        affordable,
    )


def _any_like(wish: str, offers: Sequence[str]) -> bool:
    return any(token_set_ratio(offer, wish) > FUZZY_MATCH for offer in offers)
