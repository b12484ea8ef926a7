"""Explorers of codes and of a controller: what they show is what their code makes."""

import html
import io
import re

import pytest
import torch
from PIL import Image

from condgen.controller import Controller, LaggedPlant, settling_step, step_response
from condgen.explore import sheet_png
from condgen.latent_explorer import (
    attribute_directions, explore_controller, explore_latents)
from condgen.models.vae import VAE


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
