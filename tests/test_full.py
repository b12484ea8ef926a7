"""Tier full: every recipe builds, has the paper's size where it prints
one, and makes a step.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from condgen.conditions import Binary, Classes, Schema
from condgen.contracts import Batch, Noise
from condgen.recipes import declared, resolve

RECIPES = declared("RECIPES")
LARGE = 120_000_000  # parameters; a step of more does not fit beside other tests
STAND_IN = {  # data sets that are neither embedded nor small: shape at tier full, conditions
    "mnist": ((1, 32, 32), [Classes("digit", 10)]),
    "celeba": ((3, 64, 64), [Classes("identity", 201),
                             *(Binary(f"attribute{k}") for k in range(9))]),
    "progressive-faces": ((3, 64, 64), []),
    "pioneer": ((3, 64, 64), []),
    "lfw": ((3, 64, 64), [Classes("identity", 35)]),
    "printed": ((3, 64, 64), [Classes("identity", 200),
                              *(Binary(f"attribute{k}") for k in range(6))]),
    "utkface": ((3, 128, 128), [Classes("age", 10)]),
    "cifar10": ((3, 32, 32), [Classes("object", 10)]),
}


def described(name):
    """Shape and conditions of a recipe's data at tier full, without its images."""
    for word, (shape, conditions) in STAND_IN.items():
        if word in name:
            return SimpleNamespace(shape=shape, conditions=Schema(conditions))
    small = resolve(RECIPES[name].data)("tiny")
    return SimpleNamespace(shape=small.shape, conditions=small.conditions)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def different():
    """One recipe for each model class with its arguments; other data
    add conditions only.
    """
    photos = ("faces", "celeba", "lfw", "printed", "portraits")
    found = {}
    for name, plan in RECIPES.items():
        # images with a reference; see test_srntt.py
        if "scenes" in plan.data or "photo_pairs" in plan.data:
            continue
        kind = "photo" if any(word in name for word in photos) else plan.data
        facts = plan.config("full")
        found.setdefault(
            (plan.model, str(facts["arguments"]), str(facts["codes"]), kind), name)
    return [*found.values()]


@pytest.mark.parametrize("name", different())
def test_full_model_builds_and_makes_a_step(name):
    """On the meta device first, which takes no memory; then, if it fits, one
    round of two images.
    """
    plan, data = RECIPES[name], described(name)
    with torch.device("meta"):
        try:
            size = parameters(plan.build(data, "full"))
        except (NotImplementedError, RuntimeError):
            # some starts are computed from weights
            size = None
    if size is not None and size > LARGE:
        return
    torch.manual_seed(0)
    model = plan.build(data, "full")
    assert {stage.name for stage in model.stages()} == {*plan.images["full"]}
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, *data.shape, generator=g)
    c = data.conditions.draw(2, lambda _, k: torch.rand(2, k, generator=g))
    known = c if model.conditions.supervised else c[:, :0]
    if known.shape[1]:
        model.store_condition_rows(known)
    for stage in model.stages():
        fields = {"x": x, "c": known}
        fields = stage.data(fields) if stage.data else fields
        n = len(next(iter(fields.values())))
        batch = Batch(fields, Noise(("full",), slice(None), n))
        if stage.build:
            stage.build()
        if stage.on_enter:
            # a fit that needs more images
            with contextlib.suppress(ValueError, RuntimeError):
                stage.on_enter(batch)
        for player in stage.players(stage):
            total = sum(weight * value for weight, value in player.loss(batch).values())
            if player.params:
                total.backward()
            assert bool(torch.isfinite(total))
