"""Measurements of ViGAN's changes and of photographs: what a linear reader finds in draws
of codes, the variants that are compared, and switches of attributes.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from condgen.experiments.vigan import pairs_of
from condgen.experiments.vigan_front import RECIPE, VARIANTS, digits_in_draws
from condgen.experiments.vigan_photographs import switch_rows
from condgen.models.vigan import ViGAN
from condgen.recipes import find


def lab_of(data):
    return SimpleNamespace(data=data, seed=0, size={"known": 240})


def labels_of(data, split):
    return torch.stack([*data.conditions.unpack(data.table(split)["c"]).values()], 1)


@pytest.mark.parametrize("log_std, low, high", [(-8.0, 1.0, 1.0), (5.0, 0.0, 0.35)])
def test_draws_and_not_means_are_read(log_std, low, high):
    """Means are the left digit in both cases; in the second one noise hides it."""
    data = pairs_of("tiny")
    left = {}
    for split in ("train", "test"):
        for x, c in zip(data.split_images(split), labels_of(data, split)):
            left[x.numpy().tobytes()] = c[0]

    def posterior(x):
        own = torch.stack([left[image.numpy().tobytes()] for image in x])
        mean = F.one_hot(own, 10).float()
        return mean, torch.full_like(mean, log_std)

    x = data.split_images("test")
    real = SimpleNamespace(x=x, labels=labels_of(data, "test"))
    found = digits_in_draws(SimpleNamespace(posterior=posterior), lab_of(data), real)
    assert low <= found["left"] <= high and found["right"] < 0.5


def test_each_variant_changes_one_argument_of_vigan():
    data, recipe = pairs_of("tiny"), find(RECIPE)
    for name, arguments in VARIANTS.items():
        assert len(arguments) == bool(name)
        model = recipe.build(data, "tiny", **arguments)
        assert isinstance(model, ViGAN)
        assert all(getattr(model, k) == value for k, value in arguments.items())


def test_switches_count_the_other_attributes_only():
    """An image is its attributes; this editor also turns the last one round."""
    x = torch.cartesian_prod(*[torch.arange(2.0)] * 3)

    def edit(x, old, new):
        made = new.clone()
        changed = (old != new).any(1)
        made[changed, 2] = torch.where(old[changed, 2] == new[changed, 2],
                                       1 - old[changed, 2], new[changed, 2])
        return made

    rows = switch_rows("M", edit, x, x, lambda x: x, ["a", "b", "c"], 4)
    found = {(r["metric"], r["variant"], *r["at"].values()): r["value"] for r in rows}
    assert all(found["attribute_accuracy", "", name, to] == 1
               for name in "abc" for to in ("on", "off"))
    assert found["interference", "edited", "a", "on"] == 0.5
    assert found["interference", "edited", "c", "off"] == 0
    assert found["interference", "re-encoded", "all"] == 0
    assert found["interference", "edited", "all"] == pytest.approx(1 / 3)
