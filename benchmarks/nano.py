"""How well nano solves Sudoku: fresh puzzles a band, as diffusion and one token at a time, with the same weights.

    .venv/bin/python benchmarks/nano.py -o benchmarks/results/nano.json

Puzzles come from `sudoku.generate` with a seed of their own: exactly so many clues, unique solutions, none from the
training pool. Prints a table and writes JSON with hardware, versions, commit and command.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.evals.sudoku import Solved, solve
from sfumato.llm import LLM
from sfumato.options import Options
from sfumato.tasks import sudoku

BANDS = {"easy": (40, 55), "medium": (30, 39), "hard": (24, 29)}
"""Clues of the fresh puzzles, both ends included."""


UNPINNED = "diffusion, clues not pinned"
TRIES: dict[str, dict[str, int]] = {
    "diffusion, repeats 3, redos 1": {"repeats": 3, "redos": 1},
    "diffusion, repeats 4, redos 8": {"repeats": 4, "redos": 8},
}
"""Modes in which a canvas that does not settle begins again."""


def puzzles(band: str, count: int, seed: int) -> list[str]:
    """`count` fresh puzzles of a band, clues uniform over it."""
    rng = np.random.default_rng([seed, *BANDS[band]])
    low, high = BANDS[band]
    return [sudoku.generate(int(clues), rng) for clues in rng.integers(low, high + 1, count)]


def summary(results: list[Solved], seconds: float) -> dict[str, float]:
    """Figures of one band and mode."""
    count = len(results)
    return {
        "puzzles": count,
        "solved": sum(s.solved for s in results) / count,
        "mean_steps": sum(s.steps for s in results) / count,
        "mean_passes": sum(s.passes for s in results) / count,
        "tokens_per_pass": sum(s.tokens for s in results) / sum(s.passes for s in results),
        "seconds": round(seconds, 2),
    }


def rows(llm: LLM, count: int, batch: int, seed: int, modes: list[str]) -> Iterator[dict[str, object]]:
    """One record a band and mode."""
    for band in BANDS:
        some = puzzles(band, count, seed)
        for name in modes:
            began = time.perf_counter()
            mode: Any = "autoregressive" if name == "autoregressive" else "diffusion"
            options = Options(seed=seed, mode=mode, temperature=0.0, **TRIES.get(name, {}))  # type: ignore[arg-type]
            is_pinned = mode == "diffusion" and name != UNPINNED
            results = list(solve(llm, some, options, is_pinned, batch))
            yield {"band": band, "clues": BANDS[band], "mode": name, **summary(results, time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--modes", default=";".join(["diffusion", *TRIES, UNPINNED, "autoregressive"]))
    parser.add_argument("--ops", default="auto")
    parser.add_argument("--dtype", help="default: the checkpoint's, float32")
    parser.add_argument("--quantize", help="weights in fewer bits: int8, int4, …")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    llm = LLM.load(args.model, dtype=args.dtype, ops=args.ops, quantize=args.quantize)
    print(f"{'band':8} {'mode':28} {'solved':>7} {'steps':>6} {'tokens/pass':>11}")
    records = []
    for record in rows(llm, args.count, args.batch, args.seed, args.modes.split(";")):
        records.append(record)
        print(
            f"{record['band']:8} {record['mode']:28} {record['solved']:7.1%} {record['mean_steps']:6.1f} "
            f"{record['tokens_per_pass']:11.1f}",
            flush=True,
        )
    if args.out:
        from sfumato.measure.machine import environment

        args.out.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "what": "nano",
            "weights": args.quantize or args.dtype or "float32",
            "ops": llm.model.ops.name,
            "seed": args.seed,
        }
        whole |= {"rows": records, "environment": environment()}
        args.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
