"""Laws of Glow and CGlow: density against autograd, exact round trips, whitening,
sampling, refusals, and learning.
"""

import math
import warnings

import pytest
import torch

from condgen.bijections import (ActNorm, ConditionalStandardize, bits_per_dim,
                                dequantize, split_channels, standard_normal_log_prob,
                                initialize_from_data)
from condgen.conditions import Binary, Classes, Code
from condgen.contracts import Batch, Noise
from condgen.models.cglow import CGlow
from condgen.models.coupling import NormConv, ZeroConv
from condgen.models.glow import (
    Glow, NonFiniteWarning, replace_nonfinite, glow_flow, warm_up_and_decay)
from condgen.training import fit

DIGIT = [Classes("digit", 3)]
KINDS = ["affine", "additive"]
EXACT = {torch.float64: 1e-10, torch.float32: 1e-4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kick(model, size=0.1, dtype=torch.float64):
    """Parameters away from their start, where zeros would hide mistakes."""
    model, generator = model.to(dtype), seeded()
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=generator,
                                    dtype=torch.float64).to(dtype)
    return model


def build(cls, shape=(1, 8, 8), levels=2, coupling="affine", **options):
    torch.manual_seed(0)
    conditions = {"conditions": DIGIT} if cls is CGlow else {}
    return cls(shape, **conditions, levels=levels, depth=2, width=8, coupling=coupling,
               **options)


def conditions_of(model, n, value=1):
    return {name: torch.full((n,), value) for name in model.conditions.names}


def packed(model, n):
    return model.conditions.pack(n, **conditions_of(model, n)).double()


class Bars:
    """Bright bars in one of three places: easy to learn, with a class."""

    name, sha256 = "bars", "0"

    def __init__(self, shape=(1, 8, 8)):
        self.shape = shape

    def table(self, split):
        n, g = {"train": 256, "val": 64, "test": 128}[split], seeded(len(split))
        k = torch.arange(n) % 3
        x = 30 + 20 * torch.rand(n, *self.shape, generator=g)
        for i in range(n):
            x[i, :, :, 1 + 2 * k[i] : 3 + 2 * k[i]] += (
                120 + 60 * torch.rand(1, generator=g))
        return {"x": x.to(torch.uint8), "c": torch.nn.functional.one_hot(k, 3).float()}


@pytest.fixture(scope="module", params=[Glow, CGlow], ids=["Glow", "CGlow"])
def trained(request):
    """A model after a few updates, and its run."""
    model = build(request.param, lr=1e-2)
    return model, fit(model, Bars(), images=32 * 30, batch=32, progress=False)


# law 1: the log-determinant is autograd's ---------------------------------------------

@pytest.mark.parametrize("coupling", KINDS)
@pytest.mark.parametrize("cls", [Glow, CGlow])
@pytest.mark.parametrize("shape, levels",
                         [((1, 4, 4), 2), ((3, 2, 2), 1), ((1, 8, 8), 3)],
                         ids=["N2", "rgb", "N3"])
def test_ladj_is_that_of_autograd_both_ways(cls, coupling, shape, levels):
    model = kick(build(cls, shape, levels, coupling))
    v, c = (torch.rand(2, *shape, generator=seeded(), dtype=torch.float64) - 0.5,
            packed(model, 2))
    z, ladj, _ = model.whiten(v, c)
    mean, log_std = model.prior(c[:1])

    def inverse(one):
        top = mean[0] + one[: model.top] * log_std[0].exp()
        return model.flow.inverse(torch.cat([top, one[model.top :]])[None]).flatten()

    for i in range(2):
        there = torch.autograd.functional.jacobian(
            lambda a: model.whiten(a[None], c[:1])[0][0], v[i])
        back = torch.autograd.functional.jacobian(inverse, z[i])
        assert abs(torch.linalg.slogdet(there.view(model.dims, -1))[1] - ladj[i]) < 1e-9
        assert abs(torch.linalg.slogdet(back)[1] + ladj[i]) < 1e-9


# law 2: decode ∘ encode is the identity -----------------------------------------------

@pytest.mark.parametrize("dtype", EXACT, ids=["float64", "float32"])
@pytest.mark.parametrize("coupling", KINDS)
@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("cls", [Glow, CGlow])
def test_round_trip(cls, levels, coupling, dtype):
    x = torch.rand(5, 1, 8, 8, generator=seeded(), dtype=dtype)
    fresh = build(cls, levels=levels, coupling=coupling).to(dtype)
    initialize_from_data(fresh.flow, dequantize(x, torch.full_like(x, 0.5)))
    for model in (fresh,
                  kick(build(cls, levels=levels, coupling=coupling), 0.05, dtype)):
        given = conditions_of(model, 5)
        with torch.no_grad():
            z = model.encode(x, **given)
            assert z.shape == (5, 64) and z.dtype == dtype
            assert (model.decode(z, **given) - x).abs().max() < EXACT[dtype]


def test_round_trip_after_training(trained):
    model, _ = trained
    x = Bars().table("test")["x"][:16].float() / 255
    given = conditions_of(model, 16)
    with torch.no_grad():
        back = model.decode(model.encode(x, **given), **given)
    assert (back - x).abs().max() < 1e-4
    assert torch.equal((back * 255).round(), (x * 255).round())


@pytest.mark.parametrize("cls", [Glow, CGlow])
def test_odd_channels(cls):
    model = kick(build(cls, (3, 8, 8)))
    x = torch.rand(2, 3, 8, 8, generator=seeded())
    given = conditions_of(model, 2)
    assert (model.decode(model.encode(x, **given), **given) - x).abs().max() < 1e-10
    assert model.sample(2).shape == (2, 3, 8, 8)
    assert model.flow.shapes == [(6, 4, 4), (24, 2, 2)]


def test_double_model_accepts_single_precision_images():
    model = kick(build(Glow))
    x = torch.rand(2, 1, 8, 8, generator=seeded())
    assert model.encode(x).dtype == model.log_prob(x).dtype == torch.float64
    assert model.decode(torch.zeros(1, 64)).dtype == torch.float64


# the whitened latent ------------------------------------------------------------

@pytest.mark.parametrize("coupling", KINDS)
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("cls", [Glow, CGlow])
def test_whitened_density_is_the_sum_of_the_priors(cls, levels, coupling):
    """As the paper adds it up: log-determinants, a prior at each
    split, a prior at the top.
    """
    model = kick(build(cls, levels=levels, coupling=coupling))
    v, c = (torch.rand(3, 1, 8, 8, generator=seeded(), dtype=torch.float64) - 0.5,
            packed(model, 3))
    x, total, normal = v, 0, torch.distributions.Normal
    for layer in (layer for level in model.flow.levels for layer in level.layers):
        if isinstance(layer, ConditionalStandardize):
            x, out = split_channels(x)
            mean, log_std = layer.mean_logstd(layer.net(x))
            total = total + normal(mean, log_std.exp()).log_prob(out).sum((1, 2, 3))
        else:
            x, ladj = layer(x)
            total = total + ladj
    mean, log_std = model.prior(c)
    total = total + normal(mean, log_std.exp()).log_prob(x.flatten(1)).sum(1)
    log_p, top = model.log_density(v, c)
    assert torch.allclose(log_p, total, atol=1e-9)
    assert torch.equal(top, x.flatten(1))


def test_the_density_integrates_to_one():
    """Law 3 in four dimensions, by importance sampling; false alarm rate below 1e-6."""
    torch.manual_seed(0)
    model = kick(Glow((1, 2, 2), levels=1, depth=2, width=8), 0.3)
    with torch.no_grad():
        mean, log_std = model.prior(torch.zeros(4000, 0))
        z = (mean + torch.randn(4000, 4, generator=seeded(), dtype=torch.float64)
             * log_std.exp())
        v = model.flow.inverse(z).flatten(1)
        proposal = torch.distributions.MultivariateNormal(v.mean(0), 2 * v.T.cov())
        u = proposal.sample((20_000,))
        ratio = (model.log_density(u.view(-1, 1, 2, 2), u.new_zeros(len(u), 0))[0]
                 - proposal.log_prob(u)).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / len(u) ** 0.5 < 0.1


def test_log_prob_is_the_loss_in_nats():
    model = kick(build(Glow), dtype=torch.float32)
    batch = Batch(Bars().table("test"), Noise(("key",), slice(None), 128))
    (weight, bpd), = model.loss(batch).values()
    log_p = model.log_prob(batch.x, generator=batch.noise.generator("dequantize"))
    assert (weight == 1.0
            and torch.isclose(bpd, bits_per_dim(log_p, 64).mean(), rtol=1e-6))
    assert torch.isclose(log_p.mean(), -bpd * 64 * math.log(2), rtol=1e-6)


# structure ------------------------------------------------------------

TOPS = [((1, 32, 32), (16, 4, 4)), ((3, 32, 32), (48, 4, 4)), ((3, 64, 64), (48, 8, 8))]


@pytest.mark.parametrize("shape, top", TOPS)
def test_latent_shapes(shape, top):
    flow = glow_flow(shape, levels=3, depth=1, width=2)
    assert flow.shapes[-1] == top
    assert sum(map(math.prod, flow.shapes)) == math.prod(shape)


def test_initial_flow_is_affine_and_not_the_identity():
    flow = build(Glow).double().flow
    a, b = torch.randn(2, 4, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    assert (flow((a + b) / 2)[0] - (flow(a)[0] + flow(b)[0]) / 2).abs().max() < 1e-12
    assert flow(a)[1].std() < 1e-12
    assert flow(a)[1][0] < -1
    bent = kick(build(Glow)).flow
    assert (bent((a + b) / 2)[0] - (bent(a)[0] + bent(b)[0]) / 2).abs().max() > 1e-3


def test_initialisation_of_coupling_network_layers():
    torch.manual_seed(0)
    conv, x = NormConv(3, 16, 3), 4 + 2 * torch.randn(64, 3, 6, 6, generator=seeded())
    initialize_from_data(conv, x)
    y = conv(x)
    assert (y.mean((0, 2, 3)).abs().max() < 1e-4
            and (y.std((0, 2, 3)) - 1).abs().max() < 1e-3)
    zero = ZeroConv(3, 4)
    assert zero(x).abs().max() == 0
    zero(x).sum().backward()
    assert zero.conv.weight.grad.abs().min() > 0


def test_training_starts_from_white_noise():
    model, data = build(Glow), Bars()
    x = dequantize(data.table("train")["x"].float() / 255,
                   torch.rand(256, 1, 8, 8, generator=seeded()))
    nothing = torch.zeros(256, 0)
    before = model.log_density(x, nothing)[0].mean()
    initialize_from_data(model.flow, x)
    z = model.whiten(x, nothing)[0]
    assert model.log_density(x, nothing)[0].mean() > before + 20
    assert 0.6 < z.std() < 1.2


def test_learning_rate_factor():
    assert [round(warm_up_and_decay(p), 3) for p in (0, 0.03, 0.6, 0.8, 1)] == [
        0.033, 1, 1, 0.5, 0.02]


def test_arguments_rebuild_the_model():
    for model in (build(Glow), build(CGlow, class_weight=0.5)):
        twin = type(model)(**model.arguments)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin.sample(2, generator=seeded()),
                           model.sample(2, generator=seeded()))


# sampling ------------------------------------------------------------

def test_samples_are_images_and_repeat_with_their_generator(trained):
    model, _ = trained
    x = model.sample(6, temperature=0.9, generator=seeded(1))
    assert (x.shape == (6, 1, 8, 8) and x.min() >= 0 and x.max() <= 1
            and not x.requires_grad)
    assert torch.equal(x, model.sample(6, temperature=0.9, generator=seeded(1)))
    assert not torch.equal(x, model.sample(6, temperature=0.9, generator=seeded(2)))


def test_temperature_zero_gives_equal_images(trained):
    model, _ = trained
    x = model.sample(5, temperature=0.0, **conditions_of(model, 5))
    assert (x - x[:1]).abs().max() < 1e-6
    assert model.sample(50, temperature=0.8, generator=seeded()).std(0).mean() > \
        model.sample(50, temperature=0.4, generator=seeded()).std(0).mean()


def test_temperature_reaches_every_level():
    model = kick(build(Glow, levels=3))
    z = 0.3 * torch.randn(1, 64, generator=seeded(), dtype=torch.float64)
    assert torch.allclose(model.sample(1, 0.3, seeded()), model.decode(z), atol=1e-12)


def test_temperature_exponent_is_the_inverse_of_the_printed():
    """Law 11: p_T ∝ p^(1/T²), not p^(T²), and exactly so only for additive
    couplings at one level.
    """
    v, T = torch.rand(100, 1, 8, 8, generator=seeded(), dtype=torch.float64) - 0.5, 0.7

    def spread(model, exponent):
        with torch.no_grad():
            z, ladj, _ = model.whiten(v, v.new_zeros(100, 0))
        log_p, log_p_T = (standard_normal_log_prob(z) + ladj,
                          standard_normal_log_prob(z / T) + ladj)
        return (log_p_T - exponent * log_p).std()

    sizes = [(1, "additive"), (2, "additive"), (1, "affine")]
    one, two, affine = (kick(build(Glow, levels=n, coupling=kind)) for n, kind in sizes)
    assert spread(one, 1 / T**2) < 1e-9 < 0.1 < spread(one, T**2)
    assert spread(two, 1 / T**2) > 1e-3 and spread(affine, 1 / T**2) > 1e-3


@pytest.mark.parametrize("cls", [Glow, CGlow])
def test_interpolation_ends_at_its_images(cls):
    model = kick(build(cls))
    a, b = torch.rand(2, 1, 8, 8, generator=seeded())
    path = model.interpolate(a, b, 5, **dict.fromkeys(model.conditions.names, 2))
    assert path.shape == (5, 1, 8, 8)
    assert (path[0] - a).abs().max() < 1e-9 and (path[-1] - b).abs().max() < 1e-9


# refusals ------------------------------------------------------------

def test_28_pixels_do_not_fit_three_levels():
    with pytest.raises(ValueError,
                       match="28×28.*divisible by 8.*pad 28×28 digits to 32×32"):
        Glow((1, 28, 28), levels=3)
    assert Glow((1, 28, 28), levels=2, depth=1, width=4).dims == 784


@pytest.mark.parametrize("options, message",
                         [({"coupling": "afine"}, "did you mean 'affine'"),
                          ({"levels": 0}, "levels=0; accepted: an integer, 1 or more"),
                          ({"depth": 0}, "depth=0"), ({"width": 0}, "width=0")])
def test_impossible_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        Glow((1, 8, 8), **{"levels": 1, "depth": 1, "width": 4, **options})


@pytest.mark.parametrize(
    "x", [torch.full((2, 1, 8, 8), math.nan), torch.full((2, 1, 8, 8), 1.5),
          torch.full((2, 1, 8, 8), -0.1), torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
          torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 4), torch.zeros(1, 8, 8)],
    ids=["nan", "bright", "dark", "uint8", "channels", "size", "no batch"])
def test_wrong_images(x):
    model = build(Glow)
    for verb in (model.encode, model.log_prob):
        with pytest.raises(ValueError, match="accepted"):
            verb(x)


@pytest.mark.parametrize(
    "z, message", [(torch.zeros(2, 63), r"\(2, 63\); accepted: a tensor \(n, 64\)"),
                   (torch.zeros(64), "accepted"),
                   (torch.full((2, 64), math.nan), "128 values that are not finite"),
                   (torch.full((1, 64), math.inf), "not finite")])
def test_wrong_latents(z, message):
    with pytest.raises(ValueError, match=message):
        build(Glow).decode(z)


def test_unknown_conditions():
    model, x = build(CGlow), torch.zeros(2, 1, 8, 8)
    for call in (lambda: model.sample(2, digt=1), lambda: model.encode(x, digt=1),
                 lambda: model.log_prob(x, digt=1),
                 lambda: model.decode(torch.zeros(2, 64), digt=1)):
        with pytest.raises(ValueError,
                           match="unknown condition 'digt'.*did you mean 'digit'"):
            call()
    with pytest.raises(ValueError, match="accepted: integers 0 to 2"):
        model.sample(2, digit=3)
    with pytest.raises(ValueError, match="'digit' is missing"):
        model.encode(x)
    with pytest.raises(ValueError, match="unknown condition 'digit'"):
        build(Glow).sample(2, digit=1)
    with pytest.raises(ValueError, match="n=0"):
        build(Glow).sample(0)


def test_cglow_needs_supervised_conditions():
    for conditions in ([], [Classes("digit", 3), Code("u", 2)]):
        with pytest.raises(ValueError, match="accepted: one or more supervised"):
            CGlow((1, 8, 8), conditions, levels=1, depth=1, width=4)


# overflow ------------------------------------------------------------

def test_overflow_is_named():
    model = build(Glow)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, ActNorm)):
            layer.log_scale -= 60
    with pytest.warns(NonFiniteWarning,
                      match="4 of 4 images are not finite: the inverse flow"):
        x = model.sample(4, temperature=1.0)
    assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1


def test_finite_counts_bad_images_and_keeps_good_ones():
    v = torch.zeros(3, 1, 2, 2)
    v[1, 0, 0, 0], v[1, 0, 1, 1] = math.inf, math.nan
    with pytest.warns(NonFiniteWarning, match="1 of 3 images are not finite: a test"):
        w = replace_nonfinite(v, "a test")
    assert w[1, 0, 0, 0] == 0.5 and w[1, 0, 1, 1] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good = torch.full((1, 1, 2, 2), 1e4)
        assert torch.equal(replace_nonfinite(good, "a test"), good)


# CGlow ------------------------------------------------------------

def test_initial_cglow_does_not_depend_on_the_class():
    model = build(CGlow)
    mean, log_std = model.prior(torch.eye(3))
    assert mean.abs().max() == 0 and log_std.abs().max() == 0
    assert torch.equal(model.classify(torch.randn(2, model.top)), torch.zeros(2, 3))


def test_cglow_loss_is_bpd_plus_weighted_class_bits():
    model = build(CGlow, class_weight=0.02)
    batch = Batch(Bars().table("test"), Noise(("key",), slice(None), 128))
    terms = model.loss(batch)
    total = sum(weight * value for weight, value in terms.values())
    assert torch.isclose(total, terms["bpd"][1] + 0.02 * math.log2(3))


def test_several_conditions_have_a_term_each():
    torch.manual_seed(0)
    model = CGlow((1, 8, 8), [Classes("digit", 3), Binary("bold")], levels=1, depth=1,
                  width=4)
    table = Bars().table("val")
    table["c"] = torch.cat([table["c"], torch.ones(64, 1)], 1)
    terms = model.loss(Batch(table, Noise(("key",), slice(None), 64)))
    assert set(terms) == {"bpd", "digit", "bold"}
    assert model.sample(2, digit=1, bold=0).shape == (2, 1, 8, 8)


def test_bayes_in_one_pass():
    """Only the top prior depends on the class, so ten densities differ by ten
    Gaussians of the top latent.
    """
    model = kick(build(CGlow))
    v = torch.rand(4, 1, 8, 8, generator=seeded(), dtype=torch.float64) - 0.5
    log_p = torch.stack([model.log_density(v, c.expand(4, -1))[0]
                         for c in torch.eye(3).double()], 1).detach()
    raw, _ = model.flow(v)
    mean, log_std = model.prior(torch.eye(3).double())
    top = torch.distributions.Normal(mean, log_std.exp()).log_prob(
        raw[:, None, : model.top]).sum(2).detach()
    assert torch.allclose(log_p.log_softmax(1), top.log_softmax(1), atol=1e-9)
    assert log_p.std(1).min() > 1e-3


def test_training_separates_the_class_priors():
    torch.manual_seed(0)
    model, data = CGlow((1, 8, 8), DIGIT, levels=2, depth=2, width=8, lr=1e-2), Bars()
    fit(model, data, images=32 * 40, batch=32, progress=False)
    mean, _ = model.prior(torch.eye(3))
    assert (mean[0] - mean[1]).abs().max() > 0.1
    x, labels = data.table("test")["x"].float() / 255, data.table("test")["c"].argmax(1)
    with torch.no_grad():
        log_p = torch.stack(
            [model.log_prob(x, generator=seeded(), digit=k) for k in range(3)], 1)
    assert (log_p.argmax(1) == labels).double().mean() > 0.8
    a, b = (model.sample(4, temperature=0.5, generator=seeded(), digit=k)
            for k in (0, 2))
    assert (a - b).abs().mean() > 0.02  # law 7: the same noise, another class
    assert (a[..., 1:3].mean() > b[..., 1:3].mean()
            and a[..., 5:7].mean() < b[..., 5:7].mean())


# law 10 ------------------------------------------------------------

def test_a_tiny_run_improves_bits_per_dim(trained):
    _, run = trained
    validation = [row["validation"] for row in run.log if "validation" in row]
    assert validation[-1] < validation[0] - 0.5
    assert min(validation) < 7.2
