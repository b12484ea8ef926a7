"""One flow, many tasks: other labels, who reads them, probes and bounds, the game with few labels, experiments."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condgen.contracts import Batch, Binary, Classes, Noise, Real, Schema
from condgen.data import digits
from condgen.experiments import tasks as ts
from condgen.experiments.mnist import moments
from condgen.metrics import METRICS
from condgen.models.cglow import CGlow
from condgen.models.classifier import Judge
from condgen.models.glow import Glow

TEN = Schema(Classes("digit", 10))


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    return Glow((1, 16, 16), levels=3, depth=1, width=8).eval()


# tasks ---------------------------------------------------------------------------------------------------------------


def test_relabelled_asks_something_else_of_the_same_images(data):
    limit = ts.upright(data)
    digit = data.labels.argmax(1)
    assert ts.relabelled(data, "digit", limit) is data
    parity, slant = (ts.relabelled(data, task, limit) for task in ("parity", "slant"))
    assert parity.labels.argmax(1).equal(digit % 2) and parity.images is data.images
    assert slant.conditions == Schema(Binary("slant")) and abs(slant.table("train")["c"].mean().item() - 0.5) < 0.001
    leaning = moments(data.images_of("test"))["slant"] > limit
    assert slant.table("test")["c"][:, 0].bool().equal(leaning)
    assert len({d.sha256 for d in (data, parity, slant)}) == 3
    with pytest.raises(ValueError, match="task 'slnt'.*did you mean 'slant'"):
        ts.relabelled(data, "slnt", limit)


class TenLogits(nn.Module):
    """Answers what it is shown in the first ten pixels."""

    def features(self, x):
        return x.flatten(1)

    def logits(self, x):
        return 8 * x.flatten(1)[:, :10]


def test_task_judge_adds_up_probabilities_and_measures_slant(data):
    x = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    parity = ts.TaskJudge(TenLogits(), Schema(Classes("parity", 2)), 0.1)
    odd = (8 * x.flatten(1)[:, :10]).softmax(1)[:, 1::2].sum(1)
    assert torch.allclose(parity.logits(x).softmax(1)[:, 1], odd, atol=1e-6)
    slant = ts.TaskJudge(TenLogits(), Schema(Binary("slant")), 0.1)
    assert ((slant.logits(x)[:, 0] > 0) == (moments(x)["slant"] > 0.1)).all() and slant.logits(x).shape == (20, 1)
    assert ts.TaskJudge(TenLogits(), TEN, 0.1).logits(x).equal(TenLogits().logits(x))
    assert slant.features(x).equal(x.flatten(1))


@pytest.mark.parametrize(("costs", "k"), [((6, 1, 3), 4), ((6.5, 1, 3), 4), ((0, 1, 3), 1), ((90, 2, 2), None)])
def test_break_even(costs, k):
    flow, added, anew = costs
    assert ts.break_even(*costs) == k
    assert k is None or (flow + k * added < k * anew and not flow + (k - 1) * added < (k - 1) * anew)


def test_no_task_moves_the_flow_or_another_task(data, flow):
    z = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    models = []
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    for order in (("digit", "parity"), ("parity", "digit")):
        found = {}
        for task in order:
            known = ts.relabelled(data, task, 0.0)
            torch.manual_seed(1)
            model = ts.OnLatents.from_glow(flow, known.conditions)
            ts.fit(model, ts.Latents(z, known.table("train")["c"][:200]), images=160, progress=False)
            found[task] = model.state_dict()
        models.append(found)
    assert all(torch.equal(v, flow.state_dict()[k]) for k, v in before.items())
    for task in ("digit", "parity"):
        assert all(torch.equal(v, models[1][task][k]) for k, v in models[0][task].items())
        assert all(torch.equal(v, models[0][task][f"glow.{k}"]) for k, v in before.items())


# levels --------------------------------------------------------------------------------------------------------------


def test_probe_reads_what_is_linear_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3000, 6, generator=g)
    plane, disc = (z[:, :1] > 0).float(), (z.square().sum(1, keepdim=True) > 5.35).float()
    one_hot = nn.functional.one_hot(z[:, :3].argmax(1), 3).float()
    half, rest = slice(0, 2000), slice(2000, None)
    assert ts.probe(z[half], plane[half], z[rest], plane[rest]) > 0.97
    assert ts.probe(z[half], one_hot[half], z[rest], one_hot[rest]) > 0.93
    assert abs(ts.probe(z[half], disc[half], z[rest], disc[rest]) - 0.5) < 0.06


def test_levels_of_a_latent_begin_with_the_coarsest(flow):
    levels = ts.latent_levels(flow)
    assert list(levels) == ["top", "2", "top to 2", "1", "all"]
    z = torch.arange(256)[None]
    assert z[:, levels["top"]].tolist() == [list(range(flow.top))]
    assert torch.cat([z[:, levels[k]] for k in ("top", "2", "1")], 1).equal(z) and z[:, levels["all"]].equal(z)
    assert z[:, levels["top to 2"]].equal(torch.cat([z[:, levels["top"]], z[:, levels["2"]]], 1))
    assert list(ts.latent_levels(Glow((1, 8, 8), levels=1, depth=1, width=4))) == ["top", "all"]


def test_level_accuracies_find_what_was_planted_where_it_was_planted(flow):
    schema = Schema([Classes("digit", 3), Binary("bold"), Real("age", 0, 9)])
    g = torch.Generator().manual_seed(0)
    y, bold = torch.arange(1200) % 3, (torch.rand(1200, generator=g) < 0.5).float()
    z = torch.randn(1200, 256, generator=g)
    z[:, :3] += 4.0 * nn.functional.one_hot(y, 3)  # the top
    z[:, -1] += 6 * bold  # the finest level
    c = schema.pack(1200, digit=y, bold=bold, age=4.0)
    found = ts.level_accuracies(flow, schema, z[:900], c[:900], z[900:], c[900:])
    assert set(found) == {"digit", "bold"}
    assert min(found["digit"][k] for k in ("top", "top to 2", "all")) > 0.9 > 0.5 > found["digit"]["1"]
    assert found["bold"]["1"] > 0.95 and abs(found["bold"]["top"] - 0.5) < 0.1


@pytest.mark.parametrize("k", [2, 5, 10])
def test_fano_is_a_lower_bound_and_tight_for_equal_errors(k):
    log2 = lambda p: torch.where(p > 0, p, torch.ones_like(p)).log2()
    g = torch.Generator().manual_seed(k)
    for _ in range(20):
        joint = torch.rand(k, 6, generator=g, dtype=torch.float64) ** 4
        joint /= k * joint.sum(1, keepdim=True)
        information = (joint * (log2(joint) - log2(joint.sum(0)) + math.log2(k))).sum().item()
        assert 0 <= ts.fano_bits(joint.max(0).values.sum().item(), k) <= information + 1e-12
    joint = (torch.full((k, k), 0.2 / (k - 1)).fill_diagonal_(0.8) / k).double()
    information = (joint * (log2(joint) - log2(joint.sum(0)) + math.log2(k))).sum().item()
    assert ts.fano_bits(0.8, k) == pytest.approx(information, abs=1e-6)
    assert ts.fano_bits(1.0, k) == math.log2(k) and ts.fano_bits(0.5 / k, k) == 0


# few labels ----------------------------------------------------------------------------------------------------------


def test_chosen_labels_are_nested_and_leave_no_class_out():
    y = torch.arange(300) % 7
    parts = [ts.chosen(y, n, 3).tolist() for n in (1, 20, 300)]
    assert [len(p) for p in parts] == [7, 20, 300] and set(parts[0]) < set(parts[1]) < set(parts[2])
    assert len(y[parts[0]].unique()) == 7 and ts.chosen(y, 20, 3).tolist() == parts[1] != ts.chosen(y, 20, 4).tolist()


def few(flow, play, seed=0):
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(seed)
    y = torch.arange(40) % 10
    model = ts.FewLabels.from_glow(flow, TEN).knows(torch.randn(40, 256, generator=g), TEN.pack(40, digit=y), play)
    z = torch.randn(64, 256, generator=g)
    return model.eval(), z, Batch({"z": z}, Noise((5,), slice(None), 64))


def test_only_d_sees_latents_without_labels(flow):
    model, z, batch = few(flow, "game")
    other = Batch({"z": z + 1}, Noise((5,), slice(None), 64))
    a, b = (model.supervision_loss(each) for each in (batch, other))
    assert set(a) == {"C_digit", "D"} and a["C_digit"][1] == b["C_digit"][1] and a["D"][1] != b["D"][1]
    c, d = (model.encoder_terms(each) for each in (batch, other))
    assert set(c) == {"E", "C_digit", "FM"} and all(c[k][1] == d[k][1] for k in c)
    some = model.some(batch)
    known = {tuple(row) for row in model.labelled[0][:, :4].tolist()}
    assert len(some.z) == 64 and all(tuple(row) in known for row in some.z[:, :4].tolist())


def test_each_play_adds_its_own_terms(flow):
    terms = {play: few(flow, play)[0].supervision_loss(few(flow, play)[2]) for play in ts.PLAYS}
    assert [set(t) for t in terms.values()] == [{"C_digit"}, {"C_digit", "D"}, {"C_digit", "D", "C_digit_written"}]
    assert len({t["C_digit"][1].item() for t in terms.values()}) == 1
    stages = {play: few(flow, play)[0].stages()[0] for play in ts.PLAYS}
    players = {play: [p.name for p in stage.players(stage)] for play, stage in stages.items()}
    assert players == {"labels only": ["supervision"], **dict.fromkeys(ts.PLAYS[1:], ["supervision", "encoder"])}
    with pytest.raises(ValueError, match="play='gam'.*did you mean 'game'"):
        few(flow, "gam")


def test_a_block_learns_from_few_labels_and_starts_from_them_alone(flow):
    g = torch.Generator().manual_seed(1)
    places = 1.2 * torch.randn(10, 256, generator=g)
    y, y_test = torch.arange(600) % 10, torch.arange(200) % 10
    z, z_test = places[y] + torch.randn(600, 256, generator=g), places[y_test] + torch.randn(200, 256, generator=g)
    for play in ("labels only", "game and samples"):
        model = ts.block(flow, TEN, z, (z[:60], TEN.pack(60, digit=y[:60])), play, 1600, 0)
        with torch.no_grad():
            right = model.supervision(z_test)[2].argmax(1) == y_test
        assert right.double().mean() > 0.8, play
    assert ts.logistic(z[:60], y[:60], z_test, y_test, 0.01) > 0.8


# the experiments -----------------------------------------------------------------------------------------------------


class Lab(SimpleNamespace):
    """Gives small networks without training them."""

    def train(self, name):
        torch.manual_seed(self.seed)
        small = {"levels": 2, "depth": 1, "width": 4}
        models = {"judge-digits": lambda: Judge((1, 16, 16), TEN, width=4),
                  "glow-digits": lambda: Glow((1, 16, 16), **small),
                  "cglow-digits": lambda: CGlow((1, 16, 16), TEN, **small)}  # fmt: skip
        return SimpleNamespace(model=models[name]().eval(), seconds=2.0)


@pytest.fixture
def lab(monkeypatch):
    short = {"flow": 128, "adversarial": 160, "game": 160, "judge": 128, "copies": 0}
    monkeypatch.setitem(ts.LENGTHS, "tiny", short)
    return Lab(tier="tiny", seed=0, progress=False, first=True)


def test_three_tasks_rows(lab):
    rows = ts.three_tasks(lab)
    assert all(r["metric"] in METRICS for r in rows)
    value = {(r["model"], r["metric"], r["at"]["task"]): r["value"] for r in rows}
    assert len(value) == len(rows)
    for task in ts.TASKS:
        for name in ("CAGlow", "CGlow"):
            metrics = ("accuracy", "diversity_pixel", "frechet", "seconds", "parameters")
            assert all((name, metric, task) in value for metric in metrics)
    for metric in ("seconds", "parameters"):
        added, anew = (sum(value[name, metric, task] for task in ts.TASKS) for name in ("CAGlow", "CGlow"))
        assert value["CAGlow", metric, "all"] == pytest.approx(value["Glow", metric, "none"] + added)
        assert value["CGlow", metric, "all"] == pytest.approx(anew)
    flow = Glow((1, 16, 16), levels=2, depth=1, width=4)
    assert value["Glow", "parameters", "none"] == sum(p.numel() for p in flow.parameters())
    assert value["CGlow", "parameters", "digit"] > value["Glow", "parameters", "none"]


def test_few_labels_rows(lab):
    rows = ts.few_labels(lab)
    value = {(r["model"], r["variant"], r["at"]["labels"]): r["value"] for r in rows}
    assert len(value) == len(rows) == 14 and all(r["metric"] == "accuracy" for r in rows)
    assert {v for _, v, _ in value} == {*ts.PLAYS, "latents", "top level", "pixels"}
    pixels = [value["logistic regression", "pixels", share] for share in (0.05, 1.0)]
    assert 0.6 < pixels[0] < pixels[1] > 0.9


def test_level_probe_rows(lab):
    rows = ts.level_probes(lab)
    assert {(r["model"], r["at"]["level"]) for r in rows} == {
        *((m, level) for m in ("Glow", "CGlow") for level in ("top", "1", "all")), ("pixels", "all")}  # fmt: skip
    value = {(r["model"], r["at"]["level"]): r["value"] for r in rows}
    assert value["pixels", "all"] > 0.85 and value["Glow", "all"] > 0.5
    lab.first = False
    assert len(ts.level_probes(lab)) == len(rows) - 1
