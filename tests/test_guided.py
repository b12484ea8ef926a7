"""Guided sampling: what moves and what stays, refused guides and models, guides
whose loss is not finite.
"""

import math

import pytest
import torch

from condgen.conditions import Classes, Code
from condgen.data import digits
from condgen.models.caglow import CAGlow
from condgen.models.cglow import CGlow
from condgen.models.classifier import GuideClassifier
from condgen.models.glow import Glow
from condgen.models.guided import GuidedSampler

SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def models():
    """A small CAGlow with condition rows, and a guide for its
    digits; both untrained.
    """
    torch.manual_seed(0)
    data = digits()
    model = CAGlow(SHAPE, [*data.conditions, Code("u", 2)], levels=2, depth=1, width=4,
                   hidden=8).eval()
    model.store_condition_rows(data.table("train")["c"])
    with torch.no_grad():  # noise that changes the images
        model.encoder.root.copy_(torch.eye(256).expand_as(model.encoder.root))
    return model, GuideClassifier(data.shape, data.conditions, width=4).eval()


def seeded():
    return torch.Generator().manual_seed(4)


def test_accepted_samples_are_unchanged_by_guidance(models):
    model, guide = models
    wanted, own = (torch.arange(30) % 10,
                   model.sample(30, 0.9, seeded(), digit=torch.arange(30) % 10))
    c = model.condition(30, seeded(), digit=wanted)
    loss = GuidedSampler(model, guide).guide_loss(own, c).detach()
    never = GuidedSampler(model, guide, loss_threshold=1e6)
    assert torch.equal(never.sample(30, 0.9, seeded(), digit=wanted), own)
    half = loss.median().item()
    sampler = GuidedSampler(model, guide, loss_threshold=half, max_steps=2)
    changed = (sampler.sample(30, 0.9, seeded(), digit=wanted) != own).flatten(1).any(1)
    assert not changed[loss < half - 1e-4].any() and changed[loss > half + 1e-4].all()


def test_guided_sampling_lowers_the_loss_and_keeps_noise_norm(models):
    model, guide = models
    c, (eps, rest) = (model.condition(20, seeded(), digit=3),
                      torch.randn(2, 20, 256, generator=seeded()))
    images = model.glow.decode(model.generate_latents(c, eps, rest))
    before = GuidedSampler(model, guide).guide_loss(images, c).detach()
    sampler = GuidedSampler(model, guide, loss_threshold=before.min().item() - 0.05,
                            step_size=0.5, max_steps=8)
    x, moved = sampler.optimise_noise(c, eps, rest)
    assert (sampler.guide_loss(x, c) < before).all()
    assert torch.allclose(moved.norm(dim=1), eps.norm(dim=1), rtol=1e-5)
    assert ((moved - eps).norm(dim=1).max() <= 8 * 0.5 * 1.1
            and (moved != eps).any(1).all())
    # the image of the returned noise
    assert torch.allclose(sampler.generate(c, moved, rest), x, atol=1e-5)


def test_guided_sampling_is_seeded_and_leaves_no_gradients(models):
    model, guide = models
    sampler = GuidedSampler(model.train(), guide.train(), max_steps=3)
    a, b = (sampler.sample(6, 0.8, seeded()) for _ in range(2))
    assert torch.equal(a, b) and model.training and guide.training
    assert all(p.grad is None for p in sampler.parameters()) and not a.requires_grad
    model.eval(), guide.eval()


def test_a_noise_step_follows_the_sphere_downhill(models):
    sampler, eps = (GuidedSampler(*models, step_size=0.5),
                    torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]]))
    gradient = torch.tensor([[4.0, -3.0], [0.0, 0.0], [math.nan, math.inf]])
    moved = sampler.noise_step(eps, gradient)
    step = torch.tensor([3.0 - 0.4, 4.0 + 0.3])
    assert (torch.allclose(moved[0], 5 * step / step.norm())
            and torch.allclose(moved[1:], eps[1:]))


BAD_NUMBERS = [("loss_threshold", v)
               for v in (0, -1, math.nan, math.inf, "a", None, True)]
BAD_NUMBERS += ([("step_size", v) for v in (0, -1, "1", [1.0])]
                + [("max_steps", v) for v in (0, 1.5, "2")])


@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS)
def test_guided_sampler_refuses_invalid_arguments(models, name, value):
    with pytest.raises(ValueError, match=f"{name}=.*accepted"):
        GuidedSampler(*models, **{name: value})


@pytest.mark.parametrize(("shape", "condition"),
                         [(SHAPE, Classes("letter", 10)), (SHAPE, Classes("digit", 9)),
                          (SHAPE, Classes("digit", 26)),
                          ((1, 32, 32), Classes("digit", 10)), (SHAPE, Code("u", 2))])
def test_guides_of_other_conditions_are_refused_when_built(models, shape, condition):
    with pytest.raises(ValueError, match=r"accepted: some of \[Classes\(name='digit', "
                           r"n=10\)\] on images"):
        GuidedSampler(models[0], GuideClassifier(shape, [condition]))


def test_models_without_encoder_or_logits_are_refused(models):
    model, guide = models
    glow = Glow(SHAPE, levels=2, depth=1, width=4)
    cglow = CGlow(SHAPE, digits().conditions, levels=2, depth=1, width=4)
    for other in (glow, cglow, guide):
        with pytest.raises(ValueError, match=f"{type(other).__name__} cannot be "
                               "guided; accepted: .*CAGlow"):
            GuidedSampler(other, guide)
    with pytest.raises(ValueError, match="guide CGlow has no logits; accepted"):
        GuidedSampler(model, cglow)


class Broken(GuideClassifier):
    """A guide whose logits are not numbers for the third image."""

    def logits(self, x):
        return super().logits(x).index_fill(0, torch.tensor([2]), math.nan)


def test_images_whose_guide_loss_is_no_number_are_not_returned(models):
    model, _ = models
    guide = Broken(SHAPE, digits().conditions, width=4).eval()
    with pytest.raises(ValueError, match="guide Broken: 1 of 5 losses are not finite; "
                           "accepted: finite"):
        GuidedSampler(model, guide, loss_threshold=1e6).sample(5, 0.9, seeded(),
                                                               digit=3)
