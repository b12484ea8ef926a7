"""Table 1 on MNIST: its measures on pictures with known answers, and the whole
experiment on few images.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from condgen.conditions import Classes, Code, Schema
from condgen.evaluation import cache_features
from condgen.experiments import mnist as table1
from condgen.experiments.digits import code_correlations, moments
from condgen.lab import Lab, find_experiment


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
    cache_features(eye, max_batches=2)
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


@pytest.mark.slow
def test_mnist_experiment_runs(monkeypatch, tmp_path, few_digits):
    """On digits in place of MNIST, two rounds of each training: every number is there,
    and the flow is shared by seeds.
    """
    for name in ("whole_mnist", "mnist_for_training"):
        monkeypatch.setattr(table1, name, lambda tier="cpu": few_digits)
    experiment = find_experiment("caglow/table1-mnist")
    protocol = replace(experiment.protocol, n={"tiny": 100}, validation={"tiny": 60})
    experiment = replace(experiment, protocol=protocol)
    lab = Lab(experiment, "tiny", 0, tmp_path, progress=False, rounds=2)
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
    again = Lab(experiment, "tiny", 1, tmp_path, progress=False, first=False, rounds=2)
    assert again.train("glow-mnist").folder == lab.train("glow-mnist").folder
    assert again.trained == 0 and lab.trained > 0
