"""Explorers of codes and of a controller: what they show is what their code makes."""

import html
import io
import re

import pytest
import torch
from PIL import Image

from condgen.conditions import Binary, Classes
from condgen.controller import Controller, LaggedPlant, settling_step, step_response
from condgen.explore import sheet_png
from condgen.latent_explorer import (
    DirectionExplorer, attribute_directions, explore_controller, explore_directions,
    explore_edits, explore_latents)
from condgen.models.attribute_directions import TwoNormals
from condgen.models.vae import VAE
from condgen.models.vigan import ViGAN


def setting():
    torch.manual_seed(0)
    model = VAE((1, 8, 8), latent=4, width=4)
    return model, torch.rand(12, 1, 8, 8), torch.arange(12) < 5


def code_of(panel):
    return html.unescape(re.search("<pre>(.*)</pre>", panel.text.value, re.S)[1])


def test_directions_are_differences_of_mean_codes():
    model, x, has = setting()
    step = attribute_directions(model, x, {"hat": has})["hat"]
    z = model.encode(x)
    assert torch.allclose(step, z[:5].mean(0) - z[5:].mean(0), atol=1e-6)


@pytest.mark.parametrize("labels", [torch.ones(12), torch.zeros(12), torch.ones(3)])
def test_directions_need_both_values_for_each_image(labels):
    model, x, _ = setting()
    with pytest.raises(ValueError, match="'hat'.*accepted"):
        attribute_directions(model, x, {"hat": labels})


def test_the_picture_is_what_the_shown_code_makes():
    model, x, has = setting()
    directions = attribute_directions(model, x, {"hat": has})
    panel = explore_latents(model, x[0], x[1], directions)
    panel.way.value, panel.weights["hat"].value = 0.5, -1.5
    place = {"torch": torch, "model": model, "a": x[0], "b": x[1],
             "directions": directions}
    first, last = code_of(panel).split("\n")
    exec(first, place)
    made = eval(last, place)
    assert panel.picture.value == sheet_png(torch.stack([x[0], made[0], x[1]]))
    assert Image.open(io.BytesIO(panel.picture.value)).size[0] > 100


def test_ends_of_the_line_are_the_codes_of_the_images():
    model, x, _ = setting()
    panel = explore_latents(model, x[0], x[1])
    for way, image in ((0.0, x[0]), (1.0, x[1])):
        panel.way.value = way
        assert torch.allclose(panel.code, model.encode(image[None]), atol=1e-6)


def test_wrong_models_images_and_directions_are_refused():
    model, x, _ = setting()
    with pytest.raises(ValueError, match="accepted: a model with encode"):
        explore_latents(torch.nn.Identity(), x[0], x[1])
    with pytest.raises(ValueError):
        explore_latents(model, x[0], x[1, :, :4])
    with pytest.raises(ValueError, match="direction 'hat'"):
        explore_latents(model, x[0], x[1], {"hat": torch.zeros(3)})


def test_controller_panel_shows_the_response_of_its_code():
    panel = explore_controller(integral=0.02)
    panel.settings["proportional"].value = 1.0
    names = {"Controller": Controller, "LaggedPlant": LaggedPlant,
             "step_response": step_response}
    plain = step_response(Controller(0.02, 1.0, 1e-5, high=float("inf")),
                          LaggedPlant(), 0.5, 1_500)
    assert torch.allclose(panel.y, plain)
    assert torch.allclose(eval(code_of(panel), names), panel.y)
    assert f"settles at step {settling_step(plain, 0.5)}" in panel.picture.value
    panel.settings["delay"].value = 40
    assert not torch.allclose(panel.y, plain)


def test_controller_panel_refuses_unknown_settings():
    with pytest.raises(ValueError, match="unknown setting 'integra'.*'integral'"):
        explore_controller(integra=1.0)


def editing():
    torch.manual_seed(0)
    model = ViGAN((1, 16, 16), [Classes("digit", 4), Binary("bold")], latent=4, width=4,
                  hidden=16).eval()
    own = {"digit": torch.arange(6) % 4, "bold": (torch.arange(6) > 2).float()}
    return model, torch.rand(6, 1, 16, 16), own


def test_an_edit_starts_at_the_description_of_the_image():
    model, x, own = editing()
    panel = explore_edits(model, x, own)
    for i in (4, 1):
        panel.pick.value = i
        asked = {"digit": int(own["digit"][i]), "bold": float(own["bold"][i])}
        assert panel.controls.values == asked
        assert torch.equal(panel.images[0], x[i]) and len(panel.images) == 2
        assert torch.equal(panel.images[1], model.edit(x[i:i + 1], **asked)[0])


def test_an_image_that_is_picked_is_drawn_once():
    model, x, own = editing()
    panel = explore_edits(model, x, own)
    calls, edit = [], model.edit
    model.edit = lambda *a, **k: calls.append(k) or edit(*a, **k)
    panel.pick.value = 3  # digit and bold both move
    assert len(calls) == 1 and calls[0] == {"digit": 3, "bold": 1.0}


def test_the_edit_is_what_the_shown_code_makes():
    model, x, own = editing()
    panel = explore_edits(model, x, own)
    panel.pick.value = 2
    panel.controls.values = {"digit": 1, "bold": 0.5}
    made = eval(code_of(panel), {"model": model, "x": x})
    assert torch.equal(made[0], panel.images[1])
    assert panel.picture.value == sheet_png(torch.stack([x[2], made[0]]))


def test_the_truth_stands_beside_the_edit_or_says_why_not():
    model, x, own = editing()

    def truth(i, asked):
        if asked["digit"] == 3:
            raise ValueError("no <3>; accepted: 0 to 2")
        return x[i] * asked["bold"]

    panel = explore_edits(model, x, own, truth)
    panel.controls.values = {"digit": 1, "bold": 0.25}
    assert torch.equal(panel.images[2], x[0] * 0.25)
    panel.controls.values = {"digit": 3}
    assert len(panel.images) == 2 and "no &lt;3&gt;" in panel.text.value
    panel.controls.values = {"digit": 2}
    assert len(panel.images) == 3 and "accepted" not in panel.text.value


def test_edits_need_a_description_of_every_image():
    model, x, own = editing()
    for described in ({"digit": own["digit"]}, own | {"bold": own["bold"][:5]}):
        with pytest.raises(ValueError, match="'bold' for each of 6 images"):
            explore_edits(model, x, described)
    with pytest.raises(ValueError, match="accepted: a model with conditions and edit"):
        explore_edits(VAE((1, 8, 8)), x, own)
    with pytest.raises(ValueError, match="empty batch"):
        explore_edits(model, x[:0], {name: v[:0] for name, v in own.items()})


def along_two(model, x):
    """Two directions that are not orthogonal, with their densities."""
    g, z = torch.Generator().manual_seed(1), model.encode(x)
    first = torch.nn.functional.normalize(torch.randn(4, generator=g), dim=0)
    other = torch.nn.functional.normalize(first + torch.randn(4, generator=g), dim=0)
    return {name: (d, TwoNormals.fit(z[:6] @ d, 1 + z[6:] @ d))
            for name, d in (("hat", first), ("beard", other))}


class OwnCodeOnly(DirectionExplorer):
    """Takes the range of the image's own code, wherever the others moved it."""

    def code(self, without=None):
        return super().code() if without is None else self.codes[
            self.pick.value:self.pick.value + 1]


@pytest.mark.parametrize("kind, right", [(DirectionExplorer, True), (OwnCodeOnly, False)])
def test_safe_ranges_end_within_the_densities(kind, right):
    model, x, _ = setting()
    directions = along_two(model, x)
    panel = kind(model, x, directions, 2.0)
    panel.pick.value, panel.lengths["beard"].value = 3, panel.lengths["beard"].max
    d, fitted = directions["hat"]
    low, high = panel.safe("hat")
    z = panel.codes[3] + panel.lengths["beard"].value * directions["beard"][0]
    ends = [((z + k * d) @ d - fitted.mean_with).item() / fitted.std_with
            for k in (low, high)]
    assert (abs(ends[0] + 2) < 1e-3 and abs(ends[1] - 2) < 1e-3) == right


def test_directions_show_image_reconstruction_and_edit():
    model, x, _ = setting()
    directions = along_two(model, x)
    panel = explore_directions(model, x, directions)
    panel.pick.value, panel.lengths["hat"].value = 2, panel.lengths["hat"].max
    place = {"model": model, "x": x, "directions": directions}
    made = eval(code_of(panel).split("\n")[-1], place)
    shown = torch.stack([x[2], model.decode(model.encode(x[2:3]))[0], panel.images[2]])
    assert panel.picture.value == sheet_png(panel.images)
    assert torch.allclose(panel.images[:2], shown[:2], atol=1e-6)
    assert torch.allclose(panel.images[2], made[0], atol=1e-2)


def test_the_panel_says_whether_an_edit_is_safe():
    model, x, _ = setting()
    panel = explore_directions(model, x, along_two(model, x))
    low, high = panel.safe("hat")
    panel.lengths["hat"].value = (low + high) / 2
    assert re.search(r"hat: k = \S+, inside", panel.text.value)
    panel.lengths["hat"].value = panel.lengths["hat"].max
    outside = not panel.safe("hat")[0] <= panel.lengths["hat"].max <= panel.safe("hat")[1]
    assert ("hat: k = " in panel.text.value) and (
        ("outside" in panel.text.value.split("beard")[0]) == outside)


@pytest.mark.parametrize("change, message", [
    ({}, "0 directions"), ({"hat": 2.0}, "length 2; accepted: length 1"),
    ({"hat": None}, "direction 'hat'")])
def test_wrong_directions_are_refused(change, message):
    model, x, _ = setting()
    d, fitted = along_two(model, x)["hat"]
    given = {name: (d * k if k else torch.ones(3), fitted) for name, k in change.items()}
    with pytest.raises(ValueError, match=message):
        explore_directions(model, x, given)
