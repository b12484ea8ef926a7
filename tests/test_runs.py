"""A run folder gives back what was put into it, or says that it does not."""

import hashlib
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from condgen import figures, files, runs
from condgen.cards import build_stages, model_config, model_from_card
from condgen.conditions import Binary, Classes, Code
from condgen.contracts import Model, Stage
from condgen.files import (
    DamagedFile, check_place, digest, folder_lock, make_folder, read_json, read_log,
    read_tensors, write_atomically, write_json, write_tensors)
from condgen.models.glow import Glow
from condgen.runs import Run, load, load_state, save, save_state, saved_states

TOY = """
import torch
from torch import nn
from condgen.conditions import Classes, Code
from condgen.contracts import Model

class Toy(Model):
    def __init__(self, conditions, width=4):
        super().__init__((1, 2, 2), conditions)
        first = nn.Linear(self.conditions.width + 3, width)
        self.net = nn.Sequential(first, nn.BatchNorm1d(width), nn.Linear(width, 4))

    @torch.no_grad()
    def sample(self, n, generator=None, **conditions):
        c = self.condition(n, generator, **conditions)
        return self.net(torch.cat([c, torch.randn(n, 3, generator=generator)], 1)).sigmoid().view(n, 1, 2, 2)
"""
exec(TOY)


class Growing(Model):
    """Adds a layer in each stage but the first."""

    def __init__(self):
        super().__init__((1, 1, 1))
        self.layers = nn.ModuleList([nn.Linear(1, 1)])

    def stages(self):
        grow = lambda: self.layers.append(nn.Linear(1, 1))
        return [Stage(str(i), 8, 4, lambda stage: [], build=grow if i else None)
                for i in range(3)]


def toy(width=4):
    torch.manual_seed(0)
    model = Toy([Classes("k", 3), Code("u")], width)  # noqa: F821
    model.store_condition_rows(model.conditions.supervised.pack(4, k=[0, 1, 1, 2]))
    model.net(torch.randn(8, 7))  # moves the running statistics
    return model.eval()


def same(a: dict, b: dict) -> bool:
    return (list(a) == list(b)
            and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a))


def test_a_fresh_process_draws_the_same_samples(tmp_path):
    """Law 6."""
    model = toy()
    save(model, tmp_path / "run")
    here = model.sample(16, generator=torch.Generator().manual_seed(3), k=[0, 1] * 8)
    (tmp_path / "toy.py").write_text(TOY)
    code = """
        import hashlib, sys, torch
        sys.path.insert(0, ".")
        from toy import Toy
        from condgen.runs import load
        x = load("run", cls=Toy).sample(16, generator=torch.Generator().manual_seed(3), k=[0, 1] * 8)
        print(hashlib.sha256(x.numpy().tobytes()).hexdigest())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hashlib.sha256(here.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("dtype",
                         [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_load_is_bit_equal_in_every_precision(tmp_path, dtype):
    model = toy().to(dtype)
    save(model, tmp_path, note="kept")
    again = load(tmp_path, cls=type(model))
    assert (same(model.state_dict(), again.state_dict())
            and again.arguments == model.arguments and not again.training)
    assert read_json(tmp_path / "card.json")["note"] == "kept"


def test_only_model_classes_of_the_library_are_found_by_name(tmp_path):
    for name in ("os.system", "condgen.contracts.Model", "condgen.runs.save", "", None,
                 3):
        with pytest.raises(ValueError,
                           match=r"accepted: classes of condgen\.models, or pass cls="):
            model_from_card({"class": name})
    for name in ("condgen.models.nowhere.Glow", "condgen.models.glow.Glown",
                 "condgen.models..x"):
        with pytest.raises(ValueError,
                           match="which this version of condgen does not have"):
            model_from_card({"class": name})
    with pytest.raises(ValueError, match="which is not a model"):
        model_from_card({"class": "condgen.models.glow.Tensor"})
    save(toy(), tmp_path)
    with pytest.raises(ValueError, match="pass cls="):
        load(tmp_path)
    with pytest.raises(ValueError, match="the card describes Toy; cls is Growing"):
        load(tmp_path, cls=Growing)


def test_a_library_class_is_found_by_name(tmp_path):
    model = Glow((1, 4, 4), **GLOW)
    save(model, tmp_path)
    assert same(load(tmp_path).state_dict(), model.state_dict())


def test_card_that_does_not_fit_is_refused():
    card = model_config(toy())
    with pytest.raises(ValueError, match="the card's arguments do not fit Toy"):
        model_from_card({**card, "arguments": {**card["arguments"], "depth": 3}},
                        cls=type(toy()))
    broken = {**card, "arguments": {
        "conditions": [{"type": "Binary", "name": "a", "code": "x"}]}}
    with pytest.raises(ValueError, match="does not fit Binary"):
        model_from_card(broken, cls=type(toy()))


def test_argument_that_json_cannot_hold_is_named():
    model = toy()
    model.arguments["width"] = torch.float32
    with pytest.raises(ValueError,
                       match=r"argument width=torch.float32 of Toy cannot be written"):
        model_config(model)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_rebuild_restores_structure_added_in_training(tmp_path, count):
    model = Growing()
    build_stages(model, model.stages(), count)
    build_stages(model, model.stages(), count)
    assert len(model.layers) == max(1, count) and model.built == count
    save(model, tmp_path)
    again = load(tmp_path, cls=Growing)
    assert same(model.state_dict(), again.state_dict()) and again.built == count


GLOW = {"levels": 1, "depth": 1, "width": 4}


@pytest.mark.parametrize(("change", "message"), [
    ({"bf16": "x"}, "'arguments.bf16' is \"x\"; accepted: true or false or null"),
    ({"reversible": 2}, "'arguments.reversible' is 2; accepted: true or false or null"),
    ({"shape": [True, 4, 4]}, "'arguments.shape[0]' is true; accepted: an integer"),
    ({"shape": [1, 4]}, "'arguments.shape' is [1, 4]; accepted: a list of 3"),
    ({"shape": "144"}, "'arguments.shape' is \"144\"; accepted: a list of 3"),
    ({"width": 4.0}, "'arguments.width' is 4.0; accepted: an integer, 0 or more"),
    ({"depth": -5}, "'arguments.depth' is -5; accepted: an integer, 0 or more"),
    ({"coupling": None}, "'arguments.coupling' is null; accepted: text"),
    ({"lr": "fast"}, "'arguments.lr' is \"fast\"; accepted: a finite number"),
    ({"lr": float("nan")}, "'arguments.lr' is NaN; accepted: a finite number"),
    ({"lr": 10**400}, "'arguments.lr' is 1000"),
    ({"wdth": 4}, "unexpected keyword argument 'wdth'")])
def test_arguments_of_other_types_are_refused_by_name(tmp_path, change, message):
    """On a card, and when a card is to be written."""
    model = Glow((1, 4, 4), **GLOW)
    save(model, tmp_path)
    card = read_json(tmp_path / "card.json")
    write_json(tmp_path / "card.json", card | {"arguments": card["arguments"] | change})
    with pytest.raises(ValueError) as found:
        load(tmp_path)
    assert f"{tmp_path}/card.json: " in str(found.value) and message in str(found.value)
    if "wdth" not in change:
        model.arguments |= change
        with pytest.raises(ValueError, match="Glow cannot be written to a card: ") as found:
            save(model, tmp_path / "new")
        assert message in str(found.value) and not (tmp_path / "new").exists()


def test_arguments_of_own_classes_may_be_of_any_type(tmp_path):
    """Their annotations promise nothing."""
    class Free(Model):
        def __init__(self, width: str = 3, rate: float = None, low: int = -2):
            super().__init__((1, 1, 1))

    save(Free(), tmp_path)
    assert load(tmp_path, cls=Free).arguments == {"width": 3, "rate": None, "low": -2}


def test_what_a_constructor_replaces_may_be_larger_than_the_file(tmp_path):
    """A guide classifier first builds the trunk of the class that it extends."""
    from condgen.models.classifier import GuideClassifier

    model = GuideClassifier((1, 32, 32), [Classes("k", 3)])
    save(model, tmp_path)
    assert same(load(tmp_path).state_dict(), model.state_dict())


class Pair(Model):
    """Holds another model with condition rows of its own."""

    def __init__(self):
        super().__init__((1, 2, 2), [Binary("b")])
        self.part = Toy([Classes("k", 3)])  # noqa: F821


def test_state_of_a_trained_model_fits_a_fresh_one(tmp_path):
    trained, fresh = Pair(), Pair()
    trained.store_condition_rows(torch.tensor([[0.0], [1.0], [1.0]]))
    trained.part.store_condition_rows(torch.eye(3))
    fresh.load_state_dict(trained.state_dict())
    assert same(fresh.state_dict(), trained.state_dict()) and len(fresh.part.rows) == 3
    trained.load_state_dict(Pair().state_dict())
    assert len(trained.rows) == len(trained.part.rows) == 0
    save(fresh, tmp_path)
    assert same(load(tmp_path, cls=Pair).state_dict(), fresh.state_dict())
    for wrong in ({"rows": torch.zeros(3, 2)}, {"row_counts": torch.ones(5).long()}):
        with pytest.raises(RuntimeError, match="size mismatch for row"):
            fresh.load_state_dict(trained.state_dict() | wrong)


def test_repr_is_one_line():
    model = toy()
    assert repr(model) == "Toy(1×2×2, k, u, 60 parameters, not trained by fit)"
    model.fitted = {"finished": False, "images": 1200}
    assert repr(model).endswith("60 parameters, stopped after 1,200 images)")
    assert "no conditions, 2 parameters" in repr(Growing())


@pytest.mark.parametrize("finished", [True, False])
def test_how_far_a_model_was_trained_is_kept(tmp_path, finished):
    model = toy()
    model.fitted = {"finished": finished, "images": 64}
    save(model, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = load(tmp_path, cls=type(model))
    assert again.fitted == model.fitted and len(caught) == 1 - finished
    if caught:
        assert "it stopped after 64 images; the same fit" in str(caught[0].message)


def test_missing_and_foreign_names_are_refused(tmp_path):
    model = toy()
    save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, meta = read_tensors(path)
    less = {k: v for k, v in tensors.items() if k != "net.0.bias"}
    cases = [(less, "'net.0.bias' is missing"),
             (tensors | {"more": torch.ones(1)}, "'more' is not part of it"),
             (tensors | {"net.0.bias": torch.ones(5)},
              r"'net.0.bias' is \(5,\), needed \(4,\)")]
    for wrong, message in cases:
        write_tensors(path, wrong, **meta)
        with pytest.raises(DamagedFile, match=message):
            load(tmp_path, cls=type(model))


ROWS = {"rows": torch.eye(3).flip(0), "row_counts": torch.tensor([1, 2, 1])}


@pytest.mark.parametrize("wrong", [
    {"row_counts": ROWS["row_counts"][:2]}, {"row_counts": 0 * ROWS["row_counts"]},
    {"row_counts": -ROWS["row_counts"]},
    {"row_counts": torch.arange(1, 9)}, {"row_counts": torch.tensor(3)},
    {"row_counts": torch.ones(3)},
    {"rows": torch.ones(3)}, {"rows": torch.ones(3, 2)},
    {"rows": torch.full((3, 3), float("nan"))},
    {"row_counts": torch.tensor([1, 2, 2**62])}, {"row_counts": torch.ones(3).int()},
    {"rows": torch.eye(3).long()}, {"net.0.bias": torch.arange(4)},
    {"net.0.bias": torch.ones(4).cfloat()}, {"net.0.bias": torch.ones(4).double()},
    {"net.0.bias": torch.ones(4).bfloat16()}, {"rows": torch.eye(3).half()},
    {"net.1.num_batches_tracked": torch.tensor(1.0)},
    *({name: t.to(kind) for name, t in toy().state_dict().items()
       if t.is_floating_point()}
      for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.cfloat, torch.int64))])
def test_invalid_weights_with_valid_checksum_are_refused(tmp_path, wrong):
    model, path = toy(), tmp_path / "model.safetensors"
    save(model, tmp_path)
    tensors, meta = read_tensors(path)
    assert (torch.equal(tensors["rows"], ROWS["rows"])
            and torch.equal(tensors["row_counts"], ROWS["row_counts"]))
    write_tensors(path, tensors | wrong, **meta)
    with pytest.raises(DamagedFile, match="model.safetensors does not fit Toy: "):
        load(tmp_path, cls=type(model))


@pytest.mark.parametrize("meta", ["[]", "null", "{", "1", "[" * 100_000])
def test_invalid_metadata_with_valid_checksum_is_refused(tmp_path, meta):
    from safetensors.torch import save_file

    w = {"w": torch.ones(2)}
    save_file(w, tmp_path / "t.safetensors", {"sha256": digest(w, meta), "meta": meta})
    with pytest.raises(DamagedFile, match="t.safetensors is damaged"):
        read_tensors(tmp_path / "t.safetensors")


@pytest.mark.parametrize("stage", [3, 10**30, 1e30, -2, -5, 0.5, "0", None])
def test_unknown_stage_is_refused(stage):
    with pytest.raises(ValueError, match="the card's arguments do not fit Growing"):
        model_from_card({**model_config(Growing()), "stage": stage}, cls=Growing)


def test_metadata_not_in_json_is_refused_and_leaves_no_files(tmp_path):
    with pytest.raises(ValueError, match="Tensor is not JSON serializable; accepted: "
                           "numbers, text"):
        save(toy(), tmp_path / "run", mean=torch.ones(1))
    assert not (tmp_path / "run").exists()


def test_run_folder_is_locked_by_one_training(tmp_path):
    code = ("import sys, pathlib; from condgen.files import folder_lock\n"
            "with folder_lock(pathlib.Path(sys.argv[1])): print('in')")
    other = lambda folder: subprocess.run([sys.executable, "-c", code, folder],
                                          capture_output=True, text=True)
    (tmp_path / "next").mkdir()
    with folder_lock(tmp_path):
        refused = other(tmp_path)
        assert (refused.returncode
                and f"another process trains in {tmp_path}; accepted" in refused.stderr)
        assert other(tmp_path / "next").stdout == "in\n"
    with pytest.raises(KeyError), folder_lock(tmp_path):
        raise KeyError  # an accident frees it, too
    assert (other(tmp_path).stdout == "in\n"
            and [p.name for p in tmp_path.iterdir()] == ["next"])


def test_weights_of_another_class_are_refused(tmp_path):
    save(toy(), tmp_path / "toy")
    save(Growing(), tmp_path / "growing")
    os.replace(tmp_path / "growing/model.safetensors",
               tmp_path / "toy/model.safetensors")
    with pytest.raises(DamagedFile,
                       match=r"describes .*Toy, the weights are of .*Growing"):
        load(tmp_path / "toy", cls=type(toy()))


def test_load_error_names_what_is_accepted(tmp_path):
    with pytest.raises(FileNotFoundError,
                       match="no run folder with card.json.*accepted: a run folder, "):
        load(tmp_path / "none")
    write_json(tmp_path / "card.json", model_config(toy()))
    with pytest.raises(FileNotFoundError,
                       match="no weights yet: its training was interrupted"):
        load(tmp_path)
    for text in ("[1]", "{", "\x00", '{"a": NaN', "[" * 100_000,
                 '{"class": ' + "9" * 5000 + "}"):
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(DamagedFile, match=r"card\.json (is not JSON|holds list)"):
            load(tmp_path)


def test_every_flipped_bit_is_noticed(tmp_path):
    """Each byte of a state, header included, with a bit turned: refused, or read as
    it was (spaces that fill up).
    """
    tensors, path = ({"w": torch.arange(5.0), "n": torch.tensor(3)},
                     tmp_path / "t.safetensors")
    write_tensors(path, tensors, seen=640, draws=20)
    data = path.read_bytes()
    silent = 0
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
        try:
            found, meta = read_tensors(path)
        except DamagedFile as error:
            assert "t.safetensors" in str(error)
        else:
            silent += 1
            assert (all(torch.equal(found[k], t) for k, t in tensors.items())
                    and meta == {"seen": 640, "draws": 20})
    assert silent <= 8


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"w": torch.arange(5.0)}, seen=640)
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(DamagedFile):
            read_tensors(path)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_refused_unread(tmp_path):
    save(toy(), tmp_path)
    save_state(tmp_path, 8, {"w": torch.ones(1)}, {})
    files = [tmp_path / "model.safetensors",
             tmp_path / "state/000000000008/tensors.safetensors"]
    for path in files:
        for write in (lambda p: torch.save(Bomb(tmp_path / "boom"), p),
                      lambda p: p.write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))):
            write(path)
            with pytest.raises(DamagedFile, match="not a safetensors file"):
                read_tensors(path)
    with pytest.raises(DamagedFile):
        load(tmp_path, cls=type(toy()))
    with pytest.warns(UserWarning, match="not a safetensors file"):
        assert load_state(tmp_path) is None
    assert not (tmp_path / "boom").exists()


def test_foreign_safetensors_without_checksum_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "t.safetensors")
    with pytest.raises(DamagedFile, match="checksum"):
        read_tensors(tmp_path / "t.safetensors")


def test_all_kinds_of_tensors_come_back(tmp_path):
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tied = torch.randn(3)
    tensors = {"a": channels_last, "b": torch.randn(4, 4).T, "c": tied, "d": tied,
               "e": torch.zeros(0, 3), "f": torch.tensor(True),
               "g": torch.randn(3, dtype=torch.float64), "h": torch.randn(2).half(),
               "i": torch.tensor(2**60), "j": torch.randn(9).bfloat16(),
               "k": nn.Parameter(torch.ones(1))}
    write_tensors(tmp_path / "t", tensors, text="ü", none=None, list=[1, 0.1])
    found, meta = read_tensors(tmp_path / "t")
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype
               for k, t in tensors.items())
    assert (meta == {"text": "ü", "none": None, "list": [1, 0.1]}
            and set(found) == set(tensors))


def test_digest_depends_on_names_types_shapes_and_text():
    t = torch.zeros(4)
    seen = [digest({"a": t}), digest({"b": t}), digest({"a": t.int()}),
            digest({"a": t.view(2, 2)}),
            digest({"a": t + 1}), digest({"a": t}, "x"), digest({})]
    assert (len(set(seen)) == len(seen)
            and digest({"a": t, "b": t}) == digest({"b": t, "a": t}))


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for call in (lambda: save(toy(), tmp_path / "file"),
                 lambda: save(toy(), tmp_path / "file/run"),
                 lambda: save_state(tmp_path / "file", 8, {}, {})):
        with pytest.raises(OSError,
                           match=r"cannot make folder .*file.*; choose another one"):
            call()
    with pytest.raises(OSError, match=r"cannot write .*none/a: "
                           r"No such file or directory; what was there before is"):
        write_atomically(tmp_path / "none/a", b"")


WRITERS = {  # the call that is denied, and what makes it
    "folder": (Path, "mkdir", lambda out: make_folder(out / "a" / "b")),
    "file": (files, "open", lambda out: write_json(out / "a.json", {})),
    "name": (files.os, "replace", lambda out: write_json(out / "a.json", {})),
    "trial": (files.tempfile, "TemporaryFile", lambda out: check_place(out / "a.json")),
    "lock": (files.os, "open", lambda out: folder_lock(out).__enter__()),
    "model": (files, "open", lambda out: save(toy(), out)),
    "state": (runs.os, "rename", lambda out: save_state(out, 8, {}, {})),
    "picture": (files.tempfile, "TemporaryFile",
                lambda out: figures.save_image(torch.ones(1, 1, 2, 2), out / "a.png")),
    "report": (files, "open",
               lambda out: figures.write_report(out / "a.html", "t", [])),
}


def deny(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_without_permission_is_named(kind, tmp_path, monkeypatch):
    owner, name, write = WRITERS[kind]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, deny, raising=False)
        with pytest.raises(OSError) as found:
            write(tmp_path)
    place = tmp_path / "state" if kind == "state" else tmp_path
    assert (f"Permission denied in folder {place}; choose another one, or allow "
            "reading and writing there" in str(found.value))
    assert str(found.value).startswith("cannot ") and not list(tmp_path.glob("[!s]*"))


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(runs.os, name, full)
            with pytest.raises(
                    OSError, match=r"cannot write .*a\.json: No space left on device"):
                write_json(path, {"a": 2})
        assert read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def state(out):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_state(out)


def test_two_generations_are_kept(tmp_path):
    assert state(tmp_path) is None
    for images in (8, 16, 16, 24, 1024):
        save_state(tmp_path, images, {"w": torch.tensor(images)}, {"images": images})
        assert state(tmp_path) == ({"w": torch.tensor(images)}, {"images": images})
        assert len(saved_states(tmp_path / "state")) == min(
            2, (8, 16, 24, 1024).index(images) + 1)
    assert (tmp_path / "state/latest").read_text() == "000000001024"
    assert sorted(os.listdir(tmp_path / "state")) == ["000000000024", "000000001024",
                                                      "latest"]


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "gone"])
def test_damaged_newest_state_is_named_and_the_one_before_used(tmp_path, damage):
    for images in (8, 16):
        save_state(tmp_path, images, {"w": torch.arange(float(images))},
                   {"images": images})
    path = tmp_path / "state/000000000016/tensors.safetensors"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = data[:-3] + bytes([data[-3] ^ 16]) + data[-2:]
        path.write_bytes(
            {"torn": data[: len(data) // 2], "flipped": flipped, "empty": b""}[damage])
    with pytest.warns(UserWarning,
                      match=r"000000000016.*falling back on the state before"):
        tensors, info = load_state(tmp_path)
    assert info == {"images": 8} and torch.equal(tensors["w"], torch.arange(8.0))
    for images in (12, 14):
        save_state(tmp_path, images, {"w": torch.ones(1)}, {"images": images})
    assert [p.name for p in saved_states(tmp_path / "state")] == ["000000000014",
                                                                  "000000000012"]
    assert state(tmp_path)[1] == {"images": 14}


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["replace", "rename", "fsync"])
@pytest.mark.parametrize("call", [1, 2])
def test_kill_during_saving_leaves_a_valid_state(tmp_path, monkeypatch, kind, name,
                                                 call):
    """One state is there; the next one dies at the first or second call of
    os.replace, os.rename or os.fsync.
    """
    save_state(tmp_path, 8, {"w": torch.ones(1)}, {"images": 8})
    real, calls = getattr(os, name), []

    def dying(*args):
        calls.append(args)
        if len(calls) == call:
            raise kind(5, "died")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, name, dying)
        if name == "rename" and call == 2:  # there is one only
            save_state(tmp_path, 16, {"w": torch.ones(1)}, {"images": 16})
        else:
            with pytest.raises(kind, match="cannot write .*unchanged" if kind is OSError
                                   else None):
                save_state(tmp_path, 16, {"w": torch.ones(1)}, {"images": 16})
    # the new state was renamed; what failed, if anything, was the note of its name
    complete = call == 2
    assert state(tmp_path)[1] == {"images": 16 if complete else 8}
    save_state(tmp_path, 24, {"w": torch.ones(1)}, {"images": 24})
    assert state(tmp_path)[1] == {"images": 24} and not list(tmp_path.rglob("*.part"))


def test_truncated_log_is_read_to_its_last_complete_row(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2.5}\n{"a": "\xc3')
    assert read_log(path) == [{"a": 1}, {"a": 2.5}]
    for end in ("", "[1]", "3", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{}x"):
        path.write_text('{"a": 1}\n' + end + '\n{"a": 2}' * bool(end))
        assert read_log(path) == [{"a": 1}]
    path.write_text("")
    assert read_log(path) == []


def test_run_repr_shows_its_status(tmp_path):
    log = [{"stage": "s", "images": 8, "seconds": 1.0, "a.loss": 0.5, "a.norm": 2.0}]
    run = Run(toy(), tmp_path, log, False, 1234, 5.4)
    assert repr(run).startswith(
        "Run(Toy(1×2×2, k, u, 60 parameters), 1,234 images in 5 s, stopped in stage "
        "'s', can be resumed, folder=")
    assert "a.loss" in run._repr_html_() and "a.norm" not in run._repr_html_()
    assert (Run(toy(), None, []).status == "finished"
            and "folder=None" in repr(Run(toy(), None)))


def test_conditions_survive(tmp_path):
    model = Toy([Binary("b"), Code("u", 2, "binary")])  # noqa: F821
    save(model, tmp_path)
    assert load(tmp_path, cls=type(model)).conditions == model.conditions


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "meta", "gpu", 0, None])
def test_a_device_that_is_not_here_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(ValueError, match="is not on this machine; accepted: cpu$"):
        load("caglow-digits", device=device)


def test_devices_of_this_machine_are_accepted(monkeypatch):
    kind = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: kind)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:1", torch.device("cuda", 0)):
        assert runs.check_device(name) == torch.device(name)
    with pytest.raises(ValueError, match="'cuda:2' .*: cpu, cuda, cuda:0, cuda:1"):
        runs.check_device("cuda:2")
