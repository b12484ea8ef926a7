"""Whole lives: who is in which part, measures with known answers, the baseline, and all experiments on few images."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condgen import metrics
from condgen.contracts import Classes, Schema
from condgen.data import Dataset
from condgen.experiments import ageing as tables
from condgen.experiments.ageing import (ABLATIONS, BINS, EDGES, STAYS, STEPS, Aged, Gallery, Transitions, Transport,
                                        centre, estimated, in_steps, into_bins, least_change, lives, lives_with_ages,
                                        monotonicity, principal, read_steps, rendered, ridge, sharpness,
                                        sittings)  # fmt: skip
from condgen.faces import FACTORS
from condgen.metrics import MetricInfo
from condgen.models.caae import CAAE
from condgen.models.classifier import FaceJudge
from condgen.results import merge

FULL = lives
MIDDLES = centre(torch.arange(BINS))


def seeded(k=0):
    return torch.Generator().manual_seed(k)


@pytest.fixture(scope="module")
def album():
    return FULL(16, 160, 8, 3)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The names that these experiments add to the registry, whether it has them or not."""
    for name, better in (("monotonicity", "higher"), ("ks_distance", "lower"), ("sharpness", "")):
        monkeypatch.setitem(metrics.METRICS, name, MetricInfo(name, "", better))


# Data


def test_people_keep_what_stays_and_are_met_at_all_ages(album):
    data, factors = album
    known = FACTORS.unpack(factors)
    who = data.conditions.unpack(data.labels)["identity"]
    assert torch.equal(who, known["identity"]) and len(factors) == len(data.images) == 160 + 3 * 10
    for k in range(11):
        assert all(known[name][who == k].unique().numel() == 1 for name in STAYS)
        assert known["age"][who == k].max() - known["age"][who == k].min() > 40
    assert torch.equal(data.labels[:, :BINS].argmax(1), (known["age"] / 8).long().clamp(max=9))
    for name in ("hat", "beard", "bald", "makeup", "sunglasses", "earrings", "frown", "moustache"):
        assert not known[name].any()
    assert known["yaw"].abs().max() <= 17.5 and known["glasses"].unique().numel() == 2


def test_strangers_are_in_no_part_but_test(album):
    data, _ = album
    who = data.conditions.unpack(data.labels)["identity"]
    parts = {part: set(who[data.indices(part)].tolist()) for part in data.splits}
    assert parts["train"] == set(range(8)) and parts["val"] <= parts["train"]
    assert parts["test"] >= {8, 9, 10} and parts["test"] & set(range(8))
    assert (who >= 8).sum() == 30 and len(data.indices("train")) == 128


def test_what_caae_is_told_is_the_age_only(album, monkeypatch):
    monkeypatch.setattr(tables, "lives", lambda: album)
    lives_with_ages.cache_clear()
    young = lives_with_ages()
    lives_with_ages.cache_clear()
    assert young.conditions == Schema(Classes("age", 10)) and torch.equal(young.labels, album[0].labels[:, :10])
    assert torch.equal(young.images, album[0].images) and young.splits is album[0].splits


def test_targets_are_the_same_people_at_the_middle_of_each_bin(album):
    data, factors = album
    own = data.labels[:4, :BINS].argmax(1)
    targets = rendered(factors[:4], 16)
    assert targets.shape == (4, BINS, 3, 16, 16) and (targets[:, 0] - targets[:, 9]).abs().mean() > 0.02
    x = data.images[:4].float() / 255
    near, far = ((targets[torch.arange(4), b] - x).abs().mean() for b in (own, (own + 5) % 10))
    assert near < far


def test_sittings_keep_pictures_apart(album):
    data, _ = album
    who = data.conditions.unpack(data.labels)["identity"]
    both = sittings(data, 5, 0)
    assert list(both) == ["training", "strangers"] and all(len(s.index) == 5 for s in both.values())
    for sitting in both.values():
        assert not set(sitting.index.tolist()) & set(sitting.shown.tolist())
    assert (who[both["strangers"].index] >= 8).all() and (who[both["training"].index] < 8).all()
    assert set(both["training"].shown.tolist()) == set(data.indices("train").tolist())
    assert not torch.equal(sittings(data, 5, 1)["training"].index, both["training"].index)


# Measures


class Planted(nn.Module):
    """Reads the age bin from the first pixel of channel 0, has the first two pixels of channel 1 as features."""

    def __init__(self, schema):
        super().__init__()
        self.conditions = schema

    def logits(self, x):
        b = (x[:, 0, 0, 0] * 10).round().long()
        age = 60 * nn.functional.one_hot(b, BINS).float()
        pad = x.new_full((len(x), self.conditions.width - BINS), 99.0)
        return torch.cat([age, pad] if self.conditions[0].name == "age" else [pad, age], 1)

    def features(self, x):
        return x[:, 1, 0, :2]


AGE, WHO = Classes("age", BINS), Classes("identity", 3)


def planted(bins, place):
    """Images `(n, c, 4, 4)` that the planted judge reads as these bins and places."""
    x = torch.zeros(len(bins), 3, 4, 4)
    x[:, 0, 0, 0] = bins / 10
    x[:, 1, 0, :2] = place
    return x


@pytest.mark.parametrize("schema", [Schema([AGE, WHO]), Schema([WHO, AGE])], ids=["age first", "age last"])
def test_estimated_ages(schema):
    x = planted(torch.arange(10.0), torch.zeros(10, 2))
    assert torch.allclose(estimated(Planted(schema), x, MIDDLES), MIDDLES.double())


def test_measures_of_planted_faces():
    """Four faces that are read as asked or one bin too old, of the right person or another."""
    places = torch.tensor([[0.0, 0.9], [0.9, 0.0], [0.9, 0.9]])
    gallery = Gallery.of(places.repeat(2, 1).double(), torch.tensor([4, 5, 6]).repeat(2))
    own, who = torch.tensor([0, 4, 9, 4]), torch.tensor([4, 5, 6, 4])
    bins = torch.arange(10.0).repeat(4, 1)
    cell = lambda bins, who: torch.stack([planted(row, places[int(k) - 4].expand(10, 2)) for row, k in zip(bins, who)])
    right = Aged(cell(bins, who), own, who, cell(bins, who))
    found = right.numbers(Planted(Schema([AGE, WHO])), gallery, MIDDLES, MIDDLES, ("older", "younger"))
    assert found[("monotonicity", "both")] == 1
    for direction in ("older", "younger"):
        assert found[("age_error", direction)] == pytest.approx(0, abs=1e-4) and found[("mae", direction)] == 0
        assert found[("identity_accuracy", direction)] == 1 and found[("sharpness", direction)] == 1
    wrong = cell((bins + 1).clamp(max=9), [5, 5, 6, 4])
    judge = Planted(Schema([AGE, WHO]))
    found = Aged(wrong, own, who, right.targets).numbers(judge, gallery, MIDDLES, MIDDLES, ("older",))
    assert set(found) == {(m, "older") for m in ("age_error", "identity_accuracy", "mae", "sharpness")}
    older = 9 + 5 + 0 + 5
    assert found["age_error", "older"] == pytest.approx(8 * (older - 3) / older, rel=1e-4)
    assert found["identity_accuracy", "older"] == pytest.approx((older - 9) / older)
    assert found["mae", "older"] > 0


def test_cells_that_count():
    faces = Aged(torch.zeros(2, 4, 1, 1, 1), torch.tensor([1, 3]), torch.zeros(2))
    assert faces.cells("older").tolist() == [[False, False, True, True], [False] * 4]
    assert faces.cells("younger").tolist() == [[True, False, False, False], [True, True, True, False]]
    with pytest.raises(ValueError, match="did you mean 'older'"):
        faces.cells("oldr")


def test_a_gallery_finds_by_direction_about_the_middle():
    g = Gallery(torch.tensor([[10.0, 11.0], [11.0, 10.0], [9.0, 9.0]]), torch.tensor([7, 3, 5]))
    assert g.find(torch.tensor([[10.0, 19.0], [10.2, 10.0], [0.0, 0.0]])).tolist() == [7, 3, 5]


def test_sharpness_and_order():
    x = torch.rand(3, 3, 8, 8, generator=seeded())
    blurred = nn.functional.avg_pool2d(x, 3, 1, 1)
    assert sharpness(blurred) < 0.5 * sharpness(x) and sharpness(0.5 * x + 0.2) == pytest.approx(sharpness(x) / 2)
    assert monotonicity(torch.tensor([[1.0, 2, 3], [3, 2, 1]])) == 0.5
    assert monotonicity(torch.ones(2, 5)) == 0


def test_bins_of_photographs():
    years = torch.arange(117.0)
    bins = into_bins(years)
    assert bins.unique().tolist() == list(range(10)) and bool((bins[1:] >= bins[:-1]).all())
    assert [int(years[bins == b].max()) for b in range(9)] == list(EDGES) and into_bins(torch.tensor([71.0])) == 9


# The baselines


def test_ridge_solves_its_equation():
    a, b = torch.randn(50, 4, generator=seeded()), torch.randn(50, 3, generator=seeded(1))
    w = ridge(a, b, 0.0)
    fit = torch.linalg.lstsq(torch.cat([a, torch.ones(50, 1)], 1), b).solution[:4]
    assert torch.allclose(w, fit, atol=1e-4) and ridge(a, b, 1e6).abs().max() < 1e-4


def lines(n=600):
    """Pictures of 16 numbers: a person, a pose, and an age that adds a fixed pattern for each bin."""
    g = seeded(2)
    who, age = torch.randint(5, (n,), generator=g), torch.randint(BINS, (n,), generator=g)
    person, pose = torch.randn(5, generator=g), torch.randn(n, generator=g)
    x = 0.5 + torch.zeros(n, 1, 4, 4)
    x[:, 0, 0, 0] += 0.05 * person[who]
    x[:, 0, 0, 1] += 0.05 * pose
    x[:, 0, 1, 0] = age / 10
    schema = Schema([AGE, Classes("identity", 5)])
    part = torch.arange(n) % 10
    rows = {"train": part > 1, "val": part == 0, "test": part == 1}
    splits = {name: own.nonzero()[:, 0] for name, own in rows.items()}
    images = (255 * x.clamp(0, 1)).round().to(torch.uint8)
    return Dataset("lines", images, schema.pack(n, age=age, identity=who), schema, splits)


def test_steps_reach_the_next_group_keep_the_person_and_forget_the_pose():
    data = lines()
    x, c = data.images_of("test"), data.conditions.unpack(data.table("test")["c"])
    for strength in (None, 1e-3):
        chain = Transitions(data, strength, rank=3)
        made = chain.ages(x, c["age"])
        assert torch.equal(made[torch.arange(len(x)), c["age"]], x)
        young = c["age"] < 5
        last, first = made[young, 9, 0], x[young, 0]
        assert (last[:, 1, 0] - 0.9).abs().max() < 0.02
        assert torch.corrcoef(torch.stack([last[:, 0, 0], first[:, 0, 0]]))[0, 1] > 0.9
        kept = last[:, 0, 1].std() / first[:, 0, 1].std()
        assert kept > 0.9 if strength is None else kept < 0.3
        assert torch.equal(made[~young][:, 0], x[~young])  # there is no way back


def test_pairs_are_of_one_person():
    who = torch.tensor([0, 0, 1, 2, 0, 1, 1])
    first, second = Transitions.pairs(who, torch.tensor([0, 2, 3]), torch.tensor([4, 5, 6]), seeded())
    assert first.tolist() == [0, 2] and torch.equal(who[first], who[second]) and second[0] == 4


def test_least_change_carries_one_covariance_to_the_other_and_is_gentler_than_other_maps():
    a, b = (m @ m.T for m in torch.randn(2, 4, 7, generator=seeded(), dtype=torch.float64))
    best, eigen = least_change(a, b), torch.linalg.eigvalsh(least_change(a, b))
    assert torch.allclose(best @ a @ best.T, b) and torch.allclose(best, best.T) and eigen.min() > 0
    assert torch.allclose(least_change(b, a) @ best, torch.eye(4).double(), atol=1e-8)  # the way back is the inverse
    cholesky = torch.linalg.cholesky(b) @ torch.linalg.inv(torch.linalg.cholesky(a))
    assert torch.allclose(cholesky @ a @ cholesky.T, b) and (best @ a).trace() > (cholesky @ a).trace()
    one = torch.tensor([[4.0]], dtype=torch.float64)
    assert least_change(one, 9 * one).item() == pytest.approx(3)


def test_principal_directions_span_what_varies():
    x = 0.02 * torch.randn(500, 20, generator=seeded())
    x[:, 3] += torch.randn(500, generator=seeded(1))
    x[:, 8] += 0.5 * torch.randn(500, generator=seeded(2))
    found = principal(x + 5, 2, seeded(3))
    assert torch.allclose(found.T @ found, torch.eye(2), atol=1e-3)
    assert found[3, 0].abs() > 0.99 and found[8, 1].abs() > 0.99


def test_transport_keeps_person_and_pose_goes_both_ways_and_reads_the_age():
    data = lines()
    x, c = data.images_of("test"), data.conditions.unpack(data.table("test")["c"])
    plan = Transport(data)
    made = plan.ages(x, c["age"])
    assert plan.basis.shape[1] <= data.conditions.unpack(data.table("train")["c"])["age"].bincount().min() // 4
    assert torch.allclose(made[torch.arange(len(x)), c["age"]], x, atol=1e-4)
    for b in (0, 9):
        assert (made[:, b, 0, 1, 0] - b / 10).abs().max() < 0.02
        for i in (0, 1):
            assert torch.corrcoef(torch.stack([made[:, b, 0, 0, i], x[:, 0, 0, i]]))[0, 1] > 0.9
    assert (plan.read(x) == c["age"]).double().mean() > 0.95


def test_small_groups_are_refused():
    data = lines(60)
    with pytest.raises(ValueError, match="4 or more in each"):
        Transport(data)


def test_a_judge_that_reads_no_age_is_refused():
    with pytest.raises(ValueError, match="accepted: one that reads age"):
        estimated(Planted(Schema([WHO])), torch.zeros(1, 3, 4, 4), MIDDLES)


def test_a_judge_is_taught_steps_of_two_years(album):
    data, factors = album
    fine, known = in_steps(data, factors), FACTORS.unpack(factors)
    c = fine.conditions.unpack(fine.labels)
    assert fine.conditions[0] == Classes("age", STEPS) and torch.equal(c["identity"], known["identity"])
    assert (read_steps()[c["age"]] - known["age"]).abs().max() <= 1 + 1e-4
    assert torch.equal(c["age"] // 4, data.labels[:, :BINS].argmax(1)) and fine.images is data.images


# Experiments


class Bench:
    """A lab with few pictures and untrained models of the recipes' kinds."""

    tier, seed, progress, first, trained, waited = "tiny", 0, False, True, 0.0, 0.0

    def __init__(self, data, factors, photographs=None):
        self.data, self.factors, self.photographs, self.asked = data, factors, photographs, []

    def train(self, name, **arguments):
        self.asked.append((name, str(arguments.get("weights", ""))))
        torch.manual_seed(0)
        if name.startswith("judge"):
            data = self.photographs if name.endswith("utkface") else in_steps(self.data, self.factors)
            return SimpleNamespace(model=FaceJudge(data.shape, data.conditions, width=4), seconds=1.0)
        form = "literal" if name.endswith("literal") else "corrected"
        return SimpleNamespace(model=CAAE(self.data.shape, [AGE], code=6, width=4, form=form, **arguments), seconds=2.0)


def check(rows, *wanted):
    """Every row is finite and there once; the metrics are as expected."""
    assert len(merge(rows)) == len(rows) and {r["metric"] for r in rows} == set(wanted)
    assert all(math.isfinite(v) for r in rows for v in r["values"])


def test_ageing(album, monkeypatch):
    monkeypatch.setattr(tables, "lives", lambda: album)
    lab = Bench(*album)
    rows = tables.faces_aged(lab)
    check(rows, "age_error", "identity_accuracy", "mae", "sharpness", "monotonicity", "seconds")
    assert lab.asked == [("judge-ages", ""), ("caae-faces", ""), ("caae-faces-longer", ""), ("caae-faces-literal", ""),
                         *(("caae-faces", str(w)) for w in ABLATIONS.values())]
    assert {str(w) for w in ABLATIONS.values()} == {"G0"}
    at = lambda model, metric, **where: [r for r in rows if r["model"] == model and r["metric"] == metric
                                         and all(r["at"].get(k) == v for k, v in where.items())]
    assert all(r["value"] == 0 for r in at("drawn", "mae")) and all(r["value"] == 1 for r in at("drawn", "sharpness"))
    assert {r["at"]["direction"] for r in at("steps", "mae")} == {"older"}
    assert {r["variant"] for r in at("CAAE", "mae")} == {"corrected", "longer", "literal", *ABLATIONS}
    assert {r["at"]["people"] for r in at("CAAE", "mae")} == {"training", "strangers"}
    assert {r["variant"] for r in at("transport", "mae")} == {"age given", "age read"}
    assert {r["at"]["direction"] for r in at("transport", "mae")} == {"older", "younger"}
    assert len([r for r in at("judge", "age_error") if "people" in r["at"]]) == 2 and not at("steps", "monotonicity")
    by_age = {r["at"]["age"]: r["protocol"]["n"] for r in at("judge", "age_error") if "age" in r["at"]}
    assert set(by_age) <= set(MIDDLES.tolist()) and sum(by_age.values()) == len(album[0].indices("test"))


def test_codes(album, monkeypatch):
    monkeypatch.setattr(tables, "lives", lambda: album)
    rows = tables.caae_codes(Bench(*album))
    check(rows, "ks_distance", "accuracy", "age_error", "frechet")
    floor = next(r["value"] for r in rows if r["model"] == "uniform noise")
    assert 0 < floor < 0.3 and all(r["value"] > floor for r in rows if r["metric"] == "ks_distance" and r["variant"])


def test_photographs(album, monkeypatch):
    data, factors = album
    schema, years = Schema(AGE), FACTORS.unpack(factors)["age"].round()
    photographs = replace(data, labels=schema.pack(len(years), age=into_bins(years)), conditions=schema)
    monkeypatch.setattr(tables, "utkface", lambda: (photographs, years))
    monkeypatch.setattr(tables, "once", lambda lab, name: lab.train(name))
    lab = Bench(data, factors, photographs)
    rows = tables.utkface_aged(lab)
    check(rows, "age_error", "monotonicity", "estimated_age", "mae", "seconds")
    assert len([r for r in rows if r["metric"] == "estimated_age"]) == BINS
    assert [name for name, _ in lab.asked] == ["judge-utkface", "caae-utkface"]
    assert {r["at"].get("direction") for r in rows if r["model"] == "unchanged"} == {"older", "younger", "both"}
    assert next(r["value"] for r in rows if r["model"] == "unchanged" and r["metric"] == "monotonicity") == 0


def test_without_the_prepared_set_the_message_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path))
    tables.utkface.cache_clear()
    with pytest.raises(FileNotFoundError, match="no prepared set 'utkface64'"):
        tables.utkface_ages()


def test_a_picture_is_drawn(album, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "lives", lambda: album)
    monkeypatch.setattr(tables, "replace", lambda lab, **changes: lab)
    tables.picture_ageing(Bench(*album), [], tmp_path, tmp_path / "ageing.cpu.json")
    assert (tmp_path / "ageing.cpu.png").stat().st_size > 10_000
