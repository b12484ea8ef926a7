"""Latents of images and of samples: whitening by the marginal prior, dequantisation,
linear probes by level.
"""

import math

import pytest
import torch
from torch import nn

from condgen.conditions import Binary, Classes, Real, Schema
from condgen.models.caglow import CAGlow
from condgen.models.cglow import CGlow
from condgen.models.classifier import Evaluator
from condgen.models.gan import GAN
from condgen.models.glow import Glow
from condgen.models.latents import (
    flow_of, infer_latents, latent_levels, level_accuracies, linear_probe,
    sample_conditional_latents, standardize_by_marginal)

Y = torch.arange(5).repeat_interleave(20)


def flow(kind=CGlow):
    """A flow with class-dependent (or one) prior whose means and spreads are far
    from those of white noise.
    """
    torch.manual_seed(0)
    schema = [Classes("digit", 10)]
    model = (kind((1, 8, 8), schema, 2, 1, 4) if kind is CGlow
             else kind((1, 8, 8), levels=2, depth=1, width=4))
    for p in (model.prior_weight, model.prior_bias):
        p.data = 0.7 * torch.randn(p.shape,
                                   generator=torch.Generator().manual_seed(p.numel()))
    if model.conditions:
        model.store_condition_rows(torch.eye(10))
    return model.eval()


def untrained():
    """A CGlow that has seen no conditions."""
    return CGlow((1, 8, 8), [Classes("digit", 10)], 2, 1, 4)


@pytest.mark.parametrize("kind", [Glow, CGlow])
def test_sampled_latents_over_all_classes_are_white(kind):
    """Means and variances of 20,000 latents in each column within 5.5 standard
    errors (kurtosis at most 3).
    """
    n, model = 20_000, flow(kind)
    z = sample_conditional_latents(model, n, digit=torch.arange(n) % 10).double()
    assert z.shape == (n, 64) and z.mean(0).abs().max() < 5.5 / math.sqrt(n)
    assert ((z.var(0) - 1).abs().max()
            < 5.5 * math.sqrt(2 / n) * (3 if kind is CGlow else 1))
    if kind is CGlow:
        means = torch.stack([z[k::10, : model.top].mean(0) for k in range(10)])
        assert means.var(0).mean() > 0.2  # and yet each class has a place of its own


def test_sampled_latents_of_a_class_follow_its_prior():
    """Mean and log σ of one class, brought into class-blind units by those of all; a
    cold class is one point.
    """
    n, model = 20_000, flow()
    mean, log_std = model.prior(torch.eye(10))
    centre = mean.mean(0)
    scale = ((2 * log_std).exp().mean(0) + mean.var(0, unbiased=False)).sqrt()
    for k, t in ((3, 1.0), (7, 0.5)):
        z = sample_conditional_latents(model, n, temperature=t, digit=k)[:, : model.top]
        std = t * log_std[k].exp() / scale
        assert ((z.mean(0) - (mean[k] - centre) / scale).abs()
                < 5.5 * std / math.sqrt(n)).all()
        assert ((z.std(0) / std - 1).abs() < 5.5 / math.sqrt(2 * n)).all()
    cold = sample_conditional_latents(model, len(Y), temperature=0.0, digit=Y)
    for k in range(5):
        want = torch.zeros(20, 64)
        want[:, : model.top] = (mean[k] - centre) / scale
        assert torch.allclose(cold[Y == k], want, atol=1e-5)


@pytest.mark.parametrize("kind", [Glow, CGlow])
def test_inferred_latents_are_those_of_the_dequantised_image(kind):
    """Taking whitening and flow back gives a point of the image's own bin, another
    one for another seed.
    """
    model, x = flow(kind), torch.randint(
        0, 256, (6, 1, 8, 8), generator=torch.Generator().manual_seed(1)) / 255
    mean, log_std = model.prior(torch.eye(10) if kind is CGlow else torch.zeros(1, 0))
    centre = mean.mean(0)
    scale = ((2 * log_std).exp().mean(0) + mean.var(0, unbiased=False)).sqrt()
    places = []
    for seed in range(20):
        z = infer_latents(model, x, seed).detach()
        with torch.no_grad():
            raw = torch.cat([z[:, : model.top] * scale + centre, z[:, model.top :]], 1)
            places.append(256 * (model.flow.inverse(raw) + 0.5) - 255 * x)
    inside = torch.stack(places)
    assert -1e-2 < inside.min() < 0.05 and 0.95 < inside.max() < 1 + 1e-2
    assert abs(inside.mean() - 0.5) < 5.5 / math.sqrt(12 * inside.numel())
    assert torch.equal(infer_latents(model, x, 3), infer_latents(model, x, 3))


SMALL = (1, 8, 8)
IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
REFUSED = [
    (lambda: infer_latents(GAN(SMALL, 4, 2), IMAGES),
     "GAN has no flow; accepted: a Glow, a CGlow or"),
    (lambda: infer_latents(Evaluator(SMALL, [Classes("a", 9)], 4), IMAGES),
     "Evaluator has no flow"),
    (lambda: sample_conditional_latents(GAN(SMALL, 4, 2), 2),
     "GAN has no flow; accepted"),
    (lambda: sample_conditional_latents(flow(), 1, digit=11),
     "accepted: integers 0 to 9"),
    (lambda: infer_latents(flow(), torch.rand(2, 1, 16, 16)),
     r"images of shape \(2, 1, 16, 16\); accepted"),
    (lambda: infer_latents(flow(), 9 * IMAGES), r"accepted: finite floats in \[0, 1\]"),
    (lambda: infer_latents(flow(), IMAGES[:0]),
     "an empty batch; accepted: 1 or more"),
    (lambda: sample_conditional_latents(flow(), 0, digit=1),
     "n=0; accepted: an integer, 1 or more"),
    (lambda: sample_conditional_latents(flow(), 2, temperature=-1.0, digit=1),
     "temperature=-1.0; accepted"),
    (lambda: infer_latents(untrained(), IMAGES),
     "CGlow with no training conditions; accepted: a trained"),
]


@pytest.mark.parametrize(("call", "says"), REFUSED)
def test_models_and_images_without_latents_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_whitening_is_a_glows_own_and_keeps_finer_levels():
    model, v = flow(
        Glow), torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(2)) - 0.5
    with torch.no_grad():
        raw = model.flow(v)[0]
        assert torch.allclose(standardize_by_marginal(model, raw),
                              model.whiten(v, torch.zeros(9, 0))[0], atol=1e-5)
        conditional = flow()
        assert standardize_by_marginal(conditional,
                                  raw)[:, model.top :].equal(raw[:, model.top :])
        few = standardize_by_marginal(conditional, raw, torch.eye(10)[:2])
    mean, log_std = conditional.prior(torch.eye(10)[:2])
    spread = ((2 * log_std).exp().mean(0) + (mean[0] - mean[1]).square() / 4).sqrt()
    assert torch.allclose(few[:, : model.top],
                          (raw[:, : model.top] - mean.mean(0)) / spread, atol=1e-5)


def test_one_generator_serves_images_and_samples_in_turn():
    model, x = (flow(),
                torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    g = torch.Generator().manual_seed(5)
    a, b = infer_latents(model, x, g), sample_conditional_latents(model, 3, g, digit=4)
    assert (a.equal(infer_latents(model, x, 5))
            and not b.equal(sample_conditional_latents(model, 3, 5, digit=4)))
    assert not a.requires_grad and not b.requires_grad


def test_latents_of_caglow_are_those_of_its_glow():
    torch.manual_seed(0)
    model = CAGlow.from_glow(flow(Glow), [Classes("digit", 10)], hidden=8)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert (infer_latents(model, x, 2).equal(infer_latents(model.glow, x, 2))
            and flow_of(model) is model.glow)
    made = sample_conditional_latents(model, 4, 2, digit=[1, 2, 3, 4])
    assert made.equal(model.sample_latent(4, 1.0, torch.Generator().manual_seed(2),
                                          digit=[1, 2, 3, 4]))


# levels -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glow():
    torch.manual_seed(0)
    return Glow((1, 16, 16), levels=3, depth=1, width=8).eval()


def test_probe_predicts_only_linear_labels():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3000, 6, generator=g)
    plane, disc = ((z[:, :1] > 0).float(),
                   (z.square().sum(1, keepdim=True) > 5.35).float())
    one_hot = nn.functional.one_hot(z[:, :3].argmax(1), 3).float()
    half, rest = slice(0, 2000), slice(2000, None)
    assert linear_probe(z[half], plane[half], z[rest], plane[rest]) > 0.97
    assert linear_probe(z[half], one_hot[half], z[rest], one_hot[rest]) > 0.93
    assert abs(linear_probe(z[half], disc[half], z[rest], disc[rest]) - 0.5) < 0.06


def test_levels_of_a_latent_begin_with_the_coarsest(glow):
    levels = latent_levels(glow)
    assert list(levels) == ["top", "2", "top to 2", "1", "all"]
    z = torch.arange(256)[None]
    assert z[:, levels["top"]].tolist() == [list(range(glow.top))]
    assert (torch.cat([z[:, levels[k]] for k in ("top", "2", "1")], 1).equal(z)
            and z[:, levels["all"]].equal(z))
    assert z[:, levels["top to 2"]].equal(
        torch.cat([z[:, levels["top"]], z[:, levels["2"]]], 1))
    assert list(latent_levels(Glow((1, 8, 8), levels=1, depth=1, width=4))) == ["top",
                                                                                "all"]


def test_level_accuracies_find_known_signals_in_their_levels(glow):
    schema = Schema([Classes("digit", 3), Binary("bold"), Real("age", 0, 9)])
    g = torch.Generator().manual_seed(0)
    y, bold = torch.arange(1200) % 3, (torch.rand(1200, generator=g) < 0.5).float()
    z = torch.randn(1200, 256, generator=g)
    z[:, :3] += 4.0 * nn.functional.one_hot(y, 3)  # the top
    z[:, -1] += 6 * bold  # the finest level
    c = schema.pack(1200, digit=y, bold=bold, age=4.0)
    found = level_accuracies(glow, schema, z[:900], c[:900], z[900:], c[900:])
    assert set(found) == {"digit", "bold"}
    assert (min(found["digit"][k] for k in ("top", "top to 2", "all")) > 0.9 > 0.5
            > found["digit"]["1"])
    assert found["bold"]["1"] > 0.95 and abs(found["bold"]["top"] - 0.5) < 0.1
