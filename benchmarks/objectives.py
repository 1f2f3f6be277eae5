"""nano fine-tuned with several objectives: Sudoku solved at every cap on steps, on the same fresh puzzles.

    sfumato finetune runs/plain -m nano --task sudoku -s optimizer=muon -s lr=0.001 -s seed=1 -s batch=16 -s repeats=2
    sfumato finetune runs/revision … -s revision_penalty=2
    sfumato finetune runs/distilled … -s self_distillation=1
    .venv/bin/python benchmarks/objectives.py nano plain=runs/plain/checkpoint revision=runs/revision/checkpoint \\
        distilled=runs/distilled/checkpoint -o benchmarks/results/objectives.json

Puzzles are those of `benchmarks/nano.py`, clues pinned. Each is sampled once, its temperature schedule as long as it is
without a cap: so a cap cuts the same trajectory, and what stands on the canvas after n steps is the answer at a cap of
n. Each model is held against the one named "plain" puzzle by puzzle: how many it alone solves, and how many the other.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.nano import BANDS, puzzles
from sfumato.evals.sudoku import request
from sfumato.evals.tasks import answer_options
from sfumato.events import Done, Draft
from sfumato.llm import LLM
from sfumato.measure.machine import environment
from sfumato.options import Options
from sfumato.tasks import sudoku

CAPS = (4, 6, 8, 12, 24)
SCHEDULE = 24
"""Steps of nano's own schedule."""


def trajectories(llm: LLM, some: Sequence[str], seed: int, batch: int) -> list[list[bool]]:
    """Of each puzzle, whether the canvas is right after each of its steps."""
    options = answer_options(Options(seed=seed, drafts=True, max_steps=SCHEDULE, temperature_steps=SCHEDULE), llm)
    results: list[list[bool]] = []
    for start in range(0, len(some), batch):
        part = some[start : start + batch]
        ids, pins = zip(*(request(llm, puzzle) for puzzle in part), strict=True)
        rows: list[list[bool]] = [[] for _ in part]
        for event in llm.events(ids, options=options, pins=pins):
            if isinstance(event, Draft):
                rows[event.row].append(is_right(event.text, part[event.row]))
            elif isinstance(event, Done):
                own = rows[event.row]
                assert len(own) == event.usage.steps and own[-1] == is_right(event.text, part[event.row])
        results += rows
    return results


def is_right(text: str, puzzle: str) -> bool:
    """Whether the first 81 characters solve the puzzle."""
    return sudoku.is_solved("".join(text.split())[:81], puzzle)


def at(trajectory: Sequence[bool], cap: int) -> bool:
    """Whether the answer at a cap is right."""
    return trajectory[min(cap, len(trajectory)) - 1]


def chance(one: int, other: int) -> float:
    """McNemar's exact test: how likely so uneven a split of `one + other` puzzles is where both are as good."""
    total = one + other
    tail = sum(math.comb(total, n) for n in range(min(one, other) + 1))
    return min(1.0, float(2 * tail / 2**total))


def rows(name: str, band: str, own: list[list[bool]], plain: list[list[bool]] | None) -> list[dict[str, Any]]:
    """A record for each cap."""
    records = []
    for cap in CAPS:
        right = [at(one, cap) for one in own]
        record: dict[str, Any] = {"model": name, "band": band, "max_steps": cap, "puzzles": len(own)}
        record |= {"solved": sum(right) / len(own), "mean_steps": sum(min(cap, len(one)) for one in own) / len(own)}
        if plain is not None:
            other = [at(one, cap) for one in plain]
            alone = sum(a and not b for a, b in zip(right, other, strict=True))
            behind = sum(b and not a for a, b in zip(right, other, strict=True))
            record |= {"solved_alone": alone, "plain_alone": behind, "p": round(chance(alone, behind), 3)}
        records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="a model, or NAME=FOLDER")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    named = [(one.partition("=")[0], one.partition("=")[2] or one) for one in args.models]
    named.sort(key=lambda pair: pair[0] != "plain")
    records: list[dict[str, Any]] = []
    plain: dict[str, list[list[bool]]] = {}
    for name, folder in named:
        llm = LLM.load(folder)
        for band in BANDS:
            own = trajectories(llm, puzzles(band, args.count, args.seed), args.seed, args.batch)
            if name == "plain":
                plain[band] = own
            new = rows(name, band, own, None if name == "plain" else plain.get(band))
            records += new
            print(f"{name:10} {band:7}", *(f"{row['max_steps']:3}: {row['solved']:6.1%}" for row in new), end=" ")
            print(f"steps {new[-1]['mean_steps']:.2f}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        whole = {"what": "objectives", "seed": args.seed, "rows": records, "environment": environment()}
        args.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
