"""Statistics over seeds, against definitions written out: every resample, the integral of Student's density, Holm's own example."""

import itertools
import math
import random
import statistics

import pytest

from undo_core.report.attacks import Point
from undo_core.report.seeds import EXACT, Difference, bootstrap, corrected, paired, t_tail, t_test


def points(*values, seeds=None):
    return [Point(seed, value) for seed, value in zip(seeds or range(len(values)), values, strict=True)]


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_the_bootstrap_enumerates_every_resample(count):
    generator = random.Random(count)
    values = [round(generator.random(), 2) for _ in range(count)]
    medians = sorted(statistics.median(resample) for resample in itertools.product(values, repeat=count))
    edge = math.ceil(0.025 * len(medians))  # so many resamples lie below or at the lower end, and at or above the upper one
    assert bootstrap(values) == (medians[edge - 1], medians[-edge])


def test_up_to_five_seeds_the_interval_is_the_range_and_then_narrower():
    for count in (3, 4, 5):
        values = [float(value**2) for value in range(count)]
        assert bootstrap(values) == (values[0], values[-1])
    assert bootstrap([float(value) for value in range(7)]) == (1.0, 5.0)
    assert bootstrap([1.0, 2.0]) is None


def test_many_seeds_are_drawn_and_give_the_same_interval_again():
    values = [random.Random(seed).gauss(3, 1) for seed in range(EXACT + 12)]
    low, high = bootstrap(values)
    assert min(values) < low < statistics.median(values) < high < max(values) and bootstrap(values) == (low, high)


def density(t, freedom):
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    return scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2)


@pytest.mark.parametrize("freedom", range(1, 10))
@pytest.mark.parametrize("t", [0.0, 0.3, 1.7, 4.5])
def test_the_tail_of_students_t_is_the_integral_of_its_density(freedom, t):
    steps = 2000  # Simpson's rule from -t to t
    width = 2 * t / steps
    inner = sum((4 if index % 2 else 2) * density(-t + index * width, freedom) for index in range(1, steps))
    inside = width / 3 * (density(-t, freedom) + inner + density(t, freedom))
    assert t_tail(t, freedom) == pytest.approx(1 - inside, abs=1e-9)


def test_known_values_of_the_t_test():
    assert t_tail(1.0, 1) == pytest.approx(0.5) and t_tail(math.sqrt(2.0), 2) == pytest.approx(1 - math.sqrt(0.5))
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = sqrt(12) with 2 degrees of freedom.
    assert t_test([1.0, 2.0, 3.0]) == pytest.approx(1 - math.sqrt(12 / 14))
    # Tables give 2.776 as the 5 % point of four degrees of freedom.
    assert t_tail(2.776, 4) == pytest.approx(0.05, abs=5e-5)
    assert t_test([2.0, 2.0, 2.0]) is None and t_test([0.0, 0.0, 0.0]) == 1.0 and t_test([1.0, 2.0]) is None


def test_holms_correction():
    # Holm's procedure on 0.01, 0.04, 0.03, 0.005: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04 raised to the one before it.
    tests = [Difference((0, 1, 2), 1.0, (0.5, 1.5), p) for p in (0.01, 0.04, 0.03, 0.005)]
    found = corrected([tests[0], None, *tests[1:]])
    assert found[1] is None
    assert [one.corrected for one in found if one] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [one.ordered for one in found if one] == [True, False, False, True]
    few = Difference((0, 1), 1.0, None, None)
    assert corrected([few, tests[3]]) == [few, Difference((0, 1, 2), 1.0, (0.5, 1.5), 0.005, 0.005)], "no test, not counted"
    assert corrected([Difference((0, 1, 2), 1.0, (0, 1), 0.9)] * 2)[0].corrected == 1.0


def test_only_an_interval_without_zero_is_an_order():
    assert not corrected([Difference((0, 1, 2), 1.0, (0.0, 1.5), 0.001)])[0].ordered
    assert not corrected([Difference((0, 1, 2), -1.0, (-1.5, 0.1), 0.001)])[0].ordered
    assert corrected([Difference((0, 1, 2), -1.0, (-1.5, -0.1), 0.001)])[0].ordered
    assert not Difference((0, 1, 2), 1.0, (0.5, 1.5), 0.001).ordered, "without a correction"


def test_pairs_are_of_the_same_seed():
    one, other = points(0.9, 0.7, 0.8, 0.1, seeds=[2, 0, 1, 7]), points(0.5, 0.6, 0.2, seeds=[0, 1, 2])
    found = paired(one, other)
    assert found.seeds == (0, 1, 2) and found.median == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2, 0.7)) and found.p == pytest.approx(t_test([0.7, 0.2, 0.2]))
    assert paired(one, points(0.1, seeds=[9])) is None


def test_differences_of_nothing_but_noise_are_rarely_called_an_order():
    """Holm holds the probability of any wrong order among all comparisons at 5 %; the interval makes it smaller."""
    generator, wrong, studies = random.Random(4), 0, 120
    for _ in range(studies):
        base = points(*(generator.gauss(0, 1) for _ in range(5)))
        tables = [paired(points(*(generator.gauss(0, 1) for _ in range(5))), base) for _ in range(6)]
        wrong += any(found.ordered for found in corrected(tables))
    assert wrong <= 0.05 * studies + 3 * math.sqrt(0.05 * 0.95 * studies)
