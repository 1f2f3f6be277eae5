"""Templates: text with fixed parts and free parts, laid out on canvases and read back.

A template is a list of pieces, each a text that stays as it is or a `Slot` to be written. `lay_out` gives every slot
its positions: fixed text becomes pins, an old text to start from becomes a warm canvas, what a slot must obey becomes a
span. Slots are filled jointly, seeing what stands before and behind them. Fixed text is never decoded: `Sheet.read`
joins the pieces as they were given with the slots' new text, so that outside the slots every byte is what went in.

A template longer than a canvas: text before the first slot is encoded with the prompt as far as it does not fit on the
canvas, text behind it is pinned as far as it fits, and `Sheet.beyond` is what no canvas of a slot can see.
It lacks on purpose: the model. `LLM.fill`, `infill`, `edit` and `decide` join the two.
"""

from __future__ import annotations

import math
import random
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfumato.constraints.constrain import Grammar
from sfumato.constraints.forms import MAX_CHOICES
from sfumato.engine.arguments import check_kind, check_text
from sfumato.engine.request import SHORT, Span
from sfumato.errors import CapacityError, InputError
from sfumato.model.config import ModelConfig
from sfumato.templates.slots import SLOTS, Slot, Template, check_template
from sfumato.text.tokenizer import Tokenizer

MOST = 64
"""Tokens that a slot of open length may take, where nothing is said."""

CANDIDATES = 12
"""Lengths that are tried for a slot of unknown length."""


@dataclass(frozen=True)
class Place:
    """A slot's positions in the answer."""

    slot: Slot
    start: int
    width: int


@dataclass(frozen=True)
class Sheet:
    """A template laid out. Positions count from the first of the answer's first canvas."""

    pieces: list[str | Slot]
    lead: list[int]
    """Tokens of the template that come with the prompt."""
    pins: dict[int, int]
    warm: dict[int, int]
    places: list[Place]
    length: int
    """Positions that have to be denoised."""
    beyond: str
    """Text that no canvas with a slot has room for."""

    def texts(self, tokens: Sequence[int], tokenizer: Tokenizer, fillers: frozenset[int]) -> dict[str, str]:
        """Slot name -> its text, from the answer's tokens; padding and ends (`fillers`) disappear."""
        found = {}
        for place in self.places:
            held = [token for token in tokens[place.start : place.start + place.width] if token not in fillers]
            found[place.slot.name] = tokenizer.decode(held)
        return found

    def read(self, texts: Mapping[str, str]) -> str:
        """The whole text: fixed pieces as they were given, slots with these texts."""
        return "".join(texts[piece.name] if isinstance(piece, Slot) else piece for piece in self.pieces)


def tokens_of(template: Template, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each piece: of a slot, those of the text that stands there now."""
    return [tokenizer.encode(piece.text or "" if isinstance(piece, Slot) else piece) for piece in template]


def lay_out(
    template: Template,
    tokenizer: Tokenizer,
    config: ModelConfig,
    widths: Mapping[str, int],
    seed: int = 0,
    is_open_ended: bool = False,
    is_short: bool = False,
    tokens: Sequence[list[int]] | None = None,
) -> Sheet:
    """Lay out a template (checked: see `check_template`) with these widths of slots that have none of their own.

    A template that ends on its last canvas is followed by ends, unless it `is_open_ended`: up to the end of that canvas
    or of a short one. The share of a warm text that starts as noise follows from `seed`. `tokens` are the pieces' own,
    where the caller has them. CapacityError where the slots do not fit the context, before anything of that size is
    made."""
    pieces, of_pieces = list(template), tokens_of(template, tokenizer) if tokens is None else tokens
    places = _places(pieces, of_pieces, config, widths)
    at_all: list[int | None] = []
    warm: dict[int, int] = {}
    following = iter(places)
    for number, (piece, own) in enumerate(zip(pieces, of_pieces, strict=True)):
        if isinstance(piece, str):
            at_all += own
            continue
        place = next(following)
        if own:
            dice = random.Random(f"{seed} {number}")
            kept = enumerate(own[: place.width], place.start)
            warm |= {at: token for at, token in kept if dice.random() >= piece.strength}
        at_all += [None] * place.width
    first, length = places[0].start, config.canvas_length
    last = places[-1].start + places[-1].width
    # What stands before the first slot stays on the canvas where all fits; else it makes room for what stands behind.
    cut = min(first, max(0, len(at_all) - length))
    lead = [token for token in at_all[:cut] if token is not None]
    canvases = max(1, math.ceil((last - cut) / length))
    until = min(len(at_all), cut + canvases * length)
    pins = {at - cut: token for at, token in enumerate(at_all[cut:until], cut) if token is not None}
    if until == len(at_all) and not is_open_ended:
        end = min(canvases * length, -(-(until - cut + 1) // SHORT) * SHORT) if is_short else canvases * length
        pins |= dict.fromkeys(range(until - cut, end), config.eos_ids[0])
    return Sheet(
        pieces=pieces,
        lead=lead,
        pins=pins,
        warm={at - cut: token for at, token in warm.items()},
        places=[replace(place, start=place.start - cut) for place in places],
        length=until - cut,
        beyond=tokenizer.decode([token for token in at_all[until:] if token is not None]),
    )


def _places(
    pieces: Sequence[str | Slot], tokens: Sequence[list[int]], config: ModelConfig, widths: Mapping[str, int]
) -> list[Place]:
    """Where each slot stands, counted from the first piece. CapacityError for one beyond the context."""
    places: list[Place] = []
    at = 0
    for piece, own in zip(pieces, tokens, strict=True):
        if isinstance(piece, str):
            at += len(own)
            continue
        width = piece.length or max(widths.get(piece.name, 0), len(own))
        places.append(Place(piece, at, width))
        at += width
        if at > config.max_position:
            raise CapacityError(
                f"the template takes {at} positions up to the end of slot {reprlib.repr(piece.name)} (of {width}), "
                f"beyond the context of {config.max_position}; shorten its slots or the text before them"
            )
    return places


def spans_of(sheet: Sheet, grammars: Mapping[str, Grammar]) -> list[Span]:
    """The constrained slots of a sheet."""
    return [
        Span(place.start, place.width, grammars[place.slot.name])
        for place in sheet.places
        if place.slot.name in grammars
    ]


def candidates(at_most: int) -> list[int]:
    """Lengths to try for a slot of up to `at_most` tokens: dense where short, then in even ratios."""
    if at_most <= CANDIDATES:
        return list(range(1, at_most + 1))
    ratio = at_most ** (1 / (CANDIDATES - 1))
    found = {max(1, min(at_most, round(ratio**n))) for n in range(CANDIDATES)}
    return sorted(found)


def span_template(text: str, spans: Sequence[tuple[int, int]], strength: float) -> list[str | Slot]:
    """A text with the spans (from character, to character) as warm slots. InputError where they do not fit."""
    _check_spans(spans)
    pieces: list[str | Slot] = []
    end = 0
    for number, (start, stop) in enumerate(sorted(spans), 1):
        if not 0 <= start < stop <= len(text):
            raise InputError(f"the span {start}–{stop} is not in the text of {len(text)} characters, or is empty")
        if start < end:
            raise InputError(f"the span {start}–{stop} overlaps the one before, which ends at {end}; join them")
        pieces += [text[end:start], Slot(str(number), text=text[start:stop], strength=strength)]
        end = stop
    return check_template([*pieces, text[end:]])


def _check_spans(spans: Any) -> None:
    if not isinstance(spans, (list, tuple)):
        raise InputError(f"the spans are of type {type(spans).__name__}; give a list of pairs of characters' numbers")
    if len(spans) > SLOTS:
        raise InputError(f"there are {len(spans)} spans, more than the {SLOTS} allowed; edit the text in parts")
    for span in spans:
        if not isinstance(span, (list, tuple)) or len(span) != 2 or {*map(type, span)} != {int}:
            raise InputError(f"the span {reprlib.repr(span)} is not two whole numbers, from character, to character")


# ---- decisions -------------------------------------------------------------------------------------------------------


def choices_of(fields: Mapping[str, Sequence[str]], tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """The tokens of each field's choices, as they stand in a sentence. InputError for fields that cannot be decided."""
    check_kind("fields", fields, Mapping, "a record of fields, each with a list of choices")
    if not fields:
        raise InputError("there are no fields to decide; give at least one with its choices")
    tokens: dict[str, list[list[int]]] = {}
    left = MAX_CHOICES
    for name, choices in fields.items():
        check_text("a field's name", name)
        if not name:
            raise InputError("a field has an empty name; say what it asks")
        label = reprlib.repr(name)
        is_list = isinstance(choices, (list, tuple)) and all(isinstance(choice, str) and choice for choice in choices)
        if not is_list or len(choices) < 2 or len(set(choices)) < len(choices):
            raise InputError(
                f"field {label} has the choices {reprlib.repr(choices)}; give a list of two or more different texts"
            )
        left -= len(choices)
        if left < 0:
            raise InputError(f"the fields have more than {MAX_CHOICES} choices together; ask fewer at a time")
        tokens[name] = [tokenizer.encode(f" {choice}") for choice in choices]
        if len({*map(tuple, tokens[name])}) < len(choices):
            raise InputError(f"field {label} has two choices that are the same tokens; reword one of them")
    return tokens


def share_out(choices: Sequence[Sequence[int]], log_p: Sequence[Mapping[int, float]], after: int) -> list[float]:
    """Probabilities of choices, each given as tokens, from the log-probabilities at the slot's positions.

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
        for token, some in branches.items():
            for n in some:
                probabilities[n] *= weights[token] / whole
            if len(some) > 1:
                groups.append((some, depth + 1))
    return probabilities
