"""evals/statistics.py: intervals and tests against values by other means, and how often they hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from statistics import NormalDist

import pytest

from sfumato.errors import InputError
from sfumato.evals.statistics import PairedCounts, mcnemar, wilson

Z = NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, "Interval estimation for the single proportion", table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_is_the_published_interval(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_where_the_score_test_turns() -> None:
    """Each limit is the share from which the count lies z standard errors of that share away."""
    for right, count in ((1, 7), (3, 7), (199, 200), (50, 1000)):
        for limit in wilson(right, count):
            assert abs(right - count * limit) / math.sqrt(count * limit * (1 - limit)) == pytest.approx(Z)


def test_mcnemar_is_the_sum_of_the_tails() -> None:
    for first, second in product(range(9), range(9)):
        count = first + second
        chances = [math.comb(count, k) / 2**count for k in range(count + 1)]
        tails = sum(chances[k] for k in range(count + 1) if abs(2 * k - count) >= abs(first - second))
        assert mcnemar(first, second) == pytest.approx(tails)
    assert mcnemar(0, 5) == pytest.approx(0.0625)
    assert mcnemar(0, 6) == pytest.approx(0.03125)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0
    assert mcnemar(10_000, 10_500) == pytest.approx(math.erfc(499 / math.sqrt(2 * 20_500)), rel=1e-2)


def test_pairs_are_counted() -> None:
    first, second = [True, True, False, False, True, False], [True, False, True, False, True, True]
    counts = PairedCounts.of(first, second)
    assert counts == PairedCounts(both=2, first_only=1, second_only=2, neither=1)
    assert (counts.count, counts.p) == (6, 1.0)
    assert counts.difference == pytest.approx(1 / 6)
    with pytest.raises(InputError, match=r"2 outcomes are paired with 1"):
        PairedCounts.of([True, False], [True])


def test_the_paired_interval_is_where_the_score_test_turns() -> None:
    """At each limit the statistic is z, with the restricted likelihood's maximum by a search instead of the formula."""
    for counts in (PairedCounts(30, 5, 2, 13), PairedCounts(0, 3, 9, 0), PairedCounts(90, 0, 4, 6)):
        low, high = counts.interval()
        assert low < counts.difference < high
        assert _score(counts, low) == pytest.approx(Z, abs=2e-3)
        assert _score(counts, high) == pytest.approx(-Z, abs=2e-3)


def _score(counts: PairedCounts, d: float) -> float:
    b, c, n = counts.second_only, counts.first_only, counts.count

    def likelihood(share: float) -> float:
        """Of the share of items that the first alone has right; the second's is larger by d."""
        chances = ((b, share + d), (c, share), (n - b - c, 1 - 2 * share - d))
        return sum(count * math.log(max(chance, 1e-300)) for count, chance in chances if count)

    low, high = max(0.0, -d), (1 - d) / 2
    share = max((low + (high - low) * step / 20_000 for step in range(20_001)), key=likelihood)
    return (b - c - n * d) / math.sqrt(n * (2 * share + d * (1 - d)))


def test_no_difference_is_not_proof_of_none() -> None:
    """Where no item differs, the limits are z² / (n + z²): 200 items bound a loss by 1.9 points, 1,000 by 0.4."""
    for counts, reach in ((PairedCounts(200, 0, 0, 0), 0.01885), (PairedCounts(400, 0, 0, 600), 0.00383)):
        assert counts.interval() == pytest.approx((-reach, reach), abs=5e-5)
        assert counts.p == 1.0
    assert PairedCounts(0, 0, 0, 0).interval() == (-1.0, 1.0)


def test_limits_are_within_reach_and_change_sides_with_the_pair() -> None:
    for both, first, second, neither in product((0, 1, 5), repeat=4):
        if not both + first + second + neither:
            continue
        low, high = PairedCounts(both, first, second, neither).interval()
        assert -1 <= low <= (second - first) / (both + first + second + neither) <= high <= 1
        swapped = PairedCounts(both, second, first, neither).interval()
        assert swapped == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(("count", "first", "second"), [(40, 0.05, 0.1), (40, 0.02, 0.02), (25, 0.3, 0.2)])
def test_the_paired_interval_holds_the_truth_as_often_as_it_says(count: int, first: float, second: float) -> None:
    """Over all outcomes there are, each with its probability."""
    held = 0.0
    for b, c, chance in _outcomes(count, second, first):
        if chance > 1e-7:
            low, high = PairedCounts(count - b - c, c, b, 0).interval()
            held += chance * (low - 1e-9 <= second - first <= high + 1e-9)
    assert 0.935 <= held <= 1.0


def _outcomes(count: int, p: float, q: float) -> Iterator[tuple[int, int, float]]:
    for b in range(count + 1):
        for c in range(count + 1 - b):
            ways = math.comb(count, b) * math.comb(count - b, c)
            yield b, c, ways * p**b * q**c * (1 - p - q) ** (count - b - c)


@pytest.mark.parametrize("level", [0.0, 1.0, math.nan])
def test_a_level_is_between_0_and_1(level: float) -> None:
    with pytest.raises(InputError, match=r"the level"):
        wilson(1, 2, level)


def test_what_is_no_count_is_refused() -> None:
    with pytest.raises(InputError, match=r"3 of 2 is no share"):
        wilson(3, 2)
    with pytest.raises(InputError, match=r"no counts"):
        mcnemar(-1, 2)
