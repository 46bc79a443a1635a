"""Servers that are not to be trusted: what they may cost, and what they must not learn or tell."""

from __future__ import annotations

import base64
import gzip
import html
import json
import logging
import socket
import threading
import time
import traceback
import urllib.parse
import zlib
from contextlib import contextmanager

import pytest
from local_server import Raw, drips, serve

from mem1_kernels._secrets import Mask, public_address
from mem1_kernels.agent import _http
from mem1_kernels.agent._http import HTTP
from mem1_kernels.agent.environment import ToolError
from mem1_kernels.agent.retrieval import Passage, RetrievalServer
from mem1_kernels.agent.web_search import WebSearch
from mem1_kernels.agent.webshop import RemoteSite
from mem1_kernels.agent.world import make_world

KEY = "k3y/of+the tests=="


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr("mem1_kernels.agent._http.time.sleep", waited.append)
    return waited


def same(value):
    return value


def asked(server, **options):
    return HTTP("x", server.url, **{"retries": 0, **options}).json("POST", same, json={"a": 1})


# what a reply may cost


def packed(data, **options):
    return Raw([data], headers={"Content-Encoding": "gzip"}, **options)


def test_a_packed_reply_is_unpacked():
    with serve(lambda request: packed(gzip.compress(b'{"a": [1, "\xc3\xa9"]}'))) as server:
        assert asked(server) == {"a": [1, "é"]}
        assert server.requests[0].headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize("pack", [same, gzip.compress])
def test_a_reply_has_a_limit(pack, monkeypatch):
    """Unpacked bytes count, and no more of them than the limit are ever held."""
    held = []
    make = zlib.decompressobj

    class Spy:
        def __init__(self, bits):
            self.unpacker = make(bits)

        def decompress(self, data, limit):
            held.append(len(part := self.unpacker.decompress(data, limit)))
            return part

    monkeypatch.setattr(_http.zlib, "decompressobj", Spy)
    headers = {"Content-Encoding": "gzip"} if pack is gzip.compress else {}
    bomb = Raw([pack(b'"' + b"a" * 50_000_000 + b'"')], headers=headers)
    with serve(lambda request: bomb) as server:
        with pytest.raises(ToolError, match="x: a reply of more than 1000 bytes"):
            asked(server, max_bytes=1000)
        with pytest.raises(ToolError, match="a reply of more than 8388608 bytes"):
            RetrievalServer(server.url).search(["a"])
        assert len(server.requests) == 2, "nothing to gain from asking again"
    assert sum(held) <= 1001 + _http.MAX_BYTES + 1


def test_a_reply_of_exactly_the_limit():
    with serve(lambda request: Raw([b'"' + b"a" * 98 + b'"'])) as server:
        assert asked(server, max_bytes=100) == "a" * 98
        with pytest.raises(ToolError, match="more than 99 bytes"):
            asked(server, max_bytes=99)


@pytest.mark.parametrize("status", [404, 503])
def test_an_error_of_any_length_is_shown_by_its_beginning(status):
    body = gzip.compress(b"no " + b"a" * 50_000_000)
    with serve(lambda request: packed(body, status=status)) as server:
        with pytest.raises(ToolError, match=f"status {status}: 'no a+'") as caught:
            asked(server, max_bytes=10**9)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (packed(b"no gzip"), "does not unpack"),
        (packed(gzip.compress(b"{}" * 99)[:-9]), "that is cut off, after 1 attempt"),
        (Raw([b"{}"], headers={"Content-Encoding": "br"}), "packed as 'br', which was not asked"),
        (Raw([b"{}"], headers={"Content-Length": "9"}), "no connection .*RemoteProtocolError"),
        (packed(b"no gzip", status=500), "status 500, after"),
    ],
)
def test_a_reply_that_cannot_be_read(reply, message):
    with serve(lambda request: reply) as server:
        with pytest.raises(ToolError, match=message):
            asked(server, timeout=5)


def test_an_empty_packed_reply():
    with serve(lambda request: packed(b"")) as server:
        with pytest.raises(ToolError, match="expected JSON, got ''"):
            asked(server)


@contextmanager
def dripping(text):
    """A server that sends `text` byte by byte, ten in a second."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closing = threading.Event()

        def answer():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(10_000)
                    for byte in text:
                        try:
                            connection.sendall(bytes([byte]))
                        except OSError:
                            break
                        if closing.wait(0.1):
                            return

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            closing.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 25\r\n\r\n" + b" " * 25,
        b"HTTP/1.1 200 OK\r\nX: 1234567890\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 2,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n \r\n1\r\n \r\n",
        b"HTTP/1.1 500 Oops\r\nContent-Length: 25\r\n\r\n" + b"x" * 25,
    ],
    ids=["body", "headers", "continue", "chunks", "error"],
)
def test_a_slow_reply_is_ended(text):
    """Every byte comes in time, all of them do not."""
    with dripping(text) as url:
        with pytest.raises(ToolError, match=r"no answer in time \(0.5 seconds\)|status 500, after"):
            HTTP("x", url, timeout=0.5, retries=0).json("GET", same)


def test_redirects_share_the_time_of_an_attempt():
    body = [b" "] * 4

    def answer(request):
        return Raw(body, status=302, headers={"Location": request.path + "a"}, pause=0.1)

    with serve(answer) as server:
        with pytest.raises(ToolError, match="no answer in time|more than 5 redirects"):
            asked(server, timeout=0.3)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[" * 50_000 + "]" * 50_000])
def test_deeply_nested_json(text):
    with serve(lambda request: text) as server:
        with pytest.raises(ToolError, match="expected JSON.* got '[\\[{]"):
            asked(server)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(word):
    reply = f'{{"result": [[{{"contents": "a", "score": {word}}}]]}}'
    with serve(lambda request: reply) as server:
        with pytest.raises(ToolError, match="no JSON number|expected a finite number, got inf"):
            RetrievalServer(server.url).search(["a"])


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (b'"caf\xe9"', "application/json; charset=iso-8859-1", "café"),
        (b'"caf\xe9"', "application/json", "caf\ufffd"),
        ('"café"'.encode("utf-16"), "application/json", "café"),
        ('"café"'.encode("utf-8-sig"), "application/json; charset=utf-8", "café"),
        ('"café"'.encode(), "application/json; charset=nonsense", "café"),
        ('"café"'.encode(), "application/json; charset=zlib", "café"),
        ('"café"'.encode(), "application/json; charset=idna", "café"),
        (b'"\\ud83d \\ud83d\\ude00 \xed\xa0\xbd"', "application/json", "\ufffd 😀 " + 3 * "\ufffd"),
    ],
)
def test_text_is_valid_unicode_whatever_the_charset(body, kind, text):
    with serve(lambda request: Raw([body], headers={"Content-Type": kind})) as server:
        assert asked(server) == text


def test_what_is_asked_is_valid_unicode(monkeypatch):
    monkeypatch.setenv("SERPAPI_API_KEY", KEY)
    replies = [{"result": [[]]}, {"organic_results": []}]
    with serve(lambda request: replies.pop(0)) as server:
        assert RetrievalServer(server.url).search(["a\ud83d"]) == [[]]
        assert WebSearch("serpapi", url=server.url).search(["a\ud83d"]) == [[]]
    assert server.requests[0].json["queries"] == ["a\ufffd"]
    assert server.requests[1].query["q"] == "a\ufffd"


# when to ask again


@pytest.mark.parametrize(
    ("header", "waited"), [("7", 7.0), ("0", 0.5), ("soon", 0.5), ("-3", 0.5), ("٣", 0.5)]
)
def test_a_server_may_ask_for_a_longer_pause(pauses, header, waited):
    busy = Raw([b"busy"], status=429, headers={"Retry-After": header.encode().decode("latin-1")})
    replies = [busy, {"a": 1}]
    with serve(lambda request: replies.pop(0)) as server:
        assert asked(server, retries=1) == {"a": 1}
    assert pauses == [waited]


def test_a_pause_until_a_date_or_for_an_hour(pauses):
    replies = [Raw([], status=503, headers={"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}), {}]
    with serve(lambda request: replies.pop(0)) as server:
        asked(server, retries=1)
    assert pauses == [0.5]
    hour = Raw([], status=503, headers={"Retry-After": "3600"})
    with serve(lambda request: hour) as server:
        with pytest.raises(ToolError, match="status 503.*, and it asks to wait 3600 seconds"):
            asked(server, retries=3)
    assert len(server.requests) == 1 and len(pauses) == 1


# redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_within_the_origin_are_followed(status):
    def answer(request):
        return {"got": request.method} if request.path == "/b" else (status, "/b")

    with serve(answer) as server:
        method = "POST" if status in (307, 308) else "GET"
        assert asked(server) == {"got": method}
        assert [request.path for request in server.requests] == ["/", "/b"]
        assert (server.requests[1].body == server.requests[0].body) == (method == "POST")
        HTTP("x", server.url).request("GET", "/b")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_leaves_the_origin(monkeypatch, status):
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    with serve(lambda request: {"organic": []}) as other:
        for location in (other.url + "/steal", other.url.replace("http:", "")):
            with serve(lambda request, to=location: (status, to)) as server:
                with pytest.raises(ToolError, match="another server .*, which is not asked"):
                    WebSearch("serper", url=server.url).search(["secret plans"])
                assert len(server.requests) == 1
        assert not other.requests


@pytest.mark.parametrize(
    "location",
    ["https://127.0.0.1:{port}/", "ftp://127.0.0.1/", "http://[::1", "http://a:b@c:99999"],
)
def test_other_schemes_and_nonsense_are_other_servers(location):
    with serve(lambda request: (302, location.format(port=server.url.rsplit(":")[-1]))) as server:
        with pytest.raises(ToolError, match="another server|cannot be asked") as caught:
            asked(server)
    assert "b@" not in str(caught.value)


def test_a_loop_of_redirects_ends():
    with serve(lambda request: (302, request.path)) as server:
        with pytest.raises(ToolError, match="more than 5 redirects"):
            asked(server, retries=3)
    assert len(server.requests) == 6


def test_cookies_stay_with_their_server():
    def answer(request):
        return Raw([b"{}"], headers={"Set-Cookie": "session=1; Path=/"})

    with serve(answer) as server:
        client = HTTP("x", server.url)
        client.request("GET")
        client.request("GET")
    assert [request.headers.get("cookie") for request in server.requests] == [None, "session=1"]


@pytest.mark.parametrize("link", ["http://127.0.0.1:1/x", "//evil.example/x", "file:///etc/passwd"])
def test_a_page_of_the_shop_cannot_send_us_elsewhere(link):
    page = (
        f'<p id="instruction-text">Find</p><form action="{link}"><input id="search_input"></form>'
    )
    with serve(lambda request: page) as server:
        site = RemoteSite(server.url)
        site.open(0)
        with pytest.raises(ToolError, match="another server"):
            site.search("tea")
    assert len(server.requests) == 1


# secrets


def spellings(secret):
    """How a server may give a secret back."""
    escaped = json.dumps(secret)[1:-1]
    encoded = base64.b64encode(secret.encode()).decode()
    return {
        "plain": secret,
        "percent": urllib.parse.quote(secret, safe=""),
        "percent, slash left": urllib.parse.quote(secret),
        "percent, lower": urllib.parse.quote(secret, safe="").lower(),
        "percent, all": "".join(f"%{byte:02X}" for byte in secret.encode()),
        "percent, twice": urllib.parse.quote(urllib.parse.quote(secret, safe=""), safe=""),
        "form": urllib.parse.quote_plus(secret),
        "JSON": escaped.replace("/", "\\/"),
        "JSON, all": "".join(f"\\u{ord(letter):04x}" for letter in secret),
        "JSON in JSON": json.dumps(escaped.replace("/", "\\/"))[1:-1],
        "Python": "".join(f"\\x{ord(letter):02x}" for letter in secret),
        "HTML": html.escape(secret),
        "HTML, decimal": "".join(f"&#{ord(letter)};" for letter in secret),
        "HTML, hexadecimal": "".join(f"&#x{ord(letter):X};" for letter in secret),
        "base64": encoded,
        "base64, URL": base64.urlsafe_b64encode(secret.encode()).decode(),
        "base64, behind 1": base64.b64encode(b"u" + secret.encode() + b"!").decode(),
        "base64, behind 2": base64.b64encode(b"u:" + secret.encode() + b"!?").decode(),
        "hexadecimal": secret.encode().hex(),
        "upper": secret.upper(),
    }


@pytest.mark.parametrize("how", spellings(KEY))
@pytest.mark.parametrize("secret", [KEY, "a\"b'c\\d<e>&f%g", "пароль-key"])
def test_every_spelling_is_masked(how, secret):
    text = spellings(secret if how != "Python" else KEY)[how]
    masked = Mask([secret, KEY])(f"your key {text} is wrong")
    assert masked.startswith("your key ") and masked.endswith(" is wrong")
    assert "***" in masked
    rest = masked.removeprefix("your key ").removesuffix(" is wrong").replace("***", "")
    assert len(rest) <= 12, "at most what base64 mixes with its neighbours"


def test_short_secrets_are_masked_where_they_stand_alone():
    mask = Mask(["pw", ""])
    assert (
        mask("pw: pw. https://me:pw@host powpwer%70w")
        == "***: ***. https://me:***@host powpwer%70w"
    )
    assert Mask([])("pw") == "pw"


def test_masking_takes_linear_time():
    mask = Mask([KEY])
    for text in ("\\" * 300_000, "%25" * 100_000, "&#0" * 100_000, "k" * 300_000):
        assert mask(text) == text


SECRET = "s3cr3t-pass/word"
TOKEN = "t0k3n+of&the%url"


def address(url):
    quoted = urllib.parse.quote(SECRET, safe=""), urllib.parse.quote(TOKEN, safe="")
    return (
        url.replace("//", f"//somebody:{quoted[0]}@") + f"/retrieve?token={quoted[1]}&lang=klingon"
    )


def chain(error):
    """All texts of an error: itself, what it was raised from, and the values in their frames."""
    texts = []
    while error is not None:
        texts += [str(error), repr(error), repr(vars(error))]
        texts += traceback.format_exception(error)
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


REPLIES = {
    "status": lambda text: (401, f"bad {text}"),
    "long status": lambda text: (500, "x" * 190 + text),
    "no JSON": lambda text: f"<p>{text}</p>",
    "shape": lambda text: {text: 1},
    "type": lambda text: {"result": [[{"id": [text], "contents": "x"}]]},
    "redirect": lambda text: (302, f"http://127.0.0.1:1/{urllib.parse.quote(text)}"),
}


@pytest.mark.parametrize("kind", REPLIES)
@pytest.mark.parametrize("how", ["plain", "percent", "form", "JSON", "HTML", "base64"])
def test_an_address_is_sent_but_never_told(kind, how, caplog):
    caplog.set_level(logging.DEBUG)
    with serve(lambda request: REPLIES[kind](echo)) as server:
        echo = spellings(SECRET)[how] + " " + spellings(TOKEN)[how]
        retriever = RetrievalServer(address(server.url), retries=0)
        with pytest.raises(ToolError) as caught:
            retriever.search(["a"])
    request = server.requests[0]
    expected = base64.b64encode(f"somebody:{SECRET}".encode()).decode()
    assert request.headers["authorization"] == f"Basic {expected}"
    assert request.query == {"token": TOKEN, "lang": "klingon"}
    own = [record for record in caplog.records if not record.name.startswith("httpcore")]
    told = "\n".join([chain(caught.value), repr(vars(retriever)["url"]), *map(str, own)])
    told += "\n".join(record.getMessage() for record in own)
    for secret in (SECRET, TOKEN, "somebody", "klingon"):
        for spelled in spellings(secret).values():
            assert spelled[:12] not in told
    assert f"retrieval server {server.url}/retrieve" in str(caught.value)
    assert any(record.name == "mem1_kernels.agent._http" for record in own)


def test_what_httpcore_logs_of_a_request_has_no_secret(caplog):
    caplog.set_level(logging.DEBUG)
    with serve(lambda request: {"result": [[]]}) as server:
        RetrievalServer(address(server.url)).search(["a"])
    assert any(record.name.startswith("httpcore") for record in caplog.records)
    text = "\n".join(record.getMessage() for record in caplog.records)
    for secret in (SECRET, TOKEN):
        for spelled in spellings(secret).values():
            assert spelled not in text


def test_a_passage_that_echoes_a_secret():
    def answer(request):
        contents = f"T\n{SECRET}, {urllib.parse.quote_plus(TOKEN)}, somebody speaks klingon"
        return {"result": [[{"id": SECRET, "contents": contents}]]}

    with serve(answer) as server:
        ((found,),) = RetrievalServer(address(server.url)).search(["a"])
    assert found == Passage("***", "T\n***, ***, somebody speaks klingon")


@pytest.mark.parametrize("how", spellings(KEY))
def test_a_search_that_echoes_the_key(monkeypatch, tmp_path, caplog, how):
    caplog.set_level(logging.DEBUG)
    for provider, variable in (("serper", "SERPER_API_KEY"), ("serpapi", "SERPAPI_API_KEY")):
        monkeypatch.setenv(variable, KEY)
        echo = spellings(KEY)[how]
        hit = {"title": echo, "snippet": f"a {echo} b", "link": f"https://e.org/?k={echo}"}
        reply = {"organic": [hit], "organic_results": [hit]}
        with serve(lambda request, reply=reply: reply) as server:
            search = WebSearch(provider, url=server.url, cache=tmp_path)
            found = search.search(["x"])
        with serve(lambda request, echo=echo: (403, "x" * 195 + echo)) as server:
            with pytest.raises(ToolError, match="status 403") as caught:
                WebSearch(provider, url=server.url).search(["x"])
        told = repr(found) + chain(caught.value) + caplog.text
        told += "".join(file.read_text() for file in tmp_path.iterdir())
        assert "***" in repr(found)
        for spelled in spellings(KEY).values():
            assert spelled[:8] not in told


def test_a_key_that_no_header_can_hold(monkeypatch):
    for key in ("ключ", "a\x00b", "a\nb"):
        if "\x00" not in key:
            monkeypatch.setenv("SERPER_API_KEY", key)
            with pytest.raises(ValueError, match="printable ASCII in \\$SERPER_API_KEY") as caught:
                WebSearch("serper")
            assert key not in str(caught.value)
    monkeypatch.setenv("SERPER_API_KEY", f"{KEY}\n")
    with serve(lambda request: {"organic": []}) as server:
        WebSearch("serper", url=server.url).search(["x"])
    assert server.requests[0].headers["x-api-key"] == KEY


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host", "http://host"),
        ("https://me:pw@host:8000/v1?key=a#b", "https://host:8000/v1"),
        ("http://me@x:pw/@host/v1", "http://host/v1"),
        ("http://host:80/@me/v1", "http://host:80/@me/v1"),
        ("http://[::1]:80/@me/v1", "http://[::1]:80/@me/v1"),
        ("http://host:/v1", "http://host:/v1"),
        ("http://u:hunter2/w@h/x", "http://h/x"),
        ("http:/u:hunter2@h/x", "h/x"),
        ("//u:hunter2@h/x?y=1", "h/x"),
        ("C:/data@v2/x.txt", "v2/x.txt"),
        ("me:pw@host?k=1", "host"),
        ("data@v2/questions.txt", "data@v2/questions.txt"),
        ("http://host?k=me@x", "http://host"),
    ],
)
def test_a_public_address(url, shown):
    assert public_address(url) == shown


def test_no_error_shows_a_password():
    for task, options in (
        ("chain", {"corpus": "http://me:pw@host?key=abc"}),
        ("webshop", {"corpus": "ftp://me:pw@host?key=abc"}),
        ("qa", {"corpus": "ftp://me:pw@host?key=abc", "data": "factbook"}),
    ):
        with pytest.raises(ValueError, match="^corpus: .*//host'") as caught:
            make_world(task, sizes=(1,), **options)
        assert "pw" not in str(caught.value) and "abc" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://h", "http://", "http://me:pw@", "http://h:99999"]
)
def test_no_address(url):
    for kind in (RetrievalServer, RemoteSite):
        with pytest.raises(ValueError, match="^url: expected an address") as caught:
            kind(url)
        assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "begin"), [("http", b"HTTP/1.1 200 "), ("https", b"\x16\x03\x03\x40\x00")]
)
def test_a_server_that_drips_is_left_in_time(scheme, begin):
    with drips(begin) as port:
        begun = time.monotonic()
        with pytest.raises(ToolError, match="no answer in time"):
            RetrievalServer(f"{scheme}://127.0.0.1:{port}", timeout=0.5, retries=0).search(["x"])
        assert time.monotonic() - begun < 20  # it would drip for 60 seconds


def test_an_address_that_cannot_be_asked():
    with pytest.raises(ToolError, match="no connection|cannot be asked"):
        RetrievalServer(f"http://{'a' * 70}.example", retries=0).search(["a"])


def test_a_proxy_of_the_environment(monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(lambda request: {"by": "proxy"}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removeprefix("http://"))
        assert HTTP("x", "http://far.example/a").json("GET", same) == {"by": "proxy"}
        monkeypatch.setenv("no_proxy", "far.example")
        with pytest.raises(ToolError):
            HTTP("x", "http://far.example/a", retries=0).json("GET", same)
    assert len(proxy.requests) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout: expected more than 0 seconds, got 0"),
        ({"timeout": float("nan")}, "timeout: expected more than 0 seconds, got nan"),
        ({"timeout": float("inf")}, "timeout: expected more than 0 seconds, got inf"),
        ({"retries": -1}, "retries: expected at least 0, got -1"),
        ({"max_bytes": 0}, "max_bytes: expected at least 1, got 0"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        RetrievalServer("http://127.0.0.1:1", **options)
