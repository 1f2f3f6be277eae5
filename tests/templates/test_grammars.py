"""templates/grammars.py, prompts.py: constraints beside thoughts, tools and their choice: random weights obey."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import gemma_vocab
import jsonschema
import pytest
import tiny
import torch

from sfumato import LLM, CapacityError, InputError, Options
from sfumato.checkpoints.locate import NANO
from sfumato.events import Commit, Completion, Done
from sfumato.model.config import read_generation_config
from sfumato.model.prompt import Prompt
from sfumato.templates.grammars import parts_of
from sfumato.templates.prompts import PromptEncoder
from sfumato.templates.requests import Chat
from sfumato.text.replies import PromptEnd
from sfumato.text.template import ChatTemplate
from sfumato.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
BOOK = {
    "type": "object",
    "properties": {"guests": {"type": "integer", "minimum": 1, "maximum": 12}, "day": {"enum": ["mo", "tu"]}},
    "required": ["guests", "day"],
}
TOOLS = [
    {"type": "function", "function": {"name": "book", "description": "Book a table.", "parameters": BOOK}},
    {"type": "function", "function": {"name": "ask", "description": "Ask a waiter.", "parameters": None}},
]
ODD = {"type": "object", "properties": {"a": {"$ref": "https://example.com/schema"}}}
"""A schema whose calls cannot be guaranteed."""
CONSTRAINTS: dict[str, Any] = {
    "schema": PERSON,
    "regex": "[a-f]{2,9}(-[0-9]+)?",
    "choices": ("yes", "no", "perhaps not"),
    "grammar": 'start: "<" WORD ("," WORD)* ">"\nWORD: /[a-z]+/',
}
KINDS = (*CONSTRAINTS, "")
TOOL_MODES: tuple[dict[str, Any], ...] = ({}, {"strict": True}, {"must_call": True})
USER: list[dict[str, Any]] = [{"role": "user", "content": "Who?"}]


OPEN = "{{ bos_token }}<|turn>user\n{{ messages[0].content }}<turn|>\n<|turn>model\n<|channel>thought\n"
"""A template whose prompts end within a thought."""


def random_llm(factors: dict[int, float], template: str = "") -> LLM:
    """Random weights behind nano's tokenizer, on canvases of 24 positions; token -> how much larger its logits are."""
    tokenizer = Tokenizer.from_folder(NANO)
    config = tiny.tiny_config(vocab_size=512, canvas_length=24, max_position=4096, eos_ids=(1, 5, 13), vision=None)
    model = tiny.tiny_model(config, seed=4, name="fused")
    with torch.no_grad():
        for token, factor in factors.items():
            model.embed_tokens.weight[token] *= factor
    nanos = ChatTemplate.from_folder(NANO, tokenizer.special)
    chosen = ChatTemplate(template, tokenizer.special) if template else nanos
    return LLM(model, tokenizer, chosen, defaults=read_generation_config(NANO)[0])


@pytest.fixture(scope="module")
def wild() -> LLM:
    """Likely are what opens and closes thoughts and calls, and what ends strings and turns."""
    return random_llm({5: 2.5, 7: 3.5, 8: 2.5, 11: 4.0, 15: 2.5})


@pytest.fixture(scope="module")
def thinker() -> LLM:
    """Begins within a thought, and by itself says no control token, nor the byte FF, which no text has."""
    return random_llm(dict.fromkeys([*range(16), 271], 0.1), OPEN)


def options_of(kind: str, seed: int, **more: Any) -> Options:
    constraint = {kind: CONSTRAINTS[kind]} if kind else {}
    return Options(**constraint, seed=seed, **{"max_tokens": 90, "max_steps": 4} | more)


def check_text(kind: str, text: str) -> None:
    if kind == "schema":
        jsonschema.validate(json.loads(text), PERSON)
    elif kind in ("regex", "grammar"):
        assert re.fullmatch(CONSTRAINTS["regex"] if kind == "regex" else "<[a-z]+(,[a-z]+)*>", text), text
    elif kind == "choices":
        assert text in CONSTRAINTS["choices"]


def check_answer(query: Chat, completion: Completion) -> set[str]:
    """That an answer obeys; what it has."""
    options, calls = query.options, completion.tool_calls
    kind = options.constraint[0] if options.constraint else ""
    assert completion.finish_reason == "stop"
    assert not calls or query.tools
    assert calls or not options.must_call
    assert options.thinking or completion.thought is None
    for call in calls:
        schema = {"book": BOOK, "ask": {"maxProperties": 0}}[call["name"]]
        jsonschema.validate(call["arguments"], schema)
    if not calls:
        check_text(kind, completion.text)
    elif kind or options.must_call:
        assert completion.text == ""
    return {"calls" if calls else "text", *(["thought"] if completion.thought else [])}


def table(seeds: range, **more: Any) -> list[Chat]:
    """Every combination that holds the answer to something."""
    queries = []
    for kind, is_thinking, mode in itertools.product(KINDS, (False, True), (None, *TOOL_MODES)):
        if kind or mode:
            tools = None if mode is None else TOOLS
            for seed in seeds:
                options = options_of(kind, seed, thinking=is_thinking, **(mode or {}), **more)
                queries.append(Chat(USER, tools, options))
    return queries


def carried_out(llm: LLM, queries: list[Chat]) -> list[Completion]:
    """Answers that run together."""
    *_, completions = llm._carry_out(llm.planner.answers(queries))
    assert isinstance(completions, list)
    return completions


def check_table(llm: LLM, queries: list[Chat]) -> dict[tuple[Any, ...], set[str]]:
    """Each combination, and what its answers had."""
    shown: dict[tuple[Any, ...], set[str]] = {}
    for start in range(0, len(queries), 40):
        some = queries[start : start + 40]
        for query, completion in zip(some, carried_out(llm, some), strict=True):
            options = query.options
            key = options.constraint and options.constraint[0], options.thinking, bool(query.tools), options.must_call
            shown.setdefault(key, set()).update(check_answer(query, completion))
    return shown


def test_every_combination_obeys(wild: LLM) -> None:
    shown = check_table(wild, table(range(1)))
    assert len(shown) == 2 * (4 * 3 + 2) and {"thought", "text", "calls"} == set().union(*shown.values())


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"max_tokens": 40}, {"early": True}, {"max_tokens": None, "max_steps": 2}])
def test_many_answers_of_every_combination_obey(wild: LLM, more: dict[str, Any]) -> None:
    shown = check_table(wild, table(range(100, 105), **more))
    assert len(shown) == 2 * (4 * 3 + 2)
    assert {"thought", "text", "calls"} == set().union(*shown.values())
    for (_, is_thinking, has_tools, must_call), what in shown.items():
        assert is_thinking or "thought" not in what
        assert (has_tools or "calls" not in what) and not (must_call and "text" in what)


# ---- thoughts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "early"), [("schema", False), ("choices", True), ("", False)])
def test_a_thought_is_written_as_without_a_constraint(thinker: LLM, kind: str, early: bool) -> None:
    more: dict[str, Any] = {"max_tokens": 120, "max_steps": 8, "early": early, "confidence": 9.0, "stability": 0}
    tools = None if kind else TOOLS
    free, held = (
        [event for event in thinker.stream(Chat(USER, tools, options)) if isinstance(event, Commit)]
        for options in (options_of("", 3, **more), options_of(kind, 3, strict=not kind, **more))
    )
    canvases = [[(one.steps, one.tokens) for one in commits if one.canvas < 2] for commits in (free, held)]
    assert canvases[0] == canvases[1] and sum(len(tokens) for _, tokens in canvases[0]) == 48
    assert sum(one.steps for one in held if one.canvas < 2) < 2 * 8  # they stop by themselves


def test_an_open_thought_leaves_room_for_the_answer(thinker: LLM) -> None:
    closer = thinker.tokenizer.id("<channel|>") or 0
    for kind, room in itertools.product(CONSTRAINTS, (12, 30, 77)):
        least = thinker.planner.grammars.compile(kind, CONSTRAINTS[kind]).shortest()
        options = options_of(kind, 1, max_tokens=max(room, least + 1))
        *_, done = thinker.stream(Chat(USER, None, options))
        assert isinstance(done, Done) and done.finish_reason == "stop"
        check_text(kind, thinker.tokenizer.decode(done.tokens[done.tokens.index(closer) + 1 :]))
    with pytest.raises(CapacityError, match="at least 2 tokens and has room for 1; raise max_tokens") as short:
        thinker.chat(USER, options=Options(choices=("1",), max_tokens=1))
    assert short.value.option == "max_tokens"  # no conversation is too long


def test_a_stream_gives_the_thought_then_the_answer(wild: LLM) -> None:
    for seed in range(40):
        query = Chat(USER, TOOLS, options_of("schema", seed, thinking=True))
        *commits, done = wild.stream(query)
        assert isinstance(done, Done)
        pieces = [event for event in commits if isinstance(event, Commit)]
        assert "".join(piece.text for piece in pieces) == done.text
        assert "".join(piece.thought for piece in pieces) == (done.thought or "")
        if done.thought and done.text:
            assert carried_out(wild, [query] * 3)[2].text == done.text
            return
    raise AssertionError("no answer had a thought")


def test_where_a_prompt_ends(wild: LLM) -> None:
    encode = wild.tokenizer.encode
    for text, state in {
        "<|turn>model\n": "none",
        "<|turn>model\n<|channel>thought\n": "open",
        "<|turn>model\n<|channel>thought\n<channel|>": "closed",
        "<|turn>model\n<|channel>thought\n<channel|>\n": "closed",
        "<|turn>model\n<|channel>thought\nhm<channel|><|tool_call>call:f{}<tool_call|><|tool_response>x": "none",
        "<|channel>thought\n<turn|>\n<|turn>model\n": "none",
        "": "none",
    }.items():
        prompt = Prompt.of([2, *encode(text, parse_special=True)])
        assert PromptEnd.of(wild.tokenizer, prompt.tokens).thought == state, text


def test_gemmas_template_without_thinking_ends_with_a_closed_thought() -> None:
    tokenizer = Tokenizer(gemma_vocab.build())
    template = ChatTemplate(gemma_vocab.template(), {"bos_token": "<bos>"})
    call = {"id": "a", "type": "function", "function": {"name": "ask", "arguments": {}}}
    history: list[dict[str, Any]] = [*USER, {"role": "assistant", "content": "", "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "a", "content": "Ann"}]  # fmt: skip
    config = tiny.tiny_config(max_position=4096)
    prompts = PromptEncoder(config, tokenizer, template, "gemma")
    both: list[list[dict[str, Any]]] = [USER, history]
    ends = [PromptEnd.of(tokenizer, prompts.encode(m, TOOLS, t).tokens) for m in both for t in (True, False)]
    assert [end.thought for end in ends] == ["none", "closed", "none", "closed"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refusals_name_the_option(wild: LLM) -> None:
    for options, words in (
        ({"must_call": True, "mode": "autoregressive"}, "must_call goes neither with mode 'autoregressive'"),
        ({"strict": True, "min_tokens": 2}, "nor with min_tokens above 1"),
    ):
        with pytest.raises(InputError, match=words):
            wild.chat(USER, tools=TOOLS, options=options)
    with pytest.raises(InputError, match="there are no tools"):
        wild.chat(USER, must_call=True)


def test_a_tool_that_nobody_asked_to_be_strict_may_have_any_schema(wild: LLM) -> None:
    odd = {"type": "function", "function": {"name": "odd", "description": "", "parameters": ODD}}
    strict = parts_of(Options(strict=True), [odd])
    assert strict is not None and strict.calls is not None
    with pytest.raises(InputError, match="ref"):
        wild.planner.grammars.compile(*strict.calls)
    parts = parts_of(Options(schema={}), [odd, *TOOLS])
    assert parts is not None and parts.calls is not None and parts.text == ("schema", {})
    assert parts_of(Options(), [odd]) is None and parts_of(Options(strict=True), None) is None
    only = parts_of(Options(must_call=True, schema={}), TOOLS)
    assert only is not None and only.calls is None and only.text is not None and only.text[0] == "calls"
