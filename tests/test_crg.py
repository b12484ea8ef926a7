"""CRG and other inversions: what moves, which losses, resuming, and codes recovered."""

import pytest
import torch
from bars import Bars, batch_of, seeded

from condgen.contracts import GeneratorModel, Player
from condgen.models import crg
from condgen.models.crg import (
    CRG, Plateau, attribute_direction, build_generator, cosine_error, latent_error,
    move_code, plateau_factor, rotate_and_flip)
from condgen.models.dcgan import DCGAN
from condgen.models.inversions import invert_by_gradient
from condgen.runs import load, save
from condgen.training import fit

SMALL = {"generator_arguments": {"width": 2, "noise": 6}, "width": 2}
FULL = {**SMALL, "dropout": 0.5, "optimizer": "rmsprop", "schedule": "plateau",
        "rotation": 10.0, "flips": "both", "pretrained": True}


def small(**options):
    torch.manual_seed(0)
    return CRG((1, 8, 8), **{**SMALL, "pretrained": True, **options})


def states_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(),
                                                 b.state_dict().values()))


def test_training_leaves_the_generator_as_it_is():
    """Weights and running statistics; CRG(TG) moves both."""
    for tg in (False, True):
        model, twin = small(train_generator=tg), small(train_generator=tg)
        fit(model, Bars(), None, images=320, progress=False)
        assert states_equal(model.generator, twin.generator) != tg
        assert not states_equal(model.encoder, twin.encoder)
        assert states_equal(model.generator.trunk, twin.generator.trunk)


def test_resumed_run_with_all_options_equals_whole_run(tmp_path):
    whole = fit(CRG((1, 8, 8), **FULL), Bars(), None, images=320, progress=False)
    torch.manual_seed(0)
    whole = fit(CRG((1, 8, 8), **FULL), Bars(), None, images=320, progress=False)
    run = None
    while run is None or not run.finished:
        torch.manual_seed(0)
        run = fit(CRG((1, 8, 8), **FULL), Bars(), tmp_path / "run", images=320,
                  progress=False, budget=0.0)
    assert states_equal(whole.model, run.model)
    assert states_equal(load(tmp_path / "run"), whole.model)


def test_losses_are_optimised_by_one_or_by_several_optimizers():
    separate, shared = (small(separate=s).players(None) for s in (True, False))
    assert [p.name for p in separate] == ["latent", "image"]
    assert separate[0].optimizer is not separate[1].optimizer
    assert shared[0].optimizer is shared[1].optimizer
    assert [p.fresh for p in separate] == [True, False]


def test_each_loss_is_the_cycle_that_its_name_says():
    """Held against an encoder and a generator whose outputs are planted."""
    model, batch = small(losses="+".join(crg.LOSSES)).eval(), batch_of((), 8)
    model.generate = lambda c, z: z[:, :1, None, None].expand(-1, 1, 8, 8)
    model.codes_of = lambda x: x.mean((1, 2, 3))[:, None].expand(-1, 6) + 1
    z = batch.randn("z", 6)
    code = z[:, :1] + 1
    mean = batch.x.mean((1, 2, 3))[:, None]
    wanted = {"latent": (z - code).square().mean(), "image_generated": torch.tensor(1.0),
              "image": (batch.x.flatten(1) - mean - 1).abs().mean(),
              "latent_real": torch.tensor(1.0)}
    for name, value in wanted.items():
        assert model.error_of(name, batch).item() == pytest.approx(value.item(),
                                                                   abs=1e-5)


def test_cosine_loss_sees_angles_only_and_mse_lengths_too():
    z = torch.randn(5, 7, generator=seeded())
    assert cosine_error(z, 3 * z).abs() < 1e-6 < latent_error(z, 3 * z)
    assert cosine_error(z, -z) == pytest.approx(2.0, abs=1e-6)
    model = small(latent_loss="cosine").eval()
    assert 0 <= model.error_of("latent", batch_of((), 8)) <= 2


def test_a_copy_of_a_generator_draws_the_same_and_reloads(tmp_path):
    torch.manual_seed(0)
    gan = DCGAN((1, 8, 8), noise=6, width=2)
    model = CRG.from_generator(gan, width=2)
    draw = lambda m: m.sample(3, generator=seeded(5))
    assert torch.equal(draw(model), draw(gan)) and model.pretrained
    save(model, tmp_path / "run")
    again = load(tmp_path / "run")
    assert torch.equal(draw(again), draw(gan))
    x = Bars().split_images("test")[:2]
    assert torch.equal(again.encode(x), model.encode(x))


def test_untrained_generators_are_trained_first():
    assert [s.name for s in small(pretrained=False).stages()] == ["adversarial",
                                                                 "encoder"]
    assert [s.name for s in small().stages()] == ["encoder"]


def test_edit_moves_codes_along_the_direction():
    model, x = small(), Bars().split_images("test")[:4]
    z = model.encode(x)
    d = attribute_direction(z[:1], z[1:2])
    assert torch.equal(model.edit(x, d, 2.0), model.decode(z + 2 * d))
    assert torch.equal(model.edit(x), model.reconstruct(x))
    with pytest.raises(ValueError, match=r"direction \(7,\); accepted: \(6,\)"):
        model.edit(x, torch.zeros(7))
    each = torch.tensor([0.0, 1.0, -1.0, 2.0])
    moved = move_code(z, d[0], each)
    assert torch.allclose((moved - z) @ d[0], each, atol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"trunk": "vgg"}, "vgg16"), ({"losses": "latents"}, "latent"),
    ({"losses": ""}, "losses"), ({"generator": "dcgan.DCGANS"}, "dcgan.DCGAN"),
    ({"generator": "nothing.Here"}, "condgen.models"),
    ({"generator": "os.path"}, "condgen.models"),
    ({"trunk": "vgg16"}, "width 64"), ({"optimizer": "sgd"}, "adam"),
    ({"flips": "vertical"}, "horizontal"), ({"dropout": 1.0}, "dropout"),
    ({"schedule": "cosine"}, "plateau"),
    ({"generator_arguments": {"depth": 3}}, "generator_arguments=.*width"), ({"lr": -1.0}, "lr")])
def test_wrong_options_are_refused_with_the_accepted_ones(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


def test_generators_with_conditions_are_refused():
    with pytest.raises(ValueError, match="without conditions"):
        build_generator("cgan.CGAN", (1, 8, 8), {"conditions": Bars().conditions})


def test_vgg_trunk_needs_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="trunk='random'"):
        crg.vgg_weights()


def test_plateau_depends_on_the_history_alone():
    history = [3.0, 2.0, *[2.5] * 6, 1.9, *[2.0] * 11]
    rule = Plateau(stop_after=12)
    ends = [rule.stop(history[: i + 1]) for i in range(len(history))]
    fresh = Plateau(stop_after=12)
    fresh.stop(history)
    assert fresh.scale == rule.scale == plateau_factor(history) == 0.125
    assert ends == [False] * 20 and Plateau(stop_after=11).stop(history)


def test_flips_upside_down_only_if_asked():
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(2, 1, 1, 1)
    u = torch.tensor([[0.5, 0.1, 0.1]] * 2)
    assert torch.allclose(rotate_and_flip(x, u, 0, "none"), x, atol=1e-4)
    assert torch.allclose(rotate_and_flip(x, u, 0, "horizontal"), x.flip(3), atol=1e-4)
    assert torch.allclose(rotate_and_flip(x, u, 0, "both"), x.flip(2, 3), atol=1e-4)


class Injective(GeneratorModel):
    """One number is the brightness, the other how bright every fourth column is."""

    latent_size = 2

    def __init__(self, shape):
        super().__init__(shape)
        self.stripes = (torch.arange(8) % 4 == 1).float() * 2 - 0.5

    def generate(self, c, z):
        rows = torch.sigmoid(0.7 * (z[:, :1] + z[:, 1:] * self.stripes))
        return rows[:, None, None].expand(-1, 1, 8, 8)


def test_an_injective_generator_is_inverted(monkeypatch):
    """Law 12: the codes of a generator that can be inverted are found."""
    monkeypatch.setattr(crg, "build_generator", lambda *args: Injective((1, 8, 8)))
    torch.manual_seed(0)
    model = CRG((1, 8, 8), width=4, lr=3e-3, losses="latent", pretrained=True)
    fit(model, Bars(), None, images=6_400, progress=False)
    z = torch.randn(200, 2, generator=seeded())
    found = model.encode(model.decode(z))
    assert (found - z).square().mean() < 0.2
    assert (found.roll(1, 0) - z).square().mean() > 1.5  # the error of wrong codes


def test_gradient_descent_takes_the_best_of_its_starts():
    """Two minima at ±1, of which the left one is worse."""
    bumps = lambda z: torch.cat([(z.square() - 1), 0.3 * (z - 1)], 1)
    x = torch.zeros(2, 2)
    starts = torch.tensor([[[-1.2], [-1.2]], [[1.2], [1.2]]])
    both = invert_by_gradient(bumps, x, starts, 100, 0.02)
    left = invert_by_gradient(bumps, x, starts[0], 100, 0.02)
    assert (both.z - 1).abs().max() < 0.02 and (left.z < 0).all()
    assert (both.error < left.error).all()
    assert both.history.shape == (101, 2, 2)
    assert torch.equal(both.error, both.history.amin((0, 1)))


def test_gradient_descent_works_on_faint_images():
    """Adam's own constant must not swamp gradients of small images."""
    faint = lambda z: 1e-5 * z
    x = faint(torch.tensor([[1.0, -2.0]]))
    assert (invert_by_gradient(faint, x, torch.zeros(1, 2), 300).z
            - torch.tensor([[1.0, -2.0]])).abs().max() < 0.05


@pytest.mark.parametrize("start, options, message", [
    (torch.zeros(3, 2), {}, r"start \(3, 2\) for 2 images"),
    (torch.zeros(2, 2), {"error": "mea"}, "mae"),
    (torch.zeros(2, 2), {"steps": 0}, "steps"),
    (torch.zeros(2, 2), {"bound": -1.0}, "bound")])
def test_wrong_inversions_are_refused(start, options, message):
    with pytest.raises(ValueError, match=message):
        invert_by_gradient(lambda z: z, torch.zeros(2, 2), start, **options)


def test_players_are_players():
    assert all(isinstance(p, Player) for p in small().players(None))


class PooledLayout(CRG):
    """Largest values of the map in place of a linear layer that sees the places."""

    def codes_of(self, x):
        maps, rest = self.encoder[0], self.encoder[1:]
        h = maps[:-1](2 * x - 1)
        top = h.amax((2, 3), keepdim=True).expand_as(h).flatten(1)
        return rest(top)


@pytest.mark.parametrize("kind, right", [(CRG, True), (PooledLayout, False)])
def test_the_strided_layout_sees_where_things_are(kind, right):
    torch.manual_seed(0)
    model = kind((1, 16, 16), "dcgan.DCGAN", {"noise": 6, "width": 4}, width=4,
                 trunk="strided").eval()
    x = torch.full((2, 1, 16, 16), 0.5)  # the value of the padding
    x[0, 0, 4:12, 4:6] = x[1, 0, 4:12, 8:10] = 1  # the same bar, four pixels on
    codes = model.codes_of(x)
    apart = (codes[0] - codes[1]).abs().max() > 1e-3 * codes.abs().max()
    assert bool(apart) == right


def test_the_strided_layout_has_no_dropout():
    with pytest.raises(ValueError, match="dropout=0.5 with trunk='strided'"):
        small(trunk="strided", dropout=0.5)
