"""Coupled and decoupled autoencoders: closed forms, which term reaches what, equal paths to the bit, verbs, reload."""

import math

import pytest
import torch

from condgen.contracts import Batch, Binary, Classes, Code, Noise, Real, Schema
from condgen.games import GAMES
from condgen.models.decoupled import Codes, CoupledAE, Critic, DecoupledAE, coupled_scale, squared_error
from condgen.runs import load, save
from condgen.training import allow, fit

SMALL = {"latent": 6, "width": 4}
BOTH = (CoupledAE, DecoupledAE)
KINDS = Schema([Classes("bar", 3), Binary("bold"), Real("light", 0, 10)])
SHORT = {"adversarial": 128, "codes": 128}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Bars:
    """A bright bar at one of three places, bold or not, on a ground of varying light."""

    name, sha256 = "bars", "0"

    def __init__(self, conditions=()):
        self.conditions = Schema(conditions)

    def table(self, split):
        n, g = {"train": 300, "val": 60, "test": 120}[split], seeded(len(split))
        bar, bold, light = torch.arange(n) % 3, torch.rand(n, generator=g) < 0.5, 10 * torch.rand(n, generator=g)
        x = 20 * torch.rand(n, 1, 8, 8, generator=g) + 4 * light.view(-1, 1, 1, 1)
        for i in range(n):
            left = int(bar[i]) * 3
            x[i, 0, :, left : left + (2 if bold[i] else 1)] += 150
        known = {"bar": bar, "bold": bold, "light": light}
        c = self.conditions.pack(n, **{name: known[name] for name in self.conditions.names})
        return {"x": x.round().to(torch.uint8), "c": c}


def build(cls, conditions=(), **options):
    torch.manual_seed(0)
    return cls((1, 8, 8), conditions, **{**SMALL, **options})


def kicked(model):
    """The model with all parameters away from where they started; nothing is zero any more."""
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=seeded(p.numel())))
    return model


def a_batch(model, n=16):
    table = Bars(model.conditions).table("train")
    return Batch({name: t[:n] for name, t in table.items()}, Noise(("test",), slice(None), n))


def path(model):
    return torch.cat([p.detach().flatten() for part in (model.encoder, model.generator) for p in part.parameters()])


# Closed forms


@pytest.mark.parametrize("rho", [0.1, 0.6, 0.95])
def test_the_scale_is_the_minimum_of_the_sum(rho):
    s = torch.linspace(-1.5, 1.5, 300_001, dtype=torch.float64)
    for w in (0.0, 0.3, 2.0, 50.0):
        total = 0.5 * squared_error(rho, s) + 0.5 * w * (s.abs() - 1).square()
        assert abs(s[total.argmin()].item() - coupled_scale(rho, w)) < 2e-5
    assert coupled_scale(rho, 0.0) == rho and coupled_scale(rho, 1e9) == pytest.approx(1)


@pytest.mark.parametrize("rho", [0.2, 0.8])
def test_errors_by_drawing(rho):
    z, e = torch.randn(2, 400_000, generator=seeded(), dtype=torch.float64)
    x = rho * z + math.sqrt(1 - rho**2) * e
    for s in (-1.0, rho, coupled_scale(rho, 1.0), 1.0):
        drawn = (x - s * z).square()
        assert abs(drawn.mean().item() - squared_error(rho, s)) < 5 * drawn.std().item() / 400_000**0.5
    assert squared_error(rho, 1.0) / squared_error(rho, rho) == pytest.approx(2 / (1 + rho))
    assert squared_error(rho, -1.0) == pytest.approx(2 * (1 + rho))


def test_codes_have_the_moments_that_were_shown_in_whatever_portions():
    z = torch.randn(1_000, 4, generator=seeded()) @ torch.randn(4, 4, generator=seeded(1)) + 3
    one, many = Codes(4), Codes(4)
    one.show(z)
    for part in z.split(170):
        many.show(part)
    assert torch.allclose(one.mean, z.mean(0), atol=1e-4) and torch.allclose(one.mean, many.mean, atol=1e-4)
    assert torch.allclose(one.second, many.second, rtol=1e-4, atol=1e-4)
    draws = one.draw(torch.randn(200_000, 4, generator=seeded(2)))
    scale = z.T.cov().diagonal().max()
    assert (draws.T.cov() - z.T.cov(correction=0)).abs().max() < 0.02 * scale
    eps = torch.randn(5, 4, generator=seeded(3))
    assert torch.allclose(Codes(4).draw(eps), eps, atol=1e-6)  # nothing shown yet


def test_codes_of_one_point_are_that_point():
    codes = Codes(3)
    codes.show(torch.tensor([[1.0, -2.0, 0.5]]).repeat(9, 1))
    assert torch.allclose(codes.draw(torch.randn(4, 3, generator=seeded())), torch.tensor([1.0, -2.0, 0.5]), atol=1e-3)


# Which term reaches what


def reached(model):
    """Player and term → parts of the model with a path to it that is not all zero."""
    found, parts = {}, dict(model.named_children())
    for player in kicked(model).players(model.stages()[0]):
        for term, (_, value) in player.loss(a_batch(model)).items():
            for name, part in parts.items():
                params = list(part.parameters())
                grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True) if params else []
                if any(g is not None and g.any() for g in grads):
                    found.setdefault(f"{player.name}.{term}", set()).add(name)
                elif player.name == "residual" and name in ("encoder", "generator"):
                    assert all(g is None for g in grads)  # no path at all, which is more than a zero
    return found


@pytest.mark.parametrize("conditions", [(), KINDS], ids=["plain", "conditions"])
def test_the_game_reaches_the_coupled_autoencoder_and_not_the_decoupled_one(conditions):
    assert reached(build(CoupledAE, conditions)) == {
        "autoencoder.L1": {"encoder", "generator"}, "autoencoder.G": {"encoder", "generator", "discriminator"},
        "discriminator.D": {"discriminator"}}  # fmt: skip
    assert reached(build(DecoupledAE, conditions)) == {
        "autoencoder.L1": {"encoder", "generator"}, "discriminator.D": {"discriminator"},
        "residual.G": {"discriminator", "refiner"}}  # fmt: skip


@pytest.mark.parametrize("conditions", [(), KINDS], ids=["plain", "conditions"])
@pytest.mark.parametrize("cls", BOTH)
def test_law_4_each_player_moves_exactly_its_parameters(cls, conditions):
    model = kicked(build(cls, conditions))
    moved = set()
    for player in model.players(model.stages()[0]):
        allow(model, player)
        model.zero_grad(set_to_none=True)
        sum(w * v for w, v in player.loss(a_batch(model)).values()).backward()
        own = {id(p) for p in player.params}
        assert not own & moved
        moved |= own
        for name, p in model.named_parameters():
            assert (p.grad is not None and bool(p.grad.any())) == (id(p) in own), f"{player.name}: {name}"
    assert moved == {id(p) for p in model.parameters()}


def test_the_algorithm_is_the_papers():
    players = {cls: build(cls).players(None) for cls in BOTH}
    assert [(p.name, p.repeats, p.fresh) for p in players[DecoupledAE]] == [
        ("autoencoder", 1, True), ("discriminator", 1, False), ("residual", 2, False)]  # fmt: skip
    assert [(p.name, p.repeats, p.fresh) for p in players[CoupledAE]] == [
        ("autoencoder", 1, True), ("discriminator", 1, False)]  # fmt: skip
    assert len({id(p.optimizer) for p in players[DecoupledAE]}) == 3


@pytest.mark.parametrize("game", GAMES)
def test_terms_are_those_of_the_equations(game):
    model = kicked(build(DecoupledAE, game=game, weight=0.3)).eval()
    batch, none = a_batch(model), torch.zeros(16, 0)
    z = model.encoder(batch.x)
    base, rest = torch.sigmoid(model.generator(z)), torch.tanh(model.refiner(z))
    real, fake = model.discriminator(batch.x, none), model.discriminator(base + rest, none)
    found = {k: v for loss in (model.autoencoder_loss, model.discriminator_loss, model.residual_loss)
             for k, v in loss(batch).items()}  # fmt: skip
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


@pytest.mark.parametrize("conditions", [(), KINDS], ids=["plain", "conditions"])
def test_the_weight_does_not_touch_the_decoupled_path_by_a_bit(conditions):
    ends = {}
    for cls, weight in [(DecoupledAE, w) for w in (0.0, 1e-3, 1.0)] + [(CoupledAE, w) for w in (0.0, 1.0)]:
        model = build(cls, conditions, weight=weight)
        fit(model, Bars(conditions), images=SHORT, progress=False)
        ends[cls, weight] = path(model), model.codes.second.clone()
    start = ends[DecoupledAE, 0.0]
    same = {key: torch.equal(end[0], start[0]) and torch.equal(end[1], start[1]) for key, end in ends.items()}
    assert same == {key: key != (CoupledAE, 1.0) for key in ends}
    assert not torch.equal(start[0], path(build(DecoupledAE, conditions)))


def test_without_a_weight_the_residual_stays_zero_and_with_one_adam_hardly_sees_which():
    rests = {}
    for weight in (0.0, 0.25, 1.0):
        model = build(DecoupledAE, weight=weight)
        assert not model.residual(torch.randn(3, 6), torch.zeros(3, 0)).any()
        fit(model, Bars(), images=SHORT, progress=False)
        with torch.no_grad():
            rests[weight] = model.residual(torch.randn(50, 6, generator=seeded()), torch.zeros(50, 0))
    assert not rests[0.0].any() and rests[1.0].abs().mean() > 1e-3
    assert (rests[0.25] - rests[1.0]).abs().max() < 0.05 * rests[1.0].abs().max()


# Verbs


@pytest.mark.parametrize("cls", BOTH)
def test_verbs_agree_and_are_in_range(cls):
    model = kicked(build(cls)).eval()
    x = Bars().table("test")["x"][:9].float() / 255
    z = model.encode(x)
    assert z.shape == (9, 6) and torch.equal(model.reconstruct(x), model.decode(z)) and not z.requires_grad
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
        assert torch.equal(model.picture(z, none), model.base(z, none) + model.residual(z, none))
        assert torch.equal(model.decode(z), model.picture(z, none).clamp(0, 1))
        assert model.residual(z, none).min() < 0 < model.residual(z, none).max()


@pytest.mark.parametrize("cls", BOTH)
def test_conditions_reach_pictures_and_discriminator(cls):
    model = kicked(build(cls, KINDS)).eval()
    x = Bars().table("test")["x"][:6].float() / 255
    asked = {"bold": 1, "light": 4.0}
    one, other = (model.reconstruct(x, bar=k, **asked) for k in (0, 2))
    assert (one - other).abs().max() > 1e-4
    c = KINDS.pack(6, bar=[0, 1, 2] * 2, bold=1, light=3.0)
    with torch.no_grad():
        assert (model.discriminator(x, c) - model.discriminator(x, 0 * c)).abs().max() > 1e-5
    assert model.sample(4, bar=1).shape == (4, 1, 8, 8)  # the others are drawn
    with pytest.raises(ValueError, match="'light' is missing"):
        model.reconstruct(x, bar=0, bold=1)


def test_the_critic_is_linear_in_the_condition_and_no_more():
    critic = Critic((1, 8, 8), 3, 4)
    x, c = torch.rand(5, 1, 8, 8, generator=seeded()), torch.rand(5, 3, generator=seeded(1))
    at = lambda k: critic(x, k * c)
    assert torch.allclose(at(2.0) - at(1.0), at(1.0) - at(0.0), atol=1e-6) and not torch.allclose(at(1.0), at(0.0))
    assert Critic((1, 8, 8), 0, 4)(x, torch.zeros(5, 0)).shape == (5,)


@pytest.mark.parametrize("cls", BOTH)
def test_refusals_name_the_nearest(cls):
    with pytest.raises(ValueError, match="did you mean 'hinge'"):
        build(cls, game="hing")
    with pytest.raises(ValueError, match="codes \\['u'\\]"):
        build(cls, [Code("u", 2)])
    wrong = [("weight", -0.1), ("weight", float("nan")), ("weight", True), ("lr", "fast"), ("latent", 0), ("width", 0)]
    for options in ({name: value} for name, value in wrong):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(cls, **options)
    model = build(cls)
    for z in (torch.zeros(3, 5), torch.zeros(6), torch.full((2, 6), float("inf"))):
        with pytest.raises(ValueError, match=r"\(n, 6\)"):
            model.decode(z)
    with pytest.raises(ValueError, match="temperature"):
        model.sample(2, temperature=-1)
    with pytest.raises(ValueError, match="accepted: a tensor"):
        model.encode(torch.zeros(2, 3, 8, 8))


# Training


@pytest.mark.parametrize("cls", BOTH)
def test_a_short_training_improves_the_reconstruction_and_counts_codes(cls):
    model, x = build(cls, width=8), Bars().table("test")["x"].float() / 255
    before = (model.reconstruct(x) - x).abs().mean()
    fit(model, Bars(), images={"adversarial": 2_000, "codes": 256}, progress=False)
    with torch.no_grad():
        base = model.base(model.encode(x), torch.zeros(len(x), 0))
    assert (base - x).abs().mean() < 0.5 * before
    assert model.codes.count == 256
    train = Bars().table("train")["x"].float() / 255
    z, drawn = model.encode(train), model.codes.draw(torch.randn(20_000, 6, generator=seeded()))
    assert (drawn.mean(0) - z.mean(0)).abs().max() < 0.2 * z.std(0).max()
    assert (drawn.std(0) / z.std(0) - 1).abs().max() < 0.2


@pytest.mark.parametrize("cls", BOTH)
def test_laws_5_and_6_resumed_and_reloaded_is_the_same(cls, tmp_path):
    whole, run = build(cls), None
    fit(whole, Bars(), images=SHORT, progress=False)
    while run is None or not run.finished:
        run = fit(build(cls), Bars(), tmp_path / "run", images=SHORT, progress=False, budget=0.0)
    ours, theirs = whole.state_dict(), run.model.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    save(whole, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert type(again) is cls and torch.equal(again.sample(3, generator=seeded()), whole.sample(3, generator=seeded()))
