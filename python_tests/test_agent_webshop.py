from __future__ import annotations

import html
from dataclasses import replace

import pytest
from local_server import serve

from mem1_kernels.agent.environment import EnvironmentBatch, ToolError
from mem1_kernels.agent.tags import MEM1, WEBSHOP, ParsedTurn
from mem1_kernels.agent.webshop import Goal, Product, RemoteSite, Shop, ShopSite, WebShop, reward
from mem1_kernels.agent.webshop.shop import base_color, token_set_ratio


@pytest.fixture(scope="module")
def shop():
    return Shop(products=3000)


def act(text):
    return WEBSHOP.parse(f"<think>t</think><summary>s</summary><answer>{text}</answer>")


def test_the_shop_follows_from_its_seed(shop):
    assert len(shop.products) == 3000
    again = Shop(products=3000)
    assert again.products == shop.products
    assert again.goals(20) == shop.goals(20)
    assert Shop(products=50, seed=1).products != Shop(products=50, seed=2).products
    assert shop.goals(20, seed=1) != shop.goals(20, seed=2)
    assert len({goal.product.asin for goal in shop.goals(3000)}) == 3000


def test_every_goal_can_be_met(shop):
    for goal in shop.goals(300):
        assert reward(goal.product, goal, goal.options).total == 1.0
        assert goal.product.price <= goal.price_upper
        assert all(wish in goal.instruction for wish in goal.attributes)
        assert goal.product.asin not in goal.instruction
        for name, value in goal.options.items():
            assert value in goal.product.options[name] and value in goal.instruction


def test_a_search_for_the_title_finds_the_product(shop):
    goals = shop.goals(50)
    first = [shop.search(goal.product.title)[:10] for goal in goals]
    assert sum(g.product in found for g, found in zip(goals, first, strict=True)) >= 45
    assert shop.search("zzzz") == [] and len(shop.search("for")) <= 50


BOOTS = Product(
    asin="B00000A",
    title="Kestrel lace up hiking boots for women",
    query="hiking boots",
    category=("Shoes", "Athletic", "hiking boots"),
    nouns=frozenset({"kestrel", "hiking", "boots", "women"}),
    attributes=("lace up", "rubber sole"),
    features=("Feature: lace up", "Feature: rubber sole"),
    description="Boots with ankle strap.",
    options={"color": ("red", "blue"), "shoe size": ("7", "8")},
    price=49.0,
)
GOAL = Goal(BOOTS, "", ("rubber soles", "ankle strap"), {"color": "dark red", "shoe size": "8"}, 50)
TEA = replace(
    BOOTS,
    title="Galdor tea",
    query="tea",
    category=("Food", "Drinks", "tea"),
    nouns=frozenset({"galdor", "tea"}),
    attributes=(),
    features=(),
    description="",
)
CHOSEN = {"color": "red", "shoe size": "8"}


@pytest.mark.parametrize(
    ("product", "options", "parts"),
    [
        # total, type, attributes, options, price; five things are asked for
        (BOOTS, CHOSEN, (1.0, 1, 1, 1, 1)),
        (BOOTS, {"color": "blue", "shoe size": "8"}, (0.8, 1, 1, 0.5, 1)),
        (BOOTS, {}, (0.6, 1, 1, 0, 1)),
        (BOOTS, {"color": "red cherry", "shoe size": "8"}, (1.0, 1, 1, 1, 1)),
        (replace(BOOTS, price=50.0), CHOSEN, (1.0, 1, 1, 1, 1)),
        (replace(BOOTS, price=50.01), CHOSEN, (0.8, 1, 1, 1, 0)),
        (replace(BOOTS, attributes=(), features=()), CHOSEN, (0.8, 1, 0.5, 1, 1)),
        (replace(BOOTS, description=""), CHOSEN, (0.8, 1, 0.5, 1, 1)),
        (TEA, CHOSEN, (0.0, 0, 0, 1, 1)),
        # one noun of four, 0.25: the right type
        (replace(TEA, nouns=frozenset({"boots"})), CHOSEN, (0.6, 1, 0, 1, 1)),
    ],
)
def test_the_reward_by_hand(product, options, parts):
    assert reward(product, GOAL, options) == pytest.approx(parts)


@pytest.mark.parametrize(
    ("common", "query", "category", "kind"),
    [
        (2, "other", ("x", "y"), 0.5),  # 2 of 10 nouns is not above 0.2
        (3, "other", ("x", "y"), 1.0),
        (2, "hiking boots", ("x", "y"), 1.0),
        (2, "other", ("Athletic", "Shoes"), 1.0),
        (2, "other", ("Athletic", "x"), 0.5),
        (0, "hiking boots", ("Athletic", "Shoes"), 0.0),
    ],
)
def test_the_type_by_hand(common, query, category, kind):
    nouns = [f"noun{n}" for n in range(10)]
    goal = replace(GOAL, product=replace(BOOTS, nouns=frozenset(nouns)))
    bought = replace(
        BOOTS, nouns=frozenset([*nouns[:common], "else"]), query=query, category=category
    )
    assert reward(bought, goal, CHOSEN).type == kind
    assert reward(bought, goal, CHOSEN).total == pytest.approx(kind)


def test_a_title_with_hardly_anything_in_common():
    goal = replace(GOAL, product=replace(BOOTS, nouns=frozenset(map(str, range(11)))))
    assert reward(replace(BOOTS, nouns=frozenset("1")), goal, CHOSEN).type == 0.1


def test_colors_are_compared_by_their_base():
    navy = replace(GOAL, options={"color": "navy blue", "shoe size": "8"})
    assert reward(BOOTS, navy, {"color": "pale blue", "shoe size": "8"}).options == 1.0
    assert reward(BOOTS, navy, {"color": "navy", "shoe size": "8"}).options == 0.5


def test_phrases_alike():
    assert token_set_ratio("pack of 12", "12 of pack") == 100.0
    assert token_set_ratio("", "red") == 0.0
    assert token_set_ratio("tea bag", "tea tree") < 85
    assert token_set_ratio("large", "x-large") == 100.0
    assert base_color("teal and blue") == "blue"


def test_a_purchase(shop):
    environment = WebShop(ShopSite(shop))
    goal = shop.goals(1, seed=5)[0]
    prompt = environment.reset(goal)
    assert goal.instruction in prompt and prompt.endswith("Available actions: search[<keywords>]")
    results = environment.step(act(f"search[{goal.product.title}]"))
    assert results.observation.startswith("Back to Search [SEP] Page 1 (Total results: 50)")
    page = environment.step(act(f"click[{goal.product.asin}]")).observation
    assert goal.product.title in page and f"${goal.product.price:.2f}" in page
    features = environment.step(act("click[Features]")).observation
    assert all(attribute in features for attribute in goal.product.attributes)
    environment.step(act("click[< Prev]"))
    for value in goal.options.values():
        page = environment.step(act(f"click[{value}]")).observation
        assert f"{value} (chosen)" in page
    step = environment.step(act("click[Buy Now]"))
    assert (step.reward, step.done, step.observation) == (1.0, True, "")
    assert step.scores == {"type": 1.0, "attributes": 1.0, "options": 1.0, "price": 1.0}
    with pytest.raises(RuntimeError, match="reset"):
        environment.step(act("click[Buy Now]"))


def test_paging_and_going_back(shop):
    environment = WebShop(ShopSite(shop))
    environment.reset(shop.goals(1)[0])
    pages = [environment.step(act("search[shoes for men]")).observation]
    for _ in range(4):
        assert "click[next >]" in pages[-1]
        pages.append(environment.step(act("click[Next >]")).observation)
    assert "Page 5" in pages[-1] and "click[next >]" not in pages[-1]
    assert "click[< prev]" not in pages[0]
    assert environment.step(act("click[< prev]")).observation == pages[3]
    asins = {word for page in pages for word in page.split(" [SEP] ") if word in shop.products}
    assert len(asins) == 50
    item = next(word for word in pages[3].split(" [SEP] ") if word in shop.products)
    environment.step(act(f"click[{item}]"))
    color = shop.products[item].options["color"][0]
    assert "(chosen)" in environment.step(act(f"click[{color}]")).observation
    assert environment.step(act("click[< prev]")).observation == pages[3]
    assert "(chosen)" not in environment.step(act(f"click[{item}]")).observation
    assert "search[<keywords>]" in environment.step(act("click[back to search]")).observation
    assert "Total results: 0" in environment.step(act("search[zzzz 🙂]")).observation


@pytest.mark.parametrize(
    "action",
    [
        "click[buy now]",
        "click[b99999z]",
        "click[]",
        "search[]",
        "search[ ]",
        "buy it",
        "",
        "search[boots",
        "click[next >] click[buy now]",
        "please search[boots]",
    ],
)
def test_what_the_page_does_not_offer_changes_nothing(shop, action):
    environment = WebShop(ShopSite(shop))
    environment.reset(shop.goals(1)[0])
    step = environment.step(act(action))
    assert not step.done and step.reward == 0.0
    assert step.observation.startswith("This action is not available here.\nWebShop [SEP] Search")
    assert "Page 1" in environment.step(act("search[boots]")).observation


def test_an_unreadable_turn_changes_nothing(shop):
    environment = WebShop(ShopSite(shop))
    environment.reset(shop.goals(1)[0])
    step = environment.step(WEBSHOP.parse("<answer>search[boots]</answer>"))
    assert step.observation.startswith("This turn could not be read.\nWebShop [SEP] Search")


def test_wrong_use_is_refused(shop):
    with pytest.raises(ValueError, match="one action, act"):
        WebShop(ShopSite(shop), tags=MEM1)
    with pytest.raises(TypeError, match="expected a Goal"):
        WebShop(ShopSite(shop)).reset(3)
    with pytest.raises(RuntimeError, match="reset"):
        WebShop(ShopSite(shop)).step(act("search[x]"))
    with pytest.raises(ValueError, match="products"):
        Shop(products=0)
    with pytest.raises(ValueError, match="count"):
        shop.goals(3001)


def page(body, instruction="Find me <tea> & boots"):
    shown = html.escape(instruction)
    return (
        "<!DOCTYPE html><html><head><title>no</title><link rel='icon'></head><body>"
        f'<div id="instruction-text"><h4>Instruction:<br>{shown}</h4></div>{body}'
        "<script>let x = '<button>forged</button>';</script></body></html>"
    )


def button(action, text):
    return f'<form method="post" action="{action}"><button class="btn">{text}</button></form>'


def application(request):
    """What the original web application shows, in short."""
    session = request.path.split("/")[-1] if request.path.count("/") == 1 else ""
    if session:
        assert session.endswith("_fixed_7")
        if "search_query" in request.form:
            assert request.form["search_query"] == "boots & tea"
            return 302, f"/search_results/{session}/1"
        form = f'<form method="post" action="/{session}"><input id="search_input"><button>'
        return page(f"<h2>WebShop</h2>{form}Search</button></form>")
    if request.path.startswith("/search_results"):
        link = "<h4><a class='product-link' href='/item_page/B01'>B01</a></h5><h4>Boots</h5>"
        return page(button("/x_fixed_7", "Back to Search") + "<h3>Page 1</h3>" + link)
    if request.path.startswith("/item_page"):
        radio = (
            '<input type="radio" value="Red | Blue" data-url="/item_page/red"><label>Red</label>'
        )
        return page(radio + "<p>buy now</p>" + button("/done/red", "Buy Now"))
    assert request.path == "/done/red" and request.method == "POST"
    return page('<h4 id="asin">asin<pre>B01</pre></p><h3 id="reward">Score<pre>0.75</pre></h3>')


def test_a_purchase_on_a_server():
    with serve(application) as server:
        environment = WebShop(RemoteSite(server.url))
        prompt = environment.reset(7)
        assert "Wish: Find me <tea> & boots" in prompt
        assert prompt.endswith("Available actions: search[<keywords>]")
        results = environment.step(act("search[boots & tea]")).observation
        assert results == (
            "Back to Search [SEP] Page 1 [SEP] B01 [SEP] Boots\n"
            "Available actions: click[back to search], click[b01]"
        )
        item = environment.step(act("click[B01]")).observation
        assert "forged" not in item and "click[red | blue]" in item
        environment.step(act("click[Red | Blue]"))
        step = environment.step(act("click[buy now]"))
    assert (step.reward, step.done, step.scores) == (0.75, True, {"reward": 0.75})
    paths = [request.path for request in server.requests]
    assert paths[-3:] == ["/item_page/B01", "/item_page/red", "/done/red"]


def test_sessions_of_one_goal_are_apart():
    with serve(application) as server:
        for _ in range(2):
            WebShop(RemoteSite(server.url)).reset(7)
    assert len({request.path for request in server.requests}) == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("<html>nginx</html>", "expected its search page"),
        ((404, "no"), "status 404"),
        (page('<h3 id="reward"><pre>high</pre></h3>'), "unreadable page"),
        (page('<h3 id="reward"><pre>nan</pre></h3>'), "unreadable page"),
        (page('<h3 id="reward"><pre>7</pre></h3>'), "unreadable page"),
        (page("<![nonsense[ x ]]>"), "unreadable page"),
    ],
)
def test_a_server_that_is_no_shop(reply, message):
    with serve(lambda request: reply) as server:
        with pytest.raises(ToolError, match=message):
            WebShop(RemoteSite(server.url)).reset(0)
        batch = EnvironmentBatch(lambda: WebShop(RemoteSite(server.url)))
        assert batch.reset([0]) == [""]
        assert message in batch.episodes[0].error


def test_a_page_nested_without_end():
    """The work grows with the length of the page, not with its square."""
    depth = 30_000
    body = "<div>" * depth + "x" + "<b>y</q>" * depth + "</div>" * depth
    form = '<form action="/s"><input id="search_input"></form>'
    with serve(lambda request: page(form + body)) as server:
        site = RemoteSite(server.url)
        _, view = site.open(0)
    assert view.texts == ("x", *["y"] * depth)


def test_an_instruction_in_pieces():
    body = '<div id="instruction-text"><h4>Instruction:<br>a <b>red</b> tea</h4></div>'
    form = '<form action="/s"><input id="search_input"></form>'
    with serve(lambda request: body + form) as server:
        assert RemoteSite(server.url).open(0)[0] == "a red tea"


def test_what_a_server_is_asked():
    for task in (-1, "7", 1.0, True, None):
        with pytest.raises(TypeError, match="task: expected the number of a goal, got"):
            RemoteSite("http://127.0.0.1:1").open(task)
    with pytest.raises(ValueError, match="url: expected an address without a query") as caught:
        RemoteSite("http://me:pw@host/?key=abc")
    assert "pw" not in str(caught.value) and "abc" not in str(caught.value)

    def answer(request):
        form = '<form action="/s"><input id="search_input"></form>'
        return '<p id="instruction-text">x</p>' + form

    with serve(answer) as server:
        site = RemoteSite(server.url.replace("//", "//me:pw@"))
        site.open(3)
        site.search("tea \ud83d")
    assert server.requests[1].form == {"search_query": "tea \ufffd"}
    assert all(r.headers["authorization"] == "Basic bWU6cHc=" for r in server.requests)


def test_the_action_comes_from_the_turn_only(shop):
    environment = WebShop(ShopSite(shop))
    environment.reset(shop.goals(1)[0])
    turn = ParsedTurn("act", "click[buy now]", "search[boots]", True)
    assert "Page 1" in environment.step(turn).observation
