"""What is measured of an agent: exact match, F1, peak tokens, dependency and compression.

The definitions are those of MEM1 (arXiv 2506.15841). Answers are compared by one of three rules:

- the default, for rewards: as SQuAD, but numbers stay what they are ("1.5" is not "15", "-5" not
  "5"), and quotes, dashes and other punctuation count alike in ASCII and in Unicode;
- `squad=True`, for EM and F1 that are compared with published ones: SQuAD's rule, which deletes
  ASCII punctuation wherever it stands;
- `released=True`: the evaluation script of the released code, for comparison with its figures. It
  also counts tokens differently: a state twice (once alone and once as part of the text that it
  begins), and nothing after the tenth turn.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence, Set
from typing import NamedTuple

RELEASED_TURNS = 10

_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_ARTICLES = {"a", "an", "the"}
_MINUS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d"), "-")
_APOSTROPHES = dict.fromkeys(map(ord, "\u02b9\u02bb\u02bc\u02bd\u00b4\u2032"), "'")
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
_THOUSANDS = re.compile(r"(?<!\d)(?<!\d[.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
# A comparison before a number, and not the end of an arrow.
_COMPARED = re.compile(r"(?<![<>=-])([<>]=?|[≤≥])\s*(?=-?[$€£¥]?\.?\d)")
_EQUAL_TOO = {"<=": "≤", ">=": "≥"}
# A minus sign before a word ("-pi", "-x"); a dash there is punctuation.
_MINUS_WORD = re.compile(r"(?:(?<=^)|(?<=[\s(\[{<>=,;:*/^]))[-\u2212\uff0d](?=\(?[^\W\d_]|[∞√])")
# Punctuation that means something: a sign (but not the "-" of "10-20" or "COVID-19"), that of an
# exponent ("1e-5"), the point and the decimal comma of a number, and what ends "C++", "C#" and
# "AB-".
_MEANT = re.compile(
    r"(?<![\w)\]}%°.,-])-(?=[$€£¥]?\.?\d)"
    r"|(?<=\de)-(?=\d)"
    r"|(?:(?<![\w.])|(?<=\d))\.(?=\d)"
    r"|(?<=\d),(?=\d)"
    r"|(?<=\w)[+#]{1,2}(?!\w)"
    r"|(?:(?<=\b[^\W\d_])|(?<=\b[^\W\d_]{2}))-(?!\w)"
)
_MARKED = {ord(sign): 0xE000 + ord(sign) for sign in "-.,+#<>"}  # private characters
_UNMARKED = {chr(mark): chr(sign) for sign, mark in _MARKED.items()}


def normalize(text: str, *, squad: bool = False, released: bool = False) -> str:
    """An answer as it is compared: lower case, no punctuation, no articles, single spaces.

    Characters are composed first (NFC), so that two spellings of an accent are one. A text of
    nothing but articles keeps them.

    By default a number keeps its sign, also in its exponent, its point, its decimal comma and a
    comparison before it ("<5", "≥ 5"), loses the commas between its thousands, and does not run
    into the next one ("10-20", "10:20" and "10 20" are equal, and none is "1020"). A minus sign
    directly before a word stays too ("-pi"). "C++", "C#" and "AB-" are not "C" and "AB", "vitamin
    A" is not "vitamin": a last word is no article. Case is folded ("ß" is "ss").

    Args:
        squad: SQuAD's rule instead: all ASCII punctuation is deleted, and no other.
        released: the released script's rule instead: a space in place of ASCII punctuation, and
            articles stay.

    Raises:
        ValueError: both.

    >>> normalize("The  U.S. Virgin-Islands!"), normalize("A"), normalize("N’Djamena")
    ('us virginislands', 'a', 'ndjamena')
    >>> normalize("−1,234.5 °C"), normalize("−1,234.5 °C", squad=True)
    ('-1234.5 °c', '−12345 °c')
    >>> normalize("The U.S.", released=True)
    'the u s'
    """
    if squad and released:
        raise ValueError("squad, released: expected at most one of them")
    text = unicodedata.normalize("NFC", text)
    if released:
        return " ".join(_PUNCTUATION.sub(" ", text.lower()).split())
    if squad:
        words = " ".join(_PUNCTUATION.sub("", text.lower()).split())
        return " ".join(_ARTICLE.sub(" ", words).split()) or words
    *before, last = _plain(text).split() or [""]
    kept = [word for word in before if word not in _ARTICLES]
    return " ".join([*(kept if kept or last not in _ARTICLES else before), last])


def _plain(text: str) -> str:
    """Folded text without punctuation, except what makes a number what it is."""
    text = text.translate(_UNSEEN).translate(_APOSTROPHES)
    text = text.translate(dict.fromkeys(map(ord, _UNMARKED)))
    text = _MINUS_WORD.sub(chr(_MARKED[ord("-")]), text).translate(_MINUS)
    text = unicodedata.normalize("NFC", text.casefold()).replace("i\u0307", "i")
    text = _COMPARED.sub(lambda sign: _EQUAL_TOO.get(sign[1], sign[1].translate(_MARKED)), text)
    text = _THOUSANDS.sub(lambda number: number.group().replace(",", ""), text)
    text = _MEANT.sub(lambda sign: sign.group().translate(_MARKED), text)
    kept: list[str] = []
    deleted = False
    for letter in text:
        if unicodedata.category(letter)[0] == "P" or letter in string.punctuation:
            deleted = True
            continue
        if deleted and kept and kept[-1].isdigit() and (letter.isdigit() or letter in _UNMARKED):
            kept.append(" ")
        kept.append(_UNMARKED.get(letter, letter))
        deleted = False
    return "".join(kept)


def exact_match(
    prediction: str, golden: Sequence[str], *, squad: bool = False, released: bool = False
) -> float:
    """1 if the normalized prediction is one of the normalized golden answers, else 0.

    An empty prediction matches nothing. `squad`, `released`: see `normalize`.

    Raises:
        TypeError: a prediction that is not text, or golden answers that are no list of texts.

    >>> exact_match("the Nile.", ["Nile", "River Nile"])
    1.0
    >>> exact_match("1.5", ["15"]), exact_match("1.5", ["15"], squad=True)
    (0.0, 1.0)
    """
    rule = {"squad": squad, "released": released}
    _check_answers(prediction, golden)
    said = normalize(prediction, **rule)
    return float(bool(said) and any(said == normalize(gold, **rule) for gold in golden))


def f1(
    prediction: str, golden: Sequence[str], *, squad: bool = False, released: bool = False
) -> float:
    """The best word F1 of the prediction against a golden answer (SQuAD).

    Words count as often as they stand there; the released script counts each once. `squad`,
    `released`: see `normalize`. Raises as `exact_match`.

    >>> round(f1("river Nile in Egypt", ["River Nile"]), 4)
    0.6667
    """
    rule = {"squad": squad, "released": released}
    _check_answers(prediction, golden)
    said = Counter(normalize(prediction, **rule).split())
    best = 0.0
    for gold in golden:
        true = Counter(normalize(gold, **rule).split())
        if released:
            said, true = Counter(set(said)), Counter(set(true))
        common = (said & true).total()
        if common:
            best = max(best, 2 * common / (said.total() + true.total()))
    return best


def _check_answers(prediction: str, golden: Sequence[str]) -> None:
    """Raises TypeError unless it is a text and a sequence of texts."""
    if not isinstance(prediction, str):
        raise TypeError(f"prediction: expected text, got {type(prediction).__name__}")
    if isinstance(golden, str) or not isinstance(golden, Sequence | Set):
        raise TypeError(f"golden: expected a list of texts, got {type(golden).__name__}")
    for gold in golden:
        if not isinstance(gold, str):
            raise TypeError(f"golden: expected texts, got {gold!r}")


class TurnTokens(NamedTuple):
    """How many tokens a turn's state, action and info have; the last turn's info is usually 0."""

    state: int
    action: int
    info: int = 0


class _Counted(NamedTuple):
    """A turn as it is counted: the context it begins with, what it generates, what it gets."""

    context: int
    state: int
    action: int
    info: int

    @property
    def size(self) -> int:
        return self.state + self.action + self.info


def _count(turns: Sequence[TurnTokens], full_context: bool, released: bool) -> list[_Counted]:
    counted: list[_Counted] = []
    for turn in turns[:RELEASED_TURNS] if released else turns:
        context = sum(earlier.size for earlier in (counted if full_context else counted[-1:]))
        # the released script's action is the text of the whole turn, its state included
        action = turn.action + turn.state if released else turn.action
        counted.append(_Counted(context, turn.state, action, turn.info))
    return counted


def peak_tokens(
    turns: Sequence[TurnTokens],
    *,
    full_context: bool = False,
    prompt: int = 0,
    released: bool = False,
) -> int:
    """The most tokens of state, action and info that are live at once.

    Args:
        full_context: nothing is dropped; otherwise a turn sees the one before it and itself, and
            the one before is dropped once state and action stand, before the info comes (MEM1).
        prompt: tokens of a prompt that is always live. The published figures leave it out.
        released: as the released script counts, which also averages the peak over those episodes
            only that score.

    >>> turns = [TurnTokens(40, 16, 500), TurnTokens(50, 16, 500), TurnTokens(60, 10)]
    >>> peak_tokens(turns), peak_tokens(turns, full_context=True)
    (636, 1192)
    >>> peak_tokens(turns, released=True)
    746
    """
    peak = 0
    for number, turn in enumerate(_count(turns, full_context, released), 1):
        peak = max(peak, turn.context + turn.state + turn.action)
        if full_context:
            peak = max(peak, turn.context + turn.size)
        elif not released or number < RELEASED_TURNS:
            peak = max(peak, turn.size)
    return peak + prompt


def dependency(
    turns: Sequence[TurnTokens], *, full_context: bool = False, released: bool = False
) -> float:
    """How much was attended to: the sum over generated segments of (context + length/2) x length.

    `context` is what is live when the segment begins, the prompt left out.

    >>> dependency([TurnTokens(4, 2, 10), TurnTokens(4, 2)])
    132.0
    """
    total = 0.0
    for turn in _count(turns, full_context, released):
        context = turn.context
        for length in (turn.state, turn.action):
            total += (context + (length // 2 if released else length / 2)) * length
            context += length
    return total


def compression(
    turns: Sequence[TurnTokens], *, full_context: bool = False, released: bool = False
) -> float:
    """What is live when the last action ends, as a share of all tokens of the trajectory.

    1 is the full context; MEM1's share falls as the turns go on. 0 for an empty trajectory.

    >>> compression([TurnTokens(4, 2, 10), TurnTokens(4, 2, 10), TurnTokens(4, 4)])
    0.6
    """
    counted = _count(turns, full_context, released)
    total = sum(turn.size for turn in counted)
    if not total:
        return 0.0
    last = counted[-1]
    return (last.context + last.state + last.action) / total
