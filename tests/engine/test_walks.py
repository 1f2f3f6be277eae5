"""engine/walks.py: grammars on a real canvas: random weights, so that nothing but the mechanism can be responsible for
a valid text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import tiny
import torch
from random_schemas import generated, valid

from sfumato import LLM, Options, Slot
from sfumato.checkpoints.locate import NANO
from sfumato.engine.request import GrammarSpan, Request
from sfumato.engine.run import Run
from sfumato.engine.walks import _pick_
from sfumato.errors import InputError
from sfumato.events import Commit, Done
from sfumato.model.config import read_generation_config
from sfumato.templates.requests import Complete
from sfumato.text.replies import parse_ids
from sfumato.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

CASES, SEEDS, BATCH = 200, 5, 40


@pytest.fixture(scope="module")
def wild() -> Iterator[LLM]:
    """Random weights behind nano's tokenizer, on canvases of 24 positions; every grammar is compiled once."""
    tokenizer = Tokenizer.from_folder(NANO)
    config = tiny.tiny_config(vocab_size=512, canvas_length=24, max_position=2048, eos_ids=(1, 5, 13), vision=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfumato.templates.grammars.GRAMMARS_KEPT", 2 * CASES)
        yield LLM(tiny.tiny_model(config, seed=4, name="fused"), tokenizer, defaults=read_generation_config(NANO)[0])


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM.load("nano", ops="fused")


def constrained(llm: LLM, value: Any, **more: Any) -> Options:
    """With twice the shortest valid text as the budget."""
    kind = "regex" if isinstance(value, str) else "schema"
    budget = 2 * llm.planner.grammars.compile(kind, value).shortest()
    return Options(**{kind: value}, max_tokens=max(budget, 1), max_steps=3, **more)


def outputs(llm: LLM, each: list[Options]) -> list[Done]:
    prompts = [llm.encode("x" * (n % 5 + 1)) for n in range(len(each))]
    done = {event.row: event for event in llm.events(prompts, options=each) if isinstance(event, Done)}
    return [done[n] for n in range(len(each))]


@pytest.mark.parametrize("seed", [n if n < 1 else pytest.param(n, marks=pytest.mark.slow) for n in range(SEEDS)])
def test_a_thousand_texts_of_random_weights_are_valid_and_end(wild: LLM, seed: int) -> None:
    values = generated(CASES, 77)
    assert len({json.dumps(value) for value in values}) == CASES >= 150
    ended = 0
    for start in range(0, CASES, BATCH):
        some = values[start : start + BATCH]
        for value, done in zip(some, outputs(wild, [constrained(wild, v, seed=seed) for v in some]), strict=True):
            if done.finish_reason == "stop":
                ended += 1
                assert valid(value, done.text), (value, done.text)
    assert ended >= 0.95 * CASES
    assert ended == CASES  # the projection knows how much room is left


def test_alone_in_a_batch_and_from_a_stream_the_text_is_the_same(wild: LLM) -> None:
    values = generated(12, 5)
    each = [constrained(wild, value, seed=n) for n, value in enumerate(values)]
    together = outputs(wild, each)
    for n, options in enumerate(each):
        alone = list(wild.events([wild.encode("x" * (n % 5 + 1))], options=options))
        assert isinstance(alone[-1], Done) and alone[-1].tokens == together[n].tokens
        assert "".join(event.text for event in alone if isinstance(event, Commit)) == together[n].text


def test_early_answers_obey_too(wild: LLM) -> None:
    values = generated(20, 6)
    for value, done in zip(
        values, outputs(wild, [constrained(wild, v, seed=1, early=True) for v in values]), strict=True
    ):
        assert done.finish_reason == "stop" and valid(value, done.text)


@pytest.mark.parametrize("stability", [0, 1])
def test_early_answers_obey_however_little_sureness_is_asked(nano: LLM, stability: int) -> None:
    value = r"([0-4]{6}-low|[5-9]{6}-high)"
    careless: dict[str, Any] = {"confidence": 2.0, "stability": stability, "entropy_bound": 5.0, "max_steps": 8}
    each = [Options(regex=value, max_tokens=30, seed=seed, early=True, **careless) for seed in range(40)]
    for done in outputs(nano, each):
        assert done.finish_reason == "stop" and valid(value, done.text), done.text


def test_every_draft_begins_with_a_valid_path(nano: LLM) -> None:
    """What is accepted from the left on can always be completed: the grammar itself says so."""
    value = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    }
    grammar = nano.planner.grammars.compile("schema", value)
    matcher, longest = grammar._vocabulary.matcher(grammar._source), 0
    for event in nano.stream(Complete("Sudoku", Options(schema=value, max_tokens=40, seed=3, drafts=True))):
        if hasattr(event, "accepted"):
            until = next((n for n, flag in enumerate(event.accepted) if not flag), len(event.tokens))
            ends = [n for n, token in enumerate(event.tokens) if token in nano.planner.fillers]
            prefix = event.tokens[: min([until, *ends])]
            assert matcher.deep_copy().validate_tokens(prefix) == len(prefix)
            longest = max(longest, len(prefix))
    assert longest >= 6  # the scaffold at least


def test_scaffold_costs_no_steps(nano: LLM) -> None:
    """An answer that the schema alone determines is there after the fewest steps that any canvas takes."""
    done = nano.complete("x", options=Options(schema={"const": {"name": "Ada", "list": [1, 2, 3]}}, seed=1))
    assert json.loads(done.text) == {"name": "Ada", "list": [1, 2, 3]} and done.finish_reason == "stop"
    assert done.usage.steps == 2


def test_a_schema_that_is_no_json_is_refused_by_a_sentence(nano: LLM) -> None:
    with pytest.raises(InputError, match="no JSON"):
        nano.complete("x", options=Options(schema={"enum": {1, 2}}))


def test_a_budget_that_just_fits_stops_and_says_so(nano: LLM) -> None:
    fits = nano.planner.grammars.compile("regex", "[0-9]{5}").shortest()
    done = nano.complete("x", options=Options(regex="[0-9]{5}", max_tokens=fits, seed=1))
    assert done.finish_reason == "stop" and len(done.text) == 5
    with pytest.raises(InputError, match=str(fits)):
        nano.complete("x", options=Options(regex="[0-9]{5}", max_tokens=fits - 1))


def test_a_text_over_several_canvases(nano: LLM) -> None:
    value = {
        "type": "array",
        "items": {"type": "string", "minLength": 12, "maxLength": 20},
        "minItems": 12,
        "maxItems": 14,
    }
    done = nano.complete("x", options=Options(schema=value, seed=2, max_steps=4, max_tokens=512))
    jsonschema.validate(json.loads(done.text), value)
    assert done.usage.canvases > 1 and done.finish_reason == "stop"


def test_slots_with_grammars_beside_free_ones(nano: LLM) -> None:
    template: list[str | Slot] = [
        "id: ",
        Slot("id", regex="[A-F]{2}[0-9]{4}"),
        "; ",
        Slot("word", length=4),
        "; ",
        Slot("n", choices=("one", "two")),
    ]
    for seed in range(5):
        filled = nano.fill(template, options=Options(seed=seed, max_steps=6))
        assert valid("[A-F]{2}[0-9]{4}", filled.values["id"]) and filled.values["n"] in ("one", "two")
        assert filled.text == f"id: {filled.values['id']}; {filled.values['word']}; {filled.values['n']}"


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Book a table.",
        "parameters": {
            "type": "object",
            "properties": {
                "guests": {"type": "integer", "minimum": 1, "maximum": 12},
                "place": {"type": "string", "minLength": 1, "maxLength": 12},
                "day": {"enum": ["mo", "tu"]},
            },
            "required": ["guests", "day"],
        },
    },
}


def test_a_strict_call_obeys_its_tools_schema(wild: LLM, nano: LLM) -> None:
    called = 0
    ids = nano.encode([{"role": "user", "content": "A table, please."}], tools=[TOOL])
    lead = [wild.tokenizer.id("<|tool_call>") or 0]  # random weights never open a call by themselves
    grammar = wild.planner.grammars.compile("calls", [TOOL])
    for seed in range(12):
        span = GrammarSpan(0, None, grammar)
        options = Options(seed=seed, max_tokens=70, max_steps=3)
        ask = wild.planner.ask(Request(ids, options, pins=dict(enumerate(lead)), spans=[span]))
        done = list(Run(wild.model, [ask.request]))[-1]
        assert isinstance(done, Done) and done.finish_reason == "stop"
        for call in parse_ids(wild.tokenizer, done.tokens).tool_calls:
            called += 1
            assert call["name"] == "book"
            jsonschema.validate(call["arguments"], TOOL["function"]["parameters"])
    assert called >= 12
    free = nano.chat(
        [{"role": "user", "content": "x"}], tools=[TOOL], options=Options(strict=True, max_tokens=40, seed=1)
    )
    assert all(c["name"] == "book" for c in free.tool_calls)
    assert free.finish_reason == ("stop" if free.tool_calls else "length")  # a text that was cut is no whole one


def test_stop_strings_still_end_an_answer(nano: LLM) -> None:
    done = nano.complete("x", options=Options(regex="[0-9]{3};[0-9]{3}", stop=(";",), seed=1))
    assert len(done.text) == 3 and done.stop == ";"


def test_a_pick_is_the_best_of_what_is_allowed_and_masks_the_rest() -> None:
    logits = torch.tensor([5.0, 1.0, 3.0, 3.0 + 1e-3])
    token, entropy = _pick_(logits, torch.tensor([False, True, True, True]))
    p = torch.softmax(torch.tensor([1.0, 3.0, 3.0 + 1e-3]), -1)
    assert token == 3 and entropy == pytest.approx(float(-(p * p.log()).sum()))
    assert logits[0] == -torch.inf and logits[1] == 1.0
    assert _pick_(torch.tensor([1.0, 2.0]), torch.tensor([True, False])) == (0, 0.0)
