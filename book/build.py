"""Builds the book: ``python -m book.build [folder]`` writes _build/html from _quarto.yml, notebooks and this folder."""

import hashlib
import importlib.util
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from book.plain import Book

VENDOR = Path(__file__).parent / "vendor"
MYST = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath",
        "replacements", "smartquotes", "tasklist"]
# on pages that show a widget only
WIDGETS = {"vendor/requirejs/require.js": {}, "widgets.js": {}}


def stem(path: str) -> str:
    """A chapter's document name: its path without the suffix."""
    return path.rpartition(".")[0]


def toc(book: dict) -> dict:
    """Jupyter Book's table of contents from the ``book`` section of ``_quarto.yml``."""
    root, *entries = book["chapters"]
    parts: list[dict] = []
    for entry in entries:
        if isinstance(entry, dict):
            files = [{"file": stem(c)} for c in entry["chapters"]]
            parts.append({"caption": entry["part"], "numbered": 2, "chapters": files})
        elif parts and "caption" not in parts[-1]:
            parts[-1]["chapters"].append({"file": stem(entry)})
        else:
            parts.append({"chapters": [{"file": stem(entry)}]})
    return {"format": "jb-book", "root": stem(root), "parts": parts}


def config(quarto: dict, root: Path, static: Path) -> dict:
    """Jupyter Book's configuration."""
    book = quarto["book"]
    logo = {"text": book["title"], "image_light": str(static / "logo.svg"),
            "image_dark": str(static / "logo-dark.svg")}
    return {
        "title":
            f"{book['title']}: {book['subtitle'][0].lower()}{book['subtitle'][1:]}",
        "author": book["author"],
        "copyright": "",
        "only_build_toc_files": True,
        "exclude_patterns": ["_build", ".*", "**/.*", "runs", "data", "condgen",
                             "tests", "book/vendor"],
        "execute": {"execute_notebooks": "off"},
        "html": {"favicon": str(static / "favicon.svg"), "home_page_in_navbar": True,
                 "use_multitoc_numbering": False},
        "repository": {"url": ""},
        "bibtex_bibfiles": [str(root / quarto["bibliography"])],
        "sphinx": {"extra_extensions": ["book.site"], "config": {
            "project": book["title"],
            "html_static_path": [str(static)],
            "html_css_files": ["theme.css"],
            "html_show_copyright": False,
            "html_context": {"default_mode": "auto"},
            "html_theme_options": {"logo": logo,
                                   "search_bar_text": "Search this book",
                                   "show_toc_level": 2,
                                   "home_page_in_toc": True,
                                   "navbar_persistent": [],
                                   "pygments_light_style": "friendly",
                                   "pygments_dark_style": "github-dark",
                                   "use_download_button": True},
            "bibtex_reference_style": "author_year",
            "bibtex_default_style": "plain",
            "mathjax_path": "vendor/mathjax/tex-chtml-full.js",
            "mathjax3_config": {"options": {"enableMenu": False}},
            "math_eqref_format": "Equation {number}",
            "numfig": True,
            "math_numfig": True,
            "numfig_format": {"figure": "Figure %s", "table": "Table %s",
                              "section": "Section %s"},
            "myst_enable_extensions": MYST,
            "nb_custom_formats": {".ipynb": ["book.reader.read", {}]},
            "nb_ipywidgets_js": WIDGETS,
            "nb_render_markdown_format": "myst",
            "nb_merge_streams": True,
            "suppress_warnings": ["bibtex.duplicate_label"],
            "language": "en"}},
    }


def collect(static: Path) -> None:
    """Gathers the files that pages load, after checking that the vendored ones are what they were."""
    for line in (VENDOR / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        if hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() != digest:
            raise SystemExit(f"book/vendor/{name} has changed: "
                             "restore it, or renew SHA256SUMS as README.md there says")
    shutil.rmtree(static, ignore_errors=True)
    shutil.copytree(VENDOR.parent / "static", static)
    shutil.copytree(VENDOR, static / "vendor")
    for packed in static.rglob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    widget = (Path(importlib.util.find_spec("anywidget").origin).parent / "nbextension"
              / "index.js")
    shutil.copy(widget, static / "vendor" / "anywidget.js")


def main(root: Path) -> int:
    """Builds the book of the tree at ``root``; warnings are errors."""
    quarto = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    try:
        Book(root).copies()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    out = root / "_build"
    collect(out / "static")
    for name, content in (("_toc.yml", toc(quarto["book"])),
                          ("_config.yml", config(quarto, root, out / "static"))):
        (out / name).write_text(yaml.safe_dump(content, sort_keys=False,
                                               allow_unicode=True), encoding="utf-8")
    program = str(Path(sys.executable).with_name("jupyter-book"))
    command = [
        program,
        "build",
        str(root),
        "--path-output",
        str(root),
        "--config",
        str(out / "_config.yml"),
        "--toc",
        str(out / "_toc.yml"),
        "--all",
        "-n",
        "-W",
        "--keep-going",
        "-q",
    ]
    path = os.pathsep.join([str(Path(__file__).parents[1]),
                            os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path},
                          cwd=root).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()))
