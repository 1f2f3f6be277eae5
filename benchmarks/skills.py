"""How well nano-skills does each of its skills: fresh items, whole canvases beside one token at a time.

    .venv/bin/python benchmarks/skills.py -o benchmarks/results/skills.json

Items are those that no run of training sees. Each skill is asked on the model's own canvas, on one no longer than the
skill's answers (`short`), with a preset, and one token at a time with the same weights; edits in place, from the
document, and from noise. Where RDKit is installed (the extra `molecules`) it judges the same molecules again. Answers
are kept beside the record, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import table, write
from sfumato.checkpoints.locate import resolve
from sfumato.cli.calibrate import weights_of
from sfumato.evals.evaluation import digest_of, evaluate
from sfumato.evals.kept_answers import KeptAnswers
from sfumato.evals.scoring import scores_of
from sfumato.evals.tasks import TaskAnswer, fresh
from sfumato.llm import LLM
from sfumato.measure.machine import environment
from sfumato.options import Options
from sfumato.presets import Preset
from sfumato.tasks.task import named
from sfumato.training.task_source import answer_room

SKILLS = ("edits", "edits-from-noise", "infill", "molecules", "graphs")
"""Those that have 500 items to hold out; `families` has 111 (--skills families --items 100)."""


def settings_of(room: int, canvas: int, seed: int, preset: Mapping[str, Any]) -> Mapping[str, Options]:
    """Ways to ask for an answer of at most `room` tokens."""
    whole = Options(seed=seed, max_tokens=room)
    settings = {"canvas": replace(whole, max_tokens=canvas)}
    if preset:
        settings["preset"] = replace(whole, max_tokens=canvas, **preset)
    if room < canvas:
        settings["short canvas"] = replace(whole, short=True, **preset)
    return settings | {"one at a time": replace(whole, mode="autoregressive", temperature=0.0)}


def judged_by_rdkit(results: Sequence[TaskAnswer]) -> float | None:
    """The share of answers that RDKit reads as a molecule; None where it is not installed."""
    try:
        chem, logger = import_module("rdkit.Chem"), import_module("rdkit.RDLogger")
    except ImportError:
        return None
    logger.DisableLog("rdApp.*")
    texts = [result.text.strip() for result in results]
    return sum(bool(text) and chem.MolFromSmiles(text) is not None for text in texts) / max(1, len(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano-skills")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--preset", type=Path, help="a preset to measure too; the short canvases have it")
    parser.add_argument("--skills", default=",".join(SKILLS))
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    llm = LLM.load(arguments.model)
    canvas, rows = llm.model.config.canvas_length, []
    preset = {} if arguments.preset is None else dict(Preset.read(arguments.preset).options)
    exercises = [fresh(named(name), arguments.items, arguments.seed) for name in arguments.skills.split(",")]
    kept = KeptAnswers(
        None if arguments.out is None else arguments.out.with_suffix(".answers.jsonl"),
        {
            "model": weights_of(resolve(arguments.model)),  # other weights are another record
            "preset": preset,
            "seed": arguments.seed,
            "items": [digest_of(one) for one in exercises],
        },
    )
    for exercise in exercises:
        task = exercise.task
        room = min(canvas, answer_room(task, llm.tokenizer))
        for name, options in settings_of(room, canvas, arguments.seed, preset).items():
            if task.name == "edits-from-noise" and options.mode == "autoregressive":
                continue  # the same as that of edits
            results = [*evaluate(llm, exercise, options, kept=kept, run=name)]
            scores = scores_of(task.name, results)
            more: dict[str, Any] = {"setting": name, "room": options.max_tokens}
            new = [score.to_dict() | more for score in scores]
            if task.name == "molecules" and (share := judged_by_rdkit(results)) is not None:
                new[0]["valid_by_rdkit"] = share
            rows += new
            print(*line(new[0]), sep="  ", flush=True)
    print(table(HEAD, map(line, rows)))
    record = {"what": "skills", "model": arguments.model, "preset": preset, "seed": arguments.seed, "rows": rows}
    if arguments.out is not None:
        write(arguments.out, record | {"environment": environment(llm.model.device)})


HEAD = ("skill", "setting", "items", "right", "95 %", "steps", "tokens a pass", "ms an item", "")


def line(row: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    measures = row["measures"] | ({"valid by RDKit": row["valid_by_rdkit"]} if "valid_by_rdkit" in row else {})
    return [
        row["task"] + (f", {row['kind']}" if row["kind"] else ""),
        row["setting"],
        str(row["items"]),
        f"{row['share']:.1%}",
        f"{row['low']:.1%}–{row['high']:.1%}",
        f"{row['steps']:.1f}",
        f"{row['tokens_per_pass']:.1f}",
        f"{row['milliseconds']:.1f}",
        ", ".join(f"{name} {value:.1%}" for name, value in measures.items()),
    ]


if __name__ == "__main__":
    main()
