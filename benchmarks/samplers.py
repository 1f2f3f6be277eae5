"""Settings of the sampler, each on the same items: what they answer right, in how many steps, beside the reference's.

    .venv/bin/python benchmarks/samplers.py nano --task sudoku --count 200 --threads 1 -o build/samplers.json

So many held-out items of each of a task's kinds (Sudoku: easy, medium, hard), at one seed, the same ones for every
setting. A setting is options by their names, as in `--setting "max_steps=12 confidence=0.05"`; without any, those of
`SETTINGS`. What the file has already is not run again. No picture and no search: those are the evaluation's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from sfumato import LLM, Options
from sfumato.evals.tasks import answers
from sfumato.tasks.task import Task, held_out_items, named

SEED = 7
BATCH = 50
SETTINGS = (
    "",
    *(f"max_steps={steps}" for steps in (4, 6, 8, 12, 16)),
    *(f"entropy_bound={bound}" for bound in (0.3, 1, 3, 10, 30)),
    *(f"confidence={mean}" for mean in (0.01, 0.02, 0.05, 0.1, 0.2)),
    *(f"stability={still} confidence=100" for still in (1, 2, 3, 4, 6)),
    "stability=0",
    "stability=0 confidence=0.02",
    "top_k=1",
)
"""Plain changes, which a further rule must beat to be worth its place."""
HEAD = ["setting", "kind", "right", "steps", "steps less", "lost", "gained"]


def items_of(task: Task, count: int) -> dict[str, list[str]]:
    """So many items of each kind."""
    most = count
    while True:
        kinds: dict[str, list[str]] = {}
        for item in held_out_items(task, most, SEED):
            kinds.setdefault(task.kind(item) if task.kind is not None else "all", []).append(item)
        if all(len(some) >= count for some in kinds.values()):
            return {kind: some[:count] for kind, some in sorted(kinds.items())}
        most *= 2


def options_of(setting: str) -> Options:
    """Options from their names and values, "max_steps=12 early=true"."""
    pairs = (word.partition("=") for word in setting.split())
    return Options.from_dict({"seed": SEED, **{name: json.loads(value) for name, _, value in pairs}})


def run(llm: LLM, task: Task, items: Sequence[str], options: Options) -> dict[str, list[int]]:
    """Whether each is right, and its steps."""
    results = list(answers(llm, task, items, options, BATCH))
    return {"right": [int(one.is_right) for one in results], "steps": [one.steps for one in results]}


def lines(rows: Mapping[str, Mapping[str, Any]], settings: Sequence[str], kinds: Sequence[str]) -> list[list[str]]:
    """The table's rows: each setting beside the first, pair by pair."""
    cells = []
    for setting in settings:
        for kind in kinds:
            base, own = rows[settings[0]][kind], rows[setting][kind]
            pairs = list(zip(base["right"], own["right"], strict=True))
            mean, before = statistics.mean(own["steps"]), statistics.mean(base["steps"])
            cells.append(
                [
                    setting or "reference",
                    kind,
                    f"{statistics.mean(own['right']):.1%}",
                    f"{mean:.2f}",
                    f"{1 - mean / before:.0%}",
                    str(pairs.count((1, 0))),
                    str(pairs.count((0, 1))),
                ]
            )
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--task", default="sudoku")
    parser.add_argument("--count", type=int, default=200, help="items of each kind")
    parser.add_argument("--setting", action="append", help="options by their names; may be given several times")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, help="a file that keeps what has run")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path, task = arguments.out, named(arguments.task)
    kept: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    rows = kept.setdefault(f"{arguments.model} {task.name} {arguments.count}", {})
    llm, kinds = LLM.load(arguments.model), items_of(task, arguments.count)
    settings = ["", *(one for one in arguments.setting or SETTINGS if one)]
    for setting in settings:
        for kind, items in kinds.items():
            if kind not in rows.setdefault(setting, {}):
                common.say(f"{setting or 'reference'}: {kind}")
                rows[setting][kind] = run(llm, task, items, options_of(setting))
                if path is not None:
                    common.write(path, kept)
    print(common.table(HEAD, lines(rows, settings, list(kinds))))


if __name__ == "__main__":
    main()
