"""Table 1 on MNIST: its measures on pictures with known answers, and the whole
experiment on few images.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from condgen import recipes
from condgen.conditions import Classes, Code, Schema
from condgen.data import digits
from condgen.experiments import clusters
from condgen.experiments import mnist as table1
from condgen.evaluation import cache_features
from condgen.experiments.mnist import code_correlations, moments, once
from condgen.models.classifier import Evaluator


def bar(slope, thick=1.0, size=32):
    """An anti-aliased bar through the middle, leaning right by `slope`
    pixels per row upwards.
    """
    y, x = torch.meshgrid(torch.arange(float(size)), torch.arange(float(size)),
                          indexing="ij")
    middle = (size - 1) / 2
    return (1 + thick - (x - middle - slope * (middle - y)).abs()).clamp(0, 1)[None]


@pytest.mark.parametrize("slope", [-0.4, 0.0, 0.25])
def test_image_moments_of_a_known_bar(slope):
    x = torch.stack([bar(slope), bar(slope, 2.0), 0.5 * bar(slope),
                     torch.roll(bar(slope), 2, 2)])[:, :, 5:27]
    found = moments(x)
    assert torch.allclose(found["slant"], torch.full((4,), slope), atol=0.02)
    width = found["width"]
    assert width[1] > 1.5 * width[0] and torch.allclose(width[2:], width[:1], atol=0.02)
    assert (found["ink"][2] == pytest.approx(found["ink"][0].item() / 2)
            and found["ink"][1] > found["ink"][0])
    assert all(v.isfinite().all() for v in moments(torch.zeros(2, 1, 8, 8)).values())


class Leaning(nn.Module):
    """Draws bars: the class gives a lean of its own, the first code adds to it, the
    second makes the bar thicker.
    """

    conditions = Schema([Classes("digit", 10), Code("u", 2)])

    def sample(self, n, temperature, generator, digit, u):
        noise = temperature * 0.05 * torch.randn(n, generator=generator)
        return torch.stack([bar(0.05 * (k - 4.5) + 0.3 * a + e, 1.5 + b)
                            for k, (a, b), e in zip(digit.tolist(), u.tolist(),
                                                    noise.tolist(), strict=True)])


def test_code_correlations_do_not_depend_on_the_class():
    found = code_correlations(Leaning(), "digit", 500, 0.5, 0)
    assert found[0, "slant"] > 0.95 and abs(found[1, "slant"]) < 0.15
    assert (found[1, "width"] > 0.95 and found[1, "ink"] > 0.95
            and abs(found[0, "ink"]) < 0.2)
    assert set(found) == {(j, name) for j in range(2)
                          for name in ("slant", "width", "ink")}
    assert found == code_correlations(Leaning(), "digit", 500, 0.5, 0)
    assert code_correlations(Leaning(), "digit", 500, 3.0,
                             0)[0, "slant"] < found[0, "slant"] - 0.05


def test_cached_evaluator_is_equal_and_evaluated_once():
    class Eye(nn.Module):
        def __init__(self):
            super().__init__()
            self.looked, self.layer = 0, nn.Linear(4, 3)

        def features(self, x):
            self.looked += len(x)
            return self.layer(x.flatten(1))

    eye = Eye()
    plain, x = eye.features, torch.rand(6, 1, 2, 2)
    cache_features(eye, chunks=2)
    with torch.no_grad():
        assert (torch.equal(eye.eval().features(x), plain(x))
                and torch.equal(eye.features(x), plain(x)))
        looked = eye.looked
        eye.features(x)
        assert eye.looked == looked
        for part in x.split(2):
            eye.features(part)
        eye.features(x)  # forgotten meanwhile
        assert eye.looked == looked + 12
    eye.train().features(x).sum().backward()
    assert eye.layer.weight.grad.abs().sum() > 0


class Glance(Evaluator):
    """An evaluator with a small network also for 32 pixels."""

    def __init__(self, shape, conditions):
        super().__init__((1, 16, 16), conditions)
        self.shape = shape


@pytest.mark.slow
def test_mnist_experiment_runs(monkeypatch, tmp_path):
    """On digits in place of MNIST, a few rounds of each training: every number is
    there, and the flow is shared.
    """
    data = digits(32)
    for module in (recipes, table1):
        monkeypatch.setattr(module, "mnist", lambda: data)
    recipes.mnist_to_train.cache_clear()
    lengths = {"tiny": {"judge": 64, "flow": 128, "adversarial": 160}}
    for name in recipes.EXPERIMENTS["caglow/table1-mnist"].recipes:
        plan = recipes.RECIPES[name]
        images = {"tiny": {stage: lengths["tiny"][stage]
                           for stage in plan.images["tiny"]}}
        model = ((lambda data, tier: Glance(data.shape, data.conditions))
                 if name == "evaluator-mnist" else plan.model)
        monkeypatch.setitem(recipes.RECIPES, name,
                            replace(plan, images=images, model=model))
    lab = recipes.Lab("tiny", 0, tmp_path, progress=False)
    rows = table1.mnist_table1(lab)
    found = {(r["model"], r["variant"], r["metric"], *r["at"].values()): r
             for r in rows}
    assert len(found) == len(rows)
    for model, variant in (("CGlow", ""), ("CAGlow", "corrected"),
                           ("CAGlow", "literal")):
        for metric in ("accuracy", "diversity_pixel", "diversity_feature", "frechet",
                       "temperature"):
            assert (model, variant, metric) in found
    assert (found["Glow", "", "frechet"]["paper"] == 25.78
            and found["CAGlow", "literal", "accuracy"]["paper"] is None)
    assert ("CAGlow", "corrected", "code_correlation", 1, "slant") in found
    padded, original = (found["Glow", "", "bpd"]["value"],
                        found["Glow", "", "bpd", "original pixel"]["value"])
    assert original == pytest.approx(padded * 1024 / 784, rel=0.05)
    again = replace(lab, seed=1, first=False, trained=0.0)
    assert once(again, "glow-mnist").folder == once(lab, "glow-mnist").folder
    assert again.trained == 0 and lab.trained > 0
    recipes.mnist_to_train.cache_clear()


@pytest.mark.slow
def test_figure_1_experiment_runs_on_digits(monkeypatch, tmp_path):
    data = digits(32, copies=2)
    for module in (recipes, clusters):
        monkeypatch.setattr(module, "mnist", lambda: data)
    recipes.mnist_to_train.cache_clear()
    experiment = recipes.EXPERIMENTS["caglow/fig1-mnist"]
    monkeypatch.setitem(recipes.EXPERIMENTS, experiment.name,
                        replace(experiment, data=lambda: data))
    for name in experiment.recipes:
        plan = recipes.RECIPES[name]
        images = {"tiny": {stage: {"flow": 128, "adversarial": 160}[stage]
                           for stage in plan.images["tiny"]}}
        monkeypatch.setitem(recipes.RECIPES, name, replace(plan, images=images))
    path = tmp_path / "fig1-mnist.json"
    result = recipes.reproduce("caglow/fig1-mnist", "tiny", runs=tmp_path / "runs",
                               results=path, progress=False)
    found = {(r["model"], r["variant"], r["metric"], r["at"]["space"]): r["value"]
             for r in result["rows"]}
    assert len(found) == len(result["rows"]) == 3 * (3 * 3 + 1)
    assert all(0 <= v <= 1 for (_, _, metric, _), v in found.items()
               if metric in ("accuracy", "knn_two_sample"))
    # its Gaussian start knows the classes
    assert found["CAGlow", "corrected", "accuracy", "class directions"] > 0.5
    assert path.with_suffix(".png").stat().st_size > 5_000
    x, y = clusters.first_per_digit(data, "test", 3)
    assert (y.tolist() == [k for k in range(10) for _ in range(3)]
            and x.shape == (30, 1, 32, 32))
    recipes.mnist_to_train.cache_clear()
