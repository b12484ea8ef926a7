"""ViGANs with one choice changed: mixtures of codes, the terms of each switch, and the
encoder that is trained afterwards. Errors are planted by subclasses.
"""

import pytest
import torch
import torch.nn.functional as F

from condgen.conditions import Classes, Schema
from condgen.contracts import Batch, Noise
from condgen.models.vigan import ViGAN
from condgen.models.vigan_variants import (
    PIXEL_STD, CodeMixture, LaterEncoderViGAN, VariedViGAN, fit_mixture,
    posterior_codes)
from condgen.trainer import set_trainable

SHAPE, KNOWN = (1, 16, 16), Schema([Classes("kind", 3), Classes("place", 4)])


def batch_of(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = KNOWN.pack(n, kind=torch.arange(n) % 3, place=torch.arange(n) % 4)
    return Batch({"x": torch.rand(n, *SHAPE, generator=g), "c": c},
                 Noise((seed,), slice(0, n), n))


def small(kind=VariedViGAN, **options):
    torch.manual_seed(0)
    return kind(SHAPE, KNOWN, latent=5, width=4, hidden=12, **options)


def correlated_codes(n=4000):
    """Two clusters; in each the second number is 0.8 times the first, and noise."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, n, generator=g)
    centre = 4.0 * torch.randint(2, (n,), generator=g)
    return torch.stack([centre + a, 0.8 * a + 0.6 * b - centre], 1)


class TransposedFactors(CodeMixture):
    def draw(self, n, generator=None):
        return CodeMixture(self.weights, self.means, self.factors.mT).draw(n, generator)


class NoNoise(CodeMixture):
    def draw(self, n, generator=None):
        return CodeMixture(self.weights, self.means, 0 * self.factors).draw(n, generator)


@pytest.mark.parametrize("kind, right", [
    (CodeMixture, True), (TransposedFactors, False), (NoNoise, False)])
def test_draws_of_a_mixture_have_the_moments_of_the_codes(kind, right):
    z = correlated_codes()
    drawn = kind(*fit_mixture(z, 2)).draw(20_000, torch.Generator().manual_seed(1))
    one = drawn[drawn[:, 0] - drawn[:, 1] < 4]  # the cluster at (0, 0)
    truth = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    near = (one.T.cov() - truth).abs().max() < 0.15
    assert bool(near and (drawn.mean(0) - z.mean(0)).abs().max() < 0.1) == right


def test_a_mixture_has_at_most_one_component_per_code():
    with pytest.raises(ValueError, match="components=9 for 8 codes"):
        fit_mixture(torch.randn(8, 2), 9)
    with pytest.raises(ValueError, match="components"):
        fit_mixture(torch.randn(8, 2), 0)


def test_codes_are_draws_and_not_means():
    model, x = small().eval(), batch_of(400).x
    first, second = (posterior_codes(model, x, torch.Generator().manual_seed(s))
                     for s in (0, 1))
    mean, log_std = model.posterior(x)
    assert torch.equal(first, posterior_codes(model, x, torch.Generator().manual_seed(0)))
    spread = ((first - second) / log_std.exp()).std()
    assert spread.item() == pytest.approx(2**0.5, rel=0.05)
    assert (first - mean).abs().mean() > 0.1


class SameDescription(VariedViGAN):
    def swapped(self, batch):
        c, code = self.packed(batch), self.draw_code(batch)[0]
        return self.generate(c, code).detach(), c


class PriorCodes(VariedViGAN):
    def swapped(self, batch):
        c = self.packed(batch).roll(1, 0)
        return self.generate(c, batch.randn("z", self.latent_size).to(c)).detach(), c


def swap_is_right(kind):
    """Whether the added terms are those of codes under the next description."""
    model, batch = small(kind, swap_weight=0.5, information_weight=3.0).eval(), batch_of()
    mean, log_std = model.posterior(batch.x)
    z, c = mean + log_std.exp() * batch.randn("eps", 5), batch.c.roll(1, 0).float()
    logits, answers = model.discriminate(model.generate(c, z))
    nll = sum(v.mean() for v in KNOWN.nll(answers, c).values())
    found = {k: w * v for k, (w, v) in
             {**model.generator_loss(batch), **model.discriminator_loss(batch)}.items()}
    game = found["G_swap"] + found["Q_kind_swap"] + found["Q_place_swap"]
    expected = 0.5 * (F.softplus(-logits).mean() + 3.0 * nll)
    return (torch.allclose(game, expected, rtol=1e-4)
            and torch.allclose(found["D_swap"], 0.5 * F.softplus(logits).mean()))


@pytest.mark.parametrize("kind, right", [
    (VariedViGAN, True), (SameDescription, False), (PriorCodes, False)])
def test_swapped_terms_and_planted_errors(kind, right):
    assert swap_is_right(kind) == right


def test_without_a_switch_it_is_vigan():
    batch = batch_of()
    for name in ("encoder_loss", "generator_loss", "discriminator_loss"):
        a, b = (getattr(small(kind).eval(), name)(batch) for kind in (ViGAN, VariedViGAN))
        assert a.keys() == b.keys() and all(torch.equal(a[k][1], b[k][1]) for k in a)


def test_pixels_are_compared_in_units_of_their_spread():
    model, batch = small(reconstruction="pixels").eval(), batch_of()
    x = torch.rand(6, *SHAPE)
    expected = 0.5 * (x - batch.x).square().mean() / PIXEL_STD**2
    assert torch.isclose(model.feature_loss(batch.x, x), expected)
    weight = model.encoder_loss(batch)["L_prior"][0]
    assert weight == pytest.approx(model.kl_weight / 256)


def test_a_recogniser_of_all_learns_from_generated_images():
    batch = batch_of()
    terms = small(recogniser_images="all").eval().discriminator_loss(batch)
    model = small().eval()
    fake, c = model.fakes(batch)
    nll = KNOWN.nll(model.discriminate(fake)[1], c)
    for name in KNOWN.names:
        assert torch.isclose(terms[f"Q_{name}_fake"][1], nll[name].mean())
    assert "Q_kind_fake" not in small().discriminator_loss(batch)


@pytest.mark.parametrize("options", [
    {"reconstruction": "pixel"}, {"recogniser_images": "fake"}, {"swap_weight": -1.0},
    {"noise": -0.1}, {"r1": -1.0}, {"free_bits": -1.0}, {"adversary_weight": -1.0}])
def test_unknown_switches_are_refused(options):
    with pytest.raises(ValueError, match="accepted|_weight|noise|r1|free_bits"):
        small(**options)


class RealImages(LaterEncoderViGAN):
    def encoder_loss(self, batch):
        z = batch.randn("z", self.latent_size)
        return {"codes": (1.0, F.mse_loss(self.posterior(batch.x)[0], z))}


@pytest.mark.parametrize("kind, right", [(LaterEncoderViGAN, True), (RealImages, False)])
def test_the_later_encoder_never_sees_a_real_image(kind, right):
    model, batch = small(kind).eval(), batch_of()
    model.store_condition_rows(batch.c)
    other = Batch({"x": 1 - batch.x, "c": batch.c}, Noise((0,), slice(0, 6), 6))
    same = torch.equal(model.encoder_loss(batch)["codes"][1],
                       model.encoder_loss(other)["codes"][1])
    assert same == right


def test_the_later_encoder_is_alone_in_its_stage():
    model, batch = small(LaterEncoderViGAN), batch_of()
    game, after = model.stages()
    assert [p.name for p in model.players(game)] == ["generator", "discriminator"]
    assert [p.name for p in model.players(after)] == ["encoder"]
    [player] = model.players(after)
    set_trainable(model, player)
    sum(w * v for w, v in player.loss(batch).values()).backward()
    assert {n.split(".")[0] for n, p in model.named_parameters()
            if p.grad is not None and p.grad.any()} == {"encoder"}


def terms_and_images(model, batch):
    """Terms of D and G, and what D saw for them, in order."""
    seen, look = [], model.discriminate
    model.discriminate = lambda x: (seen.append(x.detach()), look(x))[1]
    terms = {**model.generator_loss(batch), **model.discriminator_loss(batch)}
    return terms, seen


class NoisyFakesOnly(VariedViGAN):
    def observe(self, batch, kind, x):
        plain = ViGAN.observe if kind == "real" else VariedViGAN.observe
        return plain(self, batch, kind, x)


class OneNoiseForAll(VariedViGAN):
    def observe(self, batch, kind, x):
        return super().observe(batch, "any", x)


class SmallNoise(VariedViGAN):
    def observe(self, batch, kind, x):
        noise, self.noise = self.noise, self.noise**2
        found = super().observe(batch, kind, x)
        self.noise = noise
        return found


def noise_is_right(kind):
    """Whether D sees each image with its own normal noise of the asked size."""
    options = {"swap_weight": 1.0, "recogniser_images": "all"}
    batch = batch_of(400)
    _, clean = terms_and_images(small(**options).eval(), batch)
    _, noisy = terms_and_images(small(kind, **options, noise=0.2).eval(), batch)
    eps = [(b - a).flatten(1) for a, b in zip(clean, noisy)]
    sizes = all(abs(e.std() - 0.2) < 0.01 and abs(e.mean()) < 0.01 for e in eps)
    # generated, swapped, real, fake, swapped of D; "all" sees the fakes again
    different = [eps[i][:400] for i in range(5)]
    related = max((a * b).mean().abs() / 0.04 for i, a in enumerate(different)
                  for b in different[:i])
    return bool(sizes and len(eps) == 6 and related < 0.02)


@pytest.mark.parametrize("kind, right", [
    (VariedViGAN, True), (NoisyFakesOnly, False), (OneNoiseForAll, False),
    (SmallNoise, False)])
def test_all_observed_images_have_noise_of_their_own(kind, right):
    assert noise_is_right(kind) == right


def test_noise_is_for_training_only():
    batch, model, plain = batch_of(), small(noise=0.5).eval(), small().eval()
    assert torch.equal(model.discriminate(batch.x)[1], plain.discriminate(batch.x)[1])
    for loss in ("encoder_loss", "generator_loss"):
        a, b = (getattr(m, loss)(batch)["L_recon"][1] for m in (model, plain))
        assert torch.equal(a, b)
    assert not torch.equal(model.generator_loss(batch)["G"][1],
                           plain.generator_loss(batch)["G"][1])


class OwnDescriptionForEncoder(VariedViGAN):
    def encoder_loss(self, batch):
        nll = self.conditions.nll(self.reader(self.draw_code(batch)[0]), batch.c)
        return ViGAN.encoder_loss(self, batch) | {
            f"A_{name}": (self.adversary_weight, v.mean()) for name, v in nll.items()}


class ReaderOfMeans(VariedViGAN):
    def reader_loss(self, batch):
        nll = self.conditions.nll(self.reader(self.posterior(batch.x)[0]), batch.c)
        return {f"A_{name}": (1.0, v.mean()) for name, v in nll.items()}


def adversary_is_right(kind):
    """Whether the reader learns the own description from draws, the encoder another."""
    model, batch = small(kind, adversary_weight=0.5).eval(), batch_of()
    mean, log_std = model.posterior(batch.x)
    answers = model.reader(mean + log_std.exp() * batch.randn("eps", 5))
    own = KNOWN.nll(answers, batch.c.float())
    other = KNOWN.nll(answers, batch.c.float().roll(1, 0))
    learned, given = model.reader_loss(batch), model.encoder_loss(batch)
    return all(torch.allclose(learned[f"A_{n}"][1], own[n].mean())
               and given[f"A_{n}"][0] == 0.5
               and torch.allclose(given[f"A_{n}"][1], other[n].mean())
               for n in KNOWN.names)


@pytest.mark.parametrize("kind, right", [
    (VariedViGAN, True), (OwnDescriptionForEncoder, False), (ReaderOfMeans, False)])
def test_terms_of_the_adversary_and_planted_errors(kind, right):
    assert adversary_is_right(kind) == right


def test_the_reader_is_a_player_of_its_own():
    model, batch = small(adversary_weight=0.5), batch_of()
    model.store_condition_rows(batch.c)
    [stage] = model.stages()
    names = [p.name for p in model.players(stage)]
    assert names == ["encoder", "generator", "discriminator", "reader"]
    for player in model.players(stage):
        model.zero_grad()
        set_trainable(model, player)
        sum(w * v for w, v in player.loss(batch).values()).backward()
        moved = {n.split(".")[0] for n, p in model.named_parameters()
                 if p.grad is not None and p.grad.any()}
        assert ("reader" in moved) == (player.name == "reader")
        assert ("encoder" in moved) == (player.name == "encoder")
    assert not hasattr(small(), "reader")


def trained_leak(kind, rounds=80):
    """Share of classes in draws of codes after encoder and reader have played."""
    g = torch.Generator().manual_seed(0)
    x = 0.1 * torch.rand(48, *SHAPE, generator=g)
    table = {"x": x, "c": batch_of(48).c}
    for i in range(48):  # the class is where the image is bright
        x[i, 0, :, 5 * (i % 3): 5 * (i % 3) + 5] += 0.8
    model = small(kind, adversary_weight=1.0, lr=3e-3)
    [stage] = model.stages()
    players = [p for p in model.players(stage) if p.name in ("encoder", "reader")]
    for i in range(rounds):
        for k, player in enumerate(players):
            batch = Batch(table, Noise((i, k), slice(0, 48), 48))
            set_trainable(model, player)
            player.optimizer.zero_grad()
            sum(w * v for w, v in player.loss(batch).values()).backward()
            player.optimizer.step()
    draws = posterior_codes(model.eval(), x.repeat(40, 1, 1, 1), g)
    z = torch.cat([draws, torch.ones(len(draws), 1)], 1).double()
    target = F.one_hot(torch.arange(len(z)) % 3, 3).double()
    fitted = z @ torch.linalg.lstsq(z, target).solution
    return (fitted.argmax(1) == target.argmax(1)).double().mean().item()


def test_an_adversary_takes_the_description_out_of_the_code():
    assert trained_leak(OwnDescriptionForEncoder) > 0.95
    assert trained_leak(VariedViGAN) < 0.6


class FreeImages(VariedViGAN):
    def prior_divergence(self, mean, log_std):
        return ViGAN.prior_divergence(self, mean, log_std).clamp(
            min=self.free_bits * mean.shape[1])


@pytest.mark.parametrize("kind, right", [(VariedViGAN, True), (FreeImages, False)])
def test_free_bits_are_of_each_number_over_the_batch(kind, right):
    model = small(kind, free_bits=0.5)
    mean = torch.tensor([[0.2, 3.0], [0.4, 0.0]], requires_grad=True)
    found = model.prior_divergence(mean, torch.zeros(2, 2))
    expected = 0.5 + (0.5 * 9 + 0) / 2  # 0.05 nats on average, and 2.25
    found.mean().backward()
    assert (found.mean().item() == pytest.approx(expected)
            and mean.grad[:, 0].tolist() == [0, 0]) == right
    model.free_bits = 0.0
    plain = ViGAN.prior_divergence(model, mean, torch.zeros(2, 2))
    assert torch.equal(VariedViGAN.prior_divergence(model, mean, torch.zeros(2, 2)), plain)


class BatchStatistics(VariedViGAN):
    def steady_logits(self, x):
        return self.discriminate(x)[0]


@pytest.mark.parametrize("kind, right", [(VariedViGAN, True), (BatchStatistics, False)])
def test_r1_is_of_each_image_alone(kind, right):
    model, batch = small(kind, r1=3.0).train(), batch_of()
    together = model.steady_logits(batch.x)
    pairs = torch.cat([model.steady_logits(pair) for pair in batch.x.split(2)])
    assert torch.allclose(together, pairs, atol=1e-6) == right
    if right:
        weight, value = model.discriminator_loss(batch)["R1"]
        model.eval()
        x = batch.x.clone().requires_grad_()
        [slope] = torch.autograd.grad(model.discriminate(x)[0].sum(), x)
        assert weight == 1.5 and value > 0
        assert slope.flatten(1).square().sum(1).mean() > 0
        assert all(m.training for m in model.train().modules())
