"""Numbers in prose come from rows: the inline form, and none typed in closing sections."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from book.plain import Book, Page
from book.reader import translate
from book.values import refresh, typed_numbers, value

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted(ROOT.glob("nbs/**/*.ipynb"))
SPEC = "caglow/table1-faces; CAGlow; corrected; identity_accuracy; ; .3f"


@cache
def text_of(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


@pytest.mark.parametrize("path", CHAPTERS, ids=[p.stem for p in CHAPTERS])
def test_numbers_in_prose_are_those_of_the_rows(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = text_of(path)
    assert refresh(text) == text
    assert text.count("<!--=") == text.count("<!--/-->")


def test_numbers_of_readme_are_those_of_the_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text("utf-8")
    assert refresh(text) == text and text.count("<!--=") == text.count("<!--/-->") > 5


@pytest.mark.parametrize("path", CHAPTERS, ids=[p.stem for p in CHAPTERS])
def test_closing_sections_hold_no_typed_results(path):
    assert typed_numbers(text_of(path)) == []


def test_a_typed_number_is_found():
    section = "## What the paper says, what we found\n\n- {}\n\n## Exercises\n\n0.5\n"
    typed = "ours has 0.551 and 12 %"
    assert typed_numbers(section.format(typed)) == ["0.551", "12 %"]
    form = f"ours has <!--= {SPEC} -->0.551<!--/-->, β = $0.5$, `0.7` (§4.3)"
    assert typed_numbers(section.format(form)) == []


def test_an_altered_number_is_restored(monkeypatch):
    monkeypatch.chdir(ROOT)
    right = refresh(f"<!--= {SPEC} -->?<!--/-->")
    assert refresh(right.replace(value(SPEC), "9.999")) == right != "9.999"


def test_ends_are_those_of_the_seeds(monkeypatch):
    monkeypatch.chdir(ROOT)
    low, mean, high = (float(value(f"{SPEC}{end}")) for end in (" min", "", " max"))
    assert low < mean < high


@pytest.mark.parametrize("spec, message", [
    ("caglow/digits; CAGlow", "2 fields"),
    ("caglow/table1-faces; CAGlow; wrong; frechet; ; .2f", "0 rows"),
    (f"{SPEC} median", "min, max")])
def test_a_wrong_specification_is_named(spec, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message):
        value(spec)


@pytest.mark.parametrize("path", CHAPTERS, ids=[p.stem for p in CHAPTERS])
def test_no_line_begins_with_the_form(path):
    """Markdown would take such a line for a block of HTML."""
    assert not re.search(r"^[ \t>*-]*<!--=", text_of(path), re.M)


def test_readers_see_the_number_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    form = refresh(f"<!--= {SPEC} -->?<!--/-->")
    text = f"It is {form}, α = $0.5$.\n\n| a | b |\n|:--|:--|\n| c | at {form} [x](y) |\n"
    page = Page(Book(ROOT), "nbs/caglow/311_portraits.ipynb")
    for written in (text, translate(text), page.markdown(text)):
        shown = MarkdownIt("gfm-like", {"linkify": False}).render(written)
        assert f"<td style=\"text-align:left\">at {form} <a href=\"y\">x</a></td>" in shown
        assert re.sub(r"<!--.*?-->", "", shown).count(f"{value(SPEC)}") == 2
