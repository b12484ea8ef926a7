"""Laws of CAGlow's networks for faces: shapes of the paper, which columns are
embedded, who moves what, verbs.
"""

import math
from functools import cache

import pytest
import torch
from torch import nn

from condgen.conditions import Binary, Classes, Code, Real, Schema
from condgen.contracts import Batch, Noise
from condgen.models.caglow import CAGlow
from condgen.models.caglow_networks import SupervisionBlock
from condgen.models.caglow_faces import (CAGlowFaces, FaceEncoder, FaceSupervisionBlock,
                                         LatentMap, WholeCAGlowFaces, quarter_size)
from condgen.models.glow import Glow, glow_flow
from condgen.runs import load, save
from condgen.trainer import set_trainable
from condgen.training import fit

SIZES = {"levels": 2, "depth": 1, "width": 8}
WHO, HAT = Classes("identity", 3), Binary("hat")
MANY = Schema([HAT, WHO, Real("age", 0, 80), Classes("hair", 2), Code("u", 2),
               Code("b", 1, "binary")])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(conditions=(WHO, HAT), shape=(3, 16, 16), cls=CAGlowFaces, **options):
    torch.manual_seed(0)
    return cls(shape, conditions, **{**SIZES, "noise": 16, **options})


def conditions_of(schema, n, seed=0):
    return schema.draw(
        n, lambda name, k: torch.rand(n, k, generator=seeded(seed + len(name))))


class Squares:
    """A patch in one of three colours, high or low: who, and a hat or none."""

    name, sha256 = "squares", "0"
    conditions = Schema([WHO, HAT])

    def table(self, split):
        n, g = {"train": 240, "val": 48, "test": 96}[split], seeded(len(split))
        who, hat = torch.arange(n) % 3, torch.arange(n) // 3 % 2
        x = 30 * torch.rand(n, 3, 16, 16, generator=g)
        for i in range(n):
            top = 2 if hat[i] else 9
            x[i, int(who[i]), top : top + 5, 4:12] += 180
        return {"x": x.round().to(torch.uint8),
                "c": self.conditions.pack(n, identity=who, hat=hat)}


def read(x):
    """Colour and height of the patches of images."""
    return (x.mean((2, 3)).argmax(1),
            x[:, :, :8].mean((1, 2, 3)) > x[:, :, 8:].mean((1, 2, 3)))


@cache
def trained():
    """A small model of both stages, and its log."""
    model = build()
    log = fit(model, Squares(), images={"flow": 1_920, "adversarial": 2_400},
              progress=False).log
    return model, [row for row in log if row["stage"] == "adversarial"]


# The networks


def test_only_three_levels_have_a_top_of_48_channels():
    tops = {n: glow_flow((3, 64, 64), n, depth=1, width=1).shapes[-1]
            for n in range(1, 6)}
    assert ([n for n, top in tops.items() if top[0] == 48] == [3]
            and tops[3] == (48, 8, 8))
    assert all(top == (3 * 2 ** (n + 1), 64 >> n, 64 >> n) for n, top in tops.items())


def test_encoder_is_the_paper_s_at_64_pixels():
    schema, maps = Schema([Classes("identity", 200),
                           *[Binary(f"a{k}") for k in range(40)]]), []
    encoder = FaceEncoder(schema, (48, 8, 8))
    for layer in encoder.layers:
        if isinstance(layer, nn.ConvTranspose2d):
            note = lambda layer, x, y: maps.append((layer.stride[0], *x[0].shape[1:],
                                                    *y.shape[1:]))
            layer.register_forward_hook(note)
    assert encoder(conditions_of(schema, 2), torch.randn(2, 128)).shape == (2, 3072)
    assert maps == [(2, 512, 2, 2, 128, 4, 4), (2, 128, 4, 4, 512, 8, 8),
                    (1, 512, 8, 8, 48, 8, 8)]
    by_hand = (200 * 128 + (128 + 40 + 128 + 1) * 2048 + (512 * 16 + 1) * 128
               + (128 * 16 + 1) * 512 + (512 * 9 + 1) * 48)
    assert sum(q.numel() for q in encoder.parameters()) == by_hand


@pytest.mark.parametrize("shape", [(24, 4, 4), (4, 8, 4), (7, 12, 8)])
def test_networks_fit_every_top_whose_sides_are_divisible_by_4(shape):
    encoder, block = (FaceEncoder(MANY, shape, noise=5),
                      FaceSupervisionBlock(shape, MANY))
    z = encoder(conditions_of(MANY, 3), torch.randn(3, 5))
    answers = block(z)
    h, w = quarter_size(shape)
    assert z.shape == (3, math.prod(shape)) and (h, w) == (shape[1] // 4, shape[2] // 4)
    assert [tuple(part.shape) for part in answers] == [(3, 128 * h * w), (3,), (3, 7),
                                                       (3, 3)]
    assert (torch.equal(answers[0], block.trunk(z))
            and isinstance(block, SupervisionBlock))


def test_one_hot_columns_are_embedded_and_no_others():
    encoder, seen = FaceEncoder(MANY, (4, 4, 4), noise=2, embedding=3).double(), []
    encoder.layers[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    asked = MANY.pack(1, hat=1, identity=2, age=60, hair=1, u=[0.5, -1.0], b=1).double()
    encoder(asked, torch.tensor([[7.0, 8.0]]).double())
    person, hair = encoder.embed.weight[:, 2], encoder.embed.weight[:, 3 + 1]
    plain = torch.tensor([1.0, 0.5, 0.5, -1.0, 1.0, 7.0, 8.0]).double()
    assert torch.allclose(seen[0][0], torch.cat([person + hair, plain]))


@pytest.mark.parametrize("shape", [(48, 8, 8), (48, 4, 4), (12, 16, 8)])
def test_initial_encoder_output_has_variance_1(shape):
    torch.manual_seed(0)
    encoder = FaceEncoder(Schema(Classes("identity", 100)), shape)
    with torch.no_grad():
        z = encoder(torch.eye(100).repeat(3, 1), torch.randn(300, 128))
    assert 0.7 < z.square().mean() < 1.5  # PyTorch's own start gives less than 0.01


@pytest.mark.parametrize("schema", [Schema([HAT, Code("u", 1)]), Schema(Code("u", 2)),
                                    Schema(Real("age", 0, 1))])
def test_without_classes_nothing_is_embedded(schema):
    encoder = FaceEncoder(schema, (4, 4, 4), noise=3)
    assert encoder.embed is None and encoder.layers[0].in_features == schema.width + 3
    assert encoder(conditions_of(schema, 2), torch.randn(2, 3)).shape == (2, 64)


def test_probabilities_are_embedded_as_mean_of_identities():
    model = build([WHO])
    eps = torch.zeros(1, 16)
    a, b, half = (model.encoder.embed(model.conditions.pack(1, identity=v))
                  for v in (0, 2, [0.5, 0.0, 0.5]))
    assert torch.allclose(half, (a + b) / 2, atol=1e-6)
    assert not torch.allclose(model.encoder(model.conditions.pack(1, identity=0), eps),
                              model.encoder(model.conditions.pack(1, identity=2), eps))


@pytest.mark.parametrize("noise", [3, 11])
def test_encoder_output_rank_equals_noise_dimension(noise):
    torch.manual_seed(0)
    encoder = FaceEncoder(Schema(WHO), (6, 4, 4), noise=noise).double()
    c, eps = (torch.eye(3, dtype=torch.float64)[:1],
              torch.randn(noise, dtype=torch.float64))
    slope = torch.func.jacrev(lambda e: encoder(c, e[None])[0])(eps)
    assert slope.shape == (96, noise) and torch.linalg.matrix_rank(slope) == noise


# The model


@pytest.mark.parametrize(("shape", "levels"),
                         [((1, 28, 28), 2), ((3, 32, 16), 3), ((1, 8, 8), 2)])
def test_other_sides_are_refused(shape, levels):
    with pytest.raises(ValueError,
                       match=r"accepted: sides divisible by 4.*fewer levels"):
        build(shape=shape, levels=levels)


def test_model_generates_the_top_latent():
    model = build(MANY, shape=(1, 16, 32))
    assert (isinstance(model, CAGlow) and model.written == model.glow.top
            == math.prod(model.glow.flow.shapes[-1]))
    assert (model.glow.flow.shapes[-1] == (8, 4, 8)
            and not hasattr(model.encoder, "initialize_from"))
    x = model.sample(2, identity=[1, 2], hat=0, age=30, hair=1, u=[0.5, 0.5], b=0)
    assert x.shape == (2, 1, 16, 32) and 0 <= x.min() and x.max() <= 1
    with pytest.raises(ValueError, match="did you mean 'De'"):
        build(weights={"Dee": 1.0})


@pytest.mark.parametrize("schema", [MANY, Schema([WHO, HAT]), Schema(Code("u", 2))],
                         ids=["many", "known", "codes"])
def test_law_4_each_loss_term_updates_only_its_parameters(schema):
    model = build(schema)
    parts = {"flow": model.glow, "E": model.encoder, "trunk": model.supervision.trunk,
             "D": model.supervision.real,
             "C": model.supervision.c, "De": model.supervision.u}
    parts = {name: part for name, part in parts.items() if part is not None}
    table = {"z": torch.randn(12, 768, generator=seeded()),
             "c": conditions_of(schema.supervised, 12)}
    batch = Batch(table, Noise((0,), slice(None), 12))
    for player in model.players(model.stages()[-1]):
        set_trainable(model, player)
        for term, (_, value) in player.loss(batch).items():
            model.zero_grad(set_to_none=True)
            value.backward(retain_graph=True)
            moved = {name for name, part in parts.items()
                     if any(q.grad is not None for q in part.parameters())}
            head = term.split("_")[0]
            assert moved == ({"E"} if player.name == "encoder" else {"trunk", head})
            assert all(q.grad.any() for name in moved - {"C", "De"}
                       for q in parts[name].parameters())


def test_from_glow_trains_stage_2_only_and_keeps_the_flow():
    torch.manual_seed(0)
    flow = Glow((3, 16, 16), **SIZES)
    fit(flow, Squares(), images=320, progress=False)
    before = {name: t.clone() for name, t in flow.state_dict().items()}
    torch.manual_seed(0)
    model = CAGlowFaces.from_glow(flow, [WHO, HAT], noise=16)
    start = {name: t.clone() for name, t in model.encoder.state_dict().items()}
    assert [stage.name for stage in model.stages()] == ["adversarial"]
    fit(model, Squares(), images=160, progress=False)
    assert all(torch.equal(t, model.glow.state_dict()[name])
               for name, t in before.items())
    assert not any(torch.equal(t, model.encoder.state_dict()[name])
                   for name, t in start.items())


def test_law_6_loaded_model_gives_the_same_samples(tmp_path):
    model, _ = trained()
    again = load(save(model, tmp_path))
    assert (type(again) is CAGlowFaces and again.arguments["noise"] == 16
            and again.conditions == model.conditions)
    assert torch.equal(again.sample(4, generator=seeded()),
                       model.sample(4, generator=seeded()))


def test_law_7_samples_depend_on_conditions_and_noise():
    model, _ = trained()
    draw = lambda seed=1, **values: model.sample_latent(
        2, 1.0, seeded(seed), **{"identity": 0, "hat": 0, **values})
    base, top = draw(), model.glow.top
    for other in (draw(identity=1), draw(hat=1)):
        assert ((other[:, :top] != base[:, :top]).any(1).all()
                and torch.equal(other[:, top:], base[:, top:]))
    assert (draw(2) != base).any(1).all()
    still = model.sample(2, temperature=0.0, identity=1, hat=1)
    assert torch.allclose(still[0], still[1], atol=1e-5)


def test_law_10_training_raises_accuracy_on_generated_latents():
    model, log = trained()
    assert log[-1]["encoder.C_identity"] < 0.7 * log[0]["encoder.C_identity"]
    wanted = torch.arange(60) % 3
    fresh = build()
    fresh.glow.load_state_dict(model.glow.state_dict())
    right = [(read(m.sample(60, 0.5, seeded(), identity=wanted))[0] == wanted).float()
                 .mean() for m in (model, fresh)]
    assert right[0] > max(0.45, right[1] + 0.05)


def test_training_uses_the_given_form_of_eq_11():
    """A discriminator that calls everything generated: 50 nats on real latents, and
    −51 more by the printed form.
    """
    losses = {}
    for form in ("corrected", "literal"):
        model = build(form=form).eval()
        with torch.no_grad():
            model.supervision.real.weight.zero_()
            model.supervision.real.bias.fill_(-50.0)
        c = conditions_of(model.conditions, 8)
        batch = Batch({"z": torch.randn(8, model.glow.dims, generator=seeded()),
                       "c": c}, Noise(("form",), slice(None), 8))
        losses[form] = model.supervision_loss(batch)["D"][1].item()
    assert (losses["corrected"] == pytest.approx(50.0)
            and losses["literal"] == pytest.approx(50.0 - 51.0))


def test_a_latent_becomes_one_map_and_comes_back():
    levels = LatentMap([(6, 32, 32), (12, 16, 16), (48, 8, 8)])
    z = torch.randn(2, 12_288, generator=seeded())
    assert levels.shape == (48, 16, 16) and torch.equal(levels.inverse(levels(z)), z)
    with pytest.raises(ValueError, match="accepted: two levels"):
        LatentMap([(12, 8, 8)])


def test_reading_w_writes_the_whole_latent(tmp_path):
    model = build(cls=WholeCAGlowFaces)
    assert model.written == model.glow.dims
    c, eps = conditions_of(model.conditions, 4), torch.randn(4, 16, generator=seeded())
    same = [model.generate_latents(c, eps, torch.full((4, model.glow.dims), fill))
            for fill in (0.0, 1.0)]
    assert torch.equal(*same)
    save(model, tmp_path / "w")
    x = [m.sample(2, identity=1, hat=0, generator=seeded())
         for m in (model, load(tmp_path / "w"))]
    assert torch.equal(*x)
    assert model.supervision(same[0])[1].shape == (4,)
