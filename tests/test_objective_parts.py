"""The parts of CAGlow's objective: what each measure says on data whose answer is
known, and that the measured training is CAGlow's.
"""

import math

import pytest
import torch

from condgen.conditions import Code
from condgen.contracts import Batch, Noise
from condgen.data import digits
from condgen.experiments.objective_parts import (
    MOMENTS, OURS, PAPER, PARTS, ObservedCAGlow, ScoredLatents, code_paths,
    correlation_ratio, coverage, fresh_reader, information_bound, log_rows, r_squared,
    rank_correlations, separability, step_ratios)
from condgen.models.caglow import CAGlow
from condgen.models.glow import Glow

N = 2_000


@pytest.fixture(scope="module")
def g():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def latents():
    g = torch.Generator().manual_seed(1)
    c = torch.eye(10).repeat(20, 1)
    return ScoredLatents(torch.randn(200, 256, generator=g), c,
                         scores=torch.randn(200, 2, generator=g))


def built(name, **changes):
    """A small model of `PARTS` on a flow that is not trained."""
    options = {k: v for k, v in PARTS[name].items() if k != "axes"} | changes
    torch.manual_seed(0)
    glow = Glow((1, 16, 16), levels=2, depth=1, width=8)
    return ObservedCAGlow.from_glow(glow, digits().conditions + (Code("u", 2),),
                                    **options)


def test_every_part_differs_from_all_losses_in_one_thing():
    for (model, variant), options in PARTS.items():
        whole = PARTS[model, "all losses"]
        changed = [k for k in options.keys() | whole.keys()
                   if options.get(k) != whole.get(k)]
        assert len(changed) == (0 if variant == "all losses" else
                                2 if variant == "no decoder, no axes" else 1), variant
    assert [PARTS[m, "all losses"]["latent"] for m in PAPER] == ["top", "all"]


def test_bound_is_zero_without_information_and_sums_over_codes(g):
    u = 2 * torch.rand(N, 2, generator=g) - 1
    read = u + 0.1 * torch.randn(N, 2, generator=g)
    assert information_bound(u, torch.zeros_like(u)) == 0
    each = [information_bound(u[:, j : j + 1], read[:, j : j + 1]) for j in (0, 1)]
    assert information_bound(u, read) == pytest.approx(sum(each))
    # h(u) − ½ log 2πe σ² for errors of the deviation 0.1
    assert each[0] == pytest.approx(
        math.log(2) - 0.5 * math.log(2 * math.pi * math.e * 0.01), abs=0.05)


def test_reader_finds_codes_and_invents_none(g):
    u = 2 * torch.rand(N, 1, generator=g) - 1
    noise = torch.randn(N, 5, generator=g)
    bent = torch.cat([u.square(), (u > 0).float(), noise], 1)
    half = N // 2
    found = {name: fresh_reader(z[:half], u[:half], z[half:])
             for name, z in {"bent": bent, "noise": noise}.items()}
    assert r_squared(u[half:], found["bent"]) > 0.85  # 0.75 for a linear reader
    assert abs(r_squared(u[half:], found["noise"])) < 0.1
    assert information_bound(u[half:], found["noise"]) == 0


def test_correlation_ratio_is_between_chance_and_certainty(g):
    y = torch.arange(300) % 10
    none = torch.tensor([correlation_ratio(torch.randn(300, 1, generator=g), y)
                         for _ in range(300)])
    assert abs(none.mean()) < 0.01
    assert correlation_ratio(y[:, None].double(), y) == pytest.approx(1)
    values = y[:, None] + torch.randn(300, 1, generator=g)
    both = torch.cat([torch.randn(300, 1, generator=g), 3 - 2 * values], 1)
    assert correlation_ratio(both, y) == pytest.approx(correlation_ratio(values, y))


def test_coverage_counts_classes_and_modes(g):
    real, y = torch.randn(200, 3, generator=g), torch.arange(200) % 2
    real = real + 20 * y[:, None]
    assert coverage(real, y, real, y) == 1
    assert coverage(real, 1 - y, real, y) == 0
    half = torch.where((y == 0)[:, None], real, real + 100)
    assert coverage(half, y, real, y) == 0.5


def test_paths_are_described_by_their_steps():
    place = torch.linspace(0, 1, 11)
    paths = torch.stack([place, (place > 0.5).float()])[:, None, :, None].repeat(
        1, 3, 1, 4)
    assert step_ratios(paths) == pytest.approx([1, 10], abs=1e-5)
    values = torch.stack([place.exp(), -place])[:, None].repeat(1, 3, 1)
    assert rank_correlations(values) == pytest.approx([1, -1])


def test_along_a_path_only_one_code_moves():
    model = built((PAPER[1], "all losses")).eval()
    paths = code_paths(model, 4, 3, 0.7, 0)
    assert paths.shape == (2, 4, 3, 1, 16, 16)
    with torch.no_grad():
        # columns of u among digit, codes and noise
        model.encoder.layers[0].weight[:, 10] = 0
    still, moving = code_paths(model, 4, 3, 0.7, 0)
    assert torch.allclose(still[:, 0], still[:, 2], atol=1e-5)
    assert (moving[:, 0] - moving[:, 2]).abs().max() > 1e-4


def test_the_observed_loss_is_that_of_caglow(latents):
    model = built((PAPER[0], "summed matching"))
    table = latents.table("train")
    batch = Batch({k: v[:80] for k, v in table.items()}, Noise((0,), slice(None), 80))
    terms, plain = model.supervision_loss(batch), CAGlow.supervision_loss(model, batch)
    assert terms.keys() - plain.keys() == {"right"} and terms["right"][0] == 0
    assert all(torch.equal(terms[k][1], v) and terms[k][0] == w
               for k, (w, v) in plain.items())
    assert 0 <= terms["right"][1] <= 1


def test_codes_with_zero_scores_begin_at_zero(latents):
    model = built((OURS, "all losses, no axes"), hidden=8)
    model.encoder.initialize_from(latents.z, latents.c, 0 * latents.scores)
    assert not model.encoder.axes.any() and model.encoder.root[0].std() > 0
    root = model.encoder.root.clone()
    model.encoder.initialize_from(latents.z, latents.c)
    assert torch.allclose(root, model.encoder.root, atol=1e-5)


def test_separability_is_chance_for_equal_distributions(latents):
    model = built((PAPER[1], "all losses"))
    model.store_condition_rows(latents.c)
    own = model.sample_latent(N, 1.0, torch.Generator().manual_seed(5))
    apart = torch.randn(N, 256, generator=torch.Generator().manual_seed(6))
    assert abs(separability(model, own, N, 0) - 0.5) < 0.06
    assert separability(model, apart, N, 0) > 0.95


@pytest.mark.parametrize("n", [3, 200, 251])
def test_every_part_of_a_training_has_an_accuracy(n):
    log = [{"supervision.right": i / n, "encoder.E": float(i)} for i in range(n)]
    rows = log_rows(log, (OURS, "all losses"))
    ends = [r["at"]["until"] for r in rows if r["metric"] == "accuracy"]
    assert ends == [*MOMENTS]
    values = [r["value"] for r in rows if r["metric"] == "accuracy"]
    assert values == sorted(values)
    # a loss that rises by 1 from row to row
    assert rows[-1]["value"] == pytest.approx(0.5**0.5)
