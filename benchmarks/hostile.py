"""What one hostile request does to the others: attacks on a live server, with a bystander beside each.

    .venv/bin/python benchmarks/hostile.py attacks   # every known attack: its answer, and the bystander's latency
    .venv/bin/python benchmarks/hostile.py grammars  # a hundred grammars that ask for too much, one after the other
    .venv/bin/python benchmarks/hostile.py fuzz      # 500 generated patterns and 200 Lark grammars, 4 at a time

The bystander asks nano for the same small Sudoku, again and again, over one connection; its latency on an idle server
is measured first. Each part starts `sfumato serve -m nano`, or takes the one at `--url`, and replaces its own part of
the record. The client runs on the same cores as the server. tests/server/test_hostile.py runs the same
attacks and holds the answers; times are only measured here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import hostile_grammars

from benchmarks import client, common, serve, serve_page
from benchmarks.client import Connection, Failed, Server, say
from sfumato.measure.machine import ROOT

PUZZLE = "020008000908045603450391800301409270507082000204703901710500438045837090832010000"
RECORD = ROOT / "benchmarks" / "results" / "hostile.json"
PAUSE = 0.01
"""Seconds between two requests of the bystander."""
AROUND = 0.3
"""Seconds that it asks before and after an attack."""
WARM = 300
"""Ordinary requests before a fuzz."""
SETTLE = 12.0
"""Seconds after which a server at rest has given its memory back."""
Record = dict[str, Any]
Body = dict[str, Any] | bytes


# ---- attacks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """Requests that are sent at once. Whatever is answered is no 5xx; `is_refused`: each of them is a 4xx."""

    name: str
    requests: list[tuple[str, Body]]
    is_refused: bool = False


def complete(**more: Any) -> tuple[str, Body]:
    return "/v1/completions", {"prompt": "hello", "max_tokens": 400, "seed": 1, **more}


def chat(**more: Any) -> tuple[str, Body]:
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 400, **more}


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def lark(rules: int, line: str, start: str, last: str) -> str:
    return f"start: {start}\n" + "\n".join(line.format(n=n, m=n + 1) for n in range(rules)) + "\n" + last


def many(unit: bytes, size: int = 4_000_000) -> bytes:
    return b",".join([unit] * (size // (len(unit) + 1)))


def attacks() -> list[Attack]:
    """Every one that once ended or froze the service, and their brothers."""
    paths, digits = r"(/?[a-z0-9_.-]{1,30}){1,12}", r"(\d{1,5}|\d{2,9}|\d{3,7}){1,100}"
    nested = "^((a{0,100}){0,100}){0,100}$"
    optional = lark(700, 'T{n}: "a{n}"', " ".join(f"T{n}?" for n in range(700)), "")
    terms = lark(5000, 'T{n}: "a"', " ".join(f"T{n}" for n in range(5000)), "")
    chain = lark(3000, "r{n}: r{m}", "r0", 'r3000: "a"')
    wide = {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(5000)}}
    slot = {"name": "x", "at_most": 10**9, "regex": "a*"}
    spans = [[2 * n, 2 * n + 1] for n in range(200_000)]
    around = {"prefix": "a", "suffix": "b"}
    lists = {"fill": b'"template":[' + many(b"0"), "completions": b'"prompt":[' + many(b"[]")}
    zeros = b'"messages":[' + many(b"0")
    return [
        Attack("a pattern that multiplies", [complete(regex=digits, seed=seed) for seed in (1, 2, 3)]),
        Attack("a pattern of many paths", [complete(regex=paths, seed=seed) for seed in (1, 2, 3)]),
        Attack("the same in a schema", [chat(seed=n, **form({"type": "string", "pattern": paths})) for n in (1, 2)]),
        Attack(
            "nested repeats",
            [chat(max_tokens=n, **form({"type": "string", "pattern": nested})) for n in (64, 2000)]
            + [complete(regex=nested)],
        ),
        Attack("five new slow patterns", [complete(regex=f"(.*a.*b.*){{{n}}}") for n in range(50, 55)]),
        Attack("700 optional terminals", [complete(grammar=optional)]),
        Attack("a chain of 3,000 rules, twice", [complete(grammar=chain)] * 2, True),
        Attack("5,000 terminals", [complete(grammar=terms)], True),
        Attack("5,000 properties", [chat(**form(wide))], True),
        Attack("1,000 choices", [complete(choices=[f"choice {n} " * 9 for n in range(1000)])]),
        Attack("a slot of 10^9 tokens", [("/v1/fill", {"template": ["a", slot]})], True),
        Attack(
            "infills of 2e8 and 2^62", [("/v1/infill", {**around, "length": n}) for n in (2 * 10**8, 1 << 62)], True
        ),
        Attack("200,000 spans, twice", [("/v1/edit", {"text": "ab" * 300_000, "spans": spans})] * 2, True),
        Attack("300 spans, twice", [("/v1/edit", {"text": "ab" * 600, "spans": spans[:300], "max_steps": 8})] * 2),
        Attack("a template of zeros", [("/v1/fill", b"{" + lists["fill"] + b"]}")], True),
        Attack("a prompt of empty lists", [("/v1/completions", b"{" + lists["completions"] + b"]}")], True),
        Attack("messages of zeros", [("/v1/chat/completions", b"{" + zeros + b"]}")], True),
        Attack("prompts of 4 MB, twice", [complete(prompt="word " * 800_000)] * 2, True),
        Attack("ids that are booleans", [complete(prompt=[True]), complete(prompt=[1, True])], True),
        Attack("16 stops of 100 kB", [complete(stop=["a" * 100_000] * 16)]),
        Attack("steps without end", [complete(max_steps=400, confidence=0, stability=4096, max_tokens=82)]),
    ]


# ---- generated ------------------------------------------------------------------------------------------------------

ATOMS = [
    *("a", "b", "xyz", ".", r"\d", r"\w", r"\s", r"\S", r"\D", r"\W", "[a-z]", "[^a]", "[0-9a-f]", "[a-zA-Z0-9_.-]"),
    *("é", "日本", r"\.", r"\\", r"\u00e9", "[^\\n]", r"[\s\S]", r"\x41", " ", "-", "[🙂-🙏]", "(?i:a)", "(a|)", "()"),
]
QUANTIFIERS = ["", "", "", "?", "*", "+", "{2}", "{0,9}", "{3,}", "{1,30}", "{5,200}", "{0,1000}", "{1000}", "*?", "+?"]


def pattern(rng: random.Random, depth: int = 0) -> str:
    """Most are valid; some are too much for any automaton, and some are no pattern."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        if depth < 4 and rng.random() < 0.45:
            inner = "|".join(pattern(rng, depth + 1) for _ in range(rng.choice((1, 1, 2, 3))))
            opening = rng.choice(("(?=", "(?P<n>", "(?!")) if rng.random() < 0.01 else rng.choice(("(", "(?:"))
            atom = f"{opening}{inner})"
        else:
            atom = rng.choice(ATOMS)
        parts.append(atom + rng.choice(QUANTIFIERS))
    text = "".join(parts)
    if depth == 0 and rng.random() < 0.06:  # broken somewhere
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice("()[]{}*+?\\|^$") + text[at:]
    return text


def grammar(rng: random.Random) -> str:
    """Rules over rules and terminals: recursive, ambiguous, empty, unused, unknown, long chains and wide choices."""
    rules, terminals = rng.choice((1, 2, 5, 20, 100, 400)), rng.choice((1, 3, 10, 60))
    names = [f"r{n}" for n in range(rules)]
    words = [f"T{n}" for n in range(terminals)]

    def item(at: int) -> str:
        others = names if rng.random() < 0.2 else names[at + 1 : at + 4]  # mostly downwards, so that texts end
        pick = rng.random()
        if pick < 0.35 and others:
            one = rng.choice(others)
        elif pick < 0.75:
            one = rng.choice(words)
        elif pick < 0.9:
            one = json.dumps("".join(rng.choice("abc {}[]:,é") for _ in range(rng.randint(1, 6))), ensure_ascii=False)
        else:
            one = f"({' | '.join(item(at) for _ in range(rng.randint(1, 3)))})" if rng.random() < 0.8 else "unknown"
        return one + rng.choice(("", "", "", "?", "*", "+", "~2", "{1,5}", "{0,200}"))

    lines = [f"start: {' '.join(item(-1) for _ in range(rng.randint(1, 3)))}"]
    for at, name in enumerate(names):
        bodies = (" ".join(item(at) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3)))
        lines.append(f"{name}: {' | '.join(bodies)}")
    lines += [f"{word}: /{pattern(rng, 2).replace('/', '') or 'a'}/" for word in words]
    if rng.random() < 0.1:
        lines.append("%ignore / +/")
    return "\n".join(lines) + "\n"


def generated(patterns: int, grammars: int, seed: int = 1) -> Iterator[tuple[str, Body]]:
    rng = random.Random(seed)
    is_lark = rng.sample(range(patterns + grammars), grammars)
    for number in range(patterns + grammars):
        more: dict[str, Any] = {"max_tokens": rng.choice((20, 82, 200, 400)), "seed": rng.randrange(1 << 30)}
        if number in is_lark:
            yield complete(grammar=grammar(rng), **more)
        elif rng.random() < 0.3:
            yield chat(**more, **form({"type": "string", "pattern": pattern(rng)}))
        else:
            yield complete(regex=pattern(rng), **more)


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Bystander:
    """What its requests took, in seconds, and which were not answered."""

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def summary(self) -> Record:
        return {
            "requests": len(self.seconds),
            "failures": self.failures[:5],
            "median": statistics.median(self.seconds),
            "worst": max(self.seconds),
        }


@asynccontextmanager
async def bystander(url: str, key: str | None = None) -> AsyncIterator[Bystander]:
    """One that asks all the while; at the end its last request is waited for."""
    one, is_over = Bystander(), asyncio.Event()
    body = serve.chat(f"Solve this Sudoku:\n{PUZZLE}", seed=3, max_tokens=82)

    async def ask() -> None:
        with Connection(url, key) as connection:
            while not is_over.is_set():
                began = time.perf_counter()
                try:
                    answer = await connection.ask("POST", "/v1/chat/completions", body)
                    if answer.status != 200:
                        one.failures.append(f"{answer.status} {answer.body[:200]!r}")
                except Failed as error:
                    one.failures.append(str(error))
                one.seconds.append(time.perf_counter() - began)
                await asyncio.sleep(PAUSE)

    asking = asyncio.create_task(ask())
    try:
        yield one
    finally:
        is_over.set()
        await asking


def encoded(body: Body) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


async def send(url: str, path: str, body: Body, key: str | None = None) -> tuple[int, str]:
    """The status and the beginning of the answer; 0 where there was none."""
    try:
        with Connection(url, key) as connection:
            answer = await connection.ask("POST", path, body)
            return answer.status, answer.body[:300].decode(errors="replace")
    except (Failed, OSError) as error:
        return 0, f"{type(error).__name__}: {error}"


async def idle(url: str, seconds: float, key: str | None = None) -> Bystander:
    async with bystander(url, key) as one:
        await asyncio.sleep(seconds)
    return one


async def measure_attacks(server: Server, arguments: argparse.Namespace) -> Record:
    await idle(server.url, 2, arguments.key)
    alone = await idle(server.url, arguments.seconds, arguments.key)
    rows: list[Record] = []
    for attack in attacks():
        requests = [(path, encoded(body)) for path, body in attack.requests]
        began = time.perf_counter()
        async with bystander(server.url, arguments.key) as one:
            await asyncio.sleep(AROUND)
            answers = await asyncio.gather(*(send(server.url, *request, arguments.key) for request in requests))
            took = time.perf_counter() - began - AROUND
            await asyncio.sleep(AROUND)
        statuses = sorted(status for status, _ in answers)
        rows.append(
            {"attack": attack.name, "statuses": statuses, "seconds": took, **one.summary(), "said": answers[0][1]}
        )
        milliseconds = (f"{rows[-1][name] * 1e3:.0f}" for name in ("median", "worst"))
        say(f"{attack.name}: {statuses} in {took:.2f} s; bystander, ms, median and worst: {', '.join(milliseconds)}")
    restarts = await client.metric(server.url, "sfumato_worker_restarts_total", arguments.key)
    bad = [row["attack"] for row in rows if not all(200 <= status < 500 for status in row["statuses"])]
    slowest = max(row["worst"] for row in rows) / alone.summary()["median"]
    return {
        "idle": alone.summary(),
        "attacks": rows,
        "restarts": restarts,
        "targets": {
            "attacks that end in a 5xx or without an answer": common.target(len(bad), 0),
            "restarts of the worker": common.target(restarts, 0),
            "bystanders' requests that failed": common.target(sum(len(row["failures"]) for row in rows), 0),
            "the slowest of them, times the idle median": common.target(slowest, 3.0),
        },
    }  # fmt: skip


async def memory_before(server: Server, arguments: argparse.Namespace) -> float:
    """The worker's memory at rest, after so many ordinary answers that as much is kept of them as is ever kept."""
    for number in range(WARM):
        await send(server.url, *complete(prompt=f"{number} " * 20, max_tokens=164, seed=number), arguments.key)
    for path, body in generated(10, 5, arguments.seed + 1):
        await send(server.url, path, body, arguments.key)
    await asyncio.sleep(SETTLE)
    return await client.metric(server.url, "sfumato_memory_bytes", arguments.key)


async def memory_after(server: Server, arguments: argparse.Namespace) -> float:
    """The same, when all is answered."""
    await asyncio.sleep(SETTLE)
    await idle(server.url, 0.5, arguments.key)
    await asyncio.sleep(SETTLE)
    return await client.metric(server.url, "sfumato_memory_bytes", arguments.key)


async def measure_grammars(server: Server, arguments: argparse.Namespace) -> Record:
    before = await memory_before(server, arguments)
    alone = await idle(server.url, arguments.seconds, arguments.key)
    rows: list[Record] = []
    statuses: Counter[int] = Counter()
    for number, (family, kind, value) in enumerate(hostile_grammars.attacks()):
        more = form(value) if kind == "schema" else {kind: value}
        path, body = chat(seed=1, **more | {"max_tokens": 1000})
        async with bystander(server.url, arguments.key) as one:
            await asyncio.sleep(AROUND)
            began = time.perf_counter()
            status, reply = await send(server.url, path, encoded(body), arguments.key)
            took = time.perf_counter() - began
            await asyncio.sleep(AROUND)
        statuses[status] += 1
        rows.append({"family": family, "number": number, "status": status, "seconds": took, **one.summary()})
        rows[-1] |= {} if status == 200 else {"said": reply}
        milliseconds = ", ".join(f"{rows[-1][name] * 1e3:.0f}" for name in ("median", "worst"))
        say(f"{number} {family}: {status} in {took:.2f} s; bystander, ms, median and worst: {milliseconds}")
    after = await memory_after(server, arguments)
    restarts = await client.metric(server.url, "sfumato_worker_restarts_total", arguments.key)
    summary = alone.summary()
    return {
        "idle": summary,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "grammars": rows,
        "memory": {"before": before, "after": after},
        "targets": {
            "grammars that end in a 5xx or without an answer": common.target(
                sum(count for status, count in statuses.items() if not 200 <= status < 500), 0
            ),
            "restarts of the worker beside hostile grammars": common.target(restarts, 0),
            "bystander's requests that failed beside them": common.target(sum(len(row["failures"]) for row in rows), 0),
            "the slowest median of the bystander, times the idle one": common.target(
                max(row["median"] for row in rows) / summary["median"], 2.0
            ),
            "the slowest of its requests, times the slowest idle one": common.target(
                max(row["worst"] for row in rows) / summary["worst"], 2.0
            ),
            "the worker's memory after hostile grammars, over that before": common.target(after / before, 1.1),
        },
    }


async def measure_fuzz(server: Server, arguments: argparse.Namespace) -> Record:
    await idle(server.url, 2, arguments.key)
    alone = await idle(server.url, arguments.seconds, arguments.key)
    requests = iter(generated(arguments.patterns, arguments.grammars, arguments.seed))
    statuses: Counter[int] = Counter()
    bad: list[str] = []

    async def work() -> None:
        for path, body in requests:
            status, reply = await send(server.url, path, encoded(body), arguments.key)
            statuses[status] += 1
            if not 200 <= status < 500:
                bad.append(f"{status} {reply[:200]} {json.dumps(body)[:500]}")
            if sum(statuses.values()) % 50 == 0:
                say(f"{sum(statuses.values())} sent: {dict(statuses)}")

    before = await memory_before(server, arguments)
    began = time.perf_counter()
    async with bystander(server.url, arguments.key) as one:
        await asyncio.gather(*(work() for _ in range(arguments.clients)))
        took = time.perf_counter() - began
    after = await memory_after(server, arguments)
    restarts = await client.metric(server.url, "sfumato_worker_restarts_total", arguments.key)
    return {
        "patterns": arguments.patterns,
        "grammars": arguments.grammars,
        "seed": arguments.seed,
        "clients": arguments.clients,
        "seconds": took,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "bad": bad[:10],
        "idle": alone.summary(),
        "bystander": {**one.summary(), **client.percentiles(one.seconds)},
        "memory": {"before": before, "after": after},
        "targets": {
            "patterns and grammars that end in a 5xx or without an answer": common.target(len(bad), 0),
            "restarts of the worker in the fuzz": common.target(restarts, 0),
            "bystander's requests that failed in the fuzz": common.target(len(one.failures), 0),
            "the worker's memory after the fuzz, over that before": common.target(after / before, 1.1),
        },
    }


PARTS = {"attacks": measure_attacks, "grammars": measure_grammars, "fuzz": measure_fuzz}


async def measure(arguments: argparse.Namespace) -> None:
    flags = ["-m", "nano", *shlex.split(arguments.server)]
    async with Server(flags, arguments.log / f"hostile-{arguments.part}.log", arguments.url) as server:
        result = await PARTS[arguments.part](server, arguments)
    serve.keep(arguments.part, result, arguments, flags, "under attack")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name in PARTS:
        one = parts.add_parser(name)
        serve.server_options(one, RECORD)
        one.add_argument("--seconds", type=float, default=5, help="for which the idle server is asked first")
        one.add_argument("--seed", type=int, default=1)
        if name == "fuzz":
            one.add_argument("--patterns", type=int, default=500)
            one.add_argument("--grammars", type=int, default=200)
            one.add_argument("--clients", type=int, default=4)
    arguments = parser.parse_args()
    asyncio.run(measure(arguments))
    serve_page.show(json.loads(arguments.output.read_text()), arguments.part)


if __name__ == "__main__":
    main()
