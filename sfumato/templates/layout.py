"""Templates: text with fixed parts and free parts, laid out on canvases and read back.

A template is a list of pieces, each a text that stays as it is or a `Slot` to be written. `lay_out` gives every slot
its positions: fixed text becomes pins, an old text to start from becomes a warm canvas, what a slot must obey becomes a
span. Slots are filled jointly, seeing what stands before and behind them. Fixed text is never decoded: `Sheet.read`
joins the fixed pieces as they are with the slots' new text, so that outside the slots every byte is what went in.

A template longer than a canvas: text before the first slot is encoded with the prompt as far as it does not fit on the
canvas, text behind it is pinned as far as it fits, and `Sheet.beyond` is what no canvas of a slot can see.
It deliberately lacks the model: `plans.Planner` joins the two.
"""

from __future__ import annotations

import math
import random
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sfumato.constraints.grammar import Grammar
from sfumato.engine.request import SHORT, GrammarSpan
from sfumato.errors import CapacityError
from sfumato.model.config import ModelConfig
from sfumato.templates.slots import Slot
from sfumato.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class SlotPlace:
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
    places: list[SlotPlace]
    length: int
    """Positions that have to be denoised."""
    beyond: str
    """Text that no canvas with a slot has room for."""

    def texts(self, tokens: Sequence[int], tokenizer: Tokenizer, fillers: frozenset[int]) -> dict[str, str]:
        """Slot name -> its text, from the answer's tokens; padding and ends (`fillers`) disappear."""
        texts = {}
        for place in self.places:
            written = [token for token in tokens[place.start : place.start + place.width] if token not in fillers]
            texts[place.slot.name] = tokenizer.decode(written)
        return texts

    def lengths(self, tokens: Sequence[int], fillers: frozenset[int]) -> dict[str, int]:
        """Slot name -> the number of its tokens in the answer, padding and ends not counted."""
        return {
            place.slot.name: sum(t not in fillers for t in tokens[place.start : place.start + place.width])
            for place in self.places
        }

    def read(self, texts: Mapping[str, str]) -> str:
        """The whole text: fixed pieces as they are, slots with these texts."""
        return "".join(texts[piece.name] if isinstance(piece, Slot) else piece for piece in self.pieces)


@dataclass(frozen=True)
class EncodedTemplate:
    """A template with the tokens of each of its pieces: of a slot, those of the text that stands there now."""

    pieces: list[str | Slot]
    tokens: list[list[int]]
    tokenizer: Tokenizer

    @classmethod
    def of(cls, template: Sequence[str | Slot], tokenizer: Tokenizer) -> EncodedTemplate:
        """Encode a template, which `check_template` has checked."""
        pieces = list(template)
        texts = (piece.text or "" if isinstance(piece, Slot) else piece for piece in pieces)
        return cls(pieces, [tokenizer.encode(text) for text in texts], tokenizer)


def lay_out(
    template: EncodedTemplate,
    config: ModelConfig,
    widths: Mapping[str, int],
    seed: int = 0,
    is_open_ended: bool = False,
    is_short: bool = False,
) -> Sheet:
    """Lay out a template with these widths of slots that have none of their own.

    A template that ends on its last canvas is followed by ends, unless it `is_open_ended`: up to the end of that canvas
    or of a short one. The share of a warm text that starts as noise follows from `seed`. CapacityError where the slots
    do not fit the context, before anything of that size is allocated."""
    places = _places(template, config, widths)
    line = _line(template, places)
    length = config.canvas_length
    first, last = places[0].start, places[-1].start + places[-1].width
    # What stands before the first slot stays on the canvas where all fits; else it makes room for what stands behind.
    cut = min(first, max(0, len(line) - length))
    canvases = max(1, math.ceil((last - cut) / length))
    until = min(len(line), cut + canvases * length)
    pins = {position - cut: token for position, token in enumerate(line[cut:until], cut) if token is not None}
    if until == len(line) and not is_open_ended:
        end = min(canvases * length, -(-(until - cut + 1) // SHORT) * SHORT) if is_short else canvases * length
        pins |= dict.fromkeys(range(until - cut, end), config.eos_ids[0])
    return Sheet(
        pieces=template.pieces,
        lead=[token for token in line[:cut] if token is not None],
        pins=pins,
        warm={position - cut: token for position, token in _warm_tokens(template, places, seed).items()},
        places=[replace(place, start=place.start - cut) for place in places],
        length=until - cut,
        beyond=template.tokenizer.decode([token for token in line[until:] if token is not None]),
    )


def _places(template: EncodedTemplate, config: ModelConfig, widths: Mapping[str, int]) -> list[SlotPlace]:
    """Where each slot stands, counted from the first piece. CapacityError for one beyond the context."""
    places: list[SlotPlace] = []
    end = 0
    for piece, tokens in zip(template.pieces, template.tokens, strict=True):
        if isinstance(piece, str):
            end += len(tokens)
            continue
        width = piece.length or max(widths.get(piece.name, 0), len(tokens))
        places.append(SlotPlace(piece, end, width))
        end += width
        if end > config.max_position:
            raise CapacityError(
                f"the template takes {end} positions up to the end of slot {reprlib.repr(piece.name)} (of {width}), "
                f"beyond the context of {config.max_position}; shorten its slots or the text before them"
            )
    return places


def _line(template: EncodedTemplate, places: Sequence[SlotPlace]) -> list[int | None]:
    """The token at every position of the template; None where a slot stands."""
    line: list[int | None] = []
    following = iter(places)
    for piece, tokens in zip(template.pieces, template.tokens, strict=True):
        line += tokens if isinstance(piece, str) else [None] * next(following).width
    return line


def _warm_tokens(template: EncodedTemplate, places: Sequence[SlotPlace], seed: int) -> dict[int, int]:
    """Position -> the token that its slot starts from; the rest of a slot's text starts as noise."""
    warm: dict[int, int] = {}
    following = iter(places)
    for number, (piece, tokens) in enumerate(zip(template.pieces, template.tokens, strict=True)):
        if isinstance(piece, str):
            continue
        place, rng = next(following), random.Random(f"{seed} {number}")
        old = enumerate(tokens[: place.width], place.start)
        warm |= {position: token for position, token in old if rng.random() >= piece.strength}
    return warm


def spans_of(sheet: Sheet, grammars: Mapping[str, Grammar]) -> list[GrammarSpan]:
    """The constrained slots of a sheet."""
    return [
        GrammarSpan(place.start, place.width, grammars[place.slot.name])
        for place in sheet.places
        if place.slot.name in grammars
    ]
