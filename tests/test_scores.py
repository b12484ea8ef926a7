"""The Inception score over splits, its bias and its order; CIFAR-10 from files; images
at two sizes; what the discriminator of an AVAE reconstructs.
"""

import io
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from condgen.conditions import Binary, Classes, Schema
from condgen.contracts import Model
from condgen.data import portraits
from condgen.experiments import scores
from condgen.experiments.scores import (
    PAPER_SCORES, QUOTED_SCORES, SIZED, ScoredReference, cifar10, discriminator_rows,
    halved_portraits, larger_portraits, official_logits, power_spectrum, score_bias,
    score_rows, sizes_rows, split_scores)
from condgen.metrics import frechet_distance
from condgen.ranking import inception_score


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def predictions(n=600, k=10, level=0.2):
    """Predictions of k classes: peaked for a small level, flat for a large one."""
    logits = torch.randn(n, k, generator=seeded(), dtype=torch.float64) / level
    return logits.softmax(1)


def by_class(n, k):
    """Certain predictions of k classes, equally many of each, sorted by class."""
    return torch.eye(k, dtype=torch.float64).repeat_interleave(n // k, 0)


def test_score_lies_between_1_and_the_number_of_classes():
    for level in (0.05, 0.5, 5.0):
        found = split_scores(predictions(level=level), 5, seeded())
        assert found.shape == (5,) and found.min() >= 1 and found.max() <= 10
    assert split_scores(by_class(100, 10), 1) == pytest.approx(10)
    assert split_scores(torch.full((60, 10), 0.1), 3).tolist() == pytest.approx([1] * 3)


def test_score_is_that_of_torchmetrics_with_the_same_order():
    from torchmetrics.image.inception import InceptionScore

    logits = predictions(700).log().float()
    metric = InceptionScore(feature=torch.nn.Identity(), splits=10)
    metric.update(logits)
    torch.manual_seed(3)
    mean, std = metric.compute()
    ours = split_scores(logits.softmax(1), 10, seeded(3))
    assert ours.mean().item() == pytest.approx(mean.item(), rel=1e-5)
    assert ours.std().item() == pytest.approx(std.item(), rel=1e-3)


def test_whole_score_is_that_of_parts_and_of_their_means():
    probs = predictions(600)
    means = torch.stack([part.mean(0) for part in probs.tensor_split(6)])
    within = split_scores(probs, 6).log().mean().item()
    between = math.log(inception_score(means))
    assert math.log(inception_score(probs)) == pytest.approx(within + between, abs=1e-9)


def test_parts_sorted_by_class_have_a_score_of_1():
    probs = by_class(1_000, 10)
    assert split_scores(probs, 10).tolist() == pytest.approx([1] * 10)
    assert split_scores(probs, 10, seeded()).mean() > 9


def test_order_is_that_of_the_generator():
    probs = predictions()
    again = [split_scores(probs, 4, seeded(1)) for _ in range(2)]
    assert torch.equal(*again)
    assert not torch.equal(again[0], split_scores(probs, 4, seeded(2)))
    assert not torch.equal(again[0], split_scores(probs, 4))


@pytest.mark.parametrize("n, splits", [(3, 4), (10, 0), (10, 2.5), (0, 1)])
def test_more_parts_than_images_are_refused(n, splits):
    with pytest.raises(ValueError, match="accepted"):
        split_scores(predictions(20)[:n], splits)


@pytest.mark.parametrize("level", [0.05, 1.0])
def test_few_images_lower_the_score_by_the_stated_bias(level):
    probs, n = predictions(40_000, 10, level), 50
    whole = math.log(inception_score(probs))
    found = whole - split_scores(probs, 800).log().mean().item()
    assert found == pytest.approx(score_bias(probs, n), rel=0.15)
    assert score_bias(probs, 2 * n) == pytest.approx(score_bias(probs, n) / 2)


def test_bias_of_certain_predictions_counts_classes():
    assert score_bias(by_class(1_000, 10), 90) == pytest.approx(9 / 180)
    two = torch.cat([by_class(1_000, 10), torch.zeros(1_000, 3)], 1)
    assert score_bias(two, 90) == pytest.approx(9 / 180)  # classes that never occur


def test_missing_official_weights_are_named_and_not_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not download"):
        official_logits(torch.rand(2, 3, 32, 32), tmp_path / "weights.pth")


def test_official_network_gets_bytes_and_the_users_file(monkeypatch, tmp_path):
    file, seen = tmp_path / "weights.pth", {}
    file.write_bytes(b"0")

    class Extractor:
        def __init__(self, name, features, feature_extractor_weights_path):
            seen.update(name=name, features=features, path=feature_extractor_weights_path)

        def __call__(self, x):
            assert x.dtype == torch.uint8
            return (x.flatten(1)[:, :4].float(),)

    module = SimpleNamespace(FeatureExtractorInceptionV3=Extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3",
                        module)
    x = torch.ones(40, 3, 8, 8)
    assert torch.equal(official_logits(x, file), torch.full((40, 4), 255.0).double())
    assert seen == {"name": "inception-v3-compat", "features": ["logits_unbiased"],
                    "path": str(file)}


def write_cifar(folder, n=40, other=20):
    """Two files in the format of the CIFAR-10 subset, of plain colours."""
    (folder / "cifar10").mkdir()
    for part, count in (("train", n), ("test", other)):
        raw, ends = b"", [0]
        for i in range(count):
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), (25 * (i % 10), 100, 50)).save(stream, "JPEG",
                                                                    quality=95)
            raw += stream.getvalue()
            ends.append(len(raw))
        np.savez(folder / "cifar10" / f"cifar10_{part}.npz",
                 jpeg=np.frombuffer(raw, np.uint8), offsets=np.array(ends),
                 labels=(np.arange(count) % 10).astype(np.uint8),
                 classes=np.array([f"c{k}" for k in range(10)]))


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path))
    write_cifar(tmp_path)
    cifar10.cache_clear()
    yield cifar10("tiny")
    cifar10.cache_clear()


def test_cifar_keeps_official_parts_and_labels(cifar):
    assert cifar.shape == (3, 32, 32) and cifar.conditions == Schema([Classes("object", 10)])
    assert [len(cifar.indices(s)) for s in ("train", "val", "test")] == [36, 4, 20]
    assert cifar.indices("test").min() == 40 and cifar.indices("train").max() < 40
    label = cifar.conditions.unpack(cifar.labels)["object"]
    red = cifar.images[:, 0].float().mean((1, 2)) / 25
    assert (red.round() == label).all()
    assert cifar.values["object"][3] == "c3"


def test_missing_cifar_is_named_in_the_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path))
    cifar10.cache_clear()
    with pytest.raises(FileNotFoundError, match="cifar10_train.npz"):
        cifar10("cpu")
    monkeypatch.delenv("CONDGEN_DATA")


class Columns(torch.nn.Module):
    """An evaluator that reads the brightest of four blocks, and a hat."""

    conditions = Schema([Binary("hat"), Classes("object", 4)])

    def features(self, x):
        return torch.nn.functional.avg_pool2d(x, 2).flatten(1)

    def head(self, features):
        return torch.cat([features[:, :1], 8 * features], 1)


class Painter(Model):
    """Samples have one bright block; `places`: how many places occur."""

    def __init__(self, places=4):
        super().__init__((1, 4, 4), ())
        self.places = places

    def sample(self, n, temperature=1.0, generator=None, **conditions):
        which = torch.randint(self.places, (n,), generator=generator)
        noise = 0.05 * torch.rand(n, 4, generator=generator)
        x = torch.nn.functional.one_hot(which, 4) * 0.9 + noise
        return torch.nn.functional.interpolate(x.view(n, 1, 2, 2), scale_factor=2)


class SmallLab:
    """A lab whose data are a painter's samples, sorted by class in the test part."""

    def __init__(self, models, n=400, first=True):
        self.models, self.size, self.seed, self.first = models, {"n": n}, 0, first
        x = Painter().sample(2 * n, generator=seeded())
        y = Columns().features(x).argmax(1)
        schema = Schema([Classes("object", 4)])
        c = schema.pack(len(y), object=y)
        table = {"train": slice(n), "test": slice(n, None)}
        self.data = SimpleNamespace(
            conditions=schema, split_images=lambda s: x[table[s]],
            table=lambda s: {"c": c[table[s]]})

    def train(self, recipe, **arguments):
        return SimpleNamespace(model=self.models[recipe], seconds=1.0)

    def evaluator(self, name):
        return Columns()


def test_scores_of_models_rank_them_by_the_classes_they_draw(monkeypatch):
    monkeypatch.setattr(scores, "evaluator_rows", lambda lab, name: [])
    lab = SmallLab({"all": Painter(4), "two": Painter(2)})
    models = {("ALI", ""): ("all", {}), ("DCGAN", ""): ("two", {})}
    rows = score_rows(lab, models, "evaluator", "object", 10)
    found = {(r["model"], r["metric"], tuple(r["at"].items())): r["value"] for r in rows}
    score = lambda name, *at: found[name, "inception_score", at]
    assert len(found) == len(rows)
    assert 3.6 < score("ALI") < 4 and 1.7 < score("DCGAN") < 2.01
    assert score("ALI") < score("ALI", ("splits", 1)) <= 4
    assert score("ALI", ("logits", 0.5)) < score("ALI") < score("ALI", ("logits", 2.0))
    assert score("real test images", ("order", "by class")) < 2
    assert score("real training images") > 3.6
    assert found["ALI", "frechet", ()] < found["DCGAN", "frechet", ()]
    paper = {r["model"]: r["paper"] for r in rows if r["paper"]}
    assert paper == {"ALI": 5.34, "DCGAN": 4.89, "real test images": 11.24}


def test_seeds_after_the_first_measure_models_only():
    lab = SmallLab({"all": Painter(4)}, first=False)
    rows = score_rows(lab, {("M", ""): ("all", {})}, "evaluator", "object", 1)
    assert {r["model"] for r in rows} == {"M"}


def test_predictions_are_of_the_condition_asked_for():
    real = ScoredReference(SmallLab({}), Columns(), "object", 1)
    x = Painter(1).sample(50, generator=seeded())
    assert real.of_samples(x)["frechet"] == pytest.approx(
        frechet_distance(Columns().features(x), real.features), rel=1e-6)
    assert (real.probabilities().argmax(1) == 0).all()
    flat = real.probabilities(0.0)
    assert flat.shape == (50, 4) and torch.allclose(flat, torch.full((50, 4), 0.25).double())


def test_printed_scores_are_those_of_the_paper():
    printed = {*PAPER_SCORES.values(), *QUOTED_SCORES.values()}
    assert printed == {4.89, 4.36, 5.34, 4.04, 5.51, 6.89, 5.62, 6.12, 6.80, 8.09, 11.24}


def test_halved_portraits_are_averages_of_the_larger_ones():
    large, half = larger_portraits("tiny"), halved_portraits("tiny")
    assert large.shape == (3, 64, 64) and half.shape == (3, 32, 32)
    blocks = large.images.float().view(-1, 3, 32, 2, 32, 2).mean((3, 5))
    assert (blocks - half.images.float()).abs().max() <= 0.5
    assert torch.equal(large.labels, half.labels) and large.splits is half.splits
    assert large.sha256 != half.sha256
    small = portraits(32, n=320, identities=24)
    assert torch.equal(small.labels, half.labels)  # the same people


def test_power_stands_at_the_frequency_of_a_wave():
    at = torch.arange(32) / 32
    for cycles in (1, 5, 16):
        wave = 0.5 + 0.4 * torch.cos(2 * math.pi * cycles * at)
        for x in (wave.expand(2, 3, 32, 32), wave[:, None].expand(2, 3, 32, 32)):
            power = power_spectrum(x)
            assert power.shape == (16,) and power.argmax() == cycles - 1
            assert power[cycles - 1] > 1e6 * (power.sum() - power[cycles - 1])


def test_halving_keeps_the_power_of_long_waves():
    x = torch.nn.functional.avg_pool2d(
        torch.rand(20, 3, 128, 128, generator=seeded()), 4)
    half = torch.nn.functional.avg_pool2d(x, 2)
    ratio = power_spectrum(half)[:3] / power_spectrum(x)[:3]
    assert ratio.sub(1).abs().max() < 0.1


class Smoother(Painter):
    """Encodes an image as itself; its discriminator returns the mean of an image."""

    def encode(self, x):
        return x.flatten(1)

    def decode(self, z):
        return z.view(-1, 1, 8, 8)

    def sample(self, n, temperature=1.0, generator=None, **conditions):
        return torch.full((n, 1, 8, 8), 0.4)

    def energy_reconstruct(self, x):
        return 0.5 * x + 0.5 * x.mean((1, 2, 3), keepdim=True)


def test_discriminator_rows_tell_real_images_from_plain_samples():
    x = torch.rand(60, 1, 8, 8, generator=seeded())
    lab = SimpleNamespace(data=SimpleNamespace(split_images=lambda s: x),
                          size={"n": 60}, seed=0)
    model = Smoother()
    model.sample = lambda n, **_: (0.4 + 0.1 * torch.rand(n, 1, 8, 8))
    rows = discriminator_rows(lab, model)
    found = {(r["at"]["images"], r["metric"]): r["value"] for r in rows}
    assert found["test images", "reconstruction_detail"] == pytest.approx(0.5, rel=1e-3)
    assert found["test images", "detail"] == 1
    assert found["reconstructions", "detail"] == pytest.approx(1)
    assert (found["samples", "reconstruction_l1"]
            < 0.2 * found["test images", "reconstruction_l1"])
    assert found["samples", "detail"] < 0.2


def test_tables_declare_what_they_train():
    for experiment in scores.EXPERIMENTS:
        assert set(experiment.recipes) <= set(experiment.trained)
    sized = next(e for e in scores.EXPERIMENTS if e.name == "avae/sizes")
    assert set(SIZED.values()) < set(sized.recipes) and sized.run is sizes_rows
