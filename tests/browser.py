"""Pages opened in a real browser, without a window: what a reader would see there, and what the browser complains of.

`opened` is skipped where there is no Chromium. Playwright drives the one that the system has; it brings none itself.
"""

import functools
import os
import queue
import shutil
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A picture of a page: its accessible name, and its size on the screen in CSS pixels."""

    label: str
    width: float
    height: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a page is like in a window of some width.

    `complaints` are errors and warnings of the console, and scripts that failed. `requests` are all addresses that the
    page loads beside its own. `too_wide` are the elements that reach beyond the window, where they cannot be scrolled
    by themselves. `overlapping` are texts of a picture that lie over each other. `smallest_text` is the least height of
    letters in pixels, as it appears, and `faintest` the text of the least contrast with what is behind it, with that
    contrast (WCAG 2.2: 4.5 is readable).
    """

    complaints: tuple[str, ...]
    requests: tuple[str, ...]
    too_wide: tuple[str, ...]
    overlapping: tuple[str, ...]
    plots: tuple[Plot, ...]
    smallest_text: float
    faintest: tuple[float, str]
    text: str


def opened(path: Path, *, width: int = 1000, scheme: str = "light", screenshot: Path | None = None) -> Opened:
    """The page of the file `path` in a window of that width, in a `light` or `dark` scheme."""
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"needs one of {', '.join(_NAMES)} to open a page")
    pytest.importorskip("playwright.sync_api", reason="needs playwright to open a page")
    answer: Future[Opened] = Future()
    _windows(program).put((answer, path.resolve(), width, scheme, screenshot))
    return answer.result(timeout=60)


@functools.cache
def _windows(program: str) -> "queue.Queue[Any]":
    """The queue of what is to be opened by the browser of this process. Its thread has playwright's event loop, which
    tests must not find in their own; thread and browser end with the process."""
    asked: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_serve, args=(program, asked), daemon=True).start()
    return asked


def _serve(program: str, asked: "queue.Queue[Any]") -> None:
    from playwright.sync_api import sync_playwright

    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    driver = sync_playwright().start()
    browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"] if is_root else [])
    while True:
        answer, *window = asked.get()
        try:
            answer.set_result(_looked_at(browser, *window))
        except Exception as error:
            answer.set_exception(error)


def _looked_at(browser: Any, path: Path, width: int, scheme: str, screenshot: Path | None) -> Opened:
    complaints: list[str] = []
    requests: list[str] = []
    own = path.as_uri()
    window = {"width": width, "height": 900}
    context = browser.new_context(viewport=window, color_scheme=scheme, reduced_motion="reduce")
    try:
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: requests.append(asked.url) if asked.url != own else None)
        page.goto(own)
        found: dict[str, Any] = page.evaluate(_LOOK)
        if screenshot is not None:
            page.screenshot(path=screenshot, full_page=True)
        return Opened(
            complaints=tuple(complaints),
            requests=tuple(url for url in requests if not url.startswith("data:")),
            too_wide=tuple(found["tooWide"]),
            overlapping=tuple(found["overlapping"]),
            plots=tuple(Plot(**plot) for plot in found["plots"]),
            smallest_text=found["smallestText"],
            faintest=(found["faintest"][0], found["faintest"][1]),
            text=page.inner_text("body"),
        )
    finally:
        context.close()


_LOOK = r"""() => {
  const window_width = document.documentElement.clientWidth;
  const shown = element => {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    return box.width > 0 && box.height > 0 && style.visibility !== "hidden" && Number(style.opacity) > 0;
  };
  const name = element => element.tagName.toLowerCase() + (element.id ? "#" + element.id : "")
    + (element.getAttribute("class") ? "." + element.getAttribute("class").split(/\s+/).join(".") : "")
    + " " + (element.textContent || "").trim().slice(0, 40);
  const scrolls = element => {
    for (let up = element; up && up !== document.body; up = up.parentElement) {
      if (["auto", "scroll", "hidden"].includes(getComputedStyle(up).overflowX)) return true;
    }
    return false;
  };
  const all = [...document.body.querySelectorAll("*")].filter(shown);
  const too_wide = all.filter(each => !each.closest("svg") || each.tagName === "svg")
    .filter(each => each.getBoundingClientRect().right > window_width + 1 && !scrolls(each)).map(name);

  const pictures = [...document.querySelectorAll("svg[role=img], img")].filter(shown);
  const label = picture => picture.getAttribute("aria-label") || picture.getAttribute("alt")
    || (picture.querySelector("title") || {}).textContent || "";
  const plots = pictures.filter(each => each.tagName !== "IMG" || each.naturalWidth > 0).map(each => {
    const box = each.getBoundingClientRect();
    return {label: label(each), width: box.width, height: box.height};
  });

  const overlapping = [];
  for (const picture of document.querySelectorAll("svg")) {
    const texts = [...picture.querySelectorAll("text")].filter(shown).map(each => [each, each.getBoundingClientRect()]);
    for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {
      const [a, b] = [texts[i][1], texts[j][1]];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 2 && high > 3) overlapping.push(texts[i][0].textContent + " | " + texts[j][0].textContent);
    }
  }

  const numbers = color => {
    const found = color.match(/rgba?\(([^)]+)\)/);
    if (!found) return null;
    const [r, g, b, a] = found[1].split(/[ ,\/]+/).map(Number);
    return [r, g, b, a === undefined ? 1 : a];
  };
  const over = (front, back) => front[3] >= 1 ? front
    : [0, 1, 2].map(k => front[k] * front[3] + back[k] * (1 - front[3])).concat([1]);
  const behind = element => {
    const layers = [];
    for (let up = element; up; up = up.parentElement) {
      const color = numbers(getComputedStyle(up).backgroundColor);
      if (color && color[3] > 0) layers.push(color);
      if (color && color[3] >= 1) break;
    }
    const dark = getComputedStyle(document.documentElement).colorScheme.includes("dark")
      && matchMedia("(prefers-color-scheme: dark)").matches;
    return layers.reverse().reduce((back, front) => over(front, back), dark ? [18, 18, 18, 1] : [255, 255, 255, 1]);
  };
  const luminance = color => {
    const [r, g, b] = color.slice(0, 3).map(part => part / 255)
      .map(part => part <= 0.04045 ? part / 12.92 : Math.pow((part + 0.055) / 1.055, 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let smallest_text = Infinity, faintest = [Infinity, ""];
  for (const element of all) {
    const own = [...element.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
    if (!own || ["TITLE", "DESC", "STYLE", "SCRIPT"].includes(element.tagName.toUpperCase())) continue;
    const style = getComputedStyle(element), matrix = element.getScreenCTM ? element.getScreenCTM() : null;
    const scale = matrix ? Math.hypot(matrix.a, matrix.b) : 1;
    smallest_text = Math.min(smallest_text, parseFloat(style.fontSize) * scale);
    const ink = numbers(element.closest("svg") ? style.fill : style.color);
    if (!ink) continue;
    let opacity = 1;
    for (let up = element; up; up = up.parentElement) opacity *= Number(getComputedStyle(up).opacity);
    const back = behind(element), front = over([ink[0], ink[1], ink[2], ink[3] * opacity], back);
    const [high, low] = [luminance(front), luminance(back)].sort((a, b) => b - a);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < faintest[0]) faintest = [contrast, name(element)];
  }
  return {tooWide: too_wide, overlapping, plots, smallestText: smallest_text, faintest};
}"""
