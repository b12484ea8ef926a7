"""VAE: both terms of its bound, the bound against quadrature, verbs,
conditions, refusals, reload.
"""

import math

import pytest
import torch
from bars import BAR, KNOWN, Bars, batch_of, places, seeded

from condgen.conditions import Code
from condgen.models.vae import LIKELIHOODS, VAE, importance_bound, reparametrize
from condgen.runs import load, save
from condgen.trainer import set_trainable
from condgen.training import fit

SMALL = {"latent": 3, "width": 4}


def build(conditions=(), **options):
    torch.manual_seed(0)
    return VAE((1, 8, 8), conditions, **{**SMALL, **options})


def test_images():
    return Bars().split_images("test")


test_images.__test__ = False


# The bound


def test_reparametrized_draws_have_the_mean_and_the_deviation():
    mean, log_std = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 0.7]])
    z = reparametrize(mean, log_std, torch.randn(100_000, 2, generator=seeded()))
    assert torch.allclose(z.mean(0), mean[0], atol=0.05)
    assert torch.allclose(z.std(0), log_std[0].exp(), rtol=0.02)


def test_importance_bound_is_the_log_of_the_mean_weight():
    w = torch.rand(5, 3, dtype=torch.float64, generator=seeded()) + 0.1
    assert torch.allclose(importance_bound(w.log()), w.mean(0).log())
    assert torch.allclose(importance_bound(w.log() - 2_000), w.mean(0).log() - 2_000)
    assert torch.equal(importance_bound(w[:1].log()), w[0].log())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_loss_terms_are_those_of_the_definition(likelihood):
    model = build(likelihood=likelihood).eval()
    batch = batch_of((), 16)
    with torch.no_grad():
        mean, log_std = model.encoder(batch.x).chunk(2, 1)
        z = mean + log_std.exp() * batch.randn("eps", 3)
        y = torch.sigmoid(model.decoder(z))
        kl = 0.5 * (mean**2 + log_std.exp() ** 2 - 1 - 2 * log_std).sum(1).mean()
        if likelihood == "gaussian":
            s = model.log_std.exp()
            log_p = torch.distributions.Normal(y, s).log_prob(batch.x)
        else:
            log_p = batch.x * y.log() + (1 - batch.x) * (1 - y).log()
        terms = model.loss(batch)
    assert {name: weight for name, (weight, _) in terms.items()} == {
        "reconstruction": 1, "KL": 1}
    assert torch.isclose(terms["KL"][1], kl, rtol=1e-5)
    assert torch.isclose(terms["reconstruction"][1], -log_p.flatten(1).sum(1).mean(),
                         rtol=1e-4)


def test_bound_stays_below_quadrature_and_approaches_it():
    """With one latent the likelihood is an integral over a line."""
    model, x = build(latent=1).double().eval(), test_images()[:4].double()
    with torch.no_grad():
        for p in model.encoder[-1].parameters():
            p.mul_(0.3)
        z = torch.linspace(-8, 8, 4_001, dtype=torch.float64)[:, None]
        prior = torch.distributions.Normal(0, 1).log_prob(z[:, 0].double())
        each = [model.log_likelihood(image.expand(len(z), -1, -1, -1),
                                     z.new_zeros(len(z), 0), z)
                for image in x]
    exact = torch.stack([(e + prior).logsumexp(0) for e in each]) + math.log(16 / 4_000)
    one = torch.stack([model.elbo(x, 1, seeded(k)) for k in range(300)])
    many = model.elbo(x, 4_000, seeded(1))
    assert bool((one.mean(0) < exact + 5 * one.std(0) / 300**0.5).all())
    assert bool((one.mean(0) < many).all())
    assert torch.allclose(many, exact, atol=0.2)


def test_kl_weight_scales_the_term_and_not_the_bound():
    light, heavy = build(kl_weight=0.5).eval(), build(kl_weight=2.0).eval()
    batch, x = batch_of((), 8), test_images()[:3]
    terms = [model.loss(batch)["KL"] for model in (light, heavy)]
    assert [weight for weight, _ in terms] == [0.5, 2.0] and terms[0][1] == terms[1][1]
    assert torch.equal(light.elbo(x, 2, seeded()), heavy.elbo(x, 2, seeded()))


# Training


@pytest.mark.parametrize("conditions", [(), KNOWN], ids=["plain", "conditions"])
def test_law_4_the_player_updates_all_parameters(conditions):
    model = build(conditions)
    player, = model.players(model.stages()[0])
    assert {id(p) for p in player.params} == {id(p) for p in model.parameters()}
    set_trainable(model, player)
    sum(w * v for w, v in player.loss(batch_of(conditions)).values()).backward()
    silent = {name for name, p in model.named_parameters()
              if p.grad is None or not p.grad.any()}
    # in front of a batch normalisation
    assert all(name.endswith("bias") for name in silent)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_training_raises_the_bound_and_improves_reconstruction(likelihood):
    model, x = build(likelihood=likelihood), test_images()
    before = (model.elbo(x, 1, seeded()).mean(),
              (model.eval().reconstruct(x) - x).abs().mean())
    fit(model, Bars(), images=9_600, progress=False)
    after = model.elbo(x, 1, seeded()).mean(), (model.reconstruct(x) - x).abs().mean()
    assert after[0] > before[0] + 5 and after[1] < 0.5 * before[1]


def test_without_a_kl_term_codes_leave_the_prior():
    spread = {}
    for weight in (0.0, 1.0):
        model = build(kl_weight=weight)
        fit(model, Bars(), images=3_200, progress=False)
        with torch.no_grad():
            mean, log_std = model.posterior(test_images())
        spread[weight] = (mean.square() + (2 * log_std).exp()).mean().item()
    assert abs(spread[1.0] - 1) < 0.1 and spread[0.0] > 1.5


def test_law_5_resumed_run_equals_uninterrupted_run(tmp_path):
    whole, parts, stops = build(KNOWN), build(KNOWN), 0
    fit(whole, Bars(KNOWN), tmp_path / "a", images=320, progress=False)
    while not fit(parts, Bars(KNOWN), tmp_path / "b", images=320, budget=0,
                  progress=False).finished:
        parts, stops = build(KNOWN), stops + 1
    a, b = whole.state_dict(), parts.state_dict()
    assert stops >= 3 and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_law_6_loaded_model_gives_the_same_samples(likelihood, tmp_path):
    model = build((BAR,), likelihood=likelihood)
    fit(model, Bars(), images=128, progress=False)
    save(model, tmp_path)
    again = load(tmp_path)
    assert type(again) is VAE
    assert torch.equal(model.sample(4, generator=seeded()),
                       again.sample(4, generator=seeded()))


def test_law_7_samples_depend_on_condition_and_latent():
    model = build((BAR,), width=8)
    fit(model, Bars(), images=9_600, progress=False)
    wanted = torch.arange(99) % 3
    x = model.sample(99, generator=seeded(2), bar=wanted)
    assert (places(x) == wanted).float().mean() > 0.9
    assert model.sample(99, generator=seeded(2), bar=0).std(0).mean() > 3e-3


# Verbs


def test_encode_decode_and_reconstruct_are_consistent():
    model, x = build(KNOWN).eval(), test_images()[:4]
    known = {"bar": [0, 1, 2, 0], "bold": 1, "light": 5.0}
    z = model.encode(x)
    y = model.decode(z, **known)
    assert (z.shape == (4, 3) and y.shape == (4, 1, 8, 8) and 0 <= y.min()
            and y.max() <= 1)
    assert torch.equal(model.reconstruct(x, **known), y) and not y.requires_grad
    path = model.interpolate(x[0], x[1], 5, bar=1, bold=0, light=1.0)
    ends = model.reconstruct(x[:2], bar=1, bold=0, light=1.0)
    assert torch.allclose(path[[0, -1]], ends, atol=1e-6)
    assert model.elbo(x, 2, seeded(), **known).shape == (4,)


def test_samples_are_decoded_draws_of_the_prior():
    model = build().eval()
    for t in (0.3, 1.0):
        z = t * torch.randn(4, 3, generator=seeded_after_conditions(model))
        assert torch.equal(model.sample(4, t, seeded(7)), model.decode(z))
    still = model.sample(3, temperature=0)
    assert torch.allclose(still, still[:1].expand_as(still), atol=1e-6)


def seeded_after_conditions(model):
    """The generator as `sample` leaves it after drawing no conditions."""
    g = seeded(7)
    model.condition(4, g)
    return g


def test_without_conditions_only_the_bound_is_offered():
    model = build()
    for verb in ("log_prob", "edit"):
        assert not hasattr(model, verb)
    with pytest.raises(ValueError, match="unknown condition 'bar'"):
        model.sample(2, bar=1)


@pytest.mark.parametrize(("options", "message"), [
    ({"likelihood": "gausian"}, "did you mean 'gaussian'"),
    ({"conditions": [Code("u", 2)]}, r"codes \['u'\]; accepted"),
    ({"conditions": None}, "conditions=None; accepted"),
    ({"shape": None}, "shape None; accepted"), ({"shape": (1, 12, 12)}, "12×12 pixels"),
    ({"latent": 0}, "latent=0; accepted"), ({"width": 0}, "width=0; accepted"),
    ({"kl_weight": -1.0}, "kl_weight=-1.0; accepted"),
    ({"lr": math.nan}, "lr=nan; accepted"),
    ({"likelihood": 3}, "likelihood=3; accepted")])
def test_constructor_refuses_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        VAE(**{"shape": (1, 8, 8), **SMALL, **options})


@pytest.mark.parametrize(
    "call", [lambda m, x: m.elbo(x, 0), lambda m, x: m.elbo(x[0]),
             lambda m, x: m.elbo(2 * x + 1), lambda m, x: m.decode(x),
             lambda m, x: m.decode([[0.0] * 3]), lambda m, x: m.interpolate(x, x, 3),
             lambda m, x: m.sample(0), lambda m, x: m.sample(2, -1.0),
             lambda m, x: m.elbo(x, bar=1), lambda m, x: m.encode(x.tolist())])
def test_methods_refuse_invalid_arguments(call):
    with pytest.raises(ValueError, match="accepted"):
        call(build(), test_images()[:2])
