"""Constants and gradients of the defence slides' theory, two moving Gaussians,
ensembles of critics, trajectories.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from condgen import instability as ins
from condgen.divergences import js, kl, mixture
from condgen.games import (GAMES, minimax_discriminator, optimal_logit,
                           optimal_wasserstein)


def probs(*shape, seed=0):
    draws = torch.empty(shape, dtype=torch.float64).exponential_(
        generator=torch.Generator().manual_seed(seed))
    return draws / draws.sum(-1, keepdim=True)


@pytest.fixture(scope="module")
def game():
    """Real distributions, logits of generated ones, the best discriminator held
    still, and gradients in the logits.
    """
    p, theta = probs(50, 7), torch.randn(50, 7, dtype=torch.float64,
                                         generator=torch.Generator().manual_seed(1))
    theta.requires_grad_()
    still = optimal_logit(p, theta.detach().softmax(-1))
    slope = lambda f: torch.autograd.grad(f(theta.softmax(-1)).sum(), theta)[0]
    return p, theta.detach().softmax(-1), still, slope


# values -------------------------------------------------------------------------------


def test_generator_term_in_both_forms(game):
    p, q, still, _ = game
    term = (q * (1 - p / (p + q)).log()).sum(-1)
    assert (ins.generator_term_at_optimum(p, q) - term).abs().max() < 1e-9
    assert (ins.generator_term_at_optimum(p, q, "literal")
            - (term - math.log(2))).abs().max() < 1e-9
    whole = term + (p * (p / (p + q)).log()).sum(-1)
    assert (whole - 2 * js(p, q) + 2 * math.log(2)).abs().max() < 1e-9
    assert math.isclose(ins.generator_term_at_optimum(p[0], p[0]), -math.log(2),
                        abs_tol=1e-12)


def test_kl_to_both_on_disjoint_supports_in_both_forms(game):
    p, q, *_ = game
    a, b = torch.tensor([[0.4, 0.6, 0, 0], [0, 0, 0.9, 0.1]], dtype=torch.float64)
    assert ins.kl_to_mixture(a, b, "literal") == 0 and kl(b, a) == math.inf
    assert math.isclose(ins.kl_to_mixture(a, b), math.log(2))
    assert (ins.kl_to_mixture(p, q, "literal") < 0).all()
    assert (ins.kl_to_mixture(p, q) - kl(q, mixture(p, q))).abs().max() < 1e-12
    assert (ins.kl_to_mixture(p, q) - ins.kl_to_mixture(p, q, "literal")
            - math.log(2)).abs().max() < 1e-12


# gradients ----------------------------------------------------------------------------


def test_saturating_gradient_is_that_of_2_js_and_frozen_kl(game):
    p, _, still, slope = game
    step = slope(lambda q: (q * F.logsigmoid(-still)).sum(-1))
    for form in ("corrected", "frozen"):
        assert (slope(lambda q, form=form: ins.saturating_surrogate(p, q, form))
                - step).abs().max() < 1e-9
    literal = slope(lambda q: ins.saturating_surrogate(p, q, "literal"))
    assert (literal - step).abs().amax(1).min() > 1e-3
    assert (literal - step
            - slope(lambda q: (q * still.sigmoid()).sum(-1))).abs().max() < 1e-9


def test_non_saturating_gradient_is_that_of_kl_minus_2_js(game):
    p, q, still, slope = game
    step = slope(lambda q: -(q * F.logsigmoid(still)).sum(-1))
    assert ((slope(lambda q: ins.non_saturating_surrogate(p, q)) - step).abs().max()
            < 1e-9)
    for wrong in (lambda q: kl(q, p), lambda q: kl(p, q) - 2 * js(p, q),
                  lambda q: kl(q, p) - js(p, q)):
        assert (slope(wrong) - step).abs().max() > 1e-2
    assert ((ins.non_saturating_surrogate(p, q) - 2 * kl(mixture(p, q), p)).abs().max()
            < 1e-9)


def test_best_response_to_a_fixed_discriminator_is_one_point(game):
    p, q, still, _ = game
    for price in (F.logsigmoid(-still), -F.logsigmoid(still)):
        reply, others = ins.best_response(price), probs(300, 1, 7, seed=2)
        assert (torch.equal(reply.argmax(-1), (p / (p + q)).argmax(-1))
                and (reply.count_nonzero(-1) == 1).all())
        assert ((others * price).sum(-1) > (reply * price).sum(-1)).all()
    assert not torch.equal(ins.best_response(F.logsigmoid(still)).argmax(-1),
                           still.argmax(-1))
    with pytest.raises(ValueError, match="price"):
        ins.best_response(torch.tensor([1.0, math.nan]))


def test_unknown_forms_and_games_name_the_nearest():
    p = torch.tensor([0.5, 0.5])
    for f in (ins.generator_term_at_optimum, ins.saturating_surrogate,
              ins.kl_to_mixture):
        with pytest.raises(ValueError,
                           match="form='litteral'; accepted: .*did you mean 'literal'"):
            f(p, p, "litteral")
    for f in (lambda n: ins.negative_gradient(n, p), lambda n: ins.train_gaussian(n),
              lambda n: ins.train_discriminators(n, p)):
        with pytest.raises(ValueError, match="did you mean 'saturating'"):
            f("saturatin")


# two Gaussians ------------------------------------------------------------------------


def test_mean_push_equals_monte_carlo_gradient_of_the_losses():
    g, gap = torch.Generator().manual_seed(0), 1.5
    eps = torch.randn(400_000, dtype=torch.float64, generator=g)
    for name, game in GAMES.items():
        mean = torch.tensor(-gap, dtype=torch.float64, requires_grad=True)
        x = mean + eps
        logit = gap * x + gap**2 / 2  # as a function: held still
        value = {"least_squares": logit.sigmoid(), "hinge": torch.sign(logit),
                 "wasserstein": x}.get(name, logit)
        slope, = torch.autograd.grad(game.generator(value), mean)
        assert (abs(-slope - ins.negative_gradient(name, torch.tensor([gap]))[0])
                < 5e-3), name


def test_saturating_gradient_vanishes_with_the_gap():
    gap = torch.linspace(0.25, 12, 48, dtype=torch.float64)
    push = ins.negative_gradient("saturating", gap)
    assert (push > 0).all() and (push <= gap / 2 * (-gap.square() / 8).exp()).all()
    assert ((ins.negative_gradient("non_saturating", gap) + push - gap).abs().max()
            < 1e-9)  # D* and 1 − D* sum to one
    assert (ins.negative_gradient("saturating", gap, 0.3) - push
            - 0.3 * gap).abs().max() < 1e-12
    assert ((ins.negative_gradient("hinge", gap) == 0).all()
            and (ins.negative_gradient("wasserstein", gap) - 1).abs().max() < 1e-12)


@pytest.mark.parametrize(("mean", "std"), [(-3.0, 1.0), (-2.0, 0.5), (1.0, 1.7)])
def test_gaussian_wasserstein_critic_matches_discrete_critic(mean, std):
    line = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    on = lambda m, s: torch.softmax(-0.5 * ((line - m) / s).square(), 0)
    found = ins.optimal_discriminator_gaussians("wasserstein", line, mean,
                                                math.log(std)).diff()
    wanted = optimal_wasserstein(on(0.0, 1.0), on(mean, std), line).diff()
    inside = (line.abs() < 5)[1:]
    assert ((found - wanted).abs()[inside] > 1e-4).sum() <= 2


def test_gradient_flow_of_the_mean():
    ways = {game: ins.gap_under_gradient_flow(game, 3.0, 6.0, 120) for game in GAMES}
    assert all((way.diff() <= 0).all() for way in ways.values())
    assert ways["wasserstein"][60] < 0.06 and (ways["hinge"] == 3).all()
    way, bound = (ins.gap_under_gradient_flow("saturating", 6.0, 6.0, 120, 0.5),
                  6 * (-0.5 * torch.linspace(0, 6, 121)).exp())
    assert (way <= bound + 1e-3).all()
    assert ins.gap_under_gradient_flow("saturating", 6.0, 6.0, 60)[-1] > 5.8


# networks -----------------------------------------------------------------------------


def test_ensemble_members_are_independent():
    net = ins.ParallelMLPs(3, (2, 5, 1), torch.Generator().manual_seed(0))
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1))
    for k in range(3):
        hidden = F.leaky_relu(x[k] @ net.weights[0][k] + net.shifts[0][k], 0.2)
        assert torch.allclose(net(x)[k], hidden @ net.weights[1][k] + net.shifts[1][k],
                              atol=1e-6)
    for slope in torch.autograd.grad(net(x)[1].sum(), list(net.parameters())):
        assert (slope[[0, 2]] == 0).all() and (slope[1] != 0).any()
    same = ins.ParallelMLPs(3, (2, 5, 1), torch.Generator().manual_seed(0), same=True)
    assert (torch.equal(same(x[0])[0], same(x[0])[2])
            and not torch.equal(net(x[0])[0], net(x[0])[2]))
    with pytest.raises(ValueError, match="0 members"):
        ins.ParallelMLPs(0, (2, 1))


def test_trained_discriminator_gradients_match_the_optimum():
    gap = torch.tensor([1.0, 2.0, 8.0])
    found = ins.trained_negative_gradient(
        "saturating", ins.train_discriminators("saturating", gap, 3, 200), gap)
    exact = ins.negative_gradient("saturating", gap).float()
    assert (found.shape == (3, 3) and (found.mean(1) - exact).abs().max() < 0.15
            and found[2].abs().max() < 0.03)
    with pytest.raises(ValueError, match="multiple"):
        ins.trained_negative_gradient("saturating", ins.ParallelMLPs(4, (1, 2, 1)), gap)


def test_gradient_penalty_step_is_independent_per_member():
    gap = torch.tensor([1.0, 4.0])
    both = ins.train_discriminators("wasserstein", gap, 1, 1, seed=3)
    g = torch.Generator().manual_seed(3)
    start = ins.ParallelMLPs(2, (1, 16, 16, 1), g)
    pairs = zip(both.parameters(), start.parameters(), strict=True)
    moved = [(a - b).detach().abs().flatten(1).amax(1) for a, b in pairs]
    assert all((m <= 0.0101).all() for m in moved) and (moved[0] > 0.009).all()


def test_trajectories_are_deterministic_and_converge():
    args = {"gap": 4.0, "steps": 40, "exact": True}
    runs = {game: ins.train_gaussian(game, **args) for game in GAMES}
    assert all(torch.equal(a, b)
               for a, b in zip(vars(ins.train_gaussian("hinge", **args)).values(),
                               vars(runs["hinge"]).values(), strict=True))
    run = runs["saturating"]
    assert (run.samples.shape == (41, 64) and run.critic.shape == (41, len(run.grid))
            and run.mean[0] == -4)
    assert torch.allclose(run.samples.mean(1),
                          run.mean + run.std * ((run.samples[0] + 4).mean()), atol=1e-4)
    assert (runs["hinge"].mean[-1] == -4
            and run.mean[-1] < -3 < -0.5 < runs["non_saturating"].mean[-1])
    assert abs(runs["wasserstein"].mean[20] + 2) < 0.2
    assert ins.train_gaussian("saturating", 4.0, steps=40, exact=True,
                              weight=1.0).mean[-1] > -0.5
    learned = ins.train_gaussian("wasserstein", 4.0, steps=20, critic_steps=2)
    assert learned.mean[-1] > -3.8 and learned.samples.isfinite().all()


def test_minimax_value_is_the_sum_of_both_terms(game):
    items = torch.arange(2).repeat_interleave(torch.tensor([3, 1]))
    p, q = (torch.tensor([0.75, 0.25], dtype=torch.float64),
            torch.tensor([0.5, 0.5], dtype=torch.float64))
    logit = optimal_logit(p, q)
    value = -minimax_discriminator(logit[items], logit[torch.tensor([0, 0, 1, 1])])
    real_term = (p * F.logsigmoid(logit)).sum()
    assert math.isclose(value, ins.generator_term_at_optimum(p, q) + real_term,
                        abs_tol=1e-12)
