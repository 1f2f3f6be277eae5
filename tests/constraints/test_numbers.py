"""constraints/values/numbers.py: the regular expressions match the numbers between their bounds and no others."""

from __future__ import annotations

import random
import re
from decimal import Decimal

from sfumato.constraints.values.numbers import between


def test_numbers_between_bounds() -> None:
    rng = random.Random(0)
    for _ in range(300):
        low, high = sorted(rng.choice([rng.randint(-1200, 1200), round(rng.uniform(-20, 20), 3)]) for _ in range(2))
        low_is_strict, high_is_strict = rng.random() < 0.5, rng.random() < 0.5
        bounds = (Decimal(str(low)), low_is_strict), (Decimal(str(high)), high_is_strict)
        above, below = (
            between(*bounds),
            between((-bounds[1][0], high_is_strict), (-bounds[0][0], low_is_strict)),
        )
        near = [
            Decimal(n) + Decimal(d) / 1000 for n in (str(low), str(high), "0") for d in (-1000, -10, -1, 0, 1, 10, 1000)
        ]
        for number in (
            *near,
            *(Decimal(str(rng.choice([rng.randint(-1500, 1500), rng.uniform(-30, 30)]))) for _ in range(20)),
        ):
            text = f"{abs(number):f}"
            parts = below if number < 0 else above
            is_in = parts is not None and all(
                re.fullmatch(part.strip("/"), text) for part in parts.split(" & ") if part
            )
            assert (
                is_in
                == (
                    (number > bounds[0][0] if low_is_strict else number >= bounds[0][0])
                    and (number < bounds[1][0] if high_is_strict else number <= bounds[1][0])
                )
                or number == 0
            ), (low, high, low_is_strict, high_is_strict, number)
