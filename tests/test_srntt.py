"""Super-resolution with a reference: swapped features, players, gate, fallback."""

import pytest
import torch

from condgen.contracts import Batch, Noise
from condgen.experiments.superres import quality, rank_correlation, reference_rows
from condgen.matching import degrade, enlarge_images, reduce_images
from condgen.models.gated_transfer import GatedTransfer, swap_detail
from condgen.models.srntt import (
    SISR, SRNTT, AdversarialSISR, TextureFeatures, swap_features)
from condgen.runs import load, save
from condgen.scenes import ALL_KINDS, scenes
from condgen.training import fit

SHAPE = (3, 32, 32)
GOOD = tuple(ALL_KINDS.index(kind) for kind in ("shift", "same", "view"))


def data():
    return scenes(32, 3, 2)


def models():
    torch.manual_seed(0)
    return {"sisr": SISR(SHAPE, 6, 1), "game": AdversarialSISR(SHAPE, 6, 1),
            "srntt": SRNTT(SHAPE, 6, 1, 3, weight="sigmoid"),
            "gated": GatedTransfer(SHAPE, 6, 1, 6, 1)}


def lengths(model, n):
    return {stage.name: n for stage in model.stages()}


@pytest.mark.parametrize("name", models())
def test_each_player_updates_only_its_parameters(name):
    model = models()[name]
    for stage in model.stages():
        table = data().table("train")
        table = stage.data(table) if stage.data else table
        batch = Batch({k: v[:8] for k, v in table.items()},
                      Noise(("law 4",), slice(None), 8))
        if stage.on_enter:
            stage.on_enter(batch)
        g = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.data.add_(0.02 * torch.randn(p.shape, generator=g))
        for player in stage.players(stage):
            own = {id(p) for p in player.params}
            for p in model.parameters():
                p.requires_grad_(id(p) in own)
                p.grad = None
            terms = player.loss(batch)
            assert all(weight > 0 for weight, _ in terms.values())
            sum(weight * value for weight, value in terms.values()).backward()
            for label, p in model.named_parameters():
                moved = p.grad is not None and bool((p.grad != 0).any())
                assert moved == (id(p) in own), f"{stage.name}: {label}"
            for p in model.parameters():
                p.requires_grad_(True)


def test_the_players_and_their_order_are_those_of_the_table():
    model = models()["srntt"]
    last = model.stages()[-1]
    assert [s.name for s in model.stages()] == ["features", "reconstruction",
                                                "adversarial"]
    assert [(p.name, p.repeats) for p in last.players(last)] == [
        ("critic", 2), ("generator", 1), ("generator_truth", 1)]
    plain = SRNTT(SHAPE, 4, 1, 2, adversarial=False)
    assert plain.critic is None and len(plain.stages()) == 2


def test_the_game_starts_from_the_network_that_is_given():
    model = AdversarialSISR(SHAPE, 6, 1)
    assert [s.name for s in model.stages()] == ["sisr", "adversarial"]
    later = AdversarialSISR(SHAPE, 6, 1, pretrained=True)
    [stage] = later.stages()
    assert [(p.name, p.repeats) for p in stage.players(stage)] == [("critic", 2),
                                                                   ("generator", 1)]
    small = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(later.upscale(small), later.sisr.upscale(small))


@pytest.mark.parametrize("name", models())
def test_resumed_run_equals_uninterrupted_run(name, tmp_path):
    def run(**options):
        model = models()[name]
        return fit(model, data(), images=lengths(model, 16), progress=False, **options)

    whole, part = run(), None
    while part is None or not part.finished:
        part = run(out=tmp_path / "run", budget=0.0)
    a, b = whole.model.state_dict(), part.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", models())
def test_a_loaded_model_gives_the_same_images(name, tmp_path):
    model = models()[name]
    save(model, tmp_path / "run")
    small = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    given = (small,) if name in ("sisr", "game") else (small, torch.rand(
        2, 3, 24, 20, generator=torch.Generator().manual_seed(1)))
    made = model.upscale(*given)
    assert made.shape == (2, 3, 24, 28) and 0 <= made.min() and made.max() <= 1
    assert torch.equal(made, load(tmp_path / "run").upscale(*given))


def test_swapped_features_of_the_image_itself_are_its_own():
    torch.manual_seed(0)
    net = TextureFeatures(3, 4).double()
    x = data().split_images("test")[:1].double()
    with torch.no_grad():
        *maps, cosine = swap_features(net, degrade(x)[0], x[0])
        assert all(torch.allclose(a, b[0]) for a, b in zip(maps, net(x)))
    assert torch.allclose(cosine, torch.ones_like(cosine))


@pytest.mark.parametrize("weight", ["none", "sigmoid", "released"])
def test_weights_rise_or_fall_with_similarity_as_they_say(weight):
    model = SRNTT(SHAPE, 4, 1, 2, weight=weight)
    maps = [torch.ones(1, 1, 8, 8)] * 2
    low, high = (model.weigh(maps, torch.full((1, 1, 2, 2), v))[0].mean().item()
                 for v in (0.2, 0.9))
    sign = {"none": 0, "sigmoid": 1, "released": -1}[weight]
    assert (high > low) - (high < low) == sign


def test_a_shut_gate_is_the_network_without_a_reference():
    model = models()["gated"]
    for p in model.tail.parameters():
        p.data.fill_(0.3)
    small = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    reference = torch.rand(2, 3, 32, 36, generator=torch.Generator().manual_seed(3))
    model.slope.data.copy_(torch.tensor([0, 0, 0, 0, -1000.0]))
    assert torch.equal(model.upscale(small, reference), model.upscale(small))
    model.slope.data.copy_(torch.tensor([0, 0, 0, 0, 1000.0]))
    assert not torch.equal(model.upscale(small, reference), model.upscale(small))


def test_the_fitted_gate_prefers_good_references():
    data64 = scenes(64, 3, 2)
    torch.manual_seed(0)
    model = GatedTransfer(data64.shape, 6, 1, 6, 1)
    table = model.detail_table(data64.table("train"))
    model.calibrate(Batch(table, Noise(("fit",), slice(None), len(table["x"]))))
    with torch.no_grad():
        gate = model.gate_of(table["cues"].float()).mean((1, 2, 3))
    mean = {kind: gate[table["kind"] == ALL_KINDS.index(kind)].mean().item()
            for kind in ("shift", "same", "other", "noise")}
    assert min(mean["shift"], mean["same"]) > max(mean["other"], mean["noise"]), mean


def test_refined_detail_is_nearer_than_that_of_the_grid():
    table = scenes(64, 3, 2).table("test")
    chosen = table["kind"] == ALL_KINDS.index("shift")
    error = {}
    for refine in (False, True):
        total = 0.0
        for x, r in zip(table["x"][chosen] / 255, table["reference"][chosen] / 255):
            low = enlarge_images(reduce_images(x[None]))[0]
            total += (low + swap_detail(low, r, refine)[0] - x).square().mean().item()
        error[refine] = total
    assert error[True] < 0.8 * error[False], error


def test_training_uses_the_chosen_kinds_only():
    model = GatedTransfer(SHAPE, 4, 1, 4, 1, kinds=GOOD)
    table = model.detail_table(data().table("train"))
    assert set(table["kind"].tolist()) == set(GOOD) and len(table["x"]) == 9


def test_inputs_that_do_not_fit_are_refused():
    model, small = models()["gated"], torch.rand(2, 3, 8, 8)
    for bad in (torch.rand(2, 3, 8, 8), torch.rand(1, 3, 16, 16),
                torch.rand(2, 3, 18, 16)):
        with pytest.raises(ValueError, match="sides that 4 divides, from 12"):
            model.upscale(small, bad)
    for bad in (small[:, :1], small[:, :, :2], 2 * small + 1, small[0], "image"):
        with pytest.raises(ValueError, match="accepted"):
            model.upscale(bad)
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        SRNTT(SHAPE, weight="sigmod")


def test_quality_is_that_of_the_definitions():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    made = (x + 0.1).clamp(0, 1)
    found = quality(0.8 * x + 0.1, 0.8 * x)
    assert found["psnr_rgb"] == pytest.approx(20, abs=1e-3)
    assert found["psnr"] == pytest.approx(20, abs=1e-3)
    assert quality(made, x)["ssim"] < 1 - 1e-4
    values = torch.tensor([0, 1, 2, 4, 3.0])
    assert rank_correlation(torch.arange(5.0), values) == pytest.approx(0.9)


def test_a_method_that_copies_the_reference_has_its_rows():
    table = data().table("test")
    rows = reference_rows("copy", "", table, lambda small, reference: reference)
    kinds = {r["at"]["reference"] for r in rows if r["metric"] == "psnr"}
    assert kinds == set(ALL_KINDS)
    assert sum(r["metric"] == "rank_correlation" for r in rows) == 1
