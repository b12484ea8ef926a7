"""Laws of condgen.divergences: inequalities with their exact gaps, two routes to
each number, errors.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condgen import bounds
from condgen import divergences as dv

EXACT = 1e-12  # float64: every identity below is a finite sum
LOG2 = math.log(2)

sizes = st.integers(2, 7)
seeds = st.integers(0, 2**31)
laws = settings(max_examples=40, deadline=None, derandomize=True)


def probs(seed: int, *shape: int, zeros: bool = False) -> torch.Tensor:
    """Random distributions over the last axis, uniform on the simplex; some
    entries exactly 0 if asked.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
    if zeros:
        draws[..., 1:] *= torch.rand(draws[..., 1:].shape, generator=generator) < 0.6
    return draws / draws.sum(-1, keepdim=True)


def close(a, b, tol=EXACT):
    return torch.as_tensor(a, dtype=torch.float64).sub(b).abs().max() < tol


def model(seed: int, n: int, nc: int, nz: int):
    """p(c), encoder q(z|c), classifier p(c|z), prior p(z) of n random models."""
    return (probs(seed, n, nc), probs(seed + 1, n, nc, nz), probs(seed + 2, n, nz, nc),
            probs(seed + 3, n, nz))


def target(p_c, classifier, prior):
    """Mean log-likelihood of the conditions, the quantity CAGlow's
    Eq. 7 wants to bound.
    """
    return (p_c * (prior[..., None, :] @ classifier).squeeze(-2).log()).sum(-1)


# entropy, cross entropy, KL -----------------------------------------------------------

@laws
@given(seeds, sizes)
def test_entropy_lies_between_certain_and_uniform(seed, n):
    values = dv.entropy(probs(seed, 20, n, zeros=True))
    assert (values >= 0).all() and (values <= math.log(n) + EXACT).all()
    assert dv.entropy(torch.eye(n, dtype=torch.float64)).eq(0).all()
    assert close(dv.entropy(torch.full((n,), 1 / n, dtype=torch.float64)), math.log(n))


@laws
@given(seeds, sizes)
def test_gibbs(seed, n):
    p, q = probs(seed, 50, n), probs(seed + 1, 50, n)
    gap = dv.gibbs_gap(p, q)
    assert (gap > 0).all()
    assert close(dv.gibbs_gap(p, p), 0)
    assert close(gap, dv.kl(p, q))
    # Pinsker: the gap closes only where p = q
    assert (gap >= 0.5 * (p - q).abs().sum(-1) ** 2).all()


def test_zero_probabilities():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.4, 0.4, 0.2])
    assert (dv.kl(q, p) == math.inf and dv.cross_entropy(q, p) == math.inf
            and dv.gibbs_gap(q, p) == math.inf)
    assert torch.isclose(dv.kl(p, q), torch.tensor(math.log(1.25)))
    assert torch.isclose(dv.js(torch.eye(2)[0], torch.eye(2)[1]), torch.tensor(LOG2))


def test_gradients_are_finite_at_zero_probabilities():
    p = torch.tensor([0.0, 0.4, 0.6], requires_grad=True)
    q = torch.tensor([0.0, 0.5, 0.5], requires_grad=True)
    (dv.entropy(p) + dv.kl(p, q) + dv.js(p, q)).backward()
    assert p.grad.isfinite().all() and q.grad.isfinite().all()


def test_kl_is_not_symmetric_and_agrees_with_torch():
    p, q = probs(0, 100, 5), probs(1, 100, 5)
    categorical = torch.distributions.Categorical
    assert close(dv.kl(p, q),
                 torch.distributions.kl_divergence(categorical(p), categorical(q)))
    assert (dv.kl(p, q) - dv.kl(q, p)).abs().max() > 0.1


def test_batch_axes_broadcast():
    p, q = probs(0, 4, 1, 5), probs(1, 3, 5)
    for f in (dv.cross_entropy, dv.gibbs_gap, dv.kl, dv.js, dv.js_from_kls):
        table = f(p, q)
        assert table.shape == (4, 3)
        assert close(table[2, 1], f(p[2, 0], q[1]))


# Gaussians ----------------------------------------------------------------------------

@laws
@given(seeds, st.integers(1, 5))
def test_gaussian_closed_form_agrees_with_torch(seed, d):
    mp, sp, mq, sq = torch.randn(4, 10, d, dtype=torch.float64,
                                 generator=torch.Generator().manual_seed(seed))
    p, q = (torch.distributions.Normal(mp, sp.exp()),
            torch.distributions.Normal(mq, sq.exp()))
    assert torch.allclose(dv.kl_gaussian(mp, sp, mq, sq),
                          torch.distributions.kl_divergence(p, q).sum(-1))
    assert torch.allclose(dv.gaussian_log_prob(mq, mp, sp), p.log_prob(mq).sum(-1))
    assert close(dv.kl_gaussian(mp, sp, mp, sp), 0)


@pytest.mark.parametrize("seed", range(5))
def test_monte_carlo_within_five_standard_errors(seed):
    # five standard errors: one false alarm in about two million draws, and the seed is
    # fixed
    g = torch.Generator().manual_seed(seed)
    mp, sp, mq, sq = 0.5 * torch.randn(4, 3, dtype=torch.float64, generator=g)
    x = mp + sp.exp() * torch.randn(40_000, 3, dtype=torch.float64, generator=g)
    log_p, log_q = ((lambda x: dv.gaussian_log_prob(x, mp, sp)),
                    (lambda x: dv.gaussian_log_prob(x, mq, sq)))
    estimate = dv.kl_monte_carlo(x, log_p, log_q)
    assert abs(estimate.value - dv.kl_gaussian(mp, sp, mq, sq)) < 5 * estimate.error
    assert 0 < estimate.error < 0.1


def test_standard_error_is_calibrated():
    x = torch.randn(2000, 100, dtype=torch.float64,
                    generator=torch.Generator().manual_seed(0)).T
    value, error = dv.monte_carlo(x)
    assert abs(error.mean() - 0.1) < 0.005                       # std 1, 100 draws
    # 2000 repetitions, t with 99 degrees
    assert abs((value.abs() < 2 * error).double().mean() - 0.952) < 0.02


# Jensen–Shannon -----------------------------------------------------------------------

@laws
@given(seeds, sizes)
def test_js_is_symmetric_and_bounded(seed, n):
    p, q = probs(seed, 50, n, zeros=True), probs(seed + 1, 50, n, zeros=True)
    value = dv.js(p, q)
    assert torch.equal(value, dv.js(q, p)) and close(dv.js(p, p), 0)
    assert (value >= -EXACT).all() and (value <= LOG2 + EXACT).all()


@laws
@given(seeds, sizes)
def test_caglow_eq8_is_twice_js(seed, n):
    p, q = probs(seed, 50, n, zeros=True), probs(seed + 1, 50, n, zeros=True)
    m = dv.mixture(p, q)
    literal, corrected = dv.js_from_kls(p, q, form="literal"), dv.js_from_kls(p, q)
    assert close(dv.kl(p, m) + dv.kl(q, m), 2 * dv.js(p, q))
    assert close(literal, 2 * dv.js(p, q)) and close(corrected, dv.js(p, q))
    assert literal.max() > corrected.max()


def test_literal_pair_breaks_the_bound_of_js():
    p, q = torch.eye(2, dtype=torch.float64)
    assert (close(dv.js_from_kls(p, q, form="literal"), 2 * LOG2)
            and dv.js(p, q) <= LOG2 + EXACT)


@laws
@given(seeds, sizes)
def test_js_is_the_information_about_a_coin(seed, n):
    p, q = probs(seed, 10, n, zeros=True), probs(seed + 1, 10, n, zeros=True)
    assert close(bounds.mutual_information(torch.stack([p, q], -2) / 2), dv.js(p, q))


# evidence lower bound -----------------------------------------------------------------

@laws
@given(seeds, sizes)
def test_elbo_is_below_the_evidence_by_the_posterior_gap(seed, n):
    prior, q = probs(seed, 30, n), probs(seed + 1, 30, n)
    likelihood = 3 * torch.rand(30, n, dtype=torch.float64,
                                generator=torch.Generator().manual_seed(seed))
    evidence, posterior = (bounds.log_evidence(prior, likelihood),
                           bounds.posterior(prior, likelihood))
    gap = evidence - bounds.elbo(prior, likelihood, q)
    assert (gap >= -EXACT).all()
    assert close(gap, dv.kl(q, posterior))
    assert close(bounds.elbo(prior, likelihood, posterior), evidence)


def test_elbo_of_an_impossible_explanation():
    prior, likelihood = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.8])
    assert bounds.elbo(prior, likelihood, torch.tensor([0.5, 0.5])) == -math.inf
    assert torch.isclose(bounds.elbo(prior, likelihood, torch.tensor([0.0, 1.0])),
                         torch.tensor(math.log(0.4)))
    assert bounds.log_evidence(prior, torch.zeros(2)) == -math.inf


# mutual information -------------------------------------------------------------------

@laws
@given(seeds, sizes, sizes)
def test_mi_bound_is_below_mi_by_the_classifier_gap(seed, nz, nc):
    joint = probs(seed, 20, nz * nc).reshape(20, nz, nc)
    p_z, q = joint.sum(-1), probs(seed + 1, 20, nz, nc)
    exact_q = joint / p_z[..., None]
    information = bounds.mutual_information(joint)
    assert (information >= -EXACT).all()
    assert close(information,
                 dv.entropy(joint.sum(-2)) - (p_z * dv.entropy(exact_q)).sum(-1))
    assert (bounds.mi_bound(joint, q) <= information + EXACT).all()
    assert close(information - bounds.mi_bound(joint, q),
                 (p_z * dv.kl(exact_q, q)).sum(-1))
    assert close(bounds.mi_bound(joint, exact_q), information)


def test_mutual_information_of_extremes():
    p, q = probs(0, 4), probs(1, 3)
    assert close(bounds.mutual_information(p[:, None] * q), 0)
    assert close(bounds.mutual_information(torch.diag(p)), dv.entropy(p))


def test_caglow_eq13_is_mse_and_bce():
    g = torch.Generator().manual_seed(0)
    u, guess = torch.rand(2, 100, 3, dtype=torch.float64, generator=g)
    nll = -dv.gaussian_log_prob(u, guess, math.log(0.5))
    assert close(nll, ((u - guess) ** 2).sum(-1) / (2 * 0.25)
                     + 3 * (math.log(0.5) + 0.5 * math.log(2 * math.pi)))
    bce = torch.nn.functional.binary_cross_entropy_with_logits(guess, u.round(),
                                                               reduction="none").sum(-1)
    assert close(bounds.bernoulli_log_prob(u.round(), guess), -bce)


# CAGlow's Eq. 7 -----------------------------------------------------------------------

@laws
@given(seeds, sizes, sizes)
def test_condition_bound(seed, nc, nz):
    p_c, encoder, classifier, prior = args = model(seed, 30, nc, nz)
    likelihood = target(p_c, classifier, prior)
    forms = ("independent", "joint", "corrected")
    independent, joint, corrected = (bounds.condition_bound(*args, form)
                                     for form in forms)
    information = bounds.mutual_information(p_c[..., None] * encoder)
    assert ((independent <= likelihood + EXACT).all()
            and (corrected <= likelihood + EXACT).all())
    assert close(joint - corrected, information)
    assert close(corrected,
                 (p_c * bounds.elbo(prior[:, None], classifier.mT, encoder)).sum(-1))
    posterior_gap = (
        p_c * dv.kl(encoder, bounds.posterior(prior[:, None], classifier.mT))).sum(-1)
    assert close(joint - likelihood, information - posterior_gap)


@laws
@given(seeds, sizes)
def test_independent_reading_is_vacuous(seed, n):
    p_c, encoder, classifier, prior = model(seed, 30, n, n)
    ignore_z = p_c[:, None].expand_as(classifier)
    best = bounds.condition_bound(p_c, encoder, ignore_z, prior, "independent")
    assert (bounds.condition_bound(p_c, encoder, classifier, prior, "independent")
            <= best).all()


def test_joint_reading_counterexample():
    half, copy = (torch.full((2,), 0.5, dtype=torch.float64),
                  torch.eye(2, dtype=torch.float64))
    assert bounds.condition_bound(half, copy, copy, half, "joint") == 0 > -LOG2
    assert close(target(half, copy, half), -LOG2)
    assert close(bounds.condition_bound(half, copy, copy, half), -LOG2)
    assert bounds.condition_bound(half, copy, copy, half, "independent") == -math.inf


def test_joint_reading_violations_increase_with_encoder_quality():
    p_c, encoder, classifier, prior = model(0, 4000, 3, 3)
    exact = bounds.posterior(prior[:, None], classifier.mT)
    likelihood = target(p_c, classifier, prior)
    violated = []
    for t in (0.0, 0.8, 1.0):
        value = bounds.condition_bound(p_c, (1 - t) * encoder + t * exact, classifier,
                                       prior, "joint")
        violated.append((value > likelihood).double().mean().item())
    assert violated[0] < 0.1 and 0.4 < violated[1] < 0.8 and violated[2] == 1


def test_joint_reading_always_violates_at_the_optimum():
    p_c, encoder, _, _ = model(0, 500, 3, 4)
    pairs = p_c[..., None] * encoder
    prior = pairs.sum(-2)
    classifier = (pairs / prior[:, None]).mT
    assert (bounds.condition_bound(p_c, encoder, classifier, prior, "joint")
            > target(p_c, classifier, prior)).all()


# errors -------------------------------------------------------------------------------

good, bad = torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.6])
table = torch.tensor([[0.5, 0.5], [0.2, 0.8]])


@pytest.mark.parametrize("p, says", [
    (torch.tensor([1.5, -0.5]), "entries from -0.5 to 1.5"),
    (bad, "off by 0.1"),
    (torch.tensor([math.nan, 1.0]), "nan"),
    (torch.tensor([0, 1]), "floating-point tensor"),
    (torch.tensor(1.0), r"at least 1 axes; given torch.float32 of shape \(\)"),
    (torch.empty(0),
     r"no outcomes: given shape \(0,\); accepted: one or more along the last axis"),
    (torch.empty(3, 0), r"no outcomes: given shape \(3, 0\)")])
def test_invalid_distributions_are_refused(p, says):
    for call in (lambda: dv.entropy(p), lambda: dv.kl(p, good), lambda: dv.js(good, p),
                 lambda: dv.cross_entropy(p, p)):
        with pytest.raises(ValueError, match=says):
            call()


def test_no_distributions_give_no_numbers():
    """A batch of none is not an error."""
    none = torch.empty(0, 3)
    assert (dv.entropy(none).shape == dv.kl(none, none).shape == dv.js(none, none).shape
            == (0,))


@pytest.mark.parametrize("call, says", [
    (lambda: dv.kl(probs(0, 3), probs(0, 4)),
     r"p has shape \(3,\) and q \(4,\).*the same last axis"),
    (lambda: dv.js(probs(0, 2, 3), probs(0, 5, 3)),
     r"\(2, 3\) and q \(5, 3\).*leading axes that broadcast"),
    (lambda: dv.kl(torch.ones(1), good), "the same last axis"),
    (lambda: dv.js_from_kls(good, good, form="printed"),
     "unknown form 'printed'; accepted: 'corrected', 'literal'"),
    (lambda: bounds.condition_bound(good, table, table, good, form="literal"),
     "'independent', 'joint'"),
    (lambda: bounds.condition_bound(probs(0, 3), table.double(), table.double(),
                                    good.double()),
     "a column of the encoder"),
    (lambda: bounds.condition_bound(good, table, table, torch.ones(1)),
     "a row of the encoder"),
    (lambda: bounds.condition_bound(good, table, good, good),
     "classifier must be a table"),
    (lambda: bounds.condition_bound(good, bad.expand(2, 2), table, good),
     "encoder must be probabilities"),
    (lambda: bounds.mutual_information(torch.empty(0, 2)), "joint has no outcomes"),
    (lambda: bounds.log_evidence(torch.empty(0), torch.empty(0)),
     "prior has no outcomes"),
    (lambda: bounds.mi_bound(torch.empty(2, 0), torch.empty(2, 0)),
     "joint has no outcomes"),
    (lambda: bounds.elbo(bad, good, good), "prior must be probabilities"),
    (lambda: bounds.elbo(good, -good, good), "likelihood must be ≥ 0"),
    (lambda: bounds.elbo(good, good, bad), "q must be probabilities"),
    (lambda: bounds.posterior(good, torch.zeros(2)), r"p\(x\) = 0"),
    (lambda: bounds.mutual_information(table), "sum to 1 over the last 2 axes"),
    (lambda: bounds.mi_bound(table / 2, probs(0, 3, 2)), "last 2 axes"),
    (lambda: dv.kl_gaussian(torch.zeros(2), torch.zeros(3)),
     r"mean_p \(2,\), log_std_p \(3,\).*that broadcast"),
    (lambda: bounds.bernoulli_log_prob(torch.zeros(2), torch.zeros(3)),
     r"x \(2,\), logits \(3,\)"),
    (lambda: dv.monte_carlo(torch.zeros(1)), r"at least 2 draws.*given \(1,\)")])
def test_errors_name_given_and_accepted_values(call, says):
    with pytest.raises(ValueError, match=says):
        call()
