"""Generators of digits ranked: controls, other classes, rows of both experiments."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from condgen.data import digits
from condgen.experiments import nrds as nr
from condgen.lab import Lab
from condgen.models.caglow import CAGlow
from condgen.models.cglow import CGlow
from condgen.models.classifier import Evaluator
from condgen.models.gan import ACGAN
from condgen.models.glow import Glow
from condgen.ranking import copy_share
from condgen.recipes import find
from condgen.results import row_key


def test_controls_are_copies_of_training_images():
    data = digits()
    train, test = data.split_images("train"), data.split_images("test")
    made = nr.training_copies(train, 60, 0)
    close = {name: copy_share(x, train, test) for name, x in made.items()}
    assert (tuple(made) == nr.CONTROLS and close["copies"] == 1
            and copy_share(test, train, test) <= 0.02)
    assert all(x.shape == (60, 1, 16, 16) and x.min() >= 0 and x.max() <= 1
               for x in made.values())
    assert copy_share(torch.rand(20, 1, 16, 16), train, test) == 0
    assert (made["noisy copies"] - made["copies"]).abs().max() > 0.01
    one = nr.single_digit_sets(data, 30, 0)
    assert (list(one) == [f"digit {k}" for k in range(10)]
            and all(len(x) == 30 for x in one.values()))


def test_other_classes():
    data = digits()
    digit = data.table("test")["c"].argmax(1)
    odd, low = nr.regroup_classes(data, "parity"), nr.regroup_classes(data, "low")
    assert (torch.equal(odd.table("test")["c"].argmax(1), digit % 2)
            and odd.conditions.width == 2)
    assert (torch.equal(low.table("test")["c"].argmax(1), digit[digit < 5])
            and low.conditions.width == 5)
    assert torch.equal(low.split_images("test"), data.split_images("test")[digit < 5])
    assert nr.regroup_classes(data, "digit") is data
    with pytest.raises(ValueError, match="kind 'parities'.*did you mean 'parity'"):
        nr.regroup_classes(data, "parities")


@pytest.fixture(scope="module")
def models():
    """Small untrained models by recipe; recipes and their training
    are tested elsewhere.
    """
    data = digits()
    torch.manual_seed(0)
    evaluator = Evaluator(data.shape, data.conditions, 4)
    glow = Glow(data.shape, levels=2, depth=1, width=4)
    caglow = CAGlow.from_glow(glow, data.conditions, hidden=8)
    caglow.store_condition_rows(data.table("train")["c"])
    models = {"evaluator-digits": evaluator, "glow-digits": glow,
              "caglow-digits": caglow, "caglow-digits-literal": caglow,
              "cglow-digits": CGlow(data.shape, data.conditions, levels=2,
                                    depth=1, width=4),
              "acgan-digits": ACGAN(data.shape, data.conditions)}
    for name in ("cglow-digits", "acgan-digits"):
        models[name].store_condition_rows(data.table("train")["c"])
    return models


@pytest.fixture
def lab_of(models, monkeypatch, tmp_path):
    """Makes labs with those models and sizes at which an experiment takes seconds."""
    monkeypatch.setattr(nr, "frechet",
                        lambda x, reference, features: float(x.mean() + x.std()))

    class SmallLab(Lab):
        def train(self, name):
            return SimpleNamespace(model=models[name], seconds=0.0)

    def make(name, **size):
        experiment = next(e for e in nr.EXPERIMENTS if e.name == name)
        assert set(size) == set(experiment.sizes["tiny"])
        return SmallLab(replace(experiment, sizes={"tiny": size}), "tiny", 0, tmp_path,
                        progress=False)

    return make


def test_recipes_of_all_generators_are_declared():
    used = {recipe for recipe, _ in nr.GENERATORS.values()} - {""}
    assert len(nr.GENERATORS) == 7
    for experiment in nr.EXPERIMENTS:
        assert used | {"evaluator-digits"} == set(experiment.recipes) <= set(
            experiment.trained)
        assert all(find(name).images["full"] for name in experiment.recipes)


def test_rows_of_the_ranking(lab_of):
    lab = lab_of("nrds/digits", n=72, epochs=2, discriminators=1)
    rows = nr.nrds_digits(lab)
    keys = [row_key(r, "model", "metric", "variant", "at") for r in rows]
    assert len(keys) == len(set(keys))
    groups = {}
    for r in rows:
        if r["metric"] == "nrds":
            groups.setdefault((r["variant"], r["at"]["set"]), []).append(r["value"])
    both = ("generators", "generators and controls")
    assert set(groups) == {(kind, k) for kind, other in (
        ("literal", "ACGAN three times"), ("corrected", "specialists"))
                           for k in (*both, other)}
    assert all(abs(sum(v) - 1) < 1e-9 for v in groups.values())
    assert [len(v) for v in groups.values()] == [7, 10, 9, 7, 10, 10]
    alone = {r["model"] for r in rows
             if r["variant"] == "one against one" and r["metric"] == "area_ratio"}
    assert alone == {*nr.GENERATORS, *nr.CONTROLS, *(f"digit {k}" for k in range(10))}
    agree = {(r["variant"], r["at"]["over"])
             for r in rows if r["metric"] == "rank_agreement"}
    assert {("one against one", "generators"),
            ("one against one", "generators and controls"),
            ("literal, generators and controls", "generators"),
            ("corrected, generators", "generators")} <= agree
    assert ("corrected, generators", "generators and controls") not in agree
    assert all(r["value"] == 1
               for r in rows if r["metric"] == "copy_share" and r["model"] == "copies")


def test_rows_of_the_inception_score(lab_of):
    lab = lab_of("nrds/inception", n=72, whole=64, short=64)
    rows = nr.inception_digits(lab)
    keys = [row_key(r, "model", "metric", "variant", "at") for r in rows]
    assert len(keys) == len(set(keys))
    score = {(r["model"], r["at"]["by"]): r["value"]
             for r in rows if r["metric"] == "inception_score"}
    right = {r["model"]: r["value"] for r in rows if r["metric"] == "accuracy"}
    assert (len(right) == 8 and right["evaluator"] == right["evaluator, logits × ½"]
            == right["evaluator, logits × 2"])
    assert len({score["ACGAN", by] for by in ("evaluator", "evaluator, logits × ½",
                                              "evaluator, logits × 2")}) == 3
    assert score["ACGAN", "odd or even"] <= 2 and score["ACGAN", "digits 0 to 4"] <= 5
    assert {k for k, _ in score} == {*nr.GENERATORS, "one image per class",
                                     "real test images", "real training images",
                                     "real digits 0 to 4"}
    agree = {r["model"]: r["value"] for r in rows if r["metric"] == "rank_agreement"}
    assert abs(agree["evaluator"] - 1) < 1e-9 and set(agree) == set(right)
    assert set(lab.evaluators) == {"evaluator-digits"}
