"""Editing attributes: measures of control, stored directions, CAGlow's noise,
errors against the target.
"""

import math

import pytest
import torch

from condgen.conditions import Binary, Classes, Code
from condgen.evaluation import Predictions
from condgen.models import directions as ed
from condgen.models.caglow import CAGlow
from condgen.models.classifier import Evaluator

SHAPE = (1, 8, 8)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """Away from the zero start, at which a coupling is the identity."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    return model.eval()


# probabilities ------------------------------------------------------------------------


def test_probabilities_are_the_named_columns():
    evaluator = Evaluator(SHAPE, [Classes("who", 3), Binary("hat"), Binary("beard")])
    x = rand(5, *SHAPE)
    evaluator.train()
    p = Predictions(x, None, evaluator).predicted
    assert evaluator.training and not p["hat"].requires_grad
    evaluator.eval()
    expected = evaluator.logits(x).sigmoid()
    assert torch.allclose(torch.stack([p["beard"], p["hat"]], 1).float(),
                          expected[:, [4, 3]], atol=1e-6)
    assert p["who"].equal(evaluator.logits(x)[:, :3].argmax(1))


# AMP ----------------------------------------------------------------------------------


def test_amp_variance_by_hand():
    # of 3 people, 2 images each
    amp = torch.tensor([[0.2, 0.4], [0.6, 0.8], [0.1, 0.3]])
    p = amp[:, :, None] + torch.tensor([-0.1, 0.0, 0.1])
    means = torch.tensor([0.3, 0.7, 0.2]).double()
    assert ed.amp_variance(p, "literal") == pytest.approx(means.var().item(), abs=1e-7)
    assert ed.amp_variance(p) == pytest.approx(means.var().item() - 0.02 / 2, abs=1e-7)


@pytest.mark.parametrize("m", [2, 5, 30])
def test_corrected_amp_variance_removes_sampling_variance(m):
    tau, sigma, people = 0.05, 0.1, 4000
    amp = tau * randn(people, 1, 1, seed=1) + sigma * randn(people, m, 1, seed=2)
    p = amp.expand(-1, -1, 4)
    error = 5 * (tau**2 + sigma**2 / m) * math.sqrt(2 / people)
    assert ed.amp_variance(p, "literal") == pytest.approx(tau**2 + sigma**2 / m,
                                                          abs=error)
    assert ed.amp_variance(p) == pytest.approx(tau**2, abs=error)


def test_constant_generator_has_zero_amp_variance():
    p = rand(1, 1, 6).expand(8, 30, 6)
    assert ed.amp_variance(p) == ed.amp_variance(p, "literal") == 0


def test_amp_variance_refuses():
    for p, form in ((rand(1, 3, 2), "literal"), (rand(3, 2), "literal"),
                    (rand(3, 1, 2), "corrected")):
        with pytest.raises(ValueError, match="accepted"):
            ed.amp_variance(p, form)
    with pytest.raises(ValueError, match="literal"):
        ed.amp_variance(rand(3, 3, 2), "litteral")


# interference -------------------------------------------------------------------------


def test_interference_by_hand_and_cancelling():
    before = torch.tensor([[0.0, 1.0, 0.0, 0.3], [0.5, 0.5, 0.5, 0.5]])
    after = torch.tensor([[1.0, 0.0, 1.0, 0.3], [0.5, 0.7, 0.9, 0.5]])
    meant = torch.tensor([[True, False, False, False], [False, False, False, True]])
    printed, absolute = ed.interference(before, after, meant)
    assert printed.tolist() == pytest.approx([0, 0.2], abs=1e-7)
    assert absolute.tolist() == pytest.approx([2 / 3, 0.2], abs=1e-7)


def test_mean_absolute_interference_is_an_upper_bound():
    printed, absolute = ed.interference(rand(200, 7), rand(200, 7, seed=1),
                                        rand(200, 7, seed=2) < 0.3)
    assert (printed <= absolute + 1e-12).all() and (printed < 0.9 * absolute).any()


def test_interference_refuses():
    p, meant = rand(3, 4), torch.zeros(3, 4, dtype=torch.bool)
    for bad in ((p, rand(3, 3), meant), (p, p, meant[:2]), (p[0], p[0], meant[0]),
                (p, p, ~meant)):
        with pytest.raises(ValueError, match="accepted"):
            ed.interference(*bad)


def test_interference_of_a_perfect_editor():
    order = torch.stack(
        [torch.randperm(10, generator=torch.Generator().manual_seed(k))[:4]
         for k in range(6)])
    p = torch.zeros(5, 6, 10)
    for k in range(4):
        p[k + 1] = p[k].scatter(1, order[:, k : k + 1], 1.0)
    found = ed.interference_variants(p, order)
    for name in ("start", "step", "start, absolute", "step, absolute"):
        assert found[name].tolist() == [0, 0, 0, 0]
    assert torch.allclose(found["start, L − 1"], torch.arange(4).double() / 9)


def test_interference_of_an_editor_that_changes_others():
    # attributes 0, 1, 2 are requested; 3, 4, 5 change, too
    order = torch.arange(3).expand(2, 3)
    p = torch.zeros(4, 2, 6)
    for k in range(3):
        p[k + 1] = p[k]
        p[k + 1, :, [k, 3 + k]] = 1.0
    found = ed.interference_variants(p, order)
    assert found["step"].tolist() == pytest.approx([1 / 5] * 3)
    assert found["start"].tolist() == pytest.approx([1 / 5, 2 / 4, 3 / 3])
    assert found["start, L − 1"].tolist() == pytest.approx([1 / 5, 3 / 5, 5 / 5])


def test_interference_variants_refuse():
    three, both = torch.zeros(6, 3, dtype=torch.long), torch.tensor([[0, 1]] * 2)
    for p, order in ((rand(5, 6, 10), three), (rand(3, 2, 2), both)):
        with pytest.raises(ValueError, match="accepted"):
            ed.interference_variants(p, order)


# directions ---------------------------------------------------------------------------


def population(n: int = 3000,
               noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, attributes of which the second needs the first, and the true effects."""
    u = rand(n, 3)
    first = u[:, 0] < 0.5
    a = torch.stack([first, first & (u[:, 1] < 0.5), u[:, 2] < 0.3], 1).double()
    effects = randn(3, 5, seed=3).double()
    return 2 + a @ effects + noise * randn(n, 5, seed=4).double(), a, effects


def test_stored_directions_are_differences_of_means():
    z, a, _ = population()
    d = ed.mean_difference_directions(z, a)
    for k in range(3):
        assert torch.allclose(d[k], z[a[:, k] == 1].mean(0) - z[a[:, k] == 0].mean(0),
                              atol=1e-12)


def test_literal_directions_are_leak_times_corrected_ones():
    z, a, effects = population()
    literal, corrected = (ed.mean_difference_directions(z, a),
                          ed.controlled_directions(z, a))
    assert torch.allclose(literal, ed.leakage_matrix(a) @ corrected, atol=1e-10)
    assert (corrected - effects).abs().max() < 0.1 < (literal - effects).abs().max()
    z = randn(50, 4).double().exp()  # no linear model at all
    a = (rand(50, 3, seed=9) < 0.4).double()
    assert torch.allclose(ed.mean_difference_directions(z, a),
                          ed.leakage_matrix(a) @ ed.controlled_directions(z, a),
                          atol=1e-10)


def test_controlled_directions_are_exact_without_noise():
    z, a, effects = population(noise=0.0)
    who = torch.nn.functional.one_hot(torch.arange(len(a)) % 4, 4).double()
    shifted = z + who @ randn(4, 5, seed=8).double()
    assert torch.allclose(ed.controlled_directions(z, a), effects, atol=1e-9)
    assert torch.allclose(ed.controlled_directions(shifted, a, who), effects, atol=1e-9)
    assert not torch.allclose(ed.controlled_directions(shifted, a), effects, atol=1e-6)


def test_directions_move_the_mean_of_one_class_to_the_other():
    z, a, _ = population()
    d = ed.mean_difference_directions(z, a)[0]
    moved = z[a[:, 0] == 0] + d
    assert torch.allclose(moved.mean(0), z[a[:, 0] == 1].mean(0), atol=1e-10)


def test_directions_keep_dtype_and_refuse_invalid_attributes():
    z, a, _ = population()
    assert ed.mean_difference_directions(z.float(), a.float()).dtype == torch.float32
    ones = a.clone()
    ones[:, 1] = 1
    for bad in (a[:5], a[:, 0], 0.5 * a, ones):
        for f in (ed.mean_difference_directions, ed.controlled_directions):
            with pytest.raises(ValueError, match="accepted"):
                f(z, bad)


# editors ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caglow() -> CAGlow:
    torch.manual_seed(0)
    model = CAGlow(SHAPE, [Classes("who", 3), Binary("hat"), Binary("beard")], levels=2,
                   depth=1, width=8, hidden=16)
    perturbed(model)
    model.store_condition_rows(model.conditions.pack(3, who=[0, 1, 2], hat=[0, 1, 0],
                                                     beard=[1, 1, 0]))
    return model


def test_stored_edit_is_encode_add_decode(caglow):
    x, directions = (rand(3, *SHAPE) * 255).round() / 255, 0.3 * randn(2, 64)
    change = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    edited = ed.edit_with_directions(caglow.glow, x, directions, change, 1.6)
    step = torch.stack([1.6 * directions[0], -1.6 * directions[1], 0 * directions[0]])
    with torch.no_grad():
        assert torch.allclose(edited, caglow.decode(caglow.encode(x) + step), atol=1e-5)
    assert ((edited[2] - x[2]).abs().max() < 0.5 / 255
            and (edited[:2] - x[:2]).abs().amax((1, 2, 3)).min() > 1 / 255)


def test_inferred_noise_inverts_the_gaussian(caglow):
    c = caglow.conditions.pack(4, who=[0, 1, 2, 0], hat=[0, 1, 0, 1],
                               beard=[1, 1, 0, 0])
    eps = randn(4, 64)
    with torch.no_grad():
        assert torch.allclose(
            ed.infer_noise(caglow, caglow.encoder.gaussian(c, eps), c), eps, atol=1e-3)
        assert not torch.allclose(ed.infer_noise(caglow, caglow.encoder(c, eps), c),
                                  eps, atol=1e-2)


def test_caglow_edit_adds_the_difference_of_encoder_outputs(caglow):
    c = caglow.conditions.pack(2, who=[0, 1], hat=[0, 1], beard=[1, 1])
    new = caglow.conditions.pack(2, who=[2, 1], hat=[1, 0], beard=[1, 1])
    x = (rand(2, *SHAPE) * 255).round() / 255
    with torch.no_grad():
        z = caglow.encode(x)
        eps = ed.infer_noise(caglow, z, c)
        wanted = caglow.decode(caglow.encoder(new, eps) + (z - caglow.encoder(c, eps)))
    assert torch.allclose(ed.edit_with_encoder(caglow, x, c, new), wanted, atol=1e-5)


def test_caglow_edit_reconstructs_and_changes_the_image(caglow):
    x = (rand(2, *SHAPE) * 255).round() / 255
    c = caglow.conditions.pack(2, who=[0, 1], hat=[0, 1], beard=[1, 1])
    new = caglow.conditions.pack(2, who=[0, 1], hat=[1, 0], beard=[1, 1])
    assert (ed.edit_with_encoder(caglow, x, c, c) - x).abs().max() < 0.5 / 255
    assert (ed.edit_with_encoder(caglow, x, c, new) - x).abs().max() > 1 / 255


def test_caglow_is_initialised_with_controlled_directions(caglow):
    g = torch.Generator().manual_seed(0)
    who = torch.randint(3, (400,), generator=g)
    a = (torch.rand(400, 2, generator=g) < 0.4).float()
    c = torch.cat([torch.nn.functional.one_hot(who, 3).float(), a], 1)
    z = randn(400, 64) + c @ randn(5, 64, seed=2)
    model = CAGlow(SHAPE, caglow.conditions, levels=2, depth=1, width=8, hidden=16)
    model.encoder.initialize_from(z, c)
    directions = ed.controlled_directions(z, a, c[:, :3])
    assert torch.allclose(model.encoder.mean[3:].detach(), directions, atol=1e-3)
    eps, new = randn(400, 64, seed=3), c.clone()
    new[:, 3] = 1 - new[:, 3]
    with torch.no_grad():
        step = model.encoder(new, eps) - model.encoder(c, eps)
    assert torch.allclose(step, (new - c)[:, 3:] @ directions, atol=2e-3)


@pytest.mark.parametrize("options", [{"networks": "paper"}, {"latent": "top"},
                                     {"conditions": [Classes("who", 3)]}])
def test_inferred_noise_refuses_other_encoders(options):
    conditions = options.pop("conditions", [Binary("hat"), Code("u", 1)])
    model = CAGlow(SHAPE, conditions, levels=2, depth=1, width=8, hidden=8, **options)
    with pytest.raises(ValueError, match="networks='large'"):
        ed.infer_noise(model, randn(1, 64), torch.zeros(1, model.conditions.width))


# errors and cost ----------------------------------------------------------------------


def test_edit_error_by_hand():
    source = torch.full((2, 3, 4, 4), 0.5)
    target, edited = source.clone(), source.clone()
    target[:, :, 0] = 0.9  # the first of four rows
    edited[:, :, 0] = 0.8
    edited[:, 1, 1:] = 0.8
    error = ed.edit_error(edited, target, source)
    assert error == pytest.approx({"mae": 0.25 * 0.1 + 0.75 * 0.1, "inside": 0.1,
                                   "outside": 0.1, "share": 0.25})
    nothing = ed.edit_error(source, target, source)
    assert nothing == pytest.approx({"mae": 0.1, "inside": 0.4, "outside": 0.0,
                                     "share": 0.25})
    assert ed.edit_error(target, target, source)["mae"] == 0


def test_edit_error_of_one_channel_and_refused_arguments():
    source = rand(1, 3, 4, 4) / 2
    target = source.clone()
    target[0, 2, 0, 0] += 0.02
    assert ed.edit_error(source, target, source)["share"] == 1 / 16
    for bad in ((source, source, source), (source, source + 0.5, source),
                (source[:, :1], target, source)):
        with pytest.raises(ValueError, match="accepted"):
            ed.edit_error(*bad)


def test_cost_counts_bytes_and_calls():
    calls = []
    kept = [torch.zeros(3, 5), torch.zeros(2).double()]
    cost = ed.editing_cost(lambda: calls.append(torch.is_grad_enabled()), 4, kept, 3)
    assert (cost["bytes"] == 3 * 5 * 4 + 2 * 8 and cost["seconds"] >= 0
            and calls == [False] * 4)
    for n, repeats in ((0, 3), (4, 0)):
        with pytest.raises(ValueError):
            ed.editing_cost(lambda: None, n, (), repeats)


