r"""Text of a dataset, made visible: what does not print is written as an escape, such as `\x1b` or `\u202e`.

So no row can steer a terminal, or hide what it says by turning the direction of what follows.
"""

SPACES = {" ": "\u00b7", "\t": "\u2192", "\n": "\u21b5"}
"""Signs for white space: a dot for a space, an arrow for a tab, a hook for the end of a line."""


def visible(text: str, *, keeps_lines: bool = False, shows_spaces: bool = False) -> str:
    """The text with an escape for each character that does not print: control and format characters, separators other
    than the space, code points that are not assigned. With `keeps_lines`, line breaks stay. With `shows_spaces`, white
    space is shown as `SPACES`, and a line break still breaks the line."""
    return "".join(_shown(each, keeps_lines, shows_spaces) for each in text)


def _shown(character: str, keeps_lines: bool, shows_spaces: bool) -> str:
    is_kept_line = keeps_lines and character == "\n"
    if shows_spaces and character in SPACES:
        return SPACES[character] + ("\n" if is_kept_line else "")
    if is_kept_line or character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
