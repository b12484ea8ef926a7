"""Explorers: controls for any schema, noise held still, the call that makes the same
images, and a real kernel.
"""

import asyncio
import io
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from condgen.conditions import Binary, Classes, Code, Condition, Real, Schema
from condgen.contracts import Model
from condgen.explore import (
    MAX_REDRAW_DELAY, REDRAW_DELAY, Explorer, ConditionControls, interpolate_conditions,
    explore, control_labels, value_range, sheet_png, slider_step)
from condgen.game_explorer import explore_game
from condgen.instability import train_gaussian

TOY = '''
import torch
from condgen.conditions import Binary, Classes, Code, Real
from condgen.contracts import Model
from condgen.explore import explore

class Toy(Model):
    """A picture whose every pixel depends on all conditions and on its noise."""

    def sample(self, n, temperature=0.7, generator=None, **conditions):
        c = self.condition(n, generator, **conditions)
        self.eps = torch.randn(n, *self.shape, generator=generator)
        w = torch.randn(c.shape[1], *self.shape, generator=torch.Generator().manual_seed(0))
        return torch.sigmoid((c[:, :, None, None, None] * w).sum(1) + temperature * self.eps)
'''
PLACE: dict[str, Any] = {}
exec(TOY, PLACE)
Toy: type[Model] = PLACE["Toy"]  # the very model that the kernel runs

FAST = settings(max_examples=25, deadline=None, derandomize=True)
SHARES = st.floats(0, 1)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Any mix of conditions, also none."""
    items: list[Condition] = []
    for i, kind in enumerate(
            draw(st.lists(st.sampled_from([Classes, Binary, Real, Code]), max_size=5))):
        name = f"a_{i}"
        if kind is Classes:
            items.append(Classes(name, draw(st.integers(1, 12))))
        elif kind is Binary:
            items.append(Binary(name))
        elif kind is Real:
            low = draw(st.floats(-100, 100))
            items.append(Real(name, low, low + draw(st.floats(1, 1e6))))
        else:
            items.append(Code(name, draw(st.integers(1, 3)),
                              draw(st.sampled_from(["uniform", "binary"]))))
    return Schema(items)


def settings_of(schema: Schema) -> st.SearchStrategy[dict[str, Any]]:
    """Values that controls can show."""
    one = {}
    for item in schema:
        low, high = value_range(item)
        number = (st.integers(low, high) if isinstance(item, Classes)
                  else st.floats(low, high).map(lambda v: v + 0.0))
        one[item.name] = (st.lists(number, min_size=item.n, max_size=item.n)
                          if isinstance(item, Code) else number)
    return st.fixed_dictionaries(one)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(code: str, model: Model) -> torch.Tensor:
    """What a call copied from an explorer returns."""
    return eval(code, {"model": model, "torch": torch})


@FAST
@given(st.data())
def test_controls(data: st.DataObject) -> None:
    """One labelled control for each number, over its whole range in a hundred steps
    or more, followed while dragged.
    """
    schema = data.draw(schemas())
    for setting in (ConditionControls(schema), ConditionControls(schema, top=True)):
        assert list(setting.controls) == schema.names
        for item in schema:
            controls, (low, high) = setting.controls[item.name], value_range(item)
            assert len(controls) == (item.n if isinstance(item, Code) else 1)
            assert [c.description for c in controls] == control_labels(item)
            for control in controls:
                if isinstance(control, widgets.Dropdown):
                    assert (control.options, low, high) == ((0,), 0, 0)
                    continue
                assert (control.min, control.max, control.continuous_update) == (
                    low, high, True)
                assert (isinstance(item, Classes)
                        or 100 <= round((high - low) / control.step, 6) <= 250.001)
        schema.pack(1, **setting.values)
    low, high = ConditionControls(schema), ConditionControls(schema, top=True)
    assert all(c.value == value_range(item)[1] for item in schema[:1]
               for c in high.controls[item.name])
    assert all(low.values[item.name] == high.values[item.name] for item in schema[1:])


def flat(values: dict[str, Any]) -> list[float]:
    """All numbers of some settings, in order of the names."""
    return [v for name in sorted(values) for v in (
        values[name] if isinstance(values[name], list) else [values[name]])]


def same(schema: Schema, a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether settings agree up to the rounding errors of a page's steps."""
    largest = max((abs(v) for item in schema for v in value_range(item)), default=1)
    return a.keys() == b.keys() and flat(a) == pytest.approx(
        flat(b), 0, 1e-14 * largest)


@FAST
@given(st.data())
def test_values_and_controls_agree(data: st.DataObject) -> None:
    schema = data.draw(schemas())
    values, setting = data.draw(settings_of(schema)), ConditionControls(schema)
    setting.values = values
    assert same(schema, setting.values, values)
    shown = [c.value for c in setting]
    in_order = [values[name] for name in schema.names]
    assert shown == [v for value in in_order
                     for v in (value if isinstance(value, list) else [value])]
    if values:
        name = data.draw(st.sampled_from(sorted(values)))
        other = data.draw(settings_of(schema))
        setting.values = {name: other[name]}
        assert same(schema, setting.values, {**values, name: other[name]})


@FAST
@given(st.data())
def test_displayed_call_reproduces_the_images(data: st.DataObject) -> None:
    schema = data.draw(schemas())
    shape = data.draw(st.sampled_from([(1, 4, 4), (3, 2, 5)]))
    start = data.draw(settings_of(schema))
    model = Toy(shape, schema)
    made = explore(model, data.draw(st.integers(1, 7)), **start)
    assert torch.equal(made.images, model.sample(made.n, 0.7, seeded(0), **start))
    made.b.values = data.draw(settings_of(schema))
    made.way.value, made.temperature.value = (data.draw(SHARES),
                                              data.draw(st.floats(0, 1.5)))
    made.seed.value = data.draw(st.integers(0, 2**31 - 1))
    assert made.error is None
    assert torch.equal(run(made.code, model), made.images)
    assert torch.equal(model.sample(made.n, **made.values), made.images)
    assert made.image.value == sheet_png(made.images)


@FAST
@given(st.data())
def test_between_interpolates_packed_conditions_linearly(data: st.DataObject) -> None:
    schema = data.draw(schemas())
    a, b = data.draw(settings_of(schema)), data.draw(settings_of(schema))
    assert (interpolate_conditions(schema, a, b, 0) == a
            and interpolate_conditions(schema, a, b, 1) == b)
    ends = [schema.pack(1, **v)[0] for v in (a, b)]
    for k, row in enumerate(schema.interpolate(*ends, 9)):
        packed = schema.pack(1, **interpolate_conditions(schema, a, b, k / 8))[0]
        assert torch.allclose(packed, row, atol=5e-5)
    t = data.draw(SHARES)
    for item in schema:
        value = interpolate_conditions(schema, a, b, t)[item.name]
        if isinstance(item, Classes) and a[item.name] != b[item.name] and 0 < t < 1:
            assert min(value) >= 0 and abs(sum(value) - 1) < 1e-5
        elif isinstance(item, Classes):
            assert isinstance(value, int)


@pytest.mark.parametrize("item",
                         [Real("r", -2 / 3, 2 / 3), Real("r", -1e6 - 2 / 3, 2 / 3)])
def test_between_never_leaves_the_range(item: Condition) -> None:
    """2/3 rounds up: what is rounded for reading has to be kept inside."""
    for end in (item.low, item.high):
        value = interpolate_conditions(Schema(item), {"r": end},
                                       {"r": end * (1 - 1e-9)}, 0.5)["r"]
        assert (item.low <= value <= item.high
                and abs(value - end) < 1e-6 * (item.high - item.low))


@FAST
@given(schemas())
def test_numbers_start_at_the_middle_slider_step(schema: Schema) -> None:
    setting = ConditionControls(schema)
    for item in schema:
        low, high = value_range(item)
        for control in setting.controls[item.name]:
            if (isinstance(item, Real)
                    or isinstance(item, Code) and item.kind == "uniform"):
                steps, off = ((control.value - low) / control.step,
                              control.value - (low + high) / 2)
                assert (abs(steps - round(steps)) < 1e-6
                        and abs(off) <= 0.5001 * control.step)
            else:
                assert control.value == low


@FAST
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_steps_are_round(low: float, span: float) -> None:
    high = low + span
    if high > low:
        step = slider_step(low, high)
        lead = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(lead - m) for m in (1, 2, 5)) < 1e-6
        assert step <= (high - low) / 100 * (1 + 1e-6) < 2.5001 * step


@pytest.fixture
def toy() -> Explorer:
    """Two grey images with three kinds of conditions."""
    return explore(
        Toy((1, 3, 3), [Classes("kind", 3), Real("age", 0, 80), Code("u", 2)]), 2)


def test_interpolation_ends_are_a_and_b(toy: Explorer) -> None:
    toy.a.values, toy.b.values = ({"kind": 1, "age": 10.0},
                                  {"kind": 2, "age": 70.5, "u": [1.0, -1.0]})
    for end, setting in ((0, toy.a), (1, toy.b)):
        toy.way.value = end
        assert torch.equal(toy.images,
                           toy.model.sample(2, generator=seeded(0), **setting.values))
    toy.way.value = 0.5
    assert toy.conditions == {"kind": [0.0, 0.5, 0.5], "age": 40.25, "u": [0.5, -0.5]}


def test_noise_is_fixed_while_other_settings_change(toy: Explorer) -> None:
    first = toy.model.eps
    for move in ({"kind": 2}, {"age": 3.0}, {"u": [1.0, 0.5]}):
        before = toy.images
        toy.a.values = move
        assert torch.equal(toy.model.eps, first) and not torch.equal(toy.images, before)
    toy.way.value = 0.3
    assert torch.equal(toy.model.eps, first)
    before = toy.images
    toy.temperature.value = 0.2
    assert torch.equal(toy.model.eps, first) and not torch.equal(toy.images, before)
    toy.seed.value = 1
    assert not torch.equal(toy.model.eps, first)


def test_changing_a_hidden_setting_moves_interpolation_to_it(toy: Explorer) -> None:
    toy.b.controls["age"][0].value = 20.0
    assert toy.way.value == 1 and toy.conditions == toy.b.values
    toy.a.controls["kind"][0].value = 2
    assert toy.way.value == 0 and toy.conditions == toy.a.values
    toy.way.value = 0.5
    toy.a.controls["kind"][0].value = 0
    toy.b.controls["kind"][0].value = 1
    assert toy.way.value == 0.5


@pytest.mark.parametrize(("n", "shape"), [(1, (1, 16, 16)), (6, (3, 8, 8)),
                                          (16, (1, 28, 28)), (3, (3, 200, 100))])
def test_a_sheet_is_the_images_enlarged(n: int, shape: tuple[int, int, int]) -> None:
    x = torch.rand(n, *shape, generator=seeded(0))
    picture = torch.from_numpy(np.array(Image.open(io.BytesIO(sheet_png(x)))))
    (_, h, w), columns = shape, -(-n // max(1, int(n**0.5)))
    zoom = max(1, 480 // (columns * w))
    assert picture.shape[1] == zoom * (columns * w + columns - 1)
    for i, image in enumerate(x):
        top, left = zoom * (i // columns) * (h + 1), zoom * (i % columns) * (w + 1)
        part = picture[top : top + zoom * h, left : left + zoom * w].permute(2, 0, 1)
        wanted = (image * 255).round().byte().repeat_interleave(
            zoom, 1).repeat_interleave(zoom, 2)
        assert torch.equal(part, wanted.expand(3, -1, -1))


def test_caption_describes_the_settings(toy: Explorer) -> None:
    toy.a.values = {"kind": 2, "u": [0.5, -1.0]}
    assert (toy.caption
            == "2 images of Toy: kind 2; age 40; u 0.5, −1; temperature 0.7; noise 0")
    assert toy.caption in toy.text.value and repr(toy).endswith(toy.caption)
    toy.a.values, toy.b.values, toy.way.value = {"kind": 0}, {"kind": 1}, 0.25
    assert "kind 0 (75 %) and 1 (25 %)" in toy.caption
    plain = explore(Toy((3, 2, 2), []), 1)
    assert plain.caption == "1 image of Toy: temperature 0.7; noise 0"
    assert (plain.code == "model.sample(1, temperature=0.7, "
            "generator=torch.Generator().manual_seed(0))")


class Shy(Model):
    """Fails for its second class, and returns what no image can be for its third."""

    def sample(self, n: int, temperature: float = 1.0,
               generator: torch.Generator | None = None, **c: Any):
        if c["kind"] == 1:
            raise RuntimeError("not <this> one")
        return torch.full((n, *self.shape), math.nan if c["kind"] == 2 else 0.5)


def test_errors_are_shown() -> None:
    shy = explore(Shy((1, 2, 2), Classes("kind", 3)), 2)
    assert (shy.error, shy.alert.value, shy.picture.layout.visibility) == (
        None, "", "visible")
    for kind, words in ((1, "not &lt;this&gt; one"),
                        (2, "accepted: finite values in [0, 1]")):
        shy.a.values = {"kind": kind}
        assert (words in shy.alert.value and 'role="alert"' in shy.alert.value
                and "Traceback" in shy.alert.value)
        assert "<this>" not in shy.alert.value
        assert (shy.picture.layout.visibility == "hidden"
                and f"kind={kind}" in shy.text.value)
        with pytest.raises(type(shy.error)):
            shy.images.sum()
    shy.a.values = {"kind": 0}
    assert (shy.error, shy.alert.value, shy.picture.layout.visibility) == (
        None, "", "visible")
    assert bool((shy.images == 0.5).all())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"n": 0}, "n=0; accepted: an integer, 1 or more"),
     ({"n": 2.5}, "n=2.5; accepted: an integer, 1 or more"),
     ({"n": True}, "n=True; accepted: an integer, 1 or more"),
     ({"knd": 1},
      "unknown condition 'knd'; accepted: kind, age, u; did you mean 'kind'?"),
     ({"kind": 3}, "kind=3; accepted: an integer from 0 to 2"),
     ({"kind": [0.5, 0.5, 0.0]}, "accepted: an integer from 0 to 2"),
     ({"kind": 1.0}, "kind=1.0; accepted: an integer from 0 to 2"),
     ({"age": -1}, "age=-1; accepted: a number from 0 to 80"),
     ({"age": math.nan}, "age=nan; accepted: a number from 0 to 80"),
     ({"age": "old"}, "age=old; accepted: a number from 0 to 80"),
     ({"u": 0.5}, "u=0.5; accepted: 2 numbers from -1 to 1"),
     ({"u": [[0.0, 0.0]]}, "accepted: 2 numbers from -1 to 1")],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any], words: str) -> None:
    model = Toy((1, 2, 2), [Classes("kind", 3), Real("age", 0, 80), Code("u", 2)])
    with pytest.raises(ValueError) as caught:
        explore(model, **wrong)
    assert words in str(caught.value)


class Edits(Toy):
    def edit(self, x: torch.Tensor, **conditions: Any) -> torch.Tensor:
        return (self.check_images(x)
                + self.conditions.pack(len(x), **conditions)[:, :1, None, None]) / 2


def test_given_images_are_edited_and_have_no_noise() -> None:
    model, x = (Edits((1, 2, 2), [Binary("lit"), Real("age", 0, 80)]),
                torch.rand(3, 1, 2, 2))
    panel = explore(model, x, age=40)
    assert torch.equal(panel.images, model.edit(x, lit=0, age=40))
    assert torch.equal(eval(panel.code, {"model": model, "x": x}), panel.images)
    assert "edited by Edits" in panel.caption and "noise" not in panel.caption
    panel.way.value = 1.0
    assert torch.equal(panel.images, model.edit(x, **panel.b.values))

    def shown(widget: Any) -> list[Any]:
        return [widget, *(part for child in getattr(widget, "children", ())
                          for part in shown(child))]

    assert panel.temperature not in shown(panel) and panel.way in shown(panel)
    sampled = explore(model, 3)
    assert sampled.temperature in shown(sampled)


def test_images_that_cannot_be_edited_are_refused() -> None:
    model = Edits((1, 2, 2), [Binary("lit")])
    bright = torch.full((1, 1, 2, 2), 2.0)
    for bad, words in ((torch.rand(3, 2, 2), "accepted"),
                       (torch.rand(0, 1, 2, 2), "an empty batch"), (bright, "in .0, 1.")):
        with pytest.raises(ValueError, match=words):
            explore(model, bad)
    with pytest.raises(TypeError, match="Toy cannot be explored; accepted: "
                           ".* shape, sample and edit"):
        explore(Toy((1, 2, 2), [Binary("lit")]), torch.rand(1, 1, 2, 2))


def test_wrong_models_are_refused() -> None:
    with pytest.raises(TypeError,
                       match="Linear cannot be explored; accepted: a model with"):
        explore(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="images of 2 channels; accepted: 1 or 3"):
        explore(Toy((2, 2, 2), []))


def test_a_refused_setting_changes_nothing(toy: Explorer) -> None:
    before = toy.a.values
    with pytest.raises(ValueError, match="age=81"):
        toy.a.values = {"kind": 2, "age": 81}
    assert toy.a.values == before


def test_rapid_changes_are_rendered_once(toy: Explorer) -> None:
    pictures: list[torch.Tensor] = []
    sample = toy.model.sample

    def counted(n: int, **values: Any) -> torch.Tensor:
        pictures.append(sample(n, **values))
        return pictures[-1]

    toy.model.sample = counted

    async def drag() -> None:
        for i in range(1, 100):
            toy.way.value = i / 100
        assert not pictures
        await asyncio.sleep(4 * MAX_REDRAW_DELAY)
        assert len(pictures) == 1
        toy.way.value = 0.5
        at_once = toy.images
        assert len(pictures) == 2 and at_once is pictures[1]
        await asyncio.sleep(4 * MAX_REDRAW_DELAY)
        assert len(pictures) == 2

    asyncio.run(drag())
    toy.way.value = 0.75
    assert len(pictures) == 3 and torch.equal(pictures[2], run(toy.code, toy.model))


def test_continuous_changes_are_rendered_after_a_delay(toy: Explorer) -> None:
    """While a slider is dragged for twice `MAX_REDRAW_DELAY`, faster than
    `REDRAW_DELAY`, a picture is due at once.
    """

    async def drag() -> bool:
        loop = asyncio.get_running_loop()
        end, i = loop.time() + 2 * MAX_REDRAW_DELAY, 0
        while loop.time() < end:
            time.sleep(REDRAW_DELAY / 10)  # the loop gets no chance to draw
            toy.way.value, i = 0.5 + 1e-3 * (i % 2), i + 1
        return toy.due.when() <= loop.time()

    assert asyncio.run(drag())


def test_rendering_uses_one_thread_and_restores_the_count(
        monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the count is played: real threads would stay in this process, and others
    # could not be forked from it.
    seen, threads = [], [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    class Counts(Toy):
        def sample(self, n: int, temperature: float = 1.0,
                   **values: Any) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().sample(n, temperature, **values)

    explore(Counts((1, 2, 2), [Binary("b")]), 1)
    assert (seen, threads) == ([1], [2, 1, 2])


@pytest.mark.parametrize(("own", "top"), [(0.7, 1.5), (1.5, 1.5), (3.0, 3.0)])
def test_temperature_slider_range_and_default(own: float, top: float) -> None:
    class Warm(Toy):
        def sample(self, n: int, temperature: float = own,
                   **values: Any) -> torch.Tensor:
            return super().sample(n, temperature, **values)

    made = explore(Warm((1, 2, 2), []), 1).temperature
    assert (made.min, made.value, made.max) == (0, own, top)


# ---- a real kernel


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    """A client of a running kernel."""
    start = pytest.importorskip("jupyter_client.manager").start_new_kernel
    manager, client = start(kernel_name="python3",
                            extra_arguments=["--log-level=ERROR"])
    yield client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def answer(client: Any, source: str) -> str:
    """Runs a cell and returns what it prints."""
    printed: list[str] = []

    def hook(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])
        assert message["msg_type"] != "error", message["content"].get("traceback")

    client.execute_interactive(source, output_hook=hook, timeout=60)
    return "".join(printed)


def move(client: Any, comm: str, value: float) -> None:
    """Moves a slider as a page does."""
    data = {"method": "update", "state": {"value": value}, "buffer_paths": []}
    client.shell_channel.send(client.session.msg("comm_msg",
                                                 {"comm_id": comm, "data": data}))


def pictures(client: Any, comm: str, until: bytes) -> list[bytes]:
    """What the picture becomes, up to the one that is waited for."""
    seen: list[bytes] = []
    end = time.monotonic() + 60
    while until not in seen and time.monotonic() < end:
        message = client.get_iopub_msg(timeout=60)
        content = message["content"]
        if message["msg_type"] == "comm_msg" and content["comm_id"] == comm:
            if ["value"] in content["data"].get("buffer_paths", []):
                seen.append(bytes(message["buffers"][0]))
    return seen


def test_slider_messages_update_the_kernel(kernel: Any) -> None:
    """A cell shows an explorer; then the messages of a page move its sliders,
    and pictures come back.
    """
    model = Toy((1, 4, 4), [Classes("kind", 3), Code("u", 1)])

    def wanted(**values: Any) -> bytes:
        return sheet_png(model.sample(4, generator=seeded(0), **values))

    made = ("explorer = explore(Toy((1, 4, 4), [Classes('kind', 3), Code('u', 1)]), "
            "4)\nexplorer")
    answer(kernel, f"{TOY}\n{made}")
    ids = ("import json; e = explorer; "
           "print(json.dumps([w.comm.comm_id for w in (e.picture, *e.a, e.way)]))")
    picture, kind, u, _ = json.loads(answer(kernel, ids))

    move(kernel, kind, 2)
    assert pictures(kernel, picture, wanted(kind=2, u=0.0)) == [wanted(kind=2, u=0.0)]
    move(kernel, kind, 0)
    assert pictures(kernel, picture, wanted(kind=0, u=0.0)) == [wanted(kind=0, u=0.0)]

    answer(kernel, "model = explorer.model; draw = model.sample; import time\n"
                   "model.sample = lambda n, **k: (time.sleep(0.2), draw(n, **k))[1]")
    for i in range(1, 51):
        move(kernel, u, i / 50)
    seen = pictures(kernel, picture, wanted(kind=0, u=1.0))
    assert seen[-1] == wanted(kind=0, u=1.0) and len(seen) <= 15
    assert answer(kernel,
                  "print(explorer.a.values)").strip() == "{'kind': 0, 'u': [1.0]}"


def test_game_explorer_shows_the_trajectory_of_its_code() -> None:
    panel = explore_game(game="non_saturating", gap=3.0, exact=True)
    assert torch.equal(panel.path.samples,
                       eval(panel.code, {"train_gaussian": train_gaussian}).samples)
    first = panel.picture.value
    panel.step.value = 50
    later = panel.picture.value
    assert (later != first and f"mean {panel.path.mean[50]:.2f}" in later
            and "nan" not in later)
    panel.settings["gap"].value = 5.0
    assert (panel.path.mean[0] == -5 and panel.picture.value != later
            and "step 50" in panel.picture.value)


def test_game_explorer_refuses_unknown_settings() -> None:
    with pytest.raises(ValueError,
                       match="unknown setting 'gape'; .*did you mean 'gap'"):
        explore_game(gape=3)
    with pytest.raises(ValueError,
                       match="game='saturated'; .*did you mean 'saturating'"):
        explore_game(game="saturated")


def test_a_slider_at_nine_tenths_is_called_so():
    """A page adds steps up, with rounding errors in the last digit."""
    from condgen.models.cglow import CGlow

    panel = explore(CGlow((1, 8, 8), [Real("u", -1, 1), Real("v", 0, 1)], 1, 1, 4), 1)
    for sent in (0.8999999999999999, 0.9000000000000001, 0.9):
        panel.a.values = {"u": sent, "v": 1 / 3}
        assert (panel.values["u"], panel.values["v"]) == (0.9, 1 / 3)
        assert "u=0.9, v=0.333" in panel.code
