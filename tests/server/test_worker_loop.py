"""server/worker/loop.py and messages.py: what one job cannot do to the others, and what a loop without work does."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import pickle
import pkgutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, cast

import pytest
import scripted_worker
from scripted_worker import (
    Open,
    Script,
    Strange,
    events,
    job,
    running,
    state_of,
)

import sfumato
from sfumato.errors import CapacityError, InputError, SfumatoError, WorkerError
from sfumato.events import Done
from sfumato.server.worker import loop
from sfumato.server.worker.messages import packed, unpacked

opened, impatient = scripted_worker.opened, scripted_worker.impatient
count_from_0 = scripted_worker.count_from_0


@pytest.mark.parametrize(
    ("wishes", "kind", "part"),
    [
        ({"begin": "refuse"}, CapacityError, "900 tokens"),
        ({"turn": "fail"}, CapacityError, "the cache is full"),
        ({"begin": "break"}, SfumatoError, "ValueError < scripted_worker.py:"),
        ({"turn": "break"}, SfumatoError, "(KeyError)"),
        ({"begin": "panic"}, SfumatoError, "Panic < scripted_worker.py:"),
        ({"begin": "exit"}, SfumatoError, "SystemExit < scripted_worker.py:"),
        ({"begin": "strange"}, InputError, "the prompt is strange"),
        ({"turn": "strange"}, InputError, "the prompt is strange"),
        ({"turn": "unsendable"}, SfumatoError, "TypeError"),
        ({"turn": "unreadable"}, SfumatoError, "ValueError"),
    ],
)
def test_an_error_of_one_job_is_its_own_and_tells_no_prompt(
    opened: Open, capfd: pytest.CaptureFixture[str], wishes: dict[str, Any], kind: type[Exception], part: str
) -> None:
    async def test() -> None:
        async with opened() as one:
            with pytest.raises(kind) as refused:
                await events(one, job(**wishes))
            assert type(refused.value) is kind and part in str(refused.value) and "secret" not in str(refused.value)
            assert await state_of(one) and one.stats().restarts == 0

    running(test())
    log = capfd.readouterr().err
    assert "secret" not in log and log.count("a request failed") == (kind is SfumatoError)


def test_a_small_job_does_not_wait_behind_one_that_is_slow_to_prepare(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            slow = asyncio.create_task(events(one, job(begin="wait")))
            await asyncio.sleep(0)
            assert isinstance((await events(one, job(begin="release")))[-1], Done)
            assert isinstance((await slow)[-1], Done)

    running(test())


def test_a_job_cancelled_while_it_is_prepared_does_not_stay(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            task = asyncio.create_task(events(one, job(begin="wait", turn="forever")))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            await events(one, job(begin="release"))
            is_gone, until = False, time.monotonic() + 60
            while not is_gone and time.monotonic() < until:  # as soon as it has been prepared, unless it never was
                now = await state_of(one)
                is_gone = "r0" not in now["active"] and one.stats().queue == 0
            assert is_gone

    running(test())


class Slept(BaseException):
    """Ends a loop that has none."""


def test_freed_memory_goes_back_now_and_then_and_once_when_there_is_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float | None] = []

    class News:
        def clear(self) -> None: ...

        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            if timeout is None:
                raise Slept
            return False

    trimmed: list[int] = []
    one = loop.WorkerLoop(cast(Connection, SimpleNamespace(send_bytes=lambda data: None)))
    script = Script({"r1": {"turn": "forever"}})
    one.jobs, one.news = script, cast(threading.Event, News())
    monkeypatch.setattr(loop, "TRIM_SECONDS", 0.3)

    def trim() -> None:
        trimmed.append(len(waits))
        if len(trimmed) == 2:
            script.cancel("r1")  # from here on it is idle

    monkeypatch.setattr(loop, "trim", trim)
    with pytest.raises(Slept):
        one.serve()
    assert trimmed == [0, 0, 1]  # twice at work, and once after a while without any
    assert waits == [0.3, None]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_a_heap_with_holes_is_given_back() -> None:
    script = """
import os
from sfumato.server.worker import loop
held = [bytearray(100_000) for _ in range(2000)]  # below the size for which malloc asks the system
del held[::2], held[:-1]
before = loop.memory_bytes()
loop.trim()
print(before - loop.memory_bytes())
"""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) > 100_000_000


def test_every_error_of_ours_crosses_the_border() -> None:
    """As itself where `errors` has it, else as the nearest that it has, words and option too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that others wrote
        for name in (name for _, name, _ in pkgutil.walk_packages(sfumato.__path__, "sfumato.")):
            if "triton" not in name:
                with suppress(ImportError, OSError):
                    importlib.import_module(name)
    kinds, level = {SfumatoError}, [SfumatoError]
    while level := [kind for above in level for kind in above.__subclasses__()]:
        kinds |= set(level)
    assert len(kinds) >= 9
    for kind in kinds - {MuteInput}:
        error = kind.__new__(kind)
        Exception.__init__(error, "the value 7 is above 5; give less")
        arrived = unpacked(packed(error))
        assert isinstance(error, type(arrived)) and type(arrived).__module__ == "sfumato.errors"
        assert str(arrived) == str(error)
    arrived = unpacked(packed(Strange("steps is 9; give less", 7, option="steps")))
    assert type(arrived) is InputError and arrived.option == "steps"


class Mute(Exception):
    """Says nothing, and can be neither pickled nor made anew."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __str__(self) -> str:
        raise RuntimeError("secret")

    def __reduce__(self) -> Any:
        raise RuntimeError("secret")


class MuteInput(Mute, InputError):
    """The same, of our family."""


def raised(work: Callable[[], object]) -> BaseException:
    """What the work raises."""
    try:
        work()
    except BaseException as error:
        return error
    raise AssertionError("it raised nothing")


def errors_of_others() -> list[BaseException]:
    """As they really come from the libraries, and some of the worst that one could make."""
    import jinja2
    import pydantic
    import tokenizers
    import torch

    texts = pydantic.TypeAdapter(list[int])
    errors = [
        raised(lambda: jinja2.Environment().from_string("{% secret")),
        raised(lambda: jinja2.Environment(undefined=jinja2.StrictUndefined).from_string("{{ secret }}").render()),
        raised(lambda: tokenizers.Tokenizer.from_str("secret")),
        raised(lambda: torch.ones(2) @ torch.ones(3)),
        raised(lambda: texts.validate_python("secret")),
        raised(lambda: json.loads("secret")),
        raised(lambda: b"\xffsecret".decode()),
        raised(lambda: json.dumps({"secret": threading.Lock()})),
        raised(lambda: ExceptionGroup("secret", [Mute(1, 2)]).subgroup(Mute).nothing),  # type: ignore[union-attr]
        torch.OutOfMemoryError("secret"),
        Mute(1, 2),
        MuteInput(1, 2),
        RecursionError("secret"),
        MemoryError("secret"),
        KeyboardInterrupt("secret"),
        asyncio.CancelledError("secret"),
    ]
    with suppress(ImportError):
        import llguidance

        errors.append(raised(lambda: llguidance.LLTokenizer("secret")))
    return errors


def test_every_error_of_others_crosses_the_border_and_tells_no_prompt() -> None:
    for error in errors_of_others():
        arrived = unpacked(packed(error))
        assert isinstance(arrived, SfumatoError) and type(arrived).__module__ == "sfumato.errors", error
        assert "secret" not in str(arrived) and str(arrived), type(error)
        assert pickle.loads(pickle.dumps(arrived)).args == arrived.args


def test_an_error_brings_its_words_and_nothing_else() -> None:
    error = CapacityError("the cache is full", option="max_tokens", item="a")
    error.held = threading.Lock()  # type: ignore[attr-defined]
    arrived = unpacked(packed(error))
    assert type(arrived) is CapacityError and str(arrived) == "the cache is full" and arrived.option == "max_tokens"
    assert arrived.item == "a"
    assert not hasattr(arrived, "held")
    assert unpacked(packed(InputError("steps is wrong", option=cast(Any, threading.Lock())))).option is None  # type: ignore


def test_after_jobs_that_fail_in_any_way_the_same_process_goes_on(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            before = (await state_of(one))["pid"]
            for _ in range(4):  # more than there are threads
                for how in ("panic", "exit", "strange", "break"):
                    with pytest.raises(SfumatoError):
                        await events(one, job(begin=how))
                for how in ("strange", "unsendable", "unreadable", "break"):
                    with pytest.raises(SfumatoError):
                        await events(one, job(turn=how))
            assert (await state_of(one))["pid"] == before and one.stats().restarts == 0

    running(test())


def test_a_job_that_is_never_prepared_is_given_up_and_its_thread_replaced(opened: Open) -> None:
    async def test() -> None:
        async with opened(prepare_seconds=0.3) as one:
            before = (await state_of(one))["pid"]
            for _ in range(2):  # both threads each time
                stuck = [asyncio.create_task(events(one, job(begin="never"))) for _ in range(2)]
                await asyncio.sleep(0.1)
                start = time.monotonic()
                for task in stuck:
                    with pytest.raises(
                        InputError, match=r"was not prepared within 0.3 seconds; make its texts smaller"
                    ):
                        await task
                assert time.monotonic() - start < 20
                assert (await state_of(one))["pid"] == before
            assert one.stats().restarts == 0

    running(test())


def test_a_process_that_has_lost_too_many_threads_is_replaced(opened: Open, impatient: None) -> None:
    async def test() -> None:
        async with opened(prepare_seconds=0.2, most_stuck=1) as one:
            before = (await state_of(one))["pid"]
            for _ in range(2):
                with pytest.raises((InputError, WorkerError)):
                    await events(one, job(begin="never"))
            while not one.stats().restarts:
                await asyncio.sleep(0.01)
            assert (await state_of(one))["pid"] != before

    running(test())


def test_who_waits_to_be_prepared_shows_in_the_figures_and_is_no_silence(opened: Open) -> None:
    async def test() -> None:
        async with opened(silence=1.5) as one:
            stuck = [asyncio.create_task(events(one, job(begin="never"))) for _ in range(3)]
            await asyncio.sleep(2.5)
            assert 1.5 < one.stats().stalled < 4 and one.stats().queue == 3
            assert one.is_ready() and one.stats().restarts == 0
            for task in stuck:
                task.cancel()
            await asyncio.gather(*stuck, return_exceptions=True)

    running(test())


def test_what_is_slow_to_prepare_or_large_holds_up_nothing_small(opened: Open) -> None:
    async def test() -> None:
        async with opened() as one:
            await state_of(one)
            slow = [asyncio.create_task(events(one, job(begin="never", slow=True))) for _ in range(4)]
            large = asyncio.create_task(events(one, job(prompt="x" * 100_000)))
            await asyncio.sleep(0.2)
            start = time.monotonic()
            for _ in range(10):
                await state_of(one)
            assert time.monotonic() - start < 10 and not large.done()  # it waits behind the slow ones
            for task in (*slow, large):
                task.cancel()
            await asyncio.gather(*slow, large, return_exceptions=True)

    running(test())
