"""templates/decisions.py: probabilities of answers by the chain rule over the tree of their tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from sfumato.errors import InputError
from sfumato.questions import Choice, Noul, Score, Span
from sfumato.templates.decisions import AnswerSet, decision_of, log_sum, tempered

END = 99


def logit(draw: int, path: Sequence[int], token: int) -> float:
    """What a made-up model says of a token behind a path, in a draw of noise."""
    return random.Random(f"{draw} {list(path)} {token}").gauss(0, 2)


def logits_of(answers: AnswerSet, samples: int) -> list[list[float]]:
    return [[logit(one.draw, one.pins, word) for word in one.words] for one in answers.glances(samples)]


def one_token_at_a_time(tokens: Sequence[Sequence[int]], samples: int) -> list[float]:
    """Each answer's probability, token by token, among what some answer goes on with there."""
    means = []
    for answer in tokens:
        whole = 0.0
        for draw in range(samples):
            p = 1.0
            for depth in range(len(answer) + 1):
                path = list(answer[:depth])
                others = {([*other, END])[depth] for other in tokens if list(other[:depth]) == path}
                own = logit(draw, path, [*answer, END][depth])
                if len(others) > 1:
                    p *= math.exp(own - log_sum([logit(draw, path, other) for other in others]))
            whole += p
        means.append(whole / samples)
    return means


@pytest.mark.parametrize("seed", range(40))
def test_an_answer_has_the_product_along_its_path(seed: int) -> None:
    """Random answers, many with shared beginnings, some the beginning of others, and one perhaps empty."""
    rng = random.Random(seed)
    tokens = {tuple(rng.choices(range(3), k=rng.randint(0, 6))) for _ in range(rng.randint(2, 40))}
    ordered = rng.sample(sorted(tokens), len(tokens))
    samples = rng.choice([1, 1, 3])
    answers = AnswerSet.of([str(n) for n in range(len(ordered))], ordered, END)
    p = answers.probabilities(logits_of(answers, samples))
    assert p == pytest.approx(one_token_at_a_time(ordered, samples), abs=1e-12)
    assert sum(p) == pytest.approx(1.0)
    # No fork is read twice, and none where there is nothing to choose.
    assert len({fork.path for fork in answers.forks}) == len(answers.forks)
    assert all(len(fork.branches) > 1 for fork in answers.forks)


def test_a_long_answer_is_read_no_further_than_where_it_is_the_only_one() -> None:
    long = list(range(5, 305))
    answers = AnswerSet.of(["long", "short"], [[1, 2, *long], [1, 3]], END)
    assert [fork.path for fork in answers.forks] == [(1,)]
    assert answers.deepest == 1
    alone = AnswerSet.of(["only"], [long], END)
    assert not alone.forks
    assert alone.probabilities([]) == [1.0]
    many = AnswerSet.of([str(n) for n in range(255)], [[4, 4, n // 10, n % 10] for n in range(255)], END)
    assert len(many.forks) == 1 + 26
    assert many.deepest == 3


def test_answers_of_the_same_tokens_are_refused_by_their_names() -> None:
    with pytest.raises(InputError, match=r"'b' and 'd' are the same tokens; reword one"):
        AnswerSet.of(["a", "b", "c", "d"], [[1], [1, 2], [3], [1, 2]], END)


def test_extreme_logits_make_no_nan() -> None:
    answers = AnswerSet.of(["a", "b", "c"], [[1], [2], [2, 3]], END)
    p = answers.probabilities([[3e4, -3e4], [-3e4, 3e4]])
    assert p == [1.0, 0.0, 0.0]
    assert tempered(p, 2.0) == pytest.approx([1.0, 0.0, 0.0])


def test_temperatures() -> None:
    p = [0.7, 0.2, 0.1]
    assert tempered(p, 1.0) == p
    for temperature in (0.25, 0.5, 3.0, 100.0):
        powers = [value ** (1 / temperature) for value in p]
        assert tempered(p, temperature) == pytest.approx([value / sum(powers) for value in powers])


def test_decisions_of_each_kind() -> None:
    noul = decision_of(Noul("Is it?"), ["true", "false"], [0.5, 0.5])
    assert (noul.choice, noul.probability, noul.kind) == ("true", 0.5, "noul")
    choice = decision_of(Choice(["a", "b", "c"]), ["a", "b", "c"], [0.1, 0.6, 0.3])
    assert (choice.choice, choice.probability) == ("b", 0.6)
    assert choice.confidence == pytest.approx((0.6 - 1 / 3) / (2 / 3))
    score = decision_of(Score(["low", {"more": 1}]), ["0", "1"], [0.25, 0.75])
    assert (score.choice, score.score, score.legend) == ("1", 0.75, {"0": "low", "1": {"more": 1}})
    span = decision_of(Span("Where?"), ["x", "y"], [0.4, 0.6], [(0, 1), (3, 4)])
    assert (span.choice, span.place) == ("y", (3, 4))
