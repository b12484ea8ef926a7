"""Accuracy against diversity: what its trainings change, the variance penalty, and
guided sampling on MNIST.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch

from condgen.conditions import Code
from condgen.data import digits
from condgen.experiments import digits as digits_module
from condgen.experiments.digits import PAPER_NETWORKS, RECIPES
from condgen.experiments.front import (CURVES, EXPERIMENTS, FRONT_SIZE, RECIPE_MATCHING,
                                       accuracy_diversity_front, guided_mnist,
                                       recipe_overrides)
from condgen.lab import Lab
from condgen.metrics import METRICS
from condgen.models.caglow import CAGlow
from condgen.models.caglow_networks import feature_matching
from condgen.models.classifier import Evaluator, GuideClassifier
from condgen.models.glow import Glow
from condgen.results import merge_rows

RECIPE = {recipe.name: recipe for recipe in RECIPES}
FRONT, GUIDED = EXPERIMENTS
POINTS = {(recipe, rule, w) for recipe, rule in CURVES.values()
          for w in FRONT_SIZE["weights"][recipe]}


def built(recipe, **changes):
    return RECIPE[recipe].build(digits(), "tiny", **changes)


def test_settings_of_a_recipe_need_no_changed_arguments():
    for recipe, (matching, weights) in RECIPE_MATCHING.items():
        model = built(recipe)
        assert model.matching == matching and model.weights | weights == model.weights
        assert recipe_overrides(recipe, matching, weights["FM"]) == {}
    assert RECIPE_MATCHING["caglow-digits-literal"] == (PAPER_NETWORKS["matching"],
                                                        PAPER_NETWORKS["weights"])


@pytest.mark.parametrize("recipe", RECIPE_MATCHING)
def test_rules_are_equal_at_weight_zero(recipe):
    same = [recipe_overrides(recipe, rule, 0.0) for rule in ("pair", "class_mean")]
    assert same[0] == same[1] and set(same[0]) == {"weights"}


def test_every_other_point_has_its_own_training():
    trainings = {(recipe, str(recipe_overrides(recipe, rule, w)))
                 for recipe, rule, w in POINTS}
    assert len(trainings) == len(POINTS) - len(RECIPE_MATCHING)
    for recipe, rule, w in POINTS:
        model = built(recipe, **recipe_overrides(recipe, rule, w))
        assert (model.weights == built(recipe).weights | {"FM": w}
                and (model.matching == rule or not w))


def test_folders_have_names_without_quotes_or_spaces(tmp_path, monkeypatch):
    folders = []

    def record(self, name, training, out):
        folders.append(out.name)
        return SimpleNamespace(finished=True, seconds=1.0, folder=out,
                               model=training.model)

    monkeypatch.setattr(Lab, "run_training", record)
    monkeypatch.setattr("condgen.lab.find", RECIPE.__getitem__)
    lab = Lab(FRONT, "tiny", 0, tmp_path)
    for w in (0.0, 1.0, 0.5):
        lab.train("caglow-digits-literal",
                  **recipe_overrides("caglow-digits-literal", "class_mean", w))
    assert folders[2].startswith(
        "caglow-digits-literal-matching-class_mean.tiny.seed0.")
    assert folders[3].startswith(
        "caglow-digits-literal-weights-C1-FM0.5-matching-class_mean.tiny.seed0.")
    assert (len(set(folders)) == 4
            and all(re.fullmatch(r"[\w.-]+", name, re.ASCII) for name in folders))


@pytest.fixture(scope="module")
def measured():
    """Rows of an experiment whose trainings give untrained models, for two seeds,
    and what was trained.
    """
    data, calls = digits(), []
    torch.manual_seed(0)
    evaluator, glow = (Evaluator(data.shape, data.conditions),
                       Glow(data.shape, levels=2, depth=1, width=4))
    model = CAGlow.from_glow(glow, [*data.conditions, Code("u", 2)], hidden=8)
    model.store_condition_rows(data.table("train")["c"])

    def train(name, **arguments):
        calls.append((name, arguments))
        return SimpleNamespace(model=glow if name == "glow-digits" else model)

    fake = {"data": data, "size": FRONT.sizes["tiny"], "train": train,
            "evaluator": lambda name: evaluator}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_module, "augmented_digits", lambda: data)
        rows = [accuracy_diversity_front(SimpleNamespace(seed=s, first=not s, **fake))
                for s in (0, 1)]
    return merge_rows(*rows), calls


def test_rows_of_every_point_with_all_seeds(measured):
    rows, _ = measured
    front_rows = [r for r in rows if "weight" in r["at"]]
    assert {(r["variant"], r["at"]["weight"]) for r in front_rows} == {
        (v, w) for v in CURVES for w in (0.0, 100.0)}
    names = {"accuracy", "diversity_pixel", "diversity_feature", "frechet"}
    assert {r["metric"] for r in rows} == names <= set(METRICS)
    assert all(len(r["values"]) == 2 for r in rows if r["model"] == "CAGlow")
    assert all(r["protocol"]["temperature"] == 0.7 and r["protocol"]["n"] == 360
               for r in front_rows)
    others = [r for r in rows if "temperature" in r["at"]]
    assert others and all(r["protocol"]["temperature"] == r["at"]["temperature"]
                          for r in others)
    assert [r["model"] for r in rows if len(r["values"]) == 1] == [
        "real training images"]
    assert {r["protocol"]["evaluator"] for r in rows} == {"evaluator-digits"}


def test_trainings_are_declared_and_share_one_glow(measured):
    _, calls = measured
    assert {name for name, _ in calls} == {"glow-digits", *RECIPE_MATCHING} <= set(
        FRONT.recipes)
    assert all(RECIPE[name].parents == {"glow": "glow-digits"}
               for name in RECIPE_MATCHING)


# the variance penalty -----------------------------------------------------------------


@pytest.mark.parametrize(("rule", "share"), [("pair", 1.0), ("class_mean", 1 / 8)])
def test_variance_penalty_of_feature_matching(rule, share):
    """The slope of Eq. 14 in s, with f(z') = μ + s ε: s v' times the share, ten
    classes in batches of 80.
    """
    g = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(400, 80, 5, generator=g, dtype=torch.float64)
    groups = torch.eye(10, dtype=torch.float64)[torch.arange(80) % 10]
    s = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    values = [feature_matching(a, s * b, groups if rule == "class_mean" else None)
              for a, b in zip(draw(), draw())]
    slope, = torch.autograd.grad(torch.stack(values).mean(), s)
    assert slope.item() == pytest.approx(0.6 * share, rel=0.05)


def test_variance_penalty_adds_to_the_precision():
    """Descent on KL(N(0, s²) ‖ N(0, σ²)) + λ s²/2 finds 1/s² = 1/σ² + λ."""
    for sigma, price in ((1.0, 3.0), (0.5, 20.0)):
        log_s = torch.tensor(0.0, dtype=torch.float64)
        for _ in range(100):  # Newton's steps, the objective being convex in log s
            curve = (2 * log_s).exp() * (1 / sigma**2 + price)
            log_s = log_s - (curve - 1) / (2 * curve)
        assert math.exp(-2 * log_s.item()) == pytest.approx(1 / sigma**2 + price,
                                                            rel=1e-9)


# guided sampling ----------------------------------------------------------------------


@pytest.mark.slow
def test_guided_experiment_measures_both_variants_alike():
    torch.manual_seed(0)
    data = digits()
    model = CAGlow(data.shape, [*data.conditions, Code("u", 2)], levels=2, depth=1,
                   width=4, hidden=8).eval()
    model.store_condition_rows(data.table("train")["c"])
    guide = GuideClassifier(data.shape, data.conditions, width=4).eval()
    evaluator = Evaluator(data.shape, data.conditions).eval()
    models = {"guide-mnist": guide, "caglow-mnist": model}

    class FakeLab(Lab):
        data = digits()
        train = lambda self, name: SimpleNamespace(model=models[name], seconds=1.0)
        evaluator = lambda self, name: evaluator

    rows = guided_mnist(FakeLab(GUIDED, "tiny", 0, None))
    both = {(r["variant"], r["metric"]): r for r in rows if r["model"] == "CAGlow"}
    assert {(v, m) for v in ("unguided", "guided")
            for m in ("accuracy", "diversity_feature", "frechet")} <= set(both)
    assert (both["unguided", "accuracy"]["protocol"]
            == both["guided", "accuracy"]["protocol"])
    assert both["guided", "accuracy"]["protocol"]["temperature"].endswith(
        "for guided samples")
    assert min(both[v, "seconds"]["value"] for v in ("unguided", "guided")) > 0
    others = {(r["model"], r["metric"]) for r in rows if r["model"] != "CAGlow"}
    assert others == {("guide", "accuracy"), ("guide", "seconds")}
