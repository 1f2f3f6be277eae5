"""Ids in, events out: the two loops.

The outer loop grows the text canvas by canvas, the inner one denoises a canvas step by step (`step.step_`). A `turn`
takes every row one step further: prompts by a chunk, canvases by a step, autoregressive rows by a token. Rows join and
leave between turns, and every row is at its own length, canvas and step: one that stops commits and begins its next
canvas while its neighbours go on. What is committed waits, and is encoded in the same pass as the next canvas's first
step; so is the last chunk of a prompt. A row's text does not depend on its neighbours, and nor does its end: what fails
in a row's own part (its grammar, its numbers, its watch) is a `Failure` of that row among the events.

Nothing here knows text; what must look at text (stop strings) is asked through a request's `watch`. Who waits, who goes
first and what fits into memory is `batch`'s.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from sfumato.engine.guided import ALONE, SLICE, Turn, Walks, projecting
from sfumato.engine.request import Failure, Request, Row
from sfumato.errors import InputError, NumericError, contained
from sfumato.events import Commit, Done, Draft, Event, Usage
from sfumato.model.cache import KVCache
from sfumato.model.network import Model, Pass
from sfumato.model.offload import is_streamed
from sfumato.options import Options
from sfumato.sampling.canvases import Canvases, to_device
from sfumato.sampling.host_noise import HostNoise, first_uniform
from sfumato.sampling.noise import NoiseSource
from sfumato.sampling.recorded import Capture, CudaCapture, Recorded, Recordings, on
from sfumato.sampling.rules import Rules, accept, pick_token
from sfumato.sampling.step import Look, Projected, conclude_, look, step_

PREFILL_CHUNK = 2048
"""Prompt tokens per encode pass: bounds the memory of a long prompt; any value gives the same result."""

PASSES_KEPT = 8
"""Masks and angles of so many groups of rows are kept from step to step."""


Given = ParamSpec("Given")
Made = TypeVar("Made")


def _on_its_device(
    method: Callable[Concatenate[Engine, Given], Made],
) -> Callable[Concatenate[Engine, Given], Made]:
    """Without gradients, and with the model's device as the current one: kernels, streams and events are those of the
    current device, and a process may hold models on several."""

    @wraps(method)
    def run(self: Engine, *args: Given.args, **more: Given.kwargs) -> Made:
        with torch.inference_mode(), on(self.model.device):
            return method(self, *args, **more)

    return run


class Engine:
    """Rows under way on one model. `rows` holds them by seat; `cache` what is encoded of each, seat by seat.

    `capacity` is what the cache has room for at first, in tokens a row; it grows with the rows, up to `most`. `record`
    (default: on a CUDA device whose operations can be recorded) replays steps as CUDA graphs, which `capture` makes;
    `lag` (default: 1 on a CUDA device, else 0) is how many turns late the host asks which rows have stopped. None of
    them changes an answer; a late question costs a canvas that stops before its cap up to `lag` passes."""

    def __init__(
        self,
        model: Model,
        seats: int = 1,
        capacity: int = 1,
        *,
        cache: KVCache | None = None,
        dice: NoiseSource | None = None,
        chunk: int = PREFILL_CHUNK,
        record: bool | None = None,
        lag: int | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.model, self.config, self.chunk = model, model.config, chunk
        self.cache = cache or KVCache.allocate(model.config, seats, capacity, model.device, model.dtype)
        self.rows: list[Row | None] = [None] * self.cache.batch
        self.most = model.config.max_position
        self.seeds = [0] * self.cache.batch
        self.states: dict[int, Canvases] = {}
        self._given_dice = dice
        is_cuda = model.device.type == "cuda"
        self.record = self._records(record) and dice is None and not is_streamed(model)
        self.lag = 0 if is_streamed(model) else int(is_cuda) if lag is None else lag
        self.last_XD = torch.zeros(self.cache.batch, model.config.hidden_size, dtype=model.dtype, device=model.device)
        self._flights: deque[list[tuple[int, dict[int, tuple[Row, int]], tuple[Tensor, Any]]]] = deque()
        self.recordings = Recordings(capture or (CudaCapture(model.device) if is_cuda and self.record else None))
        self._dice: dict[int, HostNoise] = {}
        self._passes: dict[tuple[object, ...], Pass] = {}
        self.walks = Walks()
        self.walked = 0.0
        """Seconds of the last turn that went to grammars."""
        self._failures: list[Failure] = []

    def _records(self, wanted: bool | None) -> bool:
        """Whether steps are recorded. On other devices a recorded step is an ordinary one with static buffers."""
        if self.model.device.type != "cuda":
            return bool(wanted)
        if wanted and not self.model.ops.is_recordable:
            raise InputError(
                f"record is true, but the {self.model.ops.name} operations wait for the host within a step, which no "
                "CUDA graph can hold; leave record out, or load the model with ops='triton'"
            )
        return self.model.ops.is_recordable if wanted is None else wanted

    @property
    def live(self) -> list[int]:
        """Seats of the rows that are not done."""
        return [i for i, row in enumerate(self.rows) if row is not None and not row.is_over]

    @_on_its_device
    def join(self, request: Request, held: KVCache | None = None, count: int = 0) -> int:
        """Give a request a seat; it takes part from the next turn on. `held` is a cache of one row whose first `count`
        tokens are the prompt's; without one, what its seat holds is taken for its beginning. InputError before any
        work."""
        request = request.checked(self.config)
        self.recordings.check(self.model)
        seat = next((i for i, row in enumerate(self.rows) if row is None), len(self.rows))
        if held is None:
            count = self.cache.lengths[seat] if seat < len(self.rows) else 0
        if count >= len(request.prompt):
            raise InputError(
                f"the cache holds {count} tokens of a prompt of {len(request.prompt)}; truncate it to fewer first"
            )
        if seat == len(self.rows) or request.capacity(self.config) > self.cache.capacity:
            self.resize(max(seat + 1, len(self.rows)), max(request.capacity(self.config), self.cache.capacity))
        if held is not None:
            self.cache.take_(seat, held, count)
        self.rows[seat] = Row.of(request, self.config, count)
        self.seeds[seat] = request.options.seed or 0
        return seat

    def leave(self, seat: int, keep: int = 0) -> None:
        """Free a seat, between turns, whether its row is done or not. The first `keep` tokens that it has encoded stay,
        for a row that begins with them; ValueError where the cache cannot go back to them."""
        self.rows[seat] = None
        self.walks.drop(seat)
        if keep:
            self.cache.truncate_(seat, keep)
        else:
            self.cache.clear_(seat)

    @_on_its_device
    def resize(self, seats: int, capacity: int) -> None:
        """So many seats (no fewer than the last one taken needs) of so many tokens each. What seats hold stays."""
        lengths = self.cache.lengths
        kept = [i if row is not None or lengths[i] else None for i, row in enumerate(self.rows[:seats])]
        if all(seat is None for seat in kept):  # not both at once
            self.cache = KVCache.allocate(self.config, 0, 1, self.model.device, self.model.dtype)
        self.cache = self.cache.fork(kept + [None] * (seats - len(kept)), capacity)
        more = seats - len(self.rows)
        self.rows, self.seeds = (self.rows + [None] * more)[:seats], (self.seeds + [0] * more)[:seats]
        self.last_XD = torch.cat([self.last_XD, self.last_XD.new_zeros(max(0, more), self.last_XD.shape[1])])[:seats]
        self.states = {length: state.resized(seats) for length, state in self.states.items()}
        self.recordings.clear()
        self._passes.clear()

    @_on_its_device
    def turn(self, seats: Collection[int] | None = None, encode: int | None = None) -> list[Event | Failure]:
        """Take the rows in these seats (None: all) one step further; `encode` bounds the prompt tokens of the turn,
        beside those that go along with a first step. Returns what came of it; `row` of an event is a seat. A row that
        has failed is over, like one that is done."""
        began = time.perf_counter()
        rows = [i for i in self.live if seats is None or i in seats]
        # 1. A chunk of the prompts; a row whose last chunk is left begins its first canvas.
        self._encode_prompts([i for i in rows if self._row(i).rest], encode)
        rows = [i for i in rows if not self._row(i).rest]
        denoising = [i for i in rows if self._row(i).request.is_diffusion and not self._row(i).is_at_cap]
        # 2. One step of all canvases; what waits to be encoded goes along in the same pass. Where a grammar rules, the
        #    step ends when its walk does.
        for some, bans in list(self._groups([i for i in denoising if i not in self.walks])):
            if any(_is_hosted(self._row(i)) for i in some):
                self._look(some, bans)
            else:
                self._step(some, bans)
                self._count(some)
        self._walk([i for i in denoising if i in self.walks], time.perf_counter() - began)
        stepped = [i for i in denoising if i not in self.walks and not self._row(i).is_over]
        events: list[Event | Failure] = [*self._drafts([i for i in stepped if self._row(i).options.drafts])]
        # 3. Ask which have stopped, in this turn or in an earlier one while this one runs: they commit. A row at its
        #    cap has, and takes no further pass; where no other goes on meanwhile, the answer is waited for.
        if stepped:
            self._flights.append(self._ask(stepped))
        is_late = any(not self._row(i).is_at_cap for i in stepped)
        lag = self.lag if is_late and not any(row is not None and _needs_host(row) for row in self.rows) else 0
        while len(self._flights) > lag:
            events += self._collect(self._flights.popleft())
        # 4. One token of the rows that go without a canvas.
        if decoding := [i for i in rows if not self._row(i).request.is_diffusion]:
            events += self._decode(decoding)
        failures, self._failures = self._failures, []
        return events + failures

    # ---- what fails in one row --------------------------------------------------------------------------------------

    @contextmanager
    def _only(self, seat: int) -> Iterator[None]:
        """What fails within is the end of this row, not of the others."""
        try:
            yield
        except BaseException as error:
            self._fail(seat, contained(error))

    def _fail(self, seat: int, error: Exception) -> None:
        row = self._row(seat)
        if not row.has_failed:
            row.has_failed = True
            self.walks.drop(seat)
            self._failures.append(Failure(seat, error))

    def _fail_of_numbers(self, seat: int, where: str) -> None:
        """A row whose numbers are not finite. What comes to its seat must not read them, not even as keys that nobody
        sees: 0 times NaN is NaN."""
        message = (
            f"the model's numbers are not finite {where}: weights or activations are NaN or infinite; check the "
            "checkpoint, or load it with another dtype"
        )
        self._fail(seat, NumericError(message))
        for whole_XRGK in (*self.cache.k, *self.cache.v):
            whole_XRGK[seat] = 0

    # ---- prompts ------------------------------------------------------------------------------------------------

    def _encode_prompts(self, rows: list[int], limit: int | None) -> None:
        left, tokens, begins = limit, [], []
        encoding = []
        for i in rows:
            row = self._row(i)
            size = self.chunk if left is None else min(self.chunk, left)
            if size <= 0:
                break
            here = len(row.prompt) - len(row.rest)
            size = min([size, *(mark - here for mark in row.request.marks if mark > here)])
            chunk, row.rest = row.rest[:size], row.rest[size:]
            left = None if left is None else left - len(chunk)
            if row.request.is_diffusion and not row.rest:
                row.pending = chunk  # goes along with the first step
                begins.append(i)
            else:
                tokens.append(chunk)
                encoding.append(i)
        if encoding:
            self._encode(tokens, encoding)
        self._begin(begins, is_first=True)

    def _encode(self, tokens: list[list[int]], rows: list[int]) -> Tensor:
        """Encode ragged tokens; hidden states [B, T, D], and the last real one of a row that reads it into last_XD."""
        counts = self._make_room(tokens, rows)
        hidden_BTD = self.model.encode(self._padded(tokens, max(counts)), self.cache, rows, counts)
        self._keep_last(hidden_BTD, rows, counts)
        return hidden_BTD

    def _make_room(self, tokens: list[list[int]], rows: list[int]) -> list[int]:
        """The counts of these tokens; the cache has room for them: an answer without a limit makes it grow."""
        counts = [len(row) for row in tokens]
        need = max(self.cache.lengths[i] + count for i, count in zip(rows, counts, strict=True))
        if need > self.cache.capacity:
            self.resize(len(self.rows), max(need, min(2 * self.cache.capacity, self.most)))
        return counts

    def _padded(self, tokens: list[list[int]], width: int) -> Tensor:
        padded = [row + [self.config.pad_id] * (width - len(row)) for row in tokens]
        return to_device(torch.tensor(padded), self.model.device)

    def _keep_last(self, hidden_BTD: Tensor, rows: list[int], counts: list[int]) -> None:
        """The last real hidden state of each row, where the row will read it."""
        places = [n for n, i in enumerate(rows) if _reads_encoded(self._row(i))]
        if places:
            last = to_device(torch.tensor([places, [counts[n] - 1 for n in places]]), hidden_BTD.device)
            self.last_XD[[rows[n] for n in places]] = hidden_BTD[last[0], last[1]]

    # ---- canvases -----------------------------------------------------------------------------------------------

    def _groups(self, rows: list[int]) -> Iterator[tuple[list[int], tuple[int, ...]]]:
        """Rows that can share a pass, with the tokens that their banned positions may not take: of one canvas length,
        with something to encode or without, with a part of the host's or without. Rows without bans go along with
        any."""
        alike: dict[tuple[int, bool, bool], list[int]] = {}
        for i in rows:
            row = self._row(i)
            alike.setdefault((row.length, not row.pending, _is_hosted(row)), []).append(i)
        for _, some in sorted(alike.items()):
            bans = {i: self._bans(self._row(i)) for i in some}
            kinds = sorted(set(bans.values()) - {()}) or [()]
            for n, kind in enumerate(kinds):
                if group := [i for i in some if bans[i] == kind or (n == 0 and not bans[i])]:
                    yield group, kind

    def _bans(self, row: Row) -> tuple[int, ...]:
        return tuple(sorted({*self.config.eos_ids, *row.request.banned})) if row.lacking > 0 else ()

    def _state(self, length: int) -> Canvases:
        if length not in self.states:
            count = len(self.rows)
            rules = [Rules.of(Options())] * count
            self.states[length] = Canvases.allocate(self.model, rules, [0] * count, [0] * count, length)
        state = self.states[length]
        here = [row for row in self.rows if row is not None and row.length == length and row.request.is_diffusion]
        state.has_early = any(row.options.early for row in here)
        state.has_pins = state.has_early or any(row.request.pins for row in here)
        return state

    def _begin(self, rows: list[int], is_first: bool = False) -> None:
        """Give rows a fresh canvas of noise, pins in place."""
        for length in sorted({self._row(i).length for i in rows}):
            some = [i for i in rows if self._row(i).length == length]
            state, each = self._state(length), [self._row(i) for i in some]
            seeds, canvases = [self.seeds[i] for i in some], [row.canvas for row in each]
            if is_first:
                state.seat_(some, [row.rules for row in each], seeds, [row.options.early for row in each])
            rooms = [min(length, length if row.room is None else row.room) for row in each]
            if self._given_dice is not None:
                fresh_BL = self._given_dice.canvas(some, canvases)
            else:
                fresh_BL = self._dice_of(length).canvas(some, seeds, canvases, ahead=not self.record)
            if (warm_BL := self._here([row.request.warm for row in each], each)) is not None:
                fresh_BL = torch.where(warm_BL >= 0, warm_BL, fresh_BL.cpu())
            pin_BL = self._here([row.request.pins for row in each], each)
            state.begin_(some, fresh_BL, pin_BL, canvases, self._banned(each), rooms)

    def _dice_of(self, length: int) -> HostNoise:
        if length not in self._dice:
            self._dice[length] = HostNoise(length, self.config.vocab_size)
        return self._dice[length]

    def _here(self, places: Sequence[Mapping[int, int]], rows: list[Row]) -> Tensor | None:
        """What these say of the canvas each row is on: tokens [B, L], -1 for nothing. None: nothing of any."""
        if not any(places):
            return None
        length = rows[0].length
        table = torch.full((len(rows), length), -1)
        for n, (row, some) in enumerate(zip(rows, places, strict=True)):
            if some:
                first = row.canvas * length
                table[n] = torch.tensor([some.get(position, -1) for position in range(first, first + length)])
        return table

    def _banned(self, rows: list[Row]) -> Tensor | None:
        """Positions [B, L] that may not end the answer (None: no position of any); a grammar knows by itself where its
        text may end."""
        if all(row.lacking <= 0 for row in rows):
            return None
        banned_BL = torch.arange(rows[0].length) < torch.tensor([row.lacking for row in rows])[:, None]
        for n, row in enumerate(rows):
            for _, first, last in row.spans_here():
                banned_BL[n, first:last] = False
        return banned_BL

    def _step(self, rows: list[int], bans: tuple[int, ...]) -> None:
        """One step of rows of one length that either all have something to encode or all have nothing."""
        each = [self._row(i) for i in rows]
        tokens, length = [row.pending for row in each], each[0].length
        counts = self._make_room(tokens, rows)
        width, lengths, state = max(counts), [self.cache.lengths[i] for i in rows], self._state(length)
        encode = length if width else 0
        recorded = self._recording(state, len(rows), encode, bans) if self.record and width <= length else None
        if recorded is not None:
            tokens_BT = self._padded(tokens, encode) if encode else None
            encoded_BTD = recorded(rows, lengths, counts, tokens_BT, bans)
        else:
            encoded_BTD = step_(self.model, self.cache, state, *self._places(rows, counts, bans))
        self._advance(rows, counts, encoded_BTD)

    def _recording(self, state: Canvases, rows: int, encode: int, bans: tuple[int, ...]) -> Recorded | None:
        """None from the first one on that cannot be made, for want of memory perhaps: what torch keeps of a capture
        that failed may spoil the next, while steps run one by one give the same."""
        try:
            return self.recordings.of(self.model, self.cache, state, rows, encode, bans)
        except RuntimeError as error:
            if self.recordings.capture is None:
                raise
            self.record = False
            self.recordings.clear()
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"a step could not be recorded, so steps run one by one from now on: {why}", stacklevel=2)
            return None

    def _look(self, rows: list[int], bans: tuple[int, ...]) -> None:
        """The first half of a step of rows in which the host has a part; `_walk` ends it."""
        each = [self._row(i) for i in rows]
        counts, state = self._make_room([row.pending for row in each], rows), self._state(each[0].length)
        view = look(self.model, self.cache, state, *self._places(rows, counts, bans))
        self._advance(rows, counts, view.encoded_BTD)
        read = view.read
        is_sure_BL = accept(read.entropy_BL, state.entropy_bound_X[view.at_B])
        for n, (i, is_finite) in enumerate(zip(rows, view.is_finite_B.tolist(), strict=True)):
            row = each[n]
            turns: list[Turn] = []
            if is_finite:  # what is not fails after the step
                if row.request.inspect is not None:
                    with self._only(i):
                        row.request.inspect(read.logits_BLV[n])
                is_last, bound = row.step + 1 >= row.rules.max_steps, row.rules.entropy_bound
                turns = [Turn(first, last, span, bound, is_last) for span, first, last in row.spans_here()]
            shown = read.logits_BLV[n], read.argmax_BL[n], read.entropy_BL[n], is_sure_BL[n]
            self.walks.begin(i, view, n, projecting(turns, self.config, *shown))

    def _walk(self, seats: list[int], seconds: float) -> None:
        """Go on with the grammars of these seats; the steps of those that have ended are concluded. Others are held up
        for as long as their own part of this turn took, at most."""
        began = time.perf_counter()
        is_alone = len(self.walks) == len(self.live)
        ended: dict[int, tuple[Look, list[tuple[int, int, Projected]]]] = {}  # by look, so that they share its products
        for seat, view, place, outcome in self.walks.go_on(seats, ALONE if is_alone else max(SLICE, seconds)):
            if isinstance(outcome, Exception):
                self._fail(seat, outcome)
            elif not self._row(seat).is_over:
                ended.setdefault(id(view), (view, []))[1].append((seat, place, outcome))
        self.walked = time.perf_counter() - began
        for view, some in ended.values():
            some.sort(key=lambda one: one[1])
            said = Projected.joined([one for _, _, one in some])
            conclude_(self.model, self._state(self._row(some[0][0]).length), view.of([n for _, n, _ in some]), said)
            self._count([seat for seat, _, _ in some])

    def _places(self, rows: list[int], counts: list[int], bans: tuple[int, ...]) -> tuple[Any, ...]:
        """What a step that is not recorded takes behind model, cache and state."""
        each = [self._row(i) for i in rows]
        width, length, lengths = max(counts), each[0].length, [self.cache.lengths[i] for i in rows]
        place = [row.canvas for row in each], [row.step for row in each]
        if self._given_dice is not None:
            thrown, noise_BL = self._given_dice.sample(rows, *place), self._given_dice.renoise(rows, *place)
        else:
            pair = self._dice_of(length).step(rows, [self.seeds[i] for i in rows], *place)
            uniform_BL, noise_BL = (to_device(x, self.model.device) for x in pair)
            thrown = {"uniform_BL": uniform_BL}
        tokens_BT = self._padded([row.pending for row in each], width) if width else None
        at_B = torch.tensor(rows, device=self.model.device)
        run, is_first = self._pass_of(rows, counts, width, lengths, length), all(row.step == 0 for row in each)
        return at_B, run, tokens_BT, thrown, noise_BL, is_first, self._banned_tokens(bans)

    def _banned_tokens(self, bans: tuple[int, ...]) -> Tensor | None:
        return torch.tensor(bans, device=self.model.device) if bans else None

    def _advance(self, rows: list[int], counts: list[int], encoded_BTD: Tensor | None) -> None:
        """What was pending is encoded."""
        if encoded_BTD is not None:
            self.cache.advance(rows, counts)
            self._keep_last(encoded_BTD, rows, counts)
            for i in rows:
                self._row(i).pending = []

    def _count(self, rows: list[int]) -> None:
        for row in map(self._row, rows):
            row.step, row.passes = row.step + 1, row.passes + 1

    def _pass_of(self, rows: list[int], counts: list[int], width: int, lengths: list[int], canvas: int) -> Pass:
        """What the layers share, made once for all the steps of a canvas."""
        key = (tuple(rows), tuple(counts), tuple(lengths), canvas)
        if key not in self._passes:
            while len(self._passes) >= PASSES_KEPT:
                self._passes.pop(next(iter(self._passes)))
            self._passes[key] = Pass(self.model, self.cache, rows, counts, width, canvas)
        return self._passes[key]

    def _drafts(self, rows: list[int]) -> Iterator[Event]:
        for length in sorted({self._row(i).length for i in rows}):
            some, state = [i for i in rows if self._row(i).length == length], self.states[length]
            whole = state.is_finite_X, state.argmax_XL, state.entropy_XL, state.accepted_XL
            for i, is_finite, *shown in zip(some, *(x[some].tolist() for x in whole), strict=True):
                if is_finite:
                    yield Draft(i, self._row(i).canvas, self._row(i).step, *shown)

    # ---- commits ------------------------------------------------------------------------------------------------

    def _ask(self, rows: list[int]) -> list[tuple[int, dict[int, tuple[Row, int]], tuple[Tensor, Any]]]:
        """For each length of canvases: which rows were on which canvas, and, on its way, how each stands and what it
        would commit."""
        found = []
        for length in sorted({self._row(i).length for i in rows}):
            state = self.states[length]
            stands_X4 = torch.stack(
                [state.is_done_X.long(), state.step_X, state.settled_X, state.is_finite_X.long()], 1
            )
            asked_of = {i: (self._row(i), self._row(i).canvas) for i in rows if self._row(i).length == length}
            found.append((length, asked_of, _to_host(torch.cat([stands_X4, state.argmax_XL], 1))))
        return found

    def _collect(self, flight: list[tuple[int, dict[int, tuple[Row, int]], tuple[Tensor, Any]]]) -> Iterator[Event]:
        for _, asked_of, answer in flight:
            asked = _wait_for(answer)
            is_done, steps, settled, is_finite = asked[:, :4].T.tolist()
            # Whoever has left, or is on a later canvas by now, was answered before.
            current = [
                i
                for i, (row, canvas) in asked_of.items()
                if i < len(self.rows) and self.rows[i] is row and not row.is_over and row.canvas == canvas
            ]
            for i in (i for i in current if not is_finite[i]):
                self._fail_of_numbers(i, f"in step {steps[i]} of canvas {self._row(i).canvas + 1}")
            current = [i for i in current if is_finite[i]]
            stopped = [i for i in current if is_done[i]]
            # Commit the argmax canvas of those; who goes on begins the next canvas.
            if stopped:
                yield from self._commit_canvases(stopped, [steps[i] for i in stopped], asked[stopped, 4:].tolist())
                self._begin([i for i in stopped if not self._row(i).is_over])
            # Of the others, what has settled ahead of the rest.
            ahead = [i for i in current if not is_done[i] and settled[i] > self._row(i).given]
            if ahead := [i for i in ahead if not self._row(i).options.logprobs]:
                places = [settled[i] for i in ahead], [steps[i] for i in ahead]
                yield from self._commit_prefixes(ahead, *places, asked[ahead, 4:].tolist())

    def _commit_canvases(self, rows: list[int], steps: list[int], canvases: list[list[int]]) -> Iterator[Event]:
        """Cut each canvas at its end. Where the row goes on it waits to be encoded with the next canvas's first step;
        where its log-probabilities are wanted it is encoded now."""
        each = [self._row(i) for i in rows]
        kept: list[list[int]] = []
        for i, row, tokens in zip(rows, each, canvases, strict=True):
            kept.append([])
            with self._only(i):
                for span, _, _ in row.spans_here():
                    span.commit()
                kept[-1] = self._cut(row, tokens[row.given :])
        logprobs = self._logprobs([n for n, row in enumerate(each) if row.options.logprobs and kept[n]], rows, kept)
        for n, (i, row) in enumerate(zip(rows, each, strict=True)):
            if row.has_failed:
                continue
            row.steps += steps[n]
            row.pending = [] if n in logprobs else canvases[n][: row.given] + kept[n]
            yield from self._emit(i, kept[n], logprobs.get(n), steps[n])
            row.canvas, row.step, row.given = row.canvas + 1, 0, 0

    def _logprobs(self, encoding: list[int], rows: list[int], kept: list[list[int]]) -> dict[int, Tensor]:
        """Encode what these commit; the log-probabilities of all tokens in each place, [T, V]."""
        found: dict[int, Tensor] = {}
        if encoding:
            inside = [rows[n] for n in encoding]
            before_BD = self.last_XD[inside]
            hidden_BTD = self._encode([kept[n] for n in encoding], inside)
            for place, n in enumerate(encoding):
                self._row(rows[n]).passes += 1
                seen_TD = torch.cat([before_BD[place : place + 1], hidden_BTD[place, : len(kept[n]) - 1]])
                found[n] = torch.log_softmax(self.model.logits(seen_TD), -1)
                if not bool(torch.isfinite(seen_TD.sum() + found[n].sum())):
                    self._fail_of_numbers(rows[n], f"in the encoding of canvas {self._row(rows[n]).canvas + 1}")
        return found

    def _commit_prefixes(
        self, rows: list[int], settled: list[int], steps: list[int], canvases: list[list[int]]
    ) -> Iterator[Event]:
        """What is pinned by now is final, though its canvas goes on; it is encoded with the whole canvas."""
        for i, tokens, until, taken in zip(rows, canvases, settled, steps, strict=True):
            row = self._row(i)
            kept: list[int] = []
            with self._only(i):
                kept = self._cut(row, tokens[row.given : until], is_whole=False)
            if row.has_failed:
                continue
            row.given = until
            if row.finish_reason is not None:  # a stop string, an end or the limit: the rest does not matter
                row.steps += taken
            yield from self._emit(i, kept, None, taken)

    def _decode(self, rows: list[int]) -> Iterator[Event]:
        """The autoregressive baseline with the same weights: one token a pass, from encode's own logits."""
        logits_BV = self.model.logits(self.last_XD[rows])
        log_p_BV = torch.log_softmax(logits_BV, -1)
        is_finite = torch.isfinite(self.last_XD[rows].sum(-1) + log_p_BV.sum(-1)).tolist()
        uniform_B = self._uniform_of(rows)
        for n, i in enumerate(rows):
            row = self._row(i)
            if not is_finite[n]:
                self._fail_of_numbers(i, f"before token {len(row.tokens) + 1} of the answer")
                continue
            if row.lacking > 0:
                logits_BV[n, list(self.config.eos_ids)] = -torch.inf
            token = pick_token(logits_BV[n], row.options, uniform_B[n])
            row.steps, row.passes = row.steps + 1, row.passes + 1
            kept: list[int] = []
            with self._only(i):
                kept = self._cut(row, [token])
            if not row.has_failed:
                yield from self._emit(i, kept, log_p_BV[n : n + 1], 1)
        if rows := [i for i in rows if not self._row(i).is_over]:
            self._encode([[self._row(i).tokens[-1]] for i in rows], rows)

    def _uniform_of(self, rows: list[int]) -> Tensor:
        """What the next token of each of these is sampled with: in the dice, a canvas's first position."""
        canvases = [len(self._row(i).tokens) for i in rows]
        if self._given_dice is not None:
            return self._given_dice.sample(rows, canvases, [0] * len(rows))["uniform_BL"][:, 0]
        return to_device(first_uniform([self.seeds[i] for i in rows], canvases), self.model.device)

    def _cut(self, row: Row, tokens: list[int], is_whole: bool = True) -> list[int]:
        """The tokens that count: up to eos, a stop string, the token limit or the end of the context. `is_whole`: the
        canvas ends with them."""
        ends = [n for n, token in enumerate(tokens) if token in self.config.eos_ids and n >= row.lacking]
        if ends:
            tokens, row.finish_reason = tokens[: ends[0] + 1], "stop"
        if row.room is not None and len(tokens) >= row.room:
            if len(tokens) > row.room or row.finish_reason is None:
                row.finish_reason = "length"
            tokens = tokens[: row.room]
        if row.request.watch is not None and (keep := row.request.watch(tokens)) is not None:
            tokens, row.finish_reason = tokens[:keep], "stop"
        if any(span.width is None and span.guide.is_over for span in row.request.spans):
            row.finish_reason = "stop"  # complete, though there was no room for an end behind it
        need = row.length if row.request.is_diffusion else 1
        if (
            is_whole
            and row.finish_reason is None
            and len(row.prompt) + len(row.tokens) + len(tokens) + need > min(self.config.max_position, self.most)
        ):
            row.finish_reason = "length"
        return tokens

    def _emit(self, seat: int, tokens: list[int], log_p_TV: Tensor | None, steps: int) -> Iterator[Event]:
        row = self._row(seat)
        row.tokens += tokens
        row.first_commit = row.first_commit or time.perf_counter() - row.began
        commit = Commit(seat, row.canvas, steps, tokens, is_last=row.finish_reason is not None)
        if row.options.logprobs:
            commit = replace(commit, **_likelihoods(tokens, log_p_TV, row.options.top_logprobs))
            row.logprobs += commit.logprobs or []
        yield commit
        if row.finish_reason is not None:
            usage = Usage(
                prompt_tokens=len(row.prompt),
                tokens=len(row.tokens),
                canvases=row.canvas + 1 if row.request.is_diffusion else 0,
                steps=row.steps,
                passes=row.passes,
                seconds=time.perf_counter() - row.began,
                first_commit_seconds=row.first_commit,
                reused_tokens=row.reused,
            )
            yield Done(
                seat,
                row.finish_reason,  # type: ignore[arg-type]
                row.tokens,
                usage,
                row.options.seed or 0,
                logprobs=row.logprobs if row.options.logprobs else None,
            )

    def _row(self, seat: int) -> Row:
        row = self.rows[seat]
        assert row is not None, f"seat {seat} is free"
        return row


def _needs_host(row: Row) -> bool:
    """Whether the host has a part in every step of this row, so that it is asked at once."""
    request = row.request
    return bool(request.options.drafts or request.spans or request.inspect) and not row.is_over


def _is_hosted(row: Row) -> bool:
    """Whether the host has a part within each of its steps."""
    return bool(row.request.spans or row.request.inspect)


def _reads_encoded(row: Row) -> bool:
    """Whether it reads hidden states of what is encoded: the next token, or log-probabilities, follow from them."""
    return row.options.logprobs or not row.request.is_diffusion


def _likelihoods(tokens: list[int], log_p_TV: Tensor | None, top: int) -> dict[str, Any]:
    """What a commit says of its tokens' log-probabilities."""
    if log_p_TV is None:
        return {"logprobs": []}
    log_p_TV = log_p_TV[: len(tokens)]
    ids = torch.tensor(tokens, device=log_p_TV.device, dtype=torch.long)
    found: dict[str, Any] = {"logprobs": log_p_TV.gather(1, ids[:, None])[:, 0].tolist()}
    if top:
        values, words = (x.tolist() for x in log_p_TV.topk(min(top, log_p_TV.shape[1])))
        found["top_logprobs"] = [dict(zip(*pair, strict=True)) for pair in zip(words, values, strict=True)]
    return found


def _to_host(x: Tensor) -> tuple[Tensor, Any]:
    """Begin to copy; `_wait_for` ends it. On a CPU there is nothing to wait for."""
    if x.device.type == "cpu":
        return x, None
    target = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    target.copy_(x, non_blocking=True)
    event = torch.Event(x.device)
    event.record()
    return target, event


def _wait_for(copy: tuple[Tensor, Any]) -> np.ndarray:
    target, event = copy
    if event is not None:
        event.synchronize()
    return target.numpy()
