"""Laws of the conditional GAN: the value of its game, both terms, who moves what,
conditions, refusals, reload.
"""

import dataclasses
import math
from functools import cache

import pytest
import torch
from bars import BAR, BOLD, KNOWN, LIGHT, Bars, batch_of, places, seeded

from condgen.conditions import Code
from condgen.divergences import js
from condgen.games import GAMES
from condgen.models.cgan import (CGAN, CONDITION_SCALE, PairDiscriminator,
                                 conditional_game_value)
from condgen.runs import load, save
from condgen.trainer import set_trainable
from condgen.training import fit

def build(conditions=(BAR,), **options):
    torch.manual_seed(0)
    return CGAN((1, 8, 8), conditions, **{"noise": 6, "width": 4, **options})


@cache
def learned():
    model = build(Bars((BAR, BOLD)).conditions, width=8)
    return (model,
            fit(model, Bars((BAR, BOLD)), images=16_000, seed=1, progress=False).log)


# The value of the game


def pairs(seed, nx=5, nc=3, p_c=None):
    """A joint table (nx, nc) with that margin of c, in float64."""
    g = seeded(seed)
    p_c = ((2 * torch.randn(nc, generator=seeded(9), dtype=torch.float64)).softmax(0)
           if p_c is None else p_c)
    return (2 * torch.randn(nx, nc, generator=g, dtype=torch.float64)).softmax(0) * p_c


@pytest.mark.parametrize("form", ["corrected", "literal"])
def test_value_equals_that_of_the_optimal_discriminator(form):
    p, q = pairs(0), pairs(1)
    real = p if form == "corrected" else p.sum(1, keepdim=True) * p.sum(0)
    best = real / (real + q)
    value = (real * best.log() + q * (1 - best).log()).sum()
    one_by_one = ((p.sum(0) * 2 * js((real / p.sum(0)).T, (q / q.sum(0)).T)).sum()
                  - 2 * math.log(2))
    assert (abs(conditional_game_value(p, q, form) - value) < 1e-9
            and abs(value - one_by_one) < 1e-9)
    for shift in (-0.3, 0.2):  # no other discriminator does better
        other = torch.sigmoid(best.logit() + shift)
        assert (real * other.log() + q * (1 - other).log()).sum() < value


def test_minima_of_corrected_and_literal_values():
    """Law 11: the printed expectations, x and c drawn apart, have another optimum."""
    p = pairs(0)
    ignoring = p.sum(1, keepdim=True) * p.sum(0)
    over = lambda *given: conditional_game_value(*given) + 2 * math.log(2)  # noqa: E731
    assert abs(over(p, p)) < 1e-12 and over(p, ignoring) > 0.03
    assert abs(over(p, ignoring, "literal")) < 1e-12 and over(p, p, "literal") > 0.03


def test_value_detects_swapped_labels_and_is_batched():
    p = pairs(0, p_c=torch.full((3,), 1 / 3, dtype=torch.float64))
    swapped = p.roll(1, 1)
    assert (abs(js(p.sum(1), swapped.sum(1))) < 1e-12
            and conditional_game_value(p, swapped) > -2 * math.log(2) + 0.05)
    both = conditional_game_value(p, torch.stack([p, swapped]))
    assert (both.shape == (2,)
            and torch.equal(both[1], conditional_game_value(p, swapped)))


@pytest.mark.parametrize(("arguments", "message"), [
    ((pairs(0), 2 * pairs(1)), "fake"), ((2 * pairs(0), pairs(1)), "real"),
    ((pairs(0), pairs(1, nx=4)), "shape"), ((pairs(0), pairs(1).mT), "shape"),
    ((pairs(0), pairs(1), "litteral"),
     "form='litteral'; accepted: corrected, literal; did you mean 'literal'")])
def test_value_refuses_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        conditional_game_value(*arguments)


# The two players


def test_terms_are_those_of_the_equations():
    model = build().eval()
    batch, soft = batch_of(model.conditions), torch.nn.functional.softplus
    z, x = batch.randn("z", model.latent_size), batch.x
    fake = torch.sigmoid(model.generator(torch.cat([z, CONDITION_SCALE * batch.c], 1)))
    parts = model.discriminator
    logit = lambda x: parts.joint(  # noqa: E731
        torch.cat([parts.trunk(x), CONDITION_SCALE * batch.c], 1))[:, 0]
    first, second = model.discriminator_loss(batch), model.generator_loss(batch)
    assert (set(first) == {"D"} and set(second) == {"G"}
            and first["D"][0] == second["G"][0] == 1)
    assert torch.isclose(
        first["D"][1], soft(-logit(x)).mean() + soft(logit(fake)).mean(), atol=1e-6)
    assert torch.isclose(second["G"][1], soft(-logit(fake)).mean(), atol=1e-6)


def test_real_images_are_shown_beside_their_own_conditions():
    """Not drawn apart: with conditions handed on by one, real images look less real
    to a trained discriminator.
    """
    model, _ = learned()
    x, c = (Bars((BAR, BOLD)).split_images("train"),
            Bars((BAR, BOLD)).table("train")["c"])
    with torch.no_grad():
        assert (model.discriminator(x, c).mean()
                > model.discriminator(x, c.roll(1, 0)).mean() + 0.5)


@pytest.mark.parametrize("game", GAMES)
def test_each_game_uses_its_losses(game):
    model = build(game=game).eval()
    batch = batch_of(model.conditions)
    with torch.no_grad():
        real, fake = (model.discriminator(batch.x, batch.c),
                      model.discriminator(*model.generate_batch(batch)))
        assert torch.isclose(model.discriminator_loss(batch)["D"][1],
                             GAMES[game].critic(real, fake), atol=1e-6)
        assert torch.isclose(model.generator_loss(batch)["G"][1],
                             GAMES[game].generator(fake), atol=1e-6)


def test_logit_is_not_additive_in_image_and_condition():
    torch.manual_seed(0)
    discriminator = PairDiscriminator((1, 8, 8), 3, 8)
    x, c = torch.rand(2, 1, 8, 8), torch.eye(3)[:2]
    with torch.no_grad():
        square = discriminator(x.repeat_interleave(2, 0), c.repeat(2, 1)).view(2, 2)
    assert abs(square[0, 0] - square[0, 1] - square[1, 0] + square[1, 1]) > 1e-5


@pytest.mark.parametrize("conditions", [(BAR,), tuple(KNOWN)], ids=["classes", "many"])
def test_law_4_each_player_updates_only_its_parameters(conditions):
    model = build(conditions)
    players = model.players(model.stages()[0])
    assert ([player.name for player in players] == ["discriminator", "generator"]
            and not players[1].fresh)
    modules = list(model.generator)
    # taken out again
    silent = {id(a.bias)
              for a, b in zip(modules, modules[1:]) if "BatchNorm" in type(b).__name__}
    for player in players:
        set_trainable(model, player)
        model.zero_grad(set_to_none=True)
        sum(w * v
            for w, v in player.loss(batch_of(model.conditions)).values()).backward()
        found = {id(p)
                 for p in model.parameters() if p.grad is not None and p.grad.any()}
        own = {id(p) for p in getattr(model, player.name).parameters()}
        assert {id(p) for p in player.params} == own and found <= own <= found | silent


def test_learning_rate_schedule_and_weight_averages():
    stage, = build().stages()
    for progress, factor in ((0, 1), (0.5, 1), (0.75, 0.5), (1, 0.02)):
        assert stage.schedule(progress) == pytest.approx(factor)
    averaged, last = build(), build()
    last.stages = lambda: [dataclasses.replace(stage, players=last.players, ema=0.0)]
    for model in (averaged, last):
        fit(model, Bars((BAR,)), images=64, progress=False)
    assert not torch.equal(averaged.generator[0].weight, last.generator[0].weight)


# Conditions


@pytest.mark.parametrize("conditions", [(BAR,), (BOLD,), (LIGHT,), tuple(KNOWN)])
def test_every_kind_of_condition_trains_and_samples(conditions):
    model = build(conditions)
    log = fit(model, Bars(conditions), images=320, progress=False).log
    assert {k for k in log[-1] if "." in k and "norm" not in k} == {"discriminator.D",
                                                                    "generator.G"}
    assert all(math.isfinite(v) for k, v in log[-1].items() if "." in k)
    x = model.sample(4, generator=seeded())
    assert (x.shape == (4, 1, 8, 8) and 0 <= x.min() and x.max() <= 1
            and not x.requires_grad)


def test_law_7_samples_depend_on_conditions_and_noise():
    model, _ = learned()
    ink = {}
    for bold in (0, 1):
        wanted = torch.arange(99) % 3
        x = model.sample(99, generator=seeded(2), bar=wanted, bold=bold)
        ink[bold] = x.mean()
        assert (places(x) == wanted).float().mean() > 0.9
    assert ink[1] > ink[0] + 0.02
    assert model.sample(100, generator=seeded(2), bar=0, bold=1).std(0).mean() > 3e-3


def test_without_condition_input_the_condition_is_not_learned():
    """The same training with zeros in place of the conditions of the discriminator: the
    bar is where chance puts it.
    """
    model = build(width=8)
    see = model.discriminator.forward
    model.discriminator.forward = lambda x, c: see(x, 0 * c)
    fit(model, Bars((BAR,)), images=3_200, progress=False)
    wanted = torch.arange(300) % 3
    assert (places(model.sample(300, generator=seeded(2), bar=wanted))
            == wanted).float().mean() < 0.67


def test_forms_of_a_condition():
    model, _ = learned()
    draw = lambda **values: model.sample(4, generator=seeded(5), bold=1,  # noqa: E731
                                         **values)
    scalar = draw(bar=2)
    assert (torch.equal(scalar, draw(bar=[2] * 4))
            and torch.equal(scalar, draw(bar=[0.0, 0.0, 1.0])))
    assert not torch.equal(scalar, draw(bar=1))
    rows = model.condition(3000, seeded())[:, :3]
    assert (rows.mean(0) - 1 / 3).abs().max() < 0.05  # from training rows


def test_temperature_and_generator():
    model, _ = learned()
    assert torch.equal(model.sample(5, generator=seeded(6)),
                       model.sample(5, generator=seeded(6)))
    cold = model.sample(5, temperature=0.0, bar=1, bold=0)
    assert torch.allclose(cold, cold[:1].expand_as(cold), atol=1e-6)
    for t in (0.3, 1.7):  # the noise is standard normal, times the temperature
        g = seeded(7)
        c = model.condition(4, g, bar=1)
        z = torch.randn(4, model.latent_size, generator=g)
        with torch.no_grad():
            assert torch.equal(model.sample(4, t, seeded(7), bar=1),
                               model.generate(c, t * z))


@pytest.mark.parametrize(
    "verb", ["encode", "decode", "reconstruct", "log_prob", "edit", "interpolate"])
def test_unsupported_methods_are_absent(verb):
    assert not hasattr(build(), verb)


# Refusals, saving, resuming


@pytest.mark.parametrize(("options", "message"), [
    ({"game": "hing"}, "game='hing'; accepted: .*hinge.*; did you mean 'hinge'"),
    ({"game": 1}, "game=1; accepted"),
    ({"conditions": []}, "accepted: one or more conditions and no codes"),
    ({"conditions": [BAR, Code("u", 2)]},
     r"codes \['u'\]; accepted: one or more conditions and no codes"),
    ({"shape": None}, r"shape None; accepted: \(channels, height, width\)"),
    ({"conditions": None}, "conditions=None; accepted: a list of conditions"),
    ({"shape": (1, 28, 28)}, "28×28 pixels; accepted: squares with sides 8, 16"),
    ({"noise": 0}, "noise=0; accepted: an integer, 1 or more"),
    ({"width": 0}, "width=0; accepted"), ({"width": 2.5}, "width=2.5; accepted"),
    ({"lr": -1.0}, "lr=-1.0; accepted: a finite number, 0 or more"),
    ({"lr": math.nan}, "lr=nan; accepted"), ({"lr": "x"}, "lr='x'; accepted"),
    ({"lr": True}, "lr=True; accepted")])
def test_constructor_refuses_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CGAN(**{"shape": (1, 8, 8), "conditions": [BAR], "noise": 6, "width": 4,
                **options})


@pytest.mark.parametrize(
    "options", [{"n": 0}, {"temperature": -1}, {"temperature": None}, {"generator": 3}])
def test_sample_refuses_invalid_arguments(options):
    with pytest.raises(ValueError, match="; accepted"):
        build().sample(**{"n": 2, **options})
    with pytest.raises(ValueError, match="unknown condition 'bars'; accepted: bar; "
                           "did you mean 'bar'"):
        build().sample(2, bars=1)


def test_law_5_resumed_run_equals_uninterrupted_run(tmp_path):
    whole, parts, stops = build(KNOWN), build(KNOWN), 0
    fit(whole, Bars(KNOWN), tmp_path / "a", images=320, progress=False)
    while not fit(parts, Bars(KNOWN), tmp_path / "b", images=320, budget=0,
                  progress=False).finished:
        parts, stops = build(KNOWN), stops + 1
    a, b = whole.state_dict(), parts.state_dict()
    assert stops >= 3 and all(torch.equal(a[name], b[name]) for name in a)


def test_law_6_loaded_model_gives_the_same_samples(tmp_path):
    model = build(game="least_squares")
    fit(model, Bars((BAR,)), images=320, progress=False)
    save(model, tmp_path)
    again = load(tmp_path)
    assert type(again) is CGAN
    assert torch.equal(model.sample(8, generator=seeded()),
                       again.sample(8, generator=seeded()))
