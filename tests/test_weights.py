"""The models that ship with the package: small, documented, what their
recipes make, and good.
"""

import json
from functools import cache

import pytest
import torch

import condgen as cg
from condgen.conditions import Classes, Code
from condgen.data import IMAGE_ATTRIBUTES, portraits
from condgen.evaluation import evaluate
from condgen.metrics import broken_share
from condgen.models.gan import GAN
from condgen.recipes import declared, resolve
from condgen.files import read_json, read_tensors
from condgen.runs import export_pretrained, pretrained_models
from condgen.training import fit

FACES, SCENES = "caglow-faces-range", "gated-upscaler"
RECIPES = declared("RECIPES")
SHIPPED_RECIPES = [name for name, recipe in RECIPES.items() if recipe.origin]
GENERATORS = [name for name in SHIPPED_RECIPES
              if name not in (FACES, SCENES, "evaluator-digits")]


@cache
def model(name):
    return cg.load(name)


def test_all_shipped_models_exist_and_are_small():
    folders = pretrained_models()
    assert sorted(folders) == sorted(SHIPPED_RECIPES)
    assert sum(p.stat().st_size for folder in folders.values()
               for p in folder.rglob("*")) <= 10e6
    assert ({p.name for folder in folders.values() for p in folder.iterdir()}
            == {"card.json", "model.safetensors"})


@pytest.mark.parametrize("name", SHIPPED_RECIPES)
def test_cards_record_the_origin_of_weights(name):
    card, recipe = read_json(pretrained_models()[name] / "card.json"), RECIPES[name]
    few = name == FACES  # all of them would take a minute to draw
    data = portraits(n=400) if few else resolve(recipe.data)("cpu")
    digest = card["data"]["sha256"] if few else data.sha256
    source = "drawn" if name in (FACES, SCENES) else "Alpaydin"
    assert (card["data"] == {"name": data.name, "sha256": digest}
            and source in card["origin"])
    assert card["recipe"] == name and name in card["command"] and card["finished"]
    lengths = {stage: value["images"]
               for stage, value in card["training"]["stages"].items()}
    expected = dict(recipe.images["cpu"])
    if card["arguments"].get("pretrained"):
        expected.pop("flow")
        assert card["parents"] == {"glow": "glow-faces"}
    assert lengths == expected and card["training"]["seed"] == 0
    now = recipe.build(data, "cpu")
    arguments = {**now.arguments}
    if "conditions" in arguments:
        arguments["conditions"] = now.conditions.to_json()
    arguments |= {"pretrained": True} if card["arguments"].get("pretrained") else {}
    assert card["arguments"] == json.loads(json.dumps(arguments))


def test_sampled_faces_have_the_given_attributes():
    """A ridge regression on drawn faces reads from pixels; the same noise with and
    without differs as drawings do.
    """
    d = portraits(n=1_500)
    columns = lambda x: torch.cat([x.flatten(1).double(), torch.ones(len(x), 1)], 1)
    x, c = columns(d.images.float() / 255), d.conditions.unpack(d.labels)
    square, none, who = (x.T @ x + 30 * torch.eye(x.shape[1]).double(),
                         dict.fromkeys(IMAGE_ATTRIBUTES, 0.0), torch.arange(60))
    for worn in ("sunglasses", "long_hair", "hat"):
        weights = torch.linalg.solve(square, x.T @ c[worn].double())
        real = (x[c[worn] > 0] @ weights).mean() - (x[c[worn] == 0] @ weights).mean()
        one, other = (model(FACES).sample(60, 0.7, torch.Generator().manual_seed(0),
                                          identity=who, **none | {worn: on})
                      for on in (1.0, 0.0))
        assert ((columns(one) - columns(other)) @ weights).mean() > 0.4 * real, worn


def test_sampled_faces_vary():
    d, faces = portraits(n=400), model(FACES)
    made = faces.sample(200, 0.85, torch.Generator().manual_seed(0),
                        **d.conditions.unpack(d.labels[:200]))
    assert made.std(0).mean() > 0.7 * (d.images.float() / 255).std(0).mean()
    again = [faces.sample(6, 0.85, torch.Generator().manual_seed(s), identity=3)
             for s in (0, 0, 1)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def single_conditions(model):
    """All classes, both values of an attribute, both ends of each code: each alone."""
    for item in model.conditions:
        if isinstance(item, Classes):
            yield {item.name: torch.arange(400) % item.n}
        elif isinstance(item, Code):
            ends = torch.eye(item.n)
            yield {item.name: torch.cat([ends, -ends]).repeat(60 // item.n, 1)}
        else:
            yield from ({item.name: torch.full((60,), on)} for on in (0.0, 1.0))


@pytest.mark.parametrize("name", [FACES, *GENERATORS])
def test_single_conditions_give_no_broken_images(name):
    """At most 1 % of the images; also of those of people with hats."""
    generator, shares = model(name), []
    conditions = [*single_conditions(generator)]
    if name == FACES:
        conditions.append({"identity": torch.arange(400) % 200, "hat": torch.ones(400)})
    for given in conditions:
        n, noise = len(next(iter(given.values()))), torch.Generator().manual_seed(0)
        share = broken_share(generator.sample(n, generator=noise, **given))
        shares.append((share, *given))
    assert max(shares)[0] <= 0.01, shares


def test_evaluator_accuracy_on_digits():
    d = cg.data.digits()
    with torch.no_grad():
        read = model("evaluator-digits").logits(d.split_images("test")).argmax(1)
    assert (read == d.table("test")["c"].argmax(1)).double().mean() >= 0.97


BARS = {"caglow-digits": (0.95, 0.8), "cglow-digits": (0.4, 0.8),
        "acgan-digits": (0.95, 0.7)}


@pytest.mark.parametrize("name", GENERATORS)
def test_accuracy_and_diversity_of_shipped_generators(name):
    result = evaluate(model(name), model("evaluator-digits"), cg.data.digits(),
                      temperature=0.9, n=720)
    accuracy, diversity = BARS[name]
    assert result["accuracy"] >= accuracy
    assert min(result["diversity_pixel"], result["diversity_feature"]) >= diversity


def test_codes_are_predicted_from_generated_latents():
    """Correlation of each code with what D_e reads from the generated latent."""
    caglow = model("caglow-digits")
    u = 2 * torch.rand(500, 2, generator=torch.Generator().manual_seed(1)) - 1
    z = caglow.sample_latent(500, 0.9, torch.Generator().manual_seed(2), u=u)
    with torch.no_grad():
        read = caglow.supervision(z)[3]
    for k in range(2):
        assert torch.corrcoef(torch.stack([u[:, k], read[:, k]]))[0, 1] > 0.8


def test_a_rounded_flow_is_still_invertible():
    for name, data in (("caglow-digits", cg.data.digits()), (FACES, portraits(n=400))):
        caglow, x = model(name), data.split_images("test")[:50]
        with torch.no_grad():
            assert (caglow.decode(caglow.encode(x)) - x).abs().max() <= 1e-4


def test_ship_rounds_weights_only(tmp_path):
    torch.manual_seed(0)
    net = cg.Glow((1, 4, 4), levels=1, depth=1, width=4)
    cg.save(net, tmp_path / "run", finished=True)
    out = export_pretrained(tmp_path / "run", tmp_path / "small", origin="nowhere")
    again = cg.load(out)
    for name, t in net.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == t.dtype and torch.equal(
            found, t.half().float() if t.is_floating_point() else t)
    x = again.sample(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        x, cg.load(out).sample(2, generator=torch.Generator().manual_seed(0)))
    assert (read_tensors(out / "model.safetensors")[0]["prior_bias"].dtype
            == torch.float16)
    assert read_json(out / "card.json")["origin"] == "nowhere"
    cg.save(net, tmp_path / "half", finished=False)
    for source in ("half", "nowhere"):
        with pytest.raises(ValueError,
                           match=f"{source} holds no finished run; accepted"):
            export_pretrained(tmp_path / source, tmp_path / "none")
    with pytest.raises(ValueError, match="Tensor is not JSON serializable; accepted: "
                           "numbers, text"):
        export_pretrained(tmp_path / "run", tmp_path / "none", origin=torch.ones(1))
    assert not (tmp_path / "none").exists()


def test_ship_refuses_the_source_folder_and_is_repeatable(tmp_path):
    net = cg.Glow((1, 4, 4), levels=1, depth=1, width=4)
    cg.save(net, tmp_path / "run", finished=True, origin="here")
    with pytest.raises(ValueError,
                       match="holds the run itself.*accepted: another folder"):
        export_pretrained(tmp_path / "run", tmp_path / "none" / ".." / "run")
    assert (read_tensors(tmp_path / "run" / "model.safetensors")[0]["prior_bias"].dtype
            == torch.float32)
    assert read_json(export_pretrained(tmp_path / "run", tmp_path / "once")
                     / "card.json")["origin"] == "here"
    # a new fact takes the place of the old one
    twice = export_pretrained(tmp_path / "once", tmp_path / "twice", origin="there")
    assert read_json(twice / "card.json")["origin"] == "there"
    assert read_tensors(twice / "model.safetensors")[1]["rounded"]
    assert torch.equal(cg.load(twice).prior_bias, cg.load(tmp_path / "once").prior_bias)


def test_shipped_models_are_not_found_by_path_suffix():
    with pytest.raises(FileNotFoundError, match="no model 'nowhere/acgan-digits'"):
        cg.load("nowhere/acgan-digits")


def test_fit_on_a_shipped_model_returns_full_precision(tmp_path):
    data, options = cg.data.digits(8), {"images": 64, "progress": False}
    new = lambda: GAN(data.shape, noise=4, width=2)
    fit(new(), data, tmp_path / "run", **options)
    run = fit(new(), data, export_pretrained(tmp_path / "run", tmp_path / "out"),
              **options)
    assert (run.finished and run.images == 64
            and not (tmp_path / "out" / "state").exists())
    here, there = run.model.state_dict(), cg.load(tmp_path / "out").state_dict()
    assert all(torch.equal(t, there[name]) and t.dtype == there[name].dtype
               for name, t in here.items())


def test_ship_keeps_a_subset_of_training_conditions(tmp_path):
    torch.manual_seed(0)
    net = cg.CGlow((1, 4, 4), [cg.Classes("who", 50), cg.Real("age", 0, 80)], levels=1,
                   depth=1, width=4)
    rows = net.conditions.pack(3_000, who=torch.arange(3_000) % 50,
                               age=torch.linspace(0, 80, 3_000))
    net.store_condition_rows(rows)
    cg.save(net, tmp_path / "run", finished=True)
    again = cg.load(export_pretrained(tmp_path / "run", tmp_path / "small"))
    assert len(again.rows) == len(again.row_counts) == 2_000
    known = {tuple(r) for r in net.rows.half().float().tolist()}
    assert all(tuple(r) in known for r in again.rows.tolist())
    assert len(again.rows[:, :50].argmax(1).unique()) == 50
    assert again.sample(3, generator=torch.Generator().manual_seed(0)).isfinite().all()
