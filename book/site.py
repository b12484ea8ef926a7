"""Sphinx extension of the book: chapter numbers, table captions, Quarto's syntax, plain downloads, no thebe."""

import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.transforms import SphinxTransform
from sphinx.util.nodes import make_refnode
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles

from book import reader
from book.plain import Book


def number(collector: TocTreeCollector, env: BuildEnvironment) -> list[str]:
    """Gives every chapter the number of its notebook, so that ``302_caglow.ipynb`` is chapter 302 and stays it."""
    changed = TocTreeCollector.assign_section_numbers(collector, env)
    for doc, anchors in env.toc_secnumbers.items():
        found = re.match(r"(\d+)_", doc.rpartition("/")[2])
        head = [int(found[1])] if found else None

        for anchor, old in anchors.items():
            anchors[anchor] = (*head, *old[1:]) if head and old else None
        for node in [env.titles[doc], *env.tocs[doc].findall(nodes.reference)]:
            old = node.get("secnumber")
            node["secnumber"] = head + list(old[1:]) if head and old else None
    return changed


class table_figure(nodes.figure):  # noqa: N801  (docutils names nodes in lower case)
    """A displayed table with a caption: numbered and referred to as a table."""


class TableFigures(SphinxTransform):
    """Makes a captioned output whose label begins with ``tbl-`` a table."""

    default_priority = 500

    def apply(self) -> None:
        """Renames the class of such figures; nothing else about them differs."""
        for node in self.document.findall(nodes.figure):
            if any(name.startswith("tbl-") for name in node["names"]):
                node.__class__ = table_figure


def read_book(app: Sphinx) -> None:
    """Reads all chapters in plain Markdown: what references are called there, they are called on the pages."""
    app.book = Book(Path(app.srcdir))
    app.copies = app.book.copies()


def references(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """A whole chapter is "Chapter 302", not "Section 302".

    A heading without a number has that of its section.
    """
    for node in doctree.findall(nodes.inline):
        if ("std-numref" in node["classes"]
                and re.fullmatch(r"Section \d+", node.astext())):
            node.children = [nodes.Text(node.astext().replace("Section", "Chapter"))]
    labels = app.env.get_domain("std").anonlabels
    for node in list(doctree.findall(nodes.literal)):
        if "std-numref" in node["classes"]:  # left as the label's name
            text = nodes.inline("", app.book.labels[node.astext()].text,
                                classes=["std", "std-numref"])
            node.replace_self(make_refnode(app.builder, docname, *labels[node.astext()],
                                           text))


def source(app: Sphinx, docname: str, text: list[str]) -> None:
    """Plain Markdown pages are written in Quarto's syntax too."""
    if str(app.env.doc2path(docname)).endswith(".md"):
        text[0] = ("\n\n".join(reader.page([text[0]])) if "{#refs}" not in text[0]
                   else reader.translate(text[0]))


def context(app: Sphinx, page: str, template: str, values: dict,
            doctree: nodes.document | None) -> None:
    """Drops thebe, which Jupyter Book adds to every page and which would ask the network for a kernel."""
    values["script_files"] = [s for s in values["script_files"]
                              if "thebe" not in f"{s}{getattr(s, 'attributes', '')}"]


def downloads(app: Sphinx, error: Exception | None) -> None:
    """The download button gives the copy in plain Markdown, not the source in Quarto's syntax."""
    if error is None and app.builder.format == "html":
        for path, text in app.copies.items():
            target = Path(app.outdir, "_sources", path)
            if target.exists():
                target.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict:
    """Registers the extension."""
    TocTreeCollectorWithStyles.assign_section_numbers = number
    write = (lambda self, node: self.visit_figure(node),
             lambda self, node: self.depart_figure(node))
    app.add_enumerable_node(table_figure, "table", html=write)
    app.add_transform(TableFigures)
    app.connect("source-read", source)
    app.connect("builder-inited", read_book)
    app.connect("doctree-resolved", references)
    app.connect("html-page-context", context, priority=900)
    app.connect("build-finished", downloads)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
