"""Clusters: numbers that say whether two labelled clouds fall together, and the picture of them."""

import math

import pytest
import torch

from condgen import figures as fg
from condgen import metrics as mt
from condgen.contracts import Classes
from condgen.experiments.clusters import inferred, written
from condgen.models.cglow import CGlow
from condgen.models.classifier import Judge
from condgen.models.glow import Glow
from condgen.models.vaegan import GAN

Y = torch.arange(5).repeat_interleave(20)


def cloud(seed: int, n: int = 100, dims: int = 8) -> torch.Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


def classes(seed: int, dims: int = 8, apart: float = 4.0) -> torch.Tensor:
    places = apart * torch.randn(5, dims, generator=torch.Generator().manual_seed(99))
    return places[Y] + cloud(seed, len(Y), dims)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotated, scaled and moved, the same for all sets."""
    q = torch.linalg.qr(cloud(7, x.shape[1], x.shape[1]).double()).Q
    return 3.5 * x.double() @ q + 11


@pytest.fixture(autouse=True)
def closed():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


# neighbours ----------------------------------------------------------------------------------------------------------


def test_neighbours_by_hand():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert mt.neighbours(x, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert mt.own_shares(x[:2], x[2:], 1) == (1.0, 0.5)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"{k} neighbours of 4 points"):
            mt.neighbours(x, k)


@pytest.mark.parametrize(("n", "m"), [(60, 60), (90, 30)])
def test_shares_of_one_distribution_are_those_of_shuffled_membership(n, m):
    x = cloud(1, n + m)
    g = torch.Generator().manual_seed(2)
    near = mt.neighbours(x, 5)
    first = torch.stack([torch.randperm(n + m, generator=g) < n for _ in range(500)])
    shuffled = ((first[:, near] & first[:, :, None]).double().sum((1, 2)) / (5 * n), n - 1)
    other = ((~first[:, near] & ~first[:, :, None]).double().sum((1, 2)) / (5 * m), m - 1)
    for (values, companions), share in zip((shuffled, other), mt.own_shares(x[:n], x[n:], 5), strict=True):
        assert values.mean().item() == pytest.approx(companions / (n + m - 1), abs=4 * values.std().item() / 500**0.5)
        assert abs(share - values.mean()) < 4 * values.std()


def test_two_sample_statistic_from_half_to_one():
    a = cloud(1)
    alike = [mt.knn_two_sample(a, cloud(seed)) for seed in range(2, 8)]
    assert 0.5 <= min(alike) and max(alike) < 0.58
    steps = [mt.knn_two_sample(a, cloud(2) + shift) for shift in (0.0, 0.5, 1.0, 3.0)]
    assert steps == sorted(steps) and steps[-1] > 0.99
    assert mt.knn_two_sample(a, cloud(2) + 100) == pytest.approx(1)


def test_two_sample_statistic_sees_a_wider_cloud_that_the_mean_share_does_not():
    a, b = cloud(1, dims=256), 1.25 * cloud(2, dims=256)
    assert sum(mt.own_shares(a, b)) / 2 == pytest.approx(0.5, abs=0.05)
    assert mt.knn_two_sample(a, b) > 0.95 and mt.knn_two_sample(b, a) == pytest.approx(mt.knn_two_sample(a, b))


def test_two_sample_statistic_by_class():
    a, b = classes(1), classes(2)
    assert mt.knn_two_sample(a, b, 5, Y, Y) < 0.58
    swapped = mt.knn_two_sample(a, b, 5, Y, (Y + 1) % 5)
    assert swapped > 0.99 and mt.knn_two_sample(a, b) < 0.58  # without labels nothing is wrong
    one = [mt.own_shares(a[Y == k], b[Y == k]) for k in range(5)]
    e = [sum((s[i] - 19 / 39) / (20 / 39) for s in one) / 5 for i in (0, 1)]
    assert mt.knn_two_sample(a, b, 5, Y, Y) == pytest.approx(0.5 + (abs(e[0]) + abs(e[1])) / 4)


def test_numbers_do_not_depend_on_order_rotation_or_scale():
    a, b = classes(1), classes(2) + 0.7
    i, j = (torch.randperm(100, generator=torch.Generator().manual_seed(s)) for s in (3, 4))
    for f in (
        lambda a, y, b, t: mt.knn_two_sample(a, b, 5, y, t),
        mt.centroid_distance,
        lambda a, y, b, t: mt.silhouette(torch.cat([a, b]), torch.cat([y, t])),
    ):
        want = f(a, Y, b, Y)
        assert f(a[i], Y[i], b[j], Y[j]) == pytest.approx(want, abs=1e-5)
        assert f(turned(a), Y, turned(b), Y) == pytest.approx(want, abs=1e-5)


# class means ---------------------------------------------------------------------------------------------------------


def test_centroid_distance_by_hand():
    y = torch.tensor([0, 0, 1, 1])
    a = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])  # means 0 and 10, variances 2: noise 1 each
    b = torch.tensor([[3.0], [3.0], [13.0], [13.0]])  # means 3 and 13, no spread
    assert mt.centroid_distance(a, y, b, y) == pytest.approx(math.sqrt((9 - 1) / (100 - 2)))
    assert mt.centroid_distance(a, y, a + 1e-3, y) == 0


def test_centroid_distance_has_no_floor_and_knows_its_landmarks():
    places = 0.25 * cloud(99, 10, 256)
    y = torch.arange(10).repeat_interleave(30)
    a = places[y] + cloud(1, 300, 256)
    found = {"same": places, "no class": places.mean(0).expand(10, -1), "next class": places.roll(1, 0)}
    found = {
        k: [mt.centroid_distance(a, y, p[y] + cloud(s, 300, 256), y) for s in range(2, 7)] for k, p in found.items()
    }
    raw = torch.stack([(a - places[y] - cloud(2, 300, 256))[y == k].mean(0).norm() for k in range(10)]).mean()
    assert raw / torch.pdist(places).mean() > 0.6  # what equal classes would show without the correction
    assert max(found["same"]) < 0.2
    assert sum(found["no class"]) / 5 == pytest.approx(math.sqrt(9 / 20), abs=0.05)
    assert sum(found["next class"]) / 5 == pytest.approx(1, abs=0.05)


def test_fisher_directions():
    signal = classes(1, dims=8, apart=1.0)
    mixed = torch.cat([signal, 3 * cloud(5, 100, 12)], 1)
    x = turned(mixed)
    w = mt.fisher_directions(x, Y)
    seen = x @ w
    rest = seen - torch.stack([seen[Y == k].mean(0) for k in range(5)])[Y]
    assert w.shape == (20, 4) and torch.allclose(rest.T @ rest / 95, torch.eye(4).double(), atol=1e-8)
    between = torch.stack([seen[Y == k].mean(0) for k in range(5)]).var(0)
    assert between.tolist() == sorted(between.tolist(), reverse=True)
    assert mt.silhouette(seen, Y) > mt.silhouette(mixed, Y) + 0.1
    other = mixed.double() @ mt.fisher_directions(mixed, Y)
    assert torch.allclose(torch.pdist(other), torch.pdist(seen), atol=1e-6)


def test_wrong_clouds_are_refused():
    a, b = classes(1), classes(2)
    for bad in (a[:, :3], a[:1], a[0], a * math.nan):
        with pytest.raises(ValueError, match="accepted"):
            mt.knn_two_sample(bad, b)
    unknown = torch.where(Y == 4, math.nan, Y.double())
    for y, t in ((Y[:-1], Y), (Y, Y.clamp(max=3)), (Y[:, None], Y[:, None]), (Y.tolist(), Y), (unknown, unknown)):
        with pytest.raises(ValueError, match="accepted"):
            mt.centroid_distance(a, y, b, t)
        with pytest.raises(ValueError, match="accepted"):
            mt.knn_two_sample(a, b, 5, y, t)
    for y, t in ((Y, None), (None, Y)):
        with pytest.raises(ValueError, match="labels of one set only; accepted: of both, or of none"):
            mt.knn_two_sample(a, b, 5, y, t)
    with pytest.raises(ValueError, match="not apart"):
        mt.centroid_distance(torch.zeros(100, 2), Y, b[:, :2], Y)
    with pytest.raises(ValueError, match="2 or more classes"):
        mt.centroid_distance(a, Y * 0, b, Y * 0)
    with pytest.raises(ValueError, match="do not spread"):
        mt.fisher_directions(torch.cat([a, a[:, :1]], 1), Y)
    with pytest.raises(ValueError, match="2 classes"):
        mt.fisher_directions(a, Y * 0)
    for y in (unknown, Y[:-1], Y.tolist()):
        with pytest.raises(ValueError, match="accepted"):
            mt.fisher_directions(a, y)


# latents -------------------------------------------------------------------------------------------------------------


def flow(kind=CGlow):
    """A flow with class-dependent (or one) prior whose means and spreads are far from those of white noise."""
    torch.manual_seed(0)
    schema = [Classes("digit", 10)]
    model = kind((1, 8, 8), schema, 2, 1, 4) if kind is CGlow else kind((1, 8, 8), levels=2, depth=1, width=4)
    for p in (model.prior_weight, model.prior_bias):
        p.data = 0.7 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model.eval()


@pytest.mark.parametrize("kind", [Glow, CGlow])
def test_written_latents_of_all_classes_together_are_white(kind):
    """Means and variances of 20,000 latents in each column within 5.5 standard errors (kurtosis at most 3)."""
    n, model = 20_000, flow(kind)
    z = written(model, torch.arange(n) % 10).double()
    assert z.shape == (n, 64) and z.mean(0).abs().max() < 5.5 / math.sqrt(n)
    assert (z.var(0) - 1).abs().max() < 5.5 * math.sqrt(2 / n) * (3 if kind is CGlow else 1)
    if kind is CGlow:
        means = torch.stack([z[k::10, : model.top].mean(0) for k in range(10)])
        assert means.var(0).mean() > 0.2  # and yet each class has a place of its own


def test_written_latents_of_a_class_are_drawn_from_its_prior():
    """Mean and log σ of one class, brought into class-blind units by those of all; a cold class is one point."""
    n, model = 20_000, flow()
    mean, log_std = model.prior(torch.eye(10))
    centre = mean.mean(0)
    scale = ((2 * log_std).exp().mean(0) + mean.var(0, unbiased=False)).sqrt()
    for k, t in ((3, 1.0), (7, 0.5)):
        z = written(model, torch.full((n,), k), temperature=t)[:, : model.top]
        std = t * log_std[k].exp() / scale
        assert ((z.mean(0) - (mean[k] - centre) / scale).abs() < 5.5 * std / math.sqrt(n)).all()
        assert ((z.std(0) / std - 1).abs() < 5.5 / math.sqrt(2 * n)).all()
    cold = written(model, Y, temperature=0.0)
    for k in range(5):
        want = torch.zeros(20, 64)
        want[:, : model.top] = (mean[k] - centre) / scale
        assert torch.allclose(cold[Y == k], want, atol=1e-5)


@pytest.mark.parametrize("kind", [Glow, CGlow])
def test_inferred_latents_are_those_of_the_dequantised_image(kind):
    """Taking whitening and flow back gives a point of the image's own bin, another one for another seed."""
    model, x = flow(kind), torch.randint(0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(1)) / 255
    mean, log_std = model.prior(torch.eye(10) if kind is CGlow else torch.zeros(1, 0))
    centre = mean.mean(0)
    scale = ((2 * log_std).exp().mean(0) + mean.var(0, unbiased=False)).sqrt()
    places = []
    for seed in range(20):
        z = inferred(model, x, seed).detach()
        with torch.no_grad():
            raw = torch.cat([z[:, : model.top] * scale + centre, z[:, model.top :]], 1)
            places.append(256 * (model.flow.inverse(raw) + 0.5) - 255 * x)
    inside = torch.stack(places)
    assert -1e-2 < inside.min() < 0.05 and 0.95 < inside.max() < 1 + 1e-2
    assert abs(inside.mean() - 0.5) < 5.5 / math.sqrt(12 * inside.numel())
    assert torch.equal(inferred(model, x, 3), inferred(model, x, 3))


@pytest.mark.parametrize(("call", "says"), [
    (lambda: inferred(GAN((1, 8, 8), 4, 2), torch.rand(2, 1, 8, 8)), "GAN has no flow; accepted: a Glow, a CGlow or"),
    (lambda: inferred(Judge((1, 8, 8), [Classes("a", 9)], 4), torch.rand(2, 1, 8, 8)), "Judge has no flow; accepted"),
    (lambda: written(GAN((1, 8, 8), 4, 2), torch.tensor([1, 2])), "GAN has no flow; accepted"),
    (lambda: written(flow(), torch.tensor([11])), "accepted: integers 0 to 9"),
    (lambda: inferred(flow(), torch.rand(2, 1, 16, 16)), r"images of shape \(2, 1, 16, 16\); accepted"),
    (lambda: inferred(flow(), 9 * torch.rand(2, 1, 8, 8)), r"accepted: finite floats in \[0, 1\]"),
    (lambda: inferred(flow(), torch.rand(0, 1, 8, 8)), "number of images=0; accepted: an integer, 1 or more"),
])  # fmt: skip
def test_models_and_images_without_latents_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# the picture ---------------------------------------------------------------------------------------------------------


def test_map_keeps_separate_classes_apart_and_repeats_itself():
    x = torch.cat([classes(1, 60), classes(2, 60)])
    y = fg.embed(x, perplexity=12)
    assert y.shape == (200, 2) and mt.silhouette(y, Y.repeat(2)) > 0.5
    assert fg.embed(x, perplexity=12).equal(y)
    for z, perplexity in ((x, 70), (x, 1), (x[0], 5), (x * math.inf, 5), (x[:, :1], 5)):
        with pytest.raises(ValueError, match="accepted"):
            fg.embed(z, perplexity)


def test_picture_of_clusters():
    points, sampled = cloud(1, 40, 2), torch.arange(40) >= 20
    labels = torch.arange(40) % 10
    ax = fg.clusters(points, labels, sampled, title="T")
    names = ax.get_legend_handles_labels()[1]
    assert names == ["inferred from real images", "sampled", *map(str, range(10))] and ax.get_title() == "T"
    drawn = torch.cat([torch.tensor(c.get_offsets().tolist()).view(-1, 2) for c in ax.collections])
    assert torch.allclose(*(x[x[:, 0].sort().indices] for x in (drawn, points)))
    assert sorted(t.get_text() for t in ax.texts) == sorted(map(str, range(10)))
    assert len(fg.png(ax.figure)) < 100_000
    assert len(set(fg.TEN)) == 10
    for bad in (
        (cloud(1, 40, 3), labels, sampled),
        (points, labels[:5], sampled),
        (points, labels, sampled.long()),
        (points, labels + 5, sampled),
        (points * math.nan, labels, sampled),
        (points[:0], labels[:0], sampled[:0]),
    ):
        with pytest.raises(ValueError, match="accepted"):
            fg.clusters(*bad)
