"""The benchmark: what it compares, how it counts, and that it says so when
something is missing.
"""
import math

import pytest
import torch

from condgen.bijections import initialize_from_data
from condgen.experiments import speed
from condgen.experiments.speed import (
    MODES, build, comparisons, noise_images, values_at, speed_ratio)
from condgen.peers import PEERS
from condgen.results import row

SHAPE = (1, 8, 8)


def entry(model: str) -> speed.Implementation:
    found = build(model, "default" if model == "condgen" else "as published", SHAPE, 2,
                  1, 8)
    if model == "condgen":
        initialize_from_data(found.module.flow, noise_images(16, SHAPE))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", ["condgen", *PEERS])
def test_each_entry_is_an_invertible_trainable_density(model):
    x, found = noise_images(16, SHAPE), entry(model)
    optimizer = torch.optim.Adam(found.module.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        losses.append(found.loss(x))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 3
    found.module.eval()
    with torch.no_grad():
        assert (found.round_trip(x) - x).abs().max() < 1e-4
        assert found.sample(3).shape == (3, *SHAPE)
        one, two = found.loss(x[:1]), found.loss(x[1:2])
        # a mean over the batch
        assert torch.isclose(found.loss(x[:2]), (one + two) / 2, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", list(PEERS))
def test_other_libraries_densities_satisfy_law_1(model):
    """−log p(x) is the energy of the latent minus log|det|, here against
    automatic differentiation.
    """
    found = build(model, "as published", (1, 4, 4), 2, 1, 4)
    x = noise_images(8, (1, 4, 4))
    found.loss(x)  # starts what starts from data
    found.module.eval()

    def flow(v: torch.Tensor) -> torch.Tensor:
        if model == "nflows":
            return found.module._transform(v)[0]
        if model == "FrEIA":
            return found.module(v)[0]
        return torch.cat(
            [part.flatten(1) for part in found.module.inverse_and_log_det(v)[0]], 1)

    for item in x[:2]:
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0],
                                                      item).reshape(16, 16)
        energy = flow(item[None]).square().sum() / 2 + 8 * math.log(2 * math.pi)
        assert torch.isclose(found.loss(item[None]),
                             energy - torch.linalg.slogdet(jacobian)[1], atol=1e-3)


def test_ratios_are_taken_within_rounds():
    found = speed_ratio([1.0, 10.0, 1.0], {"a": [2.0, 20.0, 2.0], "b": [9.0, 9.0, 9.0]})
    assert found == {"peer": "a", "median": 2.0, "low": 2.0, "high": 2.0}


def test_comparisons_name_the_fastest_library_and_the_mode():
    at, rows = {"K": 1, "width": 4, "resolution": 8}, []
    for metric in ("step_seconds", "sample_seconds"):
        rows += [row("condgen", metric, [1.0, 1.0], mode, at) for mode in MODES]
        for kind, factor in (("as published", 3.0), ("bf16 autocast", 2.0)):
            rows += [row(p, metric, [factor + i, factor + i], kind, at)
                     for i, p in enumerate(PEERS)]
    found = comparisons(rows, 1, 4)
    first = next(iter(PEERS))
    assert found["training step, default | fastest peer, as published"]["peer"] == first
    assert found["training step, default | fastest peer, "
                 "bf16 autocast"]["median"] == 2.0
    place = list(PEERS).index("antsnormflows")
    assert found["training step, recomputed, "
                 "float32 | antsnormflows (checkpoints)"]["median"] == 3.0 + place
    assert found["sampling, default | fastest peer, as published"]["median"] == 3.0
    assert len(found) == 2 * len(MODES) + 3 and not comparisons(rows, 2, 4)


def test_numbers_are_separate_for_each_allocator():
    at = {"K": 1, "width": 4, "resolution": 8}
    found = ((1, "returns at once"), (9, "as it is"))
    rows = [row("condgen", "activation_mb", v, "default", at, allocator=a)
            for v, a in found]
    assert values_at(rows, "activation_mb", K=1) == {("condgen", "default"): [1.0]}
    assert values_at(rows, "activation_mb", "as it is", K=1) == {
        ("condgen", "default"): [9.0]}
    assert values_at(rows, "activation_mb", K=2) == {}


@pytest.mark.parametrize("args, message",
                         [(("condgn", "default"), "did you mean 'condgen'"),
                          (("condgen", "as published"), "accepted: .*recomputed, bf16"),
                          (("nflows", "default"), "bf16 autocast")])
def test_unknown_entries(args, message):
    with pytest.raises(ValueError, match=message):
        build(*args, SHAPE, 1, 1, 4)


def test_unknown_tier():
    with pytest.raises(ValueError, match="tier='cup'.*did you mean 'cpu'"):
        speed.benchmark("cup")


def test_a_missing_library_is_left_out_and_named(monkeypatch):
    def absent(*args):
        raise ImportError("No module named 'nflows'")

    said = []
    monkeypatch.setitem(speed.PEERS, "nflows", absent)
    monkeypatch.setattr(speed, "TIMED_MODELS",
                        [("condgen", "default"), ("nflows", "as published")])
    rows = speed.time_models((1, 16, 16), 1, 4, 1, said.append)
    assert {r["model"] for r in rows} == {"condgen"}
    assert said[0] == "nflows: No module named 'nflows'; left out"
