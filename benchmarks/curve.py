"""The curve of quality against steps and time, of nano on its tasks, and the cheapest setting that loses nothing much.

    .venv/bin/python benchmarks/curve.py -o benchmarks/results/nano-curve.json --picture docs/curve.svg

Tries the usual axes of `sfumato eval --sweep` (`evals.settings.usual_axes`) and int8 against the options of the
checkpoint: a third of the items chooses, the rest confirms. Takes about eight minutes; answers are kept in build/, so
that the same command goes on where it was stopped, and tries more when it is run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from sfumato.cli.eval_runs import setting_of
from sfumato.cli.loading import ApiFlags
from sfumato.cli.sweep import SweepFlags, carry_out_sweep
from sfumato.evals.curve import SIGNIFICANT
from sfumato.evals.evaluation import digest_of
from sfumato.evals.kept_answers import KeptAnswers
from sfumato.evals.statistics import PairedCounts
from sfumato.evals.sweep import SweepResult
from sfumato.evals.tasks import fresh
from sfumato.options import LoadOptions, Options
from sfumato.tasks.task import named

TASKS = ("sudoku", "edits", "infill", "molecules", "graphs")
AXES = ("usual", "quantize=int8")
SEED = 7
FEWER = 0.25
"""Of the passes, what a setting is to save at no significant loss on four tasks."""


def targets(result: SweepResult) -> dict[str, Any]:
    """The largest share of passes that a setting saves with no significant loss, on items that did not choose it."""
    safe = [
        point
        for point in result.choice.tried
        if len(point.scores) >= 4 and not point.losing_tasks and not is_worse(point.pooled)
    ]
    saved = max((1 - point.costs["passes"] for point in safe), default=None)
    return {"passes saved at no significant loss on four tasks": common.target(saved, FEWER, at_most=False)}


def is_worse(counts: PairedCounts) -> bool:
    """Whether significantly fewer items are right."""
    return counts.difference < 0 and counts.p < SIGNIFICANT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--axis", action="append", help="in the place of AXES; repeatable")
    parser.add_argument("--items", type=int, default=300, help="of each task, a third of them to choose by")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--lose", type=float, default=1.0, help="points")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--preset", type=Path, help="write the chosen setting to this file")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    exercises = [fresh(named(task), args.items, SEED) for task in args.tasks.split(",")]
    flags = SweepFlags(sweep=True, axis=args.axis or [*AXES], lose=args.lose, by="passes", budget=args.minutes)
    first = setting_of(ApiFlags(model=args.model), LoadOptions(args.model, args.device), Options(seed=SEED))
    what = {"tasks": {one.task.name: digest_of(one) for one in exercises}, "first": first.record()}
    folder = Path("build")
    folder.mkdir(exist_ok=True)
    kept = KeptAnswers(folder / f"{args.out.stem}.answers.jsonl", what)
    report = carry_out_sweep(first, exercises, flags, args.batch, kept, Console(stderr=True, highlight=False))
    report.show()
    common.write(args.out, report.record() | {"targets": targets(report.result)})
    if args.picture is not None:
        args.picture.write_text(report.drawn(), encoding="utf-8")
    if args.preset is not None and (preset := report.preset()) is not None:
        preset.write(args.preset)


if __name__ == "__main__":
    main()
