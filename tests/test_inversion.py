"""Measured inversion: hashes, baselines, exact edits, and rows of tiny runs."""

from types import SimpleNamespace

import pytest
import torch

from condgen.experiments import exact, inversion
from condgen.experiments.inversion import (
    EDITED, EXPERIMENTS, EditedFaces, HeldOut, exact_edits, hash_distances,
    mean_over_attributes, nearest_images, without_attribute)
from condgen.experiments.portraits import portraits_of, portraits_with_factors
from condgen.faces import FACTORS
from condgen.lab import Lab
from condgen.results import row


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def lab_of(name, runs):
    experiment = next(e for e in EXPERIMENTS if e.name == name)
    return Lab(experiment, "tiny", 0, runs, progress=False)


class Oracle:
    """An evaluator that knows the identity and the attributes of some images."""

    def __init__(self, data, x, labels):
        self.conditions, self.known, self.labels = data.conditions, x.flatten(1), labels
        self.head = lambda h: h
        self.training = False

    def features(self, x):
        nearest = torch.cdist(x.float().flatten(1), self.known).argmin(1)
        return 8 * self.labels[nearest] - 4


def test_hashes_count_bits_of_64():
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert set(hash_distances(x, x).values()) == {0.0}
    assert hash_distances(x, x.flip(3))["dhash"] > 8
    darker = hash_distances(x, 0.5 * x)  # hashes do not see brightness, errors do
    assert max(darker.values()) < 4
    negative = hash_distances(x, 1 - x)
    assert negative["dhash"] > 56 and negative["whash"] > 56


def test_numbers_are_those_of_the_truth_and_of_planted_errors():
    data = portraits_of("tiny")
    i = data.indices("test")[:20]
    oracle = Oracle(data, data.images[i].float() / 255, data.labels[i])
    held = HeldOut(data, oracle, 20)
    own = held.numbers(held.x)
    assert own["mae"] == own["mse"] == own["whash"] == 0
    assert own["identity_accuracy"] == own["attribute_accuracy"] == 1
    grey = held.numbers(0.5 * held.x + 0.25)
    assert grey["mae"] > 0 and grey["mse"] >= grey["mae"] ** 2
    other = held.numbers(held.baselines(held.x)["another person"])
    assert other["identity_accuracy"] == 0
    assert held.numbers(held.x[:5])["identity_accuracy"] == 1


def test_the_nearest_image_is_the_nearest():
    known = torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = known[[3, 7]] + 0.01
    assert torch.equal(nearest_images(x, known), known[[3, 7]])


@pytest.mark.parametrize("name", EDITED)
def test_exact_edits_change_one_attribute(name):
    _, factors = portraits_with_factors("tiny")
    able = factors[without_attribute(factors, name)][:6]
    assert (FACTORS.unpack(able)[name] == 0).all()
    x, y = exact_edits(able, name, 32)
    assert (x != y).flatten(1).any(1).all()
    assert (x - y).abs().mean() < 0.15


def edited_faces(name="hat"):
    """Test drawings and their exact edits, read by an oracle that knows both."""
    data, factors = portraits_with_factors("tiny")
    lab = SimpleNamespace(tier="tiny", size={"edited": 10, "pairs": 2})
    faces = EditedFaces(lab, name, Oracle(data, torch.zeros(1, *data.shape),
                                          data.labels[:1]))
    item = data.conditions.names.index(name)
    column = sum(c.width for c in data.conditions[:item])
    with_it = faces.asked.clone()
    with_it[:, column] = 1
    faces.evaluator = Oracle(data, torch.cat([faces.x, faces.exact]),
                             torch.cat([faces.asked, with_it]))
    faces.before = faces.read(faces.x).predicted
    return faces


def test_an_exact_edit_is_perfect_and_none_changes_nothing():
    faces = edited_faces()
    exact, none = faces.numbers(faces.exact), faces.numbers(faces.x)
    assert exact == {"attribute_accuracy": 1, "interference": 0, "identity_accuracy": 1}
    assert none == {"attribute_accuracy": 0, "interference": 0, "identity_accuracy": 1}
    wrong = faces.numbers(faces.exact.roll(1, 0))  # the edit of another face
    assert wrong["attribute_accuracy"] == 1 and wrong["interference"] > 0
    assert wrong["identity_accuracy"] < 1


def test_means_are_over_attributes_only():
    rows = [row("CRG", "interference", value, kind, {"attribute": name, **at})
            for name, value in (("hat", 0.2), ("beard", 0.4))
            for kind in ("one pair",) for at in ({}, {"s": 2.0})]
    found = mean_over_attributes(rows)
    assert [(r["at"], r["value"]) for r in found] == [({}, pytest.approx(0.3)),
                                                      ({"s": 2.0}, pytest.approx(0.3))]


def test_exact_claims():
    assert not inversion.printed_errors_share_a_scale()
    assert exact.ranges_shrink_towards_the_attribute()
    assert exact.edits_meet_far_away()


@pytest.mark.parametrize("name", [e.name for e in EXPERIMENTS])
def test_experiments_run_and_draw_at_tiny(name, runs, tmp_path):
    lab = lab_of(name, runs)
    rows = lab.experiment.run(lab)
    keys = [(r["model"], r["variant"], r["metric"], str(r["at"])) for r in rows]
    assert len(set(keys)) == len(keys)
    if lab.experiment.figures:
        lab.experiment.figures(lab, rows, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size < 300_000
