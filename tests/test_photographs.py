"""Photographs: splits that share people, and the experiments on drawn
faces as a prepared set.
"""

import csv
import io
import zipfile
from dataclasses import replace

import pytest
import torch
from PIL import Image

from condgen import lab as lab_module
from condgen import recipes
from condgen.conditions import Binary, Classes, Real, Schema
from condgen.data import Dataset, portraits
from condgen.evaluation import Predictions
from condgen.experiments import photographs
from condgen.experiments.photographs import (
    celeba_people, known_people_accuracies, overall_diversity, people_dataset,
    split_within_people)
from condgen.splits import SPLITS
from condgen.lab import Lab


def crowd(counts, first=100):
    """One image for each entry, of people numbered from `first`, as often as
    `counts` says, mixed.
    """
    number = torch.tensor([first + k for k, n in enumerate(counts) for _ in range(n)])
    number = number[torch.randperm(len(number),
                                   generator=torch.Generator().manual_seed(0))]
    schema = Schema([Real("identity", 0, 20_000), Binary("hat")])
    images = number.to(torch.uint8)[:, None, None, None].expand(-1, 1, 2,
                                                                2).contiguous()
    labels = schema.pack(len(number), identity=number.float(), hat=(number % 2).float())
    splits = {part: torch.arange(len(number)) if part == "train" else torch.arange(0)
              for part in SPLITS}
    return number, Dataset("crowd", images, labels, schema, splits)


def test_frequent_people_get_classes_and_are_in_all_splits():
    number, raw = crowd([3, 30, 4, 12, 12, 1, 1, 1, 2])
    data = split_within_people(raw, 4)
    who = data.conditions.unpack(data.labels)["identity"]
    for k, person in enumerate((101, 103, 104, 102)):  # ties: the lower number first
        assert torch.equal(who == k, number == person)
    assert (who == 4).sum() == 3 + 1 + 1 + 1 + 2
    assert torch.equal(data.conditions.unpack(data.labels)["hat"], (number % 2).float())
    for part in SPLITS:
        assert set(who[data.indices(part)].tolist()) == set(range(5))
    each = [[int((who[data.indices(part)] == k).sum()) for part in SPLITS]
            for k in range(5)]
    assert each == [[24, 3, 3], [10, 1, 1], [10, 1, 1], [2, 1, 1], [6, 1, 1]]
    assert sum(len(data.indices(part)) for part in SPLITS) == len(number)
    assert torch.equal(split_within_people(raw, 4).indices("test"),
                       data.indices("test"))


@pytest.mark.parametrize("known, said",
                         [(9, "1 to 4"), (5, "1 to 4"), (0, "known=0"), (2.5, "2.5")])
def test_too_many_people_are_refused(known, said):
    with pytest.raises(ValueError, match=said):
        split_within_people(crowd([3, 30, 4, 12, 2, 1])[1], known)


def test_a_set_without_people_is_refused():
    raw = crowd([5, 5])[1]
    with pytest.raises(ValueError, match="a Real identity first"):
        split_within_people(
            replace(raw, conditions=Schema([Real("who", 0, 20_000), Binary("hat")])), 1)


def test_images_of_the_remaining_class_are_not_evaluated():
    schema = Schema([Classes("identity", 3), Binary("hat")])
    asked = schema.pack(6, identity=[0, 0, 1, 1, 2, 2], hat=[0, 1, 0, 1, 0, 1])

    class Planted(torch.nn.Module):
        conditions, head = schema, torch.nn.Identity()

        def features(self, x):
            return x.flatten(1)

    shown = asked.clone()
    # others, predicted as the first person
    shown[4:, :3] = torch.tensor([1.0, 0.0, 0.0])
    shown[:4, 2] = 2.0  # and known people, predicted as others
    images = lambda c: Predictions(c[:, :, None, None], asked, Planted())
    found = known_people_accuracies(images(20 * shown - 10))
    assert found == {"identity_accuracy": 1.0, "attribute_accuracy": 1.0}
    shown[0, :2] = torch.tensor([0.0, 1.0])
    assert known_people_accuracies(images(20 * shown - 10))["identity_accuracy"] == 0.75
    still = shown[:1].expand(6, -1)
    for other, value in ((shown, 1), (still, 0)):
        found = overall_diversity(images(other), images(shown))
        assert found == pytest.approx({"diversity_pixel": value,
                                       "diversity_feature": value})


def test_missing_prepared_set_is_named_in_the_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path))
    people_dataset.cache_clear()
    with pytest.raises(FileNotFoundError, match="no prepared set 'celeba64'"):
        celeba_people("tiny")


def write_prepared(folder, name, columns):
    """Drawn faces as a prepared set; columns: in the table → factor."""
    drawn = portraits(size=16, n=180, identities=8,
                      columns=("identity", "masculine", "hat"))
    known = drawn.conditions.unpack(drawn.labels)
    folder.mkdir()
    with (zipfile.ZipFile(folder / f"{name}64.zip", "w") as z,
          open(folder / "labels.csv", "w", newline="") as f):
        table = csv.writer(f)
        table.writerow(["file", "identity", "split", *columns])
        for i, x in enumerate(drawn.images):
            raw = io.BytesIO()
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(raw, "PNG")
            z.writestr(f"{i}.png", raw.getvalue())
            table.writerow([f"{i}.png", int(known["identity"][i]), "train",
                            *(int(known[factor][i]) for factor in columns.values())])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["celeba", "lfw"])
def test_experiments_run_on_drawn_faces(monkeypatch, tmp_path, name):
    columns = {"celeba": {"Male": "masculine", "Wearing_Hat": "hat"}, "lfw": {}}[name]
    write_prepared(tmp_path / f"{name}64", name, columns)
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path))
    monkeypatch.setattr(photographs, "KNOWN_PEOPLE", {name: 5})
    monkeypatch.setattr(photographs, "DATASET_ATTRIBUTES", {name: tuple(columns)})
    people_dataset.cache_clear()
    lists = {"RECIPES": {r.name: r for r in photographs.RECIPES}}
    for module in (lab_module, recipes):
        monkeypatch.setattr(module, "declared", lists.__getitem__)
    experiment = next(e for e in photographs.EXPERIMENTS if e.name == f"caglow/{name}")
    rows = experiment.run(Lab(experiment, "tiny", 0, tmp_path / "runs", progress=False,
                              rounds=3))
    found = {(r["model"], r["metric"], tuple(r["at"].values())): r["value"]
             for r in rows}
    assert len(found) == len(rows)
    assert all(torch.tensor(r["value"]).isfinite() for r in rows)
    for model in ("CGlow", "CAGlow"):
        for metric in ("identity_accuracy", "diversity_pixel", "frechet",
                       "temperature"):
            assert (model, metric, ()) in found
        assert "knn_two_sample" in {key[1] for key in found if key[0] == model}
        assert ((model, "attribute_accuracy", ()) in found) == bool(columns)
    assert (("Glow", "bpd", ()) in found
            and ("evaluator", "identity_accuracy", ()) in found)
    assert ("real training images", "frechet", ()) in found
    people_dataset.cache_clear()
