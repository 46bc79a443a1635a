"""The catalogue of the procedural shop: kinds of products, and how to make one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

COLORS = (
    "beige black blue bronze brown coral cream gold gray green ivory khaki lavender maroon mint "
    "navy olive orange pink purple red silver tan teal turquoise violet white yellow"
).split()
_BRANDS = (
    "Aldermoor Brightfen Calloway Dunmere Eastvale Fernhill Galdor Harrowby Inverly Juniper "
    "Kestrel Larkmoor Mossgate Northolt Oakreach Pinecrest Quillon Ravensby Stonebrook Thistle "
    "Umberline Verdano Westmark Yarrow Zephyrine Ashcombe Birchwell Coldharbor Driftwood Elmstead"
).split()
_OPTIONS = {
    "color": tuple(COLORS),
    "size": ("x-small", "small", "medium", "large", "x-large", "xx-large"),
    "shoe size": ("6", "7", "7.5", "8", "8.5", "9", "10", "11"),
    "bed size": ("twin", "full", "queen", "king"),
    "pack": ("pack of 1", "pack of 2", "pack of 4", "pack of 6", "pack of 12"),
    "flavor": ("apple", "barbecue", "caramel", "cinnamon", "honey", "lemon", "sea salt", "vanilla"),
    "capacity": ("32gb", "64gb", "128gb", "256gb", "512gb"),
    "scent": ("cedar", "citrus", "jasmine", "rose", "sandalwood", "unscented"),
}


class _Department(NamedTuple):
    aisles: Mapping[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    options: tuple[str, ...]
    audiences: tuple[str, ...]
    prices: tuple[float, float]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


_DEPARTMENTS = {
    "Clothing": _Department(
        {
            "Tops": _names("shirt, hoodie, polo shirt, cardigan, tank top, sweater"),
            "Bottoms": _names("jeans, cargo shorts, leggings, yoga pants, skirt"),
        },
        _names(
            "machine wash, hand wash, long sleeve, short sleeve, cotton spandex, slim fit, loose "
            "fit, elastic waist, quick drying, moisture wicking, button closure, drawstring closure"
        ),
        ("color", "size"),
        ("men", "women", "kids"),
        (12.0, 70.0),
    ),
    "Shoes": _Department(
        {
            "Athletic": _names("running shoes, tennis shoes, hiking boots, basketball sneakers"),
            "Casual": _names("loafers, sandals, slippers, ankle boots"),
        },
        _names(
            "rubber sole, memory foam, arch support, non slip, lace up, steel toe, faux fur, vinyl "
            "acetate, leather sole, ankle strap, water resistant, high heel"
        ),
        ("color", "shoe size"),
        ("men", "women"),
        (20.0, 140.0),
    ),
    "Home": _Department(
        {
            "Bedroom": _names("duvet cover, pillow case, mattress pad, nightstand, throw blanket"),
            "Living Room": _names("floor lamp, coffee table, sofa cover, bookshelf, area rug"),
        },
        _names(
            "easy assemble, solid wood, hand painted, super soft, space saving, king bed frame, "
            "eco friendly, stain resistant, tempered glass, contemporary style, double sided, "
            "heavy duty"
        ),
        ("color", "bed size"),
        ("bedroom", "dining room", "dorm"),
        (18.0, 260.0),
    ),
    "Food": _Department(
        {
            "Snacks": _names("potato chips, granola bars, trail mix, rice crackers, dried fruit"),
            "Drinks": _names("green tea, coffee beans, protein shake, sparkling water"),
        },
        _names(
            "gluten free, sugar free, low sodium, non gmo, certified organic, dairy free, keto "
            "friendly, artificial flavors, high fructose, individually wrapped, plant based, kosher"
        ),
        ("flavor", "pack"),
        ("breakfast", "office", "school"),
        (4.0, 45.0),
    ),
    "Electronics": _Department(
        {
            "Audio": _names("bluetooth speaker, headphones, soundbar, earbuds, microphone"),
            "Computers": _names("laptop, tablet, desktop computer, external drive, webcam"),
        },
        _names(
            "high definition, plug play, fast charging, wireless charging, noise cancelling, long "
            "lasting, ultra hd, carrying case, quad core, hands free, stereo sound, water proof"
        ),
        ("color", "capacity"),
        ("travel", "gaming", "office"),
        (15.0, 900.0),
    ),
    "Beauty": _Department(
        {
            "Skin": _names("face cream, body lotion, sunscreen, lip balm, facial mask"),
            "Hair": _names("shampoo, conditioner, hair dryer brush, hair oil, beard wax"),
        },
        _names(
            "cruelty free, paraben free, tea tree, coconut oil, sensitive skin, natural "
            "ingredients, hyaluronic acid, anti aging, sulfate free, dry hair, long "
            "lasting, fine lines"
        ),
        ("scent", "pack"),
        ("men", "women", "teens"),
        (5.0, 80.0),
    ),
}


@dataclass(frozen=True)
class Product:
    """A product of the shop.

    Args:
        asin: its number in the shop, such as "B00001A".
        query: the kind of product, as search words.
        category: the path to its shelf.
        nouns: the nouns of the title, which decide how alike two products are.
        options: name -> the values to choose from.
        price: in dollars.
    """

    asin: str
    title: str
    query: str
    category: tuple[str, ...]
    nouns: frozenset[str]
    attributes: tuple[str, ...]
    features: tuple[str, ...]
    description: str
    options: Mapping[str, tuple[str, ...]]
    price: float


def make_product(number: int, rng: random.Random) -> Product:
    """The product with this number; the rest is drawn by `rng`.

    >>> make_product(7, random.Random(0)).title
    'Inverly keto friendly green tea for school'
    """
    name = rng.choice(list(_DEPARTMENTS))
    department = _DEPARTMENTS[name]
    aisle = rng.choice(list(department.aisles))
    kind = rng.choice(department.aisles[aisle])
    brand, audience = rng.choice(_BRANDS), rng.choice(department.audiences)
    attributes = tuple(rng.sample(department.attributes, rng.randint(3, 5)))
    options = {
        option: tuple(sorted(rng.sample(_OPTIONS[option], min(5, len(_OPTIONS[option])))))
        for option in department.options
    }
    low, high = department.prices
    return Product(
        asin=f"B{number:05d}{rng.choice('ABCDEFGH')}",
        title=f"{brand} {attributes[0]} {kind} for {audience}",
        query=kind,
        category=(name, aisle, kind),
        nouns=frozenset(f"{brand} {kind} {audience}".lower().split()),
        attributes=attributes,
        features=tuple(f"Feature: {attribute}" for attribute in attributes),
        description=f"{kind.capitalize()} by {brand}, made for {audience}. {aisle}, {name}.",
        options=options,
        price=round(rng.uniform(low, high), 2),
    )
