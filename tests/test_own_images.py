"""Someone else's images: names, parts, plans, the clock, training, evaluation, and
the how-to of README.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from zips import drawn

import condgen as cg
from condgen import families, folders, own_images, pace
from condgen.conditions import Binary, Classes, Real, Schema
from condgen.contracts import Stage
from condgen.data import Dataset, folder
from condgen.evaluation import evaluate, generate
from condgen.explore import ConditionControls, describe_value
from condgen.pace import MIN_ROUNDS, Pacer, StagePlan
from condgen.splits import SPLITS, measured_classes, natural_sort, stratified_splits

ROOT = Path(__file__).resolve().parents[1]
ANIMALS = Classes("label", 3, ("cat", "dog", "ship"))


@pytest.fixture(scope="module")
def zipped(tmp_path_factory) -> Path:
    """Three classes, one of them with a single image."""
    where = tmp_path_factory.mktemp("own")
    return drawn(where / "images.zip", {"s10": 40, "s2": 40, "s1": 1})


@pytest.fixture(scope="module")
def run(zipped) -> tuple[Path, str, float]:
    """A finished run with a budget, what was said, and the budget."""
    said: list[str] = []
    out, budget = zipped.parent / "run", 25.0
    options = {"model": "vae", "out": out, "size": 16, "progress": False,
               "say": lambda line: said.append(str(line))}
    try:
        cg.train_images(zipped, budget=budget, **options)
    except ValueError as error:  # a busy machine: it says how long it would take
        budget = 2.0 * int(re.search(r"accepted: (\d+) s or more", str(error))[1])
        cg.train_images(zipped, budget=budget, **options)
    return out, "\n".join(said), budget


# names --------------------------------------------------------------------------------


def test_names_are_sorted_as_a_person_would():
    assert natural_sort(["s10", "s2", "s1", "s2"]) == ("s1", "s2", "s10")
    assert sorted(["s10", "s2"]) != ["s2", "s10"]  # what it is for


@pytest.mark.parametrize("value, number", [
    ("dog", 1), (1, 1), (["ship", "ship"], 2), (("dog", 1), 1)])
def test_a_name_stands_for_its_number(value, number):
    assert ANIMALS.pack(value, 2).argmax(1).tolist() == [number] * 2


def test_names_are_kept_in_json_where_there_are_some():
    schema = Schema([ANIMALS, Classes("digit", 10), Real("age", 0, 1)])
    back = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    assert back == schema and back[0].values == ("cat", "dog", "ship")
    assert schema.to_json()[1] == {"type": "Classes", "name": "digit", "n": 10}
    assert repr(Classes("digit", 10)) == "Classes(name='digit', n=10)"


@pytest.mark.parametrize("values", [
    ("cat", "dog"), ("cat", "cat", "dog"), ("cat", "dog", ""), ("a", "b", 3), "abc"])
def test_names_that_do_not_fit_are_refused(values):
    with pytest.raises(ValueError, match="label: class names.*3 different texts"):
        Classes("label", 3, values)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match="label='catt'.*did you mean 'cat'"):
        ANIMALS.pack("catt", 1)
    with pytest.raises(ValueError, match="cat, dog, ship"):
        ANIMALS.pack(5, 1)
    with pytest.raises(ValueError, match="integers 0 to 9"):
        Classes("digit", 10).pack("seven", 1)


def test_options_take_names_and_numbers():
    from condgen.arguments import condition_text, parse_conditions

    schema = Schema([ANIMALS, Binary("hat")])
    assert parse_conditions(["--label", "cat", "--hat", "1"], schema) == {
        "label": "cat", "hat": 1}
    assert parse_conditions(["--label", "cat,ship"], schema) == {"label": [0, 2]}
    assert parse_conditions(["--label=2"], schema) == {"label": 2}
    with pytest.raises(ValueError, match="did you mean 'cat'"):
        parse_conditions(["--label", "catt"], schema)
    assert condition_text(ANIMALS) == "label cat, dog, ship"
    people = Classes("person", 40, tuple(f"s{i + 1}" for i in range(40)))
    assert condition_text(people) == "person s1, s2, s3, s4, s5, …, s40"


def test_explorers_show_names():
    controls = ConditionControls(Schema([ANIMALS]))
    assert [name for name, _ in controls.controls["label"][0].options] == [
        "cat", "dog", "ship"]
    assert controls.values == {"label": 0}
    assert describe_value(ANIMALS, 2) == "label ship"


def test_a_table_gives_names_in_natural_order(zipped):
    data = folder(zipped, size=16)
    assert data.conditions == Schema([Classes("label", 3, ("s1", "s2", "s10"))])
    truth = data.conditions.unpack(data.labels)["label"]
    assert truth[:40].tolist() == [2] * 40 and data.values["label"][2] == "s10"
    given = folder(zipped, size=16, conditions=Classes("label", 4, (
        "s10", "s2", "s1", "s0")))
    assert given.conditions.unpack(given.labels)["label"][0] == 0
    with pytest.raises(ValueError, match="s10/0.png.*label='s10'.*s1, s2, s11"):
        folder(zipped, size=16, conditions=Classes("label", 3, ("s1", "s2", "s11")))


# parts --------------------------------------------------------------------------------


def test_every_class_of_three_is_in_all_parts():
    keys = [f"{k}/{i}" for k in range(40) for i in range(k % 12 + 1)]
    classes = [key.split("/")[0] for key in keys]
    parts = stratified_splits(keys, classes)
    for k in set(classes):
        own = [parts[key] for key in keys if key.split("/")[0] == k]
        counts = [own.count(s) for s in SPLITS]
        assert (counts == [len(own), 0, 0] if len(own) < 3
                else min(counts) >= 1 and counts[0] == max(counts)), counts
        assert counts[2] >= 2 or len(own) < 6
    plain = folders.assign_splits(keys)  # what it is for
    assert {k for k in set(classes) if classes.count(k) > 2} - {
        key.split("/")[0] for key in keys if plain[key] == "test"}


def test_parts_of_a_zip_are_stratified(zipped, monkeypatch):
    counts = lambda data: measured_classes(data, "test", "label")[1].tolist()
    assert counts(folder(zipped, size=16)) == [1, 2]
    keys = [f"{i}" for i in range(20)]
    assert stratified_splits(keys, [0] * 20) == stratified_splits(keys[::-1], [0] * 20)


def test_classes_without_test_images_are_left_out_and_named(zipped):
    data = folder(zipped, size=16)
    model = cg.VAE(data.shape, data.conditions)
    reader = cg.GuideClassifier(data.shape, data.conditions)
    result = evaluate(model, reader, data, n=16)
    assert result["left_out"] == ["s1"] and result["protocol"]["classes"] == 2
    assert len(result["classes"]["accuracy"]) == 2
    with pytest.raises(ValueError, match="no class of 'label' has two images"):
        measured_classes(Dataset(data.name, data.images, data.labels, data.conditions, {
            **data.splits, "test": data.splits["test"][:1]}), "test", "label")


def test_samples_of_a_name_are_those_of_its_number(zipped):
    data = folder(zipped, size=16)
    model = cg.VAE(data.shape, data.conditions)
    assert generate(model, 3, label="s10").equal(generate(model, 3, label=2))
    assert not generate(model, 3, label="s10").equal(generate(model, 3, label=1))


# families and memory ------------------------------------------------------------------


def test_every_generator_is_a_family_or_said_not_to_be():
    known = {f.model.__name__ for f in families.families().values()}
    for name in cg.model_modules():
        cls = getattr(cg, name)
        if hasattr(cls, "sample") and families.trainable(cls):
            assert name in known
    assert {"CAGlow", "CGlow", "Glow", "ACGAN", "VAE", "AVAE", "ViGAN"} <= known
    assert not known & {"Evaluator", *families.NOT_FOR_IMAGES}


def test_an_unknown_family_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'caglow'"):
        families.find_family("caglwo")
    assert families.find_family("CA-Glow").name == "caglow"


def test_what_a_family_cannot_do_is_said(zipped):
    problem = families.find_family("caglow").problem
    assert problem((1, 16, 16), [ANIMALS]) == ""
    assert "needs labels" in problem((1, 16, 16), [])
    assert "sides divisible by 8" in problem((1, 20, 20), [ANIMALS])
    assert families.find_family("glow").problem((1, 16, 16), []) == ""
    ten = [Classes("k", 10)]
    assert families.find_family("avae").problem((3, 32, 32), ten) == ""
    data = folder(zipped, size=16, columns=[])
    with pytest.raises(ValueError, match="needs labels.*models for these.*glow"):
        own_images.make_plan(families.find_family("caglow"), data)


def test_parameters_grow_gently():
    count = lambda side, n: families.find_family("caglow").parameters(
        (3, side, side), [Classes("label", n)])
    assert count(64, 10) < 30e6 and count(64, 40) < 50e6 and count(128, 10) < 80e6
    dense = cg.CAGlow((1, 16, 16), [ANIMALS])
    assert type(dense.encoder).__name__ == "Encoder"
    with torch.device("meta"):
        large = cg.CAGlow((3, 64, 64), [Classes("label", 10)])
    assert type(large.encoder).__name__ == "FactorEncoder"


def test_what_does_not_fit_is_refused_with_what_would():
    family = families.find_family("caglow")
    needed = families.training_bytes(family, (3, 64, 64), [ANIMALS], 1000)
    assert families.check_memory(family, (3, 64, 64), [ANIMALS], 1000,
                                 needed) == needed
    with pytest.raises(ValueError, match="caglow on 1,000.*GB are free; accepted: "
                                         "--size 32, --model"):
        families.check_memory(family, (3, 64, 64), [ANIMALS], 1000, needed - 1)


# plans and the clock ------------------------------------------------------------------

TWO = (StagePlan("flow", 100_000, 64, 200.0, 1.0),
       StagePlan("adversarial", 80_000, 80, 800.0, 9.0))


def test_lengths_follow_the_data():
    few, many = (pace.lengths_by_epochs([*TWO], n) for n in (280, 100_000))
    assert few == {"flow": 28_032, "adversarial": 22_400}
    assert many["flow"] >= 100_000 and many["adversarial"] == 80_000


@pytest.mark.parametrize("seconds", [40, 120, 1800])
def test_a_budget_is_divided_over_all_stages(seconds):
    lengths = pace.lengths_by_time([*TWO], seconds)
    spent = [s.fixed + lengths[s.name] / s.speed for s in TWO]
    assert sum(spent) == pytest.approx(seconds, rel=0.05)
    assert all(lengths[s.name] >= MIN_ROUNDS * s.batch for s in TWO)


def test_a_budget_too_short_for_every_stage_is_refused():
    with pytest.raises(ValueError, match="2 stage.*accepted: 19 s or more"):
        pace.lengths_by_time([*TWO], 15)


def duration(slower: float, follows: bool, seconds: float = 130.0) -> float:
    """How long stages take on a machine that became slower after it was measured."""
    now = [0.0]
    stages = [StagePlan(**vars(s)) for s in TWO]
    for name, images in pace.lengths_by_time(stages, seconds).items():
        next(s for s in stages if s.name == name).images = images
    pacer = Pacer(stages, seconds, clock=lambda: now[0])
    for plan in TWO:
        stage = Stage(plan.name, pacer.lengths[plan.name], plan.batch,
                      players=lambda stage: [])
        if follows:
            pacer.follow(stage)
        now[0], seen = now[0] + plan.fixed, 0
        while seen < stage.images:
            if follows:
                assert stage.schedule(stage.progress) == 1.0
            now[0] += slower * plan.batch / plan.speed
            seen += plan.batch
            stage.progress = min(1.0, seen / stage.images)
        assert seen >= MIN_ROUNDS * plan.batch
    return now[0]


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_lengths_follow_the_clock(slower):
    assert duration(slower, True) == pytest.approx(130, rel=0.1)
    if slower != 1:  # what it is for
        assert duration(slower, False) != pytest.approx(130, rel=0.2)


# a run --------------------------------------------------------------------------------


def test_the_plan_is_said_first(run):
    _, said, _ = run
    assert re.search(r"vae on \d+ training images 1×16×16; label: 3 classes "
                     r"\(s1, s2, s10\)", said)
    assert re.search(r"[\d,]+ parameters; memory from", said)
    assert re.search(r"evaluator +[\d,]+ images.*\n +bound +[\d,]+ images", said)
    assert re.search(r"expected end \d\d:\d\d:\d\d", said)


def test_a_budget_ends_near_itself(run):
    out, said, budget = run
    facts = json.loads((out / own_images.FACTS).read_text())
    assert facts["spent"] == pytest.approx(budget, rel=0.2), said
    card = json.loads((out / "card.json").read_text())
    stages = card["training"]["stages"]
    assert card["finished"] and card["images"] == sum(
        s["images"] for s in stages.values())
    assert stages["bound"]["images"] == facts["lengths"]["model"]["bound"]


def test_names_are_in_the_card_and_in_the_model(run):
    out, _, _ = run
    card = json.loads((out / "card.json").read_text())
    assert card["arguments"]["conditions"][0]["values"] == ["s1", "s2", "s10"]
    model = cg.load(out)
    assert model.sample(2, label="s10").shape == (2, 1, 16, 16)


def test_a_picture_shows_each_class_with_its_name(run):
    out, _, _ = run
    assert Image.open(out / "figures" / "classes.png").size[0] > 100
    figure = own_images.class_figure(cg.load(out), each=2)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "s1", "s2", "s10"]


def test_a_run_is_evaluated_by_its_own_evaluator(run):
    out, _, _ = run
    with pytest.raises(ValueError, match="--data digits without --evaluator"):
        own_images.evaluate_own(str(out), "digits", None, 0)
    assert not (out / "metrics.json").exists()
    named = own_images.evaluate_own(str(out), None, 0.5, 3)  # as the command does
    protocol = named.result["protocol"]
    assert (protocol["temperature"], protocol["seed"]) == (0.5, 3)
    assert protocol["n"] == 2000 and 0 <= named.result["accuracy"] <= 1
    kept = json.loads((out / "metrics.json").read_text())["rows"]
    assert [r for r in kept if r["model"] != "evaluator"] == named.rows
    found = cg.evaluate_run(out, n=32)
    text = str(found)
    assert "left out, fewer than two test images: s1" in text
    assert "the evaluator reads 'label' correctly in" in text and "least accurate: s" in text
    rows = json.loads((out / "metrics.json").read_text())["rows"]
    assert {r["metric"] for r in rows} >= {"accuracy", "frechet", "diversity_pixel"}
    assert any(r["model"] == "evaluator" for r in rows)


def test_a_finished_run_is_loaded_and_another_one_refused(run, zipped):
    out, _, _ = run
    said: list[str] = []
    again = cg.train_images(zipped, model="vae", out=out, size=16, say=said.append)
    assert again.finished and said == [f"{out} is finished"]
    with pytest.raises(ValueError, match="its family is 'vae', asked for 'cgan'"):
        cg.train_images(zipped, model="cgan", out=out, size=16)


def test_changed_images_are_noticed(run, tmp_path):
    out, _, _ = run
    other = drawn(tmp_path / "images.zip", {"s10": 10, "s2": 10, "s1": 1})
    with pytest.raises(ValueError, match="has changed since"):
        own_images.run_data(out, folder(other, size=16))


def test_an_interrupted_run_goes_on(zipped, tmp_path, monkeypatch):
    calls = []
    real = own_images.fit

    def once(model, *given, **options):
        calls.append(type(model).__name__)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, *given, **options)

    monkeypatch.setattr(own_images, "fit", once)
    options = {"model": "vae", "out": tmp_path / "run", "size": 16, "epochs": 2,
               "progress": False, "say": lambda line: None}
    with pytest.raises(KeyboardInterrupt):
        cg.train_images(zipped, **options)
    done = cg.train_images(zipped, **options)
    assert done.finished and calls == ["OwnEvaluator", "VAE", "VAE"]


def test_a_run_is_found_by_name_in_runs(run, monkeypatch, tmp_path):
    """`condgen evaluate mine` for `runs/mine`; a run of a recipe has no evaluator."""
    out, _, _ = run
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(own_images, "evaluate_run",
                        lambda place, **given: seen.append((place.resolve(), given)))
    own_images.evaluate_own("mine", None, None, 7)
    assert seen == [(out.resolve(), {"temperature": None, "seed": 7})]
    with pytest.raises(ValueError, match="Missing option '--evaluator'"):
        own_images.evaluate_own("caglow-digits", None, None, 0)


def test_bars_follow_corrected_lengths(run, monkeypatch):
    import tqdm.auto

    totals = []

    class Bar(tqdm.auto.tqdm):
        def close(self):
            totals.append((self.total, self.n))
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    data = folder(run[0].parent / "images.zip", size=16)
    model = cg.VAE(data.shape, data.conditions)

    def shorter(stage):
        def schedule(progress):
            stage.images = 5 * stage.batch
            return 1.0
        stage.schedule = schedule
        return stage

    with families.changed_stages(model, shorter):
        cg.fit(model, data, images=40 * 64)
    total, seen = totals[-1]
    assert total == seen and seen < 40 * 64


# images without labels ----------------------------------------------------------------


@pytest.fixture(scope="module")
def partly(tmp_path_factory) -> Path:
    """Two classes of twenty images; the labels of eight images are not known."""
    path = drawn(tmp_path_factory.mktemp("partly") / "images.zip", {"a": 20, "b": 20})
    table = path.with_name("labels.csv")
    lines = table.read_text().splitlines()
    gone = {3, 5, 8, 13, 24, 26, 33, 40}
    table.write_text("\n".join(
        line.split(",")[0] + "," if i in gone else line
        for i, line in enumerate(lines)) + "\n")
    return path


def test_missing_labels_are_refused_or_kept(partly):
    with pytest.raises(ValueError, match="'label' of 'a/2.png' is ''; accepted: a value "
                                         "in every row, or missing='keep'"):
        folder(partly, size=16)
    with pytest.raises(ValueError, match="missing='drop'; accepted: refuse, keep"):
        folder(partly, size=16, missing="drop")
    data = folder(partly, size=16, missing="keep")
    assert len(data.images) == 40 and len(data.unlabelled) == 8
    parts = torch.cat([data.splits[s] for s in SPLITS])
    assert sorted([*parts.tolist(), *data.unlabelled.tolist()]) == list(range(40))
    assert (data.labels[data.unlabelled] == 0).all()
    assert (data.labels[parts].sum(1) == 1).all()
    # every image is where its label is: class b is brighter
    truth = data.conditions.unpack(data.labels)["label"]
    light = data.images[:, 0, 8:].float().mean((1, 2))
    assert (light[parts][truth[parts] == 0] < light[parts][truth[parts] == 1].min()).all()


def test_given_parts_of_images_without_labels(tmp_path):
    path = drawn(tmp_path / "images.zip", {"a": 6, "b": 6})
    part = ["train", "train", "val", "test", "train", "test"] * 2
    names = [f"{k}/{i}.png" for k in "ab" for i in range(6)]
    label = ["" if i in (0, 3) else name[0] for i, name in enumerate(names)]
    path.with_name("labels.csv").write_text("file,split,label\n" + "".join(
        f"{n},{s},{k}\n" for n, s, k in zip(names, part, label, strict=True)))
    data = folder(path, size=16, missing="keep")
    assert len(data.unlabelled) == 1  # the other one is in the part test
    assert [len(data.splits[s]) for s in SPLITS] == [5, 2, 3]
    path.with_name("labels.csv").write_text("file,label\na/0.png,\na/1.png,NA\n")
    with pytest.raises(ValueError, match="every row has a missing label"):
        folder(path, size=16, missing="keep")


def test_families_that_need_every_label_refuse(partly, tmp_path):
    said = "acgan: 8 images have no label, and it needs one of each; fill the empty cells"
    with pytest.raises(ValueError, match=f"{said}.*models for these images: caglow"):
        cg.train_images(partly, model="acgan", out=tmp_path / "run", size=16)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, more", [("caglow", [8, 0]), ("glow", [8])])
def test_a_flow_learns_from_images_without_labels(name, more, partly, monkeypatch):
    """Its stage `flow` sees them all, the others those with labels."""
    data = folder(partly, size=16, missing="keep")
    family, seen = families.find_family(name), []
    assert family.takes_unlabelled and not families.find_family("vae").takes_unlabelled
    model = family.build(data.shape, data.conditions)
    if model.conditions.supervised:
        model.store_condition_rows(data.table("train")["c"])
        monkeypatch.setattr(model, "latents", lambda table: table)
    both = families.PartlyLabelled(data)
    with families.changed_stages(model, families.sees_known(family)):
        for stage, extra in zip(model.stages(), more, strict=True):
            for part, unknown in (("train", extra), ("val", 0)):
                table = stage.data(both.table(part))
                assert pace.table_length(table) == len(data.indices(part)) + unknown
                seen.append({*table})
    labelled = {"x", "c"} if len(more) == 2 else {"x"}
    assert seen[:2] == [{"x"}] * 2 and seen[-1] == labelled
    assert "stages" not in vars(model)


def test_a_run_with_missing_labels(partly, tmp_path):
    said: list[str] = []
    found = cg.train_images(partly, model="caglow", out=tmp_path / "run", size=16,
                            epochs=1, progress=False,
                            say=lambda line: said.append(str(line)))
    assert found.finished and "8 more images without labels" in said[0]
    assert found.model.sample(2, label="b").shape == (2, 1, 16, 16)
    assert cg.evaluate_run(tmp_path / "run", n=16).result["accuracy"] >= 0
    again = cg.train_images(partly, model="caglow", out=tmp_path / "run", size=16,
                            say=said.append)
    assert again.finished and said[-1].endswith("is finished")


# the command line and README ----------------------------------------------------------

MISTAKES = [
    (["train"], "own images with no --data; accepted: a recipe"),
    (["train", "caglow-digits", "--data", "images.zip"], "with --data; accepted"),
    (["train", "caglow-digits", "--model", "vae"], "with --model; accepted"),
    (["train", "--data", "images.zip", "--precision", "bf16"],
     "own images with --precision; accepted"),
    (["train", "--data", "images.zip", "--tier", "tiny", "--save-every", "5s"],
     "own images with --tier, --save-every; accepted"),
    (["train", "--data", "images.zip", "--model", "caglwo"], "did you mean 'caglow'"),
    (["train", "--data", "nowhere.zip"], "nowhere.zip does not exist"),
    (["train", "--data", "images.zip", "--labels", "no.csv"], "no.csv does not exist"),
    (["train", "--data", "images.zip", "--budget", "soon"], "90s"),
    (["train", "--data", "images.zip", "--size", "20"], "sides divisible by 8"),
    (["train", "--data", "images.zip", "--size", "16", "--budget", "0s"],
     "s or more, so that each stage is trained"),
    (["train", "--data", "images.zip", "-o", "images.zip/x"], "cannot make folder"),
]


def called(arguments, monkeypatch, capsys, cwd):
    from condgen.__main__ import main

    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["condgen", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("arguments, message", MISTAKES,
                         ids=[" ".join(a) for a, _ in MISTAKES])
def test_mistakes_end_with_one_line(arguments, message, zipped, monkeypatch, capsys):
    before = {p for p in zipped.parent.rglob("*") if "run" not in p.parts}
    code, _, said = called(arguments, monkeypatch, capsys, zipped.parent)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0]
    assert "Traceback" not in said
    assert before == {p for p in zipped.parent.rglob("*") if "run" not in p.parts}


def test_models_are_listed_for_the_data(zipped, monkeypatch, capsys):
    """The book's families with a sentence each; what cannot be trained comes last."""
    code, said, _ = called(["train", "--data", zipped, "--size", "16", "--model",
                            "list"], monkeypatch, capsys, zipped.parent)
    assert code == 0
    assert re.search(r"^caglow +draws by label +[\d.]+ million parameters\. Given", said,
                     re.MULTILINE)
    assert re.search(r"^glow +does not use labels", said, re.MULTILINE)
    assert not re.search(r"^(variedvigan|caglowfaces)", said, re.MULTILINE)
    assert "can be named too: beganstar, caglowfaces" in said
    last = families.family_table((1, 20, 20), [ANIMALS])[-1]
    assert "sides 8, 16, 32" in last[2] and last[1] != "draws by label"


def test_listed_families_are_the_book_s():
    """What is not listed is a subclass of what is; every sentence is one."""
    found = families.families()
    listed = tuple(f.model for f in found.values() if f.listed)
    assert set(families.LISTED) <= set(found) and len(listed) == len(families.LISTED)
    for family in found.values():
        assert family.listed or issubclass(family.model, listed), family.name
    for name, sentence in families.LISTED.items():
        assert sentence[0].isupper() and sentence.endswith("."), name
        assert 20 < len(sentence) < 120, name


def test_the_how_to_of_the_readme(tmp_path, monkeypatch, capsys):
    """Its commands and its lines, on a small set of drawn images, for less time."""
    text = (ROOT / "README.md").read_text()
    part = text[text.index("## Your own images"):]
    shell, python = (re.search(rf"```{kind}\n(.*?)```", part, re.S)[1]
                     for kind in ("bash", "python"))
    drawn(tmp_path / "images.zip", {"cat": 40, "dog": 40})
    lines = [line.split("#")[0].split() for line in shell.splitlines() if line.strip()]
    assert len(lines) <= 4 and len(python.strip().splitlines()) <= 6
    for line in lines:
        assert line[0] == "condgen"
        small = {"caglow": "vae", "--budget": "--epochs", "30m": "5"}
        code, said, error = called([small.get(word, word) for word in line[1:]],
                                   monkeypatch, capsys, tmp_path)
        assert code == 0, error
    assert "accuracy" in said
    assert (tmp_path / "runs/mine/card.json").exists()
    assert list(tmp_path.glob("*.png"))
    short = (python.replace("caglow", "vae").replace("budget=1800", "epochs=5")
             .replace("runs/mine", "runs/other"))
    exec(short, {})
    assert "accuracy" in capsys.readouterr().out
