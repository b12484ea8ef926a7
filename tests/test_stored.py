"""The stored results are those of today's declarations, and today's code gives them."""

from pathlib import Path

import pytest

from condgen.lab import find_experiment
from condgen.recipes import declared
from condgen.results import read_results, stale

ROOT = Path(__file__).resolve().parents[1] / "data" / "results"
FILES = sorted(p for p in ROOT.rglob("*.json") if ".old" not in p.name)
EXPERIMENTS = [p for p in FILES if p.name != "benchmark-glow.cpu.json"]


def test_every_experiment_has_a_stored_result():
    assert {read_results(p)["experiment"] for p in EXPERIMENTS} == {*declared(
        "EXPERIMENTS")}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_stored_result_is_stale(path):
    result = read_results(path)
    experiment = find_experiment(result["experiment"])
    assert str(path.relative_to(ROOT)) == f"{experiment.name}.{result['tier']}.json"
    assert stale(result, experiment.config(result["tier"])) == []
    assert (result["config"]["seeds"]
            and len(set(result["config"]["seeds"])) == len(result["config"]["seeds"]))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_stored_results_carry_a_probe_of_their_rows(path):
    """The probe has a loss for each recipe, and metrics that the result has."""
    result = read_results(path)
    probe = result["probe"]
    trained = {name.split(".")[0] for name in probe["losses"]}
    for name in find_experiment(result["experiment"]).trained:
        assert any(t == name or t.startswith(f"{name}-") for t in trained), name
    metrics = {name.split(" | ")[2] for name in probe["rows"]}
    assert (metrics and metrics <= {r["metric"] for r in result["rows"]}
            | {"identity_accuracy"})
