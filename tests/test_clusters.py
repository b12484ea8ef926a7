"""Clusters: measures that compare two labelled sets of latents, the spaces they live
in, and their figure.
"""

import math

import pytest
import torch

from condgen import figures as fg
from condgen import metrics as mt
from condgen.data import digits
from condgen.evaluation import compare_labelled_sets
from condgen.experiments.clusters import (
    NEIGHBOURS, LatentSpaces, balanced_subset, compare_latents, first_per_digit,
    labelled_images)
from condgen.lab import Lab, find_experiment
from condgen.models.glow import Glow

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


# neighbours ---------------------------------------------------------------------------


def test_neighbours_by_hand():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert mt.nearest_neighbours(x, 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert mt.same_set_shares(x[:2], x[2:], 1) == (1.0, 0.5)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"{k} neighbours of 4 points"):
            mt.nearest_neighbours(x, k)


@pytest.mark.parametrize(("n", "m"), [(60, 60), (90, 30)])
def test_shares_of_equal_distributions_match_permutations(n, m):
    x = cloud(1, n + m)
    g = torch.Generator().manual_seed(2)
    near = mt.nearest_neighbours(x, 5)
    first = torch.stack([torch.randperm(n + m, generator=g) < n for _ in range(500)])
    shuffled = ((first[:, near] & first[:, :, None]).double().sum((1, 2)) / (5 * n),
                n - 1)
    other = ((~first[:, near] & ~first[:, :, None]).double().sum((1, 2)) / (5 * m),
             m - 1)
    for (values, companions), share in zip(
            (shuffled, other), mt.same_set_shares(x[:n], x[n:], 5), strict=True):
        assert values.mean().item() == pytest.approx(
            companions / (n + m - 1), abs=4 * values.std().item() / 500**0.5)
        assert abs(share - values.mean()) < 4 * values.std()


def test_two_sample_statistic_from_half_to_one():
    a = cloud(1)
    alike = [mt.knn_two_sample(a, cloud(seed)) for seed in range(2, 8)]
    assert 0.5 <= min(alike) and max(alike) < 0.58
    steps = [mt.knn_two_sample(a, cloud(2) + shift) for shift in (0.0, 0.5, 1.0, 3.0)]
    assert steps == sorted(steps) and steps[-1] > 0.99
    assert mt.knn_two_sample(a, cloud(2) + 100) == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
@pytest.mark.parametrize("n", [20, 400])
def test_identical_sets_are_not_apart(n, k):
    """½ in the limit: each point lacks itself, one of n companions."""
    a = cloud(1, n)
    b = a[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    assert mt.same_set_shares(a, b, k) == pytest.approx((0.5, 0.5), abs=1e-12)
    assert mt.knn_two_sample(a, b, k) == pytest.approx(0.5 + 1 / (4 * n), abs=1e-12)
    double = torch.cat([a, a])  # repeated points within each set too
    assert mt.knn_two_sample(double, double, k) == pytest.approx(0.5, abs=1 / n)
    assert mt.knn_two_sample(a, a.clone() + 100, k) == 1


def test_fewer_neighbours_than_asked_for():
    """Two points and their copies: only the other pair is left."""
    a = torch.tensor([[0.0], [1.0]])
    assert mt.same_set_shares(a, a, 3) == (0.5, 0.5)


@pytest.mark.parametrize("kinds", [2, 10, 100])
def test_points_at_equal_distances_count_in_equal_parts(kinds):
    """Repeated values do not decide by their order; 1,000 draws of each set are
    ten times closer to ½ than the bound.
    """
    g = torch.Generator().manual_seed(kinds)
    a, b = torch.randint(kinds, (2, 1_000, 1), generator=g).double()
    value = mt.knn_two_sample(a, b)
    assert 0.5 <= value < 0.6
    assert mt.knn_two_sample(a.flip(0), b.sort(0).values) == pytest.approx(value)
    assert mt.knn_two_sample(b, a) == pytest.approx(value)


def test_shares_by_hand():
    """Distances 1, 2, 2, 2 from the first point: the last place is shared by three."""
    distance = torch.tensor([[math.inf, 1.0, 2.0, 2.0, 2.0]])
    assert mt.neighbour_shares(distance, 2).tolist() == [
        pytest.approx([0, 1, 1 / 3, 1 / 3, 1 / 3])]
    shares = mt.neighbour_shares(distance, 4)
    assert shares.tolist() == [[0, 1, 1, 1, 1]] and shares.dtype == torch.float64


def test_two_sample_statistic_detects_a_wider_distribution():
    a, b = cloud(1, dims=256), 1.25 * cloud(2, dims=256)
    assert sum(mt.same_set_shares(a, b)) / 2 == pytest.approx(0.5, abs=0.05)
    assert (mt.knn_two_sample(a, b) > 0.95
            and mt.knn_two_sample(b, a) == pytest.approx(mt.knn_two_sample(a, b)))


def test_two_sample_statistic_by_class():
    a, b = classes(1), classes(2)
    assert mt.knn_two_sample(a, b, 5, Y, Y) < 0.58
    swapped = mt.knn_two_sample(a, b, 5, Y, (Y + 1) % 5)
    # without labels nothing is wrong
    assert swapped > 0.99 and mt.knn_two_sample(a, b) < 0.58
    one = [mt.same_set_shares(a[Y == k], b[Y == k]) for k in range(5)]
    e = [sum((s[i] - 19 / 39) / (20 / 39) for s in one) / 5 for i in (0, 1)]
    assert mt.knn_two_sample(a, b, 5, Y, Y) == pytest.approx(
        0.5 + (abs(e[0]) + abs(e[1])) / 4)


def test_numbers_do_not_depend_on_order_rotation_or_scale():
    a, b = classes(1), classes(2) + 0.7
    i, j = (torch.randperm(100, generator=torch.Generator().manual_seed(s))
            for s in (3, 4))
    for f in (
        lambda a, y, b, t: mt.knn_two_sample(a, b, 5, y, t),
        mt.centroid_distance,
        lambda a, y, b, t: mt.silhouette(torch.cat([a, b]), torch.cat([y, t])),
    ):
        want = f(a, Y, b, Y)
        assert f(a[i], Y[i], b[j], Y[j]) == pytest.approx(want, abs=1e-5)
        assert f(turned(a), Y, turned(b), Y) == pytest.approx(want, abs=1e-5)


# class means --------------------------------------------------------------------------


def test_centroid_distance_by_hand():
    y = torch.tensor([0, 0, 1, 1])
    # means 0 and 10, variances 2: noise 1 each
    a = torch.tensor([[-1.0], [1.0], [9.0], [11.0]])
    b = torch.tensor([[3.0], [3.0], [13.0], [13.0]])  # means 3 and 13, no spread
    assert mt.centroid_distance(a, y, b, y) == pytest.approx(math.sqrt(
        (9 - 1) / (100 - 2)))
    assert mt.centroid_distance(a, y, a + 1e-3, y) == 0


def test_centroid_distance_is_unbiased_and_has_known_values():
    places = 0.25 * cloud(99, 10, 256)
    y = torch.arange(10).repeat_interleave(30)
    a = places[y] + cloud(1, 300, 256)
    found = {"same": places, "no class": places.mean(0).expand(10, -1),
             "next class": places.roll(1, 0)}
    found = {k: [mt.centroid_distance(a, y, p[y] + cloud(s, 300, 256), y)
                 for s in range(2, 7)]
             for k, p in found.items()}
    raw = torch.stack([(a - places[y] - cloud(2, 300, 256))[y == k].mean(0).norm()
                       for k in range(10)]).mean()
    # what equal classes would show without the correction
    assert raw / torch.pdist(places).mean() > 0.6
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
    assert (w.shape == (20, 4)
            and torch.allclose(rest.T @ rest / 95, torch.eye(4).double(), atol=1e-8))
    between = torch.stack([seen[Y == k].mean(0) for k in range(5)]).var(0)
    assert between.tolist() == sorted(between.tolist(), reverse=True)
    assert mt.silhouette(seen, Y) > mt.silhouette(mixed, Y) + 0.1
    other = mixed.double() @ mt.fisher_directions(mixed, Y)
    assert torch.allclose(torch.pdist(other), torch.pdist(seen), atol=1e-6)


def test_invalid_point_sets_are_refused():
    a, b = classes(1), classes(2)
    for bad in (a[:, :3], a[:1], a[0], a * math.nan):
        with pytest.raises(ValueError, match="accepted"):
            mt.knn_two_sample(bad, b)
    unknown = torch.where(Y == 4, math.nan, Y.double())
    for y, t in ((Y[:-1], Y), (Y, Y.clamp(max=3)), (Y[:, None], Y[:, None]),
                 (Y.tolist(), Y), (unknown, unknown)):
        with pytest.raises(ValueError, match="accepted"):
            mt.centroid_distance(a, y, b, t)
        with pytest.raises(ValueError, match="accepted"):
            mt.knn_two_sample(a, b, 5, y, t)
    for y, t in ((Y, None), (None, Y)):
        with pytest.raises(ValueError, match="labels of one set only; accepted: "
                               "of both, or of none"):
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


# spaces and experiments ---------------------------------------------------------------


def labelled_latents(n: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents `(n, 64)` whose ten classes differ in the first nine columns."""
    y = torch.arange(n) % 10
    means = 3 * torch.randn(10, 9, generator=torch.Generator().manual_seed(3))
    z = cloud(1, n, 64)
    z[:, :9] += means[y]
    return z, y


def test_class_directions_find_the_classes_of_new_latents():
    z, y = labelled_latents()
    flow = Glow((1, 8, 8), levels=2, depth=1, width=4)
    spaces = LatentSpaces.from_training(flow, z[:400], y[:400])
    assert spaces.directions.shape == (64, 9) and spaces.centroids.shape == (10, 9)
    assert (spaces.nearest_class(z[400:]) == y[400:]).double().mean() > 0.9
    assert list(spaces.maps) == ["all levels", "top level", "class directions"]
    assert [f(z).shape[1] for f in spaces.maps.values()] == [64, flow.top, 9]
    assert spaces.maps["top level"](z).equal(z[:, : flow.top])


def test_compared_latents_average_the_agreement_of_draws():
    z, y = labelled_latents()
    spaces = LatentSpaces.from_training(Glow((1, 8, 8), levels=2, depth=1, width=4), z,
                                        y)
    real, draws = (z[:200], y[:200]), [(z[200:400], y[200:400]), (z[400:], y[400:])]
    found = compare_latents(spaces, real, draws)
    assert set(found["all levels"]) == {"knn_two_sample", "centroid_distance",
                                        "silhouette"}
    assert found["class directions"]["accuracy"] > 0.9
    each = [compare_labelled_sets(*real, *draw, NEIGHBOURS)["silhouette"]
            for draw in draws]
    assert found["all levels"]["silhouette"] == pytest.approx(sum(each) / 2)


def test_balanced_subsets_have_equal_classes_by_seed():
    y = torch.arange(300) % 10
    a, b, c = (balanced_subset(y, 4, seed) for seed in (0, 0, 1))
    assert a.equal(b) and not a.equal(c) and len(a.unique()) == 40
    assert y[a].equal(torch.arange(10).repeat_interleave(4))


def test_first_images_of_each_digit_are_in_order():
    data = digits(32)
    x, y = first_per_digit(data, "test", 3)
    assert y.equal(torch.arange(10).repeat_interleave(3)) and x.shape == (30, 1, 32, 32)
    images, labels = labelled_images(data, "test")
    assert x[3].equal(images[(labels == 1).nonzero()[0, 0]])


@pytest.mark.slow
def test_figure_1_experiment_runs_on_digits(monkeypatch, tmp_path, few_digits):
    for name in ("whole_mnist", "mnist_for_training"):
        monkeypatch.setattr(f"condgen.experiments.mnist.{name}",
                            lambda tier="tiny": few_digits)
    experiment = find_experiment("caglow/fig1-mnist")
    lab = Lab(experiment, "tiny", 0, tmp_path / "runs", progress=False, rounds=2)
    rows = experiment.run(lab)
    found = {(r["model"], r["variant"], r["metric"], r["at"]["space"]): r["value"]
             for r in rows}
    assert len(found) == len(rows) == 3 * (3 * 3 + 1)
    shares = [v for (_, _, metric, _), v in found.items()
              if metric in ("accuracy", "knn_two_sample")]
    assert all(0 <= v <= 1 for v in shares)
    # its Gaussian start has the classes
    assert found["CAGlow", "corrected", "accuracy", "class directions"] > 0.5
    experiment.figures(lab, rows, tmp_path / "fig1.json")
    assert (tmp_path / "fig1.png").stat().st_size > 5_000


# the figure ---------------------------------------------------------------------------


def test_embedding_separates_classes_and_is_deterministic():
    x = torch.cat([classes(1, 60), classes(2, 60)])
    y = fg.tsne(x, perplexity=12)
    assert y.shape == (200, 2) and mt.silhouette(y, Y.repeat(2)) > 0.5
    assert fg.tsne(x, perplexity=12).equal(y)
    for z, perplexity in ((x, 70), (x, 1), (x[0], 5), (x * math.inf, 5), (x[:, :1], 5)):
        with pytest.raises(ValueError, match="accepted"):
            fg.tsne(z, perplexity)


def test_figure_of_clusters():
    points, sampled = cloud(1, 40, 2), torch.arange(40) >= 20
    labels = torch.arange(40) % 10
    ax = fg.plot_clusters(points, labels, sampled, title="T")
    names = ax.get_legend_handles_labels()[1]
    assert (names == ["inferred from real images", "sampled", *map(str, range(10))]
            and ax.get_title() == "T")
    drawn = torch.cat([torch.tensor(c.get_offsets().tolist()).view(-1, 2)
                       for c in ax.collections])
    assert torch.allclose(*(x[x[:, 0].sort().indices] for x in (drawn, points)))
    assert sorted(t.get_text() for t in ax.texts) == sorted(map(str, range(10)))
    assert len(fg.figure_png(ax.figure)) < 100_000
    assert len(set(fg.CLASS_COLOURS)) == 10
    for bad in (
        (cloud(1, 40, 3), labels, sampled),
        (points, labels[:5], sampled),
        (points, labels, sampled.long()),
        (points, labels + 5, sampled),
        (points * math.nan, labels, sampled),
        (points[:0], labels[:0], sampled[:0]),
    ):
        with pytest.raises(ValueError, match="accepted"):
            fg.plot_clusters(*bad)
