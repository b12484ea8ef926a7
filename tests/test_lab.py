"""An explorer in a real JupyterLab in a browser: arrow keys and the mouse move a
slider, and the picture follows.
"""

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

from condgen.explore import sheet_png

CHROMIUM = (os.environ.get("CHROMIUM") or shutil.which("chromium")
            or shutil.which("google-chrome"))
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
MODEL = """
import torch
from condgen.conditions import Classes, Code
from condgen.contracts import Model

class Toy(Model):
    def sample(self, n, temperature=0.7, generator=None, **conditions):
        c = self.condition(n, generator, **conditions)
        w = torch.randn(c.shape[1], *self.shape, generator=torch.Generator().manual_seed(0))
        eps = torch.randn(n, *self.shape, generator=generator)
        return torch.sigmoid((c[:, :, None, None, None] * w).sum(1) + temperature * eps)

model = Toy((3, 6, 6), [Classes("digit", 10), Code("u", 1)])
"""
SHOW = "from condgen.explore import explore\n\nexplore(model, 6, digit=3)"
FIRST = """async () => {
    const bytes = await (await fetch(document.querySelector(".widget-image").src)).arrayBuffer()
    return btoa(String.fromCharCode(...new Uint8Array(bytes)))
}"""
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium"),
    pytest.mark.skipif(not Path(sys.executable).with_name("jupyter-lab").exists(),
                       reason="needs JupyterLab"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab with settings of its own, in a
    folder with one notebook.
    """
    home = tmp_path_factory.mktemp("lab")
    cells = [nbformat.v4.new_code_cell(text) for text in (MODEL, SHOW)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (home / "root").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells,
                                            metadata={"kernelspec": kernel}),
                   home / "root" / "look.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}/"
    places = {name: str(home / name)
              for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR",
                           "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
                           "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               f"--ServerApp.root_dir={home / 'root'}", "--IdentityProvider.token=",
               "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=",
               "--no-browser", "--allow-root"]
    program = str(Path(sys.executable).with_name("jupyter-lab"))
    with (home / "log").open("w") as log:
        server = subprocess.Popen([program, *options], env={**os.environ, **places},
                                  stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(base + "api", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (home / "log").read_text()[-3000:]
                time.sleep(0.2)
        yield base
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(lab: str) -> Iterator[Any]:
    """The notebook's page after all its cells have run."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = chromium.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(90_000)
        page.goto(lab + "doc/tree/look.ipynb")
        page.wait_for_function(
            "window.jupyterapp?.commands.hasCommand('notebook:run-all-cells')")
        page.locator(".jp-CodeCell").nth(1).wait_for()
        page.wait_for_function(
            "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel")
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.locator(".widget-image").wait_for()
        yield page
        chromium.close()


def wanted(**values: Any) -> bytes:
    """The picture of these values, made here."""
    place: dict[str, Any] = {}
    exec(MODEL, place)
    return sheet_png(
        place["model"].sample(6, generator=torch.Generator().manual_seed(0), **values))


def shown(page: Any) -> bytes:
    """The picture on the page."""
    return base64.b64decode(page.evaluate(FIRST))


def until(page: Any, holds: Callable[[bytes], bool]) -> bytes:
    """The first picture for which something holds."""
    end = time.monotonic() + 90
    while not holds(found := shown(page)):
        assert time.monotonic() < end, "the picture did not follow"
        page.wait_for_timeout(30)
    return found


def test_arrow_keys_change_the_image_and_back(page: Any) -> None:
    until(page, wanted(digit=3, u=0.0).__eq__)
    digit, u = page.locator(".noUi-handle").nth(0), page.locator(".noUi-handle").nth(1)
    digit.press("ArrowRight")
    until(page, wanted(digit=4, u=0.0).__eq__)
    page.locator(".widget-html pre").get_by_text("digit=4, u=[0.0]").wait_for()
    digit.press("ArrowLeft")
    until(page, wanted(digit=3, u=0.0).__eq__)
    for key, value in (("End", 1.0), ("Home", -1.0), ("ArrowUp", -0.98)):
        u.press(key)
        until(page, wanted(digit=3, u=value).__eq__)
    assert (page.locator(".jp-CodeCell").count() == 2
            and page.evaluate("document.activeElement.role") == "slider")


def test_image_updates_while_a_slider_is_dragged(page: Any) -> None:
    handle = page.locator(".noUi-handle").nth(1)
    box, before = handle.bounding_box(), shown(page)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    pictures = {before}
    for step in range(1, 6):
        page.mouse.move(x + 12 * step, y)
        pictures.add(until(page, lambda found: found not in pictures))
    page.mouse.up()
    assert len(pictures) == 6
    handle.press("Home")
    until(page, wanted(digit=3, u=-1.0).__eq__)


def test_the_page_is_readable(page: Any) -> None:
    """Every control is labelled and seen in full, tracks line up, and nothing is
    wider than the page.
    """
    labels = page.locator(".widget-label:visible").all_inner_texts()
    assert [text for text in labels if text in ("digit", "u")] == ["digit", "u"] * 2
    assert {"A to B", "temperature", "noise"} <= set(labels)
    lefts = [page.locator(".noUi-target").nth(i).bounding_box()["x"]
             for i in (0, 1, 4, 5)]
    assert max(lefts) - min(lefts) < 1
    assert page.evaluate(
        """[...document.querySelectorAll('.jp-OutputArea-output .widget-label, .widget-image')]
        .every(e => e.scrollWidth <= e.clientWidth + 1 && e.getBoundingClientRect().right <= innerWidth)""")
