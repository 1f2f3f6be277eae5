"""Queries, checked for the kinds of their arguments: one sentence that names what is wrong, instead of a TypeError.

The same for a model in this process and for one behind a URL, before anything is computed or sent. What a value may be
beyond its kind (a token of the vocabulary, a length that fits) is for whoever carries the query out. No torch here.
"""

from __future__ import annotations

import reprlib
from typing import Any, get_args

from sfumato.engine import arguments
from sfumato.errors import InputError
from sfumato.model.prompt import Prompt
from sfumato.options import BIG, MOST_STEPS
from sfumato.questions import check_content, check_questions
from sfumato.templates.requests import Chat, Complete, CountTokens, Decide, Edit, Fill, Infill, Likelihood, Think
from sfumato.templates.slots import Slot, check_spans, check_template

MOST_SAMPLES = 256
"""Draws of noise that a decision may take."""


def check_query(query: Any) -> None:
    """InputError for a query whose arguments are of another kind; a query of a kind that is not known here passes."""
    arguments.check_options(query.options)
    match query:
        case Complete():
            if not isinstance(query.prompt, str | Prompt):
                arguments.check_list("the prompt", query.prompt, "a text, or a list of token ids")
        case Chat():
            arguments.check_messages("the conversation", query.conversation)
            arguments.check_tools(query.tools)
            if query.is_continued:
                _check_continued(query)
        case Infill():
            arguments.check_text("the prefix", query.prefix)
            arguments.check_text("the suffix", query.suffix)
            Slot("middle", length=query.length, at_most=query.at_most)
        case Fill():
            arguments.check_template_prompt(query.prompt)
            check_template(query.template)
        case Edit():
            _check_edit(query)
        case Decide():
            _check_decide(query)
        case Likelihood():
            _check_score(query)
        case CountTokens():
            arguments.check_kind("the query", query.query, (Chat, Complete), "a Chat or a Complete")
            check_query(query.query)


def _check_continued(query: Chat) -> None:
    """InputError where the last message cannot be the beginning of an answer."""
    last = query.conversation[-1] if query.conversation else {}
    if last.get("role") != "assistant" or last.get("tool_calls") or not last.get("content"):
        raise InputError("is_continued needs a last message of the assistant with text and no calls; give one")
    options = query.options
    if options.thinking or options.must_call:
        name = "thinking" if options.thinking else "must_call"
        raise InputError(f"{name} cannot go with an answer that has begun; drop the last message", option=name)


def _check_edit(query: Edit) -> None:
    arguments.check_text("the text", query.text)
    arguments.check_kind("the instruction", query.instruction, (str, type(None)), "text")
    if not query.text:
        raise InputError("the text is empty, so there is nothing to edit")
    if query.spans is not None:
        check_spans(query.spans)
    if query.instruction is None and not query.spans:
        raise InputError("neither an instruction nor spans are given; say what to change, or where")
    if query.strength is not None:
        Slot("text", text=query.text, strength=query.strength)


def _check_decide(query: Decide) -> None:
    if query.conversation is not None:
        try:
            arguments.check_messages("the state", query.conversation)
        except InputError as error:
            raise InputError(str(error), option="state") from None
    elif query.state is None:
        raise InputError("the state is missing; give what the questions are about", option="state")
    check_content("the state", query.state, option="state")
    check_questions(query.questions)
    arguments.check_count("steps", query.steps, 1, MOST_STEPS)
    arguments.check_count("samples", query.samples, 1, MOST_SAMPLES)
    if query.canvas is not None:
        arguments.check_count("canvas", query.canvas, 1, BIG)
    if not isinstance(query.calibrated, bool):
        message = f"calibrated is {reprlib.repr(query.calibrated)}; give true or false"
        raise InputError(message, option="calibrated")
    if query.think not in get_args(Think):
        message = f"think is {reprlib.repr(query.think)}; choose {', '.join(get_args(Think))}"
        raise InputError(message, option="think")
    is_number = isinstance(query.threshold, (int, float)) and not isinstance(query.threshold, bool)
    if not is_number or not 0 <= query.threshold <= 1:
        message = f"threshold is {reprlib.repr(query.threshold)}; give a confidence from 0 to 1"
        raise InputError(message, option="threshold")


def _check_score(query: Likelihood) -> None:
    if not isinstance(query.prompt, str | Prompt):
        arguments.check_list("the prompt", query.prompt, "a text, or a list of token ids")
    if query.continuation is None:
        return
    if isinstance(query.prompt, str):
        arguments.check_text("the continuation", query.continuation)
    else:
        arguments.check_kind(
            "the continuation", query.continuation, (list, tuple), "a list of token ids, as the prompt"
        )
    if not query.continuation:
        raise InputError("the continuation is empty, so there is nothing to score; give a text, or leave it out")
