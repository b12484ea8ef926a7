"""Relatives of VAE and GAN: terms of their losses, who moves what, balance, cycle, reload.

Errors are planted by subclasses; the check that must hold fails on each of them.
"""

import pytest
import torch
import torch.nn.functional as F
from bars import Bars, batch_of, seeded, whole_and_resumed
from torch import nn

from condgen.controller import balance_error
from condgen.models.autoencoder import AutoencoderModel
from condgen.models.dcgan import DCGAN
from condgen.models.dcgan_relatives import (
    BoundarySeekingGAN, ImprovedGAN, MinibatchFeatures, ModernGAN, PenalizedDCGAN,
    feature_matching, smoothed_discriminator)
from condgen.models.relatives import (
    ALI, BEGAN, EBGAN, VAEGAN, energy, feature_nll, pulling_away)
from condgen.runs import load, save
from condgen.trainer import set_trainable
from condgen.training import fit

SMALL = {"width": 4}
CASES = [(VAEGAN, {}), (VAEGAN, {"modern": True}), (ALI, {}), (ALI, {"modern": True}),
         (EBGAN, {}), (EBGAN, {"modern": True}), (BEGAN, {}), (BEGAN, {"modern": True}),
         (BoundarySeekingGAN, {}), (ImprovedGAN, {}), (ModernGAN, {}),
         (PenalizedDCGAN, {}),
         (ImprovedGAN, {"feature_weight": 0.0, "kernels": None, "label": 1.0})]
EVERY = pytest.mark.parametrize(("kind", "options"), CASES)
# whose parameters each player moves
PARTS = {
    VAEGAN: {"encoder": {"encoder"}, "generator": {"generator"},
             "discriminator": {"trunk", "real"}},
    ALI: {"discriminator": {"trunk", "code_trunk", "real"},
          "generator": {"encoder", "generator"}},
    **dict.fromkeys((EBGAN, BEGAN), {
        "discriminator": {"energy_encoder", "energy_decoder"},
        "generator": {"generator"}}),
    **dict.fromkeys((BoundarySeekingGAN, ImprovedGAN, ModernGAN, PenalizedDCGAN), {
        "discriminator": {"trunk", "real"}, "generator": {"generator"}})}


def build(kind, side=8, **options):
    torch.manual_seed(0)
    code = "latent" if issubclass(kind, AutoencoderModel) else "noise"
    return kind((1, side, side), **{**SMALL, code: 6, **options})


def players_of(model):
    return {p.name: p for p in model.players(model.stages()[0])}


def gradients(model, player, batch, loss=None):
    """The player's gradient by parameter, as in training."""
    set_trainable(model, player)
    model.zero_grad(set_to_none=True)
    sum(w * v for w, v in (loss or player.loss)(batch).values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()
            if p.grad is not None and p.grad.any()}


def images(n=6, seed=0):
    return 2 * torch.rand(n, 1, 8, 8, generator=seeded(seed)) - 1


# What all have in common


@EVERY
def test_law_4_each_player_updates_its_own_parts(kind, options):
    model, batch = build(kind, **options).train(), batch_of((), 8)
    if "energy_encoder" in dict(model.named_children()):
        model.discriminator_loss(batch)  # the margin starts at 0
    moving = {name: p for name, p in players_of(model).items() if p.params}
    assert {name: PARTS[kind][name] for name in moving} == PARTS[kind]
    for name, player in moving.items():
        found = gradients(model, player, batch)
        assert {part.split(".")[0] for part in found} == PARTS[kind][name], name
    owned = [id(p) for player in moving.values() for p in player.params]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


@EVERY
def test_models_train_and_reload(kind, options, tmp_path):
    model = build(kind, **options)
    fit(model, Bars(()), images=160, progress=False)
    assert model.sample(8, generator=seeded()).isfinite().all()
    save(model, tmp_path / "run")
    again = load(tmp_path / "run")
    assert type(again) is kind and again.betas == model.betas
    assert torch.equal(again.sample(4, generator=seeded()),
                       model.sample(4, generator=seeded()))


@pytest.mark.parametrize(("kind", "options"), [(BEGAN, {}), (EBGAN, {}), (ALI, {}),
                                               (PenalizedDCGAN, {"penalty": 9.0})])
def test_law_5_resumed_run_equals_uninterrupted_run(kind, options, tmp_path):
    whole, parts = whole_and_resumed(lambda: build(kind, **options), Bars(()), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(
        whole.state_dict().values(), parts.state_dict().values(), strict=True))


@EVERY
def test_modern_models_have_no_batch_norm_in_the_critic(kind, options):
    model = build(kind, 16, **options)
    modern = kind is ModernGAN or options.get("modern", False)
    critic = [part for name, part in model.named_modules()
              if name.split(".")[0] in ("trunk", "code_trunk", "real", "energy_encoder",
                                        "energy_decoder")]
    normed = any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in critic)
    assert normed == (kind in (BoundarySeekingGAN, ImprovedGAN, PenalizedDCGAN))
    assert (model.betas[0] == 0) == modern
    if modern:
        terms = build(kind, **options).discriminator_loss(batch_of((), 8))
        assert {"D", "R1", "R2"} <= set(terms)


# VAE-GAN


def test_feature_nll_is_that_of_a_unit_normal():
    a, b = torch.randn(2, 5, 7, generator=seeded())
    exact = -torch.distributions.Normal(a, 1).log_prob(b)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    assert torch.allclose(feature_nll(a, b), (exact - constant).mean(1), atol=1e-6)


def encoder_gradient_holds(kind):
    """Whether the encoder's gradient is that of feature loss and KL, and of nothing
    else.
    """
    model, batch = build(kind, kl_weight=0.5).eval(), batch_of((), 8)

    def alone(batch):
        z, mean, log_std = model.draw_code(batch)
        kl = 0.5 * (mean**2 + log_std.exp() ** 2 - 1 - 2 * log_std).sum(1).mean()
        h = [model.trunk(2 * x - 1) for x in (batch.x, model.generate(None, z))]
        return {"f": (0.5, (h[0] - h[1]).square().mean()),
                "KL": (0.5 / model.feature_size, kl)}

    player = players_of(model)["encoder"]
    found, wanted = (gradients(model, player, batch, loss) for loss in (None, alone))
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[n], wanted[n], rtol=1e-4, atol=1e-7) for n in wanted)


class LeakyVAEGAN(VAEGAN):
    def encoder_loss(self, batch):
        z, _, _ = self.draw_code(batch)
        logits = self.critic(self.generate(None, z))
        return super().encoder_loss(batch) | {"G": (1.0, F.softplus(-logits).mean())}


class DroppedVAEGAN(VAEGAN):
    def encoder_loss(self, batch):
        return {"features": super().encoder_loss(batch)["features"]}


@pytest.mark.parametrize(("kind", "holds"), [
    (VAEGAN, True), (LeakyVAEGAN, False), (DroppedVAEGAN, False)])
def test_no_gradient_of_the_game_reaches_the_encoder(kind, holds):
    assert encoder_gradient_holds(kind) == holds


def test_vaegan_judges_reconstructions_and_samples():
    model, batch = build(VAEGAN, feature_weight=3.0).eval(), batch_of((), 8)
    z, _, _ = model.draw_code(batch)
    fake = model.both_fakes(batch, z)
    prior = model.generate(None, batch.randn("z", 6))
    assert torch.equal(fake, torch.cat([model.generate(None, z), prior]))
    terms, logits = model.generator_loss(batch), model.critic(fake)
    assert torch.isclose(terms["G"][1], F.softplus(-logits).mean())
    assert terms["features"][0] == 3 and terms["G"][0] == 1
    found = model.discriminator_loss(batch)
    assert set(found) == {"D"}  # no feature loss
    real = F.softplus(-model.critic(batch.x)).mean()
    assert torch.isclose(found["D"][1], real + F.softplus(logits).mean(), atol=1e-6)


def test_vaegan_learns_to_reconstruct():
    model, x = build(VAEGAN, feature_weight=10.0), Bars().split_images("test")
    before = (model.reconstruct(x) - x).abs().mean()
    fit(model, Bars(()), images=3_200, progress=False)
    assert (model.reconstruct(x) - x).abs().mean() < 0.7 * before


# Energies


def test_energy_and_pulling_away_by_hand():
    x = torch.zeros(2, 1, 2, 2)
    assert energy(x, x + torch.tensor([1.0, -3.0]).view(2, 1, 1, 1)).tolist() == [1, 3]
    codes = torch.randn(5, 3, generator=seeded())
    pairs = [torch.cosine_similarity(codes[i], codes[j], dim=0) ** 2
             for i in range(5) for j in range(5) if i != j]
    assert torch.isclose(pulling_away(codes), torch.stack(pairs).mean())
    assert torch.isclose(pulling_away(7 * codes), pulling_away(codes))
    assert torch.isclose(pulling_away(codes[:1].expand(4, -1)), torch.tensor(1.0))
    assert pulling_away(torch.eye(4)) == 0 and pulling_away(codes[:1]) == 0


def test_ebgan_terms_and_margin():
    model, batch = build(EBGAN, margin=2.0).eval(), batch_of((), 8)
    fake = 2 * model.generate(None, batch.randn("z", 6)) - 1
    real, made = (model.energy_of(x)[0] for x in (2 * batch.x - 1, fake))
    model.real_energy.fill_(0.4)
    terms = model.discriminator_loss(batch)
    mean = 0.4 + 0.01 * (real.mean() - 0.4)
    assert torch.isclose(model.real_energy, mean)
    assert torch.isclose(terms["real"][1], real.mean(), atol=1e-6)
    assert torch.isclose(terms["margin"][1], F.relu(2 * mean - made).mean(), atol=1e-6)
    terms = model.generator_loss(batch)
    assert torch.isclose(terms["G"][1], made.mean(), atol=1e-6)
    pulled = pulling_away(model.energy_encoder(fake))
    assert torch.isclose(terms["pulling"][1], pulled, atol=1e-6)


@pytest.mark.parametrize("kind", [EBGAN, BEGAN])
def test_energies_beyond_the_margin_are_left_alone(kind):
    """Of EBGAN; BEGAN has no margin."""
    model, batch = build(kind).eval(), batch_of((), 8)
    if kind is EBGAN:
        model.margin = 0.0
    player = players_of(model)["discriminator"]
    found = gradients(model, player, batch)
    alone = lambda b: {"real": (1.0, model.energy_of(2 * b.x - 1)[0].mean())}
    wanted = gradients(model, player, batch, alone)
    same = all(torch.allclose(found[n], wanted[n], atol=1e-7) for n in wanted)
    assert same == (kind is EBGAN)


def balance_holds(kind):
    """Whether one round uses the k from before it, and then moves it by λ·e."""
    model, batch = build(kind, start=0.3, gain=0.5, set_point=0.6).eval(), batch_of((), 8)
    fake = 2 * model.generate(None, batch.randn("z", 6)) - 1
    with torch.no_grad():
        real, made = (model.energy_of(x)[0].mean() for x in (2 * batch.x - 1, fake))
    players = players_of(model)
    terms = {name: players[name].loss(batch) for name in players}
    total = sum(w * v for w, v in terms["discriminator"].values())
    moved = 0.3 + 0.5 * (0.6 * real - made)
    return bool(torch.isclose(total, real - 0.3 * made, atol=1e-6)
                and torch.isclose(model.controller.k, moved, atol=1e-6)
                and torch.isclose(terms["generator"]["G"][1], made, atol=1e-6))


class EarlyBEGAN(BEGAN):
    def players(self, stage):
        critic, generator, controller = super().players(stage)
        return [controller, critic, generator]


class LateBEGAN(BEGAN):
    def discriminator_loss(self, batch):
        terms = super().discriminator_loss(batch)
        k = self.controller.update(
            balance_error(*self.energies, set_point=self.set_point))
        return terms | {"made": (-k, terms["made"][1])}


class DroppedBEGAN(BEGAN):
    def discriminator_loss(self, batch):
        return {"real": super().discriminator_loss(batch)["real"]}


@pytest.mark.parametrize(("kind", "holds"), [
    (BEGAN, True), (EarlyBEGAN, False), (LateBEGAN, False), (DroppedBEGAN, False)])
def test_began_uses_the_weight_of_the_step_before(kind, holds):
    assert balance_holds(kind) == holds


@pytest.mark.parametrize(("hold", "moved"), [(0.0, True), (0.9, False)])
def test_began_holds_its_weight_for_a_share_of_training(hold, moved):
    model = build(BEGAN, hold=hold, start=0.3)
    player = players_of(model)["controller"]
    assert player.when(0.0) == (hold == 0) and player.when(0.9)
    fit(model, Bars(()), images=320, progress=False)
    assert model.controller.updates == (10 if moved else 1)


def test_modern_energy_models_prefer_low_energies():
    model, x = build(EBGAN, modern=True), images()
    with torch.no_grad():
        order = model.critic(x).argsort(descending=True)
        assert torch.equal(order, model.energy_of(x)[0].argsort())
    terms = model.train().discriminator_loss(batch_of((), 8))
    assert set(terms) == {"real", "D", "R1", "R2"}  # it stays an autoencoder


# ALI


def test_ali_losses_are_those_of_pairs():
    model, batch = build(ALI).eval(), batch_of((), 8)
    mean, log_std = model.encoder(batch.x).chunk(2, 1)
    code, z = mean + log_std.exp() * batch.randn("eps", 6), batch.randn("z", 6)
    row = lambda x, z: torch.cat([x.flatten(1), z], 1)
    real = model.critic(row(batch.x, code))
    fake = model.critic(row(model.generate(None, z), z))
    d, g = model.discriminator_loss(batch), model.generator_loss(batch)
    assert torch.isclose(d["D"][1], F.softplus(-real).mean() + F.softplus(fake).mean(),
                         atol=1e-6)
    assert torch.isclose(g["E"][1], F.softplus(real).mean(), atol=1e-6)
    assert torch.isclose(g["G"][1], F.softplus(-fake).mean(), atol=1e-6)
    assert g["cycle"][0] == 0


def test_ali_discriminator_reads_both_parts_of_a_pair():
    model, pairs = build(ALI), torch.rand(4, 70, generator=seeded()).requires_grad_()
    slope, = torch.autograd.grad(model.critic(pairs).sum(), pairs)
    assert (slope[:, :64].abs().sum(1) > 0).all()
    assert (slope[:, 64:].abs().sum(1) > 0).all()


def test_ali_logs_its_cycle_without_learning_from_it():
    model, batch = build(ALI).train(), batch_of((), 8)
    player = players_of(model)["generator"]
    found = gradients(model, player, batch)
    without = gradients(model, player, batch, lambda b: {
        n: t for n, t in model.generator_loss(b).items() if n != "cycle"})
    assert all(torch.equal(found[n], without[n]) for n in found)
    model.eval()
    x = batch.x
    wanted = (x - model.generate(None, model.codes_of(x))).abs().mean()
    assert torch.isclose(model.generator_loss(batch)["cycle"][1], wanted, atol=1e-6)
    assert torch.isclose(model.cycle_error(x).mean(), wanted, atol=1e-6)


def test_cycle_error_refuses_what_are_no_images():
    with pytest.raises(ValueError, match="accepted"):
        build(ALI).cycle_error(images())


# Relatives of DCGAN


def test_boundary_seeking_is_half_the_squared_logit():
    model, batch = build(BoundarySeekingGAN).eval(), batch_of((), 8)
    logits = model.discriminate(model.generate(None, batch.randn("z", 6)))[0]
    d = torch.sigmoid(logits.double())
    wanted = 0.5 * (d.log() - (1 - d).log()).square().mean()
    found = model.generator_loss(batch)["G"][1]
    assert torch.isclose(found.double(), wanted, rtol=1e-4)


@pytest.mark.parametrize("label", [1.0, 0.9, 0.6])
def test_smoothed_label_moves_the_optimum(label):
    """To D = label · p / (p + q)."""
    p, q = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
    logit = torch.logit(label * p / (p + q)).requires_grad_()
    # one logit for every place, with p and q as numbers of images
    real, fake = (torch.cat([logit[k].expand(round(10 * w[k].item())) for k in range(3)])
                  for w in (p, q))
    loss = smoothed_discriminator(real, fake, label)
    slope, = torch.autograd.grad(loss, logit)
    assert slope.abs().max() < 1e-9


def test_improved_gan_terms():
    model, batch = build(ImprovedGAN).eval(), batch_of((), 8)
    fake = model.generate(None, batch.randn("z", 6))
    h = [model.matched(x) for x in (batch.x, fake)]
    terms = model.generator_loss(batch)
    assert terms["features"][0] == 10
    assert torch.isclose(terms["features"][1], feature_matching(*h), atol=1e-7)
    logits = [model.discriminate(x)[0] for x in (batch.x, fake)]
    assert torch.isclose(terms["G"][1], F.softplus(-logits[1]).mean(), atol=1e-6)
    wanted = (0.9 * F.softplus(-logits[0]) + 0.1 * F.softplus(logits[0])).mean()
    wanted = wanted + F.softplus(logits[1]).mean()
    assert torch.isclose(model.discriminator_loss(batch)["D"][1], wanted, atol=1e-6)


def test_each_improvement_can_be_off():
    model = build(ImprovedGAN, feature_weight=0.0, label=1.0, kernels=None).eval()
    dcgan, batch = build(DCGAN).eval(), batch_of((), 8)
    dcgan.load_state_dict(model.state_dict())
    for loss in ("discriminator_loss", "generator_loss"):
        found, wanted = (getattr(m, loss)(batch) for m in (model, dcgan))
        assert found.keys() == wanted.keys()
        assert all(torch.isclose(found[n][1], wanted[n][1]) for n in wanted)


def test_minibatch_features_are_closeness_to_the_others():
    layer = MinibatchFeatures(5, 3)
    h = torch.randn(4, 5, generator=seeded())
    found, maps = layer(h), layer.maps(h).view(4, 3, 4)
    assert torch.equal(found[:, :5], h)
    for i in range(4):
        near = [(-(maps[i] - maps[j]).abs().sum(1)).exp() for j in range(4) if j != i]
        assert torch.allclose(found[i, 5:], torch.stack(near).mean(0), atol=1e-6)
    assert torch.allclose(layer(h[:1].expand(6, -1))[:, 5:], torch.ones(6, 3))


@pytest.mark.parametrize(("kind", "options"), [
    (BEGAN, {"hold": 1.0}), (BEGAN, {"start": 2.0}), (BEGAN, {"modern": "no"}),
    (ImprovedGAN, {"label": 1.5}), (ImprovedGAN, {"label": 0.0}),
    (ImprovedGAN, {"kernels": 0}), (VAEGAN, {"kl_weight": -1.0})])
def test_refusals_name_what_is_accepted(kind, options):
    with pytest.raises(ValueError, match="accepted"):
        build(kind, **options)
