"""Drawn faces of all ages and UTKFace: splits, labels, experiments on few images."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from condgen.conditions import Classes, Schema
from condgen.experiments import ageing, utkface
from condgen.experiments.ageing import (
    ABLATIONS, AGE_BINS, CAAE_VARIANTS, FINE_AGE_BINS, FIXED_FACTORS, bin_centres,
    draw_ageing_faces, evaluation_splits, fine_bin_centres, render_all_ages,
    with_age_only, with_fine_age_bins)
from condgen.experiments.utkface import AGE_BIN_EDGES, age_to_bin
from condgen.faces import FACTORS
from condgen.models.caae import CAAE
from condgen.models.classifier import FaceEvaluator
from condgen.results import merge_rows

AGE = Classes("age", AGE_BINS)


@pytest.fixture(scope="module")
def faces():
    """160 images of 8 people, 30 of 3 held-out people, and all their factors."""
    return draw_ageing_faces(16, 160, 8, 3)


# Data


def test_fixed_factors_are_constant_and_ages_cover_the_range(faces):
    data, factors = faces
    known = FACTORS.unpack(factors)
    who = data.conditions.unpack(data.labels)["identity"]
    assert torch.equal(who, known["identity"])
    assert len(factors) == len(data.images) == 160 + 3 * 10
    for k in range(11):
        assert all(len(known[name][who == k].unique()) == 1 for name in FIXED_FACTORS)
        assert known["age"][who == k].max() - known["age"][who == k].min() > 40
    bins = (known["age"] / 8).long().clamp(max=9)
    assert torch.equal(data.labels[:, :AGE_BINS].argmax(1), bins)
    for name in ("hat", "beard", "bald", "makeup", "sunglasses", "earrings", "frown",
                 "moustache"):
        assert not known[name].any()
    assert known["yaw"].abs().max() <= 17.5 and known["glasses"].unique().numel() == 2


def test_held_out_people_are_only_in_the_test_split(faces):
    data, _ = faces
    who = data.conditions.unpack(data.labels)["identity"]
    parts = {part: set(who[data.indices(part)].tolist()) for part in data.splits}
    assert parts["train"] == set(range(8)) and parts["val"] <= parts["train"]
    assert parts["test"] >= {8, 9, 10} and parts["test"] & set(range(8))
    assert (who >= 8).sum() == 30 and len(data.indices("train")) == 128


def test_caae_is_conditioned_on_age_only(faces):
    data, _ = faces
    young = with_age_only(data)
    assert young.conditions == Schema(AGE)
    assert torch.equal(young.labels, data.labels[:, :AGE_BINS])
    assert torch.equal(young.images, data.images) and young.splits is data.splits


def test_evaluator_age_labels_are_bins_of_two_years(faces):
    data, factors = faces
    fine, known = with_fine_age_bins(data, factors), FACTORS.unpack(factors)
    c = fine.conditions.unpack(fine.labels)
    assert fine.conditions[0] == Classes("age", FINE_AGE_BINS)
    assert torch.equal(c["identity"], known["identity"])
    assert (fine_bin_centres()[c["age"]] - known["age"]).abs().max() <= 1 + 1e-4
    assert torch.equal(c["age"] // 4, data.labels[:, :AGE_BINS].argmax(1))
    assert fine.images is data.images


def test_targets_are_the_same_people_at_the_middle_of_each_bin(faces):
    data, factors = faces
    own = data.labels[:4, :AGE_BINS].argmax(1)
    targets = render_all_ages(factors[:4], 16)
    assert targets.shape == (4, AGE_BINS, 3, 16, 16)
    assert (targets[:, 0] - targets[:, 9]).abs().mean() > 0.02
    x = data.images[:4].float() / 255
    near, far = ((targets[torch.arange(4), b] - x).abs().mean()
                 for b in (own, (own + 5) % 10))
    assert near < far


def test_evaluation_splits_do_not_share_images(faces):
    data, _ = faces
    who = data.conditions.unpack(data.labels)["identity"]
    both = evaluation_splits(data, 5, 0)
    assert list(both) == ["training", "strangers"]
    for split in both.values():
        assert len(split.index) == 5
        assert not set(split.index.tolist()) & set(split.gallery_index.tolist())
    training, held_out = both.values()
    assert (who[held_out.index] >= 8).all() and (who[training.index] < 8).all()
    assert set(training.gallery_index.tolist()) == set(data.indices("train").tolist())
    other = evaluation_splits(data, 5, 1)["training"].index
    assert not torch.equal(other, training.index)
    every = evaluation_splits(data, None, 0)["training"].index
    assert torch.equal(every[:5], training.index) and len(every) == 16


def test_bins_of_utkface():
    years = torch.arange(117.0)
    bins = age_to_bin(years)
    assert bins.unique().tolist() == list(range(10)) and bool((bins.diff() >= 0).all())
    assert [int(years[bins == b].max()) for b in range(9)] == list(AGE_BIN_EDGES)
    assert age_to_bin(torch.tensor([71.0])) == 9


def test_missing_prepared_set_is_named_in_the_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path))
    utkface.utkface_with_years.cache_clear()
    with pytest.raises(FileNotFoundError, match="no prepared set 'utkface64'"):
        utkface.utkface_ages("tiny")


# Experiments


class FewImages:
    """A lab with few images and untrained models of the recipes' kinds."""

    tier, seed, first, size = "tiny", 0, True, {"n": 20, "train": 500}

    def __init__(self, data, evaluated):
        self.data, self.evaluated, self.trained = data, evaluated, []

    def evaluator(self, name):
        self.trained.append((name, {}))
        torch.manual_seed(0)
        return FaceEvaluator(self.evaluated.shape, self.evaluated.conditions, width=4)

    def train(self, name, **arguments):
        self.trained.append((name, arguments))
        torch.manual_seed(0)
        form = "literal" if name.endswith("literal") else "corrected"
        model = CAAE(self.data.shape, [AGE], code=6, width=4, form=form, **arguments)
        return SimpleNamespace(model=model, seconds=2.0)


@pytest.fixture
def lab(faces, monkeypatch):
    monkeypatch.setattr(ageing, "ageing_faces_with_factors", lambda tier: faces)
    return FewImages(faces[0], with_fine_age_bins(*faces))


def check(rows, *metrics):
    """Every row is finite and there once; the metrics are as expected."""
    assert len(merge_rows(rows)) == len(rows)
    assert {r["metric"] for r in rows} == set(metrics)
    assert all(math.isfinite(v) for r in rows for v in r["values"])


def test_ageing_rows(lab, faces):
    rows = ageing.ageing_metrics(lab)
    check(rows, "age_error", "identity_accuracy", "mae", "sharpness", "monotonicity",
          "seconds")
    recipes = {"evaluator-ages", *CAAE_VARIANTS.values()}
    assert {name for name, _ in lab.trained} == recipes
    assert ("caae-faces", {"weights": {"G": 0.0}}) in lab.trained

    def at(model, metric, **where):
        return [r for r in rows if (r["model"], r["metric"]) == (model, metric)
                and all(r["at"].get(k) == v for k, v in where.items())]

    assert all(r["value"] == 0 for r in at("drawn", "mae"))
    assert all(r["value"] == 1 for r in at("drawn", "sharpness"))
    assert {r["at"]["direction"] for r in at("steps", "mae")} == {"older"}
    assert {r["variant"] for r in at("CAAE", "mae")} == {*CAAE_VARIANTS, *ABLATIONS}
    assert {r["at"]["people"] for r in at("CAAE", "mae")} == {"training", "strangers"}
    assert {r["variant"] for r in at("transport", "mae")} == {"age given", "age read"}
    directions = {r["at"]["direction"] for r in at("transport", "mae")}
    assert directions == {"older", "younger"}
    assert not at("steps", "monotonicity")
    errors = at("evaluator", "age_error")
    assert len([r for r in errors if "people" in r["at"]]) == 2
    by_age = {r["at"]["age"]: r["protocol"]["n"] for r in errors if "age" in r["at"]}
    assert set(by_age) <= set(bin_centres().tolist())
    assert sum(by_age.values()) == len(faces[0].indices("test"))
    assert {r["protocol"].get("evaluator") for r in rows} == {"evaluator-ages", None}


def test_rows_of_the_evaluator_are_those_of_the_first_seed(lab):
    lab.first = False
    assert not [r for r in ageing.ageing_metrics(lab) if r["model"] == "evaluator"]


def test_code_rows(lab):
    rows = ageing.caae_codes(lab)
    check(rows, "ks_distance", "accuracy", "age_error", "frechet")
    floor = next(r["value"] for r in rows if r["model"] == "uniform noise")
    distances = [r["value"] for r in rows
                 if r["metric"] == "ks_distance" and r["variant"]]
    assert 0 < floor < 0.3 and all(value > floor for value in distances)


def test_figure_file_is_written(lab, tmp_path):
    ageing.plot_ageing(lab, [], tmp_path / "ageing.cpu.json")
    assert (tmp_path / "ageing.cpu.png").stat().st_size > 10_000


def test_utkface_rows(faces, monkeypatch):
    data, factors = faces
    schema, years = Schema(AGE), FACTORS.unpack(factors)["age"].round()
    labels = schema.pack(len(years), age=age_to_bin(years))
    photographs = replace(data, labels=labels, conditions=schema)
    both = photographs, years
    monkeypatch.setattr(utkface, "utkface_with_years", lambda tier: both)
    lab = FewImages(photographs, photographs)
    rows = utkface.utkface_ageing_metrics(lab)
    check(rows, "age_error", "monotonicity", "estimated_age", "mae", "seconds")
    assert len([r for r in rows if r["metric"] == "estimated_age"]) == AGE_BINS
    assert lab.trained == [("evaluator-utkface", {}), ("caae-utkface", {})]
    unchanged = [r for r in rows if r["model"] == "unchanged"]
    directions = {r["at"]["direction"] for r in unchanged}
    assert directions == {"older", "younger", "both"}
    assert next(r["value"] for r in unchanged if r["metric"] == "monotonicity") == 0


@pytest.mark.parametrize("experiment", [*ageing.EXPERIMENTS, *utkface.EXPERIMENTS],
                         ids=lambda experiment: experiment.name)
def test_sizes_are_declared_at_every_tier(experiment):
    assert set(experiment.sizes) == {"tiny", "cpu", "full"}
    assert len({tuple(sizes) for sizes in experiment.sizes.values()}) == 1


def test_longer_recipe_is_four_times_as_long():
    short, longer = (next(r for r in ageing.RECIPES if r.name == name)
                     for name in ("caae-faces", "caae-faces-longer"))
    for tier, images in short.images.items():
        assert longer.images[tier]["adversarial"] == 4 * images["adversarial"]
    literal = next(r for r in ageing.RECIPES if r.name == "caae-faces-literal")
    assert all(given["form"] == "literal" for given in literal.arguments.values())
