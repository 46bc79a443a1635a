"""Addresses without their secrets, and secrets taken out of texts in every spelling."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, unquote, urlsplit

from mem1_kernels._text import valid_text

MASK = "***"
_CREDENTIAL = re.compile(r"key|token|secret|pass|pwd|auth|sig|cred|session", re.IGNORECASE)
_SHORT = 8
_PORTS = {"http": 80, "https": 443}
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?:.*@)?(?P<host>\[[^\[\]@]*\]|[^\[\]:@]*)(?P<port>:\d*)?", re.DOTALL)
_ENTITIES = {"'": "apos", '"': "quot", "&": "amp", "<": "lt", ">": "gt"}


def public_address(url: str) -> str:
    """An address without user, password, query and fragment, for messages, results and logs.

    Of an address that is mistyped, what may be a part of a password is left out too: all up to the
    last "@", and a port that is no number.

    >>> public_address("https://me:pw@host:8013/retrieve?token=abc")
    'https://host:8013/retrieve'
    >>> public_address("https://me:p/w@host:8013/retrieve"), public_address("https:/me:pw@host")
    ('https://host:8013/retrieve', 'host')
    """
    url = str(url)
    scheme, slashes, rest = url.partition("://")
    if not slashes or not _SCHEME.fullmatch(scheme):  # a path, or a scheme that is mistyped
        before, _, behind = url.rpartition("@")
        return re.sub(r"\?[^?]*=.*$", "", behind if ":" in before else url, flags=re.DOTALL)
    shown = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, path = shown.partition("/")
    found = _AUTHORITY.fullmatch(authority)
    if found and ("@" not in path or (found["host"] and found["port"] != ":")):
        return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
    if "@" in rest:
        return f"{scheme}://{re.split('[?#]', rest.rpartition('@')[2], maxsplit=1)[0]}"
    return f"{scheme}://{authority.partition(':')[0]}"


def origin_of(name: str, url: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address; `name` is what the caller calls it.

    Raises:
        TypeError: no text.
        ValueError: no http(s) address. The message shows no user, password or query.

    >>> origin_of("url", "https://me:pw@Host/retrieve")
    ('https', 'host', 443)
    """
    if not isinstance(url, str):
        raise TypeError(f"{name}: expected an address, got {type(url).__name__}")
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError:  # its message may show the password
        scheme, host, port = "", None, None
    twice = re.match("[^/]*//[^/]*://", url)  # the scheme, and so the rest is no path
    if scheme not in _PORTS or not host or twice:
        got = public_address(url)
        raise ValueError(f"{name}: expected an address such as http://host:8000, got {got!r}")
    return scheme, host, port or _PORTS[scheme]


def secrets_of(url: str) -> tuple[list[str], list[str]]:
    """(secrets, private parts) of an address.

    Secrets are its password and the values of parameters whose names speak of a credential
    ("key", "token", ...). Private parts are its user and the other values of its query.
    """
    parts = urlsplit(url)
    secrets = [unquote(parts.password or "")]
    private = [unquote(parts.username or ""), parts.query]
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        (secrets if _CREDENTIAL.search(name) else private).append(value)
    return [value for value in secrets if value], [value for value in private if value]


class Mask:
    """Puts *** in place of secrets, in whatever spelling they come back.

    Known spellings: as it is, percent-encoded (also twice), as a form, with JSON, Python or HTML
    escapes, each of these for some of its characters or all; in hex and in base64, also inside a
    longer text. Case does not matter. A secret of fewer than 8 characters counts only where it
    stands alone.

    >>> mask = Mask(["a/b secret"])
    >>> mask("a/b secret, a%2Fb+secret, a\\\\/b\\\\u0020secret"), mask("no secret")
    ('***, ***, ***', 'no secret')
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        patterns = []
        for secret in sorted({*map(valid_text, secrets)} - {""}, key=len, reverse=True):
            pattern = "".join(map(_spelled, secret))
            if len(secret) < _SHORT:
                pattern = rf"(?<![^\W_]){pattern}(?![^\W_])"
            else:
                pattern = "|".join([pattern, secret.encode().hex(), *_base64(secret)])
            patterns.append(pattern)
        self._pattern = re.compile("|".join(patterns), re.IGNORECASE) if patterns else None

    def __call__(self, text: str) -> str:
        return self._pattern.sub(MASK, text) if self._pattern else text


def _percent(code: int) -> str:
    """A pattern for a percent-encoded byte, encoded again or not."""
    return f"%(?:25){{0,4}}{code:02x}"


# the characters that begin or end an escape, which may be percent-encoded themselves
_BACKSLASH, _AND, _HASH, _END = (f"(?:{re.escape(sign)}|{_percent(ord(sign))})" for sign in "\\&#;")


def _spelled(letter: str) -> str:
    """A pattern for all spellings of a character."""
    code = ord(letter)
    units = letter.encode("utf-16-be").hex()
    spellings = [
        f"{_BACKSLASH}{{0,8}}{re.escape(letter)}",
        "".join(_percent(byte) for byte in letter.encode()),
        "".join(f"{_BACKSLASH}{{1,8}}x{byte:02x}" for byte in letter.encode()),
        "".join(f"{_BACKSLASH}{{1,8}}u{units[at : at + 4]}" for at in range(0, len(units), 4)),
        f"{_AND}{_HASH}0{{0,8}}{code}{_END}",
        f"{_AND}{_HASH}x0{{0,8}}{code:x}{_END}",
    ]
    if letter in _ENTITIES:
        spellings.append(f"{_AND}{_ENTITIES[letter]}{_END}")
    if letter == " ":
        spellings.append(r"\+")
    return f"(?:{'|'.join(spellings)})"


def _base64(secret: str) -> list[str]:
    """What of a secret's base64 does not depend on its neighbours, at each of three offsets."""
    found = []
    for offset in range(3):
        data = b"\0" * offset + secret.encode()
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            begin, end = (0, 2, 3)[offset], len(data) * 8 // 6
            found.append(re.escape(encode(data).decode()[begin:end]))
    return sorted({*found}, key=len, reverse=True)
