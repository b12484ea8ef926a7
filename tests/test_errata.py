"""Law 11: what is printed wrong exists in both forms, and they differ
as chapter 904 says.
"""

import ast
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from condgen.conditions import Classes, Code, Schema
from condgen.contracts import Batch, Noise
from condgen.bounds import condition_bound, mutual_information
from condgen.divergences import js, kl, js_from_kls, mixture
from condgen.models.avae import AVAE
from condgen.models.caglow import CAGlow
from condgen.models.caglow_networks import (discriminator_loss, encoder_loss,
                                            feature_matching, group_memberships)

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "condgen"
LOG2 = math.log(2)


def probs(seed: int, *shape: int) -> torch.Tensor:
    draws = torch.empty(shape, dtype=torch.float64).exponential_(
        generator=torch.Generator().manual_seed(seed))
    return draws / draws.sum(-1, keepdim=True)


def slope(loss: Callable[[torch.Tensor], torch.Tensor],
          at: torch.Tensor) -> torch.Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def model(**options: object) -> CAGlow:
    torch.manual_seed(0)
    small = {"levels": 1, "depth": 1, "width": 4, "hidden": 8, "noise": 4,
             "networks": "paper", "latent": "top"}
    return CAGlow((1, 4, 4), Schema([Classes("digit", 2)]) + Code("u", 1), **small,
                  **options)


def batch(n: int = 16) -> Batch:
    c = torch.eye(2).repeat(n // 2, 1)
    z = torch.randn(n, 16, generator=torch.Generator().manual_seed(1))
    return Batch({"z": z, "c": c}, Noise((0,), slice(None), n))


# CAGlow's Eq. 11 ----------------------------------------------------------------------

def test_literal_discriminator_loss_has_no_lower_bound():
    real = torch.zeros(1, dtype=torch.float64)
    for logit in (-10.0, -1e3, -1e6):
        fake = torch.tensor([logit], dtype=torch.float64)
        assert discriminator_loss(real, fake, "literal") < 0.99 * logit
        assert discriminator_loss(real, fake) >= 0
    fakes = torch.linspace(-30, 30, 61, dtype=torch.float64)
    values = torch.stack([discriminator_loss(real, a[None], "literal") for a in fakes])
    assert values.diff().gt(0).all()  # no minimum anywhere


def test_gradients_of_both_discriminator_losses():
    real, a = (torch.zeros(1, dtype=torch.float64),
               torch.linspace(-6, 6, 25, dtype=torch.float64))
    assert torch.allclose(len(a) * slope(lambda f: discriminator_loss(real, f), a),
                          torch.sigmoid(a))
    assert torch.allclose(
        len(a) * slope(lambda f: discriminator_loss(real, f, "literal"), a),
        1 - torch.sigmoid(a))


def test_both_forms_treat_real_latents_alike():
    real, fake = torch.randn(2, 50, dtype=torch.float64,
                             generator=torch.Generator().manual_seed(0))
    corrected, literal = (slope(lambda r, f=f: discriminator_loss(r, fake, f), real)
                          for f in ("corrected", "literal"))
    assert torch.allclose(corrected, literal)


def test_model_uses_the_given_form():
    players = [model(form=form) for form in ("corrected", "literal")]
    for player in players:
        with torch.no_grad():
            player.supervision.real.weight.zero_()
            # a discriminator that calls everything generated
            player.supervision.real.bias.fill_(-50.0)
    losses = [player.eval().supervision_loss(batch())["D"][1].item()
              for player in players]
    assert losses[0] == pytest.approx(50.0)
    assert losses[1] == pytest.approx(50.0 - 51.0)


# CAGlow's Eq. 7 and 8, more in test_divergences.py ------------------------------------

def test_readings_of_eq7():
    half, copy = (torch.tensor([0.5, 0.5], dtype=torch.float64),
                  torch.eye(2, dtype=torch.float64))
    assert condition_bound(half, copy, copy, half, "joint") == 0 > -LOG2
    assert math.isclose(condition_bound(half, copy, copy, half), -LOG2)
    p_c, encoder, classifier, prior = (probs(0, 500, 3), probs(1, 500, 3, 4),
                                       probs(2, 500, 4, 3), probs(3, 500, 4))
    forms = {f: condition_bound(p_c, encoder, classifier, prior, f)
             for f in ("corrected", "independent", "joint")}
    likelihood = (p_c * (prior[:, None] @ classifier)[:, 0].log()).sum(-1)
    assert ((forms["corrected"] <= likelihood).all()
            and (forms["independent"] <= likelihood).all())
    assert (forms["joint"] > likelihood).any()
    assert torch.allclose(forms["joint"] - forms["corrected"],
                          mutual_information(p_c[..., None] * encoder))


def test_eq8_lacks_one_half():
    p, q = probs(0, 500, 5), probs(1, 500, 5)
    assert torch.allclose(js_from_kls(p, q, "literal"), 2 * js(p, q))
    assert torch.allclose(js_from_kls(p, q), js(p, q))
    assert torch.allclose(js_from_kls(p, q, "literal"),
                          kl(p, mixture(p, q)) + kl(q, mixture(p, q)))
    assert js_from_kls(*torch.eye(2, dtype=torch.float64), form="literal") > LOG2 + 0.5


# CAGlow's Eq. 14 and 15 ---------------------------------------------------------------

@pytest.mark.parametrize(("matching", "share"), [("pair", 1.0), ("class_mean", 1 / 8)])
def test_feature_matching_penalises_the_noise(matching, share):
    """Features N(0, 1), generated b + a·eps: the slope in `a` is `a` item by item,
    a/n for means over n items.
    """
    g = torch.Generator().manual_seed(0)
    real, eps = torch.randn(2, 80, 5000, dtype=torch.float64, generator=g)
    groups = (torch.eye(10, dtype=torch.float64).repeat(8, 1)
              if matching == "class_mean" else None)
    at = torch.tensor([1.0, -1.0], dtype=torch.float64)
    a, b = slope(lambda v: feature_matching(real, v[1] + v[0] * eps, groups), at)
    assert abs(a - share) < 0.02  # 400,000 or 50,000 terms: about four standard errors
    assert abs(b + 1) < 0.02      # both want the right mean, equally


def test_model_uses_the_given_matching():
    for matching in ("pair", "class_mean"):
        m, b = model(matching=matching).eval(), batch()
        z, c = m.generate_batch(b)
        groups = (group_memberships(m.conditions, c) if matching == "class_mean"
                  else None)
        trunk = m.supervision.trunk
        expected = feature_matching(trunk(b.z[:, : m.written]), trunk(z), groups)
        assert torch.allclose(m.encoder_terms(b)["FM"][1], expected)


def test_eq15_sum_is_minimal_at_an_undecided_discriminator():
    a = torch.linspace(-5, 5, 101, dtype=torch.float64)
    real = torch.zeros(1, dtype=torch.float64)
    both = torch.stack([encoder_loss(x[None]) + discriminator_loss(real, x[None]) - LOG2
                        for x in a])
    assert a[both.argmin()].abs() < 1e-9 and math.isclose(both.min(), 2 * LOG2)


# Eq. 11 of Khan et al. ----------------------------------------------------------------

def test_printed_sign_shifts_the_balance_by_twice_the_loss():
    """The discriminator answers with L_g = 0.1 + 0.3 k; L_d and L_v are fixed."""
    real, made, ends = 0.5, 0.2, {}
    for form in ("corrected", "literal"):
        avae = AVAE((1, 8, 8), latent=2, width=2, set_point=0.5, warm_up=0.0, form=form)
        for _ in range(400):
            samples = 0.1 + 0.3 * avae.controller.k.item()
            avae.losses.copy_(torch.tensor([real, samples, made]))
            avae.control(batch())
        ends[form] = samples + avae.alpha * made
    assert ends["corrected"] == pytest.approx(0.5 * real, rel=1e-4)  # Eq. 10
    assert ends["literal"] == pytest.approx(0.5 * real + 2 * avae.alpha * made, rel=1e-4)


# every switch -------------------------------------------------------------------------

def test_every_form_is_tested_and_literal_is_never_the_default():
    found, defaults = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            functions = [node, *(node.body if isinstance(node, ast.ClassDef) else [])]
            for f in (f for f in functions if isinstance(f, ast.FunctionDef)):
                given = dict(zip(reversed(f.args.args), reversed(f.args.defaults)))
                for argument in (a for a in f.args.args if a.arg == "form"
                                 and a in given):
                    found.add(node.name)
                    defaults.add(ast.literal_eval(given[argument]))
    texts = [t for t in (p.read_text(encoding="utf-8") for p in TESTS.glob("test_*.py"))
             if '"literal"' in t]
    untested = {name for name in found if not any(name in text for text in texts)}
    assert ("discriminator_loss" in found
            and not untested), f"law 11: test how the forms of {untested} differ"
    assert defaults == {"corrected"}
