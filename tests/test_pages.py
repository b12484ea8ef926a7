"""The built pages in a browser: nothing asked of the network, no errors, no
page wider than a phone.
"""

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

HTML = Path(__file__).resolve().parents[1] / "_build" / "html"
CHROMIUM = (os.environ.get("CHROMIUM") or shutil.which("chromium")
            or shutil.which("google-chrome"))
PAGES = sorted(str(p.relative_to(HTML))
               for p in [*HTML.glob("index.html"), *HTML.glob("nbs/**/*.html")])
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
pytestmark = [
    pytest.mark.skipif(not PAGES, reason="the book has not been built: make book"),
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def browser() -> Iterator[tuple]:
    """A browser and the address of the book."""
    api = pytest.importorskip("playwright.sync_api")
    with http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Quiet, directory=HTML)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with api.sync_playwright() as p:
            chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            yield chromium, f"http://127.0.0.1:{server.server_port}/"
            chromium.close()
        server.shutdown()


@pytest.mark.parametrize("name", PAGES)
def test_page(browser: tuple, name: str) -> None:
    chromium, base = browser
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    outside, errors = [], []
    page.on("request", lambda r: (None if r.url.startswith((base, "data:", "blob:"))
                                  else outside.append(r.url)))
    page.on("response",
            lambda r: errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(base + name, wait_until="load", timeout=120_000)
    page.evaluate("window.MathJax?.startup?.promise")
    page.wait_for_load_state("networkidle")
    bare = page.locator(".math").count() and not page.locator("mjx-container").count()
    width = page.evaluate("document.documentElement.scrollWidth")
    failed = page.locator("mjx-merror").count()
    page.close()
    assert (outside, errors, bool(bare), failed) == ([], [], False, 0)
    assert width <= 390
