"""sampling/rules.py: the schedule, what is accepted, when a canvas stops, and one token of a distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import (
    examples,
)

from sfumato.options import Options
from sfumato.sampling.rules import (
    RowRules,
    Rules,
    RuleView,
    Schedule,
    accept,
    count_repeats,
    count_still,
    is_confident,
    is_repeated,
    is_stable,
    pick_token,
)


@examples(100)
@given(entropies=st.lists(st.integers(0, 32), min_size=1, max_size=12), bound=st.integers(0, 64))
def test_accept_takes_the_surest_while_those_before_fit(entropies: list[int], bound: int) -> None:
    """Against the plain rule, one position after the other; in eighths, whose float sums are exact."""
    ordered = sorted(entropies)
    count = sum(sum(ordered[:n]) <= bound for n in range(len(ordered)))
    got = accept(torch.tensor([entropies]) / 8, torch.tensor([bound]) / 8)[0].tolist()
    assert sorted(entropy for entropy, flag in zip(entropies, got, strict=True) if flag) == ordered[:count]


def test_stable_looks_back_as_far_as_asked() -> None:
    canvas = torch.tensor([[1, 2]] * 5)
    same, other, none = [1, 2], [1, 3], [-1, -1]
    history = torch.tensor([[same, same], [other, same], [none, same], [same, other], [none, none]])
    still, last = torch.zeros_like(canvas), torch.full_like(canvas, -1)
    for step in (*history.unbind(1), canvas):
        still, last = count_still(step, last, still), step
    assert is_stable(still, torch.full((5,), 1)).tolist() == [True, True, True, False, False]
    assert is_stable(still, torch.full((5,), 2)).tolist() == [True, False, False, False, False]
    assert is_stable(still, torch.full((5,), 0)).tolist() == [True] * 5
    assert is_stable(still, torch.tensor([2, 1, 2, 0, 1])).tolist() == [True, True, False, True, False]


@examples(60)
@given(
    tokens=st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=12),
    width=st.integers(1, 5),
)
def test_repeats_are_counted_in_the_last_steps_of_this_canvas(tokens: list[list[int]], width: int) -> None:
    """Against the plain count over all steps so far; what an earlier canvas left in the ring is not counted."""
    ring = torch.tensor([[[1, 1, 1]] * width], dtype=torch.int32)
    for step, own in enumerate(tokens):
        last = tokens[max(0, step - width + 1) : step + 1]
        argmax = torch.tensor([own])
        expected = [sum(one[place] == own[place] for one in last) for place in range(3)]
        assert count_repeats(argmax, ring, torch.tensor([step]))[0].tolist() == expected
        ring[0, step % width] = argmax[0].int()


def test_a_canvas_repeats_when_each_position_that_counts_does() -> None:
    count = torch.tensor([[3, 2, 5]] * 5)
    counts = torch.tensor([[True] * 3, [True] * 3, [True, False, True], [True] * 3, [False, True, False]])
    repeats = torch.tensor([2, 3, 3, 0, 3])
    view = RuleView(count, count.float(), count, count)
    assert is_repeated(view, repeats).tolist() == [True, False, False, False, False]
    assert is_repeated(view._replace(counts_BL=counts), repeats).tolist() == [True, False, True, False, False]


def test_confident_is_strictly_below() -> None:
    entropies = torch.tensor([[0.25, 0.75], [0.0, 0.0], [0.25, 0.75]])
    assert is_confident(entropies, torch.tensor([0.5, 0.0, 0.51])).tolist() == [False, False, True]


def test_a_token_is_picked_with_its_probability() -> None:
    """Over a fine grid of uniform numbers each token comes as often as temperature, top-k and top-p say."""
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])
    grid = (torch.arange(2000) + 0.5) / 2000

    def shares(**options: Any) -> list[float]:
        count = Counter(pick_token(logits, Options(**options), uniform) for uniform in grid)
        return [count[token] / 2000 for token in range(5)]

    def expected(temperature: float, kept: Sequence[int]) -> list[float]:
        p = torch.softmax(logits / temperature, -1) * torch.tensor([float(token in kept) for token in range(5)])
        return (p / p.sum()).tolist()

    everything = range(5)
    assert shares() == pytest.approx(expected(1.0, everything), abs=2e-3)
    assert shares(temperature=2.5) == pytest.approx(expected(2.5, everything), abs=2e-3)
    assert shares(top_k=2) == pytest.approx(expected(1.0, [1, 3]), abs=2e-3)
    assert shares(top_k=50) == pytest.approx(expected(1.0, everything), abs=2e-3)
    p = torch.softmax(logits, -1)
    assert shares(top_p=float(p[1]) + 1e-3) == pytest.approx(expected(1.0, [1, 3]), abs=2e-3)
    assert shares(top_p=float(p[1]) - 1e-3) == pytest.approx(expected(1.0, [1]), abs=2e-3)
    # top_p counts within what top_k left, as in transformers: 0.73 of the two best is the best alone.
    assert shares(top_k=2, top_p=0.73) == pytest.approx(expected(1.0, [1]), abs=2e-3)
    assert shares(temperature=0.0) == [0, 1, 0, 0, 0]


def test_a_further_rule_is_one_that_is_on() -> None:
    """The reference's rules are always on; a further one has a default, which turns it off."""

    @dataclass(frozen=True)
    class Patient(Rules):
        patience: int = 0

    common = Schedule(0.4, 0.8, 48), 48, 0.1, 1, 0.005
    assert not Rules(*common).has_further
    assert not Patient(*common).has_further
    assert Patient(*common, patience=3).has_further
    assert not Rules.of(Options()).has_further and Rules.of(Options(repeats=1)).has_further


def test_rules_of_rows_are_numbers_of_their_own_kind() -> None:
    rows = [Rules(Schedule(0.4, 0.8, 8), 8, 0.1 * n, n, 0.005) for n in range(3)]
    tensors = RowRules.of(rows)
    assert tensors.max_steps_X.tolist() == [8, 8, 8] and tensors.stability_X.tolist() == [0, 1, 2]
    assert tensors.entropy_bound_X.dtype == torch.float32 and tensors.entropy_bound_X[2] == torch.tensor(0.2)
    assert tensors.at(torch.tensor([2, 0])).stability_X.tolist() == [2, 0]
