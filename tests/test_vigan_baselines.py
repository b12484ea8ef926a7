"""Measurements of ViGAN's alternatives: summaries of edits, edits that succeed, codes
found by descent, mean vectors, what codes hold and what they agree with, each where the
answer is known.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from evaluators import NearestDigit

from condgen.conditions import Classes, Schema
from condgen.experiments.vigan import (
    PairReference, code_rows, digit_patches, pairs_of, r_squared_of_places)
from condgen.experiments.vigan_baselines import (
    LONGER, UNASKED, CodeEditor, MeanVectorEditor, agreement_rows, assignment_agreement,
    cells_of, codes_by_descent, edit_share, edit_summary, grid_rows, information_of,
    recognised_bits, thirds, unlabelled_pairs)
from condgen.recipes import find
from condgen.two_digits import digit_centroids, two_digits

PAIR = Schema([Classes("left", 10), Classes("right", 10)])


def labels_of(data, split):
    return torch.stack([*data.conditions.unpack(data.table(split)["c"]).values()], 1)


def reference(split="val"):
    data = two_digits(32, 240)
    x = data.split_images(split)
    evaluator = NearestDigit(digit_patches(x).flatten(0, 1),
                             labels_of(data, split).flatten())
    return data, PairReference(data, evaluator, 24, 100, split)


def summary(model, split="val"):
    _, real = reference(split)
    rows = edit_summary("M", "", real, model, {"weight": 1})
    assert all(r["at"]["weight"] == 1 and r["protocol"]["split"] == split for r in rows)
    return {(r["at"]["digit"], r["metric"]): r["value"] for r in rows}


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_reference_is_of_its_split(split):
    data, real = reference(split)
    assert torch.equal(real.x, data.split_images(split)[:24])
    assert torch.equal(real.labels, labels_of(data, split)[:24])


def test_an_editor_that_does_nothing_keeps_all_and_changes_none():
    found = summary(SimpleNamespace(edit=lambda x, left, right: x))
    assert found["kept", "accuracy"] == 1 and found["changed", "accuracy"] == 0
    assert found["reencoded", "accuracy"] == 1
    assert found["kept", "reconstruction_distance"] == 0


def test_an_editor_that_blanks_a_half_is_found_on_the_right_side():
    """It removes the right digit: half of the kept digits and of the changed ones."""
    found = summary(SimpleNamespace(edit=lambda x, left, right: torch.cat(
        [x[..., :16], torch.zeros_like(x[..., 16:])], 3)))
    _, real = reference()
    blank = (real.labels[:, 1] == real.read(torch.zeros(24, 2, 14, 14))[:, 1]).double()
    assert found["kept", "accuracy"] == pytest.approx(0.5 + blank.mean().item() / 2)
    assert 0.2 < found["kept", "reconstruction_distance"] < 1.5


class LinearGenerator:
    """Draws 1×4×4 images that are linear in code and description."""

    latent_size, conditions = 3, PAIR

    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.of_code, self.of_digits = (torch.randn(k, 16, generator=g) for k in (3, 20))

    def generate(self, c, z):
        return (z @ self.of_code + c.float() @ self.of_digits).view(-1, 1, 4, 4)

    def decode(self, z, **digits):
        return self.generate(self.conditions.pack(len(z), **digits), z)


def test_descent_finds_the_codes_of_generated_images():
    model, g = LinearGenerator(), torch.Generator().manual_seed(1)
    z, labels = torch.randn(5, 3, generator=g), torch.arange(10).view(5, 2)
    x = model.decode(z, left=labels[:, 0], right=labels[:, 1])
    found = codes_by_descent(model, x, labels, 300, 0.0)
    assert (found - z).abs().max() < 0.05
    wrong = codes_by_descent(model, x, labels.flip(1), 300, 0.0)  # other descriptions
    assert (wrong - z).abs().max() > 0.2
    assert codes_by_descent(model, x, labels, 300, 10.0).norm() < 0.8 * z.norm()


def test_known_codes_are_decoded_under_other_digits():
    model, z = LinearGenerator(), torch.randn(4, 3)
    editor = CodeEditor(model, z)
    left, right = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])
    made = editor.edit(torch.zeros(4, 1, 4, 4), left=left, right=right)
    assert torch.equal(made, model.decode(z, left=left, right=right))
    with pytest.raises(ValueError, match="3 images; accepted: the 4"):
        editor.edit(torch.zeros(3, 1, 4, 4), left=left, right=right)


class TwoNumbers:
    """Codes are the first two pixels; images are the codes."""

    def encode(self, x):
        return x.flatten(1)[:, :2]

    def decode(self, z):
        return z


class AddsOnly(MeanVectorEditor):
    def edit(self, x, left, right):
        return self.model.decode(self.z + self.means[0][left] + self.means[1][right])


@pytest.mark.parametrize("kind, right", [(MeanVectorEditor, True), (AddsOnly, False)])
def test_mean_vectors_move_codes_by_differences_of_means(kind, right):
    labels = torch.cartesian_prod(torch.arange(10), torch.arange(10))
    known = labels.float().view(-1, 1, 1, 2)  # the code is the two digits
    x, own = known[[5, 37, 80]] + 0.25, labels[[5, 37, 80]]
    editor = kind(TwoNumbers(), x, own, known, labels)
    same = editor.edit(x, *own.unbind(1))
    other = editor.edit(x, torch.tensor([9, 9, 9]), own[:, 1])
    wanted = torch.stack([torch.full((3,), 9.25), own[:, 1] + 0.25], 1)
    assert (torch.allclose(same, x.flatten(1), atol=1e-5)
            and torch.allclose(other, wanted, atol=1e-5)) == right


def test_readers_find_what_codes_hold():
    data, real = reference()
    train = data.split_images("train")
    places = SimpleNamespace(encode=lambda x: digit_centroids(x).flatten(1) - 16)
    found = {r["at"]["in codes"]: r["value"]
             for r in code_rows("M", places, data, real, 240)}
    assert found["places"] > 0.999 and found["left"] < 0.5
    known = {tuple(x.flatten().tolist()): c for x, c in zip(
        torch.cat([train, real.x]), torch.cat([labels_of(data, "train"), real.labels]))}
    digits = SimpleNamespace(encode=lambda x: torch.stack(
        [F.one_hot(known[tuple(v.flatten().tolist())], 10).flatten() for v in x]).float())
    found = {r["at"]["in codes"]: r["value"]
             for r in code_rows("M", digits, data, real, 240)}
    assert found["left"] == found["right"] == 1 and found["places"] < 0.5
    noise = torch.randn(240, 2), torch.randn(24, 2)
    assert r_squared_of_places(noise[0], train, noise[1], real.places) < 0.3


def test_the_grid_is_measured_on_validation_images():
    data, real = reference()

    def train(name, **at):
        def sample(n, temperature, generator, left, right):
            chosen = torch.randint(24, (n,), generator=generator)
            return real.x[chosen]
        changes = at["information_weight"] > 0
        return SimpleNamespace(model=SimpleNamespace(
            conditions=PAIR, sample=sample,
            edit=lambda x, left, right: x.roll(1 if changes else 0, 0)))

    lab = SimpleNamespace(tier="tiny", data=data, seed=0, train=train,
                          size={"n": 24, "known": 100},
                          evaluator=lambda name: real.evaluator)
    rows = grid_rows(lab)
    assert {r["protocol"]["split"] for r in rows} == {"val"}
    points = {(r["at"].get("reconstruction_weight"), r["at"].get("information_weight"))
              for r in rows}
    assert points == {(1000.0, 10.0), (1000.0, 0.0), (None, None)}
    changed = [r["value"] for r in rows if r["metric"] == "accuracy"
               and r["at"].get("digit") == "changed"]
    assert rows[-1]["value"] == max(changed) - min(changed)


class Pasted:
    """Changed halves are those of images with the wanted digit; `wrong` spoils them."""

    def __init__(self, real, wrong=""):
        self.real, self.wrong = real, wrong

    def edit(self, x, left, right):
        halves = [x[..., :16].clone(), x[..., 16:].clone()]
        for k, wanted in enumerate((left, right)):
            changed = wanted != self.real.labels[:, k]
            if self.wrong == "style" and not changed.any():
                halves[k] = halves[k].roll(1, 0)  # those of other images
            for i in changed.nonzero().flatten():
                same = self.real.labels[:, k] == wanted[i]
                source = (same if self.wrong != "digit" else ~same).nonzero()[0, 0]
                halves[k][i] = x[source, :, :, 16 * k:16 * k + 16]
        return torch.cat(halves, 3)


class Anything:
    """Is equal to all digits."""

    def __eq__(self, other):
        return torch.ones_like(other, dtype=torch.bool)


@pytest.mark.parametrize("wrong, low, high", [
    ("", 0.85, 1.0), ("digit", 0.0, 0.15), ("style", 0.0, 0.25)])
def test_edits_succeed_with_both_digits_and_the_kept_style(wrong, low, high):
    _, real = reference()
    assert all(len(set(own.tolist())) == 10 for own in real.labels.T)
    assert edit_share(real, SimpleNamespace(edit=lambda x, left, right: x)) == 0
    if wrong == "style":  # the digits are right, the kept one looks otherwise
        real.read = lambda patches: Anything()
        assert edit_share(real, Pasted(real)) == 1
    assert low <= edit_share(real, Pasted(real, wrong)) <= high


def test_edit_share_counts_images_in_which_all_is_right():
    """Half of the images keep the other digit, the other half get the wanted one."""
    _, real = reference()
    pasted, spoiled = Pasted(real), Pasted(real, "digit")

    def edit(x, left, right):
        first = pasted.edit(x, left, right)
        second = spoiled.edit(x, left, right)
        return torch.cat([first[:12], second[12:]])

    share = edit_share(real, SimpleNamespace(edit=edit))
    assert share == pytest.approx(edit_share(real, pasted) / 2, abs=0.1)


def test_agreement_takes_names_from_known_images_only():
    known, truth = torch.arange(10).repeat(4), torch.arange(10)
    rename = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5, 8, 7])
    exact = assignment_agreement(rename[known], known, rename[truth], truth)
    assert exact == 1
    assert assignment_agreement(rename[known], known.flip(0), rename[truth], truth) == 0
    # a cell that no known image has gets the most frequent value
    seen = known[known != 7]
    again = torch.cat([seen, torch.tensor([2])])
    found = assignment_agreement(rename[again], again, rename[truth],
                                 torch.where(truth == 7, 2, truth))
    assert found == 1
    # one cell for all images: the share of the most frequent value
    zeros = torch.zeros(40, dtype=torch.long)
    assert assignment_agreement(zeros, known, zeros[:10], truth) == 0.1


def test_information_of_counts_is_that_of_their_table():
    values = torch.arange(8).repeat(5)
    assert information_of(values, values) == pytest.approx(math.log(8))
    assert information_of(values // 4, values) == pytest.approx(math.log(2))
    assert information_of(values, torch.zeros(40, dtype=torch.long)) == 0
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    assert information_of(*grid.unbind(1)) == pytest.approx(0, abs=1e-12)


def test_places_are_thirds_of_known_centroids():
    line = torch.arange(9.0)
    known = torch.stack([line, line.flip(0), 10 * line, line], 1).view(9, 2, 2)
    found = thirds(known, known)
    first, second = 3 * torch.arange(3), torch.tensor([2, 1, 0])
    assert torch.equal(found[:, 0], (first + second).repeat_interleave(3))
    assert torch.equal(found[:, 1], (first + torch.arange(3)).repeat_interleave(3))
    assert thirds(known + 100, known).eq(8).all()  # the edges are those of known ones


def agreements(cells, digits):
    half = len(cells) // 2
    rows = agreement_rows("M", "real", (cells[:half], cells[half:]),
                          {"digit": (digits[:half], digits[half:])}, n=half)
    return {(r["metric"], r["at"]["code"], r["at"]["of"], r["variant"]): r["value"]
            for r in rows}


@pytest.mark.parametrize("swap", [False, True])
def test_codes_that_are_digits_agree_in_any_order(swap):
    g = torch.Generator().manual_seed(0)
    digits = torch.randint(10, (4000, 2), generator=g)
    found = agreements(15 - (digits.flip(1) if swap else digits), digits)
    assert found["agreement", "one each", "digits", ""] == 1
    own, other = ("second", "first") if swap else ("first", "second")
    assert found["agreement", own, "left digit", ""] == 1
    assert found["agreement", other, "left digit", ""] < 0.2
    assert found["mutual_information", own, "left digit", ""] > 2.2
    assert found["mutual_information", own, "left digit", "shuffled"] < 0.1
    assert found["agreement", "one each", "digits", "shuffled"] < 0.2


def test_a_code_counts_for_one_half_only():
    """Both codes are the left digit: the right one stays at chance, except in both."""
    g = torch.Generator().manual_seed(0)
    digits = torch.randint(10, (4000, 2), generator=g)
    found = agreements(digits[:, :1].expand(-1, 2), digits)
    assert 0.5 < found["agreement", "one each", "digits", ""] < 0.6
    pair = torch.stack([10 * digits[:, 0] + digits[:, 1], 0 * digits[:, 0]], 1)
    assert agreements(pair, digits)["agreement", "one each", "digits", ""] < 0.65
    mixed = torch.stack([digits.sum(1) % 10, digits[:, 1]], 1)  # the left: from both
    found = agreements(mixed, digits)
    assert found["agreement", "both", "digits", ""] > 0.95
    assert found["agreement", "one each", "digits", ""] < 0.65


def test_groups_of_bits_are_numbers_below_sixteen():
    numbers = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    bits = numbers[:, :, None] // 2 ** torch.arange(4) % 2
    assert torch.equal(cells_of(bits.flatten(1).float()), numbers)


def test_recognised_bits_are_the_signs_of_the_answers():
    answers = torch.tensor([[1.0, -1.0, 0.5, -3.0], [-0.1, 0.1, 2.0, 0.3]])
    model = SimpleNamespace(discriminate=lambda x: (None, x))
    assert recognised_bits(model, answers).tolist() == [
        [True, False, True, False], [False, True, True, True]]


def test_infogan_sees_no_labels():
    data, plain = pairs_of("tiny"), unlabelled_pairs("tiny")
    assert plain.conditions.names == [] and plain.table("train")["c"].shape[1] == 0
    assert torch.equal(plain.images, data.images)
    model = find("two-digits-infogan").build(plain, "tiny")
    assert model.conditions.names == ["first", "second"]
    assert not model.conditions.supervised and model.conditions.width == 8


def test_longer_trainings_are_equally_long():
    recipes = [find(name) for name in (*LONGER.values(), *UNASKED.values())]
    for tier in ("tiny", "cpu", "full"):
        assert len({n for r in recipes for n in r.images[tier].values()}) == 1
