"""AGE and α-GAN: divergence, density ratio, losses, who moves what, rows of a run.

Errors are planted by subclasses and functions; the check that must hold fails on each.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bars import Bars, batch_of, seeded, whole_and_resumed
from evaluators import CornerReader
from torch import nn

from condgen.divergences import kl_gaussian
from condgen.experiments import autoencoding_gans as measured
from condgen.experiments.inversion import HeldOut as Held
from condgen.experiments.portraits import portraits_of
from condgen.games import minimax_discriminator
from condgen.lab import Lab
from condgen.models.autoencoding_gans import (
    AGE, AlphaGAN, fitted_kl, on_sphere, ratio_kl)
from condgen.recipes import prepare
from condgen.runs import load, save
from condgen.trainer import set_trainable
from condgen.training import fit

KINDS = pytest.mark.parametrize("kind", [AGE, AlphaGAN])
PARTS = {AGE: {"encoder": {"encoder"}, "generator": {"generator"}},
         AlphaGAN: {"autoencoder": {"encoder", "generator"},
                    "discriminators": {"trunk", "real", "code_discriminator"}}}


def build(kind, **options):
    torch.manual_seed(0)
    return kind((1, 8, 8), **{"latent": 6, "width": 4, **options})


def players_of(model):
    return {p.name: p for p in model.players(model.stages()[0])}


def gradients(model, loss, player=None):
    """Gradients by parameter; of the player's own parameters, as in training."""
    if player is None:
        model.requires_grad_(True)
    else:
        set_trainable(model, player)
    model.zero_grad(set_to_none=True)
    sum(w * v for w, v in loss(batch_of((), 8)).values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()
            if p.grad is not None and p.grad.any()}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[n], wanted[n], rtol=1e-4, atol=1e-7) for n in wanted)


# The divergence of AGE

def codes(n=40, k=6):
    return 0.3 + 0.6 * torch.randn(n, k, generator=seeded(), dtype=torch.float64)


def without_logarithm(z):
    mean, variance = z.mean(0), z.var(0, correction=0)
    return 0.5 * (variance + mean.square() - 1).mean()


def literal(z):
    return fitted_kl(z, "literal")


@pytest.mark.parametrize(("divergence", "holds"), [
    (fitted_kl, True), (without_logarithm, False), (literal, False)])
def test_the_divergence_is_that_of_the_fitted_normal(divergence, holds):
    z = codes()
    wanted = kl_gaussian(z.mean(0), z.std(0, correction=0).log()) / 6
    assert (abs(divergence(z) - wanted) < 1e-5) == holds


def test_literal_has_the_variance_as_standard_deviation():
    z = codes()
    wanted = kl_gaussian(z.mean(0), z.var(0, correction=0).log()) / 6
    assert abs(fitted_kl(z, "literal") - wanted) < 1e-5
    whitened = (z - z.mean(0)) / z.std(0, correction=0)
    assert all(fitted_kl(whitened, form) < 1e-5 for form in ("corrected", "literal"))


def test_on_the_sphere_only_variances_count():
    z = on_sphere(codes())
    assert torch.allclose(z.square().sum(1), torch.full((40,), 6.0, dtype=z.dtype))
    wanted = -0.5 * z.var(0, correction=0).log().mean()
    assert abs(fitted_kl(z) - wanted) < 1e-5


def test_equal_codes_have_a_finite_divergence_and_gradient():
    z = torch.ones(4, 6, requires_grad=True)
    fitted_kl(z).backward()
    assert fitted_kl(z) > 5 and z.grad.isfinite().all()


# The density ratio of α-GAN

@pytest.mark.parametrize(("sign", "holds"), [(1, True), (-1, False)])
def test_the_ratio_at_the_best_logit_is_the_divergence(sign, holds):
    """Also its gradient; with exchanged labels both have the other sign."""
    m, s = (torch.tensor([a], dtype=torch.float64, requires_grad=True)
            for a in (0.8, 0.6))
    z = m + s * torch.randn(200_000, generator=seeded(), dtype=torch.float64)
    q = torch.distributions.Normal(m.detach(), s.detach())
    logit = torch.distributions.Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)
    estimate, exact = ratio_kl(sign * logit), kl_gaussian(m, s.log())
    found, wanted = (torch.cat(torch.autograd.grad(v, (m, s), retain_graph=True))
                     for v in (estimate, exact))
    close = abs(estimate - exact) < 0.01 and (found - wanted).abs().max() < 0.02
    assert bool(close) == holds


def test_the_ratio_is_of_all_codes_and_not_of_each_image():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    of_each = torch.eye(2, dtype=torch.float64)  # two images, a code for each
    logit = (p / of_each.mean(0)).log()
    assert ratio_kl(logit) == 0  # although each image has log 2 nats of information


# Losses

class DroppedAGE(AGE):
    def encoder_loss(self, batch):
        terms = super().encoder_loss(batch)
        return {name: terms[name] for name in ("KL_real", "image")}


class SwappedAGE(AGE):
    def encoder_loss(self, batch):
        terms = super().encoder_loss(batch)
        return terms | {"KL_fake": (-terms["KL_fake"][0], terms["KL_fake"][1])}


class LeakyAGE(AGE):
    def generator_loss(self, batch):
        x = batch.x
        error = (x - self.generate(None, self.codes_of(x))).abs().mean()
        return super().generator_loss(batch) | {"image": (20.0, error)}


@pytest.mark.parametrize(("kind", "holds"), [
    (AGE, True), (DroppedAGE, False), (SwappedAGE, False)])
def test_the_encoder_of_age_plays_its_own_game(kind, holds):
    model = build(kind, fake_weight=0.5, image_weight=3.0).eval()

    def alone(batch):
        fake = torch.sigmoid(model.generator(on_sphere(batch.randn("z", 6)))).detach()
        own, made = (on_sphere(model.encoder(2 * x - 1)) for x in (batch.x, fake))
        log_variance = [0.5 * (z.var(0, correction=0) + 1e-6).log().mean()
                        for z in (own, made)]
        error = F.l1_loss(torch.sigmoid(model.generator(own)), batch.x)
        return {"all": (1.0, 0.5 * log_variance[1] - log_variance[0] + 3 * error)}

    player = players_of(model)["encoder"]
    found, wanted = (gradients(model, loss, player) for loss in (player.loss, alone))
    assert same(found, wanted) == holds


@pytest.mark.parametrize(("kind", "holds"), [(AGE, True), (LeakyAGE, False)])
def test_the_generator_of_age_does_not_see_the_image_error(kind, holds):
    model = build(kind, code_weight=2.0).eval()

    def alone(batch):
        z = batch.randn("z", 6)
        code = on_sphere(model.encoder(2 * model.generate(None, z) - 1))
        cosine = (F.normalize(z, dim=1) * F.normalize(code, dim=1)).sum(1).mean()
        log_variance = (code.var(0, correction=0) + 1e-6).log().mean()
        return {"all": (1.0, -0.5 * log_variance + 2 * (1 - cosine))}

    player = players_of(model)["generator"]
    found, wanted = (gradients(model, loss, player) for loss in (player.loss, alone))
    assert same(found, wanted) == holds


class OpenAGE(AGE):
    """The encoder's adversarial term reaches the generator."""

    def encoder_loss(self, batch):
        _, fake = self.draw_fake(batch)
        made = fitted_kl(self.codes_of(fake))
        return super().encoder_loss(batch) | {"KL_fake": (-self.fake_weight, made)}


class OpenAlphaGAN(AlphaGAN):
    """The discriminators' losses reach encoder and generator."""

    def discriminators_loss(self, batch):
        code, fake = self.both_fakes(batch)
        pair = self.code_logits(self.draw_prior(batch)), self.code_logits(code)
        real = self.critic(batch.x)
        return {"D": (1.0, minimax_discriminator(real, self.critic(fake))),
                "C": (1.0, minimax_discriminator(*pair))}


@pytest.mark.parametrize(("kind", "loss", "term", "holds"), [
    (AGE, "encoder_loss", ["KL_fake"], True),
    (OpenAGE, "encoder_loss", ["KL_fake"], False),
    (AlphaGAN, "discriminators_loss", ["D", "C"], True),
    (OpenAlphaGAN, "discriminators_loss", ["D", "C"], False)])
def test_no_gradient_leaks_to_what_drew_the_fakes(kind, loss, term, holds):
    model = build(kind).eval()
    part = lambda batch: {n: getattr(model, loss)(batch)[n] for n in term}
    moved = {name.split(".")[0] for name in gradients(model, part)}
    drew = {"generator"} if issubclass(kind, AGE) else {"generator", "encoder"}
    assert bool(moved & drew) != holds


class DroppedAlphaGAN(AlphaGAN):
    def autoencoder_loss(self, batch):
        terms = super().autoencoder_loss(batch)
        return {name: terms[name] for name in ("image", "ratio")}


@pytest.mark.parametrize(("kind", "options", "holds"), [
    (AlphaGAN, {}, True), (DroppedAlphaGAN, {}, False),
    (AlphaGAN, {"form": "literal"}, False)])
def test_losses_of_alpha_gan_are_those_of_the_objective(kind, options, holds):
    model, batch = build(kind, image_weight=3.0, **options).eval(), batch_of((), 8)
    code, fake = model.both_fakes(batch)
    logits = model.real(model.trunk(2 * fake - 1))[:, 0]
    c, prior = (model.code_discriminator(z)[:, 0]
                for z in (code, batch.randn("z", 6)))
    probability = torch.sigmoid(logits)
    ratio = (-probability.log() + (1 - probability).log()).mean()
    wanted = 3 * F.l1_loss(fake[:8], batch.x) + ratio - c.mean()
    found = sum(w * v for w, v in model.autoencoder_loss(batch).values())
    label = -F.logsigmoid(prior).mean() - F.logsigmoid(-c).mean()
    terms = model.discriminators_loss(batch)
    close = [torch.isclose(found, wanted, atol=1e-5),
             torch.isclose(terms["C"][1], label, atol=1e-6)]
    assert all(close) == holds
    real = model.real(model.trunk(2 * batch.x - 1))[:, 0]
    assert torch.isclose(terms["D"][1], minimax_discriminator(real, logits), atol=1e-5)


def test_exchanged_labels_push_codes_away_from_the_prior():
    """Codes are numbers to move; the code discriminator takes a few steps each time."""
    ends = {}
    for form in ("corrected", "literal"):
        model, g = build(AlphaGAN, form=form), seeded(1)
        z = nn.Parameter(1.5 + 0.5 * torch.randn(200, 6, generator=g))
        encoder = torch.optim.Adam([z], 0.02)
        critic = torch.optim.Adam(model.code_discriminator.parameters(), 3e-3)
        for _ in range(120):
            pair = [model.code_logits(torch.randn(200, 6, generator=g)),
                    model.code_logits(z.detach())]
            critic.zero_grad()
            minimax_discriminator(*pair[:: 1 if form == "corrected" else -1]).backward()
            critic.step()
            encoder.zero_grad()
            ratio_kl(model.code_logits(z)).backward()
            encoder.step()
        ends[form] = z.detach().mean().item()
    assert ends["corrected"] < 1.0 and ends["literal"] > 2.0


# What models of the library do

@KINDS
def test_law_4_each_player_updates_its_own_parts(kind):
    model = build(kind).train()
    moving = players_of(model)
    for name, player in moving.items():
        found = gradients(model, player.loss, player)
        assert {part.split(".")[0] for part in found} == PARTS[kind][name]
    owned = [id(p) for player in moving.values() for p in player.params]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


@KINDS
def test_a_resumed_run_equals_an_uninterrupted_one(kind, tmp_path):
    whole, parts = whole_and_resumed(lambda: build(kind), Bars(()), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(
        whole.state_dict().values(), parts.state_dict().values(), strict=True))
    save(whole, tmp_path / "run")
    again = load(tmp_path / "run")
    assert torch.equal(again.sample(4, generator=seeded()),
                       whole.sample(4, generator=seeded()))


def test_age_has_codes_of_one_length_and_sees_directions_only():
    model, x = build(AGE), Bars().split_images("test")[:5]
    z = model.encode(x)
    assert torch.allclose(z.norm(dim=1), torch.tensor(6.0).sqrt())
    assert torch.allclose(model.decode(z), model.decode(3 * z), atol=1e-6)
    warm, hot = (model.sample(3, t, generator=seeded()) for t in (0.5, 2.0))
    assert torch.allclose(warm, hot, atol=1e-6)
    assert model.sample(2, 0.0).isfinite().all()


def test_the_generator_of_age_makes_more_steps():
    model = build(AGE, generator_steps=3)
    steps = {name: (p.repeats, p.fresh) for name, p in players_of(model).items()}
    assert steps == {"encoder": (1, True), "generator": (3, True)}


def test_the_code_discriminator_has_no_batch_norm():
    parts = build(AlphaGAN).code_discriminator.modules()
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in parts)


@KINDS
def test_refusals_name_what_is_accepted(kind):
    for options in ({"form": "printed"}, {"image_weight": -1.0}, {"latent": 0}):
        with pytest.raises(ValueError, match="accepted"):
            build(kind, **options)
    with pytest.raises(ValueError, match="did you mean 'literal'"):
        build(kind, form="litteral")


@KINDS
def test_models_learn_to_reconstruct(kind):
    model, x = build(kind), Bars().split_images("test")
    error = lambda: (model.reconstruct(x) - x).abs().mean()
    before = error()
    fit(model, Bars(()), images=4_800, progress=False)
    assert error() < 0.8 * before


# The experiment

@pytest.mark.parametrize("recipe", measured.RECIPES[:2], ids=lambda r: r.name)
def test_tiny_recipes_improve_reconstructions(recipe):
    x = portraits_of("tiny").split_images("test")
    training = prepare(recipe, "tiny", 0, {})
    error = lambda: (training.model.reconstruct(x) - x).abs().mean()
    before = error()
    run = training.run(None, progress=False)
    training.model = run.model
    assert error() < 0.9 * before


def test_rows_of_a_tiny_run_cover_models_and_baselines(monkeypatch, tmp_path):
    experiment = measured.EXPERIMENTS[0]
    lab = Lab(experiment, "tiny", 0, tmp_path, progress=False, rounds=2)
    monkeypatch.setattr(Lab, "evaluator", lambda self, name: CornerReader(self.data))
    rows = experiment.run(lab)
    keys = [(r["model"], r["variant"], r["metric"], str(r["at"])) for r in rows]
    assert len(set(keys)) == len(keys)
    value = {key: r["value"] for key, r in zip(keys, rows)}
    for name in measured.MODELS:
        mean, own, seconds = value["mean image", "", "mae", "{}"], *(
            value[name, "", metric, "{}"] for metric in ("mae", "seconds"))
        gain = value[name, "", "gain_per_minute", "{}"]
        assert gain == pytest.approx(60 * (mean - own) / seconds)
        assert (name, "", "mae", "{'images': 'generated'}") in value
    assert value["real training images", "", "frechet", "{}"] > 0
    again = Lab(experiment, "tiny", 1, tmp_path, progress=False, rounds=2, first=False)
    others = {r["model"] for r in experiment.run(again)}
    assert others == {*measured.MODELS, "all models"}


def test_seconds_count_the_trainings_of_parents():
    lab = SimpleNamespace(train=lambda name: SimpleNamespace(
        seconds={"dcgan-portraits-early": 30.0}[name]))
    run = SimpleNamespace(seconds=4.0)
    assert measured.training_seconds(lab, "crg-portraits-early", run) == 34
    assert measured.training_seconds(lab, "age-drawings", run) == 4


def read_as(*order):
    """Numbers of four models whose readings rise; errors in a given order."""
    return {str(i): {"identity_accuracy": 0.1 * i, "attribute_accuracy": 0.5,
                     "mae": 1.0 - 0.1 * i, "mse": 1.0 - 0.1 * i,
                     **dict.fromkeys(("dhash", "phash", "whash"), float(place))}
            for i, place in enumerate(order)}


@pytest.mark.parametrize("order, hashes", [
    ((3, 2, 1, 0), 1.0), ((0, 1, 2, 3), -1.0), ((2, 2, 2, 2), 0.0)])
def test_ranks_compare_errors_with_what_is_read(order, hashes):
    found = {r["variant"]: r["value"] for r in measured.rank_rows(read_as(*order))
             if not r["at"]}
    assert found == {"errors": pytest.approx(1.0), "hashes": pytest.approx(hashes)}


def test_weights_are_tried_on_validation_drawings(monkeypatch, tmp_path):
    experiment = measured.EXPERIMENTS[1]
    seen = []
    monkeypatch.setattr(Lab, "evaluator", lambda self, name: CornerReader(self.data))
    monkeypatch.setattr(measured, "HeldOut", lambda *args: seen.append(args[3]) or Held(
        *args))
    lab = Lab(experiment, "tiny", 0, tmp_path, progress=False, rounds=2)
    rows = experiment.run(lab)
    assert seen == ["val"] and all(r["protocol"]["split"] == "val" for r in rows)
    tried = {(r["model"], r["variant"]) for r in rows}
    assert len(tried) == sum(len(some) for _, some in measured.TRIED.values())


def test_all_models_see_equally_many_images():
    for tier in ("tiny", "cpu", "full"):
        plans = [r.config(tier) for r in measured.RECIPES if "short" not in r.name]
        assert {sum(p["images"].values()) for p in plans} == {measured.IMAGES[tier]}
        assert {p["arguments"]["latent"] for p in plans} == {64}
