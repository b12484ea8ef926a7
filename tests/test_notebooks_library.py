"""The notebooks of foundations, library and reproduction run, as those of models do in
test_notebooks.py; two files, so that two workers share them.
"""

from pathlib import Path

import pytest

from test_notebooks import ELSEWHERE, NOTEBOOKS, ROOT, run_notebook

OTHERS = [p for p in NOTEBOOKS if p.parent.name in ELSEWHERE]


@pytest.mark.parametrize("path", OTHERS,
                         ids=[str(p.relative_to(ROOT / "nbs")) for p in OTHERS])
def test_notebook(path: Path, tmp_path: Path) -> None:
    run_notebook(path, tmp_path)
