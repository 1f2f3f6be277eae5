"""Arguments of `LLM`, checked for their kind: one sentence instead of a TypeError from inside.

Only kinds are checked here; what a value may be is for whoever uses it."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from sfumato.errors import InputError
from sfumato.options import Options


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """InputError where the value, which messages call `name`, is not of these kinds."""
    if not isinstance(value, kinds):
        raise InputError(f"{name} is {reprlib.repr(value)}; give {expected}")


def check_list(name: str, value: Any, expected: str) -> None:
    """InputError where the value is no list, or has nothing in it."""
    check_kind(name, value, (list, tuple), expected)
    if not value:
        raise InputError(f"{name} is an empty list; give {expected}")


def check_text(name: str, value: Any) -> None:
    """InputError where the value is no text."""
    check_kind(name, value, str, "text")


def check_options(options: Any) -> None:
    """InputError where the value is no `Options`."""
    if not isinstance(options, Options):
        raise InputError(f"options is {reprlib.repr(options)}; give an Options, or a dict of them", option="options")


def options_of(options: Any, changes: Mapping[str, Any]) -> Options:
    """The options of a call: an `Options` or a dict of some, and those that are given one by one, which win.

    InputError for another type, an unknown name or a wrong value."""
    if isinstance(options, Mapping):
        options = Options.from_dict(options)
    check_options(options)
    merged: Options = options.with_changes(changes)
    return merged


def check_messages(name: str, messages: Any) -> None:
    """InputError where the value is no list of messages with a role; what they may hold is checked where it is used."""
    check_kind(name, messages, (list, tuple), "a text, a message or a list of messages")
    if not messages:
        raise InputError(f"{name} is empty; give at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            several = "; chat_many answers several texts" if isinstance(message, str) else ""
            raise InputError(
                f'message {number} is {reprlib.repr(message)}; give a record with "role" and "content"{several}'
            )
        check_kind(f"the role of message {number}", message.get("role"), str, "system, user, assistant or tool")
        if message.get("content") is None and message["role"] not in ("assistant", "tool", "function"):
            raise InputError(f"message {number} ({reprlib.repr(message['role'])}) has no content; give text")
        content = message.get("content")
        parts = content if isinstance(content, (list, tuple)) else []
        if not isinstance(content, str | list | tuple | None) or not all(isinstance(part, Mapping) for part in parts):
            raise InputError(
                f"the content of message {number} is {reprlib.repr(content)}; give text, or a list of text parts"
            )


def check_tools(tools: Any) -> None:
    """InputError where the value is neither a list of tools nor None."""
    if tools is not None:
        check_kind("tools", tools, (list, tuple), "a list of function declarations")
        for number, tool in enumerate(tools):
            check_kind(f"tool {number}", tool, Mapping, "a function declaration, a record with its name")


def check_template_prompt(prompt: Any, is_needed: bool = False) -> None:
    """InputError for what no template answers: it answers a text, a conversation, or nothing unless one `is_needed`."""
    if not isinstance(prompt, str) and (prompt is not None or is_needed):
        check_messages("the prompt", prompt)


def check_count(name: str, value: Any, least: int, most: int) -> None:
    """InputError where the value is no whole number in these limits."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        message = f"{name} is {reprlib.repr(value)}; give a whole number from {least} to {most}"
        raise InputError(message, option=name)


def check_ids(name: str, ids: Any, vocab_size: int) -> None:
    """InputError where the value is no list of token ids of a model with so many."""
    check_kind(name, ids, (list, tuple), "a list of token ids")
    if not _are_below(ids, vocab_size):
        bad = next(token for token in ids if not _is_below(token, vocab_size))
        raise InputError(f"{name} holds token {reprlib.repr(bad)}; the vocabulary has ids from 0 to {vocab_size - 1}")


def check_places(what: str, owner: str, places: Any, most: int, vocab_size: int) -> None:
    """InputError where these are no positions of an answer, of so many, with tokens; they are a `what` of `owner`."""
    check_kind(f"{what}s of {owner}", places, Mapping, "a record of positions and tokens")
    if _are_below(places.keys(), most) and _are_below(places.values(), vocab_size):
        return
    for position, token in places.items():
        if not _is_below(position, most) or not _is_below(token, vocab_size):
            raise InputError(
                f"{what} {reprlib.repr(token)} at position {reprlib.repr(position)} of {owner} does not fit; positions "
                f"go to {most - 1}, tokens to {vocab_size - 1}"
            )


def _is_below(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit


def _are_below(values: Collection[Any], limit: int) -> bool:
    return not values or ({*map(type, values)} == {int} and min(values) >= 0 and max(values) < limit)
