"""Laws of the drawn people with correlated attributes, and of the edits on them."""

import pytest
import torch

from condgen.experiments import people_count, printed, printed_edits
from condgen.experiments.printed import (
    ATTRIBUTES, SCORES, add_attribute, artefact_scores, attributes_of, drawn_people,
    exchanged_latents, pairs_of_sets, printed_people)
from condgen.experiments.printed_edits import (
    FINE, JUMPS, STEPS, add_at_random, exchange_conditions, exchange_drawings,
    exchange_points, largest_step_ratio, without_attributes)
from condgen.faces import FACTORS
from condgen.lab import Lab
from condgen.metrics import scatter_ratio
from condgen.results import stored


@pytest.fixture(scope="module")
def factors():
    return drawn_people(100, 10_000)


def test_attributes_depend_as_in_the_text(factors):
    a = dict(zip(ATTRIBUTES, attributes_of(factors).unbind(1)))
    man, young = FACTORS.unpack(factors)["masculine"] > 0, a["young"] > 0
    assert bool((a["no_beard"][~man] == 1).all())
    share = lambda name, rows: a[name][rows].mean().item()
    assert share("makeup", ~man & young) > 0.7 > 0.5 > share("makeup", ~man & ~young)
    assert share("long_hair", ~man) > 0.6 and share("long_hair", man) < 0.1
    assert share("blond", a["long_hair"] > 0) > share("blond", a["long_hair"] == 0) + 0.2


def test_labels_are_those_of_the_factors():
    data = printed_people("tiny")
    known = data.conditions.unpack(data.labels)
    expected = attributes_of(drawn_people(20, 600))
    assert torch.equal(torch.stack([known[name] for name in ATTRIBUTES], 1), expected)
    assert torch.equal(known["identity"], torch.arange(600) % 20)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_added_attribute_changes_no_other(name, factors):
    before = attributes_of(factors)
    after = attributes_of(add_attribute(factors, name))
    k = ATTRIBUTES.index(name)
    assert bool((after[:, k] == 1).all())
    others = [j for j in range(len(ATTRIBUTES)) if j != k]
    assert torch.equal(after[:, others], before[:, others])


def test_four_absent_attributes_are_added_in_turn(factors):
    start = without_attributes(factors[:300])
    order, states = add_at_random(start, 4, torch.Generator().manual_seed(0))
    a = torch.stack([attributes_of(one) for one in states])
    for k in range(4):
        changed = a[k + 1] - a[k]
        expected = torch.zeros_like(changed).scatter(1, order[:, k : k + 1], 1.0)
        assert torch.equal(changed, expected)


def test_both_sets_have_equally_many_of_each_person():
    data = printed_people("tiny")
    index = pairs_of_sets(data, 2)
    who = data.conditions.unpack(data.labels[index])["identity"]
    assert len(index.unique()) == len(index) and torch.equal(*who.chunk(2))
    assert not set(index.tolist()) & set(data.indices("train").tolist())


def test_scatter_ratio_is_that_of_known_variances():
    g, who = torch.Generator().manual_seed(0), torch.arange(4_000) % 400
    x = 2 * torch.randn(400, 3, generator=g)[who] + torch.randn(4_000, 3, generator=g)
    assert scatter_ratio(x, who) == pytest.approx(4, rel=0.1)
    assert scatter_ratio(7 * x + 1, who) == pytest.approx(scatter_ratio(x, who))
    for labels in (torch.zeros(4_000), torch.arange(4_000)):
        with pytest.raises(ValueError, match="accepted: two classes"):
            scatter_ratio(x, labels)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("experiment", printed.EXPERIMENTS + printed_edits.EXPERIMENTS,
                         ids=lambda e: e.name)
def test_rows_are_distinct_and_figures_are_drawn(experiment, runs, tmp_path):
    lab = Lab(experiment, "tiny", 0, runs, progress=False, rounds=3)
    rows = experiment.run(lab)
    keys = {(r["model"], r["variant"], r["metric"], *r["at"].items()) for r in rows}
    assert len(keys) == len(rows)
    if experiment.figures:
        experiment.figures(lab, rows, tmp_path / "r.json")
        assert (tmp_path / "r.png").stat().st_size > 5_000


def test_a_jump_stays_and_a_line_is_divided():
    t = torch.linspace(0, 1, FINE + 1)
    assert largest_step_ratio(t[:, None]) == pytest.approx(STEPS / FINE)
    assert largest_step_ratio((t > 0.3).float()[:, None]) == pytest.approx(1)


def test_conditions_and_drawings_agree_in_the_corners():
    data, pair, factors = printed_people("tiny"), torch.tensor([3, 8]), drawn_people(20, 600)
    points, c = exchange_points(), exchange_conditions(printed_people("tiny"), pair)
    for name, line in zip(JUMPS, ((1.0, 0.0), (0.0, 1.0)), strict=True):
        ends = points[[JUMPS[name], JUMPS[name] + FINE]].tolist()
        assert ends == [[0.0, 0.0], list(line)]
    corners = [0, STEPS, STEPS * (STEPS + 1), (STEPS + 1) ** 2 - 1]
    known = data.conditions.unpack(c[corners])
    assert known["identity"].tolist() == [3, 3, 8, 8]
    assert known["blond"].tolist() == [1, 0, 1, 0]
    x = exchange_drawings(data, factors, pair)
    assert len(x) == len(points) and torch.equal(x[0], x[JUMPS["identity"]])
    assert not torch.equal(x[corners[0]], x[corners[1]])


def test_inferred_levels_give_the_image_back(runs):
    lab = Lab(printed.EXPERIMENTS[1], "tiny", 0, runs, progress=False, rounds=3)
    model, index = lab.train("printed-cglow").model, lab.data.indices("test")[:8]
    x, c = lab.data.images[index].float() / 255, lab.data.labels[index]
    found = exchanged_latents(model, x, c, 0)
    assert torch.allclose(found["both inferred"][0], x, atol=2 / 255)
    assert not torch.allclose(found["rest inferred"][0], x, atol=2 / 255)
    top = {name: z[:, : model.top] for name, (_, z) in found.items()}
    assert torch.equal(top["top inferred"], top["both inferred"])
    assert torch.equal(top["sampled"], top["rest inferred"])


def test_real_images_have_no_artefact_of_content(runs):
    lab = Lab(printed.EXPERIMENTS[1], "tiny", 0, runs, progress=False, rounds=3)
    x = lab.data.images[:40].float() / 255
    found = artefact_scores(x[:10], x, lab.evaluator("printed-evaluator"))
    assert set(found) == set(SCORES)
    assert found["content"].max() < 1e-3
    blurred = artefact_scores(0.5 + 0 * x[:10], x, lab.evaluator("printed-evaluator"))
    assert blurred["texture"].min() > found["texture"].max()


@pytest.mark.parametrize("tier", ["tiny", "cpu", "full"])
def test_only_the_number_of_people_differs(tier):
    """Equal training images, equal lengths, and the parents of the same people."""
    known = {r.name: r for r in people_count.RECIPES}
    for recipe in people_count.RECIPES:
        base, _, count = recipe.name.rpartition("-")
        same = known[f"{base}-few"]
        assert (recipe.images, recipe.arguments) == (same.images, same.arguments)
        assert recipe.data.endswith(f".{count}_people")
        assert all(parent.endswith(f"-{count}") for parent in recipe.parents.values())
    people = [own[tier] for own in people_count.COUNTS.values()]
    assert people == sorted({*people})


def test_sets_of_people_have_equally_many_training_images():
    sets = [people_count.people_of(count, "tiny") for count in people_count.COUNTS]
    assert len({len(data.indices("train")) for data in sets}) == 1
    for own, data in zip(people_count.COUNTS.values(), sets, strict=True):
        who = data.conditions.unpack(data.labels[data.indices("train")])["identity"]
        assert len(who.unique()) == own["tiny"]


def test_differences_are_those_of_the_accuracies():
    accuracies = {("real", ""): 0.9, ("CGlow", ""): 0.25, ("CAGlow", "ours"): 0.75}
    rows = people_count.difference_rows(
        {key: {"identity_accuracy": value} for key, value in accuracies.items()},
        {"people": 7})
    assert all(r["at"]["people"] == 7 for r in rows)
    found = {(r["model"], r["at"]["against"]): r["value"] for r in rows}
    assert found == pytest.approx({("CGlow", "real"): -0.65, ("CAGlow", "real"): -0.15,
                                   ("CAGlow", "CGlow"): 0.5})


def test_stored_accuracies_are_drawn_with_every_number_of_people(tmp_path):
    rows = stored("caglow/people-count")
    keys = {(r["model"], r["variant"], r["metric"], *r["at"].items()) for r in rows}
    assert len(keys) == len(rows)
    counts = {own["cpu"] for own in people_count.COUNTS.values()}
    for model in ("real", "CGlow", "CAGlow"):
        assert {r["at"]["people"] for r in rows if r["model"] == model} == counts
    people_count.plot_people_count(None, rows, tmp_path / "r.json")
    assert (tmp_path / "r.png").stat().st_size > 5_000
