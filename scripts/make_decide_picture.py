"""Draws docs/decide.svg: three questions about a document, each answered from a read, from a real run.

    .venv/bin/python scripts/make_decide_picture.py

The document is of the kind that nano-decide is trained on: it says itself how far answers can be trusted, so that the
right probability of each is known. A mark on each bar's track shows it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.smoke import CLUE, SMOKE
from sfumato import LLM, Choice, Decision, Decisions, Noul, Score

TRUST = 8
STATE = f"""trust {TRUST} of 10
ann red
gus blue
kim red
leo green
may blue"""
LEVELS = "none one two three four five".split()
QUESTIONS: Mapping[str, Noul | Choice | Score] = {
    "green": Noul("Is any line green?"),
    "desk": Choice({"gold": "gold lines", "green": "green lines", "pink": "pink lines"}, "Which takes this?"),
    "reds": Score(LEVELS, "How many are red?"),
}
RIGHT = {"green": "true", "desk": "green", "reds": "2"}

GROUND, PANEL, TRACK, PALE, GREY = "#211f29", "#2a2833", "#3a3745", "#f4f1e8", "#a9a4b8"
STYLE = (
    "<style>text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px;fill:" + PALE + "}"
    ".t{fill:" + GREY + "}.b{font-weight:bold}.e{text-anchor:end}.m{text-anchor:middle}</style>"
)
LEFT, WIDE, GAP, ROW, TOP = 210, 262, 22, 24, 24


def known(id: str, option: str) -> float:
    """The right probability of an option: what is left of the trust is shared, by a level's neighbours or by all."""
    if option == RIGHT[id]:
        return TRUST / 10
    others = [other for other in QUESTIONS[id].options if other != RIGHT[id]]
    if isinstance(QUESTIONS[id], Score):
        others = [other for other in others if abs(int(other) - int(RIGHT[id])) == 1]
    return (1 - TRUST / 10) / len(others) if option in others else 0.0


def words(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" xml:space="preserve">{escape(text)}</text>'


def panel(x: float, width: float, height: float) -> str:
    return f'<rect x="{x:g}" y="{TOP}" width="{width:g}" height="{height:g}" rx="6" fill="{PANEL}"/>'


def names_of(id: str) -> Mapping[str, str]:
    """What each option is called in the picture."""
    question = QUESTIONS[id]
    if isinstance(question, Noul):
        return {"true": "yes", "false": "no"}
    if isinstance(question, Score):
        return {str(level): f"{level} {name}" for level, name in enumerate(LEVELS)}
    return {option: option for option in question.options}


def bars(x: float, id: str, decision: Decision) -> list[str]:
    """One question, the likeliest answer, and its options with their bars."""
    question = QUESTIONS[id]
    title = f"{question.kind} · confidence {decision.confidence:.2f}"
    if question.kind == "score":
        title = f"{question.kind} · expected {decision.score:.2f}"
    parts = [words(x + 14, TOP + 26, str(question.instructions), "b"), words(x + 14, TOP + 46, title, "t")]
    start, length = x + 92, WIDE - 92 - 62
    for row, (option, name) in enumerate(names_of(id).items()):
        y, share = TOP + 68 + row * ROW, decision.probabilities[option]
        is_top = option == decision.choice
        parts.append(words(x + 14, y + 11, name, "b" if is_top else "t"))
        parts.append(f'<rect x="{start:g}" y="{y}" width="{length}" height="12" rx="3" fill="{TRACK}"/>')
        fill = SMOKE[1] if is_top else SMOKE[4]
        parts.append(f'<rect x="{start:g}" y="{y}" width="{length * share:.1f}" height="12" rx="3" fill="{fill}"/>')
        mark = start + length * known(id, option)
        parts.append(f'<path d="M{mark:.1f} {y - 3}v18" stroke="{CLUE}" stroke-width="2.5"/>')
        parts.append(words(x + WIDE - 12, y + 11, f"{share:.1%}", "e" if is_top else "e t"))
    return parts


def caption_of(decisions: Decisions, samples: int) -> str:
    """What the run took."""
    usage = decisions.usage
    return (
        f"{usage.prompt_tokens} tokens read once, three questions of {samples} draws each: {usage.passes} passes, "
        f"{usage.seconds * 1000:.0f} ms; green marks: the right probabilities"
    )


def picture(decisions: Mapping[str, Decision], caption: str) -> str:
    """The picture with its caption."""
    height = 68 + ROW * max(len(question.options) for question in QUESTIONS.values()) + 8
    parts = [panel(GAP, LEFT, height)]
    parts += [words(GAP + 14, TOP + 26 + 22 * at, line) for at, line in enumerate(STATE.split("\n"))]
    for number, (id, decision) in enumerate(decisions.items()):
        x = GAP + LEFT + GAP + number * (WIDE + GAP)
        parts += [panel(x, WIDE, height), *bars(x, id, decision)]
    width = 2 * GAP + LEFT + len(decisions) * (WIDE + GAP)
    bottom = TOP + height + 30
    parts.append(words(width / 2, bottom, caption, "m t"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 20}" width="{width}">'
    ground = f'<rect width="{width}" height="{bottom + 20}" rx="8" fill="{GROUND}"/>'
    return "\n".join([head, STYLE, ground, *parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="nano-decide")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/decide.svg"))
    args = parser.parse_args()
    llm = LLM.load(args.model)
    llm.decide(STATE, QUESTIONS, samples=args.samples, seed=args.seed)
    llm.forget()  # the second time is without what the first one compiled, and encodes as it did
    decisions = llm.decide(STATE, QUESTIONS, samples=args.samples, seed=args.seed)
    caption = caption_of(decisions, args.samples)
    args.out.write_text(picture(decisions, caption))
    print(f"{args.out}: {caption}")


if __name__ == "__main__":
    main()
