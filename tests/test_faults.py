"""Accidents and bad input: killed, torn, full disks, foreign files; cards
and conditions fuzzed.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm.auto import tqdm

from condgen.__main__ import main, parse_conditions
from condgen.conditions import Binary, Classes, Code, Real, Schema
from condgen.experiments.digits import augmented_digits
from condgen.files import read_tensors
from condgen.models.glow import Glow
from condgen.recipes import find, train
from condgen.runs import load, save, saved_states

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TRAIN = ["train", "glow-digits", "--tier", "tiny", "--out", "run"]
SAVING = [*TRAIN, "--save-every", "0s"]


def child(folder, *arguments, limit=None, says=os.devnull):
    """`condgen ARGUMENTS` in a process of its own, from
    `folder`; returns its number.
    """
    augmented_digits()  # read once, by the parent
    number = os.fork()
    if number:
        return number
    code = 1
    # bars of forked processes share a lock, which a killed one would keep for ever
    tqdm.set_lock(threading.RLock())
    with contextlib.suppress(BaseException):
        # background jobs of a shell ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        out = says if isinstance(says, int) else os.open(says, os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr, sys.argv = (os.fdopen(1, "w"), os.fdopen(2, "w"),
                                            ["condgen", *map(str, arguments)])
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def until(happened, number):
    """Wait for something to happen while the process lives; False if it ended first."""
    while not happened():
        if os.waitpid(number, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.0005)
    return True


def condgen(folder, *arguments, limit=None):
    """Exit code and what was said."""
    reads, writes = os.pipe()
    number = child(folder, *arguments, limit=limit, says=writes)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), said


@pytest.fixture(scope="module", autouse=True)
def short():
    """Fifty rounds, each followed by a saved state; what they import is imported
    before the processes part.
    """
    images = find("glow-digits").images["tiny"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(images, "flow", 50 * 64)
        train("glow-digits", None, "tiny", images=64, progress=False)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of an uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    assert condgen(folder, *TRAIN)[0] == 0
    return read_tensors(folder / "run" / "model.safetensors")[0]


def check(folder, whole):
    found = read_tensors(folder / "run" / "model.safetensors")[0]
    assert (found.keys() == whole.keys()
            and all(torch.equal(found[k], t) for k, t in whole.items()))


@forks
def test_second_training_in_a_locked_folder_is_refused(whole, tmp_path):
    state = tmp_path / "run" / "state"
    number = child(tmp_path, *SAVING)
    assert until(lambda: saved_states(state), number), "it was over before"
    os.kill(number, signal.SIGSTOP)  # it is still there when the second one comes
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    code, said = condgen(tmp_path, *TRAIN, "--budget", "0s")
    assert (code == 2 and "error: another process trains in run; accepted" in said
            and "Traceback" not in said)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    os.kill(number, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0
    check(tmp_path, whole)


@forks
def test_result_is_the_same_after_twenty_kills(whole, tmp_path):
    """Signal 9 at twenty random moments, half of them in the middle of writing a state;
    then the same command.

    A training that reaches its end before its moment has come begins again from
    nothing.
    """
    dice, kills, writing, state = random.Random(0), 0, 0, tmp_path / "run" / "state"
    newest = lambda: int((saved_states(state) or [Path("0")])[0].name)
    for _ in range(100):
        number, target = (child(tmp_path, *SAVING),
                          newest() + 64 * dice.choice([0, 1, 2]))
        going = until(lambda target=target: newest() >= target, number)
        if going:
            time.sleep(dice.uniform(0, 0.2))
            going = kills % 2 == 0 or until(lambda: (state / ".part").exists(), number)
        if going:
            os.kill(number, signal.SIGKILL)
            going = (os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
                     == -signal.SIGKILL)
        if not going:
            check(tmp_path, whole)
            shutil.rmtree(tmp_path / "run")
            continue
        writing += (state / ".part").exists()
        kills += 1
        if kills == 20:
            break
    assert kills == 20 and writing >= 5
    assert condgen(tmp_path, *TRAIN)[0] == 0
    check(tmp_path, whole)


@forks
def test_ctrl_c_saves_what_was_computed(whole, tmp_path):
    """Signal 2 in the middle of training: exit code 130, a state of the round that
    was being played; then the same.
    """
    reads, writes = os.pipe()
    # saves every minute, that is, not by itself
    number = child(tmp_path, *TRAIN, says=writes)
    os.close(writes)
    log = tmp_path / "run" / "log.jsonl"
    assert until(lambda: log.exists() and log.read_text(), number), "it was over before"
    os.kill(number, signal.SIGINT)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 130
    assert ("in a state that can be resumed; the same command goes on from there"
            in said and "Traceback" not in said)
    assert int(saved_states(tmp_path / "run" / "state")[0].name) >= 64
    assert condgen(tmp_path, *TRAIN)[0] == 0
    check(tmp_path, whole)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("boom",)


DAMAGE = {
    "torn": lambda raw: raw[: len(raw) // 2],
    "altered": lambda raw: raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:],
    "empty": lambda raw: b"",
    "a pickle": lambda raw: pickle.dumps(Bomb()),
}


@forks
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_named_and_the_one_before_used(whole, tmp_path, damage):
    for _ in range(3):
        condgen(tmp_path, *TRAIN, "--budget", "0s")
    newest, _ = saved_states(tmp_path / "run" / "state")
    path = newest / "tensors.safetensors"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    code, said = condgen(tmp_path, *TRAIN)
    assert (code == 0 and str(path.relative_to(tmp_path)) in said
            and "falling back" in said)
    assert not (tmp_path / "boom").exists()
    check(tmp_path, whole)


@forks
def test_samples_of_a_stopped_training_come_with_a_warning(whole, tmp_path):
    condgen(tmp_path, *TRAIN, "--budget", "0s")
    sample = ["sample", "run", "-n", "1", "-o", "a.png"]
    code, said = condgen(tmp_path, *sample)
    assert (code == 0 and "warning: run: not trained to its end: it stopped after 64 "
            "images in stage 'flow' (1 of 1); the same fit or train command" in said)
    assert condgen(tmp_path, *TRAIN)[0] == 0
    code, said = condgen(tmp_path, *sample)
    assert code == 0 and "not trained" not in said


@forks
@pytest.mark.parametrize("limit", [200, 100_000])
def test_full_disk_stops_training_without_data_loss(whole, tmp_path, limit):
    """No file may grow beyond `limit` bytes: neither card nor state fits, or
    the card alone does.
    """
    condgen(tmp_path, *TRAIN, "--budget", "0s")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}
    code, said = condgen(tmp_path, *SAVING, limit=limit)
    assert (code == 2 and "error: cannot write" in said and "File too large" in said
            and "Traceback" not in said)
    assert ({p: p.read_bytes() for p in (tmp_path / "run").rglob("*.safetensors")}
            == before)
    assert condgen(tmp_path, *TRAIN)[0] == 0
    check(tmp_path, whole)


@forks
@pytest.mark.timeout(120)
def test_a_killed_process_holds_no_lock_of_the_next_one(tmp_path):
    before = tqdm.get_lock()
    tqdm.set_lock(multiprocessing.RLock())
    try:
        number = os.fork()
        if not number:
            tqdm.get_lock().acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(number, 0)
        assert condgen(tmp_path, *TRAIN, "--budget", "0s")[0] == 0
    finally:
        tqdm.set_lock(before)


@forks
def test_full_disk_at_first_write_leaves_no_files(tmp_path):
    code, said = condgen(tmp_path, *TRAIN, limit=1)
    assert code == 2 and "error: cannot write run/card.json" in said
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == []


@forks
@pytest.mark.parametrize("field", ["training", "images", "stage"])
def test_a_card_without_a_field_is_named_to_the_user(tmp_path, field):
    assert condgen(tmp_path, *TRAIN)[0] == 0
    path = tmp_path / "run" / "card.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items()
                                if k != field}))
    code, said = condgen(tmp_path, *TRAIN)
    assert (code == 2 and f"error: run/card.json: no field '{field}'; accepted"
            in said and "Traceback" not in said)


@cache
def flow():
    torch.manual_seed(0)
    return Glow((1, 4, 4), levels=1, depth=1, width=4)


LEAVES = (st.none() | st.booleans() | st.integers(-9, 40) | st.floats(-9, 40)
          | st.text(max_size=6)
          | st.sampled_from(["condgen.models.cglow.CGlow", "os.system", "additive"]))
JSON = st.recursive(LEAVES, lambda c: st.lists(c, max_size=4) | st.dictionaries(
    st.text(max_size=6), c, max_size=4), max_leaves=6)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_card_is_loaded_or_refused(tmp_path_factory, data):
    """Parts of a card replaced by anything: a model as it was, or a ValueError or
    OSError; never another error.
    """
    folder = tmp_path_factory.mktemp("card")
    save(flow(), folder)
    card = json.loads((folder / "card.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        part = card
        while True:
            key = data.draw(st.sampled_from(sorted(part)) if part
                            else st.text(max_size=6))
            if isinstance(part.get(key), dict) and data.draw(st.booleans()):
                part = part[key]
                continue
            if data.draw(st.booleans()):
                part[key] = data.draw(JSON)
            else:
                part.pop(key, None)
            break
    (folder / "card.json").write_text(json.dumps(card))
    try:
        found = load(folder).state_dict()
    except (ValueError, OSError) as error:
        assert str(error)
    else:
        assert all(torch.equal(found[k], t) for k, t in flow().state_dict().items())
    finally:
        shutil.rmtree(folder)


SCHEMA = Schema([Classes("digit", 10), Binary("thick"), Real("slant", -1, 1),
                 Code("u", 2)])
WORDS = st.sampled_from(["--digit", "--thick", "--slant", "--u", "--u=0,1", "--digit=3",
                         "--colour", "--self", "-n", "--", "7", "12", "-1", "0.5,-1",
                         "nan", "1e999", "0.5", ",", "", "1,,2", "٣", "0x7"])


@settings(deadline=None, max_examples=300)
@given(st.lists(WORDS | st.text(max_size=5), max_size=6), st.integers(1, 3))
def test_any_arguments_are_conditions_or_refused(words, n):
    """Whatever is typed after `condgen sample`: packed numbers in range, or a
    ValueError that says what is accepted.
    """
    model = Glow((1, 4, 4), levels=1, depth=1, width=4)
    model.conditions = SCHEMA
    model.register_buffer("rows", torch.zeros(0, SCHEMA.supervised.width))
    try:
        c = model.condition(n, **parse_conditions(words, SCHEMA))
    except ValueError as error:
        assert str(error)
    else:
        assert c.shape == (n, SCHEMA.width) and bool(((c >= -1) & (c <= 1)).all())


ANYTHING = (JSON | st.lists(st.floats() | st.integers(), max_size=12)
            | st.binary(max_size=3) | st.complex_numbers())


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(SCHEMA.names), ANYTHING, st.integers(1, 3))
def test_any_value_is_packed_or_refused(name, value, n):
    item = SCHEMA[SCHEMA.names.index(name)]
    try:
        c = item.pack(value, n)
    except ValueError as error:
        assert "accepted" in str(error)
    else:
        assert c.shape == (n, item.width) and bool(((c >= -1) & (c <= 1)).all())
