"""The tree agrees with itself: generated code, metadata, imports, lengths, words,
and nothing of one machine.
"""

import ast
import filecmp
import importlib
import io
import json
import keyword
import os
import re
import shutil
import subprocess
import sys
import tokenize
from configparser import ConfigParser
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CFG = ConfigParser(delimiters=["="], interpolation=None)
CFG.read(ROOT / "settings.ini")
SET = CFG["DEFAULT"]
LAZY = {"torchvision", "torchmetrics", "sklearn", "openTSNE", "imagehash", "matplotlib",
        "ipywidgets", "anywidget",
        "accelerate", "typer", "safetensors", "scipy", "rich", "nbdev", "fastcore"}
AT_HOME = {"explore": {"ipywidgets", "anywidget"}, "game_explorer": {"ipywidgets"},
           "latent_explorer": {"ipywidgets"}, "reference_explorer": {"ipywidgets"},
           "__main__": {"typer"}, "arguments": {"typer"}}
MATHEMATICS = ("bijections", "blocks", "bounds", "divergences", "games", "instability",
               "matching", "reversible", "solvable", "texture_loss")
TORCH_ONLY = {**dict.fromkeys(MATHEMATICS, {"torch", "numpy"}),
              "checks": {"torch"}, "conditions": {"torch", "numpy"}, "contracts": {"torch"},
              "drawing": {"torch"}, "faces": {"torch", "numpy"}, "files": {"torch"},
              "metrics": {"torch"}, "peers": {"torch"}, "trainer": {"torch"},
              "training": {"torch"}}
LIMIT = 88  # columns of code
LONGEST = 500  # lines of a module, without its list of exports
# lines of code that no two places have in common, but for names, numbers and texts
WINDOW = 9
MODULES = sorted(p for p in (ROOT / "condgen").rglob("*.py") if p.name != "_modidx.py")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
TESTS = sorted((ROOT / "tests").glob("test_*.py"))


def program(name: str) -> str:
    """A program of the running environment."""
    return str(Path(sys.executable).with_name(name))


def files() -> list[Path]:
    """The tracked files; in a copy without history, those that .gitignore's
    folders do not hold.
    """
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        names = [ROOT / n for n in out.stdout.decode().split("\0") if n]
        return [p for p in names if p.is_file()]
    skip = {".venv", ".git", "_build", "runs", "__pycache__", "build", "dist"}
    return [p for p in ROOT.rglob("*")
            if p.is_file() and not skip & set(p.relative_to(ROOT).parts)]


def test_library_is_what_the_notebooks_export(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([program("nbdev_export")], cwd=tmp_path, env=env, check=True,
                   capture_output=True)
    made, kept = ({str(p.relative_to(base)) for p in (base / "condgen").rglob("*.py")}
                  for base in (tmp_path, ROOT))
    assert made == kept
    assert [f for f in sorted(made) if not filecmp.cmp(
        tmp_path / f, ROOT / f, shallow=False)] == [], "run nbdev_export"


def test_import_contracts() -> None:
    done = subprocess.run([program("lint-imports"), "--no-cache"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize("path", MODULES,
                         ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_modules_import_heavy_dependencies_lazily(path: Path) -> None:
    """Importing a module loads torch and numpy at most; heavier libraries wait for
    the function that needs them.
    """
    tops: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            tops |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            tops.add(node.module.split(".")[0])
    assert tops & LAZY <= AT_HOME.get(path.stem, set())
    if path.stem in TORCH_ONLY:
        assert ({t for t in tops if t not in sys.stdlib_module_names}
                - {"condgen"} <= TORCH_ONLY[path.stem])


@pytest.mark.parametrize("path", MODULES,
                         ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_names_imported_inside_functions_exist(path: Path) -> None:
    package = ".".join(("condgen", *path.relative_to(ROOT / "condgen").parts[:-1]))
    found = [(importlib.import_module("." * node.level + node.module, package), name)
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.ImportFrom) and node.module
             and (node.level or node.module.split(".")[0] == "condgen")
             for name in node.names]
    assert [f"{module.__name__}.{name.name}" for module, name in found
            if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("path", MODULES,
                         ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_files_are_written_by_one_writer(path: Path) -> None:
    """Pictures go to a stream in memory, and from there to `condgen.files`."""
    calls = [node for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    streams = {"stream", "small", "raw"}
    bad = [ast.unparse(call) for call in calls
           if call.func.attr == "write_bytes" or call.func.attr in ("savefig", "save")
           and call.args and ast.unparse(call.func.value) not in ("safetensors.torch",)
           and ast.unparse(call.args[0]) not in streams]
    assert bad == []


def test_code_is_clean() -> None:
    done = subprocess.run([program("ruff"), "check", "--no-cache", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def module_lines(path: Path) -> list[str]:
    """The lines of a module without those that the export writes: the subtitle as
    docstring, the list of exports, and where cells come from."""
    head, _, rest = path.read_text().partition("__all__ = [")
    lines = (head + rest.partition("]")[2]).splitlines()
    marks = ("# AUTOGENERATED", "# %%")
    return [line for i, line in enumerate(lines)
            if not line.startswith(marks) and not (i < 2 and line.startswith('"""'))]


@pytest.mark.parametrize("path", MODULES,
                         ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_lines_are_short(path: Path) -> None:
    assert [line for line in module_lines(path) if len(line) > LIMIT] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_code_cells_are_narrow(path: Path) -> None:
    """Directives, such as captions, stand on one line, however long they are."""
    cells = [c for c in json.loads(path.read_text())["cells"]
             if c["cell_type"] == "code"]
    lines = [line for c in cells for line in "".join(c["source"]).splitlines()]
    assert ([line for line in lines if len(line) > LIMIT and not line.startswith("#|")]
            == [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_code_in_text_is_narrow(path: Path) -> None:
    """Solutions, for instance: a page would make the reader scroll."""
    texts = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]
             if c["cell_type"] == "markdown"]
    blocks = [block for text in texts
              for block in re.findall(r"```+ ?\{?\.?python.*?\n(.*?)```", text, re.S)]
    assert [line for block in blocks for line in block.splitlines()
            if len(line) > LIMIT] == []


@pytest.mark.parametrize("path", MODULES,
                         ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_modules_are_short(path: Path) -> None:
    assert len(module_lines(path)) <= LONGEST


def normalised(path: Path) -> list[tuple[int, str]]:
    """Lines of the functions of a module: number, and text with names, numbers
    and strings replaced.

    Docstrings, imports, comments and lines of up to three tokens are left out.
    """
    text, code, other = path.read_text(), set(), set()
    for node in ast.walk(ast.parse(text)):
        lines = range(getattr(node, "lineno", 0),
                      (getattr(node, "end_lineno", None) or 0) + 1)
        if isinstance(node, ast.FunctionDef):
            code.update(lines)
        if (isinstance(node, ast.FunctionDef | ast.ClassDef)
                and ast.get_docstring(node) is not None):
            other.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.Import | ast.ImportFrom):
            other.update(lines)
    words: dict[int, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, line = tokenize.tok_name[token.type], token.start[0]
        if (line not in code - other
                or kind in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT")):
            continue
        plain = (token.string if kind == "OP" or keyword.iskeyword(token.string)
                 else kind)
        words.setdefault(line, []).append(plain)
    return [(line, " ".join(found)) for line, found in sorted(words.items())
            if len(found) > 3 and "NAME" in found]


def repeated(paths: list[Path]) -> list[str]:
    """Places whose next `WINDOW` lines are those of an earlier place, but for names,
    numbers and strings.
    """
    seen: dict[tuple[str, ...], str] = {}
    found = []
    for path in paths:
        lines = normalised(path)
        for i in range(len(lines) - WINDOW + 1):
            place = f"{path.name}:{lines[i][0]}"
            first = seen.setdefault(tuple(text for _, text in lines[i : i + WINDOW]),
                                    place)
            if first != place:
                found.append(f"{place} repeats {first}")
    return found


def test_no_two_places_share_more_than_eight_lines() -> None:
    assert repeated(MODULES) == []


def test_a_copy_with_other_names_is_found(tmp_path: Path) -> None:
    body = "\n".join(f"    total = total + values[{k}] * {k}.5" for k in range(WINDOW))
    code = f'def weigh(values):\n    """Add."""\n{body}\n    return total\n'
    (tmp_path / "a.py").write_text(code)
    (tmp_path / "b.py").write_text(
        f"import os\n\n\n{code.replace('total', 'sum_').replace('Add', 'More')}")
    (tmp_path / "c.py").write_text(code.replace("+", "-"))
    paths = [tmp_path / f"{name}.py" for name in "abc"]
    assert repeated(paths) == ["b.py:4 repeats a.py:1", "b.py:6 repeats a.py:3"]


@pytest.mark.parametrize("path", MODULES,
                         ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_terms_are_those_of_the_field(path: Path) -> None:
    """A network is a discriminator, an evaluator or a generator; `"judge"` is a
    stage's name, a key of its noise.
    """
    words = [line for line in path.read_text().replace('"judge"', "").splitlines()
             if re.search("judge|forger", line, re.IGNORECASE)]  # fmt: skip
    assert words == []


@pytest.mark.parametrize("path", TESTS, ids=[p.stem for p in TESTS])
def test_names_of_tests_are_short(path: Path) -> None:
    assert [name for name in re.findall(r"^ *def (test_\w+)", path.read_text(),
                                        re.MULTILINE) if len(name) > 60] == []


def test_numbers_of_chapters_rise_within_each_part() -> None:
    entries = yaml.safe_load((ROOT / "_quarto.yml").read_text())["book"]["chapters"]
    parts = [entry["chapters"] for entry in entries if isinstance(entry, dict)]
    for chapters in parts:
        numbers = [int(m[1])
                   for c in chapters if (m := re.match(r"(\d{3})_", Path(c).name))]
        assert numbers == sorted(set(numbers)), chapters


def lines(key: str) -> list[str]:
    return [line.strip() for line in SET[key].splitlines() if line.strip()]


def test_installed_metadata_comes_from_settings() -> None:
    meta, needed = metadata("condgen"), requires("condgen")
    assert (meta["Name"], meta["Version"], meta["Summary"]) == (
        SET["lib_name"], SET["version"], SET["description"])
    assert meta["Requires-Python"] == f">={SET['min_python']}"
    assert {r.replace(" ", "") for r in needed if "extra ==" not in r} == set(lines(
        "requirements"))
    import condgen

    assert condgen.__version__ == SET["version"]


def test_metadata_has_no_second_source() -> None:
    toml = (ROOT / "pyproject.toml").read_text()
    project = toml.split("[project]")[1].split("\n[")[0]
    assert (re.findall(r"^(\w[\w-]*) =", project, re.MULTILINE)
            == ["name", "requires-python", "dynamic"])
    assert SET["version"] not in (ROOT / "setup.py").read_text()
    assert not [r for r in lines("requirements")
                if re.match(r"(nbdev|fastcore|execnb)\b", r)]


def test_no_machine_paths_or_package_hosts() -> None:
    """No folders of a machine and no package hosts; vendored assets are
    other projects' text.
    """
    folders = re.compile(r"(?:^|[^A-Za-z0-9_.])/(?:"
                         + "|".join(["work", "farm", "tmp", "root", "home"]) + r")/")
    hosts = re.compile(r"\b(?:" + "|".join(["pypi", "pythonhosted", "npmjs", "jsdelivr",
                                            "download.pytorch"]) + r")\.")
    found = []
    for path in files():
        if "vendor" in path.parts or path == Path(__file__):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        hits = [line for line in text.splitlines()
                if folders.search(line) or hosts.search(line)]
        found += [f"{path.relative_to(ROOT)}: {line.strip()[:100]}" for line in hits]
    assert found == []
