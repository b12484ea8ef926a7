"""Stabilisers of adversarial training: penalties, losses, augmentation, LeCam, and the kit."""

import math

import pytest
import torch
from torch import nn

from condgen.contracts import Batch, Noise
from condgen.stability import (
    AUGMENTATION_NUMBERS, LeCam, StabilityKit, augment, relativistic_discriminator,
    relativistic_generator, squared_gradient)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def critic(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 8), nn.LeakyReLU(0.2),
                         nn.Linear(8, 1), nn.Flatten(0))


def batch_of(n=6, key=0):
    return Batch({"x": random(n, 3, 8, 8)}, Noise((key,), slice(None), n))


def test_penalty_of_a_linear_critic_is_its_squared_slope():
    w = torch.randn(4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = squared_gradient(lambda x: x @ w, random(5, 4))
    [slope] = torch.autograd.grad(found, w)
    assert torch.isclose(found, w @ w) and torch.allclose(slope, 2 * w)


def test_penalty_equals_finite_differences():
    net, x, h = critic().double(), random(3, 3, 8, 8).double(), 1e-6
    found, total = squared_gradient(net, x), 0.0
    for k in range(3 * 64):
        step = torch.zeros(3 * 64, dtype=torch.float64)
        step[k] = h
        step = step.view(3, 8, 8)
        with torch.no_grad():
            total += ((net(x + step) - net(x - step)) / (2 * h)).square().mean()
    assert torch.isclose(found, total, rtol=1e-5)


def test_penalty_works_where_gradients_are_off():
    with torch.no_grad():
        assert squared_gradient(critic(), random(2, 3, 8, 8)) > 0


def test_relativistic_losses_depend_on_differences_only():
    real, fake = random(7), random(7, seed=1)
    for loss in (relativistic_discriminator, relativistic_generator):
        assert torch.isclose(loss(real, fake), loss(real + 5, fake + 5))
    assert torch.isclose(relativistic_discriminator(real, fake),
                         relativistic_generator(fake, real))
    better = relativistic_discriminator(real + 1, fake)
    assert better < relativistic_discriminator(real, fake)


def test_augmentation_is_fixed_by_its_numbers():
    x, numbers = random(5, 3, 16, 16), random(5, AUGMENTATION_NUMBERS, seed=1)
    assert torch.equal(augment(x, numbers), augment(x, numbers))
    assert not torch.equal(augment(x, numbers), augment(x, 1 - numbers))
    one = augment(x[2:3], numbers[2:3])
    assert torch.allclose(augment(x, numbers)[2:3], one)  # an image by itself


def test_neutral_numbers_only_cut_out():
    x = random(2, 3, 16, 16)
    found = augment(x, torch.full((2, AUGMENTATION_NUMBERS), 0.5))
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[4:12, 4:12] = True
    assert torch.allclose(found[..., ~hole], x[..., ~hole], atol=1e-6)
    assert not found[..., hole].any()


def test_shift_moves_pixels_and_fills_with_zeros():
    x = random(1, 1, 16, 16)
    numbers = torch.tensor([[0.5, 0.5, 0.5, 0.99, 0.5, 0.99, 0.99]])
    found = augment(x, numbers)[0, 0]
    assert torch.allclose(found[:9, :11], x[0, 0, 2:11, :11], atol=1e-6)
    assert not found[14:].any()


def test_gradient_passes_the_augmentation():
    x = random(4, 3, 8, 8).requires_grad_()
    augment(x, random(4, AUGMENTATION_NUMBERS)).sum().backward()
    assert x.grad.abs().flatten(1).sum(1).min() > 0


def test_wrong_number_of_random_numbers_is_refused():
    with pytest.raises(ValueError, match="accepted: \\(2, 7\\)"):
        augment(random(2, 3, 8, 8), random(2, 3))


def test_lecam_penalises_logits_beyond_the_other_mean():
    penalty = LeCam(decay=0.5)
    real, fake = torch.full((4,), 2.0), torch.full((4,), -1.0)
    # averages after one batch: 1 and -0.5
    assert penalty(real, fake).item() == pytest.approx(2.5**2 + 2.0**2)
    assert penalty.real == 1 and penalty.fake == -0.5
    again = LeCam(decay=0.5)
    again.load_state_dict(penalty.state_dict())
    assert again(real, fake) == penalty(real, fake)
    inside = LeCam(decay=0.999)
    assert inside(torch.full((3,), -1.0), torch.full((3,), 1.0)) < 1e-5


@pytest.mark.parametrize("loss", ["non_saturating", "hinge", "relativistic"])
def test_switched_off_kit_has_the_plain_losses(loss):
    net, real, fake = critic(), random(6, 3, 8, 8), random(6, 3, 8, 8, seed=1)
    kit = StabilityKit(loss)
    assert list(kit.discriminator_terms(net, real, fake)) == ["D"]
    assert list(kit.generator_terms(net, real, fake)) == ["G"]
    assert not list(kit.parameters()) and not kit.state_dict()


def test_no_gradient_leaks_to_the_other_player():
    net, real = critic(), random(6, 3, 8, 8)
    fake = random(6, 3, 8, 8, seed=1).requires_grad_()
    kit = StabilityKit("relativistic", 1.0, 1.0, 0.3, augmented=True)
    terms = kit.discriminator_terms(net, real, fake, batch_of())
    sum(weight * value for weight, value in terms.values()).backward()
    assert fake.grad is None and all(p.grad is not None for p in net.parameters())
    kit.generator_terms(net, real, fake, batch_of())["G"][1].backward()
    assert fake.grad.abs().sum() > 0


def test_both_players_see_the_same_augmentation_policy():
    """Means over images that the critic gets agree between the players' steps."""
    seen = []

    def look(x):
        seen.append(x.detach())
        return x.flatten(1).mean(1)

    kit, x = StabilityKit(augmented=True), random(6, 3, 8, 8)
    kit.discriminator_terms(look, x, x, batch_of())
    kit.generator_terms(look, x, x, batch_of())
    real, fake, again = seen
    assert torch.equal(fake, again) and not torch.equal(real, fake)
    assert not torch.equal(fake, x)
    with pytest.raises(ValueError, match="no batch; accepted"):
        kit.generator_terms(look, x, x)


def test_r1_and_r2_are_half_weighted_and_of_their_own_images():
    net, real, fake = critic(), random(6, 3, 8, 8), 9 * random(6, 3, 8, 8, seed=1)
    terms = StabilityKit(r1=4.0, r2=2.0).discriminator_terms(net, real, fake)
    assert terms["R1"][0] == 2.0 and terms["R2"][0] == 1.0
    assert torch.isclose(terms["R1"][1], squared_gradient(net, real))
    assert torch.isclose(terms["R2"][1], squared_gradient(net, fake))


@pytest.mark.parametrize("given, said", [
    ({"loss": "hing"}, "did you mean 'hinge'"), ({"r1": -1.0}, "r1"),
    ({"r2": math.nan}, "r2"), ({"lecam": math.inf}, "lecam")])
def test_kits_that_are_none_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        StabilityKit(**given)


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_decays_that_are_none_are_refused(decay):
    with pytest.raises(ValueError, match="accepted"):
        LeCam(decay)
