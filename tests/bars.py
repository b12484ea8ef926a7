"""Data for tests of small generators: images of bars whose conditions can be seen."""

import torch

from condgen.conditions import Binary, Classes, Code, Real, Schema
from condgen.contracts import Batch, Noise
from condgen.training import fit

BAR, BOLD, LIGHT = Classes("bar", 3), Binary("bold"), Real("light", 0, 10)
KNOWN = Schema([BAR, BOLD, LIGHT])
MANY = KNOWN + Code("u", 2) + Code("b", 1, "binary")


def seeded(seed=0):
    """A generator at the start of a seed."""
    return torch.Generator().manual_seed(seed)


class Bars:
    """A bright bar at one of three places, bold or not, on a
    ground of varying light.
    """

    name, sha256 = "bars", "0"

    def __init__(self, conditions=(BAR,)):
        self.conditions = Schema(conditions)

    def table(self, split):
        """Images as bytes, and their packed conditions."""
        n, g = {"train": 300, "val": 60, "test": 120}[split], seeded(len(split))
        values = {"bar": torch.arange(n) % 3, "bold": torch.rand(n, generator=g) < 0.5}
        values["light"] = 10 * torch.rand(n, generator=g)
        x = (20 * torch.rand(n, 1, 8, 8, generator=g)
             + 4 * values["light"].view(-1, 1, 1, 1))
        for i in range(n):
            left = int(values["bar"][i]) * 3
            x[i, 0, :, left : left + (2 if values["bold"][i] else 1)] += 150
        asked = {name: values[name] for name in self.conditions.names}
        return {"x": x.round().to(torch.uint8), "c": self.conditions.pack(n, **asked)}

    def split_images(self, split):
        """Images in [0, 1]."""
        return self.table(split)["x"].float() / 255


def batch_of(conditions, n=32):
    """The first n training images as a batch, with their supervised conditions."""
    table = Bars(Schema(conditions).supervised).table("train")
    return Batch({name: t[:n] for name, t in table.items()},
                 Noise(("test",), slice(None), n))


def places(x):
    """Where each image's bar is, by its brightest first column, `(n,)`."""
    columns = [x[..., left : left + 1].mean((1, 2, 3)) for left in (0, 3, 6)]
    return torch.stack(columns, 1).argmax(1)


def whole_and_resumed(build, data, folder, images=160):
    """A model trained at once, and one that was stopped after each round."""
    whole, parts = build(), build()
    fit(whole, data, folder / "a", images=images, progress=False)
    while not fit(parts, data, folder / "b", images=images, budget=0,
                  progress=False).finished:
        parts = build()
    return whole, parts
