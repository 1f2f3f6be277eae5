"""Ids in, events out: the two loops.

The outer loop grows the text canvas by canvas, the inner one denoises a canvas step by step (`step.step_`). A `turn`
takes every row one step further: prompts by a chunk, canvases by a step, autoregressive rows by a token. Rows join and
leave between turns, and every row is at its own length, canvas and step: one that stops commits and begins its next
canvas while its neighbours go on. A row's text does not depend on its neighbours, and nor does its end: what fails in a
row's own part (its grammar, its numbers, its watch) is a `Failure` of that row among the events.

`table` holds the rows and their memory, `stepper` runs their steps, `commits` makes events of what has stopped. Nothing
here knows text; what must look at text (stop strings) is called through a row's `watch`. Who waits, who goes first and
what fits into memory is `batch`'s.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch

from sfumato.engine.commits import Commits
from sfumato.engine.reading import ReadPasses
from sfumato.engine.request import Failure, Request, Row
from sfumato.engine.seats import SeatTable
from sfumato.engine.stepper import PendingRead, Stepper, is_recording
from sfumato.errors import InputError
from sfumato.events import Event
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.model.offload import is_streamed
from sfumato.ops.lowrank import LanePair
from sfumato.sampling.noise import NoiseSource, SeatNoise
from sfumato.sampling.recorded import Capture, CudaCapture, Recordings, on

PREFILL_CHUNK = 2048
"""Prompt tokens per encode pass: bounds the memory of a long prompt; any value gives the same result."""

LEAST_READ = 256
"""Positions that are read in a turn, however little of it others leave."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _on_its_device(
    method: Callable[Concatenate[Engine, Arguments], Result],
) -> Callable[Concatenate[Engine, Arguments], Result]:
    """Run a method without gradients, and with the model's device as the current one.

    Kernels, streams and events are those of the current device, and a process may hold models on several."""

    @wraps(method)
    def run(self: Engine, /, *args: Arguments.args, **more: Arguments.kwargs) -> Result:
        with torch.inference_mode(), on(self.model.device):
            return method(self, *args, **more)

    return run


@dataclass(frozen=True)
class EngineSettings:
    """How an engine steps. Only `noise` changes an answer."""

    chunk: int = PREFILL_CHUNK
    """Prompt tokens per encode pass."""
    record: bool | None = None
    """Replay steps as CUDA graphs. None: on a CUDA device whose operations can be recorded."""
    lag: int | None = None
    """How many turns late the host reads which rows have stopped. A late read costs a canvas that stops before its cap
    up to so many passes. None: 1 on a CUDA device, else 0."""
    capture: Capture | None = None
    """What makes the graphs. None: CUDA's own, on a CUDA device."""
    noise: NoiseSource | None = None
    """Takes the place of the noise that is counted from the seeds; such steps are not recorded."""


class Engine:
    """Rows under way on one model. `rows` holds them by seat; `cache` what is encoded of each, seat by seat.

    `capacity` is the room of the cache at first, in tokens a row; it grows with the rows, up to `max_capacity`."""

    def __init__(
        self,
        model: Model,
        seats: int = 1,
        capacity: int = 1,
        *,
        cache: KVCache | None = None,
        settings: EngineSettings = EngineSettings(),
    ) -> None:
        self.model, self.config = model, model.config
        is_cuda, is_resident = model.device.type == "cuda", not is_streamed(model)
        records = is_recording(model, settings.record) and settings.noise is None and is_resident
        self.lag = (int(is_cuda) if settings.lag is None else settings.lag) if is_resident else 0
        capture = settings.capture or (CudaCapture(model.device) if is_cuda and records else None)
        cache = cache or KVCache.allocate(model.config, seats, capacity, model.device, model.dtype)
        self.table = SeatTable(model, cache, Recordings(capture))
        noise = SeatNoise(model.config.vocab_size, model.device, settings.noise)
        self.stepper = Stepper(self.table, noise, settings.chunk, records)
        self.commits = Commits(self.table, self.stepper)
        self.read_passes = ReadPasses(self.table, noise)
        self.pending_reads: deque[list[PendingRead]] = deque()
        """Of each turn whose canvases are not read yet."""

    @property
    def rows(self) -> list[Row | None]:
        """The row in each seat, None where it is free."""
        return self.table.rows

    @property
    def cache(self) -> KVCache:
        """What is encoded, seat by seat; a larger one takes its place when rows grow."""
        return self.table.cache

    @property
    def live(self) -> list[int]:
        """Seats of the rows that are not over."""
        return self.table.live

    @_on_its_device
    def join(self, request: Request | Row, prefix: KVCache | None = None, count: int = 0) -> int:
        """Give a request a seat; it takes part from the next turn on.

        `prefix` is a cache of one row whose first `count` tokens are the prompt's; without one, what its seat holds is
        taken for its beginning. InputError before any work."""
        row = request if isinstance(request, Row) else Row.of(request, self.config)
        self.table.recordings.check(self.model)
        seat = next((seat for seat, other in enumerate(self.rows) if other is None), len(self.rows))
        if prefix is None:
            count = self.cache.lengths[seat] if seat < len(self.rows) else 0
        if count >= len(row.prompt) and row.request.reads is None:
            raise InputError(
                f"the cache holds {count} tokens of a prompt of {len(row.prompt)}; truncate it to fewer first"
            )
        capacity = row.request.capacity(self.config)
        if seat == len(self.rows) or capacity > self.cache.capacity:
            self.table.resize(max(seat + 1, len(self.rows)), max(capacity, self.cache.capacity))
        if prefix is not None:
            self.cache.take_(seat, prefix, count)
        self.cache.lanes[seat] = LanePair() if row.prompt.adapter is None else row.prompt.adapter.lanes
        row.begin(count)
        self.rows[seat] = row
        return seat

    def leave(self, seat: int, keep: int = 0) -> None:
        """Free a seat, between turns, whether its row is over or not.

        The first `keep` tokens that it has encoded stay, for a row that begins with them; ValueError where the cache
        cannot go back to them."""
        self.rows[seat] = None
        self.stepper.walks.drop(seat)
        self.read_passes.drop(seat)
        if keep:
            self.cache.truncate_(seat, keep)
        else:
            self.cache.clear_(seat)

    @_on_its_device
    def resize(self, seats: int, capacity: int) -> None:
        """So many seats (no fewer than the last one taken needs) of so many tokens each. What seats hold stays."""
        self.table.resize(seats, capacity)

    @_on_its_device
    def turn(self, seats: Collection[int] | None = None, prefill_limit: int | None = None) -> list[Event | Failure]:
        """Take the rows in these seats (None: all) one step further.

        `prefill_limit` bounds the prompt tokens of the turn, beside those that go along with a first step. Returns the
        events; `row` of an event is a seat. A row that has failed is over, like one that is done."""
        began, stepper, row = time.perf_counter(), self.stepper, self.table.row
        seats = [seat for seat in self.live if seats is None or seat in seats]
        # 1. Encode a chunk of the prompts; a row whose last chunk remains begins its first canvas.
        encoded = stepper.encode_prompts([seat for seat in seats if row(seat).rest], prefill_limit)
        seats = [seat for seat in seats if not row(seat).rest]
        # 2. One step of all canvases; what waits to be encoded goes along in the same pass.
        canvases = [seat for seat in seats if row(seat).is_on_canvas and not row(seat).is_at_cap]
        stepper.step([seat for seat in canvases if seat not in stepper.walks])
        # 3. Where a grammar rules, the step ends when its walk does.
        stepper.walk([seat for seat in canvases if seat in stepper.walks], time.perf_counter() - began)
        stepped = [seat for seat in canvases if seat not in stepper.walks and not row(seat).is_over]
        # 4. Show the canvases of this step, where drafts are asked for.
        events: list[Event | Failure] = [*stepper.drafts([seat for seat in stepped if row(seat).options.drafts])]
        # 5. Read which rows have stopped, in this turn or in an earlier one while this one runs: they commit.
        if stepped:
            self.pending_reads.append(stepper.read(stepped))
        lag = self._lag(stepped)
        while len(self.pending_reads) > lag:
            events += self.commits.collect(self.pending_reads.popleft())
        # 6. One token of the rows that go without a canvas, or finish one so.
        decoding = [seat for seat in seats if row(seat).is_decoded and not row(seat).is_over]
        events += self.commits.decode(decoding)
        # 7. What is only read, behind prompts that are encoded.
        reading = [seat for seat in seats if row(seat).is_read and not row(seat).is_over]
        if reading:
            events += self.read_passes.run(reading, prefill_limit and max(prefill_limit - encoded, LEAST_READ))
        return events + self.table.pop_failures()

    def _lag(self, stepped: list[int]) -> int:
        """How many turns may be read later.

        A row at its cap takes no further pass: where no other goes on meanwhile, its read is waited for. So is every
        read while the host has a part in some row's steps."""
        goes_on = any(not self.table.row(seat).is_at_cap for seat in stepped)
        return self.lag if goes_on and not any(row is not None and _needs_host(row) for row in self.rows) else 0


def _needs_host(row: Row) -> bool:
    """Whether the host has a part in every step of this row."""
    return (row.options.drafts or row.is_hosted) and not row.is_over
