"""Numbers in prose that come from stored rows.

In the text of a chapter or of README a number of a result stands between two comments, which readers
do not see: ``<!--= caglow/digits; CAGlow; ; accuracy; ; .3f -->0.991<!--/-->``. The
fields are experiment, model, variant, metric, point (``key=value`` pairs with commas)
and format, perhaps followed by ``min`` or ``max`` over training seeds. A line must not
begin with the form: Markdown would read the whole line as HTML. ``python -m
book.values`` writes every number anew; a test holds them equal.
"""

import json
import re
import sys
from pathlib import Path

import nbformat

from condgen.results import stored

NUMBER = re.compile(r"<!--= (?P<spec>[^>]*?) -->(?P<text>.*?)<!--/-->")
# a typed result: digits with a point or a percent sign; sections of papers are none
TYPED = re.compile(r"(?<![§.\d])\d+(?:\.\d+(?: ?%)?| ?%)")
CLOSING = re.compile(r"^## What the (?:papers?|slides) says?[^\n]*\n.*?(?=^## |\Z)", re.M | re.S)


def point(text: str) -> dict[str, object]:
    """The point of a sweep that ``key=value, …`` names; values are JSON, or text."""
    found = {}
    for pair in filter(None, map(str.strip, re.split(r",(?=\s*\w+=)", text))):
        key, _, value = pair.partition("=")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def value(spec: str) -> str:
    """The number that a specification names, formatted.

    Raises:
        ValueError: the specification is not complete, or fits no row or several.
    """
    fields = [field.strip() for field in spec.split(";")]
    if len(fields) != 6:
        raise ValueError(f"{spec!r} has {len(fields)} fields; accepted: experiment; "
                         "model; variant; metric; point; format")
    experiment, model, variant, metric, at, form = fields
    wanted = (model, variant, metric, point(at))
    rows = [r for r in stored(experiment)
            if (r["model"], r["variant"], r["metric"], r["at"]) == wanted]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of {experiment} fit {spec!r}; accepted: one")
    form, _, end = form.partition(" ")
    ends = {"": rows[0]["value"], "min": min(rows[0]["values"]),
            "max": max(rows[0]["values"])}
    if end not in ends:
        raise ValueError(f"{spec!r} ends in {end!r}; accepted: min, max, or nothing")
    return format(ends[end], form)


def refresh(text: str) -> str:
    """The text with every number of a row written anew."""
    return NUMBER.sub(lambda m: f"<!--= {m['spec']} -->{value(m['spec'])}<!--/-->", text)


def typed_numbers(text: str) -> list[str]:
    """Numbers in the closing section of a chapter that do not come from a row.

    Mathematics, code, quotations and names of sections do not count: a setting stands
    as mathematics or code.
    """
    found = []
    for section in CLOSING.findall(text):
        plain = NUMBER.sub("", section)
        plain = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|“[^”]*”|\"[^\"]*\"", "", plain,
                       flags=re.S)
        found += TYPED.findall(plain)
    return found


def main(root: Path = Path()) -> None:
    """Write the numbers of all chapters, and of README, anew."""
    front = root / "README.md"
    if front.exists():
        front.write_text(refresh(front.read_text("utf-8")), encoding="utf-8")
    for path in sorted(root.glob("nbs/**/*.ipynb")):
        book = nbformat.read(path, as_version=4)
        cells = [c for c in book.cells if c.cell_type == "markdown"]
        before = [c.source for c in cells]
        for cell in cells:
            cell.source = refresh(cell.source)
        if before != [c.source for c in cells]:
            text = nbformat.writes(book, indent=1, ensure_ascii=False)
            path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
            print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
