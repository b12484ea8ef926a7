"""Textured scenes: what each kind of reference promises."""

import pytest
import torch
from torch.nn import functional as F

from condgen.matching import (
    degrade, match_patches, patch_corners, refine_corners, swap_patches)
from condgen.scenes import (
    ALL_KINDS, KINDS, SHARES, draw_textures, reference_textures, scene_pairs, scenes)


def gain(kind, n=4, size=64):
    """Decibels that refined, swapped detail adds to bicubic enlargement."""
    pairs, found = scene_pairs(size, n, (kind,), seed=9), []
    for x, r in zip(pairs["x"] / 255, pairs["reference"] / 255):
        low, low_r = degrade(x[None])[0], degrade(r[None])[0]
        a, b = (F.avg_pool2d(t - 0.5, 4) for t in (low, low_r))
        corners = patch_corners(match_patches(a, b)[0], size // 4, 4)
        corners, _ = refine_corners(low, low_r, corners)
        out = low + swap_patches(r - low_r, corners, 4)
        found.append(10 * ((low - x).square().mean()
                           / (out - x).square().mean()).log10())
    return torch.stack(found).mean().item()


def test_good_references_help_and_bad_ones_harm():
    gains = {kind: gain(kind) for kind in ("shift", "same", "other", "noise")}
    assert gains["shift"] > 2 and gains["same"] > 0.8, gains
    assert gains["other"] < 0 and gains["noise"] < 0, gains


def test_the_small_image_does_not_show_the_detail():
    x = scene_pairs(64, 4, ("noise",), seed=1)["x"] / 255
    lost = (x - degrade(x)).square().mean() / x.var(dim=(2, 3)).mean()
    assert 0.2 < lost < 0.8


@pytest.mark.parametrize("kind", SHARES)
def test_a_share_of_the_textures_is_kept(kind):
    textures = draw_textures(torch.Generator().manual_seed(0))
    other = reference_textures(textures, kind, torch.Generator().manual_seed(1))
    kept = [torch.equal(a, b) for a, b in zip(textures["waves"], other["waves"])]
    assert sum(kept) == SHARES.index(kind)


def test_equal_seeds_give_equal_scenes_whatever_else_is_asked():
    whole, part = scene_pairs(32, 2), scene_pairs(32, 2, ("view", "noise"))
    for kind, row in (("view", 0), ("noise", 1)):
        there = KINDS.index(kind)
        assert torch.equal(part["reference"][row], whole["reference"][there])
    assert torch.equal(part["x"][0], whole["x"][0])
    assert not torch.equal(scene_pairs(32, 1, seed=1)["x"], whole["x"][:7])


def test_the_data_set_has_references_and_disjoint_scenes():
    data = scenes(32, 5, 3)
    table = data.table("test")
    assert table["reference"].dtype == torch.uint8 and set(table) == {
        "x", "c", "reference", "kind"}
    assert table["kind"].tolist() == [*range(len(ALL_KINDS))] * 3
    assert len(data.table("train")["x"]) == 5 * len(KINDS)
    train, test = ({x.numpy().tobytes() for x in data.table(s)["x"]}
                   for s in ("train", "test"))
    assert not train & test
    assert data.sha256 != scenes(32, 5, 3, seed=1).sha256


def test_distinct_pairs_share_no_scene():
    data, plain = scenes(32, 3, 2, distinct=True), scenes(32, 3, 2)
    table = data.table("train")
    assert len({x.numpy().tobytes() for x in table["x"]}) == 3 * len(KINDS)
    assert len({x.numpy().tobytes() for x in plain.table("train")["x"]}) == 3
    assert table["kind"].bincount().tolist() == [3] * len(KINDS)
    for part in ("val", "test"):
        assert all(torch.equal(a, b) for a, b in zip(data.table(part).values(),
                                                     plain.table(part).values()))
    assert data.sha256 != plain.sha256


def test_wrong_kinds_and_sizes_are_refused():
    with pytest.raises(ValueError, match="did you mean 'shift'"):
        scene_pairs(32, 1, ("shft",))
    for size in (12, 30):
        with pytest.raises(ValueError, match="accepted: 16, 20"):
            scene_pairs(size, 1)
