"""What busy neighbours cost: a Sudoku, a step and a request, beside 0, 1 and 3 processes that never rest.

    .venv/bin/python benchmarks/neighbours.py
    .venv/bin/python benchmarks/neighbours.py --of before=../old --of after=.    # two checkouts, in turns

Each part runs in a process of its own, as a user's program would: nano in this process, one puzzle after another; steps
of the half-billion model "mid" in bfloat16; `sfumato serve` with nano and one client. The neighbours are Python loops;
they start before the part and end after it. A figure is the median over all rounds, and where the slowest tenth begins.
Needs about three minutes for one checkout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "neighbours.json"
BUSY = (0, 1, 3)
PUZZLES, REQUESTS, WARM = 16, 16, 3
SEED, CLUES = 6, 36


# ---- the parts, each in a process of its own ------------------------------------------------------------------------


def puzzles(count: int) -> list[str]:
    import numpy as np

    from sfumato.tasks import sudoku

    rng = np.random.default_rng(SEED)
    return [sudoku.generate(CLUES, rng) for _ in range(count)]


def timed(calls: Iterator[Callable[[], Any]], seconds: float) -> list[float]:
    """Seconds of each call, those that warm up left out, until the time is up."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    for number, call in enumerate(calls):
        began = time.perf_counter()
        call()
        if number >= WARM:
            times.append(time.perf_counter() - began)
        if time.perf_counter() > until and times:
            break
    return times


def run_sudoku(seconds: float) -> list[float]:
    from sfumato import LLM, Options
    from sfumato.tasks import sudoku

    llm = LLM.load("nano")

    def solve(puzzle: str, seed: int) -> Callable[[], Any]:
        messages = [{"role": "user", "content": sudoku.prompt(puzzle)}]
        return lambda: llm.chat(messages, options=Options(seed=seed))

    calls = (solve(puzzle, seed) for seed, puzzle in enumerate(puzzles(PUZZLES + WARM)))
    return timed(calls, seconds)


def run_step(seconds: float) -> list[float]:
    from sfumato.measure import parts  # first: it is the package that says how threads wait, before torch is imported

    # isort: split
    import torch

    from benchmarks.step import Steps

    step = Steps(parts.random_model(parts.random_config("mid"), torch.bfloat16, "cpu", "auto"), 64)
    return timed((step for _ in range(1000)), seconds)


def run_request(seconds: float) -> list[float]:
    from benchmarks.client import Connection, Server
    from sfumato.tasks import sudoku

    async def ask() -> list[float]:
        times: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            async with Server(["-m", "nano"], Path(folder) / "log") as server:
                with Connection(server.url) as connection:
                    until = time.perf_counter() + seconds
                    for number, puzzle in enumerate(puzzles(REQUESTS + WARM)):
                        messages = [{"role": "user", "content": sudoku.prompt(puzzle)}]
                        body = {"messages": messages, "seed": number}
                        began = time.perf_counter()
                        answer = await connection.ask("POST", "/v1/chat/completions", body)
                        if answer.status != 200:
                            raise SystemExit(f"the server answered {answer.status}: {answer.body[:300]!r}")
                        if number >= WARM:
                            times.append(time.perf_counter() - began)
                        if time.perf_counter() > until and times:
                            break
        return times

    return asyncio.run(ask())


PARTS: dict[str, tuple[str, Callable[[float], list[float]]]] = {
    "sudoku": ("a Sudoku, nano", run_sudoku),
    "step": ("a step, mid in bf16", run_step),
    "request": ("a request, nano", run_request),
}


# ---- the neighbours, and the table ----------------------------------------------------------------------------------


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute without a pause."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(part: str, tree: Path, seconds: float) -> list[float]:
    """The seconds of a part with the package of this checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--tree", str(tree)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [*command, "--seconds", str(seconds)], env=environment, stdout=subprocess.PIPE, check=True, timeout=900
    )
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def row(times: list[float]) -> dict[str, Any]:
    ordered = sorted(times)
    slow = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return {"median": statistics.median(times), "slowest_tenth": slow, "count": len(times)}


def record(trees: dict[str, Path], rounds: int, seconds: float) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for count in BUSY:
        for part, (title, _) in PARTS.items():
            times: dict[str, list[float]] = {label: [] for label in trees}
            for number in range(rounds):
                order = list(trees) if number % 2 == 0 else list(trees)[::-1]
                for label in order:
                    with neighbours(count):
                        times[label] += measure(part, trees[label], seconds)
            result = {label: row(some) for label, some in times.items()}
            rows.append({"neighbours": count, "part": part, "title": title, "times": result})
            print(f"neighbours: {count} busy, {title}: {brief(result)}", file=sys.stderr, flush=True)
    return {"what": "neighbours", "rounds": rounds, "seconds": seconds, "rows": rows}


def brief(result: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{label} {1e3 * one['median']:.0f} ms" for label, one in result.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--of", action="append", metavar="LABEL=FOLDER", help="a checkout; several are measured in turns"
    )
    parser.add_argument("--rounds", type=int, default=2, help="of every part, each in a new process")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a part, at most")
    parser.add_argument("-o", "--output", type=Path, default=RECORD)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.tree))
    if arguments.part:
        print(json.dumps(PARTS[arguments.part][1](arguments.seconds)))
        return
    from sfumato.measure.machine import environment

    pairs = [one.partition("=") for one in arguments.of or [f"now={ROOT}"]]
    trees = {label: Path(folder).resolve() for label, _, folder in pairs}
    result = {**record(trees, arguments.rounds, arguments.seconds), "environment": environment()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
