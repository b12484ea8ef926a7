"""Images of two digits: places, parts, labels and centroids."""

import pytest
import torch

from condgen.data import digits
from condgen.two_digits import digit_centroids, place_pairs, two_digits


def test_digits_stand_where_the_numbers_say():
    g = torch.Generator().manual_seed(0)
    left, right = torch.rand(2, 50, 1, 14, 14, generator=g)
    u = torch.rand(50, 4, generator=g)
    x = place_pairs(left, right, u)
    assert x.shape == (50, 1, 32, 32)
    for i in range(50):
        across, down = int(3 * u[i, 0]), int(19 * u[i, 1])
        assert torch.equal(x[i, 0, down:down + 14, across:across + 14], left[i, 0])
        across, down = 16 + int(3 * u[i, 2]), int(19 * u[i, 3])
        assert torch.equal(x[i, 0, down:down + 14, across:across + 14], right[i, 0])
    total = left.sum((1, 2, 3)) + right.sum((1, 2, 3))
    assert torch.allclose(x.sum((1, 2, 3)), total)


def test_every_place_is_used_and_the_two_are_independent():
    ones = torch.ones(4000, 1, 7, 7)
    u = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    c = digit_centroids(place_pairs(ones, ones, u))
    assert [len(c[:, half, axis].round(decimals=2).unique())
            for half in (0, 1) for axis in (0, 1)] == [10, 2, 10, 2]
    assert torch.corrcoef(c.flatten(1).T).fill_diagonal_(0).abs().max() < 0.06


def test_parts_share_no_digit_and_are_labelled_right():
    """Unjittered digits of the test part are found again among those of the source."""
    data, source = two_digits(64, 100), digits(8)
    x, labels = data.table("test")["x"], data.conditions.unpack(data.table("test")["c"])
    small = torch.nn.functional.interpolate(
        source.images.float() / 255, size=(28, 28), mode="bicubic",
        align_corners=False).clamp(0, 1)
    allowed = set(source.indices("test").tolist())
    known = source.labels.argmax(1)
    for i in range(len(x)):
        for half, name in enumerate(("left", "right")):
            picture = x[i, 0, :, 32 * half:32 * half + 32].float() / 255
            patches = picture.unfold(0, 28, 1).unfold(1, 28, 1).reshape(-1, 784)
            gaps = torch.cdist(patches, small.flatten(1))
            best = int(gaps.min(0).values.argmin())
            assert gaps[:, best].min() < 0.1
            assert best in allowed and known[best] == labels[name][i]


def test_data_are_the_same_each_time_and_differ_by_seed():
    first = two_digits(32, 40)
    two_digits.cache_clear()
    again, other = two_digits(32, 40), two_digits(32, 40, seed=1)
    assert torch.equal(first.images, again.images) and first.sha256 == again.sha256
    assert not torch.equal(first.images, other.images)
    assert {s: len(i) for s, i in other.splits.items()} == {"train": 40, "val": 4,
                                                            "test": 4}


def test_centroids_follow_the_digits():
    data = two_digits(64, 100)
    x = data.split_images("train")
    before = digit_centroids(x)
    assert (before[:, 0, 1] < 32).all() and (before[:, 1, 1] >= 32).all()
    room = x[..., :28].clone()
    moved = torch.cat([torch.zeros_like(x[..., :1]), room, x[..., 29:]], 3)
    fits = x[..., 28:32].sum((1, 2, 3)) == 0
    assert fits.any()
    shift = (digit_centroids(moved) - before)[fits]
    assert torch.allclose(shift[:, 0, 1], torch.ones(int(fits.sum())), atol=1e-3)
    assert shift[:, 0, 0].abs().max() < 1e-3 and shift[:, 1].abs().max() < 1e-3
    blank = digit_centroids(torch.zeros(1, 1, 8, 8))
    assert torch.allclose(blank[0], torch.tensor([[3.5, 1.5], [3.5, 5.5]]))


@pytest.mark.parametrize("arguments, words", [
    ({"size": 48}, "32, 64"), ({"source": "digit"}, "did you mean 'digits'"),
    ({"n": 5}, "10 or more"), ({"n": 2.5}, "n=2.5")])
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        two_digits(**arguments)
