"""Progressive GAN: fading, norms, the penalty, groups, who moves when, growth by
stages, reload in the middle, what is measured; and errors that the checks find.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bars import Bars, batch_of, seeded
from torch import nn

from condgen.blocks import UpsampleConv
from condgen.experiments.progressive import (
    LENGTHS, RECIPES, critic_slope, line_rows, reduced, stage_rows, until)
from condgen.experiments.relatives import Reference
from condgen.models.progressive import (
    DownsampleConv, GrowingGenerator, PixelNorm, ProgressiveGAN, batch_at,
    critic_terms, fade_images, fade_in, map_counts, minibatch_std, pixel_norm,
    prepare_layers, repeat_pixels, shrink_images)
from condgen.runs import load, save
from condgen.training import fit

SMALL = {"latent": 6, "width": 4}
D64 = torch.float64


def build(kind=ProgressiveGAN, shape=(1, 8, 8), **options):
    torch.manual_seed(0)
    return kind(shape, **{**SMALL, **options})


def noise(*shape):
    return torch.randn(*shape, generator=seeded(), dtype=D64)


# Norms


def test_scale_of_latents_is_invisible_and_direction_is_not():
    model, z = build().double(), noise(4, 6)
    x = model.generate(z[:, :0], z)
    assert (model.generate(z[:, :0], 9 * z) - x).abs().max() < 1e-6
    assert (model.generate(z[:, :0], -z) - x).abs().max() > 0.05
    a, b = (model.sample(3, t, generator=seeded()) for t in (0.5, 2.0))
    assert torch.allclose(a, b, atol=1e-5)


def test_pixel_norm_gives_each_pixel_the_length_root_c():
    h = noise(2, 9, 3, 4)
    assert torch.allclose(PixelNorm()(h).norm(dim=1), torch.full((2, 3, 4), 3.0).to(D64))
    assert not pixel_norm(torch.zeros(2, 9)).any()


def test_spectral_norm_stands_behind_the_equalised_constant():
    torch.manual_seed(0)
    layer = prepare_layers(nn.Conv2d(8, 6, 3))
    assert abs(layer.parametrizations.weight.original.std() - 1) < 0.1
    kinds = [type(p).__name__ for p in layer.parametrizations.weight]
    assert kinds == ["ScaleParametrization", "_SpectralNorm"]
    layer.eval()
    assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2) - 1) < 0.02
    plain = prepare_layers(nn.Linear(50, 400), spectral=False)
    assert abs(plain.weight.std() - (2 / 50) ** 0.5) < 0.01 and not plain.bias.any()


@pytest.mark.parametrize(("spectral", "names"), [
    ("both", {"generator", "discriminator"}), ("generator", {"generator"}),
    ("discriminator", {"discriminator"}), ("none", set())])
def test_spectral_norm_is_where_it_is_asked_for(spectral, names):
    model = build(spectral=spectral)
    found = {name.split(".")[0] for name, part in model.named_modules()
             if type(part).__name__ == "_SpectralNorm"}
    assert found == names
    layers = [p for p in model.modules() if isinstance(p, nn.Linear | nn.Conv2d)]
    assert all(hasattr(part, "parametrizations") for part in layers)  # equalised


def test_fused_convolutions_equal_the_two_steps():
    x, down, up = noise(2, 3, 8, 8), DownsampleConv(3, 5), UpsampleConv(3, 5)
    down, up = down.double(), up.double()
    slow = F.avg_pool2d(F.conv2d(x, down.weight, down.bias, padding=1), 2)
    assert torch.allclose(down(x), slow)
    slow = F.conv2d(repeat_pixels(x), up.weight, up.bias, padding=1)
    assert torch.allclose(up(x), slow)


# Loss


def linear_critic(x):
    return 3 * x.flatten(1).sum(1)


def test_terms_of_a_linear_critic_are_known():
    x, y = noise(2, 4, 1, 2, 2)
    terms = critic_terms(linear_critic, x, y, torch.rand(4).to(D64))
    a, b = linear_critic(x), linear_critic(y)
    assert terms["GP"][0] == 10 and torch.isclose(
        terms["GP"][1], torch.tensor(25.0, dtype=D64))  # slope 3 · √4 = 6
    assert torch.isclose(terms["D"][1], b.mean() - a.mean())
    assert terms["drift"][0] == 1e-3 and torch.isclose(terms["drift"][1], (a * a).mean())


def test_penalty_agrees_with_autograd_image_by_image():
    model = build(group=None).double()
    x, y = torch.rand(2, 4, 1, 8, 8, generator=seeded(), dtype=D64)
    u = torch.rand(4, generator=seeded(), dtype=D64)
    critic = lambda x: model.discriminator(x, 1)
    found = critic_terms(critic, x, y, u)["GP"][1]
    lengths = []
    for share, a, b in zip(u, x, y):
        at = (share * a + (1 - share) * b)[None].requires_grad_()
        slope, = torch.autograd.grad(critic(at).sum(), at)
        lengths.append(slope.norm())
    assert torch.isclose(found, (torch.stack(lengths) - 1).square().mean())


def test_terms_of_weight_zero_are_left_out():
    x, y = noise(2, 4, 1, 2, 2)
    u = torch.rand(4).to(D64)
    assert set(critic_terms(linear_critic, x, y, u, 0.0, 0.0)) == {"D"}
    given = build(game="non_saturating", penalty=0.0, drift=0.0)
    assert set(given.discriminator_loss(batch_of([]), 1, 0.5)) == {"D"}


def test_groups_keep_real_and_generated_images_apart():
    h = noise(8, 3, 2, 2)
    one = minibatch_std(torch.cat([h[:4], h[:1].expand(4, -1, -1, -1)]))
    assert one[:4, 3].std() == 0 and one[4:, 3].max() < 1e-3 < one[:4, 3].min()
    assert torch.equal(one[:4], minibatch_std(h[:4]))
    assert not minibatch_std(h, None)[:, 3].any()
    assert [len(minibatch_std(h[:n])) for n in (1, 3, 6, 7)] == [1, 3, 6, 7]


@pytest.mark.parametrize(("n", "same"), [(4, True), (5, False)])
def test_a_batch_that_groups_do_not_divide_is_judged_apart(n, same):
    """Of ten images in one call, a group of two would hold both kinds."""
    model, batch = build(), batch_of([], n)
    found = model.discriminator_loss(batch, 1, 1.0)["D"][1]
    fake, critic = model.generator(batch.randn("z", 6), 1), model.discriminator
    apart, together = (critic_terms(lambda x: critic(x, 1), 2 * batch.x - 1, fake,
                                    torch.rand(n), together=joined)["D"][1]
                       for joined in (False, True))
    assert torch.isclose(found, apart, atol=1e-7)
    assert torch.isclose(found, together, atol=1e-7) == same


# Fading


class Swapped(GrowingGenerator):
    """α and 1 − α exchanged."""

    def forward(self, z, level, alpha=1.0):
        return super().forward(z, level, 1 - alpha if 0 < alpha < 1 else alpha)


class Abrupt(GrowingGenerator):
    """No fading at all."""

    def forward(self, z, level, alpha=1.0):
        return super().forward(z, level)


def continuous(generator):
    """Whether small steps of α, from 0 to 1, change images little everywhere."""
    z = noise(4, 6)
    ends = [repeat_pixels(generator(z, 0)), generator(z, 1)]
    steps = [ends[0], *(generator(z, 1, k / 50) for k in range(51)), ends[1]]
    jumps = max((b - a).abs().max() for a, b in zip(steps, steps[1:]))
    return bool(jumps < 0.03 * (ends[1] - ends[0]).abs().max())


@pytest.mark.parametrize(("kind", "fine"), [
    (GrowingGenerator, True), (Swapped, False), (Abrupt, False)])
def test_growing_is_continuous_from_stage_to_stage(kind, fine):
    torch.manual_seed(0)
    assert continuous(kind(6, 1, [8, 4]).double()) == fine


def test_the_discriminator_begins_as_the_old_one():
    model, x = build().double(), torch.rand(4, 1, 4, 4, generator=seeded(), dtype=D64)
    old = model.discriminator(x, 0)
    assert torch.allclose(model.discriminator(repeat_pixels(x), 1, 0.0), old)
    assert not torch.allclose(model.discriminator(repeat_pixels(x), 1, 0.5), old)


def test_real_images_fade_and_keep_their_reduced_version():
    x = noise(2, 1, 8, 8)
    for alpha in (0.0, 0.3, 1.0):
        assert torch.allclose(F.avg_pool2d(fade_images(x, alpha), 2), F.avg_pool2d(x, 2))
    assert torch.equal(fade_images(x, 0.0), repeat_pixels(F.avg_pool2d(x, 2)))


def test_alpha_rises_to_one_over_its_share():
    assert [fade_in(t, 0.5) for t in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert fade_in(0.0, 0.5, 0.1) == 0.2 and fade_in(0.0, 0.0) == 1.0
    batches = []

    class Watched(ProgressiveGAN):
        def generator_loss(self, batch, level, alpha):
            batches.append((level, round(alpha, 3)))
            return super().generator_loss(batch, level, alpha)

    fit(build(Watched, fade=0.5), Bars([]), images=128, progress=False)
    assert batches == [(0, 1.0)] * 4 + [(1, 0.5)] + [(1, 1.0)] * 3


# Growth


def test_images_of_a_stage_are_means():
    table = {"x": torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)}
    small = shrink_images(table, 4)["x"]
    assert small.dtype == torch.uint8 and small[0, 0, 0, 0] == 4  # mean 4.5, to even
    assert shrink_images(table, 8) is table


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64)])
def test_stages_double_the_side(shape):
    model = build(shape=shape)
    sides = [int(stage.name[:-2]) for stage in model.stages()]
    assert sides == [4 * 2**k for k in range(len(sides))] and sides[-1] == shape[1]
    for level, stage in enumerate(model.stages()):
        stage.build()
        x = model.generator(torch.randn(2, 6), level)
        assert model.level == level and x.shape == (2, shape[0], *[sides[level]] * 2)
        assert model.discriminator(x, level).shape == (2,)
        assert model.sample(2).shape == (2, *shape)


def test_players_move_what_their_level_uses():
    model = build(shape=(1, 16, 16))
    for level, stage in enumerate(model.stages()):
        critic, generator = stage.players(stage)
        assert (critic.name, critic.repeats, generator.repeats) == ("discriminator", 2, 1)
        rates = [p.optimizer.param_groups[0]["lr"] for p in (generator, critic)]
        assert rates == [1e-3, 2e-3]
        names = {id(p): name for name, p in model.named_parameters()}
        moved = {names[id(p)] for p in generator.params}
        outputs = {int(n.split(".")[2]) for n in moved if "to_rgb" in n}
        blocks = {int(n.split(".")[2]) for n in moved if "blocks" in n}
        assert outputs == {max(0, level - 1), level} and blocks == {*range(level)}


def test_a_run_that_ends_early_is_the_beginning_of_a_longer_one():
    """So a distance after a stage can be measured on a training that ends there."""
    short = fit(build(until=4), Bars([]), images=64, progress=False).model
    a, seen = dict(short.named_parameters()), []

    class Kept(ProgressiveGAN):
        def players(self, level, stage):
            seen.append({n: p.detach().clone() for n, p in self.named_parameters()})
            return super().players(level, stage)

    long = fit(build(Kept), Bars([]), images=64, progress=False).model
    assert short.level == 0 and long.level == 1
    assert all(torch.equal(a[n], seen[1][n]) for n in a)


def test_a_stopped_run_is_loaded_at_its_level(tmp_path):
    data = Bars([])
    stopped = fit(build(), data, tmp_path / "run", images=64, progress=False, budget=0.0)
    assert not stopped.finished
    model = load(tmp_path / "run")
    assert model.level == 0
    x = model.sample(2, generator=seeded())
    assert torch.equal(x, repeat_pixels(F.avg_pool2d(x, 2)))
    while not stopped.finished:
        stopped = fit(build(), data, tmp_path / "run", images=64, progress=False,
                      budget=0.0)
    whole = fit(build(), data, images=64, progress=False).model
    assert all(torch.equal(a, b) for a, b in zip(
        whole.state_dict().values(), load(tmp_path / "run").state_dict().values()))


def test_without_growth_there_is_one_stage():
    model = build(grow=False)
    [stage] = model.stages()
    assert stage.name == "8px"
    moved = {id(p) for p in stage.players(stage)[1].params}
    assert not any(id(p) in moved for p in model.generator.to_rgb[0].parameters())


def test_literal_has_the_sizes_of_the_later_code():
    model = ProgressiveGAN.literal((3, 128, 128))
    count = sum(p.numel() for p in model.generator.parameters())
    assert round(count / 1e6, 2) == 1.89
    assert model.arguments["latent"] == 128 and model.arguments["ema"] == 0.999
    assert [batch_at(s) for s in (4, 8, 16, 32, 64, 128)] == [128] * 3 + [64, 32, 16]
    assert model.stages()[-1].schedule is None and build().stages()[-1].schedule
    assert map_counts((3, 128, 128), 128, 512) == [512, 512, 512, 512, 256, 128]
    assert sum(p.numel() for p in GrowingGenerator(
        512, 3, map_counts((3, 128, 128), 128, 512), 2).parameters()) // 10**5 == 229


def test_reload_gives_the_same_samples(tmp_path):
    model = build(spectral="discriminator", output="tanh", convolutions=2)
    save(model, tmp_path / "run")
    again = load(tmp_path / "run")
    assert torch.equal(model.sample(3, generator=seeded()),
                       again.sample(3, generator=seeded()))


@pytest.mark.parametrize(("options", "message"), [
    ({"spectral": "bothe"}, "did you mean 'both'"), ({"until": 5}, "accepted: 4, 8"),
    ({"game": "hinges"}, "did you mean 'hinge'"), ({"convolutions": 3}, "accepted: 1, 2"),
    ({"critic_steps": 0}, "critic_steps"), ({"ema": 1.0}, "ema"),
    ({"output": "sigmoid"}, "accepted: linear, tanh"), ({"batch": 0}, "batch"),
    ({"penalty": -1.0}, "penalty"), ({"grow": 2}, "grow"), ({"latent": 0}, "latent"),
    ({"group": 0}, "group"), ({"until": 0}, "until"), ({"convolutions": True}, "conv")])
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


# What is measured


class Pixels(nn.Module):
    """An evaluator whose features are the means of an image's quarters."""

    def features(self, x):
        return F.avg_pool2d(x, x.shape[-1] // 2).flatten(1)


def lab_of(model, n=60):
    x = torch.rand(2 * n, 1, 8, 8, generator=seeded())
    data = SimpleNamespace(split_images=lambda s: x[:n] if s == "test" else x[n:])
    return SimpleNamespace(data=data, size={"n": n, "lines": 4}, seed=0,
                           train=lambda name, **_: SimpleNamespace(model=model))


def test_slope_of_a_known_critic():
    model = build()
    model.discriminator.forward = lambda x, level: 0.3 * x.flatten(1).sum(1)
    x, y = torch.rand(2, 5, 1, 8, 8, generator=seeded())
    assert abs(critic_slope(model, x, y, torch.rand(5)) - 2.4) < 1e-5


def test_stages_are_compared_with_images_of_their_size():
    model = build(until=4)
    lab = lab_of(model)
    real = Reference(lab, Pixels())
    rows = stage_rows(lab, real, {4: "any", 8: "any"})
    found = {(r["at"]["side"], r["at"]["reference"]): r["value"] for r in rows}
    assert len(found) == 4 and found[8, "full"] == found[8, "reduced"]
    x = torch.rand(3, 1, 8, 8, generator=seeded())
    assert torch.allclose(reduced(x, 4), repeat_pixels(F.avg_pool2d(x, 2)))


def test_lines_leave_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr("condgen.experiments.progressive.AttributeReader",
                        lambda evaluator, data: evaluator)
    model = build().train()
    rows = line_rows(lab_of(model), {("G", ""): ("any", {})}, Pixels())
    assert [r["metric"] for r in rows] == ["step_ratio"] and rows[0]["value"] >= 1
    assert model.training


def test_lengths_of_stages_belong_to_one_training():
    assert until(8)["cpu"] == {k: LENGTHS["cpu"][k] for k in ("4px", "8px")}
    named = {r.name: r for r in RECIPES}
    assert set(named["progressive-faces-16px"].images["full"]) == {
        "4px", "8px", "16px"}
