"""Altered cards, states, tensors and bytes of run folders: refused by name, or as before.

A longer search: CONDGEN_EXAMPLES=1000 pytest tests/test_generated_cards.py
"""

import copy
import json
import math
import os
import resource
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from condgen.conditions import Binary, Classes, Code, Schema
from condgen.files import read_json, read_tensors, write_tensors
from condgen.models.caglow import CAGlow
from condgen.models.gan import ACGAN
from condgen.models.glow import Glow
from condgen.runs import load, saved_states
from condgen.training import fit

pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = int(os.environ.get("CONDGEN_EXAMPLES", 0))
SECONDS, BYTES = 10, 2**30  # of computation and memory that a call may cost
LABELS = Schema([Classes("k", 3), Binary("b")])
SMALL = {"levels": 1, "depth": 1, "width": 4}
MODELS = {
    "glow": lambda: Glow((1, 4, 4), **SMALL),
    "acgan": lambda: ACGAN((1, 8, 8), [*LABELS, Code("u", 2)], noise=3, width=1),
    "caglow": lambda: CAGlow((1, 4, 4), [*LABELS, Code("u")], **SMALL, hidden=4),
}
STAGES = {"glow": 1, "acgan": 1, "caglow": 2}
ROUNDS = 3  # of each stage


class Pictures:
    """Twelve images of noise with labels."""

    sha256 = "0" * 64

    def __init__(self, model):
        self.name, self.shape = "pictures", model.shape
        self.conditions = model.conditions.supervised
        g = torch.Generator().manual_seed(0)
        self.fields = {"x": torch.rand(12, *model.shape, generator=g)}
        if self.conditions:
            self.fields["c"] = LABELS.pack(12, k=[0, 1, 2] * 4, b=[0, 1] * 6)

    def table(self, split):
        return self.fields


def trained(name, out, **options):
    torch.manual_seed(0)
    model = MODELS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(model, Pictures(model), out, images=4 * ROUNDS, batch=4,
                   progress=False, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each model, one that stopped in its last stage, and tensors."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    for name, stages in STAGES.items():
        run = trained(name, root / name)
        for _ in range(ROUNDS * (stages - 1) + 2):
            trained(name, root / f"{name}-stopped", budget=0)
        found[name] = {k: t.clone() for k, t in run.model.state_dict().items()}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 8 * BYTES, limits[1]))
    yield root, found
    resource.setrlimit(resource.RLIMIT_AS, limits)


def memory(name):
    """A line of what Linux says of this process, in bytes; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def costs(call):
    """Result or refusal of a call that has to be cheap."""
    if memory("VmHWM"):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    begun, before = time.process_time(), memory("VmRSS")
    try:
        return call()
    except (ValueError, OSError) as error:
        return error
    finally:
        assert time.process_time() - begun < SECONDS, "too slow"
        assert memory("VmHWM") - before < BYTES, "too much memory"


LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=6)
    | st.sampled_from([
        10**6, 30_000, 10**9, 2**31, 2**63, 10**30, -10**9, 0, 1e308, "", "x",
        "\ud800", "condgen.models.cglow.CGlow", "condgen.models.glow.glow_flow",
        "os.system", "additive", "top", "literal", "Binary", "u", "flow", "NaN"]))
VALUES = st.recursive(LEAVES, lambda c: st.lists(c, max_size=4) | st.dictionaries(
    st.text(max_size=6), c, max_size=4), max_leaves=8)


def places(value, path=()):
    """The paths to all values inside a JSON value."""
    items = (value.items() if isinstance(value, dict)
             else enumerate(value) if isinstance(value, list) else ())
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


def alter(value, data):
    """A copy of a JSON object with one to three parts replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        options = list(places(value))
        if not options:
            break
        *path, key = data.draw(st.sampled_from(options))
        part = value
        for step in path:
            part = part[step]
        how = data.draw(st.sampled_from(["replace", "replace", "remove", "wrap",
                                         "add"]))
        if how == "remove":
            del part[key]
        elif how == "add" and isinstance(part, dict):
            part[data.draw(st.text(max_size=6))] = data.draw(VALUES)
        else:
            part[key] = ([part[key]] if how == "wrap" else data.draw(VALUES))
    return value


def alter_tensors(tensors, data):
    """Tensors of which one, or all, have another type, shape, name or content."""
    tensors = dict(tensors)
    names = sorted(tensors)
    chosen = data.draw(st.sampled_from([*names, None]))
    how = data.draw(st.sampled_from(["type", "type", "shape", "name", "content",
                                     "remove", "add"]))
    kinds = [torch.float64, torch.bfloat16, torch.float16, torch.float32, torch.int32,
             torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn,
             torch.float8_e5m2, torch.complex64]
    kind = data.draw(st.sampled_from(kinds))
    for name in names if chosen is None else [chosen]:
        t = tensors[name]
        if how == "type":
            tensors[name] = t.to(kind)
        elif how == "shape":
            turn = data.draw(st.sampled_from([
                lambda t: t[None], lambda t: t.reshape(-1), lambda t: t.reshape(-1)[:1],
                lambda t: t.reshape(-1)[:0], lambda t: torch.zeros(()).to(t),
                lambda t: torch.cat([t.reshape(-1), t.reshape(-1)])]))
            tensors[name] = turn(t)
        elif how == "content":
            fill = data.draw(st.sampled_from([math.nan, math.inf, -1, 0, 2**62, 1e30]))
            tensors[name] = torch.full_like(t, fill) if (
                t.is_floating_point() or fill in (-1, 0, 2**62)) else t
        elif how == "remove":
            del tensors[name]
        elif how == "name":
            tensors[data.draw(st.sampled_from([
                f"{name}.x", name[:-1], "average.x", "optimizer.9.9.step",
                "optimizer.0.0.x", "best.x", "x"])) or "y"] = tensors.pop(name)
        else:
            tensors[data.draw(st.text(max_size=5)) or "z"] = torch.ones(3).to(kind)
    return tensors


def alter_bytes(raw, data):
    """Bytes with a few replaced, removed or inserted."""
    raw = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        end = at + data.draw(st.sampled_from([0, 1, 1, 8, len(raw)]))
        raw[at:end] = data.draw(st.binary(max_size=3))
    return bytes(raw)


@pytest.fixture
def copied(runs, tmp_path_factory):
    """Gives a copy of a run in a new folder, and the tensors of the finished one."""
    def make(name):
        folder = tmp_path_factory.mktemp("altered") / "run"
        shutil.copytree(runs[0] / name, folder)
        return folder, runs[1][name.removesuffix("-stopped")]
    return make


def same(model, tensors):
    found = model.state_dict()
    return found.keys() == tensors.keys() and all(
        torch.equal(found[k], t) or found[k].isnan().any() for k, t in tensors.items())


def refused(found, folder):
    """Whether a call was refused; then it has to name the folder."""
    if isinstance(found, Exception):
        assert str(folder) in str(found) and "memory" not in str(found), str(found)
    return isinstance(found, Exception)


def examine_load(folder, tensors):
    """Loads and samples what was altered; `tensors` is what it has to have."""
    found = costs(lambda: load(folder))
    if not refused(found, folder):
        assert same(found, tensors) and len(repr(found)) < 2_000
        made = costs(lambda: found.sample(2, temperature=0.5))
        assert isinstance(made, ValueError) or made.shape == (2, *found.shape)


def examine_fit(name, folder):
    """Trains on from what was altered: the length must not change."""
    found = costs(lambda: trained(name, folder))
    if not refused(found, folder):
        assert found.finished and found.images == 4 * ROUNDS * STAGES[name]
        assert repr(found) and found._repr_html_()


def examples(n):
    return settings(deadline=None, max_examples=EXAMPLES or n, database=None,
                    suppress_health_check=list(HealthCheck))


LARGE = [{"depth": 1_000_000}, {"width": 30_000}, {"levels": 10**9}, {"hidden": 10**9},
         {"noise": 10**12}, {"shape": [1_000_000, 16, 16]}, {"shape": [1_000, 4, 4]},
         {"shape": [1, 2**20, 2**20]}, {"width": 10**30},
         {"conditions": [{"type": "Classes", "name": "k", "n": 10**9}]},
         {"conditions": [{"type": "Code", "name": "u", "n": 20_000}]}]


@pytest.mark.parametrize("change", LARGE, ids=str)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_large_sizes_on_a_card_cost_nothing(copied, name, change):
    folder, tensors = copied(name)
    path = folder / "card.json"
    card = read_json(path)
    card["arguments"] |= change
    path.write_text(json.dumps(card))
    examine_load(folder, tensors)  # a size that the model does not use changes nothing
    assert refused(costs(lambda: trained(name, folder)), folder)


NAMES = st.sampled_from(sorted(MODELS))


@examples(60)
@given(NAMES, st.booleans(), st.data())
def test_altered_cards(copied, name, stopped, data):
    folder, tensors = copied(name + "-stopped" * stopped)
    path = folder / "card.json"
    path.write_text(json.dumps(alter(read_json(path), data)))
    if not stopped:
        examine_load(folder, tensors)
    examine_fit(name, folder)


@examples(40)
@given(NAMES, st.data())
def test_altered_states(copied, name, data):
    """A state with other facts and a checksum that fits them."""
    folder, _ = copied(f"{name}-stopped")
    path = saved_states(folder / "state")[0] / "tensors.safetensors"
    tensors, info = read_tensors(path)
    write_tensors(path, tensors, **alter(info, data))
    examine_fit(name, folder)


@examples(40)
@given(NAMES, st.booleans(), st.data())
def test_altered_tensors(copied, name, stopped, data):
    """Other tensors with a checksum that fits them."""
    folder, _ = copied(name + "-stopped" * stopped)
    path = (saved_states(folder / "state")[0] / "tensors.safetensors" if stopped
            else folder / "model.safetensors")
    tensors, meta = read_tensors(path)
    tensors = alter_tensors(tensors, data)
    write_tensors(path, tensors, **meta)
    if not stopped:
        examine_load(folder, tensors)
    examine_fit(name, folder)


@examples(40)
@given(NAMES, st.booleans(), st.data())
def test_altered_bytes(copied, name, stopped, data):
    folder, tensors = copied(name + "-stopped" * stopped)
    path = data.draw(st.sampled_from(sorted(
        p for p in folder.rglob("*") if p.is_file() and p.name != "latest")))
    path.write_bytes(alter_bytes(path.read_bytes(), data))
    if not stopped:
        examine_load(folder, tensors)
    examine_fit(name, folder)
