"""evals/tasks.py: items with noise of their own, the same answers in any batch and behind a URL, errors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sfumato import LLM, Options
from sfumato.errors import InputError
from sfumato.evals.tasks import Exercise, answers, fresh, query_of, seeded, template_of
from sfumato.tasks.task import Task, named
from sfumato.templates.interface import LanguageModel
from sfumato.templates.requests import AnswerQuery, Chat, Fill, QueryFor
from sfumato.templates.slots import Slot

QUICK = Options(seed=3, max_steps=3)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load("nano")


class Elsewhere(LanguageModel):
    """A model behind a URL, as far as evaluations can tell."""

    name, has_drafts, has_token_ids, is_remote, purpose = "elsewhere", False, False, True, None

    def __init__(self, llm: LLM, most: int = 10_000) -> None:
        self.llm, self.most, self.queries = llm, most, list[Any]()
        self.canvas_length = llm.model.config.canvas_length

    def check(self, options: Options, is_chat: bool = True) -> None: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...

    def run(self, query: QueryFor[Any]) -> Any:
        return self.llm.run(query)

    def _stream(self, query: AnswerQuery) -> Any:
        raise NotImplementedError

    def _answers(self, queries: Any) -> Any:
        raise NotImplementedError

    def _begin(self, query: QueryFor[Any], listener: Callable[[Any], None]) -> Callable[[], None]:
        self.queries.append(query)
        if isinstance(query, Chat) and len(str(query.messages)) > self.most:
            raise InputError("the prompt is too long; shorten it")
        return self.llm._begin(query, listener)


def texts(llm: LanguageModel, exercise: Exercise, **more: Any) -> list[str]:
    return [answer.text for answer in answers(llm, exercise.task, exercise.items, QUICK, **more)]


def test_an_answer_depends_on_its_item_and_seed_alone(llm: LLM) -> None:
    exercise = fresh(named("sorting"), 4, 1)
    together = texts(llm, exercise)
    assert (
        texts(llm, exercise, batch=3)
        == together
        == [text for item in exercise.items for text in texts(llm, Exercise(exercise.task, [item]))]
    )
    assert texts(llm, Exercise(exercise.task, exercise.items[::-1])) == together[::-1]
    assert [a.text for a in answers(llm, exercise.task, exercise.items, Options(seed=4, max_steps=3))] != together
    seeds = {seeded(QUICK, item).seed for item in exercise.items}
    assert len(seeds) == 4 and seeded(Options(), "a").seed is None


def test_a_model_elsewhere_answers_the_same(llm: LLM) -> None:
    exercise = fresh(named("sorting"), 4, 1)
    far = Elsewhere(llm)
    assert texts(far, exercise, batch=4) == texts(llm, exercise)
    assert all(isinstance(query, Chat) for query in far.queries)


def test_what_an_item_says_is_pinned_here_and_elsewhere(llm: LLM) -> None:
    exercise = fresh(named("sudoku"), 2, 1)
    for model in llm, Elsewhere(llm):
        for answer in answers(model, exercise.task, exercise.items, QUICK):
            assert all(answer.text[cell] == digit for cell, digit in enumerate(answer.item) if digit != "0")
            assert answer.kind in ("easy", "medium", "hard") and answer.steps > 0 and answer.passes > 0
    item = exercise.items[0]
    query = query_of(exercise.task, item, QUICK)
    assert isinstance(query, Fill) and query.options.mode is None
    one_by_one = query_of(exercise.task, item, Options(mode="autoregressive"), 82)
    assert isinstance(one_by_one, Chat) and one_by_one.options.max_tokens == 82


def test_a_template_has_slots_as_long_as_its_gaps() -> None:
    assert template_of(6, {0: "a", 3: "d", 4: "e"}) == [
        "a",
        Slot("gap 1", length=2),
        "de",
        Slot("gap 3", length=1),
    ]
    assert template_of(2, {}) == [Slot("gap 0", length=2)]


def test_one_token_at_a_time_nothing_is_pinned(llm: LLM) -> None:
    exercise = fresh(named("sudoku"), 1, 1)
    [answer] = answers(llm, exercise.task, exercise.items, Options(seed=1, mode="autoregressive", max_tokens=6))
    assert (answer.passes, answer.tokens) == (6, 6) and not answer.is_right


def test_an_item_that_is_too_large_is_named_and_the_rest_are_answered(llm: LLM) -> None:
    plain = named("sorting")
    long = Task("long", plain.generate, lambda item: item, plain.answer, lambda text, item: True)
    items = ["3 1 2", "1 " * llm.model.config.max_position, "2 1"]
    here, elsewhere = (list(answers(model, long, items, QUICK)) for model in (llm, Elsewhere(llm, most=100)))
    for results in here, elsewhere:
        assert [bool(answer.error) for answer in results] == [False, True, False]
        assert [answer.is_right for answer in results] == [True, False, True]
        assert [answer.item for answer in results] == items
    assert "the prompt has" in here[1].error and "beyond the context" in here[1].error
    with pytest.raises(InputError, match="nano could answer none of the items; the prompt has"):
        list(answers(llm, long, [items[1]] * 9, QUICK, batch=2))


def test_the_time_of_a_batch_is_shared_out_by_passes(llm: LLM) -> None:
    exercise = fresh(named("sudoku"), 3, 5)
    results = list(answers(llm, exercise.task, exercise.items, Options(seed=1, max_steps=8)))
    rates = {round(answer.cost_seconds / answer.passes, 9) for answer in results}
    assert len(rates) == 1 and sum(answer.cost_seconds for answer in results) >= max(a.seconds for a in results)
