"""Edits along directions in a world where attributes are numbers of the code."""

from types import SimpleNamespace

import pytest
import torch

from condgen.experiments.crg_edits import (
    PAINTED, TURN_STEPS, TURNS, Moves, beardless_adults, mean_rows, pose_reader,
    pose_rows, shared, switch_rows, turn_numbers, turned, two_rows)
from condgen.experiments.vigan_faces import DESCRIBED
from condgen.faces import (
    FACTORS, edit_factors, person_factors, render, sample_factors)
from condgen.results import row

N = len(DESCRIBED)


class Axes:
    """Images are codes: eight attributes, and three numbers that say who it is."""

    encode = decode = reconstruct = staticmethod(lambda x: x)


class Skewed(Axes):
    """Its decoder lets each attribute change the next one too."""

    @staticmethod
    def decode(z):
        out = z.clone()
        out[:, 1:N] += 0.8 * z[:, :N - 1]
        return out


class Reader:
    """Reads the numbers of the code themselves."""

    def of(self, x, asked):
        read = {name: x[:, j] for j, name in enumerate(DESCRIBED)}
        right = {name: (x[:, j] > 0.5) == (asked[:, j] > 0.5)
                 for j, name in enumerate(DESCRIBED)}
        right["identity"] = (x[:, N:] - asked[:, N:]).abs().amax(1) < 0.1
        return SimpleNamespace(predicted=read, correct=right)

    def probabilities(self, seen):
        return torch.stack([seen.predicted[name] for name in DESCRIBED], 1)


def world(n=300, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = (torch.rand(n, N, generator=g) < 0.4).float()
    x, switches = torch.cat([c, torch.randn(n, 3, generator=g)], 1), {}
    for j, name in enumerate(DESCRIBED):
        for to, word in ((1, "on"), (0, "off")):
            index = (c[:, j] == 1 - to).nonzero()[:, 0]
            target = x[index].clone()
            target[:, j] = to
            switches[name, word] = SimpleNamespace(index=index, target=target,
                                                   asked=target)
    return SimpleNamespace(x=x, c=c, asked=x, switches=switches)


def rows_of(model, moves=Moves):
    faces, reader = world(), Reader()
    own = moves(model, world(seed=1))
    found = switch_rows(model, own, faces, reader, reader.of(faces.x, faces.asked))
    return own, faces, {(r["variant"], r["metric"], r["at"]["attribute"],
                         r["at"]["to"]): r["value"] for r in found}


class ForwardsOnly(Moves):
    """Forgets that taking off goes backwards."""

    def edit(self, model, x, **factors):
        return super().edit(model, x, **{k: abs(v) for k, v in factors.items()})


class RandomDirections(Moves):
    def __init__(self, model, known):
        super().__init__(model, known)
        g = torch.Generator().manual_seed(3)
        self.steps = {k: torch.randn(v.shape, generator=g) for k, v in self.steps.items()}


@pytest.mark.parametrize("kind, right", [
    (Moves, True), (ForwardsOnly, False), (RandomDirections, False)])
def test_exact_directions_put_on_and_take_off(kind, right):
    _, _, found = rows_of(Axes, kind)
    perfect = all(found["five pairs", "attribute_accuracy", "all", to] == 1
                  and found["five pairs", "interference", "all", to] == 0
                  for to in ("on", "off"))
    assert perfect == right


def test_without_an_edit_nothing_is_read_and_nothing_changes():
    _, _, found = rows_of(Axes)
    for to in ("on", "off"):
        assert found["not edited", "attribute_accuracy", "all", to] == 0
        assert found["not edited", "interference", "all", to] == 0
        assert found["drawn, reconstructed", "attribute_accuracy", "all", to] == 1


def test_interference_is_seen():
    _, _, found = rows_of(Skewed)
    assert found["five pairs", "interference", "all", "on"] > 0.05


def test_two_at_once_are_read_together():
    own, faces, _ = rows_of(Axes)
    rows = two_rows(Axes, own, faces, Reader(), 50)
    found = {(r["variant"], r["metric"], r["at"]["attributes"]): r["value"] for r in rows}
    for pair in {r["at"]["attributes"] for r in rows}:
        assert found["both at once", "attribute_accuracy", pair] == 1
        assert abs(found["both at once", "direction_cosine", pair]) < 1e-4
    own.steps["hat"] = 0 * own.steps["hat"]
    rows = two_rows(Axes, own, faces, Reader(), 50)
    without = [r["value"] for r in rows if r["variant"] == "both at once"
               and r["metric"] == "attribute_accuracy"
               and "hat" in r["at"]["attributes"]]
    assert without and not any(without)


def test_drawings_of_two_attributes_have_neither():
    faces = world()
    index = shared(faces, "glasses", "hat", 20)
    columns = [DESCRIBED.index(name) for name in ("glasses", "hat")]
    assert len(index) == 20 and not faces.c[index][:, columns].any()


def test_means_tell_on_and_off_apart():
    rows = [row("CRG", "interference", value, "five pairs", {"attribute": name, "to": to})
            for name, to, value in (("hat", "on", 0.2), ("beard", "on", 0.4),
                                    ("hat", "off", 0.6))]
    found = {r["at"]["to"]: r["value"] for r in mean_rows(rows)}
    assert found == {"on": pytest.approx(0.3), "off": pytest.approx(0.6)}


def test_a_painted_beard_leaves_a_woman_a_woman():
    factors = sample_factors(500, torch.Generator().manual_seed(0))
    able, men = beardless_adults(factors)
    women = factors[able & ~men]
    assert (FACTORS.unpack(women)["age"] >= 18).all() and len(women) > 50
    for name, (before, change) in PAINTED.items():
        own = factors[able & (men == bool(before))]
        after = FACTORS.unpack(edit_factors(own, **change))
        assert (after["beard"] == ("beard" in name)).all()
        assert (after["masculine"] == (name != "painted beard")).all()


def asked(name="yaw"):
    return TURNS[name] * TURN_STEPS


@pytest.mark.parametrize("slope, other, rank", [(0.8, 0.1, 1), (-0.5, 0.0, -1),
                                                (0.0, 0.3, 0)])
def test_turns_are_read_by_angle(slope, other, rank):
    start = torch.linspace(-10, 10, 7)[:, None]
    for column in (0, 1):
        lines = [start + slope * asked(), start + other * asked()]
        read = torch.stack(lines if column == 0 else lines[::-1], 2)
        found = turn_numbers(read, column, asked())
        assert found == pytest.approx({"rank_correlation": rank, "turn_ratio": slope,
                                       "other": other}, abs=1e-6)


def test_the_regression_reads_drawn_heads():
    read, explained = pose_reader("tiny").read, pose_reader("tiny").explained()
    assert explained["yaw"] > 0.9 and explained["pitch"] > 0.5
    factors = sample_factors(40, torch.Generator().manual_seed(1))
    for column, name in enumerate(TURNS):
        angles = torch.stack([read(turned(factors, name, angle, 32))
                              for angle in asked(name).tolist()], 1)
        found = turn_numbers(angles, column, asked(name))
        assert found["rank_correlation"] > 0.7 and found["turn_ratio"] > 0.5
        assert abs(found["other"]) < 0.3


class Posed:
    """Codes of a linear world: the two angles, on axes, or those of another image."""

    def __init__(self, order):
        self.order = order

    def encode(self, x):
        return pose_reader("tiny").read(x).float()[:, self.order]

    def decode(self, z):
        yaw, pitch = z.clamp(-19.9, 19.9)[:, self.order].unbind(1)
        factors = edit_factors(person_factors(n=len(z)), yaw=yaw, pitch=pitch)
        return render(factors, 32)


def test_a_model_whose_codes_are_angles_turns_heads():
    model = Posed([0, 1])
    lab = SimpleNamespace(
        tier="tiny", size={"pairs": 3, "edited": 12},
        train=lambda name: SimpleNamespace(model=model))
    found = {(r["variant"], r["metric"], *r["at"].values()): r["value"]
             for r in pose_rows(lab)}
    for name in TURNS:
        for kind in ("one pair", "five pairs", "drawn", "drawn, reconstructed"):
            assert found[kind, "rank_correlation", name] > 0.6
            assert 0.4 < found[kind, "turn_ratio", name] < 1.5
    assert found["drawn", "mae", "yaw"] == 0
    # two pixels of the background, which no turn changes
    stuck = SimpleNamespace(encode=lambda x: 10 * x[:, :2, 0, 0], decode=model.decode)
    lab.train = lambda name: SimpleNamespace(model=stuck)
    rows = [r for r in pose_rows(lab) if r["metric"] == "turn_ratio"
            and r["variant"] in ("one pair", "five pairs")]
    assert all(abs(r["value"]) < 0.2 for r in rows)
