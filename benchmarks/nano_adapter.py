"""nano before and after it has learned a task by LoRA: the new task and Sudoku, on items that no run trains on.

    sfumato finetune -m nano --task sorting --task sudoku --mix sudoku=0.5 --lora 16 \\
        --targets attention,dense,experts,router,self_conditioning --threads 2 -s steps=440 -s lr=0.002 -s batch=40 \\
        -s encode_response_every=4 --pool 4000 --eval-every 110 -o runs/sorting
    .venv/bin/python benchmarks/nano_adapter.py runs/sorting -o benchmarks/results/nano_adapter

Sudoku: 150 fresh puzzles of 40 to 55 clues and 150 of 30 to 39, as `benchmarks/nano.py` makes them; sorting: 300 lists.
Writes `log.jsonl`, `evals.jsonl` and the picture of the run, and `figures.json` with hardware and versions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.nano import puzzles
from sfumato.checkpoints.adapters import read_adapter
from sfumato.evals.sudoku import solve
from sfumato.evals.tasks import answers, rate
from sfumato.llm import LLM
from sfumato.measure.machine import environment
from sfumato.model.adapters import merge_
from sfumato.options import Options
from sfumato.tasks.task import named
from sfumato.training.task_source import TaskSource

KEPT = ("log.jsonl", "evals.jsonl", "loss.png")


def figures(llm: LLM, count: int) -> dict[str, float]:
    """Shares that are right: of held-out lists, and of puzzles a band."""
    task = named("sorting")
    assert llm.template is not None
    lists = TaskSource(task, llm.tokenizer, llm.template, seed=7, is_held_out=True).items(count, 0)
    shares = {"sorting": rate(list(answers(llm, task, lists, Options(seed=0))))}
    for band in ("easy", "medium"):
        solved = list(solve(llm, puzzles(band, count // 2, 7), Options(seed=7, temperature=0.0), batch=50))
        shares[f"sudoku, {band}"] = float(np.mean([one.solved for one in solved]))
    shares["sudoku"] = (shares["sudoku, easy"] + shares["sudoku, medium"]) / 2
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    llm = LLM.load("nano", ops="fused")
    before = figures(llm, arguments.count)
    merge_(llm.model, read_adapter(arguments.run / "adapter", llm.model))
    after = figures(llm, arguments.count)
    for name in before:
        print(f"{name:16}{before[name]:8.1%} -> {after[name]:6.1%}")
    if arguments.out is None:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(arguments.run / name, arguments.out / name)
    steps = [json.loads(line) for line in (arguments.run / "log.jsonl").read_text().splitlines()]
    whole = {"what": "nano learns sorting by LoRA", "items": arguments.count, "before": before, "after": after}
    whole |= {"steps": len(steps), "seconds": round(sum(step["seconds"] for step in steps), 1)}
    whole |= {"run": json.loads((arguments.run / "run.json").read_text()), "environment": environment()}
    (arguments.out / "figures.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
