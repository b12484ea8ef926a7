"""Mode counts: the count, the error bound, codes, independent members, rows."""

import math

import pytest
import torch

from condgen.experiments import modes as md
from condgen.instability import ParallelMLPs
from condgen.lab import Lab
from condgen.reproduction import probe
from condgen.results import row_key


@pytest.mark.parametrize(("data", "k"),
                         [(md.ring_of_gaussians(), 8), (md.grid_of_gaussians(), 25)])
def test_real_points_cover_all_modes_and_are_deterministic(data, k):
    shares = md.mode_shares(data.fresh, data)
    assert shares.shape == (k,) and md.count_covered(shares) == k
    assert abs(shares.sum() - (1 - math.exp(-4.5))) < 0.01
    again = md.point_set(data.name, data.centres, data.std)
    assert again.sha256 == data.sha256 and len(data.sha256) == 64
    assert md.point_set(data.name, data.centres, data.std + 1e-6).sha256 != data.sha256
    assert (not torch.equal(data.train, data.fresh)
            and md.named_point_set(data.name.split()[0]) is data)


def test_a_mode_counts_from_one_percent_on():
    data = md.ring_of_gaussians()
    for few, counted in ((9, 1), (10, 2)):
        x = torch.cat([data.centres[:1].expand(1000 - few, 2),
                       data.centres[1:2].expand(few, 2)])
        assert md.count_covered(md.mode_shares(x, data)) == counted
    edge = data.centres[:1] + torch.tensor([[0.299, 0.0], [0.301, 0.0]])
    assert md.mode_shares(edge, data)[0] == 0.5
    both = torch.stack([edge, edge + 9])
    assert torch.equal(md.mode_shares(both, data)[:, 0], torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        md.mode_shares(torch.empty(0, 2), data)
    with pytest.raises(ValueError, match="did you mean 'ring'"):
        md.named_point_set("rng")


@pytest.mark.parametrize("data", [md.ring_of_gaussians(), md.grid_of_gaussians()])
def test_bound_is_the_least_error_that_drops_a_mode(data):
    bound, n = md.mode_dropping_mse(data.train, data), len(data.train)
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
    assert (md.count_covered(md.mode_shares(lost, data)) == len(data.centres) - 1
            and bound < error < 1.002 * bound)
    lost[order[0]] = data.train[order[0]]
    assert md.count_covered(md.mode_shares(lost, data)) == len(data.centres)
    # does not cover the others
    assert md.mode_dropping_mse(data.centres[:1].repeat(100, 1), data) == 0


def test_code_distance_of_equal_and_shifted_codes():
    g = torch.Generator().manual_seed(0)
    z, angle = torch.randn(300, 2, generator=g), torch.linspace(0, math.pi, 500)
    directions = torch.stack([angle.cos(), angle.sin()])
    codes = torch.stack([z.flip(0), z + torch.tensor([1.0, 0.0])])
    same, shifted = md.sliced_wasserstein(codes, z, directions)
    assert same < 1e-10 and abs(shifted - 0.5) < 0.01


def test_adam_with_a_rate_for_each_member_is_adam():
    net = ParallelMLPs(2, (2, 3, 1), torch.Generator().manual_seed(0), same=True)
    twins = [ParallelMLPs(1, (2, 3, 1), torch.Generator().manual_seed(0))
             for _ in range(2)]
    x, rates = (torch.randn(8, 2, generator=torch.Generator().manual_seed(1)),
                (1e-2, 3e-3))
    ours = md.EnsembleAdam([net], torch.tensor(rates))
    theirs = [torch.optim.Adam(t.parameters(), lr, betas=(0.5, 0.999))
              for t, lr in zip(twins, rates, strict=True)]
    for _ in range(5):
        ours.step((net(x) - 1).square().sum())
        for twin, optimizer in zip(twins, theirs, strict=True):
            optimizer.zero_grad()
            (twin(x) - 1).square().sum().backward()
            optimizer.step()
    for k, twin in enumerate(twins):
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(a[k], b[0], atol=1e-6)


def test_members_are_independent_and_weight_0_is_a_plain_gan():
    few = [md.Variant(), md.Variant(lr=3e-3), md.Variant(weight=10.0),
           md.Variant(True, 10.0), md.Variant(True)]
    together = md.train_variants(md.ring_of_gaussians(), few, 8, frames=4)
    found = together.samples(60, 0)
    for k, variant in enumerate(few):
        alone = md.train_variants(md.ring_of_gaussians(), [variant],
                                  8).samples(60, 0)[0]
        assert (found[k] - alone).abs().max() < 1e-4
    gaps = (found[:, None] - found).abs().amax((2, 3)) + torch.eye(5)
    assert gaps.min() > 1e-4 and together.frames.shape == (4, 5, 512, 2)
    assert [v.model for v in few] == ["GAN", "GAN", "GAN with reconstruction",
                                      "direct matching", "direct matching"]
    x = md.ring_of_gaussians().fresh[:50]
    assert torch.equal(together.reconstructions(x),
                       together.generator(together.codes(x)))
    assert all(v.shape == (5,) for v in together.losses.values())
    assert len(together.losses["generator"].unique()) == 5


@pytest.mark.parametrize(("given", "message"), [
    ({"variants": []}, "0 variants"),
    ({"steps": 3, "frames": 4}, "3 steps, 4 frames"),
    ({"batch": 0}, "batch=0; accepted: an integer, 1 or more"),
    ({"batch": 2.5}, "batch=2.5"),
    ({"width": 0}, "width=0"),
    ({"items": -1}, "items=-1"),
])
def test_invalid_trainings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        md.train_variants(md.ring_of_gaussians(),
                          **{"variants": [md.Variant()], "steps": 8, **given})


def test_samples_during_training_are_deterministic():
    film = md.samples_during_training("grid", True, 10.0, steps=6, frames=3)
    assert film.shape == (3, 512, 2) and film.equal(md.samples_during_training(
        "grid", True, 10.0, steps=6, frames=3))
    assert (not film[0].equal(film[2])
            and not film.equal(md.samples_during_training("grid", steps=6, frames=3)))


def test_training_reduces_the_reconstruction_error():
    data, variant = md.ring_of_gaussians(), [md.Variant(True, 10.0, 3e-3)]
    runs = [md.train_variants(data, variant, steps) for steps in (1, 150)]
    errors = [(run.reconstructions(data.fresh) - data.fresh).square().mean()
              for run in runs]
    assert errors[1] < 0.3 * errors[0]


def test_median_interval():
    assert md.median_interval(list(range(10))[::-1]) == (4.5, 1, 8)
    assert (md.median_interval([3.0]) == (3.0, None, None)
            and md.median_interval(range(5))[1] is None)
    assert (md.median_interval(range(6)) == (2.5, 0, 5)
            and md.median_interval(range(20)) == (9.5, 5, 14))
    with pytest.raises(ValueError, match="no values"):
        md.median_interval([])


def lab_of(experiment, tmp_path, **options):
    """A lab at tier `tiny`."""
    return Lab(experiment, "tiny", 0, tmp_path, progress=False, **options)


@pytest.mark.parametrize("experiment", md.EXPERIMENTS)
def test_rows_of_a_tiny_run(experiment, tmp_path):
    k = len(lab_of(experiment, tmp_path).data.centres)
    rows = experiment.run(lab_of(experiment, tmp_path))
    assert rows == experiment.run(lab_of(experiment, tmp_path))
    kinds = {(r["model"], r["at"]["weight"], r["at"].get("inputs"))
             for r in rows if r["metric"] == "modes"}
    assert (("GAN", 0.0, "prior samples") in kinds
            and ("GAN", 0.0, "reconstructions") not in kinds)
    assert {("direct matching", w, i) for w in (0.0, 10.0)
            for i in ("prior samples", "reconstructions",
                      "reconstructions of training points")} <= kinds
    for r in rows:
        if r["metric"] == "mode_precision" and r["at"]["inputs"] == "prior samples":
            masses = [m["value"] for m in rows
                      if m["metric"] == "mode_share" and m["model"] == r["model"]
                      and {**m["at"], "rank": 0} == {**r["at"], "rank": 0}]
            assert len(masses) == k and abs(sum(masses) - r["value"]) < 1e-4
            assert masses == sorted(masses, reverse=True)
    keys = [row_key(r, "model", "metric", "variant", "at") for r in rows]
    assert len(keys) == len(set(keys))
    assert {r["protocol"]["steps"] for r in rows} == {40}


@pytest.mark.parametrize("experiment", md.EXPERIMENTS)
def test_probe_is_short_and_has_losses_of_all_variants(experiment, tmp_path):
    found = probe(experiment, tmp_path)
    rows = experiment.run(lab_of(experiment, tmp_path, rounds=3))
    assert {r["protocol"]["steps"] for r in rows} == {3}
    sizes = experiment.sizes["tiny"]
    assert len(found["losses"]) == 2 * 2 * len(sizes["rates"]) * len(sizes["weights"])
    assert all(map(math.isfinite, found["losses"].values()))


def test_best_rate_has_most_modes_then_most_precision():
    shares = torch.tensor([[0.5, 0.0], [0.2, 0.2], [0.3, 0.2], [0.4, 0.4]])
    assert md.closest_to_all_modes(shares, [0, 1, 2]) == 2
    assert md.closest_to_all_modes(shares, [0, 1]) == 1


def test_declared_data_are_the_same_points_at_every_tier():
    sets = md.ring_of_gaussians, md.grid_of_gaussians
    for experiment, points in zip(md.EXPERIMENTS, sets, strict=True):
        name = experiment.data.rpartition(".")[2]
        assert all(getattr(md, name)(tier) is points() for tier in experiment.sizes)
