"""templates/deciding.py: an answer follows from the state and its own question, and from nothing beside them."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import tiny
import torch

from sfumato import LLM, Chat, Decide, Decision, Decisions, Options
from sfumato.errors import InputError
from sfumato.model.cache import KVCache
from sfumato.questions import Choice, Noul, Question, Score, Span
from sfumato.sampling.noise import CountedNoise
from sfumato.templates import deciding
from sfumato.templates.deciding import _thought_of, _ThoughtReader
from sfumato.text.replies import ReplyParser

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
        max_position=4096,
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
    whole: Decisions = llm.run(query)
    renamed, (moved, *alone) = variants(query, seed)
    answers: Decisions = llm.run(moved)
    assert furthest(whole, {id: answers[name] for id, name in renamed.items()}) < CLOSE
    for id, one in zip(renamed, alone, strict=True):
        llm.forget() if seed % 2 else None  # the state is encoded again, or is still there
        decided: Decisions = llm.run(one)
        assert furthest({id: whole[id]}, decided) < CLOSE
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
    seeds = range(5)
    check_together(llm, seeds, [check_alone(llm, seed) for seed in seeds])


def test_the_same_question_has_the_same_answer(llm: LLM) -> None:
    """Without a seed too; the state of the last call is not encoded again, and other draws are other numbers."""
    query = Decide("The parcel is late and the customer is angry about that. " * 4, {"late": Noul("Is it late?")})
    first, again = llm.run(query), llm.run(query)
    assert furthest(first, again) < CLOSE
    state = first.usage.prompt_tokens - again.usage.reused_tokens
    assert 0 < state < 60 < again.usage.reused_tokens
    assert again.seed == first.seed == 0
    for other in dataclasses.replace(query, options=Options(seed=1)), dataclasses.replace(query, samples=3):
        changed: Decisions = llm.run(other)
        assert furthest(first, changed) > CLOSE
    # A chat about something else between them changes nothing.
    llm.chat("Hello", max_tokens=4, max_steps=2, seed=1)
    after: Decisions = llm.run(query)
    assert furthest(first, after) < CLOSE


@torch.inference_mode()
@pytest.mark.parametrize("ops", tiny.OPS)
def test_a_choice_is_the_product_of_its_tokens_read_one_by_one(nano: LLM, ops: str) -> None:
    """Brute force: the whole prompt through the chat template, a canvas for every beginning of every option."""
    llm = random_llm(nano, ops)
    state, names = "The order is late.", ["Billing", "Billing team", "Shipping", "", "<turn|>", "東京", "Bill " * 200]
    decision = llm.decide(state, {"x": Choice(names, "Which one?")})["x"]
    (text,) = [Choice(names, "Which one?").text()]
    prompt = llm.encode([{"role": "user", "content": f"{state}\n\n{text}"}])
    cache = KVCache.allocate(llm.model.config, 1, len(prompt))
    llm.model.encode(torch.tensor([prompt.tokens]), cache)
    tokens, end = [llm.tokenizer.encode(name) for name in names], llm.tokenizer.id("<turn|>")
    assert end is not None
    noise = CountedNoise([0], [0], 16, llm.model.config.vocab_size).canvas([0], [0])

    ended = [[*one, end] for one in tokens]

    def ways(path: list[int]) -> list[int]:
        return sorted({one[len(path)] for one in ended if one[: len(path)] == path})

    chances = []
    for own in tokens:
        p = 1.0
        for depth in range(len(own) + 1):
            path, canvas = own[:depth], noise.clone()
            if len(ways(path)) < 2:
                continue
            canvas[0, :depth] = torch.tensor(path)
            logits = llm.model.logits(llm.model.denoise(canvas, cache))[0, depth, ways(path)]
            p *= float(logits.softmax(-1)[ways(path).index([*own, end][depth])])
        chances.append(p)
    assert sum(chances) == pytest.approx(1.0, abs=1e-5)
    assert [*decision.probabilities.values()] == pytest.approx(chances, abs=1e-4)


# ---- options, passages, dependencies --------------------------------------------------------------------------------


def test_options_of_any_text(llm: LLM) -> None:
    lone = llm.decide("x", {"a": Choice(["only"])})["a"]
    assert (lone.choice, lone.probability, lone.confidence) == ("only", 1.0, 1.0)
    long = llm.decide("x", {"a": Choice(["so " * 60, "no", ""])})
    assert len(long["a"].probabilities) == 3
    assert llm.decide("x", {"a": Choice([f"Queue {n:03d}" for n in range(255)])}).usage.passes <= 3


def test_options_that_no_canvas_can_tell_apart_are_refused(llm: LLM) -> None:
    with pytest.raises(InputError, match=r"question 'a' has options that are alike for \d+ tokens, more than a canvas"):
        llm.decide("x", {"a": Choice(["so " * 300 + "on", "so " * 300 + "forth"])})
    with pytest.raises(InputError, match=r"canvas is 1; question 'a' needs [2-9] positions"):
        llm.decide("x", {"a": Choice(["Queue 01", "Queue 02"])}, canvas=1)
    with pytest.raises(InputError, match="the model's own canvas has 32"):
        llm.decide("x", {"a": Choice(["yes", "no"])}, canvas=33)


def test_a_span_quotes_the_text(llm: LLM) -> None:
    text = "  Hello there. Hello there. My order is late!\nBye\u2028."
    span = llm.decide(text, {"a": Span("Which sentence says why?")})["a"]
    assert set(span.probabilities) == {"Hello there.", "My order is late!", "Bye\u2028."}
    assert span.place is not None
    assert text[slice(*span.place)] == span.choice
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "One. Two."}]},
        {"role": "assistant", "content": "Go."},
    ]
    assert set(llm.decide(chat, {"a": Span("Which?")})["a"].probabilities) == {"One.", "Two.", "Go."}
    assert len(llm.decide({"a": [1, 2]}, {"a": Span("Which?", "line")})["a"].probabilities) == 1


def test_what_depends_on_an_answer_is_asked_behind_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    top = Choice(["red", "blue"], "Which?")
    choice = llm.decide("The sky.", {"a": top})["a"].choice
    other = "blue" if choice == "red" else "red"
    questions: dict[str, Question] = {
        "c": Noul("Surely?", depends_on=("b", "true")),  # type: ignore[arg-type]
        "no": Noul("Is it so?", depends_on=("a", other)),  # type: ignore[arg-type]
        "below no": Noul("And?", depends_on=("no", "true")),  # type: ignore[arg-type]
        "a": top,
        "b": Noul("Is it so?", depends_on=("a", choice)),  # type: ignore[arg-type]
    }
    answers = llm.decide("The sky.", questions)
    b = answers["b"].choice
    assert set(answers.skipped) == {"no", "below no"} | (set() if b == "true" else {"c"})
    assert [*answers] == [id for id in questions if id not in answers.skipped]
    # It has been told the answer, and is read as that question alone.
    alone = llm.decide("The sky.", {"b": Noul(f"{top.text()}\nThe answer was: {choice}\n\nIs it so?")})
    assert furthest({"b": answers["b"]}, alone) < CLOSE
    assert choice in answers["a"].probabilities


def test_a_model_without_a_template_answers_behind_plain_text(nano: LLM) -> None:
    llm = LLM(random_llm(nano).model, nano.tokenizer, None, {}, "plain")
    questions: dict[str, Question] = {"a": Choice(["one", "one\ntwo", "one two"]), "b": Noul("Is it?")}
    whole = llm.decide("A text.", questions)
    assert furthest({"b": whole["b"]}, llm.decide("A text.", {"b": questions["b"]})) < CLOSE
    assert set(whole["a"].probabilities) == {"one", "one\ntwo", "one two"}
    with pytest.raises(InputError, match="think is 'always', and plain has no chat template to think with"):
        llm.decide("A text.", questions, think="always")
    with pytest.raises(InputError, match="has no chat template"):
        llm.decide([{"role": "user", "content": "A text."}], questions)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("a\ud800", "the state has a lone surrogate"),
        ([{"role": "user"}], "message 0 .* has no content"),
        ([{"role": "king", "content": "a"}], "has the role 'king'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}, {"type": "text", "text": "A."}]}], "message 0"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "a"}]}], "'image_url'"),
    ],
)
def test_what_is_wrong_with_a_state_is_said_of_the_state(llm: LLM, state: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        llm.decide(state, {"a": Noul("Is it?"), "b": Span("Where?")})
    assert refused.value.option == "state"


def test_a_record_with_a_role_is_data(llm: LLM) -> None:
    one = llm.decide({"role": "engineer", "name": "Ann"}, {"a": Noul("Is it?")})
    assert furthest(one, llm.decide('{"role": "engineer", "name": "Ann"}', {"a": Noul("Is it?")})) < CLOSE


# ---- thoughts -------------------------------------------------------------------------------------------------------


def test_a_thought_is_what_stands_before_its_end() -> None:
    opener, closer, end = 100, 101, 1
    assert _thought_of([opener, 5, 6, closer], opener, closer, {end}) == [opener, 5, 6, closer]
    assert _thought_of([opener, 5, closer, 7, end], opener, closer, {end}) == [opener, 5, closer]
    assert _thought_of([opener, 5, 6], opener, closer, {end}) == [opener, 5, 6, closer]
    assert _thought_of([opener, 5, end, 6], opener, closer, {end}) == [opener, 5, closer]
    assert _thought_of([5, 6, end], opener, closer, {end}) == []
    assert _thought_of([5, 6], None, closer, {end}) == [5, 6, closer]


def test_a_thought_ends_where_it_is_closed(llm: LLM) -> None:
    closer = llm.tokenizer.id("<channel|>")
    assert closer is not None
    reader = _ThoughtReader(llm.tokenizer, closer, (1,), ReplyParser(llm.tokenizer, (1,)))
    assert reader.push([5, 6, 7]) is None
    assert reader.push([5, closer, 7, closer]) == 2


def test_unsure_answers_are_thought_about(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's thoughts fill their budget; what is read behind them is what stands behind a closed thought."""
    monkeypatch.setattr(deciding, "THOUGHT", 8)
    questions: dict[str, Question] = {"a": Choice(["red", "blue"]), "b": Noul("Is it?"), "c": Choice(["only"])}
    plain = llm.decide("The sky.", questions)
    middle = (plain["a"].confidence + plain["b"].confidence) / 2
    unsure = min("ab", key=lambda id: plain[id].confidence)
    some = llm.decide("The sky.", questions, think="auto", threshold=middle)
    every = llm.decide("The sky.", questions, think="always")
    again = llm.decide("The sky.", questions, think="always")
    assert furthest(every, again) < CLOSE
    assert some.usage.tokens == 8
    assert every.usage.tokens == 3 * 8
    for id in "abc":
        assert some[id].probabilities == pytest.approx((every if id == unsure else plain)[id].probabilities, abs=CLOSE)
    nobody = llm.decide("The sky.", questions, think="auto", threshold=0.0)
    assert furthest(plain, nobody) < CLOSE
    assert nobody.usage.tokens == 0


def test_a_thought_that_has_no_room_is_refused_by_its_question(llm: LLM) -> None:
    state, questions = "1 " * 2012, {"b": Noul("Is it?")}
    assert llm.decide(state, questions).keys() == {"b"}
    with pytest.raises(
        InputError, match=r"question 'b' .* a thought needs a canvas of 32 more.* 4096; leave think"
    ) as no:
        llm.decide(state, questions, think="always")
    assert no.value.option == "think"


def test_what_a_server_allows_is_less_than_the_model(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thought ends in time for it, and what does not fit is said of the question or of the state."""
    monkeypatch.setattr(llm.planner, "context", 120)
    thought = llm.decide("The sky.", {"b": Noul("Is it?")}, think="always").usage
    assert 0 < thought.tokens < 120
    with pytest.raises(InputError, match=r"question 'b' has .* beyond the context of 120") as no:
        llm.decide("The sky.", {"a": Noul("?"), "b": Noul("1 " * 60)})
    assert (no.value.option, no.value.item) == ("questions", "b")


@pytest.mark.slow
@pytest.mark.parametrize("ops", tiny.OPS[1:])
def test_five_hundred_requests_do_not_follow_from_their_neighbours(nano: LLM, ops: str) -> None:
    llm = random_llm(nano, ops)
    for first in range(0, 500, 20):
        seeds = range(first, first + 20)
        check_together(llm, seeds, [check_alone(llm, seed) for seed in seeds])
