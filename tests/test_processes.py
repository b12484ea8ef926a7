"""Several processes do what one does: law 9 for every recipe, and the command line
under the real launchers.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from condgen.data import digits
from condgen.distributed import check_same_folder, distributed_map, make_accelerator
from condgen.experiments.digits import augmented_digits
from condgen.files import digest, read_log, read_tensors
from condgen.recipes import declared, find, train
from condgen.runs import saved_states
from condgen.trainer import Trainer
from condgen.training import set_condition_rows

ROUNDS = 20
FLOWS = ("glow-digits", "cglow-digits")
ALIKE = ("caglow-digits-binary",)  # the players of caglow-digits; one round is enough
# no MNIST in the package; 24,000 faces are not drawn at once
OFFLINE = [name for name in declared("RECIPES") if "digits" in name]
pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.distributed.is_available()
         and torch.distributed.is_gloo_available()), reason="needs gloo and fork",
)


def begin():
    """The accelerator of this process on the CPU, as if nothing had
    been launched before.
    """
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    return make_accelerator("no")


@pytest.fixture(autouse=True)
def clean():
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def in_two(job, folder):
    """`job(folder, accelerator)` here and in two processes; what each returned:
    alone, main process, the other.
    """
    from accelerate import debug_launcher

    returning(job, str(folder))
    debug_launcher(returning, (job, str(folder)), num_processes=2)
    return [json.loads((Path(folder) / f"{name}.json").read_text())
            for name in ("1-0", "2-0", "2-1")]


def returning(job, folder):
    accelerator = begin()
    found = job(Path(folder), accelerator)
    (Path(folder, f"{accelerator.num_processes}-{accelerator.process_index}.json")
     .write_text(json.dumps(found)))


# Law 9


class Few:
    """The first 320 digits of each part."""

    def __init__(self):
        self.whole = digits()
        self.name, self.sha256 = "few", "0" * 64
        self.shape, self.conditions = self.whole.shape, self.whole.conditions

    def table(self, split):
        return {name: t[:320] for name, t in self.whole.table(split).items()}


def separate(model):
    """Nothing looks at a whole batch or draws for itself any more;
    returns how to undo this.
    """
    drops = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    matching = getattr(model, "matching", None)
    for m, _ in drops:
        m.p = 0.0
    model.matching = "pair"

    def undo():
        for m, p in drops:
            m.p = p
        model.matching = matching

    return undo


def play(trainer, count):
    """Losses of so many rounds, over all processes."""
    rows, batch, losses = trainer.rows(trainer.stage.batch), trainer.stage.batch, []
    for _ in range(count):
        values = {k: v for k, v in trainer.round().items() if not k.endswith(".norm")}
        t = (torch.stack([v.double() for v in values.values()])
             * (rows.stop - rows.start) / batch)
        if trainer.accelerator.num_processes > 1:
            torch.distributed.all_reduce(t)
        losses.append(dict(zip(values, t.tolist())))
    return losses


def first_rounds(folder, accelerator):
    """By recipe: hashes of all values after the start and at the end, and losses.

    What a whole batch decides (batch norm, class means) and dropout differ between
    processes; they are played last.
    """
    found, data = {}, Few()
    for name in OFFLINE:
        # a careless caller: processes start with unequal weights
        torch.manual_seed(accelerator.process_index)
        model, strict, mixed, start = find(name).build(data, "tiny"), [], [], ""
        norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm)
                   for m in model.modules())
        model = model if name in FLOWS or norm else model.double()
        set_condition_rows(model, data)
        trainer, stages = Trainer(model, data, 0, accelerator), model.stages()
        for index, stage in enumerate(stages):
            stage.bf16 = False
            trainer.enter(stage, index)
            start = start or digest(model.state_dict())
            if not norm:
                undo = separate(model)
                strict += play(
                    trainer, ROUNDS if stage is stages[-1] and name not in ALIKE else 1)
                undo()
            mixed += play(trainer, 2)
            trainer.finish()
        found[name] = {"start": start, "end": digest(model.state_dict()),
                       "strict": strict, "mixed": mixed}
    return found


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    return in_two(first_rounds, tmp_path_factory.mktemp("rounds"))


@pytest.mark.parametrize("name", OFFLINE)
def test_law_9_two_processes_have_the_losses_of_one(rounds, name):
    one, main, other = (found[name] for found in rounds)
    close = {"rel": 1e-5} if name in FLOWS else {"abs": 1e-6, "rel": 0}
    assert main == other and len(main["strict"]) == len(one["strict"])
    for alone, shared in zip(one["strict"], main["strict"]):
        assert shared == pytest.approx(alone, **close)
    assert all(math.isfinite(value) for row in main["mixed"] for value in row.values())


@pytest.mark.parametrize("name", OFFLINE)
def test_data_dependent_initialisation_equals_one_process(rounds, name):
    """ActNorm and whatever else starts from a batch: bit for bit, though the
    processes began with unequal weights.
    """
    one, main, other = (found[name]["start"] for found in rounds)
    assert one == main == other


def talk(folder, accelerator):
    """What processes hear of each other's blocks, failures and folders."""

    def heard(call):
        try:
            return call()
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            return str(error)

    me = accelerator.process_index
    return {
        "blocks": [distributed_map(lambda i: [i, me], n) for n in (5, 1, 0)],
        "failure": heard(lambda: distributed_map(lambda i: 1 / (i - 1), 2)),
        "folder": heard(lambda: check_same_folder(Path("run"), 64 * me, accelerator))}


def test_blocks_are_distributed_and_failures_reach_all(tmp_path):
    one, main, other = in_two(talk, tmp_path)
    owners = [[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]
    assert (main["blocks"] == other["blocks"] == [owners, owners[:1], []]
            and len(one["blocks"][0]) == 5)
    assert (one["failure"], main["failure"]) == ("division by zero",
                                                 "process 1: division by zero")
    assert (one["folder"] is None
            and "states in run, of 0, 64 images" in main["folder"] == other["folder"])


# The command line

ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
              "--num_processes", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", "2"]
TRAIN = ["train", "glow-digits", "--tier", "tiny"]


def launch(launcher, *arguments, cwd):
    """A launcher on a machine without GPUs, with `condgen ARGUMENTS`."""
    ours = ("ACCELERATE", "MASTER", "RANK", "WORLD")
    env = ({k: v for k, v in os.environ.items() if not k.startswith(ours)}
           | {"CUDA_VISIBLE_DEVICES": ""})
    command = [*launcher, "-m", "condgen", *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def alone(monkeypatch, capfd, cwd, *arguments):
    """The same in this process: exit code and what it said."""
    from condgen.__main__ import main

    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["condgen", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capfd.readouterr()


def train_glow(folder, accelerator):
    run = folder / f"run{accelerator.num_processes}"
    return train("glow-digits", run, "tiny",
                 save_every=0.0 if folder.name == "killed" else 60.0,
                 progress=False).images


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training of two processes that were killed after a few rounds, ended by
    `accelerate launch`: folder, words.
    """
    from accelerate import debug_launcher

    folder = tmp_path_factory.mktemp("trained")
    (folder / "killed").mkdir()
    augmented_digits("tiny")  # read once, before the processes part
    number = os.fork()
    if not number:
        debug_launcher(returning, (train_glow, str(folder / "killed")), num_processes=2)
        os._exit(0)
    end = time.monotonic() + 240
    while not any(int(p.name) >= 192
                  for p in (folder / "killed" / "run2" / "state").glob("[0-9]*")):
        assert os.waitpid(number, os.WNOHANG) == (0, 0) and time.monotonic() < end
        time.sleep(0.02)
    for process in [*psutil.Process(number).children(), psutil.Process(number)]:
        process.kill()
    os.waitpid(number, 0)
    (folder / "killed" / "run2").rename(folder / "run")
    assert not (folder / "run" / "model.safetensors").exists(), "it was over before"
    process = launch(ACCELERATE, *TRAIN, "-o", "run", cwd=folder)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    return folder, said


def test_launched_training_after_a_kill_equals_one_process(trained, tmp_path):
    """Bit for bit that of two processes without a break; by law 9 that of one; every
    file and line written once.
    """
    folder, said = trained
    in_two(train_glow, tmp_path)
    assert said.count("Run(Glow") == 1
    tensors = [read_tensors(run / "model.safetensors")[0]
               for run in (folder / "run", tmp_path / "run2")]
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())
    logs = [read_log(run / "log.jsonl")
            for run in (folder / "run", tmp_path / "run2", tmp_path / "run1")]
    for row in (row for log in logs for row in log):
        row.pop("seconds")
    assert (logs[0] == logs[1] and [row["images"] for row in logs[0]]
            == [row["images"] for row in logs[2]])
    losses = [[row["flow.bpd"] for row in log if "flow.bpd" in row][:ROUNDS]
              for log in logs]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    names = [sorted(p.name for p in run.iterdir())
             for run in (folder / "run", tmp_path / "run1")]
    assert names[0] == names[1] == ["card.json", "log.jsonl", "model.safetensors",
                                    "state"]
    assert [p.name for p in saved_states(folder / "run" / "state")][0] == "000000006400"
    assert json.loads(
        (folder / "run" / "card.json").read_text())["training"]["processes"] == 2


def test_launched_sampling_gives_the_same_picture(trained, monkeypatch, capfd):
    folder, _ = trained
    arguments = ["sample", "cglow-digits", "-n", 450, "--digit", 3, "-o"]
    process = launch(TORCHRUN, *arguments, "two.png", cwd=folder)
    said, _ = process.communicate()
    assert process.returncode == 0 and said == "450 images in two.png\n"
    assert alone(monkeypatch, capfd, folder, *arguments, "one.png")[0] == 0
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()


def test_launched_evaluation_gives_the_same_numbers(trained, monkeypatch, capfd):
    folder, _ = trained
    arguments = ["evaluate", "run", "--evaluator", "evaluator-digits"]
    process = launch(TORCHRUN, *arguments, cwd=folder)
    said, _ = process.communicate()
    rows = json.loads((folder / "run" / "metrics.json").read_text())["rows"]
    code, (out, _) = alone(monkeypatch, capfd, folder, *arguments)
    assert process.returncode == code == 0 and said == out
    assert {row["metric"] for row in rows} >= {"bpd", "frechet"}
    for row, same in zip(
            rows, json.loads((folder / "run" / "metrics.json").read_text())["rows"],
            strict=True):
        assert (row["metric"] == same["metric"]
                and row["value"] == pytest.approx(same["value"], rel=1e-5))


def test_other_processes_report_failures_after_a_delay(tmp_path, monkeypatch, capfd):
    from condgen import __main__ as cli

    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    assert alone(monkeypatch, capfd, tmp_path, "list") == (0, ("", "")) and not waited
    code, (out, error) = alone(monkeypatch, capfd, tmp_path, "sample", "nobody")
    assert ((code, out) == (2, "") and "no model 'nobody'" in error
            and waited == [cli.FAILURE_WAIT_SECONDS])


def test_single_process_is_refused_if_several_were_requested(tmp_path, monkeypatch,
                                                             capfd):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # as accelerate launch leaves it
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for arguments in (["train", "glow-digits", "--tier", "tiny"],
                      ["sample", "cglow-digits"]):
        code, (_, error) = alone(monkeypatch, capfd, tmp_path, *arguments)
        assert code == 2 and "was asked for several processes and started one" in error
    assert not any(tmp_path.iterdir())


def test_commands_for_one_process_are_refused_in_several(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (["reproduce", "caglow/digits"],
                      ["data", "prepare", "celeba", "--from", "."]):
        code, (_, error) = alone(monkeypatch, capfd, tmp_path, *arguments)
        assert code == 2 and "in 2 processes; accepted: one" in error
