"""The laws of training: who moves, what an interruption changes, what
several processes share.
"""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from condgen import runs, training
from condgen.conditions import Binary, Real, Schema
from condgen.contracts import Batch, Model, Noise, Player, Stage, seed_of
from condgen.files import DamagedFile, read_log, read_tensors, write_tensors
from condgen.runs import saved_states, load, load_state
from condgen.distributed import make_accelerator
from condgen.states import (
    load_optimizer_tensors, optimizer_tensors, state_misfits)
from condgen.trainer import (MAX_NONFINITE_STEPS, ShuffledIndices, StageRunner, Trainer,
                             set_train_modes, step_player)
from condgen.training import fit, set_stage_lengths


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Bits are compared on the CPU, whatever the machine has."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Points:
    """Forty points in the plane, with a binary condition."""

    name, conditions = "points", Schema([Binary("b")])
    sha256 = "0" * 64

    def __init__(self, n=40, val=12):
        g = torch.Generator().manual_seed(0)
        x, c = (torch.randn(n + val, 2, generator=g),
                torch.rand(n + val, 1, generator=g).round())
        self.parts = {"train": slice(val, None), "val": slice(val)}
        self.fields = {"x": x, "y": x @ torch.tensor([[1.0], [-2.0]]), "c": c}

    def table(self, split):
        return {name: t[self.parts[split]] for name, t in self.fields.items()}


def adam(params, lr=0.02):
    return torch.optim.Adam(params, lr)


def term(value, weight=1.0):
    return {"loss": (weight, value)}


class Simple(Model):
    """One linear layer per name; `players` and `options` of its stage
    are given from outside.
    """

    def __init__(self, names="abc"):
        super().__init__((2, 1, 1))
        self.nets = nn.ModuleDict({name: nn.Linear(2, 1) for name in names})

    def all_loss(self, batch):
        return term(sum(net(batch.x)
                        for net in self.nets.values()).sub(batch.y).square().mean())

    def stages(self):
        return [Stage("only",
                      **{"images": 40, "batch": 8,
                         "players": lambda stage: self.players(), **self.options})]


def simple(players, names="abc", **options):
    torch.manual_seed(0)
    model = Simple(names)
    model.players, model.options = (lambda: players(model)), options
    return model


def moved(model, data=None, **more):
    """Names of the nets of which a parameter moved in a training, and its run."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = fit(model, data or Points(), progress=False, **more)
    after = model.state_dict()
    found = {k.split(".")[1] for k in after
             if k.startswith("nets.") and not torch.equal(before[k], after[k])}
    return "".join(sorted(found)), run


def player(model, name, nets=None, **options):
    params = [p for n in (name if nets is None else nets)
              for p in model.nets[n].parameters()]
    return Player(name, params,
                  **{"loss": model.all_loss,
                     "optimizer": adam(params) if params else None, **options})


# Law 4: who moves


@pytest.mark.parametrize("names", ["a", "b", "ab", "ca", "cab"])
def test_each_player_updates_only_its_own_parameters(names):
    model = simple(lambda m: [player(m, name) for name in names])
    assert moved(model)[0] == "".join(sorted(names))


def test_only_the_active_players_parameters_require_grad():
    asked = []

    def loss(model, name):
        def spy(batch):
            asked.append((name, "".join(n for n, net in model.nets.items()
                                        if net.weight.requires_grad)))
            return model.all_loss(batch)

        return spy

    model = simple(lambda m: ([player(m, n, loss=loss(m, n)) for n in "ab"]
                              + [player(m, "ab", loss=loss(m, "ab"))]))
    fit(model, Points(), images=8, progress=False)
    assert asked == [("a", "a"), ("b", "b"), ("ab", "ab")]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make",
                         [lambda ps: torch.optim.Adam(ps, 0.1, weight_decay=0.1),
                          lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.9),
                          lambda ps: torch.optim.AdamW(ps, 0.1),
                          lambda ps: torch.optim.RMSprop(ps, 0.01, momentum=0.5)])
def test_shared_optimizer_updates_only_the_active_player(make):
    def shared(model):
        optimizer = make([p for n in "ab" for p in model.nets[n].parameters()])
        turn = {"a": lambda progress: progress < 0.5,
                "b": lambda progress: progress >= 0.5}
        return [player(model, n, optimizer=optimizer, when=turn[n]) for n in "ab"]

    model = simple(shared, images=40)
    b = model.nets["b"].weight.clone()
    trainer = entered(model)
    for _ in range(3):
        trainer.round()
    assert torch.equal(model.nets["b"].weight, b)
    a = model.nets["a"].weight.clone()
    for _ in range(2):
        trainer.round()
    assert (torch.equal(model.nets["a"].weight, a)
            and not torch.equal(model.nets["b"].weight, b))


def entered(model, data=None):
    trainer = Trainer(model, data or Points(), 0, make_accelerator("no"))
    trainer.enter(model.stages()[0], 0)
    return trainer


def test_repeats_and_fresh_batches():
    seen = []

    def loss(name, model):
        def f(batch):
            seen.append((name, batch.x[0, 0].item(), batch.randn("e", 1)[0].item()))
            return model.all_loss(batch)

        return f

    def players(m):
        options = {"a": {"repeats": 3}, "b": {"fresh": False},
                   "c": {"fresh": False, "repeats": 2}}
        return [player(m, name, loss=loss(name, m), **more)
                for name, more in options.items()]

    model = simple(players)
    run = fit(model, Points(), images=8, progress=False)
    names, rows, noises = zip(*seen)
    assert names == tuple("aaabcc") and run.images == 8
    assert (len(set(rows[:3])) == 3 == len(set(noises[:3]))
            and len(set(rows[2:])) == 1 == len(set(noises[2:])))


def test_when_is_called_with_progress():
    asked = []
    model = simple(lambda m: [player(m, "a", when=lambda p: asked.append(p) or p > 0.5),
                              player(m, "b")])
    _, run = moved(model)
    assert asked == [0, 0.2, 0.4, 0.6, 0.8]
    assert ([("a.loss" in row, "b.loss" in row) for row in run.log]
            == [(False, True)] * 3 + [(True, True)] * 2)


def test_a_player_without_parameters_changes_buffers_only():
    def control(model):
        def loss(batch):
            assert not torch.is_grad_enabled()
            model.gain += batch.x.mean()
            return term(model.gain.clone())

        return loss

    model = simple(lambda m: [Player("control", (), control(m)), player(m, "a")])
    model.register_buffer("gain", torch.zeros(()))
    names, run = moved(model)
    assert ("a" in names and model.gain != 0 and "control.loss" in run.log[0]
            and "control.norm" not in run.log[0])


def test_frozen_networks_are_in_evaluation_mode():
    model = simple(lambda m: [player(m, "a")], names="ab")
    model.frozen = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    model.drop = nn.Dropout(0.5)
    before = {k: v.clone() for k, v in model.frozen.state_dict().items()}
    modes = []

    def loss(batch):
        modes.append((model.training, model.nets["a"].training,
                      model.frozen[1].training, model.frozen[2].training,
                      model.drop.training))
        return term(model.nets["a"](model.frozen(batch.x)).square().mean())

    model.players = lambda: [player(model, "a", loss=loss)]
    fit(model, Points(), progress=False)
    assert set(modes) == {(True, True, False, False, True)} and not model.training
    assert all(torch.equal(v, model.frozen.state_dict()[k]) for k, v in before.items())
    set_train_modes(model, [])
    assert all(m.training for m in model.modules())


def test_parameters_outside_the_model_are_refused():
    alien = nn.Parameter(torch.zeros(1))
    model = simple(lambda m: [Player("alien", [alien], m.all_loss, adam([alien]))])
    with pytest.raises(ValueError, match="stage 'only', "
                           "player 'alien' moves parameters that are not the model's"):
        fit(model, Points(), progress=False)


def test_clip_and_schedule_change_the_step():
    sgd = lambda m: torch.optim.SGD(m.nets["a"].parameters(), 1.0)
    model = simple(lambda m: [player(m, "a", optimizer=sgd(m), clip=0.5)],
                   schedule=lambda p: 0.25 if p else 1.0)
    trainer, sizes = entered(model), []
    for _ in range(3):
        before = torch.cat([p.detach().flatten().clone()
                            for p in model.nets["a"].parameters()])
        values = trainer.round()
        after = torch.cat([p.detach().flatten() for p in model.nets["a"].parameters()])
        sizes.append((after - before).norm().item() / min(0.5, values["a.norm"].item()))
    assert sizes == pytest.approx([1, 0.25, 0.25], rel=1e-4)


# Order and noise


@pytest.mark.parametrize("size", [1, 5, 40])
def test_order_is_a_permutation_in_every_epoch(size):
    taken = ShuffledIndices(size, 3, "s").take(0, 4 * size).view(4, size)
    assert (taken.sort(1).values == torch.arange(size)).all()
    assert size < 40 or len({tuple(epoch.tolist()) for epoch in taken}) == 4
    for start, count in [(0, 3), (size - 1, 2), (2 * size, size + 1), (3, 0)]:
        if count and start + count <= 4 * size:
            assert torch.equal(ShuffledIndices(size, 3, "s").take(start, count),
                               taken.flatten()[start : start + count])
    assert (size < 40
            or not torch.equal(ShuffledIndices(size, 4, "s").take(0, size), taken[0]))


def test_batches_differ_by_round_and_dropout_is_keyed():
    seen = []

    def loss(batch):
        seen.append((batch.randn("e", 2), nn.functional.dropout(torch.ones(9), 0.5)))
        return term(model.nets["a"](batch.x).mean())

    model = simple(lambda m: [player(m, "a", loss=loss)])
    fit(model, Points(), progress=False)
    assert len({tuple(t.flatten().tolist()) for t, _ in seen}) == 5 == len({
        tuple(t.tolist()) for _, t in seen})
    for k, (noise, mask) in enumerate(seen):
        assert torch.equal(noise, Noise((0, "only", k), slice(None), 8).randn("e", 2))
        torch.manual_seed(seed_of(0, "only", k, 0))
        assert torch.equal(mask, nn.functional.dropout(torch.ones(9), 0.5))


# Law 5: interruptions


class Two(Model):
    """Two stages with everything in them: dropout, batch statistics, a shared
    optimiser, averages, growth, a cache.
    """

    def __init__(self, conditions=Points.conditions):
        super().__init__((2, 1, 1), conditions)
        self.enc = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(),
                                 nn.Dropout(0.3))
        self.dec = nn.Linear(3, 1)
        self.register_buffer("control", torch.zeros(()))

    def first_loss(self, batch):
        return term((self.dec(self.enc(batch.x)) - batch.y
                     + 0.1 * batch.randn("e", 1)).square().mean())

    def first(self, stage):
        both = adam(self.parameters())
        return [Player("enc", self.enc.parameters(), self.first_loss, both, repeats=2),
                Player("dec", self.dec.parameters(), self.first_loss, both, fresh=False,
                       when=lambda p: p >= 0.3)]

    def control_loss(self, batch):
        self.control += batch.h.mean() + torch.rand(())
        return term(self.control.clone())

    def second_loss(self, batch):
        h = nn.functional.dropout(batch.h, 0.2)
        return term((self.head(h) - batch.y + torch.randn(batch.n, 1)).square().mean())

    def second(self, stage):
        sgd = torch.optim.SGD(self.head.parameters(), 0.01, momentum=0.9)
        return [Player("control", (), self.control_loss),
                Player("head", self.head.parameters(), self.second_loss, sgd)]

    def grow(self):
        self.head = nn.Linear(3, 1)

    def cache(self, table):
        return {"h": self.enc(table["x"]) + 0.01 * torch.rand(3), "y": table["y"]}

    @torch.no_grad()
    def start(self, batch):
        self.head.bias.copy_(batch.y.mean(0) + torch.randn(1))

    def stages(self):
        return [
            Stage("first", 48, 8, self.first, ema=0.9, keep="best",
                  schedule=lambda p: 1 - p,
                  validate=lambda batch: self.first_loss(batch)["loss"][1].item()),
            Stage("second", 40, 8, self.second, build=self.grow, data=self.cache,
                  on_enter=self.start, ema=0.5),
        ]


def two():
    torch.manual_seed(5)
    return Two()


@contextlib.contextmanager
def watched():
    """Collects optimisers, averages and best weights at the end of each stage
    that reaches its end.
    """
    found, finish = [], Trainer.finish

    def spy(self):
        if self.over:
            best = {f"best.{k}": v for k, v in self.best.items()}
            everything = {**optimizer_tensors(self.optimizers), **self.average, **best}
            found.append({k: v.clone() for k, v in everything.items()})
        finish(self)

    Trainer.finish = spy
    try:
        yield found
    finally:
        Trainer.finish = finish


@pytest.fixture
def ends():
    """What was watched in this test."""
    with watched() as found:
        yield found


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def timeless(log):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The training without an interruption: weights, log, ends of stages, folder."""
    out = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch, watched() as found:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run = fit(two(), Points(), out, progress=False)
    assert run.finished and run.images == 88 and len(found) == 2
    return run.model.state_dict(), timeless(run.log), found, out


def check(straight, run, ends, out):
    weights, log, last, _ = straight
    assert (equal(run.model.state_dict(), weights)
            and timeless(run.log) == log == timeless(read_log(out / "log.jsonl")))
    assert len(ends) <= 2 and all(equal(a, b) for a, b in zip(ends, last[-len(ends) :]))
    assert equal(load(out, cls=Two).state_dict(), weights)


def test_toy_model_covers_the_tested_features(straight):
    weights, log, (first, second), _ = straight
    assert {k.split(".")[0] for k in first} == {"optimizer", "enc", "dec", "best"}
    assert any("momentum_buffer" in k for k in second) and "head.weight" in weights
    assert (sum("validation" in row for row in log) == 6
            and not any("dec.loss" in row for row in log[:2]))


@pytest.mark.parametrize("k", range(11))
@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_resuming_after_an_error_in_any_round_is_exact(straight, ends, tmp_path,
                                                       monkeypatch, k, save_every):
    class Broken(BaseException):
        pass

    count, real = [], StageRunner.round

    def breaking(self):
        if len(count) == k:
            raise Broken
        count.append(1)
        return real(self)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(StageRunner, "round", breaking)
        with pytest.raises(Broken):
            fit(two(), Points(), out, save_every=save_every, progress=False)
    torch.manual_seed(99)
    check(straight, fit(two(), Points(), out, progress=False), ends, out)


@pytest.mark.parametrize("again", ["new object", "same object"])
def test_resuming_after_a_budget_stop_each_round_is_exact(straight, ends, tmp_path,
                                                          again):
    out, model, stops = tmp_path / "run", two(), 0
    while not (run := fit(model, Points(), out, budget=0, progress=False)).finished:
        stops += 1
        assert "can be resumed" in repr(run) and not run.model.training
        with pytest.warns(UserWarning, match=f"not trained to its end: it stopped after "
                          rf"{run.images} images in stage '(first|second)' \("):
            loaded = load(out, cls=Two)
        assert equal(loaded.state_dict(), run.model.state_dict())
        torch.manual_seed(stops)
        model = two() if again == "new object" else model
    assert stops == 9  # 6 + 5 rounds, of which the last of each stage ends it
    check(straight, run, ends, out)


@pytest.mark.parametrize(("name", "call"), [
    *(("replace", k) for k in (1, 2, 3, 4, 7, 12, 20)), ("rename", 1), ("rename", 9),
])  # fmt: skip
def test_resuming_after_an_exit_during_saving_is_exact(straight, ends, tmp_path,
                                                       monkeypatch, name, call):
    real, calls, out = getattr(os, name), [], tmp_path / "run"

    def dying(*args):
        calls.append(args)
        if len(calls) == call:
            raise SystemExit
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, name, dying)
        with pytest.raises(SystemExit):
            fit(two(), Points(), out, save_every=0, progress=False)
    check(straight, fit(two(), Points(), out, progress=False), ends, out)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_resuming_after_a_kill_is_exact(straight, ends, tmp_path):
    """Six processes on one folder, each killed with signal 9 at a random
    time of its training.
    """
    out, clock = tmp_path / "run", random.Random(0)
    started = time.monotonic()
    fit(two(), Points(), tmp_path / "timed", save_every=0, progress=False)
    whole, killed = time.monotonic() - started, 0
    ends.clear()
    for _ in range(6):
        child = os.fork()
        if not child:
            try:
                fit(two(), Points(), out, save_every=0, progress=False)
            finally:
                os._exit(0)
        time.sleep(clock.uniform(0.05, 0.6) * whole)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert killed >= 1
    check(straight, fit(two(), Points(), out, progress=False), ends, out)


def test_damaged_newest_state_costs_rounds_and_changes_nothing(straight, ends,
                                                               tmp_path):
    out = tmp_path / "run"
    for _ in range(4):
        fit(two(), Points(), out, budget=0, progress=False)
    path = saved_states(out / "state")[0] / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="falling back"):
        run = fit(two(), Points(), out, progress=False)
    check(straight, run, ends, out)


def test_deleted_log_or_states_do_not_stop_a_run(straight, tmp_path):
    out = tmp_path / "run"
    fit(two(), Points(), out, budget=0, progress=False)
    (out / "log.jsonl").unlink()
    run = fit(two(), Points(), out, progress=False)
    assert equal(run.model.state_dict(), straight[0])
    for path in saved_states(out / "state"):
        (path / "tensors.safetensors").unlink()
    again = fit(two(), Points(), out, progress=False)
    assert again.finished and equal(again.model.state_dict(), straight[0])


def test_finished_run_is_loaded_and_unchanged(straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight[3], out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    torch.manual_seed(77)
    run = fit(Two(), Points(), out, progress=False)
    assert (run.finished and run.images == 88 and run.seconds > 0
            and timeless(run.log) == straight[1])
    assert equal(run.model.state_dict(), straight[0])
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_refit_of_a_model_with_added_structure_is_refused(straight, tmp_path,
                                                          monkeypatch):
    out, model = tmp_path / "run", two()
    with monkeypatch.context() as patch:
        patch.setattr(Two, "second_loss", lambda self, batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(model, Points(), out, progress=False)
    with pytest.raises(ValueError, match="has grown further than the saved state; "
                           "construct it anew"):
        fit(model, Points(), out, progress=False)
    assert equal(fit(two(), Points(), out, progress=False).model.state_dict(),
                 straight[0])


@pytest.mark.parametrize("make", [
    lambda ps: torch.optim.Adam(ps, 0.1),
    lambda ps: torch.optim.Adam(ps, 0.1, fused=True),
    lambda ps: torch.optim.AdamW(ps, 0.1, amsgrad=True),
    lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9),
    lambda ps: torch.optim.RMSprop(ps, 0.1, momentum=0.9, centered=True),
    lambda ps: torch.optim.Adamax(ps, 0.1),
    lambda ps: torch.optim.NAdam(ps, 0.1), lambda ps: torch.optim.Adagrad(ps, 0.1)])
def test_optimizer_states_are_restored_bit_for_bit(make):
    def nets():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(),
                            nn.Linear(16, 1)).to(memory_format=torch.channels_last)
        scalar = nn.Parameter(torch.tensor(0.5))
        return net, scalar, make([{"params": [*net.parameters()], "lr": 0.05},
                                  {"params": [scalar]}])

    def steps(net, scalar, optimizer, start):
        for k in range(start, start + 3):
            torch.manual_seed(k)
            optimizer.zero_grad()
            (net(torch.randn(2, 3, 4, 4)) * scalar).square().sum().backward()
            optimizer.step()

    a, b = nets(), nets()
    steps(*a, 0)
    kept = {k: v.clone(memory_format=torch.contiguous_format)
            for k, v in optimizer_tensors([a[2]]).items()}
    with torch.no_grad():
        for p, q in zip([*a[0].parameters(), a[1]], [*b[0].parameters(), b[1]]):
            q.copy_(p)
    load_optimizer_tensors([b[2]], kept)
    steps(*a, 3)
    steps(*b, 3)
    assert all(torch.equal(p, q)
               for p, q in zip([*a[0].parameters(), a[1]], [*b[0].parameters(), b[1]]))
    assert equal(optimizer_tensors([a[2]]), optimizer_tensors([b[2]]))


# What is refused, guarded, kept


def test_non_finite_error_names_stage_image_player_and_term():
    def loss(model):
        return lambda batch: {**model.all_loss(batch),
                              "bad": (1.0, (model.nets["a"].weight.sum() * math.nan))}

    model = simple(lambda m: [player(m, "a", loss=loss(m)), player(m, "b")], images=400)
    before = model.nets["a"].weight.clone()
    with pytest.raises(FloatingPointError) as found:
        fit(model, Points(), progress=False)
    text = str(found.value)
    assert text.startswith("stage 'only', image 72, player 'a': "
                           "not finite in 10 steps in a row: a.bad, a.norm;")
    assert MAX_NONFINITE_STEPS == 10 and torch.equal(model.nets["a"].weight, before)


def test_single_non_finite_steps_are_skipped_and_counted(tmp_path):
    def make(bad):
        def loss(model):
            def f(batch):
                calls.append(1)
                return term(model.nets["a"](batch.x).mean()
                            * (math.inf if bad(len(calls)) else 1.0))

            return f

        calls = []
        return simple(lambda m: [player(m, "a", loss=loss(m))], images=160)

    assert fit(make(lambda k: k % 3), Points(), progress=False).finished
    with pytest.raises(FloatingPointError):
        for _ in range(20):
            fit(make(lambda k: True), Points(), tmp_path, budget=0, progress=False)
    assert load_state(tmp_path)[1]["bad"] == {"a": 9}


def test_final_weights_are_averages_or_best_weights():
    def run(**options):
        model = simple(lambda m: [player(m, "a")], names="a", images=80, **options)
        paths, trainer = [], entered(model)
        for _ in range(10):
            trainer.round()
            paths.append(model.nets["a"].weight.detach().clone())
        return model, trainer, paths

    _, trainer, path = run()
    trainer.finish()
    assert torch.equal(trainer.model.nets["a"].weight, path[-1])
    model, trainer, path = run(ema=0.7)
    torch.manual_seed(0)
    mean = Simple("a").nets["a"].weight.detach()
    for k, w in enumerate(path, 1):
        mean = mean.lerp(w, 1 - min(0.7, (1 + k) / (10 + k)))
    trainer.finish()
    assert (torch.allclose(model.nets["a"].weight, mean, atol=1e-7)
            and not torch.equal(mean, path[-1]))


def test_best_is_by_validation_and_stop_ends_a_stage():
    numbers, seen = iter([5.0, 3.0, 4.0, 3.5, 9.0]), []

    def validate(batch):
        if batch.x.shape[0] == 12:
            seen.append(model.nets["a"].weight.detach().clone())
        assert not torch.is_grad_enabled() and not model.training
        return next(numbers)

    model = simple(lambda m: [player(m, "a")], validate=validate, keep="best",
                   images=400, stop=lambda history: len(history) >= 5)
    run = fit(model, Points(), progress=False)
    assert [row["validation"] for row in run.log if "validation" in row] == [
        5, 3, 4, 3.5, 9]
    assert (run.finished and run.images == 5 * 2 * 8
            and torch.equal(model.nets["a"].weight, seen[1]))


def test_validation_is_a_mean_over_items():
    model = simple(lambda m: [player(m, "a")],
                   validate=lambda batch: batch.x.mean().item(), images=8)
    data = Points(val=600)
    run = fit(model, data, progress=False)
    mean = data.table("val")["x"].mean().item()
    assert run.log[0]["validation"] == pytest.approx(mean, abs=1e-6)
    empty = simple(lambda m: [player(m, "a")], validate=lambda batch: 1 / 0,
                   keep="best")
    assert not [row for row in fit(empty, Points(val=0), progress=False).log
                if "validation" in row]


def test_lengths_are_overridden_by_number_and_by_name():
    first, second = set_stage_lengths(two().stages(), {"second": 16}, None)
    assert (first.images, second.images, first.batch) == (48, 16, 8)
    first, second = set_stage_lengths(two().stages(), 24, 4)
    assert (first.images, second.images, first.batch, second.batch) == (24, 24, 4, 4)
    run = fit(two(), Points(), images={"first": 16, "second": 8}, batch=8,
              progress=False)
    assert run.images == 24 and {row["stage"] for row in run.log} == {"first", "second"}


@pytest.mark.parametrize(("options", "message"), [
    ({"images": {"frist": 8}},
     "images of stage 'frist'; accepted: first, second; did you mean 'first'?"),
    ({"images": 0}, "stage 'first': images=0; accepted: an integer, 1 or more"),
    ({"images": {"second": -1}}, "stage 'second': images=-1"),
    ({"images": "many"}, "stage 'first': images='many'; accepted: an integer"),
    ({"batch": 0}, "stage 'first': batch=0"),
    ({"batch": 1.5}, "stage 'first': batch=1.5; accepted: an integer, 1 or more"),
    ({"batch": True}, "stage 'first': batch=True"),
    ({"batch": 41}, "stage 'first': batch=41 for 1 process(es); accepted: 2 to 40"),
    ({"batch": 10**6}, "accepted: 2 to 40, the training images"),
    ({"seed": "x"}, "seed='x'; accepted: an integer"),
    ({"seed": 1.0}, "seed=1.0; accepted: an integer"),
    ({"budget": "9m"}, "budget='9m'; accepted: seconds, 0 or more"),
    ({"budget": math.nan}, "budget=nan; accepted: seconds, 0 or more"),
    ({"save_every": -1}, "save_every=-1; accepted: seconds, 0 or more"),
    ({"precision": "fp16"}, "precision='fp16'; accepted: no, bf16")])
def test_settings_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError) as found:
        fit(two(), Points(), tmp_path / "run", progress=False, **options)
    assert message in str(found.value) and not any(tmp_path.iterdir())


def test_batches_may_be_as_large_as_the_training_part():
    assert fit(two(), Points(), images=40, batch=40, progress=False).finished
    # a model's own batch may exceed a small set
    assert fit(two(), Points(3), images=8, progress=False).finished


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("given", ["x", "", "1.5", "-2"])
def test_launcher_variables_without_a_number_are_named(name, given, tmp_path,
                                                       monkeypatch):
    monkeypatch.setenv(name, given)
    with pytest.raises(ValueError, match=f"variable {name}='{given}'; accepted: an int"):
        fit(two(), Points(), tmp_path / "run", progress=False)
    assert not any(tmp_path.iterdir())


def test_the_folder_of_another_run_is_refused(tmp_path):
    out = tmp_path / "run"
    fit(two(), Points(), out, budget=0, progress=False)
    other = Points()
    other.sha256 = "1" * 64
    cases = [({"seed": 1}, Points(), "its training.seed is 0, asked for 1"),
             ({"images": {"first": 8}}, Points(),
              "its training.stages.first.images is 48, asked for 8"),
             ({"batch": 4}, Points(),
              "its training.stages.first.batch is 8, asked for 4"),
             ({}, other, 'its data.sha256 is "000')]
    for options, data, message in cases:
        with pytest.raises(ValueError, match="holds another run: ") as found:
            fit(two(), data, out, progress=False, **options)
        assert (message in str(found.value)
                and "choose another folder, or delete this one" in str(found.value))
    with pytest.raises(ValueError, match=r"its class is .*Two\", asked for .*Simple"):
        fit(simple(lambda m: []), Points(), out, progress=False)
    assert fit(two(), Points(), out, progress=False).finished


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "field", ["class", "arguments", "data", "training", "stage", "images", "seconds"])
def test_a_card_without_a_field_is_refused_by_its_name(tmp_path, field, finished):
    fit(two(), Points(), tmp_path / "run", budget=None if finished else 0,
        progress=False)
    path = tmp_path / "run" / "card.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != field}))
    if field in ("images", "seconds") and not finished:
        assert fit(two(), Points(), tmp_path / "run", progress=False).finished
        return
    with pytest.raises(DamagedFile, match=f"card.json: no field '{field}'; accepted: "):
        fit(two(), Points(), tmp_path / "run", progress=False)
    path.write_text(json.dumps(whole))
    assert fit(two(), Points(), tmp_path / "run", progress=False).finished


@pytest.mark.parametrize(("change", "message"), [
    ({"images": "many"}, "'images' is \"many\"; accepted: an integer, 0 or more"),
    ({"images": -1}, "'images' is -1; accepted: an integer, 0 or more"),
    ({"seconds": [3]}, "'seconds' is [3]; accepted: a finite number, 0 or more"),
    ({"finished": "yes"}, "'finished' is \"yes\"; accepted: true or false"),
    ({"stage": None}, "'stage' is null; accepted: an integer, -1 or more"),
    ({"stage": 2}, "'stage' is 2; accepted: 0 to 1"),
    ({"images": 80}, "'images' is 80; accepted: 88 to 88"),
    ({"stage": True}, "'stage' is true; accepted: an integer, -1 or more"),
    ({"class": 3}, "'class' is 3; accepted: text"),
    ({"arguments": []}, "'arguments' is []; accepted: an object"),
    ({"training": 5}, "'training' is 5; accepted: an object"),
    ({"training": {"stages": {}, "processes": 1}}, "no field 'training.seed'"),
    ({"training": {"seed": 0, "processes": 1, "stages": [1]}},
     "'training.stages' is [1]; accepted: an object"),
    ({"training": {"seed": 0, "processes": 1, "stages": {"first": 3}}},
     "'training.stages.first' is 3; accepted: an object"),
    ({"data": []}, "'data' is []; accepted: an object"),
    ({"threads": 0}, "'threads' is 0; accepted: an integer, 1 or more")])
def test_a_card_with_other_values_is_refused(tmp_path, change, message):
    fit(two(), Points(), tmp_path / "run", progress=False)
    path = tmp_path / "run" / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError) as found:
        fit(two(), Points(), tmp_path / "run", progress=False)
    assert message in str(found.value)


@pytest.mark.parametrize(("change", "message"), [
    *(({name: None}, f"'{name}' is null; accepted: ") for name in (
        "built", "stage_index", "stage_over", "seen", "draws", "total", "bad",
        "history", "log", "seconds")),
    ({"stage_index": 2}, "'stage_index' is 2; accepted: 0 to 1"),
    ({"built": 0}, "'built' is 0; accepted: 1 to 2"),
    ({"built": 10**30}, "'built' is 1000"),
    ({"stage_over": True}, "'seen' is 32; accepted: 48 to 48"),
    ({"seen": 31}, "'seen' is 31 of 32 images; accepted: multiples of 8"),
    ({"seen": 8}, "'seen' is 8 of 32 images"),
    ({"seen": 480}, "'seen' is 480; accepted: 0 to 48"),
    ({"total": 8}, "'total' is 8; accepted: 32 to 32"),
    ({"log": -5}, "'log' is -5; accepted: an integer, 0 or more"),
    ({"bad": {"enc": "x"}}, "'bad.enc' is \"x\"; accepted: an integer, 0 or more"),
    ({"history": ["x"]}, "'history' is ['x']; accepted: a list of numbers"),
    ({"seconds": -1}, "'seconds' is -1; accepted: a finite number, 0 or more")])
def test_a_state_with_other_facts_costs_rounds_only(straight, ends, stopped, tmp_path,
                                                    change, message):
    """They are named, and the state before is used; the same for missing facts."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    path = saved_states(out / "state")[0] / "tensors.safetensors"
    tensors, info = read_tensors(path)
    write_tensors(path, tensors, **(info | change))
    with pytest.warns(UserWarning) as caught:
        run = fit(two(), Points(), out, progress=False)
    assert any(f"{path}: {message}" in str(w.message) and "falling back" in str(w.message)
               for w in caught), [str(w.message) for w in caught]
    check(straight, run, ends, out)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after its fourth round."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for _ in range(4):
            fit(two(), Points(), out, budget=0, progress=False)
    return out


def test_a_state_without_a_fact_is_named(stopped):
    _, info = load_state(stopped)
    for name in info:
        less = {k: v for k, v in info.items() if k != name}
        assert next(state_misfits(two().stages(), 32, less)).startswith(
            f"no field '{name}'; accepted: ")
    assert not any(state_misfits(two().stages(), 32, info))


@pytest.mark.parametrize(("name", "value", "message"), [
    ("optimizer.0.1.exp_avg", torch.zeros(1), r"is \(1,\) of torch.float32, needed"),
    ("optimizer.0.1.exp_avg", torch.tensor(0.0), "is of another kind than those"),
    ("optimizer.0.1.exp_avg", torch.zeros(3).double(), "of torch.float64, needed"),
    ("optimizer.0.1.exp_avg", None, "is missing"),
    ("optimizer.0.99.exp_avg", torch.zeros(3), "is not part of it"),
    ("optimizer.0.1.step", torch.tensor(-1.0), r"is -1.0; accepted: 1 or more"),
    ("optimizer.0.1.step", torch.tensor(math.nan), r"is nan; accepted: 1 or more"),
    ("average.dec.bias", None, "is missing"),
    ("average.dec.bias", torch.zeros(2), r"is \(2,\) of torch.float32, needed \(1,\)"),
    ("best.dec.bia", torch.zeros(1), "is not part of it"),
    ("more", torch.zeros(1), "is not part of it"),
    ("model.dec.bias", torch.zeros(2), r"is \(2,\), needed \(1,\)")])
def test_a_state_with_other_tensors_is_refused(stopped, tmp_path, name, value, message):
    """A fused optimiser would read and write beyond the end of the smaller ones."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    path = saved_states(out / "state")[0] / "tensors.safetensors"
    tensors, info = read_tensors(path)
    tensors.pop(name, None)
    write_tensors(path, tensors if value is None else tensors | {name: value}, **info)
    with pytest.raises(DamagedFile, match=f"{path} does not fit .*{message}"):
        fit(two(), Points(), out, progress=False)


def test_models_and_data_of_other_types_are_refused(tmp_path):
    data = Points()
    cases = [(None, data, "model given as NoneType; accepted: a condgen.Model"),
             (nn.Linear(1, 1), data, "model given as Linear"),
             (Two, data, "model given as type"),
             (two(), None, "data given as NoneType; accepted: a data set"),
             (two(), data.fields["x"].numpy(), "data given as ndarray")]
    data = Points()
    data.shape = (3, 8, 8)
    cases.append((two(), data, "for images (2, 1, 1), but points has (3, 8, 8)"))
    for model, given, message in cases:
        with pytest.raises(ValueError) as found:
            fit(model, given, tmp_path / "run", progress=False)
        assert message in str(found.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_failed_at_once_does_not_keep_its_folder(tmp_path):
    """A training that ended before its first state leaves the folder to any other."""
    broken = simple(lambda m: [player(m, "a", loss=lambda batch: 1 / 0)], names="a")
    with pytest.raises(ZeroDivisionError):
        fit(broken, Points(), tmp_path, precision="bf16", progress=False)
    (tmp_path / "card.json").write_text((tmp_path / "card.json").read_text()[:-9])
    run = fit(two(), Points(), tmp_path, seed=3, progress=False)
    assert run.finished and json.loads((tmp_path / "card.json").read_text())[
        "training"]["seed"] == 3


def test_a_model_says_how_far_it_was_trained(tmp_path):
    model = two()
    run = fit(model, Points(), tmp_path, budget=0, progress=False)
    assert run.status == "stopped in stage 'first', can be resumed"
    assert "stopped after 8 images" in repr(model)
    assert "trained on 88 images" in repr(fit(model, Points(), progress=False).model)
    again = fit(two(), Points(), tmp_path, progress=False).model
    assert again.fitted == {"finished": True, "images": 88}
    assert fit(two(), Points(), tmp_path, progress=False).model.fitted == again.fitted
    failing = simple(lambda m: [player(m, "a", loss=lambda batch: 1 / 0)], names="a")
    failing.fitted = again.fitted
    with pytest.raises(ZeroDivisionError):
        fit(failing, Points(), progress=False)
    assert not failing.fitted["finished"]


def test_seeds_of_numpy_are_integers(tmp_path):
    a, b = (fit(two(), Points(), tmp_path / name, seed=seed, progress=False)
            for name, seed in (("a", 3), ("b", np.int64(3))))
    assert equal(a.model.state_dict(), b.model.state_dict())


def test_a_failed_training_leaves_a_model_that_evaluates():
    def fail(batch):
        raise ZeroDivisionError

    model = simple(lambda m: [player(m, "a", loss=fail)])
    with pytest.raises(ZeroDivisionError):
        fit(model, Points(), progress=False)
    assert (not any(m.training for m in model.modules())
            and all(p.requires_grad for p in model.parameters()))


def test_conditions_other_than_the_data_sets_are_refused(tmp_path):
    for conditions in ([Binary("c")], [Binary("b"), Real("r", 0, 1)],
                       [Real("b", 0, 1)]):
        with pytest.raises(ValueError, match="but points is labelled with .* accepted: "
                               "the same conditions"):
            fit(Two(conditions), Points(), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    model = two()
    fit(model, Points(), images=8, progress=False)
    assert model.rows.tolist() == [[0], [1]] and model.row_counts.sum() == 40


def test_unwritable_folder_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = simple(lambda m: 1 / 0)
    with pytest.raises(OSError,
                       match=r"cannot make folder .*file.run: .*; choose another one"):
        fit(model, Points(), tmp_path / "file/run", progress=False)


def deny(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_a_folder_without_access_is_named(tmp_path, monkeypatch):
    seen = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: (
        deny if Path(os.fspath(path)).parent == tmp_path else seen)(path, **options))
    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(OSError, match="cannot open folder .*: Permission denied in "
                                      "folder .*; choose another one"):
        fit(two(), Points(), tmp_path, progress=False)


def test_a_log_without_permission_names_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "open", deny, raising=False)
    with pytest.raises(OSError, match=r"log\.jsonl: Permission denied in folder .*; "
                       "choose another one, .*; the last saved state is unchanged"):
        fit(two(), Points(), tmp_path, progress=False)


def test_card_records_data_settings_and_versions(tmp_path):
    fit(two(), Points(), tmp_path, progress=False)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["finished"] and card["images"] == 88 and card["stage"] == 1
    assert card["threads"] == torch.get_num_threads()
    assert (card["data"] == {"name": "points", "sha256": "0" * 64}
            and card["training"]["processes"] == 1)
    assert (set(card["versions"]) == {"condgen", "python", "torch"}
            and card["seconds"] > 0)


def test_log_has_every_term_and_at_most_two_hundred_rows():
    model = simple(lambda m: [player(m, "a"), player(m, "b")], images=8 * 225)
    run = fit(model, Points(), progress=False)
    assert 150 < len(run.log) <= 226
    assert set(run.log[0]) == {"stage", "images", "seconds", "a.loss", "a.norm",
                               "b.loss", "b.norm"}
    assert run.log[-1]["images"] == 1800


def test_bf16_trains():
    model = simple(lambda m: [player(m, "a")], names="a", images=800)
    run = fit(model, Points(), precision="bf16", progress=False)
    assert (run.log[-1]["a.loss"] < run.log[0]["a.loss"]
            and model.nets["a"].weight.dtype == torch.float32)


# Several processes


def gloo() -> bool:
    return (torch.distributed.is_available() and torch.distributed.is_gloo_available()
            and hasattr(os, "fork"))


class Shared(Model):
    """A regression with a batch norm beside it and a buffer that
    follows the batch; float64.
    """

    def __init__(self):
        super().__init__((2, 1, 1))
        self.net, self.unused = nn.Sequential(nn.Linear(2, 4), nn.Tanh(),
                                              nn.Linear(4, 1)), nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("follow", torch.zeros(2))
        self.register_buffer("fixed", torch.rand(7))

    def loss(self, batch):
        return term((self.net(batch.x.to(self.fixed)) - batch.y
                     + 0.1 * batch.randn("e", 1)).square().mean())

    def follow_loss(self, batch):
        self.follow.lerp_(batch.x.to(self.follow).mean(0), 0.5)
        self.norm(batch.x.to(self.follow))
        return {}

    def stages(self):
        params = [*self.net.parameters(), *self.unused.parameters(),
                  *self.norm.parameters()]
        return [Stage(
            "only", 70, 7,
            lambda stage: [Player("net", params, self.loss, adam(params), clip=1.0),
                           Player("follow", (), self.follow_loss, fresh=False)],
            ema=0.5, validate=lambda batch: self.loss(batch)["loss"][1].item(),
            keep="best")]


def train_shared(folder: str) -> None:
    """In each process: train and leave what came out in a file of its own."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=True)
    # a careless caller: processes start with unequal weights
    torch.manual_seed(0 if state.is_main_process else 1)
    model = Shared().double()
    run = fit(model, Points(), Path(folder) / f"run{state.num_processes}",
              progress=False)
    late = fit(Shared().double(), Points(), images=700_000, budget=0.2, progress=False)
    found = {
        "processes": state.num_processes, "log": timeless(run.log), "late": late.images,
        "tensors": {k: v.flatten().tolist() for k, v in model.state_dict().items()}}
    (Path(folder) / f"{state.num_processes}-{state.process_index}.json").write_text(
        json.dumps(found))


@pytest.mark.skipif(not gloo(), reason="needs gloo and fork")
def test_two_processes_train_like_one(tmp_path):
    """Law 9 for a toy with an odd batch (3 + 4 rows), a parameter without
    gradient, and buffers.
    """
    from accelerate import debug_launcher

    train_shared(str(tmp_path))
    debug_launcher(train_shared, (str(tmp_path),), num_processes=2)
    one, main, other = (json.loads((tmp_path / name).read_text())
                        for name in ("1-0.json", "2-0.json", "2-1.json"))
    assert (one["processes"], main["processes"], other["processes"]) == (1, 2, 2)
    assert main["tensors"] == other["tensors"] and main["late"] == other["late"] > 0
    assert len(main["log"]) == len(one["log"]) == 20
    for a, b in zip(one["log"], main["log"]):
        assert list(a) == list(b)
        assert all(a[k] == b[k] if k == "stage"
                       else math.isclose(a[k], b[k], rel_tol=1e-6, abs_tol=1e-9)
                   for k in a)
    for name, values in one["tensors"].items():
        if name.startswith("norm.running_var"):
            # the variance of shares is not that of the whole
            assert all(map(math.isfinite, main["tensors"][name]))
        else:
            assert main["tensors"][name] == pytest.approx(values, rel=1e-9,
                                                          abs=1e-12), name
    assert main["tensors"]["fixed"] == one["tensors"]["fixed"]


def test_one_player_update_works_without_a_trainer():
    model = simple(lambda m: [], names="a")
    batch = Batch(Points().table("train"), Noise((0,), slice(None), 40))
    values = step_player(player(model, "a"), batch, model, make_accelerator("no"), 40)
    assert (set(values) == {"a.loss", "a.norm"}
            and all(p.grad is None for p in model.parameters()))


# Threads


@pytest.fixture
def threads(monkeypatch):
    """A list whose last item is the number of threads, 4; PyTorch's own stays 1."""
    found = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: found[-1])
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("condgen.threads.MIN_ROUNDS_FOR_TRIAL", 1)
    return found


def trial_of(monkeypatch, *chosen):
    """Let trials play seven rounds and choose these numbers of threads in turn."""
    queue = [*chosen]

    def fastest(step, most):
        assert most == 4
        for _ in range(7):
            step()
        return queue.pop(0)

    monkeypatch.setattr("condgen.threads.fastest_threads", fastest)


def test_measuring_threads_changes_no_bit(straight, ends, tmp_path, monkeypatch,
                                          threads):
    trial_of(monkeypatch, 3)
    check(straight, fit(two(), Points(), tmp_path / "run", progress=False), ends,
          tmp_path / "run")
    assert json.loads((tmp_path / "run" / "card.json").read_text())["threads"] == 3
    assert threads[-1] == 4


def test_a_resumed_run_keeps_its_threads(straight, ends, tmp_path, monkeypatch,
                                         threads):
    trial_of(monkeypatch, 2)  # a second trial would find nothing
    played, real = [], StageRunner.round

    def counting(self):
        played.append(threads[-1])
        return real(self)

    monkeypatch.setattr(StageRunner, "round", counting)
    while not (run := fit(two(), Points(), tmp_path, budget=0,
                          progress=False)).finished:
        assert threads[-1] == 4
    assert played == [4] * 7 + [2] * 11
    check(straight, run, ends, tmp_path)


@pytest.mark.parametrize(("begun", "fixed", "used"), [
    (2, False, 2), (2, True, 4), (9, False, 4), (4, True, 4), (4, False, 4)])
def test_other_threads_than_at_the_beginning_are_told(tmp_path, monkeypatch, threads,
                                                      begun, fixed, used):
    trial_of(monkeypatch, 1)
    fit(two(), Points(), tmp_path, budget=0, progress=False)
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps(card | {"threads": begun}))
    if fixed:
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(two(), Points(), tmp_path, budget=0, progress=False)
    told = [str(w.message) for w in said if "thread" in str(w.message)]
    assert json.loads((tmp_path / "card.json").read_text())["threads"] == used
    assert len(told) == (used != begun)
    assert all(f"began with {begun} thread(s) and goes on with {used}" in text
               and f"OMP_NUM_THREADS={begun}" in text for text in told)


@pytest.mark.parametrize("case", ["fixed", "short", "one"])
def test_threads_are_not_measured_without_need(tmp_path, monkeypatch, threads, case):
    trial_of(monkeypatch)
    if case == "fixed":
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    if case == "short":
        monkeypatch.setattr("condgen.threads.MIN_ROUNDS_FOR_TRIAL", 7)
    if case == "one":
        threads.append(1)
    fit(two(), Points(), tmp_path, budget=0, progress=False)
    assert json.loads((tmp_path / "card.json").read_text())["threads"] == threads[-1]
