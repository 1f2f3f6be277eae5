"""The passes of reads (`reads`): canvases behind a prompt that are looked at and not written.

All reads of a row stand behind one encoded prompt, none sees another, and nothing of them is kept. So a pass takes the
reads of many rows:

- A canvas brings the tokens of its read along: they are encoded in the same pass, and leave no trace.
- Where many canvases share many tokens (forks of an answer, draws of noise) these are encoded once, in a copy of the
  row's cache.

A turn takes as many positions as it is allowed, in rounds: one read of each row, then the next. What does not fit goes
on in the next turn, in the middle of a read too. Only the words that are asked are unembedded, and a last step makes no
soft embedding. A model that leaves out what a position's own token says (`sampling.step.observed_by`) is read as it is:
that token is known to be noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.engine.reads import CHUNK, Glance, Read, Reads
from sfumato.engine.request import Row
from sfumato.engine.scores import SLICE
from sfumato.engine.seats import SeatTable
from sfumato.events import Done, Usage
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.sampling.canvases import to_device
from sfumato.sampling.noise import SeatNoise

POSITIONS = 4096
"""Positions that one pass of reads has at most, and a turn; a single canvas may have more."""

KEYS = 1 << 18
"""Cached tokens that the rows of a pass see together, unless a single one sees more: some operations copy them."""

PADDING = 96
"""Positions of padding in a pass, below which it takes less time than another pass."""

COPIES = 1 << 29
"""Bytes of copies of the cache at one time, unless a single one takes more."""


class _ReadPart(NamedTuple):
    """What a turn does of a read."""

    seat: int
    number: int
    """Of the read, in its row."""
    read: Read
    steps: int
    encode: int
    """Tokens that are encoded in a copy of the cache."""
    first: int
    last: int
    """Canvases that are looked at."""

    @property
    def is_whole(self) -> bool:
        """Whether it is a whole read."""
        is_encoded = not self.read.is_copied or self.encode == len(self.read.tokens)
        return is_encoded and (self.first, self.last) == (0, len(self.read.glances))

    @property
    def positions(self) -> int:
        return self.encode + self.steps * (self.last - self.first) * self.read.width

    @property
    def shape(self) -> tuple[int, int]:
        """What the canvases of a pass have in common."""
        return self.read.length, self.steps


class _Line(NamedTuple):
    """A row of a pass: a glance, and the tokens that it brings along."""

    part: _ReadPart
    place: int
    cache_row: int
    tokens: tuple[int, ...]

    @property
    def glance(self) -> Glance:
        return self.part.read.glances[self.place]


@dataclass(eq=False)
class _Copy:
    """The cache of a row with tokens of a read behind it, which goes on in the next turn."""

    number: int
    cache: KVCache
    encoded: int
    """Of the read's tokens."""


class ReadPasses:
    """Runs reads of the rows in a table of seats. `room` are the bytes of copies of the cache at one time."""

    def __init__(self, table: SeatTable, noise: SeatNoise) -> None:
        self.table, self.noise, self.model = table, noise, table.model
        self.room = COPIES
        self._copies: dict[int, _Copy] = {}
        """By seat, the copies for reads that go on."""
        self._next = 0
        """The seat that comes first in the next turn."""

    def run(self, seats: Sequence[int], limit: int | None) -> Iterator[Done]:
        """Go on with the reads of these rows, whose prompts are encoded; those that have ended are done.

        `limit` bounds the positions of the turn, roughly (None: `POSITIONS`)."""
        parts = self._choose(seats, min(limit or POSITIONS, POSITIONS))
        for length, steps in sorted({part.shape for part in parts}):
            self._run([part for part in parts if part.shape == (length, steps)])
        for part in parts:
            row = self.table.row(part.seat)
            row.positions_read += part.positions
            row.glances_done = part.last
            if part.last == len(part.read.glances):
                row.reads_done, row.glances_done = part.number + 1, 0
        for seat in seats:
            row = self.table.row(seat)
            if not row.has_failed and not row.is_read:
                yield self._done(seat)

    def drop(self, seat: int) -> None:
        """Forget what is copied for a row that leaves."""
        self._copies.pop(seat, None)

    # ---- what a turn does -------------------------------------------------------------------------------------------

    def _choose(self, seats: Sequence[int], limit: int) -> list[_ReadPart]:
        """One read of each row, then the next of each, within so many positions."""
        after = [seat for seat in seats if seat >= self._next]
        order = [*after, *(seat for seat in seats if seat < self._next)]
        at = {seat: (self.table.row(seat).reads_done, self.table.row(seat).glances_done) for seat in order}
        parts: list[_ReadPart] = []
        room = limit
        while order:
            for seat in list(order):
                reads, (number, first) = _reads_of(self.table.row(seat)), at[seat]
                if number == len(reads.each):
                    order.remove(seat)
                    continue
                part = self._next_part(seat, number, first, reads, room)
                keeps = part.read.is_copied and not part.is_whole
                if room <= 0 or (keeps and parts):
                    self._next = seat
                    return parts
                if keeps and not self._can_keep(part):
                    order.remove(seat)
                    continue
                parts.append(part)
                room -= part.positions
                is_ended = part.last == len(part.read.glances)
                at[seat] = (number + 1, 0) if is_ended else (number, part.last)
                if not is_ended:
                    order.remove(seat)
        return parts

    def _next_part(self, seat: int, number: int, first: int, reads: Reads, room: int) -> _ReadPart:
        """As much of a read as there is room for: some of its tokens, or one canvas, at the least."""
        read, encode = reads.each[number], 0
        if read.is_copied:
            copy = self._copies.get(seat)
            left = len(read.tokens) - (copy.encoded if copy is not None and copy.number == number else 0)
            encode = min(left, max(room, 1))
            if encode < left:
                return _ReadPart(seat, number, read, reads.steps, encode, first, first)
            room -= encode
        count = min(len(read.glances) - first, max(1, room // (read.width * reads.steps)))
        return _ReadPart(seat, number, read, reads.steps, encode, first, first + count)

    def _can_keep(self, part: _ReadPart) -> bool:
        """Whether its copy of the cache is there, or has room beside those of others, which go first."""
        if part.seat in self._copies or not self._copies:
            return True
        tokens = self.table.cache.lengths[part.seat] + len(part.read.tokens)
        size = KVCache.bytes_of(self.model.config, 1, tokens, self.model.dtype)
        return size + sum(copy.cache.bytes for copy in self._copies.values()) <= self.room

    def _run(self, parts: Sequence[_ReadPart]) -> None:
        """Parts whose canvases have one shape."""
        plain = [part for part in parts if not part.read.is_copied]
        lines = [
            _Line(part, place, part.seat, part.read.tokens) for part in plain for place in range(part.first, part.last)
        ]
        for some in _passes(lines, self.table.cache):
            self._pass(some, self.table.cache)
        for some_parts in self._by_copies([part for part in parts if part.read.is_copied and part.is_whole]):
            copy = self._copied(some_parts)
            self._encode(copy, [part.read.tokens for part in some_parts])
            self._look(some_parts, copy)
        for part in parts:
            if part.read.is_copied and not part.is_whole:
                self._go_on(part)

    def _go_on(self, part: _ReadPart) -> None:
        """A part of a read that has a copy of the cache of its own."""
        copy = self._copies.pop(part.seat, None)
        if copy is None or copy.number != part.number:
            copy = _Copy(part.number, self._copied([part]), 0)
        if part.encode:
            self._encode(copy.cache, [part.read.tokens[copy.encoded : copy.encoded + part.encode]])
            copy.encoded += part.encode
        if part.last > part.first:
            self._look([part], copy.cache)
        if part.last < len(part.read.glances):
            self._copies[part.seat] = copy

    # ---- copies of the cache ----------------------------------------------------------------------------------------

    def _by_copies(self, parts: Sequence[_ReadPart]) -> Iterator[list[_ReadPart]]:
        """Reads whose copies of the cache are made together: few enough, and of like length."""
        config, dtype = self.model.config, self.model.dtype
        group: list[_ReadPart] = []
        for part in sorted(parts, key=lambda part: len(part.read.tokens)):
            longest = max(self.table.cache.lengths[one.seat] for one in [*group, part]) + len(part.read.tokens)
            too_many = KVCache.bytes_of(config, len(group) + 1, longest, dtype) > self.room
            least = len(group[0].read.tokens) if group else 0
            if group and (too_many or len(group) * (len(part.read.tokens) - least) > PADDING):
                yield group
                group = []
            group.append(part)
        if group:
            yield group

    def _copied(self, parts: Sequence[_ReadPart]) -> KVCache:
        """Copies of these rows of the cache, with room for the tokens of their reads."""
        held = self.table.cache.lengths
        need = max(held[part.seat] + len(part.read.tokens) for part in parts)
        return self.table.cache.fork([part.seat for part in parts], need)

    def _encode(self, copy: KVCache, tokens: Sequence[Sequence[int]]) -> None:
        """Encode these tokens, of each row of a copy."""
        for first in range(0, max(map(len, tokens)), CHUNK):
            rows = [row for row, own in enumerate(tokens) if len(own) > first]
            parts = [list(tokens[row][first : first + CHUNK]) for row in rows]
            counts = [*map(len, parts)]
            self.model.encode(self.table.padded(parts, max(counts)), copy, rows, counts)

    def _look(self, parts: Sequence[_ReadPart], copy: KVCache) -> None:
        """The canvases of parts that have a row of a copy each."""
        each = enumerate(parts)
        lines = [_Line(part, place, row, ()) for row, part in each for place in range(part.first, part.last)]
        for some in _passes(lines, copy):
            self._pass(some, copy)

    # ---- passes -----------------------------------------------------------------------------------------------------

    def _pass(self, lines: Sequence[_Line], cache: KVCache) -> None:
        """One pass for each step, over a canvas a line; keep the logits of the words that are asked for."""
        (length, steps), device = lines[0].part.shape, self.model.device
        rows, tokens = [line.cache_row for line in lines], [list(line.tokens) for line in lines]
        width = max(map(len, tokens))
        tokens_BT = self.table.padded(tokens, width) if width else None
        pins = [line.glance.pins for line in lines]
        pin_BL = to_device(torch.tensor([[*own, *[-1] * (length - len(own))] for own in pins]), device)
        soft_BLD = None
        for step in range(steps):
            canvas_BL = torch.where(pin_BL >= 0, pin_BL, self._noise(lines, step, length))
            hidden_BLD = self.model.read(tokens_BT, [*map(len, tokens)], canvas_BL, cache, rows, soft_BLD)
            if step + 1 < steps:
                soft_BLD = soft_embedding(self.model, hidden_BLD, pin_BL)
        at = torch.tensor([range(len(lines)), [*map(len, pins)]])
        hidden_BD = hidden_BLD[tuple(to_device(at, device))]
        for seat in {line.part.seat for line in lines}:
            self.table.row(seat).passes += steps
        self._collect(lines, hidden_BD)

    def _noise(self, lines: Sequence[_Line], step: int, length: int) -> Tensor:
        """The noise of these canvases, [B, L]; that of one draw is the same everywhere in a row."""
        places = {(line.part.seat, line.glance.draw): n for n, line in reversed([*enumerate(lines)])}
        numbers = {place: n for n, place in enumerate(places)}
        seats, draws = [seat for seat, _ in places], [draw for _, draw in places]
        seeds = [self.table.row(seat).seed for seat in seats]
        noise_NL = to_device(self.noise.canvas_at(step, length, seats, seeds, draws), self.model.device)
        if len(numbers) == 1:
            return noise_NL.expand(len(lines), -1)
        at_B = torch.tensor([numbers[line.part.seat, line.glance.draw] for line in lines])
        return noise_NL[to_device(at_B, self.model.device)]

    def _collect(self, lines: Sequence[_Line], hidden_BD: Tensor) -> None:
        """Keep the logits of each line's words; a row whose numbers are not finite fails alone."""
        words = sorted({word for line in lines for word in line.glance.words})
        numbers = {word: n for n, word in enumerate(words)}
        logits_BW = self.model.logits_of(hidden_BD, to_device(torch.tensor(words), self.model.device))
        places = [(n, numbers[word]) for n, line in enumerate(lines) for word in line.glance.words]
        at = to_device(torch.tensor(places).T, self.model.device)
        is_finite, flat = hidden_BD.float().sum(-1).isfinite().tolist(), logits_BW[at[0], at[1]].tolist()
        first = 0
        for n, line in enumerate(lines):
            row, last = self.table.row(line.part.seat), first + len(line.glance.words)
            own, first = flat[first:last], last
            if not is_finite[n] or not all(map(math.isfinite, own)):
                self.table.fail_of_numbers(line.part.seat, "in a read")
            elif row.readings is not None:
                row.readings.values[line.part.number][line.place] = own

    def _done(self, seat: int) -> Done:
        row = self.table.row(seat)
        reads = _reads_of(row)
        row.finish_reason = "stop"
        usage = Usage(
            prompt_tokens=len(row.prompt) + sum(len(read.tokens) for read in reads.each),
            canvases=sum(len(read.glances) for read in reads.each),
            steps=reads.steps,
            passes=row.passes,
            seconds=time.perf_counter() - row.began,
            reused_tokens=row.reused,
        )
        return Done(seat, "stop", [], usage, row.seed, request=row.request.id)


def soft_embedding(model: Model, hidden_BLD: Tensor, pin_BL: Tensor) -> Tensor:
    """The soft embedding behind a step, at temperature 1; pinned positions are their own token's, [B, L, D]."""
    embed_VD, flat_ND = model.embed_tokens.weight, hidden_BLD.flatten(0, 1)
    size = max(1, SLICE // model.config.vocab_size)
    parts = [
        model.ops.soft_embedding(model.logits(part_ND)[None].to(model.dtype), embed_VD, model.embed_scale, None)[0]
        for part_ND in flat_ND.split(size)
    ]
    pinned_BLD = embed_VD[pin_BL.clamp_min(0)] * model.embed_scale
    return torch.where((pin_BL >= 0)[..., None], pinned_BLD, torch.cat(parts).view_as(hidden_BLD))


def _reads_of(row: Row) -> Reads:
    reads = row.request.reads
    assert reads is not None
    return reads


def _passes(lines: Sequence[_Line], cache: KVCache) -> Iterator[list[_Line]]:
    """Lines that share a pass: few enough, and of like length."""
    group: list[_Line] = []
    keys = padding = 0
    for line in sorted(lines, key=lambda line: len(line.tokens)):
        size = len(line.tokens)
        more = len(group) * (size - len(group[-1].tokens)) if group else 0
        keys = max(keys, cache.lengths[line.cache_row])
        positions = (len(group) + 1) * (size + line.part.read.length)
        is_full = positions > POSITIONS or (len(group) + 1) * keys > KEYS
        if group and (is_full or padding + more > max(PADDING, positions // 8)):
            yield group
            group, keys, more, padding = [], cache.lengths[line.cache_row], 0, 0
        group.append(line)
        padding += more
    if group:
        yield group
