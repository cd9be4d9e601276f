"""The learning rate is a pure function of the step: warm-up, cosine, ends."""

import itertools
import math

import pytest

from csimodels.training.schedule import warmup_cosine


def rates(total: int, fraction: float = 0.05, peak: float = 1e-3, final: float = 1e-5) -> list[float]:
    return [warmup_cosine(step, total, warmup_fraction=fraction, peak=peak, final=final) for step in range(total)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    values = rates(1000)
    assert values[:50] == pytest.approx([1e-3 * (step + 1) / 50 for step in range(50)], rel=1e-12)
    assert values[49] == pytest.approx(1e-3, rel=1e-12)
    assert max(values) == pytest.approx(1e-3, rel=1e-12)


def test_cosine_falls_from_the_peak_to_the_final_rate():
    values = rates(1000)
    tail = values[50:]
    assert tail[0] == pytest.approx(1e-3, rel=1e-12)
    assert tail[-1] == pytest.approx(1e-5, rel=1e-12)
    assert all(a > b for a, b in itertools.pairwise(tail))
    # Half way it is the mean of its ends; the curve is antisymmetric about that point.
    mirrored = [1e-3 + 1e-5 - value for value in reversed(tail)]
    assert tail == pytest.approx(mirrored, rel=1e-9)
    quarter = (len(tail) - 1) / 4
    expected = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * round(quarter) / (len(tail) - 1)))
    assert tail[round(quarter)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 20, 21])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
def test_short_runs_stay_within_the_ends(total, fraction):
    values = rates(total, fraction)
    assert len(values) == total
    assert all(0 < value <= 1e-3 * (1 + 1e-12) for value in values)
    assert max(values) == pytest.approx(1e-3, rel=1e-12)


def test_no_warm_up_starts_at_the_peak():
    assert rates(100, fraction=0.0)[0] == pytest.approx(1e-3, rel=1e-12)


def test_warm_up_alone_never_decays():
    values = rates(100, fraction=1.0)
    assert all(a < b for a, b in itertools.pairwise(values))


def test_equal_ends_are_constant_after_the_warm_up():
    assert rates(100, peak=1e-3, final=1e-3)[5:] == pytest.approx([1e-3] * 95, rel=1e-12)


def test_beyond_the_end_the_final_rate_stays():
    value = warmup_cosine(5000, 1000, warmup_fraction=0.05, peak=1e-3, final=1e-5)
    assert value == pytest.approx(1e-5, rel=1e-12)
