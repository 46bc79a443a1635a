"""The words of a text, for search: in any script, however its characters are spelled.

- Compatibility forms (full-width letters, ligatures), decomposed accents and case are one: NFKC
  and case folding. Characters that nobody sees, such as a soft hyphen, are dropped.
- Scripts that write no spaces (Chinese, Japanese, Thai, Khmer, ...), and Korean, which joins
  particles to its words, give single characters and pairs of neighbours, as Lucene does.
- A word joined by underscores ("snake_case") gives itself and its parts.
- A number with separators ("1,000,000") gives its groups and the number without them.
- Single letters stand apart, and so do English stop words and symbols (emoji, currency signs).
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import groupby
from typing import NamedTuple

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)
# Thai to Burmese, Korean, Khmer and its neighbours, Chinese and Japanese, old scripts
_UNSPACED = (
    "\u0e00-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f"
    "\u3005-\u3007\u3040-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua960-\ua9ff\uaa60-\uaadf"
    "\uac00-\ud7ff\uf900-\ufaff\U00012000-\U0001467f\U00016fe0-\U0001b2ff\U00020000-\U0003ffff"
)
_UNSEEN = dict.fromkeys(
    [*map(ord, "\u00ad\u0640\u200c\u200d\u2060\ufeff"), *range(0xFE00, 0xFE10)]
    + [*range(0xE0100, 0xE01F0)]
)
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bb\u02bc"), "'")
_GROUPED = re.compile(r"(?<!\d)\d{1,3}([,.' _])\d{3}(?:\1\d{3})*(?!\d)")


class Words(NamedTuple):
    """The words of a text.

    Fields:
        words: of two letters or more, in order.
        short: single letters, and the numbers that had separators.
        light: stop words and symbols.
    """

    words: list[str]
    short: list[str]
    light: list[str]


class _Patterns(NamedTuple):
    special: re.Pattern[str]
    word: re.Pattern[str]
    piece: re.Pattern[str]
    character: re.Pattern[str]


# A single letter behind an apostrophe ("who's") belongs to the word before.
_WORD = re.compile(r"(?<!\w')\b\w\b|\w\w+")
_SYMBOL = re.compile(r"[$+<=>^`|~]")


@cache
def _patterns() -> _Patterns:
    """The patterns of texts beyond ASCII, where accents and vowel signs are part of a word."""
    marks = _marks()
    letter = rf"[\w{marks}]"
    return _Patterns(
        re.compile(rf"[{_UNSPACED}{marks}]"),
        re.compile(rf"(?<!{letter}')(?<!{letter}){letter}(?!{letter})|{letter}{letter}+"),
        re.compile(
            rf"(?P<unspaced>[{_UNSPACED}][{_UNSPACED}{marks}]*)|(?P<spaced>[^{_UNSPACED}]+)"
        ),
        re.compile(rf"[^{marks}][{marks}]*|[{marks}]+"),
    )


def _marks() -> str:
    """The combining marks of the Basic Multilingual Plane as ranges of a regular expression."""
    codes = (code for code in range(0x10000) if unicodedata.category(chr(code))[0] == "M")
    # the characters of a range have one difference between code and place
    ranges = [list(run) for _, run in groupby(enumerate(codes), lambda pair: pair[1] - pair[0])]
    return "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in ranges)


def split_words(text: str) -> Words:
    """The words of a text, folded so that two spellings of a word are equal.

    >>> split_words("The Who's 1,000 Straßen")
    Words(words=['who', '000', 'strassen'], short=['1', '1000'], light=['the'])
    >>> split_words("乍得首都").words
    ['乍', '得', '首', '都', '乍得', '得首', '首都']
    """
    words: list[str] = []
    short: list[str] = []
    light: list[str] = []
    special = None
    if text.isascii():
        text = text.lower()
        symbols = _SYMBOL.findall(text)
    else:
        text = _folded(text)
        special = _patterns().special.search(text)
        kinds = {letter for letter in set(text) if unicodedata.category(letter)[0] == "S"}
        symbols = [letter for letter in text if letter in kinds] if kinds else []
    for word in (_patterns().word if special else _WORD).findall(text):
        if word in STOP_WORDS:
            light.append(word)
        elif special and not word.isascii():
            _add_letters(word, words, short)
        else:
            (words if len(word) > 1 else short).append(word)
        if "_" in word:
            for part in filter(None, word.split("_")):
                if part in STOP_WORDS:
                    light.append(part)
                elif special and not part.isascii():
                    _add_letters(part, words, short)
                else:
                    (words if len(part) > 1 else short).append(part)
    short += [re.sub(r"\D", "", number.group()) for number in _GROUPED.finditer(text)]
    return Words(words, short, light + symbols)


def _add_letters(run: str, words: list[str], short: list[str]) -> None:
    """Adds the words of a run of letters, which may change between scripts on its way."""
    for piece in _patterns().piece.finditer(run):
        if piece["spaced"]:
            (words if len(piece["spaced"]) > 1 else short).append(piece["spaced"])
        else:
            letters = _patterns().character.findall(piece["unspaced"])
            words += letters
            words += [one + next_one for one, next_one in zip(letters, letters[1:], strict=False)]


def _folded(text: str) -> str:
    text = unicodedata.normalize("NFKC", text.translate(_UNSEEN)).translate(_APOSTROPHES)
    # a second time: the fold of a composed character can be a decomposed one
    text = unicodedata.normalize("NFKC", text.casefold())
    return text.replace("i\u0307", "i")  # what the Turkish capital I with a dot becomes
