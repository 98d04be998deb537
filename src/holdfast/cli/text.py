"""Text of other people on a terminal: shown so that it can neither steer the terminal nor hide what it says.

A description, a file's name or a line of a run file may hold escape sequences, which clear a screen or set a window's
title, and characters that turn the direction of what follows. Each of these is shown as Python would escape it. Given
up: joiners, which emoji and some scripts need, are shown as escapes too.
"""


def printable(text: str, *, keeps_lines: bool = False) -> str:
    r"""`text` with every character that does not print as an escape, such as `\x1b`. With `keeps_lines`, line breaks
    stay.

    Those are control and format characters, lone surrogates, separators other than the space, and code points that are
    not assigned. A backslash stays as it is.
    """
    kept = "\n" if keeps_lines else ""
    return "".join(each if each.isprintable() or each in kept else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
