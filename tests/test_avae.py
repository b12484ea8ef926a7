"""AVAE and BEGAN*: who moves in each step, which weight k is used, what each term does,
and the networks of the paper.
"""

import pytest
import torch

import condgen as cg
from condgen.contracts import Batch, Noise
from condgen.data import digits
from condgen.models.avae import (
    AVAE, BEGANStar, count_pairs, pair_decoder, pair_encoder)
from condgen.models.relatives import BEGAN
from condgen.trainer import set_trainable

SHAPE = (1, 16, 16)


def batch_of(seed=0, n=6, progress=1.0):
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return Batch({"x": x}, Noise((seed,), slice(0, n), n), progress)


def small(**options):
    torch.manual_seed(0)
    return AVAE(SHAPE, latent=6, width=4, **options).train()


def players(model):
    return {player.name: player for player in model.players(model.stages()[0])}


def gradients(model, player, batch):
    """Names of the parts of the model that one player's loss gives a gradient."""
    model.zero_grad()
    set_trainable(model, player)
    sum(w * value for w, value in player.loss(batch).values()).backward()
    return {name.split(".")[0] for name, p in model.named_parameters()
            if p.grad is not None and p.grad.abs().sum() > 0}


def test_steps_come_in_the_printed_order():
    assert [*players(small())] == ["encoder", "generator", "controller",
                                   "discriminator"]
    assert [*players(small(modern=True))] == ["encoder", "generator", "discriminator"]


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("name, own", [
    ("encoder", {"encoder"}), ("generator", {"generator"}),
    ("discriminator", {"energy_encoder", "energy_decoder"})])
def test_a_step_gives_gradients_to_one_network(name, own, modern):
    model = small(modern=modern)
    model.k_before.fill_(0.3)
    player, names = players(model)[name], {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in player.params} == own
    assert gradients(model, player, batch_of()) == own


def test_the_encoder_has_no_adversarial_term():
    assert set(small().encoder_loss(batch_of())) == {"L_n", "L_e", "L_s"}
    assert set(small(beta=0.0).encoder_loss(batch_of())) == {"L_n", "L_e"}


def test_decoder_has_all_four_terms_with_their_weights():
    weights = {k: w for k, (w, _) in small(alpha=0.3, beta=0.1, gamma=0.5)
               .generator_loss(batch_of()).items()}
    assert weights == {"L_g": 1.0, "L_v": 0.3, "L_s": 0.1, "L_e": 0.5}


def test_discriminator_plays_with_k_of_before_the_update():
    model, batch = small(), batch_of()
    model.controller.k.fill_(0.4)
    model.losses.copy_(torch.tensor([0.5, 0.1, 0.1]))
    model.control(batch)
    assert model.controller.k > 0.4
    terms = model.discriminator_loss(batch)
    assert float(terms["L_g"][0]) == pytest.approx(-0.4)
    assert float(terms["L_v"][0]) == pytest.approx(-0.4 * 0.3)


def test_losses_are_those_of_the_batch():
    """L_d, L_g and L_v that the controller sees, computed again from their terms."""
    model, batch = small(), batch_of()
    terms = model.generator_loss(batch)
    x = 2 * batch.x - 1
    with torch.no_grad():
        real = model.energy_of(x)[0].mean()
        made, sample = model.energy_of(model.fakes(batch))[0].view(2, -1).mean(1)
    expected = torch.stack([real, sample, made])
    assert torch.allclose(model.losses, expected, atol=1e-6)
    assert torch.allclose(terms["L_g"][1], sample) and torch.allclose(terms["L_v"][1],
                                                                      made)


@pytest.mark.parametrize("form, sign", [("corrected", 1), ("literal", -1)])
def test_error_has_the_sign_of_its_form(form, sign):
    model = small(form=form, set_point=0.5, alpha=0.3)
    model.losses.copy_(torch.tensor([0.2, 0.1, 0.18]))
    error = model.control(batch_of())["error"][1].item()
    assert error == pytest.approx(0.5 * 0.2 - 0.1 - sign * 0.3 * 0.18, abs=1e-6)


def test_k_rises_when_fakes_are_reconstructed_too_well():
    model = small(set_point=1.0)
    for fake, higher in ((0.01, True), (0.9, False)):
        model.controller.k.fill_(0.5)
        model.losses.copy_(torch.tensor([0.2, fake, fake]))
        model.control(batch_of())
        assert (model.controller.k > 0.5) == higher


def test_warm_up_holds_k_and_only_reconstructs():
    model, early = small(warm_up=0.3), batch_of(progress=0.1)
    k = model.controller.k.clone()
    assert set(model.generator_loss(early)) == {"L_s", "L_e"}
    assert set(model.discriminator_loss(early)) == {"L_d"}
    model.control(early)
    assert torch.equal(model.controller.k, k)


def test_all_players_see_the_same_noise():
    model, batch = small(), batch_of()
    assert torch.equal(model.eval().fakes(batch), model.fakes(batch))


def test_began_star_with_integral_gain_alone_is_began():
    torch.manual_seed(0)
    star = BEGANStar(SHAPE, noise=6, width=4, gains=(0.2, 0.0, 0.0))
    plain = BEGAN(SHAPE, noise=6, width=4, gain=0.2)
    plain.load_state_dict(star.state_dict())
    for model in (star, plain):
        cg.fit(model, digits(), None, images=64, seed=0, progress=False)
    a, b = star.state_dict(), plain.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    moved = BEGANStar(SHAPE, noise=6, width=4, gains=(0.2, 0.2, 0.0))
    moved.load_state_dict(plain.state_dict())
    cg.fit(moved, digits(), None, images=64, seed=0, progress=False)
    assert moved.controller.k != plain.controller.k


def test_similarity_of_began_star_moves_the_generator_alone():
    torch.manual_seed(0)
    model = BEGANStar(SHAPE, noise=6, width=4, similarity_weight=0.1).train()
    player = players(model)["generator"]
    assert set(player.loss(batch_of())) == {"G", "similarity"}
    assert gradients(model, player, batch_of()) == {"generator"}


@pytest.mark.parametrize("side, pairs", [(16, 2), (32, 3), (64, 4), (128, 5)])
def test_number_of_pairs_follows_the_side(side, pairs):
    shape = (3, side, side)
    assert count_pairs(shape) == pairs
    x = torch.rand(1, *shape)
    code = pair_encoder(shape, 2, 5)(x)
    assert code.shape == (1, 5)
    assert pair_decoder(5, shape, 2)(code).shape == x.shape


def test_pair_networks_have_only_the_layers_of_the_paper():
    kinds = {type(m).__name__ for net in (pair_encoder((3, 32, 32), 2, 5),
                                          pair_decoder(5, (3, 32, 32), 2))
             for m in net.modules()} - {"Sequential", "Flatten", "Unflatten"}
    assert kinds == {"Conv2d", "ELU", "Linear", "Upsample"}


@pytest.mark.parametrize("options, words", [
    ({"networks": "pair"}, "pairs"), ({"form": "printed"}, "corrected, literal"),
    ({"warm_up": 1.0}, "warm_up"), ({"alpha": -1.0}, "alpha"),
    ({"kl_weight": float("nan")}, "kl_weight")])
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        AVAE(SHAPE, **options)


def test_pairs_need_sixteen_pixels():
    with pytest.raises(ValueError, match="16, 32, 64"):
        AVAE((1, 8, 8), networks="pairs")
