"""What tries of a canvas are worth: settings of `redos` and `verify`, and several draws of one answer side by side.

    .venv/bin/python benchmarks/tries.py --threads 1 -o build/tries.json

Fresh Sudokus of each band, clues pinned, batches of 100. The first table is of runs. The second is of independent draws
of the reference's own setting (seeds 7, 8, …), each judged by one encode pass: what a vote, the likeliest and the first
to settle would have answered, and what two signals say of a wrong one. What the file has already is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.nano import BANDS, puzzles
from sfumato import LLM, Options
from sfumato.evals.sudoku import request, result
from sfumato.events import Commit, Done

SEED, BATCH = 7, 100
SHORT = {"max_steps": 8, "temperature_steps": 24}
SETTINGS: dict[str, dict[str, Any]] = {
    "reference": {},
    "max_steps 8, redos 1": {**SHORT, "redos": 1},
    "max_steps 8, redos 2": {**SHORT, "redos": 2},
    "max_steps 8": SHORT,
    "repeats 3, redos 1": {"repeats": 3, "redos": 1},
    "repeats 4, redos 2": {"repeats": 4, "redos": 2},
    "repeats 4, redos 8": {"repeats": 4, "redos": 8},
    "redos 1, verify 4": {"redos": 1, "verify": 4.0},
    "redos 2, verify 4": {"redos": 2, "verify": 4.0},
}
GAPS = (2.0, 4.0, 6.0)


class Draw(NamedTuple):
    """One answer to one puzzle."""

    is_right: bool
    steps: int
    passes: int
    text: str = ""
    gap: float = 0.0
    """By how much the causal direction prefers another token, at most, in nats."""
    mean: float = 0.0
    """The mean log-probability of the tokens that were free."""


def draws(llm: LLM, some: Sequence[str], options: Options) -> Iterator[Draw]:
    """An answer to each, in their order; with log-probabilities they are judged."""
    for start in range(0, len(some), BATCH):
        part = some[start : start + BATCH]
        ids, pins = zip(*(request(llm, puzzle) for puzzle in part), strict=True)
        judged: dict[int, tuple[float, float]] = {}
        done: dict[int, Done] = {}
        for event in llm.events(ids, options=options, pins=list(pins)):
            if isinstance(event, Commit) and event.top_logprobs is not None and event.logprobs is not None:
                free = [place for place in range(len(event.tokens)) if place not in pins[event.row]]
                gaps = [max(event.top_logprobs[place].values()) - event.logprobs[place] for place in free]
                judged[event.row] = max(gaps), statistics.mean(event.logprobs[place] for place in free)
            elif isinstance(event, Done):
                done[event.row] = event
        for row, puzzle in enumerate(part):
            solved = result(puzzle, done[row])
            yield Draw(solved.solved, solved.steps, solved.passes, solved.answer, *judged.get(row, (0.0, 0.0)))


def vote(tries: Sequence[Draw]) -> Draw:
    """The answer that most draws agree on; of several the likeliest."""
    counts = Counter(one.text for one in tries)
    return max(tries, key=lambda one: (counts[one.text], one.mean))


CHOICES: dict[str, Callable[[Sequence[Draw]], Draw]] = {
    "the first draw": lambda tries: tries[0],
    "vote": vote,
    "likeliest": lambda tries: max(tries, key=lambda one: one.mean),
    "first to settle": lambda tries: min(tries, key=lambda one: one.steps),
}


def chosen_lines(by_seed: Sequence[Sequence[Draw]], band: str, cap: int) -> Iterator[list[str]]:
    """Of the draws of one band: what each choice answers right, and what settling and gaps say."""
    for count in (3, 5):
        sets = list(zip(*by_seed[:count], strict=True))
        for name, choose in CHOICES.items():
            share = statistics.mean(choose(tries).is_right for tries in sets)
            yield [band, f"{name} of {count}", f"{share:.1%}"]
        yield [band, f"any of {count}", f"{statistics.mean(any(one.is_right for one in own) for own in sets):.1%}"]
    every = [one for own in by_seed for one in own]
    wrong, right = ([one for one in every if one.is_right is flag] for flag in (False, True))
    for some, of in (wrong, "wrong"), (right, "right"):
        if some:
            yield [band, f"{of}, at the cap", f"{statistics.mean(one.steps >= cap for one in some):.1%}"]
            for gap in GAPS:
                yield [band, f"{of}, gap above {gap:g}", f"{statistics.mean(one.gap > gap for one in some):.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--count", type=int, default=200, help="puzzles of each band")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, help="a file that keeps what has run")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path, llm = arguments.out, LLM.load(arguments.model)
    kept: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    items = {band: puzzles(band, arguments.count, SEED) for band in BANDS}

    def run(name: str, band: str, options: Options) -> list[Draw]:
        key = f"{arguments.model} {arguments.count} {name} {band}"
        if key not in kept:
            common.say(key)
            kept[key] = [*draws(llm, items[band], options)]
            if path is not None:
                common.write(path, kept)
        return [Draw(*one) for one in kept[key]]

    lines = []
    for name, own in SETTINGS.items():
        cells = [name]
        for band in BANDS:
            some = run(name, band, Options(seed=SEED, max_tokens=82, **own))
            right, passes = (statistics.mean(getattr(one, of) for one in some) for of in ("is_right", "passes"))
            cells.append(f"{right:.1%} / {passes:.2f}")
        lines.append(cells)
    print(common.table(["setting", *(f"{band}: right / passes" for band in BANDS)], lines))
    cap = llm.defaults.get("max_steps", 48)
    chosen: list[list[str]] = []
    for band in BANDS:
        options = [Options(seed=SEED + n, max_tokens=82, logprobs=True, top_logprobs=1) for n in range(arguments.draws)]
        by_seed = [run(f"judged, seed {own.seed}", band, own) for own in options]
        chosen += chosen_lines(by_seed, band, cap)
    print(common.table(["band", "of independent draws", "share"], chosen))


if __name__ == "__main__":
    main()
