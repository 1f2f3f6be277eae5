"""The server under load: throughput, time to the first text, and whether a seed's text depends on the neighbours.

    .venv/bin/python benchmarks/serve.py throughput        # nano; 1 to 32 clients in turns, round after round
    .venv/bin/python benchmarks/serve.py throughput-bf16   # the same in bfloat16
    .venv/bin/python benchmarks/serve.py throughput-tokens # and one token after another, without a canvas
    .venv/bin/python benchmarks/serve.py first         # mid, random: a short request, alone and beside 8 long answers
    .venv/bin/python benchmarks/serve.py same          # nano, reference operations: 200 seeds, alone and all at once
    .venv/bin/python benchmarks/serve.py draw          # docs/serve.png and docs/soak.png, from the record

Each part starts `sfumato serve` itself (`--server` adds to its flags), or takes the one at `--url`, and replaces its
own part of one record, so that a part can be measured again; benchmarks/soak.py adds another. Times are a client's,
and the client (benchmarks/client.py) runs on the same cores as the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import client, common, serve_page
from benchmarks.client import Answer, Connection, Failed, Server, percentiles, say
from sfumato.measure.machine import ROOT, environment
from sfumato.tasks import sudoku

RECORD = ROOT / "benchmarks" / "results" / "serve.json"
CLUES = range(30, 56)
SEED = 6
Body = dict[str, Any]
Record = dict[str, Any]


# ---- requests -------------------------------------------------------------------------------------------------------


def puzzles(count: int, seed: int = SEED) -> list[str]:
    rng = np.random.default_rng(seed)
    return [sudoku.generate(int(clues), rng) for clues in rng.integers(CLUES.start, CLUES.stop, count)]


def renamed(puzzle: str, rng: random.Random) -> str:
    """As hard as it was, and no prompt that anybody remembers."""
    return puzzle.translate(str.maketrans("123456789", "".join(rng.sample("123456789", 9))))


def chat(text: str, **options: Any) -> Body:
    return {"messages": [{"role": "user", "content": text}], **options}


STREAM = {"stream": True, "stream_options": {"include_usage": True}}


async def load(url: str, bodies: Sequence[Body], clients: int, key: str | None) -> tuple[list[Answer | Failed], float]:
    """Every chat request answered, by so many clients at once, each with one connection; and the seconds of it all."""
    result: list[Answer | Failed] = [Failed("never sent")] * len(bodies)
    queue = iter(enumerate(bodies))

    async def one() -> None:
        with Connection(url, key) as connection:
            for number, body in queue:
                try:
                    result[number] = await connection.ask("POST", "/v1/chat/completions", body)
                except Failed as error:
                    result[number] = error

    began = time.monotonic()
    await asyncio.gather(*(one() for _ in range(clients)))
    return result, time.monotonic() - began


def is_whole(answer: Answer | Failed) -> bool:
    """A stream that ended as one should."""
    return isinstance(answer, Answer) and answer.error() is None and [e for _, e in answer.events][-1:] == [client.END]


# ---- throughput -----------------------------------------------------------------------------------------------------


async def throughput(server: Server, arguments: argparse.Namespace) -> Record:
    """The same puzzles, their digits renamed each time, for every number of clients in turn, round after round."""
    length = (await client.card(server.url, arguments.key))["canvas_length"]
    base, rng = puzzles(arguments.requests), random.Random(SEED)
    levels = [int(level) for level in arguments.clients.split(",")]
    rows: dict[int, list[Record]] = {level: [] for level in levels}
    for number in range(arguments.rounds + 1):
        for level in levels:
            these = [renamed(puzzle, rng) for puzzle in base]
            if not number:
                these = these[: 2 * level]  # to warm up
            more = {"max_tokens": length, **options_of(arguments), **STREAM}
            bodies = [chat(sudoku.prompt(p), seed=n, **more) for n, p in enumerate(these)]
            answers, seconds = await load(server.url, bodies, level, arguments.key)
            row = summary(answers, these, seconds)
            say(
                f"round {number} of {arguments.rounds}, {level} clients: {row['tokens_per_second']:.0f} tokens/s, "
                f"{row['errors']} errors"
            )
            if number:
                rows[level].append(row)
    one, most = rows[levels[0]], rows[levels[-1]]
    ratios = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in zip(one, most, strict=True)]
    worker = server.worker()
    what = f"tokens/s of nano with {levels[-1]} clients, times that with {levels[0]}"
    return {
        "requests": arguments.requests,
        "rounds": arguments.rounds,
        "options": options_of(arguments),
        "clues": [CLUES.start, CLUES.stop - 1],
        "levels": [{"clients": level, **pooled(rows[level])} for level in levels],
        "ratios": ratios,
        "worker_bytes": worker and client.resident_bytes(worker),
        "server_bytes": server.pid and client.resident_bytes(server.pid),
        "targets": {
            what: common.target(statistics.median(ratios), 3.0, at_most=False),
            "requests that failed": common.target(sum(row["errors"] for each in rows.values() for row in each), 0),
        },
    }


def options_of(arguments: argparse.Namespace) -> Record:
    """The options that the command line adds to requests."""
    pairs = (option.split("=", 1) for option in arguments.option)
    return {name: json.loads(value) for name, value in pairs}


def summary(answers: Sequence[Answer | Failed], arguments: Sequence[str], seconds: float) -> Record:
    """Of one round; `arguments` are the puzzles."""
    whole = [(puzzle, a) for puzzle, a in zip(arguments, answers, strict=True) if isinstance(a, Answer) and is_whole(a)]
    tokens = sum(a.usage().get("completion_tokens", 0) for _, a in whole)
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "errors": len(answers) - len(whole),
        "solved": sum(sudoku.is_solved("".join(a.text().split())[:81], puzzle) for puzzle, a in whole),
        "cached_tokens": sum(
            (a.usage().get("prompt_tokens_details") or {}).get("cached_tokens") or 0 for _, a in whole
        ),
        "latencies": [a.seconds for _, a in whole],
        "firsts": [first for _, a in whole if (first := a.first_seconds) is not None],
    }


def pooled(rows: Sequence[Record]) -> Record:
    """Of all rounds: the median of the speeds; percentiles over every request."""
    rates = [row["tokens_per_second"] for row in rows]
    answered = sum(len(row["latencies"]) for row in rows)
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_of_rounds": rates,
        "latency_seconds": percentiles([s for row in rows for s in row["latencies"]]),
        "first_text_seconds": percentiles([s for row in rows for s in row["firsts"]]),
        "answered": answered,
        "errors": sum(row["errors"] for row in rows),
        "solved": sum(row["solved"] for row in rows) / max(1, answered),
        "cached_tokens": sum(row["cached_tokens"] for row in rows),
    }


# ---- time to the first text -----------------------------------------------------------------------------------------


def make_mid(folder: Path) -> None:
    """The random model of half a billion parameters as a checkpoint. It never ends an answer by itself. Its vocabulary
    is nano's and then words that nothing says, so that every token has a text."""
    import torch

    from sfumato.checkpoints.locate import NANO
    from sfumato.checkpoints.save import save
    from sfumato.measure.parts import random_config, random_model

    config = random_config("mid")
    say(f"writing mid to {folder}, once")
    model = common.without_eos(random_model(config, torch.bfloat16, "cpu", "reference"))
    with tempfile.TemporaryDirectory() as beside:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (Path(beside) / name).write_bytes((NANO / name).read_bytes())
        words = json.loads((NANO / "tokenizer.json").read_text())
        known = words["model"]["vocab"]
        known |= {f"▁w{n}": n for n in range(len(known), config.vocab_size)}
        (Path(beside) / "tokenizer.json").write_text(json.dumps(words))
        save(model, folder, tokenizer_from=beside, generation={})


async def first(server: Server, arguments: argparse.Namespace) -> Record:
    """A new short request again and again: on the idle server, beside long answers, and so on in turns."""
    rng = random.Random(SEED)
    length = (await client.card(server.url, arguments.key))["canvas_length"]
    short = {"max_tokens": arguments.tokens, "max_steps": arguments.steps, **options_of(arguments)}
    result: dict[str, list[float]] = {"idle": [], "beside": []}

    async def one(where: str, keep: bool = True) -> None:
        await asyncio.sleep(rng.random() * arguments.pause)  # so that it comes at any point of a step
        prompt = f"Say {rng.randrange(10**6)}."
        body = chat(prompt, seed=rng.randrange(10**6), **short, **STREAM)
        with Connection(server.url, arguments.key) as connection:
            answer = await connection.ask("POST", "/v1/chat/completions", body)
        if not is_whole(answer) or answer.first_seconds is None:
            raise SystemExit(f"a short request failed: {answer.error() or answer.events[-2:]}")
        if keep:
            result[where].append(answer.first_seconds)
            say(f"{where} {len(result[where])}: first text after {answer.first_seconds:.2f} s")

    for number in range(arguments.rounds + 1):
        keep, repeats = number > 0, arguments.repeats if number else 1  # the first round warms up
        for _ in range(repeats):
            await one("idle", keep)
        bodies = [
            chat(
                f"Count from {rng.randrange(10**6)} on.",
                max_tokens=arguments.long * length,
                max_steps=arguments.steps,
                seed=n,
            )
            for n in range(arguments.others)
        ]
        others = [asyncio.create_task(long_answer(server.url, body, arguments.key)) for body in bodies]
        try:
            while await client.metric(server.url, "sfumato_rows", arguments.key) < arguments.others:
                raise_if_ended(others)
                await asyncio.sleep(0.2)
            for _ in range(repeats):
                await one("beside", keep)
                raise_if_ended(others)
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        if await client.until_idle(server.url, arguments.key) is None:
            raise SystemExit("rows of requests that were left are still taken after 30 s")
    ratio = statistics.median(result["beside"]) / statistics.median(result["idle"])
    what = f"time to first text of mid beside {arguments.others} long answers, times that on an idle server"
    return {
        "others": arguments.others,
        "short": short,
        "steps": arguments.steps,
        **{
            where: {"median": statistics.median(times), "p95": client.percentile(times, 0.95), "seconds": times}
            for where, times in result.items()
        },
        "targets": {what: common.target(ratio, 2.0)},
    }


async def long_answer(url: str, body: Body, key: str | None) -> Answer:
    with Connection(url, key) as connection:
        return await connection.ask("POST", "/v1/chat/completions", {**body, **STREAM})


def raise_if_ended(tasks: Sequence[asyncio.Task[Answer]]) -> None:
    """Without the others, nothing is measured."""
    for task in tasks:
        if task.done():
            answer = task.result()
            raise SystemExit(f"a long answer ended too soon (give a larger --long): {answer.error() or answer.usage()}")


# ---- same seed, same text -------------------------------------------------------------------------------------------


def mixed(count: int, length: int, rng: random.Random) -> Iterator[tuple[str, Body]]:
    """Requests with seeds, of many kinds: paths and bodies."""
    base = puzzles(count, rng.randrange(1 << 30))
    for number, puzzle in enumerate(base):
        text, seed = sudoku.prompt(puzzle), rng.randrange(1 << 40)
        one = chat(text, max_tokens=length, seed=seed)
        kinds: list[tuple[str, Body]] = [
            ("/v1/chat/completions", one),
            ("/v1/chat/completions", {**one, "temperature": 0.7, "max_steps": 8}),
            ("/v1/chat/completions", {**one, "t_max": 1.5, "entropy_bound": 0.3, "early": True}),
            ("/v1/chat/completions", {**one, "n": 2, "stop": ["77"]}),
            ("/v1/chat/completions", chat(text, max_tokens=3 * length, min_tokens=2 * length, seed=seed)),
            ("/v1/chat/completions", {**one, "regex": "[1-9]{20,30}"}),
            ("/v1/completions", {"prompt": text * rng.randrange(1, 12), "max_tokens": 2 * length, "seed": seed}),
            ("/v1/infill", {"prefix": text[:40], "suffix": text[50:], "length": 10, "seed": seed}),
        ]
        yield kinds[number % len(kinds)]


def content(answer: Answer) -> Any:
    """All that a seed decides."""
    result = answer.json()
    if "choices" in result:
        return [[c.get("message", {}).get("content"), c.get("text"), c.get("finish_reason")] for c in result["choices"]]
    return result.get("text")


async def same(server: Server, arguments: argparse.Namespace) -> Record:
    """Each alone; then all at once in another order, among others."""
    rng = random.Random(SEED)
    length = (await client.card(server.url, arguments.key))["canvas_length"]
    requests = list(mixed(arguments.requests, length, rng))
    began, alone = time.monotonic(), []
    with Connection(server.url, arguments.key) as connection:
        for number, (path, body) in enumerate(requests):
            answer = await connection.ask("POST", path, body)
            if answer.status != 200:
                raise SystemExit(f"{path} answered {answer.status} to {json.dumps(body)[:300]}: {answer.error()}")
            alone.append(content(answer))
            if number % 20 == 19:
                say(f"alone: {number + 1} of {len(requests)}")
    between = time.monotonic()
    order = [*enumerate(requests), *((None, one) for one in mixed(arguments.others, length, rng))]
    rng.shuffle(order)
    beside: dict[int, Any] = {}

    async def one(number: int | None, path: str, body: Body) -> None:
        with Connection(server.url, arguments.key) as own:
            answer = await own.ask("POST", path, body)
        if number is not None:
            beside[number] = content(answer) if answer.status == 200 else answer.error()
            if len(beside) % 20 == 0:
                say(f"all at once: {len(beside)} of {len(requests)}")

    await asyncio.gather(*(one(number, *request) for number, request in order))
    differing = [n for n in range(len(requests)) if beside[n] != alone[n]]
    for n in differing[:3]:
        say(f"{requests[n][0]} {json.dumps(requests[n][1])[:200]}\n  alone  {alone[n]}\n  beside {beside[n]}")
    share = 1 - len(differing) / len(requests)
    return {
        "requests": len(requests),
        "others": arguments.others,
        "alone_seconds": between - began,
        "at_once_seconds": time.monotonic() - between,
        "identical": share,
        "differing": [{"request": requests[n], "alone": alone[n], "beside": beside[n]} for n in differing[:10]],
        "targets": {"texts that are the same alone and under load": common.target(share, 1.0, at_most=False)},
    }


# ---- the record -----------------------------------------------------------------------------------------------------


def keep(part: str, result: Record, arguments: argparse.Namespace, flags: Sequence[str], what: str = "serve") -> None:
    """Replace one part of the record."""
    record = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"what": what}
    here = environment("cpu")
    record[part] = {**result, "server": shlex.join(flags), "environment": here}
    record["environment"] = here
    common.write(arguments.output, record)
    say(f"kept the part {part} in {arguments.output.name}")


# ---- the command ----------------------------------------------------------------------------------------------------

MID = "runs/bench/mid"
PARTS: dict[str, tuple[Callable[[Server, argparse.Namespace], Awaitable[Record]], list[str]]] = {
    "throughput": (throughput, ["-m", "nano"]),
    "throughput-bf16": (throughput, ["-m", "nano", "--dtype", "bfloat16"]),
    "throughput-tokens": (throughput, ["-m", "nano", "--dtype", "bfloat16"]),
    "first": (first, ["-m", MID]),
    "same": (same, ["-m", "nano", "--ops", "reference", "--dtype", "float32", "--queue", "2048"]),
}
"""What measures each part, and how its server is started."""


def server_options(parser: argparse.ArgumentParser, record: Path = RECORD) -> None:
    parser.add_argument("--url", help="a server that runs; default: one is started, and ended")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--server", default="", metavar="FLAGS", help="more flags for `sfumato serve`")
    parser.add_argument("--log", type=Path, default=Path("runs/bench"), help="a folder for the server's log")
    parser.add_argument("-o", "--output", type=Path, default=record, help="the record")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name in PARTS:
        one = parts.add_parser(name)
        server_options(one)
        if name != "first":
            one.add_argument("--requests", type=int, default={"same": 200, "throughput-tokens": 96}.get(name, 512))
        if name != "same":
            one.add_argument("--rounds", type=int, default=3)
        is_slow = name == "throughput-tokens"
        if name.startswith("throughput"):
            levels = "1,32" if is_slow else "1,2,4,8,16,32"
            one.add_argument("--clients", default=levels, help="numbers of clients; first and last are compared")
        else:
            one.add_argument("--others", type=int, default=8 if name == "first" else 40, help="other requests beside")
        if name != "same":
            preset = ['mode="autoregressive"'] if is_slow else []
            one.add_argument(
                "--option", action="append", default=preset, metavar="NAME=JSON", help="of the requests timed"
            )
        if name == "first":
            one.add_argument("--repeats", type=int, default=4, help="short requests a round, idle and beside")
            one.add_argument("--tokens", type=int, default=64, help="of a short answer")
            one.add_argument("--long", type=int, default=40, help="canvases of a long answer")
            one.add_argument("--steps", type=int, default=12, help="a canvas")
            one.add_argument("--pause", type=float, default=1.0, help="seconds at most between short requests")
    one = parts.add_parser("draw")
    one.add_argument("-o", "--output", type=Path, default=RECORD, help="the record")
    one.add_argument("--folder", type=Path, default=ROOT / "docs", help="where the pictures go")
    arguments = parser.parse_args()
    if arguments.part != "draw":
        asyncio.run(measure(arguments))
    record = json.loads(arguments.output.read_text())
    if arguments.part == "draw":
        serve_page.draw(record, arguments.folder)
    else:
        serve_page.show(record, arguments.part)


async def measure(arguments: argparse.Namespace) -> None:
    part, flags = PARTS[arguments.part]
    flags = [*flags, *shlex.split(arguments.server)]
    if arguments.part == "first" and not arguments.url and not (ROOT / MID).exists():
        make_mid(ROOT / MID)
    async with Server(flags, arguments.log / f"serve-{arguments.part}.log", arguments.url) as server:
        keep(arguments.part, await part(server, arguments), arguments, flags)


if __name__ == "__main__":
    main()
