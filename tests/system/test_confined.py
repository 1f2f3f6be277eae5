"""system/confined.py: whatever a function does in its child, the caller gets a result or one sentence, and the next
works.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from sfumato.errors import BusyError, CapacityError, InputError
from sfumato.system import confined

POOL = confined.ChildPool(nice=5)


@pytest.fixture(autouse=True)
def in_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The functions below are imported by a child that knows where they are."""
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    yield
    POOL.end()


def add(left: int, right: int) -> int:
    return left + right


def say(kind: str) -> None:
    if kind == "capacity":
        raise CapacityError("12 tokens are more than 8; ask for less")
    if kind == "secret":
        raise KeyError("a fault")
    raise BaseException("a panic")


def pid() -> int:
    print("what a library prints is no answer")
    return os.getpid()


def overflow() -> None:
    comparison = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

    def again(*_: object) -> int:
        numbers = (ctypes.c_int * 2)(2, 1)
        ctypes.CDLL(None).qsort(numbers, 2, 4, comparison(again))
        return 0

    sys.setrecursionlimit(10**6)
    again()


def fill(size: int) -> int:
    return len("a" * size)


def spin() -> None:
    while True:
        pass


def test_a_result_comes_back_and_the_child_stays() -> None:
    assert POOL.run(add, 2, 3, what="the sum") == 5
    assert POOL.run(pid, what="it") == POOL.run(pid, what="it") != os.getpid()


def test_errors_come_back_as_what_they_are() -> None:
    with pytest.raises(CapacityError, match=r"^12 tokens are more than 8; ask for less$"):
        POOL.run(say, "capacity", what="the text")
    with pytest.raises(InputError, match=r"^the text cannot be used: 'a fault'$"):
        POOL.run(say, "secret", what="the text")
    with pytest.raises(InputError, match=r"^the text cannot be used: a panic$"):
        POOL.run(say, "panic", what="the text")
    assert POOL.run(add, 1, 1, what="it") == 2


@pytest.mark.parametrize(
    ("attack", "arguments", "sentence"),
    [
        (overflow, (), "crash|memory"),
        (os.abort, (), "takes more than the 512 MiB of memory allowed; make it smaller"),
        (os._exit, (0,), "makes the library that reads it crash"),
        (fill, (1 << 34,), "takes more than the 512 MiB of memory allowed; make it smaller"),
        (spin, (), "takes longer than the 1 seconds allowed; make it simpler"),
    ],
)
def test_a_limit_ends_the_call_alone(
    attack: object, arguments: tuple[object, ...], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attack is spin:
        monkeypatch.setattr(confined, "SECONDS", 1)
    with pytest.raises(InputError, match=f"^the thing .*({sentence})"):
        POOL.run(attack, *arguments, what="the thing")  # type: ignore[arg-type]
    assert POOL.run(add, 1, 1, what="it") == 2


def test_a_machine_without_time_for_it_is_not_the_callers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "SECONDS", 0.1)
    with pytest.raises(BusyError, match=r"^the thing did not get 0.1 seconds of the processor in 1.2; send .* later$"):
        POOL.run(time.sleep, 60, what="the thing")


def test_how_long_a_call_is_waited_for() -> None:
    waits = {0.1: 1.2, 1: 12, confined.SECONDS: 60, 10: 60, 30: 120}
    assert {seconds: confined.patience(seconds) for seconds in waits} == pytest.approx(waits)


def test_one_that_nobody_waits_for_is_given_up() -> None:
    began = time.monotonic()
    held = confined.is_cancelled.set(lambda: time.monotonic() > began + 0.3)
    try:
        with pytest.raises(confined.Cancelled):
            POOL.run(time.sleep, 60, what="the thing")
    finally:
        confined.is_cancelled.reset(held)
    assert time.monotonic() < began + 5


def test_many_threads_share_few_children() -> None:
    pids: list[int] = []
    threads = [threading.Thread(target=lambda: pids.append(POOL.run(pid, what="it"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 8 and len(set(pids)) <= confined.CHILDREN


def test_a_child_ends_with_its_parent() -> None:
    child = POOL.run(pid, what="it")
    with POOL.child("it") as one:
        assert one.process is not None and one.process.stdin is not None
        one.process.stdin.close()
        assert one.process.wait(5) == 0 and one.process.pid == child


def test_pools_do_not_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    other = confined.ChildPool()
    with POOL.child("it"), POOL.child("it"):
        assert other.run(add, 1, 2, what="it") == 3
        monkeypatch.setattr(confined, "SECONDS", 0.05)
        with pytest.raises(BusyError, match="it had to wait too long for others like it"):
            POOL.run(add, 1, 2, what="it")
    other.end()


@pytest.mark.skipif(not hasattr(os, "nice"), reason="processes have no order here")
def test_children_step_aside() -> None:
    assert POOL.run(os.nice, 0, what="it") >= 5


def test_much_goes_both_ways_and_a_child_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "ä" * 3_000_000
    assert POOL.run(str, text, what="it") == text
    with POOL.child("the thing") as child:
        os.kill(child.start().pid, signal.SIGSTOP)
        monkeypatch.setattr(confined, "SECONDS", 0.1)
        with pytest.raises(BusyError, match=r"the thing did not get 0.1 seconds of the processor"):
            child.run(len, text)
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    assert POOL.run(add, 1, 1, what="it") == 2
