"""The front of accuracy and diversity: what its trainings change, and what a price on variety leaves."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

from condgen.contracts import Classes, Code
from condgen.data import digits
from condgen.experiments import front
from condgen.experiments.front import LINES, OWN, Proofread, Weights, front_arguments, front_digits
from condgen.metrics import METRICS
from condgen.models.caglow import CAGlow, feature_matching
from condgen.models.classifier import Judge, Reader
from condgen.models.glow import Glow
from condgen.recipes import LITERAL, RECIPES, Lab
from condgen.results import merge


def test_a_recipe_s_own_point_is_its_own_run():
    for recipe, (matching, weights) in OWN.items():
        model = RECIPES[recipe].model(digits(), "tiny")
        assert model.matching == matching and model.weights | weights == model.weights
        assert front_arguments(recipe, matching, weights["FM"]) == {}
    assert OWN["caglow-digits-literal"] == (LITERAL["matching"], LITERAL["weights"])


@pytest.mark.parametrize("recipe", OWN)
def test_without_a_weight_the_rule_does_not_matter(recipe):
    same = [front_arguments(recipe, rule, 0.0) for rule in ("pair", "class_mean")]
    assert same[0] == same[1] and set(same[0]) == {"weights"}


def test_every_other_point_is_a_training_of_its_own():
    points = {(recipe, rule, w) for recipe, rule, weights in LINES.values() for w in weights}
    trainings = {(recipe, str(front_arguments(recipe, rule, w))) for recipe, rule, w in points}
    assert len(trainings) == len(points) - len(OWN)
    for recipe, rule, w in points:
        plan = RECIPES[recipe].model(digits(), "tiny")
        model = CAGlow(**plan.arguments | front_arguments(recipe, rule, w))
        assert model.weights == plan.weights | {"FM": w} and (model.matching == rule or not w)


def test_folders_have_names_without_quotes_or_spaces(tmp_path, monkeypatch):
    folders = []

    def train(name, folder, *rest, **options):
        folders.append(folder.name)
        return SimpleNamespace(finished=True, seconds=1.0)

    monkeypatch.setattr("condgen.recipes.train", train)
    lab = Lab("tiny", 0, tmp_path)
    for w in (0.0, 1.0, 0.5):
        lab.train("caglow-digits-literal", **front_arguments("caglow-digits-literal", "class_mean", w))
    assert folders[1].startswith("caglow-digits-literal-matching-class_mean.tiny.seed0.")
    assert folders[2].startswith("caglow-digits-literal-weights-C1-FM0.5-matching-class_mean.tiny.seed0.")
    assert len(set(folders)) == 3 and all(re.fullmatch(r"[\w.-]+", name, re.ASCII) for name in folders)


def test_weights_are_a_dictionary_with_another_text():
    weights = Weights({"C": 1.0, "FM": 100.0})
    assert weights == {"C": 1.0, "FM": 100.0} and f"{weights}" == "C1-FM100"


@pytest.fixture(scope="module")
def asked():
    """Rows of an experiment whose trainings give untrained models, for two seeds, and what was trained."""
    data, calls = digits(), []
    torch.manual_seed(0)
    judge, glow = Judge(data.shape, data.conditions), Glow(data.shape, levels=2, depth=1, width=4)
    model = CAGlow.from_glow(glow, [*data.conditions, Code("u", 2)], hidden=8)
    model.remember_rows(data.table("train")["c"])
    models = {"judge-digits": judge, "glow-digits": glow}

    def train(name, given=None, **arguments):
        calls.append((name, given is glow, arguments))
        return SimpleNamespace(model=models.get(name, model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(front, "digits", lambda copies=0: data)
        rows = [front_digits(SimpleNamespace(tier="tiny", seed=s, first=not s, train=train)) for s in (0, 1)]
    return merge(*rows), calls


def test_rows_of_every_point_with_all_seeds(asked):
    rows, _ = asked
    front_rows = [r for r in rows if "weight" in r["at"]]
    assert {(r["variant"], r["at"]["weight"]) for r in front_rows} == {(v, w) for v in LINES for w in (0.0, 100.0)}
    names = {"accuracy", "diversity_pixel", "diversity_feature", "frechet"}
    assert {r["metric"] for r in rows} == names <= set(METRICS)
    assert all(len(r["values"]) == 2 for r in rows if r["model"] == "CAGlow")
    assert all(r["protocol"]["temperature"] == 0.7 and r["protocol"]["n"] == 360 for r in front_rows)
    others = [r for r in rows if "temperature" in r["at"]]
    assert others and all(r["protocol"]["temperature"] == r["at"]["temperature"] for r in others)
    assert [r["model"] for r in rows if len(r["values"]) == 1] == ["real training images"]


def test_all_points_stand_on_one_glow(asked):
    _, calls = asked
    assert all(given for name, given, _ in calls if name in OWN)
    assert sum(name == "glow-digits" for name, *_ in calls) == 2


# the law behind it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "share"), [("pair", 1.0), ("class_mean", 1 / 8)])
def test_the_charge_on_variety(rule, share):
    """The slope of Eq. 14 in s, with f(z') = μ + s ε: s v' times the share, ten classes in batches of 80."""
    g = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(400, 80, 5, generator=g, dtype=torch.float64)
    groups = torch.eye(10, dtype=torch.float64)[torch.arange(80) % 10]
    s = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    values = [feature_matching(a, s * b, groups if rule == "class_mean" else None) for a, b in zip(draw(), draw())]
    slope, = torch.autograd.grad(torch.stack(values).mean(), s)
    assert slope.item() == pytest.approx(0.6 * share, rel=0.05)


def test_a_price_adds_itself_to_the_precision():
    """Descent on KL(N(0, s²) ‖ N(0, σ²)) + λ s²/2 finds 1/s² = 1/σ² + λ."""
    for sigma, price in ((1.0, 3.0), (0.5, 20.0)):
        log_s = torch.tensor(0.0, dtype=torch.float64)
        for _ in range(100):  # Newton's steps, the objective being convex in log s
            curve = (2 * log_s).exp() * (1 / sigma**2 + price)
            log_s = log_s - (curve - 1) / (2 * curve)
        assert math.exp(-2 * log_s.item()) == pytest.approx(1 / sigma**2 + price, rel=1e-9)


# a second look -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer():
    """A small CAGlow with rows to draw from, and a reader of its digits; both untrained."""
    torch.manual_seed(0)
    data = digits()
    model = CAGlow((1, 16, 16), [*data.conditions, Code("u", 2)], levels=2, depth=1, width=4, hidden=8).eval()
    model.remember_rows(data.table("train")["c"])
    with torch.no_grad():  # noise that shows
        model.encoder.root.copy_(torch.eye(256).expand_as(model.encoder.root))
    return model, Reader(data.shape, data.conditions, width=4).eval()


def seeded():
    return torch.Generator().manual_seed(4)


def test_what_is_read_at_once_is_the_model_s_own(writer):
    model, reader = writer
    wanted, own = torch.arange(30) % 10, model.sample(30, 0.9, seeded(), digit=torch.arange(30) % 10)
    c = model.condition(30, seeded(), digit=wanted)
    cost = Proofread(model, reader).misread(own, c).detach()
    assert torch.equal(Proofread(model, reader, doubt=1e6).sample(30, 0.9, seeded(), digit=wanted), own)
    half = cost.median().item()
    found = Proofread(model, reader, doubt=half, most=2).sample(30, 0.9, seeded(), digit=wanted)
    changed = (found != own).flatten(1).any(1)
    assert not changed[cost < half - 1e-4].any() and changed[cost > half + 1e-4].all()


def test_a_second_look_is_believed_and_keeps_the_length_of_the_noise(writer):
    model, reader = writer
    c, (eps, rest) = model.condition(20, seeded(), digit=3), torch.randn(2, 20, 256, generator=seeded())
    before = Proofread(model, reader).misread(model.glow.decode(model.generate(c, eps, rest)), c).detach()
    look = Proofread(model, reader, doubt=before.min().item() - 0.05, step=0.5, most=8)
    x, moved = look.proofread(c, eps, rest)
    assert (look.misread(x, c) < before).all()
    assert torch.allclose(moved.norm(dim=1), eps.norm(dim=1), rtol=1e-5)
    assert (moved - eps).norm(dim=1).max() <= 8 * 0.5 * 1.1 and (moved != eps).any(1).all()
    assert torch.allclose(look.picture(c, moved, rest), x, atol=1e-5)  # the picture of the noise that it says it has


def test_a_second_look_draws_what_a_seed_says_and_leaves_gradients_alone(writer):
    model, reader = writer
    look = Proofread(model.train(), reader.train(), most=3)
    a, b = (look.sample(6, 0.8, seeded()) for _ in range(2))
    assert torch.equal(a, b) and model.training and reader.training
    assert all(p.grad is None for p in look.parameters()) and not a.requires_grad
    model.eval(), reader.eval()


@pytest.mark.parametrize("change", [{"doubt": 0}, {"doubt": float("nan")}, {"step": -1}, {"most": 0}, {"most": 1.5}])
def test_a_second_look_refuses(writer, change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*accepted"):
        Proofread(*writer, **change)


def test_a_reader_of_something_else_is_refused(writer):
    model, _ = writer
    for reader in (Reader((1, 16, 16), [Classes("letter", 26)]), Reader((1, 32, 32), digits().conditions)):
        with pytest.raises(ValueError, match="accepted: some of"):
            Proofread(model, reader)


@pytest.mark.slow
def test_the_second_look_runs_through(writer, monkeypatch):
    model, reader = writer
    data = digits()
    monkeypatch.setattr(front, "mnist", lambda: data)
    models = {"judge-mnist": Judge(data.shape, data.conditions), "reader-mnist": reader}
    monkeypatch.setattr(front, "once", lambda lab, name: SimpleNamespace(model=models.get(name)))
    train = lambda name, *rest: SimpleNamespace(model=models.get(name, model), seconds=1.0)
    rows = front.proofread_mnist(SimpleNamespace(tier="tiny", seed=0, first=True, train=train))
    both = {(r["variant"], r["metric"]) for r in rows if r["model"] == "CAGlow"}
    assert {(v, m) for v in ("as written", "proofread") for m in ("accuracy", "diversity_feature", "frechet")} <= both
    value = {r["variant"]: r["value"] for r in rows if r["metric"] == "seconds" and r["model"] == "CAGlow"}
    assert min(value["proofread"], value["as written"]) > 0
