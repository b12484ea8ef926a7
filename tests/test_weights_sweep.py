"""The sweep over the weight of the game: edges in closed form, what is measured, the rows, and the verdict."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condgen import metrics
from condgen.data import Dataset
from condgen.contracts import Schema
from condgen.experiments import weights as ws
from condgen.metrics import frechet_distance
from condgen.models.decoupled import CoupledAE, DecoupledAE
from condgen.results import merge, row


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The name of the new metric, where the registry does not have it yet."""
    monkeypatch.setitem(metrics.METRICS, "residual_energy", metrics.MetricInfo("residual_energy", "", ""))


# edges ---------------------------------------------------------------------------------------------------------------


def test_an_edge_is_where_it_should_be():
    x = ws.edge(torch.tensor([0.0, 2.0, 2.25, 5.0]), 5)
    assert x.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0.75, 1, 1], [0, 0, 0, 0, 0]]
    assert torch.allclose(ws.edge(torch.tensor([1.3]), 6).sum(), torch.tensor(6 - 1.3))


@pytest.mark.parametrize("w", [2, 6, 10])
def test_the_mean_is_the_best_picture_by_squares_and_half_as_steep(w):
    two = ws.edge(torch.tensor([16 - w / 2, 16 + w / 2], dtype=torch.float64), 32)
    error = lambda g: (g - two).square().sum(1).mean().item()
    mean = two.mean(0)
    assert error(mean) == w / 4 and error(two[0]) == error(two[1]) == w / 2
    assert all(error(mean + 0.1 * torch.randn(32, generator=seeded(k), dtype=torch.float64)) > w / 4 for k in range(50))
    assert ws.steepness(two).tolist() == [1, 1] and ws.steepness(mean[None]).item() == 0.5


def test_a_draw_costs_twice_the_ramp():
    w, n = 50, 4_000
    t = 5 + w * torch.rand(n, generator=seeded(), dtype=torch.float64)
    x = ws.edge(t, 60)
    ramp = x.mean(0)
    blur = (x - ramp).square().sum(1).mean().item()
    drawn = (x[: n // 2] - x[n // 2 :]).square().sum(1).mean().item()
    assert blur == pytest.approx(w / 6, rel=0.05) and drawn == pytest.approx(2 * blur, rel=0.05)
    assert ws.steepness(ramp[None]).item() == pytest.approx(1 / w, rel=0.1)


def test_nothing_that_rises_is_steeper_than_an_edge():
    x = torch.rand(2_000, 9, generator=seeded()).sort(1).values
    assert ws.steepness(x).max() <= 1


# what is measured ----------------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """A judge whose features are pixels."""

    def features(self, x):
        return x.flatten(1)


def build(cls, kick=0.0, **options):
    torch.manual_seed(0)
    model = cls((1, 8, 8), latent=5, width=4, **options)
    for p in model.parameters():
        p.data.add_(kick * torch.randn(p.shape, generator=seeded(p.numel())))
    return model.eval()


IMAGES = torch.rand(80, 1, 8, 8, generator=seeded(9))


def test_both_paths_are_those_of_the_model_whatever_the_batch():
    model = build(DecoupledAE, 0.1)
    paths = ws.both_paths(model, torch.cat([IMAGES] * 4))
    z, none = model.encode(IMAGES), torch.zeros(80, 0)
    with torch.no_grad():
        for name, wanted in (("G alone", model.base(z, none)), ("picture", model.picture(z, none))):
            assert paths[name].dtype == torch.float64 and torch.allclose(paths[name][80:160].float(), wanted, atol=1e-6)


def test_residual_energy_is_one_for_what_varies_as_images_do():
    g, real = seeded(), 3 + torch.randn(4_000, 2, 3, generator=seeded(1)) * torch.tensor([1.0, 2.0, 3.0])
    rest = torch.randn(4_000, 2, 3, generator=g) * torch.tensor([1.0, 2.0, 3.0])
    assert ws.residual_energy(rest, real) == pytest.approx(1, rel=0.05)
    assert ws.residual_energy(0.5 * rest, real) == pytest.approx(0.25 * ws.residual_energy(rest, real))
    assert ws.residual_energy(0 * rest, real) == 0


def test_spread_of_is_relative_and_ignores_the_mean():
    real = torch.randn(500, 3, 4, generator=seeded())
    assert ws.spread_of(real + 7, real) == pytest.approx(1)
    assert ws.spread_of(0.3 * real, real) == pytest.approx(0.3) and ws.spread_of(0 * real, real) == 0


def test_numbers_are_those_of_their_definitions():
    given, reference, model = IMAGES[:40], IMAGES[40:], build(DecoupledAE, 0.1)
    found = ws.numbers_of(model, Pixels(), given, reference, 3)
    assert {variant for variant, _ in found} == {"G alone", "picture", "samples", "residual"}
    shown = model.reconstruct(given)
    assert found["picture", "reconstruction_l1"] == pytest.approx((shown - given).abs().mean().item(), rel=1e-5)
    wanted = frechet_distance(shown.flatten(1), reference.flatten(1))
    assert found["picture", "frechet"] == pytest.approx(wanted, rel=1e-4)
    z, none = model.encode(given), torch.zeros(40, 0)
    with torch.no_grad():
        energy = ws.residual_energy(model.residual(z, none), reference)
    assert found["residual", "residual_energy"] == pytest.approx(energy, rel=1e-4)
    spread = ws.spread_of(shown.double(), reference.double())
    assert found["picture", "diversity_pixel"] == pytest.approx(spread, rel=1e-4)
    assert found != ws.numbers_of(model, Pixels(), given, reference, 4)  # other samples
    assert found == ws.numbers_of(model, Pixels(), given, reference, 3)


def test_one_path_makes_one_row_and_a_residual_of_zero_makes_the_models_equal():
    given, reference = IMAGES[:40], IMAGES[40:]
    one, two = (ws.numbers_of(build(cls), Pixels(), given, reference, 0) for cls in (CoupledAE, DecoupledAE))
    assert {variant for variant, _ in one} == {"picture", "samples"}
    assert two["residual", "residual_energy"] == 0
    assert all(two[key] == pytest.approx(value, rel=1e-6) for key, value in one.items())
    assert two["G alone", "frechet"] == two["picture", "frechet"]


# rows and verdict ----------------------------------------------------------------------------------------------------


@dataclass
class Lab:
    """Trains nothing: hands out models whose last bias is the weight."""

    tier: str = "tiny"
    first: bool = True
    seed: int = 0
    asked: list = field(default_factory=list)

    def train(self, name, **arguments):
        self.asked.append((name, arguments))
        if name == "judge-faces":
            return SimpleNamespace(model=Pixels())
        model = build({"aegan-coupled": CoupledAE, "aegan-faces": DecoupledAE}[name], **arguments)
        with torch.no_grad():
            (model.refiner if name == "aegan-faces" else model.generator)[-1].bias.fill_(arguments["weight"])
        return SimpleNamespace(model=model, seconds=1.0)


@pytest.fixture
def faces(monkeypatch):
    images = (IMAGES.repeat(3, 1, 1, 1) * 255).to(torch.uint8)
    splits = {name: torch.arange(80 * k, 80 * k + 80) for k, name in enumerate(("train", "val", "test"))}
    data = Dataset("portraits", images, torch.zeros(240, 0), Schema(), splits)
    monkeypatch.setattr(ws, "portraits", lambda: data)


def test_rows_of_a_seed(faces):
    lab = Lab()
    rows = ws.sweep_weights(lab)
    asked = [(name, {"weight": w}) for name in ("aegan-coupled", "aegan-faces") for w in (0.0, 0.1)]
    assert lab.asked == [("judge-faces", {}), *asked]
    assert rows[0]["model"] == "real training images" and all(r["at"].keys() == {"weight"} for r in rows[1:])
    assert len(merge(rows)) == len(rows)  # no two of them are the same measurement
    wanted = "frechet reconstruction_l1 residual_energy diversity_pixel diversity_feature seconds"
    assert {r["metric"] for r in rows if r["model"] == "decoupled"} == set(wanted.split())
    found = ws.flatness(rows, (0.0, 0.1))
    assert found["reconstruction, G alone"]["decoupled"] == 0 and found["reconstruction, picture"]["decoupled"] > 0
    lab.first = False
    assert len(ws.sweep_weights(lab)) == len(rows) - 1


def test_the_slider_shows_what_was_kept(faces, tmp_path):
    lab = Lab()
    rows = ws.sweep_weights(lab)
    ws.picture_sweep(lab, rows, tmp_path, tmp_path / "sweep.cpu.json")
    shown = ws.pictures_of(tmp_path / "sweep.cpu.png")
    assert shown.shape == (3, 2, ws.SHOWN, 3, *IMAGES.shape[-2:])
    given = ws.portraits().images_of("val")[: ws.SHOWN]
    assert torch.allclose(shown[0, 0], given, atol=1e-6) and torch.equal(shown[0, 0], shown[0, 1])
    models = [lab.train(name, weight=0.1).model.eval() for name in ws.COMPARED.values()]
    for k, model in enumerate(models):
        made = ws.both_paths(model, given)["picture"].clamp(0, 1).float()
        assert (shown[2, k] - made).abs().max() <= 0.5 / 255 + 1e-6
    box = ws.browse_weights(rows, tmp_path / "sweep.cpu.png")
    slider, image, text = box.children
    first, words = image.value, text.value
    slider.value = 1
    assert image.value != first and text.value != words and slider.options == (("0", 0), ("0.1", 1))
    distance = next(r["value"] for r in rows if (r["model"], r["variant"], r["metric"], r["at"].get("weight"))
                    == ("decoupled", "picture", "frechet", 0.1))
    assert f"{distance:.3g}" in text.value


def invented(own, other=lambda i: 10 + 7.5 * i, weights=ws.WEIGHTS):
    return [row(model, metric, [f(i) - 1, f(i) + 1], variant, {"weight": w})
            for i, w in enumerate(weights) for model, f in (("coupled", other), ("decoupled", own))
            for metric, variant in sorted(set(ws.CLAIMS.values()))]  # fmt: skip


def test_ranges_are_of_means_over_the_weights_of_the_slides():
    rows = invented(lambda i: {0: 3.0, 5: -50.0}.get(i, 5.0))
    assert ws.range_over(rows, "decoupled", "frechet", "picture") == 2  # weight 1 does not count
    assert ws.range_over(rows, "decoupled", "frechet", "picture", ws.CLAIMED[1:]) == 0
    assert ws.range_over(rows, "coupled", "frechet", "picture") == 30
    assert ws.range_over(rows, "decoupled", "frechet", "picture", ws.WEIGHTS) == 55


@pytest.mark.parametrize(("step", "holds"), [(0.0, True), (9.9, True), (10.1, False), (40.0, False)])
def test_the_verdict_is_a_third(step, holds):
    found = ws.flatness(invented(lambda i: 10 + step * (i > 0)))
    assert set(found) == set(ws.CLAIMS)
    for claim in found.values():
        assert claim["holds"] == holds and claim["ratio"] == pytest.approx(step / 30)
    assert ws.flatness(invented(lambda i: 1.0, lambda i: 1.0))["reconstruction, picture"]["ratio"] == 0
    only = ws.flatness(invented(lambda i: float(i), lambda i: 1.0))["reconstruction, picture"]
    assert only["ratio"] == math.inf and not only["holds"]


def test_a_missing_weight_is_named():
    rows = invented(lambda i: 1.0, weights=ws.WEIGHTS[:3])
    with pytest.raises(ValueError, match="no row for weight 0.01; there are rows for 0, 0.0001, 0.001"):
        ws.flatness(rows)
    with pytest.raises(ValueError, match="there are rows for none"):
        ws.flatness([])
