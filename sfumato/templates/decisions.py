"""Decisions: fields with given choices, read from one canvas, and the probability of every choice.

All fields stand on the canvas as "field: choice" lines. A choice of several tokens is a path through a tree, so that
its probability does not depend on its length. It deliberately lacks the model: it is given logits.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sfumato.constraints.forms import MAX_CHOICES
from sfumato.engine.arguments import check_fields
from sfumato.errors import InputError
from sfumato.events import Decision
from sfumato.templates.layout import Sheet
from sfumato.templates.slots import Slot, check_template
from sfumato.text.tokenizer import Tokenizer

ChoiceTokens = Mapping[str, Sequence[Sequence[int]]]
"""Field -> the tokens of each of its choices."""


def choices_of(fields: Mapping[str, Sequence[str]], tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """The tokens of each field's choices, as they stand in a sentence. InputError for fields that cannot be decided."""
    check_fields(fields)
    tokens: dict[str, list[list[int]]] = {}
    room = MAX_CHOICES
    for name, choices in fields.items():
        label = reprlib.repr(name)
        room -= len(choices)
        if room < 0:
            raise InputError(f"the fields have more than {MAX_CHOICES} choices together; ask fewer at a time")
        tokens[name] = [tokenizer.encode(f" {choice}") for choice in choices]
        if len({*map(tuple, tokens[name])}) < len(choices):
            raise InputError(f"field {label} has two choices that are the same tokens; reword one of them")
    return tokens


def form_of(tokens: ChoiceTokens) -> list[str | Slot]:
    """The template with a line for each field, and a slot that its longest choice fits."""
    pieces: list[str | Slot] = []
    for name, choices in tokens.items():
        pieces += [f"{name}:", Slot(name, length=max(map(len, choices))), "\n"]
    return check_template(pieces)


def decisions_of(
    sheet: Sheet, fields: Mapping[str, Sequence[str]], tokens: ChoiceTokens, logits_LV: Tensor
) -> dict[str, Decision]:
    """What the logits of the canvas say about each field; `sheet` is the template of `form_of`, laid out."""
    decisions = {}
    for place in sheet.places:
        name, after = place.slot.name, sheet.pins[place.start + place.width]
        log_p_TV = torch.log_softmax(logits_LV[place.start : place.start + place.width].float(), -1)
        probabilities = share_out(tokens[name], _at_depths(tokens[name], log_p_TV, after), after)
        by_choice = dict(zip(fields[name], probabilities, strict=True))
        decisions[name] = Decision(max(by_choice, key=by_choice.__getitem__), by_choice)
    return decisions


def _at_depths(choices: Sequence[Sequence[int]], log_p_TV: Tensor, after: int) -> list[dict[int, float]]:
    """The log-probabilities at each position of the tokens that a choice has there, and of the one behind the slot."""
    by_depth = []
    for depth, log_p_V in enumerate(log_p_TV):
        tokens = sorted({choice[depth] for choice in choices if depth < len(choice)} | {after})
        by_depth.append(dict(zip(tokens, log_p_V[tokens].tolist(), strict=True)))
    return [*by_depth, {after: 0.0}]


def share_out(choices: Sequence[Sequence[int]], log_p: Sequence[Mapping[int, float]], after: int) -> list[float]:
    """Probabilities of choices, each a list of tokens, from the log-probabilities at the slot's positions.

    The choices are a tree of tokens; at every fork the branches share what the model gives to the forking tokens alone,
    so a choice gains or loses nothing by being long. `after` is the token behind the slot: a choice that is the
    beginning of another ends with it."""
    probabilities = [1.0] * len(choices)
    groups: list[tuple[list[int], int]] = [(list(range(len(choices))), 0)]
    while groups:
        group, depth = groups.pop()
        if len(group) == 1:
            continue
        branches: dict[int, list[int]] = {}
        for n in group:
            branches.setdefault(choices[n][depth] if depth < len(choices[n]) else after, []).append(n)
        top = max(log_p[depth][token] for token in branches)
        weights = {token: math.exp(log_p[depth][token] - top) for token in branches}
        whole = sum(weights.values())
        for token, members in branches.items():
            for n in members:
                probabilities[n] *= weights[token] / whole
            if len(members) > 1:
                groups.append((members, depth + 1))
    return probabilities
