"""Text from outside: made valid Unicode, and made fit for a terminal; errors as one line."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
    "\ufeff\ud800-\udfff]"
)


def valid_text(text: str) -> str:
    r"""The text as valid Unicode: each lone surrogate becomes U+FFFD, a pair its character.

    Tokenizers, files and sockets raise on a lone surrogate, and the JSON escape "\ud83d" is one.

    >>> valid_text("a\ud83d!"), valid_text("\ud83d\ude00") == "\U0001f600"
    ('a\ufffd!', True)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def error_text(error: BaseException) -> str:
    """An error of foreign code as text: its type and message, in valid Unicode.

    >>> error_text(KeyError("a"))
    "KeyError: 'a'"
    """
    try:
        message = str(error)
    except Exception:  # foreign code: its message may itself raise
        message = "(its message cannot be read)"
    return valid_text(f"{type(error).__name__}: {message}")


def printable(text: str) -> str:
    """`text` with control characters shown as escapes, so that it cannot steer a terminal.

    Line feeds and tabs stay. Escaped are the other control characters (ESC, BEL, CR, ...), marks
    that turn the direction of writing, line separators and lone surrogates.

    >>> print(printable("red: \\x1b[31m, bell: \\x07"))
    red: \\x1b[31m, bell: \\x07
    """

    def escaped(found: re.Match[str]) -> str:
        code = ord(found.group())
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _UNPRINTABLE.sub(escaped, text)
