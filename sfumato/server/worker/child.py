"""The worker process's side: takes jobs from the connection, runs them, sends what comes of them.

Four kinds of thread. One reads the connection, from before the model is loaded, so that the process ends with its
parent whatever it is doing. Others prepare jobs (template, tokens, grammar) in two lanes, so that small ones need not
wait for a new grammar or a long text. The main thread runs the engine, a turn after the other, and sends each turn's
events as one message.

What a job meets ends that job. One that is not prepared in time is given up, and another thread takes the place of the
one that is lost to it. What is sent to the parent is plain: each event by itself, errors of our own family alone.

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
from dataclasses import dataclass, field, replace
from enum import Enum
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from sfumato.errors import InputError, SfumatoError, contained, is_panic
from sfumato.events import Draft, Event
from sfumato.options import Options
from sfumato.server.backend import Job, ModelCard, Result, Stats, where
from sfumato.system import confined
from sfumato.templates import requests
from sfumato.templates.slots import pieces_of

PREPARING = 2
"""Threads that prepare jobs, in each lane."""
LARGE = 64 << 10
"""Bytes of a job from which on it goes into the slow lane."""
NICE = 19
"""How far the slow lane's threads step aside, where the system has that of threads (Linux)."""
PREPARE_SECONDS = 60.0
"""After which a job that is still being prepared is given up."""
SWITCH_SECONDS = 0.0005
"""After which a thread that prepares hands the interpreter to the engine's, which asks for it many times a turn."""
LOST = 8
"""Threads that may be lost to such jobs; with one more the process ends, and is started again."""
STACK = 16 << 20
"""Bytes of stack of a thread: what a grammar needs was measured on less."""
STATS_SECONDS = 0.5
PROGRESS_SECONDS = 0.1
TRIM_SECONDS = 5.0
"""How often the heap gives back what it no longer uses: tensors of ever other sizes leave holes, and it would grow by a
twelfth within minutes."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Those that end the server; it ends the worker itself, after the drain."""

Send = Callable[[Any], None]


class Jobs(Protocol):
    """What runs the jobs: `engine.jobs.Jobs`; tests give another. `begin` and `cancel` are safe against `turn`."""

    def begin(self, key: int, kind: str, payload: dict[str, Any], options: Options) -> None: ...

    def is_slow(self, kind: str, payload: dict[str, Any], options: Options) -> bool:
        """Whether `begin` may take seconds; at once."""
        ...

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
        from sfumato.constraints.forms import llguidance
        from sfumato.engine.jobs import Jobs
        from sfumato.engine.limits import BatchLimits
        from sfumato.llm import LLM

        llm = LLM.load(
            **load, notice=lambda text: print(f"sfumato: {text}", file=sys.stderr, flush=True), progress=Progress(send)
        )
        with suppress(InputError):
            llguidance()  # now rather than between two turns, where it is installed
        return JobsByKey(Jobs(llm, BatchLimits(**limits))), card_of(llm, load.get("quantize"))

    run(connection, open_jobs)


def run(connection: Connection, open_jobs: Callable[[Send], tuple[Jobs, ModelCard]]) -> None:
    """Open the model, then run jobs until the parent says stop or closes the connection."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in the thread that asks, which may have stepped aside
    sys.setswitchinterval(SWITCH_SECONDS)
    _hold_cores()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the parent blocked them until they are ignored
    desk = Desk(connection)
    _start(desk.read)
    try:
        desk.jobs, card = open_jobs(desk.send)
    except SfumatoError as error:
        return desk.send(("failed", plain(error)))
    except BaseException as error:
        return desk.send(("failed", SfumatoError(f"the model cannot be loaded: {_full(error)}")))
    gc.collect()
    gc.freeze()  # a third of a million objects of libraries that will not go: not looked through again and again
    desk.send(("ready", card))
    for lane in Lane:
        for _ in range(PREPARING):
            _start(desk.prepare, lane)
    try:
        desk.serve()
    except BaseException as error:
        print(f"sfumato: the engine failed: {_full(error)}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: other threads may stand in the engine


class Lane(Enum):
    QUICK = 0
    SLOW = NICE


@dataclass(eq=False)
class _Preparing:
    """A job that has come and has not begun."""

    lane: Lane

    came: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    is_given_up: bool = False


class Desk:
    """Jobs between the connection and the engine. `read`, `prepare` and `serve` are what the threads run."""

    jobs: Jobs

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.is_sending = threading.Lock()
        self.news = threading.Event()
        self.queues: dict[Lane, SimpleQueue[tuple[int, Job]]] = {lane: SimpleQueue() for lane in Lane}
        self.lock = threading.Lock()
        self.preparing: dict[int, _Preparing] = {}
        self.at_work: dict[int, float] = {}
        """Of these, those that a thread prepares, and since when."""
        self.lost = 0

    def send(self, message: Any) -> None:
        """From any thread; the process ends where nobody listens any more."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            with self.is_sending:
                self.connection.send_bytes(data)
        except OSError:
            os._exit(0)

    def tell(self, happened: Sequence[tuple[int, Event | Result | BaseException]]) -> None:
        """Each in a parcel of its own: what cannot be sent, or read, is its own job's error."""
        self.send(("events", [(key, _parcel(what)) for key, what in happened]))

    def read(self) -> None:
        while True:
            try:
                data = self.connection.recv_bytes()
            except (EOFError, OSError):  # the parent has ended
                os._exit(0)
            try:
                message = pickle.loads(data)
            except Exception as error:
                print(f"sfumato: a message could not be read: {where(error)}", file=sys.stderr, flush=True)
                continue
            match message:
                case ("job", key, parcel):
                    try:
                        job = pickle.loads(parcel)
                    except Exception as error:
                        self.tell([(key, error)])
                        continue
                    lane = self.lane_of(job, len(parcel))
                    with self.lock:
                        self.preparing[key] = _Preparing(lane)
                    self.queues[lane].put((key, job))
                    self.news.set()
                case ("cancel", key):
                    with self.lock:
                        if (one := self.preparing.get(key)) is not None:
                            one.is_cancelled = True
                    if one is None:
                        self.jobs.cancel(key)
                        self.news.set()
                case ("stop",):
                    os._exit(0)

    def lane_of(self, job: Job, size: int) -> Lane:
        try:
            return Lane.SLOW if size >= LARGE or self.jobs.is_slow(job.kind, job.payload, job.options) else Lane.QUICK
        except Exception:  # whatever is wrong with it, `begin` says it
            return Lane.SLOW

    def prepare(self, lane: Lane) -> None:
        """Until a job takes so long that another thread has taken this one's place."""
        confined.leave_cores()
        if lane.value:
            with suppress(AttributeError, OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), lane.value)
        one = _Preparing(lane)
        while not one.is_given_up:
            key, job = self.queues[lane].get()
            with self.lock:
                one, self.at_work[key] = self.preparing[key], time.monotonic()
            confined.is_cancelled.set(lambda one=one: one.is_cancelled or one.is_given_up)  # type: ignore[misc]
            is_begun, failure = False, None
            try:
                if not one.is_cancelled:
                    self.jobs.begin(key, job.kind, job.payload, job.options)
                    is_begun = True
            except BaseException as error:  # a panic of a Rust library is no Exception
                failure = error
            with self.lock:
                self.preparing.pop(key)
                self.at_work.pop(key)
            if is_begun and (one.is_cancelled or one.is_given_up):
                self.jobs.cancel(key)
            if one.is_given_up:  # and this thread is not lost after all
                with self.lock:
                    self.lost -= 1
            elif failure is not None:
                self.tell([(key, failure)])
            self.news.set()

    def give_up(self) -> None:
        """Jobs that are not prepared in time; each has cost a thread, which another one takes the place of."""
        late = time.monotonic() - PREPARE_SECONDS
        with self.lock:
            late_ones = {key: self.preparing[key] for key, since in self.at_work.items() if since < late}
            overdue = {key: one for key, one in late_ones.items() if not one.is_given_up}
            for one in overdue.values():
                one.is_given_up = True
        for key, one in overdue.items():
            text = f"the request was not prepared within {PREPARE_SECONDS:g} seconds; make its texts smaller"
            self.tell([(key, InputError(text))])
            with self.lock:
                self.lost += 1
            if self.lost > LOST:
                print(f"sfumato: {LOST} threads are lost to requests that take too long", file=sys.stderr, flush=True)
                os._exit(1)
            _start(self.prepare, one.lane)

    def serve(self) -> None:
        told, trimmed = 0.0, time.monotonic()
        while True:
            self.news.clear()  # before the look, so that what comes after it is heard
            if is_idle := self.jobs.is_idle:
                happened: Sequence[tuple[int, Any]] = []
            else:
                happened = self.jobs.turn()
            if happened:
                self.tell(happened)
            self.give_up()
            if is_idle or time.monotonic() - told >= STATS_SECONDS:
                self.send(("stats", self.stats()))
                told = time.monotonic()
            if is_idle and self.preparing:  # say so now and then: a parent that hears nothing takes this for a hang
                self.news.wait(STATS_SECONDS)
            elif time.monotonic() - trimmed >= TRIM_SECONDS or (is_idle and not self.news.wait(TRIM_SECONDS)):
                trim()
                trimmed = time.monotonic()
                if is_idle:
                    self.news.wait()

    def stats(self) -> Stats:
        figures = vars(self.jobs.figures())
        with self.lock:
            came = [one.came for one in self.preparing.values() if not one.is_given_up]
        more = {
            "queue": figures["queue"] + len(came),
            "memory_bytes": _memory_bytes(),
            "stalled": time.monotonic() - min(came) if came else 0.0,
        }
        return Stats(**figures | more)


class JobsByKey:
    """The engine's jobs by the numbers of this connection, made from a job's kind and payload."""

    def __init__(self, jobs: Any) -> None:
        self.jobs = jobs

    def begin(self, key: int, kind: str, payload: dict[str, Any], options: Options) -> None:
        self.jobs.begin(str(key), query_of(kind, payload, options))

    def is_slow(self, kind: str, payload: dict[str, Any], options: Options) -> bool:
        is_slow: bool = self.jobs.is_slow(query_of(kind, payload, options))
        return is_slow

    def cancel(self, key: int) -> None:
        self.jobs.cancel(str(key))

    def turn(self) -> Sequence[tuple[int, Event | Result | Exception]]:
        return [(int(id), outcome) for id, outcome in self.jobs.turn()]

    @property
    def is_idle(self) -> bool:
        is_idle: bool = self.jobs.is_idle
        return is_idle

    def figures(self) -> Any:
        return self.jobs.figures()


def query_of(kind: str, payload: Mapping[str, Any], options: Options) -> requests.Query:
    """The request that a job stands for."""
    match kind:
        case "complete":
            return requests.Complete(payload["prompt"], options)
        case "chat":
            return requests.Chat(payload["messages"], payload.get("tools"), options)
        case "infill":
            return requests.Infill(**payload, options=options)
        case "edit":
            return requests.Edit(**payload, options=options)
        case "fill":
            return requests.Fill(pieces_of(payload["template"]), payload.get("prompt"), options)
        case "decide":
            return requests.Decide(payload["prompt"], payload["fields"], payload.get("steps", 1), options)
    raise InputError(f"there is no method {kind!r}; there are chat, complete, infill, fill, edit, decide")


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
    from sfumato.model.network import products

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


def _hold_cores() -> None:
    """Each of the engine's threads keeps a core, and sleeps soon where it waits for another. Otherwise two of them meet
    on one core as soon as anything else runs, and each spins while the other should compute: a step then takes up to
    ten times as long. OpenMP reads this as torch is loaded."""
    if holds_cores():
        os.environ["OMP_PROC_BIND"] = "true"
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def holds_cores() -> bool:
    """Whether the engine's threads are to keep a core each: they compute on all of them, and nobody says otherwise."""
    is_free = "OMP_NUM_THREADS" not in os.environ and os.environ.get("OMP_PROC_BIND", "true") == "true"
    return is_free and confined.CORES is not None and not Path("/proc/driver/nvidia").exists()


def leave_first_core() -> None:
    """The calling thread keeps off the core of the engine's main thread, which cannot make way."""
    others = (confined.CORES or set()) - {min(confined.CORES or {0})}
    if others:
        with suppress(OSError):
            os.sched_setaffinity(0, others)


def _start(run: Callable[..., None], *arguments: Any) -> None:
    before = threading.stack_size(STACK)
    threading.Thread(target=run, args=arguments, daemon=True, name=run.__name__).start()
    threading.stack_size(before)


def _parcel(what: Event | Result | BaseException) -> bytes:
    if isinstance(what, Draft):
        what = replace(what, entropies=[round(entropy, 4) for entropy in what.entropies])
    try:
        return pickle.dumps(plain(what) if isinstance(what, BaseException) else what, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return pickle.dumps(plain(error), pickle.HIGHEST_PROTOCOL)


def unpacked(parcel: bytes) -> Event | Result | SfumatoError:
    """What a parcel holds, on the parent's side."""
    try:
        return pickle.loads(parcel)  # type: ignore[no-any-return]
    except Exception as error:
        return plain(error)


def plain(error: BaseException) -> SfumatoError:
    """An error that any process can read: one of those that `events` has. Of another only its kind and place: its words
    may be a prompt's."""
    if isinstance(error, SfumatoError):
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ == SfumatoError.__module__)
        return error if kind is type(error) else kind(str(error))
    print(f"sfumato: a request failed: {where(error)}", file=sys.stderr, flush=True)
    if is_panic(error):
        return plain(contained(error))
    return SfumatoError(f"the engine failed at this request ({where(error, 1)}); it is a fault of the server")


def _full(error: BaseException) -> str:
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
