"""What counts of right answers can say: intervals for a share, and whether two settings differ on the same items.

A share has Wilson's score interval (Wilson 1927), which stays within 0 and 1 and is right where all answers are. Two
settings that answered the same items are compared by the items on which they differ: whether the difference can be
chance is McNemar's exact test (1947), how large it may be is Tango's score interval (1998, "Equivalence test and
confidence interval for the difference in proportions for the paired-sample design"). That one keeps a width where no
item differs, so that few items never prove that two settings are alike. It lacks corrections for many comparisons: a
search judges its choice on items that it has not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from sfumato.errors import InputError

LEVEL = 0.95
"""Of the intervals."""
_HALVINGS = 60


class Interval(NamedTuple):
    """From where to where a value may lie; at a level of 0.95 it holds the true one about 95 times of 100."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedCounts:
    """How often two settings were right on the same items, each with the other's outcome beside it."""

    both: int
    first_only: int
    """Items that the first had right and the second had not."""
    second_only: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> PairedCounts:
        """From the outcomes in the order of the items. InputError where they are not of as many items."""
        if len(first) != len(second):
            raise InputError(f"{len(first)} outcomes are paired with {len(second)}; give one of each for every item")
        pairs = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
        return cls(*(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def count(self) -> int:
        """Items."""
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def difference(self) -> float:
        """The second's share that is right, less the first's: from -1 to 1; 0 of no items."""
        return (self.second_only - self.first_only) / max(1, self.count)

    def interval(self, level: float = LEVEL) -> Interval:
        """Where the difference may lie, by Tango's score test; from -1 to 1 where there are no items."""
        score = self._score
        z = _z(level)
        low = _root(lambda d: score(d) < z, -1.0, self.difference)
        high = _root(lambda d: score(d) < -z, self.difference, 1.0)
        return Interval(low, high)

    @property
    def p(self) -> float:
        """McNemar's exact test: see `mcnemar`."""
        return mcnemar(self.first_only, self.second_only)

    def _score(self, d: float) -> float:
        """How many standard errors the difference lies above `d`, under the likeliest shares that differ by `d`."""
        n, b, c = self.count, self.second_only, self.first_only
        if n == 0:
            return 0.0
        half = (2 * n - b + c) * d - b - c
        # the likeliest share of items that the first alone has right
        share = (math.sqrt(max(0.0, half * half + 8 * n * c * d * (1 - d))) - half) / (4 * n)
        variance = n * (2 * share + d * (1 - d))
        distance = b - c - n * d
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)


def wilson(right: int, count: int, level: float = LEVEL) -> Interval:
    """Where the true share may lie if `right` of `count` are right; from 0 to 1 where there are none."""
    if not 0 <= right <= count:
        raise InputError(f"{right} of {count} is no share; give a count from 0 to {count}")
    if count == 0:
        return Interval(0.0, 1.0)
    z, share = _z(level), right / count
    scale = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    # at the ends the limit is the end itself, which rounding would miss
    return Interval(0.0 if right == 0 else middle - reach, 1.0 if right == count else middle + reach)


def mcnemar(first_only: int, second_only: int) -> float:
    """The probability that items which differ fall at least as unevenly by chance: two-sided, exact, at most 1.

    Each of them goes either way with probability 1/2; items on which both agree say nothing. The exact test errs on the
    side of "no difference": with fewer than 6 items that differ it never falls below 0.05."""
    count, least = first_only + second_only, min(first_only, second_only)
    if least < 0:
        raise InputError(f"{first_only} and {second_only} are no counts; give numbers from 0")
    ways = term = 1
    for k in range(least):
        term = term * (count - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / (1 << count))


def _z(level: float) -> float:
    """How many standard errors a two-sided interval of this level reaches."""
    if not 0 < level < 1:
        raise InputError(f"the level {level} is outside 0 to 1; give for example 0.95")
    return NormalDist().inv_cdf((1 + level) / 2)


def _root(is_beyond: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that becomes true once on the way from `low` to `high` does so; `high` where it never does."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return high
