"""The list of chapters, the order of numbers, and the reader that turns
Quarto's syntax into MyST's.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from book import build, reader, readme

ROOT = Path(__file__).resolve().parents[1]
QUARTO = yaml.safe_load((ROOT / "_quarto.yml").read_text())


def chapters() -> list[str]:
    """The chapters of ``_quarto.yml`` in order."""
    entries = QUARTO["book"]["chapters"]
    return [c for entry in entries
            for c in (entry["chapters"] if isinstance(entry, dict) else [entry])]


def notebooks() -> list[str]:
    """The notebooks of the tree."""
    found = (ROOT / "nbs").rglob("*.ipynb")
    return sorted(str(p.relative_to(ROOT))
                  for p in found if ".ipynb_checkpoints" not in p.parts)


def source(path: str) -> str:
    """The code of a notebook."""
    nb = json.loads((ROOT / path).read_text())
    return "\n".join("".join(c["source"])
                     for c in nb["cells"] if c["cell_type"] == "code")


def exports() -> dict[str, str]:
    """Module → notebook, in the order of the list; refuses two
    notebooks for one module.
    """
    found: dict[str, str] = {}
    for path in chapters():
        code = (source(path) if path.endswith(".ipynb") and (ROOT / path).exists()
                else "")
        for name in re.findall(r"^#\| *default_exp +(\S+)", code, re.MULTILINE):
            assert name not in found, (f"{path} and {found[name]} both export {name}: "
                                       "one would overwrite the other")
            found[name] = path
    return found


def number(path: str) -> int | None:
    """The number at the head of a notebook's name."""
    found = re.match(r"(\d+)_", Path(path).name)
    return int(found[1]) if found else None


def test_every_chapter_exists_and_is_listed_once() -> None:
    listed = chapters()
    assert len(set(listed)) == len(listed)
    assert [c for c in listed if not (ROOT / c).exists()] == []


def test_no_notebook_is_missing_from_the_list() -> None:
    assert set(notebooks()) <= set(chapters())


def test_numbers_rise_in_reading_order() -> None:
    numbers = [n for n in map(number, chapters()) if n is not None]
    assert numbers == sorted(set(numbers))


def test_each_module_has_one_notebook() -> None:
    assert exports(), "no notebook exports anything"


def test_quarto_accepts_the_list() -> None:
    rules = [f"quarto-schema-{rule}"
             for rule in ("unknown-key", "type-mismatch", "invalid-enum")]
    checks = [argument for rule in rules for argument in ("--extend-select", rule)]
    program = str(Path(sys.executable).with_name("panache"))
    done = subprocess.run([program, "lint", *checks, str(ROOT / "_quarto.yml")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_table_of_contents() -> None:
    toc = build.toc({"chapters": ["index.md", "a.ipynb",
                                  {"part": "P", "chapters": ["p/01_b.ipynb"]},
                                  "refs.md"]})
    assert toc["root"] == "index"
    assert toc["parts"] == [
        {"chapters": [{"file": "a"}]},
        {"caption": "P", "numbered": 2, "chapters": [{"file": "p/01_b"}]},
        {"chapters": [{"file": "refs"}]},
    ]


@pytest.mark.parametrize(
    ("quarto", "myst"),
    [("# Title {#sec-a}", "(sec-a)=\n# Title"),
     ("## Part {.unnumbered}", "## Part"),
     ("## The set $\\{1, 2\\}$ {#sec-s}", "(sec-s)=\n## The set $\\{1, 2\\}$"),
     ("$$\nx = y\n$$ {#eq-a}", "$$\nx = y\n$$ (eq-a)"),
     ("$$ x_{a} $$", "$$ x_{a} $$"),
     ("see @eq-a, @fig-b.", "see {eq}`eq-a`, {numref}`fig-b`."),
     ("in @sec-c and @tbl-d", "in {numref}`sec-c` and {numref}`tbl-d`"),
     ("([@eq-a])", "({eq}`eq-a`)"),
     ("as [@a2018key] shows", "as {cite:p}`k-a2018key` shows"),
     ("[@a; @b]", "{cite:p}`k-a,k-b`"),
     ("[see @a, p. 3; @b]", "{cite:p}`{see}k-a{p. 3},k-b`"),
     ("@dinh2014nice say", "{cite:t}`k-dinh2014nice` say"),
     ("`@eq-a` and `[@a]`", "`@eq-a` and `[@a]`"),
     ("```python\n@eq-a\n# T {#sec-x}\n```", "```python\n@eq-a\n# T {#sec-x}\n```"),
     ("me@home.org", "me@home.org"),
     ("$a @ b$ and $x$", "$a @ b$ and $x$"),
     ("::: {.callout-note}\nText.\n:::",
      ":::{admonition} Note\n:class: note\n\nText.\n:::"),
     ('::: {.callout-tip collapse="true"}\n## Solution\n\nText.\n:::',
      ":::{admonition} Solution\n:class: tip dropdown\n\n\nText.\n:::"),
     ('::: {.callout-important title="Look"}\nText.\n:::',
      ":::{admonition} Look\n:class: important\n\nText.\n:::"),
     ('![A *cat*](cat.svg){#fig-cat fig-alt="Cat"}',
      ":::{figure} cat.svg\n:name: fig-cat\n:alt: Cat\n\nA *cat*\n:::"),
     ("| a |\n|---|\n| 1 |\n\n: Cap {#tbl-t}",
      ":::{table} Cap\n:name: tbl-t\n\n| a |\n|---|\n| 1 |\n:::"),
     ("::: {#refs}\n:::",
      ":::{bibliography}\n:filter: docname in docnames\n:keyprefix: k-\n:::")],
)
def test_syntax(quarto: str, myst: str) -> None:
    assert reader.translate(quarto, "k-") == myst


@pytest.mark.parametrize("text", ["::: {.panel-tabset}\n:::", "[-@a]", "[@a p. 3]"])
def test_unsupported_syntax_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot read"):
        reader.translate(text)


def cell(text: str, *outputs: dict) -> nbformat.NotebookNode:
    """The cell that the reader makes of one code cell."""
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text, outputs=list(outputs))])
    return reader.read(nbformat.writes(nb)).cells[0]


@pytest.mark.parametrize(
    ("line", "tags"),
    [
        ("default_exp models.glow", ["remove-cell"]),
        ("hide", ["remove-cell"]),
        ("include: false", ["remove-cell"]),
        ("echo: false", ["remove-input"]),
        ("output: false", ["remove-output"]),
        ("code-fold: true", ["hide-input"]),
        ("export", ["library"]),
        ("eval: false", []),
        ("slow", []),
    ],
)
def test_directives(line: str, tags: list[str]) -> None:
    made = cell(f"#| {line}\nx = 1  #| not a directive")
    assert made.metadata.tags == tags
    assert made.source == "x = 1  #| not a directive"


def test_figure_cell() -> None:
    made = cell('#| label: fig-a\n#| fig-cap: "Density: $p$, see @eq-b."\nplot()')
    assert made.metadata.mystnb.figure == {"caption": "Density: $p$, see {eq}`eq-b`.",
                                           "name": "fig-a"}
    assert made.metadata.mystnb.image.alt.startswith("Density")
    table = cell("#| label: tbl-a\n#| tbl-cap: Results\nshow()").metadata.mystnb.figure
    assert table == {"caption": "Results", "name": "tbl-a", "caption_before": True}


def test_documentation_cell() -> None:
    shown = nbformat.v4.new_output("display_data",
                                   data={"text/markdown": "---\n\n#### f\n\n> f (x)"})
    assert cell("show_doc(f)",
                shown).outputs[0].data["text/markdown"] == "\n\n**f**\n\n> f (x)"


def test_references_close_a_page_that_cites() -> None:
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# T\n\nAfter [@a].")])
    cells = reader.read(nbformat.writes(nb)).cells
    assert len(cells) == 2
    prefix = re.search(r"{cite:p}`(\w+-)a`", cells[0].source)[1]
    assert f":keyprefix: {prefix}\n" in cells[1].source


def test_readme_has_todays_map_of_chapters() -> None:
    """``python -m book.readme`` writes it."""
    text = (ROOT / "README.md").read_text()
    assert readme.with_map(text, ROOT) == text


@pytest.mark.parametrize(("code", "folded"), [
    ("import torch\nfrom a import b", True), ("import torch\nx = 1", False), ("%pip list", False)])
def test_import_cells_are_folded(code: str, folded: bool) -> None:
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"#| export\n{code}")])
    tags = reader.read(nbformat.writes(nb)).cells[0].metadata["tags"]
    assert ("hide-input" in tags) == folded
