"""The server under everything at once, for long: mixed traffic, people who leave, nonsense, a worker that is killed.

    .venv/bin/python benchmarks/soak.py --minutes 20 --kills 3

So many clients each ask one thing after another, drawn at random: chats, streams with drafts, long prompts, schemas,
templates, calls; some hang up at any point, some send what no server should take. Every request has an id of its own
and must be answered once: in full, or refused, or with an error. The worker process is killed (SIGKILL) so often, at
equal distances: four lives for three kills. This is the part "soak" of the record of benchmarks/serve.py, whose `draw`
draws it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shlex
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import client, common, serve_page
from benchmarks.client import END, Answer, Connection, Failed, HungUp, Server, percentile, say
from benchmarks.serve import SEED, STREAM, chat, keep, puzzles, renamed, server_options
from sfumato.measure.work import size
from sfumato.tasks import sudoku

Body = dict[str, Any]
Record = dict[str, Any]
CHAT = "/v1/chat/completions"
PATIENCE = 120.0
"""Seconds after which an answer counts as lost."""
WINDOW = 5.0
WARM = 0.2
"""The share of a process's life that is its warm-up."""


# ---- traffic --------------------------------------------------------------------------------------------------------


@dataclass
class Ask:
    """One thing that somebody wants of the server."""

    kind: str
    path: str
    body: Any = None
    method: str = "POST"
    is_valid: bool = True
    leaves: str = ""
    """How the client hangs up: "" not at all, "sending" (that share of the request), "waiting" (so many seconds),
    "reading" (so many events)."""
    patience: float = 0.0
    promised: int | None = None
    """A content-length other than the body's."""

    @property
    def is_work(self) -> bool:
        """Whether the model is to answer it, to somebody who stays."""
        return self.method == "POST" and self.is_valid and not self.leaves


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def valid(puzzle: str, length: int, rng: random.Random) -> list[tuple[int, Ask]]:
    """What the server should answer, with its weight in the mixture."""
    text = sudoku.prompt(puzzle)
    one = chat(text, max_tokens=length, seed=rng.randrange(1 << 40))
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA}}
    long = "".join(text for _ in range(rng.randrange(8, 24)))
    return [
        (16, Ask("chat", CHAT, one)),
        (16, Ask("stream", CHAT, {**one, **STREAM})),
        (8, Ask("drafts", CHAT, {**one, **STREAM, "drafts": True})),
        (4, Ask("two choices, stops", CHAT, {**one, **STREAM, "n": 2, "stop": ["77", "12345"]})),
        (4, Ask("long prompt", "/v1/completions", {"prompt": long, "max_tokens": length})),
        (3, Ask("long answer", CHAT, {**one, **STREAM, "max_tokens": 4 * length, "min_tokens": 2 * length})),
        (4, Ask("schema", CHAT, {**one, "response_format": form})),
        (4, Ask("regex", CHAT, {**one, "regex": "[1-9]{9,30}"})),
        (3, Ask("choices", CHAT, {**one, **STREAM, "choices": ["yes", "no", "perhaps"]})),
        (2, Ask("call", CHAT, {**one, "tools": [TOOL], "tool_choice": "required"})),
        (2, Ask("responses", "/v1/responses", {"input": text, "max_output_tokens": length})),
        (3, Ask("infill", "/v1/infill", {"prefix": text[:50], "suffix": text[60:], "length": 10})),
        (2, Ask("infill, stream", "/v1/infill", {"prefix": "12", "suffix": "89", "at_most": 8, "stream": True})),
        (3, Ask("fill", "/v1/fill", {"template": ["x: ", {"name": "x", "regex": "[0-9]{2,4}"}, "."]})),
        (3, Ask("edit", "/v1/edit", {"text": puzzle, "spans": [[10, 20], [40, 44]], "strength": 0.5})),
        (3, Ask("decisions", "/v1/decisions", {"prompt": text, "fields": {"is it hard": ["yes", "no"]}})),
        (2, Ask("models", "/v1/models", method="GET")),
        (1, Ask("metrics", "/metrics", method="GET")),
    ]


def invalid(length: int) -> list[Ask]:
    """What it must refuse, whatever else happens."""
    one = chat("12", max_tokens=4)
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]
    bodies: list[Any] = [
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 5000 + b"]" * 5000,
        {**one, "surprise": 1},
        {**one, "temperature": "hot"},
        {**one, "n": 0},
        {**one, "max_tokens": -1},
        {**one, "model": "another"},
        {**one, "top_p": 1.5},
        {**one, "regex": "("},
        {**one, "drafts": True},
        {**one, "response_format": {"type": "json_schema"}},
        {"messages": []},
        {"messages": [{"role": "nobody", "content": "1"}]},
        {"messages": [{"role": "user", "content": image}]},
        chat("1" * 8000, max_tokens=length),
    ]
    asks = [Ask("invalid", CHAT, body, is_valid=False) for body in bodies]
    asks += [Ask("invalid", "/v1/nothing", one, is_valid=False), Ask("invalid", CHAT, method="PUT", is_valid=False)]
    asks += [
        Ask("invalid", path, {}, is_valid=False) for path in ("/v1/infill", "/v1/edit", "/v1/fill", "/v1/decisions")
    ]
    return [*asks, Ask("oversized", CHAT, b'{"messages":' + b" " * 1000, is_valid=False, promised=8 << 20)]


class Traffic:
    def __init__(self, length: int, seed: int = SEED) -> None:
        self._length, self._rng, self._base = length, random.Random(seed), puzzles(16)
        self._invalid = invalid(length)

    def next(self) -> Ask:
        rng = self._rng
        if rng.random() < 0.1:
            return rng.choice(self._invalid)
        weights, asks = zip(*valid(renamed(rng.choice(self._base), rng), self._length, rng), strict=True)
        ask: Ask = rng.choices(asks, weights)[0]
        if ask.method == "POST" and rng.random() < 0.2:
            is_stream = ask.body.get("stream", False)
            ask.leaves = rng.choice(["sending", "waiting", *["reading"] * 3 * is_stream])
            ask.patience = {"sending": rng.random(), "waiting": rng.random() * 0.5}.get(ask.leaves, rng.randrange(1, 6))
        return ask


# ---- accounts -------------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """What became of one request."""

    request: str
    ask: Ask
    began: float
    ended: float = 0.0
    outcome: str = ""
    """answered, refused (4xx), error (5xx, or in a stream), left (by the client), lost."""
    status: int = 0
    message: str = ""
    faults: list[str] = field(default_factory=list)


@dataclass
class Accounts:
    entries: list[Entry] = field(default_factory=list)
    active: dict[str, Entry] = field(default_factory=dict)
    answers: set[str] = field(default_factory=set)
    """The ids that the server gave its answers."""

    def begin(self, ask: Ask) -> Entry:
        entry = Entry(f"soak-{len(self.entries)}", ask, time.monotonic())
        self.entries.append(entry)
        self.active[entry.request] = entry
        return entry

    def end(self, entry: Entry, result: Answer | Failed | HungUp) -> None:
        del self.active[entry.request]
        entry.ended = time.monotonic()
        if isinstance(result, Answer):
            error = result.error()
            entry.status = result.status
            entry.outcome = "answered" if error is None else "refused" if 400 <= result.status < 500 else "error"
            entry.message = "" if error is None else str(error.get("message"))[:300]
            entry.faults = faults(result, entry.request, entry.ask)
            ids: set[str] = {e["id"] for _, e in result.events if isinstance(e, dict) and "id" in e}
            ids |= {result.json()["id"]} if "id" in result.json() else set()
            if len(ids) > 1 or ids & self.answers:
                entry.faults.append("an answer's id is not its own")
            self.answers |= ids
        else:
            entry.outcome = "left" if isinstance(result, HungUp) else "lost"
            entry.message = str(result)


def faults(answer: Answer, request: str, ask: Ask) -> list[str]:
    """Why this is not exactly one answer to this request."""
    result = []
    if answer.headers.get("x-request-id") != request:
        result.append("the answer to another request, or to none")
    if answer.has_stray:
        result.append("bytes behind the answer")
    if answer.status != 200 or not isinstance(ask.body, dict):
        return result
    count = ask.body.get("n", 1)
    if not answer.is_stream:
        choices = answer.json().get("choices")
        if not answer.json():
            result.append("no JSON object")
        elif choices is not None and [c.get("finish_reason") is not None for c in choices] != [True] * count:
            result.append("choices missing, or without an end")
        return result
    events = [event for _, event in answer.events]
    if answer.error() is not None:
        if not (isinstance(events[-1], dict) and "error" in events[-1]):
            result.append("a stream that went on after its error")
        return result
    if events.count(END) != 1 or events[-1] != END:
        result.append("a stream without one end")
    choices = [c for event in events if isinstance(event, dict) for c in event.get("choices", ())]
    ends = Counter(c.get("index") for c in choices if c.get("finish_reason"))
    if ask.path == CHAT and ends != Counter(range(count)):
        result.append("choices of a stream that ended twice or never")
    if ask.path == "/v1/infill" and sum("text" in event for event in events if isinstance(event, dict)) != 1:
        result.append("a stream without one result")
    return result


# ---- the soak -------------------------------------------------------------------------------------------------------


async def perform(ask: Ask, request: str, connection: Connection) -> Answer | Failed | HungUp:
    events = 0

    def watch(_: Any) -> None:
        nonlocal events
        events += 1
        if ask.leaves == "reading" and events >= ask.patience:
            raise HungUp

    try:
        if ask.leaves == "sending":
            await connection.send_part(ask.path, ask.body, ask.patience)
            return HungUp()
        seconds = ask.patience if ask.leaves == "waiting" else PATIENCE
        return await asyncio.wait_for(
            connection.ask(ask.method, ask.path, ask.body, request, watch, ask.promised), seconds
        )
    except HungUp as left:
        return left
    except Failed as failure:
        return failure
    except TimeoutError:
        return HungUp() if ask.leaves else Failed(f"no answer within {PATIENCE:.0f} s")


async def user(url: str, key: str | None, traffic: Traffic, accounts: Accounts, until: float) -> None:
    with Connection(url, key) as connection:
        while time.monotonic() < until:
            entry = accounts.begin(traffic.next())
            result = await perform(entry.ask, entry.request, connection)
            accounts.end(entry, result)
            if isinstance(result, Failed):
                await asyncio.sleep(0.2)  # a server that is gone is not asked a million times


async def watch_memory(
    server: Server, accounts: Accounts, began: float, seconds: float, result: list[list[Any]]
) -> None:
    """Every five seconds: since when, bytes of the server, bytes and pid of the worker."""
    reported = 0.0
    while True:
        worker = server.worker()
        at, held = time.monotonic() - began, [pid and client.resident_bytes(pid) for pid in (server.pid, worker)]
        result.append([at, *held, worker])
        if at >= reported:
            reported += 15
            errors = sum(entry.outcome in ("error", "lost") for entry in accounts.entries)
            say(
                f"{at / 60:.1f} of {seconds / 60:g} min: {len(accounts.entries)} requests, {errors} errors, "
                f"{len(accounts.active)} open; server {size(held[0] or 0)}, worker {size(held[1] or 0)}"
            )
        await asyncio.sleep(WINDOW)


Kills = list[tuple[float, list[Entry]]]
"""When each was, and what was in flight: what a worker had, and nobody meant to leave."""


async def kill_workers(server: Server, accounts: Accounts, times: Iterable[float], until: float) -> Kills:
    result: Kills = []
    for at in times:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        while time.monotonic() < until:
            with suppress(Failed):
                is_ready = (await client.get(server.url, "/ready")).status == 200
                worker, flying = server.worker(), [e for e in accounts.active.values() if e.ask.is_work]
                if is_ready and worker and flying:
                    os.kill(worker, signal.SIGKILL)
                    result.append((time.monotonic(), flying))
                    say(f"killed the worker {worker}; {len(flying)} requests in flight")
                    break
            await asyncio.sleep(0.02)
    return result


async def soak(server: Server, arguments: argparse.Namespace) -> Record:
    length = (await client.card(server.url, arguments.key))["canvas_length"]
    accounts, traffic, memory = Accounts(), Traffic(length), list[list[Any]]()
    began, seconds = time.monotonic(), 60 * arguments.minutes
    watching = asyncio.create_task(watch_memory(server, accounts, began, seconds, memory))
    due = [began + seconds * number / (arguments.kills + 1) for number in range(1, arguments.kills + 1)]
    killing = asyncio.create_task(kill_workers(server, accounts, due, began + seconds))
    users = (user(server.url, arguments.key, traffic, accounts, began + seconds) for _ in range(arguments.clients))
    await asyncio.gather(*users)
    watching.cancel()
    kills = after(accounts.entries, await killing, began)
    idle = await client.until_idle(server.url, arguments.key)
    return {
        **account(accounts.entries, kills, began),
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "idle_after_seconds": idle,
        "log": logged(server.log.read_text(errors="replace"), accounts.entries) if not arguments.url else None,
        "memory": memory,
        "growth": {"server": growth(memory, 1), "worker": growth(memory, 2)},
    }


# ---- what it says ---------------------------------------------------------------------------------------------------


def after(entries: Sequence[Entry], kills: Kills, began: float) -> list[Record]:
    """What followed each kill. What was in flight and got an answer all the same had not reached the worker, or had
    left it already."""
    result = []
    for at, flying in kills:
        errors = [entry.ended - at for entry in flying if entry.outcome == "error"]
        saved = [entry.ended - at for entry in flying if entry.outcome == "answered"]
        again = [e.ended - at for e in entries if e.began > at and e.outcome == "answered" and e.ask.is_work]
        result.append(
            {
                "at": at - began,
                "in_flight": len(flying),
                "errors": len(errors),
                "slowest_error_seconds": max(errors, default=None),
                "answered": len(saved),
                "slowest_answer_seconds": max(saved, default=None),
                "next_success_seconds": min(again, default=None),
            }
        )
    return result


def account(entries: Sequence[Entry], kills: Sequence[Record], began: float) -> Record:
    spans = [(kill["at"], kill["at"] + (kill["next_success_seconds"] or 1e9)) for kill in kills]
    wrong = [entry for entry in entries if entry.outcome in ("error", "lost")]
    unprovoked = [e for e in wrong if not any(a <= e.ended - began and e.began - began <= b for a, b in spans)]
    unexpected: dict[str, list[str]] = {}
    for entry in entries:
        if entry.outcome in ("answered", "refused") and (entry.outcome == "answered") != entry.ask.is_valid:
            unexpected.setdefault(entry.ask.kind, []).append(f"{entry.status} {entry.message}".strip())
    return {
        "requests": len(entries),
        "outcomes": dict(Counter(entry.outcome for entry in entries)),
        "kinds": dict(Counter(entry.ask.kind for entry in entries)),
        "faults": dict(Counter(fault for entry in entries for fault in entry.faults)),
        "unprovoked": [
            {"kind": e.ask.kind, "at": e.ended - began, "status": e.status, "message": e.message} for e in unprovoked
        ],
        "unexpected": {
            kind: [f"{n} × {reported}" for reported, n in Counter(result).items()]
            for kind, result in unexpected.items()
        },
        "kills": list(kills),
        "window_seconds": WINDOW,
        "windows": windows(entries, began),
    }


def logged(text: str, entries: Sequence[Entry]) -> Record:
    """How often the server's log names each request that was sent whole; once is right."""
    lines = Counter(re.findall(r"soak-\d+", text))
    counts = Counter(lines[entry.request] for entry in entries if entry.ask.leaves != "sending")
    return {f"{count} lines": number for count, number in sorted(counts.items())}


def windows(entries: Sequence[Entry], began: float) -> list[Record]:
    """Latency of whole answers, and errors, over time."""
    slots: dict[int, list[Entry]] = {}
    for entry in entries:
        slots.setdefault(int((entry.ended - began) / WINDOW), []).append(entry)
    result = []
    for slot in range(max(slots, default=-1) + 1):
        these = slots.get(slot, [])
        took = [
            entry.ended - entry.began for entry in these if entry.outcome == "answered" and entry.ask.method == "POST"
        ]
        row: Record = {"from": slot * WINDOW, "requests": len(these)}
        row |= {"errors": sum(entry.outcome in ("error", "lost") for entry in these)}
        result.append(row | {f"p{p}": percentile(took, p / 100) if took else None for p in (50, 95)})
    return result


def growth(memory: Sequence[Sequence[Any]], column: int) -> list[Record]:
    """Of each life of the process, its first fifth left out: the median of the last quarter of what remains, over that
    of the first."""
    lives: dict[Any, list[tuple[float, int]]] = {}
    for row in memory:
        if row[column] and (column == 1 or row[3]):
            lives.setdefault(0 if column == 1 else row[3], []).append((row[0], row[column]))
    result = []
    for samples in lives.values():
        start = samples[0][0] + WARM * (samples[-1][0] - samples[0][0])
        rest = [held for at, held in samples if at >= start]
        quarter = max(1, len(rest) // 4)
        early, late = statistics.median(rest[:quarter]), statistics.median(rest[-quarter:])
        result.append({"samples": len(samples), "early_bytes": early, "late_bytes": late, "growth": late / early - 1})
    return result


def conclude(result: Record) -> None:
    """Add the targets."""
    grown = [abs(life["growth"]) for lives in result["growth"].values() for life in lives]
    errors = [kill["slowest_error_seconds"] for kill in result["kills"] if kill["slowest_error_seconds"] is not None]
    again = [kill["next_success_seconds"] for kill in result["kills"]]
    result["targets"] = {
        "memory after warm-up, grown by at most": common.target(max(grown, default=None), 0.03),
        "requests lost": common.target(result["outcomes"].get("lost", 0), 0),
        "requests answered twice, cut short or mixed up": common.target(sum(result["faults"].values()), 0),
        "errors that no kill explains": common.target(len(result["unprovoked"]), 0),
        "answers that are not as asked": common.target(sum(len(each) for each in result["unexpected"].values()), 0),
        "seconds from a kill to the last error of what was in flight": common.target(max(errors, default=None), 2.0),
        "seconds from a kill to the next success": common.target(
            None if not again else max(1e9 if each is None else each for each in again), 10.0
        ),
    }


async def measure(arguments: argparse.Namespace) -> None:
    flags = ["-m", "nano", *shlex.split(arguments.server)]
    async with Server(flags, arguments.log / "soak.log", arguments.url, arguments.pid) as server:
        result = await soak(server, arguments)
    result["exit_code"] = server.exit_code
    conclude(result)
    keep("soak", result, arguments, flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    server_options(parser)
    parser.add_argument("--pid", type=int, help="of the server at --url, for its memory and its worker")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--clients", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.url and arguments.kills and not arguments.pid:
        parser.error("--kills needs the --pid of the server at --url; give it, or --kills 0")
    asyncio.run(measure(arguments))
    serve_page.show(json.loads(arguments.output.read_text()), "soak")


if __name__ == "__main__":
    main()
