"""Measurements of the VAE-GAN family: broken faces, blur, detail, reconstructions,
balance and arithmetic, each on inputs whose answer is known.
"""

from types import SimpleNamespace

import pytest
import torch

from condgen.conditions import Binary, Schema
from condgen.contracts import Batch, Noise
from condgen.evaluation import generate
from condgen.experiments.portraits import portraits_of
from condgen.experiments.relatives import (
    ADDED, RECIPES, AttributeReader, Reference, activation_memory, active_share,
    arithmetic_rows, blur, break_faces, detail, last_quarter, line_steps, whole_or_broken)

from condgen.recipes import find, prepare


def lab_of(x, **size):
    data = SimpleNamespace(split_images=lambda split: x if split == "test" else x.flip(0))
    return SimpleNamespace(data=data, size={"n": len(x), **size}, seed=0)


class Pixels:
    """An evaluator whose features are the pixels."""

    training = False
    conditions = Schema([Binary(name) for name in ADDED])

    def features(self, x):
        return x.flatten(1)

    def head(self, features):
        """Hats are bright images; nothing else is ever seen."""
        bright = 20 * (features.mean(1) - 0.5)
        return torch.stack([bright if name == "hat" else torch.full_like(bright, -9.0)
                            for name in ADDED], 1)

    def eval(self):
        return self

    def train(self, mode=True):
        return self

    def modules(self):
        return []


class Linear:
    """A model whose code is the mean of an image, repeated over its pixels."""

    latent_size = 1

    def encode(self, x):
        return x.flatten(1).mean(1, keepdim=True)

    def decode(self, z):
        return z[:, :, None, None].expand(-1, 1, 4, 4).clamp(0, 1)


def test_broken_faces_are_made_of_two_faces():
    x = torch.stack([torch.full((3, 8, 8), v / 10) for v in range(8)])
    broken = break_faces(x, torch.Generator().manual_seed(0))
    assert broken.shape == x.shape
    assert broken.min() >= 0 and broken.max() <= 0.7 + 1e-6


def test_the_detector_learns_from_both_kinds_in_equal_numbers():
    data = whole_or_broken("tiny")
    face = data.labels[:, 0].bool()
    assert 0.45 < face.float().mean() < 0.55
    source = portraits_of("tiny").images.float() / 255
    kept = (data.images.float() / 255 - source).abs().mean((1, 2, 3))
    assert kept[face].mean() < 0.3 * kept[~face].mean()
    assert data.splits.keys() == portraits_of("tiny").splits.keys()


def test_blur_keeps_the_mean_and_removes_detail():
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(blur(x, torch.zeros(4)), x, atol=1e-6)
    some = blur(x, torch.tensor([0.0, 0.5, 1.0, 1.5]))
    found = [detail(part[None]) for part in some]
    assert found == sorted(found, reverse=True) and found[-1] < 0.2 * found[0]
    assert torch.allclose(some.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=0.03)


def test_each_image_has_its_own_blur():
    x = torch.rand(1, 1, 16, 16).expand(2, 1, 16, 16)
    a = blur(x, torch.tensor([0.2, 1.5]))
    b = blur(x.flip(0), torch.tensor([1.5, 0.2]))
    assert torch.allclose(a, b.flip(0), atol=1e-6)


def test_detail_of_a_plane_is_zero_and_grows_with_noise():
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    plane = (row + 2 * column)[None, None] / 30
    assert detail(plane) < 1e-5
    assert detail(plane + 0.1 * torch.randn(1, 1, 8, 8)) > 0.1


def test_active_share_counts_numbers_that_vary():
    codes = torch.randn(500, 4) * torch.tensor([1.0, 0.5, 0.05, 0.0])
    assert active_share(codes) == 0.5


def test_samples_like_the_test_images_have_the_best_numbers():
    x = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    real = Reference(lab_of(x), Pixels())
    same = real.of_samples(x)
    assert same["frechet"] == pytest.approx(0, abs=1e-6)
    assert same["pixel_spread"] == same["detail"] == 1
    flat = real.of_samples(x.mean(0, keepdim=True).expand_as(x))
    assert flat["pixel_spread"] < 0.01 and flat["frechet"] > 0.5


def test_reconstruction_distance_is_relative_to_other_images():
    x = torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    real = Reference(lab_of(x), Pixels())
    assert real.of_reconstructions(x)["reconstruction_distance"] == 0
    other = real.of_reconstructions(x.roll(1, 0))
    assert other["reconstruction_distance"] == pytest.approx(1, abs=1e-5)
    assert other["reconstruction_l1"] > 0.2


def test_last_quarter_leaves_the_start_out():
    log = [{"images": n, "controller.k": 0.0 if n <= 75 else 0.2,
            "controller.real": 1.0, "controller.fake": 5.0 if n <= 75 else 0.9}
           for n in range(1, 101)]
    log[-1]["controller.k"] = 0.0
    found = last_quarter(SimpleNamespace(log=log))
    assert found["balance_ratio"] == pytest.approx(0.9)
    assert found["clip_share"] == pytest.approx(1 / 25)
    assert last_quarter(SimpleNamespace(log=[{"images": 3}])) == {}


def test_even_lines_have_a_step_ratio_of_one():
    reader = AttributeReader(Pixels(), None)
    a, b = torch.full((5, 1), 0.2), torch.full((5, 1), 0.7)
    assert line_steps(Linear(), reader, a, b)["step_ratio"] == pytest.approx(1, abs=1e-4)
    jump = SimpleNamespace(decode=lambda z: Linear().decode((z > 0.5).float()))
    assert line_steps(jump, reader, a, b)["step_ratio"] == pytest.approx(10, abs=1e-3)


def test_adding_an_attribute_is_read_where_the_code_carries_it():
    g = torch.Generator().manual_seed(0)
    bright = torch.rand(400, generator=g) < 0.5
    images = torch.where(bright, 200, 50)[:, None, None, None].expand(400, 1, 4, 4)
    data = SimpleNamespace(images=images.to(torch.uint8), conditions=Pixels.conditions,
                           labels=torch.stack([bright * (name == "hat") for name in ADDED],
                                              1).float(),
                           indices=lambda split: torch.arange(400))
    lab = SimpleNamespace(size={"coded": 400, "lines": 50}, seed=0)
    rows = arithmetic_rows(lab, "M", "", Linear(), AttributeReader(Pixels(), data))
    found = {(r["metric"], r["at"]["weight"]): r["value"] for r in rows}
    assert {r["at"]["attribute"] for r in rows} == {"hat"}  # no image has another
    assert (found["evaluator_probability", 2.0] > found["evaluator_probability", 1.0]
            > 0.5)
    assert found["interference", 1.0] < 1e-6


@pytest.mark.parametrize("name", [r.name for r in RECIPES if r.name.endswith("-16px")])
def test_a_tiny_training_brings_samples_nearer_to_the_data(name):
    torch.manual_seed(0)
    training = prepare(find(name), "tiny", 0)
    real = Reference(SimpleNamespace(data=training.data, size={"n": 360}), Pixels())
    before = real.of_samples(generate(training.model, 360))["frechet"]
    after = real.of_samples(generate(training.run(None, progress=False).model, 360))
    assert after["frechet"] < 0.8 * before


@pytest.mark.parametrize("name", ["dcgan-portraits", "avae-portraits"])
def test_memory_of_a_step_grows_with_the_batch(name):
    """In proportion, but for what batch norm and losses keep of the whole batch."""
    model, found = prepare(find(name), "tiny", 0).model, []
    for n in (8, 16):
        batch = Batch({"x": torch.rand(n, *model.shape), "c": torch.zeros(n, 0)},
                      Noise(("memory",), slice(0, n), n))
        found.append(activation_memory(model, batch))
    assert found[0] > 0 and 1.8 < found[1] / found[0] < 2.01


def test_memory_counts_saved_numbers_once():
    """A square saves its input; weights, and the same numbers twice, do not count."""
    weight = torch.nn.Parameter(torch.ones(1))
    player = SimpleNamespace(params=[weight], loss=lambda batch: {
        "twice": (1.0, ((batch.x * weight).square() + (batch.x * weight)).sum())})
    model = SimpleNamespace(
        parameters=lambda: [weight], buffers=list,
        stages=lambda: [SimpleNamespace(players=lambda stage: [player])])
    batch = Batch({"x": torch.rand(256, 8)}, Noise(("memory",), slice(0, 256), 256))
    assert activation_memory(model, batch) == 2 * 4 * 256 * 8 / 2**20
