"""Several tasks on one flow: labels, evaluators, costs, bounds, few
labels, experiments.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condgen.conditions import Binary, Classes, Schema
from condgen.data import digits
from condgen.experiments import tasks as ts
from condgen.experiments.digits import moments
from condgen.lab import Lab
from condgen.metrics import METRICS
from condgen.models.cglow import CGlow
from condgen.models.classifier import Evaluator
from condgen.models.glow import Glow
from condgen.models.latent_caglow import TRAINING_MODES, CAGlowOnLatents, LatentTable
from condgen.training import fit

TEN = Schema(Classes("digit", 10))


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    return Glow((1, 16, 16), levels=3, depth=1, width=8).eval()


def test_relabelled_changes_labels_and_keeps_images(data):
    limit = ts.median_slant(data)
    digit = data.labels.argmax(1)
    assert ts.relabel(data, "digit", limit) is data
    parity, slant = (ts.relabel(data, task, limit) for task in ("parity", "slant"))
    assert parity.labels.argmax(1).equal(digit % 2) and parity.images is data.images
    assert (slant.conditions == Schema(Binary("slant"))
            and abs(slant.table("train")["c"].mean().item() - 0.5) < 0.001)
    leaning = moments(data.split_images("test"))["slant"] > limit
    assert slant.table("test")["c"][:, 0].bool().equal(leaning)
    assert len({d.sha256 for d in (data, parity, slant)}) == 3
    with pytest.raises(ValueError, match="task 'slnt'.*did you mean 'slant'"):
        ts.relabel(data, "slnt", limit)


class TenLogits(nn.Module):
    """Logits are the first ten pixels."""

    def features(self, x):
        return x.flatten(1)

    def logits(self, x):
        return 8 * x.flatten(1)[:, :10]


def test_task_evaluator_sums_probabilities_and_measures_slant(data):
    x = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    parity = ts.TaskEvaluator(TenLogits(), Schema(Classes("parity", 2)), 0.1)
    odd = (8 * x.flatten(1)[:, :10]).softmax(1)[:, 1::2].sum(1)
    assert torch.allclose(parity.logits(x).softmax(1)[:, 1], odd, atol=1e-6)
    slant = ts.TaskEvaluator(TenLogits(), Schema(Binary("slant")), 0.1)
    assert (((slant.logits(x)[:, 0] > 0) == (moments(x)["slant"] > 0.1)).all()
            and slant.logits(x).shape == (20, 1))
    assert ts.TaskEvaluator(TenLogits(), TEN,
                            0.1).logits(x).equal(TenLogits().logits(x))
    assert slant.features(x).equal(x.flatten(1))


@pytest.mark.parametrize(("costs", "k"), [((6, 1, 3), 4), ((6.5, 1, 3), 4),
                                          ((0, 1, 3), 1), ((90, 2, 2), None)])
def test_break_even(costs, k):
    flow, added, anew = costs
    assert ts.break_even(*costs) == k
    assert k is None or (flow + k * added < k * anew
                         and not flow + (k - 1) * added < (k - 1) * anew)


def test_training_a_task_changes_no_flow_and_no_other_task(data, flow):
    z = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    models = []
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    for order in (("digit", "parity"), ("parity", "digit")):
        found = {}
        for task in order:
            known = ts.relabel(data, task, 0.0)
            torch.manual_seed(1)
            model = CAGlowOnLatents.from_glow(flow, known.conditions)
            fit(model, LatentTable(z, known.table("train")["c"][:200]), images=160,
                progress=False)
            found[task] = model.state_dict()
        models.append(found)
    assert all(torch.equal(v, flow.state_dict()[k]) for k, v in before.items())
    for task in ("digit", "parity"):
        assert all(torch.equal(v, models[1][task][k])
                   for k, v in models[0][task].items())
        assert all(torch.equal(v, models[0][task][f"glow.{k}"])
                   for k, v in before.items())


@pytest.mark.parametrize("k", [2, 5, 10])
def test_fano_is_a_lower_bound_and_tight_for_equal_errors(k):
    log2 = lambda p: torch.where(p > 0, p, torch.ones_like(p)).log2()
    g = torch.Generator().manual_seed(k)
    for _ in range(20):
        joint = torch.rand(k, 6, generator=g, dtype=torch.float64) ** 4
        joint /= k * joint.sum(1, keepdim=True)
        information = (
            joint * (log2(joint) - log2(joint.sum(0)) + math.log2(k))).sum().item()
        assert (0 <= ts.fano_bits(joint.max(0).values.sum().item(), k) <= information
                + 1e-12)
    joint = (torch.full((k, k), 0.2 / (k - 1)).fill_diagonal_(0.8) / k).double()
    information = (
        joint * (log2(joint) - log2(joint.sum(0)) + math.log2(k))).sum().item()
    assert ts.fano_bits(0.8, k) == pytest.approx(information, abs=1e-6)
    assert ts.fano_bits(1.0, k) == math.log2(k) and ts.fano_bits(0.5 / k, k) == 0


def test_chosen_labels_are_nested_and_cover_all_classes():
    y = torch.arange(300) % 7
    parts = [ts.labelled_subset(y, n, 3).tolist() for n in (1, 20, 300)]
    assert ([len(p) for p in parts] == [7, 20, 300]
            and set(parts[0]) < set(parts[1]) < set(parts[2]))
    again, other = (ts.labelled_subset(y, 20, seed).tolist() for seed in (3, 4))
    assert len(y[parts[0]].unique()) == 7 and again == parts[1] != other


def test_block_learns_from_few_labels_only(flow):
    g = torch.Generator().manual_seed(1)
    places = 1.2 * torch.randn(10, 256, generator=g)
    y, y_test = torch.arange(600) % 10, torch.arange(200) % 10
    z, z_test = (places[y] + torch.randn(600, 256, generator=g),
                 places[y_test] + torch.randn(200, 256, generator=g))
    known = z[:60], TEN.pack(60, digit=y[:60])
    for mode in ("labels only", "game and samples"):
        model = ts.supervision_block(flow, TEN, known, mode, 0)
        fit(model, LatentTable(z), images=1600, progress=False)
        assert ts.block_accuracy(model, z_test, y_test) > 0.8, mode
    assert ts.logistic_accuracy(z[:60], y[:60], z_test, y_test, 0.01) > 0.8


def test_supervision_block_is_seeded(flow):
    known = torch.zeros(10, 256), TEN.pack(10, digit=torch.arange(10))
    models = [ts.supervision_block(flow, TEN, known, "game", seed)
              for seed in (0, 0, 1)]
    first, again, other = ([*model.supervision.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


class SmallLab(Lab):
    """Gives small networks without training them; trains what no recipe describes."""

    def train(self, name):
        torch.manual_seed(self.seed)
        small = {"levels": 2, "depth": 1, "width": 4}
        models = {"evaluator-digits": lambda: Evaluator((1, 16, 16), TEN, width=4),
                  "glow-digits": lambda: Glow((1, 16, 16), **small),
                  "cglow-digits": lambda: CGlow((1, 16, 16), TEN, **small)}  # fmt: skip
        model = models[name]().eval()
        if name == "cglow-digits":
            model.store_condition_rows(TEN.pack(10, digit=torch.arange(10)))
        return SimpleNamespace(model=model, seconds=2.0)


@pytest.fixture
def lab_of(tmp_path):
    """Makes a lab of an experiment with shorter trainings."""
    def make(name, first=True, **size):
        experiment = next(e for e in ts.EXPERIMENTS if e.name == name)
        sizes = {"tiny": {**experiment.sizes["tiny"], **size}}
        assert set(sizes["tiny"]) == set(experiment.sizes["cpu"])
        return SmallLab(replace(experiment, sizes=sizes), "tiny", 0, tmp_path,
                        progress=False, first=first)

    return make


def test_three_tasks_rows(lab_of):
    lab = lab_of("caglow/tasks", flow=128, adversarial=160)
    rows = ts.three_tasks(lab)
    assert set(lab.evaluators) == {"evaluator-digits"}
    measured = [r for r in rows if r["at"]["task"] in ts.TASKS]
    assert {r["protocol"]["evaluator"] for r in measured} == {"evaluator-digits"}
    assert {r["protocol"]["temperature"] for r in measured} == {
        "chosen on 180 validation images"}
    assert all(r["metric"] in METRICS for r in rows)
    value = {(r["model"], r["metric"], r["at"]["task"]): r["value"] for r in rows}
    assert len(value) == len(rows)
    for task in ts.TASKS:
        for name in ("CAGlow", "CGlow"):
            metrics = ("accuracy", "diversity_pixel", "frechet", "seconds",
                       "parameters")
            assert all((name, metric, task) in value for metric in metrics)
    for metric in ("seconds", "parameters"):
        added, anew = (sum(value[name, metric, task] for task in ts.TASKS)
                       for name in ("CAGlow", "CGlow"))
        assert value["CAGlow", metric, "all"] == pytest.approx(
            value["Glow", metric, "none"] + added)
        assert value["CGlow", metric, "all"] == pytest.approx(anew)
    flow = Glow((1, 16, 16), levels=2, depth=1, width=4)
    assert value["Glow", "parameters", "none"] == sum(p.numel()
                                                      for p in flow.parameters())
    assert value["CGlow", "parameters", "digit"] > value["Glow", "parameters", "none"]


def test_few_labels_rows(lab_of):
    rows = ts.few_labels(lab_of("caglow/labels", network=128, latents=160))
    value = {(r["model"], r["variant"], r["at"]["labels"]): r["value"] for r in rows}
    assert (len(value) == len(rows) == 14
            and all(r["metric"] == "accuracy" for r in rows))
    assert {v for _, v, _ in value} == {*TRAINING_MODES, "latents", "top level",
                                        "pixels"}
    pixels = [value["logistic regression", "pixels", share] for share in (0.05, 1.0)]
    assert 0.6 < pixels[0] < pixels[1] > 0.9


def test_level_probe_rows(lab_of):
    rows = ts.level_probes(lab_of("caglow/probes"))
    assert {(r["model"], r["at"]["level"]) for r in rows} == {
        *((m, level) for m in ("Glow", "CGlow") for level in ("top", "1", "all")),
        ("pixels", "all")}
    value = {(r["model"], r["at"]["level"]): r["value"] for r in rows}
    assert value["pixels", "all"] > 0.85 and value["Glow", "all"] > 0.5
    later = lab_of("caglow/probes", first=False)
    assert len(ts.level_probes(later)) == len(rows) - 1
