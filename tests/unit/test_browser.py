"""`browser.opened` sees what a reader would: each fault is planted in a page, and found in that page alone."""

import pytest

from browser import opened

SOUND = """<!doctype html><html><head><style>:root { color-scheme: light dark; } body { margin: 8px; }</style>
</head><body>
<h1>Numbers</h1><div style="overflow-x: auto"><div style="width: 2000px">a wide table that scrolls by itself</div></div>
<svg role="img" aria-label="loss" viewBox="0 0 400 200" style="width: 100%%"><text x="10" y="20" fill="currentColor">0.1
</text><text x="200" y="20" fill="currentColor">0.2</text></svg>%s</body></html>"""

FAULTS = {
    "complaints": "<script>console.error('lost')</script>",
    "requests": "<img src='https://elsewhere.invalid/a.png'>",
    "too_wide": "<div style='width: 1200px'>too wide</div>",
    "overlapping": "<svg viewBox='0 0 400 200'><text x='9' y='20'>a label</text><text x='20' y='22'>other</text></svg>",
    "smallest_text": "<p style='font-size: 5px'>small print</p>",
    "faintest": "<p style='color: #777; background: #888'>grey on grey</p>",
}


def faults_of(path, **window):
    page = opened(path, **window)
    found = {name for name in ("requests", "too_wide", "overlapping") if getattr(page, name)}
    found |= {"complaints"} if any("lost" in each for each in page.complaints) else set()
    found |= {"smallest_text"} if page.smallest_text < 9 else set()
    return found | ({"faintest"} if page.faintest[0] < 4.5 else set()), page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_sound_page_has_no_fault_and_its_plot(tmp_path, scheme):
    """The plot is as wide as the body, 1000 - 2 * 8 pixels, and half as high."""
    path = tmp_path / "page.html"
    path.write_text(SOUND % "", encoding="utf-8")
    faults, page = faults_of(path, scheme=scheme)
    assert (faults, page.complaints) == (set(), ())
    assert [(plot.label, plot.width, plot.height) for plot in page.plots] == [("loss", 984, 492)]
    assert "Numbers" in page.text


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_found(tmp_path, fault):
    path = tmp_path / "page.html"
    path.write_text(SOUND % FAULTS[fault], encoding="utf-8")
    assert faults_of(path)[0] == {fault}
