"""Directions from pairs, projections, safe ranges, and edits by any two functions."""

import pytest
import torch
from torch.nn.functional import normalize

from condgen.models.attribute_directions import (
    LatentEditor, TwoNormals, agreement, angle_to_direction, auc, auc_with_errors,
    d_prime_with_errors, exchange_labels, expected_cosine, mean_direction,
    spread_of_ends)

G = torch.Generator().manual_seed(0)
MAP = torch.linalg.qr(torch.randn(12, 6, generator=G))[0]
EDITOR = LatentEditor(lambda x: x @ MAP, lambda z: z @ MAP.T)
AXIS = torch.eye(6)[0]


def world(n=400, effect=3.0):
    """Codes without and with an attribute along the first axis."""
    z = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(1))
    return z[0], z[1] + effect * AXIS


def test_pairs_of_the_same_person_give_the_exact_direction():
    without, _ = world(3)
    x, y = EDITOR.decode(without), EDITOR.decode(without + 2 * AXIS)
    assert torch.allclose(EDITOR.direction(x, y), AXIS, atol=1e-5)
    assert torch.allclose(EDITOR.direction(y, x), -AXIS, atol=1e-5)
    other = EDITOR.direction(x, y.roll(1, 0))  # planted: other people
    assert other @ AXIS < 0.99


def test_each_pair_has_one_vote_in_the_average():
    """A pair with a long difference does not count more."""
    both = torch.stack([100 * torch.eye(3)[0], torch.eye(3)[1]])
    assert torch.allclose(mean_direction(both), normalize(torch.tensor([1., 1, 0]), dim=0))
    assert agreement(both) == 0 and agreement(both[:1].repeat(3, 1)) == pytest.approx(1)
    with pytest.raises(ValueError, match="two or more"):
        agreement(both[:1])


def test_expected_cosine_has_its_limits():
    assert expected_cosine(1.0, 0.0, 50, 1) == 1
    assert expected_cosine(1.0, 1.0, 3, 1) == pytest.approx(0.5)
    assert expected_cosine(2.0, 1.0, 12, 1) == expected_cosine(1.0, 1.0, 12, 4)


def test_auc_is_the_share_of_ordered_pairs():
    a, b = (torch.randint(0, 5, (40,), generator=G).double() for _ in range(2))
    pairs = (b[:, None] > a).double() + 0.5 * (b[:, None] == a)
    assert auc(a, b) == pytest.approx(pairs.mean().item())
    assert auc(a, b) + auc(b, a) == pytest.approx(1)


def test_edits_end_where_the_densities_say():
    without, present = world()
    x, y = EDITOR.decode(without), EDITOR.decode(present)
    fitted = EDITOR.densities(x, y, AXIS)
    assert fitted.d_prime == pytest.approx(3.0, abs=0.3)
    for at in (-2.0, 0.0, 1.0):
        ends = EDITOR.projections(EDITOR.edit_to(x, AXIS, fitted, at), AXIS)
        wanted = fitted.mean_with + at * fitted.std_with
        assert (ends - wanted).abs().max() < 1e-4
    kept = EDITOR.edit_to(x, AXIS, fitted)
    assert torch.allclose((kept @ MAP)[:, 1:], without[:, 1:], atol=1e-5)


def test_the_range_is_as_wide_for_all_and_nearer_for_some():
    fitted = TwoNormals(0.0, 1.0, 4.0, 0.5)
    low, high = fitted.safe_range(torch.tensor([0.0, 4.0]), 2.0)
    assert low.tolist() == [3.0, -1.0] and high.tolist() == [5.0, 1.0]
    assert fitted.gap == 4.0


def test_angles_follow_the_formula_and_end_at_0_and_180():
    z = torch.randn(20, 6, generator=G)
    for k in (-50.0, -1.0, 0.0, 2.0, 50.0):
        cosine = torch.cosine_similarity(z + k * AXIS, AXIS[None])
        assert torch.allclose(angle_to_direction(z, AXIS, k),
                              torch.rad2deg(cosine.double().acos()).float(), atol=0.05)
    assert angle_to_direction(z, AXIS, 1e5).max() < 0.01
    assert angle_to_direction(z, AXIS, -1e5).min() > 179.9


def test_a_normalising_decoder_collapses_and_a_linear_one_not():
    z = torch.randn(20, 6, generator=G)
    assert spread_of_ends(EDITOR.decode, z, AXIS, 1e3) == pytest.approx(1, abs=1e-3)
    sphere = lambda z: normalize(z, dim=1) @ MAP.T
    assert spread_of_ends(sphere, z, AXIS, 1e3) < 0.01


def test_directions_need_pairs():
    with pytest.raises(ValueError, match="accepted: pairs"):
        EDITOR.direction(torch.zeros(2, 12), torch.zeros(3, 12))
    with pytest.raises(ValueError, match="two or more of each"):
        TwoNormals.fit(torch.zeros(1), torch.zeros(5))


def one_sided(without, present, wrong, generator):
    """Planted: only images without the attribute get the other label."""
    k = round(wrong * min(len(without), len(present)))
    return without, torch.cat([without[:k], present[k:]])


@pytest.mark.parametrize("exchange, right", [(exchange_labels, True), (one_sided, False)])
def test_a_share_of_both_sides_is_exchanged(exchange, right):
    a, b = torch.zeros(50, 2), torch.ones(80, 2)
    a[:, 1], b[:, 1] = torch.arange(50.0), torch.arange(80.0)
    first, second = exchange(a, b, 0.2, torch.Generator().manual_seed(0))
    shares = [(first[:, 0] == 1).double().mean().item(),
              (second[:, 0] == 0).double().mean().item()]
    assert (shares == [0.2, 0.2] and len(first) == len(second) == 50) == right


def mixture(p, q, wrong):
    """Weights under which p and q make both labelled sets, in one list of values."""
    values = torch.cat([p, q])
    weight = torch.cat([torch.full_like(p, 1 - wrong), torch.full_like(q, wrong)])
    return values, weight / weight.sum(), weight.flip(0) / weight.sum()


def without_the_mixtures_variance(d_prime, wrong):
    return (1 - 2 * wrong) * d_prime


def squared(area, wrong):
    return 0.5 + (1 - 2 * wrong)**2 * (area - 0.5)


@pytest.mark.parametrize("d_prime, area, right", [
    (d_prime_with_errors, auc_with_errors, (True, True)),
    (without_the_mixtures_variance, squared, (False, False))])
def test_formulas_of_wrong_labels_are_those_of_mixtures(d_prime, area, right):
    """Exact moments and pairs of mixtures of two lists of numbers."""
    p = torch.randn(60, generator=torch.Generator().manual_seed(2)).double()
    q, wrong = p + 3, 0.1
    values, first, second = mixture(p, q, wrong)
    moments = [(w @ values, w @ values.square()) for w in (first, second)]
    (m0, s0), (m1, s1) = ((m, s - m**2) for m, s in moments)
    plain = (q.mean() - p.mean()) / p.std(correction=0)
    found = (m1 - m0) / ((s0 + s1) / 2).sqrt()
    above = (values > values[:, None]).double() + 0.5 * (values == values[:, None])
    pairs = first @ above @ second
    assert ((d_prime(plain.item(), wrong) == pytest.approx(found.item())) == right[0])
    assert ((area(auc(p, q), wrong) == pytest.approx(pairs.item())) == right[1])
