"""Steps and right answers as more of a canvas is pinned: nano fills holes in solved grids through the template API.

    .venv/bin/python benchmarks/pins.py -o benchmarks/results/pins.json --plot docs/canvas-pins.png

Every grid is random and solved; so many of its cells are slots of one token, the others fixed text. The prompt is the
puzzle. Then puzzles with clues, once through a template and once as `sfumato sudoku` asks: they must solve alike.
"""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.nano import puzzles
from sfumato import LLM, Options, Slot
from sfumato.evals.sudoku import solve
from sfumato.tasks import sudoku

SEED = 9
HOLES = (1, 5, 10, 20, 30, 40, 50, 60)


def template(puzzle: str) -> list[str | Slot]:
    return [cell if cell != "0" else Slot(length=1) for cell in puzzle]


def fill(llm: LLM, puzzle: str) -> tuple[bool, int]:
    """(is it solved, steps) through the public API."""
    filled = llm.fill(
        template(puzzle), [{"role": "user", "content": sudoku.prompt(puzzle)}], options=Options(seed=SEED)
    )
    return sudoku.is_solved(filled.text, puzzle), filled.usage.steps


def holes(llm: LLM, count: int) -> list[dict[str, float]]:
    """Grids with ever more holes; beyond 50 of them a grid may have another solution, which is right as well."""
    rng, hole_rng = np.random.default_rng(SEED), random.Random(SEED)
    grids, results = [sudoku.random_grid(rng) for _ in range(count)], []
    for number in HOLES:
        common.say(f"{number} holes")
        rows = []
        for grid in grids:
            open_ = set(hole_rng.sample(range(81), number))
            rows.append(fill(llm, "".join("0" if n in open_ else cell for n, cell in enumerate(grid))))
        solved, steps = statistics.mean(row[0] for row in rows), statistics.mean(row[1] for row in rows)
        results.append({"holes": number, "pinned": 81 - number, "grids": count, "solved": solved, "steps": steps})
    return results


def beside_the_command(llm: LLM, count: int) -> dict[str, dict[str, float]]:
    """The same puzzles through a template and through `sfumato sudoku`'s own path."""
    results = {}
    for band in ("easy", "medium"):
        common.say(f"{band} puzzles, both ways")
        some = puzzles(band, count, SEED)
        theirs = list(solve(llm, some, Options(seed=SEED)))
        ours = [fill(llm, puzzle) for puzzle in some]
        results[band] = {
            "puzzles": count,
            "template_solved": statistics.mean(row[0] for row in ours),
            "command_solved": statistics.mean(row.solved for row in theirs),
            "template_steps": statistics.mean(row[1] for row in ours),
            "command_steps": statistics.mean(row.steps for row in theirs),
        }
    return results


def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    pinned = [row["pinned"] for row in rows]
    left.plot(pinned, [row["steps"] for row in rows], "o-", color="#2a6f97", label="steps")
    left.set(xlabel="cells pinned, of 81", ylabel="mean steps", ylim=(0, None))
    right = left.twinx()
    right.plot(pinned, [100 * row["solved"] for row in rows], "s--", color="#b5651d", label="solved")
    right.set(ylabel="solved, %", ylim=(0, 103))
    figure.legend(loc="lower left", bbox_to_anchor=(0.12, 0.2))
    left.set_title("nano: the more of the canvas is given, the fewer steps", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = common.argument_parser(__doc__ or "", 0)
    parser.add_argument("--grids", type=int, default=300, help="solved grids a number of holes")
    parser.add_argument("--puzzles", type=int, default=200, help="puzzles a band, both ways")
    parser.add_argument("--plot", type=Path, help="draw it to this file")
    arguments = parser.parse_args()
    llm = LLM.load("nano", device=arguments.device)
    rows = holes(llm, arguments.grids)
    record: dict[str, Any] = {"what": "pins", "holes": rows, "beside": beside_the_command(llm, arguments.puzzles)}
    twenty = next(row["solved"] for row in rows if row["holes"] == 20)
    record["targets"] = {"20 cells of a solved grid filled right": common.target(twenty, 0.99, at_most=False)}
    lines = [[f"{row['holes']} holes", f"{row['solved']:.1%}", f"{row['steps']:.2f}"] for row in rows]
    for band, row in record["beside"].items():
        lines += [
            [f"{band}, through {way}", f"{row[f'{way}_solved']:.1%}", f"{row[f'{way}_steps']:.2f}"]
            for way in ("template", "command")
        ]
    print(common.table(["nano", "solved", "steps"], lines))
    if arguments.plot:
        plot(rows, arguments.plot)
    common.finish(record, arguments)


if __name__ == "__main__":
    main()
