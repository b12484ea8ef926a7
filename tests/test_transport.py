"""Ridge regression, optimal transport and principal directions on known data."""

import pytest
import torch

from condgen.models.transport import (
    AgeTransitions, GaussianTransport, gaussian_transport_map, principal_directions,
    ridge)

BINS = 10


def seeded(k=0):
    return torch.Generator().manual_seed(k)


def bars(n=600):
    """Images of 16 pixels: identity, pose, and a pattern that grows with the group.

    Returns:
        Images, groups and identities of training and of test images.
    """
    g = seeded(2)
    who = torch.randint(5, (n,), generator=g)
    group = torch.randint(BINS, (n,), generator=g)
    person, pose = torch.randn(5, generator=g), torch.randn(n, generator=g)
    x = 0.5 + torch.zeros(n, 1, 4, 4)
    x[:, 0, 0, 0] += 0.05 * person[who]
    x[:, 0, 0, 1] += 0.05 * pose
    x[:, 0, 1, 0] = group / 10
    x = (255 * x.clamp(0, 1)).round() / 255
    part = torch.arange(n) % 10
    return [(x[rows], group[rows], who[rows]) for rows in (part > 1, part == 1)]


def test_ridge_solves_its_equation():
    a = torch.randn(50, 4, generator=seeded())
    b = torch.randn(50, 3, generator=seeded(1))
    w = ridge(a, b, 0.0)
    fit = torch.linalg.lstsq(torch.cat([a, torch.ones(50, 1)], 1), b).solution[:4]
    assert torch.allclose(w, fit, atol=1e-4) and ridge(a, b, 1e6).abs().max() < 1e-4


@pytest.mark.parametrize("strength", [None, 1e-3])
def test_transitions_reach_the_next_group_and_keep_identity(strength):
    (x, group, who), (x_test, group_test, _) = bars()
    chain = AgeTransitions(x, group, who, strength, rank=3)
    made = chain.age_faces(x_test, group_test)
    assert torch.equal(made[torch.arange(len(x_test)), group_test], x_test)
    young = group_test < 5
    last, first = made[young, 9, 0], x_test[young, 0]
    assert (last[:, 1, 0] - 0.9).abs().max() < 0.02
    assert torch.corrcoef(torch.stack([last[:, 0, 0], first[:, 0, 0]]))[0, 1] > 0.9
    kept = last[:, 0, 1].std() / first[:, 0, 1].std()
    assert kept > 0.9 if strength is None else kept < 0.3
    assert torch.equal(made[~young][:, 0], x_test[~young])  # there is no way back


def test_pairs_have_one_identity():
    who = torch.tensor([0, 0, 1, 2, 0, 1, 1])
    group, later = torch.tensor([0, 2, 3]), torch.tensor([4, 5, 6])
    first, second = AgeTransitions.pairs(who, group, later, seeded())
    assert first.tolist() == [0, 2] and second[0] == 4
    assert torch.equal(who[first], who[second])


def test_transport_map_has_the_target_covariance_at_least_cost():
    roots = torch.randn(2, 4, 7, generator=seeded(), dtype=torch.float64)
    a, b = (m @ m.T for m in roots)
    best, back = gaussian_transport_map(a, b), gaussian_transport_map(b, a)
    assert torch.allclose(best @ a @ best.T, b) and torch.allclose(best, best.T)
    assert torch.linalg.eigvalsh(best).min() > 0
    assert torch.allclose(back @ best, torch.eye(4).double(), atol=1e-8)
    other = torch.linalg.cholesky(b) @ torch.linalg.inv(torch.linalg.cholesky(a))
    assert torch.allclose(other @ a @ other.T, b)
    assert (best @ a).trace() > (other @ a).trace()
    one = torch.tensor([[4.0]], dtype=torch.float64)
    assert gaussian_transport_map(one, 9 * one).item() == pytest.approx(3)


def test_principal_directions_find_the_largest_variances():
    x = 0.02 * torch.randn(500, 20, generator=seeded())
    x[:, 3] += torch.randn(500, generator=seeded(1))
    x[:, 8] += 0.5 * torch.randn(500, generator=seeded(2))
    found = principal_directions(x + 5, 2, seeded(3))
    assert torch.allclose(found.T @ found, torch.eye(2), atol=1e-3)
    assert found[3, 0].abs() > 0.99 and found[8, 1].abs() > 0.99


def test_transport_keeps_identity_and_pose():
    (x, group, _), (x_test, group_test, _) = bars()
    plan = GaussianTransport(x, group)
    made = plan.age_faces(x_test, group_test)
    assert plan.basis.shape[1] <= group.bincount().min() // 4
    own = made[torch.arange(len(x_test)), group_test]
    assert torch.allclose(own, x_test, atol=1e-4)
    for b in (0, 9):
        assert (made[:, b, 0, 1, 0] - b / 10).abs().max() < 0.02
        for i in (0, 1):
            pair = torch.stack([made[:, b, 0, 0, i], x_test[:, 0, 0, i]])
            assert torch.corrcoef(pair)[0, 1] > 0.9
    assert (plan.predict_group(x_test) == group_test).double().mean() > 0.95


def test_number_of_groups_may_be_given_or_found():
    (x, group, who), _ = bars()
    given, found = (GaussianTransport(x, group, n_groups=n) for n in (BINS, None))
    assert torch.equal(given.maps, found.maps) and len(given.means) == BINS
    few = group < 4
    assert len(AgeTransitions(x[few], group[few], who[few], None).maps) == 3


def test_small_groups_and_groups_without_pairs_are_refused():
    (x, group, who), _ = bars(60)
    with pytest.raises(ValueError, match="4 or more in each"):
        GaussianTransport(x, group)
    with pytest.raises(ValueError, match="0 training images in group 10"):
        AgeTransitions(x, group, who, None, n_groups=11)
    with pytest.raises(ValueError, match="no identity in common"):
        AgeTransitions(x, group, torch.arange(len(x)), None)
