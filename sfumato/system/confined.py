"""Work on what others wrote, in a child process that can be killed: templates, grammars, patterns.

A library that reads hostile input can crash, run for ever or take all memory, and nothing in its own process stops it.
So such work is a function of plain values that runs in a child with limits on seconds, bytes and stack: whatever
becomes of the child is an `InputError` here (a `BusyError` where the machine had no time for it), and the next call
starts another. A child stays for the next call, because
an interpreter takes a while to start, and what its functions keep for later (a tokenizer) stays with it.

The arguments are pickled; a result is read as JSON, so that a child which was taken over has no say here. Limits on
memory are the system's (`RLIMIT_AS`), which macOS does not keep. On Windows there is no child: calls run in place.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import IO, Any

from sfumato.errors import BusyError, CapacityError, CheckpointError, InputError

SECONDS = 5.0
"""That one call may take, as its child's processor counts them."""
PATIENCE, MINUTE = 12, 60.0
"""Times as many may pass by the clock, up to a minute: a child that steps aside gets little of a busy machine. Of what
may take long, four times as many."""
MEMORY = 512 << 20
"""Bytes that one call may take beyond what its child holds."""
STACK = 8 << 20
"""Bytes of stack of one call."""
CHILDREN = 2
"""Of a pool, that work at once; a call waits while all are at work."""

_LOOK = 0.05  # seconds between two looks at whether a call was cancelled
_LENGTH = struct.Struct("<Q")
_MOST = 256 << 20  # bytes of one result
_PIECE = 1 << 16  # bytes that are sent or received at once
_ERRORS = {kind.__name__: kind for kind in (InputError, CapacityError, CheckpointError)}

is_cancelled: ContextVar[Callable[[], bool]] = ContextVar("is_cancelled")
"""Called while a call is waited for; where it returns True, waiting ends."""


def patience(seconds: float) -> float:
    """Seconds by the clock that a call may take, of which so many are its child's."""
    return min(PATIENCE * seconds, max(4 * seconds, MINUTE))


class Cancelled(InputError):
    """Nobody waits for this call any more."""


class Child:
    """One process, its input and its output. A call at a time."""

    def __init__(self, nice: int = 0) -> None:
        self.nice = nice
        self.process: subprocess.Popen[bytes] | None = None
        self.what, self.deadline, self.seconds, self.memory = "", 0.0, SECONDS, MEMORY
        """Of the call that is made now."""

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        seconds: float | None = None,
        memory: int = MEMORY,
        stack: int = STACK,
    ) -> Any:
        """See `ChildPool.run`. `seconds` None: `SECONDS`."""
        if sys.platform == "win32":  # whose pipes cannot be waited for
            return function(*arguments)
        self.seconds, self.memory = SECONDS if seconds is None else seconds, memory
        self.deadline = time.monotonic() + patience(self.seconds)
        answer = self._call((function.__module__, function.__qualname__, arguments, self.seconds, memory, stack))
        match answer:
            case {"result": result}:
                return result
            case {"error": [str(kind), str(text)]}:
                raise _ERRORS[kind](text) if kind in _ERRORS else InputError(f"{self.what} cannot be used: {text}")
            case _:
                self.end()
                raise InputError(f"{self.what} makes the process that reads it fail; make it smaller")

    def start(self) -> subprocess.Popen[bytes]:
        """The process, started if it does not run. BusyError where the system starts none."""
        if self.process is not None and self.process.poll() is not None:
            self.end()
        if self.process is None:
            code = f"{_step_aside(self.nice)}from sfumato.system.confined import serve; serve()"
            root = str(Path(__file__).parents[2])
            paths = [root, *(path for path in (os.environ.get("PYTHONPATH"),) if path)]
            try:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,  # a panic's words may be a prompt's
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"},
                    process_group=0,  # Ctrl-C is for us; a session of its own would have a share of its own
                )
            except OSError as error:
                raise BusyError(
                    f"no process can be started to read templates and grammars: {error.strerror}; try again in a moment"
                ) from None
        return self.process

    def end(self) -> None:
        """Kill the process, if it runs, and close its pipes."""
        if (process := self.process) is not None:
            self.process = None
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            process.wait()

    def _call(self, job: tuple[Any, ...]) -> dict[str, Any]:
        is_over = False
        try:
            process = self.start()
            assert process.stdin is not None and process.stdout is not None
            data = pickle.dumps(job, pickle.HIGHEST_PROTOCOL)
            answer: dict[str, Any] = json.loads(self._exchange(process, _LENGTH.pack(len(data)) + data))
            is_over = True
            return answer
        except (InputError, BusyError):
            raise
        except (EOFError, OSError, ValueError):
            raise InputError(f"{self.what} {self._why()}") from None
        finally:
            if not is_over:
                self.end()

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes) -> bytes:
        """Send these bytes and receive the answer's, neither for longer than is allowed."""
        is_given_up = is_cancelled.get(lambda: False)
        left, answer, size = memoryview(data), bytearray(), _LENGTH.size
        assert process.stdin is not None and process.stdout is not None
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        with DefaultSelector() as selector:
            selector.register(process.stdin, EVENT_WRITE)
            selector.register(process.stdout, EVENT_READ)
            while len(answer) < size:
                ready = selector.select(_LOOK)
                if is_given_up():
                    raise Cancelled(f"{self.what} is no longer waited for")
                if time.monotonic() > self.deadline:
                    raise BusyError(
                        f"{self.what} did not get {self.seconds:g} seconds of the processor in "
                        f"{patience(self.seconds):g}; send the request again later"
                    )
                for key, _ in ready:
                    if key.fileobj is process.stdin:
                        with suppress(BrokenPipeError, BlockingIOError):  # it may have ended: its output says how
                            left = left[os.write(key.fd, left[:_PIECE]) :]
                        if not left or process.poll() is not None:
                            selector.unregister(process.stdin)
                        continue
                    piece = os.read(key.fd, _PIECE)
                    answer += piece
                    if len(answer) >= _LENGTH.size:
                        size = _LENGTH.size + _LENGTH.unpack_from(answer)[0]
                    if not piece or size > _MOST:
                        raise EOFError
        return bytes(answer[_LENGTH.size :])

    def _why(self) -> str:
        """How the process ended, as the end of a sentence."""
        process = self.process
        code = None
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(1.0)
        if code == -_signal("SIGXCPU"):
            return f"takes longer than the {self.seconds:g} seconds allowed; make it simpler"
        if code == -_signal("SIGABRT"):
            return f"takes more than the {self.memory >> 20} MiB of memory allowed; make it smaller"
        return "makes the library that reads it crash; make it smaller or less nested"


class ChildPool:
    """Children for one kind of work, so that none of it waits for another kind.

    `nice` is how far they step aside for other processes, from 0 to 19. They start with the first call, and end with
    this process."""

    def __init__(self, nice: int = 0) -> None:
        self._free = [Child(nice) for _ in range(CHILDREN)]
        self._nice = nice
        self._change = threading.Condition()
        self._owner = os.getpid()
        atexit.register(self.end)

    def run(self, function: Callable[..., Any], *arguments: Any, what: str, stack: int = STACK) -> Any:
        """What a function of a module returns for these arguments, from a child. The result is what JSON can say.

        InputError as the function raises it, or, with `what` as its subject, where a limit ends the call. Anything else
        that the function raises is an InputError too."""
        with self.child(what) as child:
            return child.run(function, *arguments, stack=stack)

    @contextmanager
    def child(self, what: str) -> Iterator[Child]:
        """A child for several calls: what one of them keeps, the next one finds. See `run`."""
        child = self._take(what)
        child.what = what
        try:
            yield child
        finally:
            self._give_back(child)

    def start(self) -> None:
        """Begin to start a child, so that the first call need not wait for it."""
        with suppress(BusyError), self.child("the first call") as child:  # the first call says so
            child.start()

    def end(self) -> None:
        """End every child that is not at work."""
        if self._owner == os.getpid():
            for child in self._free:
                child.end()

    def _take(self, what: str) -> Child:
        is_given_up, until = is_cancelled.get(lambda: False), time.monotonic() + patience(SECONDS)
        with self._change:
            if self._owner != os.getpid():  # after a fork the children are the parent's
                self._free, self._owner = [Child(self._nice) for _ in range(CHILDREN)], os.getpid()
            while not self._free:
                if is_given_up():
                    raise Cancelled(f"{what} is no longer waited for")
                if time.monotonic() > until:
                    raise BusyError(f"{what} had to wait too long for others like it; send the request again later")
                self._change.wait(_LOOK)
            return self._free.pop()  # the one that was used last: it is there, and may hold what is needed

    def _give_back(self, child: Child) -> None:
        with self._change:
            self._free.append(child)
            self._change.notify()


def _step_aside(nice: int) -> str:
    """The beginning of a child's code: from its first moment on it steps aside."""
    calls = []
    if nice and hasattr(os, "nice"):
        calls.append(f"os.nice({nice})")
    if nice and hasattr(os, "SCHED_IDLE"):
        calls.append("os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))")
    return "import os\n" + "".join(f"try: {call}\nexcept OSError: pass\n" for call in calls)


# ---- in the child ----------------------------------------------------------------------------------------------------


def serve() -> None:
    """What a child runs: one call after the other, until its input ends."""
    come, go = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with suppress(EOFError, BrokenPipeError):
        while True:
            (length,) = _LENGTH.unpack(_exactly(come, _LENGTH.size))
            module, name, arguments, *limits = pickle.loads(_exactly(come, length))
            answer = _limited(getattr(importlib.import_module(module), name), arguments, *limits)
            _write(go, json.dumps(answer).encode())


def _limited(
    function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float, memory: int, stack: int
) -> dict[str, Any]:
    answer: dict[str, Any] = {}

    def work() -> None:
        try:
            answer["result"] = function(*arguments)
        except MemoryError:
            answer["error"] = "", f"it takes more than the {memory >> 20} MiB of memory allowed; make it smaller"
        except BaseException as error:  # a panic of a Rust library is no Exception
            text = next(iter(str(error).splitlines()), "") or type(error).__name__
            answer["error"] = type(error).__name__, text[:2000] if isinstance(error, InputError) else text[:300]

    _limit(seconds, memory)
    before = threading.stack_size(stack)
    thread = threading.Thread(target=work)
    thread.start()
    threading.stack_size(before)
    thread.join()
    if not answer:  # not even the memory to say so
        os.abort()
    return answer


def _limit(seconds: float, memory: int) -> None:
    """The seconds and the bytes of one call, beyond what this process took already."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        until = int(used.ru_utime + used.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _signal(name: str) -> int:
    import signal

    return int(getattr(signal, name, 0))


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()
