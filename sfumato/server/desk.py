"""The worker process's side: takes jobs from the connection, runs them, sends what comes of them.

Four kinds of thread. One reads the connection, from before the model is loaded, so that the process ends with its
parent whatever it is doing. Two prepare jobs (template, tokens, grammar), so that small ones need not wait for one slow
grammar. The main thread runs the engine, a turn after the other, and sends each turn's events as one message.

Torch is imported only where the model is opened: `worker`, in the server's process, imports this file.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from sfumato.events import Draft, Event, Options, SfumatoError
from sfumato.server.backend import Job, ModelCard, Result, Stats, where

PREPARING = 2
"""Threads that prepare jobs."""
STATS_SECONDS = 0.5
PROGRESS_SECONDS = 0.1
TRIM_SECONDS = 5.0
"""How often the heap gives back what it no longer uses: tensors of ever other sizes leave holes, and it would grow by a
twelfth within minutes."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Those that end the server; it ends the worker itself, after the drain."""

Send = Callable[[Any], None]


class Jobs(Protocol):
    """What runs the jobs: `sfumato.jobs.Jobs`; tests give another. `begin` and `cancel` are safe against `turn`."""

    def begin(self, key: int, kind: str, payload: dict[str, Any], options: Options) -> None: ...

    def cancel(self, key: int) -> None:
        """Of a job that has ended: nothing."""
        ...

    def turn(self) -> Sequence[tuple[int, Event | Result | Exception]]: ...

    @property
    def is_idle(self) -> bool: ...

    def figures(self) -> Any: ...


def main(connection: Connection, load: dict[str, Any], limits: Mapping[str, Any]) -> None:
    """The worker process on a model: `load` for `LLM.load`, `limits` for `BatchLimits`, by name."""

    def open_jobs(send: Send) -> tuple[Jobs, ModelCard]:
        from sfumato.batch import BatchLimits
        from sfumato.jobs import Jobs
        from sfumato.llm import LLM

        llm = LLM.load(
            **load, notice=lambda text: print(f"sfumato: {text}", file=sys.stderr, flush=True), progress=Progress(send)
        )
        return Jobs(llm, BatchLimits(**limits)), card_of(llm, load.get("quantize"))

    run(connection, open_jobs)


def run(connection: Connection, open_jobs: Callable[[Send], tuple[Jobs, ModelCard]]) -> None:
    """Open the model, then run jobs until the parent says stop or closes the connection."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the parent blocked them until they are ignored
    desk = Desk(connection)
    _start(desk.read)
    try:
        desk.jobs, card = open_jobs(desk.send)
    except SfumatoError as error:
        return desk.send(("failed", error))
    except Exception as error:
        return desk.send(("failed", SfumatoError(f"the model cannot be loaded: {_full(error)}")))
    gc.collect()
    gc.freeze()  # a third of a million objects of libraries that will not go: not looked through again and again
    desk.send(("ready", card))
    for _ in range(PREPARING):
        _start(desk.prepare)
    try:
        desk.serve()
    except Exception as error:
        print(f"sfumato: the engine failed: {_full(error)}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: other threads may stand in the engine


class Desk:
    """Jobs between the connection and the engine. `read`, `prepare` and `serve` are what the threads run."""

    jobs: Jobs

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.is_sending = threading.Lock()
        self.news = threading.Event()
        self.queue: SimpleQueue[tuple[int, Job]] = SimpleQueue()
        self.lock = threading.Lock()
        self.preparing: dict[int, bool] = {}
        """Jobs that have not begun, and whether they have been cancelled since."""

    def send(self, message: Any) -> None:
        """From any thread; the process ends where nobody listens any more."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            with self.is_sending:
                self.connection.send_bytes(data)
        except OSError:
            os._exit(0)

    def read(self) -> None:
        while True:
            try:
                message = self.connection.recv()
            except (EOFError, OSError):  # the parent has ended
                os._exit(0)
            match message:
                case ("job", key, job):
                    with self.lock:
                        self.preparing[key] = False
                    self.queue.put((key, job))
                case ("cancel", key):
                    with self.lock:
                        is_begun = key not in self.preparing
                        if not is_begun:
                            self.preparing[key] = True
                    if is_begun:
                        self.jobs.cancel(key)
                        self.news.set()
                case ("stop",):
                    os._exit(0)

    def prepare(self) -> None:
        while True:
            key, job = self.queue.get()
            is_begun = False
            try:
                if not self.preparing[key]:
                    self.jobs.begin(key, job.kind, job.payload, job.options)
                    is_begun = True
            except Exception as error:
                self.send(("events", [(key, _told(error))]))
            with self.lock:
                is_cancelled = self.preparing.pop(key)
            if is_begun and is_cancelled:
                self.jobs.cancel(key)
            self.news.set()

    def serve(self) -> None:
        told, trimmed = 0.0, time.monotonic()
        while True:
            self.news.clear()  # before the look, so that what comes after it is heard
            if is_idle := self.jobs.is_idle:
                happened = []
            else:
                happened = [(key, _lighter(what)) for key, what in self.jobs.turn()]
            if happened:
                self.send(("events", happened))
            if is_idle or time.monotonic() - told >= STATS_SECONDS:
                self.send(("stats", self.stats()))
                told = time.monotonic()
            if time.monotonic() - trimmed >= TRIM_SECONDS or (is_idle and not self.news.wait(TRIM_SECONDS)):
                trim()
                trimmed = time.monotonic()
                if is_idle:
                    self.news.wait()

    def stats(self) -> Stats:
        figures = vars(self.jobs.figures())
        return Stats(**figures | {"queue": figures["queue"] + len(self.preparing), "memory_bytes": _memory_bytes()})


class Progress:
    """Called by `LLM.load` with bytes done and bytes in all; tells the parent now and then."""

    def __init__(self, send: Send) -> None:
        self.send, self.last = send, 0.0

    def __call__(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self.last >= PROGRESS_SECONDS:
            self.last = time.monotonic()
            self.send(("loading", done, total))


def card_of(llm: Any, quantize: str | None) -> ModelCard:
    """What clients may know of an `LLM`. A folder's name stands for its path, which is nobody's business."""
    from sfumato.measure.work import Parameters
    from sfumato.model import products

    model, config = llm.model, llm.model.config
    kinds = {getattr(getattr(owner, name), "kind", None) for owner, name in products(model)}
    is_local = os.path.exists(llm.name)
    return ModelCard(
        name=Path(llm.name).resolve().name if is_local else llm.name,
        canvas_length=config.canvas_length,
        max_position=config.max_position,
        vocab_size=config.vocab_size,
        is_diffusion=config.is_diffusion,
        has_chat=llm.template is not None,
        parameters=Parameters.of(config).total,
        dtype=str(model.dtype).removeprefix("torch."),
        ops=model.ops.name,
        quantised=quantize or ", ".join(sorted(kind for kind in kinds if isinstance(kind, str))) or None,
        defaults=llm.defaults,
    )


def _start(run: Callable[[], None]) -> None:
    threading.Thread(target=run, daemon=True, name=run.__name__).start()


def _lighter(what: Event | Result | Exception) -> Event | Result | Exception:
    if isinstance(what, Draft):
        return replace(what, entropies=[round(entropy, 4) for entropy in what.entropies])
    return _told(what) if isinstance(what, Exception) else what


def _told(error: Exception) -> SfumatoError:
    """One of our own as it is. Of another only its kind and place: its words may be a prompt's."""
    if isinstance(error, SfumatoError):
        return error
    print(f"sfumato: a request failed: {where(error)}", file=sys.stderr, flush=True)
    return SfumatoError(f"the engine failed at this request ({where(error, 1)}); it is a fault of the server")


def _full(error: Exception) -> str:
    return f"{next(iter(str(error).splitlines()), '')} ({where(error)})"


def trim() -> None:
    """Give freed memory back to the system, where the C library can (glibc)."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _memory_bytes() -> int:
    """Resident memory of this process; the most it ever was, where the system does not say what it is."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
