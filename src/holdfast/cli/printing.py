"""What is printed of values that others wrote: control characters as escapes, secrets not at all.

A path, a key or a description can hold the codes by which a terminal is steered, or a lone surrogate, which no stream
can encode. Given up: text in which such characters are meant, such as marks of the writing direction.
"""

import re
from collections.abc import Iterable

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, except for tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the writing direction
    "\u2028\u2029\ufeff\ud800-\udfff]"  # line separators, a byte order mark, lone surrogates
)
_MAX_SHOWN = 200
_MIN_SECRET = 3
"""Shorter ones are left, since they are part of many a word."""

_secrets: set[str] = set()
"""The secrets of this command."""


def printable(text: str) -> str:
    """The text with its control characters written as escapes (`\\x1b`), and without the secrets of this command."""
    escaped = _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
    return without_secrets(escaped, _secrets)


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """The text with `***` in place of each secret."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _MIN_SECRET:
            text = text.replace(secret, "***")
    return text


def never_print(secrets: Iterable[str]) -> None:
    """From now on, `printable` leaves these out, whoever's message they are in."""
    _secrets.update(secrets)


def shortened(text: str) -> str:
    """The text, or its beginning where it is too long for a message."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text):,} characters)"
