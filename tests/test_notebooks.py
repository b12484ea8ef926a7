"""Every notebook runs from top to bottom, each in a process and a folder of its own,
and none is changed by it.
"""

import json
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
FLAGS = "slow gpu"
RUN = """
import sys
from pathlib import Path
from nbdev.test import test_nb
passed, seconds = test_nb(Path(sys.argv[1]).resolve(), skip_flags=sys.argv[2].split(), basepath=sys.argv[3])
sys.exit(not passed)
"""


ELSEWHERE = ("foundations", "library", "reproduction")  # test_notebooks_library.py
MODELS = [p for p in NOTEBOOKS if p.parent.name not in ELSEWHERE]


def run_notebook(path: Path, tmp_path: Path) -> None:
    """Runs a copy that sees the tree's stored results and settings, and nothing that
    another chapter wrote.
    """
    copy = tmp_path / path.relative_to(ROOT)
    copy.parent.mkdir(parents=True)
    shutil.copy(path, copy)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    if (ROOT / "data").is_dir():
        shutil.copytree(ROOT / "data", tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(copy), FLAGS, str(ROOT)],
        cwd=tmp_path, env={**os.environ, "IPYTHONDIR": str(tmp_path / ".ipython")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("path", MODELS,
                         ids=[str(p.relative_to(ROOT / "nbs")) for p in MODELS])
def test_notebook(path: Path, tmp_path: Path) -> None:
    run_notebook(path, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS,
                         ids=[str(p.relative_to(ROOT / "nbs")) for p in NOTEBOOKS])
def test_notebooks_keep_no_widgets(path: Path) -> None:
    """Saved widgets would have the page ask for fonts and scripts that
    the book does not have.
    """
    assert "widgets" not in json.loads(path.read_text())["metadata"]


def test_flags_are_those_of_the_settings() -> None:
    """The cells skipped here are those that settings.ini names."""
    cfg = ConfigParser(interpolation=None)
    cfg.read(ROOT / "settings.ini")
    assert cfg["DEFAULT"]["tst_flags"] == FLAGS
