"""Answers that arrive early: time to the first committed text and to the end, with the reference setting, with
`early`, and with `early` and `short`, for answers of 10, 40, 120 and 256 tokens.

    .venv/bin/python benchmarks/early.py -o benchmarks/results/early.json

mid: random weights, which never settle, so that all steps of the cap are taken: once at the default cap (48; a short
canvas is given no more steps than it has positions), once at an equal number of steps. nano: whole Sudokus, where
early answers may cost right ones, and budgets below a canvas. The settings take turns; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.nano import puzzles
from sfumato import LLM, Options
from sfumato.engine.run import generate
from sfumato.evals.sudoku import request
from sfumato.events import Commit, Done
from sfumato.measure.parts import random_config, random_model
from sfumato.measure.work import duration
from sfumato.model.network import Model
from sfumato.tasks import sudoku

SETTINGS: dict[str, dict[str, Any]] = {
    "reference": {},
    "early": {"early": True},
    "short": {"early": True, "short": True},
}
"""`short` makes no difference to an answer that fills a canvas."""
SEED = 5


def one(events: Any) -> tuple[float, float, Done]:
    """Seconds to the first committed text and to the end."""
    done = next(event for event in events if isinstance(event, Done))
    return done.usage.first_commit_seconds or done.usage.seconds, done.usage.seconds, done


def compare(rounds: int, calls: dict[str, Any]) -> dict[str, Any]:
    """Medians of calls that take turns."""
    results: dict[str, list[tuple[float, float, Done]]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            row = call()
            if number:  # the first is to warm up
                results[name].append(row)
    return {
        name: {
            "first_seconds": statistics.median(row[0] for row in rows),
            "seconds": statistics.median(row[1] for row in rows),
            "steps": statistics.mean(row[2].usage.steps for row in rows),
            "tokens": statistics.mean(row[2].usage.tokens for row in rows),
        }
        for name, rows in results.items()
    }


def random_answers(model: Model, lengths: Sequence[int], prompt: int, steps: int | None, rounds: int) -> dict[str, Any]:
    """One length after the other on the random model; `steps` None: the default cap."""
    ids = torch.randint(model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(SEED)).tolist()
    results = {}
    for length in lengths:
        common.say(f"mid, {length} tokens, {steps or 'default'} steps")
        each = {
            name: Options(max_tokens=length, seed=SEED, confidence=0.0, max_steps=steps, **more)
            for name, more in SETTINGS.items()
        }
        results[str(length)] = compare(rounds, {n: lambda o=o: one(generate(model, [ids], o)) for n, o in each.items()})
    return results


def nano_budgets(llm: LLM, lengths: Sequence[int], count: int) -> dict[str, Any]:
    """Budgets of so many cells: seconds, and the share of cells that are right."""
    chosen = puzzles("easy", count, SEED)
    results = {}
    for length in lengths:
        common.say(f"nano, {length} tokens")
        rows: dict[str, list[tuple[float, float, Done]]] = {name: [] for name in SETTINGS}
        right = dict.fromkeys(SETTINGS, 0)
        for puzzle in chosen:
            ids, pins = request(llm, puzzle)
            pins, solution = {at: token for at, token in pins.items() if at < length}, sudoku.solve(puzzle) or ""
            for name, more in SETTINGS.items():
                row = one(llm.events([ids], options=Options(max_tokens=length, seed=SEED, **more), pins=[pins]))
                rows[name].append(row)
                right[name] += sum(a == b for a, b in zip(row[2].text, solution[:length], strict=False))
        results[str(length)] = {
            name: {
                "first_seconds": statistics.median(row[0] for row in some),
                "seconds": statistics.median(row[1] for row in some),
                "steps": statistics.mean(row[2].usage.steps for row in some),
                "right_cells": right[name] / (count * min(length, 81)),
            }
            for name, some in rows.items()
        }
    return results


def nano_solved(llm: LLM, count: int) -> dict[str, Any]:
    """Whole puzzles a band: solved, steps, seconds to the first committed text and to the end."""
    results: dict[str, Any] = {}
    for band in ("easy", "medium"):
        common.say(f"nano, {band}")
        some = puzzles(band, count, SEED)
        sides: dict[str, list[tuple[float, float, bool, int, int]]] = {name: [] for name in list(SETTINGS)[:2]}
        for puzzle in some:
            ids, pins = request(llm, puzzle)
            for name, more in list(SETTINGS.items())[:2]:
                events = list(llm.events([ids], options=Options(max_tokens=82, seed=SEED, **more), pins=[pins]))
                done, parts = events[-1], sum(isinstance(event, Commit) for event in events)
                assert isinstance(done, Done)
                first = done.usage.first_commit_seconds or done.usage.seconds
                solved = sudoku.is_solved(done.text[:81], puzzle)
                sides[name].append((first, done.usage.seconds, solved, done.usage.steps, parts))
        results[band] = {
            name: {
                "puzzles": count,
                "first_seconds": statistics.median(row[0] for row in rows),
                "seconds": statistics.median(row[1] for row in rows),
                "solved": statistics.mean(row[2] for row in rows),
                "steps": statistics.mean(row[3] for row in rows),
                "commits": statistics.mean(row[4] for row in rows),
            }
            for name, rows in sides.items()
        }
    return results


def ratio(rows: dict[str, Any], name: str) -> float:
    return float(rows[name]["seconds"] / rows["reference"]["seconds"])


def targets(record: dict[str, Any]) -> dict[str, Any]:
    results = {}
    for cap, lengths in record.get("mid", {}).items():
        results[f"10 tokens of mid, {cap}, short, of the reference's time"] = common.target(
            ratio(lengths["10"], "short"), 0.4
        )
    if "nano" in record:
        bands = record["nano"]["bands"].values()
        loss = max(rows["reference"]["solved"] - rows["early"]["solved"] for rows in bands)
        results["nano's solve rate lost by early answers, worst band"] = common.target(loss, 0.01)
    return results


def lines(record: dict[str, Any]) -> list[list[str]]:
    """The table: a row a setting."""
    cases: list[tuple[str, dict[str, Any]]] = []
    for cap, lengths in record.get("mid", {}).items():
        cases += [(f"mid, {length} tokens, {cap}", rows) for length, rows in lengths.items()]
    for length, rows in record.get("nano", {}).get("budgets", {}).items():
        cases.append((f"nano, {length} tokens", rows))
    for band, rows in record.get("nano", {}).get("bands", {}).items():
        cases.append((f"nano, whole, {band}", rows))
    results = []
    for case, rows in cases:
        for name, row in rows.items():
            right = row.get("solved", row.get("right_cells"))
            results.append(
                [
                    f"{case}: {name}",
                    duration(row["first_seconds"]),
                    duration(row["seconds"]),
                    f"{ratio(rows, name):.2f}",
                    f"{row['steps']:.1f}",
                    "–" if right is None else f"{right:.1%}",
                ]
            )
    return results


HEAD = ["answer", "first committed text", "end", "of the reference", "steps", "right"]


def main() -> None:
    parser: argparse.ArgumentParser = common.argument_parser(__doc__ or "", 0)
    parser.add_argument("--size", default="mid", help="the random model; empty: none")
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--prompt", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--puzzles", type=int, default=500, help="whole ones a band; 0: no nano")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"what": "early answers", "prompt": arguments.prompt}
    if arguments.size:
        model = common.without_eos(
            random_model(random_config(arguments.size), torch.bfloat16, arguments.device, arguments.ops)
        )
        lengths = [n for n in (10, 40, 120, 256) if n <= model.config.canvas_length]
        record["size"], record["ops"] = arguments.size, model.ops.name
        record["mid"] = {
            "default cap": random_answers(model, lengths, arguments.prompt, None, 1),
            "12 steps": random_answers(model, lengths, arguments.prompt, 12, arguments.rounds),
        }
        del model
        common.release()
    if arguments.puzzles:
        llm = LLM.load("nano", device=arguments.device, ops=arguments.ops)
        record["nano"] = {
            "budgets": nano_budgets(llm, (10, 40, 82), min(arguments.puzzles, 50)),
            "bands": nano_solved(llm, arguments.puzzles),
        }
    record["targets"] = targets(record)
    print(common.table(HEAD, lines(record)))
    common.finish(record, arguments)


if __name__ == "__main__":
    main()
