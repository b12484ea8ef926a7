"""Solvable worlds: where a model has an optimum or equilibrium in closed form, training
reaches it.
"""

import math

import pytest
import torch
from bars import seeded

from condgen.controller import balance_error
from condgen.divergences import gaussian_log_prob, kl_gaussian, monte_carlo
from condgen.games import non_saturating_generator
from condgen.solvable import (
    LinearAVAE, LinearVAE, autoencoder_error, began_balance, best_encoder, latent_kl,
    linear_elbo, ppca_optimum, principal_angle, rest_decoder, signed_alpha, spectrum,
    train_balance, train_linear_vae)
from condgen.stability import StabilityKit

float64 = torch.float64
SPECTRA = [(9.0, 4.0, 1.5, 0.5, 0.3), (3.0, 2.5, 2.0, 1.0), (5.0, 0.2, 0.1)]
WORLDS = [LinearAVAE(), LinearAVAE(kl_weight=0.6), LinearAVAE(alpha=0.0),
          LinearAVAE(2.0, 3.0, 0.5, 1.0, 0.3), LinearAVAE(gamma=0.1, kl_weight=1.0),
          LinearAVAE(alpha=0.0, gamma=0.0)]


def covariance(eigenvalues, seed=0):
    n = len(eigenvalues)
    axes = torch.linalg.qr(torch.randn(n, n, generator=seeded(seed), dtype=float64))[0]
    cov = axes @ torch.tensor(eigenvalues, dtype=float64).diag() @ axes.T
    return (cov + cov.T) / 2


def expected_log_likelihood(cov, W, variance):
    """Mean log density of N(0, W Wᵀ + variance I) over data with a covariance."""
    model = W @ W.T + variance * torch.eye(len(cov), dtype=float64)
    spread = torch.linalg.solve(model, cov).trace()
    return -(len(cov) * math.log(2 * math.pi) + model.logdet() + spread) / 2


def random_vae(d, k, seed=0):
    g = seeded(seed)
    return LinearVAE(*(0.5 * torch.randn(size, generator=g, dtype=float64)
                       for size in ((d, k), (k, d), (k,), ())))


def distance(end, expected):
    return max(abs(x - y) for x, y in zip(end, expected, strict=True))


# Linear VAE


@pytest.mark.parametrize("kl_weight", [1.0, 0.3])
def test_bound_in_closed_form_is_the_mean_of_drawn_ones(kl_weight):
    cov, vae, g = covariance(SPECTRA[0]), random_vae(5, 2), seeded(1)
    root = torch.linalg.cholesky(cov)
    x = torch.randn(100_000, 5, generator=g, dtype=float64) @ root.T
    mean = x @ vae.V.T
    z = mean + vae.log_std.exp() * torch.randn(len(x), 2, generator=g, dtype=float64)
    drawn = monte_carlo(gaussian_log_prob(x, z @ vae.W.T, vae.log_noise)
                        - kl_weight * kl_gaussian(mean, vae.log_std))
    exact = linear_elbo(cov, *vae, kl_weight)
    assert abs(drawn.value - exact) < 5 * drawn.error < 0.02 * abs(exact)


@pytest.mark.parametrize("eigenvalues", SPECTRA)
def test_no_neighbour_of_the_optimum_has_a_larger_likelihood(eigenvalues):
    cov, g = covariance(eigenvalues), seeded(2)
    best = ppca_optimum(cov, 2)
    assert torch.isclose(expected_log_likelihood(cov, best.W, best.variance),
                         best.log_likelihood, rtol=1e-12)
    for _ in range(50):
        W = best.W + 0.05 * torch.randn(best.W.shape, generator=g, dtype=float64)
        for factor in (0.9, 1.0, 1.1):
            assert (expected_log_likelihood(cov, W, factor * best.variance)
                    < best.log_likelihood)


@pytest.mark.parametrize(("eigenvalues", "k"), [
    (SPECTRA[0], 2), (SPECTRA[0], 4), (SPECTRA[1], 1), (SPECTRA[1], 3), (SPECTRA[2], 1)])
def test_linear_vae_trains_to_principal_components(eigenvalues, k):
    cov = covariance(eigenvalues, seed=k)
    best, found = ppca_optimum(cov, k), train_linear_vae(cov, k, generator=seeded(k))
    gram = found.W.T @ found.W
    assert principal_angle(best.W, found.W) < 1e-4
    assert abs((2 * found.log_noise).exp() - best.variance) < 1e-4
    assert abs(linear_elbo(cov, *found) - best.log_likelihood) < 1e-4
    assert (gram - gram.diag().diag()).abs().max() < 1e-4
    assert torch.allclose(gram.diag().sort(descending=True).values,
                          best.W.square().sum(0), atol=1e-4)


def test_rotated_latents_leave_the_gap_of_a_diagonal_encoder():
    cov = covariance(SPECTRA[0])
    best = ppca_optimum(cov, 3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=seeded(), dtype=float64))[0]
    for W in (best.W, best.W @ turn):
        M = W.T @ W + best.variance * torch.eye(3, dtype=float64)
        gap = (M.diag().log().sum() - M.logdet()) / 2
        bound = linear_elbo(cov, W, *best_encoder(W, best.variance),
                            best.variance.log() / 2)
        assert abs(best.log_likelihood - bound - gap) < 1e-10
    assert gap > 0.01


def test_no_other_encoder_has_a_larger_bound():
    cov, vae, g = covariance(SPECTRA[0]), random_vae(5, 2), seeded(3)
    V, log_std = best_encoder(vae.W, 0.7)
    bound = lambda V, log_std: linear_elbo(cov, vae.W, V, log_std,
                                           torch.tensor(0.7, dtype=float64).log() / 2)
    best = bound(V, log_std)
    for _ in range(50):
        moved = [p + 0.05 * torch.randn(p.shape, generator=g, dtype=float64)
                 for p in (V, log_std)]
        assert bound(*moved) < best


@pytest.mark.parametrize("weight", [0.5, 1.4, 2.8, 5.6, 11.0])
def test_latents_below_the_weighted_noise_collapse(weight):
    eigenvalues = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=float64)
    cov = covariance(eigenvalues.tolist())
    vae = train_linear_vae(cov, 4, 0.5, weight, generator=seeded())
    kl = vae.latent_kl(cov).sort(descending=True).values
    assert torch.allclose(kl, latent_kl(eigenvalues, 0.5, weight), atol=1e-4)
    assert (kl > 1e-4).sum() == (eigenvalues > 0.5 * weight).sum()


def test_learned_noise_of_a_weighted_kl():
    cov = covariance((6.0, 3.0, 0.5, 0.3, 0.2))
    vae = train_linear_vae(cov, 2, kl_weight=1.2, generator=seeded())
    assert abs((2 * vae.log_noise).exp() - 1 / (5 - 1.2 * 2)) < 1e-4


# BEGAN and AVAE


@pytest.mark.parametrize("world", WORLDS)
def test_no_player_gains_alone_at_rest(world):
    """Slopes of the own loss by automatic differentiation, and larger losses beside."""
    start = world.unbalanced().a
    for share in (0.0, 0.2, 0.5, 0.8, 0.99):
        at = world.at(start + (1 - start) * share)
        rest = torch.tensor([at.a, at.b, at.m, math.log(at.std)], dtype=float64)
        state = rest.clone().requires_grad_()
        losses = world.objectives(*state, at.k)
        for name, own in (("discriminator", [0]), ("decoder", [1]), ("encoder", [2, 3])):
            [slope] = torch.autograd.grad(losses[name], state, retain_graph=True)
            assert slope[own].abs().max() < 1e-10
            for i in own:
                for step in (-0.01, 0.01):
                    moved = rest.clone()
                    moved[i] += step
                    assert world.objectives(*moved, at.k)[name] > losses[name]


@pytest.mark.parametrize("set_point", [0.2, 0.34, 0.5, 0.9, 0.99])
def test_began_is_the_game_without_the_vae(set_point):
    closed = began_balance(1.0, 2.0, set_point)
    assert distance(LinearAVAE(alpha=0, gamma=0).fixed_point(set_point), closed) < 1e-9
    real, samples = (autoencoder_error(closed.a, v, 2.0) for v in (1.0, closed.b**2))
    error = balance_error(real, samples, set_point=set_point)
    assert (error < -0.05 and closed.k == 0) if set_point < 1 / 3 else abs(error) < 1e-12


BEGAN = WORLDS[-1]


@pytest.mark.parametrize(("world", "set_point"), [
    (BEGAN, 0.25), (BEGAN, 0.5), (BEGAN, 0.8), (WORLDS[0], 0.4), (WORLDS[0], 0.5),
    (WORLDS[0], 1.1), (WORLDS[1], 0.6), (WORLDS[1], 1.05), (WORLDS[4], 0.7)])
def test_training_reaches_the_fixed_point(world, set_point):
    end = train_balance(world, set_point, generator=seeded(4))
    assert distance(end, world.fixed_point(set_point)) < 1e-4
    lowest, _ = world.reachable()
    if set_point < lowest:
        assert end.k == 0 and world.ratio(end) > set_point + 0.01
    else:
        assert abs(world.ratio(end) - set_point) < 1e-4


@pytest.mark.parametrize("set_point", [0.4, 0.6])
def test_printed_sign_settles_where_its_own_error_is_zero(set_point):
    world = WORLDS[0]
    end = train_balance(world, set_point, "literal", generator=seeded(5))
    real, samples, reconstructions = world.errors(*end[:4])
    assert distance(end, world.fixed_point(set_point, "literal")) < 1e-4
    assert abs(set_point * real - samples + world.alpha * reconstructions) < 1e-4
    assert world.ratio(end) > set_point + 0.3


def test_forms_differ_by_twice_the_error_of_reconstructions():
    world, at = WORLDS[0], WORLDS[0].at(0.6)
    real, _, reconstructions = world.errors(*at[:4])
    gap = world.ratio(at) - world.ratio(at, "literal")
    assert gap == pytest.approx(2 * world.alpha * reconstructions / real)
    assert signed_alpha(0.3) == 0.3 == -signed_alpha(0.3, "literal")


@pytest.mark.parametrize("world", WORLDS)
def test_samples_have_spread_where_both_inequalities_hold(world):
    rho = world.kl_weight / (2 * world.gamma) if world.gamma else math.inf
    seen = set()
    for a in torch.linspace(0.05, 0.95, 91).tolist():
        expected = rho < world.variance and ((1 - a) ** 2 * (1 + world.alpha) * rho
                                             < world.gamma * (world.variance - rho))
        b = rest_decoder(a, world.variance, world.alpha, world.gamma, world.kl_weight)
        assert (b > 0) == expected
        seen.add(expected)
    assert True in seen or rho >= world.variance


@pytest.mark.parametrize("world", WORLDS)
def test_ratio_and_weight_rise_along_the_states_at_rest(world):
    low = world.unbalanced().a
    curve = [world.at(low + (1 - low) * i / 100) for i in range(100)]
    for values in ([at.k for at in curve], [world.ratio(at) for at in curve]):
        assert (torch.tensor(values, dtype=float64).diff() > 0).all()
    assert abs(curve[0].k) < 1e-12 and curve[-1].k < 1 / (1 + world.alpha)
    assert world.ratio(curve[-1]) < world.reachable()[1]


def test_reconstruction_loss_raises_the_lowest_set_point():
    lowest = [LinearAVAE(gamma=g).reachable()[0] for g in (1e-6, 0.5, 1.0, 2.0)]
    assert lowest == sorted(lowest)
    assert lowest[0] == pytest.approx(1.3 / 3) and BEGAN.reachable() == (
        pytest.approx(1 / 3), 1)


# A linear GAN


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_linear_gan_follows_its_eigenvalues(gamma, h=0.3, steps=60):
    """Simultaneous steps with the losses of the stability kit, near the equilibrium."""
    kit, at = StabilityKit(r1=gamma), torch.full((2,), 1e-4, dtype=float64)
    real, first = torch.zeros(4, 1, dtype=float64), at
    for _ in range(steps):
        theta, psi = (p.requires_grad_() for p in at.clone().unbind())
        critic, fake = lambda x: psi * x[:, 0], real + theta  # noqa: B023
        d = sum(w * value for w, value in
                kit.discriminator_terms(critic, real, fake).values())
        g = non_saturating_generator(critic(fake))
        slope = [torch.autograd.grad(loss, p)[0] for loss, p in ((g, theta), (d, psi))]
        at = at - h * torch.stack(slope)
    step = torch.tensor([[1, h / 2], [-h / 2, 1 - h * gamma]], dtype=float64)
    expected = torch.linalg.matrix_power(step, steps) @ first
    assert (at - expected).norm() < 1e-3 * expected.norm()
    mu = (-gamma + torch.tensor(gamma**2 - 1 + 0j).sqrt()) / 2  # the slower eigenvalue
    rate = abs(1 + h * mu).item()
    assert torch.linalg.eigvals(step).abs().max().item() == pytest.approx(rate, abs=1e-4)
    assert (at.norm() > first.norm()) == (rate > 1) == (gamma == 0)


# What is refused


@pytest.mark.parametrize("cov", [
    None, torch.ones(3), torch.ones(2, 3), torch.eye(2).int(), -torch.eye(2),
    torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.full((2, 2), math.nan)])
def test_covariances_that_are_none_are_refused(cov):
    for call in (spectrum, lambda c: ppca_optimum(c, 1), lambda c: train_linear_vae(c, 1)):
        with pytest.raises(ValueError, match="accepted"):
            call(cov)


@pytest.mark.parametrize("call", [
    lambda: ppca_optimum(torch.eye(3), 3), lambda: ppca_optimum(torch.eye(3), 0),
    lambda: ppca_optimum(torch.tensor([1.0, 1.0, 0.0]).diag(), 2),
    lambda: latent_kl(torch.ones(2), 0.0), lambda: latent_kl(torch.ones(2), 1.0, -1.0),
    lambda: train_linear_vae(torch.eye(2), 1, variance=0.0),
    lambda: train_linear_vae(torch.eye(2), 1, steps=0),
    lambda: began_balance(1.0, 2.0, 1.0), lambda: began_balance(0.0, 2.0, 0.5),
    lambda: LinearAVAE(noise=0.0), lambda: LinearAVAE(alpha=-1.0),
    lambda: LinearAVAE().fixed_point(1.3), lambda: LinearAVAE().fixed_point(-0.5),
    lambda: LinearAVAE().fixed_point(0.7, "literal"),
    lambda: train_balance(LinearAVAE(), 0.5, "printed"),
    lambda: train_balance(LinearAVAE(), 0.5, steps=0),
    lambda: train_balance(LinearAVAE(), 0.5, generator=3)])
def test_values_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="accepted"):
        call()
