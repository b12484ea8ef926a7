"""Laws of CAGlow: its losses, the data-started encoder, who moves what, two stages,
conditions of all kinds.
"""

import math
import warnings
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from condgen.conditions import Binary, Classes, Code, Real, Schema
from condgen.contracts import Batch, Noise
from condgen.models.caglow import CAGlow
from condgen.models.caglow_networks import (
    Encoder, FactorEncoder, PaperEncoder, SupervisionBlock, LatentFeatureExtractor,
    discriminator_loss,
    encoder_loss, feature_matching, group_memberships, residual_pca_scores)
from condgen.models.cglow import CGlow
from condgen.models.glow import Glow
from condgen.runs import load, save
from condgen.trainer import set_trainable
from condgen.training import fit

SIZES = {"levels": 2, "depth": 1, "width": 8}
SMALL = {**SIZES, "hidden": 32}
BAR = Classes("bar", 3)
CODED = (BAR, Code("u", 2))
MANY = Schema([BAR, Binary("bold"), Real("light", 0, 10), Code("u", 2),
               Code("b", 1, "binary")])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Bars:
    """A bright bar at one of three places, bold or not, on a
    ground of varying light.
    """

    name, sha256 = "bars", "0"

    def __init__(self, conditions=(BAR,), width=8):
        self.conditions, self.width = Schema(conditions), width

    def table(self, split):
        n, g = {"train": 300, "val": 60, "test": 120}[split], seeded(len(split))
        values = {"bar": torch.arange(n) % 3, "bold": torch.rand(n, generator=g) < 0.5}
        values["light"] = 10 * torch.rand(n, generator=g)
        x = (20 * torch.rand(n, 1, self.width, self.width, generator=g)
             + 4 * values["light"].view(-1, 1, 1, 1))
        for i in range(n):
            left = int(values["bar"][i]) * 3 * self.width // 8
            x[i, 0, :,
              left : left + (2 if values["bold"][i] else 1) * self.width // 8] += 150
        asked = {name: values[name] for name in self.conditions.names}
        return {"x": x.round().to(torch.uint8), "c": self.conditions.pack(n, **asked)}


def build(conditions=CODED, shape=(1, 8, 8), cls=CAGlow, **options):
    torch.manual_seed(0)
    return cls(shape, conditions, **{**SMALL, **options})


@cache
def flow():
    torch.manual_seed(0)
    model = Glow((1, 8, 8), **SIZES)
    fit(model, Bars(), images=2_560, progress=False)
    return model


def on_flow(conditions=CODED, images=1_600, **options):
    """A CAGlow on the trained flow, its log, and its data."""
    torch.manual_seed(0)
    model = CAGlow.from_glow(flow(), conditions, **{"hidden": 32, **options})
    bars = Bars(model.conditions.supervised or (BAR,))
    return model, fit(model, bars, images=images, progress=False).log, bars


@cache
def spoken(kind="uniform"):
    """A CAGlow whose codes have been learned, and its log."""
    count, weight = {"uniform": (2, 20.0), "binary": (1, 50.0)}[kind]
    return on_flow((BAR, Code("u", count, kind)), images=16_000, weights={"De": weight},
                   hidden=128)[:2]


def places(x):
    """Where each image's bar is, by its brightest third."""
    return torch.stack([x[..., left : left + 1].mean((1, 2, 3)) for left in (0, 3, 6)],
                       1).argmax(1)


def game(model, n=64):
    """A batch of stage 2 with real latents."""
    table = model.latents(Bars(model.conditions.supervised).table("train"))
    return Batch({k: v[:n] for k, v in table.items()}, Noise(("test",), slice(None), n))


# Losses


def test_optimal_discriminator_loss_is_js():
    """Eq. 11 on four latents: D* = p/(p+q), value 2 log 2 − 2 JS."""
    p, q = (torch.tensor([5.0, 2, 2, 1]).double() / 10,
            torch.tensor([1.0, 2, 3, 4]).double() / 10)
    real, fake = (torch.arange(4).repeat_interleave((10 * d).round().long())
                  for d in (p, q))
    best = (p / q).log().requires_grad_()
    loss = discriminator_loss(best[real], best[fake])
    slope, = torch.autograd.grad(loss, best)
    m = (p + q) / 2
    js = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    assert slope.abs().max() < 1e-12 and torch.allclose(best.sigmoid(), p / (p + q))
    assert math.isclose(loss.item(), 2 * math.log(2) - 2 * js.item(), abs_tol=1e-12)


def test_literal_eq_11_has_no_lower_bound():
    """Law 11."""
    real = torch.zeros(5)
    falling = [discriminator_loss(real, torch.full((5,), -10.0**k), "literal").item()
               for k in range(7)]
    bounded = [discriminator_loss(real, torch.full((5,), -10.0**k)).item()
               for k in range(7)]
    assert all(b < a for a, b in zip(falling, falling[1:])) and falling[-1] < -9e5
    assert min(bounded) >= 0
    # an evaluator of one batch, the encoder waits
    for form in ("literal", "corrected"):
        model = build(networks="paper", form=form)
        player, batch = model.players(model.stages()[-1])[0], game(model)
        for group in player.optimizer.param_groups:
            group["lr"] = 1e-2
        for _ in range(200):
            loss = player.loss(batch)["D"][1]
            player.optimizer.zero_grad()
            loss.backward()
            player.optimizer.step()
        assert loss < -20 if form == "literal" else loss >= 0


def test_encoder_loss_gradient_is_d_minus_one():
    """Eq. 10: the slope in the logit is −(1 − D)."""
    logits = torch.linspace(-30, 30, 61, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(61 * encoder_loss(logits), logits)
    assert torch.allclose(slope, logits.sigmoid() - 1)
    assert encoder_loss(torch.tensor([-1e4])).item() == 1e4  # no overflow


def test_membership():
    c = MANY.pack(2, bar=[0, 2], bold=[1, 0], light=[0, 7.5], u=[0.1, 0.2], b=1)
    expected = torch.tensor([[1, 0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 1, 0.75, 0.25]])
    assert torch.allclose(group_memberships(MANY, c), expected)
    assert group_memberships(Schema(Code("u")), torch.zeros(3, 1)).tolist() == [[1]] * 3


def test_variance_penalty_of_pair_and_class_mean_matching():
    """Eq. 14: ½(bias² + v + v′) against ½(bias² + (v + v′)/m), each to
    five standard errors.
    """
    g, m, k, trials = seeded(), 16, 4, 3000
    ones = torch.ones(m, 1, dtype=torch.float64)
    for groups, shrink in ((None, 1), (ones, m)):
        losses = []
        for _ in range(trials):
            real, fake = torch.randn(2, m, k, generator=g, dtype=torch.float64)
            losses.append(feature_matching(real, 0.5 + 0.7 * fake, groups))
        losses = torch.stack(losses)
        expected = 0.5 * (0.25 + (1 + 0.49) / shrink)
        assert abs(losses.mean() - expected) < 5 * losses.std() / trials**0.5


def test_matching_compares_group_with_group():
    groups = F.one_hot(torch.tensor([0, 0, 1, 1]), 3).float()  # the third is empty
    real, fake = torch.randn(2, 4, 5, generator=seeded())
    swapped = fake[[1, 0, 3, 2]]
    assert torch.isclose(feature_matching(real, fake, groups),
                         feature_matching(real, swapped, groups))
    assert not torch.isclose(feature_matching(real, fake),
                             feature_matching(real, swapped))
    by_hand = sum(0.5 * (real[i : i + 2].mean(0) - fake[i : i + 2].mean(0)).square()
                      .mean() for i in (0, 2)) / 2
    assert torch.isclose(feature_matching(real, fake, groups), by_hand)
    features = real.clone().requires_grad_()
    assert not feature_matching(features, fake, groups).requires_grad


def test_variance_given_the_condition_under_each_rule():
    """An encoder that only matches loses its noise by pairs and
    keeps it by class means.
    """
    only = {"E": 0.0, "D": 0.0, "C": 0.0, "De": 0.0, "FM": 100.0}
    spread = {}
    for matching in ("pair", "class_mean"):
        model = on_flow(images=8_000, matching=matching, weights=only,
                        networks="paper")[0]
        f = model.supervision.trunk(model.sample_latent(300, 1.0, seeded(1), bar=1,
                                                        u=[0.0, 0.0]))
        spread[matching] = f.std(0).mean().item()
    assert spread["pair"] < 0.85 * spread["class_mean"]


# Networks


def test_initialisation_matches_mean_and_covariance():
    g = seeded()
    c = F.one_hot(torch.arange(900) % 3, 3).float()
    turn = torch.randn(3, 5, 5, generator=g)
    z = torch.einsum("ni,nij->nj", torch.randn(900, 5, generator=g),
                     turn[torch.arange(900) % 3])
    z = z + c @ torch.randn(3, 5, generator=g)
    encoder = Encoder(Schema([BAR, Code("u", 2)]), 5, 8)
    encoder.initialize_from(z, c)
    for k in range(3):
        part, root = z[k::3], encoder.root[k]
        assert torch.allclose(encoder.mean[k], part.mean(0), atol=1e-4)
        assert (torch.allclose(root @ root, torch.cov(part.T), atol=1e-3)
                and torch.allclose(root, root.T, atol=1e-5))
        asked = encoder(torch.cat([c[k].expand(4000, 3), torch.zeros(4000, 2)], 1),
                        torch.randn(4000, 5, generator=g))
        assert torch.allclose(asked.mean(0), part.mean(0), atol=0.3)
        assert ((torch.cov(asked.T) - torch.cov(part.T)).norm()
                < 0.15 * torch.cov(part.T).norm())


@pytest.mark.parametrize(
    "conditions", [[Binary("bold")], [Real("light", 0, 10)], [Code("u", 2)], list(MANY),
                   [BAR, Classes("k", 2)]],
    ids=["binary", "real", "codes", "many", "two classes"],
)
def test_the_gaussian_has_the_mean_of_each_condition(conditions):
    """Also where no one-hot column carries a constant."""
    schema, g = Schema(conditions), seeded()
    c = schema.supervised.draw(4000, lambda name, k: torch.rand(4000, k, generator=g))
    z = (3 + c @ torch.randn(c.shape[1], 4, generator=g)
         + 0.1 * torch.randn(4000, 4, generator=g))
    encoder = Encoder(schema, 4, 8)
    encoder.initialize_from(z, c)
    codes = schema.codes.draw(4000, lambda name, k: torch.rand(4000, k, generator=g))
    written = encoder(torch.cat([c, codes], 1), torch.zeros(4000, 4))
    expected = z.mean(0).expand(4000, 4) if not schema.supervised else z
    assert (written - expected).abs().mean() < 0.1 and encoder.root.shape == (1, 4, 4)


def test_codes_replace_a_part_of_the_noise():
    """The codes' axes and the root together have the covariance of each class; the
    first code moves along the first.
    """
    g, k = seeded(), torch.arange(900) % 3
    c, s = F.one_hot(k, 3).float(), torch.randn(900, 2, generator=g)
    # correlated scores are made uncorrelated, the first one first
    s[:, 1] += 0.6 * s[:, 0]
    z = (s @ torch.randn(2, 5, generator=g) * (1 + k)[:, None]
         + 0.5 * torch.randn(900, 5, generator=g))
    for code, low, high in ((Code("u", 2), -1.0, 1.0),
                            (Code("b", 2, "binary"), 0.0, 1.0)):
        encoder = Encoder(Schema([BAR, code]), 5, 8)
        encoder.initialize_from(z, c, s)
        drawn = code.draw(100_000, lambda _, n: torch.rand(100_000, n, generator=g))
        assert (encoder.standardised(drawn).var(0) - 1).abs().max() < 0.02
        assert encoder.standardised(drawn).mean(0).abs().max() < 0.02
        for j in range(3):
            part, root, axes = z[j::3], encoder.root[j], encoder.axes[j]
            assert torch.allclose(root @ root + axes.T @ axes, torch.cov(part.T),
                                  atol=1e-3)
            first = s[j::3, 0] - s[j::3, 0].mean()
            slope = first @ (part - part.mean(0)) / first.square().sum()
            assert torch.allclose(axes[0], slope * first.std(), rtol=0.01, atol=0.01)
            ends = [
                encoder(torch.cat([c[j], torch.tensor([u, (low + high) / 2])])[None],
                        torch.zeros(1, 5))
                for u in (low, high)]
            width = 2 * 3**0.5 if code.kind == "uniform" else 2
            assert torch.allclose((ends[1] - ends[0])[0], width * axes[0], atol=1e-4)


def test_scores_are_principal_components_within_classes():
    g = seeded()
    k = torch.arange(600) % 3
    axes = torch.linalg.qr(torch.randn(48, 48, generator=g)).Q
    hidden = torch.randn(600, 2, generator=g) * torch.tensor([3.0, 1.5])
    x = (hidden @ axes[:, :2].T + 0.2 * torch.randn(600, 48, generator=g)).view(
        600, 3, 4, 4)
    x = x + 20 * F.one_hot(k, 3).float()[:, :, None, None]
    scores = residual_pca_scores(x, F.one_hot(k, 3).float(), 2)
    for j in range(2):
        assert torch.corrcoef(torch.stack([scores[:, j],
                                           hidden[:, j]]))[0, 1].abs() > 0.97
    assert max(scores[k == j].mean(0).abs().max() for j in range(3)) < 0.3
    assert torch.equal(residual_pca_scores((x - x.min()).round().to(torch.uint8),
                                           F.one_hot(k, 3).float(), 2).sign()[:5, 0],
                       scores.sign()[:5, 0])
    large = F.interpolate(x, scale_factor=8)
    assert torch.allclose(residual_pca_scores(large, F.one_hot(k, 3).float(), 2),
                          scores * 4, rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="49 columns of codes; accepted: 48"):
        residual_pca_scores(x, F.one_hot(k, 3).float(), 49)


def test_class_without_examples_keeps_identity_covariance():
    c = F.one_hot(torch.arange(40) % 2, 3).float()
    encoder = Encoder(Schema(BAR), 4, 8)
    encoder.initialize_from(torch.randn(40, 4, generator=seeded()), c)
    assert (torch.equal(encoder.root[2], torch.eye(4))
            and encoder.mean[2].abs().max() < 1e-6)
    assert all(p.isfinite().all() for p in encoder.parameters())


def test_trunk_splits_the_latent_into_levels_of_the_flow():
    """The first columns are the coarsest level, the last ones the finest."""
    trunk = LatentFeatureExtractor([(2, 16, 16), (4, 8, 8), (16, 4, 4)], 4, 6)
    z = torch.randn(2, 1024, generator=seeded())
    seen = []
    trunk.convs[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    assert (trunk(z).shape == (2, 6)
            and torch.equal(seen[0], z[:, 512:].view(2, 2, 16, 16)))


def test_networks_of_the_paper_have_two_layers():
    for latent, written in (("all", 64), ("top", 32)):
        model = build(networks="paper", latent=latent, noise=5)
        assert isinstance(model.encoder, PaperEncoder) and model.written == written
        weights = {name: tuple(p.shape)
                   for name, p in model.supervision.named_parameters() if p.dim() > 1}
        heads = {"real.weight": (1, 32), "c.weight": (3, 32), "u.weight": (2, 32)}
        assert weights == {"trunk.last.weight": (32, written), **heads}
        assert [tuple(p.shape) for p in model.encoder.parameters() if p.dim() > 1] == [
            (32, 10), (written, 32)]


@pytest.mark.parametrize("conditions", [[BAR], [Code("u", 2)]],
                         ids=["no codes", "codes only"])
def test_missing_heads_are_empty(conditions):
    schema = Schema(conditions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block = SupervisionBlock([(4, 4, 4)], schema, 8, True)
    _, real, c, u = block(torch.randn(5, 64))
    assert (real.shape == (5,) and (c.shape[1], u.shape[1])
            == (schema.supervised.width, schema.codes.width))
    assert all(p.numel() for p in block.parameters())


# Stages and players


@pytest.mark.parametrize("options", [{}, {"networks": "paper"}, {"latent": "top"}],
                         ids=["large", "paper", "top"])
def test_law_4_each_loss_term_updates_only_its_parameters(options):
    model = build(**options)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=seeded(p.numel()))
    block = model.supervision
    shared = [*block.trunk.parameters(), *block.middle.parameters()]
    heads = {"D": block.real, "C_bar": block.c, "De_u": block.u}
    supervision, encoder = model.players(model.stages()[-1])
    batch = game(model)
    for player in (supervision, encoder):
        set_trainable(model, player)
        for term, (_, value) in player.loss(batch).items():
            model.zero_grad(set_to_none=True)
            value.backward(retain_graph=True)
            moved = {id(p)
                     for p in model.parameters() if p.grad is not None and p.grad.any()}
            own = ([*shared, *heads[term].parameters()] if player is supervision
                   else list(model.encoder.parameters()))
            assert moved == {id(p) for p in own}, (player.name, term)


def test_law_4_frozen_flow_is_unchanged_bit_for_bit():
    model = build()
    fit(model, Bars(), images={"flow": 320, "adversarial": 80}, progress=False)
    again = CAGlow.from_glow(flow(), model.conditions, hidden=32)
    before = {name: t.clone() for name, t in again.glow.state_dict().items()}
    fit(again, Bars(), images=800, progress=False)
    assert all(torch.equal(t, before[name])
               for name, t in again.glow.state_dict().items())
    assert all(torch.equal(t, flow().state_dict()[name]) for name, t in before.items())


def test_stage_1_updates_the_flow_only():
    model = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    stage, = [s for s in model.stages() if s.name == "flow"]
    own = {id(p) for player in stage.players(stage) for p in player.params}
    assert own == {id(p) for p in model.glow.parameters()}
    fit(model, Bars(), images={"flow": 640, "adversarial": 80}, budget=0,
        progress=False)  # stops within stage 1
    assert all(torch.equal(p, before[name])
               for name, p in model.named_parameters() if not name.startswith("glow."))


def test_from_glow_gives_the_result_of_both_stages():
    whole = build()
    fit(whole, Bars(), images={"flow": 320, "adversarial": 320}, progress=False)
    torch.manual_seed(0)
    glow = Glow((1, 8, 8), **SIZES)
    fit(glow, Bars(), images=320, progress=False)
    torch.manual_seed(0)
    later = CAGlow.from_glow(glow, whole.conditions, hidden=32)
    fit(later, Bars(), images=320, progress=False)
    a, b = whole.state_dict(), later.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_an_encoder_beyond_memory_has_factors():
    with torch.device("meta"):
        for n, latent in ((2, "all"), (40, "top")):
            dense = CAGlow((3, 64, 64), [Classes("k", n)], latent=latent)
            assert not isinstance(dense.encoder, FactorEncoder)
        grown = CAGlow((3, 64, 64), [Classes("k", 10)])
    assert isinstance(grown.encoder, FactorEncoder)
    assert sum(p.numel() for p in grown.encoder.parameters()) < 30_000_000


def test_from_glow_refuses_other_models():
    with pytest.raises(ValueError, match="the flow is a CGlow; accepted: a Glow"):
        CAGlow.from_glow(CGlow((1, 8, 8), [BAR], **SIZES), [BAR])
    with pytest.raises(TypeError, match="levels"):
        CAGlow.from_glow(flow(), [BAR], levels=3)


def test_law_5_resumed_run_equals_uninterrupted_run(tmp_path):
    lengths = {"flow": 320, "adversarial": 320}
    whole, parts = build(), build()
    fit(whole, Bars(), tmp_path / "a", images=lengths, progress=False)
    stops = 0
    while not fit(parts, Bars(), tmp_path / "b", images=lengths, budget=0,
                  progress=False).finished:
        parts, stops = build(), stops + 1
    a, b = whole.state_dict(), parts.state_dict()
    assert stops >= 5 and all(torch.equal(a[name], b[name]) for name in a)


def test_law_6_loaded_model_gives_the_same_samples(tmp_path):
    model = on_flow(images=160)[0]
    save(model, tmp_path)
    again = load(tmp_path)
    assert torch.equal(model.sample(8, generator=seeded(), bar=1),
                       again.sample(8, generator=seeded(), bar=1))


def test_latents_are_those_of_the_frozen_flow():
    model = on_flow(images=80)[0]
    table = Bars().table("train")
    found = model.latents(table)
    assert (found["z"].shape == (1200, 64)
            and torch.equal(found["c"], table["c"].repeat(4, 1)) and "x" not in found)
    exact = flow().encode(table["x"].float() / 255)
    assert torch.allclose(found["z"].view(4, 300, 64).mean(0), exact, atol=1.0)
    same = model.latents({"x": table["x"].float() / 255, "c": table["c"]})
    assert (torch.equal(same["z"], found["z"])
            and torch.allclose(same["scores"], found["scores"]))
    assert (found["scores"].shape == (1200, 2)
            and torch.equal(found["scores"][:300], found["scores"][300:600]))


# Conditions


@pytest.mark.parametrize("kind", ["uniform", "binary"])
def test_codes_are_predicted_after_training(kind):
    model, log = spoken(kind)
    assert log[-1]["encoder.De_u"] < 0.6 * log[0]["encoder.De_u"]
    n, g = 1000, seeded(1)
    u = model.conditions.codes.draw(n, lambda name, k: torch.rand(n, k, generator=g))
    with torch.no_grad():
        answers = model.supervision(model.sample_latent(n, 1.0, g, u=u))[3]
    for k in range(u.shape[1]):
        assert torch.corrcoef(torch.stack([u[:, k], answers[:, k]]))[0, 1] > 0.6


def test_law_7_samples_depend_on_conditions_and_noise():
    model = spoken()[0]
    for k in range(3):
        x = model.sample(100, temperature=0.7, generator=seeded(2), bar=k)
        assert (places(x) == k).float().mean() > 0.9
    left, right = (model.sample(50, generator=seeded(3), u=[v, 0.0], bar=1)
                   for v in (-1.0, 1.0))
    assert (left - right).abs().mean() > 1e-3
    assert model.sample(50, generator=seeded(3), u=[0.0, 0.0],
                        bar=1).std(0).mean() > 1e-2


def test_several_conditions_at_once():
    model, log, bars = on_flow(MANY, images=8_000)
    assert {"encoder.C_bar", "encoder.C_bold", "encoder.C_light", "encoder.De_u",
            "encoder.De_b"} <= set(log[-1])
    x = model.sample(60, generator=seeded(), bar=[0, 1, 2] * 20, bold=1, light=5.0,
                     u=[0.0, 0.5], b=1)
    assert (places(x) == torch.arange(60) % 3).float().mean() > 0.8
    dark, bright = (model.sample(60, generator=seeded(), bar=0, bold=0,
                                 light=v)[..., 5:].mean() for v in (0.0, 10.0))
    thin, bold = (model.sample(60, generator=seeded(), bar=0, bold=v,
                               light=5.0)[..., 1].mean() for v in (0, 1))
    assert bright > dark + 0.05 and bold > thin + 0.1
    assert model.sample(3, bold=1).shape == (3, 1, 8, 8)


def test_codes_without_supervised_conditions():
    model, log, _ = on_flow([Code("u", 2)], images=1_600)
    assert (not any("C_" in name for name in log[-1])
            and math.isfinite(log[-1]["encoder.FM"]))
    assert model.sample(4, u=[0.5, -0.5]).shape == (4, 1, 8, 8)


def test_no_codes():
    model, log, _ = on_flow([BAR], images=800)
    assert (not any("De_" in name for name in log[-1])
            and model.sample(4, bar=2).shape == (4, 1, 8, 8))


def test_latent_top_leaves_lower_levels_to_noise():
    model = on_flow(images=800, latent="top")[0]
    z = [model.sample_latent(200, 1.0, seeded(4), bar=k, u=[0.0, 0.0])
         for k in range(2)]
    assert model.written == 32 and torch.equal(z[0][:, 32:], z[1][:, 32:])
    assert not torch.allclose(z[0][:, :32], z[1][:, :32])
    assert abs(z[0][:, 32:].mean()) < 0.1 and abs(z[0][:, 32:].std() - 1) < 0.1


def test_forms_of_a_condition():
    model = spoken()[0]
    rest = {"u": [0.0, 0.0]}
    draw = lambda **values: model.sample(4, generator=seeded(5), **values,  # noqa: E731
                                         **rest)
    scalar = draw(bar=2)
    assert (torch.equal(scalar, draw(bar=[2] * 4))
            and torch.equal(scalar, draw(bar=[0.0, 0.0, 1.0])))
    mixed = [model.sample_latent(4, 1.0, seeded(5), bar=bar, **rest)
             for bar in (0, 1, [0.5, 0.5, 0.0])]
    c = model.conditions.pack(4, bar=[0.5, 0.5, 0.0], **rest)
    eps = torch.randn(4, 64, generator=seeded())
    ends = [model.encoder.gaussian(model.conditions.pack(4, bar=k, **rest), eps)
            for k in (0, 1)]
    assert torch.allclose(model.encoder.gaussian(c, eps), (ends[0] + ends[1]) / 2,
                          atol=1e-5)
    assert not torch.equal(mixed[2], mixed[0])
    drawn = model.condition(3000, seeded())[:, :3]
    assert (drawn.mean(0) - 1 / 3).abs().max() < 0.05  # from training rows


def test_sampling_is_reproducible_and_constant_at_temperature_0():
    model = spoken()[0]
    assert torch.equal(model.sample(5, generator=seeded(6)),
                       model.sample(5, generator=seeded(6)))
    assert not torch.equal(model.sample(5, generator=seeded(6)),
                           model.sample(5, generator=seeded(7)))
    cold = model.sample(5, temperature=0.0, bar=1, u=[0.3, 0.3])
    assert torch.allclose(cold, cold[:1].expand_as(cold), atol=1e-6)


def test_flow_methods_equal_those_of_glow():
    model, x = spoken()[0], Bars().table("test")["x"][:9].float() / 255
    assert torch.equal(model.log_prob(x, seeded()), flow().log_prob(x, seeded()))
    assert torch.equal(model.encode(x), flow().encode(x))
    assert (model.decode(model.encode(x)) - x).abs().max() < 1e-4
    assert torch.equal(model.interpolate(x[0], x[1], 4),
                       flow().interpolate(x[0], x[1], 4))


@pytest.mark.parametrize(("options", "message"), [
    ({"latent": "topp"}, "latent='topp'; accepted: all, top; did you mean 'top'"),
    ({"matching": "pairs"}, "did you mean 'pair'"),
    ({"networks": "larg"}, "did you mean 'large'"),
    ({"form": "litteral"}, "did you mean 'literal'"),
    ({"weights": {"Dee": 1.0}},
     "weight of loss 'Dee'; accepted: E, D, C, De, FM; did you mean 'De'"),
    ({"conditions": []}, "one or more conditions or codes"),
    ({"coupling": "afine"}, "did you mean 'affine'"),
    ({"levels": 4}, "accepted: sides divisible by 16")])
def test_constructor_refuses_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        CAGlow(**{"shape": (1, 8, 8), "conditions": [BAR], **SMALL, **options})


def test_invalid_temperatures_are_refused():
    model = CAGlow((1, 8, 8), [BAR], **SMALL)
    for t in (-1, float("nan"), None, "warm"):
        with pytest.raises(ValueError,
                           match="temperature=.*accepted: a number from 0 to 10"):
            model.sample(2, temperature=t)
    with pytest.raises(ValueError, match="unknown condition 'bars'; accepted: bar, u; "
                           "did you mean 'bar'"):
        build().sample(2, bars=1)


@pytest.mark.parametrize("conditions", [[Binary("glasses")], [Classes("kind", 2)]])
def test_models_of_large_roots_are_loaded(conditions, tmp_path):
    """One matrix of 2352 × 2352 is most of the file, and is made once only."""
    model = CAGlow((3, 28, 28), conditions, levels=1, depth=1, width=4, hidden=4)
    save(model, tmp_path)
    assert torch.equal(load(tmp_path).encoder.root, model.encoder.root)
