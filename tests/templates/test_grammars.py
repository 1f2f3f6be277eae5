"""templates/grammars.py: every constraint beside thoughts, tools and their choice; answers of random weights obey."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import jsonschema
import pytest
import tiny
import torch

from sfumato import LLM, Options
from sfumato.checkpoints.locate import NANO
from sfumato.events import Completion
from sfumato.model.config import read_generation_config
from sfumato.templates.requests import Chat
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
ODD = {"type": "object", "properties": {"a": {"type": "array", "contains": {"type": "string"}}}}
"""A schema whose calls cannot be guaranteed."""
CONSTRAINTS: dict[str, Any] = {
    "schema": PERSON,
    "regex": "[a-f]{2,9}(-[0-9]+)?",
    "choices": ("yes", "no", "perhaps not"),
    "grammar": 'start: "<" WORD ("," WORD)* ">"\nWORD: /[a-z]+/',
}
KINDS = (*CONSTRAINTS, "")
TOOL_MODES: tuple[dict[str, Any], ...] = ({}, {"strict": True}, {"must_call": True})
USER = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def wild() -> LLM:
    """Random weights behind nano's tokenizer and template, on canvases of 24 positions; control tokens are likely."""
    tokenizer = Tokenizer.from_folder(NANO)
    config = tiny.tiny_config(vocab_size=512, canvas_length=24, max_position=4096, eos_ids=(1, 5, 13), vision=None)
    model = tiny.tiny_model(config, seed=4, name="fused")
    with torch.no_grad():  # openers and closers of thoughts and calls, ends of strings and turns
        model.embed_tokens.weight[[5, 7, 8, 11, 15]] *= 2.5
    template = ChatTemplate.from_folder(NANO, tokenizer.special)
    return LLM(model, tokenizer, template, defaults=read_generation_config(NANO)[0])


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


def check_table(llm: LLM, queries: list[Chat]) -> dict[tuple[Any, ...], set[str]]:
    """Each combination, and what its answers had."""
    shown: dict[tuple[Any, ...], set[str]] = {}
    for start in range(0, len(queries), 40):
        some = queries[start : start + 40]
        for query, completion in zip(some, llm._carry_out(llm.planner.answers(some)), strict=True):
            options = query.options
            key = options.constraint and options.constraint[0], options.thinking, bool(query.tools), options.must_call
            shown.setdefault(key, set()).update(check_answer(query, completion))
    return shown


def test_every_combination_obeys(wild: LLM) -> None:
    shown = check_table(wild, table(range(2)))
    assert len(shown) == 2 * (4 * 3 + 2) and {"thought", "text", "calls"} == set().union(*shown.values())


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"max_tokens": 40}, {"early": True}, {"max_tokens": None, "max_steps": 2}])
def test_many_answers_of_every_combination_obey(wild: LLM, more: dict[str, Any]) -> None:
    shown = check_table(wild, table(range(100, 116), **more))
    for (kind, is_thinking, has_tools, must_call), what in shown.items():
        assert ("thought" in what) == is_thinking, (kind, what)
        assert ("calls" in what) == has_tools and ("text" in what) != must_call
