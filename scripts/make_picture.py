"""Draws docs/canvas.svg: one Sudoku canvas of nano denoising, from a real run.

    .venv/bin/python scripts/make_picture.py

Each board is the draft after one step; a cell's colour is the entropy of the model's prediction there, from smoke
(undecided) to ivory (certain). Clues are bold.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.smoke import CLUE, colour
from sfumato.evals import sudoku as task
from sfumato.evals.tasks import answer_options
from sfumato.events import Done, Draft
from sfumato.llm import LLM
from sfumato.options import Options
from sfumato.tasks import sudoku

CELL, GAP, TOP = 22, 26, 34


def board(puzzle: str, cells: list[str], entropies: list[float], left: int, title: str) -> list[str]:
    """SVG elements of one board."""
    size = 9 * CELL
    out = [f'<text x="{left + size / 2}" y="20" class="t">{title}</text>']
    for cell in range(81):
        x, y = left + cell % 9 * CELL, TOP + cell // 9 * CELL
        is_clue = puzzle[cell] != "0"
        fill = CLUE if is_clue else colour(entropies[cell])
        out.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}" class="c"/>')
        digit = cells[cell] if len(cells[cell]) == 1 and cells[cell] in "123456789" else "·"
        tone = "d" if is_clue or entropies[cell] < 0.6 else "l"
        weight = " b" if is_clue else ""
        out.append(f'<text x="{x + CELL / 2}" y="{y + CELL * 0.7}" class="n {tone}{weight}">{digit}</text>')
    for line in range(0, 10, 3):
        at = line * CELL
        out.append(f'<path d="M{left} {TOP + at}h{size}M{left + at} {TOP}v{size}" class="g"/>')
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clues", type=int, default=32)
    parser.add_argument("--seed", type=int, default=14)
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/canvas.svg"))
    args = parser.parse_args()
    llm = LLM.load("nano")
    puzzle = sudoku.generate(args.clues, np.random.default_rng(args.seed))
    ids, pins = task.request(llm, puzzle)
    options = answer_options(Options(seed=args.seed), llm)
    events = list(llm.events([ids], options=replace(options, drafts=True), pins=[pins]))
    drafts = [event for event in events if isinstance(event, Draft)]
    done = next(event for event in events if isinstance(event, Done))
    solved = task.result(puzzle, done)
    chosen = sorted({round(i * (len(drafts) - 1) / (args.frames - 1)) for i in range(args.frames)})
    width = len(chosen) * (9 * CELL + GAP) + GAP
    height = TOP + 9 * CELL + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<style>text{font-family:ui-monospace,Menlo,Consolas,monospace;text-anchor:middle}.t{font-size:13px;fill:#8a8594}"
        ".n{font-size:13px}.d{fill:#1c1a22}.l{fill:#a9a4b8}.b{font-weight:bold}.c{stroke:#2a2833;stroke-width:.6}"
        ".g{stroke:#1c1a22;stroke-width:2;fill:none}</style>",
        f'<rect width="{width}" height="{height}" fill="#211f29" rx="8"/>',
    ]
    for place, index in enumerate(chosen):
        draft = drafts[index]
        cells = [llm.tokenizer.decode([token]) for token in draft.tokens[:81]]
        left = GAP + place * (9 * CELL + GAP)
        parts += board(puzzle, cells, draft.entropies, left, f"step {draft.step} of {len(drafts)}")
    state = "solved" if solved.solved else "not solved"
    caption = f"{args.clues} clues, {state} in {solved.steps} steps; colour: entropy, from smoke to ivory"
    parts.append(f'<text x="{width / 2}" y="{height - 12}" class="t">{caption}</text></svg>')
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text("\n".join(parts) + "\n")
    print(f"{args.out}: {caption}")


if __name__ == "__main__":
    main()
