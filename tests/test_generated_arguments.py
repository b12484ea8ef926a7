"""Random arguments of all commands: the promised output, or exit code 2 with one
`error:` line and nothing written.

CONDGEN_GENERATED=2000 runs so many examples and prints a count of what they gave.
"""

import io
import os
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from condgen.__main__ import app
from condgen.lab import OutOfTime

EXAMPLES = int(os.environ.get("CONDGEN_GENERATED", 0))
COUNTS, SLOWEST = Counter(), [0.0, []]

PLACES = [".", "folder", "/dev/null", "/dev/full", "/proc/x.png", "/proc/x", "file",
          "file/x.png", "a" * 300, "a" * 253 + ".png", "b/" * 40 + "x.png",
          "c/" + "a" * 300 + "/x.png", "missing/deep/x.png", "dangling",
          "dangling/x.png", "loop", "fifo", "x.png", "x.JPG", "x.gif", "x.webp/",
          ".png", "empty.json",
          "list.json", "bare.zip", "old.png", "lfw", "~", "-", "x\n.png", "q\udcff.png"]
NUMBERS = ["0", "-1", "1", "2", "1e999", "nan", "-inf", "9" * 30, "1.5", "1_0", "0x10",
           "١٢", "1,2", "0.5,-1", ",", "1,", "1e3", str(2**63 - 1), str(2**63)]
WORDS = ["", " ", "--", "-", "--help", "-o", "-x", "tiny", "TINY", "cpu", "bf16", "no",
         "1s", "0s", "9h", "soon", "digit", "caglow-digits", "CAGLOW-DIGITS",
         "glow-digits", "glow-celeba", "evaluator-digits", "caglow/digits", "digits",
         "lfw", "%s", "{}", "\x1b[31m", "🙂", "\u202e", "a\nb", "[/red]"]
UNKNOWN = ["--n", "--DIGIT", "--digi", "--self", "--seed-", "--Seed", "-N", "--=", "--",
           "-d7", "--u", "--no-seed", "---"]

bytes_ = st.binary(max_size=20).map(lambda b: os.fsdecode(b.replace(b"\0", b"0")))
VALUES = (st.sampled_from(PLACES) | st.sampled_from(NUMBERS) | st.sampled_from(WORDS)
          | st.text(st.characters(exclude_characters="\0/", codec="utf-8"), max_size=20)
          | bytes_.map(lambda text: text.replace("/", "_")))

PATH_OPTIONS = {"-o", "--out", "--results", "--runs", "--from", "--data"}
WORD_OPTIONS = {"--tier", "--precision", "--evaluator", "--record"}
SEEDS = {"--seed": "0"}


def values(option):
    """Values of an option: half of them of its kind, and any."""
    kind = (PLACES if option in PATH_OPTIONS else WORDS if option in WORD_OPTIONS
            else NUMBERS)
    return st.sampled_from(kind) | VALUES


COMMANDS = {  # arguments and options, each with a value that works
    ("list",): ([], {}),
    ("data", "list"): ([], {}),
    ("data", "prepare"): (["lfw"], {"--from": "lfw", "--out": "set", "--size": "8"}),
    ("train",): (["glow-digits"], {
        "--tier": "tiny", "--budget": "0s", "--out": "run", "--precision": "no",
        "--save-every": "9s", **SEEDS}),
    ("sample",): (["caglow-digits"], {
        "-n": "2", "-o": "x.png", "--temperature": "0.5", "--digit": "7", "--u": "0,1",
        **SEEDS}),
    ("evaluate",): (["caglow-digits"], {
        "--evaluator": "evaluator-digits", "--data": "digits", "--temperature": "1",
        **SEEDS}),
    ("reproduce",): (["caglow/digits"], {
        "--tier": "tiny", "--seeds": "1", "--budget": "1s", "--runs": "runs",
        "--results": "r.json", **SEEDS}),
    ("probe",): (["caglow/digits"], {"--tier": "tiny", "--record": "why",
                                     "--results": "empty.json"}),
    ("benchmark",): ([], {"--tier": "tiny", "-o": "b.json"}),
}


@st.composite
def command_lines(draw):
    """A command whose arguments are right but for one to three of them."""
    name = draw(st.sampled_from([*COMMANDS, *[("sample",), ("train",)] * 2]))
    arguments, options = COMMANDS[name][0][:], dict(COMMANDS[name][1])
    more = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        kind = draw(st.sampled_from([*["value"] * 7, "argument", "option", "extra",
                                     "left out", "left out"]))
        if kind == "value" and options:
            option = draw(st.sampled_from(sorted(options)))
            options[option] = draw(values(option))
        elif kind == "argument" and arguments:
            arguments[0] = draw(VALUES)
        elif kind == "left out":
            options.pop(draw(st.sampled_from(["--budget", *sorted(options)])), None)
        elif kind == "extra":
            more.append(draw(VALUES))
        else:
            more += [draw(st.sampled_from(UNKNOWN)), draw(VALUES)]
    line = [*name, *arguments]
    for option, value in options.items():
        both = option.startswith("--") and draw(st.booleans())
        line += [f"{option}={value}"] if both else [option, value]
    return line + more


def stop(*arguments, **options):
    """In the place of what takes long."""
    raise OutOfTime("time is up")


def furnish():
    """Files and other things in the current folder."""
    Path("file").write_text("text")
    Path("empty.json").write_text("{}")
    Path("list.json").write_text("[]")
    for name in ("folder", "lfw/Ann"):
        Path(name).mkdir(parents=True)
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    os.mkfifo("fifo")
    stream = io.BytesIO()
    Image.new("L", (16, 16)).save(stream, "JPEG")
    for name in ("lfw/Ann/Ann_0001.jpg", "old.png"):
        Path(name).write_bytes(stream.getvalue())
    with zipfile.ZipFile("bare.zip", "w") as archive:
        archive.writestr("a.jpg", stream.getvalue())


def tree():
    """All names below the current folder, with sizes and times of files."""
    found = {}
    for path in Path().rglob("*"):
        about = path.lstat()
        found[path] = (about.st_mode, *((about.st_size, about.st_mtime_ns)
                                        if path.is_file() else ()))
    return found


def promised(line, said):
    """Whether a command that exits with 0 has made what it says."""
    if "Usage" in said:
        return True
    if line[0] == "train":
        run = Path(said.rpartition("folder=")[2].rstrip().rstrip(")").strip("'\""))
        return "\\" in said or (run / "card.json").is_file()
    if line[0] == "sample":
        name = said.partition(" images in ")[2].removesuffix("\n")
        return ("\\" in said or Image.open(name).size[0] > 0)
    if line[:2] == ["data", "prepare"]:
        return "\\" in said or any(Path(said.strip()).glob("*.zip"))
    return bool(said.strip())


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """Long work is left out; everything before it is real."""
    from condgen.data import digits

    with (patch("condgen.training.train_stages", lambda *a, **more: False),
          patch("condgen.evaluation.evaluate", stop),
          patch("condgen.reproduction.probe", stop),
          patch("condgen.experiments.speed.time_models", stop),
          patch("condgen.data.DATASETS", {"digits": digits})):
        yield
    if EXAMPLES:
        print(COUNTS, SLOWEST)


@settings(max_examples=EXAMPLES or 40, deadline=None, derandomize=not EXAMPLES,
          database=None, suppress_health_check=list(HealthCheck))
@given(line=command_lines())
def test_random_arguments_work_or_are_refused(line):
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            furnish()
            before, begun = tree(), time.monotonic()
            done = CliRunner().invoke(app, line, prog_name="condgen",
                                      env={"CONDGEN_DATA": "prepared"})
            spent = time.monotonic() - begun
            if spent > SLOWEST[0]:
                SLOWEST[:] = spent, line
            COUNTS[line[0], done.exit_code] += 1
            assert type(done.exception) in (type(None), SystemExit), done.exception
            if done.exit_code:
                errors = [t for t in done.stderr.splitlines() if "error:" in t]
                assert (done.exit_code, len(errors)) == (2, 1), done.stderr
                assert errors[0].startswith("error: ") and len(errors[0]) > 12
                assert "Traceback" not in done.output and tree() == before
            else:
                assert promised(line, done.stdout), done.output
            assert Path("/dev/null").is_char_device()
        finally:
            os.chdir(home)
