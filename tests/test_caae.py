"""CAAE: the terms of its objective, who moves what, verbs, and what the
discriminator of codes does.
"""

import dataclasses
import math
from functools import cache

import pytest
import torch
from torch.nn.functional import softplus

from condgen.conditions import Binary, Classes, Code, Real, Schema
from condgen.contracts import Batch, Noise
from condgen.data import Dataset
from condgen.splits import SPLITS
from condgen.models import caae
from condgen.models.caae import (CAAE, FORM_WEIGHTS, total_variation_loss, to_bipolar,
                                 ks_distance_to_uniform)
from condgen.runs import load, save
from condgen.trainer import set_trainable
from condgen.training import fit

AGE = Classes("age", 3)
MANY = Schema([AGE, Binary("glasses"), Real("light", 0, 10)])
SMALL = {"code": 4, "width": 4}


def seeded(k=0):
    return torch.Generator().manual_seed(k)


def picture(age, place):
    """16×16: bright to the left of a place, which says who it is; brighter still in
    the third that is the age.
    """
    x = 0.1 + 0.5 * (
        torch.arange(16) < place[:, None]).float()[:, None, None, :].repeat(1, 1, 16, 1)
    return x + 0.35 * (torch.arange(
        16).div(5, rounding_mode="floor") == age[:, None])[:, None, :, None]


def bars(n=300):
    """Pictures of random places and ages, labelled with the age."""
    g = seeded(1)
    age, place = (torch.randint(3, (n,), generator=g),
                  torch.randint(2, 15, (n,), generator=g))
    images = (255 * picture(age, place)).round().to(torch.uint8)
    part = torch.arange(n) % 10
    splits = dict(zip(SPLITS, ((part > 1).nonzero()[:, 0], (part == 0).nonzero()[:, 0],
                               (part == 1).nonzero()[:, 0])))
    return Dataset("bars", images, Schema(AGE).pack(n, age=age), Schema(AGE), splits)


def build(conditions=(AGE,), **options):
    torch.manual_seed(0)
    return CAAE((1, 16, 16), conditions, **{**SMALL, **options})


def a_batch(model, n=16):
    values = {"age": torch.arange(n) % 3, "glasses": torch.arange(n) % 2,
              "light": torch.linspace(0, 10, n)}
    c = model.conditions.pack(n,
                              **{name: values[name] for name in model.conditions.names})
    return Batch({"x": torch.rand(n, *model.shape, generator=seeded()), "c": c},
                 Noise(("test",), slice(None), n))


@cache
def learned():
    model = build(width=8, code=2, lr=4e-3)
    return model, fit(model, bars(), images=9_600, progress=False).log


# The objective


def test_labels_are_minus_and_plus_one():
    c = MANY.pack(2, age=[1, 2], glasses=[0, 1], light=[0.0, 7.5])
    assert to_bipolar(MANY, c).tolist() == [[-1, 1, -1, -1, -1], [-1, -1, 1, 1, 0.5]]


def test_image_variation_of_known_images():
    x = torch.zeros(3, 2, 4, 4)
    x[1, :, :, 2:] = 1.0  # one edge of height 1 in each of 4 rows and 2 channels
    x[2, 0, 1, 1] = 0.5  # a dot has four edges
    assert torch.allclose(total_variation_loss(x), torch.tensor([0.0, 8 / 32, 2 / 32]))


def test_distance_from_uniform():
    even = (2 * torch.arange(1, 101) - 1)[:, None] / 100 - 1
    assert ks_distance_to_uniform(even).item() == pytest.approx(0.005, abs=1e-6)
    assert ks_distance_to_uniform(torch.zeros(10, 1)).item() == pytest.approx(0.5)
    assert (ks_distance_to_uniform(torch.cat([even, even / 2], 1)).tolist()
            == pytest.approx([0.005, 0.255], abs=0.01))
    assert torch.equal(ks_distance_to_uniform(even.flip(0)),
                       ks_distance_to_uniform(even))
    for wrong in (torch.zeros(3), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match=r"accepted: \(n, k\)"):
            ks_distance_to_uniform(wrong)


def test_terms_are_those_of_the_equations():
    model = build(MANY, weights={"G": 0.3, "E": 0.7, "TV": 0.2})
    batch = a_batch(model)
    labels = torch.cat([2 * batch.c[:, :4] - 1, batch.c[:, 4:]], 1)
    z = model.encoder(batch.x)
    x = torch.sigmoid(model.generator(torch.cat([z, labels], 1)))
    u = 2 * batch.rand("prior", 4) - 1
    d_u, d_z = (model.code_discriminator_net(u)[:, 0],
                model.code_discriminator_net(z)[:, 0])
    d_x, d_g = (model.image_discriminator(batch.x, labels),
                model.image_discriminator(x, labels))
    wanted = {"D_z": (1, softplus(-d_u).mean() + softplus(d_z).mean()),
              "D_x": (1, softplus(-d_x).mean() + softplus(d_g).mean()),
              "L1": (1, (x - batch.x).abs().mean()), "G": (0.3, softplus(-d_g).mean()),
              "E": (0.7, softplus(-d_z).mean()),
              "TV": (0.2, total_variation_loss(x).mean())}
    found = {**model.code_discriminator_loss(batch),
             **model.image_discriminator_loss(batch), **model.loss(batch)}
    assert found.keys() == wanted.keys()
    for name, (weight, value) in found.items():
        assert (weight == wanted[name][0]
                and torch.isclose(value, wanted[name][1], atol=1e-6)), name


def test_the_prior_is_uniform_in_the_box():
    u = 2 * a_batch(build(), 900).rand("prior", 4) - 1
    assert (-1 <= u.min() < -0.98 < 0.98 < u.max() <= 1
            and ks_distance_to_uniform(u).max() < 2 / 30)


def test_image_discriminator_depends_on_the_label():
    model = build()
    x = torch.rand(2, 1, 16, 16)
    labels = [to_bipolar(model.conditions, model.conditions.pack(2, age=k))
              for k in (0, 1)]
    logits = [model.image_discriminator(x, c) for c in labels]
    assert (logits[0] - logits[1]).abs().min() > 1e-4


# Forms, weights and players


def names(model):
    return [player.name for player in model.players(model.stages()[0])]


def test_players_of_each_form_and_weighting():
    corrected, literal = FORM_WEIGHTS["corrected"], FORM_WEIGHTS["literal"]
    assert corrected["E"] > 0 == literal["E"] and literal["G"] == corrected["G"]
    assert names(build()) == names(build(form="literal")) == ["codes", "images",
                                                              "autoencoder"]
    assert names(build(weights={"E": 0.0})) == ["images", "autoencoder"]
    assert names(build(weights={"G": 0.0})) == ["codes", "autoencoder"]
    bare = build(weights={"G": 0.0, "E": 0.0})
    assert (names(bare) == ["autoencoder"]
            and bare.code_discriminator_net is bare.image_discriminator is None)
    first, *others = build().players(build().stages()[0])
    assert first.fresh and not any(player.fresh for player in others)
    assert set(build(form="literal").loss(a_batch(build()))) == {"L1", "G"}


def test_law_11_literal_form_ignores_the_code_discriminator():
    """Bit for bit the encoder and generator of a model without that discriminator;
    not those of the corrected form.
    """
    models = {name: build(**options)
              for name, options in {"literal": {"form": "literal"}, "corrected": {},
                                    "absent": {"weights": {"E": 0.0}}}.items()}
    for model in models.values():
        fit(model, bars(), images=160, progress=False)
    weights = {name: [*m.encoder.parameters(), *m.generator.parameters()]
               for name, m in models.items()}
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(weights[a], weights[b]))
    assert same("literal", "absent") and not same("literal", "corrected")


@pytest.mark.parametrize("conditions", [[AGE], list(MANY)], ids=["age", "many"])
def test_law_4_each_loss_term_updates_only_its_parameters(conditions):
    model = build(conditions, weights={"TV": 0.1})
    players = model.players(model.stages()[0])
    own = [id(p) for player in players for p in player.params]
    assert len(own) == len(set(own)) and set(own) == {id(p) for p in model.parameters()}
    parts = {"D_z": [model.code_discriminator_net], "D_x": [model.image_discriminator],
             "E": [model.encoder],
             **dict.fromkeys(("L1", "G", "TV"), [model.encoder, model.generator])}
    for player in players:
        set_trainable(model, player)
        for term, (_, value) in player.loss(a_batch(model)).items():
            model.zero_grad(set_to_none=True)
            value.backward(retain_graph=True)
            found = {id(p)
                     for p in model.parameters() if p.grad is not None and p.grad.any()}
            assert found == {id(p) for part in parts[term]
                             for p in part.parameters()}, term


@pytest.mark.parametrize("side", [16, 32, 64])
def test_sizes(side):
    model = CAAE((3, side, side), [AGE], code=5, width=2)
    x = torch.rand(2, 3, side, side)
    assert model.edit(x, age=1).shape == x.shape and model.encode(x).shape == (2, 5)
    assert model.image_discriminator(
        x, to_bipolar(model.conditions, model.conditions.pack(2, age=0))).shape == (2,)


def test_default_has_1_to_2_million_parameters_at_32_pixels():
    assert 1e6 < sum(p.numel() for p in CAAE((3, 32, 32),
                                             [Classes("age", 10)]).parameters()) < 2e6


# Verbs


def test_laws_10_and_7_loss_falls_and_label_changes_the_image():
    """Trained on single pictures: the third that is asked for is the bright one,
    and the place stays.
    """
    model, log = learned()
    assert log[-1]["autoencoder.L1"] < 0.35 * log[0]["autoencoder.L1"]
    data = bars()
    x, c = data.split_images("test"), data.table("test")["c"].argmax(1)
    place = (x[:, 0, -1] > 0.5).sum(1)
    assert torch.equal((255 * picture(c, place)).round() / 255, x)
    assert (model.reconstruct(x, age=c) - x).abs().mean() < 0.07
    for k in range(3):
        y = model.edit(x, age=k)
        bands = torch.stack(
            [y[..., 5 * j : 5 * j + 5, :].mean((1, 2, 3)) for j in range(3)], 1)
        assert (bands.argmax(1) == k).float().mean() > 0.9
        assert (y - picture(torch.full_like(c, k), place)).abs().mean() < 0.1
    code = model.encode(x)
    assert code.shape == (len(x), 2) and code.abs().max() <= 1


def test_code_discriminator_makes_codes_more_uniform():
    data, distance = bars(), {}
    for weight in (0.0, 0.1):
        model = build(weights={"E": weight}, lr=4e-3)
        fit(model, data, images=6_400, progress=False)
        distance[weight] = ks_distance_to_uniform(
            model.encode(data.split_images("train"))).mean().item()
    assert distance[0.1] < 0.6 * distance[0.0]


def test_encode_decode_edit_and_reconstruct_are_consistent():
    model, x = build(MANY), torch.rand(3, 1, 16, 16)
    values = {"age": [0, 1, 2], "glasses": 1, "light": 5.0}
    z = model.encode(x)
    y = model.decode(z, **values)
    assert (torch.equal(model.edit(x, **values), y)
            and torch.equal(model.reconstruct(x, **values), y))
    assert 0 <= y.min() and y.max() <= 1 and not y.requires_grad and not z.requires_grad
    way = model.interpolate(x[0], x[1], 5, age=0, glasses=0, light=1.0)
    ends = model.edit(x[:2], age=0, glasses=0, light=1.0)
    assert (torch.allclose(way[0], ends[0], atol=1e-6)
            and torch.allclose(way[-1], ends[1], atol=1e-6))
    turn = model.interpolate(x[0], x[0], 3, age=[0, 1, 2], glasses=0, light=1.0)
    assert torch.allclose(turn[1], model.edit(x[:1], age=1, glasses=0, light=1.0)[0],
                          atol=1e-6)


def test_samples_are_decoded_uniform_codes():
    model = build()
    for t in (1.0, 0.5):
        g = seeded(7)
        c = model.condition(4, g, age=1)
        z = t * (2 * torch.rand(4, 4, generator=g) - 1)
        assert torch.equal(model.sample(4, t, seeded(7), age=1),
                           model.decode(z, age=c.argmax(1)))
    cold = model.sample(5, 0.0, age=2)
    assert torch.allclose(cold, cold[:1].expand_as(cold), atol=1e-6)
    assert torch.equal(model.sample(3, generator=seeded(1)),
                       model.sample(3, generator=seeded(1)))


@pytest.mark.parametrize("call", [
    lambda m, x: m.edit(x), lambda m, x: m.edit(x, age=3),
    lambda m, x: m.edit(x, years=3), lambda m, x: m.edit(2 * x + 1, age=1),
    lambda m, x: m.encode(x[:, :, :8]), lambda m, x: m.decode(x, age=1),
    lambda m, x: m.decode(torch.zeros(2, 3), age=1), lambda m, x: m.decode("z", age=1),
    lambda m, x: m.decode(torch.full((2, 4), math.nan), age=1),
    lambda m, x: m.interpolate(x[0], x[1], 0, age=1),
    lambda m, x: m.interpolate(x[0].tolist(), x[1].tolist(), 3, age=1),
    lambda m, x: m.interpolate(x, x, 3, age=1),
    lambda m, x: m.decode([[0.0] * 4], age=1),
    lambda m, x: m.interpolate(x[0], x[1][:, :8], 3, age=1), lambda m, x: m.sample(0),
    lambda m, x: m.sample(2, -1.0), lambda m, x: m.sample(2, 1.0, 3)])
def test_methods_refuse_invalid_arguments(call):
    with pytest.raises(ValueError, match="accepted|needed"):
        call(build(), torch.rand(2, 1, 16, 16))


@pytest.mark.parametrize(("options", "message"), [
    ({"form": "litteral"},
     "form='litteral'; accepted: corrected, literal; did you mean 'literal'"),
    ({"weights": {"Ez": 1.0}}, "weight of loss 'Ez'; accepted: G, E, TV"),
    ({"weights": [1]}, "accepted: a number"),
    ({"weights": {"E": -1}}, "weight of E=-1; accepted: a finite number"),
    ({"lr": math.nan}, "lr=nan; accepted"),
    ({"weights": {"E": "x"}}, "weight of E='x'; accepted"),
    ({"form": 3}, "form=3; accepted"),
    ({"conditions": []}, "conditions none; accepted"),
    ({"conditions": [AGE, Code("u", 1)]}, "and no Code"),
    ({"code": 0}, "code=0; accepted"), ({"width": 0}, "width=0; accepted"),
    ({"shape": (1, 8, 8)}, "8×8 pixels"),
    ({"shape": (1, 20, 20)}, "20×20 pixels"), ({"shape": None}, "shape None; accepted"),
    ({"conditions": None}, "conditions=None; accepted: a list")])
def test_constructor_refuses_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CAAE(**{"shape": (1, 16, 16), "conditions": [AGE], **SMALL, **options})


@pytest.mark.parametrize("verb", ["log_prob"])
def test_unsupported_methods_are_absent(verb):
    assert not hasattr(build(), verb)


# Training


def test_learning_rate_schedule_and_weight_averages():
    stage, = build().stages()
    assert ([stage.schedule(t) for t in (0, 0.5, 0.75, 1)]
            == pytest.approx([1, 1, 0.5, 0.02]) and 0.9 <= stage.ema < 1)
    averaged, last = build(), build()
    last.stages = lambda: [dataclasses.replace(stage, players=last.players, ema=0.0)]
    for model in (averaged, last):
        fit(model, bars(40), images=64, progress=False)
    assert not torch.equal(averaged.code_discriminator_net[0].weight,
                           last.code_discriminator_net[0].weight)


def test_law_5_resumed_run_equals_uninterrupted_run(tmp_path):
    whole, parts, stops = build(), build(), 0
    fit(whole, bars(), tmp_path / "a", images=160, progress=False)
    while not fit(parts, bars(), tmp_path / "b", images=160, budget=0,
                  progress=False).finished:
        parts, stops = build(), stops + 1
    a, b = whole.state_dict(), parts.state_dict()
    assert stops >= 3 and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options",
                         [{}, {"form": "literal"}, {"weights": {"E": 0.0, "G": 0.0}}])
def test_law_6_loaded_model_gives_the_same_samples(options, tmp_path):
    model = build(**options)
    fit(model, bars(60), images=64, progress=False)
    save(model, tmp_path)
    again = load(tmp_path)
    assert type(again) is CAAE and again.weights == model.weights
    assert torch.equal(model.sample(4, generator=seeded()),
                       again.sample(4, generator=seeded()))


def test_loss_has_no_batch_statistics():
    """No batch statistics: the loss of a batch is the mean of the
    losses of its parts.
    """
    model = build()
    batch = a_batch(model)
    halves = [Batch({k: v[part] for k, v in batch.fields.items()},
                    Noise(("test",), part, 16))
              for part in (slice(0, 8), slice(8, 16))]
    for loss in (model.code_discriminator_loss, model.image_discriminator_loss,
                 model.loss):
        for name, (_, value) in loss(batch).items():
            assert torch.isclose(value, sum(loss(half)[name][1] for half in halves) / 2,
                                 atol=1e-6), name


def test_public_names():
    assert set(caae.__all__) >= {"CAAE", "FORM_WEIGHTS", "ks_distance_to_uniform",
                                 "total_variation_loss"}
