"""A training whose rounds wait, for tests that interrupt it in other processes."""

import time
from functools import cache

import torch
from torch import nn

from condgen.contracts import Model, Player, Stage
from condgen.data import digits
from condgen.training import fit


WAIT = 0.02  # seconds


class Points:
    """Forty points in the plane."""

    name, sha256 = "points", "0"

    def table(self, split):
        """Points and the sums of their coordinates."""
        x = torch.linspace(-1, 1, 80).view(40, 2)
        return {"x": x, "y": x.sum(1, keepdim=True)}


class Slow(Model):
    """A linear model, trained in 120 rounds."""

    def __init__(self):
        super().__init__((2, 1, 1))
        self.net = nn.Linear(2, 1)

    def loss(self, batch):
        """Squared error with noise."""
        time.sleep(WAIT)
        error = self.net(batch.x) - batch.y + batch.randn("e", 1)
        return {"error": (1.0, error.square().mean())}

    def stages(self):
        """One stage with one player."""
        adam = torch.optim.Adam(self.parameters(), 0.01)
        players = lambda stage: [Player("p", self.parameters(), self.loss, adam)]
        return [Stage("slow", 8 * 120, 8, players)]


def train_slowly(folder, seconds):
    """The task: train in a folder."""
    torch.manual_seed(0)
    fit(Slow(), Points(), folder, progress=False)


@cache
def kept_digits(tier):
    """The digits, read once."""
    return digits()
