"""The skeleton of a page: its head, which forbids whatever would be loaded or run, its style, and its body."""

from holdfast.pages.markup import Html, html
from holdfast.pages.style import CSS

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""What a browser may do with a page: use the style within it, and pictures that are written into it."""


def page(title: str, *body: Html, style: str = "", refresh_seconds: int | None = None) -> str:
    """The HTML of a whole page. `style` is CSS that follows the kit's. With `refresh_seconds` the page loads itself
    again so often, which needs no script."""
    again = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html(title)}</title><style>{CSS}{style}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )
