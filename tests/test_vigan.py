"""ViGAN: the terms of its losses, who moves in which order, its printed signs, and its
verbs. Errors are planted by subclasses; the check that must hold fails on each of them.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import condgen as cg
from condgen.conditions import Binary, Classes, Code, Real, Schema
from condgen.contracts import Batch, Noise
from condgen.data import Dataset
from condgen.models.vigan import (
    FORMS, ViGAN, convolutions, information_bound, most_probable, recognition_loss,
    three_set_loss)
from condgen.trainer import set_trainable

SHAPE = (1, 16, 16)
KNOWN = Schema([Classes("kind", 3), Binary("bold"), Real("light", 0, 10)])


def batch_of(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = KNOWN.pack(n, kind=torch.arange(n) % 3, bold=torch.rand(n, generator=g) < 0.5,
                   light=10 * torch.rand(n, generator=g))
    return Batch({"x": torch.rand(n, *SHAPE, generator=g), "c": c},
                 Noise((seed,), slice(0, n), n))


def small(kind=ViGAN, conditions=KNOWN, **options):
    torch.manual_seed(0)
    return kind(SHAPE, conditions, **{"latent": 5, "width": 4, "hidden": 12, **options})


def players(model):
    return {player.name: player for player in model.players(model.stages()[0])}


def gradients(model, name, batch):
    """The gradient that one player's loss gives, by parameter, in evaluation mode."""
    model.zero_grad()
    player = players(model)[name]
    set_trainable(model, player)
    sum(w * v for w, v in player.loss(batch).values()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()
            if p.grad is not None and p.grad.any()}


def expected(model, batch):
    """The weighted losses of Eqs. 10, 14, and 13 with 15, from the networks' outputs."""
    x, c, n = batch.x, batch.c, batch.n
    mean, log_std = model.encoder(2 * x - 1).chunk(2, 1)
    z = mean + log_std.exp() * batch.randn("eps", 5)
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(1)
    other = model.draw_conditions(n, batch.rand)
    made = [model.generate(c, z), model.generate(other, batch.randn("z", 5))]
    features = [model.look(2 * v - 1).flatten(1) for v in (x, made[0])]
    recon = 0.5 * (features[0] - features[1]).square().sum(1).mean()
    size = features[0].shape[1]
    seen = [model.discriminate(v) for v in (x, *made)]
    d = [logit.double().sigmoid() for logit, _ in seen]
    nll = [sum(KNOWN.nll(answers, known).values()).mean()
           for (_, answers), known in zip(seen, (c, c, other))]
    return {
        "encoder": recon / size + model.kl_weight * kl.mean() / size,
        "generator": (-d[1].log().mean() - d[2].log().mean()
                      + model.information_weight * (nll[1] + nll[2])
                      + model.reconstruction_weight * recon / size),
        "discriminator": (nll[0] - d[0].log().mean() - (1 - d[1]).log().mean()
                          - (1 - d[2]).log().mean())}


def mistakes(kind):
    """Players whose loss is not the equation's, or moves what it must not."""
    model, batch = small(kind, kl_weight=0.7, information_weight=1.3,
                         reconstruction_weight=11.0), batch_of()
    own = {"encoder": {"encoder"}, "generator": {"generator"},
           "discriminator": {"look", "trunk", "real", "recogniser"}}
    found = [] if list(players(model)) == list(own) else ["order"]
    for name, loss in expected(model, batch).items():
        terms = players(model)[name].loss(batch).values()
        if not math.isclose(sum((w * v).item() for w, v in terms), loss.item(),
                            rel_tol=1e-4):
            found.append(name)
        moved = {n.split(".")[0] for n in gradients(model, name, batch)}
        found += [f"{name} moves"] if moved != own[name] else []
    return found


class NoGameOnSamples(ViGAN):
    def generator_loss(self, batch):
        x, c = self.fakes(batch)
        logits, answers = self.discriminate(x[: batch.n])
        nll = self.conditions.nll(answers, c[: batch.n])
        return {**super().generator_loss(batch),
                "G": (1.0, F.softplus(-logits).mean()),
                **{f"Q_{k}": (self.information_weight, v.mean()) for k, v in nll.items()}}


class NoPrior(ViGAN):
    def encoder_loss(self, batch):
        return {"L_recon": super().encoder_loss(batch)["L_recon"]}


class GameInTheEncoder(ViGAN):
    def encoder_loss(self, batch):
        z, _ = self.draw_code(batch)
        logits, _ = self.discriminate(self.generate(self.packed(batch), z))
        return {**super().encoder_loss(batch), "G": (1.0, F.softplus(-logits).mean())}


class NoRecogniserInTheGenerator(ViGAN):
    def generator_loss(self, batch):
        return {k: v for k, v in super().generator_loss(batch).items() if k[0] != "Q"}


class RecogniserOnFakes(ViGAN):
    def discriminator_loss(self, batch):
        with torch.no_grad():
            x, c = self.fakes(batch)
        nll = self.conditions.nll(self.discriminate(x)[1], c)
        return {**super().discriminator_loss(batch),
                **{f"Q_{k}_fake": (1.0, v.mean()) for k, v in nll.items()}}


class SamplesAreNoFakes(ViGAN):
    def discriminator_loss(self, batch):
        with torch.no_grad():
            fake = self.fakes(batch)[0][: batch.n]
        logits = [self.discriminate(v)[0] for v in (batch.x, fake)]
        return {**super().discriminator_loss(batch),
                "D": (1.0, (F.softplus(-logits[0]) + F.softplus(logits[1])).mean())}


class WrongOrder(ViGAN):
    def players(self, stage):
        return super().players(stage)[::-1]


class OneDescription(ViGAN):
    def draw_conditions(self, n, rand):
        return super().draw_conditions(n, rand)[:1].expand(n, -1)


@pytest.mark.parametrize("kind, found", [
    (ViGAN, []), (NoGameOnSamples, ["generator"]), (NoPrior, ["encoder"]),
    (GameInTheEncoder, ["encoder"]), (NoRecogniserInTheGenerator, ["generator"]),
    (RecogniserOnFakes, ["discriminator"]), (SamplesAreNoFakes, ["discriminator"]),
    (WrongOrder, ["order"])])
def test_losses_are_the_equations_and_planted_errors_are_found(kind, found):
    assert mistakes(kind) == found


def test_the_first_player_alone_draws_a_batch():
    assert [p.fresh for p in players(small()).values()] == [True, False, False]


def test_all_players_see_the_same_fakes():
    model, batch = small().train(), batch_of()
    first, second = model.fakes(batch), model.fakes(batch)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_samples_are_drawn_with_descriptions_of_the_data():
    model, batch = small(), batch_of(30)
    model.store_condition_rows(batch.c)
    kinds = {tuple(row) for row in batch.c.tolist()}
    drawn = model.fakes(batch)[1][30:]
    assert {tuple(row) for row in drawn.tolist()} <= kinds
    assert len(drawn.unique(dim=0)) > 5 > len(
        small(OneDescription).fakes(batch)[1][30:].unique(dim=0))


def test_learning_rates_are_those_of_their_players():
    rates = {name: player.optimizer.param_groups[0]["lr"] for name, player
             in players(small(lr=0.3, discriminator_lr=0.2)).items()}
    assert rates == {"encoder": 0.3, "generator": 0.3, "discriminator": 0.2}


@pytest.mark.parametrize("sign", [-1, 1])
def test_corrected_discriminator_loss_has_a_bound(sign):
    far = sign * torch.full((4,), 1e4)
    assert three_set_loss(far, -far, -far) >= 0
    assert three_set_loss(far, far, far) >= 0
    literal = three_set_loss(far, -far, -far, "literal")
    assert literal == (-2e4 if sign > 0 else 1e4)


def test_discriminator_loss_at_the_best_answer():
    """One real image among three: D = 1/3, and the slope is zero there."""
    logit = torch.full((1,), -math.log(2), dtype=torch.float64, requires_grad=True)
    loss = three_set_loss(logit, logit, logit)
    assert loss.item() == pytest.approx(math.log(3) + 2 * math.log(1.5))
    assert torch.autograd.grad(loss, logit)[0].abs() < 1e-12


def test_printed_recognition_loss_is_the_negative():
    nll = torch.tensor([0.2, 1.4])
    assert recognition_loss(nll) == -recognition_loss(nll, "literal") > 0
    h = torch.tensor(math.log(10))
    assert information_bound(h, nll) < h < information_bound(h, nll, "literal")
    assert information_bound(h, torch.zeros(2)) == h


@pytest.mark.parametrize("form, better", [*zip(FORMS, (True, False))])
def test_recogniser_learns_or_unlearns_by_its_form(form, better):
    model = small(form=form).train()
    batch = batch_of(24)
    optimizer = players(model)["discriminator"]
    losses = []
    for _ in range(12):
        set_trainable(model, optimizer)
        terms = optimizer.loss(batch)
        optimizer.optimizer.zero_grad()
        sum(w * v for w, v in terms.values()).backward()
        optimizer.optimizer.step()
        losses.append(abs(terms["Q_kind"][1].item()))
    assert (losses[-1] < losses[0]) == better
    last = terms["D"][1].item()
    assert last > 0 if form == "corrected" else last < 2


def test_editing_keeps_the_code_and_what_is_not_named():
    model, x = small(), batch_of().x
    read = model.recognise(x)
    assert set(read) == set(KNOWN.names)
    assert torch.equal(model.edit(x, kind=2),
                       model.decode(model.encode(x), **{**read, "kind": 2}))
    assert torch.equal(model.edit(x), model.reconstruct(x, **read))
    full = {"kind": 0, "bold": 1, "light": 3.0}
    assert torch.equal(model.edit(x, **full), model.reconstruct(x, **full))
    assert not torch.equal(model.edit(x, kind=1), model.edit(x, kind=2))


def test_answers_become_conditions_that_are_accepted():
    answers = torch.tensor([[0.1, 3.0, -1.0, -0.2, 1.7], [4.0, 3.0, 5.0, 0.3, -0.4]])
    c = most_probable(KNOWN, answers)
    assert c.tolist() == [[0, 1, 0, 0, 1], [0, 0, 1, 1, pytest.approx(-0.4)]]
    values = KNOWN.unpack(c)
    assert torch.allclose(KNOWN.pack(2, **values), c)


def test_description_and_noise_both_change_a_sample():
    model = small()

    def draw(seed, **conditions):
        return model.sample(3, generator=torch.Generator().manual_seed(seed), bold=1,
                            light=2.0, **conditions)

    assert not torch.allclose(draw(0, kind=0), draw(0, kind=1))
    assert not torch.allclose(draw(0, kind=0), draw(1, kind=0))
    assert torch.equal(draw(0, kind=0), draw(0, kind=0))


def test_a_short_training_can_be_saved_and_loaded(tmp_path):
    batch = batch_of(40)
    splits = {"train": torch.arange(32), "val": torch.arange(32, 36),
              "test": torch.arange(36, 40)}
    data = Dataset("random", (255 * batch.x).byte(), batch.c, KNOWN, splits)
    run = cg.fit(small(), data, tmp_path / "run", images=64, progress=False)
    again = cg.load(tmp_path / "run")
    x = data.split_images("test")
    assert torch.equal(again.edit(x, kind=1), run.model.edit(x, kind=1))
    assert run.log[-1]["encoder.L_recon"] > 0


@pytest.mark.parametrize("side, pixels", [(16, 2), (32, 4), (64, 8)])
def test_convolutions_end_at_an_eighth_of_the_side(side, pixels):
    first, last, size = convolutions((3, side, side), 2)
    h = first(torch.rand(2, 3, side, side))
    assert h.shape == (2, 4, 2 * pixels, 2 * pixels)
    assert last(h).shape == (2, size) == (2, 8 * pixels**2)


@pytest.mark.parametrize("conditions, options, words", [
    ((), {}, "conditions none"), (Schema([Code("u")]), {}, "no Code"),
    (KNOWN, {"form": "literally"}, "did you mean 'literal'"),
    (KNOWN, {"information_weight": -1.0}, "information_weight"),
    (KNOWN, {"discriminator_lr": math.nan}, "discriminator_lr"),
    (KNOWN, {"hidden": 0}, "hidden"), (KNOWN, {"latent": 1.5}, "latent")])
def test_wrong_arguments_are_named(conditions, options, words):
    with pytest.raises(ValueError, match=words):
        small(conditions=conditions, **options)


def test_eight_pixels_are_too_few():
    with pytest.raises(ValueError, match="16, 32, 64"):
        ViGAN((1, 8, 8), KNOWN)
