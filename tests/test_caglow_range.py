"""CAGlow with a range loss: zero for images, which parameters move, what it does."""

import math

import pytest
import torch
from torch import nn

from condgen.conditions import Binary, Classes, Code
from condgen.contracts import Batch, Noise
from condgen.models.caglow import CAGlow
from condgen.models.caglow_range import (
    DECODED, RangeCAGlow, excess, inverse_range_loss)
from condgen.trainer import set_trainable

CONDITIONS = (Classes("who", 5), Binary("hat"), Code("u", 2))


def build(kind=RangeCAGlow, conditions=CONDITIONS, **options):
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


def range_batch(model, n=100, rows=slice(None), total=None):
    """A batch of the range stage; the model reaches far too far from now on."""
    total, model.reach = total or n, 80.0
    x = torch.randint(0, 256, (total, 1, 8, 8),
                      generator=torch.Generator().manual_seed(2)).byte()
    table = model.with_partners({"x": x})
    return Batch({name: value[rows] for name, value in table.items()},
                 Noise((3,), rows, total))


def range_player(model):
    [player] = [p for stage in model.stages() if stage.name == "range"
                for p in stage.players(stage)]
    return player


@pytest.mark.parametrize("latent", ["all", "top"])
def test_only_the_flow_gets_the_gradient_of_the_range(latent):
    model = build(latent=latent)
    player = range_player(model)
    set_trainable(model, player)
    player.loss(range_batch(model))["range"][1].backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters()
             if p.grad is not None and p.grad.any()}
    assert moved == {"glow"} and math.isfinite(player.clip)


def test_extrapolated_latents_are_those_of_three_images():
    model = build()
    batch, model.reach = range_batch(model, 50), 0.0
    chosen = batch.rand("decoded", 1)[:, 0] < DECODED
    with torch.no_grad():
        z = model.glow.encode(batch.x[chosen])
        raw = model.glow.unwhiten(z, z.new_zeros(len(z), 0))
    found, top = model.extrapolated(batch), model.glow.top
    assert torch.allclose(found[:, :top], raw[:, :top])
    model.reach = 1.0
    step = model.extrapolated(batch) - found
    assert step[:, :top].abs().sum(1).min() > 0 and not step[:, top:].any()


def test_other_stages_are_those_of_caglow():
    model, plain = build(), build(CAGlow)
    assert ([stage.name for stage in model.stages()] == ["flow", "range", "adversarial"])
    assert [model.stages()[k].name for k in (0, 2)] == [s.name for s in plain.stages()]
    assert [s.name for s in build(pretrained=True).stages()] == ["range", "adversarial"]


def test_range_loss_of_a_batch_is_the_mean_of_its_halves():
    """So that two processes do what one does."""
    model = build()
    with torch.no_grad():
        whole, *halves = (model.range_loss(range_batch(model, 200, rows, 400))["range"][1]
                          for rows in (slice(None), slice(200), slice(200, 400)))
    assert whole > 0
    assert torch.isclose(whole, sum(halves) / 2, rtol=1e-4)


def test_a_batch_of_which_nothing_is_decoded_costs_nothing():
    """Keys are tried until the noise chooses none of two items."""
    model = build()
    fields = range_batch(model, 2).fields
    for key in range(30):
        batch = Batch(fields, Noise((key,), slice(None), 2))
        if (batch.rand("decoded", 1) >= DECODED).all():
            break
    assert model.range_loss(batch)["range"][1] == 0


def test_the_range_stage_brings_images_into_range():
    """From far too long differences, at a high rate, with the player's clipping."""
    model = build()
    player, batch = range_player(model), range_batch(model)
    model.reach = 8.0
    set_trainable(model, player)
    for group in player.optimizer.param_groups:
        group["lr"] *= 30
    losses = []
    for _ in range(30):
        player.optimizer.zero_grad()
        weight, value = player.loss(batch)["range"]
        (weight * value).backward()
        nn.utils.clip_grad_norm_(player.params, player.clip)
        player.optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0], losses
