"""What it gives to finish a refused canvas one token after another (`Options.finish`): right answers and passes.

    .venv/bin/python benchmarks/finishing.py -o benchmarks/results/finishing.json

The items are those of `benchmarks/skills.py`. Each setting stands beside the plain canvas on the same items and noise:
what it gains, what it loses, and McNemar's p. Answers are kept beside the record, so that the same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import table, write
from sfumato.checkpoints.locate import resolve
from sfumato.cli.calibrate import weights_of
from sfumato.evals.evaluation import digest_of, evaluate
from sfumato.evals.kept_answers import KeptAnswers
from sfumato.evals.statistics import PairedCounts
from sfumato.evals.tasks import fresh
from sfumato.llm import LLM
from sfumato.measure.machine import environment
from sfumato.options import Options
from sfumato.tasks.task import named

SKILLS = ("edits-from-noise", "infill", "molecules")
"""Those that are answers, not templates."""
BOUNDS = (0.5, 2.0)
"""Nats."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "a canvas": {},
    **{f"verify {bound:g}, finish": {"verify": bound, "finish": True} for bound in BOUNDS},
    **{f"redos 1, verify {bound:g}": {"redos": 1, "verify": bound} for bound in BOUNDS},
    **{f"redos 1, verify {bound:g}, finish": {"redos": 1, "verify": bound, "finish": True} for bound in BOUNDS},
    "one at a time": {"mode": "autoregressive", "temperature": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano-skills")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--skills", default=",".join(SKILLS))
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    llm, rows = LLM.load(arguments.model), []
    whole = Options(seed=arguments.seed, max_tokens=llm.model.config.canvas_length)
    exercises = [fresh(named(name), arguments.items, arguments.seed) for name in arguments.skills.split(",")]
    about = {"model": weights_of(resolve(arguments.model)), "seed": arguments.seed}
    kept = KeptAnswers(
        None if arguments.out is None else arguments.out.with_suffix(".answers.jsonl"),
        {**about, "items": [digest_of(one) for one in exercises]},
    )
    for exercise in exercises:
        plain: list[bool] = []
        for name, own in SETTINGS.items():
            results = [*evaluate(llm, exercise, replace(whole, **own), kept=kept, run=name)]
            right = [result.is_right for result in results]
            plain = plain or right
            pairs = PairedCounts.of(plain, right)
            row = {
                "task": exercise.task.name,
                "setting": name,
                "items": len(right),
                "share": statistics.mean(right),
                "steps": statistics.mean(result.steps for result in results),
                "passes": statistics.mean(result.passes for result in results),
                "milliseconds": 1000 * statistics.mean(result.cost_seconds for result in results),
                "gained": pairs.second_only,
                "lost": pairs.first_only,
                "p": pairs.p,
            }
            rows.append(row)
            print(*line(row), sep="  ", flush=True)
    print(table(HEAD, map(line, rows)))
    record = {"what": "finishing", "model": arguments.model, "seed": arguments.seed, "rows": rows}
    if arguments.out is not None:
        write(arguments.out, record | {"environment": environment(llm.model.device)})


HEAD = ("skill", "setting", "right", "passes", "ms", "beside a canvas", "p")


def line(row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    return [
        row["task"],
        row["setting"],
        f"{row['share']:.1%}",
        f"{row['passes']:.2f}",
        f"{row['milliseconds']:.1f}",
        f"+{row['gained']} −{row['lost']}",
        f"{row['p']:.2g}",
    ]


if __name__ == "__main__":
    main()
