"""What the card of the loaded model refuses, whatever the dialect."""

from __future__ import annotations

from sfumato.errors import InputError
from sfumato.server.backend import ModelCard
from sfumato.server.http.errors import Refusal


def check_chat(card: ModelCard) -> None:
    """InputError where the model has no chat template."""
    if not card.has_chat:
        raise InputError(f"model {card.name!r} has no chat template; send a prompt to /v1/completions")


def check_length(name: str, tokens: int | None, card: ModelCard) -> None:
    """Refusal of more tokens than the model's context holds; None is no particular number."""
    if tokens is not None and tokens > card.max_position:
        message = f"{name} is {tokens}, more than the context of {card.max_position} tokens; lower it"
        raise Refusal(400, message, param=name, code="context_length_exceeded")
