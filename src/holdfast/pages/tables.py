"""Tables. A table that is wider than the screen scrolls within itself, and the page does not."""

from collections.abc import Iterable, Mapping, Sequence

from holdfast.pages.markup import Content, Html, element, joined


def table(
    head: Sequence[Content], rows: Iterable[Sequence[Content]], *, kind: str = "", caption: Content = None
) -> Html:
    """A table: the first column to the left, all others to the right. `kind` is a class; of the kinds `words`,
    whose words break anywhere, and `left` all columns are to the left. Without a head, no line of headings."""
    lines = [element("tr", *(element("th", cell, scope="col") for cell in head))] if head else []
    lines += [element("tr", *(element("td", cell) for cell in row)) for row in rows]
    above = [element("caption", caption)] if caption is not None else []
    inner = element("table", *above, joined(lines), kind=kind or None)
    return element("div", inner, kind="scroll", tabindex=0, role="region", aria_label=caption or "table")


def facts(values: Mapping[str, Content]) -> Html:
    """A table of two columns, of what is so called and its value in words."""
    return table([], list(values.items()), kind="words")
