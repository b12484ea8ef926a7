"""Sweep over the adversarial weight: edges in closed form, metrics, rows and ranges."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condgen.conditions import Schema
from condgen.data import Dataset
from condgen.experiments import weights as ws
from condgen.metrics import frechet_distance
from condgen.models.decoupled import CoupledAE, DecoupledAE
from condgen.results import merge_rows, row


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Edges


def test_edge_is_at_the_given_position():
    x = ws.step_edges(torch.tensor([0.0, 2.0, 2.25, 5.0]), 5)
    assert x.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0.75, 1, 1],
                          [0, 0, 0, 0, 0]]
    line = ws.step_edges(torch.tensor([1.3]), 6)
    assert torch.allclose(line.sum(), torch.tensor(6 - 1.3))


@pytest.mark.parametrize("w", [2, 6, 10])
def test_mean_minimises_squared_error_at_half_the_steepness(w):
    positions = torch.tensor([16 - w / 2, 16 + w / 2], dtype=torch.float64)
    two = ws.step_edges(positions, 32)
    error = lambda g: (g - two).square().sum(1).mean().item()
    mean = two.mean(0)
    assert error(mean) == w / 4 and error(two[0]) == error(two[1]) == w / 2
    noise = 0.1 * torch.randn(50, 32, generator=seeded(), dtype=torch.float64)
    assert all(error(mean + e) > w / 4 for e in noise)
    assert ws.steepness(two).tolist() == [1, 1]
    assert ws.steepness(mean[None]).item() == 0.5


def test_sampled_edge_has_twice_the_error_of_the_mean():
    w, n = 50, 4_000
    t = 5 + w * torch.rand(n, generator=seeded(), dtype=torch.float64)
    x = ws.step_edges(t, 60)
    ramp = x.mean(0)
    blur = (x - ramp).square().sum(1).mean().item()
    drawn = (x[: n // 2] - x[n // 2 :]).square().sum(1).mean().item()
    assert blur == pytest.approx(w / 6, rel=0.05)
    assert drawn == pytest.approx(2 * blur, rel=0.05)
    assert ws.steepness(ramp[None]).item() == pytest.approx(1 / w, rel=0.1)


def test_edge_has_the_maximal_steepness():
    x = torch.rand(2_000, 9, generator=seeded()).sort(1).values
    assert ws.steepness(x).max() <= 1


# Metrics


class Pixels(nn.Module):
    """An evaluator whose features are pixels."""

    def features(self, x):
        return x.flatten(1)


def build(cls, kick=0.0, **options):
    torch.manual_seed(0)
    model = cls((1, 8, 8), latent=5, width=4, **options)
    for p in model.parameters():
        p.data.add_(kick * torch.randn(p.shape, generator=seeded(p.numel())))
    return model.eval()


IMAGES = torch.rand(80, 1, 8, 8, generator=seeded(9))


def test_both_paths_equal_the_model_for_any_batch_size():
    model = build(DecoupledAE, 0.1)
    paths = ws.reconstruct_both(model, torch.cat([IMAGES] * 4))
    z, none = model.encode(IMAGES), torch.zeros(80, 0)
    with torch.no_grad():
        both = {"G alone": model.base(z, none), "picture": model.picture(z, none)}
    for name, wanted in both.items():
        assert paths[name].dtype == torch.float64
        assert torch.allclose(paths[name][80:160].float(), wanted, atol=1e-6)


def test_residual_energy_is_one_at_the_variance_of_images():
    scale = torch.tensor([1.0, 2.0, 3.0])
    rest = scale * torch.randn(4_000, 2, 3, generator=seeded())
    real = 3 + scale * torch.randn(4_000, 2, 3, generator=seeded(1))
    energy = ws.residual_energy(rest, real)
    assert energy == pytest.approx(1, rel=0.05)
    assert ws.residual_energy(0.5 * rest, real) == pytest.approx(0.25 * energy)
    assert ws.residual_energy(0 * rest, real) == 0


def test_relative_std_ignores_the_mean():
    real = torch.randn(500, 3, 4, generator=seeded())
    assert ws.relative_std(real + 7, real) == pytest.approx(1)
    assert ws.relative_std(0.3 * real, real) == pytest.approx(0.3)
    assert ws.relative_std(0 * real, real) == 0


def test_measures_equal_their_definitions():
    inputs, reference, model = IMAGES[:40], IMAGES[40:], build(DecoupledAE, 0.1)
    found = ws.measure_model(model, Pixels(), inputs, reference, 3)
    variants = {variant for variant, _ in found}
    assert variants == {"G alone", "picture", "samples", "residual"}
    shown = model.reconstruct(inputs)
    error = (shown - inputs).abs().mean().item()
    assert found["picture", "reconstruction_l1"] == pytest.approx(error, rel=1e-5)
    wanted = frechet_distance(shown.flatten(1), reference.flatten(1))
    assert found["picture", "frechet"] == pytest.approx(wanted, rel=1e-4)
    z, none = model.encode(inputs), torch.zeros(40, 0)
    with torch.no_grad():
        energy = ws.residual_energy(model.residual(z, none), reference)
    assert found["residual", "residual_energy"] == pytest.approx(energy, rel=1e-4)
    std = ws.relative_std(shown.double(), reference.double())
    assert found["picture", "diversity_pixel"] == pytest.approx(std, rel=1e-4)
    other = ws.measure_model(model, Pixels(), inputs, reference, 4)  # other samples
    assert found != other
    assert found == ws.measure_model(model, Pixels(), inputs, reference, 3)


def test_zero_residual_gives_equal_rows_for_both_models():
    inputs, reference = IMAGES[:40], IMAGES[40:]
    one, two = (ws.measure_model(build(cls), Pixels(), inputs, reference, 0)
                for cls in (CoupledAE, DecoupledAE))
    assert {variant for variant, _ in one} == {"picture", "samples"}
    assert two["residual", "residual_energy"] == 0
    assert all(two[key] == pytest.approx(value, rel=1e-6) for key, value in one.items())
    assert two["G alone", "frechet"] == two["picture", "frechet"]


# Rows and ranges


class UntrainedModels:
    """A lab that trains nothing: the last bias of its models is the weight."""

    first, seed, size = True, 0, {"n": 60, "weights": (0.0, 0.1)}

    def __init__(self):
        images = (IMAGES.repeat(3, 1, 1, 1) * 255).to(torch.uint8)
        splits = {name: torch.arange(80 * k, 80 * k + 80)
                  for k, name in enumerate(("train", "val", "test"))}
        self.data = Dataset("portraits", images, torch.zeros(240, 0), Schema(), splits)
        self.trained = []

    def evaluator(self, name):
        self.trained.append((name, {}))
        return Pixels()

    def train(self, name, **arguments):
        self.trained.append((name, arguments))
        classes = {"aegan-coupled": CoupledAE, "aegan-faces": DecoupledAE}
        model = build(classes[name], **arguments)
        last = (model.refiner if name == "aegan-faces" else model.generator)[-1]
        with torch.no_grad():
            last.bias.fill_(arguments["weight"])
        return SimpleNamespace(model=model, seconds=1.0)


def test_rows_of_a_seed():
    lab = UntrainedModels()
    rows = ws.sweep_weights(lab)
    trained = [(name, {"weight": w}) for name in ("aegan-coupled", "aegan-faces")
               for w in (0.0, 0.1)]
    assert lab.trained == [("evaluator-faces", {}), *trained]
    assert rows[0]["model"] == "real training images"
    assert all(r["at"].keys() == {"weight"} for r in rows[1:])
    assert {r["protocol"]["evaluator"] for r in rows} == {"evaluator-faces"}
    assert len(merge_rows(rows)) == len(rows)  # no two of them are the same measurement
    wanted = {"frechet", "reconstruction_l1", "residual_energy", "diversity_pixel",
              "diversity_feature", "seconds"}
    assert {r["metric"] for r in rows if r["model"] == "decoupled"} == wanted
    found = ws.weight_sensitivity(rows, (0.0, 0.1))
    assert found["reconstruction, G alone"]["decoupled"] == 0
    assert found["reconstruction, picture"]["decoupled"] > 0
    lab.first = False
    assert len(ws.sweep_weights(lab)) == len(rows) - 1


def test_slider_shows_the_stored_images(tmp_path):
    lab = UntrainedModels()
    rows = ws.sweep_weights(lab)
    ws.plot_sweep(lab, rows, tmp_path / "sweep.cpu.json")
    shown = ws.load_sweep_images(tmp_path / "sweep.cpu.png")
    assert shown.shape == (3, 2, ws.SHEET_IMAGES, 3, *IMAGES.shape[-2:])
    given = lab.data.split_images("val")[: ws.SHEET_IMAGES]
    assert torch.allclose(shown[0, 0], given, atol=1e-6)
    assert torch.equal(shown[0, 0], shown[0, 1])
    models = [lab.train(name, weight=0.1).model.eval()
              for name in ws.COMPARED_RECIPES.values()]
    for k, model in enumerate(models):
        made = ws.reconstruct_both(model, given)["picture"].clamp(0, 1).float()
        assert (shown[2, k] - made).abs().max() <= 0.5 / 255 + 1e-6
    box = ws.browse_weights(rows, tmp_path / "sweep.cpu.png")
    slider, image, text = box.children
    first, words = image.value, text.value
    slider.value = 1
    assert image.value != first and text.value != words
    assert slider.options == (("0", 0), ("0.1", 1))
    distance = ws.picture_metrics(rows, "decoupled", 0.1)["frechet"]
    assert f"{distance:.3g}" in text.value


def invented(own, other=lambda i: 10 + 7.5 * i, weights=ws.ADVERSARIAL_WEIGHTS):
    return [row(model, metric, [f(i) - 1, f(i) + 1], variant, {"weight": w})
            for i, w in enumerate(weights)
            for model, f in (("coupled", other), ("decoupled", own))
            for metric, variant in sorted(set(ws.COMPARED_METRICS.values()))]


def test_ranges_are_of_means_over_weights_to_a_tenth():
    rows = invented(lambda i: {0: 3.0, 5: -50.0}.get(i, 5.0))
    # weight 1 does not count
    assert ws.metric_range(rows, "decoupled", "frechet", "picture") == 2
    assert ws.metric_range(rows, "coupled", "frechet", "picture") == 30
    own = "decoupled", "frechet", "picture"
    assert ws.metric_range(rows, *own, ws.RANGE_WEIGHTS[1:]) == 0
    assert ws.metric_range(rows, *own, ws.ADVERSARIAL_WEIGHTS) == 55


@pytest.mark.parametrize(("step", "holds"),
                         [(0.0, True), (9.9, True), (10.1, False), (40.0, False)])
def test_sensitivity_threshold_is_one_third(step, holds):
    found = ws.weight_sensitivity(invented(lambda i: 10 + step * (i > 0)))
    assert set(found) == set(ws.COMPARED_METRICS)
    for metric in found.values():
        assert metric["holds"] == holds and metric["ratio"] == pytest.approx(step / 30)
    constant = lambda i: 1.0
    neither = ws.weight_sensitivity(invented(constant, constant))
    assert neither["reconstruction, picture"]["ratio"] == 0
    only = ws.weight_sensitivity(invented(float, constant))["reconstruction, picture"]
    assert only["ratio"] == math.inf and not only["holds"]


def test_a_missing_weight_is_named():
    rows = invented(lambda i: 1.0, weights=ws.ADVERSARIAL_WEIGHTS[:3])
    message = "no row for weight 0.01; there are rows for 0, 0.0001, 0.001"
    with pytest.raises(ValueError, match=message):
        ws.weight_sensitivity(rows)
    with pytest.raises(ValueError, match="there are rows for none"):
        ws.weight_sensitivity([])
