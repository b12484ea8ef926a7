"""Tests run on one thread each and at the smallest tier, whoever starts them."""

import os
from pathlib import Path

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # whatever the caller says: some tests fork, and threads do not
    os.environ[name] = "1"
os.environ["CONDGEN_TIER"] = "tiny"
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parents[1]
