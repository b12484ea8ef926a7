"""Laws that every recipe inherits, at tier tiny: 1–8 and 10 of the design; 11 is
tests/test_errata.py's.
"""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch

from condgen import evaluation, metrics
from condgen.bijections import dequantize
from condgen.contracts import Batch, Noise
from condgen.recipes import TIERS, declared, find, prepare, resolve, train
from condgen.runs import load
from condgen.training import fit

SHORT = 320  # images per stage, where only the mechanics matter
RECIPES = declared("RECIPES")
OFFLINE = [name for name in RECIPES if "digits" in name]  # what the package embeds
FAMILIES = [name for name in OFFLINE if not name.startswith("evaluator")]
# images of one digit of 16×16 pixels, which the evaluator of digits reads
SINGLE = [name for name in OFFLINE if "two-digits" not in name]


@cache
def data(name):
    return resolve(RECIPES[name].data)("tiny")


def fresh(name, seed=0):
    return prepare(RECIPES[name], "tiny", seed).model


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@cache
def short_run(name):
    return fit(fresh(name), data(name), images=SHORT, progress=False)


FLOWS = [name for name in OFFLINE if hasattr(fresh(name), "log_prob")]


def miniature(name):
    """The recipe's model for pictures of 2×2 pixels in float64, its
    parameters away from zero.
    """
    model = fresh(name)
    torch.manual_seed(0)
    model = type(model)(**{**model.arguments, "shape": (1, 2, 2), "levels": 1,
                           "width": 8}).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    return model, getattr(model, "glow", model)


def packed(flow, n):
    return flow.conditions.pack(
        n, **{name: torch.full((n,), 3) for name in flow.conditions.names}).double()


@pytest.mark.parametrize("name", FLOWS)
def test_laws_1_and_2_density_and_inverse_of_the_recipes_flow(name):
    _, flow = miniature(name)
    v = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(2),
                   dtype=torch.float64) - 0.5
    c = packed(flow, 1)
    for x in v[:, None]:
        _, ladj, _ = flow.whiten(x, c)
        jacobian = torch.autograd.functional.jacobian(
            lambda x: flow.whiten(x, c)[0].flatten(), x).view(4, 4)
        assert abs(torch.linalg.slogdet(jacobian)[1] - ladj) < 1e-9
    y = flow.flow(v)[0]
    assert (flow.flow.inverse(y) - v).abs().max() < 1e-10


@pytest.mark.parametrize("name", FLOWS)
def test_law_3_density_integrates_to_1_and_matches_samples(name):
    """In four dimensions by importance sampling; samples by their mean energy;
    false alarms below 1e-6.
    """
    _, flow = miniature(name)
    g, n = torch.Generator().manual_seed(0), 40_000
    with torch.no_grad():
        c = packed(flow, n)
        mean, log_std = flow.prior(c)
        v = flow.flow.inverse(mean + torch.randn(n, 4, generator=g, dtype=torch.float64)
                              * log_std.exp()).flatten(1)
        torch.manual_seed(0)
        proposal = torch.distributions.MultivariateNormal(v.mean(0), 2 * v.T.cov())
        u = proposal.sample((n,))
        ratio = (flow.log_density(u.view(-1, 1, 2, 2), c)[0]
                 - proposal.log_prob(u)).exp()
        assert abs(ratio.mean() - 1) < 5 * ratio.std() / n**0.5 < 0.1
        energy = lambda v: flow.log_density(v.view(-1, 1, 2, 2), c)[0]
        weighed = ratio * energy(u)
        sampled = energy(v)
        error = (weighed.var() / n + sampled.var() / n).sqrt()
        assert (abs(weighed.mean() - sampled.mean()) < 5 * error
                + abs(ratio.mean() - 1) * sampled.mean().abs())


@pytest.mark.parametrize("name", OFFLINE)
def test_law_4_each_player_updates_only_its_parameters(name):
    model = fresh(name)
    for stage in model.stages():
        table = data(name).table("train")
        table = stage.data(table) if stage.data else table
        first = {k: v[:256] for k, v in table.items()}
        batch = Batch(first, Noise(("law 4",), slice(None), len(next(iter(first.values())))))
        if stage.on_enter:
            stage.on_enter(batch)
        # away from zero, where whole networks would get no gradient
        for p in model.parameters():
            p.data.add_(0.02 * torch.randn(
                p.shape, generator=torch.Generator().manual_seed(p.numel())))
        for player in stage.players(stage):
            own = {id(p) for p in player.params}
            for p in model.parameters():
                p.requires_grad_(id(p) in own)
                p.grad = None
            sum(weight * value
                for weight, value in player.loss(batch).values()).backward()
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
PLAYERS = {"evaluator-digits": {"judge"}, "glow-digits": {"flow"},
           "cglow-digits": {"flow"}, "acgan-digits": {"discriminator", "generator"},
           "cgan-digits": {"discriminator", "generator"}}


@pytest.mark.parametrize("name", OFFLINE)
def test_no_loss_term_is_missing_or_has_weight_zero(name):
    weighed = {}
    model = fresh(name)
    for stage in model.stages():
        table = data(name).table("train")
        table = (stage.data({k: v[:64] for k, v in table.items()}) if stage.data
                 else table)
        batch = Batch({k: v[:64] for k, v in table.items()},
                      Noise(("terms",), slice(None), 64))
        for player in stage.players(stage):
            weighed[player.name] = {term: weight
                                    for term, (weight, _) in player.loss(batch).items()}
    known = {"caglow-digits", "caglow-digits-binary", "caglow-digits-literal", *PLAYERS}
    if name not in known:  # a later model: its own test names its terms
        assert all(weight > 0 for terms in weighed.values()
                   for weight in terms.values())
        return
    assert set(weighed) == PLAYERS.get(name, {"flow", "supervision", "encoder"})
    for player, terms in weighed.items():
        wanted = {term.replace("_u", f"_{CODE.get(name, 'u')}")
                  for term in TERMS[player]}
        if name == "cgan-digits":
            wanted -= {"C_digit", "C_digit_fake"}
        if name == "cglow-digits":
            wanted = {"bpd", "digit"}
        assert set(terms) == wanted and all(weight > 0 for weight in terms.values())


@pytest.mark.parametrize("name", OFFLINE)
def test_law_5_resumed_run_equals_uninterrupted_run(name, tmp_path):
    whole, parts, run = short_run(name), 0, None
    while run is None or not run.finished:
        run, parts = (fit(fresh(name), data(name), tmp_path / "run", images=SHORT,
                          progress=False, budget=0.0),
                      parts + 1)
    assert parts >= SHORT // 80
    assert equal(whole.model, run.model)
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"}
                         for row in rows]
    assert drop(whole.log) == drop(run.log)


@pytest.mark.parametrize("name", FAMILIES)
def test_law_6_reload_in_a_new_process_gives_the_same_samples(name, tmp_path):
    from condgen.runs import save

    model = short_run(name).model
    save(model, tmp_path / "run")
    code = ("import sys, torch; from condgen.runs import load; "
            "torch.set_num_threads(int(sys.argv[3])); x = load(sys.argv[1]).sample(3,"
            " generator=torch.Generator().manual_seed(5)); torch.save(x, sys.argv[2])")
    subprocess.run([sys.executable, "-c", code, tmp_path / "run", tmp_path / "x.pt",
                    str(torch.get_num_threads())], check=True)
    x = model.sample(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(x, torch.load(tmp_path / "x.pt"))
    assert torch.equal(
        x, load(tmp_path / "run").sample(3, generator=torch.Generator().manual_seed(5)))


@cache
def evaluator():
    return train("evaluator-digits", None, "tiny", progress=False).model


@cache
def glow():
    return train("glow-digits", None, "tiny", progress=False).model


@cache
def tiny_run(name):
    parents = {part: tiny(parent) for part, parent in RECIPES[name].parents.items()}
    return prepare(RECIPES[name], "tiny", 0, parents).run(None, progress=False)


def tiny(name):
    return {"evaluator-digits": evaluator,
            "glow-digits": glow}.get(name, lambda: tiny_run(name).model)()


def bits(model, x, c):
    given = ({"digit": c} if "digit" in model.conditions.names
             and type(model).__name__ == "CGlow" else {})
    with torch.no_grad():
        log_p = model.log_prob(x, generator=torch.Generator().manual_seed(0), **given)
    return -log_p.mean().item() / (x[0].numel() * 0.6931)


@pytest.mark.parametrize("name", SINGLE)
def test_law_10_a_tiny_run_improves_its_own_metric(name):
    d = data("evaluator-digits")
    x, c = d.split_images("test"), d.table("test")["c"].argmax(1)
    trained, raw = tiny(name), fresh(name)
    if name == "evaluator-digits":
        with torch.no_grad():
            assert (trained.logits(x).argmax(1) == c).double().mean() > 0.9
        return
    if name in FLOWS:
        assert bits(trained, x, c) < bits(raw, x, c) - 1
    # so weak a system that only its own classifier is pleased
    if name == "caglow-digits-literal":
        read = [row["encoder.C_digit"] for row in tiny_run(name).log]
        assert sum(read[-5:]) < 0.8 * sum(read[:5])
    elif name.startswith(("caglow", "acgan", "cgan")):
        wanted = torch.arange(200) % 10
        x = trained.sample(200, generator=torch.Generator().manual_seed(0),
                           digit=wanted)
        with torch.no_grad():
            assert (evaluator().logits(x).argmax(1) == wanted).double().mean() > 0.8
    elif name not in FLOWS:  # its samples come nearer to real images
        distance = [metrics.frechet(evaluation.generate(model, 360), x, evaluator().features)
                    for model in (trained, raw)]
        assert distance[0] < 0.8 * distance[1]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in SINGLE
                                  and fresh(name).conditions.supervised])
def test_law_7_condition_changes_the_predicted_class(name):
    """The same noise, another digit: the evaluator finds the digit that was asked
    for more probable than before.
    """
    model, reader = tiny(name), evaluator()
    wanted = torch.arange(300) % 10
    other = (wanted + 1 + torch.arange(300) // 10 % 9) % 10
    draw = lambda digit: model.sample(300, generator=torch.Generator().manual_seed(0),
                                      digit=digit)
    x, y = draw(wanted), draw(other)
    assert torch.equal(x, draw(wanted)) and bool((x != y).flatten(1).any(1).all())
    with torch.no_grad():
        gain = [reader.logits(im).log_softmax(1).gather(1, wanted[:, None])[:, 0]
                for im in (x, y)]
    gain = (gain[0] - gain[1]).double()
    assert gain.mean() > 4 * gain.std() / 300**0.5 > 0


@pytest.mark.parametrize("name", [name for name in FAMILIES if name in SINGLE])
def test_law_8_numbers_do_not_depend_on_batches_or_order(name, monkeypatch):
    d, model, numbers, batched = (data("evaluator-digits"), tiny(name), [],
                                  metrics.map_batches)
    for size in (256, 37):
        for module in (metrics, evaluation):
            monkeypatch.setattr(module, "map_batches",
                                lambda f, x, device="cpu", batch=0: batched(
                                    f, x, device, size))  # noqa: B023
        numbers.append(evaluation.evaluate(model, evaluator(), d, n=360,
                                           temperature=0.7))
    for metric in metrics.METRICS:
        if metric in numbers[0]:
            assert (abs(numbers[0][metric] - numbers[1][metric])
                    <= 1e-4 * abs(numbers[1][metric])), metric
    x, real = (model.sample(360, generator=torch.Generator().manual_seed(0)),
               d.split_images("test"))
    there = metrics.frechet(x, real, evaluator().features)
    back = metrics.frechet(x.roll(100, 0), real.flip(0), evaluator().features)
    assert abs(there - back) <= 1e-4 * there
    assert abs(metrics.frechet(x.double(), x.double(), lambda x: x.flatten(1))) <= 1e-6


def test_shared_glow_gives_the_result_of_both_stages(tmp_path):
    images = {"flow": SHORT, "adversarial": SHORT}
    both = fit(fresh("caglow-digits"), data("caglow-digits"), images=images,
               progress=False).model
    alone = fit(fresh("glow-digits"), data("glow-digits"), images=SHORT,
                progress=False).model
    shared = prepare(find("caglow-digits"), "tiny", 0, {"glow": alone})
    shared = shared.run(None, images={"adversarial": SHORT}, progress=False).model
    assert equal(both, shared)


def test_the_flow_round_trip_holds_after_training():
    model, x = glow(), data("evaluator-digits").split_images("test")[:50]
    with torch.no_grad():
        assert (model.decode(model.encode(x)) - x).abs().max() <= 1e-4
        model64 = model.double()
        v = dequantize(x.double(), torch.full_like(x.double(), 0.5))
        assert (model64.flow.inverse(model64.flow(v)[0]) - v).abs().max() <= 1e-10
        model.float()


def test_names_and_tiers_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'caglow-digits'"):
        find("caglow-digit")
    with pytest.raises(ValueError, match="accepted: tiny, cpu, full"):
        train("glow-digits", None, "huge")


def test_two_recipes_of_one_name_are_refused(monkeypatch):
    from condgen.experiments import digits, mnist

    monkeypatch.setattr(mnist, "RECIPES", [*mnist.RECIPES, digits.RECIPES[0]])
    declared.cache_clear()
    with pytest.raises(ValueError, match="declares 'evaluator-digits' again"):
        declared("RECIPES")
    monkeypatch.undo()
    declared.cache_clear()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_declared_at_every_tier(name):
    """Names resolve, arguments are the constructor's, and numbers are JSON."""
    plan = RECIPES[name]
    assert "-" in name and "/" not in name and callable(resolve(plan.data))
    for tier in TIERS:
        facts = plan.config(tier)
        assert json.loads(json.dumps(facts)) == facts and facts["version"] >= 1
        assert set(plan.arguments.get(tier, {})) <= set(plan.parameters)
        assert facts["images"] and all(n >= 1 for n in facts["images"].values())
    assert {*plan.parents.values()} <= RECIPES.keys()


def test_config_resolves_every_argument():
    """A default of the constructor that changes, changes what results depend on."""
    facts = find("glow-digits").config("tiny")
    assert (facts["arguments"]["coupling"] == "affine"
            and facts["arguments"]["width"] == 24)
    assert facts["images"] == {"flow": 6_400} and "conditions" not in facts["arguments"]


def test_a_recipe_gives_conditions_only_where_they_are_required():
    assert not fresh("glow-digits").conditions
    assert [*fresh("caglow-digits").conditions.names] == ["digit", "u"]


def test_import_is_lazy():
    code = ("import sys, condgen as cg; cg.CAGlow, cg.fit, cg.load; "
            "print(sorted(m for m in sys.modules if '.' not in m))")
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True,
                            text=True, check=True).stdout
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
