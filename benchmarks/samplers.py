"""Settings of the sampler, each on the same items: what they answer right, in how many steps, beside the reference's.

    .venv/bin/python benchmarks/samplers.py nano --task sudoku --count 200 --threads 1 -o build/samplers.json

So many held-out items of each of a task's kinds (Sudoku: easy, medium, hard), at one seed, the same ones for every
setting. A setting is options by their names, as in `--setting "max_steps=12 confidence=0.05"`; without any, those of
`SETTINGS`. What the file has already is not run again.

A rule of stopping cuts a canvas's run and changes nothing before, so one run to the cap, step by step, judges all of
them: options of stopping are not run but looked up there, and so are rules that were not taken (`ROADS`). `--run` runs
the options all the same. Answers are of one canvas. No picture and no search: those are the evaluation's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from sfumato import LLM, Options
from sfumato.evals.tasks import answers
from sfumato.events import Draft, Event
from sfumato.options import MOST_REPEATS
from sfumato.tasks.task import Task, held_out_items, named

SEED = 7
BATCH = 50
SETTINGS = (
    "",
    *(f"max_steps={steps}" for steps in (6, 8, 12, 16)),
    *(f"cap={steps}" for steps in (8, 10, 12, 16, 20)),
    *(f"entropy_bound={bound}" for bound in (0.3, 1, 3, 10)),
    *(f"confidence={mean}" for mean in (0.01, 0.02, 0.03, 0.05, 0.1)),
    *(f"stability={still} confidence=100" for still in (1, 2, 3, 4)),
    "stability=0",
    "stability=0 confidence=0.02",
    *(f"repeats={count}" for count in (4, 5, 6, 7, 8)),
    *(f"repeats={count} confidence=0.02" for count in (6, 7)),
    *(f"row={count}" for count in (3, 4, 5, 6)),
    *(f"whole={count}" for count in (4, 5, 6, 7, 8)),
    *(f"plateau={count}" for count in (2, 4, 6)),
    *(f"fade={mean}" for mean in (0.005, 0.01)),
)
HEAD = ["setting", "kind", "right", "steps", "steps less", "lost", "gained"]
Flags = npt.NDArray[np.bool_]


class Trace(NamedTuple):
    """A canvas's run to the cap."""

    tokens_SL: npt.NDArray[np.int64]
    """The argmax canvas of each step."""
    entropy_SL: npt.NDArray[np.float64]
    is_right: list[bool]
    """Whether the canvas of a step, committed, would be right."""


# ---- rules of stopping, each step by step -------------------------------------------------------------------------


def still(trace: Trace) -> npt.NDArray[np.int64]:
    """For how many steps before each one a position had its token, [S, L]."""
    still_SL = np.zeros(trace.tokens_SL.shape, np.int64)
    for step in range(1, len(still_SL)):
        is_same_L = trace.tokens_SL[step] == trace.tokens_SL[step - 1]
        still_SL[step] = np.where(is_same_L, still_SL[step - 1] + 1, 0)
    return still_SL


def settles(trace: Trace, stability: float, confidence: float) -> Flags:
    """The reference's rule."""
    return np.array((still(trace) >= stability).all(1) & (trace.entropy_SL.mean(1) < confidence), np.bool_)


def repeats(trace: Trace, count: float) -> Flags:
    """Each position has had its token at so many of the last steps."""
    last = (trace.tokens_SL[max(0, s + 1 - MOST_REPEATS) : s + 1] for s in range(len(trace.tokens_SL)))
    return np.array([(own == own[-1]).sum(0).min() >= count for own in last])


def stands(trace: Trace, count: float) -> Flags:
    """No position has changed for so many steps, however unsure."""
    return np.asarray((still(trace) >= count).all(1))


def returns(trace: Trace, count: float) -> Flags:
    """The canvas as a whole has been there so many times, this one included."""
    canvases = [own.tobytes() for own in trace.tokens_SL]
    return np.array([canvases[: s + 1].count(canvases[s]) >= count for s in range(len(canvases))])


def plateaus(trace: Trace, count: float) -> Flags:
    """The mean entropy has not fallen by a tenth for so many steps."""
    best, since, flags = np.inf, 0, []
    for step, mean in enumerate(trace.entropy_SL.mean(1)):
        if mean < 0.9 * best:
            best, since = mean, step
        flags.append(step - since >= count)
    return np.array(flags)


def fades(trace: Trace, mean: float) -> Flags:
    """Stable, and sure where a position's entropy halves with every further step that it stands still."""
    still_SL = still(trace)
    return np.asarray((still_SL >= 1).all(1) & ((trace.entropy_SL * 0.5**still_SL).mean(1) < mean))


def is_cut_off(trace: Trace, count: float) -> Flags:
    """A cap on steps that leaves the schedule of temperatures as it is."""
    return np.arange(1, len(trace.tokens_SL) + 1) >= count


CUTS: dict[str, Callable[[Trace, float], Flags]] = {"cap": is_cut_off, "repeats": repeats}
ROADS = {"row": stands, "whole": returns, "plateau": plateaus, "fade": fades}
"""Rules that were not taken."""


def cut(traces: Sequence[Trace], setting: Mapping[str, Any], options: Options) -> dict[str, list[int]]:
    """Whether each is right, and its steps, where a run to the cap is cut by these rules."""
    stability, confidence = options.stability, options.confidence
    assert stability is not None and confidence is not None
    result: dict[str, list[int]] = {"right": [], "steps": []}
    for trace in traces:
        stops_S = settles(trace, setting.get("stability", stability), setting.get("confidence", confidence))
        for name, rule in (CUTS | ROADS).items():
            if name in setting:
                stops_S |= rule(trace, setting[name])
        step = int(stops_S.argmax()) if stops_S.any() else len(stops_S) - 1
        result["right"].append(int(trace.is_right[step]))
        result["steps"].append(step + 1)
    return result


# ---- runs -----------------------------------------------------------------------------------------------------------


def items_of(task: Task, count: int) -> dict[str, list[str]]:
    """So many items of each kind."""
    most = max(4 * count, 64)  # enough to have met every kind
    while True:
        kinds: dict[str, list[str]] = {}
        for item in held_out_items(task, most, SEED):
            kinds.setdefault(task.kind(item) if task.kind is not None else "all", []).append(item)
        if all(len(some) >= count for some in kinds.values()):
            return {kind: some[:count] for kind, some in sorted(kinds.items())}
        most *= 2


def read(setting: str) -> dict[str, Any]:
    """Names and values of "max_steps=12 early=true"."""
    pairs = (word.partition("=") for word in setting.split())
    return {name: json.loads(value) for name, _, value in pairs}


def run(llm: LLM, task: Task, items: Sequence[str], setting: Mapping[str, Any]) -> dict[str, list[int]]:
    """Whether each is right, and its steps."""
    options = Options.from_dict({"seed": SEED, **setting})
    results = list(answers(llm, task, items, options, BATCH))
    return {"right": [int(one.is_right) for one in results], "steps": [one.steps for one in results]}


def traces_of(llm: LLM, task: Task, items: Sequence[str]) -> list[Trace]:
    """Each item's canvas, step by step to the cap."""
    drafts: list[list[Draft]] = []
    events = llm.events

    def watched(ids: Sequence[Any], **more: Any) -> Iterator[Event]:
        first = len(drafts)
        drafts.extend([] for _ in ids)
        for event in events(ids, **more):
            if isinstance(event, Draft) and event.canvas == 0:
                drafts[first + event.row].append(event)
            yield event

    options = Options(seed=SEED, confidence=0.0, drafts=True, max_tokens=llm.model.config.canvas_length)
    with patch.object(llm, "events", watched):
        list(answers(llm, task, items, options, BATCH))
    if len(drafts) != len(items):
        raise SystemExit(f"the task {task.name} is answered in place, so its steps are not seen; give --run")
    traces = []
    for item, own in zip(items, drafts, strict=True):
        tokens = [draft.tokens for draft in own]
        texts = {tuple(row): text_of(llm, row) for row in tokens}
        right = {row: task.is_right(text, item) for row, text in texts.items()}
        entropy_SL = np.array([draft.entropies for draft in own], np.float64)
        traces.append(Trace(np.array(tokens), entropy_SL, [right[tuple(row)] for row in tokens]))
    return traces


def text_of(llm: LLM, tokens: Sequence[int]) -> str:
    """A canvas up to its end, as text."""
    ends = [n for n, token in enumerate(tokens) if token in llm.model.config.eos_ids]
    return llm.tokenizer.decode(list(tokens[: ends[0]] if ends else tokens))


def lines(rows: Mapping[str, Mapping[str, Any]], settings: Sequence[str], kinds: Sequence[str]) -> list[list[str]]:
    """The table's rows: each setting beside the first, pair by pair."""
    cells = []
    for setting in settings:
        for kind in kinds:
            base, own = rows[settings[0]][kind], rows[setting][kind]
            pairs = list(zip(base["right"], own["right"], strict=True))
            mean, before = statistics.mean(own["steps"]), statistics.mean(base["steps"])
            right, less = f"{statistics.mean(own['right']):.1%}", f"{1 - mean / before:.0%}"
            changes = [str(pairs.count((1, 0))), str(pairs.count((0, 1)))]
            cells.append([setting or "reference", kind, right, f"{mean:.2f}", less, *changes])
    return cells


def figures_of(llm: LLM, task: Task, items: Sequence[str], can_cut: bool) -> Callable[[str], dict[str, list[int]]]:
    """What gives a setting's figures on these items, by a run of its own or from one run that all share."""
    traces: list[Trace] = []
    options = Options().with_defaults(llm.defaults)

    def figures(setting: str) -> dict[str, list[int]]:
        own = read(setting)
        is_cut = own.keys() <= {"stability", "confidence", *CUTS, *ROADS}
        if not is_cut or (not can_cut and not own.keys() & {"cap", *ROADS}):
            return run(llm, task, items, own)
        if not traces:
            traces.extend(traces_of(llm, task, items))
        return cut(traces, own, options)

    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--task", default="sudoku")
    parser.add_argument("--count", type=int, default=200, help="items of each kind")
    parser.add_argument("--setting", action="append", help="options by their names; may be given several times")
    parser.add_argument("--run", action="store_true", help="run rules of stopping, too, each by itself")
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
    for kind, items in kinds.items():
        figures = figures_of(llm, task, items, not arguments.run)
        for setting in settings:
            if kind not in rows.setdefault(setting, {}):
                common.say(f"{kind}: {setting or 'reference'}")
                rows[setting][kind] = figures(setting)
                if path is not None:
                    common.write(path, kept)
    print(common.table(HEAD, lines(rows, settings, list(kinds))))


if __name__ == "__main__":
    main()
