"""Reads a chapter written in Quarto's syntax as the MyST text and notebook that Sphinx understands.

Authors write once, in Quarto's syntax: ``quarto render`` reads it directly, our own
build reads it through this module.
"""

import ast
import hashlib
import re
from collections.abc import Callable

import nbformat
import yaml

CODE = (r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^[ \t]*(?P=fence)|"
        r"(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`)")
MATH = r"(?<!\\)\$\$.*?\$\$|(?<![\\$\w])\$(?![\s$])[^$\n]*\$"
HEADING = (r"^(?P<level>#{1,6}) +(?P<title>[^\n]+?) *\{(?:#"
           r"(?P<id>[\w-]+))?[^{}\n]*\}[ \t]*$")
FIGURE = (r"^!\[(?P<caption>[^\n]*)\]\((?P<path>[^)\n]+)\)\{#(?P<id>fig-[\w-]+)"
          r"(?P<attrs>[^}\n]*)\}[ \t]*$")
TABLE = (r"^(?P<rows>(?:\|[^\n]*\n)+)\s*: "
         r"(?P<caption>[^\n]*?) *\{#(?P<id>tbl-[\w-]+)\}[ \t]*$")
DIV = (r"^(?P<colons>:{3,}) *\{(?P<attrs>[^}\n]*)\}[ \t]*\n(?:\s*^#{1,6} +"
       r"(?P<title>[^\n]+)\n)?")
BRACKET = r"\[(?P<inner>[^\[\]\n]*@[^\[\]]*)\](?![(\[{])"
AT = r"(?<![\w@`{}/.\\])@(?P<key>[A-Za-z](?:[\w:-]*\w)?)"
ROLES = {"eq": "eq", "fig": "numref", "tbl": "numref", "sec": "numref"}
CALLOUTS = ("note", "tip", "warning", "caution", "important")
HIDDEN = {"remove-cell": ("hide", "default_exp"), "remove-input": ("hide_input",),
          "remove-output": ("hide_output",)}


def outside(skip: str, rule: str, replace: Callable[[re.Match], str], text: str) -> str:
    """Replaces every match of ``rule`` that does not lie within a match of ``skip``."""
    pattern = re.compile(f"(?P<skip>{skip})|{rule}", re.MULTILINE | re.DOTALL)
    return pattern.sub(lambda m: m[0] if m["skip"] else replace(m), text)


def heading(m: re.Match) -> str:
    """``# Title {#sec-x}`` becomes a target and a plain heading."""
    return (f"({m['id']})=\n" if m["id"] else "") + f"{m['level']} {m['title']}"


def attribute(name: str, attrs: str) -> str | None:
    """The value of ``name="value"`` among a div's or figure's attributes."""
    found = re.search(rf'{name}="([^"]*)"', attrs)
    return found and found[1]


def figure(m: re.Match) -> str:
    """``![caption](path){#fig-x fig-alt="…"}`` becomes a numbered figure."""
    alt = attribute("fig-alt", m["attrs"])
    options = f":name: {m['id']}\n" + (f":alt: {alt}\n" if alt else "")
    return f":::{{figure}} {m['path']}\n{options}\n{m['caption']}\n:::"


def div(m: re.Match, prefix: str) -> str:
    """Callouts become admonitions, ``#refs`` the bibliography.

    Any other div is refused, so that none is lost.
    """
    attrs, colons = m["attrs"], m["colons"]
    if attrs.strip() == "#refs":
        return bibliography(prefix, colons)
    kind = next((k for k in CALLOUTS if f".callout-{k}" in attrs), None)
    if kind is None:
        known = ", ".join(f".callout-{k}" for k in CALLOUTS)
        raise ValueError(f"cannot read the div {{{attrs}}}: "
                         f"known are {known} and #refs")
    style = kind + (" dropdown" if attribute("collapse", attrs) == "true" else "")
    title = m["title"] or attribute("title", attrs) or kind.capitalize()
    return f"{colons}{{admonition}} {title}\n:class: {style}\n\n"


def bibliography(prefix: str, colons: str = ":::") -> str:
    """A list of the works that the page cites (without ``prefix``: of all works).

    The div's own end closes it.
    """
    which = (f":filter: docname in docnames\n:keyprefix: {prefix}\n" if prefix
             else ":all:\n")
    return f"{colons}{{bibliography}}\n{which}"


def citation(m: re.Match, prefix: str) -> str:
    """``[see @a, p. 3; @b]`` becomes one citation, ``[@eq-x]`` a reference."""
    parts = []
    for part in m["inner"].split(";"):
        found = re.fullmatch(rf"\s*(?P<pre>[^@]*?)\s*{AT}(?:,\s*(?P<post>.*?))?\s*",
                             part, re.DOTALL)
        if found is None or found["pre"] == "-":
            raise ValueError(f"cannot read the citation [{m['inner']}]: "
                             "write [@key], [@a; @b] or [see @key, p. 3]")
        if found["key"].split("-")[0] in ROLES:
            return outside(CODE, AT, lambda a: reference(a, prefix), m["inner"])
        pre, post = (f"{{{found[g]}}}" if found[g] else "" for g in ("pre", "post"))
        parts.append(f"{pre}{prefix}{found['key']}{post}")
    return f"{{cite:p}}`{','.join(parts)}`"


def reference(m: re.Match, prefix: str) -> str:
    """``@eq-x``, ``@fig-x``, ``@tbl-x`` and ``@sec-x`` become references, ``@key`` a citation in the sentence."""
    role = ROLES.get(m["key"].split("-")[0]) if "-" in m["key"] else None
    return f"{{{role}}}`{m['key']}`" if role else f"{{cite:t}}`{prefix}{m['key']}`"


def translate(text: str, prefix: str = "") -> str:
    """Translates Markdown from Quarto's syntax to MyST's.

    ``prefix`` keeps a page's citations apart from others'.
    """
    text = outside(CODE, r"(?<=\$\$)[ \t]*\{#(?P<id>eq-[\w-]+)\}",
                   lambda m: f" ({m['id']})", text)
    text = outside(CODE, HEADING, heading, text)
    text = outside(CODE, FIGURE, figure, text)
    text = outside(CODE, TABLE, lambda m: (f":::{{table}} {m['caption']}\n:name: "
                                           f"{m['id']}\n\n{m['rows']}:::"), text)
    text = outside(CODE, DIV, lambda m: div(m, prefix), text)
    text = outside(f"{CODE}|{MATH}", BRACKET, lambda m: citation(m, prefix), text)
    return outside(f"{CODE}|{MATH}", AT, lambda m: reference(m, prefix), text)


def page(texts: list[str]) -> list[str]:
    """Translates the texts of one page and, where it cites, ends it with its references."""
    prefix = hashlib.sha256("".join(texts).encode()).hexdigest()[:8] + "-"
    done = [translate(text, prefix) for text in texts]
    if (any("{cite:" in text for text in done)
            and not any("{bibliography}" in text for text in done)):
        done.append(f":::{{rubric}} References\n:::\n\n{bibliography(prefix)}:::")
    return done


def directives(source: str) -> tuple[set[str], dict, str]:
    """Splits a code cell into the flags and options of its leading ``#|`` lines and the code below them."""
    lines = source.split("\n")
    count = next((i for i, line in enumerate(lines) if not line.startswith("#|")),
                 len(lines))
    marks = [line[2:].removeprefix(" ") for line in lines[:count]]
    flags = {mark.split()[0]
             for mark in marks if re.fullmatch(r"\w+( [\w./ ]+)?", mark.strip())}
    options = yaml.safe_load("\n".join(m for m in marks if m.strip()
                                           and m.split()[0] not in flags)) or {}
    return flags, options, "\n".join(lines[count:]).lstrip("\n")


def only_imports(source: str) -> bool:
    """Whether a cell does nothing but import; the book folds it."""
    try:
        body = ast.parse(source).body
    except SyntaxError:  # magics
        return False
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def code_cell(cell: nbformat.NotebookNode) -> None:
    """Turns a code cell's ``#|`` lines into the tags and figure options that MyST-NB reads."""
    flags, options, cell.source = directives(cell.source)
    tags = (set(cell.metadata.get("tags", []))
            | {tag for tag, names in HIDDEN.items() if flags & set(names)})
    tags |= {"library"} if flags & {"export", "exports"} else set()
    for key, value, tag in (
        ("include", False, "remove-cell"),
        ("echo", False, "remove-input"),
        ("output", False, "remove-output"),
        ("code-fold", True, "hide-input"),
    ):
        tags |= {tag} if options.get(key) is value else set()
    tags |= {"hide-input"} if only_imports(cell.source) else set()
    cell.metadata["tags"] = sorted(tags)
    kind = "tbl" if "tbl-cap" in options else "fig"
    if caption := options.get(f"{kind}-cap"):
        shown = {"caption": caption, "name": options.get("label"),
                 "caption_before": kind == "tbl"}
        alt = options.get("fig-alt") or re.sub(r"[$*_`\\]", "", caption)
        cell.metadata["mystnb"] = {"figure": {k: v for k, v in shown.items() if v},
                                   "image": {"alt": alt}}
    # documentation cells print a rule and a heading, which may not stand in an output
    for output in cell.outputs:
        text = output.get("data", {}).get("text/markdown")
        if text and re.match(r"\s*---", text):
            text = text.lstrip().lstrip("-")
            output.data["text/markdown"] = re.sub(r"^#+ +(.*)$", r"**\1**", text,
                                                  flags=re.MULTILINE)


def read(text: str) -> nbformat.NotebookNode:
    """Reads a notebook's JSON as MyST-NB wants it.

    The notebook itself is not changed.
    """
    nb = nbformat.reads(text, as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "code":
            code_cell(cell)
    written = [c for c in nb.cells if c.cell_type == "markdown"]
    captions = [c for c in nb.cells if c.metadata.get("mystnb")]
    texts = page([c.source for c in written]
                 + [c.metadata.mystnb.figure.caption for c in captions])
    for cell in written:
        cell.source = texts.pop(0)
    for cell in captions:
        cell.metadata.mystnb.figure.caption = texts.pop(0)
    nb.cells += [nbformat.v4.new_markdown_cell(rest, id="references") for rest in texts]
    return nb
