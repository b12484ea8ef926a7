"""Laws of every public model: what its verbs return, and what it refuses.

The models are found by their classes, so that a new one inherits the laws.
"""

import inspect
import math
from functools import cache

import pytest
import torch

import condgen as cg
from condgen.conditions import Classes
from condgen.contracts import GeneratorModel, Model
from condgen.models.coupling import GlowStep
from condgen.recipes import declared

SHAPE = (3, 16, 16)
# sizes that make a model small, and what base classes ask for
SMALL = {"levels": 2, "depth": 1, "width": 4, "hidden": 8, "noise": 4, "latent": 4,
         "code": 4}
REQUIRED = {"weight": 0.1, "lr": 1e-3, "game": "hinge", "likelihood": "gaussian",
            "modern": False, "penalty": 1.0, "conditions": [Classes("k", 3)]}
KINDS = {name: getattr(cg, name) for name in cg.model_modules()}
IMAGE_VERBS = "encode", "reconstruct", "edit", "log_prob", "elbo", "features"


def parameters(kind):
    """What the constructor takes, besides `self`."""
    return inspect.signature(kind).parameters


def arguments(kind):
    """Of a small model of this class."""
    known = parameters(kind)
    found = {name: n for name, n in SMALL.items()
             if name in known and known[name].annotation is int}
    return found | {name: value for name, value in REQUIRED.items() if name in known and (
        name == "conditions" or known[name].default is inspect.Parameter.empty)}


def make(kind, **given):
    torch.manual_seed(0)
    return kind(**{"shape": SHAPE, **arguments(kind), **given})


def generates(kind):
    """Whether a class is no mere base: its `sample` has what it needs."""
    if issubclass(kind, GeneratorModel):
        return kind.generate is not GeneratorModel.generate
    return hasattr(kind, "sample") and kind.stages is not Model.stages


GENERATORS = [name for name, kind in KINDS.items() if generates(kind)]
EVALUATORS = [name for name, kind in KINDS.items() if issubclass(kind, cg.Evaluator)]
model = cache(lambda name: make(KINDS[name]))


def call(name, verb, *args, **options):
    """A verb with a value for every condition, where it takes any."""
    f = getattr(model(name), verb)
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(f).parameters.values()):
        options |= dict.fromkeys(model(name).conditions.names, 1)
    return f(*args, **options)


def images(n=2):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(n))


def verbs(name, which):
    return [verb for verb in which if hasattr(model(name), verb)]


def refused(name, verb, *args):
    """The message with which a verb refuses its arguments."""
    with pytest.raises(ValueError, match="accepted") as found:
        call(name, verb, *args)
    return str(found.value)


def test_the_models_of_all_recipes_are_tested():
    trained = {recipe.model.rpartition(".")[2] for recipe in declared("RECIPES").values()}
    # take an image; see test_srntt.py
    upscalers = {"SISR", "AdversarialSISR", "SRNTT", "GatedTransfer",
                 "CosineGatedTransfer"}
    assert trained <= {*GENERATORS, *EVALUATORS} | upscalers


@pytest.mark.parametrize("name", GENERATORS)
def test_images_are_contiguous_and_within_bounds(name):
    x, found = images(), {"sample": call(name, "sample", 2)}
    for verb in verbs(name, ["reconstruct", "edit"]):
        found[verb] = call(name, verb, x)
    if hasattr(model(name), "encode"):
        z = call(name, "encode", x)
        assert z.is_contiguous() and z.dim() == 2 and len(z) == 2
        found["decode"] = call(name, "decode", z)
        found["interpolate"] = call(name, "interpolate", *x, 2)
    for verb, y in found.items():
        assert y.shape == x.shape and y.dtype == torch.float32, verb
        assert y.is_contiguous() and 0 <= y.min() and y.max() <= 1, verb
    with torch.no_grad():
        once = call(name, "sample", 1)
    assert once.view(1, -1).shape[1] == math.prod(SHAPE)


def test_guided_images_are_contiguous():
    guide = make(cg.GuideClassifier)
    sampler = cg.GuidedSampler(model("CAGlow"), guide, max_steps=2)
    x = sampler.sample(2, k=1)
    assert x.shape == (2, *SHAPE) and x.is_contiguous()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_a_step_returns_contiguous_maps(coupling, layout):
    step = GlowStep(4, 8, coupling)
    x = torch.rand(2, 4, 2, 6).contiguous(memory_format=layout)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, _ = step(x)
            assert y.is_contiguous() and step.inverse(y).is_contiguous()
            assert step.layers[2].net(x[:, :2]).is_contiguous()


BAD = {
    "None": lambda x: None, "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
    "complex": lambda x: x.to(torch.complex64), "bytes": lambda x: x.byte(),
    "integers": lambda x: x.long(), "truth values": lambda x: x > 0.5,
    "float8": lambda x: x.to(torch.float8_e4m3fn), "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "one item": lambda x: x[0], "no batch at all": lambda x: x.sum(),
    "another size": lambda x: x[..., :-1], "one more axis": lambda x: x[None],
    "nan": lambda x: x * math.nan, "infinite": lambda x: x / 0}
BRIGHT = {"too bright": lambda x: x + 1, "too dark": lambda x: x - 1}


@pytest.mark.filterwarnings("ignore::UserWarning")  # prototypes of PyTorch
@pytest.mark.parametrize("name", GENERATORS + EVALUATORS)
def test_images_that_are_none_are_refused(name):
    for verb in verbs(name, IMAGE_VERBS):
        for kind, spoil in (BAD | BRIGHT).items():
            message = refused(name, verb, spoil(images()))
            assert message.startswith("images "), (verb, kind, message)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in GENERATORS
                                  if hasattr(KINDS[name], "decode")])
def test_latents_that_are_none_are_refused(name):
    z = call(name, "encode", images()).detach()
    for kind, spoil in BAD.items():
        assert refused(name, "decode", spoil(z)).startswith(("latents ", "codes ")), kind


@pytest.mark.parametrize("name", GENERATORS + EVALUATORS)
def test_empty_batches_are_refused(name):
    """By every verb of every model, as `sample(0)` is."""
    for verb in verbs(name, IMAGE_VERBS):
        assert "an empty batch" in refused(name, verb, images()[:0])
    if name in GENERATORS:
        assert "n=0" in refused(name, "sample", 0)
        if hasattr(model(name), "decode"):
            assert "an empty batch" in refused(
                name, "decode", call(name, "encode", images())[:0])


@pytest.mark.parametrize("name", [name for name in GENERATORS
                                  if hasattr(KINDS[name], "interpolate")])
def test_interpolation_refuses(name):
    a, b = images()
    for n in (0, -1, 2.5, None, True, "3", math.nan):
        assert refused(name, "interpolate", a, b, n).startswith(f"n={n!r}; ")
    for other in (b[..., :-1], b[:1], b[None], b.to(torch.complex64), b.to_sparse(),
                  b.to("meta"), b.byte(), b.tolist(), None):
        for pair in ((a, other), (other, a)):
            assert "an image " in refused(name, "interpolate", *pair, 3)
    assert "values from" in refused(name, "interpolate", a, b + 1, 3)
    assert call(name, "interpolate", a, b.double(), 3).shape == (3, *SHAPE)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_that_are_none_are_refused(name):
    for verb in verbs(name, ["sample", "log_prob", "elbo"]):
        f, given = getattr(model(name), verb), 2 if verb == "sample" else images()
        with pytest.raises(ValueError, match="generator=3; accepted: torch.Generator"):
            f(given, generator=3)


# constructors --------------------------------------------------------------------

WRONG = {
    int: [0, -1, 1.5, 2.0, "3", None, True, math.nan, 1j, [4]],
    float: [-1, -0.1, math.nan, math.inf, -math.inf, "1", None, True, 1j, [0.1]],
    bool: ["yes", 0, 1, 2.0],
    dict: [5, "C", [1.0], {"C": -1}, {"C": math.nan}, {"C": "1"}, {"C": None},
           {"C": True}, {"no such loss": 1.0}],
}


def numeric(kind):
    """Parameters that take numbers, switches or weights, with wrong values of each."""
    for name, p in parameters(kind).items():
        text = inspect.formatannotation(p.annotation)
        for type_, values in WRONG.items():
            if text.startswith(type_.__name__):
                optional = text.endswith("| None")
                yield name, [v for v in values if v is not None or not optional]


CHECKED = [(name, parameter) for name, kind in KINDS.items()
           for parameter, _ in numeric(kind)]


def test_parameters_of_models_are_annotated():
    """By what the other tests find them."""
    for name, kind in KINDS.items():
        for p in parameters(kind).values():
            assert p.annotation is not inspect.Parameter.empty, (name, p.name)
    assert len(CHECKED) > 100
    for wanted in [("Glow", "lr"), ("CGlow", "class_weight"), ("CAGlow", "weights"),
                   ("CAGlow", "pretrained"), ("VAE", "kl_weight"), ("DCGAN", "slope"),
                   ("Evaluator", "width"), ("DecoupledAE", "weight")]:
        assert wanted in CHECKED


@pytest.mark.parametrize(("name", "parameter"), CHECKED)
def test_numbers_out_of_range_are_refused(name, parameter):
    """The message names the parameter and says what is accepted."""
    for value in dict(numeric(KINDS[name]))[parameter]:
        if parameter == "weights" and issubclass(KINDS[name], cg.CAAE):
            value = ({"E": value["C"]} if isinstance(value, dict) and "C" in value
                     else value)
        with pytest.raises(ValueError, match="accepted") as found:
            make(KINDS[name], **{parameter: value})
        assert str(found.value).startswith(
            (f"{parameter}=", "weight of ")), (value, found.value)


@pytest.mark.parametrize("name", KINDS)
def test_shapes_that_are_none_are_refused(name):
    for shape in (None, 16, (16, 16), (3, 16, 0), (3, 16, -16), (3, 16.0, 16), "abc",
                  (True, 16, 16), (3, "16", 16)):
        with pytest.raises(ValueError, match=r"shape .*accepted: \(channels, height, w"):
            make(KINDS[name], shape=shape)
