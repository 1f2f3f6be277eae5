"""The table of seats: the row in each, and what the device holds of it (its cache row, canvas and last hidden state).

All of it has one shape, (seats, tokens a row), which `resize` changes. What was made for a shape (recordings, passes)
lies here too, so that it goes when the shape does. A row that fails ends alone: its error waits in `failures`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sfumato.engine.request import Failure, Row
from sfumato.errors import NumericError, contained
from sfumato.model.cache import KVCache
from sfumato.model.network import Model
from sfumato.model.passes import Pass
from sfumato.options import Options
from sfumato.sampling.canvases import Canvases, to_device
from sfumato.sampling.recorded import Recordings
from sfumato.sampling.rules import Rules


class SeatTable:
    """The seats of one engine, by number. `rows` has the row in each, None where it is free."""

    def __init__(self, model: Model, cache: KVCache, recordings: Recordings) -> None:
        self.model, self.config, self.cache, self.recordings = model, model.config, cache, recordings
        self.rows: list[Row | None] = [None] * cache.batch
        self.max_capacity = model.config.max_position
        """Tokens a row that the cache may grow to."""
        self.canvases: dict[int, Canvases] = {}
        """The state of the rows' canvases, by their length."""
        self.last_XD = torch.zeros(cache.batch, model.config.hidden_size, dtype=model.dtype, device=model.device)
        """Of rows that read it, the hidden state of the last token that was encoded."""
        self.passes: dict[tuple[object, ...], Pass] = {}
        """The passes of the last steps, by what they follow from."""
        self.failures: list[Failure] = []

    def row(self, seat: int) -> Row:
        """The row in a seat that is taken."""
        row = self.rows[seat]
        assert row is not None, f"seat {seat} is free"
        return row

    @property
    def live(self) -> list[int]:
        """Seats of the rows that are not over."""
        return [seat for seat, row in enumerate(self.rows) if row is not None and not row.is_over]

    # ---- memory -------------------------------------------------------------------------------------------------

    def resize(self, seats: int, capacity: int) -> None:
        """So many seats (no fewer than the last one taken needs) of so many tokens each. What seats hold stays."""
        lengths = self.cache.lengths
        kept = [seat if row is not None or lengths[seat] else None for seat, row in enumerate(self.rows[:seats])]
        if all(seat is None for seat in kept):  # not both at once
            self.cache = KVCache.allocate(self.config, 0, 1, self.model.device, self.model.dtype)
        self.cache = self.cache.fork(kept + [None] * (seats - len(kept)), capacity)
        more = seats - len(self.rows)
        self.rows = (self.rows + [None] * more)[:seats]
        self.last_XD = torch.cat([self.last_XD, self.last_XD.new_zeros(max(0, more), self.last_XD.shape[1])])[:seats]
        self.canvases = {length: state.resized(seats) for length, state in self.canvases.items()}
        self.recordings.clear()
        self.passes.clear()

    def make_room(self, tokens: list[list[int]], seats: list[int]) -> list[int]:
        """The counts of these tokens, for which the cache then has room: an answer without a limit makes it grow."""
        counts = [len(own) for own in tokens]
        need = max(self.cache.lengths[seat] + count for seat, count in zip(seats, counts, strict=True))
        if need > self.cache.capacity:
            self.resize(len(self.rows), max(need, min(2 * self.cache.capacity, self.max_capacity)))
        return counts

    def canvases_of(self, length: int) -> Canvases:
        """The state of all canvases of this length."""
        if length not in self.canvases:
            count = len(self.rows)
            rules = [Rules.of(Options())] * count
            self.canvases[length] = Canvases.allocate(self.model, rules, [0] * count, [0] * count, length)
        state = self.canvases[length]
        here = [row for row in self.rows if row is not None and row.length == length and row.request.is_written]
        state.has_early = any(row.options.early for row in here)
        state.has_further_rules = any(row.rules.has_further for row in here)
        state.has_pins = state.has_early or any(row.request.pins for row in here)
        return state

    # ---- encoding -----------------------------------------------------------------------------------------------

    def encode(self, tokens: list[list[int]], seats: list[int]) -> Tensor:
        """Encode ragged tokens of the rows in these seats; their hidden states, [B, T, D]."""
        counts = self.make_room(tokens, seats)
        hidden_BTD = self.model.encode(self.padded(tokens, max(counts)), self.cache, seats, counts)
        self.keep_last(hidden_BTD, seats, counts)
        return hidden_BTD

    def padded(self, tokens: list[list[int]], width: int) -> Tensor:
        """Ragged tokens as one tensor on the device, [B, width]."""
        padded = [own + [self.config.pad_id] * (width - len(own)) for own in tokens]
        return to_device(torch.tensor(padded), self.model.device)

    def keep_last(self, hidden_BTD: Tensor, seats: list[int], counts: list[int]) -> None:
        """Keep the last real hidden state of each row that will read it.

        The next token, or log-probabilities, follow from it."""
        places = [n for n, seat in enumerate(seats) if self.row(seat).reads_encoded]
        if places:
            last = to_device(torch.tensor([places, [counts[n] - 1 for n in places]]), hidden_BTD.device)
            self.last_XD[[seats[n] for n in places]] = hidden_BTD[last[0], last[1]]

    # ---- what fails in one row ----------------------------------------------------------------------------------

    @contextmanager
    def isolating(self, seat: int) -> Iterator[None]:
        """An error within is the end of this row, not of the others."""
        try:
            yield
        except BaseException as error:
            self.fail(seat, contained(error))

    def fail(self, seat: int, error: Exception) -> None:
        """The row in this seat ends with an error."""
        row = self.row(seat)
        if not row.has_failed:
            row.has_failed = True
            self.failures.append(Failure(seat, error, row.request.id))

    def fail_of_numbers(self, seat: int, where: str) -> None:
        """End a row whose numbers are not finite.

        The next row in its seat must not read them, not even as keys that are masked: 0 times NaN is NaN."""
        adapter = self.row(seat).prompt.adapter
        whose, what = ("", "checkpoint") if adapter is None else (f" with adapter {adapter.name!r}", "adapter")
        message = (
            f"the model's numbers are not finite {where}{whose}: weights or activations are NaN or infinite; check the "
            f"{what}, or load it with another dtype"
        )
        self.fail(seat, NumericError(message))
        for whole_XRGK in (*self.cache.k, *self.cache.v):
            whole_XRGK[seat] = 0

    def pop_failures(self) -> list[Failure]:
        """The failures since the last call."""
        failures, self.failures = self.failures, []
        return failures
