"""The plain copies: no Quarto syntax is left, numbers are the page's, links lead
somewhere, code is the same.
"""

import functools
import html
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from book import build, reader
from book.plain import MANIFEST, Book, write

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = yaml.safe_load((ROOT / "_quarto.yml").read_text())["book"]["chapters"]
CHAPTERS = [c for entry in ENTRIES
            for c in (entry["chapters"] if isinstance(entry, dict) else [entry])]
LABEL = r"@(?:eq|sec|fig|tbl)-[\w-]*\w"
RAW = (
    rf"\{{#[\w-]+|\{{\.[\w-]+|\{{=\w+\}}|{LABEL}|\[[^\[\]]*@\w[^\[\]]*\]|(?<![\w@/.])@[a-z]+\d{{4}}\w*"
    r"|^[ \t]*:::|^#\||\]\(#")
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")


@pytest.fixture(scope="module")
def copies() -> dict[str, str]:
    return Book(ROOT).copies()


def cells(path: str, text: str) -> list[dict]:
    """A chapter's cells; a page of text is one."""
    if not path.endswith(".ipynb"):
        return [{"cell_type": "markdown", "id": "", "source": text}]
    return [{**cell, "source": "".join(cell["source"])}
            for cell in json.loads(text)["cells"]]


def raw(path: str, text: str) -> list[str]:
    """What is left of Quarto's syntax."""
    found = []
    for cell in cells(path, text):
        if cell["cell_type"] == "code":
            found += re.findall(rf"^#\|.*|{LABEL}", cell["source"], re.MULTILINE)
        else:
            shown = re.sub(f"{reader.CODE}|{reader.MATH}", "", cell["source"],
                           flags=re.DOTALL | re.MULTILINE)
            found += re.findall(RAW, shown, re.MULTILINE)
            found += re.findall(r"\{#eq-[\w-]+", cell["source"])
    return found


def astray(path: str, text: str, copies: dict[str, str]) -> list[str]:
    """Links to files, or to cells of notebooks, that there are not."""
    found = []
    for cell in cells(path, text):
        if cell["cell_type"] != "markdown":
            continue
        shown = re.sub(f"{reader.CODE}|{reader.MATH}", "", cell["source"],
                       flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^()\s]+)", shown):
            file, _, cell_id = target.partition("#cell-id=")
            name = os.path.normpath(Path(path).parent / file)
            if re.match(r"https?:", target):
                continue
            if name not in copies and not (ROOT / name).is_file():
                found.append(target)
            elif (cell_id
                  and cell_id not in {c["id"] for c in cells(name, copies[name])}):
                found.append(target)
    return found


def changed(source: str, copy: str) -> list[str]:
    """Code cells that differ in more than ``#|`` lines and the names of
    references, or stand elsewhere.
    """
    pairs = []
    for text in (source, copy):
        code = [c for c in cells(".ipynb", text) if c["cell_type"] == "code"]
        bodies = ["\n".join(x for x in c["source"].split("\n")
                            if not x.startswith("#|")).strip("\n") for c in code]
        pairs.append([(c["id"], body, c["outputs"])
                      for c, body in zip(code, bodies) if body])
    if [p[0] for p in pairs[0]] != [p[0] for p in pairs[1]]:
        return ["order"]
    wrong = []
    for (name, old, outputs), (_, new, kept) in zip(*pairs):
        named = r"(?:Equation|Figure|Table|Section|Chapter) [\d.]+".join(
            map(re.escape, re.split(LABEL, old)))
        wrong += [] if re.fullmatch(named, new) and outputs == kept else [name]
    return wrong


@pytest.mark.parametrize("path", CHAPTERS)
def test_copy(path: str, copies: dict[str, str]) -> None:
    assert raw(path, copies[path]) == []
    assert astray(path, copies[path], copies) == []
    if path.endswith(".ipynb"):
        assert changed((ROOT / path).read_text(), copies[path]) == []
        nbformat.validate(nbformat.reads(copies[path], as_version=4))
        labels = re.findall(r"\{#eq-[\w-]+\}", (ROOT / path).read_text())
        numbers = re.findall(r"\\tag\{([\d.]+)\}",
                             json.dumps(copies[path]).replace("\\\\", "\\"))
        head = re.match(r"0*(\d+)_", Path(path).name)
        assert numbers == [f"{head[1]}.{n}" if head else f"{n}"
                           for n in range(1, len(labels) + 1)]


@pytest.mark.parametrize(
    "text",
    ["$$x$$ {#eq-a}", "by @eq-a", "see @sec-b", "@fig-c", "[@a2018key, p. 3]",
     "@a2018key say", "::: {.callout-tip}", ":::", "#| label: fig-a",
     "# Title {#sec-a}", "[a](#sec-a)", ": Caption {#tbl-a}", "## T {.unnumbered}"],
)
def test_what_is_left_is_seen(text: str) -> None:
    assert raw("a.md", text)
    assert not raw("a.md", f"Text.\n\n```\n{text.replace('$$', '')}\n```"
                       if "eq-a}" not in text else "Text.")


def test_wrong_links_and_changed_code_are_seen() -> None:
    text = nbformat.writes(new_notebook(cells=[new_code_cell("x = 1", id="a"),
                                               new_code_cell("y = 2", id="b")]))
    book = {"a/a.ipynb": text, "b/b.md": ""}
    assert astray("b/b.md", "[a](../a/a.ipynb#cell-id=a) and [site](https://x.org)",
                  book) == []
    assert (astray("b/b.md", "[a](a.ipynb) [b](../a/a.ipynb#cell-id=c)", book)
            == ["a.ipynb", "../a/a.ipynb#cell-id=c"])
    assert changed(text, text) == []
    assert changed(text, text.replace("y = 2", "y = 3")) == ["b"]
    assert changed(text, text.replace('"id": "a"', '"id": "c"')) == ["order"]
    source, copy = "#| hide\\nx = 1  # @eq-a", "x = 1  # Equation 1.2"
    assert changed(text.replace("x = 1", source), text.replace("x = 1", copy)) == []


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A book of two chapters that use all of the syntax."""
    drawn = nbformat.v4.new_output("display_data", data={"image/png": PIXEL})
    first = [
        new_markdown_cell("# One {#sec-one}\n\n$$ x $$\n\n$$\ny\n$$ {#eq-y}", id="m1"),
        new_code_cell("#| default_exp one", id="c1"),
        new_code_cell("#| hide\nimport math\nx = 1", id="c2"),
        new_code_cell("#| export\nimport os\nfrom re import sub", id="c3"),
        new_code_cell('#| label: fig-dot\n#| fig-cap: "A dot, see @eq-z."\n'
                          '#| code-fold: true\nx = 2', outputs=[drawn], id="c4"),
        new_markdown_cell("## Part {#sec-part}\n\nBy @eq-y, [this](#sec-next):\n"
                              "\n$$ z $$ {#eq-z}\n\n"
                              "### Deeper {#sec-deep}\n\n## Next {#sec-next}", id="m2"),
        new_markdown_cell("::: {.callout-tip collapse=\"true\"}\n## So `it` is\n"
                              "\nYes, @eq-y.\n:::\n\n::: {.callout-note}\nLook.\n:::",
                          id="m3"),
        new_code_cell('def f():\n    """Of @eq-z."""  # and @sec-two', id="c5"),
    ]
    second = [
        new_markdown_cell("# Two {#sec-two}\n\n$$ w $$ {#eq-w}\n\nAfter @sec-one, "
                              "@sec-next, @sec-deep, @eq-z, @fig-dot, @fig-cat and "
                              "@tbl-t; @a2018 and [see @a2018, p. 3; @b2019].",
                          id="n1"),
        new_markdown_cell("![A *cat*](cat.png){#fig-cat}\n\n| a |\n|---|\n| 1 |\n\n: "
                              "Rows {#tbl-t}", id="n2"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for name, made in (("04_one", first), ("09_two", second)):
        file = tmp_path / "nbs" / name[3:] / f"{name}.ipynb"
        file.parent.mkdir(parents=True)
        nbformat.write(new_notebook(cells=made, metadata={"kernelspec": kernel}), file)
    (tmp_path / "nbs" / "two" / "cat.png").write_bytes(
        (ROOT / "book" / "static" / "explorer.png").read_bytes())
    (tmp_path / "index.md").write_text("# Front\n\nSee [one](nbs/one/04_one.ipynb).\n")
    (tmp_path / "works.bib").write_text(
        "@misc{a2018, title={On A}, author={Ames, Ann and Lee, Bo and Rho, Cy}, "
        "year={2018}}\n"
        "@misc{b2019, title={On B}, author={Birk, Di and Lee, Bo}, year={2019}}\n")
    listed = {"part": "P", "chapters": ["nbs/one/04_one.ipynb", "nbs/two/09_two.ipynb"]}
    book = {"title": "toy", "subtitle": "A toy", "author": "Nobody",
            "chapters": ["index.md", listed]}
    (tmp_path / "_quarto.yml").write_text(
        yaml.safe_dump({"book": book, "bibliography": "works.bib"}))
    return tmp_path


def test_what_becomes_of_everything(tree: Path) -> None:
    copies = Book(tree).copies()
    one, two = (cells(p, text) for p, text in copies.items() if p.endswith(".ipynb"))
    assert [c["id"] for c in one] == ["m1", "c2", "c3", "c4", "c4-caption", "m2", "m3",
                                      "c5"]
    source = {c["id"]: c["source"] for c in [*one, *two]}
    assert source["m1"] == "# 4. One\n\n$$ x $$\n\n$$\ny\n\\tag{4.1}\n$$"
    assert source["m2"].startswith('## 4.1. Part\n\nBy [Equation '
                                   '4.1](04_one.ipynb#cell-id=m1 "One"), [this](04_one')
    assert "[this](04_one.ipynb#cell-id=m2):\n\n$$ z \\tag{4.2} $$\n\n" in source["m2"]
    assert "### Deeper\n\n## 4.2. Next" in source["m2"]
    assert source["c2"] == "import math\nx = 1" and source["c4"] == "x = 2"
    assert (source["c4-caption"] == '**Figure 4.1:** A dot, '
            'see [Equation 4.2](04_one.ipynb#cell-id=m2 "One").')
    assert source["c5"] == 'def f():\n    """Of Equation 4.2."""  # and Chapter 9'
    assert ("<summary><b>So <code>it</code> is</b></summary>\n\nYes, [Equation 4.1]("
            in source["m3"])
    assert source["m3"].endswith('<div class="alert alert-info">\n\n**Note**\n'
                                 '\nLook.\n\n</div>')
    hidden = {c["id"]: c["metadata"].get("jupyter", {})
              for c in one if c["cell_type"] == "code"}
    assert hidden["c2"] == {"source_hidden": True, "outputs_hidden": True}
    assert (hidden["c3"] == hidden["c4"] == {"source_hidden": True}
            and hidden["c5"] == {})
    chapter, section = ("../one/04_one.ipynb#cell-id=" + link
                        for link in ('m1 "One"', 'm2 "Next"'))
    assert (f"After [Chapter 4]({chapter}), [Section 4.2]({section}), [Section 4.1]("
            in source["n1"])
    words = source["n1"].replace("](09_two.ipynb#cell-id=references)", "]")
    assert words.endswith("[Ames et al. (2018)] and (see [Ames et al., 2018], p. 3; "
                          "[Birk and Lee, 2019]).")
    assert source["n2"].startswith("![A cat](cat.png)\n\n**Figure 9.1:** A *cat*\n"
                                   "\n**Table 9.1:** Rows\n\n| a |")
    assert re.findall(r"^- (\w+)", two[-1]["source"], re.MULTILINE) == ["Ann", "Di"]


@pytest.mark.parametrize("old, new, message", [
    ("@b2019", "@nobody", "09_two.ipynb: citation 'nobody' is not in works.bib"),
    ("@sec-one", "@sec-lost", "09_two.ipynb: no section has the label 'sec-lost'"),
    ("@eq-z, @fig", "@eq-lost, @fig",
     "09_two.ipynb: no equation has the label 'eq-lost'")])
def test_a_reference_that_leads_nowhere_is_named(tree, old, new, message):
    file = tree / "nbs" / "two" / "09_two.ipynb"
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    for make in (Book(tree).copies, functools.partial(build.main, tree)):
        with pytest.raises((ValueError, SystemExit)) as error:
            make()
        assert str(error.value).removeprefix("error: ") == message
    assert not (tree / "_build").exists()


@pytest.mark.slow
def test_numbers_and_downloads_are_those_of_the_page(tree: Path) -> None:
    assert build.main(tree) == 0
    for path, text in Book(tree).copies().items():
        page = html.unescape(
            (tree / "_build" / "html" / path).with_suffix(".html").read_text())
        shown = "\n".join(c["source"]
                          for c in cells(path, text) if c["cell_type"] == "markdown")
        assert re.findall(r'class="eqno">\(([\d.]+)\)', page) == re.findall(
            r"\\tag\{([\d.]+)\}", shown)
        captions = re.findall(r'class="caption-number">((?:Figure|Table) [\d.]+)', page)
        assert captions == re.findall(r"\*\*((?:Figure|Table) [\d.]+):\*\*", shown)
        links = re.findall(
            r">(?:<span[^>]*>)?((?:Equation|Figure|Table|Section|Chapter) [\d.]+)<",
            page)
        assert sorted(links) == sorted(re.findall(
            r"\[((?:Equation|Figure|Table|Section|Chapter) [\d.]+)\]", shown))
        heads = re.findall(r'<h[12]><span class="section-number">([\d. ]+)</span>',
                           page)
        assert [h.strip() for h in heads] == re.findall(r"^##? ([\d.]+) ", shown,
                                                        re.MULTILINE)
        assert (tree / "_build" / "html" / "_sources" / path).read_text() == text
        assert f"_sources/{path}" in page


def test_edited_copies_are_kept(tree: Path,
                                tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("lab")
    one, two = (out / "nbs" / "one" / "04_one.ipynb",
                out / "nbs" / "two" / "09_two.ipynb")
    assert write(tree, out) == [] == write(tree, out)
    assert (out / "nbs" / "two" / "cat.png").exists() and (out / "index.md").exists()
    assert set(json.loads((out / MANIFEST).read_text())) == set(Book(tree).paths)

    change: Callable[[Path, str, str], int] = lambda p, a, b: p.write_text(
        p.read_text().replace(a, b))
    change(two, "After", "My own note. After")
    for path in tree.rglob("0*.ipynb"):
        change(path, "# ", "# New ")
    assert write(tree, out) == ["nbs/two/09_two.ipynb"] == write(tree, out)
    assert ("New One" in one.read_text() and "My own note" in two.read_text()
            and "New Two" not in two.read_text())

    for old, new in (("04_one", "05_one"), ("09_two", "10_two")):
        file = next(tree.rglob(f"nbs/*/{old}.ipynb"))
        file.rename(file.with_stem(new))
        change(tree / "_quarto.yml", old, new)
    assert write(tree, out) == ["nbs/two/09_two.ipynb"]
    assert (not one.exists() and two.exists() and one.with_stem("05_one").exists()
            and two.with_stem("10_two").exists())
    two.unlink()
    assert write(tree, out) == []
