"""Two hundred people: who is who in the portraits, measures with known answers, and all experiments on few images."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from condgen import recipes
from condgen.contracts import Batch, Classes, Noise
from condgen.data import KEPT, WORN, portraits
from condgen.experiments import portraits as tables
from condgen.experiments.portraits import JUDGED, Faces, manipulations, ordering, pearson, readers, render_all
from condgen.faces import EXCLUSIVE, FACTORS, draw
from condgen.models.classifier import FaceJudge, Judge
from condgen.results import row

SMALL = portraits
SET = {"size": 16, "n": 240, "identities": 6}


@pytest.fixture(scope="module")
def album():
    data, known = portraits(**SET), portraits(**SET, columns=FACTORS.names)
    return data, FACTORS.pack(len(data.images), **known.conditions.unpack(known.labels))


def test_people_keep_what_stays_and_change_what_is_worn(album):
    data, factors = album
    known = FACTORS.unpack(factors)
    assert list(data.conditions.names) == ["identity", *WORN]
    for k in range(SET["identities"]):
        own = known["identity"] == k
        assert own.sum() > 10 and all(known[name][own].unique().numel() == 1 for name in KEPT)
        assert known["glasses"][own].unique().numel() == 2 and known["background"][own].unique().numel() > 10
    assert bool((known["age"] >= 18).all())
    assert not any((sum(known[name] for name in group) > 1).any() for group in EXCLUSIVE)
    parts = [set(data.conditions.unpack(data.labels[data.indices(s)])["identity"].tolist()) for s in data.splits]
    assert all(part == set(range(SET["identities"])) for part in parts)


def test_with_enough_people_beards_are_men_s():
    """Each picture finds somebody of its kind."""
    known = portraits(**SET | {"n": 400, "identities": 100}, columns=FACTORS.names)
    factors = known.conditions.unpack(known.labels)
    assert factors["beard"].any() and not (factors["beard"] * (1 - factors["masculine"])).any()


def test_portraits_are_the_pictures_of_their_factors(album):
    data, factors = album
    assert torch.equal(render_all(factors[:20], 16), data.images[:20].float() / 255)
    assert portraits(**SET).sha256 == data.sha256


@pytest.mark.parametrize("given, said", [({"identities": 1000}, "256"), ({"size": 8}, "16 to 256"), ({"n": 0}, "n=0"),
                                         ({"columns": ["hatt"]}, "hat")])
def test_portraits_refuse(given, said):
    with pytest.raises(ValueError, match=said):
        portraits(**{**SET, **given})


class Planted(nn.Module):
    """A judge of pictures that contain what it should read."""

    def __init__(self, conditions):
        super().__init__()
        self.conditions, self.head = conditions, nn.Identity()

    def features(self, x):
        return x.flatten(1)


def seen(c, conditions, asked=None):
    return Faces((20 * c - 10)[:, :, None, None], c if asked is None else asked, Planted(conditions))


def test_accuracies_of_a_planted_judge(album):
    data, _ = album
    c = data.labels
    assert seen(c, data.conditions).accuracies() == {"identity_accuracy": 1.0, "attribute_accuracy": 1.0}
    bare = c.clone()
    bare[:, SET["identities"] :] = 0
    lazy = seen(bare, data.conditions, c)
    assert lazy.accuracies() == {"identity_accuracy": 1.0, "attribute_accuracy": 0.5}
    others = c.clone()
    others[:, : SET["identities"]] = others[:, : SET["identities"]].roll(1, 1)
    assert seen(others, data.conditions, c).accuracies() == {"identity_accuracy": 0.0, "attribute_accuracy": 1.0}
    assert set(lazy.each()) == set(WORN)


def test_against_itself_there_is_no_distance_and_full_diversity(album):
    data, _ = album
    noise = 0.1 * torch.randn(len(data.labels), data.labels.shape[1], generator=torch.Generator().manual_seed(0))
    real = Faces((20 * data.labels - 10 + noise)[:, :, None, None], data.labels, Planted(data.conditions))
    found = real.against(real)
    assert found["frechet"] < 1e-6 and found["diversity_pixel"] == pytest.approx(1) == found["diversity_feature"]
    still = Faces(torch.stack([real.x[(data.labels[:, k] > 0).nonzero()[0, 0]] for k in
                               data.labels[:, : SET["identities"]].argmax(1)]), data.labels, real.judge)
    assert still.against(real)["diversity_pixel"] == 0


def test_each_manipulation_switches_one_attribute_that_can_be_switched():
    rows = draw(500, torch.Generator().manual_seed(0))
    order, states = manipulations(rows, 4, torch.Generator().manual_seed(1))
    values = torch.stack([torch.stack([FACTORS.unpack(state)[name] for name in JUDGED], 1) for state in states])
    changed = values[1:] != values[:-1]
    assert torch.equal(changed.sum(2), torch.ones(4, 500, dtype=torch.long))
    assert torch.equal(changed.int().argmax(2).T, order)
    at = {name: j for j, name in enumerate(JUDGED)}
    assert not (values[:, :, at["glasses"]] * values[:, :, at["sunglasses"]]).any()
    before = FACTORS.unpack(rows)
    kept = [name for name in FACTORS.names if name not in (*WORN, "frown")]
    assert all(torch.equal(FACTORS.unpack(states[-1])[name], before[name]) for name in kept)
    assert not (order[before["masculine"] == 0] == at["beard"]).any()
    assert not (order[before["bald"] > 0] == at["long_hair"]).any()
    assert len(order.unique()) == len(JUDGED)
    smiling = before["smile"] > 0
    assert smiling.any() and not (order[smiling] == at["laugh"]).any()


def test_orderings():
    made = lambda model, values: row(model, "frechet", 0.0) | {"values": values}
    rows = [made("A", [1.0, 1.2, 1.1]), made("B", [2.0, 2.1, 2.3])]
    mean, low, high, verdict = ordering(rows, "frechet", {}, ("A", ""), ("B", ""))
    assert mean == pytest.approx(3.1 / 3) and low < mean < high and verdict == "holds"  # lower is better
    assert ordering(rows, "frechet", {}, ("B", ""), ("A", ""))[3] == "does not hold"
    one = [made("A", [1.0]), made("B", [2.0])]
    assert ordering(one, "frechet", {}, ("A", ""), ("B", ""))[1:] == (None, None, "open")
    with pytest.raises(ValueError, match="no row of C"):
        ordering(rows, "frechet", {}, ("C", ""), ("B", ""))
    for name, metric, at, better, worse in tables.claims():
        assert f"caglow/{name}" in recipes.EXPERIMENTS and better != worse
        made_up = [row(*model[:1], metric, 1.0, model[1], at) for model in (better, worse)]
        assert ordering(made_up, metric, at, better, worse)[0] == 0


def test_a_judge_of_faces_sees_mirrored_pictures_and_no_others():
    judge = FaceJudge((3, 16, 16), [Classes("identity", 5)])
    x, c = torch.rand(64, 3, 16, 16), torch.eye(5)[torch.arange(64) % 5]
    shown = []
    judge.trunk.register_forward_hook(lambda _, given, __: shown.append(given[0]))
    for model in (judge, Judge.loss):
        loss = judge.loss if model is judge else lambda batch: Judge.loss(judge, batch)
        loss(Batch({"x": x, "c": c}, Noise((0,), slice(None), 64)))
    same, mirrored = ((shown[0] == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert bool((same ^ mirrored).all()) and 16 < same.sum() < 48
    assert not (shown[1] == x).flatten(1).all(1).any()


def test_readers_read_light_from_pixels():
    many = {"size": 16, "n": 900, "identities": 6}
    data, known = portraits(**many), portraits(**many, columns=FACTORS.names)
    factors = FACTORS.pack(900, **known.conditions.unpack(known.labels))
    truth = FACTORS.unpack(factors[data.indices("test")])
    read = readers(data, factors, ("light", "yaw"))
    assert pearson(read["light"](data.images_of("test")), truth["light"]) > 0.9
    assert pearson(torch.arange(5.0), -torch.arange(5.0)) == pytest.approx(-1)


@pytest.mark.slow
def test_all_experiments_run_through(monkeypatch, tmp_path):
    """Six people, a few rounds of each training: every number is there, and every picture is drawn."""
    for module in (recipes, tables):
        monkeypatch.setattr(module, "portraits", lambda **k: SMALL(**{**SET, **k}))
    for cached in (recipes.faces_to_train, tables.truth):
        cached.cache_clear()
    monkeypatch.setattr(tables, "SHOWN", (3, 4, 2, 1))
    monkeypatch.setattr(recipes, "face_flow", lambda tier: {"levels": 2, "depth": 1, "width": 8})
    tables.CHOSEN.clear()
    lengths = {"judge": 64, "flow": 128, "adversarial": 160}
    for name in recipes.FACES_ON_DEMAND:
        plan = recipes.RECIPES[name]
        images = {"tiny": {stage: lengths[stage] for stage in plan.images["tiny"]}}
        monkeypatch.setitem(recipes.RECIPES, name, replace(plan, images=images))
    lab, found = recipes.Lab("tiny", 0, tmp_path / "runs", progress=False), {}
    for name in ("table1-faces", "table2", "table3", "fig1", "fig3", "fig4", "fig5", "fig7", "cost"):
        rows = recipes.EXPERIMENTS[f"caglow/{name}"].run(lab)
        keys = [(r["model"], r["variant"], r["metric"], tuple(r["at"].values())) for r in rows]
        assert len(set(keys)) == len(keys) and all(torch.tensor(r["value"]).isfinite() for r in rows), name
        found |= {(name, *key): r for key, r in zip(keys, rows, strict=True)}
    for model in (("CGlow", ""), ("CAGlow", "corrected"), ("CAGlow", "literal")):
        for metric in ("identity_accuracy", "attribute_accuracy", "diversity_pixel", "frechet", "temperature"):
            assert ("table1-faces", *model, metric, ()) in found
        assert ("table3", *model, "interference", (4, "start, L − 1")) in found
        assert found["cost", *model, "seconds", ()]["value"] > 0
    assert found["table3", "drawn", "", "mae", (4,)]["value"] == 0
    assert all(r["value"] == 0 for key, r in found.items() if key[:2] == ("fig4", "drawn") and key[3] == "mae")
    assert found["table1-faces", "CAGlow", "literal", "frechet", ()]["paper"] is None
    for name in ("fig3", "fig4", "fig5", "fig7"):
        path = tmp_path / f"{name}.json"
        assert recipes.reproduce(f"caglow/{name}", "tiny", runs=tmp_path / "runs", results=path, progress=False)["rows"]
        assert path.with_suffix(".png").stat().st_size > 5_000
    tables.CHOSEN.clear()
    for cached in (recipes.faces_to_train, tables.truth):
        cached.cache_clear()
