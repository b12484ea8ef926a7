"""Laws of the drawn faces: shapes, exactness of every factor, independence of batch
and size, plausible people.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from condgen.conditions import Schema
from condgen.drawing import (
    arc, box, coverage, ellipse, lambert, lens, relief_coordinates, sin_cos,
    smooth_union, sine_wave)
from condgen.faces import (
    ATTRIBUTES, FACE_SHAPE_PARAMETERS, EXCLUSIVE_ATTRIBUTES, FACTORS, IDENTITIES,
    IDENTITY_SHAPE_PARAMETERS, sample_factors, edit_factors, sample_faces,
    labels_from_factors, trait_mixing_matrix, face_canvas, person_factors, render)

OTHERS = {"identity": 5, "hair": 2, "skin": 0.8, "age": 60, "yaw": 15, "pitch": 10,
          "light": -40, "background": 0.5, "shirt": 0.6}


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Nine people of all kinds."""
    return sample_factors(9, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [7, 0, 16.0, "16", None, True])
def test_sizes_that_are_none_are_refused(rows, size):
    with pytest.raises(ValueError, match="accepted: an integer, 8 or more"):
        render(rows, size)
    assert torch.equal(render(rows[:1], np.int64(16)), render(rows[:1], 16))


def grid(size):
    at = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 / size) - 1
    return at[None], at[:, None], 2 / size


def change(factors, size=64, **changes):
    """Where the pictures differ, `(n, size, size)`."""
    return (render(edit_factors(factors, **changes), size)
            != render(factors, size)).any(1)


def test_coverage_measures_areas():
    x, y, w = grid(64)
    assert abs(float(coverage(ellipse(x - 0.01, y, 0.7, 0.4), w).sum()) * w**2
               / (math.pi * 0.28) - 1) < 2e-3
    assert abs(float(coverage(box(x, y + 0.01, 0.6, 0.3, 0.1), w).sum()) * w**2
               / (0.72 - 0.01 * (4 - math.pi)) - 1) < 2e-3
    shape = lens(x, y, 0.8, torch.tensor(0.2), torch.tensor(0.1))
    assert abs(float(coverage(shape, w).sum()) * w**2 / (1.6 * 0.3 * 2 / 3) - 1) < 2e-2
    for thick in (0.003, 0.1):
        assert abs(float(arc(x, y, 0.8, 0.0, thick, w).sum()) * w**2
                   / (1.6 * thick * 2 / 3) - 1) < 1e-2


def test_box_is_the_distance_to_a_box():
    p = torch.rand(200, 2, dtype=torch.float64,
                   generator=torch.Generator().manual_seed(0)) * 4 - 2
    nearest = torch.stack([p[:, 0].clamp(-0.6, 0.6), p[:, 1].clamp(-0.3, 0.3)], 1)
    outside = (p - nearest).norm(dim=1)
    d = box(p[:, 0], p[:, 1], 0.7, 0.4, 0.1)
    assert (torch.allclose(d[outside > 0], outside[outside > 0] - 0.1)
            and (d[outside == 0] < -0.1 + 1e-12).all())


def test_distances_have_slope_one_on_their_edge():
    t = torch.linspace(0, 2 * math.pi, 50, dtype=torch.float64)
    p = torch.stack([0.5 * t.cos(), 0.2 * t.sin()], 1).requires_grad_()
    d = ellipse(p[:, 0], p[:, 1], 0.5, 0.2)
    slope = torch.autograd.grad(d.sum(), p)[0].norm(dim=1)
    assert torch.allclose(d, torch.zeros(50, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(slope, torch.ones(50, dtype=torch.float64), atol=1e-6)


def test_union():
    a, b = (torch.linspace(-1, 1, 401, dtype=torch.float64),
            torch.tensor(0.1, dtype=torch.float64))
    d, least = smooth_union(a, b, 0.3), torch.minimum(a, b)
    apart = (a - b).abs() >= 0.3
    assert torch.equal(d[apart], least[apart]) and (d <= least).all()
    assert float((least - d).max()) == pytest.approx(0.075)
    # no kink; the plain minimum has one of 5e-3
    assert (d.diff().diff().abs() < 2e-4).all()


def test_polynomials_stand_for_sines():
    angle = torch.linspace(-60, 60, 241, dtype=torch.float64)
    for mine, exact in zip(sin_cos(angle),
                           (angle.deg2rad().sin(), angle.deg2rad().cos())):
        assert (mine - exact).abs().max() < 2e-6
    t = torch.linspace(-3, 3, 601, dtype=torch.float64)
    assert (sine_wave(t) - (2 * math.pi * t).sin()).abs().max() < 0.06
    assert not sine_wave(t, 0.8).any()


@pytest.mark.parametrize("degrees", [-35.0, 0.0, 20.0])
def test_relief_inverts_the_head_rotation(degrees):
    sine, cosine = sin_cos(torch.tensor(degrees, dtype=torch.float64))
    x = torch.linspace(-0.4, 0.4, 41, dtype=torch.float64)
    u, r = relief_coordinates(x, sine, cosine, 0.23, 0.66)
    u = u.clone().requires_grad_()
    seen = u * cosine + 0.23 * (1 - u**2 / 0.66**2) * sine
    assert torch.allclose(seen, x, atol=1e-12)
    assert torch.allclose(torch.autograd.grad(seen.sum(), u)[0], r, atol=1e-12)


def test_lambert_shading_of_both_sides():
    x, y, _ = grid(33)
    right, left = (lambert(0.9 * x, 0.9 * y, torch.tensor(a, dtype=torch.float64))
                   for a in (40.0, -40.0))
    assert (torch.allclose(right, left.flip(1)) and right[16, 28] > right[16, 4]
            and right[4, 16] > right[28, 16])


def test_identities_are_fixed_and_distinct():
    assert (IDENTITY_SHAPE_PARAMETERS.shape == (IDENTITIES, len(FACE_SHAPE_PARAMETERS))
            and IDENTITIES >= 200)
    assert torch.allclose(IDENTITY_SHAPE_PARAMETERS[7, :4],
                          torch.tensor([0.936284, 0.940171, 0.938368, 0.639652]),
                          atol=1e-5)
    mean, spread = torch.tensor(list(FACE_SHAPE_PARAMETERS.values())).T
    units = (IDENTITY_SHAPE_PARAMETERS - mean) / spread
    assert (torch.cdist(units, units) + 9 * torch.eye(IDENTITIES)).min() > 1.5
    assert torch.allclose(torch.tensor(trait_mixing_matrix()).norm(dim=1),
                          torch.ones(len(FACE_SHAPE_PARAMETERS), dtype=torch.float64))
    assert torch.equal(face_canvas(person_factors(7), 8).b["jaw"].flatten(),
                       IDENTITY_SHAPE_PARAMETERS[7:8, 2])


@pytest.mark.parametrize("size", [16, 33, 64])
def test_an_image_does_not_depend_on_its_batch(rows, size):
    batch = render(rows, size)
    assert batch.shape == (9, 3, size, size) and batch.dtype == torch.float32
    assert (torch.equal(batch, render(rows, size))
            and torch.equal(render(rows.flip(0), size).flip(0), batch))
    assert all(torch.equal(render(rows[i : i + 1], size)[0], batch[i])
               for i in range(9))


def test_images_are_finite_and_in_range(rows):
    wild = edit_factors(rows, yaw=35, pitch=-20, light=60, age=0, hat=1, beard=1,
                        wide_eyes=1, laugh=1, sunglasses=1)
    for factors in (rows, wild,
                    person_factors(3, sunglasses=0.5, hair=[0.0, 0.5, 0.5, 0.0])):
        x = render(factors, 32)
        assert torch.isfinite(x).all() and x.min() >= 0 and x.max() <= 1
    assert (render(rows.double(), 48) - render(rows, 48)).abs().max() < 1e-3
    assert render(rows[:0], 32).shape == (0, 3, 32, 32)


def test_sizes_agree(rows):
    small, large = render(rows, 64), render(rows, 128)
    assert (F.avg_pool2d(large, 2) - small).abs().mean() < 0.006
    assert torch.allclose(F.avg_pool2d(small, 2), render(rows, 32), atol=1e-6)


@pytest.mark.parametrize("size", [4, 64.0, True])
def test_sizes_are_checked(size):
    with pytest.raises(ValueError, match="8 or more"):
        render(person_factors(), size)


def test_every_factor_acts_at_32_pixels():
    plain = person_factors(0)
    before = render(plain, 32)
    for name, value in (OTHERS | dict.fromkeys(ATTRIBUTES, 1)).items():
        moved = (render(edit_factors(plain, **{name: value}), 32) - before).abs().amax(
            1)
        assert int((moved > 0.02).sum()) >= 5, name
    assert {*OTHERS, *ATTRIBUTES} == set(FACTORS.names)


def test_gradients_reach_every_factor(rows):
    c = rows.clone().requires_grad_()
    render(c, 32).square().sum().backward()
    assert (torch.isfinite(c.grad).all()
            and (c.grad.abs().amax(0)[IDENTITIES:] > 0).all())


# (first row, last row, largest share) of a frontal picture of 64 × 64 that a change may
# touch
REGIONS = {"glasses": (17, 44, 0.16), "sunglasses": (17, 44, 0.16),
           "hat": (0, 34, 0.45), "moustache": (34, 52, 0.05), "smile": (20, 60, 0.15),
           "laugh": (20, 62, 0.2), "frown": (16, 60, 0.15), "wide_eyes": (17, 40, 0.08),
           "earrings": (34, 50, 0.02), "makeup": (22, 56, 0.25), "bangs": (4, 34, 0.25),
           "beard": (26, 62, 0.3), "bald": (0, 44, 0.45)}


@pytest.mark.parametrize("name", REGIONS)
def test_an_attribute_changes_its_region_alone(name):
    people = torch.cat([person_factors(k, skin=k / 40) for k in range(0, 40, 5)])
    where = change(people, **{name: 1})
    lines = where.any(2).any(0).nonzero().flatten()
    top, bottom, share = REGIONS[name]
    assert where.flatten(1).any(1).all()
    assert (top <= lines.min() and lines.max() <= bottom
            and where.float().mean((1, 2)).max() < share)


def test_attributes_combine(rows):
    """Upper parts do not depend on lower ones, nor a face on shirt or wall."""
    plain = edit_factors(rows, smile=0, laugh=0, frown=0, beard=0, glasses=0,
                         sunglasses=0, hat=0, yaw=0, pitch=0)
    assert not change(plain, glasses=1)[:, 48:].any()
    worn = edit_factors(plain, glasses=1)
    assert torch.equal(render(edit_factors(worn, beard=1))[:, :, :24],
                       render(worn)[:, :, :24])
    assert not change(plain, beard=1)[:, :24].any()
    assert not change(plain, shirt=0.77)[:, :40].any()
    assert not change(edit_factors(plain, bald=1),
                      background=0.7)[:, 30:40, 26:38].any()


def test_fractional_attributes_interpolate_images():
    whole, none, half = (render(person_factors(2, glasses=v)) for v in (1, 0, 0.5))
    assert ((whole - half).abs() <= (whole - none).abs() + 1e-6).float().mean() > 0.99
    assert torch.equal(render(person_factors(2, glasses=0)), render(person_factors(2)))


def test_edit_changes_only_the_given_factors(rows):
    other = edit_factors(rows, identity=11, age=44)
    before, after = FACTORS.unpack(rows), FACTORS.unpack(other)
    assert ((after["identity"] == 11).all()
            and torch.allclose(after["age"], torch.tensor(44.0)))
    assert all(torch.equal(before[k], after[k])
               for k in FACTORS.names if k not in ("identity", "age"))
    assert torch.allclose(edit_factors(edit_factors(rows, yaw=9), yaw=before["yaw"]),
                          rows, atol=1e-6)
    ages = FACTORS.unpack(edit_factors(rows, age=list(range(9))))["age"]
    assert torch.allclose(ages, torch.arange(9.0), atol=1e-4)


@pytest.mark.parametrize("group", EXCLUSIVE_ATTRIBUTES)
def test_exclusive_attributes(group):
    for name in group:
        for other in set(group) - {name}:
            known = FACTORS.unpack(edit_factors(person_factors(**{other: 1}),
                                                **{name: 1}))
            assert known[name] == 1 and known[other] == 0
            with pytest.raises(ValueError, match="exclude each other"):
                edit_factors(person_factors(), **{name: 1, other: 1})


def test_unknown_factors_are_refused():
    with pytest.raises(ValueError, match="did you mean 'glasses'"):
        edit_factors(person_factors(), glases=1)
    with pytest.raises(ValueError, match="a number from 0 to 80"):
        person_factors(age=81)
    with pytest.raises(ValueError, match="1 to 256"):
        sample_factors(3, identities=300)


def test_age():
    ages = torch.cat([person_factors(4, age=a, hair=0) for a in range(0, 81, 10)])
    x = render(ages)
    assert ((x[1:] - x[:-1]).abs().amax((1, 2, 3)) > 0.02).all()
    crown = x[:, :, 9:15, 26:38].mean((1, 2, 3))
    assert crown[8] > crown[3] + 0.2  # grey hair is lighter than black


def test_drawn_people_are_plausible():
    generator = torch.Generator().manual_seed(0)
    c = sample_factors(4000, generator, identities=40)
    known = FACTORS.unpack(c)
    assert torch.equal(c, sample_factors(4000, generator.manual_seed(0), identities=40))
    assert known["identity"].max() == 39 and (known["identity"].bincount() > 50).all()
    young, male = known["age"] < 17.9, known["masculine"] > 0.5
    assert not (known["beard"] + known["moustache"] + known["makeup"]
                + known["bald"])[young].any()
    assert (not (known["beard"] + known["moustache"] + known["bald"])[~male].any()
            and not known["makeup"][male].any())
    for group in EXCLUSIVE_ATTRIBUTES:
        assert sum(known[name] for name in group).max() <= 1, group
    for name in ATTRIBUTES:
        assert 0.05 < known[name].mean() < 0.6, name
    # uniform and independent of the rest: 4.5 standard errors
    for name in ("skin", "background", "shirt"):
        assert abs(float(known[name].mean()) - 0.5) < 4.5 * 0.289 / 4000**0.5
        assert abs(float(torch.corrcoef(
            torch.stack([known[name], known["age"]]))[0, 1])) < 4.5 / 4000**0.5


def test_tables_for_a_data_set():
    from condgen.data import Dataset

    x, factors = sample_faces(12, size=16, identities=5, seed=2)
    assert x.dtype == torch.uint8 and x.shape == (12, 3, 16, 16)
    assert torch.equal(x, (render(factors, 16) * 255).round().to(torch.uint8))
    assert (torch.equal(sample_faces(12, size=16, identities=5, seed=2)[0], x)
            and not torch.equal(sample_faces(12, 16, 5)[0], x))
    c, schema = labels_from_factors(factors, ["age", "identity", "smile"], identities=5)
    assert (isinstance(schema, Schema) and schema.names == ["identity", "age", "smile"]
            and c.shape == (12, 7))
    known = FACTORS.unpack(factors)
    assert all(torch.equal(v, known[k]) for k, v in schema.unpack(c).items())
    parts = {"train": torch.arange(8), "val": torch.arange(8, 10),
             "test": torch.arange(10, 12)}
    assert Dataset("drawn faces", x, c, schema, parts).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="unknown condition"):
        labels_from_factors(factors, ["ages"])
