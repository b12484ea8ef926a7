"""Several references, and the weight of what they add."""

import pytest
import torch

from condgen.experiments import references
from condgen.experiments.references import (
    draw_references, first_share, several_rows, weight_rows)
from condgen.lab import Lab, find_experiment
from condgen.matching import reduce_images
from condgen.models.gated_transfer import GatedTransfer, cell_maps, swap_detail
from condgen.models.srntt import SRNTT
from condgen.scenes import draw_scene, paint, pixel_centres

SEED = ("check", 0)


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
    model.slope.data.copy_(torch.tensor([4.0, 4.0, -4.0]))
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
