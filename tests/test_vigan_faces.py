"""Edits of faces: switches with a drawn truth, mean vectors, sliders; perfect, idle,
collapsed and garbled editors are told apart.
"""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from condgen.experiments.portraits import portraits_with_factors
from condgen.experiments.vigan_faces import (
    DESCRIBED, MODELS, FaceEdits, FaceReader, described_faces, drawn_truth, edit_rows,
    masked_error, mean_vectors, plot_glasses, untouched, vector_editor, vigan_editor)
from condgen.experiments.vigan_scores import (
    EXPRESSIONS, FIGURE_7, GLANCES, SCORES, ScoreReader, average_ranks, draw_middles,
    expressive_faces, expressive_factors_of, face_crop, plot_expressions,
    rank_correlation, score_editor, score_rows, scores_of, set_score, slider_values)
from condgen.faces import FACTORS, edit_factors, render
from condgen.models.vigan import ViGAN


class Nearest(nn.Module):
    """Gives the labels of the nearest known image."""

    def __init__(self, conditions, x, c, scale=20.0):
        super().__init__()
        self.conditions, self.x, self.c, self.scale = conditions, x.flatten(1), c, scale

    def features(self, x):
        return x.flatten(1)

    def head(self, flat):
        return self.scale * self.c[torch.cdist(flat, self.x).argmin(1)] - self.scale / 2


@cache
def setting():
    faces = FaceEdits("tiny", "test", 60, 4)
    x = torch.cat([faces.x, *(s.target for s in faces.switches.values())])
    c = torch.cat([faces.asked, *(s.asked for s in faces.switches.values())])
    reader = FaceReader(Nearest(portraits_with_factors("tiny")[0].conditions, x, c))
    return faces, reader, reader.of(faces.x, faces.asked)


def truth(x, old, new):
    """The drawn edit of each image."""
    faces, _, _ = setting()
    if torch.equal(old, new):
        return x
    return next(s.target for s in faces.switches.values()
                if len(new) == len(s.new) and torch.equal(s.new, new)
                and torch.equal(faces.x[s.index], x))


def numbers(edit, image="edited"):
    faces, reader, real = setting()
    rows = edit_rows("M", "", edit, faces, reader, real)
    return {r["metric"]: r["value"] for r in rows
            if r["at"] == {"attribute": "all", "image": image}}


def test_described_faces_are_the_portraits_with_other_labels():
    data, full = described_faces("tiny"), portraits_with_factors("tiny")[0]
    assert torch.equal(data.images, full.images)
    assert data.conditions.names == list(DESCRIBED)
    known, own = (d.conditions.unpack(d.labels) for d in (full, data))
    for name in DESCRIBED:
        assert torch.equal(known[name], own[name])


def test_a_switch_changes_one_bit_and_is_drawn():
    faces, _, _ = setting()
    _, factors = portraits_with_factors("tiny")
    factors = factors[described_faces("tiny").indices("test")[:60]]
    for (name, to), switch in faces.switches.items():
        j, new = DESCRIBED.index(name), float(to == "on")
        moved = switch.new - faces.c[switch.index]
        assert bool((moved[:, j] == 2 * new - 1).all())
        assert (moved.abs().sum(1) == 1).all()
        after = edit_factors(factors[switch.index], **{name: new})
        assert (render(after, 32) - switch.target).abs().max() < 0.003


def test_attributes_that_exclude_each_other_are_not_switched_on():
    faces, _, _ = setting()
    place = {name: j for j, name in enumerate(DESCRIBED)}
    for name, other in (("glasses", "sunglasses"), ("sunglasses", "glasses")):
        index = faces.switches[name, "on"].index
        assert bool((faces.c[index, place[other]] == 0).all())


def test_the_true_edit_is_perfect():
    found, plain = numbers(truth), numbers(truth, "re-encoded")
    assert found["attribute_accuracy"] == found["identity_accuracy"] == 1
    assert found["mae"] == plain["mae"] == plain["interference"] == 0
    assert found["interference"] < 1e-6 and found["frechet"] < 1e-6
    assert found["reconstruction_l1"] < 0.002


def test_an_idle_editor_is_never_read_as_asked():
    found = numbers(lambda x, old, new: x)
    assert found["attribute_accuracy"] == found["interference"] == 0
    assert found["mae"] > 0.01 and found["reconstruction_l1"] == 0


def one_face_for_each_description(x, old, new):
    faces, _, _ = setting()
    known = {tuple(c.tolist()): x for s in faces.switches.values()
             for c, x in zip(s.new, s.target)}
    return torch.stack([known.get(tuple(c.tolist()), faces.x[0]) for c in new])


def test_a_collapsed_editor_is_found_out_by_the_truth():
    found, good = numbers(one_face_for_each_description), numbers(truth)
    assert found["attribute_accuracy"] > 0.9  # which accuracy alone would not show
    assert found["mae"] > 0.03 and found["reconstruction_l1"] > 0.03
    assert found["identity_accuracy"] < 0.8 < good["identity_accuracy"]
    assert found["frechet"] > 1 > good["frechet"]


def garbled(x, old, new):
    """The true edit below noise that the nearest known face still explains."""
    y = truth(x, old, new)
    g = torch.Generator().manual_seed(0)
    return (y + 0.3 * torch.randn(y.shape, generator=g)).clamp(0, 1)


def test_garbage_that_is_read_as_asked_is_found_out():
    found = numbers(garbled)
    assert found["attribute_accuracy"] > 0.9
    assert found["frechet"] > 10 and found["mae"] > 0.1


def test_an_edit_that_moves_other_attributes_is_counted():
    faces, _, _ = setting()

    def careless(x, old, new):  # every edit also takes the hat off or puts it on
        if torch.equal(old, new):
            return x
        found = next(s for s in faces.switches.values() if torch.equal(s.new, new)
                     and torch.equal(faces.x[s.index], x))
        _, factors = portraits_with_factors("tiny")
        rows = factors[described_faces("tiny").indices("test")[:60]][found.index]
        other = 1 - FACTORS.unpack(rows)["hat"]
        return render(edit_factors(rows, hat=other), 32)

    x = torch.cat([faces.x, *(s.target for s in faces.switches.values())])
    assert x.shape[1:] == (3, 32, 32)
    assert numbers(careless)["interference"] > 0.05


def test_untouched_pixels_and_their_error():
    x, y = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    y[0, 1, :2] = 0.5  # the edit changes the upper half
    still = untouched(x, y)
    assert still.sum() == 8 and bool(still[0, 0, 2:].all())
    made = x + 0.1
    made[0, :, :2] = 1.0  # errors there do not count
    assert masked_error(made, x, still) == pytest.approx(0.1)


def identity_model():
    return SimpleNamespace(encode=lambda x: x.flatten(1),
                           decode=lambda z: z.view(-1, 1, 1, 3))


def test_mean_vectors_of_independent_bits_are_exact():
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    x = bits.view(-1, 1, 1, 3)
    vectors = mean_vectors(identity_model(), x, bits)
    assert torch.allclose(vectors, torch.eye(3))
    edit = vector_editor(identity_model(), vectors, 2.0)
    assert torch.allclose(edit(x, bits, 1 - bits).flatten(1), 2 - 3 * bits)
    assert torch.equal(edit(x, bits, bits), x)


def test_vigan_edits_are_decoded_codes_in_order():
    torch.manual_seed(0)
    data = described_faces("tiny")
    model = ViGAN(data.shape, data.conditions, latent=4, width=4, hidden=16).eval()
    x, c = data.split_images("train")[:260], data.table("train")["c"][:260]
    made = vigan_editor(model)(x, c, 1 - c)
    at = [0, 249, 250, 259]  # both sides of the batch border
    again = model.decode(model.encode(x[at]), **data.conditions.unpack(1 - c[at]))
    assert torch.allclose(made[at], again, atol=1e-5)


def test_the_explorers_truth_is_drawn_or_refused():
    _, factors = portraits_with_factors("tiny")
    draw = drawn_truth(factors, 32)
    own = dict.fromkeys(DESCRIBED, 0.0) | {"hat": 1.0}
    assert torch.equal(draw(3, own), render(edit_factors(factors[3:4], **own), 32)[0])
    with pytest.raises(ValueError, match="glasses and sunglasses exclude"):
        draw(3, own | {"glasses": 1.0, "sunglasses": 1.0})


def test_the_middle_of_a_face_is_half_as_wide():
    x = torch.arange(64.0).view(1, 1, 1, 64).expand(1, 1, 64, 64)
    assert face_crop(x).shape == (1, 1, 32, 32)
    assert face_crop(x)[0, 0, 0].tolist() == list(range(16, 48))
    assert face_crop(x.transpose(2, 3))[0, 0, :, 0].tolist() == list(range(20, 52))


def test_expressive_faces_show_their_scores():
    data, factors = expressive_faces("tiny"), expressive_factors_of("tiny")
    assert (draw_middles(factors[5:9], 16) - data.images[5:9] / 255).abs().max() < 0.003
    assert torch.equal(scores_of(factors), data.labels)
    known = FACTORS.unpack(factors)
    glance = torch.stack([known[name] for name in GLANCES])
    assert int((glance > 0).sum(0).max()) == 1 and 0.5 < (glance > 0).any(0).double().mean()
    assert known["sunglasses"].max() == 0 and known["age"].min() >= 18
    assert 0.3 < (known["wide_eyes"] > 0).double().mean() < 0.7
    assert torch.cat(list(data.splits.values())).sort().values.tolist() == list(range(480))


@pytest.mark.parametrize("name", GLANCES)
def test_one_glance_ends_the_others(name):
    factors = expressive_factors_of("tiny")[:40]
    for value in (0.0, 0.4, 1.0):
        known = FACTORS.unpack(set_score(factors, name, value))
        for other in GLANCES:
            assert torch.allclose(known[other], torch.full((40,), value * (other == name)))
    kept = FACTORS.unpack(set_score(factors, "wide_eyes", 1.0))
    assert torch.equal(kept[name], FACTORS.unpack(factors)[name])


def test_ranks_average_over_ties():
    assert average_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]


def test_rank_correlation_agrees_with_scipy():
    from scipy.stats import spearmanr

    g = torch.Generator().manual_seed(1)
    a, b = torch.randint(4, (80,), generator=g), torch.randn(80, generator=g).round()
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(a, torch.zeros(80)) == 0
    assert rank_correlation(a, a.double() ** 3) == pytest.approx(1)


@cache
def slider_setting():
    few = expressive_factors_of("tiny")[:4]
    every = torch.cat([set_score(few, name, v) for name in SCORES.names
                       for v in slider_values(name, 3)])
    known = Nearest(SCORES, draw_middles(every, 16), scores_of(every))
    known.head = lambda flat: known.c[torch.cdist(flat, known.x).argmin(1)]
    return few, draw_middles(few, 16), ScoreReader(known)


def slid(editor):
    few, x, reader = slider_setting()
    rows = score_rows("M", editor, few, x, reader, 3, n=4)
    return {(r["metric"], r["at"]["score"], r["at"].get("over") or r["at"].get("to")):
            r["value"] for r in rows}


def test_the_true_sliders_are_followed():
    found = slid(lambda after, x: draw_middles(after, 16))
    for name in SCORES.names:
        for over in ("all", "an image"):
            assert found["rank_correlation", name, over] > 0.9
        assert found["mae", name, None] == 0
    for name in EXPRESSIONS:
        assert found["attribute_accuracy", name, "on"] == 1
        assert found["attribute_accuracy", name, "off"] == 1


@pytest.mark.parametrize("editor, correlation", [
    (lambda after, x: x, 0),
    (lambda after, x: draw_middles(after, 16).flip(0), None)])
def test_idle_and_mixed_up_sliders_are_found_out(editor, correlation):
    found = slid(editor)
    for name in SCORES.names:
        assert found["mae", name, None] > 0.001
        if correlation is not None:
            assert found["rank_correlation", name, "all"] == correlation


def test_a_slider_that_runs_backwards_has_negative_correlation():
    def backwards(after, x):
        skin = FACTORS.unpack(after)["skin"]
        return draw_middles(edit_factors(after, skin=1 - skin), 16)

    found = slid(backwards)
    assert found["rank_correlation", "skin", "all"] < -0.9
    assert found["rank_correlation", "pitch", "an image"] > 0


def test_score_edits_decode_the_scores_of_the_changed_face():
    torch.manual_seed(0)
    data = expressive_faces("tiny")
    model = ViGAN(data.shape, data.conditions, latent=4, width=4, hidden=16).eval()
    factors, x = expressive_factors_of("tiny")[:3], data.images[:3].float() / 255
    after = set_score(factors, "laugh", 0.75)
    asked = data.conditions.unpack(data.labels[:3])
    asked |= dict.fromkeys(GLANCES, torch.zeros(3)) | {"laugh": torch.full((3,), 0.75)}
    expected = model.decode(model.encode(x), **asked)
    assert torch.allclose(score_editor(model)(after, x), expected, atol=1e-6)


def shown(monkeypatch, plot, data):
    """The table of images that a figure shows of an untrained model."""
    torch.manual_seed(0)
    model = ViGAN(data.shape, data.conditions, latent=4, width=4, hidden=16).eval()
    found = []
    monkeypatch.setattr("condgen.figures.traversal",
                        lambda images, *a, **k: found.append(images))
    monkeypatch.setattr("condgen.figures.save_figure", lambda figure, path: None)
    lab = SimpleNamespace(tier="tiny", data=data,
                          train=lambda name: SimpleNamespace(model=model))
    plot(lab, [], None)
    return found[0], model


def test_figure_7_has_the_drawn_truth_below_each_edit(monkeypatch):
    data = expressive_faces("tiny")
    images, _ = shown(monkeypatch, plot_expressions, data)
    factors = expressive_factors_of("tiny")[data.indices("test")[:2]]
    plain = set_score(set_score(factors, "smile", 0.0), "wide_eyes", 0.0)
    assert images.shape == (4, 6, 3, 16, 16)
    for k in range(2):
        assert (images[2 * k + 1, 1] - images[2 * k, 0]).abs().max() < 0.003
        for j, name in enumerate(FIGURE_7):
            true = draw_middles(set_score(plain[k:k + 1], name, 1.0), 16)[0]
            assert torch.equal(images[2 * k + 1, 2 + j], true)


def test_figure_6_sets_the_bit_of_each_row(monkeypatch):
    images, model = shown(monkeypatch, plot_glasses, described_faces("tiny"))
    faces = FaceEdits("tiny", "test", 200, 8)
    for k, name in enumerate(("glasses", "hat")):
        switch = faces.switches[name, "on"]
        x, *edited, true = images[4 * k:4 * k + 4]
        z = model.encode(x)
        asked = faces.schema.unpack(faces.c[switch.index]) | {name: torch.ones(len(z))}
        assert len(edited) == len(MODELS)
        for own in edited:  # of each recipe; one model stands for both here
            assert torch.allclose(own, model.decode(z, **asked), atol=1e-6)
        assert torch.equal(true, switch.target)
