"""Several references, the weight's experiment, and matches in VGG-19's features."""

import pytest
import torch

from condgen.experiments import references
from condgen.experiments.references import (
    VGG_FILE, VGG19Features, draw_references, first_share, matching_quality,
    place_errors, several_rows, texture_numbers, vgg_rows, weight_rows)
from condgen.lab import Lab, find_experiment
from condgen.folders import data_folder
from condgen.matching import patch_corners, reduce_images
from condgen.models.gated_transfer import GatedTransfer, cell_maps, swap_detail
from condgen.models.srntt import SRNTT
from condgen.scenes import draw_scene, paint, pixel_centres, scene_pairs, scenes
from condgen.training import fit

SEED = ("check", 0)


def weights():
    try:
        folder = data_folder()
    except (ValueError, OSError):
        return None
    return folder and (folder / VGG_FILE).is_file()


needs_vgg = pytest.mark.skipif(not weights(), reason="no weights in $CONDGEN_DATA")


def grey_scene(size, seed):
    textures, layout = draw_scene(size, seed)
    base = torch.arange(1.0, 5)[:, None].expand(-1, 3) / 8
    return {**textures, "colours": 0 * textures["colours"], "base": base}, layout


@pytest.mark.parametrize("group, wanted", [
    ("same", lambda k: {0, 1, 2, 3}), ("other", lambda k: set()),
    ("one same", lambda k: {0, 1, 2, 3} if k == 0 else set()),
    ("parts", lambda k: {k % 4})])
def test_each_group_has_the_textures_of_its_table(group, wanted, monkeypatch):
    monkeypatch.setattr(references, "draw_scene", grey_scene)
    seen = [set() for _ in range(5)]
    for s in range(3):
        for k, x in enumerate(draw_references(96, ("check", s), group, 5)):
            seen[k] |= {i for i in range(4)
                        if ((x - (i + 1) / 8).abs().amax(0) < 1e-6).any()}
    assert seen == [wanted(k) for k in range(5)]


def test_references_of_a_group_differ_and_more_add_to_fewer():
    few, many = (draw_references(32, SEED, "same", n) for n in (2, 4))
    assert all(map(torch.equal, few, many)) and not torch.equal(*few)


def test_the_first_share_is_that_of_the_right_reference():
    x = paint(*draw_scene(96, SEED), pixel_centres(96))
    small = reduce_images(x[None])[0]
    noise = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert first_share(small, [x]) == 1
    assert first_share(small, [x, noise]) > 0.95
    assert first_share(small, [noise, x]) < 0.05


def test_texture_numbers_are_those_of_the_pictures():
    pairs = scene_pairs(96, 1, ("same",), "check")
    own, other = texture_numbers(96, ("check", 0), "same")
    textures, _ = draw_scene(96, ("check", 0))
    for picture, numbers in ((pairs["x"], own), (pairs["reference"], other)):
        for k in numbers.unique():
            mean = picture[0].float()[:, numbers == k].mean(1) / 255
            if (numbers == k).sum() > 1_000:
                assert (mean - textures["base"][k]).abs().max() < 0.1
    assert not torch.equal(own, other)


def test_errors_of_places_count_pixels_and_leave_outsiders():
    corners = patch_corners(torch.arange(36).view(6, 6), 8, 4)
    assert place_errors(corners, torch.zeros(2), 32).tolist() == [0] * 36
    off = place_errors(corners, torch.tensor([-3.0, 1.0]), 32)
    assert len(off) == 5 * 5 and set(off.tolist()) == {3}


def test_right_matches_are_counted_and_wrong_ones_not():
    value = {}
    for name, maps in (("cells", cell_maps),
                       ("noise", lambda x: torch.rand(1, 4, 24, 24))):
        for metric, step, number in matching_quality(maps, 96, SEED, "shift"):
            value[name, metric, step] = number
    assert value["cells", "right_share", "refined"] > 0.9
    assert value["cells", "place_share", "refined"] > 0.1
    assert value["cells", "psnr_gain", "refined"] > 4
    assert value["noise", "right_share", "grid"] < 0.6
    assert value["noise", "place_share", "grid"] < 0.05
    assert value["noise", "psnr_gain", "grid"] < 0


@pytest.mark.parametrize("name, rows", [("references", several_rows),
                                        ("weight", weight_rows)])
def test_rows_of_the_model_that_ships(name, rows, tmp_path):
    lab = Lab(find_experiment(f"srntt/{name}"), "tiny", 0, tmp_path, progress=False)
    found = {(r["metric"], *r["at"].values()): r["value"] for r in rows(lab)}
    if name == "references":
        assert ("psnr", 0, "none") in found and ("seconds", 2, "parts") in found
        assert found["right_share", 1, "one same"] == 1
    else:
        assert found["psnr", 0.0, "same"] != found["psnr", 1.0, "same"]


def test_a_model_takes_other_maps_for_its_matches():
    torch.manual_seed(0)
    low, reference = torch.rand(3, 32, 32), torch.rand(3, 40, 36)
    maps = lambda x: cell_maps(x) * torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    plain, given = swap_detail(low, reference), swap_detail(low, reference, True, maps)
    assert not torch.equal(plain[1], given[1])
    model = GatedTransfer((3, 32, 32), 4, 1, 4, 1)
    model.slope.data.copy_(torch.tensor([4.0, 4.0, 2.0, 2.0, -4.0]))
    small = torch.rand(1, 3, 8, 8)
    before = model.upscale(small, reference[None])
    model.match_maps = maps
    assert not torch.equal(before, model.upscale(small, reference[None]))
    assert "match_maps" not in model.state_dict()


def test_features_that_do_not_train_have_no_stage():
    model = SRNTT((3, 32, 32), 4, 1, 2, adversarial=False)
    assert [s.name for s in model.stages()] == ["features", "reconstruction"]
    model.features = torch.nn.Identity()
    assert [s.name for s in model.stages()] == ["reconstruction"]


def test_missing_weights_are_said(monkeypatch, tmp_path):
    for value in (str(tmp_path), ""):
        monkeypatch.setenv("CONDGEN_DATA", value)
        with pytest.raises(FileNotFoundError, match="weights of VGG-19.*accepted: .CON"):
            VGG19Features(torch.rand(1, 3, 16, 16))


@needs_vgg
def test_maps_are_those_of_torchvisions_layers():
    from safetensors.torch import load_file
    from torchvision.models import vgg19

    layers = vgg19(weights=None).features[:12].eval()
    state = {k.removeprefix("features."): v.float()
             for k, v in load_file(data_folder() / VGG_FILE).items()}
    layers.load_state_dict({k: state[k] for k in layers.state_dict()})
    x = scenes(32, 3, 2).table("test")["x"][:2].float() / 255
    vgg, h = VGG19Features(x), 255 * x - torch.tensor(
        [123.68, 116.779, 103.939]).view(3, 1, 1)
    maps, wanted = vgg(x), []
    for k, layer in enumerate(layers):
        h = layer(h)
        wanted += [h] if k in (1, 6, 11) else []
    for a, b in zip(maps, wanted, strict=True):
        assert a.shape == b.shape and torch.allclose(a.square().mean(), torch.tensor(1.0))
        assert torch.allclose(a * b.square().mean().sqrt(), b, rtol=1e-4, atol=1e-3)
    assert not any(p.requires_grad for p in vgg.parameters())


@needs_vgg
def test_rows_of_all_features(tmp_path):
    lab = Lab(find_experiment("srntt/vgg"), "tiny", 0, tmp_path, rounds=1,
              progress=False)
    rows = vgg_rows(lab)
    assert {r["variant"] for r in rows} == {"mean colours", "embedded", "VGG-19"}
    assert {r["metric"] for r in rows} == {"right_share", "place_share", "psnr_gain"}


@needs_vgg
def test_srntt_trains_with_the_features_of_vgg():
    data = scenes(32, 3, 2)
    torch.manual_seed(0)
    model = SRNTT(data.shape, 4, 1, feature_width=64, adversarial=False)
    model.features = VGG19Features(data.table("train")["x"][:4].float() / 255)
    before = [p.clone() for p in model.features.parameters()]
    run = fit(model, data, None, images={"reconstruction": 16}, progress=False)
    assert run.finished and run.log[-1]["generator.l1"] > 0
    assert all(map(torch.equal, before, model.features.parameters()))
