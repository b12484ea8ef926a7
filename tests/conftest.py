"""Tests run on one thread each and at the smallest tier, whoever starts them."""

import os
from pathlib import Path

import pytest

# whatever the caller says: some tests fork, and threads do not
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ["CONDGEN_TIER"] = "tiny"
os.environ.setdefault("MPLBACKEND", "agg")


# files that fork come first, before their worker has threads; then those that take
# longest, so that no worker waits for the other's
LONGEST = ("test_processes.py", "test_faults.py", "test_training.py",
           "test_reversible.py", "test_jobs.py", "test_notebooks.py", "test_recipes.py",
           "test_probes_faces.py", "test_full.py", "test_notebooks_library.py",
           "test_probes_digits.py", "test_cli.py", "test_lab.py", "test_clusters.py",
           "test_photographs.py", "test_plain.py", "test_mnist.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files that fork and the longest first; the order within a file stays."""
    places = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def few_digits():
    """Digits of 32 pixels with 10 test and 6 validation images of each."""
    from dataclasses import replace

    from condgen.data import digits

    data = digits(32)
    digit = data.conditions.unpack(data.labels)["digit"]
    splits = dict(data.splits)
    for name, number in {"test": 10, "val": 6}.items():
        index = data.splits[name]
        splits[name] = index[[i for k in range(10)
                              for i in (digit[index] == k).nonzero()[:number, 0]]]
    return replace(data, splits=splits)


def probes_of(kind: str) -> list[str]:
    """Experiments whose probes run in one file: those on drawn faces, or all others."""
    from condgen.recipes import declared

    faces = lambda e: any(word in e.data for word in ("portrait", "ageing", "face",
                                                      "photo", "utkface", "printed"))
    return [name for name, e in declared("EXPERIMENTS").items()
            if faces(e) == (kind == "faces")]


def proved(name: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Where a probe differs from the stored one; probes of a file
    share their trainings.

    A data set, or weights, that are neither embedded nor prepared here skip the test.
    """
    from condgen.lab import find_experiment
    from condgen.reproduction import probe_differences, probe
    from condgen.recipes import resolve
    from condgen.results import read_results, result_path

    experiment = find_experiment(name)
    try:
        resolve(experiment.data)("tiny")
    except (FileNotFoundError, OSError) as missing:
        pytest.skip(str(missing)[:80])
    root = Path(__file__).resolve().parents[1] / "data" / "results"
    tiers = [t for t in ("cpu", "tiny") if result_path(name, t, root).is_file()]
    stored = read_results(result_path(name, tiers[0], root))["probe"]
    folder = tmp_path_factory.getbasetemp() / "probes"
    folder.mkdir(exist_ok=True)
    try:
        return probe_differences(stored, probe(experiment, folder))
    except FileNotFoundError as missing:
        if "$CONDGEN_DATA" not in str(missing):
            raise
        pytest.skip(str(missing)[:80])
