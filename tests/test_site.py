"""The documentation as a site: no link leads nowhere, no page is out of reach, nothing comes from elsewhere."""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from browser import opened
from code_blocks import ROOT, pages

_LINK = re.compile(r"(?<!`)!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_HREF = re.compile(r"""(?:href|src|srcset)=["']([^"']+)["']""")


class _Loader(yaml.SafeLoader):
    """Of mkdocs.yml, whose tags of Python objects are left as they are."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
_Loader.add_constructor("!ENV", lambda loader, node: None)


def config() -> dict[str, Any]:
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)


def text_of(page: str) -> str:
    """A page without its code."""
    return _CODE.sub("", _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8")))


def links_of(page: str) -> list[str]:
    text = text_of(page)
    return [html.unescape(link) for link in (*_LINK.findall(text), *_HREF.findall(text))]


def anchors_of(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and Python-Markdown both make them, and those written out."""
    text = _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    found: dict[str, int] = {}
    anchors = set(re.findall(r'(?:id|name)="([^"]+)"', text)) | set(re.findall(r"\{[^}\n]*#([\w-]+)[^}\n]*\}", text))
    for heading in re.findall(r"^#+ +(.*?)(?: *\{[^}]*\})? *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain.replace("`", "")).strip().lower())
        anchors.add(f"{slug}_{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return anchors


def targets_in(nav: Any) -> list[str]:
    """The pages of a menu, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in nav for page in targets_in(next(iter(part.values())) if isinstance(part, dict) else part)]


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    broken = []
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            assert link.startswith(("https://", "mailto:", "http://127.0.0.1", "http://localhost", "data:")), link
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".md" and anchor not in anchors_of(target.relative_to(ROOT).as_posix()):
            broken.append(f"{link} (no such heading)")
    assert broken == []


@pytest.mark.parametrize("page", [page for page in pages() if page.startswith("docs/")])
def test_pages_of_the_site_link_inside_the_site(page):
    """What is outside of docs/ is not on the site."""
    outside = [
        link
        for link in links_of(page)
        if not re.match(r"[a-z]+:|#", link)
        and not ((ROOT / page).parent / link.partition("#")[0]).resolve().is_relative_to(ROOT / "docs")
    ]
    assert outside == []


def test_every_page_is_in_the_menu_once():
    listed = targets_in(config()["nav"])
    assert sorted(listed) == sorted(page.removeprefix("docs/") for page in pages() if page.startswith("docs/"))


def test_every_page_is_linked_from_another():
    """A reader who has no menu, as on a code host, comes to every page from the README."""
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or not page.endswith(".md"):
            continue
        reached.add(page)
        for link in links_of(page):
            path = link.partition("#")[0]
            target = ((ROOT / page).parent / path).resolve() if path and not re.match(r"[a-z]+:", link) else None
            if target is not None and target.is_relative_to(ROOT) and target.exists():
                waiting.append(target.relative_to(ROOT).as_posix())
    assert sorted(set(pages()) - reached) == []


def test_nothing_of_the_site_comes_from_elsewhere():
    """No fonts, no repository whose stars are fetched, no script that a page names."""
    found = config()
    assert found["theme"]["font"] is False
    assert not {"repo_url", "extra_javascript"} & found.keys()
    for page in pages():
        assert not re.search(r"<script|<iframe|<link\b", text_of(page)), page
        assert not re.search(r"(?:src|srcset)=[\"']https?:", text_of(page)), page
        assert not re.search(r"!\[[^\]]*\]\(https?:", text_of(page)), page


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The site as `make docs` builds it."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="needs the extra `dev` to build the site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


SITE_PAGES = [page.removeprefix("docs/").removesuffix(".md") for page in pages() if page.startswith("docs/")]


@pytest.mark.nightly
@pytest.mark.parametrize("page", SITE_PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1600, "dark")])
def test_a_page_in_a_browser(site, page, width, scheme):
    """It is opened from the folder, as somebody does who has unpacked it."""
    found = opened(site / f"{page}.html", width=width, scheme=scheme)
    assert found.complaints == ()
    assert [url for url in found.requests if not url.startswith("file://")] == []
    assert found.too_wide == ()


_SEARCH = """
import sys
from playwright.sync_api import sync_playwright

address, program, words = sys.argv[1:]
with sync_playwright() as driver:
    page = driver.chromium.launch(executable_path=program, args=["--no-sandbox"]).new_page()
    page.goto(address)
    page.wait_for_selector(".md-search__form", state="visible")
    page.locator("input.md-search__input").press_sequentially(words)
    page.wait_for_selector(".md-search-result__item")
    for found in page.query_selector_all(".md-search-result__item"):
        print(found.inner_text().splitlines()[0])
"""


@pytest.mark.nightly
def test_the_search_of_a_folder_finds_an_option(site):
    """Without a server, where a browser starts no worker."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs a browser to search in")
    pytest.importorskip("playwright.sync_api", reason="needs playwright to open a page")
    command = [sys.executable, "-c", _SEARCH, (site / "index.html").as_uri(), program, "tokens_per_batch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Every option" in done.stdout.splitlines(), done.stderr
