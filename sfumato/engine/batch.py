"""Many requests on one engine: who waits, who goes first, what fits into memory, what is not encoded twice.

**Admission.** A request waits in a bounded queue until the cache has room for it: rows x tokens, beside what the rows'
read-outs take. The cache's shape follows what is asked for, within the memory that was set aside; what could never fit
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
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sfumato.engine.engine import PREFILL_CHUNK, Engine
from sfumato.engine.limits import BatchLimits
from sfumato.engine.request import Failure, Request, Row
from sfumato.engine.run import ROUND
from sfumato.errors import BusyError, CapacityError, NumericError
from sfumato.events import Done, Event
from sfumato.model.cache import KVCache
from sfumato.model.config import ModelConfig
from sfumato.model.network import Model
from sfumato.sampling.recorded import GRAPH_BYTES, MOST

CHEAP = 1.3
"""A pass with everyone in it may take so many times as long as one with the newcomers alone; above, they go first."""

OTHERS = 0.25
"""The share of the time that is left to the others then."""

LEAST_CHUNK = 16
"""Prompt tokens that are encoded in a turn however slow the machine is."""

KEPT_FROM = 32
"""Tokens from which on a beginning is worth keeping."""

KEPT_ROUND = 64
"""A kept beginning has room for a multiple of so many tokens."""

MOST_KEPT = 256
"""Beginnings that are kept at most, however short: each one is looked at that could be a prompt's."""

FORGET = 0.95
"""What earlier turns weigh, at each new one, in what a turn costs."""


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


@dataclass(eq=False)
class _Waiting:
    ticket: int
    request: Request
    since: float = field(default_factory=time.perf_counter)


class _Prefix(NamedTuple):
    tokens: np.ndarray
    cache: KVCache


class Batch:
    """Requests on one model: `submit` them, and take turns while there is work; not for several threads at once."""

    def __init__(self, model: Model, limits: BatchLimits = BatchLimits()) -> None:  # noqa: B008 - frozen
        self.model, self.config, self.limits = model, model.config, limits
        self.memory = limits.memory or free_memory(model.device) // 2
        self.prefixes = Prefixes(self.memory // 8 if limits.prefixes is None else limits.prefixes)
        self.context = min(limits.context or self.config.max_position, self.config.max_position)
        self.engine = Engine(model, 1, min(ROUND, self.config.max_position))
        self.cost = Cost()
        self._waiting: deque[_Waiting] = deque()
        self._tickets: dict[int, int] = {}  # seat -> ticket
        self._next, self._credit = 0, 0.0
        self._figures, self._recent = Figures(), (0, 0)
        self._bytes = functools.lru_cache(4096)(self._count_bytes)

    # ---- requests -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queue a request; events of `turn` bear the number that is returned as their `row`. BusyError where too many
        wait, CapacityError where it could never run."""
        request = self._bounded(request.checked(self.config))
        if len(self._waiting) >= self.limits.queue:
            raise BusyError(f"{len(self._waiting)} requests wait already, the most that may; try again in a moment")
        need = self._bytes(1, min(-(-request.capacity(self.config) // ROUND) * ROUND, self.config.max_position))
        if need > self.memory:
            raise CapacityError(
                f"{request.name} and its answer need {need / 1e9:.2f} GB of memory, {self.memory / 1e9:.2f} are set "
                "aside for requests; shorten the prompt, lower max_tokens or set more memory aside"
            )
        self._next += 1
        self._waiting.append(_Waiting(self._next, request))
        return self._next

    def cancel(self, ticket: int) -> None:
        """Forget a request, waiting or under way; its row is free for the next turn."""
        self._waiting = deque(one for one in self._waiting if one.ticket != ticket)
        for seat in [seat for seat, held in self._tickets.items() if held == ticket]:
            self._leave(seat)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._tickets

    def figures(self) -> Figures:
        passes, tokens = self._recent
        return replace(
            self._figures,
            queue=len(self._waiting),
            rows=len(self._tickets),
            rows_max=self.limits.rows,
            tokens_per_pass=tokens / passes if passes else 0.0,
            cache_bytes=self.engine.cache.bytes,
            prefix_bytes=self.prefixes.bytes,
        )

    def turn(self) -> list[Event | Failure]:
        """One step of the rows whose turn it is. Returns what came of it."""
        self._admit()
        if not self._tickets:
            return []
        seats, limit = self._choose()
        work = self._positions(seats, limit)
        began = time.perf_counter()
        events = self.engine.turn(seats, limit)
        if work:
            self.cost.learn(work, time.perf_counter() - began - self.engine.walked)
        for seat in seats:
            self._keep_marked(seat)
        return [self._told(event) for event in events]

    def _told(self, event: Event | Failure) -> Event | Failure:
        ticket = self._tickets[event.row]
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
            row, held = self._row(event.row), self.engine.cache.lengths[event.row]
            whole = [*row.prompt, *row.tokens]
            if held <= len(whole):
                self._keep(event.row, whole[:held])
            self._leave(event.row)
        return replace(event, row=ticket)

    def _bounded(self, request: Request) -> Request:
        """Within the context, whatever the answer's limit."""
        given, left = request.options.max_tokens, self.context - len(request.prompt)
        if left < 1 or (given or 0) > left:
            asked = f" and max_tokens {given}" if given else ""
            raise CapacityError(
                f"{request.name} of {len(request.prompt)} tokens{asked} exceed the context of {self.context}; "
                "shorten the prompt or lower max_tokens"
            )
        return request if given else replace(request, options=replace(request.options, max_tokens=left))

    # ---- admission ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while self._waiting and len(self._tickets) < self.limits.rows:
            first = self._waiting[0]
            if self._is_being_encoded(first.request) or not self._make_room(first.request):
                return
            self._waiting.popleft()
            held, count = self.prefixes.find(first.request.prompt)
            seat = self.engine.join(first.request, held, count)
            self._row(seat).began = first.since
            self._tickets[seat] = first.ticket
            if count:
                self._figures.prefix_hits += 1
                self._figures.prefix_tokens += count

    def _is_being_encoded(self, request: Request) -> bool:
        """Whether some row is encoding instructions that this request begins with."""
        for mark in request.marks:
            start = list(request.prompt[:mark])
            for seat in self._tickets:
                row, held = self._row(seat), self.engine.cache.lengths[seat]
                if mark in row.request.marks and held < mark and list(row.prompt[:mark]) == start:
                    return self.prefixes.find(request.prompt)[1] < mark
        return False

    def _make_room(self, request: Request) -> bool:
        """A free seat with enough room for this request, if the memory has it now."""
        engine, need = self.engine, request.capacity(self.config)
        highest = max(self._tickets, default=-1) + 1
        free = next((n for n in range(len(engine.rows)) if engine.rows[n] is None), len(engine.rows))
        seats = max(highest, free + 1)
        held = max([need, *(self._row(seat).request.capacity(self.config) for seat in self._tickets)])
        held = max([held, *(engine.cache.lengths[seat] for seat in self._tickets)])
        longest = min(-(-held // ROUND) * ROUND, self.config.max_position)
        generous = min(self.limits.rows, 1 << (seats - 1).bit_length())
        wider = max(generous, len(engine.rows)), max(longest, engine.cache.capacity)
        for shape in (wider, (generous, longest), (seats, longest)):
            if shape == (len(engine.rows), engine.cache.capacity):
                break
            kept = engine.cache.bytes if self._tickets else 0  # while it is copied both are there
            if self._bytes(*shape) + kept + self.prefixes.bytes <= self.memory:
                engine.resize(*shape)
                break
        else:
            if self.prefixes.bytes:
                self.prefixes.clear()
                return self._make_room(request)
            return False
        engine.most = self._most(len(engine.rows))
        return True

    def _count_bytes(self, rows: int, capacity: int) -> int:
        """Bytes of a cache of this shape and of what the read-outs of its rows take."""
        cache = KVCache.bytes_of(self.config, rows, capacity, self.model.dtype)
        recordings = MOST * GRAPH_BYTES if self.engine.record else 0  # what their steps need, they share
        return cache + rows * row_bytes(self.config, self.model.dtype) + recordings

    def _most(self, rows: int) -> int:
        """Tokens that each of so many rows could have room for, all of them growing, old and new cache together."""
        low, high = self.engine.cache.capacity, self.config.max_position
        held = self.engine.cache.bytes + self.prefixes.bytes
        if self._bytes(rows, high) + held <= self.memory:
            return high
        while low < high:
            middle = (low + high + 1) // 2
            if self._bytes(rows, middle) + held <= self.memory:
                low = middle
            else:
                high = middle - 1
        return low

    # ---- turns --------------------------------------------------------------------------------------------------

    def _choose(self) -> tuple[list[int], int | None]:
        """The seats of this turn, and the prompt tokens it may encode (None: any number, nobody waits)."""
        walking = [seat for seat in self._tickets if seat in self.engine.walks]  # they cost no pass, and take their own
        everyone = [seat for seat in self._tickets if seat not in self.engine.walks]
        limit = None if len(self._tickets) == 1 else max(LEAST_CHUNK, self.cost.within(self.limits.stall))
        fresh = [i for i in everyone if self._is_fresh(self._row(i), limit)]
        brief = [i for i in fresh if (self._row(i).room or self.context) <= self._row(i).length]
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
        """Whether it has committed nothing yet, and no long prompt is in its way."""
        return row.first_commit is None and (limit is None or len(row.rest) <= limit)

    def _positions(self, seats: Sequence[int], limit: int | None) -> int:
        """What a turn of these has to compute: canvas positions, and tokens to encode."""
        rows = [self._row(seat) for seat in seats]
        left = sum(len(row.rest) for row in rows)
        encoded = min(left, PREFILL_CHUNK * len(rows) if limit is None else limit)
        going = [self._row(seat) for seat in seats if seat not in self.engine.walks]
        stepping = (row for row in going if len(row.rest) <= (limit or PREFILL_CHUNK) and not row.is_at_cap)
        return encoded + sum((row.length if row.request.is_diffusion else 1) + len(row.pending) for row in stepping)

    # ---- prefixes -----------------------------------------------------------------------------------------------

    def _keep_marked(self, seat: int) -> None:
        row = self.engine.rows[seat]
        if row is not None and (count := self.engine.cache.lengths[seat]) in row.request.marks and row.rest:
            self._keep(seat, list(row.prompt[:count]))

    def _keep(self, seat: int, given: list[int]) -> None:
        tokens = np.asarray(given, dtype=np.int64)
        if len(tokens) >= KEPT_FROM and not self.prefixes.holds(tokens):
            # Of few sizes, so that what goes leaves room for what comes.
            capacity = min(-(-len(tokens) // KEPT_ROUND) * KEPT_ROUND, self.config.max_position)
            size = KVCache.bytes_of(self.config, 1, capacity, self.model.dtype)
            rows = len(self.engine.rows)
            taken = self._bytes(rows, self.engine.cache.capacity) + self.prefixes.bytes
            if size <= self.prefixes.room and taken + size <= self.memory:
                self.prefixes.add(tokens, self.engine.cache.fork([seat], capacity))
                self.engine.most = self._most(rows)

    def _leave(self, seat: int) -> None:
        self.engine.leave(seat)
        del self._tickets[seat]

    def _row(self, seat: int) -> Row:
        row = self.engine.rows[seat]
        assert row is not None, f"seat {seat} is free"
        return row


class Prefixes:
    """Encoded beginnings by their tokens, within so many bytes; those that were not used for longest go first."""

    def __init__(self, room: int) -> None:
        self.room, self.bytes = room, 0
        self._held: OrderedDict[bytes, _Prefix] = OrderedDict()
        self._alike: dict[bytes, list[bytes]] = {}  # the first tokens -> what begins with them

    def find(self, prompt: Sequence[int]) -> tuple[KVCache | None, int]:
        """A cache of one row and how many of its tokens the prompt begins with: at most all but the last, of which
        something must be computed."""
        return self._begins(np.asarray(prompt[:-1], dtype=np.int64))

    def _begins(self, asked: np.ndarray) -> tuple[KVCache | None, int]:
        best, most = None, 0
        for key in self._alike.get(asked[:KEPT_FROM].tobytes(), ()):
            tokens, cache = self._held[key]
            size = min(len(tokens), len(asked))
            differs = np.flatnonzero(tokens[:size] != asked[:size])
            count = int(differs[0]) if len(differs) else size
            if count > most and cache.can_truncate(0, count):
                best, most = key, count
        if best is None:
            return None, 0
        self._held.move_to_end(best)
        return self._held[best].cache, most

    def holds(self, tokens: Sequence[int] | np.ndarray) -> bool:
        """Whether all these can be had already."""
        return self._begins(np.asarray(tokens, dtype=np.int64))[1] == len(tokens)

    def add(self, tokens: Sequence[int] | np.ndarray, cache: KVCache) -> None:
        """Keep a cache of one row that holds these tokens, at least `KEPT_FROM`."""
        held = np.asarray(tokens, dtype=np.int64)
        for key in list(self._alike.get(held[:KEPT_FROM].tobytes(), ())):  # what the new one holds as well
            other = self._held[key].tokens
            if len(other) <= len(held) and (held[: len(other)] == other).all() and cache.can_truncate(0, len(other)):
                self._drop(key)
        self._held[held.tobytes()] = _Prefix(held, cache)
        self._alike.setdefault(held[:KEPT_FROM].tobytes(), []).append(held.tobytes())
        self.bytes += cache.bytes
        while self.bytes > self.room or len(self._held) > MOST_KEPT:
            self._drop(next(iter(self._held)))

    def _drop(self, key: bytes) -> None:
        tokens, cache = self._held.pop(key)
        self.bytes -= cache.bytes
        alike = tokens[:KEPT_FROM].tobytes()
        self._alike[alike].remove(key)
        if not self._alike[alike]:
            del self._alike[alike]

    def clear(self) -> None:
        self._held.clear()
        self._alike.clear()
        self.bytes = 0


class Cost:
    """Seconds of a turn as a line over the positions it computes, by least squares over the last turns."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)  # of 1, x, y, xx, xy

    def learn(self, positions: int, seconds: float) -> None:
        x, y = float(positions), seconds
        self._sums = FORGET * self._sums + np.array([1.0, x, y, x * x, x * y])

    def line(self) -> tuple[float, float]:
        """Seconds of a turn and of each position in it; neither below 0."""
        n, x, y, xx, xy = self._sums.tolist()
        if not n or not x:
            return 0.0, 0.0
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 1e-6 * n * xx else y / x
        slope = min(max(slope, 0.0), y / x)
        return (y - slope * x) / n, slope

    def of(self, positions: int) -> float:
        start, slope = self.line()
        return start + slope * positions

    def within(self, seconds: float) -> int:
        """Tokens that can be encoded in so many seconds."""
        _, slope = self.line()
        return PREFILL_CHUNK if slope * PREFILL_CHUNK <= seconds else int(seconds / slope)


def row_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes at most that a step takes for one row beside the cache: the logits in float32 and once more in the weights'
    dtype, with a quarter for what is made of them, and thirty hidden states of each position."""
    logits = config.canvas_length * config.vocab_size * (4 + dtype.itemsize) * 5 // 4
    return logits + 30 * config.canvas_length * config.hidden_size * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that a device has left: of the GPU, else of the machine or of what its container allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) << 10)
    most, used = ("".join(_lines(f"/sys/fs/cgroup/memory.{name}")).strip() for name in ("max", "current"))
    if most.isdigit() and used.isdigit():
        found.append(int(most) - int(used))
    return max(min(found, default=4 << 30), 64 << 20)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []
