"""Many requests on one engine: who waits, who goes first, what fits into memory, what is not encoded twice.

**Admission.** A request waits in a bounded queue until the cache has room for it: rows x tokens, beside what the rows'
read-outs take. The cache's shape follows the requests, within the memory that was set aside; what could never fit
is refused at once, and an answer without a limit ends where the memory does.

**Turns.** Between two steps of the rows under way a long prompt is encoded by as many tokens as take `stall` seconds.
Where one more row in a pass costs little (a GPU reads the same weights for it), all rows share every pass. Where rows
cost what they cost alone (a CPU), a row that has not committed anything yet goes first, and of several such rows those
whose whole answer is one canvas; the others keep a quarter of the time meanwhile. What a turn costs is learned from the
turns before.

**Prefixes.** What is encoded stays, by its content, as long as there is room: instructions that several conversations
begin with (a request's `marks`), and each conversation so far. A request whose instructions another one is encoding
waits for them.

It lacks paging on purpose: all rows of the cache have room for the same number of tokens.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sfumato.engine.cost import Cost
from sfumato.engine.engine import LEAST_READ, PREFILL_CHUNK, Engine
from sfumato.engine.limits import BatchLimits
from sfumato.engine.memory import free_memory, row_bytes
from sfumato.engine.prefixes import KEPT_FROM, Prefixes
from sfumato.engine.reading import COPIES, POSITIONS
from sfumato.engine.request import Failure, Request, Row
from sfumato.engine.run import ROUND
from sfumato.errors import BusyError, CapacityError, InputError, NumericError
from sfumato.events import Done, Event
from sfumato.model.adapters import Adapters
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.model.prompt import Prompt
from sfumato.sampling.recorded import GRAPH_BYTES, MOST

CHEAP = 1.3
"""A pass with everyone in it may take so many times as long as one with the newcomers alone; above, they go first."""

OTHERS = 0.25
"""The share of the time that is left to the others then."""

LEAST_CHUNK = 16
"""Prompt tokens that are encoded in a turn however slow the machine is."""

LEAST_MEMORY = 64 << 20
"""Bytes that are set aside for requests, however much adapters take."""

KEPT_ROUND = 64
"""A kept beginning has room for a multiple of so many tokens."""


@dataclass
class Figures:
    """What a batch did so far (those that count only grow) and holds now."""

    queue: int = 0
    rows: int = 0
    rows_max: int = 0
    steps: int = 0
    canvases: int = 0
    tokens: int = 0
    passes: int = 0
    tokens_per_pass: float = 0.0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    cache_bytes: int = 0
    prefix_bytes: int = 0
    adapters: int = 0
    adapter_bytes: int = 0


class Batch:
    """Requests on one model: `submit` them, and take turns while there is work; not for several threads at once."""

    def __init__(self, model: Model, limits: BatchLimits = BatchLimits()) -> None:  # noqa: B008 - frozen
        self.model, self.config, self.limits = model, model.config, limits
        self.memory = limits.memory or free_memory(model.device) // 2
        self.prefixes = Prefixes(self.memory // 8 if limits.prefixes is None else limits.prefixes)
        self.context = min(limits.context or self.config.max_position, self.config.max_position)
        self.engine = Engine(model, 1, min(ROUND, self.config.max_position))
        self.cost = Cost()
        self._waiting: deque[Row] = deque()
        self._ids: dict[int, str] = {}
        """The id of the request in each seat that is used."""
        self._credit = 0.0
        """Seconds that the others have saved up while newcomers went first."""
        self._figures, self._recent = Figures(), (0, 0)
        self._stacks: int | None = None
        """Bytes of adapters' factors that `memory` has been told of; None: of those that lay there before."""
        self._bytes = functools.lru_cache(4096)(self._count_bytes)

    # ---- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: Request | Row) -> str:
        """Queue a request, or the row made of one.

        Returns its id, which its events carry. InputError where a request with this id is under way, BusyError where
        too many wait, CapacityError where it could never run."""
        row = request if isinstance(request, Row) else Row.of(request, self.config)
        request = row.request = self._bounded(row.request)
        if request.id in self._ids.values() or any(other.request.id == request.id for other in self._waiting):
            raise InputError(f"a request with the id {request.id!r} is under way; give each one its own")
        if len(self._waiting) >= self.limits.queue:
            raise BusyError(f"{len(self._waiting)} requests wait already, the most that may; try again in a moment")
        need = self._bytes(1, min(-(-request.capacity(self.config) // ROUND) * ROUND, self.config.max_position))
        need += self._copy_bytes(request)
        if need > self.memory:
            raise CapacityError(
                f"{request.name} and its answer need {need / 1e9:.2f} GB of memory, {self.memory / 1e9:.2f} are set "
                "aside for requests; shorten the prompt, lower max_tokens or set more memory aside"
            )
        row.began = time.perf_counter()
        self._waiting.append(row)
        return request.id

    def cancel(self, id: str) -> None:
        """Forget a request, waiting or under way; its row is free for the next turn."""
        self._waiting = deque(row for row in self._waiting if row.request.id != id)
        for seat in [seat for seat, other in self._ids.items() if other == id]:
            self._leave(seat)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or is under way."""
        return not self._waiting and not self._ids

    def figures(self) -> Figures:
        """What the batch did so far and holds now."""
        passes, tokens = self._recent
        return replace(
            self._figures,
            queue=len(self._waiting),
            rows=len(self._ids),
            rows_max=self.limits.rows,
            tokens_per_pass=tokens / passes if passes else 0.0,
            cache_bytes=self.engine.cache.bytes,
            prefix_bytes=self.prefixes.bytes,
        )

    def count_adapters(self, adapters: Adapters) -> None:
        """Count the memory of adapters, at first and after some were loaded or unloaded."""
        now, before = adapters.bytes, self._stacks
        if self.limits.memory is None and before is not None:  # it is what was free then
            self.memory = max(LEAST_MEMORY, self.memory + before - now)
        self._stacks = now
        self._figures.adapters, self._figures.adapter_bytes = len(adapters.names), now

    def turn(self) -> list[Event | Failure]:
        """One step of the rows whose turn it is. Returns the events; `row` of an event is the seat of its request."""
        self._admit()
        if not self._ids:
            return []
        seats, limit = self._choose()
        work = self._positions(seats, limit)
        began = time.perf_counter()
        events = self.engine.turn(seats, limit)
        if work:
            self.cost.learn(work, time.perf_counter() - began - self.engine.stepper.walk_seconds)
        for seat in seats:
            self._keep_marked(seat)
        for event in events:
            self._note(event)
        return events

    def _note(self, event: Event | Failure) -> None:
        """Count what has ended, keep what it encoded, and free its seat."""
        if isinstance(event, Failure):
            if isinstance(event.error, NumericError):  # its keys may be part of what others begin with
                self.prefixes.clear()
            self._leave(event.row)
        if isinstance(event, Done):
            usage, figures = event.usage, self._figures
            figures.steps += usage.steps
            figures.canvases += usage.canvases
            figures.tokens += usage.tokens
            figures.passes += usage.passes
            passes, tokens = self._recent
            self._recent = (
                (passes + usage.passes, tokens + usage.tokens) if passes < 1000 else (passes // 2, tokens // 2)
            )
            row, encoded = self._row(event.row), self.engine.cache.lengths[event.row]
            if encoded <= len(row.prompt) + len(row.tokens):
                self._keep(event.row, row.prompt.extended(row.tokens).first(encoded))
            self._leave(event.row)

    def _bounded(self, request: Request) -> Request:
        """Within the context, whatever the answer's limit."""
        limit, room = request.options.max_tokens, self.context - len(request.prompt)
        if request.reads is not None:
            request.check_reads(self.context)
            return request
        if room < 1 or (limit or 0) > room:
            answer = f" and max_tokens {limit}" if limit else ""
            raise CapacityError(
                f"{request.name} of {len(request.prompt)} tokens{answer} exceed the context of {self.context}; "
                "shorten the prompt or lower max_tokens"
            )
        return request if limit else replace(request, options=replace(request.options, max_tokens=room))

    # ---- admission ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._ids) < self.limits.rows:
            first = self._waiting[0]
            if self._is_being_encoded(first) or not self._make_room(first.request):
                return
            self._waiting.popleft()
            prefix, count = self.prefixes.find(first.reusable)
            seat = self.engine.join(first, prefix, count)
            self._ids[seat] = first.request.id
            if count:
                self._figures.prefix_hits += 1
                self._figures.prefix_tokens += count

    def _is_being_encoded(self, waiting: Row) -> bool:
        """Whether some row is encoding instructions that this one begins with."""
        for mark in waiting.request.marks:
            start = waiting.prompt.first(mark)
            for seat in self._ids:
                row, encoded = self._row(seat), self.engine.cache.lengths[seat]
                if mark in row.request.marks and encoded < mark and row.prompt.first(mark) == start:
                    return self.prefixes.find(waiting.reusable)[1] < mark
        return False

    def _make_room(self, request: Request) -> bool:
        """A free seat with enough room for this request, if the memory has it now."""
        engine, need = self.engine, request.capacity(self.config)
        highest = max(self._ids, default=-1) + 1
        free = next((n for n in range(len(engine.rows)) if engine.rows[n] is None), len(engine.rows))
        seats = max(highest, free + 1)
        longest = max([need, *(self._row(seat).request.capacity(self.config) for seat in self._ids)])
        longest = max([longest, *(engine.cache.lengths[seat] for seat in self._ids)])
        longest = min(-(-longest // ROUND) * ROUND, self.config.max_position)
        generous = min(self.limits.rows, 1 << (seats - 1).bit_length())
        wider = max(generous, len(engine.rows)), max(longest, engine.cache.capacity)
        copies = max([self._copy_bytes(request), *(self._copy_bytes(self._row(seat).request) for seat in self._ids)])
        engine.read_passes.room = min(COPIES, copies)
        for shape in (wider, (generous, longest), (seats, longest)):
            is_new = shape != (len(engine.rows), engine.cache.capacity)
            if not is_new and not copies:
                break
            copied = engine.cache.bytes if self._ids and is_new else 0  # while it is copied both are there
            if self._bytes(*shape) + max(copied, copies) + self.prefixes.bytes <= self.memory:
                if is_new:
                    engine.resize(*shape)
                break
        else:
            if self.prefixes.bytes:
                self.prefixes.clear()
                return self._make_room(request)
            return False
        engine.table.max_capacity = self._max_capacity(len(engine.rows))
        return True

    def _count_bytes(self, rows: int, capacity: int) -> int:
        """Bytes of a cache of this shape and of what the read-outs of its rows take."""
        cache = KVCache.bytes_of(self.config, rows, capacity, self.model.dtype)
        recordings = MOST * GRAPH_BYTES if self.engine.stepper.is_recording else 0  # what their steps need, they share
        return cache + rows * row_bytes(self.config, self.model.dtype) + recordings

    def _copy_bytes(self, request: Request) -> int:
        """Bytes that its reads may take for copies of the cache: one has to fit."""
        if request.reads is None or not request.reads.copied:
            return 0
        tokens = len(request.prompt) + request.reads.copied
        one = KVCache.bytes_of(self.config, 1, min(tokens, self.config.max_position), self.model.dtype)
        return max(one, min(COPIES, self.memory // 16))

    def _max_capacity(self, rows: int) -> int:
        """Tokens that each of so many rows could have room for, all of them growing, old and new cache together."""
        low, high = self.engine.cache.capacity, self.config.max_position
        used = self.engine.cache.bytes + self.prefixes.bytes
        if self._bytes(rows, high) + used <= self.memory:
            return high
        while low < high:
            middle = (low + high + 1) // 2
            if self._bytes(rows, middle) + used <= self.memory:
                low = middle
            else:
                high = middle - 1
        return low

    # ---- turns --------------------------------------------------------------------------------------------------

    def _choose(self) -> tuple[list[int], int | None]:
        """The seats of this turn, and the prompt tokens it may encode (None: any number, nobody waits)."""
        walks = self.engine.stepper.walks
        walking = [seat for seat in self._ids if seat in walks]  # they cost no pass, and have a share of their own
        everyone = [seat for seat in self._ids if seat not in walks]
        limit = None if len(self._ids) == 1 else max(LEAST_CHUNK, self.cost.within(self.limits.stall))
        fresh = [seat for seat in everyone if self._is_fresh(self._row(seat), limit)]
        brief = [seat for seat in fresh if self._is_brief(self._row(seat))]
        first = brief or fresh
        if not first or len(first) == len(everyone):
            return everyone + walking, limit
        alone, together = (self.cost.of(self._positions(seats, limit)) for seats in (first, everyone))
        if together <= CHEAP * alone or self._credit >= together - alone:
            self._credit = max(0.0, self._credit - max(0.0, together - alone))
            return everyone + walking, limit
        self._credit += alone * OTHERS / (1 - OTHERS)
        return first + walking, limit

    @staticmethod
    def _is_fresh(row: Row, limit: int | None) -> bool:
        """Whether it has committed nothing yet, and no long prompt is in its way, nor much to be read."""
        return row.first_commit is None and (limit is None or max(len(row.rest), row.read_positions) <= limit)

    def _is_brief(self, row: Row) -> bool:
        """Whether its answer is one canvas, or what is read in a turn."""
        return row.request.reads is not None or (row.room or self.context) <= row.length

    def _positions(self, seats: Sequence[int], limit: int | None) -> int:
        """What a turn of these has to compute: canvas positions, and tokens to encode."""
        rows = [self._row(seat) for seat in seats]
        rest = sum(len(row.rest) for row in rows)
        encoded = min(rest, PREFILL_CHUNK * len(rows) if limit is None else limit)
        ready = [self._row(seat) for seat in seats if seat not in self.engine.stepper.walks]
        stepping = (row for row in ready if len(row.rest) <= (limit or PREFILL_CHUNK) and not row.is_at_cap)
        read = sum(row.read_positions for row in ready if len(row.rest) <= (limit or PREFILL_CHUNK))
        read = min(read, POSITIONS if limit is None else max(LEAST_READ, limit - encoded))
        return encoded + read + sum(_step_positions(row) for row in stepping)

    # ---- prefixes -----------------------------------------------------------------------------------------------

    def _keep_marked(self, seat: int) -> None:
        row = self.engine.rows[seat]
        if (
            row is not None
            and (count := self.engine.cache.lengths[seat]) in row.request.marks
            and (row.rest or row.is_read)
        ):
            self._keep(seat, row.prompt.first(count))

    def _keep(self, seat: int, prompt: Prompt) -> None:
        """Keep this prompt, which the seat holds, where there is room."""
        if len(prompt) >= KEPT_FROM and not self.prefixes.holds(prompt):
            # Of few sizes, so that what goes leaves room for what comes.
            capacity = min(-(-len(prompt) // KEPT_ROUND) * KEPT_ROUND, self.config.max_position)
            size = KVCache.bytes_of(self.config, 1, capacity, self.model.dtype)
            rows = len(self.engine.rows)
            used = self._bytes(rows, self.engine.cache.capacity) + self.prefixes.bytes
            if size <= self.prefixes.room and used + size <= self.memory:
                self.prefixes.add(prompt, self.engine.cache.fork([seat], capacity))
                self.engine.table.max_capacity = self._max_capacity(rows)

    def _leave(self, seat: int) -> None:
        self.engine.leave(seat)
        del self._ids[seat]

    def _row(self, seat: int) -> Row:
        return self.engine.table.row(seat)


def _step_positions(row: Row) -> int:
    """What a step of a row computes, beside reads."""
    if row.request.reads is not None:
        return 0
    return (row.length if row.is_on_canvas else 1) + len(row.pending)
