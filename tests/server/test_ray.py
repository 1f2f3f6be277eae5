"""server/cluster/: which replica a job goes to, what becomes of it when that one ends, and two of them under load."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sfumato import cli
from sfumato.engine.limits import BatchLimits
from sfumato.errors import BusyError, CapacityError, CheckpointError, InputError, SfumatoError, WorkerError
from sfumato.events import Commit, Done, Draft, Event, Usage
from sfumato.model.loaded import AdapterSize
from sfumato.options import LoadOptions, Options
from sfumato.server.backend import Job, ModelCard, Result, Stats
from sfumato.server.cluster.plan import ClusterPlan
from sfumato.templates.requests import (
    Chat,
    Complete,
    Decide,
    Edit,
    Fill,
    Infill,
    LoadAdapter,
    Query,
    QueryFor,
    UnloadAdapter,
)
from sfumato.templates.slots import Slot

pytest.importorskip("ray", reason="needs ray[serve]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own use of pydantic, which is no business of ours
    from ray.exceptions import ActorDiedError
    from ray.serve.exceptions import BackPressureError

    from sfumato.server.cluster import replicas, routing
    from sfumato.server.cluster.backend import RayBackend
    from sfumato.server.cluster.backend import _sum as sum_of
    from sfumato.server.cluster.routing import ReplicaRouter

CARD = ModelCard("scripted", 32, 512, 100, True, True, 12, "float32", "reference")


def job(seed: int | None = 0, drafts: bool = False, prompt: str = "") -> Job:
    return Job("r1", Complete(prompt, Options(seed=seed, drafts=drafts)))


# ---- which replica ---------------------------------------------------------------------------------------------------


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, QUESTION = message("system", "You are brief."), message("user", "What is a canvas?")
LATER = [message("assistant", "Text."), message("user", "And a step?")]


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (Chat([SYSTEM, QUESTION]), Chat([SYSTEM, QUESTION, *LATER]), True),
        (Chat([SYSTEM, QUESTION]), Decide([SYSTEM, QUESTION], {}), True),
        (Chat([SYSTEM, QUESTION]), Chat([QUESTION]), False),
        (Chat([SYSTEM, QUESTION]), Chat([SYSTEM, LATER[1]]), False),
        (Chat([SYSTEM]), Chat([SYSTEM, LATER[0]]), True),
        (Chat([SYSTEM, QUESTION]), Chat([SYSTEM, QUESTION], options=Options(adapter="a")), False),
        (Complete("x" * 512 + "a"), Complete("x" * 512 + "b"), True),
        (Complete("x" * 511 + "a"), Complete("x" * 511 + "b"), False),
        (Complete([*range(512), 1]), Complete([*range(512), 2]), True),
        (Infill("def f():", "a"), Infill("def f():", "b"), True),
        (Infill("def f():", ""), Complete("def f():"), True),
        (Edit("a"), Edit("b"), False),
        (Fill(["a", Slot("b")]), Fill(["a", Slot("c")]), False),
        (Fill(["a"], "p"), Fill(["b"], "p"), True),
    ],
)
def test_jobs_that_begin_alike_have_one_key(one: Query, other: Query, is_same: bool) -> None:
    assert (routing.key_of(one) == routing.key_of(other)) is is_same


def test_a_job_that_begins_with_nothing_has_no_key() -> None:
    assert routing.key_of(Complete("")) == routing.key_of(Infill("", "b")) == ""


@dataclass(frozen=True)
class Silent(QueryFor[str]):
    """A further kind of query, which does not say what it begins with."""

    text: str
    options: Options = Options()  # noqa: RUF009 - frozen


class Summary(Silent):
    """One that does."""

    @property
    def beginning(self) -> str:
        return self.text


def test_a_further_kind_of_query_has_the_key_of_what_it_begins_with() -> None:
    assert routing.key_of(Silent("a text")) == ""
    assert routing.key_of(Summary("a text")) == routing.key_of(Complete("a text")) != ""


def test_homes_are_spread_and_stay_when_others_come_and_go() -> None:
    keys, names = [str(number) for number in range(3000)], ["a", "b", "c"]
    before = {key: routing.home(key, names) for key in keys}
    assert all(900 < count < 1100 for count in Counter(before.values()).values())
    assert all(before[key] == routing.home(key, names[::-1]) for key in keys)
    grown = {key: routing.home(key, [*names, "d"]) for key in keys}
    moved = [key for key in keys if grown[key] != before[key]]
    assert 650 < len(moved) < 850 and {grown[key] for key in moved} == {"d"}


def test_a_home_comes_first_unless_it_has_more_to_do_than_another_by_over_the_bound() -> None:
    names = ["a", "b", "c", "d"]
    at = routing.home("key", names)
    first, two = routing.ranks("key", dict.fromkeys(names, 5) | {at: 13}, bound=8)
    assert first == [at] and len(set(two)) == 2 and set(two) <= set(names)
    [two] = routing.ranks("key", dict.fromkeys(names, 5) | {at: 14}, bound=8)
    assert len(set(two)) == 2
    drawn = [routing.ranks("", dict.fromkeys(names, 0), bound=8) for _ in range(200)]
    assert {name for [pair] in drawn for name in pair} == set(names)
    assert routing.ranks("key", {"a": 50}, bound=8) == [["a"], ["a"]]


def chosen(names: str, queues: dict[str, int], what: Job, avoid: str | None = None) -> list[list[str]]:
    """What the router answers, by names."""
    there = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]
    cache = SimpleNamespace(get=lambda replica: queues.get(replica.unique_id))
    request = SimpleNamespace(args=(what, avoid), routing_context=SimpleNamespace(should_backoff=False))
    router: Any = SimpleNamespace(bound=2, replica_queue_len_cache=cache)
    groups = asyncio.run(ReplicaRouter.choose_replicas(router, cast(Any, there), cast(Any, request)))
    assert request.routing_context.should_backoff
    return [[one.replica_id.unique_id for one in group] for group in groups]


def test_the_router_takes_the_home_but_not_the_replica_to_avoid_while_there_is_another() -> None:
    what = job(prompt="Once upon a time")
    at = routing.home(routing.key_of(what.query), ["a", "b"])
    other = "b" if at == "a" else "a"
    assert chosen("ab", {}, what)[0] == [at]
    assert [sorted(group) for group in chosen("ab", {at: 3}, what)] == [["a", "b"]]
    assert chosen("ab", {other: 9}, what, avoid=at) == [[other], [other]]
    assert chosen(at, {}, what, avoid=at) == [[at], [at]]
    assert chosen("", {}, what) == []


# ---- a replica that ends under a job ---------------------------------------------------------------------------------


class Response:
    """What Ray Serve gives for a streaming call; the last of the script may be an error."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.is_cancelled = script, False

    async def __aiter__(self) -> AsyncIterator[Any]:
        for one in self.script:
            if isinstance(one, Raised):
                raise one.error
            yield one

    def cancel(self) -> None:
        self.is_cancelled = True


class Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error


class Handle:
    """Ray Serve's handle of the replicas, by a script: one list for each call."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.responses = [Response(script) for script in scripts]
        self.calls: list[tuple[Job, str | None]] = []

    def options(self, method_name: str, stream: bool) -> Handle:
        assert (method_name, stream) == ("run", True)
        return self

    def remote(self, job: Job, avoid: str | None) -> Response:
        self.calls.append((job, avoid))
        return self.responses[len(self.calls) - 1]


def over(*scripts: list[Any]) -> RayBackend:
    backend = RayBackend(ClusterPlan(LoadOptions(), BatchLimits(rows=4, queue=8), 2), drain=1.0)
    backend.handle, backend._is_open = Handle(*scripts), True
    return backend


def outcome(backend: RayBackend, what: Job) -> tuple[list[Event | Result], Exception | None]:
    """The events that a client gets, and the error that ends them."""

    async def collect() -> tuple[list[Event | Result], Exception | None]:
        events: list[Event | Result] = []
        try:
            async for one in backend.run(what):
                events.append(one)
        except Exception as error:
            return events, error
        return events, None

    result = asyncio.run(collect())
    assert all(response.is_cancelled for response in backend.handle.responses[: len(backend.handle.calls)])
    assert backend._running == backend._waiting == 0
    return result


ONE, TWO, END = Commit(0, 0, 3, [1, 2]), Commit(0, 1, 3, [3]), Done(0, "stop", [1, 2, 3], Usage())
SKETCH = Draft(0, 0, 1, [9, 9], [0.1, 0.2], [True, False])
ENDED = WorkerError("the engine's worker ended (signal 9) under this request; send the request again")
DIED = Raised(ActorDiedError())


@pytest.mark.parametrize("death", [[DIED], ["a", DIED], ["a", ENDED], ["a"]])
def test_a_job_whose_replica_ends_before_an_event_is_sent_once_more(
    death: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    backend = over(death, ["b", ONE, TWO, END])
    assert outcome(backend, job()) == ([ONE, TWO, END], None)
    assert [avoid for _, avoid in backend.handle.calls] == [None, "a" if "a" in death else None]
    assert caplog.text.count("r1 is sent again: replica") == 1


@pytest.mark.parametrize("death", [DIED, ENDED])
def test_events_that_a_client_has_are_not_sent_again(death: Any) -> None:
    backend = over(["a", SKETCH, ONE, death], ["b", SKETCH, ONE, TWO, END])
    assert outcome(backend, job(drafts=True)) == ([SKETCH, ONE, TWO, END], None)


@pytest.mark.parametrize("again", [[TWO, END], [SKETCH, ONE, END], [END]])
def test_a_second_run_that_differs_is_an_error_and_no_mixture(again: list[Any]) -> None:
    events, error = outcome(over(["a", ONE, DIED], ["b", *again]), job())
    assert events == [ONE] and isinstance(error, WorkerError) and "goes on differently; send it again" in str(error)


def test_there_is_no_third_try() -> None:
    backend = over(["a", ONE, DIED], ["b", ONE, ENDED], ["c", ONE, TWO, END])
    events, error = outcome(backend, job())
    assert events == [ONE] and len(backend.handle.calls) == 2 and isinstance(error, WorkerError)
    assert str(error) == (
        "replica b: the engine's worker ended (signal 9) under this request, and before that another one; "
        "send the request again"
    )


def test_a_seed_is_chosen_before_the_first_try() -> None:
    backend = over([DIED], ["b", END])
    outcome(backend, job(seed=None))
    (first, _), (second, _) = backend.handle.calls
    assert first == second and isinstance(first.query.options.seed, int)


def test_a_further_kind_of_query_is_sent_and_gets_its_seed() -> None:
    backend = over([DIED], ["b", END])
    outcome(backend, Job("r1", cast(Query, Summary("a text"))))
    (first, _), (second, _) = backend.handle.calls
    seed = first.query.options.seed
    assert isinstance(seed, int) and first.query == second.query == Summary("a text", Options(seed=seed))


@pytest.mark.parametrize(
    ("script", "kind", "part"),
    [
        (["a", CapacityError("the prompt has 900 tokens")], CapacityError, "900 tokens"),
        (["a", BusyError("the queue is full")], BusyError, "the queue is full"),
        ([Raised(BackPressureError(8, 8))], BusyError, "8 requests are waiting"),
        (["a", SfumatoError("a fault")], SfumatoError, "a fault"),
    ],
)
def test_errors_that_another_replica_would_not_cure_are_not_tried_again(
    script: list[Any], kind: type, part: str
) -> None:
    backend = over(script)
    events, error = outcome(backend, job())
    assert events == [] and type(error) is kind and part in str(error) and len(backend.handle.calls) == 1


def test_closing_the_iterator_cancels_the_call() -> None:
    async def test() -> None:
        backend = over(["a", ONE, TWO, END])
        events: Any = backend.run(job())
        assert await anext(events) == ONE
        await events.aclose()
        assert backend.handle.responses[0].is_cancelled

    asyncio.run(test())


def test_counters_only_grow_and_what_is_at_the_moment_is_of_those_that_are_there() -> None:
    backend = over()
    backend._note([("a", CARD, True, Stats(rows=1, rows_max=4, steps=10, tokens_per_pass=4.0, restarts=1))])
    backend._note([(name, CARD, True, Stats(rows=2, rows_max=4, steps=20, tokens_per_pass=2.0)) for name in "ab"])
    assert backend.stats() == Stats(rows=4, rows_max=8, steps=40, tokens_per_pass=2.0)
    backend._note([("b", CARD, False, Stats(rows=1, rows_max=4, steps=25))])
    assert backend.stats() == Stats(rows=1, rows_max=4, steps=45) and not backend.is_ready()
    assert asyncio.run(backend.card()) == CARD


class Broadcast:
    """Ray Serve's handle, of two replicas whose adapters are loaded as `Replica.set_adapters` does it."""

    def __init__(self) -> None:
        self.loaded: list[dict[str, str]] = [{}, {}]

    def broadcast(self, method: str, *arguments: Any) -> Any:
        async def results(timeout_s: float, return_exceptions: bool) -> list[Any]:
            if method == "figures":
                return [(str(n), self._card(n), True, Stats()) for n in range(len(self.loaded))]
            (folders,) = arguments
            if "bad" in folders.values():
                return [CheckpointError("bad is no adapter"), *(self._card(n) for n in range(1, len(self.loaded)))]
            self.loaded = [dict(folders) for _ in self.loaded]
            return [self._card(n) for n in range(len(self.loaded))]

        return SimpleNamespace(results_async=results)

    def _card(self, number: int) -> ModelCard:
        return replace(CARD, adapters=tuple(AdapterSize(name, 4, 8) for name in self.loaded[number]))


def test_adapters_are_loaded_in_every_replica_and_in_those_that_come_later() -> None:
    async def test() -> None:
        backend = over()
        handle = backend.handle = Broadcast()
        card = await backend.change_adapters(Job("1", LoadAdapter("a", "x")))
        assert [one.name for one in card.adapters] == ["a"] and handle.loaded == [{"a": "x"}] * 2
        with pytest.raises(CheckpointError, match="bad is no adapter"):
            await backend.change_adapters(Job("2", LoadAdapter("b", "bad")))
        with pytest.raises(InputError, match="'a' is loaded already"):
            await backend.change_adapters(Job("3", LoadAdapter("a", "y")))
        handle.loaded.append({})  # a third replica
        await backend._look()
        assert handle.loaded == [{"a": "x"}] * 3 and await backend.card() == card
        assert (await backend.change_adapters(Job("4", UnloadAdapter("a")))).adapters == ()
        assert handle.loaded == [{}] * 3

    asyncio.run(test())
    assert sum_of([Stats(adapters=2, adapter_bytes=5), Stats(adapters=2, adapter_bytes=5)]).adapters == 2


@pytest.mark.parametrize("error", [InputError("there is no model 'x'; give a folder"), SfumatoError("two\nlines")])
def test_why_a_model_cannot_be_loaded_survives_rays_report_of_it(error: SfumatoError) -> None:
    line = replicas.marked(error)
    report = f"The deployment failed to start.\n  raise RuntimeError(marked(error))\nRuntimeError: {line}\n"
    arrived = replicas.error_in(report)
    assert type(arrived) is type(error) and str(arrived) == str(error).replace("\n", " ")
    assert "Ray cannot start the model: no GPU" in str(replicas.error_in("One.\n  no GPU\n"))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--max-replicas 2", "max-replicas is 2 without --ray"),
        ("--ray-address auto", "ray-address is auto without --ray"),
        ("--ray --replicas 3 --max-replicas 2", "max-replicas is 2, below replicas 3; give at least 3"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *arguments.split()]) == 2
    assert part in capsys.readouterr().err


# ---- two replicas of nano --------------------------------------------------------------------------------------------

psutil = pytest.importorskip("psutil")
REQUESTS = 16


class Serving:
    """`sfumato serve --ray` in a process of its own."""

    def __init__(self, log: Path) -> None:
        self.log = log
        arguments = "serve --ray --replicas 2 -m nano --ops reference --dtype float32 --port 0"
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from sfumato.cli import main; raise SystemExit(main())", *arguments.split()],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self.address = ""

    def wait(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert match, line + self.log.read_text()
        self.address = match[0]

    def family(self) -> list[Any]:
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def actors(self) -> list[Any]:
        return [one for one in self.family() if " ".join(one.cmdline()).startswith("ray::ServeReplica")]

    def workers(self) -> list[Any]:
        return [
            child
            for actor in self.actors()
            for child in actor.children()
            if "multiprocessing.spawn" in " ".join(child.cmdline())
        ]

    def figure(self, name: str) -> float:
        with urllib.request.urlopen(self.address + "/metrics", timeout=30) as answer:
            match = re.search(rf"^sfumato_{name} (\S+)$", answer.read().decode(), re.MULTILINE)
        assert match
        return float(match[1])

    def until(self, is_so: Callable[[], bool]) -> None:
        pause = threading.Event()
        for _ in range(600):
            if is_so():
                return
            pause.wait(0.1)
        raise AssertionError(self.log.read_text())

    def ask(self, number: int, id: str, has_begun: threading.Event) -> str:
        """One chat of two canvases; every other one is a stream."""
        is_stream = number % 2 == 0
        body: dict[str, Any] = {"messages": [message("user", f"Number {number}")], "max_tokens": 150, "seed": number}
        headers = {"content-type": "application/json", "x-request-id": id}
        data = json.dumps(body | {"stream": is_stream}).encode()
        request = urllib.request.Request(self.address + "/v1/chat/completions", data, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert answer.status == 200
            if not is_stream:
                return str(json.load(answer)["choices"][0]["message"]["content"])
            text, lines = "", []
            for line in answer:
                lines.append(line)
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                    if text:
                        has_begun.set()
            assert lines[-2] == b"data: [DONE]\n", lines[-3:]
            return text

    def leave(self) -> None:
        """Go away from a long answer when it has a row and its first words."""
        body = {"messages": [QUESTION], "stream": True, "max_tokens": 4000}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.address + "/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            while b'"content":"' not in (line := answer.readline()) or b'"content":""' in line:
                assert line
            self.until(lambda: self.figure("rows") == 1)

    def load(self, round: str, disturb: Callable[[], None] = lambda: None) -> list[str]:
        """The texts of all requests at once; when the first has begun, something happens."""
        has_begun = threading.Event()
        with ThreadPoolExecutor(REQUESTS) as pool:
            answers = [pool.submit(self.ask, number, f"{round}-{number}", has_begun) for number in range(REQUESTS)]
            assert has_begun.wait(60)
            disturb()
            return [one.result() for one in answers]

    def end(self) -> None:
        """Ctrl-C: it leaves no process and no traceback."""
        family = self.family()
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(30) == 0
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert "Traceback" not in self.log.read_text()

    def again(self, round: str) -> Counter[str]:
        """How often each request was sent again."""
        return Counter(re.findall(rf" ({round}-\d+) is sent again: ", self.log.read_text()))


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    one = Serving(tmp_path / "log")
    try:
        one.wait()
        yield one
    finally:
        family = one.family() if one.process.poll() is None else []
        one.process.kill()
        one.process.communicate()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_every_request_is_answered_while_a_replica_is_killed(serving: Serving) -> None:
    serving.until(lambda: serving.figure("rows_max") == 64)
    texts = serving.load("calm")
    assert all(texts) and len(set(texts)) == REQUESTS and not serving.again("calm")
    assert serving.load("replica", serving.actors()[0].kill) == texts
    counts = serving.again("replica")
    assert counts and set(counts.values()) == {1}
    serving.end()


@pytest.mark.slow  # a minute: both come back
def test_every_request_is_answered_while_a_worker_and_then_a_replica_is_killed(serving: Serving) -> None:
    serving.until(lambda: serving.figure("rows_max") == 64)
    texts = serving.load("calm")
    assert all(texts) and len(set(texts)) == REQUESTS and not serving.again("calm")

    tokens = sum(map(int, re.findall(r" calm-\d+ .* tokens=(\d+) ", serving.log.read_text())))
    serving.leave()
    serving.until(lambda: serving.figure("rows") == 0)
    assert serving.figure("tokens_total") < tokens + 1000  # of 4000

    assert serving.load("worker", lambda: serving.workers()[0].kill()) == texts
    serving.until(lambda: serving.figure("worker_restarts_total") == 1 and len(serving.workers()) == 2)
    serving.until(lambda: serving.figure("rows_max") == 64)

    dead = serving.actors()[0]
    assert serving.load("replica", dead.kill) == texts
    serving.until(lambda: len(serving.actors()) == 2 and dead not in serving.actors())
    serving.until(lambda: serving.figure("rows_max") == 64)  # another one has taken its place

    for round in ("worker", "replica"):
        counts = serving.again(round)
        print(f"{round} killed: {REQUESTS} of {REQUESTS} answered, {len(counts)} sent again")
        assert counts and set(counts.values()) == {1}

    serving.end()
