"""CAGlow on cached latents: the same training, few labels, and what uses them."""

import pytest
import torch

from condgen.conditions import Binary, Classes, Schema
from condgen.contracts import Batch, Noise
from condgen.data import digits
from condgen.models.caglow import CAGlow
from condgen.models.glow import Glow
from condgen.models.latent_caglow import (
    TRAINING_MODES, CAGlowOnLatents, LatentTable, SemiSupervisedCAGlow)
from condgen.training import fit

TEN = Schema(Classes("digit", 10))


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    return Glow((1, 16, 16), levels=3, depth=1, width=8).eval()


def trained(kind, flow, data):
    """The parameters after a short training of stage 2."""
    torch.manual_seed(1)
    model = kind.from_glow(flow, TEN, hidden=8)
    return [*fit(model, data, images=192, progress=False).model.parameters()]


def test_training_on_cached_latents_equals_training_on_images(flow):
    data = digits()
    table = CAGlow.from_glow(flow, TEN, hidden=8).latents(data.table("train"))
    on_images = trained(CAGlow, flow, data)
    on_latents = trained(CAGlowOnLatents, flow, LatentTable(table["z"], table["c"]))
    assert all(torch.equal(a, b) for a, b in zip(on_images, on_latents, strict=True))
    other = trained(CAGlowOnLatents, flow, LatentTable(table["z"].flip(0), table["c"]))
    assert not torch.equal(on_images[-1], other[-1])


def test_table_has_conditions_only_where_given():
    z, c = torch.zeros(3, 4), torch.ones(3, 2)
    assert set(LatentTable(z).table("train")) == {"z"}
    for split in ("train", "val"):
        assert set(LatentTable(z, c).table(split)) == {"z", "c"}


def few(flow, mode, seed=0):
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(seed)
    labels = TEN.pack(40, digit=torch.arange(40) % 10)
    model = SemiSupervisedCAGlow.from_glow(flow, TEN)
    model.set_labels(torch.randn(40, 256, generator=g), labels, mode)
    z = torch.randn(64, 256, generator=g)
    return model.eval(), z, Batch({"z": z}, Noise((5,), slice(None), 64))


def test_only_the_discriminator_uses_unlabelled_latents(flow):
    model, z, batch = few(flow, "game")
    other = Batch({"z": z + 1}, Noise((5,), slice(None), 64))
    a, b = (model.supervision_loss(each) for each in (batch, other))
    assert set(a) == {"C_digit", "D"}
    assert a["C_digit"][1] == b["C_digit"][1] and a["D"][1] != b["D"][1]
    c, d = (model.encoder_terms(each) for each in (batch, other))
    assert set(c) == {"E", "C_digit", "FM"} and all(c[k][1] == d[k][1] for k in c)
    some = model.labelled_batch(batch)
    known = {tuple(row) for row in model.labelled[0][:, :4].tolist()}
    drawn = {tuple(row) for row in some.z[:, :4].tolist()}
    assert len(some.z) == 64 and drawn <= known


def test_each_training_mode_adds_its_loss_terms(flow):
    terms, players = [], []
    for mode in TRAINING_MODES:
        model, _, batch = few(flow, mode)
        terms.append(model.supervision_loss(batch))
        stage = model.stages()[0]
        players.append([player.name for player in stage.players(stage)])
    assert [set(t) for t in terms] == [
        {"C_digit"}, {"C_digit", "D"}, {"C_digit", "D", "C_digit_generated"}]
    assert len({t["C_digit"][1].item() for t in terms}) == 1
    assert players == [["supervision"], *[["supervision", "encoder"]] * 2]
    with pytest.raises(ValueError, match="mode='gam'.*did you mean 'game'"):
        few(flow, "gam")


def test_every_condition_keeps_its_generated_loss(flow):
    schema = Schema([Binary("a"), Binary("a_generated")])
    c = schema.pack(64, a=0, a_generated=1)
    model = SemiSupervisedCAGlow.from_glow(flow, schema, hidden=8)
    model.mode = "game and samples"
    model.labelled = torch.randn(64, flow.dims), c
    batch = Batch({"z": model.labelled[0]}, Noise((5,), slice(None), 64))
    assert {*model.supervision_loss(batch)} == {
        "D", "C_a", "C_a_generated", "C_a__generated", "C_a_generated__generated"}


def test_encoder_starts_from_labelled_latents(flow):
    model, z, batch = few(flow, "game")
    model.stages()[0].on_enter(batch)
    direct, _, _ = few(flow, "game")
    direct.encoder.initialize_from(*direct.labelled)
    pairs = zip(model.encoder.parameters(), direct.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    untouched, _, _ = few(flow, "game")
    assert not torch.equal(model.encoder.mean, untouched.encoder.mean)
