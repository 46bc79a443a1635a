"""JSON over HTTP for the tools: limits, retries, errors that say what went wrong, and no leak.

The server is not trusted. Its reply may be endless, slow, deeply nested, or echo the key that it
was sent; a redirect may lead to another server, which must get neither the key nor the question.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import email.utils
import json
import logging
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from mem1_kernels._clock import Clock
from mem1_kernels._secrets import Mask, origin_of, public_address, secrets_of
from mem1_kernels._text import valid_text
from mem1_kernels.agent._files import map_text, parse_json
from mem1_kernels.agent.environment import ToolError

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

TIMEOUT = 30.0
RETRIES = 3
MAX_BYTES = 8 * 2**20
MAX_REDIRECTS = 5
MAX_PAUSE = 60.0
RETRIED = {408, 425, 429, 500, 502, 503, 504}
SHOWN = 200
_MAX_ERROR_BYTES = 2**16
_REDIRECTS = {301, 302, 303, 307, 308}
_NOT_FOR_TEXT = {"idna", "punycode", "raw-unicode-escape", "unicode-escape", "utf-7"}


class Reply(NamedTuple):
    """A reply of status 2xx: its address, after redirects, and its text."""

    url: str
    text: str


class _Failure(Exception):
    """What went wrong in an attempt. It holds no request, as exceptions of httpx do.

    Args:
        passing: another attempt may succeed.
        pause: seconds that the server asks to wait.
    """

    def __init__(self, problem: str, *, passing: bool = False, pause: float = 0.0) -> None:
        super().__init__(problem)
        self.passing = passing
        self.pause = pause


class HTTP:
    """A client of one server whose every failure is a `ToolError` that names the service.

    User, password and query of an address stand in no error and no log record. Where the server
    echoes a secret, in whatever spelling, what is returned has *** in its place. Redirects are
    followed within the origin (scheme, host and port) of `url` only, and so is every request.

    Args:
        service: who is asked, for error messages.
        url: the server's address; user and password in it are sent as Basic authentication.
        secrets: what is sent to the server and must not come back, beside the password and the
            credentials in the query of `url`.
        timeout: seconds per attempt, from the connection to the last byte, redirects included; a
            call takes at most `retries + 1` times as long, and its pauses.
        retries: further attempts after a lost connection, a time-out or a status that may pass;
            the pause between attempts starts at `pause` seconds and doubles. A server may ask
            for a longer one (Retry-After), up to 60 seconds.
        max_bytes: bytes of a reply, unpacked; a longer one is an error.

    Raises:
        ValueError: an argument out of its range, or `url` is no http(s) address.
        ImportError: httpx is not installed.
    """

    def __init__(
        self,
        service: str,
        url: str,
        *,
        secrets: Iterable[str] = (),
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        pause: float = 0.5,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError(
                f"{service}: httpx is not installed (`pip install mem1-kernels[agent]`)"
            ) from error
        if not 0 < timeout < float("inf"):
            raise ValueError(f"timeout: expected more than 0 seconds, got {timeout}")
        if retries < 0:
            raise ValueError(f"retries: expected at least 0, got {retries}")
        if max_bytes < 1:
            raise ValueError(f"max_bytes: expected at least 1, got {max_bytes}")
        self._origin = origin_of("url", url)
        parts = urlsplit(url)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        of_url, private = secrets_of(url)
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        hidden = [*secrets, *of_url, *([basic] if password else [])]
        self._mask = Mask(hidden)
        self._mask_error = Mask([*hidden, *private])
        self.service = service
        self.retries = retries
        self.pause = pause
        self.timeout = timeout
        self.max_bytes = max_bytes
        self._url = public_address(url) + (f"?{parts.query}" if parts.query else "")
        self._headers = {
            "Accept": "*/*",
            "Accept-Encoding": "gzip",
            "User-Agent": "mem1-kernels",
            **({"Authorization": f"Basic {basic}"} if user or password else {}),
        }
        self._cookies = httpx.Cookies()
        # The transport alone, for a Client logs the whole address of a request. A connection
        # serves one request, so that the time limit can end it.
        self._transport = httpx.HTTPTransport(
            proxy=_proxy_for(*self._origin[:2]),
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def request(
        self,
        method: str,
        url: str = "",
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        form: Mapping[str, str] | None = None,
    ) -> Reply:
        """Sends a request and returns a reply of status 2xx.

        Args:
            url: relative to the server's address; default: that address.
            params, headers: added to those of the address.
            json, form: the body, as JSON or as a form.

        Raises:
            ToolError: no such reply.
        """
        reply = self._request(
            method, url, params=params, headers=headers, json=json, data=form or None
        )
        return Reply(reply.url, self._mask(reply.text))

    def json(self, method: str, read: Callable[[Any], Any], **arguments: Any) -> Any:
        """Sends a request and returns `read(its JSON)`.

        Args:
            read: LookupError, TypeError, ValueError and AttributeError in it say that the reply
                does not have the shape that it should.

        Raises:
            ToolError: no reply of status 2xx, no JSON, or another shape.
        """
        text = self._request(method, "", **arguments).text
        try:
            content = map_text(parse_json(text), self._mask)
        except (ValueError, RecursionError) as error:
            reason = "" if text.strip()[:1] not in ("{", "[") else f" ({str(error)[:SHOWN]})"
            problem = f"expected JSON{reason}, got {self._shown(text)}"
        else:
            try:
                return read(content)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                names = sorted(content) if isinstance(content, dict) else type(content).__name__
                why = self._mask_error(f"{type(error).__name__}: {error}")[:SHOWN]
                got = self._mask_error(str(names))[:SHOWN]
                problem = f"unexpected reply ({why}), got {got}"
        raise ToolError(f"{self.service}: {problem}")

    def _request(self, method: str, url: str, **arguments: Any) -> Reply:
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(method, url, arguments)
            except _Failure as error:
                failure = error
            if not failure.passing or failure.pause > MAX_PAUSE:
                break
            if attempt < self.retries:
                time.sleep(max(self.pause * 2**attempt, failure.pause))
        problem = f"{self.service}: {failure}"
        if failure.pause > MAX_PAUSE:
            problem += f", and it asks to wait {failure.pause:.0f} seconds"
        elif failure.passing:
            problem += f", after {self.retries + 1} attempt{'s' if self.retries else ''}"
        # outside of every except: the context of an exception would hold the request
        raise ToolError(problem)

    def _attempt(self, method: str, url: str, arguments: Mapping[str, Any]) -> Reply:
        """One attempt, through redirects; raises `_Failure`."""
        import httpx

        clock = Clock(self.timeout)
        try:
            url = _join(self._url, url)
            for _ in range(MAX_REDIRECTS + 1):
                request = self._build(method, url, arguments, clock)
                response = self._transport.handle_request(request)
                response.request = request
                with contextlib.closing(response):
                    self._cookies.extract_cookies(response)
                    status = response.status_code
                    shown = self._mask_error(public_address(url))
                    logger.info("%s %s: status %d", method, shown, status)
                    location = response.headers.get("location")
                    if status not in _REDIRECTS or not location:
                        return self._read(url, response)
                url = _join(url, location)
                if status == 303 or (status in (301, 302) and method == "POST"):
                    method, arguments = "GET", {"headers": arguments.get("headers")}
                else:
                    arguments = {**arguments, "params": None}
            raise _Failure(f"more than {MAX_REDIRECTS} redirects")
        except (httpx.InvalidURL, UnicodeError):  # UnicodeError: a host's name that is too long
            raise _Failure("an address that cannot be asked") from None
        except httpx.HTTPError as error:
            kind = type(error).__name__
            if clock.expired or isinstance(error, httpx.TimeoutException):
                problem = f"no answer in time ({self.timeout:g} seconds)"
            else:
                problem = f"no connection ({kind}: {self._mask_error(str(error))[:SHOWN]})"
            raise _Failure(problem, passing=isinstance(error, httpx.TransportError)) from None
        finally:
            clock.stop()

    def _build(
        self, method: str, url: str, arguments: Mapping[str, Any], clock: Clock
    ) -> httpx.Request:
        import httpx

        try:
            same = origin_of("url", url) == self._origin
        except ValueError:
            same = False
        if not same:
            where = self._shown("/".join(public_address(url).split("/")[:3]))
            raise _Failure(f"it leads to another server ({where}), which is not asked")
        rest = dict(arguments)
        address = httpx.URL(url).copy_merge_params(rest.pop("params", None) or {})
        request = httpx.Request(
            method,
            address,
            headers={**self._headers, **(rest.pop("headers", None) or {})},
            extensions={
                "timeout": dict.fromkeys(("connect", "read", "write", "pool"), self.timeout),
                "trace": clock.trace,
            },
            **rest,
        )
        self._cookies.set_cookie_header(request)
        return request

    def _read(self, url: str, response: httpx.Response) -> Reply:
        """The reply, if its status is 2xx; raises `_Failure` otherwise."""
        import httpx

        if response.is_success:
            body = _body(response, self.max_bytes, whole=True)
            return Reply(url, _text(body, response))
        status = response.status_code
        problem = f"status {status}"
        # a body that cannot be read leaves the status
        with contextlib.suppress(_Failure, httpx.HTTPError):
            text = _text(_body(response, _MAX_ERROR_BYTES, whole=False), response)
            problem += f": {self._shown(text)}"
        pause = _retry_after(response.headers.get("retry-after", ""))
        raise _Failure(problem, passing=status in RETRIED, pause=pause)

    def _shown(self, text: str) -> str:
        """The beginning of a text for an error, masked before it is cut."""
        return repr(self._mask_error(text)[:SHOWN])


def _proxy_for(scheme: str, host: str) -> str | None:
    """The proxy that the environment names (http_proxy, https_proxy, all_proxy, no_proxy)."""
    if proxy_bypass(host):
        return None
    proxies = getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _join(base: str, url: str) -> str:
    try:
        return urljoin(base, url)
    except ValueError:
        raise _Failure("an address that cannot be asked") from None


def _body(response: httpx.Response, limit: int, *, whole: bool) -> bytes:
    """At most `limit` unpacked bytes; where `whole`, more of them or a broken end are a failure."""
    packing = response.headers.get("content-encoding", "").strip().lower()
    if packing not in ("", "identity", "gzip", "x-gzip"):
        raise _Failure(f"a reply packed as {packing[:SHOWN]!r}, which was not asked for")
    unpacker = zlib.decompressobj(31) if "gzip" in packing else None
    parts = []
    room = limit
    raw = 0
    for chunk in response.iter_raw():
        raw += len(chunk)
        if unpacker:
            try:
                chunk = unpacker.decompress(chunk, room + 1)
            except zlib.error:
                raise _Failure("a reply that does not unpack") from None
        parts.append(chunk[:room])
        if len(chunk) > room:
            if whole:
                raise _Failure(f"a reply of more than {limit} bytes")
            break
        room -= len(chunk)
    else:
        if whole and unpacker and raw and not unpacker.eof:
            raise _Failure("a reply that is cut off", passing=True)
    return b"".join(parts)


def _text(body: bytes, response: httpx.Response) -> str:
    """The body as text: by its charset if that is one, else as UTF-8; U+FFFD for what is not."""
    charset = response.charset_encoding
    try:
        name = codecs.lookup(charset or json.detect_encoding(body)).name
    except (LookupError, ValueError):
        name = "utf-8"
    if name == "utf-8" or name in _NOT_FOR_TEXT:
        name = "utf-8-sig"
    try:
        return valid_text(body.decode(name, "replace"))
    except (LookupError, ValueError):  # a codec that is none of text, such as zlib
        return body.decode("utf-8-sig", "replace")


def _retry_after(header: str) -> float:
    """Seconds that a Retry-After header asks for; 0 where it says nothing that can be read."""
    if header.strip().isascii() and header.strip().isdigit():
        return float(header.strip()[:9])
    try:
        until = email.utils.parsedate_to_datetime(header)
        return max(0.0, until.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0
