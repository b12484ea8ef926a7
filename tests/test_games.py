"""Laws of condgen.games: each loss at its best critic, where a generator's step
leads, the penalty, errors.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen import bounds
from condgen import divergences as dv
from condgen import games as gm

EXACT = 1e-9  # float64: every identity below is a finite sum
LOG2 = math.log(2)

seeds = st.integers(0, 2**31)
sizes = st.integers(2, 7)
laws = settings(max_examples=30, deadline=None, derandomize=True)


def batch(seed: int, n: int, items: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Outcomes of a batch in which each of n occurs, and the
    distribution that the batch is.
    """
    g = torch.Generator().manual_seed(seed)
    counts = 1 + torch.bincount((n * torch.rand(items, generator=g) ** 2).long(),
                                minlength=n)
    return torch.arange(n).repeat_interleave(counts), counts.double() / counts.sum()


def pair(seed: int, n: int):
    """Real and generated batches of outcomes with their
    distributions: real, p, fake, q.
    """
    return *batch(seed, n), *batch(seed + 1, n, items=70)


def joint(seed: int, nx: int, nc: int) -> torch.Tensor:
    """A random p(x, c)."""
    draws = torch.empty(nx, nc, dtype=torch.float64).exponential_(
        generator=torch.Generator().manual_seed(seed))
    return draws / draws.sum()


def close(a, b, tol=EXACT) -> bool:
    return bool(torch.as_tensor(a, dtype=torch.float64).sub(b).abs().max() < tol)


def step(theta, price):
    """Gradient in θ of the mean price of q = softmax(θ), the prices held fixed."""
    return torch.autograd.grad((theta.softmax(0) * price).sum(), theta)[0]


def slope(theta, divergence):
    """Gradient in θ of a divergence of q = softmax(θ)."""
    return torch.autograd.grad(divergence(theta.softmax(0)), theta)[0]


def prices(loss, values):
    """What a generator's loss asks for each outcome."""
    return torch.stack([loss(v[None]) for v in values])


# values at the best critic ------------------------------------------------------------

@laws
@given(seeds, sizes)
def test_minimax_at_the_optimal_discriminator(seed, n):
    real, p, fake, q = pair(seed, n)
    best = gm.optimal_logit(p, q)
    assert close(best.sigmoid(), p / (p + q))
    assert close(gm.minimax_discriminator(best[real], best[fake]),
                 2 * LOG2 - 2 * dv.js(p, q))
    assert close(gm.saturating_generator(best[fake]), dv.kl(q, dv.mixture(p, q)) - LOG2)
    assert close(gm.non_saturating_generator(best[fake]),
                 (q * ((p + q) / p).log()).sum())


@laws
@given(seeds, sizes)
def test_least_squares_at_the_best_critic(seed, n):
    real, p, fake, q = pair(seed, n)
    m = dv.mixture(p, q)
    for a, b in ((0.0, 1.0), (-1.0, 1.0), (2.0, -1.0)):
        best = gm.optimal_least_squares(p, q, a, b)
        expected = (b - a) ** 2 / 4 * (1 - gm.chi_square(q, m))
        assert close(gm.least_squares_discriminator(best[real], best[fake], a, b),
                     expected)
    both = gm.optimal_least_squares(p, q, -1.0, 1.0)
    value = (gm.least_squares_generator(both[real], 0.0)
             + gm.least_squares_generator(both[fake], 0.0))
    assert close(value, gm.chi_square(q, m))


@laws
@given(seeds, sizes)
def test_hinge_at_the_best_critic(seed, n):
    real, p, fake, q = pair(seed, n)
    best = gm.optimal_hinge(p, q)
    assert close(gm.hinge_discriminator(best[real], best[fake]),
                 2 - 2 * gm.total_variation(p, q))
    assert close(gm.hinge_generator(best[fake]), -(q * best).sum())


@laws
@given(seeds, sizes)
def test_wasserstein_at_the_best_critic(seed, n):
    real, p, fake, q = pair(seed, n)
    x = torch.rand(n, dtype=torch.float64,
                   generator=torch.Generator().manual_seed(seed)).add(0.1).cumsum(0)
    best = gm.optimal_wasserstein(p, q, x)
    assert ((best[:, None] - best).abs() <= (x[:, None] - x).abs() + EXACT).all()
    assert close(gm.wasserstein_critic(best[real], best[fake]),
                 -gm.earth_mover(p, q, x))
    assert close(gm.wasserstein_generator(best[fake]), -(q * best).sum())
    assert (close(gm.earth_mover(p, q, x + 3), gm.earth_mover(q, p, x))
            and close(gm.earth_mover(p, p, x), 0))


@laws
@given(seeds, sizes)
def test_no_other_critic_is_better(seed, n):
    real, p, fake, q = pair(seed, n)
    games = {"saturating": gm.optimal_logit(p, q),
             "least_squares": gm.optimal_least_squares(p, q),
             "hinge": gm.optimal_hinge(p, q)}
    g = torch.Generator().manual_seed(seed)
    for name, best in games.items():
        critic = gm.GAMES[name].critic
        least = critic(best[real], best[fake])
        for scale in (0.01, 0.3, 3.0):
            other = best + scale * torch.randn(n, dtype=torch.float64, generator=g)
            assert critic(other[real], other[fake]) >= least - EXACT
    x = torch.arange(n, dtype=torch.float64)
    for _ in range(10):
        lipschitz = torch.nn.functional.pad(
            (2 * torch.rand(n - 1, generator=g).double() - 1).cumsum(0), (1, 0))
        value = gm.wasserstein_critic(lipschitz[real], lipschitz[fake])
        assert value >= -gm.earth_mover(p, q, x) - EXACT


def test_earth_mover_is_a_linear_programme():
    from scipy.optimize import linprog

    _, p, _, q = pair(3, 6)
    x = torch.tensor([0.0, 0.4, 1.5, 2.0, 3.1, 5.0], dtype=torch.float64)
    rows = torch.cat([torch.eye(6).repeat_interleave(6, 1), torch.eye(6).repeat(1, 6)])
    plan = linprog((x[:, None] - x).abs().flatten().numpy(), A_eq=rows.numpy(),
                   b_eq=torch.cat([p, q]).numpy())
    assert abs(plan.fun - gm.earth_mover(p, q, x)) < EXACT


@pytest.mark.parametrize("name", ["saturating", "least_squares"])
def test_gradient_descent_converges_to_the_best_critic(name):
    real, p, fake, q = pair(5, 4)
    best = {"saturating": gm.optimal_logit,
            "least_squares": gm.optimal_least_squares}[name](p, q)
    table = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(1200):
        grad, = torch.autograd.grad(gm.GAMES[name].critic(table[real], table[fake]),
                                    table)
        with torch.no_grad():
            table -= (8.0 if name == "saturating" else 1.0) * grad
    assert close(table.detach(), best, 1e-6)


def test_divergences_of_equal_and_disjoint_distributions():
    left, right = torch.eye(2, dtype=torch.float64)
    assert gm.total_variation(left, right) == 1 and gm.total_variation(left, left) == 0
    assert (gm.chi_square(left, dv.mixture(left, right)) == 1
            and gm.chi_square(left, left) == 0)
    assert gm.chi_square(dv.mixture(left, right), left) == math.inf
    best = gm.optimal_logit(left, right)
    assert (best.tolist() == [math.inf, -math.inf]
            and gm.optimal_hinge(left, left).tolist() == [0, 0])


# what each generator is told ----------------------------------------------------------

def test_generator_terms_at_equality():
    tie = torch.zeros(5, dtype=torch.float64)
    assert (close(gm.saturating_generator(tie), -LOG2)
            and close(gm.non_saturating_generator(tie), LOG2))
    assert close(gm.minimax_discriminator(tie, tie), 2 * LOG2)


def test_gradients_of_saturating_and_non_saturating_losses():
    logits = torch.tensor([-8.0, 0.0, 8.0], dtype=torch.float64, requires_grad=True)
    by_saturating = torch.autograd.grad(3 * gm.saturating_generator(logits), logits)[0]
    by_other = torch.autograd.grad(3 * gm.non_saturating_generator(logits), logits)[0]
    assert (close(by_saturating, -logits.sigmoid().detach())
            and close(by_other, logits.sigmoid().detach() - 1))
    assert by_saturating[0].abs() < 1e-3 < 0.999 < by_other[0].abs()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = (gm.minimax_discriminator(logits, logits) + gm.saturating_generator(logits)
            + gm.non_saturating_generator(logits))
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


@laws
@given(seeds, sizes)
def test_generator_gradients_are_those_of_known_divergences(seed, n):
    _, p, _, q = pair(seed, n)
    x, theta = torch.arange(n, dtype=torch.float64), q.log().requires_grad_()
    values = gm.optimal_logit(p, q)
    m = lambda q: dv.mixture(p, q)  # noqa: E731
    known = {
        (gm.saturating_generator, values): lambda q: 2 * dv.js(p, q),
        (gm.non_saturating_generator, values): lambda q: 2 * dv.kl(m(q), p),
        (gm.least_squares_generator, gm.optimal_least_squares(p, q)):
            lambda q: dv.kl(p, m(q)) - gm.chi_square(p, m(q)) / 4,
        (gm.wasserstein_generator,
         gm.optimal_wasserstein(p, q, x)): lambda q: gm.earth_mover(p, q, x),
        (gm.hinge_generator,
         gm.optimal_hinge(p, q)): lambda q: 2 * gm.total_variation(p, q),
    }
    for (loss, critic), divergence in known.items():
        assert close(step(theta, prices(loss, critic)),
                     slope(theta, divergence)), loss.__name__
    assert close(dv.kl(q, p) - 2 * dv.js(p, q), 2 * dv.kl(m(q), p))


def test_symmetric_least_squares_gradient_differs_from_value():
    p, q = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
    theta = q.log().requires_grad_()
    price = 0.5 * gm.optimal_least_squares(p, q, -1.0, 1.0).square()
    towards = slope(theta, lambda q: gm.chi_square(q, dv.mixture(p, q)))
    assert torch.cosine_similarity(step(theta, price), towards, dim=0) < 0.9


def test_games_by_name():
    assert list(gm.GAMES) == ["saturating", "non_saturating", "least_squares", "hinge",
                              "wasserstein"]
    real, fake = torch.randn(2, 9, dtype=torch.float64,
                             generator=torch.Generator().manual_seed(0))
    better = fake + 0.1 * (fake < 0.9)
    for name, game in gm.GAMES.items():
        assert game.critic(real, fake).shape == game.generator(fake).shape == ()
        # a generator wants higher values
        assert game.generator(better) < game.generator(fake), name
        assert game.critic(real + 0.1 * (real < 0.9), fake) < game.critic(
            real, fake), name  # real ones higher
        # and generated ones lower
        assert game.critic(real, fake + 5) > game.critic(real, fake), name
    assert close(gm.GAMES["saturating"].generator(torch.zeros(1)), -LOG2, 1e-6)
    assert close(gm.GAMES["non_saturating"].generator(torch.zeros(1)), LOG2, 1e-6)
    with pytest.raises(AttributeError):
        gm.GAMES["hinge"].critic = gm.minimax_discriminator


def test_every_game_is_the_losses_of_its_paper():
    real, fake = torch.randn(2, 9, dtype=torch.float64,
                             generator=torch.Generator().manual_seed(1))
    cross = -real.sigmoid().log().mean() - (1 - fake.sigmoid()).log().mean()
    squares = ((real - 1).square().mean() + fake.square().mean()) / 2
    margins = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    wanted = {
        "saturating": (cross, (1 - fake.sigmoid()).log().mean()),
        "non_saturating": (cross, -fake.sigmoid().log().mean()),
        "least_squares": (squares, (fake - 1).square().mean() / 2),
        "hinge": (margins, -fake.mean()),
        "wasserstein": (fake.mean() - real.mean(), -fake.mean()),
    }
    for name, game in gm.GAMES.items():
        assert (close(game.critic(real, fake), wanted[name][0])
                and close(game.generator(fake), wanted[name][1])), name


# gradient penalty ---------------------------------------------------------------------

@laws
@given(seeds, st.sampled_from([(4,), (4, 3), (4, 3, 2, 2)]), st.floats(0, 4))
def test_penalty_of_a_linear_critic(seed, shape, norm):
    g = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(2, *shape, dtype=torch.float64, generator=g)
    w = torch.randn(shape[1:], dtype=torch.float64, generator=g)
    w = norm * w / w.norm()
    critic = lambda x: (x * w).reshape(len(x), -1).sum(1)  # noqa: E731
    penalty = gm.gradient_penalty(critic, real, fake,
                                  torch.rand(4, dtype=torch.float64, generator=g))
    assert close(penalty, (norm - 1) ** 2, 1e-8)


def test_penalty_is_evaluated_between_real_and_fake():
    real, fake = torch.full((2, 1), 4.0), torch.zeros(2, 1)
    critic = lambda x: 0.5 * x.square().sum(1)  # noqa: E731  slope x
    assert gm.gradient_penalty(critic, real, fake, torch.tensor([1.0, 1.0])) == 9
    assert gm.gradient_penalty(critic, real, fake, torch.tensor([0.0, 0.0])) == 1
    assert (gm.gradient_penalty(critic, real, fake, torch.tensor([0.5, 0.75]))
            == (1 + 4) / 2)


def test_penalty_gradient_reaches_the_critic_only():
    w = torch.tensor([3.0], requires_grad=True)
    real, fake = torch.ones(2, 1), torch.zeros(2, 1, requires_grad=True)
    penalty = gm.gradient_penalty(lambda x: (x * w).sum(1), real, fake, torch.rand(2))
    assert torch.autograd.grad(penalty, w, retain_graph=True)[0] == 4
    assert torch.autograd.grad(penalty, fake, allow_unused=True)[0] is None


def test_slope_of_a_penalised_critic():
    """On one gap the penalised critic has the slope 1 + h / 2λr with r = 1."""
    real, fake, u = (torch.full((10,), 1.0), torch.zeros(10),
                     torch.linspace(0.05, 0.95, 10))
    s = torch.tensor(1 + 1 / 20.0, requires_grad=True)
    loss = (gm.wasserstein_critic(s * real, s * fake)
            + 10 * gm.gradient_penalty(lambda x: s * x, real, fake, u))
    assert (torch.autograd.grad(loss, s)[0].abs() < 1e-5
            and abs(loss + 1 + 1 / 40) < 1e-6)


# pairs --------------------------------------------------------------------------------

@laws
@given(seeds, sizes, sizes)
def test_optimal_classifier_of_real_and_generated_pairs(seed, nx, nc):
    p, q = joint(seed, nx, nc), joint(seed + 1, nx, nc)
    best, mixed = gm.optimal_classifier(p, q), (p + q) / 2
    price = lambda c: -((p + q) * c.log()).sum()  # noqa: E731
    assert close(best.sum(1), 1) and close(best, mixed / mixed.sum(1, keepdim=True))
    assert close(price(best),
                 2 * (dv.entropy(mixed.sum(0)) - bounds.mutual_information(mixed)))
    assert (price(joint(seed + 2, nx, nc).softmax(1)) >= price(best) - EXACT).all()
    assert close(gm.optimal_classifier(p, p), p / p.sum(1, keepdim=True))


@laws
@given(seeds, sizes, sizes)
def test_logit_of_pairs_splits(seed, nx, nc):
    p, q = joint(seed, nx, nc), joint(seed + 1, nx, nc)
    fit = (p / p.sum(1, keepdim=True)).log() - (q / q.sum(1, keepdim=True)).log()
    split = gm.optimal_logit(p.sum(1), q.sum(1))[:, None] + fit
    assert close(split.flatten(), gm.optimal_logit(p.flatten(), q.flatten()))


# errors -------------------------------------------------------------------------------

good, bad, three = (torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.6]),
                    torch.tensor([0.2, 0.3, 0.5]))
items, u = torch.zeros(3, 2), torch.zeros(3)


@pytest.mark.parametrize("call, says", [
    (lambda: gm.optimal_logit(good, bad), "q must be probabilities"),
    (lambda: gm.optimal_least_squares(bad, good), "p must be probabilities"),
    (lambda: gm.optimal_hinge(bad, good), "p must be probabilities"),
    (lambda: gm.total_variation(good, bad), "q must be probabilities"),
    (lambda: gm.chi_square(good, bad), "q must be probabilities"),
    (lambda: gm.earth_mover(good, good, torch.tensor([1.0, 0.0])),
     "accepted: increasing positions"),
    (lambda: gm.optimal_wasserstein(good, good, torch.arange(3.0)),
     r"positions of shape \(3,\)"),
    (lambda: gm.optimal_classifier(torch.ones(2, 2), torch.eye(2) / 2),
     "real must be probabilities"),
    (lambda: gm.earth_mover(good, three, torch.arange(2.0)),
     "accepted: the same last axis"),
    (lambda: gm.earth_mover(good, good, torch.tensor([0.0, math.inf])),
     "accepted: increasing.*finite"),
    (lambda: gm.earth_mover(good, good, [0.0, 1.0]), "positions of type list"),
    (lambda: gm.optimal_classifier(torch.ones(2, 2) / 4, torch.ones(2, 3) / 6),
     r"fake \(2, 3\); accepted: the same"),
    (lambda: gm.gradient_penalty(torch.sum, items, torch.zeros(2, 2), u),
     r"fake \(2, 2\)"),
    (lambda: gm.gradient_penalty(torch.sum, items, items, u[:, None]), r"u \(3, 1\)"),
    (lambda: gm.gradient_penalty(torch.sum, items, items, u + 5), "from 0 to 1"),
    (lambda: gm.gradient_penalty(lambda x: x, items, items, u),
     r"values \(3, 2\) for items \(3, 2\); accepted: one"),
    (lambda: gm.gradient_penalty(lambda x: u, items, items, u),
     "accepted: one value for each item"),
    (lambda: gm.gradient_penalty(lambda x: u.clone().requires_grad_(), items, items, u),
     "that depends on it"),
    *((lambda f=f: f(good, three), r"q \(3,\); accepted: the same last axis")
      for f in (gm.optimal_logit, gm.optimal_least_squares, gm.chi_square,
                gm.optimal_hinge, gm.total_variation))])
def test_errors_name_what_was_given(call, says):
    with pytest.raises(ValueError, match=says):
        call()
