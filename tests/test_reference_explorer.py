"""The explorer of references: what it shows is what its code makes, at every weight."""

import datetime
import html
import io
import re

import pytest
import torch
from PIL import Image

import condgen as cg
from condgen import reference_explorer
from condgen.explore import sheet_png
from condgen.matching import enlarge_images
from condgen.models.gated_transfer import GatedTransfer
from condgen.reference_explorer import explore_references, middle
from condgen.superres import upscale


def little():
    torch.manual_seed(0)
    model = GatedTransfer((3, 32, 32), 6, 1, 6, 1)
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    model.slope.data.copy_(torch.tensor([4.0, 4.0, 2.0, 2.0, -4.0]))
    return model


def setting():
    g = torch.Generator().manual_seed(0)
    rand = lambda *sides: torch.rand(3, *sides, generator=g)
    photos = {"a": rand(7, 9), "b <": rand(10, 8)}
    references = {"one": rand(20, 24), "two": rand(30, 17)}
    return explore_references(photos, references, little())


def shown_code(panel):
    return html.unescape(re.search("<pre>(.*)</pre>", panel.text.value, re.S)[1])


def made_by_code(panel):
    return eval(shown_code(panel), {
        "upscale": upscale, "photos": panel.photos, "references": panel.references,
        "model": panel.model})


def file_of(image, name="new.png"):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return ({"name": name, "type": "image/png", "size": len(stream.getvalue()),
             "content": memoryview(stream.getvalue()),
             "last_modified": datetime.datetime(2026, 1, 1)},)


@pytest.mark.parametrize("weight", [0.0, 0.35, 1.0, 2.0])
@pytest.mark.parametrize("chosen", [("one",), ("one", "two"), ()])
def test_the_result_is_what_the_shown_code_makes(weight, chosen):
    panel = setting()
    panel.photo.value, panel.reference.value = "b <", chosen
    panel.weight.value = weight
    assert torch.equal(made_by_code(panel), panel.result)
    assert torch.equal(panel.images[1], panel.result)
    assert panel.images.shape == (4, 3, 40, 32)
    assert torch.equal(panel.images[0], enlarge_images(panel.photos["b <"][None])[0])
    assert panel.picture.value == sheet_png(panel.images)


def test_weight_zero_is_the_result_without_references():
    panel = setting()
    panel.weight.value = 0.0
    alone = upscale(panel.photos["a"], (), panel.model, None, False)
    assert torch.equal(panel.result, alone)
    assert (panel.images[2] == 0.5).all() and (panel.images[3] == 0).all()
    panel.weight.value, panel.reference.value = 1.0, ()
    assert torch.equal(panel.result, alone) and panel.scale == 0


def test_a_move_of_the_slider_changes_the_pictures():
    panel = setting()
    before, sheet = panel.images.clone(), panel.picture.value
    panel.weight.value = 0.5
    assert panel.picture.value != sheet
    assert [torch.equal(a, b) for a, b in zip(before, panel.images)] == [
        True, False, False, False]


def test_the_difference_has_the_stated_scale_and_sign():
    panel = setting()
    alone = upscale(panel.photos["a"], (), panel.model, None, False)
    largest = (panel.made - panel.base).abs().max()
    assert f"{largest:.3f}" in panel.text.value and panel.scale == largest
    for weight in (1.0, 0.5):
        panel.weight.value = weight
        shown = 2 * panel.scale * (panel.images[2] - 0.5)
        assert torch.allclose(shown, panel.result - alone, atol=1e-6)
    gate = panel.gate.clone()
    assert gate.min() > 0 and torch.equal(panel.images[3], (0.5 * gate).expand(3, -1, -1))


def test_a_move_matches_nothing_anew(monkeypatch):
    panel = setting()
    monkeypatch.setattr(reference_explorer, "tile_pairs", lambda *_: pytest.fail("work"))
    panel.weight.value = 0.4
    with pytest.raises(BaseException, match="work"):
        panel.photo.value = "b <"


def test_loaded_files_are_added_and_chosen():
    panel = setting()
    panel.load_photo.value = file_of(Image.new("RGB", (40, 8), (9, 99, 199)))
    assert panel.photo.value == "new.png" and panel.photo.options[-1] == "new.png"
    assert panel.images.shape == (4, 3, 32, 160) and not panel.load_photo.value
    panel.load_reference.value = file_of(Image.new("L", (403, 14), 50))
    assert panel.reference.value == ("new.png",)
    assert panel.references["new.png"].shape == (3, 12, 384)
    assert torch.equal(made_by_code(panel), panel.result)


BAD = {"load_photo": (Image.new("RGB", (2, 9)), "2 × 9 pixels; accepted: 3 or more"),
       "load_reference": (Image.new("RGB", (11, 19)), "accepted: 12 or more along")}


@pytest.mark.parametrize("which", BAD)
def test_files_that_cannot_be_used_are_explained(which):
    panel = setting()
    image, said = BAD[which]
    before, upload = panel.picture.value, getattr(panel, which)
    for file, text in ((file_of(image), said), (
            ({**file_of(image)[0], "content": memoryview(b"text"), "name": "<x>"},),
            "&lt;x&gt;: it is damaged")):
        upload.value = file
        assert 'role="alert"' in panel.alert.value and text in panel.alert.value
        assert panel.picture.value == before
        assert [*panel.photos] == ["a", "b <"] and [*panel.references] == ["one", "two"]
    panel.load_photo.value = file_of(Image.new("RGB", (9, 9)))
    assert panel.alert.value == ""


def test_large_images_are_cut_to_their_middle():
    x = torch.arange(5 * 8.0).view(1, 5, 8)
    assert torch.equal(middle(x, 4), x[:, 0:4, 2:6]) and middle(x, 9) is not None
    panel = explore_references({"big": torch.rand(3, 99, 100)}, {}, little())
    assert panel.images.shape == (4, 3, 384, 384)


def test_without_arguments_it_shows_a_drawn_scene():
    panel = explore_references()
    assert panel.reference.value == ("same textures",)
    assert {"other textures", "noise"} < {*panel.references}
    assert panel.alert.value == ""


def test_wrong_images_and_models_are_refused():
    photo, reference = torch.rand(3, 9, 9), torch.rand(3, 12, 12)
    with pytest.raises(ValueError, match="photos given as Tensor; accepted: a mapping"):
        explore_references(photo)
    with pytest.raises(ValueError, match="no photos; accepted: one or more"):
        explore_references({}, {"r": reference})
    with pytest.raises(ValueError, match="a photo of shape .*accepted"):
        explore_references({"a": photo[:1]}, {}, little())
    with pytest.raises(ValueError, match="a reference of shape .*sides of 12 or more"):
        explore_references({"a": photo}, {"r": reference[:, 1:]}, little())
    with pytest.raises(ValueError, match="SISR; accepted: GatedTransfer"):
        explore_references({"a": photo}, {}, cg.SISR((3, 32, 32), 4, 1))
