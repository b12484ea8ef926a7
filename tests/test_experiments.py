"""Experiments: what makes a result stale, what a probe proves, and
how seeds are added.
"""

import json
from dataclasses import replace

import pytest

from condgen import lab as lab_module
from condgen import recipes
from condgen.evaluation import Protocol
from condgen.metrics import differs
from condgen.lab import Experiment, Lab, find_experiment, run_folder
from condgen.reproduction import (command_of, probe_differences, probe, record_probe,
                                  reproduce)
from condgen.recipes import TIERS, declared, find, prepare
from condgen.results import headline_rows, read_results, result_path, row

EXPERIMENTS = declared("EXPERIMENTS")
DIGITS = "condgen.experiments.digits.plain_digits"


def counting(monkeypatch, name="test/count", change=(), **options):
    """An experiment that takes no time; the seeds that it was run
    for, probes left out. `change`: fields of the experiment.
    """
    seen = []

    def run(lab: Lab):
        if not lab.rounds:
            seen.append(lab.seed)
        return [row("Glow", "bpd", 1.0 + lab.seed, n=3)]

    experiment = replace(Experiment(name, "", run, ("glow-digits",), DIGITS, **options),
                         **dict(change))
    known = {**declared("EXPERIMENTS"), name: experiment}
    recipes_known = declared("RECIPES")
    lists = {"EXPERIMENTS": known, "RECIPES": recipes_known}
    for module in (lab_module, recipes):
        monkeypatch.setattr(module, "declared", lists.__getitem__)
    return seen


def run_it(tmp_path, path, seeds=1, first=0, tier="tiny", name="test/count"):
    return reproduce(name, tier, seeds, first, runs=tmp_path / "runs", results=path)


def test_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'caglow/digits'"):
        reproduce("caglow/digit")
    with pytest.raises(ValueError, match="seeds"):
        reproduce("caglow/digits", seeds=0)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_declared_at_every_tier(name):
    experiment = EXPERIMENTS[name]
    assert "/" in name and callable(recipes.resolve(experiment.data))
    for tier in TIERS:
        facts = experiment.config(tier)
        assert json.loads(json.dumps(facts)) == facts
        assert facts["recipes"].keys() == set(experiment.trained)
    if experiment.protocol:
        assert experiment.protocol.evaluator in experiment.trained


def test_seeds_are_added_and_not_repeated(tmp_path, monkeypatch):
    seen, path = counting(monkeypatch), result_path("test/count", "tiny", tmp_path)
    for seeds in (1, 3, 3):
        result = run_it(tmp_path, path, seeds)
    assert seen == [0, 1, 2] and result["rows"][0]["values"] == [1.0, 2.0, 3.0]
    assert json.loads(path.read_text())["config"]["seeds"] == [0, 1, 2]


STALE = {
    "version of the experiment": {"version": 2},
    "a size of its own": {"sizes": {"tiny": {"n": 7}}},
    "protocol": {"protocol": Protocol("evaluator-digits", {"tiny": 1}, {"tiny": 1},
                                      {"tiny": (1,)})},
}


@pytest.mark.parametrize("what", STALE)
def test_a_stale_result_is_set_aside(what, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    counting(monkeypatch)
    run_it(tmp_path, path, 2)
    before = path.read_bytes()
    seen = counting(monkeypatch, **STALE[what])
    result = run_it(tmp_path, path, 1)
    assert seen == [0] and result["config"]["seeds"] == [0]
    assert (tmp_path / "r.old.json").read_bytes() == before
    counting(monkeypatch, version=9)
    run_it(tmp_path, path, 1)
    assert ((tmp_path / "r.old.json").read_bytes() == before
            and (tmp_path / "r.old2.json").exists())


def changed_recipe(**facts):
    """The declared facts of caglow/digits with another glow-digits."""
    known = {**declared("RECIPES"),
             "glow-digits": replace(find("glow-digits"), **facts)}
    return known


@pytest.mark.parametrize("facts", [
    {"version": 2},
    {"images": {"cpu": {"flow": 38_401}}},
    {"arguments": {"cpu": {"levels": 3, "depth": 6, "width": 64, "lr": 4e-3}}},
], ids=["version", "length", "learning rate"])
def test_exactly_the_results_of_a_changed_recipe_are_stale(facts, monkeypatch):
    before = {name: e.config("cpu") for name, e in EXPERIMENTS.items()}
    users = {name for name, e in EXPERIMENTS.items() if "glow-digits" in e.trained}
    lists = {"RECIPES": changed_recipe(**facts), "EXPERIMENTS": EXPERIMENTS}
    for module in (lab_module, recipes):
        monkeypatch.setattr(module, "declared", lists.__getitem__)
    found = {name for name, e in EXPERIMENTS.items() if e.config("cpu") != before[name]}
    assert found == users and users and users != {*EXPERIMENTS}


def test_other_data_make_a_result_stale(tmp_path, monkeypatch):
    seen, path = counting(monkeypatch), tmp_path / "r.json"
    run_it(tmp_path, path)
    kept = json.loads(path.read_text())
    path.write_text(
        json.dumps({**kept, "data": {**kept["data"], "sha256": "of other images"}}))
    run_it(tmp_path, path, 2)
    assert seen == [0, 0, 1] and (tmp_path / "r.old.json").exists()


def test_seeds_are_refused_when_the_probe_has_moved(tmp_path, monkeypatch):
    seen, path = counting(monkeypatch), tmp_path / "r.json"
    run_it(tmp_path, path)
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(
        {**kept, "probe": {**kept["probe"], "rows": {"Glow |  | bpd | ": 1.5}}}))
    with pytest.raises(ValueError,
                       match="moved at 1 place.*raise the version.*--record"):
        run_it(tmp_path, path, 2)
    assert seen == [0]
    with pytest.raises(ValueError, match="no reason"):
        record_probe("test/count", " ", "tiny", path)
    record_probe("test/count", "a library rounds in another way", "tiny", path)
    assert read_results(path)["probe"]["reason"] == "a library rounds in another way"
    run_it(tmp_path, path, 2)
    assert seen == [0, 1]


def test_probe_tolerances():
    base = {"losses": {"m.flow.bpd": 7.0},
            "rows": {"A |  | frechet | ": 100.0, "A |  | seconds | ": 1.0,
                     "A |  | accuracy | ": 0.5}}

    def with_row(**new):
        rows = {**base["rows"], **{f"A |  | {k} | ": v for k, v in new.items()}}
        return {**base, "rows": rows}

    assert (probe_differences(base, base)
            == probe_differences(base, with_row(seconds=9.0)) == [])
    assert (probe_differences(base, with_row(frechet=100.5))
            == probe_differences(base, with_row(accuracy=0.52)) == [])
    assert (len(probe_differences(base, with_row(frechet=102.0)))
            == len(probe_differences(base, with_row(accuracy=0.6))) == 1)
    assert (probe_differences(base, {**base, "losses": {"m.flow.bpd": -7.0}})
            and probe_differences(base, with_row(mae=1.0)))
    assert probe_differences(base, with_row(frechet=float("nan")))


def test_another_processor_widens_the_tolerance():
    """By its name only: an unknown one is compared strictly, and a sign is found."""
    label = "A |  | accuracy | "
    base = {"losses": {"m.flow.bpd": 7.0}, "rows": {label: 0.5}, "processor": "A 1"}
    moved = {"losses": {"m.flow.bpd": 7.6}, "rows": {label: 0.9}, "processor": "B 2"}
    assert probe_differences(base, moved) == []
    assert len(probe_differences(base, {**moved, "processor": "A 1"})) == 2
    assert len(probe_differences({**base, "processor": None}, moved)) == 2
    for broken in ({"losses": {"m.flow.bpd": -7.0}}, {"rows": {}},
                   {"losses": {"m.flow.bpd": float("nan")}}):
        assert len(probe_differences(base, {**moved, **broken})) == 1


def test_norms_of_gradients_count_on_one_processor_only():
    base = {"losses": {"m.stage.player.norm": 60.0, "m.stage.player.L": 1.0},
            "rows": {}, "processor": "A 1"}
    moved = {**base, "losses": {**base["losses"], "m.stage.player.norm": 19.0}}
    assert len(probe_differences(base, moved)) == 1
    assert probe_differences(base, {**moved, "processor": "B 2"}) == []
    wrong = {**moved, "losses": {**moved["losses"], "m.stage.player.L": 3.0}}
    [line] = probe_differences(base, {**wrong, "processor": "B 2"})
    assert "player.L" in line


def test_small_values_are_compared_relatively():
    """Interference is a few thousandths: an absolute tolerance would never see it."""
    assert differs("interference", 0.004, 0.0046) and not differs("interference", 0.04, 0.0402)


def test_a_probe_sees_a_sign_and_no_rename(monkeypatch):
    """Three rounds of the digits flow; the loss with another sign moves the probe."""
    from condgen.models.glow import Glow

    before = probe(find_experiment("caglow/switches"))
    assert probe_differences(before, probe(find_experiment("caglow/switches"))) == []
    loss = Glow.loss
    monkeypatch.setattr(Glow, "loss", lambda self, batch: {
        k: (-weight, value) for k, (weight, value) in loss(self, batch).items()})
    assert probe_differences(before, probe(find_experiment("caglow/switches")))


def test_undeclared_recipes_are_not_trained(tmp_path):
    lab = Lab(find_experiment("caglow/switches"), "tiny", 0, tmp_path)
    with pytest.raises(ValueError, match="does not declare recipe 'caglow-digits'"):
        lab.train("caglow-digits")


def test_another_evaluator_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    counting(monkeypatch)
    run_it(tmp_path, path)
    kept = json.loads(path.read_text())
    path.write_text(
        json.dumps({**kept, "evaluators": {"evaluator-digits": "Evaluator@other"}}))

    def run(lab):
        lab.evaluators["evaluator-digits"] = "Evaluator@this"
        return [row("Glow", "bpd", 1.0, n=3)]

    known = {**lab_module.declared("EXPERIMENTS")}
    known["test/count"] = replace(known["test/count"], run=run)
    for module in (lab_module, recipes):
        monkeypatch.setattr(
            module, "declared",
            {"EXPERIMENTS": known, "RECIPES": declared("RECIPES")}.__getitem__)
    with pytest.raises(ValueError, match="measured the other seeds as Evaluator@other"):
        run_it(tmp_path, path, 2)


def test_run_folders_are_named_by_their_settings():
    plain = prepare(find("glow-digits"), "tiny", 0)
    name = run_folder("glow-digits", "tiny", plain)
    assert name.startswith("glow-digits.tiny.seed0.")
    assert name == run_folder("glow-digits", "tiny",
                              prepare(find("glow-digits"), "tiny", 0))
    others = [prepare(find("glow-digits"), "tiny", 1),
              prepare(find("glow-digits"), "tiny", 0, arguments={"lr": 1e-3})]
    longer = prepare(find("glow-digits"), "tiny", 0)
    longer.images = {"flow": 6_401}
    folders = {run_folder("glow-digits", "tiny", each) for each in (*others, longer)}
    folders.add(run_folder("glow-digits", "tiny", plain, ["a parent"]))
    assert name not in folders and len(folders) == 4


def test_the_recorded_command_makes_all_seeds(tmp_path, monkeypatch):
    seen, path = counting(monkeypatch), tmp_path / "r.json"
    for first, seeds in ((0, 1), (1, 2), (7, 1)):
        result = run_it(tmp_path, path, seeds, first)
    assert seen == [0, 1, 2, 7]
    assert result["command"] == command_of("test/count", "tiny", [0, 1, 2, 7]) == (
        "condgen reproduce test/count --tier tiny --seeds 3 && "
        "condgen reproduce test/count --tier tiny --seeds 1 --seed 7")


def test_results_of_another_experiment_are_not_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    counting(monkeypatch)
    run_it(tmp_path, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds test/count at tier tiny, asked for"):
        run_it(tmp_path, path, tier="cpu")
    counting(monkeypatch, "test/other")
    with pytest.raises(ValueError, match="holds test/count at tier tiny, asked for"):
        run_it(tmp_path, path, name="test/other")
    assert path.read_bytes() == before


def test_unwritable_result_path_is_refused_before_the_run(tmp_path, monkeypatch):
    seen = counting(monkeypatch)
    with pytest.raises(OSError, match="cannot (write|make)"):
        run_it(tmp_path, "/proc/r.json")
    assert seen == []


@pytest.mark.parametrize(
    "part", [{"data": {}}, {"config": []}, {"config": {"seeds": 3}}, {"hours": "x"},
             {"probe": 3}, {"probe": {"losses": {}}}, {"evaluators": None}])
def test_altered_results_are_refused(part, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    counting(monkeypatch)
    run_it(tmp_path, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **part}))
    with pytest.raises(ValueError, match="is not a result"):
        run_it(tmp_path, path)


def test_headline_has_a_row_for_the_frechet_floor():
    rows = [row("Glow", "frechet", 9.0, n=1), row("Glow", "frechet_floor", 2.0, n=1),
            row("evaluator", "accuracy", 0.9, n=1)]
    assert [(r["model"], r["metric"]) for r in headline_rows(rows)] == [
        ("Glow", "frechet"), ("real training images", "frechet")]


@pytest.mark.parametrize("tier, warned", [("tiny", True), ("cpu", False)])
def test_report_of_digits_names_its_tier(tmp_path, tier, warned):
    from types import SimpleNamespace

    from condgen.experiments.digits import digits_report
    from condgen.runs import load

    rows = [row(name, "temperature", 0.7, n=10) for name in ("CGlow", "CAGlow")]
    lab = SimpleNamespace(tier=tier, seed=0, folder=tmp_path,
                          train=lambda name: SimpleNamespace(model=load(name)))
    digits_report(lab, rows, tmp_path / "result.json")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<h1>Digits on demand, tier {tier}</h1>" in page
    assert ("Tier tiny: CGlow is far from trained; do not compare" in page) == warned
