"""templates/deciding.py: an answer follows from the state and its own question, and from nothing beside them."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import tiny

from sfumato import LLM, Chat, Decide, Decision, Decisions, Options
from sfumato.questions import Choice, Noul, Question, Score, Span

WORDS = (
    "refund order late parcel angry calm Tuesday 17 Köln 東京 né 🙂 <|turn> <turn|> <|think|> the a of is not".split()
)
CLOSE = 1e-5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM.load("nano")


def random_llm(nano: LLM, ops: str = "fused") -> LLM:
    """A small random model with nano's tokenizer and chat template, in float32."""
    config = tiny.tiny_config(
        vocab_size=nano.model.config.vocab_size,
        eos_ids=nano.model.config.eos_ids,
        pad_id=nano.model.config.pad_id,
        canvas_length=32,
        max_position=2048,
    )
    model = tiny.tiny_model(config, seed=5, name=ops, mix=0.7)
    return LLM(model, nano.tokenizer, nano.planner.prompts.template, {}, "random")


@pytest.fixture(scope="module")
def llm(nano: LLM) -> LLM:
    return random_llm(nano)


# ---- random requests ------------------------------------------------------------------------------------------------


def phrase(rng: random.Random, most: int = 6) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def content(rng: random.Random) -> Any:
    return phrase(rng) if rng.random() < 0.8 else {phrase(rng, 1): [phrase(rng), rng.randint(0, 99), None]}


def options_of(rng: random.Random) -> list[str]:
    kind = rng.random()
    if kind < 0.1:
        return [f"Queue {n:03d}" for n in range(rng.choice([20, 60]))]
    if kind < 0.4:  # the beginnings of one another
        words = rng.choices(WORDS, k=5)
        return [*dict.fromkeys(" ".join(words[:n]) for n in rng.sample(range(1, 6), rng.randint(1, 5)))]
    return [*dict.fromkeys(phrase(rng, 3) for _ in range(rng.randint(1, 6)))]


def question(rng: random.Random) -> Question:
    kind = rng.randrange(4)
    if kind == 0:
        return Noul(content(rng), None if rng.random() < 0.5 else {"true": content(rng), "false": None})
    if kind == 1:
        return Choice({name: rng.choice([None, content(rng)]) for name in options_of(rng)}, content(rng))
    if kind == 2:
        return Score([content(rng) for _ in range(rng.randint(1, 12))], rng.choice([None, content(rng)]))
    return Span(content(rng), rng.choice(["sentence", "line"]))


def state_of(rng: random.Random) -> Any:
    sentences = [phrase(rng, 9) + rng.choice([". ", "!\n", "? "]) for _ in range(rng.randint(1, 9))]
    kind = rng.random()
    if kind < 0.7:
        return "".join(sentences)
    if kind < 0.85:
        return {"subject": phrase(rng), "lines": sentences}
    return [{"role": "user", "content": "".join(sentences)}, {"role": "assistant", "content": "Go on."}]


def name_of(rng: random.Random) -> str:
    return rng.choice(["", "é", "<turn|>", "\ud800", "\n", "x" * 40]) + str(rng.random())


def request_of(seed: int) -> Decide:
    rng = random.Random(seed)
    questions = {name_of(rng): question(rng) for _ in range(rng.randint(2, 5))}
    samples, steps = rng.choice([1, 1, 1, 2]), rng.choice([1, 1, 1, 2])
    return Decide(state_of(rng), questions, steps, samples, options=Options(seed=rng.choice([None, 7, 2**40])))


def with_questions(query: Decide, questions: Mapping[str, Question]) -> Decide:
    return dataclasses.replace(query, questions=dict(questions))


def furthest(one: Mapping[str, Decision], two: Mapping[str, Decision]) -> float:
    assert one.keys() == two.keys()
    gaps = []
    for id, decision in one.items():
        assert decision.probabilities.keys() == two[id].probabilities.keys()
        assert sum(decision.probabilities.values()) == pytest.approx(1.0)
        gaps += [abs(p - two[id].probabilities[name]) for name, p in decision.probabilities.items()]
    return max(gaps)


def variants(query: Decide, seed: int) -> tuple[dict[str, str], list[Decide]]:
    """The same questions with other ids in another order beside one more, and each by itself."""
    rng = random.Random(seed)
    renamed = {id: f"{n} {rng.random()}" for n, id in enumerate(query.questions)}
    shuffled = [*query.questions]
    rng.shuffle(shuffled)
    others = {renamed[id]: query.questions[id] for id in shuffled} | {"one more": question(rng)}
    return renamed, [
        with_questions(query, others),
        *(with_questions(query, {id: query.questions[id]}) for id in renamed),
    ]


def check_alone(llm: LLM, seed: int) -> Decisions:
    query = request_of(seed)
    whole = llm.run(query)
    renamed, (moved, *alone) = variants(query, seed)
    answers = llm.run(moved)
    assert furthest(whole, {id: answers[name] for id, name in renamed.items()}) < CLOSE
    for id, one in zip(renamed, alone, strict=True):
        llm.forget() if seed % 2 else None  # the state is encoded again, or is still there
        assert furthest({id: whole[id]}, llm.run(one)) < CLOSE
    return whole


def check_together(llm: LLM, seeds: Sequence[int], wholes: Sequence[Decisions]) -> None:
    """All of these at once, in pieces too, with chats under way."""
    queries: list[Any] = [request_of(seed) for seed in seeds]
    split = [with_questions(query, {id: one}) for query in queries for id, one in query.questions.items()]
    chats = [Chat(f"Say {n}", options=Options(max_tokens=40, max_steps=3, seed=n)) for n in range(3)]

    async def main() -> list[Any]:
        return await asyncio.gather(*(llm.arun(query) for query in [*queries, *chats, *split]))

    results = asyncio.run(main())
    for whole, one in zip(wholes, results, strict=False):
        assert furthest(whole, one) < CLOSE
    parts = iter(results[len(queries) + len(chats) :])
    for query, whole in zip(queries, wholes, strict=True):
        for id in query.questions:
            assert furthest({id: whole[id]}, next(parts)) < CLOSE


def test_answers_do_not_follow_from_ids_order_or_neighbours(llm: LLM) -> None:
    seeds = range(8)
    check_together(llm, seeds, [check_alone(llm, seed) for seed in seeds])


@pytest.mark.slow
@pytest.mark.parametrize("ops", tiny.OPS[1:])
def test_five_hundred_requests_do_not_follow_from_their_neighbours(nano: LLM, ops: str) -> None:
    llm = random_llm(nano, ops)
    for first in range(0, 500, 20):
        seeds = range(first, first + 20)
        check_together(llm, seeds, [check_alone(llm, seed) for seed in seeds])
