"""CAGlow with a range loss: zero for images, any conditions, who moves, what it does."""

import math

import pytest
import torch
from torch import nn

from condgen.conditions import Binary, Classes, Code, Real, Schema
from condgen.contracts import Batch, Noise
from condgen.models.caglow import CAGlow
from condgen.models.caglow_range import (
    DECODED, RangeCAGlow, excess, inverse_range_loss, redraw_conditions)
from condgen.trainer import set_trainable

MANY = Schema([Classes("who", 5), Binary("hat"), Real("age", 0, 80)])
CODES = Code("u", 2)


def batch_of(n=400, rows=slice(None), total=None, schema=MANY, dims=64):
    """Latents and conditions of `total` items, of which `rows` are ours."""
    total = total or n
    g = torch.Generator().manual_seed(0)
    z, c = torch.randn(total, dims, generator=g), schema.draw(
        total, lambda name, k: torch.rand(total, k, generator=g))
    return Batch({"z": z[rows], "c": c[rows]}, Noise((3,), rows, total))


def batch_with_images(n=400, rows=slice(None), total=None):
    """As `batch_of`, with images."""
    batch, count = batch_of(n, rows, total), total or n
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return Batch({**batch.fields, "x": x[rows]}, Noise((3,), rows, count))


def build(kind=RangeCAGlow, conditions=(*MANY, CODES), **options):
    torch.manual_seed(0)
    model = kind((1, 8, 8), conditions, levels=2, depth=1, width=8, hidden=8, **options)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from zero, where couplings are the identity
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return model.eval()


def test_range_loss_of_images_is_zero():
    model = build()
    x = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = model.encode(x)
        y = model.glow.unwhiten(z, z.new_zeros(20, 0))
        assert inverse_range_loss(model.glow.flow, y).max() < 1e-5
        far = inverse_range_loss(model.glow.flow, 50 * y)
    assert far.shape == (20,) and (far > 0).all()


def test_excess_is_the_log_above_the_bound():
    v = torch.zeros(2, 1, 4, 4)
    v[0, 0, 0, :2] = torch.tensor([3.5, -3.5])
    assert excess(v, 0.5).tolist() == pytest.approx([2 * math.log(4) / 16, 0])


def test_redrawn_conditions_are_valid_and_half_are_new():
    batch = batch_of(4000)
    c = redraw_conditions(MANY, batch.c, batch)
    before, after = MANY.unpack(batch.c), MANY.unpack(c)
    assert torch.allclose(MANY.pack(4000, **after), c, atol=1e-5)
    kept = {name: (before[name] == after[name]).double().mean() for name in MANY.names}
    # by chance a new class is the old one in 1 of 5 cases, a bit in 1 of 2
    for name, expected in {"who": 0.6, "hat": 0.75, "age": 0.5}.items():
        assert abs(kept[name] - expected) < 5 * 0.5 / 4000**0.5, name
    none = Batch({"c": torch.zeros(5, 0)}, Noise((0,), slice(None), 5))
    assert redraw_conditions(Schema(), none.c, none).shape == (5, 0)


def far_model(**options):
    """Whose encoder generates latents of images out of range."""
    model = build(**options)
    model.encoder.mean.data.mul_(30)
    return model


@pytest.mark.parametrize("latent", ["all", "top"])
def test_only_the_flow_gets_the_gradient_of_the_range(latent):
    model = far_model(latent=latent)
    [player] = model.players(model.stages()[-1])
    set_trainable(model, player)
    player.loss(batch_with_images())["range"][1].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters()
             if p.grad is not None and p.grad.any()}
    assert moved == {"glow"} and math.isfinite(player.clip)


def test_earlier_stages_are_those_of_caglow():
    batch = batch_of()
    model, plain = build(), build(CAGlow)
    assert [s.name for s in model.stages()] == [*(s.name for s in plain.stages()), "range"]
    for found, expected in zip(model.stages()[1].players(model.stages()[1]),
                               plain.stages()[1].players(plain.stages()[1])):
        one, other = found.loss(batch), expected.loss(batch)
        assert one.keys() == other.keys()
        assert all(one[name][1] == other[name][1] for name in other)


def test_range_loss_of_a_batch_is_the_mean_of_its_halves():
    """So that two processes do what one does."""
    model = far_model()
    with torch.no_grad():
        whole, *halves = (model.range_loss(batch_with_images(200, rows, 400))["range"][1]
                          for rows in (slice(None), slice(200), slice(200, 400)))
    assert whole > 0
    assert torch.isclose(whole, sum(halves) / 2, rtol=1e-4)


def test_a_batch_of_which_nothing_is_decoded_costs_nothing():
    """Keys are tried until the noise chooses none of two items."""
    model = far_model()
    for key in range(30):
        batch = Batch({"x": torch.zeros(2, 1, 8, 8), "c": torch.zeros(2, MANY.width)},
                      Noise((key,), slice(None), 2))
        if (batch.rand("decoded", 1) >= DECODED).all():
            break
    assert model.range_loss(batch)["range"][1] == 0


def test_the_range_stage_brings_images_into_range():
    """From latents thirty times too far, at a high rate, with the player's clipping."""
    model = far_model()
    [player], batch = model.players(model.stages()[-1]), batch_with_images()
    set_trainable(model, player)
    for group in player.optimizer.param_groups:
        group["lr"] *= 30
    losses = []
    for _ in range(40):
        player.optimizer.zero_grad()
        weight, value = player.loss(batch)["range"]
        (weight * value).backward()
        nn.utils.clip_grad_norm_(player.params, player.clip)
        player.optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.7 * losses[0], losses
