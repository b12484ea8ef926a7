"""DCGAN: its guidelines layer by layer, its start, batches of its discriminator,
players, refusals, reload.
"""

import math

import pytest
import torch
from bars import Bars, batch_of, seeded
from torch import nn

from condgen.contracts import Batch, Noise
from condgen.data import digits
from condgen.games import GAMES
from condgen.models.dcgan import (BATCHES, DCGAN, NORMALIZED, dcgan_generator,
                                  dcgan_trunk)
from condgen.models.gan import GAN
from condgen.runs import load, save
from condgen.trainer import set_trainable
from condgen.training import fit

SMALL = {"noise": 6, "width": 4}


def build(**options):
    torch.manual_seed(0)
    return DCGAN((1, 8, 8), **{**SMALL, **options})


def kinds(network):
    return [type(part) for part in network]


# The networks


@pytest.mark.parametrize(("side", "maps"), [
    (8, [4]), (16, [8, 4]), (64, [32, 16, 8, 4]), (256, [32] * 3 + [16, 8, 4])])
def test_maps_double_and_channels_halve(side, maps):
    net = dcgan_generator(6, (3, side, side), 4)
    doubled = [part for part in net if isinstance(part, nn.ConvTranspose2d)]
    assert ([part.in_channels for part in doubled] == maps
            and doubled[-1].out_channels == 3)
    trunk, features = dcgan_trunk((3, side, side), 4)
    halved = [part for part in trunk if isinstance(part, nn.Conv2d)]
    assert ([part.out_channels for part in halved] == maps[::-1]
            and features == 16 * maps[0])
    if side <= 64:
        x = net(torch.randn(2, 6))
        assert x.shape == (2, 3, side, side) and trunk(x).shape == (2, features)


def test_guidelines_hold_in_every_layer():
    model = DCGAN((1, 32, 32), **SMALL)
    parts = [*model.generator, *model.trunk]
    assert not any("Pool" in type(part).__name__ for part in model.modules())
    assert sum(isinstance(part, nn.Linear) for part in parts) == 1  # of the noise
    assert all(part.stride == (2, 2)
               for part in parts if isinstance(part, nn.Conv2d | nn.ConvTranspose2d))
    assert kinds(model.generator)[-2:] == [nn.ConvTranspose2d, nn.Tanh]
    assert (kinds(model.generator).count(nn.BatchNorm2d)
            == kinds(model.generator).count(nn.ReLU) == 3)
    assert (kinds(model.trunk)[:2] == [nn.Conv2d, nn.LeakyReLU]
            and model.trunk[1].negative_slope == 0.2)
    assert kinds(model.trunk).count(nn.BatchNorm2d) == 2


@pytest.mark.parametrize("where", NORMALIZED)
def test_batch_norm_is_where_it_was_asked_for(where):
    model = DCGAN((1, 16, 16), **SMALL, batch_norm=where)
    for name, net in (("generator", model.generator), ("discriminator", model.trunk)):
        assert (nn.BatchNorm2d in kinds(net)) == (where in ("both", name))


def test_weights_start_small_and_without_biases():
    model = DCGAN((1, 32, 32), noise=64, width=16)
    for part in model.modules():
        if (isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
                and part.weight.numel() > 500):
            assert (abs(part.weight.std() / 0.02 - 1) < 0.15
                    and abs(part.weight.mean()) < 0.003)
        if getattr(part, "bias", None) is not None:
            assert not part.bias.any()
        if isinstance(part, nn.BatchNorm2d):
            assert abs(part.weight.mean() - 1) < 0.02 and part.weight.std() < 0.05


def test_images_and_logits_have_the_range_of_the_paper():
    model, z, seen = build(), torch.randn(3, 6, generator=seeded()), []
    model.trunk[0].register_forward_hook(
        lambda part, given, made: seen.append(given[0]))
    with torch.no_grad():
        x = model.eval().generate(None, z)
        assert (torch.allclose(x, (model.generator(z) + 1) / 2) and 0 <= x.min()
                and x.max() <= 1)
        logits, answers = model.discriminate(x)
    assert (torch.allclose(seen[0], 2 * x - 1) and logits.shape == (3,)
            and answers.shape == (3, 0))


# Batches of the discriminator


def test_separate_batches_are_normalized_apart():
    """Logits of generated images do not depend on which real ones stand beside them,
    unless batches are mixed.
    """
    real, fake = torch.rand(2, 16, 1, 16, 16, generator=seeded())
    for batches in BATCHES:
        model = DCGAN((1, 16, 16), **SMALL, batches=batches).train()
        logits = [model.discriminate_both(x, fake)[0][16:] for x in (real, 1 - real)]
        assert torch.equal(*logits) == (batches == "separate")
        alone = model.discriminate(fake)[0]
        assert torch.allclose(logits[0], alone, atol=1e-6) == (batches == "separate")


def test_mixed_batches_let_both_losses_vanish():
    """No function of single images can be below 2 log 2 in the sum of both losses
    on generated images.
    """
    data, total = digits(), {}
    batch = Batch({"x": data.split_images("train")[:64]},
                  Noise(("test",), slice(None), 64))
    for batches in BATCHES:
        torch.manual_seed(0)
        model = DCGAN(data.shape, width=16, batches=batches)
        fit(model, data, images=3_200, progress=False)
        with torch.no_grad():
            terms = [model.train().discriminator_loss(batch)["D"],
                     model.generator_loss(batch)["G"]]
        total[batches] = sum(value.item() for _, value in terms)
    assert total["mixed"] < 2 * math.log(2) < total["separate"]


@pytest.mark.parametrize("game", GAMES)
def test_each_game_uses_its_losses(game):
    model, batch = build(game=game).eval(), batch_of((), 16)
    with torch.no_grad():
        fake = model.generate_batch(batch)[0]
        logits = [model.discriminate(x)[0] for x in (batch.x, fake)]
        first, second = model.discriminator_loss(batch), model.generator_loss(batch)
    assert set(first) == {"D"} and set(second) == {"G"}
    assert torch.isclose(first["D"][1], GAMES[game].critic(*logits), atol=1e-6)
    assert torch.isclose(second["G"][1], GAMES[game].generator(logits[1]), atol=1e-6)


# Players and training


def test_players_are_those_of_the_gan_with_its_own_momentum():
    model = build(beta1=0.7, lr=3e-4)
    assert isinstance(model, GAN)
    players = model.players(model.stages()[0])
    assert ([player.name for player in players] == ["discriminator", "generator"]
            and not players[1].fresh)
    for player in players:
        group, = player.optimizer.param_groups
        assert group["betas"] == (0.7, 0.999) and group["lr"] == 3e-4
    assert GAN((1, 8, 8), **SMALL).betas == (0.5, 0.999) == build().betas


def test_law_4_each_player_updates_only_its_parameters():
    model = build()
    for player in model.players(model.stages()[0]):
        set_trainable(model, player)
        model.zero_grad(set_to_none=True)
        sum(w * v for w, v in player.loss(batch_of(())).values()).backward()
        found = {id(p)
                 for p in model.parameters() if p.grad is not None and p.grad.any()}
        assert found == {id(p) for p in player.params}


def test_training_moves_samples_towards_the_data():
    model, x = build(width=8), Bars().split_images("test")
    distance = lambda: (model.sample(200, generator=seeded()).mean(0)
                        - x.mean(0)).abs().mean()
    before = distance()
    fit(model, Bars(), images=6_400, progress=False)
    assert distance() < 0.5 * before
    assert model.sample(50, generator=seeded()).std(0).mean() > 0.02


def test_law_5_resumed_run_equals_uninterrupted_run(tmp_path):
    whole, parts, stops = build(), build(), 0
    fit(whole, Bars(), tmp_path / "a", images=320, progress=False)
    while not fit(parts, Bars(), tmp_path / "b", images=320, budget=0,
                  progress=False).finished:
        parts, stops = build(), stops + 1
    a, b = whole.state_dict(), parts.state_dict()
    assert stops >= 3 and all(torch.equal(a[name], b[name]) for name in a)


def test_law_6_loaded_model_gives_the_same_samples(tmp_path):
    model = build(batch_norm="generator", batches="mixed", beta1=0.9)
    fit(model, Bars(), images=128, progress=False)
    save(model, tmp_path)
    again = load(tmp_path)
    assert (type(again) is DCGAN and again.betas == (0.9, 0.999)
            and again.batches == "mixed")
    assert torch.equal(model.sample(4, generator=seeded()),
                       again.sample(4, generator=seeded()))


@pytest.mark.parametrize(
    "verb", ["encode", "decode", "reconstruct", "log_prob", "edit", "interpolate"])
def test_unsupported_methods_are_absent(verb):
    assert not hasattr(build(), verb)


@pytest.mark.parametrize(("options", "message"), [
    ({"game": "hing"}, "did you mean 'hinge'"),
    ({"batch_norm": "generators"}, "did you mean 'generator'"),
    ({"batches": "mix"}, "did you mean 'mixed'"),
    ({"beta1": 1.0}, "beta1=1.0; accepted"),
    ({"beta1": "x"}, "beta1='x'"), ({"beta1": True}, "beta1=True; accepted"),
    ({"slope": -0.1}, "slope=-0.1; accepted"), ({"noise": 0}, "noise=0; accepted"),
    ({"width": 0}, "width=0; accepted"),
    ({"shape": None}, "shape None; accepted"), ({"shape": (1, 20, 20)}, "20×20 pixels"),
    ({"lr": -1.0}, "lr=-1.0; accepted"), ({"beta1": math.nan}, "beta1=nan; accepted")])
def test_constructor_refuses_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DCGAN(**{"shape": (1, 8, 8), **SMALL, **options})
