"""Writes chapters in plain Markdown, which JupyterLab shows as it is meant.

Authors write Quarto's syntax, which JupyterLab would show as it stands. The copies have
the numbers that the book's pages have, links in place of references, folded solutions,
and code without its ``#|`` lines; they run from top to bottom as the sources do.
``python -m book.plain [folder]`` writes them, by default into ``_build/lab``.
"""

import hashlib
import html
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from nbformat import NotebookNode
from pybtex.database import BibliographyData, parse_file
from pybtex.plugin import find_plugin

from book.reader import AT, BRACKET, CALLOUTS, CODE, DIV, FIGURE, MATH, TABLE
from book.reader import attribute, directives, only_imports, outside

HEADING = (
    r"^(?P<level>#{1,6}) +(?P<title>[^\n]+?)"
    r"(?: *\{(?:#(?P<id>[\w-]+))?[^{}\n]*\})?[ \t]*$"
)
BLOCK = rf"{DIV}(?P<body>.*?)^(?P=colons)[ \t]*$"
EQUATION = r"\$\$(?P<body>.*?)\$\$(?:[ \t]*\{#(?P<id>eq-[\w-]+)\})?"
NAMES = {"eq": "Equation", "fig": "Figure", "tbl": "Table", "sec": "Section"}
ALERTS = {"warning": "warning", "caution": "danger"}  # other callouts: info
MANIFEST = ".written.json"  # what was written last: path → SHA-256


class Label(NamedTuple):
    """What a reference leads to: how it is called, where it stands, its hover text."""

    kind: str
    chapter: int | None
    text: str
    path: str
    cell: str
    title: str


class Book:
    """What chapters need to know of each other; all of it is known when all were read.

    Args:
        root: the folder of ``_quarto.yml``.
    """

    def __init__(self, root: Path):
        quarto = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
        entries = quarto["book"]["chapters"]
        parts = (e["chapters"] if isinstance(e, dict) else [e] for e in entries)
        bib = quarto.get("bibliography")
        self.root, self.paths = root, [path for part in parts for path in part]
        self.works = parse_file(root / bib) if bib else BibliographyData()
        self.bibliography, self.labelled = bib or "no bibliography", False
        self.labels: dict[str, Label] = {}
        self.cited: dict[str, set[str]] = {path: set() for path in self.paths}

    def copies(self) -> dict[str, str]:
        """The chapters' plain text by path: the first round finds labels.

        Raises:
            ValueError: a citation or a reference leads nowhere.
        """
        for self.labelled in (False, True):
            found = {path: Page(self, path).copy() for path in self.paths}
        return found


class Page:
    """A chapter on its way to plain Markdown.

    Args:
        book: where labels are looked up and entered.
        path: the chapter's path from the book's root.
    """

    def __init__(self, book: Book, path: str):
        self.book, self.path, self.cell, self.title = book, path, "", ""
        number = re.match(r"(\d+)_", Path(path).name)
        self.number = int(number[1]) if number else None
        self.section = 0

    def copy(self) -> str:
        """The chapter in plain Markdown: a notebook as JSON, a text as it is."""
        text = (self.book.root / self.path).read_text(encoding="utf-8")
        if not self.path.endswith(".ipynb"):
            return self.markdown(text)
        nb = nbformat.reads(text, as_version=4)
        nb.cells = [new for cell in nb.cells for new in self.plain(cell)]
        if self.book.cited[self.path] and f"refs {self.path}" not in self.book.labels:
            self.enter(f"refs {self.path}", "refs", "References", "references")
        last = self.book.labels.get(f"refs {self.path}")
        if last and last.cell == "references":
            source = f"## References\n\n{self.references()}"
            nb.cells.append(nbformat.v4.new_markdown_cell(source, id="references"))
        return nbformat.writes(nb) + "\n"

    def plain(self, cell: NotebookNode) -> list[NotebookNode]:
        """The cells that stand in a cell's place."""
        self.cell = cell.id
        if cell.cell_type == "code":
            return self.code(cell)
        if cell.cell_type == "markdown":
            cell.source = self.markdown(cell.source)
        return [cell]

    def code(self, cell: NotebookNode) -> list[NotebookNode]:
        """A code cell without ``#|`` lines, folded as on the page, and its caption."""
        flags, options, source = directives(cell.source)
        cell.source = self.spell(source)
        cells = [cell] if source.strip() else []
        unseen = options.get("include") is False or "hide" in flags
        folded = options.get("echo") is False or options.get("code-fold") is True
        if unseen or folded or flags & {"default_exp", "hide_input"} or only_imports(source):
            cell.metadata.setdefault("jupyter", {})["source_hidden"] = True
        if unseen or options.get("output") is False or "hide_output" in flags:
            cell.metadata.setdefault("jupyter", {})["outputs_hidden"] = True
            cell.metadata["collapsed"] = True
        if options.get("eval") is False and cells:
            shown = f"```python\n{source}\n```"
            cells = [nbformat.v4.new_markdown_cell(shown, id=cell.id)]
        for kind in ("fig", "tbl"):
            if caption := options.get(f"{kind}-cap"):
                text = self.caption(kind, options.get("label"), self.refer(caption))
                new = nbformat.v4.new_markdown_cell(text, id=f"{cell.id}-caption"[-64:])
                cells = [new, *cells] if kind == "tbl" else [*cells, new]
        return cells

    def markdown(self, text: str) -> str:
        """Translates Markdown from Quarto's syntax to what every reader knows."""
        text = outside(CODE, BLOCK, self.div, text)
        text = outside(f"{CODE}|{MATH}", HEADING, self.heading, text)
        text = outside(CODE, EQUATION, self.equation, text)
        text = outside(CODE, FIGURE, self.figure, text)
        text = outside(CODE, TABLE, self.table, text)
        text = outside(f"{CODE}|{MATH}", r"\]\(#(?P<id>[\w-]+)\)", self.anchor, text)
        return self.refer(text)

    def enter(self, name: str | None, kind: str, title: str, cell: str = "") -> str:
        """The name and number of something labelled; the first call decides on it."""
        labels = self.book.labels
        if name not in labels:
            if kind == "sec":
                section = f"Section {self.number}.{self.section}"
                text = section if self.section else f"Chapter {self.number}"
                text = title if self.number is None else text
            else:  # as on the pages: anew in each chapter
                ours = [x for x in labels.values() if x[:2] == (kind, self.number)]
                head = "" if self.number is None else f"{self.number}."
                text = f"{NAMES.get(kind)} {head}{len(ours) + 1}"
            where = (self.path, cell or self.cell)
            labels[name] = Label(kind, self.number, text, *where, title)
        return labels[name].text

    def heading(self, m: re.Match) -> str:
        """``## Title {#sec-x}`` becomes a heading with the number of the page."""
        level, self.title = m["level"], self.title or m["title"]
        self.section += len(level) == 2
        numbers = {1: f"{self.number}. ", 2: f"{self.number}.{self.section}. "}
        if m["id"]:
            self.enter(m["id"], "sec", m["title"])
        number = "" if self.number is None else numbers.get(len(level), "")
        return f"{level} {number}{m['title']}"

    def equation(self, m: re.Match) -> str:
        """``$$…$$ {#eq-x}`` becomes a formula with its number."""
        if not m["id"]:
            return m[0]
        number = self.enter(m["id"], "eq", self.title).split()[1]
        body = m["body"].rstrip()
        gap, end = ("\n", "\n") if m["body"].endswith("\n") else (" ", " ")
        return f"$${body}{gap}\\tag{{{number}}}{end}$$"

    def caption(self, kind: str, name: str | None, text: str) -> str:
        """``**Figure 2.1:** text``; what has no label has no number."""
        return f"**{self.enter(name, kind, self.title)}:** {text}" if name else text

    def figure(self, m: re.Match) -> str:
        """``![caption](path){#fig-x}`` becomes an image with a caption below it."""
        alt = attribute("fig-alt", m["attrs"]) or bare(m["caption"])
        caption = self.caption("fig", m["id"], m["caption"])
        return f"![{alt}]({m['path']})\n\n{caption}"

    def table(self, m: re.Match) -> str:
        """A table's caption goes above it."""
        return f"{self.caption('tbl', m['id'], m['caption'])}\n\n{m['rows']}"

    def div(self, m: re.Match) -> str:
        """A callout becomes a box or, if it is folded, ``<details>``."""
        if m["attrs"].strip() == "#refs":
            self.enter(f"refs {self.path}", "refs", "References")
            return self.references()
        kind = next((k for k in CALLOUTS if f".callout-{k}" in m["attrs"]), None)
        if kind is None:
            raise ValueError(f"{self.path}: cannot read the div {{{m['attrs']}}}")
        title = m["title"] or attribute("title", m["attrs"]) or kind.capitalize()
        body = outside(CODE, BLOCK, self.div, m["body"]).strip("\n")
        if attribute("collapse", m["attrs"]) != "true":
            style = f'class="alert alert-{ALERTS.get(kind, "info")}"'
            return f"<div {style}>\n\n**{title}**\n\n{body}\n\n</div>"
        title = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(title, False))
        space = 'style="margin-bottom: 1em"'
        summary = f"<summary><b>{title}</b></summary>"
        return f"<details {space}>{summary}\n\n{body}\n\n</details>"

    def refer(self, text: str) -> str:
        """``@eq-x``, ``@sec-x`` and ``[@key]`` become words with links."""
        text = outside(f"{CODE}|{MATH}", BRACKET, self.citation, text)
        return outside(f"{CODE}|{MATH}", AT, lambda m: self.reference(m["key"]), text)

    def reference(self, key: str, inside: bool = False) -> str:
        """A link to a labelled place, or a work as the sentence names it.

        Raises:
            ValueError: there is no such place or work; the message names the chapter.
        """
        chapter = Path(self.path).name
        if key in self.book.labels:
            label = self.book.labels[key]
            return self.link(label.text, label, f' "{bare(label.title)}"')
        if key.split("-")[0] in NAMES and "-" in key:
            if self.book.labelled:
                kind = NAMES[key.split("-")[0]].lower()
                raise ValueError(f"{chapter}: no {kind} has the label {key!r}")
            return f"@{key}"  # further on in the book: known in the second round
        if key not in self.book.works.entries:
            raise ValueError(f"{chapter}: citation {key!r} is not in "
                             f"{self.book.bibliography}")
        work = self.book.works.entries[key]
        people = [" ".join(p.last_names) for p in work.persons["author"]]
        names = f"{people[0]} et al." if len(people) > 2 else " and ".join(people)
        names = re.sub(r"[{}]", "", names)
        self.book.cited[self.path].add(key)
        year = work.fields["year"]
        text = f"{names}, {year}" if inside else f"{names} ({year})"
        return self.link(text, self.book.labels.get(f"refs {self.path}"))

    def link(self, text: str, label: Label | None, title: str = "") -> str:
        """A link to the cell of a label, which JupyterLab scrolls to."""
        if label is None:
            return text
        return f"[{text}]({self.place(label)}{title})"

    def place(self, label: Label) -> str:
        """Where a label stands, from this chapter."""
        path = Path(os.path.relpath(label.path, Path(self.path).parent)).as_posix()
        return f"{path}#cell-id={label.cell}" if label.cell else path

    def anchor(self, m: re.Match) -> str:
        """``[text](#sec-x)`` becomes a link to a cell, too."""
        label = self.book.labels.get(m["id"])
        return f"]({self.place(label)})" if label else m[0]

    def citation(self, m: re.Match) -> str:
        """``[see @a, p. 3; @b]`` becomes ``(see Ames, 2018, p. 3; Birk, 2019)``."""
        keys = re.findall(AT, m["inner"])
        if any("-" in key and key.split("-")[0] in NAMES for key in keys):
            return m["inner"]  # the references in it are found next
        inner = re.sub(AT, lambda a: self.reference(a["key"], True), m["inner"])
        return f"({inner})"

    def spell(self, code: str) -> str:
        """Names what comments and docstrings refer to."""
        labels = self.book.labels
        return re.sub(AT, lambda m: labels[m[1]].text if m[1] in labels else m[0], code)

    def references(self) -> str:
        """The works that the chapter cites; all works if it cites none."""
        keys = sorted(self.book.cited[self.path]) or list(self.book.works.entries)
        style = find_plugin("pybtex.style.formatting", "plain")()
        markdown = find_plugin("pybtex.backends", "markdown")()
        works = style.format_bibliography(self.book.works, keys)
        lines = [re.sub(r"\\([-.()])", r"\1", w.text.render(markdown)) for w in works]
        return "\n".join("- " + line.replace("\n", " ") for line in lines)


def bare(text: str) -> str:
    """Text that may stand between the quotes of a title."""
    return re.sub(r"[$*_`\\\"\[\]]", "", text)


def digest(path: Path) -> str | None:
    """The SHA-256 of a file, if there is one."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def images(path: str, text: str) -> set[str]:
    """The local files that a chapter's Markdown shows, by their path from the root."""
    notebook = path.endswith(".ipynb")
    cells = json.loads(text)["cells"] if notebook else [{"source": text}]
    shown = "\n\n".join("".join(c["source"]) for c in cells)
    names = re.findall(r"!\[[^\]\n]*\]\(([^)\s]+)", shown)
    local = [name for name in names if not re.match(r"\w+:|/", name)]
    return {os.path.normpath(Path(path).parent / name) for name in local}


def write(root: Path, out: Path) -> list[str]:
    """Writes the copies; one that was edited since is kept.

    Args:
        root: the folder of ``_quarto.yml``.
        out: where the copies go.

    Returns:
        The paths of the copies that were kept.
    """
    manifest = out / MANIFEST
    old = json.loads(manifest.read_text()) if manifest.exists() else {}
    copies = Book(root).copies()
    edited = {p for p in {*old, *copies} if digest(out / p) not in (None, old.get(p))}
    for path in set(old) - set(copies) - edited:  # renamed or left out
        (out / path).unlink(missing_ok=True)
    for path in set(copies) - edited:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(copies[path], encoding="utf-8")
        old[path] = digest(out / path)
    new = {p: h for p, h in old.items() if (out / p).exists()}
    manifest.write_text(json.dumps(new, indent=1))
    for name in {f for p, text in copies.items() for f in images(p, text)}:
        if (root / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, out / name)
    return sorted(edited)


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1]
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else here / "_build" / "lab"
    try:
        kept = write(here, target)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if kept:
        print(f"kept, as edited (remove for a new copy): {', '.join(kept)}")
