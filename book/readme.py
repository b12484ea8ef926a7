"""Writes README's map of chapters and modules: ``python -m book.readme`` after a chapter was added or renamed."""

import json
import re
import sys
from pathlib import Path

import yaml

MARKS = "<!-- chapters -->", "<!-- end of chapters -->"


def heads(path: Path) -> tuple[str, str, str]:
    """Title, subtitle and exported module of a chapter.

    The module is empty where none is exported.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = "".join(cells[0]["source"])
    title = re.sub(r"\s*\{#[^}]*\}\s*$", "", first.splitlines()[0].removeprefix("# "))
    subtitle = next((line[2:] for line in first.splitlines() if line.startswith("> ")),
                    "")
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    module = re.search(r"^#\| *default_exp +(\S+)", code, re.MULTILINE)
    return title, subtitle, module[1] if module else ""


def chapter_map(root: Path) -> str:
    """A table of all numbered chapters of ``_quarto.yml``: number and title, module, what it holds."""
    entries = yaml.safe_load(
        (root / "_quarto.yml").read_text(encoding="utf-8"))["book"]["chapters"]
    lines = ["| chapter | module | what it holds |", "|---|---|---|"]
    for part in (entry for entry in entries if isinstance(entry, dict)):
        lines.append(f"| **{part['part']}** | | |")
        for chapter in part["chapters"]:
            title, subtitle, module = heads(root / chapter)
            number = re.match(r"\d+", Path(chapter).name)[0]
            name = (f"`condgen.{module}`" if module and not module.startswith("__")
                    else ("`condgen`" if module else ""))
            lines.append(f"| {number} {title} | {name} | {subtitle.rstrip('.')} |")
    return "\n".join(lines)


def with_map(readme: str, root: Path) -> str:
    """README with today's map between its two marks."""
    before, rest = readme.split(MARKS[0])
    return (f"{before}{MARKS[0]}\n{chapter_map(root)}\n"
            f"{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main(root: Path) -> int:
    """Renews README.md."""
    path = root / "README.md"
    path.write_text(with_map(path.read_text(encoding="utf-8"), root), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path().resolve()))
