"""Encoders with one part changed: what each variant changes, and what is measured."""

from types import SimpleNamespace

import pytest
import torch

from condgen.experiments.crg_parts import (
    PARTS, RECIPES, encoder_share, gradient_ratio, part_numbers)
from condgen.models.crg import CRG

SHAPE = (3, 16, 16)
SMALL = {"generator_arguments": {"width": 2, "noise": 6}, "width": 2,
         "trunk": "strided", "pretrained": True}


def small(**options):
    torch.manual_seed(0)
    return CRG(SHAPE, **{**SMALL, **options})


def test_each_variant_changes_one_thing():
    names = {recipe.name for recipe in RECIPES}
    for recipe, arguments in PARTS.values():
        assert recipe in names
        assert len(arguments) + (recipe != "crg-portraits-short") <= 1
        small(**arguments)
    changed = [(recipe, str(arguments)) for recipe, arguments in PARTS.values()]
    assert len(set(changed)) == len(changed)


@pytest.mark.parametrize("variant, steps", [
    ("", ["latent", "image"]), ("latent loss only", ["latent"]),
    ("image loss only", ["image"]),
    ("pixels of samples too", ["latent", "image", "image_generated"])])
def test_variants_play_the_steps_that_they_are_named_after(variant, steps):
    assert [p.name for p in small(**PARTS[variant][1]).players(None)] == steps


def test_latent_loss_alone_never_sees_a_real_image():
    model = small(**PARTS["latent loss only"][1]).eval()
    [player] = model.players(None)
    a, b = (SimpleNamespace(randn=lambda name, n: torch.ones(4, n), x=x)
            for x in (torch.rand(4, *SHAPE), torch.zeros(4, *SHAPE)))
    assert torch.equal(player.loss(a)["L"][1], player.loss(b)["L"][1])


def test_encoder_share_counts_the_generators_network_only():
    model = small()
    own = sum(p.numel() for p in model.encoder.parameters())
    other = sum(p.numel() for p in model.generator.generator.parameters())
    assert encoder_share(model) == own / other
    assert encoder_share(small(width=4)) > encoder_share(model)


class Held:
    """Stands in for drawings and their evaluator: features are pixels."""

    def __init__(self, x):
        self.x, self.real = x, SimpleNamespace(features=x.flatten(1))

    def features(self, x):
        return x.flatten(1)

    def numbers(self, x):
        return {"mae": (x - self.x).abs().mean().item(), "identity_accuracy": 1.0,
                "attribute_accuracy": 1.0}


class Inverter(CRG):
    """Knows the code of its own images; gives grey for all others."""

    def decode(self, z, **conditions):
        x = super().decode(z)
        self.known = (x, z)
        return x

    def reconstruct(self, x, **conditions):
        same = hasattr(self, "known") and x.shape == self.known[0].shape and torch.equal(
            x, self.known[0])
        return x if same else torch.full_like(x, 0.5)


def test_errors_of_drawings_and_of_samples_are_told_apart():
    torch.manual_seed(0)
    held = Held(torch.rand(12, *SHAPE))
    model = Inverter(SHAPE, **SMALL).eval()
    test, generated, samples = part_numbers(model, held, 0)
    assert generated["mae"] == 0 and test["mae"] > 0.2
    assert samples["frechet"] > 0 and samples["detail"] > 0
    plain = small().eval()
    assert part_numbers(plain, held, 0)[1]["mae"] > 0


def test_the_gradient_is_that_of_the_first_convolution():
    """One 1×1 convolution of one number, whose gradient is known."""
    first = torch.nn.Conv2d(1, 1, 1, bias=False)
    torch.nn.init.constant_(first.weight, 2.0)
    second = torch.nn.Conv2d(1, 1, 1, bias=False)
    torch.nn.init.constant_(second.weight, 3.0)
    network = torch.nn.Sequential(first, second, torch.nn.Flatten())
    x, z = torch.ones(1, 1, 1, 1), torch.zeros(1, 1)
    # the loss is (3wx)², its derivative 18w at x = 1
    assert gradient_ratio(network, x, z) == pytest.approx(18.0)
