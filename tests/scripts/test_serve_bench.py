"""benchmarks/client.py, serve.py and soak.py against a server of a few lines: what they read, count and conclude."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import client, hostile, results, serve, serve_page, soak
from benchmarks.client import Connection, Events, Failed, Server
from benchmarks.soak import CHAT, Accounts, Ask, Entry
from sfumato.tasks import sudoku

Request = tuple[str, str, dict[str, str], bytes]
"""Method, path, headers, body."""


# ---- a server of a few lines ----------------------------------------------------------------------------------------


def plain(body: Any, request: str, status: int = 200) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\nX-Request-ID: {request}\r\n\r\n".encode() + data


def stream(events: list[Any], request: str, piece: int = 7) -> bytes:
    """In chunks that respect nothing."""
    lines = "".join(f"data: {e if isinstance(e, str) else json.dumps(e)}\r\n\r\n" for e in events)
    data = (": keep-alive\r\n\r\n" + lines).encode()
    pieces = [data[at : at + piece] for at in range(0, len(data), piece)]
    head = (
        f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\nX-Request-ID: {request}"
    )
    return f"{head}\r\n\r\n".encode() + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in [*pieces, b""])


def spoken(text: str, number: int, count: int = 1) -> list[Any]:
    actual: list[Any] = []
    for index in range(count):
        actual.append({"id": f"c{number}", "choices": [{"index": index, "delta": {"role": "assistant"}}]})
        actual.append({"id": f"c{number}", "choices": [{"index": index, "delta": {"content": text}}]})
        actual.append({"id": f"c{number}", "choices": [{"index": index, "delta": {}, "finish_reason": "stop"}]})
    return [*actual, {"id": f"c{number}", "choices": [], "usage": {"completion_tokens": 81}}, "[DONE]"]


Reply = Callable[[Request, int], bytes | None]
"""The bytes of an answer to the request of this number; None: it never comes."""


def visit(reply: Reply, what: Callable[[str], Awaitable[None]]) -> list[Request]:
    """Run `what(url)` beside that server; what the server was asked."""
    requests: list[Request] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines if line)
                body = await reader.readexactly(int(headers["content-length"]))
                method, path, _ = first.split()
                requests.append((method, path, headers, body))
                answer = reply(requests[-1], len(requests))
                if answer is None:
                    await reader.read()
                    return
                writer.write(answer)
                if answer.endswith(b"CUT"):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            await asyncio.wait_for(what(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), 30)

    asyncio.run(run())
    return requests


def described(request: Request) -> Any:
    return json.loads(request[3])


def sound(request: Request, number: int) -> bytes:
    """As the contract has it: always solves the puzzle."""
    _, path, headers, body = request
    name = headers.get("x-request-id", "")
    if path == "/v1/models":
        return plain({"data": [{"id": "nano", "canvas_length": 82}]}, name)
    if path == "/metrics":
        return plain(b"sfumato_rows_max 32\nsfumato_rows 0\n", name)
    if path == "/ready":
        return plain({}, name)
    body_in = json.loads(body)
    actual = re.search(r"\d{81}", json.dumps(body_in))
    text = (actual and sudoku.solve(actual[0])) or "none"
    if body_in.get("stream"):
        return stream(spoken(text, number, body_in.get("n", 1)), name)
    if "messages" in body_in:
        choices = [{"message": {"content": text}, "finish_reason": "stop"}] * body_in.get("n", 1)
        return plain({"id": f"c{number}", "choices": choices}, name)
    return plain({"id": f"c{number}", "text": text}, name)


# ---- the client -----------------------------------------------------------------------------------------------------


def test_percentile_is_a_value_that_was_measured() -> None:
    values = list(range(1, 101))
    assert [client.percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0, 0.0)] == [50, 95, 99, 100, 1]
    assert client.percentile([3.0], 0.99) == 3.0 and client.percentile([2, 1], 0.5) == 1
    assert client.percentiles([]) == {"p50": None, "p95": None, "p99": None}


@pytest.mark.parametrize("piece", [1, 2, 3, 1000])
def test_events_come_in_any_pieces(piece: int) -> None:
    data = ': c\n\ndata: {"a": "é"}\r\n\r\ndata: one\ndata:two\n\nevent: x\ndata: [DONE]\n\ndata: half'.encode()
    events, actual = Events(), list[str]()
    for at in range(0, len(data), piece):
        actual += events.feed(data[at : at + piece])
    assert actual == ['{"a": "é"}', "one\ntwo", "[DONE]"]


def test_one_connection_carries_plain_answers_and_streams() -> None:
    async def what(url: str) -> None:
        connection, requests = Connection(url, "secret"), list[Any]()
        answer = await connection.ask("POST", CHAT, {"stream": True, "n": 2}, "a-1", requests.append)
        assert answer.status == 200 and answer.is_stream and answer.headers["x-request-id"] == "a-1"
        assert [e for _, e in answer.events] == requests and requests[-1] == client.END and answer.text() == "nonenone"
        assert answer.first_seconds is not None and 0 < answer.first_seconds <= answer.seconds
        assert answer.usage() == {"completion_tokens": 81} and answer.error() is None
        models = await connection.ask("GET", "/v1/models")
        assert models.json()["data"][0]["id"] == "nano" and models.first_seconds is None
        assert await client.metric(url, "sfumato_rows") == 0
        assert await client.until_idle(url) is not None
        connection.close()

    requests = visit(sound, what)
    assert requests[0][2]["authorization"] == "Bearer secret" and described(requests[0]) == {"stream": True, "n": 2}


def test_what_is_lost_is_said() -> None:
    def reply(request: Request, number: int) -> bytes | None:
        return stream(spoken("x", 1), "", 50)[:200] + b"CUT" if number == 1 else plain({}, "")

    async def what(url: str) -> None:
        with Connection(url) as connection:
            with pytest.raises(Failed):
                await connection.ask("POST", CHAT, {})
            assert (await connection.ask("POST", CHAT, {})).status == 200  # a connection of its own

    visit(reply, what)

    async def nobody() -> None:
        with pytest.raises(Failed):
            await client.get("http://127.0.0.1:1", "/ready")

    asyncio.run(nobody())


def test_a_metric_is_summed_over_its_labels() -> None:
    page = '# HELP a b\na_total{x="1"} 2\na_total{x="2"} 3.5\na_total_more 7\na 1e3\n'
    assert client.metric_in(page, "a_total") == 5.5 and client.metric_in(page, "a") == 1000
    assert client.metric_in(page, "b") == 0


def test_the_worker_is_a_child_of_the_server() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in client.children(os.getpid())
        assert (client.resident_bytes(child.pid) or 0) > 1 << 16
    finally:
        child.communicate(b"\n")
    assert child.pid not in client.children(os.getpid()) and client.resident_bytes(child.pid) is None


def test_a_server_that_ends_is_reported(tmp_path: Path) -> None:
    async def start() -> None:
        async with Server(["--no-such-flag"], tmp_path / "log"):
            pass

    with pytest.raises(SystemExit, match="the server ended"):
        asyncio.run(start())


# ---- the parts ------------------------------------------------------------------------------------------------------


def arguments_with(**values: Any) -> argparse.Namespace:
    common: dict[str, Any] = {
        "key": None,
        "rounds": 2,
        "option": [],
        "pause": 0.0,
        "repeats": 2,
        "steps": 2,
        "tokens": 8,
        "long": 9,
    }
    return argparse.Namespace(**{**common, **values})


def test_throughput_counts_what_was_answered(tmp_path: Path) -> None:
    actual: dict[str, Any] = {}

    def reply(request: Request, number: int) -> bytes | None:
        return plain({"error": {"message": "no"}}, "", 503) if number == 30 else sound(request, number)

    async def what(url: str) -> None:
        async with Server([], tmp_path / "log", url) as server:
            actual.update(await serve.throughput(server, arguments_with(requests=6, clients="1,4")))

    requests = visit(reply, what)
    prompts = [described(request)["messages"][0]["content"] for request in requests if request[1] == CHAT]
    assert len(prompts) == len(set(prompts)) == 2 + 6 + 2 * 2 * 6  # nothing that a server could remember
    assert [row["clients"] for row in actual["levels"]] == [1, 4]
    assert sum(row["answered"] for row in actual["levels"]) == 23 and sum(r["errors"] for r in actual["levels"]) == 1
    assert all(row["solved"] == 1 for row in actual["levels"]) and len(actual["ratios"]) == 2
    assert not actual["targets"]["requests that failed"]["reached"]


def test_first_takes_turns_and_leaves_the_others() -> None:
    actual: dict[str, Any] = {}
    long = 0

    def reply(request: Request, number: int) -> bytes | None:
        nonlocal long
        if request[1] == "/metrics":
            held, long = long, 0 if long == 2 else long  # the next question finds them gone
            return plain(f"sfumato_rows {held}\n".encode(), "")
        if request[1] == CHAT and described(request)["max_tokens"] > 100:
            long += 1
            return None
        return sound(request, number)

    async def what(url: str) -> None:
        actual.update(await serve.first(Server([], Path(), url), arguments_with(others=2, option=["early=true"])))

    requests = visit(reply, what)
    assert [len(actual[where]["seconds"]) for where in ("idle", "beside")] == [4, 4]
    assert sum(request[1] == CHAT and described(request).get("early", False) for request in requests) == 10
    assert actual["targets"]


def test_same_finds_a_text_that_depends_on_its_neighbours() -> None:
    actual: dict[str, Any] = {}
    others = 1

    def reply(request: Request, number: int) -> bytes | None:
        return plain({"id": "c", "text": "another"}, "") if number == 12 else sound(request, number)

    async def what(url: str) -> None:
        actual.update(await serve.same(Server([], Path(), url), arguments_with(requests=8, others=others)))

    visit(sound, what)
    assert actual["identical"] == 1 and not actual["differing"]
    others = 0  # of 18 requests, the model's card among them, the last eight come at once
    visit(reply, what)
    assert actual["identical"] == 7 / 8 and len(actual["differing"]) == 1


def test_mid_parts_replace_their_own(tmp_path: Path) -> None:
    path = tmp_path / "serve.json"
    options = argparse.Namespace(output=path)
    serve.keep("first", {"x": 1}, options, ["-m", "nano"])
    serve.keep("same", {"y": 1}, options, [])
    serve.keep("first", {"x": 2}, options, [])
    record = json.loads(path.read_text())
    assert record["what"] == "serve" and record["first"]["x"] == 2 and record["same"]["y"] == 1
    assert record["first"]["environment"]["date"] and record["environment"]


# ---- accounts -------------------------------------------------------------------------------------------------------


def account(reply: Reply, ask: Ask, times: int = 1) -> list[Entry]:
    accounts = Accounts()

    async def what(url: str) -> None:
        with Connection(url) as connection:
            for _ in range(times):
                entry = accounts.begin(ask)
                accounts.end(entry, await soak.perform(ask, entry.request, connection))

    visit(reply, what)
    assert not accounts.active
    return accounts.entries


ASK = Ask("stream", CHAT, {"stream": True, "n": 2})


def answering(events: Callable[[list[Any]], list[Any]]) -> Reply:
    return lambda request, number: stream(events(spoken("x", number, 2)), request[2]["x-request-id"])


def test_an_answer_that_comes_once() -> None:
    entries = account(sound, ASK, 3)
    assert [entry.outcome for entry in entries] == ["answered"] * 3 and not any(entry.faults for entry in entries)


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        (lambda good: good[:-1], "without one end"),
        (lambda good: [*good, good[-1]], "without one end"),
        (lambda good: [*good[:-1], good[2], good[-1]], "ended twice or never"),
        (lambda good: good[3:], "ended twice or never"),
        (lambda good: [good[0], {"id": "c9", "choices": []}, *good[1:]], "not its own"),
        (lambda good: [{"error": {"message": "x"}}, *good], "went on after its error"),
    ],
)
def test_streams_that_are_not_one_answer(events: Callable[[list[Any]], list[Any]], fault: str) -> None:
    (entry,) = account(answering(events), ASK)
    assert any(fault in actual for actual in entry.faults), entry


def test_answers_that_are_not_ones_own() -> None:
    (entry,) = account(lambda request, number: plain({}, "another"), Ask("chat", CHAT, {}))
    assert "the answer to another request, or to none" in entry.faults
    (entry,) = account(lambda r, n: plain({"x": 1}, r[2]["x-request-id"]) * 2, Ask("chat", CHAT, {}))
    assert entry.faults == ["bytes behind the answer"]
    one, two = account(lambda r, n: plain({"id": "c"}, r[2]["x-request-id"]), Ask("chat", CHAT, {}), 2)
    assert not one.faults and two.faults == ["an answer's id is not its own"]


def test_outcomes() -> None:
    def broken(request: Request, number: int) -> bytes:
        return stream([spoken("x", 1)[0], {"error": {"message": "the worker ended"}}], request[2]["x-request-id"])

    def refused(request: Request, number: int) -> bytes:
        return plain({"error": {"message": "n is 0"}}, request[2]["x-request-id"], 400)

    (entry,) = account(broken, ASK)
    assert (entry.outcome, entry.status, entry.message, entry.faults) == ("error", 200, "the worker ended", [])
    (entry,) = account(refused, Ask("invalid", CHAT, b"{", is_valid=False))
    assert (entry.outcome, entry.status, entry.message) == ("refused", 400, "n is 0")
    (entry,) = account(lambda request, number: b"CUT", Ask("chat", CHAT, {}))
    assert entry.outcome == "lost"
    (entry,) = account(lambda request, number: None, Ask("chat", CHAT, {}, leaves="waiting", patience=0.01))
    assert entry.outcome == "left"
    (entry,) = account(sound, Ask("stream", CHAT, {"stream": True}, leaves="reading", patience=1))
    assert entry.outcome == "left"
    (entry,) = account(sound, Ask("chat", CHAT, {}, leaves="sending", patience=0.5))
    assert entry.outcome == "left"


def entry(kind: str, began: float, ended: float, outcome: str, is_valid: bool = True) -> Entry:
    return Entry(f"soak-{kind}", Ask(kind, CHAT, {}, is_valid=is_valid), began, ended, outcome, 200, "why")


def test_what_follows_a_kill() -> None:
    flying = [entry("a", 99, 101.5, "error"), entry("b", 99, 100.1, "answered")]
    entries = [
        *flying,
        entry("c", 100.5, 104, "answered"),
        entry("d", 101, 103, "answered"),
        entry("e", 99, 99.5, "left"),
    ]
    entries += [entry("f", 102, 103, "refused", False)]
    (kill,) = kills = soak.after(entries, [(100.0, flying)], 90.0)
    assert kill["at"] == 10 and kill["in_flight"] == 2 and kill["errors"] == kill["answered"] == 1
    assert kill["slowest_error_seconds"] == 1.5 and kill["next_success_seconds"] == 3
    late = [entry("g", 110, 111, "error"), entry("h", 110, 111, "refused"), entry("i", 110, 111, "answered", False)]
    actual = soak.account([*entries, *late], kills, 90.0)
    assert [one["kind"] for one in actual["unprovoked"]] == ["g"]
    assert set(actual["unexpected"]) == {"h", "i"} and actual["outcomes"]["answered"] == 4
    assert sum(window["requests"] for window in actual["windows"]) == actual["requests"] == 9
    memory = [[5.0 * n, 10**8, 10**9 + 10**7 * n, 7 if n < 40 else 8] for n in range(80)]
    actual |= {"growth": {name: soak.growth(memory, n) for n, name in ((1, "server"), (2, "worker"))}}
    soak.conclude(actual)
    targets = actual["targets"]
    assert targets["seconds from a kill to the last error of what was in flight"]["value"] == 1.5
    assert targets["seconds from a kill to the next success"]["reached"]
    assert targets["errors that no kill explains"]["value"] == 1 and targets["requests lost"]["reached"]
    never = {**actual, "kills": [{**kill, "next_success_seconds": None}]}
    soak.conclude(never)
    assert not never["targets"]["seconds from a kill to the next success"]["reached"]


def test_growth_is_of_each_life_after_its_warm_up() -> None:
    steps: list[list[Any]] = [[float(n), 50, 100 + (900 if n >= 20 else 45 * n), 1] for n in range(100)]
    steps += [[100.0 + n, 50, 1000 + (n >= 60) * 100, 2] for n in range(100)] + [[201.0, 50, None, None]]
    one, two = soak.growth(steps, 2)
    assert one["growth"] == 0 and two["growth"] == pytest.approx(0.1) and one["samples"] == 100
    assert [life["growth"] for life in soak.growth(steps, 1)] == [0]


def test_the_log_names_each_request_once() -> None:
    entries = [Entry(f"soak-{n}", Ask("chat", CHAT), 0.0) for n in range(12)]
    entries.append(Entry("soak-12", Ask("chat", CHAT, leaves="sending"), 0.0))
    text = "".join(f"soak-{n} POST\n" for n in range(11)) + "soak-1 POST\n"
    assert soak.logged(text, entries) == {"0 lines": 1, "1 lines": 10, "2 lines": 1}


def test_traffic_is_mixed_and_its_seed_decides() -> None:
    traffic, other = soak.Traffic(82), soak.Traffic(82)
    asks = [traffic.next() for _ in range(600)]
    assert [ask.kind for ask in asks] == [other.next().kind for _ in range(600)]
    assert {"invalid", "drafts", "schema", "regex", "infill", "fill", "decisions", "long prompt"} <= {
        a.kind for a in asks
    }
    assert {ask.leaves for ask in asks} == {"", "sending", "waiting", "reading"}
    assert 0.05 < sum(not ask.is_valid for ask in asks) / len(asks) < 0.2


FAKE = """#!{python}
import http.server, json, subprocess, sys, threading, time

def start():
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, data):
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.send_header("x-request-id", self.headers.get("x-request-id", ""))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        is_models = self.path == "/v1/models"
        self.reply(200, json.dumps(dict(data=[dict(canvas_length=82)])).encode() if is_models else b"sfumato_rows 0")

    do_PUT = do_GET

    def do_POST(self):
        global worker
        mine = worker
        length = int(self.headers["content-length"])
        if length > 1 << 22:
            return self.reply(413, b"{{}}")
        self.rfile.read(length)
        time.sleep(0.02)
        with lock:
            if mine.poll() is not None:
                worker = start() if worker is mine else worker
                return self.reply(503, json.dumps(dict(error=dict(message="the worker ended"))).encode())
        self.reply(200, json.dumps(dict(text="x")).encode())

class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):  # who leaves, leaves
        pass

worker, lock = start(), threading.Lock()
server = Server(("127.0.0.1", 0), Handler)
print(f"fake on http://127.0.0.1:{{server.server_port}} with {{sys.argv[1:]}}", flush=True)
server.serve_forever()
"""


def test_a_soak_with_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a server and a worker that are processes; theirs takes every nonsense for sense."""
    (tmp_path / "sfumato").write_text(FAKE.format(python=sys.executable))
    (tmp_path / "sfumato").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    output = tmp_path / "serve.json"
    arguments = ["soak.py", "--minutes", "0.03", "--kills", "1", "--clients", "3", "--log", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "-o", str(output), "--server", "--rows 4"])
    soak.main()
    actual = json.loads(output.read_text())["soak"]
    assert "'--port', '0', '-m', 'nano', '--rows', '4'" in (tmp_path / "soak.log").read_text()
    (kill,) = actual["kills"]
    assert kill["in_flight"] == kill["errors"] + kill["answered"] > 0 and kill["next_success_seconds"] is not None
    assert actual["outcomes"]["answered"] and actual["outcomes"]["left"] and "lost" not in actual["outcomes"]
    assert set(actual["unexpected"]) <= {"invalid"} and not actual["unprovoked"] and actual["exit_code"] == -15
    assert not set(actual["faults"]) - {"a stream without one end"}
    assert actual["growth"]["server"] and actual["growth"]["worker"] and actual["memory"][0][3]
    assert "kill 1: " in capsys.readouterr().out


# ---- pages ----------------------------------------------------------------------------------------------------------


def record() -> dict[str, Any]:
    spread = {"p50": 0.1, "p95": 0.2, "p99": None}
    row = {"tokens_per_second": 900.0, "tokens_per_second_of_rounds": [890.0, 910.0], "answered": 10, "errors": 0}
    row |= {"latency_seconds": spread, "first_text_seconds": spread, "solved": 0.9}
    entries = [entry("a", 1, 2, "answered"), entry("b", 3, 12, "error")]
    soaked = soak.account(entries, soak.after(entries, [(4.0, entries[1:])], 0.0), 0.0)
    memory: list[list[Any]] = [[0.0, 10**8, 10**9, 5], [5.0, 10**8, 10**9, 5], [10.0, 10**8, None, None]]
    soaked |= {"minutes": 1, "clients": 2, "memory": memory}
    soaked |= {"growth": {"server": soak.growth(memory, 1), "worker": soak.growth(memory, 2)}}
    soak.conclude(soaked)
    timed = {"median": 1.0, "p95": 2.0, "seconds": [1.0, 2.0]}
    actual = {
        "throughput": {"requests": 10, "rounds": 2, "levels": [{"clients": n, **row} for n in (1, 32)], "targets": {}},
        "first": {"others": 8, "short": {"max_tokens": 64}, "idle": timed, "beside": timed, "targets": {}},
        "same": {"requests": 9, "others": 1, "identical": 1.0, "alone_seconds": 1, "at_once_seconds": 1, "targets": {}},
        "soak": soaked,
    }
    beside = hostile.Bystander([0.01, 0.02, 0.03]).summary()
    attack = {"attack": "a chain of rules", "statuses": [400, 400], "seconds": 0.5, **beside}
    actual["attacks"] = {"idle": beside, "attacks": [attack], "restarts": 0, "targets": {}}
    actual["fuzz"] = {"patterns": 5, "grammars": 2, "clients": 4, "seconds": 9, "statuses": {"200": 3, "400": 4}}
    actual["fuzz"] |= {"idle": beside, "bystander": {**beside, "p50": 0.02, "p95": 0.03, "p99": 0.03}}
    actual["fuzz"] |= {"memory": {"before": 10**8, "after": 10**8}, "targets": {}}
    grammar = {"family": "depth", "number": 0, "status": 400, "seconds": 0.5, **beside}
    actual["grammars"] = {"idle": beside, "grammars": [grammar], "memory": {"before": 10**8, "after": 10**8}}
    actual["grammars"] |= {"targets": {}}
    actual |= {part: actual["throughput"] for part in serve_page.THROUGHPUTS}
    return {
        "what": "serve",
        **{part: {**one, "environment": {"command": f"do {part}"}} for part, one in actual.items()},
    }


def test_every_part_has_its_place_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    actual = record()
    attacked = {"what": "under attack", **{part: actual.pop(part) for part in serve_page.ATTACKS}}
    page = results.page({"serve.json": actual, "hostile.json": attacked})
    assert "## Serving" in page and "| 32 clients | 900 |" in page and "requests lost" in page
    assert all(f"`do {part}`" in page for part in (*serve_page.PARTS, *serve_page.ATTACKS))
    assert "| a chain of rules | 400, 400 | 500 ms | 3 | 0 | 20 ms | 30 ms | 1.5 |" in page
    assert "3 × 200, 4 × 400 in 9 s" in page and "| depth | 1 × 400 | 500 ms | 20 ms | 30 ms |" in page
    assert "## Serving" in results.page({"serve.json": {"what": "serve", "same": actual["same"]}})
    serve_page.show(actual, "soak")
    assert "(target ≤ 0.03)" in capsys.readouterr().out


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    serve_page.draw(record(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"serve.png", "soak.png"}
    serve_page.draw({"what": "serve"}, tmp_path)
