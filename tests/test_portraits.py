"""The portraits, measures with known answers, editors, and all
experiments on few images.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condgen import lab as lab_module
from condgen import recipes
from condgen.conditions import Binary, Classes, Code, Schema
from condgen.contracts import Batch, Noise
from condgen.data import IDENTITY_FACTORS, IMAGE_ATTRIBUTES, portraits
from condgen.evaluation import Predictions
from condgen.experiments import portrait_edits, portrait_latents
from condgen.experiments import portraits as tables
from condgen.experiments.portrait_edits import (
    EVALUATED_ATTRIBUTES, cglow_editor, directions_editor, encoder_editor,
    render_portraits, sample_attribute_switches)
from condgen.experiments.portrait_latents import correlation, factor_regressions
from condgen.experiments.portraits import (
    check_ordering, choose_temperature_for, paper_claims, rows_by_point)
from condgen.faces import EXCLUSIVE_ATTRIBUTES, FACTORS, sample_factors
from condgen.lab import Lab
from condgen.models.caglow import CAGlow
from condgen.models.cglow import CGlow
from condgen.models.classifier import Evaluator, FaceEvaluator
from condgen.models.glow import Glow
from condgen.results import read_results, result_path, row

SET = {"size": 16, "n": 240, "identities": 6}
MODULES = (tables, portrait_edits, portrait_latents)
RESULTS = Path(__file__).resolve().parents[1] / "data" / "results"
EXPERIMENTS = {e.name: e for module in MODULES for e in module.EXPERIMENTS}


@pytest.fixture(scope="module")
def album():
    data, known = portraits(**SET), portraits(**SET, columns=FACTORS.names)
    return data, FACTORS.pack(len(data.images), **known.conditions.unpack(known.labels))


def test_fixed_factors_are_constant_and_others_vary(album):
    data, factors = album
    known = FACTORS.unpack(factors)
    assert list(data.conditions.names) == ["identity", *IMAGE_ATTRIBUTES]
    for k in range(SET["identities"]):
        own = known["identity"] == k
        assert own.sum() > 10
        assert all(known[name][own].unique().numel() == 1 for name in IDENTITY_FACTORS)
        assert known["glasses"][own].unique().numel() == 2
        assert known["background"][own].unique().numel() > 10
    assert bool((known["age"] >= 18).all())
    assert not any((sum(known[name] for name in group) > 1).any()
                   for group in EXCLUSIVE_ATTRIBUTES)
    parts = [
        set(data.conditions.unpack(data.labels[data.indices(s)])["identity"].tolist())
        for s in data.splits]
    assert all(part == set(range(SET["identities"])) for part in parts)


def test_only_men_have_beards():
    """Each image is given to a person of its kind."""
    known = portraits(**SET | {"n": 400, "identities": 100}, columns=FACTORS.names)
    factors = known.conditions.unpack(known.labels)
    assert factors["beard"].any()
    assert not (factors["beard"] * (1 - factors["masculine"])).any()


def test_portraits_equal_rendered_factors(album):
    data, factors = album
    x, c = render_portraits(data, factors[:20])
    assert torch.equal(x, data.images[:20].float() / 255)
    assert torch.equal(c, data.labels[:20])
    assert portraits(**SET).sha256 == data.sha256


@pytest.mark.parametrize("given, said", [
    ({"identities": 1000}, "256"), ({"size": 8}, "16 to 256"), ({"n": 0}, "n=0"),
    ({"columns": ["hatt"]}, "hat")])
def test_portraits_refuse(given, said):
    with pytest.raises(ValueError, match=said):
        portraits(**{**SET, **given})


class Planted(nn.Module):
    """An evaluator of images that contain its logits."""

    def __init__(self, conditions):
        super().__init__()
        self.conditions, self.head = conditions, nn.Identity()

    def features(self, x):
        return x.flatten(1)


def seen(c, conditions, asked=None):
    x = (20 * c - 10)[:, :, None, None]
    return Predictions(x, c if asked is None else asked, Planted(conditions))


def test_accuracies_of_known_predictions(album):
    data, _ = album
    c = data.labels
    right = {"identity_accuracy": 1.0, "attribute_accuracy": 1.0}
    assert seen(c, data.conditions).accuracies() == right
    bare = c.clone()
    bare[:, SET["identities"] :] = 0
    never = seen(bare, data.conditions, c)
    assert never.accuracies() == {**right, "attribute_accuracy": 0.5}
    others = c.clone()
    others[:, : SET["identities"]] = others[:, : SET["identities"]].roll(1, 1)
    found = seen(others, data.conditions, c).accuracies()
    assert found == {**right, "identity_accuracy": 0.0}
    assert set(never.attribute_accuracies()) == set(IMAGE_ATTRIBUTES)


def test_images_against_themselves_have_distance_0_diversity_1(album):
    data, _ = album
    g = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(len(data.labels), data.labels.shape[1], generator=g)
    x = (20 * data.labels - 10 + noise)[:, :, None, None]
    real = Predictions(x, data.labels, Planted(data.conditions))
    found = real.compare_with(real)
    assert found["frechet"] < 1e-6
    assert found["diversity_pixel"] == pytest.approx(1) == found["diversity_feature"]
    first = [(data.labels[:, k] > 0).nonzero()[0, 0]
             for k in data.labels[:, : SET["identities"]].argmax(1)]
    still = Predictions(torch.stack([real.x[i] for i in first]), data.labels,
                     real.evaluator)
    assert still.compare_with(real)["diversity_pixel"] == 0


class Copy:
    """A model that returns the logits of its conditions, and
    noise times temperature.
    """

    def __init__(self, conditions):
        self.conditions, self.tried = conditions, []

    def sample(self, n, temperature, generator, **given):
        self.tried.append(temperature)
        c = self.conditions.pack(n, **given)
        noise = torch.randn(n, c.shape[1], generator=generator)
        return (20 * (c - 0.5) + temperature * noise)[:, :, None, None]


def test_temperature_needs_diversity_then_accuracy():
    schema = Schema([Classes("identity", 3), Binary("hat")])
    model, data = Copy(schema), SimpleNamespace(conditions=schema)
    c = schema.pack(300, identity=torch.arange(300) % 3, hat=0)
    noise = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    real = Predictions((20 * (c - 0.5) + noise)[:, :, None, None], c, Planted(schema))
    choose = lambda *t, **more: choose_temperature_for(real, model, data, t, 0, **more)
    # too little diversity, enough, too little accuracy
    assert choose(0.3, 1.0, 9.0) == 1.0
    assert choose(0.2, 0.5) == 0.5  # the largest diversity where none is enough
    assert choose(0.3, 1.0, 2.0, rule="distance") == 1.0
    tried = len(model.tried)
    assert choose(0.7) == 0.7 and len(model.tried) == tried  # no choice, no samples


def test_each_switch_changes_one_allowed_attribute():
    rows = sample_factors(500, torch.Generator().manual_seed(0))
    order, states = sample_attribute_switches(rows, 4, torch.Generator().manual_seed(1))
    values = torch.stack([
        torch.stack([FACTORS.unpack(state)[name] for name in EVALUATED_ATTRIBUTES], 1)
        for state in states])
    changed = values[1:] != values[:-1]
    assert torch.equal(changed.sum(2), torch.ones(4, 500, dtype=torch.long))
    assert torch.equal(changed.int().argmax(2).T, order)
    at = {name: j for j, name in enumerate(EVALUATED_ATTRIBUTES)}
    assert not (values[:, :, at["glasses"]] * values[:, :, at["sunglasses"]]).any()
    before = FACTORS.unpack(rows)
    kept = [name for name in FACTORS.names if name not in (*IMAGE_ATTRIBUTES, "frown")]
    assert all(torch.equal(FACTORS.unpack(states[-1])[name], before[name])
               for name in kept)
    assert not (order[before["masculine"] == 0] == at["beard"]).any()
    assert not (order[before["bald"] > 0] == at["long_hair"]).any()
    assert len(order.unique()) == len(EVALUATED_ATTRIBUTES)
    smiling = before["smile"] > 0
    assert smiling.any() and not (order[smiling] == at["laugh"]).any()


SCHEMA = Schema([Classes("identity", 3), Binary("hat")])
FLOW = {"levels": 2, "depth": 1, "width": 8}


def small_editors():
    """An editor of each kind on untrained models of 16 pixels."""
    torch.manual_seed(0)
    glow, cglow = Glow((3, 16, 16), **FLOW), CGlow((3, 16, 16), SCHEMA, **FLOW)
    conditions = SCHEMA + (Code("u", 2),)
    large = CAGlow((3, 16, 16), conditions, **FLOW)
    paper = CAGlow((3, 16, 16), conditions, **FLOW, latent="top", networks="paper")
    nn.init.normal_(large.encoder.mean, std=0.5)
    nn.init.normal_(cglow.prior_weight, std=0.5)
    return {"CGlow": cglow_editor(cglow),
            "Glow+store": directions_editor(glow, torch.ones(1, 3 * 256), 0.5),
            "CAGlow": encoder_editor(large, SCHEMA, 0),
            "CAGlow, paper": encoder_editor(paper, SCHEMA, 0)}


@pytest.mark.parametrize("name", small_editors())
def test_edit_to_the_same_conditions_returns_the_image(name):
    edit = small_editors()[name]
    x = torch.randint(256, (6, 3, 16, 16)).float() / 255
    c = SCHEMA.pack(6, identity=[0, 1, 2, 0, 1, 2], hat=[0, 1, 0, 1, 0, 1])
    new = torch.cat([c[:, :-1], 1 - c[:, -1:]], 1)
    assert (edit(x, c, c) - x).abs().max() < 5e-3
    assert (edit(x, c, new) - x).abs().max() > 1e-2
    assert not edit(x, c, new).requires_grad


def test_orderings():
    made = lambda model, values: row(model, "frechet", 0.0) | {"values": values}
    rows = [made("A", [1.0, 1.2, 1.1]), made("B", [2.0, 2.1, 2.3])]
    a, b = ("A", ""), ("B", "")
    mean, low, high, verdict = check_ordering(rows, "frechet", {}, a, b)
    assert mean == pytest.approx(3.1 / 3) and low < mean < high
    assert verdict == "holds"  # lower is better
    assert check_ordering(rows, "frechet", {}, b, a)[3] == "does not hold"
    one = [made("A", [1.0]), made("B", [2.0])]
    assert check_ordering(one, "frechet", {}, a, b)[1:] == (None, None, "open")
    with pytest.raises(ValueError, match="no row of C"):
        check_ordering(rows, "frechet", {}, ("C", ""), b)


@pytest.mark.parametrize("claim", paper_claims(), ids=str)
def test_every_claim_names_an_experiment(claim):
    assert claim.experiment in EXPERIMENTS and claim.better != claim.worse
    equal = [row(model, claim.metric, 1.0, variant, claim.at)
             for model, variant in (claim.better, claim.worse)]
    assert check_ordering(equal, *claim[1:])[0] == 0


def stored_table3():
    return read_results(result_path("caglow/table3", "cpu", RESULTS))["rows"]


def test_table3_is_read_from_last_step_to_this_step():
    """As the paper's text says; three orderings at each of four counts."""
    claims = [c for c in paper_claims() if c.experiment == "caglow/table3"]
    assert {c.at["reading"] for c in claims} == {"step"} and len(claims) == 12
    assert {(c.better[0], c.worse[0]) for c in claims} == {
        ("CAGlow", "CGlow"), ("CAGlow", "Glow+store"), ("Glow+store", "CGlow")}
    rows = [r for r in stored_table3() if r["metric"] == "interference"]
    printed = {(r["model"], r["variant"], r["at"]["count"]): r["paper"] for r in rows
               if r["at"]["reading"] == "step" and r["paper"] is not None}
    assert printed == {(*key, k + 1): value for key, values in
                       portrait_edits.PAPER_INTERFERENCE.items()
                       for k, value in enumerate(values)}
    assert all(r["paper"] is None for r in rows if r["at"]["reading"] != "step")


def test_drawn_results_interfere_least_from_step_to_step():
    """Only a reading in which correct edits score best can rank editors."""
    rows = [r for r in stored_table3()
            if r["metric"] == "interference" and r["at"]["reading"] == "step"]
    for k in (1, 2, 3, 4):
        values = {(r["model"], r["variant"]): r["value"] for r in rows
                  if r["at"]["count"] == k}
        assert min(values, key=values.get) == ("drawn", "")


def test_rows_by_point_gives_a_line_for_each_value():
    rows = [row(model, metric, 1.0, "", {"t": t, "along": along}, n=t)
            for model in "AB" for t in (0, 1) for along in ("hat", "identity")
            for metric in ("mae", "accuracy")]
    found = rows_by_point("mae", "t", along="hat")(rows)
    assert [(r["model"], r["at"]["model"]) for r in found] == [
        ("0", "A"), ("1", "A"), ("0", "B"), ("1", "B")]
    assert ({r["metric"] for r in found} == {"mae"}
            and not any(r["protocol"] for r in found))


def test_face_evaluator_is_trained_on_mirrored_images_only():
    evaluator = FaceEvaluator((3, 16, 16), [Classes("identity", 5)])
    x, c = torch.rand(64, 3, 16, 16), torch.eye(5)[torch.arange(64) % 5]
    shown = []
    evaluator.trunk.register_forward_hook(lambda _, given, __: shown.append(given[0]))
    plain = lambda batch: Evaluator.loss(evaluator, batch)
    for loss in (evaluator.loss, plain):
        loss(Batch({"x": x, "c": c}, Noise((0,), slice(None), 64)))
    same, mirrored = ((shown[0] == y).flatten(1).all(1) for y in (x, x.flip(3)))
    assert bool((same ^ mirrored).all()) and 16 < same.sum() < 48
    assert not (shown[1] == x).flatten(1).all(1).any()


def test_ridge_regression_predicts_light_from_pixels():
    many = {"size": 16, "n": 900, "identities": 6}
    data, known = portraits(**many), portraits(**many, columns=FACTORS.names)
    factors = FACTORS.pack(900, **known.conditions.unpack(known.labels))
    light = FACTORS.unpack(factors[data.indices("test")])["light"]
    predict = factor_regressions(data, factors, ("light", "yaw"))
    assert correlation(predict["light"](data.split_images("test")), light) > 0.9
    assert correlation(torch.arange(5.0), -torch.arange(5.0)) == pytest.approx(-1)


@pytest.fixture
def six_people(monkeypatch):
    """Six people of 16 pixels at tier `tiny`, and flows of two levels."""
    cached = (tables.portraits_of, tables.faces_for_training,
              tables.portraits_with_factors)
    clear = lambda: [f.cache_clear() for f in cached]
    clear()
    monkeypatch.setitem(tables.PORTRAIT_OPTIONS, "tiny", SET)
    monkeypatch.setattr(portrait_latents, "FIGURE_PEOPLE", (3, 4, 2, 1))
    small = {r.name: replace(r, arguments={"tiny": {**r.arguments["tiny"], **FLOW}})
             if r.arguments else r for r in tables.RECIPES}
    lists = {"RECIPES": small, "EXPERIMENTS": EXPERIMENTS}
    for module in (lab_module, recipes):
        monkeypatch.setattr(module, "declared", lists.__getitem__)
    yield
    clear()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of run folders that the experiments share."""
    return tmp_path_factory.mktemp("runs")


def few_rounds(name, runs):
    """The lab and rows of an experiment after three rounds of each training."""
    lab = Lab(EXPERIMENTS[name], "tiny", 0, runs, progress=False, rounds=3)
    rows = lab.experiment.run(lab)
    found = {(r["model"], r["variant"], r["metric"], *r["at"].values()): r
             for r in rows}
    assert len(found) == len(rows)
    assert all(torch.tensor(r["value"]).isfinite() for r in rows)
    return lab, found


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs_and_draws(name, six_people, runs, tmp_path):
    lab, found = few_rounds(name, runs)
    without = ("caglow/cost", "caglow/fig1", "caglow/fig7")
    assert ("evaluator-faces" in lab.evaluators) == (name not in without)
    if lab.experiment.figures:
        path = tmp_path / "r.json"
        lab.experiment.figures(lab, [*found.values()], path)
        assert path.with_suffix(".png").stat().st_size > 5_000


CONDITIONAL = (("CGlow", ""), ("CAGlow", "corrected"), ("CAGlow", "literal"))


@pytest.mark.slow
def test_table1_has_all_numbers_of_all_models(six_people, runs):
    _, found = few_rounds("caglow/table1-faces", runs)
    metrics = ("identity_accuracy", "attribute_accuracy", "diversity_pixel", "frechet",
               "temperature")
    for model in (*CONDITIONAL, ("CAGlow", "guided")):
        assert all((*model, metric) in found for metric in metrics)
    assert found["CAGlow", "literal", "frechet"]["paper"] is None
    assert found["CAGlow", "corrected", "frechet"]["paper"] == 104.91
    assert ("Glow", "", "bpd") in found and ("CAGlow", "corrected", "bpd") not in found


@pytest.mark.slow
def test_edits_of_all_editors_are_measured(six_people, runs):
    _, table3 = few_rounds("caglow/table3", runs)
    for model in CONDITIONAL:
        assert (*model, "interference", 4, "start, L − 1") in table3
    assert table3["drawn", "", "mae", 4]["value"] == 0
    _, figure4 = few_rounds("caglow/fig4", runs)
    drawn = [r for key, r in figure4.items() if key[0] == "drawn" and key[2] == "mae"]
    assert drawn and all(r["value"] == 0 for r in drawn)
    _, cost = few_rounds("caglow/cost", runs)
    assert all(cost[(*model, "seconds")]["value"] > 0 for model in CONDITIONAL)
    assert cost["Glow+store", "", "bytes"]["value"] == 9 * 3 * 16 * 16 * 4
