"""Elements of HTML. Text is escaped where it is put in, so that what is not marked as HTML cannot become any."""

from collections.abc import Iterable
from html import escape
from typing import final

from holdfast.visible import visible

_EMPTY = frozenset({"br", "circle", "col", "hr", "img", "input", "line", "meta", "path", "rect"})
_CALLED = {"kind": "class", "for_": "for"}
"""Names of attributes that Python does not allow, or that say less there."""


@final
class Html(str):
    """Text that is HTML already. It is put into a page as it is; any other text is escaped."""

    __slots__ = ()


Content = str | int | float | None
"""What may stand in an element: HTML as it is, text and numbers escaped, None as nothing."""


def html(content: Content) -> Html:
    """The content as HTML. In text, what does not print is written as an escape, and what HTML reads as an entity."""
    if isinstance(content, Html):
        return content
    return Html("" if content is None else escape(visible(str(content)), quote=True))


def joined(parts: Iterable[Content], between: str = "") -> Html:
    """The parts one after the other, with `between` (text) between them."""
    return Html(html(between).join(map(html, parts)))


def element(tag: str, *content: Content, **attributes: Content | bool) -> Html:
    """An element of HTML or SVG. An attribute that is None or False is left out, one that is True has no value. `kind`
    is the class; `_` in a name is written as `-`."""
    opening = f"<{tag}{''.join(_attribute(name, value) for name, value in attributes.items())}>"
    if tag in _EMPTY and not content:
        return Html(opening[:-1] + "/>" if tag != "input" else opening)
    return Html(f"{opening}{joined(content)}</{tag}>")


def lines_of(text: str) -> Html:
    """Text whose line breaks stay."""
    return Html("<br>".join(html(line) for line in text.split("\n")))


def prose(text: Content) -> Html:
    """Text in which what stands between backticks is code."""
    if isinstance(text, Html):
        return text
    parts = str(text or "").split("`")
    if len(parts) % 2 == 0:
        return html(text)
    return joined(element("code", part) if place % 2 else html(part) for place, part in enumerate(parts))


def _attribute(name: str, value: Content | bool) -> str:
    if value is None or value is False:
        return ""
    called = _CALLED.get(name, name.replace("_", "-") if name != "viewBox" else name)
    return f" {called}" if value is True else f' {called}="{html(value)}"'
