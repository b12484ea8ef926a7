"""Coupled and decoupled autoencoders: closed forms, which term reaches what, equal
paths to the bit, verbs, reload.
"""

import math

import pytest
import torch
from bars import KNOWN, Bars, batch_of, seeded

from condgen.conditions import Code
from condgen.games import GAMES
from condgen.models.decoupled import (CoupledAE, DecoupledAE, LatentGaussian,
                                      ProjectionDiscriminator, expected_squared_error,
                                      optimal_coupled_scale)
from condgen.runs import load, save
from condgen.trainer import set_trainable
from condgen.training import fit

SMALL = {"latent": 6, "width": 4}
BOTH = (CoupledAE, DecoupledAE)
SHORT = {"adversarial": 128, "codes": 128}


def build(cls, conditions=(), **options):
    torch.manual_seed(0)
    return cls((1, 8, 8), conditions, **{**SMALL, **options})


def kicked(model):
    """The model with all parameters away from where they started;
    nothing is zero any more.
    """
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=seeded(p.numel())))
    return model


def path(model):
    return torch.cat([p.detach().flatten() for part in (model.encoder, model.generator)
                      for p in part.parameters()])


# Closed forms


@pytest.mark.parametrize("rho", [0.1, 0.6, 0.95])
def test_the_scale_is_the_minimum_of_the_sum(rho):
    s = torch.linspace(-1.5, 1.5, 300_001, dtype=torch.float64)
    for w in (0.0, 0.3, 2.0, 50.0):
        total = 0.5 * expected_squared_error(rho, s) + 0.5 * w * (s.abs() - 1).square()
        assert abs(s[total.argmin()].item() - optimal_coupled_scale(rho, w)) < 2e-5
    assert (optimal_coupled_scale(rho, 0.0) == rho
            and optimal_coupled_scale(rho, 1e9) == pytest.approx(1))


@pytest.mark.parametrize("rho", [0.2, 0.8])
def test_closed_form_errors_equal_monte_carlo(rho):
    z, e = torch.randn(2, 400_000, generator=seeded(), dtype=torch.float64)
    x = rho * z + math.sqrt(1 - rho**2) * e
    for s in (-1.0, rho, optimal_coupled_scale(rho, 1.0), 1.0):
        drawn = (x - s * z).square()
        assert (abs(drawn.mean().item() - expected_squared_error(rho, s))
                < 5 * drawn.std().item() / 400_000**0.5)
    assert (expected_squared_error(rho, 1.0) / expected_squared_error(rho, rho)
            == pytest.approx(2 / (1 + rho)))
    assert expected_squared_error(rho, -1.0) == pytest.approx(2 * (1 + rho))


def test_code_moments_do_not_depend_on_batch_sizes():
    z = (torch.randn(1_000, 4, generator=seeded())
         @ torch.randn(4, 4, generator=seeded(1)) + 3)
    one, many = LatentGaussian(4), LatentGaussian(4)
    one.update(z)
    for part in z.split(170):
        many.update(part)
    assert (torch.allclose(one.mean, z.mean(0), atol=1e-4)
            and torch.allclose(one.mean, many.mean, atol=1e-4))
    assert torch.allclose(one.second, many.second, rtol=1e-4, atol=1e-4)
    draws = one.draw(torch.randn(200_000, 4, generator=seeded(2)))
    scale = z.T.cov().diagonal().max()
    assert (draws.T.cov() - z.T.cov(correction=0)).abs().max() < 0.02 * scale
    eps = torch.randn(5, 4, generator=seeded(3))
    # nothing shown yet
    assert torch.allclose(LatentGaussian(4).draw(eps), eps, atol=1e-6)


def test_codes_of_one_point_are_that_point():
    codes = LatentGaussian(3)
    codes.update(torch.tensor([[1.0, -2.0, 0.5]]).repeat(9, 1))
    assert torch.allclose(codes.draw(torch.randn(4, 3, generator=seeded())),
                          torch.tensor([1.0, -2.0, 0.5]), atol=1e-3)


# Which term reaches what


def reached(model):
    """Player and term → parts of the model with a path to it that is not all zero."""
    found, parts = {}, dict(model.named_children())
    for player in kicked(model).players(model.stages()[0]):
        for term, (_, value) in player.loss(batch_of(model.conditions)).items():
            for name, part in parts.items():
                params = list(part.parameters())
                grads = torch.autograd.grad(value, params, retain_graph=True,
                                            allow_unused=True) if params else []
                if any(g is not None and g.any() for g in grads):
                    found.setdefault(f"{player.name}.{term}", set()).add(name)
                elif player.name == "residual" and name in ("encoder", "generator"):
                    # no path at all, which is more than a zero
                    assert all(g is None for g in grads)
    return found


@pytest.mark.parametrize("conditions", [(), KNOWN], ids=["plain", "conditions"])
def test_adversarial_gradient_reaches_only_the_coupled_ae(conditions):
    assert reached(build(CoupledAE, conditions)) == {
        "autoencoder.L1": {"encoder", "generator"},
        "autoencoder.G": {"encoder", "generator", "discriminator"},
        "discriminator.D": {"discriminator"}}
    assert reached(build(DecoupledAE, conditions)) == {
        "autoencoder.L1": {"encoder", "generator"},
        "discriminator.D": {"discriminator"},
        "residual.G": {"discriminator", "refiner"}}


@pytest.mark.parametrize("conditions", [(), KNOWN], ids=["plain", "conditions"])
@pytest.mark.parametrize("cls", BOTH)
def test_law_4_each_player_updates_only_its_parameters(cls, conditions):
    model = kicked(build(cls, conditions))
    moved = set()
    for player in model.players(model.stages()[0]):
        set_trainable(model, player)
        model.zero_grad(set_to_none=True)
        sum(w * v
            for w, v in player.loss(batch_of(model.conditions)).values()).backward()
        own = {id(p) for p in player.params}
        assert not own & moved
        moved |= own
        for name, p in model.named_parameters():
            assert (p.grad is not None and bool(p.grad.any())) == (
                id(p) in own), f"{player.name}: {name}"
    assert moved == {id(p) for p in model.parameters()}


def test_the_algorithm_is_the_papers():
    players = {cls: build(cls).players(None) for cls in BOTH}
    assert [(p.name, p.repeats, p.fresh) for p in players[DecoupledAE]] == [
        ("autoencoder", 1, True), ("discriminator", 1, False), ("residual", 2, False)]
    assert [(p.name, p.repeats, p.fresh) for p in players[CoupledAE]] == [
        ("autoencoder", 1, True), ("discriminator", 1, False)]  # fmt: skip
    assert len({id(p.optimizer) for p in players[DecoupledAE]}) == 3


@pytest.mark.parametrize("game", GAMES)
def test_terms_are_those_of_the_equations(game):
    model = kicked(build(DecoupledAE, game=game, weight=0.3)).eval()
    batch, none = batch_of(model.conditions, 16), torch.zeros(16, 0)
    z = model.encoder(batch.x)
    base, rest = torch.sigmoid(model.generator(z)), torch.tanh(model.refiner(z))
    real, fake = (model.discriminator(batch.x, none),
                  model.discriminator(base + rest, none))
    found = {k: v for loss in (model.autoencoder_loss, model.discriminator_loss,
                               model.residual_loss)
             for k, v in loss(batch).items()}
    assert {k: w for k, (w, _) in found.items()} == {"L1": 1.0, "D": 1.0, "G": 0.3}
    wanted = {"L1": (base - batch.x).abs().mean(), "D": GAMES[game].critic(real, fake),
              "G": GAMES[game].generator(fake)}  # fmt: skip
    assert all(torch.isclose(found[k][1], wanted[k], atol=1e-6) for k in wanted)
    coupled = kicked(build(CoupledAE, game=game, weight=0.3)).eval()
    made = torch.sigmoid(coupled.generator(coupled.encoder(batch.x)))
    terms = coupled.autoencoder_loss(batch)
    assert torch.isclose(terms["L1"][1], (made - batch.x).abs().mean(), atol=1e-6)
    game_term = GAMES[game].generator(coupled.discriminator(made, none))
    assert terms["G"][0] == 0.3 and torch.isclose(terms["G"][1], game_term, atol=1e-6)


@pytest.mark.parametrize("conditions", [(), KNOWN], ids=["plain", "conditions"])
def test_weight_does_not_change_the_decoupled_autoencoder(conditions):
    ends = {}
    for cls, weight in ([(DecoupledAE, w) for w in (0.0, 1e-3, 1.0)]
                        + [(CoupledAE, w) for w in (0.0, 1.0)]):
        model = build(cls, conditions, weight=weight)
        fit(model, Bars(conditions), images=SHORT, progress=False)
        ends[cls, weight] = path(model), model.codes.second.clone()
    start = ends[DecoupledAE, 0.0]
    same = {key: torch.equal(end[0], start[0]) and torch.equal(end[1], start[1])
            for key, end in ends.items()}
    assert same == {key: key != (CoupledAE, 1.0) for key in ends}
    assert not torch.equal(start[0], path(build(DecoupledAE, conditions)))


def test_residual_is_zero_without_weight_else_nearly_invariant():
    rests = {}
    for weight in (0.0, 0.25, 1.0):
        model = build(DecoupledAE, weight=weight)
        assert not model.residual(torch.randn(3, 6), torch.zeros(3, 0)).any()
        fit(model, Bars(), images=SHORT, progress=False)
        with torch.no_grad():
            rests[weight] = model.residual(torch.randn(50, 6, generator=seeded()),
                                           torch.zeros(50, 0))
    assert not rests[0.0].any() and rests[1.0].abs().mean() > 1e-3
    assert (rests[0.25] - rests[1.0]).abs().max() < 0.05 * rests[1.0].abs().max()


# Verbs


@pytest.mark.parametrize("cls", BOTH)
def test_methods_are_consistent_and_outputs_in_range(cls):
    model = kicked(build(cls)).eval()
    x = Bars().table("test")["x"][:9].float() / 255
    z = model.encode(x)
    assert (z.shape == (9, 6) and torch.equal(model.reconstruct(x), model.decode(z))
            and not z.requires_grad)
    y = model.sample(7, generator=seeded())
    assert y.shape == (7, 1, 8, 8) and 0 <= y.min() and y.max() <= 1
    assert torch.equal(y, model.sample(7, generator=seeded()))
    assert not torch.equal(y, model.sample(7, generator=seeded(1)))
    still = model.sample(4, temperature=0, generator=seeded())
    assert torch.allclose(still, still[:1].expand_as(still), atol=1e-6)
    parts = torch.cat([model.reconstruct(x[:4]), model.reconstruct(x[4:])])
    assert torch.allclose(parts, model.reconstruct(x), atol=1e-6)


def test_the_picture_is_the_sum_of_both_paths():
    model = kicked(build(DecoupledAE)).eval()
    z, none = torch.randn(5, 6, generator=seeded()), torch.zeros(5, 0)
    with torch.no_grad():
        assert torch.equal(model.picture(z, none),
                           model.base(z, none) + model.residual(z, none))
        assert torch.equal(model.decode(z), model.picture(z, none).clamp(0, 1))
        assert model.residual(z, none).min() < 0 < model.residual(z, none).max()


@pytest.mark.parametrize("cls", BOTH)
def test_conditions_reach_pictures_and_discriminator(cls):
    model = kicked(build(cls, KNOWN)).eval()
    x = Bars().table("test")["x"][:6].float() / 255
    asked = {"bold": 1, "light": 4.0}
    one, other = (model.reconstruct(x, bar=k, **asked) for k in (0, 2))
    assert (one - other).abs().max() > 1e-4
    c = KNOWN.pack(6, bar=[0, 1, 2] * 2, bold=1, light=3.0)
    with torch.no_grad():
        assert ((model.discriminator(x, c) - model.discriminator(x, 0 * c)).abs().max()
                > 1e-5)
    assert model.sample(4, bar=1).shape == (4, 1, 8, 8)  # the others are drawn
    with pytest.raises(ValueError, match="'light' is missing"):
        model.reconstruct(x, bar=0, bold=1)


def test_the_critic_is_linear_in_the_condition_and_no_more():
    critic = ProjectionDiscriminator((1, 8, 8), 3, 4)
    x, c = (torch.rand(5, 1, 8, 8, generator=seeded()),
            torch.rand(5, 3, generator=seeded(1)))
    at = lambda k: critic(x, k * c)
    assert (torch.allclose(at(2.0) - at(1.0), at(1.0) - at(0.0), atol=1e-6)
            and not torch.allclose(at(1.0), at(0.0)))
    assert ProjectionDiscriminator((1, 8, 8), 0, 4)(x, torch.zeros(5, 0)).shape == (5,)


@pytest.mark.parametrize("cls", BOTH)
def test_refusals_name_the_nearest(cls):
    with pytest.raises(ValueError, match="did you mean 'hinge'"):
        build(cls, game="hing")
    with pytest.raises(ValueError, match="codes \\['u'\\]"):
        build(cls, [Code("u", 2)])
    wrong = [("weight", -0.1), ("weight", float("nan")), ("weight", True),
             ("lr", "fast"), ("latent", 0), ("width", 0)]
    for options in ({name: value} for name, value in wrong):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(cls, **options)
    model = build(cls)
    for z in (torch.zeros(3, 5), torch.zeros(6), torch.full((2, 6), float("inf")),
              [[0.0] * 6], None):
        with pytest.raises(ValueError, match=r"\(n, 6\)"):
            model.decode(z)
    with pytest.raises(ValueError, match="temperature"):
        model.sample(2, temperature=-1)
    with pytest.raises(ValueError, match="accepted: a tensor"):
        model.encode(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError,
                       match=r"an image given as list; accepted: a tensor \(1, 8, 8\)"):
        model.interpolate([[[0.0] * 8] * 8], torch.zeros(1, 8, 8), 3)
    for options in ({"shape": None}, {"conditions": None}):
        with pytest.raises(ValueError, match="None; accepted"):
            cls(**{"shape": (1, 8, 8), **options})


@pytest.mark.parametrize("cls", BOTH)
def test_interpolation_begins_and_ends_at_reconstructions(cls):
    model, x = kicked(build(cls)).eval(), Bars().table("test")["x"][:2].float() / 255
    path, ends = model.interpolate(x[0], x[1], 4), model.reconstruct(x)
    assert path.shape == (4, 1, 8, 8)
    assert torch.allclose(path[[0, -1]], ends, atol=1e-6)


# Training


@pytest.mark.parametrize("cls", BOTH)
def test_second_fit_forgets_the_moments_of_old_codes(cls):
    model = build(cls)
    for _ in range(2):
        fit(model, Bars(), images={"adversarial": 320, "codes": 256}, progress=False)
    assert model.codes.count == 256
    z = model.encode(Bars().table("train")["x"].float() / 255)
    assert (model.codes.mean - z.mean(0)).abs().max() < 0.3 * z.std(0).max()


@pytest.mark.parametrize("cls", BOTH)
def test_short_training_improves_reconstruction(cls):
    model, x = build(cls, width=8), Bars().table("test")["x"].float() / 255
    before = (model.reconstruct(x) - x).abs().mean()
    fit(model, Bars(), images={"adversarial": 2_000, "codes": 256}, progress=False)
    with torch.no_grad():
        base = model.base(model.encode(x), torch.zeros(len(x), 0))
    assert (base - x).abs().mean() < 0.5 * before
    assert model.codes.count == 256
    train = Bars().table("train")["x"].float() / 255
    z, drawn = (model.encode(train),
                model.codes.draw(torch.randn(20_000, 6, generator=seeded())))
    assert (drawn.mean(0) - z.mean(0)).abs().max() < 0.2 * z.std(0).max()
    assert (drawn.std(0) / z.std(0) - 1).abs().max() < 0.2


@pytest.mark.parametrize("cls", BOTH)
def test_laws_5_and_6_resumed_and_reloaded_models_are_equal(cls, tmp_path):
    whole, run = build(cls), None
    fit(whole, Bars(), images=SHORT, progress=False)
    while run is None or not run.finished:
        run = fit(build(cls), Bars(), tmp_path / "run", images=SHORT, progress=False,
                  budget=0.0)
    ours, theirs = whole.state_dict(), run.model.state_dict()
    assert (list(ours) == list(theirs)
            and all(torch.equal(ours[k], theirs[k]) for k in ours))
    save(whole, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert type(again) is cls and torch.equal(again.sample(3, generator=seeded()),
                                              whole.sample(3, generator=seeded()))
