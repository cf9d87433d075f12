"""A real headless Chromium for the tests that look at pages; they are skipped, with the reason, where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium_path() -> str | None:
    """The browser: ``TMPQ_EXP_CHROMIUM``, or one of the usual names on the path."""
    return os.environ.get("TMPQ_EXP_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The running browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright (the dev extra)")
    path = chromium_path()
    if path is None:
        pytest.skip("needs Chromium or Chrome (apt-get install chromium), or its path in TMPQ_EXP_CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page in the browser, with everything it complained of.

    Args:
        page: Playwright's page, loaded.
        complaints: Errors and warnings of the console, uncaught exceptions and requests to the network.
    """

    def __init__(self, page: Any, complaints: list[str]) -> None:
        self.page, self.complaints = page, complaints

    def centre(self, selector: str, index: int = 0) -> tuple[float, float]:
        """Middle of an element on the screen, after scrolling to it."""
        element = self.page.locator(selector).nth(index)
        element.scroll_into_view_if_needed()
        box = element.bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def contrast(self, selector: str) -> float:
        """Contrast of an element's text on its ground, as WCAG 2 defines it."""
        return float(self.page.evaluate(CONTRAST, selector))


CONTRAST = """selector => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const element = document.querySelector(selector);
  let ground = element;
  while (ground.parentElement && channels(getComputedStyle(ground).backgroundColor)[3] === 0) {
    ground = ground.parentElement;
  }
  const colours = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
  const [low, high] = colours.map(channels).map(luminance).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}"""


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """Opens a file in a window of its own: ``width``, ``scheme`` (light or dark) and ``touch`` can be chosen."""
    with ExitStack() as stack:

        def opened(path: Path, *, width: int = 1200, scheme: str = "light", touch: bool = False) -> Tab:
            context = chromium.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touch, is_mobile=touch
            )
            stack.callback(context.close)
            page = context.new_page()
            complaints: list[str] = []
            page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url))
            page.goto(path.as_uri())
            return Tab(page, complaints)

        yield opened
