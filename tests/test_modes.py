"""Counting modes: the count, what an error guarantees, codes, members that do not disturb each other, the rows."""

import math
from types import SimpleNamespace

import pytest
import torch

from condgen import metrics
from condgen.experiments import modes as md
from condgen.results import key

NEW = {"modes": "higher", "mode_precision": "higher", "mode_share": ""}


@pytest.fixture
def registry(monkeypatch):
    """The metrics of this chapter, until the registry has them."""
    for name, better in NEW.items():
        monkeypatch.setitem(metrics.METRICS, name, metrics.METRICS.get(name, metrics.MetricInfo(name, "", better)))


@pytest.mark.parametrize(("data", "k"), [(md.ring(), 8), (md.grid(), 25)])
def test_real_points_cover_all_modes_and_are_the_same_everywhere(data, k):
    shares = md.mode_shares(data.fresh, data)
    assert shares.shape == (k,) and md.covered(shares) == k
    assert abs(shares.sum() - (1 - math.exp(-4.5))) < 0.01
    again = md.point_set(data.name, data.centres, data.std)
    assert again.sha256 == data.sha256 and len(data.sha256) == 64
    assert md.point_set(data.name, data.centres, data.std + 1e-6).sha256 != data.sha256
    assert not torch.equal(data.train, data.fresh) and md.points(data.name.split()[0]) is data


def test_a_mode_counts_from_one_percent_on():
    data = md.ring()
    for few, counted in ((9, 1), (10, 2)):
        x = torch.cat([data.centres[:1].expand(1000 - few, 2), data.centres[1:2].expand(few, 2)])
        assert md.covered(md.mode_shares(x, data)) == counted
    edge = data.centres[:1] + torch.tensor([[0.299, 0.0], [0.301, 0.0]])
    assert md.mode_shares(edge, data)[0] == 0.5
    both = torch.stack([edge, edge + 9])
    assert torch.equal(md.mode_shares(both, data)[:, 0], torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        md.mode_shares(torch.empty(0, 2), data)
    with pytest.raises(ValueError, match="did you mean 'ring'"):
        md.points("rng")


@pytest.mark.parametrize("data", [md.ring(), md.grid()])
def test_below_the_losing_error_no_mode_is_lost_and_just_above_it_one_is(data):
    bound, n = md.losing_error(data.train, data), len(data.train)
    away = (data.train[:, None] - data.centres).norm(dim=2)
    costs = []
    for k in range(len(data.centres)):  # by hand: all but the 39 nearest leave
        inside = away[:, k][away[:, k] < 3 * data.std].sort().values
        costs.append(((3 * data.std - inside[39:]).square().sum() / n).item())
    assert math.isclose(bound, min(costs), rel_tol=1e-4)
    k = costs.index(min(costs))
    order = away[:, k].argsort()[39 : int((away[:, k] < 3 * data.std).sum())]
    lost, centre = data.train.clone(), data.centres[k]
    direction = (lost[order] - centre) / away[order, k][:, None]
    lost[order] = centre + direction * 3 * data.std * 1.0001
    error = (lost - data.train).square().sum(1).mean().item()
    assert md.covered(md.mode_shares(lost, data)) == len(data.centres) - 1 and bound < error < 1.002 * bound
    lost[order[0]] = data.train[order[0]]
    assert md.covered(md.mode_shares(lost, data)) == len(data.centres)
    assert md.losing_error(data.centres[:1].repeat(100, 1), data) == 0  # the others are lost already


def test_code_distance_is_zero_for_the_same_cloud_and_knows_a_shift():
    g = torch.Generator().manual_seed(0)
    z, angle = torch.randn(300, 2, generator=g), torch.linspace(0, math.pi, 500)
    directions = torch.stack([angle.cos(), angle.sin()])
    codes = torch.stack([z.flip(0), z + torch.tensor([1.0, 0.0])])
    same, shifted = md.code_distance(codes, z, directions)
    assert same < 1e-10 and abs(shifted - 0.5) < 0.01


def test_adam_with_a_rate_for_each_member_is_adam():
    net = md.Ensemble(2, (2, 3, 1), torch.Generator().manual_seed(0), same=True)
    twins = [md.Ensemble(1, (2, 3, 1), torch.Generator().manual_seed(0)) for _ in range(2)]
    x, rates = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)), (1e-2, 3e-3)
    ours = md.Adam([net], torch.tensor(rates))
    theirs = [torch.optim.Adam(t.parameters(), lr, betas=(0.5, 0.999)) for t, lr in zip(twins, rates, strict=True)]
    for _ in range(5):
        ours.step((net(x) - 1).square().sum())
        for twin, optimizer in zip(twins, theirs, strict=True):
            optimizer.zero_grad()
            (twin(x) - 1).square().sum().backward()
            optimizer.step()
    for k, twin in enumerate(twins):
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(a[k], b[0], atol=1e-6)


def test_members_are_trained_alone_and_without_weight_the_encoder_changes_nothing():
    few = [md.Variant(), md.Variant(lr=3e-3), md.Variant(weight=10.0), md.Variant(True, 10.0), md.Variant(True)]
    together = md.train(md.ring(), few, 8, frames=4)
    found = together.samples(60, 0)
    for k, variant in enumerate(few):
        alone = md.train(md.ring(), [variant], 8).samples(60, 0)[0]
        assert (found[k] - alone).abs().max() < 1e-4
    gaps = (found[:, None] - found).abs().amax((2, 3)) + torch.eye(5)
    assert gaps.min() > 1e-4 and together.frames.shape == (4, 5, 512, 2)
    assert [v.model for v in few] == ["GAN", "GAN", "GAN with reconstruction", "direct matching", "direct matching"]
    x = md.ring().fresh[:50]
    assert torch.equal(together.reconstructions(x), together.generator(together.codes(x)))
    with pytest.raises(ValueError, match="0 variants"):
        md.train(md.ring(), [], 8)


def test_the_film_is_a_pure_function():
    film = md.play_modes("grid", True, 10.0, steps=6, frames=3)
    assert film.shape == (3, 512, 2) and film.equal(md.play_modes("grid", True, 10.0, steps=6, frames=3))
    assert not film[0].equal(film[2]) and not film.equal(md.play_modes("grid", steps=6, frames=3))


def test_training_reduces_the_reconstruction_error():
    data, variant = md.ring(), [md.Variant(True, 10.0, 3e-3)]
    errors = [(md.train(data, variant, k).reconstructions(data.fresh) - data.fresh).square().mean() for k in (1, 150)]
    assert errors[1] < 0.3 * errors[0]


def test_median_interval():
    assert md.median_interval(list(range(10))[::-1]) == (4.5, 1, 8)
    assert md.median_interval([3.0]) == (3.0, None, None) and md.median_interval(range(5))[1] is None
    assert md.median_interval(range(6)) == (2.5, 0, 5) and md.median_interval(range(20)) == (9.5, 5, 14)
    with pytest.raises(ValueError, match="no values"):
        md.median_interval([])


def test_rows_of_a_tiny_run(registry):
    lab = SimpleNamespace(tier="tiny", seed=0, first=True)
    rows = md.ring_modes(lab)
    assert rows == md.ring_modes(lab)
    kinds = {(r["model"], r["at"]["weight"], r["at"].get("inputs")) for r in rows if r["metric"] == "modes"}
    assert ("GAN", 0.0, "prior samples") in kinds and ("GAN", 0.0, "reconstructions") not in kinds
    assert {("direct matching", w, i) for w in (0.0, 10.0) for i in
            ("prior samples", "reconstructions", "reconstructions of training points")} <= kinds
    for r in rows:
        if r["metric"] == "mode_precision" and r["at"]["inputs"] == "prior samples":
            masses = [m["value"] for m in rows if m["metric"] == "mode_share" and m["model"] == r["model"]
                      and {k: v for k, v in m["at"].items() if k != "rank"} == r["at"]]
            assert len(masses) == 8 and abs(sum(masses) - r["value"]) < 1e-4
            assert masses == sorted(masses, reverse=True)
    keys = [key(r, "model", "metric", "variant", "at") for r in rows]
    assert len(keys) == len(set(keys)) and len(md.grid_modes(lab)) > len(rows)
