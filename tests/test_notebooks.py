"""Every notebook runs from top to bottom, each in a process and a folder of its own,
and none is changed by it.
"""

import json
import multiprocessing
import os
import shutil
import sys
from configparser import ConfigParser
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
FLAGS = "slow gpu"
PRELOADED = ["torch", "matplotlib.pyplot", "nbdev.test", "scipy.stats", "ipywidgets"]


ELSEWHERE = ("foundations", "library", "reproduction")  # test_notebooks_library.py
MODELS = [p for p in NOTEBOOKS if p.parent.name not in ELSEWHERE]


def execute(path: Path, folder: Path, log: Path) -> None:
    """Runs a notebook in `folder`; what it prints goes to `log`. For a new process."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ["IPYTHONDIR"] = str(folder / ".ipython")
    from nbdev.test import test_nb

    passed, _ = test_nb(path, skip_flags=FLAGS.split(), basepath=ROOT)
    sys.stdout.flush()
    os._exit(not passed)


@cache
def server() -> BaseContext:
    """Starts processes that have imported the large packages already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


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
    log = tmp_path / "printed.txt"
    process = server().Process(target=execute, args=(copy, tmp_path, log))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, log.read_text("utf-8", "replace")[-6000:]


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
