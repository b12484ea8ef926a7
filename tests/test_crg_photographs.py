"""Photographs through CRG: pairs of references by labels, the next other person, and
edits in a world where attributes are numbers of the code.
"""

from types import SimpleNamespace

import pytest
import torch

from condgen.conditions import Binary, Classes, Schema
from condgen.experiments import crg_photographs as measured
from condgen.experiments.crg_photographs import (
    ATTRIBUTES, NAMES, VARIANTS, Edits, Photographs, another_person, baseline_rows,
    descent_rows, mean_rows, reference_pairs, table_rows)
from condgen.recipes import find
from condgen.results import row

K = 9
COLUMNS = ("Male", "Young", "Smiling", "Eyeglasses", "Hat", "Bangs", "Dark", "Blond",
           "Shaved")


class Axes:
    """Images are codes: nine attributes, and three numbers that say who it is."""

    latent_size = K + 3

    @staticmethod
    def encode(x):
        return x.flatten(1)

    @staticmethod
    def decode(z):
        return z.float().view(-1, K + 3, 1, 1)

    @staticmethod
    def reconstruct(x):
        return x


class Reader(torch.nn.Module):
    """Reads the numbers of the image themselves."""

    conditions = Schema([Classes("identity", 2), *map(Binary, COLUMNS)])

    def features(self, x):
        return x.flatten(1)

    def head(self, f):
        return torch.cat([torch.zeros(len(f), 2), 10 * (f[:, :K] - 0.5)], 1)


def world(n=900, persons=90):
    g = torch.Generator().manual_seed(0)
    who = torch.arange(n) % persons
    c = (torch.rand(n, K, generator=g) < 0.3).float()
    c[:, 0] = (who < persons // 2).float()  # nobody is a man in some images only
    face = (torch.rand(persons, 3, generator=g) > 0.5)[who].float()
    shown = torch.cat([0.9 * c + 0.1 * torch.rand(n, K, generator=g), face], 1)
    images = (255 * shown).byte().view(n, K + 3, 1, 1)
    labels = torch.cat([torch.zeros(n, 2), c], 1)
    parts = dict(zip(("train", "val", "test"), torch.arange(n).split(n // 3)))
    data = SimpleNamespace(conditions=Reader.conditions, images=images, labels=labels,
                           indices=parts.__getitem__)
    size = {"n": None, "edited": 50, "coded": None, "pairs": 5}
    return SimpleNamespace(data=data, size=size, seed=0, tier="tiny"), who


def edits_of(monkeypatch):
    lab, who = world()
    monkeypatch.setattr(measured, "person_numbers", lambda name, tier: who)
    return Edits(lab, Photographs(lab, "celeba", Reader()), Axes)


def found_in(rows):
    return {(r["model"], r["variant"], r["metric"], *r["at"].values()): r["value"]
            for r in rows}


@pytest.mark.parametrize("name", [*ATTRIBUTES])
def test_pairs_of_one_person_give_the_axis(monkeypatch, name):
    found = found_in(edits_of(monkeypatch).attribute_rows(name))
    for to in ("on", "off"):
        for metric, value in (("attribute_accuracy", 1), ("interference", 0)):
            if ATTRIBUTES[name]:  # two people differ in the person's numbers also
                assert found["CRG", "five pairs", metric, name, to] == value
                assert found["CRG", "one pair", metric, name, to] == value
            assert found["CRG", "not edited", metric, name, to] == 0
        assert found["real photographs", "", "attribute_accuracy", name, to] == 1
        assert found["real photographs", "reconstructed", "attribute_accuracy", name,
                     to] == 1
    assert found["CRG", "five pairs", "auc", name] > 0.9
    assert ("CRG", "five pairs, two people", "auc", name) in found or not ATTRIBUTES[
        name]


def test_pairs_that_differ_elsewhere_are_seen(monkeypatch):
    """Planted: references are drawn without regard to the other labels."""
    edits = edits_of(monkeypatch)

    def careless(people, labels, column, n, same, generator):
        only = labels[:, column : column + 1]
        return reference_pairs(people, only, 0, n, same, generator)

    monkeypatch.setattr(measured, "reference_pairs", careless)
    found = found_in(edits.attribute_rows("Smiling"))
    assert found["CRG", "one pair", "interference", "Smiling", "on"] > 0.02


def test_moves_of_taking_off_go_backwards(monkeypatch):
    edits = edits_of(monkeypatch)
    move = edits.moves("Smiling")["five pairs"][0]
    wanted = torch.eye(K + 3)[COLUMNS.index("Smiling")]
    assert torch.allclose(move, wanted, atol=0.15) and move[2] > 0.8


@pytest.mark.parametrize("same", [True, False])
def test_nobody_is_in_two_pairs(same):
    lab, who = world(persons=12)
    c = lab.data.labels[:, 2:]
    pairs = reference_pairs(who, c, 2, 5, same, torch.Generator().manual_seed(1))
    without, present = pairs
    assert len(without) == 5
    assert ((who[without] == who[present]) == same).all()
    difference = c[present] - c[without]
    assert (difference[:, 2] == 1).all() and difference.abs().sum() == 5
    people = torch.cat([who[without], who[present]]).unique()
    assert len(people) == (5 if same else 10)


def test_gender_has_no_pairs_of_one_person():
    lab, who = world()
    pairs = reference_pairs(who, lab.data.labels[:, 2:], 0, 5, True,
                            torch.Generator().manual_seed(0))
    assert [len(side) for side in pairs] == [0, 0]
    assert not ATTRIBUTES["Male"]


def test_another_person_is_never_the_same():
    people = torch.tensor([1, 1, 1, 2, 3, 3, 1])
    assert another_person(people).tolist() == [3, 3, 3, 4, 6, 6, 3]


def test_means_keep_directions_apart():
    rows = [row("CRG", "auc", value, kind, {"attribute": name})
            for kind, name, value in (("one pair", "a", 0.5), ("one pair", "b", 0.7),
                                      ("five pairs", "a", 0.9))]
    rows.append(row("CRG", "auc", 1.0, "one pair", {"attribute": "a", "to": "on"}))
    found = found_in(mean_rows(rows))
    assert found["CRG", "one pair", "auc", "all"] == pytest.approx(0.6)
    assert found["CRG", "five pairs", "auc", "all"] == 0.9
    assert found["CRG", "one pair", "auc", "all", "on"] == 1.0


@pytest.mark.parametrize("name", [*NAMES])
def test_encoder_and_generator_fit(name):
    recipe, parent = find(f"crg-{name}"), find(f"dcgan-{name}")
    assert recipe.parents == {"generator": parent.name} and parent.shared
    for tier in ("tiny", "cpu", "full"):
        assert recipe.images[tier]["adversarial"] == parent.images[tier]["adversarial"]
        assert recipe.arguments[tier]["generator_arguments"] == parent.arguments[tier]
    assert recipe.data == parent.data


def test_rows_of_the_table(monkeypatch):
    """A CRG of no training, on random images: what is compared, and by how many."""
    from condgen.models.crg import CRG
    g = torch.Generator().manual_seed(0)
    images = (255 * torch.rand(60, 3, 16, 16, generator=g)).byte()
    parts = dict(zip(("train", "test"), torch.arange(60).split(40)))
    data = SimpleNamespace(
        images=images, labels=torch.zeros(60, 0), indices=parts.__getitem__,
        split_images=lambda part: images[parts[part]].float() / 255)
    model = CRG((3, 16, 16), width=4).eval()
    run = SimpleNamespace(model=model, seconds=2.0)
    lab = SimpleNamespace(data=data, seed=0, tier="tiny", first=True,
                          train=lambda name, **arguments: run,
                          size={"n": 8, "inverted": 3, "steps": 3, "starts": 2})
    monkeypatch.setattr(measured, "person_numbers",
                        lambda name, tier: torch.arange(60))
    photos = Photographs(lab, "lfw")
    rows = table_rows(lab, "lfw", photos, VARIANTS)
    found = found_in(rows)
    assert len(found) == len(rows)
    assert found["itself", "", "mae"] == 0 and found["itself", "", "dhash"] == 0
    assert found["nearest training image", "", "mse"] < found["another person", "",
                                                              "mse"]
    for variant in VARIANTS:
        assert found["CRG", variant, "seconds"] == 2.0
        assert ("CRG", variant, "mae", "generated") in found
    steps = lab.size["steps"]
    assert found["gradient descent", "from E", "mse", steps] <= found[
        "CRG", "", "mse", steps]
    known = data.split_images("train")
    assert {r["model"] for r in baseline_rows(photos, known)} <= {
        r["model"] for r in rows}
    assert len(descent_rows(lab, photos, model)) == 3 * 5 + 2
