"""Recorded steps: a step of many canvases as a CUDA graph, for rows up to powers of two.

A graph reads and writes the very memory that it was recorded with, and repeats what Python decided then. So what may
change lies in static buffers (rows, lengths, counts, lanes of adapters, tokens to encode, banned tokens), what it reads
lives as long as it does, and what follows from the lengths alone, masks' numbers and rope's angles, is made anew only
when they change: once a canvas. Who has which adapter may change from step to step, and an adapter that is written onto
a lane needs nothing recorded anew. All graphs of an engine share one pool of memory, because they run one after the
other; the least recently used ones go.

How a graph is made is a `Capture`: `CudaCapture` on a GPU; nothing on other devices, where the same buffers are used
and the step runs as usual. `measure.capture` holds a step to what a capture allows, without a GPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.model.cache import KVCache
from sfumato.model.network import Model, weights_of
from sfumato.model.passes import Pass, Places
from sfumato.ops.lowrank import LanePair
from sfumato.sampling.canvases import Canvases
from sfumato.sampling.step import StepInput, step_

Replay = Callable[[], object]
Capture = Callable[[Callable[[], Tensor | None]], tuple[Replay, Tensor | None]]
"""Records what a function does; returns how to do it again, and where its result then lies."""

MOST = 24
"""Recordings that an engine keeps: six powers of two of rows, each with and without tokens to encode, pins, bans or
adapters."""

GRAPH_BYTES = 7 << 20
"""What one recording takes beside the pool: about 700 nodes with their arguments, on the host and the device; without
adapters 350 to 450."""


def on(device: torch.device) -> AbstractContextManager[object]:
    """Within, this is the device that streams and graphs are made on: a process may hold models on several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that captures run on.

    One for all: torch gives streams out in turns, and the one that a block runs beside (`ops.triton.block`) must be
    another."""
    return torch.cuda.Stream(device)


_ONE_AT_A_TIME = threading.Lock()
"""A capture waits for the device, which would break a capture in another thread."""


class CudaCapture:
    """CUDA graphs on one device, in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with on(device):
            self._stream = _stream(device)
        self.renew_()

    def renew_(self) -> None:
        """A pool of its own for what is recorded from now on: torch refuses one whose graphs are all gone."""
        with on(self.device):
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor | None]) -> tuple[Replay, Tensor | None]:
        """See `Capture`."""
        with _ONE_AT_A_TIME, on(self.device):
            here = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):  # compiles what is not yet, and fills caches
                for _ in range(2):
                    run()
            here.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Without a stream of its own, torch takes one of the first device that ever recorded. What torch keeps of
            # a capture may be no inference tensor, or others' captures outside that mode fail.
            own = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
            with torch.inference_mode(False), own, torch.inference_mode():
                result = run()

        def replay() -> None:
            with on(self.device):
                graph.replay()

        return replay, result


class RecordedShape(NamedTuple):
    """For which steps a recording is made, beside what the state has."""

    batch: int
    """Rows, at most."""
    encode: int = 0
    """Tokens a row in the same pass; 0: none."""
    bans: int = 0
    """Banned tokens, at most; 0: no position bans any."""
    has_lanes: bool = False
    """Rows may have adapters."""


class Recorded:
    """A step of this shape.

    Everything that is read is held here, the weights too, whatever becomes of the model. The cache's and the state's
    tensors are part of the recording: it serves for as long as neither is replaced by a larger one. Pins, early
    answers and further rules are as the state has them when this is made. With further rules it holds the plain end of
    a step, `step.conclude_`, in place of the operations' own, which is two kernels: some seventy small operations,
    all of fixed shapes."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        state: Canvases,
        shape: RecordedShape,
        capture: Capture | None = None,
    ) -> None:
        self.weights, self.cache, self.state = list(weights_of(model)), cache, state
        batch, encode, bans, has_lanes = shape
        self.batch, self.has_lanes = batch, has_lanes
        device, length = model.device, state.canvas_XL.shape[1]
        self.scratch = len(state.canvas_XL) - 1
        self.places_PB = torch.zeros(6 if has_lanes else 4, batch, dtype=torch.long, device=device)
        self.places_PB[0] = self.scratch
        self.tokens_BT = torch.zeros(batch, encode, dtype=torch.long, device=device) if encode else None
        self.bans_N = torch.zeros(bans, dtype=torch.long, device=device) if bans else None
        at_B, *places = self.places_PB.unbind()
        counts = [encode] * batch
        self.run = Pass(model, cache, [0] * batch, counts, encode, length, Places(*places))

        def refresh() -> None:
            self.run.refresh_()

        def step() -> Tensor | None:
            return step_(model, cache, state, StepInput(at_B, self.run, self.tokens_BT, bans_N=self.bans_N))

        self._last: tuple[list[list[int]] | None, Sequence[int]] = None, ()
        """The places and banned tokens that the static buffers hold."""
        self._refresh: Replay = refresh
        self._step: Replay = step
        self._encoded_BTD: Tensor | None = None
        self.is_captured = capture is not None
        if capture is not None:
            self._refresh, _ = capture(refresh)
            self._step, self._encoded_BTD = capture(step)

    def __call__(
        self,
        rows: list[int],
        lengths: list[int],
        counts: list[int],
        tokens_BT: Tensor | None = None,
        bans: Sequence[int] = (),
    ) -> Tensor | None:
        """Step these rows (at most `batch`), whose cache rows have these lengths.

        Returns the encoded tokens' hidden states, [rows, T, D], which the next step of any recording overwrites."""
        fill = self.batch - len(rows)
        # A filler reads cache row 0 and writes, with a count of 0, to the slot that takes padding.
        places = [rows + [self.scratch] * fill, rows + [0] * fill, lengths + [0] * fill, counts + [0] * fill]
        if self.has_lanes:
            lanes = [self.cache.lanes[row] for row in rows] + [LanePair()] * fill
            places += [[lane.encode for lane in lanes], [lane.denoise for lane in lanes]]
            if not self.is_captured and places != self._last[0]:
                self.run.take_lanes(lanes)  # operations that multiply run by run are told, where they can be
        if places != self._last[0]:
            self.places_PB.copy_(_staged(places, self.places_PB), non_blocking=True)
            self._refresh()
        if self.bans_N is not None and bans != self._last[1]:  # the last one again where there is room for more
            ids = [*bans, *[bans[-1]] * (len(self.bans_N) - len(bans))]
            self.bans_N.copy_(_staged(ids, self.bans_N), non_blocking=True)
        self._last = places, bans
        if tokens_BT is not None and self.tokens_BT is not None:
            self.tokens_BT[: len(rows)] = tokens_BT
        result = self._step()
        encoded_BTD = result if isinstance(result, Tensor) else self._encoded_BTD
        return None if encoded_BTD is None else encoded_BTD[: len(rows)]


def _staged(values: Sequence[object], like: Tensor) -> Tensor:
    """On the host, where a copy to the device need not wait for it."""
    return torch.tensor(values, dtype=like.dtype, pin_memory=like.device.type == "cuda")


class Recordings:
    """The recordings of one engine, by what was decided for each; the least recently used goes first."""

    def __init__(self, capture: Capture | None) -> None:
        self.capture = capture
        self._kept: OrderedDict[Hashable, Recorded] = OrderedDict()

    def of(
        self,
        model: Model,
        cache: KVCache,
        state: Canvases,
        rows: Sequence[int],
        encode: int,
        bans: Sequence[int],
    ) -> Recorded:
        """The recording that serves these rows, or as many others of which some have adapters, or none of them has.

        It is made where there is none."""
        seats, has_lanes = len(state.canvas_XL) - 1, any(cache.lanes[row] != LanePair() for row in rows)
        shape = RecordedShape(min(padded(len(rows)), seats), encode, padded(len(bans)), has_lanes)
        key = state.canvas_XL.shape[1], shape, state.has_pins, state.has_early, state.has_further_rules
        if key not in self._kept:
            while len(self._kept) >= MOST:
                self._kept.popitem(last=False)
            self._kept[key] = Recorded(model, cache, state, shape, self.capture)
        self._kept.move_to_end(key)
        return self._kept[key]

    def check(self, model: Model) -> None:
        """Drop what was recorded with weights that the model has no longer."""
        if self._kept:
            recorded = next(iter(self._kept.values())).weights
            now = list(weights_of(model))
            if len(recorded) != len(now) or any(one is not other for one, other in zip(recorded, now, strict=True)):
                self.clear()

    def clear(self) -> None:
        """The cache or the state has been replaced."""
        self._kept.clear()
        if isinstance(self.capture, CudaCapture):
            self.capture.renew_()

    def __len__(self) -> int:
        return len(self._kept)


def padded(count: int) -> int:
    """The next power of two; 0 for none."""
    return 1 << (count - 1).bit_length() if count else 0
