"""Conditions, noise, players and models keep the agreements of the
chapter on contracts.
"""

import copy
import importlib
import inspect
import json
import keyword
import math
import pkgutil

import click
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from typer.main import get_command

import condgen
from condgen.__main__ import app
from condgen.checks import accepted, check_positive_integer, check_temperature
from condgen.conditions import (
    RESERVED_NAMES, Binary, Classes, Code, Condition, Real, Schema, identifier,
    points_on_line)
from condgen.contracts import Batch, Model, Noise, Player, Stage, draw_rows, seed_of

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
NAMES = st.from_regex(r"[a-z][a-z_0-9]{1,6}", fullmatch=True).filter(
    lambda name: not keyword.iskeyword(name) and name not in RESERVED_NAMES
)


@st.composite
def schemas(draw):
    """A schema of up to five conditions of all kinds."""
    items = []
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        low = draw(st.integers(-50, 50))
        items.append(
            draw(st.sampled_from([Classes(name, draw(st.integers(1, 6))), Binary(name),
                                  Real(name, low, low + draw(st.integers(1, 90))),
                                  Code(name, draw(st.integers(1, 3)),
                                       draw(st.sampled_from(["uniform", "binary"])))])))
    return Schema(items)


def noise(n: int, *key: object) -> Noise:
    return Noise(key or (0,), slice(None), n)


@QUICK
@given(schemas(), st.integers(1, 5), st.integers(0, 99))
def test_pack_and_unpack_are_inverse(schema, n, seed):
    c = schema.draw(n, noise(n, seed).rand)
    assert c.shape == (n, schema.width) and c.dtype == torch.float32
    values = schema.unpack(c)
    again = schema.pack(n, **values)
    for (item, found), (_, expected) in zip(schema.columns(again), schema.columns(c)):
        assert torch.allclose(found, expected,
                              atol=2e-6 if isinstance(item, Real) else 0)


@QUICK
@given(schemas())
def test_codes_come_last_and_json_gives_the_schema_back(schema):
    assert Schema(reversed(schema)).codes.names == schema.codes.names[::-1]
    assert schema == schema.supervised + schema.codes
    assert (all(item.supervised for item in schema.supervised)
            and not any(item.supervised for item in schema.codes))
    assert (Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
            == copy.deepcopy(schema))


@pytest.mark.parametrize(("value", "row"),
                         [(2, [0, 0, 1]), ([2], [0, 0, 1]), ([2, 2], [0, 0, 1]),
                          ([0.5, 0, 0.5], [0.5, 0, 0.5]), (np.int64(2), [0, 0, 1]),
                          ([[0, 0.25, 0.75]], [0, 0.25, 0.75]),
                          (torch.tensor([2, 2], dtype=torch.uint8), [0, 0, 1]),
                          ([[0.0, 1.0, 0.0]] * 2, [0, 1, 0])])
def test_classes_accept(value, row):
    assert Classes("k", 3).pack(value, 2).tolist() == [row, row]


@pytest.mark.parametrize(("condition", "values", "message"), [
    (Classes("k", 3), [3, -1, 1.0, True, "two", None, [1, 2, 0], [0.5, 0.6, 0.1],
                       [1.5, -0.5, 0], [math.nan, 0, 1], [[1], [1, 2]], 1j, 10**30, {}],
     ("accepted: integers 0 to 2, or 3 probabilities that sum to 1, "
      "or one such value per image")),
    (Binary("b"), [2, -0.1, "yes", None, math.nan, [0, 1, 0], [[1]]],
     "accepted: 0, 1, or a probability between, or one such value per image"),
    (Real("r", -5, 5), [5.1, -6, math.inf, math.nan, "old", [1, 2, 3]],
     "accepted: a number from -5 to 5, or one such value per image"),
    (Code("u", 2), [0.5, [0.5], [0.1, 1.5], [[0, 0, 0]], "x", [math.nan, 0]],
     "accepted: 2 number(s) from -1 to 1, or one such value per image"),
    (Code("v", 1, "binary"), [-0.5, 2, [0, 1, 1]],
     "accepted: 1 number(s) from 0 to 1, or one such value per image")])
def test_values_are_refused(condition, values, message):
    for value in values:
        with pytest.raises(ValueError) as found:
            condition.pack(value, 2)
        assert str(found.value) == f"{condition.name}={value}; {message}"


def arguments_beside_conditions() -> set[str]:
    """Names in signatures that also take conditions by name, and `condgen sample`'s."""
    command = get_command(app).commands["sample"]
    found = {name[2:] for option in command.get_params(click.Context(command))
             for name in option.opts if name.startswith("--")}
    for info in pkgutil.walk_packages(condgen.__path__, "condgen."):
        parts = [part for part in vars(importlib.import_module(info.name)).values()
                 if getattr(part, "__module__", "") == info.name]
        parts += [f for part in parts if inspect.isclass(part)
                  for f in vars(part).values()]
        for function in filter(inspect.isfunction, parts):
            given = inspect.signature(function).parameters.values()
            if any(p.kind is p.VAR_KEYWORD and p.name in ("conditions", "values")
                   for p in given):
                found |= {p.name for p in given if p.kind in (
                    p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return found


def test_reserved_names_are_those_of_all_signatures():
    assert sorted(RESERVED_NAMES) == sorted(arguments_beside_conditions())


@pytest.mark.parametrize("name", RESERVED_NAMES)
def test_names_of_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}'; accepted: .* '{name}_', not the"):
        Binary(name)
    assert Binary(f"{name}_").name == f"{name}_"


@pytest.mark.parametrize("kind", ["CGlow", "VAE"])
def test_ends_of_a_line_and_conditions_may_be_called_a_and_b(kind):
    sizes = {"levels": 1, "depth": 1, "width": 8} if kind == "CGlow" else {}
    model = getattr(condgen, kind)((1, 8, 8), [Binary("a"), Binary("b")], **sizes)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert model.interpolate(x[0], x[1], 3, a=0, b=1).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(("text", "name"), [
    ("5 o'clock", "_5_o_clock"), ("class", "class_"), ("seed", "seed_"), ("m²", "m_"),
    ("", "_"), ("²", "_"), ("आयु", "आयु"), ("age", "age")])
def test_texts_become_names_of_conditions(text, name):
    assert identifier(text) == name and Binary(name).name == name


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Condition("2d"),
     "condition name '2d'; accepted: a Python identifier such as '_2d', not the "
     "argument dims, generator, "),
    (lambda: Binary("class"), "condition name 'class'"),
    (lambda: Binary("x"), "condition name 'x'"),
    (lambda: Classes(10, "digit"), "condition name 10"),
    (lambda: Classes("k", 0), "k: 0 classes; accepted: an integer, 1 or more"),
    (lambda: Classes("a", 2.5), "a: 2.5 classes; accepted: an integer, 1 or more"),
    (lambda: Classes("a", "3"), "a: '3' classes; accepted: an integer, 1 or more"),
    (lambda: Classes("a", True), "a: True classes; accepted: an integer, 1 or more"),
    (lambda: Real("r", 3, 3),
     "r: from 3 to 3; accepted: two numbers, the lower one first"),
    (lambda: Real("r", "0", 3),
     "r: from 0 to 3; accepted: two numbers, the lower one first"),
    (lambda: Real("r", 0, None),
     "r: from 0 to None; accepted: two numbers, the lower one first"),
    (lambda: Real("r", 0, math.inf), "r: from 0 to inf"),
    (lambda: Real("r", False, True), "r: from False to True"),
    (lambda: Classes("a", 1.5), "a: 1.5 classes; accepted: an integer, 1 or more"),
    (lambda: Code("u", 1.5), "u: 1.5 codes; accepted: an integer, 1 or more"),
    (lambda: Code("u", 0), "u: 0 codes; accepted: an integer, 1 or more"),
    (lambda: Code("u", 1.0), "u: 1.0 codes; accepted: an integer, 1 or more"),
    (lambda: Code("u", 1, "normal"), "u: kind 'normal'; accepted: uniform, binary"),
    (lambda: Schema([Binary("a"), Classes("a", 2)]),
     "condition name 'a' is used 2 times; accepted: each name once"),
    (lambda: Schema([Binary("ab")]).pack(1, ac=1),
     "unknown condition 'ac'; accepted: ab; did you mean 'ab'?"),
    (lambda: Schema([Binary("a"), Binary("b")]).pack(1, a=1),
     "condition 'b' is missing; given: a; needed: a, b"),
    (lambda: Schema().pack(1, a=1), "unknown condition 'a'; accepted: nothing"),
    (lambda: Schema([Binary("a")]).unpack(torch.zeros(2, 2)),
     "shape (2, 2); accepted: (n, 1) for a"),
    (lambda: Schema().unpack(torch.zeros(2, 1)), "accepted: (n, 0) for no conditions"),
    (lambda: Schema.from_json([{"type": "Binari", "name": "a"}]),
     "'Binari'; accepted: Classes, Binary, Real, Code; d"),
    (lambda: Schema.from_json([{"type": ["Code"], "name": "a"}]), "condition type"),
    (lambda: Schema.from_json([{"name": "a"}]), "condition type 'None'"),
    (lambda: Schema.from_json([{"type": "Binary", "name": "a", "n": 3}]),
     "does not fit Binary")])
def test_constructions_are_refused(make, message):
    with pytest.raises(ValueError) as found:
        make()
    assert message in str(found.value)


def test_schema_takes_conditions_only():
    with pytest.raises(TypeError, match="'digit' is not a condition; accepted: "
                           "Classes, Binary, Real, Code"):
        Schema(["digit"])
    assert (Schema(Binary("a")) + [Code("u"), Real("r", 0, 1)]).names == ["a", "r", "u"]


def test_nearest_choice_is_named():
    assert (accepted(["flow", "adversarial"], "flo")
            == "accepted: flow, adversarial; did you mean 'flow'?")
    assert accepted([], "a") == "accepted: nothing"


@pytest.mark.parametrize("value", [
    torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse(),
    torch.ones(2, device="meta"), torch.ones(2).to(torch.float8_e5m2),
    torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
    torch.nested.nested_tensor([torch.ones(1), torch.ones(1)])],
    ids=["complex", "sparse", "meta", "float8", "quantised", "nested"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # prototypes of PyTorch
def test_tensors_that_are_no_plain_numbers_are_refused(value):
    for item in (Classes("k", 2), Binary("b"), Real("r", 0, 2), Code("u", 2)):
        with pytest.raises(ValueError, match="accepted: "):
            item.pack(value, 2)


@pytest.mark.parametrize("n", [0, -1, 2.5, None, True])
def test_lines_of_conditions_have_a_whole_number_of_points(n):
    for line in (points_on_line, Schema([Code("u", 2)]).interpolate):
        with pytest.raises(ValueError, match="accepted: an integer, 1 or more"):
            line(torch.zeros(2), torch.ones(2), n)
        assert line(torch.zeros(2), torch.ones(2), 3)[1].tolist() == [0.5, 0.5]


def test_likelihoods_are_torchs():
    g = torch.Generator().manual_seed(0)
    logits, prob = (torch.randn(7, 4, generator=g),
                    torch.rand(7, 4, generator=g).softmax(1))
    cases = [(Classes("k", 4), prob, F.cross_entropy(logits, prob, reduction="none"))]
    for item in (Binary("b"), Real("r", 0, 9), Code("u", 4, "binary"), Code("v", 4)):
        bits, k = (item.kind == "binary" if isinstance(item, Code)
                   else isinstance(item, Binary)), item.width
        t = torch.rand(7, k, generator=g)
        loss = F.binary_cross_entropy_with_logits if bits else F.mse_loss
        cases.append((item, t, loss(logits[:, :k], t, reduction="none").sum(1)))
    for item, target, expected in cases:
        assert torch.allclose(item.nll(logits[:, : item.width], target), expected,
                              atol=1e-6)
    schema = Schema(item for item, _, _ in cases)
    width = [item.width for item, _, _ in cases]
    found = schema.nll(torch.cat([logits[:, :k] for k in width], 1),
                       torch.cat([t for _, t, _ in cases], 1))
    assert all(torch.allclose(found[item.name], expected, atol=1e-6)
               for item, _, expected in cases)


def test_draws_are_uniform():
    """Each of 10 means and 15 correlations within 5.5 standard errors: a false
    alarm in 1 of 10⁶ seeds.
    """
    n = 20_000
    schema = Schema([Classes("k", 4), Binary("b"), Real("r", 0, 9), Code("u", 2),
                     Code("v", 2, "binary")])
    c = schema.draw(n, noise(n).rand)
    mean = torch.tensor([0.25] * 4 + [0.5, 0, 0, 0, 0.5, 0.5])
    var = torch.tensor([3 / 16] * 4 + [1 / 4, 1 / 3, 1 / 3, 1 / 3, 1 / 4, 1 / 4])
    assert ((c.mean(0) - mean).abs() < 5.5 * (var / n).sqrt()).all()
    correlation = torch.corrcoef(c[:, 4:].T) - torch.eye(6)
    assert correlation.abs().max() < 5.5 / math.sqrt(n)


def test_condition_names_do_not_collide_with_noise_names():
    schema, source = Schema([Code("row"), Code("eps")]), noise(64)
    c = schema.draw(64, source.rand)
    for name in ("row", "eps", "training row"):
        assert not torch.equal(c[:, :1], 2 * source.rand(name, 1) - 1)
        assert not torch.equal(c[:, 1:], 2 * source.rand(name, 1) - 1)


def test_seed_depends_on_all_parts_and_never_changes():
    keys = [(0,), (1,), (0, 0), ("0",), (0, "a", 1), (0, "a1"), ((0, "a"), 1)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_of(*key) < 2**63 for key in keys)
    assert seed_of(0, "flow", 12) == 5968968144296302004


@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 7), (0, 2, 4, 7), tuple(range(8))])
def test_noise_does_not_depend_on_the_split(cuts):
    whole = Noise((3, "s", 1), slice(None), 7)
    parts = [Noise((3, "s", 1), slice(a, b), 7) for a, b in zip(cuts, cuts[1:])]
    for part in parts[::-1]:
        part.randn("before", 5)
    for kind in ("randn", "rand"):
        draw = [getattr(part, kind)("eps", 2, 3) for part in parts]
        assert torch.equal(torch.cat(draw), getattr(whole, kind)("eps", 2, 3))


def test_noise_differs_by_draw_stage_seed_and_name():
    found = [Noise(key, slice(None), 4).randn(name, 2)
             for key in [(0, "s", 0), (0, "s", 1), (0, "t", 0), (1, "s", 0)]
             for name in ("a", "b")]
    assert len({tuple(t.flatten().tolist()) for t in found}) == 8


def test_batch_gives_fields_and_names_missing_ones():
    batch = Batch({"x": torch.full((2, 3), 255, dtype=torch.uint8),
                   "c": torch.ones(2, 1)}, noise(2), 0.5)
    assert (batch.n == 2 and batch.x.dtype == torch.float32 and (batch.x == 1).all()
            and batch.progress == 0.5)
    assert (torch.equal(batch.rand("a", 3), noise(2).rand("a", 3))
            and not hasattr(batch, "z"))
    with pytest.raises(AttributeError,
                       match="no field 'cc'; accepted: x, c; did you mean 'c'"):
        _ = batch.cc
    assert copy.copy(batch).n == 2


def test_player_needs_an_optimizer_that_holds_its_parameters():
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    for optimizer in (None, torch.optim.SGD([q], 0.1)):
        with pytest.raises(ValueError, match="player 'a': "
                               "1 of its 1 parameters are not in its optimizer"):
            Player("a", [p], lambda batch: {}, optimizer)
    assert Player("a", (t for t in (p, q)), lambda batch: {},
                  torch.optim.SGD([p, q], 0.1)).params == [p, q]
    assert Player("no gradient", (), lambda batch: {}).params == []


@pytest.mark.parametrize(("options", "message"),
                         [({"images": 0}, "images=0; accepted: 1 or more"),
                          ({"batch": 0}, "batch=0; accepted: 1 or more"),
                          ({"keep": "first"}, "keep='first'; accepted: last, best"),
                          ({"keep": "best"}, "needs validate")])
def test_stage_refuses(options, message):
    with pytest.raises(ValueError, match="stage 's'") as found:
        Stage(**{"name": "s", "images": 8, "batch": 4, "players": list, **options})
    assert message in str(found.value)


class Plain(Model):
    """No constructor of its own."""


class Parent(Model):
    def __init__(self, shape, conditions=(), width=8, **more):
        super().__init__(shape, conditions)
        self.width = width


class Child(Parent):
    def __init__(self, conditions=(), depth=2):
        super().__init__((1, 2, 2), conditions, width=4, extra=1)


class Grandchild(Child):
    pass


def test_arguments_are_remembered():
    a, b = Binary("a"), Binary("b")
    assert Plain((1, 2, 2)).arguments == {"shape": (1, 2, 2), "conditions": ()}
    asked = {"shape": (1, 2, 2), "conditions": (), "width": 3, "extra": 5}
    assert Parent((1, 2, 2), width=3, extra=5).arguments == asked
    assert (Child([a], 3).arguments == {"conditions": (a,), "depth": 3}
            and Child().width == 4)
    assert Grandchild(depth=7).arguments == {"conditions": (), "depth": 7}
    once = Child(item for item in (a, b))
    assert once.conditions == once.arguments["conditions"] == (a, b)
    assert Parent(**Parent((1, 2, 2), extra=5).arguments).arguments["extra"] == 5
    assert copy.deepcopy(once).arguments == once.arguments


def test_constructor_keeps_its_name_and_signature():
    assert Child.__init__.__qualname__ == "Child.__init__"
    with pytest.raises(TypeError, match="shape"):
        Parent()
    with pytest.raises(ValueError, match="accepted: .channels, height, width."):
        Parent((2, 2))


def test_model_without_stages_is_named_in_the_error():
    with pytest.raises(TypeError, match="Plain does not say how it is trained"):
        Plain((1, 1, 1)).stages()


def test_rows_are_sampled_with_their_training_frequencies():
    """Counts of 4 rows within 5.2 standard errors: a false alarm in fewer
    than 1 in 10⁶ seeds.
    """
    n, share = 20_000, torch.tensor([0.1, 0.2, 0.3, 0.4])
    model = Plain((1, 1, 1), [Classes("k", 3), Binary("b"), Code("u")])
    kinds = model.conditions.supervised.pack(4, k=[0, 1, 2, 2], b=[1, 0, 0, 1])
    model.store_condition_rows(
        kinds.repeat_interleave(torch.tensor([10, 20, 30, 40]), 0)[torch.randperm(100)])
    assert model.rows.shape == (4, 4) and model.row_counts.sum() == 100
    c = model.condition(n, torch.Generator().manual_seed(0))
    counts = torch.stack([(c[:, :4] == row).all(1).sum() for row in kinds])
    assert counts.sum() == n
    assert ((counts - n * share).abs() < 5.2 * (n * share * (1 - share)).sqrt()).all()
    keyed = model.draw_conditions(8, noise(8).rand)
    assert (torch.equal(keyed, model.draw_conditions(8, noise(8).rand))
            and keyed.shape == (8, 5))


def test_every_row_can_be_drawn_and_no_other():
    rows, counts = torch.arange(3.0)[:, None], torch.tensor([1, 1, 2])
    u = torch.tensor([0, 0.2499, 0.25, 0.4999, 0.5, 1 - 2**-24])
    assert draw_rows(rows, counts, u)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("n", [0, -1, 2.5, 2.0, "2", None, True, math.nan])
def test_only_whole_numbers_count_images(n):
    with pytest.raises(ValueError, match="accepted: an integer, 1 or more"):
        Plain((1, 1, 1)).condition(n)
    assert len(Plain((1, 1, 1)).condition(np.int64(3))) == 3


@pytest.mark.parametrize(
    "value", [-0.1, 10.1, math.nan, math.inf, None, "warm", True, [1.0], 1j])
def test_only_numbers_from_0_to_10_are_temperatures(value):
    with pytest.raises(ValueError, match="accepted: a number from 0 to 10"):
        check_temperature(value)
    assert [check_temperature(t) for t in (0, 0.7, 10, np.float32(0.5))] == [
        0, 0.7, 10, 0.5]


@pytest.mark.parametrize("shape",
                         [32, (2, 2), (0, 2, 2), (1, 2.0, 2.0), "abc", (1, 2, None)])
def test_only_whole_numbers_are_shapes(shape):
    with pytest.raises(ValueError, match=r"accepted: \(channels, height, width\)"):
        Plain(shape)


def test_numbers_of_numpy_become_numbers_of_python():
    """They count, and a card can hold them."""
    whole, part = np.int64(2), np.float32(0.5)
    schema = Schema([Classes("k", whole), Real("r", part, np.int32(3)),
                     Code("u", whole)])
    same = Schema([Classes("k", 2), Real("r", 0.5, 3), Code("u", 2)])
    assert json.loads(json.dumps(schema.to_json())) == same.to_json()
    model = Plain((np.int64(1), whole, whole), schema)
    assert (model.shape == (1, 2, 2)
            and {type(k) for k in model.arguments["shape"]} == {int})
    assert schema.pack(2, k=1, r=1, u=[0, 0]).shape == (2, 5)

    class Sized(Plain):
        def __init__(self, shape, width, options):
            super().__init__(shape)
            self.width = width

    assert type(check_positive_integer(whole, "n")) is int
    sized = Sized((1, 1, 1), whole, {"rate": part, "sizes": [whole]})
    assert (json.dumps(sized.arguments) == '{"shape": [1, 1, 1], "width": '
            '2, "options": {"rate": 0.5, "sizes": [2]}}')
    assert type(sized.width) is int


FRESH = {
    "classifier.Evaluator": "features", "gan.ACGAN": "sample", "cgan.CGAN": "sample",
    "caae.CAAE": "sample", "decoupled.CoupledAE": "sample",
    "decoupled.DecoupledAE": "sample", "caglow.CAGlow": "sample",
}


@pytest.mark.parametrize("name", FRESH)
def test_verbs_of_a_fresh_model_leave_batch_statistics_alone(name):
    """An image does not depend on those that are made with it, and a call leaves
    the model as it was.
    """
    module, kind = name.split(".")
    torch.manual_seed(0)
    model = getattr(importlib.import_module(f"condgen.models.{module}"),
                    kind)((1, 16, 16), [Classes("k", 3)])
    before = {key: t.clone() for key, t in model.state_dict().items()}
    if FRESH[name] == "sample":
        noise = lambda: torch.Generator().manual_seed(1)
        again = [model.sample(5, generator=noise(), k=[0, 1, 2, 0, 1])
                 for _ in range(2)]
    else:
        x = torch.rand(5, 1, 16, 16)
        again = [model.features(x),
                 torch.cat([model.features(image[None]) for image in x])]
    assert torch.allclose(*again, atol=1e-5)
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_condition_fills_in_what_is_given():
    model = Plain((1, 1, 1), [Classes("k", 3), Code("u")])
    c = model.condition(4, torch.Generator().manual_seed(0), k=[0, 1, 2, 0])
    assert model.conditions.unpack(c)["k"].tolist() == [0, 1, 2, 0]
    assert torch.equal(
        c, model.condition(4, torch.Generator().manual_seed(0), k=[0, 1, 2, 0]))
    for bad in ({"n": 0}, {"n": 2, "j": 1}, {"n": 2, "k": 5}, {"n": 2, "generator": 3}):
        with pytest.raises(ValueError, match="accepted"):
            model.condition(**bad)


def test_rows_have_the_models_precision_and_width():
    model = Plain((1, 1, 1), [Binary("b")]).double()
    model.store_condition_rows(torch.ones(3, 1))
    assert (model.rows.dtype == torch.float64
            == model.check_images(torch.zeros(1, 1, 1, 1)).dtype)
    with pytest.raises(ValueError, match=r"accepted: \(n, 1\) for b"):
        model.store_condition_rows(torch.ones(3, 2))


@pytest.mark.parametrize(("images", "message"), [
    (torch.zeros(2, 1, 2, 3), "shape (2, 1, 2, 3); accepted: a tensor (n, 1, 2, 2)"),
    (torch.zeros(1, 2, 2), "shape (1, 2, 2)"),
    (np.zeros((1, 1, 2, 2)), "given as ndarray"),
    (torch.zeros(2, 1, 2, 2, dtype=torch.uint8),
     "torch.uint8; accepted: torch.float16, torch.bfloat16, torch.float32, "
     "torch.float64; divide bytes by 255"),
    (torch.zeros(0, 1, 2, 2), "(0, 1, 2, 2), an empty batch; accepted: 1 or more"),
    (torch.full((1, 1, 2, 2), 1.5), "from 1.5 to 1.5"),
    (torch.full((1, 1, 2, 2), math.nan), "from nan to nan")])
def test_images_are_refused(images, message):
    with pytest.raises(ValueError) as found:
        Plain((1, 2, 2)).check_images(images)
    assert message in str(found.value)
