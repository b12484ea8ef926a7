"""The tree agrees with itself: generated code, metadata, imports, and nothing that belongs to one machine."""

import ast
import filecmp
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CFG = ConfigParser(delimiters=["="], interpolation=None)
CFG.read(ROOT / "settings.ini")
SET = CFG["DEFAULT"]
LAZY = {"torchvision", "torchmetrics", "sklearn", "openTSNE", "imagehash", "matplotlib", "ipywidgets", "anywidget",
        "accelerate", "typer", "safetensors", "scipy", "rich", "nbdev", "fastcore"}  # fmt: skip
AT_HOME = {"explore": {"ipywidgets", "anywidget"}, "__main__": {"typer"}}
TORCH_ONLY = {"bijections": {"torch", "numpy"}, "divergences": {"torch", "numpy"}, "games": {"torch", "numpy"},
              "blocks": {"torch", "numpy"}, "contracts": {"torch"}}  # fmt: skip
MODULES = sorted(p for p in (ROOT / "condgen").rglob("*.py") if p.name != "_modidx.py")


def program(name: str) -> str:
    """A program of the running environment."""
    return str(Path(sys.executable).with_name(name))


def files() -> list[Path]:
    """The tracked files; in a copy without history, those that .gitignore's folders do not hold."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        names = [ROOT / n for n in out.stdout.decode().split("\0") if n]
        return [p for p in names if p.is_file()]
    skip = {".venv", ".git", "_build", "runs", "__pycache__", "build", "dist"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.relative_to(ROOT).parts)]


def test_library_is_what_the_notebooks_export(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([program("nbdev_export")], cwd=tmp_path, env=env, check=True, capture_output=True)
    made, kept = ({str(p.relative_to(base)) for p in (base / "condgen").rglob("*.py")} for base in (tmp_path, ROOT))
    assert made == kept
    assert [f for f in sorted(made) if not filecmp.cmp(tmp_path / f, ROOT / f, shallow=False)] == [], "run nbdev_export"


def test_import_contracts() -> None:
    done = subprocess.run([program("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_modules_start_light(path: Path) -> None:
    """Importing a module loads torch and numpy at most; heavier libraries wait for the function that needs them."""
    tops: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            tops |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            tops.add(node.module.split(".")[0])
    assert tops & LAZY <= AT_HOME.get(path.stem, set())
    if path.stem in TORCH_ONLY:
        assert {t for t in tops if t not in sys.stdlib_module_names} - {"condgen"} <= TORCH_ONLY[path.stem]


def test_code_is_clean() -> None:
    done = subprocess.run([program("ruff"), "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(ROOT)) for p in MODULES])
def test_lines_are_short(path: Path) -> None:
    body = path.read_text().split("__all__ = [")[-1].partition("]")
    assert [line for line in (body[2] or body[0]).splitlines() if len(line) > 120] == []


def lines(key: str) -> list[str]:
    return [line.strip() for line in SET[key].splitlines() if line.strip()]


def test_installed_metadata_comes_from_settings() -> None:
    meta, needed = metadata("condgen"), requires("condgen")
    assert (meta["Name"], meta["Version"], meta["Summary"]) == (SET["lib_name"], SET["version"], SET["description"])
    assert meta["Requires-Python"] == f">={SET['min_python']}"
    assert {r.replace(" ", "") for r in needed if "extra ==" not in r} == set(lines("requirements"))
    import condgen

    assert condgen.__version__ == SET["version"]


def test_metadata_has_no_second_source() -> None:
    toml = (ROOT / "pyproject.toml").read_text()
    project = toml.split("[project]")[1].split("\n[")[0]
    assert re.findall(r"^(\w[\w-]*) =", project, re.MULTILINE) == ["name", "requires-python", "dynamic"]
    assert SET["version"] not in (ROOT / "setup.py").read_text()
    assert not [r for r in lines("requirements") if re.match(r"(nbdev|fastcore|execnb)\b", r)]


def test_nothing_belongs_to_one_machine() -> None:
    """No folders of a machine and no package hosts; vendored assets are other projects' text."""
    folders = re.compile(r"(?:^|[^A-Za-z0-9_.])/(?:" + "|".join(["work", "farm", "tmp", "root", "home"]) + r")/")
    hosts = re.compile(r"\b(?:" + "|".join(["pypi", "pythonhosted", "npmjs", "jsdelivr", "download.pytorch"]) + r")\.")
    found = []
    for path in files():
        if "vendor" in path.parts or path == Path(__file__):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        hits = [line for line in text.splitlines() if folders.search(line) or hosts.search(line)]
        found += [f"{path.relative_to(ROOT)}: {line.strip()[:100]}" for line in hits]
    assert found == []
