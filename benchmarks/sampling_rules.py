"""What top-p, top-k, min-p, penalties and presets do to a canvas: puzzles solved, steps and time beside the default.

    .venv/bin/python benchmarks/sampling_rules.py -o benchmarks/results/sampling_rules.json

nano, whole Sudokus with their clues pinned. Some ways that were not taken stand below, each in the place of one of the
sampler's functions. Digits must repeat in a Sudoku; so a second table has what penalties are for: different tokens, and
pairs that came before, in texts of a small random model. The settings take turns puzzle by puzzle.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.nano import puzzles
from sfumato import LLM, Options
from sfumato.engine.run import generate
from sfumato.evals.sudoku import solve
from sfumato.events import Done
from sfumato.measure.parts import random_config, random_model
from sfumato.measure.work import duration
from sfumato.ops.contract import NEVER
from sfumato.sampling import distribution
from sfumato.sampling.distribution import RowSampler

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_p 0.8": {"top_p": 0.8},
    "top_k 64": {"top_k": 64},
    "top_k 1": {"top_k": 1},
    "min_p 0.05": {"min_p": 0.05},
    "presence_penalty 0.5": {"presence_penalty": 0.5},
    "frequency_penalty 0.5": {"frequency_penalty": 0.5},
    "repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "temperature 0.7": {"temperature": 0.7},
    "preset: temperature 0.7, top_p 0.95, top_k 64": {"temperature": 0.7, "top_p": 0.95, "top_k": 64},
}
TEXTS: dict[str, dict[str, Any]] = {
    "default": {},
    "top_p 0.9": {"top_p": 0.9},
    "presence_penalty 1": {"presence_penalty": 1.0},
    "frequency_penalty 0.5": {"frequency_penalty": 0.5},
    "frequency_penalty 2": {"frequency_penalty": 2.0},
    "repetition_penalty 1.3": {"repetition_penalty": 1.3},
}
NOT_TAKEN: dict[str, list[str]] = {
    "soft embedding truncated too": ["top_p 0.95", "top_p 0.8", "top_k 1"],
    "entropy of all words": ["top_p 0.95", "top_p 0.8", "top_k 1"],
    "words behind a position counted too": ["frequency_penalty 0.5"],
    "soft embedding of unmoved logits": ["frequency_penalty 0.5", "repetition_penalty 1.1"],
}
"""A way that was not taken -> the settings that it is measured with."""
SEED = 5
SHARP = 8.0
"""The random model's embeddings are multiplied by this, so that it says some words again and again."""

_apply, _with_earlier = RowSampler.apply_, distribution._with_earlier


def _truncated_soft(self: RowSampler, read: Any, place: int, *more: Any) -> None:
    _apply(self, read, place, *more)
    logits_LV = read.logits_BLV[place]
    p_LV = torch.softmax(logits_LV.float(), -1)
    logits_LV.masked_fill_(~self.truncation.kept(p_LV, read.argmax_BL[place]), NEVER)


def _entropy_of_all(self: RowSampler, read: Any, place: int, *more: Any) -> None:
    entropy_L = read.entropy_BL[place].clone()
    _apply(self, read, place, *more)
    read.entropy_BL[place] = entropy_L


def _unmoved_soft(self: RowSampler, read: Any, place: int, *more: Any) -> None:
    logits_LV = read.logits_BLV[place].clone()
    _apply(self, read, place, *more)
    read.logits_BLV[place] = logits_LV


def _with_others(count_PV: Tensor, canvas_L: Tensor, start: int) -> Tensor:
    word_L = canvas_L.clamp_min(0)
    is_same_LL = canvas_L[:, None] == word_L
    others_LL = is_same_LL.sum(0).expand(len(word_L), -1) - is_same_LL.long()
    others_PL = others_LL[start : start + len(count_PV)]
    word_PL = word_L.expand_as(others_PL)
    return count_PV.scatter(-1, word_PL, count_PV.gather(-1, word_PL) + others_PL)


_PLACES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "soft embedding truncated too": (RowSampler, "apply_", _truncated_soft),
    "entropy of all words": (RowSampler, "apply_", _entropy_of_all),
    "words behind a position counted too": (distribution, "_with_earlier", _with_others),
    "soft embedding of unmoved logits": (RowSampler, "apply_", _unmoved_soft),
}


@contextmanager
def way(name: str) -> Iterator[None]:
    """Within, the sampler goes this way; "" is its own."""
    if not name:
        yield
        return
    owner, attribute, function = _PLACES[name]
    before = getattr(owner, attribute)
    setattr(owner, attribute, function)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


def solved(llm: LLM, band: str, count: int) -> dict[str, Any]:
    """Every setting and every way that was not taken, on the same puzzles in turns."""
    cases = [("", name) for name in SETTINGS] + [(how, name) for how, names in NOT_TAKEN.items() for name in names]
    rows: dict[tuple[str, str], list[Any]] = {case: [] for case in cases}
    for number, puzzle in enumerate(puzzles(band, count, SEED)):
        if number % 50 == 0:
            common.say(f"{band}, {number} of {count}")
        for how, name in cases:
            with way(how):
                rows[how, name] += solve(llm, [puzzle], Options(seed=SEED, **SETTINGS[name]))
    return {
        f"{name}: {how}" if how else name: {
            "puzzles": count,
            "solved": statistics.mean(row.solved for row in some),
            "steps": statistics.mean(row.steps for row in some),
            "at_the_cap": statistics.mean(row.steps >= 24 for row in some),
            "seconds": statistics.median(row.seconds for row in some),
        }
        for (how, name), some in rows.items()
    }


def random_texts(count: int, length: int) -> dict[str, Any]:
    """Texts of random weights on canvases of 32, and token by token."""
    model = common.without_eos(random_model(random_config("tiny"), torch.float32, "cpu", "auto"))
    with torch.no_grad():
        model.embed_tokens.weight.mul_(SHARP)
    generator = torch.Generator().manual_seed(SEED)
    ids = [torch.randint(6, model.config.vocab_size, (8,), generator=generator).tolist() for _ in range(count)]
    results: dict[str, Any] = {"texts": count, "tokens": length, "settings": {}}
    for name, more in TEXTS.items():
        row: dict[str, Any] = {}
        for mode in ("diffusion", "autoregressive"):
            options = Options.from_dict({"seed": SEED, "max_tokens": length, "mode": mode, **more})
            texts = [event.tokens for event in generate(model, ids, options) if isinstance(event, Done)]
            row[mode] = {
                "different": statistics.mean(len(set(tokens)) for tokens in texts),
                "repeated_pairs": statistics.mean(
                    1 - len(set(itertools.pairwise(tokens))) / (length - 1) for tokens in texts
                ),
            }
        results["settings"][name] = row
    return results


HEAD = ["setting", "solved", "steps", "at the cap", "time"]
TEXT_HEAD = ["setting", "different tokens, canvas / token by token", "pairs that came before"]


def lines(bands: dict[str, Any]) -> list[list[str]]:
    """The rows of the first table, each band's figures side by side in a cell."""

    def cell(name: str, key: str, form: Callable[[float], str]) -> str:
        return " / ".join(form(rows[name][key]) for rows in bands.values())

    return [
        [
            name,
            cell(name, "solved", "{:.1%}".format),
            cell(name, "steps", "{:.2f}".format),
            cell(name, "at_the_cap", "{:.0%}".format),
            cell(name, "seconds", duration),
        ]
        for name in next(iter(bands.values()))
    ]


def text_lines(texts: dict[str, Any]) -> list[list[str]]:
    """The rows of the second table."""
    return [
        [
            name,
            " / ".join(f"{one['different']:.1f}" for one in row.values()),
            " / ".join(f"{one['repeated_pairs']:.0%}" for one in row.values()),
        ]
        for name, row in texts["settings"].items()
    ]


def main() -> None:
    parser: argparse.ArgumentParser = common.argument_parser(__doc__ or "", 0)
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--medium", type=int, default=300, help="puzzles of 30 to 39 clues")
    parser.add_argument("--hard", type=int, default=120, help="puzzles of fewer than 30")
    arguments = parser.parse_args()
    llm = LLM.load("nano", device=arguments.device, ops=arguments.ops)
    counts = {"medium": arguments.medium, "hard": arguments.hard}
    bands = {band: solved(llm, band, count) for band, count in counts.items() if count}
    record: dict[str, Any] = {"what": "sampling rules", "ops": llm.model.ops.name, "bands": bands}
    record["texts"] = random_texts(24, 128)
    medium = bands.get("medium", next(iter(bands.values())))
    most = max(
        row["steps"]
        for name, row in medium.items()
        if name.split()[0] in ("top_p", "top_k", "min_p") and ":" not in name
    )
    record["targets"] = {
        "steps with top-p, top-k or min-p beside those without, nano": common.target(
            most / medium["default"]["steps"], 1.02
        )
    }
    print(common.table(HEAD, lines(bands)))
    print(common.table(TEXT_HEAD, text_lines(record["texts"])))
    common.finish(record, arguments)


if __name__ == "__main__":
    main()
