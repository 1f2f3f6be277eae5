"""The passes of reads (`reads`): canvases behind a prompt that are looked at and not written.

All reads of a row stand behind one encoded prompt, none sees another, and nothing of them is kept. So a pass takes the
reads of many rows:

- A read with one canvas brings its own tokens along: they are encoded in the canvas's pass, and leave no trace.
- Of one with several canvases (forks of an answer, draws of noise) the tokens are encoded once, in a copy of the row's
  cache, and its canvases share them.

Only the words that are asked are unembedded, and a last step makes no soft embedding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.engine.reads import Glance, Read
from sfumato.engine.scores import SLICE
from sfumato.engine.seats import SeatTable
from sfumato.events import Done, Usage
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.sampling.noise import CountedNoise

POSITIONS = 4096
"""Positions that one pass of reads has at most, and a turn while others wait; a single read may have more."""

REPEATED = 256
"""Tokens that are rather encoded again, for each canvas, than once in a copy of the cache."""

CHUNK = 2048
"""Tokens of a read above which they are encoded in parts, in a copy of the cache."""

COPIES = 1 << 29
"""Bytes of copies of the cache at one time, unless a single one takes more."""


class ReadJob(NamedTuple):
    """A read of a row, by its number."""

    seat: int
    number: int
    read: Read


class _Line(NamedTuple):
    """A row of a pass: a glance, and the tokens that it brings along."""

    job: ReadJob
    place: int
    cache_row: int
    tokens: tuple[int, ...]

    @property
    def glance(self) -> Glance:
        return self.job.read.glances[self.place]


class ReadPasses:
    """Runs reads of the rows in a table of seats."""

    def __init__(self, table: SeatTable) -> None:
        self.table, self.model = table, table.model

    def run(self, seats: Sequence[int], limit: int | None) -> Iterator[Done]:
        """Go on with the reads of these rows, whose prompts are encoded; those that have ended are done.

        `limit` bounds the positions of a turn, roughly (None: as many as there are)."""
        jobs: list[ReadJob] = []
        room, begun = limit, dict.fromkeys(seats, 0)
        for seat in seats:
            row = self.table.row(seat)
            reads = row.request.reads
            assert reads is not None
            while (number := row.reads_done + begun[seat]) < len(reads.each) and (room is None or room > 0):
                jobs.append(ReadJob(seat, number, reads.each[number]))
                begun[seat] += 1
                room = None if room is None else room - _positions(jobs[-1].read, reads.length)
        for length, steps in sorted({self._shape(job) for job in jobs}):
            self._run([job for job in jobs if self._shape(job) == (length, steps)], length, steps)
        for seat in seats:
            row = self.table.row(seat)
            row.reads_done += begun[seat]
            if not row.has_failed and row.request.reads is not None and not row.reads_left:
                yield self._done(seat)

    def positions(self, seat: int) -> int:
        """Positions that are left to be read of a row."""
        row = self.table.row(seat)
        return sum(_positions(read, row.length) for read in row.reads_left)

    def _shape(self, job: ReadJob) -> tuple[int, int]:
        reads = self.table.row(job.seat).request.reads
        assert reads is not None
        return reads.length, reads.steps

    def _run(self, jobs: list[ReadJob], length: int, steps: int) -> None:
        shared = [job for job in jobs if _shares_tokens(job.read)]
        lines = [
            _Line(job, place, job.seat, job.read.tokens)
            for job in jobs
            if not _shares_tokens(job.read)
            for place in range(len(job.read.glances))
        ]
        for some in _passes(lines, length):
            self._glance(some, self.table.cache, length, steps)
        for some_jobs in self._by_copies(shared):
            tokens = [list(job.read.tokens) for job in some_jobs]
            held = [self.table.cache.lengths[job.seat] for job in some_jobs]
            need = max(before + len(own) for before, own in zip(held, tokens, strict=True))
            copy = self.table.cache.fork([job.seat for job in some_jobs], need)
            for first in range(0, max(map(len, tokens)), CHUNK):
                rows = [row for row, own in enumerate(tokens) if len(own) > first]
                parts = [tokens[row][first : first + CHUNK] for row in rows]
                self.model.encode(self.table.padded(parts, max(map(len, parts))), copy, rows, [*map(len, parts)])
            each = enumerate(some_jobs)
            lines = [_Line(job, place, row, ()) for row, job in each for place in range(len(job.read.glances))]
            for some in _passes(lines, length):
                self._glance(some, copy, length, steps)

    def _by_copies(self, jobs: list[ReadJob]) -> Iterator[list[ReadJob]]:
        """Reads whose copies of the cache are made together: few enough, and of like length."""
        config, dtype = self.model.config, self.model.dtype
        group: list[ReadJob] = []
        for job in sorted(jobs, key=lambda job: len(job.read.tokens)):
            longest = max(self.table.cache.lengths[one.seat] for one in [*group, job]) + len(job.read.tokens)
            too_many = KVCache.bytes_of(config, len(group) + 1, longest, dtype) > COPIES
            if group and (too_many or not _are_alike(len(group[0].read.tokens), len(job.read.tokens))):
                yield group
                group = []
            group.append(job)
        if group:
            yield group

    def _glance(self, lines: list[_Line], cache: KVCache, length: int, steps: int) -> None:
        """One pass for each step, over a canvas a line; keep the logits of the words that are asked for."""
        rows, device = [line.cache_row for line in lines], self.model.device
        tokens, places = [list(line.tokens) for line in lines], range(len(lines))
        width = max(map(len, tokens))
        tokens_BT = self.table.padded(tokens, width) if width else None
        seeds, draws = [self.table.row(line.job.seat).seed for line in lines], [line.glance.draw for line in lines]
        noise = CountedNoise(seeds, [0] * len(lines), length, self.model.config.vocab_size, device)
        pin_BL = torch.full((len(lines), length), -1)
        for n, line in enumerate(lines):
            pin_BL[n, : len(line.glance.pins)] = torch.tensor(line.glance.pins, dtype=torch.long)
        pin_BL, soft_BLD = pin_BL.to(device), None
        for step in range(steps):
            noise_BL = noise.renoise(places, draws, [step] * len(lines)) if step else noise.canvas(places, draws)
            canvas_BL = torch.where(pin_BL >= 0, pin_BL, noise_BL)
            hidden_BLD = self.model.read(tokens_BT, [*map(len, tokens)], canvas_BL, cache, rows, soft_BLD)
            if step + 1 < steps:
                soft_BLD = soft_embedding(self.model, hidden_BLD, pin_BL)
        at_B = torch.tensor([len(line.glance.pins) for line in lines], device=device)
        hidden_BD = hidden_BLD[torch.arange(len(lines), device=device), at_B]
        words = sorted({word for line in lines for word in line.glance.words})
        logits_BW = self.model.logits_of(hidden_BD, torch.tensor(words, device=device))
        is_finite = torch.isfinite(logits_BW.sum(-1) + hidden_BD.float().sum(-1)).tolist()
        for seat in {line.job.seat for line in lines}:
            self.table.row(seat).passes += steps
        values, at = logits_BW.tolist(), {word: n for n, word in enumerate(words)}
        for n, line in enumerate(lines):
            row = self.table.row(line.job.seat)
            if not is_finite[n]:
                self.table.fail_of_numbers(line.job.seat, "in a read")
            elif row.readings is not None:
                own = row.readings.values[line.job.number]
                own[line.place] = [values[n][at[word]] for word in line.glance.words]

    def _done(self, seat: int) -> Done:
        row = self.table.row(seat)
        reads = row.request.reads
        assert reads is not None
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


def _shares_tokens(read: Read) -> bool:
    """Whether its tokens are encoded once for all its canvases, in a copy of the cache."""
    return (len(read.glances) - 1) * len(read.tokens) > REPEATED or len(read.tokens) > CHUNK


def _positions(read: Read, length: int) -> int:
    """Positions that a read has to compute."""
    repeats = 1 if _shares_tokens(read) else len(read.glances)
    return repeats * len(read.tokens) + len(read.glances) * length


def _are_alike(least: int, most: int) -> bool:
    """Whether so many tokens may be padded to so many more."""
    return most <= least + max(16, least // 4)


def _passes(lines: list[_Line], length: int) -> Iterator[list[_Line]]:
    """Lines that share a pass: few enough, and of like length."""
    group: list[_Line] = []
    for line in sorted(lines, key=lambda line: len(line.tokens)):
        is_full = (len(group) + 1) * (len(line.tokens) + length) > POSITIONS
        if group and (is_full or not _are_alike(len(group[0].tokens), len(line.tokens))):
            yield group
            group = []
        group.append(line)
    if group:
        yield group
