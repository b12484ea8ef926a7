"""Metrics: independent of batches, order and device; equal to outside
implementations; refusing what is wrong.
"""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from condgen import evaluation as ev
from condgen import metrics as mt
from condgen import results as rs
from condgen.conditions import Binary, Classes, Real, Schema
from condgen.contracts import Model
from condgen.data import Dataset, digits
from condgen.splits import measured_classes

laws = settings(max_examples=30, deadline=None, derandomize=True)


def cloud(seed: int, n: int, f: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, f, generator=g).double() @ torch.randn(f, f, generator=g)
            .double() + torch.randn(f, generator=g))


# Fréchet distance ---------------------------------------------------------------------


@laws
@given(st.integers(0, 999), st.integers(2, 60), st.integers(1, 60))
def test_frechet_of_a_set_with_itself_is_zero(seed, n, f):
    x = cloud(seed, n, f)
    assert mt.frechet_distance(x, x) <= 1e-6
    assert mt.frechet_distance(x, x[torch.randperm(n)]) <= 1e-6


@laws
@given(st.integers(0, 999), st.integers(2, 30), st.integers(2, 30), st.integers(1, 20))
def test_frechet_against_a_matrix_root(seed, n, m, f):
    """Also with fewer images than features."""
    a, b = cloud(seed, n, f), cloud(seed + 1, m, f)
    sa, sb = (x.T.cov().reshape(f, f) for x in (a, b))
    values, vectors = torch.linalg.eigh(sa)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sb @ root).clamp(min=0).sqrt().sum().item()
    want = ((a.mean(0) - b.mean(0)).square().sum().item()
            + (sa.trace() + sb.trace()).item() - 2 * cross)
    assert mt.frechet_distance(a, b) == pytest.approx(
        want, abs=1e-6 * (sa.trace() + sb.trace()).item())


def test_frechet_against_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Same(nn.Module):
        num_features = 12

        def forward(self, x):
            return x.flatten(1)

    a, b = cloud(0, 100, 12), cloud(1, 80, 12)
    fid = FrechetInceptionDistance(Same(), normalize=True,
                                   input_img_size=(12, 1, 1)).set_dtype(torch.float64)
    fid.update(a[:, :, None, None], real=True)
    fid.update(b[:, :, None, None], real=False)
    assert mt.frechet_distance(a, b) == pytest.approx(fid.compute().item(), rel=1e-8)


def test_frechet_by_hand():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [3.0]])
    # means 1, 3; variances 2, 0
    assert mt.frechet_distance(a, b) == pytest.approx(4 + 2)
    assert mt.frechet_distance(a, a + 5) == pytest.approx(25)


@pytest.mark.parametrize("batch", [1, 7, 50, 1000])
def test_frechet_does_not_depend_on_batch_or_order(batch):
    x, y = (digits(8).split_images("test"),
            digits(8).split_images("val").repeat(2, 1, 1, 1))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU())
    want = mt.frechet(x, y, net)
    assert mt.frechet(x, y, net, batch) == pytest.approx(want, rel=1e-4)
    assert mt.frechet(x.flip(0), y[torch.randperm(360)], net, batch) == pytest.approx(
        want, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_frechet_does_not_depend_on_device():
    x, y = digits(8).split_images("test")[:180], digits(8).split_images("val")
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU())
    want = mt.frechet(x, y, net)
    assert mt.frechet(x, y, net.cuda(), device="cuda") == pytest.approx(want, rel=1e-4)


def test_frechet_blocks_and_counts():
    x, y = digits(8).split_images("test"), digits(8).split_images("val")
    flat = lambda x: x.flatten(1)
    assert mt.frechet(x, y, flat) == pytest.approx(
        (mt.frechet(x[:180], y, flat) + mt.frechet(x[180:], y, flat)) / 2)
    for bad in (x[:100], x[:0], x[:200]):
        with pytest.raises(ValueError, match="multiple of the 180"):
            mt.frechet(bad, y, flat)
    with pytest.raises(ValueError, match="0 reference images"):
        mt.frechet(x, y[:0], flat)
    for a, b in (
        (torch.zeros(1, 3), torch.zeros(4, 3)),
        (torch.zeros(4, 3), torch.zeros(4, 2)),
        (torch.zeros(4), torch.zeros(4)),
        (torch.full((4, 3), math.nan), torch.zeros(4, 3)),
    ):
        with pytest.raises(ValueError, match="accepted"):
            mt.frechet_distance(a, b)


# accuracy, diversity, bits ------------------------------------------------------------


def test_accuracy_by_hand():
    y = torch.tensor([1, 2, 3, 4])
    assert mt.accuracy(y, torch.tensor([1, 2, 3, 3])) == 0.75
    for wanted in (y[:1], y[:0], y[:3], y[None]):
        with pytest.raises(ValueError, match="accepted: as many"):
            mt.accuracy(y, wanted)
    with pytest.raises(ValueError, match="1 or more"):
        mt.accuracy(y[:0], y[:0])


def test_diversity_by_hand():
    real, labels = (torch.tensor([[0.0], [2.0], [0.0], [4.0]]),
                    torch.tensor([0, 0, 1, 1]))
    made = torch.tensor([[0.0], [1.0], [5.0], [9.0], [7.0]])
    asked, right = (torch.tensor([0, 0, 1, 1, 1]),
                    torch.tensor([True, True, True, False, True]))
    mean, each = mt.diversity(made, asked, right, real, labels)
    assert each == pytest.approx([0.5, 0.5]) and mean == pytest.approx(0.5)
    one = mt.diversity(made, asked, torch.tensor([True, True, True, False, False]),
                       real, labels)
    assert one[1] == pytest.approx([0.5, 0]) and one[0] == pytest.approx(0.25)
    assert mt.diversity(made[:0], asked[:0], right[:0], real, labels) == (0, [0, 0])
    with pytest.raises(ValueError, match="class 1 do not vary"):
        mt.diversity(made, asked, right, real[:3], labels[:3])


@laws
@given(st.integers(0, 99), st.floats(0.1, 3))
def test_diversity_laws(seed, factor):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(60, 5, generator=g), torch.arange(60) % 3
    yes, order = torch.ones(60, dtype=torch.bool), torch.randperm(60, generator=g)
    assert mt.diversity(x, y, yes, x, y)[0] == pytest.approx(1)
    assert mt.diversity(factor * x, y, yes, x, y)[0] == pytest.approx(factor, rel=1e-4)
    assert mt.diversity(x[order], y[order], yes, x, y)[0] == pytest.approx(1)


class Uniform:
    """Eight bits for every pixel, plus noise of the generator."""

    def __init__(self, noise: float = 0.0):
        self.noise = noise

    def log_prob(self, x, generator=None):
        return (torch.full((len(x),), -x[0].numel() * math.log(256))
                + self.noise * torch.randn(len(x), generator=generator))


def test_bits_per_dimension():
    x = torch.zeros(450, 3, 4, 4)
    assert ev.bpd(Uniform(), x) == pytest.approx(8)
    assert ev.bpd(Uniform(), x, dims=24) == pytest.approx(16)
    assert ev.bpd(Uniform(10), x) == ev.bpd(Uniform(10), x) != ev.bpd(
        Uniform(10), x, seed=1)
    few, many = (abs(ev.bpd(Uniform(10), x, samples=k) - 8) for k in (1, 100))
    assert many < few


# evaluation ---------------------------------------------------------------------------


class Copies(Model):
    """Returns training images of the class, with a spread of `temperature`."""

    def __init__(self, data, conditions):
        super().__init__(data.shape, conditions)
        self.x, self.y = (data.split_images("train"),
                          data.conditions.unpack(data.table("train")["c"])["digit"])
        self.means = torch.stack([self.x[self.y == k].mean(0) for k in range(10)])

    def sample(self, n, temperature=1.0, generator=None, **conditions):
        if self.conditions:
            want = self.conditions.unpack(
                self.condition(n, generator, **conditions))["digit"]
        else:
            want = torch.randint(10, (n,), generator=generator)
        pick = (torch.rand(n, len(self.y), generator=generator)
                * (self.y == want[:, None])).argmax(1)
        return (self.means[want]
                + temperature * (self.x[pick] - self.means[want])).clamp(0, 1)


class Nearest(nn.Module):
    def __init__(self, data):
        super().__init__()
        x, y = (data.split_images("val").flatten(1),
                data.conditions.unpack(data.table("val")["c"])["digit"])
        self.register_buffer("means",
                             torch.stack([x[y == k].mean(0) for k in range(10)]))

    def features(self, x):
        assert not self.training and not torch.is_grad_enabled()
        return x.flatten(1)

    def logits(self, x):
        return -torch.cdist(x.flatten(1), self.means)


@pytest.fixture(scope="module")
def toys():
    data = digits(8)
    return data, Copies(data, data.conditions), Nearest(data)


def test_evaluate(toys):
    data, model, evaluator = toys
    model.train(), evaluator.train()
    result = ev.evaluate(model, evaluator, data, n=720, seed=3)
    assert model.training and evaluator.training  # as they were
    assert result["accuracy"] > 0.8 and 0.8 < result["diversity_pixel"] < 1.1
    assert result["diversity_pixel"] == pytest.approx(result["diversity_feature"])
    assert (result["diversity_pixel_min"] == min(result["classes"]["diversity_pixel"])
            and "bpd" not in result)
    assert result["accuracy"] == pytest.approx(sum(result["classes"]["accuracy"]) / 10)
    assert result["frechet"] < 3 * result["frechet_floor"]
    assert result["protocol"] == {"n": 720, "reference": 360, "split": "test",
                                  "evaluator": ev.fingerprint(evaluator),
                                  "temperature": 1.0, "seed": 3}
    assert ev.evaluate(model, evaluator, data)["protocol"]["n"] == 2160
    assert ev.evaluate(model, evaluator, data, n=100)["protocol"]["reference"] == 100
    with pytest.raises(ValueError, match="multiple"):
        ev.evaluate(model, evaluator, data, n=500)


def test_evaluation_does_not_depend_on_batches(toys, monkeypatch):
    data, model, evaluator = toys
    want = ev.evaluate(model, evaluator, data, n=360)
    batched = mt.map_batches
    for module in (mt, ev):
        monkeypatch.setattr(
            module, "map_batches",
            lambda f, x, device="cpu", batch=256: batched(f, x, device, 13))
    got = ev.evaluate(model, evaluator, data, n=360)
    for name, value in want.items():
        if isinstance(value, float):
            assert got[name] == pytest.approx(value, rel=1e-4)


def test_collapsed_model_has_no_diversity_and_high_frechet(toys):
    data, model, evaluator = toys
    result = ev.evaluate(model, evaluator, data, n=360, temperature=0.0)
    assert (result["accuracy"] == 1 and result["diversity_pixel"] < 1e-6
            and result["frechet"] > 3 * result["frechet_floor"])


def test_unconditional_and_density(toys):
    data, _, evaluator = toys

    class Flow(Copies):
        def log_prob(self, x, generator=None, **conditions):
            self.given = set(conditions)
            return Uniform().log_prob(x, generator)

    model = Flow(data, [])
    result = ev.evaluate(model, evaluator, data, n=360)
    assert set(result) == {"frechet", "frechet_floor", "bpd", "classes", "protocol"}
    assert result["bpd"] == pytest.approx(8) and model.given == set()
    flow = Flow(data, data.conditions)
    assert (ev.evaluate(flow, evaluator, data, n=360)["bpd"] == pytest.approx(8)
            and flow.given == {"digit"})


def test_unbalanced_conditions_are_refused():
    splits = {"train": torch.tensor([0, 1]), "val": torch.tensor([2]),
              "test": torch.tensor([3])}
    data = Dataset("a", torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, 1),
                   [Real("age", 0, 1)], splits)
    with pytest.raises(ValueError, match="cannot be balanced"):
        measured_classes(data, "test", "age")
    with pytest.raises(ValueError, match="unknown condition"):
        measured_classes(data, "test", "aged")
    assert measured_classes(digits(8), "test", "digit")[1].tolist() == list(range(10))


def test_temperature(toys):
    data, model, evaluator = toys
    best, results = ev.choose_temperature(model, evaluator, data, (0.3, 0.7, 1.0),
                                          n=180)
    assert best == 1.0 and results[0.3]["protocol"]["split"] == "val"
    # none is diverse enough
    assert ev.choose_temperature(model, evaluator, data, (0.3, 0.7), n=180)[0] == 0.7
    free = Copies(data, [])
    best, results = ev.choose_temperature(free, evaluator, data, (0.3, 1.0), n=180)
    assert best == min(results, key=lambda t: results[t]["frechet"])


RESULT = {"accuracy": 0.9, "frechet": 1.0, "diversity_pixel": 0.9,
          "diversity_feature": 0.9,
          "diversity_pixel_min": 0.7, "diversity_feature_min": 0.7}


@pytest.mark.parametrize(("results", "best"), [
    # of the diverse ones the most accurate
    ({0.5: {"accuracy": 0.99}, 0.8: {"accuracy": 0.95}, 1.0: {}}, 0.5),
    ({0.5: {}, 0.8: {}}, 0.8),  # if equally accurate, the hotter one
    # the smaller diversity counts, whichever it is
    ({0.5: {"accuracy": 0.99, "diversity_pixel": 0.8}, 0.8: {}}, 0.8),
    ({0.5: {"accuracy": 0.99, "diversity_feature": 0.8}, 0.8: {}}, 0.8),
    # a class far behind counts, too
    ({0.5: {"accuracy": 0.99, "diversity_pixel_min": 0.6}, 0.8: {}}, 0.8),
    ({0.5: {"accuracy": 0.99, "diversity_feature_min": 0.6}, 0.8: {}}, 0.8),
    ({0.5: {"diversity_pixel": 0.5}, 0.8: {"diversity_pixel": 0.6},
      1.0: {"diversity_feature": 0.4}}, 0.8)])
def test_choose_temperature_picks_the_best(toys, monkeypatch, results, best):
    data, model, evaluator = toys
    monkeypatch.setattr(
        ev, "evaluate",
        lambda model, evaluator, data, condition, n, t, *rest: RESULT | results[t])
    assert ev.choose_temperature(model, evaluator, data, list(results))[0] == best


def test_frechet_floor_uses_as_many_images_as_samples(toys):
    data, model, evaluator = toys
    real, train = data.split_images("test"), data.split_images("train")
    for n, k in ((360, 1), (720, 2)):
        pick = torch.randperm(len(train),
                              generator=torch.Generator().manual_seed(0))[: k * 360]
        want = mt.frechet(train[pick], real, lambda x: x.flatten(1))
        assert ev.evaluate(model, evaluator, data,
                           n=n)["frechet_floor"] == pytest.approx(want)


def test_the_first_condition_of_the_model_is_balanced():
    a, b, c = Classes("a", 2), Binary("b"), Real("c", 0, 1)
    cases = (([c, a, b], [b, a], "a"), ([b, a], [a, b], "b"), ([c, b], [a, b, c], "b"),
             ([c], [c], None))
    for own, known, name in cases:
        assert ev.balanced_condition(Model((1, 2, 2), own), Shapes(*known)) == name


@pytest.mark.parametrize(("logit", "read"), [(0.2, 1), (-0.2, 0), (3.0, 1), (-3.0, 0)])
def test_binary_condition_is_predicted_as_its_likelier_value(logit, read):
    class Reader:
        conditions = Schema([Binary("b")])

        def logits(self, x):
            return torch.full((len(x), 1), logit)

    assert ev.predict_classes(Reader(), torch.zeros(2, 1, 4, 4),
                              "b").tolist() == [read, read]


@pytest.mark.parametrize(("options", "message"), [
    ({"condition": "digt"},
     "unknown condition 'digt'; accepted: digit; did you mean 'digit'"),
    ({"n": -1}, "n=-1; accepted: an integer, 1 or more"),
    ({"n": 360.0}, "n=360.0; accepted: an integer"),
    ({"evaluator": nn.Linear(1, 1)}, "Linear has no features; accepted: an evaluator")])
def test_evaluate_refuses_invalid_arguments(toys, options, message):
    data, model, evaluator = toys
    with pytest.raises(ValueError, match=message):
        ev.evaluate(**{"model": model, "evaluator": evaluator, "data": data, **options})


def test_empty_list_of_temperatures_is_refused(toys):
    data, model, evaluator = toys
    with pytest.raises(ValueError, match="no temperatures; accepted: one or more"):
        ev.choose_temperature(model, evaluator, data, [])


def test_fingerprint(toys):
    *_, evaluator = toys
    assert ev.fingerprint(evaluator).startswith("Nearest@sha256:")
    other = Nearest(digits(8))
    other.means[0, 0] += 1
    assert ev.fingerprint(other) != ev.fingerprint(evaluator)
    assert (ev.fingerprint(nn.Linear(2, 2).bfloat16())
            and ev.fingerprint(nn.BatchNorm2d(2)))


# rows, tables, files ------------------------------------------------------------------


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776),
                                      (10, 2.262), (30, 2.045)])
def test_interval_against_the_printed_table(n, t):
    values = [float(i) for i in range(n)]
    low, high = rs.confidence_interval(values)
    s = torch.tensor(values, dtype=torch.float64).std().item()
    assert (high - low) / 2 / (s / n**0.5) == pytest.approx(t, abs=6e-4)
    assert (high + low) / 2 == pytest.approx((n - 1) / 2)


def test_row():
    made = rs.row("Glow", "bpd", [3.0, 4.0], "literal", {"K": 16}, 3.35, n=10)
    assert list(made) == ["model", "variant", "metric", "at", "value", "values", "low",
                          "high", "paper", "protocol"]
    assert (made["value"] == 3.5 and made["protocol"] == {"n": 10}
            and made["low"] < 3.5 < made["high"])
    single = rs.row("Glow", "bpd", torch.tensor(2.0).item())
    assert (single["value"], single["low"], single["high"]) == (2.0, None, None)
    for bad in (float("nan"), [1, float("inf")], []):
        with pytest.raises(ValueError, match="bpd of Glow"):
            rs.row("Glow", "bpd", bad)
    with pytest.raises(ValueError, match="did you mean 'frechet'"):
        rs.row("Glow", "frechett", 1.0)


def test_names_are_those_of_the_design():
    names = (
        """bpd accuracy diversity_pixel diversity_feature frechet inception_score reconstruction_l1 dhash phash
    whash mae mse psnr ssim attribute_accuracy identity_accuracy amp_variance interference code_correlation
    knn_two_sample centroid_distance
    silhouette age_error nrds seconds bytes images_per_second peak_memory_mb""")
    assert set(names.split()) <= set(mt.METRICS)
    assert {m.better for m in mt.METRICS.values()} == {"higher", "lower", ""}
    assert mt.METRICS["psnr"] == mt.MetricInfo("psnr", "dB", "higher")


def test_merge_grows_seed_by_seed():
    one = [rs.row("A", "accuracy", v, n=1) for v in (0.5, 0.7)]
    other = [
        rs.row("A", "accuracy", 0.9, n=2),
        rs.row("A", "accuracy", 0.9, "x", n=1),
        rs.row("A", "accuracy", 0.9, at={"K": 1}, n=1),
    ]
    rows = rs.merge_rows(one[:1], one[1:], other)
    assert len(rows) == 4 and rows[0] == rs.row("A", "accuracy", [0.5, 0.7], n=1)
    assert rs.merge_rows(rows) == rows
    assert rs.merge_rows([rs.row("A", "bpd", 1.0)],
                         [rs.row("A", "bpd", 2.0, paper=3.0)])[0]["paper"] == 3.0


def test_protocols_never_share_a_column():
    rows = [
        rs.row("A", "accuracy", [0.5, 0.7], n=1, paper=0.99),
        rs.row("B", "accuracy", 0.8, n=1),
        rs.row("C", "accuracy", 0.9, n=2),
    ]
    (top, *lines), notes = rs.table_cells(rows)
    assert (top == ["", "accuracy ↑ (1)", "paper", "accuracy ↑ (2)"]
            and notes == ["(1) n = 1; two seeds", "(2) n = 2",
                          "±: half the 95 % interval of the mean over seeds"])
    assert lines == [["A", "0.6 ± 1.3", "0.99", ""], ["B", "0.8", "", ""],
                     ["C", "", "", "0.9"]]
    assert len(rs.text_table(rows).splitlines()) == 7
    with pytest.raises(ValueError, match="two rows"):
        rs.table_cells([*rows, rs.row("B", "accuracy", 0.1, n=1)])
    html = rs.html_table([rs.row("<b>", "accuracy", 0.1, n=1)])
    assert "<th>&lt;b&gt;</th>" in html and "<b>" not in html


@pytest.mark.parametrize("values, text", [
    ([0.94, 0.95, 0.948], "0.946 ± 0.013"), ([1, 1, 1], "1"),
    ([3.597e-5] * 3, "3.597e-05"), ([88.3, 268.1, 164.5], "170 ± 220"),
    ([0.5, 0.5, 1], "0.67 ± 0.72"), ([21_345, 25_000], "23,000 ± 23,000"),
    ([2e-5, 3e-5, 2.5e-5], "0.000025 ± 0.000012"), ([0.5], "0.5"), ([2e-6, 3e-6, 2.5e-6], "2.5e-06 ± 1.2e-06"),
    ([1 / 3, 1 / 3 + 1e-9], "0.3333 ± 6.4e-09"), ([-1, 1], "0 ± 13")])
def test_a_number_is_rounded_as_its_interval(values, text):
    item = rs.row("A", "frechet", values)
    assert rs.format_number(item["value"], item["low"], item["high"]) == text


def test_tables_say_in_words_what_numbers_are():
    facts = {"n": 2160, "reference": 360, "seed": "of training", "threads": 1}
    rows = [rs.row("A", "temperature", [0.5, 1, 0.5], **facts),
            rs.row("A", "knn_two_sample", [0.5, 0.6, 0.7], at={"set": "held-out"}),
            rs.row("A", "frechet", [1, 1, 1], n=5)]
    (top, line), notes = rs.table_cells(rows)
    assert top == ["", "frechet ↓ (1)", "k-NN two-sample accuracy, held-out ↓ (2)",
                   "temperature (3)"]
    assert line == ["A", "1", "0.60 ± 0.25", "0.5 to 1"]
    assert notes == [
        "(1) n = 5; three seeds", "(2) three seeds",
        "(3) n = 2,160 samples; 360 test images; three seeds of training; threads used: 1",
        "±: half the 95 % interval of the mean over seeds"]


def test_no_column_refers_to_a_note_that_is_not_there():
    rows = [rs.row("A", "accuracy", 0.5, n=1), rs.row("A", "frechet", 0.5),
            rs.row("A", "bpd", 0.5, n=2)]
    (top, _), notes = rs.table_cells(rows)
    assert top == ["", "accuracy ↑ (1)", "bpd [bits/dim] ↓ (2)", "frechet ↓"]
    assert notes == ["(1) n = 1", "(2) n = 2"]


def test_a_wide_table_has_models_in_columns():
    wide = [rs.row(model, "accuracy", 0.5, at={"k": k}) for model in "AB"
            for k in range(9)]
    lines = rs.text_table(wide).splitlines()
    assert lines[0].split() == ["A", "B"] and len(lines) == 10
    page = rs.html_table(wide)
    assert "<tr><th></th><th>A</th><th>B</th></tr>" in page
    assert page.count("<td>0.5</td>") == 18
    assert rs.text_table(wide[:3]).splitlines()[0].count("accuracy") == 3


def test_results_round_trip(tmp_path):
    path = tmp_path / "caglow" / "table1.cpu.json"
    with pytest.raises(FileNotFoundError, match="not run yet"):
        rs.read_results(path)
    rows = [rs.row("Glow", "bpd", [1.25, 1.5], n=10),
            rs.row("Glow", "accuracy", 1 / 3, n=10)]
    about = {"config": {"seeds": (0, 1), "sizes": {"n": 10}},
             "data": {"name": "digits", "sha256": "0"},
             "probe": None, "evaluators": {}, "hours": 0.25}
    made = rs.write_results(path, "caglow/table1", "cpu",
                            "condgen reproduce caglow/table1", rows, **about)
    assert (list(made) == list(rs.RESULT_FIELDS) and rs.read_results(path) == made
            and made["rows"] == rows)
    assert ({"python", "torch"} <= set(made["versions"])
            and "threads" in made["hardware"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert rs.stale(made, {"sizes": {"n": 10}}, "0") == []
    assert rs.stale(made, {"sizes": {"n": 12}}, "1") == ["sizes.n: 10 → 12",
                                                         "data: other images or labels"]
    before = path.read_text()
    for bad in ([rows[0] | {"value": float("nan")}], [rows[0] | {"metric": "bdp"}]):
        with pytest.raises(ValueError):
            rs.write_results(path, "caglow/table1", "cpu", "", bad, **about)
    assert path.read_text() == before and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"rows": [1]}'])
def test_other_files_are_not_results(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="a.json"):
        rs.read_results(tmp_path / "a.json")
    good = rs.write_results(tmp_path / "b.json", "a", "cpu", "", [], {}, {}, None, {},
                            0)
    (tmp_path / "b.json").write_text(
        json.dumps({k: v for k, v in good.items() if k != "evaluators"}))
    with pytest.raises(ValueError, match="lacks evaluators"):
        rs.read_results(tmp_path / "b.json")


def test_folders_and_deeply_nested_json_are_not_results(tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text("[" * 100_000)
    monkeypatch.chdir(tmp_path)
    for path in (".", "c.json", tmp_path):
        with pytest.raises(ValueError, match=f"{path} is not a result"):
            rs.read_results(path)


class Shapes:
    """Sixteen-pixel pictures, bright on the left or on the right, with a length and
    a property beside the class.
    """

    name, sha256 = "shapes", "0"

    def __init__(self, *conditions):
        self.conditions = Schema(conditions)

    def table(self, split):
        g = torch.Generator().manual_seed(len(split))
        side = torch.arange(60) % 2
        x = torch.zeros(60, 1, 4, 4)
        x[side == 0, :, :, :2], x[side == 1, :, :, 2:] = 0.9, 0.9
        x += 0.1 * torch.rand(60, 1, 4, 4, generator=g)
        values = {"length": torch.rand(60, generator=g), "side": side, "right": side}
        return {"x": x, "c": self.conditions.pack(
            60, **{n: values[n] for n in self.conditions.names})}

    def split_images(self, split):
        return self.table(split)["x"]

    def indices(self, split):
        return torch.arange(60) + {"train": 0, "val": 60, "test": 120}[split]

    @property
    def labels(self):
        return torch.cat([self.table(split)["c"] for split in ("train", "val", "test")])


@pytest.mark.parametrize("known",
                         [[Real("length", 0, 1), Classes("side", 2)], [Binary("right")],
                          [Binary("right"), Real("length", 0, 1)]])
def test_evaluator_columns_match_the_evaluated_condition(known):
    """A model that obeys scores 1, one that does the opposite 0, wherever the
    condition stands in the schema.
    """
    data = Shapes(*known)
    name = next(item.name for item in known if not isinstance(item, Real))

    class Obeys(Model):
        def __init__(self, shape, conditions, turn=False):
            super().__init__(shape, conditions)
            self.turn = turn

        def sample(self, n, temperature=1.0, generator=None, **conditions):
            side = self.conditions.unpack(
                self.condition(n, generator, **conditions))[name].long()
            x = 0.1 * torch.rand(n, 1, 4, 4, generator=generator)
            x[side == int(self.turn), :, :, :2] += 0.9
            x[side != int(self.turn), :, :, 2:] += 0.9
            return x

    class Reader:
        digest, conditions = "sides", data.conditions

        def features(self, x):
            return x.flatten(1)[:, :8]

        def logits(self, x):
            right = (x[..., 2:].mean((1, 2, 3)) - x[..., :2].mean((1, 2, 3)))[:, None]
            kinds = {Classes: torch.cat([-right, right], 1), Binary: right,
                     Real: 9 + 0 * right}
            return torch.cat([kinds[type(item)] for item in self.conditions], 1)

    for turn, share in ((False, 1.0), (True, 0.0)):
        assert ev.evaluate(Obeys((1, 4, 4), known, turn), Reader(), data,
                           n=60)["accuracy"] == share
    blind = Reader()
    blind.conditions = Schema([Real("length", 0, 1)])
    with pytest.raises(ValueError, match=f"unknown condition '{name}'"):
        ev.evaluate(Obeys((1, 4, 4), known), blind, data, n=60)
