"""What is measured of an agent: exact match, F1, peak tokens, dependency and compression.

The definitions are those of MEM1 (arXiv 2506.15841). `released=True` follows the evaluation script
of the released code instead, for comparison with its figures; it differs in three ways: a state is
counted twice (once alone and once as part of the text it begins), scores use its own normalization,
and turns behind the tenth are not looked at.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

RELEASED_TURNS = 10

_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def normalize(text: str, *, released: bool = False) -> str:
    """An answer as it is compared: lower case, no punctuation, no articles, single spaces (SQuAD).

    Characters are composed first (NFC), so that two spellings of an accent are one. A text of
    nothing but articles keeps them. The released script puts a space in place of punctuation and
    keeps the articles.

    >>> normalize("The  U.S. Virgin-Islands!"), normalize("A")
    ('us virginislands', 'a')
    >>> normalize("The U.S.", released=True)
    'the u s'
    """
    text = unicodedata.normalize("NFC", text).lower()
    if released:
        return " ".join(_PUNCTUATION.sub(" ", text).split())
    words = " ".join(_PUNCTUATION.sub("", text).split())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", words).split()) or words


def exact_match(prediction: str, golden: Sequence[str], *, released: bool = False) -> float:
    """1 if the normalized prediction is one of the normalized golden answers, else 0.

    An empty prediction matches nothing.

    >>> exact_match("the Nile.", ["Nile", "River Nile"])
    1.0
    """
    said = normalize(prediction, released=released)
    return float(bool(said) and any(said == normalize(gold, released=released) for gold in golden))


def f1(prediction: str, golden: Sequence[str], *, released: bool = False) -> float:
    """The best word F1 of the prediction against a golden answer (SQuAD).

    Words count as often as they stand there; the released script counts each once.

    >>> round(f1("river Nile in Egypt", ["River Nile"]), 4)
    0.6667
    """
    said = Counter(normalize(prediction, released=released).split())
    best = 0.0
    for gold in golden:
        true = Counter(normalize(gold, released=released).split())
        if released:
            said, true = Counter(set(said)), Counter(set(true))
        common = (said & true).total()
        if common:
            best = max(best, 2 * common / (said.total() + true.total()))
    return best


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
