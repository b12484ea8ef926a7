"""The command line as a user meets it: verbs work; mistakes end with a message, exit
code 2 and nothing written.
"""

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

TINY = ["--tier", "tiny"]


def condgen(*arguments, cwd, check=True):
    done = subprocess.run([sys.executable, "-m", "condgen", *map(str, arguments)],
                          cwd=cwd, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a conditional model whose training was stopped, made
    by the command line.
    """
    where = tmp_path_factory.mktemp("cli")
    condgen("train", "caglow-digits", *TINY, "--budget", "1s", cwd=where)
    picture = io.BytesIO()
    Image.new("L", (16, 16)).save(picture, "PNG")
    for name, member in (("dots.zip", "../a.png"), ("bare.zip", "a.png")):
        with zipfile.ZipFile(where / name, "w") as archive:
            archive.writestr(member, picture.getvalue())
    (where / "file").touch()
    (where / "empty.json").write_text("{}")
    return where


def test_list_names_recipes_and_experiments(tmp_path):
    out = condgen("list", cwd=tmp_path).stdout
    assert ("caglow-digits" in out and "caglow/digits" in out
            and "stored here" not in out)


def test_list_names_evaluators_apart_from_generators(capsys):
    from condgen.__main__ import list_

    list_()
    lines = capsys.readouterr().out.splitlines()
    models = lines[lines.index("Models that ship (condgen sample NAME)") + 1]
    assert "caglow-digits" in models and "evaluator" not in models
    assert lines[lines.index("Evaluators that ship (--evaluator NAME)") + 1].split() == [
        "evaluator-digits"]
    assert lines[lines.index("Super-resolution that ships (condgen upscale)") + 1
                 ].split() == ["gated-upscaler"]
    assert any("reading T: the encoder writes the top" in line for line in lines)


@pytest.mark.parametrize("arguments, text", [
    (["caglow-digits", "--help"], "Conditions: digit 0-9, u -1 to 1 (2 numbers)"),
    (["-n", "4", "--help"], "Conditions: with the name of a model before --help"),
    (["nobody", "--help"], "Conditions: with the name of a model before --help")])
def test_help_lists_the_conditions_of_a_model(arguments, text, monkeypatch, capsys):
    from condgen.__main__ import main

    monkeypatch.setattr(sys, "argv", ["condgen", "sample", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr().out
    assert stop.value.code == 0 and text in said
    assert "INTEGER >= 0" in said and str(2**63 - 1) not in said


def test_every_kind_of_condition_is_described():
    from condgen.arguments import condition_text
    from condgen.conditions import Binary, Classes, Code, Real

    kinds = (Classes("digit", 10), Binary("hat"), Real("age", 0, 80), Code("u", 1),
             Code("v", 2, kind="binary"))
    assert [*map(condition_text, kinds)] == [
        "digit 0-9", "hat 0-1", "age 0-80", "u -1 to 1 (1 number)",
        "v 0 or 1 (2 numbers)"]


def test_stopped_run_can_be_sampled_and_evaluated(folder):
    assert "can be resumed" in condgen("train", "caglow-digits", *TINY, "--budget",
                                       "1s", cwd=folder).stdout
    condgen("sample", "caglow-digits", "--digit", 7, "-n", 4, "-o", "out/sevens.png",
            "--temperature", 0.5, cwd=folder)
    assert min(Image.open(folder / "out" / "sevens.png").size) >= 100
    condgen("sample", "caglow-digits", "--digit", "1,2", "--u", "0.5,-1", "-n", 2, "-o",
            "two.png", cwd=folder)
    out = condgen("evaluate", "caglow-digits", "--evaluator", "evaluator-digits",
                  cwd=folder).stdout
    assert ("accuracy" in out and "frechet" in out
            and (folder / "runs" / "caglow-digits" / "metrics.json").exists())


MISTAKES = [
    (["sample", "caglow-digits", "--digit", "12", "-o", "x.png"], "integers 0 to 9"),
    (["sample", "caglow-digits", "--colour", "3", "-o", "x.png"],
     "unknown condition 'colour'"),
    (["sample", "caglow-digits", "--digi", "3", "-o", "x.png"], "did you mean 'digit'"),
    (["sample", "caglow-digits", "--digit", "red", "-o", "x.png"],
     "accepted: a number"),
    (["sample", "caglow-digits", "--digit", "-o", "x.png"], ""),
    (["sample", "caglow-digits", "-n", "0", "-o", "x.png"], "1 to 10000"),
    (["sample", "caglow-digits", "--temperature", "-1", "-o", "x.png"], "temperature"),
    (["sample", "caglow-digits", "--temperature", "nan", "-o", "x.png"],
     "temperature=nan; accepted"),
    (["sample", "caglow-digits", "-o", "x.gif2"], "x.gif2"),
    (["sample", "caglow-digits", "-o", "."],
     "cannot write . as a picture; accepted: .png"),
    (["sample", "caglow-digits", "-o", "file/q.png"],
     "cannot make folder file: File exists; choose another one"),
    (["reproduce", "caglow/digits", "--results", "file/x.json"],
     "cannot make folder file: File exists"),
    (["reproduce", "caglow/digits", "--results", "runs"],
     "cannot write runs: it is a folder"),
    (["cufed5", "nowhere"], "does not exist; accepted: a folder or a zip"),
    (["cufed5", "."], "no image with a reference; accepted"),
    (["benchmark", "--tier", "tiny", "-o", "runs"],
     "cannot write runs: it is a folder"),
    (["benchmark", "-o", "file/b.json"], "cannot make folder file: File exists"),
    (["probe", "caglow/digits", "--record", "why", "--results", "/dev/null"],
     "cannot write /dev/null: it is a device"),
    (["sample", "caglow-digits", "-o", f"{'a' * 300}/x.png"], "File name too long"),
    (["sample", "caglow-digits", "-o", ""], "'' is empty; accepted: a path"),
    (["reproduce", "caglow/digits", "--runs", "file"], "cannot make folder file"),
    (["data", "prepare", "lfw", "--from", ".", "--out", "file"],
     "cannot make folder file"),
    (["reproduce", "caglow/digits", "--results", "empty.json"],
     "empty.json is not a result: it lacks experiment, tier"),
    (["probe", "caglow/digits", "--results", "empty.json"],
     "empty.json is not a result: it lacks experiment, tier"),
    (["reproduce", "caglow/digits", "--seed", str(2**63 - 1), "--seeds", "2"],
     f"accepted: 0 to {2**63 - 1}"),
    (["evaluate", "caglow-digits", "--evaluator", "evaluator-digits", "--data", ""],
     "no data set ''; accepted: digits"),
    (["train", "glow-celeba"], "a set that `condgen data prepare NAME"),
    (["train", "GLOW-digits"], "did you mean 'glow-digits'"),
    (["train", "glow-digits", "--tier", "TINY"], "did you mean 'tiny'"),
    (["sample", "caglow-digits", "--DIGIT", "7"], "did you mean 'digit'"),
    (["sample", "caglow-digits", "--n", "4"], "for the option -n write -n"),
    (["sample", "caglow-digits", "--Seed", "4"], "for the option --seed write --seed"),
    (["sample", "caglow-digits", "--digit=", "7"], "accepted: a number"),
    (["sample", "caglow-digits", "-d", "7"], "conditions are given as --name value"),
    (["evaluate", "caglow-digits"], "Missing option '--evaluator'"),
    (["sample", "caglow-digts", "-o", "x.png"], "did you mean 'caglow-digits'"),
    (["train", "caglow-digts"], "did you mean 'caglow-digits'"),
    (["train", "glow-digits", "--tier", "huge"], "accepted: tiny, cpu"),
    (["train", "glow-digits", "--tier", "tiny", "--budget", "soon"], "90s"),
    (["train", "glow-digits", "--tier", "tiny", "--precision", "fp7"], "bf16"),
    (["reproduce", "caglow/digts"], "did you mean 'caglow/digits'"),
    (["evaluate", "caglow-digits", "--evaluator", "nobody"], "no model 'nobody'"),
    (["sample", "caglow-digits", "--colour", "red", "-o", "x.png"],
     "unknown condition 'colour'; accepted: digit, u"),
    (["sample", "caglow-digits", "--digit", "1", "--digit", "2", "-o", "x.png"],
     "given twice"),
    (["sample", "caglow-digits", "--self", "1", "-o", "x.png"],
     "unknown condition 'self'"),
    (["sample", "caglow-digits", "--generator", "1", "-o", "x.png"],
     "unknown condition 'generator'"),
    (["sample", "caglow-digits", "-n", "99999999999", "-o", "x.png"], "1 to 10000"),
    (["sample", "caglow-digits", "--seed", "-1", "-o", "x.png"], "--seed"),
    (["sample", "evaluator-digits", "-o", "x.png"],
     "Evaluator has no sample"),
    (["sample", "nobody", "-o", "x.png"],
     "no run folder, and none of that name in runs/ or in the package"),
    (["evaluate", "caglow-digits", "--evaluator", "caglow-digits"],
     "CAGlow has no logits"),
    (["evaluate", "caglow-digits", "--evaluator", "evaluator-digits", "--data",
      "dots.zip"], "a name with .."),
    (["evaluate", "caglow-digits", "--evaluator", "evaluator-digits", "--data",
      "bare.zip"], "labelled with []"),
    (["evaluate", "caglow-digits", "--evaluator", "evaluator-digits", "--data",
      "celeba"], "there is no folder nowhere"),
    (["train", "glow-digits", "--tier", "tiny", "--save-every", "often"], "90s"),
    (["train", "glow-digits", "--tier", "tiny", "--out", "file/run"],
     "cannot make folder file/run"),
    (["evaluate", "caglow-digits", "--evaluator", "evaluator-digits", "--data",
      "digitz"], "did you mean 'digits'"),
    (["data", "prepare", "celebb", "--from", "."], "did you mean 'celeba'"),
    (["data", "prepare", "celeba", "--from", "nowhere"], "nowhere"),
    (["tarin"], "tarin"),
]


def called(arguments, monkeypatch, capsys, cwd):
    """As `condgen` in a process of its own, but faster: exit code and what it said
    on the error channel.
    """
    from condgen.__main__ import main

    monkeypatch.chdir(cwd)
    monkeypatch.setenv("CONDGEN_DATA", "nowhere")
    monkeypatch.setattr(sys, "argv", ["condgen", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", MISTAKES,
                         ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_are_explained_and_write_nothing(folder, arguments, message,
                                                  monkeypatch, capsys):
    before = sorted(folder.rglob("*"))
    code, said = called(arguments, monkeypatch, capsys, folder)
    assert code == 2 and message in said and "Traceback" not in said
    lines = [line for line in said.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert sorted(folder.rglob("*")) == before


def test_damaged_weights_are_named_and_a_pickle_is_not_read(tmp_path, monkeypatch,
                                                            capsys):
    import shutil

    from condgen.runs import pretrained_models

    run = shutil.copytree(pretrained_models()["evaluator-digits"],
                          tmp_path / "runs" / "evaluator")
    weights = run / "model.safetensors"
    raw = weights.read_bytes()
    for bad in (
        raw[: len(raw) // 2],
        raw[:-1] + bytes([raw[-1] ^ 1]),
        b"\x80\x04\x95cos\nsystem\n(S'touch owned'\ntR.",
        b"",
    ):
        weights.write_bytes(bad)
        code, said = called(["evaluate", "evaluator", "--evaluator", "evaluator"],
                            monkeypatch, capsys, tmp_path)
        assert code == 2 and "model.safetensors" in said
    assert not (tmp_path / "owned").exists()


def test_shipped_models_are_used_read_only_from_any_folder(tmp_path):
    from condgen.runs import pretrained_models

    condgen("sample", "caglow-digits", "--digit", 7, "-n", 16, "-o", "sevens.png",
            cwd=tmp_path)
    assert min(Image.open(tmp_path / "sevens.png").size) >= 250
    assert "accuracy" in condgen("evaluate", "cglow-digits", "--evaluator",
                                 "evaluator-digits", cwd=tmp_path).stdout
    assert not (pretrained_models()["cglow-digits"] / "metrics.json").exists()


def test_data_list_prints_available_data_sets(tmp_path, monkeypatch, capsys):
    from condgen.__main__ import data_list

    monkeypatch.setenv("CONDGEN_DATA", str(tmp_path))
    data_list()
    assert "digits" in capsys.readouterr().out


def test_a_set_without_test_images_is_refused(tmp_path, monkeypatch, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for k in range(2):
        Image.new("L", (16, 16), 100 * k).save(few / f"{k}.png")
    (few / "labels.csv").write_text("file,digit\n0.png,9\n1.png,6\n")
    code, said = called(["evaluate", "caglow-digits", "--evaluator", "evaluator-digits",
                         "--data", "few"], monkeypatch, capsys, tmp_path)
    assert (code and "the part test of few has 0 images; accepted: 2 or more"
            in " ".join(said.split()))


@pytest.mark.parametrize("name", ["faces", "portraits"])
def test_faces_that_do_not_fit_are_not_drawn(name, tmp_path, monkeypatch, capsys):
    from condgen import data

    draw = data.render_bytes
    monkeypatch.setattr(data, "render_bytes", lambda factors, size: draw(
        factors, size) if len(factors) == 1 else pytest.fail("thousands are drawn"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, said = called(["evaluate", "cglow-digits", "--evaluator", "evaluator-digits",
                         "--data", name], monkeypatch, capsys, tmp_path)
    assert code == 2 and "accepted: images (1, 16, 16)" in said


@pytest.mark.parametrize("command", [
    ["sample", "caglow-digits", "-o", "x.jpeg.txt"],
    ["sample", "caglow-digits", "-o", "file/x.png"],
    ["train", "glow-digits", "--tier", "tiny", "--out", "file"],
    ["reproduce", "caglow/digits", "--results", "file/r.json"],
    ["probe", "caglow/digits", "--record", "why", "--results", "file/r.json"],
    ["benchmark", "-o", "file/b.json"],
    ["data", "prepare", "lfw", "--from", ".", "--out", "file"],
], ids=lambda command: command[0])
@pytest.mark.parametrize("denied", [False, True], ids=["a file", "no permission"])
def test_a_bad_place_is_found_before_any_work(command, denied, tmp_path, monkeypatch,
                                              capsys):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    place = tmp_path / "file"
    if denied:
        place.mkdir()
        monkeypatch.setattr("condgen.files.tempfile.TemporaryFile", deny)
    else:
        place.touch()
    for work in ("runs.load", "recipes.prepare", "reproduction.reproduce",
                 "reproduction.record_probe", "experiments.speed.benchmark",
                 "downloads.prepare"):
        monkeypatch.setattr(f"condgen.{work}", lambda *a, **k: pytest.fail("work"))
    code, said = called(command, monkeypatch, capsys, tmp_path)
    assert code == 2 and said.startswith("error: cannot")
    reason = "Permission denied in folder file; choose another one" if denied else ""
    assert reason in said or "as a picture" in said
    assert [p.name for p in tmp_path.rglob("*")] == ["file"]


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_launcher_variable_without_a_number_is_named(name, tmp_path, monkeypatch,
                                                       capsys):
    monkeypatch.setenv(name, "x")
    code, said = called(["train", "glow-digits", *TINY], monkeypatch, capsys, tmp_path)
    assert code == 2 and said.startswith(f"error: environment variable {name}='x'; ")
    assert said.count("\n") == 1 and not any(tmp_path.iterdir())


def test_samples_that_are_no_numbers_are_counted(tmp_path, monkeypatch, capsys):
    import torch

    samples = torch.ones(8, 1, 16, 16)
    samples[2, 0, 3, 3], samples[5, 0, :2] = torch.nan, torch.inf
    monkeypatch.setattr("condgen.evaluation.generate", lambda *a, **k: samples)
    code, said = called(["sample", "caglow-digits", "-n", "8", "-o", "x.png"],
                        monkeypatch, capsys, tmp_path)
    assert code == 2 and said.startswith("error: 2 of 8 images have values that are ")
    assert not any(tmp_path.iterdir())


def test_evaluate_checks_its_place_before_any_work(tmp_path, monkeypatch, capsys):
    import shutil

    from condgen.runs import pretrained_models

    shutil.copytree(pretrained_models()["cglow-digits"], tmp_path / "run")
    (tmp_path / "run" / "metrics.json").mkdir()
    monkeypatch.setattr("condgen.data.load", lambda *a: pytest.fail("work"))
    code, said = called(["evaluate", "run", "--evaluator", "evaluator-digits"],
                        monkeypatch, capsys, tmp_path)
    assert (code, said) == (2, "error: cannot write run/metrics.json: it is a folder; "
                               "choose another one\n")


def test_budget_ends_reproduce_like_train(tmp_path, monkeypatch, capsys):
    from condgen.lab import OutOfTime

    def late(*arguments, **options):
        raise OutOfTime("time is up: the same command goes on from there")

    monkeypatch.setattr("condgen.reproduction.probe", late)
    for line in (["train", "glow-digits", *TINY, "--budget", "0"],
                 ["reproduce", "caglow/digits", *TINY, "--budget", "0"]):
        code, said = called(line, monkeypatch, capsys, tmp_path)
        assert code == 0 and "error" not in said


def test_any_file_name_can_be_printed(tmp_path):
    import os

    name = os.fsdecode(b"q\xff.png")
    done = subprocess.run([sys.executable, "-m", "condgen", "sample", "caglow-digits",
                           "-n", "1", "-o", name], cwd=tmp_path, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0 and done.stdout.startswith(b"1 images in q")
    assert done.stderr == b"" and os.listdir(os.fsencode(tmp_path)) == [b"q\xff.png"]


@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["data", "list"]])
def test_a_closed_pipe_ends_quietly_with_141(arguments, tmp_path):
    import os

    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-m", "condgen", *arguments], cwd=tmp_path,
                          stdout=writes, stderr=subprocess.PIPE)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


def test_evaluators_are_given_by_name_or_folder():
    import condgen as cg
    from condgen.runs import pretrained_models

    model, data = cg.load("cglow-digits"), cg.data.digits(16)
    kinds = ("evaluator-digits", pretrained_models()["evaluator-digits"],
             cg.load("evaluator-digits"))
    found = [cg.evaluate(model, kind, data, n=360) for kind in kinds]
    assert found[0] == found[1] == found[2]
    with pytest.raises(FileNotFoundError, match="did you mean 'evaluator-digits'"):
        cg.evaluate(model, "evaluator-digit", data)
    for wrong, said in (((model, kinds[0], "digits"), "data given as str; accepted"),
                        ((kinds[2], kinds[2], data), "model given as Evaluator; acc")):
        with pytest.raises(ValueError, match=said):
            cg.evaluate(*wrong)


def test_claims_are_found_by_paper_and_by_id(monkeypatch, capsys):
    root = Path(__file__).parents[1]
    for name in ("CAGLOW-11", "caglow-11", "CAGLOW"):
        assert called(["claims", name], monkeypatch, capsys, root) == (0, "")
    code, said = called(["claims", "caglo"], monkeypatch, capsys, root)
    assert code == 2 and "did you mean 'CAGlow'" in said
