"""What a turn of the batch takes beside its step: Python and small operations of torch, without a server.

    .venv/bin/python benchmarks/turns.py --rows 1,32 -o runs/bench/turns.json

Nano answers puzzles through `Jobs`, as the server's worker does: each that ends makes room for the next. Inside the
step are the passes of the model, the read-out and the soft embedding; outside is everything else that a turn does.
Seconds are CPU seconds of one thread, the least of several rounds, so that neighbours on the machine count for little;
tokens a second follow from them. A last round counts the calls of torch outside the step by name.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.serve import SEED, puzzles, renamed
from sfumato import LLM, Options
from sfumato.engine.jobs import Jobs
from sfumato.engine.limits import BatchLimits
from sfumato.events import Done
from sfumato.model.network import Model
from sfumato.tasks import sudoku
from sfumato.templates.requests import Chat

PASSES = ("encode", "denoise", "encode_and_denoise")


class Inside:
    """Seconds within the step, and whether it runs now."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            began, self.depth = time.thread_time(), self.depth + 1
            try:
                return call(*args, **more)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.thread_time() - began

        return run

    @contextmanager
    def of(self, model: Model) -> Iterator[Inside]:
        """Wrap the passes, read-out and soft embedding of this model."""
        plain, ops = {name: getattr(Model, name) for name in PASSES}, model.ops
        for name, call in plain.items():
            setattr(Model, name, self.timed(call))
        model.use_(replace(ops, read_out=self.timed(ops.read_out), soft_embedding=self.timed(ops.soft_embedding)))
        try:
            yield self
        finally:
            for name, call in plain.items():
                setattr(Model, name, call)
            model.use_(ops)


class Calls(TorchDispatchMode):
    """Calls of torch outside the step, by name."""

    def __init__(self, inside: Inside) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside, self.count = inside, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside.depth:
            self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def answer(
    jobs: Jobs[Chat], prompts: Sequence[str], rows: int, inside: Inside, calls: Calls | None = None
) -> dict[str, Any]:
    """All these, so many at once: tokens, turns, and CPU seconds of turns, of the step in them, and of beginnings."""
    length = jobs.planner.model.config.canvas_length
    waiting, record = list(enumerate(prompts)), Counter[str]()
    seconds, begins, under_way, inside.seconds = 0.0, 0.0, 0, 0.0
    while waiting or under_way:
        began = time.thread_time()
        while waiting and under_way < rows:
            number, prompt = waiting.pop()
            messages = [{"role": "user", "content": prompt}]
            jobs.begin(str(number), Chat(messages, options=Options(max_tokens=length, seed=number)))
            under_way += 1
        turned = time.thread_time()
        if calls is None:
            events = jobs.turn()
        else:
            with calls:
                events = jobs.turn()
        seconds, begins, record["turns"] = (
            seconds + time.thread_time() - turned,
            begins + turned - began,
            record["turns"] + 1,
        )
        for _, event in events:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Done):
                under_way -= 1
                record["tokens"] += event.usage.tokens
                record["steps"] += event.usage.steps
    return {**record, "turn_seconds": seconds, "step_seconds": inside.seconds, "begin_seconds": begins}


def measure(llm: LLM, rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The least outside the step of several rounds, each with prompts that nobody remembers."""
    rng, base = random.Random(SEED), puzzles(arguments.requests)
    jobs, rounds = Jobs(llm, BatchLimits(rows=rows)), []
    with Inside().of(llm.model) as inside:
        for number in range(arguments.rounds + 1):  # the first warms up
            prompts = [sudoku.prompt(renamed(puzzle, rng)) for puzzle in base]
            record = answer(jobs, prompts, rows, inside)
            record["outside_seconds"] = record["turn_seconds"] - record["step_seconds"]
            if number:
                rounds.append(record)
        calls = Calls(inside)
        counted = answer(jobs, [sudoku.prompt(renamed(puzzle, rng)) for puzzle in base], rows, inside, calls)
    best = {name: min(one[name] for one in rounds) for name in ("step_seconds", "outside_seconds", "begin_seconds")}
    turns, all_seconds = rounds[0]["turns"], best["step_seconds"] + best["outside_seconds"]
    return {
        "rows": rows,
        "turns": turns,
        "tokens_per_second": rounds[0]["tokens"] / all_seconds,
        "step_ms_a_turn": 1e3 * best["step_seconds"] / turns,
        "outside_ms_a_turn": 1e3 * best["outside_seconds"] / turns,
        "outside_ms_a_request": 1e3 * best["outside_seconds"] / arguments.requests,
        "begin_ms_a_request": 1e3 * best["begin_seconds"] / arguments.requests,
        "calls_a_turn": calls.count.total() / counted["turns"],
        "calls": {name: round(count / counted["turns"], 2) for name, count in calls.count.most_common()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", default="1,32", help="numbers of rows under way")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ops", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, help="write the record to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    llm = LLM.load("nano", device=arguments.device, dtype=arguments.dtype, ops=arguments.ops)
    record: dict[str, Any] = {"what": "turns", "requests": arguments.requests, "levels": []}
    for rows in map(int, arguments.rows.split(",")):
        common.say(f"{rows} rows")
        record["levels"].append(measure(llm, rows, arguments))
    common.finish(record, arguments)
    print(show(record))


def show(record: dict[str, Any]) -> str:
    head = ("rows", "tokens/s", "step", "outside", "of a request", "its beginning", "calls of torch")
    lines = []
    for one in record["levels"]:
        times = (
            one[f"{name}_ms_a_{of}"] for name, of in (("step", "turn"), ("outside", "turn"), ("outside", "request"))
        )
        row = [str(one["rows"]), f"{one['tokens_per_second']:.0f}", *(f"{value:.2f} ms" for value in times)]
        lines.append([*row, f"{one['begin_ms_a_request']:.2f} ms", f"{one['calls_a_turn']:.0f}"])
    return common.table(head, lines)


if __name__ == "__main__":
    main()
