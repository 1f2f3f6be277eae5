"""Decisions: what a read takes, beside reads of the whole vocabulary and beside an answer that is written; and how many
requests a second a server answers.

    .venv/bin/python benchmarks/decisions.py                          # everything: about ten minutes on two cores
    .venv/bin/python benchmarks/decisions.py --only reads --models mid
    .venv/bin/python benchmarks/decisions.py --quick -o runs/bench/decisions.json

reads: 1, 8 and 64 questions of 2, 16 and 255 options about one state of 512 tokens, through `LLM.decide`: with the
state kept from the call before; with a new state, which is encoded too; the same read with all words unembedded, at the
place that is read and at every place of the canvas; and the same questions answered by one generated JSON object, whose
fields are enums (`LLM.chat` with a schema, `early` and `short`). The ways take turns. shapes: canvases, draws of noise
and steps. rates: short requests, one question each, of clients that wait for their answer, through HTTP or (`direct`)
through `LLM.arun`. Weights are random, so that answers mean nothing, and a generated answer takes all its steps.

Each part replaces its own of the record, which is written whenever something was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import gemma_vocab

from benchmarks import common, decision_texts
from benchmarks.client import Connection, Server, percentiles
from sfumato import LLM, Options
from sfumato.engine.plan import PlanEnd, advance
from sfumato.events import Decisions
from sfumato.measure.machine import ROOT, Timing, environment
from sfumato.measure.parts import Counted
from sfumato.measure.work import duration, pass_work
from sfumato.model.network import Model
from sfumato.questions import Question, record_of
from sfumato.templates.requests import Decide

Record = dict[str, Any]
RECORD = ROOT / "benchmarks" / "results" / "decisions.json"
MID = ROOT / "runs" / "bench" / "mid-decisions"
COUNTS = (1, 8, 64)
STEPS = 12
"""Of a generated answer's canvas: as few as the release takes where it is sure."""
HEAVY = 10_000
"""Tokens of questions in a call above which only the most telling ways are timed, for the sake of minutes: reads with
the state kept and with all words; above twice as many no generated answer; above six times the former alone."""
ENOUGH = 4.0
"""Times the requests of one client after another that many clients should get answered."""


# ---- reads with more unembedded than is needed ----------------------------------------------------------------------


@contextmanager
def replaced(name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A method of every model, for a while."""
    own = getattr(Model, name)
    setattr(Model, name, method)
    try:
        yield
    finally:
        setattr(Model, name, own)


def all_words(model: Model, hidden: Tensor, words_W: Tensor) -> Tensor:
    """In place of `Model.logits_of`: the logits of all words, of which these are taken."""
    return model.logits(hidden)[..., words_W]


_read = Model.read


def read_everywhere(model: Model, *arguments: Any, **more: Any) -> Tensor:
    """In place of `Model.read`: every position of the canvases is read out, as a step of generating does."""
    hidden_BLD = _read(model, *arguments, **more)
    for part_BLD in hidden_BLD.split(max(1, 256 // hidden_BLD.shape[1])):
        temperature_B = torch.ones(len(part_BLD), device=model.device)
        uniform_BL = torch.full(part_BLD.shape[:2], 0.5, device=model.device)
        model.ops.read_out(part_BLD, model.head_VD, model.config.softcap, temperature_B, uniform_BL)
    return hidden_BLD


# ---- reads ----------------------------------------------------------------------------------------------------------


@dataclass
class Asker:
    """Calls `decide` about states of so many tokens with these questions; the state of the last call is known again."""

    llm: LLM
    questions: dict[str, Question]
    tokens: int
    number: int = 0
    last: Decisions | None = None

    @property
    def state(self) -> str:
        return decision_texts.state(self.llm.tokenizer, self.tokens, self.number)

    def again(self, **more: Any) -> None:
        self.last = self.llm.decide(self.state, self.questions, seed=1, **more)

    def anew(self) -> None:
        self.number += 1
        self.again()

    def all_words(self) -> None:
        with replaced("logits_of", all_words):
            self.again()

    def everywhere(self) -> None:
        with replaced("logits_of", all_words), replaced("read", read_everywhere):
            self.again()

    def generated(self) -> Callable[[], Any] | None:
        """The same questions answered in one JSON object; None where the context cannot hold them."""
        prompt, schema = decision_texts.json_request(self.state, self.questions)
        tokenizer, config = self.llm.tokenizer, self.llm.model.config
        longest = {id: max(field["enum"], key=len) for id, field in schema["properties"].items()}
        most = len(tokenizer.encode(json.dumps(longest, indent=1))) + 8
        if len(tokenizer.encode(prompt)) + most + 2 * config.canvas_length > config.max_position:
            return None
        options = Options(schema=schema, max_tokens=most, max_steps=STEPS, early=True, short=True, seed=1)
        self.llm.chat(prompt, options=replace(options, max_steps=1))  # the grammar is compiled once
        return lambda: self.llm.chat(prompt, options=options)


def in_turns(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Timing]:
    """`common.alternate`, whose first round counts where it takes longer than all of them may."""
    each, began = dict(calls), time.perf_counter()
    first = common.alternate(each, 0.0, "cpu", repeats=1, warm=0)
    return first if time.perf_counter() - began > seconds else common.alternate(each, seconds, "cpu", warm=0)


def cell(llm: LLM, kind: str, count: int, arguments: argparse.Namespace) -> Record | None:
    """What these questions take, in every way; None where the vocabulary is too small for them."""
    questions = decision_texts.questions(kind, count, llm.tokenizer)
    if questions is None:
        return None
    lengths = [len(llm.tokenizer.encode(one.text())) for one in questions.values()]
    asker = Asker(llm, questions, arguments.state)
    calls: dict[str, Callable[[], Any]] = {
        "encoded": asker.anew,
        "kept": asker.again,
        "all words": asker.all_words,
        "everywhere": asker.everywhere,
    }
    size = sum(lengths) / arguments.heavy
    if size > 1:
        calls = {name: call for name, call in calls.items() if name == "kept" or (name == "all words" and size <= 6)}
    if size <= 2 and (generated := asker.generated()) is not None:
        calls["generated"] = generated
    one = next(iter(questions.items()))
    Asker(llm, dict([one]), arguments.state).again()  # the state is kept from now on
    times = in_turns(calls, arguments.seconds)
    assert asker.last is not None
    usage = asker.last.usage
    return {
        "questions": count,
        "options": kind,
        "question_tokens": statistics.mean(lengths),
        "canvases": usage.canvases,
        "passes": usage.passes,
        "ways": {
            name: {"seconds": timing.median, "ms_a_read": 1e3 * timing.median / count, "rounds": timing.repeats}
            for name, timing in times.items()
        },
    }


def reads(llm: LLM, arguments: argparse.Namespace) -> Iterator[Record]:
    """The cells of the table so far, after each."""
    cells: list[Record] = []
    for kind in arguments.options.split(","):
        for count in map(int, arguments.counts.split(",")):
            began = time.perf_counter()
            one = cell(llm, kind, count, arguments)
            if one is None:
                common.say(f"{llm.name}: {count} questions of {kind} options: too few words")
                continue
            cells.append(one)
            parts = [f"{name} {way['ms_a_read']:.1f}" for name, way in one["ways"].items()]
            took = time.perf_counter() - began
            common.say(f"{llm.name}: {count} questions of {kind} options, ms a read: {', '.join(parts)} ({took:.0f} s)")
            yield {"state": arguments.state, "steps": STEPS, "cells": cells, **described(llm)}


def described(llm: LLM) -> Record:
    config = llm.model.config
    return {
        "ops": llm.model.ops.name,
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "layers": len(config.layers),
        "vocabulary": config.vocab_size,
        "canvas": config.canvas_length,
    }


# ---- canvases, draws, steps -----------------------------------------------------------------------------------------


def shapes(llm: LLM, arguments: argparse.Namespace) -> Iterator[Record]:
    """One and eight questions of 16 options on other canvases, with more draws of noise, in more steps."""
    whole = llm.model.config.canvas_length
    ways: dict[str, Record] = {
        "one draw, one step": {},
        f"a canvas of {whole}": {"canvas": whole},
        "4 draws": {"samples": 4},
        "16 draws": {"samples": 16},
        "2 steps": {"steps": 2},
        "4 steps": {"steps": 4},
    }
    rows: list[Record] = []
    for count in (1, 8):
        questions = decision_texts.questions("16", count, llm.tokenizer)
        assert questions is not None
        asker = Asker(llm, questions, arguments.state)
        asker.anew()
        calls = {name: partial(asker.again, **more) for name, more in ways.items()}
        times = in_turns(calls, arguments.seconds)
        for name, timing in times.items():
            rows.append({"questions": count, "way": name, "ms_a_read": 1e3 * timing.median / count})
        common.say(f"{llm.name}: {count} questions: " + ", ".join(f"{r['way']} {r['ms_a_read']:.1f} ms" for r in rows))
        yield {"state": arguments.state, "rows": rows, **described(llm)}


# ---- requests a second ----------------------------------------------------------------------------------------------

STATES = ("one state", "a state a client", "a new state each time")
"""What the clients ask about."""
Send = Callable[[int, str, Question], Awaitable[None]]
"""Sends the request of a client, with this state and question, and waits for its answer."""


async def load(send: Send, texts: Callable[[int], str], clients: int, seconds: float) -> tuple[list[float], float]:
    """The seconds that each answer took, of so many clients who ask again and again, and those of it all."""
    latencies: list[float] = []
    numbers = itertools.count()
    until = time.perf_counter() + seconds

    async def one(number: int) -> None:
        while time.perf_counter() < until:
            question = decision_texts.three(next(numbers))
            text, began = texts(number), time.perf_counter()
            await send(number, text, question)
            latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*map(one, range(clients)))
    return latencies, time.perf_counter() - began


async def rates(name: str, send: Send, tokenizer: Any, arguments: argparse.Namespace) -> Record:
    """Requests a second and latencies, by what the states are and the number of clients, which take turns."""
    levels = [int(level) for level in arguments.clients.split(",")]
    numbers = itertools.count(1000)
    fixed = [decision_texts.state(tokenizer, arguments.short_state, n) for n in range(max(levels))]
    fresh: Callable[[int], str] = lambda _: decision_texts.state(tokenizer, arguments.short_state, next(numbers))  # noqa: E731
    texts: dict[str, Callable[[int], str]] = dict(
        zip(STATES, (lambda _: fixed[0], fixed.__getitem__, fresh), strict=True)
    )
    rounds: dict[tuple[str, int], list[tuple[list[float], float]]] = {}
    for number in range(arguments.rounds + 1):
        for states, text in texts.items():
            for level in levels:
                one = await load(send, text, level, arguments.rate_seconds if number else arguments.rate_seconds / 4)
                if number:  # the first round warms up
                    rounds.setdefault((states, level), []).append(one)
    rows: list[Record] = []
    for (states, level), results in rounds.items():
        per_second = [len(latencies) / took for latencies, took in results]
        pooled = [seconds for latencies, _ in results for seconds in latencies]
        rows.append(
            {
                "states": states,
                "clients": level,
                "requests_per_second": statistics.median(per_second),
                "requests": len(pooled),
                "latency_seconds": percentiles(pooled),
            }
        )
        common.say(f"{name}: {states}, {level} clients: {rows[-1]['requests_per_second']:.1f} requests/s")
    result: Record = {"state": arguments.short_state, "rows": rows, "targets": {}}
    for states in STATES:
        per_second = [row["requests_per_second"] for row in result["rows"] if row["states"] == states]
        what = f"{states}: requests/s of {levels[-1]} clients, times those of one"
        result["targets"][what] = common.target(per_second[-1] / per_second[0], ENOUGH, at_most=False)
    return result


def floors(llm: LLM, arguments: argparse.Namespace) -> Record:
    """The least that the pass of one such read takes on this machine, alone and as one of so many in a pass."""
    clients = int(arguments.clients.split(",")[-1])
    if arguments.most is None:
        arguments.most = common.ceiling(arguments, 0.25)
    text = decision_texts.state(llm.tokenizer, arguments.short_state, 0)
    asks = advance(llm.plan(Decide(text, {"team": decision_texts.three(0)}, options=Options(seed=1))))
    assert not isinstance(asks, PlanEnd)
    reads, counted = asks[0].request.reads, Counted.of(llm.model)
    assert reads is not None
    positions, context = reads.longest, len(asks[0].request.prompt)
    least = [
        pass_work(counted.config, counted.weights, positions, context, batch=rows).seconds(arguments.most) / rows
        for rows in (1, clients)
    ]
    return {"positions": positions, "context": context, "alone_seconds": least[0], "together_seconds": least[1]}


def direct_rates(llm: LLM, arguments: argparse.Namespace) -> Iterator[Record]:
    """In this process, without a server."""
    floor = floors(llm, arguments)

    async def send(_: int, text: str, question: Question) -> None:
        await llm.arun(Decide(text, {"team": question}, options=Options(seed=1)))

    yield {**asyncio.run(rates(f"{llm.name}, direct", send, llm.tokenizer, arguments)), "floor": floor}


async def served_rates(name: str, tokenizer: Any, arguments: argparse.Namespace) -> Record:
    """Through HTTP: the server and the clients share the machine."""
    model = str(decision_texts.checkpoint_of_mid(MID).relative_to(ROOT)) if name == "mid" else name
    flags = ["-m", model]
    async with Server(flags, ROOT / "runs" / "bench" / f"decisions-{name}.log") as server:
        connections: dict[int, Connection] = {}

        async def send(number: int, text: str, question: Question) -> None:
            connection = connections.setdefault(number, Connection(server.url))
            body = {"model": "jev-latest", "state": text, "questions": {"team": record_of(question)}}
            answer = await connection.ask("POST", "/v1/systemone", body)
            if answer.status != 200:
                raise SystemExit(f"/v1/systemone answered {answer.status}: {answer.body[:300]!r}")

        return await rates(f"{name}, HTTP", send, tokenizer, arguments)


# ---- the command ----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[LLM, argparse.Namespace], Iterator[Record]]] = {
    "reads": reads,
    "shapes": shapes,
    "direct": direct_rates,
}
"""What measures each part, apart from "http"."""


def keep(record: Record, part: str, name: str, result: Record, arguments: argparse.Namespace) -> None:
    """Replace one part of the record, and write it."""
    here = environment(arguments.device)
    record.setdefault(part, {})[name] = {**result, "environment": here}
    record["environment"] = here
    if arguments.output:
        common.write(arguments.output, record)


def main() -> None:
    parser = common.argument_parser(__doc__, 2.0)
    parser.add_argument("--only", default="reads,shapes,direct,http", help="the parts to measure")
    parser.add_argument("--models", default="mid,slice", help="of reads and shapes: mid, slice, toy, or a checkpoint")
    parser.add_argument("--rated", default="nano,mid", help="the models whose requests a second are counted")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="of questions in a call")
    parser.add_argument("--options", default=",".join(decision_texts.KINDS), help="of a question")
    parser.add_argument("--state", type=int, default=512, help="tokens")
    parser.add_argument("--short-state", type=int, default=64, help="tokens of a state whose requests are counted")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rate-seconds", type=float, default=2.0, help="a round of so many clients")
    parser.add_argument("--layers", type=int, default=2, help="of the slice")
    parser.add_argument("--recipe", default="", help="of the slice's weights; bfloat16 without")
    parser.add_argument("--vocabulary", type=Path, help="Gemma 4's GGUF vocabulary; default: the shared file")
    parser.add_argument("--heavy", type=int, default=HEAVY, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a toy, to see that everything runs")
    parser.set_defaults(output=RECORD, most=None)
    arguments = parser.parse_args()
    if arguments.quick:
        small: Record = {"models": "toy", "rated": "toy", "seconds": 0.01, "state": 64, "short_state": 16}
        small |= {"counts": "1,4", "rounds": 1, "rate_seconds": 0.02, "clients": "1,2", "streamed": 1 << 20}
        vars(arguments).update(small)
    if arguments.vocabulary:
        gemma_vocab.FILE = arguments.vocabulary
    record = measure(arguments)
    print(page(record, common.table))


def measure(arguments: argparse.Namespace) -> Record:
    """The record, with the parts that are asked for measured anew."""
    output = arguments.output
    record: Record = {"what": "decisions"}
    if output.exists():
        record = json.loads(output.read_text(encoding="utf-8"))
    parts, rated = arguments.only.split(","), arguments.rated.split(",")
    for name in filter(None, dict.fromkeys([*arguments.models.split(","), *rated])):
        common.say(f"{name}: loading")
        llm = decision_texts.model_of(name, arguments.device, arguments.layers, arguments.recipe)
        for part, function in PARTS.items():
            if part in parts and name in (rated if part == "direct" else arguments.models.split(",")):
                with torch.inference_mode():
                    for result in function(llm, arguments):
                        keep(record, part, name, result, arguments)
        tokenizer, is_served = llm.tokenizer, "http" in parts and name in rated
        floor = floors(llm, arguments) if is_served else None
        llm.close()
        del llm
        common.release()
        if is_served:
            result = asyncio.run(served_rates(name, tokenizer, arguments))
            keep(record, "http", name, {**result, "floor": floor}, arguments)
    return record


# ---- tables ---------------------------------------------------------------------------------------------------------

WAYS = {
    "kept": "state kept",
    "encoded": "state encoded too",
    "all words": "whole vocabulary",
    "everywhere": "at every place",
    "generated": "generated JSON",
}


Table = Callable[[list[str], list[list[str]]], str]


def page(record: Record, table: Table) -> str:
    """The record's tables."""
    texts = [reads_table(name, one, table) for name, one in record.get("reads", {}).items()]
    texts += [shapes_table(name, one, table) for name, one in record.get("shapes", {}).items()]
    for part, through in (("http", "HTTP"), ("direct", "`LLM.arun`")):
        texts += [rates_table(f"{name}, through {through}", one, table) for name, one in record.get(part, {}).items()]
    return "\n\n".join(texts)


def reads_table(name: str, one: Record, table: Table) -> str:
    title = f"{name}, {one['layers']} layers, {one['dtype']}, a state of {one['state']} tokens; ms a read"
    lines = []
    for row in one["cells"]:
        what = f"{row['questions']} × {row['options']} options, {row['question_tokens']:.0f} tokens each"
        ways = [row["ways"].get(way) for way in WAYS]
        lines.append([what, *("–" if way is None else f"{way['ms_a_read']:.1f}" for way in ways)])
    return table([title, *WAYS.values()], lines)


def shapes_table(name: str, one: Record, table: Table) -> str:
    by_way: dict[str, list[str]] = {}
    for row in one["rows"]:
        by_way.setdefault(row["way"], []).append(f"{row['ms_a_read']:.1f}")
    head = [f"{name}, 16 options; ms a read", "1 question", "8 questions"]
    return table(head[: 1 + len(next(iter(by_way.values())))], [[way, *row] for way, row in by_way.items()])


def rates_table(name: str, one: Record, table: Table) -> str:
    head = [f"{name}, states of {one['state']} tokens", "clients", "requests/s", "p50", "p99"]
    lines = [
        [
            row["states"],
            str(row["clients"]),
            f"{row['requests_per_second']:.1f}",
            *(duration(row["latency_seconds"][p]) for p in ("p50", "p99")),
        ]
        for row in one["rows"]
    ]
    floor, most = one["floor"], max(row["clients"] for row in one["rows"])
    alone, together = floor["alone_seconds"], floor["together_seconds"]
    what = f"{floor['positions']} positions behind {floor['context']}"
    return (
        f"{table(head, lines)}\n\nBy the ceilings of this machine the pass of one such read, {what}, takes "
        f"{duration(alone)} at least, and that of {most} takes {duration(together)} for each: {alone / together:.1f} "
        "times the reads."
    )


if __name__ == "__main__":
    main()
