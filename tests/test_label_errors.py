"""Planted label errors and weak attributes, in worlds where their effect is known."""

from types import SimpleNamespace

import pytest
import torch

from condgen.experiments import label_errors as measured
from condgen.experiments.label_errors import (
    STRENGTHS, WORLDS, WRONG, labelled_moves, planted_set, tail_numbers, tail_rows,
    weak_drawings)
from condgen.faces import edit_factors, person_factors, render_bytes

N = 400


def noise(seed, *size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_what_is_planted_is_what_is_said():
    good, wrong, weak = torch.ones(N, 2), torch.zeros(N, 2), torch.full((N, 2), 0.5)
    for x in (good, weak):
        x[:, 1] = torch.arange(float(N))
    g = torch.Generator().manual_seed(0)
    rows, kind = planted_set(good, wrong, weak, (0.1, 0.25), g)
    assert torch.equal(kind.bincount(), torch.tensor([260, 40, 100]))
    for k, value in ((0, 1.0), (1, 0.0), (2, 0.5)):
        assert (rows[kind == k, 0] == value).all()
    kept = kind != 1  # a weak image replaces the same drawing
    assert torch.equal(rows[kept, 1], torch.arange(float(N))[kept])


@pytest.mark.parametrize("name", ["glasses", "sunglasses", "hat", "beard"])
def test_weak_attributes_lie_between_none_and_all(name):
    own = person_factors(range(6), 6, masculine=1, **{name: 1})
    full, none = (render_bytes(f, 32).float() / 255
                  for f in (own, edit_factors(own, **{name: 0})))
    weak = weak_drawings(own, name, 32, 0)
    for a, b, c in zip(full, none, weak):
        share = (c - b).abs().mean() / (a - b).abs().mean()
        assert STRENGTHS[0] - 0.05 < share < STRENGTHS[1] + 0.05


def test_tails_are_counted_by_kind():
    p = torch.cat([1 + 0.01 * noise(0, 96), torch.zeros(2), torch.full((2,), 0.4)])
    kind = torch.tensor([0] * 96 + [1] * 2 + [2] * 2)
    found = tail_numbers(p, kind, kind == 2, 0.01 * noise(1, 100))
    assert {k: found[k].item() for k in ("all", "tail", "wrong", "weak", "seen")} == {
        "all": 100, "tail": 4, "wrong": 2, "weak": 2, "seen": 2}
    assert 0.15 < found["place"] / 4 < 0.25


class Tail:
    """Counts of one attribute, that depend on the world."""

    def counts(self, shares, repeats):
        planted = {"wrong": 100 * shares[0], "weak": 60 * shares[1]}
        return {"all": 200.0, "tail": 20.0, "seen": 5.0, "place": 10.0, **planted}


def test_rows_of_tails_are_shares_of_the_tail():
    rows = tail_rows({"hat": Tail(), "beard": Tail()}, 1)
    found = {(r["variant"], r["metric"], *r["at"].values()): r["value"] for r in rows}
    for world, (wrong, weak) in WORLDS.items():
        assert found[world, "tail_share"] == 0.1 and found[world, "tail_place"] == 0.5
        assert found[world, "attribute_accuracy", "tail"] == 0.25
        assert found[world, "planted_share", "wrong labels"] == pytest.approx(5 * wrong)
        assert found[world, "planted_share", "weak attributes"] == pytest.approx(3 * weak)


def gaussian_world(n=6_000, k=8):
    """Codes whose first number is the attribute, and faces that are their codes."""
    has = torch.arange(n) % 2 == 0
    z = noise(2, n, k)
    z[has, 0] += 5
    pairs = noise(3, 5, k)
    coded = SimpleNamespace(sides=lambda split, name: (z, has), encode=lambda x: x)
    faces = SimpleNamespace(name="hat", pairs=(pairs, pairs + 5 * torch.eye(k)[0]))
    return coded, faces


def only_one_kind(without, present, wrong, generator):
    """Planted: labels are wrong on one side."""
    k = round(wrong * len(present))
    return without, torch.cat([without[:k], present[k:]])


@pytest.mark.parametrize("planted", [False, True])
def test_moves_shrink_as_labels_get_worse(planted, monkeypatch):
    if planted:
        monkeypatch.setattr(measured, "exchange_labels", only_one_kind)
    moves = labelled_moves(*gaussian_world(), 0)
    length = {key: (move[0] / moves[key[0], 0.0][0]).item()
              for key, move in moves.items()}
    right = all(abs(length["class means", w] - (1 - 2 * w)) < 0.02 for w in WRONG)
    assert right != planted
    kept = all(abs(length["class means, length corrected", w] - 1) < 0.1 for w in WRONG)
    assert kept != planted
    assert [length["pairs", w] for w in (0.0, 0.2, 0.4)] == pytest.approx([1, 0.6, 0.2])
