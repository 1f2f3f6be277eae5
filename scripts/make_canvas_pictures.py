"""Draws the pictures of docs/canvas.md, from real runs of nano.

    .venv/bin/python scripts/make_canvas_pictures.py

canvas-template.svg: a small template, and the positions that `edit.lay_out` gives it.
canvas-sudoku.svg:   a puzzle as a template, its drafts step by step, coloured by entropy.
canvas-schema.svg:   an answer that obeys a schema, step by step: what each walk of the grammar made of the draft.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.smoke import CLUE, SMOKE, colour
from sfumato import LLM, Done, Draft, Options, Slot
from sfumato.constraints.guide import Guide, Pick, Walk
from sfumato.constraints.interruptible import Interruptible
from sfumato.engine.request import GrammarSpan, Request
from sfumato.engine.run import Run
from sfumato.sampling.noise import CountedNoise
from sfumato.tasks import sudoku
from sfumato.templates.layout import EncodedTemplate, Sheet, lay_out, spans_of
from sfumato.templates.slots import check_template

PAPER, INK, GREY, LINE = "#fbfaf6", "#1c1a22", "#77727f", "#b9b4a8"
FREE, WARM, FORCED, OVERRULED, UNKNOWN, END = "#ffffff", "#f0dfb8", "#cfe0dd", "#e9a58b", "#f1eee6", "#dcd8cc"
STYLE = (
    "<style>text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px;fill:" + INK + "}"
    ".t{fill:" + GREY + "}.m{text-anchor:middle}.f{fill:#a8a399}.l{fill:#f4f1e8}.b{font-weight:bold}"
    "rect{stroke:" + LINE + ";stroke-width:.7}.g{stroke:" + INK + ";stroke-width:1.8;fill:none}"
    ".h{stroke:" + GREY + ";stroke-width:1;fill:none}</style>"
)
CELL, GAP, TOP = 22, 24, 34


def svg(width: float, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}">'
    sheet = f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{PAPER}" style="stroke:none"/>'
    return "\n".join([head, STYLE, sheet, *parts, "</svg>"]) + "\n"


def words(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" xml:space="preserve">{escape(text)}</text>'


def box(x: float, y: float, width: float, text: str, fill: str, kind: str = "") -> list[str]:
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{CELL}" fill="{fill}"/>',
        words(x + width / 2, y + CELL * 0.7, text, f"m {kind}"),
    ]


def key(x: float, y: float, entries: Sequence[tuple[str, str]]) -> list[str]:
    """A line that says what the fills mean."""
    parts = []
    for fill, text in entries:
        parts += [f'<rect x="{x:g}" y="{y - 11:g}" width="14" height="14" fill="{fill}"/>', words(x + 20, y, text, "t")]
        x += 20 + 7.9 * len(text) + 22
    return parts


def shown(text: str) -> str:
    """A token's text for the eye: blanks and what does not print get a mark."""
    text = text.replace("\n", "↵")
    return "".join("␣" if char == " " else char if char.isprintable() and char != "�" else "·" for char in text) or "·"


def stream(
    llm: LLM,
    sheet: Sheet,
    prompt: Any,
    options: Options,
    spans: Sequence[GrammarSpan] = (),
    recorder: Recorder | None = None,
) -> tuple[list[Draft], Done]:
    """What `LLM.fill` runs for a sheet, with its drafts; `recorder` listens to the guide of its first span."""
    options = replace(options, max_tokens=sheet.length, min_tokens=sheet.length, drafts=True)
    before = llm.planner.prompts.encode_before(prompt, sheet)
    ask = llm.planner.ask(Request(before, options, sheet.pins, sheet.warm, list(spans)))
    row = ask.row(llm.model.config, "0")
    if recorder is not None:
        recorder.guide = cast(Guide, row.spans[0].guide)
        row.spans[0].guide = cast(Guide, recorder)
    events = [ask.reader.with_text(event) for event in Run(llm.model, [row])]
    return [e for e in events if isinstance(e, Draft)], next(e for e in events if isinstance(e, Done))


# ---- a template, laid out ----------------------------------------------------------------------------------------


def template_picture(llm: LLM) -> tuple[str, str]:
    template = check_template(
        [
            "def ",
            Slot("name", length=4),
            "(r): # ",
            Slot("remark", text="disk area", strength=0.4),
            "\n return ",
            Slot("value", regex=r"r[*]r[*][0-9][.][0-9]{2}"),
        ]
    )
    slots = {piece.name: piece for piece in template if isinstance(piece, Slot)}
    grammar = llm.planner.grammars.compile("regex", slots["value"].regex)
    sheet = lay_out(
        EncodedTemplate.of(template, llm.tokenizer), llm.model.config, {"value": grammar.shortest()}, seed=4
    )
    kinds = {"name": "4 tokens", "remark": "old text, strength 0.4", "value": "regex"}
    fills = {"name": FREE, "remark": WARM, "value": FORCED}
    start = {position: place for place in sheet.places for position in range(place.start, place.start + place.width)}
    parts, x, wide = [words(20, 26, "template", "t"), words(20, 118, "canvas", "t")], 20.0, 24.0
    spread: dict[str, list[float]] = {}
    for position in range(sheet.length + 2):
        place = start.get(position)
        token = sheet.pins.get(position, sheet.warm.get(position))
        text = "" if token is None else llm.tokenizer.decode([token])
        is_end = token in llm.model.config.eos_ids
        width = max(wide, 10 + 8.2 * len(text))
        if place is None:
            parts += box(x, 128, width, "▪" if is_end else shown(text), CLUE if not is_end else END, "b")
        else:
            name = place.slot.name
            inside = ("~", fills[name], "f") if token is None else (shown(text), fills[name])
            parts += box(x, 128, width, *inside)
            spread.setdefault(name, [x, 0.0])[1] = x + width
        if is_end and sheet.pins.get(position - 1) in llm.model.config.eos_ids:
            parts.append(words(x + width + 8, 128 + CELL * 0.7, "… to its end", "t"))
            x += 96
        x += width
    ends = [20.0, *(at for pair in spread.values() for at in pair), 0.0]
    for number, piece in enumerate(template):
        left, right = ends[number], ends[number + 1]
        text = shown(piece) if isinstance(piece, str) else piece.name
        middle = (left + right) / 2
        parts.append(words(middle, 56, text, "m b" if isinstance(piece, str) else "m"))
        parts.append(words(middle, 74, "fixed" if isinstance(piece, str) else kinds[piece.name], "m t"))
        parts.append(f'<path d="M{left + 3:g} 92v-6H{right - 3:g}v6" class="h"/>')
    entries = [
        (CLUE, "pin: stays at every step"),
        (FREE, "noise"),
        (WARM, "old token, or noise; may change"),
        (FORCED, "walked by a grammar"),
        (END, "end, pinned"),
    ]
    return svg(max(x + 20, 980), 214, [*parts, *key(20, 190, entries)]), f"{sheet.length} positions"


# ---- a Sudoku as a template --------------------------------------------------------------------------------------


def puzzle_template(puzzle: str) -> list[str | Slot]:
    """Given digits are fixed text, every run of blanks is a slot of as many tokens."""
    runs = ((is_blank, "".join(cells)) for is_blank, cells in groupby(puzzle, key=lambda cell: cell == "0"))
    return [Slot(length=len(cells)) if is_blank else cells for is_blank, cells in runs]


def sudoku_picture(llm: LLM, clues: int, seed: int, frames: int) -> tuple[str, str]:
    puzzle = sudoku.generate(clues, np.random.default_rng(seed))
    prompt, options = [{"role": "user", "content": sudoku.prompt(puzzle)}], Options(seed=seed)
    template = check_template(puzzle_template(puzzle))
    sheet = lay_out(EncodedTemplate.of(template, llm.tokenizer), llm.model.config, {}, seed)
    drafts, done = stream(llm, sheet, prompt, options)
    filled = llm.fill(template, prompt, options=options)
    assert filled.text == llm.tokenizer.decode(done.tokens[:81]), "the picture is not what fill does"
    config = llm.model.config
    noise = CountedNoise([seed], [0], config.canvas_length, config.vocab_size, llm.model.device).canvas([0], [0])[0]
    boards: list[tuple[str, list[int], list[float] | None]] = [("step 0: noise", noise.tolist(), None)]
    for at in sorted({round(i * (len(drafts) - 1) / (frames - 2)) for i in range(frames - 1)}):
        boards.append((f"step {drafts[at].step} of {len(drafts)}", drafts[at].tokens, drafts[at].entropies))
    parts, size = [], 9 * CELL
    for number, (title, tokens, entropies) in enumerate(boards):
        left = GAP + number * (size + GAP)
        parts.append(words(left + size / 2, 22, title, "m t"))
        for cell in range(81):
            x, y, is_clue = left + cell % 9 * CELL, TOP + cell // 9 * CELL, puzzle[cell] != "0"
            text = puzzle[cell] if is_clue else shown(llm.tokenizer.decode([tokens[cell]]))
            entropy = 9.0 if entropies is None else entropies[cell]
            kind = "b" if is_clue else "" if entropy < 0.6 else "l"
            parts += box(x, y, CELL, text if len(text) == 1 else "·", CLUE if is_clue else colour(entropy), kind)
        for line in range(0, 10, 3):
            parts.append(f'<path d="M{left} {TOP + line * CELL}h{size}M{left + line * CELL} {TOP}v{size}" class="g"/>')
    bottom = TOP + size + 28
    scale = [(SMOKE[0], "sure"), (SMOKE[2], "0.1 nats"), (SMOKE[4], "1 nat"), (SMOKE[6], "undecided")]
    parts += key(GAP, bottom, [(CLUE, "pinned"), *scale])
    state = "solved" if sudoku.is_solved(filled.text, puzzle) else "not solved"
    return svg(GAP + len(boards) * (size + GAP), bottom + 20, parts), f"{clues} clues, {state} in {len(drafts)} steps"


# ---- an answer that obeys a schema -------------------------------------------------------------------------------


SCHEMA = {
    "type": "object",
    "properties": {
        "role": {"enum": ["pilot", "doctor"]},
        "name": {"type": "string", "minLength": 2, "maxLength": 6},
        "seat": {"enum": ["aisle", "window"]},
    },
    "required": ["role", "name", "seat"],
    "additionalProperties": False,
}


class Recorder:
    """A guide that remembers its walks."""

    guide: Guide

    def __init__(self) -> None:
        self.walks: list[tuple[list[int], Walk]] = []

    def walking(
        self, top: Sequence[int], is_sure: Sequence[bool], pick: Pick, bound: float, is_last: bool = False
    ) -> Interruptible[Walk]:
        walk = yield from self.guide.walking(top, is_sure, pick, bound, is_last)
        self.walks.append((list(top), replace(walk, tokens=walk.tokens[:])))
        return walk

    def __getattr__(self, name: str) -> Any:
        return getattr(self.guide, name)


def schema_picture(llm: LLM, seed: int, room: int, shown_steps: Sequence[int]) -> tuple[str, str]:
    prompt = [{"role": "user", "content": "Extract the record: Ada, who flies us, sits at the window."}]
    template = check_template([Slot("record", schema=SCHEMA, at_most=room)])
    sheet = lay_out(EncodedTemplate.of(template, llm.tokenizer), llm.model.config, {"record": room}, seed)
    (span,) = spans_of(sheet, {"record": llm.planner.grammars.compile("schema", SCHEMA)})
    recorder = Recorder()
    _, done = stream(llm, sheet, prompt, Options(seed=seed), [span], recorder)
    text = llm.fill(template, prompt, options=Options(seed=seed)).text
    assert text == sheet.texts(done.tokens, llm.tokenizer, llm.planner.fillers)["record"], (
        "the picture is not what fill does"
    )
    parts: list[str] = []
    right, left = 0.0, 84
    steps = [step for step in shown_steps if step <= len(recorder.walks)]
    if len(recorder.walks) not in steps:
        steps.append(len(recorder.walks))
    for line, step in enumerate(steps):
        top, walk = recorder.walks[step - 1]
        x, y = float(left), 20 + line * (CELL + 8)
        parts.append(words(20, y + CELL * 0.7, f"step {step}", "t"))
        for position in range(room):
            is_walked = position < len(walk.tokens)
            if walk.end is not None and not is_walked:
                width = 10.0
                parts += box(x, y, width, "", END)
            else:
                token = shown(llm.tokenizer.decode([walk.tokens[position] if is_walked else top[position]]))
                fill, kind = (FREE, "") if is_walked else (UNKNOWN, "f")
                fill = FORCED if is_walked and position in walk.forced else fill
                fill = OVERRULED if is_walked and position in walk.overruled else fill
                width = 8 + 7.9 * len(token)
                parts += box(x, y, width, token, fill, kind)
            x += width
            right = max(right, x)
    bottom = 20 + len(steps) * (CELL + 8) + 20
    entries = [
        (FORCED, "forced: follows from what stands before"),
        (FREE, "the model's own, allowed"),
        (OVERRULED, "overruled: the likeliest of the allowed"),
        (UNKNOWN, "a guess, not walked"),
        (END, "padding"),
    ]
    parts += key(20, bottom, entries)
    return svg(max(right + 20, 1240), bottom + 20, parts), f"{text} in {len(recorder.walks)} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs"), help="the folder they are written to")
    args = parser.parse_args()
    llm = LLM.load("nano")
    args.out.mkdir(exist_ok=True)
    for name, (picture, caption) in {
        "template": template_picture(llm),
        "sudoku": sudoku_picture(llm, clues=34, seed=5, frames=5),
        "schema": schema_picture(llm, seed=1, room=48, shown_steps=(1, 2, 3, 4, 6, 9, 12, 16)),
    }.items():
        path = args.out / f"canvas-{name}.svg"
        path.write_text(picture, encoding="utf-8")
        print(f"{path}: {caption}")


if __name__ == "__main__":
    main()
