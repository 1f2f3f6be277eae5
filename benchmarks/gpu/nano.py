"""The trained model inside the package, in float32: recorded steps, eager ones and fused operations write one text.

Recorded and eager must agree to the last bit, and so must a row alone and among others; fused operations sum in another
order, and a free-running text may part from theirs in a rare case. Where the first two fail nothing later makes sense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.setting import Row, Setting, each_within, tried
from sfumato.engine.engine import EngineSettings
from sfumato.engine.run import Run
from sfumato.evals.sudoku import request
from sfumato.events import Done
from sfumato.llm import LLM
from sfumato.options import Options
from sfumato.tasks import sudoku
from sfumato.templates.slots import Slot

Texts = dict[str, list[list[int]]]
"""Way of running -> tokens of each answer: first of some rows alone, then of all at once."""


@dataclass(frozen=True)
class Variant:
    name: str
    options: Options
    is_pinned: bool = True
    canvases: int = 1


VARIANTS = (
    Variant("pins", Options(seed=3)),
    Variant("early", Options(seed=3, early=True)),
    Variant("bans", Options(seed=4, min_tokens=90), is_pinned=False),
    Variant("canvases", Options(seed=5, min_tokens=400, max_steps=6), is_pinned=False, canvases=2),
)


def run(setting: Setting, _: str) -> Iterator[Row]:
    torch.backends.cuda.matmul.allow_tf32 = False
    name = setting.ops(torch.float32)
    llms = {ops: LLM.load("nano", device=setting.device, dtype="float32", ops=ops) for ops in (name, "fused")}
    each = {variant.name: variant for variant in VARIANTS}

    def row(variant: str) -> Row:
        row = tried(variant, lambda: compare(setting, llms, name, each[variant]))
        if not row.get("is_same_recorded") or not row.get("is_same_alone") or 2 * row["as_fused"] < row["of"]:
            row["stop"] = f"nano is not right: {variant}"
        return row

    yield from each_within(setting, list(each), row)
    yield from each_within(setting, ["templates"], lambda _: tried("templates", lambda: templates(llms, name)))


def compare(setting: Setting, llms: dict[str, LLM], name: str, variant: Variant) -> dict[str, Any]:
    """How many answers of the ways are equal. What fails in one way is said beside the others."""
    ways = {"recorded": (name, True, 1), "eager": (name, False, 0), "fused": ("fused", False, 0)}
    texts: Texts = {}
    errors = {}
    for way, (ops, record, lag) in ways.items():
        row = tried(way, lambda at=(ops, record, lag): {"tokens": tokens(setting, llms[at[0]], variant, *at[1:])})  # type: ignore[misc]
        texts[way] = row.pop("tokens", [])
        if "error" in row:
            errors[way] = row["error"]
    eager, alone = texts["eager"], 1 if setting.is_dry else 2
    count = len(eager)

    def same(answers: list[list[int]], others: list[list[int]]) -> int:
        return sum(x == y for x, y in zip(answers, others, strict=False))

    row = {
        "of": count,
        "is_same_recorded": bool(eager) and texts["recorded"] == eager,
        "is_same_alone": bool(eager) and eager[:alone] == eager[alone : 2 * alone],
        "as_recorded": same(texts["recorded"], eager),
        "as_fused": same(texts["fused"], eager),
        "tokens": sum(map(len, eager)),
    }
    is_right = row["is_same_recorded"] and row["is_same_alone"] and row["as_fused"] == count
    says = f"{variant.name} {row['as_recorded']} of {count} as eager, {row['as_fused']} as fused"
    return row | {"ok": is_right, "says": says} | ({"errors": errors} if errors else {})


def tokens(setting: Setting, llm: LLM, variant: Variant, record: bool, lag: int) -> list[list[int]]:
    """One or two rows by themselves, then eight at once (dry: two)."""
    count, alone = (2, 1) if setting.is_dry else (8, 2)
    puzzles = [sudoku.generate(40, np.random.default_rng(i)) for i in range(count)]
    ids, pins = zip(*(request(llm, puzzle, variant.is_pinned) for puzzle in puzzles), strict=True)
    length = llm.model.config.canvas_length * variant.canvases
    most = {"max_tokens": length, "min_tokens": min(variant.options.min_tokens, length)}
    options = replace(variant.options, **most).with_defaults(llm.defaults)  # type: ignore[arg-type]
    if setting.is_dry:
        options = replace(options, max_steps=2)
    answers = []
    for some in [*([i] for i in range(alone)), list(range(count))]:
        each: dict[str, Any] = {"pins": [pins[i] for i in some], "settings": EngineSettings(record=record, lag=lag)}
        events = Run(llm.model, [ids[i] for i in some], options, **each)
        done = {event.row: event.tokens for event in events if isinstance(event, Done)}
        answers += [done[row] for row in range(len(some))]
    return answers


def templates(llms: dict[str, LLM], name: str) -> dict[str, Any]:
    """What `infill` and `fill` write: with these operations as they run by themselves, and with fused ones."""
    options = Options(seed=2, max_steps=4)
    texts = {}
    for ops in dict.fromkeys((name, "fused")):
        llm = llms[ops]
        between = llm.infill("530070000\n600195000\n", "\n800060003", 9, options=options)
        slots = llm.fill(["1 2 3 ", Slot("a", length=3), " 7 8 9 ", Slot("b", length=4)], options=options)
        texts[ops] = [between.text, slots.text]
    same = sum(a == b for a, b in zip(texts[name], texts["fused"], strict=True))
    return {"ok": same == 2, "says": f"templates {same} of 2", "texts": texts}
