"""Texture loss, printed and corrected; weights; distances of textures."""

import pytest
import torch

from condgen.scenes import scene_pairs
from condgen.texture_loss import (
    area_under_curve, equal_error_changes, filter_bank, fit_logistic, gram,
    released_weight, texture_distance, texture_loss)


def parts(seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(2, 6, 5, 4, generator=g, dtype=torch.float64)
    return target, 0.1 + 0.8 * torch.rand(2, 1, 5, 4, generator=g, dtype=torch.float64)


def test_the_printed_minimum_is_the_amplified_map():
    target, weight = parts()
    literal = lambda f: texture_loss(f, target, weight, "literal")
    assert (literal(target / weight) < 1e-15).all() and (literal(target) > 1e-6).all()
    amplified = target / weight
    assert torch.allclose((weight * amplified).square().sum((1, 2, 3)),
                          target.square().sum((1, 2, 3)))


def test_the_corrected_minimum_is_the_map_where_matches_are_good():
    target, weight = parts()
    assert (texture_loss(target, target, weight) == 0).all()
    assert (texture_loss(target / weight, target, weight) > 1e-9).all()
    weight[:, :, 0] = 0
    other = target.clone()
    other[:, :, 0] = 100
    assert torch.allclose(texture_loss(other, target, weight),
                          torch.zeros(2, dtype=torch.float64))


def test_the_loss_is_that_of_loops_over_channels():
    target, weight = parts()
    f = target.flip(1)
    g = torch.zeros(2, 6, 6, dtype=torch.float64)
    for a in range(6):
        for b in range(6):
            g[:, a, b] = ((f[:, a] * f[:, b] - target[:, a] * target[:, b])
                          * weight[:, 0].square()).sum((1, 2))
    wanted = g.square().mean((1, 2)) / (4 * 120**2)
    assert torch.allclose(texture_loss(f, target, weight), wanted)
    literal = gram(f * weight) - gram(target)
    assert torch.allclose(texture_loss(f, target, weight, "literal"),
                          literal.flatten(1).norm(dim=1) / (4 * 120**2))
    with pytest.raises(ValueError, match="did you mean 'literal'"):
        texture_loss(f, target, weight, "litteral")


def test_the_released_weight_falls():
    w = torch.linspace(0, 1, 20)
    assert (released_weight(w).diff() < 0).all()
    assert torch.isclose(released_weight(torch.tensor(0.0325)), torch.tensor(0.5))


def test_logistic_regression_finds_the_weights_of_its_data():
    g = torch.Generator().manual_seed(3)
    u, truth = torch.randn(6_000, 2, generator=g), torch.tensor([2.0, -1.0, 0.3])
    y = torch.rand(6_000, generator=g) < torch.sigmoid(u @ truth[:2] + truth[2])
    found = fit_logistic(u, y)
    assert (found - truth).abs().max() < 0.2
    apart = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # separable: still finite
    assert fit_logistic(apart, torch.tensor([0, 1])).isfinite().all()


def test_area_under_the_curve_counts_pairs():
    g = torch.Generator().manual_seed(4)
    scores = torch.randint(6, (60,), generator=g).double()
    helps = torch.rand(60, generator=g) < 0.4
    pairs = [(a > b).double() + 0.5 * (a == b) for a in scores[helps]
             for b in scores[~helps]]
    assert area_under_curve(scores, helps) == pytest.approx(
        torch.stack(pairs).mean().item())


def test_filters_have_no_mean_and_see_their_own_period():
    bank = filter_bank()
    assert bank.sum((2, 3)).abs().max() < 1e-4
    assert torch.allclose(bank.square().sum((2, 3)), torch.ones(12, 2))


def test_texture_distance_forgives_a_shift_before_blur():
    x = scene_pairs(64, 4, ("noise",), seed=2)["x"].float() / 255
    changed = equal_error_changes(x, torch.Generator().manual_seed(0))
    error = {k: (v - x).square().mean((1, 2, 3)) for k, v in changed.items()}
    for value in error.values():
        assert torch.allclose(value, error["shift"], rtol=1e-3)
    far = {k: texture_distance(v, x).mean() for k, v in changed.items()}
    assert 2 * far["shift"] < min(far["blur"], far["noise"])
    flat = torch.full_like(x, 0.5)
    assert (texture_distance(flat, x) > 0.95).all()
