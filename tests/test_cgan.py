"""Laws of the conditional GAN: the value of its game, both terms, who moves what, conditions, refusals, reload."""

import dataclasses
import math
from functools import cache

import pytest
import torch

from condgen.contracts import Batch, Binary, Classes, Code, Noise, Real, Schema
from condgen.data import Dataset
from condgen.divergences import js
from condgen.games import GAMES
from condgen.models.cgan import CGAN, LOUD, PairJudge, conditional_value
from condgen.runs import load, save
from condgen.training import allow, fit

BAR = Classes("bar", 3)
MANY = Schema([BAR, Binary("bold"), Real("light", 0, 10)])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@cache
def bars(conditions=MANY):
    """A bright bar at one of three places, bold or not, on a ground of varying light."""
    n, g = 480, seeded()
    values = {"bar": torch.arange(n) % 3, "bold": torch.rand(n, generator=g) < 0.5}
    values["light"] = 10 * torch.rand(n, generator=g)
    x = 20 * torch.rand(n, 1, 8, 8, generator=g) + 4 * values["light"].view(-1, 1, 1, 1)
    for i in range(n):
        left = int(values["bar"][i]) * 3
        x[i, 0, :, left : left + (2 if values["bold"][i] else 1)] += 150
    c = Schema(conditions).pack(n, **{item.name: values[item.name] for item in conditions})
    parts = dict(zip(("train", "val", "test"), torch.arange(n).split([300, 60, 120])))
    return Dataset("bars", x.round().to(torch.uint8), c, Schema(conditions), parts)


def build(conditions=(BAR,), **options):
    torch.manual_seed(0)
    return CGAN((1, 8, 8), conditions, **{"noise": 6, "width": 4, **options})


def a_batch(model, n=32):
    table = bars(model.conditions).table("train")
    return Batch({name: t[:n] for name, t in table.items()}, Noise(("test",), slice(None), n))


def places(x):
    """Where each image's bar is, by its brightest first column."""
    return torch.stack([x[..., left : left + 1].mean((1, 2, 3)) for left in (0, 3, 6)], 1).argmax(1)


@cache
def learned():
    model = build(bars((BAR, Binary("bold"))).conditions, width=8)
    return model, fit(model, bars((BAR, Binary("bold"))), images=16_000, progress=False).log


# The value of the game


def pairs(seed, nx=5, nc=3, p_c=None):
    """A joint table (nx, nc) with that margin of c, in float64."""
    g = seeded(seed)
    p_c = (2 * torch.randn(nc, generator=seeded(9), dtype=torch.float64)).softmax(0) if p_c is None else p_c
    return (2 * torch.randn(nx, nc, generator=g, dtype=torch.float64)).softmax(0) * p_c


@pytest.mark.parametrize("form", ["corrected", "literal"])
def test_value_is_what_the_best_discriminator_reaches(form):
    p, q = pairs(0), pairs(1)
    real = p if form == "corrected" else p.sum(1, keepdim=True) * p.sum(0)
    best = real / (real + q)
    value = (real * best.log() + q * (1 - best).log()).sum()
    one_by_one = (p.sum(0) * 2 * js((real / p.sum(0)).T, (q / q.sum(0)).T)).sum() - 2 * math.log(2)
    assert abs(conditional_value(p, q, form) - value) < 1e-9 and abs(value - one_by_one) < 1e-9
    for shift in (-0.3, 0.2):  # no other discriminator does better
        other = torch.sigmoid(best.logit() + shift)
        assert (real * other.log() + q * (1 - other).log()).sum() < value


def test_corrected_is_least_at_nature_and_literal_at_a_generator_that_does_not_listen():
    """Law 11: the printed expectations, x and c drawn apart, have another optimum."""
    p = pairs(0)
    deaf = p.sum(1, keepdim=True) * p.sum(0)
    over = lambda *given: conditional_value(*given) + 2 * math.log(2)  # noqa: E731
    assert abs(over(p, p)) < 1e-12 and over(p, deaf) > 0.03
    assert abs(over(p, deaf, "literal")) < 1e-12 and over(p, p, "literal") > 0.03


def test_swapped_labels_are_seen_and_a_batch_of_tables_is_taken():
    p = pairs(0, p_c=torch.full((3,), 1 / 3, dtype=torch.float64))
    swapped = p.roll(1, 1)
    assert abs(js(p.sum(1), swapped.sum(1))) < 1e-12 and conditional_value(p, swapped) > -2 * math.log(2) + 0.05
    both = conditional_value(p, torch.stack([p, swapped]))
    assert both.shape == (2,) and torch.equal(both[1], conditional_value(p, swapped))


@pytest.mark.parametrize(("arguments", "message"), [
    ((pairs(0), 2 * pairs(1)), "fake"), ((2 * pairs(0), pairs(1)), "real"), ((pairs(0), pairs(1, nx=4)), "shape"),
    ((pairs(0), pairs(1).mT), "shape"),
    ((pairs(0), pairs(1), "litteral"), "form='litteral'; accepted: corrected, literal; did you mean 'literal'"),
])  # fmt: skip
def test_what_the_value_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        conditional_value(*arguments)


# The two players


def test_terms_are_those_of_the_equations():
    model = build().eval()
    batch, soft = a_batch(model), torch.nn.functional.softplus
    z, x = batch.randn("z", model.noise), batch.x
    fake = torch.sigmoid(model.generator(torch.cat([z, LOUD * batch.c], 1)))
    verdict = lambda x: model.discriminator.joint(torch.cat([model.discriminator.trunk(x), LOUD * batch.c], 1))[:, 0]  # noqa: E731
    first, second = model.discriminator_loss(batch), model.generator_loss(batch)
    assert set(first) == {"D"} and set(second) == {"G"} and first["D"][0] == second["G"][0] == 1
    assert torch.isclose(first["D"][1], soft(-verdict(x)).mean() + soft(verdict(fake)).mean(), atol=1e-6)
    assert torch.isclose(second["G"][1], soft(-verdict(fake)).mean(), atol=1e-6)


def test_real_images_are_shown_beside_their_own_conditions():
    """Not drawn apart: with conditions handed on by one, real images look less real to a trained discriminator."""
    model, _ = learned()
    x, c = bars((BAR, Binary("bold"))).images_of("train"), bars((BAR, Binary("bold"))).table("train")["c"]
    with torch.no_grad():
        assert model.discriminator(x, c).mean() > model.discriminator(x, c.roll(1, 0)).mean() + 0.5


@pytest.mark.parametrize("game", GAMES)
def test_each_game_takes_its_place(game):
    model = build(game=game).eval()
    batch = a_batch(model)
    with torch.no_grad():
        real, fake = model.discriminator(batch.x, batch.c), model.discriminator(*model.imagine(batch))
        assert torch.isclose(model.discriminator_loss(batch)["D"][1], GAMES[game].critic(real, fake), atol=1e-6)
        assert torch.isclose(model.generator_loss(batch)["G"][1], GAMES[game].generator(fake), atol=1e-6)


def test_the_verdict_is_no_sum_of_image_and_condition():
    torch.manual_seed(0)
    judge = PairJudge((1, 8, 8), 3, 8)
    x, c = torch.rand(2, 1, 8, 8), torch.eye(3)[:2]
    with torch.no_grad():
        square = judge(x.repeat_interleave(2, 0), c.repeat(2, 1)).view(2, 2)
    assert abs(square[0, 0] - square[0, 1] - square[1, 0] + square[1, 1]) > 1e-5


@pytest.mark.parametrize("conditions", [(BAR,), tuple(MANY)], ids=["classes", "many"])
def test_law_4_each_player_moves_exactly_its_parameters(conditions):
    model = build(conditions)
    players = model.players(model.stages()[0])
    assert [player.name for player in players] == ["discriminator", "generator"] and not players[1].fresh
    modules = list(model.generator)
    silent = {id(a.bias) for a, b in zip(modules, modules[1:]) if "BatchNorm" in type(b).__name__}  # taken out again
    for player in players:
        allow(model, player)
        model.zero_grad(set_to_none=True)
        sum(w * v for w, v in player.loss(a_batch(model)).values()).backward()
        found = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
        own = {id(p) for p in getattr(model, player.name).parameters()}
        assert {id(p) for p in player.params} == own and found <= own <= found | silent


def test_the_learning_rate_falls_in_the_second_half_and_averages_are_kept():
    stage, = build().stages()
    for progress, factor in ((0, 1), (0.5, 1), (0.75, 0.5), (1, 0.02)):
        assert stage.schedule(progress) == pytest.approx(factor)
    averaged, last = build(), build()
    last.stages = lambda: [dataclasses.replace(stage, players=last.players, ema=0.0)]
    for model in (averaged, last):
        fit(model, bars((BAR,)), images=64, progress=False)
    assert not torch.equal(averaged.generator[0].weight, last.generator[0].weight)


# Conditions


@pytest.mark.parametrize("conditions", [(BAR,), (Binary("bold"),), (Real("light", 0, 10),), tuple(MANY)])
def test_every_kind_of_condition_trains_and_samples(conditions):
    model = build(conditions)
    log = fit(model, bars(conditions), images=320, progress=False).log
    assert {k for k in log[-1] if "." in k and "norm" not in k} == {"discriminator.D", "generator.G"}
    assert all(math.isfinite(v) for k, v in log[-1].items() if "." in k)
    x = model.sample(4, generator=seeded())
    assert x.shape == (4, 1, 8, 8) and 0 <= x.min() and x.max() <= 1 and not x.requires_grad


def test_law_7_conditions_act_and_noise_does_too():
    model, _ = learned()
    ink = {}
    for bold in (0, 1):
        wanted = torch.arange(99) % 3
        x = model.sample(99, generator=seeded(2), bar=wanted, bold=bold)
        ink[bold] = x.mean()
        assert (places(x) == wanted).float().mean() > 0.9
    assert ink[1] > ink[0] + 0.02
    assert model.sample(100, generator=seeded(2), bar=0, bold=1).std(0).mean() > 3e-3


def test_a_deaf_discriminator_teaches_nothing_about_conditions():
    """The same training with zeros in place of what the discriminator is told: the bar is where chance puts it."""
    model = build(width=8)
    see = model.discriminator.forward
    model.discriminator.forward = lambda x, c: see(x, 0 * c)
    fit(model, bars((BAR,)), images=3_200, progress=False)
    wanted = torch.arange(300) % 3
    assert (places(model.sample(300, generator=seeded(2), bar=wanted)) == wanted).float().mean() < 0.67


def test_forms_of_a_condition():
    model, _ = learned()
    draw = lambda **values: model.sample(4, generator=seeded(5), bold=1, **values)  # noqa: E731
    scalar = draw(bar=2)
    assert torch.equal(scalar, draw(bar=[2] * 4)) and torch.equal(scalar, draw(bar=[0.0, 0.0, 1.0]))
    assert not torch.equal(scalar, draw(bar=1))
    rows = model.condition(3000, seeded())[:, :3]
    assert (rows.mean(0) - 1 / 3).abs().max() < 0.05  # from training rows


def test_temperature_and_generator():
    model, _ = learned()
    assert torch.equal(model.sample(5, generator=seeded(6)), model.sample(5, generator=seeded(6)))
    cold = model.sample(5, temperature=0.0, bar=1, bold=0)
    assert torch.allclose(cold, cold[:1].expand_as(cold), atol=1e-6)
    for t in (0.3, 1.7):  # the noise is standard normal, times the temperature
        g = seeded(7)
        c = model.condition(4, g, bar=1)
        z = torch.randn(4, model.noise, generator=g)
        with torch.no_grad():
            assert torch.equal(model.sample(4, t, seeded(7), bar=1), model.generate(c, t * z))


@pytest.mark.parametrize("verb", ["encode", "decode", "reconstruct", "log_prob", "edit", "interpolate"])
def test_missing_verbs_are_absent(verb):
    assert not hasattr(build(), verb)


# Refusals, saving, resuming


@pytest.mark.parametrize(("options", "message"), [
    ({"game": "hing"}, "game='hing'; accepted: .*hinge.*; did you mean 'hinge'"), ({"game": 1}, "game=1; accepted"),
    ({"conditions": []}, "accepted: one or more conditions and no codes"),
    ({"conditions": [BAR, Code("u", 2)]}, r"codes \['u'\]; accepted: one or more conditions and no codes"),
    ({"shape": (1, 28, 28)}, "28×28 pixels; accepted: squares with sides 8, 16"),
    ({"noise": 0}, "noise=0; accepted: an integer, 1 or more"), ({"width": 0}, "width=0; accepted"),
    ({"width": 2.5}, "width=2.5; accepted"), ({"lr": -1.0}, "lr=-1.0; accepted: a finite number, 0 or more"),
    ({"lr": math.nan}, "lr=nan; accepted"), ({"lr": "x"}, "lr='x'; accepted"), ({"lr": True}, "lr=True; accepted"),
])  # fmt: skip
def test_what_is_not_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        CGAN(**{"shape": (1, 8, 8), "conditions": [BAR], "noise": 6, "width": 4, **options})


@pytest.mark.parametrize("options", [{"n": 0}, {"temperature": -1}, {"temperature": None}, {"generator": 3}])
def test_what_cannot_be_sampled(options):
    with pytest.raises(ValueError, match="; accepted"):
        build().sample(**{"n": 2, **options})
    with pytest.raises(ValueError, match="unknown condition 'bars'; accepted: bar; did you mean 'bar'"):
        build().sample(2, bars=1)


def test_law_5_interrupted_is_uninterrupted(tmp_path):
    whole, parts, stops = build(MANY), build(MANY), 0
    fit(whole, bars(), tmp_path / "a", images=320, progress=False)
    while not fit(parts, bars(), tmp_path / "b", images=320, budget=0, progress=False).finished:
        parts, stops = build(MANY), stops + 1
    a, b = whole.state_dict(), parts.state_dict()
    assert stops >= 3 and all(torch.equal(a[name], b[name]) for name in a)


def test_law_6_loaded_draws_the_same(tmp_path):
    model = build(game="least_squares")
    fit(model, bars((BAR,)), images=320, progress=False)
    save(model, tmp_path)
    again = load(tmp_path)
    assert type(again) is CGAN
    assert torch.equal(model.sample(8, generator=seeded()), again.sample(8, generator=seeded()))
