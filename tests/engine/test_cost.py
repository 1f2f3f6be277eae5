"""engine/cost.py: what a turn costs."""

from __future__ import annotations

import pytest

from sfumato.engine.cost import Cost


def test_what_a_turn_costs_is_learned() -> None:
    cost = Cost()
    assert cost.of(100) == 0 and cost.within(0.1) == 2048
    for n in range(50):
        cost.learn(100 + 10 * (n % 7), 0.02 + 0.001 * (100 + 10 * (n % 7)))
    assert cost.of(200) == pytest.approx(0.22) and cost.within(0.5) == pytest.approx(500, abs=1)
    for _ in range(60):
        cost.learn(100, 0.5)
    assert cost.of(100) == pytest.approx(0.5, rel=0.05)
