"""The controller of a balance: its recursion, limits, state, and answers to a known plant."""

import math

import pytest
import torch

from condgen.controller import (
    Controller, LaggedPlant, balance_error, convergence_measure, overshoot,
    settling_step, step_response)

FREE = {"low": -math.inf, "high": math.inf}


def outputs(controller, errors):
    return torch.stack([controller.update(e) for e in errors])


def some_errors(n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g, dtype=torch.float64)


def test_velocity_form_equals_the_positional_form():
    e = some_errors()
    k = outputs(Controller(0.3, 0.5, 0.2, **FREE).double(), e)
    before = torch.cat([e[:1], e[:-1]])
    expected = 0.3 * e.cumsum(0) + 0.5 * (e - e[0]) + 0.2 * (e - before)
    assert torch.allclose(k, expected, atol=1e-12)


def test_integral_gain_alone_is_the_rule_of_began():
    e, k = some_errors(), torch.tensor(0.2, dtype=torch.float64)
    controller = Controller(0.05, start=0.2).double()
    for error in e:
        k = (k + 0.05 * error).clamp(0, 1)
        assert torch.allclose(controller.update(error), k, atol=1e-12)


def test_added_terms_of_the_printed_gains_stay_below_their_bound():
    e = 3 * torch.rand(2_000, generator=torch.Generator().manual_seed(1)).double() - 2
    printed, integral = (outputs(Controller(*gains, **FREE).double(), e)
                         for gains in ((1e-3, 1e-5, 1e-5), (1e-3,)))
    assert 1e-5 < (printed - integral).abs().max() < 6e-5


def test_output_leaves_a_limit_at_once():
    controller = Controller(0.1)
    assert outputs(controller, [1.0] * 50)[-1] == 1
    assert controller.update(-0.5) == pytest.approx(0.95)


def test_first_error_acts_by_the_integral_term_only():
    assert Controller(0.1, 5.0, 5.0, start=0.5).update(1.0) == pytest.approx(0.6)


def test_errors_that_are_not_finite_change_nothing():
    controller, other = Controller(0.1, 0.2, 0.3), Controller(0.1, 0.2, 0.3)
    for error in (0.5, math.nan, math.inf, 0.25):
        controller.update(error)
    for error in (0.5, 0.25):
        other.update(error)
    assert controller.k == other.k


def test_state_is_saved_with_the_model():
    first, again = Controller(0.1, 0.2, 0.3), Controller(0.1, 0.2, 0.3)
    outputs(first, [0.5, -0.2, 0.4])
    again.load_state_dict(first.state_dict())
    assert first.update(0.3) == again.update(0.3) != Controller(0.1, 0.2, 0.3).update(0.3)


def test_integral_control_reaches_its_target_without_error():
    y = step_response(Controller(4e-3, high=math.inf), LaggedPlant(), 0.5, 3_000)
    assert y[-1] == pytest.approx(0.5, abs=1e-4)


def test_a_reversed_error_never_settles():
    """The sign that a faulty balance would give."""
    plant, controller, y = LaggedPlant(), Controller(4e-3, start=0.5), 0.0
    found = []
    for _ in range(2_000):
        y = plant.step(controller.update(-(0.5 - y)).item())
        found.append(y)
    assert settling_step(torch.tensor(found), 0.5) is None


def test_proportional_gain_damps_the_oscillation():
    without, damped = (step_response(Controller(*gains, high=math.inf), LaggedPlant(),
                                     0.5, 3_000) for gains in ((2e-2,), (2e-2, 1.0)))
    assert overshoot(damped, 0.5) < 0.3 * overshoot(without, 0.5)
    assert settling_step(damped, 0.5) < 0.5 * settling_step(without, 0.5)


def test_delay_and_gain_of_the_plant():
    plant = LaggedPlant((1,), delay=3, gain=2.0)
    assert [plant.step(1.0) for _ in range(5)] == [0, 0, 0, 2, 2]


def test_settling_and_overshoot_of_known_curves():
    y = torch.tensor([0.0, 1.2, 0.9, 1.01, 1.0])
    assert settling_step(y, 1.0) == 3 and overshoot(y, 1.0) == pytest.approx(0.2)
    assert settling_step(y[:3], 1.0) is None and overshoot(y[:1], 1.0) == 0


def test_errors_of_a_balance():
    e = balance_error(1.0, 0.2, 0.9, set_point=0.5, alpha=0.3)
    assert e == pytest.approx(0.5 - 0.2 - 0.27)
    assert convergence_measure(1.0, -0.1) == pytest.approx(1.1)


@pytest.mark.parametrize("given", [
    {"integral": -1}, {"proportional": math.nan}, {"start": 2.0}, {"low": 1.0},
    {"low": 0.0, "high": 0.0}, {"start": math.nan}])
def test_controllers_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="accepted"):
        Controller(**given)


@pytest.mark.parametrize("given", [
    {"lags": ()}, {"lags": (0.5,)}, {"delay": -1}, {"delay": 1.5}])
def test_plants_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match="accepted"):
        LaggedPlant(**given)
