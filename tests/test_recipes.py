"""Laws that every recipe inherits, at tier tiny: 1–8 and 10 of the design; 11 is tests/test_errata.py's."""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch

from condgen import metrics
from condgen.bijections import dequantize
from condgen.contracts import Batch, Noise
from condgen.recipes import EXPERIMENTS, RECIPES, TIERS, Lab, headline, recipe, reproduce, result_path, source, train
from condgen.runs import load
from condgen.training import fit

SHORT = 320  # images per stage, where only the mechanics matter
OFFLINE = [name for name in RECIPES if "digits" in name]  # no MNIST in the package; 24,000 faces are not drawn at once
FAMILIES = [name for name in OFFLINE if RECIPES[name].judge]


@cache
def data(name):
    return RECIPES[name].data()


def fresh(name, seed=0):
    torch.manual_seed(seed)
    return RECIPES[name].model(data(name), "tiny")


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@cache
def short_run(name):
    return fit(fresh(name), data(name), images=SHORT, progress=False)


FLOWS = [name for name in OFFLINE if hasattr(fresh(name), "log_prob")]


def miniature(name):
    """The recipe's model for pictures of 2×2 pixels in float64, its parameters away from zero."""
    model = fresh(name)
    torch.manual_seed(0)
    model = type(model)(**{**model.arguments, "shape": (1, 2, 2), "levels": 1, "width": 8}).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    return model, getattr(model, "glow", model)


def packed(flow, n):
    return flow.conditions.pack(n, **{name: torch.full((n,), 3) for name in flow.conditions.names}).double()


@pytest.mark.parametrize("name", FLOWS)
def test_laws_1_and_2_density_and_inverse_of_the_recipes_flow(name):
    _, flow = miniature(name)
    v = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.5
    c = packed(flow, 1)
    for x in v[:, None]:
        _, ladj, _ = flow.whiten(x, c)
        jacobian = torch.autograd.functional.jacobian(lambda x: flow.whiten(x, c)[0].flatten(), x).view(4, 4)
        assert abs(torch.linalg.slogdet(jacobian)[1] - ladj) < 1e-9
    y = flow.flow(v)[0]
    assert (flow.flow.inverse(y) - v).abs().max() < 1e-10


@pytest.mark.parametrize("name", FLOWS)
def test_law_3_the_density_is_one_in_all_and_samples_follow_it(name):
    """In four dimensions by importance sampling; samples by their mean energy; false alarms below 1e-6."""
    _, flow = miniature(name)
    g, n = torch.Generator().manual_seed(0), 40_000
    with torch.no_grad():
        c = packed(flow, n)
        mean, log_std = flow.prior(c)
        v = flow.flow.inverse(mean + torch.randn(n, 4, generator=g, dtype=torch.float64) * log_std.exp()).flatten(1)
        torch.manual_seed(0)
        proposal = torch.distributions.MultivariateNormal(v.mean(0), 2 * v.T.cov())
        u = proposal.sample((n,))
        ratio = (flow.log_density(u.view(-1, 1, 2, 2), c)[0] - proposal.log_prob(u)).exp()
        assert abs(ratio.mean() - 1) < 5 * ratio.std() / n**0.5 < 0.1
        energy = lambda v: flow.log_density(v.view(-1, 1, 2, 2), c)[0]
        weighed = ratio * energy(u)
        sampled = energy(v)
        error = (weighed.var() / n + sampled.var() / n).sqrt()
        assert abs(weighed.mean() - sampled.mean()) < 5 * error + abs(ratio.mean() - 1) * sampled.mean().abs()


@pytest.mark.parametrize("name", OFFLINE)
def test_law_4_each_player_moves_exactly_its_parameters(name):
    model = fresh(name)
    for stage in model.stages():
        table = data(name).table("train")
        table = stage.data(table) if stage.data else table
        first = {k: v[:256] for k, v in table.items()}
        batch = Batch(first, Noise(("law 4",), slice(None), 256))
        if stage.on_enter:
            stage.on_enter(batch)
        for p in model.parameters():  # away from zero, where whole networks would get no gradient
            p.data.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        for player in stage.players(stage):
            own = {id(p) for p in player.params}
            for p in model.parameters():
                p.requires_grad_(id(p) in own)
                p.grad = None
            sum(weight * value for weight, value in player.loss(batch).values()).backward()
            for label, p in model.named_parameters():
                if not p.numel():  # a prior without conditions
                    continue
                moved = p.grad is not None and bool((p.grad != 0).any())
                assert moved == (id(p) in own), f"{stage.name}, {player.name}: {label}"
        for p in model.parameters():
            p.requires_grad_(True)


CODE = {"caglow-digits-binary": "b"}
TERMS = {
    "judge": {"digit"},
    "flow": {"bpd"},
    "supervision": {"D", "C_digit", "De_u"},  # Eq. 11, 12, 13
    "encoder": {"E", "C_digit", "De_u", "FM"},  # Eq. 10, 12, 13, 14
    "discriminator": {"D", "C_digit", "C_digit_fake"},
    "generator": {"G", "C_digit"},
}
PLAYERS = {"judge-digits": {"judge"}, "glow-digits": {"flow"}, "cglow-digits": {"flow"},
           "acgan-digits": {"discriminator", "generator"}, "cgan-digits": {"discriminator", "generator"}}  # fmt: skip


@pytest.mark.parametrize("name", OFFLINE)
def test_no_term_of_a_loss_is_missing_or_weightless(name):
    weighed = {}
    model = fresh(name)
    for stage in model.stages():
        table = data(name).table("train")
        table = stage.data({k: v[:64] for k, v in table.items()}) if stage.data else table
        batch = Batch({k: v[:64] for k, v in table.items()}, Noise(("terms",), slice(None), 64))
        for player in stage.players(stage):
            weighed[player.name] = {term: weight for term, (weight, _) in player.loss(batch).items()}
    assert set(weighed) == PLAYERS.get(name, {"flow", "supervision", "encoder"})
    for player, terms in weighed.items():
        wanted = {term.replace("_u", f"_{CODE.get(name, 'u')}") for term in TERMS[player]}
        if name == "cgan-digits":
            wanted -= {"C_digit", "C_digit_fake"}
        if name == "cglow-digits":
            wanted = {"bpd", "digit"}
        assert set(terms) == wanted and all(weight > 0 for weight in terms.values())


@pytest.mark.parametrize("name", OFFLINE)
def test_law_5_interrupted_and_resumed_is_uninterrupted(name, tmp_path):
    whole, parts, run = short_run(name), 0, None
    while run is None or not run.finished:
        run, parts = (
            fit(fresh(name), data(name), tmp_path / "run", images=SHORT, progress=False, budget=0.0),
            parts + 1,
        )
    assert parts >= SHORT // 80
    assert equal(whole.model, run.model)
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert drop(whole.log) == drop(run.log)


@pytest.mark.parametrize("name", FAMILIES)
def test_law_6_reload_in_a_fresh_process_gives_the_same_samples(name, tmp_path):
    from condgen.runs import save

    model = short_run(name).model
    save(model, tmp_path / "run")
    code = (
        "import sys, torch; from condgen.runs import load; torch.set_num_threads(int(sys.argv[3])); "
        "x = load(sys.argv[1]).sample(3, generator=torch.Generator().manual_seed(5)); torch.save(x, sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run", tmp_path / "x.pt", str(torch.get_num_threads())], check=True
    )
    x = model.sample(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(x, torch.load(tmp_path / "x.pt"))
    assert torch.equal(x, load(tmp_path / "run").sample(3, generator=torch.Generator().manual_seed(5)))


@cache
def judge():
    return train("judge-digits", None, "tiny", progress=False).model


@cache
def glow():
    return train("glow-digits", None, "tiny", progress=False).model


@cache
def tiny_run(name):
    return train(name, None, "tiny", glow=glow() if name.startswith("caglow") else None, progress=False)


def tiny(name):
    return {"judge-digits": judge, "glow-digits": glow}.get(name, lambda: tiny_run(name).model)()


def bits(model, x, c):
    given = {"digit": c} if "digit" in model.conditions.names and type(model).__name__ == "CGlow" else {}
    with torch.no_grad():
        log_p = model.log_prob(x, generator=torch.Generator().manual_seed(0), **given)
    return -log_p.mean().item() / (x[0].numel() * 0.6931)


@pytest.mark.parametrize("name", OFFLINE)
def test_law_10_a_tiny_run_improves_its_own_metric(name):
    d = data("judge-digits")
    x, c = d.images_of("test"), d.table("test")["c"].argmax(1)
    trained, raw = tiny(name), fresh(name)
    if name == "judge-digits":
        with torch.no_grad():
            assert (trained.logits(x).argmax(1) == c).double().mean() > 0.9
        return
    if name in FLOWS:
        assert bits(trained, x, c) < bits(raw, x, c) - 1
    if name == "caglow-digits-literal":  # so weak a system that only its own classifier is pleased
        read = [row["encoder.C_digit"] for row in tiny_run(name).log]
        assert sum(read[-5:]) < 0.8 * sum(read[:5])
    elif name.startswith(("caglow", "acgan", "cgan")):
        wanted = torch.arange(200) % 10
        x = trained.sample(200, generator=torch.Generator().manual_seed(0), digit=wanted)
        with torch.no_grad():
            assert (judge().logits(x).argmax(1) == wanted).double().mean() > 0.8


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "glow-digits"])
def test_law_7_conditioning_acts(name):
    """The same noise, another digit: the judge finds the digit that was asked for more probable than before."""
    model, reader = tiny(name), judge()
    wanted = torch.arange(300) % 10
    other = (wanted + 1 + torch.arange(300) // 10 % 9) % 10
    draw = lambda digit: model.sample(300, generator=torch.Generator().manual_seed(0), digit=digit)
    x, y = draw(wanted), draw(other)
    assert torch.equal(x, draw(wanted)) and bool((x != y).flatten(1).any(1).all())
    with torch.no_grad():
        gain = [reader.logits(im).log_softmax(1).gather(1, wanted[:, None])[:, 0] for im in (x, y)]
    gain = (gain[0] - gain[1]).double()
    assert gain.mean() > 4 * gain.std() / 300**0.5 > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_law_8_numbers_do_not_depend_on_batches_or_order(name, monkeypatch):
    d, model, numbers, batched = data("judge-digits"), tiny(name), [], metrics.batched
    for size in (256, 37):
        monkeypatch.setattr(metrics, "batched", lambda f, x, device="cpu", batch=0: batched(f, x, device, size))  # noqa: B023
        numbers.append(metrics.evaluate(model, judge(), d, n=360, temperature=0.7))
    for metric in metrics.METRICS:
        if metric in numbers[0]:
            assert abs(numbers[0][metric] - numbers[1][metric]) <= 1e-4 * abs(numbers[1][metric]), metric
    x, real = model.sample(360, generator=torch.Generator().manual_seed(0)), d.images_of("test")
    there = metrics.frechet(x, real, judge().features)
    back = metrics.frechet(x.roll(100, 0), real.flip(0), judge().features)
    assert abs(there - back) <= 1e-4 * there
    assert abs(metrics.frechet(x.double(), x.double(), lambda x: x.flatten(1))) <= 1e-6


def test_sharing_a_trained_glow_gives_what_training_both_stages_gives(tmp_path):
    images = {"flow": SHORT, "adversarial": SHORT}
    both = fit(fresh("caglow-digits"), data("caglow-digits"), images=images, progress=False).model
    alone = fit(fresh("glow-digits"), data("glow-digits"), images=SHORT, progress=False).model
    shared = train("caglow-digits", None, "tiny", glow=alone, images={"adversarial": SHORT}, progress=False).model
    assert equal(both, shared)


def test_the_flow_round_trip_holds_after_training():
    model, x = glow(), data("judge-digits").images_of("test")[:50]
    with torch.no_grad():
        assert (model.decode(model.encode(x)) - x).abs().max() <= 1e-4
        model64 = model.double()
        v = dequantize(x.double(), torch.full_like(x.double(), 0.5))
        assert (model64.flow.inverse(model64.flow(v)[0]) - v).abs().max() <= 1e-10
        model.float()


def test_names_and_tiers_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'caglow-digits'"):
        recipe("caglow-digit")
    with pytest.raises(ValueError, match="accepted: tiny, cpu"):
        train("glow-digits", None, "huge")
    with pytest.raises(ValueError, match="did you mean 'caglow/digits'"):
        reproduce("caglow/digit")
    with pytest.raises(ValueError, match="seeds"):
        reproduce("caglow/digits", seeds=0)


def test_every_experiment_names_known_recipes_of_every_tier():
    for name, experiment in EXPERIMENTS.items():
        assert "/" in name
        for tier in TIERS:
            assert experiment.config(tier)["recipes"].keys() == set(experiment.recipes) <= RECIPES.keys()
    assert all("-" in name and "/" not in name for name in RECIPES)


def counting(monkeypatch, name="test/count"):
    """An experiment that takes no time; the seeds that it was run for."""
    from condgen import recipes
    from condgen.results import row

    seen = []

    def run(lab: Lab):
        seen.append(lab.seed)
        return [row("Glow", "bpd", 1.0 + lab.seed, n=3)]

    monkeypatch.setitem(recipes.EXPERIMENTS, name, recipes.Experiment(name, "", run, ("glow-digits",)))
    return seen


def test_reproduce_accumulates_seeds_and_does_not_repeat_them(tmp_path, monkeypatch):
    from condgen import recipes

    seen = counting(monkeypatch)
    path = result_path("test/count", "tiny", tmp_path)
    for seeds in (1, 3, 3):
        result = reproduce("test/count", "tiny", seeds, runs=tmp_path / "runs", results=path)
    assert seen == [0, 1, 2] and result["rows"][0]["values"] == [1.0, 2.0, 3.0]
    assert json.loads(path.read_text())["config"]["seeds"] == [0, 1, 2]
    monkeypatch.setattr(recipes, "source", lambda *names: "changed")
    reproduce("test/count", "tiny", 1, runs=tmp_path / "runs", results=path)
    assert seen == [0, 1, 2, 0]
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "data": {**kept["data"], "sha256": "of other images"}}))
    result = reproduce("test/count", "tiny", 2, runs=tmp_path / "runs", results=path)
    assert seen == [0, 1, 2, 0, 0, 1] and result["data"]["sha256"] == kept["data"]["sha256"]


def test_the_recorded_command_makes_all_seeds(tmp_path, monkeypatch):
    seen, path = counting(monkeypatch), tmp_path / "r.json"
    for first, seeds in ((0, 1), (1, 2), (7, 1)):
        result = reproduce("test/count", "tiny", seeds, first, runs=tmp_path / "runs", results=path)
    assert seen == [0, 1, 2, 7]
    assert result["command"] == "condgen reproduce test/count --tier tiny --seeds 3 && " \
                                "condgen reproduce test/count --tier tiny --seeds 1 --seed 7"


def test_results_of_another_experiment_are_not_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    counting(monkeypatch), counting(monkeypatch, "test/other")
    reproduce("test/count", "tiny", runs=tmp_path / "runs", results=path)
    before = path.read_bytes()
    for name, tier in (("test/other", "tiny"), ("test/count", "cpu")):
        with pytest.raises(ValueError, match="holds test/count at tier tiny, asked for"):
            reproduce(name, tier, runs=tmp_path / "runs", results=path)
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_found_before_the_experiment(tmp_path, monkeypatch):
    seen = counting(monkeypatch)
    with pytest.raises(OSError, match="cannot (write|make)"):
        reproduce("test/count", "tiny", runs=tmp_path / "runs", results="/proc/r.json")
    assert seen == []


@pytest.mark.parametrize("part", [{"data": {}}, {"config": []}, {"config": {"seeds": 3}}, {"hours": "x"}])
def test_altered_results_are_refused(part, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    counting(monkeypatch)
    reproduce("test/count", "tiny", runs=tmp_path / "runs", results=path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **part}))
    with pytest.raises(ValueError, match="is not a result"):
        reproduce("test/count", "tiny", runs=tmp_path / "runs", results=path)


PACKAGE = {
    "recipes": "from .models.flow import Flow\nfrom condgen.data import (\n    digits,\n)\ndef run(lab): return lab\n"
    "def train(): ...\nRECIPES = [Recipe('a', lambda: Flow(digits)), Recipe('b', lambda: 1)]",
    "data": "SIDE = 8\ndef digits():\n    'Ten.'\n    return SIDE\ndef faces(): ...",
    "models.flow": "from ..layers import step\nclass Flow:\n    def f(self):\n        return step",
    "layers": "def step():\n    from .data import SIDE\n    return SIDE",
}
CHANGES = {
    "a comment": ("data", "SIDE = 8", "SIDE = 8  # pixels", ""),
    "a docstring": ("data", "'Ten.'", "'Ten digits.'", ""),
    "something unused": ("data", "def faces(): ...", "def faces(): return 1", ""),
    "a constant": ("data", "SIDE = 8", "SIDE = 9", "a"),
    "a layer": ("layers", "return SIDE", "return -SIDE", "a"),
    "a method": ("models.flow", "return step", "return 2", "a"),
    "another recipe": ("recipes", "lambda: 1", "lambda: 2", "b"),
    "how all are trained": ("recipes", "def train(): ...", "def train(): return 1", "ab"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_source_follows_the_code_that_a_recipe_uses_and_no_other(change, tmp_path, monkeypatch):
    import condgen
    from condgen.recipes import definitions

    package, digests = tmp_path / "condgen", []
    monkeypatch.setattr(condgen, "__file__", str(package / "__init__.py"))
    module, old, new, concerned = CHANGES[change]
    for texts in (PACKAGE, {**PACKAGE, module: PACKAGE[module].replace(old, new)}):
        for name, text in texts.items():
            path = package / f"{name.replace('.', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        definitions.cache_clear()
        digests.append({name: source(f"Recipe {name}") for name in "ab"})
    definitions.cache_clear()
    assert {name for name in "ab" if digests[0][name] != digests[1][name]} == set(concerned)


def test_headline_gives_the_floor_a_line_of_its_own():
    from condgen.results import row

    rows = [
        row("Glow", "frechet", 9.0, n=1),
        row("Glow", "frechet_floor", 2.0, n=1),
        row("judge", "accuracy", 0.9, n=1),
    ]
    assert [(r["model"], r["metric"]) for r in headline(rows)] == [
        ("Glow", "frechet"),
        ("real training images", "frechet"),
    ]


def test_import_is_lazy():
    code = (
        "import sys, condgen as cg; cg.CAGlow, cg.fit, cg.load; print(sorted(m for m in sys.modules if '.' not in m))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = (
        "torchvision",
        "torchmetrics",
        "sklearn",
        "matplotlib",
        "accelerate",
        "safetensors",
        "typer",
        "ipywidgets",
        "nbdev",
        "fastcore",
    )
    for name in heavy:
        assert f"'{name}'" not in loaded, name
