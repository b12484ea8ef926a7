"""Tasks side by side: order, turns, errors, kills, and results that do not depend on
how many processes made them.
"""

import os
import signal
import time
from dataclasses import replace

import joblib
import psutil
import pytest
import slow
import torch
from joblib.externals.loky import get_reusable_executor
from test_experiments import counting, run_it

from condgen import lab as lab_module
from condgen import recipes, reproduction
from condgen.files import FolderInUse, read_log, read_tensors
from condgen.jobs import Task, candidates, run_tasks
from condgen.lab import Experiment, Lab, OutOfTime, find_experiment
from condgen.recipes import find
from condgen.reproduction import reproduce
from condgen.results import read_results, result_path, row

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
CALLS = []  # of tasks in this process: name and seconds


@pytest.fixture
def here():
    """All jobs one after the other in this process."""
    CALLS.clear()
    with joblib.parallel_config(backend="sequential"):
        yield


def note(name, seconds):
    CALLS.append((name, seconds))


def noted(name, *after, call=note, **options):
    return Task(name, call, (name,), after, **options)


@pytest.mark.parametrize("jobs", [1, 2, 3, 4])
def test_leftover_tasks_are_those_worked_on(jobs):
    for n in range(12):
        ready = [noted(str(k)) for k in range(n)]
        chosen = candidates(ready, jobs)
        assert chosen == ready[: len(chosen)] and len(chosen) < 2 * jobs
        assert len(chosen) >= min(n, jobs) and (n - len(chosen)) % jobs == 0


def test_every_task_is_done_once_and_after_its_predecessors(here, tmp_path):
    plan = [noted("a"), noted("c", "a", "b"), noted("b"), noted("d", "c"), noted("e")]
    run_tasks(plan, 3, tmp_path, progress=False)
    names = [name for name, _ in CALLS]
    assert sorted(names) == ["a", "b", "c", "d", "e"]
    assert all(names.index(task.name) > names.index(before)
               for task in plan for before in task.after)


def needs_three(name, seconds):
    note(name, seconds)
    if sum(called == name for called, _ in CALLS) < 3 and seconds < 1e9:
        raise OutOfTime(name)


def test_leftover_trainings_take_turns(here, tmp_path):
    """Two processes, three trainings: turns until two are left, which need none."""
    plan = [noted(name, call=needs_three, turns=True) for name in "abc"]
    run_tasks([*plan, noted("d", "a")], 2, tmp_path, progress=False)
    names, seconds = zip(*CALLS)
    assert names[:7] == (*"abcabc", "a") and max(seconds[:7]) < 1e9
    assert set(seconds[7:]) == {float("inf")} and sorted(names[7:]) == ["b", "c", "d"]


def test_a_folder_of_another_command_is_waited_for(here, tmp_path, monkeypatch):
    def busy(name, seconds):
        note(name, seconds)
        if len(CALLS) < 3:
            raise FolderInUse(name)

    monkeypatch.setattr("condgen.jobs.WAIT_SECONDS", 0.001)
    run_tasks([noted("a", call=busy)], 2, tmp_path, progress=False)
    assert len(CALLS) == 3


def test_the_error_of_a_task_stops_the_others(here, tmp_path):
    def fails(name, seconds):
        raise FloatingPointError("not finite")

    plan = [noted("a"), noted("b", "a", call=fails), noted("c", "b"), noted("d", "b")]
    with pytest.raises(FloatingPointError, match="not finite"):
        run_tasks(plan, 2, tmp_path, progress=False)
    assert [name for name, _ in CALLS] == ["a"]


def test_a_budget_ends_in_out_of_time(here, tmp_path):
    with pytest.raises(OutOfTime):
        run_tasks([noted(n, call=needs_three) for n in "ab"], 2, tmp_path, budget=0.0,
                  progress=False)
    assert CALLS == [("a", 0.0)]


def test_two_jobs_in_one_process_are_refused(tmp_path):
    wait = lambda name, seconds: time.sleep(0.2)
    with (joblib.parallel_config(backend="threading"),
          pytest.raises(ValueError, match="two jobs in one process; accepted")):
        run_tasks([noted("a", call=wait)], 2, tmp_path, progress=False)


# Rows do not depend on the number of jobs


def seed_row(run, name, **at):
    return row(name, "bpd", list(run.log[-1].values())[-1], at=at, n=3)


def family(lab):
    """A parent with a child, a sweep, and what all seeds share."""
    shared = [seed_row(lab.train("evaluator-digits"), "evaluator")] if lab.first else []
    lab.evaluator("evaluator-digits")
    return [*shared, seed_row(lab.train("glow-digits", lr=2e-3), "Glow", lr=2e-3),
            seed_row(lab.train("caglow-digits"), "CAGlow")]


@pytest.fixture
def declares(monkeypatch):
    """Declares an experiment of that family, with two rounds for each recipe; its probe
    is computed once.
    """
    data, images = "slow.kept_digits", {
        "evaluator-digits": {"judge": 128}, "glow-digits": {"flow": 128},
        "caglow-digits": {"adversarial": 160}}
    known = {name: replace(find(name), data=data, images={"tiny": lengths})
             for name, lengths in images.items()}
    experiment = Experiment("test/family", "", family, (*known,), data)
    lists = {"EXPERIMENTS": {experiment.name: experiment}, "RECIPES": known}
    for module in (lab_module, recipes):
        monkeypatch.setattr(module, "declared", lists.__getitem__)
    proof = reproduction.probe(experiment)
    monkeypatch.setattr(reproduction, "probe", lambda experiment: proof)


def test_rows_do_not_depend_on_jobs_nor_interruptions(here, declares, tmp_path):
    """One job without a break, and two jobs whose budget ends in each training."""
    def run(name, **options):
        where = tmp_path / name
        return reproduce("test/family", "tiny", 2, runs=where, results=where / "r.json",
                         progress=False, **options)

    alone, stops = run("alone"), 0
    while True:
        try:
            jobs = run("jobs", jobs=2, budget=0.0)
            break
        except OutOfTime:
            stops += 1
    assert stops == 7  # the evaluator, and three trainings of each seed
    for part in ("rows", "config", "evaluators", "command"):
        assert jobs[part] == alone[part]
    assert [len(r["values"]) for r in jobs["rows"]] == [1, 2, 2]
    assert not [*(tmp_path / "jobs").glob(".jobs-*")]


def test_the_plan_has_parents_first_and_seeds_in_order(declares, tmp_path):
    labs = [Lab(lab_module.find_experiment("test/family"), "tiny", seed, tmp_path)
            for seed in (3, 5)]
    plan = reproduction.plan_of(labs, reproduction.probe(None), tmp_path / "r.json",
                                tmp_path)
    after = {task.name: task.after for task in plan}
    assert after["caglow-digits, seed 5"] == ("glow-digits, seed 5",)
    assert "evaluator-digits, seed 0" in after["measuring seed 5"]
    assert "evaluator-digits, seed 5" not in after
    assert after["joining seed 5"] == ("measuring seed 5", "joining seed 3")
    names = [*after]
    assert all(names.index(name) > names.index(before)
               for name, others in after.items() for before in others)
    assert [task.name for task in plan if task.turns] == [
        name for name in names if name.startswith(("evaluator", "glow"))]


def test_the_number_of_jobs_is_checked(tmp_path):
    with pytest.raises(ValueError, match="0 jobs; accepted: 1 or more"):
        reproduce("caglow/digits", "tiny", jobs=0, results=tmp_path / "r.json")


# Two commands at once


def meeting(folder):
    """The function of an experiment that waits until two seeds are being run."""
    def run(lab):
        if lab.rounds:
            return [row("Glow", "bpd", 1.0, n=3)]
        (folder / f"{lab.seed}").touch()
        end = time.monotonic() + 60
        while len([*folder.iterdir()]) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        shared = [row("evaluator", "accuracy", 0.5)] if lab.first else []
        return [*shared, row("Glow", "bpd", 1.0 + lab.seed, n=3)]

    return run


@forks
def test_two_commands_at_once_lose_no_seed(tmp_path, monkeypatch):
    seen, path = tmp_path / "seen", result_path("test/count", "tiny", tmp_path)
    seen.mkdir()
    counting(monkeypatch, change={"run": meeting(seen)})
    children = []
    for seed in (0, 1):
        children.append(os.fork())
        if not children[-1]:
            code = 1
            try:
                run_it(tmp_path, path, first=seed)
                code = 0
            finally:
                os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    result = read_results(path)
    seeds, (shared, own) = result["config"]["seeds"], result["rows"]
    assert sorted(seeds) == [0, 1] and own["values"] == [1.0 + s for s in seeds]
    assert shared["values"] == [0.5]


# Processes of their own


def plan_in(folder):
    return [Task(str(k), slow.train_slowly, (str(folder / f"run{k}"),)) for k in range(2)]


def start(folder, backend, least=2):
    """Run a plan in a child of this process, with workers; returns its number and them
    when `least` of them train.
    """
    before = {k: len(rows(folder, k)) for k in range(2)}
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            board = folder / f"board{os.getpid()}"
            board.mkdir()
            with joblib.parallel_config(backend=backend):
                run_tasks(plan_in(folder), 2, board, progress=False)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except RuntimeError:
            code = 2
        finally:
            if backend == "loky":
                get_reusable_executor().shutdown(kill_workers=True)
            os._exit(code)
    end = time.monotonic() + 120
    while sum(len(rows(folder, k)) > before[k] for k in range(2)) < least:
        assert time.monotonic() < end and os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    return child, [p for p in psutil.Process(child).children()
                   if "resource_tracker" not in " ".join(p.cmdline())]


def rows(folder, k):
    path = folder / f"run{k}" / "log.jsonl"
    return read_log(path) if path.exists() else []


def ended(child, workers):
    """The exit code of a child; its workers end too."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    end = time.monotonic() + 60
    while any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers):
        assert time.monotonic() < end, "a worker goes on"
        time.sleep(0.02)
    return code


@forks
def test_kills_and_ctrl_c_lose_nothing(tmp_path, monkeypatch):
    """Ctrl-C, a killed parent, a killed worker; then the same bits as without them.

    Workers that are forked start at once; only loky notices that one was killed.
    """
    with monkeypatch.context() as patch:
        patch.setattr(slow, "WAIT", 0)
        slow.train_slowly(tmp_path / "alone", None)
    whole = read_tensors(tmp_path / "alone" / "model.safetensors")[0]
    states = lambda: [max((int(p.name) for p in (tmp_path / f"run{k}" / "state").glob(
        "[0-9]*")), default=0) for k in range(2)]
    child, workers = start(tmp_path, "multiprocessing")
    os.kill(child, signal.SIGINT)
    assert ended(child, workers) == 130 and min(states()) > 0
    saved = states()
    child, workers = start(tmp_path, "multiprocessing")
    os.kill(child, signal.SIGKILL)
    assert ended(child, workers) == -signal.SIGKILL
    assert all(a > b for a, b in zip(states(), saved))
    child, workers = start(tmp_path, "loky", 1)
    workers[0].kill()
    assert ended(child, workers) == 2
    monkeypatch.setattr(slow, "WAIT", 0)
    with joblib.parallel_config(backend="sequential"):
        (tmp_path / "board").mkdir()
        run_tasks(plan_in(tmp_path), 2, tmp_path / "board", progress=False)
    for k in range(2):
        found = read_tensors(tmp_path / f"run{k}" / "model.safetensors")[0]
        assert all(torch.equal(found[name], t) for name, t in whole.items())


@pytest.mark.parametrize("jobs", [1, 2])
def test_places_without_permission_are_named_before_any_work(jobs, tmp_path,
                                                             monkeypatch):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("condgen.files.tempfile.TemporaryFile", deny)
    monkeypatch.setattr(reproduction, "probe", lambda experiment: {})
    path = tmp_path / "r.json"
    with pytest.raises(OSError, match=f"write {path}: Permission denied in folder .*; "
                                      "choose another one"):
        reproduce("caglow/digits", "tiny", runs=tmp_path, results=path, jobs=jobs)
    if jobs > 1:
        lab = Lab(find_experiment("caglow/digits"), "tiny", 0, tmp_path)
        with pytest.raises(OSError, match=f"{tmp_path}: Permission denied in folder"):
            reproduction.add_seeds([lab], None, path, jobs)
    assert not any(tmp_path.iterdir())
