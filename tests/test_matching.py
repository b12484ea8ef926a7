"""Matching of patches against brute force, swapping, and refined matches."""

import pytest
import torch
import torch.nn.functional as F

from condgen.matching import (
    CUES, PATCH, degrade, displaced_wave_error, match_coherence, match_cues,
    match_patches, patch_corners, refine_corners, reduce_images, spread_scores,
    swap_patches)


def features(seed, *shape):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).relu()


def brute(target, reference):
    """All cosines, from unfolded and normalised patches."""
    a, b = (F.normalize(F.unfold(f[None], PATCH)[0], dim=0)
            for f in (target, reference))
    return a.T @ b


SIZES = [((12, 15), (9, 21)), ((3, 3), (7, 4)), ((20, 8), (3, 3)), ((16, 16), (30, 30))]


@pytest.mark.parametrize("own, other", SIZES)
@pytest.mark.parametrize("tile", [(1, 1), (4, 8), (100, 100), (5, 3)])
def test_indices_are_those_of_brute_force(own, other, tile):
    a, b = features(0, 7, *own), features(1, 7, *other)
    index, cosine = match_patches(a, b, *tile)
    best, wanted = brute(a, b).max(1)
    # where a patch of zeros has cosine 0 with all, any index is right
    clear = best > 0
    assert torch.equal(index.flatten()[clear], wanted[clear])
    assert torch.allclose(cosine.flatten(), best, atol=1e-12)
    assert index.shape == (own[0] - 2, own[1] - 2)


def test_float32_differs_only_between_nearly_equal_patches():
    a, b = features(2, 32, 24, 24), features(3, 32, 24, 24)
    b[:, 12:] = b[:, :12] + 1e-7 * features(4, 32, 12, 24)  # near ties
    every = brute(a, b)
    index, _ = match_patches(a.float(), b.float())
    chosen = every.gather(1, index.view(-1, 1))[:, 0]
    assert (every.max(1).values - chosen).max() < 1e-5


def test_scaled_features_have_the_same_matches():
    a, b = features(5, 4, 9, 9), features(6, 4, 11, 9)
    index, cosine = match_patches(a, b)
    again, same = match_patches(7 * a, 0.01 * b)
    assert torch.equal(index, again) and torch.allclose(cosine, same)


def test_features_that_do_not_fit_are_refused():
    a = features(0, 4, 9, 9)
    for b in (features(0, 5, 9, 9), features(0, 4, 2, 9), features(0, 4, 9)):
        with pytest.raises(ValueError, match="accepted"):
            match_patches(a, b)
    with pytest.raises(ValueError, match="4 divides"):
        reduce_images(torch.rand(1, 3, 18, 16))


@pytest.mark.parametrize("cell", [1, 2, 4])
def test_swap_is_the_mean_over_all_covering_patches(cell):
    """Against a loop over patches, at every scale."""
    g = torch.Generator().manual_seed(7)
    maps = torch.rand(2, 6 * cell, 7 * cell, generator=g)
    index = torch.randint(4 * 5, (3, 4), generator=g)
    corners = patch_corners(index, 7, cell)
    total, count = torch.zeros(2, 5 * cell, 6 * cell), torch.zeros(5 * cell, 6 * cell)
    side = 3 * cell
    for y in range(3):
        for x in range(4):
            v, u = divmod(int(index[y, x]), 5)
            here = (slice(y * cell, y * cell + side), slice(x * cell, x * cell + side))
            there = maps[:, v * cell:v * cell + side, u * cell:u * cell + side]
            total[(slice(None), *here)] += there
            count[here] += 1
    assert torch.allclose(swap_patches(maps, corners, cell), total / count, atol=1e-6)


def test_scores_spread_like_the_pixels_of_patches():
    scores = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    spread = spread_scores(scores)
    assert torch.isclose(spread[0, 0], scores[0, 0])
    assert torch.isclose(spread[2, 2], scores[:3, :3].mean())


@pytest.mark.parametrize("move", [(3, -3), (-1, 2), (0, 0)])
def test_refinement_finds_a_displacement_exactly(move):
    g = torch.Generator().manual_seed(8)
    image = torch.rand(3, 40, 48, generator=g)
    reference = 0.3 + 0.4 * image.roll(move, (1, 2))
    index = torch.arange(8 * 10).view(8, 10)
    corners = patch_corners(index, 12, 4)
    moved, cosine = refine_corners(image, reference, corners)
    assert ((moved - corners)[1:-1, 1:-1] == torch.tensor(move)).all()
    assert cosine[1:-1, 1:-1].min() > 1 - 1e-5
    assert moved.min() >= 0 and (moved <= torch.tensor([28, 36])).all()


@pytest.mark.parametrize("reach", [0, 3])
def test_refined_cosines_are_those_of_a_loop(reach):
    """Zero-mean cosine of every place around every match, one after the other."""
    g = torch.Generator().manual_seed(9)
    target, reference = (torch.rand(2, *size, generator=g, dtype=torch.float64)
                         for size in ((16, 20), (24, 21)))
    corners = torch.stack([torch.randint(0, 11, (2, 3), generator=g),
                           torch.randint(0, 8, (2, 3), generator=g)], 2)
    moved, found = refine_corners(target, reference, corners, 4, reach)
    flat = lambda p: F.normalize((p - p.mean()).flatten(), dim=0)
    for y in range(2):
        for x in range(3):
            own = flat(target[:, 4 * y:4 * y + 12, 4 * x:4 * x + 12])
            v, u = corners[y, x].tolist()
            best = max((own @ flat(reference[:, a:a + 12, b:b + 12]), a, b)
                       for a in range(max(0, v - reach), min(12, v + reach) + 1)
                       for b in range(max(0, u - reach), min(9, u + reach) + 1))
            assert torch.isclose(found[y, x], best[0], atol=1e-9)
            assert moved[y, x].tolist() == [*best[1:]]


def test_flat_places_have_no_cosine():
    flat = torch.full((3, 16, 16), 0.7)
    other = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(10))
    corners = torch.zeros(2, 2, 2, dtype=torch.long)
    for a, b in ((flat, other), (other, flat), (flat, flat)):
        assert refine_corners(a, b, corners)[1].abs().max() < 1e-2


def test_the_wave_law_changes_sign_at_a_sixth_of_the_period():
    for period in (3.0, 4.0, 7.0):
        shares = torch.tensor([1 / 6 - 1e-6, 1 / 6 + 1e-6, 0.5], dtype=torch.float64)
        below, above, half = displaced_wave_error(shares[:, None] * period, period)
        assert below < 1 < above
        assert torch.isclose(half, torch.tensor(4.0).double())


def test_degrading_removes_short_waves_only():
    x = torch.arange(64.0)
    short, long = (0.5 + 0.4 * (6.283185 * x / t).sin().expand(1, 1, 64, 64)
                   for t in (4, 32))
    left = [(degrade(v) - 0.5)[..., 16:48].square().mean() / (v - 0.5).square().mean()
            for v in (short, long)]
    assert left[0] < 0.01 and left[1] > 0.85


def brute_coherence(corners, cell=4):
    """Shares of agreeing matches, one neighbour after the other."""
    h, w, _ = corners.shape
    place = lambda y, x: corners[y, x] - cell * torch.tensor([y, x])
    found = torch.zeros(h, w)
    for y in range(h):
        for x in range(w):
            others = [(v, u) for v in range(max(0, y - 2), min(h, y + 3))
                      for u in range(max(0, x - 2), min(w, x + 3)) if (v, u) != (y, x)]
            agree = [(place(v, u) - place(y, x)).abs().max() <= 1 for v, u in others]
            found[y, x] = sum(agree) / max(1, len(agree))
    return found


@pytest.mark.parametrize("sides", [(1, 1), (1, 4), (2, 2), (3, 7), (9, 8)])
def test_coherence_is_that_of_counting_neighbours(sides):
    g = torch.Generator().manual_seed(11)
    moves = torch.randint(0, 4, (*sides, 2), generator=g)
    grid = torch.stack(torch.meshgrid(*map(torch.arange, sides), indexing="ij"), 2)
    corners = moves + 4 * grid
    assert torch.allclose(match_coherence(corners), brute_coherence(corners))
    alike = moves[:1, :1] + 4 * grid
    assert match_coherence(alike).eq(min(1, sides[0] * sides[1] - 1)).all()


def test_neighbours_matched_in_other_references_do_not_agree():
    grid = torch.stack(torch.meshgrid(*[torch.arange(8)] * 2, indexing="ij"), 2)
    corners = 4 * grid
    corners[:, 4:] += torch.tensor([400, 0])  # the second reference lies below
    near = match_coherence(corners)
    assert near[:, [0, 1, 6, 7]].eq(1).all() and (near[:, 2:6] < 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_cues_are_spread_scores_and_the_mean_coherence(dtype):
    g = torch.Generator().manual_seed(12)
    cosine, pixel = torch.rand(2, 5, 6, generator=g).to(dtype)
    corners = torch.randint(0, 40, (5, 6, 2), generator=g)
    corners[:3, :4] = 4 * torch.stack(
        torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij"), 2)
    near = match_coherence(corners)
    cues = match_cues(cosine, pixel, corners)
    assert cues.shape == (CUES, 7, 8) and cues.dtype == dtype
    assert 0 < near.mean() < 1
    for cue, score in zip(cues, (cosine, pixel, near.to(dtype))):
        assert torch.allclose(cue, spread_scores(score))
    assert torch.allclose(cues[3].float(), near.mean(), atol=1e-3)
