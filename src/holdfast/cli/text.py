"""Text of other people on a terminal: shown so that it can neither steer the terminal nor hide what it says.

A description, a file's name or a line of a run file may hold escape sequences, which clear a screen or set a window's
title, and characters that turn the direction of what follows. Each of these is shown as Python would escape it. Secrets
of the run file are not shown at all, whoever's message they are in. Given up: joiners, which emoji and some scripts
need, are shown as escapes too; and secrets of less than three characters, which are part of many a word.
"""

import re
from collections.abc import Iterable

_LONG_WORD = re.compile(r"\S{2000,}")
_MAX_SHOWN = 200
_MIN_SECRET = 3

_secrets: set[str] = set()
"""The secrets of this process's run file."""


def printable(text: str, *, keeps_lines: bool = False) -> str:
    r"""`text` with every character that does not print as an escape, such as `\x1b`. With `keeps_lines`, line breaks
    stay. Of a word that would fill a screen, the beginning is left.

    Those are control and format characters, lone surrogates, separators other than the space, and code points that are
    not assigned. A backslash stays as it is.
    """
    kept = "\n" if keeps_lines else ""
    text = without_secrets(text, _secrets)
    text = "".join(each if each.isprintable() or each in kept else _escaped(each) for each in text)
    return _LONG_WORD.sub(lambda match: shortened(match[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def never_print(secrets: Iterable[str]) -> None:
    """From now on, `printable` leaves these out."""
    _secrets.update(secrets)


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """The text with `***` in place of each secret."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _MIN_SECRET:
            text = text.replace(secret, "***")
    return text


def shortened(text: str) -> str:
    """The text, or its beginning where it is too long for a message."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(text):,} characters)"
