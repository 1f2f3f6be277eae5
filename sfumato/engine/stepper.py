"""One step of the rows that have a canvas, and the prompt chunks before it.

Rows that can share a pass step as a group. What a row committed waits (`Row.pending`) and is encoded in the same pass
as its next canvas's first step; so is the last chunk of a prompt. A step is replayed from a recording where there is
one. Where a grammar rules, the host has a part in the step: `look`, then a walk, which may take several turns, then
`conclude_`.

Nothing here waits for the device, except for rows in which the host has a part, and for drafts. How rows stand after a
step is a `PendingRead`, which `commits` waits for.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.engine.request import Row
from sfumato.engine.seats import SeatTable
from sfumato.engine.walks import ALONE, SLICE, EndedWalk, RowReadOut, SpanStep, Walks, projecting
from sfumato.errors import InputError
from sfumato.events import Draft
from sfumato.model.network import Model
from sfumato.model.passes import Pass
from sfumato.sampling.canvases import Canvases, HostCopy
from sfumato.sampling.noise import SeatNoise
from sfumato.sampling.recorded import Recorded
from sfumato.sampling.rules import accepts
from sfumato.sampling.step import PlacedSampler, Projection, StepInput, conclude_, look, rule_view, step_

HEAD = 5
"""Numbers of a row in a `PendingRead` before its tokens."""

NAT = 1 << 20
"""One nat, as entropies are read."""

PASSES_KEPT = 8
"""Masks and angles of so many groups of rows are kept from step to step."""


class PendingRead(NamedTuple):
    """How rows on canvases of one length stand after a step, on its way to the host."""

    length: int
    rows: dict[int, tuple[Row, int]]
    """Seat -> its row, and the draw of the canvas that the row was on."""
    copy: HostCopy
    """[X, HEAD + L]: whether a row is done, its steps, its settled positions, whether its numbers are finite, the mean
    entropy of its canvas (times NAT; where no row may begin again 0); then the argmax canvas, which is what it would
    commit."""


def is_recording(model: Model, record: bool | None) -> bool:
    """Whether an engine records its steps; `record` None: where it pays and can be.

    On devices without graphs a recorded step is an ordinary one with static buffers."""
    if model.device.type != "cuda":
        return bool(record)
    if record and not model.ops.is_recordable:
        raise InputError(
            f"record is true, but the {model.ops.name} operations wait for the host within a step, which no "
            "CUDA graph can hold; leave record out, or load the model with ops='triton'"
        )
    return model.ops.is_recordable if record is None else record


class Stepper:
    """Prepares and runs steps of the rows in a table of seats. `chunk` is the most tokens of a prompt in one pass."""

    def __init__(self, table: SeatTable, noise: SeatNoise, chunk: int, is_recording: bool) -> None:
        self.table, self.noise, self.chunk, self.is_recording = table, noise, chunk, is_recording
        self.model, self.config = table.model, table.config
        self.walks = Walks()
        self.walk_seconds = 0.0
        """Seconds of the last turn that went to grammars."""

    # ---- prompts ------------------------------------------------------------------------------------------------

    def encode_prompts(self, seats: list[int], limit: int | None) -> int:
        """Encode a chunk of each of these prompts, `limit` tokens in all (None: any number).

        A row whose last chunk remains begins its first canvas; that chunk goes along with the first step. Returns how
        many tokens there are of all chunks."""
        budget, tokens, encoding, beginning = limit, [], [], []
        for seat in seats:
            row = self.table.row(seat)
            size = self.chunk if budget is None else min(self.chunk, budget)
            if size <= 0:
                break
            here = len(row.prompt) - len(row.rest)
            size = min([size, *(mark - here for mark in row.request.marks if mark > here)])
            chunk, row.rest = row.rest[:size], row.rest[size:]
            budget = None if budget is None else budget - len(chunk)
            if row.request.is_written and not row.rest:
                row.pending = chunk
                beginning.append(seat)
            else:
                tokens.append(chunk)
                encoding.append(seat)
        if encoding:
            self._encode(tokens, encoding)
        self.begin(beginning, is_first=True)
        return sum(map(len, tokens)) + sum(len(self.table.row(seat).pending) for seat in beginning)

    def _encode(self, tokens: list[list[int]], seats: list[int]) -> None:
        """Encode chunks of prompts; of a row that wants its prompt's log-probabilities they are taken here."""
        before = {seat: self.table.last_XD[seat].clone() for seat in seats if self.table.row(seat).scores is not None}
        hidden_BTD = self.table.encode(tokens, seats)
        for n, seat in enumerate(seats):
            row = self.table.row(seat)
            if row.scores is None:
                continue
            end = len(row.prompt) - len(row.rest)
            hidden_TD = hidden_BTD[n, : len(tokens[n])]
            if not row.scores.add(self.model, end - len(tokens[n]), tokens[n], hidden_TD, before[seat]):
                self.table.fail_of_numbers(seat, "in the prompt")
            elif not row.rest:
                row.scores.end(self.model, hidden_TD[-1])

    # ---- canvases -----------------------------------------------------------------------------------------------

    def begin(self, seats: list[int], is_first: bool = False) -> None:
        """Give rows a fresh canvas of noise, pins in place. `is_first`: it is their first in this seat."""
        for length in sorted({self.table.row(seat).length for seat in seats}):
            group = [seat for seat in seats if self.table.row(seat).length == length]
            state, rows = self.table.canvases_of(length), [self.table.row(seat) for seat in group]
            seeds, draws = [row.seed for row in rows], [row.draw for row in rows]
            if is_first:
                state.seat_(group, [row.rules for row in rows], seeds, [row.options.early for row in rows])
            rooms = [min(length, length if row.room is None else row.room) for row in rows]
            fresh_BL = self.noise.canvas(length, group, seeds, draws, ahead=not self.is_recording)
            if (warm_BL := _tokens_here([row.request.warm for row in rows], rows)) is not None:
                fresh_BL = torch.where(warm_BL >= 0, warm_BL, fresh_BL.cpu())
            pin_BL = _tokens_here([row.request.pins for row in rows], rows)
            state.begin_(group, fresh_BL, pin_BL, draws, _banned_here(rows), rooms)

    def step(self, seats: list[int]) -> None:
        """One step of these canvases, group by group. Where the host has a part, its first half: `walk` ends it."""
        for group, bans in list(self._groups(seats)):
            if any(self.table.row(seat).is_hosted for seat in group):
                self._look(group, bans)
            else:
                self._step(group, bans)
                self._count(group)

    def _groups(self, seats: list[int]) -> Iterator[tuple[list[int], tuple[int, ...]]]:
        """Rows that can share a pass, with the tokens that their banned positions may not take.

        They are of one canvas length, all with something to encode or all without, all with a part of the host's or all
        without, all with options that move logits or all without. Rows without bans go along with any."""
        alike: dict[tuple[int, bool, bool, bool], list[int]] = {}
        for seat in seats:
            row = self.table.row(seat)
            alike.setdefault((row.length, not row.pending, row.is_hosted, row.moves_logits), []).append(seat)
        for _, similar in sorted(alike.items()):
            bans = {seat: self._bans(self.table.row(seat)) for seat in similar}
            kinds = sorted(set(bans.values()) - {()}) or [()]
            for n, kind in enumerate(kinds):
                if group := [seat for seat in similar if bans[seat] == kind or (n == 0 and not bans[seat])]:
                    yield group, kind

    def _bans(self, row: Row) -> tuple[int, ...]:
        return tuple(sorted({*self.config.eos_ids, *row.request.banned})) if row.lacking > 0 else ()

    def _step(self, seats: list[int], bans: tuple[int, ...]) -> None:
        """One step of rows of one length that either all have something to encode or all have nothing."""
        rows, table = [self.table.row(seat) for seat in seats], self.table
        tokens, length = [row.pending for row in rows], rows[0].length
        counts = table.make_room(tokens, seats)
        width, lengths, state = max(counts), [table.cache.lengths[seat] for seat in seats], table.canvases_of(length)
        encode = length if width else 0
        can_record = self.is_recording and width <= length and all(row.sampler is None for row in rows)
        recorded = self._recording(state, seats, encode, bans) if can_record else None
        if recorded is not None:
            tokens_BT = table.padded(tokens, encode) if encode else None
            encoded_BTD = recorded(seats, lengths, counts, tokens_BT, bans)
        else:
            encoded_BTD = step_(self.model, table.cache, state, self._inputs(seats, counts, bans))
        self._advance(seats, counts, encoded_BTD)

    def _recording(self, state: Canvases, seats: list[int], encode: int, bans: tuple[int, ...]) -> Recorded | None:
        """The recording for these rows.

        None after a capture has failed: from then on steps run unrecorded. The memory may not suffice, and what torch
        keeps of a failed capture may spoil the next; steps that run one by one give the same results."""
        recordings = self.table.recordings
        try:
            return recordings.of(self.model, self.table.cache, state, seats, encode, bans)
        except RuntimeError as error:
            if recordings.capture is None:
                raise
            self.is_recording = False
            recordings.clear()
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"a step could not be recorded, so steps run one by one from now on: {why}", stacklevel=2)
            return None

    def _inputs(self, seats: list[int], counts: list[int], bans: tuple[int, ...]) -> StepInput:
        """What a step of these rows that is not recorded takes."""
        rows = [self.table.row(seat) for seat in seats]
        width, length, lengths = max(counts), rows[0].length, [self.table.cache.lengths[seat] for seat in seats]
        places = [row.seed for row in rows], [row.draw for row in rows], [row.step for row in rows]
        noise = self.noise.step(length, seats, *places)
        tokens_BT = self.table.padded([row.pending for row in rows], width) if width else None
        at_B = torch.tensor(seats, device=self.model.device)
        bans_N = torch.tensor(bans, device=self.model.device) if bans else None
        run = self._pass_of(seats, counts, width, lengths, length)
        samplers = [
            PlacedSampler(n, row.sampler, row.before_canvas) for n, row in enumerate(rows) if row.sampler is not None
        ]
        return StepInput(at_B, run, tokens_BT, noise, all(row.step == 0 for row in rows), bans_N, samplers)

    def _pass_of(self, seats: list[int], counts: list[int], width: int, lengths: list[int], canvas: int) -> Pass:
        """What the layers share, made once for all the steps of a canvas."""
        lanes = tuple(self.table.cache.lanes[seat] for seat in seats)
        key, passes = (tuple(seats), tuple(counts), tuple(lengths), lanes, canvas), self.table.passes
        if key not in passes:
            while len(passes) >= PASSES_KEPT:
                passes.pop(next(iter(passes)))
            passes[key] = Pass(self.model, self.table.cache, seats, counts, width, canvas)
        return passes[key]

    def _advance(self, seats: list[int], counts: list[int], encoded_BTD: Tensor | None) -> None:
        """Note that what was pending is encoded."""
        if encoded_BTD is not None:
            self.table.cache.advance(seats, counts)
            self.table.keep_last(encoded_BTD, seats, counts)
            for seat in seats:
                self.table.row(seat).pending = []

    def _count(self, seats: list[int]) -> None:
        for row in map(self.table.row, seats):
            row.step, row.passes = row.step + 1, row.passes + 1

    # ---- grammars -----------------------------------------------------------------------------------------------

    def _look(self, seats: list[int], bans: tuple[int, ...]) -> None:
        """The first half of a step of rows in which the host has a part; `walk` ends it."""
        rows, table = [self.table.row(seat) for seat in seats], self.table
        counts, state = table.make_room([row.pending for row in rows], seats), table.canvases_of(rows[0].length)
        look_result = look(self.model, table.cache, state, self._inputs(seats, counts, bans))
        self._advance(seats, counts, look_result.encoded_BTD)
        read = look_result.read
        is_sure_BL = accepts(*rule_view(state, look_result.at_B, read.argmax_BL, read.entropy_BL))
        for n, (seat, is_finite) in enumerate(zip(seats, look_result.is_finite_B.tolist(), strict=True)):
            row = rows[n]
            spans: list[SpanStep] = []
            if is_finite:  # a row that is not fails after the step
                if row.inspect is not None:
                    with table.isolating(seat):
                        row.inspect(read.logits_BLV[n])
                is_last, bound = row.step + 1 >= row.rules.max_steps, row.rules.entropy_bound
                spans = [SpanStep(first, last, span, bound, is_last) for span, first, last in row.spans_here()]
            if not row.has_failed:
                read_out = RowReadOut(read.logits_BLV[n], read.argmax_BL[n], read.entropy_BL[n], is_sure_BL[n])
                self.walks.begin(seat, look_result, n, projecting(spans, self.config, read_out))

    def walk(self, seats: list[int], seconds: float) -> None:
        """Go on with the grammars of these rows; the steps of those whose walks have ended are concluded.

        Grammars get as long as the rest of this turn took (`seconds`, at least `SLICE`), or `ALONE` where no other row
        is under way."""
        began = time.perf_counter()
        is_alone = len(self.walks) == len(self.table.live)
        by_look: dict[int, list[EndedWalk]] = {}  # rows of one look share the products of its end
        for ended in self.walks.go_on(seats, ALONE if is_alone else max(SLICE, seconds)):
            if isinstance(ended.outcome, Exception):
                self.table.fail(ended.seat, ended.outcome)
            elif not self.table.row(ended.seat).is_over:
                by_look.setdefault(id(ended.look), []).append(ended)
        self.walk_seconds = time.perf_counter() - began
        for walks in by_look.values():
            walks.sort(key=lambda ended: ended.place)
            projection = Projection.joined([one.outcome for one in walks if isinstance(one.outcome, Projection)])
            state = self.table.canvases_of(self.table.row(walks[0].seat).length)
            conclude_(self.model, state, walks[0].look.of([ended.place for ended in walks]), projection)
            self._count([ended.seat for ended in walks])

    # ---- what a step shows --------------------------------------------------------------------------------------

    def drafts(self, seats: list[int]) -> Iterator[Draft]:
        """The canvases of these rows after their step; waits for the device."""
        for length in sorted({self.table.row(seat).length for seat in seats}):
            group = [seat for seat in seats if self.table.row(seat).length == length]
            state = self.table.canvases[length]
            whole = state.is_finite_X, state.argmax_XL, state.entropy_XL, state.accepted_XL
            shown = zip(group, *(x[group].tolist() for x in whole), strict=True)
            for seat, is_finite, tokens, entropies, accepted in shown:
                row = self.table.row(seat)
                if is_finite:
                    yield Draft(seat, row.canvas, row.step, tokens, entropies, accepted, request=row.request.id)

    def read(self, seats: list[int]) -> list[PendingRead]:
        """Begin to read how these rows stand, for each length of canvases."""
        reads = []
        for length in sorted({self.table.row(seat).length for seat in seats}):
            state = self.table.canvases[length]
            rows = {seat: self.table.row(seat) for seat in seats}
            entropy_X = torch.zeros_like(state.step_X)
            if any(row.options.is_judged for row in rows.values()):
                entropy_X = (state.entropy_XL.mean(-1) * NAT).long()
            heads = [state.is_done_X.long(), state.step_X, state.settled_X, state.is_finite_X.long(), entropy_X]
            on_canvas = {seat: (row, row.draw) for seat, row in rows.items() if row.length == length}
            reads.append(
                PendingRead(length, on_canvas, HostCopy.of(torch.cat([torch.stack(heads, 1), state.argmax_XL], 1)))
            )
        return reads


def _tokens_here(places: Sequence[Mapping[int, int]], rows: list[Row]) -> Tensor | None:
    """The part of these positions and tokens, a record a row, that lies on the canvas the row is on.

    Tokens [B, L], -1 for none. None: no row has any."""
    if not any(places):
        return None
    length = rows[0].length
    tokens_BL = torch.full((len(rows), length), -1)
    for n, (row, own) in enumerate(zip(rows, places, strict=True)):
        if own:
            first = row.canvas * length
            tokens_BL[n] = torch.tensor([own.get(position, -1) for position in range(first, first + length)])
    return tokens_BL


def _banned_here(rows: list[Row]) -> Tensor | None:
    """Positions [B, L] that may not end the answer (None: no position of any).

    A grammar knows by itself where its text may end."""
    if all(row.lacking <= 0 for row in rows):
        return None
    banned_BL = torch.arange(rows[0].length) < torch.tensor([row.lacking for row in rows])[:, None]
    for n, row in enumerate(rows):
        for _, first, last in row.spans_here():
            banned_BL[n, first:last] = False
    return banned_BL
