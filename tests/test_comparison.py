"""Families compared on the same images: choice, budget, report, and the command."""

import re
import sys

import pytest
import torch
from zips import drawn

import condgen as cg
from condgen import comparison
from condgen.comparison import best_notes, compare_families, compared_families
from condgen.data import folder
from condgen.own_images import build_evaluator
from condgen.results import row

BUDGET = 12.0


@pytest.fixture(scope="module")
def zipped(tmp_path_factory):
    """Two classes that differ in brightness."""
    return drawn(tmp_path_factory.mktemp("compared") / "images.zip",
                 {"dark": 40, "light": 40})


@pytest.fixture(scope="module")
def compared(zipped):
    """Two families that can be trained, and one that cannot."""
    said: list[str] = []
    out = zipped.parent / "which"
    for budget in (BUDGET, 4 * BUDGET):  # a busy machine needs more
        found = compare_families(zipped, models=["vae", "cgan"], out=out, budget=budget,
                                 size=16, n=32, progress=False,
                                 say=lambda line: said.append(str(line)))
        if len(found.runs) == 2:
            break
    return found, said, out


def test_each_family_has_its_numbers(compared):
    found, said, out = compared
    assert list(found.runs) == ["vae", "cgan"]
    for name in ("VAE", "CGAN"):
        metrics = {r["metric"] for r in found.rows if r["model"] == name}
        assert metrics >= {"accuracy", "diversity_pixel", "frechet", "seconds"}
    readers = {r["protocol"]["evaluator"] for r in found.rows
               if r["metric"] == "accuracy"}
    assert len(readers) == 1 and (out / "evaluator" / "card.json").exists()
    assert not (out / "vae" / "evaluator").exists()
    text = str(found)
    assert "seconds" in text and "VAE" in text and "CGAN" in text
    assert re.search("most often read as asked: (VAE|CGAN)", text)
    assert said[1].startswith("2 families, ")


def test_the_report_shows_every_family(compared):
    found, _, out = compared
    page = found.report.read_text()
    assert found.report == out / "report.html" and "<html" in page
    for title in ("Comparison", "Real images", "VAE", "CGAN"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/png") == 3 and page.count("<table>") == 1


def test_the_same_call_loads_what_is_there(compared, zipped):
    found, _, out = compared
    said: list[str] = []
    again = compare_families(zipped, models=["vae", "cgan"], out=out, size=16, n=32,
                             progress=False, say=said.append)
    assert [r for r in again.rows if r["metric"] != "seconds"] == [
        r for r in found.rows if r["metric"] != "seconds"]


def test_runs_of_a_comparison_are_ordinary_ones(compared):
    _, _, out = compared
    assert cg.load(out / "vae").sample(2, label="light").shape == (2, 1, 16, 16)
    text = str(cg.evaluate_run(out / "cgan", n=32))
    assert "the evaluator reads" in text


def test_a_family_that_fails_is_said_and_others_go_on(zipped, tmp_path, monkeypatch):
    real = comparison.train_data

    def train(data, family, *given, **options):
        if family.name == "cgan":
            raise FloatingPointError("stage 'game', image 640: not finite")
        return real(data, family, *given, **{**options, "budget": None, "epochs": 1})

    monkeypatch.setattr(comparison, "train_data", train)
    monkeypatch.setattr(comparison, "train_shared_evaluator",
                        lambda data, out, *rest: cg.fit(
                            build_evaluator(data), data, out, images=640,
                            progress=False))
    options = {"out": tmp_path, "size": 16, "n": 16, "say": lambda line: None,
               "progress": False}
    found = compare_families(zipped, models=["cgan", "vae"], **options)
    assert list(found.runs) == ["vae"]
    assert any(n == "cgan: not trained: stage 'game', image 640: not finite"
               for n in found.notes)
    assert "cgan: not trained" in found.report.read_text()
    with pytest.raises(ValueError, match="nothing was trained; stage 'game'"):
        compare_families(zipped, models=["cgan"], **options)


def test_images_without_labels_are_compared_by_pictures(tmp_path):
    path = drawn(tmp_path / "images.zip", {"a": 12})
    found = None
    for budget in (BUDGET, 4 * BUDGET):
        try:
            found = compare_families(path, columns=[], models=["gan"], budget=budget,
                                     out=tmp_path / "which", size=16, progress=False,
                                     say=lambda line: None)
            break
        except ValueError as error:
            assert "s or more" in str(error)
    assert "no labels, so no evaluator" in str(found)
    assert "An evaluator" not in found.report.read_text(encoding="utf-8")
    assert [r["metric"] for r in found.rows] == ["seconds"]


def test_families_that_fit_the_labels_are_chosen(zipped):
    names = [f.name for f in compared_families(folder(zipped, size=16), None)]
    assert {"caglow", "cglow", "acgan", "cgan", "vae"} <= {*names}
    assert not {"glow", "gan", "dcgan"} & {*names}
    for models in ([], ["vae", "VAE"]):
        with pytest.raises(ValueError, match="one or more different families"):
            compared_families(folder(zipped, size=16), models)


def test_the_first_of_each_measure_is_named():
    rows = [row("A", "accuracy", 0.5), row("B", "accuracy", 0.9),
            row("A", "frechet", 3.0), row("B", "frechet", 5.0),
            row("A", "diversity_feature", 0.9)]
    assert best_notes(rows) == ["most often read as asked: B (0.9)",
                                "nearest to the test images: A (3)"]


MISTAKES = [
    (["compare"], "Missing option '--data'"),
    (["compare", "--data", "nowhere.zip"], "nowhere.zip does not exist"),
    (["compare", "--data", "images.zip", "--models", "caglwo"], "did you mean 'caglow'"),
    (["compare", "--data", "images.zip", "--models", ","], "one or more different"),
    (["compare", "--data", "images.zip", "--models", "vae,vae"], "one or more different"),
    (["compare", "--data", "images.zip", "--budget", "soon"], "90s"),
    (["compare", "--data", "images.zip", "--size", "16", "-o", "images.zip/x"],
     "cannot make folder"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES,
                         ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_end_with_one_line(arguments, message, zipped, monkeypatch, capsys):
    from condgen.__main__ import main

    monkeypatch.chdir(zipped.parent)
    monkeypatch.setattr(sys, "argv", ["condgen", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in said


def test_the_command_prints_the_comparison(compared, zipped, monkeypatch, capsys):
    from condgen.__main__ import main

    found, _, out = compared
    seen = {}

    def compare(*given, **options):
        seen.update(options, given=given)
        return found

    monkeypatch.setattr(comparison, "compare_families", compare)
    monkeypatch.chdir(zipped.parent)
    monkeypatch.setattr(sys, "argv", ["condgen", "compare", "--data", str(zipped),
                                      "--models", "vae, cgan", "--budget", "90s"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0 and "report: " in capsys.readouterr().out
    assert seen["budget"] == 90 and seen["given"][2] == ["vae", "cgan"]
    assert str(seen["given"][3]) == "runs/images-compared"


def test_pictures_show_classes_or_any_samples(zipped):
    data = folder(zipped, size=16)
    torch.manual_seed(0)
    assert comparison.sheet(cg.VAE(data.shape, data.conditions)).startswith(b"\x89PNG")
    assert comparison.sheet(cg.GAN(data.shape)).startswith(b"\x89PNG")


# plans against the clock --------------------------------------------------------------


def test_cases_of_plans_are_known():
    from condgen.experiments.plans import CASES, DATA, Case
    from condgen.families import find_family

    assert [Case("digits", "vae", length).budget
            for length in ("2 min", "90 s", "1 pass", "4 passes")] == [120, 90, None, None]
    for cases in CASES.values():
        for data, family, length in cases:
            assert data in DATA and find_family(family).listed
            assert Case(data, family, length).number > 0


def test_rows_of_a_case_are_those_of_its_run(tmp_path):
    """Without a budget the plan's own time is no part of what it predicted."""
    from condgen.experiments.plans import Case
    from condgen.files import write_json

    case = Case("digits", "vae", "1 pass")
    stage = {"name": "bound", "images": 640, "batch": 64, "speed": 64.0, "fixed": 2.0}
    plan = {"spent": 5.0, "evaluator": [], "stages": [stage], "parameters": 7}
    write_json(tmp_path / "own.json", {"plan": plan, "spent": 20.0})
    (tmp_path / "evaluator").mkdir()
    for place, seconds in ((tmp_path, 11.0), (tmp_path / "evaluator", 4.0)):
        write_json(place / "card.json", {"class": "condgen.models.vae.VAE",
                                         "arguments": {}, "seconds": seconds})
    found = {r["metric"]: r["value"] for r in case.rows(tmp_path, "tiny")}
    assert found == {"parameters": 7, "planned_seconds": 12, "seconds": 15,
                     "duration_ratio": 1.25}
    timed = Case("digits", "vae", "25 s")
    write_json(tmp_path / "metrics.json", {"rows": [
        {"model": "evaluator", "metric": "accuracy", "value": 0.9},
        {"model": "VAE", "metric": "accuracy", "value": 0.5},
        {"model": "VAE", "metric": "bpd", "value": 3.0}]})
    found = {r["metric"]: r["value"] for r in timed.rows(tmp_path, "tiny")}
    assert (found["seconds"], found["duration_ratio"]) == (20, 0.8)
    assert (found["accuracy"], found["evaluator_accuracy"]) == (0.5, 0.9)
    assert "bpd" not in found


def test_parts_of_olivetti_hold_every_person(tmp_path, monkeypatch):
    """On drawn noise in the form of the file, for the photographs are not there."""
    import numpy as np

    from condgen.experiments import plans

    (tmp_path / "olivetti").mkdir()
    x = np.arange(400 * 64 * 64, dtype=np.uint8).reshape(400, 64, 64)
    np.savez(tmp_path / "olivetti" / "olivetti.npz", images=x,
             identity=np.repeat(np.arange(40), 10))
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path))
    plans.olivetti.cache_clear()
    data = plans.olivetti()
    plans.olivetti.cache_clear()
    assert data.shape == (1, 32, 32) and [
        len(data.splits[s]) for s in ("train", "val", "test")] == [280, 40, 80]
    truth = data.conditions.unpack(data.labels)["person"].long()
    assert torch.bincount(truth[data.splits["test"]]).tolist() == [2] * 40
    assert data.images[0, 0, 0, 0] == round(float(x[0, :2, :2].mean()))


def test_an_evaluator_of_unseen_images_trains_on_the_other_parts(tmp_path):
    from condgen.experiments.plans import unseen_data, unseen_rows

    data = cg.data.digits(16)
    other = unseen_data(data)
    assert not set(other.indices("train").tolist()) & set(data.indices("train").tolist())
    assert torch.equal(other.indices("test"), data.indices("train"))
    model = cg.VAE(data.shape, data.conditions)
    cg.fit(model, data, tmp_path / "run", images=640, progress=False)
    found = unseen_rows(tmp_path / "run", data, 6400, "1 pass", False)
    values = {r["metric"]: r["value"] for r in found}
    assert values["evaluator_accuracy"] > 0.8 > values["accuracy"]  # an untrained model


def test_validation_looks_at_few_images(zipped):
    """Evenly chosen; the other parts are whole."""
    from condgen.pace import FewValidated

    data = folder(zipped, size=16)
    few = FewValidated(data, 3)
    rows, whole = few.table("val")["x"], data.table("val")["x"]
    assert len(rows) == min(3, len(whole)) and (few.name, few.sha256) == (
        data.name, data.sha256)
    assert all(any(torch.equal(x, y) for y in whole) for x in rows)
    assert torch.equal(few.table("train")["x"], data.table("train")["x"])


def test_encoders_of_compared_cases_differ():
    from condgen.experiments.own_compared import COMPARED, compared_family
    from condgen.experiments.plans import DATA

    shape, conditions = (1, 16, 16), cg.data.digits(16).conditions
    sizes = {}
    for data, model, _ in COMPARED["cpu"]:
        assert data in DATA
        built = compared_family(model).build(shape, conditions)
        sizes[model] = sum(p.numel() for p in built.parameters())
    assert sizes["caglow, dense encoder"] != sizes["caglow, encoder with factors"]
    assert type(compared_family("cglow").build(shape, conditions)).__name__ == "CGlow"
