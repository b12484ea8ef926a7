"""Measurements of images of two digits: patches, realism, edits, each on images whose
answer is known; collapsed and garbled generators fail.
"""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from evaluators import NearestDigit

from condgen.experiments.vigan import (
    EXPERIMENTS, PATCH, PairReference, digit_patches, edit_rows, patches_of, realism,
    two_digit_rows)
from condgen.recipes import find, resolve
from condgen.two_digits import digit_centroids, place_pairs, two_digits


@cache
def reference():
    data = two_digits(32, 1200)
    train = data.table("train")
    labels = torch.stack([*data.conditions.unpack(train["c"]).values()], 1)
    patches = digit_patches(train["x"].float() / 255).flatten(0, 1)
    return data, PairReference(data, NearestDigit(patches, labels.flatten()), 120, 1200)


def test_a_patch_is_the_digit_wherever_it_stands():
    digits = torch.rand(40, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    u = torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    x = place_pairs(digits, digits.flip(0), u)
    middle = torch.full((40, 4), 0.5)
    cut, same = digit_patches(x), digit_patches(place_pairs(digits, digits.flip(0),
                                                            middle))
    assert cut.shape == (40, 2, PATCH, PATCH)
    assert torch.allclose(cut, same)
    assert (cut - torch.stack([digits[:, 0], digits.flip(0)[:, 0]], 1)).abs().mean() < 0.3


def test_a_patch_never_has_pixels_of_the_other_half():
    x = torch.zeros(3, 1, 32, 32)
    x[..., 16:] = 1.0
    assert digit_patches(x)[:, 0].abs().max() == 0
    assert digit_patches(torch.zeros(1, 1, 64, 64)).shape == (1, 2, PATCH, PATCH)
    edge = torch.zeros(1, 1, 64, 64)
    edge[..., 63, 0] = edge[..., 0, 63] = 1.0
    assert torch.allclose(digit_patches(edge).sum((2, 3)), torch.full((1, 2), 0.25))


def test_patches_for_the_evaluator_are_labelled():
    data, source = patches_of("tiny"), two_digits(32, 240, seed=1)
    labels = source.conditions.unpack(source.table("test")["c"])
    found = data.table("test")["c"].argmax(1).view(-1, 2)
    assert torch.equal(found, torch.stack([labels["left"], labels["right"]], 1))
    cut = digit_patches(source.split_images("test")).flatten(0, 1)
    assert (data.split_images("test")[:, 0] - cut).abs().max() < 0.003


def test_real_images_pass_the_check_of_realism():
    data, real = reference()
    again = data.split_images("val")
    asked = torch.stack(
        [*data.conditions.unpack(data.table("val")["c"]).values()], 1)
    found = real.of_samples(again, asked)
    assert found["accuracy"] > 0.85 and found["digit_share"] > 0.85
    assert 0.8 < found["diversity_pixel"] < 1.2 and 0.8 < found["position_spread"] < 1.2
    assert found["realism"] == 1


def one_image_per_class(data, real):
    """The first real digit of each class, always at one place."""
    train = data.table("train")
    labels = torch.stack([*data.conditions.unpack(train["c"]).values()], 1).flatten()
    patches = digit_patches(train["x"].float() / 255).view(-1, 1, PATCH, PATCH)
    first = torch.stack([patches[labels == k][0] for k in range(10)])
    left, right = (first[real.labels[:, k]] for k in range(2))
    return place_pairs(left, right, torch.full((len(left), 4), 0.5))


def moved_prototypes(data, real):
    """The same at random places."""
    x = one_image_per_class(data, real)
    patches = digit_patches(x)[:, :, None]
    u = torch.rand(len(x), 4, generator=torch.Generator().manual_seed(0))
    return place_pairs(patches[:, 0], patches[:, 1], u)


def garbled(data, real):
    """Real images whose blocks of 3×3 pixels are exchanged within each digit."""
    g = torch.Generator().manual_seed(0)
    blocks = digit_patches(real.x)[:, :, 1:13, 1:13].unfold(2, 3, 3).unfold(3, 3, 3)
    flat = blocks.reshape(len(real.x), 2, 16, 3, 3)[:, :, torch.randperm(16, generator=g)]
    back = flat.view(-1, 2, 4, 4, 3, 3).permute(0, 1, 2, 4, 3, 5).reshape(-1, 2, 12, 12)
    pair = F.pad(back, (1, 1, 1, 1))[:, :, None]
    u = torch.rand(len(pair), 4, generator=g)
    return place_pairs(pair[:, 0], pair[:, 1], u)


def noise(data, real):
    return torch.rand(real.x.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model, fails", [
    (one_image_per_class, {"diversity_pixel", "position_spread"}),
    (moved_prototypes, {"diversity_pixel"}), (garbled, {"digit_share"}),
    (noise, {"digit_share"})])
def test_collapsed_and_garbled_models_fail_the_check(model, fails):
    data, real = reference()
    found = real.of_samples(model(data, real), real.labels)
    if model in (one_image_per_class, moved_prototypes):
        assert found["accuracy"] > 0.95  # which accuracy alone would not show
    assert found["realism"] == 0
    for name in fails:
        assert realism({"digit_share": 1.0, "diversity_pixel": 1.0,
                        "position_spread": 1.0, name: found[name]}) == 0


def test_samples_without_a_description_count_as_what_is_read():
    data, real = reference()
    found = real.of_samples(real.x)
    assert "accuracy" not in found and found["realism"] == 1


def edits(edit):
    """Rows of an editor of (images, own, wanted digits) by (edited, digit, metric)."""
    _, real = reference()

    def called(x, left, right):
        return edit(x, real.labels, torch.stack([left, right], 1))

    model = SimpleNamespace(edit=called)  # all 120 images are one batch
    return {(r["at"]["edited"], r["at"]["digit"], r["metric"]): r["value"]
            for r in edit_rows("M", "", real, model)}


def test_an_editor_that_does_nothing_changes_nothing():
    found = edits(lambda x, own, wanted: x)
    for edited in ("none", "left", "right"):
        for digit in ("left", "right"):
            kept = edited != digit
            assert (found[edited, digit, "accuracy"] > 0.8) == kept
            assert found[edited, digit, "centroid_shift"] == 0
            assert found[edited, digit, "reconstruction_distance"] == 0


def test_a_true_edit_is_read_and_shifts_are_of_64_pixels():
    """A digit of the wanted class replaces the old one, two pixels lower at 32."""
    data, real = reference()
    train = data.table("train")
    labels = torch.stack([*data.conditions.unpack(train["c"]).values()], 1).flatten()
    patches = digit_patches(train["x"].float() / 255).view(-1, PATCH, PATCH)
    bank = torch.stack([patches[labels == k][0] for k in range(10)])

    def edit(x, own, wanted):
        out = x.clone()
        for i in range(len(x)):
            for k in range(2):
                if own[i, k] != wanted[i, k]:
                    row, column = digit_centroids(x[i:i + 1])[0, k].round().long()
                    top, left = int(row) - 6, max(16 * k, int(column) - 6)
                    left = min(left, 16 * k + 2)
                    top = min(max(top, 0), 18)
                    out[i, 0, :, 16 * k:16 * k + 16] = 0
                    out[i, 0, top:top + 14, left:left + 14] = bank[wanted[i, k]]
        return out

    found = edits(edit)
    assert found["left", "left", "accuracy"] > 0.95
    assert found["left", "right", "accuracy"] > 0.8
    assert found["left", "left", "centroid_shift"] < 3
    assert found["left", "right", "centroid_shift"] == 0
    low = edits(lambda x, own, wanted: torch.cat([torch.zeros_like(x[..., :2, :]),
                                                  x[..., :-2, :]], 2))
    assert low["none", "left", "centroid_shift"] == pytest.approx(4, abs=0.1)



class Asked(Exception):
    """Names the recipe that an experiment trains."""


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_an_experiment_measures_its_own_recipe_and_size(experiment):
    def train(name):
        raise Asked(name)

    data, real = reference()
    lab = SimpleNamespace(size={"n": 24, "known": 100}, data=data, first=False,
                          evaluator=lambda name: real.evaluator, train=train,
                          experiment=experiment)
    with pytest.raises(Asked, match=f"^{experiment.recipes[-1]}$"):
        two_digit_rows(lab)
    side = 64 if experiment.name.endswith("-64") else 32
    for source in (experiment.data, find(experiment.recipes[-1]).data):
        assert resolve(source)("tiny").shape == (1, side, side)
