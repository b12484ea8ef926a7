"""The number of threads of a training: how it is chosen, kept, and given to others."""

import os
import subprocess
import sys

import pytest
import torch

from condgen import threads
from condgen.threads import fastest_threads, median_seconds, use_threads


@pytest.fixture
def number(monkeypatch):
    """A list whose last item is the number of threads; PyTorch's own does not move."""
    found = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: found[-1])
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    return found


@pytest.mark.parametrize(("seconds", "most", "chosen"), [
    ({1: 1.0, 2: 0.5, 4: 0.25, 8: 0.2}, 8, 8),
    ({1: 1.0, 2: 0.5, 4: 0.25, 8: 0.24}, 8, 4),
    ({1: 1.0, 2: 0.96, 4: 0.1, 8: 0.1}, 8, 1),
    ({1: 1.0, 2: 3.0}, 2, 1),
    ({1: 1.0, 2: 0.9, 3: 0.5}, 3, 3),
    ({}, 1, 1),
])
def test_threads_are_doubled_while_that_gains(monkeypatch, seconds, most, chosen):
    monkeypatch.setattr(threads, "median_seconds",
                        lambda step, numbers: [seconds[n] for n in numbers])
    assert fastest_threads(lambda: None, most) == chosen


def test_each_number_of_threads_is_timed_alternating(number):
    seen = []
    found = median_seconds(lambda: seen.append(number[-1]), (4, 1))
    assert seen == [4, 1] * threads.TRIAL_ROUNDS and len(found) == 2
    assert number[-1] == 8


def test_the_number_of_threads_is_restored(number):
    with pytest.raises(KeyError), use_threads(3):
        assert number[-1] == 3
        raise KeyError
    assert number[-1] == 8
    with use_threads(None):
        assert number[-1] == 8


@pytest.mark.parametrize(("first", "variables", "expected"), [
    ("", {}, "10000"), ("", {"GOMP_SPINCOUNT": "5"}, "5"),
    ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ("import sys; sys.modules['torch'] = sys; ", {}, "None"),
])
def test_waiting_is_shortened_unless_the_user_has_spoken(first, variables, expected):
    env = {k: v for k, v in os.environ.items()
           if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = f"{first}import condgen, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=env | variables,
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
