"""What callers of `LLM` give, checked for its kind: one sentence instead of a TypeError from inside.

Only kinds are checked here; what a value may be is for whoever uses it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from sfumato.events import InputError, Options


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], wanted: str) -> None:
    """InputError where the value, which messages call `name`, is not of these kinds."""
    if not isinstance(value, kinds):
        raise InputError(f"{name} is {reprlib.repr(value)}; give {wanted}")


def check_text(name: str, value: Any) -> None:
    check_kind(name, value, str, "text")


def check_options(options: Any) -> None:
    check_kind("options", options, Options, "an Options")


def check_messages(name: str, messages: Any) -> None:
    check_kind(name, messages, (list, tuple), "a list of messages")
    for message in messages:
        check_kind("a message", message, Mapping, 'a record with "role" and "content"')


def check_template_prompt(prompt: Any) -> None:
    """What a template answers: a text, a conversation, or nothing."""
    if prompt is not None and not isinstance(prompt, str):
        check_messages("the prompt", prompt)


def check_count(name: str, value: Any, least: int, most: int) -> None:
    """A whole number in these limits."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"{name} is {reprlib.repr(value)}; give a whole number from {least} to {most}")


def check_ids(name: str, ids: Any, vocab_size: int) -> None:
    """Token ids of a model with so many."""
    check_kind(name, ids, (list, tuple), "a list of token ids")
    if {*map(type, ids)} <= {int} and (not ids or (min(ids) >= 0 and max(ids) < vocab_size)):
        return
    bad = next(t for t in ids if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < vocab_size)
    raise InputError(f"{name} holds token {reprlib.repr(bad)}; the vocabulary has ids from 0 to {vocab_size - 1}")
