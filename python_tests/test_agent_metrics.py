from __future__ import annotations

import random
import re
import string
import unicodedata

import pytest

from mem1_kernels import Segment, Trajectory, keep_all
from mem1_kernels.agent.metrics import (
    TurnTokens,
    compression,
    dependency,
    exact_match,
    f1,
    normalize,
    peak_tokens,
)


@pytest.mark.parametrize(
    ("prediction", "golden", "em", "score"),
    [
        ("Paris", ["Paris"], 1, 1),
        ("  the PARIS!! ", ["Paris"], 1, 1),
        ("Paris, France", ["Paris"], 0, 2 / 3),
        ("N'Djamena", ["NDjamena"], 1, 1),
        ("", ["Paris"], 0, 0),
        ("!?", ["Paris"], 0, 0),
        ("the", ["Paris"], 0, 0),
        ("a", ["A"], 1, 1),
        ("", [""], 0, 0),
        ("river river Nile", ["river Nile"], 0, 4 / 5),
        ("Nile", ["Amazon", "river Nile", "the Nile"], 1, 1),
        ("42", ["42.0"], 0, 0),
        ("1,000 km", ["1000 km"], 1, 1),
        ("München", ["munchen"], 0, 0),
        ("汉字", ["汉字"], 1, 1),
        ("ＮＩＬＥ", ["nile"], 0, 0),
        # numbers stay what they are
        ("1.5", ["15"], 0, 0),
        ("1.5", ["1.5"], 1, 1),
        ("-5", ["5"], 0, 0),
        ("5", ["-5"], 0, 0),
        ("−5", ["-5"], 1, 1),
        ("–5 °C", ["-5 °C"], 1, 1),
        ("-$5", ["5"], 0, 0),
        ("(-5)", ["-5"], 1, 1),
        ("+5", ["5"], 1, 1),
        (".5", ["5"], 0, 0),
        ("1,5", ["15"], 0, 0),
        ("1,234,567.5", ["1234567.5"], 1, 1),
        ("1,000, 2,000", ["1000 2000"], 1, 1),
        ("12,34", ["1234"], 0, 0),
        ("10-20", ["1020"], 0, 0),
        ("10:30", ["1030"], 0, 0),
        ("1/2", ["12"], 0, 0),
        ("1..2", ["12"], 0, 0),
        ("5(-3)", ["5-3"], 0, 1 / 2),
        ("1990–1995", ["1990-1995"], 1, 1),
        ("1990 — 1995", ["1990-1995"], 1, 1),
        ("COVID–19", ["COVID-19"], 1, 1),
        ("3.", ["3"], 1, 1),
        ("1e-5", ["1e5"], 0, 0),
        ("1E−5", ["1e-5"], 1, 1),
        ("1e+5", ["1e5"], 1, 1),
        ("-pi", ["pi"], 0, 0),
        ("−x", ["-x"], 1, 1),
        ("-(x)", ["x"], 0, 0),
        ("x = -y", ["x = y"], 0, 1 / 2),
        ("-∞", ["∞"], 0, 0),
        ("–Paris", ["Paris"], 1, 1),
        ("- Paris", ["Paris"], 1, 1),
        ("well-known", ["wellknown"], 1, 1),
        ("<5", [">5"], 0, 0),
        ("<5", ["5"], 0, 0),
        ("< 5", ["<5"], 1, 1),
        ("<= 5", ["≤5"], 1, 1),
        (">=5", [">5"], 0, 0),
        ("≤5", ["≥5"], 0, 0),
        ("< -5", ["<5"], 0, 0),
        ("-> 5", ["5"], 1, 1),
        ("<b>", ["b"], 1, 1),
        (".jp", ["jp"], 1, 1),
        # quotes and dashes
        ("N’Djamena", ["N'Djamena"], 1, 1),
        ("Nʼdjamena", ["N'Djamena"], 1, 1),
        ("“Paris”", ['"Paris"'], 1, 1),
        ("«Paris»", ["Paris"], 1, 1),
        ("Guinea‑Bissau", ["Guinea-Bissau"], 1, 1),
        ("Guinea–Bissau", ["Guinea-Bissau"], 1, 1),
        ("東京。", ["東京"], 1, 1),
        ("¿Lima?", ["Lima"], 1, 1),
        ("Zürich\u00a0City", ["Zürich City"], 1, 1),
        ("Don\u00adau\u200b", ["Donau"], 1, 1),
        # letters
        ("STRASSE", ["Straße"], 1, 1),
        ("İstanbul", ["istanbul"], 1, 1),
        ("ΟΔΟΣ", ["οδος"], 1, 1),
        # what a last sign or letter says
        ("C++", ["C"], 0, 0),
        ("C#", ["C++"], 0, 0),
        ("AB-", ["AB+"], 0, 0),
        ("vitamin A", ["vitamin"], 0, 2 / 3),
        ("the the", ["the the"], 1, 1),
        ("\ue02e5", [".5"], 0, 0),  # a private character is none of our marks
    ],
)
def test_scores_by_hand(prediction, golden, em, score):
    assert exact_match(prediction, golden) == em
    assert f1(prediction, golden) == pytest.approx(score)


def test_two_spellings_of_an_accent_are_one():
    composed, apart = (unicodedata.normalize(form, "Brasília") for form in ("NFC", "NFD"))
    assert composed != apart
    assert exact_match(apart, [composed]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "gold", "em"),
    [
        ("1.5", "15", 1),
        ("-5", "5", 1),
        ("10-20", "1020", 1),
        ("C++", "C", 1),
        ("vitamin A", "vitamin", 1),
        ("N’Djamena", "N'Djamena", 0),
        ("1990–1995", "1990-1995", 0),
        ("STRASSE", "Straße", 0),
        ("the Nile.", "nile", 1),
        ("A", "a", 1),
    ],
)
def test_the_rule_of_squad_is_what_it_was(prediction, gold, em):
    assert exact_match(prediction, [gold], squad=True) == em
    assert (f1(prediction, [gold], squad=True) == 1) == em


def test_squad_is_the_published_function():
    """Against the normalization as SQuAD's evaluation script has it, on texts with its signs."""

    def published(text):
        text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    rng = random.Random(0)
    pieces = ["a", "an", "The", "x", "é", " ", "  ", ".", "-", "'", "5", "°", "—", "’s", "\n"]
    for _ in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 8)))
        assert normalize(text, squad=True) == (published(text) or normalize(text, squad=True))
        assert published(text) or not published(normalize(text, squad=True))


@pytest.mark.parametrize("golden", ["Nile", None, 5, [None], [5], [["Nile"]], {"a": 1}, [b"x"]])
def test_golden_answers_of_another_type(golden):
    for function in (exact_match, f1):
        with pytest.raises(TypeError, match="golden: expected .*texts, got"):
            function("N", golden)


def test_a_prediction_of_another_type():
    for function in (exact_match, f1):
        with pytest.raises(TypeError, match="prediction: expected text, got NoneType"):
            function(None, ["Nile"])


def test_one_rule_at_a_time():
    for function in (exact_match, f1):
        with pytest.raises(ValueError, match="squad, released: expected at most one"):
            function("a", ["a"], squad=True, released=True)


def test_the_released_scores_differ_where_they_do():
    assert normalize("U.S.-born") == "usborn"
    assert normalize("U.S.-born", released=True) == "u s born"
    assert exact_match("the Nile", ["Nile"], released=True) == 0.0
    # words once each: {river, nile} against {river, nile}
    assert f1("river river Nile", ["river Nile"], released=True) == 1.0
    assert f1("", ["x"], released=True) == 0.0


TURNS = [TurnTokens(4, 2, 10), TurnTokens(6, 2, 20), TurnTokens(5, 3)]


def test_token_measures_by_hand():
    # turn 3 sees turn 2 (28) and itself (8); turn 2 ends with 16 + 8 and then gets 8 + 20
    assert peak_tokens(TURNS) == 36
    assert peak_tokens(TURNS, prompt=100) == 136
    assert peak_tokens(TURNS, full_context=True) == 52
    assert dependency(TURNS) == (
        (0 + 2) * 4 + (4 + 1) * 2 + (16 + 3) * 6 + (22 + 1) * 2 + (28 + 2.5) * 5 + (33 + 1.5) * 3
    )
    assert dependency(TURNS, full_context=True) == (
        (0 + 2) * 4 + (4 + 1) * 2 + (16 + 3) * 6 + (22 + 1) * 2 + (44 + 2.5) * 5 + (49 + 1.5) * 3
    )
    assert compression(TURNS) == 36 / 52
    assert compression(TURNS, full_context=True) == 1.0


def test_the_released_script_counts_states_twice():
    # states 4, 6, 5 and "actions" 6, 8, 8: turns of 20, 34 and 13 tokens
    assert peak_tokens(TURNS, released=True) == 34 + 13
    assert peak_tokens(TURNS, full_context=True, released=True) == 20 + 34 + 13
    assert dependency(TURNS, released=True) == (
        (0 + 2) * 4 + (4 + 3) * 6 + (20 + 3) * 6 + (26 + 4) * 8 + (34 + 2) * 5 + (39 + 4) * 8
    )
    assert compression(TURNS, released=True) == (34 + 13) / 67
    assert peak_tokens([TurnTokens(1, 1, 9)] * 10, released=True) == 12 + 3
    assert peak_tokens([*[TurnTokens(1, 1)] * 10, TurnTokens(99, 9)], released=True) == 6


def test_an_infos_moment_counts():
    assert peak_tokens([TurnTokens(1, 1, 50)]) == 52
    assert peak_tokens([TurnTokens(30, 1), TurnTokens(1, 1, 3)]) == 33


def test_nothing_measures_nothing():
    assert peak_tokens([]) == 0 and dependency([]) == 0.0 and compression([]) == 0.0
    assert compression([TurnTokens(0, 0)]) == 0.0


def test_peak_is_what_the_pruned_cache_holds():
    rng = random.Random(0)
    for _ in range(30):
        turns = [
            TurnTokens(rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 30))
            for _ in range(rng.randint(1, 7))
        ]
        segments = [Segment("prompt", 11)]
        for number, turn in enumerate(turns, 1):
            segments += [
                Segment(role, count, number)
                for role, count in zip(("state", "action", "info"), turn, strict=True)
            ]
        assert Trajectory(segments).peak_context == peak_tokens(turns, prompt=11)
        full = Trajectory(segments, keep_all).peak_context
        assert full == peak_tokens(turns, prompt=11, full_context=True)
