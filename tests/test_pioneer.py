"""Pioneer: the gap with its margin, losses, fading, who moves when, growth, rows.

Errors are planted by subclasses and functions; the check that must hold fails on each.
"""

import pytest
import torch
import torch.nn.functional as F
from bars import Bars, batch_of, seeded, whole_and_resumed
from evaluators import CornerReader

from condgen.experiments import autoencoding_gans as measured
from condgen.lab import Lab
from condgen.models.autoencoding_gans import (
    GrowingEncoder, Pioneer, fitted_kl, kl_gap, on_sphere)
from condgen.models.progressive import fade_images, repeat_pixels
from condgen.runs import load
from condgen.trainer import set_trainable
from condgen.training import fit

D64 = torch.float64


def build(kind=Pioneer, shape=(1, 8, 8), **options):
    torch.manual_seed(0)
    return kind(shape, **{"latent": 6, "width": 4, **options})


def players_of(model, level=1):
    stage = model.stages()[level]
    stage.build()
    return {p.name: p for p in model.players(stage)}


def gradients(model, loss, player, batch):
    """Gradients of the player's parameters, as in training."""
    set_trainable(model, player)
    model.zero_grad(set_to_none=True)
    sum(w * v for w, v in loss(batch).values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()
            if p.grad is not None and p.grad.any()}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[n], wanted[n], rtol=1e-4, atol=1e-7) for n in wanted)


# The gap

def unbounded(real, fake, weight, margin):
    return kl_gap(real, fake, weight)


def of_fakes_only(real, fake, weight, margin):
    return real - (weight * fake).clamp_max(margin)


@pytest.mark.parametrize(("gap", "holds"), [
    (kl_gap, True), (unbounded, False), (of_fakes_only, False)])
def test_beyond_the_margin_the_encoder_stops(gap, holds):
    slopes = []
    for fake in (0.9, 4.0):
        pair = [torch.tensor(v, requires_grad=True) for v in (0.3, fake)]
        slopes.append([s.item() for s in torch.autograd.grad(
            gap(*pair, 0.5, 0.4), pair)])
    assert (slopes == [[1.0, -0.5], [0.0, 0.0]]) == holds


def test_a_margin_of_zero_is_no_bound():
    assert kl_gap(torch.tensor(0.3), torch.tensor(40.0), 1.0) == pytest.approx(-39.7)


# Losses

class Sharp(Pioneer):
    """Real images do not fade."""

    def encoder_loss(self, batch):
        return super().encoder_loss(batch_of((), 8))


class Swapped(Pioneer):
    def encoder_loss(self, batch):
        terms = super().encoder_loss(batch)
        return terms | {"gap": (-terms["gap"][0], terms["gap"][1])}


class Leaky(Pioneer):
    def generator_loss(self, batch):
        x = batch.x
        error = (x - self.images_of(self.codes_of(x))).abs().mean()
        return super().generator_loss(batch) | {"image": (20.0, error)}


@pytest.mark.parametrize(("kind", "holds"), [
    (Pioneer, True), (Sharp, False), (Swapped, False)])
def test_the_encoder_plays_its_game_on_faded_images(kind, holds):
    model = build(kind, fake_weight=0.5, image_weight=3.0, fade=0.5).eval()
    player, batch = players_of(model)["encoder"], batch_of((), 8)
    batch.progress, step = 0.1, 32 / model.stages()[1].images
    alpha = (0.1 + step) / 0.5

    def alone(batch):
        draw = lambda z: (model.generator(z, 1, alpha) + 1) / 2
        code_of = lambda x: on_sphere(model.encoder(2 * x - 1, 1, alpha))
        x = fade_images(batch.x, alpha)
        fake = draw(batch.randn("z", 6)).detach()
        code = code_of(x)
        gap = fitted_kl(code) - 0.5 * fitted_kl(code_of(fake))
        return {"all": (1.0, gap + 3 * F.l1_loss(draw(code), x))}

    found, wanted = (gradients(model, loss, player, batch)
                     for loss in (player.loss, alone))
    assert same(found, wanted) == holds


@pytest.mark.parametrize(("kind", "holds"), [(Pioneer, True), (Leaky, False)])
def test_the_generator_does_not_see_the_image_error(kind, holds):
    model = build(kind, code_weight=2.0).eval()
    player, batch = players_of(model)["generator"], batch_of((), 8)
    batch.progress = 1.0

    def alone(batch):
        z = batch.randn("z", 6)
        code = on_sphere(model.encoder(model.generator(z, 1), 1))
        cosine = F.cosine_similarity(z, code, dim=1).mean()
        return {"all": (1.0, fitted_kl(code) + 2 * (1 - cosine))}

    found, wanted = (gradients(model, loss, player, batch)
                     for loss in (player.loss, alone))
    assert same(found, wanted) == holds


def test_after_a_loss_nothing_fades():
    model = build()
    player, batch = players_of(model)["encoder"], batch_of((), 8)
    player.loss(batch)
    assert model.alpha == 1.0
    del batch.fields["x"]
    with pytest.raises(AttributeError):
        player.loss(batch)
    assert model.alpha == 1.0


# Networks

class Blind(GrowingEncoder):
    """Does not fade."""

    def forward(self, x, level, alpha=1.0):
        return super().forward(x, level)


@pytest.mark.parametrize(("kind", "holds"), [(GrowingEncoder, True), (Blind, False)])
def test_a_new_level_begins_as_the_old_encoder(kind, holds):
    torch.manual_seed(0)
    encoder = kind(6, 1, [8, 4]).double()
    x = torch.rand(4, 1, 4, 4, generator=seeded(), dtype=D64)
    begun = encoder(repeat_pixels(x), 1, 0.0)
    assert torch.allclose(begun, encoder(x, 0)) == holds
    assert begun.shape == (4, 6)


@pytest.mark.parametrize(("spectral", "forms"), [
    (True, {"_SpectralNorm"}), (False, {"ScaleParametrization"})])
def test_norms_of_encoder_and_generator(spectral, forms):
    """The generator has the equalised rate and pixel norm, as the released code."""
    model = build(spectral=spectral)
    kinds = {part: {type(p).__name__ for m in getattr(model, part).modules()
                    if hasattr(m, "parametrizations") for p in m.parametrizations.weight}
             for part in ("encoder", "generator")}
    assert kinds == {"encoder": forms, "generator": {"ScaleParametrization"}}
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model.encoder(torch.rand(2, 1, 8, 8), 1)
    size = torch.linalg.matrix_norm(model.encoder.last[-1].weight, 2)
    assert (abs(size - 1) < 0.01) == spectral


def test_codes_have_one_length_and_only_directions_count():
    model, x = build(), Bars().split_images("test")[:5]
    z = model.encode(x)
    assert torch.allclose(z.norm(dim=1), torch.tensor(6.0).sqrt())
    assert torch.allclose(model.decode(z), model.decode(3 * z), atol=1e-5)
    warm, hot = (model.sample(3, t, generator=seeded()) for t in (0.5, 2.0))
    assert torch.allclose(warm, hot, atol=1e-5)
    assert model.sample(2, 0.0).isfinite().all()


# Growth

def test_law_4_players_move_what_their_level_uses():
    model = build(shape=(1, 16, 16)).train()
    for level in range(3):
        moving, x = players_of(model, level), torch.rand(8, 1, *[4 * 2**level] * 2)
        batch = batch_of((), 8)
        batch.fields["x"], batch.progress = x, 0.1
        assert [p.repeats for p in moving.values()] == [1, 2]
        for name, player in moving.items():
            found = gradients(model, player.loss, player, batch)
            assert {part.split(".")[0] for part in found} == {name}
            names = {id(p): n for n, p in model.named_parameters()}
            edge = "from_rgb" if name == "encoder" else "to_rgb"
            ends = {int(n.split(".")[2]) for n in map(names.get, map(id, player.params))
                    if edge in n}
            assert ends == {max(0, level - 1), level}


def test_every_stage_has_images_of_its_size():
    model = build(shape=(3, 32, 32), width=2)
    assert [s.name for s in model.stages()] == ["4px", "8px", "16px", "32px"]
    for level, stage in enumerate(model.stages()):
        stage.build()
        x = stage.data({"x": torch.rand(2, 3, 32, 32)})["x"]
        z = model.codes_of(x)
        assert x.shape[-1] == 4 * 2**level and model.images_of(z).shape == x.shape
        assert model.reconstruct(torch.rand(2, 3, 32, 32)).shape == (2, 3, 32, 32)
    [whole] = build(grow=False).stages()
    assert whole.name == "8px"


def test_without_growth_nothing_fades_and_old_layers_rest():
    model, seen = build(grow=False, fade=0.5), []
    [stage] = model.stages()
    model.encoder_loss = lambda batch: seen.append(model.alpha) or {}
    encoder, _ = model.players(stage)
    encoder.loss(batch_of((), 8))
    moved = {id(p) for p in encoder.params}
    assert seen == [1.0]
    assert not any(id(p) in moved for p in model.encoder.from_rgb[0].parameters())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, parts = whole_and_resumed(build, Bars(()), tmp_path, images=96)
    assert all(torch.equal(a, b) for a, b in zip(
        whole.state_dict().values(), parts.state_dict().values(), strict=True))
    again = load(tmp_path / "a")
    assert torch.equal(again.sample(4, generator=seeded()),
                       whole.sample(4, generator=seeded()))


def test_a_stopped_run_is_loaded_at_its_level(tmp_path):
    stopped = fit(build(), Bars(()), tmp_path / "run", images=64, progress=False,
                  budget=0.0)
    model = load(tmp_path / "run")
    assert not stopped.finished and model.level == 0
    x = model.reconstruct(Bars(()).split_images("test")[:2])
    assert torch.allclose(x, repeat_pixels(F.avg_pool2d(x, 2)))


def test_it_learns_to_reconstruct():
    model, x = build(width=8), Bars(()).split_images("test")
    before = (model.reconstruct(x) - x).abs().mean()
    fit(model, Bars(()), images={"4px": 1_600, "8px": 6_400}, progress=False)
    assert (model.reconstruct(x) - x).abs().mean() < 0.8 * before


@pytest.mark.parametrize("options", [
    {"margin": -1.0}, {"convolutions": 3}, {"image_weight": -1.0}, {"latent": 0},
    {"fade": float("nan")}, {"spectral": 1}])
def test_refusals_name_what_is_accepted(options):
    with pytest.raises(ValueError, match="accepted"):
        build(**options)


# The experiments

def rows_of(number, folder, monkeypatch, **options):
    monkeypatch.setattr(Lab, "evaluator", lambda self, name: CornerReader(self.data))
    experiment = measured.EXPERIMENTS[number]
    lab = Lab(experiment, "tiny", 0, folder, progress=False, rounds=2, **options)
    return experiment.run(lab)


def test_pioneer_is_tried_on_validation_drawings(monkeypatch, tmp_path):
    seen = []
    keep = measured.HeldOut
    monkeypatch.setattr(measured, "HeldOut",
                        lambda *args: seen.append(args[3]) or keep(*args))
    rows = rows_of(2, tmp_path, monkeypatch)
    assert seen == ["val"] and {r["protocol"]["split"] for r in rows} == {"val"}
    assert len({r["variant"] for r in rows}) == len(measured.PIONEERS)


def test_stages_have_as_many_images_as_the_others():
    for tier, stages in measured.STAGES.items():
        assert sum(stages.values()) == measured.IMAGES[tier]
    share = sum(measured.SHORT["cpu"].values()) / measured.IMAGES["cpu"]
    assert abs(share - 1 / 3) < 0.01
