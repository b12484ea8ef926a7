"""Every example in a docstring of the package runs and prints what it says."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import condgen

MODULES = [importlib.import_module(found.name)
           for found in pkgutil.walk_packages(condgen.__path__, "condgen.")
           if not found.name.endswith(("__main__", "_modidx"))]
EXAMPLES = [test for module in MODULES
            for test in doctest.DocTestFinder(exclude_empty=True).find(
                module, extraglobs={"torch": torch}) if test.examples]


@pytest.mark.parametrize("test", EXAMPLES, ids=[test.name for test in EXAMPLES])
def test_example_prints_what_it_says(test: doctest.DocTest) -> None:
    report: list[str] = []
    result = doctest.DocTestRunner().run(test, out=report.append)
    assert not result.failed, "".join(report)


def test_every_example_is_run() -> None:
    written = sum(Path(module.__file__).read_text().count(">>> ") for module in MODULES)
    assert sum(len(test.examples) for test in EXAMPLES) == written
