"""Ranking by discriminator: areas and shares, what a pooled judge knows, who can fool it; the Inception score."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from condgen import metrics
from condgen.contracts import Schema
from condgen.data import digits
from condgen.divergences import mutual_information
from condgen.experiments import nrds as nr
from condgen.models.cglow import CGlow
from condgen.models.classifier import Judge
from condgen.models.glow import Glow
from condgen.models.vaegan import ACGAN
from condgen.recipes import RECIPES
from condgen.results import key

NEW = {"area_ratio": "higher", "rank_agreement": "higher", "copy_share": "lower"}


@pytest.fixture
def registry(monkeypatch):
    """The metrics of this chapter, until the registry has them."""
    for name, better in NEW.items():
        monkeypatch.setitem(metrics.METRICS, name, metrics.METRICS.get(name, metrics.MetricInfo(name, "", better)))


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def some(n, *shape, seed=0):
    """Random distributions over n outcomes."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, n, generator=g, dtype=torch.float64).pow(3).add(1e-3).log().softmax(-1)


def triangular(q, p):
    return ((q - p) ** 2 / (q + p)).sum().item()


def test_areas_are_trapezoids_and_shares_sum_to_one():
    assert torch.equal(nr.area(doubles([1, 2, 4], [0, 0, 1])), doubles(4.5, 0.5))
    curves = torch.rand(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = nr.nrds(curves)
    assert abs(shares.sum() - 1) < 1e-12 and torch.allclose(nr.nrds(curves[[1, 0, 2, 3, 4]])[:2], shares[[1, 0]])
    for i, curve in enumerate(curves):  # by hand
        inner = (curve[0] + curve[-1]) / 2 + curve[1:-1].sum()
        assert abs(nr.area(curve) - inner) < 1e-12 and abs(shares[i] - inner / nr.area(curves).sum()) < 1e-12
    fewer = nr.nrds(curves[:4])
    assert (fewer > shares[:4]).all() and torch.allclose(fewer / fewer.sum(), shares[:4] / shares[:4].sum())
    for bad in (torch.rand(3), -torch.rand(2, 3), torch.zeros(2, 3), torch.rand(2, 1), 2 + torch.rand(2, 3)):
        with pytest.raises(ValueError, match="accepted"):
            nr.nrds(bad)


@pytest.mark.parametrize("shares", [None, (0.5, 0.3, 0.2)])
def test_scores_of_the_best_judge(shares):
    q, p = some(7), some(7, 3, seed=1)
    w = doubles(*(shares or [1 / 3] * 3))
    s = nr.optimal_scores(q, p, None if shares is None else w)
    pool = (w[:, None] * p).sum(0)
    assert torch.allclose(s[1:], (p * (q / (q + pool))).sum(1), atol=1e-12)
    assert abs(s[0] + (w * s[1:]).sum() - 1) < 1e-12  # the budget
    assert abs((w * s[1:]).sum().item() - (0.5 - triangular(q, pool) / 4)) < 1e-12
    logits = (q / pool).log().requires_grad_()
    loss = -(q * torch.nn.functional.logsigmoid(logits)).sum() - (pool * torch.nn.functional.logsigmoid(-logits)).sum()
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-12
    with pytest.raises(ValueError, match="competitors, outcomes"):
        nr.optimal_scores(q, p[0])
    with pytest.raises(ValueError, match="sums|sum"):
        nr.optimal_scores(q, 2 * p)
    tilted = torch.stack([1.5 * p[0] - 0.5 * p[1], 1.5 * p[1] - 0.5 * p[0]])
    with pytest.raises(ValueError, match="fakes must be probabilities"):
        nr.optimal_scores(q, tilted.abs())
    with pytest.raises(ValueError, match=f"one of each of the {len(p)} competitors"):
        nr.optimal_scores(q, p, torch.ones(len(p) + 1, dtype=p.dtype) / (len(p) + 1))


def test_alone_the_score_is_a_divergence():
    for seed in range(50):
        q, p = some(6, 2, seed=seed)
        real, fake = nr.optimal_scores(q, p[None])
        delta = triangular(q, p)
        assert abs(fake - (0.5 - delta / 4)) < 1e-12 and abs(fake / real - (2 - delta) / (2 + delta)) < 1e-12
        assert fake < 0.5
    assert torch.allclose(nr.optimal_scores(q, q[None]), doubles(0.5, 0.5), atol=1e-12)


def test_a_newcomer_turns_the_order_and_the_data_come_second():
    def exact(*p):
        half = Fraction(1, 2)
        pool = [sum(column) / Fraction(len(p)) for column in zip(*p, strict=True)]
        return [sum(a * half / (half + b) for a, b in zip(one, pool, strict=True)) for one in p]

    a, b, c = ((Fraction(x, 10), Fraction(10 - x, 10)) for x in (5, 3, 8))
    two, three = exact(a, b), exact(a, b, c)
    assert two == [Fraction(50, 99), Fraction(16, 33)] and two[0] > two[1]
    assert three[1] > three[0] > three[2]
    tensors = [doubles(*map(float, x)) for x in (a, b, c)]
    found = nr.optimal_scores(tensors[0], torch.stack(tensors))[1:]
    assert torch.allclose(found, doubles(*map(float, three)), atol=1e-9)
    for seed in range(50):  # what equals the data is never below the average
        q, others = some(5, seed=seed), some(5, 4, seed=seed + 99)
        s = nr.optimal_scores(q, torch.cat([q[None], others]))
        assert s[1] >= 0.5 >= s[1:].mean() and abs(s[0] - s[1]) < 1e-12
    good, other = doubles(0.8, 0.2), doubles(0.15, 0.85)
    once, twice = nr.optimal_scores(tensors[0], torch.stack([good, other])), nr.optimal_scores(
        tensors[0], torch.stack([good, good, other]))  # fmt: skip
    assert once[1] > once[2] and twice[1] < twice[3]
    share = nr.optimal_scores(tensors[0], torch.stack([good, other]), doubles(2, 1) / 3)
    assert torch.allclose(twice[[0, 1, 3]], share, atol=1e-12)


def test_specialists_together_are_beyond_reproach_and_a_thief_takes_all():
    ten, each = torch.full((10,), 0.1, dtype=torch.float64), torch.eye(10, dtype=torch.float64)
    assert torch.allclose(nr.optimal_scores(ten, each), torch.full((11,), 0.5, dtype=torch.float64), atol=1e-12)
    assert abs(nr.optimal_scores(ten, each[:1])[1] - 1 / 11) < 1e-12
    q = doubles(0.5, 0.5, 0, 0)
    s = nr.optimal_scores(q, torch.stack([q, doubles(0, 0, 1, 0), doubles(0, 0, 0, 1)]))
    assert torch.allclose(s, doubles(0.75, 0.75, 0, 0), atol=1e-12)


def bars(counts):
    """Images of three brightnesses, as many of each as said."""
    x = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    return x.repeat_interleave(torch.tensor(counts), 0)


def test_a_trained_judge_arrives_at_the_best_one():
    counts = [[80, 80, 80], [220, 10, 10], [140, 80, 20], [200, 20, 20]]
    real, *fakes = map(bars, counts)
    curves = nr.learned(real, fakes, 20, 0, width=4, lr=3e-3)
    wanted = nr.optimal_scores(doubles(*counts[0]) / 240, doubles(*counts[1:]) / 240)
    assert curves.shape == (4, 20) and (curves[:, -10:].mean(1) - wanted).abs().max() < 0.03
    assert wanted.max() - wanted.min() > 0.2


def test_learning_is_a_function_of_the_seed_and_scores_what_it_is_told_to():
    g = torch.Generator().manual_seed(0)
    real, a, b, other = (torch.rand(40, 1, 8, 8, generator=g) ** k for k in (1, 2, 3, 4))
    before = torch.random.get_rng_state()
    own = nr.learned(real, [a, b], 3, 5, width=4)
    assert torch.equal(own, nr.learned(real, [a, b], 3, 5, width=4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(own, nr.learned(real, [a, b], 3, 6, width=4))
    assert torch.allclose(own, nr.learned(real, [a, b], 3, 5, [real, a, b], width=4))
    held = nr.learned(real, [a, b], 3, 5, [real, other, b], width=4)
    assert torch.allclose(held[[0, 2]], own[[0, 2]]) and not torch.allclose(held[1], own[1])
    assert own.shape == (3, 3) and bool(((own > 0) & (own < 1)).all())
    for bad in ([], [a, b, a]):
        with pytest.raises(ValueError, match="accepted"):
            nr.learned(real, bad, 3, 5, [real, a, b])


def test_a_contest_is_held_out_and_alone_it_does_not_know_the_others():
    g = torch.Generator().manual_seed(0)
    real, same, dark = torch.rand(120, 1, 8, 8, generator=g), torch.rand(120, 1, 8, 8, generator=g), \
        torch.rand(120, 1, 8, 8, generator=g) ** 8  # fmt: skip
    found = nr.contest(real, {"same": same, "dark": dark}, 8, 2, 0)
    assert abs(sum(found["nrds"].values()) - 1) < 1e-12 and found["nrds"]["same"] > found["nrds"]["dark"]
    alone = {k: nr.contest(real, {k: x}, 8, 2, 0)["area_ratio"][k] for k, x in (("same", same), ("dark", dark))}
    assert alone["dark"] < 0.8 < 0.95 < alone["same"] < 1.05
    one, two = nr.halves(real, 3)
    joined = torch.cat([one, two]).flatten(1)
    assert len(one) == len(two) == 60 and torch.equal(joined.sum(1).sort().values, real.flatten(1).sum(1).sort().values)
    with pytest.raises(ValueError, match="as many"):
        nr.contest(real, {"same": same, "dark": dark[:50]}, 2, 1, 0)


def test_inception_score_is_an_information_and_one_image_per_class_reaches_the_bound():
    r = some(10, 200)
    assert abs(math.log(nr.inception_score(r)) - mutual_information(r / 200)) < 1e-9
    eye = torch.eye(10, dtype=torch.float64)
    assert abs(nr.inception_score(eye) - 10) < 1e-9 and abs(nr.inception_score(eye[:4].repeat(7, 1)) - 4) < 1e-9
    assert abs(nr.inception_score(r[:1]) - 1) < 1e-9 and 1 < nr.inception_score(r) < 10
    merge = torch.stack([torch.arange(10) % 2 == k for k in (0, 1)], 1).double()
    assert nr.inception_score(r @ merge) < nr.inception_score(r)
    assert [round(nr.inception_score(x), 9) for x in (eye[::2], merge.T / 5)] == [5, 2]
    assert [round(nr.inception_score(x @ merge), 9) for x in (eye[::2], merge.T / 5)] == [1, 2]
    for bad in (torch.ones(3), 2 * r, torch.empty(0, 4)):
        with pytest.raises(ValueError, match="accepted|sum"):
            nr.inception_score(bad)


def test_ranks_agree_as_scipy_says_and_copies_are_found():
    from scipy.stats import spearmanr

    a, b = torch.randint(0, 6, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
    assert abs(nr.rank_agreement(a, b) - spearmanr(a, b).statistic) < 1e-9
    for bad in (([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, 2, 3, 4])):
        with pytest.raises(ValueError, match="accepted"):
            nr.rank_agreement(*bad)
    data = digits()
    train, test = data.images_of("train"), data.images_of("test")
    made = nr.copied(train, 60, 0)
    close = {name: nr.copy_share(x, train, test) for name, x in made.items()}
    assert tuple(made) == nr.CONTROLS and close["copies"] == 1 and nr.copy_share(test, train, test) <= 0.02
    assert all(x.shape == (60, 1, 16, 16) and x.min() >= 0 and x.max() <= 1 for x in made.values())
    assert nr.copy_share(torch.rand(20, 1, 16, 16), train, test) == 0
    assert (made["noisy copies"] - made["copies"]).abs().max() > 0.01
    one = nr.specialists(data, 30, 0)
    assert list(one) == [f"digit {k}" for k in range(10)] and all(len(x) == 30 for x in one.values())


def test_other_classes():
    data = digits()
    digit = data.table("test")["c"].argmax(1)
    odd, low = nr.regrouped(data, "parity"), nr.regrouped(data, "low")
    assert torch.equal(odd.table("test")["c"].argmax(1), digit % 2) and odd.conditions.width == 2
    assert torch.equal(low.table("test")["c"].argmax(1), digit[digit < 5]) and low.conditions.width == 5
    assert torch.equal(low.images_of("test"), data.images_of("test")[digit < 5])
    with pytest.raises(ValueError, match="parity"):
        nr.regrouped(data, "high")


@pytest.fixture(scope="module")
def lab():
    """A lab whose models are untrained; Lab, recipes and folders are tested elsewhere."""
    data = digits()
    torch.manual_seed(0)
    judge, glow = Judge(data.shape, data.conditions, 4), Glow(data.shape, levels=2, depth=1, width=4)
    caglow = nr.CAGlow.from_glow(glow, data.conditions, hidden=8)
    caglow.remember_rows(data.table("train")["c"])
    models = {"judge-digits": judge, "glow-digits": glow, "caglow-digits": caglow, "caglow-digits-literal": caglow,
              "cglow-digits": CGlow(data.shape, data.conditions, levels=2, depth=1, width=4),
              "acgan-digits": ACGAN(data.shape, data.conditions)}  # fmt: skip
    for name in ("cglow-digits", "acgan-digits"):
        models[name].remember_rows(data.table("train")["c"])
    train = lambda name, *glow: SimpleNamespace(model=models[name])
    return SimpleNamespace(tier="tiny", seed=0, first=True, train=train)


@pytest.fixture
def small(monkeypatch):
    """Sizes at which an experiment is a matter of seconds."""
    monkeypatch.setitem(nr.SIZES, "tiny", {"n": 72, "epochs": 2, "repeats": 1})
    monkeypatch.setitem(nr.LENGTHS, "tiny", {"whole": 64, "short": 64})
    monkeypatch.setattr(nr, "frechet", lambda x, reference, features: float(x.mean() + x.std()))


def test_recipes_exist():
    assert {recipe for recipe, _ in nr.GENERATORS.values()} - {""} <= set(RECIPES)
    assert len(nr.GENERATORS) >= 5


def test_rows_of_the_ranking(registry, small, lab):
    rows = nr.nrds_digits(lab)
    keys = [key(r, "model", "metric", "variant", "at") for r in rows]
    assert len(keys) == len(set(keys))
    groups = {}
    for r in rows:
        if r["metric"] == "nrds":
            groups.setdefault((r["variant"], r["at"]["set"]), []).append(r["value"])
    both = ("generators", "generators and controls")
    assert set(groups) == {(kind, k) for kind, other in (("literal", "ACGAN three times"), ("corrected", "specialists"))
                           for k in (*both, other)}  # fmt: skip
    assert all(abs(sum(v) - 1) < 1e-9 for v in groups.values())
    assert [len(v) for v in groups.values()] == [7, 10, 9, 7, 10, 10]
    alone = {r["model"] for r in rows if r["variant"] == "one against one" and r["metric"] == "area_ratio"}
    assert alone == {*nr.GENERATORS, *nr.CONTROLS, *(f"digit {k}" for k in range(10))}
    agree = {(r["variant"], r["at"]["over"]) for r in rows if r["metric"] == "rank_agreement"}
    assert {("one against one", "generators"), ("one against one", "generators and controls"),
            ("literal, generators and controls", "generators"), ("corrected, generators", "generators")} <= agree
    assert ("corrected, generators", "generators and controls") not in agree
    assert all(r["value"] == 1 for r in rows if r["metric"] == "copy_share" and r["model"] == "copies")


def test_rows_of_the_inception_score(registry, small, lab):
    rows = nr.inception_digits(lab)
    keys = [key(r, "model", "metric", "variant", "at") for r in rows]
    assert len(keys) == len(set(keys))
    score = {(r["model"], r["at"]["by"]): r["value"] for r in rows if r["metric"] == "inception_score"}
    right = {r["model"]: r["value"] for r in rows if r["metric"] == "accuracy"}
    assert len(right) == 8 and right["judge"] == right["judge, logits × ½"] == right["judge, logits × 2"]
    assert len({score["ACGAN", by] for by in ("judge", "judge, logits × ½", "judge, logits × 2")}) == 3
    assert score["ACGAN", "odd or even"] <= 2 and score["ACGAN", "digits 0 to 4"] <= 5
    assert {k for k, _ in score} == {*nr.GENERATORS, "one image per class", "real test images", "real training images",
                                      "real digits 0 to 4"}
    agree = {r["model"]: r["value"] for r in rows if r["metric"] == "rank_agreement"}
    assert abs(agree["judge"] - 1) < 1e-9 and set(agree) == set(right)
    assert isinstance(nr.regrouped(digits(), "low").conditions, Schema)
