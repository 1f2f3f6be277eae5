"""tasks/sorting.py: random lists, their text, and an exact check."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.tasks import sorting


def test_lists_are_random_and_repeat_with_the_generator() -> None:
    lists = [sorting.generate(np.random.default_rng(seed)) for seed in range(200)]
    assert lists == [sorting.generate(np.random.default_rng(seed)) for seed in range(200)]
    assert len(set(lists)) == 200 and all(len(digits) == sorting.COUNT for digits in lists)
    counts = Counter("".join(lists))
    assert set(counts) == set("123456789")
    assert all(160 < count < 285 for count in counts.values())  # 222 expected, deviation 14


def test_the_answer_is_the_list_in_order() -> None:
    assert sorting.prompt("312") == "Sort these digits:\n312"
    assert sorting.answer_text("98219") == "12899"
    rng = np.random.default_rng(1)
    for count in range(1, 40):
        digits = sorting.generate(rng, count)
        answer = sorting.answer_text(digits)
        assert Counter(answer) == Counter(digits)
        assert all(one <= next_ for one, next_ in itertools.pairwise(answer))


@pytest.mark.parametrize("answer", ["", "2899", "112899", "128999", "92899", "12898", "128 99", None, 12899])
def test_an_answer_is_right_or_wrong(answer: object) -> None:
    assert sorting.is_sorted("12899", "98219")
    assert not sorting.is_sorted(answer, "98219")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(InputError, match="0 digits"):
        sorting.generate(np.random.default_rng(0), 0)
