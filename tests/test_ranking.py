"""Ranking by discriminator: areas, shares, optimal pooled scores,
the Inception score.
"""

import math
from fractions import Fraction

import pytest
import torch

from condgen import ranking as rk
from condgen.bounds import mutual_information


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def some(n, *shape, seed=0):
    """Random distributions over n outcomes."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, n, generator=g,
                      dtype=torch.float64).pow(3).add(1e-3).log().softmax(-1)


def triangular(q, p):
    return ((q - p) ** 2 / (q + p)).sum().item()


def test_areas_are_trapezoids_and_shares_sum_to_one():
    assert torch.equal(rk.area_under_curve(doubles([1, 2, 4], [0, 0, 1])),
                       doubles(4.5, 0.5))
    curves = torch.rand(5, 9, generator=torch.Generator().manual_seed(0),
                        dtype=torch.float64)
    shares = rk.nrds(curves)
    assert (abs(shares.sum() - 1) < 1e-12
            and torch.allclose(rk.nrds(curves[[1, 0, 2, 3, 4]])[:2], shares[[1, 0]]))
    for i, curve in enumerate(curves):  # by hand
        inner = (curve[0] + curve[-1]) / 2 + curve[1:-1].sum()
        assert abs(rk.area_under_curve(curve) - inner) < 1e-12
        assert abs(shares[i] - inner / rk.area_under_curve(curves).sum()) < 1e-12
    fewer = rk.nrds(curves[:4])
    assert ((fewer > shares[:4]).all()
            and torch.allclose(fewer / fewer.sum(), shares[:4] / shares[:4].sum()))
    for bad in (torch.rand(3), -torch.rand(2, 3), torch.zeros(2, 3), torch.rand(2, 1),
                2 + torch.rand(2, 3)):
        with pytest.raises(ValueError, match="accepted"):
            rk.nrds(bad)


@pytest.mark.parametrize("shares", [None, (0.5, 0.3, 0.2)])
def test_scores_of_the_optimal_discriminator(shares):
    q, p = some(7), some(7, 3, seed=1)
    w = doubles(*(shares or [1 / 3] * 3))
    s = rk.optimal_scores(q, p, None if shares is None else w)
    pool = (w[:, None] * p).sum(0)
    assert torch.allclose(s[1:], (p * (q / (q + pool))).sum(1), atol=1e-12)
    assert abs(s[0] + (w * s[1:]).sum() - 1) < 1e-12  # the budget
    assert abs((w * s[1:]).sum().item() - (0.5 - triangular(q, pool) / 4)) < 1e-12
    logits = (q / pool).log().requires_grad_()
    loss = (-(q * torch.nn.functional.logsigmoid(logits)).sum()
            - (pool * torch.nn.functional.logsigmoid(-logits)).sum())
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12
    with pytest.raises(ValueError, match="competitors, outcomes"):
        rk.optimal_scores(q, p[0])
    with pytest.raises(ValueError, match="sums|sum"):
        rk.optimal_scores(q, 2 * p)
    tilted = torch.stack([1.5 * p[0] - 0.5 * p[1], 1.5 * p[1] - 0.5 * p[0]])
    with pytest.raises(ValueError, match="fakes must be probabilities"):
        rk.optimal_scores(q, tilted.abs())
    with pytest.raises(ValueError, match=f"one of each of the {len(p)} competitors"):
        rk.optimal_scores(q, p, torch.ones(len(p) + 1, dtype=p.dtype) / (len(p) + 1))


def test_score_of_a_single_generator_is_a_divergence():
    for seed in range(50):
        q, p = some(6, 2, seed=seed)
        real, fake = rk.optimal_scores(q, p[None])
        delta = triangular(q, p)
        assert (abs(fake - (0.5 - delta / 4)) < 1e-12
                and abs(fake / real - (2 - delta) / (2 + delta)) < 1e-12)
        assert fake < 0.5
    assert torch.allclose(rk.optimal_scores(q, q[None]), doubles(0.5, 0.5), atol=1e-12)


def test_added_competitor_makes_perfect_generator_rank_second():
    def exact(*p):
        half = Fraction(1, 2)
        pool = [sum(column) / Fraction(len(p)) for column in zip(*p, strict=True)]
        return [sum(a * half / (half + b) for a, b in zip(one, pool, strict=True))
                for one in p]

    a, b, c = ((Fraction(x, 10), Fraction(10 - x, 10)) for x in (5, 3, 8))
    two, three = exact(a, b), exact(a, b, c)
    assert two == [Fraction(50, 99), Fraction(16, 33)] and two[0] > two[1]
    assert three[1] > three[0] > three[2]
    tensors = [doubles(*map(float, x)) for x in (a, b, c)]
    found = rk.optimal_scores(tensors[0], torch.stack(tensors))[1:]
    assert torch.allclose(found, doubles(*map(float, three)), atol=1e-9)
    for seed in range(50):  # what equals the data is never below the average
        q, others = some(5, seed=seed), some(5, 4, seed=seed + 99)
        s = rk.optimal_scores(q, torch.cat([q[None], others]))
        assert s[1] >= 0.5 >= s[1:].mean() and abs(s[0] - s[1]) < 1e-12
    good, other = doubles(0.8, 0.2), doubles(0.15, 0.85)
    once, twice = (rk.optimal_scores(tensors[0], torch.stack([good, other])),
                   rk.optimal_scores(tensors[0], torch.stack([good, good, other])))
    assert once[1] > once[2] and twice[1] < twice[3]
    share = rk.optimal_scores(tensors[0], torch.stack([good, other]), doubles(2, 1) / 3)
    assert torch.allclose(twice[[0, 1, 3]], share, atol=1e-12)


def test_scores_of_specialists_and_of_a_copying_generator():
    ten, each = (torch.full((10,), 0.1, dtype=torch.float64),
                 torch.eye(10, dtype=torch.float64))
    assert torch.allclose(rk.optimal_scores(ten, each),
                          torch.full((11,), 0.5, dtype=torch.float64), atol=1e-12)
    assert abs(rk.optimal_scores(ten, each[:1])[1] - 1 / 11) < 1e-12
    q = doubles(0.5, 0.5, 0, 0)
    s = rk.optimal_scores(q, torch.stack([q, doubles(0, 0, 1, 0), doubles(0, 0, 0, 1)]))
    assert torch.allclose(s, doubles(0.75, 0.75, 0, 0), atol=1e-12)


def bars(counts):
    """Images of three brightnesses, as many of each as said."""
    x = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    return x.repeat_interleave(torch.tensor(counts), 0)


def test_trained_discriminator_converges_to_optimal_scores():
    counts = [[80, 80, 80], [220, 10, 10], [140, 80, 20], [200, 20, 20]]
    real, *fakes = map(bars, counts)
    curves = rk.discriminator_curves(real, fakes, 20, 0, width=4, lr=3e-3)
    wanted = rk.optimal_scores(doubles(*counts[0]) / 240, doubles(*counts[1:]) / 240)
    assert (curves.shape == (4, 20)
            and (curves[:, -10:].mean(1) - wanted).abs().max() < 0.03)
    assert wanted.max() - wanted.min() > 0.2


def test_learned_scores_are_seeded_and_use_the_given_images():
    g = torch.Generator().manual_seed(0)
    real, a, b, other = (torch.rand(40, 1, 8, 8, generator=g) ** k
                         for k in (1, 2, 3, 4))
    before = torch.random.get_rng_state()
    own = rk.discriminator_curves(real, [a, b], 3, 5, width=4)
    assert torch.equal(own, rk.discriminator_curves(real, [a, b], 3, 5, width=4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(own, rk.discriminator_curves(real, [a, b], 3, 6, width=4))
    assert torch.allclose(
        own, rk.discriminator_curves(real, [a, b], 3, 5, [real, a, b], width=4))
    held = rk.discriminator_curves(real, [a, b], 3, 5, [real, other, b], width=4)
    assert (torch.allclose(held[[0, 2]], own[[0, 2]])
            and not torch.allclose(held[1], own[1]))
    assert own.shape == (3, 3) and bool(((own > 0) & (own < 1)).all())
    for bad in ([], [a, b, a]):
        with pytest.raises(ValueError, match="accepted"):
            rk.discriminator_curves(real, bad, 3, 5, [real, a, b])


def test_corrected_scores_use_held_out_images():
    g = torch.Generator().manual_seed(0)
    real, same, dark = torch.rand(120, 1, 8, 8, generator=g), torch.rand(
        120, 1, 8, 8, generator=g), torch.rand(120, 1, 8, 8, generator=g) ** 8
    found = rk.corrected_nrds(real, {"same": same, "dark": dark}, 8, 2, 0)
    assert (abs(sum(found["nrds"].values()) - 1) < 1e-12
            and found["nrds"]["same"] > found["nrds"]["dark"])
    alone = {k: rk.corrected_nrds(real, {k: x}, 8, 2, 0)["area_ratio"][k]
             for k, x in (("same", same), ("dark", dark))}
    assert alone["dark"] < 0.8 < 0.95 < alone["same"] < 1.05
    one, two = rk.random_halves(real, 3)
    joined = torch.cat([one, two]).flatten(1)
    assert len(one) == len(two) == 60 and torch.equal(
        joined.sum(1).sort().values, real.flatten(1).sum(1).sort().values)
    with pytest.raises(ValueError, match="as many"):
        rk.corrected_nrds(real, {"same": same, "dark": dark[:50]}, 2, 1, 0)
    with pytest.raises(ValueError, match="repeats=0"):
        rk.corrected_nrds(real, {"same": same}, 2, 0, 0)


def test_inception_score_is_mutual_information_with_its_bound():
    r = some(10, 200)
    assert abs(math.log(rk.inception_score(r)) - mutual_information(r / 200)) < 1e-9
    eye = torch.eye(10, dtype=torch.float64)
    assert (abs(rk.inception_score(eye) - 10) < 1e-9
            and abs(rk.inception_score(eye[:4].repeat(7, 1)) - 4) < 1e-9)
    assert abs(rk.inception_score(r[:1]) - 1) < 1e-9 and 1 < rk.inception_score(r) < 10
    merge = torch.stack([torch.arange(10) % 2 == k for k in (0, 1)], 1).double()
    assert rk.inception_score(r @ merge) < rk.inception_score(r)
    assert [round(rk.inception_score(x), 9) for x in (eye[::2], merge.T / 5)] == [5, 2]
    assert ([round(rk.inception_score(x @ merge), 9) for x in (eye[::2], merge.T / 5)]
            == [1, 2])
    for bad in (torch.ones(3), 2 * r, torch.empty(0, 4)):
        with pytest.raises(ValueError, match="accepted|sum"):
            rk.inception_score(bad)


def test_rank_agreement_equals_scipy():
    from scipy.stats import spearmanr

    a, b = torch.randint(0, 6, (2, 12),
                         generator=torch.Generator().manual_seed(0)).tolist()
    assert abs(rk.rank_agreement(a, b) - spearmanr(a, b).statistic) < 1e-9
    for bad in (([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, 2, 3, 4]),
                ([1, 2, math.nan], [1, 2, 3])):
        with pytest.raises(ValueError, match="accepted"):
            rk.rank_agreement(*bad)


def test_copy_share_counts_images_near_the_training_set():
    g = torch.Generator().manual_seed(0)
    train, unseen, other = (torch.rand(80, 1, 4, 4, generator=g) for _ in range(3))
    mixed = torch.cat([train[:30], other[:30] + 5])
    assert (rk.copy_share(train, train, unseen) == 1
            and rk.copy_share(mixed, train, unseen) == 0.5)
    assert rk.copy_share(unseen, train, unseen, level=0.25) == 0.25
    assert rk.copy_share(other, train, unseen) < 0.1
    for bad in (train[:0], torch.rand(2, 1, 5, 5), train[:2] * math.inf):
        with pytest.raises(ValueError, match="x .*accepted: finite images"):
            rk.copy_share(bad, train, unseen)


@pytest.mark.parametrize("given", [{"epochs": 0}, {"width": 0}, {"batch": 0}])
def test_invalid_discriminator_trainings_are_refused(given):
    images = torch.rand(8, 1, 8, 8)
    with pytest.raises(ValueError, match=r"=0; accepted: an integer, 1 or more"):
        rk.discriminator_curves(images, [images], **{"epochs": 2, "seed": 0, **given})


def test_named_scores_are_means_over_discriminators():
    curves = torch.tensor([[[0.9, 0.9], [0.3, 0.3], [0.6, 0.6]],
                           [[0.8, 0.8], [0.2, 0.2], [0.2, 0.2]]])
    found = rk.named_scores(curves.double(), ["a", "b"])
    assert found["nrds"] == pytest.approx({"a": (1 / 3 + 1 / 2) / 2,
                                           "b": (2 / 3 + 1 / 2) / 2})
    assert found["area_ratio"] == pytest.approx({"a": (1 / 3 + 1 / 4) / 2,
                                                 "b": (2 / 3 + 1 / 4) / 2})


def test_literal_scores_are_those_of_one_discriminator():
    g = torch.Generator().manual_seed(0)
    real, a, b = (torch.rand(40, 1, 8, 8, generator=g) ** k for k in (1, 2, 3))
    found = rk.literal_nrds(real[:30], {"a": a, "b": b}, 2, 5)
    curves = rk.discriminator_curves(real[:30], [a[:30], b[:30]], 2, 5)
    assert list(found["nrds"].values()) == rk.nrds(curves[1:]).tolist()
