"""Draws docs/canvas.svg: four canvases at work, a Sudoku, a plot, an edit and a molecule, from real runs.

Where no plot is right, a function with a gap stands in its place.

    .venv/bin/python scripts/make_picture.py

Each is the item of the first seed, from --seed up, that fits its panel and is answered right in three steps or more. A
cell is a token of the draft after a step; its colour is the entropy of the model's prediction there, from ivory
(certain) to smoke (undecided). Pinned clues have a colour of their own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate, count, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.smoke import CLUE, SMOKE, colour
from sfumato import LLM, Done, Draft, Options
from sfumato.cli.demo_skills import SKILLS, item_of
from sfumato.evals import sudoku as sudoku_runs
from sfumato.evals.tasks import query_of
from sfumato.tasks import edits, graphs, infill, molecules, smiles
from sfumato.templates.requests import QueryFor

GROUND, PANEL, PALE, GREY, DARK = "#211f29", "#2a2833", "#f4f1e8", "#a9a4b8", "#1c1a22"
WIDTH, EDGE, GAP = 830, 12, 12
"""Of the picture, as wide as a page of GitHub shows it, in pixels."""
WIDE = (WIDTH - 2 * EDGE - GAP) // 2
"""Of a panel."""
CELL, LETTER, LINE = 13, 6.9, 23
"""A cell of a board, a letter, and a row of letters."""
LABEL = 68
"""What stands in front of a row of letters."""
SHORTEST, LONGEST = 28, 46
"""Letters of a document that is shown, and the most of any row."""
BOARDS, ROWS = 3, 4
"""Steps that are shown of a board, and of a line."""
TRIES = 400
STYLE = (
    "<style>text{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px;fill:" + PALE + "}"
    ".t{fill:" + GREY + "}.h{font-size:13px;font-weight:bold}.m{text-anchor:middle}.c{font-size:10.5px}"
    ".l{font-size:11.5px}.d{fill:" + DARK + "}.b{font-weight:bold}.s{fill:" + GREY + ";font-size:11px}</style>"
)


Piece = tuple[str, float | None]
"""A text, and where it is a token of a draft its entropy."""


@dataclass(frozen=True)
class SkillRun:
    """A right answer and the drafts on its way."""

    name: str
    item: str
    drafts: list[Draft]
    text: str
    passes: float
    """Tokens per pass."""

    def chosen(self, number: int) -> list[Draft]:
        """So many drafts, the first and the last among them, evenly spread."""
        last = len(self.drafts) - 1
        return [self.drafts[at] for at in sorted({round(i * last / (number - 1)) for i in range(number)})]


# ---- runs ------------------------------------------------------------------------------------------------------------


def first_right(
    name: str, seed: int, run: Callable[[str, Options], SkillRun], fits: Callable[[str], bool]
) -> SkillRun | None:
    """The first item, of seeds from `seed` up, that fits and is answered right in enough steps to be watched."""
    skill = SKILLS[name]
    for own in islice(count(seed), TRIES):
        item = item_of(skill, own)
        if not fits(item):
            continue
        result = run(item, Options(seed=own, drafts=True))
        if len(result.drafts) >= BOARDS and skill.task.is_right(result.text, item):
            print(f"{name}: seed {own}, {len(result.drafts)} steps")
            return result
    print(f"{name}: no right answer in {BOARDS} steps or more, of {TRIES} seeds from {seed} up")
    return None


def sudoku_run(llm: LLM) -> Callable[[str, Options], SkillRun]:
    def run(item: str, options: Options) -> SkillRun:
        ids, pins = sudoku_runs.request(llm, item)
        own = replace(options, max_tokens=llm.model.config.canvas_length)
        events = [*llm.events([ids], options=own, pins=[pins])]
        (done,) = (event for event in events if isinstance(event, Done))
        drafts = [event for event in events if isinstance(event, Draft)]
        return SkillRun("sudoku", item, drafts, sudoku_runs.result(item, done).answer, done.usage.tokens_per_pass)

    return run


def text_run(llm: LLM, name: str) -> Callable[[str, Options], SkillRun]:
    def run(item: str, options: Options) -> SkillRun:
        query: QueryFor[Any] = query_of(SKILLS[name].task, item, options, llm.model.config.canvas_length)
        *drafts, last = llm.outcomes(query)
        result: Any = last
        own = [one for one in drafts if isinstance(one, Draft)]
        return SkillRun(name, item, own, result.text.strip(), result.usage.tokens_per_pass)

    return run


# ---- drawing ---------------------------------------------------------------------------------------------------------


def words(x: float, y: float, text: str, kind: str = "", length: float | None = None) -> str:
    fit = "" if length is None else f' textLength="{length:g}" lengthAdjust="spacingAndGlyphs"'
    return f'<text x="{x:g}" y="{y:g}" class="{kind}"{fit} xml:space="preserve">{escape(text)}</text>'


def boxes(height: float, places: Sequence[tuple[float, float, float, str]]) -> Iterator[str]:
    """Boxes at (x, y), so wide, of a colour: one path a colour."""
    for fill in dict.fromkeys(fill for *_, fill in places):
        drawn = "".join(f"M{x:g} {y:g}h{width:g}v{height:g}h{-width:g}z" for x, y, width, own in places if own == fill)
        yield f'<path d="{drawn}" fill="{fill}"/>'


def tone(entropy: float) -> str:
    """The class of what stands on the colour of an entropy."""
    return "d" if entropy < 0.6 else ""


def board(left: float, top: float, texts: Sequence[str], fills: Sequence[str], kinds: Sequence[str]) -> Iterator[str]:
    """Nine rows of nine cells."""
    places = [(left + cell % 9 * CELL, top + cell // 9 * CELL) for cell in range(81)]
    size = CELL - 0.6
    yield from boxes(size, [(x, y, size, fill) for (x, y), fill in zip(places, fills, strict=True)])
    for (x, y), text, kind in zip(places, texts, kinds, strict=True):
        if text != " ":
            yield words(x + CELL / 2, y + CELL * 0.76, text, f"m c {kind}".strip())


def boards(
    left: float, top: float, run: SkillRun, cells: Callable[[Draft], tuple[list[str], list[str], list[str]]]
) -> Iterator[str]:
    """The drafts of a run as boards, side by side."""
    size = 9 * CELL
    space = (WIDE - BOARDS * size) / (BOARDS + 1)
    for place, draft in enumerate(run.chosen(BOARDS)):
        x = left + space + place * (size + space)
        yield from board(x, top, *cells(draft))
        yield words(x + size / 2, top + size + 16, f"step {draft.step} of {len(run.drafts)}", "m s")


def sudoku_cells(run: SkillRun) -> Callable[[Draft], tuple[list[str], list[str], list[str]]]:
    is_clue = [cell != "0" for cell in run.item]

    def cells(draft: Draft) -> tuple[list[str], list[str], list[str]]:
        texts = [piece if piece in [*"123456789"] else "·" for piece in draft.pieces[:81]]
        fills = [CLUE if clue else colour(h) for clue, h in zip(is_clue, draft.entropies, strict=False)]
        kinds = ["d b" if clue else tone(h) for clue, h in zip(is_clue, draft.entropies, strict=False)]
        return texts, fills, kinds

    return cells


def plot_cells(draft: Draft) -> tuple[list[str], list[str], list[str]]:
    places = [row * (graphs.SIZE + 1) + column for row in range(graphs.SIZE) for column in range(graphs.SIZE)]
    texts = [draft.pieces[at] if draft.pieces[at] in (graphs.MARK, graphs.EMPTY) else "?" for at in places]
    shown = ["●" if text == graphs.MARK else " " if text == graphs.EMPTY else "?" for text in texts]
    entropies = [draft.entropies[at] for at in places]
    return shown, [*map(colour, entropies)], [*map(tone, entropies)]


def line(x: float, y: float, pieces: Sequence[Piece]) -> Iterator[str]:
    """Texts in a row, those of tokens on the colour of their entropy."""
    starts = [x + LETTER * sum(len(text) for text, _ in pieces[:place]) for place in range(len(pieces))]
    tokens = zip(starts, pieces, strict=True)
    drawn = [(at, y, LETTER * len(text) - 0.6, colour(h)) for at, (text, h) in tokens if text and h is not None]
    yield from boxes(LINE - 5, drawn)
    for at, (text, entropy) in zip(starts, pieces, strict=True):
        if text.strip():
            kind = "l" if entropy is None else f"l {tone(entropy)}".strip()
            yield words(at, y + 13, text, kind, LETTER * len(text))


def rows_of(run: SkillRun, number: int, before: str = "", after: str = "") -> list[tuple[str, list[Piece]]]:
    """So many drafts of a run, each with its step, between texts that stay; cut where they are too long."""
    rows: list[tuple[str, list[Piece]]] = []
    for draft in run.chosen(number):
        tokens = zip(map(shown_piece, draft.pieces[: draft.end]), draft.entropies, strict=False)
        pieces: list[Piece] = [(before, None), *tokens, (after, None)]
        sizes = [*accumulate(len(text) for text, _ in pieces)]
        if sizes[-1] > LONGEST:
            pieces = [*(piece for piece, size in zip(pieces, sizes, strict=True) if size < LONGEST), ("…", None)]
        rows.append((f"step {draft.step}", pieces))
    return rows


def lines(left: float, top: float, rows: Sequence[tuple[str, list[Piece]]]) -> Iterator[str]:
    """Rows of texts, each behind a word of its own."""
    for place, (label, pieces) in enumerate(rows):
        yield words(left + 12, top + place * LINE + 13, label, "s")
        yield from line(left + LABEL, top + place * LINE, pieces)


def shown_piece(piece: str) -> str:
    return "".join(sign if sign.isprintable() and sign != "\ufffd" else "·" for sign in piece.replace("\n", "↵"))


def panel(x: float, y: float, height: float, title: str, note: str) -> Iterator[str]:
    yield f'<rect x="{x:g}" y="{y:g}" width="{WIDE}" height="{height:g}" rx="6" fill="{PANEL}"/>'
    yield words(x + 12, y + 21, title, "h")
    yield words(x + 12, y + 39, note, "t")


def key(y: float) -> Iterator[str]:
    """What the colours mean."""
    x = float(EDGE + 8)
    for fill, text in [(CLUE, "pinned"), *zip(SMOKE[::2], ("sure", "0.1 nats", "1 nat", "undecided"), strict=True)]:
        yield from boxes(14, [(x, y - 11, 14, fill)])
        yield words(x + 20, y, text, "t")
        x += 20 + 7.3 * len(text) + 20


# ---- the picture -----------------------------------------------------------------------------------------------------


def facts(run: SkillRun) -> str:
    return f"{len(run.drafts)} steps, {run.passes:.1f} tokens per pass"


def picture(sudoku: SkillRun, middle: SkillRun, edit: SkillRun, molecule: SkillRun) -> str:
    """The four runs in two rows of two panels; `middle` is a plot, or else code."""
    high, low = 50 + 9 * CELL + 28, 52 + ROWS * LINE + 8
    right, below = EDGE + WIDE + GAP, EDGE + high + GAP
    clues = sum(cell != "0" for cell in sudoku.item)
    one = edits.read(edit.item)
    bottom = below + low + 26
    parts = [
        *panel(EDGE, EDGE, high, f"A Sudoku of {clues} clues", facts(sudoku)),
        *boards(EDGE, EDGE + 50, sudoku, sudoku_cells(sudoku)),
        *(plot_panel if middle.name == "graphs" else code_panel)(right, EDGE, high, middle),
        *panel(EDGE, below, low, one.instruction, facts(edit)),
        *lines(EDGE, below + 52, [("before", [(one.text, None)]), *rows_of(edit, ROWS - 1)]),
        *panel(right, below, low, wish(molecule.item), f"{smiles.formula_of(molecule.text)}; {facts(molecule)}"),
        *lines(right, below + 52, rows_of(molecule, ROWS)),
        *key(bottom),
    ]
    height = bottom + 14
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}">'
    )
    ground = f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="{GROUND}"/>'
    return "\n".join([head, STYLE, ground, *parts, "</svg>"]) + "\n"


def plot_panel(x: float, y: float, height: float, run: SkillRun) -> Iterator[str]:
    expression = run.item.split("\n")[0]
    yield from panel(x, y, height, f"Plot this: {expression}", facts(run))
    yield from boards(x, y + 50, run, plot_cells)


def code_panel(x: float, y: float, height: float, run: SkillRun) -> Iterator[str]:
    before, after, phrase = gap_line(run.item)
    yield from panel(x, y, height, f"Fill the gap: {phrase}", facts(run))
    start: tuple[str, list[Piece]] = ("before", [(before + infill.GAP + after, None)])
    yield from lines(x, y + 52, [start, *rows_of(run, ROWS + 1, before, after)])


def gap_line(item: str) -> tuple[str, str, str]:
    """What stands on both sides of the gap in its line, and what the function does, in words."""
    lines = infill.read(item).code.split("\n")
    before, _, after = next(line for line in lines if infill.GAP in line).strip().partition(infill.GAP)
    return before, after, lines[1].strip(' "')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skills", default="nano-skills", help="the model of the plot, the edit and the molecule")
    parser.add_argument("--seed", type=int, default=0, help="the first seed that is tried")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/canvas.svg"))
    args = parser.parse_args()
    nano, skills = LLM.load("nano"), LLM.load(args.skills)
    sudoku = first_right("sudoku", args.seed, sudoku_run(nano), lambda item: True)
    middle = first_right("graphs", args.seed, text_run(skills, "graphs"), lambda item: True) or first_right(
        "infill", args.seed, text_run(skills, "infill"), is_short_code
    )
    edit = first_right("edits", args.seed, text_run(skills, "edits"), is_short_edit)
    molecule = first_right("molecules", args.seed, text_run(skills, "molecules"), is_short_wish)
    if sudoku is None or middle is None or edit is None or molecule is None:
        raise SystemExit("no picture: give a model that answers right, or another --seed")
    args.out.write_text(picture(sudoku, middle, edit, molecule), encoding="utf-8")


def is_short_code(item: str) -> bool:
    """Whether the gap's line and the words fit their panel."""
    before, after, phrase = gap_line(item)
    return 20 <= len(before + infill.answer(item) + after) <= LONGEST and len(phrase) <= 32


def is_short_edit(item: str) -> bool:
    """Whether a document is one line that fits its panel."""
    one = edits.read(item)
    sizes = len(one.text), len(one.edited)
    return "\n" not in one.text + one.edited and min(sizes) >= SHORTEST and max(sizes) <= LONGEST


def wish(item: str) -> str:
    """What is asked of a molecule, in a few words."""
    facts = molecules.prompt(item).split("\n")[1]
    return f"Complete this molecule: {facts}" if molecules.kind(item) == "missing" else f"Molecule with: {facts}"


def is_short_wish(item: str) -> bool:
    """Whether what is asked of a molecule fits its panel."""
    return len(wish(item)) <= LONGEST


if __name__ == "__main__":
    main()
