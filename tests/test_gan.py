"""Laws of GAN and ACGAN: the objective on finite sums, who moves what, every kind of
condition, refusals, reload.
"""

import dataclasses
import math
from functools import cache

import pytest
import torch
from bars import BAR, MANY, Bars, batch_of, places, seeded

from condgen.conditions import Binary, Code, Real
from condgen.contracts import Batch, Noise
from condgen.divergences import js, js_from_kls
from condgen.games import GAMES, optimal_classifier
from condgen.models.gan import ACGAN, GAN, CONDITION_SCALE
from condgen.runs import load, save
from condgen.trainer import set_trainable
from condgen.training import fit

SMALL = {"noise": 6, "width": 4}


def build(conditions=(BAR,), cls=ACGAN, **options):
    torch.manual_seed(0)
    return (cls((1, 8, 8), conditions, **{**SMALL, **options}) if cls is ACGAN
            else cls((1, 8, 8), **SMALL, **options))


@cache
def learned(kind="uniform"):
    """An ACGAN that has learned bars and a code, and its log."""
    model = build((BAR, Code("u", 1, kind)), width=8, weights={"De": 2.0})
    return model, fit(model, Bars(), images=8_000, progress=False).log


# The objective


def by_hand(model, batch):
    """The terms of both players from the definitions, for one `Classes` condition
    and the non-saturating game.
    """
    n, width, soft = batch.n, model.conditions.width, torch.nn.functional.softplus
    z, x = batch.randn("z", model.latent_size), batch.x
    fake = torch.sigmoid(model.generator(torch.cat([z, CONDITION_SCALE * batch.c], 1)))
    h, g = model.trunk(x), model.trunk(fake)
    real, made = model.real(h)[:, 0], model.real(g)[:, 0]
    guess = [torch.log_softmax(model.reader(f), 1)[torch.arange(n), batch.c.argmax(1)]
             for f in (h, g)]
    assert width == 3
    return {"D": soft(-real).mean() + soft(made).mean(), "C_bar": -guess[0].mean(),
            "C_bar_fake": -guess[1].mean(),
            "G": soft(-made).mean(), "generator's C_bar": -guess[1].mean()}


def test_terms_are_those_of_the_equations():
    model = build(weights={"C": 0.3, "G": 2.0}).eval()
    batch = batch_of(model.conditions)
    hand, first, second = (by_hand(model, batch), model.discriminator_loss(batch),
                           model.generator_loss(batch))
    assert set(first) == {"D", "C_bar", "C_bar_fake"} and set(second) == {"G", "C_bar"}
    for name, (weight, value) in first.items():
        assert weight == 1 and torch.isclose(value, hand[name], atol=1e-6)
    assert second["G"][0] == 2.0 and torch.isclose(second["G"][1], hand["G"], atol=1e-6)
    assert (second["C_bar"][0] == 0.3
            and torch.isclose(second["C_bar"][1], hand["generator's C_bar"], atol=1e-6))


def test_every_condition_keeps_its_two_losses():
    model = build([Binary("a"), Binary("a_fake")]).eval()
    c = model.conditions.pack(8, a=0, a_fake=1)
    batch = Batch({"x": torch.rand(8, 1, 8, 8, generator=seeded()), "c": c},
                  Noise(("test",), slice(None), 8))
    assert {*model.discriminator_loss(batch)} == {
        "D", "C_a", "C_a_fake", "C_a__fake", "C_a_fake__fake"}


def test_default_weights_of_all_loss_terms_are_one():
    model = build((BAR, Code("u", 2)))
    batch = batch_of(model.conditions)
    first, second = model.discriminator_loss(batch), model.generator_loss(batch)
    for terms, names in ((first, {"D", "C_bar", "C_bar_fake", "De_u"}),
                         (second, {"G", "C_bar", "De_u"})):
        assert {(name, weight) for name, (weight, _) in terms.items()} == {
            (name, 1) for name in names}


def test_generated_batch_has_uniform_codes_and_batch_conditions():
    """Of 600 codes: mean and share below 0 within 5.5 standard
    errors, both ends reached.
    """
    model = build((BAR, Code("u", 2)))
    batch = batch_of(model.conditions, 300)
    c = model.generate_batch(batch)[1]
    u = c[:, 3:]
    assert (torch.equal(c[:, :3], batch.c)
            and -1 <= u.min() < -0.97 < 0.97 < u.max() <= 1)
    assert (abs(u.mean()) < 5.5 / math.sqrt(3 * 600)
            and abs((u < 0).float().mean() - 0.5) < 5.5 / math.sqrt(4 * 600))


def test_learning_rate_schedule_and_weight_averages():
    stage, = build().stages()
    for progress, factor in ((0, 1), (0.25, 1), (0.5, 1), (0.75, 0.5), (0.9, 0.2),
                             (1, 0.02)):
        assert stage.schedule(progress) == pytest.approx(factor)
    assert 0.9 <= stage.ema < 1
    new = lambda: build(noise=2, width=2)
    averaged, last = new(), new()
    last.stages = lambda: [dataclasses.replace(stage, players=last.players, ema=0.0)]
    for model in (averaged, last):
        fit(model, Bars(), images=64, progress=False)
    # the same steps, but other weights at the end
    assert not torch.equal(averaged.real.weight, last.real.weight)


def test_widths_and_normalisations():
    model = build(width=5)
    kinds = [type(m).__name__ for m in model.generator]
    assert model.trunk[0].out_channels == 10 and model.generator[-1].in_channels == 5
    assert kinds.count("BatchNorm1d") == 1 and kinds.count("BatchNorm2d") == 1
    assert not any("Norm" in type(m).__name__ for m in model.trunk)


@pytest.mark.parametrize("game", GAMES)
def test_each_game_uses_its_losses(game):
    model = build(game=game).eval()
    batch = batch_of(model.conditions)
    with torch.no_grad():
        (real, _), (fake, _) = (model.discriminate(batch.x),
                                model.discriminate(model.generate_batch(batch)[0]))
        assert torch.isclose(model.discriminator_loss(batch)["D"][1],
                             GAMES[game].critic(real, fake), atol=1e-6)
        assert torch.isclose(model.generator_loss(batch)["G"][1],
                             GAMES[game].generator(fake), atol=1e-6)


def test_sorted_pairs_cost_less_than_true_ones():
    """Same images, same shares of the classes, each image under its likelier class:
    ACGAN prefers it, for any λ.
    """
    p = torch.tensor([[5.0, 0.0], [3.0, 2.0], [2.0, 3.0], [0.0, 5.0]]).double() / 20
    tidy = torch.tensor([[5.0, 0.0], [5.0, 0.0], [0.0, 5.0], [0.0, 5.0]]).double() / 20
    assert torch.equal(p.sum(1), tidy.sum(1)) and torch.equal(p.sum(0), tidy.sum(0))
    assert js(p.sum(1), tidy.sum(1)) == 0
    price = [-(q * optimal_classifier(p, q).clamp(min=1e-300).log()).sum().item()
             for q in (p, tidy)]
    assert price[1] < 0.7 * price[0]


def test_literal_js_is_twice_the_corrected_one():
    """Law 11: the discriminator's best loss is 2 log 2 − 2 JS with the
    corrected value only.
    """
    p, q = (torch.tensor(values, dtype=torch.float64)
            for values in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    logit = (p / q).log()
    soft = torch.nn.functional.softplus
    loss = ((p * soft(-logit)).sum() + (q * soft(logit)).sum()).item()
    reached = {form: 2 * math.log(2) - 2 * js_from_kls(p, q, form).item()
               for form in ("literal", "corrected")}
    assert (math.isclose(reached["corrected"], loss, abs_tol=1e-12)
            and loss - reached["literal"] > 0.05)


# Players


@pytest.mark.parametrize("conditions", [[BAR], [Code("u", 2)], list(MANY)],
                         ids=["classes", "codes", "many"])
def test_law_4_each_loss_term_updates_only_its_parameters(conditions):
    model = build(conditions)
    batch, stage = batch_of(model.conditions), model.stages()[0]
    players = model.players(stage)
    assert ([player.name for player in players] == ["discriminator", "generator"]
            and not players[1].fresh)
    own = {id(p) for player in players for p in player.params}
    assert (own == {id(p) for p in model.parameters()}
            and sum(len(p.params) for p in players) == len(own))
    heads = {True: model.real, False: model.reader}
    for player in players:
        set_trainable(model, player)
        for term, (_, value) in player.loss(batch).items():
            model.zero_grad(set_to_none=True)
            value.backward(retain_graph=True)
            found = {id(p)
                     for p in model.parameters() if p.grad is not None and p.grad.any()}
            if player.name == "generator":
                assert (found == {id(p) for p in model.generator.parameters()}
                        - silent(model)), (player.name, term)
            else:
                expected = [*model.trunk.parameters(), *heads[term == "D"].parameters()]
                assert found == {id(p) for p in expected}, (player.name, term)


def silent(model):
    """Biases in front of a batch normalisation, which takes them out again: no
    gradient but rounding.
    """
    modules = list(model.generator)
    return {id(p) for p in model.generator.parameters() if p.grad is None
                or not p.grad.any()} & {id(a.bias) for a, b in zip(modules, modules[1:])
                                        if "BatchNorm" in type(b).__name__}


def test_frozen_player_is_not_updated():
    model = build()
    stage = model.stages()[0]
    generator = model.players(stage)[1]
    set_trainable(model, generator)
    before = {name: p.clone() for name, p in model.named_parameters()}
    sum(w * v
        for w, v in generator.loss(batch_of(model.conditions)).values()).backward()
    generator.optimizer.step()
    for name, p in model.named_parameters():
        assert name.startswith("generator.") or torch.equal(p, before[name])


def test_a_gan_has_no_conditions():
    model = build(cls=GAN)
    log = fit(model, Bars(), images=320, progress=False).log
    assert {k for k in log[-1] if "." in k and "norm" not in k} == {"discriminator.D",
                                                                    "generator.G"}
    assert model.sample(3).shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="unknown condition 'bar'"):
        model.sample(2, bar=1)


# Conditions


@pytest.mark.parametrize(
    "conditions", [[BAR], [Binary("bold")], [Real("light", 0, 10)], [Code("u", 2)],
                   [Code("b", 2, "binary")], list(MANY)],
    ids=["classes", "binary", "real", "codes", "binary codes", "many"])
def test_every_kind_of_condition_trains_and_samples(conditions):
    model = build(conditions)
    log = fit(model, Bars(model.conditions.supervised or (BAR,)), images=640,
              progress=False).log
    terms = {k.split(".")[1] for k in log[-1] if k.startswith("generator.")}
    expected = {("C_" if item.supervised else "De_") + item.name
                for item in model.conditions}
    assert (terms == expected | {"G", "norm"}
            and all(math.isfinite(v) for k, v in log[-1].items() if "." in k))
    x = model.sample(4, generator=seeded())
    assert (x.shape == (4, 1, 8, 8) and 0 <= x.min() and x.max() <= 1
            and not x.requires_grad)


def test_law_7_samples_depend_on_conditions_and_noise():
    model, log = learned()
    for k in range(3):
        x = model.sample(100, generator=seeded(2), bar=k, u=0.0)
        assert (places(x) == k).float().mean() > 0.9
    assert log[-1]["generator.C_bar"] < 0.5 * log[0]["generator.C_bar"]
    assert model.sample(100, generator=seeded(2), bar=0, u=0.0).std(0).mean() > 1e-2


@pytest.mark.parametrize("kind", ["uniform", "binary"])
def test_codes_are_predicted_after_training(kind):
    model, _ = learned(kind)
    u = model.conditions.codes.draw(
        300, lambda name, k: torch.rand(300, k, generator=seeded(1)))
    with torch.no_grad():
        answers = model.discriminate(model.sample(300, generator=seeded(2), u=u,
                                                  bar=torch.arange(300) % 3))[1]
    assert torch.corrcoef(torch.stack([u[:, 0], answers[:, -1]]))[0, 1] > 0.7


def test_forms_of_a_condition():
    model = learned()[0]
    draw = lambda **values: model.sample(4, generator=seeded(5), u=0.0,  # noqa: E731
                                         **values)
    scalar = draw(bar=2)
    assert (torch.equal(scalar, draw(bar=[2] * 4))
            and torch.equal(scalar, draw(bar=[0.0, 0.0, 1.0])))
    assert not torch.equal(scalar, draw(bar=1))
    rows = model.condition(3000, seeded())[:, :3]
    assert (rows.mean(0) - 1 / 3).abs().max() < 0.05  # from training rows


def test_temperature_and_generator():
    model = learned()[0]
    assert torch.equal(model.sample(5, generator=seeded(6)),
                       model.sample(5, generator=seeded(6)))
    cold = model.sample(5, temperature=0.0, bar=1, u=0.3)
    assert torch.allclose(cold, cold[:1].expand_as(cold), atol=1e-6)
    for t in (0.3, 1.7):  # the noise is standard normal, times the temperature
        g = seeded(7)
        c = model.condition(4, g, bar=1)
        z = torch.randn(4, model.latent_size, generator=g)
        with torch.no_grad():
            assert torch.equal(model.sample(4, t, seeded(7), bar=1),
                               model.generate(c, t * z))
    warm = [model.sample(200, temperature=t, generator=seeded(1), bar=1,
                         u=0.3).std(0).mean() for t in (0.5, 1.0)]
    assert warm[0] < warm[1]


@pytest.mark.parametrize(
    "verb", ["encode", "decode", "reconstruct", "log_prob", "edit", "interpolate"])
def test_unsupported_methods_are_absent(verb):
    assert not hasattr(build(), verb)


# Refusals, saving, resuming


@pytest.mark.parametrize(("options", "message"), [
    ({"game": "hing"}, "game='hing'; accepted: .*hinge.*; did you mean 'hinge'"),
    ({"weights": {"Dee": 1.0}},
     "weight of loss 'Dee'; accepted: G, C, De; did you mean 'De'"),
    ({"shape": None}, "shape None; accepted"),
    ({"conditions": None}, "conditions=None; accepted: a list"),
    ({"conditions": []},
     "ACGAN without conditions; accepted: one or more conditions or codes"),
    ({"shape": (1, 28, 28)}, "28×28 pixels; accepted: squares with sides 8, 16"),
    ({"game": ["hinge"]}, r"game=\['hinge'\]; accepted"),
    ({"noise": 0}, "noise=0; accepted: an integer, 1 or more"),
    ({"noise": -1}, "noise=-1; accepted"),
    ({"width": 0}, "width=0; accepted: an integer, 1 or more"),
    ({"width": 2.5}, "width=2.5; accepted"),
    ({"lr": -1.0}, "lr=-1.0; accepted: a finite number, 0 or more"),
    ({"lr": math.nan}, "lr=nan; accepted"), ({"lr": "x"}, "lr='x'; accepted"),
    ({"weights": {"C": "x"}}, "weight of C='x'; accepted"),
    ({"weights": {"C": math.nan}}, "weight of C=nan; accepted"),
    ({"weights": [1]}, r"weights=\[1\]; accepted")])
def test_constructor_refuses_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ACGAN(**{"shape": (1, 8, 8), "conditions": [BAR], **SMALL, **options})
    with pytest.raises(ValueError, match="unknown condition 'bars'; accepted: bar; "
                           "did you mean 'bar'"):
        build().sample(2, bars=1)


@pytest.mark.parametrize("options", [{"noise": 0}, {"noise": -1}, {"width": 0},
                                     {"lr": -1.0}, {"lr": math.nan}])
def test_gan_constructor_refuses_invalid_arguments(options):
    with pytest.raises(ValueError, match="; accepted"):
        GAN((1, 8, 8), **{**SMALL, **options})


@pytest.mark.parametrize("options", [{"n": 2.5}, {"n": "2"}, {"n": True}, {"n": 0},
                                     {"temperature": math.nan}, {"temperature": -1},
                                     {"temperature": None}, {"temperature": "a"},
                                     {"temperature": 11}, {"generator": 3}])
def test_sample_refuses_invalid_arguments(options):
    with pytest.raises(ValueError, match="; accepted"):
        build().sample(**{"n": 2, **options})


def test_batch_of_one_is_refused_before_writing_files(tmp_path):
    """Batch normalisation of a vector needs two of them."""
    with pytest.raises(ValueError, match="batch=1 .*accepted: 2 to 300"):
        fit(build(), Bars(), tmp_path / "run", images=8, batch=1, progress=False)
    assert not (tmp_path / "run").exists()


def test_law_5_resumed_run_equals_uninterrupted_run(tmp_path):
    whole, parts = build(list(MANY)), build(list(MANY))
    data = Bars(MANY.supervised)
    fit(whole, data, tmp_path / "a", images=320, progress=False)
    stops = 0
    while not fit(parts, data, tmp_path / "b", images=320, budget=0,
                  progress=False).finished:
        parts, stops = build(list(MANY)), stops + 1
    a, b = whole.state_dict(), parts.state_dict()
    assert stops >= 3 and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("cls", [ACGAN, GAN])
def test_law_6_loaded_model_gives_the_same_samples(cls, tmp_path):
    model = build(cls=cls, game="least_squares")
    fit(model, Bars(), images=320, progress=False)
    save(model, tmp_path)
    again = load(tmp_path)
    assert type(again) is cls
    assert torch.equal(model.sample(8, generator=seeded()),
                       again.sample(8, generator=seeded()))
